//! The halves of a transformer layer — attention to itself, attention to the states of another model, feed-forward — each
//! with its residual, and its normalisation before or behind.
//! Sources: post-norm arXiv:1706.03762, pre-norm arXiv:2002.04745.

use candle_core::{Result, Tensor};

use crate::attention::{Attention, Mask, Pattern, Rows, SelfAttention};
use crate::cross_attention::Encoded;
use crate::decoding::Decoding;
use crate::linear::Linear;
use crate::mlp::{GatedMlp, Mlp};
use crate::norm::LayerNorm;

/// Where a half is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// x + f(norm(x)).
    Before,
    /// norm(x + f(x)).
    Behind,
}

/// The normalisation of a half.
#[derive(Clone)]
struct Around {
    norm: LayerNorm,
    placement: NormPlacement,
}

impl Around {
    /// `f` makes the half's result of its input and adds it to the stream, the second argument.
    fn run(&self, x: &Tensor, f: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        match self.placement {
            NormPlacement::Before => f(&self.norm.forward(x)?, x),
            NormPlacement::Behind => self.norm.forward(&f(x, x)?),
        }
    }
}

/// Attention of the rows to each other.
#[derive(Clone)]
pub struct SelfAttentionHalf {
    attention: SelfAttention,
    output: Linear,
    around: Around,
}

impl SelfAttentionHalf {
    /// From its layers.
    pub fn new(attention: SelfAttention, output: Linear, norm: LayerNorm, placement: NormPlacement) -> Self {
        Self { attention, output, around: Around { norm, placement } }
    }

    /// Over whole sequences.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`SelfAttention::forward`].
    pub fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        self.forward_of(x, &Rows::All, mask)
    }

    /// The same of some rows alone. `mask` is the one of all.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, rows, hidden).
    ///
    /// # Errors
    /// As for [`SelfAttention::forward_of`].
    pub fn forward_of(&self, x: &Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        self.around
            .run(x, |x, stream| self.output.forward_add(&self.attention.forward_of(x, rows, mask)?, &rows.of(stream)?))
    }

    /// With a mask that is made of the input and of the queries, (batch, seq, hidden) each.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// Those of `mask`, and as for [`Attention::forward`].
    pub fn forward_with(
        &self,
        x: &Tensor,
        mask: impl FnOnce(&Tensor, &Tensor) -> Result<Option<Mask>>,
    ) -> Result<Tensor> {
        self.around.run(x, |x, stream| {
            let [q, k, v] = self.attention.qkv(x)?;
            let attended = self.attention.attention().forward(&q, &k, &v, mask(x, &q)?.as_ref())?;
            self.output.forward_add(&attended, stream)
        })
    }

    /// Over the rows of a pass of `decoding`, as its layer number `layer`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Decoding::attend`].
    pub fn step(&self, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        self.step_as(self.attention.attention().pattern, layer, x, decoding)
    }

    /// The same in a pass whose rows see each other by `pattern`, as those of pictures before text do.
    ///
    /// # Shapes
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub fn step_as(&self, pattern: Pattern, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<Tensor> {
        self.around.run(x, |x, stream| {
            let [q, k, v] = self.attention.qkv(x)?;
            let attention = Attention { pattern, ..*self.attention.attention() };
            self.output.forward_add(&decoding.attend(layer, &attention, [&q, &k, &v], None)?, stream)
        })
    }

    /// Keeps the keys and values of a pass's rows (batch, seq, hidden) for later ones, and makes nothing else of them.
    ///
    /// # Errors
    /// As for [`Decoding::keep`].
    pub fn keep(&self, layer: usize, x: &Tensor, decoding: &mut Decoding) -> Result<()> {
        let normed = match self.around.placement {
            NormPlacement::Before => self.around.norm.forward(x)?,
            NormPlacement::Behind => x.clone(),
        };
        let [_, k, v] = self.attention.qkv(&normed)?;
        decoding.keep(layer, [&k, &v])
    }
}

/// Attention of the rows to the states of another model.
#[derive(Clone)]
pub struct CrossAttentionHalf {
    query: Linear,
    key_value: Linear,
    attention: Attention,
    output: Linear,
    around: Around,
}

impl CrossAttentionHalf {
    /// From its layers, of which the second gives key and value side by side.
    pub fn new(
        [query, key_value, output]: [Linear; 3],
        attention: Attention,
        norm: LayerNorm,
        placement: NormPlacement,
    ) -> Self {
        Self { query, key_value, attention, output, around: Around { norm, placement } }
    }

