//! What a phase must compute and move at least: FLOPs and bytes by formula, which the measured time is held against.
//!
//! **FLOPs.** A fused multiply-add is 2; an addition, multiplication, division, square root, exponential or error function
//! is 1; comparisons, copies and index arithmetic are 0.
//!
//! **Bytes** are the least traffic that an implementation with a cache needs, so that "percent of attainable" errs on the
//! strict side:
//! - *weight bytes*: every weight once per run of the phase, however many rows use it (once per decoded token);
//! - *activation bytes*: every activation once, **where it is written**. Reading it back in the next operation is taken to
//!   hit a cache and is not counted again. What comes from outside of the phase (pixels, encoder states) is counted once by
//!   [`input`]. An element-wise operation is taken to be fused into the operation before it and moves nothing;
//! - *KV bytes*: keys and values that an earlier phase or step wrote, read once. Writing a new key or value is the output
//!   of its projection, so it counts there, as an activation.
//!
//! The score matrix of attention never counts, because it need not be written.

use std::cell::Cell;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::session::{Call, ModelSpec, Phase, Session, SessionError};
use crate::weights::{AliasRule, HubOptions, Requested, Source, Weights};

/// FLOPs and bytes of a piece of work. Costs add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cost {
    /// Floating-point operations, a multiply-add counted as 2.
    pub flops: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of activations, each once where it is written, and of the phase's inputs.
    pub activation_bytes: u64,
    /// Bytes of cached keys and values read.
    pub kv_bytes: u64,
}

/// The cost of a phase within one call, all its repetitions together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseCost {
    /// Which phase.
    pub phase: Phase,
    /// Times that it runs in one call: 1, or the number of tokens decoded.
    pub repeats: u64,
    /// The sum over all repeats.
    pub cost: Cost,
}

impl Cost {
    /// All bytes moved.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.activation_bytes + self.kv_bytes
    }

    /// FLOPs per byte moved; `None` when nothing moves.
    pub fn arithmetic_intensity(&self) -> Option<f64> {
        (self.bytes() > 0).then(|| self.flops as f64 / self.bytes() as f64)
    }
}

impl std::ops::Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            weight_bytes: self.weight_bytes + other.weight_bytes,
            activation_bytes: self.activation_bytes + other.activation_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
        }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), |sum, cost| sum + cost)
    }
}

impl std::ops::Mul<u64> for Cost {
    type Output = Self;
    fn mul(self, times: u64) -> Self {
        Self {
            flops: self.flops * times,
            weight_bytes: self.weight_bytes * times,
            activation_bytes: self.activation_bytes * times,
            kv_bytes: self.kv_bytes * times,
        }
    }
}

/// What a call costs by the config alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// FLOPs and bytes by phase.
    pub phases: Vec<PhaseCost>,
    /// Names and shapes of the model's weights.
    pub tensors: Requested,
    /// Bytes of the largest activation that a term of the cost writes.
    pub largest_activation: u64,
}

thread_local! {
    static LARGEST: Cell<u64> = const { Cell::new(0) };
}

/// Notes what a term writes, for [`Outline::largest_activation`].
fn noted(cost: Cost) -> Cost {
    LARGEST.set(LARGEST.get().max(cost.activation_bytes));
    cost
}

impl Outline {
    /// Of `call` on the model of `spec`, which `load` builds of weights that have sizes and no numbers.
    ///
    /// # Errors
    /// Those of `load` and of [`Session::cost`].
    pub fn of(
        spec: &ModelSpec,
        call: &Call,
        aliases: &[AliasRule],
        load: impl FnOnce(&ModelSpec, &Weights) -> Result<Box<dyn Session>, SessionError>,
    ) -> Result<Self, SessionError> {
        let weights = Weights::open(&Source::Sizes, aliases, &spec.class, &HubOptions::default())?;
        let session = load(spec, &weights)?;
        LARGEST.set(0);
        let phases = session.cost(call)?;
        Ok(Self { phases, tensors: weights.requested(), largest_activation: LARGEST.get() })
    }
}

/// FLOPs of softmax per score: scale, subtract the maximum, exponential, sum, multiply by the inverse.
const SOFTMAX_FLOPS: u64 = 5;

