//! What people do with a multimodal model: compare pictures, texts and sounds, have a picture described, ask about it, chat
//! about several, turn a page into JSON, label words with boxes, and label videos.
//!
//! ```no_run
//! use roofbench_multimodal::{HubOptions, ModelSpec, RawInputs, Source, Unobserved, Weights, aliases, load, task};
//!
//! let (source, hub) = (Source::Local { path: "blip-vqa-base".into() }, HubOptions::from_env());
//! let folder = Weights::open(&source, &[], "", &hub)?;
//! let mut spec = ModelSpec::new("blip", "BlipForQuestionAnswering", folder.config()?);
//! spec.extra_configs = folder.extra_configs()?;
//! let weights = Weights::open(&source, aliases(&spec), &spec.class, &hub)?;
//! let mut session = load(&spec, &weights)?;
//!
//! let texts = ["how many boats are there?", "what is the weather like?"].map(String::from).to_vec();
//! let task = task(&spec, &weights, RawInputs { texts, images: vec!["lake.jpg".into()], ..Default::default() })?;
//! let call = task.call()?;
//! let outputs = session.call(&call, &mut Unobserved)?; // the picture is seen once
//! for answer in task.answer(&call, &outputs, session.as_mut())? {
//!     println!("{answer:?}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod document;
pub mod frames;

mod chat;
mod comparing;
mod labelling;
mod layout;
mod writing;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use roofbench_core::session::{Arguments, Call, ModelSpec, Processor, SessionError, Tensors};
use roofbench_core::task::{self, RawInputs, Task};
use roofbench_core::weights::Weights;
use roofbench_text::tasks;
use roofbench_text::tokenize::Tokenizer;
use serde_json::Value;

/// The kinds of raw inputs that `family` takes; none for a family that is not one of [`FAMILIES`](crate::FAMILIES).
pub fn raw_inputs(family: &str) -> &'static [&'static str] {
    match family {
        "imagebind" => &["text", "image", "audio"],
        "videomae" => &["image"],
        family if crate::FAMILIES.contains(&family) => &["text", "image"],
        _ => &[],
    }
}

/// What people use the checkpoint of `spec` for, with the raw inputs that they gave.
///
/// # Errors
/// Inputs that the class has no use for, or files of the checkpoint that are missing or malformed.
pub fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    if !crate::FAMILIES.contains(&spec.family.as_str()) {
        return Err(crate::unknown_family(&spec.family));
    }
    let given = Given::new(spec, weights, raw)?;
    match spec.family.as_str() {
        "clip" if spec.class != "CLIPForImageClassification" => comparing::task(given),
        "blip" | "blip-2" if spec.class.ends_with("Retrieval") => comparing::task(given),
        "flava" | "imagebind" => comparing::task(given),
        "clip" | "vilt" | "videomae" => labelling::task(given),
        "layoutlm" => layout::task(given),
        _ => writing::task(given, weights),
    }
}

/// What a person gave, and what turns it into tensors.
struct Given {
    raw: RawInputs,
    spec: ModelSpec,
    /// Absent where there is nothing to tokenize and the checkpoint has none, as with made-up weights.
    tokenizer: Option<Tokenizer>,
    /// Absent where there is nothing to prepare.
    processor: Option<Box<dyn Processor>>,
}

impl Given {
    fn new(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Self, SessionError> {
        if raw.save.is_some() {
            return Err(SessionError::input("--save", format!("{} gives nothing to draw or to hear", spec.class)));
        }
        let tokenizer = match weights.file("tokenizer.json") {
            None if raw.texts.is_empty() => None,
            _ => Some(tasks::tokenizer(weights)?),
        };
        let prepares = !raw.images.is_empty() || !raw.audio.is_empty();
        let processor = prepares.then(|| crate::processor(&spec.family, &spec.extra_configs)).transpose()?;
        Ok(Self { raw, spec: spec.clone(), tokenizer, processor })
    }

    /// Refuses kinds that the class has no use for, and the absence of those that it needs; `optional` may be either.
    fn expect(&self, needed: &[&'static str], optional: &[&'static str]) -> Result<(), SessionError> {
        let given = self.raw.kinds();
        let also = optional.iter().filter(|kind| given.contains(kind));
        self.raw.expect(&self.spec.class, &needed.iter().chain(also).copied().collect::<Vec<_>>())
    }

    /// `preparation` of a [`Task`].
    fn preparation(&self) -> &'static str {
        if self.processor.is_some() { "preprocessing" } else { "tokenization" }
    }

