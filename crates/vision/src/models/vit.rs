//! Vision Transformer: patches as tokens behind a class token, learned positions, pre-norm encoder with bidirectional
//! attention.
//! Source: ViT (arXiv:2010.11929). Mirrors `transformers.ViTModel` and `ViTForImageClassification`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::optimize::{Optimization, Verdict};
use roofbench_core::session::{Call, Engine, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, Rows, SelfAttention};
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, FeedForwardHalf, NormPlacement, SelfAttentionHalf, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::resize;
use serde::Deserialize;

use super::{HeightWidth, activation_dtype};

/// The classes that run.
pub const CLASSES: &[&str] = &["ViTModel", "ViTForImageClassification"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // a base model from a checkpoint with a head
    AliasRule { pattern: r"^classifier\.", replacement: None, applies: AliasScope::Base },
    AliasRule { pattern: r"^vit\.", replacement: Some(""), applies: AliasScope::Base },
    // a class with a head from a checkpoint saved by the base model, whose pooler it does not use
    AliasRule {
        pattern: r"^(embeddings|encoder|layernorm|pooler)\.",
        replacement: Some("vit.$1."),
        applies: AliasScope::Head,
    },
    AliasRule { pattern: r"^vit\.pooler\.", replacement: None, applies: AliasScope::Head },
];

/// The last layer for the class token alone, where the class uses nothing else of it.
pub(crate) const CLASS_TOKEN_ONLY: Optimization = Optimization {
    name: "class-token-only",
    about: "the last layer computes queries and what follows them for the class token alone; else for every patch",
    rule: |_, model| match (model.spec.engine, model.spec.class.as_str()) {
        (Engine::CandleTransformers, _) => Verdict::impossible("the stock model is run as it is"),
        (_, "ViTForImageClassification") => {
            Verdict::on("the class reads the class token of the last layer and no patch")
        }
        (_, class) => Verdict::impossible(format!("{class} gives the last layer's states of all patches")),
    },
};

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct ViTConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Size of the pictures that the positions were learned on.
    pub image_size: HeightWidth,
    /// Size of a patch; what remains beyond whole patches is left out.
    pub patch_size: HeightWidth,
    /// Colour channels.
    #[serde(default = "defaults::num_channels")]
    pub num_channels: usize,
    /// The products of query, key and value have biases.
    #[serde(default = "defaults::qkv_bias")]
    pub qkv_bias: bool,
    /// Activation of the feed-forward half.
    #[serde(default = "defaults::hidden_act")]
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    #[serde(default = "defaults::layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// Activation of the pooler.
    #[serde(default = "defaults::pooler_act")]
    pub pooler_act: Activation,
    /// Width of the pooler; `hidden_size` where absent.
    pub pooler_output_size: Option<usize>,
}

/// What `transformers.ViTConfig` takes for fields that older files leave out.
mod defaults {
    use roofbench_nn::activation::Activation;

    pub(super) fn num_channels() -> usize {
        3
    }
    pub(super) fn qkv_bias() -> bool {
        true
    }
    pub(super) fn hidden_act() -> Activation {
        Activation::Gelu
    }
    pub(super) fn layer_norm_eps() -> f64 {
        1e-12
    }
    pub(super) fn pooler_act() -> Activation {
        Activation::Tanh
    }
}

impl ViTConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let sizes = [
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("image_size", cfg.image_size.height),
            ("image_size", cfg.image_size.width),
            ("patch_size", cfg.patch_size.height),
            ("patch_size", cfg.patch_size.width),
            ("num_channels", cfg.num_channels),
            ("pooler_output_size", cfg.pooler_size()),
        ];
        config::sizes(&sizes)?;
        config::multiple(("hidden_size", cfg.hidden_size), ("num_attention_heads", cfg.num_attention_heads))?;
        if cfg.patches(cfg.image_size).contains(&0) {
            return Err(config::invalid("patch_size", "is larger than image_size"));
        }
        Ok(cfg)
    }

    /// The layers of the encoder.
    pub fn encoder(&self) -> EncoderConfig {
        EncoderConfig {
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            qkv_bias: self.qkv_bias,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }

    /// Rows and columns of whole patches in a picture of `size`.
    pub fn patches(&self, size: HeightWidth) -> [usize; 2] {
        [size.height / self.patch_size.height, size.width / self.patch_size.width]
    }

    fn pooler_size(&self) -> usize {
        self.pooler_output_size.unwrap_or(self.hidden_size)
    }

    fn layer_norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.hidden_size, self.layer_norm_eps, vb)
    }
}

