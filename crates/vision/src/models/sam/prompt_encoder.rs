//! Points, boxes and masks to embeddings.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::cost::{self, Cost, Norm};
use roofbench_core::inputs::Inputs;
use roofbench_core::session::{Call, Result, SessionError};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{Conv2d, Conv2dConfig};
use roofbench_nn::linear::Linear;
use roofbench_nn::norm::LayerNorm;

use super::config::{SamConfig, SamPromptEncoderConfig};
use super::{MASK_SCALE, pointwise};
use crate::models::activation_dtype;

/// Point embeddings by what they are for: background, object, and the corners of a box.
pub(super) const POINT_KINDS: usize = 4;

/// Coordinates to sines and cosines of random frequencies (arXiv:2006.10739).
pub(super) struct PositionalEmbedding {
    /// For each frequency what it takes of x and of y.
    frequencies: Vec<(f32, f32)>,
}

impl PositionalEmbedding {
    fn load(features: usize, vb: VarBuilder) -> Result<Self> {
        let matrix = vb.get((2, features), "positional_embedding")?;
        let rows = matrix.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        Ok(Self { frequencies: rows[0].iter().copied().zip(rows[1].iter().copied()).collect() })
    }

    /// The embedding of a point whose coordinates are in [0, 1].
    fn encode(&self, x: f64, y: f64) -> Vec<f32> {
        let (x, y) = ((2.0 * x - 1.0) as f32, (2.0 * y - 1.0) as f32);
        let angles = self.frequencies.iter().map(|(of_x, of_y)| TAU as f32 * (x * of_x + y * of_y));
        angles.clone().map(f32::sin).chain(angles.map(f32::cos)).collect()
    }

    /// Of the centres of a picture's patches: (patches, width).
    pub(super) fn of_grid(&self, grid: usize, device: &Device, dtype: DType) -> Result<Tensor> {
        let at = |i: usize| (i as f64 + 0.5) / grid as f64;
        let rows = (0..grid).flat_map(|y| (0..grid).map(move |x| (x, y)));
        let values: Vec<f32> = rows.flat_map(|(x, y)| self.encode(at(x), at(y))).collect();
        Tensor::from_vec(values, (grid * grid, 2 * self.frequencies.len()), &Device::Cpu)?
            .to_device(device)?
            .to_dtype(dtype)
    }
}

/// A mask to what it adds to the picture's embedding.
struct MaskEmbedding {
    conv1: Conv2d,
    layer_norm1: LayerNorm,
    conv2: Conv2d,
    layer_norm2: LayerNorm,
    conv3: Linear,
    activation: Activation,
}

impl MaskEmbedding {
    fn load(cfg: &SamPromptEncoderConfig, vb: VarBuilder) -> Result<Self> {
        let channels = cfg.mask_input_channels;
        let norm = |size: usize, name: &str| LayerNorm::load(size, cfg.layer_norm_eps, vb.pp(name));
        let halving = Conv2dConfig::new(2).stride(2);
        Ok(Self {
            conv1: Conv2d::load(1, channels / 4, halving, true, vb.pp("conv1"))?,
            layer_norm1: norm(channels / 4, "layer_norm1")?,
            conv2: Conv2d::load(channels / 4, channels, halving, true, vb.pp("conv2"))?,
            layer_norm2: norm(channels, "layer_norm2")?,
            conv3: pointwise(channels, cfg.hidden_size, true, vb.pp("conv3"))?,
            activation: cfg.hidden_act,
        })
    }

    /// (batch, 4 rows, 4 columns, 1) -> (batch, rows, columns, hidden)
    fn forward(&self, masks: &Tensor) -> Result<Tensor> {
        let x = self.activation.forward(&self.layer_norm1.forward(&self.conv1.forward(masks)?)?)?;
        let x = self.activation.forward(&self.layer_norm2.forward(&self.conv2.forward(&x)?)?)?;
        self.conv3.forward(&x)
    }
}

/// Points, boxes and masks to embeddings.
pub(super) struct PromptEncoder {
    pub(super) shared_embedding: PositionalEmbedding,
    mask_embed: MaskEmbedding,
    no_mask_embed: Tensor, // (1, hidden)
    /// Of the background, of the object, and of a box's corners.
    point_embed: Vec<Vec<f32>>,
    not_a_point_embed: Vec<f32>,
    image_size: usize,
}

impl PromptEncoder {
    /// `root` is the checkpoint's root, where the encoding of coordinates is.
    pub(super) fn load(cfg: &SamConfig, root: &VarBuilder) -> Result<Self> {
        let (vb, prompt) = (root.pp("prompt_encoder"), &cfg.prompt_encoder_config);
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let row = |name: &str| vb.get((1, prompt.hidden_size), name)?.to_dtype(dtype);
        let values = |name: &str| row(name)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let features = cfg.vision_config.num_pos_feats;
        Ok(Self {
            shared_embedding: PositionalEmbedding::load(features, root.pp("shared_image_embedding"))?,
            mask_embed: MaskEmbedding::load(prompt, vb.pp("mask_embed"))?,
            no_mask_embed: row("no_mask_embed.weight")?,
            point_embed: (0..prompt.num_point_embeddings)
                .map(|i| values(&format!("point_embed.{i}.weight")))
                .collect::<Result<_>>()?,
            not_a_point_embed: values("not_a_point_embed.weight")?,
            image_size: prompt.image_size,
        })
    }

