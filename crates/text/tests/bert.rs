//! BERT against `transformers`, alone and in batches, and what it says to bad input.

use std::path::{Path, PathBuf};

use roofbench_text::candle_core::{DType, Device, IndexOp, Tensor, safetensors};
use roofbench_text::serde_json::{self, Value, json};
use roofbench_text::tasks::embed;
use roofbench_text::{
    Call, Engine, HubOptions, ModelSpec, Session, SessionError, Source, Tensors, Unobserved, Weights, aliases, load,
};

const CASES: [&str; 3] = ["encoder", "masked-lm", "sequence-classification"];

/// A reference case: folder by folder as `transformers` ran it on synthetic weights.
struct Case {
    spec: ModelSpec,
    source: Source,
    inputs: Tensors,
    outputs: Tensors,
    tensors: Value,
    tolerance: f64,
}

impl Case {
    fn read(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference/bert").join(name);
        let json =
            |file: &str| -> Value { serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap() };
        let tensors = |file: &str| safetensors::load(folder.join(file), &Device::Cpu).unwrap().into_iter().collect();
        let about = json("case.json");
        Self {
            spec: spec(about["class"].as_str().unwrap(), json("config.json")),
            source: Source::Synthetic { seed: about["seed"].as_u64().unwrap() },
            inputs: tensors("inputs.safetensors"),
            outputs: tensors("outputs.safetensors"),
            tensors: json("tensors.json"),
            tolerance: about["tolerance"].as_f64().unwrap(),
        }
    }

    fn session(&self) -> Box<dyn Session> {
        load(&self.spec, &open(&self.source, &self.spec)).unwrap()
    }
}

fn spec(class: &str, config: Value) -> ModelSpec {
    ModelSpec::new("bert", class, config)
}

fn open(source: &Source, spec: &ModelSpec) -> Weights {
    Weights::open(source, aliases(spec), &spec.class, &HubOptions::default()).unwrap()
}

fn forward(session: &mut dyn Session, inputs: Tensors) -> Result<Tensors, SessionError> {
    session.call(&Call { method: "forward".into(), inputs, ..Default::default() }, &mut Unobserved)
}

/// max |ours - reference| / max |reference|
fn error(ours: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(ours.dims(), reference.dims());
    let values = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (ours, reference) = (values(ours), values(reference));
    assert!(ours.iter().all(|x| x.is_finite()));
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0f64, |max, x| max.max(x.abs()));
    largest(&mut ours.iter().zip(&reference).map(|(a, b)| a - b)) / largest(&mut reference.iter().copied())
}

#[test]
fn cases_agree_with_the_reference_and_ask_for_its_tensors() {
    for name in CASES {
        let case = Case::read(name);
        let weights = open(&case.source, &case.spec);
        let outputs = forward(load(&case.spec, &weights).unwrap().as_mut(), case.inputs).unwrap();
        assert_eq!(outputs.keys().collect::<Vec<_>>(), case.outputs.keys().collect::<Vec<_>>(), "{name}");
        for (field, reference) in &case.outputs {
            let error = error(&outputs[field], reference);
            assert!(error <= case.tolerance, "{name}: {field} is {error:e} off");
        }
        assert_eq!(json!(weights.requested()), case.tensors, "{name}");
    }
}

/// Outputs by token where they are, with the padded places left out.
fn rows(outputs: &Tensors, item: usize, seq: usize) -> Vec<Tensor> {
    let cut = |x: &Tensor| match x.rank() {
        3 => x.i((item, ..seq)),
        _ => x.i(item),
    };
    outputs.values().map(|x| cut(x).unwrap()).collect()
}

