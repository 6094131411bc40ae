//! BLIP-2: a vision transformer, queries that a Q-Former puts to its states, and a language model that reads the answers
//! among its tokens. InstructBLIP is the same with the instruction beside the queries.
//! Source: BLIP-2 (arXiv:2301.12597). Mirrors `transformers.Blip2ForConditionalGeneration` and
//! `Blip2ForImageTextRetrieval`.

use std::collections::BTreeMap;

use candle_core::{D, Tensor};
use candle_nn::VarBuilder;
use roofbench_core::config;
use roofbench_core::cost::{self, Cost, PhaseCost};
use roofbench_core::generation::Generation;
use roofbench_core::inputs::{Inputs, unsupported_method};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Result, Session, SessionError, Tensors};
use roofbench_core::weights::{AliasRule, AliasScope};
use roofbench_nn::kernels::isa;
use roofbench_nn::linear::Linear;
use serde::Deserialize;

use super::language_model::{LanguageModel, Prompt, TextConfig};
use super::qformer::{QFormer, QFormerConfig, WordEmbeddings, Words};
use super::vision_tower::{Form, Pixels, VisionTower, VisionTowerConfig};
use super::{behind, forward_phase, named, products, products_cost, unit_rows, unit_rows_cost};

/// The classes that run.
pub const CLASSES: &[&str] = &["Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"];

/// From names in published checkpoints to those of the classes; the last is for a tied output matrix.
const RULES: &[AliasRule] = &[
    // T5: one matrix with three names
    AliasRule::rename(
        r"^language_model\.(encoder|decoder)\.embed_tokens\.weight$",
        "language_model.shared.weight",
        AliasScope::Always,
    ),
    // T5: left over, cross-attention has no positions
    AliasRule::drop(r"\.EncDecAttention\.relative_attention_bias\.weight$", AliasScope::Always),
    // buffers of older files, which follow from the config
    AliasRule::drop(r"\.rotary_emb\.inv_freq$", AliasScope::Always),
    AliasRule::drop(r"\.position_ids$", AliasScope::Always),
    AliasRule::drop(r"^language_model\.lm_head\.weight$", AliasScope::Always),
];

/// How published checkpoints name the tensors of `spec`, of InstructBLIP's as well.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    let text = |field: &str| spec.config.get("text_config").and_then(|text| text.get(field));
    let (yes, no) = (Some(&true.into()), Some(&false.into()));
    let is_tied = match text("model_type").and_then(serde_json::Value::as_str) {
        Some("llama" | "mistral") => text("tie_word_embeddings") == yes,
        _ => text("tie_word_embeddings") != no && text("scale_decoder_outputs") != no,
    };
    if is_tied { RULES } else { &RULES[..RULES.len() - 1] }
}

/// Language models behind the Q-Former, the default first.
const LANGUAGE_MODELS: [&str; 4] = ["opt", "t5", "llama", "mistral"];

/// The fields of config.json beside those of its parts; field names are the file's own.
#[derive(Debug, Clone, Deserialize)]
struct Fields {
    #[serde(default = "defaults::num_query_tokens")]
    num_query_tokens: usize,
    #[serde(default = "defaults::image_text_hidden_size")]
    image_text_hidden_size: usize,
    image_token_index: Option<i64>,
    /// Another name of the same.
    image_token_id: Option<i64>,
}

/// What `transformers.Blip2Config` takes for fields that files leave out.
mod defaults {
    pub(super) fn num_query_tokens() -> usize {
        32
    }
    pub(super) fn image_text_hidden_size() -> usize {
        256
    }
}

/// The parts of config.json that say how pictures are seen.
#[derive(Debug, Clone)]
pub struct Blip2Config {
    /// Of the vision tower.
    pub vision_config: VisionTowerConfig,
    /// Of the Q-Former.
    pub qformer_config: QFormerConfig,
    /// Queries put to a picture.
    pub num_query_tokens: usize,
    /// Width in which `Blip2ForImageTextRetrieval` compares pictures and texts.
    pub image_text_hidden_size: usize,
    /// The token in whose places the answers stand.
    pub image_token_index: Option<i64>,
}

