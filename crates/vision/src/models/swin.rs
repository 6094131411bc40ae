//! Swin Transformer: pre-norm attention within windows of patches, moved by half a window in every second layer so that
//! windows meet, and four neighbouring patches merged between stages.
//! Source: Swin (arXiv:2103.14030), SimMIM (arXiv:2111.09886). Mirrors `transformers.SwinModel`,
//! `SwinForImageClassification` and `SwinForMaskedImageModeling`.
//!
//! Windows are lists of rows: the product for query, key and value reads them out of the picture, moved and padded, and
//! the output layer reads them back, so that neither is ever copied.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::classify::label_count;
use roofbench_core::config::{self, invalid};
use roofbench_core::cost::{self, Cost, Norm, PhaseCost};
use roofbench_core::inputs::{Inputs, zero_or_one};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::{Attention, Mask, Pattern, SelfAttention};
use roofbench_nn::gather::{RowIndex, gather};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::pooling::global_avg_pool_2d;
use roofbench_nn::resize;
use serde::Deserialize;

use super::{HeightWidth, activation_dtype};

/// The classes that run.
pub const CLASSES: &[&str] = &["SwinModel", "SwinForImageClassification", "SwinForMaskedImageModeling"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // it follows from the window size
    AliasRule::drop(r"\.attention\.self\.relative_position_index$", AliasScope::Always),
    // a base model from a checkpoint with a head
    AliasRule::drop(r"^(classifier|decoder)\.", AliasScope::Base),
    AliasRule::rename(r"^swin\.", "", AliasScope::Base),
    AliasRule::drop(r"^embeddings\.mask_token$", AliasScope::Base),
    // a class with a head from a checkpoint saved by the base model
    AliasRule::rename(r"^(embeddings|encoder|layernorm)\.", "swin.$1.", AliasScope::Head),
];

/// Of the norms behind the patches and of merged ones, whatever the config says.
const PATCH_EPS: f64 = 1e-5;
/// Added to the score of a pair that the move brought into one window.
const APART: f32 = -100.0;

/// The part of `config.json` that shapes the computation; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
pub struct SwinConfig {
    /// Size of the pictures that absolute positions were learned on.
    #[serde(default = "defaults::image_size")]
    pub image_size: HeightWidth,
    /// Size of a patch; a picture is padded to whole ones.
    #[serde(default = "defaults::patch_size")]
    pub patch_size: HeightWidth,
    /// Colour channels.
    #[serde(default = "defaults::num_channels")]
    pub num_channels: usize,
    /// Width of the first stage; each later one is twice as wide as the one before.
    #[serde(default = "defaults::embed_dim")]
    pub embed_dim: usize,
    /// Layers of each stage.
    #[serde(default = "defaults::depths")]
    pub depths: Vec<usize>,
    /// Attention heads of each stage; they divide its width.
    #[serde(default = "defaults::num_heads")]
    pub num_heads: Vec<usize>,
    /// Patches along a window's side.
    #[serde(default = "defaults::window_size")]
    pub window_size: usize,
    /// Width inside the feed-forward half over that of the stage.
    #[serde(default = "defaults::mlp_ratio")]
    pub mlp_ratio: f64,
    /// The products of query, key and value have biases.
    #[serde(default = "defaults::qkv_bias")]
    pub qkv_bias: bool,
    /// Activation of the feed-forward half.
    #[serde(default = "defaults::hidden_act")]
    pub hidden_act: Activation,
    /// Learned positions are added to the patches.
    #[serde(default)]
    pub use_absolute_embeddings: bool,
    /// Added to the variance in the norms of layers and in the last one.
    #[serde(default = "defaults::layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// Pixels that masked image modelling draws for each side of a last patch.
    #[serde(default = "defaults::encoder_stride")]
    pub encoder_stride: usize,
}

/// What `transformers.SwinConfig` takes for fields that files leave out.
mod defaults {
    use roofbench_nn::activation::Activation;

    use super::HeightWidth;

    pub(super) fn image_size() -> HeightWidth {
        HeightWidth { height: 224, width: 224 }
    }
    pub(super) fn patch_size() -> HeightWidth {
        HeightWidth { height: 4, width: 4 }
    }
    pub(super) fn num_channels() -> usize {
        3
    }
    pub(super) fn embed_dim() -> usize {
        96
    }
    pub(super) fn depths() -> Vec<usize> {
        vec![2, 2, 6, 2]
    }
    pub(super) fn num_heads() -> Vec<usize> {
        vec![3, 6, 12, 24]
    }
    pub(super) fn window_size() -> usize {
        7
    }
    pub(super) fn mlp_ratio() -> f64 {
        4.0
    }
    pub(super) fn qkv_bias() -> bool {
        true
    }
    pub(super) fn hidden_act() -> Activation {
        Activation::Gelu
    }
    pub(super) fn layer_norm_eps() -> f64 {
        1e-5
    }
    pub(super) fn encoder_stride() -> usize {
        32
    }
}

