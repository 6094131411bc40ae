//! One vector of f32 lanes on each instruction set, so that a kernel is written once and compiled for all of them.
//!
//! A kernel is an `#[inline(always)] unsafe fn kernel<S: Simd>(...)`; [`simd_entry!`] makes the safe function that
//! takes an [`Isa`](super::isa::Isa) and enters the copy compiled with that set's `#[target_feature]`s. Everything
//! between the entry and the intrinsics must be `#[inline(always)]`, or it is compiled for the baseline.

#![expect(unsafe_code, reason = "intrinsics; the contract is stated once, on the trait")]

/// A vector of `LANES` f32.
///
/// # Safety
/// Every method requires that the CPU has the implementing instruction set; pointers are valid for the lanes read or
/// written (for the `_partial` forms, for the first `n` lanes, `n <= LANES`), without any alignment.
pub(crate) trait Simd: Copy + 'static {
    /// Lanes in a vector.
    const LANES: usize;
    /// Vectors that fit in registers: 32 or 16.
    const REGISTERS: usize;
    /// The vector.
    type F: Copy;

    /// Runs `kernel` as a function of its own, so that its surroundings take none of its registers.
    unsafe fn call<K: Kernel>(kernel: &K);

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// Lanes from `n` on are 0.
    unsafe fn load_partial(p: *const f32, n: usize) -> Self::F;
    unsafe fn store_partial(p: *mut f32, n: usize, x: Self::F);
    /// bf16 bits, widened.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// f16 bits, widened.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c; rounded once where the set has FMA.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// What a lane's bits hold as two bf16, multiplied in pairs and added to `sum`: the upper product first. Subnormal
    /// numbers may count as 0.
    unsafe fn dot_bf16(a: Self::F, b: Self::F, sum: Self::F) -> Self::F;
    /// a * b - `product`, exact where `product` is a * b rounded and nothing underflows.
    unsafe fn mul_error(a: Self::F, b: Self::F, product: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where either is NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// Magnitude of `a`, sign of `b`.
    unsafe fn copysign(a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// a * 2^n for integral `n` in [-126, 127].
    unsafe fn scale_pow2(a: Self::F, n: Self::F) -> Self::F;
    /// a * 2^n for integral `n` in [-252, 254], rounded once where `a` is in [0.5, 2]; overflow gives infinity.
    #[inline(always)]
    unsafe fn ldexp(a: Self::F, n: Self::F) -> Self::F {
        // SAFETY: the contract of the trait.
        unsafe {
            let half = Self::round(Self::mul(n, Self::splat(0.5)));
            Self::scale_pow2(Self::scale_pow2(a, half), Self::sub(n, half))
        }
    }
    /// x where a < b, else y (y for NaN).
    unsafe fn select_lt(a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Four columns of `LANES` rows: lane `i` of vector `j` is `p[i * stride + j]`.
    unsafe fn load_columns(p: *const f32, stride: usize) -> [Self::F; 4];
    /// Lanes 1, 0, 3, 2, ...
    unsafe fn swap_pairs(a: Self::F) -> Self::F;
    unsafe fn reduce_add(a: Self::F) -> f32;
    unsafe fn reduce_max(a: Self::F) -> f32;
    /// Reads the line at `p` ahead of use, into all levels.
    unsafe fn prefetch(p: *const f32);
}

/// The most that `LANES` is.
pub(crate) const MAX_LANES: usize = 16;

/// What [`Simd::call`] runs. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    /// # Safety
    /// The CPU has `S`; what else it needs, the kernel says.
    unsafe fn run<S: Simd>(&self);
}

/// [`Simd::call`], with the features of the instruction set.
macro_rules! call {
    ($set:ident $(, $features:literal)?) => {
        #[inline(always)]
        unsafe fn call<K: Kernel>(kernel: &K) {
            #[inline(never)]
            $(#[target_feature(enable = $features)])?
            unsafe fn outlined<K: Kernel>(kernel: &K) {
                // SAFETY: the contract of the trait.
                unsafe { kernel.run::<$set>() }
            }
            // SAFETY: the contract of the trait.
            unsafe { outlined(kernel) }
        }
    };
}

/// Methods whose bodies are one expression.
macro_rules! ops {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
            #[allow(unused_unsafe, reason = "portable bodies need none")]
            // SAFETY: the contract of the trait.
            unsafe { $body }
        }
    )*};
}

