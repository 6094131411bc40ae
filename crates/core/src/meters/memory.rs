//! Memory of this process: what is resident at the end of an interval, and the most that was resident in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::poller::{Poll, Poller};
use super::{Meter, Quantity, Reading, Scope};
use crate::{hardware, metrics};

/// The kernel's own account where `/proc` has one, else samples by `sysinfo`.
pub(super) fn open() -> Box<dyn Meter> {
    let dir = hardware::root().join("proc/self");
    if status(&dir).is_some_and(|status| status.rss.is_some()) {
        Box::new(Procfs::new(dir))
    } else {
        Box::new(Sampled::default())
    }
}

/// Resident bytes now and at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status {
    rss: Option<u64>,
    peak: Option<u64>,
}

fn status(dir: &Path) -> Option<Status> {
    fs::read_to_string(dir.join("status")).ok().map(|text| parse_status(&text))
}

fn parse_status(text: &str) -> Status {
    let bytes = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
    };
    Status { rss: bytes("VmRSS:"), peak: bytes("VmHWM:") }
}

/// `/proc/self/status`, whose peak is reset at the start of each interval where that is allowed.
struct Procfs {
    dir: PathBuf,
    /// Why the peak could not be reset, if it could not.
    not_reset: Option<String>,
}

impl Procfs {
    fn new(dir: PathBuf) -> Self {
        Self { dir, not_reset: Some("no interval was started".into()) }
    }
}

impl Meter for Procfs {
    fn start(&mut self) {
        // proc_pid_clear_refs(5): 5 sets the peak to what is resident now.
        let file = fs::OpenOptions::new().write(true).open(self.dir.join("clear_refs"));
        let reset = file.and_then(|mut file| std::io::Write::write_all(&mut file, b"5"));
        self.not_reset = reset.err().map(|error| format!("clear_refs can't be written: {error}"));
    }

    fn stop(&mut self) -> Vec<Reading> {
        let status = status(&self.dir).unwrap_or(Status { rss: None, peak: None });
        let quantity = |bytes: Option<u64>, name: &str| match bytes {
            Some(bytes) => Quantity::Measured { value: bytes as f64 },
            None => Quantity::Unavailable {
                reason: format!(
                    "{} has no {name}; run on a Linux kernel that has it",
                    self.dir.join("status").display()
                ),
            },
        };
        let peak_sensor = match &self.not_reset {
            None => "/proc/self/status VmHWM, reset at the start of the interval".to_owned(),
            Some(why) => format!("/proc/self/status VmHWM, peak of the process so far ({why})"),
        };
        vec![
            Reading::new(&metrics::RSS, Scope::Process, "/proc/self/status VmRSS", quantity(status.rss, "VmRSS")),
            Reading::new(&metrics::PEAK_RSS, Scope::Process, peak_sensor, quantity(status.peak, "VmHWM")),
        ]
    }
}

/// Resident memory as `sysinfo` finds it, its peak among samples.
#[derive(Default)]
struct Sampled {
    running: Option<Poller<Samples>>,
}

/// Largest and last of the samples so far.
#[derive(Default)]
struct Samples {
    system: Option<sysinfo::System>,
    largest: u64,
    last: u64,
    count: u32,
}

impl Poll for Samples {
    const PERIOD: Duration = Duration::from_millis(20);

    fn poll(&mut self) {
        let Some(system) = &mut self.system else { return };
        let Ok(pid) = sysinfo::get_current_pid() else { return };
        let what = sysinfo::ProcessRefreshKind::nothing().with_memory();
        system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), false, what);
        if let Some(bytes) = system.process(pid).map(|process| process.memory()).filter(|&bytes| bytes > 0) {
            self.last = bytes;
            self.largest = self.largest.max(bytes);
            self.count += 1;
        }
    }
}

impl Meter for Sampled {
    fn start(&mut self) {
        self.running = Some(Poller::start(Samples { system: sysinfo::System::new().ok(), ..Samples::default() }));
    }

    fn stop(&mut self) -> Vec<Reading> {
        let (last, peak) = match self.running.take() {
            None => (Quantity::not_started(), Quantity::not_started()),
            Some(running) => running.finish(|samples| match samples.count {
                0 => {
                    let reason = "the system does not tell this process its resident memory".to_owned();
                    (Quantity::Unavailable { reason: reason.clone() }, Quantity::Unavailable { reason })
                }
                count => {
                    let from = format!("largest of {count} samples, {} ms apart", Samples::PERIOD.as_millis());
                    let peak = Quantity::Derived { value: samples.largest as f64, from };
                    (Quantity::Measured { value: samples.last as f64 }, peak)
                }
            }),
        };
        vec![
            Reading::new(&metrics::RSS, Scope::Process, "sysinfo", last),
            Reading::new(&metrics::PEAK_RSS, Scope::Process, "sysinfo", peak),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::tree;

    #[test]
    fn reads_status_and_says_whether_the_peak_was_reset() {
        let dir = tree(&[("status", "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"), ("clear_refs", "")]);
        let mut meter = Procfs::new(dir.path().into());
        meter.start();
        assert_eq!(fs::read_to_string(dir.path().join("clear_refs")).ok().as_deref(), Some("5"));
        let readings = meter.stop();
        assert_eq!(readings[0].quantity, Quantity::Measured { value: 1_048_576.0 });
        assert_eq!(readings[1].quantity, Quantity::Measured { value: 2_097_152.0 });
        assert!(readings[1].sensor.ends_with("reset at the start of the interval"));
        fs::remove_file(dir.path().join("clear_refs")).expect("removed");
        meter.start();
        assert!(meter.stop()[1].sensor.contains("peak of the process so far (clear_refs can't be written"));
    }

    #[test]
    fn what_is_missing_is_unavailable() {
        let none = Status { rss: None, peak: None };
        assert_eq!(parse_status("VmRSS:\tmany kB\nVmHWM:\t12\n"), none);
        assert_eq!(parse_status("VmRSS: 18446744073709551615 kB"), none);
        let mut meter = Procfs::new(tree(&[]).path().into());
        meter.start();
        for reading in meter.stop() {
            assert!(matches!(reading.quantity, Quantity::Unavailable { reason } if reason.contains("status")));
        }
    }

    /// Both meters see a block of memory of this process while it is held, and neither says 0.
    #[test]
    fn a_block_held_is_seen() {
        const BLOCK: usize = 64 << 20;
        let mut meters: Vec<Box<dyn Meter>> = vec![open(), Box::new(Sampled::default())];
        for meter in &mut meters {
            meter.start();
            let block = std::hint::black_box(vec![1u8; BLOCK]);
            let readings = meter.stop();
            drop(block);
            for reading in readings {
                assert!(reading.quantity.value().is_some_and(|bytes| bytes >= BLOCK as f64), "{reading:?}");
            }
        }
    }
}
