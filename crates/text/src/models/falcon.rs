//! Falcon decoder: attention and feed-forward in parallel or one after the other, keys and values of one head, of
//! some or of all, rotary positions or ALiBi.
//! Source: The Falcon Series of Open Language Models (arXiv:2311.16867). Mirrors `transformers.FalconForCausalLM`.

use candle_core::Tensor;
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
use roofbench_nn::rope::{Rope, RopeConfig, Style};
use serde::Deserialize;

use super::layer_norm_decoder::{self as decoder, Layer, LayerNormDecoder, MlpNorm, Positions, Sizes};

/// The classes that run.
pub const CLASSES: &[&str] = &["FalconForCausalLM"];

const RULES: &[AliasRule] = &[
    // buffers in early checkpoints, which follow from the config
    AliasRule::drop(r"\.(rotary_emb|maybe_rotary)\.inv_freq$", AliasScope::Always),
    // tiiuae/falcon-7b stores the tied matrix a second time
    AliasRule::rename(r"^lm_head\.weight$", "transformer.word_embeddings.weight", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    decoder::aliases(spec, RULES)
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct FalconConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream; `n_embed` in early files.
    #[serde(alias = "n_embed")]
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of the queries; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Heads of keys and values in the new decoder architecture; as many as of the queries where absent.
    pub num_kv_heads: Option<usize>,
    /// Falcon-40B's: groups of heads share keys and values, and the halves of a layer run in parallel.
    #[serde(default)]
    pub new_decoder_architecture: bool,
    /// Outside the new architecture: all heads share keys and values; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub multi_query: bool,
    /// The halves of a layer run in parallel; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub parallel_attn: bool,
    /// Norms of halves that run in parallel: 2 in the new architecture where absent, else 1.
    pub num_ln_in_parallel_attn: Option<usize>,
    /// The four products of a layer have biases.
    #[serde(default)]
    pub bias: bool,
    /// Positions by a bias on the scores instead of rotary ones.
    #[serde(default)]
    pub alibi: bool,
    /// `eager` where absent, or `sdpa`: see [`FalconConfig::alibi_times`].
    #[serde(default)]
    pub attn_implementation: AttnImplementation,
    /// Width inside the feed-forward half; `4 * hidden_size` where absent.
    pub ffn_hidden_size: Option<usize>,
    /// Activation of the feed-forward half.
    #[serde(default = "defaults::activation")]
    pub activation: Activation,
    /// Added to the variance in every normalisation.
    #[serde(default = "defaults::layer_norm_epsilon")]
    pub layer_norm_epsilon: f64,
    /// Positions of pre-training, which some types of rotary positions depend on.
    #[serde(default = "defaults::max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// The output matrix is that of the embeddings; `true` where absent.
    #[serde(default = "defaults::yes")]
    pub tie_word_embeddings: bool,
    /// Rotary positions.
    #[serde(flatten)]
    pub rope: RopeConfig,
}

/// Which of the class's forms of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttnImplementation {
    /// The plain one, which the reference cases are made with.
    #[default]
    Eager,
    /// PyTorch's fused one.
    Sdpa,
}

/// What `transformers.FalconConfig` takes for fields that a file leaves out.
mod defaults {
    use roofbench_nn::activation::Activation;

    pub(super) fn yes() -> bool {
        true
    }
    pub(super) fn activation() -> Activation {
        Activation::Gelu
    }
    pub(super) fn layer_norm_epsilon() -> f64 {
        1e-5
    }
    pub(super) fn max_position_embeddings() -> usize {
        2048
    }
}

