//! The real program: what it predicts, what it chooses, and what it measures behind the samples.

mod support;

use std::fs;

use roofbench_core::profile::OTHER;
use roofbench_core::record::{Measurement, Outcome};
use serde_json::Value;
use support::{bert_config, bert_tensors, checkpoint, program, records, roofbench, words};
use tempfile::tempdir;

/// Flags that keep a run short.
const SHORT: &str = "--max-samples 3 --max-time 2 --min-time 0";

/// A folder with the tiny checkpoint in `model`.
fn with_model() -> tempfile::TempDir {
    let folder = tempdir().unwrap();
    checkpoint(&folder.path().join("model"), &bert_config(), &bert_tensors());
    folder
}

#[test]
fn a_plan_of_every_family_needs_no_weights() {
    let folder = tempdir().unwrap();
    let lines = roofbench(folder.path(), ["plan", "--json"]).expect(0, &[]).json_lines();
    for line in &lines {
        assert!(line["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{line}");
        assert!(line["memory_bytes"].as_f64().is_some_and(|bytes| bytes > 1e7), "{line}");
    }
    let planned = roofbench(folder.path(), ["run", "--dry-run", "--json"]).expect(0, &[]).json_lines();
    assert_eq!(lines.len(), planned.len());
    let of = |line: &Value| format!("{}/{}", line["family"].as_str().unwrap(), line["cell"].as_str().unwrap());
    assert_eq!(
        lines.iter().map(|line| line["cell"].as_str().unwrap().to_owned()).collect::<Vec<_>>(),
        planned.iter().map(of).collect::<Vec<_>>()
    );
}

#[cfg(all(target_os = "linux", feature = "text"))]
#[test]
fn a_model_of_any_size_is_planned_in_little_memory() {
    let folder = tempdir().unwrap();
    let plan = program(folder.path());
    // 14 GB of weights, in a process that may have 3 GB of addresses
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -v 3000000 && exec \"$0\" plan mistral --json"]).arg(plan.get_program());
    limited.current_dir(folder.path()).envs(plan.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let lines = support::Ran::from(limited.output().unwrap()).expect(0, &[]).json_lines();
    let bytes = lines[0]["memory_bytes"].as_f64().unwrap();
    assert!((14e9..20e9).contains(&bytes), "{bytes}");
}

#[cfg(feature = "text")]
#[test]
fn more_work_is_predicted_to_take_longer_and_fewer_bits_less_memory() {
    let folder = tempdir().unwrap();
    let plan = |flags: &str| {
        let lines = roofbench(folder.path(), words(&format!("plan llama {flags} --json"))).expect(0, &[]).json_lines();
        (lines[0]["seconds"].as_f64().unwrap(), lines[0]["memory_bytes"].as_f64().unwrap())
    };
    let (plain, larger, narrow, eight) = (plan(""), plan("--batch 4"), plan("--dtype bf16"), plan("--opt +weights-q8"));
    assert!(larger.0 > plain.0 && larger.1 > plain.1, "{larger:?} for {plain:?}");
    assert!(narrow.1 < 0.7 * plain.1 && eight.1 < 0.5 * plain.1, "{narrow:?} and {eight:?} for {plain:?}");
    assert!(eight.0 < plain.0, "{eight:?} for {plain:?}");
    roofbench(folder.path(), words("plan llama --opt +fast")).expect(2, &["no optimization `fast`"]);
    roofbench(folder.path(), words("plan lama")).expect(2, &["did you mean `llama`?"]);
}

