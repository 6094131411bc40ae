//! Keys and values of earlier positions, kept in place: a step writes its own rows and copies no others.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Tensor, WithDType, bail};

/// The size of a layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// The most positions that a sequence comes to.
    pub positions: usize,
    /// Width of a key or value row, kv_heads · head_dim.
    pub width: usize,
}

/// Keys and values of one layer.
///
/// What [`append`](Self::append) gives are views of the cache, valid until the next call that changes it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use roofbench_nn::kv_cache::{KvCache, Shape};
///
/// let shape = Shape { batch: 1, positions: 4, width: 1 };
/// let mut cache = KvCache::new(shape, None, DType::F32, &Device::Cpu)?;
/// let row = |x: f32| Tensor::new(&[[[x]]], &Device::Cpu); // (batch, seq, width)
/// cache.append(&row(1.)?, &row(10.)?)?;
/// let (keys, values) = cache.append(&row(2.)?, &row(20.)?)?;
/// assert_eq!(keys.flatten_all()?.to_vec1::<f32>()?, [1., 2.]);
/// assert_eq!(values.flatten_all()?.to_vec1::<f32>()?, [10., 20.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    shape: Shape,
    window: Option<usize>,
    /// (batch, rows, width): row `r` is of position `len - held + r`.
    keys: Tensor,
    values: Tensor,
    /// Positions appended so far.
    len: usize,
    /// Rows that are there.
    held: usize,
    /// Rows that were given last.
    given: usize,
}

impl KvCache {
    /// Room for `shape`. With a `window`, a position sees that many of the last ones, itself included, and memory is
    /// for twice the window at most, however many positions come.
    ///
    /// # Errors
    /// When the window is 0, or memory cannot be had.
    pub fn new(shape: Shape, window: Option<usize>, dtype: DType, device: &Device) -> Result<Self> {
        if window == Some(0) {
            bail!("KvCache: a sliding window of 0 sees nothing")
        }
        // the rows kept move to the front once a window, so that a step copies one row on average
        let rows = window.map_or(shape.positions, |window| shape.positions.min(window.saturating_mul(2)));
        let room = || Tensor::zeros((shape.batch, rows, shape.width), dtype, device);
        Ok(Self { shape, window, keys: room()?, values: room()?, len: 0, held: 0, given: 0 })
    }

    /// Positions so far, those that a window has passed included: the position of the next row.
    pub fn next_position(&self) -> usize {
        self.len
    }

    /// Positions of the rows that [`append`](Self::append) gave last, for a mask over them.
    pub fn visible(&self) -> Range<usize> {
        self.len - self.given..self.len
    }

    /// Bytes that keys and values have room for.
    pub fn bytes(&self) -> usize {
        2 * self.keys.elem_count() * self.keys.dtype().size_in_bytes()
    }

