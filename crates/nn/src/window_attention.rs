//! Self-attention of a grid of tokens within windows, with decomposed relative positions.

use candle_core::{DType, IndexOp, Result, Tensor, bail};

use crate::attention::{Attention, Mask, Pattern};
use crate::cost;
use crate::kernels::window_attention as kernel;
use crate::{attention, op, options};

/// softmax(q kᵀ · scale + positions) v for each head, where a query sees the keys of its window: the grid cut from its
/// corner on, the last windows reaching beyond it where the sizes do not divide. Positions outside of the grid are seen
/// as well, each with the same key and value. What is added for relative positions is the query's product with a vector
/// for the distance in lines and one for that in columns. Mirrors `transformers.SamVisionAttention` between its
/// products, with `window_partition` and `window_unpartition` around it (arXiv:2304.02643, arXiv:2112.01526).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::window_attention::WindowAttention;
///
/// let row = |x: &[f32]| Tensor::new(x, &Device::Cpu)?.reshape((1, 3, 1));
/// // a line of three tokens in windows of two, the last of which reaches beyond; equal scores
/// let attention = WindowAttention::new([1, 1], [1, 3], [1, 2])?;
/// let attention = attention.with_outside(&Tensor::new(&[0f32], &Device::Cpu)?, &Tensor::new(&[9f32], &Device::Cpu)?)?;
/// let y = attention.forward(&row(&[1., 1., 1.])?, &row(&[0., 0., 0.])?, &row(&[2., 4., 5.])?)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3., 3., 7.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct WindowAttention {
    heads: usize,
    head_dim: usize,
    grid: [usize; 2],
    window: [usize; 2],
    /// Of each position of each window, line by line, its token.
    tokens: Vec<Option<u32>>,
    /// Key and value (heads · head_dim) of positions outside.
    outside: Option<[Row; 2]>,
    /// (2 · size - 1, head_dim) for distances in lines and in columns.
    positions: Option<[Row; 2]>,
}

/// A tensor, and its elements where the kernel reads them.
#[derive(Clone)]
struct Row {
    tensor: Tensor,
    elements: Vec<f32>,
}

impl Row {
    /// `elements` are empty for tensors that the kernel does not take.
    fn new(tensor: &Tensor) -> Result<Self> {
        if !tensor.device().is_cpu() {
            return Ok(Self { tensor: tensor.clone(), elements: Vec::new() });
        }
        let elements = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self { tensor: tensor.clone(), elements })
    }
}

impl WindowAttention {
    /// `heads` of `head_dim` over a `grid` of lines and columns in windows of `window`; a window as large as the grid is
    /// attention over all of it. The scale is `head_dim^-0.5`.
    ///
    /// # Errors
    /// When a number is 0.
    pub fn new([heads, head_dim]: [usize; 2], grid: [usize; 2], window: [usize; 2]) -> Result<Self> {
        if [heads, head_dim, grid[0], grid[1], window[0], window[1]].contains(&0) {
            bail!("WindowAttention: {heads} heads of width {head_dim} on a grid of {grid:?} in windows of {window:?}")
        }
        let mut tokens = Vec::new();
        for top in (0..grid[0]).step_by(window[0]) {
            for left in (0..grid[1]).step_by(window[1]) {
                for (y, x) in (top..top + window[0]).flat_map(|y| (left..left + window[1]).map(move |x| (y, x))) {
                    tokens.push((y < grid[0] && x < grid[1]).then_some((y * grid[1] + x) as u32));
                }
            }
        }
        Ok(Self { heads, head_dim, grid, window, tokens, outside: None, positions: None })
    }

    /// The same where positions outside of the grid have this `key` and `value`; without, they are 0.
    ///
    /// # Shapes
    /// (heads · head_dim)
    ///
    /// # Errors
    /// When the shapes are others.
    pub fn with_outside(self, key: &Tensor, value: &Tensor) -> Result<Self> {
        let width = self.heads * self.head_dim;
        if key.dims() != [width] || value.dims() != [width] {
            let found = [key.dims(), value.dims()];
            bail!("WindowAttention: key and value outside of the grid have shapes {found:?}, expected [{width}]")
        }
        Ok(Self { outside: Some([Row::new(key)?, Row::new(value)?]), ..self })
    }

