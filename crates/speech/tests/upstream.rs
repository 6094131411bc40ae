//! The models of `candle-transformers` give what ours give on the same weights, where they mean the same.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use roofbench_core::reference::Case;
use roofbench_core::weights::synthetic;
use roofbench_speech::{
    Call, Engine, HubOptions, ModelSpec, SessionError, Source, Tensors, Unobserved, Weights, aliases, load,
};
use serde_json::json;

fn case(name: &str) -> ModelSpec {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference").join(name);
    Case::read(&folder).expect("a case").spec(&Device::Cpu, Engine::Roofbench).expect("a config")
}

fn run(spec: &ModelSpec, engine: Engine, source: &Source, call: &Call) -> Result<(Tensors, Weights), SessionError> {
    let spec = ModelSpec { engine, ..spec.clone() };
    let weights = Weights::open(source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
    let mut session = load(&spec, &weights)?;
    weights.check_complete(false)?;
    assert!(!session.cost(call)?.is_empty());
    Ok((session.call(call, &mut Unobserved)?, weights))
}

#[test]
fn encodec() -> Result<(), SessionError> {
    let mut spec = case("encodec/mono-causal");
    spec.config["codebook_size"] = json!(1024);
    spec.config["pad_mode"] = json!("constant"); // the other one is not the stock model's
    let sound = synthetic::tensor("input:input_values", &[1, 1, 2400], 0, DType::F32, &Device::Cpu)?;
    let mut call = Call {
        method: "forward".into(),
        inputs: [("input_values".to_owned(), sound)].into(),
        arguments: json!({"bandwidth": 24.0}).as_object().cloned().unwrap_or_default(),
    };
    let source = Source::Synthetic { seed: 0 };
    for bandwidth in [24.0, 12.0] {
        call.arguments.insert("bandwidth".into(), bandwidth.into());
        let (ours, _) = run(&spec, Engine::Roofbench, &source, &call)?;
        let (stock, _) = run(&spec, Engine::CandleTransformers, &source, &call)?;
        let codes = |outputs: &Tensors| outputs["audio_codes"].flatten_all()?.to_vec1::<i64>();
        assert_eq!(codes(&stock)?, codes(&ours)?);
        let difference = (&stock["audio_values"] - &ours["audio_values"])?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-4, "{difference}");
    }
    call.arguments.insert("bandwidth".into(), json!(5));
    assert!(run(&spec, Engine::CandleTransformers, &source, &call).is_err_and(|e| e.to_string().contains("bandwidth")));
    let refused = run(&case("encodec/stereo-chunked"), Engine::CandleTransformers, &source, &call);
    assert!(refused.is_err_and(|error| matches!(error, SessionError::UnsupportedEngine { .. })));
    Ok(())
}

#[test]
fn whisper() -> Result<(), SessionError> {
    let mut spec = case("whisper/detected-language-generate");
    let width = spec.config["d_model"].as_u64().expect("a width") as usize;
    for half in ["encoder_ffn_dim", "decoder_ffn_dim"] {
        spec.config[half] = json!(4 * width);
    }
    let size = |field: &str| spec.config[field].as_u64().expect("a size") as usize;
    let (bins, positions) = (size("num_mel_bins"), size("max_source_positions"));
    let shape = [2, bins, 2 * positions];
    let features = synthetic::tensor("input:input_features", &shape, 0, DType::F32, &Device::Cpu)?;
    let arguments = json!({"max_new_tokens": 6, "output_logits": true}).as_object().cloned().unwrap_or_default();
    let call = Call { method: "generate".into(), inputs: [("input_features".to_owned(), features)].into(), arguments };
    let (_, made) = run(&spec, Engine::Roofbench, &Source::Synthetic { seed: 0 }, &call)?;
    let mut file = HashMap::new();
    for (name, shape) in made.requested() {
        file.insert(name.clone(), synthetic::tensor(&name, &shape, 0, DType::F32, &Device::Cpu)?);
    }
    // as published checkpoints have them, and the stock model whatever a checkpoint has
    let half = width / 2;
    let speed = |at: usize| (-(at as f32) * (10_000f32.ln() / (half - 1) as f32)).exp();
    let angles = |row: usize| (0..half).map(move |at| row as f32 * speed(at));
    let rows: Vec<f32> = (0..positions)
        .flat_map(|row| angles(row).map(f32::sin).chain(angles(row).map(f32::cos)).collect::<Vec<_>>())
        .collect();
    let positions = Tensor::from_vec(rows, (positions, width), &Device::Cpu)?;
    file.insert("model.encoder.embed_positions.weight".to_owned(), positions);
    let folder = tempfile::tempdir().expect("a folder");
    candle_core::safetensors::save(&file, folder.path().join("model.safetensors"))?;
    let source = Source::Local { path: folder.path().to_owned() };
    let (stock, _) = run(&spec, Engine::CandleTransformers, &source, &call)?;
    spec.config["activation_function"] = json!("gelu_new"); // the stock model's GELU whatever the config says
    let (ours, _) = run(&spec, Engine::Roofbench, &source, &call)?;
    let tokens = |outputs: &Tensors| outputs["sequences"].to_vec2::<i64>();
    assert_eq!(tokens(&stock)?, tokens(&ours)?);
    let difference = (&stock["logits"] - &ours["logits"])?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference < 1e-3, "{difference}");
    spec.class = "WhisperEncoder".into();
    let refused = load(&ModelSpec { engine: Engine::CandleTransformers, ..spec }, &made);
    assert!(refused.is_err_and(|error| matches!(error, SessionError::UnsupportedEngine { .. })));
    Ok(())
}
