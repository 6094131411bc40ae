//! Phi decoder: attention and feed-forward side by side on one LayerNorm, rotary positions on part of a head.
//! Source: Phi-1.5 (arXiv:2309.05463). Mirrors `transformers.PhiForCausalLM`.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::rope::{Rope, RopeConfig, RopeTable, Style};
use serde::Deserialize;

use crate::causal::{CausalLm, DecoderShape, Pass};

/// The classes of the family that run; the second is in [`phi3`](super::phi3).
pub const CLASSES: &[&str] = &["PhiForCausalLM", "Phi3ForCausalLM"];

/// How published checkpoints name the tensors.
pub const ALIASES: &[AliasRule] = &[
    // a buffer in early checkpoints, which follows from the config
    AliasRule::drop(r"\.rotary_emb\.inv_freq$", AliasScope::Always),
    // of revisions from before 2024, which the class cannot read either
    AliasRule::drop(r"^(transformer\.h|layers)\.\d+\.", AliasScope::Always),
];

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct PhiConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; one per query head where absent.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` where absent.
    pub head_dim: Option<usize>,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Positions of pre-training, which some types of rotary positions depend on.
    pub max_position_embeddings: usize,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// The output matrix is that of the embeddings; it has a bias all the same.
    pub tie_word_embeddings: bool,
    /// Each head of queries and keys is normalised before it is turned.
    pub qk_layernorm: bool,
    /// Rotary positions; on half of a head where nothing says how much.
    #[serde(flatten)]
    pub rope: RopeConfig,
}

impl Default for PhiConfig {
    /// What `transformers.PhiConfig` takes for absent fields.
    fn default() -> Self {
        Self {
            vocab_size: 51_200,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 24,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 2048,
            layer_norm_eps: 1e-5,
            tie_word_embeddings: false,
            qk_layernorm: false,
            rope: RopeConfig::default(),
        }
    }
}

impl PhiConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let mut cfg: Self = spec.parse_config()?;
        cfg.rope.partial_rotary_factor.get_or_insert(0.5);
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("intermediate_size", cfg.intermediate_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("num_key_value_heads", cfg.kv_heads()),
            ("max_position_embeddings", cfg.max_position_embeddings),
        ])?;
        config::multiple(("num_attention_heads", cfg.num_attention_heads), ("num_key_value_heads", cfg.kv_heads()))?;
        if cfg.head_dim.is_none() {
            config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        }
        config::sizes(&[("head_dim", cfg.head_dim())])?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        Ok(cfg)
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    fn rope(&self) -> Result<Rope, SessionError> {
        Rope::new(&self.rope, self.head_dim(), self.max_position_embeddings, Style::Half)
            .map_err(|error| config::invalid("rope_parameters", error.to_string()))
    }

    fn attention(&self) -> Attention {
        Attention {
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            head_dim: self.head_dim(),
            scale: None,
            pattern: Pattern::Causal,
        }
    }
}

/// Normalisation of the heads of queries and keys.
struct HeadNorms {
    q_layernorm: LayerNorm,
    k_layernorm: LayerNorm,
    head_dim: usize,
}

impl HeadNorms {
    fn load(cfg: &PhiConfig, vb: VarBuilder) -> Result<Self> {
        let head_dim = cfg.head_dim();
        let norm = |name: &str| LayerNorm::load(head_dim, cfg.layer_norm_eps, vb.pp(name));
        Ok(Self { q_layernorm: norm("q_layernorm")?, k_layernorm: norm("k_layernorm")?, head_dim })
    }

    /// Queries and keys (batch, seq, heads · head_dim), whose results are the same.
    fn forward(&self, q: Tensor, k: Tensor) -> Result<(Tensor, Tensor)> {
        let by_head = |norm: &LayerNorm, x: &Tensor| {
            let (batch, seq, _) = x.dims3()?;
            norm.forward(&x.reshape((batch, seq, (), self.head_dim))?)?.reshape(x.shape())
        };
        Ok((by_head(&self.q_layernorm, &q)?, by_head(&self.k_layernorm, &k)?))
    }
}

struct DecoderLayer {
    input_layernorm: LayerNorm,
    qkv_proj: Linear,
    head_norms: Option<HeadNorms>,
    attention: Attention,
    dense: Linear,
    mlp: Mlp,
}

impl DecoderLayer {
    fn load(cfg: &PhiConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, attention, attn) = (cfg.hidden_size, cfg.attention(), vb.pp("self_attn"));
        let [queries, keys] = [attention.heads, attention.kv_heads].map(|heads| heads * attention.head_dim);
        let qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)];
        Ok(Self {
            input_layernorm: LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp("input_layernorm"))?,
            qkv_proj: Linear::load_fused(hidden, &qkv, true, attn.clone())?,
            head_norms: cfg.qk_layernorm.then(|| HeadNorms::load(cfg, attn.clone())).transpose()?,
            attention,
            dense: Linear::load(queries, hidden, true, attn.pp("dense"))?,
            mlp: Mlp::load([hidden, cfg.intermediate_size], cfg.hidden_act, true, ["fc1", "fc2"], vb.pp("mlp"))?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, layer: usize, x: &Tensor, rope: &RopeTable, decoding: &mut Decoding) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(x)?; // (batch, seq, hidden)
        let [q, k, v] = self.attention.split(&self.qkv_proj.forward(&normed)?)?;
        let (q, k) = match &self.head_norms {
            Some(norms) => norms.forward(q, k)?,
            None => (q, k),
        };
        let (q, k) = (rope.rotate(q)?, rope.rotate(k)?);
        let attended = decoding.attend(layer, &self.attention, [&q, &k, &v], None)?; // (batch, seq, queries)
        self.mlp.forward_add(&normed, &self.dense.forward_add(&attended, x)?)
    }
}

/// `PhiForCausalLM`.
pub struct PhiModel {
    cfg: PhiConfig,
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    final_layernorm: LayerNorm,
    lm_head: Linear,
    rope: Rope,
    weight_bytes: u64,
}

impl PhiModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// As for [`PhiConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = PhiConfig::from_spec(spec)?;
        let (rope, model) = (cfg.rope()?, vb.pp("model"));
        let embed_tokens = Embedding::load(cfg.vocab_size, cfg.hidden_size, model.pp("embed_tokens"))?;
        let lm_head = if cfg.tie_word_embeddings {
            embed_tokens.output(Some(&vb.get(cfg.vocab_size, "lm_head.bias")?))?
        } else {
            Linear::load(cfg.hidden_size, cfg.vocab_size, true, vb.pp("lm_head"))?
        };
        let layers = (0..cfg.num_hidden_layers)
            .map(|layer| DecoderLayer::load(&cfg, model.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        let final_layernorm = LayerNorm::load(cfg.hidden_size, cfg.layer_norm_eps, model.pp("final_layernorm"))?;
        let weight_bytes = vb.dtype().size_in_bytes() as u64;
        Ok(Self { cfg, embed_tokens, layers, final_layernorm, lm_head, rope, weight_bytes })
    }
}

