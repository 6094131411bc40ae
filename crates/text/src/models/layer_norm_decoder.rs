//! Decoders with layer norms, one product for query, key and value, and a plain feed-forward half: the wiring that
//! GPT-2, Falcon and MPT have in common. Their own files hold the config and the names, and say which norm and which
//! positions.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{ModelSpec, Result};
use roofbench_core::weights::AliasRule;
use roofbench_nn::activation;
use roofbench_nn::attention::Attention;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::relative_bias::Alibi;
use roofbench_nn::rope::{Rope, RopeTable};
use serde_json::Value;

use crate::causal::{CausalLm, DecoderShape, Pass};

/// What such a decoder's cost depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Distinct tokens.
    pub vocab: usize,
    /// Width of the stream.
    pub hidden: usize,
    /// Width inside the feed-forward half.
    pub inner: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Layer norms of a layer.
    pub norms: usize,
    /// The four products of a layer have biases.
    pub bias: bool,
    /// Elements of a head that are turned; 0 without rotary positions.
    pub rotary: usize,
    /// Each token adds the embedding of its position.
    pub learned_positions: bool,
    /// The most positions, where there is such a number.
    pub max_positions: Option<usize>,
}

impl Sizes {
    /// Width of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

/// How a token knows where it is.
pub(crate) enum Positions {
    /// An embedding of each is added to the token's.
    Learned(Embedding),
    /// Queries and keys are turned.
    Rotary(Rope),
    /// A bias on the scores.
    Alibi(Alibi),
}

/// What the feed-forward half reads.
pub(crate) enum MlpNorm {
    /// The stream after attention, normalised.
    After(LayerNorm),
    /// The stream before attention, normalised by itself: the halves run in parallel.
    Beside(LayerNorm),
    /// What attention reads: the halves run in parallel.
    Shared,
}

/// One layer; a family loads its parts by its own names.
pub(crate) struct Layer {
    pub attention_norm: LayerNorm,
    /// Gives query, key and value side by side.
    pub qkv: Linear,
    /// Largest magnitude of queries, keys and values.
    pub clip: Option<f32>,
    pub attention: Attention,
    pub output: Linear,
    pub mlp_norm: MlpNorm,
    pub mlp: Mlp,
}

/// What all layers of a pass read.
struct Shared {
    rope: Option<RopeTable>,
    bias: Option<Tensor>,
}

impl Layer {
    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, layer: usize, x: &Tensor, shared: &Shared, decoding: &mut Decoding) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let mut qkv = self.qkv.forward(&normed)?; // (batch, seq, queries + 2 * keys)
        if let Some(limit) = self.clip {
            qkv = activation::clip(&qkv, limit)?;
        }
        let [mut q, mut k, v] = self.attention.split(&qkv)?;
        if let Some(rope) = &shared.rope {
            (q, k) = (rope.rotate(q)?, rope.rotate(k)?);
        }
        let attended = decoding.attend(layer, &self.attention, [&q, &k, &v], shared.bias.as_ref())?;
        let sum = self.output.forward_add(&attended, x)?; // (batch, seq, hidden)
        match &self.mlp_norm {
            MlpNorm::After(norm) => self.mlp.forward_add(&norm.forward(&sum)?, &sum),
            MlpNorm::Beside(norm) => self.mlp.forward_add(&norm.forward(x)?, &sum),
            MlpNorm::Shared => self.mlp.forward_add(&normed, &sum),
        }
    }
}

/// `GPT2LMHeadModel`, `FalconForCausalLM` or `MptForCausalLM`.
pub struct LayerNormDecoder {
    pub(crate) sizes: Sizes,
    pub(crate) embeddings: Embedding,
    pub(crate) positions: Positions,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: LayerNorm,
    pub(crate) lm_head: Linear,
    /// Bytes of a weight.
    pub(crate) weight_bytes: u64,
}

impl CausalLm for LayerNormDecoder {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.sizes.vocab,
            layers: self.layers.len(),
            kv_width: self.sizes.kv_heads * self.sizes.head_dim(),
            window: None,
            max_positions: self.sizes.max_positions,
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.embeddings.forward(input_ids)
    }

    fn decode(&self, mut x: Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        let mut shared = Shared { rope: None, bias: None };
        match &self.positions {
            Positions::Learned(table) => {
                let positions = table.forward(&decoding.position_ids()?)?; // (1 or batch, seq, hidden)
                roofbench_nn::cost::elementwise(x.elem_count(), 1);
                x = x.broadcast_add(&positions)?;
            }
            Positions::Rotary(rope) => shared.rope = Some(decoding.rope(rope)?),
            Positions::Alibi(alibi) => shared.bias = Some(decoding.alibi(alibi)?),
        }
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, &shared, decoding)?; // (batch, seq, hidden)
        }
        self.norm.forward(&x)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(x)
    }

    fn cost(&self, pass: Pass) -> Cost {
        forward_cost(&self.sizes, pass, self.weight_bytes)
    }
}

