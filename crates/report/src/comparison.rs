//! A comparison for people, for a pull request and for a CI server.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use roofbench_core::compare::{Comparison, Conclusion, Row, Verdict};

use crate::format;
use crate::markdown::{escape, section};
use crate::table::empty_table;

const HEADER: [&str; 8] = ["cell", "base", "new", "processes", "change", "interval", "verdict", "could see"];

/// Times of both sides, the change with its interval, the verdict, and the smallest slow-down that would have been seen;
/// then what can't be compared, and what it comes to.
pub fn comparison_table(comparison: &Comparison) -> String {
    let mut text = String::new();
    if !comparison.rows.is_empty() {
        let mut table = empty_table(&HEADER);
        for row in &comparison.rows {
            table.add_row(fields(row));
        }
        text = format!("{table}\n");
    }
    for line in notes(comparison) {
        text.push_str(&format!("{line}\n"));
    }
    text
}

/// The same for a pull request: the conclusion, cells that changed or may have, and all others folded away.
pub fn comparison_markdown(comparison: &Comparison) -> String {
    let notes: Vec<String> = notes(comparison).iter().map(|note| escape(note)).collect();
    let (conclusion, notes) = notes.split_last().map_or(("", &[][..]), |(last, notes)| (last.as_str(), notes));
    let mut text = format!("**roofbench**: {conclusion}\n");
    let (same, told): (Vec<&Row>, Vec<&Row>) =
        comparison.rows.iter().partition(|row| row.judgement.verdict == Verdict::Same);
    if !told.is_empty() {
        section(&mut text, "Changed, or not certain", &HEADER, told.into_iter().map(|row| fields(row).into()));
    }
    if !notes.is_empty() {
        text.push_str("\n## Notes\n\n");
        notes.iter().for_each(|note| text.push_str(&format!("- {note}\n")));
    }
    if !same.is_empty() {
        text.push_str(&format!("\n<details><summary>{} the same</summary>\n", cells(same.len())));
        section(&mut text, "The same", &HEADER, same.into_iter().map(|row| fields(row).into()));
        text.push_str("\n</details>\n");
    }
    text
}

/// The same as JUnit XML: a case for each cell. Slower is a failure, a cell that the new side owes is an error, and what is
/// undecided, or in the new side alone, is skipped with its reason.
pub fn comparison_junit(comparison: &Comparison) -> String {
    let mut suite = TestSuite::new("roofbench compare");
    let case = |cell: &str, status: TestCaseStatus| {
        let mut case = TestCase::new(cell, status);
        case.set_classname(cell.split('/').next().unwrap_or(cell));
        case
    };
    suite.add_test_cases(comparison.rows.iter().map(|row| {
        let mut status = match row.judgement.verdict {
            Verdict::Slower => TestCaseStatus::non_success(NonSuccessKind::Failure),
            Verdict::Undecided => TestCaseStatus::skipped(),
            Verdict::Same | Verdict::Faster => TestCaseStatus::success(),
        };
        if !matches!(status, TestCaseStatus::Success { .. }) {
            status.set_type(row.judgement.verdict.to_string()).set_message(words(row));
        }
        let mut case = case(&row.cell, status);
        case.set_system_out(words(row));
        case
    }));
    suite.add_test_cases(comparison.apart.iter().map(|apart| {
        let mut status = match apart.owed {
            true => TestCaseStatus::non_success(NonSuccessKind::Error),
            false => TestCaseStatus::skipped(),
        };
        status.set_message(apart.reason.as_str());
        case(&apart.cell, status)
    }));
    let mut report = Report::new("roofbench");
    report.add_test_suite(suite);
    // it is written to memory, from strings that the crate has made valid
    report.to_string().unwrap_or_default()
}

fn fields(row: &Row) -> [String; 8] {
    let judged = &row.judgement;
    [
        row.cell.clone(),
        format::seconds(row.base.median_ns * 1e-9),
        format::seconds(row.new.median_ns * 1e-9),
        format!("{}, {}", row.base.processes, row.new.processes),
        change(judged.ratio),
        format!("{} to {}", change(judged.low), change(judged.high)),
        judged.verdict.to_string(),
        format::percent(judged.smallest),
    ]
}

fn words(row: &Row) -> String {
    let [_, base, new, _, change, interval, verdict, seen] = fields(row);
    let certainty = 100.0 * row.judgement.confidence;
    format!("{verdict}: {base} to {new}, {change} ({interval} with {certainty:.2} % certainty); could see {seen}")
}

/// A ratio of times as a change: `+5.2 %`.
fn change(ratio: f64) -> String {
    format!("{:+.1} %", 100.0 * (ratio - 1.0))
}

