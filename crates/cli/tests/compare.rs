//! `roofbench compare` on made-up records, where the truth is known, and `run --against` with the program itself.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{bert_config, bert_tensors, checkpoint, made_up, records, roofbench, words, write_records};
use tempfile::{TempDir, tempdir};

/// Medians of three processes of each of two cells, as `(bert, vit)`.
fn side(folder: &Path, name: &str, medians: [(u64, u64); 3]) {
    let cells =
        medians.iter().flat_map(|&(bert, vit)| [made_up("bert/forward/b1", bert), made_up("vit/forward/b1", vit)]);
    write_records(&folder.join(name), &cells.collect::<Vec<_>>());
}

/// A folder with `base.jsonl`: bert takes 40 ms, vit 80 ms, each give or take 0.2 %.
fn with_base() -> TempDir {
    let folder = tempdir().unwrap();
    side(folder.path(), "base.jsonl", [(40_000_000, 80_000_000), (40_080_000, 79_840_000), (39_920_000, 80_160_000)]);
    folder
}

fn compare(folder: &Path, flags: &str) -> support::Ran {
    roofbench(folder, words(&format!("compare base.jsonl new.jsonl {flags}")))
}

#[test]
fn a_verdict_for_each_cell_and_an_exit_status_for_all() {
    let folder = with_base();
    let verdicts = |new: [(u64, u64); 3], code: i32| -> Vec<String> {
        side(folder.path(), "new.jsonl", new);
        let line = compare(folder.path(), "--json").expect(code, &[]).json_lines().remove(0);
        line["rows"].as_array().unwrap().iter().map(|row| row["verdict"].as_str().unwrap().to_owned()).collect()
    };
    let same = [(40_000_000, 80_000_000), (40_040_000, 79_900_000), (39_960_000, 80_100_000)];
    assert_eq!(verdicts(same, 0), ["same", "same"]);
    let faster = same.map(|(bert, vit)| (bert * 9 / 10, vit));
    assert_eq!(verdicts(faster, 0), ["faster", "same"]);
    let slower = same.map(|(bert, vit)| (bert, vit * 11 / 10));
    assert_eq!(verdicts(slower, 1), ["same", "slower"]);
    let wild = [(30_000_000, 80_000_000), (40_000_000, 80_000_000), (50_000_000, 80_000_000)];
    assert_eq!(verdicts(wild, 2), ["undecided", "same"]);
    // certain slow-downs outweigh what is not certain
    let both = wild.map(|(bert, vit)| (bert, vit * 2));
    assert_eq!(verdicts(both, 1), ["undecided", "slower"]);
}

#[test]
fn the_numbers_are_those_of_the_records() {
    let folder = with_base();
    side(folder.path(), "new.jsonl", [(42_000_000, 80_000_000), (42_084_000, 79_840_000), (41_916_000, 80_160_000)]);
    let line = compare(folder.path(), "--run-noise 0 --json").expect(1, &[]).json_lines().remove(0);
    let row = &line["rows"][0];
    let number = |key: &str| row[key].as_f64().unwrap();
    assert!((number("ratio") - 1.05).abs() < 1e-6, "{row}");
    // s = 0.2 %, error s·√(2/3), two cells at 1 %: t(0.9975, 4) = 5.598
    let reach = 5.598 * 0.002 * (2.0f64 / 3.0).sqrt();
    assert!((number("low").ln() - (1.05f64.ln() - reach)).abs() < 1e-4, "{row}");
    assert!((number("high").ln() - (1.05f64.ln() + reach)).abs() < 1e-4, "{row}");
    assert_eq!(row["base"]["processes"], 3);
    // a wider margin lets it pass, a wilder one does not
    compare(folder.path(), "--run-noise 0 --margin 7").expect(0, &["+5.0 %", "same", "no slow-down: 2 same"]);
    compare(folder.path(), "--run-noise 0 --margin 5").expect(1, &["SLOWER: 1 slower, 1 same"]);
    // what recordings differ by is on top: error √(s²·2/3 + 2·(2 %)²)
    compare(folder.path(), "--run-noise 2").expect(2, &["UNDECIDED: 1 same, 1 undecided"]);
}

#[test]
fn single_processes_are_not_trusted_with_small_changes() {
    let folder = tempdir().unwrap();
    write_records(&folder.path().join("base.jsonl"), &[made_up("bert/forward/b1", 40_000_000)]);
    let new = |ns: u64| write_records(&folder.path().join("new.jsonl"), &[made_up("bert/forward/b1", ns)]);
    new(42_000_000);
    compare(folder.path(), "").expect(2, &["undecided", "2.0 % was assumed", "--repeat 5"]);
    compare(folder.path(), "--process-noise 0.5 --run-noise 0.5").expect(1, &["slower"]);
    new(46_000_000);
    compare(folder.path(), "").expect(1, &["slower", "+15.0 %"]);
}

