//! `candle_transformers::models::falcon` behind our session.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::falcon;
use roofbench_core::cost::PhaseCost;
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;
use roofbench_nn::rope::RopeConfig;

use crate::causal::phase_costs;
use crate::models::falcon::FalconConfig;
use crate::models::layer_norm_decoder::{self, Sizes};

/// `FalconForCausalLM` of one head of keys and values with rotary positions, as Falcon-7B, on one sequence. It keeps
/// keys and values, gives the logits of the last position alone, and takes GELU's approximation by tanh for GELU.
pub(crate) struct Falcon {
    model: falcon::Falcon,
    sizes: Sizes,
    spec: ModelSpec,
}

impl Falcon {
    /// Rows of its table of rotary positions.
    const MOST_POSITIONS: usize = 5000;

    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = FalconConfig::from_spec(spec)?;
        let sizes = cfg.sizes();
        let lacking = [
            ("ALiBi", cfg.alibi),
            ("new_decoder_architecture", cfg.new_decoder_architecture),
            ("multi_query = false", !cfg.multi_query),
            ("ffn_hidden_size but 4 * hidden_size", sizes.inner != 4 * sizes.hidden),
            ("activation but gelu", !matches!(cfg.activation, Activation::Gelu | Activation::GeluTanh)),
            ("rotary positions but the plain ones of base 10000", cfg.rope != RopeConfig::default()),
        ];
        if let Some((what, _)) = lacking.iter().find(|(_, asked)| *asked) {
            let reason = format!("candle-transformers has no {what} here; use --engine roofbench");
            return Err(SessionError::UnsupportedEngine { family: spec.family.clone(), reason });
        }
        let config = falcon::Config {
            vocab_size: cfg.vocab_size,
            hidden_size: cfg.hidden_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            layer_norm_epsilon: cfg.layer_norm_epsilon,
            parallel_attn: cfg.parallel_attn,
            bias: cfg.bias,
            ..falcon::Config::default()
        };
        let tied = cfg.tie_word_embeddings;
        let vb = vb.rename_f(move |name| match name {
            "lm_head.weight" if tied => "transformer.word_embeddings.weight".to_owned(),
            _ => name.to_owned(),
        });
        Ok(Self { model: falcon::Falcon::load(vb, config)?, sizes, spec: spec.clone() })
    }

    /// The prompt, (1, seq), and what is to be made of it.
    fn read(&self, call: &Call) -> Result<(Vec<Vec<i64>>, Generation), SessionError> {
        if call.method != "generate" {
            let reason =
                format!("`{}`: candle-transformers gives the last position's logits; generate runs", call.method);
            return Err(SessionError::input("method", reason));
        }
        let inputs = Inputs::of_any_method(call, &["input_ids", "attention_mask"])?;
        let input_ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &input_ids, "vocab_size", self.sizes.vocab)?;
        let (batch, seq) = input_ids.dims2()?;
        if batch != 1 {
            return Err(SessionError::input(
                "input_ids",
                format!("has {batch} sequences; candle-transformers takes 1"),
            ));
        }
        if let Some(mask) = inputs.matrix_like("attention_mask", &input_ids)? {
            zero_or_one("attention_mask", &mask)?;
            if mask.to_vec2::<i64>()?.concat().contains(&0) {
                return Err(SessionError::input(
                    "attention_mask",
                    "has padding, which candle-transformers does not see",
                ));
            }
        }
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        if generation.positions(seq) > Self::MOST_POSITIONS {
            let reason = format!("comes to more than the {} positions of candle-transformers", Self::MOST_POSITIONS);
            return Err(SessionError::input("max_new_tokens", reason));
        }
        Ok((input_ids.to_vec2::<i64>()?, generation))
    }
}

