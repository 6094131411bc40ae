//! wav2vec 2.0: convolutions on the samples, a convolution for positions, and an encoder with bidirectional attention,
//! normalised after or before each half of a layer; and what HuBERT, WavLM and UniSpeech take over from it.
//! Source: wav2vec 2.0 (arXiv:2006.11477). Mirrors `transformers.Wav2Vec2Model`, `Wav2Vec2ForCTC`,
//! `Wav2Vec2ForSequenceClassification`, `Wav2Vec2ForAudioFrameClassification` and `Wav2Vec2ForXVector`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, SelfAttention};
use roofbench_nn::conv::{Conv1d, Conv1dConfig};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::{Mlp, gated};
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::relative_bias::{Buckets, RelativeBias};
use serde::Deserialize;

use super::activation_dtype;
use super::features::{FeatureConfig, FeatureEncoder, FeatureProjection, PositionalConv, TORCH_EPS};

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "Wav2Vec2Model",
    "Wav2Vec2ForCTC",
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2ForAudioFrameClassification",
    "Wav2Vec2ForXVector",
];

/// Names in published checkpoints of a family whose encoder is `$prefix`.
macro_rules! alias_rules {
    ($prefix:literal) => {
        &[
            // the first is for configs that mask nothing in training
            AliasRule::drop(r"(^|\.)masked_spec_embed$", AliasScope::Always),
            // weight norm as torch named it until 2.0
            AliasRule::rename(
                r"\.pos_conv_embed\.conv\.weight_g$",
                ".pos_conv_embed.conv.parametrizations.weight.original0",
                AliasScope::Always,
            ),
            AliasRule::rename(
                r"\.pos_conv_embed\.conv\.weight_v$",
                ".pos_conv_embed.conv.parametrizations.weight.original1",
                AliasScope::Always,
            ),
            AliasRule::drop(r"\.num_batches_tracked$", AliasScope::Always),
            // heads of pre-training
            AliasRule::drop(
                r"^(quantizer|project_q|project_hid|ctc_proj|speaker_proj|layer_norm_for_extract)\.",
                AliasScope::Always,
            ),
            AliasRule::drop(r"^label_embeddings_concat$", AliasScope::Always),
            // a base model from a checkpoint with a head, the linear `feature_extractor` of XVector among them
            AliasRule::drop(r"^(lm_head|projector|classifier|tdnn|objective)\.", AliasScope::Base),
            AliasRule::drop(r"^(layer_weights|feature_extractor\.(weight|bias))$", AliasScope::Base),
            AliasRule::rename(concat!("^", $prefix, r"\."), "", AliasScope::Base),
            // a head from a checkpoint saved by the base model
            AliasRule::rename(
                r"^(feature_extractor\.conv_layers|feature_projection|encoder|adapter|masked_spec_embed)",
                concat!($prefix, ".$1"),
                AliasScope::Head,
            ),
        ]
    };
}
pub(super) use alias_rules;

/// What sets a family apart.
#[derive(Debug)]
pub(super) struct Variant {
    /// Where a class with a head has its encoder.
    pub(super) prefix: &'static str,
    /// How its class names begin.
    pub(super) stem: &'static str,
    /// A convolutional adapter may follow the encoder.
    pub(super) adapter: bool,
    /// Attention has gated relative positions.
    pub(super) gated_positions: bool,
    /// The model gives the normalised channels of the convolutions, too.
    pub(super) extract_features: bool,
    /// The config says what precedes the projection and the positional convolution.
    pub(super) feature_norms: bool,
    /// The vector that masks frames in training is there even where the config masks none.
    pub(super) always_masked: bool,
}

impl Variant {
    /// The rules among `rules`, made by [`alias_rules`], that hold for the config of `spec`.
    pub(super) fn aliases(&self, rules: &'static [AliasRule], spec: &ModelSpec) -> &'static [AliasRule] {
        if masks_frames(spec) || self.always_masked { &rules[1..] } else { rules }
    }
}

/// Whether frames or features were masked in training, so that the checkpoint has what stood in their place.
pub(super) fn masks_frames(spec: &ModelSpec) -> bool {
    let probability = |field: &str, default: f64| match spec.config.get(field) {
        None => default,
        Some(value) => value.as_f64().unwrap_or(default),
    };
    probability("mask_time_prob", 0.05) > 0.0 || probability("mask_feature_prob", 0.0) > 0.0
}

const VARIANT: Variant = Variant {
    prefix: "wav2vec2",
    stem: "Wav2Vec2",
    adapter: true,
    gated_positions: false,
    extract_features: true,
    feature_norms: false,
    always_masked: false,
};

const RULES: &[AliasRule] = alias_rules!("wav2vec2");

/// How published checkpoints of `spec` name the tensors that [`load`] asks for.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    VARIANT.aliases(RULES, spec)
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<SpeechModel, SessionError> {
    SpeechModel::load(&VARIANT, spec, vb)
}

/// The part of `config.json` that shapes the computation, without [`FeatureConfig`]; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SpeechConfig {
    /// Size of the vocabulary of `ForCTC`.
    pub vocab_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward half.
    pub intermediate_size: usize,
    /// Activation of the feed-forward half.
    pub hidden_act: Activation,
    /// Norms come before each half of a layer and after the last layer, instead of after each half and before the first.
    pub do_stable_layer_norm: bool,
    /// Width inside the adapter of a layer, which those with norms before may have.
    pub adapter_attn_dim: Option<usize>,
    /// `mask_time_indices` are heeded.
    pub apply_spec_augment: bool,
    /// Convolutions that shorten the sequence follow the encoder.
    pub add_adapter: bool,
    /// Their number.
    pub num_adapter_layers: usize,
    /// Their taps.
    pub adapter_kernel_size: usize,
    /// Their stride.
    pub adapter_stride: usize,
    /// Their width; `hidden_size` where absent.
    pub output_hidden_size: Option<usize>,
    /// A head takes a weighted sum of the states between layers.
    pub use_weighted_layer_sum: bool,
    /// Width of the projection of `ForSequenceClassification`.
    pub classifier_proj_size: usize,
    /// Widths of the convolutions of `ForXVector`.
    pub tdnn_dim: Vec<usize>,
    /// Their taps.
    pub tdnn_kernel: Vec<usize>,
    /// Frames from tap to tap.
    pub tdnn_dilation: Vec<usize>,
    /// Width of the embeddings of `ForXVector`.
    pub xvector_output_dim: usize,
    /// Buckets of WavLM's relative positions.
    pub num_buckets: usize,
    /// From this distance on all are in the last.
    pub max_bucket_distance: usize,
    /// What shapes the frames: the same file's.
    #[serde(skip)]
    pub features: FeatureConfig,
}

