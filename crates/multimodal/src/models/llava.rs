//! LLaVA: patches of pictures, as CLIP sees them, put among the tokens of Llama or Mistral by a projector of two layers.
//! Source: LLaVA-1.5 (arXiv:2310.03744). Mirrors `transformers.LlavaForConditionalGeneration`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::activation::Activation;
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use roofbench_nn::mlp::Mlp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::behind;
use super::language_model::{LanguageModel, Prompt, TextConfig};
use super::vision_tower::{Form, Pixels, VisionTower, VisionTowerConfig};

/// The classes that run.
pub const CLASSES: &[&str] = &["LlavaForConditionalGeneration"];

/// From names in published checkpoints to those of the class; the last is for a tied output matrix.
const RULES: &[AliasRule] = &[
    AliasRule::rename(r"^vision_tower\.vision_model\.", "vision_tower.", AliasScope::Always),
    // the module's own names, should a file have been saved by them
    AliasRule::rename(r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.", AliasScope::Always),
    AliasRule::rename(r"^model\.language_model\.", "language_model.model.", AliasScope::Always),
    AliasRule::rename(r"^model\.multi_modal_projector\.", "multi_modal_projector.", AliasScope::Always),
    AliasRule::rename(r"^lm_head\.", "language_model.lm_head.", AliasScope::Always),
    // buffers of early checkpoints, which follow from the config
    AliasRule::drop(r"\.rotary_emb\.inv_freq$", AliasScope::Always),
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
    AliasRule::drop(r"^language_model\.lm_head\.weight$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    if is_tied(spec) { RULES } else { &RULES[..RULES.len() - 1] }
}

/// The output matrix is that of the embeddings: says so config.json, or its `text_config`.
fn is_tied(spec: &ModelSpec) -> bool {
    let places = [Some(&spec.config), spec.config.get("text_config")];
    places.into_iter().flatten().any(|place| place.get("tie_word_embeddings") == Some(&true.into()))
}

/// Which rows of a picture's states are its features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The patches.
    Default,
    /// The class token as well.
    Full,
}

/// Behind which layers of the tower features are taken; from the last where negative.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected the number of a layer or a list of them")]
pub enum Layers {
    /// Of one layer.
    One(i64),
    /// Of several, side by side.
    Many(Vec<i64>),
}

impl Layers {
    fn numbers(&self) -> &[i64] {
        match self {
            Self::One(layer) => std::slice::from_ref(layer),
            Self::Many(layers) => layers,
        }
    }

    /// As many layers as lie before each, of `layers`; the number that is none of these is the error.
    fn depths(&self, layers: usize) -> Result<Vec<usize>, i64> {
        let states = layers as i64 + 1; // what the first layer gets is one of them
        let depth = |number: &i64| match if *number < 0 { number + states } else { *number } {
            depth if (0..states).contains(&depth) => Ok(depth as usize),
            _ => Err(*number),
        };
        self.numbers().iter().map(depth).collect()
    }
}

/// The fields of config.json beside those of its parts; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
struct Fields {
    image_token_index: Option<i64>,
    /// Another name of the same.
    image_token_id: Option<i64>,
    #[serde(default = "defaults::projector_hidden_act")]
    projector_hidden_act: Activation,
    #[serde(default = "defaults::vision_feature_select_strategy")]
    vision_feature_select_strategy: Strategy,
    #[serde(default = "defaults::vision_feature_layer")]
    vision_feature_layer: Layers,
    #[serde(default = "defaults::multimodal_projector_bias")]
    multimodal_projector_bias: bool,
}

/// What `transformers.LlavaConfig` takes for fields that files leave out.
mod defaults {
    use roofbench_nn::activation::Activation;

    use super::{Layers, Strategy};

    pub(super) const IMAGE_TOKEN_INDEX: i64 = 32_000;

    pub(super) fn projector_hidden_act() -> Activation {
        Activation::Gelu
    }
    pub(super) fn vision_feature_select_strategy() -> Strategy {
        Strategy::Default
    }
    pub(super) fn vision_feature_layer() -> Layers {
        Layers::One(-2)
    }
    pub(super) fn multimodal_projector_bias() -> bool {
        true
    }
}

/// The parts of config.json.
#[derive(Debug, Clone)]
pub struct LlavaConfig {
    /// Of the vision tower.
    pub vision_config: VisionTowerConfig,
    /// Of the language model.
    pub text_config: TextConfig,
    /// The token in whose places features stand.
    pub image_token_index: i64,
    /// Activation between the projector's layers.
    pub projector_hidden_act: Activation,
    /// Which rows are features, unless the call says.
    pub vision_feature_select_strategy: Strategy,
    /// Behind which layers they are taken, unless the call says.
    pub vision_feature_layer: Layers,
    /// The projector's layers have biases.
    pub multimodal_projector_bias: bool,
}

impl LlavaConfig {
    /// Reads and checks config.json.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let fields: Fields = spec.parse_config()?;
        let vision_config = config::nested(spec, "vision_config", |part| {
            config::refuse_unless(part, "model_type", &["clip_vision_model".into()])?;
            match spec.config.get("vision_config") {
                None | Some(Value::Null) => VisionTowerConfig::from_spec(&with_tower_sizes(part), Form::Clip),
                Some(_) => VisionTowerConfig::from_spec(part, Form::Clip),
            }
        })?;
        let mut text_config = TextConfig::from_spec(spec, &["llama", "mistral"])?;
        if let TextConfig::Llama(cfg) = &mut text_config {
            cfg.tie_word_embeddings = is_tied(spec);
        }
        let cfg = Self {
            vision_config,
            text_config,
            image_token_index: (fields.image_token_index.or(fields.image_token_id))
                .unwrap_or(defaults::IMAGE_TOKEN_INDEX),
            projector_hidden_act: fields.projector_hidden_act,
            vision_feature_select_strategy: fields.vision_feature_select_strategy,
            vision_feature_layer: fields.vision_feature_layer,
            multimodal_projector_bias: fields.multimodal_projector_bias,
        };
        match cfg.depths(&cfg.vision_feature_layer) {
            Ok(_) => Ok(cfg),
            Err(reason) => Err(config::invalid("vision_feature_layer", reason)),
        }
    }

    fn depths(&self, layers: &Layers) -> Result<Vec<usize>, String> {
        let most = self.vision_config.num_hidden_layers;
        match layers.depths(most) {
            Ok(depths) if depths.is_empty() => Err("holds no layer".to_owned()),
            Ok(depths) => Ok(depths),
            Err(number) => Err(format!("{number} is no layer of {most}")),
        }
    }

    /// Widths of the projector's input and output.
    fn projector(&self) -> [usize; 2] {
        [self.vision_config.hidden_size * self.vision_feature_layer.numbers().len(), self.text_config.width()]
    }

    /// FLOPs and bytes of the features of pictures: in the tower, and in the projector.
    fn features_cost(&self, features: &Features, bytes: u64) -> [Cost; 2] {
        let (rows, bias) = (features.rows(), self.multimodal_projector_bias);
        let [from, width] = self.projector().map(|size| size as u64);
        let layers = features.depths.iter().copied().max().unwrap_or(0);
        let projector = cost::linear(rows, from, width, bias, bytes)
            + cost::elementwise(rows * width, 1) // the activation, one whichever it is
            + cost::linear(rows, width, width, bias, bytes);
        [self.vision_config.cost(&features.pixels, layers, None, bytes), projector]
    }
}

