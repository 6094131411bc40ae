//! Speech model families of roofbench: sound in, text, labels, features or sound out.
//!
//! This crate deliberately does not know how a measurement is made, where a report goes, or any picture: it reads audio
//! files ([`audio`]), prepares them as a checkpoint's own config says ([`preprocess`]), builds the model that config.json
//! describes, puts it behind [`Session`], and says what comes of it in text, tables and sound ([`tasks`]).
//!
//! A wav2vec 2.0 of a few thousand weights, made up from a seed, listens to a tone:
//!
//! ```
//! use roofbench_speech::ctc::CtcDecoder;
//! use roofbench_speech::preprocess::{Options, Padding, WaveformProcessor};
//! use roofbench_speech::serde_json::json;
//! use roofbench_speech::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};
//!
//! let config = json!({
//!     "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
//!     "conv_dim": [8, 8], "conv_kernel": [10, 4], "conv_stride": [5, 4], "num_conv_pos_embeddings": 4,
//!     "num_conv_pos_embedding_groups": 2, "vocab_size": 4,
//! });
//! let spec = ModelSpec::new("wav2vec2", "Wav2Vec2ForCTC", config);
//! // `Source::Local` opens a checkpoint folder, `Source::Hub` a repository
//! let source = Source::Synthetic { seed: 0 };
//! let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
//! let mut session = load(&spec, &weights)?;
//!
//! // `audio::Sound::read` decodes a file
//! let tone: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.17).sin()).collect();
//! let options = Options { padding: Padding::Longest, cut: None, multiple_of: None, attention_mask: false };
//! let inputs = WaveformProcessor::from_config(&json!({"sampling_rate": 16000}))?.prepare(vec![tone], &options)?;
//! let call = Call { method: "forward".into(), inputs, arguments: Default::default() };
//! let logits = &session.call(&call, &mut Unobserved)?["logits"];
//! assert_eq!(logits.dims(), [1, 399, 4]); // a frame for every 20 samples
//! let decoder = CtcDecoder::new(&json!({"<pad>": 0, "|": 1, "A": 2, "B": 3}), &json!({}))?;
//! let text = &decoder.decode(logits)?[0];
//! assert!(text.chars().all(|c| "AB ".contains(c)), "{text}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;

use serde_json::Value;

pub mod audio;
pub mod ctc;
pub mod fbank;
pub mod models;
pub mod preprocess;
pub mod sinc;
pub mod tasks;
pub mod tokenize;
pub mod tuning;

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

use models::{encodec, hubert, speecht5, unispeech, upstream, wav2vec2, wavlm, whisper};
use roofbench_core::config;

/// The families of the catalog that this crate runs.
pub const FAMILIES: &[&str] = &["wav2vec2", "hubert", "wavlm", "unispeech", "encodec", "whisper", "speecht5"];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        "wav2vec2" => wav2vec2::CLASSES,
        "hubert" => hubert::CLASSES,
        "wavlm" => wavlm::CLASSES,
        "unispeech" => unispeech::CLASSES,
        "encodec" => encodec::CLASSES,
        "whisper" => whisper::CLASSES,
        "speecht5" => speecht5::CLASSES,
        _ => &[],
    }
}

/// The hardware-aware optimisations of `family`; none for a family that is not one of [`FAMILIES`].
pub fn optimizations(family: &str) -> Vec<&'static Optimization> {
    let own: &[&'static Optimization] = match family {
        "encodec" | "whisper" => &[&tuning::OVERLAPPED_DECODING],
        family if FAMILIES.contains(&family) => &[&tuning::TILED_FEATURES, &tuning::OVERLAPPED_DECODING],
        _ => return Vec::new(),
    };
    optimize::COMMON.iter().chain(own).copied().collect()
}

/// What to do for `model` on `machine`, by the rules of [`optimizations`], each with its reason.
pub fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    Plan::decide(&optimizations(&model.spec.family), machine, model)
}

