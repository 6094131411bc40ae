//! The 36 families as data: which `model_type`s they cover, their checkpoints and their standard cells.
//!
//! The data lies in `catalog/` beside `src/` and is compiled in: `families.json` (model types), `workloads.json`
//! and, for every checkpoint, its published `config.json` with `about.json` (class, parameter count, licence).

use std::collections::BTreeMap;
use std::sync::LazyLock;

use include_dir::{Dir, include_dir};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::session::Arguments;
use crate::workload::InputSpec;

/// Which crate runs a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Modality {
    /// Tokens in, tokens or embeddings out.
    Text,
    /// Pictures in.
    Vision,
    /// Sound in or out.
    Speech,
    /// More than one of them.
    Multimodal,
}

/// A model family: one row of the coverage table.
#[derive(Debug, Clone)]
pub struct Family {
    /// The one word for it everywhere: `bert`, `blip-2`.
    pub name: String,
    /// Which crate runs it.
    pub modality: Modality,
    /// The values of `model_type` in config.json that belong to it, the first being the family's own.
    pub model_types: Vec<String>,
    /// Repository of the checkpoint that the standard cells are measured on.
    pub default_checkpoint: String,
    /// Repository of a second checkpoint that the cells need (SpeechT5's vocoder).
    pub vocoder: Option<String>,
    /// `transformers` class of the standard cells.
    pub class: String,
    /// Type of weights in the standard cells: `f32`, or `bf16` where f32 would not fit a small machine.
    pub dtype: String,
    /// All published checkpoints known to the catalog, the default one first.
    pub checkpoints: Vec<Checkpoint>,
    /// Standard cells.
    pub cells: Vec<Cell>,
}

/// A published checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// `owner/name` on the Hub.
    pub repository: String,
    /// `transformers` class that its parameters were counted with.
    pub class: String,
    /// Distinct parameters of that class; tied ones count once.
    pub parameters: u64,
    /// SPDX or Hub name of its licence.
    pub license: String,
    /// Access must be asked for on the Hub.
    pub gated: bool,
    /// Hub task name.
    pub task: String,
    /// `config.json` as published.
    pub config: Value,
    /// Other `*config.json` files by name.
    pub extra_configs: BTreeMap<String, Value>,
}

/// A standard workload of a family.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// `forward/b1/s128`, without the family.
    pub name: String,
    /// What throughput counts: `sequences`, `tokens`, `images`, `audio seconds`.
    pub unit: String,
    /// Items in the batch.
    pub batch: u64,
    /// Units in one item of the batch, where that isn't 1 (or `new_tokens`): seconds of audio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount: Option<f64>,
    /// Exact number of tokens to generate; the end token is masked until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_tokens: Option<u64>,
    /// Plain arguments of the call.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub arguments: Arguments,
    /// Input tensors by argument name.
    pub inputs: BTreeMap<String, InputSpec>,
}

/// What a config.json describes.
#[derive(Debug, Clone)]
pub struct Detected {
    /// The family.
    pub family: &'static Family,
    /// The `transformers` class: as `architectures` names it, else the catalog's for this `model_type`.
    pub class: String,
}

/// Why the catalog has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// No family of this name.
    #[error("no family `{name}`{}; families: {supported}", did_you_mean(.suggestion))]
    UnknownFamily {
        /// As given.
        name: String,
        /// The nearest name.
        suggestion: Option<&'static str>,
        /// All names.
        supported: String,
    },
    /// No checkpoint of this name.
    #[error("the catalog has no checkpoint `{repository}`{}; `roofbench list` shows all", did_you_mean(.suggestion))]
    UnknownCheckpoint {
        /// As given.
        repository: String,
        /// The nearest name.
        suggestion: Option<&'static str>,
    },
    /// Neither field that tells the family is there.
    #[error(
        "config.json has neither `model_type` nor `architectures`, so its family is unknown; model types: {supported}"
    )]
    NoModelType {
        /// All model types.
        supported: String,
    },
    /// A model of none of the families.
    #[error("config.json: `{field}` = {value} is not supported; model types: {supported}")]
    Unsupported {
        /// Field.
        field: &'static str,
        /// Its value.
        value: String,
        /// All model types.
        supported: String,
    },
    /// `architectures` names a class that is not of the model type.
    #[error("config.json: `architectures` names {class}, which is no class of model type `{model_type}` ({stem}…)")]
    ForeignClass {
        /// As given.
        class: String,
        /// Model type.
        model_type: String,
        /// How its class names begin.
        stem: &'static str,
    },
}

