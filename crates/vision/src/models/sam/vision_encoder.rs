//! Pictures to embeddings: a vision transformer with attention in windows, and a neck of convolutions.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::Result;
use roofbench_nn::conv::{Conv2d, Conv2dConfig};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;
use roofbench_nn::patch_embed::PatchEmbed;
use roofbench_nn::window_attention::WindowAttention;

use super::config::SamVisionConfig;
use super::{NECK_EPS, pointwise};
use crate::models::activation_dtype;

struct VisionLayer {
    layer_norm1: LayerNorm,
    qkv: Linear,
    attention: WindowAttention,
    proj: Linear,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl VisionLayer {
    fn load(cfg: &SamVisionConfig, layer: usize, vb: VarBuilder) -> Result<Self> {
        let (hidden, head_dim, window) = (cfg.hidden_size, cfg.head_dim(), cfg.window(layer));
        let norm = |name: &str| LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(name));
        let attn = vb.pp("attn");
        let mut attention = WindowAttention::new([cfg.num_attention_heads, head_dim], [cfg.grid(); 2], [window; 2])?;
        if cfg.qkv_bias {
            // what pads a window is 0 before the product
            let bias = attn.get(3 * hidden, "qkv.bias")?;
            attention =
                attention.with_outside(&bias.narrow(0, hidden, hidden)?, &bias.narrow(0, 2 * hidden, hidden)?)?;
        }
        if cfg.use_rel_pos {
            let table = |name: &str| attn.get((2 * window - 1, head_dim), name);
            attention = attention.with_positions(&table("rel_pos_h")?, &table("rel_pos_w")?)?;
        }
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            qkv: Linear::load(hidden, 3 * hidden, cfg.qkv_bias, attn.pp("qkv"))?,
            attention,
            proj: Linear::load(hidden, hidden, true, attn.pp("proj"))?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load([hidden, cfg.mlp_dim()], cfg.hidden_act, true, ["lin1", "lin2"], vb.pp("mlp"))?,
        })
    }

    /// `x` and the result are (batch, patches, hidden).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.layer_norm1.forward(x)?)?; // (batch, patches, 3 * hidden)
        let hidden = x.dim(2)?;
        let part = |i: usize| qkv.narrow(2, i * hidden, hidden);
        let attended = self.attention.forward(&part(0)?, &part(1)?, &part(2)?)?; // (batch, patches, hidden)
        let x = self.proj.forward_add(&attended, x)?;
        self.mlp.forward_add(&self.layer_norm2.forward(&x)?, &x)
    }
}

/// Pictures to embeddings.
pub(super) struct VisionEncoder {
    patch_embed: PatchEmbed,
    pos_embed: Option<Tensor>, // (1, patches, hidden)
    layers: Vec<VisionLayer>,
    neck_conv1: Linear,
    neck_layer_norm1: LayerNorm,
    neck_conv2: Conv2d,
    neck_layer_norm2: LayerNorm,
    grid: usize,
}

