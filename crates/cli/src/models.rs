//! Which crate runs a family: the one place that knows.

use std::collections::BTreeMap;

use roofbench_core::cost::Outline;
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{Model, Optimization, Plan};
use roofbench_core::record::Build;
use roofbench_core::reference;
use roofbench_core::session::{Call, ModelSpec, Processor, Session, SessionError};
use roofbench_core::task::{RawInputs, Task};
use roofbench_core::weights::{AliasRule, Weights};
use serde_json::Value;

/// A modality's crate as this program uses it.
struct Modality {
    families: &'static [&'static str],
    classes: fn(&str) -> &'static [&'static str],
    aliases: fn(&ModelSpec) -> &'static [AliasRule],
    load: Load,
    cost: fn(&ModelSpec, &Call) -> Result<Outline, SessionError>,
    optimizations: fn(&str) -> Vec<&'static Optimization>,
    optimize: fn(&Machine, &Model) -> Plan,
    processor: Option<ProcessorOf>,
    raw_inputs: fn(&str) -> &'static [&'static str],
    task: TaskOf,
}

/// Builds the model of a spec from its weights.
type Load = fn(&ModelSpec, &Weights) -> Result<Box<dyn Session>, SessionError>;

/// Builds the processor of a family from the `*config.json` files of its repository.
type ProcessorOf = fn(&str, &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError>;

/// Makes the task of a spec for raw inputs.
type TaskOf = fn(&ModelSpec, &Weights, RawInputs) -> Result<Box<dyn Task>, SessionError>;

/// The crates that this build has.
const MODALITIES: &[Modality] = &[
    #[cfg(feature = "text")]
    Modality {
        families: roofbench_text::FAMILIES,
        classes: roofbench_text::classes,
        aliases: roofbench_text::aliases,
        load: roofbench_text::load,
        cost: roofbench_text::cost,
        optimizations: |family| roofbench_text::optimizations(family).to_vec(),
        optimize: roofbench_text::apply_hardware_optimizations,
        processor: None,
        raw_inputs: roofbench_text::raw_inputs,
        task: roofbench_text::task,
    },
    #[cfg(feature = "vision")]
    Modality {
        families: roofbench_vision::FAMILIES,
        classes: roofbench_vision::classes,
        aliases: |spec| roofbench_vision::aliases(&spec.family),
        load: roofbench_vision::load,
        cost: roofbench_vision::cost,
        optimizations: roofbench_vision::optimizations,
        optimize: roofbench_vision::apply_hardware_optimizations,
        processor: Some(roofbench_vision::processor),
        raw_inputs: roofbench_vision::raw_inputs,
        task: roofbench_vision::task,
    },
    #[cfg(feature = "speech")]
    Modality {
        families: roofbench_speech::FAMILIES,
        classes: roofbench_speech::classes,
        aliases: roofbench_speech::aliases,
        load: roofbench_speech::load,
        cost: roofbench_speech::cost,
        optimizations: roofbench_speech::optimizations,
        optimize: roofbench_speech::apply_hardware_optimizations,
        processor: Some(roofbench_speech::processor),
        raw_inputs: roofbench_speech::raw_inputs,
        task: roofbench_speech::task,
    },
    #[cfg(feature = "multimodal")]
    Modality {
        families: roofbench_multimodal::FAMILIES,
        classes: roofbench_multimodal::classes,
        aliases: roofbench_multimodal::aliases,
        load: roofbench_multimodal::load,
        cost: roofbench_multimodal::cost,
        optimizations: roofbench_multimodal::optimizations,
        optimize: roofbench_multimodal::apply_hardware_optimizations,
        processor: Some(roofbench_multimodal::processor),
        raw_inputs: roofbench_multimodal::raw_inputs,
        task: roofbench_multimodal::task,
    },
];

fn modality(family: &str) -> Option<&'static Modality> {
    MODALITIES.iter().find(|modality| modality.families.contains(&family))
}

/// Whether this build has a model of `family`.
pub(crate) fn runs(family: &str) -> bool {
    modality(family).is_some()
}

/// Families that this build has models of.
pub(crate) fn families() -> impl Iterator<Item = &'static str> {
    MODALITIES.iter().flat_map(|modality| modality.families.iter().copied())
}

/// The `transformers` classes of `family` that run.
pub(crate) fn classes(family: &str) -> &'static [&'static str] {
    modality(family).map_or(&[], |modality| (modality.classes)(family))
}

/// The optimisations of `family`.
pub(crate) fn optimizations(family: &str) -> Vec<&'static Optimization> {
    modality(family).map_or_else(Vec::new, |modality| (modality.optimizations)(family))
}

/// What to do for `model` on `machine`, by the rules of its family.
pub(crate) fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    modality(&model.spec.family).map_or_else(Plan::default, |modality| (modality.optimize)(machine, model))
}

/// Builds models and processors of every family that this build has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Models;

impl reference::Models for Models {
    fn aliases(&self, spec: &ModelSpec) -> &'static [AliasRule] {
        modality(&spec.family).map_or(&[], |modality| (modality.aliases)(spec))
    }

    fn load(&self, spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
        let modality = modality(&spec.family).ok_or_else(|| not_here(&spec.family))?;
        (modality.load)(spec, weights)
    }

    fn processor(&self, family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
        let processor = modality(family).ok_or_else(|| not_here(family))?.processor;
        let processor = processor.ok_or_else(|| SessionError::UnsupportedEngine {
            family: family.to_owned(),
            reason: "has no processor for raw inputs; give tensors".to_owned(),
        })?;
        processor(family, configs)
    }
}

/// What `call` costs on the model of `spec`, by its config alone.
pub(crate) fn cost(spec: &ModelSpec, call: &Call) -> Result<Outline, SessionError> {
    (modality(&spec.family).ok_or_else(|| not_here(&spec.family))?.cost)(spec, call)
}

fn not_here(family: &str) -> SessionError {
    let families: Vec<_> = families().collect();
    SessionError::UnsupportedEngine {
        family: family.to_owned(),
        reason: format!("this build has no model of it; it runs {}", families.join(", ")),
    }
}

/// The kinds of raw inputs that `family` takes: `text`, `image`, `audio`.
pub(crate) fn raw_inputs(family: &str) -> &'static [&'static str] {
    modality(family).map_or(&[], |modality| (modality.raw_inputs)(family))
}

/// What people use the checkpoint of `spec` for, with the raw inputs that they gave.
///
/// # Errors
/// Inputs that the family has no use for, or files of the checkpoint that are missing or malformed.
pub(crate) fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    let modality = modality(&spec.family).ok_or_else(|| not_here(&spec.family))?;
    (modality.task)(spec, weights, raw)
}

/// The build of this program.
pub(crate) fn build() -> Build {
    let features = [
        ("text", cfg!(feature = "text")),
        ("vision", cfg!(feature = "vision")),
        ("speech", cfg!(feature = "speech")),
        ("multimodal", cfg!(feature = "multimodal")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("metal", cfg!(feature = "metal")),
        ("mkl", cfg!(feature = "mkl")),
        ("accelerate", cfg!(feature = "accelerate")),
    ];
    let features: Vec<&str> = features.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
    Build::current(Some(env!("ROOFBENCH_COMMIT")), &features)
}
