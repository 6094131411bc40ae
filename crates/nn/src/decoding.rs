//! Passes of a decoder over one batch of sequences: at which positions the rows of a pass are, which keys exist, and the
//! keys and values of earlier passes.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::attention::{Attention, Mask};
use crate::kv_cache::{KvCache, Shape};
use crate::relative_bias::Alibi;
use crate::rope::{Positions, Rope, RopeTable};

/// What the layers of a decoder share in a pass, and keep between passes.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use roofbench_nn::attention::{Attention, Pattern};
/// use roofbench_nn::decoding::Decoding;
/// use roofbench_nn::kv_cache::Shape;
///
/// let shape = Shape { batch: 1, positions: 2, width: 1 };
/// let mut decoding = Decoding::cached(1, shape, None, DType::F32, &Device::Cpu)?;
/// let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, scale: None, pattern: Pattern::Causal };
/// let row = |x: f32| Tensor::new(&[[[x]]], &Device::Cpu); // (batch, seq, heads · head_dim)
/// for (value, expected) in [(2., 2.), (4., 3.)] {
///     decoding.advance(1)?;
///     // equal scores: the mean of the values so far
///     let y = decoding.attend(0, &attention, [&row(0.)?, &row(0.)?, &row(value)?], None)?;
///     assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [expected]);
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoding {
    batch: usize,
    device: Device,
    /// One per layer; none where nothing is kept.
    caches: Vec<KvCache>,
    /// Which keys exist, an item after the other; all where absent.
    exists: Option<Vec<Vec<u32>>>,
    /// Positions of the current pass, an item after the other; from `past` on where absent.
    positions: Option<Vec<u32>>,
    /// Positions before the current pass.
    past: usize,
    /// Rows of the current pass.
    seq: usize,
    /// The existing keys of the current pass from `from` on.
    padding: Option<(usize, Option<Mask>)>,
}

impl Decoding {
    /// One pass over (batch, seq) rows, of which nothing is kept. `attention_mask` (batch, seq) is 0 where a token does not
    /// exist; positions count from 0 whatever it says, unless [`with_positions`](Self::with_positions) gives them, as
    /// the library's `forward` has it.
    ///
    /// # Errors
    /// When the mask has another shape.
    pub fn once(batch: usize, seq: usize, attention_mask: Option<&Tensor>, device: &Device) -> Result<Self> {
        let exists = attention_mask.map(|mask| existing(mask, batch, seq)).transpose()?.flatten();
        let (caches, device) = (Vec::new(), device.clone());
        Ok(Self { batch, device, caches, exists, positions: None, past: 0, seq, padding: None })
    }

    /// Room for the keys and values of `layers` layers. With a `window` no more of them is kept than it sees.
    ///
    /// # Errors
    /// As for [`KvCache::new`].
    pub fn cached(layers: usize, shape: Shape, window: Option<usize>, dtype: DType, device: &Device) -> Result<Self> {
        let caches = (0..layers).map(|_| KvCache::new(shape, window, dtype, device)).collect::<Result<_>>()?;
        let (batch, device) = (shape.batch, device.clone());
        Ok(Self { batch, device, caches, exists: None, positions: None, past: 0, seq: 0, padding: None })
    }

    /// Says which tokens of the prompt exist, (batch, seq) of 0 and 1: what follows the prompt does. Positions count the
    /// existing ones, as the library's `generate` has it.
    ///
    /// # Errors
    /// When the mask has another number of dimensions or items.
    pub fn with_attention_mask(mut self, attention_mask: &Tensor) -> Result<Self> {
        let (_, seq) = attention_mask.dims2()?;
        self.exists = existing(attention_mask, self.batch, seq)?;
        Ok(self)
    }

    /// Sets the positions of the current pass, (1 or batch, seq).
    ///
    /// # Errors
    /// When the shape is another, or a position is negative.
    pub fn with_positions(mut self, position_ids: &Tensor) -> Result<Self> {
        let (items, seq) = position_ids.dims2()?;
        if ![1, self.batch].contains(&items) || seq != self.seq {
            let expected = [self.batch, self.seq];
            bail!("positions have shape {:?}, expected {expected:?}, or 1 for all items", position_ids.dims())
        }
        let ids = position_ids.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let ids = ids.into_iter().map(|id| u32::try_from(id).map_err(candle_core::Error::wrap));
        self.positions = Some(ids.collect::<Result<_>>()?);
        Ok(self)
    }

