//! Llama decoder: pre-norm, grouped-query attention with rotary positions, gated feed-forward.
//! Source: LLaMA (arXiv:2302.13971). Mirrors `transformers.LlamaForCausalLM`.

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
use roofbench_nn::mlp::GatedMlp;
use roofbench_nn::norm::RmsNorm;
use roofbench_nn::rope::{Rope, RopeConfig, RopeTable, Style};
use serde::Deserialize;
use serde_json::Value;

use crate::causal::{CausalLm, DecoderShape, Pass};

/// The classes that run.
pub const CLASSES: &[&str] = &["LlamaForCausalLM"];

/// How published checkpoints name the tensors.
pub const ALIASES: &[AliasRule] = &[
    // a buffer in early checkpoints, which follows from the config
    AliasRule::drop(r"\.rotary_emb\.inv_freq$", AliasScope::Always),
];

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct LlamaConfig {
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
    /// Absent in first-generation checkpoints: one key/value head per query head.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` where absent.
    pub head_dim: Option<usize>,
    /// Activation of the gate.
    #[serde(default = "defaults::hidden_act")]
    pub hidden_act: Activation,
    /// Positions of pre-training, which some types of rotary positions depend on.
    #[serde(default = "defaults::max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// Added to the mean square in every normalisation.
    #[serde(default = "defaults::rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// The output matrix is that of the embeddings; `false` where absent.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// The four products of attention have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// The three products of the feed-forward half have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Rotary positions.
    #[serde(flatten)]
    pub rope: RopeConfig,
    /// The last positions that a token sees, itself included; no field of Llama's.
    #[serde(skip)]
    pub window: Option<usize>,
    /// Query, key and value are one tensor, and so are gate and up; no field of Llama's.
    #[serde(skip)]
    pub fused: bool,
    /// The length past which the rotary positions of a whole sequence are others, so that generation runs it again
    /// there; no field of Llama's.
    #[serde(skip)]
    pub starts_over: Option<usize>,
}

/// A field that classes beside Llama's have.
#[derive(Deserialize)]
struct Window {
    sliding_window: Option<usize>,
}

/// What `transformers.LlamaConfig` takes for fields that older files leave out.
mod defaults {
    use roofbench_nn::activation::Activation;

    pub(super) fn hidden_act() -> Activation {
        Activation::Silu
    }
    pub(super) fn max_position_embeddings() -> usize {
        2048
    }
    pub(super) fn rms_norm_eps() -> f64 {
        1e-6
    }
}

impl LlamaConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
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
        config::not_negative(&[("rms_norm_eps", cfg.rms_norm_eps)])?;
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

    /// Sets the window of a class that has one from its field `sliding_window`.
    ///
    /// # Errors
    /// When it is 0, or `layer_types` asks for something else in some of the layers.
    pub(crate) fn with_window(mut self, spec: &ModelSpec) -> Result<Self, SessionError> {
        self.window = spec.parse_config::<Window>()?.sliding_window;
        config::sizes(&[("sliding_window", self.window.unwrap_or(1))])?;
        let supported = Value::from(if self.window.is_some() { "sliding_attention" } else { "full_attention" });
        let layers = spec.config.get("layer_types").and_then(Value::as_array);
        match layers.and_then(|layers| layers.iter().find(|layer| **layer != supported)) {
            Some(other) => Err(config::unsupported(spec, "layer_types", other, &[supported])),
            None => Ok(self),
        }
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
            pattern: self.window.map_or(Pattern::Causal, Pattern::Sliding),
        }
    }
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    qkv_proj: Linear,
    attention: Attention,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

