//! Repositories on the Hub, through `hf-hub` and its cache. What the cache holds is used without asking the network.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::WeightsError;
use super::local::{self, WEIGHT_FILES};

const ENDPOINT: &str = "https://huggingface.co";

/// How the Hub is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// Access token; without one only open repositories are read.
    pub token: Option<String>,
    /// Base address.
    pub endpoint: String,
    /// Folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Use the cache alone.
    pub offline: bool,
    /// Show a bar per downloaded file on the terminal.
    pub progress: bool,
}

impl HubOptions {
    /// From the variables that Hugging Face's own tools know: `HF_TOKEN` (else the file that `hf auth login` writes),
    /// `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>, user_home: Option<PathBuf>) -> Self {
        let variable =
            |name: &str| variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let home = variable("HF_HOME")
            .map_or_else(|| user_home.unwrap_or_default().join(".cache").join("huggingface"), PathBuf::from);
        let token_file = || std::fs::read_to_string(home.join("token")).ok().map(|token| token.trim().to_owned());
        let on = |value: String| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on");
        Self {
            token: variable("HF_TOKEN").or_else(token_file).filter(|token| !token.is_empty()),
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: variable("HF_HUB_OFFLINE").is_some_and(on),
            progress: false,
        }
    }
}

/// [`HubOptions::from_env`].
impl Default for HubOptions {
    fn default() -> Self {
        Self::from_env()
    }
}

/// A revision of a repository as the cache holds it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) folder: PathBuf,
    pub(super) commit: String,
}

/// The snapshot of `revision` (`main` when absent), fetched where the cache lacks weights.
pub(super) fn snapshot(
    repository: &str,
    revision: Option<&str>,
    options: &HubOptions,
) -> Result<Snapshot, WeightsError> {
    let revision = revision.unwrap_or("main");
    let plain = |part: &str| {
        let characters = part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        characters && !part.is_empty() && !part.starts_with('.')
    };
    if !(1..=2).contains(&repository.split('/').count()) || !repository.split('/').all(plain) {
        let given = repository.to_owned();
        return Err(WeightsError::HubName { given, expected: "a repository of the Hub (owner/name)" });
    }
    if !revision.split('/').all(plain) {
        let given = revision.to_owned();
        return Err(WeightsError::HubName { given, expected: "a branch, tag or commit" });
    }
    let label = format!("{repository}@{revision}");
    let cache = std::path::absolute(&options.cache)
        .map_err(|source| WeightsError::Io { file: options.cache.clone(), source })?;
    let repo = Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned());
    // Other tools may have cached weights without their config; offline, the weights alone are better than nothing.
    if let Some(found) = cached(&cache, &repo)
        && (options.offline || found.folder.join("config.json").exists())
    {
        return Ok(found);
    }
    if options.offline {
        return Err(WeightsError::HubOffline { repository: label, cache });
    }
    let refused = |error: ApiError| explain(error, &label, &format!("{}/{repository}", options.endpoint));
    let api = ApiBuilder::from_cache(Cache::new(cache.clone()))
        .with_token(options.token.clone())
        .with_endpoint(options.endpoint.clone())
        .with_progress(options.progress)
        .with_retries(3)
        .build()
        .map_err(refused)?
        .repo(repo.clone());
    let listed: Vec<String> = api.info().map_err(refused)?.siblings.into_iter().map(|file| file.rfilename).collect();
    fetch(&label, &listed, |name| {
        let had = Cache::new(cache.clone()).repo(repo.clone()).get(name).is_some();
        let path = api.get(name).map_err(refused)?;
        if had { Ok(path) } else { checked(&label, name, path) }
    })?;
    cached(&cache, &repo).ok_or_else(|| WeightsError::HubNoWeights { repository: label.clone(), files: some(&listed) })
}

fn some(names: &[String]) -> String {
    if names.is_empty() { "no file".to_owned() } else { local::some_of(names) }
}

/// Gets the configs, the tokenizer and one set of weights of the files `listed`, the weights last.
fn fetch(
    repository: &str,
    listed: &[String],
    get: impl Fn(&str) -> Result<PathBuf, WeightsError>,
) -> Result<(), WeightsError> {
    let no_weights = || WeightsError::HubNoWeights { repository: repository.to_owned(), files: some(listed) };
    let weights =
        WEIGHT_FILES.into_iter().find(|name| listed.iter().any(|file| file == name)).ok_or_else(no_weights)?;
    let top_level = listed.iter().filter(|name| !name.contains('/'));
    for name in top_level.filter(|name| name.ends_with("config.json") || *name == "tokenizer.json") {
        get(name)?;
    }
    let path = get(weights)?;
    if weights.ends_with(".index.json") {
        for shard in local::shards_of(&path)?.keys() {
            get(shard)?;
        }
    }
    Ok(())
}