/// Patches behind a class token, with their positions.
pub struct Embeddings {
    cls_token: Tensor,           // (1, 1, hidden)
    mask_token: Option<Tensor>,  // (1, 1, hidden)
    position_embeddings: Tensor, // (1, 1 + patches, hidden), the class token's first
    patch_embeddings: PatchEmbed,
    /// Rows and columns of the patches that the positions were learned on.
    learned: [usize; 2],
}

impl Embeddings {
    /// Reads `cls_token`, `position_embeddings`, `patch_embeddings.projection` and, with `use_mask_token`, `mask_token`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &ViTConfig, use_mask_token: bool, vb: VarBuilder) -> Result<Self> {
        let learned = cfg.patches(cfg.image_size);
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let get = |rows: usize, name: &str| vb.get((1, rows, cfg.hidden_size), name)?.to_dtype(dtype);
        let patch_size = (cfg.patch_size.height, cfg.patch_size.width);
        let projection = vb.pp("patch_embeddings.projection");
        Ok(Self {
            cls_token: get(1, "cls_token")?,
            mask_token: if use_mask_token { Some(get(1, "mask_token")?) } else { None },
            position_embeddings: get(1 + learned[0] * learned[1], "position_embeddings")?,
            patch_embeddings: PatchEmbed::load(cfg.num_channels, cfg.hidden_size, patch_size, true, projection)?,
            learned,
        })
    }

    /// (batch, channels, height, width) -> (batch, 1 + patches, hidden). `patches` are the rows and columns to
    /// interpolate the positions to, when they are to be interpolated.
    fn forward(&self, pixel_values: &Tensor, patches: Option<[usize; 2]>) -> Result<Tensor> {
        let positions = match patches {
            Some(patches) => &self.interpolated_positions(patches)?,
            None => &self.position_embeddings,
        };
        let (_, rows, hidden) = positions.dims3()?;
        let batch = pixel_values.dim(0)?;
        let of_patches = positions.narrow(1, 1, rows - 1)?.broadcast_as((batch, rows - 1, hidden))?;
        let patches = self.patch_embeddings.forward_add(pixel_values, &of_patches.contiguous()?)?;
        roofbench_nn::cost::elementwise(batch * hidden, 1); // the class token's position added
        let class = (&self.cls_token + positions.narrow(1, 0, 1)?)?.broadcast_as((batch, 1, hidden))?;
        Tensor::cat(&[&class, &patches], 1)
    }

    /// Patches alone, for [`join`](Self::join).
    ///
    /// # Shapes
    /// (batch, channels, height, width) → (batch, patches, hidden).
    ///
    /// # Errors
    /// When the number of channels is another or the picture is smaller than a patch.
    pub fn patches(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.patch_embeddings.forward(pixel_values)
    }

    /// The class token and its `patches`, with the learned positions. Patches at which `masked` (batch, patches), u8, is 1
    /// give way to the mask token, where there is one.
    ///
    /// # Shapes
    /// (batch, patches, hidden) → (batch, 1 + patches, hidden).
    ///
    /// # Errors
    /// When there are more or fewer patches than positions.
    pub fn join(&self, patches: &Tensor, masked: Option<&Tensor>) -> Result<Tensor> {
        let x = match masked.zip(self.mask_token.as_ref()) {
            Some((masked, token)) => {
                let masked = masked.unsqueeze(2)?.broadcast_as(patches.shape())?;
                self.with_class_token(&masked.where_cond(&token.broadcast_as(patches.shape())?, patches)?)?
            }
            None => self.with_class_token(patches)?,
        };
        roofbench_nn::cost::elementwise(x.elem_count(), 1); // positions added
        x.broadcast_add(&self.position_embeddings)
    }

    fn with_class_token(&self, patches: &Tensor) -> Result<Tensor> {
        let (batch, _, hidden) = patches.dims3()?;
        Tensor::cat(&[&self.cls_token.broadcast_as((batch, 1, hidden))?, patches], 1)
    }

    /// FLOPs and bytes for `batch` pictures of `size`, without stretching positions.
    pub fn cost(cfg: &ViTConfig, batch: usize, size: HeightWidth, bytes: u64) -> Cost {
        let [batch, channels, hidden] = [batch, cfg.num_channels, cfg.hidden_size].map(|size| size as u64);
        let [grid, learned] = [size, cfg.image_size].map(|size| cfg.patches(size).map(|n| n as u64));
        let patches = cost::Conv2d {
            batch,
            in_channels: channels,
            out_channels: hidden,
            kernel: [cfg.patch_size.height, cfg.patch_size.width].map(|n| n as u64),
            groups: 1,
            output: grid,
            bias: true,
        };
        cost::input(batch * channels * (size.height * size.width) as u64, bytes)
            + patches.cost(bytes)
            // the class token and every learned position, once; a row of the sequence per item for the token
            + Cost { weight_bytes: (2 + learned[0] * learned[1]) * hidden * bytes, ..Cost::default() }
            + Cost { activation_bytes: batch * hidden * bytes, ..Cost::default() }
            + cost::elementwise(batch * (1 + grid[0] * grid[1]) * hidden, 1) // positions added
    }

    /// The learned positions stretched over other rows and columns; the class token keeps its own.
    fn interpolated_positions(&self, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let (_, positions, hidden) = self.position_embeddings.dims3()?;
        let class = self.position_embeddings.narrow(1, 0, 1)?;
        let grid = self.position_embeddings.narrow(1, 1, positions - 1)?;
        let grid = grid.reshape((1, self.learned[0], self.learned[1], hidden))?.permute((0, 3, 1, 2))?.contiguous()?;
        let grid = resize::bicubic(&grid, (rows, columns), false)?; // (1, hidden, rows, columns)
        Tensor::cat(&[&class, &grid.flatten_from(2)?.transpose(1, 2)?], 1)
    }
}

