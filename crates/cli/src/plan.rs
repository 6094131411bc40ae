//! From the flags of `roofbench run` to the cells that it measures: every combination, checked before anything runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use roofbench_core::catalog::{self, Cell, Detected, Family};
use roofbench_core::hardware::Machine;
use roofbench_core::optimize::{self, Optimization, Switch};
use roofbench_core::session::Engine;
use roofbench_core::task::RawInputs;
use roofbench_core::weights::{HubOptions, Source, Weights};
use roofbench_core::workload::InputSpec;
use serde_json::{Value, json};

use crate::arguments::{DTypeArg, DeviceArg, WeightsArg};
use crate::commands::run::Arguments;
use crate::job::{After, Job, Sampling, WeightsJob};
use crate::models;

/// A checkpoint with the family that it belongs to.
struct Subject {
    family: &'static Family,
    /// Repository or path.
    name: String,
    class: String,
    parameters: Option<u64>,
    config: Value,
    extra_configs: BTreeMap<String, Value>,
    weights: WeightsJob,
}

/// The cells that `arguments` ask for on `machine`.
///
/// # Errors
/// Names the flag, family, cell, checkpoint, device or file that can't be had, with what could.
pub(crate) fn plan(arguments: &Arguments, machine: &Machine) -> anyhow::Result<Vec<Job>> {
    check_device(arguments.device, machine)?;
    let sampling = sampling(arguments)?;
    let threads = threads(arguments, machine)?;
    check_switches(arguments)?;
    ensure!(
        !after(arguments).profile || arguments.device == DeviceArg::Cpu,
        "--profile: operations are timed on the CPU, and on {} they only begin there; leave --device out",
        arguments.device
    );
    let engines: Vec<Engine> = arguments.engine.iter().map(|&engine| engine.into()).collect();
    let mut jobs = Vec::new();
    for subject in subjects(arguments)? {
        let raw = raw_inputs(arguments, &subject)?;
        let standard: DTypeArg = subject.family.dtype.parse().unwrap_or(DTypeArg::F32);
        let dtypes = if arguments.dtype.is_empty() { &[standard][..] } else { &arguments.dtype };
        for cell in cells(arguments, &subject, raw.as_ref())? {
            for &dtype in dtypes {
                for &threads in &threads {
                    for &engine in &engines {
                        jobs.push(Job {
                            family: subject.family.name.clone(),
                            modality: subject.family.modality,
                            checkpoint: subject.name.clone(),
                            class: subject.class.clone(),
                            parameters: subject.parameters,
                            config: subject.config.clone(),
                            extra_configs: subject.extra_configs.clone(),
                            requested: requested(arguments, &cell, &sampling, dtype, threads, engine),
                            cell: cell.clone(),
                            raw: raw.clone(),
                            engine,
                            dtype,
                            device: arguments.device,
                            threads,
                            pin: arguments.pin,
                            switches: arguments.opt.clone(),
                            weights: subject.weights.clone(),
                            seed: arguments.seed,
                            slow_down: arguments.slow_down,
                            sampling,
                            after: after(arguments),
                            machine: machine.clone(),
                        });
                    }
                }
            }
        }
    }
    if let (Some(path), 2..) = (&arguments.trace, jobs.len()) {
        bail!("--trace {}: it is of one cell, and these are {}; name one with --cell", path.display(), jobs.len());
    }
    if jobs.is_empty() {
        let patterns: Vec<_> = arguments.cell.iter().map(regex::Regex::as_str).collect();
        bail!("--cell {}: no cell matches; `roofbench list FAMILY` shows a family's cells", patterns.join(" --cell "));
    }
    Ok(jobs)
}

