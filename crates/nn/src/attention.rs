//! Scaled dot-product attention: self, cross, causal, sliding, masked, biased, grouped-query.

use std::sync::Arc;

use candle_core::{CpuStorage, D, DType, Device, Layout, Result, Storage, Tensor, bail};
use candle_nn::VarBuilder;

use crate::cost;
use crate::gather::{RowIndex, gather};
use crate::kernels::attention as kernel;
use crate::linear::Linear;
use crate::{op, options};

/// Which keys a query sees by their positions. The queries are the last `queries` of the `keys` positions, so that a
/// step of decoding with a cache and a whole prompt read the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pattern {
    /// All.
    #[default]
    Full,
    /// Itself and those before it.
    Causal,
    /// Itself and those before it, so many in all.
    Sliding(usize),
}

impl Pattern {
    /// The positions that the query at `position` sees: from the first to below the second. They may lie outside the
    /// keys.
    pub(crate) fn range(self, position: i64) -> (i64, i64) {
        match self {
            Self::Full => (i64::MIN, i64::MAX),
            Self::Causal => (i64::MIN, position + 1),
            Self::Sliding(window) => (position + 1 - i64::try_from(window).unwrap_or(i64::MAX), position + 1),
        }
    }
}

/// What else is kept from, or made more or less visible to, a query.
///
/// A query that sees no key at all takes the mean over every key, as transformers' eager attention does, which puts the
/// lowest finite score on each. A bias of -∞ on each gives NaN, as there.
#[derive(Debug, Clone, Default)]
pub struct Mask {
    padding: Option<Padding>,
    /// (batch or 1, heads or 1, queries or 1, keys), added to the scaled scores.
    bias: Option<Tensor>,
    /// Which of the biases each item of the batch takes; its own, or the only one, where absent.
    which: Option<Arc<[u32]>>,
}

#[derive(Debug, Clone)]
struct Padding {
    /// Per item of the batch the positions of the keys that exist, ascending.
    valid: Arc<[Vec<u32>]>,
    keys: usize,
}

impl Mask {
    /// From the `attention_mask` of a tokenizer (batch, keys): 0 where a key does not exist. `None` when all do, so
    /// that nothing is masked for nothing.
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn padding(attention_mask: &Tensor) -> Result<Option<Self>> {
        Ok(Padding::new(attention_mask)?.map(|padding| Self { padding: Some(padding), ..Self::default() }))
    }

    /// A bias on the scaled scores, as of relative positions or ALiBi.
    ///
    /// # Shapes
    /// (batch or 1, heads or 1, queries or 1, keys).
    ///
    /// # Errors
    /// When it has another number of dimensions.
    pub fn additive(bias: &Tensor) -> Result<Self> {
        bias.dims4()?;
        Ok(Self { bias: Some(bias.clone()), ..Self::default() })
    }

    /// A few biases of which each item of the batch takes one: item `i` the `which[i]`-th. Windows of an image share
    /// theirs so. Quickest is a bias whose queries lie side by side: (biases, heads, keys, queries), transposed.
    ///
    /// # Shapes
    /// (biases, heads or 1, queries or 1, keys).
    ///
    /// # Errors
    /// When it has another number of dimensions, or `which` names one that does not exist.
    pub fn additive_choice(bias: &Tensor, which: impl Into<Arc<[u32]>>) -> Result<Self> {
        let ((biases, ..), which) = (bias.dims4()?, which.into());
        if let Some(beyond) = which.iter().find(|index| **index as usize >= biases) {
            bail!("attention: the bias has shape {:?}, an item asks for number {beyond}", bias.dims())
        }
        Ok(Self { bias: Some(bias.clone()), which: Some(which), ..Self::default() })
    }

    /// The same with a bias, as in [`additive`](Self::additive).
    ///
    /// # Errors
    /// As there.
    pub fn with_bias(self, bias: &Tensor) -> Result<Self> {
        bias.dims4()?;
        Ok(Self { bias: Some(bias.clone()), which: None, ..self })
    }

