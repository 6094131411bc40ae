//! Tasks of the workspace, run as `cargo xtask TASK`. This file only dispatches; each task is a file.

mod bench_all;
mod browser;
mod checkpoint;
mod ci;
mod docs;
mod peers;
mod platforms;
mod process;
mod sanitize;
mod study;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tasks of the roofbench workspace")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures every cell of the catalog, each in its own process, and reports on all 36 families
    BenchAll(bench_all::Arguments),
    /// Looks at reports in headless Chromium: do they fit a desktop and a phone, light and dark, without network and scripts
    Browser(browser::Arguments),
    /// Unpacks a small published checkpoint under target/checkpoints, for tests on real weights
    Checkpoint,
    /// Runs exactly what a crate's CI job runs
    Ci(ci::Arguments),
    /// Writes the generated documents: docs/models.md, docs/record.schema.json, docs/performance.md and the study in
    /// docs/methodology.md
    Docs(docs::Arguments),
    /// Runs our cells and those of PyTorch, ONNX Runtime, OpenVINO and candle-transformers in alternation
    Peers(peers::Arguments),
    /// Tries other platforms from a Linux machine: Arm under qemu, Windows under Wine, CUDA without a GPU, Metal
    Platforms(platforms::Arguments),
    /// Runs the kernels' tests under AddressSanitizer
    Sanitize,
    /// Finds out how often comparisons are wrong, by comparing the program with itself, and slowed down
    Study(study::Arguments),
    /// Checks what the compiler can't: crate edges, homes of libraries, unsafe code, the catalog's rows
    Tidy,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::BenchAll(arguments) => bench_all::run(&arguments),
        Task::Browser(arguments) => browser::run(&arguments).map(|()| ExitCode::SUCCESS),
        Task::Checkpoint => checkpoint::run().map(|()| ExitCode::SUCCESS),
        Task::Ci(arguments) => ci::run(&arguments).map(|()| ExitCode::SUCCESS),
        Task::Docs(arguments) => docs::run(&arguments).map(|()| ExitCode::SUCCESS),
        Task::Peers(arguments) => peers::run(&arguments),
        Task::Platforms(arguments) => platforms::run(&arguments),
        Task::Sanitize => sanitize::run().map(|()| ExitCode::SUCCESS),
        Task::Study(arguments) => study::run(&arguments),
        Task::Tidy => tidy::run().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
