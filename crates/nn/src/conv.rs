//! Convolutions over channels-last images (batch, height, width, channels) and sequences (batch, length, channels): on
//! the CPU with weights packed at load, elsewhere candle's own. Mirrors `torch.nn.Conv1d`, `Conv2d`, `ConvTranspose1d`
//! and `ConvTranspose2d`, whose weights they read.
//!
//! An image enters and leaves the layout once per model, by [`to_channels_last`] and [`to_channels_first`].

use std::mem::MaybeUninit;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use candle_nn::VarBuilder;
use serde::Deserialize;

use crate::activation::Activation;
use crate::cost;
use crate::gather::{RowIndex, gather};
use crate::kernels::KernelError;
use crate::kernels::activation::activate;
use crate::kernels::conv::{After, Geometry, PackedConv, PackedConvTranspose, TransposedGeometry};
use crate::kernels::matmul::Weights;
use crate::{memory, op, options};

/// (batch, channels, height, width) → (batch, height, width, channels), or (batch, channels, length) likewise.
///
/// # Errors
/// When `x` has fewer than three dimensions.
pub fn to_channels_last(x: &Tensor) -> Result<Tensor> {
    let rank = at_least_three(x)?;
    if op::is_cpu_f32(x) {
        let dims = x.dims();
        return transposed(x, dims[1], [&dims[..1], &dims[2..], &dims[1..2]].concat());
    }
    let order: Vec<usize> = [0].into_iter().chain(2..rank).chain([1]).collect();
    x.permute(order)?.contiguous()
}

/// (batch, height, width, channels) → (batch, channels, height, width), or (batch, length, channels) likewise.
///
/// # Errors
/// When `x` has fewer than three dimensions.
pub fn to_channels_first(x: &Tensor) -> Result<Tensor> {
    let rank = at_least_three(x)?;
    if op::is_cpu_f32(x) {
        let dims = x.dims();
        let pixels = dims[1..rank - 1].iter().product();
        return transposed(x, pixels, [&dims[..1], &dims[rank - 1..], &dims[1..rank - 1]].concat());
    }
    let order: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    x.permute(order)?.contiguous()
}

/// Columns that one thread turns into lines at a time: at least a cache line of each row.
const COLUMNS: usize = 16;
/// Rows of a tile, which stays in the first-level cache.
const ROWS: usize = 64;
/// Elements that one thread writes at a time, where the rows are short.
const CHUNK: usize = 4096;

/// Each item of `x` (batch, rows, columns) transposed, in the form of `shape`.
fn transposed(x: &Tensor, rows: usize, shape: Vec<usize>) -> Result<Tensor> {
    op::apply1("transpose", &x.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        if x.is_empty() {
            return Ok((Vec::new(), shape.clone().into()));
        }
        let columns = x.len() / shape[0] / rows;
        // a part is whole columns, which may be those of several items
        let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
            let (mut column, mut rest) = (begin / rows, part);
            while !rest.is_empty() {
                let (item, first) = (column / columns, column % columns);
                let count = (rest.len() / rows).min(columns - first);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(count * rows);
                let source = &x[item * rows * columns..][..rows * columns];
                for tile in (0..rows).step_by(ROWS) {
                    for (i, out) in now.chunks_exact_mut(rows).enumerate() {
                        for (row, out) in (tile..rows.min(tile + ROWS)).zip(&mut out[tile..]) {
                            out.write(source[row * columns + first + i]);
                        }
                    }
                }
                (column, rest) = (column + count, later);
            }
        };
        let chunk = rows * (CHUNK / rows).max(COLUMNS);
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: the parts are whole columns, and each row of each column is written.
        let y = unsafe { op::collect_chunks(x.len(), chunk, fill) };
        Ok((y, shape.clone().into()))
    })
}

fn at_least_three(x: &Tensor) -> Result<usize> {
    match x.rank() {
        rank if rank >= 3 => Ok(rank),
        _ => bail!("an input of shape {:?} has not the dimensions of an image or a sequence", x.dims()),
    }
}

/// How windows lie over an image. Pairs are (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dConfig {
    /// Taps.
    pub kernel: (usize, usize),
    /// Pixels from one window to the next.
    pub stride: (usize, usize),
    /// Zeros (above, below), (left, right).
    pub padding: ((usize, usize), (usize, usize)),
    /// Pixels from one tap to the next.
    pub dilation: (usize, usize),
    /// Parts of the channels that are convolved each by itself.
    pub groups: usize,
}

impl Conv2dConfig {
    /// A square kernel at stride 1, nothing else.
    pub fn new(kernel: usize) -> Self {
        let pair = (kernel, kernel);
        Self { kernel: pair, stride: (1, 1), padding: ((0, 0), (0, 0)), dilation: (1, 1), groups: 1 }
    }

    /// The same stride in both directions.
    pub fn stride(self, stride: usize) -> Self {
        Self { stride: (stride, stride), ..self }
    }

    /// The same number of zeros on all four sides.
    pub fn padding(self, padding: usize) -> Self {
        Self { padding: ((padding, padding), (padding, padding)), ..self }
    }

    /// The same dilation in both directions.
    pub fn dilation(self, dilation: usize) -> Self {
        Self { dilation: (dilation, dilation), ..self }
    }

    /// Several groups.
    pub fn groups(self, groups: usize) -> Self {
        Self { groups, ..self }
    }

    fn geometry(&self) -> Geometry {
        let &Self { kernel, stride, padding: (height, width), dilation, groups } = self;
        Geometry {
            kernel: kernel.into(),
            stride: stride.into(),
            dilation: dilation.into(),
            padding: [height.into(), width.into()],
            groups,
        }
    }
}

/// How windows lie over a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv1dConfig {
    /// Taps.
    pub kernel: usize,
    /// Steps from one window to the next.
    pub stride: usize,
    /// Zeros (before, after).
    pub padding: (usize, usize),
    /// Steps from one tap to the next.
    pub dilation: usize,
    /// Parts of the channels that are convolved each by itself.
    pub groups: usize,
}

impl Conv1dConfig {
    /// A kernel at stride 1, nothing else.
    pub fn new(kernel: usize) -> Self {
        Self { kernel, stride: 1, padding: (0, 0), dilation: 1, groups: 1 }
    }

