//! Where weights come from: a seed, a folder, or the Hub; always handed out as a candle `VarBuilder`.
//!
//! A model asks for tensors by the names that `transformers` saves for its class. What a published file calls otherwise
//! is renamed by [`AliasRule`]s when it is opened, so that no model carries a second set of names.
//!
//! **Optional tensors are decided by the config, not by looking.** A synthetic checkpoint has every tensor that it is
//! asked for, so `contains_tensor` is true there for every name that no alias rule renames or drops; a model that looks
//! for a tensor to decide whether, say, its output matrix is tied would be another model with synthetic weights.

mod aliases;
mod hub;
mod local;
pub mod synthetic;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use serde_json::Value;

use self::aliases::Aliases;
use self::local::Checkpoint;

pub use self::hub::HubOptions;

/// A source of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Values of [`synthetic`] from this seed.
    Synthetic {
        /// Seed.
        seed: u64,
    },
    /// None: every tensor has the shape that is asked for and takes no memory. For what follows from sizes alone, and
    /// with blocks that keep no more than those.
    Sizes,
    /// A folder (or one file): safetensors, sharded safetensors with its index, or PyTorch `.bin`.
    Local {
        /// Path.
        path: PathBuf,
    },
    /// A repository on the Hub.
    Hub {
        /// `owner/name`.
        repository: String,
        /// Branch, tag or commit; `main` when absent.
        revision: Option<String>,
    },
}

/// A rule that maps names in published checkpoints to those that the model asks for.
///
/// Rules apply in order, each to the result of the one before. A name that ends up as one the model already found
/// under its own spelling gives way to that.
#[derive(Debug, Clone, Copy)]
pub struct AliasRule {
    /// Regular expression on the name.
    pub pattern: &'static str,
    /// Replacement (`$1` is the first group), or `None` to drop the tensor.
    pub replacement: Option<&'static str>,
    /// Which classes it is for.
    pub applies: AliasScope,
}

impl AliasRule {
    /// Gives names another form.
    pub const fn rename(pattern: &'static str, replacement: &'static str, applies: AliasScope) -> Self {
        Self { pattern, replacement: Some(replacement), applies }
    }

    /// Leaves tensors unread.
    pub const fn drop(pattern: &'static str, applies: AliasScope) -> Self {
        Self { pattern, replacement: None, applies }
    }
}

/// Which classes a rule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AliasScope {
    /// Every class.
    Always,
    /// Base models (`BertModel`), which carry no prefix and no head.
    Base,
    /// Classes with a head (`BertForMaskedLM`).
    Head,
    /// This class alone.
    Class(&'static str),
}

/// Names and shapes that a model asked for.
pub type Requested = BTreeMap<String, Vec<usize>>;

/// Opened weights: hands out tensors and keeps account of what was asked for.
#[derive(Debug)]
pub struct Weights {
    shared: Arc<Shared>,
}

/// What the `VarBuilder`s and [`Weights`] have in common.
#[derive(Debug)]
struct Shared {
    origin: Origin,
    aliases: Aliases,
    requested: Mutex<Requested>,
}

#[derive(Debug)]
enum Origin {
    Synthetic { seed: u64 },
    Sizes,
    Stored { label: String, checkpoint: Checkpoint },
}

/// What weights were read, for a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// `synthetic:0`, the path, or `owner/name@commit`.
    pub source: String,
    /// Files that hold tensors; none when synthetic.
    pub files: Vec<PathBuf>,
    /// Their size in bytes; absent when synthetic.
    pub bytes: Option<u64>,
    /// Types that tensors are stored in, sorted; none when synthetic.
    pub stored_dtypes: Vec<String>,
}