/// The layers of an encoder of this kind; field names are those of [`ViTConfig`].
#[derive(Debug, Clone, Copy)]
pub struct EncoderConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// The products of query, key and value have biases.
    pub qkv_bias: bool,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
}

impl EncoderConfig {
    fn layer(&self, some_rows: bool, vb: VarBuilder) -> Result<EncoderLayer> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let attention =
            Attention { heads, kv_heads: heads, head_dim: hidden / heads, scale: None, pattern: Pattern::Full };
        let load = if some_rows { SelfAttention::load_for_rows } else { SelfAttention::load };
        let (names, inner) = (["query", "key", "value"], vb.pp("attention.attention"));
        let attention = load(hidden, attention, names, self.qkv_bias, inner)?;
        let output = Linear::load(hidden, hidden, true, vb.pp("attention.output.dense"))?;
        let norm = |name: &str| LayerNorm::load(hidden, self.layer_norm_eps, vb.pp(name));
        let (sizes, names) = ([hidden, self.intermediate_size], ["intermediate.dense", "output.dense"]);
        let mlp = Mlp::load(sizes, self.hidden_act, true, names, vb.clone())?;
        Ok(EncoderLayer {
            attention: SelfAttentionHalf::new(attention, output, norm("layernorm_before")?, NormPlacement::Before),
            feed_forward: FeedForwardHalf::new(mlp, norm("layernorm_after")?, NormPlacement::Before),
        })
    }
}

/// The layers, one after the other, without the norm behind them.
pub struct Encoder {
    layers: Vec<EncoderLayer>,
}

