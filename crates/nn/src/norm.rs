//! Normalisation over the last dimension, and of groups of channels over an image.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::activation::Activation;
use crate::cost;
use crate::kernels::isa::Isa;
use crate::kernels::{group_norm, layer_norm, response_norm, rms_norm};
use crate::op;

/// Elements that one thread normalises at a time, about.
const CHUNK: usize = 8192;

/// A parameter of `size` elements: f32 on the CPU, where the kernels want it, else as loaded.
fn parameter(vb: &VarBuilder, size: usize, name: &str) -> Result<Tensor> {
    kernel_parameter(&vb.get(size, name)?)
}

fn kernel_parameter(p: &Tensor) -> Result<Tensor> {
    if p.device().is_cpu() { p.to_dtype(DType::F32)?.contiguous() } else { Ok(p.clone()) }
}

/// The last dimension of `x` is `size`, or an error that says so.
fn check_size(what: &str, x: &Tensor, size: usize) -> Result<()> {
    if size == 0 || x.dims().last() != Some(&size) {
        candle_core::bail!("{what} over {size} elements got an input of shape {:?}", x.dims())
    }
    Ok(())
}

/// y = weight (x - mean) / sqrt(var + eps) + bias (arXiv:1607.06450). Mirrors `torch.nn.LayerNorm`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::norm::LayerNorm;
///
/// let weight = Tensor::new(&[1f32, 1., 1., 2.], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f32, 0., 1., 0.], &Device::Cpu)?;
/// let norm = LayerNorm::new(&weight, Some(&bias), 0.0)?;
/// // mean 1, variance 4
/// let y = norm.forward(&Tensor::new(&[[-1f32, -1., 3., 3.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1.0, -1.0, 2.0, 2.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both (size).
    ///
    /// # Errors
    /// Of the `VarBuilder`, when a tensor is missing or has another shape.
    pub fn load(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: parameter(&vb, size, "weight")?, bias: parameter(&vb, size, "bias")?, eps })
    }

    /// From `weight` (size) and `bias` (size), which is zero where absent.
    ///
    /// # Errors
    /// When their shapes differ.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Self> {
        let size = weight.dims1()?;
        let bias = bias.map_or_else(|| weight.zeros_like(), |bias| bias.reshape(size))?;
        Ok(Self { weight: kernel_parameter(weight)?, bias: kernel_parameter(&bias)?, eps })
    }

    /// # Shapes
    /// `x` and the result are (..., size).
    ///
    /// # Errors
    /// When the last dimension is not `size`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_act(x, Activation::Identity)
    }

    /// The activation of the norm.
    ///
    /// # Shapes
    /// `x` and the result are (..., size).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let size = self.weight.elem_count();
        check_size("LayerNorm", x, size)?;
        // sum, subtract the mean, square and sum, multiply by the inverse deviation, multiply-add of weight and bias
        let _span = cost::span("layer norm", None);
        note_cost(x, 7, &[&self.weight, &self.bias]);
        if !op::is_cpu_f32(x) {
            let (weight, bias) = (self.weight.to_dtype(x.dtype())?, self.bias.to_dtype(x.dtype())?);
            let normed = candle_nn::ops::layer_norm(&x.contiguous()?, &weight, &bias, self.eps as f32)?;
            return activation.forward(&normed);
        }
        activation.note_cost(x.elem_count());
        op::apply3("layer-norm", [&x.contiguous()?, &self.weight, &self.bias], |[x, w, b]| {
            let (shape, x) = (x.1.shape().clone(), op::elements(x.0, x.1)?);
            let parameters = (op::elements(w.0, w.1)?, op::elements(b.0, b.1)?);
            let eps = self.eps as f32;
            Ok((by_rows(x, size, |x, y| layer_norm::layer_norm(activation, x, parameters, eps, y)), shape))
        })
    }
}

fn note_cost(x: &Tensor, flops_per_element: usize, parameters: &[&Tensor]) {
    cost::note(|| {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        cost::weighted(x.elem_count() * flops_per_element, parameters.iter().map(|p| bytes(p)).sum(), bytes(x))
    });
}

