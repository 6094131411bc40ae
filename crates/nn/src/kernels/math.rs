//! exp, tanh, logistic, the normal distribution function (which is erf: Φ(x) = (1 + erf(x/√2)) / 2) and the activations
//! made of them, on one vector. They are branch-free, meant to be inlined into a kernel's loop.
//!
//! Largest errors seen at 116 million arguments over all of f32, in units in the last place of the true value: exp
//! 1.05, logistic 2.4, tanh 2.5, Φ 6 (7 without FMA), also in the tail, where 1 + erf in f32 would be 0 from x = -5.5
//! on, and in units of 2^-149 where the value is subnormal. The tests below hold them.
//!
//! Coefficients are minimax fits by iteratively reweighted least squares in f64, rounded to f32 one after the other
//! with the rest fitted again.

#![expect(unsafe_code, reason = "generic over an instruction set; the contract is that of `Simd`")]

use super::simd::Simd;
use crate::activation::Activation;

/// x = n ln 2 + r with integral n and |r| <= ln 2 / 2; `x` in [-104, 104].
#[inline(always)]
unsafe fn split<S: Simd>(x: S::F) -> (S::F, S::F) {
    // ln 2 in two parts, the first with so few bits that its product with n is exact
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // SAFETY: as for this function.
    unsafe {
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-HIGH), x);
        (n, S::fma(n, S::splat(-LOW), r))
    }
}

/// e^r - 1 for |r| <= ln 2 / 2, with small relative error also near 0.
#[inline(always)]
unsafe fn exp_m1_reduced<S: Simd>(r: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let p = poly::<S>(r, [0.499_999_97, 0.166_665_42, 0.041_667_204, 0.008_366_647, 0.001_388_249_8]);
        S::fma(S::mul(r, r), p, r)
    }
}

/// c[0] + c[1] x + c[2] x² + ...
#[inline(always)]
unsafe fn poly<S: Simd>(x: S::F, c: [f32; 5]) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let mut y = S::splat(c[4]);
        y = S::fma(y, x, S::splat(c[3]));
        y = S::fma(y, x, S::splat(c[2]));
        y = S::fma(y, x, S::splat(c[1]));
        S::fma(y, x, S::splat(c[0]))
    }
}

/// e^x.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        // beyond these the result is 0 or infinite; a NaN stays one
        let x = S::min(S::splat(89.0), S::max(S::splat(-104.0), x));
        let (n, r) = split::<S>(x);
        S::ldexp(S::add(exp_m1_reduced::<S>(r), S::splat(1.0)), n)
    }
}

/// e^x - 1 for x below 0, with small relative error also near 0.
#[inline(always)]
unsafe fn exp_m1<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let one = S::splat(1.0);
        // e^-40 is nothing beside 1; above 0 only a finite value is wanted
        let (n, r) = split::<S>(S::min(one, S::max(S::splat(-40.0), x)));
        let scale = S::scale_pow2(one, n);
        S::fma(scale, exp_m1_reduced::<S>(r), S::sub(scale, one))
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let one = S::splat(1.0);
        // of the two forms the one that does not overflow
        let e = exp::<S>(S::sub(S::splat(0.0), S::abs(x)));
        S::div(S::select_lt(x, S::splat(0.0), e, one), S::add(one, e))
    }
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let one = S::splat(1.0);
        // with m = e^(-2|x|) - 1: tanh |x| = -m / (2 + m), where m keeps its digits near 0
        let (n, r) = split::<S>(S::max(S::splat(-40.0), S::mul(S::abs(x), S::splat(-2.0))));
        let scale = S::scale_pow2(one, n);
        let m = S::fma(scale, exp_m1_reduced::<S>(r), S::sub(scale, one));
        S::copysign(S::div(m, S::add(m, S::splat(2.0))), x)
    }
}

/// Φ(x), the normal distribution function: (1 + erf(x / √2)) / 2.
#[inline(always)]
pub(crate) unsafe fn normal_cdf<S: Simd>(x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        let one = S::splat(1.0);
        // Φ(-14.6) rounds to 0
        let a = S::min(S::splat(14.6), S::abs(x));
        // e^(-a²/2), with the part of a² that the rounding loses: it would be 1e-5 of the result in the tail
        let square = S::mul(a, a);
        let lost = S::mul_error(a, a, square);
        let (n, r) = split::<S>(S::max(S::splat(-104.0), S::mul(square, S::splat(-0.5))));
        let r = S::fma(lost, S::splat(-0.5), r);
        let e = S::add(exp_m1_reduced::<S>(r), one);
        // Φ(-a) e^(a²/2) as a quotient of polynomials with positive coefficients, hence well conditioned
        let p = poly::<S>(a, [0.5, 0.437_796, 0.182_829_08, 0.040_486_064, 0.004_091_502_6]);
        let q = poly::<S>(a, [1.673_476_8, 1.200_895_7, 0.468_39, 0.101_489_95, 0.010_255_758]);
        let tail = S::ldexp(S::div(S::mul(e, p), S::fma(q, a, one)), n);
        S::select_lt(x, S::splat(0.0), tail, S::sub(one, tail))
    }
}

/// √(8/π), the factor of the tanh form of GELU written with the logistic function.
const SQRT_8_OVER_PI: f32 = 1.595_769;

