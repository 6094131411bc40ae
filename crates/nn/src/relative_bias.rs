//! Biases on attention scores by relative position: T5's buckets, also of coordinates, and ALiBi.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use half::bf16;

use crate::{cost, op};

/// A learned bias per head and bucket of relative positions (arXiv:1910.10683). Mirrors `compute_bias` of
/// `transformers.T5Attention`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::relative_bias::{Buckets, RelativeBias};
///
/// let table = Tensor::new(&[[0f32], [1.], [2.], [3.]], &Device::Cpu)?; // (buckets, heads)
/// let bias = RelativeBias::new(&table, Buckets { count: 4, max_distance: 8, bidirectional: false })?;
/// let bias = bias.forward(2, 3)?; // (1, heads, queries, keys)
/// assert_eq!(bias.squeeze(0)?.to_vec3::<f32>()?, [[[1., 0., 0.], [2., 1., 0.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RelativeBias {
    /// Per head its biases, one a bucket.
    by_head: Vec<Vec<f32>>,
    buckets: Buckets,
    device: Device,
}

/// How relative positions fall into buckets: small ones each into its own, larger ones logarithmically.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets {
    /// How many there are.
    pub count: usize,
    /// From this distance on all are in the last.
    pub max_distance: usize,
    /// Whether later keys have buckets of their own (encoders) or share that of distance 0 (decoders).
    pub bidirectional: bool,
}

impl Buckets {
    /// The bucket of a key at `relative` = key position - query position, for numbers that [`RelativeBias::new`] takes.
    pub fn of(&self, relative: i64) -> usize {
        let (count, first) = match self.bidirectional {
            true => (self.count / 2, if relative > 0 { self.count / 2 } else { 0 }),
            false => (self.count, 0),
        };
        let distance = if self.bidirectional { relative } else { relative.min(0) }.unsigned_abs();
        let exact = count / 2;
        let Some(distance) = usize::try_from(distance).ok().filter(|distance| *distance >= exact) else {
            return first + distance as usize;
        };
        // in f32, as transformers has it: at the edges of buckets the rounding decides
        let ratio = (distance as f32 / exact as f32).ln();
        let whole = (self.max_distance as f64 / exact as f64).ln() as f32;
        first + (exact + (ratio / whole * (count - exact) as f32) as usize).min(count - 1)
    }
}

impl RelativeBias {
    /// Reads `weight` (buckets, heads).
    ///
    /// # Errors
    /// When the tensor is missing or has another shape, or there are too few buckets.
    pub fn load(buckets: Buckets, heads: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Self::new(&vb.get((buckets.count, heads), "weight")?, buckets)
    }

    /// From a table (buckets, heads).
    ///
    /// # Errors
    /// When it has not the number of rows, or there are too few buckets or distances for both kinds.
    pub fn new(table: &Tensor, buckets: Buckets) -> Result<Self> {
        let (rows, _) = table.dims2()?;
        let exact = buckets.count / if buckets.bidirectional { 4 } else { 2 };
        if rows != buckets.count || exact == 0 || buckets.max_distance <= exact {
            bail!("RelativeBias: a table of shape {:?} does not hold {buckets:?}", table.dims())
        }
        let by_head = table.to_dtype(DType::F32)?.t()?.to_vec2()?;
        Ok(Self { by_head, buckets, device: table.device().clone() })
    }

    /// The bias for queries that are the last of the keys' positions, to be made once a pass for all layers.
    ///
    /// # Shapes
    /// (1, heads, queries, keys), f32.
    ///
    /// # Errors
    /// When there are more queries than keys.
    pub fn forward(&self, queries: usize, keys: usize) -> Result<Tensor> {
        let Some(before) = keys.checked_sub(queries) else {
            bail!("RelativeBias: {queries} queries are not the last of {keys} keys")
        };
        if queries == 0 || keys == 0 {
            return Tensor::zeros((1, self.by_head.len(), queries, keys), DType::F32, &self.device);
        }
        let lines = self.lines(queries, keys);
        let fill = |row: usize, out: &mut [MaybeUninit<f32>]| {
            out.write_copy_of_slice(lines.row(row / queries % self.by_head.len(), before + row % queries, keys));
        };
        let bias = rows(self.by_head.len() * queries, keys, fill);
        Tensor::from_vec(bias, (1, self.by_head.len(), queries, keys), &self.device)
    }

