//! Attention of a decoder to an encoder's states, of which each layer makes keys and values once, in its first pass.

use candle_core::{Result, Tensor, bail};

use crate::attention::{Attention, Mask};
use crate::kv_cache::CrossCache;
use crate::linear::Linear;

/// The states of an encoder, and what the layers of a decoder have made of them.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::attention::{Attention, Pattern};
/// use roofbench_nn::cross_attention::Encoded;
/// use roofbench_nn::linear::Linear;
///
/// let states = Tensor::new(&[[[1f32], [3.], [9.]]], &Device::Cpu)?; // (batch, states, hidden)
/// let mask = Tensor::new(&[[1i64, 1, 0]], &Device::Cpu)?; // the third does not exist
/// let mut encoded = Encoded::new(states, Some(&mask), 1)?;
/// let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, scale: None, pattern: Pattern::Full };
/// let kv_proj = Linear::new(&Tensor::new(&[[0f32], [10.]], &Device::Cpu)?, None)?; // key, then value
/// let q = Tensor::new(&[[[1f32]]], &Device::Cpu)?; // (batch, queries, heads · head_dim)
/// let y = encoded.attend(0, &attention, &q, &kv_proj)?; // equal scores: the mean of 10 and 30
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [20.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Encoded {
    states: Tensor,
    mask: Option<Mask>,
    caches: Vec<CrossCache>,
}

impl Encoded {
    /// States (batch, states, hidden) for a decoder of `layers` layers. `attention_mask` (batch, states) is 0 where one
    /// does not exist.
    ///
    /// # Errors
    /// When the states or the mask have another number of dimensions.
    pub fn new(states: Tensor, attention_mask: Option<&Tensor>, layers: usize) -> Result<Self> {
        states.dims3()?;
        let mask = attention_mask.map(Mask::padding).transpose()?.flatten();
        Ok(Self { states, mask, caches: (0..layers).map(|_| CrossCache::new()).collect() })
    }

    /// The states, (batch, states, hidden).
    pub fn states(&self) -> &Tensor {
        &self.states
    }

    /// Attention of the queries of layer `layer` to the states. `kv_proj` gives keys and values side by side, and is
    /// asked the first time only.
    ///
    /// # Shapes
    /// `q` and the result are (batch, queries, heads · head_dim); `kv_proj` goes from hidden to 2 · kv_heads ·
    /// head_dim.
    ///
    /// # Errors
    /// When there is no such layer; as for [`Linear::forward`] and [`Attention::forward`].
    pub fn attend(&mut self, layer: usize, attention: &Attention, q: &Tensor, kv_proj: &Linear) -> Result<Tensor> {
        let layers = self.caches.len();
        let Some(cache) = self.caches.get_mut(layer) else { bail!("layer {layer} of a decoder of {layers}") };
        let width = attention.kv_heads * attention.head_dim;
        let (keys, values) = cache.get_or_make(|| {
            let kv = kv_proj.forward(&self.states)?; // (batch, states, 2 · width)
            Ok((kv.narrow(2, 0, width)?, kv.narrow(2, width, width)?))
        })?;
        attention.forward(q, &keys, &values, self.mask.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::attention::Pattern;

    #[test]
    fn keys_and_values_are_made_once() -> Result<()> {
        let cpu = &Device::Cpu;
        let attention = Attention { heads: 2, kv_heads: 2, head_dim: 2, scale: None, pattern: Pattern::Full };
        let kv_proj = Linear::new(&Tensor::randn(0f32, 1.0, (8, 3), cpu)?, None)?;
        let states = Tensor::randn(0f32, 1.0, (2, 5, 3), cpu)?;
        let mut encoded = Encoded::new(states.clone(), None, 2)?;
        let q = Tensor::randn(0f32, 1.0, (2, 1, 4), cpu)?;
        let flops = |encoded: &mut Encoded, layer| {
            let (y, recorded) = crate::cost::record(|| encoded.attend(layer, &attention, &q, &kv_proj));
            y.map(|y| (y, recorded.flops))
        };
        let (first, whole) = flops(&mut encoded, 0)?;
        let (again, step) = flops(&mut encoded, 0)?;
        assert_eq!(first.to_vec3::<f32>()?, again.to_vec3::<f32>()?);
        assert_eq!(whole - step, 2 * 2 * 5 * 3 * 8);
        assert_eq!(flops(&mut encoded, 1)?.1, whole); // each layer has its own
        assert!(encoded.attend(2, &attention, &q, &kv_proj).unwrap_err().to_string().contains("layer 2"));
        assert_eq!(encoded.states().dims(), [2, 5, 3]);
        let kv = kv_proj.forward(&states)?;
        let expected = attention.forward(&q, &kv.narrow(2, 0, 4)?, &kv.narrow(2, 4, 4)?, None)?;
        assert_eq!(first.to_vec3::<f32>()?, expected.to_vec3::<f32>()?);
        assert!(Encoded::new(Tensor::zeros((2, 5), DType::F32, cpu)?, None, 1).is_err());
        Ok(())
    }
}
