//! Sums of four products of bytes per 32-bit lane, in the forms that the instruction sets have them.
//!
//! As in [`simd`](super::simd), a kernel is written once over [`ByteDot`] and compiled for each implementation:
//! [`ByteDot::call`] enters it with the right `#[target_feature]`s.

#![expect(unsafe_code, reason = "intrinsics; the contract is stated once, on the trait")]

use super::simd::{Scalar, Simd};

/// A vector of `S::LANES` lanes of four bytes.
///
/// # Safety
/// Every method requires that the CPU has what the implementation names; pointers are valid for a vector, without any
/// alignment.
pub(crate) trait ByteDot: Copy + 'static {
    /// The f32 vector with as many lanes.
    type S: Simd;
    /// The vector.
    type I: Copy;
    /// What is added to a weight in -127..=127 before it is stored: 128 where the instruction wants it unsigned.
    const OFFSET: i32;

    /// Runs `kernel` as a function of its own, compiled for this set.
    unsafe fn call<K: DotKernel>(kernel: &K);

    /// `x` in every 32-bit lane.
    unsafe fn splat(x: i32) -> Self::I;
    unsafe fn load(p: *const u8) -> Self::I;
    /// The lower and the upper halves of each byte.
    unsafe fn nibbles(x: Self::I) -> (Self::I, Self::I);
    /// Adds to each lane the products of its four stored weights (with [`OFFSET`](Self::OFFSET), as they come) with
    /// its four signed bytes of `a`, in -127..=127.
    unsafe fn dot(sum: Self::I, w: Self::I, a: Self::I) -> Self::I;
    /// As [`dot`](Self::dot) for weights in 0..=15.
    #[inline(always)]
    unsafe fn dot_nibbles(sum: Self::I, w: Self::I, a: Self::I) -> Self::I {
        // SAFETY: the contract of the trait.
        unsafe { Self::dot(sum, w, a) }
    }
    unsafe fn to_f32(x: Self::I) -> <Self::S as Simd>::F;
}

/// What [`ByteDot::call`] runs. `run` must be `#[inline(always)]`.
pub(crate) trait DotKernel {
    /// # Safety
    /// The CPU has `D`; what else it needs, the kernel says.
    unsafe fn run<D: ByteDot>(&self);
}

/// [`ByteDot::call`], with the features of the instruction set.
macro_rules! call {
    ($(#[$feature:meta])*) => {
        #[inline(always)]
        unsafe fn call<K: DotKernel>(kernel: &K) {
            #[inline(never)]
            $(#[$feature])*
            unsafe fn outlined<D: ByteDot, K: DotKernel>(kernel: &K) {
                // SAFETY: the contract of the trait.
                unsafe { kernel.run::<D>() }
            }
            // SAFETY: the contract of the trait.
            unsafe { outlined::<Self, K>(kernel) }
        }
    };
}

/// Methods whose bodies are one expression.
macro_rules! ops {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) -> $ret {
            #[allow(unused_unsafe, reason = "portable bodies need none")]
            // SAFETY: the contract of the trait.
            unsafe { $body }
        }
    )*};
}

/// Plain Rust, four lanes.
#[derive(Clone, Copy)]
pub(crate) struct ScalarDot;

impl ByteDot for ScalarDot {
    type S = Scalar;
    type I = [i32; 4];
    const OFFSET: i32 = 0;

    call!();
    ops! {
        fn splat(x: i32) -> [i32; 4] { [x; 4] }
        fn load(p: *const u8) -> [i32; 4] { p.cast::<[i32; 4]>().read_unaligned() }
        fn nibbles(x: [i32; 4]) -> ([i32; 4], [i32; 4]) { (x.map(|x| x & 0x0f0f_0f0f), x.map(|x| x >> 4 & 0x0f0f_0f0f)) }
        fn dot(sum: [i32; 4], w: [i32; 4], a: [i32; 4]) -> [i32; 4] {
            let byte = |x: i32, at: usize| i32::from(x.to_ne_bytes()[at] as i8);
            [0, 1, 2, 3].map(|i| (0..4).fold(sum[i], |sum, at| sum + byte(w[i], at) * byte(a[i], at)))
        }
        fn to_f32(x: [i32; 4]) -> [f32; 4] { x.map(|x| x as f32) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2Dot, Avx512Dot, Avx512Vnni, AvxVnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::simd::{Avx2, Avx512};
    use super::{ByteDot, DotKernel};

    /// 256-bit without VNNI. Products of bytes are summed in pairs of 16 bits, which hold 2 · 127² and 2 · 15 · 127, but
    /// not 2 · 255 · 127; so the sign of a weight goes to the activation, and nothing saturates.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2Dot;

    /// 256-bit with AVX-VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct AvxVnni;

    /// 512-bit without VNNI; as [`Avx2Dot`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Dot;

    /// 512-bit with AVX-512 VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Vnni;

    /// What is the same with and without VNNI.
    macro_rules! ops_256 {
        () => {
            ops! {
                fn splat(x: i32) -> __m256i { _mm256_set1_epi32(x) }
                fn load(p: *const u8) -> __m256i { _mm256_loadu_si256(p.cast()) }
                fn nibbles(x: __m256i) -> (__m256i, __m256i) {
                    let low = _mm256_set1_epi8(15);
                    (_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16::<4>(x), low))
                }
                fn to_f32(x: __m256i) -> __m256 { _mm256_cvtepi32_ps(x) }
            }
        };
    }

    macro_rules! ops_512 {
        () => {
            ops! {
                fn splat(x: i32) -> __m512i { _mm512_set1_epi32(x) }
                fn load(p: *const u8) -> __m512i { _mm512_loadu_si512(p.cast()) }
                fn nibbles(x: __m512i) -> (__m512i, __m512i) {
                    let low = _mm512_set1_epi8(15);
                    (_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16::<4>(x), low))
                }
                fn to_f32(x: __m512i) -> __m512 { _mm512_cvtepi32_ps(x) }
            }
        };
    }

