//! `candle_transformers::models::dinov2`, which has the authors' names of tensors and their sizes.
//!
//! It computes what the authors' model does but for details: the approximation of GELU by tanh, 1e-5 in the norms, and
//! the nearest learned position in place of bicubic interpolation where pictures are not 518 pixels wide.

use std::collections::{BTreeMap, HashMap};

use candle_core::{D, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::dinov2 as stock;
use roofbench_core::cost::PhaseCost;
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_nn::activation::Activation;

use crate::models::HeightWidth;
use crate::models::dinov2::{Dinov2Config, Pixels, forward_cost, has_registers, head_labels};

/// Labels of its head, and the sizes that it has.
const LABELS: usize = 1000;
const IMAGE: HeightWidth = HeightWidth { height: 518, width: 518 };
const PATCH: HeightWidth = HeightWidth { height: 14, width: 14 };

/// The stock model behind a session. Of the base class it gives the class token, `pooler_output`, alone.
pub(crate) struct StockDinov2 {
    cfg: Dinov2Config,
    labels: Option<usize>,
    model: stock::DinoVisionTransformer,
    spec: ModelSpec,
}

impl StockDinov2 {
    /// Loads the class of `spec` from a checkpoint's root, or says why the stock model can't run it.
    pub(crate) fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let (labels, cfg) = (head_labels(spec)?, Dinov2Config::from_spec(spec)?);
        let unsupported =
            |reason: &str| SessionError::UnsupportedEngine { family: spec.family.clone(), reason: reason.to_owned() };
        if has_registers(&spec.class) {
            return Err(unsupported("candle-transformers has registers for one classifier of plants alone"));
        }
        let is_gelu = matches!(cfg.hidden_act, Activation::Gelu | Activation::GeluTanh);
        let is_published = (cfg.image_size, cfg.patch_size(), cfg.num_channels) == (IMAGE, PATCH, 3)
            && (cfg.mlp_ratio, cfg.use_swiglu_ffn, cfg.qkv_bias) == (4.0, false, true)
            && cfg.head_dim() * cfg.num_attention_heads == cfg.hidden_size;
        if !is_published || !is_gelu {
            return Err(unsupported(
                "candle-transformers has patches of 14 x 14 colours learned at 518 pixels and plain GELU layers alone",
            ));
        }
        match labels {
            Some(labels) if labels != LABELS => {
                return Err(unsupported("candle-transformers has a head of 1000 labels alone"));
            }
            None if cfg.hidden_size > LABELS => {
                return Err(unsupported("candle-transformers gives 1000 numbers at most, and the features are more"));
            }
            _ => {}
        }
        let tensors = VarBuilder::from_tensors(tensors(&cfg, labels, &vb)?, spec.dtype, &spec.device);
        let (depth, width, heads) = (cfg.num_hidden_layers, cfg.hidden_size, cfg.num_attention_heads);
        let model = stock::DinoVisionTransformer::new(tensors, depth, width, heads)?;
        Ok(Self { cfg, labels, model, spec: spec.clone() })
    }
}

/// The checkpoint's tensors under the names that the stock model asks for. The head of a base class passes the class token
/// on.
fn tensors(cfg: &Dinov2Config, labels: Option<usize>, vb: &VarBuilder) -> Result<HashMap<String, Tensor>> {
    let base = if labels.is_some() { vb.pp("dinov2") } else { vb.clone() };
    let (hidden, patch) = (cfg.hidden_size, cfg.patch_size());
    let positions = 1 + (cfg.image_size.height / patch.height) * (cfg.image_size.width / patch.width);
    let mut tensors = HashMap::new();
    let embeddings = base.pp("embeddings");
    if cfg.use_mask_token {
        embeddings.get((1, hidden), "mask_token")?; // of the checkpoint, and without use here
    }
    tensors.insert("cls_token".to_owned(), embeddings.get((1, 1, hidden), "cls_token")?);
    tensors.insert("pos_embed".to_owned(), embeddings.get((1, positions, hidden), "position_embeddings")?);
    let mut take = |stock: &str, ours: VarBuilder, weight: &[usize]| -> Result<()> {
        tensors.insert(format!("{stock}.weight"), ours.get(weight, "weight")?);
        tensors.insert(format!("{stock}.bias"), ours.get(weight[0], "bias")?);
        Ok(())
    };
    let projection = embeddings.pp("patch_embeddings.projection");
    take("patch_embed.proj", projection, &[hidden, cfg.num_channels, patch.height, patch.width])?;
    take("norm", base.pp("layernorm"), &[hidden])?;
    let mut joined = Vec::new();
    for i in 0..cfg.num_hidden_layers {
        let (stock, ours) = (format!("blocks.{i}"), base.pp(format!("encoder.layer.{i}")));
        for (stock_name, name, shape) in [
            ("norm1", "norm1", &[hidden][..]),
            ("norm2", "norm2", &[hidden]),
            ("attn.proj", "attention.output.dense", &[hidden, hidden]),
            ("mlp.fc1", "mlp.fc1", &[4 * hidden, hidden]),
            ("mlp.fc2", "mlp.fc2", &[hidden, 4 * hidden]),
        ] {
            take(&format!("{stock}.{stock_name}"), ours.pp(name), shape)?;
        }
        for (name, shape) in [("weight", &[hidden, hidden][..]), ("bias", &[hidden])] {
            let part = |part: &str| ours.get(shape, &format!("attention.attention.{part}.{name}"));
            let parts = [part("query")?, part("key")?, part("value")?];
            joined.push((format!("{stock}.attn.qkv.{name}"), Tensor::cat(&parts, 0)?));
        }
        for scale in [1, 2] {
            let lambda = ours.get(hidden, &format!("layer_scale{scale}.lambda1"))?;
            joined.push((format!("{stock}.ls{scale}.gamma"), lambda));
        }
    }
    if labels.is_some() {
        take("head", vb.pp("classifier"), &[LABELS, 2 * hidden])?;
    } else {
        let (dtype, device) = (vb.dtype(), vb.device());
        let class_token = Tensor::eye(hidden, dtype, device)?.pad_with_zeros(0, 0, LABELS - hidden)?;
        joined.push(("head.weight".to_owned(), class_token.pad_with_zeros(1, 0, hidden)?));
        joined.push(("head.bias".to_owned(), Tensor::zeros(LABELS, dtype, device)?));
    }
    tensors.extend(joined);
    Ok(tensors)
}

