//! The commit that this program was built from, for its records.

use std::path::Path;
use std::process::Command;

fn main() {
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).map(|hash| {
        // Empty means that every tracked file is as committed.
        match git(&["--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]) {
            Some(changes) if !changes.is_empty() => format!("{hash}-dirty"),
            _ => hash,
        }
    });
    println!("cargo::rustc-env=ROOFBENCH_COMMIT={}", commit.unwrap_or_default());

    // The commit changes with HEAD and the branch that it names; `-dirty` with the index and with any crate's source.
    println!("cargo::rerun-if-changed=build.rs");
    let crates = if Path::new("../core/src").exists() { ".." } else { "src" };
    println!("cargo::rerun-if-changed={crates}");
    for name in ["HEAD", "logs/HEAD", "index"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// Standard output of a git command that succeeds, trimmed.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
