//! The stock models of the crate `candle-transformers`, on the same weights and inputs as ours: what anyone on candle
//! gets today.

use std::collections::BTreeMap;

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{blip as stock_blip, blip_text, clip as stock_clip};
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use super::blip::{BlipConfig, Caption, Prompt};
use super::clip::{self, ClipConfig};
use super::{forward_phase, named};

fn unsupported(spec: &ModelSpec, what: &str) -> SessionError {
    let reason = format!("candle-transformers' model has no {what}; use --engine roofbench");
    SessionError::UnsupportedEngine { family: spec.family.clone(), reason }
}

/// The error of the first of what the model would need and the stock one has not.
fn refuse(spec: &ModelSpec, needs: &[(&str, bool)]) -> Result<(), SessionError> {
    needs.iter().find(|(_, needed)| *needed).map_or(Ok(()), |(what, _)| Err(unsupported(spec, what)))
}

fn without(call: &Call, name: &str) -> Result<(), SessionError> {
    if call.inputs.contains_key(name) || call.arguments.contains_key(name) {
        return Err(SessionError::input(name, "candle-transformers has no such argument; use --engine roofbench"));
    }
    Ok(())
}

fn has_zeros(mask: Option<&Tensor>) -> candle_core::Result<bool> {
    mask.map_or(Ok(false), |mask| Ok(mask.flatten_all()?.to_vec1::<i64>()?.contains(&0)))
}

/// `candle_transformers::models::clip::ClipModel` behind our session: sequences that end with their largest token, without
/// padding.
pub(crate) struct StockClip {
    spec: ModelSpec,
    cfg: ClipConfig,
    model: stock_clip::ClipModel,
}

impl StockClip {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        if spec.class != "CLIPModel" {
            return Err(unsupported(spec, &spec.class));
        }
        let cfg = ClipConfig::from_spec(spec)?;
        let (text, vision) = (&cfg.text, &cfg.vision);
        refuse(
            spec,
            &[
                ("activation but quick_gelu", [text.hidden_act, vision.hidden_act] != [Activation::QuickGelu; 2]),
                ("layer_norm_eps but 1e-5", [text.layer_norm_eps, vision.layer_norm_eps] != [1e-5; 2]),
            ],
        )?;
        let activation = stock_clip::text_model::Activation::QuickGelu;
        let config = stock_clip::ClipConfig {
            text_config: stock_clip::text_model::ClipTextConfig {
                vocab_size: text.vocab_size,
                embed_dim: text.hidden_size,
                activation,
                intermediate_size: text.intermediate_size,
                max_position_embeddings: text.max_position_embeddings,
                pad_with: None,
                num_hidden_layers: text.num_hidden_layers,
                num_attention_heads: text.num_attention_heads,
                projection_dim: cfg.projection_dim,
            },
            vision_config: stock_clip::vision_model::ClipVisionConfig {
                embed_dim: vision.hidden_size,
                activation,
                intermediate_size: vision.intermediate_size,
                num_hidden_layers: vision.num_hidden_layers,
                num_attention_heads: vision.num_attention_heads,
                projection_dim: cfg.projection_dim,
                num_channels: vision.num_channels,
                image_size: vision.image_size,
                patch_size: vision.patch_size,
            },
            logit_scale_init_value: 0.0, // the checkpoint has it
            image_size: vision.image_size,
        };
        let model = stock_clip::ClipModel::new(vb, &config)?;
        Ok(Self { spec: spec.clone(), cfg, model })
    }
}

impl Session for StockClip {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (tokens, pixels) = clip::read_both(&self.cfg, call)?;
        without(call, "position_ids")?;
        without(call, "interpolate_pos_encoding")?;
        if has_zeros(tokens.attention_mask.as_ref())? {
            let reason = "candle-transformers has no padding; use --engine roofbench";
            return Err(SessionError::input("attention_mask", reason));
        }
        for (item, row) in tokens.input_ids.to_vec2::<i64>()?.iter().enumerate() {
            if clip::end(row, self.cfg.text.eos_token_id) != clip::end(row, clip::UNKNOWN_END) {
                let reason = format!(
                    "sequence {item} does not end with its largest token, where candle-transformers looks for the end; use \
                     --engine roofbench"
                );
                return Err(SessionError::input("input_ids", reason));
            }
        }
        let pixel_values = pixels.values().to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        let input_ids = tokens.input_ids.to_dtype(DType::U32)?.to_device(&self.spec.device)?;
        let (logits_per_text, logits_per_image) = self.model.forward(&pixel_values, &input_ids)?;
        observer.end(Phase::Forward);
        Ok(named([("logits_per_text", logits_per_text), ("logits_per_image", logits_per_image)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (tokens, pixels) = clip::read_both(&self.cfg, call)?;
        let parts = self.cfg.cost(&tokens, &pixels, self.spec.dtype.size_in_bytes() as u64);
        Ok(forward_phase(parts.into_iter().sum()))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_owned(), "candle".to_owned())].into()
    }
}

