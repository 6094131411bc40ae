//! Spectra for Whisper, as `transformers.WhisperFeatureExtractor` makes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use serde::Deserialize;
use serde_json::Value;

use super::log_mel::{LogMel, Shape};
use super::{Defaults, Options, Padding, files_of, mask, normalise, read_config, read_mono, refuse};

/// Sounds cut and padded to the 30 seconds that the model takes, and their spectra.
pub struct WhisperProcessor {
    config: Config,
    spectra: LogMel,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Config {
    feature_size: usize,
    sampling_rate: u32,
    hop_length: usize,
    chunk_length: usize,
    n_fft: usize,
    padding_value: f32,
    padding_side: String,
    dither: f64,
    return_attention_mask: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            feature_size: 80,
            sampling_rate: 16_000,
            hop_length: 160,
            chunk_length: 30,
            n_fft: 400,
            padding_value: 0.0,
            padding_side: "right".to_owned(),
            dither: 0.0,
            return_attention_mask: false,
        }
    }
}

/// Hz where the last filter ends, whatever the rate.
const HIGHEST: f64 = 8000.0;

/// Beyond any use of them.
const LARGEST: usize = 1 << 16;

impl WhisperProcessor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let config: Config = read_config(config, "WhisperFeatureExtractor")?;
        for (field, size) in [
            ("feature_size", config.feature_size),
            ("sampling_rate", config.sampling_rate as usize),
            ("hop_length", config.hop_length),
            ("chunk_length", config.chunk_length),
            ("n_fft", config.n_fft),
        ] {
            if !(1..=LARGEST).contains(&size) {
                return Err(refuse(field, format!("{size} is not in 1..={LARGEST}")));
            }
        }
        if config.n_fft < 2 {
            return Err(refuse("n_fft", "is to be at least 2".to_owned()));
        }
        if config.padding_side != "right" {
            return Err(refuse("padding_side", format!("{} is not supported; right is", config.padding_side)));
        }
        if config.dither != 0.0 {
            return Err(refuse("dither", format!("{} is not supported; 0 is", config.dither)));
        }
        if config.return_attention_mask {
            return Err(refuse("return_attention_mask", "true is not supported; pass it as an argument".to_owned()));
        }
        let shape = Shape {
            rate: config.sampling_rate,
            window: config.n_fft,
            hop: config.hop_length,
            points: config.n_fft,
            bins: config.feature_size,
            range: (0.0, HIGHEST),
            squared: true,
        };
        Ok(Self { spectra: LogMel::new(shape), config })
    }

    /// Samples a second that the model takes.
    pub fn sampling_rate(&self) -> u32 {
        self.config.sampling_rate
    }

    /// Samples that the model takes.
    pub(crate) fn samples(&self) -> usize {
        self.config.chunk_length * self.config.sampling_rate as usize
    }

    /// `input_features` (batch, bins, frames) in f32 and, where asked for, `attention_mask` (batch, frames) in i32. With
    /// `normalise` a sound is first brought to mean 0 and variance 1.
    ///
    /// # Errors
    /// [`SessionError::Input`] when there is no sound, or lengths differ and are not to be padded.
    pub fn prepare(
        &self,
        mut sounds: Vec<Vec<f32>>,
        options: &Options,
        normalised: bool,
    ) -> Result<Tensors, SessionError> {
        if let Some(most) = options.most() {
            sounds.iter_mut().for_each(|sound| sound.truncate(most));
        }
        let lengths: Vec<usize> = sounds.iter().map(Vec::len).collect();
        let length = options.length(&lengths, "samples")?;
        let (hop, bins) = (self.config.hop_length, self.config.feature_size);
        let (batch, frames) = (sounds.len(), length / hop);
        let mut features = Vec::with_capacity(batch * bins * frames);
        for mut sound in sounds {
            if normalised {
                normalise(&mut sound);
            }
            sound.resize(length, self.config.padding_value);
            let spectra = self.spectra.spectra(&sound, "raw_speech")?;
            let spectra = &spectra[..frames * bins]; // without the last one
            let loudest = spectra.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for bin in 0..bins {
                let column = spectra.iter().skip(bin).step_by(bins);
                features.extend(column.map(|x| (x.max(loudest - 8.0) + 4.0) / 4.0));
            }
        }
        let features = Tensor::from_vec(features, (batch, bins, frames), &Device::Cpu)?;
        let mut tensors = Tensors::from([("input_features".to_owned(), features)]);
        if options.attention_mask {
            // a frame exists where its first sample does
            let lengths: Vec<usize> = lengths.iter().map(|length| length.div_ceil(hop)).collect();
            tensors.insert("attention_mask".to_owned(), mask(&lengths, frames)?);
        }
        Ok(tensors)
    }
}

impl Processor for WhisperProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        _inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let files = files_of(method, files, "raw_speech")?;
        let mut arguments = arguments.clone();
        let normalised = match arguments.remove("do_normalize") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(normalised)) => normalised,
            Some(other) => {
                return Err(SessionError::input("do_normalize", format!("is {other}, expected true or false")));
            }
        };
        let defaults = Defaults {
            sampling_rate: self.config.sampling_rate,
            padding: Padding::To(self.samples()),
            max_length: Some(self.samples()),
            truncation: true,
            attention_mask: false,
        };
        let options = Options::read(&arguments, &defaults)?;
        self.prepare(read_mono(files, self.config.sampling_rate)?, &options, normalised)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn silence_and_lengths() -> Result<(), SessionError> {
        let processor = WhisperProcessor::from_config(&json!({"chunk_length": 1, "feature_size": 4}))?;
        let options =
            Options { padding: Padding::To(16_000), cut: Some(16_000), multiple_of: None, attention_mask: true };
        let tensors = processor.prepare(vec![vec![0.0; 401], vec![0.0; 20_000]], &options, false)?;
        assert_eq!(tensors["input_features"].dims(), [2, 4, 100]);
        // the floor is 1e-10: (-10 + 4) / 4
        assert_eq!(tensors["input_features"].flatten_all()?.to_vec1::<f32>()?, vec![-1.5; 800]);
        assert_eq!(tensors["attention_mask"].sum(1)?.to_vec1::<i32>()?, [3, 100]);
        Ok(())
    }

    #[test]
    fn fields_that_are_not_supported_are_named() {
        let message = |config: Value| WhisperProcessor::from_config(&config).err().map(|e| e.to_string());
        for (config, field) in [
            (json!({"dither": 0.1}), "`dither`: 0.1 is not supported"),
            (json!({"hop_length": 0}), "`hop_length`"),
            (json!({"padding_side": "left"}), "`padding_side`"),
            (json!({"return_attention_mask": true}), "`return_attention_mask`"),
            (json!({"feature_extractor_type": "EncodecFeatureExtractor"}), "`feature_extractor_type`"),
        ] {
            assert!(message(config).is_some_and(|message| message.contains(field)), "{field}");
        }
    }
}
