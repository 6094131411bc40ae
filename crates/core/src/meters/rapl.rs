//! Energy of CPU packages from RAPL counters, through Linux's powercap files (`Documentation/power/powercap`).
//!
//! A package contains its cores and graphics, so only packages add up to a total. Memory (`dram`) and the whole
//! platform (`psys`) are counted apart. Counters wrap, on some CPUs within minutes, and are read often enough to
//! see it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::clock::{Clock, Monotonic};
use super::poller::{Poll, Poller};
use super::{Meter, Quantity, Reading, Scope};
use crate::{hardware, metrics};

/// More than any CPU package draws: a counter that would mean more has not wrapped, it was set back.
const MOST_WATTS: f64 = 2000.0;
/// Least time that [`MOST_WATTS`] is taken over, as counters move in steps.
const LEAST_SECONDS: f64 = 1.0;

/// The meter of this machine's packages.
pub(super) fn open() -> Box<dyn Meter> {
    let groups = if cfg!(target_os = "linux") {
        groups(&hardware::root().join("sys/class/powercap"))
    } else {
        Err("the CPU's energy counters are read on Linux alone: other systems show them to drivers and to root".into())
    };
    Box::new(Rapl { groups, running: None })
}

/// One counter.
#[derive(Debug, Clone, PartialEq)]
struct Domain {
    dir: PathBuf,
    /// Value at which the counter starts over.
    range_uj: Option<u64>,
}

/// Counters that add up to one reading.
#[derive(Debug, Clone, PartialEq)]
struct Group {
    sensor: String,
    scope: Scope,
    domains: Vec<Domain>,
}