    /// The bias with a factor on each row, as WavLM's gates (arXiv:2110.13900) are, for as many queries as keys.
    ///
    /// # Shapes
    /// `gate` is (batch, heads, seq); the result (batch, heads, seq, seq), both of the gate's dtype.
    ///
    /// # Errors
    /// When the gate has not as many heads as the table.
    pub fn forward_gated(&self, gate: &Tensor) -> Result<Tensor> {
        let (batch, heads, seq) = gate.dims3()?;
        if heads != self.by_head.len() {
            bail!("RelativeBias: a gate of shape {:?} is not for {} heads", gate.dims(), self.by_head.len())
        }
        let _span = cost::span("relative bias", None);
        cost::elementwise(batch * heads * seq * seq, 1);
        if !op::is_cpu_f32(gate) || batch * seq == 0 {
            return self.forward(seq, seq)?.to_dtype(gate.dtype())?.broadcast_mul(&gate.unsqueeze(3)?);
        }
        let lines = self.lines(seq, seq);
        op::apply1("gated-bias", &gate.contiguous()?, |storage, layout| {
            let gate = op::elements::<f32>(storage, layout)?;
            let fill = |row: usize, out: &mut [MaybeUninit<f32>]| {
                for (out, bias) in out.iter_mut().zip(lines.row(row / seq % heads, row % seq, seq)) {
                    out.write(gate[row] * bias);
                }
            };
            Ok((rows(batch * heads * seq, seq, fill), (batch, heads, seq, seq).into()))
        })
    }

    fn lines(&self, queries: usize, keys: usize) -> Lines {
        // from the last query to the first key on
        let distances: Vec<usize> = (1 - keys as i64..queries as i64).map(|d| self.buckets.of(d)).collect();
        let values = self.by_head.iter().flat_map(|biases| distances.iter().map(|bucket| biases[*bucket])).collect();
        Lines { values, length: distances.len() }
    }
}

/// The sum of biases by several positions of the same rows, as of words and of their places on a page: `scale` · Σ
/// bias(position of the key - position of the query). Mirrors `_cal_1d_pos_emb` and `_cal_2d_pos_emb` of
/// `transformers.LayoutLMv3Encoder`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::relative_bias::{Buckets, RelativeBias, sum_of_biases};
///
/// let table = Tensor::new(&[[0f32], [1.], [2.], [3.]], &Device::Cpu)?; // (buckets, heads)
/// let bias = RelativeBias::new(&table, Buckets { count: 4, max_distance: 8, bidirectional: true })?;
/// // one item of two rows, 3 apart
/// let sum = sum_of_biases(&[(&bias, &[vec![5, 8]])], 0.5)?; // (batch, heads, queries, keys)
/// assert_eq!(sum.flatten_all()?.to_vec1::<f32>()?, [0., 1.5, 0.5, 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Shapes
/// Of each term the positions of every row of every item; (batch, heads, seq, seq), f32, the queries side by side in
/// memory, as attention likes them.
///
/// # Errors
/// When there is no term, or they differ in items, rows or heads, or positions are further apart than 2^20.
pub fn sum_of_biases(terms: &[(&RelativeBias, &[Vec<i64>])], scale: f32) -> Result<Tensor> {
    let Some((first, positions)) = terms.first() else { bail!("sum_of_biases: no term") };
    let (batch, heads, seq) = (positions.len(), first.by_head.len(), positions.first().map_or(0, Vec::len));
    let alike = |(bias, positions): &(&RelativeBias, &[Vec<i64>])| {
        (bias.by_head.len(), positions.len()) == (heads, batch) && positions.iter().all(|row| row.len() == seq)
    };
    if !terms.iter().all(alike) {
        bail!("sum_of_biases: the terms differ in items, rows or heads; the first has {batch}, {seq} and {heads}")
    }
    let _span = cost::span("relative bias", None);
    cost::elementwise(batch * heads * seq * seq, terms.len());
    if batch * seq * heads == 0 {
        return Tensor::zeros((batch, heads, seq, seq), DType::F32, &first.device);
    }
    let tables =
        terms.iter().map(|(bias, positions)| Between::new(bias, positions, scale)).collect::<Result<Vec<_>>>()?;
    let fill = |row: usize, out: &mut [MaybeUninit<f32>]| {
        let (item, head, key) = (row / seq / heads, row / seq % heads, row % seq);
        let mut sum = vec![0f32; seq];
        for table in &tables {
            let (line, positions) = (table.line(head), &table.positions[item]);
            let from = positions[key] + table.span;
            for (sum, position) in sum.iter_mut().zip(positions) {
                *sum += line[from - position];
            }
        }
        out.write_copy_of_slice(&sum);
    };
    let bias = rows(batch * heads * seq, seq, fill);
    Tensor::from_vec(bias, (batch, heads, seq, seq), &first.device)?.transpose(2, 3)
}