/// All 36 families: text, vision, speech, multimodal.
pub fn families() -> &'static [Family] {
    &CATALOG.families
}

/// The family of this name.
///
/// # Errors
/// [`CatalogError::UnknownFamily`] with the nearest name and all names.
pub fn family(name: &str) -> Result<&'static Family, CatalogError> {
    families().iter().find(|family| family.name == name).ok_or_else(|| CatalogError::UnknownFamily {
        name: name.to_owned(),
        suggestion: nearest(name, families().iter().map(|family| family.name.as_str())),
        supported: families().iter().map(|family| family.name.as_str()).collect::<Vec<_>>().join(", "),
    })
}

/// The checkpoint `owner/name`, with its family.
///
/// # Errors
/// [`CatalogError::UnknownCheckpoint`] with the nearest name.
pub fn checkpoint(repository: &str) -> Result<(&'static Family, &'static Checkpoint), CatalogError> {
    let all = || families().iter().flat_map(|family| family.checkpoints.iter().map(move |known| (family, known)));
    all().find(|(_, known)| known.repository == repository).ok_or_else(|| CatalogError::UnknownCheckpoint {
        repository: repository.to_owned(),
        suggestion: nearest(repository, all().map(|(_, known)| known.repository.as_str())),
    })
}

/// The family and class of any `config.json`, by `model_type`, or by `architectures` where that is missing.
///
/// # Errors
/// Names the field and value that is not supported, and what is.
pub fn detect(config: &Value) -> Result<Detected, CatalogError> {
    let architecture = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    let kind = match (config.get("model_type"), architecture) {
        (Some(value), _) if !value.is_null() => {
            let known = CATALOG.kinds.iter().find(|kind| value.as_str() == Some(kind.model_type));
            known.ok_or_else(|| unsupported("model_type", value.to_string()))?
        }
        (_, Some(class)) => {
            let known = CATALOG.kinds.iter().find(|kind| kind.class(class).is_some());
            known.ok_or_else(|| unsupported("architectures", class.to_owned()))?
        }
        _ => return Err(CatalogError::NoModelType { supported: supported_model_types() }),
    };
    let family = &CATALOG.families[kind.family];
    if family.name == "donut" {
        // This model type joins any two models; the family is one such pair.
        let encoder = config.pointer("/encoder/model_type").unwrap_or(&Value::Null);
        if encoder != "donut-swin" {
            return Err(unsupported("encoder.model_type", format!("{encoder} (only \"donut-swin\" is)")));
        }
    }
    let class = match architecture {
        Some(class) => kind.class(class).ok_or_else(|| CatalogError::ForeignClass {
            class: class.to_owned(),
            model_type: kind.model_type.to_owned(),
            stem: kind.stem,
        })?,
        None => {
            let of_kind = |known: &&Checkpoint| known.config.get("model_type").is_some_and(|t| t == kind.model_type);
            let catalogued = family.checkpoints.iter().find(of_kind).map(|known| known.class.clone());
            catalogued.unwrap_or_else(|| format!("{}Model", kind.stem))
        }
    };
    Ok(Detected { family, class })
}

fn unsupported(field: &'static str, value: String) -> CatalogError {
    CatalogError::Unsupported { field, value, supported: supported_model_types() }
}

fn supported_model_types() -> String {
    families().iter().flat_map(|family| family.model_types.iter().map(String::as_str)).collect::<Vec<_>>().join(", ")
}

/// One value of `model_type`.
#[derive(Debug)]
struct Kind {
    model_type: &'static str,
    /// How the names of its classes begin.
    stem: &'static str,
    /// Index of its family.
    family: usize,
}

