//! CUDA without a GPU: the program is built and linked with NVIDIA's toolkit, which comes as Python packages, and meets a
//! driver that stands in for NVIDIA's and answers every call with an error of our choice.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::{built, expect, folder, packages, program, step};
use crate::process;

const PACKAGES: [&str; 3] = ["gcc", "g++", "python3-pip"];
const REQUIREMENTS: &str = include_str!("cuda.txt");
/// The GPU that kernels are compiled for: Hopper. The driver compiles their PTX for newer ones.
const COMPUTE_CAPABILITY: &str = "90";
/// The variable that says what the stand-in answers.
const ANSWER: &str = "STAND_IN_CUDA_ERROR";

/// What drivers answer (`CUresult` of CUDA's driver API), and a word of what roofbench says to it.
const ERRORS: [(u32, &str); 6] = [
    (100, "CUDA_VISIBLE_DEVICES"),        // no device
    (2, "the GPU's memory is full"),      // out of memory
    (46, "the GPU is busy"),              // unavailable
    (222, "older than the CUDA toolkit"), // PTX of a newer toolkit
    (209, "CUDA_COMPUTE_CAP"),            // no code for this GPU
    (999, "dmesg"),                       // unknown: a GPU that was lost
];

/// Builds and links, and tries what the program says where there is no GPU.
///
/// # Errors
/// A package is missing, or something fails.
pub(super) fn run(install: bool) -> anyhow::Result<String> {
    packages(&PACKAGES, install)?;
    let folder = folder("cuda")?;
    let toolkit = toolkit(&folder)?;
    let stand_in = stand_in(&folder)?;

    let mut cargo = process::cargo();
    cargo.args(["build", "--package", "roofbench-cli", "--features", "cuda"]);
    // It is linked and asked for its errors, for which no optimised code is needed.
    cargo.args(["--config", "profile.dev.opt-level=0", "--config", "profile.dev.package.\"*\".opt-level=0"]);
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"] {
        cargo.env(variable, &toolkit);
    }
    cargo.env("PATH", joined(&[toolkit.join("bin")], std::env::var_os("PATH"))?);
    cargo.env("LIBRARY_PATH", joined(&[toolkit.join("lib64"), stand_in.clone()], None)?);
    cargo.env("CUDA_COMPUTE_CAP", COMPUTE_CAPABILITY).env("CARGO_TARGET_DIR", folder.join("build"));
    let built = built(&mut cargo)?;
    let roofbench = program(&built, "bin roofbench")?;

    let libraries = joined(&[toolkit.join("lib64"), stand_in], None)?;
    let started = || {
        let mut command = Command::new(roofbench);
        command.env("LD_LIBRARY_PATH", &libraries);
        command
    };
    expect(started().arg("list"), 0, &["36 families"])?;
    let case = "tests/fixtures/reference/bert/encoder";
    expect(started().args(["verify", case]), 0, &["1 passed"])?;
    for (code, word) in ERRORS {
        let mut verify = started();
        verify.args(["verify", case, "--device", "cuda"]).env(ANSWER, code.to_string());
        expect(&mut verify, 2, &["--device cuda:0", word])?;
    }
    let bytes = fs::metadata(roofbench).with_context(|| roofbench.display().to_string())?.len();
    Ok(format!("built and linked for compute capability 9.0 ({} MB); not run on a GPU", bytes / 1_000_000))
}

/// Paths as a variable holds them, before those that it has.
fn joined(paths: &[PathBuf], rest: Option<OsString>) -> anyhow::Result<OsString> {
    let rest: Vec<PathBuf> = rest.iter().flat_map(std::env::split_paths).collect();
    std::env::join_paths(paths.iter().chain(&rest)).context("a folder's name has a colon")
}

