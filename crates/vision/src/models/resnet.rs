//! ResNet: convolutions with their batch norms folded in, in residual blocks of two or three, channels last throughout.
//! Source: ResNet (arXiv:1512.03385). Mirrors `transformers.ResNetModel`, `ResNetForImageClassification` and, as the
//! backbone of detectors, `ResNetBackbone` and the ResNets of `timm`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{BatchNorm, Conv2d, Conv2dConfig, to_channels_first, to_channels_last};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::pooling::{Pool2dConfig, global_avg_pool_2d, max_pool_2d};
use serde::Deserialize;

use super::activation_dtype;

/// The classes that run.
pub const CLASSES: &[&str] = &["ResNetModel", "ResNetForImageClassification"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // integer counters of the batch norms
    AliasRule::drop(r"\.num_batches_tracked$", AliasScope::Always),
    // a base model from a checkpoint with a head
    AliasRule::drop(r"^classifier\.", AliasScope::Base),
    AliasRule::rename(r"^resnet\.", "", AliasScope::Base),
    // a class with a head from a checkpoint saved by the base model
    AliasRule::rename(r"^(embedder|encoder)\.", "resnet.$1.", AliasScope::Head),
];

/// What every batch norm adds to the variance.
const BATCH_NORM_EPS: f64 = 1e-5;

/// Of the width of a bottleneck's result, the part that its inner convolutions have.
const REDUCTION: usize = 4;

/// What a block is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerType {
    /// Two convolutions of 3 x 3.
    Basic,
    /// 1 x 1 to a quarter of the width, 3 x 3, 1 x 1 back.
    Bottleneck,
}

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ResNetConfig {
    /// Colour channels.
    pub num_channels: usize,
    /// Channels that the stem gives.
    pub embedding_size: usize,
    /// Channels that each stage gives.
    pub hidden_sizes: Vec<usize>,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// What a block is made of.
    pub layer_type: LayerType,
    /// Activation of the stem and behind each sum; inside a block it is always ReLU.
    pub hidden_act: Activation,
    /// The first stage halves the map too.
    pub downsample_in_first_stage: bool,
    /// A bottleneck that halves the map does so in its first convolution, as first published, not in the second.
    pub downsample_in_bottleneck: bool,
}

/// What `transformers.ResNetConfig` takes for absent fields: ResNet-50.
impl Default for ResNetConfig {
    fn default() -> Self {
        Self {
            num_channels: 3,
            embedding_size: 64,
            hidden_sizes: vec![256, 512, 1024, 2048],
            depths: vec![3, 4, 6, 3],
            layer_type: LayerType::Bottleneck,
            hidden_act: Activation::Relu,
            downsample_in_first_stage: false,
            downsample_in_bottleneck: false,
        }
    }
}