impl Blip2Config {
    /// Reads and checks config.json but for the language model.
    ///
    /// # Errors
    /// Names the field that is malformed, contradicts another, or changes the result in a way that isn't supported.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, SessionError> {
        let Fields { num_query_tokens, image_text_hidden_size, image_token_index, image_token_id } =
            spec.parse_config()?;
        let image_token_index = image_token_index.or(image_token_id);
        config::sizes(&[("num_query_tokens", num_query_tokens), ("image_text_hidden_size", image_text_hidden_size)])?;
        let vision_config =
            config::nested(spec, "vision_config", |part| VisionTowerConfig::from_spec(part, Form::Blip2))?;
        let states = vision_config.hidden_size;
        let qformer_config = config::nested(spec, "qformer_config", |part| QFormerConfig::from_spec(part, states))?;
        Ok(Self { vision_config, qformer_config, num_query_tokens, image_text_hidden_size, image_token_index })
    }

    /// FLOPs and bytes of a picture's states.
    fn vision_cost(&self, pixels: &Pixels, bytes: u64) -> Cost {
        let (vision, [pictures, states]) = (&self.vision_config, pixels.shape());
        vision.cost(pixels, vision.num_hidden_layers, None, bytes) + vision.norm_cost(pictures * states, bytes)
    }

    /// FLOPs and bytes of the answers of a picture's states, with so many words beside the queries.
    fn asking_cost(&self, pixels: &Pixels, words: u64, bytes: u64) -> Cost {
        let [pictures, states] = pixels.shape();
        self.qformer_config.cost(pictures, [self.num_query_tokens as u64, words, states], bytes)
    }
}

/// The tower and the Q-Former behind it.
struct Eyes {
    cfg: Blip2Config,
    vision_model: VisionTower,
    qformer: QFormer,
    bytes: u64,
}

impl Eyes {
    /// `norm` is what the Q-Former calls the norm of its embeddings.
    fn load(cfg: Blip2Config, norm: &str, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            vision_model: VisionTower::load(&cfg.vision_config, None, vb.pp("vision_model"))?,
            qformer: QFormer::load(&cfg.qformer_config, cfg.num_query_tokens, norm, vb.clone())?,
            bytes: vb.dtype().size_in_bytes() as u64,
            cfg,
        })
    }

    /// The states of pictures: (pictures, 1 + patches, hidden).
    fn see(&self, pixels: &Pixels) -> Result<Tensor> {
        self.vision_model.post_layernorm(&self.vision_model.forward(pixels)?)
    }
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault, or the class when it is none of [`CLASSES`].
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    match spec.class.as_str() {
        "Blip2ForConditionalGeneration" => Ok(Box::new(Writer::load(spec, false, vb)?)),
        "Blip2ForImageTextRetrieval" => Ok(Box::new(Retriever::load(spec, vb)?)),
        _ => Err(config::unsupported_class(spec, CLASSES)),
    }
}

/// Arguments of the classes' own.
const ARGUMENTS: [&str; 1] = ["interpolate_pos_encoding"];

/// A call of [`Writer`], checked.
struct Request<'a> {
    pixels: Pixels<'a>,
    /// The instruction, of InstructBLIP.
    words: Option<Words>,
    prompt: Prompt,
    /// Of a call of `generate`.
    generation: Option<Generation>,
}

/// `Blip2ForConditionalGeneration`, and `InstructBlipForConditionalGeneration`: writes about a picture.
pub(crate) struct Writer {
    eyes: Eyes,
    /// Of the instruction, which InstructBLIP puts beside the queries.
    embeddings: Option<WordEmbeddings>,
    image_token: i64,
    language_projection: Linear,
    language_model: LanguageModel,
    /// The language model's own: it chooses tokens by its `text_config` alone.
    spec: ModelSpec,
}

