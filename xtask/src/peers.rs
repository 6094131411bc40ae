//! `cargo xtask peers`: our cells and those of other engines in alternation, on the same weights, inputs and threads.
//!
//! Every engine is a process that loads the cell once, says how far its outputs lie from ours, and then runs a few calls
//! whenever it is asked; the others sleep meanwhile. A round asks each once, in turn, so that a drift of the machine meets
//! all of them. Results are kept per CPU model in `docs/performance/`, and `docs/performance.md` is made from those.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use roofbench_core::catalog::{self, Cell, Family};
use roofbench_core::hardware::{self, peaks};
use roofbench_core::harness::alternation::{self, Contender, Process, Ratio};
use roofbench_core::meters::clock;
use roofbench_core::stats;
use serde::{Deserialize, Serialize};

use crate::{bench_all, process};

/// Nanoseconds that one engine runs for in one round.
const BURST_NS: u64 = 700_000_000;
const OURS: &str = "roofbench";
const ENGINES: [&str; 5] = ["torch-eager", "torch-compile", "onnxruntime", "openvino", "candle-transformers"];

#[derive(clap::Args)]
#[command(after_help = "\
Makes a Python environment under target/peers/ with the pinned packages of xtask/peers/requirements.txt (some gigabytes).

Examples:
  cargo xtask peers bert vit
  cargo xtask peers bert --cell b1 --engine openvino --rounds 20")]
pub(crate) struct Arguments {
    /// Families [default: all that the build runs]
    families: Vec<String>,
    /// Only cells whose name contains this
    #[arg(long, value_name = "PART", default_value = "")]
    cell: String,
    /// Only this peer; may be repeated
    #[arg(long, value_name = "ENGINE", value_parser = ENGINES)]
    engine: Vec<String>,
    /// Rounds of alternation
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(6..))]
    rounds: u32,
    /// Threads of every engine [default: all that may be used]
    #[arg(long)]
    threads: Option<u32>,
    /// Type of weights of every engine [default: the family's own]
    #[arg(long)]
    dtype: Option<String>,
}

/// What was measured on one CPU model: the content of `docs/performance/<cpu>.json`.
#[derive(Serialize, Deserialize)]
struct Results {
    cpu: String,
    threads: u32,
    memory_bytes: Option<u64>,
    peak_flops: BTreeMap<String, f64>,
    versions: BTreeMap<String, String>,
    cells: BTreeMap<String, CellResult>,
}

#[derive(Serialize, Deserialize)]
struct CellResult {
    measured_at: String,
    dtype: String,
    rounds: u32,
    flops: u64,
    /// The machine's peak in the cell's type, as it was measured then.
    peak_flops: Option<f64>,
    ours_ns: f64,
    /// Most resident memory while calls ran; what loading took is not in it.
    #[serde(default)]
    ours_bytes: Option<u64>,
    peers: BTreeMap<String, Peer>,
}

#[derive(Serialize, Deserialize)]
struct Peer {
    median_ns: f64,
    /// Their time over ours, round by round: above 1 we are faster. Median and its 95 % interval.
    ratio: f64,
    low: f64,
    high: f64,
    /// As `ours_bytes`.
    #[serde(default)]
    bytes: Option<u64>,
    /// Largest difference between the outputs, over the largest value.
    error: Option<f64>,
}

/// What an engine says when it is ready.
#[derive(Deserialize)]
struct Ready {
    #[serde(default)]
    versions: BTreeMap<String, String>,
    #[serde(default)]
    errors: BTreeMap<String, f64>,
    #[serde(default)]
    flops: u64,
}

/// An engine that has loaded the cell and waits to be asked.
struct Engine {
    name: String,
    contender: Contender<Process>,
}

