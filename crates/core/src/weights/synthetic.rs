//! Synthetic weights, version 1: every value is a pure function of (seed, tensor name, element index), so that any
//! machine fills a model with the same bits as the reference does, at any size, without a checkpoint.
//!
//! ```text
//! key  = fnv1a64(name) XOR mix64(seed)
//! z    = mix64(key + (i + 1) * 0x9E3779B97F4A7C15)       modulo 2^64; mix64 is the finalizer of splitmix64
//! u    = (z >> 40) * 2^-23 - 1                           exact in f32, in [-1, 1)
//! ```
//! The first rule that matches gives the value, `leaf` being the name after its last dot:
//!
//! 1. a leaf that must be positive (`weight_g`, `original0`, `running_var`, `gamma`, `scale`), or `weight` of rank 0 or
//!    1: `1 + 0.1 u`;
//! 2. rank 2 or more: `u * sqrt(3 / product of all dimensions but the first)`;
//! 3. the rest (biases, running means): `0.1 u`.
//!
//! Every operation rounds to f32; bf16 and f16 are rounded to nearest even from the f32 value.
//!
//! Speed, 2 virtual cores of an AVX-512 EPYC shared with other jobs, bf16 into new allocations: AVX-512 with 4 KiB pages
//! 1.3–2.5 GB/s, with huge pages 9.3, where `memset` reaches 9–15. One thread into cache: SSE2 1.9, AVX2 3.6,
//! AVX-512 12.1 GB/s. Additions wrap, since overflow checks (a dev build has them) keep the loop from vectorising.

use std::mem::MaybeUninit;

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};

use super::WeightsError;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Magnitudes, variances and divisors, which must be positive and near one.
const UNIT_LEAVES: [&str; 5] = ["weight_g", "original0", "running_var", "gamma", "scale"];

/// Fewer elements than this are not worth a thread.
const ELEMENTS_PER_THREAD: usize = 1 << 18;

/// `count` f32 values in [-1, 1) of the stream called `name`, from element `start`.
///
/// # Errors
/// [`WeightsError::TooLarge`] when the memory is not to be had.
pub fn uniform(name: &str, count: usize, seed: u64, start: u64) -> Result<Vec<f32>, WeightsError> {
    fill(name, &[count], key(name, seed).wrapping_add(start.wrapping_mul(GOLDEN)), Affine { offset: 0.0, scale: 1.0 })
}

