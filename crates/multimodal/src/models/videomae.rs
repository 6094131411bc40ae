//! VideoMAE: blocks of frames and pixels as tokens with sinusoids for positions, a pre-norm encoder, and for pre-training a
//! small decoder that draws the blocks which were hidden.
//! Source: VideoMAE (arXiv:2203.12602). Mirrors `transformers.VideoMAEModel`, `VideoMAEForVideoClassification` and
//! `VideoMAEForPreTraining`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern, Rows, SelfAttention};
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed3d;
use roofbench_nn::pooling::global_avg_pool_2d;
use roofbench_vision::models::{HeightWidth, activation_dtype};
use serde::Deserialize;
use serde_json::Value;

use super::{forward_phase, named};

/// The classes that run.
pub const CLASSES: &[&str] = &["VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining"];

const CLASSIFIER: AliasScope = AliasScope::Class("VideoMAEForVideoClassification");
const PRE_TRAINING: AliasScope = AliasScope::Class("VideoMAEForPreTraining");

/// From names in published checkpoints to those of the class.
const ALIASES: &[AliasRule] = &[
    // with mean pooling this norm is not used (`fc_norm` takes its place): the first rule, and for those configs alone
    AliasRule::drop(r"^(videomae\.)?layernorm\.", AliasScope::Always),
    // the library's own module names, which it does not save
    AliasRule::rename(r"\.attention\.attention\.query\.bias$", ".attention.attention.q_bias", AliasScope::Always),
    AliasRule::rename(r"\.attention\.attention\.value\.bias$", ".attention.attention.v_bias", AliasScope::Always),
    // a base model from a checkpoint with a head
    AliasRule::drop(r"^(classifier|fc_norm|decoder|encoder_to_decoder)\.|^mask_token$", AliasScope::Base),
    AliasRule::rename(r"^videomae\.", "", AliasScope::Base),
    // a class with a head from a checkpoint with another
    AliasRule::drop(r"^(encoder_to_decoder|decoder)\.|^mask_token$", CLASSIFIER),
    AliasRule::drop(r"^(classifier|fc_norm)\.", PRE_TRAINING),
    // and from one that was saved by the base model
    AliasRule::rename(r"^(embeddings|encoder|layernorm)\.", "videomae.$1.", AliasScope::Head),
];

/// How published checkpoints of `spec` name what its class asks for.
pub(crate) fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.config.get("use_mean_pooling") {
        Some(Value::Bool(false)) => &ALIASES[1..],
        _ => ALIASES,
    }
}

/// Mean of the colours of ImageNet, about which `pixel_values` of three channels are taken to be.
const COLOUR_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Their standard deviation.
const COLOUR_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Added to the variance by norms that don't heed `layer_norm_eps`: the one before the classifier, the decoder's last.
const DEFAULT_EPS: f64 = 1e-5;

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.VideoMAEConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VideoMaeConfig {
    /// Size of a frame.
    pub image_size: HeightWidth,
    /// Size of a patch; what remains beyond whole patches is left out.
    pub patch_size: HeightWidth,
    /// Colour channels.
    pub num_channels: usize,
    /// Frames of a video.
    pub num_frames: usize,
    /// Frames of a patch.
    pub tubelet_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in normalisations of the layers and behind the encoder.
    pub layer_norm_eps: f64,
    /// The products of query and value have biases; that of the key never has.
    pub qv_bias: Option<bool>,
    /// The same in the configs of the Hub, where it decides.
    pub qkv_bias: Option<bool>,
    /// A video's class is told from the mean over its patches; else from the first patch, behind a norm.
    pub use_mean_pooling: bool,
    /// Width of the decoder's stream.
    pub decoder_hidden_size: usize,
    /// Layers of the decoder.
    pub decoder_num_hidden_layers: usize,
    /// Attention heads of the decoder; they divide `decoder_hidden_size`.
    pub decoder_num_attention_heads: usize,
    /// Width inside the feed-forward half of the decoder's layers.
    pub decoder_intermediate_size: usize,
    /// The decoder draws patches whose colours have mean 0 and variance 1.
    pub norm_pix_loss: bool,
}

impl Default for VideoMaeConfig {
    fn default() -> Self {
        let square = |side| HeightWidth { height: side, width: side };
        Self {
            image_size: square(224),
            patch_size: square(16),
            num_channels: 3,
            num_frames: 16,
            tubelet_size: 2,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            qv_bias: None,
            qkv_bias: None,
            use_mean_pooling: true,
            decoder_hidden_size: 384,
            decoder_num_hidden_layers: 4,
            decoder_num_attention_heads: 6,
            decoder_intermediate_size: 1536,
            norm_pix_loss: true,
        }
    }
}