    /// Over the rows of a pass, as layer number `layer` of those that look at `encoded`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Encoded::attend`].
    pub fn step(&self, layer: usize, x: &Tensor, encoded: &mut Encoded) -> Result<Tensor> {
        self.around.run(x, |x, stream| {
            let attended = encoded.attend(layer, &self.attention, &self.query.forward(x)?, &self.key_value)?;
            self.output.forward_add(&attended, stream)
        })
    }
}

/// What a feed-forward half computes.
#[derive(Clone)]
pub enum FeedForward {
    /// Two products.
    Plain(Mlp),
    /// Three, one of them a gate.
    Gated(GatedMlp),
}

impl From<Mlp> for FeedForward {
    fn from(mlp: Mlp) -> Self {
        Self::Plain(mlp)
    }
}

impl From<GatedMlp> for FeedForward {
    fn from(mlp: GatedMlp) -> Self {
        Self::Gated(mlp)
    }
}

impl FeedForward {
    /// Of `x`, plus `residual`.
    ///
    /// # Shapes
    /// (..., dim), (..., dim) → (..., dim).
    ///
    /// # Errors
    /// As for [`Linear::forward_add`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(mlp) => mlp.forward_add(x, residual),
            Self::Gated(mlp) => mlp.forward_add(x, residual),
        }
    }
}

/// The feed-forward half.
#[derive(Clone)]
pub struct FeedForwardHalf {
    feed_forward: FeedForward,
    around: Around,
}

impl FeedForwardHalf {
    /// From its layers.
    pub fn new(feed_forward: impl Into<FeedForward>, norm: LayerNorm, placement: NormPlacement) -> Self {
        Self { feed_forward: feed_forward.into(), around: Around { norm, placement } }
    }

    /// # Shapes
    /// (..., hidden) → (..., hidden).
    ///
    /// # Errors
    /// As for [`FeedForward::forward_add`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.around.run(x, |x, stream| self.feed_forward.forward_add(x, stream))
    }
}

/// A layer of an encoder: attention and feed-forward.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use roofbench_nn::activation::Activation;
/// use roofbench_nn::attention::{Attention, Pattern, Rows, SelfAttention};
/// use roofbench_nn::layer::{EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf};
/// use roofbench_nn::linear::Linear;
/// use roofbench_nn::mlp::Mlp;
/// use roofbench_nn::norm::LayerNorm;
///
/// let linear = |rows, columns| Linear::new(&Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?, None);
/// let norm = || LayerNorm::new(&Tensor::ones(2, DType::F32, &Device::Cpu)?, None, 1e-5);
/// let attention = Attention { heads: 1, kv_heads: 1, head_dim: 2, scale: None, pattern: Pattern::Full };
/// let attention = SelfAttention::new(linear(6, 2)?, attention)?;
/// let mlp = Mlp::new(linear(3, 2)?, Activation::Relu, linear(2, 3)?)?;
/// let layer = EncoderLayer {
///     attention: SelfAttentionHalf::new(attention, linear(2, 2)?, norm()?, NormPlacement::Before),
///     feed_forward: FeedForwardHalf::new(mlp, norm()?, NormPlacement::Before),
/// };
/// let x = Tensor::new(&[[[1f32, 3.], [0., 8.]]], &Device::Cpu)?;
/// // normalised rows add up to 0, so that neither half adds anything
/// let first = layer.forward(&x, &Rows::Range { start: 0, len: 1 }, None)?;
/// assert_eq!(first.to_vec3::<f32>()?, [[[1., 3.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct EncoderLayer {
    /// The first half.
    pub attention: SelfAttentionHalf,
    /// The second.
    pub feed_forward: FeedForwardHalf,
}

impl EncoderLayer {
    /// The wanted rows. `mask` is the one of all rows.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, rows, hidden).
    ///
    /// # Errors
    /// As for [`SelfAttention::forward_of`].
    pub fn forward(&self, x: &Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        self.feed_forward.forward(&self.attention.forward_of(x, rows, mask)?)
    }
}

/// Layers one after the other, of the last of which `rows` alone are wanted.
///
/// # Shapes
/// (batch, seq, hidden) → (batch, rows, hidden).
///
/// # Errors
/// As for [`EncoderLayer::forward`].
pub fn encode(layers: &[EncoderLayer], mut x: Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
    let Some((last, layers)) = layers.split_last() else { return Ok(x) };
    for layer in layers {
        x = layer.forward(&x, &Rows::All, mask)?;
    }
    last.forward(&x, rows, mask)
}

