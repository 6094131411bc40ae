//! The stock models of `candle-transformers` behind our sessions: what anyone on candle gets today, on the same weights
//! and inputs.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{encodec as stock_encodec, whisper as stock_whisper};
use roofbench_core::cost::PhaseCost;
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::Edge;

use super::encodec::{self, EncodecConfig, NormType};
use super::seq2seq::last_rows;
use super::whisper::{self, Plan, WhisperConfig};

fn unsupported(spec: &ModelSpec, what: impl std::fmt::Display) -> SessionError {
    let reason = format!("candle-transformers {what}; use --engine roofbench");
    SessionError::UnsupportedEngine { family: spec.family.clone(), reason }
}

fn stock() -> BTreeMap<String, String> {
    [("all".to_owned(), "candle".to_owned())].into()
}

/// `candle_transformers::models::whisper`, which only generates.
///
/// Its GELU is the approximation by tanh, the encoder's positions are sines whatever the checkpoint has, and the decoder
/// has no cache for its own keys and values: every token runs through it with all before. The cost is that of a model
/// with one, as for ours.
pub(crate) struct Whisper {
    cfg: WhisperConfig,
    spec: ModelSpec,
    model: stock_whisper::model::Whisper,
}

impl Whisper {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = WhisperConfig::from_spec(spec)?;
        if spec.class != "WhisperForConditionalGeneration" {
            return Err(unsupported(spec, format!("has no {}", spec.class)));
        }
        if [cfg.encoder_ffn_dim, cfg.decoder_ffn_dim] != [4 * cfg.d_model; 2] {
            return Err(unsupported(spec, "has feed-forward halves of four times d_model alone"));
        }
        if cfg.activation_function != Activation::Gelu {
            return Err(unsupported(spec, "has GELU alone"));
        }
        vb.pp("model.encoder.embed_positions").get((cfg.max_source_positions, cfg.d_model), "weight")?; // not heeded
        let config = stock_whisper::Config {
            num_mel_bins: cfg.num_mel_bins,
            max_source_positions: cfg.max_source_positions,
            d_model: cfg.d_model,
            encoder_attention_heads: cfg.encoder_attention_heads,
            encoder_layers: cfg.encoder_layers,
            vocab_size: cfg.vocab_size,
            max_target_positions: cfg.max_target_positions,
            decoder_attention_heads: cfg.decoder_attention_heads,
            decoder_layers: cfg.decoder_layers,
            suppress_tokens: Vec::new(),
        };
        let model = stock_whisper::model::Whisper::load(&vb, config)?;
        Ok(Self { cfg, spec: whisper::with_generation_config(spec), model })
    }

    fn read(&self, call: &Call) -> Result<(Tensor, Plan), SessionError> {
        if call.method != "generate" {
            return Err(SessionError::input("method", "candle-transformers' Whisper only generates; call generate"));
        }
        let shape = [("batch", None), ("bins", Some(self.cfg.num_mel_bins)), ("frames", Some(self.cfg.frames()))];
        let inputs = Inputs::of_any_method(call, &["input_features", "attention_mask"])?;
        let features = inputs.floats_of("input_features", &shape)?.to_device(&self.spec.device)?;
        let plan = Plan::read(&self.spec, &self.cfg, call, features.dim(0)?)?;
        Ok((features.to_dtype(self.spec.dtype)?, plan))
    }
}

/// Scores (batch, vocab) of one row (batch, 1, hidden) of each sound. The stock product is made of one sound at a time: its
/// weights are repeated over a batch without a copy, which candle 0.11 multiplies wrongly from the second item on.
fn logits(decoder: &stock_whisper::model::TextDecoder, x: &Tensor) -> Result<Tensor> {
    let of = |item| decoder.final_linear(&x.narrow(0, item, 1)?)?.squeeze(1);
    Tensor::cat(&(0..x.dim(0)?).map(of).collect::<Result<Vec<_>>>()?, 0)
}

impl Session for Whisper {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (features, mut plan) = self.read(call)?;
        let (decoder, device) = (&mut self.model.decoder, &self.spec.device);
        let states = self.model.encoder.forward(&features, true)?;
        if plan.detected.is_some() {
            let start = Tensor::full(plan.prompt[0][0], (plan.prompt.len(), 1), device)?;
            let x = decoder.forward(&start, &states, true)?;
            plan.detect(&logits(decoder, &x)?)?;
        }
        let mut sequences = plan.prompt.clone();
        plan.generation.run_with(
            &plan.prompt,
            observer,
            &|made: &[i64], row: &mut [f32]| plan.rule(made, row),
            |tokens| {
                for (sequence, token) in sequences.iter_mut().zip(tokens.unwrap_or_default()) {
                    sequence.push(*token);
                }
                let ids = Tensor::from_vec(sequences.concat(), (sequences.len(), ()), device)?;
                let x = decoder.forward(&ids, &states, tokens.is_none())?;
                Ok(logits(decoder, &last_rows(&x)?.unsqueeze(1)?)?)
            },
        )
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        Ok(whisper::generate_cost(&self.cfg, &self.read(call)?.1, self.spec.dtype))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        stock()
    }
}

