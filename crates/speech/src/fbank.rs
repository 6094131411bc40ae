//! Log mel filter banks as Kaldi computes them. Mirrors `torchaudio.compliance.kaldi.fbank` with a Hann window, without
//! dither, and everything else at its defaults.

use std::f64::consts::TAU;

use realfft::RealFftPlanner;
use roofbench_core::session::SessionError;

/// Frames a second.
const FRAMES: u32 = 100;
/// Seconds of a frame, inverse.
const FRAME_LENGTH: u32 = 40;
/// The lowest frequency of the first band, Hz.
const LOWEST: f64 = 20.0;
/// How much of the sample before is taken from each.
const PREEMPHASIS: f32 = 0.97;

/// Bands of equal width on the mel scale, from 20 Hz to half of the rate, of frames of 25 ms every 10 ms.
///
/// ```
/// use roofbench_speech::fbank::FilterBank;
///
/// let bank = FilterBank::new(16_000, 40)?;
/// let tone: Vec<f32> = (0..1600).map(|i| (i as f32 * 0.4).sin()).collect(); // 1019 Hz
/// let frames = bank.frames(&tone);
/// assert_eq!(frames.len(), 8); // those that lie within the sound
/// let loudest = |frame: &[f32]| (0..40).max_by(|a, b| frame[*a].total_cmp(&frame[*b]));
/// assert_eq!(loudest(&frames[0]), Some(13)); // of 2840 mel 1000 are below, of 41 steps 14
/// # Ok::<(), roofbench_speech::SessionError>(())
/// ```
pub struct FilterBank {
    shift: usize,
    window: Vec<f32>,
    /// Samples of a transform.
    padded: usize,
    bands: Vec<Band>,
}

/// Weights of neighbouring frequencies.
struct Band {
    first: usize,
    weights: Vec<f32>,
}

impl FilterBank {
    /// `bands` bands of sounds at `rate` samples a second.
    ///
    /// # Errors
    /// The rate is so low that a frame has no samples or a band no frequencies, or there are no bands.
    pub fn new(rate: u32, bands: usize) -> Result<Self, SessionError> {
        let (shift, size) = ((rate / FRAMES) as usize, (rate / FRAME_LENGTH) as usize);
        if size < 2 || f64::from(rate) <= 2.0 * LOWEST || bands == 0 {
            let reason = format!("{bands} bands of sounds at {rate} samples a second can't be made");
            return Err(SessionError::Preprocessor { field: "sample_rate".to_owned(), reason });
        }
        let padded = size.next_power_of_two();
        let hann = |i: usize| (0.5 - 0.5 * (TAU * i as f64 / (size - 1) as f64).cos()) as f32;
        let mel = |hertz: f64| 1127.0 * (1.0 + hertz / 700.0).ln();
        let (lowest, highest) = (mel(LOWEST), mel(0.5 * f64::from(rate)));
        let step = (highest - lowest) / (bands + 1) as f64;
        // in f32 from here on, as the reference: narrow bands have few frequencies, whose weights are small differences
        let width = f64::from(rate) / padded as f64;
        let frequencies: Vec<f32> =
            (0..padded / 2).map(|i| 1127.0 * (1.0 + (width as f32 * i as f32) / 700.0).ln()).collect();
        let edge = |i: f32| lowest as f32 + i * step as f32;
        let band = |i: usize| {
            let [left, centre, right] = [0.0, 1.0, 2.0].map(|offset| edge(i as f32 + offset));
            let weight = |mel: &f32| ((mel - left) / (centre - left)).min((right - mel) / (right - centre)).max(0.0);
            let weights: Vec<f32> = frequencies.iter().map(weight).collect();
            let first = weights.iter().position(|weight| *weight > 0.0).unwrap_or(0);
            let count = weights[first..].iter().take_while(|weight| **weight > 0.0).count();
            Band { first, weights: weights[first..first + count].to_vec() }
        };
        Ok(Self { shift, window: (0..size).map(hann).collect(), padded, bands: (0..bands).map(band).collect() })
    }

    /// Samples of a frame.
    pub fn frame_size(&self) -> usize {
        self.window.len()
    }

    /// The logarithm of each band's energy in each frame that lies within `samples`; none when they are fewer than a frame.
    pub fn frames(&self, samples: &[f32]) -> Vec<Vec<f32>> {
        let fft = RealFftPlanner::<f64>::new().plan_fft_forward(self.padded);
        let (mut input, mut spectrum) = (fft.make_input_vec(), fft.make_output_vec());
        let mut frame = |samples: &[f32]| -> Vec<f32> {
            let mean = (samples.iter().map(|x| f64::from(*x)).sum::<f64>() / samples.len() as f64) as f32;
            let mut before = samples[0] - mean;
            input.fill(0.0); // the transform uses it up
            for ((input, sample), window) in input.iter_mut().zip(samples).zip(&self.window) {
                let centred = sample - mean;
                *input = f64::from((centred - PREEMPHASIS * before) * window);
                before = centred;
            }
            // it fails on other lengths than those it made
            let energies: Vec<f64> = match fft.process(&mut input, &mut spectrum) {
                Ok(()) => spectrum.iter().map(|x| x.norm_sqr()).collect(),
                Err(_) => vec![f64::NAN; self.padded / 2 + 1],
            };
            let energy = |band: &Band| {
                let weighted = band.weights.iter().zip(&energies[band.first..]);
                (weighted.map(|(weight, energy)| f64::from(*weight) * energy).sum::<f64>() as f32)
                    .max(f32::EPSILON)
                    .ln()
            };
            self.bands.iter().map(energy).collect()
        };
        samples.windows(self.window.len()).step_by(self.shift).map(&mut frame).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_the_floor_and_a_loud_tone_is_not() -> Result<(), SessionError> {
        let bank = FilterBank::new(16_000, 23)?;
        assert_eq!(bank.frame_size(), 400);
        assert!(bank.frames(&[0.5; 399]).is_empty());
        let silent = bank.frames(&[0.5; 560]); // a constant is no sound
        assert_eq!(silent, vec![vec![f32::EPSILON.ln(); 23]; 2]);
        let tone: Vec<f32> = (0..400).map(|i| (f64::from(i) * 0.5).sin() as f32).collect();
        // a full tone's line has the energy (sum of the window / 2)² = 100² before pre-emphasis
        let loudest = bank.frames(&tone)[0].iter().copied().fold(f32::MIN, f32::max);
        assert!((6.0..11.0).contains(&loudest), "{loudest}");
        Ok(())
    }

    #[test]
    fn bands_cover_every_frequency_once() -> Result<(), SessionError> {
        let bank = FilterBank::new(16_000, 23)?;
        let mut sums = vec![0.0; 256];
        for band in &bank.bands {
            for (i, weight) in band.weights.iter().enumerate() {
                sums[band.first + i] += weight;
            }
        }
        // triangles overlap to 1 between the peaks of the first and of the last
        assert!(sums[8..220].iter().all(|sum| (sum - 1.0).abs() < 1e-4), "{sums:?}");
        Ok(())
    }

    #[test]
    fn rates_that_make_no_frames_are_refused() {
        for (rate, bands) in [(0, 23), (40, 23), (79, 23), (16_000, 0)] {
            assert!(FilterBank::new(rate, bands).is_err(), "{rate}");
        }
    }
}
