//! The decoders of `candle_transformers` behind our session: Llama, Mistral, Phi and Phi-3.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, phi, phi3};
use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::unsupported_method;
use roofbench_core::session::{Call, ModelSpec, Observer, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;
use roofbench_nn::rope::Scaling;
use serde_json::json;

use crate::causal::{DecoderShape, Pass, Prompt, phase_costs};
use crate::models::llama::LlamaConfig;
use crate::models::phi::PhiConfig;

/// A decoder of the crate with the cache that is its own, for `generate` on prompts without padding: the stock models
/// give the logits of the last position alone, and see every token.
pub(crate) struct Decoder {
    spec: ModelSpec,
    model: Stock,
    shape: DecoderShape,
    cost: Box<dyn Fn(Pass) -> Cost>,
}

enum Stock {
    Llama { model: llama::Llama, empty: llama::Cache },
    Mistral(mistral::Model),
    Phi(phi::Model),
    Phi3(phi3::Model),
}

impl Decoder {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let stock = StockSpec { spec, vb };
        match spec.class.as_str() {
            "LlamaForCausalLM" => stock.llama(LlamaConfig::from_spec(spec)?),
            "MistralForCausalLM" => stock.mistral(crate::models::mistral::config(spec)?),
            "Phi3ForCausalLM" => stock.phi3(crate::models::phi3::config(spec)?),
            _ => stock.phi(PhiConfig::from_spec(spec)?),
        }
    }

    /// What the call is to make behind its prompt, unless the stock model would make something else of it.
    fn read(&self, call: &Call) -> Result<(Tensor, Generation), SessionError> {
        if call.method != "generate" {
            return Err(unsupported_method(
                call,
                "generate (candle-transformers gives the last position's logits alone)",
            ));
        }
        let prompt = Prompt::read(call, self.shape)?;
        if let Some(mask) = &prompt.attention_mask
            && mask.to_vec2::<i64>()?.concat().contains(&0)
        {
            return Err(SessionError::input(
                "attention_mask",
                "candle-transformers has no padding; use --engine roofbench",
            ));
        }
        let seq = prompt.input_ids.dim(1)?;
        let generation = Generation::read(&self.spec, call, seq, &[])?;
        let positions = generation.positions(seq);
        for (field, most) in [
            ("max_position_embeddings", self.shape.max_positions),
            // Mistral's window is of one token more in the prompt and of all in what follows it, Phi-3 has none
            ("sliding_window", self.shape.window),
        ] {
            if let Some(most) = most.filter(|most| positions > *most) {
                let reason = format!(
                    "comes to {positions} positions; candle-transformers runs {field} = {most} at most as the class does"
                );
                return Err(SessionError::input("max_new_tokens", reason));
            }
        }
        Ok((prompt.input_ids, generation))
    }
}

/// A stock model that is about to be loaded.
struct StockSpec<'a> {
    spec: &'a ModelSpec,
    vb: VarBuilder<'static>,
}

