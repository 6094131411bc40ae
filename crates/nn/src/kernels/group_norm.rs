//! GroupNorm over channels-last maps: y = w (x - mean) / sqrt(var + eps) + b, with the moments of each item's groups of
//! channels over all pixels (arXiv:1803.08494).
//! It reads x three times and writes y once. Sums are taken per channel over chunks of pixels in f32 and over the chunks
//! and channels in f64; the variance is that of the centred values, so a large mean costs no digits. Chunks do not
//! depend on the number of threads, nor does the result.

#![expect(unsafe_code, reason = "vectors over raw pixels; lengths are checked once, at the entry")]

use std::mem::MaybeUninit;

use super::isa::Isa;
use super::math;
use super::simd::{Simd, simd_entry};
use crate::activation::Activation;
use crate::op;

/// Elements of a chunk of pixels, about: it stays in the first-level cache.
const CHUNK: usize = 8192;

/// Writes a number per channel, of an item and one chunk of its pixels.
type Sum<'a> = dyn Fn(usize, &[f32], &mut [MaybeUninit<f32>]) + Sync + 'a;

/// Normalises `x` (batch, pixels, channels), then applies `activation`; `w` and `b` are (channels).
///
/// # Panics
/// When `w` is empty, a length does not fit or the groups do not divide the channels.
pub(crate) fn group_norm(
    isa: Isa,
    x: &[f32],
    pixels: usize,
    groups: usize,
    (w, b): (&[f32], &[f32]),
    eps: f64,
    activation: Activation,
) -> Vec<f32> {
    let channels = w.len();
    let item = pixels * channels;
    assert!(isa.is_available() && channels > 0 && b.len() == channels && channels.is_multiple_of(groups));
    if x.is_empty() {
        return Vec::new();
    }
    assert!(x.len().is_multiple_of(item));
    let batch = x.len() / item;
    let chunk = (CHUNK / channels).clamp(1, pixels);
    let chunks = pixels.div_ceil(chunk);
    let part = |item_index: usize, index: usize| {
        let pixels = index * chunk..pixels.min((index + 1) * chunk);
        &x[item_index * item..][pixels.start * channels..pixels.end * channels]
    };
    // The mean over each group of each item, of what `sum` gives per channel.
    let per_group = channels / groups;
    let means = |sum: &Sum<'_>| -> Vec<f64> {
        // SAFETY: a part is one chunk's channels, all of which `sum` writes.
        let sums = unsafe {
            op::collect_chunks(batch * chunks * channels, channels, |begin, out| {
                let index = begin / channels;
                sum(index / chunks, part(index / chunks, index % chunks), out);
            })
        };
        let of_group = |i: usize| -> f64 {
            let (item, group) = (i / groups, i % groups);
            let sums = sums[item * chunks * channels..][..chunks * channels].chunks_exact(channels);
            let sums = sums.flat_map(|sums| &sums[group * per_group..][..per_group]);
            sums.map(|&sum| f64::from(sum)).sum::<f64>() / (pixels * per_group) as f64
        };
        (0..batch * groups).map(of_group).collect()
    };
    let spread = |of_channel: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        (0..batch * channels)
            .map(|i| of_channel(i / channels * groups + i % channels / per_group, i % channels))
            .collect()
    };
    let zeros = vec![0.0; channels];
    // SAFETY: the set is available; each gets whole pixels and as many numbers as there are channels.
    let mean = means(&|_, x, out| unsafe { sum_on(isa, x, &zeros, out) });
    let centres = spread(&|group, _| mean[group] as f32);
    let centre = |item: usize| &centres[item * channels..][..channels];
    // SAFETY: as above.
    let variance = means(&|item, x, out| unsafe { squares_on(isa, x, centre(item), out) });
    let scales = spread(&|group, channel| (f64::from(w[channel]) / (variance[group] + eps).sqrt()) as f32);
    let scale = |item: usize| &scales[item * channels..][..channels];
    // SAFETY: as above; parts are whole pixels, and all of each is written.
    unsafe {
        op::collect_chunks(x.len(), chunk * channels, |begin, y| {
            // Parts do not end where items do.
            let (mut at, mut rest) = (begin, y);
            while !rest.is_empty() {
                let index = at / item;
                let (now, later) = rest.split_at_mut(rest.len().min((index + 1) * item - at));
                normalise_on(isa, activation, &x[at..at + now.len()], centre(index), (scale(index), b), now);
                at += now.len();
                rest = later;
            }
        })
    }
}

simd_entry! {
    /// # Safety
    /// `x` is whole pixels of `centre.len()` channels, as many as `out` has.
    fn sum_on(x: &[f32], centre: &[f32], out: &mut [MaybeUninit<f32>]) = sum_plain
}
simd_entry! {
    /// # Safety
    /// As for [`sum_on`].
    fn squares_on(x: &[f32], centre: &[f32], out: &mut [MaybeUninit<f32>]) = sum_squares
}
simd_entry! {
    /// # Safety
    /// `x` and `y` are the same number of pixels of `centre.len()` channels, as many as scale and `b` have.
    fn normalise_on(
        activation: Activation,
        x: &[f32],
        centre: &[f32],
        scale_and_b: (&[f32], &[f32]),
        y: &mut [MaybeUninit<f32>],
    ) = normalise
}

#[inline(always)]
unsafe fn sum_plain<S: Simd>(x: &[f32], centre: &[f32], out: &mut [MaybeUninit<f32>]) {
    // SAFETY: the caller's.
    unsafe { sum::<S, false>(x, centre, out) }
}

#[inline(always)]
unsafe fn sum_squares<S: Simd>(x: &[f32], centre: &[f32], out: &mut [MaybeUninit<f32>]) {
    // SAFETY: the caller's.
    unsafe { sum::<S, true>(x, centre, out) }
}

