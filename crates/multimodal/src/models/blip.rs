//! BLIP: a vision transformer, and BERT layers with attention to its states that read or write text.
//! Source: BLIP (arXiv:2201.12086). Mirrors `transformers.BlipForConditionalGeneration`, `BlipForQuestionAnswering` and
//! `BlipForImageTextRetrieval`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, AttentionRows, Cost, Norm, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Pattern;
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{CrossAttentionHalf, FeedForwardHalf, SelfAttentionHalf};
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_text::causal::{DecoderShape, Pass};
use roofbench_text::models::bert_layer::BertLayerConfig;
use roofbench_text::seq2seq::{self, CrossDecoder};
use serde::Deserialize;
use serde_json::json;

use super::vision_tower::{Form, Pixels, VisionTower, VisionTowerConfig};
use super::{behind, forward_phase, named, products, products_cost, unit_rows, unit_rows_cost};

/// The classes that run.
pub const CLASSES: &[&str] = &["BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval"];

/// From names in published checkpoints to those of the classes.
pub(crate) const ALIASES: &[AliasRule] = &[
    // stored a second time
    AliasRule::rename(
        r"^text_decoder\.cls\.predictions\.decoder\.bias$",
        "text_decoder.cls.predictions.bias",
        AliasScope::Always,
    ),
    AliasRule::rename(
        r"^text_decoder\.cls\.predictions\.decoder\.weight$",
        "text_decoder.bert.embeddings.word_embeddings.weight",
        AliasScope::Always,
    ),
    // integer buffers of the text models in older files
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
];

/// The part of the text models' config that shapes the computation; field names are the file's own, and what it leaves
/// out is as `transformers.BlipTextConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct BlipTextConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward half and of the head.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// First token of the decoder.
    pub bos_token_id: i64,
    /// What follows a sequence that ended.
    pub pad_token_id: i64,
    /// What ends a sequence of the decoder.
    pub sep_token_id: i64,
}

impl Default for BlipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30524,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30522,
            pad_token_id: 0,
            sep_token_id: 102,
        }
    }
}

impl BlipTextConfig {
    /// Reads and checks the config of the text models, which is all of `spec`.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("intermediate_size", cfg.intermediate_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("max_position_embeddings", cfg.max_position_embeddings),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        if usize::try_from(cfg.bos_token_id).map_or(true, |token| token >= cfg.vocab_size) {
            let reason = format!("{} is not in 0..{}", cfg.bos_token_id, cfg.vocab_size);
            return Err(config::invalid("bos_token_id", reason));
        }
        config::refuse_unless(spec, "is_decoder", &[true.into()])?;
        config::refuse_unless(spec, "tie_word_embeddings", &[true.into()])?;
        Ok(cfg)
    }

    fn layer(&self) -> BertLayerConfig {
        BertLayerConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }

    fn norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.hidden_size, self.layer_norm_eps, vb.pp("LayerNorm"))
    }

    fn norm_cost(&self, rows: u64, bytes: u64) -> Cost {
        cost::norm(Norm::Layer, rows, self.hidden_size as u64, bytes)
    }

    /// FLOPs and bytes of the layers over (batch, seq) rows behind `cached` others, `causal` in the decoder; `states` is
    /// how many states an item they look at and how wide these are.
    fn cost(&self, [batch, seq, cached]: [u64; 3], causal: bool, states: Option<[u64; 2]>, bytes: u64) -> Cost {
        let (tokens, hidden, layer) = (batch * seq, self.hidden_size as u64, self.layer().cost(bytes));
        let rows = if causal { AttentionRows::causal(batch, seq, cached) } else { AttentionRows::full(batch, seq) };
        let cross = |states| layer.cross_attention([batch, seq], states, cached == 0);
        cost::embedding(tokens, hidden, bytes) * 2 // words and positions
            + cost::elementwise(tokens * hidden, 1) // their sum
            + self.norm_cost(tokens, bytes)
            + (layer.encoder(rows) + states.map_or(Cost::default(), cross))
                * self.num_hidden_layers as u64
    }
}

/// The parts of config.json.
#[derive(Debug, Clone)]
pub struct BlipConfig {
    /// Of the text models.
    pub text_config: BlipTextConfig,
    /// Of the vision tower.
    pub vision_config: VisionTowerConfig,
    /// Width in which `BlipForImageTextRetrieval` compares pictures and texts.
    pub image_text_hidden_size: usize,
}

