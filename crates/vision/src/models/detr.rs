//! DETR: the map of a ResNet as tokens of a post-norm encoder, from which a decoder's learned queries find one object
//! each; for segmentation a pyramid of convolutions makes a mask of each query's attention.
//! Source: DETR (arXiv:2005.12872). Mirrors `transformers.DetrModel`, `DetrForObjectDetection` and
//! `DetrForSegmentation`.

use std::collections::{BTreeMap, HashMap};
use std::f32::consts::TAU;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::conv::{Conv2d, Conv2dConfig};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::{GroupNorm, LayerNorm};
use roofbench_nn::resize::{nearest, nearest_add};
use serde::Deserialize;
use serde_json::Value;

use super::activation_dtype;
use super::resnet::{LayerType, Naming, Plan, ResNet, ResNetConfig};

/// The classes that run.
pub const CLASSES: &[&str] = &["DetrModel", "DetrForObjectDetection", "DetrForSegmentation"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // the batch norms are frozen
    AliasRule::drop(r"\.num_batches_tracked$", AliasScope::Always),
    // a `timm` backbone inside of `transformers.TimmBackbone`
    AliasRule::rename(r"\._backbone\.", ".", AliasScope::Always),
    // a detector from a checkpoint for segmentation
    AliasRule::drop(r"^(mask_head|bbox_attention)\.", DETECTOR),
    AliasRule::rename(r"^detr\.", "", DETECTOR),
    // a base model from a checkpoint with a head
    AliasRule::drop(r"^(mask_head|bbox_attention)\.", AliasScope::Base),
    AliasRule::drop(r"^(detr\.)?(class_labels_classifier|bbox_predictor)\.", AliasScope::Base),
    AliasRule::rename(r"^(detr\.)?model\.", "", AliasScope::Base),
];
const DETECTOR: AliasScope = AliasScope::Class("DetrForObjectDetection");

/// What every layer and group norm adds to the variance.
const NORM_EPS: f64 = 1e-5;
/// Rows and columns for which positions are learned.
const LEARNED: usize = 50;
/// Groups of channels that the mask head normalises together, where there are as many channels.
const GROUPS: usize = 8;

/// How the encoder's tokens know their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PositionEmbedding {
    /// Sines and cosines of row and column, counted over the pixels that exist.
    Sine,
    /// A learned vector for each row and each column.
    Learned,
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct DetrConfig {
    /// Colour channels of a `timm` backbone's pictures.
    pub num_channels: usize,
    /// Objects that are looked for.
    pub num_queries: usize,
    /// Layers of the encoder.
    pub encoder_layers: usize,
    /// Width inside the encoder's feed-forward halves.
    pub encoder_ffn_dim: usize,
    /// Heads of the encoder's attention, and of the mask head's.
    pub encoder_attention_heads: usize,
    /// Layers of the decoder.
    pub decoder_layers: usize,
    /// Width inside the decoder's feed-forward halves.
    pub decoder_ffn_dim: usize,
    /// Heads of the decoder's attention.
    pub decoder_attention_heads: usize,
    /// Activation of the feed-forward halves and of the mask head.
    pub activation_function: Activation,
    /// Width of the stream.
    pub d_model: usize,
    /// Every layer of the decoder is followed by its final norm, for losses on each, and not the last one alone.
    pub auxiliary_loss: bool,
    /// How the encoder's tokens know their place.
    pub position_embedding_type: PositionEmbedding,
    /// The last stage of a `timm` backbone is dilated and does not halve its map.
    pub dilation: bool,
    /// Name of a `timm` backbone.
    pub backbone: Option<String>,
    /// The backbone's own config.
    pub backbone_config: Option<Value>,
    /// Where there is no `backbone_config`, the backbone comes from `timm`.
    pub use_timm_backbone: Option<bool>,
    /// Other options of the backbone; none is supported.
    pub backbone_kwargs: Option<Value>,
}

/// What `transformers.DetrConfig` takes for absent fields.
impl Default for DetrConfig {
    fn default() -> Self {
        Self {
            num_channels: 3,
            num_queries: 100,
            encoder_layers: 6,
            encoder_ffn_dim: 2048,
            encoder_attention_heads: 8,
            decoder_layers: 6,
            decoder_ffn_dim: 2048,
            decoder_attention_heads: 8,
            activation_function: Activation::Relu,
            d_model: 256,
            auxiliary_loss: false,
            position_embedding_type: PositionEmbedding::Sine,
            dilation: false,
            backbone: None,
            backbone_config: None,
            use_timm_backbone: None,
            backbone_kwargs: None,
        }
    }
}

/// What is read of a `backbone_config` besides the backbone's shape.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BackboneConfig {
    model_type: Option<String>,
    backbone: Option<String>,
    num_channels: Option<usize>,
    out_features: Option<Vec<String>>,
    out_indices: Option<Vec<i64>>,
    output_stride: Option<usize>,
}

/// The backbone that a config describes.
#[derive(Debug, Clone)]
struct BackbonePlan {
    resnet: Plan,
    naming: Naming,
    /// Maps that are used, in ascending order: 0 for the stem's, `n` for stage `n`'s.
    features: Vec<usize>,
}

impl BackbonePlan {
    /// Stage of the map that the encoder sees.
    fn last(&self) -> usize {
        self.features.last().copied().unwrap_or_default()
    }
}

