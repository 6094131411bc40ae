//! Spectra of sound on the mel scale, as `transformers.audio_utils` makes them: windows of samples, their Fourier
//! transform, and triangular filters as Slaney has them.

use std::f64::consts::PI;
use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};
use roofbench_core::session::SessionError;

/// What the filters of a spectrum see.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Samples a second.
    pub(super) rate: u32,
    /// Samples of a window.
    pub(super) window: usize,
    /// Samples from a window to the next.
    pub(super) hop: usize,
    /// Points of the transform, at least those of a window.
    pub(super) points: usize,
    /// Filters.
    pub(super) bins: usize,
    /// Hz where the first filter begins and where the last one ends.
    pub(super) range: (f64, f64),
    /// The filters take the squares of magnitudes.
    pub(super) squared: bool,
}

/// Logarithms (base 10) of filtered spectra. Sums are in f64.
pub(super) struct LogMel {
    shape: Shape,
    window: Vec<f64>,
    transform: Arc<dyn RealToComplex<f64>>,
    /// Where each filter begins, and its weights.
    filters: Vec<(usize, Vec<f64>)>,
}

/// No magnitude is less before its logarithm is taken.
const FLOOR: f64 = 1e-10;

impl LogMel {
    pub(super) fn new(shape: Shape) -> Self {
        let Shape { window, points, .. } = shape;
        // periodic Hann
        let hann = |at: usize| 0.5 - 0.5 * (2.0 * PI * at as f64 / window as f64).cos();
        Self {
            window: (0..window).map(hann).collect(),
            transform: RealFftPlanner::new().plan_fft_forward(points),
            filters: filters(&shape),
            shape,
        }
    }

    /// Spectra of windows around every `hop`-th sample; beyond the ends the sound runs backwards.
    ///
    /// # Shapes
    /// (samples) → (samples / hop + 1, bins).
    ///
    /// # Errors
    /// [`SessionError::Input`] of the argument `name` when the sound is shorter than half a window.
    pub(super) fn spectra(&self, sound: &[f32], name: &str) -> Result<Vec<f32>, SessionError> {
        let Shape { window, hop, points, bins, squared, .. } = self.shape;
        let half = window / 2;
        if sound.len() <= half {
            let reason = format!("a sound of {} samples is not longer than half a window, {half}", sound.len());
            return Err(SessionError::input(name, reason));
        }
        let reflected = |at: usize| {
            let (at, last) = (at as i64 - half as i64, sound.len() as i64 - 1);
            f64::from(sound[(last - (last - at.abs()).abs()) as usize])
        };
        let count = (sound.len() + 2 * half - window) / hop + 1;
        let mut spectra = Vec::with_capacity(count * bins);
        let (mut buffer, mut spectrum) = (vec![0.0; points], self.transform.make_output_vec());
        for begin in (0..count).map(|frame| frame * hop) {
            for (at, weight) in self.window.iter().enumerate() {
                buffer[at] = reflected(begin + at) * weight;
            }
            buffer[window..].fill(0.0);
            self.transform
                .process(&mut buffer, &mut spectrum)
                .map_err(|error| SessionError::input(name, format!("has no spectrum: {error}")))?;
            let magnitude = |x: &realfft::num_complex::Complex<f64>| match squared {
                true => x.norm_sqr(),
                false => x.norm(),
            };
            spectra.extend(self.filters.iter().map(|(begin, weights)| {
                let sum: f64 = weights.iter().zip(&spectrum[*begin..]).map(|(w, x)| w * magnitude(x)).sum();
                sum.max(FLOOR).log10() as f32
            }));
        }
        Ok(spectra)
    }
}

/// Hz to mel: linear up to 1000 Hz, logarithmic above.
fn mel(hz: f64) -> f64 {
    if hz < 1000.0 { 3.0 * hz / 200.0 } else { 15.0 + (hz / 1000.0).ln() * 27.0 / 6.4f64.ln() }
}

/// Mel to Hz.
fn hz(mel: f64) -> f64 {
    if mel < 15.0 { 200.0 * mel / 3.0 } else { 1000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp() }
}

/// Triangles between every other of equally spaced points on the mel scale, each of area 1.
fn filters(shape: &Shape) -> Vec<(usize, Vec<f64>)> {
    let Shape { rate, points, bins, range, .. } = *shape;
    let (low, high) = (mel(range.0), mel(range.1));
    let corner = |at: usize| hz(low + (high - low) * at as f64 / (bins + 1) as f64);
    let frequency = |at: usize| f64::from(rate / 2) * at as f64 / (points / 2) as f64;
    let filter = |bin: usize| {
        let [left, middle, right] = [bin, bin + 1, bin + 2].map(corner);
        let weight = |at: usize| {
            let rising = (frequency(at) - left) / (middle - left);
            let falling = (right - frequency(at)) / (right - middle);
            rising.min(falling).max(0.0) * 2.0 / (right - left)
        };
        let weights: Vec<f64> = (0..=points / 2).map(weight).collect();
        let begin = weights.iter().position(|w| *w > 0.0).unwrap_or(0);
        let end = weights.iter().rposition(|w| *w > 0.0).map_or(begin, |last| last + 1);
        (begin, weights[begin..end].to_vec())
    };
    (0..bins).map(filter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tone_shows_where_it_is() -> Result<(), SessionError> {
        let shape =
            Shape { rate: 16_000, window: 400, hop: 160, points: 400, bins: 80, range: (0.0, 8000.0), squared: true };
        let spectra = LogMel::new(shape);
        let tone: Vec<f32> =
            (0..1600).map(|i| (2.0 * std::f32::consts::PI * 1000.0 * i as f32 / 16_000.0).sin()).collect();
        let frames = spectra.spectra(&tone, "raw_speech")?;
        assert_eq!(frames.len(), 11 * 80);
        let middle = &frames[5 * 80..6 * 80];
        let loudest = (0..80).max_by(|a, b| middle[*a].total_cmp(&middle[*b])).unwrap_or_default();
        // 1000 Hz is mel 15 of 45.25, or 27 of 81 steps; the filter whose middle it is
        assert!((25..=27).contains(&loudest), "{loudest}");
        assert!(spectra.spectra(&tone[..200], "x").is_err_and(|error| error.to_string().contains("input `x`")));
        assert!((hz(mel(440.0)) - 440.0).abs() < 1e-9 && (hz(mel(4400.0)) - 4400.0).abs() < 1e-9);
        Ok(())
    }
}