impl StockSpec<'_> {
    fn lacks(&self, what: &str) -> SessionError {
        let reason = format!("candle-transformers' model has no {what}; use --engine roofbench");
        SessionError::UnsupportedEngine { family: self.spec.family.clone(), reason }
    }

    /// The error of the first of what the model would need and the stock one has not.
    fn refuse(&self, needs: &[(&str, bool)]) -> Result<(), SessionError> {
        match needs.iter().find(|(_, needed)| *needed) {
            Some((what, _)) => Err(self.lacks(what)),
            None => Ok(()),
        }
    }

    fn activation(&self, act: Activation) -> Result<candle_nn::Activation, SessionError> {
        match act {
            Activation::Gelu => Ok(candle_nn::Activation::Gelu),
            Activation::GeluTanh => Ok(candle_nn::Activation::NewGelu),
            Activation::Relu => Ok(candle_nn::Activation::Relu),
            Activation::Silu => Ok(candle_nn::Activation::Silu),
            Activation::Sigmoid => Ok(candle_nn::Activation::Sigmoid),
            other => Err(self.lacks(&format!("activation {other:?}"))),
        }
    }

    /// The weights for a model that has no notion of tying.
    fn untied(&self, tied: bool) -> VarBuilder<'static> {
        let stored = |name: &str| match name {
            "lm_head.weight" => "model.embed_tokens.weight".to_owned(),
            name => name.to_owned(),
        };
        if tied { self.vb.clone().rename_f(stored) } else { self.vb.clone() }
    }

    fn decoder(self, model: Stock, shape: DecoderShape, cost: impl Fn(Pass) -> Cost + 'static) -> Decoder {
        Decoder { spec: self.spec.clone(), model, shape, cost: Box::new(cost) }
    }

    /// A decoder with Llama's configuration.
    fn llama_like(self, model: Stock, cfg: LlamaConfig) -> Decoder {
        let shape = DecoderShape {
            vocab_size: cfg.vocab_size,
            layers: cfg.num_hidden_layers,
            kv_width: cfg.kv_heads() * cfg.head_dim(),
            window: cfg.window,
            max_positions: Some(cfg.max_position_embeddings),
        };
        let bytes = self.vb.dtype().size_in_bytes() as u64;
        self.decoder(model, shape, move |pass| crate::models::llama::forward_cost(&cfg, pass, bytes))
    }

    fn llama(self, cfg: LlamaConfig) -> Result<Decoder, SessionError> {
        let rope_scaling = match cfg.rope.scaling {
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor } => Some(llama::Llama3RopeConfig {
                factor: factor as f32,
                low_freq_factor: low_freq_factor as f32,
                high_freq_factor: high_freq_factor as f32,
                original_max_position_embeddings: cfg
                    .rope
                    .original_max_position_embeddings
                    .unwrap_or(cfg.max_position_embeddings),
                rope_type: llama::Llama3RopeType::Llama3,
            }),
            _ => None,
        };
        self.refuse(&[
            ("head_dim of its own", cfg.head_dim() * cfg.num_attention_heads != cfg.hidden_size),
            ("biases", cfg.attention_bias || cfg.mlp_bias),
            ("activation but SiLU", cfg.hidden_act != Activation::Silu),
            ("partial rotary positions", cfg.rope.partial_rotary_factor.is_some_and(|part| part != 1.0)),
            ("rope type but default and llama3", rope_scaling.is_none() && cfg.rope.scaling != Scaling::Default),
        ])?;
        let config = llama::Config {
            hidden_size: cfg.hidden_size,
            intermediate_size: cfg.intermediate_size,
            vocab_size: cfg.vocab_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            num_key_value_heads: cfg.kv_heads(),
            use_flash_attn: false,
            rms_norm_eps: cfg.rms_norm_eps,
            rope_theta: cfg.rope.theta as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling,
            max_position_embeddings: cfg.max_position_embeddings,
            tie_word_embeddings: cfg.tie_word_embeddings,
        };
        let empty = llama::Cache::new(true, self.vb.dtype(), &config, self.vb.device())?;
        self.check_layers(&cfg)?;
        let model = llama::Llama::load(self.vb.clone(), &config)?;
        Ok(self.llama_like(Stock::Llama { model, empty }, cfg))
    }

    /// Asks for the tensors of every layer that are not there: the stock Llama panics over one.
    fn check_layers(&self, cfg: &LlamaConfig) -> Result<()> {
        let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
        let [queries, keys] = [cfg.num_attention_heads, cfg.kv_heads()].map(|heads| heads * cfg.head_dim());
        for layer in 0..cfg.num_hidden_layers {
            let vb = self.vb.pp("model.layers").pp(layer);
            for (name, shape) in [
                ("input_layernorm.weight", vec![hidden]),
                ("self_attn.q_proj.weight", vec![queries, hidden]),
                ("self_attn.k_proj.weight", vec![keys, hidden]),
                ("self_attn.v_proj.weight", vec![keys, hidden]),
                ("self_attn.o_proj.weight", vec![hidden, queries]),
                ("post_attention_layernorm.weight", vec![hidden]),
                ("mlp.gate_proj.weight", vec![inner, hidden]),
                ("mlp.up_proj.weight", vec![inner, hidden]),
                ("mlp.down_proj.weight", vec![hidden, inner]),
            ] {
                if !vb.contains_tensor(name) {
                    vb.get(shape, name)?;
                }
            }
        }
        Ok(())
    }

    fn mistral(self, cfg: LlamaConfig) -> Result<Decoder, SessionError> {
        self.refuse(&[
            ("partial rotary positions", cfg.rope.partial_rotary_factor.is_some_and(|part| part != 1.0)),
            ("rope type but default", cfg.rope.scaling != Scaling::Default),
        ])?;
        let config = mistral::Config {
            vocab_size: cfg.vocab_size,
            hidden_size: cfg.hidden_size,
            intermediate_size: cfg.intermediate_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            head_dim: cfg.head_dim,
            num_key_value_heads: cfg.kv_heads(),
            hidden_act: self.activation(cfg.hidden_act)?,
            max_position_embeddings: cfg.max_position_embeddings,
            rms_norm_eps: cfg.rms_norm_eps,
            rope_theta: cfg.rope.theta,
            sliding_window: cfg.window,
            use_flash_attn: false,
        };
        let model = mistral::Model::new(&config, self.untied(cfg.tie_word_embeddings))?;
        Ok(self.llama_like(Stock::Mistral(model), cfg))
    }

    fn phi3(self, cfg: LlamaConfig) -> Result<Decoder, SessionError> {
        self.refuse(&[
            ("head_dim of its own", cfg.head_dim() * cfg.num_attention_heads != cfg.hidden_size),
            // it multiplies frequencies by the factors that should divide them
            ("longrope as the class has it", cfg.rope.scaling != Scaling::Default),
        ])?;
        let config = phi3::Config {
            vocab_size: cfg.vocab_size,
            hidden_act: self.activation(cfg.hidden_act)?,
            hidden_size: cfg.hidden_size,
            intermediate_size: cfg.intermediate_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            num_key_value_heads: cfg.kv_heads(),
            rms_norm_eps: cfg.rms_norm_eps,
            rope_theta: cfg.rope.theta,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: cfg.max_position_embeddings,
            original_max_position_embeddings: None,
            partial_rotary_factor: cfg.rope.partial_rotary_factor.filter(|part| *part != 1.0),
            tie_word_embeddings: cfg.tie_word_embeddings,
        };
        let model = phi3::Model::new(&config, self.vb.clone())?;
        Ok(self.llama_like(Stock::Phi3(model), cfg))
    }

    fn phi(self, cfg: PhiConfig) -> Result<Decoder, SessionError> {
        self.refuse(&[
            ("head_dim of its own", cfg.head_dim() * cfg.num_attention_heads != cfg.hidden_size),
            ("normalisation of each head (qk_layernorm)", cfg.qk_layernorm),
            ("rope type but default", cfg.rope.scaling != Scaling::Default),
            ("precision but f32", self.vb.dtype() != DType::F32),
        ])?;
        // its fields are private
        let config = serde_json::from_value(json!({
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.hidden_size,
            "intermediate_size": cfg.intermediate_size,
            "num_hidden_layers": cfg.num_hidden_layers,
            "num_attention_heads": cfg.num_attention_heads,
            "num_key_value_heads": cfg.kv_heads(),
            "hidden_act": self.activation(cfg.hidden_act)?,
            "max_position_embeddings": cfg.max_position_embeddings,
            "layer_norm_eps": cfg.layer_norm_eps,
            "tie_word_embeddings": cfg.tie_word_embeddings,
            "rope_theta": cfg.rope.theta,
            "partial_rotary_factor": cfg.rope.partial_rotary_factor,
            "qk_layernorm": false,
        }));
        let config: phi::Config = config.map_err(candle_core::Error::wrap)?;
        let model = phi::Model::new(&config, self.untied(cfg.tie_word_embeddings))?;
        let shape = DecoderShape {
            vocab_size: cfg.vocab_size,
            layers: cfg.num_hidden_layers,
            kv_width: cfg.kv_heads() * cfg.head_dim(),
            window: None,
            max_positions: Some(cfg.max_position_embeddings),
        };
        let bytes = self.vb.dtype().size_in_bytes() as u64;
        Ok(self.decoder(Stock::Phi(model), shape, move |pass| crate::models::phi::forward_cost(&cfg, pass, bytes)))
    }
}