    /// The same for some of the queries: the part of a bias that is theirs.
    fn of_rows(&self, rows: &Rows) -> Result<Self> {
        let part = |bias: &Tensor| match rows {
            _ if bias.dim(2)? == 1 => Ok(bias.clone()),
            Rows::All => Ok(bias.clone()),
            Rows::Range { start, len } => bias.narrow(2, *start, *len),
            Rows::Picked(_) => bail!("attention: of a bias per query no part is picked"),
        };
        Ok(Self { bias: self.bias.as_ref().map(part).transpose()?, ..self.clone() })
    }

    /// The same with keys that do not exist, as in [`padding`](Self::padding).
    ///
    /// # Errors
    /// As there.
    pub fn with_padding(self, attention_mask: &Tensor) -> Result<Self> {
        Ok(Self { padding: Padding::new(attention_mask)?, ..self })
    }
}

impl Padding {
    fn new(attention_mask: &Tensor) -> Result<Option<Self>> {
        let (_, keys) = attention_mask.dims2()?;
        let rows = attention_mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let position = |(i, x): (usize, &f32)| (*x != 0.0).then_some(i as u32);
        let valid: Arc<[Vec<u32>]> =
            rows.iter().map(|row| row.iter().enumerate().filter_map(position).collect()).collect();
        Ok(valid.iter().any(|valid| valid.len() < keys).then_some(Self { valid, keys }))
    }
}

/// softmax(q kᵀ · scale + mask) v, for each head.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::attention::{Attention, Pattern};
///
/// let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, scale: None, pattern: Pattern::Causal };
/// let row = |x: [f32; 2]| Tensor::new(&x, &Device::Cpu)?.reshape((1, 2, 1));
/// // equal scores: the first query sees one key, the second both
/// let y = attention.forward(&row([1., 1.])?, &row([0., 0.])?, &row([2., 4.])?, None)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [2., 3.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values, each shared by `heads / kv_heads` neighbouring heads of the queries.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores; `head_dim^-0.5` where absent.
    pub scale: Option<f32>,
    /// Who sees whom.
    pub pattern: Pattern,
}

/// The rows that are wanted of a layer: of the others it makes keys and values alone.
#[derive(Debug, Clone)]
pub enum Rows {
    /// All.
    All,
    /// Neighbours, the same of each item.
    Range {
        /// The first.
        start: usize,
        /// How many.
        len: usize,
    },
    /// Any, of (batch · seq).
    Picked(RowIndex),
}

impl From<Option<usize>> for Rows {
    /// So many first ones, or all.
    fn from(first: Option<usize>) -> Self {
        first.map_or(Self::All, |len| Self::Range { start: 0, len })
    }
}

impl Rows {
    /// These rows of `x`.
    ///
    /// # Shapes
    /// (batch, seq, width) → (batch, rows, width).
    ///
    /// # Errors
    /// When there are not so many.
    pub fn of(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::All => Ok(x.clone()),
            Self::Range { start, len } => x.narrow(1, *start, *len)?.contiguous(),
            Self::Picked(index) => gather(x, index),
        }
    }
}

/// Self-attention on one product for query, key and value, which attention reads in place; or, for a layer of which
/// [some rows](Rows) alone are wanted, on one for their queries and one for keys and values. The output layer is the
/// caller's, who may fuse its residual.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::attention::{Attention, Pattern, SelfAttention};
/// use roofbench_nn::linear::Linear;
///
/// let qkv = Linear::new(&Tensor::new(&[[0f32], [0.], [2.]], &Device::Cpu)?, None)?; // query, key, value
/// let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, scale: None, pattern: Pattern::Full };
/// let x = Tensor::new(&[[[1f32], [3.]]], &Device::Cpu)?;
/// let y = SelfAttention::new(qkv, attention)?.forward(&x, None)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [4., 4.]); // equal scores: the mean of 2 and 6
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct SelfAttention {
    products: Products,
    /// A key and a value beside those of the rows, (1, 1, kv_heads · head_dim) each.
    extra: Option<[Tensor; 2]>,
    attention: Attention,
}

#[derive(Clone)]
enum Products {
    /// Query, key and value side by side.
    One(Linear),
    /// The query; key and value side by side.
    Two(Linear, Linear),
}

