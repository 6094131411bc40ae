//! Embeddings of a picture and of prompts, which attend to each other both ways, to masks and their scores.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::session::Result;
use roofbench_nn::activation::Activation;
use roofbench_nn::attention::Attention;
use roofbench_nn::conv::{ConvTranspose2d, ConvTranspose2dConfig};
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use roofbench_nn::norm::LayerNorm;

use super::config::{SamConfig, SamMaskDecoderConfig};
use super::prompt_encoder::Prompts;
use super::{MASK_SCALE, NECK_EPS};
use crate::models::activation_dtype;

/// Of the last norm, whatever the config says.
const FINAL_EPS: f64 = 1e-5;

/// What the picture gives to an attention of prompts to it, and perhaps from it, as one product: rows are keys, values
/// and, where wanted, queries side by side.
struct PictureSide {
    projection: Linear,
    /// What the positions add to keys and queries: (1, patches, width).
    positions: Tensor,
    width: usize,
}

impl PictureSide {
    /// `parts` are layers from the stream to `width`, those with positions marked.
    fn load(width: usize, parts: &[(VarBuilder, bool)], grid: &Tensor) -> Result<Self> {
        let hidden = grid.dim(1)?;
        let (mut weights, mut biases, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for (vb, has_positions) in parts {
            let weight = vb.get((width, hidden), "weight")?;
            positions.push(match has_positions {
                true => Linear::new(&weight, None)?.forward(grid)?,
                false => Tensor::zeros((grid.dim(0)?, width), grid.dtype(), grid.device())?,
            });
            weights.push(weight);
            biases.push(vb.get(width, "bias")?);
        }
        let projection = Linear::new(&Tensor::cat(&weights, 0)?, Some(&Tensor::cat(&biases, 0)?))?;
        Ok(Self { projection, positions: Tensor::cat(&positions, 1)?.unsqueeze(0)?, width })
    }

    /// (prompts, patches, hidden) -> (prompts, patches, all parts)
    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let (_, patches, width) = self.positions.dims3()?;
        let positions = self.positions.broadcast_as((picture.dim(0)?, patches, width))?;
        self.projection.forward_add(picture, &positions)
    }

    /// The part `i` of a result.
    fn part(&self, x: &Tensor, i: usize) -> Result<Tensor> {
        x.narrow(2, i * self.width, self.width)
    }
}

/// A layer of the decoder: prompts attend to each other, to the picture, and the picture to them.
struct TwoWayLayer {
    self_attention: Attention,
    self_query_key: Linear,
    self_value: Linear,
    self_out: Linear,
    layer_norm1: LayerNorm,
    cross_attention: Attention,
    /// Keys and values for the prompts, and queries to them.
    picture: PictureSide,
    to_picture_query: Linear,
    to_picture_out: Linear,
    layer_norm2: LayerNorm,
    mlp: Mlp,
    layer_norm3: LayerNorm,
    from_picture_key: Linear,
    from_picture_value: Linear,
    from_picture_out: Linear,
    layer_norm4: LayerNorm,
    /// Starts from the prompts' embeddings, which are their positions as well: these are not added, and the first
    /// attention replaces them.
    is_first: bool,
}

impl TwoWayLayer {
    fn load(cfg: &SamMaskDecoderConfig, layer: usize, grid: &Tensor, vb: VarBuilder) -> Result<Self> {
        let (hidden, width) = (cfg.hidden_size, cfg.cross_width());
        let norm = |name: &str| LayerNorm::load(hidden, cfg.layer_norm_eps, vb.pp(name));
        let (attn, to, from) =
            (vb.pp("self_attn"), vb.pp("cross_attn_token_to_image"), vb.pp("cross_attn_image_to_token"));
        let parts = [(to.pp("k_proj"), true), (to.pp("v_proj"), false), (from.pp("q_proj"), true)];
        let linear = |input, output, vb: VarBuilder| Linear::load(input, output, true, vb);
        Ok(Self {
            self_attention: cfg.attention(hidden),
            self_query_key: Linear::load_fused(hidden, &[("q_proj", hidden), ("k_proj", hidden)], true, attn.clone())?,
            self_value: linear(hidden, hidden, attn.pp("v_proj"))?,
            self_out: linear(hidden, hidden, attn.pp("out_proj"))?,
            layer_norm1: norm("layer_norm1")?,
            cross_attention: cfg.attention(width),
            picture: PictureSide::load(width, &parts, grid)?,
            to_picture_query: linear(hidden, width, to.pp("q_proj"))?,
            to_picture_out: linear(width, hidden, to.pp("out_proj"))?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load([hidden, cfg.mlp_dim], cfg.hidden_act, true, ["lin1", "lin2"], vb.pp("mlp"))?,
            layer_norm3: norm("layer_norm3")?,
            from_picture_key: linear(hidden, width, from.pp("k_proj"))?,
            from_picture_value: linear(hidden, width, from.pp("v_proj"))?,
            from_picture_out: linear(width, hidden, from.pp("out_proj"))?,
            layer_norm4: norm("layer_norm4")?,
            is_first: layer == 0,
        })
    }

