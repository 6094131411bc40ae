//! Segment Anything: a vision transformer with attention in windows and decomposed relative positions makes an
//! embedding of a picture; points, boxes and masks are encoded as prompts; a small decoder in which prompts and picture
//! attend to each other both ways gives masks and how good it takes them to be.
//! Source: SAM (arXiv:2304.02643). Mirrors `transformers.SamModel`.
//!
//! The picture's embedding costs nearly everything and does not depend on the prompts: `get_image_embeddings` gives it,
//! and `forward` takes it as `image_embeddings` in place of `pixel_values`, as often as there are prompts.

use std::collections::BTreeMap;
use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use roofbench_nn::conv::{
    Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig, to_channels_first, to_channels_last,
};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::window_attention::WindowAttention;
use serde::Deserialize;

use super::activation_dtype;

/// The classes that run.
pub const CLASSES: &[&str] = &["SamModel"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // one matrix with two names; older files hold it twice
    AliasRule {
        pattern: r"^prompt_encoder\.shared_embedding\.positional_embedding$",
        replacement: Some("shared_image_embedding.positional_embedding"),
        applies: AliasScope::Always,
    },
];

/// Of the norms in the neck and in the upscaling, whatever the config says.
const NECK_EPS: f64 = 1e-6;
/// Of the decoder's last norm, whatever the config says.
const FINAL_EPS: f64 = 1e-5;
/// Point embeddings by what they are for: background, object, and the corners of a box.
const POINT_KINDS: usize = 4;
/// How many times larger than the embedding's the sides of a mask are.
const MASK_SCALE: usize = 4;

/// The parts of `config.json` that shape the computation; field names are the file's own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SamConfig {
    /// The encoder of pictures.
    pub vision_config: SamVisionConfig,
    /// The encoder of points, boxes and masks.
    pub prompt_encoder_config: SamPromptEncoderConfig,
    /// The decoder of masks.
    pub mask_decoder_config: SamMaskDecoderConfig,
}

/// The encoder of pictures.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SamVisionConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Channels of the embedding.
    pub output_channels: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Height and width of pictures, in pixels.
    pub image_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// Activation of the feed-forward halves.
    pub hidden_act: Activation,
    /// Added to the variance in the layers' normalisations.
    pub layer_norm_eps: f64,
    /// The product of query, key and value has biases.
    pub qkv_bias: bool,
    /// Width inside the feed-forward half, in units of `hidden_size`.
    pub mlp_ratio: f64,
    /// The same in elements, where present.
    pub mlp_dim: Option<usize>,
    /// Learned positions are added to the patches.
    pub use_abs_pos: bool,
    /// Learned relative positions are added to the scores.
    pub use_rel_pos: bool,
    /// Height and width of the windows that attention is confined to; 0 for none.
    pub window_size: usize,
    /// Layers whose attention is over the whole picture.
    pub global_attn_indexes: Vec<usize>,
    /// Frequencies of the encoding of coordinates.
    pub num_pos_feats: usize,
}

/// What `transformers.SamVisionConfig` takes for fields that are left out.
impl Default for SamVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            output_channels: 256,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 1024,
            patch_size: 16,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
            qkv_bias: true,
            mlp_ratio: 4.0,
            mlp_dim: None,
            use_abs_pos: true,
            use_rel_pos: true,
            window_size: 14,
            global_attn_indexes: vec![2, 5, 8, 11],
            num_pos_feats: 128,
        }
    }
}

impl SamVisionConfig {
    /// Patches along each side.
    fn grid(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }

    fn mlp_dim(&self) -> usize {
        self.mlp_dim.unwrap_or((self.hidden_size as f64 * self.mlp_ratio) as usize)
    }

    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Height and width of what a layer's attention sees.
    fn window(&self, layer: usize) -> usize {
        if self.window_size == 0 || self.global_attn_indexes.contains(&layer) { self.grid() } else { self.window_size }
    }
}

/// The encoder of points, boxes and masks.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SamPromptEncoderConfig {
    /// Width of embeddings.
    pub hidden_size: usize,
    /// Height and width that coordinates are within.
    pub image_size: usize,
    /// Height and width of a patch.
    pub patch_size: usize,
    /// Height and width of the picture's embedding; `image_size / patch_size` where absent.
    pub image_embedding_size: Option<usize>,
    /// Channels inside the encoder of masks.
    pub mask_input_channels: usize,
    /// Kinds of points.
    pub num_point_embeddings: usize,
    /// Activation of the encoder of masks.
    pub hidden_act: Activation,
    /// Added to the variance in its normalisations.
    pub layer_norm_eps: f64,
}

/// What `transformers.SamPromptEncoderConfig` takes for fields that are left out.
impl Default for SamPromptEncoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            image_size: 1024,
            patch_size: 16,
            image_embedding_size: None,
            mask_input_channels: 16,
            num_point_embeddings: POINT_KINDS,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
        }
    }
}

/// The decoder of masks.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SamMaskDecoderConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Activation of the feed-forward parts.
    pub hidden_act: Activation,
    /// Width inside them.
    pub mlp_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// How many times narrower attention between prompts and picture is than the stream.
    pub attention_downsample_rate: usize,
    /// Masks for an ambiguous prompt.
    pub num_multimask_outputs: usize,
    /// Products that give the quality of masks.
    pub iou_head_depth: usize,
    /// Width between them.
    pub iou_head_hidden_dim: usize,
    /// Added to the variance in the layers' normalisations.
    pub layer_norm_eps: f64,
}

/// What `transformers.SamMaskDecoderConfig` takes for fields that are left out.
impl Default for SamMaskDecoderConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            hidden_act: Activation::Relu,
            mlp_dim: 2048,
            num_hidden_layers: 2,
            num_attention_heads: 8,
            attention_downsample_rate: 2,
            num_multimask_outputs: 3,
            iou_head_depth: 3,
            iou_head_hidden_dim: 256,
            layer_norm_eps: 1e-6,
        }
    }
}

impl SamMaskDecoderConfig {
    /// Width of attention between prompts and picture.
    fn cross_width(&self) -> usize {
        self.hidden_size / self.attention_downsample_rate
    }

    fn attention(&self, width: usize) -> Attention {
        let heads = self.num_attention_heads;
        Attention { heads, kv_heads: heads, head_dim: width / heads, scale: None, pattern: Pattern::Full }
    }

    /// One mask for a clear prompt, and those for an ambiguous one.
    fn mask_tokens(&self) -> usize {
        self.num_multimask_outputs + 1
    }

    /// Which masks are given: the first, and how many.
    fn masks(&self, multimask: bool) -> (usize, usize) {
        if multimask { (1, self.num_multimask_outputs) } else { (0, 1) }
    }
}