impl Writer {
    /// Loads the class from a checkpoint's root; it is `instructed` where the Q-Former reads the instruction.
    ///
    /// # Errors
    /// Names the config field or the tensor at fault.
    pub(crate) fn load(spec: &ModelSpec, instructed: bool, vb: VarBuilder) -> Result<Self, SessionError> {
        let mut cfg = Blip2Config::from_spec(spec)?;
        let text_config = TextConfig::from_spec(spec, &LANGUAGE_MODELS)?;
        let Some(image_token) = cfg.image_token_index else {
            let reason = "is missing; it is the token in whose places the picture stands in a prompt";
            return Err(config::invalid("image_token_index", reason));
        };
        cfg.qformer_config.use_qformer_text_input |= instructed;
        let words = || WordEmbeddings::load(&cfg.qformer_config, vb.pp("qformer.embeddings"));
        let embeddings = instructed.then(words).transpose()?;
        let norm = if instructed { "embeddings.layernorm" } else { "layernorm" };
        let (hidden, width) = (cfg.qformer_config.hidden_size, text_config.width());
        Ok(Self {
            eyes: Eyes::load(cfg, norm, &vb)?,
            embeddings,
            image_token,
            language_projection: Linear::load(hidden, width, true, vb.pp("language_projection"))?,
            language_model: LanguageModel::load(&text_config, vb.pp("language_model"))?,
            spec: ModelSpec { config: text_config.with_tokens(spec), extra_configs: BTreeMap::new(), ..spec.clone() },
        })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Request<'a>, SessionError> {
        let cfg = &self.eyes.cfg;
        let mut known = vec!["pixel_values", "input_ids", "attention_mask"];
        if self.embeddings.is_some() {
            known.extend(INSTRUCTION);
        }
        let inputs = match call.method.as_str() {
            "forward" => {
                known.extend(["decoder_input_ids", "decoder_attention_mask"]);
                Inputs::forward(call, &known, &ARGUMENTS)?
            }
            "generate" => Inputs::of_any_method(call, &known)?,
            _ => return Err(unsupported_method(call, "forward, generate")),
        };
        let pixels = Pixels::read(&cfg.vision_config, &inputs)?;
        let words = || Words::read(&cfg.qformer_config, &inputs, INSTRUCTION, 0)?.beside(&pixels, INSTRUCTION[0]);
        let words = self.embeddings.as_ref().map(|_| words()).transpose()?;
        let prompt = match self.language_model.read(&inputs)? {
            Some(prompt) => prompt,
            None if call.method == "generate" => self.start(&pixels)?,
            None => return Err(SessionError::input("input_ids", "is missing")),
        };
        prompt.check_places(self.image_token, pixels.shape()[0] * cfg.num_query_tokens as u64)?;
        let generation = || self.language_model.generation(&self.spec, call, &prompt, &ARGUMENTS);
        let generation = (call.method == "generate").then(generation).transpose()?;
        Ok(Request { pixels, words, prompt, generation })
    }

    /// The prompt of a call without one: a picture and the start token.
    fn start(&self, pixels: &Pixels) -> Result<Prompt, SessionError> {
        let start = self.spec.config.get("bos_token_id").and_then(serde_json::Value::as_i64);
        let start = start.ok_or_else(|| {
            SessionError::input("input_ids", "is missing, and text_config has no bos_token_id to begin with")
        })?;
        let (pictures, queries) = (pixels.shape()[0] as usize, self.eyes.cfg.num_query_tokens);
        let row = [vec![self.image_token; queries], vec![start]].concat();
        Ok(Prompt::of(Tensor::from_vec(row.repeat(pictures), (pictures, queries + 1), &self.spec.device)?))
    }

    /// The Q-Former's states: (pictures, queries + words, hidden).
    fn ask(&self, states: &Tensor, words: Option<&Words>) -> Result<Tensor> {
        let qformer = &self.eyes.qformer;
        match (&self.embeddings, words) {
            (Some(embeddings), Some(words)) => {
                let mask = words.mask_behind(qformer.queries())?;
                qformer.forward(Some(states), Some(&embeddings.forward(words)?), mask.as_ref())
            }
            _ => qformer.forward(Some(states), None, None),
        }
    }
}

/// The instruction for the Q-Former, in its own tokens.
const INSTRUCTION: [&str; 2] = ["qformer_input_ids", "qformer_attention_mask"];

