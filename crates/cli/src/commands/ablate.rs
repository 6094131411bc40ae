//! `roofbench run --ablate`: what each optimisation is worth, by running a cell with and without it in alternation.
//!
//! The cell as planned and the cell with one decision reversed are processes of their own (`roofbench sample`) that run
//! bursts of calls in turn. Their outputs are held against those in f32 with weights as they are.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use roofbench_core::harness::alternation::{self, Contender, Process, Ratio};
use roofbench_core::optimize::{self, Decision, Plan, Switch};
use roofbench_core::session::Engine;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::run::Arguments;
use super::sample::{self, Deviation};
use crate::arguments::{DTypeArg, EXIT_FAILED};
use crate::job::Job;
use crate::{memory, plan, ui};

/// Rounds of alternation and nanoseconds of a burst; those of a first look.
const STANDARD: (usize, u64) = (12, 700_000_000);
const QUICK: (usize, u64) = (6, 100_000_000);

/// What one optimisation is worth.
#[derive(Debug, Serialize)]
struct Effect {
    cell: String,
    #[serde(flatten)]
    decision: Decision,
    /// Time without it over time with it, round by round: above 1 it makes the cell faster.
    speedup: Ratio,
    /// How far outputs lie from f32.
    with: Deviation,
    without: Deviation,
}

/// What a process says when it is ready.
#[derive(Deserialize)]
struct Ready {
    optimizations: Plan,
}

/// A folder for the outputs and logs of one run, gone when it ends.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new() -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("roofbench-alternation-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("making the folder {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What remains is the system's to clean up.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Ablates every job, one after the other.
///
/// # Errors
/// A folder for outputs can't be made. What goes wrong with a job is told, and gives another exit status.
pub(crate) fn run(arguments: &Arguments, jobs: &[Job]) -> anyhow::Result<ExitCode> {
    let scratch = Scratch::new()?;
    let mut failed = false;
    for job in jobs {
        let title = plan::title(job, jobs);
        match ablate(job, &scratch.0) {
            Ok(effects) if arguments.json => {
                for effect in &effects {
                    ui::print(&serde_json::to_string(effect).context("writing an effect")?)?;
                }
            }
            Ok(effects) => ui::print(&format!("{title}\n{}", table(&effects)))?,
            Err(error) => {
                failed = true;
                eprintln!("{title}: failed: {}", ui::chain(&error));
            }
        }
    }
    Ok(if failed { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS })
}

fn ablate(job: &Job, scratch: &Path) -> anyhow::Result<Vec<Effect>> {
    ensure!(
        job.engine == Engine::Roofbench,
        "candle-transformers' models are run as they are; --ablate is for --engine roofbench"
    );
    fits_twice(job)?;
    let (rounds, burst) = if job.sampling.quick { QUICK } else { STANDARD };
    let program = std::env::current_exe().context("finding this program's own file")?;
    let case = |name: &str| scratch.join(name);
    let start = |job: &Job, name: &str| -> anyhow::Result<(Contender<Process>, Ready)> {
        let (process, ready) = started(&program, job, &case(name))?;
        Ok((Contender::new(process, burst)?, ready))
    };
    eprintln!("{}: loading", job.label());
    let (mut base, Ready { optimizations }) = start(job, "base")?;
    let exact = if job.dtype == DTypeArg::F32 && optimizations.weight_bits().is_none() {
        case("base")
    } else {
        started::<Ready>(&program, &in_f32(job), &case("f32"))
            .context("the cell in f32, which outputs are held against")?;
        case("f32")
    };
    let of_base = sample::deviation(&exact, &case("base"))?;
    let mut effects = Vec::new();
    for decision in optimizations.decisions.into_iter().filter(|decision| decision.applies) {
        let other = Switch { name: decision.name.clone(), on: !decision.on };
        eprintln!("{}: {other}", job.label());
        let (mut variant, _) = start(&with(job, &other), "variant").with_context(|| other.to_string())?;
        base.clear();
        alternation::alternate(&mut [&mut base, &mut variant], rounds).with_context(|| other.to_string())?;
        let of_variant = sample::deviation(&exact, &case("variant"))?;
        let (slow, fast) = if decision.on { (&variant, &base) } else { (&base, &variant) };
        let speedup = Ratio::of(slow.medians(), fast.medians()).context("too few rounds for an interval")?;
        let (with, without) = if decision.on { (of_base, of_variant) } else { (of_variant, of_base) };
        effects.push(Effect { cell: job.label(), decision, speedup, with, without });
    }
    Ok(effects)
}

/// An error when `job` would not fit in memory beside itself.
pub(super) fn fits_twice(job: &Job) -> anyhow::Result<()> {
    let needed = 2.0 * memory::estimate(job, &Plan::default()).total();
    ensure!(
        job.machine.memory.available_bytes.is_none_or(|available| needed <= available as f64),
        "the cell would be in memory twice, which takes about {}; a smaller --checkpoint or --batch may fit",
        ui::bytes(needed)
    );
    Ok(())
}