    /// The same with vectors for the distances in lines and in columns from key to query, the largest negative first.
    ///
    /// # Shapes
    /// (2 · window lines - 1, head_dim) and (2 · window columns - 1, head_dim)
    ///
    /// # Errors
    /// When the shapes are others.
    pub fn with_positions(self, lines: &Tensor, columns: &Tensor) -> Result<Self> {
        for (table, size) in [lines, columns].into_iter().zip(self.window) {
            if table.dims() != [2 * size - 1, self.head_dim] {
                let expected = [2 * size - 1, self.head_dim];
                bail!("WindowAttention: a table of distances has shape {:?}, expected {expected:?}", table.dims())
            }
        }
        let table = |table: &Tensor| {
            let row = Row::new(table)?;
            Ok::<_, candle_core::Error>(Row { elements: kernel::padded_table(row.elements, self.head_dim), ..row })
        };
        let positions = Some([table(lines)?, table(columns)?]);
        Ok(Self { positions, ..self })
    }

    /// On the CPU in f32 a fused kernel, which reads and writes tokens where they lie and keeps neither scores nor
    /// biases; elsewhere candle's operations.
    ///
    /// # Shapes
    /// `q`, `k` and `v` (batch, lines · columns, heads · head_dim), any of them a `narrow` of one product that holds all
    /// three. The result is the same, contiguous.
    ///
    /// # Errors
    /// When the shapes are others.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let batch = q.dim(0)?;
        let (tokens, width) = (self.grid[0] * self.grid[1], self.heads * self.head_dim);
        for (name, x) in [("queries", q), ("keys", k), ("values", v)] {
            if x.dims() != [batch, tokens, width] {
                let expected = [batch, tokens, width];
                bail!("WindowAttention: the {name} have shape {:?}, expected {expected:?}", x.dims())
            }
        }
        let _span = cost::span("window attention", None);
        self.note_cost(batch, q.dtype());
        if !options::current().fused_attention || ![q, k, v].into_iter().all(op::is_cpu_f32) {
            return self.forward_plain(q, k, v);
        }
        let unit_rows = |x: &Tensor| if x.stride()[2] == 1 { Ok(x.clone()) } else { x.contiguous() };
        let zeros = vec![0.0; width];
        let outside = match &self.outside {
            Some(rows) => rows.each_ref().map(|row| &*row.elements),
            None => [&*zeros; 2],
        };
        op::apply3("window-attention", [&unit_rows(q)?, &unit_rows(k)?, &unit_rows(v)?], |[q, k, v]| {
            let y = kernel::window_attention(&kernel::WindowAttention {
                batch,
                tokens,
                heads: self.heads,
                head_dim: self.head_dim,
                scale: self.scale(),
                q: attention::strided(q)?,
                k: attention::strided(k)?,
                v: attention::strided(v)?,
                size: self.window,
                rows: &self.tokens,
                outside: Some(outside),
                tables: self.positions.as_ref().map(|tables| tables.each_ref().map(|table| &*table.elements)),
            });
            Ok((y.map_err(candle_core::Error::wrap)?, (batch, tokens, width).into()))
        })
    }

    /// As [`forward`](Self::forward), in candle's own operations with whole windows and score matrices: the path of
    /// other devices and dtypes, and what the fused one is tested against.
    ///
    /// # Errors
    /// As there.
    pub fn forward_plain(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = q.dims3()?;
        let positions = self.window[0] * self.window[1];
        let windows = self.tokens.len() / positions;
        // what lies outside is one token more
        let ids: Vec<u32> = self.tokens.iter().map(|token| token.unwrap_or(tokens as u32)).collect();
        let ids = Tensor::new(ids, q.device())?;
        let cut = |x: &Tensor, outside: Option<&Row>| {
            let row = match outside {
                Some(row) => row.tensor.to_dtype(x.dtype())?.reshape((1, 1, width))?,
                None => Tensor::zeros((1, 1, width), x.dtype(), x.device())?,
            };
            let x = Tensor::cat(&[x, &row.broadcast_as((batch, 1, width))?.contiguous()?], 1)?;
            x.contiguous()?.index_select(&ids, 1)?.reshape((batch * windows, positions, width))
        };
        let outside = |i: usize| self.outside.as_ref().map(|rows| &rows[i]);
        let (q, k, v) = (cut(q, None)?, cut(k, outside(0))?, cut(v, outside(1))?);
        let mask = match &self.positions {
            Some(tables) => Some(Mask::additive(&self.bias(&q, tables)?)?),
            None => None,
        };
        let attention = Attention {
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_dim,
            scale: None,
            pattern: Pattern::Full,
        };
        let y = attention.forward_plain(&q, &k, &v, mask.as_ref())?.reshape((batch, windows * positions, width))?;
        let mut places = vec![0u32; tokens];
        for (place, token) in (0..).zip(&self.tokens) {
            if let Some(token) = token {
                places[*token as usize] = place;
            }
        }
        y.contiguous()?.index_select(&Tensor::new(places, y.device())?, 1)
    }

    /// (windows, heads, queries, keys) from the queries of windows.
    fn bias(&self, q: &Tensor, tables: &[Row; 2]) -> Result<Tensor> {
        let (windows, positions, _) = q.dims3()?;
        let [lines, columns] = self.window;
        let q = q.reshape((windows, lines, columns, self.heads, self.head_dim))?;
        // (windows, heads, lines, columns, size of the axis)
        let products = |axis: usize| {
            let size = self.window[axis];
            let distances: Vec<u32> =
                (0..size).flat_map(|query| (0..size).map(move |key| (query + size - 1 - key) as u32)).collect();
            let vectors =
                tables[axis].tensor.to_dtype(q.dtype())?.index_select(&Tensor::new(distances, q.device())?, 0)?;
            let vectors = vectors.reshape((size, size, self.head_dim))?; // (query, key, head_dim)
            let by_place = (0..size).map(|place| {
                let q = if axis == 0 { q.i((.., place))? } else { q.i((.., .., place))? }; // (windows, other, heads, dim)
                q.contiguous()?.reshape(((), self.head_dim))?.matmul(&vectors.i(place)?.t()?)
            });
            let other = positions / size;
            let y = Tensor::stack(&by_place.collect::<Result<Vec<_>>>()?, 0)?;
            let y = y.reshape((size, windows, other, self.heads, size))?;
            if axis == 0 { y.permute((1, 3, 0, 2, 4)) } else { y.permute((1, 3, 2, 0, 4)) }
        };
        let (of_lines, of_columns) = (products(0)?.unsqueeze(5)?, products(1)?.unsqueeze(4)?);
        of_lines.broadcast_add(&of_columns)?.reshape((windows, self.heads, positions, positions))
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }

    fn note_cost(&self, batch: usize, dtype: DType) {
        cost::note(|| {
            let queries = (batch * self.grid[0] * self.grid[1]) as u64;
            let [lines, columns] = self.window.map(|size| size as u64);
            let (heads, head_dim) = (self.heads as u64, self.head_dim as u64);
            let pairs = queries * lines * columns * heads;
            // products with vectors of lines and columns, two of which are added to each score
            let positions = 2 * queries * heads * (lines + columns) * head_dim + 2 * pairs;
            cost::Recorded {
                flops: cost::attention_flops(pairs, head_dim) + if self.positions.is_some() { positions } else { 0 },
                weight_bytes: 0,
                activation_bytes: queries * heads * head_dim * dtype.size_in_bytes() as u64,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_fused_path_agrees_with_the_plain_one() -> Result<()> {
        let cpu = &Device::Cpu;
        for (heads, head_dim, grid, window) in
            [(2, 8, [5, 5], [3, 3]), (3, 16, [4, 6], [4, 6]), (1, 33, [7, 4], [2, 3]), (2, 64, [16, 15], [14, 14])]
        {
            let (tokens, width) = (grid[0] * grid[1], heads * head_dim);
            let qkv = Tensor::randn(0f32, 1.0, (2, tokens, 3 * width), cpu)?;
            let part = |i: usize| qkv.narrow(2, i * width, width);
            let (q, k, v) = (part(0)?, part(1)?, part(2)?);
            let plain = WindowAttention::new([heads, head_dim], grid, window)?;
            let outside = Tensor::randn(0f32, 1.0, (2, width), cpu)?;
            let tables = window.map(|size| Tensor::randn(0f32, 0.5, (2 * size - 1, head_dim), cpu));
            let [lines, columns] = tables;
            let full = plain.clone().with_outside(&outside.get(0)?, &outside.get(1)?)?;
            let full = full.with_positions(&lines?, &columns?)?;
            for attention in [plain, full] {
                let (fused, wanted) = (attention.forward(&q, &k, &v)?, attention.forward_plain(&q, &k, &v)?);
                assert_eq!(fused.dims(), wanted.dims());
                let difference = (fused - wanted)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                // sums of some hundred products of size 1 in another order
                assert!(difference < 2e-5, "{grid:?} {window:?}: {difference}");
            }
        }
        Ok(())
    }

    /// A window as large as the grid, and nothing outside of it, is plain attention.
    #[test]
    fn one_window_is_attention() -> Result<()> {
        let qkv = Tensor::randn(0f32, 1.0, (2, 12, 3 * 8), &Device::Cpu)?;
        let part = |i: usize| qkv.narrow(2, i * 8, 8);
        let attention = Attention { heads: 2, kv_heads: 2, head_dim: 4, scale: None, pattern: Pattern::Full };
        let wanted = attention.forward(&part(0)?, &part(1)?, &part(2)?, None)?;
        let found = WindowAttention::new([2, 4], [3, 4], [3, 4])?.forward(&part(0)?, &part(1)?, &part(2)?)?;
        assert!((found - wanted)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? < 1e-6);
        Ok(())
    }

    #[test]
    fn flops_by_hand() -> Result<()> {
        // 6 tokens, each sees 4 positions of a window of 2 x 2, in 3 heads of 5
        let attention = WindowAttention::new([3, 5], [2, 3], [2, 2])?;
        let table = Tensor::zeros((3, 5), DType::F32, &Device::Cpu)?;
        let x = Tensor::zeros((1, 6, 15), DType::F32, &Device::Cpu)?;
        let flops = |attention: &WindowAttention| {
            let (y, recorded) = cost::record(|| attention.forward(&x, &x, &x));
            y.map(|_| recorded.flops)
        };
        let pairs = 3 * 6 * 4;
        let bare = pairs * (4 * 5 + 5);
        assert_eq!(flops(&attention)?, bare);
        // products with 4 vectors of 5, two additions a score
        assert_eq!(flops(&attention.with_positions(&table, &table)?)?, bare + 3 * 6 * 4 * 10 + 2 * pairs);
        Ok(())
    }

    #[test]
    fn misfits_are_named() -> Result<()> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let attention = WindowAttention::new([2, 4], [2, 3], [2, 2])?;
        let x = zeros(&[1, 5, 8])?;
        let error = attention.forward(&x, &x, &x).unwrap_err().to_string();
        assert!(error.contains("queries have shape [1, 5, 8], expected [1, 6, 8]"), "{error}");
        let error = attention.clone().with_positions(&zeros(&[3, 4])?, &zeros(&[5, 4])?).err().unwrap().to_string();
        assert!(error.contains("[5, 4], expected [3, 4]"), "{error}");
        assert!(attention.with_outside(&zeros(&[8])?, &zeros(&[7])?).is_err());
        assert!(WindowAttention::new([2, 4], [2, 0], [2, 2]).is_err());
        Ok(())
    }
}