/// `candle_transformers::models::encodec`: a sound as one piece, through as many codebooks as were loaded.
///
/// A codebook's model is made at the first call of its bandwidth. What lies beyond the ends of a sequence is its last
/// value where the checkpoints mirror it, and nothing is cut off behind a transposed convolution, so sounds differ.
pub(crate) struct Encodec {
    cfg: EncodecConfig,
    spec: ModelSpec,
    vb: VarBuilder<'static>,
    /// By codebooks.
    models: BTreeMap<usize, stock_encodec::Model>,
}

impl Encodec {
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = EncodecConfig::from_spec(spec)?;
        if cfg.chunk_length_s.is_some() || cfg.normalize || cfg.audio_channels != 1 {
            return Err(unsupported(spec, "takes a sound of one channel as one piece, as it is"));
        }
        if cfg.norm_type != NormType::WeightNorm || cfg.codebook_size != 1024 {
            return Err(unsupported(spec, "is wrapped for weight norm and codebooks of 1024"));
        }
        let vb = vb.rename_f(|name: &str| {
            let name = name.replace(".weight_g", ".parametrizations.weight.original0");
            name.replace(".weight_v", ".parametrizations.weight.original1")
        });
        let mut model = Self { vb, spec: spec.clone(), models: BTreeMap::new(), cfg };
        // all of the checkpoint is read, and the largest model at hand
        model.with(model.cfg.quantizers())?;
        Ok(model)
    }

    /// The model of so many codebooks.
    fn with(&mut self, quantizers: usize) -> Result<&stock_encodec::Model> {
        if !self.models.contains_key(&quantizers) {
            let cfg = &self.cfg;
            // so many, by its own formula
            let bandwidth = (quantizers * cfg.frame_rate() * 10) as f64 / 1000.0;
            let config = stock_encodec::Config {
                target_bandwidths: vec![bandwidth],
                sampling_rate: cfg.sampling_rate,
                audio_channels: cfg.audio_channels,
                normalize: cfg.normalize,
                chunk_length_s: None,
                overlap: None,
                hidden_size: cfg.hidden_size,
                num_filters: cfg.num_filters,
                num_residual_layers: cfg.num_residual_layers,
                upsampling_ratios: cfg.upsampling_ratios.clone(),
                norm_type: stock_encodec::NormType::WeightNorm,
                kernel_size: cfg.kernel_size,
                last_kernel_size: cfg.last_kernel_size,
                residual_kernel_size: cfg.residual_kernel_size,
                dilation_growth_rate: cfg.dilation_growth_rate,
                use_causal_conv: cfg.use_causal_conv,
                pad_mode: match cfg.pad_mode {
                    Edge::Constant => stock_encodec::PadMode::Constant,
                    _ => stock_encodec::PadMode::Replicate,
                },
                compress: cfg.compress,
                num_lstm_layers: cfg.num_lstm_layers,
                trim_right_ratio: cfg.trim_right_ratio,
                codebook_size: cfg.codebook_size,
                codebook_dim: cfg.codebook_dim,
                use_conv_shortcut: cfg.use_conv_shortcut,
            };
            self.models.insert(quantizers, stock_encodec::Model::new(&config, self.vb.clone())?);
        }
        match self.models.get(&quantizers) {
            Some(model) => Ok(model),
            None => candle_core::bail!("no model of {quantizers} codebooks"),
        }
    }

    /// The sounds of a call (batch, 1, samples), and its codebooks.
    fn read(&self, call: &Call) -> Result<(Tensor, usize), SessionError> {
        if call.method != "forward" {
            return Err(SessionError::input("method", "candle-transformers' EnCodec is wrapped for forward"));
        }
        let inputs = Inputs::of_any_method(call, &["input_values", "padding_mask"])?;
        let shape = [("batch", None), ("channels", Some(1)), ("samples", None)];
        let sounds = inputs.floats_of("input_values", &shape)?;
        if let Some(mask) = inputs.optional("padding_mask")
            && mask.to_dtype(DType::F32)?.min_all()?.to_scalar::<f32>()? == 0.0
        {
            return Err(SessionError::input("padding_mask", "candle-transformers' EnCodec takes no padding"));
        }
        let sounds = sounds.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        Ok((sounds, self.cfg.quantizers_of(call)?))
    }
}

impl Session for Encodec {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (sounds, quantizers) = self.read(call)?;
        let samples = sounds.dim(2)?;
        let model = self.with(quantizers)?;
        let codes = model.encode(&sounds)?; // (batch, quantizers, frames)
        let made = model.decode(&codes)?;
        let made = made.narrow(2, 0, samples.min(made.dim(2)?))?;
        observer.end(Phase::Forward);
        let codes = codes.to_dtype(DType::I64)?.unsqueeze(0)?;
        Ok(Tensors::from([("audio_codes".to_owned(), codes), ("audio_values".to_owned(), made)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (sounds, quantizers) = self.read(call)?;
        let (batch, _, samples) = sounds.dims3()?;
        Ok(encodec::forward_cost(&self.cfg, [batch, samples, quantizers], self.spec.dtype))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        stock()
    }
}
