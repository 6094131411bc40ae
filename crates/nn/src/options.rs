//! Choices that the blocks leave open: in what form weights are kept, and which of two paths a computation takes.
//!
//! They hold per thread, for the models that it loads and calls from then on: set them before loading, and leave them
//! while the model is in use, because some are read at load and some at each call.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use roofbench_nn::linear::{Linear, Precision};
//! use roofbench_nn::options::{self, Options};
//!
//! let weight = Tensor::ones((64, 96), DType::F32, &Device::Cpu)?; // (out, in)
//! let mut quantized = Options::default();
//! quantized.switch("weights-q8", true);
//! let linear = options::with(quantized, || Linear::new(&weight, None))?;
//! assert!(linear.weight_bytes() < 64 * 96 * 4 / 3);
//! assert_eq!(options::current(), Options::default()); // as before
//! # Ok::<(), candle_core::Error>(())
//! ```

use std::cell::Cell;
use std::sync::OnceLock;

use crate::linear::Precision;

/// What is chosen. The default is what a model does when nobody says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Weights on the CPU are packed for our kernels; else they stay as they are, in f32, for candle's products.
    pub packed_weights: bool,
    /// In what form dense layers on the CPU keep packed weights, where they are not told by
    /// [`Linear::new_with`](crate::linear::Linear::new_with).
    pub precision: Precision,
    /// Products of packed bf16 weights round the activations to bf16 as well, where the CPU has instructions for it.
    /// Where absent, a short measurement says whether that is faster.
    pub bf16_products: Option<bool>,
    /// Attention on the CPU runs in one kernel; else as candle's operations, with the whole matrix of scores.
    pub fused_attention: bool,
    /// Which convolutions of 3 × 3 at stride 1 with packed f32 weights go by Winograd's minimal filtering.
    pub winograd: Winograd,
    /// A last layer of which only the first rows are used, such as a class token's, computes no others.
    pub class_token_only: bool,
    /// Blocks keep the sizes of their weights and none of the numbers, so that a model of any size loads in no time and
    /// next to no memory: to ask for its cost, and not to be called.
    pub sizes_only: bool,
    /// A picture that stands in a batch several times is encoded once.
    pub shared_pictures: bool,
    /// Convolutions over a long signal run tile by tile, whose values stay in a cache between them.
    pub tiled_features: bool,
    /// Files are decoded on a thread of their own, ahead of the model.
    pub overlapped_decoding: bool,
}

/// How a convolution of 3 × 3 at stride 1 is computed: directly or by tiles of minimal filtering, which multiplies less
/// and rounds otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Winograd {
    /// Each shape of a convolution takes what is quickest when it is first met: directly or by tiles. The environment
    /// variable `ROOFBENCH_WINOGRAD` chooses instead where it is `never`, `2` or `4`.
    #[default]
    Measured,
    /// Directly.
    Never,
    /// By tiles of 2 × 2 output pixels, 2.25 times fewer multiplications.
    Two,
    /// By tiles of 4 × 4 output pixels, 4 times fewer multiplications.
    Four,
}

impl Winograd {
    /// That of this thread's options and the environment.
    pub(crate) fn current() -> Self {
        static VARIABLE: OnceLock<Winograd> = OnceLock::new();
        let variable = || match std::env::var("ROOFBENCH_WINOGRAD").as_deref() {
            Ok("never") => Self::Never,
            Ok("2") => Self::Two,
            Ok("4") => Self::Four,
            _ => Self::Measured,
        };
        match current().winograd {
            Self::Measured => *VARIABLE.get_or_init(variable),
            chosen => chosen,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            packed_weights: true,
            precision: Precision::Native,
            bf16_products: None,
            fused_attention: true,
            winograd: Winograd::Measured,
            class_token_only: true,
            sizes_only: false,
            shared_pictures: true,
            tiled_features: true,
            overlapped_decoding: true,
        }
    }
}