impl Weights {
    /// Opens `source` for `class` (`BertForMaskedLM`), whose names follow from `rules`. Files are checked and mapped
    /// into memory; no tensor is read yet.
    ///
    /// # Errors
    /// Names the file, tensor or repository that is missing, damaged or refused, and the way out.
    pub fn open(source: &Source, rules: &[AliasRule], class: &str, hub: &HubOptions) -> Result<Self, WeightsError> {
        let aliases = Aliases::compile(rules, class)?;
        let origin = match source {
            Source::Synthetic { seed } => Origin::Synthetic { seed: *seed },
            Source::Sizes => Origin::Sizes,
            Source::Local { path } => {
                Origin::Stored { label: path.display().to_string(), checkpoint: Checkpoint::open(path, &aliases)? }
            }
            Source::Hub { repository, revision } => {
                let snapshot = hub::snapshot(repository, revision.as_deref(), hub)?;
                let label = format!("{repository}@{}", snapshot.commit);
                Origin::Stored { label, checkpoint: Checkpoint::open(&snapshot.folder, &aliases)? }
            }
        };
        Ok(Self { shared: Arc::new(Shared { origin, aliases, requested: Mutex::default() }) })
    }

    /// Weights of a second model that goes with this one: of the same seed where these are synthetic, sizes alone where
    /// these are, else those in the folder `name` beside them, when it is there.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn beside(&self, name: &str, rules: &[AliasRule], class: &str) -> Result<Option<Self>, WeightsError> {
        let source = match &self.shared.origin {
            Origin::Synthetic { seed } => Source::Synthetic { seed: *seed },
            Origin::Sizes => Source::Sizes,
            Origin::Stored { checkpoint, .. } => {
                let path = checkpoint.folder().join(name);
                if !path.is_dir() {
                    return Ok(None);
                }
                Source::Local { path }
            }
        };
        Self::open(&source, rules, class, &HubOptions::default()).map(Some)
    }

    /// A builder whose tensors arrive as `dtype` on `device`, converted one by one as they are asked for.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Backend(Arc::clone(&self.shared))), dtype, device.clone())
    }

    /// Names and shapes that models have asked for so far.
    pub fn requested(&self) -> Requested {
        self.shared.requested().clone()
    }

    /// After the model is built: every tensor of the checkpoint was asked for, dropped by a rule, or `ignore_extra`.
    ///
    /// # Errors
    /// [`WeightsError::Extra`] names the first few that nobody asked for.
    pub fn check_complete(&self, ignore_extra: bool) -> Result<(), WeightsError> {
        let Origin::Stored { checkpoint, .. } = &self.shared.origin else { return Ok(()) };
        let requested = self.shared.requested();
        let mut extra = checkpoint.names().filter(|name| !requested.contains_key(*name)).peekable();
        if ignore_extra || extra.peek().is_none() {
            return Ok(());
        }
        let extra: Vec<&str> = extra.collect();
        let mut names = extra.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        if extra.len() > 5 {
            names.push_str(", …");
        }
        Err(WeightsError::Extra { file: checkpoint.path().to_owned(), count: extra.len(), names })
    }

    /// `config.json` beside the weights.
    ///
    /// # Errors
    /// [`WeightsError::NoConfig`] when there is none (synthetic weights have none), or that it can't be read.
    pub fn config(&self) -> Result<Value, WeightsError> {
        match self.file("config.json") {
            Some(path) => local::read_json(&path),
            None => Err(WeightsError::NoConfig { source_label: self.describe().source }),
        }
    }

    /// Other `*config.json` files beside the weights, by file name.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn extra_configs(&self) -> Result<BTreeMap<String, Value>, WeightsError> {
        let Some(folder) = self.folder() else { return Ok(BTreeMap::new()) };
        let names = local::file_names(folder)?;
        let wanted = names.into_iter().filter(|name| name.ends_with("config.json") && name != "config.json");
        wanted.map(|name| local::read_json(&folder.join(&name)).map(|value| (name, value))).collect()
    }

    /// Another file beside the weights (`tokenizer.json`), when it is there.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        self.folder().map(|folder| folder.join(name)).filter(|path| path.is_file())
    }

    /// What was opened, for a record.
    pub fn describe(&self) -> Description {
        let made = |source: String| Description { source, files: Vec::new(), bytes: None, stored_dtypes: Vec::new() };
        match &self.shared.origin {
            Origin::Synthetic { seed } => made(format!("synthetic:{seed}")),
            Origin::Sizes => made("sizes".to_owned()),
            Origin::Stored { label, checkpoint } => Description {
                source: label.clone(),
                files: checkpoint.files().map(Path::to_owned).collect(),
                bytes: Some(checkpoint.bytes()),
                stored_dtypes: checkpoint.stored_dtypes(),
            },
        }
    }

    fn folder(&self) -> Option<&Path> {
        match &self.shared.origin {
            Origin::Synthetic { .. } | Origin::Sizes => None,
            Origin::Stored { checkpoint, .. } => Some(checkpoint.folder()),
        }
    }
}

