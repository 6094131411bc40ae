//! Segment Anything: a vision transformer with attention in windows and decomposed relative positions makes an
//! embedding of a picture; points, boxes and masks are encoded as prompts; a small decoder in which prompts and picture
//! attend to each other both ways gives masks and how good it takes them to be.
//! Source: SAM (arXiv:2304.02643). Mirrors `transformers.SamModel`.
//!
//! The picture's embedding costs nearly everything and does not depend on the prompts: `get_image_embeddings` gives it,
//! and `forward` takes it as `image_embeddings` in place of `pixel_values`, as often as there are prompts.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config::unsupported_class;
use roofbench_core::cost::{self, PhaseCost};
use roofbench_core::inputs::{Inputs, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::conv::{to_channels_first, to_channels_last};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;

use super::activation_dtype;

mod config;
mod mask_decoder;
mod prompt_encoder;
mod vision_encoder;

pub use config::{SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig};
use mask_decoder::{MaskDecoder, decoder_cost};
pub(super) use prompt_encoder::Prompts;
use prompt_encoder::{PromptEncoder, prompt_cost};
use vision_encoder::{VisionEncoder, vision_cost};

/// The classes that run.
pub const CLASSES: &[&str] = &["SamModel"];

/// From names in published checkpoints to those of the class.
pub(crate) const ALIASES: &[AliasRule] = &[
    // one matrix with two names; older files hold it twice
    AliasRule::rename(
        r"^prompt_encoder\.shared_embedding\.positional_embedding$",
        "shared_image_embedding.positional_embedding",
        AliasScope::Always,
    ),
];

/// Of the norms in the neck and in the upscaling, whatever the config says.
const NECK_EPS: f64 = 1e-6;
/// How many times larger than the embedding's the sides of a mask are.
const MASK_SCALE: usize = 4;

/// A convolution of single pixels, as a product.
fn pointwise(in_channels: usize, out_channels: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get((out_channels, in_channels, 1, 1), "weight")?.reshape((out_channels, in_channels))?;
    let bias = if bias { Some(vb.get(out_channels, "bias")?) } else { None };
    Linear::new(&weight, bias.as_ref())
}

/// What a call gives of the picture.
pub(super) enum Picture<'a> {
    /// (batch, channels, height, width)
    Pixels(&'a Tensor),
    /// (batch, channels, rows, columns)
    Embeddings(&'a Tensor),
}

/// The arguments of a call, checked.
pub(super) enum Request<'a> {
    /// `get_image_embeddings`, of these pixels.
    Embed(&'a Tensor),
    /// `forward`.
    Segment(Picture<'a>, Prompts),
}

impl<'a> Request<'a> {
    pub(super) fn read(cfg: &SamConfig, call: &'a Call) -> Result<Self, SessionError> {
        let vision = &cfg.vision_config;
        let pixels = |inputs: &Inputs<'a>| {
            let pixels = inputs.pictures("pixel_values", vision.num_channels)?;
            let (_, _, height, width) = pixels.dims4()?;
            if [height, width] != [vision.image_size; 2] {
                let side = vision.image_size;
                let reason = format!("is {height} x {width} pixels, image_size is {side} x {side}; pad the picture");
                return Err(SessionError::input("pixel_values", reason));
            }
            Ok(pixels)
        };
        if call.method == "get_image_embeddings" {
            let inputs = Inputs::of_any_method(call, &["pixel_values"])?;
            if let Some(name) = call.arguments.keys().next() {
                return Err(SessionError::input(name, "is not supported for this method; supported: pixel_values"));
            }
            return pixels(&inputs).map(Self::Embed);
        }
        if call.method != "forward" {
            return Err(unsupported_method(call, "forward, get_image_embeddings"));
        }
        let tensors =
            ["pixel_values", "image_embeddings", "input_points", "input_labels", "input_boxes", "input_masks"];
        let inputs = Inputs::forward(call, &tensors, &["multimask_output"])?;
        let picture = match (call.inputs.get("image_embeddings"), call.inputs.contains_key("pixel_values")) {
            (Some(_), true) => {
                return Err(SessionError::input("image_embeddings", "is given beside pixel_values; give one of them"));
            }
            (None, _) => Picture::Pixels(pixels(&inputs)?),
            (Some(embeddings), false) => {
                let (channels, grid) = (vision.output_channels, vision.grid());
                let fits =
                    matches!(embeddings.dims(), [n, c, h, w] if *n > 0 && [*c, *h, *w] == [channels, grid, grid]);
                if !fits || !embeddings.dtype().is_float() {
                    let found = format!("{:?} of type {:?}", embeddings.dims(), embeddings.dtype());
                    let reason = format!("has shape {found}, expected floats (batch, {channels}, {grid}, {grid})");
                    return Err(SessionError::input("image_embeddings", reason));
                }
                Picture::Embeddings(embeddings)
            }
        };
        let batch = match picture {
            Picture::Pixels(tensor) | Picture::Embeddings(tensor) => tensor.dim(0)?,
        };
        let prompts = Prompts::read(cfg, &inputs, call, batch)?;
        Ok(Self::Segment(picture, prompts))
    }
}

/// The three parts together.
pub struct SamModel {
    cfg: SamConfig,
    vision_encoder: VisionEncoder,
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    dtype: DType,
    device: Device,
    paths: BTreeMap<String, String>,
}

impl SamModel {
    /// Loads the class of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        if !CLASSES.contains(&spec.class.as_str()) {
            return Err(unsupported_class(spec, CLASSES));
        }
        let cfg = SamConfig::from_spec(spec)?;
        let prompt_encoder = PromptEncoder::load(&cfg, &vb)?;
        let dtype = activation_dtype(vb.dtype(), vb.device());
        let grid = prompt_encoder.shared_embedding.of_grid(cfg.vision_config.grid(), vb.device(), dtype)?;
        Ok(Self {
            vision_encoder: VisionEncoder::load(&cfg.vision_config, vb.pp("vision_encoder"))?,
            prompt_encoder,
            mask_decoder: MaskDecoder::load(&cfg.mask_decoder_config, &grid, vb.pp("mask_decoder"))?,
            dtype: spec.dtype,
            device: spec.device.clone(),
            paths: isa::paths(&spec.device, spec.dtype),
            cfg,
        })
    }

    /// A tensor of the call where and as the layers want it.
    fn activation(&self, x: &Tensor) -> Result<Tensor> {
        x.to_device(&self.device)?.to_dtype(activation_dtype(self.dtype, &self.device))
    }

    fn forward(&self, request: &Request) -> Result<Tensors> {
        let (picture, prompts) = match request {
            Request::Embed(pixels) => {
                let embeddings = self.vision_encoder.forward(&self.activation(pixels)?)?;
                return Ok([("image_embeddings".to_owned(), to_channels_first(&embeddings)?)].into());
            }
            Request::Segment(Picture::Pixels(pixels), prompts) => {
                (self.vision_encoder.forward(&self.activation(pixels)?)?, prompts)
            }
            Request::Segment(Picture::Embeddings(embeddings), prompts) => {
                (to_channels_last(&self.activation(embeddings)?)?, prompts)
            }
        }; // (batch, rows, columns, hidden)
        let sparse = self.prompt_encoder.sparse(prompts, &picture)?;
        let dense = self.prompt_encoder.dense(prompts.masks.as_ref(), &picture)?;
        roofbench_nn::cost::elementwise(picture.elem_count(), 1);
        let picture = picture.broadcast_add(&dense)?;
        let (pred_masks, iou_scores) = self.mask_decoder.forward(&picture, sparse.as_ref(), prompts)?;
        Ok([("iou_scores".to_owned(), iou_scores), ("pred_masks".to_owned(), pred_masks)].into())
    }
}