impl Engine {
    /// Its chatter goes to a file in `folder`.
    fn start(name: &str, mut command: Command, folder: &Path) -> anyhow::Result<(Self, Ready)> {
        let log = folder.join(format!("{name}.log"));
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        command.stderr(fs::File::create(&log).with_context(|| log.display().to_string())?);
        let shown = process::shown(&command);
        let failed = || format!("`{shown}` did not become ready; see {}", log.display());
        let (process, ready) = Process::start(&mut command).with_context(failed)?;
        let contender = Contender::new(process, BURST_NS).with_context(failed)?;
        Ok((Self { name: name.to_owned(), contender }, ready))
    }
}

/// Compares, and writes the results.
///
/// # Errors
/// Python or its packages are not to be had. A peer that can't run a cell is told and left out; a cell that we can't run is
/// told, and the exit status says so.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let python = environment()?;
    let binary = process::build_cli()?;
    let mut machine = hardware::probe();
    let threads = arguments.threads.unwrap_or(machine.cpu.usable_threads);
    let peaks = peaks::load_or_measure(peaks::default_cache_dir().as_deref(), false, &machine)?;
    let file = process::root().join("docs/performance").join(format!("{}.json", slug(&machine.cpu.model)));
    let mut results = match fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?,
        Err(_) => Results {
            cpu: machine.cpu.model.clone(),
            threads,
            memory_bytes: machine.memory.total_bytes,
            peak_flops: BTreeMap::new(),
            versions: BTreeMap::new(),
            cells: BTreeMap::new(),
        },
    };
    results.threads = threads;
    results.peak_flops.clear();
    for peak in peaks.compute.iter().filter(|peak| peak.threads == threads) {
        // The widest of several instruction sets counts.
        let highest = results.peak_flops.entry(peak.dtype.clone()).or_insert(0.0);
        *highest = highest.max(peak.flops);
    }
    machine.peaks = Some(peaks);
    let families = match arguments.families.as_slice() {
        [] => bench_all::runnable(&binary)?,
        names => names.to_vec(),
    };
    let families = families.iter().map(|name| Ok(catalog::family(name)?)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut failed = false;
    let cells = families.iter().flat_map(|family| family.cells.iter().map(move |cell| (*family, cell)));
    for (family, cell) in cells.filter(|(_, cell)| cell.name.contains(&arguments.cell)) {
        let label = format!("{}/{}", family.name, cell.name);
        let (mut result, versions) = match compare(arguments, &python, &binary, threads, family, cell) {
            Ok(compared) => compared,
            Err(error) => {
                eprintln!("{label}: {error:#}");
                failed = true;
                continue;
            }
        };
        result.peak_flops = results.peak_flops.get(&result.dtype).copied();
        results.versions.extend(versions);
        show(&label, &result);
        results.cells.insert(label, result);
        fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        fs::write(&file, serde_json::to_string_pretty(&results)? + "\n")?;
    }
    let page_path = process::root().join("docs/performance.md");
    fs::write(&page_path, page()?).with_context(|| page_path.display().to_string())?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn compare(
    arguments: &Arguments,
    python: &Path,
    binary: &Path,
    threads: u32,
    family: &Family,
    cell: &Cell,
) -> anyhow::Result<(CellResult, BTreeMap<String, String>)> {
    let dtype = arguments.dtype.as_deref().unwrap_or(&family.dtype);
    let case = process::target()?.join("peers").join(format!("{}-{}", family.name, cell.name.replace('/', "-")));
    let ours = |engine: &str| {
        let mut command = Command::new(binary);
        command.args([
            "sample",
            &family.name,
            "--cell",
            &format!("{}$", cell.name),
            "--engine",
            engine,
            "--dtype",
            dtype,
        ]);
        command.args(["--threads", &threads.to_string(), "--case"]).arg(&case);
        // candle's own operations run on rayon's threads
        command.env("RAYON_NUM_THREADS", threads.to_string()).env("CANDLE_NUM_THREADS", threads.to_string());
        command
    };
    let (engine, ready) = Engine::start(OURS, ours(OURS), &case)?;
    let flops = ready.flops;
    let mut engines = vec![engine];
    let mut errors = BTreeMap::new();
    let mut versions = BTreeMap::new();
    for name in ENGINES.iter().filter(|name| arguments.engine.is_empty() || arguments.engine.iter().any(|e| e == *name))
    {
        let command = if *name == "candle-transformers" {
            ours(name)
        } else {
            let mut command = Command::new(python);
            command.arg(process::root().join("xtask/peers/peer.py")).arg("--case").arg(&case);
            command.args(["--engine", name, "--threads", &threads.to_string(), "--dtype", dtype]);
            command
        };
        match Engine::start(name, command, &case) {
            Ok((engine, ready)) => {
                errors.insert((*name).to_owned(), ready.errors.values().copied().reduce(f64::max));
                versions.extend(ready.versions);
                engines.push(engine);
            }
            Err(error) => eprintln!("{}/{}: {name} is left out: {error:#}", family.name, cell.name),
        }
    }
    let forgot = engines.iter().all(|engine| forget_peak(engine.contender.bursts().id()).is_ok());
    let mut contenders: Vec<_> = engines.iter_mut().map(|engine| &mut engine.contender).collect();
    alternation::alternate(&mut contenders, arguments.rounds as usize)?;
    let bytes = |engine: &Engine| forgot.then(|| peak_bytes(engine.contender.bursts().id())).flatten();
    let ours = engines[0].contender.medians().to_vec();
    let peers = engines[1..].iter().map(|engine| {
        let medians = engine.contender.medians();
        let ratio = Ratio::of(medians, &ours).context("rounds")?;
        let peer = Peer {
            median_ns: median(medians)?,
            ratio: ratio.median,
            low: ratio.low,
            high: ratio.high,
            bytes: bytes(engine),
            error: errors.get(&engine.name).copied().flatten(),
        };
        Ok((engine.name.clone(), peer))
    });
    let result = CellResult {
        measured_at: clock::utc_now(),
        dtype: dtype.to_owned(),
        rounds: arguments.rounds,
        flops,
        peak_flops: None,
        ours_ns: median(&ours)?,
        ours_bytes: bytes(&engines[0]),
        peers: peers.collect::<anyhow::Result<_>>()?,
    };
    Ok((result, versions))
}

/// Lets Linux count the most resident memory of a process anew.
fn forget_peak(process: u32) -> std::io::Result<()> {
    fs::write(format!("/proc/{process}/clear_refs"), "5")
}

/// The most resident memory of a process since [`forget_peak`], where Linux tells it.
fn peak_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn median(rounds: &[f64]) -> anyhow::Result<f64> {
    stats::median(&rounds.iter().map(|&ns| ns as u64).collect::<Vec<_>>()).context("no rounds")
}

fn show(label: &str, result: &CellResult) {
    eprintln!("{label}: {:.2} ms", result.ours_ns / 1e6);
    for (name, peer) in &result.peers {
        eprintln!(
            "  {name:20} {:9.2} ms  {:.2}x [{:.2}, {:.2}]",
            peer.median_ns / 1e6,
            peer.ratio,
            peer.low,
            peer.high
        );
    }
}

/// The Python of an environment that has the pinned packages.
fn environment() -> anyhow::Result<PathBuf> {
    let requirements = process::root().join("xtask/peers/requirements.txt");
    let wanted = fs::read_to_string(&requirements).with_context(|| requirements.display().to_string())?;
    let folder = process::target()?.join("peers").join("venv");
    let python = folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    let stamp = folder.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    let system = if cfg!(windows) { "python" } else { "python3" };
    process::run(Command::new(system).args(["-m", "venv"]).arg(&folder))
        .context("making a Python environment (Debian: python3-venv)")?;
    process::run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements))
        .context("installing the peers")?;
    fs::write(&stamp, wanted).with_context(|| stamp.display().to_string())?;
    Ok(python)
}