impl Encoder {
    /// Reads `layer.0` and so on under `vb`. `some_rows`: of the last layer some rows alone will be wanted.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &EncoderConfig, some_rows: bool, vb: VarBuilder) -> Result<Self> {
        let last = cfg.num_hidden_layers - 1;
        let layer = |i: usize| cfg.layer(some_rows && i == last, vb.pp(format!("layer.{i}")));
        Ok(Self { layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()? })
    }

    /// The wanted rows of the last layer.
    ///
    /// # Shapes
    /// (batch, seq, hidden) → (batch, rows, hidden).
    ///
    /// # Errors
    /// When shapes do not fit together.
    pub fn forward(&self, x: Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        encode(&self.layers, x, rows, mask)
    }

    /// FLOPs and bytes over (batch, seq) rows, all of them attended to, of which the last layer gives `wanted` an item.
    pub fn cost(cfg: &EncoderConfig, shape: [usize; 2], wanted: usize, bytes: u64) -> Cost {
        let [hidden, heads, inner] =
            [cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size].map(|size| size as u64);
        let head_dim = hidden / heads;
        let layer = cost::Layer { hidden, heads, head_dim, inner, qkv_bias: cfg.qkv_bias, norm_before: true, bytes };
        layer.encoder_of(cfg.num_hidden_layers, shape.map(|size| size as u64), wanted as u64)
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadKind {
    /// Of `ViTModel`.
    Pooler,
    /// Of `ViTForImageClassification`, with its number of labels.
    Classifier { labels: usize },
}

impl HeadKind {
    pub(crate) fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "ViTModel" => Ok(Self::Pooler),
            "ViTForImageClassification" => Ok(Self::Classifier { labels: label_count(&spec.config)? }),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }

    /// Rows of the last layer that it reads, when that is not all: the class token's.
    fn rows(self) -> Option<usize> {
        match self {
            Self::Pooler => None,
            Self::Classifier { .. } => Some(1),
        }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Pooler { dense: Linear, pooler_act: Activation },
    Classifier { classifier: Linear },
}

impl Head {
    /// `vb` is the checkpoint's root.
    fn load(kind: HeadKind, cfg: &ViTConfig, vb: VarBuilder) -> Result<Self> {
        let load = |out_dim: usize, name: &str| Linear::load(cfg.hidden_size, out_dim, true, vb.pp(name));
        Ok(match kind {
            HeadKind::Pooler => {
                Self::Pooler { dense: load(cfg.pooler_size(), "pooler.dense")?, pooler_act: cfg.pooler_act }
            }
            HeadKind::Classifier { labels } => Self::Classifier { classifier: load(labels, "classifier")? },
        })
    }

    /// Output fields of the class from the last layer's result, not normalised yet.
    fn forward(&self, x: &Tensor, layernorm: &LayerNorm) -> Result<Tensors> {
        let class_token = |x: &Tensor| x.narrow(1, 0, 1)?.squeeze(1)?.contiguous(); // (batch, hidden)
        Ok(match self {
            Self::Pooler { dense, pooler_act } => {
                let x = layernorm.forward(x)?;
                let pooled = dense.forward_act(&class_token(&x)?, *pooler_act)?;
                Tensors::from([("last_hidden_state".into(), x), ("pooler_output".into(), pooled)])
            }
            Self::Classifier { classifier } => {
                let logits = classifier.forward(&layernorm.forward(&class_token(x)?)?)?; // (batch, labels)
                Tensors::from([("logits".into(), logits)])
            }
        })
    }
}

/// The encoder with the head of its class.
pub struct ViTModel {
    cfg: ViTConfig,
    embeddings: Embeddings,
    encoder: Encoder,
    layernorm: LayerNorm,
    head: Head,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl ViTModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, ViTConfig::from_spec(spec)?);
        let vit = match kind {
            HeadKind::Pooler => vb.clone(),
            HeadKind::Classifier { .. } => vb.pp("vit"),
        };
        Ok(Self {
            embeddings: Embeddings::load(&cfg, false, vit.pp("embeddings"))?,
            encoder: Encoder::load(&cfg.encoder(), kind.rows().is_some(), vit.pp("encoder"))?,
            layernorm: cfg.layer_norm(vit.pp("layernorm"))?,
            head: Head::load(kind, &cfg, vb)?,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, pixels: &Pixels) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let pixel_values = pixels.values.to_device(&self.device)?.to_dtype(dtype)?;
        let x = self.embeddings.forward(&pixel_values, pixels.interpolated)?;
        self.head.forward(&self.encoder.forward(x, &self.kind.rows().into(), None)?, &self.layernorm)
    }
}

