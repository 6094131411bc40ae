//! What people do with a text model: sentence embeddings and how alike they are, words for masks, labels, generated
//! texts.

use candle_core::{DType, Device, Tensor};
use roofbench_core::classify;
use roofbench_core::embeddings;
pub use roofbench_core::embeddings::{cosine_similarities, normalize};
use roofbench_core::generation;
use roofbench_core::session::{Call, ModelSpec, Session, SessionError, Tensors, Unobserved};
use roofbench_core::task::{self, Answer, RawInputs, Task};
use roofbench_core::weights::Weights;
use serde_json::Value;

use crate::tokenize::Tokenizer;

/// Embeds tokenised texts as sentence-transformers does: mean over tokens, then unit length (Reimers and Gurevych,
/// arXiv:1908.10084).
///
/// `session` is an encoder whose `forward` gives `last_hidden_state`; `inputs` come from
/// [`Tokenizer::encode`](crate::tokenize::Tokenizer::encode), and the mean is over all tokens where they hold no
/// `attention_mask`.
///
/// # Shapes
/// (batch, hidden), f32.
///
/// # Errors
/// The model's own; names `last_hidden_state` when the class has no such output.
pub fn embed(session: &mut dyn Session, inputs: Tensors) -> Result<Tensor, SessionError> {
    let mask = inputs.get("attention_mask").cloned();
    let call = Call { method: "forward".into(), inputs, ..Default::default() };
    let outputs = session.call(&call, &mut Unobserved)?;
    let hidden = outputs.get("last_hidden_state").ok_or_else(|| {
        SessionError::input(
            "last_hidden_state",
            "is no output of this class, and its mean is wanted; load a base class (BertModel)",
        )
    })?;
    let hidden = hidden.to_dtype(DType::F32)?; // (batch, seq, hidden)
    let pooled = match mask {
        Some(mask) => mean_pool(&hidden, &mask)?,
        None => hidden.mean(1)?,
    };
    Ok(normalize(&pooled)?)
}

/// Mean of `hidden` over the tokens that `mask` keeps; zeros where it keeps none.
///
/// # Shapes
/// `hidden` (batch, seq, width), `mask` (batch, seq) of 0 and 1; (batch, width).
///
/// # Errors
/// Other shapes.
///
/// ```
/// use roofbench_text::{candle_core::{Device, Tensor}, tasks::mean_pool};
/// let hidden = Tensor::new(&[[[1f32, 2.], [3., 6.], [9., 9.]]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1i64, 1, 0]], &Device::Cpu)?;
/// assert_eq!(mean_pool(&hidden, &mask)?.to_vec2::<f32>()?, [[2., 4.]]);
/// # Ok::<_, roofbench_text::candle_core::Error>(())
/// ```
pub fn mean_pool(hidden: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let mask = mask.to_dtype(hidden.dtype())?; // (batch, seq)
    let sum = mask.unsqueeze(1)?.matmul(hidden)?.squeeze(1)?; // (batch, width)
    let count = mask.sum_keepdim(1)?.maximum(1e-9)?; // (batch, 1)
    sum.broadcast_div(&count)
}

/// A word, and how likely a masked language model takes it to be.
pub type Filling = (String, f32);

/// The `top` likeliest words for each mask of each text; none for a text without masks.
///
/// # Shapes
/// `input_ids` (batch, seq), `logits` (batch, seq, vocab).
///
/// # Errors
/// Other shapes, or a tokenizer without a mask.
pub fn fill_mask(
    tokenizer: &Tokenizer,
    input_ids: &Tensor,
    logits: &Tensor,
    top: usize,
) -> Result<Vec<Vec<Vec<Filling>>>, SessionError> {
    let mask = i64::from(tokenizer.mask_token()?);
    let ids = input_ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
    let (batch, seq, _) = logits.dims3()?;
    if ids.len() != batch || ids.iter().any(|row| row.len() != seq) {
        let reason = format!("have shape {:?}, input_ids {:?}", logits.dims(), input_ids.dims());
        return Err(SessionError::input("logits", reason));
    }
    let filled = |item: usize, place: usize| {
        let scores = logits.get(item)?.get(place)?.to_dtype(DType::F32)?; // (vocab)
        let probabilities = candle_nn::ops::softmax(&scores, 0)?.to_vec1::<f32>()?;
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
        let word = |id: &usize| Ok((tokenizer.decode(&[*id as i64])?, probabilities[*id]));
        order.iter().take(top).map(word).collect::<Result<Vec<_>, SessionError>>()
    };
    ids.iter()
        .enumerate()
        .map(|(item, row)| {
            let places = row.iter().enumerate().filter(|(_, id)| **id == mask);
            places.map(|(place, _)| filled(item, place)).collect()
        })
        .collect()
}

/// The texts of `sequences` (batch, tokens) from token `start` on: of a decoder what follows a prompt of that length.
///
/// # Errors
/// Another shape, or a token that the tokenizer has not.
pub fn generated(tokenizer: &Tokenizer, sequences: &Tensor, start: usize) -> Result<Vec<String>, SessionError> {
    let rows = sequences.to_dtype(DType::I64)?.to_vec2::<i64>()?;
    rows.iter().map(|row| tokenizer.decode(row.get(start..).unwrap_or_default())).collect()
}

/// The tokenizer of a checkpoint.
///
/// # Errors
/// The weights have no `tokenizer.json` beside them, or it can't be read.
pub fn tokenizer(weights: &Weights) -> Result<Tokenizer, SessionError> {
    let path = weights.file("tokenizer.json").ok_or_else(|| {
        let source = weights.describe().source;
        SessionError::input(
            "--text",
            format!("{source} has no tokenizer.json, which turns text into tokens; put it beside the weights"),
        )
    })?;
    Tokenizer::from_file(path)
}