impl Shared {
    /// A panic elsewhere leaves the account as it was: each entry is written whole.
    fn requested(&self) -> MutexGuard<'_, Requested> {
        self.requested.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tensor, of `shape` where one is expected.
    fn get(&self, name: &str, shape: Option<&[usize]>, dtype: DType, device: &Device) -> Result<Tensor, WeightsError> {
        let shape_of = || shape.ok_or_else(|| WeightsError::SyntheticShape { name: name.to_owned() });
        let tensor = match &self.origin {
            Origin::Synthetic { seed } => synthetic::tensor(name, shape_of()?, *seed, dtype, device)?,
            Origin::Sizes => {
                let shape = shape_of()?;
                let all = Tensor::zeros((), dtype, device).and_then(|zero| zero.broadcast_as(shape));
                all.map_err(|source| WeightsError::Tensor { name: name.to_owned(), source: Box::new(source) })?
            }
            Origin::Stored { checkpoint, .. } => checkpoint.load(name, shape, dtype, device)?,
        };
        self.requested().insert(name.to_owned(), tensor.dims().to_vec());
        Ok(tensor)
    }

    fn contains(&self, name: &str) -> bool {
        match &self.origin {
            Origin::Synthetic { .. } | Origin::Sizes => self.aliases.apply(name).as_deref() == Some(name),
            Origin::Stored { checkpoint, .. } => checkpoint.contains(name),
        }
    }
}

