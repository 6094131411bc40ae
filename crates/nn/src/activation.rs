//! Element-wise activations under the names that `config.json` gives them.

use std::mem::MaybeUninit;
use std::str::FromStr;

use candle_core::{Result, Tensor, bail};
use serde::Deserialize;

use crate::cost;
use crate::kernels::activation as kernel;
use crate::op;

/// An element-wise function between two products.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::activation::Activation;
///
/// let gelu: Activation = "gelu".parse()?;
/// let y = gelu.forward(&Tensor::new(&[-1f32, 0., 1.], &Device::Cpu)?)?.to_vec1::<f32>()?;
/// assert_eq!(y, [-0.15865526, 0.0, 0.8413447]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
#[non_exhaustive]
pub enum Activation {
    /// x.
    Identity,
    /// x Φ(x) with the error function (arXiv:1606.08415).
    Gelu,
    /// The same with Φ approximated by tanh.
    GeluTanh,
    /// x sigmoid(1.702 x).
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// x sigmoid(x), also called swish (arXiv:1702.03118).
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// x above 0, e^x - 1 below (arXiv:1511.07289).
    Elu,
    /// x above 0, a part of it below.
    LeakyRelu(Slope),
}

/// How much of a negative value [`Activation::LeakyRelu`] leaves.
///
/// ```
/// use roofbench_nn::activation::Slope;
///
/// assert_eq!(Slope::new(0.1).get(), 0.1);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slope(u32);

impl Slope {
    /// From the factor.
    pub const fn new(slope: f32) -> Self {
        Self(slope.to_bits())
    }

    /// The factor.
    pub const fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// Every name, as in `transformers.activations.ACT2FN`.
const NAMES: [(&str, Activation); 15] = [
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
    ("sigmoid", Activation::Sigmoid),
    ("leaky_relu", Activation::LeakyRelu(Slope::new(0.01))),
    ("linear", Activation::Identity),
    ("identity", Activation::Identity),
];

/// A name that is no activation of ours.
#[derive(Debug, thiserror::Error)]
#[error("activation `{0}` is not supported; known are {known}", known = NAMES.map(|(name, _)| name).join(", "))]
pub struct UnknownActivation(String);

impl FromStr for Activation {
    type Err = UnknownActivation;
    fn from_str(name: &str) -> std::result::Result<Self, UnknownActivation> {
        let known = NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, act)| *act).ok_or_else(|| UnknownActivation(name.to_owned()))
    }
}

impl TryFrom<String> for Activation {
    type Error = UnknownActivation;
    fn try_from(name: String) -> std::result::Result<Self, UnknownActivation> {
        name.parse()
    }
}

impl Activation {
    /// Of every element; the shape stays.
    ///
    /// # Errors
    /// Candle's, for a dtype that is no float.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        if self == Self::Identity {
            return Ok(x.clone());
        }
        let _span = cost::span("activation", None);
        self.note_cost(x.elem_count());
        if !op::is_cpu_f32(x) {
            return self.forward_plain(x);
        }
        #[expect(unsafe_code, reason = "the kernel fills what is handed to it")]
        op::apply1("activation", &x.contiguous()?, |storage, layout| {
            let x = op::elements(storage, layout)?;
            // SAFETY: the kernel writes all of its output.
            let y = unsafe {
                op::collect_chunks(x.len(), kernel::CHUNK, |i, y| kernel::activate(self, &x[i..i + y.len()], y))
            };
            Ok((y, layout.shape().clone()))
        })
    }

    /// One FLOP an element, whichever it is.
    pub(crate) fn note_cost(self, elements: usize) {
        cost::elementwise(elements, usize::from(self != Self::Identity));
    }

    /// In candle's own operations.
    fn forward_plain(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => Ok(x.clone()),
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => candle_nn::ops::sigmoid(x),
            Self::Elu => x.elu(1.0),
            Self::LeakyRelu(slope) => x.relu()? - (x.neg()?.relu()? * f64::from(slope.get()))?,
        }
    }
}

/// Every element brought into `-limit..=limit`. NaN stays; comparisons are no FLOPs.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::activation::clip;
///
/// let y = clip(&Tensor::new(&[-3f32, 0.5, 2.], &Device::Cpu)?, 1.0)?;
/// assert_eq!(y.to_vec1::<f32>()?, [-1., 0.5, 1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `limit` is negative or NaN, and candle's.
pub fn clip(x: &Tensor, limit: f32) -> Result<Tensor> {
    if limit.is_nan() || limit < 0.0 {
        bail!("clip: the limit is {limit}, expected 0 or more")
    }
    if !op::is_cpu_f32(x) {
        return x.clamp(-limit, limit);
    }
    #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
    op::apply1("clip", &x.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
            for (y, &x) in part.iter_mut().zip(&x[begin..]) {
                y.write(x.clamp(-limit, limit));
            }
        };
        // SAFETY: each element of the part is written.
        let y = unsafe { op::collect_chunks(x.len(), kernel::CHUNK, fill) };
        Ok((y, layout.shape().clone()))
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn names_of_configurations() {
        assert_eq!(serde_json::from_str::<Activation>("\"gelu_new\"").unwrap(), Activation::GeluTanh);
        let error = serde_json::from_str::<Activation>("\"maxout\"").unwrap_err().to_string();
        assert!(error.contains("`maxout`") && error.contains("quick_gelu"), "{error}");
    }

    #[test]
    fn clipped_values() -> Result<()> {
        let x = Tensor::randn(0f32, 3.0, (3, 5, 1777), &Device::Cpu)?;
        for x in [&x, &x.transpose(0, 2)?, &x.narrow(1, 1, 3)?] {
            let wanted = x.clamp(-1.5f32, 1.5f32)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(clip(x, 1.5)?.flatten_all()?.to_vec1::<f32>()?, wanted);
        }
        let half = clip(&x.to_dtype(DType::BF16)?, 0.0)?;
        assert_eq!(half.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?, 0.0);
        let not_a_number = Tensor::new(&[f32::NAN], &Device::Cpu)?;
        assert!(clip(&not_a_number, 1.0)?.to_vec1::<f32>()?[0].is_nan());
        assert!(clip(&x, -1.0).is_err() && clip(&x, f32::NAN).is_err());
        Ok(())
    }

    #[test]
    fn agrees_with_candle() -> Result<()> {
        let x = Tensor::randn(0f32, 3.0, (3, 5, 1777), &Device::Cpu)?;
        for (name, act) in NAMES.into_iter().chain([("elu", Activation::Elu)]) {
            for x in [&x, &x.transpose(0, 2)?, &x.narrow(1, 1, 3)?] {
                let difference = (act.forward(x)? - act.forward_plain(x)?)?.abs()?.flatten_all()?.max(0)?;
                // candle's tanh forms lose a few digits to cancellation
                assert!(difference.to_scalar::<f32>()? < 2e-6, "{name}: {difference}");
            }
            let half = act.forward(&x.to_dtype(DType::BF16)?)?;
            assert_eq!((half.dtype(), half.dims()), (DType::BF16, x.dims()), "{name}");
        }
        Ok(())
    }
}
