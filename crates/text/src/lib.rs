//! Text model families on candle with fused CPU kernels: tokenisation, models, and what people do with their outputs.
//!
//! This crate deliberately does not know how it is measured: no clock, no meter, no record; and it opens no file of
//! weights itself. It is complete alone: what a caller needs of roofbench's other crates is re-exported here.
//!
//! ```
//! use roofbench_text::candle_core::{Device, Tensor};
//! use roofbench_text::serde_json::json;
//! use roofbench_text::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};
//!
//! // config.json of a tiny BERT; a real one comes from `weights.config()`
//! let config = json!({
//!     "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
//!     "intermediate_size": 16, "max_position_embeddings": 16, "type_vocab_size": 2, "num_labels": 3,
//! });
//! let spec = ModelSpec::new("bert", "BertForSequenceClassification", config);
//! // `Source::Local` opens a checkpoint folder, `Source::Hub` a repository
//! let source = Source::Synthetic { seed: 0 };
//! let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::default())?;
//! let mut session = load(&spec, &weights)?;
//!
//! let input_ids = Tensor::new(&[[2i64, 17, 5, 3]], &Device::Cpu)?;
//! let call = Call { method: "forward".into(), inputs: [("input_ids".into(), input_ids)].into(), ..Default::default() };
//! let outputs = session.call(&call, &mut Unobserved)?;
//! assert_eq!(outputs["logits"].dims(), [1, 3]);
//!
//! let flops: u64 = session.cost(&call)?.iter().map(|phase| phase.cost.flops).sum();
//! assert_eq!(flops, 11_619);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

pub mod causal;
pub mod models;
pub mod seq2seq;
pub mod tasks;
pub mod tokenize;

pub use candle_core;
use roofbench_core::config;
pub use roofbench_core::cost::{Cost, Outline, PhaseCost};
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{Model, Optimization, Plan};
pub use roofbench_core::session::{
    Arguments, Call, Engine, ModelSpec, Observer, Phase, Session, SessionError, Tensors, Unobserved,
};
pub use roofbench_core::task::{Answer, RawInputs, Task};
pub use roofbench_core::weights::{AliasRule, HubOptions, Source, Weights, WeightsError};
pub use roofbench_core::{hardware, optimize};
pub use roofbench_nn::options;
pub use serde_json;

use causal::{CausalLm, CausalSession};
use models::{bart, bert, falcon, gpt2, llama, mistral, mpt, phi, phi3, t5, upstream};
use seq2seq::{Seq2SeqLm, Seq2SeqSession};

/// The families that run.
pub const FAMILIES: &[&str] = &["bert", "gpt2", "t5", "bart", "llama", "mistral", "falcon", "mpt", "phi"];

/// The `transformers` classes of `family` that run; none for a family that is not one of [`FAMILIES`].
pub fn classes(family: &str) -> &'static [&'static str] {
    match family {
        "bart" => bart::CLASSES,
        "bert" => bert::CLASSES,
        "gpt2" => gpt2::CLASSES,
        "llama" => llama::CLASSES,
        "falcon" => falcon::CLASSES,
        "mpt" => mpt::CLASSES,
        "t5" => t5::CLASSES,
        "mistral" => mistral::CLASSES,
        "phi" => phi::CLASSES,
        _ => &[],
    }
}

/// The hardware-aware optimisations of `family`; none for a family that is not one of [`FAMILIES`].
pub fn optimizations(family: &str) -> &'static [&'static Optimization] {
    if FAMILIES.contains(&family) { optimize::COMMON } else { &[] }
}

/// What to do for `model` on `machine`, by the rules of [`optimizations`], each with its reason.
///
/// ```
/// use roofbench_text::optimize::Model;
/// use roofbench_text::options;
/// use roofbench_text::{ModelSpec, apply_hardware_optimizations, hardware};
///
/// let spec = ModelSpec::new("bert", "BertModel", Default::default());
/// let model = Model { spec: &spec, weight_bytes: Some(438_000_000), threads: 1, generates: false };
/// let plan = apply_hardware_optimizations(&hardware::probe(), &model);
/// assert!(plan.is_on("packed-weights"));
/// let plan = plan.switched(&["-fused-attention".parse()?], &spec.family)?;
///
/// // what this thread loads and calls from here on follows the plan
/// options::set(plan.choices().collect());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn apply_hardware_optimizations(machine: &Machine, model: &Model) -> Plan {
    Plan::decide(optimizations(&model.spec.family), machine, model)
}

