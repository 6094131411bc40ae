//! y = x Wᵀ + b, with what follows it fused: on the CPU a product with weights packed at load, elsewhere candle's own.
//! Mirrors `torch.nn.Linear`.

use std::mem::MaybeUninit;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, IndexOp, Layout, Result, Shape, Storage, Tensor, bail};
use candle_nn::VarBuilder;

use crate::activation::Activation;
use crate::cost;
use crate::gather::{RowIndex, gather};
use crate::kernels::KernelError;
use crate::kernels::matmul::{Epilogue, PackedMatrix, Rows, Weights, matmul, matmul_picked};
use crate::kernels::quant::{Quantization, QuantizedMatrix, matmul_quantized};
use crate::{memory, op, options};

/// In what form a layer on the CPU keeps its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// That of the tensor it is made from.
    #[default]
    Native,
    /// 8.5 bits per weight: see [`quant`](crate::kernels::quant) for what is rounded.
    Q8,
    /// 4.5 bits per weight.
    Q4,
}

/// A dense layer. Cloning shares the weights.
///
/// On the CPU weights in f32, bf16 and f16 are packed for the kernel in their own precision (the unpacked ones are
/// dropped) and the activations are f32; on other devices, and for other dtypes, the activations have the weights'
/// dtype.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::linear::Linear;
///
/// let weight = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?; // (out, in)
/// let bias = Tensor::new(&[0f32, 0., 10.], &Device::Cpu)?;
/// let linear = Linear::new(&weight, Some(&bias))?;
/// let x = Tensor::new(&[[1f32, -1.]], &Device::Cpu)?;
/// assert_eq!(linear.forward(&x)?.to_vec2::<f32>()?, [[-1., -1., 9.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Linear {
    in_dim: usize,
    out_dim: usize,
    weight: Weight,
    /// For a profile.
    name: Option<Arc<str>>,
}

#[derive(Clone)]
enum Weight {
    /// For the kernel.
    Packed { matrix: Arc<Matrix>, bias: Option<Arc<[f32]>> },
    /// For candle: (out, in) and (out).
    Plain { weight: Tensor, bias: Option<Tensor> },
}

/// Weights that a kernel reads.
enum Matrix {
    Native(PackedMatrix),
    Quantized(QuantizedMatrix),
}

impl Matrix {
    fn n(&self) -> usize {
        match self {
            Self::Native(matrix) => matrix.n(),
            Self::Quantized(matrix) => matrix.n(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Native(matrix) => matrix.bytes(),
            Self::Quantized(matrix) => matrix.bytes(),
        }
    }

    fn product(
        &self,
        x: Rows<'_>,
        m: usize,
        epilogue: &Epilogue<'_>,
        out: &mut [MaybeUninit<f32>],
    ) -> std::result::Result<(), KernelError> {
        match self {
            Self::Native(matrix) => matmul(x, m, matrix, epilogue, out),
            Self::Quantized(matrix) => matmul_quantized(x, m, matrix, epilogue, out),
        }
    }
}

impl Linear {
    /// From `weight` (out, in) and `bias` (out), kept as [`options`] say.
    ///
    /// # Errors
    /// When the shapes do not fit together, or as for [`new_with`](Self::new_with).
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let options = options::current();
        let precision = options.precision;
        let linear = Self::new_with(weight, bias, precision)?;
        if precision != Precision::Native {
            let native = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
            let kept = if options.sizes_only { linear.quantized_bytes(precision) } else { linear.weight_bytes() };
            options::note_quantized(native(weight) + bias.map_or(0, native), kept);
        }
        Ok(linear)
    }