/// Inputs that the phase gets from outside, read once.
pub fn input(elements: u64, bytes_per_element: u64) -> Cost {
    noted(Cost { activation_bytes: elements * bytes_per_element, ..Cost::default() })
}

/// Dense layer `y = x·Wᵀ (+ b)` over `tokens` rows, from width `input` to width `output`.
pub fn linear(tokens: u64, input: u64, output: u64, bias: bool, bytes_per_element: u64) -> Cost {
    let bias = u64::from(bias);
    noted(Cost {
        // a multiply-add per weight and row, an addition per output for the bias
        flops: 2 * tokens * input * output + bias * tokens * output,
        // the matrix and the bias, once
        weight_bytes: (input * output + bias * output) * bytes_per_element,
        // the output
        activation_bytes: tokens * output * bytes_per_element,
        kv_bytes: 0,
    })
}

/// Scaled dot-product attention without its projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Items in the batch.
    pub batch: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads; fewer than `heads` where they are shared.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Queries per item.
    pub queries: u64,
    /// Keys per item, of which `cached` were written by an earlier phase or step.
    pub cached: u64,
    /// (query, key) pairs per item and head that a mask lets through: see [`full_pairs`], [`causal_pairs`].
    pub visible_pairs: u64,
}

impl Attention {
    /// FLOPs of both products and of softmax over visible pairs; bytes of the output and of cached keys and values.
    pub fn cost(&self, bytes_per_element: u64) -> Cost {
        let pairs = self.batch * self.heads * self.visible_pairs;
        noted(Cost {
            // q·kᵀ and p·v are a multiply-add per pair and element of a head each
            flops: 2 * pairs * self.head_dim * 2 + SOFTMAX_FLOPS * pairs,
            weight_bytes: 0,
            // the output; scores need not be written
            activation_bytes: self.batch * self.queries * self.heads * self.head_dim * bytes_per_element,
            // a key and a value per cached position and head that is stored
            kv_bytes: 2 * self.batch * self.cached * self.kv_heads * self.head_dim * bytes_per_element,
        })
    }
}

/// Pairs where every query sees every key.
pub fn full_pairs(queries: u64, keys: u64) -> u64 {
    queries * keys
}

/// Pairs where each of `queries` sees `cached` earlier keys, those of this call before it, and itself.
pub fn causal_pairs(queries: u64, cached: u64) -> u64 {
    queries * cached + queries * (queries + 1) / 2
}

/// The same where each sees at most `window` positions, itself included.
pub fn window_pairs(queries: u64, cached: u64, window: Option<u64>) -> u64 {
    match window {
        None => causal_pairs(queries, cached),
        Some(window) => (1..=queries).map(|query| (cached + query).min(window)).sum(),
    }
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// LayerNorm with weight and bias.
    Layer,
    /// RMSNorm with weight.
    Rms,
}

/// The sizes of a transformer layer of one width, from which the cost of its halves follows. The products of the output and
/// of the feed-forward half have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Width of the stream.
    pub hidden: u64,
    /// Attention heads.
    pub heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width inside the feed-forward half.
    pub inner: u64,
    /// The products of query, key and value have biases.
    pub qkv_bias: bool,
    /// Normalisation comes before each half, over its input; else behind it, over its result.
    pub norm_before: bool,
    /// Of an element.
    pub bytes: u64,
}

/// The rows that attention goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionRows {
    /// Items in the batch.
    pub batch: u64,
    /// Rows per item that keys and values are made of.
    pub seq: u64,
    /// Rows per item that are wanted: the queries.
    pub queries: u64,
    /// Keys per item that an earlier pass made.
    pub cached: u64,
    /// (query, key) pairs per item and head.
    pub visible_pairs: u64,
}

impl AttentionRows {
    /// Of `batch` items of `seq` rows that all see each other.
    pub fn full(batch: u64, seq: u64) -> Self {
        Self::some(batch, seq, seq)
    }

    /// Of `queries` rows of each item, which see all.
    pub fn some(batch: u64, seq: u64, queries: u64) -> Self {
        Self { batch, seq, queries, cached: 0, visible_pairs: full_pairs(queries, seq) }
    }

    /// Of `seq` rows that see themselves, those before them, and `cached` ones of earlier passes.
    pub fn causal(batch: u64, seq: u64, cached: u64) -> Self {
        Self { batch, seq, queries: seq, cached, visible_pairs: causal_pairs(seq, cached) }
    }
}

