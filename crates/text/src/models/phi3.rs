//! Phi-3 decoder: Llama's layers with query, key and value stored as one tensor, and gate and up as another; rotary
//! positions on part of a head, stretched beyond the length of pre-training; a sliding window.
//! Source: Phi-3 (arXiv:2404.14219), LongRoPE (arXiv:2402.13753). Mirrors `transformers.Phi3ForCausalLM`.

use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::session::{ModelSpec, SessionError};
use roofbench_nn::rope::Scaling;

use super::llama::{LlamaConfig, LlamaModel};

/// Reads and checks config.json.
///
/// # Errors
/// Names the field that is missing, malformed, contradicts another, or is not supported.
pub fn config(spec: &ModelSpec) -> Result<LlamaConfig, SessionError> {
    let mut spec = config::with_defaults(
        spec,
        &[
            ("vocab_size", 32_064.into()),
            ("hidden_size", 3072.into()),
            ("intermediate_size", 8192.into()),
            ("num_hidden_layers", 32.into()),
            ("num_attention_heads", 32.into()),
            ("max_position_embeddings", 4096.into()),
            // comes before one in `rope_scaling`, as the library has it
            ("original_max_position_embeddings", 4096.into()),
            ("rms_norm_eps", 1e-5.into()),
        ],
    );
    // Llama's, which this class has not
    config::refuse_unless(&spec, "attention_bias", &[false.into()])?;
    config::refuse_unless(&spec, "mlp_bias", &[false.into()])?;
    for form in ["rope_scaling", "rope_parameters"] {
        for name in ["rope_type", "type"] {
            match spec.config.get(form).and_then(|rope| rope.get(name)) {
                None => {}
                Some(kind) if ["default", "longrope"].iter().any(|known| kind == known) => {}
                // what early checkpoints call it
                Some(kind) if ["su", "yarn"].iter().any(|known| kind == known) => {
                    spec.config[form][name] = "longrope".into();
                }
                Some(kind) => {
                    let field = format!("{form}.{name}");
                    return Err(config::unsupported(&spec, &field, kind, &["default".into(), "longrope".into()]));
                }
            }
        }
    }
    let mut cfg = LlamaConfig::from_spec(&spec)?.with_window(&spec)?;
    cfg.fused = true;
    if let Scaling::LongRope { .. } = cfg.rope.scaling {
        cfg.starts_over = cfg.rope.original_max_position_embeddings;
    }
    Ok(cfg)
}

