//! CLIP: a vision transformer and a causal text transformer whose pooled states are compared.
//! Source: CLIP (arXiv:2103.00020). Mirrors `transformers.CLIPModel`, `CLIPTextModel`, `CLIPTextModelWithProjection`,
//! `CLIPVisionModel`, `CLIPVisionModelWithProjection` and `CLIPForImageClassification`.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, AttentionRows, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Mask, Pattern, Rows};
use roofbench_nn::embedding::Embedding;
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::pooling::global_avg_pool_2d;
use serde::Deserialize;

use super::encoder_layer::{EncoderLayerConfig, Projections};
use super::vision_tower::{Form, Pixels, VisionTower, VisionTowerConfig};
use super::{behind, forward_phase, named, products, products_cost, unit_rows, unit_rows_cost};

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "CLIPModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPForImageClassification",
];

const TEXT: AliasScope = AliasScope::Class("CLIPTextModel");
const TEXT_PROJECTED: AliasScope = AliasScope::Class("CLIPTextModelWithProjection");
const VISION: AliasScope = AliasScope::Class("CLIPVisionModel");
const VISION_PROJECTED: AliasScope = AliasScope::Class("CLIPVisionModelWithProjection");
const CLASSIFIER: AliasScope = AliasScope::Class("CLIPForImageClassification");

/// From names in published checkpoints, most of which hold both towers, to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // integer buffers of both towers in older files
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
    AliasRule::drop(r"^(vision_model|visual_projection|text_projection)\.|^logit_scale$", TEXT),
    AliasRule::drop(r"^(vision_model|visual_projection)\.|^logit_scale$", TEXT_PROJECTED),
    AliasRule::drop(r"^(text_model|text_projection|visual_projection|classifier)\.|^logit_scale$", VISION),
    AliasRule::drop(r"^(text_model|text_projection|classifier)\.|^logit_scale$", VISION_PROJECTED),
    AliasRule::drop(r"^(text_model|text_projection|visual_projection)\.|^logit_scale$", CLASSIFIER),
    // a tower alone has no prefix in the library, and has it in files
    AliasRule::rename(r"^text_model\.", "", TEXT),
    AliasRule::rename(r"^vision_model\.", "", VISION),
    // saved from a tower alone
    AliasRule::rename(r"^(embeddings|encoder|final_layer_norm)\.", "text_model.$1.", TEXT_PROJECTED),
    AliasRule::rename(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", "vision_model.$1.", VISION_PROJECTED),
    AliasRule::rename(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", "vision_model.$1.", CLASSIFIER),
];

/// The end token of early configs, which is none: the class then takes the largest token of a sequence for its end.
pub(crate) const UNKNOWN_END: i64 = 2;

/// The part of the text tower's config that shapes the computation; field names are the file's own, and what it leaves
/// out is as `transformers.CLIPTextConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Width of the stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Width that `CLIPTextModelWithProjection` projects to.
    pub projection_dim: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// The token whose first place in a sequence is pooled; where it is 2, the place of the largest token is.
    pub eos_token_id: i64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

impl ClipTextConfig {
    /// Reads and checks the config of a text tower, which is all of `spec`.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("hidden_size", cfg.hidden_size),
            ("intermediate_size", cfg.intermediate_size),
            ("projection_dim", cfg.projection_dim),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("max_position_embeddings", cfg.max_position_embeddings),
        ])?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        Ok(cfg)
    }

    fn layer(&self) -> EncoderLayerConfig {
        EncoderLayerConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            projections: Projections::Separate,
            pattern: Pattern::Causal,
        }
    }

    /// FLOPs and bytes of the states behind the last layer, not normalised.
    fn cost(&self, [batch, seq]: [u64; 2], bytes: u64) -> Cost {
        let (tokens, hidden) = (batch * seq, self.hidden_size as u64);
        cost::embedding(tokens, hidden, bytes) * 2 // tokens and positions
            + cost::elementwise(tokens * hidden, 1) // their sum
            + self.layer().cost(bytes).encoder(AttentionRows::causal(batch, seq, 0)) * self.num_hidden_layers as u64
    }

    fn norm_cost(&self, rows: u64, bytes: u64) -> Cost {
        cost::norm(Norm::Layer, rows, self.hidden_size as u64, bytes)
    }
}

