//! The element-wise half of an LSTM step: c = σ(f) · c + σ(i) · tanh(g), h = σ(o) · tanh(c)
//! (doi:10.1162/neco.1997.9.8.1735, in the order of `torch.nn.LSTM`: i, f, g, o).
//! It reads the four gates and the cell state once and writes cell state and output once.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use super::isa::Isa;
use super::math::{sigmoid, tanh};
use super::simd::{Simd, simd_entry};

/// The definition of one element, in f64: (c, h).
#[cfg(test)]
pub(crate) fn step_scalar([i, f, g, o]: [f64; 4], c: f64) -> (f64, f64) {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let c = sigmoid(f) * c + sigmoid(i) * g.tanh();
    (c, sigmoid(o) * c.tanh())
}

/// # Safety
/// The CPU has `S`; `gates` is four times as long as `c` and `h`.
#[inline(always)]
unsafe fn step_kernel<S: Simd>(gates: &[f32], c: &mut [f32], h: &mut [f32]) {
    let n = c.len();
    let (gates, c, h) = (gates.as_ptr(), c.as_mut_ptr(), h.as_mut_ptr());
    let mut j = 0;
    while j < n {
        let lanes = (n - j).min(S::LANES);
        // SAFETY: j + lanes <= n, so each read and write lies within its quarter of the gates, c or h.
        unsafe {
            let load = |p: *const f32| if lanes == S::LANES { S::load(p) } else { S::load_partial(p, lanes) };
            let gate = |i: usize| load(gates.add(i * n + j));
            let kept = S::mul(sigmoid::<S>(gate(1)), load(c.add(j)));
            let cell = S::fma(sigmoid::<S>(gate(0)), tanh::<S>(gate(2)), kept);
            let out = S::mul(sigmoid::<S>(gate(3)), tanh::<S>(cell));
            if lanes == S::LANES {
                S::store(c.add(j), cell);
                S::store(h.add(j), out);
            } else {
                S::store_partial(c.add(j), lanes, cell);
                S::store_partial(h.add(j), lanes, out);
            }
        }
        j += lanes;
    }
}

simd_entry! { fn step_on(gates: &[f32], c: &mut [f32], h: &mut [f32]) = step_kernel }

/// One step of one sequence: `gates` are i, f, g and o, one after the other.
///
/// # Panics
/// When `h` is not as long as `c`, or `gates` not four times so.
pub(crate) fn step(gates: &[f32], c: &mut [f32], h: &mut [f32]) {
    assert!(c.len() == h.len() && gates.len() == 4 * c.len());
    // SAFETY: the current set is one that the CPU has; lengths just checked.
    unsafe { step_on(Isa::current(), gates, c, h) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_against_the_definition() {
        let special = [0.0, -0.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40];
        for isa in Isa::available() {
            for n in (0..=67).chain([1000]) {
                let x = |i: usize, scale: f32| {
                    if n == 1000 && i.is_multiple_of(3) {
                        special[i / 3 % 8]
                    } else {
                        (i as f32 * 0.7391).sin() * scale
                    }
                };
                let gates: Vec<f32> = (0..4 * n + 1).map(|i| x(i, 6.0)).collect();
                let before: Vec<f32> = (0..n + 1).map(|i| (i as f32 * 0.37).cos() * 3.0).collect();
                let (mut c, mut h) = (before.clone(), vec![777.0; n + 1]);
                // SAFETY: an available set, lengths that fit.
                unsafe { step_on(isa, &gates[1..], &mut c[..n], &mut h[1..]) };
                assert_eq!((c[n], h[0]), (before[n], 777.0), "written outside");
                for j in 0..n {
                    let own = [0, 1, 2, 3].map(|i| f64::from(gates[1 + i * n + j]));
                    let (want_c, want_h) = step_scalar(own, f64::from(before[j]));
                    for (got, want) in [(c[j], want_c), (h[j + 1], want_h)] {
                        // gates to 3 ULP, on values up to 4
                        let close = (f64::from(got) - want).abs() < 2e-6;
                        assert!(close || (got.is_nan() && want.is_nan()), "{n} {j}: {got:e}, not {want:e}, on {isa}");
                    }
                }
            }
        }
    }
}
