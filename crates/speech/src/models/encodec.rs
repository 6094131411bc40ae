//! EnCodec: convolutions, an LSTM and residual codebooks make codes of sound, and their mirror image sound of codes.
//! Source: EnCodec (arXiv:2210.13438). Mirrors `transformers.EncodecModel`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, in_range, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{self, Conv1d, Conv1dConfig, ConvTranspose1d, ConvTranspose1dConfig, Edge};
use roofbench_nn::embedding::Embedding;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::lstm::{Lstm, Order};
use roofbench_nn::norm::GroupNorm;
use serde::Deserialize;

use super::features::TORCH_EPS;
use super::{activation_dtype, weight_normed};

/// The classes that run.
pub const CLASSES: &[&str] = &["EncodecModel"];

/// Names in published checkpoints: weight norm as torch named it until 2.0.
pub const ALIASES: &[AliasRule] = &[
    AliasRule::rename(r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0", AliasScope::Always),
    AliasRule::rename(r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1", AliasScope::Always),
];

/// The part of `config.json` that shapes the computation; field names are the file's own, and what it leaves out is as
/// `transformers.EncodecConfig` has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct EncodecConfig {
    /// Thousands of bits a second that codes may take, ascending.
    pub target_bandwidths: Vec<f64>,
    /// Samples a second.
    pub sampling_rate: usize,
    /// 1 or 2.
    pub audio_channels: usize,
    /// Each piece of sound is divided by its loudness.
    pub normalize: bool,
    /// Seconds of a piece; the whole sound is one where absent.
    pub chunk_length_s: Option<f64>,
    /// The part of a piece that the next one has too.
    pub overlap: Option<f64>,
    /// Width of a frame.
    pub hidden_size: usize,
    /// Channels of the first convolution; each stage doubles them.
    pub num_filters: usize,
    /// Residual blocks of a stage.
    pub num_residual_layers: usize,
    /// How much each stage of the decoder lengthens the sequence; the encoder has them backwards.
    pub upsampling_ratios: Vec<usize>,
    /// What is normalised.
    pub norm_type: NormType,
    /// Taps of the first convolution.
    pub kernel_size: usize,
    /// Taps of the last one.
    pub last_kernel_size: usize,
    /// Taps in a residual block.
    pub residual_kernel_size: usize,
    /// By how much the dilation grows from a block to the next.
    pub dilation_growth_rate: usize,
    /// A convolution sees nothing that comes later.
    pub use_causal_conv: bool,
    /// What stands beyond the ends of a sequence.
    pub pad_mode: Edge,
    /// How much narrower a residual block is inside.
    pub compress: usize,
    /// Layers of each LSTM.
    pub num_lstm_layers: usize,
    /// Of what a transposed convolution makes too much, the part that is cut off behind; the rest is in front.
    pub trim_right_ratio: f64,
    /// Codes of a codebook: a power of two.
    pub codebook_size: usize,
    /// Width of a code; `hidden_size` where absent, and always equal to it.
    pub codebook_dim: Option<usize>,
    /// A residual goes through a convolution.
    pub use_conv_shortcut: bool,
}

/// What is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormType {
    /// The weights, which are folded when they are loaded.
    WeightNorm,
    /// What a convolution gives, over all channels and steps.
    TimeGroupNorm,
}

impl Default for EncodecConfig {
    fn default() -> Self {
        Self {
            target_bandwidths: vec![1.5, 3.0, 6.0, 12.0, 24.0],
            sampling_rate: 24_000,
            audio_channels: 1,
            normalize: false,
            chunk_length_s: None,
            overlap: None,
            hidden_size: 128,
            num_filters: 32,
            num_residual_layers: 1,
            upsampling_ratios: vec![8, 5, 4, 2],
            norm_type: NormType::WeightNorm,
            kernel_size: 7,
            last_kernel_size: 7,
            residual_kernel_size: 3,
            dilation_growth_rate: 2,
            use_causal_conv: true,
            pad_mode: Edge::Reflect,
            compress: 2,
            num_lstm_layers: 2,
            trim_right_ratio: 1.0,
            codebook_size: 1024,
            codebook_dim: None,
            use_conv_shortcut: true,
        }
    }
}

/// How far the channels may grow: as far as [`config::sizes`] lets any size.
const MOST_STAGES: usize = 16;

