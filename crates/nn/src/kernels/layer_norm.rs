//! LayerNorm over rows: y = w (x - mean) / sqrt(var + eps) + b (arXiv:1607.06450).
//! Per row it reads x from memory once and twice more from cache, and writes y once. The variance is that of the
//! centred row, so a large mean costs no digits; each sum runs in four vectors, which are added at the end, so that its
//! relative error is about n / (4 LANES) + 6 roundings, under 20 at n = 1024.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::math;
use super::simd::{MAX_LANES, Simd, simd_entry};
use crate::activation::Activation;

/// The definition, with sums in f64.
#[cfg(test)]
fn layer_norm_scalar(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
    let n = w.len();
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
        let var = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n as f64;
        for i in 0..n {
            y[i] = ((f64::from(x[i]) - mean) / (var + f64::from(eps)).sqrt()) as f32 * w[i] + b[i];
        }
    }
}

/// Σ (x - centre) over `n` elements, or Σ (x - centre)² where `SQUARED`.
///
/// # Safety
/// The CPU has `S`; `n` elements lie at `x`.
#[inline(always)]
pub(super) unsafe fn sum<S: Simd, const SQUARED: bool>(x: *const f32, n: usize, centre: f32) -> f32 {
    // SAFETY: all reads are below n.
    unsafe {
        let c = S::splat(centre);
        let mut sums = [S::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for (k, sum) in sums.iter_mut().enumerate() {
                let d = S::sub(S::load(x.add(i + k * S::LANES)), c);
                *sum = if SQUARED { S::fma(d, d, *sum) } else { S::add(d, *sum) };
            }
            i += 4 * S::LANES;
        }
        while i < n {
            let lanes = (n - i).min(S::LANES);
            let mut centres = [0.0; MAX_LANES];
            S::store(centres.as_mut_ptr(), c);
            // lanes that are not in use are 0 - 0
            let d = S::sub(S::load_partial(x.add(i), lanes), S::load_partial(centres.as_ptr(), lanes));
            sums[0] = if SQUARED { S::fma(d, d, sums[0]) } else { S::add(d, sums[0]) };
            i += lanes;
        }
        S::reduce_add(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    }
}

/// # Safety
/// The CPU has `S`; `w` and `b` are as long, `x` and `y` a multiple of that and as long as each other.
#[inline(always)]
unsafe fn layer_norm_kernel<S: Simd>(
    activation: Activation,
    x: &[f32],
    (w, b): (&[f32], &[f32]),
    eps: f32,
    y: &mut [MaybeUninit<f32>],
) {
    let n = w.len();
    let (w, b) = (w.as_ptr(), b.as_ptr());
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let (x, y) = (x.as_ptr(), y.as_mut_ptr().cast::<f32>());
        // SAFETY: all four rows have n elements.
        unsafe {
            let mean = sum::<S, false>(x, n, 0.0) / n as f32;
            let scale = 1.0 / (sum::<S, true>(x, n, mean) / n as f32 + eps).sqrt();
            let (mean, scale) = (S::splat(mean), S::splat(scale));
            let mut i = 0;
            while i + S::LANES <= n {
                let normed = S::mul(S::sub(S::load(x.add(i)), mean), scale);
                let normed = S::fma(normed, S::load(w.add(i)), S::load(b.add(i)));
                S::store(y.add(i), math::activate::<S>(activation, normed));
                i += S::LANES;
            }
            if i < n {
                let lanes = n - i;
                let normed = S::mul(S::sub(S::load_partial(x.add(i), lanes), mean), scale);
                let (w, b) = (S::load_partial(w.add(i), lanes), S::load_partial(b.add(i), lanes));
                S::store_partial(y.add(i), lanes, math::activate::<S>(activation, S::fma(normed, w, b)));
            }
        }
    }
}

simd_entry! {
    fn layer_norm_on(
        activation: Activation,
        x: &[f32],
        w_and_b: (&[f32], &[f32]),
        eps: f32,
        y: &mut [MaybeUninit<f32>],
    ) = layer_norm_kernel
}

