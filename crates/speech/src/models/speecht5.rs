//! SpeechT5: an encoder with relative positions and a decoder, with parts before and behind them for text or for sound.
//! Source: SpeechT5 (arXiv:2110.07205). Mirrors `transformers.SpeechT5ForTextToSpeech` and `SpeechT5ForSpeechToText`; its
//! vocoder is in `hifigan`, and runs behind `generate_speech` where the call has the argument `vocoder`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::catalog;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, in_range, unsupported_method, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope, HubOptions, Source, Weights, synthetic};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Mask;
use roofbench_nn::conv::{BatchNorm, Conv1d, Conv1dConfig};
use roofbench_nn::cross_attention::Encoded;
use roofbench_nn::decoding::Decoding;
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::activation_dtype;
use super::features::{FeatureConfig, FeatureEncoder, FeatureProjection, PositionalConv, TORCH_EPS};
use super::hifigan::HifiGan;
use super::seq2seq::{DecoderLayers, EncoderLayer, LayerConfig, Pass, generate, last_rows, phases};
use super::wav2vec2::masks_frames;

const TO_SPEECH: &str = "SpeechT5ForTextToSpeech";
const TO_TEXT: &str = "SpeechT5ForSpeechToText";
const VOCODER: &str = "SpeechT5HifiGan";

/// The classes that run.
pub const CLASSES: &[&str] = &[TO_SPEECH, TO_TEXT, VOCODER];

const RULES: &[AliasRule] = &[
    // the first is for configs that mask nothing in training
    AliasRule::drop(r"\.masked_spec_embed$", AliasScope::Always),
    // weight norm as torch named it until 2.0
    AliasRule::rename(
        r"\.pos_conv_embed\.conv\.weight_g$",
        ".pos_conv_embed.conv.parametrizations.weight.original0",
        AliasScope::Always,
    ),
    AliasRule::rename(
        r"\.pos_conv_embed\.conv\.weight_v$",
        ".pos_conv_embed.conv.parametrizations.weight.original1",
        AliasScope::Always,
    ),
    // tied
    AliasRule::rename(
        r"^text_decoder_postnet\.lm_head\.weight$",
        "speecht5.decoder.prenet.embed_tokens.weight",
        AliasScope::Always,
    ),
    // sinusoids, and counters of training
    AliasRule::drop(r"\.encode_positions\.pe$", AliasScope::Always),
    AliasRule::drop(r"\.(pos_sinusoidal_embed|embed_positions)\.weights$", AliasScope::Always),
    AliasRule::drop(r"\.num_batches_tracked$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    if masks_frames(spec) { &RULES[1..] } else { RULES }
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault.
pub fn load(spec: &ModelSpec, weights: &Weights, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    match spec.class.as_str() {
        TO_SPEECH => Ok(Box::new(TextToSpeech { vocoder: vocoder(spec, weights)?, ..TextToSpeech::load(spec, vb)? })),
        TO_TEXT => Ok(Box::new(SpeechToText::load(spec, vb)?)),
        VOCODER => Ok(Box::new(HifiGan::load(spec, vb)?)),
        _ => Err(config::unsupported_class(spec, CLASSES)),
    }
}

/// Weights of the vocoder that goes with `weights`, and its config: of the same seed where these are synthetic and `spec`
/// has a `vocoder_config.json`, else those in the folder `vocoder` beside them, else the catalog's from the Hub's cache.
///
/// # Errors
/// Names the file that is damaged.
pub(crate) fn vocoder_weights(spec: &ModelSpec, weights: &Weights) -> Result<Option<(Weights, Value)>, SessionError> {
    if let Some(made) = weights.beside("vocoder", RULES, VOCODER)? {
        let config = match made.file("config.json") {
            Some(_) => Some(made.config()?),
            None => spec.extra_configs.get("vocoder_config.json").cloned(),
        };
        return Ok(config.map(|config| (made, config)));
    }
    let repository = catalog::family(&spec.family).ok().and_then(|family| family.vocoder.clone());
    let Some(repository) = repository else { return Ok(None) };
    let hub = HubOptions { offline: true, ..HubOptions::from_env() };
    match Weights::open(&Source::Hub { repository, revision: None }, RULES, VOCODER, &hub) {
        Ok(cached) => {
            let config = cached.config()?;
            Ok(Some((cached, config)))
        }
        // it is not there, and only a call that asks for it needs it
        Err(_) => Ok(None),
    }
}

fn vocoder(spec: &ModelSpec, weights: &Weights) -> Result<Option<HifiGan>, SessionError> {
    let Some((weights, config)) = vocoder_weights(spec, weights)? else { return Ok(None) };
    let spec = ModelSpec { class: VOCODER.to_owned(), config, ..spec.clone() };
    let vocoder = HifiGan::load(&spec, weights.var_builder(spec.dtype, &spec.device))?;
    weights.check_complete(false)?;
    Ok(Some(vocoder))
}

/// The part of `config.json` that shapes the computation, without [`FeatureConfig`]; field names are the file's own, and
/// what it leaves out is as `transformers.SpeechT5Config` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SpeechT5Config {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Its heads; they divide `hidden_size`.
    pub encoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub encoder_ffn_dim: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Its heads; they divide `hidden_size`.
    pub decoder_attention_heads: usize,
    /// Width inside its feed-forward half.
    pub decoder_ffn_dim: usize,
    /// Activation of the feed-forward halves.
    pub hidden_act: Activation,
    /// Added to the variance in the norms of both halves.
    pub layer_norm_eps: f64,
    /// The embeddings of the decoder's tokens are multiplied by √hidden_size.
    pub scale_embedding: bool,
    /// The token that is no token.
    pub pad_token_id: i64,
    /// Bins of a spectrum.
    pub num_mel_bins: usize,
    /// Linear layers before the decoder of speech.
    pub speech_decoder_prenet_layers: usize,
    /// Their width.
    pub speech_decoder_prenet_units: usize,
    /// Of the values behind each of them this part is kept, also at inference; 0 keeps all.
    pub speech_decoder_prenet_dropout: f64,
    /// Width of what a voice is given by.
    pub speaker_embedding_dim: usize,
    /// Convolutions behind the decoder of speech.
    pub speech_decoder_postnet_layers: usize,
    /// Their channels.
    pub speech_decoder_postnet_units: usize,
    /// Their taps.
    pub speech_decoder_postnet_kernel: usize,
    /// Spectra that a step makes.
    pub reduction_factor: usize,
    /// The most steps of speech.
    pub max_speech_positions: usize,
    /// The most tokens of a text that is spoken.
    pub max_text_positions: usize,
    /// Distances from this on count as it.
    pub encoder_max_relative_position: usize,
}

impl Default for SpeechT5Config {
    fn default() -> Self {
        Self {
            vocab_size: 81,
            hidden_size: 768,
            encoder_layers: 12,
            encoder_attention_heads: 12,
            encoder_ffn_dim: 3072,
            decoder_layers: 6,
            decoder_attention_heads: 12,
            decoder_ffn_dim: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-5,
            scale_embedding: false,
            pad_token_id: 1,
            num_mel_bins: 80,
            speech_decoder_prenet_layers: 2,
            speech_decoder_prenet_units: 256,
            speech_decoder_prenet_dropout: 0.5,
            speaker_embedding_dim: 512,
            speech_decoder_postnet_layers: 5,
            speech_decoder_postnet_units: 256,
            speech_decoder_postnet_kernel: 5,
            reduction_factor: 2,
            max_speech_positions: 4000,
            max_text_positions: 450,
            encoder_max_relative_position: 160,
        }
    }
}

impl SpeechT5Config {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("encoder_layers", cfg.encoder_layers),
            ("encoder_attention_heads", cfg.encoder_attention_heads),
            ("encoder_ffn_dim", cfg.encoder_ffn_dim),
            ("decoder_layers", cfg.decoder_layers),
            ("decoder_attention_heads", cfg.decoder_attention_heads),
            ("decoder_ffn_dim", cfg.decoder_ffn_dim),
            ("num_mel_bins", cfg.num_mel_bins),
            ("speech_decoder_prenet_layers", cfg.speech_decoder_prenet_layers),
            ("speech_decoder_prenet_units", cfg.speech_decoder_prenet_units),
            ("speaker_embedding_dim", cfg.speaker_embedding_dim),
            ("speech_decoder_postnet_layers", cfg.speech_decoder_postnet_layers),
            ("speech_decoder_postnet_units", cfg.speech_decoder_postnet_units),
            ("speech_decoder_postnet_kernel", cfg.speech_decoder_postnet_kernel),
            ("reduction_factor", cfg.reduction_factor),
            ("max_speech_positions", cfg.max_speech_positions),
            ("max_text_positions", cfg.max_text_positions),
            ("encoder_max_relative_position", cfg.encoder_max_relative_position),
        ])?;
        let hidden = ("hidden_size", cfg.hidden_size);
        config::multiple(hidden, ("encoder_attention_heads", cfg.encoder_attention_heads))?;
        config::multiple(hidden, ("decoder_attention_heads", cfg.decoder_attention_heads))?;
        if cfg.hidden_size % 2 == 1 {
            return Err(config::invalid(
                "hidden_size",
                format!("{} is odd: sines and cosines are pairs", cfg.hidden_size),
            ));
        }
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        if !(0.0..1.0).contains(&cfg.speech_decoder_prenet_dropout) {
            let reason = format!("{} is not in 0..1", cfg.speech_decoder_prenet_dropout);
            return Err(config::invalid("speech_decoder_prenet_dropout", reason));
        }
        if cfg.speech_decoder_postnet_kernel.is_multiple_of(2) {
            let reason = format!("{} is even, which would shorten the spectra", cfg.speech_decoder_postnet_kernel);
            return Err(config::invalid("speech_decoder_postnet_kernel", reason));
        }
        if !(0..=1 << 20).contains(&cfg.pad_token_id) {
            return Err(config::invalid("pad_token_id", format!("{} is no token", cfg.pad_token_id)));
        }
        config::refuse_unless(spec, "tie_word_embeddings", &[true.into()])?;
        Ok(cfg)
    }

    fn half(&self, layers: usize, heads: usize, inner: usize) -> LayerConfig {
        LayerConfig {
            layers,
            hidden: self.hidden_size,
            heads,
            inner,
            activation: self.hidden_act,
            eps: self.layer_norm_eps,
            pre_norm: false,
            key_bias: true,
            dense: ["feed_forward.intermediate_dense", "feed_forward.output_dense"],
        }
    }

    fn encoder(&self) -> LayerConfig {
        self.half(self.encoder_layers, self.encoder_attention_heads, self.encoder_ffn_dim)
    }

    fn decoder(&self) -> LayerConfig {
        self.half(self.decoder_layers, self.decoder_attention_heads, self.decoder_ffn_dim)
    }

    /// Widths in and out of the linear layers before the decoder of speech.
    fn prenet(&self) -> impl Iterator<Item = [usize; 2]> {
        let units = self.speech_decoder_prenet_units;
        (0..self.speech_decoder_prenet_layers)
            .map(move |layer| [if layer == 0 { self.num_mel_bins } else { units }, units])
    }

    /// Channels in and out of the convolutions behind it.
    fn postnet(&self) -> impl Iterator<Item = [usize; 2]> {
        let (bins, units, layers) =
            (self.num_mel_bins, self.speech_decoder_postnet_units, self.speech_decoder_postnet_layers);
        (0..layers)
            .map(move |layer| [if layer == 0 { bins } else { units }, if layer + 1 == layers { bins } else { units }])
    }

    /// Distances that queries and keys of a sequence have to each other, as far as they are told apart: the first is that
    /// of the first query to the last key.
    fn distances(&self, seq: usize) -> std::ops::RangeInclusive<i64> {
        let (reach, last) = (self.encoder_max_relative_position as i64, seq as i64 - 1);
        (-last).max(-reach)..=last.min(reach - 1)
    }
}