/// `act` of every lane. At -∞ the self-gated ones (GELU, SiLU) give NaN, as PyTorch's do.
#[inline(always)]
pub(crate) unsafe fn activate<S: Simd>(act: Activation, x: S::F) -> S::F {
    // SAFETY: as for this function.
    unsafe {
        match act {
            Activation::Identity => x,
            Activation::Gelu => S::mul(x, normal_cdf::<S>(x)),
            // (1 + tanh u) / 2 = sigmoid(2u), without the cancellation
            Activation::GeluTanh => {
                let inner = S::fma(S::mul(x, x), S::splat(0.044_715 * SQRT_8_OVER_PI), S::splat(SQRT_8_OVER_PI));
                S::mul(x, sigmoid::<S>(S::mul(x, inner)))
            }
            Activation::QuickGelu => S::mul(x, sigmoid::<S>(S::mul(x, S::splat(1.702)))),
            Activation::Relu => S::max(S::splat(0.0), x),
            Activation::Silu => S::mul(x, sigmoid::<S>(x)),
            Activation::Tanh => tanh::<S>(x),
            Activation::Sigmoid => sigmoid::<S>(x),
            Activation::Elu => S::select_lt(x, S::splat(0.0), exp_m1::<S>(x), x),
            Activation::LeakyRelu(slope) => S::select_lt(x, S::splat(0.0), S::mul(x, S::splat(slope.get())), x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::simd::{Simd, simd_entry};
    use super::*;

    macro_rules! on_slices {
        ($($kernel:ident, $entry:ident = $function:ident;)*) => {$(
            #[inline(always)]
            unsafe fn $kernel<S: Simd>(x: &mut [f32]) {
                for x in x.chunks_mut(S::LANES) {
                    // SAFETY: within the chunk.
                    unsafe {
                        let y = $function::<S>(S::load_partial(x.as_ptr(), x.len()));
                        S::store_partial(x.as_mut_ptr(), x.len(), y);
                    }
                }
            }
            simd_entry! { fn $entry(x: &mut [f32]) = $kernel }
        )*};
    }
    on_slices! {
        exp_kernel, exp_all = exp;
        sigmoid_kernel, sigmoid_all = sigmoid;
        tanh_kernel, tanh_all = tanh;
        cdf_kernel, cdf_all = normal_cdf;
    }

    /// Distance from `exact` in units in the last place of `exact`.
    fn ulps(got: f32, exact: f64) -> f64 {
        if got.is_nan() || exact.is_nan() {
            return if got.is_nan() == exact.is_nan() { 0.0 } else { f64::INFINITY };
        }
        // what rounds to infinity
        if exact.abs() >= f64::from(f32::MAX) * (1.0 + f64::from(f32::EPSILON) / 4.0) {
            return if f64::from(got) == exact.signum() * f64::INFINITY { 0.0 } else { f64::INFINITY };
        }
        let exponent = exact.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor();
        (f64::from(got) - exact).abs() / (exponent - 23.0).exp2()
    }

    type Entry = unsafe fn(Isa, &mut [f32]);

    /// A sweep over the bit patterns of f32, both signs, all exponents.
    fn sweep() -> Vec<f32> {
        let bits = (0..=u32::MAX).step_by(6007).map(f32::from_bits);
        let middle = (-150_000..150_000).map(|i| i as f32 * 1e-4);
        bits.chain(middle).chain([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY]).collect()
    }

    fn check(name: &str, entry: Entry, exact: fn(f64) -> f64, allowed: f64) {
        let xs = sweep();
        for isa in Isa::available() {
            let mut ys = xs.clone();
            // SAFETY: an available set.
            unsafe { entry(isa, &mut ys) };
            let worst = xs.iter().zip(&ys).map(|(&x, &y)| (ulps(y, exact(f64::from(x))), x, y));
            let (error, x, y) = worst.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            assert!(error <= allowed, "{name}({x:e}) = {y:e} is {error:.2} ULP off on {isa}");
        }
    }

    #[test]
    fn errors_in_ulp_over_all_of_f32() {
        let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
        check("exp", exp_all, f64::exp, 1.1);
        check("sigmoid", sigmoid_all, sigmoid, 2.5);
        check("tanh", tanh_all, f64::tanh, 2.6);
        check("normal_cdf", cdf_all, |x| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2), 7.5);
    }

    #[test]
    fn signs_of_zero_and_limits() {
        for isa in Isa::available() {
            let run = |entry: Entry, x: f32| {
                let mut x = [x];
                // SAFETY: an available set.
                unsafe { entry(isa, &mut x) };
                x[0]
            };
            assert!(run(tanh_all, -0.0).is_sign_negative() && run(tanh_all, 0.0).is_sign_positive(), "{isa}");
            assert_eq!(run(tanh_all, 1e-45), 1e-45, "{isa}");
            assert_eq!(run(exp_all, 0.0), 1.0, "{isa}");
            assert_eq!(run(exp_all, 88.8), f32::INFINITY, "{isa}");
            assert_eq!(run(exp_all, -103.0), 1e-45, "{isa}");
            assert_eq!(run(cdf_all, 0.0), 0.5, "{isa}");
            assert_eq!(run(cdf_all, f32::NEG_INFINITY), 0.0, "{isa}");
        }
    }
}
