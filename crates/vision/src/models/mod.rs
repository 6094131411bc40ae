//! The model families, one file each, and the stock models that they are measured against.

use candle_core::{DType, Device};
use serde::Deserialize;

pub mod convnext;
pub mod detr;
pub mod dinov2;
pub mod resnet;
pub mod sam;
pub mod swin;
pub(crate) mod upstream;
pub mod vit;

/// A size in pixels that configs write as one number, when square, or as `[height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(from = "NumberOrPair")]
pub struct HeightWidth {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or [height, width]")]
enum NumberOrPair {
    Number(usize),
    Pair([usize; 2]),
}

impl From<NumberOrPair> for HeightWidth {
    fn from(value: NumberOrPair) -> Self {
        let [height, width] = match value {
            NumberOrPair::Number(side) => [side, side],
            NumberOrPair::Pair(sides) => sides,
        };
        Self { height, width }
    }
}

/// What the shared blocks want their activations in, for weights of `dtype`: see `roofbench_nn::linear::Linear`.
pub fn activation_dtype(dtype: DType, device: &Device) -> DType {
    match dtype {
        DType::BF16 | DType::F16 if device.is_cpu() => DType::F32,
        other => other,
    }
}