/// The embeddings and the output layer, which are one matrix where they are tied.
pub(crate) fn vocabulary(
    sizes: &Sizes,
    tied: bool,
    embeddings: VarBuilder,
    lm_head: VarBuilder,
) -> Result<(Embedding, Linear)> {
    let Sizes { vocab, hidden, .. } = *sizes;
    match tied {
        true => Embedding::load_tied(vocab, hidden, embeddings),
        false => Ok((Embedding::load(vocab, hidden, embeddings)?, Linear::load(hidden, vocab, false, lm_head)?)),
    }
}

/// `rules`, the last of which is for an output matrix that is the embeddings', where `spec` ties them (as its class
/// does where config.json says nothing).
pub(crate) fn aliases(spec: &ModelSpec, rules: &'static [AliasRule]) -> &'static [AliasRule] {
    let untied = spec.config.get("tie_word_embeddings") == Some(&Value::Bool(false));
    &rules[..rules.len() - usize::from(untied)]
}

/// FLOPs and bytes of one pass, all of whose tokens exist.
pub(crate) fn forward_cost(sizes: &Sizes, pass: Pass, bytes: u64) -> Cost {
    let Pass { batch, seq, cached, logits } = pass;
    let [hidden, inner, heads, kv_heads, head_dim, vocab, rotary] =
        [sizes.hidden, sizes.inner, sizes.heads, sizes.kv_heads, sizes.head_dim(), sizes.vocab, sizes.rotary]
            .map(|size| size as u64);
    let tokens = batch * seq;
    let linear = |input, output| cost::linear(tokens, input, output, sizes.bias, bytes);
    let norm = cost::norm(Norm::Layer, tokens, hidden, bytes);
    let residual = cost::elementwise(tokens * hidden, 1);
    let visible_pairs = cost::causal_pairs(seq, cached);
    let attention = cost::Attention { batch, heads, kv_heads, head_dim, queries: seq, cached, visible_pairs };
    let layer = norm * sizes.norms as u64
        + linear(hidden, hidden + 2 * kv_heads * head_dim) // query, key and value
        + cost::elementwise(tokens * (heads + kv_heads) * rotary, 3) // two products and a sum per turned element
        + attention.cost(bytes)
        + linear(hidden, hidden) + residual
        + linear(hidden, inner) + cost::elementwise(tokens * inner, 1) // and activation
        + linear(inner, hidden) + residual;
    let positions = (cost::embedding(tokens, hidden, bytes) + residual) * u64::from(sizes.learned_positions);
    cost::embedding(tokens, hidden, bytes)
        + positions
        + layer * sizes.layers as u64
        + norm
        + cost::linear(batch * logits, hidden, vocab, false, bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::Engine;

    use super::*;

    /// A spec of `config` with some fields changed.
    pub(crate) fn spec(family: &str, config: &Value, changes: &[(&str, Value)]) -> ModelSpec {
        let mut config = config.clone();
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        ModelSpec {
            family: family.into(),
            class: String::new(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    /// The FLOPs of a token over 2 per parameter that it is multiplied with (arXiv:2001.08361, table 1).
    pub(crate) fn flops_over_parameters(sizes: &Sizes, parameters: u64) -> f64 {
        let pass = Pass { batch: 1, seq: 1, cached: 0, logits: 1 };
        forward_cost(sizes, pass, 2).flops as f64 / (2 * parameters) as f64
    }

    /// One layer of two heads of 4 that share one of keys and values; 2 items of 3 tokens behind 5.
    #[test]
    fn cost_by_hand() {
        let sizes = Sizes {
            vocab: 10,
            hidden: 8,
            inner: 6,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            norms: 2,
            bias: true,
            rotary: 4,
            learned_positions: true,
            max_positions: None,
        };
        let pass = Pass { batch: 2, seq: 3, cached: 5, logits: 1 };
        let pairs = 2 * 2 * (3 * 5 + 6); // items, heads, pairs
        let layer = 2 * 6 * (7 * 8) // norms: 7 per element
            + 6 * (2 * 8 * 16 + 16) + 6 * 12 * 3 // query, key, value; query and key turned
            + 4 * pairs * 4 + 5 * pairs
            + 6 * (2 * 8 * 8 + 8) + 6 * 8
            + 6 * (2 * 8 * 6 + 6) + 6 * 6 + 6 * (2 * 6 * 8 + 8) + 6 * 8;
        let outside = 6 * 8 + 6 * (7 * 8) + 2 * 2 * 8 * 10; // positions added, the last norm, the scores
        let cost = forward_cost(&sizes, pass, 2);
        assert_eq!(cost.flops, layer + outside);
        let weights = 2 * 6 * 8 + 3 * 16 + (8 * 16 + 16) + (8 * 8 + 8) + (8 * 6 + 6) + (6 * 8 + 8) + 8 * 10;
        assert_eq!(cost.weight_bytes, 2 * weights);
        assert_eq!(cost.kv_bytes, 2 * 2 * 2 * 5 * 4);
        // without biases, turning, positions, and a norm
        let plain = Sizes { norms: 1, bias: false, rotary: 0, learned_positions: false, ..sizes };
        let less = 6 * (7 * 8) + 6 * (16 + 8 + 6 + 8) + 6 * 12 * 3 + 6 * 8;
        assert_eq!(forward_cost(&plain, pass, 2).flops, cost.flops - less);
    }
}
