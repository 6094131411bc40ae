//! `cargo xtask sanitize`: the tests of every kernel under AddressSanitizer, which sees reads and writes outside of what
//! was allocated. Miri would see more, and has no AVX-512 or VNNI to run the kernels with.

use std::process::Command;

use anyhow::Context;

use crate::process;

/// Runs the unit tests of roofbench-nn, compiled by the nightly toolchain, in a target folder of their own.
///
/// # Errors
/// There is no nightly toolchain, or a test fails.
pub(crate) fn run() -> anyhow::Result<()> {
    let rustup = |arguments: &[&str]| {
        let mut command = Command::new("rustup");
        command.current_dir(process::root()).args(["run", "nightly"]).args(arguments);
        command
    };
    let version = process::output(&mut rustup(&["rustc", "--version", "--verbose"]))
        .context("a nightly toolchain is needed: `rustup toolchain install nightly --profile minimal`")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
    let mut command = rustup(&["cargo", "test", "--package", "roofbench-nn", "--lib", "--target", host]);
    command
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("CARGO_TARGET_DIR", process::target()?.join("sanitize"))
        // candle's threads outlive the tests, and what they own is no leak
        .env("ASAN_OPTIONS", "detect_leaks=0");
    process::run(&mut command)
}
