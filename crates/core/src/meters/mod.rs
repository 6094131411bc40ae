//! Meters: time, memory and energy behind one trait. What can't be read is *unavailable* with the reason, never 0.

pub mod clock;

mod memory;
mod nvml;
mod poller;
mod rapl;

use candle_core::{Device, DeviceLocation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::metrics::{self, Metric};

/// Where a number comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "provenance", rename_all = "snake_case")]
pub enum Quantity {
    /// Read from a sensor or counter.
    Measured {
        /// The number, in the reading's unit.
        value: f64,
    },
    /// Computed from measured numbers.
    Derived {
        /// The number, in the reading's unit.
        value: f64,
        /// From which numbers, by which formula.
        from: String,
    },
    /// From a model or data sheet.
    Estimated {
        /// The number, in the reading's unit.
        value: f64,
        /// How.
        method: String,
    },
    /// Not to be had on this machine.
    Unavailable {
        /// Why, and what would make it available.
        reason: String,
    },
}

impl Quantity {
    /// The number, where there is one.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Measured { value } | Self::Derived { value, .. } | Self::Estimated { value, .. } => Some(*value),
            Self::Unavailable { .. } => None,
        }
    }

    /// What a meter gives that was stopped without having been started.
    fn not_started() -> Self {
        Self::Unavailable { reason: "no interval was started".into() }
    }
}

/// What a reading covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// This process alone.
    Process,
    /// One device (a GPU, a CPU package), whoever uses it.
    Device,
    /// The whole machine.
    Machine,
}

/// One number with its unit, scope, sensor and provenance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Reading {
    /// Name from [`crate::metrics`]: `energy`, `peak_rss`.
    pub metric: String,
    /// `J`, `B`, `W`, `s`.
    pub unit: String,
    /// What it covers.
    pub scope: Scope,
    /// What was read: `/proc/self/status VmHWM`, `RAPL package-0`, `NVML GPU 0`.
    pub sensor: String,
    /// The number or the reason for its absence.
    #[serde(flatten)]
    pub quantity: Quantity,
}

impl Reading {
    /// A reading of `metric`, in its unit.
    pub fn new(metric: &Metric, scope: Scope, sensor: impl Into<String>, quantity: Quantity) -> Self {
        Self { metric: metric.name.into(), unit: metric.unit.into(), scope, sensor: sensor.into(), quantity }
    }
}

/// Something that is read at the start and at the end of a phase.
pub trait Meter {
    /// Starts (or restarts) an interval.
    fn start(&mut self);
    /// Ends the interval and gives its readings.
    fn stop(&mut self) -> Vec<Reading>;
}

/// All meters that say something about work on one device. A meter that this machine lacks is there too, and gives its
/// readings as unavailable with the reason.
pub struct Meters {
    meters: Vec<Box<dyn Meter>>,
}

impl Meters {
    /// Wall clock, memory of the process, energy of the CPU, and energy and memory of `device` where it is a GPU.
    pub fn open(device: &Device) -> Self {
        let mut meters = vec![memory::open(), rapl::open()];
        match device.location() {
            DeviceLocation::Cpu => {}
            DeviceLocation::Cuda { gpu_id } => meters.push(nvml::open(gpu_id)),
            DeviceLocation::Metal { .. } => meters.push(Box::new(NoMetalMeters)),
        }
        meters.push(Box::new(clock::Stopwatch::new(clock::Monotonic)));
        Self { meters }
    }

    /// Each meter by itself.
    pub fn as_mut_slice(&mut self) -> &mut [Box<dyn Meter>] {
        &mut self.meters
    }
}

/// The clock is started last and stopped first, so that it does not time the other meters.
impl Meter for Meters {
    fn start(&mut self) {
        self.meters.iter_mut().for_each(|meter| meter.start());
    }

    fn stop(&mut self) -> Vec<Reading> {
        let mut readings: Vec<Vec<Reading>> = self.meters.iter_mut().rev().map(|meter| meter.stop()).collect();
        readings.reverse();
        readings.concat()
    }
}

/// Apple's GPUs, for which there is no interface that a program may read without being root.
struct NoMetalMeters;

impl Meter for NoMetalMeters {
    fn start(&mut self) {}

    fn stop(&mut self) -> Vec<Reading> {
        let reason = "Apple GPUs tell their energy and memory to root alone: watch `sudo powermetrics` beside the run";
        [&metrics::ENERGY, &metrics::DEVICE_MEMORY]
            .map(|metric| Reading::new(metric, Scope::Device, "Metal", Quantity::Unavailable { reason: reason.into() }))
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_meter_reads_or_says_why_not() {
        let mut meters = Meters::open(&Device::Cpu);
        meters.start();
        let readings = meters.stop();
        let names: Vec<&str> = readings.iter().map(|r| r.metric.as_str()).collect();
        assert_eq!(names[..2], ["rss", "peak_rss"]);
        assert_eq!(names.last(), Some(&"wall_time"));
        assert!(names.contains(&"energy"));
        for reading in &readings {
            match &reading.quantity {
                Quantity::Unavailable { reason } => assert!(!reason.is_empty()),
                // Two looks at a coarse clock may show the same time; nothing else may be 0.
                quantity => {
                    let zero_is_fine = reading.metric == metrics::WALL_TIME.name;
                    assert!(quantity.value().is_some_and(|value| value > 0.0 || zero_is_fine), "{reading:?}");
                }
            }
            let text = serde_json::to_string(reading).expect("a reading serialises");
            assert_eq!(serde_json::from_str::<Reading>(&text).expect("and is read back"), *reading);
        }
    }
}
