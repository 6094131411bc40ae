//! A transformer layer with normalisation before each half, as the towers of CLIP, of BLIP and of their successors have it.
//! Source: CLIP (arXiv:2103.00020).

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::Result;
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, EncoderAttention, FirstRows, Mask, Pattern, SelfAttention};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

/// How a checkpoint holds the products of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    /// `q_proj`, `k_proj`, `v_proj` and `out_proj`, all with biases: CLIP.
    Separate,
    /// `qkv`, with biases or without, and `projection`: BLIP and BLIP-2.
    Fused {
        /// `qkv` has biases.
        bias: bool,
    },
}

/// The rows of a layer that are used behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All.
    All,
    /// The first, the class token, alone: nothing else is computed but its keys and values.
    First,
}

/// What a layer is made of; the names are those of config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderLayerConfig {
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
    /// Names of the products of attention.
    pub projections: Projections,
    /// Who sees whom.
    pub pattern: Pattern,
}

impl EncoderLayerConfig {
    fn attention(&self) -> Attention {
        let heads = self.num_attention_heads;
        Attention { heads, kv_heads: heads, head_dim: self.hidden_size / heads, scale: None, pattern: self.pattern }
    }

    /// FLOPs and bytes of a layer over (batch, seq) rows, of which `rows` are used.
    pub fn cost(&self, [batch, seq]: [u64; 2], rows: Rows, bytes: u64) -> Cost {
        let [hidden, inner, heads] =
            [self.hidden_size, self.intermediate_size, self.num_attention_heads].map(|size| size as u64);
        let queries = if rows == Rows::All { seq } else { 1 };
        let (tokens, used) = (batch * seq, batch * queries);
        let qkv_bias = self.projections != Projections::Fused { bias: false };
        let project = |rows, width| cost::linear(rows, hidden, width, qkv_bias, bytes);
        let norm = |rows| cost::norm(Norm::Layer, rows, hidden, bytes);
        let residual = cost::elementwise(used * hidden, 1);
        let visible_pairs = match self.pattern {
            Pattern::Full => cost::full_pairs(queries, seq),
            Pattern::Causal => cost::causal_pairs(seq, 0),
            Pattern::Sliding(window) => cost::window_pairs(seq, 0, Some(window as u64)),
        };
        let head_dim = hidden / heads;
        let attention = cost::Attention { batch, heads, kv_heads: heads, head_dim, queries, cached: 0, visible_pairs };
        norm(tokens)
            + project(used, hidden) // query
            + project(tokens, 2 * hidden) // key and value
            + attention.cost(bytes)
            + cost::linear(used, hidden, hidden, true, bytes)
            + residual
            + norm(used)
            + cost::linear(used, hidden, inner, true, bytes)
            + cost::elementwise(used * inner, 1) // the activation, one whichever it is
            + cost::linear(used, inner, hidden, true, bytes)
            + residual
    }
}

/// A layer: `self_attn`, `mlp` and the norm before each, `layer_norm1` and `layer_norm2`.
pub struct EncoderLayer {
    layer_norm1: LayerNorm,
    self_attn: EncoderAttention,
    projection: Linear,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl EncoderLayer {
    /// Reads a layer of which `rows` are used.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or one row is used of a layer in which it does not see all.
    pub fn load(cfg: &EncoderLayerConfig, rows: Rows, vb: VarBuilder) -> Result<Self> {
        let (hidden, attention, attn) = (cfg.hidden_size, cfg.attention(), vb.pp("self_attn"));
        let qkv = ["q_proj", "k_proj", "v_proj"];
        let (self_attn, projection) = match (cfg.projections, rows) {
            (Projections::Separate, Rows::All) => {
                (EncoderAttention::All(SelfAttention::load(hidden, attention, qkv, true, attn.clone())?), "out_proj")
            }
            (Projections::Separate, Rows::First) => {
                (EncoderAttention::First(FirstRows::load(hidden, attention, qkv, true, attn.clone())?), "out_proj")
            }
            (Projections::Fused { bias }, Rows::All) => {
                let qkv = Linear::load(hidden, 3 * hidden, bias, attn.pp("qkv"))?;
                (EncoderAttention::All(SelfAttention::new(qkv, attention)?), "projection")
            }
            (Projections::Fused { bias }, Rows::First) => {
                let qkv = attn.pp("qkv");
                let weight = qkv.get((3 * hidden, hidden), "weight")?;
                let bias = bias.then(|| qkv.get(3 * hidden, "bias")).transpose()?;
                let part = |begin: usize, width: usize| {
                    let bias = bias.as_ref().map(|bias| bias.narrow(0, begin, width)).transpose()?;
                    Linear::new(&weight.narrow(0, begin, width)?, bias.as_ref())
                };
                let attention = FirstRows::new(part(0, hidden)?, part(hidden, 2 * hidden)?, attention)?;
                (EncoderAttention::First(attention), "projection")
            }
        };
        let norm = |name: &str| LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(name));
        let sizes = [hidden, cfg.intermediate_size];
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            self_attn,
            projection: Linear::load(hidden, hidden, true, attn.pp(projection))?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load(sizes, cfg.hidden_act, true, ["fc1", "fc2"], vb.pp("mlp"))?,
        })
    }

    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden), or (batch, 1, hidden) where the first row alone is used.
    ///
    /// # Errors
    /// As for [`Attention::forward`].
    pub fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(x)?;
        let (attended, x) = self.self_attn.forward(&normed, x, Some(1), mask)?;
        let x = self.projection.forward_add(&attended, &x)?;
        self.mlp.forward_add(&self.layer_norm2.forward(&x)?, &x)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::weights::{HubOptions, Source, Weights};

    use super::*;

    #[test]
    fn the_first_row_alone_is_that_of_all_rows() -> Result<(), Box<dyn std::error::Error>> {
        for projections in
            [Projections::Separate, Projections::Fused { bias: true }, Projections::Fused { bias: false }]
        {
            let cfg = EncoderLayerConfig {
                hidden_size: 12,
                num_attention_heads: 3,
                intermediate_size: 20,
                hidden_act: Activation::Gelu,
                layer_norm_eps: 1e-5,
                projections,
                pattern: Pattern::Full,
            };
            let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], "Layer", &HubOptions::default())?;
            let load = |rows| EncoderLayer::load(&cfg, rows, weights.var_builder(DType::F32, &Device::Cpu));
            let x = Tensor::randn(0f32, 1.0, (2, 5, 12), &Device::Cpu)?;
            let [(all, whole), (first, part)] = [Rows::All, Rows::First].map(|rows| {
                let layer = load(rows).expect("a layer");
                let (y, recorded) = roofbench_nn::cost::record(|| layer.forward(&x, None));
                assert_eq!(recorded.flops, cfg.cost([2, 5], rows, 4).flops, "{projections:?}, {rows:?}");
                (y.expect("states"), recorded.flops)
            });
            assert_eq!(first.dims(), [2, 1, 12]);
            let error = (all.narrow(1, 0, 1)? - first)?.abs()?.max_all()?.to_scalar::<f32>()?;
            // sums of a dozen products of size 1 in another order
            assert!(error < 1e-5 && part < whole, "{projections:?}: {error}");
        }
        Ok(())
    }
}
