//! Long runs: how throughput, clock, temperature and power go over minutes, and what is left of the speed of a short one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::meters::Reading;
use crate::stats;

/// Part of the run, at its end, whose speed counts as sustained.
const LATE: f64 = 0.25;

/// Calls one after another over a long time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sustained {
    /// Time that was asked for.
    pub asked_ns: u64,
    /// Stretches of the run in order.
    pub windows: Vec<Window>,
    /// Clock, temperature and power over the whole run (means of the windows), each with its sensor, or with the reason for
    /// its absence.
    pub sensors: Vec<Reading>,
}

/// A stretch of a long run. Times are from its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Window {
    /// When it began.
    pub start_ns: u64,
    /// When its last call ended.
    pub end_ns: u64,
    /// Calls in it.
    pub calls: u64,
    /// The median of their times.
    pub median_ns: u64,
    /// Clock of the CPU at its end, in MHz.
    pub clock_mhz: Option<f64>,
    /// The hottest sensor of the CPU at its end, in degrees Celsius.
    pub temperature_c: Option<f64>,
    /// Mean power over it, in watts.
    pub power_w: Option<f64>,
}

impl Sustained {
    /// Nanoseconds of a call in the last quarter of the run.
    pub fn late_ns(&self) -> Option<f64> {
        let end = self.windows.last()?.end_ns as f64;
        let late = self.windows.iter().filter(|window| window.end_ns as f64 > end * (1.0 - LATE));
        stats::median(&late.map(|window| window.median_ns).collect::<Vec<_>>())
    }

    /// Change of the speed from a burst, whose calls take `burst_ns`, to the end of the run: -0.1 is a tenth slower.
    pub fn drift(&self, burst_ns: f64) -> Option<f64> {
        Some(burst_ns / self.late_ns()? - 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_quarter_is_held_against_the_burst() {
        let window = |i: u64, median_ns| Window {
            start_ns: i * 100,
            end_ns: (i + 1) * 100,
            calls: 10,
            median_ns,
            clock_mhz: None,
            temperature_c: None,
            power_w: None,
        };
        let windows = (0..8).map(|i| window(i, if i < 6 { 10 } else { 12 + i % 2 })).collect();
        let sustained = Sustained { asked_ns: 800, windows, sensors: vec![] };
        assert_eq!(sustained.late_ns(), Some(12.5));
        assert_eq!(sustained.drift(10.0), Some(10.0 / 12.5 - 1.0));
        assert_eq!(Sustained { windows: vec![], ..sustained }.drift(10.0), None);
    }
}