    /// As [`new`](Self::new), with the weights kept as `precision` says.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use roofbench_nn::linear::{Linear, Precision};
    ///
    /// let weight = Tensor::ones((64, 96), candle_core::DType::F32, &Device::Cpu)?; // (out, in)
    /// let linear = Linear::new_with(&weight, None, Precision::Q8)?;
    /// assert_eq!(linear.weight_bytes(), 64 * (96 + 2 * 96 / 32)); // a byte per weight and two per 32
    /// let y = linear.forward(&Tensor::ones((1, 96), candle_core::DType::F32, &Device::Cpu)?)?;
    /// assert!((y.max_all()?.to_scalar::<f32>()? - 96.0).abs() < 0.5);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the shapes do not fit together, or weights that are not f32, bf16 or f16 on the CPU are to be quantised.
    pub fn new_with(weight: &Tensor, bias: Option<&Tensor>, precision: Precision) -> Result<Self> {
        memory::keep_freed_memory();
        let (out_dim, in_dim) = weight.dims2()?;
        if options::current().sizes_only {
            let weight = Weight::Plain { weight: op::sizes_of(weight)?, bias: None };
            return Self { in_dim, out_dim, weight, name: None }.with_bias(bias);
        }
        let weight = match pack_as(&weight.contiguous()?, out_dim, in_dim, precision)? {
            Some(matrix) => Weight::Packed { matrix: Arc::new(matrix), bias: None },
            None if precision != Precision::Native => bail!(
                "linear: {precision:?} is for weights in f32, bf16 or f16 on the CPU; these are {:?} on {:?}",
                weight.dtype(),
                weight.device().location()
            ),
            None => Weight::Plain { weight: op::unpacked(weight)?, bias: None },
        };
        Self { in_dim, out_dim, weight, name: None }.with_bias(bias)
    }

    /// The same weights, which are shared, with another `bias` (out), or with none.
    ///
    /// # Errors
    /// When the bias has another shape.
    pub fn with_bias(&self, bias: Option<&Tensor>) -> Result<Self> {
        if let Some(bias) = bias
            && bias.dims() != [self.out_dim]
        {
            let weight = [self.out_dim, self.in_dim];
            bail!("linear: the weight has shape {weight:?}, the bias {:?}; expected [{}]", bias.dims(), self.out_dim);
        }
        let weight = match &self.weight {
            Weight::Packed { matrix, .. } => {
                let bias = bias.map(|bias| bias.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
                Weight::Packed { matrix: Arc::clone(matrix), bias: bias.map(Arc::from) }
            }
            Weight::Plain { weight, .. } => {
                Weight::Plain { weight: weight.clone(), bias: bias.map(op::unpacked).transpose()? }
            }
        };
        Ok(Self { weight, name: self.name.clone(), ..*self })
    }

    /// Reads `weight` (out, in) and, if wanted, `bias` (out).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Self> {
        let weight = vb.get((out_dim, in_dim), "weight")?;
        let bias = if bias { Some(vb.get(out_dim, "bias")?) } else { None };
        Ok(Self::new(&weight, bias.as_ref())?.named(&vb.prefix()))
    }

    /// Several layers on the same input as one product: its outputs are theirs, side by side in the order of `parts`
    /// (name, out).
    ///
    /// # Errors
    /// When `parts` is empty, or a tensor is missing or has another shape.
    pub fn load_fused(in_dim: usize, parts: &[(&str, usize)], bias: bool, vb: VarBuilder<'_>) -> Result<Self> {
        let weights =
            parts.iter().map(|&(name, out)| vb.pp(name).get((out, in_dim), "weight")).collect::<Result<Vec<_>>>()?;
        let out_dim = parts.iter().map(|(_, out)| out).sum::<usize>();
        let biases = parts
            .iter()
            .filter(|_| bias)
            .map(|&(name, out)| vb.pp(name).get(out, "bias"))
            .collect::<Result<Vec<_>>>()?;
        let bias = if bias { Some(Tensor::cat(&biases, 0)?) } else { None };
        let weight = match weights.first() {
            Some(first) if options::current().sizes_only => first.i(0)?.broadcast_as((out_dim, in_dim))?,
            _ => Tensor::cat(&weights, 0)?,
        };
        let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
        Ok(Self::new(&weight, bias.as_ref())?.named(&vb.pp(names.join("+")).prefix()))
    }

