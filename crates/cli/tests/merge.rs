//! `roofbench merge` on made-up records.

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{made_up, records, roofbench, words, write_records};
use tempfile::tempdir;

#[test]
fn shards_become_one_file() {
    let folder = tempdir().unwrap();
    let at = |cell: &str, minute: u32| {
        let mut record = made_up(cell, 40_000_000);
        record["started_at"] = format!("2026-01-01T00:{minute:02}:00Z").into();
        record
    };
    let [first, second, third] = [at("bert/forward/b1", 1), at("vit/forward/b1", 2), at("sam/forward/b1", 3)];
    let path = |name: &str| folder.path().join(name);
    write_records(&path("one.jsonl"), &[third.clone(), first.clone()]);
    write_records(&path("two.jsonl"), &[second.clone(), first.clone()]);
    // the node went down while it wrote
    let torn = fs::read_to_string(path("two.jsonl")).unwrap() + "{\"schema_version\": 1, \"start";
    fs::write(path("two.jsonl"), torn).unwrap();
    let ran = roofbench(folder.path(), words("merge one.jsonl two.jsonl --output all.jsonl"));
    ran.expect(0, &["two.jsonl: line 3: truncated", "3 records of 1 machine in all.jsonl, 1 there already"]);
    let lines = fs::read_to_string(path("all.jsonl")).unwrap();
    assert_eq!(lines, [first, second, third].map(|record| format!("{record}\n")).concat(), "by time, as they were");
    // joined again, even with itself, it stays as it is
    roofbench(folder.path(), words("merge all.jsonl one.jsonl -o all.jsonl")).expect(0, &["2 there already"]);
    assert_eq!(fs::read_to_string(path("all.jsonl")).unwrap(), lines);
    roofbench(folder.path(), words("report all.jsonl")).expect(0, &["sam/forward/b1"]);
}

#[test]
fn replicates_stay_and_contradictions_are_named() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // two short processes of a cell in the same second are no contradiction
    let replicates = [made_up("bert/forward/b1", 1_000_000), made_up("bert/forward/b1", 1_001_000)];
    write_records(&path("one.jsonl"), &replicates);
    roofbench(folder.path(), words("merge one.jsonl -o all.jsonl")).expect(0, &["2 records"]);

    let mut other = made_up("bert/forward/b1", 1_500_000);
    other["build"]["commit"] = "fedcba987654".into();
    let mut elsewhere = made_up("bert/forward/b1", 1_500_000);
    elsewhere["machine"]["cpu"]["model"] = "Another CPU".into();
    write_records(&path("two.jsonl"), &[other, elsewhere]);
    let ran = roofbench(folder.path(), words("merge one.jsonl two.jsonl -o all.jsonl"));
    ran.expect(
        1,
        &[
            "conflict: bert/forward/b1 of 2026-01-01T00:00:00Z on Testing CPU",
            "one.jsonl and two.jsonl differ",
            "different builds: 0123456789ab, fedcba987654",
            "4 records of 2 machines",
        ],
    );
    assert_eq!(records(&path("all.jsonl")).len(), 4);
}

#[test]
fn what_cannot_be_joined_is_named() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("empty.jsonl"), "\n").unwrap();
    write_records(&folder.path().join("newer.jsonl"), &[json!({"schema_version": 99})]);
    let record: Value = made_up("bert/forward/b1", 1);
    write_records(&folder.path().join("good.jsonl"), &[record]);
    for (line, said) in [
        ("merge nowhere.jsonl -o all.jsonl", "nowhere.jsonl"),
        ("merge empty.jsonl newer.jsonl -o all.jsonl", "no record in empty.jsonl, newer.jsonl"),
        ("merge good.jsonl", "--output"),
        ("merge good.jsonl -o no/such/folder.jsonl", "no/such/folder.jsonl"),
        ("merge good.jsonl -o ..", "names no file"),
    ] {
        roofbench(folder.path(), words(line)).expect(2, &[said]);
    }
    assert!(!folder.path().join("all.jsonl").exists());
}