impl Options {
    /// Makes the choice `name` (`packed-weights`, `weights-q8`, `weights-q4`, `bf16-products`, `fused-attention`,
    /// `winograd`, `class-token-only`, `shared-pictures`, `tiled-features`, `overlapped-decoding`); a name that is none of these
    /// changes nothing.
    pub fn switch(&mut self, name: &str, on: bool) {
        let precision = |precision| if on { precision } else { Precision::Native };
        match name {
            "packed-weights" => self.packed_weights = on,
            "weights-q8" if on || self.precision == Precision::Q8 => self.precision = precision(Precision::Q8),
            "weights-q4" if on || self.precision == Precision::Q4 => self.precision = precision(Precision::Q4),
            "bf16-products" => self.bf16_products = Some(on),
            "fused-attention" => self.fused_attention = on,
            "winograd" => self.winograd = if on { Winograd::Measured } else { Winograd::Never },
            "class-token-only" => self.class_token_only = on,
            "shared-pictures" => self.shared_pictures = on,
            "tiled-features" => self.tiled_features = on,
            "overlapped-decoding" => self.overlapped_decoding = on,
            _ => {}
        }
    }
}

/// The defaults with these choices made: see [`Options::switch`].
impl<'a> FromIterator<(&'a str, bool)> for Options {
    fn from_iter<T: IntoIterator<Item = (&'a str, bool)>>(choices: T) -> Self {
        let mut options = Self::default();
        choices.into_iter().for_each(|(name, on)| options.switch(name, on));
        options
    }
}

/// Weights that [`Options::precision`] made smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quantized {
    /// Bytes before.
    pub native_bytes: u64,
    /// Bytes now.
    pub kept_bytes: u64,
}

thread_local! {
    static OPTIONS: Cell<Option<Options>> = const { Cell::new(None) };
    static QUANTIZED: Cell<Quantized> = const { Cell::new(Quantized { native_bytes: 0, kept_bytes: 0 }) };
}

/// Those of this thread.
pub fn current() -> Options {
    OPTIONS.get().unwrap_or_default()
}

/// Sets those of this thread.
pub fn set(options: Options) {
    OPTIONS.set(Some(options));
}

/// Runs `f` with `options` and gives the earlier ones back.
pub fn with<T>(options: Options, f: impl FnOnce() -> T) -> T {
    /// Also when `f` panics.
    struct Earlier(Option<Options>);
    impl Drop for Earlier {
        fn drop(&mut self) {
            OPTIONS.set(self.0);
        }
    }
    let _earlier = Earlier(OPTIONS.replace(Some(options)));
    f()
}

/// What [`Options::precision`] made of the weights that this thread loaded since the last call.
pub fn take_quantized() -> Quantized {
    QUANTIZED.take()
}