impl VideoMaeConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("image_size", cfg.image_size.height),
            ("image_size", cfg.image_size.width),
            ("patch_size", cfg.patch_size.height),
            ("patch_size", cfg.patch_size.width),
            ("num_channels", cfg.num_channels),
            ("num_frames", cfg.num_frames),
            ("tubelet_size", cfg.tubelet_size),
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("decoder_hidden_size", cfg.decoder_hidden_size),
            ("decoder_num_hidden_layers", cfg.decoder_num_hidden_layers),
            ("decoder_num_attention_heads", cfg.decoder_num_attention_heads),
            ("decoder_intermediate_size", cfg.decoder_intermediate_size),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        let [times, rows, columns] = cfg.grid();
        if rows * columns == 0 {
            return Err(config::invalid("patch_size", "is larger than image_size"));
        }
        if times == 0 {
            return Err(config::invalid("tubelet_size", "is larger than num_frames"));
        }
        if spec.class == "VideoMAEForPreTraining" {
            config::multiple(
                ("decoder_hidden_size", cfg.decoder_hidden_size),
                ("decoder_num_attention_heads", cfg.decoder_num_attention_heads),
            )?;
            if cfg.whole() != [cfg.num_frames, cfg.image_size.height, cfg.image_size.width] {
                let reason = "must be a multiple of patch_size, and num_frames of tubelet_size, to be drawn in full";
                return Err(config::invalid("image_size", reason));
            }
            if !cfg.norm_pix_loss && cfg.num_channels != 3 {
                return Err(config::invalid("norm_pix_loss", "is false, for which num_channels must be 3"));
            }
        }
        Ok(cfg)
    }

    /// Patches in time, in rows and in columns.
    fn grid(&self) -> [usize; 3] {
        let Self { image_size, patch_size, .. } = self;
        [
            self.num_frames / self.tubelet_size,
            image_size.height / patch_size.height,
            image_size.width / patch_size.width,
        ]
    }

    /// Frames, rows and columns that whole patches cover.
    fn whole(&self) -> [usize; 3] {
        let ([times, rows, columns], [frames, height, width]) = (self.grid(), self.patch());
        [times * frames, rows * height, columns * width]
    }

    /// Frames, rows and columns of a patch.
    fn patch(&self) -> [usize; 3] {
        [self.tubelet_size, self.patch_size.height, self.patch_size.width]
    }

    fn patches(&self) -> usize {
        self.grid().iter().product()
    }

    /// Values of all channels in a patch.
    fn patch_values(&self) -> usize {
        self.num_channels * self.patch().iter().product::<usize>()
    }

    fn layer(&self) -> LayerSizes {
        LayerSizes { hidden: self.hidden_size, heads: self.num_attention_heads, inner: self.intermediate_size }
    }

    fn decoder_layer(&self) -> LayerSizes {
        LayerSizes {
            hidden: self.decoder_hidden_size,
            heads: self.decoder_num_attention_heads,
            inner: self.decoder_intermediate_size,
        }
    }

    fn has_qkv_bias(&self) -> bool {
        self.qkv_bias.or(self.qv_bias).unwrap_or(true)
    }

    fn layer_cost(&self, sizes: LayerSizes, bytes: u64) -> cost::Layer {
        let [hidden, heads, inner] = [sizes.hidden, sizes.heads, sizes.inner].map(|size| size as u64);
        let (head_dim, qkv_bias) = (hidden / heads, self.has_qkv_bias());
        cost::Layer { hidden, heads, head_dim, inner, qkv_bias, norm_before: true, bytes }
    }

    /// A layer of the encoder or of the decoder. `some_rows`: of which some rows alone are wanted.
    fn load_layer(&self, sizes: LayerSizes, some_rows: bool, vb: VarBuilder) -> Result<EncoderLayer> {
        let (LayerSizes { hidden, heads, inner }, qkv) = (sizes, vb.pp("attention.attention"));
        let attention =
            Attention { heads, kv_heads: heads, head_dim: hidden / heads, scale: None, pattern: Pattern::Full };
        let weights = ["query", "key", "value"].map(|name| qkv.pp(name).get((hidden, hidden), "weight"));
        let bias = if self.has_qkv_bias() {
            let (q_bias, v_bias) = (qkv.get(hidden, "q_bias")?, qkv.get(hidden, "v_bias")?);
            Some(Tensor::cat(&[&q_bias, &q_bias.zeros_like()?, &v_bias], 0)?)
        } else {
            None
        };
        let weight = Tensor::cat(&weights.into_iter().collect::<Result<Vec<_>>>()?, 0)?;
        let norm = |name: &str| LayerNorm::load(hidden, self.layer_norm_eps, vb.pp(name));
        let attention = SelfAttention::from_weights(&weight, bias.as_ref(), attention, some_rows)?;
        let output = Linear::load(hidden, hidden, true, vb.pp("attention.output.dense"))?;
        let names = ["intermediate.dense", "output.dense"];
        let mlp = Mlp::load([hidden, inner], self.hidden_act, true, names, vb.clone())?;
        Ok(EncoderLayer {
            attention: SelfAttentionHalf::new(attention, output, norm("layernorm_before")?, NormPlacement::Before),
            feed_forward: FeedForwardHalf::new(mlp, norm("layernorm_after")?, NormPlacement::Before),
        })
    }
}

/// Sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct LayerSizes {
    hidden: usize,
    heads: usize,
    inner: usize,
}

/// Sines and cosines of each position at wavelengths from 2π to 2π · 10000, side by side: (positions, width).
fn sinusoids(positions: usize, width: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let value = |i: usize| {
        let (position, at) = (i / width, i % width);
        let angle = position as f64 / 10000f64.powf(2.0 * (at / 2) as f64 / width as f64);
        (if at % 2 == 0 { angle.sin() } else { angle.cos() }) as f32
    };
    let table: Vec<f32> = (0..positions * width).map(value).collect();
    Tensor::from_vec(table, (positions, width), device)?.to_dtype(dtype)
}

/// Which patches of each video are hidden; of every one as many.
#[derive(Debug, Clone)]
struct Hidden {
    batch: usize,
    patches: usize,
    /// Numbers of patches, video by video.
    visible: Vec<usize>,
    masked: Vec<usize>,
}

impl Hidden {
    fn read(inputs: &Inputs, batch: usize, patches: usize) -> Result<Self, SessionError> {
        const NAME: &str = "bool_masked_pos";
        let mask = inputs.matrix(NAME)?;
        if mask.dims() != [batch, patches] {
            let reason = format!("has shape {:?}, expected {:?}", mask.dims(), [batch, patches]);
            return Err(SessionError::input(NAME, reason));
        }
        zero_or_one(NAME, &mask)?;
        let rows = mask.to_vec2::<i64>()?;
        let numbers = |wanted: i64| rows.iter().map(move |row| (0..patches).filter(move |&patch| row[patch] == wanted));
        let count = numbers(1).next().map_or(0, Iterator::count);
        if numbers(1).any(|masked| masked.count() != count) {
            return Err(SessionError::input(NAME, "hides other numbers of patches in other videos"));
        }
        if count == patches {
            return Err(SessionError::input(NAME, "hides every patch; leave some for the encoder"));
        }
        Ok(Self { batch, patches, visible: numbers(0).flatten().collect(), masked: numbers(1).flatten().collect() })
    }

    /// The rows of a table of all positions that belong to `numbers`.
    fn of_table(&self, numbers: &[usize]) -> Result<RowIndex> {
        let shape = (self.batch, numbers.len() / self.batch);
        RowIndex::new(self.patches, shape, numbers.iter().copied().map(Some))
    }

    /// The rows of (batch · patches) that belong to `numbers`.
    fn of_patches(&self, numbers: &[usize]) -> Result<RowIndex> {
        let each = numbers.len() / self.batch;
        let row = |(i, patch): (usize, &usize)| Some(i / each * self.patches + patch);
        RowIndex::new(self.batch * self.patches, (self.batch, each), numbers.iter().enumerate().map(row))
    }
}

struct Embeddings {
    projection: PatchEmbed3d,
    /// (patches, hidden)
    positions: Tensor,
}

impl Embeddings {
    fn load(cfg: &VideoMaeConfig, vb: VarBuilder) -> Result<Self> {
        let (dtype, hidden) = (activation_dtype(vb.dtype(), vb.device()), cfg.hidden_size);
        let projection = vb.pp("patch_embeddings.projection");
        Ok(Self {
            projection: PatchEmbed3d::load(cfg.num_channels, hidden, cfg.patch(), true, projection)?,
            positions: sinusoids(cfg.patches(), hidden, dtype, vb.device())?,
        })
    }

