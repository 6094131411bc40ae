//! What came out of real inputs, for people: similarities of sentences, the likeliest labels of a picture.

use std::path::Path;

use candle_core::Tensor;
use roofbench_core::classify;
use roofbench_core::session::{SessionError, Tensors};
use serde_json::Value;

use crate::job::RawInput;
use crate::models;
use crate::ui::digits;

/// Labels shown per item.
const LABELS: usize = 5;
/// Characters of a text that a table shows.
const TEXT_WIDTH: usize = 40;

/// Lines that say what `outputs` mean for `raw`; empty where they mean nothing to people.
///
/// # Errors
/// Outputs of an unexpected shape, or labels in the config that don't fit them.
pub(crate) fn describe(
    raw: &RawInput,
    inputs: &Tensors,
    outputs: &Tensors,
    config: &Value,
    tokenizer: Option<&Path>,
) -> Result<Option<String>, SessionError> {
    let names: Vec<String> = match raw {
        RawInput::Texts(texts) => texts.iter().map(|text| shortened(text)).collect(),
        RawInput::Images(paths) => paths.iter().map(|path| path.display().to_string()).collect(),
    };
    if let (RawInput::Texts(_), Some(tokenizer), Some(ids)) = (raw, tokenizer, inputs.get("input_ids")) {
        let is_decoder = config.get("is_encoder_decoder") != Some(&true.into());
        if let Some(sequences) = outputs.get("sequences") {
            // a decoder's sequences begin with the prompt
            let start = if is_decoder { ids.dim(1)? } else { 0 };
            return Ok(Some(generated(&names, &models::texts(tokenizer, sequences, start)?)));
        }
        if let Some(logits) = outputs.get("logits").filter(|logits| logits.rank() == 3) {
            return Ok(fillings(&names, &models::fillings(tokenizer, ids, logits, LABELS)?));
        }
    }
    match (raw, outputs.get("last_hidden_state"), outputs.get("logits")) {
        (RawInput::Texts(_), Some(hidden), _) if names.len() > 1 && hidden.rank() == 3 => {
            let Some(mask) = inputs.get("attention_mask") else { return Ok(None) };
            Ok(Some(matrix(&names, &models::similarities(hidden, mask)?.to_vec2()?)))
        }
        (_, _, Some(logits)) if logits.rank() == 2 => Ok(Some(labels(&names, logits, config)?)),
        _ => Ok(None),
    }
}

/// Cosine similarities as a table.
fn matrix(names: &[String], similarities: &[Vec<f32>]) -> String {
    let mut table = roofbench_report::empty_table(&[]);
    let numbers = (1..=names.len()).map(|n| n.to_string());
    table.set_header(["".to_owned(), "cosine similarity".to_owned()].into_iter().chain(numbers));
    for (at, (name, row)) in names.iter().zip(similarities).enumerate() {
        let cells = row.iter().map(|similarity| format!("{similarity:.4}"));
        table.add_row([(at + 1).to_string(), name.clone()].into_iter().chain(cells));
    }
    table.to_string()
}

/// What follows each text.
fn generated(names: &[String], texts: &[String]) -> String {
    let mut table = roofbench_report::empty_table(&["input", "generated"]);
    for (name, text) in names.iter().zip(texts) {
        table.add_row([name, text.trim()]);
    }
    table.to_string()
}

/// The likeliest words at each mask; nothing where no text has one.
fn fillings(names: &[String], fillings: &[Vec<Vec<models::Filling>>]) -> Option<String> {
    let mut table = roofbench_report::empty_table(&["input", "mask", "word", "probability"]);
    for (name, masks) in names.iter().zip(fillings) {
        for (mask, words) in masks.iter().enumerate() {
            for (rank, (word, probability)) in words.iter().enumerate() {
                let first = |text: String| if rank == 0 { text } else { String::new() };
                let percent = format!("{} %", digits(100.0 * f64::from(*probability)));
                table.add_row([first(name.clone()), first((mask + 1).to_string()), word.clone(), percent]);
            }
        }
    }
    fillings.iter().any(|masks| !masks.is_empty()).then(|| table.to_string())
}

/// The likeliest labels of each item.
fn labels(names: &[String], logits: &Tensor, config: &Value) -> Result<String, SessionError> {
    let mut table = roofbench_report::empty_table(&["input", "label", "probability"]);
    let predictions = classify::classify(logits, &classify::labels(config)?, LABELS)?;
    for (name, predictions) in names.iter().zip(predictions) {
        for (rank, prediction) in predictions.into_iter().enumerate() {
            let percent = format!("{} %", digits(100.0 * f64::from(prediction.probability)));
            table.add_row([if rank == 0 { name.clone() } else { String::new() }, prediction.label, percent]);
        }
    }
    Ok(table.to_string())
}

fn shortened(text: &str) -> String {
    let text = text.replace(char::is_control, " ");
    if text.chars().count() <= TEXT_WIDTH {
        return text;
    }
    text.chars().take(TEXT_WIDTH - 1).chain(['…']).collect()
}