    /// `x` and its positions `embedding` (prompts, tokens, hidden), `picture` (prompts, patches, hidden); the new `x`
    /// and picture.
    fn forward(&self, x: &Tensor, embedding: &Tensor, picture: &Tensor) -> Result<(Tensor, Tensor)> {
        let query = if self.is_first { x.clone() } else { plus(x, embedding)? };
        let query_key = self.self_query_key.forward(&query)?;
        let hidden = x.dim(2)?;
        let (q, k) = (query_key.narrow(2, 0, hidden)?, query_key.narrow(2, hidden, hidden)?);
        let attended = self.self_attention.forward(&q, &k, &self.self_value.forward(x)?, None)?;
        let x = match self.is_first {
            true => self.self_out.forward(&attended)?,
            false => self.self_out.forward_add(&attended, x)?,
        };
        let x = self.layer_norm1.forward(&x)?;

        let of_picture = self.picture.forward(picture)?;
        let part = |i: usize| self.picture.part(&of_picture, i);
        let query = self.to_picture_query.forward(&plus(&x, embedding)?)?;
        let attended = self.cross_attention.forward(&query, &part(0)?, &part(1)?, None)?;
        let x = self.layer_norm2.forward(&self.to_picture_out.forward_add(&attended, &x)?)?;

        let x = self.layer_norm3.forward(&self.mlp.forward_add(&x, &x)?)?;

        let key = self.from_picture_key.forward(&plus(&x, embedding)?)?;
        let attended = self.cross_attention.forward(&part(2)?, &key, &self.from_picture_value.forward(&x)?, None)?;
        let picture = self.layer_norm4.forward(&self.from_picture_out.forward_add(&attended, picture)?)?;
        Ok((x, picture))
    }
}

/// The sum of two small tensors.
fn plus(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    roofbench_nn::cost::elementwise(a.elem_count(), 1);
    a + b
}

/// Products with a rectifier between any two.
struct FeedForward {
    layers: Vec<Linear>,
}

impl FeedForward {
    fn load([input, inner, output]: [usize; 3], depth: usize, vb: VarBuilder) -> Result<Self> {
        let between = (0..depth - 2).map(|i| Linear::load(inner, inner, true, vb.pp(format!("layers.{i}"))));
        let mut layers = vec![Linear::load(input, inner, true, vb.pp("proj_in"))?];
        layers.extend(between.collect::<Result<Vec<_>>>()?);
        layers.push(Linear::load(inner, output, true, vb.pp("proj_out"))?);
        Ok(Self { layers })
    }

    /// (rows, input) -> (rows, output)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let last = self.layers.len() - 1;
        let act = |i: usize| if i < last { Activation::Relu } else { Activation::Identity };
        self.layers.iter().enumerate().try_fold(x.clone(), |x, (i, layer)| layer.forward_act(&x, act(i)))
    }
}

/// Embeddings of picture and prompts to masks.
pub(super) struct MaskDecoder {
    output_tokens: Tensor, // (1, 1 + mask tokens, hidden): of the quality, and of each mask
    layers: Vec<TwoWayLayer>,
    final_attention: Attention,
    final_picture: PictureSide,
    final_query: Linear,
    final_out: Linear,
    layer_norm_final_attn: LayerNorm,
    upscale_conv1: ConvTranspose2d,
    upscale_layer_norm: LayerNorm,
    upscale_conv2: ConvTranspose2d,
    output_hypernetworks_mlps: Vec<FeedForward>,
    iou_prediction_head: FeedForward,
    cfg: SamMaskDecoderConfig,
}

