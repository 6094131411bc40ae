//! Windows on x86-64: built with Rust's own library by Debian's compiler and MinGW, run by Wine.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{DEBIAN_RUSTC, built, expect, folder, packages, program, step, verify};
use crate::process;

const TARGET: &str = "x86_64-pc-windows-gnu";
const PACKAGES: [&str; 5] = ["rustc-web", "cargo-web", "rust-web-src", "gcc-mingw-w64-x86-64", "wine64"];
const WINE: &str = "/usr/lib/wine/wine64";

/// Rust's standard library takes its random numbers from a function that Debian's Wine 8 does not have yet, and that
/// Windows documents to be this one.
const BCRYPT_PRIMITIVES: &str = "\
#include <windows.h>
BOOLEAN WINAPI SystemFunction036(PVOID buffer, ULONG length);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T length)
{
    for (; length > 0x10000000; data += 0x10000000, length -= 0x10000000)
        if (!SystemFunction036(data, 0x10000000))
            return FALSE;
    return SystemFunction036(data, (ULONG)length);
}
";

/// Builds, and runs the tests of the command line and of the probe, every reference case, and the commands.
///
/// # Errors
/// A package is missing, or something fails.
pub(super) fn run(install: bool) -> anyhow::Result<String> {
    packages(&PACKAGES, install)?;
    let folder = folder("windows")?;
    let wine = Wine::new(&folder)?;
    let built = build(&folder)?;
    let roofbench = program(&built, "bin roofbench")?;

    step(wine.run(program(&built, "lib roofbench_core test")?).args(["hardware::", "meters::", "record::"]))?;
    step(wine.run(program(&built, "bin roofbench test")?).current_dir(process::root().join("crates/cli")))?;
    step(wine.run(program(&built, "test cli test")?).current_dir(process::root().join("crates/cli")))?;
    expect(wine.run(roofbench).arg("list"), 0, &["36 families"])?;
    let said = expect(wine.run(roofbench).arg("probe"), 0, &["Wine", "GiB in all", "MHz now", "memory read"])?;
    if !said.lines().any(|line| line.contains(" core") && line.contains(" thread")) {
        bail!("the probe found no cores");
    }
    let passed = verify(&mut wine.run(roofbench))?;
    let (records, html) = (folder.join("run.jsonl"), folder.join("report.html"));
    for file in [&records, &html] {
        if file.exists() {
            fs::remove_file(file).with_context(|| file.display().to_string())?;
        }
    }
    let mut run = wine.run(roofbench);
    run.args(["run", "vit", "--quick", "--cell", "b1$", "--output", &windows_path(&records)]);
    expect(&mut run, 0, &["images/s", "1 record in Z:\\"])?;
    let mut report = wine.run(roofbench);
    report.args(["report", &windows_path(&records), "--html", &windows_path(&html)]);
    expect(&mut report, 0, &["wrote Z:\\"])?;
    fs::metadata(&html).with_context(|| html.display().to_string())?;
    ctrl_c(&wine, roofbench, &folder)?;
    Ok(passed)
}

/// Ctrl-C at a terminal keeps the samples so far. Wine makes the key a console's event, as Windows does; the terminal is
/// util-linux's `script`.
fn ctrl_c(wine: &Wine, roofbench: &Path, folder: &Path) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(120);
    let (records, told) = (folder.join("interrupted.jsonl"), folder.join("interrupted.txt"));
    for file in [&records, &told] {
        fs::write(file, "").with_context(|| file.display().to_string())?;
    }
    let line = format!(
        "{WINE} '{}' run vit --cell 'b1$' --threads 1 -v --min-time 500 --max-time 600 --max-samples 1000000 \
         --output '{}' > '{}' 2>&1",
        roofbench.display(),
        windows_path(&records),
        told.display()
    );
    let mut terminal = wine.environment(Command::new("script"));
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    eprintln!("$ {}", process::shown(&terminal));
    terminal.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut terminal = terminal.spawn().context("starting `script` (Debian: bsdutils)")?;
    let mut keys = terminal.stdin.take().context("`script` has no standard input")?;
    let text = || fs::read(&told).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let began = Instant::now();
    let wait = |done: &mut dyn FnMut() -> anyhow::Result<bool>| {
        while !done()? {
            if began.elapsed() > PATIENCE {
                bail!("after {PATIENCE:?} the run under `script` has only said: {}", text());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    let mut status = None;
    let ended = wait(&mut || Ok(text().contains("steady state"))).and_then(|()| {
        keys.write_all(b"\x03").and_then(|()| keys.flush()).context("pressing Ctrl-C")?;
        wait(&mut || {
            status = terminal.try_wait().context("waiting for `script`")?;
            Ok(status.is_some())
        })
    });
    if ended.is_err() {
        terminal.kill().context("ending `script`")?;
    }
    ended?;
    let kept = fs::read_to_string(&records).with_context(|| records.display().to_string())?;
    eprintln!("{}", text());
    let interrupted = kept.contains("\"stop\":\"interrupted\"");
    if status.and_then(|status| status.code()) != Some(130) || kept.lines().count() != 1 || !interrupted {
        bail!("Ctrl-C should end with status 130 and one record; status {status:?}, records: {kept}");
    }
    Ok(())
}

fn build(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut cargo = Command::new("/usr/bin/cargo");
    cargo.current_dir(process::root());
    cargo.args(["test", "--no-run", "--release", "-Zbuild-std", "--target", TARGET]);
    cargo.args(["-p", "roofbench-core", "-p", "roofbench-cli"]);
    // Rust's library is part of the build, which stable compilers allow under this variable alone.
    cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", folder);
    built(&mut cargo)
}

/// A Windows of its own, in a folder.
struct Wine {
    prefix: PathBuf,
}

impl Wine {
    fn new(folder: &Path) -> anyhow::Result<Self> {
        let wine = Self { prefix: folder.join("wine") };
        let system = wine.prefix.join("drive_c/windows/system32");
        if !system.join("ntdll.dll").exists() {
            step(wine.command().args(["wineboot", "--init"]))?;
        }
        let (source, library) = (folder.join("bcryptprimitives.c"), system.join("bcryptprimitives.dll"));
        if !library.exists() {
            fs::write(&source, BCRYPT_PRIMITIVES).with_context(|| source.display().to_string())?;
            let mut compiler = Command::new("x86_64-w64-mingw32-gcc");
            step(compiler.args(["-shared", "-O2", "-o"]).arg(&library).arg(&source).arg("-ladvapi32"))?;
        }
        Ok(wine)
    }

    fn command(&self) -> Command {
        self.environment(Command::new(WINE))
    }

    fn environment(&self, mut command: Command) -> Command {
        command.current_dir(process::root()).env("WINEPREFIX", &self.prefix);
        command.env("WINEARCH", "win64").env("WINEDEBUG", "-all").env_remove("DISPLAY");
        command
    }

    fn run(&self, program: &Path) -> Command {
        let mut command = self.command();
        command.arg(program);
        command
    }
}

/// Wine shows the root folder as the drive Z.
fn windows_path(path: &Path) -> String {
    format!("Z:{}", path.display()).replace('/', "\\")
}
