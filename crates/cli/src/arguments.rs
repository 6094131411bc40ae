//! Values of flags that several commands share, parsed with errors that say what would do.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use candle_core::{DType, Device};
use clap::ValueEnum;
use roofbench_core::session::Engine;
use serde::{Deserialize, Serialize};

/// Exit status when a cell or a case failed.
pub(crate) const EXIT_FAILED: u8 = 1;
/// Exit status when a command could not start: usage, or a file, folder or device named in it.
pub(crate) const EXIT_USAGE: u8 = 2;
/// Exit status of a comparison that found a slow-down.
pub(crate) const EXIT_SLOWER: u8 = 1;
/// Exit status of a comparison that can't tell.
pub(crate) const EXIT_UNDECIDED: u8 = 2;
/// Exit status of a comparison that could not be made: [`EXIT_USAGE`] means something else there (`EX_USAGE` of sysexits.h).
pub(crate) const EXIT_NO_COMPARISON: u8 = 64;
/// Exit status after Ctrl-C, as shells expect it.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;

/// What runs a model, as a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineArg {
    /// roofbench's own model on its fused kernels
    Roofbench,
    /// the stock model of the crate candle-transformers
    CandleTransformers,
}

impl From<EngineArg> for Engine {
    fn from(engine: EngineArg) -> Self {
        match engine {
            EngineArg::Roofbench => Self::Roofbench,
            EngineArg::CandleTransformers => Self::CandleTransformers,
        }
    }
}

/// Type of weights, as a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DTypeArg {
    /// 32-bit floats
    F32,
    /// bfloat16, computed with f32 accumulation
    Bf16,
    /// half precision, computed with f32 accumulation
    F16,
}

impl DTypeArg {
    /// Candle's type.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// `f32`, `bf16` or `f16`.
    pub(crate) fn name(self) -> &'static str {
        self.dtype().as_str()
    }
}

impl FromStr for DTypeArg {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        ValueEnum::from_str(text, true)
    }
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DeviceArg {
    /// The CPU.
    Cpu,
    /// A CUDA GPU by index.
    Cuda(usize),
    /// The Apple GPU.
    Metal,
}

impl FromStr for DeviceArg {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(index)) => Ok(Self::Cuda(index)),
                _ => Err("expected cpu, cuda, cuda:N (N counts from 0) or metal".to_owned()),
            },
        }
    }
}

impl std::fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl DeviceArg {
    /// Opens the device.
    ///
    /// # Errors
    /// This build has no support for it, or the machine has none.
    pub(crate) fn open(self) -> anyhow::Result<Device> {
        self.check_compiled()?;
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(index) => Device::new_cuda(index),
            Self::Metal => Device::new_metal(0),
        }
        .with_context(|| format!("--device {self} can't be used (`roofbench probe` lists this machine's GPUs)"))
    }

    /// An error when this build can't use the device.
    pub(crate) fn check_compiled(self) -> anyhow::Result<()> {
        let (compiled, feature) = match self {
            Self::Cpu => return Ok(()),
            Self::Cuda(_) => (cfg!(feature = "cuda"), "cuda"),
            Self::Metal => (cfg!(feature = "metal"), "metal"),
        };
        if !compiled {
            bail!(
                "--device {self}: this build runs on the CPU only; \
                 build it with `cargo build --release -p roofbench-cli --features {feature}`"
            );
        }
        Ok(())
    }
}

/// Where weights come from, as a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WeightsArg {
    /// Made from a seed.
    Synthetic,
    /// The checkpoint's repository on the Hub.
    Hub,
    /// A folder or a file.
    Path(PathBuf),
}

impl FromStr for WeightsArg {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "synthetic" => Self::Synthetic,
            "hub" => Self::Hub,
            path => Self::Path(path.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_parsed_and_written_back() {
        for (text, device) in [("cpu", DeviceArg::Cpu), ("cuda:3", DeviceArg::Cuda(3)), ("metal", DeviceArg::Metal)] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceArg::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU "] {
            assert!(wrong.parse::<DeviceArg>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_device_that_is_not_compiled_in_names_the_feature() {
        if !cfg!(feature = "metal") {
            let error = DeviceArg::Metal.open().unwrap_err().to_string();
            assert!(error.contains("--features metal"), "{error}");
        }
    }
}