    /// As an image of height 1.
    fn two_dimensional(&self) -> Conv2dConfig {
        let &Self { kernel, stride, padding, dilation, groups } = self;
        Conv2dConfig {
            kernel: (1, kernel),
            stride: (1, stride),
            padding: ((0, 0), padding),
            dilation: (1, dilation),
            groups,
        }
    }
}

/// The moments of a batch norm, to be folded into the convolution before it. Mirrors `torch.nn.BatchNorm2d` in
/// evaluation.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    /// What the input is multiplied with: weight / sqrt(running_var + eps).
    scale: Tensor,
    /// What is added then: bias - running_mean · scale.
    shift: Tensor,
}

impl BatchNorm {
    /// Reads `weight`, `bias`, `running_mean` and `running_var`, all (channels).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(channels: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        let get = |name| vb.get(channels, name);
        Self::new(&get("weight")?, &get("bias")?, &get("running_mean")?, &get("running_var")?, eps)
    }

    /// From tensors of shape (channels).
    ///
    /// # Errors
    /// When their shapes differ.
    pub fn new(weight: &Tensor, bias: &Tensor, mean: &Tensor, variance: &Tensor, eps: f64) -> Result<Self> {
        // Folding rounds once more: it is done at least in f32.
        let wide = |x: &Tensor| if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) };
        let scale = (wide(weight)? / (wide(variance)? + eps)?.sqrt()?)?;
        let shift = (wide(bias)? - (wide(mean)? * &scale)?)?;
        Ok(Self { scale, shift })
    }

    /// The weight (out, ...) and bias (out) of a convolution that this norm follows, with the norm in them.
    ///
    /// # Errors
    /// When the number of channels is another.
    pub fn fold(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let mut column = vec![1; weight.rank()];
        column[0] = self.scale.elem_count();
        let dtype = weight.dtype();
        let folded = weight.to_dtype(self.scale.dtype())?.broadcast_mul(&self.scale.reshape(column)?)?;
        let shift = match bias {
            Some(bias) => ((bias.to_dtype(self.scale.dtype())? * &self.scale)? + &self.shift)?,
            None => self.shift.clone(),
        };
        Ok((folded.to_dtype(dtype)?, shift.to_dtype(dtype)?))
    }

    /// The norm by itself, where no convolution precedes it.
    ///
    /// # Shapes
    /// `x` and the result are (..., channels).
    ///
    /// # Errors
    /// When the last dimension is not `channels`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (scale, shift) = (self.scale.to_dtype(x.dtype())?, self.shift.to_dtype(x.dtype())?);
        x.broadcast_mul(&scale)?.broadcast_add(&shift)
    }
}

/// A convolution over images, depthwise and grouped ones included. Cloning shares the weights.
///
/// On the CPU weights in f32, bf16 and f16 are packed for the kernel in their own precision and images are f32; on other
/// devices, and for other dtypes, images have the weights' dtype.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::conv::{Conv2d, Conv2dConfig};
///
/// // one channel, the sum of 2 x 2 pixels
/// let weight = Tensor::new(&[[[[1f32, 1.], [1., 1.]]]], &Device::Cpu)?; // (out, in, kernel height, kernel width)
/// let conv = Conv2d::new(&weight, None, Conv2dConfig::new(2))?;
/// let x = Tensor::new(&[[[[1f32], [2.], [3.]], [[4.], [5.], [6.]]]], &Device::Cpu)?; // (batch, height, width, channels)
/// assert_eq!(conv.forward(&x)?.flatten_all()?.to_vec1::<f32>()?, [12., 16.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Conv2d {
    channels: (usize, usize),
    config: Conv2dConfig,
    weight: Arc<Weight<PackedConv>>,
    /// For a profile.
    name: Option<Arc<str>>,
}

enum Weight<P> {
    /// For the kernel.
    Packed { packed: P, bias: Option<Vec<f32>> },
    /// For candle, as torch has them.
    Plain { weight: Tensor, bias: Option<Tensor> },
}

