//! Records: one JSON line per cell with everything needed to recompute and reproduce it. The only types written out.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::catalog::{Cell, Modality};
use crate::cost::PhaseCost;
use crate::hardware::Machine;
use crate::meters::Reading;
use crate::optimize::Plan;
use crate::profile::Profile;
use crate::session::{Engine, Phase};
use crate::sustain::Sustained;

/// Version of the format. A reader refuses newer lines by name; older ones are read.
pub const SCHEMA_VERSION: u32 = 1;

/// One cell, measured, skipped or failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Version of the format that the line is written in.
    pub schema_version: u32,
    /// When the cell began, RFC 3339 in UTC.
    pub started_at: String,
    /// What was measured.
    pub subject: Subject,
    /// Settings as asked for and as they were in effect.
    pub settings: Settings,
    /// How it ended.
    pub outcome: Outcome,
    /// Conditions that may have spoiled the measurement.
    pub warnings: Vec<Warning>,
    /// The machine.
    pub machine: Machine,
    /// The program.
    pub build: Build,
}

/// Settings asked for that say how long to sample, and not what.
const SAMPLING: [&str; 8] =
    ["quick", "target", "min-samples", "max-samples", "min-time", "max-time", "profile", "sustain"];

impl Record {
    /// What was measured, on which machine and with which settings, other than those of sampling: records that agree in
    /// all of it are of the same cell.
    pub fn identity(&self) -> BTreeMap<&str, String> {
        let requested = self.settings.requested.iter().filter(|(name, _)| !SAMPLING.contains(&name.as_str()));
        let mut identity: BTreeMap<&str, String> =
            requested.map(|(name, value)| (name.as_str(), value.clone())).collect();
        identity.extend([
            ("cell", self.subject.label()),
            ("checkpoint", self.subject.checkpoint.clone()),
            ("class", self.subject.class.clone()),
            ("engine", self.subject.engine.name().to_owned()),
            ("machine", self.machine.name()),
        ]);
        identity
    }

    /// Whole calls in the steady state, in the order in which they ran; empty where nothing was measured.
    pub fn calls_ns(&self) -> Vec<u64> {
        match &self.outcome {
            Outcome::Measured(measurement) => measurement.samples.iter().map(|sample| sample.total_ns).collect(),
            _ => Vec::new(),
        }
    }
}

/// Identity of the cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Subject {
    /// Family of the catalog.
    pub family: String,
    /// Its modality.
    pub modality: Modality,
    /// Repository on the Hub, or the folder that weights came from.
    pub checkpoint: String,
    /// `transformers` class.
    pub class: String,
    /// Distinct parameters, where known.
    pub parameters: Option<u64>,
    /// What was run, with its inputs.
    #[serde(deserialize_with = "lenient_cell")]
    pub cell: Cell,
    /// What ran it.
    pub engine: Engine,
}

impl Subject {
    /// `bert/forward/b1/s128`.
    pub fn label(&self) -> String {
        format!("{}/{}", self.family, self.cell.name)
    }
}

/// Requested settings by flag name, and what came of them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    /// As asked for (defaults filled in).
    pub requested: BTreeMap<String, String>,
    /// As in effect: `dtype`, `threads`, `device` (`cpu`, `cuda:0`), `weights`, pinning, kernel path of each kind of
    /// operation. Reports need the first three.
    pub effective: BTreeMap<String, String>,
    /// Hardware-aware optimisations that were on and off, each with its reason; empty in older records.
    #[serde(default)]
    pub optimizations: Plan,
}

impl Settings {
    /// Type that was computed in: `f32`.
    pub fn dtype(&self) -> Option<&str> {
        self.effective.get("dtype").map(String::as_str)
    }

    /// Device that it ran on: `cpu`, `cuda:0`.
    pub fn device(&self) -> Option<&str> {
        self.effective.get("device").map(String::as_str)
    }

    /// Threads that it ran on.
    pub fn threads(&self) -> Option<u32> {
        self.effective.get("threads")?.parse().ok()
    }

    /// Where weights came from: `synthetic:0`, a folder, `hub:owner/name@commit`.
    pub fn weights(&self) -> Option<&str> {
        self.effective.get("weights").map(String::as_str)
    }
}