/// Runs a kernel that writes all of its output over whole rows of `x`, some rows at a time in parallel.
fn by_rows(x: &[f32], size: usize, kernel: impl Fn(&[f32], &mut [std::mem::MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let rows = (CHUNK / size).max(1);
    #[expect(unsafe_code, reason = "the kernel fills what is handed to it")]
    // SAFETY: both kernels write all of their output.
    unsafe {
        op::collect_chunks(x.len(), rows * size, |i, y| kernel(&x[i..i + y.len()], y))
    }
}

/// y = weight x / sqrt(mean(x²) + eps) (arXiv:1910.07467). Mirrors `LlamaRMSNorm` and `T5LayerNorm` of transformers.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::norm::RmsNorm;
///
/// let norm = RmsNorm::new(&Tensor::new(&[1f32, 2.], &Device::Cpu)?, 0.0)?;
/// // the mean of the squares of 1 and 7 is 25
/// let y = norm.forward(&Tensor::new(&[[1f32, 7.]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 2.8]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight` (size).
    ///
    /// # Errors
    /// Of the `VarBuilder`, when the tensor is missing or has another shape.
    pub fn load(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: parameter(&vb, size, "weight")?, eps })
    }

    /// From `weight` (size).
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn new(weight: &Tensor, eps: f64) -> Result<Self> {
        weight.dims1()?;
        Ok(Self { weight: kernel_parameter(weight)?, eps })
    }

    /// # Shapes
    /// `x` and the result are (..., size).
    ///
    /// # Errors
    /// When the last dimension is not `size`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let size = self.weight.elem_count();
        check_size("RmsNorm", x, size)?;
        // square and sum, multiply by the inverse root, multiply by the weight
        let _span = cost::span("rms norm", None);
        note_cost(x, 4, &[&self.weight]);
        if !op::is_cpu_f32(x) {
            let weight = self.weight.to_dtype(x.dtype())?;
            return candle_nn::ops::rms_norm(&x.contiguous()?, &weight, self.eps as f32);
        }
        op::apply2("rms-norm", &x.contiguous()?, &self.weight, |[x, w]| {
            let (shape, x) = (x.1.shape().clone(), op::elements(x.0, x.1)?);
            let w = op::elements(w.0, w.1)?;
            Ok((by_rows(x, size, |x, y| rms_norm::rms_norm(x, w, self.eps as f32, y)), shape))
        })
    }
}

/// y = weight (x - mean) / sqrt(var + eps) + bias with the moments of each item's groups of channels over all pixels
/// (arXiv:1803.08494), channels last; an instance norm has a group per channel. Mirrors `torch.nn.GroupNorm`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::norm::GroupNorm;
///
/// let (weight, bias) = (Tensor::new(&[1f32, 2.], &Device::Cpu)?, Tensor::new(&[0f32, 1.], &Device::Cpu)?);
/// let norm = GroupNorm::new(2, &weight, Some(&bias), 0.0)?;
/// // two pixels of two channels, each a group: means 1 and 4, standard deviations 1 and 2
/// let y = norm.forward(&Tensor::new(&[[[0f32, 2.], [2., 6.]]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[-1.0, -1.0], [1.0, 3.0]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct GroupNorm {
    groups: usize,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, both (channels).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or the groups do not divide the channels.
    pub fn load(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Self::new(groups, &vb.get(channels, "weight")?, Some(&vb.get(channels, "bias")?), eps)
    }

    /// From `weight` (channels) and `bias` (channels), which is zero where absent.
    ///
    /// # Errors
    /// When their shapes differ or the groups do not divide the channels.
    pub fn new(groups: usize, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Self> {
        let channels = weight.dims1()?;
        if groups == 0 || !channels.is_multiple_of(groups) {
            candle_core::bail!("GroupNorm: {groups} groups do not divide {channels} channels")
        }
        let bias = bias.map_or_else(|| weight.zeros_like(), |bias| bias.reshape(channels))?;
        Ok(Self { groups, weight: kernel_parameter(weight)?, bias: kernel_parameter(&bias)?, eps })
    }

    /// # Shapes
    /// `x` and the result are (batch, ..., channels).
    ///
    /// # Errors
    /// When the last dimension is not `channels` or there is no other.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_act(x, Activation::Identity)
    }

    /// The activation of the norm.
    ///
    /// # Shapes
    /// `x` and the result are (batch, ..., channels).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let channels = self.weight.elem_count();
        check_size("GroupNorm", x, channels)?;
        let Some(pixels) = x.dims().get(1..x.rank() - 1).map(|dims| dims.iter().product::<usize>()) else {
            candle_core::bail!("GroupNorm got an input of shape {:?}, without a batch", x.dims())
        };
        // as for LayerNorm
        let _span = cost::span("group norm", None);
        note_cost(x, 7, &[&self.weight, &self.bias]);
        if !op::is_cpu_f32(x) {
            return activation.forward(&self.forward_plain(x, pixels)?);
        }
        activation.note_cost(x.elem_count());
        op::apply3("group-norm", [&x.contiguous()?, &self.weight, &self.bias], |[x, w, b]| {
            let (shape, x) = (x.1.shape().clone(), op::elements(x.0, x.1)?);
            let parameters = (op::elements(w.0, w.1)?, op::elements(b.0, b.1)?);
            let isa = Isa::current();
            Ok((group_norm::group_norm(isa, x, pixels, self.groups, parameters, self.eps, activation), shape))
        })
    }

    /// In candle's own operations; half precision is widened for the moments.
    fn forward_plain(&self, x: &Tensor, pixels: usize) -> Result<Tensor> {
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (weight, bias) = (self.weight.to_dtype(wide)?, self.bias.to_dtype(wide)?);
        let per_group = self.weight.elem_count() / self.groups;
        let grouped = x.to_dtype(wide)?.reshape((x.dim(0)?, pixels, self.groups, per_group))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim((1, 3))?)?;
        let deviation = (centred.sqr()?.mean_keepdim((1, 3))? + self.eps)?.sqrt()?;
        let normed = centred.broadcast_div(&deviation)?.reshape(x.dims())?;
        normed.broadcast_mul(&weight)?.broadcast_add(&bias)?.to_dtype(x.dtype())
    }
}