/// `path`, if what was fetched into it is what the Hub has: the cache names a large file by the SHA-256 that the Hub tells.
/// What is not goes from the cache. Small files are named by a hash of git's, and are text that does not parse when damaged.
fn checked(repository: &str, name: &str, path: PathBuf) -> Result<PathBuf, WeightsError> {
    let io = |source| WeightsError::Io { file: path.clone(), source };
    let blob = fs::canonicalize(&path).map_err(io)?;
    let told = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if told.len() != 64 || !told.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(path);
    }
    let mut hash = Sha256::new();
    io::copy(&mut File::open(&blob).map_err(io)?, &mut hash).map_err(io)?;
    if format!("{:x}", hash.finalize()).eq_ignore_ascii_case(told) {
        return Ok(path);
    }
    fs::remove_file(&path).and_then(|()| fs::remove_file(&blob)).map_err(io)?;
    Err(WeightsError::HubDamaged { repository: repository.to_owned(), file: name.to_owned() })
}

/// The snapshot in the cache, if its weights are whole.
fn cached(cache: &Path, repo: &Repo) -> Option<Snapshot> {
    let folder = cache.join(repo.folder_name());
    let named = std::fs::read_to_string(folder.join("refs").join(repo.revision())).ok();
    let commit = named.map_or_else(|| repo.revision().to_owned(), |commit| commit.trim().to_owned());
    if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    let folder = folder.join("snapshots").join(&commit);
    let whole = |name: &&str| {
        let path = folder.join(name);
        let shards =
            || local::shards_of(&path).is_ok_and(|shards| shards.keys().all(|shard| folder.join(shard).exists()));
        path.exists() && (!name.ends_with(".index.json") || shards())
    };
    WEIGHT_FILES.iter().any(whole).then_some(Snapshot { folder, commit })
}