    fn tokenizer(&self) -> Result<&Tokenizer, SessionError> {
        let missing = || SessionError::input("--text", "needs the checkpoint's tokenizer.json");
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    /// A field of config.json.
    fn field(&self, name: &str) -> Option<&Value> {
        self.spec.config.get(name).filter(|value| !value.is_null())
    }

    /// What the class's processor makes of `files`, which it calls `name`.
    fn prepared(&self, name: &str, files: &[PathBuf]) -> Result<Tensors, SessionError> {
        let Some(processor) = &self.processor else {
            return Err(SessionError::input("--image", "is missing"));
        };
        let files = BTreeMap::from([(name.to_owned(), files.to_vec())]);
        processor.call("preprocess", &files, &Tensors::new(), &Arguments::new())
    }

    /// The pictures, each once.
    fn pictures(&self) -> Result<Tensors, SessionError> {
        self.prepared("images", &self.raw.images)
    }

    /// The tokens of each text, with the special tokens that the checkpoint's own tokenizer puts around it.
    fn tokens(&self) -> Result<Vec<Vec<i64>>, SessionError> {
        let tokenizer = self.tokenizer()?;
        self.raw.texts.iter().map(|text| tokenizer.ids(text, true)).collect()
    }

    fn texts(&self) -> Vec<String> {
        self.raw.texts.iter().map(|text| task::shortened(text)).collect()
    }

    fn images(&self) -> Vec<String> {
        self.raw.images.iter().map(|path| path.display().to_string()).collect()
    }

    /// A call of `method` with the arguments that were given, but for those that are the task's `own`.
    fn call(&self, method: &str, inputs: Tensors, own: &[&str]) -> Result<Call, SessionError> {
        let on_device = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(&self.spec.device)?));
        let inputs = inputs.into_iter().map(on_device).collect::<candle_core::Result<_>>()?;
        let mut arguments = self.raw.arguments.clone();
        arguments.retain(|name, _| !own.contains(&name.as_str()));
        Ok(Call { method: method.to_owned(), inputs, arguments })
    }

    /// The output `name` of a call.
    fn output<'a>(&self, outputs: &'a Tensors, name: &str) -> Result<&'a Tensor, SessionError> {
        let reason = || SessionError::input(name, format!("is no output of {}", self.spec.class));
        outputs.get(name).ok_or_else(reason)
    }
}

/// Which picture and which text stand in each place of a batch: one of a kind stands beside all of the other.
fn pairs(pictures: usize, texts: usize) -> Result<Vec<[usize; 2]>, SessionError> {
    let batch = pictures.max(texts);
    if [pictures, texts].iter().any(|count| *count != 1 && *count != batch) {
        let reason = format!("is given {texts} times, --image {pictures} times; give one of either, or as many");
        return Err(SessionError::input("--text", reason));
    }
    let place = |count: usize, item: usize| if count == 1 { 0 } else { item };
    Ok((0..batch).map(|item| [place(pictures, item), place(texts, item)]).collect())
}

/// The rows `items` of `x`, one after the other.
fn rows(x: &Tensor, items: &[usize]) -> candle_core::Result<Tensor> {
    let items: Vec<u32> = items.iter().map(|item| *item as u32).collect();
    x.index_select(&Tensor::new(items, x.device())?, 0)
}

/// Where sequences shorter than others are filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

/// Sequences of different lengths as `input_ids` and `attention_mask` (batch, longest).
fn padded(sequences: &[Vec<i64>], pad: i64, side: Side) -> candle_core::Result<[Tensor; 2]> {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let filled = |row: &[i64], with: i64| {
        let fill = vec![with; longest - row.len()];
        match side {
            Side::Left => [&fill[..], row].concat(),
            Side::Right => [row, &fill[..]].concat(),
        }
    };
    let ids = sequences.iter().flat_map(|row| filled(row, pad)).collect();
    let mask = sequences.iter().flat_map(|row| filled(&vec![1; row.len()], 0)).collect();
    let matrix = |values: Vec<i64>| Tensor::from_vec(values, (sequences.len(), longest), &Device::Cpu);
    Ok([matrix(ids)?, matrix(mask)?])
}

/// [`padded`] by the names that classes give them.
fn with_mask(sequences: &[Vec<i64>], pad: i64, side: Side) -> candle_core::Result<Tensors> {
    let [ids, mask] = padded(sequences, pad, side)?;
    Ok([("input_ids".to_owned(), ids), ("attention_mask".to_owned(), mask)].into())
}

/// Of a field of config.json that may be missing.
fn token(config: &Value, name: &str) -> Option<i64> {
    config.get(name).and_then(Value::as_i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stands_beside_all() -> Result<(), SessionError> {
        assert_eq!(pairs(1, 3)?, [[0, 0], [0, 1], [0, 2]]);
        assert_eq!(pairs(2, 1)?, [[0, 0], [1, 0]]);
        assert_eq!(pairs(2, 2)?, [[0, 0], [1, 1]]);
        let error = pairs(2, 3).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("--text") && error.contains("3 times, --image 2 times"), "{error}");
        Ok(())
    }

    #[test]
    fn sequences_are_filled_up_on_either_side() -> candle_core::Result<()> {
        let sequences = [vec![5, 6, 7], vec![8]];
        for (side, ids, mask) in [
            (Side::Left, [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
            (Side::Right, [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ] {
            let [found_ids, found_mask] = padded(&sequences, 0, side)?;
            assert_eq!(found_ids.to_vec2::<i64>()?, ids);
            assert_eq!(found_mask.to_vec2::<i64>()?, mask);
        }
        Ok(())
    }
}
