//! Speech model families of roofbench: sound in, text, labels, features or sound out.
//!
//! This crate deliberately does not know how a measurement is made, where a report goes, or any picture: it reads and
//! prepares audio as a checkpoint's own config says, builds the model that config.json describes and puts it behind
//! [`Session`].

use std::collections::BTreeMap;

use serde_json::Value;

pub mod models;

pub use candle_core;
pub use roofbench_core::classify;
pub use roofbench_core::cost::{Cost, PhaseCost};
pub use roofbench_core::session::{
    Arguments, Call, Engine, ModelSpec, Observer, Phase, Processor, Session, SessionError, Tensors, Unobserved,
};
pub use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights, WeightsError};
pub use serde_json;

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &[];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        _ => &[],
    }
}

/// Rules from names in published checkpoints to those that the family's models ask for; none for another's family.
pub fn aliases(family: &str) -> &'static [AliasRule] {
    match family {
        _ => &[],
    }
}

/// Builds the model of `spec` with `weights`, which were opened with [`aliases`] of the family.
///
/// # Errors
/// Names the family, class, config field or tensor at fault, or why the engine has no such model.
pub fn load(spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
    let _vb = weights.var_builder(spec.dtype, &spec.device);
    match (spec.family.as_str(), spec.engine) {
        (family, _) => Err(unknown_family(family)),
    }
}

/// The audio processor of a family; `configs` are the `*config.json` files of its repository by name, of which
/// `preprocessor_config.json` is read.
///
/// # Errors
/// Names the family, or the field of `preprocessor_config.json` at fault.
pub fn processor(family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
    if !FAMILIES.contains(&family) {
        return Err(unknown_family(family));
    }
    let Some(_config) = configs.get("preprocessor_config.json") else {
        let reason = "the file is missing; the repository of a checkpoint has it beside config.json".to_owned();
        return Err(SessionError::Preprocessor { field: ".".to_owned(), reason });
    };
    match family {
        _ => Err(unknown_family(family)),
    }
}

fn unknown_family(family: &str) -> SessionError {
    let reason = format!("is no speech family here; supported: {}", FAMILIES.join(", "));
    SessionError::UnsupportedEngine { family: family.to_owned(), reason }
}
