//! Whisper: two convolutions and an encoder over spectra, a decoder of text behind it, and the prompt of language, task
//! and times with which the decoder begins.
//! Source: Whisper (arXiv:2212.04356). Mirrors `transformers.WhisperForConditionalGeneration`,
//! `WhisperForAudioClassification` and `WhisperEncoder`.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{Conv1d, Conv1dConfig, to_channels_last};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::activation_dtype;
use super::features::TORCH_EPS;
use super::seq2seq::{DecoderLayers, EncoderLayer, LayerConfig, Pass, generate, last_rows, phases};
use super::wav2vec2::{LayerSum, softmax};

const GENERATION: &str = "WhisperForConditionalGeneration";
const CLASSIFICATION: &str = "WhisperForAudioClassification";
const ENCODER: &str = "WhisperEncoder";

/// The classes that run.
pub const CLASSES: &[&str] = &[GENERATION, CLASSIFICATION, ENCODER];

/// Names in published checkpoints.
pub const ALIASES: &[AliasRule] = &[
    // tied
    AliasRule::rename(r"^proj_out\.weight$", "model.decoder.embed_tokens.weight", AliasScope::Class(GENERATION)),
    // saved from WhisperModel
    AliasRule::rename(r"^(encoder|decoder)\.", "model.$1.", AliasScope::Class(GENERATION)),
    // the encoder alone, from a checkpoint with a decoder or one of its own
    AliasRule::drop(r"^proj_out\.|^(model\.)?decoder\.", AliasScope::Class(CLASSIFICATION)),
    AliasRule::rename(r"^model\.encoder\.", "encoder.", AliasScope::Class(CLASSIFICATION)),
    AliasRule::drop(r"^proj_out\.|^(model\.)?decoder\.", AliasScope::Class(ENCODER)),
    AliasRule::drop(r"^(projector|classifier)\.|^layer_weights$", AliasScope::Class(ENCODER)),
    AliasRule::rename(r"^(model\.)?encoder\.", "", AliasScope::Class(ENCODER)),
];

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.WhisperConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct WhisperConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Bins of a spectrum.
    pub num_mel_bins: usize,
    /// Width of the stream.
    pub d_model: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Its heads; they divide `d_model`.
    pub encoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub encoder_ffn_dim: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Its heads; they divide `d_model`.
    pub decoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub decoder_ffn_dim: usize,
    /// Activation of the feed-forward halves.
    pub activation_function: Activation,
    /// Positions of the encoder: half as many as it takes spectra, no more and no less.
    pub max_source_positions: usize,
    /// The most positions of the decoder.
    pub max_target_positions: usize,
    /// The classifier takes a weighted sum of the states between layers.
    pub use_weighted_layer_sum: bool,
    /// Width of the classifier's projection.
    pub classifier_proj_size: usize,
}

impl Default for WhisperConfig {
    fn default() -> Self {
        Self {
            vocab_size: 51865,
            num_mel_bins: 80,
            d_model: 384,
            encoder_layers: 4,
            encoder_attention_heads: 6,
            encoder_ffn_dim: 1536,
            decoder_layers: 4,
            decoder_attention_heads: 6,
            decoder_ffn_dim: 1536,
            activation_function: Activation::Gelu,
            max_source_positions: 1500,
            max_target_positions: 448,
            use_weighted_layer_sum: false,
            classifier_proj_size: 256,
        }
    }
}

impl WhisperConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("num_mel_bins", cfg.num_mel_bins),
            ("d_model", cfg.d_model),
            ("encoder_layers", cfg.encoder_layers),
            ("encoder_attention_heads", cfg.encoder_attention_heads),
            ("encoder_ffn_dim", cfg.encoder_ffn_dim),
            ("decoder_layers", cfg.decoder_layers),
            ("decoder_attention_heads", cfg.decoder_attention_heads),
            ("decoder_ffn_dim", cfg.decoder_ffn_dim),
            ("max_source_positions", cfg.max_source_positions),
            ("max_target_positions", cfg.max_target_positions),
            ("classifier_proj_size", cfg.classifier_proj_size),
        ])?;
        config::multiple(("d_model", cfg.d_model), ("encoder_attention_heads", cfg.encoder_attention_heads))?;
        config::multiple(("d_model", cfg.d_model), ("decoder_attention_heads", cfg.decoder_attention_heads))?;
        config::refuse_unless(spec, "tie_word_embeddings", &[true.into()])?;
        Ok(cfg)
    }

    /// Spectra of a sound.
    pub(super) fn frames(&self) -> usize {
        2 * self.max_source_positions
    }

    fn half(&self, layers: usize, heads: usize, inner: usize) -> LayerConfig {
        LayerConfig {
            layers,
            hidden: self.d_model,
            heads,
            inner,
            activation: self.activation_function,
            eps: TORCH_EPS,
            pre_norm: true,
            key_bias: false,
            dense: ["fc1", "fc2"],
        }
    }

    fn encoder(&self) -> LayerConfig {
        self.half(self.encoder_layers, self.encoder_attention_heads, self.encoder_ffn_dim)
    }

    fn decoder(&self) -> LayerConfig {
        self.half(self.decoder_layers, self.decoder_attention_heads, self.decoder_ffn_dim)
    }
}

struct Encoder {
    conv1: Conv1d,
    conv2: Conv1d,
    /// (1, positions, hidden)
    embed_positions: Tensor,
    layers: Vec<EncoderLayer>,
    layer_norm: LayerNorm,
}

