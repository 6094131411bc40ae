//! Arithmetic ceilings: loops that touch registers only, with enough independent sums in flight to hide the latency of
//! the instruction (12 on x86-64: two units of latency 4 need 8, and 16 registers hold 12 and the operand; 20 on
//! AArch64: four units of latency 4 need 16 of 32 registers).
//!
//! All operands are 1, unknown to the compiler, and the sums begin at 0: a loop's result *is* the number of its
//! multiply-adds, so that operations are counted by what was computed and not by a constant beside the loop.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// A loop over one instruction.
pub(super) struct Kernel {
    /// `f32`, `bf16` or `int8`.
    pub(super) dtype: &'static str,
    /// Instructions used.
    pub(super) path: &'static str,
    /// Runs so many iterations; returns the multiply-adds done (exact up to 2²⁴ per lane).
    pub(super) run: fn(u64) -> f64,
}

impl Kernel {
    /// Operations of one iteration, a multiply-add counted as 2.
    pub(super) fn operations(&self) -> f64 {
        2.0 * (self.run)(1)
    }

    /// Iterations that take about `wanted`.
    pub(super) fn calibrate(&self, wanted: Duration) -> u64 {
        const MOST: u64 = 1 << 40;
        let mut iterations = 64;
        while iterations < MOST {
            let start = Instant::now();
            black_box((self.run)(black_box(iterations)));
            if start.elapsed() >= wanted {
                break;
            }
            iterations *= 2;
        }
        iterations
    }
}

/// Every kernel that this CPU can run. The portable one stands in only where no other does f32.
pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels = native();
    if !kernels.iter().any(|kernel| kernel.dtype == "f32") {
        kernels.push(Kernel { dtype: "f32", path: "portable multiply and add", run: portable });
    }
    kernels
}

fn portable(iterations: u64) -> f64 {
    let one = black_box(1.0f32);
    let mut sums = black_box([[0.0f32; 4]; 12]);
    for _ in 0..iterations {
        for lane in sums.as_flattened_mut() {
            *lane = *lane * one + one;
        }
    }
    sums.as_flattened().iter().map(|&lane| f64::from(lane)).sum()
}

/// Defines a kernel: its target features, the vector of a sum with its lanes, how many sums, the operand, and the step.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! kernel {
    ($name:ident, $features:literal, $vector:ty as [$lane:ty; $lanes:literal], $sums:literal sums of $zero:expr,
     $one:ident = $operand:expr, $sum:ident => $step:expr) => {
        #[target_feature(enable = $features)]
        fn $name(iterations: u64) -> f64 {
            let $one = $operand;
            let mut sums: [$vector; $sums] = black_box([$zero; $sums]);
            for _ in 0..iterations {
                for $sum in &mut sums {
                    $step;
                }
            }
            #[expect(unsafe_code, reason = "vectors have no safe view as arrays")]
            // SAFETY: a vector is its lanes, each of which may hold any bits; the compiler checks the sizes.
            let lanes = sums.map(|sum| unsafe { std::mem::transmute::<$vector, [$lane; $lanes]>(sum) });
            lanes.as_flattened().iter().map(|&lane| f64::from(lane)).sum()
        }
    };
}

/// The list entry for a kernel, if the CPU has its features.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! offer {
    ($detect:ident: $($feature:tt),* => $dtype:literal, $path:literal, $name:ident) => {
        ($(std::arch::$detect!($feature))&&*).then_some(Kernel {
            dtype: $dtype,
            path: $path,
            run: |iterations| {
                #[expect(unsafe_code, reason = "calls a function compiled for features that were detected")]
                // SAFETY: this entry exists only where the CPU has the features, as detected in the line above.
                unsafe {
                    $name(iterations)
                }
            },
        })
    };
}

