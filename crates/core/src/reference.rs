//! Reference cases: one call of one `transformers` class, with the numbers that the library itself computed.
//!
//! A case is a folder with `case.json` (family, class, call, seed, tolerance), `config.json`, `inputs.safetensors` and,
//! to be checked, `tensors.json` (names and shapes of the checkpoint) and `outputs.safetensors`. Cases named `preprocess-…` and
//! `postprocess-…` are calls of the class's processor instead of the model. What builds models is handed in as
//! [`Models`], so that the command line and the tests check the same thing.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;

use crate::session::{Arguments, Call, Engine, ModelSpec, Processor, Session, SessionError, Tensors, Unobserved};
use crate::weights::{AliasRule, HubOptions, Requested, Source, Weights};

/// Builds what a case calls.
pub trait Models {
    /// How published checkpoints of `spec` name the tensors that its model asks for.
    fn aliases(&self, spec: &ModelSpec) -> &'static [AliasRule];

    /// The model of `spec` with its weights.
    ///
    /// # Errors
    /// The family, class or config is not supported, or a weight is missing.
    fn load(&self, spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError>;

    /// The processor of a family; `configs` are the `*config.json` files of its repository by name.
    ///
    /// # Errors
    /// The family has no processor here, or its config is not supported.
    fn processor(&self, family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError>;
}

/// What a case tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A call of the model on synthetic weights.
    Model,
    /// Raw inputs to tensors.
    Preprocess,
    /// A model's outputs to answers.
    Postprocess,
}

/// One case, read from its folder; the tensors are read when it runs.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its folder.
    pub folder: PathBuf,
    /// Family of the catalog.
    pub family: String,
    /// What it exercises: `masked-lm`.
    pub name: String,
    /// `transformers` class of the model or processor.
    pub class: String,
    /// What is called.
    pub kind: Kind,
    /// Largest `max |ours - reference| / max |reference|` that passes, per output.
    pub tolerance: f64,
    call: String,
    arguments: Arguments,
    seed: u64,
    files: BTreeMap<String, Vec<PathBuf>>,
    configs: BTreeMap<String, Value>,
}

/// Where and on what a case runs.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Device.
    pub device: Device,
    /// What runs the model.
    pub engine: Engine,
}

impl Default for Setting {
    fn default() -> Self {
        Self { device: Device::Cpu, engine: Engine::Roofbench }
    }
}

/// What came of a case.
#[derive(Debug)]
pub struct Verdict {
    /// Names and shapes asked for against `tensors.json`; `None` for processors, and when the case has no such file.
    pub weights: Option<WeightsDifference>,
    /// Every expected output in the order of its name; empty when the case has no `outputs.safetensors`.
    pub outputs: Vec<Comparison>,
    /// What was computed.
    pub computed: Tensors,
}

impl Verdict {
    /// Every output is within its tolerance, and the checkpoint's tensors are those that the model reads.
    pub fn passed(&self) -> bool {
        self.weights.as_ref().is_none_or(|difference| *difference == WeightsDifference::default())
            && self.outputs.iter().all(Comparison::passed)
    }
}

/// How the tensors that a model asked for differ from those of the checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightsDifference {
    /// In the checkpoint, never asked for.
    pub unread: Vec<String>,
    /// Asked for, not in the checkpoint.
    pub unknown: Vec<String>,
    /// Asked for with another shape: name, shape asked for, shape in the checkpoint.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl WeightsDifference {
    /// Compares what a model `asked` for with what the checkpoint `has`.
    pub fn between(asked: &Requested, has: &Requested) -> Self {
        let only = |these: &Requested, those: &Requested| -> Vec<String> {
            these.keys().filter(|name| !those.contains_key(*name)).cloned().collect()
        };
        let misshapen = asked.iter().filter_map(|(name, shape)| {
            let other = has.get(name).filter(|other| *other != shape)?;
            Some((name.clone(), shape.clone(), other.clone()))
        });
        Self { unread: only(has, asked), unknown: only(asked, has), misshapen: misshapen.collect() }
    }
}