impl Kind {
    /// `class` in the spelling of `transformers` (files of remote code write `MPTForCausalLM`), if it is of this kind.
    fn class(&self, class: &str) -> Option<String> {
        /// What follows the stem; anything else is another kind's longer stem (`BlipForConditionalGeneration` is of
        /// `Blip`, `Blip2Model` and `CLIPSegModel` are not).
        const ROLES: [&str; 8] =
            ["For", "Model", "LMHeadModel", "DoubleHeadsModel", "TextModel", "VisionModel", "Encoder", "Decoder"];
        let (stem, role) = class.split_at_checked(self.stem.len())?;
        let known = role.is_empty() || ROLES.iter().any(|known| role.starts_with(known));
        (stem.eq_ignore_ascii_case(self.stem) && known).then(|| format!("{}{role}", self.stem))
    }
}

#[derive(Debug)]
struct Catalog {
    families: Vec<Family>,
    kinds: Vec<Kind>,
}

static DATA: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/catalog");

/// The data is compiled in and a test parses it, so that this panic can't happen in a build that passed its tests.
static CATALOG: LazyLock<Catalog> =
    LazyLock::new(|| Catalog::parse().unwrap_or_else(|reason| panic!("the catalog compiled into roofbench: {reason}")));

/// A family in `workloads.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Workload {
    checkpoint: String,
    vocoder: Option<String>,
    class: String,
    #[serde(default = "f32_name")]
    dtype: String,
    cells: Vec<Cell>,
}

fn f32_name() -> String {
    "f32".to_owned()
}

/// `about.json` of a checkpoint.
#[derive(Deserialize)]
struct About {
    family: String,
    class: String,
    parameters: u64,
    license: String,
    gated: bool,
    task: String,
}

/// A JSON object in the file's own order.
type Ordered = serde_json::Map<String, Value>;

impl Catalog {
    fn parse() -> Result<Self, String> {
        let stems: &'static Ordered = Box::leak(Box::new(embedded(&DATA, "families.json")?));
        let mut checkpoints = checkpoints()?;
        let mut catalog = Self { families: Vec::new(), kinds: Vec::new() };
        for (modality, group) in embedded::<Ordered>(&DATA, "workloads.json")? {
            if modality == "about" {
                continue;
            }
            let modality: Modality = from_value("workloads.json", Value::String(modality))?;
            for (name, entry) in from_value::<Ordered>("workloads.json", group)? {
                let workload: Workload = from_value(&format!("workloads.json: {name}"), entry)?;
                let kinds = stems.get(&name).and_then(Value::as_object).ok_or(format!("families.json lacks {name}"))?;
                for (model_type, stem) in kinds {
                    let stem = stem.as_str().ok_or(format!("families.json: {model_type}"))?;
                    catalog.kinds.push(Kind { model_type, stem, family: catalog.families.len() });
                }
                let mut checkpoints = checkpoints.remove(&name).unwrap_or_default();
                checkpoints.sort_by_key(|known| known.repository != workload.checkpoint);
                let mut cells = workload.cells;
                if let Some(vocoder) = &workload.vocoder {
                    // it is an argument of the cells' call, and its config one of their checkpoint's
                    let known = checkpoints.iter().find(|known| known.repository == *vocoder);
                    let config = known.ok_or(format!("{vocoder} is unknown"))?.config.clone();
                    if let Some(checkpoint) = checkpoints.first_mut() {
                        checkpoint.extra_configs.insert("vocoder_config.json".to_owned(), config);
                    }
                    for cell in &mut cells {
                        cell.arguments.insert("vocoder".to_owned(), Value::String(vocoder.clone()));
                    }
                }
                catalog.families.push(Family {
                    model_types: kinds.keys().cloned().collect(),
                    name,
                    modality,
                    default_checkpoint: workload.checkpoint,
                    vocoder: workload.vocoder,
                    class: workload.class,
                    dtype: workload.dtype,
                    checkpoints,
                    cells,
                });
            }
        }
        match checkpoints.keys().next() {
            Some(family) => Err(format!("checkpoints of the unknown family {family}")),
            None => Ok(catalog),
        }
    }
}

