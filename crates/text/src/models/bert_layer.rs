//! The halves of a BERT layer, each normalised behind its residual: self-attention, attention to the states of another
//! model, feed-forward. BERT has the first and the last; text models that look at pictures put the second between them.
//! Sources: BERT (arXiv:1810.04805), BLIP's mixture of encoder and decoder (arXiv:2201.12086).

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::Result;
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

/// What the halves of a layer are made of; the names are those of config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BertLayerConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
}

impl BertLayerConfig {
    fn attention(&self, pattern: Pattern) -> Attention {
        let heads = self.num_attention_heads;
        Attention { heads, kv_heads: heads, head_dim: self.hidden_size / heads, scale: None, pattern }
    }

    fn hidden(&self) -> u64 {
        self.hidden_size as u64
    }

    fn linear_cost(&self, rows: u64, input: u64, bytes: u64) -> Cost {
        cost::linear(rows, input, self.hidden(), true, bytes)
    }

    /// A product back to the stream, the residual, the norm.
    fn output_cost(&self, rows: u64, input: u64, bytes: u64) -> Cost {
        self.linear_cost(rows, input, bytes)
            + cost::elementwise(rows * self.hidden(), 1)
            + cost::norm(Norm::Layer, rows, self.hidden(), bytes)
    }

    fn attention_cost(&self, [batch, queries, cached]: [u64; 3], visible_pairs: u64, bytes: u64) -> Cost {
        let heads = self.num_attention_heads as u64;
        let head_dim = self.hidden() / heads;
        cost::Attention { batch, heads, kv_heads: heads, head_dim, queries, cached, visible_pairs }.cost(bytes)
    }

    /// FLOPs and bytes of a [`SelfAttentionHalf`] over (batch, seq) rows behind `cached` others; `causal` where a row
    /// does not see those after it.
    pub fn self_attention_cost(&self, [batch, seq, cached]: [u64; 3], causal: bool, bytes: u64) -> Cost {
        let (rows, hidden) = (batch * seq, self.hidden());
        let pairs = if causal { cost::causal_pairs(seq, cached) } else { cost::full_pairs(seq, seq + cached) };
        self.linear_cost(rows, hidden, bytes) * 3 // query, key and value
            + self.attention_cost([batch, seq, cached], pairs, bytes)
            + self.output_cost(rows, hidden, bytes)
    }

    /// FLOPs and bytes of a [`CrossAttentionHalf`] over (batch, seq) rows that see `states` states an item of width
    /// `width`, whose keys and values this pass makes (`first`), or an earlier one did.
    pub fn cross_attention_cost(
        &self,
        [batch, seq]: [u64; 2],
        [states, width]: [u64; 2],
        first: bool,
        bytes: u64,
    ) -> Cost {
        let (rows, hidden) = (batch * seq, self.hidden());
        let (made, read) = match first {
            true => (self.linear_cost(batch * states, width, bytes) * 2, 0),
            false => (Cost::default(), states),
        };
        self.linear_cost(rows, hidden, bytes)
            + made
            + self.attention_cost([batch, seq, read], cost::full_pairs(seq, states), bytes)
            + self.output_cost(rows, hidden, bytes)
    }

    /// FLOPs and bytes of a [`FeedForwardHalf`] over `rows` rows.
    pub fn feed_forward_cost(&self, rows: u64, bytes: u64) -> Cost {
        let inner = self.intermediate_size as u64;
        cost::linear(rows, self.hidden(), inner, true, bytes)
            + cost::elementwise(rows * inner, 1) // the activation, one whichever it is
            + self.output_cost(rows, inner, bytes)
    }
}

/// A product back to the stream, its residual and the norm behind it: `output.dense` and `output.LayerNorm`.
struct Output {
    dense: Linear,
    layer_norm: LayerNorm,
}