impl EncodecConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        config::sizes(&[
            ("sampling_rate", cfg.sampling_rate),
            ("audio_channels", cfg.audio_channels),
            ("hidden_size", cfg.hidden_size),
            ("num_filters", cfg.num_filters),
            ("num_residual_layers", cfg.num_residual_layers),
            ("upsampling_ratios", cfg.upsampling_ratios.len()),
            ("kernel_size", cfg.kernel_size),
            ("last_kernel_size", cfg.last_kernel_size),
            ("residual_kernel_size", cfg.residual_kernel_size),
            ("dilation_growth_rate", cfg.dilation_growth_rate),
            ("compress", cfg.compress),
            ("num_lstm_layers", cfg.num_lstm_layers),
            ("codebook_size", cfg.codebook_size),
        ])?;
        for ratio in &cfg.upsampling_ratios {
            config::sizes(&[("upsampling_ratios", *ratio)])?;
        }
        if cfg.upsampling_ratios.len() > MOST_STAGES {
            let reason = format!("has {} stages, at most {MOST_STAGES} are supported", cfg.upsampling_ratios.len());
            return Err(config::invalid("upsampling_ratios", reason));
        }
        let reach = cfg.upsampling_ratios.iter().try_fold(1usize, |hop, ratio| hop.checked_mul(*ratio));
        config::sizes(&[("upsampling_ratios", reach.unwrap_or(usize::MAX))])?;
        config::sizes(&[("num_filters", cfg.num_filters << cfg.upsampling_ratios.len())])?;
        let dilation = u32::try_from(cfg.num_residual_layers - 1)
            .ok()
            .and_then(|blocks| cfg.dilation_growth_rate.checked_pow(blocks));
        config::sizes(&[("dilation_growth_rate", dilation.unwrap_or(usize::MAX))])?;
        config::sizes(&[("compress", cfg.num_filters / cfg.compress)])?;
        if cfg.audio_channels > 2 {
            return Err(config::invalid("audio_channels", format!("{} is neither 1 nor 2", cfg.audio_channels)));
        }
        if !cfg.codebook_size.is_power_of_two() || cfg.codebook_size < 2 {
            return Err(config::invalid("codebook_size", format!("{} is no power of two", cfg.codebook_size)));
        }
        if cfg.codebook_dim.is_some_and(|dim| dim != cfg.hidden_size) {
            let reason = format!("is not hidden_size, {}", cfg.hidden_size);
            return Err(config::invalid("codebook_dim", reason));
        }
        if cfg.target_bandwidths.is_empty() || cfg.target_bandwidths.iter().any(|width| !width.is_finite()) {
            return Err(config::invalid("target_bandwidths", "are to be numbers, at least one"));
        }
        config::sizes(&[("target_bandwidths", cfg.quantizers())])?;
        if !(0.0..=1.0).contains(&cfg.trim_right_ratio) || (!cfg.use_causal_conv && cfg.trim_right_ratio != 1.0) {
            let reason = format!("{} is not in 0..=1, and 1 where use_causal_conv is false", cfg.trim_right_ratio);
            return Err(config::invalid("trim_right_ratio", reason));
        }
        if let Some(seconds) = cfg.chunk_length_s {
            config::not_negative(&[("chunk_length_s", seconds)])?;
            let overlap = cfg.overlap.ok_or_else(|| config::invalid("overlap", "is missing beside chunk_length_s"))?;
            config::not_negative(&[("overlap", overlap)])?;
            if cfg.chunk() == 0 {
                return Err(config::invalid("chunk_length_s", format!("{seconds} is shorter than a sample")));
            }
        }
        Ok(cfg)
    }

    /// Samples of a frame.
    fn hop(&self) -> usize {
        self.upsampling_ratios.iter().product()
    }

    /// Frames of so many samples.
    fn frames(&self, samples: usize) -> usize {
        self.upsampling_ratios.iter().rev().fold(samples, |length, ratio| length.div_ceil(*ratio))
    }

    pub(super) fn frame_rate(&self) -> usize {
        self.sampling_rate.div_ceil(self.hop())
    }

    /// Codebooks.
    pub(super) fn quantizers(&self) -> usize {
        let bits = (self.frame_rate() * self.codebook_size.ilog2() as usize) as f64;
        self.target_bandwidths.last().map_or(0, |width| (1000.0 * width / bits).floor() as usize)
    }

    /// Codebooks that `bandwidth` has room for.
    fn quantizers_at(&self, bandwidth: f64) -> usize {
        let bits = f64::from(self.codebook_size.ilog2()) * self.frame_rate() as f64;
        match bandwidth > 0.0 {
            true => ((bandwidth * 1000.0 / bits).floor() as usize).clamp(1, self.quantizers()),
            false => self.quantizers(),
        }
    }

    /// Codebooks that the call asks for.
    pub(super) fn quantizers_of(&self, call: &Call) -> Result<usize, SessionError> {
        let widths = &self.target_bandwidths;
        let width = match call.arguments.get("bandwidth") {
            None | Some(serde_json::Value::Null) => widths.first().copied(),
            Some(value) => value.as_f64().filter(|width| widths.contains(width)),
        };
        let width = width.ok_or_else(|| {
            let list = widths.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            SessionError::input("bandwidth", format!("is none of the checkpoint's: {list}"))
        })?;
        Ok(self.quantizers_at(width))
    }

    /// Samples of a piece; 0 where the sound is one.
    fn chunk(&self) -> usize {
        self.chunk_length_s.map_or(0, |seconds| (seconds * self.sampling_rate as f64) as usize)
    }

    /// Samples from a piece to the next.
    fn stride(&self) -> usize {
        (((1.0 - self.overlap.unwrap_or(0.0)) * self.chunk() as f64) as usize).max(1)
    }

    /// Where the pieces of `samples` begin and how long they are.
    fn pieces(&self, samples: usize) -> Vec<(usize, usize)> {
        match self.chunk() {
            0 => vec![(0, samples)],
            chunk => {
                let begins = (0..samples).step_by(self.stride());
                begins.map(|begin| (begin, chunk.min(samples - begin))).collect()
            }
        }
    }

    /// Channels of the widest layer.
    fn widest(&self) -> usize {
        self.num_filters << self.upsampling_ratios.len()
    }

    fn dilation(&self, block: usize) -> usize {
        self.dilation_growth_rate.pow(block as u32)
    }

    /// Steps cut off a transposed convolution of `ratio` (in front, behind).
    fn trim(&self, ratio: usize) -> (usize, usize) {
        let behind = match self.use_causal_conv {
            true => (ratio as f64 * self.trim_right_ratio).ceil() as usize,
            false => ratio / 2,
        };
        (ratio - behind, behind)
    }

    fn norm(&self, channels: usize, vb: &VarBuilder) -> Result<Option<GroupNorm>> {
        match self.norm_type {
            NormType::WeightNorm => Ok(None),
            NormType::TimeGroupNorm => GroupNorm::load(1, channels, TORCH_EPS, vb.pp("norm")).map(Some),
        }
    }

    /// The weight of a convolution, its norm folded into it; `shape` is torch's.
    fn weight(&self, shape: (usize, usize, usize), vb: &VarBuilder) -> Result<Tensor> {
        match self.norm_type {
            NormType::WeightNorm => weight_normed(shape, 0, vb.clone()),
            NormType::TimeGroupNorm => vb.get(shape, "weight"),
        }
    }
}

/// Sizes of a convolution.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    input: usize,
    output: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
}

impl Sizes {
    fn new(input: usize, output: usize, kernel: usize) -> Self {
        Self { input, output, kernel, stride: 1, dilation: 1 }
    }

    /// Steps that the window reaches over the ends of a sequence, both together.
    fn reach(&self) -> usize {
        ((self.kernel - 1) * self.dilation + 1).saturating_sub(self.stride)
    }
}

/// A convolution that pads so that a step comes of every `stride`.
struct Conv {
    conv: Conv1d,
    norm: Option<GroupNorm>,
    edge: Edge,
    stride: usize,
    /// Steps padded in front and behind, the latter without what fills the last stride.
    padding: (usize, usize),
}

impl Conv {
    /// Reads `conv` and, where there is one, `norm`.
    fn load(cfg: &EncodecConfig, sizes: Sizes, vb: VarBuilder) -> Result<Self> {
        let Sizes { input, output, kernel, stride, dilation } = sizes;
        let inner = vb.pp("conv");
        let config = Conv1dConfig { stride, dilation, ..Conv1dConfig::new(kernel) };
        let weight = cfg.weight((output, input, kernel), &inner)?;
        let behind = if cfg.use_causal_conv { 0 } else { sizes.reach() / 2 };
        Ok(Self {
            conv: Conv1d::new(&weight, Some(&inner.get(output, "bias")?), config)?,
            norm: cfg.norm(output, &vb)?,
            edge: cfg.pad_mode,
            stride,
            padding: (sizes.reach() - behind, behind),
        })
    }

    /// after(conv(before(x))); (batch, length, in) -> (batch, length / stride, out)
    fn forward(&self, x: &Tensor, before: Activation, after: Activation) -> Result<Tensor> {
        let (front, behind) = self.padding;
        let behind = behind + x.dim(1)?.next_multiple_of(self.stride) - x.dim(1)?;
        let x = match front + behind {
            0 => before.forward(x)?,
            _ => conv::pad(x, self.edge, (front, behind), before)?,
        };
        match &self.norm {
            Some(norm) => norm.forward_act(&self.conv.forward(&x)?, after),
            None => self.conv.forward_act(&x, after),
        }
    }

    /// after(conv(x) + residual) of a convolution that sees one step.
    fn forward_add(&self, x: &Tensor, residual: &Tensor, after: Activation) -> Result<Tensor> {
        let Some(norm) = &self.norm else { return self.conv.forward_add(x, residual, after) };
        roofbench_nn::cost::elementwise(residual.elem_count(), 1);
        after.forward(&(norm.forward(&self.conv.forward(x)?)? + residual)?)
    }
}