    /// Writes the rows of the next positions and gives the keys and values that they can see: all so far, or those from
    /// a window before the first of the new ones on. The new are the last of them.
    ///
    /// # Shapes
    /// Both are (batch, seq, width), maybe a part of wider rows; the results are (batch, keys, width).
    ///
    /// # Errors
    /// When the shapes or dtypes are not the cache's, or there is no room.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let Shape { batch, positions, width } = self.shape;
        let (_, seq, _) = keys.dims3()?;
        for (name, x) in [("keys", keys), ("values", values)] {
            if x.dims() != [batch, seq, width] || x.dtype() != self.keys.dtype() {
                let (found, expected) = ((x.dims(), x.dtype()), self.keys.dtype());
                bail!("KvCache: the {name} are {found:?}, expected ([{batch}, {seq}, {width}], {expected:?})")
            }
        }
        if self.len + seq > positions {
            bail!("KvCache: {} positions and {seq} more are over its {positions}; make it for more", self.len)
        }
        // what the first new position sees of the old
        let seen = self.window.map_or(self.held, |window| self.held.min(window - 1));
        let rows = self.keys.dim(1)?;
        let (all_keys, all_values);
        if seen + seq > rows {
            // more at once than a window has room for
            let joined = |cached: &Tensor, new: &Tensor| match seen {
                0 => Ok(new.clone()),
                _ => Tensor::cat(&[&cached.narrow(1, self.held - seen, seen)?, new], 1),
            };
            (all_keys, all_values) = (joined(&self.keys, keys)?, joined(&self.values, values)?);
            self.held = self.window.map_or(seq, |window| seq.min(window));
            for (cache, new) in [(&self.keys, keys), (&self.values, values)] {
                write_rows(cache, &new.narrow(1, seq - self.held, self.held)?, 0)?;
            }
        } else {
            if self.held + seq > rows {
                for cache in [&self.keys, &self.values] {
                    // its own memory, because the places may overlap
                    write_rows(cache, &cache.narrow(1, self.held - seen, seen)?.force_contiguous()?, 0)?;
                }
                self.held = seen;
            }
            write_rows(&self.keys, keys, self.held)?;
            write_rows(&self.values, values, self.held)?;
            self.held += seq;
            let view = |cache: &Tensor| cache.narrow(1, self.held - seen - seq, seen + seq);
            (all_keys, all_values) = (view(&self.keys)?, view(&self.values)?);
        }
        self.len += seq;
        self.given = seen + seq;
        Ok((all_keys, all_values))
    }

    /// Forgets everything; the room stays.
    pub fn reset(&mut self) {
        (self.len, self.held, self.given) = (0, 0, 0);
    }

    /// Forgets the positions from `len` on.
    ///
    /// # Errors
    /// When there are fewer, or a window has passed some that position `len` would see.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let Some(dropped) = self.len.checked_sub(len) else {
            bail!("KvCache: it holds {} positions and cannot be cut to {len}", self.len)
        };
        let held = self.held.saturating_sub(dropped);
        if held < len.min(self.window.map_or(len, |window| window - 1)) {
            bail!("KvCache: position {len} sees some that its window has passed")
        }
        (self.len, self.held, self.given) = (len, held, held);
        Ok(())
    }
}

/// Keys and values of an encoder's states: made in the first step and kept for the others.
#[derive(Debug, Default)]
pub struct CrossCache(Option<(Tensor, Tensor)>);

impl CrossCache {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The keys and values; `make` makes them when they are not there.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get_or_make(&mut self, make: impl FnOnce() -> Result<(Tensor, Tensor)>) -> Result<(Tensor, Tensor)> {
        match &self.0 {
            Some(made) => Ok(made.clone()),
            None => Ok(self.0.insert(make()?).clone()),
        }
    }

    /// Forgets them.
    pub fn reset(&mut self) {
        self.0 = None;
    }
}

/// `rows` (batch, seq, width) into `cache` (batch, more, width) from row `at` on.
fn write_rows(cache: &Tensor, rows: &Tensor, at: usize) -> Result<()> {
    if rows.elem_count() == 0 {
        return Ok(());
    }
    if !cache.device().is_cpu() {
        return cache.slice_set(&rows.contiguous()?, 1, at);
    }
    let rows = if rows.stride()[2] == 1 { rows.clone() } else { rows.contiguous()? };
    cache.inplace_op2(&rows, &WriteRows { at })
}

struct WriteRows {
    at: usize,
}

impl InplaceOp2 for WriteRows {
    fn name(&self) -> &'static str {
        "write-rows"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout, rows: &CpuStorage, from: &Layout) -> Result<()> {
        match (cache, rows) {
            (CpuStorage::F32(cache), CpuStorage::F32(rows)) => self.copy(cache, layout, rows, from),
            (CpuStorage::F64(cache), CpuStorage::F64(rows)) => self.copy(cache, layout, rows, from),
            (CpuStorage::F16(cache), CpuStorage::F16(rows)) => self.copy(cache, layout, rows, from),
            (CpuStorage::BF16(cache), CpuStorage::BF16(rows)) => self.copy(cache, layout, rows, from),
            _ => bail!("KvCache: rows and cache are of different dtypes, or of one that is no float"),
        }
    }
}

