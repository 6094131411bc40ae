//! The model families, one file each, and what several of them share.

use candle_core::{DType, Device};

/// What the shared blocks want their activations in, for weights of `dtype`: see `roofbench_nn::linear::Linear`.
pub(crate) fn activation_dtype(dtype: DType, device: &Device) -> DType {
    match dtype {
        DType::BF16 | DType::F16 if device.is_cpu() => DType::F32,
        other => other,
    }
}
