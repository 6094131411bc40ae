//! `cargo xtask study`: how often comparisons are wrong, by comparing the program with itself and with itself slowed down.
//!
//! A trial is a whole comparison by the real program: `run --against`, or two runs with `--repeat` and `compare`. The cell is
//! a tiny model, so that hundreds fit into minutes; a slow-down is planted by spinning, in the process that is measured, for
//! a share of the time of every call. docs/studies keeps what `run --against` found, and of `compare` the processes, from
//! which its verdicts follow by the rules of today; the table in docs/methodology.md is made of both.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use roofbench_core::compare::{self, Comparison, Estimate, Judgement, Process, Rules, Verdict};
use roofbench_core::record;
use roofbench_core::stats::SplitMix64;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

use crate::process;

/// What is planted, in per cent: mostly nothing and 5 %, which the claims are about.
const SCHEDULE: [u32; 10] = [0, 5, 0, 2, 5, 0, 5, 10, 0, 5];
const PLANTED: [u32; 4] = [0, 2, 5, 10];
/// Processes of a side.
const PROCESSES: usize = 5;
/// Comparisons drawn from all processes, for each slow-down.
const DRAWS: usize = 20_000;
/// The cell, and sampling that is short and still has hundreds of calls.
const FLAGS: [&str; 9] =
    ["--cell", "forward/b1/s128", "--threads", "1", "--quick", "--min-time", "0.02", "--max-samples", "200"];

const TRIALS: &str = "alternations.csv";
const TRIALS_HEADER: &str = "planted_percent,ratio,low,high,verdict";
const SIDES: &str = "processes.csv";
const SIDES_HEADER: &str = "planted_percent,log_median_ns,error";
const BEGIN: &str = "<!-- cargo xtask study -->\n";
const END: &str = "<!-- end -->\n";

#[derive(clap::Args)]
#[command(after_help = "\
Trials are added to docs/studies; it can be stopped and started again.

Examples:
  cargo xtask study --minutes 20
  cargo xtask study --minutes 0      only the table of docs/methodology.md, from the trials that are there")]
pub(crate) struct Arguments {
    /// How long to go on adding trials
    #[arg(long, value_name = "M", default_value_t = 20.0)]
    minutes: f64,
    /// Forgets the trials so far
    #[arg(long)]
    fresh: bool,
}

/// One comparison in alternation.
struct Trial {
    planted: u32,
    ratio: f64,
    verdict: Verdict,
}

/// One process of a trial of `compare`.
struct Run {
    planted: u32,
    process: Process,
}

/// Adds trials for a while, and writes the table.
///
/// # Errors
/// The program does not build, or a trial fails.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let folder = data();
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    if arguments.fresh {
        for path in [TRIALS, SIDES].map(|name| folder.join(name)).iter().filter(|path| path.exists()) {
            fs::remove_file(path).with_context(|| path.display().to_string())?;
        }
    }
    if arguments.minutes > 0.0 {
        let study = Study::new()?;
        let until = Instant::now() + Duration::from_secs_f64(60.0 * arguments.minutes);
        let mut done = 0;
        while Instant::now() < until {
            for planted in SCHEDULE {
                study.against(planted)?;
                study.compare(planted)?;
                done += 2;
            }
            eprintln!("{done} comparisons");
        }
    }
    let page = process::root().join("docs/methodology.md");
    fs::write(&page, methodology()?).with_context(|| page.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn data() -> PathBuf {
    process::root().join("docs/studies")
}

/// The program, the tiny model, and a folder for what it writes.
struct Study {
    program: PathBuf,
    folder: PathBuf,
}

impl Study {
    fn new() -> anyhow::Result<Self> {
        let program = process::build_cli()?;
        let folder = process::target()?.join("study");
        checkpoint(&folder.join("model"))?;
        Ok(Self { program, folder })
    }

    /// The program on the tiny model.
    fn program(&self, planted: u32) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(&self.folder).args(["run", "--weights", "model"]).args(FLAGS);
        if planted > 0 {
            command.args(["--slow-down", &planted.to_string()]);
        }
        command
    }

    /// A trial of `run --against`: the program beside itself.
    fn against(&self, planted: u32) -> anyhow::Result<()> {
        let mut command = self.program(planted);
        command.args(["--json", "--against"]).arg(&self.program);
        let judged = judgement(&mut command).context("run --against")?;
        let [ratio, low, high] = [judged.ratio, judged.low, judged.high].map(|x| format!("{x:.5}"));
        let line = format!("{planted},{ratio},{low},{high},{}\n", judged.verdict);
        append(&data().join(TRIALS), TRIALS_HEADER, &line)
    }

    /// A trial of `compare`: two runs, one after the other.
    fn compare(&self, planted: u32) -> anyhow::Result<()> {
        let mut lines = String::new();
        for (name, planted) in [("base.jsonl", 0), ("new.jsonl", planted)] {
            let file = self.folder.join(name);
            if file.exists() {
                fs::remove_file(&file).with_context(|| name.to_owned())?;
            }
            let mut command = self.program(planted);
            command.args(["--repeat", &PROCESSES.to_string(), "--json", "--output", name]);
            let output = command.output().context("starting roofbench")?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            for record in record::read(&file)?.records {
                let process = Process::of_calls(&record.calls_ns()).context("a run without calls")?;
                let error = process.error.context("a run with too few calls")?;
                writeln!(lines, "{planted},{:.6},{error:.6}", process.log_median)?;
            }
        }
        append(&data().join(SIDES), SIDES_HEADER, &lines)?;
        let mut command = Command::new(&self.program);
        command.current_dir(&self.folder).args(["compare", "base.jsonl", "new.jsonl", "--json"]);
        judgement(&mut command).context("compare").map(drop)
    }
}