impl Output {
    fn load(cfg: &BertLayerConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            dense: Linear::load(cfg.hidden_size, cfg.hidden_size, true, vb.pp("dense"))?,
            layer_norm: LayerNorm::load(cfg.hidden_size, cfg.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.layer_norm.forward(&self.dense.forward_add(x, residual)?)
    }
}

/// Self-attention: `attention.self` and `attention.output` of a layer.
pub struct SelfAttentionHalf {
    qkv: Linear,
    attention: Attention,
    output: Output,
}

impl SelfAttentionHalf {
    /// Reads `query`, `key` and `value` under `inner` of `vb` (BERT's `self`; the Q-Former says `attention`), and
    /// `output`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &BertLayerConfig, pattern: Pattern, inner: &str, vb: VarBuilder) -> Result<Self> {
        let hidden = cfg.hidden_size;
        let parts = ["query", "key", "value"].map(|name| (name, hidden));
        Ok(Self {
            qkv: Linear::load_fused(hidden, &parts, true, vb.pp(inner))?,
            attention: cfg.attention(pattern),
            output: Output::load(cfg, vb.pp("output"))?,
        })
    }

    /// Over whole sequences.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Attention::forward`].
    pub fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let [q, k, v] = self.attention.split(&self.qkv.forward(x)?)?;
        self.output.forward_add(&self.attention.forward(&q, &k, &v, mask)?, x)
    }

    /// Over the rows of a pass of `decoding`, as its layer number `layer`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Decoding::attend`].
    pub fn step(&self, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        self.step_as(self.attention.pattern, layer, x, decoding)
    }

    /// The same in a pass whose rows see each other by `pattern`, as those of pictures before text do.
    ///
    /// # Shapes
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub fn step_as(&self, pattern: Pattern, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let [q, k, v] = self.attention.split(&self.qkv.forward(x)?)?;
        let attention = Attention { pattern, ..self.attention };
        self.output.forward_add(&decoding.attend(layer, &attention, [&q, &k, &v], None)?, x)
    }

    /// Keeps the keys and values of a pass's rows (batch, seq, hidden) for later ones, and makes nothing else of them.
    ///
    /// # Errors
    /// As for [`Decoding::keep`].
    pub fn keep(&self, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<()> {
        let [_, k, v] = self.attention.split(&self.qkv.forward(x)?)?;
        decoding.keep(layer, [&k, &v])
    }
}

/// Attention to the states of another model: `crossattention` of a layer.
pub struct CrossAttentionHalf {
    query: Linear,
    key_value: Linear,
    attention: Attention,
    output: Output,
}

impl CrossAttentionHalf {
    /// As [`SelfAttentionHalf::load`], for states of width `states`.
    ///
    /// # Errors
    /// As there.
    pub fn load(cfg: &BertLayerConfig, states: usize, inner: &str, vb: VarBuilder) -> Result<Self> {
        let (hidden, part) = (cfg.hidden_size, vb.pp(inner));
        Ok(Self {
            query: Linear::load(hidden, hidden, true, part.pp("query"))?,
            key_value: Linear::load_fused(states, &[("key", hidden), ("value", hidden)], true, part)?,
            attention: cfg.attention(Pattern::Full),
            output: Output::load(cfg, vb.pp("output"))?,
        })
    }

    /// Over the rows of a pass, as layer number `layer` of those that look at `encoded`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Encoded::attend`].
    pub fn forward(&self, layer: usize, x: &Tensor, encoded: &mut Encoded) -> Result<Tensor> {
        let attended = encoded.attend(layer, &self.attention, &self.query.forward(x)?, &self.key_value)?;
        self.output.forward_add(&attended, x)
    }
}

/// The feed-forward half: `intermediate` and `output` of a layer.
pub struct FeedForwardHalf {
    mlp: Mlp,
    layer_norm: LayerNorm,
}

impl FeedForwardHalf {
    /// Reads the parts of `vb` that `names` gives, (`intermediate`, `output`) in BERT.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &BertLayerConfig, [up, down]: [&str; 2], vb: VarBuilder) -> Result<Self> {
        let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
        let up = Linear::load(hidden, inner, true, vb.pp(up).pp("dense"))?;
        let dense = Linear::load(inner, hidden, true, vb.pp(down).pp("dense"))?;
        Ok(Self {
            mlp: Mlp::new(up, cfg.hidden_act, dense)?,
            layer_norm: LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(down).pp("LayerNorm"))?,
        })
    }

    /// # Shapes
    /// (..., hidden) → (..., hidden).
    ///
    /// # Errors
    /// As for [`Mlp::forward_add`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.layer_norm.forward(&self.mlp.forward_add(x, x)?)
    }
}