/// A transposed convolution that makes `stride` steps of each.
struct Transposed {
    conv: ConvTranspose1d,
    norm: Option<GroupNorm>,
    /// Steps cut off in front.
    front: usize,
    stride: usize,
}

impl Transposed {
    fn load(cfg: &EncodecConfig, input: usize, ratio: usize, vb: VarBuilder) -> Result<Self> {
        let (output, inner) = (input / 2, vb.pp("conv"));
        let weight = cfg.weight((input, output, 2 * ratio), &inner)?;
        let config = ConvTranspose1dConfig::new(2 * ratio, ratio);
        Ok(Self {
            conv: ConvTranspose1d::new(&weight, Some(&inner.get(output, "bias")?), config)?,
            norm: cfg.norm(output, &vb)?,
            front: cfg.trim(ratio).0,
            stride: ratio,
        })
    }

    /// (batch, length, in) -> (batch, length · stride, out)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let length = x.dim(1)? * self.stride;
        let y = self.conv.forward(x)?;
        let y = match &self.norm {
            Some(norm) => norm.forward(&y)?,
            None => y,
        };
        y.narrow(1, self.front, length)?.contiguous()
    }
}

/// Two convolutions beside a third, or beside nothing.
struct Block {
    wide: Conv,
    narrow: Conv,
    shortcut: Option<Conv>,
}

impl Block {
    fn load(cfg: &EncodecConfig, width: usize, dilation: usize, vb: VarBuilder) -> Result<Self> {
        let inner = width / cfg.compress;
        let wide = Sizes { dilation, ..Sizes::new(width, inner, cfg.residual_kernel_size) };
        let shortcut = || Conv::load(cfg, Sizes::new(width, width, 1), vb.pp("shortcut"));
        Ok(Self {
            wide: Conv::load(cfg, wide, vb.pp("block.1"))?,
            narrow: Conv::load(cfg, Sizes::new(inner, width, 1), vb.pp("block.3"))?,
            shortcut: if cfg.use_conv_shortcut { Some(shortcut()?) } else { None },
        })
    }

    /// `x` and the result are (batch, length, width).
    fn forward(&self, x: &Tensor, after: Activation) -> Result<Tensor> {
        let inner = self.wide.forward(x, Activation::Elu, Activation::Elu)?;
        match &self.shortcut {
            Some(conv) => {
                let residual = conv.forward(x, Activation::Identity, Activation::Identity)?;
                self.narrow.forward_add(&inner, &residual, after)
            }
            None => self.narrow.forward_add(&inner, x, after),
        }
    }
}

/// Blocks of one width, the last one activated for what follows them.
struct Blocks(Vec<Block>);

impl Blocks {
    /// `vb` is that of the stack, `first` the place of the first block in it.
    fn load(cfg: &EncodecConfig, width: usize, first: usize, vb: &VarBuilder) -> Result<Self> {
        let block = |i: usize| Block::load(cfg, width, cfg.dilation(i), vb.pp(first + i));
        (0..cfg.num_residual_layers).map(block).collect::<Result<_>>().map(Self)
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for (i, block) in self.0.iter().enumerate() {
            let is_last = i + 1 == self.0.len();
            x = block.forward(&x, if is_last { Activation::Elu } else { Activation::Identity })?;
        }
        Ok(x)
    }
}

/// An LSTM beside nothing: `x` and the result are (batch, length, width).
fn recur(lstm: &Lstm, x: &Tensor) -> Result<Tensor> {
    let (y, _) = lstm.forward(x, Order::BatchFirst, None)?;
    roofbench_nn::cost::elementwise(x.elem_count(), 1);
    y + x
}

struct Encoder {
    first: Conv,
    stages: Vec<(Blocks, Conv)>,
    lstm: Lstm,
    last: Conv,
}

impl Encoder {
    fn load(cfg: &EncodecConfig, vb: VarBuilder) -> Result<Self> {
        let first = Conv::load(cfg, Sizes::new(cfg.audio_channels, cfg.num_filters, cfg.kernel_size), vb.pp(0))?;
        let (mut at, mut width, mut stages) = (1, cfg.num_filters, Vec::new());
        for &stride in cfg.upsampling_ratios.iter().rev() {
            let down = Sizes { stride, ..Sizes::new(width, 2 * width, 2 * stride) };
            let behind = at + cfg.num_residual_layers + 1; // an activation stands between
            stages.push((Blocks::load(cfg, width, at, &vb)?, Conv::load(cfg, down, vb.pp(behind))?));
            (at, width) = (behind + 1, 2 * width);
        }
        Ok(Self {
            first,
            stages,
            lstm: Lstm::load(width, width, cfg.num_lstm_layers, vb.pp(at).pp("lstm"))?,
            last: Conv::load(cfg, Sizes::new(width, cfg.hidden_size, cfg.last_kernel_size), vb.pp(at + 2))?,
        })
    }

    /// (batch, samples, channels) -> (batch, frames, hidden)
    fn forward(&self, sounds: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(sounds, Activation::Identity, Activation::Identity)?;
        for (blocks, down) in &self.stages {
            x = down.forward(&blocks.forward(x)?, Activation::Identity, Activation::Identity)?;
        }
        self.last.forward(&recur(&self.lstm, &x)?, Activation::Elu, Activation::Identity)
    }
}

struct Decoder {
    first: Conv,
    lstm: Lstm,
    stages: Vec<(Transposed, Blocks)>,
    last: Conv,
}

impl Decoder {
    fn load(cfg: &EncodecConfig, vb: VarBuilder) -> Result<Self> {
        let mut width = cfg.widest();
        let first = Conv::load(cfg, Sizes::new(cfg.hidden_size, width, cfg.kernel_size), vb.pp(0))?;
        let lstm = Lstm::load(width, width, cfg.num_lstm_layers, vb.pp(1).pp("lstm"))?;
        let (mut at, mut stages) = (3, Vec::new()); // behind an activation
        for &ratio in &cfg.upsampling_ratios {
            let up = Transposed::load(cfg, width, ratio, vb.pp(at))?;
            width /= 2;
            stages.push((up, Blocks::load(cfg, width, at + 1, &vb)?));
            at += cfg.num_residual_layers + 2;
        }
        let last = Conv::load(cfg, Sizes::new(width, cfg.audio_channels, cfg.last_kernel_size), vb.pp(at))?;
        Ok(Self { first, lstm, stages, last })
    }

    /// (batch, frames, hidden) -> (batch, samples, channels)
    fn forward(&self, frames: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(frames, Activation::Identity, Activation::Identity)?;
        let mut x = Activation::Elu.forward(&recur(&self.lstm, &x)?)?;
        for (up, blocks) in &self.stages {
            x = blocks.forward(up.forward(&x)?)?;
        }
        self.last.forward(&x, Activation::Identity, Activation::Identity)
    }
}

/// The vectors that codes stand for.
struct Codebook {
    embed: Embedding,
    /// Twice the vectors, and the negated squares of their lengths as biases: the nearest one scores highest, since
    /// |x - e|² = |x|² - 2 x·e + |e|².
    scores: Linear,
}

