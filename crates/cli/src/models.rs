//! Which crate runs a family: the one place that knows.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{Model, Optimization, Plan};
use roofbench_core::record::Build;
use roofbench_core::reference;
use roofbench_core::session::{ModelSpec, Processor, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, Weights};
use serde_json::Value;

/// A modality's crate as this program uses it.
struct Modality {
    families: &'static [&'static str],
    classes: fn(&str) -> &'static [&'static str],
    aliases: fn(&ModelSpec) -> &'static [AliasRule],
    load: Load,
    optimizations: fn(&str) -> Vec<&'static Optimization>,
    optimize: fn(&Machine, &Model) -> Plan,
    processor: Option<ProcessorOf>,
}

/// Builds the model of a spec from its weights.
type Load = fn(&ModelSpec, &Weights) -> Result<Box<dyn Session>, SessionError>;

/// Builds the processor of a family from the `*config.json` files of its repository.
type ProcessorOf = fn(&str, &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError>;

/// The crates that this build has.
const MODALITIES: &[Modality] = &[
    #[cfg(feature = "text")]
    Modality {
        families: roofbench_text::FAMILIES,
        classes: roofbench_text::classes,
        aliases: roofbench_text::aliases,
        load: roofbench_text::load,
        optimizations: |family| roofbench_text::optimizations(family).to_vec(),
        optimize: roofbench_text::apply_hardware_optimizations,
        processor: None,
    },
    #[cfg(feature = "vision")]
    Modality {
        families: roofbench_vision::FAMILIES,
        classes: roofbench_vision::classes,
        aliases: |spec| roofbench_vision::aliases(&spec.family),
        load: roofbench_vision::load,
        optimizations: roofbench_vision::optimizations,
        optimize: roofbench_vision::apply_hardware_optimizations,
        processor: Some(roofbench_vision::processor),
    },
    #[cfg(feature = "speech")]
    Modality {
        families: roofbench_speech::FAMILIES,
        classes: roofbench_speech::classes,
        aliases: roofbench_speech::aliases,
        load: roofbench_speech::load,
        optimizations: |family| roofbench_speech::optimizations(family).to_vec(),
        optimize: roofbench_speech::apply_hardware_optimizations,
        processor: Some(roofbench_speech::processor),
    },
    #[cfg(feature = "multimodal")]
    Modality {
        families: roofbench_multimodal::FAMILIES,
        classes: roofbench_multimodal::classes,
        aliases: roofbench_multimodal::aliases,
        load: roofbench_multimodal::load,
        optimizations: |family| roofbench_multimodal::optimizations(family).to_vec(),
        optimize: roofbench_multimodal::apply_hardware_optimizations,
        processor: Some(roofbench_multimodal::processor),
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

fn not_here(family: &str) -> SessionError {
    let families: Vec<_> = families().collect();
    SessionError::UnsupportedEngine {
        family: family.to_owned(),
        reason: format!("this build has no model of it; it runs {}", families.join(", ")),
    }
}

/// Turns `texts` into `input_ids` and their masks, by a checkpoint's `tokenizer.json`.
///
/// # Errors
/// The file can't be read; or this build has no text models.
pub(crate) fn encoder(
    family: &str,
    tokenizer: &Path,
    texts: &[String],
    device: &Device,
) -> Result<Box<dyn Fn() -> Result<Tensors, SessionError>>, SessionError> {
    #[cfg(feature = "text")]
    return {
        let tokenizer = roofbench_text::tokenize::Tokenizer::from_file(tokenizer)?;
        let (texts, device) = (texts.to_vec(), device.clone());
        // decoders and encoder-decoders have no segments
        let has_segments = family == "bert";
        Ok(Box::new(move || {
            let mut tensors = tokenizer.encode(&texts, &device)?;
            if !has_segments {
                tensors.remove("token_type_ids");
            }
            Ok(tensors)
        }))
    };
    #[cfg(not(feature = "text"))]
    return Err(SessionError::File {
        path: tokenizer.to_owned(),
        reason: format!(
            "this build reads no text ({} for {family} on {device:?}); build it with --features text",
            texts.len()
        ),
    });
}

/// A word and its probability.
pub(crate) type Filling = (String, f32);

/// What stands at each mask of the texts, the likeliest words first, by the scores of a masked language model.
///
/// # Errors
/// The tokenizer's file can't be read, or shapes don't fit; or this build has no text models.
pub(crate) fn fillings(
    tokenizer: &Path,
    input_ids: &Tensor,
    logits: &Tensor,
    top: usize,
) -> Result<Vec<Vec<Vec<Filling>>>, SessionError> {
    #[cfg(feature = "text")]
    return {
        let tokenizer = roofbench_text::tokenize::Tokenizer::from_file(tokenizer)?;
        roofbench_text::tasks::fill_mask(&tokenizer, input_ids, logits, top)
    };
    #[cfg(not(feature = "text"))]
    return Err(SessionError::File {
        path: tokenizer.to_owned(),
        reason: format!("this build reads no text ({input_ids}, {logits}, {top})"),
    });
}

/// The texts of generated `sequences` (texts, tokens) from token `start` on.
///
/// # Errors
/// The tokenizer's file can't be read; or this build has no text models.
pub(crate) fn texts(tokenizer: &Path, sequences: &Tensor, start: usize) -> Result<Vec<String>, SessionError> {
    #[cfg(feature = "text")]
    return {
        let tokenizer = roofbench_text::tokenize::Tokenizer::from_file(tokenizer)?;
        roofbench_text::tasks::generated(&tokenizer, sequences, start)
    };
    #[cfg(not(feature = "text"))]
    return Err(SessionError::File {
        path: tokenizer.to_owned(),
        reason: format!("this build reads no text ({sequences} from {start})"),
    });
}

/// Cosine similarities (texts, texts) of the mean over tokens of `hidden` (texts, seq, hidden).
///
/// # Errors
/// Shapes that don't fit; or this build has no text models.
pub(crate) fn similarities(hidden: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    #[cfg(feature = "text")]
    return {
        use roofbench_text::tasks::{cosine_similarities, mean_pool};
        cosine_similarities(&mean_pool(&hidden.to_dtype(candle_core::DType::F32)?, mask)?)
    };
    #[cfg(not(feature = "text"))]
    candle_core::bail!("this build reads no text ({hidden}, {mask})");
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
