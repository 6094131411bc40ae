//! `roofbench plan`: time and memory of cells on this machine before anything is downloaded, and how good that is.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use roofbench_core::hardware;
use roofbench_core::predict::{Calibration, Kind, Measured};
use roofbench_core::record::{self, Record};
use roofbench_core::session::{Engine, Phase};
use roofbench_core::stats;
use serde::Serialize;

use crate::arguments::DTypeArg;
use crate::job::Job;
use crate::predict::{self, Forecast};
use crate::{choice, memory, plan, ui};

/// Predict time and memory of cells on this machine, before anything is downloaded
///
/// FLOPs and bytes follow from a checkpoint's config; the ceilings of this machine are measured; how close to them each
/// kind of work comes was learnt from measured cells. With --records it is learnt from those, and each is shown beside
/// what the others predict for it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench plan                              every family this build runs, at its standard cells
  roofbench plan llama --dtype f32,bf16       does it fit, and how fast would it be?
  roofbench plan bert --checkpoint google-bert/bert-large-uncased --batch 1,8,32
  roofbench plan llama --opt +weights-q8      with weights in 8 bits
  roofbench plan --records results.jsonl      prediction beside measurement, and the error
  roofbench plan --memory 8e9 --budget 20m    what of each family fits in both; `cargo xtask bench-all` takes the same")]
#[group(id = "plan")]
pub(crate) struct Arguments {
    /// Families, as `roofbench list` names them; all that this build runs when none is given
    #[arg(value_name = "FAMILY")]
    families: Vec<String>,
    /// Only cells whose `family/cell` matches this regular expression; may be repeated
    #[arg(short, long, value_name = "REGEX")]
    cell: Vec<regex::Regex>,
    /// Another checkpoint than the family's default
    #[arg(long, value_name = "OWNER/NAME")]
    checkpoint: Option<String>,
    /// Batch sizes; the standard cells' own when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = clap::value_parser!(u64).range(1..=65536))]
    batch: Vec<u64>,
    /// Numbers of CPU threads; all usable ones when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Vec<u32>,
    /// Types of weights; the family's standard one when not given
    #[arg(long, value_delimiter = ',', value_name = "LIST", ignore_case = true)]
    dtype: Vec<DTypeArg>,
    /// Optimisations switched on (`+name`) or off (`-name`)
    #[arg(long, value_delimiter = ',', value_name = "+NAME,-NAME", allow_hyphen_values = true)]
    opt: Vec<String>,
    /// Cells as `run --quick` would measure them: the first of each family, fewer samples
    #[arg(long)]
    quick: bool,

    /// Learns from these records in place of what is built in; without a family, shows the error for each of them
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    records: Vec<PathBuf>,
    /// Writes what --records taught, in the form of crates/core/calibration.json
    #[arg(long, value_name = "FILE", requires = "records", help_heading = "Calibration")]
    calibration: Option<PathBuf>,

    /// Chooses checkpoint and precision of each family so that it fits in so many bytes: 8e9, 8GB, 4GiB
    #[arg(long, value_name = "BYTES", value_parser = choice::bytes, help_heading = "Choice")]
    memory: Option<f64>,
    /// Chooses checkpoints and cells so that all can be measured in this time: 90s, 20m, 2h
    #[arg(long, value_name = "TIME", value_parser = choice::seconds, help_heading = "Choice")]
    budget: Option<f64>,

