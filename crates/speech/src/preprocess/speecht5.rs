//! Sounds and spectra for SpeechT5, as `transformers.SpeechT5FeatureExtractor` makes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use serde::Deserialize;
use serde_json::Value;

use super::log_mel::{LogMel, Shape};
use super::{Defaults, Options, Padding, mask, normalise, preprocess_only, read_config, read_mono, refuse};

/// `audio` becomes a waveform, `audio_target` spectra.
pub struct SpeechT5Processor {
    config: Config,
    spectra: LogMel,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Config {
    feature_size: usize,
    sampling_rate: u32,
    padding_value: f32,
    padding_side: String,
    do_normalize: bool,
    num_mel_bins: usize,
    /// Milliseconds.
    hop_length: usize,
    /// Milliseconds.
    win_length: usize,
    win_function: String,
    fmin: f64,
    fmax: f64,
    mel_floor: f64,
    return_attention_mask: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            feature_size: 1,
            sampling_rate: 16_000,
            padding_value: 0.0,
            padding_side: "right".to_owned(),
            do_normalize: false,
            num_mel_bins: 80,
            hop_length: 16,
            win_length: 64,
            win_function: "hann_window".to_owned(),
            fmin: 80.0,
            fmax: 7600.0,
            mel_floor: 1e-10,
            return_attention_mask: true,
        }
    }
}

/// Beyond any use of them.
const LARGEST: usize = 1 << 16;

impl SpeechT5Processor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let config: Config = read_config(config, "SpeechT5FeatureExtractor")?;
        let samples = |milliseconds: usize| milliseconds.saturating_mul(config.sampling_rate as usize) / 1000;
        let (window, hop) = (samples(config.win_length), samples(config.hop_length));
        for (field, size) in [
            ("sampling_rate", config.sampling_rate as usize),
            ("num_mel_bins", config.num_mel_bins),
            ("hop_length", hop),
            ("win_length", window),
        ] {
            if !(1..=LARGEST).contains(&size) {
                return Err(refuse(field, format!("{size} is not in 1..={LARGEST}")));
            }
        }
        if window < 2 {
            return Err(refuse("win_length", "is shorter than 2 samples".to_owned()));
        }
        if config.feature_size != 1 {
            return Err(refuse("feature_size", format!("{} is not supported; 1 is", config.feature_size)));
        }
        if config.padding_side != "right" {
            return Err(refuse("padding_side", format!("{} is not supported; right is", config.padding_side)));
        }
        if !["hann", "hann_window"].contains(&config.win_function.as_str()) {
            return Err(refuse("win_function", format!("{} is not supported; hann_window is", config.win_function)));
        }
        if config.mel_floor != 1e-10 {
            return Err(refuse("mel_floor", format!("{} is not supported; 1e-10 is", config.mel_floor)));
        }
        if !(0.0 <= config.fmin && config.fmin < config.fmax && config.fmax.is_finite()) {
            return Err(refuse("fmin", format!("{} is not between 0 and fmax, {}", config.fmin, config.fmax)));
        }
        let shape = Shape {
            rate: config.sampling_rate,
            window,
            hop,
            points: window.next_power_of_two(),
            bins: config.num_mel_bins,
            range: (config.fmin, config.fmax),
            squared: false,
        };
        Ok(Self { spectra: LogMel::new(shape), config })
    }

    /// Samples a second that the model takes.
    pub fn sampling_rate(&self) -> u32 {
        self.config.sampling_rate
    }

    /// `input_values` (batch, samples) in f32 and, where asked for, `attention_mask` (batch, samples) in i32.
    ///
    /// # Errors
    /// [`SessionError::Input`] when there is no sound, or lengths differ and are not to be padded.
    pub fn waveforms(&self, mut sounds: Vec<Vec<f32>>, options: &Options) -> Result<Tensors, SessionError> {
        if let Some(most) = options.most() {
            sounds.iter_mut().for_each(|sound| sound.truncate(most));
        }
        let lengths: Vec<usize> = sounds.iter().map(Vec::len).collect();
        let length = options.length(&lengths, "samples")?;
        // without a mask, and where nothing is padded, the class takes a sound with all that follows it
        let counted = options.attention_mask && options.padding != Padding::None;
        for sound in &mut sounds {
            if self.config.do_normalize && counted {
                normalise(sound);
            }
            sound.resize(length, self.config.padding_value);
            if self.config.do_normalize && !counted {
                normalise(sound);
            }
        }
        self.tensors(sounds.concat(), &lengths, length, None, options)
    }

    /// `input_values` (batch, frames, bins) in f32 and, where asked for, `attention_mask` (batch, frames) in i32.
    ///
    /// # Errors
    /// As for [`waveforms`](Self::waveforms), and when a sound is shorter than half a window.
    pub fn targets(&self, sounds: &[Vec<f32>], options: &Options) -> Result<Tensors, SessionError> {
        let bins = self.config.num_mel_bins;
        let spectra = sounds.iter().map(|sound| self.spectra.spectra(sound, "audio_target"));
        let mut spectra = spectra.collect::<Result<Vec<_>, _>>()?;
        if let Some(most) = options.most() {
            spectra.iter_mut().for_each(|rows| rows.truncate(most.saturating_mul(bins)));
        }
        let lengths: Vec<usize> = spectra.iter().map(|rows| rows.len() / bins).collect();
        let length = options.length(&lengths, "frames")?;
        spectra.iter_mut().for_each(|rows| rows.resize(length * bins, self.config.padding_value));
        self.tensors(spectra.concat(), &lengths, length, Some(bins), options)
    }

    fn tensors(
        &self,
        values: Vec<f32>,
        lengths: &[usize],
        length: usize,
        bins: Option<usize>,
        options: &Options,
    ) -> Result<Tensors, SessionError> {
        let shape: Vec<usize> = [lengths.len(), length].into_iter().chain(bins).collect();
        let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
        let mut tensors = Tensors::from([("input_values".to_owned(), values)]);
        if options.attention_mask {
            tensors.insert("attention_mask".to_owned(), mask(lengths, length)?);
        }
        Ok(tensors)
    }
}

