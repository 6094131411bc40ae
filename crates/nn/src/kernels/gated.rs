//! The gated product of a feed-forward half: y = act(gate) · up, for rows that hold gate and up side by side.
//! It reads both once and writes y once.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::math;
use super::simd::{Simd, simd_entry};
use crate::activation::Activation;

/// The definition, in f64.
#[cfg(test)]
fn gated_scalar(act: Activation, gate: f32, up: f32) -> f64 {
    super::activation::activate_scalar(act, gate) * f64::from(up)
}

/// # Safety
/// The CPU has `S`; the three have the same length.
#[inline(always)]
unsafe fn gated_kernel<S: Simd>(act: Activation, gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) {
    let (gate, up, n, y) = (gate.as_ptr(), up.as_ptr(), y.len(), y.as_mut_ptr().cast::<f32>());
    let mut i = 0;
    // SAFETY: i + LANES <= n in the loop; then n - i lanes are left.
    unsafe {
        while i + S::LANES <= n {
            let act = math::activate::<S>(act, S::load(gate.add(i)));
            S::store(y.add(i), S::mul(act, S::load(up.add(i))));
            i += S::LANES;
        }
        if i < n {
            let act = math::activate::<S>(act, S::load_partial(gate.add(i), n - i));
            S::store_partial(y.add(i), n - i, S::mul(act, S::load_partial(up.add(i), n - i)));
        }
    }
}

simd_entry! { fn gated_on(act: Activation, gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) = gated_kernel }

/// y = act(gate) · up, all of `y` written.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn gated(act: Activation, gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    // SAFETY: the current set is one that the CPU has; lengths just checked.
    unsafe { gated_on(Isa::current(), act, gate, up, y) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_against_the_definition() {
        use Activation::*;
        let special = [0.0, -0.0, f32::NAN, f32::INFINITY, 1e30, -1e30, 1e-40, 2.0];
        for isa in Isa::available() {
            for act in [Identity, Gelu, GeluTanh, QuickGelu, Relu, Silu, Sigmoid] {
                for n in (0..=67).chain([1000]) {
                    let x: Vec<f32> = (0..2 * n + 1)
                        .map(|i| if n < 67 || i % 3 > 0 { (i as f32 * 0.7391).sin() * 9.0 } else { special[i / 3 % 8] })
                        .collect();
                    let (gate, up) = (&x[1..][..n], &x[1 + n..][..n]);
                    let mut y = vec![MaybeUninit::new(777.0f32); n + 1];
                    // SAFETY: an available set, equal lengths.
                    unsafe { gated_on(isa, act, gate, up, &mut y[..n]) };
                    // SAFETY: initialised above.
                    let y: Vec<f32> = y.iter().map(|y| unsafe { y.assume_init() }).collect();
                    assert_eq!(y[n], 777.0, "written past the end");
                    for ((&gate, &up), &y) in gate.iter().zip(up).zip(&y) {
                        let exact = gated_scalar(act, gate, up);
                        // as for the activation alone, and a rounding more; past f32 it is infinite
                        let allowed = 1.1e-6 * exact.abs() * (1.0 + f64::from(gate).abs()) + 1e-36;
                        let close = (f64::from(y) - exact).abs() <= allowed || f64::from(y) == f64::from(exact as f32);
                        // a gate that is 0 in f32 only makes 0 or NaN of an infinite `up`
                        let edge = !up.is_finite() && activated_is_tiny(act, gate);
                        assert!(
                            close || edge || (y.is_nan() && exact.is_nan()),
                            "{act:?}({gate:e}) {up:e} = {y:e}, not {exact:e}, on {isa}"
                        );
                    }
                }
            }
        }
    }

    fn activated_is_tiny(act: Activation, gate: f32) -> bool {
        super::super::activation::activate_scalar(act, gate).abs() < 1e-37
    }
}
