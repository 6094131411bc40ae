//! Conditions that spoil a measurement: a look before, a look after, and what the difference means.

use std::fs;
use std::path::Path;

use super::{cgroup, cpu};
use crate::record::Warning;

/// Part of the machine's CPU time that others may use: beyond it they take a core, cache or bandwidth now and then, and
/// medians move by more than their usual spread of one or two percent.
pub const OTHERS_SHARE: f64 = 0.05;
/// Part of the CPU time that a hypervisor may give to other machines: every stolen slice lands in some sample.
pub const STEAL_SHARE: f64 = 0.01;
/// Change of the clock, either way: results follow it one to one. A tenth is more than a core that boosts changes by
/// from look to look when nothing is wrong.
pub const CLOCK_CHANGE: f64 = 0.1;
/// Pages swapped during the run: fewer than 1 MiB in pages of 4 KiB are the kernel's tidying.
pub const SWAPPED_PAGES: u64 = 256;
/// CPU time below which shares are noise, in ticks of all CPUs (usually of 10 ms, which is also their error).
pub const LEAST_TICKS: u64 = 25;

/// What the machine was doing at one moment. What can't be read is absent, and is not warned of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conditions {
    load_1m: Option<f64>,
    cpus: Option<u32>,
    times: Option<CpuTimes>,
    own_ticks: Option<u64>,
    clock_mhz: Option<f64>,
    throttled: Option<u64>,
    quota: Option<cgroup::Throttling>,
    swapped: Option<u64>,
    powersave: Option<String>,
    on_battery: bool,
}

/// Ticks of all CPUs since the start of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CpuTimes {
    /// Spent on processes and interrupts.
    busy: u64,
    /// Wanted, but given to other virtual machines.
    steal: u64,
    /// Everything, idling included.
    total: u64,
}

impl Conditions {
    /// The conditions now.
    pub fn now() -> Self {
        Self::read(super::root())
    }

    /// The conditions as files below `root` show them, which is `/` outside tests.
    fn read(root: &Path) -> Self {
        let text = |name: &str| fs::read_to_string(root.join(name)).ok();
        let stat = text("proc/stat");
        Self {
            load_1m: super::system::load_1m(root),
            cpus: stat.as_deref().map(count_cpus).filter(|&cpus| cpus > 0),
            times: stat.as_deref().and_then(parse_cpu_times),
            own_ticks: text("proc/self/stat").as_deref().and_then(parse_own_ticks),
            clock_mhz: cpu::clock_mhz(root),
            throttled: thermal_throttling(root),
            quota: cgroup::throttling(root),
            swapped: text("proc/vmstat").as_deref().and_then(parse_swapped),
            powersave: powersave(root),
            on_battery: on_battery(root),
        }
    }
}

/// What spoiled a measurement that ran on `threads` threads between two looks, with the numbers and what would help.
pub fn between(before: &Conditions, after: &Conditions, threads: u32) -> Vec<Warning> {
    let warnings = [
        load(before, after, threads),
        steal(before, after),
        clock(before, after),
        throttling(before, after),
        quota(before, after),
        swap(before, after),
        power(after),
    ];
    let warning = |(kind, message): (&str, String)| Warning { kind: kind.into(), message };
    warnings.into_iter().flatten().map(warning).collect()
}

