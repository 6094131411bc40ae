//! ResNet in both engines, on the same weights.

use candle_core::{DType, Device, Tensor};
use roofbench_core::session::{Call, Engine, ModelSpec, SessionError, Tensors, Unobserved};
use roofbench_core::weights::{HubOptions, Source, Weights};
use roofbench_vision::{aliases, candle_core, load};
use serde_json::{Value, json};

fn run(engine: Engine, config: &Value) -> Result<Tensors, SessionError> {
    let spec = ModelSpec {
        family: "resnet".into(),
        class: "ResNetForImageClassification".into(),
        config: config.clone(),
        extra_configs: Default::default(),
        dtype: DType::F32,
        device: Device::Cpu,
        engine,
    };
    let source = Source::Synthetic { seed: 0 };
    let weights = Weights::open(&source, aliases("resnet"), &spec.class, &HubOptions::default())?;
    let pixels = Tensor::arange(0f32, (2 * 3 * 70 * 61) as f32, &Device::Cpu)?.sin()?.reshape((2, 3, 70, 61))?;
    let inputs = [("pixel_values".to_owned(), pixels)].into();
    let call = Call { method: "forward".into(), inputs, ..Default::default() };
    load(&spec, &weights)?.call(&call, &mut Unobserved)
}

#[test]
fn the_stock_model_agrees_where_it_can_run() {
    let published =
        [("basic", [2, 2, 2, 2], [64, 128, 256, 512]), ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048])];
    for (layer_type, depths, hidden_sizes) in published {
        let config = json!({"layer_type": layer_type, "depths": depths, "hidden_sizes": hidden_sizes, "num_labels": 5});
        let ours = run(Engine::Roofbench, &config).expect("ours").remove("logits").expect("logits");
        let stock =
            run(Engine::CandleTransformers, &config).expect("the stock model").remove("logits").expect("logits");
        let largest = |x: &Tensor| x.abs().and_then(|x| x.flatten_all()?.max(0)?.to_scalar::<f32>()).expect("a number");
        let error = largest(&(&ours - &stock).expect("one shape")) / largest(&ours);
        // sums of some thousand products in another order, up to fifty layers deep
        assert!(error < 2e-5, "{layer_type}: {error}");
    }
}

#[test]
fn other_shapes_are_refused_by_the_stock_model() {
    let message = |config: Value| run(Engine::CandleTransformers, &config).err().map(|error| error.to_string());
    let depths = message(json!({"depths": [1, 1, 1, 1]})).unwrap_or_default();
    assert_eq!(depths, "resnet: candle-transformers has ResNet-18, 34, 50, 101 and 152 alone");
    let strides = message(json!({"downsample_in_bottleneck": true})).unwrap_or_default();
    assert_eq!(strides, "resnet: candle-transformers has the published widths, strides and ReLU alone");
}