/// `x` (batch, seq, hidden) with `rows` (1, seq, hidden) added to every item.
fn add_rows(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    roofbench_nn::cost::elementwise(x.elem_count(), 1);
    if x.dims() == rows.dims() { x + rows } else { x.broadcast_add(rows) }
}

/// Scores of distances: what a query and the vector of its distance to a key have in common (arXiv:1803.02155).
struct RelativePositions {
    /// (distances, head_dim), scaled as queries are.
    pe_k: Tensor,
    heads: usize,
}

impl RelativePositions {
    fn load(cfg: &SpeechT5Config, vb: VarBuilder) -> Result<Self> {
        let head_dim = cfg.hidden_size / cfg.encoder_attention_heads;
        let pe_k = vb.pp("pe_k").get((2 * cfg.encoder_max_relative_position, head_dim), "weight")?;
        Ok(Self { pe_k: (pe_k * (head_dim as f64).powf(-0.5))?, heads: cfg.encoder_attention_heads })
    }

    /// The vectors of the distances that a sequence of `seq` has.
    fn within(&self, cfg: &SpeechT5Config, seq: usize) -> Result<Distances> {
        let range = cfg.distances(seq);
        let (first, count) = (*range.start(), (range.end() - range.start() + 1) as usize);
        let from = (first + cfg.encoder_max_relative_position as i64) as usize;
        let vectors = self.pe_k.narrow(0, from, count)?.contiguous()?;
        Ok(Distances { scores: Linear::new(&vectors, None)?, range, heads: self.heads })
    }
}

struct Distances {
    scores: Linear,
    range: std::ops::RangeInclusive<i64>,
    heads: usize,
}

impl Distances {
    /// Queries (batch, seq, heads · head_dim) -> (batch, heads, seq, seq)
    fn bias(&self, q: &Tensor) -> Result<Tensor> {
        let (batch, seq, _) = q.dims3()?;
        let by_distance = self.scores.forward(&q.reshape((batch, seq, self.heads, ()))?)?; // (batch, seq, heads, distances)
        let dtype = by_distance.dtype();
        let (rows, count) = (by_distance.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, self.scores.out_dim());
        let mut bias = Vec::with_capacity(batch * self.heads * seq * seq);
        for item in 0..batch {
            for head in 0..self.heads {
                for query in 0..seq {
                    let row = &rows[((item * seq + query) * self.heads + head) * count..][..count];
                    bias.extend((0..seq).map(|key| {
                        let distance = (query as i64 - key as i64).clamp(*self.range.start(), *self.range.end());
                        row[(distance - self.range.start()) as usize]
                    }));
                }
            }
        }
        Tensor::from_vec(bias, (batch, self.heads, seq, seq), q.device())?.to_dtype(dtype)
    }
}

/// What encoders of text and of sound share.
struct Encoder {
    layer_norm: LayerNorm,
    positions: RelativePositions,
    layers: Vec<EncoderLayer>,
}

