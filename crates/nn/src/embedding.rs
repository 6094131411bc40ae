//! Table lookup.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, DType, Device, IntDType, Result, Storage, Tensor, WithDType, bail};
use candle_nn::VarBuilder;

use crate::cost;
use crate::linear::Linear;
use crate::{op, options};

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
#[derive(Clone)]
pub struct Embedding {
    table: Table,
    vocab: usize,
    dim: usize,
}

/// A table as it is kept.
fn kept(table: &Tensor) -> Result<Tensor> {
    if options::current().sizes_only { op::sizes_of(table) } else { table.contiguous() }
}

#[derive(Clone)]
enum Table {
    /// (vocab, dim).
    Plain(Tensor),
    /// The weights of an output layer, which keeps them as its kernel reads them.
    Packed { output: Linear, dtype: DType },
}

impl Embedding {
    /// Reads `weight` (vocab, dim); it keeps its dtype.
    ///
    /// # Errors
    /// Of the `VarBuilder`, when the tensor is missing or has another shape.
    pub fn load(vocab: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        Self::new(&vb.get((vocab, dim), "weight")?)
    }

    /// Reads `weight` (vocab, dim) once for a table and for the output layer that is tied to it, x Wᵀ: on the CPU rows are
    /// looked up in what that layer packed.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_tied(vocab: usize, dim: usize, vb: VarBuilder) -> Result<(Self, Linear)> {
        let weight = vb.get((vocab, dim), "weight")?;
        let output = Linear::new(&weight, None)?.named(&vb.prefix());
        let table = match output.packed() {
            Some(_) => Table::Packed { output: output.clone(), dtype: weight.dtype() },
            None => Table::Plain(kept(&weight)?),
        };
        Ok((Self { table, vocab, dim }, output))
    }

    /// From a table (vocab, dim).
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn new(table: &Tensor) -> Result<Self> {
        let (vocab, dim) = table.dims2()?;
        Ok(Self { table: Table::Plain(kept(table)?), vocab, dim })
    }

    /// The layer that scores every row of the table, x Wᵀ + b.
    ///
    /// # Errors
    /// When `bias` is not one number per row.
    pub fn output(&self, bias: Option<&Tensor>) -> Result<Linear> {
        match &self.table {
            Table::Plain(table) => Linear::new(table, bias),
            Table::Packed { output, .. } => output.with_bias(bias),
        }
    }

    /// The rows named by `ids`: f32 on the CPU, of the table's dtype on other devices.
    ///
    /// # Shapes
    /// `ids` has any shape and an integer dtype, the result one dimension more: (..., dim).
    ///
    /// # Errors
    /// On the CPU when an id is not in the table; when `ids` are no integers.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let dim = self.dim;
        let (dtype, device) = match &self.table {
            Table::Plain(table) => (table.dtype(), table.device()),
            Table::Packed { dtype, .. } => (*dtype, &Device::Cpu),
        };
        let _span = cost::span("embedding", None);
        cost::note(|| {
            let (elements, stored) = (ids.elem_count() * dim, dtype.size_in_bytes());
            let written = if device.is_cpu() { size_of::<f32>() } else { stored };
            cost::weighted(0, elements * stored, elements * written)
        });
        if let Table::Plain(table) = &self.table
            && !(device.is_cpu() && ids.device().is_cpu())
        {
            let rows = table.index_select(&ids.flatten_all()?, 0)?;
            return rows.reshape([ids.dims(), &[dim]].concat());
        }
        op::apply1("embedding", &ids.contiguous()?, |ids, layout| {
            let shape = [layout.dims(), &[dim]].concat();
            let rows = match ids {
                CpuStorage::U8(_) => self.rows(op::elements::<u8>(ids, layout)?)?,
                CpuStorage::U32(_) => self.rows(op::elements::<u32>(ids, layout)?)?,
                CpuStorage::I64(_) => self.rows(op::elements::<i64>(ids, layout)?)?,
                _ => bail!("Embedding: the ids are not u8, u32 or i64"),
            };
            Ok((self.gather(&rows)?, shape.into()))
        })
    }

    /// `rows`, which lie within the table, one after the other in f32.
    fn gather(&self, rows: &[usize]) -> Result<Vec<f32>> {
        let table = match &self.table {
            Table::Packed { output, .. } => {
                let Some(matrix) = output.packed() else { bail!("Embedding: the output layer keeps no rows") };
                return Ok(collect_rows(rows, self.dim, |row, out| matrix.row(row, out)));
            }
            Table::Plain(table) => table,
        };
        let (storage, layout) = table.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("Embedding: the table is not on the CPU") };
        Ok(match table.dtype() {
            DType::F32 => copy_rows::<f32>(rows, op::elements(storage, layout)?, self.dim),
            DType::F64 => copy_rows::<f64>(rows, op::elements(storage, layout)?, self.dim),
            DType::F16 => copy_rows::<half::f16>(rows, op::elements(storage, layout)?, self.dim),
            DType::BF16 => copy_rows::<half::bf16>(rows, op::elements(storage, layout)?, self.dim),
            dtype => bail!("Embedding: the table is {dtype:?}, not a float"),
        })
    }

    /// `ids`, checked to be rows of the table.
    fn rows<T: IntDType + WithDType + std::fmt::Debug>(&self, ids: &[T]) -> Result<Vec<usize>> {
        let vocab = self.vocab;
        let row = |id: &T| {
            let row = usize::try_from(id.to_f64() as i64).ok().filter(|row| *row < vocab);
            row.ok_or_else(|| {
                candle_core::Error::Msg(format!("Embedding: id {id:?} is not in a table of {vocab} rows")).bt()
            })
        };
        ids.iter().map(row).collect()
    }
}

