//! `roofbench sample`: one cell that is loaded and then runs whenever it is asked, for comparisons in alternation.
//!
//! Answers are JSON lines on standard output: first that it is ready, with the analytic FLOPs of a call, then for each
//! line `N` on standard input the nanoseconds of N calls. The end of the input ends it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::{D, DType, Device, Tensor, safetensors};
use roofbench_core::hardware;
use roofbench_core::session::{Call, Engine, Session as _, Tensors, Unobserved};
use serde::Serialize;
use serde_json::json;

use crate::commands::run;
use crate::job::Job;
use crate::optimized;
use crate::plan;
use crate::worker::{self, Found};

/// Loads one cell and runs it on demand; for `roofbench run --ablate` and `cargo xtask peers`
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// As for `roofbench run`; they have to select one cell.
    #[command(flatten)]
    run: run::Arguments,
    /// Folder that roofbench's own engine writes the cell's inputs and outputs to, and others compare their outputs with
    #[arg(long, value_name = "DIR")]
    case: Option<PathBuf>,
}

/// Runs until the input ends.
///
/// # Errors
/// The flags select no cell or several, the model does not load or run, or a file can't be written.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut machine = hardware::probe();
    if let Some(emulator) = &machine.cpu.emulator {
        bail!("{emulator} says nothing of the hardware's speed, so nothing is compared under it");
    }
    super::probe::measure_peaks(&mut machine, false)?;
    let jobs = plan::plan(&arguments.run, &machine)?;
    let [job] = &jobs[..] else {
        bail!("{} cells are selected; --cell, --batch and --threads narrow it down", jobs.len())
    };
    let device = job.device.open()?;
    let spec = worker::spec(job, &device);
    let optimizations = optimized::plan(job, &spec).context("--opt")?;
    optimized::apply(job, &optimizations)?;
    let (mut session, weights) = worker::load(job, &spec, &optimizations)?;
    let (call, _) = worker::call(job, &spec, &weights, &mut Found::default())?;
    let outputs = session.call(&call, &mut Unobserved)?;
    let errors = match &arguments.case {
        Some(folder) if job.engine == Engine::Roofbench => {
            write_case(folder, job, &call, &outputs).with_context(|| format!("--case {}", folder.display()))?;
            BTreeMap::new()
        }
        Some(folder) => differences(folder, &outputs).with_context(|| format!("--case {}", folder.display()))?,
        None => BTreeMap::new(),
    };
    let flops: u64 = session.cost(&call)?.iter().map(|phase| phase.cost.flops).sum();
    let versions = BTreeMap::from([("roofbench", env!("CARGO_PKG_VERSION"))]);
    answer(&json!({
        "ready": job.engine.name(),
        "versions": versions,
        "flops": flops,
        "errors": errors,
        "optimizations": optimizations,
    }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading standard input")?;
        let calls: u32 = line.trim().parse().with_context(|| format!("{line:?} is no number of calls"))?;
        let mut samples = Vec::new();
        for _ in 0..calls {
            let began = Instant::now();
            session.call(&call, &mut Unobserved)?;
            device.synchronize()?;
            samples.push(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        answer(&json!({"samples_ns": samples}))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn answer(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).context("writing to standard output")
}

/// The cell as a reference case, for engines that are not ours.
fn write_case(folder: &Path, job: &Job, call: &Call, outputs: &Tensors) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let about = json!({
        "family": job.family, "class": job.class, "call": call.method, "arguments": call.arguments, "seed": job.seed,
    });
    fs::write(folder.join("case.json"), about.to_string())?;
    fs::write(folder.join("config.json"), job.config.to_string())?;
    for (file, tensors) in [("inputs.safetensors", &call.inputs), ("outputs.safetensors", outputs)] {
        let tensors: HashMap<&str, Tensor> = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.as_str(), tensor.to_device(&Device::Cpu)?.contiguous()?)))
            .collect::<candle_core::Result<_>>()?;
        safetensors::save(&tensors, folder.join(file))?;
    }
    Ok(())
}