/// y = x (1 + weight n / (mean n + 1e-6)) + bias, where n is the Euclidean norm of each channel of an item over all
/// pixels and its mean is over the channels (arXiv:2301.00808), channels last. Mirrors `transformers.ConvNextV2GRN`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::norm::ResponseNorm;
///
/// let (weight, bias) = (Tensor::new(&[1f32, 0.], &Device::Cpu)?, Tensor::new(&[0f32, 1.], &Device::Cpu)?);
/// let norm = ResponseNorm::new(&weight, &bias)?;
/// // two pixels of two channels, whose norms are 5 and 15
/// let y = norm.forward(&Tensor::new(&[[[3f32, 9.], [4., 12.]]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[4.5, 10.0], [6.0, 13.0]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ResponseNorm {
    weight: Tensor,
    bias: Tensor,
}

impl ResponseNorm {
    const EPS: f64 = 1e-6;

    /// Reads `weight` and `bias`, both (1, 1, 1, channels).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(channels: usize, vb: VarBuilder) -> Result<Self> {
        let get = |name| vb.get((1, 1, 1, channels), name)?.flatten_all();
        Self::new(&get("weight")?, &get("bias")?)
    }

    /// From `weight` and `bias`, both (channels).
    ///
    /// # Errors
    /// When their shapes differ.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let bias = bias.reshape(weight.dims1()?)?;
        Ok(Self { weight: kernel_parameter(weight)?, bias: kernel_parameter(&bias)? })
    }

    /// # Shapes
    /// `x` and the result are (batch, ..., channels).
    ///
    /// # Errors
    /// When the last dimension is not `channels` or there is no other.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let channels = self.weight.elem_count();
        check_size("ResponseNorm", x, channels)?;
        let Some(pixels) = x.dims().get(1..x.rank() - 1).map(|dims| dims.iter().product::<usize>()) else {
            candle_core::bail!("ResponseNorm got an input of shape {:?}, without a batch", x.dims())
        };
        // square and sum, multiply-add of scale and bias
        let _span = cost::span("response norm", None);
        note_cost(x, 4, &[&self.weight, &self.bias]);
        if !op::is_cpu_f32(x) {
            return self.forward_plain(x, pixels);
        }
        op::apply3("response-norm", [&x.contiguous()?, &self.weight, &self.bias], |[x, w, b]| {
            let (shape, x) = (x.1.shape().clone(), op::elements(x.0, x.1)?);
            let parameters = (op::elements(w.0, w.1)?, op::elements(b.0, b.1)?);
            Ok((response_norm::response_norm(Isa::current(), x, pixels, parameters, Self::EPS), shape))
        })
    }

    /// In candle's own operations; half precision is widened for the norms.
    fn forward_plain(&self, x: &Tensor, pixels: usize) -> Result<Tensor> {
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (weight, bias) = (self.weight.to_dtype(wide)?, self.bias.to_dtype(wide)?);
        let flat = x.to_dtype(wide)?.reshape((x.dim(0)?, pixels, weight.elem_count()))?;
        let norms = flat.sqr()?.sum_keepdim(1)?.sqrt()?;
        let scale = norms.broadcast_div(&(norms.mean_keepdim(2)? + Self::EPS)?)?.broadcast_mul(&weight)?;
        let normed = flat.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&bias)?;
        normed.reshape(x.dims())?.to_dtype(x.dtype())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn agrees_with_candle_and_takes_any_layout() -> Result<()> {
        let cpu = &Device::Cpu;
        let (weight, bias) = (Tensor::randn(1f32, 0.1, 96, cpu)?, Tensor::randn(0f32, 0.1, 96, cpu)?);
        let (layer, rms) = (LayerNorm::new(&weight, Some(&bias), 1e-5)?, RmsNorm::new(&weight, 1e-5)?);
        let x = Tensor::randn(0f32, 1.0, (3, 96, 211), cpu)?.transpose(1, 2)?;
        let plain = x.contiguous()?;
        let difference = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        // a few roundings of values up to 5
        let wanted = candle_nn::ops::layer_norm(&plain, &weight, &bias, 1e-5)?;
        assert!(difference(&layer.forward(&x)?, &wanted)? < 3e-6);
        let wanted = candle_nn::ops::rms_norm(&plain, &weight, 1e-5)?;
        assert!(difference(&rms.forward(&x)?, &wanted)? < 3e-6);

        let wanted = Activation::Gelu.forward(&layer.forward(&x)?)?;
        assert!(difference(&layer.forward_act(&x, Activation::Gelu)?, &wanted)? < 1e-6);
        let half = x.to_dtype(DType::F16)?;
        assert!(difference(&layer.forward(&half)?.to_dtype(DType::F32)?, &layer.forward(&x)?)? < 1e-2);
        assert_eq!(rms.forward(&half)?.dtype(), DType::F16);
        assert_eq!(layer.forward(&x.narrow(1, 0, 0)?)?.dims(), [3, 0, 96]);
        let error = layer.forward(&x.narrow(2, 0, 95)?).unwrap_err().to_string();
        assert!(error.contains("96") && error.contains("95"), "{error}");
        Ok(())
    }

    #[test]
    fn groups_both_ways() -> Result<()> {
        let cpu = &Device::Cpu;
        let (weight, bias) = (Tensor::randn(1f32, 0.1, 12, cpu)?, Tensor::randn(0f32, 0.1, 12, cpu)?);
        let x = Tensor::randn(0f32, 1.0, (2, 5, 12, 7), cpu)?.transpose(2, 3)?;
        for groups in [1, 4, 12] {
            let norm = GroupNorm::new(groups, &weight, Some(&bias), 1e-5)?;
            let (found, plain) = (norm.forward(&x)?, norm.forward(&x.to_dtype(DType::F64)?)?);
            assert_eq!(found.dims(), plain.dims());
            let difference = (found.to_dtype(DType::F64)? - plain)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
            // a few roundings of values up to 5
            assert!(difference < 3e-6, "{difference}");
            assert_eq!(norm.forward(&x.to_dtype(DType::F16)?)?.dtype(), DType::F16);
            assert_eq!(norm.forward(&x.narrow(1, 0, 0)?)?.elem_count(), 0);
            assert!(norm.forward(&Tensor::zeros(12, DType::F32, cpu)?).is_err());
        }
        assert!(GroupNorm::new(5, &weight, None, 1e-5).is_err());
        Ok(())
    }

    #[test]
    fn responses_both_ways() -> Result<()> {
        let cpu = &Device::Cpu;
        let (weight, bias) = (Tensor::randn(0f32, 1.0, 12, cpu)?, Tensor::randn(0f32, 0.1, 12, cpu)?);
        let x = Tensor::randn(0f32, 1.0, (2, 5, 12, 7), cpu)?.transpose(2, 3)?;
        let norm = ResponseNorm::new(&weight, &bias)?;
        let (found, plain) = (norm.forward(&x)?, norm.forward(&x.to_dtype(DType::F64)?)?);
        assert_eq!(found.dims(), plain.dims());
        let difference = (found.to_dtype(DType::F64)? - plain)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
        // a few roundings of values up to 10
        assert!(difference < 4e-6, "{difference}");
        assert_eq!(norm.forward(&x.to_dtype(DType::F16)?)?.dtype(), DType::F16);
        assert_eq!(norm.forward(&x.narrow(1, 0, 0)?)?.elem_count(), 0);
        let error = norm.forward(&x.narrow(3, 0, 11)?).unwrap_err().to_string();
        assert!(error.contains("12") && error.contains("11"), "{error}");
        assert!(norm.forward(&Tensor::zeros(12, DType::F32, cpu)?).is_err());
        assert!(ResponseNorm::new(&weight, &bias.narrow(0, 0, 11)?).is_err());
        Ok(())
    }

    #[test]
    fn absent_bias_is_zero() -> Result<()> {
        let weight = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
        let y = LayerNorm::new(&weight, None, 0.0)?.forward(&Tensor::new(&[1f32, 3.], &Device::Cpu)?)?;
        assert_eq!(y.to_vec1::<f32>()?, [-1.0, 1.0]);
        Ok(())
    }
}