/// Of a term of [`sum_of_biases`], per head the bias of every distance that occurs.
struct Between {
    /// From `-span` to `span`, for one head after the other.
    values: Vec<f32>,
    span: usize,
    /// Counted from the smallest.
    positions: Vec<Vec<usize>>,
}

impl Between {
    fn new(bias: &RelativeBias, positions: &[Vec<i64>], scale: f32) -> Result<Self> {
        let all = || positions.iter().flatten().copied();
        let lowest = all().min().unwrap_or(0);
        let span = all().max().unwrap_or(0).abs_diff(lowest);
        if span > 1 << 20 {
            bail!("sum_of_biases: positions are {span} apart")
        }
        let buckets: Vec<usize> = (-(span as i64)..=span as i64).map(|distance| bias.buckets.of(distance)).collect();
        let line = |biases: &Vec<f32>| buckets.iter().map(|bucket| biases[*bucket] * scale).collect::<Vec<_>>();
        Ok(Self {
            values: bias.by_head.iter().flat_map(line).collect(),
            span: span as usize,
            positions: positions
                .iter()
                .map(|row| row.iter().map(|position| position.abs_diff(lowest) as usize).collect())
                .collect(),
        })
    }

    fn line(&self, head: usize) -> &[f32] {
        let length = 2 * self.span + 1;
        &self.values[head * length..][..length]
    }
}

/// Per head the biases of every distance; a query's row is a stretch of its head's.
struct Lines {
    values: Vec<f32>,
    length: usize,
}

impl Lines {
    /// Of the query at `position` among `keys`.
    fn row(&self, head: usize, position: usize, keys: usize) -> &[f32] {
        &self.values[head * self.length + keys - 1 - position..][..keys]
    }
}

/// `count` rows of `width`, each written whole by `fill`, in parallel.
fn rows(count: usize, width: usize, fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let part = |begin: usize, part: &mut [MaybeUninit<f32>]| {
        for (i, row) in part.chunks_exact_mut(width).enumerate() {
            fill(begin / width + i, row);
        }
    };
    #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
    // SAFETY: a part is whole rows, and each is written.
    unsafe {
        op::collect_chunks(count * width, (CHUNK / width).max(1) * width, part)
    }
}

/// Elements that one thread writes at a time, about.
const CHUNK: usize = 16384;

/// Attention with linear biases (arXiv:2108.12409): per head a slope times the key's position. It is the same for every
/// query, so it has one row, and the softmax does not see where positions begin.
///
/// ```
/// use candle_core::Device;
/// use roofbench_nn::relative_bias::Alibi;
///
/// let bias = Alibi::mpt(2, 8.0).bias(3, &Device::Cpu)?; // (1, heads, 1, keys)
/// assert_eq!(bias.squeeze(0)?.to_vec3::<f32>()?, [[[-0.125, -0.0625, 0.]], [[-0.0078125, -0.00390625, 0.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    slopes: Vec<f32>,
    form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    /// 0 at the last key and negative before.
    FromEnd,
    /// 0 at the first key that exists.
    FromStart,
    /// The same in bf16, times a factor.
    Bf16 { factor: f32 },
}

