//! ImageBind: six towers, for pictures and videos, texts, sounds, depth, heat and motion, whose embeddings share one space.
//! Source: ImageBind (arXiv:2305.05665). Mirrors `ImageBindModel` of github.com/facebookresearch/ImageBind, which is not
//! part of `transformers`; config.json holds the arguments of its constructor, and `image_size`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, AttentionRows, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, Rows, SelfAttention};
use roofbench_nn::conv::{Conv2d, Conv2dConfig};
use roofbench_nn::embedding::Embedding;
use roofbench_nn::gather::RowIndex;
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::{PatchEmbed, PatchEmbed3d};
use roofbench_nn::resize;
use roofbench_vision::models::activation_dtype;
use serde::Deserialize;

use super::clip::{UNKNOWN_END, end};
use super::{unit_rows, unit_rows_cost};

/// The classes that run.
pub const CLASSES: &[&str] = &["ImageBindModel"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // the causal mask as a buffer
    AliasRule::drop(r"^modality_preprocessors\.text\.mask$", AliasScope::Always),
];

const VOCAB: usize = 49408;
/// Tokens of a text, which ends in padding.
const CONTEXT: usize = 77;
/// Acceleration and rotation about three axes each.
const MOTION_CHANNELS: usize = 6;
const MOTION_LENGTH: usize = 2000;
/// Steps of motion in a token.
const MOTION_PATCH: usize = 8;
/// How often a picture is shown, as a video.
const REPEATS: usize = 2;
/// Added to the variance within the trunks and in the heads.
const EPS: f64 = 1e-6;
/// The same behind the stems.
const STEM_EPS: f64 = 1e-5;
/// The largest factor of an embedding.
const LARGEST_SCALE: f64 = 100.0;

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as the
/// class's constructor has it. Its rates of dropped paths matter in training alone; `imu_kernel_size` it doesn't heed.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ImageBindConfig {
    /// Height and width of pictures, of depth and of heat that the positions were learned on.
    pub image_size: usize,
    /// Frames of a video that the positions were learned on.
    pub video_frames: usize,
    /// Frames, rows and columns of a patch of a video.
    pub kernel_size: [usize; 3],
    /// Width of an embedding.
    pub out_embed_dim: usize,
    /// Width of the tower of pictures and videos.
    pub vision_embed_dim: usize,
    /// Its layers.
    pub vision_num_blocks: usize,
    /// Its attention heads.
    pub vision_num_heads: usize,
    /// Width of the tower of sounds.
    pub audio_embed_dim: usize,
    /// Its layers.
    pub audio_num_blocks: usize,
    /// Its attention heads.
    pub audio_num_heads: usize,
    /// Rows and columns of a patch of a spectrogram.
    pub audio_kernel_size: usize,
    /// Rows, and columns, from one patch to the next.
    pub audio_stride: usize,
    /// Rows of a spectrogram.
    pub audio_num_mel_bins: usize,
    /// Columns of a spectrogram.
    pub audio_target_len: usize,
    /// Width of the tower of texts.
    pub text_embed_dim: usize,
    /// Its layers.
    pub text_num_blocks: usize,
    /// Its attention heads.
    pub text_num_heads: usize,
    /// Width of the tower of depth.
    pub depth_embed_dim: usize,
    /// Rows and columns of a patch of depth.
    pub depth_kernel_size: usize,
    /// Layers of its tower.
    pub depth_num_blocks: usize,
    /// Its attention heads.
    pub depth_num_heads: usize,
    /// Width of the tower of heat.
    pub thermal_embed_dim: usize,
    /// Rows and columns of a patch of heat.
    pub thermal_kernel_size: usize,
    /// Layers of its tower.
    pub thermal_num_blocks: usize,
    /// Its attention heads.
    pub thermal_num_heads: usize,
    /// Width of the tower of motion.
    pub imu_embed_dim: usize,
    /// Its layers.
    pub imu_num_blocks: usize,
    /// Its attention heads.
    pub imu_num_heads: usize,
}

impl Default for ImageBindConfig {
    fn default() -> Self {
        Self {
            image_size: 224,
            video_frames: 2,
            kernel_size: [2, 14, 14],
            out_embed_dim: 768,
            vision_embed_dim: 1024,
            vision_num_blocks: 24,
            vision_num_heads: 16,
            audio_embed_dim: 768,
            audio_num_blocks: 12,
            audio_num_heads: 12,
            audio_kernel_size: 16,
            audio_stride: 10,
            audio_num_mel_bins: 128,
            audio_target_len: 204,
            text_embed_dim: 768,
            text_num_blocks: 12,
            text_num_heads: 12,
            depth_embed_dim: 384,
            depth_kernel_size: 16,
            depth_num_blocks: 12,
            depth_num_heads: 8,
            thermal_embed_dim: 768,
            thermal_kernel_size: 16,
            thermal_num_blocks: 12,
            thermal_num_heads: 12,
            imu_embed_dim: 512,
            imu_num_blocks: 6,
            imu_num_heads: 8,
        }
    }
}

/// What a tower is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Modality {
    Vision,
    Text,
    Audio,
    Depth,
    Thermal,
    Imu,
}

