//! From sound to a stream of frames, as wav2vec 2.0 has it and its descendants took it over: a stack of convolutions on
//! the samples, a projection, and a convolution that gives frames their positions.
//! Source: wav2vec 2.0 (arXiv:2006.11477). Mirrors `Wav2Vec2FeatureEncoder`, `Wav2Vec2FeatureProjection` and
//! `Wav2Vec2PositionalConvEmbedding` of `transformers`.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{BatchNorm, Conv1d, Conv1dConfig};
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::options;
use serde::Deserialize;

use super::{activation_dtype, weight_normed};

/// Epsilon of the norms that take torch's default, whatever `layer_norm_eps` says.
pub(crate) const TORCH_EPS: f64 = 1e-5;

/// The fields of `config.json` that shape the frames; their names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct FeatureConfig {
    /// Width of the stream.
    pub hidden_size: usize,
    /// Channels of each convolution.
    pub conv_dim: Vec<usize>,
    /// Taps of each convolution.
    pub conv_kernel: Vec<usize>,
    /// Samples, or frames of the one before, from window to window of each convolution.
    pub conv_stride: Vec<usize>,
    /// The convolutions have biases.
    pub conv_bias: bool,
    /// What is normalised between them.
    pub feat_extract_norm: FeatureNorm,
    /// Activation after each convolution, the positional one too.
    pub feat_extract_activation: Activation,
    /// A norm precedes the projection.
    pub feat_proj_layer_norm: bool,
    /// Added to the variance in the norm before the projection and in those of the encoder.
    pub layer_norm_eps: f64,
    /// Taps of the positional convolution.
    pub num_conv_pos_embeddings: usize,
    /// Its groups.
    pub num_conv_pos_embedding_groups: usize,
    /// A batch norm precedes it; else its weight is normalised.
    pub conv_pos_batch_norm: bool,
}

/// What is normalised between the convolutions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureNorm {
    /// Each channel of the first over all frames.
    Group,
    /// Each frame of every one.
    Layer,
}

/// What `transformers.Wav2Vec2Config` takes for fields that a file leaves out.
impl Default for FeatureConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            conv_dim: vec![512; 7],
            conv_kernel: vec![10, 3, 3, 3, 3, 2, 2],
            conv_stride: vec![5, 2, 2, 2, 2, 2, 2],
            conv_bias: false,
            feat_extract_norm: FeatureNorm::Group,
            feat_extract_activation: Activation::Gelu,
            feat_proj_layer_norm: true,
            layer_norm_eps: 1e-5,
            num_conv_pos_embeddings: 128,
            num_conv_pos_embedding_groups: 16,
            conv_pos_batch_norm: false,
        }
    }
}