impl FalconConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, not supported, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("num_kv_heads", cfg.kv_heads()),
            ("ffn_hidden_size", cfg.inner()),
            ("max_position_embeddings", cfg.max_position_embeddings),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::multiple(("num_attention_heads", cfg.num_attention_heads), ("num_kv_heads", cfg.kv_heads()))?;
        config::not_negative(&[("layer_norm_epsilon", cfg.layer_norm_epsilon)])?;
        config::refuse_unless(spec, "apply_residual_connection_post_layernorm", &[false.into()])?;
        // of these the class knows one form only
        if cfg.new_decoder_architecture {
            config::refuse_unless(spec, "parallel_attn", &[true.into()])?;
            config::refuse_unless(spec, "num_ln_in_parallel_attn", &[1.into(), 2.into()])?;
        }
        if cfg.parallel_attn && !cfg.new_decoder_architecture {
            config::refuse_unless(spec, "num_ln_in_parallel_attn", &[1.into()])?;
        }
        if !cfg.multi_query && !cfg.new_decoder_architecture {
            config::refuse_unless(spec, "num_kv_heads", &[cfg.num_attention_heads.into()])?;
        }
        if let Some(factor) = cfg.rope.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            return Err(config::unsupported(spec, "partial_rotary_factor", &factor.into(), &[1.0.into()]));
        }
        Ok(cfg)
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        match (self.new_decoder_architecture, self.multi_query) {
            (true, _) => self.num_kv_heads.unwrap_or(self.num_attention_heads),
            (false, true) => 1,
            (false, false) => self.num_attention_heads,
        }
    }

    /// How often the class adds ALiBi to the scores. Its eager attention does so twice, with the scores and with the
    /// mask; `sdpa`, which the library takes by default, does once.
    pub fn alibi_times(&self) -> u8 {
        match self.attn_implementation {
            AttnImplementation::Eager => 2,
            AttnImplementation::Sdpa => 1,
        }
    }

    fn inner(&self) -> usize {
        self.ffn_hidden_size.unwrap_or(4 * self.hidden_size)
    }

    /// The halves of a layer run in parallel, each with a norm of its own.
    fn two_norms(&self) -> bool {
        self.new_decoder_architecture && self.num_ln_in_parallel_attn != Some(1)
    }

    pub(crate) fn sizes(&self) -> Sizes {
        let head_dim = self.hidden_size / self.num_attention_heads;
        Sizes {
            vocab: self.vocab_size,
            hidden: self.hidden_size,
            inner: self.inner(),
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            norms: if self.two_norms() || !self.parallel_attn { 2 } else { 1 },
            bias: self.bias,
            rotary: if self.alibi { 0 } else { head_dim },
            learned_positions: false,
            max_positions: None,
        }
    }

    fn positions(&self) -> Result<Positions, SessionError> {
        let head_dim = self.hidden_size / self.num_attention_heads;
        if self.alibi {
            let alibi = Alibi::falcon(self.num_attention_heads, head_dim);
            return Ok(Positions::Alibi(alibi.times(f32::from(self.alibi_times()))));
        }
        let rope = Rope::new(&self.rope, head_dim, self.max_position_embeddings, Style::Half);
        rope.map(Positions::Rotary).map_err(|error| config::invalid("rope_parameters", error.to_string()))
    }

    fn layer(&self, vb: VarBuilder) -> Result<Layer> {
        let (hidden, inner) = (self.hidden_size, self.inner());
        let norm = |name: &str| LayerNorm::load(hidden, self.layer_norm_epsilon, vb.pp(name));
        let attention = Attention {
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            head_dim: hidden / self.num_attention_heads,
            scale: None,
            pattern: Pattern::Causal,
        };
        let (attention_norm, mlp_norm) = if !self.parallel_attn {
            (norm("input_layernorm")?, MlpNorm::After(norm("post_attention_layernorm")?))
        } else if self.two_norms() {
            (norm("ln_attn")?, MlpNorm::Beside(norm("ln_mlp")?))
        } else {
            (norm("input_layernorm")?, MlpNorm::Shared)
        };
        let attn = vb.pp("self_attention");
        Ok(Layer {
            attention_norm,
            qkv: query_key_value(hidden, &attention, self.bias, attn.pp("query_key_value"))?,
            clip: None,
            attention,
            output: Linear::load(hidden, hidden, self.bias, attn.pp("dense"))?,
            mlp_norm,
            mlp: Mlp::load(
                [hidden, inner],
                self.activation,
                self.bias,
                ["dense_h_to_4h", "dense_4h_to_h"],
                vb.pp("mlp"),
            )?,
        })
    }
}

