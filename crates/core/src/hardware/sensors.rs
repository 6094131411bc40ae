//! What a machine tells of itself while it works: clock and temperature.

use std::path::Path;

use sysinfo::Components;

use super::cpu;

/// Where the clock is read.
pub const CLOCK: &str = "cpufreq, or /proc/cpuinfo";
/// Where temperatures are read.
pub const TEMPERATURE: &str = "the system's temperature sensors";

/// Words in the names of sensors of a CPU.
const OF_CPU: [&str; 7] = ["coretemp", "k10temp", "zenpower", "tctl", "tdie", "cpu", "package"];

/// The sensors of this machine.
pub struct Sensors {
    components: Result<Components, String>,
}

/// What they say now, or why they don't.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// The clock of the CPU in MHz, the mean over its cores.
    pub clock_mhz: Result<f64, String>,
    /// The hottest sensor of the CPU in degrees Celsius.
    pub temperature_c: Result<f64, String>,
}

impl Sensors {
    /// Finds them.
    pub fn open() -> Self {
        Self { components: Components::new_with_refreshed_list().map_err(|error| error.to_string()) }
    }

    /// Reads them.
    pub fn look(&mut self) -> Look {
        let temperature_c = match &mut self.components {
            Ok(components) => {
                components.refresh(false);
                hottest(components.iter().map(|one| (one.label().to_owned(), one.temperature())))
            }
            Err(reason) => Err(format!("the system's temperature sensors can't be listed: {reason}")),
        };
        let clock = cpu::clock_mhz(Path::new("/"));
        Look {
            clock_mhz: clock.ok_or_else(|| {
                "neither /sys/devices/system/cpu/*/cpufreq nor /proc/cpuinfo tells the clock; Linux on the machine itself does"
                    .to_owned()
            }),
            temperature_c,
        }
    }
}

/// The highest temperature among the sensors of a CPU, or among all where none is named so.
fn hottest(sensors: impl Iterator<Item = (String, Option<f32>)>) -> Result<f64, String> {
    let all: Vec<(String, f64)> = sensors
        .filter_map(|(name, celsius)| Some((name.to_lowercase(), f64::from(celsius.filter(|c| c.is_finite())?))))
        .collect();
    let of_cpu: Vec<f64> =
        all.iter().filter(|(name, _)| OF_CPU.iter().any(|word| name.contains(word))).map(|(_, c)| *c).collect();
    let candidates = if of_cpu.is_empty() { all.iter().map(|(_, c)| *c).collect() } else { of_cpu };
    candidates.into_iter().max_by(f64::total_cmp).ok_or_else(|| {
        "the system shows no temperature sensor: virtual machines and containers hide them; run on the machine itself"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_sensor_of_the_cpu() {
        let sensors = |list: &[(&str, Option<f32>)]| {
            hottest(list.iter().map(|(name, celsius)| ((*name).to_owned(), *celsius)).collect::<Vec<_>>().into_iter())
        };
        let drive = ("nvme Composite", Some(70.0));
        assert_eq!(sensors(&[drive, ("k10temp Tctl", Some(55.0)), ("coretemp Core 1", Some(61.5))]), Ok(61.5));
        assert_eq!(sensors(&[drive, ("k10temp Tctl", None), ("CPU", Some(f32::NAN))]), Ok(70.0));
        assert!(sensors(&[]).unwrap_err().contains("no temperature sensor"));
    }

    #[test]
    fn a_look_reads_or_says_why_not() {
        let Look { clock_mhz, temperature_c } = Sensors::open().look();
        for found in [clock_mhz, temperature_c] {
            match found {
                Ok(value) => assert!(value > 0.0),
                Err(reason) => assert!(!reason.is_empty()),
            }
        }
    }
}