impl Session for SamModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&Request::read(&self.cfg, call)?)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, &Request::read(&self.cfg, call)?, self.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

/// FLOPs and bytes of one call.
pub(super) fn forward_cost(cfg: &SamConfig, request: &Request, dtype: DType) -> Result<Vec<PhaseCost>, SessionError> {
    let bytes = dtype.size_in_bytes() as u64;
    let elements = |x: &Tensor| cost::input(x.elem_count() as u64, bytes);
    let cost = match request {
        Request::Embed(pixels) => vision_cost(&cfg.vision_config, pixels.dim(0)?, bytes) + elements(pixels),
        Request::Segment(picture, prompts) => {
            let picture = match picture {
                Picture::Pixels(pixels) => vision_cost(&cfg.vision_config, prompts.batch, bytes) + elements(pixels),
                Picture::Embeddings(embeddings) => elements(embeddings),
            };
            picture + prompt_cost(cfg, prompts, bytes) + decoder_cost(cfg, prompts, bytes)
        }
    };
    Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost }])
}

#[cfg(test)]
mod tests {
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;

    /// 3 x 3 patches in windows of 2.
    fn spec(part: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "vision_config": {
                "hidden_size": 8, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 12, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16, "image_size": 12, "patch_size": 4, "mask_input_channels": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 16, "mlp_dim": 12, "num_attention_heads": 2, "iou_head_hidden_dim": 6,
            },
        });
        for (field, value) in changes.as_object().expect("an object") {
            config[part][field] = value.clone();
        }
        ModelSpec::new("sam", "SamModel", config)
    }

    fn model(spec: &ModelSpec) -> SamModel {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, ALIASES, &spec.class, &HubOptions::from_env()).expect("weights");
        SamModel::load(spec, weights.var_builder(spec.dtype, &spec.device)).expect("a model")
    }

    fn values(name: &str, shape: &[usize]) -> Tensor {
        synthetic::tensor(&format!("input:{name}"), shape, 0, DType::F32, &Device::Cpu).expect("values")
    }

    fn call(inputs: &[(&str, Tensor)]) -> Call {
        let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        Call { method: "forward".into(), inputs, ..Call::default() }
    }

    fn pixels(batch: usize) -> (&'static str, Tensor) {
        ("pixel_values", values("pixel_values", &[batch, 3, 12, 12]))
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        let difference = (a - b).and_then(|x| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>());
        difference.expect("tensors of one shape")
    }

    #[test]
    fn an_embedding_serves_any_number_of_prompts() -> Result<(), SessionError> {
        let mut sam = model(&spec("vision_config", json!({})));
        let embed = Call { method: "get_image_embeddings".into(), ..call(&[pixels(2)]) };
        let embeddings = sam.call(&embed, &mut Unobserved)?.remove("image_embeddings").expect("embeddings");
        assert_eq!(embeddings.dims(), [2, 16, 3, 3]);
        let points = ("input_points", (values("points", &[2, 3, 2, 2]) * 12.0)?);
        let at_once = sam.call(&call(&[pixels(2), points.clone()]), &mut Unobserved)?;
        assert_eq!(at_once["pred_masks"].dims(), [2, 3, 3, 12, 12]);
        assert_eq!(at_once["iou_scores"].dims(), [2, 3, 3]);
        // each prompt by itself, on the embedding
        for prompt in 0..3 {
            let alone = ("input_points", points.1.narrow(1, prompt, 1)?);
            let alone = sam.call(&call(&[("image_embeddings", embeddings.clone()), alone]), &mut Unobserved)?;
            for (name, alone) in alone {
                let together = at_once[&name].narrow(1, prompt, 1)?;
                assert!(largest_difference(&together, &alone) < 1e-5, "{name} of prompt {prompt}");
            }
        }
        Ok(())
    }

    #[test]
    fn one_mask_is_the_first_of_all() -> Result<(), SessionError> {
        let mut sam = model(&spec("vision_config", json!({})));
        let mut single = call(&[pixels(1), ("input_boxes", Tensor::new(&[[[1f32, 2., 8., 9.]]], &Device::Cpu)?)]);
        let several = sam.call(&single, &mut Unobserved)?;
        assert_eq!(several["iou_scores"].dims(), [1, 1, 3]);
        single.arguments.insert("multimask_output".into(), json!(false));
        let one = sam.call(&single, &mut Unobserved)?;
        assert_eq!((one["iou_scores"].dims(), one["pred_masks"].dims()), (&[1, 1, 1][..], &[1, 1, 1, 12, 12][..]));
        // no prompt at all is one prompt
        assert_eq!(sam.call(&call(&[pixels(1)]), &mut Unobserved)?["pred_masks"].dims(), [1, 1, 3, 12, 12]);
        Ok(())
    }

    #[test]
    fn cost_is_what_the_blocks_count() -> Result<(), SessionError> {
        for changes in [json!({}), json!({"use_rel_pos": false, "use_abs_pos": false, "qkv_bias": false})] {
            let mut sam = model(&spec("vision_config", changes));
            let points = ("input_points", values("points", &[2, 3, 2, 2]));
            let boxes = ("input_boxes", values("boxes", &[2, 3, 4]));
            let masks = ("input_masks", values("masks", &[1, 1, 12, 12]));
            let embed = Call { method: "get_image_embeddings".into(), ..call(&[pixels(2)]) };
            for call in [
                embed,
                call(&[pixels(2), points.clone()]),
                call(&[pixels(2), points, boxes, masks]),
                call(&[pixels(1)]),
            ] {
                let (outputs, recorded) = roofbench_nn::cost::record(|| sam.call(&call, &mut Unobserved));
                outputs?;
                assert_eq!(sam.cost(&call)?[0].cost.flops, recorded.flops, "{:?}", call.inputs.keys());
            }
        }
        Ok(())
    }

    #[test]
    fn cost_of_a_tiny_encoder_by_hand() {
        // 9 patches of width 8 in 2 heads of 4; the first layer in windows of 4 positions, the second over all 9
        let embeddings = 2 * (9 * 8) * 48 + 9 * 8 + 9 * 8; // pixels of a patch, biases, positions
        let attention = |positions: u64, side: u64| {
            let pairs = 2 * 9 * positions;
            2 * pairs * 4 * 2 + 5 * pairs // two products, softmax
                + 2 * (2 * 9 * 2 * side) * 4 + 2 * pairs // vectors of lines and columns, two added to each score
        };
        let layer = 2 * 7 * 9 * 8 // norms
            + 2 * 9 * 8 * 24 + 9 * 24 // query, key, value
            + 2 * 9 * 8 * 8 + 2 * 9 * 8 // output, residual
            + 2 * 9 * 8 * 32 + 2 * 9 * 32 // up, activation
            + 2 * 9 * 32 * 8 + 2 * 9 * 8; // down, residual
        let neck = 2 * 9 * 8 * 16 + 2 * 9 * 16 * (16 * 9) + 2 * 7 * 9 * 16;
        let cfg = SamConfig::from_spec(&spec("vision_config", json!({}))).expect("a config");
        let flops = vision_cost(&cfg.vision_config, 1, 4).flops;
        assert_eq!(flops, embeddings + attention(4, 2) + attention(9, 3) + 2 * layer + neck);
    }

    #[test]
    fn cost_of_sam_base() {
        let cfg = SamConfig::default();
        let cost = vision_cost(&cfg.vision_config, 1, 4);
        // the image encoder's published 89 670 912 parameters, each read once
        assert_eq!(cost.weight_bytes, 4 * 89_670_912);
        // multiply-adds by hand: products of 4096 tokens, attention over 196 and 4096 keys
        let products = 12 * 12 * 4096 * 768 * 768u64;
        let attention = 2 * 4096 * 768 * (8 * 196 + 4 * 4096u64);
        let ratio = cost.flops as f64 / (2.0 * (products + attention) as f64);
        // patches, neck, relative positions, norms, softmax and GELU are the rest
        assert!((1.0..1.03).contains(&ratio), "{} FLOP, {ratio}", cost.flops);
    }

    #[test]
    fn configs_that_contradict_themselves_name_the_field() {
        let message = |part: &str, changes: Value| {
            SamConfig::from_spec(&spec(part, changes)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(message("vision_config", json!({})), "");
        for (part, changes, start) in [
            ("vision_config", json!({"hidden_size": 9}), "vision_config.hidden_size`: 9 is not a multiple of 2"),
            ("vision_config", json!({"patch_size": 0}), "vision_config.patch_size`: 0 is not in"),
            ("vision_config", json!({"patch_size": 16}), "vision_config.patch_size`: 0 is not in"),
            ("vision_config", json!({"num_pos_feats": 7}), "vision_config.num_pos_feats`: does not fit"),
            ("prompt_encoder_config", json!({"hidden_size": 8}), "prompt_encoder_config.hidden_size`: does not fit"),
            ("prompt_encoder_config", json!({"image_size": 16}), "prompt_encoder_config.image_embedding_size`: does"),
            ("prompt_encoder_config", json!({"num_point_embeddings": 2}), "prompt_encoder_config.num_point_embeddings"),
            ("mask_decoder_config", json!({"num_attention_heads": 3}), "mask_decoder_config.hidden_size`: 16 is not"),
            ("mask_decoder_config", json!({"iou_head_depth": 1}), "mask_decoder_config.iou_head_depth`: 1 is less"),
            ("mask_decoder_config", json!({"hidden_act": "maxout"}), "mask_decoder_config.hidden_act`: activation"),
        ] {
            let found = message(part, changes);
            assert!(found.starts_with(&format!("config.json: `{start}")), "{found}");
        }
        let class = ModelSpec { class: "SamVisionModel".into(), ..spec("vision_config", json!({})) };
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, "SamModel", &HubOptions::from_env());
        let vb = weights.expect("weights").var_builder(DType::F32, &Device::Cpu);
        let error = SamModel::load(&class, vb).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error, "sam: class `SamVisionModel` is not supported; supported: SamModel");
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let cfg = SamConfig::from_spec(&spec("vision_config", json!({}))).expect("a config");
        let message = |call: &Call| Request::read(&cfg, call).err().map(|e| e.to_string()).unwrap_or_default();
        let points = || ("input_points", values("points", &[1, 2, 3, 2]));
        let labels = |shape: &[usize]| ("input_labels", Tensor::zeros(shape, DType::I64, &Device::Cpu).expect("zeros"));
        assert_eq!(message(&call(&[pixels(1), points(), labels(&[1, 2, 3])])), "");
        let embeddings = ("image_embeddings", values("embeddings", &[1, 16, 3, 3]));
        for (inputs, part) in [
            (vec![], "`pixel_values`: is missing"),
            (vec![pixels(1), embeddings.clone()], "`image_embeddings`: is given beside pixel_values"),
            (vec![("pixel_values", values("small", &[1, 3, 8, 12]))], "`pixel_values`: is 8 x 12 pixels"),
            (vec![("image_embeddings", values("e", &[1, 16, 3, 4]))], "expected floats (batch, 16, 3, 3)"),
            (vec![pixels(2), points()], "`input_points`: has shape [1, 2, 3, 2], expected"),
            (vec![pixels(1), labels(&[1, 2, 3])], "`input_labels`: is given without input_points"),
            (vec![pixels(1), points(), labels(&[1, 2])], "`input_labels`: has shape [1, 2]"),
            (vec![pixels(1), points(), ("input_boxes", values("b", &[1, 1, 4]))], "`input_boxes`: has boxes of 1"),
            (vec![pixels(1), ("input_masks", values("m", &[1, 1, 3, 3]))], "expected floats (1 or 1, 1, 12, 12)"),
            (vec![pixels(1), ("attention_similarity", values("s", &[1]))], "`attention_similarity`: is not supported"),
        ] {
            let found = message(&call(&inputs));
            assert!(found.contains(part), "{found}");
        }
        let other = Call { method: "get_prompt_embeddings".into(), ..call(&[points()]) };
        assert!(message(&other).contains("supported: forward, get_image_embeddings"));
    }
}