impl Encoder {
    fn load(cfg: &WhisperConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, layers) = (cfg.d_model, cfg.encoder());
        let config = Conv1dConfig { padding: (1, 1), ..Conv1dConfig::new(3) };
        let layer =
            |i: usize| EncoderLayer::load(&layers, ["self_attn", "self_attn_layer_norm"], vb.pp("layers").pp(i));
        let positions = vb.pp("embed_positions").get((cfg.max_source_positions, hidden), "weight")?;
        let dtype = activation_dtype(vb.dtype(), vb.device());
        Ok(Self {
            conv1: Conv1d::load(cfg.num_mel_bins, hidden, config, true, vb.pp("conv1"))?,
            conv2: Conv1d::load(hidden, hidden, Conv1dConfig { stride: 2, ..config }, true, vb.pp("conv2"))?,
            embed_positions: positions.unsqueeze(0)?.to_dtype(dtype)?,
            layers: (0..layers.layers).map(layer).collect::<Result<_>>()?,
            layer_norm: layers.norm(vb.pp("layer_norm"))?,
        })
    }

    /// (batch, bins, frames) -> (batch, positions, hidden); `layer_weights` ask for the weighted sum of the states instead
    /// of the last.
    fn forward(&self, features: &Tensor, layer_weights: &[f64]) -> Result<Tensor> {
        let x = self.conv1.forward_act(&to_channels_last(features)?, Activation::Gelu)?;
        let x = self.conv2.forward_act(&x, Activation::Gelu)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        let mut x = match x.dim(0)? {
            1 => (x + &self.embed_positions)?,
            _ => x.broadcast_add(&self.embed_positions)?,
        };
        let mut states = LayerSum::new(layer_weights);
        for layer in &self.layers {
            states.add(&x)?;
            x = layer.forward(&x, |_| Ok(None))?;
        }
        let x = self.layer_norm.forward(&x)?;
        states.add(&x)?;
        Ok(states.sum.unwrap_or(x))
    }
}

struct Decoder {
    embed_tokens: Embedding,
    embed_positions: Embedding,
    layers: DecoderLayers,
    layer_norm: LayerNorm,
    proj_out: Linear,
}

impl Decoder {
    fn load(cfg: &WhisperConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, layers) = (cfg.d_model, cfg.decoder());
        let (embed_tokens, proj_out) = Embedding::load_tied(cfg.vocab_size, hidden, vb.pp("embed_tokens"))?;
        Ok(Self {
            embed_tokens,
            embed_positions: Embedding::load(cfg.max_target_positions, hidden, vb.pp("embed_positions"))?,
            layers: DecoderLayers::load(layers, vb.pp("layers"))?,
            layer_norm: layers.norm(vb.pp("layer_norm"))?,
            proj_out,
        })
    }

    /// The states behind the last norm; (batch, seq) -> (batch, seq, hidden)
    fn forward(&self, ids: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let x = self.embed_tokens.forward(ids)?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        let x = x.broadcast_add(&self.embed_positions.forward(&decoding.position_ids()?)?)?;
        self.layer_norm.forward(&self.layers.forward(x, decoding, encoded)?)
    }

    /// The logits (batch, vocab) behind the last of `ids` (batch, seq).
    fn next(&self, ids: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        self.proj_out.forward(&last_rows(&self.forward(ids, decoding, encoded)?)?)
    }
}

/// What follows the encoder.
enum Head {
    Nothing,
    Decoder(Box<Decoder>),
    Classifier {
        /// Softmax of the checkpoint's, where the states are summed.
        layer_weights: Vec<f64>,
        projector: Linear,
        classifier: Linear,
    },
}

/// One of [`CLASSES`].
pub struct WhisperModel {
    cfg: WhisperConfig,
    labels: usize,
    encoder: Encoder,
    head: Head,
    /// With a generation_config.json made of config.json, where the checkpoint has none.
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// What config.json says about generation, with the class's own values, where there is no generation_config.json.
fn generation_config(config: &Value) -> Value {
    let begin = serde_json::json!([220, 50256]);
    let defaults = [
        ("bos_token_id", 50256.into()),
        ("eos_token_id", 50256.into()),
        ("pad_token_id", 50256.into()),
        ("decoder_start_token_id", 50257.into()),
        ("begin_suppress_tokens", begin),
        ("suppress_tokens", Value::Null),
        ("forced_decoder_ids", Value::Null),
    ];
    let field = |(name, default): (&str, Value)| (name.to_owned(), config.get(name).cloned().unwrap_or(default));
    Value::Object(defaults.into_iter().map(field).collect())
}

const GENERATION_FILE: &str = "generation_config.json";

/// `spec` with a generation_config.json made of config.json, where it has none.
pub(super) fn with_generation_config(spec: &ModelSpec) -> ModelSpec {
    let mut spec = spec.clone();
    if !spec.extra_configs.contains_key(GENERATION_FILE) {
        spec.extra_configs.insert(GENERATION_FILE.to_owned(), generation_config(&spec.config));
    }
    spec
}

impl WhisperModel {
    /// Loads the class of `spec`.
    ///
    /// # Errors
    /// As for [`WhisperConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = WhisperConfig::from_spec(spec)?;
        let linear = |input, output, name: &str| Linear::load(input, output, true, vb.pp(name));
        let (encoder, head, labels) = match spec.class.as_str() {
            ENCODER => (vb.clone(), Head::Nothing, 0),
            CLASSIFICATION => {
                let labels = label_count(&spec.config)?;
                let layer_weights = match cfg.use_weighted_layer_sum {
                    true => softmax(&vb.get(cfg.encoder_layers + 1, "layer_weights")?)?,
                    false => Vec::new(),
                };
                let head = Head::Classifier {
                    layer_weights,
                    projector: linear(cfg.d_model, cfg.classifier_proj_size, "projector")?,
                    classifier: linear(cfg.classifier_proj_size, labels, "classifier")?,
                };
                (vb.pp("encoder"), head, labels)
            }
            GENERATION => {
                let model = vb.pp("model");
                (model.pp("encoder"), Head::Decoder(Box::new(Decoder::load(&cfg, model.pp("decoder"))?)), 0)
            }
            _ => return Err(config::unsupported_class(spec, CLASSES)),
        };
        let spec = with_generation_config(spec);
        Ok(Self {
            encoder: Encoder::load(&cfg, encoder)?,
            head,
            labels,
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
            spec,
        })
    }