/// The packages as one group, each memory and each platform domain as its own.
fn groups(powercap: &Path) -> Result<Vec<Group>, String> {
    let entries = fs::read_dir(powercap).into_iter().flatten().flatten();
    // `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it, also on AMD. `intel-rapl-mmio` shows packages again.
    let mut dirs: Vec<PathBuf> = entries
        .map(|e| e.path())
        .filter(|p| file_name(p).is_some_and(|name| name.starts_with("intel-rapl:")))
        .collect();
    dirs.sort();
    let mut packages = Group { sensor: String::new(), scope: Scope::Device, domains: Vec::new() };
    let mut apart = Vec::new();
    let mut package_names = Vec::new();
    for dir in dirs {
        let Ok(name) = fs::read_to_string(dir.join("name")) else { continue };
        let name = name.trim().to_owned();
        let range_uj =
            fs::read_to_string(dir.join("max_energy_range_uj")).ok().and_then(|text| text.trim().parse().ok());
        let domain = Domain { range_uj, dir };
        if name.starts_with("package") {
            package_names.push(name);
            packages.domains.push(domain);
        } else if name == "psys" {
            apart.push(Group { sensor: "RAPL psys".into(), scope: Scope::Machine, domains: vec![domain] });
        } else if name == "dram" {
            let parent = file_name(&domain.dir).unwrap_or_default().replace("intel-rapl:", "");
            let sensor = format!("RAPL dram {parent}");
            apart.push(Group { sensor, scope: Scope::Device, domains: vec![domain] });
        }
    }
    if packages.domains.is_empty() {
        return Err(format!(
            "{} has no RAPL package: virtual machines and many containers hide it; run on the machine itself, with the \
             module intel_rapl_msr loaded",
            powercap.display()
        ));
    }
    packages.sensor = format!("RAPL {}", package_names.join(" + "));
    Ok([vec![packages], apart].concat())
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn counter(domain: &Domain) -> Result<u64, String> {
    let path = domain.dir.join("energy_uj");
    let remedy = match fs::read_to_string(&path) {
        Ok(text) => return text.trim().parse().map_err(|_| format!("{} holds no number", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            "only root may read it: run as root, or `sudo chmod a+r` the file until the next start".to_owned()
        }
        Err(e) => e.to_string(),
    };
    Err(format!("{}: {remedy}", path.display()))
}

/// Microjoules from `before` to `after`, at most one wrap between them.
fn difference(before: u64, after: u64, range: Option<u64>, seconds: f64) -> Result<u64, String> {
    if after >= before {
        return Ok(after - before);
    }
    let most = MOST_WATTS * seconds.max(LEAST_SECONDS) * 1e6;
    let wrapped = range.filter(|&range| range >= before).map(|range| range - before + after);
    wrapped.filter(|&uj| uj as f64 <= most).ok_or_else(|| {
        format!("the counter went back from {before} to {after} µJ without a wrap (suspended or reset); measure again")
    })
}

/// A counter's energy since the start, or why there is none.
struct Running {
    domain: Domain,
    last: Option<(u64, u64)>,
    total_uj: Result<u64, String>,
}

impl Running {
    fn new(domain: Domain) -> Self {
        Self { domain, last: None, total_uj: Ok(0) }
    }

    fn update(&mut self, now_ns: u64) {
        let Ok(total) = self.total_uj else { return };
        self.total_uj = counter(&self.domain).and_then(|now_uj| {
            let since = self.last.replace((now_ns, now_uj));
            let Some((then_ns, then_uj)) = since else { return Ok(total) };
            let seconds = now_ns.saturating_sub(then_ns) as f64 / 1e9;
            Ok(total.saturating_add(difference(then_uj, now_uj, self.domain.range_uj, seconds)?))
        });
    }
}

/// All counters of all groups.
struct Interval(Vec<(Group, Vec<Running>)>);

impl Interval {
    fn new(groups: &[Group]) -> Self {
        let running = |group: &Group| group.domains.iter().cloned().map(Running::new).collect();
        Self(groups.iter().map(|group| (group.clone(), running(group))).collect())
    }

    fn update(&mut self, now_ns: u64) {
        self.0.iter_mut().flat_map(|(_, domains)| domains).for_each(|domain| domain.update(now_ns));
    }

    fn readings(&self) -> Vec<Reading> {
        let reading = |(group, domains): &(Group, Vec<Running>)| {
            let total = domains.iter().try_fold(0u64, |sum, domain| Ok(sum.saturating_add(domain.total_uj.clone()?)));
            let quantity = match total {
                Ok(0) => Quantity::Unavailable {
                    reason: "the counter did not move: it steps about every millisecond; measure for longer".into(),
                },
                Ok(uj) => Quantity::Measured { value: uj as f64 / 1e6 },
                Err(reason) => Quantity::Unavailable { reason },
            };
            Reading::new(&metrics::ENERGY, group.scope, group.sensor.clone(), quantity)
        };
        self.0.iter().map(reading).collect()
    }
}

impl Poll for Interval {
    /// The smallest range known, 65 kJ, lasts for more than this at [`MOST_WATTS`].
    const PERIOD: Duration = Duration::from_secs(20);

    fn poll(&mut self) {
        self.update(Monotonic.now_ns());
    }
}

struct Rapl {
    groups: Result<Vec<Group>, String>,
    running: Option<Poller<Interval>>,
}

impl Meter for Rapl {
    fn start(&mut self) {
        self.running = self.groups.as_ref().ok().map(|groups| Poller::start(Interval::new(groups)));
    }

    fn stop(&mut self) -> Vec<Reading> {
        let none = |quantity| vec![Reading::new(&metrics::ENERGY, Scope::Device, "RAPL", quantity)];
        match (&self.groups, self.running.take()) {
            (Err(reason), _) => none(Quantity::Unavailable { reason: reason.clone() }),
            (Ok(_), None) => none(Quantity::not_started()),
            (Ok(_), Some(running)) => running.finish(|interval| interval.readings()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::{Tree, tree};

    const SECOND: u64 = 1_000_000_000;

    /// Two packages with cores and memory inside, a platform domain, and the first package again by another interface.
    fn server() -> Tree {
        let dir = tree(&[]);
        let domains = [
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:1:0", "uncore"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ];
        for (folder, name) in domains {
            dir.write(&format!("{folder}/name"), &format!("{name}\n"));
            dir.write(&format!("{folder}/max_energy_range_uj"), "262143328850\n");
            dir.write(&format!("{folder}/energy_uj"), "1000000\n");
        }
        dir
    }

    fn value(interval: &Interval, sensor: &str) -> Quantity {
        let reading = interval.readings().into_iter().find(|r| r.sensor == sensor);
        reading.unwrap_or_else(|| panic!("{sensor} in {:?}", interval.readings())).quantity
    }

    #[test]
    fn packages_add_up_and_what_is_nested_does_not() {
        let dir = server();
        let groups = groups(dir.path()).expect("packages");
        let mut interval = Interval::new(&groups);
        interval.update(0);
        for folder in ["intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1:0", "intel-rapl-mmio:0"] {
            dir.write(&format!("{folder}/energy_uj"), "3000000\n");
        }
        dir.write("intel-rapl:0:1/energy_uj", "1500000\n");
        dir.write("intel-rapl:1/energy_uj", "4000000\n");
        dir.write("intel-rapl:2/energy_uj", "9000000\n");
        interval.update(SECOND);
        assert_eq!(value(&interval, "RAPL package-0 + package-1"), Quantity::Measured { value: 5.0 });
        assert_eq!(value(&interval, "RAPL dram 0:1"), Quantity::Measured { value: 0.5 });
        assert_eq!(value(&interval, "RAPL psys"), Quantity::Measured { value: 8.0 });
        assert_eq!(interval.readings().len(), 3);
    }

    #[test]
    fn a_wrap_is_seen_and_a_reset_is_not_taken_for_one() {
        let range = Some(262_143_328_850);
        assert_eq!(difference(262_143_000_000, 1_000_000, range, 1.0), Ok(1_328_850));
        assert!(difference(5_000_000, 1_000_000, range, 1.0).is_err_and(|e| e.contains("went back")));
        assert!(difference(5_000_000, 1_000_000, None, 1.0).is_err());
        assert!(difference(u64::MAX, 0, range, 1e9).is_err());
        let dir = server();
        let groups = groups(dir.path()).expect("packages");
        let mut interval = Interval::new(&groups);
        dir.write("intel-rapl:0/energy_uj", "262143000000\n");
        interval.update(0);
        dir.write("intel-rapl:0/energy_uj", "1000000\n");
        interval.update(SECOND);
        dir.write("intel-rapl:0/energy_uj", "3000000\n");
        interval.update(2 * SECOND);
        assert_eq!(value(&interval, "RAPL package-0 + package-1"), Quantity::Measured { value: 3.328_85 });
        // A counter that stood still is not 0 J.
        assert!(matches!(value(&interval, "RAPL psys"), Quantity::Unavailable { .. }));
        dir.write("intel-rapl:1/energy_uj", "5\n");
        interval.update(3 * SECOND);
        let Quantity::Unavailable { reason } = value(&interval, "RAPL package-0 + package-1") else {
            panic!("set back")
        };
        assert!(reason.contains("went back from 1000000 to 5"));
    }

    #[test]
    fn unreadable_counters_say_why() {
        let dir = server();
        let groups = groups(dir.path()).expect("packages");
        for break_it in [
            (|path: &Path| fs::write(path, "lots")) as fn(&Path) -> std::io::Result<()>,
            |path: &Path| fs::remove_file(path).and_then(|()| fs::create_dir(path)),
            |path: &Path| fs::remove_dir(path),
        ] {
            break_it(&dir.path().join("intel-rapl:1/energy_uj")).expect("broken");
            let mut interval = Interval::new(&groups);
            interval.update(0);
            let quantity = value(&interval, "RAPL package-0 + package-1");
            assert!(matches!(quantity, Quantity::Unavailable { reason } if reason.contains("intel-rapl:1")));
        }
    }

    #[test]
    fn no_packages_say_what_would_help() {
        for dir in [tree(&[("intel-rapl/enabled", "1"), ("intel-rapl:0/nothing", "")]), tree(&[])] {
            assert!(groups(dir.path()).is_err_and(|reason| reason.contains("virtual machines")));
        }
    }

    #[test]
    fn the_meter_reads_or_gives_a_reason() {
        let dir = server();
        let mut meter = Rapl { groups: groups(dir.path()), running: None };
        assert!(matches!(&meter.stop()[0].quantity, Quantity::Unavailable { reason } if reason.contains("started")));
        meter.start();
        dir.write("intel-rapl:0/energy_uj", "2000000\n");
        assert_eq!(meter.stop()[0].quantity, Quantity::Measured { value: 1.0 });
        let mut meter = Rapl { groups: groups(tree(&[]).path()), running: None };
        meter.start();
        assert!(matches!(&meter.stop()[0].quantity, Quantity::Unavailable { reason } if reason.contains("RAPL")));
    }
}
