//! `cargo xtask bench-all`: every cell of the catalog, each in its own process, and what became of all 36 families.
//!
//! This process sleeps while a cell is measured: it waits for the child's next line, for the time limit, or for Ctrl-C.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use roofbench_core::catalog::{self, Cell, Family, Modality};
use roofbench_core::hardware::Machine;
use roofbench_core::meters::clock;
use roofbench_core::record::{self, Build, Outcome, Record, SCHEMA_VERSION, Settings, StopRule, Subject, Writer};
use roofbench_core::session::Engine;
use roofbench_report::State;
use serde::Deserialize;

use crate::process;

/// Exit status after Ctrl-C.
const INTERRUPTED: u8 = 130;
/// What the command line is given beyond a cell's limit to end it and to write the record.
const GRACE: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
#[command(after_help = "\
Records are appended to DIR/records.jsonl as cells end. Started again after an interruption, cells that this build \
measured with these settings are not repeated; failed ones are tried again.

Examples:
  cargo xtask bench-all --quick              the first cell of each family, seconds per cell
  cargo xtask bench-all --modality vision
  cargo xtask bench-all --memory 8GB --budget 20m
                                             what of each family fits in both, by `roofbench plan`
  cargo xtask bench-all --family bert --family vit --output target/two
  cargo xtask bench-all --shard 2/4          the second of four parts, for a fleet (docs/fleet.md)")]
pub(crate) struct Arguments {
    /// A first look: the first cell of each family, fewer samples
    #[arg(long)]
    quick: bool,
    /// Only families of this modality: text, vision, speech or multimodal
    #[arg(long, value_name = "M", value_parser = modality)]
    modality: Option<Modality>,
    /// Only this family; may be repeated
    #[arg(long, value_name = "F")]
    family: Vec<String>,
    /// Chooses checkpoint and precision of each family so that it fits in so many bytes: 8e9, 8GB, 4GiB
    #[arg(long, value_name = "BYTES")]
    memory: Option<String>,
    /// Chooses checkpoints and cells so that about this time is enough: 90s, 20m, 2h
    #[arg(long, value_name = "TIME")]
    budget: Option<String>,
    /// Only part I of N of the cells, always the same ones; `roofbench merge` joins the records of all parts
    #[arg(long, value_name = "I/N", value_parser = shard)]
    shard: Option<Shard>,
    /// Folder of records and reports [default: bench-all in cargo's target folder, and a folder per shard in it]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Most time of one cell, loading included, in seconds
    #[arg(long, value_name = "S", default_value_t = 900, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// Starts anew: earlier records are moved to records.old.jsonl
    #[arg(long)]
    fresh: bool,
}

/// A part of the cells.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shard {
    /// From 1 on.
    number: usize,
    of: usize,
}

impl Shard {
    /// Every N-th cell, so that the large cells of a family, which follow each other, go to several.
    fn part<T>(self, cells: Vec<T>) -> Vec<T> {
        cells.into_iter().skip(self.number - 1).step_by(self.of).collect()
    }
}

fn shard(text: &str) -> Result<Shard, String> {
    let parsed = text.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
    match parsed {
        Some((number, of)) if (1..=of).contains(&number) => Ok(Shard { number, of }),
        _ => Err("expected I/N with I from 1 to N, such as 2/4".to_owned()),
    }
}

fn modality(text: &str) -> Result<Modality, String> {
    serde_json::from_value(text.into()).map_err(|_| "expected text, vision, speech or multimodal".to_owned())
}

/// A cell as `roofbench run --dry-run --json` prints it.
#[derive(Debug, Deserialize)]
struct Planned {
    family: String,
    cell: String,
    engine: Engine,
    requested: BTreeMap<String, String>,
    /// Arguments of the command line that measure this cell alone.
    command: Vec<String>,
}

impl Planned {
    fn label(&self) -> String {
        format!("{}/{}", self.family, self.cell)
    }

    /// Whether `record` is of this cell with these settings.
    fn is_of(&self, record: &Record) -> bool {
        let subject = &record.subject;
        (&subject.family, &subject.cell.name, subject.engine) == (&self.family, &self.cell, self.engine)
            && record.settings.requested == self.requested
    }
}

/// A family that `roofbench plan --memory … --budget …` leaves out.
#[derive(Debug, Deserialize)]
struct LeftOut {
    family: String,
    /// Why.
    skipped: String,
}

/// The program under test, and the machine as it sees it.
#[derive(Deserialize)]
struct Probe {
    machine: Machine,
    build: Build,
}

