//! Multimodal model families of roofbench: towers of vision, text and sound joined to each other and to decoders.
//!
//! This crate deliberately does not know how a measurement is made or where a report goes: it prepares what a checkpoint's
//! own processor config says, builds the model that config.json describes from the pieces of the text, vision and speech
//! crates, and puts it behind [`Session`].

use std::collections::BTreeMap;

use serde_json::Value;

pub mod models;

pub use candle_core;
pub use roofbench_core::classify;
pub use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{Model, Optimization, Plan};
pub use roofbench_core::session::{
    Arguments, Call, Engine, ModelSpec, Observer, Phase, Processor, Session, SessionError, Tensors, Unobserved,
};
pub use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights, WeightsError};
pub use roofbench_core::{hardware, optimize};
pub use roofbench_nn::options;
pub use serde_json;

use roofbench_core::config;

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &[];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        _ => &[],
    }
}

/// The hardware-aware optimisations of `family`; none for a family that is not one of [`FAMILIES`].
pub fn optimizations(family: &str) -> &'static [&'static Optimization] {
    if FAMILIES.contains(&family) { optimize::COMMON } else { &[] }
}

/// What to do for `model` on `machine`, by the rules of [`optimizations`], each with its reason.
pub fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    Plan::decide(optimizations(&model.spec.family), machine, model)
}

/// How published checkpoints of `spec` name the tensors that [`load`] asks for, for [`Weights::open`].
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.family.as_str() {
        _ => &[],
    }
}

/// Builds the model of `spec` with `weights`, which were opened with [`aliases`] of the same.
///
/// # Errors
/// Names the family, class, config field or tensor at fault, or why the engine has no such model.
pub fn load(spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
    let _ = weights;
    if !classes(&spec.family).is_empty() && !classes(&spec.family).contains(&spec.class.as_str()) {
        return Err(config::unsupported_class(spec, classes(&spec.family)));
    }
    match (spec.family.as_str(), spec.engine) {
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
    let _ = configs;
    Err(unknown_family(family))
}

fn unknown_family(family: &str) -> SessionError {
    let reason = format!("is no multimodal family here; supported: {}", FAMILIES.join(", "));
    SessionError::UnsupportedEngine { family: family.to_owned(), reason }
}
