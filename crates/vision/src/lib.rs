//! Vision model families of roofbench: pictures in, labels, boxes, masks and features out.
//!
//! This crate deliberately does not know how a measurement is made, where a report goes, or any text: it prepares
//! pictures as a checkpoint's own config says ([`preprocess`]), builds the model that config.json describes and puts it
//! behind [`Session`].
//!
//! A ViT of a few hundred weights, made up from a seed, looks at a picture:
//!
//! ```
//! use roofbench_vision::classify::{classify, labels};
//! use roofbench_vision::image::{Rgb, RgbImage};
//! use roofbench_vision::preprocess::ImageProcessor;
//! use roofbench_vision::serde_json::json;
//! use roofbench_vision::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};
//!
//! let config = json!({
//!     "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
//!     "image_size": 16, "patch_size": 8, "id2label": {"0": "dark", "1": "light", "2": "striped"},
//! });
//! let spec = ModelSpec::new("vit", "ViTForImageClassification", config);
//! // `Source::Local` opens a checkpoint folder, `Source::Hub` a repository
//! let source = Source::Synthetic { seed: 0 };
//! let weights = Weights::open(&source, aliases("vit"), &spec.class, &HubOptions::from_env())?;
//! let mut session = load(&spec, &weights)?;
//!
//! let picture = RgbImage::from_fn(40, 30, |x, y| Rgb([x as u8 * 6, y as u8 * 8, 128]));
//! let pixel_values = ImageProcessor::from_config(&json!({"size": 16}), "vit")?.prepare(&picture)?.unsqueeze(0)?;
//! let call = Call {
//!     method: "forward".into(),
//!     inputs: [("pixel_values".into(), pixel_values)].into(),
//!     arguments: Default::default(),
//! };
//! let outputs = session.call(&call, &mut Unobserved)?;
//! let best = classify(&outputs["logits"], &labels(&spec.config)?, 1)?;
//! assert!(["dark", "light", "striped"].contains(&best[0][0].label.as_str()));
//! assert!(best[0][0].probability > 1.0 / 3.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;

use serde_json::Value;

pub mod detection;
mod draw;
pub mod image_io;
pub mod models;
pub mod preprocess;
pub mod resize;
pub mod tasks;

pub use candle_core;
pub use image;
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

use models::{convnext, detr, dinov2, resnet, sam, swin, upstream, vit};

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &["vit", "convnext", "resnet", "detr", "sam", "dinov2", "swin"];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        "vit" => vit::CLASSES,
        "convnext" => convnext::CLASSES,
        "swin" => swin::CLASSES,
        "resnet" => resnet::CLASSES,
        "detr" => detr::CLASSES,
        "sam" => sam::CLASSES,
        "dinov2" => dinov2::CLASSES,
        _ => &[],
    }
}

/// The hardware-aware optimisations of `family`; none for a family that is not one of [`FAMILIES`].
pub fn optimizations(family: &str) -> Vec<&'static Optimization> {
    let common = || optimize::COMMON.iter().copied();
    match family {
        // maps and kernels alone
        "resnet" => vec![&optimize::PACKED_WEIGHTS, &optimize::WINOGRAD, &optimize::PINNED_THREADS],
        "convnext" => common().filter(|optimization| optimization.name != optimize::FUSED_ATTENTION.name).collect(),
        "vit" => common().chain([&vit::CLASS_TOKEN_ONLY]).collect(),
        // a backbone of ResNet, a neck
        "detr" | "sam" => common().chain([&optimize::WINOGRAD]).collect(),
        family if FAMILIES.contains(&family) => common().collect(),
        _ => Vec::new(),
    }
}

/// What to do for `model` on `machine`, by the rules of [`optimizations`], each with its reason.
pub fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    Plan::decide(&optimizations(&model.spec.family), machine, model)
}

/// Rules from names in published checkpoints to those that the family's models ask for; none for another's family.
pub fn aliases(family: &str) -> &'static [AliasRule] {
    match family {
        "vit" => vit::ALIASES,
        "convnext" => convnext::ALIASES,
        "swin" => swin::ALIASES,
        "resnet" => resnet::ALIASES,
        "detr" => detr::ALIASES,
        "sam" => sam::ALIASES,
        "dinov2" => dinov2::ALIASES,
        _ => &[],
    }
}