impl WriteRows {
    fn copy<T: WithDType>(&self, cache: &mut [T], layout: &Layout, rows: &[T], from: &Layout) -> Result<()> {
        let ((_, room, width), (batch, seq, _)) = (layout.shape().dims3()?, from.shape().dims3()?);
        for (item, row) in (0..batch).flat_map(|item| (0..seq).map(move |row| (item, row))) {
            let to = layout.start_offset() + (item * room + self.at + row) * width;
            let from = from.start_offset() + item * from.stride()[0] + row * from.stride()[1];
            cache[to..to + width].copy_from_slice(&rows[from..from + width]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Pattern};

    fn rows(positions: Range<usize>, sign: f32) -> Result<Tensor> {
        // part of a wider row, as of a fused product: item, position and column are all in the value
        let (start, seq) = (positions.start, positions.len());
        let data: Vec<f32> = (0..2 * seq * 5)
            .map(|i| sign * ((i / 5 / seq * 1000 + (start + i / 5 % seq) * 10) as f32 + (i % 5) as f32))
            .collect();
        Tensor::from_vec(data, (2, seq, 5), &Device::Cpu)?.narrow(2, 1, 3)
    }

    #[test]
    fn appended_in_place() -> Result<()> {
        let shape = Shape { batch: 2, positions: 12, width: 3 };
        let mut cache = KvCache::new(shape, None, DType::F32, &Device::Cpu)?;
        let before = cache.keys.clone();
        for part in [0..4, 4..5, 5..6, 6..12] {
            let (keys, values) = cache.append(&rows(part.clone(), 1.0)?, &rows(part.clone(), -1.0)?)?;
            assert_eq!(keys.to_vec3::<f32>()?, rows(0..part.end, 1.0)?.to_vec3::<f32>()?);
            assert_eq!(values.to_vec3::<f32>()?, rows(0..part.end, -1.0)?.to_vec3::<f32>()?);
            assert_eq!((cache.next_position(), cache.visible()), (part.end, 0..part.end));
        }
        assert_eq!(before.to_vec3::<f32>()?, rows(0..12, 1.0)?.to_vec3::<f32>()?, "not in the room first made");
        let error = cache.append(&rows(12..13, 1.0)?, &rows(12..13, 1.0)?).unwrap_err().to_string();
        assert!(error.contains("12 positions and 1 more are over its 12"), "{error}");
        cache.truncate(2)?;
        let (keys, _) = cache.append(&rows(2..3, 1.0)?, &rows(2..3, 1.0)?)?;
        assert_eq!(keys.to_vec3::<f32>()?, rows(0..3, 1.0)?.to_vec3::<f32>()?);
        assert!(cache.truncate(4).is_err());
        cache.reset();
        assert_eq!(cache.append(&rows(0..1, 1.0)?, &rows(0..1, 1.0)?)?.0.dims(), [2, 1, 3]);
        Ok(())
    }

    #[test]
    fn a_window_moves_on_and_memory_does_not_grow() -> Result<()> {
        for window in [1, 2, 3, 5, 40] {
            for first in [1, 3, 4, 11, 19] {
                let shape = Shape { batch: 2, positions: 60, width: 3 };
                let mut cache = KvCache::new(shape, Some(window), DType::F32, &Device::Cpu)?;
                assert_eq!(cache.bytes(), 2 * 2 * 3 * 4 * 60.min(2 * window));
                let mut at = 0;
                for n in [first].into_iter().chain([1, 1, 1, 4, 1, 1, 2, 7, 1, 1, 1, 12, 1]) {
                    let (keys, values) = cache.append(&rows(at..at + n, 1.0)?, &rows(at..at + n, -1.0)?)?;
                    let expected = at.saturating_sub(window - 1)..at + n;
                    assert_eq!(cache.visible(), expected, "window {window}");
                    assert_eq!(keys.to_vec3::<f32>()?, rows(expected.clone(), 1.0)?.to_vec3::<f32>()?);
                    assert_eq!(values.to_vec3::<f32>()?, rows(expected, -1.0)?.to_vec3::<f32>()?);
                    at += n;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_window_is_not_cut_below_what_it_sees() -> Result<()> {
        let shape = Shape { batch: 2, positions: 60, width: 3 };
        let mut cache = KvCache::new(shape, Some(4), DType::F32, &Device::Cpu)?;
        cache.append(&rows(0..20, 1.0)?, &rows(0..20, 1.0)?)?;
        assert!(cache.truncate(18).unwrap_err().to_string().contains("position 18"));
        cache.truncate(19)?;
        let (keys, _) = cache.append(&rows(19..20, 1.0)?, &rows(19..20, 1.0)?)?;
        assert_eq!(keys.to_vec3::<f32>()?, rows(16..20, 1.0)?.to_vec3::<f32>()?);
        Ok(())
    }

    /// Token by token from the cache, and all at once.
    #[test]
    fn attention_over_the_views() -> Result<()> {
        let cpu = &Device::Cpu;
        for pattern in [Pattern::Causal, Pattern::Sliding(3)] {
            let attention = Attention { heads: 4, kv_heads: 2, head_dim: 8, scale: None, pattern };
            let qkv = Tensor::randn(0f32, 1.0, (2, 17, 64), cpu)?;
            let part = |from, width| qkv.narrow(2, from, width);
            let whole = attention.forward(&part(0, 32)?, &part(32, 16)?, &part(48, 16)?, None)?;
            let window = if let Pattern::Sliding(window) = pattern { Some(window) } else { None };
            let shape = Shape { batch: 2, positions: 17, width: 16 };
            let mut cache = KvCache::new(shape, window, DType::F32, cpu)?;
            let mut at = 0;
            for n in [9, 1, 1, 1, 4, 1] {
                let step = |from, width| part(from, width)?.narrow(1, at, n);
                let (keys, values) = cache.append(&step(32, 16)?, &step(48, 16)?)?;
                let got = attention.forward(&step(0, 32)?, &keys, &values, None)?;
                let error = (got - whole.narrow(1, at, n)?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert!(error < 1e-6, "{pattern:?} at {at}: {error}");
                at += n;
            }
        }
        Ok(())
    }

    #[test]
    fn other_dtypes_and_misfits() -> Result<()> {
        let shape = Shape { batch: 2, positions: 5, width: 3 };
        let mut cache = KvCache::new(shape, None, DType::BF16, &Device::Cpu)?;
        let row = rows(0..2, 1.0)?.to_dtype(DType::BF16)?;
        let (keys, _) = cache.append(&row, &row)?;
        assert_eq!((keys.dtype(), keys.dims()), (DType::BF16, &[2, 2, 3][..]));
        let error = cache.append(&row, &row.narrow(2, 0, 2)?).unwrap_err().to_string();
        assert!(error.contains("the values are ([2, 2, 2], BF16), expected ([2, 2, 3], BF16)"), "{error}");
        Ok(())
    }

    #[test]
    fn cross_attention_is_made_once() -> Result<()> {
        let mut cache = CrossCache::new();
        let (made, _) = cache.get_or_make(|| Ok((rows(0..2, 1.0)?, rows(0..2, -1.0)?)))?;
        let (kept, _) = cache.get_or_make(|| bail!("made again"))?;
        assert_eq!(made.to_vec3::<f32>()?, kept.to_vec3::<f32>()?);
        cache.reset();
        assert!(cache.get_or_make(|| bail!("made anew")).is_err());
        Ok(())
    }
}
