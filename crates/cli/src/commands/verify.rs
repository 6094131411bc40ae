//! `roofbench verify`: reference cases, run and compared with the numbers that `transformers` computed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use roofbench_core::reference::{self, Case, Comparison, Finding, Setting, Verdict, WeightsDifference};

use crate::arguments::{DeviceArg, EXIT_FAILED, EngineArg};
use crate::models::Models;
use crate::ui;

/// Run reference cases and compare every output with what the transformers library computed
///
/// A case is a folder with case.json, config.json, tensors.json, inputs.safetensors and (the answers)
/// outputs.safetensors; preprocess-… and postprocess-… cases call the processor instead of the model. Weights are made
/// from the case's seed. The error of an output is max |ours - reference| / max |reference|; integers must be equal, and
/// so must types, shapes, and the names of the tensors that the model reads.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench verify tests/fixtures/reference          every case below a folder
  roofbench verify cases/bert/masked-lm cases/vit    one case, and all of a family
  roofbench verify cases --outputs computed
      keeps what was computed in computed/<family>/<case>/outputs.safetensors
  ROOFBENCH_ISA=scalar roofbench verify cases
      the same on the plain code path (others: avx2, avx512, neon)

Exit status: 0 every case passed, 1 one failed or is broken, 2 there is nothing to run.")]
pub(crate) struct Arguments {
    /// Folders: cases, or folders of cases
    #[arg(value_name = "CASE", required = true)]
    cases: Vec<PathBuf>,
    /// Writes what was computed below this folder, also for cases without answers
    #[arg(long, value_name = "DIR")]
    outputs: Option<PathBuf>,
    /// cpu, cuda[:N] or metal
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: DeviceArg,
    /// What runs the models
    #[arg(long, default_value = "roofbench", value_name = "ENGINE")]
    engine: EngineArg,
}

/// Runs every case and prints what came of it.
///
/// # Errors
/// There is no case, or the device or the folder for outputs can't be had.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let setting = Setting { device: arguments.device.open()?, engine: arguments.engine.into() };
    if let Some(folder) = &arguments.outputs {
        std::fs::create_dir_all(folder).with_context(|| format!("--outputs {}", folder.display()))?;
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    for path in &arguments.cases {
        folders.extend(reference::find(path)?);
    }
    let mut failed = 0;
    for folder in &folders {
        let (title, result) = check(folder, &setting, arguments.outputs.as_deref());
        let (passed, lines) = match &result {
            Ok(verdict) => (verdict.passed(), describe(verdict)),
            Err(error) => (false, vec![ui::chain(error)]),
        };
        failed += usize::from(!passed);
        ui::print(&format!("{} {title}", if passed { "ok    " } else { "FAILED" }))?;
        for line in lines {
            ui::print(&format!("         {line}"))?;
        }
    }
    ui::print(&format!("{}: {} passed, {failed} failed", ui::count(folders.len(), "case"), folders.len() - failed))?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) })
}

/// Runs the case in `folder`: what to call it, and what came of it.
fn check(folder: &Path, setting: &Setting, outputs: Option<&Path>) -> (String, anyhow::Result<Verdict>) {
    let case = match Case::read(folder) {
        Ok(case) => case,
        Err(error) => return (folder.display().to_string(), Err(error.into())),
    };
    let verdict = case.run(&Models, setting).map_err(anyhow::Error::from).and_then(|verdict| {
        if let Some(root) = outputs {
            let place = root.join(&case.family).join(&case.name);
            reference::write_outputs(&place, &verdict.computed).context("--outputs")?;
        }
        Ok(verdict)
    });
    (format!("{}/{} ({})", case.family, case.name, case.class), verdict)
}

/// A line per output, and one per kind of difference between the tensors read and those of the checkpoint.
fn describe(verdict: &Verdict) -> Vec<String> {
    let mut lines: Vec<String> = verdict.outputs.iter().map(comparison).collect();
    if verdict.outputs.is_empty() {
        let computed = verdict.computed.iter().map(|(name, tensor)| format!("{name} {:?}", tensor.dims()));
        lines.push(format!("no outputs.safetensors to compare with; computed {}", listed(computed.collect())));
    }
    let Some(WeightsDifference { unread, unknown, misshapen }) = &verdict.weights else { return lines };
    if !unread.is_empty() {
        lines.push(format!("of the checkpoint, never read: {}", listed(unread.clone())));
    }
    if !unknown.is_empty() {
        lines.push(format!("read, but not in the checkpoint: {}", listed(unknown.clone())));
    }
    for (name, asked, has) in misshapen {
        lines.push(format!("tensor {name}: asked for as {asked:?}, in the checkpoint it is {has:?}"));
    }
    lines
}

fn comparison(comparison: &Comparison) -> String {
    let Comparison { name, tolerance, finding } = comparison;
    match finding {
        Finding::Error(error) => {
            let verdict = if comparison.passed() { "within" } else { "BEYOND" };
            let error = if *error == 0.0 { "0".to_owned() } else { format!("{error:.1e}") };
            format!("{name}: largest error {error}, {verdict} {tolerance:.0e}")
        }
        Finding::Unequal { different: 0, of } => format!("{name}: all {of} integers equal"),
        Finding::Unequal { different, of } => format!("{name}: {different} of {of} integers differ"),
        Finding::Absent(given) => format!("{name}: not among the outputs: {}", listed(given.clone())),
        Finding::Form(ours, reference) => format!("{name}: is {ours}, the reference is {reference}"),
    }
}

/// The first few of `items`.
fn listed(mut items: Vec<String>) -> String {
    const SHOWN: usize = 8;
    let more = items.len().saturating_sub(SHOWN);
    items.truncate(SHOWN);
    if more > 0 {
        items.push(format!("and {more} more"));
    }
    items.join(", ")
}