/// Plain Rust, four lanes.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; 4] {
    [f(0), f(1), f(2), f(3)]
}

impl Simd for Scalar {
    const LANES: usize = 4;
    const REGISTERS: usize = 16;
    type F = [f32; 4];

    call!(Scalar);
    ops! {
        fn splat(x: f32) -> [f32; 4] { [x; 4] }
        fn load(p: *const f32) -> [f32; 4] { p.cast::<[f32; 4]>().read_unaligned() }
        fn store(p: *mut f32, x: [f32; 4]) { p.cast::<[f32; 4]>().write_unaligned(x) }
        fn load_partial(p: *const f32, n: usize) -> [f32; 4] { each(|i| if i < n { *p.add(i) } else { 0.0 }) }
        fn store_partial(p: *mut f32, n: usize, x: [f32; 4]) { for (i, x) in x.iter().enumerate().take(n) { *p.add(i) = *x } }
        fn load_bf16(p: *const u16) -> [f32; 4] { each(|i| half::bf16::from_bits(*p.add(i)).to_f32()) }
        fn load_f16(p: *const u16) -> [f32; 4] { each(|i| half::f16::from_bits(*p.add(i)).to_f32()) }
        fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| a[i] + b[i]) }
        fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| a[i] - b[i]) }
        fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| a[i] * b[i]) }
        fn div(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| a[i] / b[i]) }
        fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] { each(|i| a[i] * b[i] + c[i]) }
        fn dot_bf16(a: [f32; 4], b: [f32; 4], sum: [f32; 4]) -> [f32; 4] {
            let upper = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
            let lower = |x: f32| f32::from_bits(x.to_bits() << 16);
            each(|i| lower(a[i]) * lower(b[i]) + (upper(a[i]) * upper(b[i]) + sum[i]))
        }
        fn mul_error(a: [f32; 4], b: [f32; 4], product: [f32; 4]) -> [f32; 4] {
            each(|i| (f64::from(a[i]) * f64::from(b[i]) - f64::from(product[i])) as f32)
        }
        fn max(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| if a[i] > b[i] { a[i] } else { b[i] }) }
        fn min(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| if a[i] < b[i] { a[i] } else { b[i] }) }
        fn abs(a: [f32; 4]) -> [f32; 4] { each(|i| a[i].abs()) }
        fn copysign(a: [f32; 4], b: [f32; 4]) -> [f32; 4] { each(|i| a[i].copysign(b[i])) }
        fn round(a: [f32; 4]) -> [f32; 4] {
            // from 2^23 on all are integers; `round_ties_even` would be a call on baseline x86-64
            const INTEGERS: f32 = 8_388_608.0;
            each(|i| if a[i].abs() < INTEGERS { (a[i].abs() + INTEGERS - INTEGERS).copysign(a[i]) } else { a[i] })
        }
        fn scale_pow2(a: [f32; 4], n: [f32; 4]) -> [f32; 4] { each(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23)) }
        fn select_lt(a: [f32; 4], b: [f32; 4], x: [f32; 4], y: [f32; 4]) -> [f32; 4] { each(|i| if a[i] < b[i] { x[i] } else { y[i] }) }
        fn load_columns(p: *const f32, stride: usize) -> [[f32; 4]; 4] {
            let rows = [0, 1, 2, 3].map(|i| p.add(i * stride).cast::<[f32; 4]>().read_unaligned());
            [0, 1, 2, 3].map(|j| [rows[0][j], rows[1][j], rows[2][j], rows[3][j]])
        }
        fn swap_pairs(a: [f32; 4]) -> [f32; 4] { each(|i| a[i ^ 1]) }
        fn reduce_add(a: [f32; 4]) -> f32 { (a[0] + a[2]) + (a[1] + a[3]) }
        fn reduce_max(a: [f32; 4]) -> f32 { a.into_iter().fold(f32::NEG_INFINITY, f32::max) }
        fn prefetch(_p: *const f32) {}
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Simd};

    /// 256-bit: AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    /// -1 in the first `n` of eight lanes.
    #[inline(always)]
    unsafe fn lanes_below(n: usize) -> __m256i {
        const MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        debug_assert!(n <= 8);
        // SAFETY: 8 - n .. 16 - n lies within the table.
        unsafe { _mm256_loadu_si256(MASK.as_ptr().add(8 - n).cast()) }
    }

    impl Simd for Avx2 {
        const LANES: usize = 8;
        const REGISTERS: usize = 16;
        type F = __m256;

        call!(Avx2, "avx2,fma,f16c");
        ops! {
            fn splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
            fn load(p: *const f32) -> __m256 { _mm256_loadu_ps(p) }
            fn store(p: *mut f32, x: __m256) { _mm256_storeu_ps(p, x) }
            fn load_partial(p: *const f32, n: usize) -> __m256 { _mm256_maskload_ps(p, lanes_below(n)) }
            fn store_partial(p: *mut f32, n: usize, x: __m256) { _mm256_maskstore_ps(p, lanes_below(n), x) }
            fn load_bf16(p: *const u16) -> __m256 {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
            }
            fn load_f16(p: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
            fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
            fn sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
            fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
            fn div(a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
            fn fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
            fn dot_bf16(a: __m256, b: __m256, sum: __m256) -> __m256 {
                let upper = |x| _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(-0x1_0000)));
                let lower = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(x)));
                _mm256_fmadd_ps(lower(a), lower(b), _mm256_fmadd_ps(upper(a), upper(b), sum))
            }
            fn mul_error(a: __m256, b: __m256, product: __m256) -> __m256 { _mm256_fmsub_ps(a, b, product) }
            fn max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
            fn min(a: __m256, b: __m256) -> __m256 { _mm256_min_ps(a, b) }
            fn abs(a: __m256) -> __m256 { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
            fn copysign(a: __m256, b: __m256) -> __m256 {
                let sign = _mm256_set1_ps(-0.0);
                _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
            }
            fn round(a: __m256) -> __m256 { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
            fn scale_pow2(a: __m256, n: __m256) -> __m256 {
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
            fn select_lt(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
                _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
            }
            fn load_columns(p: *const f32, stride: usize) -> [__m256; 4] {
                let mut rows = [_mm256_setzero_ps(); 4];
                for (i, row) in rows.iter_mut().enumerate() {
                    let p = p.add(i * stride);
                    *row = _mm256_castps128_ps256(_mm_loadu_ps(p));
                    *row = _mm256_insertf128_ps::<1>(*row, _mm_loadu_ps(p.add(4 * stride)));
                }
                // within each 128-bit half, a 4x4 transposition
                let (a, b) = (_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpacklo_ps(rows[2], rows[3]));
                let (c, d) = (_mm256_unpackhi_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[2], rows[3]));
                [
                    _mm256_shuffle_ps::<0b01_00_01_00>(a, b),
                    _mm256_shuffle_ps::<0b11_10_11_10>(a, b),
                    _mm256_shuffle_ps::<0b01_00_01_00>(c, d),
                    _mm256_shuffle_ps::<0b11_10_11_10>(c, d),
                ]
            }
            fn swap_pairs(a: __m256) -> __m256 { _mm256_permute_ps::<0b10_11_00_01>(a) }
            fn reduce_add(a: __m256) -> f32 {
                let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
            }
            fn reduce_max(a: __m256) -> f32 {
                let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
            }
            fn prefetch(p: *const f32) { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    /// 512-bit: AVX-512 F, BW, VL and DQ.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    /// The same with AVX-512 BF16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Bf16;

    #[inline(always)]
    unsafe fn dot_by_halves(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: the contract of the trait.
        unsafe {
            let upper = |x| _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(-0x1_0000)));
            let lower = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(x)));
            _mm512_fmadd_ps(lower(a), lower(b), _mm512_fmadd_ps(upper(a), upper(b), sum))
        }
    }

    #[inline(always)]
    unsafe fn dot_at_once(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: the contract of the trait; both types are 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }

    macro_rules! avx512 {
        ($set:ident, $features:literal, $dot:ident) => {
            impl Simd for $set {
                const LANES: usize = 16;
                const REGISTERS: usize = 32;
                type F = __m512;

                call!($set, $features);
                ops! {
                    fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
                    fn load(p: *const f32) -> __m512 { _mm512_loadu_ps(p) }
                    fn store(p: *mut f32, x: __m512) { _mm512_storeu_ps(p, x) }
                    fn load_partial(p: *const f32, n: usize) -> __m512 { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, p) }
                    fn store_partial(p: *mut f32, n: usize, x: __m512) { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, x) }
                    fn load_bf16(p: *const u16) -> __m512 {
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
                    }
                    fn load_f16(p: *const u16) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
                    fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
                    fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
                    fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
                    fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
                    fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
                    fn dot_bf16(a: __m512, b: __m512, sum: __m512) -> __m512 { $dot(a, b, sum) }
                    fn mul_error(a: __m512, b: __m512, product: __m512) -> __m512 { _mm512_fmsub_ps(a, b, product) }
                    fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
                    fn min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
                    fn abs(a: __m512) -> __m512 { _mm512_abs_ps(a) }
                    fn copysign(a: __m512, b: __m512) -> __m512 {
                        let sign = _mm512_set1_ps(-0.0);
                        _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b))
                    }
                    fn round(a: __m512) -> __m512 { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
                    fn scale_pow2(a: __m512, n: __m512) -> __m512 {
                        let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                        _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
                    }
                    fn ldexp(a: __m512, n: __m512) -> __m512 { _mm512_scalef_ps(a, n) }
                    fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
                        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x)
                    }
                    fn load_columns(p: *const f32, stride: usize) -> [__m512; 4] {
                        let mut rows = [_mm512_setzero_ps(); 4];
                        for (i, row) in rows.iter_mut().enumerate() {
                            let p = p.add(i * stride);
                            *row = _mm512_castps128_ps512(_mm_loadu_ps(p));
                            *row = _mm512_insertf32x4::<1>(*row, _mm_loadu_ps(p.add(4 * stride)));
                            *row = _mm512_insertf32x4::<2>(*row, _mm_loadu_ps(p.add(8 * stride)));
                            *row = _mm512_insertf32x4::<3>(*row, _mm_loadu_ps(p.add(12 * stride)));
                        }
                        let (a, b) = (_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpacklo_ps(rows[2], rows[3]));
                        let (c, d) = (_mm512_unpackhi_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[2], rows[3]));
                        [
                            _mm512_shuffle_ps::<0b01_00_01_00>(a, b),
                            _mm512_shuffle_ps::<0b11_10_11_10>(a, b),
                            _mm512_shuffle_ps::<0b01_00_01_00>(c, d),
                            _mm512_shuffle_ps::<0b11_10_11_10>(c, d),
                        ]
                    }
                    fn swap_pairs(a: __m512) -> __m512 { _mm512_permute_ps::<0b10_11_00_01>(a) }
                    fn reduce_add(a: __m512) -> f32 { _mm512_reduce_add_ps(a) }
                    fn reduce_max(a: __m512) -> f32 { _mm512_reduce_max_ps(a) }
                    fn prefetch(p: *const f32) { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
                }
            }
        };
    }

    avx512!(Avx512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", dot_by_halves);
    avx512!(Avx512Bf16, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c", dot_at_once);
}

#[cfg(target_arch = "aarch64")]
pub(crate) use arm::{Neon, NeonBf16};

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{Kernel, Simd};

    /// 128-bit.
    #[derive(Clone, Copy)]
    pub(crate) struct Neon;

    /// The same with BF16.
    #[derive(Clone, Copy)]
    pub(crate) struct NeonBf16;

    #[inline(always)]
    unsafe fn dot_by_halves(a: float32x4_t, b: float32x4_t, sum: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of the trait.
        unsafe {
            let bits = |x| vreinterpretq_u32_f32(x);
            let upper = |x| vreinterpretq_f32_u32(vandq_u32(bits(x), vdupq_n_u32(0xffff_0000)));
            let lower = |x| vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits(x)));
            vfmaq_f32(vfmaq_f32(sum, upper(a), upper(b)), lower(a), lower(b))
        }
    }

    /// Its intrinsic is not stable yet; inline assembly is.
    #[inline(always)]
    unsafe fn dot_at_once(a: float32x4_t, b: float32x4_t, mut sum: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of the trait; arithmetic on registers.
        unsafe {
            std::arch::asm!(
                "bfdot {sum:v}.4s, {a:v}.8h, {b:v}.8h",
                sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    macro_rules! neon {
        ($set:ident, $dot:ident $(, $features:literal)?) => {
            impl Simd for $set {
                const LANES: usize = 4;
                const REGISTERS: usize = 32;
                type F = float32x4_t;

                call!($set $(, $features)?);
                ops! {
                    fn splat(x: f32) -> float32x4_t { vdupq_n_f32(x) }
                    fn load(p: *const f32) -> float32x4_t { vld1q_f32(p) }
                    fn store(p: *mut f32, x: float32x4_t) { vst1q_f32(p, x) }
                    fn load_partial(p: *const f32, n: usize) -> float32x4_t {
                        let mut lanes = [0.0f32; 4];
                        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
                        vld1q_f32(lanes.as_ptr())
                    }
                    fn store_partial(p: *mut f32, n: usize, x: float32x4_t) {
                        let mut lanes = [0.0f32; 4];
                        vst1q_f32(lanes.as_mut_ptr(), x);
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n)
                    }
                    fn load_bf16(p: *const u16) -> float32x4_t { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p))) }
                    fn load_f16(p: *const u16) -> float32x4_t {
                        let lanes = [0, 1, 2, 3].map(|i| half::f16::from_bits(*p.add(i)).to_f32());
                        vld1q_f32(lanes.as_ptr())
                    }
                    fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
                    fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t { vsubq_f32(a, b) }
                    fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t { vmulq_f32(a, b) }
                    fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t { vdivq_f32(a, b) }
                    fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t { vfmaq_f32(c, a, b) }
                    fn dot_bf16(a: float32x4_t, b: float32x4_t, sum: float32x4_t) -> float32x4_t { $dot(a, b, sum) }
                    fn mul_error(a: float32x4_t, b: float32x4_t, product: float32x4_t) -> float32x4_t {
                        vfmaq_f32(vnegq_f32(product), a, b)
                    }
                    fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcgtq_f32(a, b), a, b) }
                    fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vcltq_f32(a, b), a, b) }
                    fn abs(a: float32x4_t) -> float32x4_t { vabsq_f32(a) }
                    fn copysign(a: float32x4_t, b: float32x4_t) -> float32x4_t { vbslq_f32(vdupq_n_u32(0x8000_0000), b, a) }
                    fn round(a: float32x4_t) -> float32x4_t { vrndnq_f32(a) }
                    fn scale_pow2(a: float32x4_t, n: float32x4_t) -> float32x4_t {
                        let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
                        vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
                    }
                    fn select_lt(a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t { vbslq_f32(vcltq_f32(a, b), x, y) }
                    fn load_columns(p: *const f32, stride: usize) -> [float32x4_t; 4] {
                        let rows = [0, 1, 2, 3].map(|i| vld1q_f32(p.add(i * stride)));
                        let (a, b) = (vtrn1q_f32(rows[0], rows[1]), vtrn2q_f32(rows[0], rows[1]));
                        let (c, d) = (vtrn1q_f32(rows[2], rows[3]), vtrn2q_f32(rows[2], rows[3]));
                        let low = |x, y| vcombine_f32(vget_low_f32(x), vget_low_f32(y));
                        let high = |x, y| vcombine_f32(vget_high_f32(x), vget_high_f32(y));
                        [low(a, c), low(b, d), high(a, c), high(b, d)]
                    }
                    fn swap_pairs(a: float32x4_t) -> float32x4_t { vrev64q_f32(a) }
                    fn reduce_add(a: float32x4_t) -> f32 { vaddvq_f32(a) }
                    fn reduce_max(a: float32x4_t) -> f32 { vmaxvq_f32(a) }
                    fn prefetch(_p: *const f32) {}
                }
            }
        };
    }

    neon!(Neon, dot_by_halves);
    neon!(NeonBf16, dot_at_once, "neon,bf16");
}

/// Makes `fn name(isa, args…)` that runs `kernel::<S>(args…)` compiled for that instruction set; `= kernel<_, T>` fills
/// in the type parameters after `S`.
///
/// The generic kernel is `unsafe` only because of the instruction set (and says so); what else it needs of its
/// arguments is checked by the caller, whence the entry is `unsafe` too. A set that the CPU lacks must not be passed:
/// take it from [`Isa::current`](super::isa::Isa::current) or `Isa::available`.
macro_rules! simd_entry {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:ident $(<_, $($extra:ty),*>)?) => {
        $(#[$meta])*
        $vis unsafe fn $name(isa: $crate::kernels::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            use $crate::kernels::{isa::Isa, simd};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the CPU has the set, by the contract of the entry.
                unsafe { $kernel::<simd::Avx512 $($(, $extra)*)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $kernel::<simd::Avx2 $($(, $extra)*)?>($($arg),*) }
            }
            debug_assert!(isa.is_available());
            // SAFETY: the caller passes a set that the CPU has.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => $kernel::<simd::Neon $($(, $extra)*)?>($($arg),*),
                    _ => $kernel::<simd::Scalar $($(, $extra)*)?>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use simd_entry;
