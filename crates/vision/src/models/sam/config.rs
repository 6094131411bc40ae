//! The parts of `config.json` that shape the computation.

use roofbench_core::config;
use roofbench_core::session::{ModelSpec, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern};
use serde::Deserialize;

use super::prompt_encoder::POINT_KINDS;

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
    pub(crate) fn grid(&self) -> usize {
        self.image_size / self.patch_size.max(1)
    }

    pub(crate) fn mlp_dim(&self) -> usize {
        self.mlp_dim.unwrap_or((self.hidden_size as f64 * self.mlp_ratio) as usize)
    }

    pub(super) fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Height and width of what a layer's attention sees.
    pub(super) fn window(&self, layer: usize) -> usize {
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
#[derive(Debug, Clone, PartialEq, Deserialize)]
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
    pub(super) fn cross_width(&self) -> usize {
        self.hidden_size / self.attention_downsample_rate
    }

    pub(super) fn attention(&self, width: usize) -> Attention {
        let heads = self.num_attention_heads;
        Attention { heads, kv_heads: heads, head_dim: width / heads, scale: None, pattern: Pattern::Full }
    }

    /// One mask for a clear prompt, and those for an ambiguous one.
    pub(super) fn mask_tokens(&self) -> usize {
        self.num_multimask_outputs + 1
    }

    /// Which masks are given: the first, and how many.
    pub(super) fn masks(&self, multimask: bool) -> (usize, usize) {
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
        config::sizes(&sizes)?;
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
            return Err(config::invalid(field, format!("{size} is not a multiple of {of}")));
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
            return Err(config::invalid(field, format!("does not fit {what}: {found} where {expected} are needed")));
        }
        if prompt.num_point_embeddings < POINT_KINDS {
            let reason = format!("{} is less than {POINT_KINDS}", prompt.num_point_embeddings);
            return Err(config::invalid("prompt_encoder_config.num_point_embeddings", reason));
        }
        if decoder.iou_head_depth < 2 {
            let reason = format!("{} is less than 2", decoder.iou_head_depth);
            return Err(config::invalid("mask_decoder_config.iou_head_depth", reason));
        }
        Ok(cfg)
    }
}