impl Modality {
    const ALL: [Self; 6] = [Self::Vision, Self::Text, Self::Audio, Self::Depth, Self::Thermal, Self::Imu];

    /// In arguments, outputs and checkpoints.
    fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Text => "text",
            Self::Audio => "audio",
            Self::Depth => "depth",
            Self::Thermal => "thermal",
            Self::Imu => "imu",
        }
    }

    /// What its tower is among the components of a call.
    fn phase(self) -> Phase {
        match self {
            Self::Vision => Phase::Vision,
            Self::Text => Phase::Text,
            Self::Audio => Phase::Audio,
            Self::Depth | Self::Thermal | Self::Imu => Phase::Sensor,
        }
    }

    /// Whether attention has a key and a value beside those of the tokens.
    fn has_extra_key(self) -> bool {
        !matches!(self, Self::Vision | Self::Text)
    }

    /// Whether a class token stands before the others; a text is embedded as its end token.
    fn has_class_token(self) -> bool {
        self != Self::Text
    }
}

impl ImageBindConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let [frames, height, width] = cfg.kernel_size;
        config::sizes(&[
            ("image_size", cfg.image_size),
            ("video_frames", cfg.video_frames),
            ("kernel_size", frames),
            ("kernel_size", height),
            ("kernel_size", width),
            ("out_embed_dim", cfg.out_embed_dim),
            ("audio_kernel_size", cfg.audio_kernel_size),
            ("audio_stride", cfg.audio_stride),
            ("audio_num_mel_bins", cfg.audio_num_mel_bins),
            ("audio_target_len", cfg.audio_target_len),
            ("depth_kernel_size", cfg.depth_kernel_size),
            ("thermal_kernel_size", cfg.thermal_kernel_size),
        ])?;
        for modality in Modality::ALL {
            let TowerSizes { hidden, blocks, heads } = cfg.tower(modality);
            let field = |end: &str| format!("{}_{end}", modality.name());
            let (embed_dim, num_heads) = (field("embed_dim"), field("num_heads"));
            config::sizes(&[
                (embed_dim.as_str(), hidden),
                (num_heads.as_str(), heads),
                (field("num_blocks").as_str(), blocks),
            ])?;
            config::multiple((embed_dim.as_str(), hidden), (num_heads.as_str(), heads))?;
        }
        let vision = cfg.vision_grid([cfg.video_frames, cfg.image_size, cfg.image_size]);
        for (field, count) in [
            ("kernel_size", vision.iter().product()),
            ("audio_kernel_size", cfg.audio_grid([cfg.audio_num_mel_bins, cfg.audio_target_len]).iter().product()),
            ("depth_kernel_size", cfg.image_size / cfg.depth_kernel_size),
            ("thermal_kernel_size", cfg.image_size / cfg.thermal_kernel_size),
        ] {
            if count == 0usize {
                return Err(config::invalid(field, "is larger than what is cut into patches"));
            }
        }
        Ok(cfg)
    }

    fn tower(&self, modality: Modality) -> TowerSizes {
        let (hidden, blocks, heads) = match modality {
            Modality::Vision => (self.vision_embed_dim, self.vision_num_blocks, self.vision_num_heads),
            Modality::Text => (self.text_embed_dim, self.text_num_blocks, self.text_num_heads),
            Modality::Audio => (self.audio_embed_dim, self.audio_num_blocks, self.audio_num_heads),
            Modality::Depth => (self.depth_embed_dim, self.depth_num_blocks, self.depth_num_heads),
            Modality::Thermal => (self.thermal_embed_dim, self.thermal_num_blocks, self.thermal_num_heads),
            Modality::Imu => (self.imu_embed_dim, self.imu_num_blocks, self.imu_num_heads),
        };
        TowerSizes { hidden, blocks, heads }
    }

    /// Patches of a video in time, rows and columns; a single frame is repeated.
    fn vision_grid(&self, [frames, height, width]: [usize; 3]) -> [usize; 3] {
        let frames = if frames == 1 { REPEATS } else { frames };
        let [f, h, w] = self.kernel_size;
        [frames / f, height / h, width / w]
    }

    /// Patches of a spectrogram, which overlap, in rows and columns.
    fn audio_grid(&self, size: [usize; 2]) -> [usize; 2] {
        size.map(|n| n.checked_sub(self.audio_kernel_size).map_or(0, |rest| rest / self.audio_stride + 1))
    }

    /// Tokens that positions were learned for, without the class token.
    fn learned(&self, modality: Modality) -> usize {
        let square = |kernel: usize| (self.image_size / kernel).pow(2);
        match modality {
            Modality::Vision => {
                self.vision_grid([self.video_frames, self.image_size, self.image_size]).iter().product()
            }
            Modality::Text => CONTEXT,
            Modality::Audio => self.audio_grid([self.audio_num_mel_bins, self.audio_target_len]).iter().product(),
            Modality::Depth => square(self.depth_kernel_size),
            Modality::Thermal => square(self.thermal_kernel_size),
            Modality::Imu => MOTION_LENGTH / MOTION_PATCH,
        }
    }
}

/// Width, layers and attention heads of a tower.
#[derive(Debug, Clone, Copy)]
struct TowerSizes {
    hidden: usize,
    blocks: usize,
    heads: usize,
}