/// The synthetic tensor `name` of `shape` on `device`.
///
/// # Errors
/// [`WeightsError::SyntheticDtype`] when `dtype` is not f32, f64, bf16 or f16, [`WeightsError::TooLarge`] when the
/// shape's product overflows or the memory is not to be had, [`WeightsError::Tensor`] when the device refuses.
pub fn tensor(name: &str, shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Tensor, WeightsError> {
    let made = match dtype {
        DType::F32 => filled::<f32>(name, shape, seed, device)?,
        DType::BF16 => filled::<bf16>(name, shape, seed, device)?,
        DType::F16 => filled::<f16>(name, shape, seed, device)?,
        DType::F64 => filled::<f32>(name, shape, seed, device)?.and_then(|values| values.to_dtype(DType::F64)),
        _ => return Err(WeightsError::SyntheticDtype { name: name.to_owned(), dtype: dtype.as_str() }),
    };
    made.map_err(|source| WeightsError::Tensor { name: name.to_owned(), source: Box::new(source) })
}

/// The outer error is of the memory, the inner one of the device.
fn filled<T: Element + WithDType>(
    name: &str,
    shape: &[usize],
    seed: u64,
    device: &Device,
) -> Result<candle_core::Result<Tensor>, WeightsError> {
    let values = fill::<T>(name, shape, key(name, seed), Affine::of(name, shape))?;
    Ok(Tensor::from_vec(values, shape, device))
}

/// `offset + scale * u`, each operation rounded to f32. An offset of 0 leaves the product as it is.
#[derive(Debug, Clone, Copy)]
struct Affine {
    offset: f32,
    scale: f32,
}

impl Affine {
    fn of(name: &str, shape: &[usize]) -> Self {
        let leaf = name.rsplit('.').next().unwrap_or(name);
        if UNIT_LEAVES.contains(&leaf) || (shape.len() <= 1 && leaf == "weight") {
            Self { offset: 1.0, scale: 0.1 }
        } else if shape.len() >= 2 {
            let fan_in: f64 = shape[1..].iter().map(|&dimension| dimension as f64).product();
            Self { offset: 0.0, scale: (3.0 / fan_in).sqrt() as f32 }
        } else {
            Self { offset: 0.0, scale: 0.1 }
        }
    }
}

fn mix64(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn key(name: &str, seed: u64) -> u64 {
    let fnv1a64 = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    name.as_bytes().iter().fold(0xCBF2_9CE4_8422_2325, fnv1a64) ^ mix64(seed)
}

/// A type that values are rounded to.
trait Element: Copy + Send {
    /// Rounds a finite value of magnitude below 65504 to nearest, ties to even.
    fn rounded(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        Self::from_bits((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

impl Element for f16 {
    // `half` takes one value at a time with branches; this form has none, so that the loop around it vectorises.
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let magnitude = bits & 0x7FFF_FFFF;
        // 2^-14 and more: exponent from bias 127 to 15, the 13 dropped bits rounded with the carry going up.
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xFFF + ((magnitude >> 13) & 1)) >> 13;
        // Below: the unit in the last place of 0.5 in f32 is the smallest f16, so the addition itself rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        Self::from_bits((sign | if magnitude < 113 << 23 { subnormal } else { normal }) as u16)
    }
}

/// A vector of `shape`'s elements from the stream whose element -1 would be at `counter`.
fn fill<T: Element>(name: &str, shape: &[usize], counter: u64, line: Affine) -> Result<Vec<T>, WeightsError> {
    let too_large = || WeightsError::TooLarge { name: name.to_owned(), shape: shape.to_vec() };
    let count = shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n)).ok_or_else(too_large)?;
    let mut values = Vec::<T>::new();
    values.try_reserve_exact(count).map_err(|_| too_large())?;
    let slots = &mut values.spare_capacity_mut()[..count];
    ask_for_huge_pages(slots);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (count / ELEMENTS_PER_THREAD).clamp(1, cores);
    let fill_run = widest_fill::<T>();
    if threads == 1 {
        fill_run(slots, counter, line);
    } else {
        let run = count.div_ceil(threads);
        std::thread::scope(|scope| {
            for (index, slots) in slots.chunks_mut(run).enumerate() {
                let counter = counter.wrapping_add(((index * run) as u64).wrapping_mul(GOLDEN));
                scope.spawn(move || fill_run(slots, counter, line));
            }
        });
    }
    #[expect(unsafe_code, reason = "the values are written once, not zeroed before")]
    // SAFETY: the capacity is at least `count`, and `fill_run` has written every one of the first `count` slots.
    unsafe {
        values.set_len(count);
    }
    Ok(values)
}

/// Without them, most of the time of filling fresh memory goes into faulting in 4 KiB pages. Only a hint.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(slots: &mut [MaybeUninit<T>]) {
    const PAGE: usize = 4096;
    const WORTHWHILE: usize = 4 << 20;
    let bytes = std::mem::size_of_val(slots);
    let start = slots.as_mut_ptr().cast::<u8>();
    let skipped = start.align_offset(PAGE);
    if bytes >= WORTHWHILE && skipped < bytes {
        #[expect(unsafe_code, reason = "madvise is a system call")]
        // SAFETY: the range lies within memory that `slots` borrows; the advice changes how it is paged, not what it
        // holds, and a refusal is harmless.
        unsafe {
            libc::madvise(start.wrapping_add(skipped).cast(), bytes - skipped, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_slots: &mut [MaybeUninit<T>]) {}

type FillRun<T> = fn(&mut [MaybeUninit<T>], u64, Affine);

/// The definition. Compiled for several instruction sets; the bits are the same, as no path fuses or reorders.
#[inline(always)]
fn fill_portable<T: Element>(slots: &mut [MaybeUninit<T>], mut counter: u64, line: Affine) {
    for slot in slots {
        counter = counter.wrapping_add(GOLDEN);
        let u = (mix64(counter) >> 40) as i32 as f32 * (1.0 / 8_388_608.0) - 1.0;
        slot.write(T::rounded(line.offset + line.scale * u));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2<T: Element>(slots: &mut [MaybeUninit<T>], counter: u64, line: Affine) {
    fill_portable(slots, counter, line);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn fill_avx512<T: Element>(slots: &mut [MaybeUninit<T>], counter: u64, line: Affine) {
    fill_portable(slots, counter, line);
}

/// Every path that this CPU has, the widest first. Only AVX-512 DQ multiplies 64-bit integers in one instruction.
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "a function compiled for more than the baseline is called after its features were found"
)]
fn fill_paths<T: Element>() -> Vec<FillRun<T>> {
    let mut paths: Vec<FillRun<T>> = Vec::new();
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the CPU has all the features that `fill_avx512` is compiled for.
        paths.push(|slots, counter, line| unsafe { fill_avx512(slots, counter, line) });
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        paths.push(|slots, counter, line| unsafe { fill_avx2(slots, counter, line) });
    }
    paths.push(fill_portable);
    paths
}

#[cfg(not(target_arch = "x86_64"))]
fn fill_paths<T: Element>() -> Vec<FillRun<T>> {
    vec![fill_portable]
}

fn widest_fill<T: Element>() -> FillRun<T> {
    fill_paths()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, shape, seed, and the first bits in f32, bf16 and f16.
    type Golden = (&'static str, &'static [usize], u64, &'static [u32], &'static [u16], &'static [u16]);

    /// Printed by the reference program (numpy), at least one per rule.
    #[rustfmt::skip]
    const GOLDEN_BITS: &[Golden] = &[
        ("bert.encoder.layer.0.attention.self.query.weight", &[4, 6], 0, &[0xBEC9_7E09, 0x3E38_EF84, 0xBEBC_3540, 0x3ECD_0815, 0xBF12_029A, 0xBEE5_5CF4], &[0xBEC9, 0x3E39, 0xBEBC, 0x3ECD, 0xBF12, 0xBEE5], &[0xB64C, 0x31C7, 0xB5E2, 0x3668, 0xB890, 0xB72B]),
        ("bert.encoder.layer.0.output.dense.bias", &[6], 0, &[0xBD9D_8EA5, 0xBD98_A950, 0xBD3B_391A, 0xBD7B_C15D, 0x3D1A_7AE3, 0x3C50_E41A], &[0xBD9E, 0xBD99, 0xBD3B, 0xBD7C, 0x3D1A, 0x3C51], &[0xACEC, 0xACC5, 0xA9DA, 0xABDE, 0x28D4, 0x2287]),
        ("encoder.layernorm.weight", &[5], 7, &[0x3F86_296D, 0x3F7C_DF34, 0x3F7C_A4D6, 0x3F86_34D7, 0x3F66_9097], &[0x3F86, 0x3F7D, 0x3F7D, 0x3F86, 0x3F67], &[0x3C31, 0x3BE7, 0x3BE5, 0x3C32, 0x3B35]),
        ("weight", &[], 3, &[0x3F83_3533], &[0x3F83], &[0x3C1A]),
        ("logit_scale", &[], 0, &[0x3CD0_3993], &[0x3CD0], &[0x2682]),
        ("layer_scale.gamma", &[2, 3], 0, &[0x3F70_74DC, 0x3F8C_1DD2, 0x3F75_E8A0, 0x3F79_21B6, 0x3F8A_9C77, 0x3F89_1CE9], &[0x3F70, 0x3F8C, 0x3F76, 0x3F79, 0x3F8B, 0x3F89], &[0x3B84, 0x3C61, 0x3BAF, 0x3BC9, 0x3C55, 0x3C49]),
        ("conv.weight_g", &[1, 1, 5], 11, &[0x3F89_44BC, 0x3F6B_CA11, 0x3F83_A09D, 0x3F79_4752, 0x3F8B_EED9], &[0x3F89, 0x3F6C, 0x3F84, 0x3F79, 0x3F8C], &[0x3C4A, 0x3B5E, 0x3C1D, 0x3BCA, 0x3C5F]),
        ("conv.parametrizations.weight.original0", &[1, 1, 4], 0, &[0x3F76_A153, 0x3F6C_8B00, 0x3F75_A407, 0x3F6B_4A46], &[0x3F77, 0x3F6D, 0x3F76, 0x3F6B], &[0x3BB5, 0x3B64, 0x3BAD, 0x3B5A]),
        ("bn.running_var", &[4], u64::MAX, &[0x3F6C_5066, 0x3F87_62B7, 0x3F88_B418, 0x3F85_AF65], &[0x3F6C, 0x3F87, 0x3F89, 0x3F86], &[0x3B63, 0x3C3B, 0x3C46, 0x3C2D]),
        ("bn.running_mean", &[4], 5, &[0xBC9D_EE80, 0x3DCB_3B1F, 0x3D83_340D, 0x3DB3_A0AA], &[0xBC9E, 0x3DCB, 0x3D83, 0x3DB4], &[0xA4EF, 0x2E5A, 0x2C1A, 0x2D9D]),
        ("a.scale", &[3], 0, &[0x3F88_604C, 0x3F6A_218B, 0x3F71_EBDC], &[0x3F88, 0x3F6A, 0x3F72], &[0x3C43, 0x3B51, 0x3B8F]),
        ("conv.weight", &[2, 3, 2, 2], 1_234_567_890_123_456_789, &[0x3DF8_15B8, 0xBE0A_9CF0, 0xBE88_BC9E, 0x3DC4_BF40, 0xBEDA_704C, 0xBE09_5644], &[0x3DF8, 0xBE0B, 0xBE89, 0x3DC5, 0xBEDA, 0xBE09], &[0x2FC1, 0xB055, 0xB446, 0x2E26, 0xB6D4, 0xB04B]),
        ("größe.層.weight", &[3, 3], 42, &[0x3E7F_9A40, 0xBE97_2124, 0xBF71_C240, 0xBEA2_531C, 0x3F6A_AF64, 0xBE6F_6658], &[0x3E80, 0xBE97, 0xBF72, 0xBEA2, 0x3F6B, 0xBE6F], &[0x33FD, 0xB4B9, 0xBB8E, 0xB513, 0x3B55, 0xB37B]),
        ("", &[2, 2], 0, &[0x3F25_5AD2, 0xBF89_1C25, 0xBED3_CFA6, 0xBF4C_C909], &[0x3F25, 0xBF89, 0xBED4, 0xBF4D], &[0x392B, 0xBC49, 0xB69E, 0xBA66]),
    ];

    fn bits32(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// All elements of `tensor` as little-endian bytes.
    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let flat = tensor.flatten_all().unwrap();
        match tensor.dtype() {
            DType::F32 => flat.to_vec1::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::BF16 => flat.to_vec1::<bf16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => flat.to_vec1::<f16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn fnv1a64(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
    }

    #[test]
    fn every_rule_and_dtype_has_the_bits_of_the_reference() {
        for &(name, shape, seed, f32_bits, bf16_bits, f16_bits) in GOLDEN_BITS {
            let head = |dtype| {
                let made = tensor(name, shape, seed, dtype, &Device::Cpu).unwrap();
                assert_eq!((made.dims(), made.dtype()), (shape, dtype));
                bytes(&made)[..f32_bits.len() * dtype.size_in_bytes()].to_vec()
            };
            let expected32: Vec<u8> = f32_bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            let expected16 = |bits: &[u16]| bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
            assert_eq!(head(DType::F32), expected32, "{name} f32");
            assert_eq!(head(DType::BF16), expected16(bf16_bits), "{name} bf16");
            assert_eq!(head(DType::F16), expected16(f16_bits), "{name} f16");
        }
    }

    #[test]
    fn long_tensors_filled_by_several_threads_hash_as_the_reference() {
        for (dtype, hash) in [
            (DType::F32, 0x4927_0895_3CE2_110C),
            (DType::BF16, 0x2205_FBB7_70D4_C879),
            (DType::F16, 0xB3A1_B997_3D64_10F3),
        ] {
            let made = tensor("model.embed_tokens.weight", &[1031, 1021], 3, dtype, &Device::Cpu).unwrap();
            assert_eq!(fnv1a64(&bytes(&made)), hash, "{dtype:?}");
        }
    }

    #[test]
    fn uniform_starts_anywhere() {
        for (start, expected) in [
            (0, [0xBECE_C61C, 0xBE1A_DFB0, 0xBE51_0B38]),
            (1, [0xBE1A_DFB0, 0xBE51_0B38, 0xBE16_67B0]),
            (1 << 24, [0x3E0B_CEE0, 0xBE3A_9708, 0xBF18_7FB8]),
            ((1 << 40) + 5, [0xBDF5_AF50, 0xBE80_13D0, 0xBEF9_7A80]),
        ] {
            assert_eq!(bits32(&uniform("input:pixel_values", 3, 9, start).unwrap()), expected, "from {start}");
        }
    }

    #[test]
    fn every_path_of_this_cpu_gives_the_same_bits() {
        fn check<T: Element + PartialEq + std::fmt::Debug + Default>() {
            for length in (0..=67).chain([1000]) {
                for line in [Affine { offset: 0.0, scale: 1e-5 }, Affine { offset: 1.0, scale: 0.1 }] {
                    let through = |path: FillRun<T>| {
                        let mut slots = vec![MaybeUninit::new(T::default()); length + 1];
                        path(&mut slots[1..], 77, line);
                        #[expect(unsafe_code, reason = "reads back what was written")]
                        // SAFETY: every slot was made from a value, and a path writes values only.
                        slots.iter().map(|slot| unsafe { slot.assume_init() }).collect::<Vec<T>>()
                    };
                    let expected = through(fill_portable);
                    for path in fill_paths::<T>() {
                        assert_eq!(through(path), expected, "length {length}");
                    }
                }
            }
        }
        check::<f32>();
        check::<bf16>();
        check::<f16>();
    }

    #[test]
    fn rounding_agrees_with_half_everywhere_in_range() {
        // all exponents up to 65504's, mantissas around the ties of both formats, and every subnormal of f16
        let ties = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x7F_FFFF];
        let around = (0..142u32).flat_map(|exponent| ties.map(|mantissa| (exponent << 23) | mantissa));
        let subnormals = (0..1u32 << 12).map(|n| (n as f32 * 2f32.powi(-26)).to_bits());
        for bits in around.chain(subnormals).flat_map(|bits| [bits, bits | 1 << 31]) {
            let value = f32::from_bits(bits);
            assert_eq!(f16::rounded(value).to_bits(), f16::from_f32(value).to_bits(), "{value:e} ({bits:#x})");
            assert_eq!(bf16::rounded(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e} ({bits:#x})");
        }
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let made = |shape: &[usize], dtype| tensor("a.weight", shape, 0, dtype, &Device::Cpu).unwrap_err().to_string();
        assert!(made(&[usize::MAX, 2], DType::F32).contains("a.weight"));
        assert!(made(&[usize::MAX / 8, 2], DType::F32).contains("a.weight"));
        assert!(made(&[2], DType::I64).contains("i64"));
        assert_eq!(tensor("a.weight", &[0, 3], 0, DType::F32, &Device::Cpu).unwrap().elem_count(), 0);
    }
}
