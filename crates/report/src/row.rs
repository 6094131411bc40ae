//! A record beside what follows from it, and the words that every table shares.

use std::collections::BTreeMap;

use roofbench_core::meters::Quantity;
use roofbench_core::metrics::{self, Derived};
use roofbench_core::optimize::DecidedBy;
use roofbench_core::record::{Outcome, Record};

use crate::format::{self, NONE};

/// The latest record of every cell ([`Record::identity`]), in the order of their first appearance.
pub fn latest(records: &[Record]) -> Vec<&Record> {
    let mut places = BTreeMap::new();
    let mut latest: Vec<&Record> = Vec::new();
    for record in records {
        let place = *places.entry(record.identity()).or_insert(latest.len());
        match latest.get_mut(place) {
            Some(slot) => *slot = record,
            None => latest.push(record),
        }
    }
    latest
}

/// A record with its derived numbers.
pub(crate) struct Row<'a> {
    pub(crate) record: &'a Record,
    pub(crate) derived: Option<Derived>,
    /// `bert/forward/b1/s128`, with the settings that set it apart from other rows.
    pub(crate) label: String,
}

/// The rows of a report.
pub(crate) struct Rows<'a> {
    /// The latest record of every cell.
    pub(crate) rows: Vec<Row<'a>>,
    /// Settings that are the same in all rows, and so not in their labels: `f32, 2 threads`.
    pub(crate) common: String,
    /// Records that are left out, because a later one of the same cell is there.
    pub(crate) earlier: usize,
}

/// The settings that a reader looks for first, of one record: engine, type, threads, device.
fn settings(record: &Record) -> [Option<String>; 4] {
    let settings = &record.settings;
    let engine = record.subject.engine.name();
    let threads = settings.threads().map(|n| format!("{n} thread{}", if n == 1 { "" } else { "s" }));
    // with the form of the weights, and what a user chose
    let choices = settings.optimizations.remarkable().into_iter().map(|switch| format!(" {switch}"));
    let dtype = settings.dtype().map(|dtype| choices.fold(dtype.to_owned(), |all, choice| all + &choice));
    [Some(engine.to_owned()), dtype, threads, settings.device().map(str::to_owned)]
}

impl<'a> Rows<'a> {
    pub(crate) fn of(records: &'a [Record]) -> Self {
        let latest = latest(records);
        // what was not measured may not say its settings, and then sets nothing apart
        let varies = [0, 1, 2, 3].map(|place| {
            let mut values = latest.iter().filter_map(|record| settings(record)[place].clone());
            let first = values.next();
            values.any(|value| Some(value) != first)
        });
        let chosen = |record: &Record, varying: bool| {
            let parts = settings(record).into_iter().zip(varies).filter(|(_, varies)| *varies == varying);
            parts.filter_map(|(part, _)| part).collect::<Vec<_>>().join(", ")
        };
        let label = |record: &Record| match chosen(record, true) {
            apart if apart.is_empty() => record.subject.label(),
            apart => format!("{} ({apart})", record.subject.label()),
        };
        let fullest = latest.iter().max_by_key(|record| settings(record).iter().flatten().count());
        Self {
            common: fullest.map(|record| chosen(record, false)).unwrap_or_default(),
            earlier: records.len() - latest.len(),
            rows: latest
                .into_iter()
                .map(|record| Row { record, derived: metrics::derive(record), label: label(record) })
                .collect(),
        }
    }