/// How published checkpoints of `spec` name the tensors that [`load`] asks for, for [`Weights::open`].
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.family.as_str() {
        "wav2vec2" => wav2vec2::aliases(spec),
        "hubert" => hubert::aliases(spec),
        "wavlm" => wavlm::aliases(spec),
        "unispeech" => unispeech::aliases(spec),
        "encodec" => encodec::ALIASES,
        "whisper" => whisper::ALIASES,
        "speecht5" => speecht5::aliases(spec),
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
        ("wav2vec2", Engine::Roofbench) => Ok(Box::new(wav2vec2::load(spec, vb)?)),
        ("hubert", Engine::Roofbench) => Ok(Box::new(hubert::load(spec, vb)?)),
        ("wavlm", Engine::Roofbench) => Ok(Box::new(wavlm::load(spec, vb)?)),
        ("unispeech", Engine::Roofbench) => Ok(Box::new(unispeech::load(spec, vb)?)),
        ("whisper", Engine::Roofbench) => Ok(Box::new(whisper::WhisperModel::load(spec, vb)?)),
        ("speecht5", Engine::Roofbench) => speecht5::load(spec, weights, vb),
        ("encodec", Engine::Roofbench) => Ok(Box::new(encodec::EncodecModel::load(spec, vb)?)),
        ("whisper", Engine::CandleTransformers) => Ok(Box::new(upstream::Whisper::load(spec, vb)?)),
        ("encodec", Engine::CandleTransformers) => Ok(Box::new(upstream::Encodec::load(spec, vb)?)),
        (family, Engine::CandleTransformers) if FAMILIES.contains(&family) => Err(SessionError::UnsupportedEngine {
            family: family.to_owned(),
            reason: "candle-transformers has no model of it; use --engine roofbench".to_owned(),
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

/// The audio processor of a family; `configs` are the `*config.json` files of its repository by name, of which
/// `preprocessor_config.json` is read.
///
/// # Errors
/// Names the family, or the field of `preprocessor_config.json` at fault.
pub fn processor(family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
    if !FAMILIES.contains(&family) {
        return Err(unknown_family(family));
    }
    let config = preprocessor_config(configs)?;
    Ok(match family {
        "encodec" => Box::new(preprocess::EncodecProcessor::from_config(config)?),
        "whisper" => Box::new(preprocess::WhisperProcessor::from_config(config)?),
        "speecht5" => Box::new(preprocess::SpeechT5Processor::from_config(config)?),
        _ => Box::new(preprocess::WaveformProcessor::from_config(config)?),
    })
}

fn preprocessor_config(configs: &BTreeMap<String, Value>) -> Result<&Value, SessionError> {
    configs.get("preprocessor_config.json").ok_or_else(|| {
        let reason = "the file is missing; the repository of a checkpoint has it beside config.json".to_owned();
        SessionError::Preprocessor { field: ".".to_owned(), reason }
    })
}

/// The kinds of raw inputs that `family` takes; none for a family that is not one of [`FAMILIES`].
pub fn raw_inputs(family: &str) -> &'static [&'static str] {
    match family {
        // its classes speak or listen
        "speecht5" => &["text", "audio"],
        family if FAMILIES.contains(&family) => &["audio"],
        _ => &[],
    }
}

/// What people use the checkpoint of `spec` for, with the raw inputs that they gave.
///
/// # Errors
/// Inputs that the family has no use for, or files of the checkpoint that are missing or malformed.
pub fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    match FAMILIES.contains(&spec.family.as_str()) {
        true => tasks::task(spec, weights, raw),
        false => Err(unknown_family(&spec.family)),
    }
}

fn unknown_family(family: &str) -> SessionError {
    let reason = format!("is no speech family here; supported: {}", FAMILIES.join(", "));
    SessionError::UnsupportedEngine { family: family.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_families_are_refused_with_the_list() {
        let message = |family: &str| processor(family, &BTreeMap::new()).err().map(|error| error.to_string());
        let unknown = format!("bert: is no speech family here; supported: {}", FAMILIES.join(", "));
        assert_eq!(message("bert"), Some(unknown));
        for family in FAMILIES {
            assert!(!classes(family).is_empty());
            assert!(
                message(family).is_some_and(|m| m.starts_with("preprocessor_config.json: `.`: the file is missing"))
            );
        }
    }
}
