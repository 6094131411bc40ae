//! What came out of real inputs, for people: similarities of sentences, the likeliest labels of a picture.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::softmax;
use roofbench_core::session::Tensors;
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
/// Outputs of an unexpected shape.
pub(crate) fn describe(
    raw: &RawInput,
    inputs: &Tensors,
    outputs: &Tensors,
    config: &Value,
) -> candle_core::Result<Option<String>> {
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
fn labels(names: &[String], logits: &Tensor, config: &Value) -> candle_core::Result<String> {
    let probabilities: Vec<Vec<f32>> = softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?.to_vec2()?;
    let mut table = roofbench_report::empty_table(&["input", "label", "probability"]);
    for (name, probabilities) in names.iter().zip(&probabilities) {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        for (rank, &class) in order.iter().take(LABELS).enumerate() {
            let label = config["id2label"][class.to_string()].as_str().map_or_else(|| class.to_string(), str::to_owned);
            let percent = format!("{} %", digits(100.0 * f64::from(probabilities[class])));
            table.add_row([if rank == 0 { name.clone() } else { String::new() }, label, percent]);
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