/// The settings of a job by flag, as a person would give them to repeat it.
fn requested(
    arguments: &Arguments,
    cell: &Cell,
    sampling: &Sampling,
    dtype: DTypeArg,
    threads: usize,
    engine: Engine,
) -> BTreeMap<String, String> {
    let weights = match &arguments.weights {
        WeightsArg::Synthetic => "synthetic".to_owned(),
        WeightsArg::Hub => "hub".to_owned(),
        WeightsArg::Path(path) => path.display().to_string(),
    };
    let mut requested = BTreeMap::from([
        ("weights", weights),
        ("seed", arguments.seed.to_string()),
        ("engine", engine.name().to_owned()),
        ("batch", cell.batch.to_string()),
        ("threads", threads.to_string()),
        ("dtype", dtype.name().to_owned()),
        ("device", arguments.device.to_string()),
        ("min-time", sampling.min_time.to_string()),
        ("max-time", sampling.max_time.to_string()),
        ("min-samples", sampling.min_samples.to_string()),
        ("max-samples", sampling.max_samples.to_string()),
        ("target", sampling.target.to_string()),
    ]);
    requested.extend(arguments.checkpoint.clone().map(|repository| ("checkpoint", repository)));
    let switches: Vec<String> = arguments.opt.iter().map(Switch::to_string).collect();
    requested.extend((!switches.is_empty()).then(|| ("opt", switches.join(","))));
    requested.extend(arguments.sustain.map(|seconds| ("sustain", seconds.to_string())));
    requested.extend(arguments.revision.clone().map(|revision| ("revision", revision)));
    let switches = [
        ("quick", arguments.quick),
        ("pin", arguments.pin),
        ("oversubscribe", arguments.oversubscribe),
        ("offline", arguments.offline),
        ("ignore-extra-tensors", arguments.ignore_extra_tensors),
        ("profile", after(arguments).profile),
    ];
    requested.extend(switches.into_iter().filter(|(_, on)| *on).map(|(flag, _)| (flag, "yes".to_owned())));
    requested.into_iter().map(|(flag, value)| (flag.to_owned(), value)).collect()
}

/// The command line that measures `job` alone.
pub(crate) fn command(job: &Job) -> Vec<String> {
    let mut words = vec!["run".to_owned(), job.family.clone()];
    if job.raw.is_none() {
        words.extend(["--cell".to_owned(), format!("^{}$", regex::escape(&job.label()))]);
    }
    for (flag, value) in &job.requested {
        match (flag.as_str(), value.as_str()) {
            ("batch", _) if job.raw.is_some() => {}
            (_, "yes") => words.push(format!("--{flag}")),
            _ => words.extend([format!("--{flag}"), value.clone()]),
        }
    }
    if let Some(raw) = &job.raw {
        let paths = |paths: &[PathBuf]| paths.iter().map(|path| path.display().to_string()).collect();
        let mut add = |flag: &str, values: Vec<String>| {
            words.extend(values.into_iter().flat_map(|value| [format!("--{flag}"), value]));
        };
        add("text", raw.texts.clone());
        add("image", paths(&raw.images));
        add("audio", paths(&raw.audio));
        add("arg", raw.arguments.iter().map(|(name, value)| format!("{name}={value}")).collect());
        add("save", raw.save.iter().map(|path| path.display().to_string()).collect());
    }
    words
}

/// The name of a job among others: its cell, and the settings in which they differ.
pub(crate) fn title(job: &Job, all: &[Job]) -> String {
    let mut title = job.label();
    for (flag, unit) in [("dtype", ""), ("threads", " threads"), ("engine", "")] {
        let value = job.requested.get(flag);
        if let Some(value) = value.filter(|_| all.iter().any(|other| other.requested.get(flag) != value)) {
            let unit = if value == "1" { unit.trim_end_matches('s') } else { unit };
            title.push_str(&format!(" · {value}{unit}"));
        }
    }
    title
}

/// Every name is one of an optimisation of some family that this build runs.
fn check_switches(arguments: &Arguments) -> anyhow::Result<()> {
    let mut known: Vec<&Optimization> = Vec::new();
    for optimization in models::families().flat_map(models::optimizations) {
        if known.iter().all(|other| other.name != optimization.name) {
            known.push(optimization);
        }
    }
    optimize::check(&arguments.opt, &known).context("--opt")
}

fn check_device(device: DeviceArg, machine: &Machine) -> anyhow::Result<()> {
    device.check_compiled()?;
    // Without NVML the list says nothing, and the worker finds out.
    if let DeviceArg::Cuda(index) = device
        && machine.gpu_note.is_none()
        && index >= machine.gpus.len()
    {
        let gpus: Vec<_> = machine.gpus.iter().map(|gpu| format!("cuda:{} ({})", gpu.index, gpu.name)).collect();
        let gpus = if gpus.is_empty() { "none".to_owned() } else { gpus.join(", ") };
        bail!("--device {device}: there is no such GPU; this machine has {gpus}");
    }
    Ok(())
}