impl Layer {
    fn width(&self) -> u64 {
        self.heads * self.head_dim
    }

    fn norm(&self, rows: u64) -> Cost {
        norm(Norm::Layer, rows, self.hidden, self.bytes)
    }

    fn attention(&self, rows: AttentionRows) -> Cost {
        let Self { heads, head_dim, .. } = *self;
        let AttentionRows { batch, queries, cached, visible_pairs, .. } = rows;
        Attention { batch, heads, kv_heads: heads, head_dim, queries, cached, visible_pairs }.cost(self.bytes)
    }

    /// A product back to the stream from width `input`, and the residual.
    fn output(&self, rows: u64, input: u64) -> Cost {
        linear(rows, input, self.hidden, true, self.bytes) + elementwise(rows * self.hidden, 1)
    }

    /// Attention of rows to each other.
    pub fn self_attention(&self, rows: AttentionRows) -> Cost {
        let (tokens, wanted) = (rows.batch * rows.seq, rows.batch * rows.queries);
        let project = |rows, width| linear(rows, self.hidden, width, self.qkv_bias, self.bytes);
        self.norm(if self.norm_before { tokens } else { wanted })
            + project(wanted, self.width()) // query
            + project(tokens, 2 * self.width()) // key and value
            + self.attention(rows)
            + self.output(wanted, self.width())
    }

    /// Attention of (batch, queries) rows to `states` states an item of width `width`, of which this pass makes keys and
    /// values (`first`), or an earlier one did.
    pub fn cross_attention(&self, [batch, queries]: [u64; 2], [states, width]: [u64; 2], first: bool) -> Cost {
        let rows = batch * queries;
        let project = |rows, input, output| linear(rows, input, output, self.qkv_bias, self.bytes);
        let made = if first { project(batch * states, width, 2 * self.width()) } else { Cost::default() };
        let visible_pairs = full_pairs(queries, states);
        let attention = AttentionRows { batch, seq: 0, queries, cached: if first { 0 } else { states }, visible_pairs };
        self.norm(rows)
            + project(rows, self.hidden, self.width())
            + made
            + self.attention(attention)
            + self.output(rows, self.width())
    }

    /// The feed-forward half over `rows` rows, with an activation between two products.
    pub fn feed_forward(&self, rows: u64) -> Cost {
        self.norm(rows)
            + linear(rows, self.hidden, self.inner, true, self.bytes)
            + elementwise(rows * self.inner, 1) // the activation, one whichever it is
            + self.output(rows, self.inner)
    }

    /// Both halves of an encoder's layer.
    pub fn encoder(&self, rows: AttentionRows) -> Cost {
        self.self_attention(rows) + self.feed_forward(rows.batch * rows.queries)
    }

    /// `layers` layers of an encoder over (batch, seq) rows that all see each other, of which `queries` an item are wanted
    /// of the last.
    pub fn encoder_of(&self, layers: usize, [batch, seq]: [u64; 2], queries: u64) -> Cost {
        match layers {
            0 => Cost::default(),
            layers => {
                self.encoder(AttentionRows::full(batch, seq)) * (layers as u64 - 1)
                    + self.encoder(AttentionRows::some(batch, seq, queries))
            }
        }
    }
}

/// Normalisation of `rows` rows of `width` elements.
pub fn norm(kind: Norm, rows: u64, width: u64, bytes_per_element: u64) -> Cost {
    let (flops_per_element, parameters) = match kind {
        // sum for the mean, subtract it, square and sum, multiply by the inverse deviation, multiply-add of weight and bias
        Norm::Layer => (1 + 1 + 2 + 1 + 2, 2 * width),
        // square and sum, multiply by the inverse root, multiply by the weight
        Norm::Rms => (2 + 1 + 1, width),
    };
    noted(Cost {
        flops: flops_per_element * rows * width,
        weight_bytes: parameters * bytes_per_element,
        activation_bytes: rows * width * bytes_per_element,
        kv_bytes: 0,
    })
}

/// Element-wise work (activation, residual, scale), fused into the operation before it: FLOPs, and no traffic.
pub fn elementwise(elements: u64, flops_per_element: u64) -> Cost {
    Cost { flops: elements * flops_per_element, ..Cost::default() }
}