impl SamConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let (vision, prompt, decoder) = (&cfg.vision_config, &cfg.prompt_encoder_config, &cfg.mask_decoder_config);
        let invalid = |field: &str, reason: String| SessionError::Config { field: field.to_owned(), reason };
        // far beyond any model, and the product of three still fits 64 bits
        const LARGEST: usize = 1 << 20;
        let sizes = [
            ("vision_config.hidden_size", vision.hidden_size),
            ("vision_config.output_channels", vision.output_channels),
            ("vision_config.num_hidden_layers", vision.num_hidden_layers),
            ("vision_config.num_attention_heads", vision.num_attention_heads),
            ("vision_config.num_channels", vision.num_channels),
            ("vision_config.image_size", vision.image_size),
            ("vision_config.patch_size", vision.patch_size),
            ("vision_config.mlp_dim", vision.mlp_dim()),
            ("vision_config.window_size", vision.window_size + 1),
            ("prompt_encoder_config.image_size", prompt.image_size),
            ("prompt_encoder_config.patch_size", prompt.patch_size),
            ("prompt_encoder_config.mask_input_channels", prompt.mask_input_channels),
            ("mask_decoder_config.mlp_dim", decoder.mlp_dim),
            ("mask_decoder_config.num_hidden_layers", decoder.num_hidden_layers),
            ("mask_decoder_config.num_attention_heads", decoder.num_attention_heads),
            ("mask_decoder_config.attention_downsample_rate", decoder.attention_downsample_rate),
            ("mask_decoder_config.num_multimask_outputs", decoder.num_multimask_outputs),
            ("mask_decoder_config.iou_head_hidden_dim", decoder.iou_head_hidden_dim),
            // the picture is at least a patch
            ("vision_config.patch_size", vision.grid() * vision.patch_size.min(1)),
        ];
        if let Some((field, size)) = sizes.into_iter().find(|(_, size)| !(1..=LARGEST).contains(size)) {
            return Err(invalid(field, format!("gives {size}, not in 1..={LARGEST}")));
        }
        let multiples = [
            ("vision_config.hidden_size", vision.hidden_size, vision.num_attention_heads),
            ("prompt_encoder_config.mask_input_channels", prompt.mask_input_channels, 4),
            ("mask_decoder_config.hidden_size", decoder.hidden_size, 8),
            ("mask_decoder_config.hidden_size", decoder.hidden_size, decoder.num_attention_heads),
            (
                "mask_decoder_config.hidden_size",
                decoder.hidden_size,
                decoder.num_attention_heads * decoder.attention_downsample_rate,
            ),
        ];
        if let Some((field, size, of)) = multiples.into_iter().find(|(_, size, of)| !size.is_multiple_of(*of)) {
            return Err(invalid(field, format!("{size} is not a multiple of {of}")));
        }
        let width = vision.output_channels;
        let embedding_size = prompt.image_embedding_size.unwrap_or(prompt.image_size / prompt.patch_size);
        let same = [
            ("prompt_encoder_config.hidden_size", prompt.hidden_size, "vision_config.output_channels", width),
            ("mask_decoder_config.hidden_size", decoder.hidden_size, "vision_config.output_channels", width),
            ("vision_config.num_pos_feats", 2 * vision.num_pos_feats, "half of vision_config.output_channels", width),
            ("prompt_encoder_config.image_embedding_size", embedding_size, "the patches of a side", vision.grid()),
        ];
        if let Some((field, found, what, expected)) = same.into_iter().find(|(_, found, _, other)| found != other) {
            return Err(invalid(field, format!("does not fit {what}: {found} where {expected} are needed")));
        }
        if prompt.num_point_embeddings < POINT_KINDS {
            let reason = format!("{} is less than {POINT_KINDS}", prompt.num_point_embeddings);
            return Err(invalid("prompt_encoder_config.num_point_embeddings", reason));
        }
        if decoder.iou_head_depth < 2 {
            let reason = format!("{} is less than 2", decoder.iou_head_depth);
            return Err(invalid("mask_decoder_config.iou_head_depth", reason));
        }
        Ok(cfg)
    }
}

struct VisionLayer {
    layer_norm1: LayerNorm,
    qkv: Linear,
    attention: WindowAttention,
    proj: Linear,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl VisionLayer {
    fn load(cfg: &SamVisionConfig, layer: usize, vb: VarBuilder) -> Result<Self> {
        let (hidden, head_dim, window) = (cfg.hidden_size, cfg.head_dim(), cfg.window(layer));
        let norm = |name: &str| LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(name));
        let attn = vb.pp("attn");
        let mut attention = WindowAttention::new([cfg.num_attention_heads, head_dim], [cfg.grid(); 2], [window; 2])?;
        if cfg.qkv_bias {
            // what pads a window is 0 before the product
            let bias = attn.get(3 * hidden, "qkv.bias")?;
            attention =
                attention.with_outside(&bias.narrow(0, hidden, hidden)?, &bias.narrow(0, 2 * hidden, hidden)?)?;
        }
        if cfg.use_rel_pos {
            let table = |name: &str| attn.get((2 * window - 1, head_dim), name);
            attention = attention.with_positions(&table("rel_pos_h")?, &table("rel_pos_w")?)?;
        }
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            qkv: Linear::load(hidden, 3 * hidden, cfg.qkv_bias, attn.pp("qkv"))?,
            attention,
            proj: Linear::load(hidden, hidden, true, attn.pp("proj"))?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load([hidden, cfg.mlp_dim()], cfg.hidden_act, true, ["lin1", "lin2"], vb.pp("mlp"))?,
        })
    }

    /// `x` and the result are (batch, patches, hidden).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.layer_norm1.forward(x)?)?; // (batch, patches, 3 * hidden)
        let hidden = x.dim(2)?;
        let part = |i: usize| qkv.narrow(2, i * hidden, hidden);
        let attended = self.attention.forward(&part(0)?, &part(1)?, &part(2)?)?; // (batch, patches, hidden)
        let x = self.proj.forward_add(&attended, x)?;
        self.mlp.forward_add(&self.layer_norm2.forward(&x)?, &x)
    }
}

/// A convolution of single pixels, as a product.
fn pointwise(in_channels: usize, out_channels: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get((out_channels, in_channels, 1, 1), "weight")?.reshape((out_channels, in_channels))?;
    let bias = if bias { Some(vb.get(out_channels, "bias")?) } else { None };
    Linear::new(&weight, bias.as_ref())
}

/// Pictures to embeddings.
struct VisionEncoder {
    patch_embed: PatchEmbed,
    pos_embed: Option<Tensor>, // (1, patches, hidden)
    layers: Vec<VisionLayer>,
    neck_conv1: Linear,
    neck_layer_norm1: LayerNorm,
    neck_conv2: Conv2d,
    neck_layer_norm2: LayerNorm,
    grid: usize,
}

impl VisionEncoder {
    fn load(cfg: &SamVisionConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, channels, grid) = (cfg.hidden_size, cfg.output_channels, cfg.grid());
        let pos_embed = match cfg.use_abs_pos {
            true => {
                let dtype = activation_dtype(vb.dtype(), vb.device());
                let positions = vb.get((1, grid, grid, hidden), "pos_embed")?.to_dtype(dtype)?;
                Some(positions.reshape((1, grid * grid, hidden))?)
            }
            false => None,
        };
        let patch = (cfg.patch_size, cfg.patch_size);
        let layer = |i: usize| VisionLayer::load(cfg, i, vb.pp(format!("layers.{i}")));
        let neck = vb.pp("neck");
        let norm = |name: &str| LayerNorm::load(channels, NECK_EPS, neck.pp(name));
        let conv2 = Conv2dConfig::new(3).padding(1);
        Ok(Self {
            patch_embed: PatchEmbed::load(cfg.num_channels, hidden, patch, true, vb.pp("patch_embed.projection"))?,
            pos_embed,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            neck_conv1: pointwise(hidden, channels, false, neck.pp("conv1"))?,
            neck_layer_norm1: norm("layer_norm1")?,
            neck_conv2: Conv2d::load(channels, channels, conv2, false, neck.pp("conv2"))?,
            neck_layer_norm2: norm("layer_norm2")?,
            grid,
        })
    }

    /// (batch, channels, height, width) -> (batch, rows, columns, output channels)
    fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let mut x = match &self.pos_embed {
            Some(positions) => {
                let (_, patches, hidden) = positions.dims3()?;
                let positions = positions.broadcast_as((pixel_values.dim(0)?, patches, hidden))?;
                self.patch_embed.forward_add(pixel_values, &positions)?
            }
            None => self.patch_embed.forward(pixel_values)?,
        }; // (batch, patches, hidden)
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        let x = self.neck_layer_norm1.forward(&self.neck_conv1.forward(&x)?)?; // (batch, patches, output channels)
        let x = x.reshape((x.dim(0)?, self.grid, self.grid, x.dim(2)?))?;
        self.neck_layer_norm2.forward(&self.neck_conv2.forward(&x)?)
    }
}

/// Coordinates to sines and cosines of random frequencies (arXiv:2006.10739).
struct PositionalEmbedding {
    /// For each frequency what it takes of x and of y.
    frequencies: Vec<(f32, f32)>,
}

impl PositionalEmbedding {
    fn load(features: usize, vb: VarBuilder) -> Result<Self> {
        let matrix = vb.get((2, features), "positional_embedding")?;
        let rows = matrix.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        Ok(Self { frequencies: rows[0].iter().copied().zip(rows[1].iter().copied()).collect() })
    }

    /// The embedding of a point whose coordinates are in [0, 1].
    fn encode(&self, x: f64, y: f64) -> Vec<f32> {
        let (x, y) = ((2.0 * x - 1.0) as f32, (2.0 * y - 1.0) as f32);
        let angles = self.frequencies.iter().map(|(of_x, of_y)| TAU as f32 * (x * of_x + y * of_y));
        angles.clone().map(f32::sin).chain(angles.map(f32::cos)).collect()
    }

