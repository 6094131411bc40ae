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
use candle_core::{DType, Device, Tensor, safetensors};
use roofbench_core::hardware;
use roofbench_core::session::{Call, Engine, Tensors, Unobserved};
use roofbench_nn::pool::{self, Pinning, PoolConfig};
use serde_json::json;

use crate::commands::run;
use crate::job::Job;
use crate::models::engine_name;
use crate::plan;
use crate::worker::{self, Found};

/// Loads one cell and runs it on demand; for `cargo xtask peers`
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
    let jobs = plan::plan(&arguments.run, &hardware::probe())?;
    let [job] = &jobs[..] else {
        bail!("{} cells are selected; --cell, --batch and --threads narrow it down", jobs.len())
    };
    let pin = if job.pin { Pinning::Compact } else { Pinning::None };
    pool::configure(PoolConfig { threads: job.threads, pin }).context("--threads, --pin")?;
    let device = job.device.open()?;
    let spec = worker::spec(job, &device);
    let (mut session, weights) = worker::load(job, &spec)?;
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
    answer(&json!({"ready": engine_name(job.engine), "versions": versions, "flops": flops, "errors": errors}))?;
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

/// max |difference| / max |value| of every output that both have.
fn differences(folder: &Path, outputs: &Tensors) -> anyhow::Result<BTreeMap<String, f64>> {
    let expected = safetensors::load(folder.join("outputs.safetensors"), &Device::Cpu)?;
    let mut errors = BTreeMap::new();
    for (name, found) in outputs {
        let Some(expected) = expected.get(name) else { continue };
        let expected = expected.to_dtype(DType::F64)?;
        let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let largest = |x: Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
        let scale = largest(expected.clone())?.max(f64::MIN_POSITIVE);
        errors.insert(name.clone(), largest((found - expected)?)? / scale);
    }
    Ok(errors)
}
