//! What the blocks compute and move, counted as they run: the check on a cost that was worked out by formula.
//!
//! A fused multiply-add is 2 FLOPs; an addition, multiplication, division, root, exponential or error function is 1,
//! and so is an activation, whichever it is; comparisons and copies are 0. Keys that only a padding mask hides count as
//! seen. Weight bytes are those of weights as they lie in memory, read once per use; activation bytes are those
//! written, in the precision in which they are. Element-wise work counts as fused into what it follows and moves
//! nothing.
//!
//! [`profile`] also takes the time of each operation. Both are per thread and cost a thread-local load each where they are
//! off.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::attention::Pattern;

/// FLOPs and bytes of what ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Floating-point operations, a multiply-add counted as 2.
    pub flops: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of activations written.
    pub activation_bytes: u64,
}

impl std::ops::Add for Recorded {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            weight_bytes: self.weight_bytes + other.weight_bytes,
            activation_bytes: self.activation_bytes + other.activation_bytes,
        }
    }
}

impl std::ops::Sub for Recorded {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self {
            flops: self.flops - other.flops,
            weight_bytes: self.weight_bytes - other.weight_bytes,
            activation_bytes: self.activation_bytes - other.activation_bytes,
        }
    }
}

/// An operation of a block, with its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// What it is: `linear`, `attention`.
    pub operator: &'static str,
    /// Name of its weights, where the block read them by one: `encoder.layer.3.output.dense`.
    pub name: Option<Arc<str>>,
    /// When it began, from the start of the profile.
    pub start: Duration,
    /// How long it took.
    pub time: Duration,
    /// What it did.
    pub cost: Recorded,
}

/// A profile that is being taken.
struct Profile {
    began: Instant,
    spans: Vec<Span>,
    /// Within an operation, of which others are a part.
    open: bool,
}

thread_local! {
    static RECORDED: Cell<Option<Recorded>> = const { Cell::new(None) };
    static PROFILE: RefCell<Option<Profile>> = const { RefCell::new(None) };
}

/// Runs `f` and takes the time of each operation of its blocks on this thread, in order. What a model does in candle's own
/// operations lies between them. On a device other than the CPU it is the time of handing an operation over.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::{cost, linear::Linear};
///
/// let linear = Linear::new(&Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?, None)?;
/// let x = Tensor::new(&[[1f32, 1., 1.]], &Device::Cpu)?;
/// let (y, spans) = cost::profile(|| linear.forward(&x));
/// assert_eq!(y?.to_vec2::<f32>()?, [[6.]]);
/// assert_eq!((spans.len(), spans[0].operator, spans[0].cost.flops), (1, "linear", 6));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn profile<T>(f: impl FnOnce() -> T) -> (T, Vec<Span>) {
    /// Gives an outer profile back, also when `f` panics.
    struct Outer(Option<Profile>);
    impl Drop for Outer {
        fn drop(&mut self) {
            drop(PROFILE.replace(self.0.take()));
        }
    }
    let profile = Profile { began: Instant::now(), spans: Vec::new(), open: false };
    let _outer = Outer(PROFILE.replace(Some(profile)));
    let (result, _) = record(f);
    let spans = PROFILE.with_borrow_mut(|profile| profile.take()).map_or_else(Vec::new, |profile| profile.spans);
    (result, spans)
}

/// An operation that is timed until this is dropped.
pub(crate) struct Timed {
    operator: &'static str,
    name: Option<Arc<str>>,
    began: Instant,
    before: Recorded,
}

/// Times the operation that begins here, where a profile is taken and it is not a part of another.
pub(crate) fn span(operator: &'static str, name: Option<&Arc<str>>) -> Option<Timed> {
    PROFILE.with_borrow_mut(|profile| {
        let profile = profile.as_mut().filter(|profile| !profile.open)?;
        profile.open = true;
        let before = RECORDED.get().unwrap_or_default();
        Some(Timed { operator, name: name.cloned(), began: Instant::now(), before })
    })
}

impl Drop for Timed {
    fn drop(&mut self) {
        let time = self.began.elapsed();
        PROFILE.with_borrow_mut(|profile| {
            let Some(profile) = profile else { return };
            profile.open = false;
            profile.spans.push(Span {
                operator: self.operator,
                name: self.name.take(),
                start: self.began.duration_since(profile.began),
                time,
                cost: RECORDED.get().unwrap_or_default() - self.before,
            });
        });
    }
}