/// Builds, measures what is missing, and reports.
///
/// # Errors
/// The command line doesn't build or start, or the output folder can't be written.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let families = families(arguments)?;
    eprintln!("building roofbench in release mode");
    let program = process::build_cli()?;
    let built = fs::metadata(&program).and_then(|data| data.modified()).context("looking at the program")?;
    let folder = match (&arguments.output, arguments.shard) {
        (Some(folder), _) => folder.clone(),
        (None, None) => process::target()?.join("bench-all"),
        (None, Some(Shard { number, of })) => process::target()?.join(format!("bench-all/shard-{number}-of-{of}")),
    };
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("records.jsonl");
    if arguments.fresh && path.exists() {
        let old = folder.join("records.old.jsonl");
        fs::rename(&path, &old).with_context(|| format!("moving {} to {}", path.display(), old.display()))?;
    }

    let probe: Probe = serde_json::from_str(&process::output(Command::new(&program).args(["probe", "--json"]))?)
        .context("reading `roofbench probe --json`")?;
    let runnable = runnable(&program)?;
    let (runnable, missing): (Vec<&Family>, Vec<&Family>) =
        families.iter().partition(|family| runnable.contains(&family.name));
    let (mut plan, left_out) = plan(arguments, &program, &runnable)?;
    if let Some(shard) = arguments.shard {
        plan = shard.part(plan);
    }
    let earlier = if path.exists() { record::read(&path)? } else { record::ReadOutcome::default() };
    for problem in &earlier.problems {
        eprintln!("warning: {problem}");
    }
    let kept: Vec<Record> =
        earlier.records.into_iter().filter(|record| still_holds(record, &probe.build, built)).collect();
    let (done, left): (Vec<&Planned>, Vec<&Planned>) =
        plan.iter().partition(|planned| kept.iter().any(|record| planned.is_of(record)));
    if !done.is_empty() {
        eprintln!("{} of {} cells are in {} already (--fresh repeats them)", done.len(), plan.len(), path.display());
    }

    let mut bench = Bench::new(program, &path, probe, Duration::from_secs(arguments.timeout.into()))?;
    let mut records: Vec<Record> =
        kept.into_iter().filter(|record| plan.iter().any(|cell| cell.is_of(record))).collect();
    for (number, planned) in left.iter().enumerate() {
        if bench.is_interrupted() {
            break;
        }
        eprintln!("[{}/{}] {}", number + 1, left.len(), planned.label());
        records.extend(bench.measure(planned)?);
    }
    let interrupted = bench.is_interrupted();
    show(&roofbench_report::table(&records))?;
    for family in missing {
        records.extend(bench.skipped(family, "this build has no model of it"));
    }
    for LeftOut { family, skipped } in &left_out {
        records.extend(bench.skipped(catalog::family(family)?, skipped));
    }
    report(&folder, &records, &plan, arguments.shard.is_some())?;
    if interrupted {
        eprintln!("interrupted: what was measured is kept, and the same command (without --fresh) goes on from here");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let failed = records.iter().any(|record| matches!(record.outcome, Outcome::Failed { .. }));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The families asked for, in the catalog's order.
fn families(arguments: &Arguments) -> anyhow::Result<Vec<&'static Family>> {
    for name in &arguments.family {
        catalog::family(name).context("--family")?;
    }
    let wanted = |family: &&Family| {
        (arguments.family.is_empty() || arguments.family.contains(&family.name))
            && arguments.modality.is_none_or(|modality| family.modality == modality)
    };
    let families: Vec<_> = catalog::families().iter().filter(wanted).collect();
    if families.is_empty() {
        bail!("no family is left: --family and --modality name none in common");
    }
    Ok(families)
}

/// The families that `program` has models of.
pub(crate) fn runnable(program: &Path) -> anyhow::Result<Vec<String>> {
    /// A line of `roofbench list --json`.
    #[derive(Deserialize)]
    struct Listed {
        family: String,
        runs: bool,
    }
    let text = process::output(Command::new(program).args(["list", "--json"]))?;
    let listed = text.lines().map(serde_json::from_str::<Listed>).collect::<Result<Vec<_>, _>>();
    let listed = listed.context("reading `roofbench list --json`")?;
    Ok(listed.into_iter().filter(|listed| listed.runs).map(|listed| listed.family).collect())
}