/// How far outputs lie from others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Deviation {
    /// Largest difference over the largest value, of all outputs that are floats.
    pub(crate) error: Option<f64>,
    /// Share of rows of logits whose largest is the same, or of the tokens made.
    pub(crate) agreement: Option<f64>,
}

/// How far the outputs in the folder `case` lie from those in `exact`.
///
/// # Errors
/// A file can't be read.
pub(crate) fn deviation(exact: &Path, case: &Path) -> anyhow::Result<Deviation> {
    let read = |folder: &Path| {
        let file = folder.join("outputs.safetensors");
        safetensors::load(&file, &Device::Cpu).with_context(|| file.display().to_string())
    };
    let (exact, found) = (read(exact)?, read(case)?);
    let (mut error, mut agreeing, mut all) = (None, 0, 0);
    for (name, exact) in &exact {
        let Some(found) = found.get(name) else { continue };
        if exact.dtype().is_int() {
            // sequences may end apart
            let (exact, found) = (tokens(exact)?, tokens(found)?);
            agreeing += exact.iter().zip(&found).filter(|(exact, found)| exact == found).count();
            all += exact.len().max(found.len());
        } else if exact.dims() == found.dims() {
            error = error.into_iter().chain([largest_error(found, exact)?]).reduce(f64::max);
            if name.contains("logits") && exact.rank() > 0 {
                let (exact, found) = (tokens(&exact.argmax(D::Minus1)?)?, tokens(&found.argmax(D::Minus1)?)?);
                agreeing += exact.iter().zip(&found).filter(|(exact, found)| exact == found).count();
                all += exact.len();
            }
        }
    }
    Ok(Deviation { error, agreement: (all > 0).then(|| agreeing as f64 / all as f64) })
}

fn tokens(x: &Tensor) -> candle_core::Result<Vec<i64>> {
    x.to_dtype(DType::I64)?.flatten_all()?.to_vec1()
}

/// max |difference| / max |value|.
fn largest_error(found: &Tensor, exact: &Tensor) -> candle_core::Result<f64> {
    let (found, exact) = (found.to_dtype(DType::F64)?, exact.to_dtype(DType::F64)?);
    let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    Ok(largest(&(found - &exact)?)? / largest(&exact)?.max(f64::MIN_POSITIVE))
}

/// [`largest_error`] of every output that both have.
fn differences(folder: &Path, outputs: &Tensors) -> anyhow::Result<BTreeMap<String, f64>> {
    let expected = safetensors::load(folder.join("outputs.safetensors"), &Device::Cpu)?;
    let mut errors = BTreeMap::new();
    for (name, found) in outputs {
        let Some(expected) = expected.get(name) else { continue };
        errors.insert(name.clone(), largest_error(&found.to_device(&Device::Cpu)?, expected)?);
    }
    Ok(errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_by_hand() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, logits: [[f32; 2]; 2], tokens: &[i64]| {
            let case = folder.path().join(name);
            fs::create_dir_all(&case).unwrap();
            let (logits, tokens) = (Tensor::new(&logits, &Device::Cpu), Tensor::new(tokens, &Device::Cpu));
            let outputs = HashMap::from([("logits", logits.unwrap()), ("sequences", tokens.unwrap())]);
            safetensors::save(&outputs, case.join("outputs.safetensors")).unwrap();
            case
        };
        let exact = write("exact", [[1., 2.], [4., 3.]], &[5, 6, 7]);
        let other = write("other", [[1., 2.], [3., 3.5]], &[5, 9]);
        assert_eq!(deviation(&exact, &exact).unwrap(), Deviation { error: Some(0.0), agreement: Some(1.0) });
        // off by 1 of 4; one of two rows has another largest, one of three tokens is the same
        assert_eq!(deviation(&exact, &other).unwrap(), Deviation { error: Some(0.25), agreement: Some(2.0 / 5.0) });
    }
}