/// Starts `job` as a process of `program`, which keeps the outputs of our engine in `case`; what it says when it is ready.
pub(super) fn started<T: DeserializeOwned>(program: &Path, job: &Job, case: &Path) -> anyhow::Result<(Process, T)> {
    let log = case.with_extension("log");
    let mut command = Command::new(program);
    command.arg("sample").args(plan::command(job).iter().skip(1));
    if job.engine == Engine::Roofbench {
        command.args([OsStr::new("--case"), case.as_os_str()]);
    }
    if let Some(percent) = job.slow_down {
        command.args(["--slow-down", &percent.to_string()]);
    }
    command.stderr(fs::File::create(&log).with_context(|| log.display().to_string())?);
    for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        command.env(variable, job.threads.to_string());
    }
    Process::start(&mut command).with_context(|| match fs::read_to_string(&log) {
        Ok(words) if !words.trim().is_empty() => format!("the cell did not become ready; its words: {}", words.trim()),
        _ => "the cell did not become ready".to_owned(),
    })
}

/// `job` with one more switch, which has the last word.
fn with(job: &Job, switch: &Switch) -> Job {
    let mut switches = job.switches.clone();
    switches.retain(|other| !optimize::exclude(&other.name, &switch.name) || !other.on);
    switches.retain(|other| other.name != switch.name);
    switches.push(switch.clone());
    requesting(job, &switches, job.dtype)
}

/// `job` with the weights as they are, in f32.
fn in_f32(job: &Job) -> Job {
    let forms = [optimize::WEIGHTS_Q8.name, optimize::WEIGHTS_Q4.name];
    let mut switches = job.switches.clone();
    switches.retain(|switch| !forms.contains(&switch.name.as_str()) && switch.name != optimize::BF16_PRODUCTS.name);
    switches.extend(forms.map(|name| Switch { name: name.to_owned(), on: false }));
    requesting(job, &switches, DTypeArg::F32)
}

fn requesting(job: &Job, switches: &[Switch], dtype: DTypeArg) -> Job {
    let mut job = job.clone();
    let list: Vec<String> = switches.iter().map(Switch::to_string).collect();
    job.requested.insert("opt".to_owned(), list.join(","));
    job.requested.insert("dtype".to_owned(), dtype.name().to_owned());
    // `--pin` asks for the same as a switch, which may now say otherwise
    if switches.iter().any(|switch| switch.name == optimize::PINNED_THREADS.name) {
        job.requested.remove("pin");
    }
    job
}

fn table(effects: &[Effect]) -> String {
    if effects.is_empty() {
        return "no optimization applies to it here".to_owned();
    }
    let header = ["optimization", "now", "speedup", "95 % interval", "error from f32: with, without", "top-1", "why"];
    let mut table = roofbench_report::empty_table(&header);
    let both = |with: Option<f64>, without: Option<f64>, show: fn(f64) -> String| {
        let shown = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), show);
        format!("{}, {}", shown(with), shown(without))
    };
    for Effect { decision, speedup, with, without, .. } in effects {
        let value = decision.value.map_or_else(String::new, |value| format!(" {value}"));
        table.add_row([
            format!("{}{value}", decision.name),
            if decision.on { "on" } else { "off" }.to_owned(),
            format!("{:.3}x", speedup.median),
            format!("{:.3} to {:.3}", speedup.low, speedup.high),
            both(with.error, without.error, |error| format!("{error:.1e}")),
            both(with.agreement, without.agreement, |share| format!("{:.1} %", 100.0 * share)),
            decision.reason.clone(),
        ]);
    }
    format!("{table}\nspeedup: time without it over time with it, so above 1 it makes the cell faster")
}

#[cfg(all(test, feature = "text"))]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        run: Arguments,
    }

    #[test]
    fn the_last_word_is_the_ablation_s() {
        let switch = |text: &str| text.parse::<Switch>().unwrap();
        let flags = "run bert --cell b1/s128 --dtype bf16 --pin --opt +weights-q8,-fused-attention";
        let Cli { run } = Cli::parse_from(flags.split(' '));
        let job = plan::plan(&run, &roofbench_core::hardware::probe()).unwrap().remove(0);
        assert_eq!(job.requested["opt"], "+weights-q8,-fused-attention");
        let opt = |job: &Job| job.requested["opt"].clone();
        assert_eq!(opt(&with(&job, &switch("+weights-q4"))), "-fused-attention,+weights-q4");
        assert_eq!(opt(&with(&job, &switch("+fused-attention"))), "+weights-q8,+fused-attention");
        assert!(!with(&job, &switch("-pinned-threads")).requested.contains_key("pin"));
        let exact = in_f32(&job);
        assert_eq!(opt(&exact), "-fused-attention,-weights-q8,-weights-q4");
        assert_eq!(exact.requested["dtype"], "f32");
    }
}