/// Runs `f` and counts what its blocks do on this thread. An outer call counts what an inner one does.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::{cost, linear::Linear};
///
/// let linear = Linear::new(&Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?, None)?;
/// let x = Tensor::new(&[[1f32, 1., 1.], [0., 0., 1.]], &Device::Cpu)?;
/// let (y, recorded) = cost::record(|| linear.forward(&x));
/// assert_eq!(y?.to_vec2::<f32>()?, [[6.], [3.]]);
/// assert_eq!((recorded.flops, recorded.activation_bytes), (2 * 2 * 3, 2 * 4));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn record<T>(f: impl FnOnce() -> T) -> (T, Recorded) {
    /// Gives the outer count back, also when `f` panics.
    struct Outer(Option<Recorded>);
    impl Drop for Outer {
        fn drop(&mut self) {
            let inner = RECORDED.take().unwrap_or_default();
            RECORDED.set(self.0.map(|outer| outer + inner));
        }
    }
    let outer = Outer(RECORDED.replace(Some(Recorded::default())));
    let result = f();
    let recorded = RECORDED.get().unwrap_or_default();
    drop(outer);
    (result, recorded)
}

/// Adds what `cost` gives where counting is on.
pub(crate) fn note(cost: impl FnOnce() -> Recorded) {
    if let Some(so_far) = RECORDED.get() {
        RECORDED.set(Some(so_far + cost()));
    }
}

/// Notes element-wise work that a model does in candle's own operations, such as a sum of embeddings.
pub fn elementwise(elements: usize, flops_per_element: usize) {
    note(|| Recorded { flops: (elements * flops_per_element) as u64, ..Recorded::default() });
}

/// An operation with weights.
pub(crate) fn weighted(flops: usize, weight_bytes: usize, activation_bytes: usize) -> Recorded {
    Recorded { flops: flops as u64, weight_bytes: weight_bytes as u64, activation_bytes: activation_bytes as u64 }
}

/// FLOPs of softmax per score: scale, subtract the maximum, exponential, sum, multiply by the inverse.
const SOFTMAX_FLOPS: u64 = 5;

/// Attention of `heads` heads of `head_dim` over a batch; both products and softmax over the pairs that `pattern` lets
/// see each other.
pub(crate) fn attention(
    pattern: Pattern,
    [batch, queries, keys]: [usize; 3],
    [heads, head_dim]: [usize; 2],
    element_bytes: usize,
) -> Recorded {
    let visible = |query: usize| {
        let (from, to) = pattern.range(query as i64 + keys as i64 - queries as i64);
        (to.min(keys as i64) - from.max(0)).max(0) as u64
    };
    let pairs = (0..queries).map(visible).sum::<u64>() * (batch * heads) as u64;
    Recorded {
        flops: attention_flops(pairs, head_dim as u64),
        weight_bytes: 0,
        activation_bytes: (batch * queries * heads * head_dim * element_bytes) as u64,
    }
}