impl Alibi {
    /// Of MPT, up to `bias_max` (8 where the configuration says nothing). Mirrors
    /// `transformers.models.mpt.build_mpt_alibi_tensor`.
    pub fn mpt(heads: usize, bias_max: f32) -> Self {
        let even = heads.next_power_of_two();
        let slope = |i: usize| (-f64::from((i + 1) as f32 * (bias_max / even as f32))).exp2() as f32;
        // of a power of two every second one first, then those between
        let slopes = match even == heads {
            true => (0..heads).map(slope).collect(),
            false => (1..even).step_by(2).chain((0..even).step_by(2)).take(heads).map(slope).collect(),
        };
        Self { slopes, form: Form::FromEnd }
    }

    /// Of Bloom. Mirrors `transformers.models.bloom.build_alibi_tensor`.
    pub fn bloom(heads: usize) -> Self {
        let even = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        // powers of 2^(-8 / n), which is in f32
        let slope = |n: usize, power: usize| {
            let base = (-8.0 / n.max(1) as f64).exp2() as f32;
            f64::from(base).powf(power as f64) as f32
        };
        let own = (1..=even).map(|i| slope(even, i));
        let slopes = own.chain((1..).step_by(2).map(|i| slope(2 * even, i))).take(heads).collect();
        Self { slopes, form: Form::FromStart }
    }

    /// Of Falcon: Bloom's in bf16, and divided like the scores by √head_dim. Mirrors
    /// `transformers.models.falcon.build_alibi_tensor` and its use.
    pub fn falcon(heads: usize, head_dim: usize) -> Self {
        let factor = (head_dim as f64).sqrt().recip() as f32;
        Self { form: Form::Bf16 { factor }, ..Self::bloom(heads) }
    }

    /// The same with every bias multiplied by `factor`.
    #[must_use]
    pub fn times(mut self, factor: f32) -> Self {
        match &mut self.form {
            Form::Bf16 { factor: own } => *own *= factor, // which rounds nothing more
            Form::FromEnd | Form::FromStart => self.slopes.iter_mut().for_each(|slope| *slope *= factor),
        }
        self
    }

    /// The slope of each head.
    pub fn slopes(&self) -> &[f32] {
        &self.slopes
    }

    /// The bias on `keys` keys that all exist, for [`Mask::additive`](crate::attention::Mask::additive).
    ///
    /// # Shapes
    /// (1, heads, 1, keys), f32.
    ///
    /// # Errors
    /// Candle's, when memory on the device cannot be had.
    pub fn bias(&self, keys: usize, device: &Device) -> Result<Tensor> {
        self.of_positions(1, keys, (0..keys).map(|key| key as f32), device)
    }