impl FeatureConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        let lists = [("conv_dim", &cfg.conv_dim), ("conv_kernel", &cfg.conv_kernel), ("conv_stride", &cfg.conv_stride)];
        for (field, list) in lists {
            if list.is_empty() || list.len() != cfg.conv_dim.len() {
                let reason = format!("has {} numbers, conv_dim {}", list.len(), cfg.conv_dim.len());
                return Err(config::invalid(field, reason));
            }
            for &size in list {
                config::sizes(&[(field, size)])?;
            }
        }
        config::sizes(&[
            ("hidden_size", cfg.hidden_size),
            ("num_conv_pos_embeddings", cfg.num_conv_pos_embeddings),
            ("num_conv_pos_embedding_groups", cfg.num_conv_pos_embedding_groups),
        ])?;
        let groups = ("num_conv_pos_embedding_groups", cfg.num_conv_pos_embedding_groups);
        config::multiple(("hidden_size", cfg.hidden_size), groups)?;
        config::not_negative(&[("layer_norm_eps", cfg.layer_norm_eps)])?;
        Ok(cfg)
    }

    /// Frames after each convolution of `samples`; `None` where they are fewer than a window.
    fn lengths(&self, samples: usize) -> Option<Vec<usize>> {
        let mut length = samples;
        let windows = self.conv_kernel.iter().zip(&self.conv_stride);
        let after = windows.map(|(&kernel, &stride)| {
            length = length.checked_sub(kernel)? / stride + 1;
            Some(length)
        });
        after.collect()
    }

    /// Frames of `samples`; `None` where they are fewer than a frame takes.
    pub(crate) fn frames(&self, samples: usize) -> Option<usize> {
        self.lengths(samples)?.last().copied()
    }

    /// Frames of the sounds of an input, which are `samples` long each.
    ///
    /// # Errors
    /// Names the input, when they are shorter than a frame.
    pub(crate) fn frames_of(&self, input: &str, samples: usize) -> Result<usize, SessionError> {
        self.frames(samples).ok_or_else(|| {
            let reason = format!("a sound of {samples} samples is shorter than a frame; pad it with zeros");
            SessionError::input(input, reason)
        })
    }

    /// The most values that a layer has of each frame that comes out at the end.
    pub(crate) fn widest(&self) -> usize {
        let mut later: usize = self.conv_stride.iter().product();
        let of_layer = |(channels, stride): (&usize, &usize)| {
            later /= (*stride).max(1);
            channels * later
        };
        self.conv_dim.iter().zip(&self.conv_stride).map(of_layer).max().unwrap_or_default()
    }

    /// Channels of the last convolution.
    pub(crate) fn conv_out(&self) -> usize {
        self.conv_dim.last().copied().unwrap_or_default()
    }

    /// Input channels, output channels, taps and stride of each convolution.
    fn convolutions(&self) -> impl Iterator<Item = [usize; 4]> {
        let inputs = std::iter::once(1).chain(self.conv_dim.iter().copied());
        let windows = self.conv_kernel.iter().zip(&self.conv_stride);
        inputs
            .zip(&self.conv_dim)
            .zip(windows)
            .map(|((input, &output), (&kernel, &stride))| [input, output, kernel, stride])
    }

    /// The cost of a batch of `samples` each as far as the projected frames.
    pub(crate) fn cost(&self, batch: usize, samples: usize, bytes: u64) -> Cost {
        let mut cost = cost::input((batch * samples) as u64, bytes);
        let lengths = self.lengths(samples).unwrap_or_default();
        for (at, ([input, output, kernel, _], length)) in self.convolutions().zip(&lengths).enumerate() {
            let [length, batch, input, output, kernel] = [*length, batch, input, output, kernel].map(|n| n as u64);
            let normed = at == 0 && self.feat_extract_norm == FeatureNorm::Group;
            let conv = cost::Conv2d {
                batch,
                in_channels: input,
                out_channels: output,
                kernel: [1, kernel],
                groups: 1,
                output: [1, length],
                // the norm's, where it is folded in
                bias: normed || self.conv_bias,
            };
            cost += conv.cost(bytes) + cost::elementwise(batch * length * output, 1); // activation
            cost += match self.feat_extract_norm {
                FeatureNorm::Layer => cost::norm(Norm::Layer, batch * length, output, bytes),
                // the moments of the windows, and the norm's weight
                FeatureNorm::Group if normed => {
                    cost::elementwise(batch * length, moment_flops(kernel as usize) as u64)
                        + Cost { weight_bytes: output * bytes, ..Cost::default() }
                }
                FeatureNorm::Group => Cost::default(),
            };
        }
        let rows = (batch * lengths.last().copied().unwrap_or_default()) as u64;
        let [width, hidden] = [self.conv_out(), self.hidden_size].map(|n| n as u64);
        if self.feat_proj_layer_norm {
            cost += cost::norm(Norm::Layer, rows, width, bytes);
        }
        cost + cost::linear(rows, width, hidden, true, bytes)
    }

    /// The cost of the positions of a batch of `frames` each.
    pub(crate) fn position_cost(&self, batch: usize, frames: usize, bytes: u64) -> Cost {
        let [batch, frames, hidden, kernel, groups] =
            [batch, frames, self.hidden_size, self.num_conv_pos_embeddings, self.num_conv_pos_embedding_groups]
                .map(|n| n as u64);
        let conv = cost::Conv2d {
            batch,
            in_channels: hidden,
            out_channels: hidden,
            kernel: [1, kernel],
            groups,
            output: [1, frames],
            bias: true,
        };
        let elements = batch * frames * hidden;
        let norm = match self.conv_pos_batch_norm {
            // a multiply-add with the folded moments
            true => cost::elementwise(elements, 2) + Cost { weight_bytes: 4 * hidden * bytes, ..Cost::default() },
            false => Cost::default(),
        };
        norm + conv.cost(bytes) + cost::elementwise(elements, 2) // activation, added to the stream
    }
}

/// A convolution with what follows it.
struct ConvLayer {
    conv: Conv1d,
    layer_norm: Option<LayerNorm>,
}

/// The first convolution, which has one channel in, with the norm of each channel out over all frames.
///
/// The moments of an output follow from those of the windows: with their mean m and covariance C it has mean w·m + b and
/// variance wᵀ C w. So they are known before the convolution runs, the norm goes into its weights, one set for each
/// sound, and the longest stream of the model is written once and never normalised.
struct NormedConv {
    /// (out, kernel)
    weight: Vec<f32>,
    norm_weight: Vec<f32>,
    norm_bias: Vec<f32>,
    config: Conv1dConfig,
    dtype: DType,
    device: Device,
}

