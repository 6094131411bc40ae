//! GPT-2 decoder: learned positions, normalisation before each half of a layer.
//! Source: Language Models are Unsupervised Multitask Learners (Radford et al. 2019). Mirrors
//! `transformers.GPT2LMHeadModel`.

use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;

use super::layer_norm_decoder::{self as decoder, Layer, LayerNormDecoder, MlpNorm, Positions, Sizes};

/// The classes that run.
pub const CLASSES: &[&str] = &["GPT2LMHeadModel"];

const RULES: &[AliasRule] = &[
    // causal masks, which follow from the config
    AliasRule::drop(r"\.attn\.(bias|masked_bias)$", AliasScope::Always),
    // OpenAI's checkpoints were saved from the base model
    AliasRule::rename(r"^(wte|wpe|h|ln_f)\.", "transformer.$1.", AliasScope::Always),
    AliasRule::rename(r"^lm_head\.weight$", "transformer.wte.weight", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    decoder::aliases(spec, RULES)
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
///
/// `reorder_and_upcast_attn` is about half precision, in which scores are f32 here anyway.
#[derive(Debug, Clone, Deserialize)]
pub struct Gpt2Config {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Longest sequence.
    pub n_positions: usize,
    /// Width of the stream.
    pub n_embd: usize,
    /// Layers.
    pub n_layer: usize,
    /// Attention heads; they divide `n_embd`.
    pub n_head: usize,
    /// Width inside the feed-forward half; `4 * n_embd` where absent.
    pub n_inner: Option<usize>,
    /// Activation of the feed-forward half.
    #[serde(default = "defaults::activation_function")]
    pub activation_function: Activation,
    /// Added to the variance in every normalisation.
    #[serde(default = "defaults::layer_norm_epsilon")]
    pub layer_norm_epsilon: f64,
    /// Scores are divided by the root of a head's width; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub scale_attn_weights: bool,
    /// Scores of the n-th layer are divided by n.
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
    /// The output matrix is that of the embeddings; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub tie_word_embeddings: bool,
}

/// What `transformers.GPT2Config` takes for fields that a file leaves out.
mod defaults {
    use roofbench_nn::activation::Activation;

    pub(super) fn activation_function() -> Activation {
        Activation::GeluTanh
    }
    pub(super) fn layer_norm_epsilon() -> f64 {
        1e-5
    }
    pub(super) fn yes() -> bool {
        true
    }
}

impl Gpt2Config {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, not supported, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("n_positions", cfg.n_positions),
            ("n_embd", cfg.n_embd),
            ("n_layer", cfg.n_layer),
            ("n_head", cfg.n_head),
            ("n_inner", cfg.inner()),
        ])?;
        config::multiple(("n_embd", cfg.n_embd), ("n_head", cfg.n_head))?;
        config::not_negative(&[("layer_norm_epsilon", cfg.layer_norm_epsilon)])?;
        config::refuse_unless(spec, "add_cross_attention", &[false.into()])?;
        Ok(cfg)
    }

    fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab: self.vocab_size,
            hidden: self.n_embd,
            inner: self.inner(),
            layers: self.n_layer,
            heads: self.n_head,
            kv_heads: self.n_head,
            norms: 2,
            bias: true,
            rotary: 0,
            learned_positions: true,
            max_positions: Some(self.n_positions),
        }
    }

    fn attention(&self, layer: usize) -> Attention {
        let head_dim = self.n_embd / self.n_head;
        let scale = if self.scale_attn_weights { (head_dim as f64).powf(-0.5) } else { 1.0 };
        let divisor = if self.scale_attn_by_inverse_layer_idx { layer + 1 } else { 1 };
        Attention {
            heads: self.n_head,
            kv_heads: self.n_head,
            head_dim,
            scale: Some((scale / divisor as f64) as f32),
            pattern: Pattern::Causal,
        }
    }

    fn layer(&self, layer: usize, vb: VarBuilder) -> Result<Layer> {
        let (hidden, inner) = (self.n_embd, self.inner());
        let norm = |name: &str| LayerNorm::load(hidden, self.layer_norm_epsilon, vb.pp(name));
        let (attn, mlp) = (vb.pp("attn"), vb.pp("mlp"));
        let (c_fc, c_proj) = (conv1d(hidden, inner, mlp.pp("c_fc"))?, conv1d(inner, hidden, mlp.pp("c_proj"))?);
        Ok(Layer {
            attention_norm: norm("ln_1")?,
            qkv: conv1d(hidden, 3 * hidden, attn.pp("c_attn"))?,
            clip: None,
            attention: self.attention(layer),
            output: conv1d(hidden, hidden, attn.pp("c_proj"))?,
            mlp_norm: MlpNorm::After(norm("ln_2")?),
            mlp: Mlp::new(c_fc, self.activation_function, c_proj)?,
        })
    }
}

