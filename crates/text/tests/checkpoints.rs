//! The forms that published checkpoints of BERT come in, each giving the logits that `transformers` computes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use roofbench_text::candle_core::{DType, Device, Tensor, pickle, safetensors};
use roofbench_text::serde_json::{self, Value, json};
use roofbench_text::{Call, HubOptions, ModelSpec, Source, Tensors, Unobserved, Weights, aliases, load};

/// A small checkpoint as PyTorch saved it: see data/make_tiny_bert.py.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-bert")
}

fn read_json(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture().join(file)).unwrap()).unwrap()
}

fn stored() -> HashMap<String, Tensor> {
    pickle::read_all(fixture().join("pytorch_model.bin")).unwrap().into_iter().collect()
}

fn renamed(rename: impl Fn(&str) -> Option<String>) -> HashMap<String, Tensor> {
    stored().into_iter().filter_map(|(name, tensor)| Some((rename(&name)?, tensor))).collect()
}

fn matrix(json: &Value, dtype: DType) -> Tensor {
    let rows: Vec<Vec<f64>> = serde_json::from_value(json.clone()).unwrap();
    Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Loads `path` as `class` and runs the fixture's inputs; every tensor of the checkpoint has to find its use.
fn run(path: &Path, class: &str, config: Value) -> Tensors {
    let spec = ModelSpec::new("bert", class, config);
    let source = Source::Local { path: path.to_path_buf() };
    let weights = Weights::open(&source, aliases(&spec), class, &HubOptions::default()).unwrap();
    let mut session = load(&spec, &weights).unwrap();
    weights.check_complete(false).unwrap();
    let expected = read_json("expected.json");
    let inputs = ["input_ids", "attention_mask"].map(|name| (name.to_string(), matrix(&expected[name], DType::I64)));
    let call = Call { method: "forward".into(), inputs: inputs.into(), ..Default::default() };
    session.call(&call, &mut Unobserved).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(ours: &[f32], reference: &[f32], what: &str) {
    assert_eq!(ours.len(), reference.len(), "{what}");
    for (ours, reference) in ours.iter().zip(reference) {
        assert!((ours - reference).abs() <= 1e-5, "{what}: {ours} is not {reference}");
    }
}

/// The logits that `transformers` computed, (batch, seq, vocab) in one row.
fn expected_logits() -> Vec<f32> {
    let logits: Vec<Vec<Vec<f32>>> = serde_json::from_value(read_json("expected.json")["logits"].clone()).unwrap();
    logits.into_iter().flatten().flatten().collect()
}

fn assert_masked_lm(path: &Path, what: &str) {
    assert_close(&flat(&run(path, "BertForMaskedLM", read_json("config.json"))["logits"]), &expected_logits(), what);
}

#[test]
fn pytorch_bin() {
    assert_masked_lm(&fixture(), "folder");
    assert_masked_lm(&fixture().join("pytorch_model.bin"), "file");
}

#[test]
fn safetensors_by_old_and_new_names_with_and_without_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let new = |name: &str| {
        let unused = ["position_ids", "seq_relationship", "pooler", "decoder"];
        let name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias");
        (!unused.iter().any(|part| name.contains(part))).then_some(name)
    };
    let old = |name: &str| Some(name.to_string());
    let bare = |name: &str| Some(name.strip_prefix("bert.").unwrap_or(name).to_string());
    for (what, tensors) in [
        ("old names", renamed(old)),
        ("old names, no prefix", renamed(bare)),
        ("new names", renamed(new)),
        ("new names, no prefix", renamed(|name| new(name).and_then(|name| bare(&name)))),
    ] {
        safetensors::save(&tensors, &path).unwrap();
        assert_masked_lm(folder.path(), what);
        assert_masked_lm(&path, what);
    }
}

#[test]
fn sharded_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let mut names: Vec<String> = stored().into_keys().collect();
    names.sort();
    let shard = |name: &str| {
        let first = names.iter().position(|other| other == name).unwrap() < names.len() / 2;
        format!("model-0000{}-of-00002.safetensors", if first { 1 } else { 2 })
    };
    for number in [1, 2] {
        let file = format!("model-0000{number}-of-00002.safetensors");
        let part = renamed(|name| (shard(name) == file).then(|| name.to_string()));
        safetensors::save(&part, folder.path().join(file)).unwrap();
    }
    let map: HashMap<&String, String> = names.iter().map(|name| (name, shard(name))).collect();
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_masked_lm(folder.path(), "shards");
}

#[test]
fn the_encoder_reads_a_checkpoint_with_a_head_and_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let encoder = renamed(|name| name.strip_prefix("bert.").map(str::to_string));
    safetensors::save(&encoder, &path).unwrap();
    let own = run(folder.path(), "BertModel", read_json("config.json"));
    let with_head = run(&fixture(), "BertModel", read_json("config.json"));
    for field in ["last_hidden_state", "pooler_output"] {
        assert_eq!(flat(&own[field]), flat(&with_head[field]), "{field}");
    }
}

/// `tie_word_embeddings: false`: the decoder's own matrix and bias count, `cls.predictions.bias` does not.
#[test]
fn an_untied_output_matrix_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = stored();
    let bias = flat(&tensors["cls.predictions.bias"]);
    let twice = (&tensors["cls.predictions.decoder.weight"] * 2.).unwrap();
    tensors.insert("cls.predictions.decoder.weight".into(), twice);
    let tens = (tensors["cls.predictions.bias"].zeros_like().unwrap() + 10.).unwrap();
    tensors.insert("cls.predictions.decoder.bias".into(), tens);
    safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();

    let mut config = read_json("config.json");
    config["tie_word_embeddings"] = json!(false);
    let untied = run(folder.path(), "BertForMaskedLM", config);
    let tied = expected_logits();
    let expected: Vec<f32> =
        tied.iter().zip(bias.iter().cycle()).map(|(logit, bias)| 2. * (logit - bias) + 10.).collect();
    assert_close(&flat(&untied["logits"]), &expected, "untied");
}