impl SelfAttention {
    /// From a layer that gives query, key and value side by side.
    ///
    /// # Errors
    /// When its width is not that of the heads.
    pub fn new(qkv: Linear, attention: Attention) -> Result<Self> {
        let width = attention.widths().iter().sum::<usize>();
        if qkv.out_dim() != width {
            bail!("SelfAttention: query, key and value give {} together, the heads take {width}", qkv.out_dim())
        }
        Ok(Self { products: Products::One(qkv), extra: None, attention })
    }

    /// Reads the layers that `names` gives under `vb` (query, key, value), which take rows of `dim`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(dim: usize, attention: Attention, names: [&str; 3], bias: bool, vb: VarBuilder<'_>) -> Result<Self> {
        let widths = attention.widths();
        let parts = std::array::from_fn::<_, 3, _>(|i| (names[i], widths[i]));
        Self::new(Linear::load_fused(dim, &parts, bias, vb)?, attention)
    }

    /// As [`load`](Self::load), for a layer of which some rows alone are wanted.
    ///
    /// # Errors
    /// As there.
    pub fn load_for_rows(
        dim: usize,
        attention: Attention,
        names: [&str; 3],
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if !options::current().class_token_only {
            return Self::load(dim, attention, names, bias, vb);
        }
        let widths = attention.widths();
        let q = Linear::load(dim, widths[0], bias, vb.pp(names[0]))?;
        let kv = Linear::load_fused(dim, &[(names[1], widths[1]), (names[2], widths[2])], bias, vb)?;
        Ok(Self { products: Products::Two(q, kv), extra: None, attention })
    }

    /// From the weights of query, key and value, one below the other: `weight` (sum of the widths, dim), `bias` (sum of the
    /// widths). `some_rows`: some rows alone will be wanted.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn from_weights(weight: &Tensor, bias: Option<&Tensor>, attention: Attention, some_rows: bool) -> Result<Self> {
        if !(some_rows && options::current().class_token_only) {
            return Self::new(Linear::new(weight, bias)?, attention);
        }
        let part = |begin: usize, width: usize| {
            let bias = bias.map(|bias| bias.narrow(0, begin, width)).transpose()?;
            Linear::new(&weight.narrow(0, begin, width)?, bias.as_ref())
        };
        let [queries, keys, values] = attention.widths();
        let products = Products::Two(part(0, queries)?, part(queries, keys + values)?);
        Ok(Self { products, extra: None, attention })
    }

    /// With a key and a value that every query sees besides, as `add_bias_kv` of `torch.nn.MultiheadAttention` adds them.
    ///
    /// # Shapes
    /// (1, 1, kv_heads · head_dim) each.
    pub fn with_extra(self, key: Tensor, value: Tensor) -> Self {
        Self { extra: Some([key, value]), ..self }
    }

    /// # Shapes
    /// (batch, seq, dim) → (batch, seq, heads · head_dim).
    ///
    /// # Errors
    /// As for [`Linear::forward`] and [`Attention::forward`].
    pub fn forward(&self, x: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let [q, k, v] = self.project(x, &Rows::All)?;
        self.attention.forward(&q, &k, &v, mask)
    }

    /// The queries of some rows, which see all. `mask` is the one of all rows.
    ///
    /// # Shapes
    /// (batch, seq, dim) → (batch, rows, heads · head_dim).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when a pattern hides keys by position.
    pub fn forward_of(&self, x: &Tensor, rows: &Rows, mask: Option<&Mask>) -> Result<Tensor> {
        match (&self.products, rows) {
            (_, Rows::All) => self.forward(x, mask),
            // made for all, and chosen from
            (Products::One(_), rows) => rows.of(&self.forward(x, mask)?),
            (Products::Two(..), rows) => {
                if self.attention.pattern != Pattern::Full {
                    bail!("attention: some rows are wanted under {:?}, which goes by position", self.attention.pattern)
                }
                let [q, k, v] = self.project(x, rows)?;
                let mask = mask.map(|mask| mask.of_rows(rows)).transpose()?;
                self.attention.forward(&q, &k, &v, mask.as_ref())
            }
        }
    }

    /// Over the rows of `x` that `index` picks, as windows of an image are.
    ///
    /// # Shapes
    /// (..., dim) → (batch, seq, heads · head_dim), the first two those of the index.
    ///
    /// # Errors
    /// As for [`Linear::forward_rows`] and [`Attention::forward`].
    pub fn forward_rows(&self, x: &Tensor, index: &RowIndex, mask: Option<&Mask>) -> Result<Tensor> {
        let Products::One(qkv) = &self.products else { return self.forward(&gather(x, index)?, mask) };
        let [q, k, v] = self.attention.split(&qkv.forward_rows(x, index)?)?;
        self.attention.forward(&q, &k, &v, mask)
    }

    /// Queries of `rows`, keys and values of all, as views where they may be.
    fn project(&self, x: &Tensor, rows: &Rows) -> Result<[Tensor; 3]> {
        let [q, k, v] = match &self.products {
            Products::One(qkv) => self.attention.split(&qkv.forward(x)?)?,
            Products::Two(q, kv) => {
                let (kv, [_, keys, values]) = (kv.forward(x)?, self.attention.widths());
                [q.forward(&rows.of(x)?)?, kv.narrow(2, 0, keys)?, kv.narrow(2, keys, values)?]
            }
        };
        let Some([key, value]) = &self.extra else { return Ok([q, k, v]) };
        let behind = |x: &Tensor, extra: &Tensor| {
            let (batch, _, width) = x.dims3()?;
            Tensor::cat(&[x, &extra.broadcast_as((batch, 1, width))?], 1)
        };
        Ok([q, behind(&k, key)?, behind(&v, value)?])
    }

    /// Queries, keys and values of a pass, for a cache: see [`Decoding`](crate::decoding::Decoding).
    ///
    /// # Shapes
    /// (batch, seq, dim) → as for [`Attention::split`].
    ///
    /// # Errors
    /// As for [`Linear::forward`].
    pub fn qkv(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        self.project(x, &Rows::All)
    }

    /// The heads.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
}