impl ResNetConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        cfg.check("")?;
        Ok(cfg)
    }

    /// Checks the sizes; `path` leads to this config in its file.
    pub(crate) fn check(&self, path: &str) -> Result<(), SessionError> {
        let named = |field: &str| format!("{path}{field}");
        let (sizes, depths) = (self.hidden_sizes.iter().copied(), self.depths.iter().copied());
        let fields = [("num_channels", self.num_channels), ("embedding_size", self.embedding_size)].into_iter();
        let fields = fields.chain(sizes.map(|size| ("hidden_sizes", size))).chain(depths.map(|n| ("depths", n)));
        let fields: Vec<(String, usize)> = fields.map(|(field, size)| (named(field), size)).collect();
        config::sizes(&fields.iter().map(|(field, size)| (field.as_str(), *size)).collect::<Vec<_>>())?;
        let invalid = |field: &str, reason: String| Err(config::invalid(&named(field), reason));
        if self.depths.is_empty() {
            return invalid("depths", "is empty".to_owned());
        }
        if self.hidden_sizes.len() != self.depths.len() {
            let (sizes, depths) = (self.hidden_sizes.len(), self.depths.len());
            return invalid("hidden_sizes", format!("has {sizes} numbers, depths has {depths}"));
        }
        match self.hidden_sizes.iter().find(|size| **size < REDUCTION) {
            Some(size) if self.layer_type == LayerType::Bottleneck => {
                invalid("hidden_sizes", format!("{size} is less than {REDUCTION}, by which a bottleneck divides it"))
            }
            _ => Ok(()),
        }
    }

    /// The stem and the blocks of every stage.
    pub(crate) fn plan(&self) -> Plan {
        self.plan_dilated(usize::MAX)
    }

    /// Likewise, with dilation in place of strides once pixels of the map are `output_stride` apart.
    pub(crate) fn plan_dilated(&self, output_stride: usize) -> Plan {
        let stem = ConvPlan { channels: [self.num_channels, self.embedding_size], kernel: 7, stride: 2, dilation: 1 };
        let (mut input, mut apart, mut dilation) = (self.embedding_size, 4, 1);
        let mut stages = Vec::new();
        for (stage, (&output, &depth)) in self.hidden_sizes.iter().zip(&self.depths).enumerate() {
            let mut stride = if stage > 0 || self.downsample_in_first_stage { 2 } else { 1 };
            let before = dilation;
            if apart >= output_stride {
                (dilation, stride) = (dilation * stride, 1);
            } else {
                apart *= stride;
            }
            let first = self.block([input, output], stride, [before, dilation]);
            let later = self.block([output, output], 1, [dilation, dilation]);
            stages.push(std::iter::once(first).chain(std::iter::repeat_n(later, depth - 1)).collect());
            input = output;
        }
        Plan { stem, stages, hidden_act: self.hidden_act }
    }

    /// `dilation` is that of the first and of the second convolution of 3 x 3.
    fn block(&self, [input, output]: [usize; 2], stride: usize, dilation: [usize; 2]) -> BlockPlan {
        let conv =
            |input, output, kernel, stride, dilation| ConvPlan { channels: [input, output], kernel, stride, dilation };
        let convolutions = match self.layer_type {
            LayerType::Basic => {
                vec![conv(input, output, 3, stride, dilation[0]), conv(output, output, 3, 1, dilation[1])]
            }
            LayerType::Bottleneck => {
                let inner = output / REDUCTION;
                let strides = if self.downsample_in_bottleneck { [stride, 1] } else { [1, stride] };
                vec![
                    conv(input, inner, 1, strides[0], 1),
                    conv(inner, inner, 3, strides[1], dilation[0]),
                    conv(inner, output, 1, 1, 1),
                ]
            }
        };
        let shortcut = (input != output || stride != 1).then(|| conv(input, output, 1, stride, 1));
        BlockPlan { shortcut, convolutions }
    }
}

/// A convolution with zeros on all sides, so that the map shrinks by its stride alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConvPlan {
    /// In, out.
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    dilation: usize,
}

impl ConvPlan {
    fn config(&self) -> Conv2dConfig {
        let padding = self.dilation * (self.kernel / 2);
        Conv2dConfig::new(self.kernel).stride(self.stride).padding(padding).dilation(self.dilation)
    }

    fn out_size(&self, size: [usize; 2]) -> [usize; 2] {
        size.map(|n| n.div_ceil(self.stride))
    }

    /// With the folded norm as bias, from a map of `size`.
    fn cost(&self, batch: usize, size: [usize; 2], bytes: u64) -> Cost {
        let [in_channels, out_channels] = self.channels.map(|n| n as u64);
        let conv = cost::Conv2d {
            batch: batch as u64,
            in_channels,
            out_channels,
            kernel: [self.kernel as u64; 2],
            groups: 1,
            output: self.out_size(size).map(|n| n as u64),
            bias: true,
        };
        conv.cost(bytes)
    }

    fn outputs(&self, batch: usize, size: [usize; 2]) -> u64 {
        let [height, width] = self.out_size(size);
        (batch * height * width * self.channels[1]) as u64
    }
}

/// A residual block.
#[derive(Debug, Clone)]
pub(crate) struct BlockPlan {
    /// Of the residual, where it has not the result's shape.
    shortcut: Option<ConvPlan>,
    convolutions: Vec<ConvPlan>,
}

/// Which convolutions a ResNet has: what is loaded, run and counted.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    stem: ConvPlan,
    stages: Vec<Vec<BlockPlan>>,
    hidden_act: Activation,
}