impl SwinConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or contradicts another.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let cfg: Self = spec.parse_config()?;
        cfg.check()?;
        Ok(cfg)
    }

    /// Whether the fields fit together; for a config that is part of another family's.
    ///
    /// # Errors
    /// Names the field that does not.
    pub fn check(&self) -> Result<(), SessionError> {
        const MOST_STAGES: usize = 16;
        let stages = self.depths.len();
        if !(1..=MOST_STAGES).contains(&stages) {
            let reason = format!("has {stages} numbers, one a stage; 1 to {MOST_STAGES} are possible");
            return Err(invalid("depths", reason));
        }
        if self.num_heads.len() != stages {
            return Err(invalid("num_heads", format!("has {} numbers, depths has {stages}", self.num_heads.len())));
        }
        config::sizes(&[
            ("image_size", self.image_size.height),
            ("image_size", self.image_size.width),
            ("patch_size", self.patch_size.height),
            ("patch_size", self.patch_size.width),
            ("num_channels", self.num_channels),
            ("embed_dim", self.embed_dim),
            ("encoder_stride", self.encoder_stride),
        ])?;
        config::not_negative(&[("layer_norm_eps", self.layer_norm_eps)])?;
        // the biases of a window's pairs have to fit memory
        if !(1..=256).contains(&self.window_size) {
            return Err(invalid("window_size", format!("{} is not in 1..=256", self.window_size)));
        }
        for (stage, (depth, heads)) in self.depths.iter().zip(&self.num_heads).enumerate() {
            config::sizes(&[("depths", *depth), ("num_heads", *heads), ("embed_dim", self.width(stage))])?;
            config::sizes(&[("mlp_ratio", self.inner(stage))])?;
            if !self.width(stage).is_multiple_of(*heads) {
                let reason = format!("{heads} does not divide {}, the width of stage {}", self.width(stage), stage + 1);
                return Err(invalid("num_heads", reason));
            }
        }
        Ok(())
    }

    /// Width of the last stage.
    pub fn features(&self) -> usize {
        self.width(self.depths.len() - 1)
    }

    fn width(&self, stage: usize) -> usize {
        self.embed_dim.saturating_mul(1 << stage)
    }

    /// Width inside the feed-forward half, cut off as the class does.
    fn inner(&self, stage: usize) -> usize {
        (self.mlp_ratio * self.width(stage) as f64) as usize
    }

    /// Rows and columns of patches that absolute positions were learned on.
    fn learned(&self) -> [usize; 2] {
        [self.image_size.height / self.patch_size.height, self.image_size.width / self.patch_size.width]
    }

    /// How a picture of `size` is laid out; `interpolate` stretches absolute positions over it.
    ///
    /// # Errors
    /// Names the input when the picture is too small for the windows, or has no positions.
    pub fn layout(&self, size: HeightWidth, interpolate: bool) -> Result<Layout, SessionError> {
        let HeightWidth { height, width } = size;
        let patch = [self.patch_size.height, self.patch_size.width];
        let first = [height.div_ceil(patch[0]), width.div_ceil(patch[1])];
        let halved = std::iter::successors(Some(first), |grid| Some(grid.map(|n| n.div_ceil(2))));
        let grids: Vec<[usize; 2]> = halved.take(self.depths.len()).collect();
        let small = |(_, grid): &(usize, &[usize; 2])| grid.iter().any(|n| *n < self.window_size);
        if let Some((stage, [rows, columns])) = grids.iter().enumerate().find(small) {
            let reason = format!(
                "{height} x {width} pixels leave {rows} x {columns} patches for stage {}, window_size is {}; \
                 give larger pictures",
                stage + 1,
                self.window_size
            );
            return Err(SessionError::input("pixel_values", reason));
        }
        let interpolated = match self.use_absolute_embeddings {
            true => self.stretched(size, first, interpolate)?,
            false => None,
        };
        Ok(Layout { size, grids, interpolated })
    }

    /// Rows and columns to interpolate the learned positions to, when that is asked for and needed.
    fn stretched(
        &self,
        HeightWidth { height, width }: HeightWidth,
        grid: [usize; 2],
        interpolate: bool,
    ) -> Result<Option<[usize; 2]>, SessionError> {
        let learned = self.learned();
        let positions = learned[0] * learned[1];
        let is_as_many = grid[0] * grid[1] == positions;
        if !interpolate {
            return match is_as_many {
                true => Ok(None),
                false => {
                    let reason = format!(
                        "{height} x {width} pixels are {} patches, of {positions} positions; resize the pictures to \
                         image_size, {} x {}, or set interpolate_pos_encoding to true",
                        grid[0] * grid[1],
                        self.image_size.height,
                        self.image_size.width
                    );
                    Err(SessionError::input("pixel_values", reason))
                }
            };
        }
        if is_as_many && height == width {
            return Ok(None);
        }
        if positions.isqrt().pow(2) != positions {
            // the class takes the square root of their number for rows and columns
            let reason = format!("needs a square of learned positions; image_size gives {learned:?}");
            return Err(SessionError::input("interpolate_pos_encoding", reason));
        }
        if !height.is_multiple_of(self.patch_size.height) || !width.is_multiple_of(self.patch_size.width) {
            let reason = format!("needs pictures of whole patches, not {height} x {width} pixels");
            return Err(SessionError::input("interpolate_pos_encoding", reason));
        }
        Ok(Some(grid).filter(|grid| *grid != [positions.isqrt(); 2]))
    }
}

/// How a picture of one size is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    size: HeightWidth,
    /// Rows and columns of patches of each stage.
    grids: Vec<[usize; 2]>,
    /// Rows and columns to interpolate learned positions to.
    interpolated: Option<[usize; 2]>,
}

impl Layout {
    /// Rows and columns of patches in the last stage.
    pub fn last_grid(&self) -> [usize; 2] {
        self.grids.last().copied().unwrap_or_default()
    }
}

struct Embeddings {
    patch_embeddings: PatchEmbed,
    patch: [usize; 2],
    norm: LayerNorm,
    mask_token: Option<Tensor>,          // (1, 1, width)
    position_embeddings: Option<Tensor>, // (1, patches, width)
}

impl Embeddings {
    fn load(cfg: &SwinConfig, use_mask_token: bool, vb: VarBuilder) -> Result<Self> {
        let patch = [cfg.patch_size.height, cfg.patch_size.width];
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let get = |rows: usize, name: &str| vb.get((1, rows, cfg.embed_dim), name)?.to_dtype(dtype);
        let [rows, columns] = cfg.learned();
        let projection = vb.pp("patch_embeddings.projection");
        Ok(Self {
            patch_embeddings: PatchEmbed::load(cfg.num_channels, cfg.embed_dim, patch.into(), true, projection)?,
            patch,
            norm: LayerNorm::load(cfg.embed_dim, PATCH_EPS, vb.pp("norm"))?,
            mask_token: if use_mask_token { Some(get(1, "mask_token")?) } else { None },
            position_embeddings: match cfg.use_absolute_embeddings {
                true => Some(get(rows * columns, "position_embeddings")?),
                false => None,
            },
        })
    }

