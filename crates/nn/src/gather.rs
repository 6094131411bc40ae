//! Rows of a tensor in another order, with some left out, repeated, or zeros between: windows of an image, patches that
//! are merged.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::op;

/// Elements that one thread copies at a time, about.
const CHUNK: usize = 16384;

/// In the place of a row's number: a row of zeros.
pub(crate) const ZEROS: u32 = u32::MAX;

/// Which rows of one tensor make up another of shape (outer, inner, width). Cloning shares it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::gather::{RowIndex, gather};
///
/// let x = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let index = RowIndex::new(3, (1, 4), [Some(2), None, Some(0), Some(2)])?;
/// assert_eq!(gather(&x, &index)?.to_vec3::<f32>()?, [[[5., 6.], [0., 0.], [1., 2.], [5., 6.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RowIndex {
    source: usize,
    shape: (usize, usize),
    rows: Arc<[u32]>,
}

impl RowIndex {
    /// From the numbers of rows among `source`, `None` for zeros, as many as `shape` (outer, inner) holds.
    ///
    /// # Errors
    /// When there are more or fewer, or a row does not exist.
    pub fn new(source: usize, shape: (usize, usize), rows: impl IntoIterator<Item = Option<usize>>) -> Result<Self> {
        let number = |row: Option<usize>| match row {
            None => Ok(ZEROS),
            Some(row) if row < source.min(ZEROS as usize) => Ok(row as u32),
            Some(row) => bail!("row {row} is asked of {source} rows"),
        };
        let rows = rows.into_iter().map(number).collect::<Result<Arc<[u32]>>>()?;
        if rows.len() != shape.0 * shape.1 {
            bail!("{} rows are to have the shape {shape:?}", rows.len())
        }
        Ok(Self { source, shape, rows })
    }

    /// What a tensor made by it has before its width.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// The width of `x`, whose rows are as many as the index was made for.
    pub(crate) fn width_of(&self, x: &Tensor) -> Result<usize> {
        match x.dims().split_last() {
            Some((&width, rows)) if width > 0 && rows.iter().product::<usize>() == self.source => Ok(width),
            _ => bail!("rows are picked of {}, not of an input of shape {:?}", self.source, x.dims()),
        }
    }
}

/// The rows that `index` picks, copied.
///
/// # Shapes
/// (..., width) → (outer, inner, width).
///
/// # Errors
/// When `x` has another number of rows than the index was made for.
pub fn gather(x: &Tensor, index: &RowIndex) -> Result<Tensor> {
    let width = index.width_of(x)?;
    let shape = (index.shape.0, index.shape.1, width);
    if !op::is_cpu_f32(x) {
        let zeros = Tensor::zeros((1, width), x.dtype(), x.device())?;
        let rows = Tensor::cat(&[&x.reshape(((), width))?, &zeros], 0)?;
        let number = |row: &u32| if *row == ZEROS { index.source as u32 } else { *row };
        let numbers = Tensor::from_iter(index.rows.iter().map(number), x.device())?;
        return rows.index_select(&numbers, 0)?.reshape(shape);
    }
    op::apply1("gather", &x.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        let per_part = (CHUNK / width).max(1);
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: a part is whole rows, and each is written.
        let y = unsafe {
            op::collect_chunks(index.rows.len() * width, per_part * width, |begin, part| {
                for (row, out) in index.rows[begin / width..].iter().zip(part.chunks_exact_mut(width)) {
                    match *row {
                        ZEROS => out.fill(std::mem::MaybeUninit::new(0.0)),
                        row => {
                            out.write_copy_of_slice(&x[row as usize * width..][..width]);
                        }
                    }
                }
            })
        };
        Ok((y, shape.into()))
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn both_ways_agree() -> Result<()> {
        for (source, width, shape) in [(5, 3, (2, 4)), (900, 67, (40, 30)), (1, 20_000, (3, 1)), (4, 2, (0, 7))] {
            let x = Tensor::randn(0f32, 1.0, (1, source, width), &Device::Cpu)?;
            let rows = (0..shape.0 * shape.1).map(|i| (i % 7 != 3).then_some(i * 31 % source));
            let index = RowIndex::new(source, shape, rows)?;
            let (found, plain) = (gather(&x, &index)?, gather(&x.to_dtype(DType::F64)?, &index)?);
            assert_eq!(found.dims(), [shape.0, shape.1, width]);
            assert_eq!(found.to_vec3::<f32>()?, plain.to_dtype(DType::F32)?.to_vec3::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<()> {
        let message = |error: Option<candle_core::Error>| error.map(|error| error.to_string()).unwrap_or_default();
        assert!(message(RowIndex::new(3, (1, 1), [Some(3)]).err()).contains("row 3 is asked of 3"));
        assert!(message(RowIndex::new(3, (2, 2), [Some(1)]).err()).contains("(2, 2)"));
        let index = RowIndex::new(3, (1, 1), [Some(1)])?;
        let x = Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?;
        assert!(message(gather(&x, &index).err()).contains("[2, 2]"));
        Ok(())
    }
}