impl Processor for SpeechT5Processor {
    /// The spectra are `labels`, and their mask `decoder_attention_mask`, where there are waveforms as well.
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        _inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        preprocess_only(method)?;
        let known = ["audio", "audio_target"];
        if let Some(name) = files.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(SessionError::input(name, format!("is not supported; supported: {}", known.join(", "))));
        }
        let defaults = Defaults {
            sampling_rate: self.config.sampling_rate,
            padding: Padding::None,
            max_length: None,
            truncation: false,
            attention_mask: self.config.return_attention_mask,
        };
        let options = Options::read(arguments, &defaults)?;
        let read = |name: &str| files.get(name).map(|files| read_mono(files, self.config.sampling_rate)).transpose();
        let waveforms = read("audio")?.map(|sounds| self.waveforms(sounds, &options)).transpose()?;
        let targets = read("audio_target")?.map(|sounds| self.targets(&sounds, &options)).transpose()?;
        match (waveforms, targets) {
            (None, None) => Err(SessionError::input("audio", "is missing, and so is audio_target")),
            (Some(tensors), None) | (None, Some(tensors)) => Ok(tensors),
            (Some(mut tensors), Some(targets)) => {
                let renamed = |name: String| if name == "input_values" { "labels" } else { "decoder_attention_mask" };
                tensors.extend(targets.into_iter().map(|(name, tensor)| (renamed(name).to_owned(), tensor)));
                Ok(tensors)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn waveforms_and_spectra() -> Result<(), SessionError> {
        let processor = SpeechT5Processor::from_config(&json!({"num_mel_bins": 3}))?;
        let options = Options { padding: Padding::Longest, cut: None, multiple_of: None, attention_mask: true };
        let sounds = vec![vec![0.0; 1024], vec![0.0; 600]];
        let targets = processor.targets(&sounds, &options)?;
        // a frame for every 256 samples, and one more; silence is 1e-10
        assert_eq!(targets["attention_mask"].sum(1)?.to_vec1::<i32>()?, [5, 3]);
        assert_eq!(targets["input_values"].to_vec3::<f32>()?[1][2..4], [[-10.0; 3], [0.0; 3]]);
        assert_eq!(processor.waveforms(sounds, &options)?["input_values"].dims(), [2, 1024]);
        Ok(())
    }

    #[test]
    fn fields_that_are_not_supported_are_named() {
        let message = |config: Value| SpeechT5Processor::from_config(&config).err().map(|e| e.to_string());
        for (config, field) in [
            (json!({"win_function": "povey"}), "`win_function`: povey is not supported"),
            (json!({"fmin": 9000}), "`fmin`: 9000 is not between"),
            (json!({"mel_floor": 1e-5}), "`mel_floor`"),
            (json!({"win_length": 0}), "`win_length`"),
            (json!({"feature_size": 2}), "`feature_size`"),
        ] {
            assert!(message(config).is_some_and(|message| message.contains(field)), "{field}");
        }
    }
}
