//! Checks what the compiler can't: who may know whom, where libraries are at home, where unsafe code may be, and that
//! every family of the catalog has its row in the docs.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::process;

/// Crates of ours that each crate may use. `core` and `nn` never meet; a report knows records and nothing else.
const EDGES: [(&str, &[&str]); 10] = [
    ("roofbench-core", &[]),
    ("roofbench-nn", &[]),
    ("roofbench-report", &["roofbench-core"]),
    ("roofbench-text", &["roofbench-core", "roofbench-nn"]),
    ("roofbench-vision", &["roofbench-core", "roofbench-nn"]),
    ("roofbench-speech", &["roofbench-core", "roofbench-nn"]),
    (
        "roofbench-multimodal",
        &["roofbench-core", "roofbench-nn", "roofbench-text", "roofbench-vision", "roofbench-speech"],
    ),
    (
        "roofbench-cli",
        &[
            "roofbench-core",
            "roofbench-nn",
            "roofbench-report",
            "roofbench-text",
            "roofbench-vision",
            "roofbench-speech",
            "roofbench-multimodal",
        ],
    ),
    ("xtask", &["roofbench-core", "roofbench-report"]),
    (
        "roofbench-tests",
        &[
            "roofbench-core",
            "roofbench-nn",
            "roofbench-report",
            "roofbench-text",
            "roofbench-vision",
            "roofbench-speech",
            "roofbench-multimodal",
        ],
    ),
];

/// Libraries that belong to some crates alone, so that the others build without them.
const HOMES: &[(&str, &[&str])] = &[
    ("nvml-wrapper", &["roofbench-core"]),
    ("sysinfo", &["roofbench-core"]),
    ("hf-hub", &["roofbench-core"]),
    ("gemm", &["roofbench-nn"]),
    ("tokenizers", &["roofbench-text", "roofbench-speech"]),
    ("image", &["roofbench-vision"]),
    ("font8x8", &["roofbench-vision"]),
    ("symphonia", &["roofbench-speech"]),
    ("hound", &["roofbench-speech"]),
    ("prost", &["roofbench-speech"]),
    ("realfft", &["roofbench-speech"]),
    ("rubato", &["roofbench-speech"]),
    ("plotters", &["roofbench-report"]),
    ("alphanumeric-sort", &["roofbench-multimodal"]),
    ("minijinja", &["roofbench-multimodal"]),
    ("minijinja-contrib", &["roofbench-multimodal"]),
    ("quick-junit", &["roofbench-report"]),
    ("statrs", &["roofbench-core"]),
    ("clap", &["roofbench-cli", "xtask"]),
    ("anyhow", &["roofbench-cli", "xtask"]),
];

/// Where `unsafe` may stand: kernels with their threads and buffers, weight mapping, and calls into the operating system.
/// Within them the compiler denies it wherever no `#[expect(unsafe_code)]` gives a reason.
const UNSAFE: [&str; 4] =
    ["crates/nn/", "crates/core/src/weights/", "crates/core/src/hardware/", "crates/core/src/meters/"];

/// Runs every check and names all that it finds.
///
/// # Errors
/// Something is out of place, or can't be read.
pub(crate) fn run() -> anyhow::Result<()> {
    let metadata = process::metadata()?;
    let packages = metadata["packages"].as_array().context("`cargo metadata` has no packages")?;
    let mut found = Vec::new();
    for package in packages {
        found.extend(edges(package));
    }
    let root = process::root();
    for file in rust_files(&root)? {
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let relative = file.strip_prefix(&root).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        found.extend(unsafe_code(&relative, &text));
    }
    let models = root.join("docs/models.md");
    let text = std::fs::read_to_string(&models)
        .with_context(|| format!("reading {} (`cargo xtask docs` writes it)", models.display()))?;
    found.extend(rows(&text));
    if found.is_empty() {
        eprintln!("tidy: crate edges, homes of libraries, unsafe code and the catalog's rows are in order");
        return Ok(());
    }
    bail!("{} thing(s) out of place:\n  {}", found.len(), found.join("\n  "))
}

/// Dependencies of `package` that it should not have.
fn edges(package: &Value) -> Vec<String> {
    let name = package["name"].as_str().unwrap_or_default();
    let Some((_, allowed)) = EDGES.iter().find(|(crate_name, _)| *crate_name == name) else {
        return vec![format!("crate {name} is unknown: say in xtask/src/tidy.rs what it may use")];
    };
    let mut found = Vec::new();
    // Tests and examples may borrow what the crate itself may not.
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    for dependency in dependencies.filter(|d| d["kind"].is_null()).filter_map(|d| d["name"].as_str()) {
        if dependency.starts_with("roofbench-") && !allowed.contains(&dependency) {
            found.push(format!("{name} uses {dependency}; it may use {}", list(allowed)));
        }
        if let Some((_, homes)) = HOMES.iter().find(|(library, homes)| *library == dependency && !homes.contains(&name))
        {
            found.push(format!("{name} uses {dependency}, which is at home in {}", list(homes)));
        }
    }
    found
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no crate of ours".to_owned() } else { names.join(", ") }
}

/// Lines with `unsafe` in a file where it may not be.
fn unsafe_code(file: &str, text: &str) -> Vec<String> {
    if UNSAFE.iter().any(|place| file.starts_with(place)) {
        return Vec::new();
    }
    let is_unsafe = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        let mut after = code.split(concat!("un", "safe ")).skip(1).map(str::trim_start);
        after.any(|rest| ["{", "fn ", "impl", "extern", "trait"].iter().any(|form| rest.starts_with(form)))
    };
    let lines = text.lines().enumerate().filter(|(_, line)| is_unsafe(line));
    lines.map(|(at, _)| format!("{file}:{}: unsafe code; its places are {}", at + 1, UNSAFE.join(", "))).collect()
}

/// Families of the catalog without a row in docs/models.md.
fn rows(text: &str) -> Vec<String> {
    let missing = roofbench_core::catalog::families().iter().filter(|family| {
        let start = format!("| {} |", family.name);
        !text.lines().any(|line| line.starts_with(&start))
    });
    missing.map(|family| format!("docs/models.md has no row for {}; run `cargo xtask docs`", family.name)).collect()
}

/// Every Rust file of ours under crates/, tests/ and xtask/.
fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root.join("crates"), root.join("tests"), root.join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrong_edge_and_a_library_away_from_home_are_named() {
        let package = json!({"name": "roofbench-nn", "dependencies": [
            {"name": "candle-core", "kind": null},
            {"name": "roofbench-core", "kind": null},
            {"name": "clap", "kind": null},
            {"name": "roofbench-text", "kind": "dev"},
        ]});
        let found = edges(&package);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("uses roofbench-core") && found[1].contains("uses clap"), "{found:?}");
        assert_eq!(edges(&json!({"name": "new", "dependencies": []})).len(), 1);
    }

    #[test]
    fn unsafe_code_is_found_where_it_should_not_be() {
        let block = concat!("let x = un", "safe { y };");
        assert_eq!(unsafe_code("crates/text/src/lib.rs", block).len(), 1);
        assert!(unsafe_code("crates/nn/src/kernels/gemm.rs", block).is_empty());
        let word = concat!("// un", "safe\n#![deny(un", "safe_code)]");
        assert!(unsafe_code("crates/text/src/lib.rs", word).is_empty());
    }

    #[test]
    fn a_family_without_a_row_is_named() {
        let all = roofbench_core::catalog::families();
        assert_eq!(rows("").len(), all.len());
        let table: String = all.iter().map(|family| format!("| {} | x |\n", family.name)).collect();
        assert!(rows(&table).is_empty());
    }
}
