//! `roofbench recommend`: the settings that keep given limits and make one number small, found in few trials.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use candle_core::Device;
use roofbench_core::hardware::{self, Machine};
use roofbench_core::meters::{self, Meter, Meters, clock};
use roofbench_core::metrics::{self, Derived};
use roofbench_core::predict::Calibration;
use roofbench_core::record::{Outcome, Record, Writer};
use serde_json::json;

use crate::arguments::{DTypeArg, EXIT_FAILED, EXIT_INTERRUPTED};
use crate::goal::{Limits, Objective, Quantity, pareto};
use crate::job::Job;
use crate::supervise::{End, Supervisor, Told};
use crate::{memory, plan, predict, ui};

/// A prediction that breaks a limit by more than this is not tried: nine of ten are closer than that.
const MARGIN: f64 = 0.3;
/// Batches that are tried for the time per unit, in those of the cell.
const BATCHES: [u64; 3] = [1, 4, 16];

/// Recommend settings for a model on this machine
///
/// Candidates are all combinations of threads, type and form of weights, batches and optimisations. Predictions (see
/// `roofbench plan`) leave out what can't keep the limits and order the rest; each trial is a quick measurement in a process
/// of its own, and corrects the predictions of those that are left. The search ends when no candidate is predicted to beat
/// the best, or when the trials are used up.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench recommend bert --minimize latency
  roofbench recommend bert --where \"p95<80ms, memory<4GiB\" --minimize energy
  roofbench recommend vit --minimize unit-time --trials 12
  roofbench recommend llama --cell n32 --where \"memory<3GB\" --minimize latency

