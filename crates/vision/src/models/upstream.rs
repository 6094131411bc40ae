//! The stock models of `candle-transformers` behind our sessions: what anyone on candle runs today, on the same weights
//! and inputs.

use std::collections::BTreeMap;

use candle_nn::{Func, Module, VarBuilder};
use candle_transformers::models::{resnet as stock_resnet, vit as stock};
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use super::resnet::{self, LayerType, Plan, ResNetConfig};
use super::vit::{HeadKind, Pixels, ViTConfig, forward_cost};

pub(crate) mod convnext;
pub(crate) mod dinov2;
pub(crate) mod sam;

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

/// `candle_transformers::models::resnet`, which classifies by the five published shapes.
pub(crate) struct StockResNet {
    plan: Plan,
    kind: resnet::HeadKind,
    model: Func<'static>,
    spec: ModelSpec,
}

impl StockResNet {
    /// Loads the class of `spec` from a checkpoint's root, or says why the stock model can't run it.
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder<'static>) -> Result<Self, SessionError> {
        let (kind, cfg) = (resnet::HeadKind::of(spec)?, ResNetConfig::from_spec(spec)?);
        let unsupported =
            |reason: &str| SessionError::UnsupportedEngine { family: spec.family.clone(), reason: reason.to_owned() };
        let resnet::HeadKind::Classifier { labels } = kind else {
            return Err(unsupported("candle-transformers has ResNetForImageClassification alone"));
        };
        let build = match (cfg.layer_type, cfg.depths.as_slice()) {
            (LayerType::Basic, [2, 2, 2, 2]) => stock_resnet::resnet18,
            (LayerType::Basic, [3, 4, 6, 3]) => stock_resnet::resnet34,
            (LayerType::Bottleneck, [3, 4, 6, 3]) => stock_resnet::resnet50,
            (LayerType::Bottleneck, [3, 4, 23, 3]) => stock_resnet::resnet101,
            (LayerType::Bottleneck, [3, 8, 36, 3]) => stock_resnet::resnet152,
            _ => return Err(unsupported("candle-transformers has ResNet-18, 34, 50, 101 and 152 alone")),
        };
        let published = ResNetConfig {
            hidden_sizes: match cfg.layer_type {
                LayerType::Basic => vec![64, 128, 256, 512],
                LayerType::Bottleneck => vec![256, 512, 1024, 2048],
            },
            layer_type: cfg.layer_type,
            depths: cfg.depths.clone(),
            ..ResNetConfig::default()
        };
        if cfg != published {
            return Err(unsupported("candle-transformers has the published widths, strides and ReLU alone"));
        }
        let model = build(labels, vb.rename_f(library_name))?;
        Ok(Self { plan: cfg.plan(), kind, model, spec: spec.clone() })
    }
}

/// From a tensor's name in torchvision, which the stock model has, to that in `transformers`.
fn library_name(name: &str) -> String {
    let mut parts = name.split('.');
    let mut path = Vec::new();
    let number = |part: &str, prefix: &str| part.strip_prefix(prefix)?.parse::<usize>().ok()?.checked_sub(1);
    let mut in_block = false;
    while let Some(part) = parts.next() {
        if let Some(stage) = number(part, "layer") {
            path.push(format!("resnet.encoder.stages.{stage}.layers"));
            path.extend(parts.next().map(str::to_owned));
            in_block = true;
        } else if let Some(i) = number(part, "conv") {
            path.push(if in_block { format!("layer.{i}") } else { "resnet.embedder.embedder".to_owned() });
            path.push("convolution".to_owned());
        } else if let Some(i) = number(part, "bn") {
            path.push(if in_block { format!("layer.{i}") } else { "resnet.embedder.embedder".to_owned() });
            path.push("normalization".to_owned());
        } else if part == "downsample" {
            path.push("shortcut".to_owned());
            path.push(if parts.next() == Some("0") { "convolution".to_owned() } else { "normalization".to_owned() });
        } else {
            path.push(if part == "fc" { "classifier.1".to_owned() } else { part.to_owned() });
        }
    }
    path.join(".")
}

impl Session for StockResNet {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let pixel_values = resnet::pixel_values(&self.plan, call)?;
        let pixel_values = pixel_values.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        let logits = self.model.forward(&pixel_values)?; // (batch, labels)
        observer.end(Phase::Forward);
        Ok(Tensors::from([("logits".into(), logits)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        resnet::forward_cost(&self.plan, self.kind, resnet::pixel_values(&self.plan, call)?, self.spec.dtype)
    }

    fn paths(&self) -> BTreeMap<String, String> {
        [("all".to_owned(), "candle".to_owned())].into()
    }
}

#[cfg(test)]
mod tests {
    use super::library_name;

    #[test]
    fn names_of_torchvision_become_those_of_transformers() {
        for (stock, ours) in [
            ("conv1.weight", "resnet.embedder.embedder.convolution.weight"),
            ("bn1.running_var", "resnet.embedder.embedder.normalization.running_var"),
            ("layer1.2.conv3.weight", "resnet.encoder.stages.0.layers.2.layer.2.convolution.weight"),
            ("layer4.0.bn1.bias", "resnet.encoder.stages.3.layers.0.layer.0.normalization.bias"),
            ("layer2.0.downsample.0.weight", "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"),
            ("layer2.0.downsample.1.weight", "resnet.encoder.stages.1.layers.0.shortcut.normalization.weight"),
            ("fc.bias", "classifier.1.bias"),
        ] {
            assert_eq!(library_name(stock), ours);
        }
    }
}
