//! Checkpoints on disk: a folder or a file, whole or sharded, safetensors or PyTorch's zip of pickles.
//!
//! Files are not trusted: every offset, shape and name is checked before it is used.

mod pickle;
mod safetensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use self::pickle::PickleFile;
use self::safetensors::SafetensorsFile;
use super::WeightsError;
use super::aliases::Aliases;

/// Whole and sharded checkpoints by file name, in the order in which they are preferred.
pub(super) const WEIGHT_FILES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Far above any real config or index, and far below what would hurt.
const LARGEST_JSON: u64 = 64 << 20;

const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// An opened checkpoint: its tensors by the names that the model knows them by.
#[derive(Debug)]
pub(super) struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Located>,
}

#[derive(Debug)]
struct Located {
    shard: usize,
    stored_name: String,
}

/// One file of tensors.
#[derive(Debug)]
enum Shard {
    Safetensors(SafetensorsFile),
    Pickle(PickleFile),
}

/// A tensor as its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stored {
    shape: Vec<usize>,
    dtype: String,
}

impl Checkpoint {
    /// Opens a folder, a file of tensors or a shard index.
    pub(super) fn open(path: &Path, aliases: &Aliases) -> Result<Self, WeightsError> {
        let metadata = std::fs::metadata(path).map_err(|source| WeightsError::Io { file: path.to_owned(), source })?;
        let path = if metadata.is_dir() { find_weights(path)? } else { path.to_owned() };
        let shards = if path.extension().is_some_and(|extension| extension == "json") {
            open_sharded(&path)?
        } else {
            vec![Shard::open(&path)?]
        };
        let tensors = locate(&shards, aliases)?;
        Ok(Self { path, shards, tensors })
    }