/// What `transformers.Wav2Vec2Config` and `WavLMConfig` take for fields that a file leaves out.
impl Default for SpeechConfig {
    fn default() -> Self {
        Self {
            vocab_size: 32,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            do_stable_layer_norm: false,
            adapter_attn_dim: None,
            apply_spec_augment: true,
            add_adapter: false,
            num_adapter_layers: 3,
            adapter_kernel_size: 3,
            adapter_stride: 2,
            output_hidden_size: None,
            use_weighted_layer_sum: false,
            classifier_proj_size: 256,
            tdnn_dim: vec![512, 512, 512, 512, 1500],
            tdnn_kernel: vec![5, 3, 3, 1, 1],
            tdnn_dilation: vec![1, 2, 3, 1, 1],
            xvector_output_dim: 512,
            num_buckets: 320,
            max_bucket_distance: 800,
            features: FeatureConfig::default(),
        }
    }
}

impl SpeechConfig {
    fn from_spec(variant: &Variant, spec: &ModelSpec) -> Result<Self, SessionError> {
        let mut cfg: Self = spec.parse_config()?;
        cfg.features = FeatureConfig::from_spec(spec)?;
        config::sizes(&[
            ("vocab_size", cfg.vocab_size),
            ("num_hidden_layers", cfg.num_hidden_layers),
            ("num_attention_heads", cfg.num_attention_heads),
            ("intermediate_size", cfg.intermediate_size),
            ("adapter_attn_dim", cfg.adapter_attn_dim.unwrap_or(1)),
            ("num_adapter_layers", cfg.num_adapter_layers),
            ("adapter_kernel_size", cfg.adapter_kernel_size),
            ("adapter_stride", cfg.adapter_stride),
            ("output_hidden_size", cfg.output_size()),
            ("classifier_proj_size", cfg.classifier_proj_size),
            ("xvector_output_dim", cfg.xvector_output_dim),
        ])?;
        let hidden = ("hidden_size", cfg.features.hidden_size);
        config::multiple(hidden, ("num_attention_heads", cfg.num_attention_heads))?;
        if !variant.adapter {
            config::refuse_unless(spec, "add_adapter", &[false.into()])?;
        }
        if !variant.feature_norms {
            config::refuse_unless(spec, "feat_proj_layer_norm", &[true.into()])?;
            config::refuse_unless(spec, "conv_pos_batch_norm", &[false.into()])?;
        }
        if variant.gated_positions || !cfg.do_stable_layer_norm {
            // the class has them in no other layers
            cfg.adapter_attn_dim = None;
        }
        Ok(cfg)
    }

    fn output_size(&self) -> usize {
        self.output_hidden_size.unwrap_or(self.features.hidden_size)
    }

    fn layer_norm(&self, vb: VarBuilder) -> Result<LayerNorm> {
        LayerNorm::load(self.features.hidden_size, self.features.layer_norm_eps, vb)
    }

    fn attention(&self) -> Attention {
        let heads = self.num_attention_heads;
        let head_dim = self.features.hidden_size / heads;
        Attention { heads, kv_heads: heads, head_dim, scale: None, pattern: Pattern::Full }
    }

    /// Width in, width out, taps and dilation of each convolution of `ForXVector`.
    fn tdnn(&self) -> impl Iterator<Item = [usize; 4]> {
        let inputs = self.tdnn_dim.first().into_iter().chain(&self.tdnn_dim);
        let taps = self.tdnn_kernel.iter().zip(&self.tdnn_dilation);
        inputs
            .zip(&self.tdnn_dim)
            .zip(taps)
            .map(|((&input, &output), (&kernel, &dilation))| [input, output, kernel, dilation])
    }

    fn check_tdnn(&self) -> Result<(), SessionError> {
        let lists =
            [("tdnn_dim", &self.tdnn_dim), ("tdnn_kernel", &self.tdnn_kernel), ("tdnn_dilation", &self.tdnn_dilation)];
        for (field, list) in lists {
            if list.is_empty() || list.len() != self.tdnn_dim.len() {
                let reason = format!("has {} numbers, tdnn_dim {}", list.len(), self.tdnn_dim.len());
                return Err(config::invalid(field, reason));
            }
            for &size in list {
                config::sizes(&[(field, size)])?;
            }
        }
        Ok(())
    }

    /// Frames after each convolution of the adapter.
    fn adapted(&self, mut frames: usize) -> Vec<usize> {
        let windows = (0..self.num_adapter_layers).map(|_| {
            frames =
                (frames + 2).checked_sub(self.adapter_kernel_size).map_or(0, |rest| rest / self.adapter_stride + 1);
            frames
        });
        windows.collect()
    }
}

