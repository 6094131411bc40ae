//! Checkpoints on disk under the names that published ones have give what the cases' own names give.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use roofbench_core::reference::Case;
use roofbench_core::weights::synthetic;
use roofbench_speech::{Engine, HubOptions, SessionError, Source, Tensors, Unobserved, Weights, aliases, load};

/// Runs a case with weights of `source`, all of which it is to read.
fn run(case: &Case, source: &Source) -> Result<(Tensors, Weights), SessionError> {
    let spec = case.spec(&Device::Cpu, Engine::Roofbench).expect("a config");
    let weights = Weights::open(source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
    let call = case.call(&Device::Cpu).expect("inputs");
    let outputs = load(&spec, &weights)?.call(&call, &mut Unobserved)?;
    weights.check_complete(false)?;
    Ok((outputs, weights))
}

/// `rename` gives the names that a tensor has in the file; `extra` are tensors that only the file has.
fn check(case: &str, rename: impl Fn(&str) -> Vec<String>, extra: &[(&str, &[usize])]) -> Result<(), SessionError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference").join(case);
    let case = Case::read(&folder).expect("a case");
    let Source::Synthetic { seed } = case.source() else { panic!("a case has weights of a seed") };
    let (wanted, made) = run(&case, &case.source())?;
    let mut file = HashMap::new();
    for (name, shape) in made.requested() {
        let tensor = synthetic::tensor(&name, &shape, seed, DType::F32, &Device::Cpu)?;
        file.extend(rename(&name).into_iter().map(|name| (name, tensor.clone())));
    }
    for (name, shape) in extra {
        file.insert((*name).to_owned(), Tensor::zeros(*shape, DType::F32, &Device::Cpu)?);
    }
    let folder = tempfile::tempdir().expect("a folder");
    candle_core::safetensors::save(&file, folder.path().join("model.safetensors"))?;
    let (found, _) = run(&case, &Source::Local { path: folder.path().to_owned() })?;
    for (name, wanted) in wanted {
        let flat = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        assert_eq!(flat(&found[&name])?, flat(&wanted)?, "{}: {name}", case.name);
    }
    Ok(())
}

/// Weight norm as torch named it until 2.0.
fn early(name: &str) -> String {
    name.replace("parametrizations.weight.original0", "weight_g")
        .replace("parametrizations.weight.original1", "weight_v")
}

#[test]
fn encodec() -> Result<(), SessionError> {
    check("encodec/mono-causal", |name| vec![early(name)], &[])?;
    // only the vectors of the codebooks
    let vectors_alone = |name: &str| match name.contains(".codebook.") && !name.ends_with(".embed") {
        true => Vec::new(),
        false => vec![name.to_owned()],
    };
    check("encodec/stereo-chunked", vectors_alone, &[])
}

#[test]
fn whisper() -> Result<(), SessionError> {
    let tied = |name: &str| match name {
        "model.decoder.embed_tokens.weight" => vec!["proj_out.weight".to_owned()],
        name => vec![name.to_owned()],
    };
    check("whisper/multilingual", tied, &[])?;
    check("whisper/multilingual", |name| vec![name.trim_start_matches("model.").to_owned()], &[])?;
    let decoder: &[(&str, &[usize])] = &[("model.decoder.layer_norm.bias", &[32]), ("proj_out.weight", &[99, 32])];
    check("whisper/encoder", |name| vec![format!("model.encoder.{name}")], decoder)?;
    check("whisper/encoder", |name| vec![format!("encoder.{name}")], &[("projector.bias", &[24])])?;
    let prefixed = |name: &str| match name.strip_prefix("encoder.") {
        Some(name) => vec![format!("model.encoder.{name}")],
        None => vec![name.to_owned()],
    };
    check("whisper/audio-classification", prefixed, decoder)
}

#[test]
fn speecht5() -> Result<(), SessionError> {
    let tied = |name: &str| match name {
        "speecht5.decoder.prenet.embed_tokens.weight" => vec!["text_decoder_postnet.lm_head.weight".to_owned()],
        name => vec![early(name)],
    };
    let sinusoids: &[(&str, &[usize])] = &[
        ("speecht5.encoder.prenet.pos_sinusoidal_embed.weights", &[64, 32]),
        ("speecht5.decoder.prenet.embed_positions.weights", &[54, 32]),
    ];
    check("speecht5/speech-to-text-generate", tied, sinusoids)?;
    let buffers: &[(&str, &[usize])] = &[
        ("speecht5.encoder.prenet.encode_positions.pe", &[1, 50, 32]),
        ("speecht5.decoder.prenet.encode_positions.pe", &[1, 60, 32]),
        ("speech_decoder_postnet.layers.0.batch_norm.num_batches_tracked", &[]),
    ];
    check("speecht5/text-to-speech", |name| vec![name.to_owned()], buffers)
}