impl TowerSizes {
    /// Width inside the feed-forward half.
    fn inner(&self) -> usize {
        4 * self.hidden
    }
}

/// From an input to tokens.
enum Stem {
    Video(PatchEmbed3d),
    /// Of one channel: depth, heat, and motion, whose channels are the rows of a picture.
    Picture(PatchEmbed, LayerNorm),
    Spectrogram(Conv2d, LayerNorm),
    Text(Embedding),
}

impl Stem {
    /// `vb` is the modality's preprocessor.
    fn load(cfg: &ImageBindConfig, modality: Modality, vb: VarBuilder) -> Result<Self> {
        let hidden = cfg.tower(modality).hidden;
        let norm = |stem: &str| LayerNorm::load(hidden, STEM_EPS, vb.pp(stem).pp("norm_layer"));
        let picture = |kernel: usize, stem: &str| {
            let patches = PatchEmbed::load(1, hidden, (kernel, kernel), false, vb.pp(stem).pp("proj"))?;
            Ok::<_, candle_core::Error>(Self::Picture(patches, norm(stem)?))
        };
        match modality {
            Modality::Vision => {
                let proj = vb.pp("rgbt_stem.proj.1"); // behind the repetition of a single frame
                Ok(Self::Video(PatchEmbed3d::load(3, hidden, cfg.kernel_size, false, proj)?))
            }
            Modality::Text => Ok(Self::Text(Embedding::load(VOCAB, hidden, vb.pp("token_embedding"))?)),
            Modality::Audio => {
                let conv = Conv2dConfig::new(cfg.audio_kernel_size).stride(cfg.audio_stride);
                let conv = Conv2d::load(1, hidden, conv, false, vb.pp("rgbt_stem.proj"))?;
                Ok(Self::Spectrogram(conv, norm("rgbt_stem")?))
            }
            Modality::Depth => picture(cfg.depth_kernel_size, "depth_stem"),
            Modality::Thermal => picture(cfg.thermal_kernel_size, "rgbt_stem"),
            Modality::Imu => {
                let weight = vb.get((hidden, MOTION_CHANNELS * MOTION_PATCH), "imu_stem.proj.weight")?;
                let weight = weight.reshape((hidden, 1, MOTION_CHANNELS, MOTION_PATCH))?;
                Ok(Self::Picture(PatchEmbed::new(&weight, None)?, norm("imu_stem")?))
            }
        }
    }

    /// (items, tokens, hidden), without the class token
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Video(patches) => {
                let (items, channels, frames, height, width) = x.dims5()?;
                let frames = if frames == 1 { REPEATS } else { frames };
                patches.forward(&x.broadcast_as((items, channels, frames, height, width))?)
            }
            Self::Picture(patches, norm) => norm.forward(&patches.forward(x)?),
            Self::Spectrogram(conv, norm) => {
                let (items, _, rows, columns) = x.dims4()?;
                norm.forward(&conv.forward(&x.reshape((items, rows, columns, 1))?)?.flatten(1, 2)?)
            }
            Self::Text(tokens) => tokens.forward(x),
        }
    }
}

/// Which of the learned positions of a video's patches are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Positions {
    Learned,
    /// Those of the first frames, stretched over a square of so many rows and columns.
    FirstFrames {
        side: usize,
    },
}

struct Tower {
    stem: Stem,
    /// (1, 1, hidden)
    cls_token: Option<Tensor>,
    /// (1, tokens, hidden), the class token's first
    positions: Tensor,
    /// Of the vision tower.
    pre_norm: Option<LayerNorm>,
    blocks: Vec<EncoderLayer>,
    head_norm: LayerNorm,
    head: Linear,
    /// What the embedding, which has length 1, is multiplied by.
    scale: Option<f64>,
}

impl Tower {
    /// `vb` is the checkpoint's root.
    fn load(cfg: &ImageBindConfig, modality: Modality, vb: VarBuilder) -> Result<Self> {
        let (sizes, name) = (cfg.tower(modality), modality.name());
        let TowerSizes { hidden, blocks, .. } = sizes;
        let [preprocessor, trunk, head] =
            ["preprocessors", "trunks", "heads"].map(|part| vb.pp(format!("modality_{part}")).pp(name));
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let class_tokens = usize::from(modality.has_class_token());
        let positions = match modality {
            Modality::Text | Modality::Imu => "pos_embed",
            _ => "pos_embedding_helper.pos_embed",
        };
        let positions = preprocessor.get((1, class_tokens + cfg.learned(modality), hidden), positions)?;
        let cls_token =
            modality.has_class_token().then(|| preprocessor.get((1, 1, hidden), "cls_token")?.to_dtype(dtype));
        let pre_norm =
            (modality == Modality::Vision).then(|| LayerNorm::load(hidden, EPS, trunk.pp("pre_transformer_layer.0")));
        let block = |i: usize| {
            let last = i + 1 == blocks;
            // the only query of a text's last layer is its end, which sees what a mask shows
            let pattern = if modality == Modality::Text && !last { Pattern::Causal } else { Pattern::Full };
            load_block(sizes, pattern, last, modality.has_extra_key(), trunk.pp("blocks").pp(i))
        };
        let [head_norm, linear] = match modality {
            Modality::Text => ["proj.0", "proj.1"],
            Modality::Imu => ["0", "3"], // a dropout lies between
            _ => ["0", "2"],
        };
        let scale = (modality != Modality::Vision).then(|| {
            let scale = vb.pp("modality_postprocessors").pp(name).get((), "1.log_logit_scale")?.to_dtype(DType::F32)?;
            Ok::<_, candle_core::Error>(f64::from(scale.to_scalar::<f32>()?).exp().min(LARGEST_SCALE))
        });
        Ok(Self {
            stem: Stem::load(cfg, modality, preprocessor)?,
            cls_token: cls_token.transpose()?,
            positions: positions.to_dtype(dtype)?,
            pre_norm: pre_norm.transpose()?,
            blocks: (0..blocks).map(block).collect::<Result<_>>()?,
            head_norm: LayerNorm::load(hidden, EPS, head.pp(head_norm))?,
            head: Linear::load(hidden, cfg.out_embed_dim, false, head.pp(linear))?,
            scale: scale.transpose()?,
        })
    }