    /// Begins the pass over the next `seq` rows.
    ///
    /// # Errors
    /// When the first pass has not the rows that the mask is for.
    pub fn advance(&mut self, seq: usize) -> Result<()> {
        self.past += self.seq;
        self.seq = seq;
        self.padding = None;
        let keys = self.past + seq;
        if let Some(exists) = &mut self.exists {
            let mut positions = Vec::with_capacity(self.batch * seq);
            for row in exists {
                if self.past == 0 && row.len() != keys {
                    bail!("the attention mask has {} places, the prompt {keys}", row.len())
                }
                row.resize(keys, 1);
                let before: u32 = row[..self.past].iter().sum();
                positions.extend(row[self.past..].iter().scan(before, |count, exists| {
                    *count += exists;
                    Some(count.saturating_sub(1) * exists)
                }));
            }
            self.positions = Some(positions);
        }
        Ok(())
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Rows of the current pass.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Positions before the current pass.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Cosines and sines of the current pass.
    ///
    /// # Errors
    /// As for [`Rope::table`].
    pub fn rope(&self, rope: &Rope) -> Result<RopeTable> {
        let positions = match &self.positions {
            Some(positions) => Positions::PerItem { positions, seq: self.seq },
            None => Positions::From(self.past, self.seq),
        };
        rope.table(positions, &self.device)
    }

    /// The positions of the current pass, (1 or batch, seq) of u32, for a table of learned ones.
    ///
    /// # Errors
    /// Candle's, when memory on the device cannot be had.
    pub fn position_ids(&self) -> Result<Tensor> {
        match &self.positions {
            Some(positions) => Tensor::from_slice(positions, (positions.len() / self.seq, self.seq), &self.device),
            None => Tensor::arange(self.past as u32, (self.past + self.seq) as u32, &self.device)?.unsqueeze(0),
        }
    }

    /// The rows of the current pass in a table of learned positions that holds position 0 in row `offset`, which is at
    /// least 1: (1 or batch, seq) of u32. Other than in [`position_ids`](Self::position_ids) positions count the tokens
    /// that exist in a pass of [`once`](Self::once) too, and one that does not exist has the row before `offset` there,
    /// as OPT has it.
    ///
    /// # Errors
    /// Candle's, when memory on the device cannot be had.
    pub fn counted_position_rows(&self, offset: u32) -> Result<Tensor> {
        let rows: Vec<u32> = match (&self.positions, &self.exists) {
            (Some(positions), _) => positions.iter().map(|position| offset + position).collect(),
            (None, Some(exists)) => {
                let row = |count: &mut u32, exists: &u32| {
                    *count += exists;
                    Some(offset + *count * exists - 1)
                };
                exists.iter().flat_map(|exists| exists.iter().scan(0, row)).collect()
            }
            (None, None) => (self.past..self.past + self.seq).map(|position| offset + position as u32).collect(),
        };
        let items = rows.len() / self.seq;
        Tensor::from_vec(rows, (items, self.seq), &self.device)
    }

    /// The bias of `alibi` on all keys of the current pass, for [`attend`](Self::attend): (1 or batch, heads, 1, keys).
    ///
    /// # Errors
    /// Candle's, when memory on the device cannot be had.
    pub fn alibi(&self, alibi: &Alibi) -> Result<Tensor> {
        match &self.exists {
            Some(rows) => alibi.bias_masked(&Tensor::new(rows.clone(), &self.device)?),
            None => alibi.bias(self.past + self.seq, &self.device),
        }
    }

    /// Attention of the rows of this pass in layer `layer` to themselves and to what they see of earlier ones, whose keys
    /// and values it keeps. `bias` is added to the scaled scores.
    ///
    /// # Shapes
    /// Queries, keys and values are (batch, seq, heads · head_dim), as for [`Attention::forward`], the bias (1 or batch, 1
    /// or heads, 1 or seq, keys); the result is as the queries.
    ///
    /// # Errors
    /// As for [`Attention::forward`] and [`KvCache::append`].
    pub fn attend(
        &mut self,
        layer: usize,
        attention: &Attention,
        [q, k, v]: [&Tensor; 3],
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let layers = self.caches.len();
        let (k, v, from) = match self.caches.get_mut(layer) {
            Some(cache) => {
                let (keys, values) = cache.append(k, v)?;
                (keys, values, cache.visible().start)
            }
            None if layers == 0 => (k.clone(), v.clone(), 0),
            None => bail!("layer {layer} of a cache for {layers}"),
        };
        let mask = match (self.padding(from, k.dim(1)?)?, bias) {
            (mask, None) => mask,
            (None, Some(bias)) => Some(Mask::additive(bias)?),
            (Some(mask), Some(bias)) => Some(mask.with_bias(bias)?),
        };
        attention.forward(q, &k, &v, mask.as_ref())
    }

    /// Keeps the keys and values (batch, seq, kv_heads · head_dim) of this pass in layer `layer` for later ones, where
    /// nothing else is made of its rows.
    ///
    /// # Errors
    /// As for [`KvCache::append`], and when nothing is kept of that layer.
    pub fn keep(&mut self, layer: usize, [k, v]: [&Tensor; 2]) -> Result<()> {
        let layers = self.caches.len();
        match self.caches.get_mut(layer) {
            Some(cache) => cache.append(k, v).map(|_| ()),
            None => bail!("layer {layer} of a cache for {layers}"),
        }
    }

    /// The existing ones of `keys` keys from position `from` on; made once for all layers that see the same.
    fn padding(&mut self, from: usize, keys: usize) -> Result<Option<Mask>> {
        let Some(exists) = &self.exists else { return Ok(None) };
        if let Some((of, mask)) = &self.padding
            && *of == from
        {
            return Ok(mask.clone());
        }
        let rows: Vec<&[u32]> = exists.iter().map(|row| &row[from..from + keys]).collect();
        let mask = Mask::padding(&Tensor::from_vec(rows.concat(), (self.batch, keys), &Device::Cpu)?)?;
        self.padding = Some((from, mask.clone()));
        Ok(mask)
    }
}

/// Rows of 0 and 1, or `None` where all are 1.
fn existing(mask: &Tensor, batch: usize, seq: usize) -> Result<Option<Vec<Vec<u32>>>> {
    if mask.dims() != [batch, seq] {
        bail!("the attention mask has shape {:?}, expected {:?}", mask.dims(), [batch, seq])
    }
    let rows = mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let rows: Vec<Vec<u32>> =
        rows.into_iter().map(|row| row.into_iter().map(|x| u32::from(x != 0.0)).collect()).collect();
    Ok(rows.iter().any(|row| row.contains(&0)).then_some(rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Pattern;

    fn rows(seed: u32, batch: usize, seq: usize) -> Tensor {
        let data = (0..batch * seq * 4).map(|i| ((i as f32 + 1.0) * (seed as f32 + 0.7)).sin()).collect();
        Tensor::from_vec(data, (batch, seq, 4), &Device::Cpu).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    /// Prompt of 3 and steps equal one pass over all, padded, with a window, and with ALiBi.
    #[test]
    fn passes_equal_one() -> Result<()> {
        let cpu = &Device::Cpu;
        let mask = Tensor::new(&[[1u32, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], cpu)?;
        for window in [None, Some(2)] {
            for (padded, slopes) in [(false, false), (true, false), (true, true), (false, true)] {
                let pattern = window.map_or(Pattern::Causal, Pattern::Sliding);
                let attention = Attention { heads: 2, kv_heads: 2, head_dim: 2, scale: None, pattern };
                if window.is_some() && slopes {
                    continue; // the bias is on all keys
                }
                let alibi = slopes.then(|| Alibi::falcon(2, 2));
                let bias = |decoding: &Decoding| alibi.as_ref().map(|alibi| decoding.alibi(alibi)).transpose();
                let [q, k, v] = [rows(0, 2, 6), rows(1, 2, 6), rows(2, 2, 6)];
                let mut whole = Decoding::once(2, 6, padded.then_some(&mask), cpu)?;
                let whole_bias = bias(&whole)?;
                let expected = whole.attend(0, &attention, [&q, &k, &v], whole_bias.as_ref())?;
                let shape = Shape { batch: 2, positions: 6, width: 4 };
                let mut steps = Decoding::cached(1, shape, window, DType::F32, cpu)?;
                if padded {
                    steps = steps.with_attention_mask(&mask.narrow(1, 0, 3)?)?;
                }
                for (at, seq) in [(0, 3), (3, 1), (4, 2)] {
                    steps.advance(seq)?;
                    let part = |x: &Tensor| x.narrow(1, at, seq);
                    let bias = bias(&steps)?;
                    let y = steps.attend(0, &attention, [&part(&q)?, &part(&k)?, &part(&v)?], bias.as_ref())?;
                    // a row that is no token sees no key: what it gives is nobody's
                    let from = usize::from(padded && at == 0);
                    let cut = |x: &Tensor| x.narrow(1, from, seq - from);
                    assert!(
                        difference(&cut(&y)?, &cut(&part(&expected)?)?) < 1e-6,
                        "{window:?} {padded} {slopes} {at}"
                    );
                }
            }
        }
        Ok(())
    }

    /// Rows that are kept alone are seen by those of the next pass as if they had attended, and a mask may come after them.
    #[test]
    fn what_is_kept_is_seen() -> Result<()> {
        let cpu = &Device::Cpu;
        let attention = Attention { heads: 2, kv_heads: 2, head_dim: 2, scale: None, pattern: Pattern::Causal };
        let [q, k, v] = [rows(0, 2, 6), rows(1, 2, 6), rows(2, 2, 6)];
        let mask = Tensor::new(&[[1u32, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], cpu)?;
        let expected = Decoding::once(2, 6, Some(&mask), cpu)?.attend(0, &attention, [&q, &k, &v], None)?;
        let shape = Shape { batch: 2, positions: 6, width: 4 };
        let mut steps = Decoding::cached(1, shape, None, DType::F32, cpu)?;
        let part = |x: &Tensor, at, seq| x.narrow(1, at, seq);
        steps.advance(2)?;
        steps.keep(0, [&part(&k, 0, 2)?, &part(&v, 0, 2)?])?;
        assert!(steps.keep(1, [&part(&k, 0, 2)?, &part(&v, 0, 2)?]).is_err());
        let mut steps = steps.with_attention_mask(&mask)?;
        steps.advance(4)?;
        let y = steps.attend(0, &attention, [&part(&q, 2, 4)?, &part(&k, 2, 4)?, &part(&v, 2, 4)?], None)?;
        let last = |x: &Tensor, from| x.narrow(1, from, 3);
        assert!(difference(&last(&y, 1)?, &last(&expected, 3)?) < 1e-6);
        assert_eq!(steps.position_ids()?.to_vec2::<u32>()?, [[2, 3, 4, 5], [0, 2, 3, 4]]);
        Ok(())
    }

    #[test]
    fn positions_count_what_exists() -> Result<()> {
        let cpu = &Device::Cpu;
        let mask = Tensor::new(&[[0u32, 0, 1], [1, 1, 1]], cpu)?;
        let shape = Shape { batch: 2, positions: 5, width: 4 };
        let mut decoding = Decoding::cached(1, shape, None, DType::F32, cpu)?.with_attention_mask(&mask)?;
        decoding.advance(3)?;
        assert_eq!(decoding.position_ids()?.to_vec2::<u32>()?, [[0, 0, 0], [0, 1, 2]]);
        decoding.advance(2)?;
        assert_eq!(decoding.position_ids()?.to_vec2::<u32>()?, [[1, 2], [3, 4]]);
        let once = Decoding::once(2, 3, Some(&mask), cpu)?;
        assert_eq!(once.position_ids()?.to_vec2::<u32>()?, [[0, 1, 2]]);
        let given = once.with_positions(&Tensor::new(&[[4u32, 5, 6]], cpu)?)?;
        assert_eq!(given.position_ids()?.to_vec2::<u32>()?, [[4, 5, 6]]);
        assert_eq!(given.counted_position_rows(2)?.to_vec2::<u32>()?, [[6, 7, 8]]);
        assert!(given.with_positions(&Tensor::new(&[[4u32, 5]], cpu)?).is_err());
        let gaps = Decoding::once(1, 4, Some(&Tensor::new(&[[0u32, 1, 0, 1]], cpu)?), cpu)?;
        assert_eq!(gaps.counted_position_rows(2)?.to_vec2::<u32>()?, [[1, 2, 1, 3]]);
        assert_eq!(Decoding::once(2, 3, None, cpu)?.counted_position_rows(2)?.to_vec2::<u32>()?, [[2, 3, 4]]);
        let mut other = Decoding::cached(1, shape, None, DType::F32, cpu)?.with_attention_mask(&mask)?;
        assert!(other.advance(2).is_err());
        Ok(())
    }
}
