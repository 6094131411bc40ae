//! An item in a batch gives what it gives alone, and padding changes nothing.

use candle_core::{Device, Tensor};
use roofbench_core::session::{Call, Session, Tensors, Unobserved};
use roofbench_core::weights::synthetic::uniform;
use roofbench_tests::{fixtures, relative_error, synthetic};
use serde_json::Value;

/// Sums over other shapes may take another order: a few roundings of f32, in the largest value's unit.
const TOLERANCE: f32 = 2e-6;

fn config(case: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(case).join("config.json")).unwrap()).unwrap()
}

fn forward(session: &mut dyn Session, inputs: &[(&str, Tensor)]) -> Tensors {
    let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    let call = Call { method: "forward".to_owned(), inputs, arguments: Default::default() };
    session.call(&call, &mut Unobserved).unwrap()
}

/// `count` token ids in [3, 90).
fn tokens(shape: (usize, usize)) -> Tensor {
    let unit = uniform("tokens", shape.0 * shape.1, 0, 0).unwrap();
    let ids: Vec<i64> = unit.iter().map(|u| 3 + ((u + 1.0) / 2.0 * 87.0) as i64).collect();
    Tensor::from_vec(ids, shape, &Device::Cpu).unwrap()
}

#[test]
fn a_sentence_in_a_batch_equals_it_alone() {
    let (mut bert, _) = synthetic("bert", "BertForMaskedLM", &config("bert/masked-lm")).unwrap();
    let ids = tokens((5, 11));
    let together = forward(&mut *bert, &[("input_ids", ids.clone())]);
    for item in 0..5 {
        let alone = forward(&mut *bert, &[("input_ids", ids.narrow(0, item, 1).unwrap())]);
        let error = relative_error(&together["logits"].narrow(0, item, 1).unwrap(), &alone["logits"]).unwrap();
        assert!(error <= TOLERANCE, "item {item}: {error}");
    }
}

#[test]
fn a_padded_sentence_equals_it_without_padding() {
    let (mut bert, _) = synthetic("bert", "BertModel", &config("bert/encoder")).unwrap();
    let (length, padded) = (7, 13);
    let ids = tokens((2, padded));
    let mask: Vec<i64> = (0..2 * padded).map(|at| i64::from(at >= padded || at < length)).collect();
    let mask = Tensor::from_vec(mask, (2, padded), &Device::Cpu).unwrap();
    let together = forward(&mut *bert, &[("input_ids", ids.clone()), ("attention_mask", mask)]);
    let short = ids.narrow(0, 0, 1).unwrap().narrow(1, 0, length).unwrap();
    let alone = forward(&mut *bert, &[("input_ids", short)]);
    let kept = together["last_hidden_state"].narrow(0, 0, 1).unwrap().narrow(1, 0, length).unwrap();
    let error = relative_error(&kept, &alone["last_hidden_state"]).unwrap();
    assert!(error <= TOLERANCE, "{error}");
    let without_mask = forward(&mut *bert, &[("input_ids", ids)]);
    let unmasked = without_mask["last_hidden_state"].narrow(0, 0, 1).unwrap().narrow(1, 0, length).unwrap();
    assert!(relative_error(&unmasked, &alone["last_hidden_state"]).unwrap() > 1e-3, "the mask has to matter");
}

#[test]
fn a_picture_in_a_batch_equals_it_alone() {
    let config = config("vit/image-classification");
    let (mut vit, _) = synthetic("vit", "ViTForImageClassification", &config).unwrap();
    let pixels = Tensor::from_vec(uniform("pixels", 4 * 3 * 32 * 32, 0, 0).unwrap(), (4, 3, 32, 32), &Device::Cpu);
    let pixels = pixels.unwrap();
    let together = forward(&mut *vit, &[("pixel_values", pixels.clone())]);
    for item in 0..4 {
        let alone = forward(&mut *vit, &[("pixel_values", pixels.narrow(0, item, 1).unwrap())]);
        let error = relative_error(&together["logits"].narrow(0, item, 1).unwrap(), &alone["logits"]).unwrap();
        assert!(error <= TOLERANCE, "item {item}: {error}");
    }
}
