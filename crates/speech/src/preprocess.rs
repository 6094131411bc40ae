//! From audio to the inputs of a model by `preprocessor_config.json`: as `transformers.Wav2Vec2FeatureExtractor` makes
//! them, and below those of other families.

mod encodec;
mod log_mel;
mod speecht5;
mod whisper;

pub use encodec::EncodecProcessor;
pub use speecht5::SpeechT5Processor;
pub use whisper::WhisperProcessor;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use serde::Deserialize;
use serde_json::Value;

use crate::audio::Sound;

/// Added to the variance.
const EPS: f64 = 1e-7;
/// More samples in a batch than any machine holds: an argument is wrong.
const LARGEST: usize = 1 << 34;

/// Waveforms, each normalised to mean 0 and variance 1, and padded to one length.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct WaveformProcessor {
    /// Samples a second that the model takes.
    pub sampling_rate: u32,
    /// What follows a sound that is shorter than others.
    pub padding_value: f32,
    /// Whether sounds are normalised.
    pub do_normalize: bool,
    /// Whether there is an `attention_mask`, where the call does not say. Without one the padding counts as sound, in
    /// mean and variance too.
    pub return_attention_mask: bool,
    feature_size: usize,
    padding_side: String,
}

impl Default for WaveformProcessor {
    fn default() -> Self {
        Self {
            sampling_rate: 16_000,
            padding_value: 0.0,
            do_normalize: true,
            return_attention_mask: false,
            feature_size: 1,
            padding_side: "right".to_owned(),
        }
    }
}

/// How sounds come to one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// They have one.
    None,
    /// That of the longest.
    Longest,
    /// This.
    To(usize),
}

/// The plain arguments of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How sounds come to one length.
    pub padding: Padding,
    /// Samples after which a sound is cut off.
    pub cut: Option<usize>,
    /// The length is a multiple of this.
    pub multiple_of: Option<usize>,
    /// Whether there is an `attention_mask`.
    pub attention_mask: bool,
}

/// What holds where a call says nothing.
#[derive(Debug, Clone, Copy)]
struct Defaults {
    sampling_rate: u32,
    padding: Padding,
    max_length: Option<usize>,
    truncation: bool,
    attention_mask: bool,
}

impl Options {
    /// From the plain arguments of a call.
    fn read(arguments: &Arguments, defaults: &Defaults) -> Result<Self, SessionError> {
        let refuse = |name: &str, value: &Value, expected: &str| {
            Err(SessionError::input(name, format!("is {value}, expected {expected}")))
        };
        let Defaults { sampling_rate, padding, mut max_length, mut truncation, attention_mask } = *defaults;
        let mut options = Self { padding, cut: None, multiple_of: None, attention_mask };
        for (name, value) in arguments.iter().filter(|(_, value)| !value.is_null()) {
            let size = || match value.as_u64().map(usize::try_from) {
                Some(Ok(size)) if size > 0 => Ok(Some(size)),
                _ => refuse(name, value, "a number of 1 or more").map(|()| None),
            };
            let flag = || value.as_bool().map_or_else(|| refuse(name, value, "true or false").map(|()| false), Ok);
            match (name.as_str(), value) {
                ("sampling_rate", rate) if rate.as_u64() == Some(sampling_rate.into()) => {}
                ("sampling_rate", rate) => {
                    return refuse(name, rate, &format!("{sampling_rate}, which the model was trained on"))
                        .map(|()| options);
                }
                ("padding", Value::Bool(false)) => options.padding = Padding::None,
                ("padding", Value::Bool(true)) => options.padding = Padding::Longest,
                ("padding", Value::String(way)) => match way.as_str() {
                    "do_not_pad" => options.padding = Padding::None,
                    "longest" => options.padding = Padding::Longest,
                    "max_length" => options.padding = Padding::To(0),
                    _ => return refuse(name, value, "longest, max_length or do_not_pad").map(|()| options),
                },
                ("max_length", _) => max_length = size()?,
                ("truncation", _) => truncation = flag()?,
                ("pad_to_multiple_of", _) => options.multiple_of = size()?,
                ("return_attention_mask", _) => options.attention_mask = flag()?,
                _ => {
                    let supported = "sampling_rate, padding, max_length, truncation, pad_to_multiple_of, \
                                     return_attention_mask";
                    return Err(SessionError::input(name, format!("is not supported; supported: {supported}")));
                }
            }
        }
        if max_length.is_none() && (truncation || options.padding == Padding::To(0)) {
            return Err(SessionError::input("max_length", "is missing: padding or truncation to it is asked for"));
        }
        if let (Padding::To(length), Some(max_length)) = (&mut options.padding, max_length) {
            *length = max_length;
        }
        options.cut = max_length.filter(|_| truncation);
        Ok(options)
    }