impl BlipConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        #[derive(Deserialize)]
        struct Fields {
            #[serde(default = "width")]
            image_text_hidden_size: usize,
        }
        fn width() -> usize {
            256
        }
        let Fields { image_text_hidden_size } = spec.parse_config()?;
        config::sizes(&[("image_text_hidden_size", image_text_hidden_size)])?;
        config::refuse_unless(spec, "tie_word_embeddings", &[true.into()])?;
        let text_config = config::nested(spec, "text_config", BlipTextConfig::from_spec)?;
        let vision = |spec: &ModelSpec| VisionTowerConfig::from_spec(spec, Form::Blip);
        let vision_config = config::nested(spec, "vision_config", vision)?;
        Ok(Self { text_config, vision_config, image_text_hidden_size })
    }

    fn vision_cost(&self, pixels: &Pixels, bytes: u64) -> Cost {
        let (vision, [pictures, states]) = (&self.vision_config, pixels.shape());
        vision.cost(pixels, vision.num_hidden_layers, None, bytes) + vision.norm_cost(pictures * states, bytes)
    }

    /// FLOPs and bytes of one pass of the decoder, which sees `states` states an item.
    fn decoder_cost(&self, pass: Pass, states: u64, bytes: u64) -> Cost {
        let (Pass { batch, seq, cached, logits }, text) = (pass, &self.text_config);
        let (rows, hidden, vocab) = (batch * logits, text.hidden_size as u64, text.vocab_size as u64);
        text.cost([batch, seq, cached], true, Some([states, self.vision_config.hidden_size as u64]), bytes)
            + cost::linear(rows, hidden, hidden, true, bytes)
            + cost::elementwise(rows * hidden, 1) // the activation
            + text.norm_cost(rows, bytes)
            + cost::linear(rows, hidden, vocab, true, bytes)
    }

    /// States of a picture, and their width.
    fn states(&self, pixels: &Pixels) -> [u64; 2] {
        [pixels.shape()[1], self.vision_config.hidden_size as u64]
    }
}

struct TextLayer {
    attention: SelfAttentionHalf,
    crossattention: CrossAttentionHalf,
    feed_forward: FeedForwardHalf,
}

impl TextLayer {
    /// `states` is the width of the states that it looks at.
    fn load(cfg: &BertLayerConfig, pattern: Pattern, states: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            attention: cfg.self_attention(pattern, "self", false, vb.pp("attention"))?,
            crossattention: cfg.cross_attention(states, "self", vb.pp("crossattention"))?,
            feed_forward: cfg.feed_forward(["intermediate", "output"], vb)?,
        })
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, i: usize, x: &Tensor, decoding: &mut Decoding, encoded: Option<&mut Encoded>) -> Result<Tensor> {
        let x = self.attention.step(i, x, decoding)?;
        let x = match encoded {
            Some(encoded) => self.crossattention.step(i, &x, encoded)?,
            None => x,
        };
        self.feed_forward.forward(&x)
    }
}

/// The text model: with attention to all tokens it reads, with attention to earlier ones it writes.
struct TextModel {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    layer_norm: LayerNorm,
    layers: Vec<TextLayer>,
}

