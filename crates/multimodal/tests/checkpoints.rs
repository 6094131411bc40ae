//! Checkpoints of one class that another is loaded from: every tensor finds its use, and what both give is the same.

use std::collections::HashMap;

use roofbench_multimodal::candle_core::{DType, Device, Tensor, safetensors};
use roofbench_multimodal::serde_json::{Value, json};
use roofbench_multimodal::{Call, HubOptions, ModelSpec, Source, Tensors, Unobserved, Weights, aliases, load};

fn spec(family: &str, class: &str, config: &Value) -> ModelSpec {
    ModelSpec::new(family, class, config.clone())
}

/// Saves the made-up weights of class `from` under the names that `rename` gives them, and loads `to` from them; both have
/// to give the same `output`.
fn check(
    family: &str,
    [from, to]: [&str; 2],
    config: &Value,
    call: &Call,
    output: Option<&str>,
    rename: impl Fn(&str) -> Vec<String>,
) {
    let spec_from = spec(family, from, config);
    let source = Source::Synthetic { seed: 0 };
    let weights = Weights::open(&source, aliases(&spec_from), from, &HubOptions::default()).unwrap();
    let expected = load(&spec_from, &weights).unwrap().call(call, &mut Unobserved).unwrap();

    let vb = weights.var_builder(DType::F32, &Device::Cpu);
    let mut tensors = HashMap::new();
    for (name, shape) in weights.requested() {
        let tensor = vb.get(shape, &name).unwrap();
        tensors.extend(rename(&name).into_iter().map(|name| (name, tensor.clone())));
    }
    let folder = std::env::temp_dir().join(format!("roofbench-{family}-{from}-{to}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("model.safetensors");
    safetensors::save(&tensors, &file).unwrap();

    let spec_to = spec(family, to, config);
    let weights = Weights::open(&Source::Local { path: file }, aliases(&spec_to), to, &HubOptions::default()).unwrap();
    let mut session = load(&spec_to, &weights).unwrap();
    weights.check_complete(false).unwrap();
    let found = session.call(call, &mut Unobserved).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    if let Some(output) = output {
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&found[output]), values(&expected[output]), "{from} as {to}");
    }
}

fn call(inputs: &[(&str, &Tensor)]) -> Call {
    let inputs: Tensors = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone())).collect();
    Call { method: "forward".into(), inputs, ..Default::default() }
}

fn ids() -> Tensor {
    Tensor::new(&[[4i64, 7, 2]], &Device::Cpu).unwrap()
}

fn page(channels: usize, side: usize) -> Tensor {
    let pixels = Tensor::arange(0f32, (channels * side * side) as f32, &Device::Cpu).unwrap().sin().unwrap();
    pixels.reshape((1, channels, side, side)).unwrap()
}

fn same(name: &str) -> Vec<String> {
    vec![name.to_owned()]
}

fn without(prefix: &str, name: &str) -> Vec<String> {
    vec![name.strip_prefix(prefix).unwrap_or(name).to_owned()]
}

#[test]
fn vilt() {
    let config = json!({
        "vocab_size": 10, "max_position_embeddings": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_labels": 3,
        "num_attention_heads": 2, "intermediate_size": 6, "image_size": 4, "patch_size": 2, "num_channels": 1,
    });
    let (ids, page) = (ids(), page(1, 4));
    let call = call(&[("input_ids", &ids), ("pixel_values", &page)]);
    let (base, lm, answers) = ("ViltModel", "ViltForMaskedLM", "ViltForQuestionAnswering");
    for class in [lm, answers, "ViltForImageAndTextRetrieval"] {
        check("vilt", [class, base], &config, &call, None, same);
    }
    // the bias under both names, and a decoder that repeats the words
    let words = "vilt.embeddings.text_embeddings.word_embeddings.weight";
    check("vilt", [lm, lm], &config, &call, Some("logits"), |name| match name {
        "mlm_score.decoder.bias" => vec!["mlm_score.bias".to_owned(), name.to_owned()],
        name if name == words => vec![name.to_owned(), "mlm_score.decoder.weight".to_owned()],
        name => same(name),
    });
    check("vilt", [answers, answers], &config, &call, Some("logits"), |name| without("vilt.", name));
}

