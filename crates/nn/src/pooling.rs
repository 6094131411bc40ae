//! Pooling of channels-last images (batch, height, width, channels). Mirrors `torch.nn.MaxPool2d`, `AvgPool2d` and
//! `AdaptiveAvgPool2d(1)`.

use candle_core::{D, Result, Tensor, bail};

use crate::cost;
use crate::kernels::isa::Isa;
use crate::kernels::pooling::{Reduction, Windows, pool};
use crate::op;

/// How windows lie over an image. Pairs are (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool2dConfig {
    /// Pixels of a window.
    pub kernel: (usize, usize),
    /// Pixels from one window to the next.
    pub stride: (usize, usize),
    /// Pixels around the image, at most half a window; an average takes them for 0, a maximum leaves them out.
    pub padding: (usize, usize),
    /// Whether a last window that is not whole counts.
    pub ceil_mode: bool,
}

impl Pool2dConfig {
    /// Square windows side by side where `stride` is `kernel`.
    pub fn new(kernel: usize, stride: usize) -> Self {
        Self { kernel: (kernel, kernel), stride: (stride, stride), padding: (0, 0), ceil_mode: false }
    }

    /// The same padding on all sides.
    pub fn padding(self, padding: usize) -> Self {
        Self { padding: (padding, padding), ..self }
    }
}

/// The largest pixel of each window, per channel.
///
/// # Shapes
/// (batch, height, width, channels) → (batch, out height, out width, channels).
///
/// # Errors
/// When `x` has another number of dimensions, is smaller than a window, or the configuration has a kernel or stride of 0
/// or a padding of more than half a window.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::pooling::{Pool2dConfig, max_pool_2d};
///
/// let x = Tensor::new(&[[[[1f32], [2.], [3.]], [[6.], [5.], [4.]]]], &Device::Cpu)?;
/// assert_eq!(max_pool_2d(&x, Pool2dConfig::new(2, 1))?.flatten_all()?.to_vec1::<f32>()?, [6., 5.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn max_pool_2d(x: &Tensor, config: Pool2dConfig) -> Result<Tensor> {
    pooled(x, config, Reduction::Max)
}

/// The mean of each window, per channel; pixels of the padding are counted where `count_include_pad`.
///
/// # Shapes
/// (batch, height, width, channels) → (batch, out height, out width, channels).
///
/// # Errors
/// As for [`max_pool_2d`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::pooling::{Pool2dConfig, avg_pool_2d};
///
/// let x = Tensor::new(&[[[[1f32], [2.], [3.]], [[6.], [5.], [4.]]]], &Device::Cpu)?;
/// assert_eq!(avg_pool_2d(&x, Pool2dConfig::new(2, 1), true)?.flatten_all()?.to_vec1::<f32>()?, [3.5, 3.5]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn avg_pool_2d(x: &Tensor, config: Pool2dConfig, count_include_pad: bool) -> Result<Tensor> {
    pooled(x, config, Reduction::Average { count_padding: count_include_pad })
}

/// The mean of all pixels, per channel.
///
/// # Shapes
/// (batch, height, width, channels) → (batch, channels).
///
/// # Errors
/// When `x` has another number of dimensions or no pixels.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::pooling::global_avg_pool_2d;
///
/// let x = Tensor::new(&[[[[1f32, 0.], [2., 0.]], [[6., 0.], [5., 4.]]]], &Device::Cpu)?;
/// assert_eq!(global_avg_pool_2d(&x)?.to_vec2::<f32>()?, [[3.5, 1.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn global_avg_pool_2d(x: &Tensor) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let _span = cost::span("pooling", None);
    cost::elementwise(x.elem_count(), 1); // the sum
    if !op::is_cpu_f32(x) && height * width > 0 {
        return x.mean((1, 2));
    }
    let config = Pool2dConfig { kernel: (height, width), ..Pool2dConfig::new(1, 1) };
    pooled(x, config, Reduction::Average { count_padding: false })?.squeeze(1)?.squeeze(1)
}

fn pooled(x: &Tensor, config: Pool2dConfig, reduction: Reduction) -> Result<Tensor> {
    let _span = cost::span("pooling", None);
    let (batch, height, width, channels) = x.dims4()?;
    let Pool2dConfig { kernel, stride, padding, ceil_mode } = config;
    let windows = Windows { kernel: kernel.into(), stride: stride.into(), padding: padding.into(), ceil: ceil_mode };
    let is_sound = [kernel.0, kernel.1, stride.0, stride.1].iter().all(|&n| n > 0)
        && 2 * padding.0 <= kernel.0
        && 2 * padding.1 <= kernel.1;
    let size = if is_sound && height * width > 0 { windows.out_size([height, width]) } else { None };
    let Some([out_height, out_width]) = size else {
        bail!("pooling with {config:?} got an input of shape {:?} (batch, height, width, channels)", x.dims())
    };
    if !op::is_cpu_f32(x) {
        return pooled_plain(x, &windows, [out_height, out_width], reduction);
    }
    op::apply1("pool", &x.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        let y = pool(Isa::current(), x, batch, [height, width], channels, &windows, reduction);
        Ok((y, (batch, out_height, out_width, channels).into()))
    })
}

