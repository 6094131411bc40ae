//! ConvNeXt: stages of depthwise 7 x 7 convolutions with a pointwise feed-forward half, patches of two by two merged
//! between them. Its second version normalises each channel's response inside that half, where the first scales its
//! result.
//! Source: ConvNeXt (arXiv:2201.03545), ConvNeXt V2 (arXiv:2301.00808). Mirrors `transformers.ConvNextModel`,
//! `ConvNextForImageClassification`, `ConvNextV2Model` and `ConvNextV2ForImageClassification`.
//!
//! Channels are last from the first patch to the last layer.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config::{self, invalid};
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{Conv2d, Conv2dConfig, to_channels_first};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::{LayerNorm, ResponseNorm};
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::pooling::global_avg_pool_2d;
use serde::Deserialize;

use super::{HeightWidth, activation_dtype};

/// The classes that run.
pub const CLASSES: &[&str] =
    &["ConvNextModel", "ConvNextForImageClassification", "ConvNextV2Model", "ConvNextV2ForImageClassification"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // a base model from a checkpoint with a head
    AliasRule::drop(r"^classifier\.", AliasScope::Base),
    AliasRule::rename(r"^convnext(v2)?\.", "", AliasScope::Base),
];

/// Of every norm but the last, whatever the config says.
const INNER_EPS: f64 = 1e-6;
/// Side of the depthwise kernel.
const KERNEL: usize = 7;
/// Width of the feed-forward half over that of the stream.
const EXPANSION: usize = 4;

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct ConvNextConfig {
    /// Colour channels.
    #[serde(default = "defaults::num_channels")]
    pub num_channels: usize,
    /// Size of a patch; what remains beyond whole patches is left out.
    #[serde(default = "defaults::patch_size")]
    pub patch_size: HeightWidth,
    /// Stages.
    #[serde(default = "defaults::num_stages")]
    pub num_stages: usize,
    /// Width of each stage.
    #[serde(default = "defaults::hidden_sizes")]
    pub hidden_sizes: Vec<usize>,
    /// Layers of each stage.
    #[serde(default = "defaults::depths")]
    pub depths: Vec<usize>,
    /// Activation of the feed-forward half.
    #[serde(default = "defaults::hidden_act")]
    pub hidden_act: Activation,
    /// Added to the variance in the last norm.
    #[serde(default = "defaults::layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// Above 0 each layer of the first version scales its result by a learned vector.
    #[serde(default = "defaults::layer_scale_init_value")]
    pub layer_scale_init_value: f64,
}

/// What `transformers.ConvNextConfig` takes for fields that files leave out.
mod defaults {
    use roofbench_nn::activation::Activation;

    use super::HeightWidth;

    pub(super) fn num_channels() -> usize {
        3
    }
    pub(super) fn patch_size() -> HeightWidth {
        HeightWidth { height: 4, width: 4 }
    }
    pub(super) fn num_stages() -> usize {
        4
    }
    pub(super) fn hidden_sizes() -> Vec<usize> {
        vec![96, 192, 384, 768]
    }
    pub(super) fn depths() -> Vec<usize> {
        vec![3, 3, 9, 3]
    }
    pub(super) fn hidden_act() -> Activation {
        Activation::Gelu
    }
    pub(super) fn layer_norm_eps() -> f64 {
        1e-12
    }
    pub(super) fn layer_scale_init_value() -> f64 {
        1e-6
    }
}

impl ConvNextConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        for (field, numbers) in [("hidden_sizes", &cfg.hidden_sizes), ("depths", &cfg.depths)] {
            if numbers.len() != cfg.num_stages {
                let reason = format!("has {} numbers for num_stages = {}", numbers.len(), cfg.num_stages);
                return Err(invalid(field, reason));
            }
        }
        config::sizes(&[
            ("num_stages", cfg.num_stages),
            ("num_channels", cfg.num_channels),
            ("patch_size", cfg.patch_size.height),
            ("patch_size", cfg.patch_size.width),
        ])?;
        config::sizes(&cfg.hidden_sizes.iter().map(|size| ("hidden_sizes", *size)).collect::<Vec<_>>())?;
        config::sizes(&cfg.depths.iter().map(|depth| ("depths", *depth)).collect::<Vec<_>>())?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        Ok(cfg)
    }

    /// Width of the last stage.
    pub(super) fn features(&self) -> usize {
        self.hidden_sizes.last().copied().unwrap_or_default()
    }

    /// Rows and columns of each stage for a picture of `size`, or `None` when it is too small for them.
    fn grids(&self, size: HeightWidth) -> Option<Vec<[usize; 2]>> {
        let first = [size.height / self.patch_size.height, size.width / self.patch_size.width];
        let grids = std::iter::successors(Some(first), |grid| Some(grid.map(|n| n / 2)));
        let grids: Vec<_> = grids.take(self.num_stages).collect();
        grids.last().is_some_and(|last| !last.contains(&0)).then_some(grids)
    }
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    /// Layer scales.
    One,
    /// Response norms.
    Two,
}