/// All checkpoints by family, each family's in order of their names.
fn checkpoints() -> Result<BTreeMap<String, Vec<Checkpoint>>, String> {
    let mut by_family: BTreeMap<String, Vec<Checkpoint>> = BTreeMap::new();
    let configs = DATA.get_dir("configs").ok_or("no configs")?;
    for folder in configs.dirs().flat_map(Dir::dirs) {
        let repository = folder.path().strip_prefix("configs").map_err(|error| error.to_string())?;
        let about: About = embedded(folder, "about.json")?;
        let mut configs = BTreeMap::new();
        for file in folder.files() {
            let name = file.path().file_name().and_then(|name| name.to_str()).ok_or("a name that is not UTF-8")?;
            if name.ends_with("config.json") {
                configs.insert(name.to_owned(), embedded(folder, name)?);
            }
        }
        let repository = repository.to_str().ok_or("a name that is not UTF-8")?.replace('\\', "/");
        let config = configs.remove("config.json").ok_or(format!("{repository} has no config.json"))?;
        by_family.entry(about.family).or_default().push(Checkpoint {
            repository,
            class: about.class,
            parameters: about.parameters,
            license: about.license,
            gated: about.gated,
            task: about.task,
            config,
            extra_configs: configs,
        });
    }
    by_family.values_mut().for_each(|known| known.sort_by(|a, b| a.repository.cmp(&b.repository)));
    Ok(by_family)
}

fn embedded<T: serde::de::DeserializeOwned>(folder: &Dir<'_>, name: &str) -> Result<T, String> {
    let path = folder.path().join(name);
    let file = DATA.get_file(&path).ok_or(format!("{} is missing", path.display()))?;
    serde_json::from_slice(file.contents()).map_err(|error| format!("{}: {error}", path.display()))
}

fn from_value<T: serde::de::DeserializeOwned>(what: &str, value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| format!("{what}: {error}"))
}

fn did_you_mean(suggestion: &Option<&'static str>) -> String {
    suggestion.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default()
}

/// The candidate that takes the fewest edits, letter case and hyphens aside, if those are few for its length.
fn nearest<'a>(given: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_lowercase().replace(['-', '_'], "");
    let measured = candidates.map(|known| (edit_distance(&plain(given), &plain(known)), known));
    let (edits, found) = measured.min_by_key(|&(edits, _)| edits)?;
    (edits <= 1 + found.len() / 4).then_some(found)
}

