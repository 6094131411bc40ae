//! `roofbench run --against`: this build beside another, in alternation, so that a drift of the machine meets both.
//!
//! A cell is run by several pairs of processes, one of each build (`roofbench sample`), which take bursts of calls in turn.
//! A pair gives one ratio; how the ratios of pairs differ says how far processes of one program do.

use std::env::consts::EXE_SUFFIX;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail, ensure};
use roofbench_core::compare::{Apart, Comparison, Estimate, Process, Rules, Side, Verdict, judge};
use roofbench_core::harness::alternation::{self, Contender};
use roofbench_core::session::Engine;
use serde_json::Value;

use super::ablate::{self, Scratch};
use super::run::Arguments;
use super::{compare, sample};
use crate::job::Job;
use crate::{models, plan, ui};

/// Rounds of a pair and nanoseconds of a burst; those of a first look.
const STANDARD: (usize, u64) = (8, 300_000_000);
const QUICK: (usize, u64) = (6, 15_000_000);

/// Pairs of processes after which a cell is looked at, until it is decided; `--repeat` gives one number in their place.
const LOOKS: [usize; 3] = [5, 10, 20];

/// Compares every job with the build that `against` names.
///
/// # Errors
/// The other build can't be had, or a folder for outputs can't be made. A cell that fails is told, and leaves the
/// comparison undecided.
pub(crate) fn run(arguments: &Arguments, jobs: &[Job], against: &str) -> anyhow::Result<ExitCode> {
    let program = program(against).with_context(|| format!("--against {against}"))?;
    let scratch = Scratch::new()?;
    let looks = arguments.repeat.map_or_else(|| LOOKS.to_vec(), |pairs| vec![pairs as usize]);
    let rules = Rules { looks: looks.len() as u32, ..Rules::default() };
    // a look at one cell does not know how the others will come out, and takes its share alone
    let alone = Rules { false_alarms: rules.false_alarms / jobs.len() as f64, ..rules };
    let (mut cells, mut apart) = (Vec::new(), Vec::new());
    for job in jobs {
        let title = plan::title(job, jobs);
        match cell(job, &title, &program, &scratch.0, &looks, &alone) {
            Ok((base, new, estimate)) => cells.push((title, base, new, estimate)),
            Err(error) => apart.push(Apart { cell: title, reason: ui::chain(&error), owed: true }),
        }
    }
    let comparison = Comparison::of(cells, apart, rules);
    compare::show(&comparison, arguments.json)?;
    Ok(compare::status(&comparison))
}

/// Measures pairs until one of `looks` decides.
fn cell(
    job: &Job,
    title: &str,
    program: &Path,
    scratch: &Path,
    looks: &[usize],
    rules: &Rules,
) -> anyhow::Result<(Side, Side, Estimate)> {
    ablate::fits_twice(job)?;
    let this = std::env::current_exe().context("finding this program's own file")?;
    let unslowed = Job { slow_down: None, ..job.clone() };
    let (rounds, burst) = if job.sampling.quick { QUICK } else { STANDARD };
    let case = |name: &str| scratch.join(name);
    let start = |program: &Path, job: &Job, name: &'static str| -> anyhow::Result<_> {
        let (process, _) = ablate::started::<Value>(program, job, &case(name)).context(name)?;
        Contender::new(process, burst).context(name)
    };
    let (mut ratios, mut of_base, mut of_new) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let pair = ratios.len();
        // neither is always the first, to load or to run
        let (mut base, mut new);
        if pair % 2 == 0 {
            base = start(program, &unslowed, "the other build")?;
            new = start(&this, job, "this build")?;
            alternation::alternate(&mut [&mut base, &mut new], rounds)?;
        } else {
            new = start(&this, job, "this build")?;
            base = start(program, &unslowed, "the other build")?;
            alternation::alternate(&mut [&mut new, &mut base], rounds)?;
        }
        if pair == 0 && job.engine == Engine::Roofbench {
            let deviation = sample::deviation(&case("the other build"), &case("this build"))?;
            if let Some(error) = deviation.error.filter(|&error| error > 0.0) {
                eprintln!("{}: outputs differ by up to {error:.1e} of the largest value", job.label());
            }
        }
        let process = |contender: &Contender<_>| {
            let medians: Vec<u64> = contender.medians().iter().map(|&ns| ns as u64).collect();
            Process::of_calls(&medians).context("there were no rounds")
        };
        of_base.push(process(&base)?);
        of_new.push(process(&new)?);
        ratios.push(Process::of_rounds(base.medians(), new.medians()).context("there were no rounds")?);
        if looks.contains(&ratios.len()) {
            let estimate = Estimate::of_pairs(&ratios, rules).map_err(anyhow::Error::msg)?;
            let verdict = judge(&[estimate], rules)[0].verdict;
            eprintln!("{title}: {} of processes in alternation: {verdict}", ui::count(ratios.len(), "pair"));
            if verdict != Verdict::Undecided || looks.last() == Some(&ratios.len()) {
                return Ok((Side::of(&of_base), Side::of(&of_new), estimate));
            }
        }
    }
}

/// The program that `against` names: a file, or a commit of the checkout that this is run in, built if it isn't yet.
fn program(against: &str) -> anyhow::Result<PathBuf> {
    let file = Path::new(against);
    if file.is_file() {
        return std::path::absolute(file).context("finding it");
    }
    let root = git(Path::new("."), &["rev-parse", "--show-toplevel"])
        .context("it is no file, and this folder is in no checkout that could have such a commit")?;
    let root = Path::new(&root);
    ensure!(
        root.join("crates/cli/Cargo.toml").is_file(),
        "it is no file, and {} is no checkout of roofbench, which a commit has to be of",
        root.display()
    );
    let commit = git(root, &["rev-parse", "--verify", "--end-of-options", &format!("{against}^{{commit}}")])
        .with_context(|| format!("it is neither a file nor a commit of {}", root.display()))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = std::path::absolute(target.join("against")).context("finding cargo's target folder")?;
    let program = folder.join(&commit).join(format!("roofbench{EXE_SUFFIX}"));
    if !program.is_file() {
        eprintln!("building {commit} in release mode under {}", folder.display());
        build(root, &commit, &folder, &program)?;
    }
    Ok(program)
}

/// Checks `commit` out into a worktree of its own, and builds it with the features of this build.
fn build(root: &Path, commit: &str, folder: &Path, program: &Path) -> anyhow::Result<()> {
    let source = folder.join(format!("source-{commit}"));
    let worktree = source.to_str().context("the path of the target folder is not UTF-8")?;
    git(root, &["worktree", "add", "--detach", "--force", worktree, commit])?;
    let built = folder.join("build");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--locked", "--package", "roofbench-cli", "--no-default-features", "--features"])
        .arg(models::build().features.join(","))
        .current_dir(&source)
        .env("CARGO_TARGET_DIR", &built)
        .status();
    // what was checked out is not needed any more, whatever became of it
    git(root, &["worktree", "remove", "--force", worktree])?;
    let status = status.context("starting cargo")?;
    ensure!(status.success(), "it does not build ({status})");
    let made = built.join("release").join(format!("roofbench{EXE_SUFFIX}"));
    let keep = || {
        fs::create_dir_all(program.parent().unwrap_or(folder))?;
        fs::copy(&made, program)
    };
    keep().with_context(|| format!("keeping {}", made.display()))?;
    Ok(())
}

/// Standard output of a git command, trimmed.
fn git(folder: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git").current_dir(folder).args(arguments).output().context("starting git")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        bail!("git {}: {}", arguments[0], text(&output.stderr));
    }
    Ok(text(&output.stdout))
}
