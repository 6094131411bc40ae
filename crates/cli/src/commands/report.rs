//! `roofbench report`: tables and pages from records.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use roofbench_core::record::{self, Record};

use crate::ui;

/// Show records as a table, or write them as HTML, Markdown or CSV
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench report roofbench-results/*.jsonl
  roofbench report run.jsonl --html report.html    one page with roofline, latency, throughput, memory and energy
  roofbench report a.jsonl b.jsonl --markdown report.md --csv report.csv

A damaged or newer line is named and left out; the others are shown.")]
pub(crate) struct Arguments {
    /// Files of records, as `roofbench run` writes them
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Writes one page with plots, which needs no network
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,
    /// Writes tables for documents
    #[arg(long, value_name = "OUT")]
    markdown: Option<PathBuf>,
    /// Writes every number, one line each
    #[arg(long, value_name = "OUT")]
    csv: Option<PathBuf>,
}

/// Reads the records and shows them.
///
/// # Errors
/// A file can't be read or written, or none holds a record.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut records = Vec::new();
    for file in &arguments.files {
        let outcome = record::read(file)?;
        for problem in outcome.problems {
            eprintln!("warning: {problem}");
        }
        records.extend(outcome.records);
    }
    if records.is_empty() {
        let files: Vec<_> = arguments.files.iter().map(|file| file.display().to_string()).collect();
        bail!("no record in {}", files.join(", "));
    }
    let outputs = [
        (&arguments.html, roofbench_report::html as fn(&[Record], &[&str]) -> String),
        (&arguments.markdown, roofbench_report::markdown),
        (&arguments.csv, |records, _| roofbench_report::csv(records)),
    ];
    for (path, page) in &outputs {
        if let Some(path) = path {
            save(path, &page(&records, &[]))?;
        }
    }
    if outputs.iter().all(|(path, _)| path.is_none()) {
        ui::print(&roofbench_report::table(&records))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn save(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}