/// FLOPs a window of `kernel` samples: sum for the mean, subtract it, add to the products of all pairs.
fn moment_flops(kernel: usize) -> usize {
    2 * kernel + 2 * kernel * kernel
}

impl NormedConv {
    /// `vb` is the layer's. A bias of the convolution would be subtracted with the mean.
    fn load(out: usize, config: Conv1dConfig, bias: bool, vb: VarBuilder) -> Result<Self> {
        let flat = |x: Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        if bias {
            vb.get(out, "conv.bias")?;
        }
        Ok(Self {
            weight: flat(vb.get((out, 1, config.kernel), "conv.weight")?)?,
            norm_weight: flat(vb.get(out, "layer_norm.weight")?)?,
            norm_bias: flat(vb.get(out, "layer_norm.bias")?)?,
            config,
            dtype: activation_dtype(vb.dtype(), vb.device()),
            device: vb.device().clone(),
        })
    }

    /// The convolution whose outputs on `samples` are normalised.
    fn fitted(&self, samples: &[f32]) -> Result<Conv1d> {
        let kernel = self.config.kernel;
        let (mean, covariance) = window_moments(samples, kernel, self.config.stride);
        let (mut weights, mut biases) = (Vec::with_capacity(self.weight.len()), Vec::new());
        for (row, (scale, shift)) in self.weight.chunks_exact(kernel).zip(self.norm_weight.iter().zip(&self.norm_bias))
        {
            let dot = |values: &[f64]| row.iter().zip(values).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
            let products = covariance.chunks_exact(kernel).zip(row);
            let variance = products.map(|(row, &w)| f64::from(w) * dot(row)).sum::<f64>();
            let scale = f64::from(*scale) / (variance.max(0.0) + TORCH_EPS).sqrt();
            weights.extend(row.iter().map(|&w| (f64::from(w) * scale) as f32));
            biases.push((f64::from(*shift) - dot(&mean) * scale) as f32);
        }
        let tensor =
            |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype);
        let out = biases.len();
        Conv1d::new(&tensor(weights, &[out, 1, kernel])?, Some(&tensor(biases, &[out])?), self.config)
    }
}

