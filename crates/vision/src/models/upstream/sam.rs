//! `candle_transformers::models::segment_anything`, which has the authors' names of tensors and their decoder.
//!
//! It computes what the authors' model does but for the approximation of GELU by tanh where masks are enlarged, and 1e-5
//! in the decoder's norms. It takes points alone: what it makes of boxes has the wrong shape.

use std::collections::BTreeMap;

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::segment_anything::image_encoder::ImageEncoderViT;
use candle_transformers::models::segment_anything::mask_decoder::MaskDecoder;
use candle_transformers::models::segment_anything::prompt_encoder::PromptEncoder;
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use crate::models::sam::{Picture, Prompts, Request, SamConfig, SamMaskDecoderConfig, forward_cost};

/// The stock model behind a session.
pub(crate) struct StockSam {
    cfg: SamConfig,
    image_encoder: ImageEncoderViT,
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    spec: ModelSpec,
}

impl StockSam {
    /// Loads the class of `spec` from a checkpoint's root, or says why the stock model can't run it.
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let cfg = SamConfig::from_spec(spec)?;
        let unsupported =
            |reason: &str| SessionError::UnsupportedEngine { family: spec.family.clone(), reason: reason.to_owned() };
        let (vision, prompt, decoder) = (&cfg.vision_config, &cfg.prompt_encoder_config, &cfg.mask_decoder_config);
        if spec.dtype != DType::F32 {
            return Err(unsupported("candle-transformers has relative positions in f32 alone"));
        }
        if (vision.mlp_dim(), vision.hidden_act) != (4 * vision.hidden_size, Activation::Gelu) {
            return Err(unsupported("candle-transformers has GELU layers four times as wide inside alone"));
        }
        // of the decoder these may differ
        let published = SamMaskDecoderConfig {
            hidden_size: decoder.hidden_size,
            num_multimask_outputs: decoder.num_multimask_outputs,
            iou_head_hidden_dim: decoder.iou_head_hidden_dim,
            layer_norm_eps: decoder.layer_norm_eps,
            ..Default::default()
        };
        if *decoder != published {
            return Err(unsupported("candle-transformers has the published decoder alone"));
        }
        let vb = vb.rename_f(library_name);
        let (grid, size) = (vision.grid(), prompt.image_size);
        let image_encoder = ImageEncoderViT::new(
            vision.image_size,
            vision.patch_size,
            vision.num_channels,
            vision.hidden_size,
            vision.num_hidden_layers,
            vision.num_attention_heads,
            vision.output_channels,
            vision.qkv_bias,
            vision.use_rel_pos,
            vision.use_abs_pos,
            vision.window_size,
            &vision.global_attn_indexes,
            vb.pp("image_encoder"),
        )?;
        let (width, channels) = (prompt.hidden_size, prompt.mask_input_channels);
        let prompt_encoder = PromptEncoder::new(width, (grid, grid), (size, size), channels, vb.pp("prompt_encoder"))?;
        let mask_decoder = MaskDecoder::new(
            decoder.hidden_size,
            decoder.num_multimask_outputs,
            decoder.iou_head_depth,
            decoder.iou_head_hidden_dim,
            vb.pp("mask_decoder"),
        )?;
        Ok(Self { cfg, image_encoder, prompt_encoder, mask_decoder, spec: spec.clone() })
    }

    /// Embeddings (batch, channels, rows, columns) of pictures one after the other.
    fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let pixels = pixels.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        let of_item = |item: usize| self.image_encoder.forward(&pixels.narrow(0, item, 1)?);
        Tensor::cat(&(0..pixels.dim(0)?).map(of_item).collect::<Result<Vec<_>>>()?, 0)
    }

    /// Masks (prompts, masks, height, width) and their scores (prompts, masks) for the points of picture `item`.
    fn segment(&self, embedding: &Tensor, prompts: &Prompts, item: usize) -> Result<(Tensor, Tensor), SessionError> {
        let points = match (&prompts.points, &prompts.boxes, &prompts.masks) {
            (Some(points), None, None) if !points.labels.contains(&-10) => points,
            _ => {
                let reason = "candle-transformers takes points of labels 1, 0 and -1 alone, no boxes and no masks";
                return Err(SessionError::input("input_points", reason));
            }
        };
        let (of_item, device) = (prompts.each * points.each, embedding.device());
        let range = item * of_item..(item + 1) * of_item;
        let places: Vec<f32> = points.places[range.clone()].iter().flatten().map(|at| *at as f32).collect();
        let labels: Vec<f32> = points.labels[range].iter().map(|label| *label as f32).collect();
        let places = Tensor::from_vec(places, (prompts.each, points.each, 2), device)?;
        let labels = Tensor::from_vec(labels, (prompts.each, points.each), device)?;
        let (sparse, dense) = self.prompt_encoder.forward(Some((&places, &labels)), None, None)?;
        let positions = self.prompt_encoder.get_dense_pe()?;
        Ok(self.mask_decoder.forward(embedding, &positions, &sparse, &dense, prompts.multimask)?)
    }
}