    /// (items, ...) -> (items, width of an embedding)
    fn forward(&self, x: &Tensor, input: &Input) -> Result<Tensor> {
        let mut x = self.stem.forward(x)?;
        let (items, _, hidden) = x.dims3()?;
        if let Some(cls_token) = &self.cls_token {
            x = Tensor::cat(&[&cls_token.broadcast_as((items, 1, hidden))?.contiguous()?, &x], 1)?;
        }
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        x = x.broadcast_add(&self.positions(input)?)?;
        if let Some(norm) = &self.pre_norm {
            x = norm.forward(&x)?;
        }
        let (rows, mask) = match &input.ends {
            Some(ends) => {
                let row = |(item, end): (usize, &usize)| Some(item * CONTEXT + end);
                let rows = RowIndex::new(items * CONTEXT, (items, 1), ends.iter().enumerate().map(row))?;
                let seen = ends.iter().flat_map(|end| (0..CONTEXT).map(move |i| u8::from(i <= *end)));
                let seen = Tensor::from_iter(seen, &Device::Cpu)?.reshape((items, CONTEXT))?;
                (Rows::Picked(rows), Mask::padding(&seen)?)
            }
            None => (Rows::Range { start: 0, len: 1 }, None),
        };
        let x = encode(&self.blocks, x, &rows, mask.as_ref())?; // (items, 1, hidden)
        let x = self.head.forward(&self.head_norm.forward(&x.squeeze(1)?)?)?; // (items, width)
        let x = unit_rows(&x)?;
        match self.scale {
            Some(scale) => {
                roofbench_nn::cost::elementwise(x.elem_count(), 1);
                x * scale
            }
            None => Ok(x),
        }
    }

    fn positions(&self, input: &Input) -> Result<Tensor> {
        let Positions::FirstFrames { side } = input.positions else { return Ok(self.positions.clone()) };
        let (class, hidden) = (self.positions.narrow(1, 0, 1)?, self.positions.dim(2)?);
        let from = input.learned_side;
        let mut grid = self.positions.narrow(1, 1, from * from)?.reshape((from, from, hidden))?;
        if side != from {
            grid = resize::bicubic_grid(&grid, (side, side), false)?.to_dtype(self.positions.dtype())?;
        }
        Tensor::cat(&[class, grid.reshape((1, side * side, hidden))?], 1)
    }
}

/// Of the `last` layer one row is wanted.
fn load_block(
    sizes: TowerSizes,
    pattern: Pattern,
    last: bool,
    extra_key: bool,
    vb: VarBuilder,
) -> Result<EncoderLayer> {
    let (TowerSizes { hidden, heads, .. }, attn) = (sizes, vb.pp("attn"));
    let attention = Attention { heads, kv_heads: heads, head_dim: hidden / heads, scale: None, pattern };
    let weight = attn.get((3 * hidden, hidden), "in_proj_weight")?;
    let bias = attn.get(3 * hidden, "in_proj_bias")?;
    let mut attention = SelfAttention::from_weights(&weight, Some(&bias), attention, last)?;
    if extra_key {
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let extra = |name: &str| attn.get((1, 1, hidden), name)?.to_dtype(dtype);
        attention = attention.with_extra(extra("bias_k")?, extra("bias_v")?);
    }
    let output = Linear::load(hidden, hidden, true, attn.pp("out_proj"))?;
    let mlp = Mlp::load([hidden, sizes.inner()], Activation::Gelu, true, ["fc1", "fc2"], vb.pp("mlp"))?;
    let norm = |name: &str| LayerNorm::load(hidden, EPS, vb.pp(name));
    Ok(EncoderLayer {
        attention: SelfAttentionHalf::new(attention, output, norm("norm_1")?, NormPlacement::Before),
        feed_forward: FeedForwardHalf::new(mlp, norm("norm_2")?, NormPlacement::Before),
    })
}