    /// The spectra of a call, where the model computes.
    fn features(&self, inputs: &Inputs) -> Result<Tensor, SessionError> {
        let shape = [("batch", None), ("bins", Some(self.cfg.num_mel_bins)), ("frames", Some(self.cfg.frames()))];
        let dtype = activation_dtype(self.spec.dtype, &self.spec.device);
        Ok(inputs.floats_of("input_features", &shape)?.to_device(&self.spec.device)?.to_dtype(dtype)?)
    }

    fn read(&self, call: &Call) -> Result<Request, SessionError> {
        // the class takes a mask of spectra and heeds it not
        let known = ["input_features", "attention_mask", "decoder_input_ids", "decoder_attention_mask"];
        let has_decoder = matches!(self.head, Head::Decoder(_));
        match call.method.as_str() {
            "forward" if has_decoder => {
                let inputs = Inputs::forward(call, &known, &["use_cache"])?;
                let features = self.features(&inputs)?;
                let (name, ids) = ("decoder_input_ids", inputs.matrix("decoder_input_ids")?);
                in_range(name, &ids, "vocab_size", self.cfg.vocab_size)?;
                let ((batch, seq), most) = (ids.dims2()?, self.cfg.max_target_positions);
                if batch != features.dim(0)? {
                    let reason = format!("holds {batch} sequences, input_features {} sounds", features.dim(0)?);
                    return Err(SessionError::input(name, reason));
                }
                if seq > most {
                    let reason = format!("comes to {seq} positions, the model has {most}");
                    return Err(SessionError::input(name, reason));
                }
                let mask = inputs.matrix_as("decoder_attention_mask", (name, &ids))?;
                if let Some(mask) = &mask {
                    zero_or_one("decoder_attention_mask", mask)?;
                }
                Ok(Request::Forward { features, ids, mask })
            }
            "generate" if has_decoder => {
                let features = self.features(&Inputs::of_any_method(call, &known[..2])?)?;
                let plan = Plan::read(&self.spec, &self.cfg, call, features.dim(0)?)?;
                Ok(Request::Generate { features, plan: Box::new(plan) })
            }
            "forward" => Ok(Request::Encode { features: self.features(&Inputs::forward(call, &known[..2], &[])?)? }),
            _ => Err(unsupported_method(call, if has_decoder { "forward, generate" } else { "forward" })),
        }
    }

    fn encode(&self, features: &Tensor) -> Result<Tensors> {
        let named = |name: &str, x: Tensor| Tensors::from([(name.to_owned(), x)]);
        let Head::Classifier { layer_weights, projector, classifier } = &self.head else {
            return Ok(named("last_hidden_state", self.encoder.forward(features, &[])?));
        };
        let x = self.encoder.forward(features, layer_weights)?;
        // the class projects every state and takes the mean then, which is the same
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        Ok(named("logits", classifier.forward(&projector.forward(&x.mean(1)?)?)?))
    }

    fn decoder(&self) -> Result<&Decoder, SessionError> {
        match &self.head {
            Head::Decoder(decoder) => Ok(decoder),
            _ => Err(config::unsupported_class(&self.spec, &[GENERATION])),
        }
    }

    fn forward(&self, features: &Tensor, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensors, SessionError> {
        let decoder = self.decoder()?;
        let mut encoded = decoder.layers.encoded(self.encoder.forward(features, &[])?, None)?;
        let ids = ids.to_device(&self.spec.device)?;
        let mut decoding = Decoding::once(ids.dim(0)?, ids.dim(1)?, mask, &self.spec.device)?;
        let logits = decoder.proj_out.forward(&decoder.forward(&ids, &mut decoding, &mut encoded)?)?;
        let states = encoded.states().clone();
        Ok(Tensors::from([("encoder_last_hidden_state".to_owned(), states), ("logits".to_owned(), logits)]))
    }

    fn generate(
        &self,
        features: &Tensor,
        mut plan: Plan,
        observer: &mut dyn Observer,
    ) -> Result<Tensors, SessionError> {
        let (decoder, device) = (self.decoder()?, &self.spec.device);
        let mut encoded = decoder.layers.encoded(self.encoder.forward(features, &[])?, None)?;
        let batch = plan.prompt.len();
        if plan.detected.is_some() {
            let start = Tensor::full(plan.prompt[0][0], (batch, 1), device)?;
            plan.detect(&decoder.next(&start, &mut Decoding::once(batch, 1, None, device)?, &mut encoded)?)?;
        }
        let generation = &plan.generation;
        let positions = generation.positions(plan.prompt[0].len());
        let decoding = decoder.layers.decoding(batch, positions, &self.spec)?;
        let rule = |made: &[i64], row: &mut [f32]| plan.rule(made, row);
        generate(generation, &plan.prompt, decoding, observer, &rule, device, |ids, decoding| {
            decoder.next(ids, decoding, &mut encoded)
        })
    }
}

/// A call, read.
enum Request {
    /// Of the classes without a decoder.
    Encode {
        features: Tensor,
    },
    Forward {
        features: Tensor,
        ids: Tensor,
        mask: Option<Tensor>,
    },
    Generate {
        features: Tensor,
        plan: Box<Plan>,
    },
}

/// How tokens are chosen, and what the decoder begins with.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) generation: Generation,
    /// Of each sound; all as long. Where languages are detected the second is not known yet.
    pub(super) prompt: Vec<Vec<i64>>,
    /// The tokens of the languages among which the likeliest is taken.
    pub(super) detected: Option<Vec<i64>>,
    times: Option<TimeRules>,
}

/// Arguments that the class reads by itself.
const OWN: [&str; 6] =
    ["language", "task", "is_multilingual", "return_timestamps", "force_unique_generate_call", "forced_decoder_ids"];