/// The tokens of a call, checked.
pub(crate) struct Tokens {
    /// (batch, seq), i64.
    pub(crate) input_ids: Tensor,
    /// (batch, seq) of 0 and 1.
    pub(crate) attention_mask: Option<Tensor>,
    /// (batch, seq), or (1, seq) when they count from 0.
    position_ids: Tensor,
}

impl Tokens {
    const INPUTS: [&str; 3] = ["input_ids", "attention_mask", "position_ids"];

    fn read(cfg: &ClipTextConfig, inputs: &Inputs) -> Result<Self, SessionError> {
        let input_ids = inputs.matrix("input_ids")?;
        in_range("input_ids", &input_ids, "vocab_size", cfg.vocab_size)?;
        let (seq, limit) = (input_ids.dim(1)?, cfg.max_position_embeddings);
        if seq > limit {
            let reason = format!("a sequence of {seq} is longer than max_position_embeddings = {limit}; truncate it");
            return Err(SessionError::input("input_ids", reason));
        }
        let attention_mask = inputs.matrix_like("attention_mask", &input_ids)?;
        if let Some(mask) = &attention_mask {
            zero_or_one("attention_mask", mask)?;
        }
        let position_ids = match inputs.matrix_like("position_ids", &input_ids)? {
            Some(ids) => {
                in_range("position_ids", &ids, "max_position_embeddings", limit)?;
                ids
            }
            None => Tensor::arange(0, seq as i64, input_ids.device())?.unsqueeze(0)?,
        };
        Ok(Self { input_ids, attention_mask, position_ids })
    }

    fn shape(&self) -> [u64; 2] {
        [0, 1].map(|axis| self.input_ids.dims()[axis] as u64)
    }
}

/// The text tower.
struct TextTower {
    token_embedding: Embedding,
    position_embedding: Embedding,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    eos_token_id: i64,
}

impl TextTower {
    fn load(cfg: &ClipTextConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, embeddings) = (cfg.hidden_size, vb.pp("embeddings"));
        let layer = |i: usize| cfg.layer().load(false, vb.pp("encoder.layers").pp(i));
        let positions = cfg.max_position_embeddings;
        Ok(Self {
            token_embedding: Embedding::load(cfg.vocab_size, hidden, embeddings.pp("token_embedding"))?,
            position_embedding: Embedding::load(positions, hidden, embeddings.pp("position_embedding"))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp("final_layer_norm"))?,
            eos_token_id: cfg.eos_token_id,
        })
    }

    /// The states behind the last layer, not normalised: (batch, seq, hidden).
    fn forward(&self, tokens: &Tokens) -> Result<Tensor> {
        let mask = tokens.attention_mask.as_ref().map(Mask::padding).transpose()?.flatten();
        let x = self.token_embedding.forward(&tokens.input_ids)?; // (batch, seq, hidden)
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        let x = x.broadcast_add(&self.position_embedding.forward(&tokens.position_ids)?)?;
        encode(&self.layers, x, &Rows::All, mask.as_ref())
    }

    /// The states at the end of each sequence: (batch, seq, hidden) → (batch, hidden).
    fn ends(&self, x: &Tensor, input_ids: &Tensor) -> Result<Tensor> {
        let rows = input_ids.to_vec2::<i64>()?;
        let (batch, seq) = input_ids.dims2()?;
        let end = |(item, row): (usize, &Vec<i64>)| Some(item * seq + end(row, self.eos_token_id));
        let index = RowIndex::new(batch * seq, (batch, 1), rows.iter().enumerate().map(end))?;
        gather(x, &index)?.squeeze(1)
    }
}

/// Where a sequence ends: at the first `eos`, or at the first of the largest tokens where the config does not know it. A
/// sequence without an end token ends at its first, as in the library.
pub(crate) fn end(row: &[i64], eos: i64) -> usize {
    let wanted = if eos == UNKNOWN_END { row.iter().copied().max().unwrap_or_default() } else { eos };
    row.iter().position(|id| *id == wanted).unwrap_or(0)
}

