//! Runs the real program in a folder of its own, and writes small checkpoints and made-up records for it.

#![allow(dead_code, reason = "each file of tests uses a part of it")]

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{DType, Device, Tensor};
use roofbench_core::record::{self, Record};
use roofbench_core::weights::synthetic;
use serde_json::{Value, json};

/// The program, with its caches kept out of the user's, and no network.
pub(crate) fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roofbench"));
    command.current_dir(folder).stdin(Stdio::null());
    // Ceilings are measured once for all tests.
    command.env("ROOFBENCH_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("hub")).env_remove("ROOFBENCH_LOG");
    command
}

/// What came of a call.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ran = Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) };
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }

    /// Ended with `code`, and said each of `words` on one of its outputs.
    #[track_caller]
    pub(crate) fn expect(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for word in words {
            assert!(self.out.contains(word) || self.err.contains(word), "{word:?} is not in {self:#?}");
        }
        self
    }

    /// Standard output, a JSON value on each line.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }
}

/// Runs the program with `arguments` in `folder`.
pub(crate) fn roofbench<S: AsRef<OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>) -> Ran {
    Ran::from(program(folder).args(arguments).output().expect("the program starts"))
}

/// The words of a line as arguments.
pub(crate) fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// The records in `path`, none of them damaged.
#[track_caller]
pub(crate) fn records(path: &Path) -> Vec<Record> {
    let outcome = record::read(path).unwrap_or_else(|error| panic!("{error}"));
    assert!(outcome.problems.is_empty(), "{:?}", outcome.problems);
    outcome.records
}

/// Reference cases of the project.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference")
}

/// A copy of a reference case, to be changed.
pub(crate) fn copy_case(name: &str, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(fixtures().join(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Names and shapes of a tiny BertModel.
pub(crate) fn bert_tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![60, 16]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![512, 16]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, 16]),
        ("embeddings.LayerNorm.weight".to_owned(), vec![16]),
        ("embeddings.LayerNorm.bias".to_owned(), vec![16]),
        ("pooler.dense.weight".to_owned(), vec![16, 16]),
        ("pooler.dense.bias".to_owned(), vec![16]),
    ];
    let layers = [
        ("attention.self.query", vec![16, 16]),
        ("attention.self.key", vec![16, 16]),
        ("attention.self.value", vec![16, 16]),
        ("attention.output.dense", vec![16, 16]),
        ("attention.output.LayerNorm", vec![16]),
        ("intermediate.dense", vec![32, 16]),
        ("output.dense", vec![16, 32]),
        ("output.LayerNorm", vec![16]),
    ];
    for (name, shape) in layers {
        tensors.push((format!("encoder.layer.0.{name}.bias"), vec![shape[0]]));
        tensors.push((format!("encoder.layer.0.{name}.weight"), shape));
    }
    tensors
}

/// `config.json` of that BertModel.
pub(crate) fn bert_config() -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 60, "hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 512,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    })
}

/// A checkpoint with these tensors, of synthetic values.
pub(crate) fn checkpoint(folder: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let made = |(name, shape): &(String, Vec<usize>)| {
        (name.clone(), synthetic::tensor(name, shape, 0, DType::F32, &Device::Cpu).unwrap())
    };
    let tensors: HashMap<String, Tensor> = tensors.iter().map(made).collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// A tokenizer of whole words: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, and those of `words`.
pub(crate) fn tokenizer(path: &Path, words: &[&str]) {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let vocabulary: serde_json::Map<String, Value> =
        special.iter().chain(words).enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    });
    fs::write(path, tokenizer.to_string()).unwrap();
}

/// A record of `cell` (`bert/forward/b1/s128`) that never was: 40 calls of about `ns`.
pub(crate) fn made_up(cell: &str, ns: u64) -> Value {
    let (family, name) = cell.split_once('/').unwrap();
    let samples: Vec<Value> = (0..40)
        .map(|call| ns + ns * (call % 5) / 2000)
        .map(|ns| json!({"total_ns": ns, "phases": [["forward", ns]]}))
        .collect();
    json!({
        "schema_version": 1, "started_at": "2026-01-01T00:00:00Z",
        "subject": {
            "family": family, "modality": "text", "checkpoint": "made/up", "class": "MadeUp", "parameters": null,
            "engine": "roofbench", "cell": {"name": name, "unit": "sequences", "batch": 1, "inputs": {}},
        },
        "settings": {
            "requested": {"threads": "2"},
            "effective": {"device": "cpu", "dtype": "f32", "threads": "2", "weights": "synthetic:0"},
        },
        "outcome": {
            "status": "measured", "load_ns": 1, "first_call_ns": ns, "warmup_ns": [], "samples": samples,
            "stop": "max_samples", "cost": [], "readings": {},
        },
        "warnings": [],
        "machine": {
            "cpu": {"model": "Testing CPU", "arch": "x86_64", "threads": 2, "usable_threads": 2, "caches": [], "isa": []},
            "memory": {"total_bytes": 17179869184u64}, "gpus": [], "os": {"name": "Testing"}, "peaks": null,
        },
        "build": {
            "version": "0.1.0", "commit": "0123456789ab", "profile": "release", "target": "testing", "rustc": "rustc",
            "features": [], "target_features": [],
        },
    })
}

/// Writes `records`, one on each line.
pub(crate) fn write_records(path: &Path, records: &[Value]) {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}