impl Conv2d {
    /// From `weight` (out, in / groups, kernel height, kernel width) and `bias` (out).
    ///
    /// # Errors
    /// When the shapes do not fit together or with the configuration, or a number in it is 0.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, config: Conv2dConfig) -> Result<Self> {
        memory::keep_freed_memory();
        let (out, per_group, height, width) = weight.dims4()?;
        let Conv2dConfig { kernel, stride, dilation, groups, .. } = config;
        let numbers = [out, per_group, kernel.0, kernel.1, stride.0, stride.1, dilation.0, dilation.1, groups];
        if (height, width) != kernel || numbers.contains(&0) || !out.is_multiple_of(groups) {
            bail!("a convolution of {config:?} got a weight of shape {:?}", weight.dims())
        }
        check_bias(bias, out)?;
        let channels = (per_group * groups, out);
        if options::current().sizes_only {
            return Ok(Self { channels, config, weight: Arc::new(Weight::sizes_of(weight, bias)?), name: None });
        }
        let packed = on_cpu(&weight.permute((0, 2, 3, 1))?.contiguous()?, |weights| {
            PackedConv::pack(weights, channels.0, out, config.geometry()).map_err(candle_core::Error::wrap)
        })?;
        Ok(Self { channels, config, weight: Arc::new(Weight::new(packed, weight, bias)?), name: None })
    }

    /// Reads `weight` (out, in / groups, kernel height, kernel width) and, if wanted, `bias` (out).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or as for [`new`](Self::new).
    pub fn load(
        in_channels: usize,
        out_channels: usize,
        config: Conv2dConfig,
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (weight, bias) = read(in_channels, out_channels, &config, bias, &vb)?;
        Ok(Self::new(&weight, bias.as_ref(), config)?.named(&vb))
    }

    /// Likewise, followed by `norm`, which is folded into the weights.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and when the norm has another number of channels.
    pub fn load_with_norm(
        in_channels: usize,
        out_channels: usize,
        config: Conv2dConfig,
        bias: bool,
        norm: &BatchNorm,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (weight, bias) = read(in_channels, out_channels, &config, bias, &vb)?;
        let (weight, bias) = norm.fold(&weight, bias.as_ref())?;
        Ok(Self::new(&weight, Some(&bias), config)?.named(&vb))
    }

    /// Named by its weights, for a profile.
    fn named(self, vb: &VarBuilder<'_>) -> Self {
        Self { name: Some(vb.prefix().into()), ..self }
    }

    /// Bytes that the weights and the bias occupy.
    pub fn weight_bytes(&self) -> usize {
        self.weight.bytes(PackedConv::bytes)
    }

    /// # Shapes
    /// (batch, height, width, in) → (batch, out height, out width, out).
    ///
    /// # Errors
    /// When the channels are others, the padded image is smaller than a window, or the device or dtype is not that of the
    /// weights (f32 on the CPU).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_act(x, Activation::Identity)
    }

    /// activation(conv(x)).
    ///
    /// # Shapes
    /// (batch, height, width, in) → (batch, out height, out width, out).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let shape = self.out_shape(x)?;
        let _span = cost::span("convolution", self.name.as_ref());
        self.note_cost(shape, x.dtype());
        match &*self.weight {
            Weight::Packed { packed, bias } => {
                activation.note_cost(shape.iter().product());
                let after = After { bias: bias.as_deref(), residual: None, activation };
                op::apply1("packed-conv", &x.contiguous()?, |storage, layout| {
                    run(storage, layout, shape, |x, batch, size, out| packed.forward(x, batch, size, &after, out))
                })
            }
            Weight::Plain { weight, bias } => activation.forward(&self.plain(x, weight, bias.as_ref())?),
        }
    }

    /// activation(conv(x) + residual).
    ///
    /// # Shapes
    /// x (batch, height, width, in), residual (batch, out height, out width, out), which the result has too.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when the residual has not the result's shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor, activation: Activation) -> Result<Tensor> {
        let shape = self.out_shape(x)?;
        if residual.dims() != shape {
            bail!("a convolution's residual has shape {:?}, the result {shape:?}", residual.dims());
        }
        let _span = cost::span("convolution", self.name.as_ref());
        self.note_cost(shape, x.dtype());
        cost::elementwise(residual.elem_count(), 1);
        match &*self.weight {
            Weight::Packed { packed, bias } => {
                activation.note_cost(residual.elem_count());
                op::apply2("packed-conv-add", &x.contiguous()?, &residual.contiguous()?, |[x, residual]| {
                    let residual = Some(op::elements::<f32>(residual.0, residual.1)?);
                    let after = After { bias: bias.as_deref(), residual, activation };
                    run(x.0, x.1, shape, |x, batch, size, out| packed.forward(x, batch, size, &after, out))
                })
            }
            Weight::Plain { weight, bias } => activation.forward(&(self.plain(x, weight, bias.as_ref())? + residual)?),
        }
    }

    fn note_cost(&self, shape: [usize; 4], dtype: DType) {
        cost::note(|| {
            let has_bias = match &*self.weight {
                Weight::Packed { bias, .. } => bias.is_some(),
                Weight::Plain { bias, .. } => bias.is_some(),
            };
            let Conv2dConfig { kernel, groups, .. } = self.config;
            let (outputs, window) = (shape.iter().product::<usize>(), self.channels.0 / groups * kernel.0 * kernel.1);
            let flops = 2 * outputs * window + usize::from(has_bias) * outputs;
            cost::weighted(flops, self.weight_bytes(), outputs * dtype.size_in_bytes())
        });
    }

    fn out_shape(&self, x: &Tensor) -> Result<[usize; 4]> {
        let (batch, height, width, channels) = x.dims4()?;
        self.weight.check(x)?;
        match self.config.geometry().out_size([height, width]) {
            Some([out_height, out_width]) if channels == self.channels.0 => {
                Ok([batch, out_height, out_width, self.channels.1])
            }
            _ => bail!(
                "a convolution of {} channels and {:?} got an input of shape {:?} (batch, height, width, channels)",
                self.channels.0,
                self.config,
                x.dims()
            ),
        }
    }

    fn plain(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let Conv2dConfig { kernel, stride, padding: (rows, columns), dilation, groups } = self.config;
        let x = to_channels_first(x)?.pad_with_zeros(2, rows.0, rows.1)?.pad_with_zeros(3, columns.0, columns.1)?;
        // Candle knows one dilation, which a single tap has no use for,
        let dilation = match dilation {
            (_, dilation) if kernel.0 == 1 => dilation,
            (dilation, width) if kernel.1 == 1 || dilation == width => dilation,
            _ => bail!("on this device a convolution has one dilation, not {dilation:?}"),
        };
        // and one stride.
        let shared = if stride.0 == stride.1 { stride.0 } else { 1 };
        let mut y = x.contiguous()?.conv2d(weight, 0, shared, dilation, groups)?;
        if shared == 1 {
            for (dim, stride) in [(2, stride.0), (3, stride.1)].into_iter().filter(|(_, stride)| *stride > 1) {
                let picked = Tensor::arange_step(0, y.dim(dim)? as u32, stride as u32, y.device())?;
                y = y.index_select(&picked, dim)?;
            }
        }
        with_bias(to_channels_last(&y)?, bias)
    }
}

fn read(
    in_channels: usize,
    out_channels: usize,
    config: &Conv2dConfig,
    bias: bool,
    vb: &VarBuilder<'_>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (height, width) = config.kernel;
    let weight = vb.get((out_channels, per_group(in_channels, config.groups)?, height, width), "weight")?;
    Ok((weight, if bias { Some(vb.get(out_channels, "bias")?) } else { None }))
}

fn per_group(channels: usize, groups: usize) -> Result<usize> {
    match groups {
        0 => bail!("a convolution has at least one group"),
        _ if channels.is_multiple_of(groups) => Ok(channels / groups),
        _ => bail!("{groups} groups do not divide {channels} channels"),
    }
}

fn check_bias(bias: Option<&Tensor>, out: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [out] => {
            bail!("a convolution to {out} channels got a bias of shape {:?}", bias.dims())
        }
        _ => Ok(()),
    }
}

fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// Packs the elements of a contiguous tensor; `None` for a device or dtype that the kernel does not do.
fn on_cpu<P>(weight: &Tensor, pack: impl FnOnce(Weights<'_>) -> Result<P>) -> Result<Option<P>> {
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Ok(None) };
    if !options::current().packed_weights {
        return Ok(None);
    }
    let weights = match storage {
        CpuStorage::F32(_) => Weights::F32(op::elements(storage, layout)?),
        CpuStorage::BF16(_) => Weights::Bf16(op::elements(storage, layout)?),
        CpuStorage::F16(_) => Weights::F16(op::elements(storage, layout)?),
        _ => return Ok(None),
    };
    pack(weights).map(Some)
}

