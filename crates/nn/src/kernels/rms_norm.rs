//! RMSNorm over rows: y = w x / sqrt(mean(x²) + eps) (arXiv:1910.07467).
//! Per row it reads x from memory once and once more from cache, and writes y once; the sum as in LayerNorm.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::layer_norm::sum;
use super::simd::{Simd, simd_entry};

/// The definition, with the sum in f64.
#[cfg(test)]
fn rms_norm_scalar(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let n = w.len();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
        for i in 0..n {
            y[i] = (f64::from(x[i]) / (mean + f64::from(eps)).sqrt()) as f32 * w[i];
        }
    }
}

/// # Safety
/// The CPU has `S`; `x` and `y` are as long as each other and a multiple of `w`.
#[inline(always)]
unsafe fn rms_norm_kernel<S: Simd>(x: &[f32], w: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) {
    let n = w.len();
    let w = w.as_ptr();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let (x, y) = (x.as_ptr(), y.as_mut_ptr().cast::<f32>());
        // SAFETY: all three rows have n elements.
        unsafe {
            let scale = S::splat(1.0 / (sum::<S, true>(x, n, 0.0) / n as f32 + eps).sqrt());
            let mut i = 0;
            while i + S::LANES <= n {
                S::store(y.add(i), S::mul(S::mul(S::load(x.add(i)), scale), S::load(w.add(i))));
                i += S::LANES;
            }
            if i < n {
                let lanes = n - i;
                let normed = S::mul(S::load_partial(x.add(i), lanes), scale);
                S::store_partial(y.add(i), lanes, S::mul(normed, S::load_partial(w.add(i), lanes)));
            }
        }
    }
}

simd_entry! { fn rms_norm_on(x: &[f32], w: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) = rms_norm_kernel }

/// Normalises every row of `w.len()` elements; all of `y` is written.
///
/// # Panics
/// When `w` is empty, or `x` is not whole rows, as many as `y` has.
pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) {
    assert!(!w.is_empty() && x.len().is_multiple_of(w.len()) && x.len() == y.len());
    // SAFETY: the current set is one that the CPU has; lengths just checked.
    unsafe { rms_norm_on(Isa::current(), x, w, eps, y) }
}

#[cfg(test)]
mod tests {
    use super::super::layer_norm::tests::{assert_rows_close, guarded, rows};
    use super::*;

    #[test]
    fn every_path_against_the_definition() {
        for isa in Isa::available() {
            for n in (1..=67).chain([197, 2048, 2049]) {
                let x = [vec![0.0], rows(n)].concat();
                let w: Vec<f32> = (0..=n).map(|i| 1.0 + (i as f32).cos()).collect();
                let (x, w) = (&x[1..], &w[1..]);
                let mut want = vec![0.0; x.len()];
                rms_norm_scalar(x, w, 1e-6, &mut want);
                // SAFETY: an available set, lengths as asked.
                let got = guarded(x.len(), |y| unsafe { rms_norm_on(isa, x, w, 1e-6, y) });
                // a handful of roundings
                assert_rows_close(n, &got, &want, 2e-6, &isa.to_string());
            }
        }
    }
}