/// How a cell ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    /// Samples are there.
    Measured(Box<Measurement>),
    /// Not run, with the reason (would not fit in memory, no implementation, no device).
    Skipped {
        /// Why.
        reason: String,
    },
    /// Run, and ended with an error.
    Failed {
        /// The error with its causes.
        error: String,
    },
}

/// Everything measured of a cell. All times are integer nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Measurement {
    /// Weights read or made, and the model built.
    pub load_ns: u64,
    /// The first call, which touches everything for the first time.
    pub first_call_ns: u64,
    /// Calls before the steady state, not used for results.
    pub warmup_ns: Vec<u64>,
    /// Calls that results are computed from, in the order in which they ran.
    pub samples: Vec<Sample>,
    /// What ended the sampling.
    pub stop: StopRule,
    /// Analytic cost of one call by phase.
    pub cost: Vec<PhaseCost>,
    /// Readings by interval: `load`, `first_call`, `steady`.
    pub readings: BTreeMap<String, Vec<Reading>>,
    /// Where the time of a call goes, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// A long run behind the samples, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sustained: Option<Sustained>,
}

/// One call in the steady state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    /// The whole call.
    pub total_ns: u64,
    /// Intervals between boundaries in order: `forward`, or `prefill` and then every `decode` step.
    pub phases: Vec<(Phase, u64)>,
}

/// Which rule ended the sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopRule {
    /// The interval of the median had become narrow enough.
    SpreadSettled,
    /// The most samples allowed.
    MaxSamples,
    /// The most time allowed.
    MaxTime,
    /// The user stopped the run; what was measured is kept.
    Interrupted,
}

/// A condition that may have spoiled the measurement, or what went wrong beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Warning {
    /// Kind: `load`, `steal`, `frequency`, `throttling`, `swap` from the meters; `drift`, `few_samples`, `spread`, `warmup`,
    /// `outliers` from the samples; `answer` when what came of real inputs could not be told or written.
    pub kind: String,
    /// What was seen, with its numbers, and what would help.
    pub message: String,
}

impl Warning {
    /// The kind of a warning that an answer failed; the measurement is as good as without.
    pub const ANSWER: &str = "answer";
}

/// The program that measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Build {
    /// Version of roofbench.
    pub version: String,
    /// Git commit, `-dirty` appended where the tree had changes; absent outside a checkout.
    pub commit: Option<String>,
    /// `release` or `debug`.
    pub profile: String,
    /// Target triple.
    pub target: String,
    /// Compiler.
    pub rustc: String,
    /// Cargo features in effect.
    pub features: Vec<String>,
    /// CPU features that the compiler was told to assume.
    pub target_features: Vec<String>,
}

impl Build {
    /// Facts about this build.
    ///
    /// `commit` and `features` come from the binary, which alone is rebuilt whenever any crate changes.
    pub fn current(commit: Option<&str>, features: &[&str]) -> Self {
        let target_features = env!("ROOFBENCH_TARGET_FEATURES").split(',').filter(|name| !name.is_empty());
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit.filter(|commit| !commit.is_empty()).map(str::to_owned),
            profile: env!("ROOFBENCH_PROFILE").to_owned(),
            target: env!("ROOFBENCH_TARGET").to_owned(),
            rustc: env!("ROOFBENCH_RUSTC").to_owned(),
            features: features.iter().map(|&name| name.to_owned()).collect(),
            target_features: target_features.map(str::to_owned).collect(),
        }
    }
}

/// A cell without what this version doesn't know: the catalog refuses unknown fields, a record does not.
fn lenient_cell<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Cell, D::Error> {
    let mut value = Value::deserialize(deserializer)?;
    let schema = schemars::schema_for!(Cell);
    if let (Some(fields), Some(known)) = (value.as_object_mut(), schema.get("properties").and_then(Value::as_object)) {
        fields.retain(|name, _| known.contains_key(name));
    }
    serde_path_to_error::deserialize(value).map_err(serde::de::Error::custom)
}

