//! `roofbench compare`: what became slower between two files of records, and how sure that is.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use roofbench_core::compare::{self, Comparison, Conclusion, Rules};
use roofbench_core::record::{self, Record};

use super::run::percent;
use crate::arguments::{EXIT_SLOWER, EXIT_UNDECIDED};
use crate::ui;

/// Compare two files of records: what became faster or slower, and how sure that is
///
/// Cells are paired by what was measured, on which machine and with which settings. Records of the same cell in one file
/// are processes of it (`roofbench run --repeat 5`), whose differences say how far medians move by themselves; where a
/// side has too few, --process-noise is assumed. A cell is the same when it certainly changed by less than the margin, slower
/// (or faster) when its interval lies beyond no change, and otherwise undecided. Intervals widen with the number of cells, so that
/// --false-alarms holds for all of them together (Holm's procedure). Two files were recorded at different times, between
/// which the machine itself changes by --run-noise; `roofbench run --against` alternates, and sees smaller changes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench run bert vit --repeat 5 --output base.jsonl     before a change
  roofbench run bert vit --repeat 5 --output new.jsonl      after it
  roofbench compare base.jsonl new.jsonl
  roofbench compare base.jsonl new.jsonl --markdown > comment.md
  roofbench compare base.jsonl new.jsonl --margin 5 --junit compare.xml

Exit status: 0 no cell is slower, 1 a cell is slower, 2 undecided (a cell is not certain, or can't be compared though
the base has it), 64 the comparison could not be made (usage, or a file named in it).")]
pub(crate) struct Arguments {
    /// Records to compare with
    #[arg(value_name = "BASE")]
    base: PathBuf,
    /// Records to judge
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// Changes within this percentage don't matter
    #[arg(long, value_name = "PERCENT", value_parser = percent, default_value_t = 100.0 * Rules::of_recordings().margin)]
    margin: f64,
    /// Chance, in percent, that a comparison of equals calls any of its cells slower or faster
    #[arg(long, value_name = "PERCENT", value_parser = percent,
          default_value_t = 100.0 * Rules::default().false_alarms)]
    false_alarms: f64,
    /// Standard deviation of the median from process to process, in percent of it, where too few are there to tell
    #[arg(long, value_name = "PERCENT", value_parser = percent,
          default_value_t = 100.0 * Rules::default().process_noise)]
    process_noise: f64,
    /// Standard deviation, in percent, between recordings of the same program, which processes of one recording don't show:
    /// the machine at another time. 0 for files whose processes ran in turn
    #[arg(long, value_name = "PERCENT", value_parser = noise,
          default_value_t = 100.0 * Rules::of_recordings().run_noise)]
    run_noise: f64,
    /// Markdown for a pull request in place of the table
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// JSON in place of the table
    #[arg(long)]
    json: bool,
    /// Writes JUnit XML as well
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

/// Compares, and shows what came of it.
///
/// # Errors
/// A file can't be read or written, or holds no record.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let rules = Rules {
        false_alarms: arguments.false_alarms / 100.0,
        margin: arguments.margin / 100.0,
        process_noise: arguments.process_noise / 100.0,
        run_noise: arguments.run_noise / 100.0,
        looks: 1,
    };
    let comparison = compare::compare(&read(&arguments.base)?, &read(&arguments.new)?, rules);
    if let Some(path) = &arguments.junit {
        std::fs::write(path, roofbench_report::comparison_junit(&comparison))
            .with_context(|| format!("--junit {}", path.display()))?;
    }
    if arguments.markdown {
        ui::print(roofbench_report::comparison_markdown(&comparison).trim_end())?;
    } else {
        show(&comparison, arguments.json)?;
    }
    Ok(status(&comparison))
}

fn noise(text: &str) -> Result<f64, String> {
    if text.parse() == Ok(0.0) { Ok(0.0) } else { percent(text) }
}

fn read(path: &Path) -> anyhow::Result<Vec<Record>> {
    let outcome = record::read(path)?;
    for problem in outcome.problems {
        eprintln!("warning: {problem}");
    }
    ensure!(!outcome.records.is_empty(), "no record in {}", path.display());
    Ok(outcome.records)
}

/// Prints `comparison` as a table, or as JSON.
///
/// # Errors
/// Standard output can't be written.
pub(crate) fn show(comparison: &Comparison, json: bool) -> anyhow::Result<()> {
    let text = if json {
        serde_json::to_string(comparison).context("writing the comparison")?
    } else {
        roofbench_report::comparison_table(comparison)
    };
    Ok(ui::print(text.trim_end())?)
}

/// The exit status that says what it comes to.
pub(crate) fn status(comparison: &Comparison) -> ExitCode {
    match comparison.conclusion() {
        Conclusion::Passed => ExitCode::SUCCESS,
        Conclusion::Slower => ExitCode::from(EXIT_SLOWER),
        Conclusion::Undecided => ExitCode::from(EXIT_UNDECIDED),
    }
}