impl Session for StockDinov2 {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let pixels = Pixels::read(&self.cfg, self.labels, call)?;
        let (batch, _, height, width) = pixels.values.dims4()?;
        if pixels.masked.is_some() {
            return Err(SessionError::input("bool_masked_pos", "candle-transformers has no mask token"));
        }
        if height != width || height % PATCH.height != 0 {
            let reason = format!("is {height} x {width} pixels; candle-transformers needs squares of whole patches");
            return Err(SessionError::input("pixel_values", reason));
        }
        let pixel_values = pixels.values.to_device(&self.spec.device)?.to_dtype(self.spec.dtype)?;
        // its class token has no batch
        let of_item = |item: usize| self.model.forward(&pixel_values.narrow(0, item, 1)?);
        let given = Tensor::cat(&(0..batch).map(of_item).collect::<Result<Vec<_>>>()?, 0)?; // (batch, LABELS)
        let (name, given) = match self.labels {
            Some(_) => ("logits", given),
            None => ("pooler_output", given.narrow(D::Minus1, 0, self.cfg.hidden_size)?),
        };
        observer.end(Phase::Forward);
        Ok(Tensors::from([(name.to_owned(), given)]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        forward_cost(&self.cfg, self.labels, &Pixels::read(&self.cfg, self.labels, call)?, self.spec.dtype)
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
    use crate::models::dinov2::{ALIASES, Dinov2Model};

    fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14,
            // as the stock model computes
            "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "num_labels": 1000,
        });
        for (field, value) in changes.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        ModelSpec { engine: Engine::CandleTransformers, ..ModelSpec::new("dinov2", class, config) }
    }

    #[test]
    fn it_agrees_with_ours() -> Result<(), SessionError> {
        let pixel_values = synthetic::tensor("input:pixel_values", &[2, 3, 518, 518], 0, DType::F32, &Device::Cpu)?;
        let call = Call {
            method: "forward".into(),
            inputs: [("pixel_values".into(), pixel_values)].into(),
            ..Call::default()
        };
        for class in ["Dinov2Model", "Dinov2ForImageClassification"] {
            let spec = spec(class, json!({}));
            let weights = Weights::open(&Source::Synthetic { seed: 0 }, ALIASES, class, &HubOptions::from_env())?;
            let vb = weights.var_builder(spec.dtype, &spec.device);
            let ours = Dinov2Model::load(&spec, vb.clone())?.call(&call, &mut Unobserved)?;
            let stock = StockDinov2::load(&spec, vb)?.call(&call, &mut Unobserved)?;
            let (name, stock) = stock.first_key_value().expect("an output");
            let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            let error = largest(&(&ours[name] - stock)?)? / largest(stock)?;
            assert!(error < 1e-4, "{class}: {error}");
        }
        Ok(())
    }

    #[test]
    fn what_it_lacks_is_named() {
        let weights = Weights::open(&Source::Synthetic { seed: 0 }, &[], "", &HubOptions::from_env()).expect("weights");
        let message = |class: &str, changes: Value| {
            let model = StockDinov2::load(&spec(class, changes), weights.var_builder(DType::F32, &Device::Cpu));
            model.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(message("Dinov2WithRegistersModel", json!({})).contains("registers"));
        assert!(message("Dinov2Model", json!({"use_swiglu_ffn": true})).contains("plain GELU"));
        assert!(message("Dinov2Model", json!({"hidden_size": 1024})).contains("1000 numbers"));
        assert!(message("Dinov2ForImageClassification", json!({"num_labels": 7})).contains("1000 labels"));
    }
}
