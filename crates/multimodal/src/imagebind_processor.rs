//! From pictures, frames and sounds to the inputs of ImageBind, as `imagebind/data.py` of its repository makes them. What
//! that file fixes is the default of each field; depth, heat, motion and tokens it does not prepare either.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_nn::resize::bilinear;
use roofbench_speech::audio::Sound;
use roofbench_speech::fbank::FilterBank;
use roofbench_speech::sinc;
use roofbench_vision::image::{RgbImage, imageops};
use roofbench_vision::image_io::{MAX_PIXELS, Transparency, load_rgb};
use roofbench_vision::resize::{Filter, resize};
use serde::Deserialize;
use serde_json::Value;

/// Parts of a frame that a video is cut into: left, centre and right, or top, centre and bottom.
const CROPS: usize = 3;

/// The fields of `preprocessor_config.json`; any may be left out.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ImageBindProcessor {
    /// Height and width of pictures and of parts of frames.
    size: u32,
    /// Of each colour, from 0 to 1.
    image_mean: [f32; 3],
    image_std: [f32; 3],
    /// Seconds of a clip, and for videos the frames of it as well.
    clip_duration: f64,
    /// Clips of a sound or a video; 3 and 5 where it is left out.
    clips_per_video: Option<u32>,
    /// Of a video whose frames come as files.
    frames_per_second: Option<u32>,
    /// Samples a second.
    sample_rate: u32,
    /// Rows of a spectrogram.
    num_mel_bins: usize,
    /// Columns of a spectrogram, which is cut or filled up with zeros.
    target_length: usize,
    /// Of spectrograms.
    mean: f32,
    std: f32,
}

impl Default for ImageBindProcessor {
    fn default() -> Self {
        Self {
            size: 224,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            clip_duration: 2.0,
            clips_per_video: None,
            frames_per_second: None,
            sample_rate: 16_000,
            num_mel_bins: 128,
            target_length: 204,
            mean: -4.268,
            std: 9.138,
        }
    }
}

fn refuse(field: &str, reason: impl Into<String>) -> SessionError {
    SessionError::Preprocessor { field: field.to_owned(), reason: reason.into() }
}

impl ImageBindProcessor {
    /// Reads `preprocessor_config.json`, which may be absent.
    ///
    /// # Errors
    /// Names the field that is malformed.
    pub fn from_config(config: Option<&Value>) -> Result<Self, SessionError> {
        let Some(config) = config else { return Ok(Self::default()) };
        let read: Self = serde_path_to_error::deserialize(config)
            .map_err(|error| refuse(&error.path().to_string(), error.inner().to_string()))?;
        for (field, number, most) in [
            ("size", u64::from(read.size), 1 << 13),
            ("clips_per_video", u64::from(read.clips_per_video.unwrap_or(1)), 1 << 10),
            ("frames_per_second", u64::from(read.frames_per_second.unwrap_or(1)), 1 << 10),
            ("sample_rate", u64::from(read.sample_rate), 1 << 20),
            ("num_mel_bins", read.num_mel_bins as u64, 1 << 12),
            ("target_length", read.target_length as u64, 1 << 16),
        ] {
            if !(1..=most).contains(&number) {
                return Err(refuse(field, format!("{number} is not in 1..={most}")));
            }
        }
        if !(1e-3..=3600.0).contains(&read.clip_duration) {
            return Err(refuse("clip_duration", format!("{} s is not in 0.001..=3600", read.clip_duration)));
        }
        if read.std == 0.0 || read.image_std.contains(&0.0) {
            return Err(refuse(if read.std == 0.0 { "std" } else { "image_std" }, "holds 0, which is divided by"));
        }
        Ok(read)
    }

    /// Pictures: the centre of each, (batch, 3, size, size).
    fn pictures(&self, files: &[PathBuf]) -> Result<Tensor, SessionError> {
        let pictures = files.iter().map(|path| {
            let picture = load_rgb(path, Transparency::Dropped)?;
            let (width, height) = picture.dimensions();
            let scaled = |side: u32, shorter: u32| u64::from(self.size) * u64::from(side) / u64::from(shorter);
            let shorter = height.min(width);
            let [new_height, new_width] = [height, width].map(|side| scaled(side, shorter));
            if new_height * new_width > MAX_PIXELS {
                let reason = format!("would be resized to {new_height} x {new_width}, more than {MAX_PIXELS} pixels");
                return Err(SessionError::File { path: path.clone(), reason });
            }
            // both are at most MAX_PIXELS
            let picture = resize(&picture, new_height as u32, new_width as u32, Filter::Bicubic);
            // half of an odd margin is rounded to an even number
            let offset = |side: u32| (f64::from(side - self.size) / 2.0).round_ties_even() as u32;
            let (width, height) = picture.dimensions();
            let centre = imageops::crop_imm(&picture, offset(width), offset(height), self.size, self.size).to_image();
            Ok(self.normalised(planes(&centre)?)?)
        });
        Ok(Tensor::stack(&pictures.collect::<Result<Vec<_>, SessionError>>()?, 0)?)
    }