#[cfg(target_arch = "x86_64")]
use x86::native;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, black_box};

    kernel!(f32_512, "avx512f", __m512 as [f32; 16], 12 sums of _mm512_setzero_ps(),
        one = _mm512_set1_ps(black_box(1.0)), sum => *sum = _mm512_fmadd_ps(*sum, one, one));
    kernel!(f32_256, "avx,fma", __m256 as [f32; 8], 12 sums of _mm256_setzero_ps(),
        one = _mm256_set1_ps(black_box(1.0)), sum => *sum = _mm256_fmadd_ps(*sum, one, one));
    kernel!(f32_128, "sse2", __m128 as [f32; 4], 12 sums of _mm_setzero_ps(),
        one = _mm_set1_ps(black_box(1.0)), sum => *sum = _mm_add_ps(_mm_mul_ps(*sum, one), one));
    kernel!(bf16_512, "avx512f,avx512bf16", __m512 as [f32; 16], 12 sums of _mm512_setzero_ps(),
        one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(1.0))),
        sum => *sum = _mm512_dpbf16_ps(*sum, one, one));
    kernel!(bf16_256, "avx512f,avx512bf16,avx512vl", __m256 as [f32; 8], 12 sums of _mm256_setzero_ps(),
        one = _mm256_cvtne2ps_pbh(_mm256_set1_ps(black_box(1.0)), _mm256_set1_ps(black_box(1.0))),
        sum => *sum = _mm256_dpbf16_ps(*sum, one, one));
    kernel!(int8_512, "avx512f,avx512vnni", __m512i as [i32; 16], 12 sums of _mm512_setzero_si512(),
        one = _mm512_set1_epi8(black_box(1)), sum => *sum = _mm512_dpbusd_epi32(*sum, one, one));
    kernel!(int8_256, "avx512vnni,avx512vl", __m256i as [i32; 8], 12 sums of _mm256_setzero_si256(),
        one = _mm256_set1_epi8(black_box(1)), sum => *sum = _mm256_dpbusd_epi32(*sum, one, one));
    kernel!(int8_256_vex, "avxvnni", __m256i as [i32; 8], 12 sums of _mm256_setzero_si256(),
        one = _mm256_set1_epi8(black_box(1)), sum => *sum = _mm256_dpbusd_avx_epi32(*sum, one, one));

    /// All widths are offered, as the wider one is not the faster one on every CPU.
    pub(super) fn native() -> Vec<Kernel> {
        let f32_256 = offer!(is_x86_feature_detected: "avx", "fma" => "f32", "avx fma 256-bit", f32_256);
        let f32_128 = offer!(is_x86_feature_detected: "sse2" => "f32", "sse2 mul and add 128-bit", f32_128);
        let evex = offer!(
            is_x86_feature_detected: "avx512vnni", "avx512vl" => "int8", "avx512vnni vpdpbusd 256-bit", int8_256
        );
        let vex = offer!(is_x86_feature_detected: "avxvnni" => "int8", "avxvnni vpdpbusd 256-bit", int8_256_vex);
        [
            offer!(is_x86_feature_detected: "avx512f" => "f32", "avx512f fma 512-bit", f32_512),
            f32_256.or(f32_128),
            offer!(
                is_x86_feature_detected: "avx512f", "avx512bf16" => "bf16", "avx512bf16 vdpbf16ps 512-bit", bf16_512
            ),
            offer!(
                is_x86_feature_detected: "avx512f", "avx512bf16", "avx512vl" =>
                "bf16", "avx512bf16 vdpbf16ps 256-bit", bf16_256
            ),
            offer!(is_x86_feature_detected: "avx512f", "avx512vnni" => "int8", "avx512vnni vpdpbusd 512-bit", int8_512),
            evex.or(vex),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

#[cfg(target_arch = "aarch64")]
use arm::native;

/// The dot and matrix products of bf16 and int8 have no stable intrinsics yet; stable inline assembly has them.
#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;
    use std::arch::asm;

    use super::{Kernel, black_box};

    /// `sum += one · one` by an instruction that adds to its destination.
    macro_rules! step {
        ($instruction:literal, $sum:ident, $one:ident) => {{
            #[expect(unsafe_code, reason = "inline assembly")]
            // SAFETY: arithmetic on registers, by an instruction of the features that the kernel is compiled for.
            unsafe {
                asm!($instruction, sum = inout(vreg) *$sum, one = in(vreg) $one,
                    options(pure, nomem, nostack, preserves_flags))
            }
        }};
    }

    kernel!(f32_128, "neon", float32x4_t as [f32; 4], 20 sums of vdupq_n_f32(0.0),
        one = vdupq_n_f32(black_box(1.0)), sum => *sum = vfmaq_f32(*sum, one, one));
    // 0x3f80 is 1 in bf16.
    kernel!(bf16_dot, "neon,bf16", float32x4_t as [f32; 4], 20 sums of vdupq_n_f32(0.0),
        one = vdupq_n_u16(black_box(0x3f80)), sum => step!("bfdot {sum:v}.4s, {one:v}.8h, {one:v}.8h", sum, one));
    kernel!(bf16_matrix, "neon,bf16", float32x4_t as [f32; 4], 20 sums of vdupq_n_f32(0.0),
        one = vdupq_n_u16(black_box(0x3f80)), sum => step!("bfmmla {sum:v}.4s, {one:v}.8h, {one:v}.8h", sum, one));
    kernel!(int8_dot, "neon,dotprod", int32x4_t as [i32; 4], 20 sums of vdupq_n_s32(0),
        one = vdupq_n_s8(black_box(1)), sum => step!("sdot {sum:v}.4s, {one:v}.16b, {one:v}.16b", sum, one));
    kernel!(int8_matrix, "neon,i8mm", int32x4_t as [i32; 4], 20 sums of vdupq_n_s32(0),
        one = vdupq_n_s8(black_box(1)), sum => step!("smmla {sum:v}.4s, {one:v}.16b, {one:v}.16b", sum, one));

    pub(super) fn native() -> Vec<Kernel> {
        [
            offer!(is_aarch64_feature_detected: "neon" => "f32", "neon fmla 128-bit", f32_128),
            offer!(is_aarch64_feature_detected: "bf16" => "bf16", "bf16 bfdot 128-bit", bf16_dot),
            offer!(is_aarch64_feature_detected: "bf16" => "bf16", "bf16 bfmmla 128-bit", bf16_matrix),
            offer!(is_aarch64_feature_detected: "dotprod" => "int8", "dotprod sdot 128-bit", int8_dot),
            offer!(is_aarch64_feature_detected: "i8mm" => "int8", "i8mm smmla 128-bit", int8_matrix),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn native() -> Vec<Kernel> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiply-adds of one iteration by hand: sums × lanes × products per lane.
    fn by_hand(path: &str) -> f64 {
        let (sums, products) = match path {
            "portable multiply and add" => (12, 4),
            "avx512f fma 512-bit" => (12, 16),
            "avx fma 256-bit" => (12, 8),
            "sse2 mul and add 128-bit" => (12, 4),
            "avx512bf16 vdpbf16ps 512-bit" => (12, 16 * 2),
            "avx512bf16 vdpbf16ps 256-bit" => (12, 8 * 2),
            "avx512vnni vpdpbusd 512-bit" => (12, 16 * 4),
            "avx512vnni vpdpbusd 256-bit" | "avxvnni vpdpbusd 256-bit" => (12, 8 * 4),
            "neon fmla 128-bit" => (20, 4),
            "bf16 bfdot 128-bit" => (20, 4 * 2),
            "bf16 bfmmla 128-bit" => (20, 4 * 4),
            "dotprod sdot 128-bit" => (20, 4 * 4),
            "i8mm smmla 128-bit" => (20, 4 * 8),
            other => panic!("no count for {other}"),
        };
        f64::from(sums * products)
    }

    #[test]
    fn results_count_the_multiply_adds() {
        let portable = Kernel { dtype: "f32", path: "portable multiply and add", run: portable };
        let kernels = kernels();
        assert!(kernels.iter().any(|kernel| kernel.dtype == "f32"));
        for kernel in kernels.iter().chain([&portable]) {
            let macs = by_hand(kernel.path);
            assert_eq!(kernel.operations(), 2.0 * macs, "{}", kernel.path);
            for iterations in [0u32, 2, 1000] {
                assert_eq!((kernel.run)(iterations.into()), f64::from(iterations) * macs, "{}", kernel.path);
            }
        }
    }
}