impl Session for Writer {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let Request { pixels, words, prompt, generation } = self.read(call)?;
        let states = self.eyes.see(&pixels)?; // (pictures, 1 + patches, hidden)
        observer.end(Phase::Vision);
        let answers = self.ask(&states, words.as_ref())?; // (pictures, queries + words, hidden)
        let queries = answers.narrow(1, 0, self.eyes.qformer.queries())?.contiguous()?;
        let features = self.language_projection.forward(&queries.flatten_to(1)?)?; // (features, width)
        observer.end(Phase::Projector);
        let x = self.language_model.embed(&prompt.input_ids)?; // (batch, seq, width)
        let x = prompt.put(&x, self.image_token, &features)?;
        if let Some(generation) = &generation {
            return self.language_model.generate(&self.spec, generation, &prompt, x, observer);
        }
        let logits = self.language_model.forward(&prompt, x)?;
        observer.end(Phase::Forward);
        Ok(named([
            ("logits", logits),
            ("qformer_outputs.last_hidden_state", answers),
            ("vision_outputs.last_hidden_state", states),
        ]))
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let Request { pixels, words, prompt, generation } = self.read(call)?;
        let (Eyes { cfg, bytes, .. }, projection) = (&self.eyes, &self.language_projection);
        let features = pixels.shape()[0] * cfg.num_query_tokens as u64;
        let words = words.map_or(0, |words| words.shape()[1]);
        let [hidden, width] = [projection.in_dim(), projection.out_dim()].map(|size| size as u64);
        let asking = cfg.asking_cost(&pixels, words, *bytes) + cost::linear(features, hidden, width, true, *bytes);
        let before = [(Phase::Vision, cfg.vision_cost(&pixels, *bytes)), (Phase::Projector, asking)];
        Ok(behind(before, self.language_model.cost(&prompt, generation.as_ref())?))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        isa::paths(&self.spec.device, self.spec.dtype)
    }
}

/// "No" and "yes".
const MATCHES: usize = 2;

/// `Blip2ForImageTextRetrieval`: says whether a text is of a picture, or how near each text is to each picture.
struct Retriever {
    eyes: Eyes,
    embeddings: WordEmbeddings,
    vision_projection: Linear,
    text_projection: Linear,
    itm_head: Linear,
    paths: BTreeMap<String, String>,
}

/// The arguments of [`Retriever`].
struct Pair<'a> {
    pixels: Pixels<'a>,
    words: Words,
    /// The text is read beside the picture.
    matched: bool,
}

impl Retriever {
    fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Self, SessionError> {
        let cfg = Blip2Config::from_spec(spec)?;
        if !cfg.qformer_config.use_qformer_text_input {
            let (family, class) = (spec.family.clone(), spec.class.as_str());
            return Err(SessionError::UnsupportedConfig {
                family,
                field: "qformer_config.use_qformer_text_input".to_owned(),
                value: "false".to_owned(),
                supported: format!("true, for {class} reads texts with the Q-Former"),
            });
        }
        let (hidden, shared) = (cfg.qformer_config.hidden_size, cfg.image_text_hidden_size);
        Ok(Self {
            embeddings: WordEmbeddings::load(&cfg.qformer_config, vb.pp("embeddings"))?,
            eyes: Eyes::load(cfg, "layernorm", &vb)?,
            vision_projection: Linear::load(hidden, shared, true, vb.pp("vision_projection"))?,
            text_projection: Linear::load(hidden, shared, true, vb.pp("text_projection"))?,
            itm_head: Linear::load(hidden, MATCHES, true, vb.pp("itm_head"))?,
            paths: isa::paths(&spec.device, spec.dtype),
        })
    }

