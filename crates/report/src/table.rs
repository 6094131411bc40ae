//! The table for a terminal.

use comfy_table::{ContentArrangement, Table, presets};
use roofbench_core::record::Record;

use crate::format::NONE;
use crate::row::{PhaseRow, Row, Rows};

/// Columns that a terminal must have for a table to be fitted into it.
const NARROWEST: u16 = 60;

/// An empty table in the style of all of ours, fitted to the terminal if there is one.
pub fn empty_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    // Some pseudo-terminals say that they are 0 wide; a table squeezed into little is no table.
    if table.width().is_some_and(|width| width >= NARROWEST) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(header);
    table
}

/// Cells with latency (p50 and its 95 % interval), throughput, peak memory, energy, and each phase under the roofline, with
/// its time where a cell has phases for its components; then why numbers are missing, and warnings.
pub fn table(records: &[Record]) -> String {
    if records.is_empty() {
        return "no records\n".to_owned();
    }
    let rows = Rows::of(records);
    let measured_energy = rows.rows.iter().any(|row| row.energy() != NONE);
    let mut header = vec!["cell", "latency p50", "throughput", "peak memory"];
    if measured_energy {
        header.push("energy/unit");
    }
    let with_components = rows.rows.iter().any(Row::has_components);
    header.push("phase");
    if with_components {
        header.extend(["time", "share"]);
    }
    header.extend(["FLOP/s", "% of roofline", "bound"]);
    let mut table = empty_table(&header);
    for row in &rows.rows {
        let phases = row.phases();
        let column = |show: fn(&PhaseRow) -> String| phases.iter().map(show).collect::<Vec<_>>().join("\n");
        let mut line = vec![row.label.clone(), row.latency(), row.throughput(), row.memory()];
        if measured_energy {
            line.push(row.energy());
        }
        line.push(column(|phase| phase.phase.to_owned()));
        if with_components {
            line.extend([column(|phase| phase.time.clone()), column(|phase| phase.share.clone())]);
        }
        line.extend([
            column(|phase| phase.flops.clone()),
            column(|phase| phase.attained.clone()),
            column(|phase| phase.bound.clone()),
        ]);
        table.add_row(line);
    }
    let mut text = format!("{table}\n");
    let mut note = |line: String| text.push_str(&format!("{line}\n"));
    if !rows.common.is_empty() {
        note(format!("settings: {}", rows.common));
    }
    for row in &rows.rows {
        if let Some((state, reason)) = row.not_measured() {
            note(format!("{}: {state}: {reason}", row.label));
        }
    }
    rows.notes().into_iter().for_each(note);
    text
}

#[cfg(test)]
mod tests {
    use roofbench_core::record::Outcome;

    use super::*;
    use crate::samples;

    #[test]
    fn measured_cells_show_their_numbers() {
        let text = table(&[samples::bert(10), samples::llama()]);
        for expected in
            ["bert/forward/b1/s128", "40.0 ms ±0.00 %", "25.0 sequences/s", "512 MiB", "50 %", "compute-bound"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(text.contains("prefill") && text.contains("decode") && text.contains("memory-bound"), "{text}");
        assert!(text.contains("warning (load)"), "{text}");
    }

    #[test]
    fn components_show_where_the_time_goes() {
        assert!(!table(&[samples::llama()]).contains("share"));
        let text = table(&[samples::llava()]);
        for expected in ["vision", "25.0 ms", "14 %", "projector", "prefill", "share"] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn what_was_not_measured_says_why() {
        let mut record = samples::bert(10);
        record.outcome = Outcome::Skipped { reason: "would need 40 GB".into() };
        let text = table(&[record]);
        assert!(text.contains("skipped: would need 40 GB"), "{text}");
        assert_eq!(table(&[]), "no records\n");
    }
}
