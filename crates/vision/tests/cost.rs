//! The cost by formula against what the blocks counted as they ran.

use candle_core::{DType, Device, Tensor};
use roofbench_core::session::{Call, Engine, ModelSpec, Unobserved};
use roofbench_core::weights::{HubOptions, Source, Weights};
use roofbench_nn::cost;
use roofbench_vision::{aliases, candle_core, load};
use serde_json::json;

#[test]
fn flops_of_vit_are_those_that_ran() {
    for class in ["ViTModel", "ViTForImageClassification"] {
        for (batch, size, interpolate) in [(1, 16, false), (3, 16, false), (2, 24, true)] {
            let config = json!({
                "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
                "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 5,
            });
            let spec = ModelSpec {
                family: "vit".into(),
                class: class.into(),
                config,
                extra_configs: Default::default(),
                dtype: DType::F32,
                device: Device::Cpu,
                engine: Engine::Roofbench,
            };
            let source = Source::Synthetic { seed: 1 };
            let weights = Weights::open(&source, aliases("vit"), class, &HubOptions::default()).expect("weights");
            let mut session = load(&spec, &weights).expect("a model");
            let pixels = Tensor::ones((batch, 3, size, size), DType::F32, &Device::Cpu).expect("pixels");
            let mut call = Call {
                method: "forward".into(),
                inputs: [("pixel_values".into(), pixels)].into(),
                ..Default::default()
            };
            if interpolate {
                call.arguments.insert("interpolate_pos_encoding".into(), json!(true));
            }
            let (outputs, recorded) = cost::record(|| session.call(&call, &mut Unobserved));
            outputs.expect("outputs");
            let formula: u64 = session.cost(&call).expect("a cost").iter().map(|phase| phase.cost.flops).sum();
            assert_eq!(recorded.flops, formula, "{class}, {batch} x {size}");
        }
    }
}
