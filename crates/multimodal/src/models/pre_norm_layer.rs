//! A transformer layer with normalisation before each half, of which some rows alone may be wanted, and whose rows may
//! attend to a key beyond their own: what VideoMAE and ImageBind are made of.
//! Sources: ViT (arXiv:2010.11929); `add_bias_kv` of `torch.nn.MultiheadAttention`.

use candle_core::Tensor;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::Result;
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

/// The rows that a layer is to give. Of the others it computes keys and values alone.
#[derive(Debug, Clone)]
pub(crate) enum Rows {
    /// All.
    All,
    /// Neighbours, the same of each item.
    Range { start: usize, len: usize },
    /// Any, of (batch · seq).
    Picked(RowIndex),
}

impl Rows {
    /// These rows of `x`: (batch, seq, width) → (batch, rows, width).
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::All => Ok(x.clone()),
            Self::Range { start, len } => x.narrow(1, *start, *len)?.contiguous(),
            Self::Picked(index) => gather(x, index),
        }
    }
}

/// Attention with a product for the queries and one for keys and values.
pub(crate) struct SplitAttention {
    q: Linear,
    kv: Linear,
    /// (1, 1, 2 · hidden): a key and a value beside those of the rows.
    extra: Option<Tensor>,
    attention: Attention,
}

impl SplitAttention {
    /// From the layers of query, key and value, one below the other: `weight` (3 · hidden, hidden), `bias` (3 · hidden).
    /// `extra` (1, 1, 2 · hidden) is a key and a value that every query sees besides.
    pub(crate) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        extra: Option<Tensor>,
        attention: Attention,
    ) -> Result<Self> {
        let hidden = attention.heads * attention.head_dim;
        let part = |begin: usize, width: usize| {
            let bias = bias.map(|bias| bias.narrow(0, begin, width)).transpose()?;
            Linear::new(&weight.narrow(0, begin, width)?, bias.as_ref())
        };
        Ok(Self { q: part(0, hidden)?, kv: part(hidden, 2 * hidden)?, extra, attention })
    }

    /// (batch, queries, hidden) attend to (batch, seq, hidden).
    fn forward(&self, queries: &Tensor, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let (q, mut kv) = (self.q.forward(queries)?, self.kv.forward(x)?);
        let (batch, _, width) = kv.dims3()?;
        if let Some(extra) = &self.extra {
            kv = Tensor::cat(&[&kv, &extra.broadcast_as((batch, 1, width))?.contiguous()?], 1)?;
        }
        self.attention.forward(&q, &kv.narrow(2, 0, width / 2)?, &kv.narrow(2, width / 2, width / 2)?, mask)
    }
}

/// The layer, whose parts have other names in each family.
pub(crate) struct PreNormLayer {
    pub(crate) norm_before: LayerNorm,
    pub(crate) attention: SplitAttention,
    pub(crate) output: Linear,
    pub(crate) norm_after: LayerNorm,
    pub(crate) mlp: Mlp,
}

impl PreNormLayer {
    /// (batch, seq, hidden) → (batch, rows, hidden).
    pub(crate) fn forward(&self, x: &Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        let normed = self.norm_before.forward(x)?;
        let attended = self.attention.forward(&rows.of(&normed)?, &normed, mask)?;
        let x = self.output.forward_add(&attended, &rows.of(x)?)?;
        self.mlp.forward_add(&self.norm_after.forward(&x)?, &x)
    }
}

/// The sizes that the cost of a layer follows from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerSizes {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) inner: usize,
    /// The products of query, key and value have biases.
    pub(crate) qkv_bias: bool,
}

impl LayerSizes {
    pub(crate) fn attention(&self, pattern: Pattern) -> Attention {
        Attention { heads: self.heads, kv_heads: self.heads, head_dim: self.hidden / self.heads, scale: None, pattern }
    }