impl CausalLm for PhiModel {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.vocab_size,
            layers: self.layers.len(),
            kv_width: self.cfg.kv_heads() * self.cfg.head_dim(),
            window: None,
            max_positions: None,
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.embed_tokens.forward(input_ids)
    }

    fn decode(&self, x: Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let rope = decoding.rope(&self.rope)?;
        let mut x = x;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, &rope, decoding)?; // (batch, seq, hidden)
        }
        self.final_layernorm.forward(&x)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(x)
    }

    fn cost(&self, pass: Pass) -> Cost {
        forward_cost(&self.cfg, pass, self.weight_bytes)
    }
}

/// FLOPs and bytes of one pass, all of whose tokens exist.
pub(crate) fn forward_cost(cfg: &PhiConfig, pass: Pass, bytes: u64) -> Cost {
    let Pass { batch, seq, cached, logits } = pass;
    let [hidden, inner, heads, kv_heads, head_dim, vocab] = [
        cfg.hidden_size,
        cfg.intermediate_size,
        cfg.num_attention_heads,
        cfg.kv_heads(),
        cfg.head_dim(),
        cfg.vocab_size,
    ]
    .map(|size| size as u64);
    let tokens = batch * seq;
    let linear = |input, output| cost::linear(tokens, input, output, true, bytes);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let visible_pairs = cost::causal_pairs(seq, cached);
    let attention = cost::Attention { batch, heads, kv_heads, head_dim, queries: seq, cached, visible_pairs };
    let rotary = (head_dim as f64 * cfg.rope.partial_rotary_factor.unwrap_or(1.0)) as u64;
    let head_norms = if cfg.qk_layernorm {
        norm(tokens * heads, head_dim) + norm(tokens * kv_heads, head_dim)
    } else {
        Cost::default()
    };
    let layer = norm(tokens, hidden)
        + linear(hidden, (heads + 2 * kv_heads) * head_dim) // query, key and value
        + head_norms
        + cost::elementwise(tokens * (heads + kv_heads) * rotary, 3) // two products and a sum per turned element
        + attention.cost(bytes)
        + linear(heads * head_dim, hidden) + cost::elementwise(tokens * hidden, 1) // and residual
        + linear(hidden, inner) + cost::elementwise(tokens * inner, 1) // and activation
        + linear(inner, hidden) + cost::elementwise(tokens * hidden, 1); // and what attention gave
    cost::embedding(tokens, hidden, bytes)
        + layer * cfg.num_hidden_layers as u64
        + norm(tokens, hidden)
        + cost::linear(batch * logits, hidden, vocab, true, bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("phi", "PhiForCausalLM", config)
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let of = |config| PhiConfig::from_spec(&spec(config)).unwrap();
        let cfg = of(json!({}));
        assert_eq!((cfg.vocab_size, cfg.hidden_size, cfg.kv_heads(), cfg.head_dim()), (51_200, 2048, 32, 64));
        assert_eq!((cfg.rope.partial_rotary_factor, cfg.hidden_act), (Some(0.5), Activation::GeluTanh));
        let part = |config| of(config).rope.partial_rotary_factor;
        assert_eq!(part(json!({"partial_rotary_factor": 0.4})), Some(0.4));
        assert_eq!(part(json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})), Some(0.5));
        assert_eq!(part(json!({"rope_parameters": {"partial_rotary_factor": 0.25}})), Some(0.25));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |config| PhiConfig::from_spec(&spec(config)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(json!({"num_attention_heads": 3})).contains("`hidden_size`: 2048 is not a multiple of"));
        assert!(message(json!({"num_key_value_heads": 5})).contains("`num_attention_heads`: 32 is not a multiple of"));
        assert!(message(json!({"hidden_act": "maxout"})).contains("`hidden_act`"));
        assert!(message(json!({"rope_scaling": {"type": "spiral"}})).contains("`spiral` is not supported"));
        let odd = PhiConfig::from_spec(&spec(json!({"partial_rotary_factor": 1.5}))).unwrap();
        assert!(odd.rope().unwrap_err().to_string().contains("partial_rotary_factor"));
    }

    /// One layer of two heads of 4, half of each turned, that share one of keys and values; 2 items of 3 tokens behind
    /// 5.
    #[test]
    fn cost_by_hand() {
        let cfg = json!({
            "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "qk_layernorm": true,
        });
        let cfg = PhiConfig::from_spec(&spec(cfg)).unwrap();
        let cost = forward_cost(&cfg, Pass { batch: 2, seq: 3, cached: 5, logits: 1 }, 2);
        let pairs = 2 * 2 * (3 * 5 + 6); // items, heads, pairs
        let flops = 2 * 6 * (7 * 8) // norms: 7 per element
            + 2 * 6 * 8 * 16 + 6 * 16 // query, key, value
            + 6 * 12 * 7 + 6 * 6 * 3 // query and key normalised; half of each turned
            + 4 * pairs * 4 + 5 * pairs
            + 2 * 6 * 8 * 8 + 6 * 8 + 6 * 8
            + 2 * 6 * 8 * 6 + 6 * 6 + 6 * 6 + 2 * 6 * 6 * 8 + 6 * 8 + 6 * 8
            + 2 * 2 * 8 * 10 + 2 * 10;
        assert_eq!(cost.flops, flops);
        let weights = 6 * 8 + 2 * 16 + 9 * 16 + 2 * 8 + 9 * 8 + 9 * 6 + 7 * 8 + 9 * 10;
        assert_eq!(cost.weight_bytes, 2 * weights);
        assert_eq!(cost.kv_bytes, 2 * 2 * 2 * 5 * 4);
    }

    /// Phi-1.5: 2 FLOPs per parameter but the embeddings and token, and attention.
    #[test]
    fn cost_of_a_published_size() {
        let cfg = PhiConfig::from_spec(&spec(json!({}))).unwrap();
        let flops = forward_cost(&cfg, Pass { batch: 1, seq: 1, cached: 0, logits: 1 }, 2).flops as f64;
        let parameters = 1_418_270_720. - 51200. * 2048.;
        assert!((flops / (2. * parameters) - 1.).abs() < 2e-3, "{flops:e}");
    }
}