    /// The file of tensors, or the index of several.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where `config.json` and the tokenizer lie.
    pub(super) fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(Shard::path)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.shards.iter().map(Shard::bytes).sum()
    }

    pub(super) fn stored_dtypes(&self) -> Vec<String> {
        let used = self.tensors.values().filter_map(|at| self.shards[at.shard].tensors().get(&at.stored_name));
        used.map(|stored| stored.dtype.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Names that the model may ask for; dropped tensors are not among them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Reads one tensor and converts it; the mapped file itself is not copied as a whole.
    pub(super) fn load(
        &self,
        name: &str,
        shape: Option<&[usize]>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor, WeightsError> {
        let missing = || WeightsError::Missing { file: self.path.clone(), name: name.to_owned() };
        let at = self.tensors.get(name).ok_or_else(missing)?;
        let shard = &self.shards[at.shard];
        let stored = shard.tensors().get(&at.stored_name).ok_or_else(missing)?;
        if let Some(expected) = shape.filter(|&shape| shape != stored.shape) {
            return Err(WeightsError::ShapeMismatch {
                file: shard.path().to_owned(),
                name: at.stored_name.clone(),
                found: stored.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        let tensor = match shard {
            Shard::Safetensors(file) => file.load(&at.stored_name, device)?,
            Shard::Pickle(file) => file.load(&at.stored_name, device)?,
        };
        tensor
            .to_dtype(dtype)
            .map_err(|source| WeightsError::Tensor { name: name.to_owned(), source: Box::new(source) })
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = File::open(path).map_err(|source| WeightsError::Io { file: path.to_owned(), source })?;
        let mut head = Vec::new();
        let limit = LFS_POINTER.len() as u64;
        let read = file.by_ref().take(limit).read_to_end(&mut head);
        read.map_err(|source| WeightsError::Io { file: path.to_owned(), source })?;
        if head == LFS_POINTER {
            return Err(WeightsError::LfsPointer { file: path.to_owned() });
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => SafetensorsFile::open(path, &file).map(Self::Safetensors),
            Some("bin" | "pt" | "pth") => PickleFile::open(path, &head).map(Self::Pickle),
            _ => Err(WeightsError::Unsupported {
                file: path.to_owned(),
                reason: "not a checkpoint; name a folder, or a .safetensors, .bin or .index.json file".to_owned(),
            }),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pickle(file) => file.path(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Safetensors(file) => file.bytes(),
            Self::Pickle(file) => file.bytes(),
        }
    }

    fn tensors(&self) -> &BTreeMap<String, Stored> {
        match self {
            Self::Safetensors(file) => file.tensors(),
            Self::Pickle(file) => file.tensors(),
        }
    }
}

/// The name of every tensor after the rules. One that bears its final name already is preferred to one renamed to it.
fn locate(shards: &[Shard], aliases: &Aliases) -> Result<BTreeMap<String, Located>, WeightsError> {
    let mut stored: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        for name in shard.tensors().keys() {
            if let Some(first) = stored.insert(name, index) {
                return Err(WeightsError::Duplicate {
                    name: name.clone(),
                    first: shards[first].path().to_owned(),
                    second: shard.path().to_owned(),
                });
            }
        }
    }
    let mut located: BTreeMap<String, Located> = BTreeMap::new();
    for (stored_name, shard) in stored {
        let Some(name) = aliases.apply(stored_name) else { continue };
        if name == stored_name || !located.contains_key(&name) {
            located.insert(name, Located { shard, stored_name: stored_name.to_owned() });
        }
    }
    Ok(located)
}

fn find_weights(folder: &Path) -> Result<PathBuf, WeightsError> {
    if let Some(name) = WEIGHT_FILES.iter().find(|name| folder.join(name).exists()) {
        return Ok(folder.join(name));
    }
    let names = file_names(folder)?;
    let there = if names.is_empty() { "it is empty".to_owned() } else { format!("it has {}", some_of(&names)) };
    let reason = format!("no weights; looked for {}, and {there}", WEIGHT_FILES.join(", "));
    Err(WeightsError::NoWeights { path: folder.to_owned(), reason })
}

/// `{"weight_map": {tensor: file}}`
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that a shard index names, checked to lie in its own folder, with the tensors that each should hold.
pub(super) fn shards_of(index: &Path) -> Result<BTreeMap<String, Vec<String>>, WeightsError> {
    let Index { weight_map } = serde_json::from_value(read_json(index)?).map_err(|error| WeightsError::Damaged {
        file: index.to_owned(),
        reason: format!("not an index of shards: {error}"),
    })?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in weight_map {
        shards.entry(shard).or_default().push(name);
    }
    for shard in shards.keys() {
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == shard.as_str()) {
            return Err(WeightsError::ShardOutside { index: index.to_owned(), shard: shard.clone() });
        }
    }
    Ok(shards)
}

fn open_sharded(index: &Path) -> Result<Vec<Shard>, WeightsError> {
    let open = |(shard_name, names): (String, Vec<String>)| {
        let path = folder_of(index).join(&shard_name);
        if !path.exists() {
            return Err(WeightsError::ShardMissing { index: index.to_owned(), shard: shard_name });
        }
        let shard = Shard::open(&path)?;
        match names.into_iter().find(|name| !shard.tensors().contains_key(name)) {
            Some(name) => Err(WeightsError::ShardLacks { index: index.to_owned(), shard: shard_name, name }),
            None => Ok(shard),
        }
    };
    let shards = shards_of(index)?.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    if shards.is_empty() {
        let reason = "the index names no shard".to_owned();
        return Err(WeightsError::Damaged { file: index.to_owned(), reason });
    }
    Ok(shards)
}

/// A whole JSON file, within a size that a config or an index can have.
pub(super) fn read_json(path: &Path) -> Result<Value, WeightsError> {
    let io = |source| WeightsError::Io { file: path.to_owned(), source };
    let damaged = |reason| WeightsError::Damaged { file: path.to_owned(), reason };
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LARGEST_JSON + 1).read_to_end(&mut text)).map_err(io)?;
    if read as u64 > LARGEST_JSON {
        return Err(damaged(format!("larger than the {} MiB that such a file can have", LARGEST_JSON >> 20)));
    }
    if text.starts_with(LFS_POINTER) {
        return Err(WeightsError::LfsPointer { file: path.to_owned() });
    }
    serde_json::from_slice(&text).map_err(|error| damaged(format!("not JSON: {error}")))
}

/// Names of the files in `folder`, sorted; those that are not UTF-8 are none of ours.
pub(super) fn file_names(folder: &Path) -> Result<Vec<String>, WeightsError> {
    let io = |source| WeightsError::Io { file: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if let (Ok(name), true) = (entry.file_name().into_string(), entry.path().is_file()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// At most eight of `names`, for a message.
pub(super) fn some_of(names: &[String]) -> String {
    let more = if names.len() > 8 { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(8)].join(", "))
}

fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The number of elements of `shape`, unless it overflows.
fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, &dimension| count.checked_mul(dimension))
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::weights::{AliasRule, AliasScope};

    /// A safetensors file with this header (as it is) and this many bytes of data.
    pub(in crate::weights) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    /// A well-formed safetensors file of f32 tensors whose elements count up from 0.
    pub(in crate::weights) fn of_tensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        for &(name, shape) in tensors {
            let start = data.len();
            let count = elements(shape).unwrap();
            data.extend((0..count).flat_map(|i| (i as f32).to_le_bytes()));
            header.insert(name.into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
        }
        safetensors(&Value::Object(header).to_string(), &data)
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn plain() -> Aliases {
        Aliases::compile(&[], "BertModel").unwrap()
    }

    fn open_files(files: &[(&str, &[u8])]) -> Result<Checkpoint, WeightsError> {
        Checkpoint::open(folder(files).path(), &plain())
    }

    fn refusal(files: &[(&str, &[u8])]) -> String {
        open_files(files).unwrap_err().to_string()
    }

    fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
        let tensor = checkpoint.load(name, None, DType::F32, &Device::Cpu).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_tensor_is_read_and_converted() {
        let checkpoint = open_files(&[("model.safetensors", &of_tensors(&[("b", &[2]), ("a", &[2, 3])]))]).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(values(&checkpoint, "a"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let half = checkpoint.load("a", Some(&[2, 3]), DType::BF16, &Device::Cpu).unwrap();
        assert_eq!((half.dtype(), half.dims()), (DType::BF16, &[2, 3][..]));
        assert_eq!(checkpoint.stored_dtypes(), ["F32"]);
        assert_eq!(checkpoint.files().count(), 1);
        assert!(checkpoint.bytes() > 32);
    }

    #[test]
    fn missing_and_misshapen_tensors_name_the_file() {
        let checkpoint = open_files(&[("model.safetensors", &of_tensors(&[("a", &[2, 3])]))]).unwrap();
        let refused = |name, shape: &[usize]| {
            checkpoint.load(name, Some(shape), DType::F32, &Device::Cpu).unwrap_err().to_string()
        };
        let message = refused("c", &[1]);
        assert!(message.contains("model.safetensors") && message.contains("`c`"), "{message}");
        let message = refused("a", &[3, 2]);
        assert!(message.contains("model.safetensors") && message.contains("[2, 3]"), "{message}");
        assert!(message.contains("`a`") && message.contains("expects [3, 2]"), "{message}");
    }

    #[test]
    fn hostile_safetensors_are_refused_by_name() {
        let whole = of_tensors(&[("layer.a", &[2, 3]), ("layer.b", &[4])]);
        let entry = |shape: &str, offsets: &str| {
            format!(r#"{{"layer.a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
        };
        let two = |second: &str| {
            format!(
                r#"{{"layer.a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
                     "layer.b": {{"dtype": "F32", "shape": [1], "data_offsets": {second}}}}}"#
            )
        };
        let twice = r#"{"layer.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                        "layer.a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#;
        for (content, named) in [
            (Vec::new(), "0 bytes"),
            (whole[..5].to_vec(), "5 bytes"),
            (whole[..20].to_vec(), "cut off"),
            (whole[..whole.len() - 1].to_vec(), "cut off"),
            ([whole.clone(), vec![0; 3]].concat(), "3 bytes after the last tensor"),
            ([&u64::MAX.to_le_bytes()[..], &[0; 40]].concat(), "not a safetensors file"),
            ([&1000u64.to_le_bytes()[..], &[b' '; 40]].concat(), "claims a header of 1000 bytes"),
            (b"<!DOCTYPE html><html><body>Not found</body></html>".to_vec(), "not a safetensors file"),
            (safetensors("{\"layer.a\": ", &[]), "not JSON"),
            (safetensors("[1, 2]", &[]), "not JSON"),
            (safetensors(&"[".repeat(10_000), &[]), "not JSON"),
            (safetensors("\u{0}\u{1}", &[]), "not JSON"),
            (safetensors(r#"{"layer.a": 7}"#, &[]), "`layer.a`"),
            (safetensors(&entry("[1]", "[4, 0]"), &[0; 4]), "`layer.a` ends at 0, before"),
            (safetensors(&entry("[1]", "[-4, 0]"), &[0; 4]), "`layer.a`"),
            (safetensors(&entry("[1]", "[0, 400]"), &[0; 4]), "`layer.a` ends at byte 400"),
            (safetensors(&entry("[1]", "[0, 18446744073709551615]"), &[0; 4]), "`layer.a`"),
            (safetensors(&entry("[2]", "[0, 4]"), &[0; 4]), "`layer.a`: [2] of F32 does not take 4 bytes"),
            (safetensors(&entry("[4294967296, 4294967296]", "[0, 4]"), &[0; 4]), "`layer.a`: the shape"),
            (safetensors(&entry("[4611686018427387904]", "[0, 0]"), &[]), "`layer.a`"),
            (safetensors(&entry("[1e3]", "[0, 4]"), &[0; 4]), "`layer.a`"),
            (safetensors(&two("[0, 4]"), &[0; 4]), "`layer.b` at 0 overlaps"),
            (safetensors(&two("[8, 12]"), &[0; 12]), "`layer.b` at 8 leaves a gap"),
            (safetensors(twice, &[0; 8]), "`layer.a` at 4 leaves a gap"),
        ] {
            let message = refusal(&[("model.safetensors", &content)]);
            assert!(message.contains("model.safetensors: ") && message.contains(named), "{named}: {message}");
            assert!(message.contains("fetch it again"), "{message}");
        }
    }

    #[test]
    fn a_type_that_is_not_read_matters_only_when_asked_for() {
        let header = r#"{"flag": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]},
                         "scaled": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [2, 4]},
                         "a": {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]}}"#;
        let checkpoint = open_files(&[("model.safetensors", &safetensors(header, &[1, 0, 0, 0, 7, 0, 0, 0]))]).unwrap();
        assert_eq!(values(&checkpoint, "a"), [7.0]);
        for (name, dtype) in [("flag", "BOOL"), ("scaled", "F8_E4M3")] {
            let message = checkpoint.load(name, None, DType::F32, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains("model.safetensors") && message.contains(name), "{message}");
            assert!(message.contains(dtype) && message.contains("convert"), "{message}");
        }
    }

    #[test]
    fn lfs_pointers_and_other_files_are_named() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 440473133\n";
        for name in ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"] {
            let message = refusal(&[(name, pointer)]);
            assert!(message.contains(name) && message.contains("git lfs pull"), "{message}");
        }
        let message = refusal(&[("tf_model.h5", b""), ("README.md", b"")]);
        assert!(message.contains("model.safetensors, ") && message.contains("README.md, tf_model.h5"), "{message}");
        assert!(refusal(&[]).contains("it is empty"));
        let folder = folder(&[("weights.gguf", b"GGUF")]);
        let message = Checkpoint::open(&folder.path().join("weights.gguf"), &plain()).unwrap_err().to_string();
        assert!(message.contains("weights.gguf") && message.contains(".safetensors"), "{message}");
        let absent = folder.path().join("absent");
        assert!(Checkpoint::open(&absent, &plain()).unwrap_err().to_string().contains("absent"));
    }

    #[test]
    fn shards_are_joined() {
        let index =
            br#"{"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        let (one, two) = (of_tensors(&[("a", &[2])]), of_tensors(&[("b", &[3])]));
        let files: [(&str, &[u8]); 3] =
            [("model.safetensors.index.json", index), ("one.safetensors", &one), ("two.safetensors", &two)];
        let checkpoint = open_files(&files).unwrap();
        assert_eq!(values(&checkpoint, "b"), [0.0, 1.0, 2.0]);
        assert_eq!(checkpoint.files().count(), 2);
        let folder = folder(&files);
        let alone = Checkpoint::open(&folder.path().join("one.safetensors"), &plain()).unwrap();
        assert_eq!(alone.names().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn hostile_indices_are_refused_by_name() {
        let one = of_tensors(&[("a", &[2])]);
        let both = of_tensors(&[("a", &[2]), ("b", &[2])]);
        for (index, named) in [
            ("{\"weight_map\": ", "not JSON"),
            ("[]", "not an index"),
            (r#"{"weight_map": {"a": 7}}"#, "not an index"),
            (r#"{"weight_map": {}}"#, "no shard"),
            (r#"{"weight_map": {"a": "gone.safetensors"}}"#, "`gone.safetensors`, which is not beside it"),
            (r#"{"weight_map": {"a": "../one.safetensors"}}"#, "`../one.safetensors`, which is not a file of the same"),
            (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "`/etc/passwd`"),
            (r#"{"weight_map": {"a": ""}}"#, "not a file of the same folder"),
            (r#"{"weight_map": {"a": "./one.safetensors"}}"#, "not a file of the same folder"),
            (r#"{"weight_map": {"c": "one.safetensors"}}"#, "places tensor `c` in `one.safetensors`"),
        ] {
            let message = refusal(&[("model.safetensors.index.json", index.as_bytes()), ("one.safetensors", &one)]);
            assert!(message.contains("model.safetensors.index.json: ") && message.contains(named), "{message}");
        }
        let index = br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        let message =
            refusal(&[("model.safetensors.index.json", index), ("one.safetensors", &one), ("two.safetensors", &both)]);
        assert!(message.contains("tensor `a` is in") && message.contains("two.safetensors"), "{message}");
    }

    #[test]
    fn a_json_file_beyond_all_reason_is_not_parsed() {
        let folder = folder(&[("config.json", b"")]);
        let path = folder.path().join("config.json");
        File::options().write(true).open(&path).unwrap().set_len(LARGEST_JSON + 1).unwrap();
        let message = read_json(&path).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains("64 MiB"), "{message}");
    }

    #[test]
    fn a_tensor_under_its_own_name_wins_over_one_renamed_to_it() {
        let rule = |pattern, replacement| AliasRule { pattern, replacement, applies: AliasScope::Always };
        let rules = [rule("^old$", Some("z")), rule("^a\\d$", Some("b")), rule("\\.position_ids$", None)];
        let aliases = Aliases::compile(&rules, "BertForMaskedLM").unwrap();
        let file = of_tensors(&[("z", &[1]), ("old", &[2]), ("a1", &[3]), ("a2", &[4]), ("e.position_ids", &[5])]);
        let folder = folder(&[("model.safetensors", &file)]);
        let checkpoint = Checkpoint::open(folder.path(), &aliases).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["b", "z"]);
        assert_eq!(values(&checkpoint, "z").len(), 1);
        assert_eq!(values(&checkpoint, "b").len(), 3);
    }
}