/// In candle's own operations: the pixels of each tap, over all windows, one tap after the other.
fn pooled_plain(x: &Tensor, windows: &Windows, out: [usize; 2], reduction: Reduction) -> Result<Tensor> {
    let size = [x.dim(1)?, x.dim(2)?];
    let fill = if reduction == Reduction::Max { f64::NEG_INFINITY } else { 0.0 };
    let mut padded = x.clone();
    for axis in [0, 1] {
        let needed = (out[axis] - 1) * windows.stride[axis] + windows.kernel[axis];
        let before = windows.padding[axis];
        let after = needed.saturating_sub(size[axis] + before);
        for (count, is_after) in [(before, false), (after, true)].into_iter().filter(|(count, _)| *count > 0) {
            let mut dims = padded.dims().to_vec();
            dims[1 + axis] = count;
            let strip = (Tensor::ones(dims, x.dtype(), x.device())? * fill)?;
            let parts = if is_after { [&padded, &strip] } else { [&strip, &padded] };
            padded = Tensor::cat(&parts, 1 + axis)?;
        }
    }
    let picked = |axis: usize, tap: usize| {
        let last = tap + (out[axis] - 1) * windows.stride[axis];
        Tensor::arange_step(tap as u32, last as u32 + 1, windows.stride[axis] as u32, x.device())
    };
    let mut result: Option<Tensor> = None;
    for ky in 0..windows.kernel[0] {
        let lines = padded.index_select(&picked(0, ky)?, 1)?;
        for kx in 0..windows.kernel[1] {
            let tap = lines.index_select(&picked(1, kx)?, 2)?;
            result = Some(match result {
                None => tap,
                Some(result) if reduction == Reduction::Max => result.maximum(&tap)?,
                Some(result) => (result + tap)?,
            });
        }
    }
    let Some(result) = result else { bail!("pooling with a window of no pixels") };
    let Reduction::Average { count_padding } = reduction else { return Ok(result) };
    let counts = |axis: usize| {
        let count = |at| {
            let (inside, with_padding) = windows.span(axis, at, size[axis]);
            (if count_padding { with_padding } else { inside.len() }) as f64
        };
        Tensor::from_iter((0..out[axis]).map(count), x.device())?.to_dtype(x.dtype())
    };
    let pixels = counts(0)?.reshape(((), 1))?.broadcast_mul(&counts(1)?.reshape((1, ()))?)?;
    result.broadcast_div(&pixels.unsqueeze(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn both_ways_agree() -> Result<()> {
        let configs = [
            Pool2dConfig::new(3, 2).padding(1),
            Pool2dConfig { ceil_mode: true, ..Pool2dConfig::new(2, 2) },
            Pool2dConfig { kernel: (3, 2), stride: (2, 3), padding: (1, 0), ceil_mode: true },
            Pool2dConfig { kernel: (1, 4), stride: (1, 3), padding: (0, 2), ceil_mode: true },
        ];
        let x = Tensor::randn(0f32, 1., (2, 7, 9, 5), &Device::Cpu)?;
        let wide = x.to_dtype(DType::F64)?;
        let close = |found: &Tensor, expected: &Tensor| -> Result<()> {
            assert_eq!(found.dims(), expected.dims());
            let error = (found.to_dtype(DType::F64)? - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
            // sums of up to 63 numbers of size 1
            assert!(error < 1e-6, "{error}");
            Ok(())
        };
        for config in configs {
            close(&max_pool_2d(&x, config)?, &max_pool_2d(&wide, config)?)?;
            for count in [false, true] {
                close(&avg_pool_2d(&x, config, count)?, &avg_pool_2d(&wide, config, count)?)?;
            }
        }
        let strided = x.transpose(1, 2)?;
        close(&global_avg_pool_2d(&strided)?, &global_avg_pool_2d(&wide)?)
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<()> {
        let x = Tensor::zeros((1, 2, 2, 3), DType::F32, &Device::Cpu)?;
        for config in [Pool2dConfig::new(3, 1), Pool2dConfig::new(2, 0), Pool2dConfig::new(2, 1).padding(2)] {
            let error = max_pool_2d(&x, config).unwrap_err().to_string();
            assert!(error.contains("[1, 2, 2, 3]") && error.contains("kernel"), "{error}");
        }
        assert!(global_avg_pool_2d(&x.narrow(1, 0, 0)?).is_err());
        Ok(())
    }
}