/// The toolkit's root; fetched and put together where it is not there yet.
fn toolkit(folder: &Path) -> anyhow::Result<PathBuf> {
    let packages = folder.join("toolkit");
    let (root, stamp) = (packages.join("nvidia/cu13"), packages.join("installed.txt"));
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == REQUIREMENTS) {
        return Ok(root);
    }
    if packages.exists() {
        fs::remove_dir_all(&packages).with_context(|| packages.display().to_string())?;
    }
    let requirements = folder.join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS).with_context(|| requirements.display().to_string())?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]);
    step(pip.arg("--target").arg(&packages).arg("--requirement").arg(&requirements))
        .context("fetching the CUDA toolkit (680 MB) from PyPI")?;

    // Linkers look for `libcublas.so`, and the packages have `libcublas.so.13`.
    let links = root.join("lib64");
    fs::create_dir_all(&links).with_context(|| links.display().to_string())?;
    for entry in fs::read_dir(root.join("lib")).context("the toolkit's libraries")? {
        let library = entry.context("the toolkit's libraries")?.path();
        let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((stem, _)) = name.split_once(".so.") else { continue };
        for link in [name.clone(), format!("{stem}.so")] {
            fs::hard_link(&library, links.join(&link)).with_context(|| links.join(&link).display().to_string())?;
        }
    }
    fs::write(&stamp, REQUIREMENTS).with_context(|| stamp.display().to_string())?;
    Ok(root)
}

/// The folder of a `libcuda.so.1` with every function that cudarc may call.
fn stand_in(folder: &Path) -> anyhow::Result<PathBuf> {
    let metadata = process::output(process::cargo().args(["metadata", "--format-version", "1", "--all-features"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("reading `cargo metadata`")?;
    let manifest = metadata["packages"].as_array().into_iter().flatten().find(|package| package["name"] == "cudarc");
    let manifest = manifest.and_then(|package| package["manifest_path"].as_str());
    let manifest = Path::new(manifest.context("candle does not use cudarc any more")?);
    let bindings = manifest.with_file_name("src").join("driver/sys/mod.rs");
    let text = fs::read_to_string(&bindings).with_context(|| bindings.display().to_string())?;
    let functions = functions(&text);
    if functions.is_empty() {
        bail!("{} declares no function of the driver", bindings.display());
    }
    let mut source = format!(
        "#include <stdlib.h>\nstatic int answer(void)\n{{\n    const char *code = getenv(\"{ANSWER}\");\n    \
         return code ? atoi(code) : 100;\n}}\n"
    );
    for function in functions {
        let _ = writeln!(source, "int {function}(void) {{ return answer(); }}");
    }
    let place = folder.join("stand-in");
    fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let file = place.join("libcuda.c");
    fs::write(&file, source).with_context(|| file.display().to_string())?;
    let library = place.join("libcuda.so.1");
    let mut compiler = Command::new("gcc");
    step(compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]).arg(&library).arg(&file))?;
    fs::copy(&library, place.join("libcuda.so")).with_context(|| library.display().to_string())?;
    Ok(place)
}

/// Names of the driver's functions in Rust's declarations of them.
fn functions(bindings: &str) -> BTreeSet<&str> {
    let name = |rest: &'_ str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let declared = bindings.split("fn ").skip(1).filter_map(|rest| Some(&rest[..name(rest)?]));
    declared.filter(|name| name.strip_prefix("cu").is_some_and(|rest| rest.starts_with(char::is_uppercase))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stand_in_has_every_function_once() {
        let bindings = "pub fn cuInit(Flags: u32) -> CUresult {\n    fn cuInit(Flags: u32) -> CUresult;\n}\n\
                        fn cuMemAlloc_v2(p: *mut u64);\nfn culib() {}\nfn current() {}";
        assert_eq!(functions(bindings), BTreeSet::from(["cuInit", "cuMemAlloc_v2"]));
    }

    #[test]
    fn every_package_has_its_version() {
        let lines = REQUIREMENTS.lines().filter(|line| !line.starts_with('#'));
        assert!(lines.clone().count() > 5 && lines.clone().all(|line| line.contains("==")), "{REQUIREMENTS}");
    }
}
