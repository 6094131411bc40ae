//! What settings are looked for: limits on what was measured, and what is to be small.

use std::str::FromStr;

use clap::ValueEnum;
use roofbench_core::metrics::Derived;

use crate::{choice, ui};

/// A number of a measured cell that can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantity {
    /// Median of whole calls, in seconds.
    P50,
    /// Their 90th percentile.
    P90,
    /// Their 95th percentile.
    P95,
    /// Their 99th percentile.
    P99,
    /// Median time to the first token, in seconds.
    Ttft,
    /// Median time of a further token, in seconds.
    Tpot,
    /// Bytes of resident memory at most.
    Memory,
    /// Units per second.
    Throughput,
    /// Joules per unit.
    Energy,
}

const NAMES: [(&str, Quantity); 10] = [
    ("p50", Quantity::P50),
    ("latency", Quantity::P50),
    ("p90", Quantity::P90),
    ("p95", Quantity::P95),
    ("p99", Quantity::P99),
    ("ttft", Quantity::Ttft),
    ("tpot", Quantity::Tpot),
    ("memory", Quantity::Memory),
    ("throughput", Quantity::Throughput),
    ("energy", Quantity::Energy),
];

impl Quantity {
    /// Its value of a measured cell, where it has one.
    pub(crate) fn of(self, derived: &Derived) -> Option<f64> {
        let latency = &derived.latency;
        match self {
            Self::P50 => Some(latency.median),
            Self::P90 => latency.p90,
            Self::P95 => latency.p95,
            Self::P99 => latency.p99,
            Self::Ttft => derived.ttft.as_ref().map(|ttft| ttft.median),
            Self::Tpot => derived.tpot.as_ref().map(|tpot| tpot.median),
            Self::Memory => derived.peak_rss.value(),
            Self::Throughput => Some(derived.throughput.value),
            Self::Energy => derived.energy.iter().find_map(|energy| energy.per_unit.value()),
        }
    }

    /// Samples that it takes.
    pub(crate) fn samples(self) -> Option<u32> {
        match self {
            Self::P90 => Some(10),
            Self::P95 => Some(20),
            Self::P99 => Some(100),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        NAMES.iter().find(|(_, quantity)| *quantity == self).map_or("", |(name, _)| name)
    }

    fn parse(self, text: &str) -> Result<f64, String> {
        match self {
            Self::Memory => choice::bytes(text),
            Self::Throughput | Self::Energy => text.trim().parse().map_err(|_| "expected a number".to_owned()),
            _ => choice::seconds(text),
        }
    }

    /// For a reader.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Memory => ui::bytes(value),
            Self::Throughput => format!("{}/s", ui::digits(value)),
            Self::Energy => format!("{} J", ui::digits(value)),
            _ => ui::time(value),
        }
    }
}

/// `p95<80ms`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limit {
    /// What is limited.
    pub(crate) quantity: Quantity,
    /// From above; else from below.
    pub(crate) is_most: bool,
    /// The limit, which may be reached.
    pub(crate) value: f64,
}

impl Limit {
    /// How far `value` lies beyond the limit: above 1 it is broken.
    pub(crate) fn share(&self, value: f64) -> f64 {
        if self.is_most { value / self.value } else { self.value / value }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.is_most { '<' } else { '>' };
        write!(f, "{}{sign}{}", self.quantity.name(), self.quantity.show(self.value))
    }
}

/// Limits that all have to be kept: `p95<80ms, memory<4GiB`.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Limits(pub(crate) Vec<Limit>);

impl FromStr for Limits {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let limit = |part: &str| {
            let names = || NAMES.map(|(name, _)| name).join(", ");
            let at = part.find(['<', '>']).ok_or_else(|| {
                format!("`{part}` has no < or >; expected limits such as p95<80ms or memory<4GiB, of {}", names())
            })?;
            let (name, rest) = part.split_at(at);
            let quantity = NAMES.iter().find(|(known, _)| *known == name.trim()).map(|(_, quantity)| *quantity);
            let quantity =
                quantity.ok_or_else(|| format!("no number `{}` to limit; there are {}", name.trim(), names()))?;
            let value = quantity.parse(rest[1..].trim_start_matches('='))?;
            Ok(Limit { quantity, is_most: rest.starts_with('<'), value })
        };
        text.split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(limit)
            .collect::<Result<_, String>>()
            .map(Self)
    }
}

/// What is to be small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Objective {
    /// the median time of a call
    Latency,
    /// time per unit: the inverse of the throughput, for which larger batches are tried
    UnitTime,
    /// resident memory at most
    Memory,
    /// energy per unit
    Energy,
}

impl Objective {
    /// Of a measured cell; `None` where it was not measured.
    pub(crate) fn of(self, derived: &Derived) -> Option<f64> {
        match self {
            Self::Latency => Some(derived.latency.median),
            Self::UnitTime => Some(derived.throughput.value.recip()),
            Self::Memory => Quantity::Memory.of(derived),
            Self::Energy => Quantity::Energy.of(derived),
        }
    }

    /// For a reader.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Latency | Self::UnitTime => ui::time(value),
            Self::Memory => ui::bytes(value),
            Self::Energy => format!("{} J", ui::digits(value)),
        }
    }
}

/// Which of `points`, in two numbers that are to be small, no other is better than in both.
pub(crate) fn pareto(points: &[(f64, f64)]) -> Vec<bool> {
    let beats = |a: &(f64, f64), b: &(f64, f64)| a.0 <= b.0 && a.1 <= b.1 && (a.0 < b.0 || a.1 < b.1);
    points.iter().map(|point| !points.iter().any(|other| beats(other, point))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parsed_and_shown() {
        let Limits(limits) = "p95<80ms, memory<=4GiB,throughput > 10".parse().unwrap();
        let found: Vec<_> = limits.iter().map(|limit| (limit.quantity, limit.is_most, limit.value)).collect();
        assert_eq!(
            found,
            [
                (Quantity::P95, true, 0.08),
                (Quantity::Memory, true, 4_294_967_296.0),
                (Quantity::Throughput, false, 10.0)
            ]
        );
        assert_eq!(
            limits.iter().map(Limit::to_string).collect::<Vec<_>>(),
            ["p95<80 ms", "memory<4.29 GB", "throughput>10/s"]
        );
        assert_eq!((limits[0].share(0.16), limits[2].share(20.0)), (2.0, 0.5));
        for (wrong, word) in
            [("p95", "no < or >"), ("speed<3", "no number `speed`"), ("p95<fast", "time"), ("memory<1s", "size")]
        {
            let error = wrong.parse::<Limits>().unwrap_err();
            assert!(error.contains(word), "{wrong}: {error}");
        }
    }

    #[test]
    fn the_front_is_what_nothing_beats_in_both() {
        let points = [(1.0, 4.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0), (5.0, 5.0), (2.0, 2.0)];
        assert_eq!(pareto(&points), [true, true, false, true, false, true]);
        assert!(pareto(&[]).is_empty());
    }
}