/// A file name of a CPU model.
fn slug(model: &str) -> String {
    let words = model.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// `docs/performance.md`, from the results of all machines.
///
/// # Errors
/// A result file can't be read.
pub(crate) fn page() -> anyhow::Result<String> {
    let mut text = String::from(HEAD);
    let folder = process::root().join("docs/performance");
    let mut files: Vec<_> = match fs::read_dir(&folder) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => bail!("{}: {error}", folder.display()),
    };
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    for file in files {
        let results: Results =
            serde_json::from_str(&fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
        section(&mut text, &results)?;
    }
    Ok(text)
}

const HEAD: &str = "\
# Performance beside other engines

Made by `cargo xtask peers`, which runs our cells and those of the peers in alternation: same synthetic weights, same
inputs, same threads, same precision, one process each, the others asleep. A round runs every engine for about 0.7 s; the
ratio is *their time over ours* within a round, so above 1 we are faster; its median over the rounds is shown with a
bootstrap 95 % interval. `largest error` is the largest difference from our outputs over the largest value; of a cell that
generates it is that of token ids. Tokens of three cells part: BART's config asks the library not to repeat three tokens,
which our cell does not do; Falcon adds ALiBi twice in the library's eager attention, as we do, and once in the faster one that
the peer runs; Pix2Struct's part at the fifth, where the library's own logits in f32 lie up to 0.6 from those that it gives in
f64, and its two best are 0.3 apart: attention without scaling, over synthetic weights. `of peak` is the analytic
FLOPs over our time, as a share of the machine's measured peak in the cell's type on as many threads. `memory` is the most
resident memory that we take while calls run, and how many times that of it PyTorch (eager) takes. [Kernels](kernels.md) shows
each kernel by itself.
";

fn section(text: &mut String, results: &Results) -> anyhow::Result<()> {
    let memory = results.memory_bytes.map_or_else(String::new, |bytes| format!(", {} GiB", bytes >> 30));
    writeln!(text, "\n## {}, {} threads{memory}\n", results.cpu, results.threads)?;
    let versions: Vec<_> = results.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let peaks: Vec<_> = results.peak_flops.iter().map(|(dtype, f)| format!("{dtype} {:.0} GFLOP/s", f / 1e9)).collect();
    writeln!(text, "Peers: {}. Measured peaks: {}.\n", versions.join(", "), peaks.join(", "))?;
    writeln!(text, "| cell | ours, ms | of peak | {} | memory | largest error | rounds |", ENGINES.join(" | "))?;
    writeln!(text, "|---|---|---|{}---|---|---|", "---|".repeat(ENGINES.len()))?;
    for (label, cell) in &results.cells {
        let share = cell.peak_flops.map_or("–".to_owned(), |peak| {
            format!("{:.0} %", cell.flops as f64 / (cell.ours_ns * 1e-9) / peak * 100.0)
        });
        write!(text, "| {label} ({}) | {:.1} | {share} |", cell.dtype, cell.ours_ns / 1e6)?;
        for engine in ENGINES {
            match cell.peers.get(engine) {
                Some(p) => write!(text, " {:.2} [{:.2}, {:.2}] |", p.ratio, p.low, p.high)?,
                None => write!(text, " – |")?,
            }
        }
        let theirs = cell.peers.get("torch-eager").and_then(|peer| peer.bytes);
        let memory = cell.ours_bytes.zip(theirs).map_or("–".to_owned(), |(ours, theirs)| {
            format!("{} MB, {:.2}", ours / 1_000_000, theirs as f64 / ours as f64)
        });
        write!(text, " {memory} |")?;
        let error = cell.peers.values().filter_map(|peer| peer.error).reduce(f64::max);
        let error = error.map_or("–".to_owned(), |error| format!("{error:.0e}"));
        writeln!(text, " {error} | {} |", cell.rounds)?;
    }
    Ok(())
}