/// One output against the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Field of the class's output.
    pub name: String,
    /// Largest error that passes.
    pub tolerance: f64,
    /// What was found.
    pub finding: Finding,
}

/// What comparing an output found.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// `max |ours - reference| / max |reference|` over all elements; infinite where one is finite and the other is not.
    Error(f64),
    /// Integers: how many of how many differ.
    Unequal {
        /// Elements that differ.
        different: usize,
        /// All elements.
        of: usize,
    },
    /// The model gave no output of this name; these are the names it gave.
    Absent(Vec<String>),
    /// Another shape or type: ours, the reference's.
    Form(String, String),
}

impl Comparison {
    /// Whether the output is right.
    pub fn passed(&self) -> bool {
        match self.finding {
            Finding::Error(error) => error <= self.tolerance,
            Finding::Unequal { different, .. } => different == 0,
            Finding::Absent(_) | Finding::Form(..) => false,
        }
    }
}

/// Why a case could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// Neither a case nor a folder of cases.
    #[error("{}: no case here (a folder with case.json, or a folder of such folders)", .0.display())]
    NoCase(PathBuf),
    /// A file can't be read.
    #[error("{}: can't be read", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The model or processor failed.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl From<candle_core::Error> for CaseError {
    fn from(error: candle_core::Error) -> Self {
        Self::Session(error.into())
    }
}