impl Encoder {
    fn load(cfg: &SpeechT5Config, vb: VarBuilder) -> Result<Self> {
        let layers = cfg.encoder();
        let layer = |i: usize| EncoderLayer::load(&layers, ["attention", "layer_norm"], vb.pp("layers").pp(i));
        Ok(Self {
            layer_norm: layers.norm(vb.pp("layer_norm"))?,
            positions: RelativePositions::load(cfg, vb.pp("embed_positions"))?,
            layers: (0..layers.layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// `x` and the result are (batch, seq, hidden), the mask (batch, seq) of 0 and 1.
    fn forward(&self, cfg: &SpeechT5Config, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let distances = self.positions.within(cfg, x.dim(1)?)?;
        let padding = mask.map(Mask::padding).transpose()?.flatten().unwrap_or_default();
        let mut x = self.layer_norm.forward(x)?;
        for layer in &self.layers {
            x = layer.forward(&x, |q| padding.clone().with_bias(&distances.bias(q)?).map(Some))?;
        }
        Ok(x)
    }
}

/// Sines and cosines of positions in turn, as far as `rows` positions: (1, rows, hidden). `alpha` is their factor.
fn interleaved(rows: usize, hidden: usize, alpha: f32) -> Vec<f32> {
    // in the steps of f32 in which the library has them
    let speed = |at: usize| ((2 * (at / 2)) as f32 * (-(10_000f64.ln()) / hidden as f64) as f32).exp();
    let speeds: Vec<f32> = (0..hidden).map(speed).collect();
    let value = |row: usize, at: usize| {
        let angle = row as f32 * speeds[at];
        alpha * if at.is_multiple_of(2) { angle.sin() } else { angle.cos() }
    };
    (0..rows).flat_map(|row| (0..hidden).map(move |at| (row, at))).map(|(row, at)| value(row, at)).collect()
}

/// Sines, and behind them cosines, of `rows` positions: (rows, hidden), that of `pad` all 0.
fn side_by_side(rows: usize, hidden: usize, pad: usize) -> Vec<f32> {
    let half = hidden / 2;
    let step = (10_000f64.ln() / (half as f64 - 1.0).max(1.0)) as f32;
    let speeds: Vec<f32> = (0..half).map(|at| (at as f32 * -step).exp()).collect();
    let mut values = Vec::with_capacity(rows * hidden);
    for row in 0..rows {
        let angles = speeds.iter().map(|speed| row as f32 * speed);
        values.extend(angles.clone().map(f32::sin).chain(angles.map(f32::cos)));
        if row == pad {
            values[row * hidden..].fill(0.0);
        }
    }
    values
}

/// Positions as [`interleaved`] has them, with a learned factor in them.
struct ScaledPositions(Tensor);

impl ScaledPositions {
    /// Reads `alpha`.
    fn load(cfg: &SpeechT5Config, most: usize, vb: VarBuilder) -> Result<Self> {
        let alpha = vb.get((), "alpha")?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        let rows =
            Tensor::from_vec(interleaved(most, cfg.hidden_size, alpha), (1, most, cfg.hidden_size), vb.device())?;
        Ok(Self(rows.to_dtype(activation_dtype(vb.dtype(), vb.device()))?))
    }

    /// `x` (batch, seq, hidden) at the positions from `first` on.
    fn add(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        add_rows(x, &self.0.narrow(1, first, x.dim(1)?)?)
    }
}

/// Positions as [`side_by_side`] has them, which count what exists and have no end.
struct CountedPositions {
    /// (rows, hidden)
    table: Tensor,
    pad: usize,
}

impl CountedPositions {
    fn new(cfg: &SpeechT5Config, most: usize, dtype: DType, device: &Device) -> Result<Self> {
        let pad = cfg.pad_token_id as usize;
        Ok(Self { table: Self::rows(most + 2 * pad + 3, cfg.hidden_size, pad, dtype, device)?, pad })
    }

    fn rows(rows: usize, hidden: usize, pad: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::from_vec(side_by_side(rows, hidden, pad), (rows, hidden), device)?
            .to_dtype(activation_dtype(dtype, device))
    }

    /// `x` (batch, seq, hidden) at positions behind `past` others; `exists` says of each whether it counts, and all do
    /// where it is absent.
    fn add(&self, x: &Tensor, past: usize, exists: Option<&[Vec<bool>]>) -> Result<Tensor> {
        let (batch, seq, hidden) = x.dims3()?;
        let needed = self.pad + 1 + past + seq;
        let longer;
        let table = match needed > self.table.dim(0)? {
            true => {
                longer = Self::rows(needed, hidden, self.pad, x.dtype(), x.device())?;
                &longer
            }
            false => &self.table,
        };
        let Some(exists) = exists.filter(|rows| rows.iter().flatten().any(|exists| !exists)) else {
            return add_rows(x, &table.narrow(0, self.pad + 1 + past, seq)?.unsqueeze(0)?);
        };
        let mut rows = Vec::with_capacity(batch * seq);
        for item in exists {
            let mut count = past;
            rows.extend(item.iter().map(|exists| {
                count += usize::from(*exists);
                (self.pad + if *exists { count } else { 0 }) as u32
            }));
        }
        let rows = Tensor::from_vec(rows, batch * seq, x.device())?;
        add_rows(x, &table.index_select(&rows, 0)?.reshape((batch, seq, hidden))?)
    }
}

/// A mask (batch, seq) of 0 and 1, checked.
fn mask_like(inputs: &Inputs, name: &str, like: (&str, &Tensor)) -> Result<Option<Tensor>, SessionError> {
    let mask = inputs.matrix_as(name, like)?;
    if let Some(mask) = &mask {
        zero_or_one(name, mask)?;
    }
    Ok(mask)
}

/// Numbers of the dropout before the decoder of speech, which the class has at inference too. They are our own and depend
/// on the seed, the layer and the position alone.
struct Dropout {
    kept: f64,
    seed: u64,
}

impl Dropout {
    /// `x` (batch, seq, units) at positions from `first` on; all items of a batch lose the same.
    fn apply(&self, x: Tensor, layer: usize, first: usize) -> Result<Tensor, SessionError> {
        if self.kept == 0.0 {
            return Ok(x);
        }
        let (_, seq, units) = x.dims3()?;
        let name = format!("speech_decoder_prenet.{layer}");
        let numbers = synthetic::uniform(&name, seq * units, self.seed, (first * units) as u64)?;
        let factor = (1.0 / (1.0 - self.kept)) as f32;
        let below = (2.0 * self.kept - 1.0) as f32; // numbers are in [-1, 1)
        let factors = numbers.into_iter().map(|number| if number < below { factor } else { 0.0 }).collect();
        let factors = Tensor::from_vec(factors, (1, seq, units), x.device())?.to_dtype(x.dtype())?;
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        Ok(x.broadcast_mul(&factors)?)
    }
}

/// From spectra and a voice to the decoder's stream.
struct SpeechPrenet {
    layers: Vec<Linear>,
    final_layer: Linear,
    positions: ScaledPositions,
    /// The parts of one layer for the stream and for the voice.
    stream: Linear,
    voice: Linear,
}

impl SpeechPrenet {
    fn load(cfg: &SpeechT5Config, vb: VarBuilder) -> Result<Self> {
        let (hidden, speaker) = (cfg.hidden_size, cfg.speaker_embedding_dim);
        let layer =
            |(i, [input, output]): (usize, [usize; 2])| Linear::load(input, output, true, vb.pp("layers").pp(i));
        let both = vb.pp("speaker_embeds_layer");
        let weight = both.get((hidden, speaker + hidden), "weight")?;
        let part = |from: usize, width: usize| weight.narrow(1, from, width)?.contiguous();
        Ok(Self {
            layers: cfg.prenet().enumerate().map(layer).collect::<Result<_>>()?,
            final_layer: Linear::load(cfg.speech_decoder_prenet_units, hidden, true, vb.pp("final_layer"))?,
            positions: ScaledPositions::load(cfg, cfg.max_speech_positions, vb.pp("encode_positions"))?,
            stream: Linear::new(&part(0, hidden)?, None)?,
            voice: Linear::new(&part(hidden, speaker)?, Some(&both.get(hidden, "bias")?))?,
        })
    }

    /// A voice's part of the stream: (batch, speaker) -> (batch, 1, hidden)
    fn voice(&self, speakers: &Tensor) -> Result<Tensor> {
        // square and sum, divide
        roofbench_nn::cost::elementwise(speakers.elem_count(), 3);
        let length = speakers.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
        self.voice.forward(&speakers.broadcast_div(&length)?)?.unsqueeze(1)
    }

    /// Spectra (batch, seq, bins) from position `first` on -> (batch, seq, hidden)
    fn forward(
        &self,
        spectra: &Tensor,
        first: usize,
        voice: Option<&Tensor>,
        dropout: &Dropout,
    ) -> Result<Tensor, SessionError> {
        let mut x = spectra.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = dropout.apply(layer.forward_act(&x, Activation::Relu)?, i, first)?;
        }
        let x = self.positions.add(&self.final_layer.forward(&x)?, first)?;
        let Some(voice) = voice else { return Ok(x) };
        let voice = voice.broadcast_as(x.shape())?.contiguous()?;
        Ok(Activation::Relu.forward(&self.stream.forward_add(&x, &voice)?)?)
    }
}

/// From the decoder's stream to spectra.
struct SpeechPostnet {
    feat_out: Linear,
    prob_out: Linear,
    layers: Vec<Conv1d>,
    bins: usize,
}

impl SpeechPostnet {
    fn load(cfg: &SpeechT5Config, vb: VarBuilder) -> Result<Self> {
        let kernel = cfg.speech_decoder_postnet_kernel;
        let config = Conv1dConfig { padding: (kernel / 2, kernel / 2), ..Conv1dConfig::new(kernel) };
        let layer = |(i, [input, output]): (usize, [usize; 2])| {
            let vb = vb.pp("layers").pp(i);
            let norm = BatchNorm::load(output, TORCH_EPS, vb.pp("batch_norm"))?;
            let (weight, bias) = norm.fold(&vb.pp("conv").get((output, input, kernel), "weight")?, None)?;
            Conv1d::new(&weight, Some(&bias), config)
        };
        let linear = |width: usize, name: &str| Linear::load(cfg.hidden_size, width, true, vb.pp(name));
        Ok(Self {
            feat_out: linear(cfg.num_mel_bins * cfg.reduction_factor, "feat_out")?,
            prob_out: linear(cfg.reduction_factor, "prob_out")?,
            layers: cfg.postnet().enumerate().map(layer).collect::<Result<_>>()?,
            bins: cfg.num_mel_bins,
        })
    }

    /// (batch, seq, hidden) -> (batch, frames, bins)
    fn spectra(&self, x: &Tensor) -> Result<Tensor> {
        self.feat_out.forward(x)?.reshape((x.dim(0)?, (), self.bins))
    }

    /// Spectra made better by the convolutions over them; both are (batch, frames, bins).
    fn refine(&self, spectra: &Tensor) -> Result<Tensor> {
        let mut x = spectra.clone();
        for (i, conv) in self.layers.iter().enumerate() {
            x = match i + 1 == self.layers.len() {
                true => conv.forward_add(&x, spectra, Activation::Identity)?,
                false => conv.forward_act(&x, Activation::Tanh)?,
            };
        }
        Ok(x)
    }
}

/// `SpeechT5ForTextToSpeech`.
pub struct TextToSpeech {
    cfg: SpeechT5Config,
    embed_tokens: Embedding,
    positions: ScaledPositions,
    encoder: Encoder,
    prenet: SpeechPrenet,
    decoder: DecoderLayers,
    postnet: SpeechPostnet,
    /// Makes sound of spectra, for calls with the argument `vocoder`.
    vocoder: Option<HifiGan>,
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// The tensors of a call of [`TextToSpeech`], checked.
struct Text {
    /// (batch, seq), i64
    ids: Tensor,
    /// (batch, seq) of 0 and 1
    mask: Option<Tensor>,
    /// (batch, speaker)
    speakers: Option<Tensor>,
    dropout: Dropout,
}

/// How long speech becomes, by its text.
#[derive(Debug, Clone, Copy)]
struct Length {
    /// The sum of a step's probabilities at which speech ends.
    threshold: f64,
    /// Steps.
    least: usize,
    /// Steps.
    most: usize,
}

impl Length {
    fn read(cfg: &SpeechT5Config, call: &Call, seq: usize) -> Result<Self, SessionError> {
        let number = |name: &str, default: f64| match call.arguments.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| *number >= 0.0)
                .ok_or_else(|| SessionError::input(name, format!("is {value}, expected a number of 0 or more"))),
        };
        let steps = |ratio: f64| (seq as f64 * ratio / cfg.reduction_factor as f64) as usize;
        let length = Self {
            threshold: number("threshold", 0.5)?,
            least: steps(number("minlenratio", 0.0)?),
            most: steps(number("maxlenratio", 20.0)?),
        };
        if length.steps() > cfg.max_speech_positions {
            let reason = format!(
                "comes to {} steps, the model has max_speech_positions = {}; pass a smaller one",
                length.steps(),
                cfg.max_speech_positions
            );
            let name = if length.least > length.most { "minlenratio" } else { "maxlenratio" };
            return Err(SessionError::input(name, reason));
        }
        Ok(length)
    }

    /// The most steps that are made.
    fn steps(&self) -> usize {
        self.most.max(self.least).max(1)
    }
}

impl TextToSpeech {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (cfg, model) = (SpeechT5Config::from_spec(spec)?, vb.pp("speecht5"));
        let (text, decoder) = (model.pp("encoder.prenet"), model.pp("decoder"));
        Ok(Self {
            embed_tokens: Embedding::load(cfg.vocab_size, cfg.hidden_size, text.pp("embed_tokens"))?,
            positions: ScaledPositions::load(&cfg, cfg.max_text_positions, text.pp("encode_positions"))?,
            encoder: Encoder::load(&cfg, model.pp("encoder.wrapped_encoder"))?,
            prenet: SpeechPrenet::load(&cfg, decoder.pp("prenet"))?,
            decoder: DecoderLayers::load(cfg.decoder(), decoder.pp("wrapped_decoder.layers"))?,
            postnet: SpeechPostnet::load(&cfg, vb.pp("speech_decoder_postnet"))?,
            vocoder: None,
            spec: spec.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn floats(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(&self.spec.device)?.to_dtype(activation_dtype(self.spec.dtype, &self.spec.device))
    }

    fn text(&self, call: &Call, inputs: &Inputs) -> Result<Text, SessionError> {
        let ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &ids, "vocab_size", self.cfg.vocab_size)?;
        let (batch, seq) = ids.dims2()?;
        if seq > self.cfg.max_text_positions {
            let reason =
                format!("has {seq} tokens, the model has max_text_positions = {}", self.cfg.max_text_positions);
            return Err(SessionError::input("input_ids", reason));
        }
        let (name, shape) = ("speaker_embeddings", [("batch", None), ("width", Some(self.cfg.speaker_embedding_dim))]);
        let speakers = match inputs.optional_floats_of(name, &shape)? {
            None => None,
            Some(speakers) => match speakers.dim(0)? {
                1 => Some(self.floats(&speakers.broadcast_as((batch, self.cfg.speaker_embedding_dim))?.contiguous()?)?),
                same if same == batch => Some(self.floats(speakers)?),
                other => return Err(SessionError::input(name, format!("hold {other} voices for {batch} texts"))),
            },
        };
        let seed = match call.arguments.get("seed") {
            None | Some(Value::Null) => 0,
            Some(value) => value
                .as_u64()
                .ok_or_else(|| SessionError::input("seed", format!("is {value}, expected a number of 0 or more")))?,
        };
        let mask = mask_like(inputs, "attention_mask", ("input_ids", &ids))?;
        let dropout = Dropout { kept: self.cfg.speech_decoder_prenet_dropout, seed };
        Ok(Text { ids: ids.to_device(&self.spec.device)?, mask, speakers, dropout })
    }

    fn encode(&self, text: &Text, mask: Option<&Tensor>) -> Result<Encoded> {
        let x = self.positions.add(&self.embed_tokens.forward(&text.ids)?, 0)?;
        self.decoder.encoded(self.encoder.forward(&self.cfg, &x, mask)?, mask)
    }

    fn forward(&self, text: &Text, spectra: &Tensor, mask: Option<&Tensor>) -> Result<Tensors, SessionError> {
        let mut encoded = self.encode(text, text.mask.as_ref())?;
        let voice = text.speakers.as_ref().map(|speakers| self.prenet.voice(speakers)).transpose()?;
        let x = self.prenet.forward(spectra, 0, voice.as_ref(), &text.dropout)?;
        let mut decoding = Decoding::once(x.dim(0)?, x.dim(1)?, mask, &self.spec.device)?;
        let x = self.decoder.forward(x, &mut decoding, &mut encoded)?;
        let spectrogram = self.postnet.refine(&self.postnet.spectra(&x)?)?;
        let states = encoded.states().clone();
        Ok(Tensors::from([("encoder_last_hidden_state".to_owned(), states), ("spectrogram".to_owned(), spectrogram)]))
    }

    /// Spectra step by step, each item's until its probabilities reach the threshold: (frames, bins) of one text, of
    /// several (batch, frames, bins) with zeros behind the shorter ones.
    fn generate(&self, text: &Text, length: &Length, observer: &mut dyn Observer) -> Result<Tensor, SessionError> {
        let speakers = text.speakers.as_ref();
        let speakers = speakers.ok_or_else(|| SessionError::input("speaker_embeddings", "is missing"))?;
        let (batch, bins) = (text.ids.dim(0)?, self.cfg.num_mel_bins);
        let mask = match &text.mask {
            Some(mask) => mask.clone(),
            None => text.ids.ne(self.cfg.pad_token_id)?.to_dtype(DType::I64)?,
        };
        let mut encoded = self.encode(text, Some(&mask))?;
        let voice = self.prenet.voice(speakers)?;
        let mut decoding = self.decoder.decoding(batch, length.steps(), &self.spec)?;
        let mut last = self.floats(&Tensor::zeros((batch, 1, bins), DType::F32, &self.spec.device)?)?;
        let mut spectra = Vec::new();
        let mut ends: Vec<Option<usize>> = vec![None; batch];
        let mut step = 0;
        loop {
            step += 1;
            decoding.advance(1)?;
            let x = self.prenet.forward(&last, step - 1, Some(&voice), &text.dropout)?;
            let x = self.decoder.forward(x, &mut decoding, &mut encoded)?; // (batch, 1, hidden)
            let made = self.postnet.spectra(&x)?; // (batch, reduction_factor, bins)
            last = made.narrow(1, self.cfg.reduction_factor - 1, 1)?.contiguous()?;
            spectra.push(made);
            let chances = Activation::Sigmoid.forward(&self.postnet.prob_out.forward(&x)?)?;
            let chances = chances.squeeze(1)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            if step >= length.least {
                for (end, chances) in ends.iter_mut().zip(&chances) {
                    if step >= length.most || chances.iter().sum::<f32>() >= length.threshold as f32 {
                        end.get_or_insert(step);
                    }
                }
            }
            let phase = if step == 1 { Phase::Prefill } else { Phase::Decode };
            if ends.iter().all(Option::is_some) {
                let refined = self.refine(&Tensor::cat(&spectra, 1)?, &ends)?;
                observer.end(phase);
                return Ok(refined);
            }
            observer.end(phase);
        }
    }

    /// The first `ends` steps of each item of `spectra` (batch, frames, bins), those of one length together.
    fn refine(&self, spectra: &Tensor, ends: &[Option<usize>]) -> Result<Tensor> {
        let factor = self.cfg.reduction_factor;
        let frames: Vec<usize> = ends.iter().map(|end| end.unwrap_or_default() * factor).collect();
        let longest = frames.iter().copied().max().unwrap_or_default();
        let mut refined: Vec<Option<Tensor>> = vec![None; frames.len()];
        for item in 0..frames.len() {
            if refined[item].is_some() {
                continue;
            }
            let same: Vec<usize> = (item..frames.len()).filter(|other| frames[*other] == frames[item]).collect();
            let rows = same.iter().map(|i| spectra.narrow(0, *i, 1)?.narrow(1, 0, frames[item])?.contiguous());
            let rows = self.postnet.refine(&Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?)?;
            for (at, other) in same.iter().enumerate() {
                refined[*other] = Some(rows.narrow(0, at, 1)?.pad_with_zeros(1, 0, longest - frames[item])?);
            }
        }
        let refined: Vec<Tensor> = refined.into_iter().flatten().collect();
        match &refined[..] {
            [one] => one.squeeze(0),
            _ => Tensor::cat(&refined, 0),
        }
    }

    /// The call asks for sound instead of spectra: its argument `vocoder` is true, or the name of one.
    fn is_heard(&self, call: &Call) -> Result<bool, SessionError> {
        let refuse = |reason: String| Err(SessionError::input("vocoder", reason));
        match (call.arguments.get("vocoder"), &self.vocoder) {
            (None | Some(Value::Null | Value::Bool(false)), _) => Ok(false),
            (Some(Value::Bool(true) | Value::String(_)), Some(vocoder)) if vocoder.bins() == self.cfg.num_mel_bins => {
                Ok(true)
            }
            (Some(Value::Bool(true) | Value::String(_)), Some(vocoder)) => {
                refuse(format!("takes {} bins, the spectra have {}", vocoder.bins(), self.cfg.num_mel_bins))
            }
            (Some(Value::Bool(true) | Value::String(_)), None) => {
                let way_out = "put microsoft/speecht5_hifigan in the folder `vocoder` beside the weights";
                refuse(format!("is asked for, and there is none; {way_out}"))
            }
            (Some(other), _) => refuse(format!("is {other}, expected true, false or a name")),
        }
    }

    fn read(&self, call: &Call) -> Result<Speech, SessionError> {
        let (text, spectra) = (["input_ids", "attention_mask", "speaker_embeddings"], "decoder_input_values");
        match call.method.as_str() {
            "forward" => {
                let known = [&text[..], &[spectra, "decoder_attention_mask"]].concat();
                let inputs = Inputs::forward(call, &known, &["use_cache", "seed"])?;
                let text = self.text(call, &inputs)?;
                let batch = text.ids.dim(0)?;
                let shape = [("batch", Some(batch)), ("steps", None), ("bins", Some(self.cfg.num_mel_bins))];
                let values = inputs.floats_of(spectra, &shape)?;
                let (_, steps, _) = values.dims3()?;
                if steps > self.cfg.max_speech_positions {
                    let most = self.cfg.max_speech_positions;
                    let reason = format!("has {steps} steps, the model has max_speech_positions = {most}");
                    return Err(SessionError::input(spectra, reason));
                }
                let like = Tensor::zeros((batch, steps), DType::U8, &Device::Cpu)?;
                let mask = mask_like(&inputs, "decoder_attention_mask", (spectra, &like))?;
                Ok(Speech::Forward { text, spectra: self.floats(values)?, mask })
            }
            "generate_speech" | "generate" => {
                let own = ["threshold", "minlenratio", "maxlenratio", "seed", "vocoder"];
                if let Some(name) = call.arguments.keys().find(|name| !own.contains(&name.as_str())) {
                    let reason = format!("is not supported; supported: {}", own.join(", "));
                    return Err(SessionError::input(name, reason));
                }
                let text = self.text(call, &Inputs::of_any_method(call, &text)?)?;
                let length = Length::read(&self.cfg, call, text.ids.dim(1)?)?;
                Ok(Speech::Generate { text, length, heard: self.is_heard(call)? })
            }
            _ => Err(unsupported_method(call, "forward, generate_speech")),
        }
    }
}

/// A call of [`TextToSpeech`], read.
enum Speech {
    Forward { text: Text, spectra: Tensor, mask: Option<Tensor> },
    Generate { text: Text, length: Length, heard: bool },
}

impl Session for TextToSpeech {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        match self.read(call)? {
            Speech::Forward { text, spectra, mask } => {
                let outputs = self.forward(&text, &spectra, mask.as_ref())?;
                observer.end(Phase::Forward);
                Ok(outputs)
            }
            Speech::Generate { text, length, heard } => {
                let spectrogram = self.generate(&text, &length, observer)?;
                let Some(vocoder) = self.vocoder.as_ref().filter(|_| heard) else {
                    return Ok(Tensors::from([("spectrogram".to_owned(), spectrogram)]));
                };
                let waveform = vocoder.sound(&spectrogram)?;
                observer.end(Phase::Forward);
                Ok(Tensors::from([("waveform".to_owned(), waveform)]))
            }
        }
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let costs = Costs { cfg: &self.cfg, bytes: self.spec.dtype.size_in_bytes() as u64 };
        match self.read(call)? {
            Speech::Forward { text, spectra, .. } => {
                let ((batch, states), (_, steps, _)) = (text.ids.dims2()?, spectra.dims3()?);
                let [batch, states, steps] = [batch, states, steps].map(|n| n as u64);
                let pass = Pass { batch, seq: steps, cached: 0, states, made: false };
                let speakers = text.speakers.is_some();
                let voice = if speakers { costs.voice(batch) } else { Cost::default() };
                let cost =
                    costs.text(batch, states) + voice + costs.speech(pass, speakers) + costs.refine(batch, steps);
                Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
            }
            // as long as it may become
            Speech::Generate { text, length, heard } => {
                let (batch, states) = text.ids.dims2()?;
                let vocoder = self.vocoder.as_ref().filter(|_| heard).map(|vocoder| PhaseCost {
                    phase: Phase::Forward,
                    repeats: 1,
                    cost: vocoder.cost_of(batch, length.steps() * self.cfg.reduction_factor),
                });
                let [batch, states, steps] = [batch, states, length.steps()].map(|n| n as u64);
                let step = |cached: u64| {
                    let pass = Pass { batch, seq: 1, cached, states, made: cached > 0 };
                    costs.speech(pass, true) + costs.ending(batch)
                };
                let (first, refined) =
                    (costs.text(batch, states) + costs.voice(batch) + step(0), costs.refine(batch, steps));
                let mut phases = match steps {
                    1 => phases(first + refined, Cost::default(), 1),
                    _ => phases(first, (1..steps).map(step).sum::<Cost>() + refined, steps),
                };
                phases.extend(vocoder);
                Ok(phases)
            }
        }
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// `SpeechT5ForSpeechToText`.
pub struct SpeechToText {
    cfg: SpeechT5Config,
    features: FeatureConfig,
    feature_encoder: FeatureEncoder,
    feature_projection: FeatureProjection,
    pos_conv_embed: PositionalConv,
    speech_positions: CountedPositions,
    encoder: Encoder,
    embed_tokens: Embedding,
    embed_scale: Option<f64>,
    text_positions: CountedPositions,
    decoder: DecoderLayers,
    lm_head: Linear,
    /// With a generation_config.json made of config.json, where the checkpoint has none.
    spec: ModelSpec,
    paths: BTreeMap<String, String>,
}

/// The sounds of a call of [`SpeechToText`], checked.
struct Sounds {
    /// (batch, samples)
    values: Tensor,
    frames: usize,
    /// (batch, frames) of 0 and 1
    mask: Option<Tensor>,
}

const GENERATION_FILE: &str = "generation_config.json";

/// What config.json says about generation, with the class's own values, where there is no generation_config.json.
fn generation_config(config: &Value) -> Value {
    let defaults = [
        ("bos_token_id", 0.into()),
        ("pad_token_id", 1.into()),
        ("eos_token_id", 2.into()),
        ("decoder_start_token_id", 2.into()),
        ("max_length", Value::Null),
    ];
    let field = |(name, default): (&str, Value)| (name.to_owned(), config.get(name).cloned().unwrap_or(default));
    Value::Object(defaults.into_iter().map(field).collect::<Map<_, _>>())
}

impl SpeechToText {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (cfg, features, model) =
            (SpeechT5Config::from_spec(spec)?, FeatureConfig::from_spec(spec)?, vb.pp("speecht5"));
        config::refuse_unless(spec, "conv_pos_batch_norm", &[false.into()])?;
        config::refuse_unless(spec, "feat_proj_layer_norm", &[true.into()])?;
        let (sound, decoder, hidden) = (model.pp("encoder.prenet"), model.pp("decoder"), cfg.hidden_size);
        if sound.contains_tensor("masked_spec_embed") {
            sound.get(hidden, "masked_spec_embed")?; // of training
        }
        let (embed_tokens, lm_head) = Embedding::load_tied(cfg.vocab_size, hidden, decoder.pp("prenet.embed_tokens"))?;
        let positions = |most: usize| CountedPositions::new(&cfg, most, spec.dtype, &spec.device);
        let (speech_positions, text_positions) =
            (positions(cfg.max_speech_positions)?, positions(cfg.max_text_positions)?);
        let mut spec = spec.clone();
        if !spec.extra_configs.contains_key(GENERATION_FILE) {
            spec.extra_configs.insert(GENERATION_FILE.to_owned(), generation_config(&spec.config));
        }
        Ok(Self {
            feature_encoder: FeatureEncoder::load(&features, sound.pp("feature_encoder"))?,
            feature_projection: FeatureProjection::load(&features, sound.pp("feature_projection"))?,
            pos_conv_embed: PositionalConv::load(&features, sound.pp("pos_conv_embed"))?,
            speech_positions,
            encoder: Encoder::load(&cfg, model.pp("encoder.wrapped_encoder"))?,
            embed_tokens,
            embed_scale: cfg.scale_embedding.then(|| (hidden as f64).sqrt()),
            text_positions,
            decoder: DecoderLayers::load(cfg.decoder(), decoder.pp("wrapped_decoder.layers"))?,
            lm_head,
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
            features,
            spec,
        })
    }

    fn sounds(&self, inputs: &Inputs) -> Result<Sounds, SessionError> {
        let values = inputs.sounds("input_values")?;
        let (batch, samples) = values.dims2()?;
        let frames = self.features.frames_of("input_values", samples)?;
        let name = "attention_mask";
        let mask = match mask_like(inputs, name, ("input_values", values))? {
            None => None,
            Some(mask) => {
                let mut exists = Vec::with_capacity(batch * frames);
                for (item, count) in mask.sum(1)?.to_vec1::<i64>()?.into_iter().enumerate() {
                    let here = self.features.frames(count as usize).ok_or_else(|| {
                        SessionError::input(name, format!("item {item} has {count} samples, too few for a frame"))
                    })?;
                    exists.extend((0..frames).map(|frame| i64::from(frame < here)));
                }
                Some(Tensor::from_vec(exists, (batch, frames), &Device::Cpu)?)
            }
        };
        let dtype = activation_dtype(self.spec.dtype, &self.spec.device);
        Ok(Sounds { values: values.to_device(&self.spec.device)?.to_dtype(dtype)?, frames, mask })
    }

    fn encode(&self, sounds: &Sounds) -> Result<Encoded> {
        let (x, _) = self.feature_projection.forward(self.feature_encoder.forward(&sounds.values)?)?;
        let x = self.pos_conv_embed.forward(&x)?; // (batch, frames, hidden)
        // the class writes 1 for what is padding and 0 for the rest, and counts what is not the padding token
        let counts = |exists: i64| 1 - exists != self.cfg.pad_token_id;
        let exists = match &sounds.mask {
            Some(mask) => mask.to_vec2::<i64>()?,
            None => vec![vec![1; x.dim(1)?]; x.dim(0)?],
        };
        let exists: Vec<Vec<bool>> = exists.into_iter().map(|row| row.into_iter().map(counts).collect()).collect();
        let x = self.speech_positions.add(&x, 0, Some(&exists))?;
        let mask = sounds.mask.as_ref();
        self.decoder.encoded(self.encoder.forward(&self.cfg, &x, mask)?, mask)
    }

    /// (batch, seq) -> (batch, seq, hidden)
    fn decode(&self, ids: &Tensor, decoding: &mut Decoding, encoded: &mut Encoded) -> Result<Tensor> {
        let mut x = self.embed_tokens.forward(ids)?;
        if let Some(scale) = self.embed_scale {
            roofbench_nn::cost::elementwise(x.elem_count(), 1);
            x = (x * scale)?;
        }
        let exists = ids.to_vec2::<i64>()?;
        let exists: Vec<Vec<bool>> =
            exists.into_iter().map(|row| row.into_iter().map(|id| id != self.cfg.pad_token_id).collect()).collect();
        let x = self.text_positions.add(&x, decoding.past(), Some(&exists))?;
        self.decoder.forward(x, decoding, encoded)
    }

    fn read(&self, call: &Call) -> Result<Transcript, SessionError> {
        let known = ["input_values", "attention_mask", "decoder_input_ids", "decoder_attention_mask"];
        match call.method.as_str() {
            "forward" => {
                let inputs = Inputs::forward(call, &known, &["use_cache"])?;
                let (sounds, name) = (self.sounds(&inputs)?, "decoder_input_ids");
                let ids = inputs.matrix(name)?;
                in_range(name, &ids, "vocab_size", self.cfg.vocab_size)?;
                let (batch, found) = (sounds.values.dim(0)?, ids.dim(0)?);
                if batch != found {
                    let reason = format!("holds {found} sequences, input_values {batch} sounds");
                    return Err(SessionError::input(name, reason));
                }
                let mask = mask_like(&inputs, "decoder_attention_mask", (name, &ids))?;
                Ok(Transcript::Forward { sounds, ids: ids.to_device(&self.spec.device)?, mask })
            }
            "generate" => {
                let sounds = self.sounds(&Inputs::of_any_method(call, &known[..2])?)?;
                let generation = Generation::read(&self.spec, call, 1, &[])?;
                Ok(Transcript::Generate { sounds, generation: Box::new(generation) })
            }
            _ => Err(unsupported_method(call, "forward, generate")),
        }
    }
}

/// A call of [`SpeechToText`], read.
enum Transcript {
    Forward { sounds: Sounds, ids: Tensor, mask: Option<Tensor> },
    Generate { sounds: Sounds, generation: Box<Generation> },
}

impl Session for SpeechToText {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        match self.read(call)? {
            Transcript::Forward { sounds, ids, mask } => {
                let mut encoded = self.encode(&sounds)?;
                let (batch, seq) = ids.dims2()?;
                let mut decoding = Decoding::once(batch, seq, mask.as_ref(), &self.spec.device)?;
                let logits = self.lm_head.forward(&self.decode(&ids, &mut decoding, &mut encoded)?)?;
                observer.end(Phase::Forward);
                let states = encoded.states().clone();
                Ok(Tensors::from([("encoder_last_hidden_state".to_owned(), states), ("logits".to_owned(), logits)]))
            }
            Transcript::Generate { sounds, generation } => {
                let mut encoded = self.encode(&sounds)?;
                let batch = sounds.values.dim(0)?;
                let prompt = vec![vec![generation.decoder_start()?]; batch];
                let decoding = self.decoder.decoding(batch, generation.positions(1), &self.spec)?;
                let rule = |_: &[i64], _: &mut [f32]| {};
                generate(&generation, &prompt, decoding, observer, &rule, &self.spec.device, |ids, decoding| {
                    self.lm_head.forward(&last_rows(&self.decode(ids, decoding, &mut encoded)?)?)
                })
            }
        }
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let costs = Costs { cfg: &self.cfg, bytes: self.spec.dtype.size_in_bytes() as u64 };
        let sound = |sounds: &Sounds| -> Result<(Cost, [u64; 2])> {
            let (batch, samples) = sounds.values.dims2()?;
            let frames = self.features.cost(batch, samples, costs.bytes)
                + self.features.position_cost(batch, sounds.frames, costs.bytes);
            let [batch, states] = [batch, sounds.frames].map(|n| n as u64);
            Ok((frames + costs.sound(batch, states), [batch, states]))
        };
        match self.read(call)? {
            Transcript::Forward { sounds, ids, .. } => {
                let (encoder, [batch, states]) = sound(&sounds)?;
                let seq = ids.dim(1)? as u64;
                let pass = Pass { batch, seq, cached: 0, states, made: false };
                Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost: encoder + costs.tokens(pass, seq) }])
            }
            Transcript::Generate { sounds, generation } => {
                let (encoder, [batch, states]) = sound(&sounds)?;
                let step = |cached: u64| costs.tokens(Pass { batch, seq: 1, cached, states, made: cached > 0 }, 1);
                let new = generation.max_new_tokens as u64;
                Ok(phases(encoder + step(0), (1..new).map(step).sum(), new))
            }
        }
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// The cost by formula.
struct Costs<'a> {
    cfg: &'a SpeechT5Config,
    bytes: u64,
}