    /// A video by its frames: (1, clips · 3 parts, 3, frames, size, size).
    fn video(&self, files: &[PathBuf]) -> Result<Tensor, SessionError> {
        let Some(rate) = self.frames_per_second else {
            return Err(refuse("frames_per_second", "is missing: files of frames don't say it"));
        };
        let (wanted, size) = (self.clip_duration as usize, self.size as usize);
        if wanted as f64 != self.clip_duration || wanted == 0 {
            let reason = format!("is {}, expected a whole number: a clip has a frame a second", self.clip_duration);
            return Err(refuse("clip_duration", reason));
        }
        let mut parts = Vec::new();
        let duration = files.len() as f64 / f64::from(rate);
        for [start, end] in clips(duration, self.clip_duration, self.clips_per_video.unwrap_or(5), rate, Round::Up)? {
            let clip = files.get(start..end.min(files.len())).unwrap_or_default();
            if clip.is_empty() {
                return Err(SessionError::input("frames", format!("{} files leave a clip without any", files.len())));
            }
            let frames = evenly(clip.len(), wanted).map(|i| planes(&load_rgb(&clip[i], Transparency::Dropped)?));
            let frames = frames.collect::<Result<Vec<_>, SessionError>>()?;
            let frames = Tensor::stack(&frames, 0)
                .map_err(|_| SessionError::input("frames", "differ in size; a video's frames have one"))?;
            let (_, _, height, width) = frames.dims4()?;
            // the shorter side gets the size
            let scaled = |side: usize, shorter: usize| (side as f64 / shorter as f64 * size as f64).floor() as usize;
            let to = if width < height { (scaled(height, width), size) } else { (size, scaled(width, height)) };
            if (to.0 * to.1) as u64 > MAX_PIXELS {
                return Err(SessionError::input("frames", format!("would be resized to {} x {}", to.0, to.1)));
            }
            let frames = self.normalised(bilinear(&frames, to, false)?)?; // (frames, 3, height, width)
            for crop in 0..CROPS {
                let offset = |side: usize, is_long: bool| match crop {
                    0 if is_long => 0,
                    2 if is_long => side - size,
                    _ => (side - size).div_ceil(2),
                };
                let (down, across) = (offset(to.0, to.0 > to.1), offset(to.1, to.0 <= to.1));
                parts.push(frames.narrow(2, down, size)?.narrow(3, across, size)?.transpose(0, 1)?.contiguous()?);
            }
        }
        Ok(Tensor::stack(&parts, 0)?.unsqueeze(0)?)
    }