pub(crate) fn note_quantized(native_bytes: usize, kept_bytes: usize) {
    let so_far = QUANTIZED.get();
    QUANTIZED.set(Quantized {
        native_bytes: so_far.native_bytes + native_bytes as u64,
        kept_bytes: so_far.kept_bytes + kept_bytes as u64,
    });
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor};

    use super::*;
    use crate::attention::{Attention, Pattern};
    use crate::conv::{Conv2d, Conv2dConfig};
    use crate::kernels::isa;
    use crate::linear::Linear;

    fn switched(switches: &[(&str, bool)]) -> Options {
        let mut options = Options::default();
        switches.iter().for_each(|(name, on)| options.switch(name, *on));
        options
    }

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).expect("a tensor")
    }

    #[track_caller]
    fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
        let difference = |found: &Tensor| (found - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let difference = difference(found).expect("the same shape");
        assert!(difference <= tolerance, "differs by {difference}");
    }

    #[test]
    fn one_precision_takes_the_place_of_another() {
        assert_eq!(switched(&[("weights-q8", true), ("weights-q4", false)]).precision, Precision::Q8);
        assert_eq!(switched(&[("weights-q8", true), ("weights-q8", false)]).precision, Precision::Native);
        assert_eq!(switched(&[("no-such-name", true), ("packed-weights", true)]), Options::default());
    }

    #[test]
    fn unpacked_layers_agree_with_packed_ones() -> Result<()> {
        let (weight, bias, x) = (random(&[40, 24]), random(&[40]), random(&[3, 5, 24]));
        let residual = random(&[3, 5, 40]);
        let kernel = random(&[6, 4, 3, 3]);
        let image = random(&[2, 7, 7, 4]);
        let run = |dtype: DType| -> Result<[Tensor; 2]> {
            let linear = Linear::new(&weight.to_dtype(dtype)?, Some(&bias.to_dtype(dtype)?))?;
            let conv = Conv2d::new(&kernel.to_dtype(dtype)?, None, Conv2dConfig::new(3).padding(1))?;
            Ok([linear.forward_add(&x, &residual)?, conv.forward(&image)?])
        };
        for dtype in [DType::F32, DType::F16] {
            let packed = run(dtype)?;
            let plain = with(switched(&[("packed-weights", false)]), || run(dtype))?;
            packed.iter().zip(&plain).for_each(|(packed, plain)| assert_close(packed, plain, 1e-4));
        }
        Ok(())
    }

    #[test]
    fn plain_attention_agrees_with_the_fused_one() -> Result<()> {
        let attention = Attention { heads: 2, kv_heads: 1, head_dim: 8, scale: None, pattern: Pattern::Causal };
        let (q, kv) = (random(&[2, 5, 16]), random(&[2, 5, 8]));
        let fused = attention.forward(&q, &kv, &kv, None)?;
        let plain = with(switched(&[("fused-attention", false)]), || attention.forward(&q, &kv, &kv, None))?;
        assert_close(&fused, &plain, 1e-5);
        Ok(())
    }

    #[test]
    fn quantized_weights_are_counted() -> Result<()> {
        let weight = random(&[32, 64]);
        take_quantized();
        let linear = with(switched(&[("weights-q4", true)]), || Linear::new(&weight, None))?;
        let expected = Quantized { native_bytes: 4 * 32 * 64, kept_bytes: linear.weight_bytes() as u64 };
        assert_eq!((take_quantized(), take_quantized()), (expected, Quantized::default()));
        Ok(())
    }

    #[test]
    fn sizes_alone_take_no_memory() -> Result<()> {
        let big = |shape: &[usize]| Tensor::zeros((), DType::BF16, &Device::Cpu)?.broadcast_as(shape);
        let sizes_only = |precision| Options { sizes_only: true, precision, ..Options::default() };
        // a thousand gigabytes each, and a bias in f32
        let (linear, conv) = with(sizes_only(Precision::Native), || {
            let linear = Linear::new(&big(&[1 << 20, 1 << 19])?, Some(&big(&[1 << 20])?))?;
            Ok::<_, candle_core::Error>((
                linear,
                Conv2d::new(&big(&[1 << 19, 1 << 16, 4, 4])?, None, Conv2dConfig::new(4))?,
            ))
        })?;
        assert_eq!((linear.in_dim(), linear.out_dim(), linear.has_bias()), (1 << 19, 1 << 20, true));
        assert_eq!((linear.weight_bytes(), conv.weight_bytes()), ((1 << 40) + (4 << 20), 1 << 40));
        // what quantising would make of it is counted as if it had been done
        let quantized = |options, weight: &Tensor| {
            take_quantized();
            with(options, || Linear::new(weight, None)).map(|_| take_quantized())
        };
        let native = Options { precision: Precision::Q8, ..Options::default() };
        let small = Tensor::ones((64, 96), DType::F32, &Device::Cpu)?;
        assert_eq!(quantized(sizes_only(Precision::Q8), &small)?, quantized(native, &small)?);
        Ok(())
    }

    #[test]
    fn paths_tell_what_was_chosen() {
        let paths = |options, dtype| with(options, || isa::paths(&Device::Cpu, dtype));
        let plain = paths(switched(&[("packed-weights", false), ("fused-attention", false)]), DType::F32);
        assert_eq!((plain["matmul"].as_str(), plain["attention"].as_str()), ("candle", "candle"));
        assert!(paths(switched(&[("weights-q8", true)]), DType::F32)["matmul"].starts_with("q8 "));
    }
}