/// Tokens generated for a text when `max_new_tokens` is not given.
const NEW_TOKENS: u64 = 32;

/// A text model's task: what its class gives decides the answer.
struct TextTask {
    raw: RawInputs,
    tokenizer: Tokenizer,
    device: Device,
    config: Value,
    generates: bool,
    /// What a reader should know of the answer.
    note: Option<String>,
    has_segments: bool,
}

/// The task of `spec` for texts: similarities of sentences (a base class), words for masks (a masked language model),
/// labels (a classifier), or what follows (a class that generates).
///
/// # Errors
/// Other inputs than texts, or no tokenizer beside `weights`.
pub fn task(spec: &ModelSpec, weights: &Weights, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    let mut raw = raw;
    raw.expect(&spec.family, &["text"])?;
    let tokenizer = tokenizer(weights)?;
    let generates =
        ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"].iter().any(|end| spec.class.ends_with(end));
    let mut note = None;
    if generates {
        raw.arguments.entry("max_new_tokens").or_insert(NEW_TOKENS.into());
        note = generation::without_beams(spec, &mut raw.arguments);
    }
    Ok(Box::new(TextTask {
        note,
        raw,
        tokenizer,
        device: spec.device.clone(),
        config: spec.config.clone(),
        generates,
        // decoders and encoder-decoders have no segments
        has_segments: spec.family == "bert",
    }))
}

impl Task for TextTask {
    fn preparation(&self) -> &'static str {
        "tokenization"
    }

    fn call(&self) -> Result<Call, SessionError> {
        let mut inputs = self.tokenizer.encode(&self.raw.texts, &self.device)?;
        if !self.has_segments {
            inputs.remove("token_type_ids");
        }
        let method = if self.generates { "generate" } else { "forward" };
        Ok(Call { method: method.to_owned(), inputs, arguments: self.raw.arguments.clone() })
    }

    fn amount(&self, call: &Call, outputs: &Tensors) -> Result<Option<f64>, SessionError> {
        let (Some(ids), Some(sequences)) = (call.inputs.get("input_ids"), outputs.get("sequences")) else {
            return Ok(None);
        };
        let (batch, length) = sequences.dims2()?;
        Ok(Some((batch * (length - self.prompt_length(ids)?)) as f64))
    }

    fn answer(&self, call: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        /// Labels or words shown for each text or mask.
        const TOP: usize = 5;
        let names: Vec<String> = self.raw.texts.iter().map(|text| task::shortened(text)).collect();
        let Some(ids) = call.inputs.get("input_ids") else { return Ok(Vec::new()) };
        if let Some(sequences) = outputs.get("sequences") {
            let texts = generated(&self.tokenizer, sequences, self.prompt_length(ids)?)?;
            let rows = names.into_iter().zip(texts).map(|(name, text)| vec![name, text.trim().to_owned()]);
            let table = Answer::table(&["input", "generated"], rows.collect());
            return Ok([table].into_iter().chain(self.note.clone().map(Answer::Text)).collect());
        }
        let answer = match (outputs.get("logits"), outputs.get("last_hidden_state"), call.inputs.get("attention_mask"))
        {
            (Some(logits), ..) if logits.rank() == 2 => Some(classify::table(&names, logits, &self.config, TOP)?),
            (Some(logits), ..) if logits.rank() == 3 => {
                fillings_table(&names, &fill_mask(&self.tokenizer, ids, logits, TOP)?)
            }
            (_, Some(hidden), Some(mask)) if names.len() > 1 && hidden.rank() == 3 => {
                let pooled = mean_pool(&hidden.to_dtype(DType::F32)?, mask)?;
                Some(embeddings::table(&names, &pooled)?)
            }
            _ => None,
        };
        Ok(answer.into_iter().collect())
    }
}

impl TextTask {
    /// Tokens at the beginning of the sequences that were not generated: a decoder's prompt, or the start token.
    fn prompt_length(&self, ids: &Tensor) -> Result<usize, SessionError> {
        let is_decoder = self.config.get("is_encoder_decoder") != Some(&true.into());
        Ok(if is_decoder { ids.dim(1)? } else { 1 })
    }
}

/// The likeliest words at each mask of [`fill_mask`]; nothing where no text has one.
pub fn fillings_table(names: &[String], fillings: &[Vec<Vec<Filling>>]) -> Option<Answer> {
    let mut rows = Vec::new();
    for (name, masks) in names.iter().zip(fillings) {
        let of_masks = masks.iter().enumerate().flat_map(|(mask, words)| {
            let words = words.iter().map(|(word, probability)| vec![word.clone(), task::percent(*probability)]);
            task::grouped(&(mask + 1).to_string(), words)
        });
        rows.extend(task::grouped(name, of_masks));
    }
    let any = !rows.is_empty();
    any.then(|| Answer::table(&["input", "mask", "word", "probability"], rows))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn nothing_divides_by_zero() -> candle_core::Result<()> {
        let hidden = Tensor::ones((1, 2, 3), DType::F32, &Device::Cpu)?;
        let nothing = Tensor::zeros((1, 2), DType::I64, &Device::Cpu)?;
        let pooled = mean_pool(&hidden, &nothing)?;
        assert_eq!(pooled.to_vec2::<f32>()?, [[0.; 3]]);
        Ok(())
    }
}