    /// (batch, frames, channels, height, width) -> (batch, patches that are visible, hidden)
    fn forward(&self, frames: &Tensor, hidden: Option<&Hidden>) -> Result<Tensor> {
        let video = frames.transpose(1, 2)?; // (batch, channels, frames, height, width)
        match hidden {
            None => {
                let (patches, width) = self.positions.dims2()?;
                let positions = self.positions.broadcast_as((video.dim(0)?, patches, width))?.contiguous()?;
                self.projection.forward_add(&video, &positions)
            }
            Some(hidden) => {
                let positions = gather(&self.positions, &hidden.of_table(&hidden.visible)?)?;
                self.projection.forward_rows_add(&video, &hidden.of_patches(&hidden.visible)?, &positions)
            }
        }
    }
}

/// The decoder of pre-training.
struct Decoder {
    encoder_to_decoder: Linear,
    /// (patches, hidden of the decoder)
    positions: Tensor,
    /// The same with the mask token added.
    masked_positions: Tensor,
    layers: Vec<EncoderLayer>,
    norm: LayerNorm,
    head: Linear,
}

impl Decoder {
    /// `vb` is the checkpoint's root.
    fn load(cfg: &VideoMaeConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, decoder) = (cfg.decoder_hidden_size, vb.pp("decoder"));
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let positions = sinusoids(cfg.patches(), hidden, dtype, vb.device())?;
        let mask_token = vb.get((1, 1, hidden), "mask_token")?.to_dtype(dtype)?.squeeze(0)?;
        let layers = cfg.decoder_num_hidden_layers;
        let layer = |i: usize| cfg.load_layer(cfg.decoder_layer(), i + 1 == layers, decoder.pp("decoder_layers").pp(i));
        Ok(Self {
            encoder_to_decoder: Linear::load(cfg.hidden_size, hidden, false, vb.pp("encoder_to_decoder"))?,
            masked_positions: positions.broadcast_add(&mask_token)?,
            positions,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            norm: LayerNorm::load(hidden, DEFAULT_EPS, decoder.pp("norm"))?,
            head: Linear::load(hidden, cfg.patch_values(), true, decoder.pp("head"))?,
        })
    }

    /// (batch, visible, hidden of the encoder) -> (batch, masked, values of a patch)
    fn forward(&self, x: &Tensor, hidden: &Hidden) -> Result<Tensor> {
        let visible = gather(&self.positions, &hidden.of_table(&hidden.visible)?)?;
        let visible = self.encoder_to_decoder.forward_add(x, &visible)?;
        let masked = gather(&self.masked_positions, &hidden.of_table(&hidden.masked)?)?;
        let drawn = Rows::Range { start: visible.dim(1)?, len: masked.dim(1)? };
        let x = Tensor::cat(&[visible, masked], 1)?; // (batch, patches, hidden)
        self.head.forward(&self.norm.forward(&encode(&self.layers, x, &drawn, None)?)?)
    }
}

/// What the decoder should have drawn, of the patches that were hidden: (batch, masked, values of a patch).
fn labels(cfg: &VideoMaeConfig, frames: &Tensor, hidden: &Hidden) -> Result<Tensor> {
    let ([times, rows, columns], [tubelet, height, width]) = (cfg.grid(), cfg.patch());
    let (batch, channels) = (hidden.batch, cfg.num_channels);
    let mut colours = frames.clone();
    if channels == 3 {
        let each = |x: &[f32; 3]| Tensor::new(x, frames.device())?.to_dtype(frames.dtype())?.reshape((3, 1, 1));
        roofbench_nn::cost::elementwise(frames.elem_count(), 2);
        colours = colours.broadcast_mul(&each(&COLOUR_STD)?)?.broadcast_add(&each(&COLOUR_MEAN)?)?;
    }
    let cut = colours.reshape(&[batch, times, tubelet, channels, rows, height, columns, width])?;
    // (batch · patches, pixels · channels)
    let cut = cut.permute([0, 1, 4, 6, 2, 5, 7, 3])?.reshape((batch * hidden.patches, cfg.patch_values()))?;
    let cut = gather(&cut, &hidden.of_patches(&hidden.masked)?)?; // (batch, masked, pixels · channels)
    if !cfg.norm_pix_loss {
        return Ok(cut);
    }
    roofbench_nn::cost::elementwise(cut.elem_count(), LABEL_FLOPS);
    let pixels = cut.reshape((cut.dim(0)? * cut.dim(1)?, cfg.patch_values() / channels, channels))?;
    let deviation = (pixels.var_keepdim(1)?.sqrt()? + 1e-6)?;
    pixels.broadcast_sub(&pixels.mean_keepdim(1)?)?.broadcast_div(&deviation)?.reshape(cut.shape())
}