impl Attention {
    /// Queries, keys and values of a product that gives them side by side, as views.
    ///
    /// # Shapes
    /// (batch, seq, (heads + 2 · kv_heads) · head_dim) → (batch, seq, heads · head_dim), and twice (batch, seq, kv_heads ·
    /// head_dim).
    ///
    /// # Errors
    /// When it is less wide.
    pub fn split(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let [queries, keys, values] = self.widths();
        Ok([qkv.narrow(2, 0, queries)?, qkv.narrow(2, queries, keys)?, qkv.narrow(2, queries + keys, values)?])
    }

    /// Widths of queries, keys and values.
    fn widths(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head_dim)
    }

    /// On the CPU in f32 a fused kernel, which keeps no score matrix; elsewhere, and where [`options`] say so, candle's
    /// operations.
    ///
    /// # Shapes
    /// `q` is (batch, queries, heads · head_dim), `k` and `v` (batch, keys, kv_heads · head_dim); any may be a `narrow`
    /// of one product that holds all three. The result is as `q`, contiguous.
    ///
    /// # Errors
    /// When shapes do not fit together, or `kv_heads` does not divide `heads`.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let sizes = self.check(q, k, v, mask)?;
        let _span = cost::span("attention", None);
        cost::note(|| {
            let shape = [sizes.batch, sizes.queries, sizes.keys];
            cost::attention(self.pattern, shape, [self.heads, self.head_dim], q.dtype().size_in_bytes())
        });
        if !options::current().fused_attention || ![q, k, v].into_iter().all(op::is_cpu_f32) {
            return self.forward_plain(q, k, v, mask);
        }
        let unit_rows = |x: &Tensor| if x.stride()[2] == 1 { Ok(x.clone()) } else { x.contiguous() };
        let bias = match mask.and_then(|mask| mask.bias.as_ref()) {
            Some(bias) if bias.stride()[2..].contains(&1) => Some(bias.to_dtype(DType::F32)?),
            Some(bias) => Some(bias.to_dtype(DType::F32)?.contiguous()?),
            None => None,
        };
        let bias = bias.as_ref().map(|bias| bias.storage_and_layout());
        let bias = match &bias {
            Some((storage, layout)) => match &**storage {
                Storage::Cpu(storage) => {
                    let strides = [0, 1, 2, 3].map(|d| if layout.dims()[d] == 1 { 0 } else { layout.stride()[d] });
                    let data = storage.as_slice::<f32>()?.get(layout.start_offset()..).unwrap_or_default();
                    let which = mask.and_then(|mask| mask.which.as_deref());
                    Some(kernel::Bias { data, strides, which })
                }
                _ => bail!("attention: the bias is on {:?}, the queries on the CPU", q.device()),
            },
            None => None,
        };
        let valid = mask.and_then(|mask| mask.padding.as_ref()).map(|padding| &*padding.valid);
        op::apply3("attention", [&unit_rows(q)?, &unit_rows(k)?, &unit_rows(v)?], |[q, k, v]| {
            let attention = kernel::Attention {
                batch: sizes.batch,
                heads: self.heads,
                kv_heads: self.kv_heads,
                queries: sizes.queries,
                keys: sizes.keys,
                head_dim: self.head_dim,
                scale: self.scale(),
                pattern: self.pattern,
                q: strided(q)?,
                k: strided(k)?,
                v: strided(v)?,
                valid,
                bias,
            };
            let y = kernel::attention(&attention).map_err(candle_core::Error::wrap)?;
            Ok((y, (sizes.batch, sizes.queries, self.heads * self.head_dim).into()))
        })
    }

    /// As [`forward`](Self::forward), in candle's own operations with the whole score matrix: the path of other devices
    /// and dtypes, and what the fused one is tested against.
    ///
    /// # Errors
    /// As there.
    pub fn forward_plain(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Mask>) -> Result<Tensor> {
        let sizes = self.check(q, k, v, mask)?;
        let Sizes { batch, queries, keys } = sizes;
        if batch * queries * keys == 0 {
            return Tensor::zeros((batch, queries, self.heads * self.head_dim), q.dtype(), q.device());
        }
        // (batch, kv_heads, heads / kv_heads · queries, head_dim): heads that share keys are rows of one product
        let q = q.reshape((batch, queries, self.heads, self.head_dim))?.transpose(1, 2)?.contiguous()?;
        let q = q.reshape((batch, self.kv_heads, (), self.head_dim))?;
        let shared = |x: &Tensor| x.reshape((batch, keys, self.kv_heads, self.head_dim))?.transpose(1, 2)?.contiguous();
        let scores = q.matmul(&shared(k)?.t()?)?.to_dtype(DType::F32)?;
        let scores = (scores * f64::from(self.scale()))?.reshape((batch, self.heads, queries, keys))?;
        let scores = match mask.and_then(|mask| Some((mask.bias.as_ref()?, mask.which.as_deref()))) {
            Some((bias, None)) => scores.broadcast_add(&bias.to_dtype(DType::F32)?)?,
            Some((bias, Some(which))) => {
                let bias = bias.contiguous()?.index_select(&Tensor::new(which, bias.device())?, 0)?;
                scores.broadcast_add(&bias.to_dtype(DType::F32)?)?
            }
            None => scores,
        };
        let scores = match self.allowed(mask, sizes, scores.device())? {
            Some(allowed) => {
                let lowest = Tensor::new(f32::MIN, scores.device())?.broadcast_as(scores.shape())?;
                allowed.broadcast_as(scores.shape())?.where_cond(&scores, &lowest)?
            }
            None => scores,
        };
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        let y = weights.reshape((batch, self.kv_heads, (), keys))?.matmul(&shared(v)?)?;
        let y = y.reshape((batch, self.heads, queries, self.head_dim))?.transpose(1, 2)?;
        y.reshape((batch, queries, self.heads * self.head_dim))
    }

    /// Which keys each query sees (batch or 1, 1, queries, keys), unless it is all.
    fn allowed(&self, mask: Option<&Mask>, sizes: Sizes, device: &Device) -> Result<Option<Tensor>> {
        let padding = mask.and_then(|mask| mask.padding.as_ref());
        if self.pattern == Pattern::Full && padding.is_none() {
            return Ok(None);
        }
        let all = (0..sizes.keys as u32).collect::<Vec<_>>();
        let valid = padding.map_or(std::slice::from_ref(&all), |padding| &padding.valid);
        let mut allowed = vec![0u8; valid.len() * sizes.queries * sizes.keys];
        for (row, allowed) in allowed.chunks_exact_mut(sizes.keys).enumerate() {
            let (item, query) = (row / sizes.queries, row % sizes.queries);
            let (from, to) = self.pattern.range(query as i64 + sizes.keys as i64 - sizes.queries as i64);
            for &key in valid[item].iter().filter(|&&key| (from..to).contains(&i64::from(key))) {
                allowed[key as usize] = 1;
            }
        }
        Ok(Some(Tensor::from_vec(allowed, (valid.len(), 1, sizes.queries, sizes.keys), device)?))
    }

    fn scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| (self.head_dim as f32).powf(-0.5))
    }

    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Mask>) -> Result<Sizes> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads * head_dim == 0 {
            bail!("attention: {heads} heads of width {head_dim} cannot share {kv_heads} heads of keys and values")
        }
        let ((batch, queries, _), (_, keys, _)) = (q.dims3()?, k.dims3()?);
        for (name, x, expected) in [
            ("queries", q, [batch, queries, heads * head_dim]),
            ("keys", k, [batch, keys, kv_heads * head_dim]),
            ("values", v, [batch, keys, kv_heads * head_dim]),
        ] {
            if x.dims() != expected {
                bail!("attention: the {name} have shape {:?}, expected {expected:?}", x.dims())
            }
        }
        if let Some(padding) = mask.and_then(|mask| mask.padding.as_ref())
            && (padding.valid.len(), padding.keys) != (batch, keys)
        {
            let found = [padding.valid.len(), padding.keys];
            bail!("attention: the padding mask has shape {found:?}, expected {:?}", [batch, keys])
        }
        if let Some(which) = mask.and_then(|mask| mask.which.as_ref())
            && which.len() != batch
        {
            bail!("attention: biases are chosen for {} items, the batch has {batch}", which.len())
        }
        if let Some((mask, bias)) = mask.and_then(|mask| Some((mask, mask.bias.as_ref()?))) {
            let expected = [batch, heads, queries, keys];
            let fits = |(d, (found, expected)): (usize, (&usize, &usize))| {
                found == expected || (*found == 1 && d < 3) || (d == 0 && mask.which.is_some())
            };
            if !bias.dims().iter().zip(&expected).enumerate().all(fits) {
                bail!("attention: the bias has shape {:?}, expected {expected:?} or 1 in the first three", bias.dims())
            }
        }
        Ok(Sizes { batch, queries, keys })
    }
}