/// An argument of `forward`, checked.
struct Input {
    modality: Modality,
    /// (items, ...): clips are items, whose embeddings are averaged. Videos are (items, 3, frames, height, width), motion is
    /// (items, 1, channels, length), the others of one channel (items, 1, height, width), texts (items, tokens).
    values: Tensor,
    /// Clips of each, where there are any.
    clips: Option<usize>,
    /// Tokens of an item without the class token.
    tokens: usize,
    positions: Positions,
    /// Rows, and columns, of patches in the frames that positions were learned on, where they are stretched.
    learned_side: usize,
    /// Where each text ends.
    ends: Option<Vec<usize>>,
}

impl Input {
    /// Those of `call`, at least one.
    fn read_all(cfg: &ImageBindConfig, call: &Call) -> Result<Vec<Self>, SessionError> {
        let names = Modality::ALL.map(Modality::name);
        let inputs = Inputs::forward(call, &names, &[])?;
        let mut read = Vec::new();
        for modality in Modality::ALL {
            let given = match modality {
                Modality::Text => inputs.optional_matrix("text")?.map(|ids| Self::text(&ids)).transpose()?,
                _ => inputs
                    .optional_floats(modality.name())?
                    .map(|values| Self::floats(cfg, modality, values))
                    .transpose()?,
            };
            read.extend(given);
        }
        if read.is_empty() {
            return Err(SessionError::input(names[0], format!("is missing; give one or more of {}", names.join(", "))));
        }
        Ok(read)
    }

    fn text(ids: &Tensor) -> Result<Self, SessionError> {
        in_range("text", ids, "the size of the vocabulary", VOCAB)?;
        if ids.dim(1)? != CONTEXT {
            let reason = format!("has shape {:?}, expected (batch, {CONTEXT}): fill texts up with 0", ids.dims());
            return Err(SessionError::input("text", reason));
        }
        let ends = ids.to_vec2::<i64>()?.iter().map(|row| end(row, UNKNOWN_END)).collect();
        Ok(Self {
            modality: Modality::Text,
            values: ids.clone(),
            clips: None,
            tokens: CONTEXT,
            positions: Positions::Learned,
            learned_side: 0,
            ends: Some(ends),
        })
    }

    fn floats(cfg: &ImageBindConfig, modality: Modality, values: &Tensor) -> Result<Self, SessionError> {
        let name = modality.name();
        let refuse = |expected: String| {
            let reason = format!("has shape {:?}, expected {expected}", values.dims());
            Err(SessionError::input(name, reason))
        };
        // five dimensions or more are several clips of each item
        let (clips, items) = match values.dims() {
            [batch, clips, item @ ..] if values.rank() >= 5 => {
                (Some(*clips), values.reshape([&[batch * clips][..], item].concat())?)
            }
            _ => (None, values.clone()),
        };
        let (learned, dims) = (cfg.learned(modality), items.dims().to_vec());
        let (tokens, items) = match (modality, &dims[..]) {
            (Modality::Vision, [_, 3, height, width]) => {
                (cfg.vision_grid([1, *height, *width]).iter().product(), items.unsqueeze(2)?)
            }
            (Modality::Vision, [_, 3, frames, height, width]) => {
                (cfg.vision_grid([*frames, *height, *width]).iter().product(), items)
            }
            (Modality::Audio, [_, 1, rows, columns]) => (cfg.audio_grid([*rows, *columns]).iter().product(), items),
            (Modality::Depth, [_, 1, height, width]) => {
                ((height / cfg.depth_kernel_size) * (width / cfg.depth_kernel_size), items)
            }
            (Modality::Thermal, [_, 1, height, width]) => {
                ((height / cfg.thermal_kernel_size) * (width / cfg.thermal_kernel_size), items)
            }
            (Modality::Imu, [_, MOTION_CHANNELS, length]) => (length / MOTION_PATCH, items.unsqueeze(1)?),
            (Modality::Vision, _) => {
                let picture = "(batch, 3, height, width)";
                let video = "(batch, clips, 3, frames, height, width)";
                return refuse(format!("{picture}, (batch, clips, 3, height, width) or {video}"));
            }
            (Modality::Imu, _) => return refuse(format!("(batch, {MOTION_CHANNELS}, {MOTION_LENGTH})")),
            _ => return refuse("(batch, 1, height, width) or (batch, clips, 1, height, width)".to_owned()),
        };
        let mut input =
            Self { modality, values: items, clips, tokens, positions: Positions::Learned, learned_side: 0, ends: None };
        if tokens == learned {
            return Ok(input);
        }
        let [times, rows, columns] = cfg.vision_grid([cfg.video_frames, cfg.image_size, cfg.image_size]);
        let side = tokens.isqrt();
        let is_picture = input.values.rank() == 5 && input.values.dim(2)? == 1;
        if modality != Modality::Vision || tokens == 0 {
            return refuse(format!("what makes {learned} patches, for which positions were learned, not {tokens}"));
        }
        if rows != columns || side * side != tokens || !(times == 1 || is_picture) {
            let reason = format!(
                "a square number of patches, over which positions learned on {times} x {rows} x {columns} can be \
                 stretched, not {tokens}"
            );
            return refuse(reason);
        }
        (input.positions, input.learned_side) = (Positions::FirstFrames { side }, rows);
        Ok(input)
    }

