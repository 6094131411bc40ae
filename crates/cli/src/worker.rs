//! The process that measures one cell: reads its job, loads, measures, and tells its record.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use roofbench_core::catalog::Cell;
use roofbench_core::hardware::{self, Conditions, conditions};
use roofbench_core::harness::{self, Env, HarnessError};
use roofbench_core::meters::{Meters, clock};
use roofbench_core::optimize::{OptimizeError, Plan};
use roofbench_core::record::{Outcome, Record, SCHEMA_VERSION, Settings, Subject, Warning};
use roofbench_core::reference::Models as _;
use roofbench_core::session::{Call, Engine, ModelSpec, Session, SessionError, Tensors, Unobserved};
use roofbench_core::stats;
use roofbench_core::task::Task;
use roofbench_core::weights::{Source, Weights};
use roofbench_core::workload::{self, InputSpec};
use roofbench_nn::kernels::isa;

use crate::arguments::EXIT_INTERRUPTED;
use crate::job::{Job, Message, STOP, WeightsJob};
use crate::models::Models;
use crate::optimized::{self, Optimized};
use crate::slowed::Slowed;
use crate::{memory, models, plan, profile, ui};

/// Set when the planning process asks to finish.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// How often progress is told; more would only disturb the measurement.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Measures the job on standard input.
///
/// # Errors
/// There is no job, or nobody to tell the result. What goes wrong with the cell is in its record.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("reading the job")?;
    let job: Job = serde_json::from_str(&line).context("this command is started by `roofbench run`; its job")?;
    std::thread::spawn(|| {
        let mut line = String::new();
        while let Ok(1..) = std::io::stdin().lock().read_line(&mut line) {
            if line.trim() == STOP {
                STOPPED.store(true, Ordering::Relaxed);
            }
            line.clear();
        }
        // The planning process is gone, and with it whoever would keep the record.
        std::process::exit(EXIT_INTERRUPTED.into());
    });

    let started_at = clock::utc_now();
    let mut found = Found::default();
    let outcome = match measure(&job, &mut found) {
        Ok(outcome) => outcome,
        Err(error) if matches!(error.downcast_ref(), Some(HarnessError::Interrupted { .. })) => {
            return Ok(ExitCode::from(EXIT_INTERRUPTED));
        }
        Err(error) => match unsupported(&error) {
            Some(reason) => Outcome::Skipped { reason },
            None => Outcome::Failed { error: ui::chain(&error) },
        },
    };
    let mut record = record(&job, started_at, outcome);
    record.settings.effective.extend(found.effective);
    record.settings.optimizations = found.optimizations;
    record.warnings = found.warnings;
    record.subject.cell = found.cell.unwrap_or(record.subject.cell);
    tell(&Message::Record(Box::new(record)))?;
    Ok(ExitCode::SUCCESS)
}

/// The record of `job` with what is known before it runs.
pub(crate) fn record(job: &Job, started_at: String, outcome: Outcome) -> Record {
    let effective = [
        ("dtype", job.dtype.name().to_owned()),
        ("threads", job.threads.to_string()),
        ("device", job.device.to_string()),
        ("engine", job.engine.name().to_owned()),
    ];
    Record {
        schema_version: SCHEMA_VERSION,
        started_at,
        subject: Subject {
            family: job.family.clone(),
            modality: job.modality,
            checkpoint: job.checkpoint.clone(),
            class: job.class.clone(),
            parameters: job.parameters,
            cell: job.cell.clone(),
            engine: job.engine,
        },
        settings: Settings {
            requested: job.requested.clone(),
            effective: effective.map(|(name, value)| (name.to_owned(), value)).into(),
            optimizations: Plan::default(),
        },
        outcome,
        warnings: Vec::new(),
        machine: job.machine.clone(),
        build: models::build(),
    }
}

/// What is learnt on the way, kept whatever the outcome.
#[derive(Default)]
pub(crate) struct Found {
    effective: BTreeMap<String, String>,
    warnings: Vec<Warning>,
    optimizations: Plan,
    /// The cell with the inputs that raw ones became.
    cell: Option<Cell>,
}

impl Found {
    fn note(&mut self, name: &str, value: impl Into<String>) {
        self.effective.insert(name.to_owned(), value.into());
    }
}