#[test]
fn an_item_in_a_batch_equals_it_alone_padded_or_not() {
    for name in CASES {
        let case = Case::read(name);
        let mut session = case.session();
        let lengths: Vec<usize> = case.inputs["attention_mask"]
            .sum(1)
            .unwrap()
            .to_vec1::<i64>()
            .unwrap()
            .into_iter()
            .map(|n| n as usize)
            .collect();
        assert!(lengths.iter().any(|&length| length < 13), "the case is to have padding");
        let batch = forward(session.as_mut(), case.inputs.clone()).unwrap();
        for (item, &length) in lengths.iter().enumerate() {
            let select = |seq: usize, names: &[&str]| -> Tensors {
                let cut = |x: &Tensor| x.i((item..item + 1, ..seq)).unwrap();
                names.iter().map(|&name| (name.to_string(), cut(&case.inputs[name]))).collect()
            };
            let padded = select(13, &["input_ids", "attention_mask", "token_type_ids"]);
            let bare = select(length, &["input_ids", "token_type_ids"]);
            for alone in [padded, bare] {
                let alone = forward(session.as_mut(), alone).unwrap();
                for (ours, theirs) in rows(&alone, 0, length).iter().zip(rows(&batch, item, length)) {
                    let error = error(ours, &theirs);
                    assert!(error <= case.tolerance, "{name}, item {item}: {error:e} off");
                }
            }
        }
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let case = Case::read("encoder");
    let mut session = case.session();
    let ids = &case.inputs["input_ids"];
    let bare = forward(session.as_mut(), [("input_ids".to_string(), ids.clone())].into()).unwrap();
    let (batch, seq) = ids.dims2().unwrap();
    let positions =
        Tensor::arange(0u32, seq as u32, &Device::Cpu).unwrap().unsqueeze(0).unwrap().repeat((batch, 1)).unwrap();
    let spelled_out = Tensors::from([
        ("input_ids".into(), ids.to_dtype(DType::U32).unwrap()),
        ("attention_mask".into(), ids.ones_like().unwrap()),
        ("token_type_ids".into(), ids.zeros_like().unwrap()),
        ("position_ids".into(), positions),
    ]);
    let full = forward(session.as_mut(), spelled_out).unwrap();
    assert!(error(&bare["last_hidden_state"], &full["last_hidden_state"]) <= 1e-6);
    // and each of the optional inputs counts
    for (name, value) in [("token_type_ids", 1i64), ("position_ids", 7)] {
        let other = Tensors::from([
            ("input_ids".into(), ids.clone()),
            (name.into(), (ids.zeros_like().unwrap() + value as f64).unwrap()),
        ]);
        let other = forward(session.as_mut(), other).unwrap();
        assert!(error(&other["last_hidden_state"], &bare["last_hidden_state"]) > 1e-2, "{name}");
    }
}

#[test]
fn half_precision_weights_stay_near() {
    for dtype in [DType::BF16, DType::F16] {
        let mut case = Case::read("masked-lm");
        case.spec.dtype = dtype;
        let outputs = forward(case.session().as_mut(), case.inputs).unwrap();
        // 8 bits of mantissa through 3 layers
        let error = error(&outputs["logits"], &case.outputs["logits"]);
        assert!(error < 3e-2 && error > 0., "{dtype:?}: {error:e} off");
    }
}

#[test]
fn bad_input_is_refused_by_name() {
    let case = Case::read("encoder");
    let mut session = case.session();
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::I64, &Device::Cpu).unwrap();
    let ids = |value: i64| Tensor::new(&[[1, value]], &Device::Cpu).unwrap();
    let good = || ("input_ids", ids(2));
    for (inputs, expected) in [
        (vec![], "input `input_ids`: is missing"),
        (vec![("input_ids", zeros((0, 3)))], "input `input_ids`: has shape [0, 3]"),
        (vec![("input_ids", ids(99))], "input `input_ids`: element 1 is 99, beyond vocab_size = 99"),
        (vec![("input_ids", ids(-1))], "input `input_ids`: element 1 is -1"),
        (
            vec![("input_ids", zeros((1, 41)))],
            "input `input_ids`: a sequence of 41 is longer than max_position_embeddings = 40",
        ),
        (
            vec![good(), ("attention_mask", zeros((1, 3)))],
            "input `attention_mask`: has shape [1, 3], input_ids have [1, 2]",
        ),
        (vec![good(), ("attention_mask", ids(2))], "input `attention_mask`: element 1 is 2, neither 0 nor 1"),
        (
            vec![good(), ("token_type_ids", ids(2))],
            "input `token_type_ids`: element 1 is 2, beyond type_vocab_size = 2",
        ),
        (
            vec![good(), ("position_ids", ids(40))],
            "input `position_ids`: element 1 is 40, beyond max_position_embeddings",
        ),
        (vec![good(), ("inputs_embeds", ids(0))], "input `inputs_embeds`: "),
    ] {
        let inputs: Tensors = inputs.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect();
        let call = Call { method: "forward".into(), inputs, ..Default::default() };
        for error in [session.call(&call, &mut Unobserved).err(), session.cost(&call).err()] {
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

#[test]
fn embeddings_need_an_encoder() {
    let embedded = |name: &str| {
        let case = Case::read(name);
        embed(case.session().as_mut(), case.inputs.clone())
    };
    let lengths = embedded("encoder").unwrap().sqr().unwrap().sum(1).unwrap().to_vec1::<f32>().unwrap();
    assert!(lengths.iter().all(|length| (length - 1.).abs() < 1e-6), "{lengths:?}");
    let error = embedded("masked-lm").unwrap_err().to_string();
    assert!(error.starts_with("input `last_hidden_state`: is no output of this class"), "{error}");
}

#[test]
fn candle_transformers_runs_the_same_weights() {
    for (name, field) in [("encoder", "last_hidden_state"), ("masked-lm", "logits")] {
        let mut case = Case::read(name);
        case.spec.engine = Engine::CandleTransformers;
        let outputs = forward(case.session().as_mut(), case.inputs).unwrap();
        assert_eq!(outputs.keys().collect::<Vec<_>>(), [field]);
        let error = error(&outputs[field], &case.outputs[field]);
        assert!(error <= case.tolerance, "{name}: {error:e} off");
    }

    let mut case = Case::read("sequence-classification");
    case.spec.engine = Engine::CandleTransformers;
    let refused = load(&case.spec, &open(&case.source, &case.spec)).err().unwrap().to_string();
    assert_eq!(refused, "bert: candle-transformers has no BertForSequenceClassification; use roofbench");
}

#[test]
fn other_families_and_classes_are_refused() {
    let case = Case::read("encoder");
    let mut spec = case.spec.clone();
    spec.class = "BertForNextSentencePrediction".into();
    let error = load(&spec, &open(&case.source, &spec)).err().unwrap();
    assert!(matches!(error, SessionError::UnsupportedClass { .. }), "{error}");
    spec.family = "gpt-9".into();
    let error = load(&spec, &open(&case.source, &spec)).err().unwrap().to_string();
    assert!(error.starts_with("gpt-9: is no text family here; supported: bert, "), "{error}");
}

/// What a checkpoint folder lacks is named with the file.
#[test]
fn a_missing_tensor_and_a_misshapen_one_are_named() {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-bert");
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let source = Source::Local { path: folder };

    let spec = spec("BertForSequenceClassification", config);
    let error = load(&spec, &open(&source, &spec)).err().unwrap().to_string();
    assert!(error.contains("tiny-bert") && error.contains("`classifier.weight` is missing"), "{error}");

    let mut wide = self::spec("BertForMaskedLM", spec.config.clone());
    wide.config["intermediate_size"] = json!(13);
    let error = load(&wide, &open(&source, &wide)).err().unwrap().to_string();
    assert!(error.contains("`bert.encoder.layer.0.intermediate.dense.weight` has shape [12, 8]"), "{error}");
}
