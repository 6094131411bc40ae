//! Multimodal model families of roofbench: towers of vision, text and sound joined to each other and to decoders.
//!
//! This crate deliberately does not know how a measurement is made or where a report goes: it prepares what a checkpoint's
//! own processor config says, builds the model that config.json describes from the pieces of the text, vision and speech
//! crates, and puts it behind [`Session`].
//!
//! A CLIP of a few thousand weights, made up from a seed, says which of two texts is nearer to a picture:
//!
//! ```
//! use roofbench_multimodal::candle_core::{DType, Device, Tensor};
//! use roofbench_multimodal::serde_json::json;
//! use roofbench_multimodal::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};
//!
//! let tower = json!({"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2});
//! let (mut text, mut vision) = (tower.clone(), tower);
//! (text["vocab_size"], text["eos_token_id"]) = (30.into(), 29.into());
//! (vision["image_size"], vision["patch_size"]) = (16.into(), 8.into());
//! let config = json!({"projection_dim": 4, "text_config": text, "vision_config": vision});
//! let spec = ModelSpec::new("clip", "CLIPModel", config);
//! // `Source::Local` opens a checkpoint folder, `Source::Hub` a repository
//! let source = Source::Synthetic { seed: 0 };
//! let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
//! let mut session = load(&spec, &weights)?;
//!
//! let inputs = [
//!     ("pixel_values".into(), Tensor::ones((1, 3, 16, 16), DType::F32, &Device::Cpu)?),
//!     ("input_ids".into(), Tensor::new(&[[1i64, 17, 29], [1, 5, 29]], &Device::Cpu)?),
//! ];
//! let call = Call { method: "forward".into(), inputs: inputs.into(), arguments: Default::default() };
//! let outputs = session.call(&call, &mut Unobserved)?;
//! assert_eq!(outputs["logits_per_image"].dims(), [1, 2]); // (pictures, texts)
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;

use serde_json::Value;

pub mod flava_processor;
pub mod imagebind_processor;
pub mod models;
pub(crate) mod picture_to_text;
pub mod tasks;
pub mod videomae_processor;

pub use candle_core;
pub use roofbench_core::classify;
pub use roofbench_core::cost::{Cost, Outline, PhaseCost};
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{Model, Optimization, Plan};
pub use roofbench_core::session::{
    Arguments, Call, Engine, ModelSpec, Observer, Phase, Processor, Session, SessionError, Tensors, Unobserved,
};
pub use roofbench_core::task::{Answer, RawInputs, Task};
pub use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights, WeightsError};
pub use roofbench_core::{hardware, optimize};
pub use roofbench_nn::options;
pub use serde_json;
pub use tasks::{raw_inputs, task};

use imagebind_processor::ImageBindProcessor;
use models::{
    blip, blip_2, clip, donut, flava, git, imagebind, instructblip, layoutlm, llava, pix2struct, upstream, videomae,
    vilt,
};
use roofbench_core::config;
use roofbench_vision::preprocess::ImageProcessor;
use roofbench_vision::preprocess::pix2struct::Pix2StructProcessor;
use videomae_processor::VideoMaeProcessor;

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &[
    "clip",
    "blip",
    "llava",
    "blip-2",
    "imagebind",
    "instructblip",
    "vilt",
    "flava",
    "git",
    "pix2struct",
    "layoutlm",
    "donut",
    "videomae",
];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        "clip" => clip::CLASSES,
        "blip" => blip::CLASSES,
        "vilt" => vilt::CLASSES,
        "flava" => flava::CLASSES,
        "layoutlm" => layoutlm::CLASSES,
        "llava" => llava::CLASSES,
        "blip-2" => blip_2::CLASSES,
        "instructblip" => instructblip::CLASSES,
        "git" => git::CLASSES,
        "pix2struct" => pix2struct::CLASSES,
        "donut" => donut::CLASSES,
        "imagebind" => imagebind::CLASSES,
        "videomae" => videomae::CLASSES,
        _ => &[],
    }
}

/// The hardware-aware optimisations of `family`; none for a family that is not one of [`FAMILIES`].
pub fn optimizations(family: &str) -> Vec<&'static Optimization> {
    let common = || optimize::COMMON.iter().copied();
    match family {
        "clip" | "blip" | "llava" | "blip-2" | "instructblip" | "git" | "donut" => {
            common().chain([&optimize::SHARED_PICTURES]).collect()
        }
        family if FAMILIES.contains(&family) => common().collect(),
        _ => Vec::new(),
    }
}

/// What to do for `model` on `machine`, by the rules of [`optimizations`], each with its reason.
pub fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    Plan::decide(&optimizations(&model.spec.family), machine, model)
}