/// A tensor (batch, rows, width) whose rows are contiguous.
pub(crate) fn strided<'a>((storage, layout): (&'a CpuStorage, &Layout)) -> Result<kernel::Strided<'a>> {
    let data = storage.as_slice::<f32>()?.get(layout.start_offset()..).unwrap_or_default();
    Ok(kernel::Strided { data, batch: layout.stride()[0], row: layout.stride()[1] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_paths_agree(attention: &Attention, [q, k, v]: [&Tensor; 3], mask: Option<&Mask>) -> Result<()> {
        let fused = attention.forward(q, k, v, mask)?;
        let plain = attention.forward_plain(q, k, v, mask)?;
        assert!(fused.is_contiguous());
        assert_eq!(fused.dims(), plain.dims());
        let difference = (fused - plain)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        // sums of some hundred products of size 1 in another order
        assert!(difference < 1e-5, "{attention:?}: {difference}");
        Ok(())
    }

    #[test]
    fn some_rows_are_those_of_all() -> Result<()> {
        let wave = |shape: (usize, usize), k: f32| {
            let data = (0..shape.0 * shape.1).map(|i| (i as f32 * k).sin()).collect::<Vec<_>>();
            Tensor::from_vec(data, shape, &Device::Cpu)
        };
        let parts = [wave((8, 6), 0.3)?, wave((8, 6), 0.7)?, wave((8, 6), 0.9)?];
        let names = ["q", "k", "v"];
        let weights = names.iter().zip(&parts).map(|(name, part)| (format!("{name}.weight"), part.clone())).collect();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let weight = Tensor::cat(&parts, 0)?;
        let attention = Attention { heads: 2, kv_heads: 2, head_dim: 4, scale: None, pattern: Pattern::Full };
        let x = wave((3 * 7, 6), 1.1)?.reshape((3, 7, 6))?;
        let exists = [[1u8; 7], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1]];
        let padding = Mask::padding(&Tensor::new(&exists, &Device::Cpu)?)?.unwrap();
        let bias = wave((2 * 7, 7), 0.2)?.reshape((1, 2, 7, 7))?;
        let extra = [wave((1, 8), 0.5)?.unsqueeze(0)?, wave((1, 8), 0.4)?.unsqueeze(0)?];
        let picked = RowIndex::new(21, (3, 1), [Some(2), Some(9), Some(20)])?;
        for (mask, extra) in
            [(None, None), (None, Some(&extra)), (Some(padding.clone()), None), (Some(padding.with_bias(&bias)?), None)]
        {
            let with = |attention: SelfAttention| match extra {
                Some([key, value]) => attention.with_extra(key.clone(), value.clone()),
                None => attention,
            };
            let whole = with(SelfAttention::load(6, attention, names, false, vb.clone())?);
            let all = whole.forward(&x, mask.as_ref())?;
            let rows = [Rows::All, Rows::Range { start: 1, len: 2 }, Rows::Picked(picked.clone())];
            let bias_per_query = mask.as_ref().is_some_and(|mask| mask.bias.is_some());
            for rows in &rows[..if bias_per_query { 2 } else { 3 }] {
                for some in [
                    with(SelfAttention::load_for_rows(6, attention, names, false, vb.clone())?),
                    with(SelfAttention::from_weights(&weight, None, attention, true)?),
                    with(SelfAttention::from_weights(&weight, None, attention, false)?),
                ] {
                    let found = some.forward_of(&x, rows, mask.as_ref())?;
                    let error = (rows.of(&all)? - found)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(error < 1e-6, "{rows:?}: {error}");
                }
            }
        }
        let causal = Attention { pattern: Pattern::Causal, ..attention };
        let causal = SelfAttention::load_for_rows(6, causal, names, false, vb)?;
        let error = causal.forward_of(&x, &Rows::Range { start: 0, len: 1 }, None).unwrap_err().to_string();
        assert!(error.contains("Causal"), "{error}");
        Ok(())
    }

    #[test]
    fn an_extra_key_that_outweighs_all_others_decides() -> Result<()> {
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 2, scale: None, pattern: Pattern::Full };
        let weight = Tensor::cat(
            &[Tensor::eye(2, DType::F32, &Device::Cpu)?, Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?],
            0,
        )?;
        let extra = Tensor::new(&[[[100f32, 100.]], [[7., 8.]]], &Device::Cpu)?;
        let attention = SelfAttention::from_weights(&weight, None, attention, false)?;
        let attention = attention.with_extra(extra.narrow(0, 0, 1)?, extra.narrow(0, 1, 1)?);
        let y = attention.forward(&Tensor::ones((1, 3, 2), DType::F32, &Device::Cpu)?, None)?;
        assert_eq!(y.dims(), [1, 3, 2]);
        assert_eq!(y.narrow(D::Minus1, 0, 1)?.flatten_all()?.to_vec1::<f32>()?, [7.0; 3]);
        Ok(())
    }

    #[test]
    fn the_fused_path_agrees_with_the_plain_one() -> Result<()> {
        let cpu = &Device::Cpu;
        for (heads, kv_heads, head_dim, seq) in [(4, 4, 64, 37), (6, 2, 33, 70), (2, 1, 80, 1)] {
            let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
            let fused = Tensor::randn(0f32, 1.0, (3, seq, width + 2 * kv_width), cpu)?;
            let (q, k) = (fused.narrow(2, 0, width)?, fused.narrow(2, width, kv_width)?);
            let v = fused.narrow(2, width + kv_width, kv_width)?;
            let last = q.narrow(1, seq - 1, 1)?;
            let ones = Tensor::ones((3, seq), DType::I64, cpu)?;
            let left = Tensor::cat(
                &[&ones.zeros_like()?.narrow(1, 0, seq / 2)?, &ones.narrow(1, seq / 2, seq - seq / 2)?],
                1,
            )?;
            let padded = Mask::padding(&left)?;
            for pattern in [Pattern::Full, Pattern::Causal, Pattern::Sliding(9)] {
                let attention = Attention { heads, kv_heads, head_dim, scale: None, pattern };
                assert_paths_agree(&attention, [&q, &k, &v], None)?;
                assert_paths_agree(&attention, [&last, &k, &v], None)?;
                assert_paths_agree(&attention, [&q, &k, &v], padded.as_ref())?;
                assert_paths_agree(&attention, [&q, &k.contiguous()?, &v.contiguous()?], padded.as_ref())?;
                for (b, h, n) in [(1, 1, 1), (3, 1, seq), (1, heads, seq), (3, heads, 1)] {
                    let mask = Mask::additive(&Tensor::randn(0f32, 1.0, (b, h, n, seq), cpu)?)?;
                    assert_paths_agree(&attention, [&q, &k, &v], Some(&mask))?;
                    assert_paths_agree(&attention, [&q, &k, &v], Some(&mask.with_padding(&left)?))?;
                }
                let biases = Tensor::randn(0f32, 1.0, (2, heads, seq, seq), cpu)?;
                let heads_last = biases.permute((0, 2, 3, 1))?.contiguous()?;
                for biases in [&biases, &biases.transpose(2, 3)?, &heads_last.permute((0, 3, 1, 2))?] {
                    let mask = Mask::additive_choice(biases, [1u32, 0, 1])?;
                    assert_paths_agree(&attention, [&q, &k, &v], Some(&mask))?;
                }
            }
        }
        Ok(())
    }

    /// What eager attention of transformers gives where no key may be seen: every score is the lowest finite one.
    #[test]
    fn a_query_that_sees_nothing_takes_the_mean() -> Result<()> {
        let cpu = &Device::Cpu;
        let attention = Attention { heads: 1, kv_heads: 1, head_dim: 1, scale: None, pattern: Pattern::Full };
        let q = Tensor::new(&[[[1f32]]], cpu)?;
        let k = Tensor::new(&[[[5f32], [1.], [0.]]], cpu)?;
        let v = Tensor::new(&[[[1f32], [2.], [6.]]], cpu)?;
        let mask = Mask::padding(&Tensor::zeros((1, 3), DType::I64, cpu)?)?;
        for y in [attention.forward(&q, &k, &v, mask.as_ref())?, attention.forward_plain(&q, &k, &v, mask.as_ref())?] {
            assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3.0]);
        }
        Ok(())
    }

    #[test]
    fn all_ones_mask_nothing() -> Result<()> {
        assert!(Mask::padding(&Tensor::ones((2, 5), DType::I64, &Device::Cpu)?)?.is_none());
        Ok(())
    }

    #[test]
    fn misfits_are_named() -> Result<()> {
        let cpu = &Device::Cpu;
        let attention = Attention { heads: 4, kv_heads: 2, head_dim: 8, scale: None, pattern: Pattern::Full };
        let (q, k) = (Tensor::zeros((1, 3, 32), DType::F32, cpu)?, Tensor::zeros((1, 5, 16), DType::F32, cpu)?);
        let error =
            |q: &Tensor, k: &Tensor, mask: Option<&Mask>| attention.forward(q, k, k, mask).unwrap_err().to_string();
        assert!(error(&q.narrow(2, 0, 31)?, &k, None).contains("queries have shape [1, 3, 31], expected [1, 3, 32]"));
        let mask = Mask::padding(&Tensor::zeros((1, 4), DType::I64, cpu)?)?;
        assert!(error(&q, &k, mask.as_ref()).contains("padding mask has shape [1, 4], expected [1, 5]"));
        let mask = Mask::additive(&Tensor::zeros((1, 1, 3, 1), DType::F32, cpu)?)?;
        assert!(error(&q, &k, Some(&mask)).contains("bias has shape [1, 1, 3, 1], expected [1, 4, 3, 5]"));
        let biases = Tensor::zeros((2, 1, 3, 5), DType::F32, cpu)?;
        assert!(error(&q, &k, Some(&Mask::additive_choice(&biases, [0u32, 1])?)).contains("chosen for 2 items"));
        assert!(Mask::additive_choice(&biases, [2u32]).unwrap_err().to_string().contains("number 2"));
        let attention = Attention { kv_heads: 3, ..attention };
        assert!(attention.forward(&q, &k, &k, None).unwrap_err().to_string().contains("cannot share 3"));
        Ok(())
    }
}