/// Normalises every row of `w.len()` elements, then applies `activation`; all of `y` is written.
///
/// # Panics
/// When `w` is empty or differs in length from `b`, or `x` is not whole rows, as many as `y` has.
pub(crate) fn layer_norm(
    activation: Activation,
    x: &[f32],
    (w, b): (&[f32], &[f32]),
    eps: f32,
    y: &mut [MaybeUninit<f32>],
) {
    assert!(!w.is_empty() && w.len() == b.len() && x.len().is_multiple_of(w.len()) && x.len() == y.len());
    // SAFETY: the current set is one that the CPU has; lengths just checked.
    unsafe { layer_norm_on(Isa::current(), activation, x, (w, b), eps, y) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Rows of length `n`: ordinary, far from zero, constant, zero, tiny, huge, and with an infinity or a NaN.
    pub(crate) fn rows(n: usize) -> Vec<f32> {
        let wave = |i: usize| (i as f32 * 0.7391).sin();
        let row = |f: &dyn Fn(usize) -> f32| (0..n).map(f).collect::<Vec<_>>();
        let with_last = |last: f32| row(&|i| if i + 1 == n { last } else { wave(i) });
        [
            row(&wave),
            row(&|i| 1000.0 + wave(i)),
            row(&|_| 3.0),
            row(&|_| 0.0),
            row(&|i| 1e-30 * wave(i)),
            row(&|i| 1e16 * wave(i)),
            with_last(f32::INFINITY),
            with_last(f32::NAN),
        ]
        .concat()
    }

    /// Runs `kernel` into a guarded output, `x` and `w` at an odd offset.
    pub(crate) fn guarded(len: usize, kernel: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
        let mut y = vec![MaybeUninit::new(777.0f32); len + 2];
        kernel(&mut y[1..=len]);
        // SAFETY: initialised above.
        let y: Vec<f32> = y.iter().map(|y| unsafe { y.assume_init() }).collect();
        assert_eq!((y[0], y[len + 1]), (777.0, 777.0), "written outside");
        y[1..=len].to_vec()
    }

    /// `tolerance` is relative to the largest of the row, with the NaNs in the same places.
    pub(crate) fn assert_rows_close(n: usize, got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        for (row, (got, want)) in got.chunks(n).zip(want.chunks(n)).enumerate() {
            let size = want.iter().fold(1.0, |a: f32, b| a.max(b.abs()));
            for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
                let close = (g - w).abs() <= tolerance * size || (g.is_nan() && w.is_nan());
                assert!(close, "{what}, n {n}, row {row}, element {i}: {g:e}, not {w:e}");
            }
        }
    }

    #[test]
    fn every_path_against_the_definition() {
        for isa in Isa::available() {
            for n in (1..=67).chain([197, 768, 1023]) {
                let x = [vec![0.0], rows(n)].concat();
                let w: Vec<f32> = (0..=n).map(|i| 1.0 + (i as f32).cos()).collect();
                let b: Vec<f32> = (0..=n).map(|i| (i as f32 * 0.3).cos()).collect();
                let (x, w, b) = (&x[1..], &w[1..], &b[1..]);
                let mut want = vec![0.0; x.len()];
                layer_norm_scalar(x, w, b, 1e-5, &mut want);
                // SAFETY: an available set, lengths as asked.
                let run = |act| guarded(x.len(), |y| unsafe { layer_norm_on(isa, act, x, (w, b), 1e-5, y) });
                let got = run(Activation::Identity);
                // the row at 1000 ± 1 has lost 10 of its 24 bits before it comes here
                let (near, far) = (2e-6, 3e-4);
                assert_rows_close(n, &got[..n], &want[..n], near, &isa.to_string());
                assert_rows_close(n, &got[n..2 * n], &want[n..2 * n], far, &isa.to_string());
                assert_rows_close(n, &got[2 * n..], &want[2 * n..], near, &isa.to_string());
                let (relu, finite) = (run(Activation::Relu), 6 * n);
                assert!(relu[..finite].iter().zip(&got).all(|(relu, plain)| *relu == plain.max(0.0)), "{isa}, n {n}");
            }
        }
    }
}