impl DetrConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("num_channels", cfg.num_channels),
            ("num_queries", cfg.num_queries),
            ("encoder_layers", cfg.encoder_layers),
            ("encoder_ffn_dim", cfg.encoder_ffn_dim),
            ("encoder_attention_heads", cfg.encoder_attention_heads),
            ("decoder_layers", cfg.decoder_layers),
            ("decoder_ffn_dim", cfg.decoder_ffn_dim),
            ("decoder_attention_heads", cfg.decoder_attention_heads),
            ("d_model", cfg.d_model),
        ])?;
        let width = ("d_model", cfg.d_model);
        config::multiple(width, ("encoder_attention_heads", cfg.encoder_attention_heads))?;
        config::multiple(width, ("decoder_attention_heads", cfg.decoder_attention_heads))?;
        // rows and columns have half of the width each, sines and cosines half of that
        if !cfg.d_model.is_multiple_of(4) {
            return Err(config::invalid("d_model", format!("{} is not a multiple of 4", cfg.d_model)));
        }
        Ok(cfg)
    }

    /// The backbone of `backbone_config`, or of the fields that older files have instead.
    fn backbone(&self, spec: &ModelSpec) -> Result<BackbonePlan, SessionError> {
        let unsupported = |field: &str, value: &Value, supported: &[&str]| {
            let supported: Vec<Value> = supported.iter().map(|value| Value::from(*value)).collect();
            config::unsupported(spec, field, value, &supported)
        };
        let is_empty = |kwargs: &&Value| kwargs.as_object().is_some_and(|kwargs| kwargs.is_empty());
        if let Some(kwargs) = self.backbone_kwargs.as_ref().filter(|kwargs| !is_empty(kwargs)) {
            return Err(unsupported("backbone_kwargs", kwargs, &["null, with the options in backbone_config"]));
        }
        let Some(config) = &self.backbone_config else {
            if self.use_timm_backbone == Some(false) {
                // what the class does, whatever `backbone` says
                let resnet = ResNetConfig::default().plan();
                return Ok(BackbonePlan { resnet, naming: Naming::Library, features: vec![4] });
            }
            let stride = if self.dilation { Some(16) } else { None };
            let name = self.backbone.as_deref().unwrap_or("resnet50");
            return timm(name, self.num_channels, stride, vec![1, 2, 3, 4])
                .ok_or_else(|| unsupported("backbone", &name.into(), TIMM));
        };
        let parse_error = |error: serde_json::Error| config::invalid("backbone_config", error.to_string());
        let backbone = BackboneConfig::deserialize(config).map_err(parse_error)?;
        let field = |field: &str| format!("backbone_config.{field}");
        match backbone.model_type.as_deref() {
            Some("resnet") => {
                let cfg = ResNetConfig::deserialize(config).map_err(parse_error)?;
                cfg.check("backbone_config.")?;
                let stages = cfg.depths.len();
                let position = |name: &String| match name.strip_prefix("stage").map(str::parse) {
                    Some(Ok(stage)) if (1..=stages).contains(&stage) => Ok(stage),
                    _ if name == "stem" => Ok(0),
                    _ => Err(config::invalid(&field("out_features"), format!("has `{name}`, which is no stage"))),
                };
                let features = match (&backbone.out_features, &backbone.out_indices) {
                    (Some(names), _) => names.iter().map(position).collect::<Result<_, _>>()?,
                    (None, Some(indices)) => from_indices(indices, stages)?,
                    (None, None) => vec![stages],
                };
                checked(BackbonePlan { resnet: cfg.plan(), naming: Naming::Library, features })
            }
            Some("timm_backbone") => {
                let name = backbone.backbone.as_deref().unwrap_or_default();
                let features = from_indices(backbone.out_indices.as_deref().unwrap_or(&[-1]), 4)?;
                if features.contains(&0) {
                    // timm gives the stem's map before its pooling
                    return Err(unsupported(&field("out_indices"), &config["out_indices"], &["1 to 4"]));
                }
                if let Some(stride) = backbone.output_stride.filter(|stride| ![8, 16, 32].contains(stride)) {
                    return Err(unsupported(&field("output_stride"), &stride.into(), &["8", "16", "32"]));
                }
                let num_channels = backbone.num_channels.unwrap_or(3);
                let plan = timm(name, num_channels, backbone.output_stride, features)
                    .ok_or_else(|| unsupported(&field("backbone"), &name.into(), TIMM))?;
                checked(plan)
            }
            _ => Err(unsupported(&field("model_type"), &config["model_type"], &["resnet", "timm_backbone"])),
        }
    }

    fn attention(&self, heads: usize) -> Attention {
        Attention { heads, kv_heads: heads, head_dim: self.d_model / heads, scale: None, pattern: Pattern::Full }
    }

    fn layer_norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.d_model, NORM_EPS, vb)
    }
}

/// Indices of maps as Python counts them, from the end where negative.
fn from_indices(indices: &[i64], stages: usize) -> Result<Vec<usize>, SessionError> {
    let position = |&index: &i64| {
        let from_start = if index < 0 { index + stages as i64 + 1 } else { index };
        let position = usize::try_from(from_start).ok().filter(|position| *position <= stages);
        position
            .ok_or_else(|| config::invalid("backbone_config.out_indices", format!("has {index}, which is no stage")))
    };
    indices.iter().map(position).collect()
}

/// Maps in ascending order, at least one.
fn checked(plan: BackbonePlan) -> Result<BackbonePlan, SessionError> {
    if plan.features.is_empty() || !plan.features.is_sorted_by(|a, b| a < b) {
        let reason = format!("gives the maps {:?}, expected some in ascending order", plan.features);
        return Err(config::invalid("backbone_config.out_features", reason));
    }
    Ok(plan)
}

/// Names that [`timm`] knows.
const TIMM: &[&str] = &["resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"];

/// A ResNet of `timm` without the stages that no map is taken of; what its tag says about training changes nothing.
fn timm(name: &str, num_channels: usize, output_stride: Option<usize>, features: Vec<usize>) -> Option<BackbonePlan> {
    use LayerType::{Basic, Bottleneck};
    let (layer_type, depths) = match name.split('.').next()? {
        "resnet18" => (Basic, [2, 2, 2, 2]),
        "resnet26" => (Bottleneck, [2, 2, 2, 2]),
        "resnet34" => (Basic, [3, 4, 6, 3]),
        "resnet50" => (Bottleneck, [3, 4, 6, 3]),
        "resnet101" => (Bottleneck, [3, 4, 23, 3]),
        "resnet152" => (Bottleneck, [3, 8, 36, 3]),
        _ => return None,
    };
    let expansion = if layer_type == Basic { 1 } else { 4 };
    let hidden_sizes = [64, 128, 256, 512].map(|size| size * expansion).to_vec();
    let cfg = ResNetConfig { num_channels, hidden_sizes, depths: depths.to_vec(), layer_type, ..Default::default() };
    let stages = features.last().copied().unwrap_or_default();
    let resnet = cfg.plan_dilated(output_stride.unwrap_or(usize::MAX)).truncated(stages);
    Some(BackbonePlan { resnet, naming: Naming::Timm, features })
}

/// Where the tokens of the encoder lie.
enum Positions {
    /// Wavelengths of half of the width.
    Sine(Vec<f32>),
    /// (50, d_model / 2) each.
    Learned { rows: Tensor, columns: Tensor },
}

impl Positions {
    fn load(cfg: &DetrConfig, vb: VarBuilder) -> Result<Self> {
        let width = cfg.d_model / 2;
        Ok(match cfg.position_embedding_type {
            PositionEmbedding::Sine => {
                let wavelength = |i: usize| 10000f32.powf((2 * (i / 2)) as f32 / width as f32);
                Self::Sine((0..width).map(wavelength).collect())
            }
            PositionEmbedding::Learned => {
                let get = |name: &str| vb.pp(name).get((LEARNED, width), "weight");
                Self::Learned { rows: get("row_embeddings")?, columns: get("column_embeddings")? }
            }
        })
    }

    /// Of the pixels that exist according to `valid`: (batch, height · width, d_model).
    fn forward(&self, valid: &Valid, dtype: DType, device: &Device) -> Result<Tensor> {
        let &Valid { batch, size: [height, width], .. } = valid;
        match self {
            Self::Sine(wavelengths) => {
                let values = sines(wavelengths, valid);
                Tensor::from_vec(values, (batch, height * width, 2 * wavelengths.len()), device)?.to_dtype(dtype)
            }
            Self::Learned { rows, columns } => {
                let half = rows.dim(1)?;
                let columns = columns.narrow(0, 0, width)?.unsqueeze(0)?.broadcast_as((height, width, half))?;
                let rows = rows.narrow(0, 0, height)?.unsqueeze(1)?.broadcast_as((height, width, half))?;
                let positions = Tensor::cat(&[columns, rows], 2)?.reshape((1, height * width, 2 * half))?;
                positions.to_dtype(dtype)?.broadcast_as((batch, height * width, 2 * half))?.contiguous()
            }
        }
    }
}