impl Codebook {
    fn load(cfg: &EncodecConfig, vb: VarBuilder) -> Result<Self> {
        let (size, dim) = (cfg.codebook_size, cfg.hidden_size);
        let embed = vb.get((size, dim), "embed")?;
        // what training left beside them
        for (name, shape) in [("inited", &[1][..]), ("cluster_size", &[size]), ("embed_avg", &[size, dim])] {
            if vb.contains_tensor(name) {
                vb.get(shape, name)?;
            }
        }
        let squares = embed.to_dtype(DType::F32)?.sqr()?.sum(1)?.neg()?.to_dtype(embed.dtype())?;
        Ok(Self { embed: Embedding::new(&embed)?, scores: Linear::new(&(&embed * 2.0)?, Some(&squares))? })
    }

    /// The codes of rows (rows, dim).
    fn nearest(&self, rows: &Tensor) -> Result<Vec<u32>> {
        let scores = self.scores.forward(rows)?.to_dtype(DType::F32)?;
        let width = scores.dim(1)?;
        Ok(scores.flatten_all()?.to_vec1::<f32>()?.chunks_exact(width).map(largest).collect())
    }
}

/// The place of the first of the largest values.
fn largest(values: &[f32]) -> u32 {
    let best = (1..values.len()).fold(0, |best, at| if values[at] > values[best] { at } else { best });
    best as u32
}

/// Sounds in pieces of one length, with the loudness that each was divided by.
struct Pieces {
    /// (pieces · batch, samples, channels), a piece of every item after the other.
    values: Tensor,
    /// Per row of them; none where nothing is divided.
    scales: Vec<f32>,
}

/// Codes of sounds, piece after piece.
struct Codes {
    /// Per piece (quantizers · batch · frames) as nested: an item's quantizers are side by side.
    pieces: Vec<Piece>,
    batch: usize,
    quantizers: usize,
}

/// The codes of one piece of every item.
struct Piece {
    /// (batch, quantizers, frames)
    codes: Vec<u32>,
    frames: usize,
    /// Per item; none where nothing was divided.
    scales: Vec<f32>,
}

