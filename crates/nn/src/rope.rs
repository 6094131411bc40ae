//! Rotary position embeddings: configuration in both of transformers' forms, frequencies of every type, rotation in
//! place.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::cost;
use crate::kernels::rope as kernel;
use crate::op::{self, Shared};
use crate::pool;

/// Which elements of a head are a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// The i-th of the first half and the i-th of the second (Llama, GPT-NeoX, Falcon, Phi).
    #[default]
    Half,
    /// Neighbours (GPT-J, the original RoFormer).
    Interleaved,
}

/// How the frequencies are stretched past the length of pre-training: `rope_type`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear {
        /// Of the length.
        factor: f64,
    },
    /// The base grows with the current length (NTK-aware).
    Dynamic {
        /// Of the length.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, between them a blend (Llama 3.1).
    Llama3 {
        /// Of the length.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
    },
    /// A ramp by the number of rotations over the original length (arXiv:2309.00071).
    Yarn {
        /// Of the length; the maximum over the original length where absent.
        factor: Option<f64>,
        /// On cosines and sines; from `factor` where absent.
        attention_factor: Option<f64>,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided by `factor`.
        beta_slow: f64,
        /// With `mscale_all_dim`: weight in the attention factor.
        mscale: Option<f64>,
        /// With `mscale`: weight in its divisor.
        mscale_all_dim: Option<f64>,
        /// Whether the ends of the ramp are whole numbers.
        truncate: bool,
    },
    /// A divisor per frequency, of two sets by the current length (arXiv:2402.13753).
    LongRope {
        /// Up to the original length.
        short_factor: Vec<f64>,
        /// Beyond it.
        long_factor: Vec<f64>,
        /// Of the length; the maximum over the original length where absent.
        factor: Option<f64>,
        /// On cosines and sines; from `factor` where absent.
        attention_factor: Option<f64>,
    },
}

/// The fields of `config.json` about rotary positions: `rope_parameters`, or `rope_theta`, `rope_scaling` and
/// `partial_rotary_factor` at the top. Meant to be `#[serde(flatten)]`ed into a model's own configuration.
///
/// ```
/// use roofbench_nn::rope::{RopeConfig, Scaling};
///
/// let new = r#"{"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}"#;
/// let old = r#"{"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}"#;
/// let config: RopeConfig = serde_json::from_str(new)?;
/// assert_eq!(config, serde_json::from_str(old)?);
/// assert_eq!((config.theta, config.scaling), (5000.0, Scaling::Linear { factor: 2.0 }));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "RawConfig")]
pub struct RopeConfig {
    /// Base of the frequencies; 10 000 where the file has none.
    pub theta: f64,
    /// Part of a head that is turned; all, or what a model's class has by default, where the file has none.
    pub partial_rotary_factor: Option<f64>,
    /// Positions of pre-training; where absent, as many as the model takes.
    pub original_max_position_embeddings: Option<usize>,
    /// The type.
    pub scaling: Scaling,
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self {
            theta: DEFAULT_THETA,
            partial_rotary_factor: None,
            original_max_position_embeddings: None,
            scaling: Scaling::Default,
        }
    }
}

const DEFAULT_THETA: f64 = 10_000.0;

/// A configuration that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RopeError {
    /// A type that is none of ours.
    #[error(
        "rope type `{0}` is not supported; known are default, linear, dynamic, llama3, yarn, longrope (also as `su`)"
    )]
    UnknownType(String),
    /// A field that the type needs.
    #[error("rope type `{kind}` needs the field `{field}`, which is missing in `rope_parameters` or `rope_scaling`")]
    Missing {
        /// The type.
        kind: String,
        /// The field.
        field: &'static str,
    },
    /// A field that changes the result in a way we do not know.
    #[error("`{0}` in `rope_parameters` or `rope_scaling` is not supported")]
    Unsupported(&'static str),
    /// A value outside of what it means.
    #[error("rope: `{field}` is {value}, expected {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: String,
    },
}

#[derive(Deserialize)]
struct RawConfig {
    rope_parameters: Option<RawParameters>,
    rope_scaling: Option<RawParameters>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Default, Deserialize)]
struct RawParameters {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    mrope_section: Option<IgnoredAny>,
    full_attention: Option<IgnoredAny>,
    sliding_attention: Option<IgnoredAny>,
}

impl TryFrom<RawConfig> for RopeConfig {
    type Error = RopeError;