impl Plan {
    /// Sets the second token of each prompt to that of the likeliest language by `logits` (batch, vocab), which follow
    /// the first.
    pub(super) fn detect(&mut self, logits: &Tensor) -> Result<()> {
        let Some(languages) = &self.detected else { return Ok(()) };
        for (tokens, row) in self.prompt.iter_mut().zip(logits.to_dtype(DType::F32)?.to_vec2::<f32>()?) {
            let logit = |id: &i64| usize::try_from(*id).ok().and_then(|id| row.get(id)).copied();
            let likeliest = languages.iter().rev().max_by(|a, b| {
                let least = f32::NEG_INFINITY;
                logit(a).unwrap_or(least).total_cmp(&logit(b).unwrap_or(least))
            });
            if let Some(language) = likeliest {
                tokens[1] = *language;
            }
        }
        Ok(())
    }

    /// Applies the rules of times, where they are wanted, to the logits behind `made`.
    pub(super) fn rule(&self, made: &[i64], row: &mut [f32]) {
        if let Some(times) = &self.times {
            times.apply(made, row);
        }
    }

    pub(super) fn read(spec: &ModelSpec, cfg: &WhisperConfig, call: &Call, batch: usize) -> Result<Self, SessionError> {
        let nothing = Map::new();
        let file = spec.extra_configs.get(GENERATION_FILE).and_then(Value::as_object).unwrap_or(&nothing);
        let fields = Fields { call, file };
        let times = fields.flag("return_timestamps")?;
        if times && !fields.flag("force_unique_generate_call")? {
            let reason = "is true: the library would decode a sound several times and give segments; pass \
                          force_unique_generate_call = true for one pass";
            return Err(SessionError::input("return_timestamps", reason));
        }
        let no_times = fields.file_token("no_timestamps_token_id")?;
        let (mut prompt, detected) = fields.prompt(&spec.config, batch)?;
        for tokens in &mut prompt {
            match no_times {
                Some(no_times) if !times && tokens.last() != Some(&no_times) => tokens.push(no_times),
                Some(no_times) if times && tokens.last() == Some(&no_times) => drop(tokens.pop()),
                None if times => {
                    let reason = "is true, but generation_config.json has no no_timestamps_token_id";
                    return Err(SessionError::input("return_timestamps", reason));
                }
                _ => {}
            }
        }
        if let Some(id) =
            prompt.iter().flatten().find(|id| usize::try_from(**id).map_or(**id != UNKNOWN, |id| id >= cfg.vocab_size))
        {
            let reason = format!("(generation): the prompt has token {id}, beyond vocab_size = {}", cfg.vocab_size);
            return Err(SessionError::input("decoder_start_token_id", reason));
        }
        let length = prompt.first().map_or(0, Vec::len);
        let most = cfg.max_target_positions;
        let arguments = fields.arguments(length, most)?;
        let own = Call { method: call.method.clone(), inputs: Tensors::new(), arguments };
        let generation = Generation::read(spec, &own, length, &OWN)?;
        if length + generation.max_new_tokens > most {
            let new = generation.max_new_tokens;
            let reason = format!("{new} behind {length} of the prompt are more than the model's {most} positions");
            return Err(SessionError::input("max_new_tokens", reason));
        }
        let times = match (times, no_times) {
            (true, Some(no_times)) => Some(TimeRules {
                no_times,
                end: generation.eos_token_id.first().copied().or(generation.bos_token_id).unwrap_or(no_times),
                latest_first: fields.file_token("max_initial_timestamp_index")?,
            }),
            _ => None,
        };
        Ok(Self { generation, prompt, detected, times })
    }
}

/// In the place of a language that is to be detected.
const UNKNOWN: i64 = -1;

/// The arguments of a call, and what generation_config.json has for those that it leaves out.
struct Fields<'a> {
    call: &'a Call,
    file: &'a Map<String, Value>,
}