    /// Named by its weights, for a [`profile`](cost::profile).
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// The weights as a table of rows, where the kernel's are not rounded further: see
    /// [`Embedding::load_tied`](crate::embedding::Embedding::load_tied).
    pub(crate) fn packed(&self) -> Option<&PackedMatrix> {
        match &self.weight {
            Weight::Packed { matrix, .. } => match &**matrix {
                Matrix::Native(matrix) => Some(matrix),
                Matrix::Quantized(_) => None,
            },
            Weight::Plain { .. } => None,
        }
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// Whether it adds a bias.
    pub fn has_bias(&self) -> bool {
        match &self.weight {
            Weight::Packed { bias, .. } => bias.is_some(),
            Weight::Plain { bias, .. } => bias.is_some(),
        }
    }

    /// Bytes that the weights and the bias occupy.
    pub fn weight_bytes(&self) -> usize {
        let tensor = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        match &self.weight {
            Weight::Packed { matrix, bias } => {
                matrix.bytes() + bias.as_ref().map_or(0, |bias| size_of_val::<[f32]>(bias))
            }
            Weight::Plain { weight, bias } => tensor(weight) + bias.as_ref().map_or(0, tensor),
        }
    }

    /// Those in the form of `precision`, which they are not in yet.
    fn quantized_bytes(&self, precision: Precision) -> usize {
        let bias = if self.has_bias() { self.out_dim * size_of::<f32>() } else { 0 };
        let quantization = match precision {
            Precision::Native => return self.weight_bytes(),
            Precision::Q8 => Quantization::Q8,
            Precision::Q4 => Quantization::Q4,
        };
        quantization.bytes(self.out_dim, self.in_dim) + bias
    }

    /// x Wᵀ + b.
    ///
    /// # Shapes
    /// (..., in) → (..., out).
    ///
    /// # Errors
    /// When the last dimension is not `in`, or the device or dtype is not that of the weights (f32 on the CPU).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_act(x, Activation::Identity)
    }

    /// activation(x Wᵀ + b).
    ///
    /// # Shapes
    /// (..., in) → (..., out).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.check(x)?;
        let _span = cost::span("linear", self.name.as_ref());
        self.note_cost(x.elem_count() / self.in_dim.max(1), x.dtype());
        match &self.weight {
            Weight::Packed { matrix, bias } => {
                activation.note_cost(x.elem_count() / self.in_dim.max(1) * self.out_dim);
                let product = Product { matrix, bias: bias.as_deref(), activation };
                with_rows(x)?.apply_op1_no_bwd(&product)
            }
            Weight::Plain { weight, bias } => activation.forward(&plain(x, weight, bias.as_ref())?),
        }
    }

    /// x Wᵀ + b + residual.
    ///
    /// # Shapes
    /// x (..., in), residual (..., out) → (..., out).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when the residual has not the result's shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let shape = self.out_shape(x.dims());
        if residual.shape() != &shape {
            bail!("linear: the residual has shape {:?}, the result {shape:?}", residual.shape());
        }
        let _span = cost::span("linear", self.name.as_ref());
        self.note_cost(x.elem_count() / self.in_dim.max(1), x.dtype());
        cost::elementwise(shape.elem_count(), 1);
        match &self.weight {
            Weight::Packed { matrix, bias } => {
                let product = Product { matrix, bias: bias.as_deref(), activation: Activation::Identity };
                with_rows(x)?.apply_op2_no_bwd(&with_rows(residual)?, &product)
            }
            Weight::Plain { weight, bias } => plain(x, weight, bias.as_ref())? + residual,
        }
    }

    /// [`forward`](Self::forward) of the rows that `index` picks; on the CPU they are read where they lie, and not
    /// copied as a whole.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use roofbench_nn::gather::RowIndex;
    /// use roofbench_nn::linear::Linear;
    ///
    /// let linear = Linear::new(&Tensor::new(&[[1f32, 10.]], &Device::Cpu)?, None)?;
    /// let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
    /// let index = RowIndex::new(2, (1, 3), [Some(1), None, Some(0)])?;
    /// assert_eq!(linear.forward_rows(&x, &index)?.to_vec3::<f32>()?, [[[43.], [0.], [21.]]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Shapes
    /// (..., in) → (outer, inner, out), those of the index.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when `x` has another number of rows than the index was made for.
    pub fn forward_rows(&self, x: &Tensor, index: &RowIndex) -> Result<Tensor> {
        self.picked(x, index, None)
    }

    /// [`forward_add`](Self::forward_add) of the rows that `index` picks.
    ///
    /// # Shapes
    /// x (..., in), residual (outer, inner, out), the index's, which the result has too.
    ///
    /// # Errors
    /// As for [`forward_rows`](Self::forward_rows), and when the residual has not the result's shape.
    pub fn forward_rows_add(&self, x: &Tensor, index: &RowIndex, residual: &Tensor) -> Result<Tensor> {
        self.picked(x, index, Some(residual))
    }

    fn picked(&self, x: &Tensor, index: &RowIndex, residual: Option<&Tensor>) -> Result<Tensor> {
        self.check(x)?;
        index.width_of(x)?;
        let (Weight::Packed { bias, .. }, Some(matrix)) = (&self.weight, self.packed()) else {
            let x = gather(x, index)?;
            return residual.map_or_else(|| self.forward(&x), |residual| self.forward_add(&x, residual));
        };
        let (outer, inner) = index.shape();
        let shape = Shape::from((outer, inner, self.out_dim));
        if let Some(residual) = residual.filter(|residual| residual.shape() != &shape) {
            bail!("linear: the residual has shape {:?}, the result {shape:?}", residual.shape());
        }
        let _span = cost::span("linear", self.name.as_ref());
        self.note_cost(index.rows().len(), x.dtype());
        let run = |x: (&CpuStorage, &Layout), residual: Option<(&CpuStorage, &Layout)>| {
            let residual = residual.map(rows).transpose()?;
            let epilogue = Epilogue { bias: bias.as_deref(), activation: Activation::Identity, residual };
            let y = filled(shape.elem_count(), |out| {
                matmul_picked(rows(x)?, index.rows(), matrix, &epilogue, out).map_err(candle_core::Error::wrap)
            })?;
            Ok((y, shape.clone()))
        };
        match residual {
            None => op::apply1("packed-linear-rows", &with_rows(x)?, |storage, layout| run((storage, layout), None)),
            Some(residual) => {
                cost::elementwise(shape.elem_count(), 1);
                let (x, residual) = (with_rows(x)?, with_rows(residual)?);
                op::apply2("packed-linear-rows-add", &x, &residual, |[x, residual]| run(x, Some(residual)))
            }
        }
    }

    fn note_cost(&self, rows: usize, dtype: DType) {
        cost::note(|| {
            let outputs = rows * self.out_dim;
            let flops = 2 * rows * self.in_dim * self.out_dim + usize::from(self.has_bias()) * outputs;
            cost::weighted(flops, self.weight_bytes(), outputs * dtype.size_in_bytes())
        });
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        if x.dims().last() != Some(&self.in_dim) {
            bail!("linear: the input has shape {:?}, its last dimension should be {}", x.dims(), self.in_dim);
        }
        if matches!(self.weight, Weight::Packed { .. }) && x.dtype() != DType::F32 {
            bail!("linear: the input is {:?}; on the CPU activations are f32, convert it with to_dtype", x.dtype());
        }
        Ok(())
    }

    fn out_shape(&self, x: &[usize]) -> Shape {
        with_last(x, self.out_dim)
    }
}