impl<P> Weight<P> {
    fn new(packed: Option<P>, weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let Some(packed) = packed else {
            let bias = bias.map(op::unpacked).transpose()?;
            return Ok(Self::Plain { weight: op::unpacked(weight)?, bias });
        };
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
        Ok(Self::Packed { packed, bias })
    }

    fn sizes_of(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        Ok(Self::Plain { weight: op::sizes_of(weight)?, bias: bias.map(op::sizes_of).transpose()? })
    }

    fn bytes(&self, packed_bytes: impl Fn(&P) -> usize) -> usize {
        let tensor = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        match self {
            Self::Packed { packed, bias } => {
                packed_bytes(packed) + bias.as_ref().map_or(0, |bias| size_of_val::<[f32]>(bias))
            }
            Self::Plain { weight, bias } => tensor(weight) + bias.as_ref().map_or(0, tensor),
        }
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        if matches!(self, Self::Packed { .. }) && !op::is_cpu_f32(x) {
            bail!(
                "a convolution with weights on the CPU got {:?} on {:?}; there images are f32, convert with to_dtype",
                x.dtype(),
                x.device().location()
            );
        }
        Ok(())
    }
}

/// Runs `convolve` on the elements, batch and size of an image into a new one.
fn run(
    storage: &CpuStorage,
    layout: &Layout,
    shape: [usize; 4],
    convolve: impl FnOnce(&[f32], usize, [usize; 2], &mut [MaybeUninit<f32>]) -> std::result::Result<(), KernelError>,
) -> op::Output {
    let (batch, height, width, _) = layout.shape().dims4()?;
    let len = shape.iter().product();
    let mut out = Vec::with_capacity(len);
    let x = op::elements(storage, layout)?;
    convolve(x, batch, [height, width], &mut out.spare_capacity_mut()[..len]).map_err(candle_core::Error::wrap)?;
    #[expect(unsafe_code, reason = "the kernel fills what is handed to it")]
    // SAFETY: the kernels write every element or fail.
    unsafe {
        out.set_len(len);
    }
    Ok((out, Shape::from(shape.to_vec())))
}

/// Runs `f` on a sequence as an image of height 1.
fn as_image(x: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if x.rank() != 3 {
        bail!("a convolution over sequences got an input of shape {:?}, not (batch, length, channels)", x.dims());
    }
    f(&x.unsqueeze(1)?)?.squeeze(1)
}

/// A convolution over sequences, depthwise and grouped ones included. Cloning shares the weights.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::conv::{Conv1d, Conv1dConfig};
///
/// // the difference of neighbours, causal
/// let weight = Tensor::new(&[[[-1f32, 1.]]], &Device::Cpu)?; // (out, in, kernel)
/// let conv = Conv1d::new(&weight, None, Conv1dConfig { padding: (1, 0), ..Conv1dConfig::new(2) })?;
/// let x = Tensor::new(&[[[1f32], [4.], [9.]]], &Device::Cpu)?; // (batch, length, channels)
/// assert_eq!(conv.forward(&x)?.flatten_all()?.to_vec1::<f32>()?, [1., 3., 5.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Conv1d(Conv2d);

impl Conv1d {
    /// From `weight` (out, in / groups, kernel) and `bias` (out).
    ///
    /// # Errors
    /// As for [`Conv2d::new`].
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, config: Conv1dConfig) -> Result<Self> {
        weight.dims3()?;
        Conv2d::new(&weight.unsqueeze(2)?, bias, config.two_dimensional()).map(Self)
    }

    /// Reads `weight` (out, in / groups, kernel) and, if wanted, `bias` (out).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or as for [`new`](Self::new).
    pub fn load(
        in_channels: usize,
        out_channels: usize,
        config: Conv1dConfig,
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get((out_channels, per_group(in_channels, config.groups)?, config.kernel), "weight")?;
        let bias = if bias { Some(vb.get(out_channels, "bias")?) } else { None };
        let conv = Self::new(&weight, bias.as_ref(), config)?;
        Ok(Self(conv.0.named(&vb)))
    }

    /// Bytes that the weights and the bias occupy.
    pub fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
    }

    /// # Shapes
    /// (batch, length, in) → (batch, out length, out).
    ///
    /// # Errors
    /// As for [`Conv2d::forward`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        as_image(x, |x| self.0.forward(x))
    }

    /// activation(conv(x)).
    ///
    /// # Shapes
    /// (batch, length, in) → (batch, out length, out).
    ///
    /// # Errors
    /// As for [`Conv2d::forward`].
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        as_image(x, |x| self.0.forward_act(x, activation))
    }

    /// activation(conv(x) + residual).
    ///
    /// # Shapes
    /// x (batch, length, in), residual (batch, out length, out), which the result has too.
    ///
    /// # Errors
    /// As for [`Conv2d::forward_add`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor, activation: Activation) -> Result<Tensor> {
        as_image(x, |x| self.0.forward_add(x, &residual.unsqueeze(1)?, activation))
    }
}

/// What stands where a window reaches over an end of a sequence. Mirrors the modes of `torch.nn.functional.pad`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edge {
    /// Zeros.
    Constant,
    /// The sequence backwards, without the step at the end; zeros are put behind one that is too short for that.
    Reflect,
    /// The step at the end.
    Replicate,
}

impl Edge {
    /// Which of `length` steps stands `at` (`i64` from the first); `None` for zeros.
    fn step(self, at: i64, length: usize, (before, after): (usize, usize)) -> Option<usize> {
        let last = length as i64 - 1;
        let within = |at: i64| usize::try_from(at).ok().filter(|at| *at < length);
        match self {
            Self::Constant => within(at),
            Self::Replicate => within(at.clamp(0, last)),
            Self::Reflect => {
                let last = last.max(before.max(after) as i64);
                within(last - (last - at.abs()).abs())
            }
        }
    }
}