impl MaskDecoder {
    /// `grid` are the positions of the picture's patches (patches, hidden).
    pub(super) fn load(cfg: &SamMaskDecoderConfig, grid: &Tensor, vb: VarBuilder) -> Result<Self> {
        let (hidden, width, masks) = (cfg.hidden_size, cfg.cross_width(), cfg.mask_tokens());
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let table = |rows: usize, name: &str| vb.get((rows, hidden), name)?.to_dtype(dtype);
        let tokens = [table(1, "iou_token.weight")?, table(masks, "mask_tokens.weight")?];
        let transformer = vb.pp("transformer");
        let last = transformer.pp("final_attn_token_to_image");
        let layer = |i: usize| TwoWayLayer::load(cfg, i, grid, transformer.pp(format!("layers.{i}")));
        let doubling = ConvTranspose2dConfig::new(2, 2);
        let hyper = |i: usize| {
            FeedForward::load([hidden, hidden, hidden / 8], 3, vb.pp(format!("output_hypernetworks_mlps.{i}")))
        };
        let final_norm = transformer.pp("layer_norm_final_attn");
        Ok(Self {
            output_tokens: Tensor::cat(&tokens, 0)?.unsqueeze(0)?,
            layers: (0..cfg.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_attention: cfg.attention(width),
            final_picture: PictureSide::load(width, &[(last.pp("k_proj"), true), (last.pp("v_proj"), false)], grid)?,
            final_query: Linear::load(hidden, width, true, last.pp("q_proj"))?,
            final_out: Linear::load(width, hidden, true, last.pp("out_proj"))?,
            layer_norm_final_attn: LayerNorm::load(hidden, FINAL_EPS, final_norm)?,
            upscale_conv1: ConvTranspose2d::load(hidden, hidden / 4, doubling, true, vb.pp("upscale_conv1"))?,
            upscale_layer_norm: LayerNorm::load(hidden / 4, NECK_EPS, vb.pp("upscale_layer_norm"))?,
            upscale_conv2: ConvTranspose2d::load(hidden / 4, hidden / 8, doubling, true, vb.pp("upscale_conv2"))?,
            output_hypernetworks_mlps: (0..masks).map(hyper).collect::<Result<_>>()?,
            iou_prediction_head: FeedForward::load(
                [hidden, cfg.iou_head_hidden_dim, masks],
                cfg.iou_head_depth,
                vb.pp("iou_prediction_head"),
            )?,
            cfg: cfg.clone(),
        })
    }

    /// `picture` (batch, rows, columns, hidden) with what masks add to it, `sparse` (batch · prompts, tokens, hidden);
    /// masks (batch, prompts, masks, 4 rows, 4 columns) and their quality (batch, prompts, masks).
    pub(super) fn forward(
        &self,
        picture: &Tensor,
        sparse: Option<&Tensor>,
        prompts: &Prompts,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, rows, columns, hidden) = picture.dims4()?;
        let count = batch * prompts.each;
        let output_tokens = self.output_tokens.broadcast_as((count, self.output_tokens.dim(1)?, hidden))?;
        let embedding = match sparse {
            Some(sparse) => Tensor::cat(&[&output_tokens.contiguous()?, sparse], 1)?,
            None => output_tokens.contiguous()?,
        }; // (batch * prompts, tokens, hidden)
        // each picture once for each of its prompts
        let picture = picture.reshape((batch, 1, rows * columns, hidden))?;
        let picture = picture.broadcast_as((batch, prompts.each, rows * columns, hidden))?;
        let mut picture = picture.reshape((count, rows * columns, hidden))?;
        let mut x = embedding.clone();
        for layer in &self.layers {
            (x, picture) = layer.forward(&x, &embedding, &picture)?;
        }
        let query = self.final_query.forward(&plus(&x, &embedding)?)?;
        let of_picture = self.final_picture.forward(&picture)?;
        let part = |i: usize| self.final_picture.part(&of_picture, i);
        let attended = self.final_attention.forward(&query, &part(0)?, &part(1)?, None)?;
        let x = self.layer_norm_final_attn.forward(&self.final_out.forward_add(&attended, &x)?)?;

        let token = |i: usize| x.narrow(1, i, 1)?.squeeze(1); // (batch * prompts, hidden)
        let (first, masks) = self.cfg.masks(prompts.multimask);
        let hyper = (first..first + masks).map(|i| self.output_hypernetworks_mlps[i].forward(&token(1 + i)?));
        let hyper = Tensor::stack(&hyper.collect::<Result<Vec<_>>>()?, 1)?; // (batch * prompts, masks, hidden / 8)
        let picture = self.upscale_conv1.forward(&picture.reshape((count, rows, columns, hidden))?)?;
        let picture = Activation::Gelu.forward(&self.upscale_layer_norm.forward(&picture)?)?;
        let picture = self.upscale_conv2.forward_act(&picture, Activation::Gelu)?;
        let pixels = MASK_SCALE * MASK_SCALE * rows * columns;
        let picture = picture.reshape((count, pixels, hidden / 8))?;
        // few rows of little depth, which candle's product reads from the transposed picture in place
        roofbench_nn::cost::elementwise(count * masks * pixels, 2 * (hidden / 8));
        let pred_masks = hyper.matmul(&picture.t()?)?;
        let iou_scores = self.iou_prediction_head.forward(&token(0)?)?.narrow(1, first, masks)?;
        let size = (batch, prompts.each, masks, MASK_SCALE * rows, MASK_SCALE * columns);
        Ok((pred_masks.reshape(size)?, iou_scores.reshape((batch, prompts.each, masks))?))
    }
}