/// Sines (even) and cosines (odd) of the row, then of the column of each pixel.
///
/// A pixel's row is the number of pixels that exist in its column up to it, over their number in all of it, in turns.
/// Few such values differ, so each is worked out once.
fn sines(wavelengths: &[f32], valid: &Valid) -> Vec<f32> {
    let [height, width] = valid.size;
    let half = wavelengths.len();
    let mut known: HashMap<u32, Vec<f32>> = HashMap::new();
    let mut encode = |count: f32, total: f32, out: &mut [f32]| {
        let angle = count / (total + 1e-6) * TAU;
        let waves = known.entry(angle.to_bits()).or_insert_with(|| {
            let wave = |(i, wavelength): (usize, &f32)| {
                let angle = angle / wavelength;
                if i % 2 == 0 { angle.sin() } else { angle.cos() }
            };
            wavelengths.iter().enumerate().map(wave).collect()
        });
        out.copy_from_slice(waves);
    };
    let mut values = vec![0.0; valid.pixels.len() * 2 * half];
    for (pixels, values) in
        valid.pixels.chunks_exact(height * width).zip(values.chunks_exact_mut(height * width * 2 * half))
    {
        let count = |range: &mut dyn Iterator<Item = usize>| range.filter(|&i| pixels[i]).count() as f32;
        let columns: Vec<f32> = (0..width).map(|x| count(&mut (0..height).map(|y| y * width + x))).collect();
        let mut below = vec![0.0; width];
        for (y, values) in values.chunks_exact_mut(width * 2 * half).enumerate() {
            let total = count(&mut (y * width..(y + 1) * width));
            let mut right = 0.0;
            for (x, values) in values.chunks_exact_mut(2 * half).enumerate() {
                if pixels[y * width + x] {
                    below[x] += 1.0;
                    right += 1.0;
                }
                let (row, column) = values.split_at_mut(half);
                encode(below[x], columns[x], row);
                encode(right, total, column);
            }
        }
    }
    values
}

/// Self-attention whose queries and keys, and not whose values, know their positions.
struct PositionedAttention {
    query_key: Linear,
    v_proj: Linear,
    out_proj: Linear,
    attention: Attention,
}

impl PositionedAttention {
    fn load(cfg: &DetrConfig, heads: usize, vb: VarBuilder) -> Result<Self> {
        let width = cfg.d_model;
        Ok(Self {
            query_key: Linear::load_fused(width, &[("q_proj", width), ("k_proj", width)], true, vb.clone())?,
            v_proj: Linear::load(width, width, true, vb.pp("v_proj"))?,
            out_proj: Linear::load(width, width, true, vb.pp("out_proj"))?,
            attention: cfg.attention(heads),
        })
    }

    /// x + attention(x); all are (batch, seq, d_model).
    fn forward_add(&self, x: &Tensor, positions: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let width = x.dim(2)?;
        let query_key = self.query_key.forward(&sum(x, positions)?)?; // (batch, seq, 2 * d_model)
        let (q, k) = (query_key.narrow(2, 0, width)?, query_key.narrow(2, width, width)?);
        let attended = self.attention.forward(&q, &k, &self.v_proj.forward(x)?, mask)?;
        self.out_proj.forward_add(&attended, x)
    }
}

/// Attention of the queries to the encoder's tokens.
struct CrossAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    attention: Attention,
}

impl CrossAttention {
    fn load(cfg: &DetrConfig, vb: VarBuilder) -> Result<Self> {
        let load = |name: &str| Linear::load(cfg.d_model, cfg.d_model, true, vb.pp(name));
        Ok(Self {
            q_proj: load("q_proj")?,
            k_proj: load("k_proj")?,
            v_proj: load("v_proj")?,
            out_proj: load("out_proj")?,
            attention: cfg.attention(cfg.decoder_attention_heads),
        })
    }

    /// x + attention(x, memory) for x (batch, queries, d_model).
    fn forward_add(&self, x: &Tensor, positions: &Tensor, memory: &Memory) -> Result<Tensor> {
        let q = self.q_proj.forward(&sum(x, positions)?)?;
        let (k, v) = (self.k_proj.forward(&memory.keys)?, self.v_proj.forward(&memory.states)?);
        self.out_proj.forward_add(&self.attention.forward(&q, &k, &v, memory.mask.as_ref())?, x)
    }
}

fn sum(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    roofbench_nn::cost::elementwise(x.elem_count(), 1);
    x + y
}

/// What the encoder gives, (batch, height · width, d_model).
struct Memory {
    states: Tensor,
    /// With positions.
    keys: Tensor,
    mask: Option<Mask>,
}

struct EncoderLayer {
    self_attn: PositionedAttention,
    self_attn_layer_norm: LayerNorm,
    mlp: Mlp,
    final_layer_norm: LayerNorm,
}

impl EncoderLayer {
    fn load(cfg: &DetrConfig, vb: VarBuilder) -> Result<Self> {
        let sizes = [cfg.d_model, cfg.encoder_ffn_dim];
        Ok(Self {
            self_attn: PositionedAttention::load(cfg, cfg.encoder_attention_heads, vb.pp("self_attn"))?,
            self_attn_layer_norm: cfg.layer_norm(vb.pp("self_attn_layer_norm"))?,
            mlp: Mlp::load(sizes, cfg.activation_function, true, ["fc1", "fc2"], vb.clone())?,
            final_layer_norm: cfg.layer_norm(vb.pp("final_layer_norm"))?,
        })
    }

    /// `x`, `positions` and the result are (batch, height · width, d_model).
    fn forward(&self, x: &Tensor, positions: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let x = self.self_attn_layer_norm.forward(&self.self_attn.forward_add(x, positions, mask)?)?;
        self.final_layer_norm.forward(&self.mlp.forward_add(&x, &x)?)
    }
}

struct DecoderLayer {
    self_attn: PositionedAttention,
    self_attn_layer_norm: LayerNorm,
    encoder_attn: CrossAttention,
    encoder_attn_layer_norm: LayerNorm,
    mlp: Mlp,
    final_layer_norm: LayerNorm,
}

impl DecoderLayer {
    fn load(cfg: &DetrConfig, vb: VarBuilder) -> Result<Self> {
        let sizes = [cfg.d_model, cfg.decoder_ffn_dim];
        Ok(Self {
            self_attn: PositionedAttention::load(cfg, cfg.decoder_attention_heads, vb.pp("self_attn"))?,
            self_attn_layer_norm: cfg.layer_norm(vb.pp("self_attn_layer_norm"))?,
            encoder_attn: CrossAttention::load(cfg, vb.pp("encoder_attn"))?,
            encoder_attn_layer_norm: cfg.layer_norm(vb.pp("encoder_attn_layer_norm"))?,
            mlp: Mlp::load(sizes, cfg.activation_function, true, ["fc1", "fc2"], vb.clone())?,
            final_layer_norm: cfg.layer_norm(vb.pp("final_layer_norm"))?,
        })
    }