/// A sequence with more steps before and after, all of them activated: what a convolution takes that pads with anything
/// but zeros.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::activation::Activation;
/// use roofbench_nn::conv::{Edge, pad};
///
/// let x = Tensor::new(&[[[1f32], [-2.], [3.]]], &Device::Cpu)?; // (batch, length, channels)
/// let y = pad(&x, Edge::Reflect, (2, 1), Activation::Relu)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [3., 0., 1., 0., 3., 0.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Shapes
/// (batch, length, channels) → (batch, before + length + after, channels).
///
/// # Errors
/// When `x` has another number of dimensions or no steps.
pub fn pad(x: &Tensor, edge: Edge, (before, after): (usize, usize), activation: Activation) -> Result<Tensor> {
    let (batch, length, channels) = x.dims3()?;
    if length * channels == 0 {
        bail!("a sequence of shape {:?} has nothing that could be padded", x.dims())
    }
    let padded = before + length + after;
    let step = |at: usize| edge.step(at as i64 - before as i64, length, (before, after));
    if !op::is_cpu_f32(x) {
        let rows = (0..batch).flat_map(|item| (0..padded).map(move |at| (item, at)));
        let rows = rows.map(|(item, at)| step(at).map(|step| item * length + step));
        let index = RowIndex::new(batch * length, (batch, padded), rows)?;
        return gather(&activation.forward(x)?, &index);
    }
    activation.note_cost(x.elem_count());
    op::apply1("pad", &x.contiguous()?, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
            let (mut at, mut rest) = (begin / channels, part);
            while !rest.is_empty() {
                let (item, place) = (at / padded, at % padded);
                // what lies within the sequence goes at once
                let steps = if (before..before + length).contains(&place) { before + length - place } else { 1 };
                let count = steps.min(rest.len() / channels);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(count * channels);
                match step(place) {
                    Some(step) => activate(activation, &x[(item * length + step) * channels..][..now.len()], now),
                    None => now.fill(MaybeUninit::new(0.0)),
                }
                (at, rest) = (at + count, later);
            }
        };
        let chunk = channels * CHUNK.div_ceil(channels);
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: the parts are whole steps, and each is written.
        let y = unsafe { op::collect_chunks(batch * padded * channels, chunk, fill) };
        Ok((y, (batch, padded, channels).into()))
    })
}

/// How a transposed convolution spreads an image. Pairs are (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvTranspose2dConfig {
    /// Taps.
    pub kernel: (usize, usize),
    /// Output pixels from one input pixel to the next.
    pub stride: (usize, usize),
    /// Output pixels cut off at both ends.
    pub padding: (usize, usize),
    /// Output pixels added below and to the right.
    pub output_padding: (usize, usize),
    /// Output pixels from one tap to the next.
    pub dilation: (usize, usize),
    /// Parts of the channels that are convolved each by itself.
    pub groups: usize,
}

impl ConvTranspose2dConfig {
    /// A square kernel and stride, nothing else.
    pub fn new(kernel: usize, stride: usize) -> Self {
        let (zero, one) = ((0, 0), (1, 1));
        let (kernel, stride) = ((kernel, kernel), (stride, stride));
        Self { kernel, stride, padding: zero, output_padding: zero, dilation: one, groups: 1 }
    }

    fn geometry(&self) -> TransposedGeometry {
        let &Self { kernel, stride, padding, output_padding, dilation, groups } = self;
        TransposedGeometry {
            kernel: kernel.into(),
            stride: stride.into(),
            dilation: dilation.into(),
            padding: padding.into(),
            output_padding: output_padding.into(),
            groups,
        }
    }
}

/// How a transposed convolution spreads a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvTranspose1dConfig {
    /// Taps.
    pub kernel: usize,
    /// Output steps from one input step to the next.
    pub stride: usize,
    /// Output steps cut off at both ends.
    pub padding: usize,
    /// Output steps added at the end.
    pub output_padding: usize,
    /// Output steps from one tap to the next.
    pub dilation: usize,
    /// Parts of the channels that are convolved each by itself.
    pub groups: usize,
}

impl ConvTranspose1dConfig {
    /// A kernel and stride, nothing else.
    pub fn new(kernel: usize, stride: usize) -> Self {
        Self { kernel, stride, padding: 0, output_padding: 0, dilation: 1, groups: 1 }
    }

    fn two_dimensional(&self) -> ConvTranspose2dConfig {
        let &Self { kernel, stride, padding, output_padding, dilation, groups } = self;
        ConvTranspose2dConfig {
            kernel: (1, kernel),
            stride: (1, stride),
            padding: (0, padding),
            output_padding: (0, output_padding),
            dilation: (1, dilation),
            groups,
        }
    }
}

/// A transposed convolution over images. Cloning shares the weights, which on the CPU are packed in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::conv::{ConvTranspose2d, ConvTranspose2dConfig};
///
/// // each pixel becomes 1 x 2 pixels
/// let weight = Tensor::new(&[[[[1f32, 10.]]]], &Device::Cpu)?; // (in, out, kernel height, kernel width)
/// let config = ConvTranspose2dConfig { kernel: (1, 2), stride: (1, 2), ..ConvTranspose2dConfig::new(1, 1) };
/// let x = Tensor::new(&[[[[1f32], [2.]]]], &Device::Cpu)?; // (batch, height, width, channels)
/// let y = ConvTranspose2d::new(&weight, None, config)?.forward(&x)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1., 10., 2., 20.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct ConvTranspose2d {
    channels: (usize, usize),
    config: ConvTranspose2dConfig,
    weight: Arc<Weight<PackedConvTranspose>>,
}

