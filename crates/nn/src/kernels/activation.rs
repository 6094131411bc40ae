//! An activation over a slice: one read and one write of each element.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::math;
use super::simd::{Simd, simd_entry};
use crate::activation::Activation;

/// Elements that one thread takes at a time: large against the cost of a task, small against a cache.
pub(crate) const CHUNK: usize = 8192;

/// The definition of each, in f64.
#[cfg(test)]
pub(crate) fn activate_scalar(act: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match act {
        Activation::Identity => x,
        Activation::Gelu => x * 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2),
        Activation::GeluTanh => x * sigmoid((8.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Relu => {
            if x > 0.0 || x.is_nan() {
                x
            } else {
                0.0
            }
        }
        Activation::Silu => x * sigmoid(x),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => sigmoid(x),
        Activation::Elu => {
            if x < 0.0 {
                x.exp_m1()
            } else {
                x
            }
        }
        Activation::LeakyRelu(slope) => {
            if x < 0.0 {
                x * f64::from(slope.get())
            } else {
                x
            }
        }
    }
}

/// # Safety
/// The CPU has `S`; `x.len() == y.len()`.
#[inline(always)]
unsafe fn activate_kernel<S: Simd>(act: Activation, x: &[f32], y: &mut [MaybeUninit<f32>]) {
    let (x, y, n) = (x.as_ptr(), y.as_mut_ptr().cast::<f32>(), x.len());
    let mut i = 0;
    // SAFETY: i + LANES <= n in the loop; then n - i lanes are left.
    unsafe {
        while i + S::LANES <= n {
            S::store(y.add(i), math::activate::<S>(act, S::load(x.add(i))));
            i += S::LANES;
        }
        if i < n {
            S::store_partial(y.add(i), n - i, math::activate::<S>(act, S::load_partial(x.add(i), n - i)));
        }
    }
}

simd_entry! { fn activate_on(act: Activation, x: &[f32], y: &mut [MaybeUninit<f32>]) = activate_kernel }

/// y = act(x), all of `y` written.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn activate(act: Activation, x: &[f32], y: &mut [MaybeUninit<f32>]) {
    assert_eq!(x.len(), y.len());
    // SAFETY: the current set is one that the CPU has; lengths just checked.
    unsafe { activate_on(Isa::current(), act, x, y) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::Slope;

    #[test]
    fn every_path_against_the_definition() {
        use Activation::*;
        let special = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-40, 1e20, -1e20];
        for isa in Isa::available() {
            for act in [Identity, Gelu, GeluTanh, QuickGelu, Relu, Silu, Tanh, Sigmoid, Elu, LeakyRelu(Slope::new(0.1))]
            {
                for n in (0..=67).chain([1000]) {
                    let x: Vec<f32> = (0..n + 3)
                        .map(|i| if n < 67 || i % 3 > 0 { (i as f32 * 0.7391).sin() * 12.0 } else { special[i % 10] })
                        .collect();
                    let x = &x[3.min(n)..][..n];
                    let mut y = vec![MaybeUninit::new(777.0f32); n + 1];
                    // SAFETY: an available set, equal lengths.
                    unsafe { activate_on(isa, act, x, &mut y[..n]) };
                    // SAFETY: initialised above.
                    let y: Vec<f32> = y.iter().map(|y| unsafe { y.assume_init() }).collect();
                    assert_eq!(y[n], 777.0, "written past the end");
                    for (&x, &y) in x.iter().zip(&y) {
                        let exact = activate_scalar(act, x);
                        // the argument of the gate is rounded, and a gate e^-u has the relative error of u's absolute
                        // one
                        let close =
                            (f64::from(y) - exact).abs() <= 1e-6 * exact.abs() * (1.0 + f64::from(x).abs()) + 1e-38;
                        assert!(
                            close || f64::from(y) == exact || (y.is_nan() && exact.is_nan()),
                            "{act:?}({x:e}) = {y:e}, not {exact:e}, on {isa}"
                        );
                    }
                }
            }
        }
    }
}