/// Runs a comparison of one cell, whose exit status has to agree with what it says.
fn judgement(command: &mut Command) -> anyhow::Result<Judgement> {
    let output = command.output().context("starting roofbench")?;
    let comparison: Comparison =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let [row] = &comparison.rows[..] else { bail!("{:?}", comparison.apart) };
    let expected = match row.judgement.verdict {
        Verdict::Slower => 1,
        Verdict::Undecided => 2,
        Verdict::Same | Verdict::Faster => 0,
    };
    ensure!(output.status.code() == Some(expected), "{} with {}", row.judgement.verdict, output.status);
    Ok(row.judgement)
}

/// A BertModel of two layers of 64, of made-up numbers: a call takes a fraction of a millisecond.
fn checkpoint(folder: &Path) -> anyhow::Result<()> {
    let (hidden, inner, vocabulary, positions) = (64, 256, 100, 512);
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocabulary, "hidden_size": hidden,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": inner,
        "max_position_embeddings": positions, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    });
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![vocabulary, hidden]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![positions, hidden]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, hidden]),
    ];
    let mut dense = |name: String, shape: Vec<usize>| {
        shapes.push((format!("{name}.bias"), vec![shape[0]]));
        shapes.push((format!("{name}.weight"), shape));
    };
    dense("embeddings.LayerNorm".to_owned(), vec![hidden]);
    dense("pooler.dense".to_owned(), vec![hidden, hidden]);
    for layer in 0..2 {
        for (name, shape) in [
            ("attention.self.query", vec![hidden, hidden]),
            ("attention.self.key", vec![hidden, hidden]),
            ("attention.self.value", vec![hidden, hidden]),
            ("attention.output.dense", vec![hidden, hidden]),
            ("attention.output.LayerNorm", vec![hidden]),
            ("intermediate.dense", vec![inner, hidden]),
            ("output.dense", vec![hidden, inner]),
            ("output.LayerNorm", vec![hidden]),
        ] {
            dense(format!("encoder.layer.{layer}.{name}"), shape);
        }
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, shape)| {
            (0..shape.iter().product()).flat_map(|i: usize| (0.1 * (i as f32).sin()).to_le_bytes()).collect()
        })
        .collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).context("a tensor of the tiny model")?))
    });
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("config.json"), config.to_string()).context("config.json of the tiny model")?;
    let views: Vec<_> = views.collect::<anyhow::Result<_>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).context("writing the tiny model")
}