    /// Rows with numbers.
    pub(crate) fn measured(&self) -> Vec<&Row<'a>> {
        self.rows.iter().filter(|row| row.derived.is_some()).collect()
    }

    /// Every warning, and every reason for a missing number, once, with the cells that it holds for.
    pub(crate) fn notes(&self) -> Vec<String> {
        let lists = [Row::warnings, Row::gaps, Row::optimizations].map(|list| self.by_text(list));
        let mut notes: Vec<String> =
            lists.into_iter().flatten().map(|(text, cells)| format!("{cells}: {text}")).collect();
        if self.earlier > 0 {
            notes.push(format!("earlier records of the same cells that are not shown: {}", self.earlier));
        }
        notes
    }

    /// Each text that `list` gives, once, with the cells that it holds for.
    fn by_text<T: PartialEq>(&self, list: impl Fn(&Row<'a>) -> Vec<T>) -> Vec<(T, String)> {
        let mut texts: Vec<(T, Vec<&str>)> = Vec::new();
        for row in &self.rows {
            for text in list(row) {
                match texts.iter_mut().find(|(known, _)| *known == text) {
                    Some((_, cells)) => cells.push(&row.label),
                    None => texts.push((text, vec![&row.label])),
                }
            }
        }
        let measured = self.measured().len();
        let cells = |cells: &[&str]| match cells {
            all if all.len() == measured && measured > 1 => "all measured cells".to_owned(),
            [first, second, third, rest @ ..] if !rest.is_empty() => {
                format!("{first}, {second}, {third} and {} more", rest.len())
            }
            few => few.join(", "),
        };
        texts.into_iter().map(|(text, of)| (text, cells(&of))).collect()
    }

    /// Optimisations that could be made, each as it was decided: name, state, who decided, why, and the cells.
    pub(crate) fn decisions(&self) -> Vec<[String; 5]> {
        let list = |row: &Row<'a>| {
            let decisions = &row.record.settings.optimizations.decisions;
            decisions.iter().filter(|d| d.applies && row.derived.is_some()).cloned().collect::<Vec<_>>()
        };
        let decisions = self.by_text(list).into_iter().map(|(d, cells)| {
            let value = d.value.map_or_else(String::new, |value| format!(" {value}"));
            let by = if d.by == DecidedBy::User { "user" } else { "rule" };
            let state = if d.on { "on" } else { "off" };
            [format!("{}{value}", d.name), state.to_owned(), by.to_owned(), d.reason, cells]
        });
        decisions.collect()
    }
}

/// Joules in a line for each sensor.
fn by_sensor<'a>(joules: impl Iterator<Item = (&'a String, &'a Quantity)>) -> String {
    let line = |(sensor, joules): (&String, &Quantity)| {
        format!("{} ({sensor})", format::quantity(joules, |value| format::si(value, "J")))
    };
    let lines: Vec<String> = joules.map(line).collect();
    if lines.is_empty() { NONE.to_owned() } else { lines.join("\n") }
}

/// One line of a phase table.
pub(crate) struct PhaseRow {
    pub(crate) phase: &'static str,
    pub(crate) time: String,
    /// Of the whole call's time.
    pub(crate) share: String,
    /// Of one call, by sensor.
    pub(crate) energy: String,
    pub(crate) flops: String,
    pub(crate) bytes: String,
    pub(crate) bandwidth: String,
    pub(crate) intensity: String,
    pub(crate) mfu: String,
    pub(crate) mbu: String,
    pub(crate) attained: String,
    pub(crate) bound: String,
}