/// Mean (kernel) and covariance (kernel, kernel) over the windows of `samples`.
fn window_moments(samples: &[f32], kernel: usize, stride: usize) -> (Vec<f64>, Vec<f64>) {
    let windows = || samples.windows(kernel).step_by(stride);
    let count = windows().len();
    roofbench_nn::cost::elementwise(count, moment_flops(kernel));
    let mut mean = vec![0.0; kernel];
    for window in windows() {
        mean.iter_mut().zip(window).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    mean.iter_mut().for_each(|sum| *sum /= count as f64);
    let mut covariance = vec![0.0; kernel * kernel];
    let mut centred = vec![0.0; kernel];
    for window in windows() {
        for ((centred, &x), mean) in centred.iter_mut().zip(window).zip(&mean) {
            *centred = f64::from(x) - mean;
        }
        for (row, x) in covariance.chunks_exact_mut(kernel).zip(&centred) {
            row.iter_mut().zip(&centred).for_each(|(sum, y)| *sum += x * y);
        }
    }
    covariance.iter_mut().for_each(|sum| *sum /= count as f64);
    (mean, covariance)
}

/// The stack of convolutions on the samples.
pub(crate) struct FeatureEncoder {
    /// The first, where its channels are normalised; it is not among the layers then.
    normed: Option<NormedConv>,
    layers: Vec<ConvLayer>,
    activation: Activation,
    /// Samples from a frame to the next, and samples that a frame is made of.
    window: [usize; 2],
    /// Frames of a tile; none where the convolutions run over all of them one after the other.
    tile: Option<usize>,
}

/// Frames of a tile: the widest values in one, 64 of each frame in the published stack, take 8 MB in f32.
pub(crate) const TILE: usize = 64;

impl FeatureEncoder {
    /// Reads `conv_layers.N.conv` and the norms beside them.
    pub(crate) fn load(cfg: &FeatureConfig, vb: VarBuilder) -> Result<Self> {
        let (mut normed, mut layers) = (None, Vec::new());
        for (at, [input, output, kernel, stride]) in cfg.convolutions().enumerate() {
            let vb = vb.pp(format!("conv_layers.{at}"));
            let config = Conv1dConfig { stride, ..Conv1dConfig::new(kernel) };
            let layer_norm = match cfg.feat_extract_norm {
                FeatureNorm::Group if at == 0 => {
                    normed = Some(NormedConv::load(output, config, cfg.conv_bias, vb)?);
                    continue;
                }
                FeatureNorm::Group => None,
                FeatureNorm::Layer => Some(LayerNorm::load(output, TORCH_EPS, vb.pp("layer_norm"))?),
            };
            let conv = Conv1d::load(input, output, config, cfg.conv_bias, vb.pp("conv"))?;
            layers.push(ConvLayer { conv, layer_norm });
        }
        let window = cfg
            .convolutions()
            .fold([1, 1], |[hop, reach], [_, _, kernel, stride]| [hop * stride, reach + (kernel - 1) * hop]);
        let tile = options::current().tiled_features.then_some(TILE);
        Ok(Self { normed, layers, activation: cfg.feat_extract_activation, window, tile })
    }

    /// (batch, samples) -> (batch, frames, channels)
    pub(crate) fn forward(&self, sounds: &Tensor) -> Result<Tensor> {
        let x = sounds.unsqueeze(2)?;
        let Some(normed) = &self.normed else { return self.in_tiles(&x, |x| self.forward_layers(x.clone())) };
        let samples = sounds.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        // each sound by itself: its weights are its own
        let frames = samples.iter().enumerate().map(|(item, samples)| {
            let x = x.narrow(0, item, 1)?;
            let first = normed.fitted(samples)?;
            self.in_tiles(&x, |x| self.forward_layers(first.forward_act(x, self.activation)?))
        });
        match &frames.collect::<Result<Vec<_>>>()?[..] {
            [one] => Ok(one.clone()),
            several => Tensor::cat(several, 0),
        }
    }

    /// Joins the frames that `run` makes of tiles of `x` (batch, samples, 1), which no frame outside of them depends on.
    fn in_tiles(&self, x: &Tensor, run: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let ([hop, reach], samples) = (self.window, x.dim(1)?);
        let frames = samples.saturating_sub(reach) / hop + 1;
        let Some(tile) = self.tile.filter(|tile| frames > *tile) else { return run(x) };
        let made = (0..frames).step_by(tile).map(|from| {
            let count = tile.min(frames - from);
            run(&x.narrow(1, from * hop, (count - 1) * hop + reach)?.contiguous()?)
        });
        Tensor::cat(&made.collect::<Result<Vec<_>>>()?, 1)
    }

    fn forward_layers(&self, mut x: Tensor) -> Result<Tensor> {
        for ConvLayer { conv, layer_norm } in &self.layers {
            x = match layer_norm {
                Some(norm) => norm.forward_act(&conv.forward(&x)?, self.activation)?,
                None => conv.forward_act(&x, self.activation)?,
            };
        }
        Ok(x)
    }
}

/// From the channels of the convolutions to the width of the stream.
pub(crate) struct FeatureProjection {
    layer_norm: Option<LayerNorm>,
    projection: Linear,
}

impl FeatureProjection {
    /// Reads `layer_norm`, where there is one, and `projection`.
    pub(crate) fn load(cfg: &FeatureConfig, vb: VarBuilder) -> Result<Self> {
        let norm = || LayerNorm::load(cfg.conv_out(), cfg.layer_norm_eps, vb.pp("layer_norm"));
        Ok(Self {
            layer_norm: if cfg.feat_proj_layer_norm { Some(norm()?) } else { None },
            projection: Linear::load(cfg.conv_out(), cfg.hidden_size, true, vb.pp("projection"))?,
        })
    }

    /// (batch, frames, channels) -> (batch, frames, hidden), and what was projected, normalised.
    pub(crate) fn forward(&self, features: Tensor) -> Result<(Tensor, Tensor)> {
        let features = match &self.layer_norm {
            Some(norm) => norm.forward(&features)?,
            None => features,
        };
        Ok((self.projection.forward(&features)?, features))
    }
}

/// A convolution over neighbouring frames, which tells them their positions.
pub(crate) struct PositionalConv {
    batch_norm: Option<BatchNorm>,
    conv: Conv1d,
    activation: Activation,
}

impl PositionalConv {
    /// Reads `conv`, and `batch_norm` where there is one.
    pub(crate) fn load(cfg: &FeatureConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, kernel) = (cfg.hidden_size, cfg.num_conv_pos_embeddings);
        let groups = cfg.num_conv_pos_embedding_groups;
        // as many frames out as in: an even kernel has one frame of padding less behind
        let padding = (kernel / 2, (kernel - 1) / 2);
        let config = Conv1dConfig { padding, groups, ..Conv1dConfig::new(kernel) };
        let (shape, conv) = ((hidden, hidden / groups, kernel), vb.pp("conv"));
        let (batch_norm, weight) = match cfg.conv_pos_batch_norm {
            true => (Some(BatchNorm::load(hidden, TORCH_EPS, vb.pp("batch_norm"))?), conv.get(shape, "weight")?),
            false => (None, weight_normed(shape, 2, conv.clone())?),
        };
        let conv = Conv1d::new(&weight, Some(&conv.get(hidden, "bias")?), config)?;
        Ok(Self { batch_norm, conv, activation: cfg.feat_extract_activation })
    }

    /// The stream with positions; `x` and the result are (batch, frames, hidden).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let positions = match &self.batch_norm {
            Some(norm) => {
                roofbench_nn::cost::elementwise(x.elem_count(), 2);
                self.conv.forward_act(&norm.forward(x)?, self.activation)?
            }
            None => self.conv.forward_act(x, self.activation)?,
        };
        roofbench_nn::cost::elementwise(x.elem_count(), 1);
        x + positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The norm in the weights against the norm after the convolution.
    #[test]
    fn moments_of_windows_normalise_the_convolution() -> Result<()> {
        let cpu = &Device::Cpu;
        let samples: Vec<f32> = (0..203).map(|i| 3.0 + (i as f32 * 0.7).sin() + (i as f32 * 0.013).cos()).collect();
        let config = Conv1dConfig { stride: 5, ..Conv1dConfig::new(10) };
        let flat = |seed: f32, len: usize| (0..len).map(|i| (i as f32 * seed).sin()).collect::<Vec<f32>>();
        let normed = NormedConv {
            weight: flat(0.37, 4 * 10),
            norm_weight: flat(1.1, 4),
            norm_bias: flat(2.3, 4),
            config,
            dtype: DType::F32,
            device: Device::Cpu,
        };
        let x = Tensor::new(samples.as_slice(), cpu)?.reshape((1, 203, 1))?;
        let weight = Tensor::new(normed.weight.as_slice(), cpu)?.reshape((4, 1, 10))?;
        let y = Conv1d::new(&weight, None, config)?.forward(&x)?;
        let parameters = (Tensor::new(&normed.norm_weight[..], cpu)?, Tensor::new(&normed.norm_bias[..], cpu)?);
        let norm = roofbench_nn::norm::GroupNorm::new(4, &parameters.0, Some(&parameters.1), TORCH_EPS)?;
        let difference = (norm.forward(&y)? - normed.fitted(&samples)?.forward(&x)?)?.abs()?.max_all()?;
        // values up to 3, from sums of products up to 30 that cancel
        assert!(difference.to_scalar::<f32>()? < 3e-5, "{difference}");
        Ok(())
    }

    /// More than a tile, with either norm: every frame is as without tiles.
    #[test]
    fn tiles_change_nothing() -> Result<(), SessionError> {
        use roofbench_core::weights::{HubOptions, Source, Weights};
        let samples = Tensor::randn(0f32, 1.0, (2, 5 * (2 * TILE + 3) + 4), &Device::Cpu)?;
        for norm in [FeatureNorm::Group, FeatureNorm::Layer] {
            let cfg = FeatureConfig {
                conv_dim: vec![6, 4],
                conv_kernel: vec![7, 2],
                conv_stride: vec![5, 1],
                feat_extract_norm: norm,
                ..FeatureConfig::default()
            };
            let run = |tiled_features: bool| {
                let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], "", &HubOptions::default())?;
                let vb = weights.var_builder(DType::F32, &Device::Cpu);
                let choice = options::Options { tiled_features, ..options::Options::default() };
                let encoder = options::with(choice, || FeatureEncoder::load(&cfg, vb))?;
                Ok::<_, SessionError>(encoder.forward(&samples)?)
            };
            let (tiled, whole) = (run(true)?, run(false)?);
            assert_eq!(whole.dims()[..2], [2, cfg.frames(samples.dim(1)?).unwrap_or(0)]);
            let difference = (&tiled - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
            // products of another height may be summed in another order
            assert!(difference < 1e-5, "{difference}");
        }
        Ok(())
    }

    #[test]
    fn frames_of_the_published_stack() {
        let cfg = FeatureConfig::default();
        assert_eq!(cfg.lengths(160_000), Some(vec![31999, 15999, 7999, 3999, 1999, 999, 499]));
        assert_eq!((cfg.frames(400), cfg.frames(399)), (Some(1), None));
        assert!(cfg.frames_of("input_values", 399).unwrap_err().to_string().contains("399 samples"));
    }
}