/// Both products and softmax over pairs of a query and a key, counted for every head.
pub(crate) fn attention_flops(pairs: u64, head_dim: u64) -> u64 {
    pairs * (4 * head_dim + SOFTMAX_FLOPS)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor};

    use super::*;
    use crate::activation::Activation;
    use crate::attention::Attention;
    use crate::conv::{Conv2d, Conv2dConfig};
    use crate::embedding::Embedding;
    use crate::linear::Linear;
    use crate::mlp::gated;
    use crate::norm::{GroupNorm, LayerNorm, RmsNorm};
    use crate::pooling::{Pool2dConfig, global_avg_pool_2d, max_pool_2d};
    use crate::resize::nearest_add;

    fn flops<T>(f: impl FnOnce() -> Result<T>) -> u64 {
        let (result, recorded) = record(f);
        result.map(|_| recorded.flops).unwrap()
    }

    #[test]
    fn blocks_by_hand() -> Result<()> {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
        // 2 rows, 3 -> 4: 2 · 24 and 8 for the bias, 8 for the activation or the residual
        let linear = Linear::new(&ones(&[4, 3])?, Some(&ones(&[4])?))?;
        let x = ones(&[1, 2, 3])?;
        assert_eq!(flops(|| linear.forward(&x)), 56);
        assert_eq!(flops(|| linear.forward_act(&x, Activation::Gelu)), 64);
        assert_eq!(flops(|| linear.forward_add(&x, &ones(&[1, 2, 4])?)), 64);
        assert_eq!(flops(|| Activation::Silu.forward(&x)), 6);
        assert_eq!(flops(|| gated(&ones(&[2, 6])?, Activation::Silu)), 12);
        assert_eq!(flops(|| LayerNorm::new(&ones(&[3])?, None, 1e-5)?.forward(&x)), 42);
        assert_eq!(flops(|| RmsNorm::new(&ones(&[3])?, 1e-5)?.forward(&x)), 24);
        let table = Embedding::new(&ones(&[9, 5])?)?;
        let (_, looked_up) = record(|| table.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?));
        assert_eq!(looked_up, Recorded { flops: 0, weight_bytes: 40, activation_bytes: 40 });
        Ok(())
    }

    #[test]
    fn maps_by_hand() -> Result<()> {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
        // 2 -> 4 channels, 3 x 3 on 5 x 5 pixels: 100 outputs with windows of 18 and a bias
        let config = Conv2dConfig::new(3).padding(1);
        let conv = Conv2d::new(&ones(&[4, 2, 3, 3])?, Some(&ones(&[4])?), config)?;
        let (x, y) = (ones(&[1, 5, 5, 2])?, ones(&[1, 5, 5, 4])?);
        assert_eq!(flops(|| conv.forward(&x)), 3700);
        assert_eq!(flops(|| conv.forward_act(&x, Activation::Relu)), 3800);
        assert_eq!(flops(|| conv.forward_add(&x, &y, Activation::Relu)), 3900);
        let norm = GroupNorm::new(2, &ones(&[4])?, None, 1e-5)?;
        assert_eq!(flops(|| norm.forward_act(&y, Activation::Relu)), 8 * 100);
        assert_eq!(flops(|| global_avg_pool_2d(&y)), 100);
        assert_eq!(flops(|| max_pool_2d(&y, Pool2dConfig::new(3, 2))), 0);
        assert_eq!(flops(|| nearest_add(&ones(&[1, 2, 2, 4])?, &y)), 100);
        Ok(())
    }

    #[test]
    fn attention_by_hand() -> Result<()> {
        let ones = |rows, width| Tensor::ones((1, rows, width), DType::F32, &Device::Cpu);
        let over = |pattern, queries, keys| {
            let attention = Attention { heads: 4, kv_heads: 2, head_dim: 8, scale: None, pattern };
            let (q, kv) = (ones(queries, 32).unwrap(), ones(keys, 16).unwrap());
            flops(|| attention.forward(&q, &kv, &kv, None))
        };
        let of = |pairs: u64| pairs * 4 * (2 * 8 * 2 + 5);
        assert_eq!(over(Pattern::Full, 2, 5), of(10));
        assert_eq!(over(Pattern::Causal, 4, 4), of(10));
        assert_eq!(over(Pattern::Causal, 1, 4), of(4));
        assert_eq!(over(Pattern::Sliding(2), 4, 4), of(7));
        Ok(())
    }

    #[test]
    fn operations_are_timed_in_order_and_their_parts_are_not() -> Result<()> {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
        let (norm, linear) = (LayerNorm::new(&ones(&[3])?, None, 1e-5)?, Linear::new(&ones(&[4, 3])?, None)?);
        let linear = linear.named("layer.0.dense");
        assert!(span("off", None).is_none());
        let (y, spans) = profile(|| linear.forward_act(&norm.forward(&ones(&[2, 3])?)?, Activation::Gelu));
        assert_eq!(y?.dims(), [2, 4]);
        let found: Vec<_> = spans.iter().map(|span| (span.operator, span.name.as_deref(), span.cost.flops)).collect();
        // the activation is a part of the product
        assert_eq!(found, [("layer norm", None, 42), ("linear", Some("layer.0.dense"), 2 * 24 + 8)]);
        assert!(spans[0].start + spans[0].time <= spans[1].start);
        assert!(PROFILE.with_borrow(Option::is_none) && RECORDED.get().is_none());
        assert!(std::panic::catch_unwind(|| profile(|| panic!("in the middle"))).is_err());
        assert!(PROFILE.with_borrow(Option::is_none));
        Ok(())
    }

    #[test]
    fn counting_nests_and_ends() {
        assert!(RECORDED.get().is_none());
        let ((_, inner), outer) = record(|| {
            elementwise(3, 1);
            record(|| elementwise(5, 2))
        });
        assert_eq!((inner.flops, outer.flops), (10, 13));
        assert!(std::panic::catch_unwind(|| record(|| panic!("in the middle"))).is_err());
        assert!(RECORDED.get().is_none());
    }
}
