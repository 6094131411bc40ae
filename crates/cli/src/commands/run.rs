//! `roofbench run`: measures a grid of cells, each in its own process, and keeps a record of each.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use roofbench_core::meters::clock;
use roofbench_core::optimize::Switch;
use roofbench_core::record::{Outcome, Record, StopRule, Warning, Writer};
use serde_json::Value;

use super::{ablate, against};
use crate::arguments::{DTypeArg, DeviceArg, EXIT_FAILED, EXIT_INTERRUPTED, EngineArg, WeightsArg};
use crate::job::Job;
use crate::supervise::{End, Supervisor, Told};
use crate::ui::{self, Progress};
use crate::{choice, plan};

/// Measure models: latency, throughput, memory, energy, and how close they come to what the machine can do
///
/// Every combination of the lists is a cell. A cell is measured in a process of its own: inputs are drawn from a seed,
/// the weights loaded, the first call and the warm-up set apart, and calls sampled until the median is settled. Ctrl-C
/// ends the cell at hand with the samples it has; a second Ctrl-C ends at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench run                            every family this build runs, at its standard cells
  roofbench run bert vit --batch 1,8 --threads 1,2
                                           a grid: 2 batches x 2 thread counts for each
  roofbench run bert --cell s512           cells whose name holds s512 (a regular expression)
  roofbench run vit --engine roofbench,candle-transformers
                                           beside the stock model of candle-transformers
  roofbench run bert --checkpoint google-bert/bert-large-uncased --dtype bf16
  roofbench run bert --weights hub         the published weights, fetched into the Hub's cache
  roofbench run bert --weights ./all-MiniLM-L6-v2 --text \"a boat\" --text \"a ship\"
                                           real weights on real text, and what comes out
  roofbench run vit --weights ./vit-base-patch16-224 --image photo.jpg
                                           real weights on a real picture: the likeliest labels
  roofbench run detr --weights hub --image photo.jpg --save boxes.png
                                           the objects in it, and the picture with their boxes
  roofbench run llama --opt +weights-q8,-decode-threads
                                           weights in 8 bits, all threads for decoding
  roofbench run vit --ablate               what each optimisation is worth here
  roofbench run bert --profile             where the time goes, by operation
  roofbench run bert --sustain 10m         what is left of the speed after ten minutes
  roofbench run bert --against main        this build beside that of a commit, in alternation
  roofbench run bert --dry-run             what would be measured

Exit status: 0 all is measured (or skipped with a reason), 1 a cell or an answer failed, 2 the command could not
start, 130 interrupted. With --against: 0 no cell is slower, 1 a cell is slower, 2 undecided, 64 it could not be compared.")]
#[group(id = "run")]
pub(crate) struct Arguments {
    /// Families, as `roofbench list` names them; all that this build runs when none is given
    #[arg(value_name = "FAMILY")]
    pub(crate) families: Vec<String>,
    /// Only cells whose `family/cell` matches this regular expression; may be repeated
    #[arg(short, long, value_name = "REGEX")]
    pub(crate) cell: Vec<regex::Regex>,
    /// Another checkpoint than the family's default (`roofbench list FAMILY` shows them)
    #[arg(long, value_name = "OWNER/NAME")]
    pub(crate) checkpoint: Option<String>,

    /// `synthetic` (made from a seed, no download), `hub` (the published ones), or a folder or file
    #[arg(long, value_name = "synthetic|hub|PATH", default_value = "synthetic", help_heading = "Weights")]
    pub(crate) weights: WeightsArg,
    /// Seed of synthetic weights and of drawn inputs
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Weights")]
    pub(crate) seed: u64,
    /// Branch, tag or commit on the Hub
    #[arg(long, value_name = "REV", help_heading = "Weights")]
    pub(crate) revision: Option<String>,
    /// Use only what the Hub's cache already holds
    #[arg(long, help_heading = "Weights")]
    pub(crate) offline: bool,
    /// Tensors of the checkpoint that the model has no use for are no error
    #[arg(long, help_heading = "Weights")]
    pub(crate) ignore_extra_tensors: bool,

