//! Coverage: one row per family, measured or not and why.

use roofbench_core::record::{Outcome, Record};
use serde::Serialize;

use crate::row::latest;

/// What came of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// At least one cell was measured.
    Measured,
    /// No cell was measured, and at least one failed.
    Failed,
    /// All cells were skipped.
    Skipped,
    /// No record.
    NotRun,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Measured => "measured",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::NotRun => "not run",
        })
    }
}

/// A family in the coverage table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CoverageRow {
    /// Family.
    pub family: String,
    /// What came of it.
    pub state: State,
    /// Cells measured.
    pub measured: usize,
    /// Cells that there is a record of.
    pub cells: usize,
    /// Why cells are missing: `forward/b8: needs 40 GB`; each reason once.
    pub reasons: Vec<String>,
}

impl CoverageRow {
    /// `3 of 3 cells`, and the reasons.
    pub fn detail(&self) -> String {
        let count = (self.cells > 0).then(|| format!("{} of {} cells", self.measured, self.cells));
        let parts: Vec<&str> = count.iter().chain(&self.reasons).map(String::as_str).collect();
        parts.join("; ")
    }
}

/// A row for each of `families` in their order, then for families that only records know. The latest record of a cell
/// counts.
pub fn coverage(records: &[Record], families: &[&str]) -> Vec<CoverageRow> {
    let latest = latest(records);
    let mut names: Vec<&str> = Vec::new();
    for name in families.iter().copied().chain(latest.iter().map(|record| record.subject.family.as_str())) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let row = |family: &str| {
        let mut row =
            CoverageRow { family: family.to_owned(), state: State::NotRun, measured: 0, cells: 0, reasons: Vec::new() };
        let mut failed = false;
        for record in latest.iter().filter(|record| record.subject.family == family) {
            row.cells += 1;
            let reason = match &record.outcome {
                Outcome::Measured(measurement) if !measurement.samples.is_empty() => {
                    row.measured += 1;
                    continue;
                }
                Outcome::Measured(_) => "no samples",
                Outcome::Skipped { reason } => reason,
                Outcome::Failed { error } => error,
            };
            failed |= !matches!(record.outcome, Outcome::Skipped { .. });
            if !row.reasons.iter().any(|known| known.ends_with(reason)) {
                row.reasons.push(format!("{}: {reason}", record.subject.cell.name));
            }
        }
        row.state = match (row.measured, failed, row.cells) {
            (1.., _, _) => State::Measured,
            (0, true, _) => State::Failed,
            (0, false, 1..) => State::Skipped,
            (0, false, 0) => State::NotRun,
        };
        row
    };
    names.into_iter().map(row).collect()
}

/// The coverage table for a terminal.
pub fn coverage_table(rows: &[CoverageRow]) -> String {
    let mut table = crate::table::empty_table(&["family", "state", "cells"]);
    for row in rows {
        table.add_row([row.family.clone(), row.state.to_string(), row.detail()]);
    }
    let measured = rows.iter().filter(|row| row.state == State::Measured).count();
    format!("{table}\n{measured} of {} families measured\n", rows.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn every_family_has_a_row_with_its_state_and_reason() {
        let mut skipped = samples::vit(10);
        skipped.outcome = Outcome::Skipped { reason: "needs 40 GB, 24 GB are free".into() };
        let mut failed = samples::vit(10);
        failed.subject.family = "swin".into();
        failed.outcome = Outcome::Failed { error: "tensor `x` is missing".into() };
        let mut also_failed = samples::bert(10);
        also_failed.subject.cell.name = "forward/b8/s128".into();
        also_failed.outcome = Outcome::Failed { error: "out of memory".into() };
        let records = [samples::bert(10), also_failed, skipped, failed];
        let rows = coverage(&records, &["vit", "bert", "llama"]);
        let seen: Vec<(&str, State)> = rows.iter().map(|row| (row.family.as_str(), row.state)).collect();
        let expected =
            [("vit", State::Skipped), ("bert", State::Measured), ("llama", State::NotRun), ("swin", State::Failed)];
        assert_eq!(seen, expected);
        assert_eq!(rows[1].detail(), "1 of 2 cells; forward/b8/s128: out of memory");
        assert!(rows[0].detail().contains("needs 40 GB"));
        let text = coverage_table(&rows);
        assert!(text.contains("1 of 4 families measured") && text.contains("not run"), "{text}");
    }

    #[test]
    fn a_rerun_that_succeeds_replaces_the_failure() {
        let mut failed = samples::bert(10);
        failed.outcome = Outcome::Failed { error: "killed".into() };
        let rows = coverage(&[failed, samples::bert(10)], &[]);
        assert_eq!((rows[0].state, rows[0].cells, rows[0].reasons.len()), (State::Measured, 1, 0));
    }
}