#[test]
fn what_is_not_compared_is_named() {
    let folder = tempdir().unwrap();
    let [same, failed, moved, gone] =
        ["bert/forward/b1", "t5/forward/b1", "vit/forward/b1", "sam/forward/b1"].map(|cell| made_up(cell, 40_000_000));
    let base = [&same, &same, &same, &failed, &moved, &gone].map(Value::clone);
    write_records(&folder.path().join("base.jsonl"), &base);
    let (mut now_failed, mut now_moved, mut other_engine) = (failed, moved.clone(), moved);
    now_failed["outcome"] = json!({"status": "failed", "error": "the kernel is gone"});
    now_moved["machine"]["cpu"]["model"] = "Another CPU".into();
    other_engine["subject"]["engine"] = "candle-transformers".into();
    let added = made_up("clip/forward/b1", 1_000_000);
    write_records(
        &folder.path().join("new.jsonl"),
        &[same.clone(), same.clone(), same, now_failed.clone(), now_moved, added],
    );
    compare(folder.path(), "--junit out.xml").expect(
        2,
        &[
            "t5/forward/b1: not compared: the new one failed: the kernel is gone",
            "vit/forward/b1: not compared: measured otherwise: machine Testing CPU",
            "Another CPU",
            "sam/forward/b1: not compared: not in the new records",
            "clip/forward/b1: not compared: not in the base",
            "UNDECIDED: 1 same, 3 of the base not compared",
        ],
    );
    let xml = fs::read_to_string(folder.path().join("out.xml")).unwrap();
    for expected in ["tests=\"5\"", "errors=\"3\"", "failures=\"0\"", "skipped=\"1\"", "the kernel is gone"] {
        assert!(xml.contains(expected), "{expected} is not in {xml}");
    }
    write_records(&folder.path().join("new.jsonl"), &[other_engine]);
    compare(folder.path(), "").expect(2, &["engine roofbench and candle-transformers", "4 of the base not compared"]);
}

#[test]
fn markdown_is_for_a_pull_request() {
    let folder = with_base();
    side(folder.path(), "new.jsonl", [(44_000_000, 80_000_000), (44_080_000, 79_840_000), (43_920_000, 80_160_000)]);
    let ran = compare(folder.path(), "--markdown").expect(1, &["| bert/forward/b1 | 40.0 ms | 44.0 ms |", "<details>"]);
    assert!(ran.out.starts_with("**roofbench**: SLOWER: 1 slower, 1 same"), "{}", ran.out);
}

#[test]
fn what_cannot_be_started_is_told_apart_from_undecided() {
    let folder = with_base();
    fs::write(folder.path().join("empty.jsonl"), "").unwrap();
    let cases = [
        ("compare base.jsonl", "NEW"),
        ("compare base.jsonl nowhere.jsonl", "nowhere.jsonl"),
        ("compare base.jsonl empty.jsonl", "no record in empty.jsonl"),
        ("compare base.jsonl base.jsonl --margin x", "--margin"),
        ("compare base.jsonl base.jsonl --markdown --json", "cannot be used with"),
        ("compare base.jsonl base.jsonl --junit no/such/folder.xml", "no/such/folder.xml"),
        ("-v compare nowhere.jsonl base.jsonl", "nowhere.jsonl"),
        ("run bert --against nowhere", "--against nowhere"),
        ("run bert --against nowhere --output r.jsonl", "--output"),
        ("run brt --against nowhere", "no family `brt`"),
    ];
    for (line, said) in cases {
        roofbench(folder.path(), words(line)).expect(64, &[said]);
    }
    roofbench(folder.path(), words("compare --help")).expect(0, &["Examples:", "64"]);
    roofbench(folder.path(), words("report compare")).expect(2, &["compare"]);
}

#[test]
fn damaged_lines_are_told_and_the_others_compared() {
    let folder = with_base();
    let base = fs::read_to_string(folder.path().join("base.jsonl")).unwrap();
    fs::write(folder.path().join("new.jsonl"), format!("{base}{}", &base[..100])).unwrap();
    compare(folder.path(), "").expect(0, &["new.jsonl: line 7: truncated", "no slow-down: 2 same"]);
}

/// A folder with a tiny checkpoint in `model`.
fn with_model() -> TempDir {
    let folder = tempdir().unwrap();
    checkpoint(&folder.path().join("model"), &bert_config(), &bert_tensors());
    folder
}

const TINY: &str = "run --weights model --cell forward/b1/s128 --threads 1 --quick --min-time 0 --max-samples 20";