impl TextModel {
    fn load(
        cfg: &BlipTextConfig,
        pattern: Pattern,
        states: usize,
        word_embeddings: Embedding,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (embeddings, positions) = (vb.pp("embeddings"), cfg.max_position_embeddings);
        let layer = |i: usize| TextLayer::load(&cfg.layer(), pattern, states, vb.pp("encoder.layer").pp(i));
        Ok(Self {
            word_embeddings,
            position_embeddings: Embedding::load(positions, cfg.hidden_size, embeddings.pp("position_embeddings"))?,
            layer_norm: cfg.norm(embeddings)?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// Embedded words (batch, seq, hidden) at the positions of `decoding` → (batch, seq, hidden).
    fn forward(&self, words: &Tensor, decoding: &mut Decoding, mut encoded: Option<&mut Encoded>) -> Result<Tensor> {
        roofbench_nn::cost::elementwise(words.elem_count(), 1);
        let x = words.broadcast_add(&self.position_embeddings.forward(&decoding.position_ids()?)?)?;
        let mut x = self.layer_norm.forward(&x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(i, &x, decoding, encoded.as_deref_mut())?;
        }
        Ok(x)
    }
}

/// `text_encoder`: reads a text, beside a picture or alone.
struct TextEncoder(TextModel);

impl TextEncoder {
    fn load(cfg: &BlipConfig, vb: VarBuilder) -> Result<Self> {
        let (text, states) = (&cfg.text_config, cfg.vision_config.hidden_size);
        let words = Embedding::load(text.vocab_size, text.hidden_size, vb.pp("embeddings.word_embeddings"))?;
        Ok(Self(TextModel::load(text, Pattern::Full, states, words, vb)?))
    }

    /// The states of a text (batch, seq, hidden), where there is one beside the states of a picture.
    fn forward(&self, text: &Text, image_embeds: Option<&Tensor>) -> Result<Tensor> {
        let (batch, seq) = text.input_ids.dims2()?;
        let mut decoding = Decoding::once(batch, seq, text.attention_mask.as_ref(), text.input_ids.device())?;
        let encoded = image_embeds.map(|states| Encoded::new(states.clone(), None, self.0.layers.len()));
        let words = self.0.word_embeddings.forward(&text.input_ids)?;
        self.0.forward(&words, &mut decoding, encoded.transpose()?.as_mut())
    }
}

/// `text_decoder`: writes a text beside the states of a picture, or of a question.
struct TextDecoder {
    cfg: BlipConfig,
    bert: TextModel,
    dense: Linear,
    layer_norm: LayerNorm,
    decoder: Linear,
    bytes: u64,
}

impl TextDecoder {
    fn load(cfg: &BlipConfig, vb: VarBuilder) -> Result<Self> {
        let (text, states, bert) = (&cfg.text_config, cfg.vision_config.hidden_size, vb.pp("bert"));
        let (hidden, head) = (text.hidden_size, vb.pp("cls.predictions"));
        let (words, output) = Embedding::load_tied(text.vocab_size, hidden, bert.pp("embeddings.word_embeddings"))?;
        Ok(Self {
            cfg: cfg.clone(),
            bert: TextModel::load(text, Pattern::Causal, states, words, bert)?,
            dense: Linear::load(hidden, hidden, true, head.pp("transform.dense"))?,
            layer_norm: text.norm(head.pp("transform"))?,
            decoder: output.with_bias(Some(&head.get(text.vocab_size, "bias")?))?,
            bytes: vb.dtype().size_in_bytes() as u64,
        })
    }
}

impl CrossDecoder for TextDecoder {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            vocab_size: self.cfg.text_config.vocab_size,
            layers: self.bert.layers.len(),
            kv_width: self.cfg.text_config.hidden_size,
            window: None,
            max_positions: Some(self.cfg.text_config.max_position_embeddings),
        }
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.bert.word_embeddings.forward(input_ids)
    }

    fn decode(&self, x: Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        self.bert.forward(&x, decoding, Some(encoded))
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.dense.forward_act(x, self.cfg.text_config.hidden_act)?;
        self.decoder.forward(&self.layer_norm.forward(&x)?)
    }

    fn cost(&self, pass: Pass, states: u64) -> Cost {
        self.cfg.decoder_cost(pass, states, self.bytes)
    }
}

/// The tokens of a call, checked.
pub(crate) struct Text {
    /// (batch, seq), i64.
    pub(crate) input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    pub(crate) attention_mask: Option<Tensor>,
}

impl Text {
    /// The tokens of argument `ids` and their mask `mask`, where the call has them.
    fn read(cfg: &BlipTextConfig, inputs: &Inputs, [ids, mask]: [&str; 2]) -> Result<Option<Self>, SessionError> {
        let Some(input_ids) = inputs.optional_matrix(ids)? else {
            return Ok(None);
        };
        in_range(ids, &input_ids, "vocab_size", cfg.vocab_size)?;
        let (seq, limit) = (input_ids.dim(1)?, cfg.max_position_embeddings);
        if seq > limit {
            let reason = format!("a sequence of {seq} is longer than max_position_embeddings = {limit}; truncate it");
            return Err(SessionError::input(ids, reason));
        }
        let attention_mask = inputs.matrix_as(mask, (ids, &input_ids))?;
        if let Some(values) = &attention_mask {
            zero_or_one(mask, values)?;
        }
        Ok(Some(Self { input_ids, attention_mask }))
    }

    fn required(cfg: &BlipTextConfig, inputs: &Inputs) -> Result<Self, SessionError> {
        let text = Self::read(cfg, inputs, ["input_ids", "attention_mask"])?;
        text.ok_or_else(|| SessionError::input("input_ids", "is missing"))
    }

    /// One text for each picture.
    fn beside(self, pixels: &Pixels) -> Result<Self, SessionError> {
        let ([texts, _], [pictures, _]) = (self.shape(), pixels.shape());
        if texts == pictures {
            return Ok(self);
        }
        let reason = format!("holds {texts} sequences, pixel_values {pictures} pictures; give one for each");
        Err(SessionError::input("input_ids", reason))
    }

    fn shape(&self) -> [u64; 2] {
        [0, 1].map(|axis| self.input_ids.dims()[axis] as u64)
    }
}

/// What a decoder begins with, and how it goes on.
pub(crate) struct Prompt {
    pub(crate) rows: Vec<Vec<i64>>,
    /// (batch, seq) of 0 and 1.
    pub(crate) attention_mask: Option<Tensor>,
    pub(crate) generation: Box<Generation>,
}

impl Prompt {
    /// The start token, or the prompt of the call with the start token in the place of its first, without its last, which
    /// is an end token.
    fn read(
        cfg: &BlipTextConfig,
        spec: &ModelSpec,
        call: &Call,
        inputs: &Inputs,
        pixels: &Pixels,
    ) -> Result<Self, SessionError> {
        let Some(text) = Text::read(cfg, inputs, ["input_ids", "attention_mask"])? else {
            if call.inputs.contains_key("attention_mask") {
                return Err(SessionError::input("attention_mask", "goes with input_ids, which are missing"));
            }
            return Self::start(cfg, spec, call, pixels);
        };
        let text = text.beside(pixels)?;
        let length = text.input_ids.dim(1)? - 1;
        if length == 0 {
            let reason = "holds one token, which is left out as the end of the prompt; give two, or leave it out";
            return Err(SessionError::input("input_ids", reason));
        }
        let mut rows = text.input_ids.narrow(1, 0, length)?.to_vec2::<i64>()?;
        rows.iter_mut().for_each(|row| row[0] = cfg.bos_token_id);
        let attention_mask = text.attention_mask.map(|mask| mask.narrow(1, 0, length)).transpose()?;
        Ok(Self { rows, attention_mask, generation: Box::new(generation(cfg, spec, call, length)?) })
    }