/// How much of the bias of relative positions each head takes at each frame (arXiv:2110.13900).
struct PositionGate {
    /// From a head's part of the stream to two sums, which the checkpoint has as four numbers each.
    linear: Linear,
    constant: Tensor, // (heads)
    heads: usize,
}

impl PositionGate {
    fn load(attention: &Attention, vb: VarBuilder) -> Result<Self> {
        let &Attention { heads, head_dim, .. } = attention;
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let linear = vb.pp("gru_rel_pos_linear");
        let weight = linear.get((8, head_dim), "weight")?.reshape((2, 4, head_dim))?.sum(1)?;
        let bias = linear.get(8, "bias")?.reshape((2, 4))?.sum(1)?;
        Ok(Self {
            linear: Linear::new(&weight, Some(&bias))?,
            constant: vb.get((1, heads, 1, 1), "gru_rel_pos_const")?.reshape(heads)?.to_dtype(dtype)?,
            heads,
        })
    }

    /// (batch, seq, hidden) -> (batch, heads, seq)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let sums = self.linear.forward(&x.reshape((batch, seq, self.heads, ()))?)?;
        let gates = Activation::Sigmoid.forward(&sums)?;
        let gate = |at: usize| gates.narrow(3, at, 1)?.squeeze(3); // (batch, seq, heads)
        roofbench_nn::cost::elementwise(batch * seq * self.heads, 4);
        let inner = (gate(1)?.broadcast_mul(&self.constant)? - 1.0)?;
        ((gate(0)? * inner)? + 2.0)?.transpose(1, 2)?.contiguous()
    }
}

/// What all layers see of a pass.
struct Pass<'a> {
    /// Of the frames that exist.
    padding: Option<Mask>,
    positions: Option<&'a RelativeBias>,
}

struct Layer {
    self_attention: SelfAttention,
    gate: Option<PositionGate>,
    out_proj: Linear,
    layer_norm: LayerNorm,
    feed_forward: Mlp,
    final_layer_norm: LayerNorm,
    /// Norm and bottleneck, as the multilingual checkpoints of MMS have them.
    adapter_layer: Option<(LayerNorm, Mlp)>,
    stable: bool,
}

impl Layer {
    fn load(variant: &Variant, cfg: &SpeechConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, attention) = (cfg.features.hidden_size, cfg.attention());
        let (qkv, inner) = (["q_proj", "k_proj", "v_proj"], vb.pp("attention"));
        let dense = ["intermediate_dense", "output_dense"];
        let adapter = |dim: usize| -> Result<_> {
            let vb = vb.pp("adapter_layer");
            let mlp = Mlp::load([hidden, dim], Activation::Relu, true, ["linear_1", "linear_2"], vb.clone())?;
            Ok((LayerNorm::load(hidden, TORCH_EPS, vb.pp("norm"))?, mlp))
        };
        let sizes = [hidden, cfg.intermediate_size];
        Ok(Self {
            self_attention: SelfAttention::load(hidden, attention, qkv, true, inner.clone())?,
            gate: if variant.gated_positions { Some(PositionGate::load(&attention, inner.clone())?) } else { None },
            out_proj: Linear::load(hidden, hidden, true, inner.pp("out_proj"))?,
            layer_norm: cfg.layer_norm(vb.pp("layer_norm"))?,
            feed_forward: Mlp::load(sizes, cfg.hidden_act, true, dense, vb.pp("feed_forward"))?,
            final_layer_norm: cfg.layer_norm(vb.pp("final_layer_norm"))?,
            adapter_layer: cfg.adapter_attn_dim.map(adapter).transpose()?,
            stable: cfg.do_stable_layer_norm,
        })
    }

    /// Attention over `x`, added to `residual`; all are (batch, seq, hidden).
    fn attend(&self, x: &Tensor, residual: &Tensor, pass: &Pass) -> Result<Tensor> {
        let biased = match (&self.gate, pass.positions) {
            (Some(gate), Some(positions)) => {
                let bias = positions.forward_gated(&gate.forward(x)?)?;
                Some(pass.padding.clone().unwrap_or_default().with_bias(&bias)?)
            }
            _ => None,
        };
        let attended = self.self_attention.forward(x, biased.as_ref().or(pass.padding.as_ref()))?;
        self.out_proj.forward_add(&attended, residual)
    }

    /// `x` and the result are (batch, seq, hidden).
    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        if !self.stable {
            let x = self.layer_norm.forward(&self.attend(x, x, pass)?)?;
            return self.final_layer_norm.forward(&self.feed_forward.forward_add(&x, &x)?);
        }
        let x = self.attend(&self.layer_norm.forward(x)?, x, pass)?;
        let x = self.feed_forward.forward_add(&self.final_layer_norm.forward(&x)?, &x)?;
        match &self.adapter_layer {
            Some((norm, mlp)) => mlp.forward_add(&norm.forward(&x)?, &x),
            None => Ok(x),
        }
    }
}

/// The weighted sum of the states before, between and after the layers, where a head wants it.
pub(super) struct LayerSum<'a> {
    weights: std::slice::Iter<'a, f64>,
    pub(super) sum: Option<Tensor>,
}

impl<'a> LayerSum<'a> {
    pub(super) fn new(weights: &'a [f64]) -> Self {
        Self { weights: weights.iter(), sum: None }
    }

    pub(super) fn add(&mut self, x: &Tensor) -> Result<()> {
        let Some(&weight) = self.weights.next() else { return Ok(()) };
        roofbench_nn::cost::elementwise(x.elem_count(), 2);
        let weighted = (x * weight)?;
        self.sum = Some(match self.sum.take() {
            Some(sum) => (sum + weighted)?,
            None => weighted,
        });
        Ok(())
    }
}