fn with_last(dims: &[usize], last: usize) -> Shape {
    let mut dims = dims.to_vec();
    if let Some(dim) = dims.last_mut() {
        *dim = last;
    }
    Shape::from(dims)
}

/// `None` for a device or dtype that the kernel does not do.
pub(crate) fn pack(weight: &Tensor, n: usize, k: usize) -> Result<Option<PackedMatrix>> {
    with_weights(weight, n, k, |weights| PackedMatrix::pack(weights, n, k))
}

/// As [`pack`], in the form that `precision` asks for.
fn pack_as(weight: &Tensor, n: usize, k: usize, precision: Precision) -> Result<Option<Matrix>> {
    if precision == Precision::Native && !options::current().packed_weights {
        return Ok(None);
    }
    with_weights(weight, n, k, |weights| {
        let quantized = |quantization| QuantizedMatrix::quantize(weights, n, k, quantization).map(Matrix::Quantized);
        match precision {
            Precision::Native => PackedMatrix::pack(weights, n, k).map(Matrix::Native),
            Precision::Q8 => quantized(Quantization::Q8),
            Precision::Q4 => quantized(Quantization::Q4),
        }
    })
}

fn with_weights<T>(
    weight: &Tensor,
    n: usize,
    k: usize,
    pack: impl FnOnce(Weights<'_>) -> std::result::Result<T, KernelError>,
) -> Result<Option<T>> {
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Ok(None) };
    let range = layout.start_offset()..layout.start_offset() + n * k;
    let weights = match storage {
        CpuStorage::F32(w) => Weights::F32(&w[range]),
        CpuStorage::BF16(w) => Weights::Bf16(&w[range]),
        CpuStorage::F16(w) => Weights::F16(&w[range]),
        _ => return Ok(None),
    };
    pack(weights).map(Some).map_err(candle_core::Error::wrap)
}