/// How published checkpoints of `spec` name the tensors that [`load`] asks for, for [`Weights::open`].
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.family.as_str() {
        "clip" => clip::ALIASES,
        "blip" => blip::ALIASES,
        "vilt" => vilt::aliases(spec),
        "flava" => flava::aliases(spec),
        "layoutlm" => layoutlm::aliases(spec),
        "llava" => llava::aliases(spec),
        "blip-2" | "instructblip" => blip_2::aliases(spec),
        "git" => git::aliases(spec),
        "pix2struct" => pix2struct::aliases(spec),
        "donut" => donut::aliases(spec),
        "imagebind" => imagebind::ALIASES,
        "videomae" => videomae::aliases(spec),
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
        ("clip", Engine::Roofbench) => clip::load(spec, vb),
        ("clip", Engine::CandleTransformers) => Ok(Box::new(upstream::StockClip::load(spec, vb)?)),
        ("blip", Engine::Roofbench) => blip::load(spec, vb),
        ("llava", Engine::Roofbench) => Ok(Box::new(llava::LlavaModel::load(spec, vb)?)),
        ("blip-2", Engine::Roofbench) => blip_2::load(spec, vb),
        ("instructblip", Engine::Roofbench) => instructblip::load(spec, vb),
        ("blip", Engine::CandleTransformers) => Ok(Box::new(upstream::StockBlip::load(spec, vb)?)),
        ("vilt", Engine::Roofbench) => Ok(Box::new(vilt::ViltModel::load(spec, vb)?)),
        ("flava", Engine::Roofbench) => Ok(Box::new(flava::FlavaModel::load(spec, vb)?)),
        ("layoutlm", Engine::Roofbench) => layoutlm::load(spec, vb),
        ("llava", Engine::CandleTransformers) => Err(SessionError::UnsupportedEngine {
            family: spec.family.clone(),
            reason: "candle-transformers' model is LLaVA-NeXT, which asks for `image_newline`; use --engine roofbench"
                .to_owned(),
        }),
        ("git", Engine::Roofbench) => Ok(Box::new(git::GitModel::load(spec, vb)?)),
        ("pix2struct", Engine::Roofbench) => pix2struct::Pix2StructModel::session(spec, vb),
        ("donut", Engine::Roofbench) => donut::DonutModel::session(spec, vb),
        ("imagebind", Engine::Roofbench) => Ok(Box::new(imagebind::ImageBindModel::load(spec, vb)?)),
        ("videomae", Engine::Roofbench) => Ok(Box::new(videomae::VideoMaeModel::load(spec, vb)?)),
        (family, Engine::CandleTransformers) if FAMILIES.contains(&family) => Err(SessionError::UnsupportedEngine {
            family: family.to_owned(),
            reason: "candle-transformers is not wrapped for it; use --engine roofbench".to_owned(),
        }),
        (family, _) => Err(unknown_family(family)),
    }
}

/// FLOPs and bytes of `call` on the model of `spec`, and the sizes of its weights, by config.json alone: no weights are
/// read or made, whatever the size of the model.
///
/// # Errors
/// As for [`load`] and [`Session::cost`].
pub fn cost(spec: &ModelSpec, call: &Call) -> Result<Outline, SessionError> {
    let sizes_only = options::Options { sizes_only: true, ..options::current() };
    options::with(sizes_only, || Outline::of(spec, call, aliases(spec), load))
}

/// The processor of a family; `configs` are the `*config.json` files of its repository by name, of which
/// `preprocessor_config.json` is read, or else `image_processor` of `processor_config.json`.
///
/// # Errors
/// Names the family, or the field of `preprocessor_config.json` at fault.
pub fn processor(family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
    if !FAMILIES.contains(&family) {
        return Err(unknown_family(family));
    }
    if family == "imagebind" {
        // its repository has no such file: what its own loader fixes is the default
        return Ok(Box::new(ImageBindProcessor::from_config(configs.get("preprocessor_config.json"))?));
    }
    let config = roofbench_vision::preprocessor_config(configs)?;
    Ok(match family {
        "flava" => Box::new(flava_processor::FlavaProcessor::from_config(config)?),
        "pix2struct" => Box::new(Pix2StructProcessor::from_config(config)?),
        "videomae" => Box::new(VideoMaeProcessor::from_config(config)?),
        _ => Box::new(ImageProcessor::from_config(config, family)?),
    })
}

pub(crate) fn unknown_family(family: &str) -> SessionError {
    let reason = format!("is no multimodal family here; supported: {}", FAMILIES.join(", "));
    SessionError::UnsupportedEngine { family: family.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_families_are_refused_with_the_list() {
        let message = |family| processor(family, &BTreeMap::new()).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(message("bert"), format!("bert: is no multimodal family here; supported: {}", FAMILIES.join(", ")));
        assert!(message("clip").starts_with("preprocessor_config.json: `.`: the file is missing"));
        assert!(FAMILIES.iter().all(|family| !classes(family).is_empty()));
    }
}