    impl ByteDot for Avx2Dot {
        type S = Avx2;
        type I = __m256i;
        const OFFSET: i32 = 0;

        call!(#[target_feature(enable = "avx2,fma,f16c")]);
        ops_256!();
        ops! {
            fn dot(sum: __m256i, w: __m256i, a: __m256i) -> __m256i {
                Self::dot_nibbles(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
            }
            fn dot_nibbles(sum: __m256i, w: __m256i, a: __m256i) -> __m256i {
                _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)))
            }
        }
    }

    impl ByteDot for AvxVnni {
        type S = Avx2;
        type I = __m256i;
        const OFFSET: i32 = 128;

        call!(#[target_feature(enable = "avxvnni,avx2,fma,f16c")]);
        ops_256!();
        ops! {
            fn dot(sum: __m256i, w: __m256i, a: __m256i) -> __m256i { _mm256_dpbusd_avx_epi32(sum, w, a) }
        }
    }

    impl ByteDot for Avx512Dot {
        type S = Avx512;
        type I = __m512i;
        const OFFSET: i32 = 0;

        call!(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
        ops_512!();
        ops! {
            fn dot(sum: __m512i, w: __m512i, a: __m512i) -> __m512i {
                let signed = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
                Self::dot_nibbles(sum, _mm512_abs_epi8(w), signed)
            }
            fn dot_nibbles(sum: __m512i, w: __m512i, a: __m512i) -> __m512i {
                _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, a), _mm512_set1_epi16(1)))
            }
        }
    }

    impl ByteDot for Avx512Vnni {
        type S = Avx512;
        type I = __m512i;
        const OFFSET: i32 = 128;

        call!(#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]);
        ops_512!();
        ops! {
            fn dot(sum: __m512i, w: __m512i, a: __m512i) -> __m512i { _mm512_dpbusd_epi32(sum, w, a) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use arm::{NeonDot, NeonDotprod};

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;
    use std::arch::asm;

    use super::super::simd::Neon;
    use super::{ByteDot, DotKernel};

    /// 128-bit without `dotprod`: products in 16 bits, two of which fit (2 · 127²), then pairs into 32.
    #[derive(Clone, Copy)]
    pub(crate) struct NeonDot;

    /// 128-bit with `dotprod`.
    #[derive(Clone, Copy)]
    pub(crate) struct NeonDotprod;

    macro_rules! ops_128 {
        () => {
            ops! {
                fn splat(x: i32) -> int32x4_t { vdupq_n_s32(x) }
                fn load(p: *const u8) -> int32x4_t { vreinterpretq_s32_u8(vld1q_u8(p)) }
                fn nibbles(x: int32x4_t) -> (int32x4_t, int32x4_t) {
                    let x = vreinterpretq_u8_s32(x);
                    (vreinterpretq_s32_u8(vandq_u8(x, vdupq_n_u8(15))), vreinterpretq_s32_u8(vshrq_n_u8::<4>(x)))
                }
                fn to_f32(x: int32x4_t) -> float32x4_t { vcvtq_f32_s32(x) }
            }
        };
    }

    impl ByteDot for NeonDot {
        type S = Neon;
        type I = int32x4_t;
        const OFFSET: i32 = 0;

        call!();
        ops_128!();
        ops! {
            fn dot(sum: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
                let (w, a) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
                let low = vmull_s8(vget_low_s8(w), vget_low_s8(a));
                vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(w, a)))
            }
        }
    }

    impl ByteDot for NeonDotprod {
        type S = Neon;
        type I = int32x4_t;
        const OFFSET: i32 = 0;

        call!(#[target_feature(enable = "dotprod")]);
        ops_128!();
        ops! {
            fn dot(sum: int32x4_t, w: int32x4_t, a: int32x4_t) -> int32x4_t {
                // The intrinsic, vdotq_s32, is not stable.
                let mut sum = sum;
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {w:v}.16b, {a:v}.16b",
                    sum = inout(vreg) sum,
                    w = in(vreg) w,
                    a = in(vreg) a,
                    options(pure, nomem, nostack, preserves_flags),
                );
                sum
            }
        }
    }
}