/// Loads the model and measures it, or says why it can't be.
fn measure(job: &Job, found: &mut Found) -> anyhow::Result<Outcome> {
    let device = job.device.open()?;
    let spec = spec(job, &device);
    let optimizations = optimized::plan(job, &spec).context("--opt")?;
    found.optimizations = optimizations.clone();
    let pinned = optimized::apply(job, &optimizations)?;
    found.note("pinning", if pinned { "one CPU per thread" } else { "none" });
    if let Some(reason) = memory::refusal(job, &optimizations, &hardware::probe()) {
        return Ok(Outcome::Skipped { reason });
    }

    let mut meters = Meters::open(&device);
    let clock = clock::Monotonic;
    let mut told = Instant::now();
    let mut progress = |progress: harness::Progress| {
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            status(&shown(progress));
        }
    };
    let mut env = Env {
        clock: &clock,
        meters: meters.as_mut_slice(),
        sync: &|| device.synchronize(),
        interrupted: &|| STOPPED.load(Ordering::Relaxed),
        progress: &mut progress,
    };

    status("loading");
    let ((mut session, weights), load) = harness::timed(&mut env, || load(job, &spec, &optimizations))?;
    found.note("weights", weights.describe().source);
    if let Some(percent) = job.slow_down {
        found.note("slow-down", format!("{percent} %, planted"));
    }
    found.effective.extend(session.paths().into_iter().map(|(kind, path)| (format!("path.{kind}"), path)));

    let (call, task) = call(job, &spec, &weights, found)?;
    let plan = job.sampling.plan();
    let before = Conditions::now();
    let mut measurement = harness::measure(&mut session, &call, load, &plan, &mut env)?;
    // Convolutions choose their way when they first run.
    if let (Engine::Roofbench, Some(path)) = (job.engine, isa::paths(&device, spec.dtype).remove("conv")) {
        found.note("path.conv", path);
    }
    let threads = u32::try_from(job.threads).unwrap_or(u32::MAX);
    found.warnings.extend(conditions::between(&before, &Conditions::now(), threads));
    found.warnings.extend(harness::warnings(&measurement, &plan));
    if job.after.profile {
        status("profiling");
        let stopped = || STOPPED.load(Ordering::Relaxed);
        measurement.profile = profile::take(&mut session, &call, job.after.trace.as_deref(), stopped)?;
    }
    if let Some(seconds) = job.after.sustain {
        let duration = Duration::from_secs_f64(seconds);
        measurement.sustained = Some(harness::sustain(&mut session, &call, duration, &mut env)?);
    }
    if let Some(task) = task
        && !STOPPED.load(Ordering::Relaxed)
    {
        // What was measured is kept, whatever becomes of the answer.
        if let Err(error) = answer(&*task, &call, &mut session, found) {
            found.warnings.push(Warning { kind: Warning::ANSWER.to_owned(), message: ui::chain(&error) });
        }
    }
    Ok(match &job.machine.cpu.emulator {
        None => Outcome::Measured(Box::new(measurement)),
        Some(emulator) => Outcome::Skipped {
            reason: format!(
                "it ran, {} in all, and no time is kept: {emulator} says nothing of the hardware's speed",
                ui::count(measurement.samples.len(), "sample")
            ),
        },
    })
}

/// Tells what `call` gives, and notes how much it works through.
fn answer(task: &dyn Task, call: &Call, session: &mut dyn Session, found: &mut Found) -> anyhow::Result<()> {
    let outputs = session.call(call, &mut Unobserved)?;
    if let (Some(amount), Some(cell)) = (task.amount(call, &outputs)?, &mut found.cell) {
        cell.amount = Some(amount / cell.batch as f64);
    }
    for answer in task.answer(call, &outputs, session)? {
        tell(&Message::Answer(ui::answer(&answer)))?;
    }
    Ok(())
}

/// What `job` builds its session from.
pub(crate) fn spec(job: &Job, device: &Device) -> ModelSpec {
    ModelSpec {
        family: job.family.clone(),
        class: job.class.clone(),
        config: job.config.clone(),
        extra_configs: job.extra_configs.clone(),
        dtype: job.dtype.dtype(),
        device: device.clone(),
        engine: job.engine,
    }
}

/// The model with its weights, complete.
pub(crate) fn load(job: &Job, spec: &ModelSpec, plan: &Plan) -> Result<(Optimized, Weights), SessionError> {
    let (source, ignore_extra, offline) = match &job.weights {
        WeightsJob::Synthetic { seed } => (Source::Synthetic { seed: *seed }, false, true),
        WeightsJob::Local { path, ignore_extra } => (Source::Local { path: path.clone() }, *ignore_extra, true),
        // The planning process has fetched it.
        WeightsJob::Hub { repository, revision, ignore_extra } => {
            (Source::Hub { repository: repository.clone(), revision: revision.clone() }, *ignore_extra, true)
        }
    };
    let weights = Weights::open(&source, Models.aliases(spec), &spec.class, &plan::hub_options(offline))?;
    let session = Models.load(spec, &weights)?;
    weights.check_complete(ignore_extra)?;
    let session = match job.slow_down {
        Some(percent) => Box::new(Slowed { session, percent }),
        None => session,
    };
    Ok((Optimized::new(session, plan), weights))
}

