//! Checkpoints on disk under the names that published ones have, and the families against `transformers`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use roofbench_core::reference::{self, Case, Models, Setting};
use roofbench_core::weights::synthetic;
use roofbench_speech::{
    AliasRule, Call, HubOptions, ModelSpec, Processor, Session, SessionError, Source, Tensors, Unobserved, Weights,
    aliases, load,
};
use serde_json::{Value, json};

struct Speech;

impl Models for Speech {
    fn aliases(&self, spec: &ModelSpec) -> &'static [AliasRule] {
        aliases(spec)
    }
    fn load(&self, spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
        load(spec, weights)
    }
    fn processor(&self, family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
        roofbench_speech::processor(family, configs)
    }
}

#[test]
fn every_case_passes_at_its_own_tolerance() {
    for family in ["wav2vec2", "hubert", "wavlm", "unispeech"] {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference").join(family);
        let folders = reference::find(&fixtures).expect("cases");
        assert!(folders.len() > 3, "{family}");
        for folder in folders {
            let case = Case::read(&folder).expect("a case");
            let verdict = case.run(&Speech, &Setting::default()).expect("runs");
            let (weights, outputs) = (&verdict.weights, &verdict.outputs);
            assert!(case.has_answers() && verdict.passed(), "{family}/{}: {weights:?} {outputs:?}", case.name);
        }
    }
}

fn spec(class: &str, mask_time_prob: f64) -> ModelSpec {
    ModelSpec::new(
        "wav2vec2",
        class,
        json!({
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 5,
            "conv_dim": [4, 6], "conv_kernel": [4, 2], "conv_stride": [2, 2], "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "mask_time_prob": mask_time_prob,
        }),
    )
}

fn run(spec: &ModelSpec, source: &Source) -> Result<(Tensors, Weights), SessionError> {
    let weights = Weights::open(source, aliases(spec), &spec.class, &HubOptions::from_env())?;
    let sound = synthetic::tensor("input:input_values", &[1, 60], 0, DType::F32, &Device::Cpu)?;
    let inputs = [("input_values".to_owned(), sound)].into();
    let call = Call { method: "forward".into(), inputs, arguments: Default::default() };
    Ok((load(spec, &weights)?.call(&call, &mut Unobserved)?, weights))
}

/// As facebook/wav2vec2-base-960h and -base have them: the older names of weight norm, heads of other tasks, with or
/// without the vector that masks frames.
#[test]
fn published_names_are_read() -> Result<(), SessionError> {
    for (class, prefix, masks, has_vector) in [
        ("Wav2Vec2ForCTC", "wav2vec2.", 0.05, false),
        ("Wav2Vec2ForCTC", "", 0.05, true),
        ("Wav2Vec2Model", "wav2vec2.", 0.0, true),
    ] {
        let spec = spec(class, masks);
        let (wanted, made) = run(&spec, &Source::Synthetic { seed: 0 })?;
        let base = |name: &str| name.strip_prefix("wav2vec2.").unwrap_or(name).to_owned();
        let mut file = HashMap::new();
        for (name, shape) in made.requested() {
            let tensor = synthetic::tensor(&name, &shape, 0, DType::F32, &Device::Cpu)?;
            let name = match base(&name) {
                head if head.starts_with("lm_head") => head,
                name => format!("{prefix}{name}"),
            };
            let name = name.replace("parametrizations.weight.original0", "weight_g");
            file.insert(name.replace("parametrizations.weight.original1", "weight_v"), tensor);
        }
        let vector = format!("{prefix}masked_spec_embed");
        file.remove(&vector);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        if has_vector {
            file.insert(vector, zeros(&[8])?);
        }
        file.insert("project_q.weight".to_owned(), zeros(&[3, 3])?);
        if class == "Wav2Vec2Model" {
            file.insert("lm_head.bias".to_owned(), zeros(&[5])?);
        }
        let folder = tempfile::tempdir().expect("a folder");
        candle_core::safetensors::save(&file, folder.path().join("model.safetensors"))?;
        let (found, weights) = run(&spec, &Source::Local { path: folder.path().to_owned() })?;
        weights.check_complete(false)?;
        for (name, wanted) in wanted {
            let difference = (&found[&name] - wanted)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert_eq!(difference, 0.0, "{class}: {name}");
        }
    }
    Ok(())
}