    fn read<'a>(&self, call: &'a Call) -> Result<Pair<'a>, SessionError> {
        let known = ["pixel_values", "input_ids", "attention_mask"];
        let inputs = Inputs::forward(call, &known, &["use_image_text_matching_head"])?;
        let (cfg, matched) = (&self.eyes.cfg, inputs.flag("use_image_text_matching_head")?);
        let pixels = Pixels::read(&cfg.vision_config, &inputs)?;
        // newer checkpoints have places for the picture before the words
        let ahead = cfg.image_token_index.map_or(0, |_| cfg.num_query_tokens);
        let words = Words::read(&cfg.qformer_config, &inputs, [known[1], known[2]], ahead)?;
        let words = if matched { words.beside(&pixels, known[1])? } else { words };
        Ok(Pair { pixels, words, matched })
    }

    /// The mask of the words alone, or of the queries and the words.
    fn mask(&self, words: &Words, matched: bool) -> Result<Option<Tensor>> {
        let queries = self.eyes.qformer.queries();
        match (matched, self.eyes.cfg.image_token_index, &words.attention_mask) {
            (true, None, Some(_)) => words.mask_behind(queries),
            (false, Some(_), Some(mask)) => mask.narrow(1, queries, mask.dim(1)? - queries).map(Some),
            (_, _, mask) => Ok(mask.clone()),
        }
    }

    fn forward(&self, Pair { pixels, words, matched }: &Pair, observer: &mut dyn Observer) -> Result<Tensors> {
        let (states, qformer) = (self.eyes.see(pixels)?, &self.eyes.qformer);
        observer.end(Phase::Vision);
        let (text, mask) = (self.embeddings.forward(words)?, self.mask(words, *matched)?);
        if *matched {
            let both = qformer.forward(Some(&states), Some(&text), mask.as_ref())?;
            let queries = both.narrow(1, 0, qformer.queries())?.contiguous()?;
            let scores = self.itm_head.forward(&queries)?; // (batch, queries, 2)
            roofbench_nn::cost::elementwise(scores.elem_count(), 1);
            let scores = scores.mean(1)?; // (batch, 2)
            return Ok(named([
                ("logits_per_text", scores.t()?.contiguous()?),
                ("logits_per_image", scores),
                ("text_embeds", both),
                ("image_embeds", states),
            ]));
        }
        let (answers, text) =
            (qformer.forward(Some(&states), None, None)?, qformer.forward(None, Some(&text), mask.as_ref())?);
        let (pictures, queries, _) = answers.dims3()?;
        let image = unit_rows(&self.vision_projection.forward(&answers.flatten_to(1)?)?)?;
        let text = unit_rows(&self.text_projection.forward(&text.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?)?;
        let scores = products(&image, &text, 1.0)?; // (pictures * queries, texts)
        let scores = scores.reshape((pictures, queries, ()))?.max(1)?; // (pictures, texts)
        let image = image.reshape((pictures, queries, image.dim(D::Minus1)?))?;
        Ok(named([
            ("logits_per_text", scores.t()?.contiguous()?),
            ("logits_per_image", scores),
            ("text_embeds", text),
            ("image_embeds", image),
        ]))
    }
}