    /// `x`, `positions` and the result are (batch, queries, d_model); `mask` hides queries from each other.
    fn forward(&self, x: &Tensor, positions: &Tensor, mask: Option<&Mask>, memory: &Memory) -> Result<Tensor> {
        let x = self.self_attn_layer_norm.forward(&self.self_attn.forward_add(x, positions, mask)?)?;
        let x = self.encoder_attn_layer_norm.forward(&self.encoder_attn.forward_add(&x, positions, memory)?)?;
        self.final_layer_norm.forward(&self.mlp.forward_add(&x, &x)?)
    }
}

/// What the base model gives.
struct BaseOutputs {
    /// Of the backbone, channels last.
    maps: Vec<Tensor>,
    /// The last of them in the stream's width: (batch, height, width, d_model).
    projected: Tensor,
    valid: Valid,
    memory: Memory,
    /// (batch, queries, d_model)
    last_hidden_state: Tensor,
    /// Where every layer's norm is wanted, (layers, batch, queries, d_model).
    intermediate: Option<Tensor>,
}

/// `transformers.DetrModel`.
struct Base {
    features: Vec<usize>,
    backbone: ResNet,
    position_embedding: Positions,
    query_position_embeddings: Tensor, // (queries, d_model)
    input_projection: Conv2d,
    encoder: Vec<EncoderLayer>,
    decoder: Vec<DecoderLayer>,
    layernorm: LayerNorm,
    auxiliary_loss: bool,
}

impl Base {
    fn load(cfg: &DetrConfig, plan: &BackbonePlan, vb: VarBuilder) -> Result<Self> {
        let channels = plan.resnet.channels()[plan.last()];
        let query_position_embeddings =
            vb.pp("query_position_embeddings").get((cfg.num_queries, cfg.d_model), "weight")?;
        let encoder_layer = |i: usize| EncoderLayer::load(cfg, vb.pp(format!("encoder.layers.{i}")));
        let decoder_layer = |i: usize| DecoderLayer::load(cfg, vb.pp(format!("decoder.layers.{i}")));
        let projection = vb.pp("input_projection");
        Ok(Self {
            features: plan.features.clone(),
            backbone: ResNet::load(&plan.resnet, plan.naming, vb.pp("backbone.conv_encoder.model"))?,
            position_embedding: Positions::load(cfg, vb.pp("position_embedding"))?,
            query_position_embeddings: query_position_embeddings.to_dtype(activation_dtype(vb.dtype(), vb.device()))?,
            input_projection: Conv2d::load(channels, cfg.d_model, Conv2dConfig::new(1), true, projection)?,
            encoder: (0..cfg.encoder_layers).map(encoder_layer).collect::<Result<_>>()?,
            decoder: (0..cfg.decoder_layers).map(decoder_layer).collect::<Result<_>>()?,
            layernorm: cfg.layer_norm(vb.pp("decoder.layernorm"))?,
            auxiliary_loss: cfg.auxiliary_loss,
        })
    }

    fn forward(&self, inputs: &Pictures, dtype: DType, device: &Device) -> Result<BaseOutputs> {
        let pixel_values = inputs.values.to_device(device)?.to_dtype(dtype)?;
        let maps = self.backbone.forward(&pixel_values, &self.features)?;
        let Some(map) = maps.last() else { candle_core::bail!("the backbone gave no map") };
        let projected = self.input_projection.forward(map)?; // (batch, height, width, d_model)
        let (batch, height, width, d_model) = projected.dims4()?;
        let valid = inputs.valid([height, width])?;
        let (mask, positions) = (valid.mask()?, self.position_embedding.forward(&valid, dtype, device)?);
        let mut states = projected.reshape((batch, height * width, d_model))?;
        for layer in &self.encoder {
            states = layer.forward(&states, &positions, mask.as_ref())?;
        }
        let memory = Memory { keys: sum(&states, &positions)?, states, mask };

        let (queries, _) = self.query_position_embeddings.dims2()?;
        let positions = self.query_position_embeddings.broadcast_as((batch, queries, d_model))?.contiguous()?;
        let mut x = match inputs.queries {
            Some(queries) => queries.to_device(device)?.to_dtype(dtype)?,
            None => positions.zeros_like()?,
        };
        let mask = match inputs.query_mask {
            Some(mask) => Mask::padding(mask)?,
            None => None,
        };
        let mut intermediate = Vec::new();
        for layer in &self.decoder {
            x = layer.forward(&x, &positions, mask.as_ref(), &memory)?;
            if self.auxiliary_loss {
                x = self.layernorm.forward(&x)?;
                intermediate.push(x.clone());
            }
        }
        let last_hidden_state = self.layernorm.forward(&x)?;
        let intermediate = if self.auxiliary_loss { Some(Tensor::stack(&intermediate, 0)?) } else { None };
        Ok(BaseOutputs { maps, projected, valid, memory, last_hidden_state, intermediate })
    }
}

/// Label and box of each query.
struct DetectionHead {
    class_labels_classifier: Linear,
    bbox_predictor: [Linear; 3],
}

impl DetectionHead {
    fn load(cfg: &DetrConfig, labels: usize, vb: VarBuilder) -> Result<Self> {
        let width = cfg.d_model;
        let layer = |i: usize, out: usize| Linear::load(width, out, true, vb.pp(format!("bbox_predictor.layers.{i}")));
        Ok(Self {
            // the last label is that there is no object
            class_labels_classifier: Linear::load(width, labels + 1, true, vb.pp("class_labels_classifier"))?,
            bbox_predictor: [layer(0, width)?, layer(1, width)?, layer(2, 4)?],
        })
    }

    /// From (batch, queries, d_model) to (batch, queries, labels + 1) and boxes (batch, queries, 4), which are centre
    /// and size as parts of the picture's.
    fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let [first, second, last] = &self.bbox_predictor;
        let hidden = second.forward_act(&first.forward_act(x, Activation::Relu)?, Activation::Relu)?;
        Ok((self.class_labels_classifier.forward(x)?, last.forward_act(&hidden, Activation::Sigmoid)?))
    }
}

/// activation(norm(conv(x))) with a kernel of 3 x 3.
struct ConvBlock {
    conv: Conv2d,
    norm: GroupNorm,
}

impl ConvBlock {
    fn load([input, output]: [usize; 2], conv: VarBuilder, norm: VarBuilder) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::load(input, output, Conv2dConfig::new(3).padding(1), true, conv)?,
            norm: GroupNorm::load(GROUPS.min(output), output, NORM_EPS, norm)?,
        })
    }

    fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.norm.forward_act(&self.conv.forward(x)?, activation)
    }
}

