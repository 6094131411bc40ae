//! The cost by formula against what the blocks counted as they ran.

use roofbench_nn::cost;
use roofbench_text::candle_core::{DType, Device, Tensor};
use roofbench_text::serde_json::json;
use roofbench_text::{Call, Engine, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};

#[test]
fn flops_of_bert_are_those_that_ran() {
    for class in ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"] {
        for (batch, seq) in [(1, 1), (1, 9), (3, 5)] {
            let config = json!({
                "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
                "intermediate_size": 40, "max_position_embeddings": 16, "type_vocab_size": 2, "num_labels": 3,
            });
            let spec = ModelSpec {
                family: "bert".into(),
                class: class.into(),
                config,
                extra_configs: Default::default(),
                dtype: DType::F32,
                device: Device::Cpu,
                engine: Engine::Roofbench,
            };
            let source = Source::Synthetic { seed: 1 };
            let weights = Weights::open(&source, aliases(&spec), class, &HubOptions::default()).unwrap();
            let mut session = load(&spec, &weights).unwrap();
            let ids = Tensor::ones((batch, seq), DType::I64, &Device::Cpu).unwrap();
            let inputs = [("input_ids".into(), ids)].into();
            let call = Call { method: "forward".into(), inputs, ..Default::default() };
            let (outputs, recorded) = cost::record(|| session.call(&call, &mut Unobserved));
            outputs.unwrap();
            let formula: u64 = session.cost(&call).unwrap().iter().map(|phase| phase.cost.flops).sum();
            assert_eq!(recorded.flops, formula, "{class}, {batch} x {seq}");
        }
    }
}