/// Tokens of each item.
type Sequences = Vec<Vec<i64>>;

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        let given = |fields: &'a Map<String, Value>| fields.get(name).filter(|value| !value.is_null());
        given(&self.call.arguments).or_else(|| given(self.file))
    }

    fn flag(&self, name: &str) -> Result<bool, SessionError> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(SessionError::input(name, format!("is {other}, expected true or false"))),
        }
    }

    fn file_token(&self, name: &str) -> Result<Option<i64>, SessionError> {
        let token = |value: &Value| {
            value.as_i64().ok_or_else(|| SessionError::input(name, format!("(generation): {value} is no number")))
        };
        self.file.get(name).filter(|value| !value.is_null()).map(token).transpose()
    }

    /// `lang_to_id` or `task_to_id`.
    fn ids(&self, name: &str) -> Result<Option<BTreeMap<String, i64>>, SessionError> {
        let read = |value: &Value| {
            serde_json::from_value(value.clone())
                .map_err(|error| SessionError::input(name, format!("(generation): {error}")))
        };
        self.file.get(name).filter(|value| !value.is_null()).map(read).transpose()
    }

    /// The plain arguments without those of the class, and with the length that it counts from the prompt's end.
    fn arguments(&self, prompt: usize, most: usize) -> Result<Map<String, Value>, SessionError> {
        let mut arguments = self.call.arguments.clone();
        // the class samples where there is a temperature, whatever do_sample says
        let temperature = match arguments.remove("temperature") {
            None | Some(Value::Null) => 0.0,
            Some(value) => value.as_f64().ok_or_else(|| {
                let reason = format!("is {value}, expected a number; several temperatures are not supported");
                SessionError::input("temperature", reason)
            })?,
        };
        arguments.insert("do_sample".to_owned(), (temperature > 0.0).into());
        if temperature > 0.0 {
            arguments.insert("temperature".to_owned(), temperature.into());
        }
        let new = ["max_new_tokens"].into_iter().find_map(|name| self.get(name));
        if new.is_none() {
            let length = self.get("max_length").and_then(Value::as_u64).unwrap_or(DEFAULT_MAX_LENGTH);
            let behind = prompt.min((most / 2).saturating_sub(1)) as u64;
            arguments.insert("max_length".to_owned(), length.saturating_add(behind).min(most as u64).into());
        }
        Ok(arguments)
    }

    /// The tokens that the decoder begins with, without that of times, and the languages to choose from where a sound's
    /// is detected.
    fn prompt(&self, config: &Value, batch: usize) -> Result<(Sequences, Option<Vec<i64>>), SessionError> {
        let start = self.get("decoder_start_token_id").and_then(Value::as_i64);
        let start = start.ok_or_else(|| SessionError::input("decoder_start_token_id", "is missing"))?;
        let (language, task) = (self.get("language"), self.get("task"));
        let is_given = |name: &str| self.call.arguments.get(name).is_some_and(|value| !value.is_null());
        if self.get("is_multilingual") == Some(&Value::Bool(false)) {
            for name in ["language", "task"] {
                if is_given(name) {
                    return Err(SessionError::input(name, "is not for a model of English alone"));
                }
            }
        }
        let mut tokens = vec![Some(start)];
        if language.is_none() && task.is_none() {
            tokens.extend(self.forced(config)?);
        }
        let languages = self.ids("lang_to_id")?;
        let tasks = self.ids("task_to_id")?.unwrap_or_default();
        let mut prompt = vec![tokens; batch];
        let mut detected = None;
        let set_second = |tokens: &mut Vec<Option<i64>>, id: i64| match tokens.get_mut(1) {
            Some(second) => *second = Some(id),
            None => tokens.push(Some(id)),
        };
        if let Some(language) = language {
            let names: Vec<&str> = match language {
                Value::String(name) => vec![name; batch],
                Value::Array(names) if names.len() == batch => names.iter().filter_map(Value::as_str).collect(),
                _ => Vec::new(),
            };
            if names.len() != batch {
                let reason = format!("is {language}, expected a name, or one for each of {batch} sounds");
                return Err(SessionError::input("language", reason));
            }
            let known = languages.unwrap_or_default();
            for (tokens, name) in prompt.iter_mut().zip(names) {
                set_second(tokens, language_id(name, &known)?);
            }
        } else if let Some(languages) = languages
            && prompt[0].get(1).is_none_or(Option::is_none)
        {
            prompt.iter_mut().for_each(|tokens| set_second(tokens, UNKNOWN));
            detected = Some(languages.into_values().collect::<Vec<_>>());
            detected.iter_mut().for_each(|ids| ids.sort_unstable());
        }
        let named_task = match task {
            None => None,
            Some(task) => match task.as_str().filter(|task| TASKS.contains(task)).and_then(|task| tasks.get(task)) {
                Some(id) => Some(*id),
                None => {
                    let reason = format!("is {task}, expected one of the model's of {}", TASKS.join(", "));
                    return Err(SessionError::input("task", reason));
                }
            },
        };
        for tokens in &mut prompt {
            let has_task = tokens.iter().flatten().any(|id| tasks.values().any(|task| task == id));
            let by_default = tasks.get(TASKS[0]).copied().filter(|_| language.is_some() && !has_task);
            tokens.extend(named_task.or(by_default).map(Some));
        }
        Ok((prompt.into_iter().map(|tokens| tokens.into_iter().flatten().collect()).collect(), detected))
    }

    /// The old form of language and task: tokens by their places, which begin with 1 and leave none out.
    fn forced(&self, config: &Value) -> Result<Vec<Option<i64>>, SessionError> {
        let name = "forced_decoder_ids";
        let in_config = || config.get(name).filter(|value| !value.is_null());
        let Some(value) = self.get(name).or_else(in_config) else { return Ok(Vec::new()) };
        let pairs: Vec<(usize, Option<i64>)> = serde_json::from_value(value.clone())
            .map_err(|error| SessionError::input(name, format!("(generation): {error}")))?;
        if pairs.first().is_none_or(|pair| pair.0 != 1) {
            return Ok(Vec::new());
        }
        if let Some((_, (at, _))) = pairs.iter().enumerate().find(|(i, (at, _))| i + 1 != *at) {
            return Err(SessionError::input(
                name,
                format!("(generation): place {at} does not follow the one before it"),
            ));
        }
        Ok(pairs.into_iter().map(|(_, id)| id).collect())
    }
}

/// The first is taken where a language is given and no task.
const TASKS: [&str; 2] = ["transcribe", "translate"];

/// Tokens in all where nothing says how many, as in the library.
const DEFAULT_MAX_LENGTH: u64 = 20;

/// Languages by their names in English; their codes are those of the tokens.
const LANGUAGES: &str = "en english, zh chinese, zh mandarin, de german, es spanish, es castilian, ru russian, ko korean, \
    fr french, ja japanese, pt portuguese, tr turkish, pl polish, ca catalan, ca valencian, nl dutch, nl flemish, \
    ar arabic, sv swedish, it italian, id indonesian, hi hindi, fi finnish, vi vietnamese, he hebrew, uk ukrainian, \
    el greek, ms malay, cs czech, ro romanian, ro moldavian, ro moldovan, da danish, hu hungarian, ta tamil, \
    no norwegian, th thai, ur urdu, hr croatian, bg bulgarian, lt lithuanian, la latin, mi maori, ml malayalam, \
    cy welsh, sk slovak, te telugu, fa persian, lv latvian, bn bengali, sr serbian, az azerbaijani, sl slovenian, \
    kn kannada, et estonian, mk macedonian, br breton, eu basque, is icelandic, hy armenian, ne nepali, mn mongolian, \
    bs bosnian, kk kazakh, sq albanian, sw swahili, gl galician, mr marathi, pa punjabi, pa panjabi, si sinhala, \
    si sinhalese, km khmer, sn shona, yo yoruba, so somali, af afrikaans, oc occitan, ka georgian, be belarusian, \
    tg tajik, sd sindhi, gu gujarati, am amharic, yi yiddish, lo lao, uz uzbek, fo faroese, ht haitian creole, \
    ht haitian, ps pashto, ps pushto, tk turkmen, nn nynorsk, mt maltese, sa sanskrit, lb luxembourgish, \
    lb letzeburgesch, my myanmar, my burmese, bo tibetan, tl tagalog, mg malagasy, as assamese, tt tatar, \
    haw hawaiian, ln lingala, ha hausa, ba bashkir, jw javanese, su sundanese, yue cantonese";