/// `candle_transformers::models::blip::BlipForConditionalGeneration` behind our session: one picture,
/// without padding.
pub(crate) struct StockBlip {
    spec: ModelSpec,
    cfg: BlipConfig,
    model: stock_blip::BlipForConditionalGeneration,
}

impl StockBlip {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        if spec.class != "BlipForConditionalGeneration" {
            return Err(unsupported(spec, &spec.class));
        }
        let cfg = BlipConfig::from_spec(spec)?;
        let activation = |act: Activation| match act {
            Activation::Gelu => Ok(candle_nn::Activation::Gelu),
            Activation::GeluTanh => Ok(candle_nn::Activation::NewGelu),
            Activation::Relu => Ok(candle_nn::Activation::Relu),
            Activation::Silu => Ok(candle_nn::Activation::Silu),
            other => Err(unsupported(spec, &format!("activation {other:?}"))),
        };
        let (text, vision) = (&cfg.text_config, &cfg.vision_config);
        let config = stock_blip::Config {
            text_config: blip_text::Config {
                vocab_size: text.vocab_size,
                hidden_size: text.hidden_size,
                encoder_hidden_size: vision.hidden_size,
                intermediate_size: text.intermediate_size,
                projection_dim: 0, // of no layer that runs, nor are the other two
                num_hidden_layers: text.num_hidden_layers,
                num_attention_heads: text.num_attention_heads,
                max_position_embeddings: text.max_position_embeddings,
                hidden_act: activation(text.hidden_act)?,
                layer_norm_eps: text.layer_norm_eps,
                is_decoder: true,
            },
            vision_config: stock_blip::VisionConfig {
                hidden_size: vision.hidden_size,
                intermediate_size: vision.intermediate_size,
                projection_dim: 0,
                num_hidden_layers: vision.num_hidden_layers,
                num_attention_heads: vision.num_attention_heads,
                image_size: vision.image_size,
                patch_size: vision.patch_size,
                hidden_act: activation(vision.hidden_act)?,
                layer_norm_eps: vision.layer_norm_eps,
            },
            projection_dim: 0,
            image_text_hidden_size: cfg.image_text_hidden_size,
        };
        // it has no notion of tying
        let vb = vb.rename_f(|name: &str| match name {
            "text_decoder.cls.predictions.decoder.weight" => {
                "text_decoder.bert.embeddings.word_embeddings.weight".to_owned()
            }
            name => name.to_owned(),
        });
        let model = stock_blip::BlipForConditionalGeneration::new(&config, vb)?;
        Ok(Self { spec: spec.clone(), cfg, model })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Caption<'a>, SessionError> {
        without(call, "interpolate_pos_encoding")?;
        let caption = Caption::read(&self.cfg, &self.spec, call)?;
        let (pixels, attention_mask) = match &caption {
            Caption::Forward { pixels, text } => (pixels, &text.attention_mask),
            Caption::Generate { pixels, prompt } => (pixels, &prompt.attention_mask),
        };
        if pixels.shape()[0] > 1 {
            let reason =
                "candle-transformers adds the positions of one text; give one picture, or use --engine roofbench";
            return Err(SessionError::input("pixel_values", reason));
        }
        if has_zeros(attention_mask.as_ref())? {
            let reason = "candle-transformers has no padding; use --engine roofbench";
            return Err(SessionError::input("attention_mask", reason));
        }
        Ok(caption)
    }

    /// Logits (batch, seq, vocab) behind `ids` (batch, seq).
    fn logits(&mut self, ids: &Tensor, image_embeds: &Tensor) -> candle_core::Result<Tensor> {
        let ids = ids.to_dtype(DType::U32)?.to_device(&self.spec.device)?;
        self.model.text_decoder().forward(&ids, image_embeds)
    }
}