    /// A Markdown table
    #[arg(long, help_heading = "Output", conflicts_with = "json")]
    markdown: bool,
    /// One JSON object on each line
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Predicts and prints.
///
/// # Errors
/// The request can't be met: a family, cell, checkpoint or file in it is at fault, or ceilings can't be measured.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut calibration = Calibration::default();
    if !arguments.records.is_empty() {
        let cells = measured(&arguments.records)?;
        let plain = Calibration { families: Default::default(), ..calibration };
        calibration = plain.fitted(&cells, source(&cells));
        if let Some(path) = &arguments.calibration {
            let text = serde_json::to_string_pretty(&calibration).context("writing the calibration")?;
            std::fs::write(path, text + "\n").with_context(|| format!("--calibration {}", path.display()))?;
        }
        if arguments.families.is_empty() && arguments.checkpoint.is_none() {
            show_errors(arguments, &plain, &cells)?;
            return Ok(ExitCode::SUCCESS);
        }
    }
    let mut machine = hardware::probe();
    super::probe::measure_peaks(&mut machine, false)?;
    if arguments.memory.is_some() || arguments.budget.is_some() {
        ensure!(
            arguments.checkpoint.is_none() && arguments.dtype.is_empty() && arguments.opt.is_empty(),
            "--memory and --budget choose checkpoint, dtype and weights: leave --checkpoint, --dtype and --opt out"
        );
        let limits = choice::Limits { memory: arguments.memory, budget: arguments.budget, quick: arguments.quick };
        let chosen = choice::choose(&arguments.families, &limits, &calibration, &machine)?;
        show_choice(arguments, &chosen, &limits)?;
        return Ok(ExitCode::SUCCESS);
    }
    let jobs = plan::plan(&plan::grid(&words(arguments))?, &machine)?;
    let forecasts: Vec<_> = jobs.iter().map(|job| predict::forecast(job, &calibration)).collect();
    show(arguments, &calibration, &jobs, &forecasts)?;
    Ok(ExitCode::SUCCESS)
}

fn words(arguments: &Arguments) -> Vec<String> {
    let mut words = arguments.families.clone();
    let mut flag = |name: &str, value: String| {
        if !value.is_empty() {
            words.push(format!("--{name}={value}"));
        }
    };
    let joined = |list: &[String]| list.join(",");
    arguments.cell.iter().for_each(|cell| flag("cell", cell.to_string()));
    flag("checkpoint", arguments.checkpoint.clone().unwrap_or_default());
    flag("batch", joined(&arguments.batch.iter().map(u64::to_string).collect::<Vec<_>>()));
    flag("threads", joined(&arguments.threads.iter().map(u32::to_string).collect::<Vec<_>>()));
    flag("dtype", joined(&arguments.dtype.iter().map(|dtype| dtype.name().to_owned()).collect::<Vec<_>>()));
    flag("opt", joined(&arguments.opt));
    words.extend(arguments.quick.then(|| "--quick".to_owned()));
    words
}

/// A line of the table.
#[derive(Serialize)]
struct Line<'a> {
    cell: String,
    checkpoint: &'a str,
    dtype: &'a str,
    threads: usize,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Predicted {
        /// Of a call.
        seconds: f64,
        phases: Vec<(Phase, f64)>,
        memory_bytes: f64,
        /// Why it would not fit in what is free now.
        refusal: Option<String>,
        /// Of the whole measurement.
        wall_seconds: f64,
        bound: Vec<Kind>,
        basis: &'static str,
    },
    Unavailable {
        reason: String,
    },
}

fn outcome(job: &Job, forecast: &anyhow::Result<Forecast>) -> Outcome {
    let forecast = match forecast {
        Ok(forecast) => forecast,
        Err(error) => return Outcome::Unavailable { reason: ui::chain(error) },
    };
    let prediction = &forecast.prediction;
    Outcome::Predicted {
        seconds: prediction.seconds(),
        phases: prediction.phases.clone(),
        memory_bytes: prediction.memory,
        refusal: memory::beyond(prediction.memory, job, &job.machine),
        wall_seconds: predict::wall_seconds(prediction, &job.sampling),
        bound: forecast.task.work.iter().map(|work| work.kind).collect(),
        basis: if prediction.corrected { "its family was measured" } else { "its kind of work" },
    }
}