fn plain(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let rows = x.reshape(((), x.dim(D::Minus1)?))?; // (rows, in)
    let y = rows.matmul(&weight.t()?)?.reshape(with_last(x.dims(), weight.dim(0)?))?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// The tensor itself where its rows are contiguous and evenly spaced, else a copy for which they are.
fn with_rows(x: &Tensor) -> Result<Tensor> {
    if row_stride(x.layout()).is_some() { Ok(x.clone()) } else { x.contiguous() }
}

/// Elements from one row (last dimension) to the next, when each is contiguous and all are evenly spaced.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (&width, dims) = layout.dims().split_last()?;
    let (&last, strides) = layout.stride().split_last()?;
    if last != 1 && width > 1 {
        return None;
    }
    // From the innermost on: the distance of rows, and how far one dimension further out has to step.
    let mut found: Option<(usize, usize)> = None;
    for (&dim, &stride) in dims.iter().zip(strides).rev().filter(|(dim, _)| **dim != 1) {
        found = match found {
            None => Some((stride, stride * dim)),
            Some((row, step)) if step == stride => Some((row, stride * dim)),
            Some(_) => return None,
        };
    }
    Some(found.map_or(width, |(row, _)| row))
}

fn rows<'a>((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Rows<'a>> {
    let Some(stride) = row_stride(layout) else { bail!("linear: rows of {layout:?} are not evenly spaced") };
    Ok(Rows { data: storage.as_slice::<f32>()?.get(layout.start_offset()..).unwrap_or_default(), stride })
}

/// The product as candle calls it.
struct Product<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    activation: Activation,
}

impl Product<'_> {
    fn run(&self, x: (&CpuStorage, &Layout), residual: Option<(&CpuStorage, &Layout)>) -> Result<(CpuStorage, Shape)> {
        let epilogue =
            Epilogue { bias: self.bias, activation: self.activation, residual: residual.map(rows).transpose()? };
        let shape = with_last(x.1.dims(), self.matrix.n());
        let m = x.1.dims().split_last().map_or(1, |(_, rows)| rows.iter().product());
        let y = filled(shape.elem_count(), |out| {
            self.matrix.product(rows(x)?, m, &epilogue, out).map_err(candle_core::Error::wrap)
        })?;
        Ok((CpuStorage::F32(y), shape))
    }
}

/// A vector that `write` fills, without zeroing it first.
fn filled(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<()>) -> Result<Vec<f32>> {
    let mut out = Vec::with_capacity(len);
    write(&mut out.spare_capacity_mut()[..len])?;
    // SAFETY: `write` is the product, which writes every element or fails.
    #[expect(unsafe_code, reason = "the kernel wrote every element")]
    unsafe {
        out.set_len(len);
    }
    Ok(out)
}

impl CustomOp1 for Product<'_> {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, layout), None)
    }
}