/// The token of a language, which is named by its token (`<|fr|>`), its code or its English name.
fn language_id(name: &str, known: &BTreeMap<String, i64>) -> Result<i64, SessionError> {
    let name = name.to_lowercase();
    let listed = LANGUAGES.split(", ").filter_map(|entry| entry.split_once(' ')).find(|(_, english)| *english == name);
    let code = listed.map_or(name.as_str(), |(code, _)| code);
    known.get(&name).or_else(|| known.get(&format!("<|{code}|>"))).copied().ok_or_else(|| {
        let list = known.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
        SessionError::input("language", format!("`{name}` is none of the model's: {list}"))
    })
}

/// Which tokens may follow where times are wanted: they come in pairs and never go back.
#[derive(Debug, Clone, PartialEq)]
struct TimeRules {
    /// The token that says that there are no times; those behind it are times.
    no_times: i64,
    end: i64,
    /// The latest time that may come first.
    latest_first: Option<i64>,
}

impl TimeRules {
    fn apply(&self, made: &[i64], row: &mut [f32]) {
        let vocab = row.len();
        let place = |token: i64| usize::try_from(token).unwrap_or(0).min(vocab);
        let mut ban = |from: usize, to: usize| row[from.min(to)..to].fill(f32::NEG_INFINITY);
        let times = place(self.no_times + 1);
        ban(place(self.no_times), times);
        let is_time = |token: &i64| *token > self.no_times;
        let last_is_time = made.last().is_some_and(is_time);
        let is_pair = made.len() < 2 || is_time(&made[made.len() - 2]);
        match (last_is_time, is_pair) {
            (true, true) => ban(times, vocab),
            (true, false) => ban(0, place(self.end)),
            _ => {}
        }
        if let Some(latest) = made.iter().rev().find(|token| is_time(token)) {
            // the second of a pair may be the time of the first
            let open = last_is_time && !is_pair;
            ban(times, place(if open { *latest } else { latest + 1 }));
        }
        if made.is_empty() {
            ban(0, times);
            if let Some(latest) = self.latest_first {
                ban(place(self.no_times + latest + 2), vocab);
            }
        }
        // all times together against the likeliest other token
        let (others, after) = row.split_at_mut(times);
        let largest = |values: &[f32]| values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let top = largest(after);
        let sum: f32 = after.iter().map(|x| (x - top).exp()).sum();
        if top > f32::NEG_INFINITY && top + sum.ln() > largest(others) {
            others.fill(f32::NEG_INFINITY);
        }
    }
}

impl Session for WhisperModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = match self.read(call)? {
            Request::Encode { features } => self.encode(&features)?,
            Request::Forward { features, ids, mask } => self.forward(&features, &ids, mask.as_ref())?,
            Request::Generate { features, plan } => return self.generate(&features, *plan, observer),
        };
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let costs = Costs { cfg: &self.cfg, bytes: self.spec.dtype.size_in_bytes() as u64 };
        let forward = |cost| Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }]);
        match self.read(call)? {
            Request::Encode { features } => {
                let (batch, head) = (features.dim(0)? as u64, matches!(self.head, Head::Classifier { .. }));
                let head = if head { costs.classifier(batch, self.labels as u64) } else { Cost::default() };
                forward(costs.encoder(batch) + head)
            }
            Request::Forward { ids, .. } => {
                let (batch, seq) = ids.dims2()?;
                let [batch, seq] = [batch, seq].map(|n| n as u64);
                forward(costs.encoder(batch) + costs.decoder([batch, seq], 0, seq, false))
            }
            Request::Generate { plan, .. } => Ok(generate_cost(&self.cfg, &plan, self.spec.dtype)),
        }
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// What it costs to carry `plan` out, as long as it may become.
pub(super) fn generate_cost(cfg: &WhisperConfig, plan: &Plan, dtype: DType) -> Vec<PhaseCost> {
    let costs = Costs { cfg, bytes: dtype.size_in_bytes() as u64 };
    let (batch, seq) = (plan.prompt.len() as u64, plan.prompt[0].len() as u64);
    let mut prefill = costs.encoder(batch);
    let is_made = plan.detected.is_some();
    if is_made {
        prefill += costs.decoder([batch, 1], 0, 1, false);
    }
    prefill += costs.decoder([batch, seq], 0, 1, is_made);
    let new = plan.generation.max_new_tokens as u64;
    let steps = (1..new).map(|made| costs.decoder([batch, 1], seq + made - 1, 1, true)).sum();
    phases(prefill, steps, new)
}

/// The cost by formula.
struct Costs<'a> {
    cfg: &'a WhisperConfig,
    bytes: u64,
}