    /// The start token, for each picture.
    fn start(cfg: &BlipTextConfig, spec: &ModelSpec, call: &Call, pixels: &Pixels) -> Result<Self, SessionError> {
        let rows = vec![vec![cfg.bos_token_id]; pixels.shape()[0] as usize];
        Ok(Self { rows, attention_mask: None, generation: Box::new(generation(cfg, spec, call, 1)?) })
    }
}

const PICTURES: [&str; 1] = ["interpolate_pos_encoding"];

/// How `text_decoder` chooses tokens behind a prompt of `length`: it has no generation_config.json of its own, and the
/// class gives it the end token.
fn generation(cfg: &BlipTextConfig, spec: &ModelSpec, call: &Call, length: usize) -> Result<Generation, SessionError> {
    let tokens = json!({
        "bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.sep_token_id, "pad_token_id": cfg.pad_token_id,
    });
    let spec = ModelSpec { config: tokens, extra_configs: BTreeMap::new(), ..spec.clone() };
    Generation::read(&spec, call, length, &PICTURES)
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    match spec.class.as_str() {
        "BlipForConditionalGeneration" => Ok(Box::new(Captioner::load(spec, vb)?)),
        "BlipForQuestionAnswering" => Ok(Box::new(Answerer::load(spec, vb)?)),
        "BlipForImageTextRetrieval" => Ok(Box::new(Retriever::load(spec, vb)?)),
        _ => Err(config::unsupported_class(spec, CLASSES)),
    }
}

/// What every class has.
struct Base {
    cfg: BlipConfig,
    spec: ModelSpec,
    vision_model: VisionTower,
    bytes: u64,
}

impl Base {
    fn load(spec: &ModelSpec, vb: &VarBuilder) -> Result<Self, SessionError> {
        let cfg = BlipConfig::from_spec(spec)?;
        let vision_model = VisionTower::load(&cfg.vision_config, None, vb.pp("vision_model"))?;
        Ok(Self { cfg, spec: spec.clone(), vision_model, bytes: spec.dtype.size_in_bytes() as u64 })
    }

    /// The states of pictures: (batch, 1 + patches, hidden).
    fn see(&self, pixels: &Pixels) -> Result<Tensor> {
        self.vision_model.post_layernorm(&self.vision_model.forward(pixels)?)
    }

    fn pixels<'a>(&self, inputs: &Inputs<'a>) -> Result<Pixels<'a>, SessionError> {
        Pixels::read(&self.cfg.vision_config, inputs)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        isa::paths(&self.spec.device, self.spec.dtype)
    }
}

/// What `BlipForConditionalGeneration` is asked for.
pub(crate) enum Caption<'a> {
    /// Scores of every word behind each token of a text.
    Forward { pixels: Pixels<'a>, text: Text },
    /// Words behind a prompt.
    Generate { pixels: Pixels<'a>, prompt: Box<Prompt> },
}

impl<'a> Caption<'a> {
    pub(crate) fn read(cfg: &BlipConfig, spec: &ModelSpec, call: &'a Call) -> Result<Self, SessionError> {
        let known = ["pixel_values", "input_ids", "attention_mask"];
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &known, &PICTURES)?,
            "generate" => Inputs::of_any_method(call, &known)?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let pixels = Pixels::read(&cfg.vision_config, &inputs)?;
        if call.method == "forward" {
            let text = Text::required(&cfg.text_config, &inputs)?.beside(&pixels)?;
            return Ok(Self::Forward { pixels, text });
        }
        let prompt = Prompt::read(&cfg.text_config, spec, call, &inputs, &pixels)?;
        Ok(Self::Generate { pixels, prompt: Box::new(prompt) })
    }

    pub(crate) fn cost(&self, cfg: &BlipConfig, bytes: u64) -> Vec<PhaseCost> {
        let (Self::Forward { pixels, .. } | Self::Generate { pixels, .. }) = self;
        let [batch, states] = pixels.shape();
        let decoding = match self {
            Self::Forward { text, .. } => {
                let [_, seq] = text.shape();
                forward_phase(cfg.decoder_cost(Pass { batch, seq, cached: 0, logits: seq }, states, bytes))
            }
            Self::Generate { prompt, .. } => {
                let (length, new) = (prompt.rows[0].len() as u64, prompt.generation.max_new_tokens as u64);
                let pass = |pass| cfg.decoder_cost(pass, states, bytes);
                seq2seq::generate_cost(pass, Cost::default(), [batch, length], new)
            }
        };
        behind([(Phase::Vision, cfg.vision_cost(pixels, bytes))], decoding)
    }
}

/// `BlipForConditionalGeneration`: writes a caption beside a picture.
struct Captioner {
    base: Base,
    text_decoder: TextDecoder,
}

impl Captioner {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let base = Base::load(spec, &vb)?;
        let text_decoder = TextDecoder::load(&base.cfg, vb.pp("text_decoder"))?;
        Ok(Self { base, text_decoder })
    }
}