    fn rounded(&self, length: usize) -> usize {
        self.multiple_of.map_or(length, |multiple| length.next_multiple_of(multiple))
    }

    /// The length after which a sound is cut off.
    fn most(&self) -> Option<usize> {
        self.cut.map(|cut| self.rounded(cut))
    }

    /// The one length that sounds of `lengths` come to, counted in `unit`.
    fn length(&self, lengths: &[usize], unit: &str) -> Result<usize, SessionError> {
        let longest = lengths.iter().copied().max().unwrap_or_default();
        if lengths.contains(&0) || longest == 0 {
            return Err(SessionError::input("raw_speech", format!("a sound without {unit}, or none at all")));
        }
        let length = match self.padding {
            Padding::None => longest,
            Padding::Longest => self.rounded(longest),
            Padding::To(length) => self.rounded(length),
        };
        if let Some(other) = lengths.iter().find(|found| match self.padding {
            Padding::None => **found != length,
            _ => **found > length,
        }) {
            let way_out = "set padding to true, or truncation with max_length";
            let reason = format!("sounds of {other} and {length} {unit} make no batch; {way_out}");
            return Err(SessionError::input("padding", reason));
        }
        if lengths.len().checked_mul(length).is_none_or(|all| all > LARGEST) {
            let reason = format!("{} sounds of {length} {unit} are too many", lengths.len());
            return Err(SessionError::input("max_length", reason));
        }
        Ok(length)
    }
}

/// 1 where a sound of `lengths` has something: (batch, length) in i32.
fn mask(lengths: &[usize], length: usize) -> Result<Tensor, SessionError> {
    let rows = lengths.iter().flat_map(|&found| (0..length).map(move |i| i32::from(i < found))).collect();
    Ok(Tensor::from_vec(rows, (lengths.len(), length), &Device::Cpu)?)
}

/// A field of preprocessor_config.json that is refused.
fn refuse(field: &str, reason: String) -> SessionError {
    SessionError::Preprocessor { field: field.to_owned(), reason }
}

/// Reads `preprocessor_config.json`, which is to be that of `class`.
fn read_config<T: serde::de::DeserializeOwned>(config: &Value, class: &str) -> Result<T, SessionError> {
    match config.get("feature_extractor_type") {
        Some(other) if other != class => {
            Err(refuse("feature_extractor_type", format!("{other} is not supported; {class} is")))
        }
        _ => serde_path_to_error::deserialize(config)
            .map_err(|error| refuse(&error.path().to_string(), error.inner().to_string())),
    }
}

/// Sounds of files, mixed and resampled.
fn read_mono(files: &[PathBuf], rate: u32) -> Result<Vec<Vec<f32>>, SessionError> {
    files.iter().map(|path| Ok(Sound::read(path)?.resampled(rate)?.mono())).collect()
}

/// The files of the argument `name`, the only one that a processor takes for `preprocess`.
fn files_of<'a>(
    method: &str,
    files: &'a BTreeMap<String, Vec<PathBuf>>,
    name: &str,
) -> Result<&'a [PathBuf], SessionError> {
    preprocess_only(method)?;
    if let Some(other) = files.keys().find(|found| *found != name) {
        return Err(SessionError::input(other, format!("is not supported; supported: {name}")));
    }
    files.get(name).map(Vec::as_slice).ok_or_else(|| SessionError::input(name, "is missing"))
}

fn preprocess_only(method: &str) -> Result<(), SessionError> {
    match method {
        "preprocess" => Ok(()),
        _ => Err(SessionError::input("method", format!("`{method}` is not supported; supported: preprocess"))),
    }
}