impl ConvTranspose2d {
    /// From `weight` (in, out / groups, kernel height, kernel width) and `bias` (out).
    ///
    /// # Errors
    /// When the shapes do not fit together or with the configuration, or a number in it is 0 that must not be.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, config: ConvTranspose2dConfig) -> Result<Self> {
        memory::keep_freed_memory();
        let (inputs, per_group, height, width) = weight.dims4()?;
        let ConvTranspose2dConfig { kernel, stride, dilation, groups, .. } = config;
        let numbers = [inputs, per_group, kernel.0, kernel.1, stride.0, stride.1, dilation.0, dilation.1, groups];
        if (height, width) != kernel || numbers.contains(&0) || !inputs.is_multiple_of(groups) {
            bail!("a transposed convolution of {config:?} got a weight of shape {:?}", weight.dims())
        }
        let out = per_group * groups;
        check_bias(bias, out)?;
        if options::current().sizes_only {
            return Ok(Self { channels: (inputs, out), config, weight: Arc::new(Weight::sizes_of(weight, bias)?) });
        }
        let is_half = matches!(weight.dtype(), DType::BF16 | DType::F16) && weight.device().is_cpu();
        let wide = if is_half { weight.to_dtype(DType::F32)? } else { weight.clone() };
        let packed = if op::is_cpu_f32(&wide) && options::current().packed_weights {
            let weights = wide.flatten_all()?.to_vec1::<f32>()?;
            let packed = PackedConvTranspose::pack(&weights, inputs, out, config.geometry());
            Some(packed.map_err(candle_core::Error::wrap)?)
        } else {
            None
        };
        Ok(Self { channels: (inputs, out), config, weight: Arc::new(Weight::new(packed, weight, bias)?) })
    }

    /// Reads `weight` (in, out / groups, kernel height, kernel width) and, if wanted, `bias` (out).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or as for [`new`](Self::new).
    pub fn load(
        in_channels: usize,
        out_channels: usize,
        config: ConvTranspose2dConfig,
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (height, width) = config.kernel;
        let weight = vb.get((in_channels, per_group(out_channels, config.groups)?, height, width), "weight")?;
        let bias = if bias { Some(vb.get(out_channels, "bias")?) } else { None };
        Self::new(&weight, bias.as_ref(), config)
    }

    /// Bytes that the weights and the bias occupy.
    pub fn weight_bytes(&self) -> usize {
        self.weight.bytes(PackedConvTranspose::bytes)
    }

    /// # Shapes
    /// (batch, height, width, in) → (batch, out height, out width, out).
    ///
    /// # Errors
    /// When the channels are others, nothing is left of the output, or the device or dtype is not that of the weights
    /// (f32 on the CPU).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_act(x, Activation::Identity)
    }

    /// activation(conv(x)).
    ///
    /// # Shapes
    /// (batch, height, width, in) → (batch, out height, out width, out).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        self.weight.check(x)?;
        let size = self.config.geometry().out_size([height, width]).filter(|_| channels == self.channels.0);
        let Some(size) = size else {
            bail!(
                "a transposed convolution of {} channels and {:?} got an input of shape {:?} (batch, height, width, \
                 channels)",
                self.channels.0,
                self.config,
                x.dims()
            )
        };
        let shape = [batch, size[0], size[1], self.channels.1];
        let _span = cost::span("transposed convolution", None);
        self.note_cost(x, shape);
        match &*self.weight {
            Weight::Packed { packed, bias } => {
                activation.note_cost(shape.iter().product());
                let after = After { bias: bias.as_deref(), residual: None, activation };
                op::apply1("packed-conv-transpose", &x.contiguous()?, |storage, layout| {
                    run(storage, layout, shape, |x, batch, size, out| packed.forward(x, batch, size, &after, out))
                })
            }
            Weight::Plain { weight, bias } => activation.forward(&self.plain(x, size, weight, bias.as_ref())?),
        }
    }

    fn note_cost(&self, x: &Tensor, shape: [usize; 4]) {
        cost::note(|| {
            let has_bias = match &*self.weight {
                Weight::Packed { bias, .. } => bias.is_some(),
                Weight::Plain { bias, .. } => bias.is_some(),
            };
            let ConvTranspose2dConfig { kernel, groups, .. } = self.config;
            let outputs = shape.iter().product::<usize>();
            // each pixel goes to every tap, also to those that are cut off
            let products = x.elem_count() * kernel.0 * kernel.1 * (self.channels.1 / groups);
            let flops = 2 * products + usize::from(has_bias) * outputs;
            cost::weighted(flops, self.weight_bytes(), outputs * x.dtype().size_in_bytes())
        });
    }

    fn plain(&self, x: &Tensor, size: [usize; 2], weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let ConvTranspose2dConfig { kernel, stride, padding, dilation, groups, .. } = self.config;
        // Candle knows one stride and one dilation, of which an image of height 1 and a single tap have no use.
        let is_line = kernel.0 == 1 && x.dim(1)? == 1;
        if !is_line && (stride.0 != stride.1 || dilation.0 != dilation.1) {
            bail!("on this device a transposed convolution has one stride and one dilation, not {:?}", self.config)
        }
        let x = to_channels_first(x)?;
        let parts = x
            .chunk(groups, 1)?
            .into_iter()
            .zip(weight.chunk(groups, 0)?)
            .map(|(x, weight)| x.contiguous()?.conv_transpose2d(&weight.contiguous()?, 0, 0, stride.1, dilation.1));
        let mut y = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?;
        for (dim, padding, size) in [(2, padding.0, size[0]), (3, padding.1, size[1])] {
            let missing = (padding + size).saturating_sub(y.dim(dim)?);
            y = y.pad_with_zeros(dim, 0, missing)?.narrow(dim, padding, size)?;
        }
        with_bias(to_channels_last(&y)?, bias)
    }
}

/// A transposed convolution over sequences. Cloning shares the weights, which on the CPU are packed in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::conv::{ConvTranspose1d, ConvTranspose1dConfig};
///
/// let weight = Tensor::new(&[[[1f32, 10., 100.]]], &Device::Cpu)?; // (in, out, kernel)
/// let conv = ConvTranspose1d::new(&weight, None, ConvTranspose1dConfig::new(3, 2))?;
/// let x = Tensor::new(&[[[1f32], [2.]]], &Device::Cpu)?; // (batch, length, channels)
/// assert_eq!(conv.forward(&x)?.flatten_all()?.to_vec1::<f32>()?, [1., 10., 102., 20., 200.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct ConvTranspose1d(ConvTranspose2d);