/// Of two fields of early files the one that the library heeds: the first, unless it is absent or null.
fn in_force(spec: &ModelSpec, [first, second]: [&'static str; 2]) -> &'static str {
    if spec.config.get(first).is_some_and(|config| !config.is_null()) { first } else { second }
}

/// The config of a tower alone, which may come within that of both.
fn alone<T>(
    spec: &ModelSpec,
    field: &str,
    read: impl FnOnce(&ModelSpec) -> Result<T, SessionError>,
) -> Result<T, SessionError> {
    if spec.config.get(field).is_some() { config::nested(spec, field, read) } else { read(spec) }
}

fn vision_config(spec: &ModelSpec) -> Result<VisionTowerConfig, SessionError> {
    VisionTowerConfig::from_spec(spec, Form::Clip)
}

fn projection_dim(spec: &ModelSpec) -> Result<usize, SessionError> {
    #[derive(Deserialize)]
    struct Fields {
        #[serde(default = "width")]
        projection_dim: usize,
    }
    fn width() -> usize {
        512
    }
    let Fields { projection_dim } = spec.parse_config()?;
    config::sizes(&[("projection_dim", projection_dim)])?;
    Ok(projection_dim)
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    match spec.class.as_str() {
        "CLIPModel" => Ok(Box::new(ClipModel::load(spec, vb)?)),
        "CLIPTextModel" | "CLIPTextModelWithProjection" => Ok(Box::new(ClipTextModel::load(spec, vb)?)),
        "CLIPVisionModel" | "CLIPVisionModelWithProjection" | "CLIPForImageClassification" => {
            Ok(Box::new(ClipVisionModel::load(spec, vb)?))
        }
        _ => Err(config::unsupported_class(spec, CLASSES)),
    }
}

/// The configs of `CLIPModel`.
#[derive(Debug, Clone)]
pub(crate) struct ClipConfig {
    pub(crate) text: ClipTextConfig,
    pub(crate) vision: VisionTowerConfig,
    pub(crate) projection_dim: usize,
}

impl ClipConfig {
    pub(crate) fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let text = in_force(spec, ["text_config_dict", "text_config"]);
        let vision = in_force(spec, ["vision_config_dict", "vision_config"]);
        Ok(Self {
            text: config::nested(spec, text, ClipTextConfig::from_spec)?,
            vision: config::nested(spec, vision, vision_config)?,
            projection_dim: projection_dim(spec)?,
        })
    }

    /// FLOPs and bytes of the vision tower, of the text tower, and of comparing what they give.
    pub(crate) fn cost(&self, tokens: &Tokens, pixels: &Pixels, bytes: u64) -> [Cost; 3] {
        let ([texts, seq], [pictures, _], width) = (tokens.shape(), pixels.shape(), self.projection_dim as u64);
        let project = |rows, from: usize| cost::linear(rows, from as u64, width, false, bytes);
        let text = self.text.cost([texts, seq], bytes) // the end of each sequence goes on
            + self.text.norm_cost(texts, bytes)
            + project(texts, self.text.hidden_size);
        let vision = self.vision.cost(pixels, self.vision.num_hidden_layers, Some(1), bytes)
            + self.vision.norm_cost(pictures, bytes)
            + project(pictures, self.vision.hidden_size);
        let comparison = unit_rows_cost(texts + pictures, width) + products_cost([texts, pictures], width, bytes);
        [vision, text, comparison]
    }
}

/// The arguments of `CLIPModel`.
pub(crate) fn read_both<'a>(cfg: &ClipConfig, call: &'a Call) -> Result<(Tokens, Pixels<'a>), SessionError> {
    let known = [&Tokens::INPUTS[..], &["pixel_values"]].concat();
    let inputs = Inputs::forward(call, &known, &["interpolate_pos_encoding"])?;
    Ok((Tokens::read(&cfg.text, &inputs)?, Pixels::read(&cfg.vision, &inputs)?))
}

/// `CLIPModel`: both towers, and the cosine of each text with each picture.
struct ClipModel {
    cfg: ClipConfig,
    text_model: TextTower,
    vision_model: VisionTower,
    text_projection: Linear,
    visual_projection: Linear,
    /// What cosines are multiplied by.
    scale: f64,
    bytes: u64,
    paths: BTreeMap<String, String>,
}