impl Costs<'_> {
    fn encoder(&self, batch: u64) -> Cost {
        let [bins, hidden, seq] =
            [self.cfg.num_mel_bins, self.cfg.d_model, self.cfg.max_source_positions].map(|n| n as u64);
        let conv = |input: u64, length: u64| {
            let conv = cost::Conv2d {
                batch,
                in_channels: input,
                out_channels: hidden,
                kernel: [1, 3],
                groups: 1,
                output: [1, length],
                bias: true,
            };
            conv.cost(self.bytes) + cost::elementwise(batch * length * hidden, 1) // activation
        };
        cost::input(batch * bins * 2 * seq, self.bytes)
            + conv(bins, 2 * seq)
            + conv(hidden, seq)
            + cost::elementwise(batch * seq * hidden, 1) // positions
            + Cost { weight_bytes: seq * hidden * self.bytes, ..Cost::default() }
            + self.cfg.encoder().encoder_cost([batch, seq], self.bytes)
            + cost::norm(Norm::Layer, batch * seq, hidden, self.bytes)
    }

    /// One pass over (batch, seq) with `cached` positions before it, which makes logits of `logits` rows each; an earlier
    /// one has `made` keys and values of the encoder's states.
    fn decoder(&self, [batch, seq]: [u64; 2], cached: u64, logits: u64, made: bool) -> Cost {
        let (rows, hidden) = (batch * seq, self.cfg.d_model as u64);
        let pass = Pass { batch, seq, cached, states: self.cfg.max_source_positions as u64, made };
        cost::embedding(rows, hidden, self.bytes)
            + cost::embedding(seq, hidden, self.bytes) // positions, the same for all
            + cost::elementwise(rows * hidden, 1)
            + self.cfg.decoder().decoder_cost(pass, self.bytes)
            + cost::norm(Norm::Layer, rows, hidden, self.bytes)
            + cost::linear(batch * logits, hidden, self.cfg.vocab_size as u64, false, self.bytes)
    }

    fn classifier(&self, batch: u64, labels: u64) -> Cost {
        let [hidden, width, seq, layers] =
            [self.cfg.d_model, self.cfg.classifier_proj_size, self.cfg.max_source_positions, self.cfg.encoder_layers]
                .map(|n| n as u64);
        let states = batch * seq * hidden;
        let sum = match self.cfg.use_weighted_layer_sum {
            true => cost::elementwise((layers + 1) * states, 2),
            false => Cost::default(),
        };
        sum + cost::elementwise(states, 1) // mean
            + cost::linear(batch, hidden, width, true, self.bytes)
            + cost::linear(batch, width, labels, true, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::Weights;
    use serde_json::json;

    use super::*;
    use crate::Source;

    fn spec(class: &str, changes: Value, generation: Option<Value>) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 30, "num_mel_bins": 3, "d_model": 4, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 5, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 5,
            "max_source_positions": 6, "max_target_positions": 12, "decoder_start_token_id": 11, "eos_token_id": 10,
            "pad_token_id": 10, "bos_token_id": 10,
        });
        if let (Some(config), Some(changes)) = (config.as_object_mut(), changes.as_object()) {
            config.extend(changes.clone());
        }
        ModelSpec {
            family: "whisper".into(),
            class: class.into(),
            config,
            extra_configs: generation.into_iter().map(|value| (GENERATION_FILE.to_owned(), value)).collect(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    fn model(spec: &ModelSpec) -> WhisperModel {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, ALIASES, &spec.class, &Default::default()).expect("weights");
        WhisperModel::load(spec, weights.var_builder(DType::F32, &Device::Cpu)).expect("a model")
    }

    fn multilingual() -> Value {
        json!({
            "decoder_start_token_id": 11, "eos_token_id": 10, "pad_token_id": 10, "no_timestamps_token_id": 20,
            "is_multilingual": true, "forced_decoder_ids": [[1, null], [2, 15]],
            "lang_to_id": {"<|en|>": 12, "<|fr|>": 13}, "task_to_id": {"transcribe": 15, "translate": 16},
        })
    }

    fn call(arguments: Value) -> Call {
        let features = Tensor::zeros((2, 3, 12), DType::F32, &Device::Cpu).expect("features");
        Call {
            method: "generate".into(),
            inputs: [("input_features".to_owned(), features)].into(),
            arguments: arguments.as_object().cloned().unwrap_or_default(),
        }
    }

    fn prompt(generation: Value, arguments: Value) -> Result<(Vec<Vec<i64>>, bool), SessionError> {
        let spec = spec(GENERATION, json!({}), Some(generation));
        let plan = Plan::read(&spec, &WhisperConfig::from_spec(&spec)?, &call(arguments), 2)?;
        Ok((plan.prompt, plan.detected.is_some()))
    }

    #[test]
    fn prompts_say_language_task_and_times() -> Result<(), SessionError> {
        for (arguments, first, second, detects) in [
            (json!({}), [11, -1, 15, 20], [11, -1, 15, 20], true),
            (json!({"language": "French"}), [11, 13, 15, 20], [11, 13, 15, 20], false),
            (json!({"language": ["en", "<|fr|>"], "task": "translate"}), [11, 12, 16, 20], [11, 13, 16, 20], false),
            (json!({"task": "translate"}), [11, -1, 16, 20], [11, -1, 16, 20], true),
        ] {
            let wanted = (vec![first.to_vec(), second.to_vec()], detects);
            assert_eq!(prompt(multilingual(), arguments.clone())?, wanted, "{arguments}");
        }
        let timed = json!({"return_timestamps": true, "force_unique_generate_call": true, "language": "en"});
        assert_eq!(prompt(multilingual(), timed)?.0[0], [11, 12, 15]);
        let english = json!({"decoder_start_token_id": 11, "is_multilingual": false, "forced_decoder_ids": [[1, 20]],
                             "no_timestamps_token_id": 20});
        assert_eq!(prompt(english.clone(), json!({}))?, (vec![vec![11, 20]; 2], false));
        let message = |file: Value, arguments| prompt(file, arguments).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message(english, json!({"language": "en"})).contains("English alone"));
        assert!(message(multilingual(), json!({"language": "german"})).contains("<|en|> <|fr|>"));
        assert!(message(multilingual(), json!({"language": ["en"]})).contains("one for each of 2 sounds"));
        assert!(message(multilingual(), json!({"task": "sing"})).contains("transcribe, translate"));
        assert!(message(multilingual(), json!({"return_timestamps": true})).contains("force_unique_generate_call"));
        assert!(message(multilingual(), json!({"max_new_tokens": 9})).contains("12 positions"));
        assert!(message(multilingual(), json!({"temperature": [0.0, 0.2]})).contains("several temperatures"));
        Ok(())
    }

    /// Times from 21 on: 21 is 0, 22 the next.
    #[test]
    fn times_come_in_pairs_and_never_go_back() {
        let rules = TimeRules { no_times: 20, end: 10, latest_first: Some(2) };
        let allowed = |made: &[i64], logits: [f32; 2]| {
            // text, then times
            let mut row: Vec<f32> = (0..26).map(|token| logits[usize::from(token > 20)]).collect();
            rules.apply(made, &mut row);
            (0..26).filter(|token| row[*token] > f32::NEG_INFINITY).collect::<Vec<usize>>()
        };
        assert_eq!(allowed(&[], [9.0, 0.0]), [21, 22, 23]);
        assert_eq!(allowed(&[22], [0.0, 0.0]), (0..20).collect::<Vec<_>>());
        assert_eq!(allowed(&[21, 5], [9.0, 0.0]), (0..20).chain(22..26).collect::<Vec<_>>());
        assert_eq!(allowed(&[21, 5, 24], [9.0, 0.0]), (10..20).chain(24..26).collect::<Vec<_>>());
        assert_eq!(allowed(&[21, 5, 24, 24], [0.0, 0.0]), (0..20).collect::<Vec<_>>());
        // together the times are likelier than any other token
        assert_eq!(allowed(&[21, 5], [1.0, 0.0]), [22, 23, 24, 25]);
    }

    #[test]
    fn generation_goes_on_from_the_detected_language() -> Result<(), SessionError> {
        let mut model = model(&spec(GENERATION, json!({}), Some(multilingual())));
        let made = model.call(&call(json!({"max_new_tokens": 3, "min_new_tokens": 3})), &mut Unobserved)?;
        let rows = made["sequences"].to_vec2::<i64>()?;
        assert!(rows[0].len() == 7 && [12, 13].contains(&rows[0][1]), "{rows:?}");
        let given =
            json!({"max_new_tokens": 3, "min_new_tokens": 3, "language": if rows[0][1] == 12 { "en" } else { "fr" }});
        assert_eq!(model.call(&call(given), &mut Unobserved)?["sequences"].to_vec2::<i64>()?, rows);
        Ok(())
    }

    #[test]
    fn without_a_generation_config_the_config_says() -> Result<(), SessionError> {
        let model = model(&spec(GENERATION, json!({"forced_decoder_ids": [[1, 14]]}), None));
        let plan = Plan::read(&model.spec, &model.cfg, &call(json!({"max_new_tokens": 2})), 2)?;
        assert_eq!((plan.prompt, plan.generation.begin_suppress_tokens), (vec![vec![11, 14]; 2], vec![220, 50256]));
        Ok(())
    }

    #[test]
    fn wrong_inputs_and_configs_are_named() {
        let mut encoder = model(&spec(ENCODER, json!({}), None));
        let mut short = call(json!({}));
        short.method = "forward".into();
        short
            .inputs
            .insert("input_features".into(), Tensor::zeros((1, 3, 11), DType::F32, &Device::Cpu).expect("features"));
        let error = encoder.call(&short, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("frames = 12"), "{error}");
        let message = |changes| WhisperConfig::from_spec(&spec(ENCODER, changes, None)).err().map(|e| e.to_string());
        assert!(message(json!({"encoder_attention_heads": 3})).is_some_and(|m| m.contains("`d_model`")));
        assert!(message(json!({"tie_word_embeddings": false})).is_some_and(|m| m.contains("`tie_word_embeddings`")));
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        let cfg = WhisperConfig::from_spec(&spec(GENERATION, json!({}), None))?;
        let costs = Costs { cfg: &cfg, bytes: 4 };
        let linear = |rows: u64, input: u64, output: u64| rows * output * (2 * input + 1);
        let output = |rows: u64, input: u64| linear(rows, input, 4) + rows * 4 + 7 * rows * 4; // residual, norm
        let attention = |pairs: u64| 2 * pairs * (4 * 2 + 5);
        let feed_forward = |rows: u64| linear(rows, 4, 5) + rows * 5 + output(rows, 5);
        let convolutions = linear(12, 9, 4) + 12 * 4 + linear(6, 12, 4) + 6 * 4 + 6 * 4; // activations, positions
        let layer = linear(6, 4, 12) + attention(36) + output(6, 4) + feed_forward(6);
        assert_eq!(costs.encoder(1).flops, convolutions + layer + 7 * 6 * 4);
        // 2 tokens: 3 pairs among themselves, 12 with the states
        let first = 2 * 4
            + linear(2, 4, 12)
            + attention(3)
            + output(2, 4)
            + linear(2, 4, 4)
            + linear(6, 4, 8)
            + attention(12)
            + output(2, 4)
            + feed_forward(2)
            + 7 * 2 * 4
            + 2 * 4 * 30;
        assert_eq!(costs.decoder([1, 2], 0, 1, false).flops, first);
        assert_eq!(costs.decoder([1, 2], 0, 1, true).flops, first - linear(6, 4, 8));
        Ok(())
    }

    /// Published: 72.6 million parameters of whisper-base, where keys have no bias.
    #[test]
    fn every_parameter_of_the_published_checkpoint_is_read() -> Result<(), SessionError> {
        let base = json!({
            "vocab_size": 51865, "num_mel_bins": 80, "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
            "encoder_ffn_dim": 2048, "decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048,
            "max_source_positions": 1500, "max_target_positions": 448,
        });
        let cfg = WhisperConfig::from_spec(&spec(GENERATION, base, None))?;
        let costs = Costs { cfg: &cfg, bytes: 4 };
        let both = costs.encoder(1) + costs.decoder([1, 448], 0, 1, false);
        // rows looked up are counted beside the table, which the logits read
        let looked_up = 448 * 512;
        let zeros = (6 + 2 * 6) * 512;
        assert_eq!(both.weight_bytes / 4, 72_593_920 + looked_up + zeros);
        Ok(())
    }
}
