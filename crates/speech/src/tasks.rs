//! What people do with a speech model: texts of what is said, speech of texts, sound through a codec, voices and how alike
//! they are, labels.
//!
//! A sound of up to [`LONGEST`] seconds (30 for Whisper) is one call. A longer one, or any with the argument `chunk`, is
//! fed window by window, as it is decoded: the memory that takes does not depend on its length.

mod speak;
mod windows;
mod words;

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use roofbench_core::session::{Arguments, Call, ModelSpec, Session, SessionError, Tensors, Unobserved};
use roofbench_core::task::{self, Answer, RawInputs, Task};
use roofbench_core::weights::Weights;
use roofbench_core::{classify, embeddings};
use roofbench_nn::options;
use serde_json::Value;

use crate::audio::{Feed, Sound};
use crate::ctc::CtcDecoder;
use crate::preprocess::{EncodecProcessor, Options, Padding, SpeechT5Processor, WaveformProcessor, WhisperProcessor};
use crate::tokenize::Tokenizer;
use words::Words;

/// Seconds of sound that are one call, where the class does not take fewer.
pub const LONGEST: f64 = 60.0;
/// Seconds of a window of a longer sound, where `chunk` does not say.
const WINDOW: f64 = 30.0;

/// The preparation of sound for a family.
enum Features {
    Waveform(WaveformProcessor),
    Whisper(WhisperProcessor),
    SpeechT5(SpeechT5Processor),
    Encodec(EncodecProcessor),
}

impl Features {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        let config = crate::preprocessor_config(&spec.extra_configs)?;
        Ok(match spec.family.as_str() {
            "encodec" => Self::Encodec(EncodecProcessor::from_config(config)?),
            "whisper" => Self::Whisper(WhisperProcessor::from_config(config)?),
            "speecht5" => Self::SpeechT5(SpeechT5Processor::from_config(config)?),
            _ => Self::Waveform(WaveformProcessor::from_config(config)?),
        })
    }

    fn rate(&self) -> u32 {
        match self {
            Self::Waveform(processor) => processor.sampling_rate,
            Self::Whisper(processor) => processor.sampling_rate(),
            Self::SpeechT5(processor) => processor.sampling_rate(),
            Self::Encodec(processor) => processor.sampling_rate,
        }
    }

    fn channels(&self) -> usize {
        match self {
            Self::Encodec(processor) => processor.feature_size,
            _ => 1,
        }
    }

    /// The inputs of a call for `sounds`, which are at [`Self::rate`] with [`Self::channels`].
    fn prepare(&self, sounds: &[Sound], device: &Device) -> Result<Tensors, SessionError> {
        let mono = || sounds.iter().map(Sound::mono).collect::<Vec<_>>();
        let options =
            |attention_mask| Options { padding: Padding::Longest, cut: None, multiple_of: None, attention_mask };
        let tensors = match self {
            Self::Waveform(processor) => processor.prepare(mono(), &options(processor.return_attention_mask))?,
            Self::SpeechT5(processor) => processor.waveforms(mono(), &options(true))?,
            Self::Whisper(processor) => {
                let samples = processor.samples();
                let padding = Padding::To(samples);
                processor.prepare(mono(), &Options { padding, cut: Some(samples), ..options(false) }, false)?
            }
            Self::Encodec(processor) => processor.prepare(sounds, &processor.options(&Arguments::new(), sounds)?)?,
        };
        let placed = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(device)?)));
        Ok(placed.collect::<candle_core::Result<_>>()?)
    }
}

/// What comes of the sound.
enum Answers {
    /// Frames of characters, with their names where the checkpoint has them.
    Frames(Option<CtcDecoder>),
    /// Words of Whisper.
    Words(Box<Words>),
    /// Tokens of an encoder-decoder, with their names where the checkpoint has them.
    Tokens(Option<Box<Tokenizer>>),
    Codec {
        codebook_size: u32,
    },
    Voices,
    Labels,
    FrameLabels,
    States,
}

/// A model that listens to files.
struct Listen {
    raw: RawInputs,
    /// Those of the call.
    arguments: Arguments,
    features: Features,
    answers: Answers,
    device: Device,
    config: Value,
    chunk: Option<f64>,
    /// Of the last call.
    heard: RefCell<Heard>,
}