    /// (batch, channels, height, width) -> (batch, patches, width). Patches at which `masked` (batch, patches) is 1 give
    /// way to the mask token.
    fn forward(&self, pixel_values: &Tensor, layout: &Layout, masked: Option<&Tensor>) -> Result<Tensor> {
        let missing = |size: usize, patch: usize| size.next_multiple_of(patch) - size;
        let (below, right) = (missing(layout.size.height, self.patch[0]), missing(layout.size.width, self.patch[1]));
        let padded = pixel_values.pad_with_zeros(2, 0, below)?.pad_with_zeros(3, 0, right)?;
        let mut x = self.norm.forward(&self.patch_embeddings.forward(&padded)?)?;
        if let Some((masked, token)) = masked.zip(self.mask_token.as_ref()) {
            let masked = masked.unsqueeze(D::Minus1)?.broadcast_as(x.shape())?;
            x = masked.where_cond(&token.broadcast_as(x.shape())?, &x)?;
        }
        let Some(positions) = &self.position_embeddings else { return Ok(x) };
        roofbench_nn::cost::elementwise(x.elem_count(), 1); // positions added
        match layout.interpolated {
            Some(grid) => x.broadcast_add(&stretch(positions, grid)?),
            None => x.broadcast_add(positions),
        }
    }
}

/// A square of positions (1, side², width) stretched over other rows and columns.
fn stretch(positions: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
    let (_, count, width) = positions.dims3()?;
    let side = count.isqrt();
    let grid = positions.reshape((1, side, side, width))?.permute((0, 3, 1, 2))?.contiguous()?;
    let grid = resize::bicubic(&grid, (rows, columns), false)?; // (1, width, rows, columns)
    grid.flatten_from(2)?.transpose(1, 2)?.to_dtype(positions.dtype())
}

/// The windows of a batch of pictures.
#[derive(Clone)]
struct Windows {
    /// Patches of each window; zeros where it reaches beyond the picture.
    cut: RowIndex,
    /// Of each patch its place in the windows.
    joined: RowIndex,
    /// By window which of a layer's biases is for it.
    which: Arc<[u32]>,
}

impl Windows {
    /// Windows of `size` patches a side over pictures of `grid` patches, moved by `shift` down and to the right; what is
    /// pushed out at one edge comes in at the other.
    fn new(batch: usize, grid: [usize; 2], size: usize, shift: usize) -> Result<Self> {
        let [rows, columns] = grid;
        let [down, across] = grid.map(|n| n.div_ceil(size));
        let [padded_rows, padded_columns] = [down * size, across * size];
        let (count, area) = (down * across, size * size);
        let patch = move |index: usize| {
            let (window, place) = (index / area, index % area);
            let (item, window) = (window / count, window % count);
            let row = (window / across * size + place / size + shift) % padded_rows;
            let column = (window % across * size + place % size + shift) % padded_columns;
            (row < rows && column < columns).then_some((item * rows + row) * columns + column)
        };
        let place = move |index: usize| {
            let (item, patch) = (index / (rows * columns), index % (rows * columns));
            let row = (patch / columns + padded_rows - shift) % padded_rows;
            let column = (patch % columns + padded_columns - shift) % padded_columns;
            let window = item * count + row / size * across + column / size;
            Some(window * area + row % size * size + column % size)
        };
        let (patches, places) = (batch * rows * columns, batch * count * area);
        let which = |window: usize| match shift {
            0 => 0,
            _ => {
                let (row, column) = (window % count / across, window % across);
                2 * u32::from(row + 1 == down) + u32::from(column + 1 == across)
            }
        };
        Ok(Self {
            cut: RowIndex::new(patches, (batch * count, area), (0..places).map(patch))?,
            joined: RowIndex::new(places, (batch, rows * columns), (0..patches).map(place))?,
            which: (0..batch * count).map(which).collect(),
        })
    }
}

/// What is added to the scores within a window (biases, heads, size², size²): by relative position from `table`
/// ((2 · size - 1)², heads), and less for pairs that are not neighbours in the picture. Of windows moved by `shift` there
/// are four: those inside, in the last column, in the last row, and in both.
fn window_biases(table: &Tensor, size: usize, shift: usize) -> Result<Tensor> {
    let (area, distances) = (size * size, 2 * size - 1);
    let by_head = table.to_dtype(DType::F32)?.t()?.to_vec2::<f32>()?;
    let biases = if shift == 0 { 1 } else { 4 };
    let mut values = Vec::with_capacity(biases * by_head.len() * area * area);
    for which in 0..biases {
        // on which side of the seams that the move leaves in the window
        let side = |place: usize| {
            [(which & 2 != 0, place / size), (which & 1 != 0, place % size)]
                .map(|(seam, at)| seam && at >= size - shift)
        };
        for table in &by_head {
            for key in 0..area {
                values.extend((0..area).map(|query| {
                    let row = query / size + size - 1 - key / size;
                    let column = query % size + size - 1 - key % size;
                    table[row * distances + column] + if side(query) == side(key) { 0.0 } else { APART }
                }));
            }
        }
    }
    // attention reads the queries of a key in vectors
    Tensor::from_vec(values, (biases, by_head.len(), area, area), table.device())?.transpose(2, 3)
}