    fn try_from(raw: RawConfig) -> std::result::Result<Self, RopeError> {
        let p = raw.rope_scaling.or(raw.rope_parameters).unwrap_or_default();
        for (field, there) in [
            ("mrope_section", p.mrope_section.is_some()),
            ("full_attention", p.full_attention.is_some()),
            ("sliding_attention", p.sliding_attention.is_some()),
        ] {
            if there {
                return Err(RopeError::Unsupported(field));
            }
        }
        let kind = p.rope_type.or(p.old_type).unwrap_or_else(|| "default".into());
        let need = |field, value: Option<f64>| value.ok_or_else(|| RopeError::Missing { kind: kind.clone(), field });
        let list =
            |field, value: Option<Vec<f64>>| value.ok_or_else(|| RopeError::Missing { kind: kind.clone(), field });
        let scaling = match kind.as_str() {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: need("factor", p.factor)? },
            "dynamic" => Scaling::Dynamic { factor: need("factor", p.factor)? },
            "llama3" => Scaling::Llama3 {
                factor: need("factor", p.factor)?,
                low_freq_factor: need("low_freq_factor", p.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", p.high_freq_factor)?,
            },
            "yarn" => Scaling::Yarn {
                factor: p.factor,
                attention_factor: p.attention_factor,
                // 0 is taken for absent, as transformers does
                beta_fast: p.beta_fast.filter(|x| *x != 0.0).unwrap_or(32.0),
                beta_slow: p.beta_slow.filter(|x| *x != 0.0).unwrap_or(1.0),
                mscale: p.mscale.filter(|x| *x != 0.0),
                mscale_all_dim: p.mscale_all_dim.filter(|x| *x != 0.0),
                truncate: p.truncate.unwrap_or(true),
            },
            "longrope" | "su" => Scaling::LongRope {
                short_factor: list("short_factor", p.short_factor)?,
                long_factor: list("long_factor", p.long_factor)?,
                factor: p.factor,
                attention_factor: p.attention_factor,
            },
            _ => return Err(RopeError::UnknownType(kind)),
        };
        Ok(Self {
            theta: p.rope_theta.or(raw.rope_theta).unwrap_or(DEFAULT_THETA),
            partial_rotary_factor: p.partial_rotary_factor.or(raw.partial_rotary_factor),
            // the one at the top comes first, as transformers has it for Phi-3
            original_max_position_embeddings: raw
                .original_max_position_embeddings
                .or(p.original_max_position_embeddings),
            scaling,
        })
    }
}

/// Where the rows of a call are in their sequences.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    /// So many, one after the other from the first given, the same for every item of the batch.
    From(usize, usize),
    /// (batch, seq), row by row, for items that are padded differently.
    PerItem {
        /// The positions, `seq` for each item.
        positions: &'a [u32],
        /// Rows of an item.
        seq: usize,
    },
}

/// Rotary positions of one attention layer, or of all that are configured alike.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use roofbench_nn::rope::{Positions, Rope, RopeConfig, Style};
///
/// let rope = Rope::new(&RopeConfig::default(), 2, 2048, Style::Half)?;
/// let table = rope.table(Positions::From(1, 1), &Device::Cpu)?;
/// let x = table.rotate(Tensor::new(&[[[1f32, 0.]]], &Device::Cpu)?)?; // (batch, seq, heads · head_dim)
/// assert_eq!(x.to_vec3::<f32>()?, [[[1f32.cos(), 1f32.sin()]]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rope {
    config: RopeConfig,
    style: Style,
    head_dim: usize,
    rotary: usize,
    max_positions: usize,
}