impl Costs<'_> {
    fn hidden(&self) -> u64 {
        self.cfg.hidden_size as u64
    }

    /// The encoder behind what makes its stream.
    fn encoder(&self, batch: u64, seq: u64) -> Cost {
        let (hidden, heads) = (self.hidden(), self.cfg.encoder_attention_heads as u64);
        let range = self.cfg.distances(seq as usize);
        let distances = (range.end() - range.start() + 1) as u64;
        // each query with the vector of every distance
        let relative = cost::linear(batch * seq * heads, hidden / heads, distances, false, self.bytes);
        cost::norm(Norm::Layer, batch * seq, hidden, self.bytes)
            + self.cfg.encoder().encoder_cost([batch, seq], self.bytes)
            + relative * self.cfg.encoder_layers as u64
    }

    fn text(&self, batch: u64, seq: u64) -> Cost {
        cost::embedding(batch * seq, self.hidden(), self.bytes)
            + cost::elementwise(batch * seq * self.hidden(), 1) // positions
            + self.encoder(batch, seq)
    }

    /// From projected frames with neighbours.
    fn sound(&self, batch: u64, frames: u64) -> Cost {
        cost::elementwise(batch * frames * self.hidden(), 1) + self.encoder(batch, frames)
    }

    /// A voice's part of the stream.
    fn voice(&self, batch: u64) -> Cost {
        let width = self.cfg.speaker_embedding_dim as u64;
        cost::input(batch * width, self.bytes)
            + cost::elementwise(batch * width, 3) // square and sum, divide
            + cost::linear(batch, width, self.hidden(), true, self.bytes)
    }

    /// One pass of the decoder from spectra to spectra.
    fn speech(&self, pass: Pass, speakers: bool) -> Cost {
        let (rows, hidden, units) = (pass.batch * pass.seq, self.hidden(), self.cfg.speech_decoder_prenet_units as u64);
        let drops = u64::from(self.cfg.speech_decoder_prenet_dropout > 0.0);
        let layer = |[input, output]: [usize; 2]| {
            cost::linear(rows, input as u64, output as u64, true, self.bytes)
                + cost::elementwise(rows * output as u64, 1 + drops) // activation, dropout
        };
        let voice = match speakers {
            // the voice's part and an activation
            true => cost::linear(rows, hidden, hidden, false, self.bytes) + cost::elementwise(rows * hidden, 2),
            false => Cost::default(),
        };
        let made = (self.cfg.num_mel_bins * self.cfg.reduction_factor) as u64;
        self.cfg.prenet().map(layer).sum::<Cost>()
            + cost::linear(rows, units, hidden, true, self.bytes)
            + cost::elementwise(rows * hidden, 1) // positions
            + voice
            + self.cfg.decoder().decoder_cost(pass, self.bytes)
            + cost::linear(rows, hidden, made, true, self.bytes)
    }

    /// The probabilities of a step that it was the last.
    fn ending(&self, batch: u64) -> Cost {
        let factor = self.cfg.reduction_factor as u64;
        cost::linear(batch, self.hidden(), factor, true, self.bytes) + cost::elementwise(batch * factor, 1)
    }

    /// The convolutions over all spectra.
    fn refine(&self, batch: u64, steps: u64) -> Cost {
        let frames = steps * self.cfg.reduction_factor as u64;
        let layer = |[input, output]: [usize; 2]| {
            let conv = cost::Conv2d {
                batch,
                in_channels: input as u64,
                out_channels: output as u64,
                kernel: [1, self.cfg.speech_decoder_postnet_kernel as u64],
                groups: 1,
                output: [1, frames],
                bias: true, // the norm's
            };
            // activation, or behind the last one the spectra before
            conv.cost(self.bytes) + cost::elementwise(batch * frames * output as u64, 1)
        };
        self.cfg.postnet().map(layer).sum()
    }

    /// One pass of the decoder from tokens to logits of so many rows each.
    fn tokens(&self, pass: Pass, logits: u64) -> Cost {
        let (rows, hidden) = (pass.batch * pass.seq, self.hidden());
        cost::embedding(rows, hidden, self.bytes)
            + cost::elementwise(rows * hidden, 1 + u64::from(self.cfg.scale_embedding)) // positions, scale
            + self.cfg.decoder().decoder_cost(pass, self.bytes)
            + cost::linear(pass.batch * logits, hidden, self.cfg.vocab_size as u64, false, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::Weights;
    use serde_json::json;

    use super::*;
    use crate::Source;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "vocab_size": 9, "hidden_size": 4, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 5,
            "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 5, "num_mel_bins": 3,
            "speech_decoder_prenet_layers": 2, "speech_decoder_prenet_units": 6, "speaker_embedding_dim": 2,
            "speech_decoder_postnet_layers": 2, "speech_decoder_postnet_units": 4, "speech_decoder_postnet_kernel": 3,
            "max_speech_positions": 20, "max_text_positions": 8, "encoder_max_relative_position": 2,
            "speech_decoder_prenet_dropout": 0.0, "conv_dim": [3], "conv_kernel": [4], "conv_stride": [2],
            "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2,
        });
        if let (Some(config), Some(changes)) = (config.as_object_mut(), changes.as_object()) {
            config.extend(changes.clone());
        }
        ModelSpec::new("speecht5", class, config)
    }

    fn model(spec: &ModelSpec) -> Box<dyn Session> {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, aliases(spec), &spec.class, &Default::default()).expect("weights");
        load(spec, &weights, weights.var_builder(DType::F32, &Device::Cpu)).expect("a model")
    }

    fn speak(model: &mut dyn Session, rows: &[[i64; 4]], arguments: Value) -> Result<Tensor, SessionError> {
        let cpu = &Device::Cpu;
        let ids = Tensor::new(rows.concat(), cpu)?.reshape((rows.len(), 4))?;
        let speakers = Tensor::new(&[[0.5f32, -1.0]], cpu)?;
        let call = Call {
            method: "generate_speech".into(),
            inputs: [("input_ids".to_owned(), ids), ("speaker_embeddings".to_owned(), speakers)].into(),
            arguments: arguments.as_object().cloned().unwrap_or_default(),
        };
        Ok(model.call(&call, &mut Unobserved)?["spectrogram"].clone())
    }

    #[test]
    fn a_text_in_a_batch_is_spoken_as_alone() -> Result<(), SessionError> {
        let mut model = model(&spec(TO_SPEECH, json!({})));
        let rows = [[3, 4, 5, 6], [7, 8, 2, 1]];
        let arguments = json!({"threshold": 1.05, "minlenratio": 1.0, "maxlenratio": 3.0});
        let both = speak(&mut *model, &rows, arguments.clone())?;
        for (item, row) in rows.iter().enumerate() {
            let alone = speak(&mut *model, std::slice::from_ref(row), arguments.clone())?;
            let frames = alone.dim(0)?;
            let together = both.get(item)?;
            let difference = (together.narrow(0, 0, frames)? - alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-5, "{difference}");
            let behind = together.narrow(0, frames, both.dim(1)? - frames)?;
            assert!(behind.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| *x == 0.0));
        }
        Ok(())
    }

    #[test]
    fn dropout_follows_the_seed() -> Result<(), SessionError> {
        let mut model = model(&spec(TO_SPEECH, json!({"speech_decoder_prenet_dropout": 0.5})));
        let mut with = |seed: u64| {
            let arguments = json!({"threshold": 9.0, "minlenratio": 2.0, "maxlenratio": 2.0, "seed": seed});
            speak(&mut *model, &[[3, 4, 5, 6]], arguments)?.flatten_all()?.to_vec1::<f32>().map_err(SessionError::from)
        };
        let (first, again, other) = (with(1)?, with(1)?, with(2)?);
        assert!(first == again && first != other);
        Ok(())
    }

    #[test]
    fn positions_count_what_exists() -> Result<()> {
        let cfg = SpeechT5Config { hidden_size: 4, ..SpeechT5Config::default() };
        let positions = CountedPositions::new(&cfg, 3, DType::F32, &Device::Cpu)?;
        let x = Tensor::zeros((1, 3, 4), DType::F32, &Device::Cpu)?;
        let first = |x: Tensor| x.get(0)?.narrow(1, 0, 1)?.flatten_all()?.to_vec1::<f32>();
        // rows from 2 on, and that of the padding is 0
        let rows = first(positions.add(&x, 0, Some(&[vec![true, false, true]]))?)?;
        assert_eq!(rows, [2f32.sin(), 0.0, 3f32.sin()]);
        assert_eq!(first(positions.add(&x, 40, None)?)?, [42f32.sin(), 43f32.sin(), 44f32.sin()]);
        Ok(())
    }

    #[test]
    fn wrong_calls_and_configs_are_named() {
        let mut model = model(&spec(TO_SPEECH, json!({})));
        let mut message = |arguments| speak(&mut *model, &[[3, 4, 5, 6]], arguments).err().map(|e| e.to_string());
        assert!(message(json!({"maxlenratio": 20.0})).is_some_and(|m| m.contains("`maxlenratio`: comes to 40 steps")));
        assert!(message(json!({"threshold": "low"})).is_some_and(|m| m.contains("`threshold`")));
        assert!(message(json!({"vocoder": true, "maxlenratio": 4.0})).is_some_and(|m| m.contains("`vocoder`")));
        let config = |changes| SpeechT5Config::from_spec(&spec(TO_TEXT, changes)).err().map(|e| e.to_string());
        assert!(config(json!({"speech_decoder_prenet_dropout": 1.0})).is_some_and(|m| m.contains("is not in 0..1")));
        assert!(config(json!({"speech_decoder_postnet_kernel": 4})).is_some_and(|m| m.contains("4 is even")));
        assert!(config(json!({"encoder_attention_heads": 3})).is_some_and(|m| m.contains("`hidden_size`")));
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        let cfg = SpeechT5Config::from_spec(&spec(TO_SPEECH, json!({})))?;
        let costs = Costs { cfg: &cfg, bytes: 4 };
        let linear = |rows: u64, input: u64, output: u64| rows * output * (2 * input + 1);
        let output = |rows: u64, input: u64| linear(rows, input, 4) + rows * 4 + 7 * rows * 4; // residual, norm
        let attention = |pairs: u64| 2 * pairs * (4 * 2 + 5);
        let feed_forward = |rows: u64| linear(rows, 4, 5) + rows * 5 + output(rows, 5);
        // 5 tokens; distances from -2 to 1
        let text =
            5 * 4 + 7 * 5 * 4 + linear(5, 4, 12) + attention(25) + output(5, 4) + feed_forward(5) + 10 * 4 * 2 * 2;
        assert_eq!(costs.text(1, 5).flops, text);
        let speech = linear(1, 3, 6)
            + 6
            + linear(1, 6, 6)
            + 6
            + linear(1, 6, 4)
            + 4
            + (2 * 4 * 4 + 4 + 4)
            + linear(1, 4, 12)
            + attention(3)
            + output(1, 4)
            + linear(1, 4, 4)
            + attention(5)
            + output(1, 4)
            + feed_forward(1)
            + linear(1, 4, 6);
        let pass = Pass { batch: 1, seq: 1, cached: 2, states: 5, made: true };
        assert_eq!(costs.speech(pass, true).flops, speech);
        let refine = 4 * 4 * (2 * 3 * 3 + 1) + 4 * 4 + 4 * 3 * (2 * 4 * 3 + 1) + 4 * 3;
        assert_eq!((costs.refine(1, 2).flops, costs.ending(1).flops), (refine, linear(1, 4, 2) + 2));
        Ok(())
    }

    /// Published: 146 million parameters of the checkpoint of text to speech.
    #[test]
    fn every_parameter_of_the_published_checkpoint_is_read() -> Result<(), SessionError> {
        let mut published = spec(TO_SPEECH, json!({}));
        published.config = json!({"max_speech_positions": 1876, "max_text_positions": 600});
        let cfg = SpeechT5Config::from_spec(&published)?;
        let costs = Costs { cfg: &cfg, bytes: 4 };
        let pass = Pass { batch: 1, seq: 1, cached: 0, states: 81, made: false };
        let all = costs.text(1, 81) + costs.voice(1) + costs.speech(pass, true) + costs.ending(1) + costs.refine(1, 1);
        // a text of 81 tokens has 161 of 320 distances, read by each layer; a folded norm is one number a channel, not two;
        // two factors of positions are folded as well
        let distances = 12 * 161 * 64 - 320 * 64;
        let norms = 4 * 256 + 80;
        assert_eq!(all.weight_bytes / 4 + norms + 2, 144_431_684 + distances);
        Ok(())
    }
}