/// How published checkpoints of `spec` name the tensors that [`load`] asks for, for [`Weights::open`].
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.family.as_str() {
        "bart" => bart::aliases(spec),
        "bert" => bert::aliases(spec),
        "gpt2" => gpt2::aliases(spec),
        "llama" => llama::ALIASES,
        "falcon" => falcon::aliases(spec),
        "mpt" => mpt::aliases(spec),
        "t5" => t5::aliases(spec),
        "mistral" => mistral::ALIASES,
        "phi" => phi::ALIASES,
        _ => &[],
    }
}

/// Builds the model of `spec` from `weights`.
///
/// # Errors
/// Names the family, class, engine, field of config.json or tensor that is missing or not supported.
pub fn load(spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
    let vb = weights.var_builder(spec.dtype, &spec.device);
    if !classes(&spec.family).is_empty() && !classes(&spec.family).contains(&spec.class.as_str()) {
        return Err(config::unsupported_class(spec, classes(&spec.family)));
    }
    match (spec.family.as_str(), spec.engine) {
        ("bart", Engine::Roofbench) => seq2seq(bart::BartModel::load(spec, vb)?, spec),
        ("bert", Engine::Roofbench) => Ok(Box::new(bert::BertModel::load(spec, vb)?)),
        ("bert", Engine::CandleTransformers) => Ok(Box::new(upstream::Bert::load(spec, vb)?)),
        ("gpt2", Engine::Roofbench) => causal(gpt2::load(spec, vb)?, spec),
        ("llama", Engine::Roofbench) => causal(llama::LlamaModel::load(spec, vb)?, spec),
        ("falcon", Engine::Roofbench) => causal(falcon::load(spec, vb)?, spec),
        ("falcon", Engine::CandleTransformers) => Ok(Box::new(upstream::Falcon::load(spec, vb)?)),
        ("mpt", Engine::Roofbench) => causal(mpt::load(spec, vb)?, spec),
        ("mpt", Engine::CandleTransformers) => Err(SessionError::UnsupportedEngine {
            family: spec.family.clone(),
            reason: "candle-transformers has it in the size of replit-code-v1_5-3b alone; use --engine roofbench"
                .to_owned(),
        }),
        ("t5", Engine::Roofbench) if spec.class == "T5EncoderModel" => {
            Ok(Box::new(t5::T5EncoderModel::load(spec, vb)?))
        }
        ("t5", Engine::Roofbench) => seq2seq(t5::T5Model::load(spec, vb)?, spec),
        ("t5", Engine::CandleTransformers) => Ok(Box::new(upstream::T5::load(spec, vb)?)),
        ("mistral", Engine::Roofbench) => causal(mistral::load(spec, vb)?, spec),
        ("phi", Engine::Roofbench) if spec.class == "Phi3ForCausalLM" => causal(phi3::load(spec, vb)?, spec),
        ("phi", Engine::Roofbench) => causal(phi::PhiModel::load(spec, vb)?, spec),
        ("llama" | "mistral" | "phi", Engine::CandleTransformers) => Ok(Box::new(upstream::Decoder::load(spec, vb)?)),
        (family, Engine::CandleTransformers) if FAMILIES.contains(&family) => Err(SessionError::UnsupportedEngine {
            family: family.to_string(),
            reason: "candle-transformers is not wrapped for it; use --engine roofbench".to_owned(),
        }),
        (family, _) => Err(SessionError::UnsupportedEngine {
            family: family.to_string(),
            reason: format!("is no text family here; supported: {}", FAMILIES.join(", ")),
        }),
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

/// The kinds of raw inputs that `family` takes; none for a family that is not one of [`FAMILIES`].
pub fn raw_inputs(family: &str) -> &'static [&'static str] {
    if FAMILIES.contains(&family) { &["text"] } else { &[] }
}

/// What people use the checkpoint of `spec` for, with the texts that they gave: see [`tasks`].
///
/// # Errors
/// Other inputs than texts, or no tokenizer.json beside `weights`.
pub fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    tasks::task(spec, weights, raw)
}

/// A decoder-only model behind the calls of its class.
fn causal<M: CausalLm + 'static>(model: M, spec: &ModelSpec) -> Result<Box<dyn Session>, SessionError> {
    Ok(Box::new(CausalSession::new(model, spec)))
}

/// An encoder-decoder model behind the calls of its class.
fn seq2seq<M: Seq2SeqLm + 'static>(model: M, spec: &ModelSpec) -> Result<Box<dyn Session>, SessionError> {
    Ok(Box::new(Seq2SeqSession::new(model, spec)))
}