impl DecoderLayer {
    fn load(cfg: &LlamaConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner, act) = (cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act);
        let norm = |name: &str| RmsNorm::load(hidden, cfg.rms_norm_eps, vb.pp(name));
        let attention = cfg.attention();
        let [queries, keys] = [attention.heads, attention.kv_heads].map(|heads| heads * attention.head_dim);
        let (attn, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)];
        let (qkv_proj, mlp) = if cfg.fused {
            let gate_up = Linear::load(hidden, 2 * inner, cfg.mlp_bias, mlp.pp("gate_up_proj"))?;
            let down = Linear::load(inner, hidden, cfg.mlp_bias, mlp.pp("down_proj"))?;
            let qkv_proj = Linear::load(hidden, queries + 2 * keys, cfg.attention_bias, attn.pp("qkv_proj"))?;
            (qkv_proj, GatedMlp::new(gate_up, act, down)?)
        } else {
            let names = ["gate_proj", "up_proj", "down_proj"];
            let qkv_proj = Linear::load_fused(hidden, &qkv, cfg.attention_bias, attn.clone())?;
            (qkv_proj, GatedMlp::load([hidden, inner], act, cfg.mlp_bias, names, mlp)?)
        };
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            qkv_proj,
            attention,
            o_proj: Linear::load(queries, hidden, cfg.attention_bias, attn.pp("o_proj"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, layer: usize, x: &Tensor, rope: &RopeTable, decoding: &mut Decoding) -> Result<Tensor> {
        let qkv = self.qkv_proj.forward(&self.input_layernorm.forward(x)?)?; // (batch, seq, queries + 2 * keys)
        let [q, k, v] = self.attention.split(&qkv)?;
        let (q, k) = (rope.rotate(q)?, rope.rotate(k)?);
        let attended = decoding.attend(layer, &self.attention, [&q, &k, &v], None)?; // (batch, seq, queries)
        let x = self.o_proj.forward_add(&attended, x)?; // (batch, seq, hidden)
        self.mlp.forward_add(&self.post_attention_layernorm.forward(&x)?, &x)
    }
}

/// `LlamaForCausalLM`, and what differs from it in its configuration alone.
pub struct LlamaModel {
    cfg: LlamaConfig,
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: Rope,
    weight_bytes: u64,
}