fn show(
    arguments: &Arguments,
    calibration: &Calibration,
    jobs: &[Job],
    forecasts: &[anyhow::Result<Forecast>],
) -> anyhow::Result<()> {
    let header = ["cell", "checkpoint", "dtype", "threads", "time", "memory", "fits", "measuring takes", "from"];
    let mut rows = Vec::new();
    for (job, forecast) in jobs.iter().zip(forecasts) {
        let line = Line {
            cell: job.label(),
            checkpoint: &job.checkpoint,
            dtype: job.dtype.name(),
            threads: job.threads,
            outcome: outcome(job, forecast),
        };
        if arguments.json {
            ui::print(&serde_json::to_string(&line).context("writing a prediction")?)?;
            continue;
        }
        let mut row = vec![line.cell, line.checkpoint.to_owned(), line.dtype.to_owned(), line.threads.to_string()];
        match line.outcome {
            Outcome::Predicted { seconds, memory_bytes, refusal, wall_seconds, basis, .. } => row.extend([
                format!("≈{}", ui::time(seconds)),
                format!("≈{}", ui::bytes(memory_bytes)),
                refusal.map_or("yes", |_| "no").to_owned(),
                format!("≈{}", ui::time(wall_seconds)),
                basis.to_owned(),
            ]),
            Outcome::Unavailable { reason } => row.push(reason),
        }
        rows.push(row);
    }
    if !arguments.json {
        print_table(arguments.markdown, &header, rows)?;
        eprintln!("efficiencies from {}", calibration.source);
    }
    Ok(())
}

fn print_table(markdown: bool, header: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    if markdown {
        let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
        let rule = format!("|{}", "---|".repeat(header.len()));
        let lines: Vec<String> = [line(&header), rule].into_iter().chain(rows.iter().map(|row| line(row))).collect();
        return Ok(ui::print(&lines.join("\n"))?);
    }
    let mut table = roofbench_report::empty_table(header);
    for row in rows {
        table.add_row(row);
    }
    Ok(ui::print(&table.to_string())?)
}

/// What the measured cells of `paths` teach; those that can't are told on standard error.
pub(crate) fn measured(paths: &[PathBuf]) -> anyhow::Result<Vec<Measured>> {
    let mut records: Vec<Record> = Vec::new();
    for path in paths {
        let outcome = record::read(path).context("--records")?;
        outcome.problems.iter().for_each(|problem| eprintln!("warning: {problem}"));
        records.extend(outcome.records.into_iter().filter(|record| record.subject.engine == Engine::Roofbench));
    }
    let mut cells = Vec::new();
    for record in &records {
        match predict::measured(record) {
            Ok(cell) => cells.extend(cell),
            Err(error) => eprintln!("warning: {} teaches nothing: {}", record.subject.label(), ui::chain(&error)),
        }
    }
    ensure!(!cells.is_empty(), "--records: no measured cell to learn from");
    Ok(cells)
}

fn source(cells: &[Measured]) -> String {
    format!("{} on {}", ui::count(cells.len(), "measured cell"), cells[0].machine)
}

/// Prediction beside measurement.
#[derive(Serialize)]
struct Comparison<'a> {
    cell: &'a str,
    dtype: &'a str,
    threads: u32,
    predicted_seconds: f64,
    measured_seconds: Option<f64>,
    predicted_bytes: f64,
    measured_bytes: Option<f64>,
    /// Another cell of the family was measured.
    family_known: bool,
}

impl Comparison<'_> {
    fn time_error(&self) -> Option<f64> {
        Some(self.predicted_seconds / self.measured_seconds? - 1.0)
    }

    fn memory_error(&self) -> Option<f64> {
        Some(self.predicted_bytes / self.measured_bytes? - 1.0)
    }
}