fn explain(error: ApiError, repository: &str, page: &str) -> WeightsError {
    let repository = repository.to_owned();
    match status(&error) {
        Some(status @ (401 | 403)) => WeightsError::HubDenied { repository, status, page: page.to_owned() },
        Some(404) => WeightsError::HubNotFound { repository },
        Some(429) => WeightsError::HubBusy { repository },
        _ => WeightsError::Hub { repository, source: Box::new(error) },
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::TooManyRetries(last) => status(last),
        ApiError::RequestError(request) => match **request {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use tempfile::TempDir;

    use super::*;

    /// A cache in the Hub's layout with one snapshot of `owner/name`, which `main` names.
    fn cache_with(files: &[(&str, &str)]) -> TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--owner--name");
        let snapshot = repository.join("snapshots").join("0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs").join("main"), "0123abcd\n").unwrap();
        for (name, content) in files {
            std::fs::write(snapshot.join(name), content).unwrap();
        }
        cache
    }

    fn offline(cache: &Path) -> HubOptions {
        let endpoint = "http://127.0.0.1:1".to_owned();
        HubOptions { token: None, endpoint, cache: cache.to_owned(), offline: true, progress: false }
    }

    const SHARDED: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;

    #[test]
    fn cached_weights_are_used_without_the_network() {
        let cache = cache_with(&[("model.safetensors", ""), ("config.json", "{}")]);
        let folder = cache.path().join("models--owner--name/snapshots/0123abcd");
        for (revision, offline_asked) in [(None, true), (Some("main"), false), (Some("0123abcd"), true)] {
            let options = HubOptions { offline: offline_asked, ..offline(cache.path()) };
            let found = snapshot("owner/name", revision, &options).unwrap();
            assert_eq!(found, Snapshot { folder: folder.clone(), commit: "0123abcd".to_owned() });
        }
    }

    #[test]
    fn offline_without_whole_weights_says_what_to_do() {
        let sharded = ("model.safetensors.index.json", SHARDED);
        for files in [&[("config.json", "{}")][..], &[sharded, ("model-1.safetensors", "")]] {
            let cache = cache_with(files);
            let message = snapshot("owner/name", None, &offline(cache.path())).unwrap_err().to_string();
            assert!(message.contains("owner/name@main: not in the cache"), "{message}");
            assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
        }
        let cache = cache_with(&[sharded, ("model-1.safetensors", ""), ("model-2.safetensors", "")]);
        snapshot("owner/name", None, &offline(cache.path())).unwrap();
        let message = snapshot("owner/name", Some("v2"), &offline(cache.path())).unwrap_err().to_string();
        assert!(message.contains("owner/name@v2"), "{message}");
    }

    #[test]
    fn an_unreachable_hub_is_named() {
        let cache = tempfile::tempdir().unwrap();
        // a scheme that no client speaks: refused before anything is sent
        let options = HubOptions { offline: false, endpoint: "gopher://hub".into(), ..offline(cache.path()) };
        let message = snapshot("owner/name", None, &options).unwrap_err().to_string();
        assert!(message.contains("owner/name@main") && message.contains("--offline"), "{message}");
    }

    #[test]
    fn names_that_would_leave_the_cache_are_refused() {
        let cache = cache_with(&[("model.safetensors", "")]);
        for repository in ["", "owner/", "/name", "a/b/c", "../name", "owner/..", "owner/na me", "https://hub/x"] {
            let message = snapshot(repository, None, &offline(cache.path())).unwrap_err().to_string();
            assert!(message.contains(&format!("`{repository}`")) && message.contains("owner/name"), "{message}");
        }
        for revision in ["", "../../etc", "/etc", "a//b", "main\n"] {
            let message = snapshot("owner/name", Some(revision), &offline(cache.path())).unwrap_err().to_string();
            assert!(message.contains("branch, tag or commit"), "{message}");
        }
    }

    #[test]
    fn one_set_of_weights_is_fetched_with_the_configs() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        std::fs::write(&index, SHARDED).unwrap();
        let fetched = |listed: &[&str]| {
            let got = RefCell::new(Vec::new());
            let listed: Vec<String> = listed.iter().map(|&name| name.to_owned()).collect();
            let outcome = fetch("owner/name@main", &listed, |name| {
                got.borrow_mut().push(name.to_owned());
                Ok(index.clone())
            });
            outcome.map(|()| got.into_inner())
        };
        let listed = [
            "README.md",
            "config.json",
            "generation_config.json",
            "onnx/config.json",
            "pytorch_model.bin",
            "model.safetensors",
            "tokenizer.json",
        ];
        let expected = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"];
        assert_eq!(fetched(&listed).unwrap(), expected);
        let expected = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"];
        assert_eq!(fetched(&["model.safetensors.index.json", "pytorch_model.bin"]).unwrap(), expected);
        assert_eq!(fetched(&["pytorch_model.bin", "a.bin"]).unwrap(), ["pytorch_model.bin"]);
        let message = fetched(&["model.gguf"]).unwrap_err().to_string();
        assert!(message.contains("owner/name@main") && message.contains("it has model.gguf"), "{message}");
        assert!(fetched(&[]).unwrap_err().to_string().contains("it has no file"));
    }

    #[test]
    fn refusals_of_the_hub_are_explained() {
        let explained = |status| {
            let error = ApiError::RequestError(Box::new(ureq::Error::StatusCode(status)));
            explain(error, "owner/name@main", "https://hub/owner/name").to_string()
        };
        for status in [401, 403] {
            let message = explained(status);
            assert!(message.contains(&status.to_string()) && message.contains("https://hub/owner/name"), "{message}");
            assert!(message.contains("licence") && message.contains("HF_TOKEN"), "{message}");
        }
        assert!(explained(404).contains("owner/name@main: the Hub has no such"));
        assert!(explained(500).contains("500"));
    }

    #[test]
    fn options_follow_from_hugging_faces_own_variables() {
        let home = tempfile::tempdir().unwrap();
        let with = |variables: &[(&str, &str)]| {
            let variables: HashMap<String, String> =
                variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
            HubOptions::from_variables(|name| variables.get(name).cloned(), Some(home.path().to_owned()))
        };
        let hugging_face = home.path().join(".cache/huggingface");
        let plain = with(&[("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", " ")]);
        let expected = HubOptions {
            token: None,
            endpoint: ENDPOINT.to_owned(),
            cache: hugging_face.join("hub"),
            offline: false,
            progress: false,
        };
        assert_eq!(plain, expected);
        std::fs::create_dir_all(&hugging_face).unwrap();
        std::fs::write(hugging_face.join("token"), "hf_file\n").unwrap();
        assert_eq!(with(&[]).token.as_deref(), Some("hf_file"));
        let set = with(&[("HF_TOKEN", "hf_env"), ("HF_HUB_OFFLINE", "True"), ("HF_ENDPOINT", "https://mirror")]);
        assert_eq!(
            (set.token.as_deref(), set.offline, set.endpoint.as_str()),
            (Some("hf_env"), true, "https://mirror")
        );
        assert_eq!(with(&[("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
        assert_eq!(with(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
    }
}