    /// FLOPs and bytes of its tower.
    fn cost(&self, cfg: &ImageBindConfig, bytes: u64) -> Cost {
        let sizes = cfg.tower(self.modality);
        let class_token = u64::from(self.modality.has_class_token());
        let [items, tokens, out, learned] =
            [self.values.dims()[0], self.tokens, cfg.out_embed_dim, cfg.learned(self.modality)].map(|size| size as u64);
        let [hidden, blocks, heads, inner] =
            [sizes.hidden, sizes.blocks, sizes.heads, sizes.inner()].map(|size| size as u64);
        let (seq, cut) = (class_token + tokens, items * tokens);
        let keys = seq + u64::from(self.modality.has_extra_key());
        let norm = |rows| cost::norm(Norm::Layer, rows, hidden, bytes);
        let pixels = cost::input(self.values.elem_count() as u64, bytes);
        let patches = |values: usize| cost::linear(cut, values as u64, hidden, false, bytes);
        let stem = match self.modality {
            Modality::Text => cost::embedding(cut, hidden, bytes),
            Modality::Vision => pixels + patches(3 * cfg.kernel_size.iter().product::<usize>()),
            Modality::Audio => {
                let conv = cost::Conv2d {
                    batch: items,
                    in_channels: 1,
                    out_channels: hidden,
                    kernel: [cfg.audio_kernel_size as u64; 2],
                    groups: 1,
                    output: [tokens, 1],
                    bias: false,
                };
                pixels + conv.cost(bytes) + norm(cut)
            }
            Modality::Depth => pixels + patches(cfg.depth_kernel_size.pow(2)) + norm(cut),
            Modality::Thermal => pixels + patches(cfg.thermal_kernel_size.pow(2)) + norm(cut),
            Modality::Imu => pixels + patches(MOTION_CHANNELS * MOTION_PATCH) + norm(cut),
        };
        let stretched = match self.positions {
            Positions::FirstFrames { side } if side != self.learned_side => {
                let from = self.learned_side;
                cost::elementwise(resize::bicubic_neighbours((from, from), (side, side), false) as u64 * hidden, 2)
            }
            _ => Cost::default(),
        };
        let embeddings = stem
            // the class token and every learned position, once; a row of the sequence per item for the token
            + Cost { weight_bytes: (2 * class_token + learned) * hidden * bytes, ..Cost::default() }
            + Cost { activation_bytes: class_token * items * hidden * bytes, ..Cost::default() }
            + cost::elementwise(items * seq * hidden, 1) // positions added
            + stretched
            + if self.modality == Modality::Vision { norm(items * seq) } else { Cost::default() };
        let pairs = match self.modality {
            Modality::Text => cost::causal_pairs(seq, 0),
            _ => cost::full_pairs(seq, keys),
        };
        let layer =
            cost::Layer { hidden, heads, head_dim: hidden / heads, inner, qkv_bias: true, norm_before: true, bytes };
        let rows = |queries, visible_pairs| AttentionRows { visible_pairs, ..AttentionRows::some(items, seq, queries) };
        let scale = if self.modality == Modality::Vision { 0 } else { 1 };
        let mean = u64::from(self.clips.is_some());
        let extra = u64::from(self.modality.has_extra_key()) * blocks * 2 * hidden;
        embeddings
            + layer.encoder(rows(seq, pairs)) * (blocks - 1)
            + layer.encoder(rows(1, keys)) // of the class token, or a text's end, alone
            + Cost { weight_bytes: extra * bytes, ..Cost::default() } // a key and a value of each layer
            + norm(items)
            + cost::linear(items, hidden, out, false, bytes)
            + unit_rows_cost(items, out)
            + cost::elementwise(items * out, scale + mean)
    }
}