impl Stock {
    /// Logits (batch, vocab) behind `ids` (batch, seq), which follow `past` others in the cache.
    fn next_logits(&mut self, ids: &Tensor, past: usize, cache: &mut Option<llama::Cache>) -> Result<Tensor> {
        match self {
            Self::Llama { model, empty } => model.forward(ids, past, cache.get_or_insert_with(|| empty.clone())),
            Self::Mistral(model) => model.forward(ids, past)?.squeeze(1),
            Self::Phi(model) => model.forward(ids),
            Self::Phi3(model) => model.forward(ids, past)?.squeeze(1),
        }
    }

    fn clear(&mut self) {
        match self {
            Self::Llama { .. } => {}
            Self::Mistral(model) => model.clear_kv_cache(),
            Self::Phi(model) => model.clear_kv_cache(),
            Self::Phi3(model) => model.clear_kv_cache(),
        }
    }
}

impl Session for Decoder {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (input_ids, generation) = self.read(call)?;
        let (batch, mut past) = (input_ids.dim(0)?, 0);
        let mut cache = None;
        self.model.clear();
        generation.run(&input_ids.to_vec2::<i64>()?, observer, |tokens| {
            let ids = match tokens {
                None => input_ids.clone(),
                Some(tokens) => Tensor::from_slice(tokens, (batch, 1), input_ids.device())?,
            };
            let logits = self.model.next_logits(&ids, past, &mut cache)?;
            past += ids.dim(1)?;
            Ok(logits)
        })
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (input_ids, generation) = self.read(call)?;
        let (batch, seq) = input_ids.dims2()?;
        Ok(phase_costs(&self.cost, None, [batch as u64, seq as u64], generation.max_new_tokens as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_string(), "candle".to_string())].into()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::Value;

