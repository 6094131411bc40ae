//! A transformer layer with normalisation before each half, as the towers of CLIP, of BLIP and of their successors have it.
//! Source: CLIP (arXiv:2103.00020).

use candle_nn::VarBuilder;
use roofbench_core::cost;
use roofbench_core::session::Result;
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern, SelfAttention};
use roofbench_nn::layer::{EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf};
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
    /// The sizes that costs follow from, for elements of so many bytes.
    pub fn cost(&self, bytes: u64) -> cost::Layer {
        let [hidden, heads, inner] =
            [self.hidden_size, self.num_attention_heads, self.intermediate_size].map(|size| size as u64);
        let qkv_bias = self.projections != Projections::Fused { bias: false };
        cost::Layer { hidden, heads, head_dim: hidden / heads, inner, qkv_bias, norm_before: true, bytes }
    }

    /// Reads `self_attn`, `mlp` and the norm before each, `layer_norm1` and `layer_norm2`. `some_rows`: some rows alone will
    /// be wanted.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(&self, some_rows: bool, vb: VarBuilder) -> Result<EncoderLayer> {
        let (hidden, heads, attn) = (self.hidden_size, self.num_attention_heads, vb.pp("self_attn"));
        let heads = Attention { heads, kv_heads: heads, head_dim: hidden / heads, scale: None, pattern: self.pattern };
        let (attention, projection) = match self.projections {
            Projections::Separate => {
                let load = if some_rows { SelfAttention::load_for_rows } else { SelfAttention::load };
                (load(hidden, heads, ["q_proj", "k_proj", "v_proj"], true, attn.clone())?, "out_proj")
            }
            Projections::Fused { bias } => {
                let qkv = attn.pp("qkv");
                let weight = qkv.get((3 * hidden, hidden), "weight")?;
                let bias = bias.then(|| qkv.get(3 * hidden, "bias")).transpose()?;
                (SelfAttention::from_weights(&weight, bias.as_ref(), heads, some_rows)?, "projection")
            }
        };
        let output = Linear::load(hidden, hidden, true, attn.pp(projection))?;
        let norm = |name: &str| LayerNorm::load(hidden, self.layer_norm_eps, vb.pp(name));
        let mlp = Mlp::load([hidden, self.intermediate_size], self.hidden_act, true, ["fc1", "fc2"], vb.pp("mlp"))?;
        Ok(EncoderLayer {
            attention: SelfAttentionHalf::new(attention, output, norm("layer_norm1")?, NormPlacement::Before),
            feed_forward: FeedForwardHalf::new(mlp, norm("layer_norm2")?, NormPlacement::Before),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use roofbench_core::cost::AttentionRows;
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
            let x = Tensor::randn(0f32, 1.0, (2, 5, 12), &Device::Cpu)?;
            let [(all, whole), (first, part)] = [None, Some(1)].map(|first: Option<usize>| {
                let vb = weights.var_builder(DType::F32, &Device::Cpu);
                let layer = cfg.load(first.is_some(), vb).expect("a layer");
                let (y, recorded) = roofbench_nn::cost::record(|| layer.forward(&x, &first.into(), None));
                let rows = AttentionRows::some(2, 5, first.unwrap_or(5) as u64);
                assert_eq!(recorded.flops, cfg.cost(4).encoder(rows).flops, "{projections:?}, {first:?}");
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