    /// Embeddings of points and boxes (batch · prompts, tokens, hidden), if there are any.
    pub(super) fn sparse(&self, prompts: &Prompts, like: &Tensor) -> Result<Option<Tensor>> {
        let tokens = prompts.sparse_tokens();
        if tokens == 0 {
            return Ok(None);
        }
        let side = self.image_size as f64;
        // the middle of a pixel
        let at = |[x, y]: [f64; 2]| self.shared_embedding.encode((x + 0.5) / side, (y + 0.5) / side);
        let added = |mut x: Vec<f32>, kind: usize| {
            x.iter_mut().zip(&self.point_embed[kind]).for_each(|(x, embedding)| *x += embedding);
            x
        };
        let point = |(point, label): (&[f64; 2], &i64)| match label {
            -1 => self.not_a_point_embed.clone(),
            -10 => vec![0.0; self.not_a_point_embed.len()],
            0 => added(at(*point), 0),
            1 => added(at(*point), 1),
            _ => at(*point),
        };
        let mut values = Vec::new();
        for prompt in 0..prompts.count() {
            if let Some(points) = &prompts.points {
                let of_prompt = prompt * points.each..(prompt + 1) * points.each;
                let (places, labels) = (&points.places[of_prompt.clone()], &points.labels[of_prompt]);
                places.iter().zip(labels).for_each(|pair| values.extend(point(pair)));
                if prompts.boxes.is_none() {
                    values.extend(&self.not_a_point_embed);
                }
            }
            if let Some(boxes) = &prompts.boxes {
                let [x1, y1, x2, y2] = boxes[prompt];
                values.extend(added(at([x1, y1]), 2));
                values.extend(added(at([x2, y2]), 3));
            }
        }
        roofbench_nn::cost::elementwise(
            prompts.count() * tokens,
            ENCODING_FLOPS * self.shared_embedding.frequencies.len(),
        );
        let hidden = self.not_a_point_embed.len();
        let sparse = Tensor::from_vec(values, (prompts.count(), tokens, hidden), &Device::Cpu)?;
        sparse.to_device(like.device())?.to_dtype(like.dtype()).map(Some)
    }

    /// What is added to the picture's embedding (batch or 1, rows or 1, columns or 1, hidden).
    pub(super) fn dense(&self, masks: Option<&Tensor>, like: &Tensor) -> Result<Tensor> {
        match masks {
            Some(masks) => {
                let (batch, _, height, width) = masks.dims4()?;
                let masks = masks.to_device(like.device())?.to_dtype(like.dtype())?;
                self.mask_embed.forward(&masks.reshape((batch, height, width, 1))?)
            }
            None => self.no_mask_embed.reshape((1, 1, 1, ())),
        }
    }
}

/// For each frequency of an encoded point: two multiply-adds for the angle and its factor, a sine and a cosine, and the
/// embedding of its kind added to both.
const ENCODING_FLOPS: usize = 4 + 1 + 2 + 2;

/// Points of each prompt.
pub(crate) struct Points {
    /// In each prompt.
    pub(crate) each: usize,
    /// x and y, in pixels.
    pub(crate) places: Vec<[f64; 2]>,
    /// 1 object, 0 background, -1 no point, -10 padding.
    pub(crate) labels: Vec<i64>,
}

/// The arguments of `forward` but for the picture, checked.
pub(crate) struct Prompts {
    pub(crate) batch: usize,
    /// Prompts for each picture.
    pub(crate) each: usize,
    pub(crate) points: Option<Points>,
    /// x1, y1, x2, y2 in pixels.
    pub(crate) boxes: Option<Vec<[f64; 4]>>,
    /// (batch or 1, 1, 4 rows, 4 columns)
    pub(crate) masks: Option<Tensor>,
    pub(crate) multimask: bool,
}

impl Prompts {
    /// Of all pictures.
    pub(super) fn count(&self) -> usize {
        self.batch * self.each
    }

    /// Tokens that points and boxes become, of each prompt.
    pub(super) fn sparse_tokens(&self) -> usize {
        let of_boxes = if self.boxes.is_some() { 2 } else { 0 };
        // points are followed by one that is none, unless boxes follow
        let of_points = self.points.as_ref().map_or(0, |points| points.each + usize::from(self.boxes.is_none()));
        of_points + of_boxes
    }