struct Layer {
    layernorm_before: LayerNorm,
    self_attention: SelfAttention,
    window_biases: Tensor,
    attention_output: Linear,
    layernorm_after: LayerNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(cfg: &SwinConfig, stage: usize, shift: usize, vb: VarBuilder) -> Result<Self> {
        let (width, heads, size) = (cfg.width(stage), cfg.num_heads[stage], cfg.window_size);
        let attention =
            Attention { heads, kv_heads: heads, head_dim: width / heads, scale: None, pattern: Pattern::Full };
        let norm = |name: &str| LayerNorm::load(width, cfg.layer_norm_eps, vb.pp(name));
        let (qkv, inner) = (["query", "key", "value"], vb.pp("attention.self"));
        let table = inner.get(((2 * size - 1).pow(2), heads), "relative_position_bias_table")?;
        let names = ["intermediate.dense", "output.dense"];
        Ok(Self {
            layernorm_before: norm("layernorm_before")?,
            self_attention: SelfAttention::load(width, attention, qkv, cfg.qkv_bias, inner)?,
            window_biases: window_biases(&table, size, shift)?,
            attention_output: Linear::load(width, width, true, vb.pp("attention.output.dense"))?,
            layernorm_after: norm("layernorm_after")?,
            mlp: Mlp::load([width, cfg.inner(stage)], cfg.hidden_act, true, names, vb.clone())?,
        })
    }

    /// `x` and the result are (batch, patches, width).
    fn forward(&self, x: &Tensor, windows: &Windows) -> Result<Tensor> {
        let mask = Mask::additive_choice(&self.window_biases, windows.which.clone())?;
        let normed = self.layernorm_before.forward(x)?;
        let attended = self.self_attention.forward_rows(&normed, &windows.cut, Some(&mask))?; // (windows, area, width)
        let x = self.attention_output.forward_rows_add(&attended, &windows.joined, x)?;
        self.mlp.forward_add(&self.layernorm_after.forward(&x)?, &x)
    }
}

/// Four neighbouring patches as one of twice the width.
struct PatchMerging {
    norm: LayerNorm,
    reduction: Linear,
}

impl PatchMerging {
    fn load(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: LayerNorm::load(4 * width, PATCH_EPS, vb.pp("norm"))?,
            reduction: Linear::load(4 * width, 2 * width, false, vb.pp("reduction"))?,
        })
    }

    /// (batch, rows · columns, width) -> (batch, half the rows · half the columns, 2 · width), halves rounded up.
    fn forward(&self, x: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let (batch, _, width) = x.dims3()?;
        let [half_rows, half_columns] = [rows, columns].map(|n| n.div_ceil(2));
        let merged = half_rows * half_columns;
        // upper left, lower left, upper right, lower right
        let patch = |index: usize| {
            let (item, merged, part) = (index / 4 / merged, index / 4 % merged, index % 4);
            let row = 2 * (merged / half_columns) + part % 2;
            let column = 2 * (merged % half_columns) + part / 2;
            (row < rows && column < columns).then_some((item * rows + row) * columns + column)
        };
        let index = RowIndex::new(batch * rows * columns, (batch, 4 * merged), (0..4 * batch * merged).map(patch))?;
        let x = gather(x, &index)?.reshape((batch, merged, 4 * width))?;
        self.reduction.forward(&self.norm.forward(&x)?)
    }
}

struct Stage {
    layers: Vec<Layer>,
    downsample: Option<PatchMerging>,
}

impl Stage {
    fn load(cfg: &SwinConfig, stage: usize, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| {
            let shift = if i.is_multiple_of(2) { 0 } else { cfg.window_size / 2 };
            Layer::load(cfg, stage, shift, vb.pp(format!("blocks.{i}")))
        };
        let is_last = stage + 1 == cfg.depths.len();
        Ok(Self {
            layers: (0..cfg.depths[stage]).map(layer).collect::<Result<_>>()?,
            downsample: match is_last {
                true => None,
                false => Some(PatchMerging::load(cfg.width(stage), vb.pp("downsample"))?),
            },
        })
    }

    /// (batch, rows · columns, width) -> the same, or merged.
    fn forward(&self, mut x: Tensor, grid: [usize; 2], window_size: usize) -> Result<Tensor> {
        let batch = x.dim(0)?;
        let windows = Windows::new(batch, grid, window_size, 0)?;
        // where one window covers a side nothing is moved
        let moved = match grid.iter().all(|n| *n > window_size) && self.layers.len() > 1 {
            true => Windows::new(batch, grid, window_size, window_size / 2)?,
            false => windows.clone(),
        };
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, if i.is_multiple_of(2) { &windows } else { &moved })?;
        }
        match &self.downsample {
            Some(downsample) => downsample.forward(&x, grid),
            None => Ok(x),
        }
    }
}

/// Patches and stages, without the norm behind them: what Donut's encoder is, too.
pub struct SwinEncoder {
    embeddings: Embeddings,
    stages: Vec<Stage>,
    window_size: usize,
}

impl SwinEncoder {
    /// Reads `embeddings` and `encoder` under `vb`, with a token for masked patches where `use_mask_token`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(cfg: &SwinConfig, use_mask_token: bool, vb: VarBuilder) -> Result<Self> {
        let stage = |i: usize| Stage::load(cfg, i, vb.pp(format!("encoder.layers.{i}")));
        Ok(Self {
            embeddings: Embeddings::load(cfg, use_mask_token, vb.pp("embeddings"))?,
            stages: (0..cfg.depths.len()).map(stage).collect::<Result<_>>()?,
            window_size: cfg.window_size,
        })
    }

    /// `layout` is that of the pictures' size; patches at which `masked` (batch, patches), u8, is 1 give way to the mask
    /// token.
    ///
    /// # Shapes
    /// (batch, channels, height, width) → (batch, patches of the last stage, features).
    ///
    /// # Errors
    /// When the pictures are not those of the layout.
    pub fn forward(&self, pixel_values: &Tensor, layout: &Layout, masked: Option<&Tensor>) -> Result<Tensor> {
        let x = self.embeddings.forward(pixel_values, layout, masked)?;
        let mut stages = self.stages.iter().zip(&layout.grids);
        stages.try_fold(x, |x, (stage, grid)| stage.forward(x, *grid, self.window_size))
    }
}