    /// FLOPs and bytes over (batch, seq) rows, of which `queries` an item are wanted; each head of an item has
    /// `visible_pairs` pairs of a query and a key.
    pub(crate) fn cost(&self, [batch, seq]: [u64; 2], queries: u64, visible_pairs: u64, bytes: u64) -> Cost {
        let [hidden, heads, inner] = [self.hidden, self.heads, self.inner].map(|size| size as u64);
        let (tokens, wanted) = (batch * seq, batch * queries);
        let linear = |rows, input, output, bias| cost::linear(rows, input, output, bias, bytes);
        let norm = |rows| cost::norm(Norm::Layer, rows, hidden, bytes);
        let residual = cost::elementwise(wanted * hidden, 1);
        let head_dim = hidden / heads;
        let attention = cost::Attention { batch, heads, kv_heads: heads, head_dim, queries, cached: 0, visible_pairs };
        norm(tokens)
            + linear(wanted, hidden, hidden, self.qkv_bias) // query
            + linear(tokens, hidden, 2 * hidden, self.qkv_bias) // key and value
            + attention.cost(bytes)
            + linear(wanted, hidden, hidden, true)
            + residual
            + norm(wanted)
            + linear(wanted, hidden, inner, true)
            + cost::elementwise(wanted * inner, 1) // the activation, one whichever it is
            + linear(wanted, inner, hidden, true)
            + residual
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device};
    use roofbench_nn::activation::Activation;

    use super::*;

    fn random(shape: &[usize]) -> Result<Tensor> {
        Tensor::randn(0f32, 0.3, shape, &Device::Cpu)
    }

    fn layer(sizes: &LayerSizes, extra: Option<Tensor>) -> Result<PreNormLayer> {
        let LayerSizes { hidden, inner, .. } = *sizes;
        let linear = |from, to| Linear::new(&random(&[to, from])?, Some(&random(&[to])?));
        let norm = || LayerNorm::new(&random(&[hidden])?, None, 1e-6);
        let (weight, bias) = (random(&[3 * hidden, hidden])?, random(&[3 * hidden])?);
        Ok(PreNormLayer {
            norm_before: norm()?,
            attention: SplitAttention::new(&weight, Some(&bias), extra, sizes.attention(Pattern::Full))?,
            output: linear(hidden, hidden)?,
            norm_after: norm()?,
            mlp: Mlp::new(linear(hidden, inner)?, Activation::Gelu, linear(inner, hidden)?)?,
        })
    }

    #[test]
    fn some_rows_are_those_of_all_and_cost_what_ran() -> Result<()> {
        let sizes = LayerSizes { hidden: 12, heads: 3, inner: 20, qkv_bias: true };
        let x = random(&[2, 5, 12])?;
        for (extra, keys) in [(None, 5), (Some(random(&[1, 1, 24])?), 6)] {
            let layer = layer(&sizes, extra)?;
            let run = |rows: &Rows, queries: u64| {
                let (y, recorded) = roofbench_nn::cost::record(|| layer.forward(&x, rows, None));
                assert_eq!(recorded.flops, sizes.cost([2, 5], queries, queries * keys, 4).flops);
                y
            };
            let all = run(&Rows::All, 5)?;
            let range = run(&Rows::Range { start: 2, len: 2 }, 2)?;
            let picked = run(&Rows::Picked(RowIndex::new(10, (2, 1), [Some(3), Some(5)])?), 1)?;
            let two = Tensor::cat(&[all.narrow(0, 0, 1)?.narrow(1, 3, 1)?, all.narrow(0, 1, 1)?.narrow(1, 0, 1)?], 0)?;
            for (some, of_all) in [(range, all.narrow(1, 2, 2)?), (picked, two)] {
                let error = (some - of_all)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(error < 1e-5, "{error}"); // sums of a dozen products of size 1 in another order
            }
        }
        Ok(())
    }

    #[test]
    fn an_extra_key_that_outweighs_all_others_decides() -> Result<()> {
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 2, scale: None, pattern: Pattern::Full };
        let weight = Tensor::cat(
            &[Tensor::eye(2, DType::F32, &Device::Cpu)?, Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?],
            0,
        )?;
        let extra = Tensor::new(&[[[100f32, 100., 7., 8.]]], &Device::Cpu)?;
        let split = SplitAttention::new(&weight, None, Some(extra), attention)?;
        let x = Tensor::ones((1, 3, 2), DType::F32, &Device::Cpu)?;
        let y = split.forward(&x, &x, None)?;
        assert_eq!(y.dims(), [1, 3, 2]);
        assert_eq!(y.narrow(D::Minus1, 0, 1)?.flatten_all()?.to_vec1::<f32>()?, [7.0; 3]);
        Ok(())
    }
}