/// What a call takes of each file.
#[derive(Default)]
struct Heard {
    sounds: Vec<Sound>,
    /// It is the first window of longer sounds.
    is_window: bool,
}

/// The task of `spec`: what its class gives decides the answer.
///
/// Beside those of the class these arguments are read: `chunk`, the seconds of a window, and for speech `speaker`.
///
/// # Errors
/// Inputs that the class has no use for, or files of the checkpoint that are missing or malformed.
pub fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    let class = spec.class.as_str();
    if class == "SpeechT5ForTextToSpeech" {
        return speak::task(spec, weights, raw);
    }
    if class == "SpeechT5HifiGan" {
        let reason = "the vocoder takes spectrograms; run SpeechT5ForTextToSpeech with it in its folder `vocoder`";
        return Err(SessionError::input("--audio", reason));
    }
    raw.expect(&spec.family, &["audio"])?;
    let tokenizer = || Tokenizer::beside(weights);
    let features = Features::of(spec)?;
    let has = |end: &str| class.ends_with(end);
    let answers = if has("ForCTC") {
        let folder = weights.file("vocab.json").and_then(|path| path.parent().map(Path::to_owned));
        Answers::Frames(folder.map(|folder| CtcDecoder::from_folder(&folder)).transpose()?)
    } else if has("ForConditionalGeneration") {
        Answers::Words(Box::new(Words::new(spec, tokenizer()?)))
    } else if has("ForSpeechToText") {
        Answers::Tokens(tokenizer()?.map(Box::new))
    } else if has("ForAudioFrameClassification") {
        Answers::FrameLabels
    } else if has("Classification") {
        Answers::Labels
    } else if has("ForXVector") {
        Answers::Voices
    } else if spec.family == "encodec" {
        let size = spec.config.get("codebook_size").and_then(Value::as_u64).and_then(|size| u32::try_from(size).ok());
        Answers::Codec { codebook_size: size.unwrap_or(1024) }
    } else {
        Answers::States
    };
    if raw.save.is_some() && !matches!(answers, Answers::Codec { .. }) {
        return Err(SessionError::input("--save", format!("{class} makes no sound that could be kept")));
    }
    let mut arguments = raw.arguments.clone();
    let chunk = match arguments.remove("chunk") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let most = if spec.family == "whisper" { WINDOW } else { LONGEST };
            let seconds = value.as_f64().filter(|seconds| (1.0..=most).contains(seconds));
            let refuse = || SessionError::input("chunk", format!("is {value}, expected 1 to {most} seconds"));
            Some(seconds.ok_or_else(refuse)?)
        }
    };
    let listen = Listen {
        raw,
        arguments,
        features,
        answers,
        device: spec.device.clone(),
        config: spec.config.clone(),
        chunk,
        heard: RefCell::default(),
    };
    if chunk.is_some() && !listen.takes_windows() {
        let reason = format!("is for recognisers and codecs; {class} hears a sound as a whole");
        return Err(SessionError::input("chunk", reason));
    }
    Ok(Box::new(listen))
}

impl Listen {
    /// A sound is heard in windows, one after the other, where it is long.
    fn takes_windows(&self) -> bool {
        match self.answers {
            Answers::Frames(_) | Answers::Words(_) | Answers::Tokens(_) | Answers::Codec { .. } => true,
            Answers::Voices | Answers::Labels | Answers::FrameLabels | Answers::States => false,
        }
    }

    fn samples(&self, seconds: f64) -> usize {
        (seconds * f64::from(self.features.rate())) as usize
    }

    /// The most samples of one call.
    fn limit(&self) -> usize {
        let longest = if matches!(self.features, Features::Whisper(_)) { WINDOW } else { LONGEST };
        self.samples(self.chunk.unwrap_or(longest))
    }

    /// Samples of a window of a longer sound.
    fn window(&self) -> usize {
        self.samples(self.chunk.unwrap_or(WINDOW))
    }

    fn open(&self, path: &Path) -> Result<Feed, SessionError> {
        let overlapped = options::current().overlapped_decoding;
        Feed::open(path, self.features.rate(), self.features.channels(), overlapped)
    }

    fn call_of(&self, sounds: &[Sound]) -> Result<Call, SessionError> {
        let inputs = self.features.prepare(sounds, &self.device)?;
        let mut arguments = self.arguments.clone();
        let method = match &self.answers {
            Answers::Words(words) => {
                words.complete(&mut arguments);
                "generate"
            }
            Answers::Tokens(_) => "generate",
            _ => "forward",
        };
        Ok(Call { method: method.to_owned(), inputs, arguments })
    }