impl Plan {
    /// Without the stages behind the first `count`.
    pub(crate) fn truncated(mut self, count: usize) -> Self {
        self.stages.truncate(count);
        self
    }

    /// Channels of the stem's map and of each stage's.
    pub(crate) fn channels(&self) -> Vec<usize> {
        let last = |blocks: &Vec<BlockPlan>| blocks.last()?.convolutions.last().map(|conv| conv.channels[1]);
        std::iter::once(self.stem.channels[1]).chain(self.stages.iter().filter_map(last)).collect()
    }

    /// Colour channels of the picture.
    pub(crate) fn num_channels(&self) -> usize {
        self.stem.channels[0]
    }

    /// Size of the stem's map and of each stage's for a picture of `size`.
    pub(crate) fn sizes(&self, size: [usize; 2]) -> Vec<[usize; 2]> {
        let halved = |size: [usize; 2]| size.map(|n| n.div_ceil(2)); // the pooling
        let mut sizes = vec![halved(self.stem.out_size(size))];
        for blocks in &self.stages {
            let through = |size, block: &BlockPlan| block.convolutions.iter().fold(size, |size, c| c.out_size(size));
            let last = sizes[sizes.len() - 1];
            sizes.push(blocks.iter().fold(last, through));
        }
        sizes
    }

    /// FLOPs and bytes of a batch of pictures of `size` up to stage `last`, the pictures included.
    pub(crate) fn cost(&self, batch: usize, size: [usize; 2], last: usize, bytes: u64) -> Cost {
        let act = |outputs| cost::elementwise(outputs, u64::from(self.hidden_act != Activation::Identity));
        let one = |outputs| cost::elementwise(outputs, 1);
        let sizes = self.sizes(size);
        let pooled = (batch * sizes[0][0] * sizes[0][1] * self.stem.channels[1]) as u64;
        let mut sum = cost::input((batch * self.num_channels() * size[0] * size[1]) as u64, bytes)
            + self.stem.cost(batch, size, bytes)
            + act(self.stem.outputs(batch, size))
            // comparisons alone
            + Cost { activation_bytes: pooled * bytes, ..Cost::default() };
        for (blocks, &begin) in self.stages.iter().zip(&sizes).take(last) {
            let mut size = begin;
            for block in blocks {
                if let Some(shortcut) = &block.shortcut {
                    sum += shortcut.cost(batch, size, bytes);
                }
                for (i, conv) in block.convolutions.iter().enumerate() {
                    let outputs = conv.outputs(batch, size);
                    sum += conv.cost(batch, size, bytes);
                    sum += match i + 1 == block.convolutions.len() {
                        true => one(outputs) + act(outputs), // residual
                        false => one(outputs),               // ReLU
                    };
                    size = conv.out_size(size);
                }
            }
        }
        sum
    }
}

/// Whose names the tensors have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// Those of `transformers`: `encoder.stages.0.layers.0.layer.0.convolution`.
    Library,
    /// Those of `timm` and torchvision: `layer1.0.conv1`.
    Timm,
}

impl Naming {
    fn stem(self, plan: &ConvPlan, vb: &VarBuilder) -> Result<Conv2d> {
        match self {
            Self::Library => {
                let vb = vb.pp("embedder.embedder");
                convolution(plan, vb.pp("convolution"), vb.pp("normalization"))
            }
            Self::Timm => convolution(plan, vb.pp("conv1"), vb.pp("bn1")),
        }
    }

    fn block<'a>(self, stage: usize, block: usize, vb: &VarBuilder<'a>) -> VarBuilder<'a> {
        match self {
            Self::Library => vb.pp(format!("encoder.stages.{stage}.layers.{block}")),
            Self::Timm => vb.pp(format!("layer{}.{block}", stage + 1)),
        }
    }

    /// Convolution `i` of a block.
    fn convolution(self, plan: &ConvPlan, i: usize, vb: &VarBuilder) -> Result<Conv2d> {
        match self {
            Self::Library => {
                let vb = vb.pp(format!("layer.{i}"));
                convolution(plan, vb.pp("convolution"), vb.pp("normalization"))
            }
            Self::Timm => convolution(plan, vb.pp(format!("conv{}", i + 1)), vb.pp(format!("bn{}", i + 1))),
        }
    }

    fn shortcut(self, plan: &ConvPlan, vb: &VarBuilder) -> Result<Conv2d> {
        let (conv, norm) = match self {
            Self::Library => ("shortcut.convolution", "shortcut.normalization"),
            Self::Timm => ("downsample.0", "downsample.1"),
        };
        convolution(plan, vb.pp(conv), vb.pp(norm))
    }
}