    /// What runs the model
    #[arg(long, value_delimiter = ',', default_value = "roofbench", value_name = "LIST", help_heading = "Grid")]
    pub(crate) engine: Vec<EngineArg>,
    /// Batch sizes; the standard cells' own when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", help_heading = "Grid",
          value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub(crate) batch: Vec<u64>,
    /// Numbers of CPU threads; all usable ones when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", help_heading = "Grid",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) threads: Vec<u32>,
    /// Types of weights; the family's standard one when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", help_heading = "Grid", ignore_case = true)]
    pub(crate) dtype: Vec<DTypeArg>,
    /// cpu, cuda[:N] or metal
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = "Grid")]
    pub(crate) device: DeviceArg,
    /// Ties each thread to one CPU
    #[arg(long, help_heading = "Grid")]
    pub(crate) pin: bool,
    /// Allows more threads than this process may use
    #[arg(long, help_heading = "Grid")]
    pub(crate) oversubscribe: bool,

    /// Optimisations to switch on (`+name`) or off (`-name`); each has a rule that decides it otherwise
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "+NAME,-NAME",
        help_heading = "Optimizations",
        allow_hyphen_values = true
    )]
    pub(crate) opt: Vec<Switch>,
    /// In place of a measurement: what each optimisation is worth, by running with and without it in alternation
    #[arg(long, help_heading = "Optimizations", conflicts_with_all = ["output", "dry_run"])]
    pub(crate) ablate: bool,

    /// In place of a measurement: whether this build is slower than another, a program or a commit of this checkout
    #[arg(long, value_name = "COMMIT|BINARY", help_heading = "Comparison",
          conflicts_with_all = ["output", "dry_run", "ablate"])]
    pub(crate) against: Option<String>,
    /// Makes each call slower by this percentage; for `cargo xtask study`, which looks for it
    #[arg(long, value_name = "PERCENT", value_parser = percent, hide = true)]
    pub(crate) slow_down: Option<f64>,

    /// A first look: fewer samples, seconds per cell
    #[arg(long, help_heading = "Sampling")]
    pub(crate) quick: bool,
    /// Least time of sampling, in seconds [default: 1; quick: 0.2]
    #[arg(long, value_name = "S", value_parser = seconds, help_heading = "Sampling")]
    pub(crate) min_time: Option<f64>,
    /// Most time of sampling, in seconds; one sample is always taken [default: 30; quick: 5]
    #[arg(long, value_name = "S", value_parser = seconds, help_heading = "Sampling")]
    pub(crate) max_time: Option<f64>,
    /// Fewest samples, unless the time runs out [default: 10; quick: 6]
    #[arg(long, value_name = "N", help_heading = "Sampling",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) min_samples: Option<u32>,
    /// Most samples [default: 500; quick: 50]
    #[arg(long, value_name = "N", help_heading = "Sampling",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) max_samples: Option<u32>,
    /// Enough is known when the median's 95 % interval is within this percentage of it [default: 2; quick: 5]
    #[arg(long, value_name = "PERCENT", value_parser = percent, help_heading = "Sampling")]
    pub(crate) target: Option<f64>,
    /// Processes of each cell, in turn over all cells; `roofbench compare` learns from them how far runs differ
    /// [default: 1; pairs of processes with --against: 5, and 10 and 20 where fewer don't decide]
    #[arg(long, value_name = "N", help_heading = "Sampling", conflicts_with = "ablate",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeat: Option<u32>,
    /// Most time of one cell, loading included, in seconds; it is ended and fails beyond it
    #[arg(long, value_name = "S", value_parser = seconds, help_heading = "Sampling")]
    pub(crate) timeout: Option<f64>,

    /// Behind the samples: time, FLOPs and bytes of each operation and layer
    #[arg(long, conflicts_with = "ablate", help_heading = "Behind the samples")]
    pub(crate) profile: bool,
    /// Its last call in Chrome's trace format, for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ablate", "dry_run"], help_heading = "Behind the samples")]
    pub(crate) trace: Option<PathBuf>,
    /// Calls for so long (90s, 10m), and what is left of the speed
    #[arg(long, value_name = "TIME", value_parser = choice::seconds, conflicts_with = "ablate",
          help_heading = "Behind the samples")]
    pub(crate) sustain: Option<f64>,

    /// Text for the checkpoint's own tokenizer in place of drawn tokens; may be repeated, one batch
    #[arg(long, value_name = "TEXT", help_heading = "Real inputs", conflicts_with_all = ["batch", "cell"])]
    pub(crate) text: Vec<String>,
    /// Picture for the checkpoint's own preprocessing in place of drawn pixels; may be repeated, one batch
    #[arg(long, value_name = "FILE", help_heading = "Real inputs", conflicts_with_all = ["batch", "cell"])]
    pub(crate) image: Vec<PathBuf>,
    /// Sound for the checkpoint's own feature extraction in place of drawn samples; may be repeated, one batch
    #[arg(long, value_name = "FILE", help_heading = "Real inputs", conflicts_with_all = ["batch", "cell"])]
    pub(crate) audio: Vec<PathBuf>,
    /// Argument of the call by the library's name, the value as JSON or plain text: max_new_tokens=64, threshold=0.5
    #[arg(long, value_name = "NAME=VALUE", value_parser = argument, help_heading = "Real inputs")]
    pub(crate) arg: Vec<(String, Value)>,
    /// Writes the answer as a picture or sound to this file: boxes and masks drawn, speech
    #[arg(long, value_name = "FILE", help_heading = "Real inputs")]
    pub(crate) save: Option<PathBuf>,

    /// Records are appended to this file [default: roofbench-results/<time>.jsonl]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub(crate) output: Option<PathBuf>,
    /// Records on standard output, one JSON line each, in place of the table
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
    /// Shows what would be measured, and measures nothing
    #[arg(long, help_heading = "Output")]
    pub(crate) dry_run: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds, from 0 to 1000000".to_owned()),
    }
}

fn argument(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

pub(crate) fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent < 100.0 => Ok(percent),
        _ => Err("expected a percentage between 0 and 100".to_owned()),
    }
}