struct Encoder {
    pos_conv_embed: PositionalConv,
    layer_norm: LayerNorm,
    layers: Vec<Layer>,
    positions: Option<RelativeBias>,
    stable: bool,
}

impl Encoder {
    fn load(variant: &Variant, cfg: &SpeechConfig, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| Layer::load(variant, cfg, vb.pp(format!("layers.{i}")));
        let buckets = Buckets { count: cfg.num_buckets, max_distance: cfg.max_bucket_distance, bidirectional: true };
        let table = || RelativeBias::load(buckets, cfg.num_attention_heads, vb.pp("layers.0.attention.rel_attn_embed"));
        Ok(Self {
            pos_conv_embed: PositionalConv::load(&cfg.features, vb.pp("pos_conv_embed"))?,
            layer_norm: cfg.layer_norm(vb.pp("layer_norm"))?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            positions: if variant.gated_positions { Some(table()?) } else { None },
            stable: cfg.do_stable_layer_norm,
        })
    }

    /// (batch, frames, hidden) both; `layer_weights` ask for the weighted sum of the states instead of the last.
    fn forward(&self, x: &Tensor, padding: Option<Mask>, layer_weights: &[f64]) -> Result<Tensor> {
        let pass = Pass { padding, positions: self.positions.as_ref() };
        let mut states = LayerSum::new(layer_weights);
        let mut x = self.pos_conv_embed.forward(x)?;
        if !self.stable {
            x = self.layer_norm.forward(&x)?;
        }
        states.add(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x, &pass)?;
            states.add(&x)?;
        }
        match states.sum {
            Some(sum) => Ok(sum),
            None if self.stable => self.layer_norm.forward(&x),
            None => Ok(x),
        }
    }
}

/// Convolutions after the encoder, each of which may shorten the sequence.
struct Adapter {
    proj: Option<(Linear, LayerNorm)>,
    layers: Vec<Conv1d>,
}