/// From a tensor's name in the authors' model, which the stock model has, to that in `transformers`.
fn library_name(name: &str) -> String {
    const PARTS: [(&str, &str); 18] = [
        ("image_encoder.", "vision_encoder."),
        ("patch_embed.proj.", "patch_embed.projection."),
        ("blocks.", "layers."),
        (".norm", ".layer_norm"),
        ("neck.0.", "neck.conv1."),
        ("neck.1.", "neck.layer_norm1."),
        ("neck.2.", "neck.conv2."),
        ("neck.3.", "neck.layer_norm2."),
        ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
        ("point_embeddings.", "point_embed."),
        ("mask_downscaling.0.", "mask_embed.conv1."),
        ("mask_downscaling.1.", "mask_embed.layer_norm1."),
        ("mask_downscaling.3.", "mask_embed.conv2."),
        ("mask_downscaling.4.", "mask_embed.layer_norm2."),
        ("mask_downscaling.6.", "mask_embed.conv3."),
        ("output_upscaling.0.", "upscale_conv1."),
        ("output_upscaling.1.", "upscale_layer_norm."),
        ("output_upscaling.3.", "upscale_conv2."),
    ];
    // of the heads: replaced in this order, no name is replaced twice
    const OF_HEADS: [(&str, &str); 3] =
        [(".layers.0.", ".proj_in."), (".layers.1.", ".layers.0."), (".layers.2.", ".proj_out.")];
    let is_head = name.contains("iou_prediction_head.") || name.contains("output_hypernetworks_mlps.");
    let parts = if is_head { &OF_HEADS[..] } else { &PARTS };
    parts.iter().fold(name.to_owned(), |name, (stock, ours)| name.replace(stock, ours))
}

impl Session for StockSam {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let (embeddings, prompts) = match Request::read(&self.cfg, call)? {
            Request::Embed(pixels) => {
                let embeddings = self.embed(pixels)?;
                observer.end(Phase::Forward);
                return Ok([("image_embeddings".to_owned(), embeddings)].into());
            }
            Request::Segment(Picture::Pixels(pixels), prompts) => (self.embed(pixels)?, prompts),
            Request::Segment(Picture::Embeddings(embeddings), prompts) => {
                (embeddings.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?, prompts)
            }
        };
        let of_item = |item: usize| self.segment(&embeddings.narrow(0, item, 1)?, &prompts, item);
        let items = (0..prompts.batch).map(of_item).collect::<Result<Vec<_>, SessionError>>()?;
        let (masks, scores): (Vec<Tensor>, Vec<Tensor>) = items.into_iter().unzip();
        let (pred_masks, iou_scores) = (Tensor::stack(&masks, 0)?, Tensor::stack(&scores, 0)?);
        observer.end(Phase::Forward);
        Ok([("iou_scores".to_owned(), iou_scores), ("pred_masks".to_owned(), pred_masks)].into())
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, &Request::read(&self.cfg, call)?, self.spec.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_owned(), "candle".to_owned())].into()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;
    use crate::models::sam::{ALIASES, SamModel};

    fn spec(decoder: Value) -> ModelSpec {
        let mut config = json!({
            "vision_config": {
                "hidden_size": 16, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 40, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16,
            },
            "prompt_encoder_config": {
                "hidden_size": 32, "image_size": 40, "patch_size": 8, "mask_input_channels": 8,
            },
            "mask_decoder_config": {"hidden_size": 32, "iou_head_hidden_dim": 12, "layer_norm_eps": 1e-5},
        });
        for (field, value) in decoder.as_object().into_iter().flatten() {
            config["mask_decoder_config"][field] = value.clone();
        }
        ModelSpec { engine: Engine::CandleTransformers, ..ModelSpec::new("sam", "SamModel", config) }
    }

    #[test]
    fn it_agrees_with_ours() -> Result<(), SessionError> {
        let values = |name: &str, shape: &[usize]| synthetic::tensor(name, shape, 0, DType::F32, &Device::Cpu);
        let pixels = values("input:pixel_values", &[2, 3, 40, 40])?;
        let points = ((values("input:points", &[2, 3, 2, 2])? + 1.0)? * 20.0)?;
        let labels = Tensor::new(&[1i64, 0, 1, 1, -1, 1, 0, 1, 1, 1, 1, -1], &Device::Cpu)?.reshape((2, 3, 2))?;
        let inputs = [("pixel_values", pixels), ("input_points", points), ("input_labels", labels)];
        let mut call = Call {
            method: "forward".into(),
            inputs: inputs.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect(),
            ..Call::default()
        };
        let spec = spec(json!({}));
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, &spec.class, &HubOptions::from_env())?;
        let vb = weights.var_builder(spec.dtype, &spec.device);
        let (mut ours, mut stock) = (SamModel::load(&spec, vb.clone())?, StockSam::load(&spec, vb)?);
        let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        for several in [true, false] {
            call.arguments.insert("multimask_output".to_owned(), several.into());
            let (ours, stock) = (ours.call(&call, &mut Unobserved)?, stock.call(&call, &mut Unobserved)?);
            for (name, stock) in &stock {
                assert_eq!(stock.dims(), ours[name].dims(), "{name}");
                let error = largest(&(&ours[name] - stock)?)? / largest(stock)?;
                // GELU as it is approximated differs by up to 5e-4
                assert!(error < 2e-3, "{name}: {error}");
            }
        }
        let boxes = ("input_boxes".to_owned(), values("input:boxes", &[2, 3, 4])?);
        call.inputs.extend([boxes]);
        let error = stock.call(&call, &mut Unobserved).expect_err("refused").to_string();
        assert!(error.contains("no boxes"), "{error}");
        Ok(())
    }

    #[test]
    fn what_it_lacks_is_named() {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], "", &HubOptions::from_env()).expect("weights");
        let load = |spec: &ModelSpec| {
            let model = StockSam::load(spec, weights.var_builder(DType::F32, &Device::Cpu));
            model.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(load(&spec(json!({"num_hidden_layers": 3}))).contains("published decoder"));
        assert!(load(&ModelSpec { dtype: DType::BF16, ..spec(json!({})) }).contains("f32 alone"));
    }
}
