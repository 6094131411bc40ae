//! The names that published checkpoints of T5 and BART have: each form gives what the library's own names give.

use std::collections::HashMap;

use roofbench_text::candle_core::{DType, Device, Tensor, safetensors};
use roofbench_text::serde_json::{Value, json};
use roofbench_text::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};

type Stored = HashMap<String, Tensor>;

fn spec(family: &str, class: &str, config: Value) -> ModelSpec {
    ModelSpec::new(family, class, config)
}

/// Output `name` of a call of `forward` on the weights of `source`, each of which has to find its use, and these weights.
fn run(spec: &ModelSpec, source: &Source, output: &str) -> (Vec<f32>, Stored) {
    let weights = Weights::open(source, aliases(spec), &spec.class, &HubOptions::default()).unwrap();
    let mut session = load(spec, &weights).unwrap();
    weights.check_complete(false).unwrap();
    let ids = Tensor::new(&[[1i64, 2, 3, 4]], &Device::Cpu).unwrap();
    let names = ["input_ids", "decoder_input_ids"].into_iter().take(if output == "last_hidden_state" { 1 } else { 2 });
    let inputs = names.map(|name| (name.to_owned(), ids.clone())).collect();
    let call = Call { method: "forward".into(), inputs, ..Default::default() };
    let outputs = session.call(&call, &mut Unobserved).unwrap();
    let vb = weights.var_builder(DType::F32, &Device::Cpu);
    let tensors = weights.requested().into_iter().map(|(name, shape)| (name.clone(), vb.get(shape, &name).unwrap()));
    let tensors = tensors.collect();
    (outputs[output].flatten_all().unwrap().to_vec1().unwrap(), tensors)
}

/// The same on `tensors` in a file.
fn run_stored(spec: &ModelSpec, tensors: &Stored, output: &str) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    safetensors::save(tensors, &path).unwrap();
    run(spec, &Source::Local { path }, output).0
}

const SYNTHETIC: Source = Source::Synthetic { seed: 0 };

fn t5(changes: &[(&str, Value)]) -> Value {
    let mut config = json!({"vocab_size": 9, "d_model": 4, "d_kv": 3, "d_ff": 5, "num_layers": 2, "num_heads": 2});
    for (field, value) in changes {
        config[*field] = value.clone();
    }
    config
}

#[test]
fn t5_with_copies_and_left_over_tensors() {
    let spec = spec("t5", "T5ForConditionalGeneration", t5(&[]));
    let (expected, mut tensors) = run(&spec, &SYNTHETIC, "logits");
    assert_eq!(run_stored(&spec, &tensors, "logits"), expected);
    let shared = tensors["shared.weight"].clone();
    for copy in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"] {
        tensors.insert(copy.into(), shared.copy().unwrap());
    }
    let bias = Tensor::zeros((32, 2), DType::F32, &Device::Cpu).unwrap();
    tensors.insert("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight".into(), bias);
    assert_eq!(run_stored(&spec, &tensors, "logits"), expected);

    // the encoder of the same file
    let alone = self::spec("t5", "T5EncoderModel", t5(&[]));
    let states = run(&alone, &SYNTHETIC, "last_hidden_state").0;
    assert_eq!(run_stored(&alone, &tensors, "last_hidden_state"), states);
    assert_eq!(run(&spec, &SYNTHETIC, "encoder_last_hidden_state").0, states);
}

#[test]
fn t5_with_an_output_matrix_of_its_own() {
    let untied = |changes: &[(&str, Value)]| spec("t5", "T5ForConditionalGeneration", t5(changes));
    let hub = untied(&[("tie_word_embeddings", json!(false))]);
    let (expected, tensors) = run(&hub, &SYNTHETIC, "logits");
    assert!(tensors.contains_key("lm_head.weight"));
    assert_eq!(run_stored(&hub, &tensors, "logits"), expected);
    // as the library saves it
    let saved = untied(&[("tie_word_embeddings", json!(true)), ("scale_decoder_outputs", json!(false))]);
    assert_eq!(run_stored(&saved, &tensors, "logits"), expected);
    assert!(!run(&saved, &SYNTHETIC, "logits").1.contains_key("lm_head.weight"));
}

#[test]
fn bart_with_copies_and_saved_from_the_base_class() {
    let mut config = json!({
        "vocab_size": 9, "d_model": 4, "max_position_embeddings": 6, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 5, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 5,
    });
    let whole = spec("bart", "BartForConditionalGeneration", config.clone());
    let (expected, mut tensors) = run(&whole, &SYNTHETIC, "logits");
    assert!(tensors.contains_key("final_logits_bias"));
    let shared = tensors["model.shared.weight"].clone();
    for copy in ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"] {
        tensors.insert(copy.into(), shared.copy().unwrap());
    }
    assert_eq!(run_stored(&whole, &tensors, "logits"), expected);

    config["architectures"] = json!(["BartModel"]);
    let base = spec("bart", "BartForConditionalGeneration", config);
    let (expected, _) = run(&base, &SYNTHETIC, "logits");
    let bare =
        tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?.to_owned(), tensor.clone())));
    let bare: Stored = bare.collect();
    assert!(bare.contains_key("encoder.embed_tokens.weight") && !bare.contains_key("final_logits_bias"));
    assert_eq!(run_stored(&base, &bare, "logits"), expected);
}