/// A convolution with the batch norm behind it folded in.
fn convolution(plan: &ConvPlan, vb: VarBuilder, norm: VarBuilder) -> Result<Conv2d> {
    let [input, output] = plan.channels;
    let norm = BatchNorm::load(output, BATCH_NORM_EPS, norm)?;
    Conv2d::load_with_norm(input, output, plan.config(), false, &norm, vb)
}

/// activation(convolutions(x) + shortcut(x)).
struct Block {
    shortcut: Option<Conv2d>,
    /// All but the last, each with ReLU.
    inner: Vec<Conv2d>,
    last: Conv2d,
}

impl Block {
    fn load(plan: &BlockPlan, naming: Naming, vb: VarBuilder) -> Result<Self> {
        let load = |(i, plan)| naming.convolution(plan, i, &vb);
        let mut inner = plan.convolutions.iter().enumerate().map(load).collect::<Result<Vec<_>>>()?;
        let Some(last) = inner.pop() else { candle_core::bail!("a block without convolutions") };
        let shortcut = plan.shortcut.as_ref().map(|plan| naming.shortcut(plan, &vb)).transpose()?;
        Ok(Self { shortcut, inner, last })
    }

    /// (batch, height, width, channels in) -> (batch, height / stride, width / stride, channels out).
    fn forward(&self, x: &Tensor, hidden_act: Activation) -> Result<Tensor> {
        let residual = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)?,
            None => x.clone(),
        };
        let inner = self.inner.iter().try_fold(x.clone(), |x, conv| conv.forward_act(&x, Activation::Relu))?;
        self.last.forward_add(&inner, &residual, hidden_act)
    }
}

/// The stem and the stages.
pub(crate) struct ResNet {
    stem: Conv2d,
    stages: Vec<Vec<Block>>,
    hidden_act: Activation,
}

impl ResNet {
    pub(crate) fn load(plan: &Plan, naming: Naming, vb: VarBuilder) -> Result<Self> {
        let stage = |(stage, blocks): (usize, &Vec<BlockPlan>)| {
            let load = |(i, plan)| Block::load(plan, naming, naming.block(stage, i, &vb));
            blocks.iter().enumerate().map(load).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            stem: naming.stem(&plan.stem, &vb)?,
            stages: plan.stages.iter().enumerate().map(stage).collect::<Result<_>>()?,
            hidden_act: plan.hidden_act,
        })
    }

    /// The maps of `wanted`, in ascending order: 0 for the stem's, `n` for stage `n`'s.
    ///
    /// (batch, channels, height, width) -> (batch, map height, map width, map channels) each.
    pub(crate) fn forward(&self, pixel_values: &Tensor, wanted: &[usize]) -> Result<Vec<Tensor>> {
        let x = self.stem.forward_act(&to_channels_last(pixel_values)?, self.hidden_act)?;
        let mut x = max_pool_2d(&x, Pool2dConfig::new(3, 2).padding(1))?;
        let mut maps = Vec::with_capacity(wanted.len());
        for index in 0..=wanted.last().copied().unwrap_or(0) {
            if let Some(blocks) = index.checked_sub(1).and_then(|stage| self.stages.get(stage)) {
                x = blocks.iter().try_fold(x, |x, block| block.forward(&x, self.hidden_act))?;
            }
            if wanted.contains(&index) {
                maps.push(x.clone());
            }
        }
        Ok(maps)
    }
}

/// What follows the last stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadKind {
    /// Of `ResNetModel`.
    Pooler,
    /// Of `ResNetForImageClassification`, with its number of labels.
    Classifier { labels: usize },
}

impl HeadKind {
    pub(crate) fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "ResNetModel" => Ok(Self::Pooler),
            "ResNetForImageClassification" => Ok(Self::Classifier { labels: label_count(&spec.config)? }),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }
}

