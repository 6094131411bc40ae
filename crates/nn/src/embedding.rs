//! Table lookup.

use std::mem::MaybeUninit;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, IntDType, Result, Tensor, WithDType, bail};
use candle_nn::VarBuilder;

use crate::cost;
use crate::op;

/// Elements that one thread copies at a time, about.
const CHUNK: usize = 16384;

/// Rows of a table by their numbers. Mirrors `torch.nn.Embedding`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::embedding::Embedding;
///
/// let table = Tensor::new(&[[0f32, 1.], [2., 3.], [4., 5.]], &Device::Cpu)?;
/// let y = Embedding::new(&table)?.forward(&Tensor::new(&[2u32, 0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[4., 5.], [0., 1.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Tensor,
}

impl Embedding {
    /// Reads `weight` (vocab, dim); it keeps its dtype.
    ///
    /// # Errors
    /// Of the `VarBuilder`, when the tensor is missing or has another shape.
    pub fn load(vocab: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        Self::new(&vb.get((vocab, dim), "weight")?)
    }

    /// From a table (vocab, dim).
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn new(table: &Tensor) -> Result<Self> {
        table.dims2()?;
        Ok(Self { table: table.contiguous()? })
    }

    /// The table (vocab, dim), for a head that is tied to it.
    pub fn weight(&self) -> &Tensor {
        &self.table
    }

    /// The rows named by `ids`: f32 on the CPU, of the table's dtype on other devices.
    ///
    /// # Shapes
    /// `ids` has any shape and an integer dtype, the result one dimension more: (..., dim).
    ///
    /// # Errors
    /// On the CPU when an id is not in the table; when `ids` are no integers.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, dim) = self.table.dims2()?;
        cost::note(|| {
            let (elements, stored) = (ids.elem_count() * dim, self.table.dtype().size_in_bytes());
            let written = if self.table.device().is_cpu() { size_of::<f32>() } else { stored };
            cost::weighted(0, elements * stored, elements * written)
        });
        if !self.table.device().is_cpu() || !ids.device().is_cpu() {
            let rows = self.table.index_select(&ids.flatten_all()?, 0)?;
            return rows.reshape([ids.dims(), &[dim]].concat());
        }
        op::apply2("embedding", &ids.contiguous()?, &self.table, |[(ids, layout), (table, table_layout)]| {
            let shape = [layout.dims(), &[dim]].concat();
            let rows = match ids {
                CpuStorage::U8(_) => self.rows(op::elements::<u8>(ids, layout)?)?,
                CpuStorage::U32(_) => self.rows(op::elements::<u32>(ids, layout)?)?,
                CpuStorage::I64(_) => self.rows(op::elements::<i64>(ids, layout)?)?,
                ids => bail!("Embedding: ids are {:?}, not u8, u32 or i64", ids.dtype()),
            };
            let data = match self.table.dtype() {
                DType::F32 => gather::<f32>(&rows, op::elements(table, table_layout)?, dim),
                DType::F64 => gather::<f64>(&rows, op::elements(table, table_layout)?, dim),
                DType::F16 => gather::<half::f16>(&rows, op::elements(table, table_layout)?, dim),
                DType::BF16 => gather::<half::bf16>(&rows, op::elements(table, table_layout)?, dim),
                dtype => bail!("Embedding: the table is {dtype:?}, not a float"),
            };
            Ok((data, shape.into()))
        })
    }

    /// `ids`, checked to be rows of the table.
    fn rows<T: IntDType + WithDType + std::fmt::Debug>(&self, ids: &[T]) -> Result<Vec<usize>> {
        let vocab = self.table.dim(0)?;
        let row = |id: &T| {
            let row = usize::try_from(id.to_f64() as i64).ok().filter(|row| *row < vocab);
            row.ok_or_else(|| {
                candle_core::Error::Msg(format!("Embedding: id {id:?} is not in a table of {vocab} rows")).bt()
            })
        };
        ids.iter().map(row).collect()
    }
}

/// Rows of `table` one after the other, widened to f32; `rows` lie within it.
fn gather<T: WithDType>(rows: &[usize], table: &[T], dim: usize) -> Vec<f32> {
    let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
        for (row, out) in rows[begin / dim..].iter().zip(part.chunks_exact_mut(dim)) {
            for (out, x) in out.iter_mut().zip(&table[row * dim..][..dim]) {
                out.write(x.to_f64() as f32);
            }
        }
    };
    #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
    // SAFETY: parts are whole rows, and each element of each row is written.
    unsafe {
        op::collect_chunks(rows.len() * dim, (CHUNK / dim.max(1)).max(1) * dim, fill)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn every_dtype_and_shape() -> Result<()> {
        let cpu = &Device::Cpu;
        let table = Tensor::arange(0f32, 300.0, cpu)?.reshape((100, 3))?;
        let ids = Tensor::new(&[[99u32, 0], [5, 5]], cpu)?;
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for ids in
                [ids.clone(), ids.t()?, ids.to_dtype(DType::I64)?, ids.to_dtype(DType::U8)?, ids.narrow(0, 0, 0)?]
            {
                let table = table.to_dtype(dtype)?;
                let got = Embedding::new(&table)?.forward(&ids)?;
                assert_eq!((got.dtype(), got.dims()), (DType::F32, &[ids.dim(0)?, 2, 3][..]));
                let want = table.to_dtype(DType::F32)?.index_select(&ids.contiguous()?.flatten_all()?, 0)?;
                assert_eq!(got.flatten(0, 1)?.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
            }
        }
        Ok(())
    }

    #[test]
    fn an_id_outside_the_table_is_named() -> Result<()> {
        let embedding = Embedding::new(&Tensor::zeros((10, 4), DType::F32, &Device::Cpu)?)?;
        for bad in [10i64, -1] {
            let error = embedding.forward(&Tensor::new(&[[3, bad]], &Device::Cpu)?).unwrap_err().to_string();
            assert!(error.contains(&format!("id {bad} is not in a table of 10 rows")), "{error}");
        }
        assert!(embedding.forward(&Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err().to_string().contains("F32"));
        Ok(())
    }
}