/// Builds the model of `spec` with `weights`, which were opened with [`aliases`] of the family.
///
/// # Errors
/// Names the family, class, config field or tensor at fault, or why the engine has no such model.
pub fn load(spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
    let vb = weights.var_builder(spec.dtype, &spec.device);
    match (spec.family.as_str(), spec.engine) {
        ("vit", Engine::Roofbench) => Ok(Box::new(vit::ViTModel::load(spec, vb)?)),
        ("vit", Engine::CandleTransformers) => Ok(Box::new(upstream::StockViT::load(spec, vb)?)),
        ("convnext", Engine::Roofbench) => Ok(Box::new(convnext::ConvNextModel::load(spec, vb)?)),
        ("convnext", Engine::CandleTransformers) => Ok(Box::new(upstream::convnext::StockConvNext::load(spec, vb)?)),
        ("swin", Engine::Roofbench) => Ok(Box::new(swin::SwinModel::load(spec, vb)?)),
        ("resnet", Engine::Roofbench) => Ok(Box::new(resnet::ResNetModel::load(spec, vb)?)),
        ("resnet", Engine::CandleTransformers) => Ok(Box::new(upstream::StockResNet::load(spec, vb)?)),
        ("detr", Engine::Roofbench) => Ok(Box::new(detr::DetrModel::load(spec, vb)?)),
        (family @ ("swin" | "detr"), Engine::CandleTransformers) => {
            Err(unsupported_engine(family, "candle-transformers has no such model; run it without --engine"))
        }
        ("sam", Engine::Roofbench) => Ok(Box::new(sam::SamModel::load(spec, vb)?)),
        ("sam", Engine::CandleTransformers) => Ok(Box::new(upstream::sam::StockSam::load(spec, vb)?)),
        ("dinov2", Engine::Roofbench) => Ok(Box::new(dinov2::Dinov2Model::load(spec, vb)?)),
        ("dinov2", Engine::CandleTransformers) => Ok(Box::new(upstream::dinov2::StockDinov2::load(spec, vb)?)),
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
    options::with(sizes_only, || Outline::of(spec, call, aliases(&spec.family), load))
}

/// The picture processor of a family; `configs` are the `*config.json` files of its repository by name, of which
/// `preprocessor_config.json` is read, or else `image_processor` of `processor_config.json`.
///
/// # Errors
/// Names the family, or the field of `preprocessor_config.json` at fault.
pub fn processor(family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
    if !FAMILIES.contains(&family) {
        return Err(unknown_family(family));
    }
    let config = preprocessor_config(configs)?;
    Ok(match family {
        "detr" => Box::new(detection::DetectionProcessor::from_config(config, family)?),
        "sam" => Box::new(preprocess::sam::SamProcessor::from_config(config)?),
        _ => Box::new(preprocess::ImageProcessor::from_config(config, family)?),
    })
}

/// The kinds of raw inputs that `family` takes; none for a family that is not one of [`FAMILIES`].
pub fn raw_inputs(family: &str) -> &'static [&'static str] {
    if FAMILIES.contains(&family) { &["image"] } else { &[] }
}

/// What people use the checkpoint of `spec` for, with the pictures that they gave: see [`tasks`].
///
/// # Errors
/// Other inputs than pictures, or what [`processor`] refuses.
pub fn task(spec: &ModelSpec, _weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    tasks::task(spec, raw)
}

/// What says how pictures are prepared among the `*config.json` files of a repository: `preprocessor_config.json`, or else
/// `image_processor` of `processor_config.json`.
///
/// # Errors
/// When there is neither.
pub fn preprocessor_config(configs: &BTreeMap<String, Value>) -> Result<&Value, SessionError> {
    let nested = || configs.get("processor_config.json")?.get("image_processor");
    configs.get("preprocessor_config.json").or_else(nested).ok_or_else(|| {
        let reason = "the file is missing; the repository of a checkpoint has it beside config.json".to_owned();
        SessionError::Preprocessor { field: ".".to_owned(), reason }
    })
}

fn unknown_family(family: &str) -> SessionError {
    unsupported_engine(family, &format!("is no vision family here; supported: {}", FAMILIES.join(", ")))
}

fn unsupported_engine(family: &str, reason: &str) -> SessionError {
    SessionError::UnsupportedEngine { family: family.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_families_are_refused_with_the_list() {
        let error = processor("bert", &BTreeMap::new()).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error, format!("bert: is no vision family here; supported: {}", FAMILIES.join(", ")));
        let error = processor("vit", &BTreeMap::new()).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.starts_with("preprocessor_config.json: `.`: the file is missing"), "{error}");
        assert!(aliases("bert").is_empty() && FAMILIES.iter().all(|family| !aliases(family).is_empty()));
    }
}