/// `EncodecModel`.
pub struct EncodecModel {
    cfg: EncodecConfig,
    encoder: Encoder,
    decoder: Decoder,
    codebooks: Vec<Codebook>,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl EncodecModel {
    /// Loads the model of `spec`.
    ///
    /// # Errors
    /// As for [`EncodecConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = EncodecConfig::from_spec(spec)?;
        let codebook = |i: usize| Codebook::load(&cfg, vb.pp(format!("quantizer.layers.{i}.codebook")));
        Ok(Self {
            encoder: Encoder::load(&cfg, vb.pp("encoder.layers"))?,
            decoder: Decoder::load(&cfg, vb.pp("decoder.layers"))?,
            codebooks: (0..cfg.quantizers()).map(codebook).collect::<Result<_>>()?,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    fn tensor(&self, values: Vec<f32>, shape: (usize, usize, usize)) -> Result<Tensor> {
        Tensor::from_vec(values, shape, &self.device)?.to_dtype(activation_dtype(self.dtype, &self.device))
    }

    /// The pieces at `places` (begin, length), all of one length, masked and divided by their loudness.
    fn cut(&self, sounds: &Sounds, places: &[(usize, usize)]) -> Result<Pieces> {
        let (channels, length) = (sounds.channels, places.first().map_or(0, |place| place.1));
        let rows = places.len() * sounds.batch;
        let (mut values, mut scales) = (Vec::with_capacity(rows * length * channels), Vec::new());
        for (begin, _) in places {
            for item in 0..sounds.batch {
                let from = values.len();
                for at in *begin..begin + length {
                    values.extend((0..channels).map(|channel| sounds.sample(item, channel, at)));
                }
                if self.cfg.normalize {
                    let scale = loudness(&values[from..], channels);
                    values[from..].iter_mut().for_each(|x| *x /= scale);
                    scales.push(scale);
                }
            }
        }
        Ok(Pieces { values: self.tensor(values, (rows, length, channels))?, scales })
    }

    /// The codes of `sounds` in so many codebooks.
    fn encode(&self, sounds: &Sounds, quantizers: usize) -> Result<Codes> {
        let (batch, places) = (sounds.batch, self.cfg.pieces(sounds.samples));
        let mut pieces = Vec::with_capacity(places.len());
        // pieces of one length together
        for places in places.chunk_by(|one, other| one.1 == other.1) {
            let Pieces { values, scales } = self.cut(sounds, places)?;
            let mut residual = self.encoder.forward(&values)?.flatten_to(1)?; // (rows · frames, hidden)
            let frames = residual.dim(0)? / (places.len() * batch);
            let mut found = Vec::with_capacity(quantizers);
            for (at, codebook) in self.codebooks[..quantizers].iter().enumerate() {
                let codes = codebook.nearest(&residual)?;
                if at + 1 < quantizers {
                    let ids = Tensor::from_slice(&codes, codes.len(), &self.device)?;
                    roofbench_nn::cost::elementwise(residual.elem_count(), 1);
                    residual = (residual - codebook.embed.forward(&ids)?)?;
                }
                found.push(codes);
            }
            for piece in 0..places.len() {
                let rows = piece * batch..(piece + 1) * batch;
                let of = |row: usize| found.iter().flat_map(move |codes| &codes[row * frames..(row + 1) * frames]);
                let codes = rows.clone().flat_map(of).copied().collect();
                let scales = if scales.is_empty() { Vec::new() } else { scales[rows].to_vec() };
                pieces.push(Piece { codes, frames, scales });
            }
        }
        Ok(Codes { pieces, batch, quantizers })
    }

    /// The samples (batch, samples, channels) of one piece after the other.
    fn decode_pieces(&self, codes: &Codes) -> Result<Vec<Vec<f32>>> {
        let mut sounds = Vec::with_capacity(codes.pieces.len());
        for pieces in codes.pieces.chunk_by(|one, other| one.frames == other.frames) {
            let (rows, frames) = (pieces.len() * codes.batch, pieces[0].frames);
            let all = pieces.iter().flat_map(|piece| piece.codes.iter().copied()).collect();
            let all = Tensor::from_vec(all, (rows, codes.quantizers, frames), &self.device)?;
            let mut sum: Option<Tensor> = None;
            for (at, codebook) in self.codebooks[..codes.quantizers].iter().enumerate() {
                let vectors = codebook.embed.forward(&all.narrow(1, at, 1)?.squeeze(1)?.contiguous()?)?;
                sum = Some(match sum {
                    Some(sum) => {
                        roofbench_nn::cost::elementwise(sum.elem_count(), 1);
                        (sum + vectors)?
                    }
                    None => vectors,
                });
            }
            let Some(frames) = sum else { continue };
            let values = self.decoder.forward(&frames)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let of_row = values.len() / rows;
            for (piece, values) in pieces.iter().zip(values.chunks_exact(codes.batch * of_row)) {
                let mut values = values.to_vec();
                for (scale, row) in piece.scales.iter().zip(values.chunks_exact_mut(of_row)) {
                    roofbench_nn::cost::elementwise(of_row, 1);
                    row.iter_mut().for_each(|x| *x *= scale);
                }
                sounds.push(values);
            }
        }
        Ok(sounds)
    }

    /// The sound of `codes`, cut off after `most` samples.
    fn decode(&self, codes: &Codes, most: Option<usize>) -> Result<Tensor> {
        let (pieces, channels) = (self.decode_pieces(codes)?, self.cfg.audio_channels);
        let lengths: Vec<usize> = pieces.iter().map(|piece| piece.len() / (codes.batch * channels)).collect();
        let stride = if self.cfg.chunk() == 0 { 0 } else { self.cfg.stride() };
        let total = lengths.last().map_or(0, |last| stride * (pieces.len() - 1) + last);
        if (pieces.len() > 1) && lengths.iter().enumerate().any(|(i, length)| i * stride + length > total) {
            candle_core::bail!("the last of {} pieces ends before another; pad the sound to whole pieces", pieces.len())
        }
        let mut sums = vec![0f32; codes.batch * channels * total];
        match &pieces[..] {
            [one] => spread(one, channels, 0, total, |_| 1.0, &mut sums),
            _ => {
                // each piece fades in and out
                let first = lengths.first().copied().unwrap_or_default() as f32;
                let weight = |at: usize| 0.5 - ((at + 1) as f32 / (first + 1.0) - 0.5).abs();
                let mut weights = vec![0f32; total];
                for (i, (piece, length)) in pieces.iter().zip(&lengths).enumerate() {
                    roofbench_nn::cost::elementwise(piece.len(), 2);
                    spread(piece, channels, i * stride, total, weight, &mut sums);
                    weights[i * stride..][..*length].iter_mut().enumerate().for_each(|(at, sum)| *sum += weight(at));
                }
                if weights.contains(&0.0) {
                    candle_core::bail!("pieces of {} samples leave gaps at every {stride}", lengths[0])
                }
                roofbench_nn::cost::elementwise(sums.len(), 1);
                for row in sums.chunks_exact_mut(total) {
                    row.iter_mut().zip(&weights).for_each(|(x, weight)| *x /= weight);
                }
            }
        }
        let sound = self.tensor(sums, (codes.batch, channels, total))?;
        match most {
            Some(most) if most < total => sound.narrow(2, 0, most)?.contiguous(),
            _ => Ok(sound),
        }
    }

    /// `audio_codes` (pieces, batch, quantizers, frames), the last piece with zeros behind it, and `audio_scales` (batch,
    /// pieces, 1), where there are any.
    fn outputs(&self, codes: &Codes) -> Result<Tensors> {
        let Codes { pieces, batch, quantizers } = codes;
        let (count, frames) = (pieces.len(), pieces.first().map_or(0, |piece| piece.frames));
        let mut all = Vec::with_capacity(count * batch * quantizers * frames);
        for piece in pieces {
            for row in piece.codes.chunks_exact(piece.frames) {
                all.extend(row.iter().map(|code| i64::from(*code)));
                all.resize(all.len() + frames - piece.frames, 0);
            }
        }
        let all = Tensor::from_vec(all, (count, *batch, *quantizers, frames), &self.device)?;
        let mut outputs = Tensors::from([("audio_codes".to_owned(), all)]);
        if self.cfg.normalize {
            let scales = (0..*batch).flat_map(|item| pieces.iter().map(move |piece| piece.scales[item]));
            let scales = self.tensor(scales.collect(), (*batch, count, 1))?;
            outputs.insert("audio_scales".to_owned(), scales);
        }
        Ok(outputs)
    }

    fn sounds(&self, inputs: &Inputs) -> Result<Sounds, SessionError> {
        let (channels, name) = (self.cfg.audio_channels, "input_values");
        let values = inputs.floats_of(name, &[("batch", None), ("channels", Some(channels)), ("samples", None)])?;
        let (batch, channels, samples) = values.dims3()?;
        let places = self.cfg.pieces(samples);
        let frames: Vec<usize> = places.iter().map(|(_, length)| self.cfg.frames(*length)).collect();
        if frames.iter().rev().skip(1).any(|count| Some(count) != frames.first()) {
            let whole = self.cfg.stride() * (places.len() - 1) + self.cfg.chunk();
            let reason = format!("{samples} samples make unequal pieces; pad them to {whole}, as the processor does");
            return Err(SessionError::input(name, reason));
        }
        let mask =
            inputs.optional("padding_mask").map(|mask| mask_rows(mask, [batch, channels, samples])).transpose()?;
        let values = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Sounds { values, mask, batch, channels, samples })
    }

    /// The arguments of `decode`, and after how many samples its sound is cut off.
    fn codes(&self, call: &Call, inputs: &Inputs) -> Result<(Codes, Option<usize>), SessionError> {
        let name = "audio_codes";
        let tensor = inputs.optional(name).ok_or_else(|| SessionError::input(name, "is missing"))?;
        let refuse = |name: &str, reason: String| Err(SessionError::input(name, reason));
        let dims = match *tensor.dims() {
            [pieces, batch, quantizers, frames] if pieces * batch * quantizers * frames > 0 => {
                [pieces, batch, quantizers, frames]
            }
            _ => {
                let expected = "(pieces, batch, quantizers, frames), none of them 0";
                return refuse(name, format!("has shape {:?}, expected {expected}", tensor.dims()));
            }
        };
        let [count, batch, quantizers, frames] = dims;
        if !tensor.dtype().is_int() {
            return refuse(name, format!("has type {:?}, expected integers", tensor.dtype()));
        }
        let tensor = tensor.to_dtype(DType::I64)?;
        in_range(name, &tensor, "codebook_size", self.cfg.codebook_size)?;
        if quantizers > self.codebooks.len() {
            return refuse(name, format!("has codes of {quantizers} codebooks, the model {}", self.codebooks.len()));
        }
        if self.cfg.chunk() == 0 && count != 1 {
            return refuse(name, format!("has {count} pieces; without chunk_length_s a sound is one"));
        }
        let behind = match call.arguments.get("last_frame_pad_length") {
            None | Some(serde_json::Value::Null) => 0,
            Some(value) => match value.as_u64().map(usize::try_from) {
                Some(Ok(behind)) if behind < frames => behind,
                _ => return refuse("last_frame_pad_length", format!("is {value}, expected less than {frames} frames")),
            },
        };
        let scales = match inputs.optional("audio_scales") {
            Some(scales) if scales.elem_count() == count * batch && scales.dims()[0] == count => {
                scales.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?
            }
            Some(scales) => {
                let expected = format!("({count}, {batch}, 1)");
                return refuse("audio_scales", format!("has shape {:?}, expected {expected}", scales.dims()));
            }
            None => Vec::new(),
        };
        if let Some(list) = call.arguments.get("audio_scales")
            && list.as_array().is_none_or(|list| list.iter().any(|scale| !scale.is_null()))
        {
            return refuse("audio_scales", "as a plain argument is a list of null; pass a tensor".to_owned());
        }
        let most = inputs.optional("padding_mask").map(|mask| mask.dims().last().copied().unwrap_or_default());
        let all = tensor.flatten_all()?.to_vec1::<i64>()?;
        let piece = |(i, codes): (usize, &[i64])| {
            let frames_here = if i + 1 == count { frames - behind } else { frames };
            let rows = codes.chunks_exact(frames).flat_map(|row| &row[..frames_here]);
            let scales = scales.get(i * batch..(i + 1) * batch).unwrap_or_default().to_vec();
            Piece { codes: rows.map(|code| *code as u32).collect(), frames: frames_here, scales }
        };
        let pieces = all.chunks_exact(batch * quantizers * frames).enumerate().map(piece).collect();
        Ok((Codes { pieces, batch, quantizers }, most))
    }
}

/// Sums `piece` (batch, length, channels), weighted, into `sums` (batch, channels, total) from `begin` on.
fn spread(piece: &[f32], channels: usize, begin: usize, total: usize, weight: impl Fn(usize) -> f32, sums: &mut [f32]) {
    let items = sums.len() / (channels * total);
    for (rows, sums) in piece.chunks_exact(piece.len() / items).zip(sums.chunks_exact_mut(channels * total)) {
        for (at, step) in rows.chunks_exact(channels).enumerate() {
            for (channel, x) in step.iter().enumerate() {
                sums[channel * total + begin + at] += weight(at) * x;
            }
        }
    }
}

/// Root of the mean square over samples (length, channels), whose channels are mixed.
fn loudness(samples: &[f32], channels: usize) -> f32 {
    // sum of the channels and its division, square and sum
    let steps = samples.len() / channels;
    roofbench_nn::cost::elementwise(steps, channels + 3);
    roofbench_nn::cost::elementwise(samples.len(), 1);
    let square = |step: &[f32]| (step.iter().map(|x| f64::from(*x)).sum::<f64>() / channels as f64).powi(2);
    let mean = samples.chunks_exact(channels).map(square).sum::<f64>() / steps as f64;
    (mean.sqrt() + 1e-8) as f32
}

/// The sounds of a call on the host.
struct Sounds {
    /// (batch, channels, samples)
    values: Vec<f32>,
    /// The same of what exists; all where absent.
    mask: Option<Vec<bool>>,
    batch: usize,
    channels: usize,
    samples: usize,
}

impl Sounds {
    fn sample(&self, item: usize, channel: usize, at: usize) -> f32 {
        let place = (item * self.channels + channel) * self.samples + at;
        match &self.mask {
            Some(mask) if !mask[place] => 0.0,
            _ => self.values[place],
        }
    }
}

/// `padding_mask` (batch, samples) or (batch, 1 or channels, samples) for every channel.
fn mask_rows(mask: &Tensor, [batch, channels, samples]: [usize; 3]) -> Result<Vec<bool>, SessionError> {
    let spread = match mask.dims() {
        [items, length] if [*items, *length] == [batch, samples] => mask.unsqueeze(1)?,
        [items, rows, length] if [*items, *length] == [batch, samples] && [1, channels].contains(rows) => mask.clone(),
        other => {
            let reason = format!("has shape {other:?}, expected ({batch}, {samples})");
            return Err(SessionError::input("padding_mask", reason));
        }
    };
    let all = spread.to_dtype(DType::F32)?.broadcast_as((batch, channels, samples))?.flatten_all()?;
    Ok(all.to_vec1::<f32>()?.into_iter().map(|x| x != 0.0).collect())
}

/// A call, read.
enum Request {
    Encode { sounds: Sounds, quantizers: usize },
    Decode { codes: Codes, most: Option<usize> },
    Both { sounds: Sounds, quantizers: usize, most: Option<usize> },
}

impl EncodecModel {
    fn read(&self, call: &Call) -> Result<Request, SessionError> {
        let known = |inputs: &[&str], arguments: &[&str]| match call
            .arguments
            .keys()
            .find(|name| !arguments.contains(&name.as_str()))
        {
            Some(name) => {
                let reason = format!("is not supported; supported: {}", [inputs, arguments].concat().join(", "));
                Err(SessionError::input(name, reason))
            }
            None => Inputs::of_any_method(call, inputs),
        };
        let sound = ["input_values", "padding_mask"];
        match call.method.as_str() {
            "encode" => {
                let inputs = known(&sound, &["bandwidth"])?;
                Ok(Request::Encode { sounds: self.sounds(&inputs)?, quantizers: self.cfg.quantizers_of(call)? })
            }
            "forward" => {
                let sounds = self.sounds(&known(&sound, &["bandwidth"])?)?;
                let most = Some(sounds.samples);
                Ok(Request::Both { sounds, quantizers: self.cfg.quantizers_of(call)?, most })
            }
            "decode" => {
                let inputs = known(
                    &["audio_codes", "audio_scales", "padding_mask"],
                    &["audio_scales", "last_frame_pad_length"],
                )?;
                let (codes, most) = self.codes(call, &inputs)?;
                Ok(Request::Decode { codes, most })
            }
            _ => Err(unsupported_method(call, "forward, encode, decode")),
        }
    }
}

impl Session for EncodecModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let sound = |sound: Tensor| ("audio_values".to_owned(), sound);
        let outputs = match self.read(call)? {
            Request::Encode { sounds, quantizers } => self.outputs(&self.encode(&sounds, quantizers)?)?,
            Request::Decode { codes, most } => Tensors::from([sound(self.decode(&codes, most)?)]),
            Request::Both { sounds, quantizers, most } => {
                let codes = self.encode(&sounds, quantizers)?;
                let mut outputs = self.outputs(&codes)?;
                outputs.remove("audio_scales"); // no field of this output
                outputs.extend([sound(self.decode(&codes, most)?)]);
                outputs
            }
        };
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let cost = Costs { cfg: &self.cfg, bytes: self.dtype.size_in_bytes() as u64 };
        let cost = match self.read(call)? {
            Request::Encode { sounds, quantizers } => cost.encode(sounds.batch, sounds.samples, quantizers),
            Request::Decode { codes, .. } => {
                let frames: Vec<usize> = codes.pieces.iter().map(|piece| piece.frames).collect();
                let scaled = codes.pieces.iter().any(|piece| !piece.scales.is_empty());
                cost.decode(codes.batch, &frames, codes.quantizers, scaled)
            }
            Request::Both { sounds, quantizers, .. } => {
                return Ok(forward_cost(&self.cfg, [sounds.batch, sounds.samples, quantizers], self.dtype));
            }
        };
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// The cost of sounds (batch, samples) through so many codebooks and back.
pub(super) fn forward_cost(
    cfg: &EncodecConfig,
    [batch, samples, quantizers]: [usize; 3],
    dtype: DType,
) -> Vec<PhaseCost> {
    let cost = Costs { cfg, bytes: dtype.size_in_bytes() as u64 };
    let frames: Vec<usize> = cfg.pieces(samples).iter().map(|(_, length)| cfg.frames(*length)).collect();
    let cost = cost.encode(batch, samples, quantizers) + cost.decode(batch, &frames, quantizers, cfg.normalize);
    vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }]
}

