//! Sentence embeddings of a real checkpoint, all-MiniLM-L6-v2, against sentence-transformers.
//!
//! Runs when the files are there: `cargo xtask checkpoint` fetches them, or ROOFBENCH_MINILM names their folder.

use std::path::{Path, PathBuf};

use roofbench_text::candle_core::Device;
use roofbench_text::serde_json::{self, Value};
use roofbench_text::tasks::{cosine_similarities, embed};
use roofbench_text::tokenize::Tokenizer;
use roofbench_text::{Engine, HubOptions, ModelSpec, Source, Weights, aliases, load};

/// The checkpoint's folder; `None` when it has not been fetched.
fn checkpoint() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("ROOFBENCH_MINILM") {
        return Some(folder.into());
    }
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
    };
    Some(target.join("checkpoints/all-MiniLM-L6-v2")).filter(|folder| folder.join("model.safetensors").exists())
}

#[test]
fn sentence_similarities_agree_with_the_library() {
    let Some(folder) = checkpoint() else {
        eprintln!("skipped: run `cargo xtask checkpoint`, or name the folder of all-MiniLM-L6-v2 in ROOFBENCH_MINILM");
        return;
    };
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/minilm.json");
    let reference: Value = serde_json::from_slice(&std::fs::read(reference).unwrap()).unwrap();
    let sentences: Vec<String> = serde_json::from_value(reference["sentences"].clone()).unwrap();

    let source = Source::Local { path: folder.clone() };
    let mut spec = ModelSpec::new("bert", "BertModel", Value::Null);
    let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::default()).unwrap();
    spec.config = weights.config().unwrap();
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.max_length(), Some(256)); // of sentence_bert_config.json, less than the model's 512

    let inputs = tokenizer.encode(&sentences, &Device::Cpu).unwrap();
    let tokens: Vec<i64> = serde_json::from_value(reference["tokens"].clone()).unwrap();
    assert_eq!(inputs["attention_mask"].sum(1).unwrap().to_vec1::<i64>().unwrap(), tokens);

    for engine in [Engine::Roofbench, Engine::CandleTransformers] {
        spec.engine = engine;
        let mut session = load(&spec, &weights).unwrap();
        if engine == Engine::Roofbench {
            weights.check_complete(false).unwrap();
        }
        let embeddings = embed(session.as_mut(), inputs.clone()).unwrap();
        let similarities = cosine_similarities(&embeddings).unwrap();
        for (field, ours) in [("similarities", similarities), ("embeddings_start", embeddings.narrow(1, 0, 4).unwrap())]
        {
            let reference: Vec<Vec<f32>> = serde_json::from_value(reference[field].clone()).unwrap();
            let ours = ours.to_vec2::<f32>().unwrap();
            assert_eq!(ours.len(), reference.len());
            for (ours, reference) in ours.iter().flatten().zip(reference.iter().flatten()) {
                assert!((ours - reference).abs() <= 1e-5, "{engine:?}, {field}: {ours} is not {reference}");
            }
        }
    }
}