impl Rope {
    /// For heads of `head_dim` of a model that takes `max_position_embeddings` positions.
    ///
    /// # Errors
    /// When the part of a head that is turned is odd or more than the head, or a field's value has no meaning.
    pub fn new(
        config: &RopeConfig,
        head_dim: usize,
        max_position_embeddings: usize,
        style: Style,
    ) -> std::result::Result<Self, RopeError> {
        let factor = config.partial_rotary_factor.unwrap_or(1.0);
        let rotary = (head_dim as f64 * factor) as usize;
        let value = |field, value: &dyn std::fmt::Display, expected: &str| {
            Err(RopeError::Value { field, value: value.to_string(), expected: expected.to_owned() })
        };
        if rotary == 0 || !rotary.is_multiple_of(2) || rotary > head_dim {
            return value("partial_rotary_factor", &factor, &format!("an even part of the {head_dim} of a head"));
        }
        if !(config.theta.is_finite() && config.theta > 0.0) {
            return value("rope_theta", &config.theta, "a positive number");
        }
        let original = config.original_max_position_embeddings.unwrap_or(max_position_embeddings);
        if original.min(max_position_embeddings) == 0 {
            return value("max_position_embeddings", &0, "at least 1");
        }
        match &config.scaling {
            Scaling::Linear { factor } | Scaling::Dynamic { factor } | Scaling::Llama3 { factor, .. }
                if !(factor.is_finite() && *factor > 0.0) =>
            {
                return value("factor", factor, "a positive number");
            }
            Scaling::LongRope { short_factor, long_factor, .. } => {
                for (field, list) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                    if list.len() != rotary / 2 {
                        let found = format!("a list of {}", list.len());
                        return value(field, &found, &format!("{} numbers", rotary / 2));
                    }
                }
            }
            _ => {}
        }
        Ok(Self { config: config.clone(), style, head_dim, rotary, max_positions: max_position_embeddings })
    }

    /// Elements of a head that are turned.
    pub fn rotary_dim(&self) -> usize {
        self.rotary
    }

    /// Angle per position of each pair in a sequence of `len` tokens, and the factor on cosines and sines. Mirrors
    /// `transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`.
    pub fn frequencies(&self, len: usize) -> (Vec<f32>, f32) {
        let dim = self.rotary as f64;
        // transformers' powers are in f32 with this exponent
        let power = |theta: f64, i: usize| theta.powf(f64::from(2.0 * i as f32 / dim as f32));
        let each = |f: &dyn Fn(usize) -> f64| (0..self.rotary / 2).map(|i| f(i) as f32).collect();
        let theta = self.config.theta;
        let max = self.max_positions as f64;
        let original = self.config.original_max_position_embeddings.unwrap_or(self.max_positions) as f64;
        match &self.config.scaling {
            Scaling::Default => (each(&|i| power(theta, i).recip()), 1.0),
            Scaling::Linear { factor } => (each(&|i| power(theta, i).recip() / factor), 1.0),
            Scaling::Dynamic { factor } => {
                let len = (len as f64).max(max);
                // with one pair the exponent is infinite, and so is nothing of it needed: its frequency is 1
                let exponent = if self.rotary > 2 { dim / (dim - 2.0) } else { 0.0 };
                let theta = theta * (factor * len / max - (factor - 1.0)).powf(exponent);
                (each(&|i| power(theta, i).recip()), 1.0)
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor } => {
                let scaled = |i| {
                    let frequency = power(theta, i).recip();
                    let rotations = original * frequency / std::f64::consts::TAU;
                    if rotations > *high_freq_factor {
                        frequency
                    } else if rotations < *low_freq_factor {
                        frequency / factor
                    } else {
                        let smooth = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                (each(&scaled), 1.0)
            }
            Scaling::Yarn { factor, attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate } => {
                let factor = factor.unwrap_or(max / original);
                let magnitude = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let attention = attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
                    (Some(m), Some(all)) => magnitude(*m) / magnitude(*all),
                    _ => magnitude(1.0),
                });
                // the pair that turns so often over the original length
                let pair =
                    |rotations: f64| dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
                let (low, high) = (pair(*beta_fast), pair(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let blended = |i: usize| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    let frequency = power(theta, i).recip();
                    frequency / factor * stretched + frequency * (1.0 - stretched)
                };
                (each(&blended), attention as f32)
            }
            Scaling::LongRope { short_factor, long_factor, factor, attention_factor } => {
                let factor = factor.unwrap_or(max / original);
                let attention = attention_factor
                    .unwrap_or_else(|| if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() });
                let divisors = if len as f64 > original { long_factor } else { short_factor };
                (each(&|i| (divisors[i] * power(theta, i)).recip()), attention as f32)
            }
        }
    }

    /// Cosines and sines for the rows of one pass, which all layers share. The length that some types depend on is the
    /// highest position and one.
    ///
    /// # Errors
    /// When the positions are not whole rows of `seq`.
    pub fn table(&self, positions: Positions<'_>, device: &Device) -> Result<RopeTable> {
        let counted: Vec<u32>;
        let (positions, seq) = match positions {
            Positions::From(first, seq) => {
                counted = (first..first + seq).map(|p| p as u32).collect();
                (&counted[..], seq)
            }
            Positions::PerItem { positions, seq } => (positions, seq),
        };
        if !positions.len().is_multiple_of(seq.max(1)) {
            bail!("rope: {} positions are not rows of {seq}", positions.len())
        }
        let len = positions.iter().max().map_or(0, |p| *p as usize + 1);
        let (frequencies, factor) = self.frequencies(len);
        let width = kernel::table_width(self.style, self.rotary);
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * width), Vec::with_capacity(positions.len() * width));
        for &position in positions {
            let pairs = frequencies.iter().map(|frequency| {
                // the angle is rounded to f32 as in transformers, its sine and cosine are not
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                ((cos * f64::from(factor)) as f32, (sin * f64::from(factor)) as f32)
            });
            kernel::table_row(self.style, pairs, &mut cos, &mut sin);
        }
        let items = positions.len() / seq.max(1);
        let tensors = if device.is_cpu() {
            None
        } else {
            let shape = (items, seq, 1, width);
            Some((Tensor::from_slice(&cos, shape, device)?, Tensor::from_slice(&sin, shape, device)?))
        };
        Ok(RopeTable {
            style: self.style,
            head_dim: self.head_dim,
            rotary: self.rotary,
            items,
            seq,
            cos: cos.into(),
            sin: sin.into(),
            tensors,
        })
    }
}