impl Adapter {
    fn load(cfg: &SpeechConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, out) = (cfg.features.hidden_size, cfg.output_size());
        let proj = || -> Result<_> {
            let norm = LayerNorm::load(out, TORCH_EPS, vb.pp("proj_layer_norm"))?;
            Ok((Linear::load(hidden, out, true, vb.pp("proj"))?, norm))
        };
        let kernel = cfg.adapter_kernel_size;
        let config = Conv1dConfig { stride: cfg.adapter_stride, padding: (1, 1), ..Conv1dConfig::new(kernel) };
        let layer = |i: usize| {
            let vb = vb.pp(format!("layers.{i}.conv"));
            // the second half is the gate of the first: here it comes first
            let swapped = |x: Tensor| Tensor::cat(&[x.narrow(0, out, out)?, x.narrow(0, 0, out)?], 0);
            let weight = swapped(vb.get((2 * out, out, kernel), "weight")?)?;
            Conv1d::new(&weight, Some(&swapped(vb.get(2 * out, "bias")?)?), config)
        };
        Ok(Self {
            proj: if out == hidden { None } else { Some(proj()?) },
            layers: (0..cfg.num_adapter_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// (batch, frames, hidden) -> (batch, shorter, out)
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        if let Some((proj, norm)) = &self.proj {
            x = norm.forward(&proj.forward(&x)?)?;
        }
        for conv in &self.layers {
            x = gated(&conv.forward(&x)?, Activation::Sigmoid)?;
        }
        Ok(x)
    }
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    /// Nothing.
    Base,
    /// Of `ForCTC`.
    Ctc,
    /// Of `ForSequenceClassification`, with its number of labels.
    Sequence { labels: usize },
    /// Of `ForAudioFrameClassification`, with its number of labels.
    Frames { labels: usize },
    /// Of `ForXVector`, with the number of speakers that it was trained on.
    XVector { speakers: usize },
}

impl HeadKind {
    fn of(variant: &Variant, spec: &ModelSpec) -> Result<Self, SessionError> {
        Ok(match spec.class.strip_prefix(variant.stem).unwrap_or_default() {
            "Model" => Self::Base,
            "ForCTC" => Self::Ctc,
            "ForSequenceClassification" => Self::Sequence { labels: label_count(&spec.config)? },
            "ForAudioFrameClassification" => Self::Frames { labels: label_count(&spec.config)? },
            "ForXVector" => Self::XVector { speakers: label_count(&spec.config)? },
            _ => return Err(config::unsupported_class(spec, crate::classes(&spec.family))),
        })
    }

    /// Whether the class may take a weighted sum of the states, and no adapter.
    fn takes_states(self) -> bool {
        !matches!(self, Self::Base | Self::Ctc)
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Base,
    Frames(Linear),
    Sequence { projector: Linear, classifier: Linear },
    XVector { projector: Linear, tdnn: Vec<Conv1d>, feature_extractor: Linear, classifier: Linear },
}

impl Head {
    /// `vb` is the checkpoint's root.
    fn load(kind: HeadKind, cfg: &SpeechConfig, vb: VarBuilder) -> Result<Self> {
        let hidden = cfg.features.hidden_size;
        let linear = |input, output, name: &str| Linear::load(input, output, true, vb.pp(name));
        Ok(match kind {
            HeadKind::Base => Self::Base,
            HeadKind::Ctc => {
                let width = if cfg.add_adapter { cfg.output_size() } else { hidden };
                Self::Frames(linear(width, cfg.vocab_size, "lm_head")?)
            }
            HeadKind::Frames { labels } => Self::Frames(linear(hidden, labels, "classifier")?),
            HeadKind::Sequence { labels } => Self::Sequence {
                projector: linear(hidden, cfg.classifier_proj_size, "projector")?,
                classifier: linear(cfg.classifier_proj_size, labels, "classifier")?,
            },
            HeadKind::XVector { speakers } => {
                let layer = |(at, [input, output, kernel, dilation]): (usize, [usize; 4])| {
                    let vb = vb.pp(format!("tdnn.{at}.kernel"));
                    let weight = vb.get((output, kernel * input), "weight")?.reshape((output, kernel, input))?;
                    let config = Conv1dConfig { dilation, ..Conv1dConfig::new(kernel) };
                    Conv1d::new(&weight.transpose(1, 2)?.contiguous()?, Some(&vb.get(output, "bias")?), config)
                };
                // of the training loss, and in a checkpoint as wide as there were speakers in training
                if vb.contains_tensor("objective.weight") {
                    vb.get((cfg.xvector_output_dim, speakers), "objective.weight")
                        .or_else(|_| vb.get_unchecked("objective.weight"))?;
                }
                let (first, last) = (cfg.tdnn_dim[0], cfg.tdnn_dim[cfg.tdnn_dim.len() - 1]);
                Self::XVector {
                    projector: linear(hidden, first, "projector")?,
                    tdnn: cfg.tdnn().enumerate().map(layer).collect::<Result<_>>()?,
                    feature_extractor: linear(2 * last, cfg.xvector_output_dim, "feature_extractor")?,
                    classifier: linear(cfg.xvector_output_dim, cfg.xvector_output_dim, "classifier")?,
                }
            }
        })
    }

    /// Output fields of the class from the encoder's (batch, frames, hidden), of which `lengths` exist.
    fn forward(&self, x: Tensor, lengths: Option<&[usize]>) -> Result<Tensors> {
        let named = |name: &str, x: Tensor| Tensors::from([(name.to_owned(), x)]);
        Ok(match self {
            Self::Base => named("last_hidden_state", x),
            Self::Frames(linear) => named("logits", linear.forward(&x)?),
            Self::Sequence { projector, classifier } => {
                // the class projects every frame and takes the mean then, which is the same
                roofbench_nn::cost::elementwise(x.elem_count(), 1);
                let pooled = by_item(&x, lengths, |x| x.mean(0))?; // (batch, hidden)
                named("logits", classifier.forward(&projector.forward(&pooled)?)?)
            }
            Self::XVector { projector, tdnn, feature_extractor, classifier } => {
                let mut x = projector.forward(&x)?;
                for conv in tdnn {
                    x = conv.forward_act(&x, Activation::Relu)?;
                }
                // sum for the mean, subtract it, square and sum
                roofbench_nn::cost::elementwise(x.elem_count(), 4);
                let statistics = by_item(&x, lengths, |x| {
                    let mean = x.mean_keepdim(0)?;
                    let squares = x.broadcast_sub(&mean)?.sqr()?.sum_keepdim(0)?;
                    Tensor::cat(&[mean, (squares / (x.dim(0)? as f64 - 1.0))?.sqrt()?], 1)?.squeeze(0)
                })?;
                let embeddings = feature_extractor.forward(&statistics)?; // (batch, xvector)
                let mut outputs = named("logits", classifier.forward(&embeddings)?);
                outputs.insert("embeddings".to_owned(), embeddings);
                outputs
            }
        })
    }
}

/// What `f` makes of the first `lengths` frames (frames, channels) of each item, of all where absent.
fn by_item(x: &Tensor, lengths: Option<&[usize]>, f: impl Fn(Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (batch, frames, _) = x.dims3()?;
    let item = |i: usize| f(x.get(i)?.narrow(0, 0, lengths.map_or(frames, |lengths| lengths[i].min(frames)))?);
    Tensor::stack(&(0..batch).map(item).collect::<Result<Vec<_>>>()?, 0)
}

/// The encoder with the head of its class.
pub struct SpeechModel {
    cfg: SpeechConfig,
    variant: &'static Variant,
    feature_extractor: FeatureEncoder,
    feature_projection: FeatureProjection,
    masked_spec_embed: Option<Tensor>,
    encoder: Encoder,
    adapter: Option<Adapter>,
    /// Softmax of the checkpoint's, where the states are summed.
    layer_weights: Vec<f64>,
    head: Head,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl SpeechModel {
    pub(super) fn load(variant: &'static Variant, spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(variant, spec)?, SpeechConfig::from_spec(variant, spec)?);
        if kind.takes_states() {
            config::refuse_unless(spec, "add_adapter", &[false.into()])?;
        }
        if matches!(kind, HeadKind::XVector { .. }) {
            cfg.check_tdnn()?;
        }
        let base = if kind == HeadKind::Base { vb.clone() } else { vb.pp(variant.prefix) };
        let dtype = activation_dtype(spec.dtype, &spec.device);
        let hidden = cfg.features.hidden_size;
        // some checkpoints have it and some have not, whatever the config says
        let masked_spec_embed = match base.contains_tensor("masked_spec_embed") {
            true => Some(base.get(hidden, "masked_spec_embed")?.to_dtype(dtype)?),
            false => None,
        };
        let layer_weights = match kind.takes_states() && cfg.use_weighted_layer_sum {
            true => softmax(&vb.get(cfg.num_hidden_layers + 1, "layer_weights")?)?,
            false => Vec::new(),
        };
        Ok(Self {
            feature_extractor: FeatureEncoder::load(&cfg.features, base.pp("feature_extractor"))?,
            feature_projection: FeatureProjection::load(&cfg.features, base.pp("feature_projection"))?,
            masked_spec_embed,
            encoder: Encoder::load(variant, &cfg, base.pp("encoder"))?,
            adapter: if cfg.add_adapter { Some(Adapter::load(&cfg, base.pp("adapter"))?) } else { None },
            layer_weights,
            head: Head::load(kind, &cfg, vb)?,
            kind,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            variant,
            cfg,
        })
    }

    fn forward(&self, sounds: &Sounds) -> Result<Tensors> {
        let dtype = activation_dtype(self.dtype, &self.device);
        let input_values = sounds.values.to_device(&self.device)?.to_dtype(dtype)?;
        let features = self.feature_extractor.forward(&input_values)?;
        let (mut x, extract_features) = self.feature_projection.forward(features)?; // (batch, frames, hidden)
        if let (Some(masked), Some(embed)) = (&sounds.masked, &self.masked_spec_embed) {
            let masked = masked.to_device(&self.device)?.unsqueeze(2)?.broadcast_as(x.shape())?;
            x = masked.where_cond(&embed.broadcast_as(x.shape())?, &x)?;
        }
        let mut padding = None;
        if let Some(exists) = &sounds.exists {
            let exists = exists.to_device(&self.device)?;
            padding = Mask::padding(&exists)?;
            if padding.is_some() {
                x = x.broadcast_mul(&exists.to_dtype(dtype)?.unsqueeze(2)?)?;
            }
        }
        let mut x = self.encoder.forward(&x, padding, &self.layer_weights)?;
        if let Some(adapter) = &self.adapter {
            x = adapter.forward(x)?;
        }
        let mut outputs = self.head.forward(x, sounds.lengths.as_deref())?;
        if self.kind == HeadKind::Base && self.variant.extract_features {
            outputs.insert("extract_features".to_owned(), extract_features);
        }
        Ok(outputs)
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Sounds<'a>, SessionError> {
        let sounds = Sounds::read(&self.cfg, self.kind, call)?;
        if sounds.masked.is_some() && self.masked_spec_embed.is_none() {
            let reason = "the checkpoint has no masked_spec_embed to put in place of masked frames";
            return Err(SessionError::input("mask_time_indices", reason));
        }
        Ok(sounds)
    }
}

/// Of a vector, on the host.
pub(super) fn softmax(x: &Tensor) -> Result<Vec<f64>> {
    let x = x.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = x.iter().map(|x| (x - top).exp()).collect();
    let total: f64 = exponentials.iter().sum();
    Ok(exponentials.into_iter().map(|x| x / total).collect())
}

/// The tensor arguments of `forward`, checked.
struct Sounds<'a> {
    /// (batch, samples)
    values: &'a Tensor,
    frames: usize,
    /// (batch, frames) of 0 and 1, where there is a mask.
    exists: Option<Tensor>,
    /// Per item the frames that the head takes, where there is a mask.
    lengths: Option<Vec<usize>>,
    /// (batch, frames), not 0 where a frame is replaced.
    masked: Option<Tensor>,
}

impl<'a> Sounds<'a> {
    fn read(cfg: &SpeechConfig, kind: HeadKind, call: &'a Call) -> Result<Self, SessionError> {
        let known = ["input_values", "attention_mask", "mask_time_indices"];
        let inputs = Inputs::forward(call, &known[..if kind == HeadKind::Base { 3 } else { 2 }], &[])?;
        let values = inputs.sounds("input_values")?;
        let (batch, samples) = values.dims2()?;
        let frames = cfg.features.frames_of("input_values", samples)?;
        let matrix = |name: &str, shape: [usize; 2]| match call.inputs.contains_key(name) {
            false => Ok(None),
            true => match inputs.matrix(name)? {
                tensor if tensor.dims() == shape => Ok(Some(tensor)),
                tensor => {
                    let reason = format!("has shape {:?}, expected {shape:?}", tensor.dims());
                    Err(SessionError::input(name, reason))
                }
            },
        };
        let masked = matrix("mask_time_indices", [batch, frames])?.filter(|_| cfg.apply_spec_augment);
        let masked = masked.map(|masked| masked.ne(0i64)).transpose()?;
        let after_tdnn = |frames: usize, dilated: bool| {
            // the class counts no dilation where it counts the frames of an item
            cfg.tdnn().try_fold(frames, |frames, [_, _, kernel, dilation]| {
                frames.checked_sub((kernel - 1) * if dilated { dilation } else { 1 }).filter(|frames| *frames > 0)
            })
        };
        if matches!(kind, HeadKind::XVector { .. }) && after_tdnn(frames, true).is_none() {
            let reason = format!("a sound of {samples} samples, {frames} frames, is too short for the tdnn layers");
            return Err(SessionError::input("input_values", reason));
        }
        if cfg.add_adapter && cfg.adapted(frames).last().is_some_and(|frames| *frames == 0) {
            let reason = format!("a sound of {samples} samples, {frames} frames, is too short for the adapter");
            return Err(SessionError::input("input_values", reason));
        }
        let Some(mask) = matrix("attention_mask", [batch, samples])? else {
            return Ok(Self { values, frames, exists: None, lengths: None, masked });
        };
        zero_or_one("attention_mask", &mask)?;
        let counts = mask.sum(1)?.to_vec1::<i64>()?;
        let mut lengths = Vec::with_capacity(batch);
        let mut exists = Vec::with_capacity(batch * frames);
        for (item, count) in counts.into_iter().enumerate() {
            let too_short =
                || SessionError::input("attention_mask", format!("item {item} has {count} samples, too few to run on"));
            let length = cfg.features.frames(count as usize).ok_or_else(too_short)?;
            exists.extend((0..frames).map(|frame| i64::from(frame < length)));
            lengths.push(match kind {
                HeadKind::XVector { .. } => after_tdnn(length, false).ok_or_else(too_short)?,
                _ => length,
            });
        }
        let exists = Tensor::from_vec(exists, (batch, frames), &Device::Cpu)?;
        Ok(Self { values, frames, exists: Some(exists), lengths: Some(lengths), masked })
    }
}

impl Session for SpeechModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&self.read(call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let sounds = self.read(call)?;
        let (batch, samples) = sounds.values.dims2()?;
        let shape = [batch, samples, sounds.frames];
        let cost = forward_cost(self.variant, &self.cfg, self.kind, shape, self.dtype.size_in_bytes() as u64);
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass over (batch, samples), which make so many frames, all of them attended to.
fn forward_cost(
    variant: &Variant,
    cfg: &SpeechConfig,
    kind: HeadKind,
    [batch, samples, frames]: [usize; 3],
    bytes: u64,
) -> Cost {
    let features = cfg.features.cost(batch, samples, bytes) + cfg.features.position_cost(batch, frames, bytes);
    let [batch, seq, hidden, inner, heads, layers] = [
        batch,
        frames,
        cfg.features.hidden_size,
        cfg.intermediate_size,
        cfg.num_attention_heads,
        cfg.num_hidden_layers,
    ]
    .map(|n| n as u64);
    let (tokens, head_dim) = (batch * seq, hidden / heads);
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let activation = |elements| cost::elementwise(elements, 1); // one, whichever it is
    let residual = cost::elementwise(tokens * hidden, 1);
    let attention = cost::Attention {
        batch,
        heads,
        kv_heads: heads,
        head_dim,
        queries: seq,
        cached: 0,
        visible_pairs: cost::full_pairs(seq, seq),
    };
    let positions = if variant.gated_positions {
        linear(tokens * heads, head_dim, 2) + activation(tokens * heads * 2)
            + cost::elementwise(tokens * heads, 4) // of two numbers, the factor
            + cost::elementwise(tokens * heads * seq, 1) // on the bias
            + Cost { weight_bytes: heads * bytes, ..Cost::default() }
    } else {
        Cost::default()
    };
    let adapter_layer = match cfg.adapter_attn_dim {
        Some(dim) => {
            let dim = dim as u64;
            norm(tokens, hidden)
                + linear(tokens, hidden, dim)
                + activation(tokens * dim)
                + linear(tokens, dim, hidden)
                + residual
        }
        None => Cost::default(),
    };
    let layer = linear(tokens, hidden, 3 * hidden) // query, key and value
        + positions
        + attention.cost(bytes)
        + linear(tokens, hidden, hidden) + residual + norm(tokens, hidden)
        + linear(tokens, hidden, inner) + activation(tokens * inner)
        + linear(tokens, inner, hidden) + residual + norm(tokens, hidden)
        + adapter_layer;
    let summed = kind.takes_states() && cfg.use_weighted_layer_sum;
    let ends = match (summed, cfg.do_stable_layer_norm) {
        // a multiply-add for each state; the last norm is not needed
        (true, stable) => {
            let states = cost::elementwise(tokens * hidden * (layers + 1), 2);
            if stable { states } else { states + norm(tokens, hidden) }
        }
        (false, _) => norm(tokens, hidden),
    };
    let table = if variant.gated_positions { cfg.num_buckets as u64 * heads * bytes } else { 0 };
    let encoder = layer * layers + ends + Cost { weight_bytes: table, ..Cost::default() };
    features + encoder + adapter_cost(cfg, [batch, seq], bytes) + head_cost(cfg, kind, [batch, seq], bytes)
}

/// Of the convolutions after the encoder, if any, over (batch, frames).
fn adapter_cost(cfg: &SpeechConfig, [batch, frames]: [u64; 2], bytes: u64) -> Cost {
    if !cfg.add_adapter {
        return Cost::default();
    }
    let [hidden, out, kernel] =
        [cfg.features.hidden_size, cfg.output_size(), cfg.adapter_kernel_size].map(|n| n as u64);
    let mut cost = Cost::default();
    if out != hidden {
        cost += cost::linear(batch * frames, hidden, out, true, bytes)
            + cost::norm(Norm::Layer, batch * frames, out, bytes);
    }
    for length in cfg.adapted(frames as usize) {
        let conv = cost::Conv2d {
            batch,
            in_channels: out,
            out_channels: 2 * out,
            kernel: [1, kernel],
            groups: 1,
            output: [1, length as u64],
            bias: true,
        };
        cost += conv.cost(bytes) + cost::elementwise(batch * length as u64 * out, 2); // gate and product
    }
    cost
}

/// Of the head, over (batch, frames).
fn head_cost(cfg: &SpeechConfig, kind: HeadKind, [batch, frames]: [u64; 2], bytes: u64) -> Cost {
    let hidden = cfg.features.hidden_size as u64;
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    match kind {
        HeadKind::Base => Cost::default(),
        HeadKind::Ctc if cfg.add_adapter => {
            let frames = cfg.adapted(frames as usize).last().copied().unwrap_or_default() as u64;
            linear(batch * frames, cfg.output_size() as u64, cfg.vocab_size as u64)
        }
        HeadKind::Ctc => linear(batch * frames, hidden, cfg.vocab_size as u64),
        HeadKind::Frames { labels } => linear(batch * frames, hidden, labels as u64),
        HeadKind::Sequence { labels } => {
            let width = cfg.classifier_proj_size as u64;
            cost::elementwise(batch * frames * hidden, 1) // mean
                + linear(batch, hidden, width) + linear(batch, width, labels as u64)
        }
        HeadKind::XVector { .. } => {
            let mut cost = linear(batch * frames, hidden, cfg.tdnn_dim[0] as u64);
            let (mut length, mut width) = (frames, 0);
            for [input, output, kernel, dilation] in cfg.tdnn().map(|sizes| sizes.map(|n| n as u64)) {
                length -= (kernel - 1) * dilation;
                width = output;
                let conv = cost::Conv2d {
                    batch,
                    in_channels: input,
                    out_channels: output,
                    kernel: [1, kernel],
                    groups: 1,
                    output: [1, length],
                    bias: true,
                };
                cost += conv.cost(bytes) + cost::elementwise(batch * length * output, 1);
            }
            let out = cfg.xvector_output_dim as u64;
            cost + cost::elementwise(batch * length * width, 4) // mean and deviation
                + linear(batch, 2 * width, out) + linear(batch, out, out)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({});
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("wav2vec2", class, config)
    }

    fn cost_of(class: &str, changes: Value, shape: [usize; 2]) -> Cost {
        let spec = spec(class, changes);
        let cfg = SpeechConfig::from_spec(&VARIANT, &spec).expect("a config");
        let frames = cfg.features.frames(shape[1]).expect("long enough");
        forward_cost(&VARIANT, &cfg, HeadKind::of(&VARIANT, &spec).expect("a class"), [shape[0], shape[1], frames], 4)
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        let tiny = json!({
            "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": 5,
            "conv_dim": [2, 3], "conv_kernel": [3, 2], "conv_stride": [2, 1],
            "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2,
        });
        // 9 samples: 4 windows of 3, then 3 of 2
        let convolutions = 4 * (2 * 3 + 2 * 9) // moments of the windows
            + (2 * 4 * 2 * 3 + 4 * 2 + 4 * 2) // first: products, folded norm, activation
            + (2 * 3 * 3 * (2 * 2) + 3 * 3); // second: products, activation
        let projection = 7 * 3 * 3 + 2 * 3 * 3 * 4 + 3 * 4;
        let positions = 2 * 3 * 4 * (2 * 2) + 3 * 4 + 2 * 3 * 4; // products, bias, activation and sum
        let layer = 2 * 3 * 4 * 12 + 3 * 12 // query, key, value
            + 2 * (2 * 9) * 2 * 2 + 5 * (2 * 9) // two products over 9 pairs of 2 heads, softmax
            + 2 * 3 * 4 * 4 + 3 * 4 + 3 * 4 // output, residual
            + 2 * 3 * 4 * 6 + 3 * 6 + 3 * 6 // up, activation
            + 2 * 3 * 6 * 4 + 3 * 4 + 3 * 4 // down, residual
            + 2 * (7 * 3 * 4); // norms
        let head = 2 * 3 * 4 * 5 + 3 * 5;
        let cost = cost_of("Wav2Vec2ForCTC", tiny, [1, 9]);
        assert_eq!(cost.flops, convolutions + projection + positions + layer + 7 * 3 * 4 + head);
    }

    #[test]
    fn cost_of_wav2vec2_base_reads_every_parameter() {
        let cost = cost_of("Wav2Vec2ForCTC", json!({}), [1, 160_000]);
        // 94 396 320 parameters, without the mask's vector and the 128 lengths of the positional weights
        assert_eq!(cost.weight_bytes, 4 * (94_396_320 - 768 - 128));
        let eight = cost_of("Wav2Vec2ForCTC", json!({}), [8, 160_000]);
        assert_eq!((eight.flops, eight.weight_bytes), (8 * cost.flops, cost.weight_bytes));
    }

    #[test]
    fn malformed_configs_and_what_is_not_supported_name_the_field() {
        let message = |changes: Value| {
            let spec = spec("Wav2Vec2Model", changes);
            SpeechConfig::from_spec(&VARIANT, &spec).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (
                json!({"num_attention_heads": 7}),
                "config.json: `hidden_size`: 768 is not a multiple of num_attention_heads",
            ),
            (json!({"conv_stride": [5]}), "config.json: `conv_stride`: has 1 numbers, conv_dim 7"),
            (json!({"conv_kernel": [10, 3, 3, 3, 3, 2, 0]}), "config.json: `conv_kernel`: 0 is not in"),
            (json!({"feat_extract_norm": "batch"}), "config.json: `feat_extract_norm`: unknown variant `batch`"),
            (json!({"conv_pos_batch_norm": true}), "config.json: `conv_pos_batch_norm` = true is not supported"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
        let class = HeadKind::of(&VARIANT, &spec("Wav2Vec2ForPreTraining", json!({}))).unwrap_err().to_string();
        assert!(class.starts_with("wav2vec2: class `Wav2Vec2ForPreTraining` is not supported"), "{class}");
    }

    #[test]
    fn sounds_that_do_not_fit_are_refused() {
        let spec = spec("Wav2Vec2Model", json!({}));
        let cfg = SpeechConfig::from_spec(&VARIANT, &spec).expect("a config");
        let message = |kind, samples: usize, mask: &[usize]| {
            let sounds = Tensor::zeros((2, samples), DType::F32, &Device::Cpu).expect("zeros");
            let mut call = Call { method: "forward".into(), ..Call::default() };
            call.inputs.insert("input_values".into(), sounds);
            let rows = mask.iter().flat_map(|&length| (0..samples).map(move |i| i64::from(i < length)));
            let mask = Tensor::from_vec(rows.collect(), (mask.len(), samples), &Device::Cpu).expect("a mask");
            call.inputs.insert("attention_mask".into(), mask);
            Sounds::read(&cfg, kind, &call).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(HeadKind::Base, 800, &[800, 400]), "");
        assert!(message(HeadKind::Base, 300, &[300, 300]).contains("a sound of 300 samples is shorter than a frame"));
        assert!(
            message(HeadKind::Base, 800, &[800]).contains("`attention_mask`: has shape [1, 800], expected [2, 800]")
        );
        assert!(message(HeadKind::Base, 800, &[800, 399]).contains("item 1 has 399 samples"));
        let x_vector = HeadKind::XVector { speakers: 2 };
        assert!(message(x_vector, 800, &[800, 800]).contains("too short for the tdnn layers"));
    }
}
