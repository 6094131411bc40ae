//! The real program in a fresh folder: what it prints, what it keeps, and what it says to bad input.

mod support;

use std::fs;
use std::path::Path;

use roofbench_core::catalog;
use roofbench_core::record::{Outcome, StopRule};
use roofbench_core::session::Engine;
use serde_json::{Value, json};
use support::{bert_config, bert_tensors, checkpoint, copy_case, fixtures, records, roofbench, tokenizer, words};
use tempfile::tempdir;

/// Flags that keep a run short.
const SHORT: &str = "--cell b1/s128 --max-samples 3 --max-time 2";

/// A folder with the tiny checkpoint in `model`.
fn with_model() -> tempfile::TempDir {
    let folder = tempdir().unwrap();
    checkpoint(&folder.path().join("model"), &bert_config(), &bert_tensors());
    folder
}

#[test]
fn list_shows_every_family() {
    let folder = tempdir().unwrap();
    let table = roofbench(folder.path(), ["list"]).expect(0, &["36 families", "google-bert/bert-base-uncased"]);
    let lines = roofbench(folder.path(), ["list", "--json"]).expect(0, &[]).json_lines();
    assert_eq!(lines.len(), catalog::families().len());
    for (line, family) in lines.iter().zip(catalog::families()) {
        assert_eq!(line["family"], *family.name);
        assert!(table.out.contains(&family.default_checkpoint), "{}", family.name);
    }
    let runs = |name: &str| lines.iter().find(|line| line["family"] == name).map(|line| line["runs"].clone());
    assert_eq!(
        [runs("bert"), runs("vit")],
        [Some(cfg!(feature = "text").into()), Some(cfg!(feature = "vision").into())]
    );
    roofbench(folder.path(), ["list", "bert"])
        .expect(0, &["bert-large-uncased", "forward/b1/s128", "input_ids [1, 128]"]);
    roofbench(folder.path(), ["list", "brt"]).expect(2, &["no family `brt`", "did you mean `bert`?"]);
}