/// FLOPs per value of a patch that is normalised: sum for the mean, difference, square and sum, division.
const LABEL_FLOPS: usize = 5;
/// FLOPs per value of the mean squared error: difference, square and sum.
const ERROR_FLOPS: usize = 3;

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    /// Of `VideoMAEModel`: nothing.
    States,
    /// Of `VideoMAEForVideoClassification`, with its number of labels.
    Classifier { labels: usize },
    /// Of `VideoMAEForPreTraining`.
    Decoder,
}

impl HeadKind {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "VideoMAEModel" => Ok(Self::States),
            "VideoMAEForVideoClassification" => Ok(Self::Classifier { labels: label_count(&spec.config)? }),
            "VideoMAEForPreTraining" => Ok(Self::Decoder),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    States,
    /// `fc_norm` is there with mean pooling.
    Classifier {
        fc_norm: Option<LayerNorm>,
        classifier: Linear,
    },
    Decoder(Box<Decoder>),
}

/// The encoder with the head of its class.
pub struct VideoMaeModel {
    cfg: VideoMaeConfig,
    embeddings: Embeddings,
    layers: Vec<EncoderLayer>,
    /// Absent with mean pooling.
    layernorm: Option<LayerNorm>,
    head: Head,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl VideoMaeModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, VideoMaeConfig::from_spec(spec)?);
        let videomae = if kind == HeadKind::States { vb.clone() } else { vb.pp("videomae") };
        let (pooled, hidden) = (cfg.use_mean_pooling, cfg.hidden_size);
        let norm = |wanted: bool, eps, vb: VarBuilder| wanted.then(|| LayerNorm::load(hidden, eps, vb)).transpose();
        let (layers, first) = (cfg.num_hidden_layers, cfg.first_token(kind));
        let layer =
            |i: usize| cfg.load_layer(cfg.layer(), first && i + 1 == layers, videomae.pp("encoder.layer").pp(i));
        Ok(Self {
            embeddings: Embeddings::load(&cfg, videomae.pp("embeddings"))?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            layernorm: norm(!pooled, cfg.layer_norm_eps, videomae.pp("layernorm"))?,
            head: match kind {
                HeadKind::States => Head::States,
                HeadKind::Classifier { labels } => Head::Classifier {
                    fc_norm: norm(pooled, DEFAULT_EPS, vb.pp("fc_norm"))?,
                    classifier: Linear::load(hidden, labels, true, vb.pp("classifier"))?,
                },
                HeadKind::Decoder => Head::Decoder(Box::new(Decoder::load(&cfg, vb)?)),
            },
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, video: &Video) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let frames = video.frames.to_device(&self.device)?.to_dtype(dtype)?;
        let rows = Rows::from(self.cfg.first_token(self.kind).then_some(1));
        let x = self.embeddings.forward(&frames, video.hidden.as_ref())?; // (batch, visible, hidden)
        let mut x = encode(&self.layers, x, &rows, None)?;
        if let Some(layernorm) = &self.layernorm {
            x = layernorm.forward(&x)?;
        }
        Ok(match (&self.head, &video.hidden) {
            (Head::Classifier { fc_norm: Some(fc_norm), classifier }, _) => {
                let mean = global_avg_pool_2d(&x.unsqueeze(1)?)?; // (batch, hidden)
                named([("logits", classifier.forward(&fc_norm.forward(&mean)?)?)])
            }
            (Head::Classifier { fc_norm: None, classifier }, _) => {
                named([("logits", classifier.forward(&x.squeeze(1)?)?)])
            }
            (Head::Decoder(decoder), Some(hidden)) => {
                let logits = decoder.forward(&x, hidden)?;
                roofbench_nn::cost::elementwise(logits.elem_count(), ERROR_FLOPS);
                let loss = (&logits - labels(&self.cfg, &frames, hidden)?)?.sqr()?.mean_all()?;
                named([("loss", loss), ("logits", logits)])
            }
            _ => named([("last_hidden_state", x)]),
        })
    }
}

impl VideoMaeConfig {
    /// Whether the first patch is all that is used of the last layer.
    fn first_token(&self, kind: HeadKind) -> bool {
        matches!(kind, HeadKind::Classifier { .. }) && !self.use_mean_pooling
    }