impl ConvTranspose1d {
    /// From `weight` (in, out / groups, kernel) and `bias` (out).
    ///
    /// # Errors
    /// As for [`ConvTranspose2d::new`].
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, config: ConvTranspose1dConfig) -> Result<Self> {
        weight.dims3()?;
        ConvTranspose2d::new(&weight.unsqueeze(2)?, bias, config.two_dimensional()).map(Self)
    }

    /// Reads `weight` (in, out / groups, kernel) and, if wanted, `bias` (out).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, or as for [`new`](Self::new).
    pub fn load(
        in_channels: usize,
        out_channels: usize,
        config: ConvTranspose1dConfig,
        bias: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let weight = vb.get((in_channels, per_group(out_channels, config.groups)?, config.kernel), "weight")?;
        let bias = if bias { Some(vb.get(out_channels, "bias")?) } else { None };
        Self::new(&weight, bias.as_ref(), config)
    }

    /// Bytes that the weights and the bias occupy.
    pub fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
    }

    /// # Shapes
    /// (batch, length, in) → (batch, out length, out).
    ///
    /// # Errors
    /// As for [`ConvTranspose2d::forward`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        as_image(x, |x| self.0.forward(x))
    }

    /// activation(conv(x)).
    ///
    /// # Shapes
    /// (batch, length, in) → (batch, out length, out).
    ///
    /// # Errors
    /// As for [`ConvTranspose2d::forward`].
    pub fn forward_act(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        as_image(x, |x| self.0.forward_act(x, activation))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
    }

    fn double(x: &Tensor) -> Tensor {
        x.to_dtype(DType::F64).unwrap()
    }

    /// Sums of up to 600 products of standard normals: as many roundings of at most half an ULP of a sum below 128.
    fn assert_close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        let error = (double(found) - double(expected)).unwrap().abs().unwrap().flatten_all().unwrap();
        let error = error.max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(error < 5e-4, "{error}");
    }

    fn configs() -> Vec<(Conv2dConfig, usize, usize)> {
        let three = Conv2dConfig::new(3);
        vec![
            (Conv2dConfig::new(1), 5, 7),
            (three.padding(1), 3, 33),
            (three.padding(2).dilation(2).groups(2), 4, 6),
            (three.stride(2).padding(1).groups(6), 6, 6),
            (Conv2dConfig { stride: (1, 3), padding: ((1, 0), (0, 2)), ..Conv2dConfig::new(2) }, 5, 4),
            (Conv2dConfig { kernel: (1, 3), dilation: (1, 2), ..three }, 5, 4),
            (Conv2dConfig { kernel: (3, 1), dilation: (2, 1), ..three }, 5, 4),
        ]
    }

    #[test]
    fn the_kernel_agrees_with_candle() {
        for (config, inputs, outputs) in configs() {
            let weight = random(&[outputs, inputs / config.groups, config.kernel.0, config.kernel.1]);
            let (bias, x) = (random(&[outputs]), random(&[2, 9, 11, inputs]));
            let packed = Conv2d::new(&weight, Some(&bias), config).unwrap();
            let plain = Conv2d::new(&double(&weight), Some(&double(&bias)), config).unwrap();
            let expected = plain.forward(&double(&x)).unwrap();
            assert_close(&packed.forward(&x).unwrap(), &expected);
            let relu = packed.forward_act(&x, Activation::Relu).unwrap();
            assert_close(&relu, &expected.relu().unwrap());
            let residual = random(expected.dims());
            let sum = (&expected + double(&residual)).unwrap().relu().unwrap();
            assert_close(&packed.forward_add(&x, &residual, Activation::Relu).unwrap(), &sum);
            assert_close(&plain.forward_add(&double(&x), &double(&residual), Activation::Relu).unwrap(), &sum);
            assert!(packed.weight_bytes() >= 4 * weight.elem_count() && plain.weight_bytes() > 0);
        }
    }

    #[test]
    fn any_layout_of_the_input() {
        let conv = Conv2d::new(&random(&[4, 3, 3, 3]), None, Conv2dConfig::new(3)).unwrap();
        let image = random(&[2, 3, 8, 6]);
        let strided = image.permute((0, 2, 3, 1)).unwrap();
        let copied = to_channels_last(&image).unwrap();
        let flat = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(conv.forward(&strided).unwrap()), flat(conv.forward(&copied).unwrap()));
        assert_eq!(flat(to_channels_first(&copied).unwrap()), flat(image));
        assert_eq!(conv.forward(&random(&[0, 8, 6, 3])).unwrap().dims(), [0, 6, 4, 4]);
        let sequence = random(&[2, 3, 5]);
        assert_eq!(flat(to_channels_first(&to_channels_last(&sequence).unwrap()).unwrap()), flat(sequence));
        for shape in [[3, 1, 7, 5], [2, 70, 9, 8], [3, 5, 130, 40], [1, 0, 2, 2], [0, 3, 2, 2]] {
            let image = random(&shape);
            let last = to_channels_last(&image).unwrap();
            assert_eq!(last.dims(), [shape[0], shape[2], shape[3], shape[1]]);
            assert_eq!(flat(last.clone()), flat(image.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()));
            assert_eq!(flat(to_channels_first(&last).unwrap()), flat(image));
        }
    }

    #[test]
    fn a_folded_norm_equals_the_norm_behind() {
        let tensors = ["weight", "bias", "running_mean"].map(|name| (name.to_owned(), random(&[7])));
        let mut tensors = HashMap::from(tensors);
        tensors.insert("running_var".to_owned(), random(&[7]).sqr().unwrap().affine(1., 0.1).unwrap());
        let norm_vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let norm = BatchNorm::load(7, 1e-3, norm_vb).unwrap();
        let tensors = HashMap::from([("weight".to_owned(), random(&[7, 4, 3, 3])), ("bias".to_owned(), random(&[7]))]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let x = random(&[2, 5, 6, 4]);
        for bias in [false, true] {
            let config = Conv2dConfig::new(3).padding(1);
            let alone = Conv2d::load(4, 7, config, bias, vb.clone()).unwrap();
            let folded = Conv2d::load_with_norm(4, 7, config, bias, &norm, vb.clone()).unwrap();
            // the norm scales roundings by up to √10
            let expected = norm.forward(&alone.forward(&x).unwrap()).unwrap();
            assert_close(&folded.forward(&x).unwrap(), &expected);
        }
    }

    #[test]
    fn sequences_agree_with_candle() {
        let config = Conv1dConfig { stride: 2, padding: (3, 1), dilation: 2, ..Conv1dConfig::new(4) };
        for (config, inputs) in [(config, 5), (Conv1dConfig { groups: 6, ..config }, 6)] {
            let weight = random(&[6, inputs / config.groups, 4]);
            let (bias, x) = (random(&[6]), random(&[2, 23, inputs]));
            let packed = Conv1d::new(&weight, Some(&bias), config).unwrap();
            let padded = to_channels_first(&x).unwrap().pad_with_zeros(2, 3, 1).unwrap();
            let y = double(&padded).conv1d(&double(&weight), 0, 2, 2, config.groups).unwrap();
            let expected = to_channels_last(&y).unwrap().broadcast_add(&double(&bias)).unwrap();
            assert_close(&packed.forward(&x).unwrap(), &expected);
            let plain = Conv1d::new(&double(&weight), Some(&double(&bias)), config).unwrap();
            assert_close(&plain.forward(&double(&x)).unwrap(), &expected);
            let residual = random(expected.dims());
            let sum = (expected + double(&residual)).unwrap();
            assert_close(&packed.forward_add(&x, &residual, Activation::Identity).unwrap(), &sum);
        }
    }

    #[test]
    fn transposed_agrees_with_candle() {
        let base = ConvTranspose2dConfig::new(3, 2);
        let cases = [
            (base, 4, 5),
            (ConvTranspose2dConfig { padding: (1, 1), output_padding: (1, 1), ..base }, 4, 5),
            (ConvTranspose2dConfig { output_padding: (1, 1), groups: 2, ..base }, 4, 6),
            (ConvTranspose2dConfig { dilation: (2, 2), padding: (2, 2), ..base }, 3, 2),
        ];
        for (config, inputs, outputs) in cases {
            let weight = random(&[inputs, outputs / config.groups, 3, 3]);
            let (bias, x) = (random(&[outputs]), random(&[2, 5, 4, inputs]));
            let packed = ConvTranspose2d::new(&weight, Some(&bias), config).unwrap();
            let plain = ConvTranspose2d::new(&double(&weight), Some(&double(&bias)), config).unwrap();
            let expected = plain.forward(&double(&x)).unwrap();
            assert_close(&packed.forward(&x).unwrap(), &expected);
            let relu = packed.forward_act(&x, Activation::Relu).unwrap();
            assert_close(&relu, &expected.relu().unwrap());
        }
        let config = ConvTranspose1dConfig { padding: 1, output_padding: 2, ..ConvTranspose1dConfig::new(5, 3) };
        let (weight, x) = (random(&[4, 6, 5]), random(&[2, 9, 4]));
        let packed = ConvTranspose1d::new(&weight, None, config).unwrap();
        let plain = ConvTranspose1d::new(&double(&weight), None, config).unwrap();
        assert_close(&packed.forward(&x).unwrap(), &plain.forward(&double(&x)).unwrap());
    }

    #[test]
    fn half_precision_weights_stay_so() {
        let (weight, x) = (random(&[64, 16, 3, 3]).to_dtype(DType::BF16).unwrap(), random(&[1, 5, 5, 16]));
        let conv = Conv2d::new(&weight, None, Conv2dConfig::new(3)).unwrap();
        let wide = Conv2d::new(&weight.to_dtype(DType::F32).unwrap(), None, Conv2dConfig::new(3)).unwrap();
        assert_close(&conv.forward(&x).unwrap(), &wide.forward(&x).unwrap());
        assert_eq!(2 * conv.weight_bytes(), wide.weight_bytes());
    }

    #[test]
    fn padded_ends() -> Result<()> {
        let row = |steps: &[f32]| Tensor::new(steps, &Device::Cpu)?.reshape((1, steps.len(), 1));
        let padded = |steps: &[f32], edge, ends| {
            pad(&row(steps)?, edge, ends, Activation::Identity)?.flatten_all()?.to_vec1::<f32>()
        };
        assert_eq!(padded(&[1., 2., 3.], Edge::Reflect, (2, 1))?, [3., 2., 1., 2., 3., 2.]);
        assert_eq!(padded(&[1., 2., 3.], Edge::Replicate, (1, 2))?, [1., 1., 2., 3., 3., 3.]);
        assert_eq!(padded(&[1., 2.], Edge::Constant, (1, 0))?, [0., 1., 2.]);
        // as from torch with two zeros behind, which the reflection shows: 1 2 0 0
        assert_eq!(padded(&[1., 2.], Edge::Reflect, (3, 0))?, [0., 0., 2., 1., 2.]);
        let x = Tensor::randn(0f32, 1.0, (3, 4000, 5), &Device::Cpu)?;
        let wide = pad(&x.to_dtype(DType::F64)?, Edge::Reflect, (6, 3), Activation::Elu)?.to_dtype(DType::F32)?;
        let difference = (pad(&x, Edge::Reflect, (6, 3), Activation::Elu)? - wide)?.abs()?.max_all()?;
        assert!(difference.to_scalar::<f32>()? < 1e-6);
        assert!(pad(&x.narrow(1, 0, 0)?, Edge::Reflect, (1, 1), Activation::Elu).is_err());
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let conv = Conv2d::new(&random(&[4, 3, 3, 3]), None, Conv2dConfig::new(3)).unwrap();
        let error = message(conv.forward(&random(&[1, 8, 8, 4])));
        assert!(error.contains("3 channels") && error.contains("[1, 8, 8, 4]"), "{error}");
        assert!(conv.forward(&random(&[1, 2, 8, 3])).is_err(), "smaller than a window");
        let error = message(conv.forward(&double(&random(&[1, 8, 8, 3]))));
        assert!(error.contains("F64"), "{error}");
        let error = message(conv.forward_add(&random(&[1, 8, 8, 3]), &random(&[1, 6, 6, 5]), Activation::Relu));
        assert!(error.contains("[1, 6, 6, 5]"), "{error}");
        let weight = random(&[4, 3, 3, 3]);
        for config in [Conv2dConfig::new(2), Conv2dConfig::new(3).groups(3), Conv2dConfig::new(3).stride(0)] {
            assert!(Conv2d::new(&weight, None, config).is_err(), "{config:?}");
        }
        assert!(Conv2d::new(&weight, Some(&random(&[3])), Conv2dConfig::new(3)).is_err());
        let one = ConvTranspose2dConfig { padding: (1, 1), ..ConvTranspose2dConfig::new(2, 2) };
        let transposed = ConvTranspose2d::new(&random(&[3, 2, 2, 2]), None, one).unwrap();
        let error = message(transposed.forward(&random(&[1, 1, 1, 3])));
        assert!(error.contains("[1, 1, 1, 3]"), "{error}");
    }
}
