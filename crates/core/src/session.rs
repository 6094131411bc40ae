//! How a model meets the harness: one call of one `transformers` class, with the boundaries of its phases announced.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cost::PhaseCost;

/// Candle's result, as layers give it, unless another error is named.
pub type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// Tensors by the names that the `transformers` class gives its arguments or its output fields.
pub type Tensors = BTreeMap<String, Tensor>;

/// Plain (not tensor) arguments of a call, as in the `arguments` of a reference case.
pub type Arguments = serde_json::Map<String, Value>;

/// One call of the class's own method.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// `forward`, `generate`, or another method of the class.
    pub method: String,
    /// Tensor arguments by name.
    pub inputs: Tensors,
    /// Plain arguments by name.
    pub arguments: Arguments,
}

/// A part of a call that is timed and costed by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A tower that sees pictures or frames.
    Vision,
    /// A tower that reads texts beside pictures or sounds.
    Text,
    /// A tower that hears sounds.
    Audio,
    /// A tower for other measurements: depth, heat, motion.
    Sensor,
    /// What brings the states of a tower to the next part: a projector, a Q-Former.
    Projector,
    /// A whole forward pass, or what of it follows the components that were announced before.
    Forward,
    /// The prompt (or the encoder's input), up to the first output token on the host, without components that were
    /// announced before.
    Prefill,
    /// One output token after the first.
    Decode,
}

impl Phase {
    /// Its name in tables and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Text => "text",
            Self::Audio => "audio",
            Self::Sensor => "sensor",
            Self::Projector => "projector",
            Self::Forward => "forward",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// A component of a model that comes before its forward pass or its first token.
    pub fn is_component(self) -> bool {
        !matches!(self, Self::Forward | Self::Prefill | Self::Decode)
    }
}

/// Told by the model where a phase ends; the harness waits for the device and reads its meters there.
pub trait Observer {
    /// The work of `phase` since the last boundary (or the start of the call) has been handed to the device.
    ///
    /// [`Phase::Prefill`] ends when the first token is on the host, [`Phase::Decode`] when each later one is; what comes
    /// before in phases of their own are components, of which one may run several times.
    fn end(&mut self, phase: Phase);

    /// The tokens just chosen, one for each sequence, before their phase ends: what a reader sees as it comes.
    fn tokens(&mut self, _tokens: &[i64]) {}
}

/// Takes no notice; for calls whose time does not matter.
#[derive(Debug, Default, Clone, Copy)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn end(&mut self, _phase: Phase) {}
}

/// A model, loaded and ready to be called.
pub trait Session {
    /// Runs `call` and returns the class's output fields by name. Every phase is announced to `observer`.
    ///
    /// # Errors
    /// Names the input or argument that is missing, misshapen or not supported.
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError>;

    /// FLOPs and bytes of `call` by phase, from the config and the shapes of its inputs alone.
    ///
    /// # Errors
    /// As [`Session::call`].
    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError>;

    /// The path taken by each kind of operation, for the record: (`matmul`, `avx512`).
    fn paths(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

/// Turns raw inputs (text, pictures, sound) into a model's tensors and back, by the checkpoint's own processor config.
pub trait Processor {
    /// Runs `method` (`preprocess`, or a `post_process_…`) of the class's processor.
    ///
    /// `files` are raw inputs by argument name, `inputs` tensors (for postprocessing).
    ///
    /// # Errors
    /// Names the file, field or argument at fault.
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError>;
}

/// What runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum Engine {
    /// Our own model on the shared blocks.
    #[default]
    #[serde(rename = "roofbench")]
    Roofbench,
    /// The stock model of the crate `candle-transformers`.
    #[serde(rename = "candle-transformers")]
    CandleTransformers,
}

impl Engine {
    /// As flags and records write it: `roofbench`, `candle-transformers`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Roofbench => "roofbench",
            Self::CandleTransformers => "candle-transformers",
        }
    }
}

/// What to build a session from.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Family name of the catalog.
    pub family: String,
    /// The `transformers` class, which decides the head: `BertForMaskedLM`.
    pub class: String,
    /// `config.json`.
    pub config: Value,
    /// Other `*config.json` files of the repository by file name (`generation_config.json`, `preprocessor_config.json`).
    pub extra_configs: BTreeMap<String, Value>,
    /// Type that weights and activations are computed in.
    pub dtype: DType,
    /// Where it runs.
    pub device: Device,
    /// What runs it.
    pub engine: Engine,
}

impl ModelSpec {
    /// A model of `config` in f32 on the CPU, run by our own engine, without other configs beside it.
    pub fn new(family: &str, class: &str, config: Value) -> Self {
        Self {
            family: family.to_owned(),
            class: class.to_owned(),
            config,
            extra_configs: BTreeMap::new(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    /// Reads `config.json` into the family's own type; the error names the field at fault by its path.
    ///
    /// # Errors
    /// [`SessionError::Config`].
    pub fn parse_config<T: serde::de::DeserializeOwned>(&self) -> Result<T, SessionError> {
        serde_path_to_error::deserialize(&self.config).map_err(|error| SessionError::Config {
            field: error.path().to_string(),
            reason: error.into_inner().to_string(),
        })
    }
}

/// Why a model could not be built or called.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// A field of `config.json` is missing or malformed.
    #[error("config.json: `{field}`: {reason}")]
    Config {
        /// Path of the field; `.` is the whole file.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A field of `preprocessor_config.json` is missing, malformed, or asks for something that is not supported.
    #[error("preprocessor_config.json: `{field}`: {reason}")]
    Preprocessor {
        /// Path of the field; `.` is the whole file.
        field: String,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// A field changes the result in a way that is not supported.
    #[error("config.json: `{field}` = {value} is not supported for {family}; supported: {supported}")]
    UnsupportedConfig {
        /// Family.
        family: String,
        /// Field name.
        field: String,
        /// Its value.
        value: String,
        /// What would do.
        supported: String,
    },
    /// No implementation of this class.
    #[error("{family}: class `{class}` is not supported; supported: {supported}")]
    UnsupportedClass {
        /// Family.
        family: String,
        /// Class asked for.
        class: String,
        /// What would do.
        supported: String,
    },
    /// The engine has no model of this family or precision.
    #[error("{family}: {reason}")]
    UnsupportedEngine {
        /// Family.
        family: String,
        /// Why.
        reason: String,
    },
    /// An input tensor or plain argument is missing or wrong.
    #[error("input `{name}`: {reason}")]
    Input {
        /// Argument name.
        name: String,
        /// What is wrong, with what was expected.
        reason: String,
    },
    /// A raw input file can't be read.
    #[error("{}: {reason}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A weight is missing, misshapen or unreadable.
    #[error(transparent)]
    Weights(#[from] crate::weights::WeightsError),
    /// A tensor operation failed.
    #[error("{0}")]
    Tensor(#[from] candle_core::Error),
}

impl SessionError {
    /// A [`SessionError::Input`].
    pub fn input(name: &str, reason: impl Into<String>) -> Self {
        Self::Input { name: name.to_owned(), reason: reason.into() }
    }
}