    /// FLOPs and bytes of one forward pass.
    fn cost(&self, kind: HeadKind, video: &Video, bytes: u64) -> Cost {
        let [batch, patches, hidden, values] =
            [video.frames.dims()[0], self.patches(), self.hidden_size, self.patch_values()].map(|size| size as u64);
        let pixels = video.frames.elem_count() as u64;
        let seq = video.hidden.as_ref().map_or(patches, |hidden| hidden.visible.len() as u64 / batch);
        let tokens = batch * seq;
        let linear = |rows, input, output, bias| cost::linear(rows, input, output, bias, bytes);
        let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
        // rows behind the last layer
        let used = if self.first_token(kind) { 1 } else { seq };
        let encoder = cost::input(pixels, bytes)
            + linear(tokens, values, hidden, true) // of visible patches alone
            + cost::elementwise(tokens * hidden, 1) // positions, a table that is no weight
            + self.layer_cost(self.layer(), bytes).encoder_of(self.num_hidden_layers, [batch, seq], used)
            + if self.use_mean_pooling { Cost::default() } else { norm(batch * used, hidden) };
        let head = match kind {
            HeadKind::States => Cost::default(),
            HeadKind::Classifier { labels } => {
                let pooling = cost::elementwise(tokens * hidden, 1) + norm(batch, hidden);
                linear(batch, hidden, labels as u64, true)
                    + if self.use_mean_pooling { pooling } else { Cost::default() }
            }
            HeadKind::Decoder => {
                let (width, masked) = (self.decoder_hidden_size as u64, patches - seq);
                let layer = self.layer_cost(self.decoder_layer(), bytes);
                let drawn = batch * masked * values;
                let unnormalised = if self.num_channels == 3 { cost::elementwise(pixels, 2) } else { Cost::default() };
                let label_flops = if self.norm_pix_loss { LABEL_FLOPS } else { 0 };
                linear(tokens, hidden, width, false)
                    + cost::elementwise(tokens * width, 1) // positions
                    // the mask token, and the rows that it gives
                    + Cost { weight_bytes: width * bytes, ..Cost::default() }
                    + Cost { activation_bytes: batch * masked * width * bytes, ..Cost::default() }
                    + layer.encoder_of(self.decoder_num_hidden_layers, [batch, patches], masked) // only these are drawn
                    + norm(batch * masked, width)
                    + linear(batch * masked, width, values, true)
                    + unnormalised
                    + cost::elementwise(drawn, (label_flops + ERROR_FLOPS) as u64)
            }
        };
        encoder + head
    }
}

/// The arguments of `forward`, checked.
struct Video<'a> {
    /// (batch, frames, channels, height, width)
    frames: &'a Tensor,
    hidden: Option<Hidden>,
}

impl<'a> Video<'a> {
    fn read(cfg: &VideoMaeConfig, kind: HeadKind, call: &'a Call) -> Result<Self, SessionError> {
        let names = match kind {
            HeadKind::Classifier { .. } => &["pixel_values"][..],
            _ => &["pixel_values", "bool_masked_pos"],
        };
        let inputs = Inputs::forward(call, names, &[])?;
        let frames = inputs.floats("pixel_values")?;
        let (channels, HeightWidth { height, width }) = (cfg.num_channels, cfg.image_size);
        // frames beyond whole patches are left out
        let fits = |found: usize| match kind {
            HeadKind::Decoder => found == cfg.num_frames,
            _ => found / cfg.tubelet_size == cfg.grid()[0],
        };
        if !matches!(frames.dims(), [_, found, c, h, w] if fits(*found) && [*c, *h, *w] == [channels, height, width]) {
            let expected = format!("(batch, {}, {channels}, {height}, {width})", cfg.num_frames);
            let fields = "num_frames, num_channels and image_size";
            let reason = format!("has shape {:?}, expected {expected} by {fields} of config.json", frames.dims());
            return Err(SessionError::input("pixel_values", reason));
        }
        let given = kind == HeadKind::Decoder || call.inputs.contains_key("bool_masked_pos");
        let hidden = given.then(|| Hidden::read(&inputs, frames.dim(0)?, cfg.patches())).transpose()?;
        if kind == HeadKind::Decoder && hidden.as_ref().is_some_and(|hidden| hidden.masked.is_empty()) {
            return Err(SessionError::input("bool_masked_pos", "hides no patch; there is nothing to draw"));
        }
        Ok(Self { frames, hidden })
    }
}