/// Each cell beside what all others predict for it.
fn show_errors(arguments: &Arguments, plain: &Calibration, cells: &[Measured]) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for (place, cell) in cells.iter().enumerate() {
        let others: Vec<Measured> =
            cells.iter().enumerate().filter(|(other, _)| *other != place).map(|(_, cell)| cell.clone()).collect();
        let prediction = plain.fitted(&others, "").predict(&cell.task, &cell.ceiling);
        lines.push(Comparison {
            cell: &cell.label,
            dtype: &cell.ceiling.dtype,
            threads: cell.ceiling.threads,
            predicted_seconds: prediction.seconds(),
            measured_seconds: cell.seconds.iter().copied().sum(),
            predicted_bytes: prediction.memory,
            measured_bytes: cell.memory,
            family_known: prediction.corrected,
        });
    }
    if arguments.json {
        for line in &lines {
            ui::print(&serde_json::to_string(line).context("writing a comparison")?)?;
        }
        return Ok(());
    }
    let header = ["cell", "threads", "predicted", "measured", "error", "memory predicted", "measured", "error", "from"];
    let percent = |error: Option<f64>| error.map_or("–".to_owned(), |error| format!("{:+.0} %", 100.0 * error));
    let shown = |value: Option<f64>, show: fn(f64) -> String| value.map_or("–".to_owned(), show);
    let rows = lines.iter().map(|line| {
        vec![
            line.cell.to_owned(),
            line.threads.to_string(),
            ui::time(line.predicted_seconds),
            shown(line.measured_seconds, ui::time),
            percent(line.time_error()),
            ui::bytes(line.predicted_bytes),
            shown(line.measured_bytes, ui::bytes),
            percent(line.memory_error()),
            if line.family_known { "family" } else { "kind" }.to_owned(),
        ]
    });
    print_table(arguments.markdown, &header, rows.collect())?;
    let known = |line: &&Comparison<'_>| line.family_known;
    let groups: [(&str, Vec<&Comparison<'_>>); 3] = [
        ("all cells", lines.iter().collect()),
        ("a cell of the family known", lines.iter().filter(known).collect()),
        ("kinds of work alone", lines.iter().filter(|line| !known(line)).collect()),
    ];
    let rows = groups.iter().filter(|(_, lines)| !lines.is_empty()).map(|(name, lines)| {
        let time: Vec<f64> = lines.iter().filter_map(|line| Some(line.time_error()?.abs())).collect();
        let memory: Vec<f64> = lines.iter().filter_map(|line| Some(line.memory_error()?.abs())).collect();
        let spread = [(&time, 50.0), (&time, 90.0), (&memory, 50.0), (&memory, 90.0)].map(|(errors, p)| {
            stats::percentile_of(errors, p).map_or("–".to_owned(), |error| format!("{:.0} %", 100.0 * error))
        });
        [(*name).to_owned(), lines.len().to_string()].into_iter().chain(spread).collect()
    });
    let header =
        ["error", "cells", "time, median", "time, 90th percentile", "memory, median", "memory, 90th percentile"];
    ui::print("")?;
    print_table(arguments.markdown, &header, rows.collect())?;
    eprintln!("each cell is predicted from all others");
    Ok(())
}

fn show_choice(arguments: &Arguments, chosen: &[choice::Choice], limits: &choice::Limits) -> anyhow::Result<()> {
    if arguments.json {
        for choice in chosen {
            for line in choice.lines() {
                ui::print(&line.to_string())?;
            }
        }
        return Ok(());
    }
    let header = ["family", "checkpoint", "dtype", "weights", "cells", "memory", "measuring takes", "why"];
    let rows = chosen.iter().map(|choice| match &choice.outcome {
        Ok(taken) => vec![
            choice.family.clone(),
            taken.jobs[0].checkpoint.clone(),
            taken.jobs[0].dtype.name().to_owned(),
            taken.weights().to_owned(),
            taken.jobs.len().to_string(),
            format!("≈{}", ui::bytes(taken.memory)),
            format!("≈{}", ui::time(taken.seconds)),
            choice.why.clone(),
        ],
        Err(reason) => {
            let mut row = vec![choice.family.clone()];
            row.extend((0..6).map(|_| "–".to_owned()));
            row.push(reason.clone());
            row
        }
    });
    print_table(arguments.markdown, &header, rows.collect())?;
    let total: f64 = chosen.iter().filter_map(|choice| Some(choice.outcome.as_ref().ok()?.seconds)).sum();
    let of = limits.budget.map_or_else(String::new, |budget| format!(" of {}", ui::time(budget)));
    eprintln!("about {}{of} to measure", ui::time(total));
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn flags_reach_the_grid() {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            arguments: Arguments,
        }
        let line =
            "plan bert --batch 1,4 --threads 1 --dtype bf16 --opt +weights-q8,-fused-attention --cell s512 --quick";
        let grid = plan::grid(&words(&Line::parse_from(line.split(' ')).arguments)).unwrap();
        assert_eq!((grid.families, grid.batch, grid.threads), (vec!["bert".to_owned()], vec![1, 4], vec![1]));
        assert_eq!((grid.dtype, grid.opt.len(), grid.cell.len(), grid.quick), (vec![DTypeArg::Bf16], 2, 1, true));
    }
}