/// A layer of a decoder that looks at an encoder's states.
#[derive(Clone)]
pub struct DecoderLayer {
    /// The first part.
    pub self_attention: SelfAttentionHalf,
    /// The second.
    pub cross_attention: CrossAttentionHalf,
    /// The third.
    pub feed_forward: FeedForwardHalf,
}

impl DecoderLayer {
    /// Over the rows of a pass of `decoding`, as layer number `layer`.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, seq, hidden).
    ///
    /// # Errors
    /// As for [`Decoding::attend`] and [`Encoded::attend`].
    pub fn step(&self, layer: usize, x: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let x = self.self_attention.step(layer, x, decoding)?;
        self.feed_forward.forward(&self.cross_attention.step(layer, &x, encoded)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::activation::Activation;
    use crate::kv_cache::Shape;

    fn random(shape: &[usize]) -> Result<Tensor> {
        Tensor::randn(0f32, 0.3, shape, &Device::Cpu)
    }

    fn linear(from: usize, to: usize) -> Result<Linear> {
        Linear::new(&random(&[to, from])?, Some(&random(&[to])?))
    }

    fn attention(pattern: Pattern) -> Attention {
        Attention { heads: 3, kv_heads: 3, head_dim: 4, scale: None, pattern }
    }

    fn layer(placement: NormPlacement, pattern: Pattern) -> Result<DecoderLayer> {
        let norm = || LayerNorm::new(&random(&[12])?, Some(&random(&[12])?), 1e-6);
        let qkv = SelfAttention::new(linear(12, 36)?, attention(pattern))?;
        let cross = [linear(12, 12)?, linear(7, 24)?, linear(12, 12)?];
        let mlp = Mlp::new(linear(12, 20)?, Activation::Gelu, linear(20, 12)?)?;
        Ok(DecoderLayer {
            self_attention: SelfAttentionHalf::new(qkv, linear(12, 12)?, norm()?, placement),
            cross_attention: CrossAttentionHalf::new(cross, attention(Pattern::Full), norm()?, placement),
            feed_forward: FeedForwardHalf::new(mlp, norm()?, placement),
        })
    }

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.max_all()?.to_scalar::<f32>()
    }

    #[test]
    fn some_rows_and_steps_are_those_of_whole_sequences() -> Result<()> {
        let x = random(&[2, 5, 12])?;
        for placement in [NormPlacement::Before, NormPlacement::Behind] {
            let full = layer(placement, Pattern::Full)?;
            let encoder = EncoderLayer { attention: full.self_attention, feed_forward: full.feed_forward };
            let all = encoder.forward(&x, &Rows::All, None)?;
            let rows = Rows::Range { start: 1, len: 2 };
            assert!(difference(&encoder.forward(&x, &rows, None)?, &rows.of(&all)?)? < 1e-5);
            assert!(
                difference(
                    &encoder.attention.forward_with(&x, |_, _| Ok(None))?,
                    &encoder.attention.forward(&x, None)?
                )? < 1e-5
            );

            let causal = layer(placement, Pattern::Causal)?;
            let states = random(&[2, 4, 7])?;
            let run = |mut decoding: Decoding, parts: &[(usize, usize)]| {
                let mut encoded = Encoded::new(states.clone(), None, 1)?;
                let steps = parts.iter().map(|&(at, seq)| {
                    decoding.advance(seq)?;
                    causal.step(0, &x.narrow(1, at, seq)?.contiguous()?, &mut decoding, &mut encoded)
                });
                Tensor::cat(&steps.collect::<Result<Vec<_>>>()?, 1)
            };
            let room =
                || Decoding::cached(1, Shape { batch: 2, positions: 5, width: 12 }, None, DType::F32, &Device::Cpu);
            let whole = run(room()?, &[(0, 5)])?;
            assert!(difference(&run(room()?, &[(0, 2), (2, 1), (3, 2)])?, &whole)? < 1e-5);
            // keys and values that were kept alone
            let mut kept = room()?;
            kept.advance(4)?;
            causal.self_attention.keep(0, &x.narrow(1, 0, 4)?.contiguous()?, &mut kept)?;
            let last = run(kept, &[(4, 1)])?;
            assert!(difference(&last, &whole.narrow(1, 4, 1)?)? < 1e-5);
        }
        Ok(())
    }

    #[test]
    fn placement_decides() -> Result<()> {
        let x = random(&[1, 2, 12])?;
        let mut layer = layer(NormPlacement::Behind, Pattern::Full)?;
        let behind = layer.feed_forward.forward(&x)?;
        layer.feed_forward.around.placement = NormPlacement::Before;
        assert!(difference(&behind, &layer.feed_forward.forward(&x)?)? > 1e-3);
        Ok(())
    }
}