/// A mask for each query: its attention to the encoder's tokens beside the map, through a pyramid of the backbone's
/// maps.
///
/// Queries go through one after the other, so that a query's maps stay in the caches. What the first convolution makes
/// of the map is the same for all of them and made once.
struct MaskHead {
    q_linear: Linear,
    k_linear: Linear,
    heads: usize,
    /// The parts of the first convolution that see the map, with the bias, and the attention.
    first: [Conv2d; 2],
    first_norm: GroupNorm,
    second: ConvBlock,
    adapters: [Conv2d; 3],
    stages: [ConvBlock; 3],
    last: Conv2d,
    activation: Activation,
}

impl MaskHead {
    /// `maps` are the channels of the backbone's first three maps; `vb` is the checkpoint's root.
    fn load(cfg: &DetrConfig, maps: [usize; 3], vb: VarBuilder) -> Result<Self> {
        let (width, heads) = (cfg.d_model, cfg.encoder_attention_heads);
        let (head, three) = (vb.pp("mask_head"), Conv2dConfig::new(3).padding(1));
        let input = width + heads;
        let first = head.pp("lay1");
        let (weight, bias) = (first.get((input, input, 3, 3), "weight")?, first.get(input, "bias")?);
        let block = |i: usize, channels: [usize; 2]| {
            ConvBlock::load(channels, head.pp(format!("lay{i}")), head.pp(format!("gn{i}")))
        };
        let adapter = |i: usize, channels: usize, out: usize| {
            Conv2d::load(channels, out, Conv2dConfig::new(1), true, head.pp(format!("adapter{i}")))
        };
        let linear = |name: &str| Linear::load(width, width, true, vb.pp("bbox_attention").pp(name));
        Ok(Self {
            q_linear: linear("q_linear")?,
            k_linear: linear("k_linear")?,
            heads,
            first: [
                Conv2d::new(&weight.narrow(1, 0, width)?, Some(&bias), three)?,
                Conv2d::new(&weight.narrow(1, width, heads)?, None, three)?,
            ],
            first_norm: GroupNorm::load(GROUPS, input, NORM_EPS, head.pp("gn1"))?,
            second: block(2, [input, width / 2])?,
            adapters: [
                adapter(1, maps[2], width / 2)?,
                adapter(2, maps[1], width / 4)?,
                adapter(3, maps[0], width / 8)?,
            ],
            stages: [
                block(3, [width / 2, width / 4])?,
                block(4, [width / 4, width / 8])?,
                block(5, [width / 8, width / 16])?,
            ],
            last: Conv2d::load(width / 16, 1, three, true, head.pp("out_lay"))?,
            activation: cfg.activation_function,
        })
    }

    /// Logits of each query's mask: (batch, queries, height, width) of the backbone's first map.
    fn forward(&self, outputs: &BaseOutputs) -> Result<Tensor> {
        let [large, middle, small, ..] = outputs.maps.as_slice() else {
            candle_core::bail!("a mask needs three maps, there are {}", outputs.maps.len())
        };
        let adapted = [(&self.adapters[0], small), (&self.adapters[1], middle), (&self.adapters[2], large)];
        let adapted = adapted.into_iter().map(|(adapter, map)| adapter.forward(map)).collect::<Result<Vec<_>>>()?;
        let features = self.first[0].forward(&outputs.projected)?; // (batch, height, width, d_model + heads)
        let attention = self.attention(outputs)?; // (batch, queries, height, width, heads)
        let (batch, queries, ..) = attention.dims5()?;
        let mut masks = Vec::with_capacity(batch * queries);
        for item in 0..batch {
            let of_item = |x: &Tensor| x.narrow(0, item, 1);
            let (features, attention) = (of_item(&features)?, attention.get(item)?);
            let adapted = adapted.iter().map(of_item).collect::<Result<Vec<_>>>()?;
            for query in 0..queries {
                let x = self.first[1].forward_add(&attention.narrow(0, query, 1)?, &features, Activation::Identity)?;
                let x = self.first_norm.forward_act(&x, self.activation)?;
                let mut x = self.second.forward(&x, self.activation)?;
                for (adapted, stage) in adapted.iter().zip(&self.stages) {
                    x = stage.forward(&nearest_add(&x, adapted)?, self.activation)?;
                }
                masks.push(self.last.forward(&x)?); // (1, height, width, 1)
            }
        }
        let (_, height, width, _) = large.dims4()?;
        Tensor::cat(&masks, 0)?.reshape((batch, queries, height, width))
    }

    /// Softmax over all tokens and heads of each query: (batch, queries, height, width, heads).
    fn attention(&self, outputs: &BaseOutputs) -> Result<Tensor> {
        let (q, k) =
            (self.q_linear.forward(&outputs.last_hidden_state)?, self.k_linear.forward(&outputs.memory.states)?);
        let ((batch, queries, width), (_, tokens, _)) = (q.dims3()?, k.dims3()?);
        let head_dim = width / self.heads;
        let by_head =
            |x: &Tensor, rows: usize| x.reshape((batch, rows, self.heads, head_dim))?.transpose(1, 2)?.contiguous();
        // small beside the convolutions that follow
        let q = (by_head(&q, queries)? * (head_dim as f64).powf(-0.5))?;
        let scores = q.matmul(&by_head(&k, tokens)?.t()?)?; // (batch, heads, queries, tokens)
        roofbench_nn::cost::elementwise(scores.elem_count(), 2 * head_dim + SOFTMAX_FLOPS);
        let scores = match outputs.valid.bias(scores.dtype(), scores.device())? {
            Some(bias) => scores.broadcast_add(&bias)?,
            None => scores,
        };
        let scores = scores.transpose(1, 2)?.contiguous()?.reshape((batch, queries, self.heads * tokens))?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let [height, columns] = outputs.valid.size;
        let weights = weights.reshape((batch, queries, self.heads, tokens))?.transpose(2, 3)?.contiguous()?;
        weights.reshape((batch, queries, height, columns, self.heads))
    }
}

/// As `roofbench_nn::cost` counts a softmax.
const SOFTMAX_FLOPS: usize = 5;

/// What follows the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    Base,
    Detection { labels: usize },
    Segmentation { labels: usize },
}

impl HeadKind {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        let labels = label_count(&spec.config);
        match spec.class.as_str() {
            "DetrModel" => Ok(Self::Base),
            "DetrForObjectDetection" => Ok(Self::Detection { labels: labels? }),
            "DetrForSegmentation" => Ok(Self::Segmentation { labels: labels? }),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }

    /// Checks what segmentation asks of a config.
    fn check(self, cfg: &DetrConfig, plan: &BackbonePlan) -> Result<(), SessionError> {
        if !matches!(self, Self::Segmentation { .. }) {
            return Ok(());
        }
        if plan.features.len() < 3 {
            let reason = format!("gives {} maps, masks need three", plan.features.len());
            return Err(config::invalid("backbone_config.out_features", reason));
        }
        let (width, heads) = (cfg.d_model, cfg.encoder_attention_heads);
        if !(width + heads).is_multiple_of(GROUPS) {
            let reason = format!("{width} and encoder_attention_heads, {heads}, have no multiple of {GROUPS} as sum");
            return Err(config::invalid("d_model", reason));
        }
        // maps of the mask head have that part of the width, normalised in groups
        let grouped = |channels: usize| channels > 0 && channels.is_multiple_of(GROUPS.min(channels));
        match [2, 4, 8, 16].into_iter().find(|part| !grouped(width / part)) {
            Some(part) => {
                Err(config::invalid("d_model", format!("{width} / {part} channels can't be cut into {GROUPS} groups")))
            }
            None => Ok(()),
        }
    }
}

