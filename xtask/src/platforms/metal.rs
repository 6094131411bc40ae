//! Metal: run on a Mac; elsewhere type-checked, where Rust's library for Macs is installed.

use std::process::Command;

use anyhow::bail;

use super::{built, expect, program, step, verify};
use crate::process;

const TARGET: &str = "aarch64-apple-darwin";

/// On a Mac: builds, and runs every reference case on the CPU and on the GPU. Elsewhere: checks the types.
///
/// # Errors
/// Rust's library for Macs is missing, or something fails.
pub(super) fn run() -> anyhow::Result<String> {
    if cfg!(target_os = "macos") {
        let mut cargo = process::cargo();
        cargo.args(["build", "--release", "--package", "roofbench-cli", "--features", "metal,accelerate"]);
        let built = built(&mut cargo)?;
        let roofbench = program(&built, "bin roofbench")?;
        expect(Command::new(roofbench).arg("probe"), 0, &["GiB in all", "memory read"])?;
        verify(&mut Command::new(roofbench))?;
        return verify(Command::new(roofbench).args(["--device", "metal"]));
    }
    let libraries = process::output(Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]))?;
    if !std::path::Path::new(libraries.trim()).exists() {
        bail!("Rust's library for {TARGET} is not installed: `rustup target add {TARGET}`, or run this on a Mac");
    }
    step(process::cargo().args(["check", "--package", "roofbench-cli", "--features", "metal", "--target", TARGET]))?;
    Ok("type-checked; not run".into())
}
