//! The `roofbench` program: which models run on this machine, how fast, and how close to what it can do.
//!
//! This crate deliberately does not know how a model works: it plans, starts, shows and keeps.

mod arguments;
mod choice;
mod commands;
mod goal;
mod gpu;
mod job;
mod memory;
mod models;
mod optimized;
mod plan;
mod predict;
mod profile;
mod slowed;
mod supervise;
mod ui;
mod worker;

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::arguments::{EXIT_NO_COMPARISON, EXIT_USAGE};
use crate::commands::{compare, list, merge, predict as plan_command, probe, recommend, report, run, sample, verify};

/// Measures Hugging Face model families on the hardware in front of it, and says how close each comes to what that
/// hardware can do
#[derive(Debug, Parser)]
#[command(
    name = "roofbench",
    version,
    max_term_width = 110,
    after_help = "\
Start with:
  roofbench list               the 36 families, and which of them this build runs
  roofbench probe              this machine, and its measured ceilings
  roofbench plan               what fits here, and how fast it would be: nothing is measured or downloaded
  roofbench run bert --quick   a first measurement, on weights made from a seed: nothing is downloaded
  roofbench report FILE.jsonl --html report.html
  roofbench compare BASE.jsonl NEW.jsonl   what became slower, and how sure that is

Exit status: 0 all is well, 1 a cell or a case failed, 2 the command could not start (usage, or a file, folder
or device named in it), 130 interrupted. A comparison has its own: 0 no slow-down, 1 slower, 2 undecided,
64 it could not be made."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Says more on standard error; twice for details
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::Arguments),
    Probe(probe::Arguments),
    Plan(Box<plan_command::Arguments>),
    Run(Box<run::Arguments>),
    Recommend(Box<recommend::Arguments>),
    Verify(verify::Arguments),
    Report(report::Arguments),
    Compare(compare::Arguments),
    Merge(merge::Arguments),
    #[command(hide = true)]
    Sample(Box<sample::Arguments>),
    #[command(name = commands::WORKER, hide = true)]
    Worker,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Standard error that is closed hides the text, and nothing else.
            let _ = error.print();
            return if error.use_stderr() { could_not_start() } else { ExitCode::SUCCESS };
        }
    };
    log(arguments.verbose);
    let result = match &arguments.command {
        Command::List(arguments) => list::run(arguments),
        Command::Probe(arguments) => probe::run(arguments),
        Command::Plan(arguments) => plan_command::run(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::Recommend(arguments) => recommend::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Report(arguments) => report::run(arguments),
        Command::Compare(arguments) => compare::run(arguments),
        Command::Merge(arguments) => merge::run(arguments),
        Command::Sample(arguments) => sample::run(arguments),
        Command::Worker => worker::run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", ui::chain(&error));
        could_not_start()
    })
}

/// The exit status of a command that could not start. A comparison has one of its own, because 2 is one of its answers.
fn could_not_start() -> ExitCode {
    let mut words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let is_command = words.find(|word| !word.starts_with('-')).is_some_and(|command| command == "compare");
    let compares = is_command || words.any(|word| word == "--against" || word.starts_with("--against="));
    ExitCode::from(if compares { EXIT_NO_COMPARISON } else { EXIT_USAGE })
}

/// Logs to standard error: warnings, more with `-v`, or what `ROOFBENCH_LOG` says.
fn log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("ROOFBENCH_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
