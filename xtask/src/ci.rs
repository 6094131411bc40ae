//! What one crate's CI job runs: format, lints, tests, doc tests, and each portable feature alone.

use std::collections::BTreeSet;

use anyhow::Context;
use serde_json::Value;

use crate::process;

/// Features that need a toolkit or a system of their own; the others build anywhere.
const NOT_PORTABLE: [&str; 6] = ["cuda", "cudnn", "flash-attn", "metal", "mkl", "accelerate"];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Package, as in `roofbench-core` or `core`
    #[arg(value_name = "CRATE")]
    package: String,
}

/// Runs the job, and stops at the first step that fails.
///
/// # Errors
/// No such crate, or a step fails.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let metadata = process::metadata()?;
    let packages = metadata["packages"].as_array().context("`cargo metadata` has no packages")?;
    let full = format!("roofbench-{}", arguments.package);
    let package =
        packages.iter().find(|p| p["name"] == *arguments.package || p["name"] == *full).with_context(|| {
            let names: Vec<_> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
            format!("no crate `{}` in the workspace; there are {}", arguments.package, names.join(", "))
        })?;
    let name = package["name"].as_str().unwrap_or_default();

    let mut steps: Vec<Vec<&str>> = vec![
        vec!["fmt", "--package", name, "--check"],
        vec!["clippy", "--package", name, "--all-targets", "--no-deps", "--", "-D", "warnings"],
        vec!["test", "--package", name, "--all-targets"],
    ];
    if has_library(package) {
        steps.push(vec!["test", "--package", name, "--doc"]);
    }
    let features = portable_features(package);
    if !features.is_empty() {
        steps.push(vec!["check", "--package", name, "--no-default-features"]);
    }
    for feature in &features {
        steps.push(vec!["check", "--package", name, "--no-default-features", "--features", feature]);
    }
    for step in steps {
        let mut command = process::cargo();
        command.args(step);
        eprintln!("$ {}", process::shown(&command));
        process::run(&mut command)?;
    }
    Ok(())
}

fn has_library(package: &Value) -> bool {
    let targets = package["targets"].as_array().into_iter().flatten();
    targets.flat_map(|target| target["kind"].as_array().into_iter().flatten()).any(|kind| kind == "lib")
}

fn portable_features(package: &Value) -> BTreeSet<&str> {
    let features = package["features"].as_object().into_iter().flatten().map(|(name, _)| name.as_str());
    features.filter(|name| *name != "default" && !NOT_PORTABLE.contains(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_need_a_toolkit_are_left_out() {
        let package = serde_json::json!({
            "features": {"default": ["text"], "text": [], "cuda": [], "mkl": []},
            "targets": [{"kind": ["bin"]}, {"kind": ["lib"]}],
        });
        assert_eq!(portable_features(&package), BTreeSet::from(["text"]));
        assert!(has_library(&package));
    }
}
