//! What came out of real inputs, for people: similarities of sentences, the likeliest labels of a picture.

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
) -> Result<Option<String>, SessionError> {
    let names: Vec<String> = match raw {
        RawInput::Texts(texts) => texts.iter().map(|text| shortened(text)).collect(),
        RawInput::Images(paths) => paths.iter().map(|path| path.display().to_string()).collect(),
    };
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