/// The arguments of `forward`, checked.
pub(crate) struct Pixels<'a> {
    /// (batch, channels, height, width)
    pub(crate) values: &'a Tensor,
    pub(crate) size: HeightWidth,
    /// Rows and columns of patches to interpolate the positions to, when that is asked for and needed.
    interpolated: Option<[usize; 2]>,
}

impl<'a> Pixels<'a> {
    pub(crate) fn read(cfg: &ViTConfig, call: &'a Call) -> Result<Self, SessionError> {
        let inputs = Inputs::forward(call, &["pixel_values"], &["interpolate_pos_encoding"])?;
        let values = inputs.pictures("pixel_values", cfg.num_channels)?;
        let (_, _, height, width) = values.dims4()?;
        let (size, patches) = (HeightWidth { height, width }, cfg.patches(HeightWidth { height, width }));
        let learned = cfg.patches(cfg.image_size);
        if !inputs.flag("interpolate_pos_encoding")? {
            if size != cfg.image_size {
                let expected = cfg.image_size;
                return Err(SessionError::input(
                    "pixel_values",
                    format!(
                        "is {height} x {width} pixels, image_size is {} x {}; \
                         resize the pictures, or set interpolate_pos_encoding to true",
                        expected.height, expected.width
                    ),
                ));
            }
            return Ok(Self { values, size, interpolated: None });
        }
        if patches.contains(&0) {
            return Err(SessionError::input(
                "pixel_values",
                format!("{height} x {width} pixels are smaller than a patch"),
            ));
        }
        if learned[0] != learned[1] {
            // the class takes the square root of their number for rows and columns
            let reason = format!("needs a square of learned positions; image_size gives {learned:?}");
            return Err(SessionError::input("interpolate_pos_encoding", reason));
        }
        // as the class decides; where it interpolates to the same rows and columns nothing changes
        Ok(Self { values, size, interpolated: Some(patches).filter(|patches| *patches != learned) })
    }
}