impl Version {
    /// Of names in a checkpoint with a head.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::One => "convnext",
            Self::Two => "convnextv2",
        }
    }
}

struct Embeddings {
    patch_embeddings: PatchEmbed,
    layernorm: LayerNorm,
}

impl Embeddings {
    fn load(cfg: &ConvNextConfig, vb: VarBuilder) -> Result<Self> {
        let (width, patch_size) = (cfg.hidden_sizes[0], (cfg.patch_size.height, cfg.patch_size.width));
        Ok(Self {
            patch_embeddings: PatchEmbed::load(cfg.num_channels, width, patch_size, true, vb.pp("patch_embeddings"))?,
            layernorm: LayerNorm::load(width, INNER_EPS, vb.pp("layernorm"))?,
        })
    }

    /// (batch, channels, height, width) -> (batch, rows, columns, width)
    fn forward(&self, pixel_values: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let x = self.layernorm.forward(&self.patch_embeddings.forward(pixel_values)?)?; // (batch, patches, width)
        x.reshape((x.dim(0)?, rows, columns, x.dim(2)?))
    }
}

struct Layer {
    dwconv: Conv2d,
    layernorm: LayerNorm,
    pwconv1: Linear,
    act: Activation,
    grn: Option<ResponseNorm>,
    /// With the layer scale in it.
    pwconv2: Linear,
}

impl Layer {
    fn load(cfg: &ConvNextConfig, version: Version, width: usize, vb: VarBuilder) -> Result<Self> {
        let depthwise = Conv2dConfig::new(KERNEL).padding(KERNEL / 2).groups(width);
        let inner = EXPANSION * width;
        let has_scale = version == Version::One && cfg.layer_scale_init_value > 0.0;
        Ok(Self {
            dwconv: Conv2d::load(width, width, depthwise, true, vb.pp("dwconv"))?,
            layernorm: LayerNorm::load(width, INNER_EPS, vb.pp("layernorm"))?,
            pwconv1: Linear::load(width, inner, true, vb.pp("pwconv1"))?,
            act: cfg.hidden_act,
            grn: match version {
                Version::One => None,
                Version::Two => Some(ResponseNorm::load(inner, vb.pp("grn"))?),
            },
            pwconv2: match has_scale {
                true => scaled(inner, &vb.get(width, "layer_scale_parameter")?, vb.pp("pwconv2"))?,
                false => Linear::load(inner, width, true, vb.pp("pwconv2"))?,
            },
        })
    }

    /// `x` and the result are (batch, rows, columns, width).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = self.pwconv1.forward_act(&self.layernorm.forward(&self.dwconv.forward(x)?)?, self.act)?;
        match &self.grn {
            None => self.pwconv2.forward_add(&inner, x),
            Some(grn) => self.pwconv2.forward_add(&grn.forward(&inner)?, x),
        }
    }
}

/// A linear layer from `input` whose result is multiplied by `scale` (out).
fn scaled(input: usize, scale: &Tensor, vb: VarBuilder) -> Result<Linear> {
    let output = scale.elem_count();
    let (weight, bias) = (vb.get((output, input), "weight")?, vb.get(output, "bias")?);
    // the one rounding more is that of the weights' own precision
    let wide = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let scale = scale.to_dtype(wide)?;
    let bias = (bias.to_dtype(wide)? * &scale)?.to_dtype(bias.dtype())?;
    let folded = weight.to_dtype(wide)?.broadcast_mul(&scale.unsqueeze(1)?)?;
    Linear::new(&folded.to_dtype(weight.dtype())?, Some(&bias))
}

