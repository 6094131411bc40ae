//! Sounds of one or two channels for EnCodec, as `transformers.EncodecFeatureExtractor` makes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use serde::Deserialize;
use serde_json::Value;

use super::{Defaults, Options, Padding, files_of, mask, read_config, refuse};
use crate::audio::Sound;

/// Waveforms padded to one length, of whole pieces where the model takes a sound in pieces.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct EncodecProcessor {
    /// Samples a second that the model takes.
    pub sampling_rate: u32,
    /// Channels: 1 or 2.
    pub feature_size: usize,
    /// What follows a sound that is shorter than others.
    pub padding_value: f32,
    /// Seconds of a piece; the whole sound is one where absent.
    pub chunk_length_s: Option<f64>,
    /// The part of a piece that the next one has too.
    pub overlap: Option<f64>,
    padding_side: String,
}

impl Default for EncodecProcessor {
    fn default() -> Self {
        Self {
            sampling_rate: 24_000,
            feature_size: 1,
            padding_value: 0.0,
            chunk_length_s: None,
            overlap: None,
            padding_side: "right".to_owned(),
        }
    }
}

impl EncodecProcessor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let read: Self = read_config(config, "EncodecFeatureExtractor")?;
        if ![1, 2].contains(&read.feature_size) {
            return Err(refuse("feature_size", format!("{} is neither 1 nor 2", read.feature_size)));
        }
        if read.padding_side != "right" {
            return Err(refuse("padding_side", format!("{} is not supported; right is", read.padding_side)));
        }
        if read.sampling_rate == 0 {
            return Err(refuse("sampling_rate", "is 0".to_owned()));
        }
        Ok(read)
    }

    /// Samples of a piece, and from a piece to the next; `None` where a sound is one.
    fn pieces(&self) -> Option<(usize, usize)> {
        let length = (self.chunk_length_s? * f64::from(self.sampling_rate)) as usize;
        let stride = ((1.0 - self.overlap?) * length as f64) as usize;
        Some((length, stride.max(1)))
    }

    /// Files with the channels that the model takes: one that has others is mixed and given to each.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn read(&self, files: &[PathBuf]) -> Result<Vec<Sound>, SessionError> {
        let read = |path: &PathBuf| Ok(Sound::read(path)?.resampled(self.sampling_rate)?.mixed(self.feature_size));
        files.iter().map(read).collect()
    }

    /// `input_values` (batch, channels, samples) in f32 and, where sounds are padded, `padding_mask` (batch, samples) in
    /// i32.
    ///
    /// # Errors
    /// [`SessionError::Input`] when there is no sound, or lengths differ and are not to be padded.
    pub fn prepare(&self, sounds: &[Sound], options: &Options) -> Result<Tensors, SessionError> {
        let lengths: Vec<usize> = sounds.iter().map(|sound| sound.channels.first().map_or(0, Vec::len)).collect();
        let most = options.most().unwrap_or(usize::MAX);
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length.min(most)).collect();
        let length = options.length(&lengths, "samples")?;
        let mut values = Vec::with_capacity(sounds.len() * self.feature_size * length);
        for (sound, found) in sounds.iter().zip(&lengths) {
            for channel in &sound.channels {
                values.extend(&channel[..*found]);
                values.resize(values.len() + length - found, self.padding_value);
            }
        }
        let values = Tensor::from_vec(values, (sounds.len(), self.feature_size, length), &Device::Cpu)?;
        let mut tensors = Tensors::from([("input_values".to_owned(), values)]);
        if options.padding != Padding::None {
            tensors.insert("padding_mask".to_owned(), mask(&lengths, length)?);
        }
        Ok(tensors)
    }

    /// Without a length sounds come to whole pieces: as many as the longest has, or with truncation the shortest.
    pub(crate) fn options(&self, arguments: &Arguments, sounds: &[Sound]) -> Result<Options, SessionError> {
        let truncation = arguments.get("truncation") == Some(&Value::Bool(true));
        if truncation && arguments.get("padding").is_some_and(|way| !matches!(way, Value::Null | Value::Bool(false))) {
            return Err(SessionError::input("truncation", "and padding are not to be asked for together"));
        }
        let lengths = || sounds.iter().filter_map(|sound| sound.channels.first()).map(Vec::len);
        let whole = |count: usize, (length, stride): (usize, usize)| count.saturating_sub(1) * stride + length;
        let shortest = lengths().min().zip(self.pieces()).map(|(least, pieces)| whole(least / pieces.1, pieces));
        let defaults = Defaults {
            sampling_rate: self.sampling_rate,
            padding: Padding::Longest,
            max_length: shortest.filter(|_| truncation),
            truncation: false,
            attention_mask: true,
        };
        let mut options = Options::read(arguments, &defaults)?;
        let is_free = !truncation && arguments.get("max_length").is_none_or(Value::is_null);
        if let (Padding::Longest, Some(pieces), Some(most)) = (options.padding, self.pieces(), lengths().max())
            && is_free
        {
            options.padding = Padding::To(whole(most.div_ceil(pieces.1), pieces));
        }
        Ok(options)
    }
}

impl Processor for EncodecProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        _inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let sounds = self.read(files_of(method, files, "raw_audio")?)?;
        self.prepare(&sounds, &self.options(arguments, &sounds)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sound(channels: usize, length: usize) -> Sound {
        Sound { channels: vec![vec![0.5; length]; channels], rate: 100 }
    }

    #[test]
    fn sounds_come_to_whole_pieces() -> Result<(), SessionError> {
        let config = json!({"sampling_rate": 100, "feature_size": 2, "chunk_length_s": 0.1, "overlap": 0.2});
        let processor = EncodecProcessor::from_config(&config)?;
        let sounds = [sound(2, 19), sound(2, 11)];
        let arguments = |value: Value| value.as_object().cloned().unwrap_or_default();
        let tensors = processor.prepare(&sounds, &processor.options(&arguments(json!({})), &sounds)?)?;
        // pieces of 10 from 0, 8 and 16
        assert_eq!(tensors["input_values"].dims(), [2, 2, 26]);
        assert_eq!(tensors["padding_mask"].sum_all()?.to_scalar::<i32>()?, 30);
        let cut = processor.options(&arguments(json!({"truncation": true})), &sounds)?;
        assert_eq!(processor.prepare(&sounds, &cut)?["input_values"].dims(), [2, 2, 10]);
        let both = processor.options(&arguments(json!({"truncation": true, "padding": true})), &sounds);
        assert!(both.is_err_and(|error| error.to_string().starts_with("input `truncation`")));
        let plain = processor.options(&arguments(json!({"padding": false})), &sounds)?;
        assert!(processor.prepare(&sounds, &plain).is_err());
        assert!(!processor.prepare(&sounds[..1], &plain)?.contains_key("padding_mask"));
        Ok(())
    }

    #[test]
    fn fields_that_are_not_supported_are_named() {
        let message = |config: Value| EncodecProcessor::from_config(&config).err().map(|e| e.to_string());
        for (config, field) in [
            (json!({"feature_size": 3}), "`feature_size`: 3 is neither 1 nor 2"),
            (json!({"padding_side": "left"}), "`padding_side`"),
            (json!({"feature_extractor_type": "WhisperFeatureExtractor"}), "`feature_extractor_type`"),
            (json!({"sampling_rate": 0}), "`sampling_rate`: is 0"),
        ] {
            assert!(message(config).is_some_and(|message| message.contains(field)), "{field}");
        }
    }
}