struct Backend(Arc<Shared>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.get(name, Some(shape.dims()), dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.0.get(name, None, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

impl From<WeightsError> for candle_core::Error {
    fn from(error: WeightsError) -> Self {
        Self::Wrapped(Box::new(error))
    }
}

/// Why weights could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The model asks for a tensor that the checkpoint lacks.
    #[error("{}: tensor `{name}` is missing; the class may need another checkpoint", .file.display())]
    Missing {
        /// Checkpoint.
        file: PathBuf,
        /// Tensor.
        name: String,
    },
    /// A tensor has another shape than the model's.
    #[error("{}: tensor `{name}` has shape {found:?}, the model expects {expected:?}", .file.display())]
    ShapeMismatch {
        /// Checkpoint.
        file: PathBuf,
        /// Tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the config implies.
        expected: Vec<usize>,
    },
    /// The checkpoint holds tensors that the model did not ask for.
    #[error(
        "{}: the model does not use {count} of its tensors: {names}; \
         another class may fit the checkpoint, or pass --ignore-extra-tensors",
        .file.display()
    )]
    Extra {
        /// Checkpoint.
        file: PathBuf,
        /// How many.
        count: usize,
        /// The first few.
        names: String,
    },
    /// A file can't be read.
    #[error("{}: {source}", .file.display())]
    Io {
        /// File or folder.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There are no weights where they were looked for.
    #[error("{}: {reason}", .path.display())]
    NoWeights {
        /// File or folder.
        path: PathBuf,
        /// What was looked for and what is there.
        reason: String,
    },
    /// There is no config.json.
    #[error("{source_label} has no config.json; take the config from the catalog or name a file")]
    NoConfig {
        /// The weights.
        source_label: String,
    },
    /// A file is not what its name says.
    #[error("{}: {reason}; the file is damaged, fetch it again", .file.display())]
    Damaged {
        /// File.
        file: PathBuf,
        /// What is wrong, with the tensor's name where it is one tensor.
        reason: String,
    },
    /// Git LFS left its pointer where the file should be.
    #[error("{}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository", .file.display())]
    LfsPointer {
        /// File.
        file: PathBuf,
    },
    /// Written in a form that is not read.
    #[error("{}: {reason}", .file.display())]
    Unsupported {
        /// File.
        file: PathBuf,
        /// What it is, and what to do.
        reason: String,
    },
    /// A tensor is stored in a type that is not read.
    #[error(
        "{}: tensor `{name}` is stored as {dtype}, which is not supported; convert the checkpoint to f32, f16 or bf16",
        .file.display()
    )]
    UnsupportedDtype {
        /// Checkpoint.
        file: PathBuf,
        /// Tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// The index of a sharded checkpoint names a file that is not there.
    #[error("{}: names `{shard}`, which is not beside it; fetch the whole repository", .index.display())]
    ShardMissing {
        /// Index.
        index: PathBuf,
        /// Shard.
        shard: String,
    },
    /// The index of a sharded checkpoint names a file outside its folder.
    #[error("{}: names `{shard}`, which is not a file of the same folder; do not trust it", .index.display())]
    ShardOutside {
        /// Index.
        index: PathBuf,
        /// Shard.
        shard: String,
    },
    /// A shard lacks a tensor that the index promises.
    #[error("{}: places tensor `{name}` in `{shard}`, which lacks it; fetch the repository again", .index.display())]
    ShardLacks {
        /// Index.
        index: PathBuf,
        /// Shard.
        shard: String,
        /// Tensor.
        name: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor `{name}` is in {} and in {}; keep the shards of one only", .first.display(), .second.display())]
    Duplicate {
        /// Tensor.
        name: String,
        /// One shard.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Synthetic weights are floating-point numbers.
    #[error(
        "tensor `{name}`: synthetic weights are f32, f64, bf16 or f16, not {dtype}; buffers follow from the config"
    )]
    SyntheticDtype {
        /// Tensor.
        name: String,
        /// Type asked for.
        dtype: &'static str,
    },
    /// Synthetic weights follow from the shape.
    #[error("tensor `{name}`: synthetic weights need a shape; ask with `get`, not `get_unchecked`")]
    SyntheticShape {
        /// Tensor.
        name: String,
    },
    /// More elements than memory holds.
    #[error(
        "tensor `{name}` of shape {shape:?} does not fit in memory; try a smaller checkpoint or a narrower --dtype"
    )]
    TooLarge {
        /// Tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// An alias rule is not a regular expression.
    #[error("alias rule `{pattern}`: {source}")]
    Rule {
        /// The rule.
        pattern: String,
        /// Why.
        source: Box<regex::Error>,
    },
    /// A repository name or revision is malformed.
    #[error("`{given}` is not {expected}")]
    HubName {
        /// As given.
        given: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The network is off and the cache lacks the repository.
    #[error(
        "{repository}: not in the cache {} and offline; fetch it once without --offline and HF_HUB_OFFLINE, \
         or name a folder",
        .cache.display()
    )]
    HubOffline {
        /// Repository and revision.
        repository: String,
        /// Cache folder.
        cache: PathBuf,
    },
    /// The Hub refused access.
    #[error(
        "{repository}: the Hub refuses access ({status}); accept the licence at {page} and pass a token \
         (HF_TOKEN, or `hf auth login`)"
    )]
    HubDenied {
        /// Repository and revision.
        repository: String,
        /// HTTP status.
        status: u16,
        /// The model's page.
        page: String,
    },
    /// The Hub has no such repository, revision or file.
    #[error("{repository}: the Hub has no such repository, revision or file (404); check the spelling")]
    HubNotFound {
        /// Repository and revision.
        repository: String,
    },
    /// The Hub wants fewer requests.
    #[error(
        "{repository}: the Hub answers too many requests (429); wait a few minutes, or pass a token, which may ask more \
         often (HF_TOKEN, or `hf auth login`)"
    )]
    HubBusy {
        /// Repository and revision.
        repository: String,
    },
    /// What arrived is not what the Hub has.
    #[error(
        "{repository}: {file} arrived damaged: its SHA-256 is not the one that the Hub tells. It was taken out of the cache; \
         try again, or ask another endpoint (HF_ENDPOINT)"
    )]
    HubDamaged {
        /// Repository and revision.
        repository: String,
        /// File.
        file: String,
    },
    /// The repository holds no weights in a form that is read.
    #[error("{repository}: holds no model.safetensors or pytorch_model.bin, whole or sharded; it has {files}")]
    HubNoWeights {
        /// Repository and revision.
        repository: String,
        /// What it holds.
        files: String,
    },
    /// The Hub could not be asked.
    #[error("{repository}: {source}; check the connection, or use what is cached with --offline")]
    Hub {
        /// Repository and revision.
        repository: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A tensor could not be made or converted on the device.
    #[error("tensor `{name}`: {source}")]
    Tensor {
        /// Tensor.
        name: String,
        /// Why.
        source: Box<candle_core::Error>,
    },
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::local::tests::of_tensors;
    use super::*;

    const ALWAYS: AliasScope = AliasScope::Always;

    const fn rule(pattern: &'static str, replacement: Option<&'static str>, applies: AliasScope) -> AliasRule {
        AliasRule { pattern, replacement, applies }
    }

    /// Those of the crate for text.
    const BERT: [AliasRule; 10] = [
        rule(r"LayerNorm\.gamma$", Some("LayerNorm.weight"), ALWAYS),
        rule(r"LayerNorm\.beta$", Some("LayerNorm.bias"), ALWAYS),
        rule(r"^cls\.seq_relationship\.", None, ALWAYS),
        rule(r"^cls\.predictions\.decoder\.weight$", Some("bert.embeddings.word_embeddings.weight"), ALWAYS),
        rule(r"^cls\.predictions\.decoder\.bias$", Some("cls.predictions.bias"), ALWAYS),
        rule(r"\.position_ids$", None, ALWAYS),
        rule(r"^bert\.", Some(""), AliasScope::Base),
        rule(r"^(cls|classifier)\.", None, AliasScope::Base),
        rule(r"^(embeddings|encoder|pooler)\.", Some("bert.$1."), AliasScope::Head),
        rule(r"^bert\.pooler\.", None, AliasScope::Head),
    ];

    /// Those of the crate for vision.
    const VIT: [AliasRule; 4] = [
        rule(r"^vit\.", Some(""), AliasScope::Base),
        rule(r"^classifier\.", None, AliasScope::Base),
        rule(r"^(embeddings|encoder|layernorm|pooler)\.", Some("vit.$1."), AliasScope::Head),
        rule(r"^vit\.pooler\.", None, AliasScope::Head),
    ];

    /// In the manner of google-bert/bert-base-uncased.
    const BERT_FILE: [(&str, &[usize]); 7] = [
        ("bert.embeddings.LayerNorm.beta", &[4]),
        ("bert.embeddings.LayerNorm.gamma", &[4]),
        ("bert.embeddings.word_embeddings.weight", &[9, 4]),
        ("bert.embeddings.position_ids", &[1, 6]),
        ("bert.pooler.dense.bias", &[4]),
        ("cls.predictions.bias", &[9]),
        ("cls.seq_relationship.bias", &[2]),
    ];

    fn hub() -> HubOptions {
        HubOptions {
            token: None,
            endpoint: "http://127.0.0.1:1".to_owned(),
            cache: PathBuf::from("no-cache"),
            offline: true,
            progress: false,
        }
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn open(folder: &TempDir, rules: &[AliasRule], class: &str) -> Weights {
        Weights::open(&Source::Local { path: folder.path().to_owned() }, rules, class, &hub()).unwrap()
    }

    fn synthetic(rules: &[AliasRule], class: &str) -> Weights {
        Weights::open(&Source::Synthetic { seed: 3 }, rules, class, &hub()).unwrap()
    }

    #[test]
    fn a_heads_checkpoint_serves_its_class_and_the_base_model() {
        let folder = folder(&[("model.safetensors", &of_tensors(&BERT_FILE))]);
        for (class, prefix) in [("BertForMaskedLM", "bert."), ("BertModel", "")] {
            let weights = open(&folder, &BERT, class);
            let root = weights.var_builder(DType::F32, &Device::Cpu);
            let embeddings = root.pp(format!("{prefix}embeddings"));
            embeddings.get((9, 4), "word_embeddings.weight").unwrap();
            embeddings.pp("LayerNorm").get(4, "weight").unwrap();
            embeddings.pp("LayerNorm").get(4, "bias").unwrap();
            assert!(weights.check_complete(false).is_err(), "{class}");
            if class == "BertModel" {
                root.pp("pooler.dense").get(4, "bias").unwrap();
                assert!(!root.contains_tensor("cls.predictions.bias"));
            } else {
                root.pp("cls.predictions").get(9, "bias").unwrap();
                assert!(!root.contains_tensor("bert.pooler.dense.bias"));
            }
            weights.check_complete(false).unwrap();
            assert_eq!(weights.requested().len(), 4, "{class}");
            assert_eq!(weights.requested()[&format!("{prefix}embeddings.word_embeddings.weight")], [9, 4]);
        }
    }

    #[test]
    fn a_base_models_checkpoint_serves_a_head() {
        let file = [("embeddings.cls_token", &[1, 1, 4][..]), ("layernorm.bias", &[4]), ("pooler.dense.bias", &[4])];
        let folder = folder(&[("model.safetensors", &of_tensors(&file))]);
        let weights = open(&folder, &VIT, "ViTForImageClassification");
        let vit = weights.var_builder(DType::F32, &Device::Cpu).pp("vit");
        vit.get((1, 1, 4), "embeddings.cls_token").unwrap();
        vit.get(4, "layernorm.bias").unwrap();
        weights.check_complete(false).unwrap();
        let message = vit.root().get(10, "classifier.bias").unwrap_err().to_string();
        assert!(message.contains("model.safetensors") && message.contains("`classifier.bias`"), "{message}");
    }

    #[test]
    fn tensors_that_nobody_asks_for_are_named_and_may_be_ignored() {
        let names: Vec<String> = (0..8).map(|i| format!("head.{i}")).collect();
        let file: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), &[2][..])).collect();
        let folder = folder(&[("model.safetensors", &of_tensors(&file))]);
        let weights = open(&folder, &[], "BertModel");
        let root = weights.var_builder(DType::F32, &Device::Cpu);
        root.get(2, "head.0").unwrap();
        let message = weights.check_complete(false).unwrap_err().to_string();
        assert!(message.contains("model.safetensors") && message.contains("7 of its tensors: `head.1`"), "{message}");
        assert!(message.contains("`head.5`, …") && message.contains("--ignore-extra-tensors"), "{message}");
        assert!(!message.contains("head.6"), "{message}");
        weights.check_complete(true).unwrap();
        root.get(2, "head.1").unwrap();
        assert!(weights.check_complete(false).unwrap_err().to_string().contains("6 of its tensors"));
    }

    #[test]
    fn scope_follows_from_the_class() {
        for class in ["BertModel", "ViTModel", "CLIPModel", "VisionEncoderDecoderModel"] {
            assert_eq!(AliasScope::of(class), AliasScope::Base, "{class}");
        }
        for class in ["BertForMaskedLM", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "CLIPTextModelWithProjection", ""] {
            assert_eq!(AliasScope::of(class), AliasScope::Head, "{class}");
        }
    }

    #[test]
    fn a_rule_that_is_no_regular_expression_is_named() {
        let broken = [rule("(", None, ALWAYS)];
        let message = Weights::open(&Source::Synthetic { seed: 0 }, &broken, "M", &hub()).unwrap_err().to_string();
        assert!(message.contains("`(`"), "{message}");
    }

    #[test]
    fn sizes_are_handed_out_and_noted_without_memory() {
        let weights = Weights::open(&Source::Sizes, &[], "M", &hub()).unwrap();
        let vb = weights.var_builder(DType::BF16, &Device::Cpu);
        let tensor = vb.get((1 << 20, 1 << 20), "huge").unwrap();
        assert_eq!((tensor.dims(), tensor.dtype()), (&[1 << 20, 1 << 20][..], DType::BF16));
        assert_eq!(weights.requested()["huge"], [1 << 20, 1 << 20]);
        assert!(weights.check_complete(false).is_ok() && weights.file("config.json").is_none());
    }

    #[test]
    fn synthetic_weights_have_every_tensor_but_aliases() {
        let weights = synthetic(&BERT, "BertForMaskedLM");
        let root = weights.var_builder(DType::BF16, &Device::Cpu);
        assert!(root.contains_tensor("bert.anything.weight"));
        for alias in ["cls.predictions.decoder.weight", "bert.pooler.dense.bias", "embeddings.LayerNorm.weight"] {
            assert!(!root.contains_tensor(alias), "{alias}");
        }
        let made = root.pp("bert.a").get((2, 3), "weight").unwrap();
        let expected = synthetic::tensor("bert.a.weight", &[2, 3], 3, DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(made.to_vec2::<half::bf16>().unwrap(), expected.to_vec2::<half::bf16>().unwrap());
        assert_eq!(weights.requested(), Requested::from([("bert.a.weight".to_owned(), vec![2, 3])]));
        weights.check_complete(false).unwrap();
        assert!(root.get_unchecked("bert.a.weight").unwrap_err().to_string().contains("need a shape"));
    }

    #[test]
    fn what_was_opened_is_described() {
        let weights = synthetic(&[], "BertModel");
        let described = weights.describe();
        assert_eq!((described.source.as_str(), described.bytes, described.files.len()), ("synthetic:3", None, 0));
        assert!(weights.config().unwrap_err().to_string().contains("synthetic:3 has no config.json"));
        assert!(weights.extra_configs().unwrap().is_empty() && weights.file("tokenizer.json").is_none());

        let file = of_tensors(&[("a", &[2])]);
        let folder = folder(&[
            ("model.safetensors", &file),
            ("config.json", br#"{"model_type": "bert"}"#),
            ("generation_config.json", br#"{"eos_token_id": 2}"#),
            ("tokenizer.json", b"{}"),
        ]);
        let weights = open(&folder, &[], "BertModel");
        let described = weights.describe();
        assert_eq!(described.bytes, Some(file.len() as u64));
        assert_eq!(described.stored_dtypes, ["F32"]);
        assert_eq!(described.files, [folder.path().join("model.safetensors")]);
        assert_eq!(weights.config().unwrap()["model_type"], "bert");
        let extra = weights.extra_configs().unwrap();
        assert_eq!(extra.keys().collect::<Vec<_>>(), ["generation_config.json"]);
        assert_eq!(weights.file("tokenizer.json"), Some(folder.path().join("tokenizer.json")));
        std::fs::write(folder.path().join("config.json"), b"{\"model_type\":").unwrap();
        assert!(weights.config().unwrap_err().to_string().contains("config.json: not JSON"));
    }

    #[test]
    fn a_cached_repository_opens_as_a_folder_does() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--owner--name");
        let snapshot = repository.join("snapshots").join("0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs").join("main"), "0123abcd").unwrap();
        std::fs::write(snapshot.join("model.safetensors"), of_tensors(&[("a", &[2])])).unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        let options = HubOptions { cache: cache.path().to_owned(), ..hub() };
        let source = Source::Hub { repository: "owner/name".to_owned(), revision: None };
        let weights = Weights::open(&source, &[], "BertModel", &options).unwrap();
        assert_eq!(weights.describe().source, "owner/name@0123abcd");
        weights.var_builder(DType::F32, &Device::Cpu).get(2, "a").unwrap();
        weights.check_complete(false).unwrap();
    }
}