/// The flags of `roofbench run` that `words` stand for.
///
/// # Errors
/// One of them is not a flag of it, or has no such value.
pub(crate) fn grid(words: &[String]) -> anyhow::Result<Arguments> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }
    let words = std::iter::once("run").chain(words.iter().map(String::as_str));
    Ok(Line::try_parse_from(words).map(|line| line.arguments)?)
}

/// `job` as `run --dry-run --json` and `plan --memory … --json` print it.
pub(crate) fn planned(job: &Job) -> Value {
    json!({
        "family": job.family,
        "cell": job.cell.name,
        "engine": job.engine,
        "requested": job.requested,
        "command": command(job),
    })
}

/// What follows the samples.
fn after(arguments: &Arguments) -> After {
    let trace = arguments.trace.clone();
    After { profile: arguments.profile || trace.is_some(), trace, sustain: arguments.sustain }
}

fn sampling(arguments: &Arguments) -> anyhow::Result<Sampling> {
    let standard = Sampling::standard(arguments.quick);
    let max_time = arguments.max_time.unwrap_or_else(|| standard.max_time.max(arguments.min_time.unwrap_or(0.0)));
    let max_samples = arguments.max_samples.map_or_else(
        || standard.max_samples.max(arguments.min_samples.unwrap_or(0) as usize),
        |samples| samples as usize,
    );
    // A default gives way to what was asked for; two things asked for have to agree.
    let sampling = Sampling {
        min_time: arguments.min_time.unwrap_or_else(|| standard.min_time.min(max_time)),
        max_time,
        min_samples: arguments.min_samples.map_or_else(|| standard.min_samples.min(max_samples), |n| n as usize),
        max_samples,
        target: arguments.target.unwrap_or(standard.target),
        quick: arguments.quick,
    };
    ensure!(
        sampling.min_time <= sampling.max_time,
        "--min-time {} is more than --max-time {}",
        sampling.min_time,
        sampling.max_time
    );
    ensure!(
        sampling.min_samples <= sampling.max_samples,
        "--min-samples {} is more than --max-samples {}",
        sampling.min_samples,
        sampling.max_samples
    );
    Ok(sampling)
}

fn threads(arguments: &Arguments, machine: &Machine) -> anyhow::Result<Vec<usize>> {
    let usable = machine.cpu.usable_threads;
    if arguments.threads.is_empty() {
        return Ok(vec![usable as usize]);
    }
    if let Some(threads) = arguments.threads.iter().find(|&&threads| threads > usable && !arguments.oversubscribe) {
        bail!(
            "--threads {threads}: this process may use {usable} of the machine's {} CPUs; \
             --oversubscribe measures with more threads than that",
            machine.cpu.threads
        );
    }
    Ok(arguments.threads.iter().map(|&threads| threads as usize).collect())
}

/// The checkpoints to measure.
fn subjects(arguments: &Arguments) -> anyhow::Result<Vec<Subject>> {
    match &arguments.weights {
        WeightsArg::Synthetic | WeightsArg::Hub => {
            let families = families(arguments)?;
            families.into_iter().map(|family| known(arguments, family)).collect()
        }
        WeightsArg::Path(path) => Ok(vec![local(arguments, path)?]),
    }
}

/// The families that were named, or all that this build runs.
fn families(arguments: &Arguments) -> anyhow::Result<Vec<&'static Family>> {
    if let Some(repository) = &arguments.checkpoint {
        // A checkpoint says which family it is of.
        let (family, _) =
            catalog::checkpoint(repository).context("--checkpoint (a folder is named by --weights PATH instead)")?;
        ensure!(
            arguments.families.iter().all(|name| *name == family.name),
            "--checkpoint {repository} is of the family {}, not {}",
            family.name,
            arguments.families.join(", ")
        );
        return Ok(vec![runnable(family)?]);
    }
    if arguments.families.is_empty() {
        let families: Vec<_> = catalog::families().iter().filter(|family| models::runs(&family.name)).collect();
        ensure!(
            !families.is_empty(),
            "this build runs no family; build it with --features text,vision,speech,multimodal"
        );
        return Ok(families);
    }
    let mut families: Vec<&'static Family> = Vec::new();
    for name in &arguments.families {
        let family = runnable(catalog::family(name)?)?;
        if !families.iter().any(|known| known.name == family.name) {
            families.push(family);
        }
    }
    Ok(families)
}

