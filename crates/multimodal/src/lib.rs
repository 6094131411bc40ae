//! Multimodal model families of roofbench: towers of vision, text and sound joined to each other and to decoders.
//!
//! This crate deliberately does not know how a measurement is made or where a report goes: it prepares what a checkpoint's
//! own processor config says, builds the model that config.json describes from the pieces of the text, vision and speech
//! crates, and puts it behind [`Session`].

use std::collections::BTreeMap;

use serde_json::Value;

pub mod flava_processor;
pub mod models;

pub use candle_core;
pub use roofbench_core::classify;
pub use roofbench_core::cost::{Cost, PhaseCost};
pub use roofbench_core::session::{
    Arguments, Call, Engine, ModelSpec, Observer, Phase, Processor, Session, SessionError, Tensors, Unobserved,
};
pub use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights, WeightsError};
pub use serde_json;

use models::{flava, layoutlm, vilt};
use roofbench_core::config;
use roofbench_vision::preprocess::ImageProcessor;

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &["vilt", "flava", "layoutlm"];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        "vilt" => vilt::CLASSES,
        "flava" => flava::CLASSES,
        "layoutlm" => layoutlm::CLASSES,
        _ => &[],
    }
}

/// How published checkpoints of `spec` name the tensors that [`load`] asks for, for [`Weights::open`].
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.family.as_str() {
        "vilt" => vilt::aliases(spec),
        "flava" => flava::aliases(spec),
        "layoutlm" => layoutlm::aliases(spec),
        _ => &[],
    }
}

/// Builds the model of `spec` with `weights`, which were opened with [`aliases`] of the same.
///
/// # Errors
/// Names the family, class, config field or tensor at fault, or why the engine has no such model.
pub fn load(spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
    let vb = weights.var_builder(spec.dtype, &spec.device);
    if !classes(&spec.family).is_empty() && !classes(&spec.family).contains(&spec.class.as_str()) {
        return Err(config::unsupported_class(spec, classes(&spec.family)));
    }
    match (spec.family.as_str(), spec.engine) {
        ("vilt", Engine::Roofbench) => Ok(Box::new(vilt::ViltModel::load(spec, vb)?)),
        ("flava", Engine::Roofbench) => Ok(Box::new(flava::FlavaModel::load(spec, vb)?)),
        ("layoutlm", Engine::Roofbench) => layoutlm::load(spec, vb),
        (family, Engine::CandleTransformers) if FAMILIES.contains(&family) => Err(SessionError::UnsupportedEngine {
            family: family.to_owned(),
            reason: "candle-transformers is not wrapped for it; use --engine roofbench".to_owned(),
        }),
        (family, _) => Err(unknown_family(family)),
    }
}

/// The processor of a family; `configs` are the `*config.json` files of its repository by name, of which
/// `preprocessor_config.json` is read.
///
/// # Errors
/// Names the family, or the field of `preprocessor_config.json` at fault.
pub fn processor(family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
    if !FAMILIES.contains(&family) {
        return Err(unknown_family(family));
    }
    let Some(config) = configs.get("preprocessor_config.json") else {
        let reason = "the file is missing; the repository of a checkpoint has it beside config.json".to_owned();
        return Err(SessionError::Preprocessor { field: ".".to_owned(), reason });
    };
    Ok(match family {
        "flava" => Box::new(flava_processor::FlavaProcessor::from_config(config)?),
        _ => Box::new(ImageProcessor::from_config(config, family)?),
    })
}

fn unknown_family(family: &str) -> SessionError {
    let reason = format!("is no multimodal family here; supported: {}", FAMILIES.join(", "));
    SessionError::UnsupportedEngine { family: family.to_owned(), reason }
}