impl Session for Falcon {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (prompt, generation) = self.read(call)?;
        self.model.clear_kv_cache();
        generation.run(&prompt, observer, |tokens| {
            let ids = tokens.unwrap_or(&prompt[0]);
            Ok(self.model.forward(&Tensor::new(ids, &self.spec.device)?.unsqueeze(0)?)?) // (1, vocab)
        })
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (prompt, generation) = self.read(call)?;
        let bytes = self.spec.dtype.size_in_bytes() as u64;
        let cost = |pass| layer_norm_decoder::forward_cost(&self.sizes, pass, bytes);
        Ok(phase_costs(cost, None, [1, prompt[0].len() as u64], generation.max_new_tokens as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_string(), "candle".to_string())].into()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    fn session(engine: Engine, changes: &[(&str, Value)]) -> Result<Box<dyn Session>, SessionError> {
        let mut config = json!({
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": true,
            "activation": "gelu_new",
        });
        for (field, value) in changes {
            config[*field] = value.clone();
        }
        let spec = ModelSpec {
            family: "falcon".into(),
            class: "FalconForCausalLM".into(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine,
        };
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, crate::aliases(&spec), &spec.class, &HubOptions::default())?;
        crate::load(&spec, &weights)
    }

    fn call(method: &str, ids: &[&[i64]], mask: Option<i64>) -> Call {
        let shape = (ids.len(), ids[0].len());
        let ids = Tensor::from_vec(ids.concat(), shape, &Device::Cpu).unwrap();
        let mut inputs = Tensors::from([("input_ids".to_owned(), ids)]);
        if let Some(first) = mask {
            let mask = (0..shape.0 * shape.1).map(|i| if i == 0 { first } else { 1 }).collect();
            inputs.insert("attention_mask".to_owned(), Tensor::from_vec(mask, shape, &Device::Cpu).unwrap());
        }
        let arguments = [("max_new_tokens".to_owned(), json!(6)), ("output_logits".to_owned(), json!(true))];
        let arguments = arguments.into_iter().collect();
        Call { method: method.to_owned(), inputs, arguments }
    }

    /// The stock Falcon and ours, on the same weights.
    #[test]
    fn falcon_generates_what_ours_does() {
        for parallel in [true, false] {
            let changes = [("parallel_attn", json!(parallel))];
            let mut stock = session(Engine::CandleTransformers, &changes).unwrap();
            let mut ours = session(Engine::Roofbench, &changes).unwrap();
            for call in [call("generate", &[&[3, 14, 15, 9]], Some(1)), call("generate", &[&[7]], None)] {
                let [found, wanted] =
                    [&mut stock, &mut ours].map(|session| session.call(&call, &mut Unobserved).unwrap());
                let ids = |made: &Tensors| made["sequences"].to_vec2::<i64>().unwrap();
                assert_eq!(ids(&found), ids(&wanted));
                let difference = (&found["logits"] - &wanted["logits"]).unwrap().abs().unwrap().max_all().unwrap();
                // some roundings of values of size 1
                assert!(difference.to_scalar::<f32>().unwrap() < 1e-5, "{difference}");
                assert_eq!(stock.cost(&call).unwrap(), ours.cost(&call).unwrap());
            }
        }
    }

    #[test]
    fn falcon_refuses_what_the_stock_model_lacks() {
        for (field, value) in [
            ("alibi", json!(true)),
            ("new_decoder_architecture", json!(true)),
            ("multi_query", json!(false)),
            ("ffn_hidden_size", json!(20)),
            ("activation", json!("relu")),
            ("rope_theta", json!(5000.0)),
        ] {
            let error = session(Engine::CandleTransformers, &[(field, value)]).err().unwrap().to_string();
            assert!(error.contains("use --engine roofbench"), "{field}: {error}");
        }
        let mut stock = session(Engine::CandleTransformers, &[]).unwrap();
        let mut message = |call: Call| stock.call(&call, &mut Unobserved).unwrap_err().to_string();
        assert!(message(call("forward", &[&[3]], None)).contains("last position's logits"));
        assert!(message(call("generate", &[&[3], &[4]], None)).contains("has 2 sequences"));
        assert!(message(call("generate", &[&[3, 4]], Some(0))).contains("has padding"));
    }
}