/// The cells to measure, as the command line itself plans them, and the families that --memory or --budget leave out.
fn plan(arguments: &Arguments, program: &Path, families: &[&Family]) -> anyhow::Result<(Vec<Planned>, Vec<LeftOut>)> {
    /// A line of either command.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Line {
        Planned(Planned),
        LeftOut(LeftOut),
    }
    let (mut planned, mut left_out) = (Vec::new(), Vec::new());
    if families.is_empty() {
        return Ok((planned, left_out));
    }
    let limits = [("--memory", &arguments.memory), ("--budget", &arguments.budget)];
    let limits: Vec<String> =
        limits.into_iter().filter_map(|(flag, value)| Some(format!("{flag}={}", value.as_ref()?))).collect();
    let chooses = !limits.is_empty();
    let mut command = Command::new(program);
    command.args(if chooses { &["plan", "--json"][..] } else { &["run", "--dry-run", "--json"] }).args(limits);
    command.args(families.iter().map(|family| &family.name));
    if arguments.quick {
        command.arg("--quick");
    }
    if arguments.quick && !chooses {
        for family in families {
            let first = family.cells.first().with_context(|| format!("{} has no cells", family.name))?;
            command.args(["--cell", &format!("^{}/{}$", family.name, first.name)]);
        }
    }
    let text = process::output(&mut command)?;
    for line in text.lines() {
        match serde_json::from_str(line).context("reading `roofbench run --dry-run --json` or `plan --json`")? {
            Line::Planned(cell) => planned.push(cell),
            Line::LeftOut(family) => left_out.push(family),
        }
    }
    Ok((planned, left_out))
}

/// Whether an earlier record says what this build would measure now: the same build, whole, and no failure.
fn still_holds(record: &Record, build: &Build, built: SystemTime) -> bool {
    let whole = match &record.outcome {
        Outcome::Measured(measurement) => measurement.stop != StopRule::Interrupted,
        Outcome::Skipped { .. } => true,
        Outcome::Failed { .. } => false,
    };
    // A commit pins the sources; without one, only the program's own file tells whether they changed.
    let pinned = build.commit.as_ref().is_some_and(|commit| !commit.ends_with("-dirty"));
    whole && record.build == *build && (pinned || record.started_at >= clock::utc_at(built))
}

/// The table of all families, and the two pages.
fn report(folder: &Path, records: &[Record], plan: &[Planned], sharded: bool) -> anyhow::Result<()> {
    let names: Vec<&str> = catalog::families().iter().map(|family| family.name.as_str()).collect();
    let mut rows = roofbench_report::coverage(records, &names);
    for row in rows.iter_mut().filter(|row| row.state == State::NotRun) {
        let planned = plan.iter().any(|cell| cell.family == row.family);
        let reason = match (planned, sharded) {
            (true, _) => "interrupted before it",
            (false, true) => "not in this shard",
            (false, false) => "not among the families asked for",
        };
        row.reasons.push(reason.to_owned());
    }
    show(&roofbench_report::coverage_table(&rows))?;
    let pages = [
        ("report.md", roofbench_report::markdown(records, &names)),
        ("report.html", roofbench_report::html(records, &names)),
    ];
    for (name, text) in pages {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        eprintln!("wrote {}", path.display());
    }
    eprintln!("records are in {}", folder.join("records.jsonl").display());
    Ok(())
}

fn show(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing the table"),
    }
}

/// What this process waits for.
enum Event {
    /// A line of the child's standard output: a record.
    Output(String),
    /// A line of its standard error.
    Error(String),
    /// One of the two closed.
    Closed,
    /// Ctrl-C, or a request to terminate.
    Interrupt,
}

/// Runs cells one after another, each in its own process.
struct Bench {
    program: PathBuf,
    path: PathBuf,
    writer: Writer,
    probe: Probe,
    limit: Duration,
    sender: Sender<Event>,
    events: Receiver<Event>,
    interrupted: bool,
}

impl Bench {
    fn new(program: PathBuf, path: &Path, probe: Probe, limit: Duration) -> anyhow::Result<Self> {
        let (sender, events) = channel();
        let handler = sender.clone();
        // Once the receiver is gone nobody has to hear it.
        ctrlc::set_handler(move || drop(handler.send(Event::Interrupt))).context("listening for Ctrl-C")?;
        let (path, writer) = (path.to_owned(), Writer::open(path)?);
        Ok(Self { program, path, writer, probe, limit, sender, events, interrupted: false })
    }

    fn is_interrupted(&mut self) -> bool {
        self.interrupted |= self.events.try_iter().any(|event| matches!(event, Event::Interrupt));
        self.interrupted
    }