    pub(super) fn read(cfg: &SamConfig, inputs: &Inputs, call: &Call, batch: usize) -> Result<Self, SessionError> {
        let shaped = |name: &str, rank: usize, last: usize, form: &str| -> Result<Option<Tensor>, SessionError> {
            let Some(tensor) = call.inputs.get(name) else { return Ok(None) };
            let dims = tensor.dims();
            if dims.len() != rank || dims[rank - 1] != last || dims[0] != batch || dims.contains(&0) {
                let reason = format!("has shape {dims:?}, expected {form} with batch = {batch}, none of them 0");
                return Err(SessionError::input(name, reason));
            }
            Ok(Some(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten(1, rank - 2)?))
        };
        let each = |name: &str| call.inputs.get(name).map(|tensor| tensor.dims()[1]);
        let points = shaped("input_points", 4, 2, "(batch, prompts, points, 2)")?;
        let boxes = shaped("input_boxes", 3, 4, "(batch, prompts, 4)")?;
        let (of_points, of_boxes) = (each("input_points"), each("input_boxes"));
        if let (Some(points), Some(boxes)) = (of_points, of_boxes)
            && points != boxes
        {
            let reason = format!("has boxes of {boxes} prompts, input_points has points of {points}");
            return Err(SessionError::input("input_boxes", reason));
        }
        let prompts = of_points.or(of_boxes).unwrap_or(1);
        let points = match points {
            Some(points) => {
                let each = points.dim(1)? / prompts;
                let places = points.flatten_to(1)?.to_vec2::<f64>()?.into_iter().map(|place| [place[0], place[1]]);
                Some(Points { each, places: places.collect(), labels: labels(call, [batch, prompts, each])? })
            }
            None if call.inputs.contains_key("input_labels") => {
                return Err(SessionError::input("input_labels", "is given without input_points"));
            }
            None => None,
        };
        let boxes = match boxes {
            Some(boxes) => {
                let rows = boxes.flatten_to(1)?.to_vec2::<f64>()?;
                Some(rows.into_iter().map(|row| [row[0], row[1], row[2], row[3]]).collect())
            }
            None => None,
        };
        let side = MASK_SCALE * cfg.vision_config.grid();
        let masks = call.inputs.get("input_masks").cloned();
        if let Some(masks) = &masks {
            let fits = matches!(masks.dims(), [n, 1, h, w] if [1, batch].contains(n) && [*h, *w] == [side; 2]);
            if !fits || !masks.dtype().is_float() {
                let found = format!("{:?} of type {:?}", masks.dims(), masks.dtype());
                let reason = format!("has shape {found}, expected floats ({batch} or 1, 1, {side}, {side})");
                return Err(SessionError::input("input_masks", reason));
            }
        }
        let multimask = !call.arguments.contains_key("multimask_output") || inputs.flag("multimask_output")?;
        Ok(Self { batch, each: prompts, points, boxes, masks, multimask })
    }
}

/// The labels of points; all on the object where the call leaves them out.
fn labels(call: &Call, shape: [usize; 3]) -> Result<Vec<i64>, SessionError> {
    let Some(labels) = call.inputs.get("input_labels") else { return Ok(vec![1; shape.iter().product()]) };
    if labels.dims() != shape || !labels.dtype().is_int() {
        let found = format!("{:?} of type {:?}", labels.dims(), labels.dtype());
        let reason = format!("has shape {found}, expected integers {shape:?} (batch, prompts, points)");
        return Err(SessionError::input("input_labels", reason));
    }
    Ok(labels.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
}

/// Of the prompts' embeddings, and of adding them to the picture's.
pub(super) fn prompt_cost(cfg: &SamConfig, prompts: &Prompts, bytes: u64) -> Cost {
    let prompt = &cfg.prompt_encoder_config;
    let [batch, grid, hidden, channels] =
        [prompts.batch, cfg.vision_config.grid(), prompt.hidden_size, prompt.mask_input_channels].map(|n| n as u64);
    let points = (prompts.count() * prompts.sparse_tokens()) as u64;
    let frequencies = cfg.vision_config.num_pos_feats as u64;
    let weights = |elements: u64| Cost { weight_bytes: elements * bytes, ..Cost::default() };
    let sparse = cost::elementwise(points, ENCODING_FLOPS as u64 * frequencies)
        + Cost { activation_bytes: points * hidden * bytes, ..Cost::default() }
        // the frequencies, and the kinds of points with what is none
        + if points > 0 { weights(2 * frequencies + (POINT_KINDS as u64 + 1) * hidden) } else { Cost::default() };
    let dense = match &prompts.masks {
        None => weights(hidden),
        Some(masks) => {
            let items = masks.dims()[0] as u64;
            let halved = |in_channels, out_channels, side: u64| {
                let pixels = items * side * side;
                let conv = cost::Conv2d {
                    batch: items,
                    in_channels,
                    out_channels,
                    kernel: [2, 2],
                    groups: 1,
                    output: [side, side],
                    bias: true,
                };
                conv.cost(bytes)
                    + cost::norm(Norm::Layer, pixels, out_channels, bytes)
                    + cost::elementwise(pixels * out_channels, 1) // activation
            };
            cost::input(masks.elem_count() as u64, bytes)
                + halved(1, channels / 4, 2 * grid)
                + halved(channels / 4, channels, grid)
                + cost::linear(items * grid * grid, channels, hidden, true, bytes)
        }
    };
    sparse + dense + cost::elementwise(batch * grid * grid * hidden, 1)
}