/// A ResNet with the head of its class.
pub struct ResNetModel {
    plan: Plan,
    resnet: ResNet,
    classifier: Option<Linear>,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl ResNetModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, plan) = (HeadKind::of(spec)?, ResNetConfig::from_spec(spec)?.plan());
        let (root, classifier) = match kind {
            HeadKind::Pooler => (vb, None),
            HeadKind::Classifier { labels } => {
                let width = plan.channels().last().copied().unwrap_or_default();
                (vb.pp("resnet"), Some(Linear::load(width, labels, true, vb.pp("classifier.1"))?))
            }
        };
        Ok(Self {
            resnet: ResNet::load(&plan, Naming::Library, root)?,
            classifier,
            plan,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn forward(&self, pixel_values: &Tensor) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let pixel_values = pixel_values.to_device(&self.device)?.to_dtype(dtype)?;
        let maps = self.resnet.forward(&pixel_values, &[self.plan.stages.len()])?;
        let [last] = maps.as_slice() else { candle_core::bail!("one map was wanted, there are {}", maps.len()) };
        let pooled = global_avg_pool_2d(last)?; // (batch, channels)
        Ok(match &self.classifier {
            Some(classifier) => Tensors::from([("logits".into(), classifier.forward(&pooled)?)]),
            None => Tensors::from([
                ("last_hidden_state".into(), to_channels_first(last)?),
                ("pooler_output".into(), pooled.unsqueeze(2)?.unsqueeze(3)?),
            ]),
        })
    }
}

/// The pictures of a call, checked.
pub(crate) fn pixel_values<'a>(plan: &Plan, call: &'a Call) -> Result<&'a Tensor, SessionError> {
    Inputs::forward(call, &["pixel_values"], &[])?.pictures("pixel_values", plan.num_channels())
}

