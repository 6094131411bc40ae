//! Checkpoints of one class that another is loaded from: every tensor finds its use, and what both give is the same.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, safetensors};
use roofbench_core::session::{Call, ModelSpec, Unobserved};
use roofbench_core::weights::{HubOptions, Source, Weights};
use roofbench_vision::{aliases, candle_core, load};
use serde_json::{Value, json};

fn spec(family: &str, class: &str, config: &Value) -> ModelSpec {
    ModelSpec::new(family, class, config.clone())
}

/// Saves the made-up weights of class `from`, renamed, and loads `to` from them; both have to give the same `output`.
fn check(family: &str, [from, to]: [&str; 2], config: &Value, output: Option<&str>, rename: impl Fn(&str) -> String) {
    let pixels = Tensor::arange(0f32, (3 * 64 * 64) as f32, &Device::Cpu).unwrap().sin().unwrap();
    let inputs = [("pixel_values".to_owned(), pixels.reshape((1, 3, 64, 64)).unwrap())].into();
    let call = Call { method: "forward".into(), inputs, ..Default::default() };

    let spec_from = spec(family, from, config);
    let source = Source::Synthetic { seed: 0 };
    let weights = Weights::open(&source, aliases(family), from, &HubOptions::default()).unwrap();
    let expected = load(&spec_from, &weights).unwrap().call(&call, &mut Unobserved).unwrap();

    let vb = weights.var_builder(DType::F32, &Device::Cpu);
    let tensor = |(name, shape): (String, Vec<usize>)| (rename(&name), vb.get(shape, &name).unwrap());
    let mut tensors: HashMap<String, Tensor> = weights.requested().into_iter().map(tensor).collect();
    let counters: Vec<String> =
        tensors.keys().filter_map(|name| name.strip_suffix("running_mean")).map(String::from).collect();
    for norm in counters {
        tensors.insert(format!("{norm}num_batches_tracked"), Tensor::new(7i64, &Device::Cpu).unwrap());
    }
    let folder = std::env::temp_dir().join(format!("roofbench-{family}-{from}-{to}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("model.safetensors");
    safetensors::save(&tensors, &file).unwrap();

    let weights = Weights::open(&Source::Local { path: file }, aliases(family), to, &HubOptions::default()).unwrap();
    let mut session = load(&spec(family, to, config), &weights).unwrap();
    weights.check_complete(false).unwrap();
    let found = session.call(&call, &mut Unobserved).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    if let Some(output) = output {
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&found[output]), values(&expected[output]), "{from} as {to}");
    }
}

#[test]
fn resnet_without_its_head() {
    let config = json!({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3});
    let classes = ["ResNetForImageClassification", "ResNetModel"];
    check("resnet", classes, &config, None, str::to_owned);
    check("resnet", [classes[0]; 2], &config, Some("logits"), str::to_owned);
}

#[test]
fn detr_without_its_heads() {
    let backbone = json!({
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1],
        "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
    });
    let config = json!({
        "d_model": 32, "num_queries": 3, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "backbone_config": backbone, "num_labels": 3,
    });
    let (segmentation, detection) = ("DetrForSegmentation", "DetrForObjectDetection");
    check("detr", [segmentation, detection], &config, Some("pred_boxes"), str::to_owned);
    check("detr", [segmentation, "DetrModel"], &config, Some("last_hidden_state"), str::to_owned);
    check("detr", [detection, "DetrModel"], &config, Some("encoder_last_hidden_state"), str::to_owned);
    check("detr", [segmentation; 2], &config, Some("pred_masks"), str::to_owned);
}

#[test]
fn detr_on_a_wrapped_backbone_of_timm() {
    let config = json!({
        "d_model": 16, "num_queries": 2, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8, "backbone": "resnet18", "num_labels": 3,
    });
    let wrapped = |name: &str| name.replace("conv_encoder.model.", "conv_encoder.model._backbone.");
    check("detr", ["DetrForObjectDetection"; 2], &config, Some("logits"), wrapped);
}