impl Session for Captioner {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let Self { base, text_decoder } = self;
        let layers = text_decoder.bert.layers.len();
        match Caption::read(&base.cfg, &base.spec, call)? {
            Caption::Forward { pixels, text } => {
                let image_embeds = base.see(&pixels)?; // (batch, 1 + patches, hidden)
                observer.end(Phase::Vision);
                let mut encoded = Encoded::new(image_embeds.clone(), None, layers)?;
                let mask = text.attention_mask.as_ref();
                let logits = seq2seq::forward(text_decoder, &text.input_ids, mask, &mut encoded)?;
                observer.end(Phase::Forward);
                Ok(named([
                    ("logits", logits),
                    ("last_hidden_state", image_embeds.clone()),
                    ("image_embeds", image_embeds),
                ]))
            }
            Caption::Generate { pixels, prompt } => {
                let encoded = Encoded::new(base.see(&pixels)?, None, layers)?;
                observer.end(Phase::Vision);
                let Prompt { rows, attention_mask, generation } = *prompt;
                let mask = attention_mask.as_ref();
                seq2seq::generate_masked(text_decoder, &base.spec, &generation, &rows, mask, encoded, observer)
            }
        }
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let Base { cfg, spec, bytes, .. } = &self.base;
        Ok(Caption::read(cfg, spec, call)?.cost(cfg, *bytes))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.base.paths()
    }
}

/// `BlipForQuestionAnswering`: reads a question beside a picture, and writes the answer beside the question's states.
struct Answerer {
    base: Base,
    text_encoder: TextEncoder,
    text_decoder: TextDecoder,
}

impl Answerer {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let base = Base::load(spec, &vb)?;
        let (picture, question) = (base.cfg.vision_config.hidden_size, base.cfg.text_config.hidden_size);
        if picture != question {
            // the class has one width for both
            let reason =
                format!("is {picture}, and {question} in text_config; the decoder looks at states of both widths");
            return Err(config::invalid("vision_config.hidden_size", reason));
        }
        let text_encoder = TextEncoder::load(&base.cfg, vb.pp("text_encoder"))?;
        let text_decoder = TextDecoder::load(&base.cfg, vb.pp("text_decoder"))?;
        Ok(Self { base, text_encoder, text_decoder })
    }

    /// Pictures, and a question for each.
    fn question<'a>(&self, inputs: &Inputs<'a>) -> Result<(Pixels<'a>, Text), SessionError> {
        let pixels = self.base.pixels(inputs)?;
        let text = Text::required(&self.base.cfg.text_config, inputs)?.beside(&pixels)?;
        Ok((pixels, text))
    }

    /// Without labels `forward` gives the states of pictures alone, though it wants a question and an answer.
    fn forward_inputs<'a>(&self, call: &'a Call) -> Result<Pixels<'a>, SessionError> {
        let answer = ["decoder_input_ids", "decoder_attention_mask"];
        let known = [&["input_ids", "pixel_values", "attention_mask"], &answer[..]].concat();
        let inputs = Inputs::forward(call, &known, &PICTURES)?;
        let (pixels, _) = self.question(&inputs)?;
        match Text::read(&self.base.cfg.text_config, &inputs, answer)? {
            Some(answer) => answer.beside(&pixels).map(|_| pixels),
            None => Err(SessionError::input("decoder_input_ids", "is missing; `generate` writes an answer")),
        }
    }

    fn generate_inputs<'a>(&self, call: &'a Call) -> Result<(Pixels<'a>, Text, Prompt), SessionError> {
        let inputs = Inputs::of_any_method(call, &["input_ids", "pixel_values", "attention_mask"])?;
        let (pixels, text) = self.question(&inputs)?;
        let prompt = Prompt::start(&self.base.cfg.text_config, &self.base.spec, call, &pixels)?;
        Ok((pixels, text, prompt))
    }
}

impl Session for Answerer {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        match call.method.as_str() {
            "forward" => {
                let image_embeds = self.base.see(&self.forward_inputs(call)?)?;
                observer.end(Phase::Vision);
                Ok(named([("last_hidden_state", image_embeds.clone()), ("image_embeds", image_embeds)]))
            }
            "generate" => {
                let (pixels, question, prompt) = self.generate_inputs(call)?;
                let image_embeds = self.base.see(&pixels)?;
                observer.end(Phase::Vision);
                let question = self.text_encoder.forward(&question, Some(&image_embeds))?;
                observer.end(Phase::Text);
                // padding of the question is seen as well, as in the library
                let encoded = Encoded::new(question, None, self.text_decoder.bert.layers.len())?;
                let Prompt { rows, generation, .. } = &prompt;
                seq2seq::generate(&self.text_decoder, &self.base.spec, generation, rows, encoded, observer)
            }
            _ => Err(unsupported_method(call, "forward, generate")),
        }
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let Base { cfg, bytes, .. } = &self.base;
        match call.method.as_str() {
            "forward" => {
                Ok(behind([(Phase::Vision, cfg.vision_cost(&self.forward_inputs(call)?, *bytes))], Vec::new()))
            }
            "generate" => {
                let (pixels, question, prompt) = self.generate_inputs(call)?;
                let [batch, seq] = question.shape();
                let reading = cfg.text_config.cost([batch, seq, 0], false, Some(cfg.states(&pixels)), *bytes);
                let pass = |pass| self.text_decoder.cost(pass, seq);
                let new = prompt.generation.max_new_tokens as u64;
                let before = [(Phase::Vision, cfg.vision_cost(&pixels, *bytes)), (Phase::Text, reading)];
                Ok(behind(before, seq2seq::generate_cost(pass, Cost::default(), [batch, 1], new)))
            }
            _ => Err(unsupported_method(call, "forward, generate")),
        }
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.base.paths()
    }
}