#[test]
fn probe_gives_the_machine_with_its_ceilings() {
    let folder = tempdir().unwrap();
    roofbench(folder.path(), ["probe"]).expect(0, &["CPU", "memory read", "measured"]);
    let ran = roofbench(folder.path(), ["probe", "--json"]).expect(0, &[]);
    let object: Value = serde_json::from_str(&ran.out).unwrap();
    assert!(object["machine"]["peaks"]["compute"][0]["flops"].as_f64().is_some_and(|flops| flops > 0.0), "{object}");
    assert_eq!(object["build"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn help_teaches() {
    let folder = tempdir().unwrap();
    roofbench(folder.path(), ["--help"]).expect(0, &["Start with:", "Exit status"]);
    for command in ["list", "probe", "run", "verify", "report", "compare", "merge"] {
        roofbench(folder.path(), [command, "--help"]).expect(0, &["Examples:", &format!("roofbench {command}")]);
    }
}

#[test]
fn a_local_checkpoint_is_measured_and_kept() {
    let folder = with_model();
    let arguments = format!("run --weights model --threads 1 --output out/run.jsonl {SHORT}");
    let ran = roofbench(folder.path(), words(&arguments));
    let ran = ran.expect(0, &["bert/forward/b1/s128", "1 record in out/run.jsonl", "sequences/s"]);
    assert!(!ran.out.contains("[1/1]"), "progress belongs on standard error: {}", ran.out);

    let records = records(&folder.path().join("out/run.jsonl"));
    let [record] = &records[..] else { panic!("{records:?}") };
    let Outcome::Measured(measurement) = &record.outcome else { panic!("{:?}", record.outcome) };
    assert_eq!((measurement.samples.len(), measurement.stop), (3, StopRule::MaxSamples));
    assert!(measurement.cost.iter().all(|phase| phase.cost.flops > 0) && !measurement.cost.is_empty());
    let settings = &record.settings;
    assert_eq!((settings.dtype(), settings.threads(), settings.device()), (Some("f32"), Some(1), Some("cpu")));
    assert_eq!(settings.requested["max-samples"], "3");
    assert_eq!(record.subject.class, "BertModel");
    assert!(record.machine.peaks.is_some());

    // The same file again: records are appended.
    let ran = roofbench(folder.path(), words(&format!("{arguments} --json")));
    let lines = ran.expect(0, &[]).json_lines();
    assert_eq!((lines.len(), support::records(&folder.path().join("out/run.jsonl")).len()), (1, 2));
}

#[test]
fn optimizations_are_chosen_recorded_and_refused_by_name() {
    let folder = with_model();
    let run =
        |flags: &str| roofbench(folder.path(), words(&format!("run --weights model --threads 1 {SHORT} {flags}")));
    run("--opt +weights-q8,-fused-attention --output r.jsonl")
        .expect(0, &["optimizations: packed-weights, weights-q8"]);
    let record = records(&folder.path().join("r.jsonl")).remove(0);
    assert!(matches!(record.outcome, Outcome::Measured(_)), "{:?}", record.outcome);
    let (requested, effective) = (&record.settings.requested, &record.settings.effective);
    assert_eq!(requested["opt"], "+weights-q8,-fused-attention");
    assert!(effective["path.matmul"].starts_with("q8 "), "{effective:?}");
    assert_eq!(effective["path.attention"], "candle");
    let plan = &record.settings.optimizations;
    assert!(plan.decisions.len() > 4 && plan.decisions.iter().all(|decision| !decision.reason.is_empty()), "{plan:?}");

    run("--opt +bf16-products --json").expect(0, &["\"skipped\"", "does not apply to bert here: the weights are f32"]);
    run("--opt -bf16-products --json").expect(0, &["\"measured\""]);
    run("--opt +fast").expect(2, &["--opt", "no optimization `fast`", "packed-weights, fused-attention"]);
    run("--opt +weights-q8 --opt +weights-q4").expect(2, &["--opt", "exclude each other"]);
    run("--opt fused-attention").expect(2, &["+fused-attention or -fused-attention"]);
}

#[test]
fn ablation_compares_each_optimization() {
    let folder = with_model();
    let flags = "run --weights model --threads 1 --quick --cell b1/s128 --ablate --dtype bf16";
    let lines = roofbench(folder.path(), words(&format!("{flags} --json"))).expect(0, &[]).json_lines();
    let of = |name: &str| lines.iter().find(|line| line["name"] == name).unwrap_or_else(|| panic!("{name}: {lines:?}"));
    assert!(of("packed-weights")["on"] == true && of("weights-q4")["on"] == false);
    let speedup = &of("weights-q8")["speedup"];
    let number = |key: &str| speedup[key].as_f64().expect("a number");
    assert!(
        0.0 < number("low") && number("low") <= number("median") && number("median") <= number("high"),
        "{speedup}"
    );
    let error = |name: &str, state: &str| of(name)[state]["error"].as_f64().expect("an error");
    // bf16 is not f32, and four bits are further from it
    assert!(error("weights-q4", "with") > error("weights-q4", "without") && error("weights-q4", "without") > 0.0);
    assert!(!folder.path().join("roofbench-results").exists(), "an ablation keeps no records");
    roofbench(folder.path(), words(&format!("{flags} --engine candle-transformers"))).expect(1, &["run as they are"]);
}

#[test]
fn lists_make_a_grid() {
    let folder = tempdir().unwrap();
    let grid = "run bert vit --batch 1,3 --threads 1 --dtype f32,bf16 --engine roofbench,candle-transformers --dry-run";
    roofbench(folder.path(), words(grid)).expect(0, &["bert/forward/b3/s512", "vit/forward/b3", "24 cells"]);
    let lines = roofbench(folder.path(), words(&format!("{grid} --json"))).json_lines();
    // bert: 2 batches of s128, 2 of s512; vit: 2; each in 2 types on 2 engines
    assert_eq!(lines.len(), 24);
    assert!(lines.iter().all(|line| line["requested"]["threads"] == "1" && line["command"][0] == "run"));

    // The command of a planned cell plans that cell alone.
    let command: Vec<String> = serde_json::from_value(lines[5]["command"].clone()).unwrap();
    let again = roofbench(folder.path(), command.iter().map(String::as_str).chain(["--dry-run", "--json"]));
    assert_eq!(again.json_lines(), [lines[5].clone()]);
    assert!(!folder.path().join("roofbench-results").exists(), "a dry run writes nothing");
}

#[test]
fn both_engines_run_the_same_cell() {
    let folder = with_model();
    let engines = "--engine roofbench,candle-transformers --threads 1 --ignore-extra-tensors";
    roofbench(folder.path(), words(&format!("run --weights model {engines} --output r.jsonl {SHORT}"))).expect(0, &[]);
    let records = records(&folder.path().join("r.jsonl"));
    let ran: Vec<_> = records.iter().map(|r| (r.subject.engine, matches!(r.outcome, Outcome::Measured(_)))).collect();
    assert_eq!(ran, [(Engine::Roofbench, true), (Engine::CandleTransformers, true)]);
}

#[test]
fn what_does_not_fit_is_skipped_with_its_numbers() {
    let folder = tempdir().unwrap();
    let ran = roofbench(folder.path(), words("run bert --batch 65536 --cell s512 --threads 1 --output r.jsonl"));
    ran.expect(0, &["skipped", "would not fit", "TB needed", "110 M parameters", "--batch"]);
    assert!(matches!(records(&folder.path().join("r.jsonl"))[0].outcome, Outcome::Skipped { .. }));
}

#[test]
fn text_goes_through_the_checkpoints_tokenizer() {
    let folder = with_model();
    let run = words("run --weights model --threads 1 --max-samples 3 --output r.jsonl --text");
    let texts = ["a boat", "--text", "the ship sails", "--text", "a boat"];
    roofbench(folder.path(), run.iter().chain(&texts)).expect(1, &["model", "tokenizer.json", "put it beside"]);

    tokenizer(&folder.path().join("model/tokenizer.json"), &["a", "boat", "the", "ship", "sails"]);
    let ran = roofbench(folder.path(), run.iter().chain(&texts)).expect(0, &["tokenization:", "the ship sails"]);
    // The first and the last are the same sentence.
    assert!(ran.out.lines().any(|line| line.contains(" 1 ") && line.matches("1.0000").count() == 2), "{}", ran.out);
    let record = &records(&folder.path().join("r.jsonl"))[1];
    assert_eq!(record.subject.cell.name, "forward/text/b3");
    assert_eq!(record.subject.cell.inputs["input_ids"].shape(), [3, 3]);
}

#[test]
fn a_picture_goes_through_the_checkpoints_preprocessing() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    let case = fixtures().join("vit/image-classification");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let shapes: std::collections::BTreeMap<String, Vec<usize>> =
        serde_json::from_value(read(&case.join("tensors.json"))).unwrap();
    let mut config = read(&case.join("config.json"));
    config["id2label"]["3"] = "striped".into();
    checkpoint(&model, &config, &shapes.into_iter().collect::<Vec<_>>());
    let run = words("run --weights model --threads 1 --max-samples 3 --output r.jsonl --image photo.png");
    roofbench(folder.path(), run.iter()).expect(2, &["--image photo.png", "no such file"]);

    fs::copy(fixtures().join("vit/preprocess-square/image.png"), folder.path().join("photo.png")).unwrap();
    roofbench(folder.path(), run.iter()).expect(1, &["preprocessor_config.json", "missing"]);
    let processor = json!({
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": true,
        "do_rescale": true, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    });
    fs::write(model.join("preprocessor_config.json"), processor.to_string()).unwrap();
    roofbench(folder.path(), run.iter())
        .expect(0, &["preprocessing:", "pixel_values [1, 3, 32, 32]", "probability", "%"]);
}

#[test]
fn verify_compares_with_the_reference() {
    let folder = tempdir().unwrap();
    for case in ["bert/encoder", "bert/masked-lm", "vit/preprocess-square"] {
        copy_case(case, &folder.path().join("cases").join(case));
    }
    let ran = roofbench(folder.path(), ["verify", "cases", "--outputs", "computed"]);
    ran.expect(
        0,
        &["bert/encoder (BertModel)", "last_hidden_state: largest error", "within 2e-5", "3 passed, 0 failed"],
    );
    assert!(folder.path().join("computed/bert/masked-lm/outputs.safetensors").exists());

    // Without answers it computes, and says that it compared nothing.
    let case = folder.path().join("cases/bert/encoder");
    fs::remove_file(case.join("outputs.safetensors")).unwrap();
    let ran = roofbench(folder.path(), ["verify", "cases/bert/encoder", "--outputs", "again"]);
    ran.expect(0, &["no outputs.safetensors to compare with", "pooler_output"]);
    assert!(folder.path().join("again/bert/encoder/outputs.safetensors").exists());

    // What it computed is what it is compared with, to the last bit.
    fs::copy(folder.path().join("computed/bert/encoder/outputs.safetensors"), case.join("outputs.safetensors"))
        .unwrap();
    roofbench(folder.path(), ["verify", "cases/bert/encoder"]).expect(0, &["largest error 0,"]);
}

#[test]
fn verify_fails_what_is_wrong_and_goes_on() {
    let folder = tempdir().unwrap();
    let cases = folder.path().join("cases");
    let case = |name: &str| {
        copy_case("bert/masked-lm", &cases.join(name));
        cases.join(name)
    };
    case("a-good");
    let outputs = case("b-wrong-number").join("outputs.safetensors");
    let mut bytes = fs::read(&outputs).unwrap();
    let last = bytes.len() - 1; // exponent and sign of the last f32
    bytes[last] ^= 0x40;
    fs::write(&outputs, bytes).unwrap();
    fs::write(case("c-truncated").join("inputs.safetensors"), [9, 0, 0]).unwrap();
    fs::write(case("d-no-json").join("case.json"), r#"{"family": "bert", "#).unwrap();
    let edit = |path: &Path, from: &str, to: &str| {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    };
    edit(&case("e-other-family").join("case.json"), r#""family": "bert""#, r#""family": "llama""#);
    edit(&case("f-other-names").join("tensors.json"), "cls.predictions.bias", "cls.predictions.other");
    edit(&case("g-outside").join("case.json"), r#""case": "masked-lm""#, r#""case": "../../roofbench-escaped""#);
    edit(&case("h-hostile-config").join("config.json"), r#""hidden_size": 32"#, r#""hidden_size": 1e300"#);

    let ran = roofbench(folder.path(), ["verify", "cases", "--outputs", "computed"]);
    ran.expect(
        1,
        &[
            "BEYOND 2e-5",
            "inputs.safetensors",
            "d-no-json",
            "llama: class `BertForMaskedLM` is not supported; supported: LlamaForCausalLM",
            "never read: cls.predictions.other",
            "not in the checkpoint: cls.predictions.bias",
            "no relative path without `..`",
            "`hidden_size`",
            "8 cases: 1 passed, 7 failed",
        ],
    );
    assert!(!["roofbench-escaped", "../roofbench-escaped"].iter().any(|path| folder.path().join(path).exists()));
}

#[test]
fn report_shows_and_writes_and_tells_of_damage() {
    let folder = with_model();
    roofbench(folder.path(), words(&format!("run --weights model --threads 1 --output r.jsonl {SHORT}")))
        .expect(0, &[]);
    let path = folder.path().join("r.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{{\"schema_version\": 999}}\n{whole}{}", &whole[..whole.len() / 2])).unwrap();
    let ran = roofbench(folder.path(), words("report r.jsonl"));
    ran.expect(0, &["bert/forward/b1/s128", "line 1: schema_version 999 is newer", "line 3: truncated"]);
    let files = "report r.jsonl --html r.html --markdown r.md --csv r.csv";
    roofbench(folder.path(), words(files)).expect(0, &["wrote r.html", "wrote r.md", "wrote r.csv"]);
    for (file, start) in [("r.html", "<!"), ("r.md", "#"), ("r.csv", "")] {
        let text = fs::read_to_string(folder.path().join(file)).unwrap();
        assert!(text.starts_with(start) && text.contains("bert"), "{file}: {text}");
    }
    roofbench(folder.path(), words("report r.jsonl --html no/such/folder/r.html"))
        .expect(2, &["no/such/folder/r.html"]);
    fs::write(&path, "").unwrap();
    roofbench(folder.path(), words("report r.jsonl")).expect(2, &["no record in r.jsonl"]);
}

#[test]
fn bad_flags_are_named_with_the_way_out() {
    let folder = with_model();
    let cases: &[(&str, &[&str])] = &[
        ("run brt", &["no family `brt`", "did you mean `bert`?"]),
        ("run bert --batch 0", &["--batch", "0 is not in 1"]),
        ("run bert --batch 1,x", &["--batch", "'x'"]),
        ("run bert --threads 0", &["--threads", "0 is not in 1"]),
        ("run bert --threads 4096", &["--threads 4096", "may use", "--oversubscribe"]),
        ("run bert --dtype f33", &["--dtype", "f32, bf16, f16"]),
        ("run bert --engine torch", &["--engine", "candle-transformers"]),
        ("run bert --device gpu", &["--device", "cpu, cuda, cuda:N"]),
        ("run bert --cell [", &["--cell", "unclosed"]),
        ("run bert --cell nothing", &["--cell nothing", "no cell matches", "roofbench list"]),
        ("run bert --weights nowhere", &["--weights nowhere", "no such folder"]),
        ("run bert --weights hub", &["google-bert/bert-base-uncased", "offline", "name a folder"]),
        ("run vit --weights model", &["model", "of the family bert, not vit"]),
        (
            "run bert --checkpoint google-bert/bert-base",
            &["no checkpoint", "did you mean `google-bert/bert-base-uncased`?"],
        ),
        ("run bert --text hello", &["--text", "tokenizer.json", "--weights"]),
        ("run vit --text hello", &["--text: vit takes no text"]),
        ("run bert --image x.png", &["--image: bert takes no picture"]),
        ("run bert --min-time 9 --max-time 1", &["--min-time 9 is more than --max-time 1"]),
        ("run bert --min-samples 9 --max-samples 1", &["--min-samples 9 is more than --max-samples 1"]),
        ("run bert --target 0", &["--target", "percentage"]),
        ("run bert --max-time nan", &["--max-time", "seconds"]),
        (
            "run bert --output model/config.json/r.jsonl",
            &["--output", "model/config.json/r.jsonl", "name another file"],
        ),
        ("verify nowhere", &["nowhere"]),
        ("verify model", &["model", "no case here"]),
        ("report nowhere.jsonl", &["nowhere.jsonl"]),
        ("measure-cell", &["started by `roofbench run`"]),
        ("frobnicate", &["unrecognized subcommand"]),
    ];
    for (line, said) in cases {
        roofbench(folder.path(), words(line)).expect(2, said);
    }
    if !cfg!(feature = "cuda") {
        roofbench(folder.path(), words("run bert --device cuda:1")).expect(2, &["--device cuda:1", "--features cuda"]);
    }
    if !cfg!(feature = "metal") {
        roofbench(folder.path(), words("verify model --device metal"))
            .expect(2, &["--device metal", "--features metal"]);
    }
    assert!(!folder.path().join("roofbench-results").exists(), "nothing was measured");
}

#[test]
fn hostile_arguments_are_usage_errors() {
    let folder = tempdir().unwrap();
    let long = "x".repeat(20_000);
    let odd = [
        "",
        "-",
        "--=",
        "\u{202e}",
        "../../..",
        "%n%s",
        "bert\nvit",
        "💥",
        "--batch=-1",
        "--threads=1e9",
        "--text=",
        &long,
    ];
    for word in odd {
        for command in ["run", "list", "report", "verify"] {
            let ran = roofbench(folder.path(), [command, word]);
            assert_eq!(ran.code, Some(2), "{command} {word:.40}: {ran:?}");
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let not_utf8 = std::ffi::OsStr::from_bytes(b"\xff\xfe");
        for command in ["run", "list", "report", "verify"] {
            let ran = roofbench(folder.path(), [std::ffi::OsStr::new(command), not_utf8]);
            assert_eq!(ran.code, Some(2), "{command}: {ran:?}");
        }
    }
}

#[test]
fn a_bad_config_is_refused_before_anything_runs() {
    let folder = with_model();
    let config = folder.path().join("model/config.json");
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: &[(&str, i32, &[&str])] = &[
        ("", 2, &["config.json"]),
        ("{\"model_type\": ", 2, &["config.json"]),
        (&nested, 2, &["config.json"]),
        ("[]", 2, &["model_type"]),
        (r#"{"model_type": 7}"#, 2, &["model_type", "7"]),
        (r#"{"model_type": "brt"}"#, 2, &["model_type", "brt", "bert"]),
        (r#"{"model_type": "bert", "architectures": ["BertModel"]}"#, 1, &["config.json", "vocab_size"]),
    ];
    for (text, code, said) in cases {
        fs::write(&config, text).unwrap();
        roofbench(folder.path(), words(&format!("run --weights model --threads 1 {SHORT}"))).expect(*code, said);
    }
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("num_attention_heads", json!(3)),
        ("vocab_size", json!(-5)),
        ("hidden_act", json!("swoosh")),
        ("layer_norm_eps", json!("small")),
        ("position_embedding_type", json!("relative_key")),
    ] {
        let mut changed = bert_config();
        changed[field] = value;
        fs::write(&config, changed.to_string()).unwrap();
        let ran = roofbench(folder.path(), words(&format!("run --weights model --threads 1 {SHORT}")));
        ran.expect(1, &["FAILED", "config.json", if field == "num_attention_heads" { "hidden_size" } else { field }]);
    }
}

#[test]
fn a_bad_checkpoint_is_named_down_to_its_tensor() {
    let folder = with_model();
    let model = folder.path().join("model");
    let run = words("run --weights model --threads 1 --output r.jsonl --cell b1/s128 --max-samples 3");
    let file = model.join("model.safetensors");

    let mut tensors = bert_tensors();
    let query = tensors.iter().position(|(name, _)| name.ends_with("query.weight")).unwrap();
    tensors[query].1 = vec![16, 17];
    checkpoint(&model, &bert_config(), &tensors);
    let name = "encoder.layer.0.attention.self.query.weight";
    roofbench(folder.path(), run.iter()).expect(1, &[name, "[16, 17]", "the model expects [16, 16]"]);

    tensors.remove(query);
    checkpoint(&model, &bert_config(), &tensors);
    roofbench(folder.path(), run.iter()).expect(1, &[name, "is missing"]);

    let mut tensors = bert_tensors();
    tensors.push(("encoder.layer.7.surprise.weight".to_owned(), vec![2, 2]));
    checkpoint(&model, &bert_config(), &tensors);
    let ran = roofbench(folder.path(), run.iter());
    ran.expect(1, &["encoder.layer.7.surprise.weight", "--ignore-extra-tensors"]);
    roofbench(folder.path(), run.iter().chain(&["--ignore-extra-tensors"])).expect(0, &["sequences/s"]);

    let bytes = fs::read(&file).unwrap();
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let lies = br#"{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,4]}}"#;
    let lies = [&(lies.len() as u64).to_le_bytes()[..], lies, &[0; 4]].concat();
    for damaged in [&bytes[..bytes.len() / 2], &bytes[..5], &[], &huge, &lies] {
        fs::write(&file, damaged).unwrap();
        roofbench(folder.path(), run.iter()).expect(2, &["--weights model", "model.safetensors"]);
    }
    fs::remove_file(&file).unwrap();
    roofbench(folder.path(), run.iter()).expect(2, &["--weights model", "safetensors"]);

    // Each failure that had begun is in the record, with its reason.
    let outcomes: Vec<_> = records(&folder.path().join("r.jsonl")).into_iter().map(|record| record.outcome).collect();
    let failed = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Failed { error } if !error.is_empty()));
    assert_eq!((outcomes.len(), failed.count()), (4, 3), "{outcomes:?}");
}

#[test]
fn a_cell_that_takes_too_long_is_ended_and_recorded() {
    let folder = with_model();
    let endless = "--min-time 500 --max-time 600 --max-samples 1000000 --cell b1/s128 --timeout 1";
    let ran = roofbench(folder.path(), words(&format!("run --weights model --threads 1 --output r.jsonl {endless}")));
    ran.expect(1, &["FAILED", "longer than its limit of 1 s", "--timeout"]);
    assert!(matches!(records(&folder.path().join("r.jsonl"))[0].outcome, Outcome::Failed { .. }));
}

/// SIGINT to the program alone, as from another terminal: the cell at hand is kept, the next is not begun.
#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    use support::program;

    let folder = with_model();
    let endless = "--min-time 500 --max-time 600 --max-samples 1000000 --threads 1 -v --output r.jsonl";
    let arguments = format!("run --weights model {endless}");
    let mut child =
        program(folder.path()).args(words(&arguments)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("steady state") {
        assert_ne!(told.read_line(&mut text).unwrap(), 0, "it ended before it measured: {text}");
    }
    let interrupt = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    told.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{text}");

    let records = records(&folder.path().join("r.jsonl"));
    let [record] = &records[..] else { panic!("{} records: {text}", records.len()) };
    let Outcome::Measured(measurement) = &record.outcome else { panic!("{:?}", record.outcome) };
    assert_eq!(measurement.stop, StopRule::Interrupted);
    assert!(!measurement.samples.is_empty());
    assert!(text.contains("interrupted: 1 of 3 cells done"), "{text}");
}