/// A dense layer whose weight is (in, out). Mirrors `transformers.pytorch_utils.Conv1D`.
fn conv1d(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    Linear::new(&vb.get((in_dim, out_dim), "weight")?.t()?, Some(&vb.get(out_dim, "bias")?))
}

/// Loads `GPT2LMHeadModel`.
///
/// # Errors
/// As for [`Gpt2Config::from_spec`], and when a tensor is missing or has another shape.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<LayerNormDecoder, SessionError> {
    let cfg = Gpt2Config::from_spec(spec)?;
    let (sizes, model) = (cfg.sizes(), vb.pp("transformer"));
    let (embeddings, lm_head) =
        decoder::vocabulary(&sizes, cfg.tie_word_embeddings, model.pp("wte"), vb.pp("lm_head"))?;
    let layer = |i: usize| cfg.layer(i, model.pp("h").pp(i));
    Ok(LayerNormDecoder {
        sizes,
        embeddings,
        positions: Positions::Learned(Embedding::load(cfg.n_positions, cfg.n_embd, model.pp("wpe"))?),
        layers: (0..cfg.n_layer).map(layer).collect::<Result<_>>()?,
        norm: LayerNorm::load(cfg.n_embd, cfg.layer_norm_epsilon, model.pp("ln_f"))?,
        lm_head,
        weight_bytes: vb.dtype().size_in_bytes() as u64,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use decoder::tests::{flops_over_parameters, spec};

    fn config(changes: &[(&str, Value)]) -> Result<Gpt2Config, SessionError> {
        let sizes = json!({"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12});
        Gpt2Config::from_spec(&spec("gpt2", &sizes, changes))
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = config(&[("n_inner", Value::Null)]).unwrap();
        assert_eq!((cfg.inner(), cfg.activation_function, cfg.layer_norm_epsilon), (3072, Activation::GeluTanh, 1e-5));
        assert!(cfg.tie_word_embeddings && cfg.scale_attn_weights && !cfg.scale_attn_by_inverse_layer_idx);
        assert_eq!(cfg.attention(3).scale, Some(0.125));
    }

    #[test]
    fn scales_of_the_layers() {
        let by_layer = ("scale_attn_by_inverse_layer_idx", json!(true));
        assert_eq!(config(std::slice::from_ref(&by_layer)).unwrap().attention(3).scale, Some(0.03125));
        let unscaled = [by_layer, ("scale_attn_weights", json!(false))];
        assert_eq!(config(&unscaled).unwrap().attention(3).scale, Some(0.25));
        assert_eq!(config(&unscaled[1..]).unwrap().attention(3).scale, Some(1.0));
    }

    #[test]
    fn refusals_name_the_field() {
        let message = |field: &str, value: Value| config(&[(field, value)]).err().map(|e| e.to_string());
        assert!(message("n_head", json!(7)).unwrap().contains("`n_embd`: 768 is not a multiple of n_head, 7"));
        assert!(message("n_inner", json!(0)).unwrap().contains("`n_inner`: 0 is not in"));
        assert!(message("activation_function", json!("maxout")).unwrap().contains("`activation_function`"));
        assert!(message("add_cross_attention", json!(true)).unwrap().contains("`add_cross_attention` = true"));
    }

    #[test]
    fn an_output_matrix_of_its_own_keeps_its_name() {
        let rules = |tied: bool| aliases(&spec("gpt2", &json!({"tie_word_embeddings": tied}), &[])).len();
        assert_eq!((rules(true), rules(false)), (3, 2));
    }

    #[test]
    fn cost_of_a_published_size() {
        let ratio = flops_over_parameters(&config(&[]).unwrap().sizes(), 124_439_808 - 1024 * 768);
        assert!((ratio - 1.).abs() < 2e-3, "{ratio}");
    }
}
