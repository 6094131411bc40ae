//! `cargo xtask platforms`: the same results on other platforms, from a Linux x86-64 machine that has none of them.
//!
//! Arm runs under qemu's user-mode emulation and Windows under Wine. CUDA is built and linked, and its errors are tried on
//! a driver that stands in for NVIDIA's. Metal is type-checked where Rust has the target, and runs on a Mac. The compiler
//! of the first two is Debian's, which has those targets as packages. Everything lies under `target/platforms/`.

mod arm;
mod cuda;
mod metal;
mod windows;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::process;

/// Debian's compiler, called beside the pinned one by its full path.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Platform {
    /// Linux on Arm, under qemu-user
    Arm,
    /// Windows on x86-64, under Wine
    Windows,
    /// CUDA: built and linked, without a GPU
    Cuda,
    /// Metal: run on a Mac, type-checked elsewhere
    Metal,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask platforms arm windows cuda
  cargo xtask platforms arm --install      as root: installs what is missing, by apt-get

docs/platforms.md says what each does and shows what comes out.")]
pub(crate) struct Arguments {
    /// Which
    #[arg(required = true, value_enum)]
    platforms: Vec<Platform>,
    /// Installs the packages that are missing and lets Linux start Arm programs, as root
    #[arg(long)]
    install: bool,
}

/// Runs each platform, and tells at the end which passed.
///
/// # Errors
/// Never: a platform that fails is told of, and makes the exit status 1.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut lines = Vec::new();
    let mut failed = false;
    for &platform in &arguments.platforms {
        let name = platform.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        eprintln!("== {name}");
        let began = Instant::now();
        let result = match platform {
            Platform::Arm => arm::run(arguments.install),
            Platform::Windows => windows::run(arguments.install),
            Platform::Cuda => cuda::run(arguments.install),
            Platform::Metal => metal::run(),
        };
        let minutes = began.elapsed().as_secs_f64() / 60.0;
        match result {
            Ok(what) => lines.push(format!("{name}: passed in {minutes:.1} min: {what}")),
            Err(error) => {
                failed = true;
                lines.push(format!("{name}: FAILED after {minutes:.1} min: {error:#}"));
            }
        }
    }
    eprintln!("\n{}", lines.join("\n"));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The folder of a platform's builds.
fn folder(platform: &str) -> anyhow::Result<PathBuf> {
    let folder = process::target()?.join("platforms").join(platform);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// Makes sure that Debian's `packages` are there; installs those that are not where that was asked for.
fn packages(packages: &[&str], install: bool) -> anyhow::Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!("this platform is tried from Linux on x86-64");
    }
    let installed = |package: &&str| {
        let query = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]).output();
        query.is_ok_and(|output| output.stdout == b"installed")
    };
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let foreign = missing.iter().any(|package| package.ends_with(":arm64"));
    if !install {
        let architecture = if foreign { "dpkg --add-architecture arm64 && " } else { "" };
        bail!(
            "packages of Debian 12 are missing: as root, `{architecture}apt-get update && apt-get install {}`, or this \
             task with --install",
            missing.join(" ")
        );
    }
    if foreign {
        step(Command::new("dpkg").args(["--add-architecture", "arm64"]))?;
    }
    step(Command::new("apt-get").args(["update", "-qq"]))?;
    step(Command::new("apt-get").args(["install", "-qq", "--yes", "--no-install-recommends"]).args(missing))
}

/// Runs `command` with its output shown, and itself before it.
fn step(command: &mut Command) -> anyhow::Result<()> {
    eprintln!("$ {}", process::shown(command));
    process::run(command)
}

/// Programs that a `cargo build` or `cargo test --no-run` made: `bin roofbench`, `lib roofbench_nn test`.
fn built(cargo: &mut Command) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    eprintln!("$ {}", process::shown(cargo));
    // what a task of cargo inherits is meant for the compiler that built the task
    cargo.env_remove("LD_LIBRARY_PATH").env_remove("RUSTUP_TOOLCHAIN");
    let text = process::output(cargo.args(["--message-format", "json-render-diagnostics"]))?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |message: Value| {
        let (kind, name) = (message["target"]["kind"][0].as_str()?, message["target"]["name"].as_str()?);
        let test = if message["profile"]["test"] == true { " test" } else { "" };
        Some((format!("{kind} {name}{test}"), message["executable"].as_str()?.into()))
    };
    Ok(messages.filter_map(program).collect())
}

/// The program of that name among those that were built.
fn program<'a>(built: &'a BTreeMap<String, PathBuf>, name: &str) -> anyhow::Result<&'a Path> {
    built.get(name).map(PathBuf::as_path).with_context(|| format!("cargo did not say where it put `{name}`"))
}

/// Runs `command`, shows what it says, and checks its exit status and that it says each of `words`; all that it said.
fn expect(command: &mut Command, status: i32, words: &[&str]) -> anyhow::Result<String> {
    let shown = process::shown(command);
    eprintln!("$ {shown}");
    let output = command.current_dir(process::root()).output().with_context(|| format!("starting `{shown}`"))?;
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    eprint!("{said}");
    if output.status.code() != Some(status) {
        bail!("`{shown}` ended with {}, not with status {status}", output.status);
    }
    if let Some(word) = words.iter().find(|word| !said.contains(**word)) {
        bail!("`{shown}` does not say `{word}`");
    }
    Ok(said)
}

/// Runs every reference case by `roofbench`, which is a command without its arguments; how many passed.
fn verify(roofbench: &mut Command) -> anyhow::Result<String> {
    roofbench.args(["verify", "tests/fixtures/reference"]);
    let shown = process::shown(roofbench);
    eprintln!("$ {shown}");
    let said = roofbench.current_dir(process::root()).output().with_context(|| format!("starting `{shown}`"))?;
    let (status, text) = (said.status, String::from_utf8_lossy(&said.stdout).into_owned());
    let total = text.lines().last().unwrap_or_default().to_owned();
    if !status.success() {
        let failed = text.lines().skip_while(|line| !line.starts_with("FAILED")).take(40);
        eprintln!("{}{}", String::from_utf8_lossy(&said.stderr), failed.collect::<Vec<_>>().join("\n"));
        bail!("`{shown}` failed ({status}): {total}");
    }
    let families = roofbench_core::catalog::families();
    let ran = |family: &str| text.lines().any(|line| line.starts_with("ok") && line.contains(&format!(" {family}/")));
    if let Some(family) = families.iter().find(|family| !ran(&family.name)) {
        bail!("`{shown}` ran no case of {}", family.name);
    }
    eprintln!("{total}");
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_says_is_held_against_what_it_should() {
        let echo = |words: &[&str]| expect(Command::new("sh").args(["-c", "echo so; echo much >&2; exit 3"]), 3, words);
        if cfg!(unix) {
            assert_eq!(echo(&["so", "much"]).unwrap(), "so\nmuch\n");
            assert!(echo(&["more"]).unwrap_err().to_string().contains("does not say `more`"));
        }
    }
}