fn cells(n: usize) -> String {
    format!("{n} cell{}", if n == 1 { "" } else { "s" })
}

/// What can't be compared, what was assumed, and last the conclusion.
fn notes(comparison: &Comparison) -> Vec<String> {
    let rules = &comparison.rules;
    let mut notes: Vec<String> =
        comparison.apart.iter().map(|apart| format!("{}: not compared: {}", apart.cell, apart.reason)).collect();
    let assumed = comparison.rows.iter().filter(|row| row.judgement.assumed).count();
    if assumed > 0 {
        notes.push(format!(
            "{}: too few processes to tell how they differ, so a standard deviation of {} was assumed; `roofbench run \
             --repeat 5` measures it, and sees smaller changes",
            cells(assumed),
            format::percent(rules.process_noise)
        ));
    }
    let count = |verdict| comparison.rows.iter().filter(|row| row.judgement.verdict == verdict).count();
    let owed = comparison.apart.iter().filter(|apart| apart.owed).count();
    let counts = [Verdict::Slower, Verdict::Faster, Verdict::Same, Verdict::Undecided];
    let mut counts: Vec<String> = counts
        .into_iter()
        .map(|verdict| (verdict, count(verdict)))
        .filter(|(_, count)| *count > 0)
        .map(|(verdict, count)| format!("{count} {verdict}"))
        .collect();
    counts.extend((owed > 0).then(|| format!("{owed} of the base not compared")));
    counts.extend(counts.is_empty().then(|| "nothing could be compared".to_owned()));
    let conclusion = match comparison.conclusion() {
        Conclusion::Passed => "no slow-down",
        Conclusion::Slower => "SLOWER",
        Conclusion::Undecided => "UNDECIDED",
    };
    notes.push(format!(
        "{conclusion}: {} (changes within {} are the same; chance of a false alarm in the whole comparison: {})",
        counts.join(", "),
        format::percent(rules.margin),
        format::percent(rules.false_alarms)
    ));
    notes
}

#[cfg(test)]
mod tests {
    use roofbench_core::compare::{Apart, Rules, compare};

    use super::*;
    use crate::samples;

    /// bert the same, vit slower by a tenth, each in three processes; a cell that failed and one that is new.
    fn comparison() -> Comparison {
        let mut base = Vec::new();
        let mut new = Vec::new();
        for _ in 0..3 {
            base.extend([samples::bert(10), samples::vit(10)]);
            let mut slower = samples::vit(10);
            if let roofbench_core::record::Outcome::Measured(measurement) = &mut slower.outcome {
                measurement.samples.iter_mut().for_each(|sample| sample.total_ns += 4_000_000);
            }
            new.extend([samples::bert(10), slower]);
        }
        let mut comparison = compare(&base, &new, Rules::default());
        let apart = |cell: &str, reason: &str, owed| Apart { cell: cell.into(), reason: reason.into(), owed };
        comparison.apart = vec![
            apart("t5/generate", "the new one failed: <no & memory>", true),
            apart("gpt2/x", "not in the base", false),
        ];
        comparison
    }

    #[test]
    fn a_table_with_its_conclusion_last() {
        let text = comparison_table(&comparison());
        for expected in
            ["40.0 ms", "44.0 ms", "+10.0 %", "slower", "same", "t5/generate: not compared: the new one failed"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        let last = text.lines().last().unwrap();
        assert!(last.starts_with("SLOWER: 1 slower, 1 same, 1 of the base not compared"), "{last}");
        assert!(!text.contains("assumed"), "{text}");
        let alone = comparison_table(&compare(&[samples::bert(10)], &[samples::bert(10)], Rules::default()));
        assert!(alone.contains("--repeat 5") && alone.contains("UNDECIDED: 1 undecided"), "{alone}");
        assert!(comparison_table(&compare(&[], &[], Rules::default())).starts_with("UNDECIDED: nothing could be"));
    }

    #[test]
    fn markdown_folds_what_stayed_the_same() {
        let text = comparison_markdown(&comparison());
        assert!(text.starts_with("**roofbench**: SLOWER: 1 slower"), "{text}");
        let (open, folded) = text.split_once("<details>").unwrap();
        assert!(open.contains("| vit/forward/b1 |") && folded.contains("| bert/forward/b1/s128 |"), "{text}");
        assert!(open.contains("&lt;no &amp; memory&gt;"), "{text}");
    }

    #[test]
    fn junit_counts_what_a_server_shows() {
        let text = comparison_junit(&comparison());
        for expected in [
            r#"tests="4" skipped="1" errors="1" failures="1""#,
            r#"<testcase name="vit/forward/b1" classname="vit">"#,
            r#"type="slower""#,
            "&lt;no &amp; memory&gt;",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }
}