/// `part` with what `transformers.LlavaConfig` has for a tower that config.json leaves out.
fn with_tower_sizes(part: &ModelSpec) -> ModelSpec {
    let sizes = [
        ("intermediate_size", 4096.into()),
        ("hidden_size", 1024.into()),
        ("patch_size", 14.into()),
        ("image_size", 336.into()),
        ("num_hidden_layers", 24.into()),
        ("num_attention_heads", 16.into()),
    ];
    config::with_defaults(part, &sizes)
}

/// The pictures of a call, and what of their states is used.
struct Features<'a> {
    pixels: Pixels<'a>,
    /// As many layers as lie before each of the states.
    depths: Vec<usize>,
    strategy: Strategy,
}

impl<'a> Features<'a> {
    fn read(cfg: &LlavaConfig, call: &Call, inputs: &Inputs<'a>) -> Result<Self, SessionError> {
        let layers = argument(call, ARGUMENTS[0])?.unwrap_or_else(|| cfg.vision_feature_layer.clone());
        let depths = cfg.depths(&layers).map_err(|reason| SessionError::input(ARGUMENTS[0], reason))?;
        let expected = cfg.vision_feature_layer.numbers().len();
        if depths.len() != expected {
            let reason = format!("names {} layers, the projector takes {expected}", depths.len());
            return Err(SessionError::input(ARGUMENTS[0], reason));
        }
        let strategy = argument(call, ARGUMENTS[1])?.unwrap_or(cfg.vision_feature_select_strategy);
        Ok(Self { pixels: Pixels::read(&cfg.vision_config, inputs)?, depths, strategy })
    }