impl LlamaModel {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`LlamaConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        Self::with_config(LlamaConfig::from_spec(spec)?, vb)
    }

    /// Loads the model of `cfg` from a checkpoint's root.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or the rotary positions are none.
    pub fn with_config(cfg: LlamaConfig, vb: VarBuilder) -> Result<Self, SessionError> {
        let rope = cfg.rope()?;
        let model = vb.pp("model");
        let (embed_tokens, lm_head) = if cfg.tie_word_embeddings {
            Embedding::load_tied(cfg.vocab_size, cfg.hidden_size, model.pp("embed_tokens"))?
        } else {
            let embed_tokens = Embedding::load(cfg.vocab_size, cfg.hidden_size, model.pp("embed_tokens"))?;
            (embed_tokens, Linear::load(cfg.hidden_size, cfg.vocab_size, false, vb.pp("lm_head"))?)
        };
        let layers = (0..cfg.num_hidden_layers)
            .map(|layer| DecoderLayer::load(&cfg, model.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::load(cfg.hidden_size, cfg.rms_norm_eps, model.pp("norm"))?;
        let weight_bytes = vb.dtype().size_in_bytes() as u64;
        Ok(Self { cfg, embed_tokens, layers, norm, lm_head, rope, weight_bytes })
    }
}

impl CausalLm for LlamaModel {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.vocab_size,
            layers: self.layers.len(),
            kv_width: self.cfg.kv_heads() * self.cfg.head_dim(),
            window: self.cfg.window,
            max_positions: None,
        }
    }

    fn starts_over(&self) -> Option<usize> {
        self.cfg.starts_over
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
        self.norm.forward(&x)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(x)
    }

    fn cost(&self, pass: Pass) -> Cost {
        forward_cost(&self.cfg, pass, self.weight_bytes)
    }
}

/// FLOPs and bytes of one pass, all of whose tokens exist.
pub(crate) fn forward_cost(cfg: &LlamaConfig, pass: Pass, bytes: u64) -> Cost {
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
    let linear = |input, output, bias| cost::linear(tokens, input, output, bias, bytes);
    let norm = |rows| cost::norm(Norm::Rms, rows, hidden, bytes);
    let window = cfg.window.map(|window| window as u64);
    let attention = cost::Attention {
        batch,
        heads,
        kv_heads,
        head_dim,
        queries: seq,
        cached: window.map_or(cached, |window| cached.min(window - 1)),
        visible_pairs: cost::window_pairs(seq, cached, window),
    };
    let rotary = (head_dim as f64 * cfg.rope.partial_rotary_factor.unwrap_or(1.0)) as u64;
    let layer = norm(tokens)
        + linear(hidden, (heads + 2 * kv_heads) * head_dim, cfg.attention_bias) // query, key and value
        + cost::elementwise(tokens * (heads + kv_heads) * rotary, 3) // two products and a sum per turned element
        + attention.cost(bytes)
        + linear(heads * head_dim, hidden, cfg.attention_bias) + cost::elementwise(tokens * hidden, 1) // and residual
        + norm(tokens)
        + linear(hidden, 2 * inner, cfg.mlp_bias) // gate and up
        + cost::elementwise(tokens * inner, 2) // activation and product
        + linear(inner, hidden, cfg.mlp_bias) + cost::elementwise(tokens * hidden, 1); // and residual
    cost::embedding(tokens, hidden, bytes)
        + layer * cfg.num_hidden_layers as u64
        + norm(tokens)
        + cost::linear(batch * logits, hidden, vocab, false, bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(changes: &[(&str, Value)]) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
        });
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        ModelSpec::new("llama", "LlamaForCausalLM", config)
    }

    #[test]
    fn fields_left_out_have_the_defaults_of_the_class() {
        let cfg = LlamaConfig::from_spec(&spec(&[])).unwrap();
        assert_eq!((cfg.kv_heads(), cfg.head_dim(), cfg.max_position_embeddings), (2, 4, 2048));
        assert_eq!((cfg.rms_norm_eps, cfg.rope.theta, cfg.tie_word_embeddings), (1e-6, 10_000.0, false));
        let cfg = LlamaConfig::from_spec(&spec(&[("head_dim", json!(6)), ("num_attention_heads", json!(3))])).unwrap();
        assert_eq!((cfg.kv_heads(), cfg.head_dim()), (3, 6));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |field: &str, value: Value| {
            LlamaConfig::from_spec(&spec(&[(field, value)])).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert!(message("num_attention_heads", json!(3)).contains("`hidden_size`: 8 is not a multiple of"));
        assert!(message("num_key_value_heads", json!(3)).contains("`num_attention_heads`: 2 is not a multiple of"));
        assert!(message("num_key_value_heads", json!(0)).contains("`num_key_value_heads`: 0 is not in"));
        assert!(message("rope_scaling", json!({"rope_type": "spiral"})).contains("`spiral` is not supported"));
        assert!(message("hidden_act", json!("maxout")).contains("`hidden_act`"));
    }

    /// One layer of two heads of 4 that share one of keys and values; 2 items of 3 tokens behind 5.
    #[test]
    fn cost_by_hand() {
        let changes = [("num_hidden_layers", json!(1)), ("num_key_value_heads", json!(1))];
        let cfg = LlamaConfig::from_spec(&spec(&changes)).unwrap();
        let cost = forward_cost(&cfg, Pass { batch: 2, seq: 3, cached: 5, logits: 1 }, 2);
        let pairs = 2 * 2 * (3 * 5 + 6); // items, heads, pairs
        let flops = 3 * 6 * (4 * 8) // norms: 4 per element
            + 2 * 6 * 8 * 16 + 6 * 12 * 3 // query, key, value; query and key turned
            + 4 * pairs * 4 + 5 * pairs
            + 2 * 6 * 8 * 8 + 6 * 8
            + 2 * 6 * 8 * 12 + 6 * 6 * 2 + 2 * 6 * 6 * 8 + 6 * 8
            + 2 * 2 * 8 * 10;
        assert_eq!(cost.flops, flops);
        assert_eq!(cost.weight_bytes, 2 * (6 * 8 + 3 * 8 + 8 * 16 + 8 * 8 + 8 * 12 + 6 * 8 + 8 * 10));
        assert_eq!(cost.kv_bytes, 2 * 2 * 2 * 5 * 4);
    }

    /// Llama-2-7B: 2 FLOPs per parameter but the embeddings and token, and attention (arXiv:2001.08361, table 1).
    #[test]
    fn cost_of_a_published_size() {
        let sizes = [
            ("vocab_size", json!(32000)),
            ("hidden_size", json!(4096)),
            ("intermediate_size", json!(11008)),
            ("num_hidden_layers", json!(32)),
            ("num_attention_heads", json!(32)),
        ];
        let cfg = LlamaConfig::from_spec(&spec(&sizes)).unwrap();
        let flops = forward_cost(&cfg, Pass { batch: 1, seq: 1, cached: 0, logits: 1 }, 2).flops as f64;
        let parameters = 6_738_415_616. - 32000. * 4096.;
        assert!((flops / (2. * parameters) - 1.).abs() < 1e-3, "{flops:e}");
    }
}