/// Per channel Σ (x - centre), or Σ (x - centre)² where `SQUARED`, in four sums.
#[inline(always)]
unsafe fn sum<S: Simd, const SQUARED: bool>(x: &[f32], centre: &[f32], out: &mut [MaybeUninit<f32>]) {
    let channels = centre.len();
    let pixels = x.len() / channels;
    for channel in (0..channels).step_by(S::LANES) {
        let lanes = S::LANES.min(channels - channel);
        // SAFETY: below the pixels and channels.
        unsafe {
            let load = |p: *const f32| if lanes == S::LANES { S::load(p) } else { S::load_partial(p, lanes) };
            let c = load(centre.as_ptr().add(channel));
            let mut sums = [S::splat(0.0); 4];
            let mut add = |i: usize, k: usize| {
                let d = S::sub(load(x.as_ptr().add(i * channels + channel)), c);
                sums[k] = if SQUARED { S::fma(d, d, sums[k]) } else { S::add(d, sums[k]) };
            };
            let mut i = 0;
            while i + 4 <= pixels {
                add(i, 0);
                add(i + 1, 1);
                add(i + 2, 2);
                add(i + 3, 3);
                i += 4;
            }
            while i < pixels {
                add(i, 0);
                i += 1;
            }
            let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            S::store_partial(out.as_mut_ptr().cast::<f32>().add(channel), lanes, sum);
        }
    }
}

#[inline(always)]
unsafe fn normalise<S: Simd>(
    activation: Activation,
    x: &[f32],
    centre: &[f32],
    (scale, b): (&[f32], &[f32]),
    y: &mut [MaybeUninit<f32>],
) {
    let channels = centre.len();
    for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
        for channel in (0..channels).step_by(S::LANES) {
            let lanes = S::LANES.min(channels - channel);
            // SAFETY: below the channels.
            unsafe {
                let load = |p: &[f32]| {
                    let p = p.as_ptr().add(channel);
                    if lanes == S::LANES { S::load(p) } else { S::load_partial(p, lanes) }
                };
                let normed = S::fma(S::sub(load(x), load(centre)), load(scale), load(b));
                let normed = math::activate::<S>(activation, normed);
                S::store_partial(y.as_mut_ptr().cast::<f32>().add(channel), lanes, normed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64.
    fn reference(x: &[f32], pixels: usize, groups: usize, (w, b): (&[f32], &[f32]), eps: f64) -> Vec<f64> {
        let channels = w.len();
        let per_group = channels / groups;
        let mut y = vec![0.0; x.len()];
        for item in 0..x.len() / (pixels * channels) {
            for group in 0..groups {
                let at = |i: usize| (item * pixels + i / per_group) * channels + group * per_group + i % per_group;
                let n = pixels * per_group;
                let mean = (0..n).map(|i| f64::from(x[at(i)])).sum::<f64>() / n as f64;
                let variance = (0..n).map(|i| (f64::from(x[at(i)]) - mean).powi(2)).sum::<f64>() / n as f64;
                for i in (0..n).map(at) {
                    let channel = i % channels;
                    let normed = (f64::from(x[i]) - mean) / (variance + eps).sqrt();
                    y[i] = normed * f64::from(w[channel]) + f64::from(b[channel]);
                }
            }
        }
        y
    }

    #[test]
    fn every_path_against_the_definition() {
        for isa in Isa::available() {
            for (pixels, channels, groups) in [
                (1, 1, 1),
                (7, 3, 3),
                (7, 3, 1),
                (50, 33, 11),
                (131, 16, 16),
                (1000, 64, 32),
                (3, 9000, 2),
                (4, 67, 67),
            ] {
                for (mean, tolerance) in [(0.0, 4e-6), (1000.0, 4e-4)] {
                    let x: Vec<f32> = (0..3 * pixels * channels).map(|i| mean + (i as f32 * 0.7391).sin()).collect();
                    let w: Vec<f32> = (0..channels).map(|i| 1.0 + (i as f32).cos()).collect();
                    let b: Vec<f32> = (0..channels).map(|i| (i as f32 * 0.3).cos()).collect();
                    // an eps of the size of the variance keeps a group of one element from dividing by nothing
                    let found = group_norm(isa, &x, pixels, groups, (&w, &b), 0.1, Activation::Identity);
                    let relu = group_norm(isa, &x, pixels, groups, (&w, &b), 0.1, Activation::Relu);
                    assert!(relu.iter().zip(&found).all(|(relu, plain)| *relu == plain.max(0.0)), "{isa} {channels}");
                    let expected = reference(&x, pixels, groups, (&w, &b), 0.1);
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        // roundings of values up to 8; numbers near 1000 have lost 10 of their 24 bits before
                        let error = (f64::from(*found) - expected).abs();
                        assert!(
                            error <= tolerance,
                            "{isa} {pixels} {channels} {groups} at {i}: {found}, not {expected}"
                        );
                    }
                }
            }
        }
        assert!(group_norm(Isa::current(), &[], 5, 1, (&[1.0], &[0.0]), 0.1, Activation::Relu).is_empty());
    }

    #[test]
    fn an_infinity_stays_in_its_group() {
        let mut x: Vec<f32> = (0..2 * 5 * 6).map(|i| i as f32).collect();
        x[4] = f32::INFINITY;
        let y = group_norm(Isa::current(), &x, 5, 3, (&[1.0; 6], &[0.0; 6]), 1e-5, Activation::Identity);
        for (i, y) in y.iter().enumerate() {
            assert_eq!(y.is_nan(), i < 30 && i % 6 >= 4, "{i}: {y}");
        }
    }
}