    /// Features of all pictures.
    fn rows(&self) -> u64 {
        let [pictures, tokens] = self.pixels.shape();
        pictures * (tokens - u64::from(self.strategy == Strategy::Default))
    }
}

/// Arguments of the class's own.
const ARGUMENTS: [&str; 2] = ["vision_feature_layer", "vision_feature_select_strategy"];

fn argument<T: DeserializeOwned>(call: &Call, name: &str) -> Result<Option<T>, SessionError> {
    match call.arguments.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let read = serde_json::from_value(value.clone());
            read.map(Some).map_err(|error| SessionError::input(name, format!("is {value}: {error}")))
        }
    }
}

/// A call, checked.
struct Request<'a> {
    features: Option<Features<'a>>,
    prompt: Prompt,
    /// Of a call of `generate`.
    generation: Option<Generation>,
}

/// `LlavaForConditionalGeneration`.
pub struct LlavaModel {
    cfg: LlavaConfig,
    /// Its config.json says the token ids that the language model's class has.
    spec: ModelSpec,
    vision_tower: VisionTower,
    multi_modal_projector: Mlp,
    language_model: LanguageModel,
    bytes: u64,
}

impl LlavaModel {
    /// Loads the model of `spec` from a checkpoint's root.
    ///
    /// # Errors
    /// As for [`LlavaConfig::from_spec`], and when a tensor is missing or has another shape.
    pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = LlavaConfig::from_spec(spec)?;
        let ([from, width], bias, projector) =
            (cfg.projector(), cfg.multimodal_projector_bias, vb.pp("multi_modal_projector"));
        let linear_1 = Linear::load(from, width, bias, projector.pp("linear_1"))?;
        let linear_2 = Linear::load(width, width, bias, projector.pp("linear_2"))?;
        let mut spec = spec.clone();
        let text_config = cfg.text_config.with_tokens(&spec);
        if let Some(fields) = spec.config.as_object_mut() {
            fields.insert("text_config".to_owned(), text_config);
        }
        Ok(Self {
            vision_tower: VisionTower::load(&cfg.vision_config, None, vb.pp("vision_tower"))?,
            multi_modal_projector: Mlp::new(linear_1, cfg.projector_hidden_act, linear_2)?,
            language_model: LanguageModel::load(&cfg.text_config, vb.pp("language_model"))?,
            bytes: spec.dtype.size_in_bytes() as u64,
            cfg,
            spec,
        })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Request<'a>, SessionError> {
        let known = ["input_ids", "pixel_values", "attention_mask", "position_ids"];
        let inputs = match call.method.as_str() {
            "forward" => Inputs::forward(call, &known, &[ARGUMENTS[0], ARGUMENTS[1], "use_cache"])?,
            "generate" => Inputs::of_any_method(call, &known[..3])?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let prompt = self.language_model.read(&inputs)?;
        let prompt = prompt.ok_or_else(|| SessionError::input("input_ids", "is missing"))?;
        let with_pictures = call.inputs.contains_key("pixel_values");
        let features = with_pictures.then(|| Features::read(&self.cfg, call, &inputs)).transpose()?;
        if let Some(features) = &features {
            prompt.check_places(self.cfg.image_token_index, features.rows())?;
        }
        let generation = || self.language_model.generation(&self.spec, call, &prompt, &ARGUMENTS);
        let generation = (call.method == "generate").then(generation).transpose()?;
        Ok(Request { features, prompt, generation })
    }

    /// The features of pictures: (features, width).
    fn see(&self, features: &Features, observer: &mut dyn Observer) -> Result<Tensor> {
        let states = self.vision_tower.hidden_states(&features.pixels, &features.depths)?;
        observer.end(Phase::Vision);
        let mut x = Tensor::cat(&states, 2)?; // (pictures, 1 + patches, layers * hidden)
        if features.strategy == Strategy::Default {
            x = x.narrow(1, 1, x.dim(1)? - 1)?;
        }
        let x = self.multi_modal_projector.forward(&x)?.flatten_to(1)?;
        observer.end(Phase::Projector);
        Ok(x)
    }
}