    /// The outputs for one sound.
    fn hear(&self, sound: Sound, session: &mut dyn Session) -> Result<Tensors, SessionError> {
        session.call(&self.call_of(&[sound])?, &mut Unobserved)
    }

    fn names(&self) -> Vec<String> {
        self.raw.audio.iter().map(|path| file_name(path)).collect()
    }
}

/// The last part of a path.
fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// An output by its name.
fn output<'a>(outputs: &'a Tensors, name: &str) -> Result<&'a Tensor, SessionError> {
    outputs.get(name).ok_or_else(|| SessionError::input(name, "is no output of this class"))
}

/// Ids for who has no vocabulary to read them.
fn numbers<T: ToString>(ids: impl IntoIterator<Item = T>) -> String {
    task::shortened(&ids.into_iter().map(|id| id.to_string()).collect::<Vec<_>>().join(" "))
}

/// The likeliest of the last dimension: (batch, frames, vocab) → batch of frames.
fn best(logits: &Tensor) -> Result<Vec<Vec<u32>>, SessionError> {
    Ok(logits.to_dtype(DType::F32)?.argmax(D::Minus1)?.to_vec2::<u32>()?)
}

/// The text of frames, or their numbers without repeats.
fn characters(decoder: Option<&CtcDecoder>, ids: &[u32]) -> String {
    match decoder {
        Some(decoder) => decoder.text(ids),
        None => numbers(ids.chunk_by(|one, other| one == other).map(|ids| ids[0])),
    }
}

/// The text of tokens, or their numbers.
fn text(tokenizer: Option<&Tokenizer>, ids: &[i64]) -> Result<String, SessionError> {
    match tokenizer {
        Some(tokenizer) => Ok(tokenizer.decode(ids)?.trim().to_owned()),
        None => Ok(numbers(ids)),
    }
}

/// The header of texts; `file` is what names their tokens.
fn texts(rows: Vec<Vec<String>>, is_read: bool, file: &str) -> Answer {
    match is_read {
        true => Answer::table(&["input", "text"], rows),
        false => Answer::table(&["input", &format!("tokens (no {file} beside the weights)")], rows),
    }
}

/// What a codec did to sound.
#[derive(Debug, Default, Clone, Copy)]
struct Quality {
    signal: f64,
    noise: f64,
    bits: f64,
    seconds: f64,
}

impl Quality {
    /// `made` (channels, samples) of `sound`, with `codes` of so many bits each.
    fn of(sound: &Sound, made: &[Vec<f32>], codes: usize, bits: u32) -> Self {
        let mut quality = Self { bits: codes as f64 * f64::from(bits), seconds: sound.seconds(), ..Self::default() };
        for (was, is) in sound.channels.iter().zip(made) {
            for (was, is) in was.iter().zip(is).map(|(was, is)| (f64::from(*was), f64::from(*is))) {
                quality.signal += was * was;
                quality.noise += (was - is) * (was - is);
            }
        }
        quality
    }

    fn add(&mut self, other: Self) {
        self.signal += other.signal;
        self.noise += other.noise;
        self.bits += other.bits;
        self.seconds += other.seconds;
    }

    fn row(&self, name: &str) -> Vec<String> {
        let ratio = match self.signal > 0.0 && self.noise > 0.0 {
            true => format!("{:.1} dB", 10.0 * (self.signal / self.noise).log10()),
            false => "none: the sound is silence, or unchanged".to_owned(),
        };
        let rate = format!("{:.2} kbit/s", self.bits / self.seconds / 1000.0);
        vec![name.to_owned(), format!("{:.2}", self.seconds), rate, ratio]
    }
}

const QUALITY: [&str; 4] = ["input", "seconds", "bitrate", "signal-to-noise ratio"];

/// Samples by channel.
type Channels = Vec<Vec<f32>>;