/// Why a record could not be kept or a file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The result file can't be opened for appending.
    #[error("{}: results can't be written here: {source}; name another file", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line could not be appended. The record is in `line`: print it, so that it isn't lost.
    #[error("{}: the record could not be appended: {source}", .path.display())]
    Append {
        /// The file.
        path: PathBuf,
        /// The whole record as a line of JSON.
        line: String,
        /// Why.
        source: std::io::Error,
    },
    /// A number of the record is not finite, so the line could not be read back. It was not appended; it is in `line`.
    #[error("{}: the record can't be read back and was not appended: `{field}`: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The record as a line of JSON, with `null` for what JSON can't hold.
        line: String,
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file can't be read at all.
    #[error("{}: records can't be read: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Appends records to a file, each on the disk before the next cell begins.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    /// The file ends within a line, which the next record must not be joined to.
    torn: bool,
}

impl Writer {
    /// Opens `path` for appending and makes its parent folders; call it before measuring, so that a bad path costs nothing.
    ///
    /// # Errors
    /// [`RecordError::Open`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, RecordError> {
        let path = path.into();
        let open = || {
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                fs::create_dir_all(parent)?;
            }
            let mut file = OpenOptions::new().create(true).append(true).read(true).open(&path)?;
            let torn = ends_within_line(&mut file)?;
            Ok((file, torn))
        };
        match open() {
            Ok((file, torn)) => Ok(Self { path, file, torn }),
            Err(source) => Err(RecordError::Open { path, source }),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one line and waits until the disk has it.
    ///
    /// # Errors
    /// [`RecordError::Append`] or [`RecordError::Unreadable`], each with the record in it.
    pub fn append(&mut self, record: &Record) -> Result<(), RecordError> {
        let failed =
            |line: String, source: std::io::Error| RecordError::Append { path: self.path.clone(), line, source };
        let line = serde_json::to_string(record).map_err(|error| failed(format!("{record:?}"), error.into()))?;
        if let Err(error) = parse(&line) {
            let (field, reason) = (error.path().to_string(), error.into_inner().to_string());
            return Err(RecordError::Unreadable { path: self.path.clone(), line, field, reason });
        }
        // one write, so that lines of processes that share the file do not mix
        let bytes = format!("{}{line}\n", if self.torn { "\n" } else { "" });
        match self.file.write_all(bytes.as_bytes()).and_then(|()| self.file.sync_data()) {
            Ok(()) => {
                self.torn = false;
                Ok(())
            }
            Err(source) => {
                self.torn = true;
                Err(RecordError::Append { path: self.path.clone(), line, source })
            }
        }
    }
}

/// Whether the last byte is not a line feed. What can't be sought (a pipe, a device) has no earlier line.
fn ends_within_line(file: &mut File) -> std::io::Result<bool> {
    let mut last = [b'\n'];
    if file.metadata()?.is_file() && file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok(last != *b"\n")
}

fn parse(line: &str) -> Result<Record, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(line))
}

/// What a file of records holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ReadOutcome {
    /// The whole records in order.
    pub records: Vec<Record>,
    /// Lines that could not be used: file, line number, why.
    pub problems: Vec<String>,
}

/// Reads the records of `path`. A damaged line, or one of a newer version, becomes a problem; all others are kept.
///
/// # Errors
/// [`RecordError::Read`] when the file itself can't be read.
pub fn read(path: impl AsRef<Path>) -> Result<ReadOutcome, RecordError> {
    let (lines, problems) = read_lines(path)?;
    Ok(ReadOutcome { records: lines.into_iter().map(|(record, _)| record).collect(), problems })
}

/// A record and the line that it was read from.
pub type Line = (Record, String);

/// As [`read`], each record with the line that it was read from, which may hold more than this version knows.
///
/// # Errors
/// As [`read`].
pub fn read_lines(path: impl AsRef<Path>) -> Result<(Vec<Line>, Vec<String>), RecordError> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
    let (mut lines, mut problems) = (Vec::new(), Vec::new());
    for (number, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        match read_line(line) {
            Ok((record, line)) => lines.push((record, line.trim().to_owned())),
            Err(problem) => problems.push(format!("{}: line {}: {problem}", path.display(), number + 1)),
        }
    }
    Ok((lines, problems))
}

