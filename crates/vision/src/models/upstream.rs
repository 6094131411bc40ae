//! The stock models of `candle-transformers` behind our sessions: what anyone on candle runs today, on the same weights
//! and inputs.

use std::collections::BTreeMap;

use candle_nn::VarBuilder;
use candle_transformers::models::vit as stock;
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use super::vit::{HeadKind, Pixels, ViTConfig, forward_cost};

/// Why `candle_transformers` runs no checkpoint of `family` as it is on the Hub: its models are for those of the authors'
/// repositories.
pub(crate) fn other_names(family: &str) -> SessionError {
    let reason = "candle-transformers reads the authors' own checkpoints, whose tensors and sizes are not those of \
                  transformers; run it without --engine";
    SessionError::UnsupportedEngine { family: family.to_owned(), reason: reason.to_owned() }
}

/// `candle_transformers::models::vit`, which classifies pictures of one square size.
pub(crate) struct StockViT {
    cfg: ViTConfig,
    kind: HeadKind,
    model: stock::Model,
    spec: ModelSpec,
}

impl StockViT {
    /// Loads the class of `spec` from a checkpoint's root, or says why the stock model can't run it.
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (HeadKind::of(spec)?, ViTConfig::from_spec(spec)?);
        let unsupported = |reason: String| SessionError::UnsupportedEngine { family: spec.family.clone(), reason };
        let HeadKind::Classifier { labels } = kind else {
            return Err(unsupported(format!(
                "candle-transformers has ViTForImageClassification alone, not {}",
                spec.class
            )));
        };
        let square = |field: &str, size: super::HeightWidth| {
            if size.height == size.width {
                return Ok(size.height);
            }
            Err(unsupported(format!(
                "candle-transformers needs a square {field}, not {} x {}",
                size.height, size.width
            )))
        };
        let hidden_act = match cfg.hidden_act {
            Activation::Gelu => candle_nn::Activation::Gelu,
            Activation::GeluTanh => candle_nn::Activation::NewGelu,
            Activation::Relu => candle_nn::Activation::Relu,
            Activation::Silu => candle_nn::Activation::Silu,
            Activation::Sigmoid => candle_nn::Activation::Sigmoid,
            other => return Err(unsupported(format!("candle-transformers has no activation like {other:?}"))),
        };
        let stock_config = stock::Config {
            hidden_size: cfg.hidden_size,
            num_hidden_layers: cfg.num_hidden_layers,
            num_attention_heads: cfg.num_attention_heads,
            intermediate_size: cfg.intermediate_size,
            hidden_act,
            layer_norm_eps: cfg.layer_norm_eps,
            image_size: square("image_size", cfg.image_size)?,
            patch_size: square("patch_size", cfg.patch_size)?,
            num_channels: cfg.num_channels,
            qkv_bias: cfg.qkv_bias,
        };
        Ok(Self { model: stock::Model::new(&stock_config, labels, vb)?, cfg, kind, spec: spec.clone() })
    }
}

impl Session for StockViT {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let pixels = Pixels::read(&self.cfg, call)?;
        if pixels.size != self.cfg.image_size {
            let reason = "candle-transformers can't interpolate positions; give pictures of image_size";
            return Err(SessionError::input("interpolate_pos_encoding", reason));
        }
        let pixel_values = pixels.values.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        let logits = self.model.forward(&pixel_values)?; // (batch, labels)
        observer.end(Phase::Forward);
        Ok(Tensors::from([("logits".into(), logits)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, self.kind, &Pixels::read(&self.cfg, call)?, self.spec.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_owned(), "candle".to_owned())].into()
    }
}