    use super::*;

    fn spec(family: &str, class: &str, changes: Value, engine: Engine) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 32,
        });
        for (field, value) in changes.as_object().unwrap() {
            config[field] = value.clone();
        }
        ModelSpec {
            family: family.into(),
            class: class.into(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine,
        }
    }

    fn session(spec: &ModelSpec) -> Result<Box<dyn Session>, SessionError> {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, crate::aliases(spec), &spec.class, &HubOptions::from_env())?;
        crate::load(spec, &weights)
    }

    fn call(new_tokens: usize) -> Call {
        let ids = Tensor::new(&[[3i64, 7, 11, 5], [8, 2, 4, 6]], &Device::Cpu).unwrap();
        let arguments = json!({"max_new_tokens": new_tokens, "output_logits": true});
        Call {
            method: "generate".into(),
            inputs: [("input_ids".to_owned(), ids)].into(),
            arguments: arguments.as_object().unwrap().clone(),
        }
    }

    /// What each stock model is asked to run it runs as ours does, call after call.
    #[test]
    fn stock_decoders_generate_what_ours_do() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        });
        for (family, class, changes) in [
            ("llama", "LlamaForCausalLM", json!({"tie_word_embeddings": true})),
            ("llama", "LlamaForCausalLM", json!({"rope_scaling": llama3})),
            ("mistral", "MistralForCausalLM", json!({"sliding_window": 9, "head_dim": 4})),
            ("mistral", "MistralForCausalLM", json!({"tie_word_embeddings": true, "hidden_act": "gelu"})),
            ("phi", "PhiForCausalLM", json!({})),
            ("phi", "PhiForCausalLM", json!({"tie_word_embeddings": true, "partial_rotary_factor": 0.25})),
            ("phi", "Phi3ForCausalLM", json!({"partial_rotary_factor": 0.5})),
        ] {
            let of = |engine| session(&spec(family, class, changes.clone(), engine)).unwrap();
            let (mut stock, mut ours) = (of(Engine::CandleTransformers), of(Engine::Roofbench));
            let expected = ours.call(&call(6), &mut Unobserved).unwrap();
            for _ in 0..2 {
                let outputs = stock.call(&call(6), &mut Unobserved).unwrap();
                let difference = (&outputs["logits"] - &expected["logits"]).unwrap().abs().unwrap().max_all().unwrap();
                assert!(difference.to_scalar::<f32>().unwrap() < 2e-5, "{class} {changes}: {difference}");
            }
            assert_eq!(stock.cost(&call(6)).unwrap(), ours.cost(&call(6)).unwrap());
        }
    }

    #[test]
    fn what_stock_decoders_would_run_otherwise_is_refused() {
        let load = |family: &str, class: &str, changes: Value| {
            session(&spec(family, class, changes, Engine::CandleTransformers))
        };
        let reason = |family: &str, class: &str, changes: Value| match load(family, class, changes) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let longrope = json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]});
        for (family, class, changes, lacking) in [
            ("llama", "LlamaForCausalLM", json!({"attention_bias": true}), "biases"),
            ("llama", "LlamaForCausalLM", json!({"head_dim": 4}), "head_dim"),
            ("llama", "LlamaForCausalLM", json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope type"),
            ("phi", "PhiForCausalLM", json!({"qk_layernorm": true}), "qk_layernorm"),
            ("phi", "PhiForCausalLM", json!({"hidden_act": "quick_gelu"}), "QuickGelu"),
            ("phi", "Phi3ForCausalLM", json!({"rope_scaling": longrope}), "longrope"),
        ] {
            let reason = reason(family, class, changes);
            assert!(reason.contains(lacking) && reason.contains("use --engine roofbench"), "{reason}");
        }

        let mut mistral = load("mistral", "MistralForCausalLM", json!({"sliding_window": 9})).unwrap();
        let mut error = |call: &Call| mistral.call(call, &mut Unobserved).unwrap_err().to_string();
        assert!(error(&call(7)).contains("comes to 10 positions; candle-transformers runs sliding_window = 9"));
        assert!(error(&Call { method: "forward".into(), ..call(1) }).contains("the last position's logits alone"));
        let mut padded = call(1);
        let mask = Tensor::new(&[[1i64, 1, 1, 1], [0, 1, 1, 1]], &Device::Cpu).unwrap();
        padded.inputs.insert("attention_mask".to_owned(), mask);
        assert!(error(&padded).contains("`attention_mask`: candle-transformers has no padding"));
    }
}
