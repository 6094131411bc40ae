//! `candle_transformers::models::convnext`, which has timm's names of tensors and the published sizes.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Module, Tensor};
use candle_nn::{Func, VarBuilder};
use candle_transformers::models::convnext as stock;
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use crate::models::HeightWidth;
use crate::models::convnext::{ConvNextConfig, Kind, Pixels, Version, forward_cost};

/// The stock model behind a session.
pub(crate) struct StockConvNext {
    cfg: ConvNextConfig,
    kind: Kind,
    model: Func<'static>,
    spec: ModelSpec,
}

impl StockConvNext {
    /// Loads the class of `spec` from a checkpoint's root, or says why the stock model can't run it.
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (kind, cfg) = (Kind::of(spec)?, ConvNextConfig::from_spec(spec)?);
        let unsupported =
            |reason: &str| SessionError::UnsupportedEngine { family: spec.family.clone(), reason: reason.to_owned() };
        let Some(labels) = kind.labels else {
            return Err(unsupported("candle-transformers has ConvNeXt with a classifier alone"));
        };
        let sizes = match (cfg.depths.as_slice(), cfg.hidden_sizes.as_slice()) {
            ([3, 3, 9, 3], [96, 192, 384, 768]) => stock::Config::tiny(),
            ([3, 3, 27, 3], [96, 192, 384, 768]) => stock::Config::small(),
            ([3, 3, 27, 3], [128, 256, 512, 1024]) => stock::Config::base(),
            ([3, 3, 27, 3], [192, 384, 768, 1536]) => stock::Config::large(),
            ([3, 3, 27, 3], [256, 512, 1024, 2048]) => stock::Config::xlarge(),
            _ => return Err(unsupported("candle-transformers has ConvNeXt from tiny to xlarge alone")),
        };
        let has_scale = cfg.layer_scale_init_value > 0.0 || kind.version == Version::Two;
        let is_published = cfg.patch_size == HeightWidth { height: 4, width: 4 } && cfg.num_channels == 3;
        if !is_published || cfg.hidden_act != Activation::Gelu || !has_scale {
            return Err(unsupported("candle-transformers has patches of 4 x 4 colours, GELU and layer scales alone"));
        }
        let tensors = VarBuilder::from_tensors(tensors(&cfg, kind.version, labels, &vb)?, spec.dtype, &spec.device);
        Ok(Self { model: stock::convnext(&sizes, labels, tensors)?, cfg, kind, spec: spec.clone() })
    }
}

/// The checkpoint's tensors under the names that the stock model asks for. It looks for those of both versions.
fn tensors(cfg: &ConvNextConfig, version: Version, labels: usize, vb: &VarBuilder) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    let mut take = |stock: String, ours: String, weight: &[usize]| -> Result<()> {
        for (name, shape) in [("weight", weight), ("bias", &weight[..1])] {
            tensors.insert(format!("{stock}.{name}"), vb.get(shape, &format!("{ours}.{name}"))?);
        }
        Ok(())
    };
    let prefix = version.prefix();
    let (first, last) = (cfg.hidden_sizes[0], cfg.features());
    take("stem.0".into(), format!("{prefix}.embeddings.patch_embeddings"), &[first, 3, 4, 4])?;
    take("stem.1".into(), format!("{prefix}.embeddings.layernorm"), &[first])?;
    take("head.norm".into(), format!("{prefix}.layernorm"), &[last])?;
    take("head.fc".into(), "classifier".into(), &[labels, last])?;
    let mut of_blocks = Vec::new();
    for (i, (&width, &depth)) in cfg.hidden_sizes.iter().zip(&cfg.depths).enumerate() {
        let ours = format!("{prefix}.encoder.stages.{i}");
        if i > 0 {
            let before = cfg.hidden_sizes[i - 1];
            take(format!("stages.{i}.downsample.0"), format!("{ours}.downsampling_layer.0"), &[before])?;
            take(format!("stages.{i}.downsample.1"), format!("{ours}.downsampling_layer.1"), &[width, before, 2, 2])?;
        }
        for j in 0..depth {
            let (stock, ours) = (format!("stages.{i}.blocks.{j}"), format!("{ours}.layers.{j}"));
            take(format!("{stock}.conv_dw"), format!("{ours}.dwconv"), &[width, 1, 7, 7])?;
            take(format!("{stock}.norm"), format!("{ours}.layernorm"), &[width])?;
            take(format!("{stock}.mlp.fc1"), format!("{ours}.pwconv1"), &[4 * width, width])?;
            take(format!("{stock}.mlp.fc2"), format!("{ours}.pwconv2"), &[width, 4 * width])?;
            of_blocks.push((stock, ours, width));
        }
    }
    for (stock, ours, width) in of_blocks {
        match version {
            Version::One => {
                tensors.insert(format!("{stock}.gamma"), vb.get(width, &format!("{ours}.layer_scale_parameter"))?);
            }
            Version::Two => {
                for name in ["weight", "bias"] {
                    let tensor = vb.get((1, 1, 1, 4 * width), &format!("{ours}.grn.{name}"))?.flatten_all()?;
                    tensors.insert(format!("{stock}.mlp.grn.{name}"), tensor);
                }
            }
        }
    }
    Ok(tensors)
}

impl Session for StockConvNext {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let pixels = Pixels::read(&self.cfg, call)?;
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights, synthetic};
    use serde_json::{Value, json};

    use super::*;
    use crate::models::convnext::{ALIASES, ConvNextModel};

    fn spec(class: &str, config: Value) -> ModelSpec {
        ModelSpec {
            family: "convnext".into(),
            class: class.into(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::CandleTransformers,
        }
    }

    #[test]
    fn both_versions_agree_with_ours() -> Result<(), SessionError> {
        let pixel_values = synthetic::tensor("input:pixel_values", &[1, 3, 32, 32], 0, DType::F32, &Device::Cpu)?;
        let call = Call {
            method: "forward".into(),
            inputs: [("pixel_values".into(), pixel_values)].into(),
            ..Call::default()
        };
        for class in ["ConvNextForImageClassification", "ConvNextV2ForImageClassification"] {
            let spec = spec(class, json!({"num_labels": 7}));
            let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, class, &HubOptions::from_env())?;
            let vb = weights.var_builder(spec.dtype, &spec.device);
            let ours = ConvNextModel::load(&spec, vb.clone())?.call(&call, &mut Unobserved)?;
            let stock = StockConvNext::load(&spec, vb)?.call(&call, &mut Unobserved)?;
            let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            let error = largest(&(&ours["logits"] - &stock["logits"])?)? / largest(&stock["logits"])?;
            // sums of thousands of products, eighteen layers deep
            assert!(error < 1e-4, "{class}: {error}");
        }
        Ok(())
    }

    #[test]
    fn what_it_lacks_is_named() {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], "", &HubOptions::from_env()).expect("weights");
        let message = |class: &str, config: Value| {
            let model = StockConvNext::load(&spec(class, config), weights.var_builder(DType::F32, &Device::Cpu));
            model.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(message("ConvNextModel", json!({})).contains("with a classifier alone"));
        let classifier = "ConvNextForImageClassification";
        assert!(message(classifier, json!({"depths": [1, 1, 1, 1]})).contains("from tiny to xlarge"));
        assert!(message(classifier, json!({"hidden_act": "relu"})).contains("GELU"));
    }
}