/// DETR with the heads of its class.
pub struct DetrModel {
    cfg: DetrConfig,
    plan: BackbonePlan,
    base: Base,
    detection: Option<DetectionHead>,
    masks: Option<MaskHead>,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl DetrModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, DetrConfig::from_spec(spec)?);
        let plan = cfg.backbone(spec)?;
        kind.check(&cfg, &plan)?;
        let (base, detection, masks) = match kind {
            HeadKind::Base => (vb, None, None),
            HeadKind::Detection { labels } => {
                (vb.pp("model"), Some(DetectionHead::load(&cfg, labels, vb.clone())?), None)
            }
            HeadKind::Segmentation { labels } => {
                let detr = vb.pp("detr");
                let channels = plan.resnet.channels();
                let maps = [0, 1, 2].map(|i| channels[plan.features[i]]);
                let masks = MaskHead::load(&cfg, maps, vb)?;
                (detr.pp("model"), Some(DetectionHead::load(&cfg, labels, detr)?), Some(masks))
            }
        };
        Ok(Self {
            base: Base::load(&cfg, &plan, base)?,
            detection,
            masks,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
            plan,
        })
    }

    fn forward(&self, inputs: &Pictures) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let outputs = self.base.forward(inputs, dtype, &self.device)?;
        let mut fields = Tensors::from([
            ("last_hidden_state".to_owned(), outputs.last_hidden_state.clone()),
            ("encoder_last_hidden_state".to_owned(), outputs.memory.states.clone()),
        ]);
        if let Some(detection) = &self.detection {
            let (logits, pred_boxes) = detection.forward(&outputs.last_hidden_state)?;
            fields.extend([("logits".to_owned(), logits), ("pred_boxes".to_owned(), pred_boxes)]);
        } else if let Some(intermediate) = &outputs.intermediate {
            fields.insert("intermediate_hidden_states".to_owned(), intermediate.clone());
        }
        if let Some(masks) = &self.masks {
            fields.insert("pred_masks".to_owned(), masks.forward(&outputs)?);
        }
        Ok(fields)
    }
}

/// The arguments of `forward`, checked.
struct Pictures<'a> {
    /// (batch, channels, height, width)
    values: &'a Tensor,
    /// 0 where a pixel does not exist: (batch, height, width).
    mask: Option<&'a Tensor>,
    /// What the decoder begins with instead of zeros: (batch, queries, d_model).
    queries: Option<&'a Tensor>,
    /// 0 for queries that the others don't see: (batch, queries).
    query_mask: Option<&'a Tensor>,
}

impl<'a> Pictures<'a> {
    fn read(cfg: &DetrConfig, plan: &BackbonePlan, call: &'a Call) -> Result<Self, SessionError> {
        let names = ["pixel_values", "pixel_mask", "decoder_attention_mask", "decoder_inputs_embeds"];
        let values = Inputs::forward(call, &names, &[])?.pictures("pixel_values", plan.resnet.num_channels())?;
        let (batch, _, height, width) = values.dims4()?;
        if cfg.position_embedding_type == PositionEmbedding::Learned {
            let [rows, columns] = plan.resnet.sizes([height, width])[plan.last()];
            if rows.max(columns) > LEARNED {
                let reason = format!("give {rows} x {columns} tokens; positions are learned for {LEARNED} each way");
                return Err(SessionError::input("pixel_values", reason));
            }
        }
        let shaped = |name: &str, expected: &[usize]| match call.inputs.get(name) {
            Some(tensor) if tensor.dims() != expected => {
                Err(SessionError::input(name, format!("has shape {:?}, expected {expected:?}", tensor.dims())))
            }
            found => Ok(found),
        };
        Ok(Self {
            values,
            mask: shaped("pixel_mask", &[batch, height, width])?,
            queries: shaped("decoder_inputs_embeds", &[batch, cfg.num_queries, cfg.d_model])?,
            query_mask: shaped("decoder_attention_mask", &[batch, cfg.num_queries])?,
        })
    }

    /// Which pixels of a map of `size` exist.
    fn valid(&self, size: [usize; 2]) -> Result<Valid> {
        let (batch, _, from_height, from_width) = self.values.dims4()?;
        let [height, width] = size;
        let Some(mask) = self.mask else {
            return Ok(Valid { batch, size, pixels: vec![true; batch * height * width] });
        };
        let mask = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let rows = (0..batch * height)
            .map(|row| (row / height * from_height + nearest(row % height, from_height, height)) * from_width);
        let pixels = rows.flat_map(|row| (0..width).map(move |column| row + nearest(column, from_width, width)));
        Ok(Valid { batch, size, pixels: pixels.map(|pixel| mask[pixel] != 0.0).collect() })
    }
}

/// Which pixels of the backbone's last map exist.
struct Valid {
    batch: usize,
    /// Height, width.
    size: [usize; 2],
    /// (batch, height, width)
    pixels: Vec<bool>,
}

impl Valid {
    /// For attention to the map as tokens.
    fn mask(&self) -> Result<Option<Mask>> {
        Mask::padding(&Tensor::from_vec(self.numbers(0u8, 1), (self.batch, ()), &Device::Cpu)?)
    }

    /// The lowest finite number where a pixel does not exist, (batch, 1, 1, height · width), unless all do.
    fn bias(&self, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        if self.pixels.iter().all(|exists| *exists) {
            return Ok(None);
        }
        let bias = Tensor::from_vec(self.numbers(f32::MIN, 0.0), (self.batch, 1, 1, ()), device)?;
        Ok(Some(bias.to_dtype(dtype)?))
    }

    fn numbers<T: Copy>(&self, absent: T, present: T) -> Vec<T> {
        self.pixels.iter().map(|exists| if *exists { present } else { absent }).collect()
    }
}