/// FLOPs and bytes of a [`SwinEncoder`] over a batch, its input included.
pub fn encoder_cost(cfg: &SwinConfig, batch: u64, layout: &Layout, dtype: DType) -> Cost {
    let bytes = dtype.size_in_bytes() as u64;
    let [channels, embed, size] = [cfg.num_channels, cfg.embed_dim, cfg.window_size].map(|n| n as u64);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let patches = |grid: &[usize; 2]| (grid[0] * grid[1]) as u64;

    let first = layout.grids[0];
    let projection = cost::Conv2d {
        batch,
        in_channels: channels,
        out_channels: embed,
        kernel: [cfg.patch_size.height, cfg.patch_size.width].map(|n| n as u64),
        groups: 1,
        output: first.map(|n| n as u64),
        bias: true,
    };
    let pixels = (layout.size.height * layout.size.width) as u64;
    let mut total =
        cost::input(batch * channels * pixels, bytes) + projection.cost(bytes) + norm(batch * patches(&first), embed);
    if cfg.use_absolute_embeddings {
        let learned = patches(&cfg.learned());
        total += Cost { weight_bytes: learned * embed * bytes, ..Cost::default() };
        total += cost::elementwise(batch * patches(&first) * embed, 1); // positions added
        // bicubic: a multiply-add for each of 16 neighbours
        total += layout.interpolated.map_or(Cost::default(), |_| cost::elementwise(patches(&first) * embed, 2 * 16));
    }
    for (stage, grid) in layout.grids.iter().enumerate() {
        let [width, inner, heads] = [cfg.width(stage), cfg.inner(stage), cfg.num_heads[stage]].map(|n| n as u64);
        let tokens = batch * patches(grid);
        let windows = batch * patches(&grid.map(|n| n.div_ceil(cfg.window_size)));
        let area = size * size;
        let attention = cost::Attention {
            batch: windows,
            heads,
            kv_heads: heads,
            head_dim: width / heads,
            queries: area,
            cached: 0,
            visible_pairs: cost::full_pairs(area, area),
        };
        let residual = cost::elementwise(tokens * width, 1);
        let layer = norm(tokens, width)
            // query, key and value, of padding too
            + cost::linear(windows * area, width, 3 * width, cfg.qkv_bias, bytes)
            + attention.cost(bytes)
            // relative positions
            + Cost { weight_bytes: (2 * size - 1).pow(2) * heads * bytes, ..Cost::default() }
            + linear(tokens, width, width) + residual
            + norm(tokens, width)
            + linear(tokens, width, inner)
            + cost::elementwise(tokens * inner, u64::from(cfg.hidden_act != Activation::Identity))
            + linear(tokens, inner, width) + residual;
        total += layer * cfg.depths[stage] as u64;
        if let Some(next) = layout.grids.get(stage + 1) {
            let merged = batch * patches(next);
            // patches side by side, normalised, reduced
            total += Cost { activation_bytes: merged * 4 * width * bytes, ..Cost::default() }
                + norm(merged, 4 * width)
                + cost::linear(merged, 4 * width, 2 * width, false, bytes);
        }
    }
    total
}

/// What follows the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeadKind {
    /// Of `SwinModel`: the mean.
    Pooler,
    /// Of `SwinForImageClassification`, with its number of labels.
    Classifier { labels: usize },
    /// Of `SwinForMaskedImageModeling`: pixels.
    Pixels,
}

impl HeadKind {
    fn of(spec: &ModelSpec) -> Result<Self, SessionError> {
        match spec.class.as_str() {
            "SwinModel" => Ok(Self::Pooler),
            "SwinForImageClassification" => Ok(Self::Classifier { labels: label_count(&spec.config)? }),
            "SwinForMaskedImageModeling" => Ok(Self::Pixels),
            _ => Err(config::unsupported_class(spec, CLASSES)),
        }
    }
}

/// The layers of a [`HeadKind`].
enum Head {
    Pooler,
    Classifier { classifier: Linear },
    Pixels { decoder: Linear },
}

impl Head {
    /// `vb` is the checkpoint's root.
    fn load(kind: HeadKind, cfg: &SwinConfig, vb: VarBuilder) -> Result<Self> {
        let features = cfg.features();
        Ok(match kind {
            HeadKind::Pooler => Self::Pooler,
            HeadKind::Classifier { labels } => {
                Self::Classifier { classifier: Linear::load(features, labels, true, vb.pp("classifier"))? }
            }
            HeadKind::Pixels => {
                // a convolution of 1 x 1
                let (vb, out) = (vb.pp("decoder.0"), cfg.encoder_stride.pow(2) * cfg.num_channels);
                let weight = vb.get((out, features, 1, 1), "weight")?.reshape((out, features))?;
                Self::Pixels { decoder: Linear::new(&weight, Some(&vb.get(out, "bias")?))? }
            }
        })
    }
}