    /// Measures a cell; `None` when it was interrupted before it had a sample.
    fn measure(&mut self, planned: &Planned) -> anyhow::Result<Option<Record>> {
        let mut command = Command::new(&self.program);
        // The child keeps its record itself, so that nothing is lost if this process dies.
        command.args(&planned.command).arg("--json").arg("--output").arg(&self.path);
        command.arg("--timeout").arg(self.limit.as_secs().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own group: Ctrl-C at a terminal reaches this process alone, which passes it on.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().with_context(|| format!("starting {}", self.program.display()))?;
        forward(child.stdout.take().context("no standard output")?, self.sender.clone(), Event::Output);
        forward(child.stderr.take().context("no standard error")?, self.sender.clone(), Event::Error);

        let deadline = Instant::now() + self.limit + GRACE;
        let (mut record, mut last_words, mut open, mut expired) = (None, Vec::new(), 2, false);
        while open > 0 {
            let event = if expired {
                self.events.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            };
            match event {
                Ok(Event::Output(line)) => record = serde_json::from_str::<Record>(&line).ok().or(record),
                Ok(Event::Error(line)) => {
                    eprintln!("    {line}");
                    last_words.push(line);
                }
                Ok(Event::Closed) => open -= 1,
                Ok(Event::Interrupt) => {
                    self.interrupted = true;
                    interrupt(&mut child)?;
                }
                Err(RecvTimeoutError::Timeout) => {
                    expired = true;
                    child.kill().context("ending the cell")?;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.wait().context("waiting for the cell")?;
        if record.is_some() || self.interrupted {
            return Ok(record);
        }
        // The command line itself gave way; what it said last is the reason.
        let tail = last_words.split_off(last_words.len().saturating_sub(12)).join("\n");
        let how = if expired {
            "took too long and was ended".to_owned()
        } else {
            format!("ended without a record ({status})")
        };
        let family = catalog::family(&planned.family)?;
        let cell = family.cells.iter().find(|cell| cell.name == planned.cell).or(family.cells.first());
        let cell = cell.with_context(|| format!("{} has no cells", family.name))?;
        let outcome = Outcome::Failed { error: format!("{how}: {tail}") };
        let record = self.record(family, cell, planned.engine, planned.requested.clone(), outcome);
        self.writer.append(&record)?;
        Ok(Some(record))
    }

    /// A record of why nothing of `family` was measured.
    fn skipped(&self, family: &Family, reason: &str) -> Option<Record> {
        let outcome = Outcome::Skipped { reason: reason.to_owned() };
        Some(self.record(family, family.cells.first()?, Engine::Roofbench, BTreeMap::new(), outcome))
    }

    fn record(
        &self,
        family: &Family,
        cell: &Cell,
        engine: Engine,
        requested: BTreeMap<String, String>,
        outcome: Outcome,
    ) -> Record {
        let default = family.checkpoints.iter().find(|checkpoint| checkpoint.repository == family.default_checkpoint);
        Record {
            schema_version: SCHEMA_VERSION,
            started_at: clock::utc_now(),
            subject: Subject {
                family: family.name.clone(),
                modality: family.modality,
                checkpoint: family.default_checkpoint.clone(),
                class: family.class.clone(),
                parameters: default.map(|checkpoint| checkpoint.parameters),
                cell: cell.clone(),
                engine,
            },
            settings: Settings { effective: requested.clone(), requested, ..Settings::default() },
            outcome,
            warnings: Vec::new(),
            machine: self.probe.machine.clone(),
            build: self.probe.build.clone(),
        }
    }
}

/// Sends each line of `output`, and then that it closed.
fn forward(output: impl Read + Send + 'static, sender: Sender<Event>, event: fn(String) -> Event) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        // Bytes, not text: what a crashing process writes need not be UTF-8.
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let _ = sender.send(event(String::from_utf8_lossy(&line).trim_end().to_owned()));
            line.clear();
        }
        let _ = sender.send(Event::Closed);
    });
}

/// Passes Ctrl-C on. The standard library can only kill; `kill` is on every Unix.
fn interrupt(child: &mut Child) -> anyhow::Result<()> {
    if cfg!(unix) {
        let status = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status();
        if status.is_ok_and(|status| status.success()) {
            return Ok(());
        }
    }
    child.kill().context("ending the cell")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            arguments: Arguments,
        }
        <Line as clap::Parser>::try_parse_from(std::iter::once(&"x").chain(words)).unwrap().arguments
    }

    #[test]
    fn shards_are_a_partition() {
        let parts: Vec<Vec<u32>> = (1..=3).map(|i| shard(&format!("{i}/3")).unwrap().part((0..8).collect())).collect();
        assert_eq!(parts, [vec![0, 3, 6], vec![1, 4, 7], vec![2, 5]]);
        assert_eq!(arguments(&["--shard", "2/4"]).shard, Some(Shard { number: 2, of: 4 }));
        for wrong in ["0/4", "5/4", "1", "a/2", "1/0", ""] {
            assert!(shard(wrong).unwrap_err().contains("2/4"), "{wrong}");
        }
    }

    #[test]
    fn families_are_chosen_by_name_and_modality() {
        assert_eq!(families(&arguments(&[])).unwrap().len(), 36);
        assert!(families(&arguments(&["--modality", "speech"])).unwrap().iter().any(|family| family.name == "whisper"));
        assert_eq!(families(&arguments(&["--family", "vit", "--family", "bert"])).unwrap().len(), 2);
        let error = format!("{:#}", families(&arguments(&["--family", "brt"])).unwrap_err());
        assert!(error.contains("--family") && error.contains("`brt`"), "{error}");
        assert!(families(&arguments(&["--family", "bert", "--modality", "speech"])).is_err());
    }
}
