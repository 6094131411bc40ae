//! What a cell is predicted to take on this machine, before anything is downloaded or loaded.

use std::path::Path;

use anyhow::Context;
use roofbench_core::catalog;
use roofbench_core::metrics;
use roofbench_core::optimize::Plan;
use roofbench_core::predict::{Calibration, Measured, Prediction, Task};
use roofbench_core::record::Record;
use roofbench_core::roofline::Ceiling;
use roofbench_core::weights::{HubOptions, Source, Weights};
use serde_json::Value;

use crate::arguments::{DTypeArg, DeviceArg};
use crate::job::{After, Job, Sampling, WeightsJob};
use crate::{optimized, worker};

/// Around the calls of a cell: a process starts, and writes its record.
const PROCESS_SECONDS: f64 = 0.5;
/// The first call, in those that follow.
const FIRST_CALL: f64 = 1.2;
/// Calls of a warm-up that settles at once.
const WARMUP_CALLS: f64 = 2.0;
/// Sampling goes on for about so many times its least time until the spread has settled.
const SETTLING: f64 = 1.5;

/// A cell with what it is predicted to take.
pub(crate) struct Forecast {
    /// Its parts.
    pub(crate) task: Task,
    /// What they come to.
    pub(crate) prediction: Prediction,
}

/// Predicts `job`.
///
/// # Errors
/// The job can't be built from its config, or this machine has no measured ceilings for it.
pub(crate) fn forecast(job: &Job, calibration: &Calibration) -> anyhow::Result<Forecast> {
    let task = task(job)?;
    let ceiling = Ceiling::of(&job.machine, &job.device.to_string(), job.dtype.name(), threads(job));
    let ceiling = ceiling.map_err(anyhow::Error::msg)?;
    let prediction = calibration.predict(&task, &ceiling);
    Ok(Forecast { task, prediction })
}

/// Seconds that measuring a cell takes in all, by what its calls take and the rules of its sampling.
pub(crate) fn wall_seconds(prediction: &Prediction, sampling: &Sampling) -> f64 {
    let call = prediction.seconds();
    let sampled = SETTLING * (call * sampling.min_samples as f64).max(sampling.min_time);
    PROCESS_SECONDS
        + prediction.load
        + call * (FIRST_CALL + WARMUP_CALLS)
        + sampled.min(sampling.max_time + call).min(call * sampling.max_samples as f64)
}

fn threads(job: &Job) -> u32 {
    u32::try_from(job.threads).unwrap_or(u32::MAX)
}

/// `job` by its parts, as far as time and memory depend on them.
fn task(job: &Job) -> anyhow::Result<Task> {
    let spec = worker::spec(job, &candle_core::Device::Cpu);
    let plan = optimized::plan(job, &spec).context("--opt")?;
    task_under(job, &plan)
}

fn task_under(job: &Job, plan: &Plan) -> anyhow::Result<Task> {
    let spec = worker::spec(job, &candle_core::Device::Cpu);
    let sizes = Weights::open(&Source::Sizes, &[], &spec.class, &HubOptions::default())?;
    let (call, _) = worker::call(job, &spec, &sizes, &mut worker::Found::default())?;
    let outline = optimized::cost(&spec, &call, plan)?;
    Ok(Task::new(&job.family, &outline, spec.dtype.size_in_bytes(), plan.weight_bits()))
}

/// What a measured record teaches; `None` for one that was not measured.
///
/// # Errors
/// Its model's config is not to be had, or its machine has no measured ceilings.
pub(crate) fn measured(record: &Record) -> anyhow::Result<Option<Measured>> {
    let Some(derived) = metrics::derive(record) else { return Ok(None) };
    let task = task_under(&job_of(record)?, &record.settings.optimizations)?;
    Measured::new(task, record, &derived).map(Some).map_err(anyhow::Error::msg)
}

/// The job that `record` is the result of, with drawn inputs of the same shapes.
fn job_of(record: &Record) -> anyhow::Result<Job> {
    let subject = &record.subject;
    let known = catalog::checkpoint(&subject.checkpoint).ok().map(|(_, checkpoint)| checkpoint);
    let config: Value = match known {
        Some(checkpoint) => checkpoint.config.clone(),
        None => {
            let path = Path::new(&subject.checkpoint).join("config.json");
            let text = std::fs::read_to_string(&path).with_context(|| {
                format!("{}: the checkpoint is not in the catalog, and no folder here", path.display())
            })?;
            serde_json::from_str(&text).with_context(|| path.display().to_string())?
        }
    };
    let dtype = record.settings.dtype().and_then(|dtype| dtype.parse::<DTypeArg>().ok());
    Ok(Job {
        family: subject.family.clone(),
        modality: subject.modality,
        checkpoint: subject.checkpoint.clone(),
        class: subject.class.clone(),
        parameters: subject.parameters,
        config,
        extra_configs: known.map(|checkpoint| checkpoint.extra_configs.clone()).unwrap_or_default(),
        cell: subject.cell.clone(),
        raw: None,
        engine: subject.engine,
        dtype: dtype.context("the record does not say which dtype was in effect")?,
        device: DeviceArg::Cpu,
        threads: record.settings.threads().context("the record does not say on how many threads it ran")? as usize,
        pin: false,
        switches: Vec::new(),
        weights: WeightsJob::Synthetic { seed: 0 },
        seed: 0,
        slow_down: None,
        sampling: Sampling::standard(false),
        after: After::default(),
        requested: record.settings.requested.clone(),
        machine: record.machine.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measuring_takes_its_calls_and_its_least_time() {
        let predicted = |call: f64| Prediction {
            phases: vec![(roofbench_core::session::Phase::Forward, call)],
            memory: 0.0,
            load: 3.0,
            corrected: false,
        };
        let sampling = Sampling { min_time: 1.0, max_time: 30.0, min_samples: 10, ..Sampling::standard(false) };
        // the least time holds for short calls, ten calls for longer ones, the most time for the longest
        assert!((wall_seconds(&predicted(0.01), &sampling) - (0.5 + 3.0 + 0.032 + 1.5)).abs() < 1e-9);
        assert!((wall_seconds(&predicted(1.0), &sampling) - (0.5 + 3.0 + 3.2 + 15.0)).abs() < 1e-9);
        assert!((wall_seconds(&predicted(10.0), &sampling) - (0.5 + 3.0 + 32.0 + 40.0)).abs() < 1e-9);
    }
}
