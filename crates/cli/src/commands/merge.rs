//! `roofbench merge`: the records of several files in one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use roofbench_core::merge;

use crate::arguments::EXIT_FAILED;
use crate::ui;

/// Join files of records: shards of a fleet, pieces of a run
///
/// Every record is written once, as the line it was, in the order in which cells began, so that the latest record of a
/// cell is the last. Damaged lines, such as the last one of a node that went down, are named and left out.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench merge node1.jsonl node2.jsonl --output fleet.jsonl
  roofbench merge target/shard-*/records.jsonl --output fleet.jsonl

Exit status: 0 joined, 1 joined, but files tell the same run of a cell differently (each is named, and all are kept),
2 a file can't be read or written, or none holds a record.")]
pub(crate) struct Arguments {
    /// Files of records
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The joined file; it may be one of the others, and is replaced as a whole
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Joins the files.
///
/// # Errors
/// A file can't be read or written, or none holds a record.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let merged = merge::merge(&arguments.files)?;
    for problem in &merged.problems {
        eprintln!("warning: {problem}");
    }
    for conflict in &merged.conflicts {
        eprintln!("conflict: {conflict}");
    }
    let files: Vec<String> = arguments.files.iter().map(|file| file.display().to_string()).collect();
    ensure!(!merged.lines.is_empty(), "no record in {}", files.join(", "));
    if merged.builds.len() > 1 {
        let builds: Vec<&str> = merged.builds.iter().map(String::as_str).collect();
        eprintln!("warning: they were measured by different builds: {}", builds.join(", "));
    }
    let output = &arguments.output;
    let mut name = output.file_name().context("--output names no file")?.to_owned();
    name.push(".part");
    let part = output.with_file_name(name);
    let text = merged.lines.join("\n") + "\n";
    std::fs::write(&part, text)
        .and_then(|()| std::fs::rename(&part, output))
        .with_context(|| format!("--output {}", output.display()))?;
    eprintln!(
        "{} of {} in {}, {} there already",
        ui::count(merged.lines.len(), "record"),
        ui::count(merged.machines.len(), "machine"),
        output.display(),
        merged.duplicates
    );
    Ok(if merged.conflicts.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) })
}
