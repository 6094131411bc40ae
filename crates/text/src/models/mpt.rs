//! MPT decoder: ALiBi, no biases, normalisation before each half of a layer.
//! Source: MosaicML's MPT-7B (llm-foundry). Mirrors `transformers.MptForCausalLM`.

use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::relative_bias::Alibi;
use serde::Deserialize;
use serde_json::Value;

use super::layer_norm_decoder::{self as decoder, Layer, LayerNormDecoder, MlpNorm, Positions, Sizes};

/// The classes that run.
pub const CLASSES: &[&str] = &["MptForCausalLM"];

const RULES: &[AliasRule] = &[AliasRule::rename(r"^lm_head\.weight$", "transformer.wte.weight", AliasScope::Always)];

/// What the class multiplies its width by inside the feed-forward half, whatever `expansion_ratio` says.
const EXPANSION: usize = 4;

/// The exponent of the last slope of ALiBi, whatever `alibi_bias_max` says.
const ALIBI_BIAS_MAX: f32 = 8.0;

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    decoder::aliases(spec, RULES)
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
///
/// As in the class, `expansion_ratio`, `no_bias`, `alibi_bias_max`, `logit_scale` and `learned_pos_emb` change
/// nothing. A checkpoint with biases or another width has tensors that the model does not ask for or finds misshapen.
#[derive(Debug, Clone, Deserialize)]
pub struct MptConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub d_model: usize,
    /// Layers.
    pub n_layers: usize,
    /// Attention heads; they divide `d_model`.
    pub n_heads: usize,
    /// Longest sequence.
    #[serde(default = "defaults::max_seq_len")]
    pub max_seq_len: usize,
    /// Added to the variance in every normalisation.
    #[serde(default = "defaults::layer_norm_epsilon")]
    pub layer_norm_epsilon: f64,
    /// The output matrix is that of the embeddings; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub tie_word_embeddings: bool,
    /// About attention.
    pub attn_config: Option<AttnConfig>,
}

/// `attn_config`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct AttnConfig {
    /// Largest magnitude of queries, keys and values; none where absent or 0.
    pub clip_qkv: Option<f64>,
    /// Factor on the scores; one over the root of a head's width where absent.
    pub softmax_scale: Option<f64>,
}

/// What `transformers.MptConfig` takes for fields that a file leaves out.
mod defaults {
    pub(super) fn max_seq_len() -> usize {
        2048
    }
    pub(super) fn layer_norm_epsilon() -> f64 {
        1e-5
    }
    pub(super) fn yes() -> bool {
        true
    }
}

impl MptConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, not supported, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("d_model", cfg.d_model),
            ("n_layers", cfg.n_layers),
            ("n_heads", cfg.n_heads),
            ("max_seq_len", cfg.max_seq_len),
        ])?;
        config::multiple(("d_model", cfg.d_model), ("n_heads", cfg.n_heads))?;
        config::not_negative(&[
            ("layer_norm_epsilon", cfg.layer_norm_epsilon),
            ("attn_config.clip_qkv", cfg.attn_config.as_ref().and_then(|attn| attn.clip_qkv).unwrap_or(0.0)),
        ])?;
        config::refuse_unless(spec, "norm_type", &["low_precision_layernorm".into(), "layernorm".into()])?;
        // other models than the class's, some of them with the same tensors
        let attn = spec.config.get("attn_config");
        for (field, supported) in [
            ("attn_type", Value::from("multihead_attention")),
            ("alibi", true.into()),
            ("prefix_lm", false.into()),
            ("qk_ln", false.into()),
        ] {
            match attn.and_then(|attn| attn.get(field)) {
                Some(value) if !value.is_null() && *value != supported => {
                    return Err(config::unsupported(spec, &format!("attn_config.{field}"), value, &[supported]));
                }
                _ => {}
            }
        }
        Ok(cfg)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab: self.vocab_size,
            hidden: self.d_model,
            inner: EXPANSION * self.d_model,
            layers: self.n_layers,
            heads: self.n_heads,
            kv_heads: self.n_heads,
            norms: 2,
            bias: false,
            rotary: 0,
            learned_positions: false,
            max_positions: Some(self.max_seq_len), // beyond them the class has no bias
        }
    }

    fn norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::new(&vb.get(self.d_model, "weight")?, None, self.layer_norm_epsilon)
    }

    fn layer(&self, vb: VarBuilder) -> Result<Layer> {
        let hidden = self.d_model;
        let AttnConfig { clip_qkv, softmax_scale } = self.attn_config.clone().unwrap_or_default();
        let attn = vb.pp("attn");
        let names = ["up_proj", "down_proj"];
        Ok(Layer {
            attention_norm: self.norm(vb.pp("norm_1"))?,
            qkv: Linear::load(hidden, 3 * hidden, false, attn.pp("Wqkv"))?,
            clip: clip_qkv.filter(|limit| *limit != 0.0).map(|limit| limit as f32),
            attention: Attention {
                heads: self.n_heads,
                kv_heads: self.n_heads,
                head_dim: hidden / self.n_heads,
                scale: softmax_scale.map(|scale| scale as f32),
                pattern: Pattern::Causal,
            },
            output: Linear::load(hidden, hidden, false, attn.pp("out_proj"))?,
            mlp_norm: MlpNorm::After(self.norm(vb.pp("norm_2"))?),
            mlp: Mlp::load([hidden, EXPANSION * hidden], Activation::Gelu, false, names, vb.pp("ffn"))?,
        })
    }
}