    /// Of the centres of a picture's patches: (patches, width).
    fn of_grid(&self, grid: usize, device: &Device, dtype: DType) -> Result<Tensor> {
        let at = |i: usize| (i as f64 + 0.5) / grid as f64;
        let rows = (0..grid).flat_map(|y| (0..grid).map(move |x| (x, y)));
        let values: Vec<f32> = rows.flat_map(|(x, y)| self.encode(at(x), at(y))).collect();
        Tensor::from_vec(values, (grid * grid, 2 * self.frequencies.len()), &Device::Cpu)?
            .to_device(device)?
            .to_dtype(dtype)
    }
}

/// A mask to what it adds to the picture's embedding.
struct MaskEmbedding {
    conv1: Conv2d,
    layer_norm1: LayerNorm,
    conv2: Conv2d,
    layer_norm2: LayerNorm,
    conv3: Linear,
    activation: Activation,
}

impl MaskEmbedding {
    fn load(cfg: &SamPromptEncoderConfig, vb: VarBuilder) -> Result<Self> {
        let channels = cfg.mask_input_channels;
        let norm = |size: usize, name: &str| LayerNorm::load(size, cfg.layer_norm_eps, vb.pp(name));
        let halving = Conv2dConfig::new(2).stride(2);
        Ok(Self {
            conv1: Conv2d::load(1, channels / 4, halving, true, vb.pp("conv1"))?,
            layer_norm1: norm(channels / 4, "layer_norm1")?,
            conv2: Conv2d::load(channels / 4, channels, halving, true, vb.pp("conv2"))?,
            layer_norm2: norm(channels, "layer_norm2")?,
            conv3: pointwise(channels, cfg.hidden_size, true, vb.pp("conv3"))?,
            activation: cfg.hidden_act,
        })
    }

    /// (batch, 4 rows, 4 columns, 1) -> (batch, rows, columns, hidden)
    fn forward(&self, masks: &Tensor) -> Result<Tensor> {
        let x = self.activation.forward(&self.layer_norm1.forward(&self.conv1.forward(masks)?)?)?;
        let x = self.activation.forward(&self.layer_norm2.forward(&self.conv2.forward(&x)?)?)?;
        self.conv3.forward(&x)
    }
}

/// Points, boxes and masks to embeddings.
struct PromptEncoder {
    shared_embedding: PositionalEmbedding,
    mask_embed: MaskEmbedding,
    no_mask_embed: Tensor, // (1, hidden)
    /// Of the background, of the object, and of a box's corners.
    point_embed: Vec<Vec<f32>>,
    not_a_point_embed: Vec<f32>,
    image_size: usize,
}

impl PromptEncoder {
    /// `root` is the checkpoint's root, where the encoding of coordinates is.
    fn load(cfg: &SamConfig, root: &VarBuilder) -> Result<Self> {
        let (vb, prompt) = (root.pp("prompt_encoder"), &cfg.prompt_encoder_config);
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let row = |name: &str| vb.get((1, prompt.hidden_size), name)?.to_dtype(dtype);
        let values = |name: &str| row(name)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let features = cfg.vision_config.num_pos_feats;
        Ok(Self {
            shared_embedding: PositionalEmbedding::load(features, root.pp("shared_image_embedding"))?,
            mask_embed: MaskEmbedding::load(prompt, vb.pp("mask_embed"))?,
            no_mask_embed: row("no_mask_embed.weight")?,
            point_embed: (0..prompt.num_point_embeddings)
                .map(|i| values(&format!("point_embed.{i}.weight")))
                .collect::<Result<_>>()?,
            not_a_point_embed: values("not_a_point_embed.weight")?,
            image_size: prompt.image_size,
        })
    }

    /// Embeddings of points and boxes (batch · prompts, tokens, hidden), if there are any.
    fn sparse(&self, prompts: &Prompts, like: &Tensor) -> Result<Option<Tensor>> {
        let tokens = prompts.sparse_tokens();
        if tokens == 0 {
            return Ok(None);
        }
        let side = self.image_size as f64;
        // the middle of a pixel
        let at = |[x, y]: [f64; 2]| self.shared_embedding.encode((x + 0.5) / side, (y + 0.5) / side);
        let added = |mut x: Vec<f32>, kind: usize| {
            x.iter_mut().zip(&self.point_embed[kind]).for_each(|(x, embedding)| *x += embedding);
            x
        };
        let point = |(point, label): (&[f64; 2], &i64)| match label {
            -1 => self.not_a_point_embed.clone(),
            -10 => vec![0.0; self.not_a_point_embed.len()],
            0 => added(at(*point), 0),
            1 => added(at(*point), 1),
            _ => at(*point),
        };
        let mut values = Vec::new();
        for prompt in 0..prompts.count() {
            if let Some(points) = &prompts.points {
                let of_prompt = prompt * points.each..(prompt + 1) * points.each;
                let (places, labels) = (&points.places[of_prompt.clone()], &points.labels[of_prompt]);
                places.iter().zip(labels).for_each(|pair| values.extend(point(pair)));
                if prompts.boxes.is_none() {
                    values.extend(&self.not_a_point_embed);
                }
            }
            if let Some(boxes) = &prompts.boxes {
                let [x1, y1, x2, y2] = boxes[prompt];
                values.extend(added(at([x1, y1]), 2));
                values.extend(added(at([x2, y2]), 3));
            }
        }
        roofbench_nn::cost::elementwise(
            prompts.count() * tokens,
            ENCODING_FLOPS * self.shared_embedding.frequencies.len(),
        );
        let hidden = self.not_a_point_embed.len();
        let sparse = Tensor::from_vec(values, (prompts.count(), tokens, hidden), &Device::Cpu)?;
        sparse.to_device(like.device())?.to_dtype(like.dtype()).map(Some)
    }

    /// What is added to the picture's embedding (batch or 1, rows or 1, columns or 1, hidden).
    fn dense(&self, masks: Option<&Tensor>, like: &Tensor) -> Result<Tensor> {
        match masks {
            Some(masks) => {
                let (batch, _, height, width) = masks.dims4()?;
                let masks = masks.to_device(like.device())?.to_dtype(like.dtype())?;
                self.mask_embed.forward(&masks.reshape((batch, height, width, 1))?)
            }
            None => self.no_mask_embed.reshape((1, 1, 1, ())),
        }
    }
}

/// For each frequency of an encoded point: two multiply-adds for the angle and its factor, a sine and a cosine, and the
/// embedding of its kind added to both.
const ENCODING_FLOPS: usize = 4 + 1 + 2 + 2;

/// What the picture gives to an attention of prompts to it, and perhaps from it, as one product: rows are keys, values
/// and, where wanted, queries side by side.
struct PictureSide {
    projection: Linear,
    /// What the positions add to keys and queries: (1, patches, width).
    positions: Tensor,
    width: usize,
}

impl PictureSide {
    /// `parts` are layers from the stream to `width`, those with positions marked.
    fn load(width: usize, parts: &[(VarBuilder, bool)], grid: &Tensor) -> Result<Self> {
        let hidden = grid.dim(1)?;
        let (mut weights, mut biases, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for (vb, has_positions) in parts {
            let weight = vb.get((width, hidden), "weight")?;
            positions.push(match has_positions {
                true => Linear::new(&weight, None)?.forward(grid)?,
                false => Tensor::zeros((grid.dim(0)?, width), grid.dtype(), grid.device())?,
            });
            weights.push(weight);
            biases.push(vb.get(width, "bias")?);
        }
        let projection = Linear::new(&Tensor::cat(&weights, 0)?, Some(&Tensor::cat(&biases, 0)?))?;
        Ok(Self { projection, positions: Tensor::cat(&positions, 1)?.unsqueeze(0)?, width })
    }

    /// (prompts, patches, hidden) -> (prompts, patches, all parts)
    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let (_, patches, width) = self.positions.dims3()?;
        let positions = self.positions.broadcast_as((picture.dim(0)?, patches, width))?;
        self.projection.forward_add(picture, &positions)
    }

    /// The part `i` of a result.
    fn part(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        x.narrow(2, i * self.width, self.width)
    }
}