/// The encoder with the head of its class.
pub struct SwinModel {
    cfg: SwinConfig,
    encoder: SwinEncoder,
    layernorm: LayerNorm,
    head: Head,
    kind: HeadKind,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl SwinModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, SwinConfig::from_spec(spec)?);
        let swin = if kind == HeadKind::Pooler { vb.clone() } else { vb.pp("swin") };
        Ok(Self {
            encoder: SwinEncoder::load(&cfg, kind == HeadKind::Pixels, swin.clone())?,
            layernorm: LayerNorm::load(cfg.features(), cfg.layer_norm_eps, swin.pp("layernorm"))?,
            head: Head::load(kind, &cfg, vb)?,
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
        let masked = match &pixels.masked {
            Some(masked) => Some(masked.to_device(&self.device)?),
            None => None,
        };
        let x = self.encoder.forward(&pixel_values, &pixels.layout, masked.as_ref())?;
        let x = self.layernorm.forward(&x)?; // (batch, patches, features)
        let (batch, _, features) = x.dims3()?;
        let [rows, columns] = pixels.layout.last_grid();
        let pooled = || global_avg_pool_2d(&x.reshape((batch, rows, columns, features))?); // (batch, features)
        Ok(match &self.head {
            Head::Pooler => Tensors::from([("pooler_output".into(), pooled()?), ("last_hidden_state".into(), x)]),
            Head::Classifier { classifier } => Tensors::from([("logits".into(), classifier.forward(&pooled()?)?)]),
            Head::Pixels { decoder } => {
                let (channels, stride) = (self.cfg.num_channels, self.cfg.encoder_stride);
                let parts = decoder.forward(&x)?.reshape(vec![batch, rows, columns, channels, stride, stride])?;
                let drawn = parts.permute(vec![0, 3, 1, 4, 2, 5])?;
                let drawn = drawn.reshape((batch, channels, rows * stride, columns * stride))?;
                let mut outputs = Tensors::new();
                if let Some(masked) = &masked {
                    outputs.insert("loss".into(), self.loss(&pixel_values, &drawn, masked)?);
                }
                outputs.insert("reconstruction".into(), drawn);
                outputs
            }
        })
    }

    /// The mean distance of masked pixels from those drawn.
    fn loss(&self, pixel_values: &Tensor, drawn: &Tensor, masked: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = drawn.dims4()?;
        let HeightWidth { height: down, width: across } = self.cfg.patch_size;
        let masked = masked.to_dtype(drawn.dtype())?.reshape((batch, 1, height / down, 1, width / across, 1))?;
        let masked = masked.broadcast_as((batch, 1, height / down, down, width / across, across))?;
        let masked = masked.reshape((batch, 1, height, width))?;
        // subtracted, multiplied and summed
        roofbench_nn::cost::elementwise(drawn.elem_count(), 3);
        let distance = (pixel_values - drawn)?.abs()?.broadcast_mul(&masked)?.sum_all()?;
        distance.div(&((masked.sum_all()? + 1e-5)? * channels as f64)?)
    }
}

/// The arguments of `forward`, checked.
struct Pixels<'a> {
    /// (batch, channels, height, width)
    values: &'a Tensor,
    layout: Layout,
    /// (batch, patches), u8.
    masked: Option<Tensor>,
}

impl<'a> Pixels<'a> {
    fn read(cfg: &SwinConfig, kind: HeadKind, call: &'a Call) -> Result<Self, SessionError> {
        let names = match kind {
            HeadKind::Pixels => &["pixel_values", "bool_masked_pos"][..],
            _ => &["pixel_values"],
        };
        let inputs = Inputs::forward(call, names, &["interpolate_pos_encoding"])?;
        let values = inputs.pictures("pixel_values", cfg.num_channels)?;
        let (batch, _, height, width) = values.dims4()?;
        let size = HeightWidth { height, width };
        let layout = cfg.layout(size, inputs.flag("interpolate_pos_encoding")?)?;
        if kind != HeadKind::Pixels {
            return Ok(Self { values, layout, masked: None });
        }
        let last = layout.last_grid();
        if last[0] != last[1] {
            let reason = format!("{height} x {width} pixels leave {} x {} patches, no square", last[0], last[1]);
            return Err(SessionError::input("pixel_values", reason));
        }
        if !call.inputs.contains_key("bool_masked_pos") {
            return Ok(Self { values, layout, masked: None });
        }
        let masked = inputs.matrix("bool_masked_pos")?;
        zero_or_one("bool_masked_pos", &masked)?;
        let patches = layout.grids[0][0] * layout.grids[0][1];
        if masked.dims() != [batch, patches] {
            let reason = format!("has shape {:?}, expected {:?}", masked.dims(), [batch, patches]);
            return Err(SessionError::input("bool_masked_pos", reason));
        }
        // the loss compares what is drawn with the picture
        let drawn = last.map(|n| n * cfg.encoder_stride);
        if drawn != [height, width] || size != cfg.image_size {
            let reason = format!(
                "needs pictures of image_size, which encoder_stride draws in full, not {height} x {width} pixels"
            );
            return Err(SessionError::input("bool_masked_pos", reason));
        }
        Ok(Self { values, layout, masked: Some(masked.to_dtype(DType::U8)?) })
    }
}