#[test]
fn repeated_runs_are_processes_of_a_cell() {
    let folder = with_model();
    let run = format!("{TINY} --repeat 3 --slow-down 90");
    roofbench(folder.path(), words(&format!("{TINY} --repeat 3 --output base.jsonl")))
        .expect(0, &["[3/3]", "3 records"]);
    roofbench(folder.path(), words(&format!("{run} --output new.jsonl"))).expect(0, &["3 records"]);
    let kept = records(&folder.path().join("new.jsonl"));
    assert!(kept.iter().all(|record| record.settings.effective["slow-down"] == "90 %, planted"));
    let row = compare(folder.path(), "--json").json_lines().remove(0)["rows"][0].clone();
    assert_eq!((&row["base"]["processes"], &row["new"]["processes"]), (&json!(3), &json!(3)));
    assert!(row["ratio"].as_f64().unwrap() > 1.0, "nearly twice the time: {row}");
}

#[test]
fn this_build_is_compared_with_another() {
    let folder = with_model();
    let program = env!("CARGO_BIN_EXE_roofbench");
    let against = |flags: &str| {
        let mut line: Vec<&str> = words(TINY);
        line.extend(words(flags));
        roofbench(folder.path(), line.into_iter().chain(["--against", program]))
    };
    let ran = against("--repeat 3 --slow-down 90 --json");
    let row = ran.json_lines().remove(0)["rows"][0].clone();
    assert_eq!((&row["cell"], &row["base"]["processes"]), (&json!("bert/forward/b1/s128"), &json!(3)));
    let number = |key: &str| row[key].as_f64().unwrap();
    assert!(number("low") <= number("ratio") && number("ratio") <= number("high") && number("ratio") > 1.0, "{row}");
    let expected = match row["verdict"].as_str().unwrap() {
        "slower" => 1,
        "undecided" => 2,
        other => panic!("{other}: {row}"),
    };
    assert_eq!(ran.code, Some(expected));
    assert!(!folder.path().join("roofbench-results").exists(), "a comparison keeps no records");
}

#[cfg(unix)]
#[test]
fn another_program_that_fails_leaves_it_undecided() {
    let folder = with_model();
    let line = format!("{TINY} --against /bin/false");
    roofbench(folder.path(), words(&line)).expect(2, &["the other build", "UNDECIDED: 1 of the base not compared"]);
}

/// A checkout of its own, with a stand-in for cargo that "builds" the program under test.
#[cfg(unix)]
#[test]
fn a_commit_is_checked_out_and_built_once() {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    let folder = with_model();
    let path = |name: &str| folder.path().join(name);
    let git = |arguments: &str| {
        let output = Command::new("git").current_dir(folder.path()).args(words(arguments)).output().unwrap();
        assert!(output.status.success(), "git {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    fs::create_dir_all(path("crates/cli")).unwrap();
    fs::write(path("crates/cli/Cargo.toml"), "").unwrap();
    git("init --quiet --initial-branch main");
    git("add crates");
    git("-c user.name=tester -c user.email=tester@example.org commit --quiet --message first");
    let commit = git("rev-parse HEAD");
    let script = "#!/bin/sh\nset -e\necho \"$@\" >> \"$LOG\"\ntest -f crates/cli/Cargo.toml\nmkdir -p \"$CARGO_TARGET_DIR/release\"\n\
                  printf '#!/bin/sh\\nexec \"%s\" \"$@\"\\n' \"$PROGRAM\" > \"$CARGO_TARGET_DIR/release/roofbench\"\n\
                  chmod +x \"$CARGO_TARGET_DIR/release/roofbench\"\n";
    fs::write(path("cargo"), script).unwrap();
    fs::set_permissions(path("cargo"), fs::Permissions::from_mode(0o755)).unwrap();
    let against = |what: &str| {
        let mut command = support::program(folder.path());
        command.args(words(TINY)).args(["--repeat", "2", "--against", what, "--json"]);
        command.env("CARGO", path("cargo")).env("CARGO_TARGET_DIR", path("target")).env("LOG", path("log"));
        support::Ran::from(command.env("PROGRAM", env!("CARGO_BIN_EXE_roofbench")).output().unwrap())
    };
    for _ in 0..2 {
        let comparison = against("main").json_lines().remove(0);
        assert_eq!(comparison["rows"][0]["base"]["processes"], 2, "{comparison}");
    }
    let log = fs::read_to_string(path("log")).unwrap();
    assert!(log.lines().count() == 1 && log.contains("build --release --locked"), "{log}");
    assert!(path("target/against").join(commit.trim()).join("roofbench").is_file());
    assert_eq!(git("worktree list").lines().count(), 1, "what was checked out is gone");
    against("no-such-branch").expect(64, &["--against no-such-branch", "neither a file nor a commit"]);
    fs::write(path("cargo"), "#!/bin/sh\nexit 1\n").unwrap();
    git("-c user.name=tester -c user.email=tester@example.org commit --quiet --allow-empty --message second");
    against("main").expect(64, &["it does not build"]);
    assert_eq!(git("worktree list").lines().count(), 1);
}