type Found = Option<(&'static str, String)>;

/// Growth of a counter, if it was there both times.
fn growth(before: Option<u64>, after: Option<u64>) -> Option<u64> {
    Some(after?.saturating_sub(before?))
}

/// Busy, stolen and total ticks between two looks, if they are enough to say anything.
fn ticks(before: &Conditions, after: &Conditions) -> Option<CpuTimes> {
    let (before, after) = (before.times?, after.times?);
    let total = after.total.saturating_sub(before.total);
    let busy = after.busy.saturating_sub(before.busy);
    (total >= LEAST_TICKS).then(|| CpuTimes { busy, steal: after.steal.saturating_sub(before.steal), total })
}

fn load(before: &Conditions, after: &Conditions, threads: u32) -> Found {
    const REMEDY: &str = "stop other programs and measure again";
    if before.times.is_none() || after.times.is_none() {
        // Without CPU times there is the load average, which knows this program's own past too.
        let (load, cpus) = (before.load_1m?, std::thread::available_parallelism().map_or(1, |n| n.get()));
        let room = (cpus as f64 - f64::from(threads)).max(0.0) + 0.5;
        let message =
            format!("load average {load:.2} before the run, on {cpus} CPUs of which it uses {threads}; {REMEDY}");
        return (load > room).then_some(("load", message));
    }
    let times = ticks(before, after)?;
    let others = times.busy.saturating_sub(growth(before.own_ticks, after.own_ticks)?) as f64 / times.total as f64;
    let cpus = after.cpus.unwrap_or(1);
    let load = before.load_1m.map_or(String::new(), |load| format!(" (load average before: {load:.2})"));
    let message = format!(
        "other programs used {:.2} of {cpus} CPUs during the run, {:.0} % of the machine{load}; {REMEDY}",
        others * f64::from(cpus),
        others * 100.0,
    );
    (others > OTHERS_SHARE).then_some(("load", message))
}

fn steal(before: &Conditions, after: &Conditions) -> Found {
    let times = ticks(before, after)?;
    let share = times.steal as f64 / times.total as f64;
    let message = format!(
        "the hypervisor gave {:.1} % of this machine's CPU time to others during the run; use a dedicated instance, or \
         measure again at another time",
        share * 100.0
    );
    (share > STEAL_SHARE).then_some(("steal", message))
}

fn clock(before: &Conditions, after: &Conditions) -> Found {
    let (before, after) = (before.clock_mhz?, after.clock_mhz?);
    let change = after / before - 1.0;
    let message = format!(
        "the clock went from {before:.0} to {after:.0} MHz ({:+.0} %) over the run; warm up for longer, use the \
         performance governor, or switch boosting off",
        change * 100.0
    );
    (change.abs() > CLOCK_CHANGE).then_some(("frequency", message))
}

fn throttling(before: &Conditions, after: &Conditions) -> Found {
    let times = growth(before.throttled, after.throttled).filter(|&times| times > 0)?;
    Some((
        "throttling",
        format!("the CPU throttled {times} times for heat during the run; cool it, or run fewer threads"),
    ))
}

fn quota(before: &Conditions, after: &Conditions) -> Found {
    let (before, after) = (before.quota?, after.quota?);
    let times = after.times.saturating_sub(before.times);
    let ms = after.nanoseconds.saturating_sub(before.nanoseconds) as f64 / 1e6;
    let message = format!(
        "the container's CPU quota stopped this process {times} times, for {ms:.0} ms in all; use fewer threads, or \
         raise the quota"
    );
    (times > 0).then_some(("throttling", message))
}

fn swap(before: &Conditions, after: &Conditions) -> Found {
    let pages = growth(before.swapped, after.swapped)?;
    let message =
        format!("the system swapped {pages} pages in and out during the run; free memory, or run a smaller cell");
    (pages >= SWAPPED_PAGES).then_some(("swap", message))
}

fn power(after: &Conditions) -> Found {
    if after.on_battery {
        return Some(("power", "the machine runs on battery, which lowers its clocks; plug it in".into()));
    }
    let setting = after.powersave.as_ref()?;
    Some(("power", format!("the CPU is set to save power ({setting}); `sudo cpupower frequency-set -g performance`")))
}

/// The line `cpu  user nice system idle iowait irq softirq steal guest guest_nice` of `/proc/stat`. Guest time is
/// part of user time.
fn parse_cpu_times(stat: &str) -> Option<CpuTimes> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let [user, nice, system, idle, iowait, irq, softirq] = *fields.first_chunk::<7>()?;
    let steal = fields.get(7).copied().unwrap_or(0);
    let busy = [user, nice, system, irq, softirq].into_iter().try_fold(0, u64::checked_add)?;
    let total = [busy, idle, iowait, steal].into_iter().try_fold(0, u64::checked_add)?;
    Some(CpuTimes { busy, steal, total })
}

fn count_cpus(stat: &str) -> u32 {
    let numbered =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    stat.lines().filter(numbered).count() as u32
}

/// User and system ticks of `/proc/self/stat`: the 12th and 13th field after the name, which may hold anything but ends
/// at the last parenthesis.
fn parse_own_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)
}