/// Appends `lines` to a file that begins with `header`.
fn append(path: &Path, header: &str, lines: &str) -> anyhow::Result<()> {
    let header = if path.exists() { String::new() } else { format!("{header}\n") };
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all((header + lines).as_bytes()).with_context(|| path.display().to_string())
}

/// The lines of a file of the study after its header, as `parse` reads their fields; none before the first trial.
fn lines<T>(name: &str, parse: impl Fn(&[&str]) -> Option<T>) -> anyhow::Result<Vec<T>> {
    let path = data().join(name);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let rows = text.lines().enumerate().skip(1);
    rows.map(|(number, line)| {
        parse(&line.split(',').collect::<Vec<_>>())
            .with_context(|| format!("{}: line {}: {line}", path.display(), number + 1))
    })
    .collect()
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn trials() -> anyhow::Result<Vec<Trial>> {
    lines(TRIALS, |fields| {
        let [planted, ratio, _, _, verdict] = fields else { return None };
        let verdict = serde_json::from_value((*verdict).into()).ok()?;
        Some(Trial { planted: number(planted)?, ratio: number(ratio)?, verdict })
    })
}

fn sides() -> anyhow::Result<Vec<Run>> {
    lines(SIDES, |fields| {
        let [planted, log_median, error] = fields else { return None };
        let process = Process { log_median: number(log_median)?, error: Some(number(error)?) };
        Some(Run { planted: number(planted)?, process })
    })
}

/// `docs/methodology.md` with the table of the trials that are there.
///
/// # Errors
/// The page, its markers, or the trials can't be read.
pub(crate) fn methodology() -> anyhow::Result<String> {
    let path = process::root().join("docs/methodology.md");
    let page = fs::read_to_string(&path).with_context(|| path.display().to_string())?.replace("\r\n", "\n");
    let marks = || format!("{} lacks the lines {} and {}", path.display(), BEGIN.trim(), END.trim());
    let (before, rest) = page.split_once(BEGIN).with_context(marks)?;
    let (_, after) = rest.split_once(END).with_context(marks)?;
    Ok(format!("{before}{BEGIN}{}{END}{after}", table()?))
}

fn table() -> anyhow::Result<String> {
    let mut text = String::from(
        "\n| comparisons | planted | number | slower | faster | same | undecided | called slower or faster | median change |\n\
         |---|--:|--:|--:|--:|--:|--:|---|--:|\n",
    );
    let trials = trials()?;
    if trials.is_empty() {
        return Ok(String::new());
    }
    for planted in PLANTED {
        let of = trials.iter().filter(|trial| trial.planted == planted);
        row(&mut text, "`run --against`", planted, &of.map(|trial| (trial.verdict, trial.ratio)).collect::<Vec<_>>())?;
    }
    let runs = sides()?;
    for planted in PLANTED {
        row(&mut text, "`run --repeat 5` twice, then `compare`", planted, &recorded(&runs, planted))?;
    }
    for planted in PLANTED {
        row(&mut text, "drawn from all runs, 5 processes a side", planted, &drawn(&runs, planted))?;
    }
    let alone = neighbours(&runs);
    row(&mut text, "one process a side, its own noise alone", 0, &alone)?;
    writeln!(text)?;
    Ok(text)
}

/// What `compare` says of runs of which one followed the other.
fn recorded(runs: &[Run], planted: u32) -> Vec<(Verdict, f64)> {
    let rules = Rules::of_recordings();
    let side = |runs: &[Run]| runs.iter().map(|run| run.process).collect::<Vec<_>>();
    let pairs = runs.chunks_exact(2 * PROCESSES).map(|pair| pair.split_at(PROCESSES));
    let pairs = pairs.filter(|(_, new)| new[0].planted == planted);
    pairs.filter_map(|(base, new)| judged(Estimate::of_sides(&side(base), &side(new), &rules), &rules)).collect()
}

/// Comparisons of random processes with random ones that were slowed down: minutes lie between some.
fn drawn(runs: &[Run], planted: u32) -> Vec<(Verdict, f64)> {
    let of = |planted: u32| runs.iter().filter(|run| run.planted == planted).map(|run| run.process).collect::<Vec<_>>();
    let (base, new) = (of(0), of(planted));
    if base.is_empty() || new.is_empty() {
        return Vec::new();
    }
    let mut random = SplitMix64(u64::from(planted));
    let mut side = |all: &[Process]| (0..PROCESSES).map(|_| all[random.below(all.len())]).collect::<Vec<_>>();
    let rules = Rules::default();
    (0..DRAWS).filter_map(|_| judged(Estimate::of_sides(&side(&base), &side(&new), &rules), &rules)).collect()
}

/// Comparisons of one process with the next, as if processes did not differ.
fn neighbours(runs: &[Run]) -> Vec<(Verdict, f64)> {
    let rules = Rules { process_noise: 0.0, ..Rules::default() };
    let unslowed: Vec<Process> = runs.iter().filter(|run| run.planted == 0).map(|run| run.process).collect();
    let pairs = unslowed.chunks_exact(2);
    pairs.filter_map(|pair| judged(Estimate::of_sides(&pair[..1], &pair[1..], &rules), &rules)).collect()
}

fn judged(estimate: Result<Estimate, String>, rules: &Rules) -> Option<(Verdict, f64)> {
    let judged = compare::judge(&[estimate.ok()?], rules);
    judged.first().map(|judged| (judged.verdict, judged.ratio))
}

fn row(text: &mut String, title: &str, planted: u32, results: &[(Verdict, f64)]) -> anyhow::Result<()> {
    if results.is_empty() {
        return Ok(());
    }
    let all = results.len();
    let counts = [Verdict::Slower, Verdict::Faster, Verdict::Same, Verdict::Undecided]
        .map(|verdict| results.iter().filter(|(other, _)| *other == verdict).count());
    let (low, high) = wilson(counts[0] + counts[1], all);
    let rate = 100.0 * (counts[0] + counts[1]) as f64 / all as f64;
    let mut changes: Vec<f64> = results.iter().map(|(_, ratio)| 100.0 * (ratio - 1.0)).collect();
    changes.sort_by(f64::total_cmp);
    let counts = counts.map(|count| count.to_string()).join(" | ");
    writeln!(
        text,
        "| {title} | {planted} % | {all} | {counts} | {rate:.2} % [{:.2}, {:.2}] | {:+.2} % |",
        100.0 * low,
        100.0 * high,
        changes[all / 2]
    )?;
    Ok(())
}

/// 95 % interval of a share (Wilson 1927).
fn wilson(hits: usize, all: usize) -> (f64, f64) {
    let (z, n) = (1.959_964_f64, all as f64);
    let share = hits as f64 / n;
    let centre = share + z * z / (2.0 * n);
    let reach = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    let of = |x: f64| (x / (1.0 + z * z / n)).clamp(0.0, 1.0);
    (of(centre - reach), of(centre + reach))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_share() {
        // Newcombe 1998, table I: 81 of 263 and 0 of 20
        let close = |x: f64, y: f64| (x - y).abs() < 5e-5;
        let (low, high) = wilson(81, 263);
        assert!(close(low, 0.2553) && close(high, 0.3662), "{low} {high}");
        let (low, high) = wilson(0, 20);
        assert!(close(low, 0.0) && close(high, 0.1611), "{low} {high}");
    }

    #[test]
    fn what_the_study_claims_is_in_its_data() {
        let (trials, runs) = (trials().unwrap(), sides().unwrap());
        let alternated = |planted| -> Vec<Verdict> {
            trials.iter().filter(|trial| trial.planted == planted).map(|trial| trial.verdict).collect()
        };
        let share = |of: &[Verdict], verdicts: &[Verdict]| {
            assert!(of.len() >= 100, "{} trials", of.len());
            of.iter().filter(|verdict| verdicts.contains(verdict)).count() as f64 / of.len() as f64
        };
        let one_after_the_other: Vec<Verdict> = recorded(&runs, 0).into_iter().map(|(verdict, _)| verdict).collect();
        for equals in [alternated(0), one_after_the_other] {
            let alarms = share(&equals, &[Verdict::Slower, Verdict::Faster]);
            assert!(alarms <= 0.01, "{alarms}");
        }
        let found = share(&alternated(5), &[Verdict::Slower]);
        assert!(found >= 0.99, "{found}");
    }
}