impl CustomOp2 for Product<'_> {
    fn name(&self) -> &'static str {
        "packed-linear-add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, residual: &CpuStorage, rl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((x, xl), Some((residual, rl)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::VarMap;

    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    /// Candle's product of the same numbers, in f64.
    fn expected(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let bias = bias.map(double);
        plain(&double(&x.contiguous().unwrap()), &double(weight), bias.as_ref()).unwrap()
    }

    /// Sums of up to 100 products of standard normals: 100 roundings of at most half an ULP of a sum below 64.
    fn assert_close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        let error = (found.to_dtype(DType::F64).unwrap() - expected).unwrap().abs().unwrap().flatten_all().unwrap();
        let error = error.max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(error < 1e-4, "{error}");
    }

    #[test]
    fn every_layout_of_the_input() {
        let (weight, bias) = (random(&[70, 100]), random(&[70]));
        let linear = Linear::new(&weight, Some(&bias)).unwrap();
        assert_eq!((linear.in_dim(), linear.out_dim()), (100, 70));
        let wide = random(&[3, 5, 300]);
        let inputs = [
            random(&[100]),
            random(&[3, 5, 100]),
            wide.narrow(2, 100, 100).unwrap(),
            wide.narrow(2, 0, 100).unwrap().narrow(1, 2, 1).unwrap(),
            wide.narrow(2, 0, 100).unwrap().narrow(1, 1, 3).unwrap(),
            random(&[5, 100]).unsqueeze(0).unwrap().broadcast_as((3, 5, 100)).unwrap(),
            random(&[2, 100, 4]).transpose(1, 2).unwrap(),
            random(&[0, 100]),
        ];
        for x in &inputs {
            let expected = expected(x, &weight, Some(&bias));
            let found = linear.forward(x).unwrap();
            assert_eq!(found.dims(), expected.dims());
            if x.elem_count() > 0 {
                assert_close(&found, &expected);
            }
        }
    }

    #[test]
    fn activation_and_residual() {
        let (weight, x) = (random(&[70, 100]), random(&[2, 9, 100]));
        let linear = Linear::new(&weight, None).unwrap();
        let sum = expected(&x, &weight, None);
        let gelu = linear.forward_act(&x, Activation::Gelu).unwrap();
        assert_close(&gelu, &sum.gelu_erf().unwrap());
        let wide = random(&[2, 9, 140]);
        for residual in [random(&[2, 9, 70]), wide.narrow(2, 70, 70).unwrap(), random(&[70, 9, 2]).t_all()] {
            let found = linear.forward_add(&x, &residual).unwrap();
            assert_close(&found, &(&sum + residual.to_dtype(DType::F64).unwrap()).unwrap());
        }
        let error = linear.forward_add(&x, &random(&[2, 9, 71])).unwrap_err().to_string();
        assert!(error.contains("[2, 9, 71]") && error.contains("[2, 9, 70]"), "{error}");
    }

    #[test]
    fn picked_rows() {
        let (weight, bias, x) = (random(&[70, 100]), random(&[70]), random(&[2, 9, 100]));
        let index = RowIndex::new(18, (3, 8), (0..24).map(|i| (i % 4 != 1).then_some(i * 5 % 18))).unwrap();
        let copied = gather(&x, &index).unwrap();
        let residual = random(&[3, 8, 70]);
        for precision in [Precision::Native, Precision::Q8] {
            let linear = Linear::new_with(&weight, Some(&bias), precision).unwrap();
            let ((found, recorded), (expected, of_copy)) = (
                cost::record(|| linear.forward_rows(&x, &index).unwrap()),
                cost::record(|| linear.forward(&copied).unwrap()),
            );
            assert_eq!(found.to_vec3::<f32>().unwrap(), expected.to_vec3::<f32>().unwrap());
            assert_eq!(recorded, of_copy);
            let ((found, recorded), (expected, of_copy)) = (
                cost::record(|| linear.forward_rows_add(&x, &index, &residual).unwrap()),
                cost::record(|| linear.forward_add(&copied, &residual).unwrap()),
            );
            assert_eq!(found.to_vec3::<f32>().unwrap(), expected.to_vec3::<f32>().unwrap());
            assert_eq!(recorded, of_copy);
        }
        let linear = Linear::new(&weight, None).unwrap();
        assert!(linear.forward_rows_add(&x, &index, &x).unwrap_err().to_string().contains("[3, 8, 70]"));
        assert!(linear.forward_rows(&random(&[17, 100]), &index).unwrap_err().to_string().contains("[17, 100]"));
    }

    trait Transposed {
        fn t_all(&self) -> Tensor;
    }
    impl Transposed for Tensor {
        fn t_all(&self) -> Tensor {
            self.permute((2, 1, 0)).unwrap()
        }
    }

    #[test]
    fn half_precision_weights_stay_so() {
        // numbers of bf16, which a product of bf16 does not round
        let x = random(&[4, 100]).to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        for dtype in [DType::BF16, DType::F16] {
            let weight = random(&[70, 100]).to_dtype(dtype).unwrap();
            let bias = random(&[70]).to_dtype(dtype).unwrap();
            let linear = Linear::new(&weight, Some(&bias)).unwrap();
            assert_close(&linear.forward(&x).unwrap(), &expected(&x, &weight, Some(&bias)));
            assert!(linear.weight_bytes() < 100 * 96 * 2 + 4 * 70 + 1);
        }
    }

    /// Half a step of a weight is 1/254 (8 bits) or at most 1/8 (4 bits) of the largest in its block, and so in its row;
    /// half a step of an activation 1/254 of the largest.
    #[test]
    fn quantized_weights() {
        let (weight, bias, x) = (random(&[70, 100]), random(&[70]), random(&[2, 9, 100]));
        let residual = random(&[2, 9, 70]);
        let largest = |t: &Tensor| t.abs().unwrap().max_keepdim(D::Minus1).unwrap().to_dtype(DType::F64).unwrap();
        let sums = |t: &Tensor| t.abs().unwrap().sum_keepdim(D::Minus1).unwrap().to_dtype(DType::F64).unwrap();
        let wide = expected(&x, &weight, Some(&bias));
        for (precision, step, bits) in [(Precision::Q8, 1.0 / 127.0, 8), (Precision::Q4, 1.0 / 4.0, 4)] {
            let linear = Linear::new_with(&weight, Some(&bias), precision).unwrap();
            // 100 are padded to 128, 70 columns to at most 96
            assert!((70..=96).contains(&((linear.weight_bytes() - 4 * 70) / (128 * bits / 8 + 2 * 4))));
            let of_weights = sums(&x).broadcast_mul(&largest(&weight).t().unwrap()).unwrap();
            let of_inputs = largest(&x).broadcast_mul(&sums(&weight).t().unwrap()).unwrap();
            // 1.01: scales are rounded up, and the two roundings meet
            let most = ((of_weights * (1.01 * step / 2.0)).unwrap() + (of_inputs * (1.2 / 254.0)).unwrap()).unwrap();
            let check = |found: Tensor, expected: &Tensor| {
                let error = (found.to_dtype(DType::F64).unwrap() - expected).unwrap().abs().unwrap();
                let above = error.gt(&most).unwrap().sum_all().unwrap().to_scalar::<u8>().unwrap();
                assert_eq!(above, 0, "{precision:?}");
            };
            let (y, recorded) = cost::record(|| linear.forward(&x));
            check(y.unwrap(), &wide);
            assert_eq!(recorded.weight_bytes, linear.weight_bytes() as u64);
            check(linear.forward_act(&x, Activation::Relu).unwrap(), &wide.relu().unwrap());
            let added = (&wide + residual.to_dtype(DType::F64).unwrap()).unwrap();
            check(linear.forward_add(&x, &residual).unwrap(), &added);
        }
        let error = Linear::new_with(&weight.to_dtype(DType::F64).unwrap(), None, Precision::Q4).err().unwrap();
        assert!(error.to_string().contains("Q4") && error.to_string().contains("F64"), "{error}");
    }

    #[test]
    fn other_dtypes_use_candle() {
        let (weight, bias) =
            (random(&[7, 10]).to_dtype(DType::F64).unwrap(), random(&[7]).to_dtype(DType::F64).unwrap());
        let linear = Linear::new(&weight, Some(&bias)).unwrap();
        let x = random(&[2, 3, 10]).to_dtype(DType::F64).unwrap();
        assert_eq!(linear.weight_bytes(), 8 * 77);
        assert_close(&linear.forward(&x).unwrap(), &expected(&x, &weight, Some(&bias)));
        assert_close(
            &linear.forward_act(&x, Activation::Relu).unwrap(),
            &expected(&x, &weight, Some(&bias)).relu().unwrap(),
        );
    }

    #[test]
    fn fused_layers_stand_side_by_side() {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        let query = Linear::load(10, 6, true, vb.pp("query")).unwrap();
        let value = Linear::load(10, 4, true, vb.pp("value")).unwrap();
        let fused = Linear::load_fused(10, &[("query", 6), ("value", 4)], true, vb).unwrap();
        let x = random(&[3, 10]);
        let y = fused.forward(&x).unwrap();
        assert_eq!(
            y.i((.., ..6)).unwrap().to_vec2::<f32>().unwrap(),
            query.forward(&x).unwrap().to_vec2::<f32>().unwrap()
        );
        assert_eq!(
            y.i((.., 6..)).unwrap().to_vec2::<f32>().unwrap(),
            value.forward(&x).unwrap().to_vec2::<f32>().unwrap()
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let linear = Linear::new(&random(&[7, 10]), None).unwrap();
        let error = linear.forward(&random(&[2, 11])).unwrap_err().to_string();
        assert!(error.contains("[2, 11]") && error.contains("10"), "{error}");
        let error = linear.forward(&random(&[2, 10]).to_dtype(DType::BF16).unwrap()).unwrap_err().to_string();
        assert!(error.contains("BF16"), "{error}");
        assert!(Linear::new(&random(&[7, 10]), Some(&random(&[8]))).is_err());
    }
}