/// The six towers.
pub struct ImageBindModel {
    cfg: ImageBindConfig,
    towers: BTreeMap<&'static str, Tower>,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl ImageBindModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = ImageBindConfig::from_spec(spec)?;
        let tower = |modality: Modality| Ok((modality.name(), Tower::load(&cfg, modality, vb.clone())?));
        Ok(Self {
            towers: Modality::ALL.into_iter().map(tower).collect::<Result<_>>()?,
            cfg,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn embed(&self, input: &Input) -> Result<Tensor> {
        let mut values = input.values.to_device(&self.device)?;
        if input.modality != Modality::Text {
            values = values.to_dtype(activation_dtype(self.dtype, &self.device))?;
        }
        let Some(tower) = self.towers.get(input.modality.name()) else {
            candle_core::bail!("ImageBind: no tower for {}", input.modality.name())
        };
        let embedded = tower.forward(&values, input)?; // (items, width)
        match input.clips {
            Some(clips) => {
                roofbench_nn::cost::elementwise(embedded.elem_count(), 1);
                embedded.reshape(((), clips, self.cfg.out_embed_dim))?.mean(1)
            }
            None => Ok(embedded),
        }
    }
}

impl Session for ImageBindModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let embed = |input: &Input| {
            let embedded = self.embed(input)?;
            observer.end(input.modality.phase());
            Ok((input.modality.name().to_owned(), embedded))
        };
        Ok(Input::read_all(&self.cfg, call)?.iter().map(embed).collect::<Result<_>>()?)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let bytes = self.dtype.size_in_bytes() as u64;
        let mut phases: Vec<PhaseCost> = Vec::new();
        for input in Input::read_all(&self.cfg, call)? {
            let (phase, cost) = (input.modality.phase(), input.cost(&self.cfg, bytes));
            match phases.iter_mut().find(|known| known.phase == phase) {
                Some(known) => {
                    known.repeats += 1;
                    known.cost += cost;
                }
                None => phases.push(PhaseCost { phase, repeats: 1, cost }),
            }
        }
        Ok(phases)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    fn spec(changes: Value) -> ModelSpec {
        let mut config = json!({
            "image_size": 8, "video_frames": 2, "kernel_size": [2, 2, 2], "out_embed_dim": 5, "audio_kernel_size": 3,
            "audio_stride": 2, "audio_num_mel_bins": 7, "audio_target_len": 9, "depth_kernel_size": 4,
            "thermal_kernel_size": 8,
        });
        for modality in Modality::ALL {
            for (field, value) in [("embed_dim", 6), ("num_blocks", 2), ("num_heads", 2)] {
                config[format!("{}_{field}", modality.name())] = value.into();
            }
        }
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("imagebind", "ImageBindModel", config)
    }

    type Shapes<'a> = &'a [(&'a str, &'a [usize])];

    fn call(inputs: Shapes) -> Call {
        let cpu = &Device::Cpu;
        let values = |name: &str, shape: &[usize]| match name {
            "text" => {
                let ids = (0..shape[0] * shape[1]).map(|i| (i * i % 977) as i64);
                Tensor::from_iter(ids, cpu).and_then(|ids| ids.reshape(shape)).expect("tokens")
            }
            _ => synthetic::tensor(&format!("input:{name}"), shape, 0, DType::F32, cpu).expect("values"),
        };
        let inputs = inputs.iter().map(|(name, shape)| (name.to_string(), values(name, shape))).collect();
        Call { method: "forward".into(), inputs, arguments: Default::default() }
    }

    fn model(spec: &ModelSpec) -> Result<ImageBindModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::default())?;
        ImageBindModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // depth of 2 x 2 patches of 16 values and a class token: 5 tokens of width 6, 6 keys, 2 heads of 3, inner width 24
        let embeddings = 4 * (2 * 16 * 6) + 7 * 4 * 6 + 5 * 6; // projection, norm, positions
        let layer = 7 * 5 * 6
            + 5 * (2 * 6 * 18 + 18) // query, key, value
            + 2 * (5 * 6) * (4 * 3 + 5) // two products over pairs of 2 heads, softmax
            + 5 * (2 * 6 * 6 + 6 + 6) // output, residual
            + 7 * 5 * 6
            + 5 * (2 * 6 * 24 + 24 + 24)
            + 5 * (2 * 24 * 6 + 6 + 6);
        let last = 7 * 5 * 6
            + (2 * 6 * 6 + 6) + 5 * (2 * 6 * 12 + 12) // query of the class token, keys and values of all
            + 2 * 6 * (4 * 3 + 5)
            + (2 * 6 * 6 + 6 + 6) + 7 * 6 + (2 * 6 * 24 + 24 + 24) + (2 * 24 * 6 + 6 + 6);
        let head = 7 * 6 + 2 * 6 * 5 + (3 * 5 + 1) + 5; // norm, projection, length, scale
        let cfg = ImageBindConfig::from_spec(&spec(json!({}))).expect("a config");
        let inputs = Input::read_all(&cfg, &call(&[("depth", &[1, 1, 8, 8])])).expect("an input");
        let cost = inputs[0].cost(&cfg, 4);
        assert_eq!(cost.flops, embeddings + layer + last + head);
        let block = 12 + (6 * 18 + 18) + (6 * 6 + 6) + 12 + (6 * 24 + 24) + (24 * 6 + 6);
        assert_eq!(cost.weight_bytes, 4 * ((16 * 6 + 12) + (2 + 4) * 6 + 2 * (block + 12) + 12 + 6 * 5));
    }

    #[test]
    fn parameters_of_the_towers_of_imagebind_huge_are_each_read_once() {
        let spec = spec(json!({
            "image_size": 224, "kernel_size": [2, 14, 14], "out_embed_dim": 1024, "vision_embed_dim": 1280,
            "vision_num_blocks": 32, "vision_num_heads": 16,
        }));
        let cfg = ImageBindConfig::from_spec(&spec).expect("a config");
        let inputs = Input::read_all(&cfg, &call(&[("vision", &[1, 3, 224, 224])])).expect("an input");
        // a ViT-H/14 of 632 M parameters has a stem of half the size, and 1000 classes instead of 1024 dimensions
        let cost = inputs[0].cost(&cfg, 4);
        let millions = cost.weight_bytes as f64 / 4e6;
        assert!((631.0..634.0).contains(&millions), "{millions} M");
        // OpenCLIP counts 167.4 G multiply-adds for ViT-H/14 at 224; ours leave most of the last layer out
        let billions = cost.flops as f64 / 2e9;
        assert!((162.0..168.0).contains(&billions), "{billions} G");
    }

    #[test]
    fn every_modality_costs_what_it_runs() -> Result<(), SessionError> {
        let mut model = model(&spec(json!({})))?;
        let cases: [Shapes; 7] = [
            &[("vision", &[2, 3, 8, 8]), ("text", &[3, 77])],
            &[("vision", &[2, 3, 12, 12])],     // stretched positions
            &[("vision", &[1, 3, 3, 2, 8, 8])], // three clips
            &[("vision", &[1, 2, 3, 8, 8])],    // two pictures
            &[("vision", &[1, 2, 3, 1, 4, 4])], // two videos of one frame
            &[("audio", &[1, 1, 7, 9]), ("depth", &[2, 1, 8, 9])],
            &[("audio", &[2, 3, 1, 7, 9]), ("thermal", &[1, 1, 8, 8]), ("imu", &[2, 6, 2000])],
        ];
        for inputs in cases {
            let call = call(inputs);
            let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
            for (name, output) in outputs? {
                assert_eq!(output.dims(), [call.inputs[&name].dims()[0], 5], "{name}");
            }
            assert_eq!(
                recorded.flops,
                model.cost(&call)?.iter().map(|phase| phase.cost.flops).sum::<u64>(),
                "{inputs:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn pictures_on_positions_of_several_frames_take_those_of_the_first() -> Result<(), SessionError> {
        let mut model = model(&spec(json!({"video_frames": 4})))?;
        let picture = call(&[("vision", &[1, 3, 8, 8])]);
        let embedded = model.call(&picture, &mut Unobserved)?.remove("vision").expect("an embedding");
        let length = embedded.sqr()?.sum_all()?.to_scalar::<f32>()?;
        assert!((length - 1.0).abs() < 1e-5, "{length}");
        assert!(model.call(&call(&[("vision", &[1, 1, 3, 4, 8, 8])]), &mut Unobserved).is_ok());
        let short = model.call(&call(&[("vision", &[1, 1, 3, 2, 8, 8])]), &mut Unobserved).err().map(|e| e.to_string());
        assert!(short.is_some_and(|error| error.contains("learned on 2 x 4 x 4")));
        Ok(())
    }

    #[test]
    fn what_follows_the_end_of_a_text_does_not_matter() -> Result<(), SessionError> {
        let mut model = model(&spec(json!({})))?;
        let text = |rest: i64| {
            let ids = (0..77).map(|i| {
                if i < 5 {
                    i * 7 % 30
                } else if i == 5 {
                    49407
                } else {
                    rest
                }
            });
            let ids = Tensor::from_iter(ids, &Device::Cpu)?.reshape((1, 77))?;
            Ok::<_, candle_core::Error>(Call {
                method: "forward".into(),
                inputs: [("text".into(), ids)].into(),
                arguments: Default::default(),
            })
        };
        let [a, b] = [0, 11].map(|rest| model.call(&text(rest).expect("a call"), &mut Unobserved));
        let error = (&a?["text"] - &b?["text"])?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error < 1e-6, "{error}");
        Ok(())
    }

    #[test]
    fn malformed_configs_and_inputs_are_named() {
        let config = |changes: Value| ImageBindConfig::from_spec(&spec(changes)).err().map(|e| e.to_string());
        for (changes, start) in [
            (
                json!({"audio_num_heads": 4}),
                "config.json: `audio_embed_dim`: 6 is not a multiple of audio_num_heads, 4",
            ),
            (json!({"imu_num_blocks": 0}), "config.json: `imu_num_blocks`: 0 is not in"),
            (json!({"kernel_size": [2, 9, 9]}), "config.json: `kernel_size`: is larger"),
            (json!({"kernel_size": 14}), "config.json: `kernel_size`: "),
            (json!({"audio_kernel_size": 8}), "config.json: `audio_kernel_size`: is larger"),
        ] {
            let found = config(changes).unwrap_or_default();
            assert!(found.starts_with(start), "{found}");
        }
        let cfg = ImageBindConfig::from_spec(&spec(json!({}))).expect("a config");
        let cases: [(Shapes, &str); 9] = [
            (&[], "input `vision`: is missing; give one or more of vision, text, audio"),
            (&[("sound", &[1])], "input `sound`: is not supported"),
            (
                &[("vision", &[1, 4, 8, 8])],
                "input `vision`: has shape [1, 4, 8, 8], expected (batch, 3, height, width)",
            ),
            (&[("vision", &[1, 3, 6, 8])], "input `vision`: has shape [1, 3, 6, 8], expected a square number"),
            (&[("text", &[1, 76])], "input `text`: has shape [1, 76], expected (batch, 77)"),
            (&[("audio", &[1, 1, 7, 11])], "input `audio`: has shape [1, 1, 7, 11], expected what makes 12 patches"),
            (&[("depth", &[1, 8, 8])], "input `depth`: has shape [1, 8, 8], expected (batch, 1, height, width)"),
            (&[("imu", &[1, 6, 1000])], "input `imu`: has shape [1, 6, 1000], expected what makes 250 patches"),
            (&[("imu", &[1, 3, 2000])], "input `imu`: has shape [1, 3, 2000], expected (batch, 6, 2000)"),
        ];
        for (inputs, start) in cases {
            let found = Input::read_all(&cfg, &call(inputs)).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(found.starts_with(start), "{found}");
        }
    }
}