/// Of the decoder.
pub(super) fn decoder_cost(cfg: &SamConfig, prompts: &Prompts, bytes: u64) -> Cost {
    let decoder = &cfg.mask_decoder_config;
    let (_, masks) = decoder.masks(prompts.multimask);
    let [count, grid, hidden, width, inner, heads, tokens, masks, all_masks, iou, depth] = [
        prompts.count(),
        cfg.vision_config.grid(),
        decoder.hidden_size,
        decoder.cross_width(),
        decoder.mlp_dim,
        decoder.num_attention_heads,
        1 + decoder.mask_tokens() + prompts.sparse_tokens(),
        masks,
        decoder.mask_tokens(),
        decoder.iou_head_hidden_dim,
        decoder.iou_head_depth,
    ]
    .map(|size| size as u64);
    let patches = grid * grid;
    let (rows, pixels) = (count * tokens, count * patches);
    let linear = |rows, input, output| cost::linear(rows, input, output, true, bytes);
    let norm = |rows, width| cost::norm(Norm::Layer, rows, width, bytes);
    let weights = |elements: u64| Cost { weight_bytes: elements * bytes, ..Cost::default() };
    let sum = |elements| cost::elementwise(elements, 1);
    let attention = |width: u64, queries, keys| {
        let visible_pairs = cost::full_pairs(queries, keys);
        let head_dim = width / heads;
        cost::Attention { batch: count, heads, kv_heads: heads, head_dim, queries, cached: 0, visible_pairs }
            .cost(bytes)
    };
    let residual = sum(rows * hidden);
    let layer = |i: u64| {
        // prompts' positions and the residual, but for the first
        let first = if i == 0 { Cost::default() } else { residual * 2 };
        first
            + linear(rows, hidden, 2 * hidden) + linear(rows, hidden, hidden) // query and key, value
            + attention(hidden, tokens, tokens)
            + linear(rows, hidden, hidden) + norm(rows, hidden)
            // the picture's key, value and query, with what positions add
            + linear(pixels, hidden, 3 * width) + sum(pixels * 3 * width) + weights(patches * 3 * width)
            + residual + linear(rows, hidden, width) // prompts' query
            + attention(width, tokens, patches)
            + linear(rows, width, hidden) + residual + norm(rows, hidden)
            + linear(rows, hidden, inner) + sum(rows * inner) // activation
            + linear(rows, inner, hidden) + residual + norm(rows, hidden)
            + residual + linear(rows, hidden, width) + linear(rows, hidden, width) // prompts' key and value
            + attention(width, patches, tokens)
            + linear(pixels, width, hidden) + sum(pixels * hidden) + norm(pixels, hidden)
    };
    let last = residual
        + linear(rows, hidden, width)
        + linear(pixels, hidden, 2 * width)
        + sum(pixels * 2 * width)
        + weights(patches * 2 * width)
        + attention(width, tokens, patches)
        + linear(rows, width, hidden)
        + residual
        + norm(rows, hidden);
    // each pixel becomes four; a bias for each of them
    let doubled = |pixels: u64, input: u64, output: u64| {
        cost::linear(pixels, input, 4 * output, false, bytes) + sum(4 * pixels * output) + weights(output)
    };
    let upscale = doubled(pixels, hidden, hidden / 4)
        + norm(4 * pixels, hidden / 4) + sum(4 * pixels * (hidden / 4)) // activation
        + doubled(4 * pixels, hidden / 4, hidden / 8) + sum(16 * pixels * (hidden / 8));
    // with a rectifier after all but the last product
    let feed_forward = |inner: u64, output: u64, depth: u64| {
        linear(count, hidden, inner)
            + linear(count, inner, inner) * (depth - 2)
            + sum(count * inner * (depth - 1))
            + linear(count, inner, output)
    };
    let product = cost::elementwise(16 * pixels * masks, 2 * (hidden / 8))
        + Cost { activation_bytes: 16 * pixels * masks * bytes, ..Cost::default() };
    weights((1 + all_masks) * hidden)
        + (0..decoder.num_hidden_layers as u64).map(layer).sum::<Cost>()
        + last
        + upscale
        + feed_forward(hidden, hidden / 8, 3) * masks
        + feed_forward(iou, all_masks, depth)
        + product
}