struct Stage {
    /// None in the first.
    downsampling_layer: Option<(LayerNorm, Conv2d)>,
    layers: Vec<Layer>,
}

impl Stage {
    fn load(cfg: &ConvNextConfig, version: Version, index: usize, vb: VarBuilder) -> Result<Self> {
        let width = cfg.hidden_sizes[index];
        let downsampling_layer = match index.checked_sub(1).map(|before| cfg.hidden_sizes[before]) {
            None => None,
            Some(before) => {
                let (vb, merge) = (vb.pp("downsampling_layer"), Conv2dConfig::new(2).stride(2));
                let norm = LayerNorm::load(before, INNER_EPS, vb.pp(0))?;
                Some((norm, Conv2d::load(before, width, merge, true, vb.pp(1))?))
            }
        };
        let layer = |i: usize| Layer::load(cfg, version, width, vb.pp(format!("layers.{i}")));
        Ok(Self { downsampling_layer, layers: (0..cfg.depths[index]).map(layer).collect::<Result<_>>()? })
    }

    /// (batch, rows, columns, width before) -> (batch, rows / 2, columns / 2, width), not halved in the first.
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let x = match &self.downsampling_layer {
            None => x,
            Some((norm, conv)) => conv.forward(&norm.forward(&x)?)?,
        };
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x))
    }
}

/// What a class is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) version: Version,
    /// Of the classifier, if there is one.
    pub(super) labels: Option<usize>,
}

impl Kind {
    pub(super) fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        let labels = || label_count(&spec.config).map(Some);
        let (version, labels) = match spec.class.as_str() {
            "ConvNextModel" => (Version::One, None),
            "ConvNextForImageClassification" => (Version::One, labels()?),
            "ConvNextV2Model" => (Version::Two, None),
            "ConvNextV2ForImageClassification" => (Version::Two, labels()?),
            _ => return Err(config::unsupported_class(spec, CLASSES)),
        };
        Ok(Self { version, labels })
    }
}

/// The stages with the head of their class.
pub struct ConvNextModel {
    cfg: ConvNextConfig,
    embeddings: Embeddings,
    stages: Vec<Stage>,
    layernorm: LayerNorm,
    classifier: Option<Linear>,
    kind: Kind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl ConvNextModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (Kind::of(spec)?, ConvNextConfig::from_spec(spec)?);
        let features = cfg.features();
        let (base, classifier) = match kind.labels {
            None => (vb, None),
            Some(labels) => {
                (vb.pp(kind.version.prefix()), Some(Linear::load(features, labels, true, vb.pp("classifier"))?))
            }
        };
        let stage = |i: usize| Stage::load(&cfg, kind.version, i, base.pp(format!("encoder.stages.{i}")));
        Ok(Self {
            embeddings: Embeddings::load(&cfg, base.pp("embeddings"))?,
            stages: (0..cfg.num_stages).map(stage).collect::<Result<_>>()?,
            layernorm: LayerNorm::load(features, cfg.layer_norm_eps, base.pp("layernorm"))?,
            classifier,
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
        let x = self.embeddings.forward(&pixel_values, pixels.grids[0])?;
        let x = self.stages.iter().try_fold(x, |x, stage| stage.forward(x))?; // (batch, rows, columns, features)
        let pooled = self.layernorm.forward(&global_avg_pool_2d(&x)?)?; // (batch, features)
        Ok(match &self.classifier {
            Some(classifier) => Tensors::from([("logits".into(), classifier.forward(&pooled)?)]),
            None => {
                Tensors::from([("last_hidden_state".into(), to_channels_first(&x)?), ("pooler_output".into(), pooled)])
            }
        })
    }
}

/// The arguments of `forward`, checked.
pub(super) struct Pixels<'a> {
    /// (batch, channels, height, width)
    pub(super) values: &'a Tensor,
    /// Rows and columns of each stage.
    grids: Vec<[usize; 2]>,
}

impl<'a> Pixels<'a> {
    pub(super) fn read(cfg: &ConvNextConfig, call: &'a Call) -> Result<Self, SessionError> {
        let inputs = Inputs::forward(call, &["pixel_values"], &[])?;
        let values = inputs.pictures("pixel_values", cfg.num_channels)?;
        let (_, _, height, width) = values.dims4()?;
        match cfg.grids(HeightWidth { height, width }) {
            Some(grids) => Ok(Self { values, grids }),
            None => {
                let least = [cfg.patch_size.height, cfg.patch_size.width].map(|n| n << (cfg.num_stages - 1));
                let reason = format!("{height} x {width} pixels are fewer than {} x {}", least[0], least[1]);
                Err(SessionError::input("pixel_values", reason))
            }
        }
    }
}