/// What a codec made of each of `sounds`: its samples, as many as there were, and codes.
fn decoded(sounds: &[Sound], outputs: &Tensors) -> Result<Vec<(Channels, usize)>, SessionError> {
    let values = output(outputs, "audio_values")?.to_dtype(DType::F32)?.to_vec3::<f32>()?;
    let codes = output(outputs, "audio_codes")?;
    let (pieces, _, quantizers, frames) = codes.dims4()?;
    let longest = sounds.iter().map(Sound::len).max().unwrap_or_default().max(1);
    let of = |(sound, mut channels): (&Sound, Channels)| {
        channels.iter_mut().for_each(|channel| channel.truncate(sound.len()));
        // the part of the codes that is not of padding
        (channels, pieces * quantizers * (frames * sound.len()).div_ceil(longest))
    };
    Ok(sounds.iter().zip(values).map(of).collect())
}

/// The file for the `item`-th of `count` sounds.
fn numbered(path: &Path, item: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    let part =
        |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned()).unwrap_or_default();
    let extension = path.extension().map_or_else(String::new, |end| format!(".{}", end.to_string_lossy()));
    path.with_file_name(format!("{}-{}{extension}", part(path.file_stem()), item + 1))
}

impl Task for Listen {
    fn preparation(&self) -> &'static str {
        "audio decoding and feature extraction"
    }

    fn call(&self) -> Result<Call, SessionError> {
        let (limit, mut is_window) = (self.limit(), self.chunk.is_some());
        let mut feeds = Vec::with_capacity(self.raw.audio.len());
        for path in &self.raw.audio {
            let mut feed = self.open(path)?;
            let is_long = feed.fill(limit + 1)? > limit;
            if is_long && !self.takes_windows() {
                let seconds = limit as f64 / f64::from(self.features.rate());
                let reason = format!("lasts longer than the {seconds:.0} s that are heard at once; cut it");
                return Err(SessionError::File { path: path.clone(), reason });
            }
            is_window |= is_long;
            feeds.push(feed);
        }
        let length = if is_window { self.window() } else { limit };
        let sounds: Vec<Sound> = feeds.iter().map(|feed| feed.window(length)).collect();
        let mut call = self.call_of(&sounds)?;
        if let (true, Answers::Words(words)) = (is_window, &self.answers) {
            words.hold(&mut call.arguments, None);
        }
        *self.heard.borrow_mut() = Heard { sounds, is_window };
        Ok(call)
    }

    fn amount(&self, _: &Call, _: &Tensors) -> Result<Option<f64>, SessionError> {
        Ok(Some(self.heard.borrow().sounds.iter().map(Sound::seconds).sum()))
    }

    fn answer(&self, _: &Call, outputs: &Tensors, session: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let heard = self.heard.borrow();
        match heard.is_window {
            true => self.in_windows(session),
            false => self.at_once(&heard.sounds, outputs),
        }
    }
}

impl Listen {
    /// What `outputs` of one call for all of `sounds` mean.
    fn at_once(&self, sounds: &[Sound], outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        /// Labels shown for each sound.
        const TOP: usize = 5;
        let names = self.names();
        let rows = |texts: Vec<String>| names.iter().cloned().zip(texts).map(|(name, text)| vec![name, text]).collect();
        Ok(match &self.answers {
            Answers::Frames(decoder) => {
                let longest = sounds.iter().map(Sound::len).max().unwrap_or_default().max(1);
                let best = best(output(outputs, "logits")?)?;
                let of = |(sound, ids): (&Sound, &Vec<u32>)| {
                    // what follows is of padding
                    characters(decoder.as_ref(), &ids[..(ids.len() * sound.len()).div_ceil(longest)])
                };
                vec![texts(rows(sounds.iter().zip(&best).map(of).collect()), decoder.is_some(), "vocab.json")]
            }
            Answers::Words(words) => {
                let tokens = output(outputs, "sequences")?.to_vec2::<i64>()?;
                let parts = |(item, tokens): (usize, &Vec<i64>)| words.read(tokens, sounds[item].seconds());
                let parts = tokens.iter().enumerate().map(parts).collect::<Result<Vec<_>, _>>()?;
                vec![words.table(names.iter().cloned().zip(parts.into_iter().map(|window| window.segments)))]
            }
            Answers::Tokens(tokenizer) => {
                let tokens = output(outputs, "sequences")?.to_vec2::<i64>()?;
                let read = tokens.iter().map(|tokens| text(tokenizer.as_deref(), tokens));
                vec![texts(rows(read.collect::<Result<_, _>>()?), tokenizer.is_some(), "tokenizer.json")]
            }
            Answers::Codec { codebook_size } => {
                let (mut table, mut saved) = (Vec::new(), Vec::new());
                let decoded = decoded(sounds, outputs)?;
                for (item, ((sound, (channels, codes)), name)) in sounds.iter().zip(decoded).zip(&names).enumerate() {
                    table.push(Quality::of(sound, &channels, codes, codebook_size.ilog2()).row(name));
                    if let Some(path) = &self.raw.save {
                        let path = numbered(path, item, sounds.len());
                        Sound { channels, rate: sound.rate }.write(&path)?;
                        saved.push(Answer::Saved(path));
                    }
                }
                [Answer::table(&QUALITY, table)].into_iter().chain(saved).collect()
            }
            Answers::Voices => {
                let voices = output(outputs, "embeddings")?; // (batch, width)
                if names.len() == 1 {
                    let width = voices.dim(1)?;
                    let text = format!("a voice as {width} numbers; give a second --audio to compare it with");
                    return Ok(vec![Answer::Text(text)]);
                }
                vec![embeddings::table(&names, voices)?]
            }
            Answers::Labels => vec![classify::table(&names, output(outputs, "logits")?, &self.config, TOP)?],
            Answers::FrameLabels => vec![self.active(&names, sounds, output(outputs, "logits")?)?],
            Answers::States => vec![statistics(&names, outputs)?],
        })
    }