/// Cosines and sines of the positions of one pass.
#[derive(Debug, Clone)]
pub struct RopeTable {
    style: Style,
    head_dim: usize,
    rotary: usize,
    /// Items with positions of their own, or 1 for all.
    items: usize,
    seq: usize,
    /// (items, seq, width), as the kernel reads them.
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    /// The same on another device, (items, seq, 1, width).
    tensors: Option<(Tensor, Tensor)>,
}

impl RopeTable {
    /// Turns the heads of queries or keys.
    ///
    /// On the CPU in f32 this is done **in place**, also where `x` is a `narrow` of a product that holds queries, keys
    /// and values: hand over what nobody else reads unturned. Elsewhere the result is a new tensor.
    ///
    /// # Shapes
    /// (batch, seq, heads · head_dim), rows of contiguous elements; the result is the same.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn rotate(&self, x: Tensor) -> Result<Tensor> {
        let (batch, seq, width) = x.dims3()?;
        let heads = width / self.head_dim.max(1);
        if seq != self.seq || heads * self.head_dim != width || (self.items != 1 && self.items != batch) {
            let items = if self.items == 1 { "any".into() } else { self.items.to_string() };
            bail!(
                "rope: the input has shape {:?}, expected [{items}, {}, a multiple of {}]",
                x.dims(),
                self.seq,
                self.head_dim
            )
        }
        // two products and a sum
        let _span = cost::span("rope", None);
        cost::elementwise(batch * seq * heads * self.rotary, 3);
        if !op::is_cpu_f32(&x) {
            return self.rotate_plain(&x);
        }
        let x = if x.stride()[2] == 1 { x } else { x.contiguous()? };
        x.inplace_op1(&Rotation { table: self, heads })?;
        Ok(x)
    }

    /// As [`rotate`](Self::rotate), in candle's own operations and into a new tensor.
    ///
    /// # Errors
    /// As there.
    pub fn rotate_plain(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, width) = x.dims3()?;
        let x4 = x.reshape((batch, seq, (), self.head_dim))?;
        let (cos, sin) = match &self.tensors {
            Some(tensors) => tensors.clone(),
            None => {
                let shape = (self.items, self.seq, 1, kernel::table_width(self.style, self.rotary));
                (Tensor::from_slice(&self.cos, shape, x.device())?, Tensor::from_slice(&self.sin, shape, x.device())?)
            }
        };
        let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
        let turning = x4.narrow(3, 0, self.rotary)?;
        let turned = match self.style {
            Style::Half => {
                let half = self.rotary / 2;
                let (a, b) = (turning.narrow(3, 0, half)?, turning.narrow(3, half, half)?);
                let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
                let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
                Tensor::cat(&[first, second], 3)?
            }
            Style::Interleaved => {
                let pairs = turning.contiguous()?.reshape((batch, seq, (), self.rotary / 2, 2))?;
                let swapped = Tensor::cat(&[pairs.narrow(4, 1, 1)?, pairs.narrow(4, 0, 1)?], 4)?;
                let swapped = swapped.reshape(turning.shape())?;
                (turning.broadcast_mul(&cos)? + swapped.broadcast_mul(&sin)?)?
            }
        };
        let rest = x4.narrow(3, self.rotary, self.head_dim - self.rotary)?;
        Tensor::cat(&[turned, rest], 3)?.reshape((batch, seq, width))
    }
}

/// Elements that one thread turns at a time, about.
const CHUNK: usize = 8192;

