//! Linux on Arm: cross-built by Debian's compiler, run by qemu's user-mode emulation. It proves results, never speed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::{DEBIAN_RUSTC, built, expect, folder, packages, program, step, verify};
use crate::process;

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// `libc6:arm64` is what the programs run on: on the cross compiler's own (`qemu-aarch64 -L`) no thread starts.
const PACKAGES: [&str; 6] = [
    "rustc-web",
    "libstd-rust-web-dev:arm64",
    "libc6:arm64",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "qemu-user",
];
/// qemu's CPUs, and extensions that they have and lack: all paths of the kernels together, and each way to lack one.
const CPUS: [(&str, &[&str], &[&str]); 3] = [
    ("max", &["neon", "dotprod", "bf16", "i8mm"], &[]),
    ("neoverse-n1", &["neon", "dotprod"], &["bf16", "i8mm"]),
    ("cortex-a72", &["neon"], &["dotprod", "bf16", "i8mm"]),
];
/// How a program for 64-bit Arm begins, with a mask of the bytes that count (qemu's `scripts/qemu-binfmt-conf.sh`).
const MAGIC: &str = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00";
const MASK: &str = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff";

/// Builds, and runs the tests of kernels and probe, every reference case, and the commands.
///
/// # Errors
/// A package is missing, or something fails.
pub(super) fn run(install: bool) -> anyhow::Result<String> {
    packages(&PACKAGES, install)?;
    let folder = folder("arm")?;
    let mut cargo = process::cargo();
    cargo.args(["test", "--no-run", "--release", "--target", TARGET]);
    cargo.args(["-p", "roofbench-nn", "-p", "roofbench-core", "-p", "roofbench-cli"]);
    cargo.env("RUSTC", DEBIAN_RUSTC).env("CARGO_TARGET_DIR", &folder);
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
    let built = built(&mut cargo)?;
    let roofbench = program(&built, "bin roofbench")?;
    let (kernels, core) = (program(&built, "lib roofbench_nn test")?, program(&built, "lib roofbench_core test")?);

    // The tests go over every path that the CPU has.
    for cpu in ["max", "neoverse-n1"] {
        step(&mut emulated(cpu, kernels))?;
        step(emulated(cpu, core).args(["hardware::", "meters::"]))?;
    }
    for (cpu, has, lacks) in CPUS {
        let said =
            expect(emulated(cpu, roofbench).arg("probe"), 0, &["emulation of aarch64", "ceilings are not measured"])?;
        let extensions = said.lines().find(|line| line.starts_with("extensions")).unwrap_or_default();
        let extensions: Vec<&str> = extensions.split_whitespace().collect();
        if !has.iter().all(|name| extensions.contains(name)) || lacks.iter().any(|name| extensions.contains(name)) {
            bail!("qemu's {cpu} should have {has:?} and not {lacks:?}; the probe found {extensions:?}");
        }
    }
    expect(emulated("max", roofbench).arg("list"), 0, &["36 families"])?;
    let passed = verify(&mut emulated("max", roofbench))?;
    verify(&mut emulated("cortex-a72", roofbench))?;
    verify(emulated("max", roofbench).env("ROOFBENCH_ISA", "scalar"))?;
    Ok(format!("{passed}; {}", measured(roofbench, &folder, install)?))
}

/// `program` on one of qemu's CPUs.
fn emulated(cpu: &str, program: &Path) -> Command {
    let mut command = Command::new("qemu-aarch64");
    command.args(["-cpu", cpu]).arg(program);
    command
}

/// A quick `run`, whose workers are started by the kernel: no time may be in its record.
fn measured(roofbench: &Path, folder: &Path, install: bool) -> anyhow::Result<String> {
    let started = |program: &Path| {
        let mut command = Command::new(program);
        command.env("QEMU_CPU", "max");
        command
    };
    let starts = || started(roofbench).arg("--version").output().is_ok_and(|output| output.status.success());
    if !starts() && install {
        let registry = Path::new("/proc/sys/fs/binfmt_misc");
        if !registry.join("register").exists() {
            step(Command::new("mount").args(["-t", "binfmt_misc", "binfmt_misc"]).arg(registry))?;
        }
        let line = format!(":qemu-aarch64:M::{MAGIC}:{MASK}:/usr/bin/qemu-aarch64:F");
        fs::write(registry.join("register"), line).with_context(|| format!("{}/register", registry.display()))?;
    }
    if !starts() {
        return Ok(
            "`run` was not tried, as the kernel does not start Arm programs (--install, as root, lets it)".into()
        );
    }
    let records = folder.join("run.jsonl");
    let mut run = started(roofbench);
    run.args(["run", "resnet", "--quick", "--cell", "b1$", "--threads", "1", "--max-time", "1", "--json", "--output"]);
    let said = expect(run.arg(&records), 0, &["\"skipped\"", "no time is kept", "emulation of aarch64"])?;
    if said.contains("\"samples\"") {
        bail!("an emulated run keeps samples as if they were measured");
    }
    Ok("`run` under emulation keeps no time".into())
}