impl Session for Retriever {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let outputs = self.forward(&self.read(call)?, observer)?;
        observer.end(Phase::Forward);
        Ok(outputs)
    }

    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        let (Eyes { cfg, bytes, .. }, pair) = (&self.eyes, self.read(call)?);
        let ([texts, length], pictures) = (pair.words.shape(), pair.pixels.shape()[0]);
        let layer =
            |rows, layer: &Linear| cost::linear(rows, layer.in_dim() as u64, layer.out_dim() as u64, true, *bytes);
        let (asked, shared) = (pictures * cfg.num_query_tokens as u64, cfg.image_text_hidden_size as u64);
        let comparison = match pair.matched {
            true => {
                cfg.asking_cost(&pair.pixels, length, *bytes)
                    + layer(asked, &self.itm_head)
                    + cost::elementwise(asked * MATCHES as u64, 1) // their mean
            }
            false => {
                cfg.asking_cost(&pair.pixels, 0, *bytes)
                    + cfg.qformer_config.cost(texts, [0, length, 0], *bytes)
                    + layer(asked, &self.vision_projection)
                    + layer(texts, &self.text_projection)
                    + unit_rows_cost(asked + texts, shared)
                    + products_cost([asked, texts], shared, *bytes)
            }
        };
        Ok(behind([(Phase::Vision, cfg.vision_cost(&pair.pixels, *bytes))], forward_phase(comparison)))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.paths.clone()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::{DType, Device};
    use roofbench_core::session::Unobserved;
    use roofbench_core::weights::{HubOptions, Source, Weights};
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn spec(class: &str, changes: Value) -> ModelSpec {
        let mut config = json!({
            "num_query_tokens": 3, "image_token_index": 29, "image_text_hidden_size": 5,
            "vision_config": {
                "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 4, "patch_size": 2,
            },
            "qformer_config": {
                "vocab_size": 20, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
                "num_attention_heads": 2, "max_position_embeddings": 8,
            },
            "text_config": {
                "vocab_size": 30, "hidden_size": 8, "ffn_dim": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                "max_position_embeddings": 16, "word_embed_proj_dim": 8,
            },
        });
        for (path, value) in changes.as_object().cloned().unwrap_or_default() {
            match path.split_once('.') {
                Some((part, field)) => config[part][field] = value,
                None => config[&path] = value,
            }
        }
        ModelSpec::new("blip-2", class, config)
    }

    pub(crate) fn session(
        spec: &ModelSpec,
        load: impl Fn(&ModelSpec, VarBuilder) -> Result<Box<dyn Session>, SessionError>,
    ) -> Result<Box<dyn Session>, SessionError> {
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, aliases(spec), &spec.class, &HubOptions::default())?;
        load(spec, weights.var_builder(DType::F32, &Device::Cpu))
    }

    pub(crate) fn call(method: &str, inputs: &[(&str, &[i64])], arguments: Value) -> Call {
        let row = |(name, row): &(&str, &[i64])| {
            ((*name).to_owned(), Tensor::new(*row, &Device::Cpu).unwrap().unsqueeze(0).unwrap())
        };
        let pixel_values = Tensor::ones((1, 3, 4, 4), DType::F32, &Device::Cpu).unwrap();
        let mut inputs: Tensors = inputs.iter().map(row).collect();
        inputs.insert("pixel_values".to_owned(), pixel_values);
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        Call { method: method.into(), inputs, arguments }
    }

    /// Runs `call` and checks its cost.
    pub(crate) fn run(session: &mut dyn Session, call: &Call) -> Result<Tensors, SessionError> {
        let (outputs, recorded) = roofbench_nn::cost::record(|| session.call(call, &mut Unobserved));
        let outputs = outputs?;
        let flops: u64 = session.cost(call)?.iter().map(|phase| phase.cost.flops).sum();
        assert_eq!(flops, recorded.flops);
        Ok(outputs)
    }

    fn message<T>(result: Result<T, SessionError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_config_json_leaves_out_is_as_in_the_class() {
        let mut spec = spec(CLASSES[0], json!({}));
        spec.config = json!({});
        let cfg = Blip2Config::from_spec(&spec).unwrap();
        assert_eq!((cfg.vision_config.hidden_size, cfg.vision_config.num_hidden_layers), (1408, 39));
        assert_eq!((cfg.qformer_config.hidden_size, cfg.qformer_config.states), (768, 1408));
        assert_eq!((cfg.num_query_tokens, cfg.image_text_hidden_size, cfg.image_token_index), (32, 256, None));
    }

    /// As on the Hub, which leave out what is as in the class.
    #[test]
    fn published_configs_are_read_whole() -> Result<(), Box<dyn std::error::Error>> {
        let read = |repository: &str| {
            let (family, checkpoint) = roofbench_core::catalog::checkpoint(repository)?;
            let spec = ModelSpec::new(&family.name, &checkpoint.class, checkpoint.config.clone());
            let text = TextConfig::from_spec(&spec, &LANGUAGE_MODELS)?;
            Ok::<_, Box<dyn std::error::Error>>((Blip2Config::from_spec(&spec)?, text, aliases(&spec).len()))
        };
        for (repository, width, image_token, tied) in [
            ("Salesforce/blip2-opt-2.7b", 2560, 50265, true),
            ("Salesforce/blip2-flan-t5-xl", 2048, 32100, false),
            ("Salesforce/instructblip-flan-t5-xl", 2048, 32100, false),
            ("Salesforce/instructblip-vicuna-7b", 4096, 32001, false),
        ] {
            let (cfg, text, rules) = read(repository)?;
            let (vision, qformer) = (&cfg.vision_config, &cfg.qformer_config);
            assert_eq!(
                (vision.hidden_size, vision.num_hidden_layers, vision.image_size),
                (1408, 39, 224),
                "{repository}"
            );
            assert_eq!((qformer.hidden_size, qformer.states, cfg.num_query_tokens), (768, 1408, 32), "{repository}");
            assert_eq!((text.width(), cfg.image_token_index), (width, Some(image_token)), "{repository}");
            assert_eq!(rules == RULES.len(), tied, "{repository}");
        }
        Ok(())
    }

    #[test]
    fn configs_that_would_give_another_result_are_refused_by_name() {
        let refusal = |class: &str, changes| message(session(&spec(class, changes), load));
        assert!(refusal(CLASSES[0], json!({"image_token_index": null})).contains("`image_token_index`: is missing"));
        assert!(refusal(CLASSES[0], json!({"text_config.model_type": "gpt2"})).contains("`text_config.model_type`"));
        let positions = refusal(CLASSES[0], json!({"qformer_config.position_embedding_type": "relative_key"}));
        assert!(positions.contains("`qformer_config.position_embedding_type`"), "{positions}");
        assert!(refusal(CLASSES[1], json!({})).contains("`qformer_config.use_qformer_text_input` = false"));
        assert!(refusal("Blip2Model", json!({})).contains("class `Blip2Model` is not supported"));
    }

    #[test]
    fn prompts_have_places_for_each_answer() {
        let mut session = session(&spec(CLASSES[0], json!({})), load).unwrap();
        let prompt = [29, 29, 29, 4, 5];
        let outputs = run(&mut *session, &call("forward", &[("input_ids", &prompt)], json!({}))).unwrap();
        assert_eq!(outputs["logits"].dims(), [1, 5, 30]);
        let generate = json!({"max_new_tokens": 2, "min_new_tokens": 2});
        let outputs = run(&mut *session, &call("generate", &[], generate.clone())).unwrap();
        assert_eq!(outputs["sequences"].narrow(1, 0, 4).unwrap().to_vec2::<i64>().unwrap(), [[29, 29, 29, 2]]);
        let error = message(run(&mut *session, &call("forward", &[("input_ids", &prompt[1..])], json!({}))));
        assert!(error.contains("holds the image token 29 2 times, pixel_values give 3 features"), "{error}");
        let error = message(run(&mut *session, &call("generate", &[("attention_mask", &[1])], generate)));
        assert!(error.contains("goes with input_ids"), "{error}");
    }

    /// A place for the picture that is no word, in newer checkpoints, changes nothing.
    #[test]
    fn texts_are_read_with_places_for_the_picture_and_without() {
        let plain = spec(CLASSES[1], json!({"qformer_config.use_qformer_text_input": true, "image_token_index": null}));
        let placed = spec(CLASSES[1], json!({"qformer_config.use_qformer_text_input": true}));
        for head in [false, true] {
            let arguments = json!({"use_image_text_matching_head": head});
            let words: [(&str, &[i64]); 2] = [("input_ids", &[4, 5, 6]), ("attention_mask", &[1, 1, 0])];
            let first = run(&mut *session(&plain, load).unwrap(), &call("forward", &words, arguments.clone())).unwrap();
            let words: [(&str, &[i64]); 2] =
                [("input_ids", &[29, 29, 29, 4, 5, 6]), ("attention_mask", &[1, 1, 1, 1, 1, 0])];
            let second = run(&mut *session(&placed, load).unwrap(), &call("forward", &words, arguments)).unwrap();
            let scores = |outputs: &Tensors| outputs["logits_per_image"].to_vec2::<f32>().unwrap();
            assert_eq!(scores(&first), scores(&second));
            assert_eq!(first["logits_per_image"].dims(), [1, if head { 2 } else { 1 }]);
        }
    }

    /// 224 pixels through ViT-g and the Q-Former: 2 FLOPs per weight that a row meets (arXiv:2001.08361, table 1).
    #[test]
    fn cost_of_a_published_size() {
        let mut spec = spec(CLASSES[0], json!({}));
        spec.config = json!({});
        let cfg = Blip2Config::from_spec(&spec).unwrap();
        let pixel_values = Tensor::zeros((1, 3, 224, 224), DType::F32, &Device::Cpu).unwrap();
        let call = Call { inputs: [("pixel_values".to_owned(), pixel_values)].into(), ..Default::default() };
        let inputs = Inputs::of_any_method(&call, &["pixel_values"]).unwrap();
        let pixels = Pixels::read(&cfg.vision_config, &inputs).unwrap();
        let tower = 257. * 39. * (4. * 1408. * 1408. + 2. * 1408. * 6144.) + 39. * 257. * 257. * 2. * 1408.;
        let flops = cfg.vision_cost(&pixels, 2).flops as f64;
        assert!((flops / (2. * tower) - 1.).abs() < 0.02, "{flops:e}");
        let square = 768. * 768.;
        let layers = 12. * 32. * (4. * square + 2. * 768. * 3072.);
        let looks = 6. * (32. * 2. * square + 257. * 2. * 1408. * 768. + 32. * 257. * 2. * 768.);
        let flops = cfg.asking_cost(&pixels, 0, 2).flops as f64;
        assert!((flops / (2. * (layers + looks)) - 1.).abs() < 0.02, "{flops:e}");
    }
}
