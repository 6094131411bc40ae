//! Speech of a text: SpeechT5 with a voice, and its vocoder.

use std::path::Path;

use candle_core::{DType, Tensor};
use roofbench_core::session::{Arguments, Call, ModelSpec, Session, SessionError, Tensors};
use roofbench_core::task::{Answer, RawInputs, Task};
use roofbench_core::weights::{Weights, synthetic};
use serde_json::Value;

use crate::audio::Sound;
use crate::models::speecht5::{self, SpeechT5Config};
use crate::tokenize::Tokenizer;

/// Samples a second of the checkpoints, and between two of their spectra, 16 ms.
const RATE: u32 = 16_000;
const HOP: usize = 256;

/// A model that speaks.
struct Speak {
    raw: RawInputs,
    arguments: Arguments,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    /// (1, width)
    speaker: Tensor,
}

/// Speaks one text, in the voice `speaker`: a .npy file of the numbers of one, or a seed to draw them from.
pub(super) fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    raw.expect(&spec.family, &["text"])?;
    if raw.texts.len() > 1 {
        return Err(SessionError::input("--text", "one text at a time is spoken; join them, or run them one by one"));
    }
    let tokenizer = Tokenizer::beside(weights)?.ok_or_else(|| {
        let reason = "needs spm_char.model or tokenizer.json beside the weights, which turns it into tokens";
        SessionError::input("--text", reason)
    })?;
    let mut arguments = raw.arguments.clone();
    let width = SpeechT5Config::from_spec(spec)?.speaker_embedding_dim;
    let speaker = speaker(arguments.remove("speaker").as_ref(), width)?.to_device(&spec.device)?;
    match speecht5::vocoder_weights(spec, weights)? {
        Some(_) => {
            arguments.entry("vocoder").or_insert(true.into());
        }
        None if raw.save.is_some() => {
            let reason = "needs the vocoder: put microsoft/speecht5_hifigan in the folder `vocoder` beside the weights";
            return Err(SessionError::input("--save", reason));
        }
        None => {}
    }
    Ok(Box::new(Speak { raw, arguments, tokenizer, spec: spec.clone(), speaker }))
}

/// The numbers of a voice: (1, width).
fn speaker(argument: Option<&Value>, width: usize) -> Result<Tensor, SessionError> {
    let seed = match argument {
        None | Some(Value::Null) => 0,
        Some(Value::String(path)) => {
            let refuse = |reason: String| SessionError::File { path: path.into(), reason };
            let voice = Tensor::read_npy(Path::new(path)).map_err(|error| refuse(error.to_string()))?;
            if voice.elem_count() != width {
                let reason = format!("holds {} numbers, the model takes {width} for a voice", voice.elem_count());
                return Err(refuse(reason));
            }
            return Ok(voice.to_dtype(DType::F32)?.reshape((1, width))?);
        }
        Some(value) => value.as_u64().ok_or_else(|| {
            SessionError::input("speaker", format!("is {value}, expected a .npy file or a seed to draw a voice from"))
        })?,
    };
    let voice = synthetic::uniform("speaker", width, seed, 0)?;
    Ok(Tensor::from_vec(voice, (1, width), &candle_core::Device::Cpu)?)
}

impl Speak {
    /// Samples of the speech in `outputs`; where there is no vocoder, those that one would make.
    fn samples(&self, outputs: &Tensors) -> Result<usize, SessionError> {
        Ok(match (outputs.get("waveform"), outputs.get("spectrogram")) {
            (Some(waveform), _) => waveform.elem_count(),
            (None, Some(spectra)) => spectra.dim(0)? * HOP,
            (None, None) => return Err(SessionError::input("waveform", "is no output of this class")),
        })
    }
}

impl Task for Speak {
    fn preparation(&self) -> &'static str {
        "tokenization"
    }

    fn call(&self) -> Result<Call, SessionError> {
        let ids = self.tokenizer.encode(self.raw.texts.first().map_or("", String::as_str))?;
        if ids.is_empty() {
            return Err(SessionError::input("--text", "has nothing to say"));
        }
        let ids = Tensor::from_slice(&ids, (1, ids.len()), &self.spec.device)?;
        let inputs = [("input_ids".to_owned(), ids), ("speaker_embeddings".to_owned(), self.speaker.clone())];
        Ok(Call { method: "generate_speech".to_owned(), inputs: inputs.into(), arguments: self.arguments.clone() })
    }

    fn amount(&self, _: &Call, outputs: &Tensors) -> Result<Option<f64>, SessionError> {
        Ok(Some(self.samples(outputs)? as f64 / f64::from(RATE)))
    }

    fn answer(&self, _: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let seconds = self.samples(outputs)? as f64 / f64::from(RATE);
        let Some(waveform) = outputs.get("waveform") else {
            let text = format!("spectra of {seconds:.2} s of speech; with the vocoder they are heard");
            return Ok(vec![Answer::Text(text)]);
        };
        let channels = vec![waveform.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?];
        let said = format!("{seconds:.2} s of speech");
        match &self.raw.save {
            Some(path) => {
                Sound { channels, rate: RATE }.write(path)?;
                Ok(vec![Answer::Text(said), Answer::Saved(path.clone())])
            }
            None => Ok(vec![Answer::Text(format!("{said}; --save FILE keeps it"))]),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn voices_are_drawn_or_read() -> Result<(), SessionError> {
        let flat = |voice: Tensor| voice.flatten_all()?.to_vec1::<f32>();
        assert_ne!(flat(speaker(None, 4)?)?, flat(speaker(Some(&json!(1)), 4)?)?);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("voice.npy");
        Tensor::new(&[0.5f32, 1.0, -1.0, 2.0], &candle_core::Device::Cpu)?.write_npy(&path)?;
        let path = json!(path.to_str());
        assert_eq!(flat(speaker(Some(&path), 4)?)?, [0.5, 1.0, -1.0, 2.0]);
        assert!(speaker(Some(&path), 5).is_err_and(|error| error.to_string().contains("4 numbers")));
        assert!(speaker(Some(&json!("no.npy")), 5).is_err_and(|error| error.to_string().starts_with("no.npy: ")));
        assert!(speaker(Some(&json!(-1)), 5).is_err());
        Ok(())
    }
}