/// Every folder at or under `path` that holds a `case.json`, sorted.
///
/// # Errors
/// A folder can't be read, or there is none.
pub fn find(path: &Path) -> Result<Vec<PathBuf>, CaseError> {
    // Families, cases: a deeper tree is somebody's disk, named by mistake.
    const DEPTH: usize = 4;
    fn walk(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<(), CaseError> {
        if folder.join("case.json").exists() {
            found.push(folder.to_owned());
            return Ok(());
        }
        if depth == 0 {
            return Ok(());
        }
        let unreadable = |source| CaseError::Unreadable { path: folder.to_owned(), source };
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.is_dir() {
                walk(&path, depth - 1, found)?;
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(path, DEPTH, &mut found)?;
    found.sort();
    if found.is_empty() { Err(CaseError::NoCase(path.to_owned())) } else { Ok(found) }
}

/// `case.json`; what else it holds is for people.
#[derive(Deserialize)]
struct About {
    family: String,
    case: String,
    class: String,
    call: String,
    #[serde(default)]
    arguments: Arguments,
    #[serde(default)]
    seed: u64,
    tolerance: f64,
    #[serde(default)]
    files: BTreeMap<String, Vec<String>>,
}

impl Case {
    /// Reads the JSON files of the case in `folder`.
    ///
    /// # Errors
    /// A file is missing or malformed.
    pub fn read(folder: &Path) -> Result<Self, CaseError> {
        let about: About = read_json(&folder.join("case.json"))?;
        if !(about.tolerance.is_finite() && about.tolerance >= 0.0) {
            let reason = format!("`tolerance` = {} is not a number of 0 or more", about.tolerance);
            return Err(CaseError::Malformed { path: folder.join("case.json"), reason });
        }
        let kind = match about.case.split_once('-') {
            Some(("preprocess", _)) => Kind::Preprocess,
            Some(("postprocess", _)) => Kind::Postprocess,
            _ => Kind::Model,
        };
        // Names become paths below folders of the user's choice, and must not lead out of them.
        let names = about.files.values().flatten().chain([&about.family, &about.case]);
        if let Some(name) = names.into_iter().find(|name| !is_below(Path::new(name))) {
            let reason = format!("`{name}` is no relative path without `..`");
            return Err(CaseError::Malformed { path: folder.join("case.json"), reason });
        }
        let mut files = BTreeMap::new();
        for (argument, names) in about.files {
            files.insert(argument, names.iter().map(|name| folder.join(name)).collect());
        }
        Ok(Self {
            configs: read_configs(folder)?,
            folder: folder.to_owned(),
            family: about.family,
            name: about.case,
            class: about.class,
            kind,
            tolerance: about.tolerance,
            call: about.call,
            arguments: about.arguments,
            seed: about.seed,
            files,
        })
    }

    /// Whether the case says what is right.
    pub fn has_answers(&self) -> bool {
        self.folder.join("outputs.safetensors").exists()
    }

    /// Runs the case and compares what it computed with the reference.
    ///
    /// # Errors
    /// The case is broken, or the model can't be built or called. A wrong result is no error but a [`Verdict`].
    pub fn run(&self, models: &dyn Models, setting: &Setting) -> Result<Verdict, CaseError> {
        let (computed, weights) = match self.kind {
            Kind::Model => self.call_model(models, setting)?,
            Kind::Preprocess => (self.call_processor(models, &Tensors::new())?, None),
            Kind::Postprocess => {
                let inputs = read_tensors(&self.folder.join("inputs.safetensors"), &Device::Cpu)?;
                (self.call_processor(models, &inputs)?, None)
            }
        };
        let mut outputs = Vec::new();
        if self.has_answers() {
            for (name, reference) in read_tensors(&self.folder.join("outputs.safetensors"), &Device::Cpu)? {
                let finding = match computed.get(&name) {
                    Some(ours) => compare(ours, &reference)?,
                    None => Finding::Absent(computed.keys().cloned().collect()),
                };
                outputs.push(Comparison { name, tolerance: self.tolerance, finding });
            }
        }
        Ok(Verdict { weights, outputs, computed })
    }

    /// What its model is built from, in f32.
    ///
    /// # Errors
    /// There is no config.json.
    pub fn spec(&self, device: &Device, engine: Engine) -> Result<ModelSpec, CaseError> {
        let path = self.folder.join("config.json");
        let mut extra_configs = self.configs.clone();
        let config = extra_configs.remove("config.json").ok_or_else(|| CaseError::Malformed {
            path,
            reason: "is missing; a case of a model needs one".to_owned(),
        })?;
        Ok(ModelSpec {
            family: self.family.clone(),
            class: self.class.clone(),
            config,
            extra_configs,
            dtype: DType::F32,
            device: device.clone(),
            engine,
        })
    }

    /// Where its model's weights come from.
    pub fn source(&self) -> Source {
        Source::Synthetic { seed: self.seed }
    }

    /// The call that it makes.
    ///
    /// # Errors
    /// Its inputs can't be read.
    pub fn call(&self, device: &Device) -> Result<Call, CaseError> {
        let inputs = read_tensors(&self.folder.join("inputs.safetensors"), device)?;
        Ok(Call { method: self.call.clone(), inputs, arguments: self.arguments.clone() })
    }

    fn call_model(
        &self,
        models: &dyn Models,
        setting: &Setting,
    ) -> Result<(Tensors, Option<WeightsDifference>), CaseError> {
        let spec = self.spec(&setting.device, setting.engine)?;
        let call = self.call(&setting.device)?;
        let source = self.source();
        let weights = Weights::open(&source, models.aliases(&spec), &spec.class, &HubOptions::from_env())
            .map_err(SessionError::from)?;
        let mut session = models.load(&spec, &weights)?;
        let names = self.folder.join("tensors.json");
        // What a stock model leaves out is not ours to judge.
        let difference = if setting.engine == Engine::Roofbench && names.exists() {
            Some(WeightsDifference::between(&weights.requested(), &read_json(&names)?))
        } else {
            None
        };
        Ok((session.call(&call, &mut Unobserved)?, difference))
    }

    fn call_processor(&self, models: &dyn Models, inputs: &Tensors) -> Result<Tensors, CaseError> {
        let processor = models.processor(&self.family, &self.configs)?;
        Ok(processor.call(&self.call, &self.files, inputs, &self.arguments)?)
    }
}

/// Writes what a case computed as `folder/outputs.safetensors`, and the folder if need be.
///
/// # Errors
/// The folder or the file can't be written.
pub fn write_outputs(folder: &Path, computed: &Tensors) -> Result<(), CaseError> {
    let path = folder.join("outputs.safetensors");
    std::fs::create_dir_all(folder).map_err(|source| CaseError::Unreadable { path: folder.to_owned(), source })?;
    let mut tensors = std::collections::HashMap::new();
    for (name, tensor) in computed {
        tensors.insert(name.clone(), tensor.to_device(&Device::Cpu)?.contiguous()?);
    }
    candle_core::safetensors::save(&tensors, &path)
        .map_err(|error| CaseError::Malformed { path, reason: format!("can't be written: {error}") })
}

/// Compares `ours` with `reference`, whose type and shape it must have.
fn compare(ours: &Tensor, reference: &Tensor) -> Result<Finding, CaseError> {
    if (ours.dtype(), ours.dims()) != (reference.dtype(), reference.dims()) {
        let form = |tensor: &Tensor| format!("{} {:?}", tensor.dtype().as_str(), tensor.dims());
        return Ok(Finding::Form(form(ours), form(reference)));
    }
    let ours = ours.to_device(&Device::Cpu)?.flatten_all()?;
    let reference = reference.flatten_all()?;
    if ours.dtype().is_float() {
        let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
        Ok(Finding::Error(relative_error(&values(&ours)?, &values(&reference)?)))
    } else {
        let values = |tensor: &Tensor| tensor.to_dtype(DType::I64)?.to_vec1::<i64>();
        let (ours, reference) = (values(&ours)?, values(&reference)?);
        let different = ours.iter().zip(&reference).filter(|(a, b)| a != b).count();
        Ok(Finding::Unequal { different, of: reference.len() })
    }
}

/// `max |ours - reference| / max |reference|`. Where one is not finite, the other has to be the same.
fn relative_error(ours: &[f64], reference: &[f64]) -> f64 {
    let (mut error, mut scale) = (0.0f64, 0.0f64);
    for (&a, &b) in ours.iter().zip(reference) {
        if a.is_finite() && b.is_finite() {
            error = error.max((a - b).abs());
            scale = scale.max(b.abs());
        } else if !(a == b || (a.is_nan() && b.is_nan())) {
            return f64::INFINITY;
        }
    }
    match (error, scale) {
        (0.0, _) => 0.0,
        _ => error / scale,
    }
}

/// Whether `path` stays below the folder that it is joined to.
fn is_below(path: &Path) -> bool {
    let mut parts = path.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Every `*config.json` of a folder by name.
fn read_configs(folder: &Path) -> Result<BTreeMap<String, Value>, CaseError> {
    let unreadable = |source| CaseError::Unreadable { path: folder.to_owned(), source };
    let mut configs = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with("config.json") {
            configs.insert(name, read_json(&entry.path())?);
        }
    }
    Ok(configs)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, CaseError> {
    let text = std::fs::read(path).map_err(|source| CaseError::Unreadable { path: path.to_owned(), source })?;
    let mut deserializer = serde_json::Deserializer::from_slice(&text);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let reason = match error.path().to_string().as_str() {
            "." => error.inner().to_string(),
            field => format!("`{field}`: {}", error.inner()),
        };
        CaseError::Malformed { path: path.to_owned(), reason }
    })
}

/// Every tensor of a file; booleans come as u8.
fn read_tensors(path: &Path, device: &Device) -> Result<Tensors, CaseError> {
    let malformed = |reason: String| CaseError::Malformed { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|source| CaseError::Unreadable { path: path.to_owned(), source })?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.tensors() {
        let dtype = match view.dtype() {
            safetensors::Dtype::BOOL => DType::U8,
            other => DType::try_from(other).map_err(|error| malformed(format!("tensor `{name}`: {error}")))?,
        };
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), device)?;
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(ours: &[f32], reference: &[f32]) -> Finding {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        compare(&tensor(ours), &tensor(reference)).unwrap()
    }

    #[test]
    fn errors_are_relative_to_the_largest_reference() {
        assert_eq!(finding(&[1.0, -4.5], &[1.0, -4.0]), Finding::Error(0.125));
        assert_eq!(finding(&[0.0], &[0.0]), Finding::Error(0.0));
        assert_eq!(finding(&[1.0], &[0.0]), Finding::Error(f64::INFINITY));
    }

    #[test]
    fn what_is_not_finite_has_to_agree() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(finding(&[inf, nan, 1.0], &[inf, nan, 1.0]), Finding::Error(0.0));
        for (ours, reference) in [(nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1.0), (1.0, inf), (nan, inf)] {
            let found = Comparison { name: String::new(), tolerance: 1.0, finding: finding(&[ours], &[reference]) };
            assert!(!found.passed(), "{ours} {reference}");
        }
    }

    #[test]
    fn integers_are_equal_or_not_and_form_counts() {
        let tensor = |values: &[i64]| Tensor::new(values, &Device::Cpu).unwrap();
        let found = compare(&tensor(&[1, 2, 3]), &tensor(&[1, 0, 3])).unwrap();
        assert_eq!(found, Finding::Unequal { different: 1, of: 3 });
        let reference = Tensor::new(&[1i64, 2, 3], &Device::Cpu).unwrap();
        let found = compare(&Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap(), &reference).unwrap();
        assert_eq!(found, Finding::Form("u32 [3]".into(), "i64 [3]".into()));
        let found = compare(&reference.reshape((3, 1)).unwrap(), &reference).unwrap();
        assert_eq!(found, Finding::Form("i64 [3, 1]".into(), "i64 [3]".into()));
    }

    #[test]
    fn weights_that_differ_are_named() {
        let asked = Requested::from([("a".to_owned(), vec![2]), ("b".to_owned(), vec![3]), ("c".to_owned(), vec![])]);
        let has = Requested::from([("a".to_owned(), vec![2]), ("b".to_owned(), vec![4]), ("d".to_owned(), vec![1])]);
        let difference = WeightsDifference::between(&asked, &has);
        assert_eq!(difference.unread, ["d"]);
        assert_eq!(difference.unknown, ["c"]);
        assert_eq!(difference.misshapen, [("b".to_owned(), vec![3], vec![4])]);
        assert_eq!(WeightsDifference::between(&has, &has), WeightsDifference::default());
    }

    #[test]
    fn broken_cases_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no case here"), "{error}");
        for (text, word) in [
            ("{", "EOF"),
            (r#"{"family": "bert", "case": "x", "class": "B", "call": "forward"}"#, "tolerance"),
            (r#"{"family": "bert", "case": "x", "class": "B", "call": "forward", "tolerance": -1}"#, "tolerance"),
            (r#"{"family": 3}"#, "family"),
            (r#"{"family": "..", "case": "x", "class": "B", "call": "forward", "tolerance": 1}"#, ".."),
            (r#"{"family": "bert", "case": "/etc", "class": "B", "call": "forward", "tolerance": 1}"#, "/etc"),
        ] {
            std::fs::write(folder.path().join("case.json"), text).unwrap();
            let error = Case::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains("case.json") && error.contains(word), "{error}");
        }
        let path = folder.path().join("inputs.safetensors");
        std::fs::write(&path, [255; 16]).unwrap();
        let error = read_tensors(&path, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("inputs.safetensors"), "{error}");
    }

    #[test]
    fn outputs_come_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = Tensors::from([
            ("a".to_owned(), Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap().t().unwrap()),
            ("b".to_owned(), Tensor::new(&[7i64], &Device::Cpu).unwrap()),
        ]);
        let folder = folder.path().join("bert/case");
        write_outputs(&folder, &tensors).unwrap();
        let back = read_tensors(&folder.join("outputs.safetensors"), &Device::Cpu).unwrap();
        for (name, tensor) in &tensors {
            let same = compare(tensor, &back[name]).unwrap();
            assert!(matches!(same, Finding::Error(0.0) | Finding::Unequal { different: 0, of: 1 }), "{same:?}");
        }
        assert_eq!(back.len(), 2);
    }
}