    /// Sounds: (batch, clips, 1, mel bins, frames).
    fn sounds(&self, files: &[PathBuf]) -> Result<Tensor, SessionError> {
        let (bank, rate) = (FilterBank::new(self.sample_rate, self.num_mel_bins)?, self.sample_rate);
        let count = self.clips_per_video.unwrap_or(3);
        let mut values = Vec::new();
        for path in files {
            let sound = Sound::read(path)?;
            let mut channels = sound.channels;
            if sound.rate != rate {
                channels = channels.iter().map(|samples| sinc::resample(samples, sound.rate, rate)).collect();
            }
            let length = channels.first().map_or(0, Vec::len);
            let duration = length as f64 / f64::from(rate);
            for [start, end] in clips(duration, self.clip_duration, count, rate, Round::Down)? {
                let clip = start.min(length)..end.min(length);
                if clip.len() < bank.frame_size() {
                    let reason = format!(
                        "has a clip of {} samples at {rate} Hz, fewer than the {} of a frame; give a longer sound",
                        clip.len(),
                        bank.frame_size()
                    );
                    return Err(SessionError::File { path: path.clone(), reason });
                }
                // the mean of all channels leaves the sound for good, also where another clip overlaps this one
                let sum: f64 = channels.iter().flat_map(|samples| &samples[clip.clone()]).map(|x| f64::from(*x)).sum();
                let mean = (sum / (channels.len() * clip.len()) as f64) as f32;
                channels.iter_mut().for_each(|samples| samples[clip.clone()].iter_mut().for_each(|x| *x -= mean));
                let frames = channels.first().map(|samples| bank.frames(&samples[clip])).unwrap_or_default();
                for bin in 0..self.num_mel_bins {
                    let energy = |at: usize| frames.get(at).map_or(0.0, |frame| frame[bin]);
                    values.extend((0..self.target_length).map(|at| (energy(at) - self.mean) / self.std));
                }
            }
        }
        let shape = (files.len(), count as usize, 1, self.num_mel_bins, self.target_length);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// (…, 3, height, width) about the mean of each colour, in units of its deviation.
    fn normalised(&self, planes: Tensor) -> candle_core::Result<Tensor> {
        let each = |values: &[f32; 3]| Tensor::new(values, planes.device())?.reshape((3, 1, 1));
        planes.broadcast_sub(&each(&self.image_mean)?)?.broadcast_div(&each(&self.image_std)?)
    }
}

/// (3, height, width), from 0 to 1.
fn planes(picture: &RgbImage) -> Result<Tensor, SessionError> {
    let (width, height) = picture.dimensions();
    let levels: Vec<f32> = picture.as_raw().iter().map(|level| f32::from(*level) / 255.0).collect();
    let pixels = Tensor::from_vec(levels, (height as usize, width as usize, 3), &Device::Cpu)?;
    Ok(pixels.permute((2, 0, 1))?.contiguous()?)
}

/// `wanted` of `count` things from the first to the last, at even distances, cut down to whole numbers.
pub(crate) fn evenly(count: usize, wanted: usize) -> impl Iterator<Item = usize> {
    let last = (count - 1) as f32;
    let step = if wanted > 1 { last / (wanted - 1) as f32 } else { 0.0 };
    // counted from the nearer end
    let at = move |i: usize| match i {
        i if i < wanted / 2 || wanted == 1 => step * i as f32,
        i => last - step * (wanted - 1 - i) as f32,
    };
    (0..wanted).map(move |i| (at(i) as usize).min(count - 1))
}

/// How a time between two samples is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Up,
    Down,
}

/// Where `count` clips of `clip` seconds begin and end, spread from the beginning to the end of `duration` seconds, in
/// samples at `rate`. As in the reference times are fractions: in floating point one that falls on a sample could be taken
/// for the one before.
fn clips(duration: f64, clip: f64, count: u32, rate: u32, round: Round) -> Result<Vec<[usize; 2]>, SessionError> {
    let gaps = u128::from(count.max(2) - 1);
    let ((span, span_bits), (clip, clip_bits)) = (fraction((duration - clip).max(0.0)), fraction(clip));
    let bits = span_bits.max(clip_bits);
    // of gaps · 2^bits
    let scaled = |numerator: u128, from: u32| {
        let fits = bits < 100 && numerator.leading_zeros() > bits - from;
        fits.then(|| numerator << (bits - from))
    };
    let place = |numerator: Option<u128>| {
        let (numerator, whole) = (numerator?.checked_mul(rate.into())?, gaps.checked_mul(1 << bits)?);
        usize::try_from(if round == Round::Up { numerator.div_ceil(whole) } else { numerator / whole }).ok()
    };
    let (span, clip) = (scaled(span, span_bits), scaled(clip, clip_bits).and_then(|clip| clip.checked_mul(gaps)));
    let bounds = |i: u32| {
        let start = span?.checked_mul(i.into())?;
        Some([place(Some(start))?, place(start.checked_add(clip?))?])
    };
    let all = (0..count).map(bounds).collect::<Option<Vec<_>>>();
    all.ok_or_else(|| refuse("clip_duration", format!("can't be laid over {duration} s")))
}

/// A number of 0 or more as a numerator and the power of two below it.
fn fraction(x: f64) -> (u128, u32) {
    let (bits, exponent) = (x.to_bits() & ((1 << 52) - 1), ((x.to_bits() >> 52) & 0x7ff) as i32);
    let (mantissa, exponent) = if exponent == 0 { (bits, -1074) } else { (bits | (1 << 52), exponent - 1075) };
    let spare = if mantissa == 0 { 0 } else { mantissa.trailing_zeros() };
    match exponent + spare as i32 {
        _ if mantissa == 0 => (0, 0),
        up @ 0.. => (u128::from(mantissa >> spare) << up.min(64), 0), // durations are far below 2^64
        down => (u128::from(mantissa >> spare), down.unsigned_abs()),
    }
}

