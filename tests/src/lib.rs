//! What the tests that cross crates share: every family that the workspace implements, behind one door.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use roofbench_core::reference::{self, Case, Kind, find};
use roofbench_core::session::{Engine, ModelSpec, Processor, Session, SessionError};
use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights};
use serde_json::Value;

/// The families of all modality crates.
pub fn families() -> impl Iterator<Item = &'static str> {
    [roofbench_text::FAMILIES, roofbench_vision::FAMILIES, roofbench_speech::FAMILIES, roofbench_multimodal::FAMILIES]
        .into_iter()
        .flatten()
        .copied()
}

/// The `transformers` classes of `family` that run.
pub fn classes(family: &str) -> &'static [&'static str] {
    match Modality::of(family) {
        Modality::Text => roofbench_text::classes(family),
        Modality::Vision => roofbench_vision::classes(family),
        Modality::Speech => roofbench_speech::classes(family),
        Modality::Multimodal => roofbench_multimodal::classes(family),
    }
}

/// Whose crate runs a family.
enum Modality {
    Text,
    Vision,
    Speech,
    Multimodal,
}

impl Modality {
    /// That of an unknown family is any, which refuses it.
    fn of(family: &str) -> Self {
        match family {
            family if roofbench_text::FAMILIES.contains(&family) => Self::Text,
            family if roofbench_speech::FAMILIES.contains(&family) => Self::Speech,
            family if roofbench_multimodal::FAMILIES.contains(&family) => Self::Multimodal,
            _ => Self::Vision,
        }
    }
}

/// Builds models and processors of every family.
#[derive(Debug, Clone, Copy)]
pub struct Models;

impl reference::Models for Models {
    fn aliases(&self, spec: &ModelSpec) -> &'static [AliasRule] {
        match Modality::of(&spec.family) {
            Modality::Text => roofbench_text::aliases(spec),
            Modality::Vision => roofbench_vision::aliases(&spec.family),
            Modality::Speech => roofbench_speech::aliases(spec),
            Modality::Multimodal => roofbench_multimodal::aliases(spec),
        }
    }

    fn load(&self, spec: &ModelSpec, weights: &Weights) -> std::result::Result<Box<dyn Session>, SessionError> {
        match Modality::of(&spec.family) {
            Modality::Text => roofbench_text::load(spec, weights),
            Modality::Vision => roofbench_vision::load(spec, weights),
            Modality::Speech => roofbench_speech::load(spec, weights),
            Modality::Multimodal => roofbench_multimodal::load(spec, weights),
        }
    }

    fn processor(
        &self,
        family: &str,
        configs: &BTreeMap<String, Value>,
    ) -> std::result::Result<Box<dyn Processor>, SessionError> {
        match Modality::of(family) {
            Modality::Speech => roofbench_speech::processor(family, configs),
            Modality::Multimodal => roofbench_multimodal::processor(family, configs),
            _ => roofbench_vision::processor(family, configs),
        }
    }
}

/// The reference cases.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference")
}

/// Further cases in the same form, of options that those leave out.
fn own_fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/own")
}

/// Every case of `kind` of the families that run.
///
/// # Panics
/// When a case can't be read: these are the project's own.
pub fn cases(kind: Kind) -> impl Iterator<Item = Case> {
    let folders = [fixtures(), own_fixtures()].map(|folder| find(&folder).expect("the cases of the project"));
    let cases = folders.into_iter().flatten().map(|folder| Case::read(&folder).expect("a case of the project"));
    cases.filter(move |case| case.kind == kind && families().any(|family| family == case.family))
}

/// The model of a case.
///
/// # Panics
/// When it can't be built.
pub fn session(case: &Case) -> Box<dyn Session> {
    let models: &dyn reference::Models = &Models;
    let spec = case.spec(&Device::Cpu, Engine::Roofbench).expect("a config");
    let weights = Weights::open(&case.source(), models.aliases(&spec), &spec.class, &HubOptions::from_env());
    let session = weights.map_err(SessionError::from).and_then(|weights| models.load(&spec, &weights));
    session.unwrap_or_else(|error| panic!("{}/{}: {error}", case.family, case.name))
}

/// A model in f32 on the CPU with weights made from seed 0, and those weights with their account of what was read.
///
/// # Errors
/// As [`reference::Models::load`].
pub fn synthetic(
    family: &str,
    class: &str,
    config: &Value,
) -> std::result::Result<(Box<dyn Session>, Weights), SessionError> {
    let spec = ModelSpec::new(family, class, config.clone());
    let models: &dyn reference::Models = &Models;
    let source = Source::Synthetic { seed: 0 };
    let weights = Weights::open(&source, models.aliases(&spec), class, &HubOptions::from_env())?;
    Ok((models.load(&spec, &weights)?, weights))
}

/// `max |a - b| / max |b|`.
///
/// # Errors
/// Shapes that differ.
pub fn relative_error(a: &Tensor, b: &Tensor) -> Result<f32> {
    let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    Ok(largest(&(&a - &b)?)? / largest(&b)?)
}