/// Levenshtein's.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn all_36_families_are_complete() {
        let count = |modality| families().iter().filter(|family| family.modality == modality).count();
        let counts = [Modality::Text, Modality::Vision, Modality::Speech, Modality::Multimodal].map(count);
        assert_eq!((families().len(), counts), (36, [9, 7, 7, 13]));
        assert!(families().is_sorted_by_key(|family| family.modality));
        for family in families() {
            let name = &family.name;
            assert!(!family.cells.is_empty() && !family.model_types.is_empty(), "{name}");
            assert!(["f32", "bf16"].contains(&family.dtype.as_str()), "{name}");
            let default = family.checkpoints.first().unwrap_or_else(|| panic!("{name}: no checkpoint"));
            assert_eq!(default.repository, family.default_checkpoint, "{name}");
            for known in &family.checkpoints {
                assert!(known.config.is_object() && known.parameters > 1_000_000, "{}", known.repository);
                assert!(!known.license.is_empty() && !known.task.is_empty(), "{}", known.repository);
                assert_eq!(checkpoint(&known.repository).unwrap().0.name, *name);
            }
            if let Some(vocoder) = &family.vocoder {
                assert_eq!(checkpoint(vocoder).unwrap().0.name, *name);
            }
            assert_eq!(super::family(name).unwrap().name, *name);
        }
        let embedded = DATA.get_dir("configs").unwrap().dirs().flat_map(Dir::dirs).count();
        assert_eq!(families().iter().map(|family| family.checkpoints.len()).sum::<usize>(), embedded);
        let listed: Ordered = super::embedded(&DATA, "families.json").unwrap();
        assert_eq!(listed.len(), 1 + families().len());
    }

    #[test]
    fn every_embedded_config_is_its_own_familys() {
        for family in families() {
            for known in &family.checkpoints {
                let detected = detect(&known.config).unwrap_or_else(|error| panic!("{}: {error}", known.repository));
                assert_eq!(detected.family.name, family.name, "{}", known.repository);
                let mut without_type = known.config.clone();
                if without_type.as_object_mut().unwrap().remove("model_type").is_some()
                    && known.config.get("architectures").is_some()
                {
                    assert_eq!(detect(&without_type).unwrap().class, detected.class, "{}", known.repository);
                }
                let model_type = known.config["model_type"].as_str().unwrap().to_owned();
                assert!(family.model_types.contains(&model_type), "{}", known.repository);
            }
        }
    }

    #[test]
    fn classes_come_from_architectures_and_else_from_the_catalog() {
        for (config, family, class) in [
            (json!({"model_type": "bert", "architectures": ["BertModel"]}), "bert", "BertModel"),
            (json!({"architectures": ["Blip2ForImageTextRetrieval"]}), "blip-2", "Blip2ForImageTextRetrieval"),
            (json!({"architectures": ["Phi3ForCausalLM"]}), "phi", "Phi3ForCausalLM"),
            (json!({"architectures": ["MPTForCausalLM"]}), "mpt", "MptForCausalLM"),
            (json!({"architectures": ["GPT2LMHeadModel"]}), "gpt2", "GPT2LMHeadModel"),
            (json!({"architectures": ["UniSpeechSatForCTC"]}), "unispeech", "UniSpeechSatForCTC"),
            (json!({"architectures": ["CLIPVisionModelWithProjection"]}), "clip", "CLIPVisionModelWithProjection"),
            (json!({"architectures": ["FlavaImageCodebook"]}), "flava", "FlavaImageCodebook"),
            (json!({"architectures": ["SpeechT5HifiGan"]}), "speecht5", "SpeechT5HifiGan"),
            (json!({"model_type": "layoutlm"}), "layoutlm", "LayoutLMModel"),
            (json!({"model_type": "hifigan", "architectures": []}), "speecht5", "SpeechT5HifiGan"),
            (json!({"model_type": "dinov2_with_registers"}), "dinov2", "Dinov2WithRegistersModel"),
            (json!({"model_type": "clip_vision_model", "architectures": null}), "clip", "CLIPVisionModel"),
        ] {
            let detected = detect(&config).unwrap_or_else(|error| panic!("{config}: {error}"));
            assert_eq!((detected.family.name.as_str(), detected.class.as_str()), (family, class), "{config}");
        }
    }

    #[test]
    fn configs_of_other_models_are_refused_with_what_would_do() {
        for (config, named) in [
            (json!({}), "neither `model_type` nor `architectures`"),
            (json!([1, 2]), "neither"),
            (json!("bert"), "neither"),
            (json!({"model_type": null, "architectures": []}), "neither"),
            (json!({"model_type": 7}), "`model_type` = 7"),
            (json!({"model_type": "mamba"}), "`model_type` = \"mamba\""),
            (json!({"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}}), "\"vit\""),
            (json!({"model_type": "vision-encoder-decoder"}), "encoder.model_type"),
            (json!({"architectures": ["CLIPSegModel"]}), "CLIPSegModel"),
            (json!({"architectures": ["Wav2Vec2ConformerForCTC"]}), "Wav2Vec2ConformerForCTC"),
            (json!({"architectures": ["ViTMAEForPreTraining"]}), "ViTMAEForPreTraining"),
            (json!({"architectures": ["größe"]}), "größe"),
            (json!({"architectures": [""]}), "architectures"),
        ] {
            let message = detect(&config).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("bert, gpt2, t5"), "{config}: {message}");
        }
        let foreign = json!({"model_type": "bert", "architectures": ["LlamaForCausalLM"]});
        let message = detect(&foreign).unwrap_err().to_string();
        assert!(message.contains("LlamaForCausalLM") && message.contains("`bert`"), "{message}");
    }

    #[test]
    fn misspelt_names_get_a_suggestion() {
        for (given, near) in
            [("brt", "bert"), ("BERT", "bert"), ("blip2", "blip-2"), ("BLIP_2", "blip-2"), ("wishper", "whisper")]
        {
            let message = family(given).unwrap_err().to_string();
            assert!(message.contains(&format!("did you mean `{near}`?")), "{message}");
            assert!(message.contains("videomae"), "{message}");
        }
        assert!(!family("zzzzzzzz").unwrap_err().to_string().contains("did you mean"));
        let message = checkpoint("google-bert/bert-base-cased").unwrap_err().to_string();
        assert!(message.contains("did you mean `google-bert/bert-base-uncased`?"), "{message}");
    }
}