impl Session for DetrModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Pictures::read(&self.cfg, &self.plan, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, &self.plan, self.kind, &Pictures::read(&self.cfg, &self.plan, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass. Positions are looked up among few sines, which don't count.
fn forward_cost(
    cfg: &DetrConfig,
    plan: &BackbonePlan,
    kind: HeadKind,
    inputs: &Pictures,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let (batch, _, height, width) = inputs.values.dims4()?;
    let sizes = plan.resnet.sizes([height, width]);
    let channels = plan.resnet.channels();
    let map = sizes[plan.last()].map(|n| n as u64);
    let [items, d_model, queries, seq] = [batch as u64, cfg.d_model as u64, cfg.num_queries as u64, map[0] * map[1]];
    let (tokens, objects) = (items * seq, items * queries);

    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = |rows| cost::norm(Norm::Layer, rows, d_model, bytes);
    let act = |elements| cost::elementwise(elements, u64::from(cfg.activation_function != Activation::Identity));
    let added = |elements| cost::elementwise(elements, 1); // a residual or positions
    let attention = |heads: usize, queries, keys| {
        let heads = heads as u64;
        let visible_pairs = cost::full_pairs(queries, keys);
        let head_dim = d_model / heads;
        cost::Attention { batch: items, heads, kv_heads: heads, head_dim, queries, cached: 0, visible_pairs }
            .cost(bytes)
    };
    let self_attention = |rows, seq, heads| {
        added(rows * d_model) // positions
            + linear(rows, d_model, 2 * d_model) // query and key
            + linear(rows, d_model, d_model) // value
            + attention(heads, seq, seq)
            + linear(rows, d_model, d_model) + added(rows * d_model)
            + norm(rows)
    };
    let mlp = |rows, inner| {
        linear(rows, d_model, inner)
            + act(rows * inner)
            + linear(rows, inner, d_model)
            + added(rows * d_model)
            + norm(rows)
    };
    let encoder_layer =
        self_attention(tokens, seq, cfg.encoder_attention_heads) + mlp(tokens, cfg.encoder_ffn_dim as u64);
    let decoder_layer = self_attention(objects, queries, cfg.decoder_attention_heads)
        + added(objects * d_model) // positions of the queries
        + linear(objects, d_model, d_model)
        + linear(tokens, d_model, d_model) * 2 // keys and values
        + attention(cfg.decoder_attention_heads, queries, seq)
        + linear(objects, d_model, d_model) + added(objects * d_model)
        + norm(objects)
        + mlp(objects, cfg.decoder_ffn_dim as u64);
    let mut sum = plan.resnet.cost(batch, [height, width], plan.last(), bytes)
        + linear(tokens, channels[plan.last()] as u64, d_model) // input projection
        + encoder_layer * cfg.encoder_layers as u64
        + added(tokens * d_model) // positions of the decoder's keys
        + Cost { weight_bytes: queries * d_model * bytes, ..Cost::default() } // the queries' positions
        + decoder_layer * cfg.decoder_layers as u64
        + norm(objects);
    if cfg.auxiliary_loss {
        sum += norm(objects) * cfg.decoder_layers as u64;
    }
    if let HeadKind::Detection { labels } | HeadKind::Segmentation { labels } = kind {
        sum += linear(objects, d_model, labels as u64 + 1)
            + (linear(objects, d_model, d_model) + added(objects * d_model)) * 2 // ReLU
            + linear(objects, d_model, 4) + added(objects * 4); // sigmoid
    }
    if let HeadKind::Segmentation { .. } = kind {
        sum += mask_cost(cfg, plan, &sizes, items, bytes);
    }
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost: sum }])
}