impl Session for ResNetModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(pixel_values(&self.plan, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.plan, self.kind, pixel_values(&self.plan, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass.
pub(crate) fn forward_cost(
    plan: &Plan,
    kind: HeadKind,
    pixel_values: &Tensor,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let (batch, _, height, width) = pixel_values.dims4()?;
    let stages = plan.stages.len();
    let (size, channels) = (plan.sizes([height, width])[stages], plan.channels()[stages]);
    let pooled = (batch * channels) as u64;
    // the mean: an addition for each pixel and channel
    let pooling = cost::elementwise(pooled * (size[0] * size[1]) as u64, 1)
        + Cost { activation_bytes: pooled * bytes, ..Cost::default() };
    let head = match kind {
        HeadKind::Pooler => Cost::default(),
        HeadKind::Classifier { labels } => cost::linear(batch as u64, channels as u64, labels as u64, true, bytes),
    };
    let cost = plan.cost(batch, [height, width], stages, bytes) + pooling + head;
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use roofbench_nn::cost::record;
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "num_channels": 1, "embedding_size": 2, "hidden_sizes": [4, 8], "depths": [1, 2], "num_labels": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("resnet", class, config)
    }

    fn call(shape: [usize; 4]) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), pixel_values)].into(), ..Call::default() }
    }

    fn model(spec: &ModelSpec) -> Result<ResNetModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        ResNetModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let plan = ResNetConfig::from_spec(&spec).expect("a config").plan();
        let pixels = pixel_values(&plan, call).expect("pixels");
        forward_cost(&plan, HeadKind::of(&spec).expect("a class"), pixels, spec.dtype).expect("a cost")[0].cost
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // one basic block, 1 -> 2 -> 2 channels on 5 x 7 pixels, which the stem makes 3 x 4 and the pooling 2 x 2
        let changes = json!({"layer_type": "basic", "hidden_sizes": [2], "depths": [1]});
        let stem = 12 * 2 * (2 * 49 + 1 + 1); // window, bias, activation
        let first = 4 * 2 * (2 * 18 + 1 + 1);
        let last = 4 * 2 * (2 * 18 + 1 + 1 + 1); // residual
        let head = 4 * 2 + 2 * 2 * 3 + 3; // mean, classifier
        let weights = 2 * 49 + 2 + 2 * (2 * 18 + 2) + 2 * 3 + 3;
        let activations = 35 + 12 * 2 + 4 * 2 + 2 * (4 * 2) + 2 + 3;
        let expected = Cost {
            flops: stem + first + last + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        assert_eq!(cost_of("ResNetForImageClassification", changes, &call([1, 1, 5, 7])), expected);
    }

    #[test]
    fn cost_of_resnet_50_and_18_is_the_published_one() {
        let large = json!({"num_channels": 3, "embedding_size": 64, "num_labels": 1000, "hidden_sizes":
            [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]});
        let small = json!({"num_channels": 3, "embedding_size": 64, "num_labels": 1000, "hidden_sizes":
            [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"});
        // torchvision's documentation, in multiply-adds: without norms, ReLU and sums, about 1 %
        for (changes, published, parameters, norms) in
            [(large, 4.089e9, 25_557_032, 26_560), (small, 1.814e9, 11_689_512, 4_800)]
        {
            let cost = cost_of("ResNetForImageClassification", changes, &call([1, 3, 224, 224]));
            let ratio = cost.flops as f64 / (2.0 * published);
            assert!((1.0..1.015).contains(&ratio), "{ratio}");
            // of each norm's weight and bias the folded bias is left
            assert_eq!(cost.weight_bytes, 4 * (parameters - norms));
        }
    }

    #[test]
    fn flops_are_those_that_ran() -> Result<(), SessionError> {
        let changes = [
            json!({}),
            json!({"layer_type": "basic", "hidden_act": "gelu"}),
            json!({"downsample_in_first_stage": true, "downsample_in_bottleneck": true, "hidden_act": "linear"}),
        ];
        for (changes, class) in changes.iter().flat_map(|changes| CLASSES.iter().map(move |class| (changes, class))) {
            let call = call([2, 1, 37, 20]);
            let mut model = model(&spec(class, changes.clone()))?;
            let (outputs, recorded) = record(|| model.call(&call, &mut Unobserved));
            outputs?;
            assert_eq!(recorded.flops, model.cost(&call)?[0].cost.flops, "{class} {changes}");
        }
        Ok(())
    }

    #[test]
    fn dilation_takes_the_place_of_strides() {
        let dilated = |output_stride| {
            let plan = ResNetConfig::default().plan_dilated(output_stride);
            let of = |block: &BlockPlan| block.convolutions[1].dilation;
            let dilations: Vec<_> = plan.stages.iter().map(|blocks| [of(&blocks[0]), of(&blocks[1])]).collect();
            (plan.sizes([224, 224])[4], dilations)
        };
        assert_eq!(dilated(usize::MAX), ([7, 7], vec![[1, 1]; 4]));
        assert_eq!(dilated(16), ([14, 14], vec![[1, 1], [1, 1], [1, 1], [1, 2]]));
        assert_eq!(dilated(8), ([28, 28], vec![[1, 1], [1, 1], [1, 2], [2, 4]]));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |changes: Value| {
            ResNetConfig::from_spec(&spec("ResNetModel", changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (json!({"embedding_size": 0}), "config.json: `embedding_size`: 0 is not in"),
            (json!({"hidden_sizes": [4]}), "config.json: `hidden_sizes`: has 1 numbers, depths has 2"),
            (json!({"hidden_sizes": [], "depths": []}), "config.json: `depths`: is empty"),
            (json!({"hidden_sizes": [4, 3]}), "config.json: `hidden_sizes`: 3 is less than 4"),
            (json!({"layer_type": "wide"}), "config.json: `layer_type`: "),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
        let class = HeadKind::of(&spec("ResNetBackbone", json!({}))).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(class.starts_with("resnet: class `ResNetBackbone` is not supported"), "{class}");
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        let mut spec = spec("ResNetForImageClassification", json!({}));
        let call = call([2, 1, 32, 32]);
        let exact = model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
        for dtype in [DType::BF16, DType::F16] {
            spec.dtype = dtype;
            let logits = model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            let error = (logits - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // each weight is off by at most 2^-9 of itself in bf16; logits are of order 1, ten layers deep
            assert!(error > 0.0 && error < 5e-2, "{dtype:?}: {error}");
        }
        Ok(())
    }
}
