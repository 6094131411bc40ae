//! Which instruction set the kernels use: detected once at run time, so that a build without target-cpu flags loses nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use candle_core::{DType, Device};

use super::matmul::PairProduct;
use super::winograd;
use crate::linear::Precision;
use crate::options;

/// An instruction set that every kernel has a path for (or falls back from to the next narrower one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, which the compiler turns into whatever the target's baseline has.
    Scalar,
    /// Arm, 128-bit.
    Neon,
    /// x86-64 with AVX2, FMA and F16C, 256-bit.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ, 512-bit.
    Avx512,
}

impl Isa {
    /// All, narrowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            _ => false,
        }
    }

    /// Those that this CPU can run, narrowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The widest available one, or what the environment variable `ROOFBENCH_ISA` names (`scalar`, `neon`, `avx2`,
    /// `avx512`) where the CPU has it; read once.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let widest = Self::available().last().unwrap_or(Self::Scalar);
            let Ok(wanted) = std::env::var("ROOFBENCH_ISA") else { return widest };
            match wanted.parse::<Self>() {
                Ok(isa) if isa.is_available() => isa,
                Ok(isa) => {
                    tracing::warn!("ROOFBENCH_ISA={isa}: this CPU does not have it; using {widest}");
                    widest
                }
                Err(error) => {
                    tracing::warn!("ROOFBENCH_ISA: {error}; using {widest}");
                    widest
                }
            }
        })
    }
}

/// How bytes are multiplied and summed four at a time: found apart from [`Isa`], which says nothing about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dot {
    /// Plain Rust.
    Scalar,
    /// Arm: widening products, added in pairs.
    Neon,
    /// Arm with `dotprod`: `sdot`.
    NeonDot,
    /// `vpmaddubsw` and `vpmaddwd`, 256-bit.
    Avx2,
    /// `vpdpbusd` of AVX-VNNI, 256-bit.
    AvxVnni,
    /// `vpmaddubsw` and `vpmaddwd`, 512-bit.
    Avx512,
    /// `vpdpbusd` of AVX-512 VNNI, 512-bit.
    Avx512Vnni,
}

impl Dot {
    /// All; of those of one instruction set, the quickest last.
    pub const ALL: [Self; 7] =
        [Self::Scalar, Self::Neon, Self::NeonDot, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni];

    /// The instruction set that goes with it.
    pub fn isa(self) -> Isa {
        match self {
            Self::Scalar => Isa::Scalar,
            Self::Neon | Self::NeonDot => Isa::Neon,
            Self::Avx2 | Self::AvxVnni => Isa::Avx2,
            Self::Avx512 | Self::Avx512Vnni => Isa::Avx512,
        }
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        let has_dot = match self {
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            _ => true,
        };
        has_dot && self.isa().is_available()
    }

    /// Those that this CPU can run.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|dot| dot.is_available())
    }

    /// The quickest that goes with [`Isa::current`].
    pub fn current() -> Self {
        Self::available().filter(|dot| dot.isa() == Isa::current()).last().unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Dot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::NeonDot => "neon dotprod",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx2 vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512 vnni",
        })
    }
}

/// Which path the blocks take on `device` with weights in `dtype`, by kind of operation: the instruction set of the fused
/// kernels, with the form of the weights where it is not their own, or `candle`. Convolutions have an entry once a way was
/// chosen for some of them, by [`options`] or by timing.
pub fn paths(device: &Device, dtype: DType) -> BTreeMap<String, String> {
    let options = options::current();
    let fused = device.is_cpu() && matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    let (candle, isa) = (|| "candle".to_owned(), Isa::current());
    let matmul = match options.precision {
        _ if !fused => candle(),
        Precision::Q8 => format!("q8 {}", Dot::current()),
        Precision::Q4 => format!("q4 {}", Dot::current()),
        Precision::Native if !options.packed_weights => candle(),
        Precision::Native if dtype == DType::BF16 && PairProduct::chosen().is_some() => format!("{isa} bf16"),
        Precision::Native => isa.to_string(),
    };
    let attention = if fused && options.fused_attention { isa.to_string() } else { candle() };
    let norm = if fused { isa.to_string() } else { candle() };
    let packed = fused && dtype == DType::F32 && options.packed_weights;
    let conv = winograd::path().filter(|_| packed).map(|conv| ("conv", conv));
    let paths = [("matmul", matmul), ("attention", attention), ("norm", norm)];
    paths.into_iter().chain(conv).map(|(kind, path)| (kind.to_owned(), path)).collect()
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// A name that is no instruction set.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of scalar, neon, avx2, avx512")]
pub struct UnknownIsa(String);

impl FromStr for Isa {
    type Err = UnknownIsa;
    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}