/// Rows of `table`, widened to f32.
fn copy_rows<T: WithDType>(rows: &[usize], table: &[T], dim: usize) -> Vec<f32> {
    collect_rows(rows, dim, |row, out| {
        for (out, x) in out.iter_mut().zip(&table[row * dim..][..dim]) {
            out.write(x.to_f64() as f32);
        }
    })
}

/// Rows of `dim` elements one after the other; `fill` writes all of the one that it is given.
fn collect_rows(rows: &[usize], dim: usize, fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
        for (row, out) in rows[begin / dim..].iter().zip(part.chunks_exact_mut(dim)) {
            fill(*row, out);
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
    fn a_tied_table_is_the_output_layers() -> Result<()> {
        let cpu = &Device::Cpu;
        let ids = Tensor::new(&[[99u32, 0], [47, 48]], cpu)?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let table = Tensor::arange(0f32, 300.0, cpu)?.reshape((100, 3))?.to_dtype(dtype)?;
            let vb = VarBuilder::from_tensors([("weight".to_owned(), table.clone())].into(), dtype, cpu);
            let (embedding, output) = Embedding::load_tied(100, 3, vb)?;
            let plain = Embedding::new(&table)?;
            assert_eq!(embedding.forward(&ids)?.to_vec3::<f32>()?, plain.forward(&ids)?.to_vec3::<f32>()?);
            let x = Tensor::new(&[[1f32, 0., 0.]], cpu)?;
            let first = output.forward(&x)?.to_vec2::<f32>()?;
            assert_eq!(first, plain.output(None)?.forward(&x)?.to_vec2::<f32>()?);
            assert_eq!(first[0][99], table.to_dtype(DType::F32)?.to_vec2::<f32>()?[99][0]);
            let biased = embedding.output(Some(&Tensor::full(2f32, 100, cpu)?))?;
            assert!(biased.has_bias() && !output.has_bias());
            let biased = biased.forward(&x)?.to_vec2::<f32>()?;
            assert_eq!(biased[0], first[0].iter().map(|x| x + 2.0).collect::<Vec<_>>());
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
        assert!(embedding.forward(&Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err().to_string().contains("not u8"));
        Ok(())
    }
}
