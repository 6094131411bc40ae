//! Resampling by a sinc of a few zero crossings under a Hann window, sample for sample as
//! `torchaudio.functional.resample` does it, for models whose processors are made with it.

use std::f32::consts::PI;

/// Zero crossings of the sinc on each side.
const WIDTH: f32 = 6.0;
/// The cut-off as a part of half of the lower rate.
const ROLLOFF: f64 = 0.99;

/// `samples` at `to` samples a second instead of `from`; none when a rate is 0.
///
/// ```
/// use roofbench_speech::sinc::resample;
///
/// let tone: Vec<f32> = (0..400).map(|i| (i as f32 * 0.1).sin()).collect();
/// let doubled = resample(&tone, 8000, 16_000);
/// assert_eq!(doubled.len(), 800);
/// assert!((doubled[400] - tone[200]).abs() < 1e-2);
/// ```
pub fn resample(samples: &[f32], from: u32, to: u32) -> Vec<f32> {
    let divisor = gcd(from, to);
    if from == 0 || to == 0 {
        return Vec::new();
    }
    let (from, to) = ((from / divisor) as usize, (to / divisor) as usize);
    let base = from.min(to) as f64 * ROLLOFF;
    let width = (f64::from(WIDTH) * from as f64 / base).ceil() as usize;
    let scale = (base / from as f64) as f32;
    // in f32, as the reference, whose kernels are off by some 1e-5 for it
    let tap = |phase: usize, i: usize| {
        let place = -(phase as f32) / to as f32 + (i as f32 - width as f32) / from as f32;
        let t = place * base as f32;
        let window = (t.clamp(-WIDTH, WIDTH) * PI / WIDTH / 2.0).cos().powi(2);
        let angle = t * PI;
        let sinc = if angle == 0.0 { 1.0 } else { angle.sin() / angle };
        (t.abs() < WIDTH).then_some(sinc * (window * scale))
    };
    // of each phase the first tap that is not 0, and those that follow
    let kernels: Vec<(usize, Vec<f32>)> = (0..to)
        .map(|phase| {
            let taps = 2 * width + from;
            let first = (0..taps).find(|i| tap(phase, *i).is_some()).unwrap_or(0);
            (first, (first..taps).map_while(|i| tap(phase, i)).collect())
        })
        .collect();
    let length = (samples.len() * to).div_ceil(from);
    let sample = |i: usize| -> f32 {
        let (first, taps) = &kernels[i % to];
        // where the kernel's first tap lies
        let begin = (i / to * from + first) as isize - width as isize;
        let skipped = begin.min(0).unsigned_abs();
        let samples = samples.get(begin.max(0) as usize..).unwrap_or_default();
        samples.iter().zip(taps.iter().skip(skipped)).map(|(x, tap)| x * tap).sum()
    };
    (0..length).map(sample).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tones_are_kept_and_what_does_not_fit_is_removed() {
        let tone = |hertz: f64, rate: u32| -> Vec<f32> {
            (0..rate / 4)
                .map(|i| (std::f64::consts::TAU * hertz * f64::from(i) / f64::from(rate)).sin() as f32)
                .collect()
        };
        let largest = |a: &[f32], b: &[f32]| {
            let middle = 100..a.len() - 100; // the ends meet silence
            a[middle.clone()].iter().zip(&b[middle]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        for (from, to) in [(44_100, 16_000), (8_000, 16_000), (48_000, 24_000), (16_000, 16_000)] {
            let (got, want) = (resample(&tone(440.0, from), from, to), tone(440.0, to));
            assert_eq!(got.len(), want.len());
            let error = largest(&got, &want);
            assert!(error < 5e-3, "{from} to {to}: {error}"); // a short filter
        }
        let removed = resample(&tone(12_000.0, 44_100), 44_100, 16_000);
        assert!(largest(&removed, &vec![0.0; removed.len()]) < 1e-2);
        assert!(resample(&[], 8000, 16_000).is_empty() && resample(&[1.0], 0, 8000).is_empty());
        assert_eq!(resample(&[1.0; 5], 3, 2).len(), 4);
    }
}