/// A layer of the decoder: prompts attend to each other, to the picture, and the picture to them.
struct TwoWayLayer {
    self_attention: Attention,
    self_query_key: Linear,
    self_value: Linear,
    self_out: Linear,
    layer_norm1: LayerNorm,
    cross_attention: Attention,
    /// Keys and values for the prompts, and queries to them.
    picture: PictureSide,
    to_picture_query: Linear,
    to_picture_out: Linear,
    layer_norm2: LayerNorm,
    mlp: Mlp,
    layer_norm3: LayerNorm,
    from_picture_key: Linear,
    from_picture_value: Linear,
    from_picture_out: Linear,
    layer_norm4: LayerNorm,
    /// Starts from the prompts' embeddings, which are their positions as well: these are not added, and the first
    /// attention replaces them.
    is_first: bool,
}

impl TwoWayLayer {
    fn load(cfg: &SamMaskDecoderConfig, layer: usize, grid: &Tensor, vb: VarBuilder) -> Result<Self> {
        let (hidden, width) = (cfg.hidden_size, cfg.cross_width());
        let norm = |name: &str| LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(name));
        let (attn, to, from) =
            (vb.pp("self_attn"), vb.pp("cross_attn_token_to_image"), vb.pp("cross_attn_image_to_token"));
        let parts = [(to.pp("k_proj"), true), (to.pp("v_proj"), false), (from.pp("q_proj"), true)];
        let linear = |input, output, vb: VarBuilder| Linear::load(input, output, true, vb);
        Ok(Self {
            self_attention: cfg.attention(hidden),
            self_query_key: Linear::load_fused(hidden, &[("q_proj", hidden), ("k_proj", hidden)], true, attn.clone())?,
            self_value: linear(hidden, hidden, attn.pp("v_proj"))?,
            self_out: linear(hidden, hidden, attn.pp("out_proj"))?,
            layer_norm1: norm("layer_norm1")?,
            cross_attention: cfg.attention(width),
            picture: PictureSide::load(width, &parts, grid)?,
            to_picture_query: linear(hidden, width, to.pp("q_proj"))?,
            to_picture_out: linear(width, hidden, to.pp("out_proj"))?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load([hidden, cfg.mlp_dim], cfg.hidden_act, true, ["lin1", "lin2"], vb.pp("mlp"))?,
            layer_norm3: norm("layer_norm3")?,
            from_picture_key: linear(hidden, width, from.pp("k_proj"))?,
            from_picture_value: linear(hidden, width, from.pp("v_proj"))?,
            from_picture_out: linear(width, hidden, from.pp("out_proj"))?,
            layer_norm4: norm("layer_norm4")?,
            is_first: layer == 0,
        })
    }

    /// `x` and its positions `embedding` (prompts, tokens, hidden), `picture` (prompts, patches, hidden); the new `x`
    /// and picture.
    fn forward(&self, x: &Tensor, embedding: &Tensor, picture: &Tensor) -> Result<(Tensor, Tensor)> {
        let query = if self.is_first { x.clone() } else { plus(x, embedding)? };
        let query_key = self.self_query_key.forward(&query)?;
        let hidden = x.dim(2)?;
        let (q, k) = (query_key.narrow(2, 0, hidden)?, query_key.narrow(2, hidden, hidden)?);
        let attended = self.self_attention.forward(&q, &k, &self.self_value.forward(x)?, None)?;
        let x = match self.is_first {
            true => self.self_out.forward(&attended)?,
            false => self.self_out.forward_add(&attended, x)?,
        };
        let x = self.layer_norm1.forward(&x)?;

        let of_picture = self.picture.forward(picture)?;
        let part = |i: usize| self.picture.part(&of_picture, i);
        let query = self.to_picture_query.forward(&plus(&x, embedding)?)?;
        let attended = self.cross_attention.forward(&query, &part(0)?, &part(1)?, None)?;
        let x = self.layer_norm2.forward(&self.to_picture_out.forward_add(&attended, &x)?)?;

        let x = self.layer_norm3.forward(&self.mlp.forward_add(&x, &x)?)?;

        let key = self.from_picture_key.forward(&plus(&x, embedding)?)?;
        let attended = self.cross_attention.forward(&part(2)?, &key, &self.from_picture_value.forward(&x)?, None)?;
        let picture = self.layer_norm4.forward(&self.from_picture_out.forward_add(&attended, picture)?)?;
        Ok((x, picture))
    }
}

/// The sum of two small tensors.
fn plus(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    roofbench_nn::cost::elementwise(a.elem_count(), 1);
    a + b
}

/// Products with a rectifier between any two.
struct FeedForward {
    layers: Vec<Linear>,
}

impl FeedForward {
    fn load([input, inner, output]: [usize; 3], depth: usize, vb: VarBuilder) -> Result<Self> {
        let between = (0..depth - 2).map(|i| Linear::load(inner, inner, true, vb.pp(format!("layers.{i}"))));
        let mut layers = vec![Linear::load(input, inner, true, vb.pp("proj_in"))?];
        layers.extend(between.collect::<Result<Vec<_>>>()?);
        layers.push(Linear::load(inner, output, true, vb.pp("proj_out"))?);
        Ok(Self { layers })
    }

    /// (rows, input) -> (rows, output)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let last = self.layers.len() - 1;
        let act = |i: usize| if i < last { Activation::Relu } else { Activation::Identity };
        self.layers.iter().enumerate().try_fold(x.clone(), |x, (i, layer)| layer.forward_act(&x, act(i)))
    }
}

/// Embeddings of picture and prompts to masks.
struct MaskDecoder {
    output_tokens: Tensor, // (1, 1 + mask tokens, hidden): of the quality, and of each mask
    layers: Vec<TwoWayLayer>,
    final_attention: Attention,
    final_picture: PictureSide,
    final_query: Linear,
    final_out: Linear,
    layer_norm_final_attn: LayerNorm,
    upscale_conv1: ConvTranspose2d,
    upscale_layer_norm: LayerNorm,
    upscale_conv2: ConvTranspose2d,
    output_hypernetworks_mlps: Vec<FeedForward>,
    iou_prediction_head: FeedForward,
    cfg: SamMaskDecoderConfig,
}

impl MaskDecoder {
    /// `grid` are the positions of the picture's patches (patches, hidden).
    fn load(cfg: &SamMaskDecoderConfig, grid: &Tensor, vb: VarBuilder) -> Result<Self> {
        let (hidden, width, masks) = (cfg.hidden_size, cfg.cross_width(), cfg.mask_tokens());
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let table = |rows: usize, name: &str| vb.get((rows, hidden), name)?.to_dtype(dtype);
        let tokens = [table(1, "iou_token.weight")?, table(masks, "mask_tokens.weight")?];
        let transformer = vb.pp("transformer");
        let last = transformer.pp("final_attn_token_to_image");
        let layer = |i: usize| TwoWayLayer::load(cfg, i, grid, transformer.pp(format!("layers.{i}")));
        let doubling = ConvTranspose2dConfig::new(2, 2);
        let hyper = |i: usize| {
            FeedForward::load([hidden, hidden, hidden / 8], 3, vb.pp(format!("output_hypernetworks_mlps.{i}")))
        };
        let final_norm = transformer.pp("layer_norm_final_attn");
        Ok(Self {
            output_tokens: Tensor::cat(&tokens, 0)?.unsqueeze(0)?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_attention: cfg.attention(width),
            final_picture: PictureSide::load(width, &[(last.pp("k_proj"), true), (last.pp("v_proj"), false)], grid)?,
            final_query: Linear::load(hidden, width, true, last.pp("q_proj"))?,
            final_out: Linear::load(width, hidden, true, last.pp("out_proj"))?,
            layer_norm_final_attn: LayerNorm::load(hidden, FINAL_EPS, final_norm)?,
            upscale_conv1: ConvTranspose2d::load(hidden, hidden / 4, doubling, true, vb.pp("upscale_conv1"))?,
            upscale_layer_norm: LayerNorm::load(hidden / 4, NECK_EPS, vb.pp("upscale_layer_norm"))?,
            upscale_conv2: ConvTranspose2d::load(hidden / 4, hidden / 8, doubling, true, vb.pp("upscale_conv2"))?,
            output_hypernetworks_mlps: (0..masks).map(hyper).collect::<Result<_>>()?,
            iou_prediction_head: FeedForward::load(
                [hidden, cfg.iou_head_hidden_dim, masks],
                cfg.iou_head_depth,
                vb.pp("iou_prediction_head"),
            )?,
            cfg: cfg.clone(),
        })
    }