/// Plans the grid, measures it, and shows the results.
///
/// # Errors
/// The request can't be met: a family, cell, checkpoint, device or file in it is at fault.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut machine = roofbench_core::hardware::probe();
    let mut jobs = plan::plan(arguments, &machine)?;
    if arguments.dry_run {
        return dry_run(arguments, &jobs);
    }
    if arguments.ablate {
        super::probe::measure_peaks(&mut machine, false)?;
        return ablate::run(arguments, &jobs);
    }
    if let Some(other) = &arguments.against {
        super::probe::measure_peaks(&mut machine, false)?;
        return against::run(arguments, &jobs, other);
    }
    let path = match &arguments.output {
        Some(path) => path.clone(),
        None => default_output()?,
    };
    // Before anything is measured: a result that can't be kept is not worth the wait.
    let mut writer = Writer::open(&path).context("--output")?;
    let mut supervisor = Supervisor::new()?;
    super::probe::measure_peaks(&mut machine, false)?;
    for job in &mut jobs {
        job.machine = machine.clone();
    }

    let jobs: Vec<Job> = vec![jobs; arguments.repeat.unwrap_or(1) as usize].concat();
    let records = measure_all(arguments, &jobs, &mut supervisor, &mut writer)?;
    let interrupted = supervisor.interrupted();
    if !arguments.json && !records.is_empty() {
        ui::print(&roofbench_report::table(&records))?;
        for text in records.iter().flat_map(roofbench_report::details) {
            ui::print(&text)?;
        }
    }
    if !arguments.json {
        eprintln!("{} in {}", ui::count(records.len(), "record"), path.display());
    }
    if interrupted {
        eprintln!("interrupted: {} of {} done", records.len(), ui::count(jobs.len(), "cell"));
        return Ok(ExitCode::from(EXIT_INTERRUPTED));
    }
    let failed = records.iter().any(|record| {
        matches!(record.outcome, Outcome::Failed { .. })
            || record.warnings.iter().any(|warning| warning.kind == Warning::ANSWER)
    });
    Ok(if failed { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS })
}

fn measure_all(
    arguments: &Arguments,
    jobs: &[Job],
    supervisor: &mut Supervisor,
    writer: &mut Writer,
) -> anyhow::Result<Vec<Record>> {
    let limit = arguments.timeout.map(Duration::from_secs_f64);
    let mut records = Vec::new();
    let mut progress = Progress::new(jobs.len());
    for job in jobs {
        if supervisor.interrupted() {
            break;
        }
        progress.begin(&plan::title(job, jobs));
        let mut answers = Vec::new();
        let end = supervisor.measure(job, limit, |told| match told {
            Told::Status(text) => {
                tracing::info!("{}: {text}", job.label());
                progress.status(text);
            }
            Told::Noise(text) => progress.line(text),
            Told::Answer(text) => answers.push(text.to_owned()),
        })?;
        let record = match end {
            End::Recorded(record) => *record,
            End::Died(error) => crate::worker::record(job, clock::utc_now(), Outcome::Failed { error }),
            End::Stopped => break,
        };
        // Kept before it is shown.
        writer.append(&record)?;
        if arguments.json {
            ui::print(&serde_json::to_string(&record).context("writing a record")?)?;
        }
        progress.end(&ui::result_line(&plan::title(job, jobs), &record));
        for answer in answers {
            if arguments.json { progress.line(&answer) } else { progress.suspended(|| ui::print(&answer))? }
        }
        let stopped = matches!(&record.outcome, Outcome::Measured(m) if m.stop == StopRule::Interrupted);
        records.push(record);
        if stopped {
            break;
        }
    }
    progress.finish();
    Ok(records)
}

/// `roofbench-results/<time>.jsonl` in the current folder.
fn default_output() -> anyhow::Result<PathBuf> {
    let folder = Path::new("roofbench-results");
    std::fs::create_dir_all(folder).with_context(|| {
        let here = std::env::current_dir().unwrap_or_default();
        format!(
            "making the folder roofbench-results in {}; name a file that can be written with --output",
            here.display()
        )
    })?;
    let name = clock::utc_now().replace(':', "-");
    Ok(folder.join(format!("{name}.jsonl")))
}

fn dry_run(arguments: &Arguments, jobs: &[Job]) -> anyhow::Result<ExitCode> {
    if arguments.json {
        for job in jobs {
            ui::print(&plan::planned(job).to_string())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut table =
        roofbench_report::empty_table(&["cell", "checkpoint", "weights", "dtype", "threads", "device", "engine"]);
    for job in jobs {
        let of = |flag: &str| job.requested.get(flag).cloned().unwrap_or_default();
        table.add_row([
            job.label(),
            job.checkpoint.clone(),
            of("weights"),
            of("dtype"),
            of("threads"),
            of("device"),
            of("engine"),
        ]);
    }
    ui::print(&table.to_string())?;
    eprintln!("{} would be measured", ui::count(jobs.len(), "cell"));
    Ok(ExitCode::SUCCESS)
}