fn runnable(family: &'static Family) -> anyhow::Result<&'static Family> {
    ensure!(
        models::runs(&family.name),
        "{}: this build has no model of it; it runs {}",
        family.name,
        models::families().collect::<Vec<_>>().join(", ")
    );
    Ok(family)
}

/// A checkpoint of the catalog, with synthetic weights or its own.
fn known(arguments: &Arguments, family: &'static Family) -> anyhow::Result<Subject> {
    let (_, checkpoint) = catalog::checkpoint(arguments.checkpoint.as_ref().unwrap_or(&family.default_checkpoint))?;
    let (repository, revision) = (checkpoint.repository.clone(), arguments.revision.clone());
    let weights = match arguments.weights {
        WeightsArg::Hub => {
            // Fetched here, so that no cell's time limit covers a download.
            let source = Source::Hub { repository: repository.clone(), revision: revision.clone() };
            let hub = HubOptions { progress: true, ..hub_options(arguments.offline) };
            if !arguments.dry_run {
                eprintln!("looking for {repository} in the Hub's cache, and fetching what is missing");
                Weights::open(&source, &[], &checkpoint.class, &hub).context("--weights hub")?;
                if let Some(vocoder) = family.vocoder.as_ref().filter(|_| repository == family.default_checkpoint) {
                    let source = Source::Hub { repository: vocoder.clone(), revision: None };
                    Weights::open(&source, &[], "", &hub).context("--weights hub: the vocoder")?;
                }
            }
            WeightsJob::Hub { repository, revision, ignore_extra: arguments.ignore_extra_tensors }
        }
        _ => WeightsJob::Synthetic { seed: arguments.seed },
    };
    // The family's class is that of its cells; a checkpoint of another class has its own.
    let is_default = checkpoint.repository == family.default_checkpoint;
    Ok(Subject {
        family,
        name: checkpoint.repository.clone(),
        class: if is_default { family.class.clone() } else { checkpoint.class.clone() },
        parameters: Some(checkpoint.parameters),
        config: checkpoint.config.clone(),
        extra_configs: checkpoint.extra_configs.clone(),
        weights,
    })
}

/// Weights in a folder or file, whose config.json says what they are.
fn local(arguments: &Arguments, path: &Path) -> anyhow::Result<Subject> {
    ensure!(
        path.exists(),
        "--weights {}: there is no such folder or file (`synthetic` and `hub` are the other choices)",
        path.display()
    );
    ensure!(arguments.checkpoint.is_none(), "--checkpoint is for --weights synthetic and hub; a path says it all");
    let at = || format!("--weights {}", path.display());
    let source = Source::Local { path: path.to_owned() };
    // Opened without a class, for the config beside it: names are mapped once the class is known.
    let weights = Weights::open(&source, &[], "", &hub_options(true)).with_context(at)?;
    let config = weights.config().with_context(at)?;
    let Detected { family, class } = catalog::detect(&config).with_context(at)?;
    ensure!(
        arguments.families.iter().all(|name| *name == family.name),
        "--weights {}: its config.json is of the family {}, not {}",
        path.display(),
        family.name,
        arguments.families.join(", ")
    );
    runnable(family)?;
    let path = std::path::absolute(path).with_context(at)?;
    Ok(Subject {
        family,
        name: path.display().to_string(),
        class,
        parameters: None,
        extra_configs: weights.extra_configs().with_context(at)?,
        config,
        weights: WeightsJob::Local { path, ignore_extra: arguments.ignore_extra_tensors },
    })
}

/// Real inputs, checked as far as they can be without a model.
fn raw_inputs(arguments: &Arguments, subject: &Subject) -> anyhow::Result<Option<RawInputs>> {
    let mut raw = RawInputs {
        texts: arguments.text.clone(),
        images: arguments.image.clone(),
        audio: arguments.audio.clone(),
        arguments: arguments.arg.iter().cloned().collect(),
        save: arguments.save.as_ref().map(std::path::absolute).transpose().context("--save")?,
    };
    if raw.kinds().is_empty() {
        ensure!(raw.arguments.is_empty(), "--arg is for --text, --image and --audio; standard cells have their own");
        ensure!(raw.save.is_none(), "--save keeps what comes of --text, --image or --audio; give one of them");
        return Ok(None);
    }
    let (family, takes) = (&subject.family.name, models::raw_inputs(&subject.family.name));
    for kind in raw.kinds() {
        let what = match kind {
            "image" => "picture",
            "audio" => "sound",
            _ => kind,
        };
        ensure!(takes.contains(&kind), "--{kind}: {family} takes no {what}");
    }
    ensure!(
        raw.texts.is_empty() || !matches!(subject.weights, WeightsJob::Synthetic { .. }),
        "--text needs the checkpoint's tokenizer.json, which synthetic weights don't have; \
         name a checkpoint's folder with --weights PATH, or use --weights hub"
    );
    for (flag, paths) in [("--image", &mut raw.images), ("--audio", &mut raw.audio)] {
        for path in paths {
            ensure!(path.exists(), "{flag} {}: there is no such file", path.display());
            *path = std::path::absolute(&path).with_context(|| format!("{flag} {}", path.display()))?;
        }
    }
    Ok(Some(raw))
}

/// The cells of a subject: its family's standard ones at the batches asked for, or one of real inputs.
fn cells(arguments: &Arguments, subject: &Subject, raw: Option<&RawInputs>) -> anyhow::Result<Vec<Cell>> {
    let standard = &subject.family.cells;
    if let Some(raw) = raw {
        let first = standard.first().with_context(|| format!("{} has no cells", subject.family.name))?;
        // The worker fills in the method, which the class decides, and the inputs, whose shapes the files decide.
        return Ok(vec![Cell {
            name: raw.name(),
            batch: raw.batch() as u64,
            inputs: BTreeMap::new(),
            ..first.clone()
        }]);
    }
    let (_, default) = catalog::checkpoint(&subject.family.default_checkpoint)?;
    let mut cells: Vec<Cell> = Vec::new();
    for cell in standard {
        let batches = if arguments.batch.is_empty() { &[cell.batch][..] } else { &arguments.batch };
        for &batch in batches {
            let cell = fitted(cell.with_batch(batch)?, &default.config, &subject.config);
            let label = format!("{}/{}", subject.family.name, cell.name);
            let wanted = arguments.cell.is_empty() || arguments.cell.iter().any(|pattern| pattern.is_match(&label));
            if wanted && cells.iter().all(|known| known.name != cell.name) {
                cells.push(cell);
            }
        }
    }
    Ok(cells)
}

/// `cell`, made for the config of the family's default checkpoint, with pictures as `config` asks for: a size is changed where
/// it is the one that the default asks for.
fn fitted(mut cell: Cell, default: &Value, config: &Value) -> Cell {
    let asked = |config: &Value| {
        let size = |axis: usize| match &config["image_size"] {
            Value::Array(sizes) => sizes.get(axis).and_then(Value::as_u64),
            size => size.as_u64(),
        };
        [config["num_channels"].as_u64(), size(0), size(1)]
    };
    if let Some(InputSpec::Floats { floats }) = cell.inputs.get_mut("pixel_values")
        && let [_, sizes @ ..] = &mut floats[..]
        && sizes.len() == 3
    {
        for ((size, default), wanted) in sizes.iter_mut().zip(asked(default)).zip(asked(config)) {
            if default.unwrap_or(*size as u64) == *size as u64
                && let Some(wanted) = wanted.and_then(|wanted| usize::try_from(wanted).ok())
            {
                *size = wanted;
            }
        }
    }
    cell
}

/// How the Hub is reached: by the environment's own rules, and not at all when `offline`.
pub(crate) fn hub_options(offline: bool) -> HubOptions {
    let options = HubOptions::from_env();
    HubOptions { offline: offline || options.offline, ..options }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pictures_have_the_size_that_another_config_asks_for() {
        let of = |family: &str, config: Value| {
            let family = catalog::family(family).unwrap();
            let (_, default) = catalog::checkpoint(&family.default_checkpoint).unwrap();
            match fitted(family.cells[0].clone(), &default.config, &config).inputs.remove("pixel_values") {
                Some(InputSpec::Floats { floats }) => floats,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(of("vit", json!({"image_size": 384})), [1, 3, 384, 384]);
        assert_eq!(of("vit", json!({"image_size": [32, 64], "num_channels": 1})), [1, 1, 32, 64]);
        // the standard cell is at another size than the default's 518
        assert_eq!(of("dinov2", json!({"image_size": 518})), [1, 3, 224, 224]);
    }
}