impl Session for StockBlip {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let caption = self.read(call)?;
        self.model.reset_kv_cache();
        let (Caption::Forward { pixels, .. } | Caption::Generate { pixels, .. }) = &caption;
        let pixel_values = pixels.values().to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        let image_embeds = self.model.vision_model().forward(&pixel_values)?;
        observer.end(Phase::Vision);
        match &caption {
            Caption::Forward { text, .. } => {
                let logits = self.logits(&text.input_ids, &image_embeds)?;
                observer.end(Phase::Forward);
                Ok(named([
                    ("logits", logits),
                    ("last_hidden_state", image_embeds.clone()),
                    ("image_embeds", image_embeds),
                ]))
            }
            Caption::Generate { prompt, .. } => {
                let Prompt { rows, generation, .. } = &**prompt;
                generation.run(rows, observer, |tokens| {
                    let ids = tokens.map_or_else(|| rows.concat(), <[i64]>::to_vec);
                    let seq = ids.len() / rows.len();
                    let ids = Tensor::from_vec(ids, (rows.len(), seq), &self.spec.device)?;
                    Ok(self.logits(&ids, &image_embeds)?.narrow(1, seq - 1, 1)?.squeeze(1)?)
                })
            }
        }
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        Ok(self.read(call)?.cost(&self.cfg, self.spec.dtype.size_in_bytes() as u64))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_owned(), "candle".to_owned())].into()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    fn tower(changes: Value) -> Value {
        let mut tower = json!({
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 12, "vocab_size": 30,
        });
        for (field, value) in changes.as_object().expect("an object") {
            tower[field] = value.clone();
        }
        tower
    }

    fn spec(class: &str, text: Value) -> ModelSpec {
        let vision = tower(json!({"image_size": 8, "patch_size": 4}));
        ModelSpec {
            family: if class == "CLIPModel" { "clip" } else { "blip" }.into(),
            class: class.into(),
            config: json!({"text_config": tower(text), "vision_config": vision, "projection_dim": 6}),
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    /// What either engine gives for `outputs` of the same call.
    fn both(mut spec: ModelSpec, call: &Call, outputs: &[&str]) -> Result<(), SessionError> {
        let mut run = |engine| {
            spec.engine = engine;
            let source = Source::Synthetic { seed: 0 };
            let weights = Weights::open(&source, crate::aliases(&spec), &spec.class, &HubOptions::default())?;
            let mut session = crate::load(&spec, &weights)?;
            // ours has a phase for each tower
            let flops: u64 = session.cost(call)?.iter().map(|phase| phase.cost.flops).sum();
            session.call(call, &mut Unobserved).map(|outputs| (outputs, flops))
        };
        let ((ours, cost), (stock, stock_cost)) = (run(Engine::Roofbench)?, run(Engine::CandleTransformers)?);
        assert_eq!(cost, stock_cost);
        for name in outputs {
            let [ours, stock] = [&ours[*name], &stock[*name]].map(|x| x.to_dtype(DType::F32));
            let error = (ours? - stock?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // values up to 100, summed in another order
            assert!(error < 1e-3, "{name}: {error}");
        }
        Ok(())
    }

    fn call(method: &str, arguments: Value) -> Result<Call, SessionError> {
        let pixel_values = Tensor::randn(0f32, 1.0, (2, 3, 8, 8), &Device::Cpu)?;
        let input_ids = Tensor::new(&[[28i64, 4, 29, 3], [28, 7, 2, 29]], &Device::Cpu)?;
        let inputs = [("pixel_values".to_owned(), pixel_values), ("input_ids".to_owned(), input_ids)];
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        Ok(Call { method: method.into(), inputs: inputs.into(), arguments })
    }

    #[test]
    fn the_stock_models_give_what_ours_give() -> Result<(), SessionError> {
        let forward = call("forward", json!({}))?;
        both(spec("CLIPModel", json!({"eos_token_id": 29})), &forward, &["logits_per_text", "logits_per_image"])?;
        let blip = || spec("BlipForConditionalGeneration", json!({"bos_token_id": 28, "sep_token_id": 27}));
        let one = |mut call: Call| {
            call.inputs.values_mut().try_for_each(|x| x.narrow(0, 0, 1).map(|first| *x = first)).map(|()| call)
        };
        both(blip(), &one(forward)?, &["logits", "image_embeds"])?;
        let generate = call("generate", json!({"max_new_tokens": 5, "min_new_tokens": 5, "output_logits": true}))?;
        both(blip(), &one(generate)?, &["logits", "sequences"])
    }

    #[test]
    fn what_the_stock_models_lack_is_named() -> Result<(), SessionError> {
        let message =
            |spec: ModelSpec, call: &Call| both(spec, call, &[]).err().map(|e| e.to_string()).unwrap_or_default();
        let mut forward = call("forward", json!({}))?;
        let error = message(spec("CLIPModel", json!({"hidden_act": "gelu"})), &forward);
        assert!(error.contains("no activation but quick_gelu"), "{error}");
        let error = message(spec("CLIPModel", json!({"eos_token_id": 7})), &forward);
        assert!(error.contains("does not end with its largest token"), "{error}");
        let blip = || spec("BlipForConditionalGeneration", json!({"bos_token_id": 28}));
        assert!(message(blip(), &forward).contains("give one picture"));
        let mask = Tensor::new(&[[1i64, 1, 1, 0], [1, 1, 1, 1]], &Device::Cpu)?;
        forward.inputs.insert("attention_mask".into(), mask);
        assert!(message(spec("CLIPModel", json!({"eos_token_id": 29})), &forward).contains("has no padding"));
        forward.inputs.values_mut().try_for_each(|x| x.narrow(0, 0, 1).map(|first| *x = first))?;
        assert!(message(blip(), &forward).contains("has no padding"));
        Ok(())
    }
}