/// Loads `MptForCausalLM`.
///
/// # Errors
/// As for [`MptConfig::from_spec`], and when a tensor is missing or has another shape.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<LayerNormDecoder, SessionError> {
    let cfg = MptConfig::from_spec(spec)?;
    let (sizes, model) = (cfg.sizes(), vb.pp("transformer"));
    let (embeddings, lm_head) =
        decoder::vocabulary(&sizes, cfg.tie_word_embeddings, model.pp("wte"), vb.pp("lm_head"))?;
    let layer = |i: usize| cfg.layer(model.pp("blocks").pp(i));
    Ok(LayerNormDecoder {
        sizes,
        embeddings,
        positions: Positions::Alibi(Alibi::mpt(cfg.n_heads, ALIBI_BIAS_MAX)),
        layers: (0..cfg.n_layers).map(layer).collect::<Result<_>>()?,
        norm: cfg.norm(model.pp("norm_f"))?,
        lm_head,
        weight_bytes: vb.dtype().size_in_bytes() as u64,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use decoder::tests::{flops_over_parameters, spec};

    /// MPT-7B but for the changes.
    fn config(changes: &[(&str, Value)]) -> Result<MptConfig, SessionError> {
        let sizes = json!({"vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32});
        MptConfig::from_spec(&spec("mpt", &sizes, changes))
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = config(&[("attn_config", Value::Null)]).unwrap();
        assert_eq!((cfg.max_seq_len, cfg.layer_norm_epsilon, cfg.tie_word_embeddings), (2048, 1e-5, true));
        assert!(cfg.attn_config.is_none());
        let attn = config(&[("attn_config", json!({"clip_qkv": 6, "softmax_scale": 0.3}))]).unwrap().attn_config;
        let attn = attn.unwrap();
        assert_eq!((attn.clip_qkv, attn.softmax_scale), (Some(6.0), Some(0.3)));
    }

    #[test]
    fn what_the_class_leaves_unread_changes_nothing() {
        let sizes = config(&[]).unwrap().sizes();
        for (field, value) in [("expansion_ratio", json!(2)), ("no_bias", json!(false)), ("logit_scale", json!(0.5))] {
            assert_eq!(config(&[(field, value)]).unwrap().sizes(), sizes, "{field}");
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let message = |field: &str, value: Value| config(&[(field, value)]).err().map(|e| e.to_string());
        assert!(message("n_heads", json!(30)).unwrap().contains("`d_model`: 4096 is not a multiple of n_heads, 30"));
        assert!(message("norm_type", json!("rmsnorm")).unwrap().contains("`norm_type` = \"rmsnorm\""));
        assert!(message("norm_type", json!("layernorm")).is_none());
        for (field, value) in
            [("attn_type", json!("multiquery_attention")), ("alibi", json!(false)), ("qk_ln", json!(true))]
        {
            let message = message("attn_config", json!({field: value})).unwrap();
            assert!(message.contains(&format!("`attn_config.{field}` = {value}")), "{message}");
        }
        let negative = message("attn_config", json!({"clip_qkv": -1.0})).unwrap();
        assert!(negative.contains("`attn_config.clip_qkv`: -1 is not a number of 0 or more"), "{negative}");
    }

    #[test]
    fn an_output_matrix_of_its_own_keeps_its_name() {
        let rules = |tied: bool| aliases(&spec("mpt", &json!({"tie_word_embeddings": tied}), &[])).len();
        assert_eq!((rules(true), rules(false)), (1, 0));
    }

    #[test]
    fn cost_of_a_published_size() {
        let ratio = flops_over_parameters(&config(&[]).unwrap().sizes(), 6_649_286_656);
        assert!((ratio - 1.).abs() < 1e-3, "{ratio}");
    }
}