impl VisionEncoder {
    pub(super) fn load(cfg: &SamVisionConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, channels, grid) = (cfg.hidden_size, cfg.output_channels, cfg.grid());
        let pos_embed = match cfg.use_abs_pos {
            true => {
                let dtype = activation_dtype(vb.dtype(), vb.device());
                let positions = vb.get((1, grid, grid, hidden), "pos_embed")?.to_dtype(dtype)?;
                Some(positions.reshape((1, grid * grid, hidden))?)
            }
            false => None,
        };
        let patch = (cfg.patch_size, cfg.patch_size);
        let layer = |i: usize| VisionLayer::load(cfg, i, vb.pp(format!("layers.{i}")));
        let neck = vb.pp("neck");
        let norm = |name: &str| LayerNorm::load(channels, NECK_EPS, neck.pp(name));
        let conv2 = Conv2dConfig::new(3).padding(1);
        Ok(Self {
            patch_embed: PatchEmbed::load(cfg.num_channels, hidden, patch, true, vb.pp("patch_embed.projection"))?,
            pos_embed,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            neck_conv1: pointwise(hidden, channels, false, neck.pp("conv1"))?,
            neck_layer_norm1: norm("layer_norm1")?,
            neck_conv2: Conv2d::load(channels, channels, conv2, false, neck.pp("conv2"))?,
            neck_layer_norm2: norm("layer_norm2")?,
            grid,
        })
    }

    /// (batch, channels, height, width) -> (batch, rows, columns, output channels)
    pub(super) fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let mut x = match &self.pos_embed {
            Some(positions) => {
                let (_, patches, hidden) = positions.dims3()?;
                let positions = positions.broadcast_as((pixel_values.dim(0)?, patches, hidden))?;
                self.patch_embed.forward_add(pixel_values, &positions)?
            }
            None => self.patch_embed.forward(pixel_values)?,
        }; // (batch, patches, hidden)
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        let x = self.neck_layer_norm1.forward(&self.neck_conv1.forward(&x)?)?; // (batch, patches, output channels)
        let x = x.reshape((x.dim(0)?, self.grid, self.grid, x.dim(2)?))?;
        self.neck_layer_norm2.forward(&self.neck_conv2.forward(&x)?)
    }
}

/// Of the picture's embedding.
pub(super) fn vision_cost(cfg: &SamVisionConfig, batch: usize, bytes: u64) -> Cost {
    let [batch, grid, hidden, channels, inner, heads, head_dim] = [
        batch,
        cfg.grid(),
        cfg.hidden_size,
        cfg.output_channels,
        cfg.mlp_dim(),
        cfg.num_attention_heads,
        cfg.head_dim(),
    ]
    .map(|size| size as u64);
    let patches = grid * grid;
    let tokens = batch * patches;
    let linear = |input, output, bias| cost::linear(tokens, input, output, bias, bytes);
    let norm = |width| cost::norm(Norm::Layer, tokens, width, bytes);
    let residual = cost::elementwise(tokens * hidden, 1);
    let conv = |in_channels, out_channels, side: u64, bias| cost::Conv2d {
        batch,
        in_channels,
        out_channels,
        kernel: [side, side],
        groups: 1,
        output: [grid, grid],
        bias,
    };
    let positions = match cfg.use_abs_pos {
        true => residual + Cost { weight_bytes: patches * hidden * bytes, ..Cost::default() },
        false => Cost::default(),
    };
    let attention = |window: u64| {
        // what pads the last windows is seen by the others, but sees nothing itself
        let pairs = patches * window * window;
        let scores = cost::Attention {
            batch,
            heads,
            kv_heads: heads,
            head_dim,
            queries: patches,
            cached: 0,
            visible_pairs: pairs,
        };
        // products with a vector for each line and column of the window, two of which are added to each score
        let relative = cost::elementwise(tokens * heads * 2 * window, 2 * head_dim)
            + cost::elementwise(batch * heads * pairs, 2)
            + Cost { weight_bytes: 2 * (2 * window - 1) * head_dim * bytes, ..Cost::default() };
        scores.cost(bytes) + if cfg.use_rel_pos { relative } else { Cost::default() }
    };
    let layer = |i: usize| {
        norm(hidden)
            + linear(hidden, 3 * hidden, cfg.qkv_bias)
            + attention(cfg.window(i) as u64)
            + linear(hidden, hidden, true)
            + residual
            + norm(hidden)
            + linear(hidden, inner, true)
            + cost::elementwise(tokens * inner, 1)
            + linear(inner, hidden, true)
            + residual
    };
    let neck = linear(hidden, channels, false)
        + norm(channels)
        + conv(channels, channels, 3, false).cost(bytes)
        + norm(channels);
    let patch_embed = conv(cfg.num_channels as u64, hidden, cfg.patch_size as u64, true);
    patch_embed.cost(bytes) + positions + (0..cfg.num_hidden_layers).map(layer).sum::<Cost>() + neck
}
