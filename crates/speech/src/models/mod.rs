//! The model families, one file each, and what several of them share.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

pub mod encodec;
mod features;
pub mod hifigan;
pub mod hubert;
mod seq2seq;
pub mod speecht5;
pub mod unispeech;
pub(crate) mod upstream;
pub mod wav2vec2;
pub mod wavlm;
pub mod whisper;

pub(crate) use features::TILE;
pub use features::{FeatureConfig, FeatureNorm};

/// What the shared blocks want their activations in, for weights of `dtype`: see `roofbench_nn::linear::Linear`.
pub(crate) fn activation_dtype(dtype: DType, device: &Device) -> DType {
    match dtype {
        DType::BF16 | DType::F16 if device.is_cpu() => DType::F32,
        other => other,
    }
}

/// A weight (out, in, kernel) kept as directions and lengths, one length for each index of `dim` (arXiv:1602.07868).
/// Mirrors `torch.nn.utils.parametrizations.weight_norm`.
pub(crate) fn weight_normed(shape: (usize, usize, usize), dim: usize, vb: VarBuilder) -> Result<Tensor> {
    let vb = vb.pp("parametrizations.weight");
    let mut lengths = [1, 1, 1];
    lengths[dim] = [shape.0, shape.1, shape.2][dim];
    let direction = vb.get(shape, "original1")?;
    // rounds once more: done at least in f32
    let wide = if direction.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (lengths, wide_direction) = (vb.get(&lengths, "original0")?.to_dtype(wide)?, direction.to_dtype(wide)?);
    let others: Vec<usize> = (0..3).filter(|other| *other != dim).collect();
    let norm = wide_direction.sqr()?.sum_keepdim(others)?.sqrt()?;
    wide_direction.broadcast_mul(&(lengths / norm)?)?.to_dtype(direction.dtype())
}