/// `BlipForImageTextRetrieval`: says whether a text is of a picture, or how near each text is to each picture.
struct Retriever {
    base: Base,
    text_encoder: TextEncoder,
    vision_proj: Linear,
    text_proj: Linear,
    itm_head: Linear,
}

/// The arguments of [`Retriever`].
struct Pair<'a> {
    pixels: Pixels<'a>,
    text: Text,
    /// The text is read beside the picture.
    matched: bool,
}

/// "No" and "yes".
const MATCHES: usize = 2;

impl Retriever {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let base = Base::load(spec, &vb)?;
        let (text, vision) = (base.cfg.text_config.hidden_size, base.cfg.vision_config.hidden_size);
        let (shared, text_encoder) =
            (base.cfg.image_text_hidden_size, TextEncoder::load(&base.cfg, vb.pp("text_encoder"))?);
        Ok(Self {
            base,
            text_encoder,
            vision_proj: Linear::load(vision, shared, true, vb.pp("vision_proj"))?,
            text_proj: Linear::load(text, shared, true, vb.pp("text_proj"))?,
            itm_head: Linear::load(text, MATCHES, true, vb.pp("itm_head"))?,
        })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Pair<'a>, SessionError> {
        let plain = ["use_itm_head", PICTURES[0]];
        let inputs = Inputs::forward(call, &["input_ids", "pixel_values", "attention_mask"], &plain)?;
        let pixels = self.base.pixels(&inputs)?;
        let text = Text::required(&self.base.cfg.text_config, &inputs)?;
        let matched = !call.arguments.contains_key("use_itm_head") || inputs.flag("use_itm_head")?;
        let text = if matched { text.beside(&pixels)? } else { text };
        Ok(Pair { pixels, text, matched })
    }

    fn forward(&self, pair: &Pair, observer: &mut dyn Observer) -> Result<Tensors> {
        let first = |x: &Tensor| x.narrow(1, 0, 1)?.squeeze(1)?.contiguous(); // (batch, hidden)
        let image_embeds = self.base.see(&pair.pixels)?;
        observer.end(Phase::Vision);
        let question_embeds = self.text_encoder.forward(&pair.text, pair.matched.then_some(&image_embeds))?;
        observer.end(Phase::Text);
        let itm_score = match pair.matched {
            true => self.itm_head.forward(&first(&question_embeds)?)?, // (batch, 2)
            false => {
                let image = unit_rows(&self.vision_proj.forward(&first(&image_embeds)?)?)?;
                let text = unit_rows(&self.text_proj.forward(&first(&question_embeds)?)?)?;
                products(&image, &text, 1.0)? // (pictures, texts)
            }
        };
        Ok(named([("itm_score", itm_score), ("last_hidden_state", image_embeds), ("question_embeds", question_embeds)]))
    }
}