Limits are of p50 (or latency), p90, p95, p99, ttft, tpot, memory, throughput and energy.
Exit status: 0 settings were found, 1 none keep the limits, 2 the command could not start, 130 interrupted.")]
#[group(id = "recommend")]
pub(crate) struct Arguments {
    /// Family, as `roofbench list` names it
    #[arg(value_name = "FAMILY")]
    family: String,
    /// Another checkpoint than the family's default
    #[arg(long, value_name = "OWNER/NAME")]
    checkpoint: Option<String>,
    /// `synthetic`, `hub`, or a folder or file
    #[arg(long, value_name = "synthetic|hub|PATH", default_value = "synthetic")]
    weights: String,
    /// The cell whose `family/cell` matches this regular expression; the first one when not given
    #[arg(short, long, value_name = "REGEX")]
    cell: Option<regex::Regex>,
    /// Limits that have to be kept: "p95<80ms, memory<4GiB"
    #[arg(long = "where", value_name = "LIMITS", default_value = "")]
    limits: Limits,
    /// What is to be small
    #[arg(long, value_name = "WHAT", default_value = "latency")]
    minimize: Objective,
    /// The most measurements
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    trials: u32,
    /// Weights keep their type: no 8 or 4 bits, and no narrower floats
    #[arg(long)]
    exact: bool,
    /// Records of the trials are appended to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Settings that may be tried.
struct Candidate {
    job: Job,
    /// Predicted seconds of a call, and bytes.
    predicted: (f64, f64),
}

impl Candidate {
    /// What sets it apart, in words.
    fn title(&self) -> String {
        let of = |flag: &str| self.job.requested.get(flag).cloned();
        let batch = of("batch").map(|batch| format!("batch {batch}"));
        let threads = Some(ui::count(self.job.threads, "thread"));
        [of("dtype"), of("opt"), threads, batch].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// The number to be small, by the prediction.
    fn objective(&self, objective: Objective) -> f64 {
        let (seconds, bytes) = self.predicted;
        match objective {
            Objective::Latency => seconds,
            // the power is taken as the same for all
            Objective::UnitTime | Objective::Energy => seconds / self.job.cell.units_per_call(),
            Objective::Memory => bytes,
        }
    }

    /// Whether the prediction, corrected by `correction`, allows all limits to be kept.
    fn may_keep(&self, limits: &Limits, correction: f64) -> bool {
        let (seconds, bytes) = (self.predicted.0 * correction, self.predicted.1);
        limits.0.iter().all(|limit| {
            let value = match limit.quantity {
                Quantity::P50 | Quantity::P90 | Quantity::P95 | Quantity::P99 => seconds,
                Quantity::Memory => bytes,
                Quantity::Throughput => self.job.cell.units_per_call() / seconds,
                Quantity::Ttft | Quantity::Tpot | Quantity::Energy => return true,
            };
            limit.share(value) < 1.0 + MARGIN
        })
    }
}

/// A candidate that was measured.
struct Trial {
    candidate: Candidate,
    derived: Derived,
    /// The number to be small.
    objective: f64,
    /// Limits that it breaks.
    broken: Vec<String>,
}

/// Searches and prints.
///
/// # Errors
/// The request can't be met: a family, cell, checkpoint, file or limit in it is at fault, or this machine can't measure the
/// energy that it asks for.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    check_energy(arguments)?;
    let mut machine = hardware::probe();
    super::probe::measure_peaks(&mut machine, false)?;
    let mut writer = arguments.output.as_ref().map(Writer::open).transpose().context("--output")?;
    let (mut candidates, refused) = candidates(arguments, &machine)?;
    let (all, mut trials, mut failed) = (candidates.len(), Vec::<Trial>::new(), 0);
    let mut supervisor = Supervisor::new()?;
    while trials.len() + failed < arguments.trials as usize && !supervisor.interrupted() {
        let Some(candidate) = next(arguments, &mut candidates, &trials) else { break };
        let number = trials.len() + failed + 1;
        let Some(record) = measured(&candidate.job, &mut supervisor)? else { break };
        if let Some(writer) = &mut writer {
            writer.append(&record)?;
        }
        eprintln!("[{number}] {}", ui::result_line(&candidate.title(), &record));
        match trial(arguments, candidate, &record) {
            Some(trial) => trials.push(trial),
            None => failed += 1,
        }
    }
    trials.sort_by(|a, b| {
        (!a.broken.is_empty(), a.objective)
            .partial_cmp(&(!b.broken.is_empty(), b.objective))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let left = Left { all, refused, tried: trials.len() + failed, candidates };
    show(arguments, &trials, &left)?;
    if supervisor.interrupted() {
        return Ok(ExitCode::from(EXIT_INTERRUPTED));
    }
    let found = trials.first().is_some_and(|best| best.broken.is_empty());
    Ok(if found { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) })
}

/// An error that says why, where energy is asked for and can't be measured.
fn check_energy(arguments: &Arguments) -> anyhow::Result<()> {
    let limited = arguments.limits.0.iter().any(|limit| limit.quantity == Quantity::Energy);
    if arguments.minimize != Objective::Energy && !limited {
        return Ok(());
    }
    let mut meters = Meters::open(&Device::Cpu);
    meters.start();
    let readings = meters.stop();
    let of_energy = || readings.iter().filter(|reading| reading.metric == metrics::ENERGY.name);
    if of_energy().any(|reading| reading.quantity.value().is_some()) {
        return Ok(());
    }
    let reason = of_energy().find_map(|reading| match &reading.quantity {
        meters::Quantity::Unavailable { reason } => Some(reason.clone()),
        _ => None,
    });
    let reason = reason.unwrap_or_else(|| "no meter reads it".to_owned());
    bail!("energy can't be measured on this machine: {reason}; --minimize latency or unit-time goes without it")
}

/// All settings that fit in memory and may keep the limits, and how many may not.
fn candidates(arguments: &Arguments, machine: &Machine) -> anyhow::Result<(Vec<Candidate>, usize)> {
    let calibration = Calibration::default();
    let base = jobs(arguments, machine, &[])?.into_iter().next().context("the family has no cells")?;
    let usable = machine.cpu.usable_threads as usize;
    let mut threads = vec![usable, usable.div_ceil(2), 1];
    threads.dedup();
    let batches: Vec<u64> = match arguments.minimize {
        Objective::UnitTime | Objective::Energy => BATCHES.map(|times| times * base.cell.batch).into(),
        Objective::Latency | Objective::Memory => vec![base.cell.batch],
    };
    let native = (base.dtype, "");
    let narrower = [(DTypeArg::Bf16, ""), (DTypeArg::F32, "+weights-q8"), (DTypeArg::F32, "+weights-q4")];
    let mut forms = vec![native];
    forms.extend(narrower.into_iter().filter(|form| !arguments.exact && *form != native));
    let (mut found, mut refused) = (Vec::new(), 0);
    for &threads in &threads {
        for &batch in &batches {
            for (dtype, opt) in &forms {
                let mut words = vec![format!("--threads={threads}"), format!("--dtype={}", dtype.name())];
                words.push(format!("--batch={batch}"));
                words.extend((!opt.is_empty()).then(|| format!("--opt={opt}")));
                // at its batch the cell may have another name
                let Some(job) = jobs(arguments, machine, &words)?.into_iter().next() else { continue };
                let forecast = predict::forecast(&job, &calibration)?;
                let predicted = (forecast.prediction.seconds(), forecast.prediction.memory);
                let candidate = Candidate { job, predicted };
                let fits = memory::beyond(predicted.1, &candidate.job, machine).is_none();
                // time is corrected by the first trial, so that only memory and what is far off count before it
                if fits && candidate.may_keep(&arguments.limits, 1.0 - MARGIN) {
                    found.push(candidate);
                } else {
                    refused += 1;
                }
            }
        }
    }
    Ok((found, refused))
}

/// The cells that the arguments name, with `words` for their settings: one, the first.
fn jobs(arguments: &Arguments, machine: &Machine, words: &[String]) -> anyhow::Result<Vec<Job>> {
    let mut line = vec![arguments.family.clone(), "--quick".to_owned(), format!("--weights={}", arguments.weights)];
    line.extend(arguments.checkpoint.as_ref().map(|name| format!("--checkpoint={name}")));
    let samples = arguments.limits.0.iter().filter_map(|limit| limit.quantity.samples()).max();
    line.extend(samples.map(|samples| format!("--min-samples={samples}")));
    line.extend_from_slice(words);
    let mut jobs = plan::plan(&plan::grid(&line)?, machine)?;
    // a cell is looked for by the name that it has at its own batch
    let standard = plan::plan(&plan::grid(&line[..1])?, machine)?;
    let place = match &arguments.cell {
        Some(pattern) => standard.iter().position(|job| pattern.is_match(&job.label())).with_context(|| {
            format!("--cell {pattern}: no cell matches; `roofbench list {}` shows them", arguments.family)
        })?,
        None => 0,
    };
    let wanted = &standard[place].cell;
    let alike = |job: &Job| wanted.with_batch(job.cell.batch).is_ok_and(|cell| cell.name == job.cell.name);
    jobs.retain(alike);
    jobs.truncate(1);
    Ok(jobs)
}

/// The candidate with the best prediction, corrected by what the trials so far took, unless none can beat the best trial.
fn next(arguments: &Arguments, candidates: &mut Vec<Candidate>, trials: &[Trial]) -> Option<Candidate> {
    // a trial of the same form of weights says most
    let correction = |candidate: &Candidate| {
        let form = |job: &Job| (job.dtype, job.requested.get("opt").cloned());
        let ratio = |trial: &Trial| trial.derived.latency.median / trial.candidate.predicted.0;
        let same = trials.iter().rev().find(|trial| form(&trial.candidate.job) == form(&candidate.job));
        same.or(trials.first()).map_or(1.0, ratio)
    };
    candidates.retain(|candidate| trials.is_empty() || candidate.may_keep(&arguments.limits, correction(candidate)));
    let corrected = |candidate: &Candidate| {
        let factor = if arguments.minimize == Objective::Memory { 1.0 } else { correction(candidate) };
        candidate.objective(arguments.minimize) * factor
    };
    let place =
        (0..candidates.len()).min_by(|&a, &b| corrected(&candidates[a]).total_cmp(&corrected(&candidates[b])))?;
    let best =
        trials.iter().filter(|trial| trial.broken.is_empty()).map(|trial| trial.objective).min_by(f64::total_cmp);
    let hopeless = arguments.minimize != Objective::Energy
        && best.is_some_and(|best| corrected(&candidates[place]) * (1.0 - MARGIN) > best);
    (!hopeless).then(|| candidates.swap_remove(place))
}

/// The record of `job`; `None` when the user stopped it.
fn measured(job: &Job, supervisor: &mut Supervisor) -> anyhow::Result<Option<Record>> {
    let end = supervisor.measure(job, None, |told| {
        if let Told::Noise(text) = told {
            eprintln!("{text}");
        }
    })?;
    Ok(match end {
        End::Recorded(record) => Some(*record),
        End::Died(error) => Some(crate::worker::record(job, clock::utc_now(), Outcome::Failed { error })),
        End::Stopped => None,
    })
}

fn trial(arguments: &Arguments, candidate: Candidate, record: &Record) -> Option<Trial> {
    let derived = metrics::derive(record)?;
    let objective = arguments.minimize.of(&derived)?;
    let broken = arguments.limits.0.iter().filter_map(|limit| match limit.quantity.of(&derived) {
        Some(value) if limit.share(value) <= 1.0 => None,
        Some(value) => Some(format!("{limit}, it is {}", limit.quantity.show(value))),
        None => Some(format!("{limit}, which was not measured")),
    });
    let broken = broken.collect();
    Some(Trial { candidate, derived, objective, broken })
}

/// What was not tried.
struct Left {
    all: usize,
    refused: usize,
    tried: usize,
    candidates: Vec<Candidate>,
}

fn show(arguments: &Arguments, trials: &[Trial], left: &Left) -> anyhow::Result<()> {
    let points: Vec<(f64, f64)> = trials
        .iter()
        .map(|trial| {
            let other = if arguments.minimize == Objective::Memory { Quantity::P50 } else { Quantity::Memory };
            // what breaks a limit is on no front
            let bad = if trial.broken.is_empty() { 0.0 } else { f64::INFINITY };
            (trial.objective + bad, other.of(&trial.derived).unwrap_or(f64::INFINITY) + bad)
        })
        .collect();
    let front: Vec<bool> =
        pareto(&points).into_iter().zip(trials).map(|(on, trial)| on && trial.broken.is_empty()).collect();
    let best = trials.first().filter(|best| best.broken.is_empty());
    let sure = best.map(|best| certainty(arguments, best, &trials[1..], left));
    if arguments.json {
        let lines = trials.iter().zip(&front).map(|(trial, on_front)| {
            json!({
                "settings": trial.candidate.title(), "command": plan::command(&trial.candidate.job),
                "objective": trial.objective, "p50": trial.derived.latency.median,
                "memory": Quantity::Memory.of(&trial.derived), "broken": trial.broken, "pareto": on_front,
            })
        });
        let object = json!({
            "best": best.map(|best| plan::command(&best.candidate.job)), "sure": sure,
            "trials": lines.collect::<Vec<_>>(), "candidates": left.all + left.refused, "refused_by_prediction": left.refused,
        });
        ui::print(&object.to_string())?;
        return Ok(());
    }
    let mut table =
        roofbench_report::empty_table(&["", "settings", "p50", "p95", "per unit", "memory", "predicted p50", "limits"]);
    for (place, (trial, on_front)) in trials.iter().zip(front).enumerate() {
        let derived = &trial.derived;
        let mark = match (place == 0 && best.is_some(), on_front) {
            (true, _) => "best",
            (_, true) => "front",
            _ => "",
        };
        table.add_row([
            mark.to_owned(),
            trial.candidate.title(),
            ui::time(derived.latency.median),
            derived.latency.p95.map_or("–".to_owned(), ui::time),
            ui::time(derived.throughput.value.recip()),
            Quantity::Memory.of(derived).map_or("–".to_owned(), ui::bytes),
            format!("≈{}", ui::time(trial.candidate.predicted.0)),
            if trial.broken.is_empty() { "kept".to_owned() } else { trial.broken.join("; ") },
        ]);
    }
    ui::print(&table.to_string())?;
    match (best, sure) {
        (Some(best), Some(sure)) => {
            ui::print(&format!("best: {}\n{sure}", shell(&plan::command(&best.candidate.job))))?;
        }
        _ => ui::print("no settings that were tried keep all limits")?,
    }
    eprintln!(
        "{} of {} tried, {} left out by their prediction",
        left.tried,
        ui::count(left.all + left.refused, "candidate"),
        left.refused
    );
    Ok(())
}

/// How sure it is that nothing tried is better than `best`, and what was not tried.
fn certainty(arguments: &Arguments, best: &Trial, others: &[Trial], left: &Left) -> String {
    let rival = others.iter().find(|other| other.broken.is_empty());
    let against = match rival {
        None if others.is_empty() => "nothing else was tried".to_owned(),
        None => "nothing else that was tried keeps the limits".to_owned(),
        Some(rival) => {
            let gain = 1.0 - best.objective / rival.objective;
            let apart = match (best.derived.latency.interval, rival.derived.latency.interval) {
                (Some(a), Some(b)) if arguments.minimize != Objective::Memory => {
                    let units = |trial: &Trial| match arguments.minimize {
                        Objective::UnitTime | Objective::Energy => trial.derived.units_per_call,
                        Objective::Latency | Objective::Memory => 1.0,
                    };
                    Some(a.high / units(best) < b.low / units(rival))
                }
                _ => None,
            };
            let verdict = match apart {
                Some(true) => "sure: the 95 % intervals of both medians are apart",
                Some(false) => "not sure: the 95 % intervals of both medians overlap, so take the one you like better",
                None => "by one measurement each",
            };
            format!(
                "{} against {} for the next ({}), {:.0} % less; {verdict}",
                arguments.minimize.show(best.objective),
                arguments.minimize.show(rival.objective),
                rival.candidate.title(),
                100.0 * gain
            )
        }
    };
    let untried =
        left.candidates.iter().map(|candidate| candidate.objective(arguments.minimize)).min_by(f64::total_cmp);
    match untried {
        None => format!("{against}; nothing is left to try"),
        Some(untried) => format!(
            "{against}; of {} not tried the best is predicted at {}",
            left.candidates.len(),
            arguments.minimize.show(untried)
        ),
    }
}

/// `roofbench run …` for a shell.
fn shell(words: &[String]) -> String {
    let plain = |word: &&String| word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=+./,:".contains(&byte));
    let quoted = |word: &String| if plain(&word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) };
    std::iter::once("roofbench".to_owned()).chain(words.iter().map(quoted)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_for_a_shell_is_quoted() {
        let words = ["run", "bert", "--cell", "^bert/b1$", "--opt", "+weights-q8"].map(str::to_owned);
        assert_eq!(shell(&words), "roofbench run bert --cell '^bert/b1$' --opt +weights-q8");
        assert_eq!(shell(&["it's".to_owned()]), r"roofbench 'it'\''s'");
    }
}