impl Session for ViTModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Pixels::read(&self.cfg, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, self.kind, &Pixels::read(&self.cfg, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass.
pub(crate) fn forward_cost(
    cfg: &ViTConfig,
    kind: HeadKind,
    pixels: &Pixels,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let (items, grid) = (pixels.values.dim(0)?, cfg.patches(pixels.size));
    let seq = 1 + grid[0] * grid[1];
    let [batch, hidden, tokens, patches] = [items, cfg.hidden_size, items * seq, seq - 1].map(|size| size as u64);
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = |rows| cost::norm(Norm::Layer, rows, hidden, bytes);
    // bicubic: a multiply-add for each of 16 neighbours
    let stretched = pixels.interpolated.map_or(Cost::default(), |_| cost::elementwise(patches * hidden, 2 * 16));
    let head = match kind {
        HeadKind::Pooler => {
            let pooled = cfg.pooler_size() as u64;
            norm(tokens) + linear(batch, hidden, pooled) + cost::elementwise(batch * pooled, 1)
        }
        // the class token alone
        HeadKind::Classifier { labels } => norm(batch) + linear(batch, hidden, labels as u64),
    };
    let cost = Embeddings::cost(cfg, items, pixels.size, bytes)
        + stretched
        + Encoder::cost(&cfg.encoder(), [items, seq], kind.rows().unwrap_or(seq), bytes)
        + head;
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6,
            "image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("vit", class, config)
    }

    fn call(shape: [usize; 4], interpolate: bool) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        let arguments = if interpolate {
            [("interpolate_pos_encoding".into(), json!(true))].into_iter().collect()
        } else {
            Default::default()
        };
        Call { method: "forward".into(), inputs: [("pixel_values".into(), pixel_values)].into(), arguments }
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let cfg = ViTConfig::from_spec(&spec).expect("a config");
        let pixels = Pixels::read(&cfg, call).expect("pixels");
        forward_cost(&cfg, HeadKind::of(&spec).expect("a class"), &pixels, spec.dtype).expect("a cost")[0].cost
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // 4 patches and the class token: 5 tokens of width 4, inner width 6, 2 heads of 2, 3 labels
        let patches = 2 * (4 * 4) * 4 + 4 * 4; // 16 outputs of 4 weights each, biases
        let positions = 5 * 4;
        let layer = 7 * 5 * 4 // norm
            + 2 * 5 * 4 * 8 + 5 * 8 + 2 * 4 * 4 + 4 // key and value of all, query of the class token
            + 2 * (2 * 5) * 2 * 2 + 5 * (2 * 5) // two products over 5 pairs of 2 heads, softmax
            + 2 * 4 * 4 + 4 + 4 // output, residual: of the class token from here on
            + 7 * 4 // norm
            + 2 * 4 * 6 + 6 + 6 // up, activation
            + 2 * 6 * 4 + 4 + 4; // down, residual
        let head = 7 * 4 + 2 * 4 * 3 + 3;
        let weights = (4 * 4 + 4) // patches
            + 4 + 5 * 4 // class token, positions
            + (8 + (4 * 12 + 12) + (4 * 4 + 4) + 8 + (4 * 6 + 6) + (6 * 4 + 4)) // layer
            + 8 + (4 * 3 + 3);
        let activations = 16 + 4 * 4 + 4 // pixels, patches, class token
            + 5 * (4 + 8) + 4 + 4 + 4 + 4 + 6 + 4 // norm, key and value, query, attention, output, norm, up, down
            + 4 + 3;
        let expected = Cost {
            flops: patches + positions + layer + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        assert_eq!((expected.flops, expected.weight_bytes, expected.activation_bytes), (1069, 884, 516));
        assert_eq!(cost_of("ViTForImageClassification", json!({}), &call([1, 1, 4, 4], false)), expected);
    }

    #[test]
    fn cost_of_vit_base_is_the_published_one() {
        let base = json!({
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "image_size": 224, "patch_size": 16, "num_channels": 3, "num_labels": 1000,
        });
        let one = call([1, 3, 224, 224], false);
        // torchvision's documentation of vit_b_16: 17.56 billion multiply-adds, without norms, softmax and GELU, of which
        // a classifier of 1000 labels has 0.77 million and our pooler 0.59
        let published = 2.0 * (17.564e9 - 768e3 + 768.0 * 768.0);
        let ratio = cost_of("ViTModel", base.clone(), &one).flops as f64 / published;
        assert!((1.0..1.01).contains(&ratio), "{ratio} of the published count");
        // the classifier's last layer makes keys and values of 197 tokens, and the rest of one
        let cost = cost_of("ViTForImageClassification", base.clone(), &one);
        let skipped = 2.0 * 196.0 * 768.0 * (2.0 * 768.0 + 2.0 * 3072.0) + 4.0 * 196.0 * 197.0 * 768.0;
        let ratio = (cost.flops as f64 + skipped) / (2.0 * 17.564e9);
        assert!((1.0..1.01).contains(&ratio), "{ratio} of the published count");
        // and 86 567 656 parameters, each read once
        assert_eq!(cost.weight_bytes, 4 * 86_567_656);
        let eight = cost_of("ViTForImageClassification", base, &call([8, 3, 224, 224], false));
        assert_eq!((eight.flops, eight.weight_bytes), (8 * cost.flops, cost.weight_bytes));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |changes: Value| {
            ViTConfig::from_spec(&spec("ViTModel", changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (json!({"hidden_size": null}), "config.json: `hidden_size`: "),
            (json!({"hidden_size": 5}), "config.json: `hidden_size`: 5 is not a multiple of num_attention_heads, 2"),
            (json!({"num_attention_heads": 0}), "config.json: `num_attention_heads`: 0 is not in"),
            (json!({"image_size": [4, 4, 4]}), "config.json: `image_size`: expected a number or [height, width]"),
            (json!({"patch_size": [2, 5]}), "config.json: `patch_size`: is larger than image_size"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
    }

    #[test]
    fn pictures_that_do_not_fit_are_refused() {
        let message = |changes: Value, call: &Call| {
            let cfg = ViTConfig::from_spec(&spec("ViTModel", changes)).expect("a config");
            Pixels::read(&cfg, call).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let size = message(json!({}), &call([1, 1, 6, 4], false));
        assert!(size.starts_with("input `pixel_values`: is 6 x 4 pixels, image_size is 4 x 4"), "{size}");
        assert_eq!(message(json!({}), &call([1, 1, 6, 4], true)), "");
        assert!(message(json!({}), &call([1, 1, 1, 4], true)).contains("smaller than a patch"));
        let oblong = message(json!({"image_size": [4, 6]}), &call([1, 1, 6, 4], true));
        assert!(oblong.starts_with("input `interpolate_pos_encoding`: needs a square"), "{oblong}");
        let class = HeadKind::of(&spec("ViTForMaskedImageModeling", json!({}))).err().map(|e| e.to_string());
        assert_eq!(
            class.unwrap_or_default(),
            "vit: class `ViTForMaskedImageModeling` is not supported; supported: ViTModel, ViTForImageClassification"
        );
    }

    fn synthetic_model(spec: &ModelSpec) -> Result<ViTModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        ViTModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        let mut spec = spec("ViTForImageClassification", json!({}));
        let call = call([2, 1, 4, 4], false);
        let exact = synthetic_model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
        for dtype in [DType::BF16, DType::F16] {
            spec.dtype = dtype;
            let mut model = synthetic_model(&spec)?;
            let logits = model.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            let error = (logits - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // each weight is off by at most 2^-9 of itself in bf16; logits are of order 1, four layers deep
            assert!(error > 0.0 && error < 3e-2, "{dtype:?}: {error}");
        }
        Ok(())
    }

    #[test]
    fn the_class_token_alone_gives_what_all_rows_give() -> Result<(), SessionError> {
        let spec = spec("ViTForImageClassification", json!({"num_hidden_layers": 2}));
        let call = call([2, 1, 4, 4], false);
        let run = || Ok::<_, SessionError>(synthetic_model(&spec)?.call(&call, &mut Unobserved)?["logits"].clone());
        let mut all = roofbench_nn::options::Options::default();
        all.switch("class-token-only", false);
        let (alone, recorded) = roofbench_nn::cost::record(run);
        let (together, recorded_of_all) = roofbench_nn::options::with(all, || roofbench_nn::cost::record(run));
        let difference = (alone? - together?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{difference}");
        assert!(recorded.flops < recorded_of_all.flops);
        Ok(())
    }

    #[test]
    fn a_batch_equals_its_items_alone() -> Result<(), SessionError> {
        let spec = spec("ViTModel", json!({"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}));
        let mut model = synthetic_model(&spec)?;
        let batch = call([3, 1, 6, 4], true);
        let together = model.call(&batch, &mut Unobserved)?;
        for item in 0..3 {
            let mut one = batch.clone();
            let alone = batch.inputs["pixel_values"].narrow(0, item, 1)?;
            one.inputs.insert("pixel_values".into(), alone);
            for (name, alone) in model.call(&one, &mut Unobserved)? {
                let difference = (together[&name].narrow(0, item, 1)? - alone)?.abs()?.flatten_all()?.max(0)?;
                // sums may be split differently; values are of order 1
                assert!(difference.to_scalar::<f32>()? < 1e-5, "{name} of item {item}: {difference}");
            }
        }
        Ok(())
    }
}
