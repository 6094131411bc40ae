//! DINOv2: a vision transformer with scaled residuals, optionally gated feed-forward halves and register tokens, whose
//! positions are interpolated to every size of picture.
//! Source: DINOv2 (arXiv:2304.07193), registers (arXiv:2309.16588). Mirrors `transformers.Dinov2Model`,
//! `Dinov2ForImageClassification` and their `Dinov2WithRegisters` twins.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{self, Inputs};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Pattern, Rows, SelfAttention};
use roofbench_nn::kernels::isa;
use roofbench_nn::layer::{EncoderLayer, FeedForward, FeedForwardHalf, NormPlacement, SelfAttentionHalf, encode};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::{GatedMlp, Mlp};
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::pooling::global_avg_pool_2d;
use roofbench_nn::resize;
use serde::Deserialize;

use super::{HeightWidth, activation_dtype};

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // a base model from a checkpoint with a head
    AliasRule { pattern: r"^classifier\.", replacement: None, applies: AliasScope::Base },
    AliasRule { pattern: r"^dinov2(_with_registers)?\.", replacement: Some(""), applies: AliasScope::Base },
    // a class with a head from a checkpoint saved by the base model
    AliasRule {
        pattern: r"^(embeddings|encoder|layernorm)\.",
        replacement: Some("dinov2.$1."),
        applies: AliasScope::Class("Dinov2ForImageClassification"),
    },
    AliasRule {
        pattern: r"^(embeddings|encoder|layernorm)\.",
        replacement: Some("dinov2_with_registers.$1."),
        applies: AliasScope::Class("Dinov2WithRegistersForImageClassification"),
    },
];

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Dinov2Config {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` where absent.
    pub head_dim: Option<usize>,
    /// Width inside the feed-forward half, in units of `hidden_size`; a gated half keeps two thirds.
    pub mlp_ratio: f64,
    /// Activation of feed-forward halves that are not gated.
    pub hidden_act: Activation,
    /// Added to the variance in every normalisation.
    pub layer_norm_eps: f64,
    /// Size of the pictures that the positions were learned on.
    pub image_size: HeightWidth,
    /// Size of a patch; 14 where absent, 16 with registers. What remains beyond whole patches is left out.
    pub patch_size: Option<HeightWidth>,
    /// Colour channels.
    pub num_channels: usize,
    /// The products of query, key and value have biases.
    pub qkv_bias: bool,
    /// Gated feed-forward halves.
    pub use_swiglu_ffn: bool,
    /// There is a token for hidden patches; with registers there always is.
    pub use_mask_token: bool,
    /// Tokens after the class token that stand for no patch, in the classes that have them.
    pub num_register_tokens: usize,
}

/// What `transformers.Dinov2Config` and `Dinov2WithRegistersConfig` take for fields that are left out.
impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            head_dim: None,
            mlp_ratio: 4.0,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-6,
            image_size: HeightWidth { height: 224, width: 224 },
            patch_size: None,
            num_channels: 3,
            qkv_bias: true,
            use_swiglu_ffn: false,
            use_mask_token: true,
            num_register_tokens: 4,
        }
    }
}

impl Dinov2Config {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let mut cfg: Self = spec.parse_config()?;
        if has_registers(&spec.class) {
            cfg.use_mask_token = true;
            cfg.patch_size.get_or_insert(HeightWidth { height: 16, width: 16 });
        } else {
            cfg.num_register_tokens = 0;
        }
        let invalid = |field: &str, reason: String| SessionError::Config { field: field.to_owned(), reason };
        // far beyond any model, and the product of three still fits 64 bits
        const LARGEST: usize = 1 << 20;
        let patch_size = cfg.patch_size();
        let sizes = [
            ("hidden_size", cfg.hidden_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("image_size", cfg.image_size.height),
            ("image_size", cfg.image_size.width),
            ("patch_size", patch_size.height),
            ("patch_size", patch_size.width),
            ("num_channels", cfg.num_channels),
            ("num_register_tokens", cfg.num_register_tokens + 1),
        ];
        if let Some((field, size)) = sizes.into_iter().find(|(_, size)| !(1..=LARGEST).contains(size)) {
            return Err(invalid(field, format!("{size} is not in 1..={LARGEST}")));
        }
        if !(1..=LARGEST).contains(&cfg.head_dim()) {
            let width = cfg.head_dim();
            return Err(invalid("num_attention_heads", format!("gives heads of width {width}, not in 1..={LARGEST}")));
        }
        if !(1.0..=LARGEST as f64).contains(&(cfg.hidden_size as f64 * cfg.mlp_ratio)) {
            return Err(invalid("mlp_ratio", format!("{} is not supported", cfg.mlp_ratio)));
        }
        if cfg.patches(cfg.image_size).contains(&0) {
            return Err(invalid("patch_size", "is larger than image_size".to_owned()));
        }
        Ok(cfg)
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    pub(super) fn patch_size(&self) -> HeightWidth {
        self.patch_size.unwrap_or(HeightWidth { height: 14, width: 14 })
    }

    /// Rows and columns of whole patches in a picture of `size`.
    fn patches(&self, size: HeightWidth) -> [usize; 2] {
        let patch = self.patch_size();
        [size.height / patch.height, size.width / patch.width]
    }

    /// Width inside the feed-forward half.
    fn inner_size(&self) -> usize {
        let inner = (self.hidden_size as f64 * self.mlp_ratio) as usize;
        if self.use_swiglu_ffn { ((inner as f64 * 2.0 / 3.0) as usize).next_multiple_of(8) } else { inner }
    }

    /// Tokens before those of patches.
    fn prefix(&self) -> usize {
        1 + self.num_register_tokens
    }

    fn layer_norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.hidden_size, self.layer_norm_eps, vb)
    }
}

pub(super) fn has_registers(class: &str) -> bool {
    class.starts_with("Dinov2WithRegisters")
}

struct Embeddings {
    /// The class token at its position, and the registers: (1, prefix, hidden).
    prefix: Tensor,
    /// In place of hidden patches: (1, hidden).
    mask_token: Option<Tensor>,
    /// Of the patches: (rows, columns, hidden).
    position_embeddings: Tensor,
    patch_embeddings: PatchEmbed,
    /// With antialiasing, as classes with registers interpolate.
    antialias: bool,
}

impl Embeddings {
    fn load(cfg: &Dinov2Config, vb: VarBuilder) -> Result<Self> {
        let ([rows, columns], hidden) = (cfg.patches(cfg.image_size), cfg.hidden_size);
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let get = |shape: &[usize], name: &str| vb.get(shape, name)?.to_dtype(dtype);
        let positions = get(&[1, 1 + rows * columns, hidden], "position_embeddings")?;
        let class = (get(&[1, 1, hidden], "cls_token")? + positions.narrow(1, 0, 1)?)?;
        let prefix = match cfg.num_register_tokens {
            0 => class,
            registers => Tensor::cat(&[class, get(&[1, registers, hidden], "register_tokens")?], 1)?,
        };
        let patch = cfg.patch_size();
        let projection = vb.pp("patch_embeddings.projection");
        Ok(Self {
            prefix,
            mask_token: if cfg.use_mask_token { Some(get(&[1, hidden], "mask_token")?) } else { None },
            position_embeddings: positions.narrow(1, 1, rows * columns)?.reshape((rows, columns, hidden))?,
            patch_embeddings: PatchEmbed::load(
                cfg.num_channels,
                hidden,
                (patch.height, patch.width),
                true,
                projection,
            )?,
            antialias: cfg.num_register_tokens > 0,
        })
    }

    /// Gives (batch, prefix + patches, hidden).
    fn forward(&self, pixel_values: &Tensor, pixels: &Pixels) -> Result<Tensor> {
        let (batch, hidden) = (pixel_values.dim(0)?, self.prefix.dim(2)?);
        let positions = match pixels.interpolated {
            Some([rows, columns]) => {
                let positions = resize::bicubic_grid(&self.position_embeddings, (rows, columns), self.antialias)?;
                positions.to_dtype(self.position_embeddings.dtype())?
            }
            None => self.position_embeddings.clone(),
        };
        let positions = positions.reshape((1, (), hidden))?;
        let positions = positions.broadcast_as((batch, positions.dim(1)?, hidden))?;
        let patches = match (&pixels.masked, &self.mask_token) {
            (Some(masked), Some(token)) => {
                let patches = self.patch_embeddings.forward(pixel_values)?;
                let masked = masked.to_device(patches.device())?.unsqueeze(2)?.broadcast_as(patches.shape())?;
                let patches = masked.where_cond(&token.broadcast_as(patches.shape())?, &patches)?;
                roofbench_nn::cost::elementwise(patches.elem_count(), 1); // positions added
                (patches + positions)?
            }
            _ => self.patch_embeddings.forward_add(pixel_values, &positions)?,
        };
        let prefix = self.prefix.broadcast_as((batch, self.prefix.dim(1)?, hidden))?;
        Tensor::cat(&[&prefix, &patches], 1)
    }
}

/// A layer whose output is multiplied with `lambda` (out), folded into its weights.
fn load_scaled([input, out]: [usize; 2], vb: VarBuilder, lambda: VarBuilder) -> Result<Linear> {
    let (weight, bias) = (vb.get((out, input), "weight")?, vb.get(out, "bias")?);
    let dtype = weight.dtype();
    // folding rounds once more: it is done at least in f32
    let wide = |x: &Tensor| if dtype == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) };
    let lambda = wide(&lambda.get(out, "lambda1")?)?;
    let weight = wide(&weight)?.broadcast_mul(&lambda.reshape((out, 1))?)?.to_dtype(dtype)?;
    Linear::new(&weight, Some(&(wide(&bias)? * lambda)?.to_dtype(dtype)?))
}

fn load_feed_forward(cfg: &Dinov2Config, vb: VarBuilder, lambda: VarBuilder) -> Result<FeedForward> {
    let (hidden, inner) = (cfg.hidden_size, cfg.inner_size());
    if cfg.use_swiglu_ffn {
        let gate_up = Linear::load(hidden, 2 * inner, true, vb.pp("weights_in"))?;
        let down = load_scaled([inner, hidden], vb.pp("weights_out"), lambda)?;
        return Ok(GatedMlp::new(gate_up, Activation::Silu, down)?.into());
    }
    let fc1 = Linear::load(hidden, inner, true, vb.pp("fc1"))?;
    Ok(Mlp::new(fc1, cfg.hidden_act, load_scaled([inner, hidden], vb.pp("fc2"), lambda)?)?.into())
}

/// Both halves are multiplied with a learned scale before they are added.
fn load_layer(cfg: &Dinov2Config, vb: VarBuilder) -> Result<EncoderLayer> {
    let (hidden, heads, head_dim) = (cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim());
    let attention = Attention { heads, kv_heads: heads, head_dim, scale: None, pattern: Pattern::Full };
    let (names, inner) = (["query", "key", "value"], vb.pp("attention.attention"));
    let attention = SelfAttention::load(hidden, attention, names, cfg.qkv_bias, inner)?;
    let output = load_scaled([heads * head_dim, hidden], vb.pp("attention.output.dense"), vb.pp("layer_scale1"))?;
    let feed_forward = load_feed_forward(cfg, vb.pp("mlp"), vb.pp("layer_scale2"))?;
    let norm = |name: &str| cfg.layer_norm(vb.pp(name));
    Ok(EncoderLayer {
        attention: SelfAttentionHalf::new(attention, output, norm("norm1")?, NormPlacement::Before),
        feed_forward: FeedForwardHalf::new(feed_forward, norm("norm2")?, NormPlacement::Before),
    })
}

/// What follows the encoder.
enum Head {
    /// Of base models: the class token as it is.
    None,
    /// On the class token beside the mean of the patches.
    Classifier(Linear),
}

/// The encoder with the head of its class.
pub struct Dinov2Model {
    cfg: Dinov2Config,
    embeddings: Embeddings,
    layers: Vec<EncoderLayer>,
    layernorm: LayerNorm,
    head: Head,
    /// Labels of the head.
    labels: Option<usize>,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

/// Labels of the class's head, if it has one.
pub(super) fn head_labels(spec: &ModelSpec) -> Result<Option<usize>, SessionError> {
    match spec.class.as_str() {
        "Dinov2Model" | "Dinov2WithRegistersModel" => Ok(None),
        "Dinov2ForImageClassification" | "Dinov2WithRegistersForImageClassification" => {
            label_count(&spec.config).map(Some)
        }
        _ => Err(SessionError::UnsupportedClass {
            family: spec.family.clone(),
            class: spec.class.clone(),
            supported: CLASSES.join(", "),
        }),
    }
}

impl Dinov2Model {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (labels, cfg) = (head_labels(spec)?, Dinov2Config::from_spec(spec)?);
        let base = match labels {
            None => vb.clone(),
            Some(_) if has_registers(&spec.class) => vb.pp("dinov2_with_registers"),
            Some(_) => vb.pp("dinov2"),
        };
        let layer = |i: usize| load_layer(&cfg, base.pp(format!("encoder.layer.{i}")));
        Ok(Self {
            embeddings: Embeddings::load(&cfg, base.pp("embeddings"))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            layernorm: cfg.layer_norm(base.pp("layernorm"))?,
            head: match labels {
                None => Head::None,
                Some(labels) => Head::Classifier(Linear::load(2 * cfg.hidden_size, labels, true, vb.pp("classifier"))?),
            },
            labels,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn forward(&self, pixels: &Pixels) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let pixel_values = pixels.values.to_device(&self.device)?.to_dtype(dtype)?;
        let x = encode(&self.layers, self.embeddings.forward(&pixel_values, pixels)?, &Rows::All, None)?;
        let x = self.layernorm.forward(&x)?; // (batch, seq, hidden)
        let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?; // (batch, hidden)
        Ok(match &self.head {
            Head::None => Tensors::from([("last_hidden_state".into(), x), ("pooler_output".into(), class)]),
            Head::Classifier(classifier) => {
                let patches = x.narrow(1, self.cfg.prefix(), x.dim(1)? - self.cfg.prefix())?;
                let mean = global_avg_pool_2d(&patches.unsqueeze(1)?)?; // (batch, hidden)
                let logits = classifier.forward(&Tensor::cat(&[class, mean], 1)?)?; // (batch, labels)
                Tensors::from([("logits".into(), logits)])
            }
        })
    }
}

/// The arguments of `forward`, checked.
pub(super) struct Pixels<'a> {
    /// (batch, channels, height, width)
    pub(super) values: &'a Tensor,
    /// Rows and columns of patches.
    patches: [usize; 2],
    /// The same, when the positions are to be interpolated to them.
    interpolated: Option<[usize; 2]>,
    /// Patches to hide: (batch, patches), 0 or 1.
    pub(super) masked: Option<Tensor>,
}

impl<'a> Pixels<'a> {
    pub(super) fn read(cfg: &Dinov2Config, labels: Option<usize>, call: &'a Call) -> Result<Self, SessionError> {
        let tensors: &[&str] = if labels.is_none() { &["pixel_values", "bool_masked_pos"] } else { &["pixel_values"] };
        let inputs = Inputs::forward(call, tensors, &[])?;
        let values = inputs.pictures("pixel_values", cfg.num_channels)?;
        let (batch, _, height, width) = values.dims4()?;
        let (patches, learned) = (cfg.patches(HeightWidth { height, width }), cfg.patches(cfg.image_size));
        let [count, learned_count] = [patches, learned].map(|[rows, columns]| rows * columns);
        if count == 0 {
            let reason = format!("{height} x {width} pixels are smaller than a patch");
            return Err(SessionError::input("pixel_values", reason));
        }
        // as the class decides: a square picture with as many patches takes the positions as they are
        let as_learned = count == learned_count && height == width;
        if !as_learned && learned[0] != learned[1] {
            // the class takes the square root of their number for rows and columns
            let reason = format!(
                "is {height} x {width} pixels, for which positions are interpolated; \
                 that needs a square of learned ones, image_size gives {learned:?}"
            );
            return Err(SessionError::input("pixel_values", reason));
        }
        let masked = match call.inputs.contains_key("bool_masked_pos") {
            true => Some(inputs.matrix("bool_masked_pos")?),
            false => None,
        };
        if let Some(masked) = &masked {
            if !cfg.use_mask_token {
                return Err(SessionError::input("bool_masked_pos", "needs a mask token; use_mask_token is false"));
            }
            if masked.dims() != [batch, count] {
                let reason = format!("has shape {:?}, expected {:?}", masked.dims(), [batch, count]);
                return Err(SessionError::input("bool_masked_pos", reason));
            }
            inputs::zero_or_one("bool_masked_pos", masked)?;
        }
        // interpolation to the same rows and columns changes nothing
        let interpolated = Some(patches).filter(|patches| !as_learned && *patches != learned);
        Ok(Self { values, patches, interpolated, masked })
    }
}

impl Session for Dinov2Model {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Pixels::read(&self.cfg, self.labels, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, self.labels, &Pixels::read(&self.cfg, self.labels, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass.
pub(super) fn forward_cost(
    cfg: &Dinov2Config,
    labels: Option<usize>,
    pixels: &Pixels,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let (batch, channels, height, width) = pixels.values.dims4()?;
    let pixel_count = (batch * channels * height * width) as u64;
    let [batch, channels, hidden, inner, heads, head_dim, prefix] =
        [batch, channels, cfg.hidden_size, cfg.inner_size(), cfg.num_attention_heads, cfg.head_dim(), cfg.prefix()]
            .map(|size| size as u64);
    let grid = pixels.patches.map(|n| n as u64);
    let learned = cfg.patches(cfg.image_size);
    let patches = grid[0] * grid[1];
    let seq = prefix + patches;
    let tokens = batch * seq;

    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = cost::norm(Norm::Layer, tokens, hidden, bytes);
    let residual = cost::elementwise(tokens * hidden, 1);

    let patch = cfg.patch_size();
    let projection = cost::Conv2d {
        batch,
        in_channels: channels,
        out_channels: hidden,
        kernel: [patch.height, patch.width].map(|n| n as u64),
        groups: 1,
        output: grid,
        bias: true,
    };
    let interpolation = match pixels.interpolated {
        Some([rows, columns]) => {
            let (from, antialias) = ((learned[0], learned[1]), cfg.num_register_tokens > 0);
            let neighbours = resize::bicubic_neighbours(from, (rows, columns), antialias) as u64;
            cost::elementwise(neighbours * hidden, 2) // a multiply-add for each
        }
        None => Cost::default(),
    };
    // the tokens before the patches and every learned position, once; a mask token where patches are hidden
    let table = prefix + (learned[0] * learned[1]) as u64 + u64::from(pixels.masked.is_some());
    let embeddings = cost::input(pixel_count, bytes)
        + projection.cost(bytes)
        + cost::elementwise(batch * patches * hidden, 1) // positions added
        + interpolation
        + Cost { weight_bytes: table * hidden * bytes, ..Cost::default() }
        + Cost { activation_bytes: batch * prefix * hidden * bytes, ..Cost::default() };
    let attention = cost::Attention {
        batch,
        heads,
        kv_heads: heads,
        head_dim,
        queries: seq,
        cached: 0,
        visible_pairs: cost::full_pairs(seq, seq),
    };
    let feed_forward = if cfg.use_swiglu_ffn {
        // gate and up side by side; the activation and the product
        linear(tokens, hidden, 2 * inner) + cost::elementwise(tokens * inner, 2) + linear(tokens, inner, hidden)
    } else {
        linear(tokens, hidden, inner) + cost::elementwise(tokens * inner, 1) + linear(tokens, inner, hidden)
    };
    // layer scales are folded into the weights before them
    let layer = norm
        + cost::linear(tokens, hidden, 3 * heads * head_dim, cfg.qkv_bias, bytes) // query, key and value
        + attention.cost(bytes)
        + linear(tokens, heads * head_dim, hidden) + residual
        + norm
        + feed_forward + residual;
    let head = match labels {
        None => Cost::default(),
        // the sum over the patches, and a product on its mean beside the class token
        Some(labels) => cost::elementwise(batch * patches * hidden, 1) + linear(batch, 2 * hidden, labels as u64),
    };
    let cost = embeddings + layer * cfg.num_hidden_layers as u64 + norm + head;
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
            "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 6,
            "patch_size": 2, "num_channels": 1, "num_labels": 3, "num_register_tokens": 2,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("dinov2", class, config)
    }

    fn call(shape: [usize; 4]) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), pixel_values)].into(), ..Call::default() }
    }

    fn model(spec: &ModelSpec) -> Dinov2Model {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, ALIASES, &spec.class, &HubOptions::from_env()).expect("weights");
        Dinov2Model::load(spec, weights.var_builder(spec.dtype, &spec.device)).expect("a model")
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let (cfg, labels) = (Dinov2Config::from_spec(&spec).expect("a config"), head_labels(&spec).expect("a class"));
        let pixels = Pixels::read(&cfg, labels, call).expect("pixels");
        forward_cost(&cfg, labels, &pixels, spec.dtype).expect("a cost")[0].cost
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // 4 x 6 pixels: 2 x 3 patches after the class token and 2 registers, 9 tokens of width 4 in 2 heads of 2;
        // gated halves of ceil8(2/3 · 8) = 8
        let changes = json!({"use_swiglu_ffn": true});
        let embeddings = 2 * (6 * 4) * 4 + 6 * 4 + 6 * 4 // patches of 4 pixels, biases, positions
            // 3 -> 2 rows with antialiasing weigh 3 and 3 neighbours, 3 -> 3 columns 3, 3 and 2
            + 2 * (3 + 3) * (3 + 3 + 2) * 4;
        let layer = 7 * 9 * 4 // norm
            + 2 * 9 * 4 * 12 + 9 * 12 // query, key, value
            + 2 * (2 * 81) * 2 * 2 + 5 * (2 * 81) // two products over 81 pairs of 2 heads, softmax
            + 2 * 9 * 4 * 4 + 9 * 4 + 9 * 4 // output, residual
            + 7 * 9 * 4 // norm
            + 2 * 9 * 4 * 16 + 9 * 16 + 2 * 9 * 8 // gate and up, activation and product
            + 2 * 9 * 8 * 4 + 9 * 4 + 9 * 4; // down, residual
        let head = 7 * 9 * 4 + 6 * 4 + 2 * 8 * 3 + 3; // norm, mean, classifier
        let weights = (4 * 4 + 4) + (3 + 9) * 4 // patches, tokens and positions
            + 8 + (4 * 12 + 12) + (4 * 4 + 4) + 8 + (4 * 16 + 16) + (8 * 4 + 4) // layer
            + 8 + (8 * 3 + 3);
        let activations = 24 + 6 * 4 + 3 * 4 // pixels, patches, tokens
            + 9 * (4 + 12 + 4 + 4 + 4 + 16 + 4) // norm, qkv, attention, output, norm, gate and up, down
            + 9 * 4 + 3;
        let expected = Cost {
            flops: embeddings + layer + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        let class = "Dinov2WithRegistersForImageClassification";
        assert_eq!(cost_of(class, changes, &call([1, 1, 4, 6])), expected);
    }

    #[test]
    fn cost_of_dinov2_base_is_the_published_one() {
        let base = json!({
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 518,
            "patch_size": 14, "num_channels": 3,
        });
        let cost = cost_of("Dinov2Model", base.clone(), &call([1, 3, 518, 518]));
        // timm's table of vit_base_patch14_dinov2 at 518: 151.71 billion multiply-adds, without norms, softmax and GELU
        let ratio = cost.flops as f64 / (2.0 * 151.71e9);
        assert!((1.0..1.02).contains(&ratio), "{} FLOP, {ratio} of the published count", cost.flops);
        // 86 580 480 parameters: the mask token is not read, layer scales and the class token's position are folded
        assert_eq!(cost.weight_bytes, 4 * (86_580_480 - 768 - 12 * 2 * 768 - 768));
        let eight = cost_of("Dinov2Model", base, &call([8, 3, 518, 518]));
        assert_eq!((eight.flops, eight.weight_bytes), (8 * cost.flops, cost.weight_bytes));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |changes: Value| {
            Dinov2Config::from_spec(&spec("Dinov2Model", changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (json!({"hidden_size": 0}), "config.json: `hidden_size`: 0 is not in"),
            (json!({"num_attention_heads": 5}), "config.json: `num_attention_heads`: gives heads of width 0"),
            (json!({"mlp_ratio": 0}), "config.json: `mlp_ratio`: 0 is not supported"),
            (json!({"patch_size": 7}), "config.json: `patch_size`: is larger than image_size"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
        let class = head_labels(&spec("Dinov2Backbone", json!({}))).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            class.starts_with("dinov2: class `Dinov2Backbone` is not supported; supported: Dinov2Model"),
            "{class}"
        );
        let absent = |class: &str| {
            let spec = spec(class, json!({"patch_size": null, "image_size": 224}));
            Dinov2Config::from_spec(&spec).expect("a config").patch_size().height
        };
        assert_eq!((absent("Dinov2Model"), absent("Dinov2WithRegistersModel")), (14, 16));
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let message = |changes: Value, call: &Call| {
            let cfg = Dinov2Config::from_spec(&spec("Dinov2Model", changes)).expect("a config");
            Pixels::read(&cfg, None, call).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({}), &call([1, 1, 9, 4])), "");
        assert!(message(json!({}), &call([1, 1, 1, 4])).contains("smaller than a patch"));
        let oblong = message(json!({"image_size": [4, 6]}), &call([1, 1, 4, 6]));
        assert!(oblong.contains("needs a square of learned ones"), "{oblong}");
        let mut masked = call([1, 1, 6, 6]);
        let mask = Tensor::ones((1, 8), DType::U8, &Device::Cpu).expect("a mask");
        masked.inputs.insert("bool_masked_pos".into(), mask);
        assert!(message(json!({}), &masked).contains("has shape [1, 8], expected [1, 9]"));
        assert!(message(json!({"use_mask_token": false}), &masked).contains("use_mask_token is false"));
    }

    #[test]
    fn hidden_patches_do_not_matter() {
        let mut model = model(&spec("Dinov2Model", json!({})));
        let mut run = |scale: f64, hidden: [u8; 9]| -> Vec<f32> {
            let mut call = call([1, 1, 6, 6]);
            let corner = Tensor::from_slice(&hidden, (1, 9), &Device::Cpu).expect("a mask");
            let pixels = (call.inputs["pixel_values"].clone() * scale).expect("pixels");
            call.inputs.insert("pixel_values".into(), pixels);
            call.inputs.insert("bool_masked_pos".into(), corner);
            let outputs = model.call(&call, &mut Unobserved).expect("outputs");
            outputs["pooler_output"].flatten_all().and_then(|x| x.to_vec1()).expect("values")
        };
        assert_eq!(run(1.0, [1; 9]), run(5.0, [1; 9]));
        assert_ne!(run(1.0, [1; 9]), run(1.0, [1, 1, 1, 1, 0, 1, 1, 1, 1]));
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        let mut spec = spec("Dinov2ForImageClassification", json!({}));
        let call = call([2, 1, 6, 6]);
        let exact = model(&spec).call(&call, &mut Unobserved)?.remove("logits").expect("logits");
        for dtype in [DType::BF16, DType::F16] {
            spec.dtype = dtype;
            let logits = model(&spec).call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            let error = (logits - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // each weight is off by at most 2^-9 of itself in bf16, scaled ones once more; logits are of order 1
            assert!(error > 0.0 && error < 5e-2, "{dtype:?}: {error}");
        }
        Ok(())
    }
}
