//! Global response normalisation over channels-last maps: y = x (1 + w n / (mean n + eps)) + b, where n is the Euclidean norm
//! of each channel of an item over all pixels and its mean is over the channels (arXiv:2301.00808).
//! It reads x twice and writes y once. Squares are summed per channel over chunks of pixels in f32 and over the chunks in
//! f64. Chunks do not depend on the number of threads, nor does the result.

#![expect(unsafe_code, reason = "vectors over raw pixels; lengths are checked once, at the entry")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::simd::{Simd, simd_entry};
use crate::op;

/// Elements of a chunk of pixels, about: it stays in the first-level cache.
const CHUNK: usize = 8192;

/// Normalises `x` (batch, pixels, channels); `w` and `b` are (channels).
///
/// # Panics
/// When `w` is empty or a length does not fit.
pub(crate) fn response_norm(isa: Isa, x: &[f32], pixels: usize, (w, b): (&[f32], &[f32]), eps: f64) -> Vec<f32> {
    let channels = w.len();
    assert!(isa.is_available() && channels > 0 && b.len() == channels);
    if x.is_empty() {
        return Vec::new();
    }
    let item = pixels * channels;
    assert!(x.len().is_multiple_of(item));
    let chunk = (CHUNK / channels).clamp(1, pixels) * channels;
    let chunks = item.div_ceil(chunk);
    // SAFETY: the set is available; a part is one chunk's channels, all of which are written.
    let squares = unsafe {
        op::collect_chunks(x.len() / item * chunks * channels, channels, |begin, out| {
            let (index, at) = (begin / channels / chunks, begin / channels % chunks * chunk);
            squares_on(isa, &x[index * item..][at..item.min(at + chunk)], out);
        })
    };
    let mut scales = Vec::with_capacity(x.len() / pixels);
    for squares in squares.chunks_exact(chunks * channels) {
        let of_channel =
            |channel: usize| squares[channel..].iter().step_by(channels).map(|square| f64::from(*square)).sum::<f64>();
        let norms: Vec<f64> = (0..channels).map(|channel| of_channel(channel).sqrt()).collect();
        let mean = norms.iter().sum::<f64>() / channels as f64;
        scales.extend(norms.iter().zip(w).map(|(norm, w)| (1.0 + f64::from(*w) * norm / (mean + eps)) as f32));
    }
    // SAFETY: as above; parts are whole pixels, and all of each is written.
    unsafe {
        op::collect_chunks(x.len(), chunk, |begin, y| {
            // Parts do not end where items do.
            let (mut at, mut rest) = (begin, y);
            while !rest.is_empty() {
                let index = at / item;
                let (now, later) = rest.split_at_mut(rest.len().min((index + 1) * item - at));
                scale_on(isa, &x[at..at + now.len()], &scales[index * channels..][..channels], b, now);
                at += now.len();
                rest = later;
            }
        })
    }
}

simd_entry! {
    /// # Safety
    /// `x` is whole pixels of `out.len()` channels.
    fn squares_on(x: &[f32], out: &mut [MaybeUninit<f32>]) = squares
}
simd_entry! {
    /// # Safety
    /// `x` and `y` are the same number of pixels of `scale.len()` channels, as many as `b` has.
    fn scale_on(x: &[f32], scale: &[f32], b: &[f32], y: &mut [MaybeUninit<f32>]) = scale_and_shift
}

/// Per channel Σ x², in four sums.
#[inline(always)]
unsafe fn squares<S: Simd>(x: &[f32], out: &mut [MaybeUninit<f32>]) {
    let channels = out.len();
    let pixels = x.len() / channels;
    for channel in (0..channels).step_by(S::LANES) {
        let lanes = S::LANES.min(channels - channel);
        // SAFETY: below the pixels and channels.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            let load = |i: usize| {
                let x = x.as_ptr().add(i * channels + channel);
                if lanes == S::LANES { S::load(x) } else { S::load_partial(x, lanes) }
            };
            let mut i = 0;
            while i + 4 <= pixels {
                for (k, sum) in sums.iter_mut().enumerate() {
                    let x = load(i + k);
                    *sum = S::fma(x, x, *sum);
                }
                i += 4;
            }
            while i < pixels {
                let x = load(i);
                sums[0] = S::fma(x, x, sums[0]);
                i += 1;
            }
            let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            S::store_partial(out.as_mut_ptr().cast::<f32>().add(channel), lanes, sum);
        }
    }
}

#[inline(always)]
unsafe fn scale_and_shift<S: Simd>(x: &[f32], scale: &[f32], b: &[f32], y: &mut [MaybeUninit<f32>]) {
    let channels = scale.len();
    for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
        for channel in (0..channels).step_by(S::LANES) {
            let lanes = S::LANES.min(channels - channel);
            // SAFETY: below the channels.
            unsafe {
                let load = |p: &[f32]| {
                    let p = p.as_ptr().add(channel);
                    if lanes == S::LANES { S::load(p) } else { S::load_partial(p, lanes) }
                };
                let scaled = S::fma(load(x), load(scale), load(b));
                S::store_partial(y.as_mut_ptr().cast::<f32>().add(channel), lanes, scaled);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64.
    fn reference(x: &[f32], pixels: usize, (w, b): (&[f32], &[f32]), eps: f64) -> Vec<f64> {
        let channels = w.len();
        let mut y = Vec::with_capacity(x.len());
        for item in x.chunks(pixels * channels) {
            let square = |channel: usize| item.iter().skip(channel).step_by(channels).map(|x| f64::from(*x).powi(2));
            let norms: Vec<f64> = (0..channels).map(|channel| square(channel).sum::<f64>().sqrt()).collect();
            let mean = norms.iter().sum::<f64>() / channels as f64;
            y.extend(item.iter().enumerate().map(|(i, x)| {
                let (x, channel) = (f64::from(*x), i % channels);
                f64::from(w[channel]) * (x * norms[channel] / (mean + eps)) + f64::from(b[channel]) + x
            }));
        }
        y
    }

    #[test]
    fn every_path_against_the_definition() {
        for isa in Isa::available() {
            for (pixels, channels) in [(1, 1), (7, 3), (50, 33), (131, 16), (1000, 64), (3, 9000), (4, 67)] {
                let x: Vec<f32> = (0..3 * pixels * channels).map(|i| (i as f32 * 0.7391).sin()).collect();
                let w: Vec<f32> = (0..channels).map(|i| (i as f32).cos()).collect();
                let b: Vec<f32> = (0..channels).map(|i| (i as f32 * 0.3).cos()).collect();
                let found = response_norm(isa, &x, pixels, (&w, &b), 1e-6);
                let expected = reference(&x, pixels, (&w, &b), 1e-6);
                assert_eq!(found.len(), expected.len());
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    // a few roundings of values up to 10, and of the sums of squares
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error <= 4e-6, "{isa} {pixels} {channels} at {i}: {found}, not {expected}");
                }
            }
        }
        assert!(response_norm(Isa::current(), &[], 5, (&[1.0], &[0.0]), 1e-6).is_empty());
        // nothing but zeros: the mean is 0, and eps keeps it from dividing by nothing
        assert_eq!(response_norm(Isa::current(), &[0.0; 4], 2, (&[1.0; 2], &[3.0; 2]), 1e-6), [3.0; 4]);
    }
}