impl Session for ConvNextModel {
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

/// FLOPs and bytes of one forward pass. Layer scales are in the weights before it begins.
pub(super) fn forward_cost(
    cfg: &ConvNextConfig,
    kind: Kind,
    pixels: &Pixels,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let [batch, channels, features] = [pixels.values.dim(0)?, cfg.num_channels, cfg.features()].map(|n| n as u64);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let conv = |[in_channels, out_channels]: [u64; 2], kernel, groups, output| {
        cost::Conv2d { batch, in_channels, out_channels, kernel, groups, output, bias: true }.cost(bytes)
    };

    let mut total = cost::input(pixels.values.elem_count() as u64, bytes);
    let mut before = channels;
    for (stage, (grid, depth)) in pixels.grids.iter().zip(&cfg.depths).enumerate() {
        let (width, grid) = (cfg.hidden_sizes[stage] as u64, grid.map(|n| n as u64));
        let tokens = batch * grid[0] * grid[1];
        total += match stage {
            0 => {
                let patch = [cfg.patch_size.height, cfg.patch_size.width].map(|n| n as u64);
                conv([before, width], patch, 1, grid) + norm(tokens, width)
            }
            _ => {
                let pixels = pixels.grids[stage - 1].map(|n| n as u64);
                norm(batch * pixels[0] * pixels[1], before) + conv([before, width], [2, 2], 1, grid)
            }
        };
        let inner = EXPANSION as u64 * width;
        // square and sum, multiply-add of scale and bias
        let response = match kind.version {
            Version::One => Cost::default(),
            Version::Two => Cost {
                flops: 4 * tokens * inner,
                weight_bytes: 2 * inner * bytes,
                activation_bytes: tokens * inner * bytes,
                kv_bytes: 0,
            },
        };
        let layer = conv([width, width], [KERNEL as u64; 2], width, grid)
            + norm(tokens, width)
            + cost::linear(tokens, width, inner, true, bytes)
            + cost::elementwise(tokens * inner, u64::from(cfg.hidden_act != Activation::Identity))
            + response
            + cost::linear(tokens, inner, width, true, bytes)
            + cost::elementwise(tokens * width, 1); // residual
        total += layer * *depth as u64;
        before = width;
    }
    let last = pixels.grids.last().map_or(0, |grid| (grid[0] * grid[1]) as u64);
    total += cost::elementwise(batch * last * features, 1); // the sum over the pixels
    total += cost::input(batch * features, bytes) + norm(batch, features);
    total += match kind.labels {
        Some(labels) => cost::linear(batch, features, labels as u64, true, bytes),
        // the channels first again
        None => Cost { activation_bytes: batch * last * features * bytes, ..Cost::default() },
    };
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost: total }])
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 6], "depths": [1, 2],
            "num_labels": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("convnext", class, config)
    }

    fn call(shape: [usize; 4]) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), pixel_values)].into(), ..Call::default() }
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let cfg = ConvNextConfig::from_spec(&spec).expect("a config");
        let pixels = Pixels::read(&cfg, call).expect("pixels");
        forward_cost(&cfg, Kind::of(&spec).expect("a class"), &pixels, spec.dtype).expect("a cost")[0].cost
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // 4 x 4 pixels of a channel: 2 x 2 patches of width 4, then 1 of width 6; one and two layers; 3 labels
        let stem = 2 * (4 * 4) * 4 + 4 * 4 + 7 * 4 * 4; // 16 outputs of 4 weights each, biases, norm
        let layer = |tokens: u64, width: u64| {
            2 * 49 * tokens * width + tokens * width + 7 * tokens * width // depthwise, bias, norm
                + 2 * tokens * width * 4 * width + tokens * 4 * width + tokens * 4 * width // up, bias, activation
                + 2 * tokens * width * 4 * width + tokens * width + tokens * width // down, bias, residual
        };
        let merge = 7 * 4 * 4 + 2 * 6 * 16 + 6;
        let head = 6 + 7 * 6 + 2 * 6 * 3 + 3; // sum, norm, labels
        let weights_of = |width: u64| 49 * width + width + 2 * width + 2 * (4 * width * width) + 5 * width;
        let weights = (16 + 4 + 8) + weights_of(4) + (8 + 4 * 4 * 6 + 6) + 2 * weights_of(6) + (12 + 6 * 3 + 3);
        let written = |tokens: u64, width: u64| tokens * (width + width + 4 * width + width);
        let activations = 16 + 2 * 16 + written(4, 4) + (16 + 6) + 2 * written(1, 6) + (6 + 6 + 3);
        let expected = Cost {
            flops: stem + layer(4, 4) + merge + 2 * layer(1, 6) + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        assert_eq!(cost_of("ConvNextForImageClassification", json!({}), &call([1, 1, 4, 4])), expected);
        // the second version: 4 FLOPs for each of 4 x 16 and 2 x 24 inner values
        let two = cost_of("ConvNextV2ForImageClassification", json!({}), &call([1, 1, 4, 4]));
        assert_eq!(two.flops, expected.flops + 4 * (4 * 16 + 2 * 24));
        assert_eq!(two.weight_bytes, expected.weight_bytes + 4 * 2 * (16 + 2 * 24));
    }

    #[test]
    fn cost_of_the_tiny_ones_is_the_published_one() {
        let tiny = json!({
            "num_channels": 3, "patch_size": 4, "num_stages": 4, "hidden_sizes": [96, 192, 384, 768],
            "depths": [3, 3, 9, 3], "num_labels": 1000,
        });
        let picture = call([1, 3, 224, 224]);
        let one = cost_of("ConvNextForImageClassification", tiny.clone(), &picture);
        // torchvision's documentation of convnext_tiny: 4.46 billion multiply-adds, without norms and GELU
        let ratio = one.flops as f64 / (2.0 * 4.456e9);
        assert!((1.0..1.02).contains(&ratio), "{} FLOP, {ratio} of the published count", one.flops);
        // and 28 589 128 parameters, of which the layer scales are in the weights before
        let scales = 3 * 96 + 3 * 192 + 9 * 384 + 3 * 768;
        assert_eq!(one.weight_bytes, 4 * (28_589_128 - scales));
        let two = cost_of("ConvNextV2ForImageClassification", tiny, &picture);
        assert_eq!(two.weight_bytes, 4 * 28_635_496);
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |changes: Value| {
            let spec = spec("ConvNextModel", changes);
            ConvNextConfig::from_spec(&spec).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (json!({"depths": [1]}), "config.json: `depths`: has 1 numbers for num_stages = 2"),
            (json!({"hidden_sizes": [4, 6, 8]}), "config.json: `hidden_sizes`: has 3 numbers"),
            (json!({"hidden_sizes": [4, 0]}), "config.json: `hidden_sizes`: 0 is not in"),
            (json!({"patch_size": [2]}), "config.json: `patch_size`: expected a number or [height, width]"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
        let class = Kind::of(&spec("ConvNextBackbone", json!({}))).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(class.starts_with("convnext: class `ConvNextBackbone` is not supported; supported: ConvNextModel"));
    }

    #[test]
    fn pictures_that_do_not_fit_are_refused() {
        let cfg = ConvNextConfig::from_spec(&spec("ConvNextModel", json!({}))).expect("a config");
        let message = |shape| Pixels::read(&cfg, &call(shape)).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(message([1, 1, 5, 4]), "");
        assert_eq!(message([1, 1, 8, 3]), "input `pixel_values`: 8 x 3 pixels are fewer than 4 x 4");
    }

    fn synthetic_model(spec: &ModelSpec) -> Result<ConvNextModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        ConvNextModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        for class in ["ConvNextForImageClassification", "ConvNextV2ForImageClassification"] {
            let mut spec = spec(class, json!({}));
            let call = call([2, 1, 9, 8]);
            let exact = synthetic_model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            for dtype in [DType::BF16, DType::F16] {
                spec.dtype = dtype;
                let logits = synthetic_model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
                let error = (logits - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                // each weight is off by at most 2^-9 of itself in bf16; logits are of order 1, a dozen layers deep
                assert!(error > 0.0 && error < 1e-1, "{class} {dtype:?}: {error}");
            }
        }
        Ok(())
    }
}