impl Session for VideoMaeModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Video::read(&self.cfg, self.kind, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let video = Video::read(&self.cfg, self.kind, call)?;
        Ok(forward_phase(self.cfg.cost(self.kind, &video, self.dtype.size_in_bytes() as u64)))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::json;

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "image_size": [4, 6], "patch_size": 2, "num_channels": 3, "num_frames": 2, "tubelet_size": 1,
            "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6, "num_labels": 3,
            "decoder_hidden_size": 4, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1,
            "decoder_intermediate_size": 5,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("videomae", class, config)
    }

    fn call(shape: &[usize], mask: Option<Vec<u8>>) -> Call {
        let cpu = &Device::Cpu;
        let pixel_values = synthetic::tensor("input:pixel_values", shape, 0, DType::F32, cpu).expect("values");
        let mut inputs = Tensors::from([("pixel_values".to_owned(), pixel_values)]);
        if let Some(mask) = mask {
            let shape = (shape[0], mask.len() / shape[0]);
            inputs.insert("bool_masked_pos".into(), Tensor::from_vec(mask, shape, cpu).expect("a mask"));
        }
        Call { method: "forward".into(), inputs, arguments: Default::default() }
    }

    fn model(spec: &ModelSpec) -> Result<VideoMaeModel, SessionError> {
        let weights =
            Weights::open(&Source::Synthetic { seed: 0 }, aliases(spec), &spec.class, &HubOptions::default())?;
        VideoMaeModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let (kind, cfg) = (HeadKind::of(&spec).expect("a class"), VideoMaeConfig::from_spec(&spec).expect("a config"));
        cfg.cost(kind, &Video::read(&cfg, kind, call).expect("a video"), 4)
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // 2 x 2 x 3 patches of 12 values, width 4, inner width 6, 2 heads of 2, 3 labels, mean pooling
        let embeddings = 12 * (2 * 12 * 4 + 4) + 12 * 4; // projection, positions
        let layer = 7 * 12 * 4 // norm
            + 12 * (2 * 4 * 12 + 12) // query, key, value
            + 2 * (12 * 12) * (4 * 2 + 5) // two products over pairs of 2 heads, softmax
            + 12 * (2 * 4 * 4 + 4 + 4) // output, residual
            + 7 * 12 * 4
            + 12 * (2 * 4 * 6 + 6 + 6) // up, activation
            + 12 * (2 * 6 * 4 + 4 + 4); // down, residual
        let head = 12 * 4 + 7 * 4 + 2 * 4 * 3 + 3; // mean, norm, classifier
        let weights =
            (12 * 4 + 4) + (8 + (4 * 12 + 12) + (4 * 4 + 4) + 8 + (4 * 6 + 6) + (6 * 4 + 4)) + 8 + (4 * 3 + 3);
        let activations = 2 * 3 * 24 + 12 * 4 + 12 * (4 + 12 + 4 + 4 + 4 + 6 + 4) + 4 + 3;
        let expected = Cost {
            flops: embeddings + layer + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        let one = call(&[1, 2, 3, 4, 6], None);
        assert_eq!(cost_of("VideoMAEForVideoClassification", json!({}), &one), expected);
    }

    #[test]
    fn cost_of_videomae_base_is_the_published_one() {
        let class = "VideoMAEForVideoClassification";
        let base = json!({
            "image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2, "hidden_size": 768,
            "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 400,
        });
        let cost = cost_of(class, base, &call(&[1, 16, 3, 224, 224], None));
        // VideoMAE's model zoo: 180 G multiply-adds of ViT-B at 16 x 224, without norms, softmax and GELU
        let ratio = cost.flops as f64 / 2.0 / 180.5e9;
        assert!((1.0..1.02).contains(&ratio), "{ratio} of the published count");
        // 86.5 M parameters, each read once, and as a bias of keys the zeros between those of queries and values
        assert_eq!(cost.weight_bytes, 4 * (86_534_800 + 12 * 768));
    }

    #[test]
    fn every_class_costs_what_it_runs() -> Result<(), SessionError> {
        let masked: Vec<u8> = [[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1]].concat();
        for (class, changes, mask) in [
            ("VideoMAEModel", json!({}), None),
            ("VideoMAEModel", json!({"use_mean_pooling": false, "qkv_bias": false}), Some(masked.clone())),
            ("VideoMAEForVideoClassification", json!({}), None),
            ("VideoMAEForVideoClassification", json!({"use_mean_pooling": false, "num_hidden_layers": 2}), None),
            ("VideoMAEForPreTraining", json!({"decoder_num_hidden_layers": 2}), Some(masked.clone())),
            ("VideoMAEForPreTraining", json!({"norm_pix_loss": false}), Some(masked)),
        ] {
            let (spec, call) = (spec(class, changes.clone()), call(&[2, 2, 3, 4, 6], mask));
            let mut model = model(&spec)?;
            let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
            assert!(outputs?.values().all(|output| output.elem_count() > 0));
            assert_eq!(recorded.flops, model.cost(&call)?[0].cost.flops, "{class} {changes}");
        }
        Ok(())
    }

    #[test]
    fn the_loss_is_the_distance_from_normalised_patches() -> Result<(), SessionError> {
        let mask: Vec<u8> = (0..12).map(|i| u8::from(i == 7)).collect();
        let call = call(&[1, 2, 3, 4, 6], Some(mask));
        for norm in [true, false] {
            let outputs =
                model(&spec("VideoMAEForPreTraining", json!({"norm_pix_loss": norm})))?.call(&call, &mut Unobserved)?;
            let logits = outputs["logits"].flatten_all()?.to_vec1::<f32>()?; // of 4 pixels, 3 channels each
            // patch 7 of 2 x 2 x 3: second frame, first row, second column
            let frame = call.inputs["pixel_values"].get(0)?.get(1)?.to_vec3::<f32>()?;
            let mut expected = 0.0;
            for channel in 0..3 {
                let (mean, std) = (COLOUR_MEAN[channel], COLOUR_STD[channel]);
                let at = |row: usize, column: usize| frame[channel][row][2 + column] * std + mean;
                let mut pixels = [at(0, 0), at(0, 1), at(1, 0), at(1, 1)];
                if norm {
                    let mean = pixels.iter().sum::<f32>() / 4.0;
                    let deviation = (pixels.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 3.0).sqrt();
                    pixels = pixels.map(|x| (x - mean) / (deviation + 1e-6));
                }
                expected +=
                    pixels.iter().zip(logits[channel..].iter().step_by(3)).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            }
            let loss = outputs["loss"].to_scalar::<f32>()?;
            assert!((loss - expected / 12.0).abs() < 1e-5, "{loss}, not {}", expected / 12.0);
        }
        Ok(())
    }

    #[test]
    fn malformed_configs_and_inputs_are_named() {
        let config = |class: &str, changes: Value| {
            VideoMaeConfig::from_spec(&spec(class, changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        for (changes, start) in [
            (json!({"num_attention_heads": 3}), "config.json: `hidden_size`: 4 is not a multiple"),
            (json!({"tubelet_size": 3}), "config.json: `tubelet_size`: is larger than num_frames"),
            (json!({"patch_size": 5}), "config.json: `patch_size`: is larger than image_size"),
            (json!({"image_size": 5}), "config.json: `image_size`: must be a multiple of patch_size"),
            (json!({"norm_pix_loss": false, "num_channels": 1}), "config.json: `norm_pix_loss`: is false"),
            (json!({"decoder_num_attention_heads": 3}), "config.json: `decoder_hidden_size`: 4 is not a multiple"),
        ] {
            let found = config("VideoMAEForPreTraining", changes);
            assert!(found.starts_with(start), "{found}");
        }
        let input = |shape: &[usize], mask: Option<Vec<u8>>| {
            let spec = spec("VideoMAEForPreTraining", json!({}));
            let cfg = VideoMaeConfig::from_spec(&spec).expect("a config");
            Video::read(&cfg, HeadKind::Decoder, &call(shape, mask)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let shape = [2, 2, 3, 4, 6];
        let even: Vec<u8> = (0..24).map(|i| i % 2).collect();
        assert_eq!(input(&shape, Some(even.clone())), "");
        assert!(input(&[2, 3, 3, 4, 6], Some(even)).contains("expected (batch, 2, 3, 4, 6) by num_frames"));
        assert_eq!(input(&shape, None), "input `bool_masked_pos`: is missing");
        assert!(input(&shape, Some(vec![1; 20])).ends_with("has shape [2, 10], expected [2, 12]"));
        assert!(input(&shape, Some(vec![1; 24])).contains("hides every patch"));
        assert!(input(&shape, Some(vec![0; 24])).contains("hides no patch"));
        let uneven = (0..24).map(|i| u8::from(i == 3)).collect();
        assert!(input(&shape, Some(uneven)).contains("other numbers of patches"));
    }
}