impl Processor for ImageBindProcessor {
    /// `vision` of the files of `images`, or of `frames`, which are those of one video, and `audio`.
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        const SUPPORTED: &str = "images, frames (of one video) and audio, as files";
        if method != "preprocess" {
            return Err(SessionError::input("method", format!("`{method}` is not supported; supported: preprocess")));
        }
        if let Some(name) = inputs.keys().chain(arguments.keys()).next() {
            return Err(SessionError::input(name, format!("is not supported; supported: {SUPPORTED}")));
        }
        if files.contains_key("images") && files.contains_key("frames") {
            return Err(SessionError::input("frames", "and images are both `vision`; give one of them"));
        }
        let mut made = Tensors::new();
        for (name, files) in files {
            if files.is_empty() {
                return Err(SessionError::input(name, "is empty; give at least one file"));
            }
            let (input, values) = match name.as_str() {
                "images" => ("vision", self.pictures(files)?),
                "frames" => ("vision", self.video(files)?),
                "audio" => ("audio", self.sounds(files)?),
                _ => return Err(SessionError::input(name, format!("is not supported; supported: {SUPPORTED}"))),
            };
            made.insert(input.to_owned(), values);
        }
        if made.is_empty() {
            return Err(SessionError::input("images", format!("is missing; supported: {SUPPORTED}")));
        }
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn clips_are_spread_from_the_beginning_to_the_end() -> Result<(), SessionError> {
        let at = |duration, clip, count, rate, round| clips(duration, clip, count, rate, round);
        assert_eq!(at(5.0, 2.0, 3, 10, Round::Down)?, [[0, 20], [15, 35], [30, 50]]);
        assert_eq!(at(1.0, 2.0, 2, 10, Round::Down)?, [[0, 20], [0, 20]]); // beyond the end
        assert_eq!(at(9.0, 2.0, 1, 10, Round::Down)?, [[0, 20]]);
        // 0.1 is a little more than a tenth, 0.3 a little less than three
        assert_eq!(at(0.3, 0.3, 1, 10, Round::Down)?, [[0, 2]]);
        assert_eq!(at(0.1, 0.1, 1, 10, Round::Down)?, [[0, 1]]);
        assert_eq!(at(0.1, 0.1, 1, 10, Round::Up)?, [[0, 2]]);
        assert_eq!(at(11.0 / 3.0, 2.0, 2, 3, Round::Up)?[0], [0, 6]);
        assert!(at(1e300, 2.0, 2, 3, Round::Up).is_err());
        assert_eq!([fraction(0.0), fraction(0.75), fraction(6.0)], [(0, 0), (3, 2), (6, 0)]);
        Ok(())
    }

    #[test]
    fn frames_are_taken_at_even_distances() {
        let taken = |count, wanted| evenly(count, wanted).collect::<Vec<_>>();
        assert_eq!(taken(6, 2), [0, 5]);
        assert_eq!(taken(6, 1), [0]);
        assert_eq!(taken(6, 3), [0, 2, 5]);
        assert_eq!(taken(2, 4), [0, 0, 0, 1]);
        assert_eq!(taken(1, 2), [0, 0]);
    }

    #[test]
    fn malformed_fields_and_arguments_are_named() {
        let config = |config: Value| ImageBindProcessor::from_config(Some(&config)).err().map(|e| e.to_string());
        for (value, field) in [
            (json!({"size": 0}), "size"),
            (json!({"image_std": [1.0, 0.0, 1.0]}), "image_std"),
            (json!({"clip_duration": -1}), "clip_duration"),
            (json!({"num_mel_bins": "many"}), "num_mel_bins"),
            (json!({"std": 0}), "std"),
        ] {
            let found = config(value).unwrap_or_default();
            assert!(found.starts_with(&format!("preprocessor_config.json: `{field}`: ")), "{found}");
        }
        let processor = ImageBindProcessor::from_config(None).expect("defaults");
        let call = |method: &str, names: &[&str], files: &[&str]| {
            let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
            let files = names.iter().map(|name| (name.to_string(), files.clone())).collect();
            processor.call(method, &files, &Tensors::new(), &Arguments::new()).err().map(|e| e.to_string())
        };
        for (message, part) in [
            (call("post_process", &[], &[]), "`method`: `post_process`"),
            (call("preprocess", &[], &[]), "`images`: is missing"),
            (call("preprocess", &["depth"], &["a.png"]), "`depth`: is not supported"),
            (call("preprocess", &["audio"], &[]), "`audio`: is empty"),
            (call("preprocess", &["frames", "images"], &["a.png"]), "give one of them"),
            (call("preprocess", &["frames"], &["a.png"]), "`frames_per_second`: is missing"),
            (call("preprocess", &["audio"], &["no-such.wav"]), "no-such.wav: "),
        ] {
            assert!(message.clone().unwrap_or_default().contains(part), "{message:?}");
        }
    }
}