impl Session for Retriever {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&self.read(call)?, observer)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (Base { cfg, bytes, .. }, pair) = (&self.base, self.read(call)?);
        let ([texts, seq], [pictures, _]) = (pair.text.shape(), pair.pixels.shape());
        let layer =
            |rows, layer: &Linear| cost::linear(rows, layer.in_dim() as u64, layer.out_dim() as u64, true, *bytes);
        let states = pair.matched.then(|| cfg.states(&pair.pixels));
        let shared = cfg.image_text_hidden_size as u64;
        let head = match pair.matched {
            true => layer(texts, &self.itm_head),
            false => {
                layer(pictures, &self.vision_proj)
                    + layer(texts, &self.text_proj)
                    + unit_rows_cost(pictures + texts, shared)
                    + products_cost([pictures, texts], shared, *bytes)
            }
        };
        let reading = cfg.text_config.cost([texts, seq, 0], false, states, *bytes);
        let before = [(Phase::Vision, cfg.vision_cost(&pair.pixels, *bytes)), (Phase::Text, reading)];
        Ok(behind(before, forward_phase(head)))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.base.paths()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::Value;

    use super::*;

    fn spec(class: &str, changes: &[(&str, &str, Value)]) -> ModelSpec {
        let mut config = json!({
            "image_text_hidden_size": 3,
            "text_config": {
                "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
                "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 8, "sep_token_id": 9,
            },
            "vision_config": {
                "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 4, "patch_size": 2,
            },
        });
        for (at, field, value) in changes {
            config[*at][*field] = value.clone();
        }
        ModelSpec::new("blip", class, config)
    }

    fn model(spec: &ModelSpec) -> Result<Box<dyn Session>, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::default())?;
        load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn call(method: &str, ids: Option<&[[i64; 3]]>, arguments: Value) -> Call {
        let pixel_values = Tensor::ones((2, 3, 4, 4), DType::F32, &Device::Cpu).expect("pixels");
        let mut inputs = Tensors::from([("pixel_values".to_owned(), pixel_values)]);
        if let Some(ids) = ids {
            inputs.insert(
                "input_ids".to_owned(),
                Tensor::from_slice(ids.as_flattened(), (ids.len(), 3), &Device::Cpu).expect("ids"),
            );
        }
        Call { method: method.into(), inputs, arguments: arguments.as_object().cloned().unwrap_or_default() }
    }

    #[test]
    fn cost_of_a_tiny_caption_by_hand() -> Result<(), SessionError> {
        // 2 pictures of 4 patches and the class token, one layer; all 4 wide, 6 inside, 2 heads of 2
        let sum = |rows: u64| rows * 4;
        let linear = |rows: u64, from: u64, to: u64| 2 * rows * from * to + rows * to;
        let attention = |pairs: u64| 2 * pairs * (4 * 2 + 5); // 2 heads: two products over 2 and softmax
        let half = |rows, from| linear(rows, from, 4) + sum(rows) + 7 * sum(rows); // product, residual, norm
        let inner = |rows| linear(rows, 4, 6) + rows * 6;
        let vision = linear(4, 12, 4) + sum(4) // patches, positions
            + 7 * sum(5) + linear(5, 4, 12) + attention(25) + half(5, 4)
            + inner(5) + linear(5, 6, 4) + sum(5)
            + 7 * sum(10); // of both
        // a pass over `rows` rows a picture that see `pairs` tokens together, and the head of the last
        let pass = |rows: u64, pairs: u64| {
            sum(2 * rows) + 7 * sum(2 * rows) // positions, norm
                + linear(2 * rows, 4, 12) + attention(2 * pairs) + half(2 * rows, 4)
                + linear(2 * rows, 4, 4) + attention(2 * rows * 5) + half(2 * rows, 4)
                + inner(2 * rows) + half(2 * rows, 6)
                + linear(2, 4, 4) + sum(2) + 7 * sum(2) + linear(2, 4, 10)
        };
        let made = 2 * linear(10, 4, 4); // keys and values of the pictures
        let mut model = model(&spec("BlipForConditionalGeneration", &[]))?;
        let call = call("generate", Some(&[[1, 2, 9]; 2]), json!({"max_new_tokens": 3, "min_new_tokens": 3}));
        let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
        let sequences = outputs?["sequences"].to_vec2::<i64>()?;
        assert!(sequences.iter().all(|row| row.len() == 5 && row[..2] == [8, 2]), "{sequences:?}");
        let cost = model.cost(&call)?;
        let flops: Vec<u64> = cost.iter().map(|phase| phase.cost.flops).collect();
        // the two pictures are the same, and seen once
        assert_eq!(flops, [vision, made + pass(2, 3), pass(1, 3) + pass(1, 4)]);
        assert_eq!(recorded.flops, flops.iter().sum::<u64>());
        Ok(())
    }

    #[test]
    fn cost_of_base_is_that_of_its_products() -> Result<(), SessionError> {
        // BLIP (arXiv:2201.12086) takes ViT-B/16, of which torchvision publishes 55.48 billion multiply-adds at 384 pixels;
        // a token of BERT-base with attention to the picture takes its 12 layers of 9 · 768² + 768 · 3072 · 2 weights
        let cfg = BlipConfig::from_spec(&ModelSpec { config: json!({}), ..spec("BlipForConditionalGeneration", &[]) })?;
        let pixel_values = Tensor::zeros((1, 3, 384, 384), DType::F32, &Device::Cpu)?;
        let inputs = [("pixel_values".to_owned(), pixel_values)];
        let call = Call { method: "forward".into(), inputs: inputs.into(), ..Call::default() };
        let pixels = Pixels::read(&cfg.vision_config, &Inputs::forward(&call, &["pixel_values"], &[])?)?;
        let vision = cfg.vision_cost(&pixels, 4).flops as f64 / 2.0;
        assert!((1.0..1.02).contains(&(vision / 55.48e9)), "{vision:e}");
        let token = cfg.decoder_cost(Pass { batch: 1, seq: 1, cached: 16, logits: 1 }, 577, 4).flops as f64 / 2.0;
        let (width, layers) = (768.0 * 768.0, 12.0);
        let products = layers * (6.0 * width + 8.0 * width + 2.0 * (577.0 + 17.0) * 768.0) + width + 768.0 * 30524.0;
        assert!((1.0..1.03).contains(&(token / products)), "{token:e} {products:e}");
        Ok(())
    }

    #[test]
    fn configs_that_would_give_another_result_are_refused_by_name() {
        let message = |at: &str, field: &str, value: Value| {
            let spec = spec("BlipForConditionalGeneration", &[(at, field, value)]);
            BlipConfig::from_spec(&spec).err().map(|e| e.to_string()).unwrap_or_default()
        };
        for (at, field, value, start) in [
            ("text_config", "is_decoder", json!(false), "`text_config.is_decoder` = false is not supported"),
            ("text_config", "tie_word_embeddings", json!(false), "`text_config.tie_word_embeddings` = false is not"),
            ("text_config", "bos_token_id", json!(10), "`text_config.bos_token_id`: 10 is not in 0..10"),
            ("text_config", "hidden_size", json!(5), "`text_config.hidden_size`: 5 is not a multiple"),
            ("vision_config", "num_channels", json!(1), "`vision_config.num_channels` = 1 is not supported"),
            ("vision_config", "image_size", json!("x"), "`vision_config.image_size`: invalid type"),
        ] {
            let found = message(at, field, value);
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        let widths = spec("BlipForQuestionAnswering", &[("vision_config", "hidden_size", json!(8))]);
        let error = model(&widths).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("`vision_config.hidden_size`: is 8, and 4 in text_config"), "{error}");
    }

    #[test]
    fn prompts_that_do_not_fit_are_refused() -> Result<(), SessionError> {
        let mut captioner = model(&spec("BlipForConditionalGeneration", &[]))?;
        let mut message = |call: &Call| {
            let found = captioner.call(call, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
            assert_eq!(captioner.cost(call).err().map(|e| e.to_string()).unwrap_or_default(), found);
            found
        };
        let new = json!({"max_new_tokens": 2});
        assert_eq!(message(&call("generate", None, new.clone())), "");
        assert!(
            message(&call("generate", Some(&[[1, 2, 9]]), new.clone())).contains("holds 1 sequences, pixel_values 2")
        );
        assert!(message(&call("forward", None, json!({}))).contains("`input_ids`: is missing"));
        assert!(message(&call("generate", Some(&[[1, 2, 10]; 2]), new.clone())).contains("vocab_size = 10"));
        let mut short = call("generate", Some(&[[1, 2, 9]; 2]), new.clone());
        short.inputs.insert("input_ids".into(), Tensor::new(&[[1i64], [1]], &Device::Cpu)?);
        assert!(message(&short).contains("holds one token"));
        let mut mask = call("generate", None, new);
        mask.inputs.insert("attention_mask".into(), Tensor::new(&[[1i64], [1]], &Device::Cpu)?);
        assert!(message(&mask).contains("goes with input_ids"));
        assert!(message(&call("score", None, json!({}))).contains("supported: forward, generate"));
        let mut answerer = model(&spec("BlipForQuestionAnswering", &[]))?;
        let asked = call("forward", Some(&[[1, 2, 9]; 2]), json!({}));
        let error = answerer.call(&asked, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("`decoder_input_ids`: is missing"), "{error}");
        Ok(())
    }

    #[test]
    fn padding_of_a_prompt_changes_nothing_on_either_side() -> Result<(), SessionError> {
        let mut captioner = model(&spec("BlipForConditionalGeneration", &[]))?;
        let arguments = json!({"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": true});
        let mut generate = |ids: &[i64], mask: &[i64]| {
            let mut call = call("generate", None, arguments.clone());
            for (name, row) in [("input_ids", ids), ("attention_mask", mask)] {
                let rows = Tensor::from_slice(&[row, row].concat(), (2, row.len()), &Device::Cpu)?;
                call.inputs.insert(name.into(), rows);
            }
            let logits = captioner.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            Ok::<_, SessionError>(logits)
        };
        // the class leaves the last column out
        let plain = generate(&[8, 3, 5, 9], &[1, 1, 1, 1])?;
        let right = generate(&[8, 3, 5, 0, 9], &[1, 1, 1, 0, 0])?;
        let left = generate(&[0, 8, 3, 5, 9], &[0, 1, 1, 1, 1])?;
        for padded in [right, left] {
            let error = (padded - &plain)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // logits of order 1, summed in another order
            assert!(error < 1e-5, "{error}");
        }
        Ok(())
    }

    #[test]
    fn retrieval_compares_every_text_with_every_picture() -> Result<(), SessionError> {
        let mut retriever = model(&spec("BlipForImageTextRetrieval", &[]))?;
        let cosine = call("forward", Some(&[[8, 1, 9]; 3]), json!({"use_itm_head": false}));
        let (outputs, recorded) = roofbench_nn::cost::record(|| retriever.call(&cosine, &mut Unobserved));
        assert_eq!(outputs?["itm_score"].dims(), [2, 3]);
        assert_eq!(retriever.cost(&cosine)?.iter().map(|phase| phase.cost.flops).sum::<u64>(), recorded.flops);
        let matched = call("forward", Some(&[[8, 1, 9]; 2]), json!({}));
        assert_eq!(retriever.call(&matched, &mut Unobserved)?["itm_score"].dims(), [2, 2]);
        let uneven = Call { arguments: Default::default(), ..cosine };
        let error = retriever.call(&uneven, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("holds 3 sequences, pixel_values 2 pictures"), "{error}");
        Ok(())
    }
}