/// Lookup of `rows` rows of `width` elements in a table: each row is read and written once, nothing is computed.
/// The indices, a few bytes per row, are left out.
pub fn embedding(rows: u64, width: u64, bytes_per_element: u64) -> Cost {
    let bytes = rows * width * bytes_per_element;
    noted(Cost { flops: 0, weight_bytes: bytes, activation_bytes: bytes, kv_bytes: 0 })
}

/// A convolution over pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2d {
    /// Pictures.
    pub batch: u64,
    /// Channels in, all groups together.
    pub in_channels: u64,
    /// Channels out, all groups together.
    pub out_channels: u64,
    /// Kernel height and width.
    pub kernel: [u64; 2],
    /// Groups; `in_channels` for a depthwise convolution.
    pub groups: u64,
    /// Output height and width.
    pub output: [u64; 2],
    /// With a bias per channel out (a folded batch norm is one).
    pub bias: bool,
}

impl Conv2d {
    /// FLOPs and bytes; padding counts as work, as it does in published counts.
    pub fn cost(&self, bytes_per_element: u64) -> Cost {
        let bias = u64::from(self.bias);
        // weights behind one output element
        let window = self.in_channels / self.groups * self.kernel[0] * self.kernel[1];
        let outputs = self.batch * self.out_channels * self.output[0] * self.output[1];
        noted(Cost {
            // a multiply-add per weight of the window, an addition for the bias
            flops: 2 * outputs * window + bias * outputs,
            // every kernel and bias, once
            weight_bytes: (self.out_channels * window + bias * self.out_channels) * bytes_per_element,
            // the output
            activation_bytes: outputs * bytes_per_element,
            kv_bytes: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_by_hand() {
        // 2 rows, 3 -> 4: 2·(2·3·4) = 48, bias 2·4 = 8; weights 12 + 4; output 8 elements; 4 bytes each
        let cost = linear(2, 3, 4, true, 4);
        assert_eq!(cost, Cost { flops: 56, weight_bytes: 64, activation_bytes: 32, kv_bytes: 0 });
        assert_eq!(linear(2, 3, 4, false, 2), Cost { flops: 48, weight_bytes: 24, activation_bytes: 16, kv_bytes: 0 });
    }

    #[test]
    fn attention_by_hand() {
        // one decode step: 1 query sees 3 cached keys and its own; 4 heads of 8 on 2 stored heads, 2 bytes
        let step = Attention {
            batch: 1,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            queries: 1,
            cached: 3,
            visible_pairs: causal_pairs(1, 3),
        };
        // 4 pairs × 4 heads = 16; products 16·8·4 = 512; softmax 16·5 = 80
        // output 4·8 elements; cache 2·3·2·8 elements
        assert_eq!(step.cost(2), Cost { flops: 592, weight_bytes: 0, activation_bytes: 64, kv_bytes: 192 });
    }

    #[test]
    fn halves_of_a_layer_by_hand() {
        let layer = Layer { hidden: 4, heads: 2, head_dim: 3, inner: 5, qkv_bias: false, norm_before: true, bytes: 2 };
        // 2 items of 3 rows, of which 1 is wanted: norm 7·6·4; query 2·(2·4·6); key and value 2·(6·4·12);
        // 3 pairs an item, 2 items, 2 heads: 12·(4·3 + 5); output 2·(2·6·4) + 2·4; residual 2·4
        let half = layer.self_attention(AttentionRows::some(2, 3, 1));
        assert_eq!(half.flops, 168 + 96 + 576 + 204 + 104 + 8);
        // norm 8, query 24, key and value 48, output 24 + 4
        assert_eq!(half.weight_bytes, 2 * (8 + 24 + 48 + 28));
        let behind = Layer { norm_before: false, ..layer }.self_attention(AttentionRows::some(2, 3, 1));
        assert_eq!(half.flops - behind.flops, 7 * 4 * 4); // four rows less are normalised
        // norm 7·2·4; 2·(2·4·5) + 2·5; activation 2·5; 2·(2·5·4) + 2·4; residual 2·4
        assert_eq!(layer.feed_forward(2).flops, 56 + 90 + 10 + 88 + 8);
        // 3 states of width 2, from which a later pass makes no keys and values
        let [first, later] = [true, false].map(|first| layer.cross_attention([2, 1], [3, 2], first));
        assert_eq!(first.flops - later.flops, 2 * (2 * 3) * 2 * 12);
        assert_eq!(
            layer.encoder_of(2, [2, 3], 1),
            layer.encoder(AttentionRows::full(2, 3)) + layer.encoder(AttentionRows::some(2, 3, 1))
        );
    }

    #[test]
    fn pairs_by_hand() {
        assert_eq!(full_pairs(2, 5), 10);
        // rows see 1, 2, 3, 4 keys
        assert_eq!(causal_pairs(4, 0), 10);
        // rows see 3 and 4 keys
        assert_eq!(causal_pairs(2, 2), 7);
        // as many single steps as one pass
        assert_eq!((0..4).map(|cached| causal_pairs(1, cached)).sum::<u64>(), causal_pairs(4, 0));
    }

    #[test]
    fn small_operations_by_hand() {
        // 2 rows of 3, 4 bytes
        assert_eq!(norm(Norm::Layer, 2, 3, 4), Cost { flops: 42, weight_bytes: 24, activation_bytes: 24, kv_bytes: 0 });
        assert_eq!(norm(Norm::Rms, 2, 3, 4), Cost { flops: 24, weight_bytes: 12, activation_bytes: 24, kv_bytes: 0 });
        assert_eq!(elementwise(6, 2), Cost { flops: 12, ..Cost::default() });
        assert_eq!(embedding(2, 3, 4), Cost { flops: 0, weight_bytes: 24, activation_bytes: 24, kv_bytes: 0 });
        assert_eq!(input(5, 2), Cost { activation_bytes: 10, ..Cost::default() });
    }

    #[test]
    fn convolution_by_hand() {
        // 2 -> 4 channels, 3×3, output 5×5: 100 outputs with windows of 18
        let dense =
            Conv2d { batch: 1, in_channels: 2, out_channels: 4, kernel: [3, 3], groups: 1, output: [5, 5], bias: true };
        assert_eq!(dense.cost(4), Cost { flops: 3700, weight_bytes: 304, activation_bytes: 400, kv_bytes: 0 });
        // depthwise on 4 channels: windows of 9
        let depthwise = Conv2d { in_channels: 4, groups: 4, bias: false, ..dense };
        assert_eq!(depthwise.cost(4), Cost { flops: 1800, weight_bytes: 144, activation_bytes: 400, kv_bytes: 0 });
    }

    #[test]
    fn costs_add_up() {
        let one = Cost { flops: 10, weight_bytes: 1, activation_bytes: 2, kv_bytes: 2 };
        assert_eq!((one + one), one * 2);
        assert_eq!([one, one, one].into_iter().sum::<Cost>(), one * 3);
        assert_eq!(one.arithmetic_intensity(), Some(2.0));
        assert_eq!(Cost::default().arithmetic_intensity(), None);
    }

    /// Published: 17.58 G multiply-adds for ViT-B/16 at 224 (timm), and 86.57 M parameters.
    #[test]
    fn vit_base_matches_the_published_count() {
        let (tokens, hidden, mlp, heads) = (197, 768, 3072, 12);
        let attention = Attention {
            batch: 1,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            queries: tokens,
            cached: 0,
            visible_pairs: full_pairs(tokens, tokens),
        };
        let layer = norm(Norm::Layer, tokens, hidden, 4) * 2
            + linear(tokens, hidden, hidden, true, 4) * 4
            + attention.cost(4)
            + linear(tokens, hidden, mlp, true, 4)
            + linear(tokens, mlp, hidden, true, 4);
        let patches = Conv2d {
            batch: 1,
            in_channels: 3,
            out_channels: hidden,
            kernel: [16, 16],
            groups: 1,
            output: [14, 14],
            bias: true,
        };
        let whole =
            patches.cost(4) + layer * 12 + norm(Norm::Layer, tokens, hidden, 4) + linear(1, hidden, 1000, true, 4);
        let multiply_adds = whole.flops as f64 / 2.0;
        assert!((multiply_adds / 17.58e9 - 1.0).abs() < 0.005, "{multiply_adds:e}");
        // without the class token and the positions, which are added and not multiplied
        let parameters = whole.weight_bytes / 4 + hidden + tokens * hidden;
        assert_eq!(parameters, 86_567_656);
    }
}