struct Rotation<'a> {
    table: &'a RopeTable,
    heads: usize,
}

impl InplaceOp1 for Rotation<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Self { table, heads } = *self;
        let CpuStorage::F32(data) = storage else { bail!("rope: the input is not {:?}", DType::F32) };
        let (batch, seq, width) = layout.shape().dims3()?;
        let &[item_stride, row_stride, _] = layout.stride() else {
            bail!("rope: {layout:?} is not of three dimensions")
        };
        if batch * seq * width == 0 {
            return Ok(());
        }
        let first = layout.start_offset();
        let end = first + (batch - 1) * item_stride + (seq - 1) * row_stride + width;
        if end > data.len()
            || (seq > 1 && row_stride < width)
            || (batch > 1 && item_stride < (seq - 1) * row_stride + width)
        {
            bail!("rope: rows of {layout:?} overlap")
        }
        let per_task = (CHUNK / width).max(1);
        let base = Shared(data.as_mut_ptr());
        let heads = kernel::Heads { count: heads, dim: table.head_dim, rotary: table.rotary };
        let entries = kernel::table_width(table.style, table.rotary);
        pool::run((batch * seq).div_ceil(per_task), |task| {
            for row in task * per_task..((task + 1) * per_task).min(batch * seq) {
                let (item, position) = (row / seq, row % seq);
                let at = (if table.items == 1 { position } else { row }) * entries;
                let (cos, sin) = (&table.cos[at..at + entries], &table.sin[at..at + entries]);
                #[expect(unsafe_code, reason = "threads turn different rows of one array")]
                // SAFETY: the row lies within the data and overlaps no other, as checked above.
                unsafe {
                    let row = base.get().add(first + item * item_stride + position * row_stride);
                    kernel::rotate(table.style, heads, cos, sin, row);
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> RopeConfig {
        serde_json::from_str(json).unwrap()
    }

    /// From transformers 5.23.0 on torch: heads of 16, the JSON fields given, `max` positions, a sequence of `len`.
    fn check(json: &str, max: usize, len: usize, expected: &[f32], factor: f64) {
        let rope = Rope::new(&config(json), 16, max, Style::Half).unwrap();
        let (found, found_factor) = rope.frequencies(len);
        assert_eq!(found.len(), expected.len(), "{json}");
        for (found, expected) in found.iter().zip(expected) {
            // theirs are products and powers in f32
            assert!((found / expected - 1.0).abs() < 5e-7, "{json}: {found} is not {expected}");
        }
        assert_eq!(found_factor, factor as f32, "{json}");
    }

    #[test]
    fn frequencies_of_transformers() {
        let tenth = [1.0f32, 0.316_227_76, 0.1, 0.031_622_78, 0.01, 0.003_162_277_9, 0.001, 0.000_316_227_8];
        check("{}", 64, 10, &tenth, 1.0);
        check(
            r#"{"rope_scaling": {"type": "linear", "factor": 4.0}}"#,
            64,
            10,
            &[0.25, 0.079_056_94, 0.025, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 7.905_695e-5],
            1.0,
        );
        check(
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}"#,
            64,
            10,
            &[0.4, 0.04, 0.004, 0.0004],
            1.0,
        );
        let dynamic = r#"{"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0}"#;
        check(dynamic, 64, 10, &tenth, 1.0);
        check(
            dynamic,
            64,
            100,
            &[
                1.0,
                0.283_945_14,
                0.080_624_84,
                0.022_893_03,
                0.006_500_365,
                0.001_845_747,
                0.000_524_090_9,
                0.000_148_813_07,
            ],
            1.0,
        );
        check(
            r#"{"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}"#,
            64,
            10,
            &[
                0.576_056_36,
                0.043_106_105,
                0.014_865_089,
                0.005_126_208_5,
                0.001_767_767,
                0.000_609_612_3,
                0.000_210_224_1,
                7.249_553e-5,
            ],
            1.0,
        );
    }

    #[test]
    fn yarn_and_longrope_of_transformers() {
        check(
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}"#,
            64,
            10,
            &[1.0, 0.197_642_36, 0.025, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 7.905_695e-5],
            1.138_629_436_111_989,
        );
        check(
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                "truncate": false, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 1.2}}"#,
            64,
            10,
            &[1.0, 0.079_056_94, 0.025, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 7.905_695e-5],
            0.941_403_523_749_669,
        );
        check(
            r#"{"rope_theta": 1000.0, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5,
                "original_max_position_embeddings": 2048}}"#,
            64,
            10,
            &[
                1.0,
                0.421_696_5,
                0.177_827_94,
                0.061_866_27,
                0.020_554_805,
                0.006_334_227,
                0.001_687_024,
                0.000_296_421_73,
            ],
            1.5,
        );
        let long = r#"{"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}}"#;
        let short = [
            1.0,
            0.287_479_76,
            0.083_333_336,
            0.024_325_214,
            0.007_142_857,
            0.002_108_185_3,
            0.000_625,
            0.000_186_016_33,
        ];
        check(long, 128, 32, &short, 1.183_215_956_619_923_2);
        check(
            long,
            128,
            33,
            &[
                1.0,
                0.158_113_88,
                0.033_333_335,
                0.007_905_695,
                0.002,
                0.000_527_046_3,
                0.000_142_857_14,
                3.952_847_3e-5,
            ],
            1.183_215_956_619_923_2,
        );
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = |json: &str| serde_json::from_str::<RopeConfig>(json).unwrap_err().to_string();
        assert!(error(r#"{"rope_parameters": {"rope_type": "proportional"}}"#).contains("`proportional`"));
        assert!(error(r#"{"rope_scaling": {"type": "linear"}}"#).contains("`factor`"));
        assert!(
            error(r#"{"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}"#).contains("mrope_section")
        );
        let make = |json: &str| Rope::new(&config(json), 16, 64, Style::Half).unwrap_err().to_string();
        assert!(make(r#"{"partial_rotary_factor": 0.2}"#).contains("partial_rotary_factor` is 0.2"));
        let lists = r#"{"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": []}}"#;
        assert!(make(lists).contains("short_factor` is a list of 1, expected 8 numbers"));
    }

    #[test]
    fn flattened_into_a_model() {
        #[derive(Deserialize)]
        struct Model {
            max_position_embeddings: usize,
            #[serde(flatten)]
            rope: RopeConfig,
        }
        let json = r#"{"max_position_embeddings": 99, "rope_theta": 5000, "partial_rotary_factor": 0.5, "x": {}}"#;
        let model: Model = serde_json::from_str(json).unwrap();
        let expected = RopeConfig { theta: 5000.0, partial_rotary_factor: Some(0.5), ..RopeConfig::default() };
        assert_eq!((model.max_position_embeddings, model.rope), (99, expected));
    }

    #[test]
    fn in_place_on_a_part_of_a_product() -> Result<()> {
        let cpu = &Device::Cpu;
        let (heads, kv_heads, head_dim) = (3, 1, 20);
        for style in [Style::Half, Style::Interleaved] {
            for part in [1.0, 0.5, 0.2] {
                let config = RopeConfig { partial_rotary_factor: Some(part), ..RopeConfig::default() };
                let rope = Rope::new(&config, head_dim, 64, style).map_err(candle_core::Error::wrap)?;
                let own: Vec<u32> = (0..14).map(|i| i * 3 % 11).collect();
                for positions in [Positions::From(5, 7), Positions::PerItem { positions: &own, seq: 7 }] {
                    let table = rope.table(positions, cpu)?;
                    let width = heads * head_dim;
                    let qkv = Tensor::randn(0f32, 1.0, (2, 7, width + 2 * kv_heads * head_dim), cpu)?;
                    let before = qkv.copy()?;
                    let q = table.rotate(qkv.narrow(2, 0, width)?)?;
                    let k = table.rotate(qkv.narrow(2, width, head_dim)?)?;
                    for (got, from) in [(q, 0), (k, width)] {
                        let want = table.rotate_plain(&before.narrow(2, from, got.dim(2)?)?)?;
                        let error = (got - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                        assert!(error < 1e-6, "{style:?} {part}: {error}");
                    }
                    let rest = width + head_dim;
                    let untouched = (qkv.narrow(2, rest, head_dim)? - before.narrow(2, rest, head_dim)?)?;
                    assert_eq!(untouched.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?, 0.0);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn misfits_are_named() -> Result<()> {
        let rope = Rope::new(&RopeConfig::default(), 4, 64, Style::Half).map_err(candle_core::Error::wrap)?;
        let table = rope.table(Positions::From(0, 3), &Device::Cpu)?;
        let error = table.rotate(Tensor::zeros((1, 2, 8), DType::F32, &Device::Cpu)?).unwrap_err().to_string();
        assert!(error.contains("[1, 2, 8]") && error.contains("[any, 3, a multiple of 4]"), "{error}");
        Ok(())
    }
}