    /// The same where a mask (batch, keys) is 0 for keys that do not exist: the forms that count from the start count
    /// the existing ones.
    ///
    /// # Shapes
    /// (batch, heads, 1, keys), f32; a batch of 1 for MPT's form, which does not ask.
    ///
    /// # Errors
    /// When the mask has another number of dimensions.
    pub fn bias_masked(&self, attention_mask: &Tensor) -> Result<Tensor> {
        let (batch, keys) = attention_mask.dims2()?;
        if self.form == Form::FromEnd {
            return self.bias(keys, attention_mask.device());
        }
        let mut positions = Vec::with_capacity(batch * keys);
        for row in attention_mask.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            let mut seen = 0.0;
            positions.extend(row.iter().map(|x| {
                seen += x;
                (seen - 1.0) * x
            }));
        }
        self.of_positions(batch, keys, positions.into_iter(), attention_mask.device())
    }

    fn of_positions(
        &self,
        batch: usize,
        keys: usize,
        positions: impl Iterator<Item = f32>,
        device: &Device,
    ) -> Result<Tensor> {
        let positions: Vec<f32> = positions.collect();
        let last = keys as f32 - 1.0;
        let bf16 = |x: f32| bf16::from_f32(x).to_f32();
        let value = |slope: f32, position: f32| match self.form {
            Form::FromEnd => slope * (position - last),
            Form::FromStart => slope * position,
            Form::Bf16 { factor } => bf16(bf16(slope) * bf16(position)) * factor,
        };
        let rows = positions.chunks(keys.max(1));
        let bias: Vec<f32> = rows
            .flat_map(|row| self.slopes.iter().flat_map(move |slope| row.iter().map(move |p| value(*slope, *p))))
            .collect();
        Tensor::from_vec(bias, (batch, self.slopes.len(), 1, keys), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From transformers 5.23.0: for -1000..=1000 the sum of bucket times rank.
    #[test]
    fn buckets_of_transformers() {
        for (bidirectional, count, max_distance, expected) in [
            (true, 32, 128, 53_443_390),
            (true, 8, 20, 11_997_986),
            (true, 32, 100, 53_525_472),
            (true, 320, 800, 503_106_604),
            (false, 32, 128, 14_640_255),
            (false, 8, 20, 3_471_620),
            (false, 32, 100, 14_746_172),
            (false, 320, 800, 99_588_474),
        ] {
            let buckets = Buckets { count, max_distance, bidirectional };
            let sum: usize = (-1000..=1000).zip(1..).map(|(relative, rank)| rank * buckets.of(relative)).sum();
            assert_eq!(sum, expected, "{buckets:?}");
        }
        // the largest distances do not overflow
        let buckets = Buckets { count: 32, max_distance: 128, bidirectional: true };
        assert_eq!((buckets.of(i64::MIN), buckets.of(i64::MAX)), (15, 31));
        assert_eq!(Buckets { bidirectional: false, ..buckets }.of(i64::MIN), 31);
    }

    #[test]
    fn rows_by_distance() -> Result<()> {
        let table = Tensor::arange(0f32, 96.0, &Device::Cpu)?.reshape((32, 3))?;
        for bidirectional in [true, false] {
            let buckets = Buckets { count: 32, max_distance: 128, bidirectional };
            let bias = RelativeBias::new(&table, buckets)?;
            for (queries, keys) in [(1, 1), (5, 5), (1, 300), (7, 200), (0, 3)] {
                let got = bias.forward(queries, keys)?;
                assert_eq!(got.dims(), [1, 3, queries, keys]);
                for (i, x) in got.flatten_all()?.to_vec1::<f32>()?.into_iter().enumerate() {
                    let (head, query, key) = (i / keys / queries, i / keys % queries, i % keys);
                    let bucket = buckets.of(key as i64 - (query + keys - queries) as i64);
                    assert_eq!(x, (bucket * 3 + head) as f32);
                }
            }
            assert!(bias.forward(3, 2).is_err());
        }
        let buckets = Buckets { count: 32, max_distance: 128, bidirectional: true };
        let bias = RelativeBias::new(&table, buckets)?;
        for seq in [0, 1, 130] {
            let gate = Tensor::randn(0f32, 1.0, (2, 3, seq), &Device::Cpu)?;
            let wanted = bias.forward(seq, seq)?.broadcast_mul(&gate.unsqueeze(3)?)?;
            assert_eq!(
                bias.forward_gated(&gate)?.flatten_all()?.to_vec1::<f32>()?,
                wanted.flatten_all()?.to_vec1::<f32>()?
            );
        }
        assert!(bias.forward_gated(&Tensor::zeros((2, 4, 5), DType::F32, &Device::Cpu)?).is_err());
        let few = Buckets { count: 2, max_distance: 128, bidirectional: true };
        assert!(RelativeBias::new(&table.narrow(0, 0, 2)?, few).is_err());
        Ok(())
    }

    #[test]
    fn sums_of_biases_by_definition() -> Result<()> {
        let buckets = Buckets { count: 8, max_distance: 20, bidirectional: true };
        let other = Buckets { count: 12, max_distance: 300, bidirectional: true };
        let table =
            |rows: usize, seed: f32| Tensor::arange(0f32, (rows * 3) as f32, &Device::Cpu)?.affine(0.1, seed.into());
        let first = RelativeBias::new(&table(8, 0.3)?.reshape((8, 3))?, buckets)?;
        let second = RelativeBias::new(&table(12, -0.7)?.reshape((12, 3))?, other)?;
        let seq = 37;
        let counted: Vec<Vec<i64>> = vec![(0..seq).collect(); 2];
        let places: Vec<Vec<i64>> =
            (0..2).map(|item| (0..seq).map(|i| (i * i * 7 + item * 31) % 1001).collect()).collect();
        let sum = sum_of_biases(&[(&first, &counted), (&second, &places)], 0.25)?;
        assert_eq!(sum.dims(), [2, 3, 37, 37]);
        let seq = seq as usize;
        for (i, found) in sum.flatten_all()?.to_vec1::<f32>()?.into_iter().enumerate() {
            let (item, head, query, key) = (i / seq / seq / 3, i / seq / seq % 3, i / seq % seq, i % seq);
            let bias = |of: &RelativeBias, positions: &[Vec<i64>]| {
                of.by_head[head][of.buckets.of(positions[item][key] - positions[item][query])]
            };
            let wanted = (bias(&first, &counted) + bias(&second, &places)) * 0.25;
            assert!((found - wanted).abs() < 1e-6, "{i}: {found}, not {wanted}");
        }
        assert!(sum_of_biases(&[(&first, &counted), (&second, &places[..1])], 1.0).is_err());
        assert!(sum_of_biases(&[], 1.0).is_err());
        assert!(sum_of_biases(&[(&first, &[vec![0, 1 << 30]])], 1.0).is_err());
        Ok(())
    }

    /// From transformers 5.23.0.
    #[test]
    fn slopes_of_transformers() {
        let eight = [0.5f32, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625];
        for make in [|heads| Alibi::mpt(heads, 8.0), Alibi::bloom] {
            assert_eq!(make(1).slopes(), [0.00390625]);
            assert_eq!(make(4).slopes(), [0.25, 0.0625, 0.015625, 0.00390625]);
            assert_eq!(make(6).slopes(), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
            assert_eq!(make(8).slopes(), eight);
            assert_eq!(make(12).slopes()[..8], eight);
        }
        assert_eq!(Alibi::mpt(12, 8.0).slopes()[8..], [0.707_106_77, 0.353_553_38, 0.176_776_69, 0.088_388_346]);
        assert_eq!(Alibi::bloom(12).slopes()[8..], [0.707_106_77, 0.353_553_38, 0.176_776_68, 0.088_388_34]);
        let twenty = Alibi::bloom(20);
        assert_eq!(
            twenty.slopes()[13..],
            [0.007_812_498, 0.005_524_270_2, 0.003_906_248_8, 0.840_896_4, 0.594_603_6, 0.420_448_24, 0.297_301_8]
        );
        assert_eq!(Alibi::mpt(5, 4.0).slopes(), [0.5, 0.25, 0.125, 0.0625, 0.707_106_77]);
    }

    #[test]
    fn positions_of_padded_items() -> Result<()> {
        let mask = Tensor::new(&[[0i64, 1, 1, 1], [1, 1, 1, 1]], &Device::Cpu)?;
        let bias = Alibi::falcon(6, 4).bias_masked(&mask)?;
        assert_eq!(bias.dims(), [2, 6, 1, 4]);
        // half of the slopes 1/4 and 1/2
        let row = |item: usize, head: usize| bias.get(item)?.get(head)?.flatten_all()?.to_vec1::<f32>();
        assert_eq!(row(0, 0)?, [0.0, 0.0, 0.125, 0.25]);
        assert_eq!(row(1, 4)?, [0.0, 0.25, 0.5, 0.75]);
        // bf16: 0.7071 is 0.70703125 there, and 3 times that 2.125
        let rounded = Alibi::falcon(12, 1).bias(4, &Device::Cpu)?.get(0)?.get(8)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(rounded, [0.0, 0.707_031_25, 1.414_062_5, 2.125]);
        for alibi in [Alibi::mpt(6, 8.0), Alibi::bloom(6), Alibi::falcon(6, 4)] {
            let bias = |alibi: &Alibi| alibi.bias(5, &Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
            let twice: Vec<f32> = bias(&alibi)?.into_iter().map(|x| 2.0 * x).collect();
            assert_eq!(bias(&alibi.times(2.0))?, twice);
        }
        assert_eq!(Alibi::mpt(6, 8.0).bias_masked(&mask)?.dims(), [1, 6, 1, 4]);
        Ok(())
    }
}