/// The call that the cell means, and the task that real inputs are for.
pub(crate) fn call(
    job: &Job,
    spec: &ModelSpec,
    weights: &Weights,
    found: &mut Found,
) -> anyhow::Result<(Call, Option<Box<dyn Task>>)> {
    if let Some(raw) = &job.raw {
        let task = models::task(spec, weights, raw.clone())?;
        let (call, seconds) = prepared(&*task)?;
        let (what, time) = (task.preparation(), ui::time(seconds));
        found.note(what, time.clone());
        found.note("inputs", "given on the command line");
        let name = format!("{}/{}", call.method, raw.name());
        found.cell = Some(Cell { name, inputs: specs(&call.inputs), ..job.cell.clone() });
        let shapes: Vec<_> = call.inputs.iter().map(|(name, x)| format!("{name} {:?}", x.dims())).collect();
        tell(&Message::Answer(format!("{what}: {time}, not part of the latency; {}", shapes.join(", "))))?;
        return Ok((call, Some(task)));
    }
    let mut arguments = job.cell.arguments.clone();
    if let Some(new_tokens) = job.cell.new_tokens {
        // so many exactly and the likeliest, whatever the checkpoint's generation_config.json says
        arguments.insert("max_new_tokens".to_owned(), new_tokens.into());
        arguments.insert("min_new_tokens".to_owned(), new_tokens.into());
        arguments.insert("do_sample".to_owned(), false.into());
        arguments.insert("num_beams".to_owned(), 1.into());
    }
    let method = match job.cell.name.split('/').next().unwrap_or_default() {
        "encode-decode" | "embed" => "forward",
        method => method,
    };
    // On the CPU our models compute in f32, whatever the weights are kept in.
    let own = spec.device.is_cpu() && spec.engine == Engine::Roofbench;
    let dtype = if own { DType::F32 } else { spec.dtype };
    found.note("inputs", format!("drawn from seed {}", job.seed));
    let inputs = workload::draw(&job.cell, &spec.config, dtype, &spec.device, job.seed)?;
    Ok((Call { method: method.to_owned(), inputs, arguments }, None))
}

/// The call of raw inputs, and the median time to make it, in seconds.
fn prepared(task: &dyn Task) -> Result<(Call, f64), SessionError> {
    const REPEATS: usize = 9;
    /// Nanoseconds after which there are no more repeats: hours of sound are read once.
    const ENOUGH: u64 = 2_000_000_000;
    let mut times: Vec<u64> = Vec::new();
    loop {
        let began = Instant::now();
        let call = task.call()?;
        times.push(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
        if times.len() == REPEATS || times.iter().sum::<u64>() > ENOUGH {
            return Ok((call, stats::median(&times).unwrap_or_default() * 1e-9));
        }
    }
}

/// What a record says of inputs that were not drawn: their shapes, by the kind that each comes nearest to.
fn specs(inputs: &Tensors) -> BTreeMap<String, InputSpec> {
    let spec = |(name, tensor): (&String, &Tensor)| {
        let shape = tensor.dims().to_vec();
        let spec = match name.as_str() {
            "input_ids" => InputSpec::Tokens { tokens: shape, image_tokens: None },
            "token_type_ids" => InputSpec::Zeros { zeros: shape },
            _ if tensor.dtype().is_int() => InputSpec::Ones { ones: shape },
            _ => InputSpec::Floats { floats: shape },
        };
        (name.clone(), spec)
    };
    inputs.iter().map(spec).collect()
}

fn shown(progress: harness::Progress) -> String {
    let spread = progress.spread.map_or_else(String::new, |spread| format!(" ±{:.1} %", 100.0 * spread));
    format!("{} {} · {}{spread}", progress.stage, progress.calls, ui::time(progress.last_ns as f64 * 1e-9))
}

/// The reason, when the error is that an engine has no such model, or the model no such choice: nothing failed, there is
/// nothing to run.
fn unsupported(error: &anyhow::Error) -> Option<String> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(error @ SessionError::UnsupportedEngine { .. }), _) => Some(error.to_string()),
        (_, Some(error @ OptimizeError::Impossible { .. })) => Some(error.to_string()),
        _ => None,
    }
}

fn status(text: &str) {
    // Progress that nobody reads is no reason to stop.
    let _ = tell(&Message::Status(text.to_owned()));
}

fn tell(message: &Message) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(message).context("writing a message")?;
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("telling the planning process")
}
