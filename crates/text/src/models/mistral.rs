//! Mistral decoder: Llama's layers, each of whose tokens sees a window of the last ones.
//! Source: Mistral 7B (arXiv:2310.06825). Mirrors `transformers.MistralForCausalLM`.

use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::session::{ModelSpec, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};

use super::llama::{LlamaConfig, LlamaModel};

/// The classes that run.
pub const CLASSES: &[&str] = &["MistralForCausalLM"];

/// How published checkpoints name the tensors.
pub const ALIASES: &[AliasRule] = &[
    // a buffer in early checkpoints, which follows from the config
    AliasRule::drop(r"\.rotary_emb\.inv_freq$", AliasScope::Always),
    // of consolidated.safetensors, which is for another implementation and pairs other elements of a head
    AliasRule::drop(r"^layers\.\d+\.(attention|feed_forward)\.", AliasScope::Always),
];

/// Reads and checks config.json.
///
/// # Errors
/// Names the field that is missing, malformed, contradicts another, or is not supported.
pub fn config(spec: &ModelSpec) -> Result<LlamaConfig, SessionError> {
    let spec = config::with_defaults(
        spec,
        &[
            ("vocab_size", 32_000.into()),
            ("hidden_size", 4096.into()),
            ("intermediate_size", 14_336.into()),
            ("num_hidden_layers", 32.into()),
            ("num_attention_heads", 32.into()),
            ("num_key_value_heads", 8.into()),
            ("max_position_embeddings", (4096 * 32).into()),
            ("sliding_window", 4096.into()),
        ],
    );
    // Llama's, which this class has not
    config::refuse_unless(&spec, "attention_bias", &[false.into()])?;
    config::refuse_unless(&spec, "mlp_bias", &[false.into()])?;
    LlamaConfig::from_spec(&spec)?.with_window(&spec)
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
    use serde_json::{Value, json};

    use super::super::llama::forward_cost;
    use super::*;
    use crate::causal::Pass;

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("mistral", "MistralForCausalLM", config)
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = config(&spec(json!({}))).unwrap();
        assert_eq!((cfg.hidden_size, cfg.kv_heads(), cfg.head_dim(), cfg.window), (4096, 8, 128, Some(4096)));
        assert_eq!((cfg.max_position_embeddings, cfg.rms_norm_eps, cfg.rope.theta), (131_072, 1e-6, 10_000.));
        let nulls = json!({"sliding_window": null, "num_key_value_heads": null, "head_dim": null});
        let cfg = config(&spec(nulls)).unwrap();
        assert_eq!((cfg.kv_heads(), cfg.head_dim(), cfg.window), (32, 128, None));
        let rope = json!({"rope_theta": 1e6, "rope_type": "default"});
        let cfg = config(&spec(json!({"rope_parameters": rope, "head_dim": 16}))).unwrap();
        assert_eq!((cfg.rope.theta, cfg.head_dim()), (1e6, 16));
    }

    #[test]
    fn what_the_class_has_not_is_refused_by_name() {
        let message = |fields: Value| config(&spec(fields)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(json!({"attention_bias": true})).contains("`attention_bias` = true is not supported"));
        assert!(message(json!({"mlp_bias": true})).contains("`mlp_bias` = true is not supported"));
        assert!(message(json!({"sliding_window": 0})).contains("`sliding_window`: 0 is not in"));
        assert!(message(json!({"sliding_window": -1})).contains("`sliding_window`"));
        let mixed = json!({"layer_types": ["sliding_attention", "full_attention"]});
        assert!(message(mixed).contains("`layer_types` = \"full_attention\" is not supported for mistral"));
        assert_eq!(message(json!({"layer_types": ["full_attention"], "sliding_window": null})), "");
    }

    /// Mistral-7B: 2 FLOPs per parameter but the embeddings and token, and attention over no more than the window.
    #[test]
    fn cost_of_a_published_size() {
        let cfg = config(&spec(json!({}))).unwrap();
        let step = |cached| forward_cost(&cfg, Pass { batch: 1, seq: 1, cached, logits: 1 }, 2);
        let parameters = 7_241_732_096. - 32000. * 4096.;
        assert!((step(0).flops as f64 / (2. * parameters) - 1.).abs() < 1e-3, "{:e}", step(0).flops as f64);
        assert_eq!(step(4095), step(9000));
        assert_eq!(step(4095).kv_bytes, 2 * 2 * 4095 * 32 * 8 * 128);
        assert!(step(4094).flops < step(4095).flops);
    }
}