impl WaveformProcessor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let read: Self = read_config(config, "Wav2Vec2FeatureExtractor")?;
        if read.feature_size != 1 {
            return Err(refuse("feature_size", format!("{} is not supported; 1 is", read.feature_size)));
        }
        if read.padding_side != "right" {
            return Err(refuse("padding_side", format!("{} is not supported; right is", read.padding_side)));
        }
        if read.sampling_rate == 0 {
            return Err(refuse("sampling_rate", "is 0".to_owned()));
        }
        Ok(read)
    }

    /// Reads, mixes and resamples audio files.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn read(&self, files: &[PathBuf]) -> Result<Vec<Vec<f32>>, SessionError> {
        read_mono(files, self.sampling_rate)
    }

    /// `input_values` (batch, samples) in f32 and, where asked for, `attention_mask` (batch, samples) in i32.
    ///
    /// # Errors
    /// [`SessionError::Input`] when there is no sound, or lengths differ and are not to be padded.
    pub fn prepare(&self, mut sounds: Vec<Vec<f32>>, options: &Options) -> Result<Tensors, SessionError> {
        if let Some(most) = options.most() {
            sounds.iter_mut().for_each(|sound| sound.truncate(most));
        }
        let lengths: Vec<usize> = sounds.iter().map(Vec::len).collect();
        let (batch, length) = (sounds.len(), options.length(&lengths, "samples")?);
        // without a mask, and where nothing is padded, the class takes a sound with all that follows it
        let counted = options.attention_mask && options.padding != Padding::None;
        let mut values = Vec::with_capacity(batch * length);
        for mut sound in sounds {
            if counted && self.do_normalize {
                normalise(&mut sound);
            }
            sound.resize(length, self.padding_value);
            if !counted && self.do_normalize {
                normalise(&mut sound);
            }
            values.append(&mut sound);
        }
        let values = Tensor::from_vec(values, (batch, length), &Device::Cpu)?;
        let mut tensors = Tensors::from([("input_values".into(), values)]);
        if options.attention_mask {
            tensors.insert("attention_mask".into(), mask(&lengths, length)?);
        }
        Ok(tensors)
    }

    fn options(&self, arguments: &Arguments) -> Result<Options, SessionError> {
        let defaults = Defaults {
            sampling_rate: self.sampling_rate,
            padding: Padding::None,
            max_length: None,
            truncation: false,
            attention_mask: self.return_attention_mask,
        };
        Options::read(arguments, &defaults)
    }
}

/// To mean 0 and variance 1.
fn normalise(sound: &mut [f32]) {
    let count = sound.len() as f64;
    let mean = sound.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let variance = sound.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + EPS).sqrt();
    sound.iter_mut().for_each(|x| *x = ((f64::from(*x) - mean) * scale) as f32);
}

impl Processor for WaveformProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        _inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let files = files_of(method, files, "raw_speech")?;
        let options = self.options(arguments)?;
        self.prepare(self.read(files)?, &options)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options(arguments: Value) -> Result<Options, SessionError> {
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        WaveformProcessor::default().options(&arguments)
    }

    #[test]
    fn a_mask_keeps_the_padding_out_of_mean_and_variance() -> Result<(), SessionError> {
        let processor = WaveformProcessor::default();
        let sounds = || vec![vec![1.0f32, 3.0], vec![1.0, 3.0, 1.0, 3.0]];
        let masked = Options { padding: Padding::Longest, cut: None, multiple_of: None, attention_mask: true };
        let tensors = processor.prepare(sounds(), &masked)?;
        let rows = tensors["input_values"].to_vec2::<f32>()?;
        assert!((rows[0][1] - 1.0).abs() < 1e-6 && rows[0][2..] == [0.0, 0.0], "{rows:?}");
        assert_eq!(tensors["attention_mask"].to_vec2::<i32>()?[0], [1, 1, 0, 0]);
        let plain = processor.prepare(sounds(), &Options { attention_mask: false, ..masked })?;
        let row = &plain["input_values"].to_vec2::<f32>()?[0];
        // mean 1, variance 1.5
        assert!((row[1] - 2.0 / 1.5f32.sqrt()).abs() < 1e-6 && (row[3] + 1.0 / 1.5f32.sqrt()).abs() < 1e-6, "{row:?}");
        let error = processor.prepare(sounds(), &Options { padding: Padding::None, ..masked }).unwrap_err();
        assert!(error.to_string().contains("set padding to true"), "{error}");
        Ok(())
    }

    #[test]
    fn arguments_are_read_or_refused_by_name() {
        let wanted = Options { padding: Padding::To(40), cut: Some(40), multiple_of: Some(32), attention_mask: false };
        let arguments =
            json!({"padding": "max_length", "max_length": 40, "truncation": true, "pad_to_multiple_of": 32});
        assert_eq!(options(arguments).unwrap(), wanted);
        for (arguments, start) in [
            (json!({"sampling_rate": 8000}), "input `sampling_rate`: is 8000, expected 16000"),
            (json!({"padding": "left"}), "input `padding`: is \"left\", expected longest"),
            (json!({"truncation": true}), "input `max_length`: is missing"),
            (json!({"max_length": 0}), "input `max_length`: is 0, expected a number of 1 or more"),
            (json!({"device": "cpu"}), "input `device`: is not supported"),
        ] {
            let message = options(arguments).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
        let config = |value| WaveformProcessor::from_config(&value).unwrap_err().to_string();
        assert!(config(json!({"padding_side": "left"})).contains("`padding_side`: left is not supported"));
        assert!(config(json!({"sampling_rate": "fast"})).contains("`sampling_rate`: "));
    }
}