#[cfg(feature = "text")]
#[test]
fn measured_cells_stand_beside_what_was_predicted() {
    let folder = with_model();
    let run = |flags: &str| {
        roofbench(folder.path(), words(&format!("run --weights model --output r.jsonl {SHORT} {flags}"))).expect(0, &[])
    };
    run("--threads 1 --batch 1,2");
    let show = |flags: &str| roofbench(folder.path(), words(&format!("plan --records r.jsonl {flags}")));
    show("--calibration c.json")
        .expect(0, &["measured", "time, 90th percentile", "each cell is predicted from all others"]);
    let calibration: Value = serde_json::from_slice(&fs::read(folder.path().join("c.json")).unwrap()).unwrap();
    assert!(calibration["efficiencies"]["dense"]["compute"].as_f64().is_some_and(|share| share > 0.0));
    assert!(calibration["families"]["bert"]["time"]["dense"].as_f64().is_some_and(|ratio| ratio > 0.0));
    let lines = show("--json").expect(0, &[]).json_lines();
    assert_eq!(lines.len(), records(&folder.path().join("r.jsonl")).len());
    assert!(lines.iter().all(|line| line["measured_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0)));
    // with a family, they are what its prediction comes from
    show("bert").expect(0, &["its family was measured", "measured cells on"]);
    roofbench(folder.path(), words("plan --records none.jsonl")).expect(2, &["--records", "none.jsonl"]);
    fs::write(folder.path().join("empty.jsonl"), "").unwrap();
    roofbench(folder.path(), words("plan --records empty.jsonl")).expect(2, &["no measured cell"]);
}

#[cfg(all(feature = "text", feature = "vision"))]
#[test]
fn checkpoint_and_precision_follow_from_memory_and_budget() {
    let folder = tempdir().unwrap();
    let choose = |flags: &str| {
        roofbench(folder.path(), words(&format!("plan llama vit {flags} --json"))).expect(0, &[]).json_lines()
    };
    let command = |line: &Value| {
        line["command"]
            .as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let enough = choose("--memory 16GB --budget 10h");
    assert_eq!(enough.len(), 3, "all cells in their own precision: {enough:?}");
    assert!(enough.iter().all(|line| !command(line).contains("--opt")));
    let tight = choose("--memory 2GB");
    let llama = tight.iter().find(|line| line["family"] == "llama").unwrap();
    assert!(command(llama).contains("--opt +weights-q8") || command(llama).contains("bf16"), "{llama}");
    // the same command measures it
    let again =
        roofbench(folder.path(), command(llama).split(' ').chain(["--dry-run", "--json"])).expect(0, &[]).json_lines();
    assert_eq!(again, std::slice::from_ref(llama));
    let none = choose("--memory 20MB");
    assert!(
        none.iter().all(|line| line["skipped"].as_str().is_some_and(|reason| reason.contains("--memory is 20"))),
        "{none:?}"
    );
    let no_time = choose("--budget 100ms");
    assert!(
        no_time.iter().all(|line| line["skipped"].as_str().is_some_and(|reason| reason.contains("--budget"))),
        "{no_time:?}"
    );
    roofbench(folder.path(), words("plan --memory 20parsecs")).expect(2, &["--memory", "4GiB"]);
    roofbench(folder.path(), words("plan --memory 2GB --dtype bf16"))
        .expect(2, &["leave --checkpoint, --dtype and --opt out"]);
}

#[cfg(feature = "text")]
fn measurement(folder: &std::path::Path) -> Measurement {
    let record = records(&folder.join("r.jsonl")).remove(0);
    let Outcome::Measured(measurement) = record.outcome else { panic!("{:?}", record.outcome) };
    *measurement
}

#[cfg(feature = "text")]
#[test]
fn a_profile_says_where_the_time_goes() {
    let folder = with_model();
    let flags = format!("run --weights model --threads 1 --cell b1/s128 --output r.jsonl {SHORT}");
    roofbench(folder.path(), words(&format!("{flags} --trace t.json"))).expect(0, &["linear", "attention", OTHER]);
    let measurement = measurement(folder.path());
    assert_eq!(measurement.samples.len(), 3, "the profile's calls are no samples");
    let profile = measurement.profile.unwrap();
    let sum: u64 = profile.operators.iter().map(|one| one.ns).sum();
    assert!(sum <= profile.total_ns && profile.calls > 0, "{sum} of {}", profile.total_ns);
    let layers: Vec<_> =
        profile.operators.iter().filter(|one| one.operator == "linear").map(|one| one.layer.as_deref()).collect();
    assert!(layers.contains(&Some("encoder.layer.0")), "{layers:?}");
    // what the blocks counted is the cost by formula
    let counted: u64 = profile.operators.iter().map(|one| one.cost.flops).sum();
    let formula = measurement.cost[0].cost.flops;
    assert!(counted.abs_diff(formula) as f64 <= 0.05 * formula as f64, "{counted} for {formula}");
    let trace: Value = serde_json::from_slice(&fs::read(folder.path().join("t.json")).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().is_some_and(|events| events.len() > 10), "{trace}");
    roofbench(folder.path(), words("report r.jsonl --html r.html")).expect(0, &[]);
    assert!(fs::read_to_string(folder.path().join("r.html")).unwrap().contains("id=\"profile\""));

    roofbench(folder.path(), words("run --weights model --trace t.json")).expect(2, &["--trace t.json", "of one cell"]);
    roofbench(folder.path(), words("run --weights model --profile --ablate")).expect(2, &["cannot be used"]);
}

#[cfg(feature = "text")]
#[test]
fn a_long_run_shows_what_is_left_of_the_speed() {
    let folder = with_model();
    let flags = format!("run --weights model --threads 1 --cell b1/s128 --output r.jsonl --sustain 2s {SHORT}");
    roofbench(folder.path(), words(&flags)).expect(0, &["in the last quarter", "the speed changed by"]);
    let sustained = measurement(folder.path()).sustained.unwrap();
    assert_eq!(sustained.asked_ns, 2_000_000_000);
    assert!(sustained.windows.len() >= 2 && sustained.windows.iter().all(|w| w.calls > 0 && w.end_ns > w.start_ns));
    let names: Vec<&str> = sustained.sensors.iter().map(|reading| reading.metric.as_str()).collect();
    assert_eq!(names, ["clock", "temperature", "power"]);
    roofbench(folder.path(), words("report r.jsonl --html r.html")).expect(0, &[]);
    assert!(fs::read_to_string(folder.path().join("r.html")).unwrap().contains("id=\"sustained\""));
    roofbench(folder.path(), words("run --weights model --sustain soon")).expect(2, &["--sustain", "20m"]);
}

#[cfg(feature = "text")]
#[test]
fn settings_are_recommended_by_few_trials() {
    let folder = with_model();
    let recommend = |flags: &str| roofbench(folder.path(), words(&format!("recommend bert --weights model {flags}")));
    let ran =
        recommend("--minimize latency --trials 3 --output t.jsonl").expect(0, &["best: roofbench run bert", "tried"]);
    assert!(ran.out.contains("intervals") || ran.out.contains("nothing else"), "{}", ran.out);
    let tried = records(&folder.path().join("t.jsonl"));
    assert!((1..=3).contains(&tried.len()));
    let object = recommend("--minimize unit-time --trials 2 --exact --json").expect(0, &[]).json_lines().remove(0);
    assert!(object["best"].is_array() && object["sure"].is_string(), "{object}");
    let trials = object["trials"].as_array().unwrap();
    assert!(trials.iter().any(|trial| trial["pareto"] == true), "{object}");
    assert!(
        trials.iter().all(|trial| trial["settings"].as_str().is_some_and(|text| text.starts_with("f32"))),
        "{object}"
    );

    let ran = program(folder.path())
        .args(["recommend", "bert", "--weights", "model", "--where", "p50<1us", "--trials", "1"])
        .output();
    support::Ran::from(ran.unwrap()).expect(1, &["no settings that were tried keep all limits"]);
    let ran = program(folder.path()).args(["recommend", "bert", "--where", "speed<3"]).output();
    support::Ran::from(ran.unwrap()).expect(2, &["--where", "no number `speed`", "throughput"]);
    recommend("--cell s9999").expect(2, &["--cell s9999", "no cell matches"]);
    let ran = recommend("--minimize energy --trials 1");
    if ran.code != Some(0) {
        ran.expect(2, &["energy can't be measured on this machine", "--minimize latency"]);
    }
}
