//! The `roofbench` program: which models run on this machine, how fast, and how close to what it can do.
//!
//! This crate deliberately does not know how a model works: it plans, starts, shows and keeps.

mod arguments;
mod commands;
mod gpu;
mod job;
mod memory;
mod models;
mod optimized;
mod plan;
mod supervise;
mod ui;
mod worker;

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::arguments::EXIT_USAGE;
use crate::commands::{list, probe, report, run, sample, verify};

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
  roofbench run bert --quick   a first measurement, on weights made from a seed: nothing is downloaded
  roofbench report FILE.jsonl --html report.html

Exit status: 0 all is well, 1 a cell or a case failed, 2 the command could not start (usage, or a file, folder
or device named in it), 130 interrupted."
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
    Run(Box<run::Arguments>),
    Verify(verify::Arguments),
    Report(report::Arguments),
    #[command(hide = true)]
    Sample(Box<sample::Arguments>),
    #[command(name = commands::WORKER, hide = true)]
    Worker,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log(arguments.verbose);
    let result = match &arguments.command {
        Command::List(arguments) => list::run(arguments),
        Command::Probe(arguments) => probe::run(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Report(arguments) => report::run(arguments),
        Command::Sample(arguments) => sample::run(arguments),
        Command::Worker => worker::run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", ui::chain(&error));
        ExitCode::from(EXIT_USAGE)
    })
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