/// The cost by formula.
struct Costs<'a> {
    cfg: &'a EncodecConfig,
    bytes: u64,
}

impl Costs<'_> {
    /// A convolution that gives `steps` steps in all, and its norm.
    fn conv(&self, steps: u64, sizes: Sizes) -> Cost {
        let [input, output, kernel] = [sizes.input, sizes.output, sizes.kernel].map(|n| n as u64);
        let conv = cost::Conv2d {
            batch: 1,
            in_channels: input,
            out_channels: output,
            kernel: [1, kernel],
            groups: 1,
            output: [1, steps],
            bias: true,
        };
        conv.cost(self.bytes) + self.norm(steps, output)
    }

    fn norm(&self, steps: u64, channels: u64) -> Cost {
        match self.cfg.norm_type {
            NormType::WeightNorm => Cost::default(),
            NormType::TimeGroupNorm => cost::norm(Norm::Layer, steps, channels, self.bytes),
        }
    }

    /// A block over `steps` steps; `is_last` is activated.
    fn block(&self, steps: u64, width: usize, is_last: bool) -> Cost {
        let (inner, elements) = (width / self.cfg.compress, steps * width as u64);
        let shortcut = match self.cfg.use_conv_shortcut {
            true => self.conv(steps, Sizes::new(width, width, 1)),
            false => Cost::default(),
        };
        cost::elementwise(elements, 1) // activation
            + self.conv(steps, Sizes::new(width, inner, self.cfg.residual_kernel_size))
            + cost::elementwise(steps * inner as u64, 1) // activation
            + self.conv(steps, Sizes::new(inner, width, 1))
            + shortcut
            + cost::elementwise(elements, 1 + u64::from(is_last)) // sum, activation
    }

    fn blocks(&self, steps: u64, width: usize) -> Cost {
        let layers = self.cfg.num_residual_layers;
        (1..=layers).map(|layer| self.block(steps, width, layer == layers)).sum()
    }

    /// The LSTM beside nothing, and the activation behind the sum.
    fn lstm(&self, steps: u64) -> Cost {
        let width = self.cfg.widest() as u64;
        let layer = cost::linear(steps, width, 4 * width, true, self.bytes)
            // the product of the state before, its sum with the inputs' part; five functions, three products, one sum
            + Cost {
                flops: steps * (8 * width * width + 4 * width + 9 * width),
                weight_bytes: 4 * width * width * self.bytes,
                activation_bytes: steps * width * self.bytes,
                kv_bytes: 0,
            };
        layer * self.cfg.num_lstm_layers as u64 + cost::elementwise(steps * width, 2)
    }

    /// From `batch` sounds to codes in so many codebooks.
    fn encode(&self, batch: usize, samples: usize, quantizers: usize) -> Cost {
        let cfg = self.cfg;
        let mut lengths: Vec<usize> = cfg.pieces(samples).iter().map(|piece| piece.1).collect();
        let steps = |lengths: &[usize]| (batch * lengths.iter().sum::<usize>()) as u64;
        let channels = cfg.audio_channels as u64;
        let mut cost = cost::input((batch * samples) as u64 * channels, self.bytes);
        if cfg.normalize {
            // mixed, squared and summed; divided
            cost += cost::elementwise(steps(&lengths), channels + 3 + channels);
        }
        cost += self.conv(steps(&lengths), Sizes::new(cfg.audio_channels, cfg.num_filters, cfg.kernel_size));
        let mut width = cfg.num_filters;
        for &ratio in cfg.upsampling_ratios.iter().rev() {
            cost += self.blocks(steps(&lengths), width);
            lengths.iter_mut().for_each(|length| *length = length.div_ceil(ratio));
            cost += self.conv(steps(&lengths), Sizes::new(width, 2 * width, 2 * ratio));
            width *= 2;
        }
        let (frames, hidden, size) = (steps(&lengths), cfg.hidden_size as u64, cfg.codebook_size as u64);
        cost += self.lstm(frames) + self.conv(frames, Sizes::new(width, cfg.hidden_size, cfg.last_kernel_size));
        let quantizers = quantizers as u64;
        // the scores of every code; of all but the last codebook the vectors, subtracted
        cost + cost::linear(frames, hidden, size, true, self.bytes) * quantizers
            + (cost::embedding(frames, hidden, self.bytes) + cost::elementwise(frames * hidden, 1)) * (quantizers - 1)
    }

    /// From codes of `batch` items, in pieces of `frames` each, to sounds.
    fn decode(&self, batch: usize, frames: &[usize], quantizers: usize, scaled: bool) -> Cost {
        let cfg = self.cfg;
        let (mut lengths, pieces) = (frames.to_vec(), (frames.len() * batch) as u64);
        let steps = |lengths: &[usize]| (batch * lengths.iter().sum::<usize>()) as u64;
        let (rows, hidden, quantizers) = (steps(&lengths), cfg.hidden_size as u64, quantizers as u64);
        let mut width = cfg.widest();
        let mut cost = cost::embedding(rows, hidden, self.bytes) * quantizers
            + cost::elementwise(rows * hidden, 1) * (quantizers - 1)
            + self.conv(rows, Sizes::new(cfg.hidden_size, width, cfg.kernel_size))
            + self.lstm(rows);
        for &ratio in &cfg.upsampling_ratios {
            let [input, output, taps] = [width, width / 2, 2 * ratio].map(|n| n as u64);
            // each step goes to every tap, also to those that are cut off
            let made = steps(&lengths) * ratio as u64 + pieces * ratio as u64;
            cost += Cost {
                flops: 2 * steps(&lengths) * input * taps * output + made * output,
                weight_bytes: (input * taps + 1) * output * self.bytes,
                activation_bytes: made * output * self.bytes,
                kv_bytes: 0,
            };
            cost += self.norm(made, output);
            width /= 2;
            lengths.iter_mut().for_each(|length| *length *= ratio);
            cost += self.blocks(steps(&lengths), width);
        }
        cost += self.conv(steps(&lengths), Sizes::new(width, cfg.audio_channels, cfg.last_kernel_size));
        let samples = steps(&lengths) * cfg.audio_channels as u64;
        if scaled {
            cost += cost::elementwise(samples, 1);
        }
        if let [.., last] = &lengths[..]
            && lengths.len() > 1
        {
            let total = batch * cfg.audio_channels * (cfg.stride() * (lengths.len() - 1) + last);
            cost += cost::elementwise(samples, 2) + cost::elementwise(total as u64, 1); // faded and summed, divided
        }
        cost
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::Weights;
    use serde_json::{Value, json};

    use super::*;
    use crate::Source;

    fn spec(config: Value) -> ModelSpec {
        ModelSpec::new("encodec", "EncodecModel", config)
    }

    fn tiny(changes: Value) -> EncodecModel {
        let mut config = json!({
            "sampling_rate": 1000, "target_bandwidths": [1.5, 3.0], "hidden_size": 4, "num_filters": 2,
            "upsampling_ratios": [2, 2], "codebook_size": 8, "num_lstm_layers": 1, "kernel_size": 3,
        });
        if let (Some(config), Some(changes)) = (config.as_object_mut(), changes.as_object()) {
            config.extend(changes.clone());
        }
        let spec = spec(config);
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, ALIASES, &spec.class, &Default::default()).expect("weights");
        EncodecModel::load(&spec, weights.var_builder(DType::F32, &Device::Cpu)).expect("a model")
    }

    fn call(method: &str, inputs: &[(&str, Tensor)], arguments: Value) -> Call {
        let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        Call { method: method.into(), inputs, arguments: arguments.as_object().cloned().unwrap_or_default() }
    }

    fn noise(shape: (usize, usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).expect("noise")
    }

    #[test]
    fn codes_of_published_checkpoints() -> Result<(), SessionError> {
        let cfg = EncodecConfig::from_spec(&spec(json!({})))?;
        assert_eq!((cfg.hop(), cfg.frames(240_000), cfg.quantizers()), (320, 750, 32));
        assert_eq!([1.5, 3.0, 6.0, 12.0, 24.0].map(|width| cfg.quantizers_at(width)), [2, 4, 8, 16, 32]);
        let stereo = EncodecConfig::from_spec(&spec(json!({
            "sampling_rate": 48000, "audio_channels": 2, "chunk_length_s": 1.0, "overlap": 0.01,
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
        })))?;
        assert_eq!((stereo.quantizers(), stereo.chunk(), stereo.stride()), (16, 48_000, 47_520));
        assert_eq!(stereo.pieces(95_520), [(0, 48_000), (47_520, 48_000), (95_040, 480)]);
        Ok(())
    }

    #[test]
    fn encode_and_decode_are_what_forward_does() -> Result<(), SessionError> {
        let mut model = tiny(json!({
            "audio_channels": 2, "normalize": true, "chunk_length_s": 0.04, "overlap": 0.25,
            "norm_type": "time_group_norm", "use_causal_conv": false,
        }));
        let sound = noise((2, 2, 70));
        let whole = model.call(&call("forward", &[("input_values", sound.clone())], json!({})), &mut Unobserved)?;
        let codes = model.call(&call("encode", &[("input_values", sound.clone())], json!({})), &mut Unobserved)?;
        // pieces of 40 from 0 and 30, and 10 samples from 60: 10, 10 and 3 frames
        assert_eq!(codes["audio_codes"].dims(), [3, 2, 2, 10]);
        let inputs = [
            ("audio_codes", codes["audio_codes"].clone()),
            ("audio_scales", codes["audio_scales"].transpose(0, 1)?),
            ("padding_mask", Tensor::ones((2, 70), DType::I64, &Device::Cpu)?),
        ];
        let decoded = call("decode", &inputs, json!({"last_frame_pad_length": 7}));
        let sound = model.call(&decoded, &mut Unobserved)?;
        assert_eq!(sound["audio_values"].to_vec3::<f32>()?, whole["audio_values"].to_vec3::<f32>()?);
        Ok(())
    }

    #[test]
    fn wrong_calls_name_the_argument() {
        let mut model = tiny(json!({"chunk_length_s": 0.02, "overlap": 0.5}));
        let mut message =
            |call: &Call| model.call(call, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        let sound = |shape| [("input_values", noise(shape))];
        assert!(message(&call("forward", &sound((1, 2, 30)), json!({}))).contains("channels = 1"));
        assert!(message(&call("encode", &sound((1, 1, 20)), json!({"bandwidth": 2.0}))).contains("1.5, 3"));
        assert!(message(&call("encode", &sound((1, 1, 35)), json!({}))).contains("pad them to 50"));
        let codes = [("audio_codes", Tensor::full(8i64, (1, 1, 2, 3), &Device::Cpu).expect("codes"))];
        assert!(message(&call("decode", &codes, json!({}))).contains("beyond codebook_size = 8"));
        assert!(message(&call("generate", &[], json!({}))).contains("forward, encode, decode"));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |config: Value| EncodecConfig::from_spec(&spec(config)).err().map(|e| e.to_string());
        for (config, field) in [
            (json!({"codebook_size": 1000}), "`codebook_size`: 1000 is no power of two"),
            (json!({"codebook_dim": 64}), "`codebook_dim`: is not hidden_size, 128"),
            (json!({"audio_channels": 3}), "`audio_channels`: 3 is neither 1 nor 2"),
            (json!({"chunk_length_s": 1.0}), "`overlap`: is missing"),
            (json!({"trim_right_ratio": 0.5, "use_causal_conv": false}), "`trim_right_ratio`"),
            (json!({"pad_mode": "circular"}), "`pad_mode`"),
            (json!({"target_bandwidths": []}), "`target_bandwidths`"),
            (json!({"upsampling_ratios": [8, 0]}), "`upsampling_ratios`"),
            (json!({"norm_type": "layer_norm"}), "`norm_type`"),
        ] {
            let found = message(config);
            assert!(found.as_ref().is_some_and(|found| found.contains(field)), "{found:?}, not {field}");
        }
    }

    /// 2 samples through one stage of ratio 2: one frame of width 4, a codebook of 2 codes.
    #[test]
    fn cost_of_a_tiny_case_by_hand() -> Result<(), SessionError> {
        let cfg = EncodecConfig::from_spec(&spec(json!({
            "sampling_rate": 2, "target_bandwidths": [0.001], "hidden_size": 4, "num_filters": 2,
            "upsampling_ratios": [2], "codebook_size": 2, "num_lstm_layers": 1, "kernel_size": 3,
            "last_kernel_size": 5,
        })))?;
        let conv = |steps: u64, input: u64, output: u64, kernel: u64| steps * output * (2 * input * kernel + 1);
        // activations before and inside, two convolutions and the shortcut, sum and activation
        let block = 4 + conv(2, 2, 1, 3) + 2 + conv(2, 1, 2, 1) + conv(2, 2, 2, 1) + 4 + 4;
        let lstm = conv(1, 4, 16, 1) + (2 * 16 * 4 + 16 + 9 * 4) + 4 + 4; // its sum, and an activation
        let encode = conv(2, 1, 2, 3) + block + conv(1, 2, 4, 4) + lstm + conv(1, 4, 4, 5) + conv(1, 4, 2, 1);
        // 4 steps are made, 2 are cut off
        let up = 2 * 4 * 4 * 2 + 4 * 2;
        let decode = conv(1, 4, 4, 3) + lstm + up + block + conv(2, 2, 1, 5);
        let costs = Costs { cfg: &cfg, bytes: 4 };
        assert_eq!((costs.encode(1, 2, 1).flops, costs.decode(1, &[1], 1, false).flops), (encode, decode));
        Ok(())
    }

    /// Published: 14.85 million parameters, of which each convolution's weight norm has a number per channel.
    #[test]
    fn every_parameter_of_the_published_checkpoint_is_read() -> Result<(), SessionError> {
        let cfg = EncodecConfig::from_spec(&spec(json!({})))?;
        let costs = Costs { cfg: &cfg, bytes: 4 };
        let codebooks = (1024 * 128 + 1024) * 2 + 750 * 128; // scores, and the vectors subtracted
        let vectors = 2 * 750 * 128;
        let both = costs.encode(1, 240_000, 2) + costs.decode(1, &[750], 2, false);
        let weights = both.weight_bytes / 4 - codebooks - vectors;
        let parameters = 14_851_810.0;
        assert!((weights as f64 / parameters - 1.0).abs() < 0.002, "{weights}");
        Ok(())
    }
}
