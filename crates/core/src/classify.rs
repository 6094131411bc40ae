//! From a classifier's logits to labels that people read.

use candle_core::{D, DType, Tensor};
use serde_json::Value;

use crate::session::SessionError;
use crate::task::{self, Answer};

/// One answer of a classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Index among the labels.
    pub index: usize,
    /// The label's name.
    pub label: String,
    /// Softmax over all labels, 0 to 1.
    pub probability: f32,
}

/// Names of a classifier's labels by index, from `id2label` of `config` (config.json); `LABEL_0`, … where it has none.
///
/// # Errors
/// [`SessionError::Config`] when the indices are not 0, 1, 2, …
pub fn labels(config: &Value) -> Result<Vec<String>, SessionError> {
    let Some(names) = config.get("id2label").and_then(Value::as_object) else {
        return Ok((0..label_count(config)?).map(|i| format!("LABEL_{i}")).collect());
    };
    (0..names.len())
        .map(|i| match names.get(&i.to_string()) {
            Some(Value::String(name)) => Ok(name.clone()),
            Some(other) => Err(invalid("id2label", format!("label {i} is {other}, expected a string"))),
            None => Err(invalid("id2label", format!("has {} labels, but none with the index {i}", names.len()))),
        })
        .collect()
}

/// Number of labels: the length of `id2label`, else `num_labels`, else 2, as `transformers` counts them.
///
/// # Errors
/// [`SessionError::Config`] when it is no number, 0, or beyond reason.
pub fn label_count(config: &Value) -> Result<usize, SessionError> {
    let count = match (config.get("id2label").and_then(Value::as_object), config.get("num_labels")) {
        (Some(names), _) => names.len() as u64,
        (None, None | Some(Value::Null)) => 2,
        (None, Some(number)) => {
            number.as_u64().ok_or_else(|| invalid("num_labels", format!("is {number}, expected a number")))?
        }
    };
    match usize::try_from(count) {
        Ok(count @ 1..=0xff_ffff) => Ok(count),
        _ => Err(invalid("num_labels", format!("{count} is not in 1..={}", 0xff_ffff))),
    }
}

fn invalid(field: &str, reason: String) -> SessionError {
    SessionError::Config { field: field.to_owned(), reason }
}

/// The `top` most probable labels of each item, best first.
///
/// # Shapes
/// `logits` is (batch, labels).
///
/// # Errors
/// [`SessionError::Input`] when `logits` has another shape or holds NaN.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_core::classify::classify;
/// let labels = ["cat", "dog", "owl"].map(String::from);
/// let logits = Tensor::new(&[[0f32, 3f32.ln(), 0.0]], &Device::Cpu)?;
/// let best = &classify(&logits, &labels, 2)?[0];
/// assert_eq!((best[0].label.as_str(), best[1].index), ("dog", 0));
/// assert!((best[0].probability - 0.6).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn classify(logits: &Tensor, labels: &[String], top: usize) -> Result<Vec<Vec<Prediction>>, SessionError> {
    let refuse = |reason: String| SessionError::input("logits", reason);
    if logits.rank() != 2 || logits.dim(1)? != labels.len() {
        return Err(refuse(format!("has shape {:?}, expected (batch, {})", logits.dims(), labels.len())));
    }
    let probabilities = candle_nn::ops::softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?.to_vec2::<f32>()?;
    let best = |row: Vec<f32>| {
        if row.iter().any(|p| p.is_nan()) {
            return Err(refuse("holds NaN".to_owned()));
        }
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a])); // stable: the lower index first among equals
        let prediction = |index: usize| Prediction { index, label: labels[index].clone(), probability: row[index] };
        Ok(order.into_iter().take(top).map(prediction).collect())
    };
    probabilities.into_iter().map(best).collect()
}

/// The `top` most probable labels of each item as a table: `names` (batch) first, then label and probability.
///
/// # Errors
/// As [`labels`] and [`classify`].
pub fn table(names: &[String], logits: &Tensor, config: &Value, top: usize) -> Result<Answer, SessionError> {
    let predictions = classify(logits, &labels(config)?, top)?;
    let rows = names.iter().zip(predictions).flat_map(|(name, predictions)| {
        task::grouped(name, predictions.into_iter().map(|p| vec![p.label, task::percent(p.probability)]))
    });
    Ok(Answer::table(&["input", "label", "probability"], rows.collect()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_come_in_the_order_of_their_indices() {
        let names: serde_json::Map<String, Value> =
            (0..12).rev().map(|i| (i.to_string(), json!(format!("n{i}")))).collect();
        let read = labels(&json!({"id2label": names})).expect("labels");
        assert_eq!((read.len(), read[2].as_str(), read[11].as_str()), (12, "n2", "n11"));
        assert_eq!(labels(&json!({"num_labels": 1})).expect("labels"), ["LABEL_0"]);
        assert_eq!(labels(&json!({})).expect("labels").len(), 2);
    }

    #[test]
    fn bad_labels_are_named() {
        let message = |config| labels(&config).expect_err("refused").to_string();
        let gap = message(json!({"id2label": {"0": "a", "2": "b"}}));
        assert_eq!(gap, "config.json: `id2label`: has 2 labels, but none with the index 1");
        assert!(message(json!({"id2label": {"0": 7}})).contains("label 0 is 7"));
        assert!(message(json!({"num_labels": "many"})).starts_with("config.json: `num_labels`: is \"many\""));
        assert!(message(json!({"num_labels": 0})).contains("0 is not in 1..="));
    }

    #[test]
    fn logits_must_fit_the_labels() {
        let labels = ["a", "b"].map(String::from);
        let message = |logits: &[[f32; 2]; 1], labels: &[String]| {
            let logits = Tensor::new(logits, &Device::Cpu).expect("a tensor");
            classify(&logits, labels, 5).expect_err("refused").to_string()
        };
        assert_eq!(message(&[[0.0, 1.0]], &labels[..1]), "input `logits`: has shape [1, 2], expected (batch, 1)");
        assert_eq!(message(&[[0.0, f32::NAN]], &labels), "input `logits`: holds NaN");
    }
}