fn read_line(line: &[u8]) -> Result<(Record, &str), String> {
    /// The part of a line that says whether the rest can be understood.
    #[derive(Deserialize)]
    struct Version {
        schema_version: u32,
    }
    let line = std::str::from_utf8(line).map_err(|error| format!("damaged: {error}"))?;
    let version: Version = serde_json::from_str(line).map_err(|error| match error.classify() {
        serde_json::error::Category::Eof => "truncated; the program was stopped while writing it".to_owned(),
        _ => format!("damaged: {error}"),
    })?;
    if version.schema_version > SCHEMA_VERSION {
        return Err(format!(
            "schema_version {} is newer than {SCHEMA_VERSION}, the newest that this roofbench reads; update it",
            version.schema_version
        ));
    }
    let record = parse(line).map_err(|error| format!("damaged: `{}`: {}", error.path(), error.inner()))?;
    Ok((record, line))
}

/// JSON Schema of a line.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Record).to_value();
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("title".into(), format!("roofbench record, schema version {SCHEMA_VERSION}").into());
    }
    schema
}

/// The text of `docs/record.schema.json`.
pub fn schema_text() -> String {
    format!("{:#}\n", schema())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cost::Cost;
    use crate::meters::{Quantity, Scope};
    use crate::workload::InputSpec;

    /// `bert/forward/b1/s128` in f32 on 2 threads of the testing machine, ten calls of 40 ms.
    pub(crate) fn record() -> Record {
        let text = |pairs: &[(&str, &str)]| pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let cost = Cost { flops: 1_000_000_000, weight_bytes: 50_000_000, ..Cost::default() };
        let memory = Reading {
            metric: "peak_rss".into(),
            unit: "B".into(),
            scope: Scope::Process,
            sensor: "VmHWM".into(),
            quantity: Quantity::Measured { value: 536_870_912.0 },
        };
        Record {
            schema_version: SCHEMA_VERSION,
            started_at: "2026-01-01T00:00:00Z".into(),
            subject: Subject {
                family: "bert".into(),
                modality: Modality::Text,
                checkpoint: "google-bert/bert-base-uncased".into(),
                class: "BertForMaskedLM".into(),
                parameters: Some(109_514_298),
                cell: Cell {
                    name: "forward/b1/s128".into(),
                    unit: "sequences".into(),
                    batch: 1,
                    amount: None,
                    new_tokens: None,
                    arguments: serde_json::Map::new(),
                    inputs: BTreeMap::from([("attention_mask".into(), InputSpec::Ones { ones: vec![1, 128] })]),
                },
                engine: Engine::Roofbench,
            },
            settings: Settings {
                requested: text(&[("batch", "1")]),
                effective: text(&[("device", "cpu"), ("dtype", "f32"), ("threads", "2"), ("weights", "synthetic:0")]),
                optimizations: Plan::default(),
            },
            outcome: Outcome::Measured(Box::new(Measurement {
                load_ns: 1_000_000_000,
                first_call_ns: 80_000_000,
                warmup_ns: vec![45_000_000, 41_000_000],
                samples: vec![Sample { total_ns: 40_000_000, phases: vec![(Phase::Forward, 40_000_000)] }; 10],
                stop: StopRule::SpreadSettled,
                cost: vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }],
                readings: BTreeMap::from([("steady".into(), vec![memory])]),
                profile: None,
                sustained: None,
            })),
            warnings: vec![Warning { kind: "load".into(), message: "load average 3.1 on 2 CPUs".into() }],
            machine: crate::roofline::tests::machine(),
            build: Build::current(Some("0123456789ab"), &["cuda"]),
        }
    }

    fn lines(path: &Path) -> Vec<String> {
        fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn what_is_appended_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/records.jsonl");
        let mut second = record();
        second.outcome = Outcome::Skipped { reason: "needs 40 GB, 24 GB are free".into() };
        let mut writer = Writer::open(&path).unwrap();
        writer.append(&record()).unwrap();
        // on the disk before the writer is closed
        assert_eq!(read(&path).unwrap().records, [record()]);
        writer.append(&second).unwrap();
        Writer::open(&path).unwrap().append(&record()).unwrap();
        assert_eq!(read(&path).unwrap(), ReadOutcome { records: vec![record(), second, record()], problems: vec![] });
    }

    #[test]
    fn a_path_that_cannot_be_written_is_found_before_measuring() {
        let folder = tempfile::tempdir().unwrap();
        let error = Writer::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&folder.path().display().to_string()) && error.contains("another file"), "{error}");
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(Writer::open(file.join("records.jsonl")), Err(RecordError::Open { .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_gives_the_record_back() {
        let mut writer = Writer::open("/dev/full").unwrap();
        let Err(RecordError::Append { line, .. }) = writer.append(&record()) else { panic!("written to a full disk") };
        assert_eq!(parse(&line).unwrap(), record());
    }

    #[test]
    fn a_number_that_json_cannot_hold_is_refused_with_its_field() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(folder.path().join("records.jsonl")).unwrap();
        let mut bad = record();
        bad.machine.cpu.quota = Some(f64::INFINITY);
        // an optional field reads `null` as absent
        writer.append(&bad).unwrap();
        bad.machine.peaks.as_mut().unwrap().compute[0].flops = f64::NAN;
        let Err(RecordError::Unreadable { field, line, .. }) = writer.append(&bad) else { panic!("appended") };
        assert_eq!(field, "machine.peaks.compute[0].flops");
        assert!(line.contains("null"));
        assert_eq!(read(writer.path()).unwrap().records.len(), 1);
    }

    #[test]
    fn damaged_and_newer_lines_are_named_and_the_others_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let whole = serde_json::to_string(&record()).unwrap();
        let newer = whole.replacen("\"schema_version\":1", "\"schema_version\":2", 1);
        let misspelt = whole.replacen("\"total_ns\":40000000", "\"total_ns\":\"fast\"", 1);
        let mut file = [&whole, &newer, "nonsense", "", &misspelt, &whole].join("\n").into_bytes();
        file.extend(b"\n\xff\xfe\n");
        file.extend(&whole.as_bytes()[..whole.len() / 2]);
        fs::write(&path, file).unwrap();
        let outcome = read(&path).unwrap();
        assert_eq!(outcome.records, [record(), record()]);
        let expected = [
            "line 2: schema_version 2 is newer",
            "line 3: damaged",
            "line 5: damaged: `outcome",
            "line 7: damaged: invalid utf-8",
            "line 8: truncated",
        ];
        assert_eq!(outcome.problems.len(), expected.len(), "{:#?}", outcome.problems);
        for (problem, expected) in outcome.problems.iter().zip(expected) {
            assert!(problem.contains(expected), "{problem} lacks {expected}");
        }
        assert!(matches!(read(folder.path().join("none")), Err(RecordError::Read { .. })));
    }

    #[test]
    fn a_torn_last_line_does_not_swallow_the_next_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        fs::write(&path, "{\"schema_version\":1,\"star").unwrap();
        Writer::open(&path).unwrap().append(&record()).unwrap();
        let outcome = read(&path).unwrap();
        assert_eq!((outcome.records.len(), outcome.problems.len()), (1, 1));
        assert_eq!(lines(&path).len(), 2);
    }

    #[test]
    fn unknown_fields_of_the_same_version_are_tolerated() {
        let mut value = serde_json::to_value(record()).unwrap();
        for pointer in ["", "/subject", "/subject/cell", "/outcome", "/outcome/samples/0", "/machine/cpu"] {
            value.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert("later".into(), 1.into());
        }
        assert_eq!(parse(&value.to_string()).unwrap(), record());
    }

    #[test]
    fn settings_in_effect() {
        let settings = record().settings;
        assert_eq!((settings.device(), settings.dtype(), settings.threads()), (Some("cpu"), Some("f32"), Some(2)));
        assert_eq!(Settings::default().threads(), None);
    }

    #[test]
    fn build_facts_are_there() {
        let build = Build::current(Some(""), &[]);
        assert_eq!(build.commit, None, "outside a checkout");
        assert!(build.rustc.starts_with("rustc ") && build.target.contains('-'), "{build:?}");
        assert!(["debug", "release"].contains(&build.profile.as_str()));
    }

    #[test]
    fn the_schema_in_docs_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/record.schema.json");
        let kept = fs::read_to_string(&path).unwrap_or_default().replace("\r\n", "\n");
        assert!(kept == schema_text(), "{} is not current; regenerate it with `cargo xtask docs`", path.display());
    }
}