impl ClipModel {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = ClipConfig::from_spec(spec)?;
        let project = |from: usize, name: &str| Linear::load(from, cfg.projection_dim, false, vb.pp(name));
        let scale = f64::from(vb.get((), "logit_scale")?.to_dtype(DType::F32)?.to_scalar::<f32>()?).exp();
        Ok(Self {
            text_model: TextTower::load(&cfg.text, vb.pp("text_model"))?,
            vision_model: VisionTower::load(&cfg.vision, Some(1), vb.pp("vision_model"))?,
            text_projection: project(cfg.text.hidden_size, "text_projection")?,
            visual_projection: project(cfg.vision.hidden_size, "visual_projection")?,
            scale,
            cfg,
            bytes: spec.dtype.size_in_bytes() as u64,
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn forward(&self, tokens: &Tokens, pixels: &Pixels, observer: &mut dyn Observer) -> Result<Tensors> {
        let image = self.vision_model.pooled(&self.vision_model.forward(pixels)?)?; // (pictures, hidden)
        let image = self.visual_projection.forward(&image)?; // (pictures, projection)
        observer.end(Phase::Vision);
        let text = self.text_model.ends(&self.text_model.forward(tokens)?, &tokens.input_ids)?; // (texts, hidden)
        let text = self.text_projection.forward(&self.text_model.final_layer_norm.forward(&text)?)?;
        observer.end(Phase::Text);
        let (image, text) = (unit_rows(&image)?, unit_rows(&text)?); // (pictures or texts, projection)
        let logits_per_text = products(&text, &image, self.scale)?; // (texts, pictures)
        Ok(named([
            ("logits_per_image", logits_per_text.t()?.contiguous()?),
            ("logits_per_text", logits_per_text),
            ("text_embeds", text),
            ("image_embeds", image),
        ]))
    }
}

impl Session for ClipModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (tokens, pixels) = read_both(&self.cfg, call)?;
        let outputs = self.forward(&tokens, &pixels, observer)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (tokens, pixels) = read_both(&self.cfg, call)?;
        let [vision, text, comparison] = self.cfg.cost(&tokens, &pixels, self.bytes);
        Ok(behind([(Phase::Vision, vision), (Phase::Text, text)], forward_phase(comparison)))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// `CLIPTextModel`, and the same with a projection.
struct ClipTextModel {
    cfg: ClipTextConfig,
    text_model: TextTower,
    text_projection: Option<Linear>,
    bytes: u64,
    paths: BTreeMap<String, String>,
}

impl ClipTextModel {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = alone(spec, "text_config", ClipTextConfig::from_spec)?;
        let (at, text_projection) = match spec.class.as_str() {
            "CLIPTextModel" => (vb, None),
            _ => {
                let projection = Linear::load(cfg.hidden_size, cfg.projection_dim, false, vb.pp("text_projection"))?;
                (vb.pp("text_model"), Some(projection))
            }
        };
        Ok(Self {
            text_model: TextTower::load(&cfg, at)?,
            text_projection,
            cfg,
            bytes: spec.dtype.size_in_bytes() as u64,
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn read(&self, call: &Call) -> Result<Tokens, SessionError> {
        Tokens::read(&self.cfg, &Inputs::forward(call, &Tokens::INPUTS, &[])?)
    }

    fn forward(&self, tokens: &Tokens) -> Result<Tensors> {
        let x = self.text_model.final_layer_norm.forward(&self.text_model.forward(tokens)?)?; // (batch, seq, hidden)
        let pooled = self.text_model.ends(&x, &tokens.input_ids)?; // (batch, hidden)
        let pooled = match &self.text_projection {
            Some(projection) => ("text_embeds", projection.forward(&pooled)?), // (batch, projection)
            None => ("pooler_output", pooled),
        };
        Ok(named([pooled, ("last_hidden_state", x)]))
    }
}

impl Session for ClipTextModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&self.read(call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let [batch, seq] = self.read(call)?.shape();
        let projection = self.text_projection.as_ref().map_or(Cost::default(), |projection| {
            cost::linear(batch, projection.in_dim() as u64, projection.out_dim() as u64, false, self.bytes)
        });
        let states = self.cfg.cost([batch, seq], self.bytes) + self.cfg.norm_cost(batch * seq, self.bytes);
        Ok(forward_phase(states + projection))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// What follows the vision tower.
enum VisionHead {
    /// Of `CLIPVisionModel`: the class token's state.
    Pooled,
    /// Of `CLIPVisionModelWithProjection`: the same, projected.
    Projected { visual_projection: Linear },
    /// Of `CLIPForImageClassification`: scores from the mean over the patches.
    Classifier { classifier: Linear },
}

/// `CLIPVisionModel`, and the same with a projection or a classifier.
struct ClipVisionModel {
    cfg: VisionTowerConfig,
    vision_model: VisionTower,
    head: VisionHead,
    bytes: u64,
    paths: BTreeMap<String, String>,
}

impl ClipVisionModel {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (cfg, at, head) = match spec.class.as_str() {
            "CLIPVisionModel" => (alone(spec, "vision_config", vision_config)?, vb, VisionHead::Pooled),
            "CLIPVisionModelWithProjection" => {
                let both = |spec: &ModelSpec| Ok((vision_config(spec)?, projection_dim(spec)?));
                let (cfg, width) = alone(spec, "vision_config", both)?;
                let visual_projection = Linear::load(cfg.hidden_size, width, false, vb.pp("visual_projection"))?;
                (cfg, vb.pp("vision_model"), VisionHead::Projected { visual_projection })
            }
            _ => {
                let field = in_force(spec, ["vision_config_dict", "vision_config"]);
                let cfg = config::nested(spec, field, vision_config)?;
                let labels = label_count(&spec.config)?;
                let classifier = Linear::load(cfg.hidden_size, labels, true, vb.pp("classifier"))?;
                (cfg, vb.pp("vision_model"), VisionHead::Classifier { classifier })
            }
        };
        Ok(Self {
            vision_model: VisionTower::load(&cfg, None, at)?,
            cfg,
            head,
            bytes: spec.dtype.size_in_bytes() as u64,
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Pixels<'a>, SessionError> {
        Pixels::read(&self.cfg, &Inputs::forward(call, &["pixel_values"], &["interpolate_pos_encoding"])?)
    }

    fn forward(&self, pixels: &Pixels) -> Result<Tensors> {
        let x = self.vision_model.forward(pixels)?; // (batch, 1 + patches, hidden)
        Ok(match &self.head {
            VisionHead::Pooled => named([("pooler_output", self.vision_model.pooled(&x)?), ("last_hidden_state", x)]),
            VisionHead::Projected { visual_projection } => {
                let embeds = visual_projection.forward(&self.vision_model.pooled(&x)?)?; // (batch, projection)
                named([("image_embeds", embeds), ("last_hidden_state", x)])
            }
            VisionHead::Classifier { classifier } => {
                let patches = x.narrow(1, 1, x.dim(1)? - 1)?.unsqueeze(1)?; // (batch, 1, patches, hidden)
                named([("logits", classifier.forward(&global_avg_pool_2d(&patches)?)?)]) // (batch, labels)
            }
        })
    }
}

impl Session for ClipVisionModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&self.read(call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let pixels = self.read(call)?;
        let [batch, tokens] = pixels.shape();
        let layer = |layer: &Linear| {
            cost::linear(batch, layer.in_dim() as u64, layer.out_dim() as u64, layer.has_bias(), self.bytes)
        };
        let head = match &self.head {
            VisionHead::Pooled => self.cfg.norm_cost(batch, self.bytes),
            VisionHead::Projected { visual_projection } => {
                self.cfg.norm_cost(batch, self.bytes) + layer(visual_projection)
            }
            VisionHead::Classifier { classifier } => {
                let hidden = self.cfg.hidden_size as u64;
                cost::elementwise(batch * (tokens - 1) * hidden, 1) // the sum of the patches
                    + Cost { activation_bytes: batch * hidden * self.bytes, ..Cost::default() }
                    + layer(classifier)
            }
        };
        let tower = self.cfg.cost(&pixels, self.cfg.num_hidden_layers, None, self.bytes);
        Ok(forward_phase(tower + head))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, config: Value) -> ModelSpec {
        ModelSpec::new("clip", class, config)
    }

    fn tiny() -> Value {
        json!({
            "projection_dim": 3,
            "text_config": {
                "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
                "num_attention_heads": 2, "max_position_embeddings": 5, "eos_token_id": 9,
            },
            "vision_config": {
                "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 4, "patch_size": 2, "num_channels": 1,
            },
        })
    }

    fn call(ids: [[i64; 3]; 2], pixels: [usize; 4]) -> Call {
        let ids = Tensor::new(&ids, &Device::Cpu).expect("ids");
        let pixel_values = Tensor::ones(&pixels, DType::F32, &Device::Cpu).expect("pixels");
        let inputs = [("input_ids".into(), ids), ("pixel_values".into(), pixel_values)];
        Call { method: "forward".into(), inputs: inputs.into(), ..Call::default() }
    }

    fn model(spec: &ModelSpec) -> Result<Box<dyn Session>, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::default())?;
        load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        // two texts of 3 tokens; a picture of 4 patches and the class token; both towers 4 wide, 6 inside, 2 heads of 2
        let text = 6 * 4 // positions
            + 7 * 24 + 2 * 6 * 4 * 12 + 72 // norm; query, key and value
            + 2 * 2 * 6 * (4 * 2 + 5) // 2 items, 2 heads, 6 pairs: two products over 2 and softmax
            + 2 * 6 * 16 + 24 + 24 + 7 * 24 // output, residual, norm
            + 2 * 6 * 24 + 36 + 36 + 2 * 6 * 24 + 24 + 24 // up, activation, down, residual
            + 7 * 8 + 2 * 2 * 12; // of the two ends: norm, projection
        let vision = 2 * 4 * 4 * 4 + 16 // patches of 4 pixels without bias, positions
            + 7 * 20 // the norm before the layers
            + 7 * 20 + 2 * 5 * 4 * 8 + 40 + 2 * 16 + 4 // norm; key and value of all, query of the class token
            + 2 * 5 * (4 * 2 + 5)
            + 2 * 16 + 4 + 4 + 7 * 4
            + 2 * 24 + 6 + 6 + 2 * 24 + 4 + 4
            + 7 * 4 + 2 * 12;
        let cosines = 3 * (3 * 3 + 1) + 2 * (2 * 3 + 1);
        let call = call([[1, 9, 0], [2, 3, 9]], [1, 1, 4, 4]);
        let mut model = model(&spec("CLIPModel", tiny()))?;
        let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
        assert_eq!(outputs?["logits_per_image"].dims(), [1, 2]);
        let cost: Cost = model.cost(&call)?.iter().map(|phase| phase.cost).sum();
        assert_eq!(cost.flops, text + vision + cosines);
        assert_eq!(cost.flops, recorded.flops);
        Ok(())
    }

    #[test]
    fn cost_of_base_patch32_is_the_published_one() -> Result<(), SessionError> {
        // OpenCLIP's table of ViT-B-32 at 224 pixels and 77 tokens, in billions of multiply-adds: 4.41 for a picture
        // and 2.98 for a text, without what lies outside of its products
        let cfg = ClipConfig::from_spec(&spec("CLIPModel", json!({})))?;
        let text = cfg.text.cost([1, 77], 4).flops as f64 / 2e9;
        let values = Tensor::zeros((1, 3, 224, 224), DType::F32, &Device::Cpu)?;
        let inputs = [("pixel_values".to_owned(), values)];
        let call = Call { method: "forward".into(), inputs: inputs.into(), ..Call::default() };
        let pixels = Pixels::read(&cfg.vision, &Inputs::forward(&call, &["pixel_values"], &[])?)?;
        let vision = cfg.vision.cost(&pixels, 12, None, 4).flops as f64 / 2e9;
        assert!((0.98..1.03).contains(&(text / 2.98)) && (0.98..1.03).contains(&(vision / 4.41)), "{text} {vision}");
        Ok(())
    }

    #[test]
    fn sequences_end_where_the_config_says() {
        assert_eq!(end(&[3, 9, 5, 9], 9), 1);
        assert_eq!(end(&[3, 8, 2, 8], UNKNOWN_END), 1);
        assert_eq!(end(&[3, 8], 7), 0);
    }

    #[test]
    fn configs_in_either_form() -> Result<(), SessionError> {
        // early files say twice what the towers are, and the library heeds what is in `…_dict`
        let mut config = tiny();
        config["text_config_dict"] = json!({"hidden_size": 8, "num_attention_heads": 2});
        config["vision_config_dict"] = Value::Null;
        let cfg = ClipConfig::from_spec(&spec("CLIPModel", config))?;
        assert_eq!((cfg.text.hidden_size, cfg.text.vocab_size), (8, 49408));
        assert_eq!((cfg.vision.hidden_size, cfg.vision.layer_norm_eps), (4, 1e-5));
        // a tower alone from the config of both, and from its own
        for config in [tiny(), tiny()["text_config"].clone()] {
            let mut model = model(&spec("CLIPTextModel", config))?;
            let ids = Tensor::new(&[[1i64, 9]], &Device::Cpu)?;
            let inputs = [("input_ids".into(), ids)];
            let call = Call { method: "forward".into(), inputs: inputs.into(), ..Call::default() };
            let outputs = model.call(&call, &mut Unobserved)?;
            assert_eq!(outputs["pooler_output"].dims(), [1, 4]);
        }
        Ok(())
    }

    #[test]
    fn towers_alone_with_their_heads() -> Result<(), SessionError> {
        let pixel_values = Tensor::ones((2, 1, 4, 6), DType::F32, &Device::Cpu)?;
        let arguments = [("interpolate_pos_encoding".to_owned(), json!(true))].into_iter().collect();
        let inputs = [("pixel_values".into(), pixel_values)].into();
        let call = Call { method: "forward".into(), inputs, arguments };
        let mut config = tiny();
        config["vision_config"]["projection_dim"] = 7.into();
        config["num_labels"] = 5.into();
        for (class, outputs) in [
            ("CLIPVisionModel", vec![("last_hidden_state", vec![2, 7, 4]), ("pooler_output", vec![2, 4])]),
            ("CLIPVisionModelWithProjection", vec![("image_embeds", vec![2, 7]), ("last_hidden_state", vec![2, 7, 4])]),
            ("CLIPForImageClassification", vec![("logits", vec![2, 5])]),
        ] {
            let mut model = model(&spec(class, config.clone()))?;
            let (found, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
            let found = found?;
            let dims: Vec<_> = found.iter().map(|(name, x)| (name.as_str(), x.dims().to_vec())).collect();
            assert_eq!(dims, outputs, "{class}");
            assert_eq!(model.cost(&call)?[0].cost.flops, recorded.flops, "{class}");
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<(), SessionError> {
        let message = |config: Value| {
            ClipConfig::from_spec(&spec("CLIPModel", config)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        for (at, field, value, start) in [
            ("text_config", "hidden_size", json!(5), "`text_config.hidden_size`: 5 is not a multiple of"),
            ("text_config", "eos_token_id", json!([1]), "`text_config.eos_token_id`: invalid type"),
            ("vision_config", "patch_size", json!(9), "`vision_config.patch_size`: is larger than image_size"),
            ("vision_config", "hidden_act", json!("maxout"), "`vision_config.hidden_act`: activation `maxout`"),
        ] {
            let mut config = tiny();
            config[at][field] = value;
            let found = message(config);
            assert!(found.starts_with(&format!("config.json: {start}")), "{found}");
        }
        assert!(message(json!({"text_config": 3})).contains("`text_config`: is 3, expected an object"));
        let mut model = model(&spec("CLIPModel", tiny()))?;
        let mut message =
            |call: &Call| model.call(call, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(message(&call([[1, 9, 0]; 2], [1, 1, 4, 4])), "");
        assert!(message(&call([[1, 10, 0]; 2], [1, 1, 4, 4])).contains("beyond vocab_size = 10"));
        let size = message(&call([[1, 9, 0]; 2], [1, 1, 4, 6]));
        assert!(size.contains("is 4 x 6 pixels, image_size is 4 x 4") && size.contains("interpolate_pos"), "{size}");
        let mut loss = call([[1, 9, 0]; 2], [1, 1, 4, 4]);
        loss.arguments.insert("return_loss".into(), true.into());
        assert!(message(&loss).starts_with("input `return_loss`: is not supported"));
        Ok(())
    }
}