/// The part that makes masks; its maps are as large as the backbone's, `sizes`, and one for each query.
fn mask_cost(cfg: &DetrConfig, plan: &BackbonePlan, sizes: &[[usize; 2]], items: u64, bytes: u64) -> Cost {
    let [d_model, heads, queries] = [cfg.d_model, cfg.encoder_attention_heads, cfg.num_queries].map(|n| n as u64);
    let maps = [plan.last(), plan.features[2], plan.features[1], plan.features[0]];
    let size = |map: usize| sizes[map].map(|n| n as u64);
    let pixels = |map: usize| size(map)[0] * size(map)[1];
    let objects = items * queries;
    let tokens = items * pixels(maps[0]);
    let conv = |batch: u64, map: usize, in_channels: u64, out_channels: u64, kernel: u64, bias: bool| {
        let (kernel, output) = ([kernel; 2], size(map));
        cost::Conv2d { batch, in_channels, out_channels, kernel, groups: 1, output, bias }.cost(bytes)
    };
    let finished = |map: usize, channels: u64| {
        let elements = objects * pixels(map) * channels;
        cost::norm(Norm::Layer, objects * pixels(map), channels, bytes) // a group norm counts as much
            + cost::elementwise(elements, u64::from(cfg.activation_function != Activation::Identity))
    };
    let pairs = objects * heads * pixels(maps[0]);
    let attention = cost::linear(objects, d_model, d_model, true, bytes)
        + cost::linear(tokens, d_model, d_model, true, bytes)
        + cost::elementwise(pairs, 2 * (d_model / heads) + SOFTMAX_FLOPS as u64)
        + Cost { activation_bytes: pairs * bytes, ..Cost::default() };
    let wide = d_model + heads;
    let mut sum = attention
        + conv(items, maps[0], d_model, wide, 3, true)
        + conv(objects, maps[0], heads, wide, 3, false)
        + cost::elementwise(objects * pixels(maps[0]) * wide, 1) // both parts
        + finished(maps[0], wide)
        + conv(objects, maps[0], wide, d_model / 2, 3, true)
        + finished(maps[0], d_model / 2);
    let channels = plan.resnet.channels();
    for (i, &map) in maps[1..].iter().enumerate() {
        let (input, output) = (d_model / (2 << i), d_model / (4 << i));
        sum += conv(items, map, channels[map] as u64, input, 1, true)
            + cost::elementwise(objects * pixels(map) * input, 1)
            + Cost { activation_bytes: objects * pixels(map) * input * bytes, ..Cost::default() }
            + conv(objects, map, input, output, 3, true)
            + finished(map, output);
    }
    sum + conv(objects, maps[3], d_model / 16, 1, 3, true)
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::json;

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "d_model": 16, "num_queries": 3, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 6,
            "decoder_ffn_dim": 6, "encoder_attention_heads": 8, "decoder_attention_heads": 2, "num_labels": 3,
            "backbone_config": {
                "model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 4, 4, 8], "depths": [1, 1, 1, 1],
                "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("detr", class, config)
    }

    fn call(shape: [usize; 4]) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), pixel_values)].into(), ..Call::default() }
    }

    fn model(spec: &ModelSpec) -> Result<DetrModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        DetrModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn message(class: &str, changes: Value) -> String {
        let spec = spec(class, changes);
        let checked = HeadKind::of(&spec).and_then(|kind| {
            let cfg = DetrConfig::from_spec(&spec)?;
            kind.check(&cfg, &cfg.backbone(&spec)?)
        });
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn cost_of_detr_resnet_50() -> Result<(), SessionError> {
        let spec = ModelSpec { config: json!({"num_labels": 91}), ..spec("DetrForObjectDetection", json!({})) };
        let cfg = DetrConfig::from_spec(&spec)?;
        let (plan, call) = (cfg.backbone(&spec)?, call([1, 3, 800, 1066]));
        let pictures = Pictures::read(&cfg, &plan, &call)?;
        let cost = forward_cost(&cfg, &plan, HeadKind::of(&spec)?, &pictures, DType::F32)?[0].cost;
        // its parameters, and of each frozen norm the folded bias
        assert_eq!(cost.weight_bytes, 4 * (41_524_768 + 26_560));
        // the paper's table 1 has 86 billion multiply-adds, the mean over larger and smaller pictures
        let ratio = cost.flops as f64 / 2.0 / 86e9;
        assert!((0.9..1.0).contains(&ratio), "{ratio}");
        Ok(())
    }

    #[test]
    fn positions_by_hand() {
        // 2 x 3 pixels, of which the right column does not exist; one wavelength and its cosine
        let valid = Valid { batch: 1, size: [2, 3], pixels: vec![true, true, false, true, true, false] };
        let found = sines(&[1.0, 1.0], &valid);
        let pixel = |row: f32, column: f32| {
            let angles = [row * TAU / (2.0 + 1e-6), column * TAU / (2.0 + 1e-6)];
            angles.into_iter().flat_map(|angle| [angle.sin(), angle.cos()]).collect::<Vec<_>>()
        };
        let expected =
            [pixel(1.0, 1.0), pixel(1.0, 2.0), pixel(0.0, 2.0), pixel(2.0, 1.0), pixel(2.0, 2.0), pixel(0.0, 2.0)];
        for (found, expected) in found.iter().zip(expected.concat()) {
            assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
        }
    }

    #[test]
    fn backbones_of_old_and_new_files() -> Result<(), SessionError> {
        let plan = |config: Value| {
            let spec = ModelSpec { config, ..spec("DetrModel", json!({})) };
            DetrConfig::from_spec(&spec)?.backbone(&spec)
        };
        let dilated = plan(json!({"backbone": "resnet101.a1_in1k", "dilation": true}))?;
        assert_eq!((dilated.naming, dilated.last()), (Naming::Timm, 4));
        assert_eq!(dilated.resnet.sizes([64, 64])[4], [4, 4]);
        let stem = json!({"backbone_config": {"model_type": "resnet", "out_indices": [0, -2]}});
        let stem = plan(stem)?;
        assert_eq!((stem.naming, stem.features.clone()), (Naming::Library, vec![0, 3]));
        let timm =
            json!({"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [2], "num_channels": 1});
        let timm = plan(json!({"backbone_config": timm}))?;
        // later stages are not in the checkpoint
        assert_eq!((timm.resnet.channels(), timm.resnet.num_channels()), (vec![64, 64, 128], 1));
        let default = plan(json!({"use_timm_backbone": false}))?;
        assert_eq!((default.naming, default.features), (Naming::Library, vec![4]));
        Ok(())
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert_eq!(message("DetrForSegmentation", json!({})), "");
        let backbone = |config: Value| json!({"backbone_config": config});
        let timm = |field: &str, value: Value| {
            let mut config =
                json!({"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [1, 2, 3, 4]});
            config[field] = value;
            backbone(config)
        };
        let resnet = |field: &str, value: Value| {
            let mut config = json!({"model_type": "resnet"});
            config[field] = value;
            backbone(config)
        };
        for (changes, start) in [
            (json!({"d_model": 6}), "`d_model`: 6 is not a multiple of encoder_attention_heads, 8"),
            (json!({"decoder_attention_heads": 3}), "`d_model`: 16 is not a multiple of decoder_attention_heads, 3"),
            (json!({"num_queries": 0}), "`num_queries`: 0 is not in"),
            (json!({"position_embedding_type": "rotary"}), "`position_embedding_type`: "),
            (json!({"backbone_config": null, "backbone": "resnet50d"}), "`backbone` = \"resnet50d\" is not supported"),
            (json!({"backbone_kwargs": {"out_indices": [1]}}), "`backbone_kwargs` = "),
            (backbone(json!({"model_type": "swin"})), "`backbone_config.model_type` = \"swin\" is not supported"),
            (timm("out_indices", json!([0, 4])), "`backbone_config.out_indices` = [0,4] is not supported"),
            (timm("out_indices", json!([5])), "`backbone_config.out_indices`: has 5, which is no stage"),
            (timm("output_stride", json!(4)), "`backbone_config.output_stride` = 4 is not supported"),
            (timm("backbone", json!("vgg16")), "`backbone_config.backbone` = \"vgg16\" is not supported"),
            (resnet("out_features", json!(["stage5"])), "`backbone_config.out_features`: has `stage5`"),
            (
                resnet("out_features", json!(["stage3", "stage2"])),
                "`backbone_config.out_features`: gives the maps [3, 2]",
            ),
            (resnet("depths", json!([1])), "`backbone_config.hidden_sizes`: has 4 numbers, depths has 1"),
        ] {
            let found = message("DetrForObjectDetection", changes);
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        let few = message("DetrForSegmentation", resnet("out_indices", json!([4])));
        assert!(few.starts_with("config.json: `backbone_config.out_features`: gives 1 maps"), "{few}");
        let heads = message("DetrForSegmentation", json!({"encoder_attention_heads": 4}));
        assert!(heads.starts_with("config.json: `d_model`: 16 and encoder_attention_heads, 4"), "{heads}");
        let groups = message("DetrForSegmentation", json!({"d_model": 24}));
        assert!(groups.starts_with("config.json: `d_model`: 24 / 2 channels"), "{groups}");
        assert!(message("DetrForAlignment", json!({})).starts_with("detr: class `DetrForAlignment` is not supported"));
    }

    #[test]
    fn inputs_that_do_not_fit_are_named() -> Result<(), SessionError> {
        let refused = |spec: &ModelSpec, call: &Call| {
            let cfg = DetrConfig::from_spec(spec)?;
            let plan = cfg.backbone(spec)?;
            Ok::<_, SessionError>(Pictures::read(&cfg, &plan, call).err().map(|e| e.to_string()).unwrap_or_default())
        };
        let mut call = call([1, 3, 64, 1601]);
        let learned = spec("DetrModel", json!({"position_embedding_type": "learned"}));
        let message = refused(&learned, &call)?;
        assert_eq!(message, "input `pixel_values`: give 2 x 51 tokens; positions are learned for 50 each way");
        let sine = spec("DetrModel", json!({}));
        assert_eq!(refused(&sine, &call)?, "");
        let mask = Tensor::ones((1, 64, 64), DType::I64, &Device::Cpu)?;
        call.inputs.insert("pixel_mask".into(), mask);
        let message = refused(&sine, &call)?;
        assert_eq!(message, "input `pixel_mask`: has shape [1, 64, 64], expected [1, 64, 1601]");
        Ok(())
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        let mut spec = spec("DetrForSegmentation", json!({"position_embedding_type": "learned"}));
        let call = call([1, 3, 64, 96]);
        let exact = model(&spec)?.call(&call, &mut Unobserved)?;
        spec.dtype = DType::BF16;
        let rounded = model(&spec)?.call(&call, &mut Unobserved)?;
        for name in ["logits", "pred_boxes", "pred_masks"] {
            let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            let error = largest(&(&rounded[name] - &exact[name])?)? / largest(&exact[name])?;
            // each weight is off by at most 2^-9 of itself, some twenty layers deep
            assert!(error > 0.0 && error < 0.1, "{name}: {error}");
        }
        Ok(())
    }
}