/// Pages swapped in and out since the start of the machine, from `/proc/vmstat`.
fn parse_swapped(vmstat: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = vmstat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.trim().parse::<u64>().ok()
    };
    field("pswpin")?.checked_add(field("pswpout")?)
}

/// Times that cores have throttled for heat; absent where the CPU does not count them.
fn thermal_throttling(root: &Path) -> Option<u64> {
    let counts = cpu::cpu_dirs(root).into_iter().filter_map(|dir| {
        fs::read_to_string(dir.join("thermal_throttle/core_throttle_count")).ok()?.trim().parse::<u64>().ok()
    });
    counts.reduce(u64::saturating_add)
}

/// The setting that keeps clocks down. Drivers that steer the clock in hardware call their normal mode `powersave`, so
/// there the preference counts instead.
fn powersave(root: &Path) -> Option<String> {
    let dirs = cpu::cpu_dirs(root);
    let text = |name: &str| {
        let path = dirs.first()?.join("cpufreq").join(name);
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    let found = match text("energy_performance_preference") {
        Some(preference) => Some(preference).filter(|p| p == "power" || p == "balance_power"),
        None => {
            let steered = text("scaling_driver").is_some_and(|driver| driver == "intel_pstate");
            text("scaling_governor").filter(|governor| governor == "powersave" && !steered)
        }
    };
    found.map(|setting| format!("cpufreq: {setting}"))
}

/// Whether no mains supply is online and a battery of the machine discharges.
fn on_battery(root: &Path) -> bool {
    let supplies = fs::read_dir(root.join("sys/class/power_supply")).into_iter().flatten().flatten();
    let (mut mains, mut discharging) = (false, false);
    for supply in supplies {
        let is = |name: &str, value: &str| {
            fs::read_to_string(supply.path().join(name)).is_ok_and(|text| text.trim() == value)
        };
        mains |= (is("type", "Mains") || is("type", "USB")) && is("online", "1");
        // Batteries of mice and keyboards have the scope `Device`.
        discharging |= is("type", "Battery") && is("status", "Discharging") && !is("scope", "Device");
    }
    discharging && !mains
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::tree;

    const BEFORE: &[(&str, &str)] = &[
        ("proc/loadavg", "0.10 0.2 0.3 1/86 16795\n"),
        ("proc/stat", "cpu  1000 0 100 8000 50 0 10 20 0 0\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nctxt 5\n"),
        ("proc/self/stat", "42 (a) b) c) R 1 2 3 4 5 6 7 8 9 10 500 100 0 0\n"),
        ("proc/vmstat", "nr_free 1\npswpin 10\npswpout 20\n"),
        ("proc/cpuinfo", "cpu MHz\t: 3000.0\n"),
        ("sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3\n"),
        ("proc/self/cgroup", "0::/\n"),
        ("proc/self/mountinfo", "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
        ("sys/fs/cgroup/cpu.stat", "nr_throttled 1\nthrottled_usec 1000\n"),
    ];

    /// Conditions in which the files given replace those of [`BEFORE`].
    fn with(files: &[(&str, &str)]) -> Conditions {
        let dir = tree(BEFORE);
        for (name, text) in files {
            dir.write(name, text);
        }
        Conditions::read(dir.path())
    }

    fn kinds(after: &[(&str, &str)]) -> Vec<(String, String)> {
        between(&with(&[]), &with(after), 2).into_iter().map(|w| (w.kind, w.message)).collect()
    }

    #[test]
    fn quiet_runs_have_no_warnings() {
        assert_eq!(kinds(&[]), []);
        // 190 of 200 busy ticks are our own; the other 10 are 5 % of 200, just tolerated.
        let ours = [
            ("proc/stat", "cpu  1200 0 100 8000 50 0 10 20 0 0\ncpu0 1\ncpu1 1\n"),
            ("proc/self/stat", "42 (x) R 1 2 3 4 5 6 7 8 9 10 690 100 0 0\n"),
            ("proc/vmstat", "pswpin 11\npswpout 20\n"),
            ("proc/cpuinfo", "cpu MHz\t: 2900.0\n"),
        ];
        assert_eq!(kinds(&ours), []);
        // Too few ticks to say anything.
        assert_eq!(kinds(&[("proc/stat", "cpu  1020 0 100 8000 50 0 10 20 0 0\ncpu0 1\n")]), []);
    }

    #[test]
    fn each_condition_is_named_with_its_numbers() {
        let expect = |after: &[(&str, &str)], kind: &str, part: &str| {
            let found = kinds(after);
            assert!(found.len() == 1 && found[0].0 == kind && found[0].1.contains(part), "{found:?}");
        };
        // 100 of 200 ticks by others: one of two CPUs.
        expect(&[("proc/stat", "cpu  1100 0 100 8100 50 0 10 20 0 0\ncpu0 1\ncpu1 1\n")], "load", "1.00 of 2 CPUs");
        expect(&[("proc/stat", "cpu  1000 0 100 8190 50 0 10 30 0 0\ncpu0 1\n")], "steal", "5.0 %");
        expect(&[("proc/cpuinfo", "cpu MHz\t: 2400.0\n")], "frequency", "3000 to 2400 MHz (-20 %)");
        let throttle = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count";
        expect(&[(throttle, "5\n")], "throttling", "2 times for heat");
        expect(
            &[("sys/fs/cgroup/cpu.stat", "nr_throttled 4\nthrottled_usec 26000\n")],
            "throttling",
            "3 times, for 25 ms",
        );
        expect(&[("proc/vmstat", "pswpin 1010\npswpout 20\n")], "swap", "1000 pages");
    }

    #[test]
    fn power_settings() {
        let cpufreq = |name: &str| format!("sys/devices/system/cpu/cpu0/cpufreq/{name}");
        let (governor, driver, preference) =
            (cpufreq("scaling_governor"), cpufreq("scaling_driver"), cpufreq("energy_performance_preference"));
        let found = |files: &[(&str, &str)]| kinds(files).into_iter().any(|(kind, _)| kind == "power");
        assert!(found(&[(&governor, "powersave\n"), (&driver, "acpi-cpufreq\n")]));
        assert!(!found(&[(&governor, "powersave\n"), (&driver, "intel_pstate\n")]));
        assert!(!found(&[(&governor, "powersave\n"), (&preference, "balance_performance\n")]));
        assert!(found(&[(&governor, "powersave\n"), (&preference, "power\n")]));
        assert!(!found(&[(&governor, "performance\n")]));
        let battery = [
            ("sys/class/power_supply/BAT0/type", "Battery\n"),
            ("sys/class/power_supply/BAT0/status", "Discharging\n"),
        ];
        assert!(found(&battery));
        let plugged = [("sys/class/power_supply/AC/type", "Mains\n"), ("sys/class/power_supply/AC/online", "1\n")];
        assert!(!found(&[battery, plugged].concat()));
        assert!(!found(&[battery.as_slice(), &[("sys/class/power_supply/BAT0/scope", "Device\n")]].concat()));
    }

    #[test]
    fn without_cpu_times_the_load_average_stands_in() {
        let loaded = Conditions { load_1m: Some(1e6), ..Conditions::default() };
        let idle = Conditions { load_1m: Some(0.0), ..Conditions::default() };
        assert_eq!(between(&loaded, &loaded, 1).first().map(|w| w.kind.clone()).as_deref(), Some("load"));
        assert_eq!(between(&idle, &idle, 1), []);
    }

    #[test]
    fn garbage_is_absent_and_counters_that_go_back_are_nothing() {
        assert_eq!(parse_cpu_times("cpu  1 2 x\n"), None);
        assert_eq!(parse_cpu_times("cpu  1 2 3\n"), None);
        assert_eq!(parse_cpu_times("cpu  18446744073709551615 1 1 1 1 1 1\n"), None);
        assert_eq!(parse_own_ticks("42 (x R 1"), None);
        assert_eq!(parse_own_ticks("42 (x) R 1 2"), None);
        assert_eq!(parse_swapped("pswpin 1\n"), None);
        let empty = Conditions::read(tree(&[("proc/loadavg", "x"), ("proc/stat", "\u{0}")]).path());
        assert_eq!(between(&empty, &empty, 1), []);
        assert_eq!(between(&with(&[("proc/stat", "cpu 9999 0 0 99999 0 0 0 9999\n")]), &with(&[]), 1), []);
    }
}