#[test]
fn flava() {
    let encoder = json!({"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6});
    let mut config = json!({
        "image_config": encoder, "text_config": encoder, "multimodal_config": encoder,
        "image_codebook_config": {"hidden_size": 4, "vocab_size": 5},
        "hidden_size": 8, "projection_dim": 3, "return_loss": false,
    });
    for (field, value) in [("image_size", 8), ("patch_size", 4), ("vocab_size", 5)] {
        config["image_config"][field] = json!(value);
    }
    for (field, value) in [("vocab_size", 10), ("max_position_embeddings", 6)] {
        config["text_config"][field] = json!(value);
    }
    let (ids, page) = (ids(), page(3, 8));
    let both = call(&[("input_ids", &ids), ("pixel_values", &page)]);
    let (base, all, codebook) = ("FlavaModel", "FlavaForPreTraining", "FlavaImageCodebook");
    let twice = |name: &str| {
        let head = name.strip_suffix("head.decoder.bias").map(|head| format!("{head}head.bias"));
        head.into_iter().chain([name.to_owned()]).collect()
    };
    for output in ["image_embeddings", "text_embeddings"] {
        check("flava", [all, base], &config, &both, Some(output), twice);
        check("flava", [all, all], &config, &both, Some(output), |name| without("flava.", name));
    }
    let pixels = call(&[("pixel_values", &page)]);
    check("flava", [codebook, codebook], &config, &pixels, Some("logits"), |name| {
        vec![format!("image_codebook.{name}")]
    });
    check("flava", [all, codebook], &config, &pixels, None, same);
}

#[test]
fn layoutlm() {
    let config = json!({
        "vocab_size": 10, "max_position_embeddings": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_labels": 2,
        "num_attention_heads": 2, "intermediate_size": 6, "type_vocab_size": 1,
    });
    let ids = ids();
    let call = call(&[("input_ids", &ids)]);
    let lm = "LayoutLMForMaskedLM";
    for task in ["MaskedLM", "TokenClassification", "QuestionAnswering", "SequenceClassification"] {
        let head = format!("LayoutLMFor{task}");
        check("layoutlm", [&head, "LayoutLMModel"], &config, &call, None, same);
        let output = if task == "QuestionAnswering" { "start_logits" } else { "logits" };
        check("layoutlm", [&head, &head], &config, &call, Some(output), |name| without("layoutlm.", name));
    }
    let words = "layoutlm.embeddings.word_embeddings.weight";
    check("layoutlm", [lm, lm], &config, &call, Some("logits"), |name| match name {
        "cls.predictions.bias" => vec![name.to_owned(), "cls.predictions.decoder.bias".to_owned()],
        name if name == words => vec![name.to_owned(), "cls.predictions.decoder.weight".to_owned()],
        name => same(name),
    });
}

#[test]
fn layoutlmv3() {
    let config = json!({
        "vocab_size": 10, "max_position_embeddings": 6, "hidden_size": 6, "coordinate_size": 1, "shape_size": 1,
        "num_hidden_layers": 2, "num_labels": 2, "num_attention_heads": 2, "intermediate_size": 6, "type_vocab_size": 1,
        "input_size": 4, "patch_size": 2, "num_channels": 1,
    });
    let (ids, page) = (ids(), page(1, 4));
    let call = call(&[("input_ids", &ids), ("pixel_values", &page)]);
    for task in ["TokenClassification", "QuestionAnswering", "SequenceClassification"] {
        let head = format!("LayoutLMv3For{task}");
        check("layoutlm", [&head, "LayoutLMv3Model"], &config, &call, None, same);
        let output = if task == "QuestionAnswering" { "start_logits" } else { "logits" };
        check("layoutlm", [&head, &head], &config, &call, Some(output), |name| without("layoutlmv3.", name));
    }
}