    /// `picture` (batch, rows, columns, hidden) with what masks add to it, `sparse` (batch · prompts, tokens, hidden);
    /// masks (batch, prompts, masks, 4 rows, 4 columns) and their quality (batch, prompts, masks).
    fn forward(&self, picture: &Tensor, sparse: Option<&Tensor>, prompts: &Prompts) -> Result<(Tensor, Tensor)> {
        let (batch, rows, columns, hidden) = picture.dims4()?;
        let count = batch * prompts.each;
        let output_tokens = self.output_tokens.broadcast_as((count, self.output_tokens.dim(1)?, hidden))?;
        let embedding = match sparse {
            Some(sparse) => Tensor::cat(&[&output_tokens.contiguous()?, sparse], 1)?,
            None => output_tokens.contiguous()?,
        }; // (batch * prompts, tokens, hidden)
        // each picture once for each of its prompts
        let picture = picture.reshape((batch, 1, rows * columns, hidden))?;
        let picture = picture.broadcast_as((batch, prompts.each, rows * columns, hidden))?;
        let mut picture = picture.reshape((count, rows * columns, hidden))?;
        let mut x = embedding.clone();
        for layer in &self.layers {
            (x, picture) = layer.forward(&x, &embedding, &picture)?;
        }
        let query = self.final_query.forward(&plus(&x, &embedding)?)?;
        let of_picture = self.final_picture.forward(&picture)?;
        let part = |i: usize| self.final_picture.part(&of_picture, i);
        let attended = self.final_attention.forward(&query, &part(0)?, &part(1)?, None)?;
        let x = self.layer_norm_final_attn.forward(&self.final_out.forward_add(&attended, &x)?)?;

        let token = |i: usize| x.narrow(1, i, 1)?.squeeze(1); // (batch * prompts, hidden)
        let (first, masks) = self.cfg.masks(prompts.multimask);
        let hyper = (first..first + masks).map(|i| self.output_hypernetworks_mlps[i].forward(&token(1 + i)?));
        let hyper = Tensor::stack(&hyper.collect::<Result<Vec<_>>>()?, 1)?; // (batch * prompts, masks, hidden / 8)
        let picture = self.upscale_conv1.forward(&picture.reshape((count, rows, columns, hidden))?)?;
        let picture = Activation::Gelu.forward(&self.upscale_layer_norm.forward(&picture)?)?;
        let picture = self.upscale_conv2.forward_act(&picture, Activation::Gelu)?;
        let pixels = MASK_SCALE * MASK_SCALE * rows * columns;
        let picture = picture.reshape((count, pixels, hidden / 8))?;
        // few rows of little depth, which candle's product reads from the transposed picture in place
        roofbench_nn::cost::elementwise(count * masks * pixels, 2 * (hidden / 8));
        let pred_masks = hyper.matmul(&picture.t()?)?;
        let iou_scores = self.iou_prediction_head.forward(&token(0)?)?.narrow(1, first, masks)?;
        let size = (batch, prompts.each, masks, MASK_SCALE * rows, MASK_SCALE * columns);
        Ok((pred_masks.reshape(size)?, iou_scores.reshape((batch, prompts.each, masks))?))
    }
}

/// Points of each prompt.
struct Points {
    /// In each prompt.
    each: usize,
    /// x and y, in pixels.
    places: Vec<[f64; 2]>,
    /// 1 object, 0 background, -1 no point, -10 padding.
    labels: Vec<i64>,
}

/// The arguments of `forward` but for the picture, checked.
struct Prompts {
    batch: usize,
    /// Prompts for each picture.
    each: usize,
    points: Option<Points>,
    /// x1, y1, x2, y2 in pixels.
    boxes: Option<Vec<[f64; 4]>>,
    /// (batch or 1, 1, 4 rows, 4 columns)
    masks: Option<Tensor>,
    multimask: bool,
}

impl Prompts {
    /// Of all pictures.
    fn count(&self) -> usize {
        self.batch * self.each
    }

    /// Tokens that points and boxes become, of each prompt.
    fn sparse_tokens(&self) -> usize {
        let of_boxes = if self.boxes.is_some() { 2 } else { 0 };
        // points are followed by one that is none, unless boxes follow
        let of_points = self.points.as_ref().map_or(0, |points| points.each + usize::from(self.boxes.is_none()));
        of_points + of_boxes
    }

    fn read(cfg: &SamConfig, inputs: &Inputs, call: &Call, batch: usize) -> Result<Self, SessionError> {
        let shaped = |name: &str, rank: usize, last: usize, form: &str| -> Result<Option<Tensor>, SessionError> {
            let Some(tensor) = call.inputs.get(name) else { return Ok(None) };
            let dims = tensor.dims();
            if dims.len() != rank || dims[rank - 1] != last || dims[0] != batch || dims.contains(&0) {
                let reason = format!("has shape {dims:?}, expected {form} with batch = {batch}, none of them 0");
                return Err(SessionError::input(name, reason));
            }
            Ok(Some(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten(1, rank - 2)?))
        };
        let each = |name: &str| call.inputs.get(name).map(|tensor| tensor.dims()[1]);
        let points = shaped("input_points", 4, 2, "(batch, prompts, points, 2)")?;
        let boxes = shaped("input_boxes", 3, 4, "(batch, prompts, 4)")?;
        let (of_points, of_boxes) = (each("input_points"), each("input_boxes"));
        if let (Some(points), Some(boxes)) = (of_points, of_boxes)
            && points != boxes
        {
            let reason = format!("has boxes of {boxes} prompts, input_points has points of {points}");
            return Err(SessionError::input("input_boxes", reason));
        }
        let prompts = of_points.or(of_boxes).unwrap_or(1);
        let points = match points {
            Some(points) => {
                let each = points.dim(1)? / prompts;
                let places = points.flatten_to(1)?.to_vec2::<f64>()?.into_iter().map(|place| [place[0], place[1]]);
                Some(Points { each, places: places.collect(), labels: labels(call, [batch, prompts, each])? })
            }
            None if call.inputs.contains_key("input_labels") => {
                return Err(SessionError::input("input_labels", "is given without input_points"));
            }
            None => None,
        };
        let boxes = match boxes {
            Some(boxes) => {
                let rows = boxes.flatten_to(1)?.to_vec2::<f64>()?;
                Some(rows.into_iter().map(|row| [row[0], row[1], row[2], row[3]]).collect())
            }
            None => None,
        };
        let side = MASK_SCALE * cfg.vision_config.grid();
        let masks = call.inputs.get("input_masks").cloned();
        if let Some(masks) = &masks {
            let fits = matches!(masks.dims(), [n, 1, h, w] if [1, batch].contains(n) && [*h, *w] == [side; 2]);
            if !fits || !masks.dtype().is_float() {
                let found = format!("{:?} of type {:?}", masks.dims(), masks.dtype());
                let reason = format!("has shape {found}, expected floats ({batch} or 1, 1, {side}, {side})");
                return Err(SessionError::input("input_masks", reason));
            }
        }
        let multimask = !call.arguments.contains_key("multimask_output") || inputs.flag("multimask_output")?;
        Ok(Self { batch, each: prompts, points, boxes, masks, multimask })
    }
}

