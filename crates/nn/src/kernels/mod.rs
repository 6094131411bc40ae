//! CPU kernels: plain functions on slices, each with its definition, its SIMD paths and the test that holds them together.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod conv;
pub(crate) mod dot;
pub(crate) mod gated;
pub(crate) mod group_norm;
pub mod isa;
pub(crate) mod layer_norm;
pub(crate) mod lstm;
pub(crate) mod math;
pub mod matmul;
pub(crate) mod pooling;
pub mod quant;
pub(crate) mod response_norm;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod simd;
pub(crate) mod window_attention;
pub(crate) mod winograd;

/// Arguments that do not fit together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice of the wrong length for the shape.
    #[error("{what} has {found} elements where its shape asks for {expected}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// What its shape asks for.
        expected: usize,
        /// What it has.
        found: usize,
    },
}

impl KernelError {
    /// `found` is exactly what the shape asks for; `None` stands for more than an address can hold.
    pub(crate) fn check(what: &'static str, expected: Option<usize>, found: usize) -> Result<(), Self> {
        let expected = expected.unwrap_or(usize::MAX);
        if found == expected { Ok(()) } else { Err(Self::Length { what, expected, found }) }
    }

    /// `found` is at least what the shape asks for.
    pub(crate) fn check_least(what: &'static str, expected: Option<usize>, found: usize) -> Result<(), Self> {
        let expected = expected.unwrap_or(usize::MAX);
        if found >= expected { Ok(()) } else { Err(Self::Length { what, expected, found }) }
    }
}