impl Session for SwinModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Pixels::read(&self.cfg, self.kind, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, self.kind, &Pixels::read(&self.cfg, self.kind, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one forward pass.
fn forward_cost(
    cfg: &SwinConfig,
    kind: HeadKind,
    pixels: &Pixels,
    dtype: DType,
) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let [batch, features, channels] = [pixels.values.dim(0)?, cfg.features(), cfg.num_channels].map(|n| n as u64);
    let last = pixels.layout.last_grid().map(|n| n as u64);
    let tokens = batch * last[0] * last[1];
    // the sum over the patches, and the mean
    let pooled = cost::elementwise(tokens * features, 1) + cost::input(batch * features, bytes);
    let head = match kind {
        HeadKind::Pooler => pooled,
        HeadKind::Classifier { labels } => pooled + cost::linear(batch, features, labels as u64, true, bytes),
        HeadKind::Pixels => {
            let drawn = channels * (cfg.encoder_stride as u64).pow(2);
            let token = pixels.masked.as_ref().map_or(0, |_| cfg.embed_dim as u64);
            let loss = pixels.masked.as_ref().map_or(0, |_| 3 * tokens * drawn);
            cost::linear(tokens, features, drawn, true, bytes)
                // the mask token; the pixels in their places
                + Cost {
                    flops: loss,
                    weight_bytes: token * bytes,
                    activation_bytes: tokens * drawn * bytes,
                    kv_bytes: 0,
                }
        }
    };
    let norm = cost::norm(Norm::Layer, tokens, features, bytes);
    let cost = encoder_cost(cfg, batch, &pixels.layout, dtype) + norm + head;
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 4, "depths": [1, 1],
            "num_heads": [1, 2], "window_size": 2, "mlp_ratio": 1.5, "encoder_stride": 4, "num_labels": 3,
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelSpec::new("swin", class, config)
    }

    fn call(shape: [usize; 4], interpolate: bool) -> Call {
        let pixel_values =
            synthetic::tensor("input:pixel_values", &shape, 0, DType::F32, &Device::Cpu).expect("values");
        let mut call = Call {
            method: "forward".into(),
            inputs: [("pixel_values".into(), pixel_values)].into(),
            ..Call::default()
        };
        if interpolate {
            call.arguments.insert("interpolate_pos_encoding".into(), json!(true));
        }
        call
    }

    fn cost_of(class: &str, changes: Value, call: &Call) -> Cost {
        let spec = spec(class, changes);
        let (cfg, kind) = (SwinConfig::from_spec(&spec).expect("a config"), HeadKind::of(&spec).expect("a class"));
        let pixels = Pixels::read(&cfg, kind, call).expect("pixels");
        forward_cost(&cfg, kind, &pixels, spec.dtype).expect("a cost")[0].cost
    }

    #[test]
    fn cost_of_a_tiny_case_by_hand() {
        // 7 x 5 pixels: 4 x 3 patches of width 4 in 2 x 2 windows of 2 x 2, then 2 x 2 of width 8 in one
        let stem = 2 * 4 * 12 * 4 + 12 * 4 + 7 * 12 * 4; // 12 patches of 4 pixels, biases, norm
        let layer = |tokens: u64, windows: u64, width: u64, inner: u64| {
            7 * tokens * width // norm
                + 2 * (4 * windows) * width * 3 * width + 4 * windows * 3 * width // query, key, value
                + windows * 4 * 16 * width + windows * 5 * 16 * (width / 4) // products and softmax; heads of 4
                + 2 * tokens * width * width + tokens * width + tokens * width // output, residual
                + 7 * tokens * width // norm
                + 2 * tokens * width * inner + tokens * inner + tokens * inner // up, activation
                + 2 * tokens * inner * width + tokens * width + tokens * width // down, residual
        };
        let merge = 7 * 4 * 16 + 2 * 4 * 16 * 8;
        let head = 7 * 4 * 8 + 4 * 8 + 2 * 8 * 3 + 3; // norm, sum, labels
        let weights_of = |width: u64, inner: u64| {
            4 * width + 4 * (width * width + width) + 9 * (width / 4) + 2 * width * inner + inner + width
        };
        let weights = (4 * 4 + 4 + 8) + weights_of(4, 6) + (32 + 16 * 8) + weights_of(8, 12) + 16 + (8 * 3 + 3);
        let written = |tokens: u64, windows: u64, width: u64, inner: u64| {
            tokens * width + 4 * windows * 4 * width + tokens * (3 * width + inner)
        };
        let activations =
            35 + 2 * 12 * 4 + written(12, 4, 4, 6) + 4 * (16 + 16 + 8) + written(4, 1, 8, 12) + 4 * 8 + 8 + 3;
        let expected = Cost {
            flops: stem + layer(12, 4, 4, 6) + merge + layer(4, 1, 8, 12) + head,
            weight_bytes: 4 * weights,
            activation_bytes: 4 * activations,
            kv_bytes: 0,
        };
        assert_eq!(cost_of("SwinForImageClassification", json!({}), &call([1, 1, 7, 5], false)), expected);
    }

    #[test]
    fn cost_of_swin_tiny_is_the_published_one() {
        let tiny = json!({
            "image_size": 224, "patch_size": 4, "num_channels": 3, "embed_dim": 96, "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24], "window_size": 7, "mlp_ratio": 4.0, "num_labels": 1000,
        });
        let cost = cost_of("SwinForImageClassification", tiny.clone(), &call([1, 3, 224, 224], false));
        // torchvision's documentation of swin_t: 4.49 billion multiply-adds, without norms, softmax and GELU
        let ratio = cost.flops as f64 / (2.0 * 4.49e9);
        assert!((1.0..1.03).contains(&ratio), "{} FLOP, {ratio} of the published count", cost.flops);
        // and 28 288 354 parameters, each read once
        assert_eq!(cost.weight_bytes, 4 * 28_288_354);
        let eight = cost_of("SwinForImageClassification", tiny, &call([8, 3, 224, 224], false));
        assert_eq!((eight.flops, eight.weight_bytes), (8 * cost.flops, cost.weight_bytes));
    }

    #[test]
    fn malformed_configs_name_the_field() {
        let message = |changes: Value| {
            SwinConfig::from_spec(&spec("SwinModel", changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message(json!({})), "");
        for (changes, start) in [
            (json!({"depths": []}), "config.json: `depths`: has 0 numbers"),
            (json!({"num_heads": [1]}), "config.json: `num_heads`: has 1 numbers, depths has 2"),
            (json!({"num_heads": [1, 3]}), "config.json: `num_heads`: 3 does not divide 8, the width of stage 2"),
            (json!({"num_heads": [0, 1]}), "config.json: `num_heads`: 0 is not in"),
            (json!({"window_size": 0}), "config.json: `window_size`: 0 is not in"),
            (json!({"mlp_ratio": -1.0}), "config.json: `mlp_ratio`: 0 is not in"),
            (json!({"image_size": [4, 4, 4]}), "config.json: `image_size`: expected a number or [height, width]"),
            (json!({"hidden_act": "maxout"}), "config.json: `hidden_act`: activation `maxout` is not supported"),
        ] {
            let found = message(changes);
            assert!(found.starts_with(start), "{found}");
        }
        let class = HeadKind::of(&spec("SwinBackbone", json!({}))).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(class.starts_with("swin: class `SwinBackbone` is not supported; supported: SwinModel"), "{class}");
    }

    #[test]
    fn pictures_that_do_not_fit_are_refused() {
        let message = |changes: Value, call: &Call| {
            let cfg = SwinConfig::from_spec(&spec("SwinModel", changes)).expect("a config");
            Pixels::read(&cfg, HeadKind::Pooler, call).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let absolute = json!({"use_absolute_embeddings": true});
        assert_eq!(message(json!({}), &call([1, 1, 9, 5], false)), "");
        let small = message(json!({}), &call([1, 1, 8, 4], false));
        assert!(small.contains("8 x 4 pixels leave 2 x 1 patches for stage 2, window_size is 2"), "{small}");
        let count = message(absolute.clone(), &call([1, 1, 8, 10], false));
        assert!(count.contains("8 x 10 pixels are 20 patches, of 16 positions"), "{count}");
        assert_eq!(message(absolute.clone(), &call([1, 1, 8, 10], true)), "");
        let broken = message(absolute, &call([1, 1, 8, 9], true));
        assert!(broken.starts_with("input `interpolate_pos_encoding`: needs pictures of whole patches"), "{broken}");
        let oblong = json!({"use_absolute_embeddings": true, "image_size": [8, 10]});
        let oblong = message(oblong, &call([1, 1, 8, 8], true));
        assert!(oblong.starts_with("input `interpolate_pos_encoding`: needs a square"), "{oblong}");
    }

    /// Windows moved by a half: each patch is in one place, and pairs from both sides of an edge are kept apart.
    #[test]
    fn windows_cover_the_picture_once() -> Result<()> {
        let (batch, size) = (2, 4);
        for (rows, columns, shift) in [(8, 12, 0), (8, 12, 2), (5, 7, 2), (4, 9, 0), (9, 5, 1)] {
            let windows = Windows::new(batch, [rows, columns], size, shift)?;
            let count = batch * rows * columns;
            let numbers = Tensor::arange(0f32, count as f32, &Device::Cpu)?.reshape((batch, rows * columns, 1))?;
            let cut = gather(&numbers, &windows.cut)?;
            assert_eq!(cut.dim(0)?, windows.which.len());
            let joined = gather(&cut, &windows.joined)?;
            assert_eq!(joined.flatten_all()?.to_vec1::<f32>()?, numbers.flatten_all()?.to_vec1::<f32>()?);
        }
        // one head whose bias is 0: of 2 x 2 windows moved by 1 the last has four parts
        let biases = window_biases(&Tensor::zeros((9, 1), DType::F32, &Device::Cpu)?, 2, 1)?;
        let apart = |which: usize| -> Result<usize> {
            let biases = biases.get(which)?.flatten_all()?.to_vec1::<f32>()?;
            Ok(biases.iter().filter(|bias| **bias == APART).count())
        };
        assert_eq!([apart(0)?, apart(1)?, apart(2)?, apart(3)?], [0, 8, 8, 12]);
        Ok(())
    }

    fn synthetic_model(spec: &ModelSpec) -> Result<SwinModel, SessionError> {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        SwinModel::load(spec, weights.var_builder(spec.dtype, &spec.device))
    }

    #[test]
    fn half_precision_weights_give_nearly_the_same() -> Result<(), SessionError> {
        let mut spec = spec("SwinForImageClassification", json!({}));
        let call = call([2, 1, 9, 8], false);
        let exact = synthetic_model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
        for dtype in [DType::BF16, DType::F16] {
            spec.dtype = dtype;
            let logits = synthetic_model(&spec)?.call(&call, &mut Unobserved)?.remove("logits").expect("logits");
            let error = (logits - &exact)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // each weight is off by at most 2^-9 of itself in bf16; logits are of order 1, a dozen layers deep
            assert!(error > 0.0 && error < 1e-1, "{dtype:?}: {error}");
        }
        Ok(())
    }

    /// A quarter of the patches masked: another picture is drawn, and only masked pixels count.
    #[test]
    fn masked_pictures_are_drawn() -> Result<(), SessionError> {
        let spec = spec("SwinForMaskedImageModeling", json!({}));
        let mut model = synthetic_model(&spec)?;
        let mut call = call([2, 1, 8, 8], false);
        let plain = model.call(&call, &mut Unobserved)?;
        assert_eq!(plain.keys().collect::<Vec<_>>(), ["reconstruction"]);
        assert_eq!(plain["reconstruction"].dims(), [2, 1, 8, 8]);
        let mask: Vec<i64> = (0..32).map(|i| i64::from(i % 4 == 1)).collect();
        call.inputs.insert("bool_masked_pos".into(), Tensor::from_vec(mask, (2, 16), &Device::Cpu)?);
        let masked = model.call(&call, &mut Unobserved)?;
        let (drawn, pixels) = (&masked["reconstruction"], &call.inputs["pixel_values"]);
        assert!((drawn - &plain["reconstruction"])?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3);
        let distances = (pixels - drawn)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
        // patch 1 of 4 in each row of patches: columns 2 and 3
        let counted: f32 = distances.iter().enumerate().filter(|(i, _)| matches!(i % 8, 2 | 3)).map(|(_, d)| d).sum();
        let loss = masked["loss"].to_scalar::<f32>()?;
        assert!((loss - counted / 32.0).abs() < 1e-5, "{loss}, not {}", counted / 32.0);
        call.inputs.insert("bool_masked_pos".into(), Tensor::ones((2, 9), DType::I64, &Device::Cpu)?);
        let error = model.call(&call, &mut Unobserved).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(error, "input `bool_masked_pos`: has shape [2, 9], expected [2, 16]");
        Ok(())
    }
}