/// The labels of points; all on the object where the call leaves them out.
fn labels(call: &Call, shape: [usize; 3]) -> Result<Vec<i64>, SessionError> {
    let Some(labels) = call.inputs.get("input_labels") else { return Ok(vec![1; shape.iter().product()]) };
    if labels.dims() != shape || !labels.dtype().is_int() {
        let found = format!("{:?} of type {:?}", labels.dims(), labels.dtype());
        let reason = format!("has shape {found}, expected integers {shape:?} (batch, prompts, points)");
        return Err(SessionError::input("input_labels", reason));
    }
    Ok(labels.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
}

/// What a call gives of the picture.
enum Picture<'a> {
    /// (batch, channels, height, width)
    Pixels(&'a Tensor),
    /// (batch, channels, rows, columns)
    Embeddings(&'a Tensor),
}

/// The arguments of a call, checked.
enum Request<'a> {
    /// `get_image_embeddings`, of these pixels.
    Embed(&'a Tensor),
    /// `forward`.
    Segment(Picture<'a>, Prompts),
}

impl<'a> Request<'a> {
    fn read(cfg: &SamConfig, call: &'a Call) -> Result<Self, SessionError> {
        let vision = &cfg.vision_config;
        let pixels = |inputs: &Inputs<'a>| {
            let pixels = inputs.pictures("pixel_values", vision.num_channels)?;
            let (_, _, height, width) = pixels.dims4()?;
            if [height, width] != [vision.image_size; 2] {
                let side = vision.image_size;
                let reason = format!("is {height} x {width} pixels, image_size is {side} x {side}; pad the picture");
                return Err(SessionError::input("pixel_values", reason));
            }
            Ok(pixels)
        };
        if call.method == "get_image_embeddings" {
            let inputs = Inputs::of_any_method(call, &["pixel_values"])?;
            if let Some(name) = call.arguments.keys().next() {
                return Err(SessionError::input(name, "is not supported for this method; supported: pixel_values"));
            }
            return pixels(&inputs).map(Self::Embed);
        }
        if call.method != "forward" {
            return Err(unsupported_method(call, "forward, get_image_embeddings"));
        }
        let tensors =
            ["pixel_values", "image_embeddings", "input_points", "input_labels", "input_boxes", "input_masks"];
        let inputs = Inputs::forward(call, &tensors, &["multimask_output"])?;
        let picture = match (call.inputs.get("image_embeddings"), call.inputs.contains_key("pixel_values")) {
            (Some(_), true) => {
                return Err(SessionError::input("image_embeddings", "is given beside pixel_values; give one of them"));
            }
            (None, _) => Picture::Pixels(pixels(&inputs)?),
            (Some(embeddings), false) => {
                let (channels, grid) = (vision.output_channels, vision.grid());
                let fits =
                    matches!(embeddings.dims(), [n, c, h, w] if *n > 0 && [*c, *h, *w] == [channels, grid, grid]);
                if !fits || !embeddings.dtype().is_float() {
                    let found = format!("{:?} of type {:?}", embeddings.dims(), embeddings.dtype());
                    let reason = format!("has shape {found}, expected floats (batch, {channels}, {grid}, {grid})");
                    return Err(SessionError::input("image_embeddings", reason));
                }
                Picture::Embeddings(embeddings)
            }
        };
        let batch = match picture {
            Picture::Pixels(tensor) | Picture::Embeddings(tensor) => tensor.dim(0)?,
        };
        let prompts = Prompts::read(cfg, &inputs, call, batch)?;
        Ok(Self::Segment(picture, prompts))
    }
}

/// The three parts together.
pub struct SamModel {
    cfg: SamConfig,
    vision_encoder: VisionEncoder,
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl SamModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        if !CLASSES.contains(&spec.class.as_str()) {
            return Err(SessionError::UnsupportedClass {
                family: spec.family.clone(),
                class: spec.class.clone(),
                supported: CLASSES.join(", "),
            });
        }
        let cfg = SamConfig::from_spec(spec)?;
        let prompt_encoder = PromptEncoder::load(&cfg, &vb)?;
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let grid = prompt_encoder.shared_embedding.of_grid(cfg.vision_config.grid(), vb.device(), dtype)?;
        Ok(Self {
            vision_encoder: VisionEncoder::load(&cfg.vision_config, vb.pp("vision_encoder"))?,
            prompt_encoder,
            mask_decoder: MaskDecoder::load(&cfg.mask_decoder_config, &grid, vb.pp("mask_decoder"))?,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    /// A tensor of the call where and as the layers want it.
    fn activation(&self, x: &Tensor) -> Result<Tensor> {
        x.to_device(&self.device)?.to_dtype(activation_dtype(self.dtype, &self.device))
    }

    fn forward(&self, request: &Request) -> Result<Tensors> {
        let (picture, prompts) = match request {
            Request::Embed(pixels) => {
                let embeddings = self.vision_encoder.forward(&self.activation(pixels)?)?;
                return Ok([("image_embeddings".to_owned(), to_channels_first(&embeddings)?)].into());
            }
            Request::Segment(Picture::Pixels(pixels), prompts) => {
                (self.vision_encoder.forward(&self.activation(pixels)?)?, prompts)
            }
            Request::Segment(Picture::Embeddings(embeddings), prompts) => {
                (to_channels_last(&self.activation(embeddings)?)?, prompts)
            }
        }; // (batch, rows, columns, hidden)
        let sparse = self.prompt_encoder.sparse(prompts, &picture)?;
        let dense = self.prompt_encoder.dense(prompts.masks.as_ref(), &picture)?;
        roofbench_nn::cost::elementwise(picture.elem_count(), 1);
        let picture = picture.broadcast_add(&dense)?;
        let (pred_masks, iou_scores) = self.mask_decoder.forward(&picture, sparse.as_ref(), prompts)?;
        Ok([("iou_scores".to_owned(), iou_scores), ("pred_masks".to_owned(), pred_masks)].into())
    }
}

impl Session for SamModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Request::read(&self.cfg, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, &Request::read(&self.cfg, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one call.
fn forward_cost(cfg: &SamConfig, request: &Request, dtype: DType) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let elements = |x: &Tensor| cost::input(x.elem_count() as u64, bytes);
    let cost = match request {
        Request::Embed(pixels) => vision_cost(&cfg.vision_config, pixels.dim(0)?, bytes) + elements(pixels),
        Request::Segment(picture, prompts) => {
            let picture = match picture {
                Picture::Pixels(pixels) => vision_cost(&cfg.vision_config, prompts.batch, bytes) + elements(pixels),
                Picture::Embeddings(embeddings) => elements(embeddings),
            };
            picture + prompt_cost(cfg, prompts, bytes) + decoder_cost(cfg, prompts, bytes)
        }
    };
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
}

/// Of the picture's embedding.
fn vision_cost(cfg: &SamVisionConfig, batch: usize, bytes: u64) -> Cost {
    let [batch, grid, hidden, channels, inner, heads, head_dim] = [
        batch,
        cfg.grid(),
        cfg.hidden_size,
        cfg.output_channels,
        cfg.mlp_dim(),
        cfg.num_attention_heads,
        cfg.head_dim(),
    ]
    .map(|size| size as u64);
    let patches = grid * grid;
    let tokens = batch * patches;
    let linear = |input, output, bias| cost::linear(tokens, input, output, bias, bytes);
    let norm = |width| cost::norm(Norm::Layer, tokens, width, bytes);
    let residual = cost::elementwise(tokens * hidden, 1);
    let conv = |in_channels, out_channels, side: u64, bias| cost::Conv2d {
        batch,
        in_channels,
        out_channels,
        kernel: [side, side],
        groups: 1,
        output: [grid, grid],
        bias,
    };
    let positions = match cfg.use_abs_pos {
        true => residual + Cost { weight_bytes: patches * hidden * bytes, ..Cost::default() },
        false => Cost::default(),
    };
    let attention = |window: u64| {
        // what pads the last windows is seen by the others, but sees nothing itself
        let pairs = patches * window * window;
        let scores = cost::Attention {
            batch,
            heads,
            kv_heads: heads,
            head_dim,
            queries: patches,
            cached: 0,
            visible_pairs: pairs,
        };
        // products with a vector for each line and column of the window, two of which are added to each score
        let relative = cost::elementwise(tokens * heads * 2 * window, 2 * head_dim)
            + cost::elementwise(batch * heads * pairs, 2)
            + Cost { weight_bytes: 2 * (2 * window - 1) * head_dim * bytes, ..Cost::default() };
        scores.cost(bytes) + if cfg.use_rel_pos { relative } else { Cost::default() }
    };
    let layer = |i: usize| {
        norm(hidden)
            + linear(hidden, 3 * hidden, cfg.qkv_bias)
            + attention(cfg.window(i) as u64)
            + linear(hidden, hidden, true)
            + residual
            + norm(hidden)
            + linear(hidden, inner, true)
            + cost::elementwise(tokens * inner, 1)
            + linear(inner, hidden, true)
            + residual
    };
    let neck = linear(hidden, channels, false)
        + norm(channels)
        + conv(channels, channels, 3, false).cost(bytes)
        + norm(channels);
    let patch_embed = conv(cfg.num_channels as u64, hidden, cfg.patch_size as u64, true);
    patch_embed.cost(bytes) + positions + (0..cfg.num_hidden_layers).map(layer).sum::<Cost>() + neck
}

/// Of the prompts' embeddings, and of adding them to the picture's.
fn prompt_cost(cfg: &SamConfig, prompts: &Prompts, bytes: u64) -> Cost {
    let prompt = &cfg.prompt_encoder_config;
    let [batch, grid, hidden, channels] =
        [prompts.batch, cfg.vision_config.grid(), prompt.hidden_size, prompt.mask_input_channels].map(|n| n as u64);
    let points = (prompts.count() * prompts.sparse_tokens()) as u64;
    let frequencies = cfg.vision_config.num_pos_feats as u64;
    let weights = |elements: u64| Cost { weight_bytes: elements * bytes, ..Cost::default() };
    let sparse = cost::elementwise(points, ENCODING_FLOPS as u64 * frequencies)
        + Cost { activation_bytes: points * hidden * bytes, ..Cost::default() }
        // the frequencies, and the kinds of points with what is none
        + if points > 0 { weights(2 * frequencies + (POINT_KINDS as u64 + 1) * hidden) } else { Cost::default() };
    let dense = match &prompts.masks {
        None => weights(hidden),
        Some(masks) => {
            let items = masks.dims()[0] as u64;
            let halved = |in_channels, out_channels, side: u64| {
                let pixels = items * side * side;
                let conv = cost::Conv2d {
                    batch: items,
                    in_channels,
                    out_channels,
                    kernel: [2, 2],
                    groups: 1,
                    output: [side, side],
                    bias: true,
                };
                conv.cost(bytes)
                    + cost::norm(Norm::Layer, pixels, out_channels, bytes)
                    + cost::elementwise(pixels * out_channels, 1) // activation
            };
            cost::input(masks.elem_count() as u64, bytes)
                + halved(1, channels / 4, 2 * grid)
                + halved(channels / 4, channels, grid)
                + cost::linear(items * grid * grid, channels, hidden, true, bytes)
        }
    };
    sparse + dense + cost::elementwise(batch * grid * grid * hidden, 1)
}

/// Of the decoder.
fn decoder_cost(cfg: &SamConfig, prompts: &Prompts, bytes: u64) -> Cost {
    let decoder = &cfg.mask_decoder_config;
    let (_, masks) = decoder.masks(prompts.multimask);
    let [count, grid, hidden, width, inner, heads, tokens, masks, all_masks, iou, depth] = [
        prompts.count(),
        cfg.vision_config.grid(),
        decoder.hidden_size,
        decoder.cross_width(),
        decoder.mlp_dim,
        decoder.num_attention_heads,
        1 + decoder.mask_tokens() + prompts.sparse_tokens(),
        masks,
        decoder.mask_tokens(),
        decoder.iou_head_hidden_dim,
        decoder.iou_head_depth,
    ]
    .map(|size| size as u64);
    let patches = grid * grid;
    let (rows, pixels) = (count * tokens, count * patches);
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let weights = |elements: u64| Cost { weight_bytes: elements * bytes, ..Cost::default() };
    let sum = |elements| cost::elementwise(elements, 1);
    let attention = |width: u64, queries, keys| {
        let visible_pairs = cost::full_pairs(queries, keys);
        let head_dim = width / heads;
        cost::Attention { batch: count, heads, kv_heads: heads, head_dim, queries, cached: 0, visible_pairs }
            .cost(bytes)
    };
    let residual = sum(rows * hidden);
    let layer = |i: u64| {
        // prompts' positions and the residual, but for the first
        let first = if i == 0 { Cost::default() } else { residual * 2 };
        first
            + linear(rows, hidden, 2 * hidden) + linear(rows, hidden, hidden) // query and key, value
            + attention(hidden, tokens, tokens)
            + linear(rows, hidden, hidden) + norm(rows, hidden)
            // the picture's key, value and query, with what positions add
            + linear(pixels, hidden, 3 * width) + sum(pixels * 3 * width) + weights(patches * 3 * width)
            + residual + linear(rows, hidden, width) // prompts' query
            + attention(width, tokens, patches)
            + linear(rows, width, hidden) + residual + norm(rows, hidden)
            + linear(rows, hidden, inner) + sum(rows * inner) // activation
            + linear(rows, inner, hidden) + residual + norm(rows, hidden)
            + residual + linear(rows, hidden, width) + linear(rows, hidden, width) // prompts' key and value
            + attention(width, patches, tokens)
            + linear(pixels, width, hidden) + sum(pixels * hidden) + norm(pixels, hidden)
    };
    let last = residual
        + linear(rows, hidden, width)
        + linear(pixels, hidden, 2 * width)
        + sum(pixels * 2 * width)
        + weights(patches * 2 * width)
        + attention(width, tokens, patches)
        + linear(rows, width, hidden)
        + residual
        + norm(rows, hidden);
    // each pixel becomes four; a bias for each of them
    let doubled = |pixels: u64, input: u64, output: u64| {
        cost::linear(pixels, input, 4 * output, false, bytes) + sum(4 * pixels * output) + weights(output)
    };
    let upscale = doubled(pixels, hidden, hidden / 4)
        + norm(4 * pixels, hidden / 4) + sum(4 * pixels * (hidden / 4)) // activation
        + doubled(4 * pixels, hidden / 4, hidden / 8) + sum(16 * pixels * (hidden / 8));
    // with a rectifier after all but the last product
    let feed_forward = |inner: u64, output: u64, depth: u64| {
        linear(count, hidden, inner)
            + linear(count, inner, inner) * (depth - 2)
            + sum(count * inner * (depth - 1))
            + linear(count, inner, output)
    };
    let product = cost::elementwise(16 * pixels * masks, 2 * (hidden / 8))
        + Cost { activation_bytes: 16 * pixels * masks * bytes, ..Cost::default() };
    weights((1 + all_masks) * hidden)
        + (0..decoder.num_hidden_layers as u64).map(layer).sum::<Cost>()
        + last
        + upscale
        + feed_forward(hidden, hidden / 8, 3) * masks
        + feed_forward(iou, all_masks, depth)
        + product
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    /// 3 x 3 patches in windows of 2.
    fn spec(part: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "vision_config": {
                "hidden_size": 8, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 12, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16, "image_size": 12, "patch_size": 4, "mask_input_channels": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 16, "mlp_dim": 12, "num_attention_heads": 2, "iou_head_hidden_dim": 6,
            },
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[part][field] = value.clone();
        }
        ModelSpec {
            family: "sam".into(),
            class: "SamModel".into(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    fn model(spec: &ModelSpec) -> SamModel {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, ALIASES, &spec.class, &HubOptions::from_env()).expect("weights");
        SamModel::load(spec, weights.var_builder(spec.dtype, &spec.device)).expect("a model")
    }

    fn values(name: &str, shape: &[usize]) -> Tensor {
        synthetic::tensor(&format!("input:{name}"), shape, 0, DType::F32, &Device::Cpu).expect("values")
    }

    fn call(inputs: &[(&str, Tensor)]) -> Call {
        let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        Call { method: "forward".into(), inputs, ..Call::default() }
    }

    fn pixels(batch: usize) -> (&'static str, Tensor) {
        ("pixel_values", values("pixel_values", &[batch, 3, 12, 12]))
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        let difference = (a - b).and_then(|x| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
        difference.expect("tensors of one shape")
    }

    #[test]
    fn an_embedding_serves_any_number_of_prompts() -> Result<(), SessionError> {
        let mut sam = model(&spec("vision_config", json!({})));
        let embed = Call { method: "get_image_embeddings".into(), ..call(&[pixels(2)]) };
        let embeddings = sam.call(&embed, &mut Unobserved)?.remove("image_embeddings").expect("embeddings");
        assert_eq!(embeddings.dims(), [2, 16, 3, 3]);
        let points = ("input_points", (values("points", &[2, 3, 2, 2]) * 12.0)?);
        let at_once = sam.call(&call(&[pixels(2), points.clone()]), &mut Unobserved)?;
        assert_eq!(at_once["pred_masks"].dims(), [2, 3, 3, 12, 12]);
        assert_eq!(at_once["iou_scores"].dims(), [2, 3, 3]);
        // each prompt by itself, on the embedding
        for prompt in 0..3 {
            let alone = ("input_points", points.1.narrow(1, prompt, 1)?);
            let alone = sam.call(&call(&[("image_embeddings", embeddings.clone()), alone]), &mut Unobserved)?;
            for (name, alone) in alone {
                let together = at_once[&name].narrow(1, prompt, 1)?;
                assert!(largest_difference(&together, &alone) < 1e-5, "{name} of prompt {prompt}");
            }
        }
        Ok(())
    }

    #[test]
    fn one_mask_is_the_first_of_all() -> Result<(), SessionError> {
        let mut sam = model(&spec("vision_config", json!({})));
        let mut single = call(&[pixels(1), ("input_boxes", Tensor::new(&[[[1f32, 2., 8., 9.]]], &Device::Cpu)?)]);
        let several = sam.call(&single, &mut Unobserved)?;
        assert_eq!(several["iou_scores"].dims(), [1, 1, 3]);
        single.arguments.insert("multimask_output".into(), json!(false));
        let one = sam.call(&single, &mut Unobserved)?;
        assert_eq!((one["iou_scores"].dims(), one["pred_masks"].dims()), (&[1, 1, 1][..], &[1, 1, 1, 12, 12][..]));
        // no prompt at all is one prompt
        assert_eq!(sam.call(&call(&[pixels(1)]), &mut Unobserved)?["pred_masks"].dims(), [1, 1, 3, 12, 12]);
        Ok(())
    }

    #[test]
    fn cost_is_what_the_blocks_count() -> Result<(), SessionError> {
        for changes in [json!({}), json!({"use_rel_pos": false, "use_abs_pos": false, "qkv_bias": false})] {
            let mut sam = model(&spec("vision_config", changes));
            let points = ("input_points", values("points", &[2, 3, 2, 2]));
            let boxes = ("input_boxes", values("boxes", &[2, 3, 4]));
            let masks = ("input_masks", values("masks", &[1, 1, 12, 12]));
            let embed = Call { method: "get_image_embeddings".into(), ..call(&[pixels(2)]) };
            for call in [
                embed,
                call(&[pixels(2), points.clone()]),
                call(&[pixels(2), points, boxes, masks]),
                call(&[pixels(1)]),
            ] {
                let (outputs, recorded) = roofbench_nn::cost::record(|| sam.call(&call, &mut Unobserved));
                outputs?;
                assert_eq!(sam.cost(&call)?[0].cost.flops, recorded.flops, "{:?}", call.inputs.keys());
            }
        }
        Ok(())
    }

    #[test]
    fn cost_of_a_tiny_encoder_by_hand() {
        // 9 patches of width 8 in 2 heads of 4; the first layer in windows of 4 positions, the second over all 9
        let embeddings = 2 * (9 * 8) * 48 + 9 * 8 + 9 * 8; // pixels of a patch, biases, positions
        let attention = |positions: u64, side: u64| {
            let pairs = 2 * 9 * positions;
            2 * pairs * 4 * 2 + 5 * pairs // two products, softmax
                + 2 * (2 * 9 * 2 * side) * 4 + 2 * pairs // vectors of lines and columns, two added to each score
        };
        let layer = 2 * 7 * 9 * 8 // norms
            + 2 * 9 * 8 * 24 + 9 * 24 // query, key, value
            + 2 * 9 * 8 * 8 + 2 * 9 * 8 // output, residual
            + 2 * 9 * 8 * 32 + 2 * 9 * 32 // up, activation
            + 2 * 9 * 32 * 8 + 2 * 9 * 8; // down, residual
        let neck = 2 * 9 * 8 * 16 + 2 * 9 * 16 * (16 * 9) + 2 * 7 * 9 * 16;
        let cfg = SamConfig::from_spec(&spec("vision_config", json!({}))).expect("a config");
        let flops = vision_cost(&cfg.vision_config, 1, 4).flops;
        assert_eq!(flops, embeddings + attention(4, 2) + attention(9, 3) + 2 * layer + neck);
    }

    #[test]
    fn cost_of_sam_base() {
        let cfg = SamConfig::default();
        let cost = vision_cost(&cfg.vision_config, 1, 4);
        // the image encoder's published 89 670 912 parameters, each read once
        assert_eq!(cost.weight_bytes, 4 * 89_670_912);
        // multiply-adds by hand: products of 4096 tokens, attention over 196 and 4096 keys
        let products = 12 * 12 * 4096 * 768 * 768u64;
        let attention = 2 * 4096 * 768 * (8 * 196 + 4 * 4096u64);
        let ratio = cost.flops as f64 / (2.0 * (products + attention) as f64);
        // patches, neck, relative positions, norms, softmax and GELU are the rest
        assert!((1.0..1.03).contains(&ratio), "{} FLOP, {ratio}", cost.flops);
    }

    #[test]
    fn configs_that_contradict_themselves_name_the_field() {
        let message = |part: &str, changes: Value| {
            SamConfig::from_spec(&spec(part, changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message("vision_config", json!({})), "");
        for (part, changes, start) in [
            ("vision_config", json!({"hidden_size": 9}), "vision_config.hidden_size`: 9 is not a multiple of 2"),
            ("vision_config", json!({"patch_size": 0}), "vision_config.patch_size`: gives 0, not in"),
            ("vision_config", json!({"patch_size": 16}), "vision_config.patch_size`: gives 0, not in"),
            ("vision_config", json!({"num_pos_feats": 7}), "vision_config.num_pos_feats`: does not fit"),
            ("prompt_encoder_config", json!({"hidden_size": 8}), "prompt_encoder_config.hidden_size`: does not fit"),
            ("prompt_encoder_config", json!({"image_size": 16}), "prompt_encoder_config.image_embedding_size`: does"),
            ("prompt_encoder_config", json!({"num_point_embeddings": 2}), "prompt_encoder_config.num_point_embeddings"),
            ("mask_decoder_config", json!({"num_attention_heads": 3}), "mask_decoder_config.hidden_size`: 16 is not"),
            ("mask_decoder_config", json!({"iou_head_depth": 1}), "mask_decoder_config.iou_head_depth`: 1 is less"),
            ("mask_decoder_config", json!({"hidden_act": "maxout"}), "mask_decoder_config.hidden_act`: activation"),
        ] {
            let found = message(part, changes);
            assert!(found.starts_with(&format!("config.json: `{start}")), "{found}");
        }
        let class = ModelSpec { class: "SamVisionModel".into(), ..spec("vision_config", json!({})) };
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, "SamModel", &HubOptions::from_env());
        let vb = weights.expect("weights").var_builder(DType::F32, &Device::Cpu);
        let error = SamModel::load(&class, vb).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error, "sam: class `SamVisionModel` is not supported; supported: SamModel");
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let cfg = SamConfig::from_spec(&spec("vision_config", json!({}))).expect("a config");
        let message = |call: &Call| Request::read(&cfg, call).err().map(|e| e.to_string()).unwrap_or_default();
        let points = || ("input_points", values("points", &[1, 2, 3, 2]));
        let labels = |shape: &[usize]| ("input_labels", Tensor::zeros(shape, DType::I64, &Device::Cpu).expect("zeros"));
        assert_eq!(message(&call(&[pixels(1), points(), labels(&[1, 2, 3])])), "");
        let embeddings = ("image_embeddings", values("embeddings", &[1, 16, 3, 3]));
        for (inputs, part) in [
            (vec![], "`pixel_values`: is missing"),
            (vec![pixels(1), embeddings.clone()], "`image_embeddings`: is given beside pixel_values"),
            (vec![("pixel_values", values("small", &[1, 3, 8, 12]))], "`pixel_values`: is 8 x 12 pixels"),
            (vec![("image_embeddings", values("e", &[1, 16, 3, 4]))], "expected floats (batch, 16, 3, 3)"),
            (vec![pixels(2), points()], "`input_points`: has shape [1, 2, 3, 2], expected"),
            (vec![pixels(1), labels(&[1, 2, 3])], "`input_labels`: is given without input_points"),
            (vec![pixels(1), points(), labels(&[1, 2])], "`input_labels`: has shape [1, 2]"),
            (vec![pixels(1), points(), ("input_boxes", values("b", &[1, 1, 4]))], "`input_boxes`: has boxes of 1"),
            (vec![pixels(1), ("input_masks", values("m", &[1, 1, 3, 3]))], "expected floats (1 or 1, 1, 12, 12)"),
            (vec![pixels(1), ("attention_similarity", values("s", &[1]))], "`attention_similarity`: is not supported"),
        ] {
            let found = message(&call(&inputs));
            assert!(found.contains(part), "{found}");
        }
        let other = Call { method: "get_prompt_embeddings".into(), ..call(&[points()]) };
        assert!(message(&other).contains("supported: forward, get_image_embeddings"));
    }
}
