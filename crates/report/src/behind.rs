//! What was measured behind the samples: where the time of a call goes, and what is left of the speed in a long run.

use roofbench_core::metrics::{self, Derived};
use roofbench_core::profile::{Operator, Profile};
use roofbench_core::record::{Measurement, Outcome, Record};
use roofbench_core::sustain::Sustained;

use crate::format::{self, NONE};
use crate::table::empty_table;

/// Columns of a profile.
pub(crate) const COLUMNS: [&str; 9] =
    ["phase", "operator", "count", "time", "share", "FLOP/s", "B/s", "% of roofline", "bound"];

/// A line of a profile in words, by [`COLUMNS`].
pub(crate) fn profile_line(profile: &Profile, one: &Operator, derived: &Derived) -> [String; 9] {
    let seconds = one.ns as f64 * 1e-9;
    let rate = |amount: u64, unit: &str| match amount {
        0 => NONE.to_owned(),
        amount => format::si(amount as f64 / seconds, unit),
    };
    let position = derived.ceiling.as_ref().ok().and_then(|ceiling| ceiling.place(one.cost, seconds).ok());
    [
        one.phase.name().to_owned(),
        one.operator.clone(),
        one.count.to_string(),
        format::seconds(seconds),
        format::percent(one.ns as f64 / profile.total_ns.max(1) as f64),
        rate(one.cost.flops, "FLOP/s"),
        rate(one.cost.bytes(), "B/s"),
        position.map_or_else(|| NONE.to_owned(), |position| format::percent(position.fraction)),
        position.map_or_else(|| NONE.to_owned(), |position| position.bound.to_string()),
    ]
}

/// Change of the speed from the samples to the end of the long run.
pub(crate) fn drift(sustained: &Sustained, derived: &Derived) -> Option<f64> {
    sustained.drift(derived.latency.median * 1e9)
}

/// A long run in a sentence.
pub(crate) fn sustained_line(sustained: &Sustained, derived: &Derived) -> String {
    let (Some(last), Some(late), Some(drift)) =
        (sustained.windows.last(), sustained.late_ns(), drift(sustained, derived))
    else {
        return "the long run was interrupted before a call ended".to_owned();
    };
    let calls: u64 = sustained.windows.iter().map(|window| window.calls).sum();
    let sensors = sustained.sensors.iter().map(|reading| {
        let unit = &reading.unit;
        match reading.quantity.value() {
            Some(value) => format!("{} {} {unit} on average", reading.metric, format::significant(value)),
            None => format!("{} unavailable", reading.metric),
        }
    });
    format!(
        "{calls} calls in {}: {} in the samples, {} in the last quarter, the speed changed by {:+.1} %; {}",
        format::seconds(last.end_ns as f64 * 1e-9),
        format::seconds(derived.latency.median),
        format::seconds(late * 1e-9),
        drift * 100.0,
        sensors.collect::<Vec<_>>().join(", ")
    )
}

pub(crate) fn measurement(record: &Record) -> Option<(&Measurement, Derived)> {
    match &record.outcome {
        Outcome::Measured(measurement) => Some((measurement, metrics::derive(record)?)),
        _ => None,
    }
}

/// What a terminal shows of `record` behind the [table](crate::table): its profile and its long run, where it has them.
pub fn details(record: &Record) -> Vec<String> {
    let Some((measurement, derived)) = measurement(record) else { return Vec::new() };
    let mut texts = Vec::new();
    if let Some(profile) = &measurement.profile {
        let mut table = empty_table(&COLUMNS);
        for one in profile.by_operator() {
            table.add_row(profile_line(profile, &one, &derived));
        }
        let calls = match profile.calls {
            1 => "a call".to_owned(),
            calls => format!("{calls} calls"),
        };
        texts.push(format!(
            "{}: profile of {calls} behind the samples, {} each\n{table}",
            record.subject.label(),
            format::seconds(profile.total_ns as f64 * 1e-9)
        ));
    }
    let sustained = measurement.sustained.as_ref();
    texts.extend(sustained.map(|run| format!("{}: {}", record.subject.label(), sustained_line(run, &derived))));
    texts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn a_profile_stands_under_the_roofline() {
        let record = samples::behind();
        let [profile, sustained] = &details(&record)[..] else { panic!("{:?}", details(&record)) };
        assert!(profile.contains("profile of 2 calls behind the samples, 40.0 ms each"), "{profile}");
        let line = |word: &str| profile.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{word}"));
        // 1.6 GFLOP in 20 ms and 2 layers, of 100 GFLOP/s
        let linear = line("linear");
        for word in ["24", "20.0 ms", "50 %", "80.0 GFLOP/s", "80 %", "compute-bound"] {
            assert!(linear.contains(word), "{word}: {linear}");
        }
        assert!(line("other").contains('–'));
        assert!(sustained.contains("40.0 ms in the samples, 50.0 ms in the last quarter"), "{sustained}");
        assert!(sustained.contains("-20.0 %") && sustained.contains("temperature unavailable"), "{sustained}");
        assert!(details(&samples::bert(10)).is_empty());
    }
}