impl Session for LlavaModel {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let Request { features, prompt, generation } = self.read(call)?;
        let mut outputs = Tensors::new();
        let features = features.map(|features| self.see(&features, observer)).transpose()?;
        let mut x = self.language_model.embed(&prompt.input_ids)?; // (batch, seq, width)
        if let Some(features) = features {
            x = prompt.put(&x, self.cfg.image_token_index, &features)?;
            outputs.insert("image_hidden_states".to_owned(), features);
        }
        if let Some(generation) = &generation {
            return self.language_model.generate(&self.spec, generation, &prompt, x, observer);
        }
        outputs.insert("logits".to_owned(), self.language_model.forward(&prompt, x)?);
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let Request { features, prompt, generation } = self.read(call)?;
        let language = self.language_model.cost(&prompt, generation.as_ref())?;
        Ok(match features {
            Some(features) => {
                let [vision, projector] = self.cfg.features_cost(&features, self.bytes);
                behind([(Phase::Vision, vision), (Phase::Projector, projector)], language)
            }
            None => language,
        })
    }

    fn paths(&self) -> BTreeMap<String, String> {
        isa::paths(&self.spec.device, self.spec.dtype)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::{Engine, Unobserved};
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::json;

    use super::*;

    fn spec(changes: Value) -> ModelSpec {
        let mut config = json!({
            "image_token_index": 29,
            "text_config": {
                "vocab_size": 30, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
            },
            "vision_config": {
                "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 4, "patch_size": 2,
            },
        });
        for (field, value) in changes.as_object().cloned().unwrap_or_default() {
            config[field] = value;
        }
        ModelSpec {
            family: "llava".into(),
            class: CLASSES[0].into(),
            config,
            extra_configs: Default::default(),
            dtype: DType::F32,
            device: Device::Cpu,
            engine: Engine::Roofbench,
        }
    }

    fn model(changes: Value) -> LlavaModel {
        let spec = spec(changes);
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::default()).unwrap();
        LlavaModel::load(&spec, weights.var_builder(DType::F32, &Device::Cpu)).unwrap()
    }

    fn call(row: &[i64], arguments: Value) -> Call {
        let inputs = [
            ("input_ids".to_owned(), Tensor::new(row, &Device::Cpu).unwrap().unsqueeze(0).unwrap()),
            ("pixel_values".to_owned(), Tensor::ones((1, 3, 4, 4), DType::F32, &Device::Cpu).unwrap()),
        ];
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        Call { method: "forward".into(), inputs: inputs.into(), arguments }
    }

    #[test]
    fn what_config_json_leaves_out_is_as_in_the_class() {
        let mut spec = spec(json!({}));
        spec.config = json!({"text_config": {"vocab_size": 32064}});
        let cfg = LlavaConfig::from_spec(&spec).unwrap();
        assert_eq!((cfg.image_token_index, cfg.vision_config.image_size, cfg.projector()), (32_000, 336, [1024, 4096]));
        assert_eq!(cfg.depths(&cfg.vision_feature_layer).unwrap(), [23]);
        // a tower that is there has the defaults of its own class
        spec.config = json!({"vision_config": {"hidden_size": 24}, "vision_feature_layer": [-1, 0, 3]});
        let cfg = LlavaConfig::from_spec(&spec).unwrap();
        assert_eq!((cfg.vision_config.patch_size, cfg.projector()), (32, [72, 4096]));
        assert_eq!(cfg.depths(&cfg.vision_feature_layer).unwrap(), [12, 0, 3]);
    }

    /// As on the Hub, where the language model's sizes are left out.
    #[test]
    fn the_published_config_is_read_whole() -> Result<(), Box<dyn std::error::Error>> {
        let (_, checkpoint) = roofbench_core::catalog::checkpoint("llava-hf/llava-1.5-7b-hf")?;
        let cfg = LlavaConfig::from_spec(&ModelSpec::new("llava", &checkpoint.class, checkpoint.config.clone()))?;
        let TextConfig::Llama(text) = &cfg.text_config else { panic!("{:?}", cfg.text_config) };
        assert_eq!((text.hidden_size, text.intermediate_size, text.num_hidden_layers), (4096, 11_008, 32));
        assert_eq!((text.vocab_size, text.tie_word_embeddings, cfg.projector()), (32_064, false, [1024, 4096]));
        assert_eq!((cfg.image_token_index, cfg.depths(&cfg.vision_feature_layer)), (32_000, Ok(vec![23])));
        Ok(())
    }

    #[test]
    fn configs_that_would_give_another_result_are_refused_by_name() {
        let message =
            |changes| LlavaConfig::from_spec(&spec(changes)).err().map(|error| error.to_string()).unwrap_or_default();
        let tower = message(json!({"vision_config": {"model_type": "siglip_vision_model"}}));
        assert!(tower.contains("`vision_config.model_type` = \"siglip_vision_model\" is not supported"), "{tower}");
        assert!(message(json!({"text_config": {"model_type": "qwen2"}})).contains("`text_config.model_type`"));
        assert!(message(json!({"vision_feature_layer": -4})).contains("`vision_feature_layer`: -4 is no layer of 2"));
        assert!(message(json!({"vision_feature_layer": []})).contains("holds no layer"));
        assert!(message(json!({"vision_feature_select_strategy": "cls"})).contains("`vision_feature_select_strategy`"));
        assert!(message(json!({"projector_hidden_act": "maxout"})).contains("`projector_hidden_act`"));
    }

    #[test]
    fn calls_say_which_features_and_places_hold_them() {
        let mut model = model(json!({"vision_feature_layer": [0, -1]}));
        let patches = [1, 29, 29, 29, 29, 5];
        for (row, arguments) in [
            (&patches[..], json!({})),
            (&patches, json!({"vision_feature_layer": [2, 1]})),
            (&[29, 29, 29, 29, 29, 5], json!({"vision_feature_select_strategy": "full"})),
        ] {
            let call = call(row, arguments);
            let (outputs, recorded) = roofbench_nn::cost::record(|| model.call(&call, &mut Unobserved));
            assert_eq!(outputs.unwrap()["logits"].dims(), [1, 6, 30]);
            let flops: u64 = model.cost(&call).unwrap().iter().map(|phase| phase.cost.flops).sum();
            assert_eq!(flops, recorded.flops);
        }
        let mut message = |row: &[i64], arguments| {
            model.call(&call(row, arguments), &mut Unobserved).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(message(&[1, 29, 5], json!({})).contains("holds the image token 29 1 times, pixel_values give 4"));
        assert!(
            message(&patches, json!({"vision_feature_layer": 1})).contains("names 1 layers, the projector takes 2")
        );
        assert!(message(&patches, json!({"vision_feature_layer": [3, 1]})).contains("3 is no layer of 2"));
    }

    #[test]
    fn an_output_matrix_may_be_tied_in_either_place() {
        let tied = [json!({"tie_word_embeddings": true}), json!({"text_config": {"tie_word_embeddings": true}})];
        assert!(tied.iter().all(|changes| aliases(&spec(changes.clone())).len() == RULES.len()));
        assert_eq!(aliases(&spec(json!({}))).len(), RULES.len() - 1);
        let TextConfig::Llama(cfg) = LlavaConfig::from_spec(&spec(tied[0].clone())).unwrap().text_config else {
            panic!("a Llama")
        };
        assert!(cfg.tie_word_embeddings);
    }

    /// LLaVA-1.5-7B over 576 patches and 32 words: 2 FLOPs per weight that a row meets (arXiv:2001.08361, table 1).
    #[test]
    fn cost_of_a_published_size() {
        let mut spec = spec(json!({}));
        spec.config = json!({});
        let cfg = LlavaConfig::from_spec(&spec).unwrap();
        let pixel_values = Tensor::zeros((1, 3, 336, 336), DType::F32, &Device::Cpu).unwrap();
        let call = Call { inputs: [("pixel_values".to_owned(), pixel_values)].into(), ..Default::default() };
        let inputs = Inputs::of_any_method(&call, &["pixel_values"]).unwrap();
        let features = Features::read(&cfg, &call, &inputs).unwrap();
        assert_eq!(features.rows(), 576);
        let tower = 577. * 23. * (4. * 1024. * 1024. + 2. * 1024. * 4096.);
        let attention = 23. * 577. * 577. * 2. * 1024.;
        let projector = 576. * (1024. * 4096. + 4096. * 4096.);
        let flops: f64 = cfg.features_cost(&features, 2).iter().map(|cost| cost.flops as f64).sum();
        assert!((flops / (2. * (tower + attention + projector)) - 1.).abs() < 0.02, "{flops:e}");
    }
}