impl Row<'_> {
    /// Why there is no measurement; `None` where there is one.
    pub(crate) fn not_measured(&self) -> Option<(&'static str, &str)> {
        match &self.record.outcome {
            Outcome::Skipped { reason } => Some(("skipped", reason)),
            Outcome::Failed { error } => Some(("failed", error)),
            Outcome::Measured(_) if self.derived.is_none() => Some(("failed", "the record holds no samples")),
            Outcome::Measured(_) => None,
        }
    }

    pub(crate) fn latency(&self) -> String {
        match (&self.derived, self.not_measured()) {
            (Some(derived), _) => format::median(&derived.latency),
            (None, Some((state, _))) => state.to_owned(),
            (None, None) => NONE.to_owned(),
        }
    }

    pub(crate) fn throughput(&self) -> String {
        self.with(|d| format!("{} {}/s", format::significant(d.throughput.value), d.unit))
    }

    pub(crate) fn ttft(&self) -> String {
        self.with(|d| d.ttft.as_ref().map_or_else(|| NONE.to_owned(), |s| format::seconds(s.median)))
    }

    pub(crate) fn tpot(&self) -> String {
        self.with(|d| d.tpot.as_ref().map_or_else(|| NONE.to_owned(), |s| format::seconds(s.median)))
    }

    /// Host memory, and device memory where it was read.
    pub(crate) fn memory(&self) -> String {
        self.with(|d| match d.device_peak.value() {
            Some(device) => {
                format!("{} + {} device", format::quantity(&d.peak_rss, format::bytes), format::bytes(device))
            }
            None => format::quantity(&d.peak_rss, format::bytes),
        })
    }

    /// Energy per unit by sensor, sensors apart.
    pub(crate) fn energy(&self) -> String {
        self.with(|d| {
            let known = d.energy.iter().filter(|energy| energy.per_unit.value().is_some());
            by_sensor(known.map(|energy| (&energy.sensor, &energy.per_unit)))
        })
    }

    /// It has phases for its components.
    pub(crate) fn has_components(&self) -> bool {
        self.derived.as_ref().is_some_and(|derived| derived.phases.iter().any(|result| result.phase.is_component()))
    }

    fn with(&self, show: impl Fn(&Derived) -> String) -> String {
        self.derived.as_ref().map_or_else(|| NONE.to_owned(), show)
    }

    pub(crate) fn phases(&self) -> Vec<PhaseRow> {
        let Some(derived) = &self.derived else { return Vec::new() };
        let ratio = |value: Option<f64>| value.map_or_else(|| NONE.to_owned(), format::percent);
        let results = derived.phases.iter().map(|result| {
            let position = result.position.as_ref().ok();
            let intensity = result.cost.arithmetic_intensity();
            PhaseRow {
                phase: result.phase.name(),
                time: format::median(&result.seconds),
                share: format::percent(result.seconds.median / derived.latency.median),
                energy: by_sensor(result.energy.iter().map(|(sensor, joules)| (sensor, joules))),
                flops: format::si(result.flops(), "FLOP/s"),
                bytes: format::si(result.cost.bytes() as f64, "B"),
                bandwidth: format::si(result.bandwidth(), "B/s"),
                intensity: intensity.map_or_else(|| NONE.to_owned(), format::significant),
                mfu: ratio(result.mfu),
                mbu: ratio(result.mbu),
                attained: ratio(position.map(|p| p.fraction)),
                bound: position.map_or_else(|| NONE.to_owned(), |p| p.bound.to_string()),
            }
        });
        results.collect()
    }

    fn warnings(&self) -> Vec<String> {
        self.record.warnings.iter().map(|w| format!("warning ({}): {}", w.kind, w.message)).collect()
    }

    /// The optimisations that were on, in a line.
    fn optimizations(&self) -> Vec<String> {
        let decisions = &self.record.settings.optimizations.decisions;
        let on: Vec<&str> = decisions.iter().filter(|d| d.on).map(|d| d.name.as_str()).collect();
        if on.is_empty() || self.derived.is_none() {
            return Vec::new();
        }
        vec![format!("optimizations: {}", on.join(", "))]
    }

    /// Why numbers of this row are missing, each reason once.
    fn gaps(&self) -> Vec<String> {
        let Some(derived) = &self.derived else { return Vec::new() };
        let mut reasons: Vec<String> = Vec::new();
        if let Err(reason) = &derived.ceiling {
            reasons.push(format!("roofline: {reason}"));
        }
        let unplaced = derived.phases.iter().filter(|_| derived.ceiling.is_ok());
        let unplaced = unplaced.filter_map(|r| Some((r.phase, r.position.as_ref().err()?)));
        let untimed = derived.gaps.iter().map(|(phase, reason)| (*phase, reason));
        reasons.extend(unplaced.chain(untimed).map(|(phase, reason)| format!("{}: {reason}", phase.name())));
        if let Quantity::Unavailable { reason } = &derived.peak_rss {
            reasons.push(format!("peak memory: {reason}"));
        }
        if derived.energy.iter().all(|energy| energy.per_unit.value().is_none()) {
            let sensors = derived.energy.iter().filter_map(|energy| match &energy.per_unit {
                Quantity::Unavailable { reason } => Some(format!("energy: {reason}")),
                _ => None,
            });
            reasons.extend(sensors);
        }
        reasons
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::samples;

    #[test]
    fn a_later_record_of_the_same_cell_takes_its_place() {
        let first = samples::bert(10);
        let mut again = first.clone();
        again.started_at = "2026-02-02T00:00:00Z".into();
        again.settings.requested.insert("max-time".into(), "60".into());
        let mut other = first.clone();
        other.settings.requested.insert("threads".into(), "1".into());
        let records = [first, other.clone(), again.clone()];
        assert_eq!(latest(&records), [&again, &other]);
        assert_eq!(Rows::of(&records).earlier, 1);
    }

    #[test]
    fn settings_are_named_where_they_differ() {
        let two = samples::bert(10);
        let alone = Rows::of(std::slice::from_ref(&two));
        assert_eq!(alone.rows[0].label, "bert/forward/b1/s128");
        assert_eq!(alone.common, "roofbench, f32, 2 threads, cpu");

        let mut one = two.clone();
        one.settings.requested.insert("threads".into(), "1".into());
        one.settings.effective.insert("threads".into(), "1".into());
        let mut skipped = samples::vit(10);
        skipped.settings.effective.clear();
        let records = [two, one, skipped];
        let rows = Rows::of(&records);
        let labels: Vec<&str> = rows.rows.iter().map(|row| row.label.as_str()).collect();
        assert_eq!(labels, ["bert/forward/b1/s128 (2 threads)", "bert/forward/b1/s128 (1 thread)", "vit/forward/b1"]);
        assert_eq!(rows.common, "roofbench, f32, cpu");
    }

    #[test]
    fn optimizations_are_told_and_set_rows_apart() {
        let plan = |q8: bool| {
            let decision =
                |name: &str, on: bool| json!({"name": name, "on": on, "applies": true, "by": "rule", "reason": "why"});
            serde_json::from_value(json!([decision("packed-weights", true), decision("weights-q8", q8)])).unwrap()
        };
        let (mut usual, mut small) = (samples::bert(10), samples::bert(10));
        usual.settings.optimizations = plan(false);
        small.settings.optimizations = plan(true);
        small.settings.requested.insert("opt".into(), "+weights-q8".into());
        let records = [usual, small];
        let rows = Rows::of(&records);
        assert_eq!(rows.rows[1].label, "bert/forward/b1/s128 (f32 +weights-q8)");
        assert!(rows.notes().iter().any(|note| note.ends_with("optimizations: packed-weights, weights-q8")));
        let decisions = rows.decisions();
        assert_eq!(decisions.len(), 3);
        assert_eq!(decisions[0], ["packed-weights", "on", "rule", "why", "all measured cells"]);
    }

    #[test]
    fn every_missing_number_has_a_reason_and_each_is_told_once() {
        let mut record = samples::bert(10);
        record.machine.peaks = None;
        let mut other = samples::vit(10);
        other.machine.peaks = None;
        let records = [record, other];
        let notes = Rows::of(&records).notes();
        for expected in ["warning (load): load", "roofline: no measured peaks", "energy: no meter"] {
            let found: Vec<&String> = notes.iter().filter(|note| note.contains(expected)).collect();
            assert_eq!(found.len(), 1, "{notes:?}");
            assert!(found[0].starts_with("all measured cells: "), "{notes:?}");
        }
    }
}