/// Loads the model of `spec` from a checkpoint's root.
///
/// # Errors
/// As for [`config`], and when a tensor is missing or has another shape.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<LlamaModel, SessionError> {
    LlamaModel::with_config(config(spec)?, vb)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use roofbench_core::session::{Call, Session, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use roofbench_nn::cost;
    use serde_json::{Value, json};

    use super::super::llama::forward_cost;
    use super::*;
    use crate::causal::{CausalSession, Pass};

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("phi", "Phi3ForCausalLM", config)
    }

    /// Heads of 8, of which half are turned; pre-trained on 6 positions.
    fn long(kind: &str) -> ModelSpec {
        let rope = json!({"type": kind, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]});
        spec(json!({
            "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 32, "original_max_position_embeddings": 6, "partial_rotary_factor": 0.5,
            "rope_scaling": rope,
        }))
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = config(&spec(json!({}))).unwrap();
        assert_eq!((cfg.vocab_size, cfg.hidden_size, cfg.kv_heads(), cfg.head_dim()), (32_064, 3072, 32, 96));
        assert_eq!((cfg.window, cfg.rms_norm_eps, cfg.starts_over, cfg.fused), (None, 1e-5, None, true));
        for kind in ["longrope", "su", "yarn"] {
            assert_eq!(config(&long(kind)).unwrap().starts_over, Some(6), "{kind}");
        }
        let mut inside = long("longrope");
        inside.config.as_object_mut().unwrap().remove("original_max_position_embeddings");
        inside.config["rope_scaling"]["original_max_position_embeddings"] = 6.into();
        assert_eq!(config(&inside).unwrap().starts_over, Some(4096));
    }

    #[test]
    fn what_the_class_has_not_is_refused_by_name() {
        let message = |spec: ModelSpec| config(&spec).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(spec(json!({"attention_bias": true}))).contains("`attention_bias` = true is not supported"));
        let error = message(long("linear"));
        assert!(error.contains("`rope_scaling.type` = \"linear\"") && error.contains("default, longrope"), "{error}");
        let mut odd = long("longrope");
        odd.config["rope_scaling"]["long_factor"] = json!([1.0]);
        let error = LlamaModel::with_config(config(&odd).unwrap(), nothing()).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains("long_factor")), "{error:?}");
    }

    fn nothing() -> VarBuilder<'static> {
        VarBuilder::zeros(DType::F32, &Device::Cpu)
    }

    /// A step past the length of pre-training turns every token by the long factors: generation runs them again, and
    /// gives what a pass over all tokens so far gives, padded or not.
    #[test]
    fn generation_starts_over_past_the_original_length() {
        let spec = long("longrope");
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], &spec.class, &HubOptions::from_env()).unwrap();
        let model = load(&spec, weights.var_builder(DType::F32, &Device::Cpu)).unwrap();
        let mut session = CausalSession::new(model, &spec);
        let prompt = Tensor::new(&[[3i64, 7, 11, 5]], &Device::Cpu).unwrap();
        let arguments = json!({"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": true});
        let call = Call {
            method: "generate".into(),
            inputs: [("input_ids".to_owned(), prompt)].into(),
            arguments: arguments.as_object().unwrap().clone(),
        };
        let (made, recorded) = cost::record(|| session.call(&call, &mut Unobserved).unwrap());
        let formula: u64 = session.cost(&call).unwrap().iter().map(|phase| phase.cost.flops).sum();
        assert_eq!(formula, recorded.flops);
        for step in 0..5 {
            let ids = made["sequences"].narrow(1, 0, 4 + step).unwrap();
            let forward =
                Call { method: "forward".into(), inputs: [("input_ids".to_owned(), ids)].into(), ..Call::default() };
            let whole = session.call(&forward, &mut Unobserved).unwrap();
            let last = |x: &Tensor, at| x.narrow(1, at, 1).unwrap().flatten_all().unwrap();
            let difference = (last(&made["logits"], step) - last(&whole["logits"], 3 + step)).unwrap();
            let difference = difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 1e-5, "step {step}: {difference}");
        }

        // its length counts the padding, which turns nothing yet
        let padded = Tensor::new(&[[0i64, 3, 7, 11, 5]], &Device::Cpu).unwrap();
        let mask = Tensor::new(&[[0i64, 1, 1, 1, 1]], &Device::Cpu).unwrap();
        let inputs = [("input_ids".to_owned(), padded), ("attention_mask".to_owned(), mask)].into();
        let padded = session.call(&Call { inputs, ..call }, &mut Unobserved).unwrap();
        let steps = |x: &Tensor| x.narrow(1, 0, 3).unwrap().flatten_all().unwrap();
        let difference = (steps(&padded["logits"]) - steps(&made["logits"])).unwrap().abs().unwrap();
        assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
    }

    /// Phi-3-mini: 2 FLOPs per parameter but the embeddings and token, and attention.
    #[test]
    fn cost_of_a_published_size() {
        let cfg = config(&spec(json!({}))).unwrap();
        let flops = forward_cost(&cfg, Pass { batch: 1, seq: 1, cached: 0, logits: 1 }, 2).flops as f64;
        let parameters = 3_821_079_552. - 32064. * 3072.;
        assert!((flops / (2. * parameters) - 1.).abs() < 1e-3, "{flops:e}");
    }
}
