//! CSV in long form: one line per number, for spreadsheets and data frames (RFC 4180).

use roofbench_core::meters::Quantity;
use roofbench_core::metrics;
use roofbench_core::record::{Outcome, Record};
use roofbench_core::session::Phase;

const HEADER: &str = "started_at,family,cell,checkpoint,class,engine,device,dtype,threads,status,metric,phase,statistic,\
                      value,unit,provenance,note\r\n";

/// Every number of every record, the earlier ones of a cell too. What has no number has an empty `value` and says why in
/// `note`.
pub fn csv(records: &[Record]) -> String {
    let mut text = HEADER.to_owned();
    for record in records {
        let subject = &record.subject;
        let settings = &record.settings;
        let threads = settings.threads().map(|threads| threads.to_string()).unwrap_or_default();
        let identity = [
            &record.started_at,
            &subject.family,
            &subject.cell.name,
            &subject.checkpoint,
            &subject.class,
            subject.engine.name(),
            settings.device().unwrap_or_default(),
            settings.dtype().unwrap_or_default(),
            &threads,
        ];
        let mut line = |rest: [&str; 8]| {
            let fields: Vec<String> = identity.iter().copied().chain(rest).map(field).collect();
            text.push_str(&fields.join(","));
            text.push_str("\r\n");
        };
        match (&record.outcome, metrics::derive(record)) {
            (Outcome::Measured(_), Some(derived)) => {
                for value in derived.values() {
                    let (provenance, note) = match &value.quantity {
                        Quantity::Measured { .. } => ("measured", ""),
                        Quantity::Derived { from, .. } => ("derived", from.as_str()),
                        Quantity::Estimated { method, .. } => ("estimated", method.as_str()),
                        Quantity::Unavailable { reason } => ("unavailable", reason.as_str()),
                    };
                    line([
                        "measured",
                        value.metric,
                        value.phase.map(Phase::name).unwrap_or_default(),
                        value.statistic.as_deref().unwrap_or_default(),
                        &value.quantity.value().map(|value| value.to_string()).unwrap_or_default(),
                        &value.unit,
                        provenance,
                        note,
                    ]);
                }
            }
            (Outcome::Measured(_), None) => line(["failed", "", "", "", "", "", "", "the record holds no samples"]),
            (Outcome::Skipped { reason }, _) => line(["skipped", "", "", "", "", "", "", reason]),
            (Outcome::Failed { error }, _) => line(["failed", "", "", "", "", "", "", error]),
        }
    }
    text
}

/// Quoted where needed; text that a spreadsheet would run as a formula gets an apostrophe before it.
fn field(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']) && text.parse::<f64>().is_err();
    let text = if formula { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn one_line_per_number_with_unit_and_provenance() {
        let text = csv(&[samples::bert(10)]);
        let line = |wanted: &str| text.lines().find(|line| line.contains(wanted)).unwrap_or_else(|| panic!("{text}"));
        let identity = "2026-01-01T00:00:00Z,bert,forward/b1/s128,google-bert/bert-base-uncased,BertForMaskedLM,roofbench,\
                        cpu,f32,2,measured,";
        assert_eq!(line(",latency,,p50,"), format!("{identity}latency,,p50,0.04,s,derived,10 raw samples"));
        assert!(line(",peak_rss,").ends_with("peak_rss,,,536870912,B,measured,"));
        assert!(line(",energy_per_unit,").contains(",none,,J/sequences,unavailable,"));
        let columns = text.lines().next().unwrap().split(',').count();
        assert_eq!(line(",mfu,").split(',').count(), columns);
    }

    #[test]
    fn hostile_and_empty_input() {
        let text = csv(&[samples::hostile()]);
        assert!(text.contains("\"<script>alert(\"\"1\"\")</script>,\n|"), "{text}");
        assert_eq!(field("=cmd()"), "'=cmd()");
        assert_eq!(field("-1.5"), "-1.5");
        assert_eq!(csv(&[]), HEADER);
    }
}