/// The product for query, key and value, whose rows a checkpoint holds by groups: of each the queries, their key, and
/// their value.
fn query_key_value(hidden: usize, attention: &Attention, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let rows = (attention.heads + 2 * attention.kv_heads) * attention.head_dim;
    let weight = by_kind(&vb.get((rows, hidden), "weight")?, attention)?;
    let bias = if bias { Some(by_kind(&vb.get(rows, "bias")?, attention)?) } else { None };
    Linear::new(&weight, bias.as_ref())
}

/// The same rows with all queries first, then all keys, then all values.
fn by_kind(x: &Tensor, attention: &Attention) -> Result<Tensor> {
    let Attention { heads, kv_heads, head_dim, .. } = *attention;
    if kv_heads == 1 {
        return Ok(x.clone());
    }
    let queries = heads / kv_heads * head_dim;
    let groups = x.reshape((kv_heads, queries + 2 * head_dim, ()))?; // (kv_heads, rows of a group, columns)
    let kind = |from, rows| groups.narrow(1, from, rows)?.flatten(0, 1);
    let kinds = [kind(0, queries)?, kind(queries, head_dim)?, kind(queries + head_dim, head_dim)?];
    Tensor::cat(&kinds, 0)?.reshape(x.shape())
}

/// Loads `FalconForCausalLM`.
///
/// # Errors
/// As for [`FalconConfig::from_spec`], and when a tensor is missing or has another shape.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<LayerNormDecoder, SessionError> {
    let cfg = FalconConfig::from_spec(spec)?;
    let (sizes, model) = (cfg.sizes(), vb.pp("transformer"));
    let positions = cfg.positions()?;
    let (embeddings, lm_head) =
        decoder::vocabulary(&sizes, cfg.tie_word_embeddings, model.pp("word_embeddings"), vb.pp("lm_head"))?;
    let layer = |i: usize| cfg.layer(model.pp("h").pp(i));
    Ok(LayerNormDecoder {
        sizes,
        embeddings,
        positions,
        layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        norm: LayerNorm::load(cfg.hidden_size, cfg.layer_norm_epsilon, model.pp("ln_f"))?,
        lm_head,
        weight_bytes: vb.dtype().size_in_bytes() as u64,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::{Value, json};

    use super::*;
    use decoder::tests::{flops_over_parameters, spec};

    /// Falcon-7B but for the changes.
    fn config(changes: &[(&str, Value)]) -> Result<FalconConfig, SessionError> {
        let sizes = json!({
            "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        });
        FalconConfig::from_spec(&spec("falcon", &sizes, changes))
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = config(&[]).unwrap();
        assert_eq!((cfg.kv_heads(), cfg.inner(), cfg.max_position_embeddings), (1, 4 * 4544, 2048));
        assert_eq!((cfg.activation, cfg.layer_norm_epsilon, cfg.rope.theta), (Activation::Gelu, 1e-5, 10_000.0));
        assert!(cfg.parallel_attn && cfg.tie_word_embeddings && !cfg.bias && !cfg.alibi && !cfg.two_norms());
        let early = json!({"vocab_size": 10, "n_embed": 8, "num_hidden_layers": 1, "num_attention_heads": 2});
        assert_eq!(FalconConfig::from_spec(&spec("falcon", &early, &[])).unwrap().hidden_size, 8);
    }

    #[test]
    fn variants() {
        let new = [("new_decoder_architecture", json!(true)), ("num_attention_heads", json!(64))];
        let new = |change: (&str, Value)| {
            let changes = [&new[..], &[("hidden_size", json!(4096)), change]].concat();
            let cfg = config(&changes).unwrap();
            (cfg.kv_heads(), cfg.sizes().norms)
        };
        assert_eq!(new(("num_kv_heads", json!(8))), (8, 2));
        assert_eq!(new(("num_kv_heads", Value::Null)), (64, 2));
        assert_eq!(new(("num_ln_in_parallel_attn", json!(1))), (64, 1));
        let old = |field: &str| {
            let cfg = config(&[(field, json!(false))]).unwrap();
            (cfg.kv_heads(), cfg.sizes().norms)
        };
        assert_eq!(old("multi_query"), (71, 1));
        assert_eq!(old("parallel_attn"), (1, 2));
        let alibi = |more: &[(&str, Value)]| {
            let cfg = config(&[&[("alibi", json!(true))], more].concat()).unwrap();
            (cfg.sizes().rotary, cfg.alibi_times())
        };
        assert_eq!(alibi(&[]), (0, 2));
        assert_eq!(alibi(&[("attn_implementation", json!("sdpa"))]), (0, 1));
    }

    #[test]
    fn refusals_name_the_field() {
        let message = |changes: &[(&str, Value)]| config(changes).err().map(|e| e.to_string()).unwrap_or_default();
        let new = ("new_decoder_architecture", json!(true));
        assert!(message(&[("num_attention_heads", json!(70))]).contains("`hidden_size`: 4544 is not a multiple of"));
        assert!(message(&[new.clone(), ("num_kv_heads", json!(8))]).contains("`num_attention_heads`: 71"));
        assert!(message(&[new.clone(), ("num_kv_heads", json!(0))]).contains("`num_kv_heads`: 0 is not in"));
        assert!(message(&[new.clone(), ("parallel_attn", json!(false))]).contains("`parallel_attn` = false"));
        assert!(message(&[new, ("num_ln_in_parallel_attn", json!(3))]).contains("`num_ln_in_parallel_attn` = 3"));
        assert!(message(&[("num_ln_in_parallel_attn", json!(2))]).contains("`num_ln_in_parallel_attn` = 2"));
        let many = [("multi_query", json!(false)), ("num_kv_heads", json!(1))];
        assert!(message(&many).contains("`num_kv_heads` = 1"));
        let post = [("apply_residual_connection_post_layernorm", json!(true))];
        assert!(message(&post).contains("`apply_residual_connection_post_layernorm` = true"));
        assert!(message(&[("partial_rotary_factor", json!(0.5))]).contains("`partial_rotary_factor` = 0.5"));
        assert!(message(&[("rope_scaling", json!({"rope_type": "spiral"}))]).contains("`spiral` is not supported"));
        assert!(message(&[("attn_implementation", json!("flash"))]).contains("`attn_implementation`"));
    }

    /// Two groups of two heads of width 1: query, query, key, value.
    #[test]
    fn rows_by_kind() {
        let attention = Attention { heads: 4, kv_heads: 2, head_dim: 1, scale: None, pattern: Pattern::Causal };
        let rows = Tensor::new(&[0f32, 1., 4., 6., 2., 3., 5., 7.], &Device::Cpu).unwrap();
        let sorted = by_kind(&rows, &attention).unwrap();
        assert_eq!(sorted.to_vec1::<f32>().unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
        let matrix = Tensor::stack(&[&rows, &rows], 1).unwrap();
        assert_eq!(by_kind(&matrix, &attention).unwrap().to_vec2::<f32>().unwrap()[4], [4., 4.]);
        let single = Attention { heads: 6, kv_heads: 1, ..attention };
        assert_eq!(by_kind(&rows, &single).unwrap().to_vec1::<f32>().unwrap()[2], 4.);
    }

    #[test]
    fn an_output_matrix_of_its_own_keeps_its_name() {
        let rules = |tied: bool| aliases(&spec("falcon", &json!({"tie_word_embeddings": tied}), &[])).len();
        assert_eq!((rules(true), rules(false)), (2, 1));
    }

    #[test]
    fn cost_of_a_published_size() {
        let ratio = flops_over_parameters(&config(&[]).unwrap().sizes(), 6_921_720_704);
        assert!((ratio - 1.).abs() < 1e-3, "{ratio}");
    }
}