    /// For how long each label holds: its probability is more than a half, by itself, as of who speaks.
    fn active(&self, names: &[String], sounds: &[Sound], logits: &Tensor) -> Result<Answer, SessionError> {
        let labels = classify::labels(&self.config)?;
        let logits = logits.to_dtype(DType::F32)?.to_vec3::<f32>()?;
        let longest = sounds.iter().map(Sound::seconds).fold(0.0, f64::max);
        let mut rows = Vec::new();
        for ((name, frames), sound) in names.iter().zip(&logits).zip(sounds) {
            let step = longest / frames.len().max(1) as f64;
            let frames = &frames[..((sound.seconds() / step).round() as usize).min(frames.len())];
            rows.extend(task::grouped(
                name,
                labels.iter().enumerate().map(|(at, label)| {
                    let seconds =
                        step * frames.iter().filter(|row| row.get(at).is_some_and(|x| *x > 0.0)).count() as f64;
                    vec![label.clone(), format!("{seconds:.2} s of {:.2} s", sound.seconds())]
                }),
            ));
        }
        Ok(Answer::table(&["input", "label", "active"], rows))
    }
}

/// Numbers about the states of a base model.
fn statistics(names: &[String], outputs: &Tensors) -> Result<Answer, SessionError> {
    let states = output(outputs, "last_hidden_state")?.to_dtype(DType::F32)?;
    let mut rows = Vec::new();
    for (item, name) in names.iter().enumerate() {
        let states = states.get(item)?; // (frames, hidden)
        let values = states.flatten_all()?.to_vec1::<f32>()?;
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        let smallest = values.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (frames, hidden) = states.dims2()?;
        let cells = [mean, variance.sqrt(), smallest.into(), largest.into()].map(|x| format!("{x:.4}"));
        rows.push([name.clone(), format!("{frames} x {hidden}")].into_iter().chain(cells).collect());
    }
    let header = ["input", "frames x hidden", "mean", "standard deviation", "smallest", "largest"];
    Ok(Answer::table(&header, rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_of_a_known_error() {
        let sound = Sound { channels: vec![vec![1.0, -1.0, 1.0, -1.0]], rate: 4 };
        let quality = Quality::of(&sound, &[vec![0.9, -0.9, 0.9, -0.9]], 300, 10);
        // an error of a tenth is 20 dB; 3000 bits in a second
        assert_eq!(quality.row("x"), ["x", "1.00", "3.00 kbit/s", "20.0 dB"]);
        let mut both = quality;
        both.add(quality);
        assert_eq!(both.row("x")[1..], ["2.00", "3.00 kbit/s", "20.0 dB"]);
        assert!(Quality::of(&sound, &sound.channels, 1, 10).row("x")[3].starts_with("none"));
    }

    #[test]
    fn files_of_several_sounds_are_numbered() {
        let path = Path::new("folder/out.wav");
        assert_eq!(numbered(path, 0, 1), path);
        assert_eq!(numbered(path, 1, 3), Path::new("folder/out-2.wav"));
    }
}
