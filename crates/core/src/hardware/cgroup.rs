//! Limits and pressure that a container (Linux control group, v1 or v2) puts on this process.
//!
//! A limit may sit at any level between the process's own group and the root that is visible to it, so all are read.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// What the control groups say; absent where there is no limit or no such group.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Limits {
    /// CPUs per unit of time.
    pub(crate) cpus: Option<f64>,
    /// Bytes.
    pub(crate) memory: Option<u64>,
    /// Bytes that may still be allocated below the tightest memory limit.
    pub(crate) memory_left: Option<u64>,
}

/// How often, and for how long, the CPU quota stopped the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Throttling {
    pub(crate) times: u64,
    pub(crate) nanoseconds: u64,
}

/// Limits from this process's groups up; `root` is `/` outside tests.
pub(crate) fn limits(root: &Path) -> Limits {
    let mut limits = Limits::default();
    for dir in groups(root, "cpu") {
        let quota = read(&dir.join("cpu.max")).as_deref().and_then(parse_cpu_max).or_else(|| {
            let quota: f64 = read(&dir.join("cpu.cfs_quota_us"))?.trim().parse().ok()?;
            let period: f64 = read(&dir.join("cpu.cfs_period_us"))?.trim().parse().ok()?;
            (quota > 0.0 && period > 0.0).then(|| quota / period)
        });
        limits.cpus = least(limits.cpus, quota);
    }
    for dir in groups(root, "memory") {
        let number = |name: &str| read(&dir.join(name)).as_deref().and_then(parse_bytes);
        let Some(limit) = number("memory.max").or_else(|| number("memory.limit_in_bytes")) else { continue };
        limits.memory = Some(limits.memory.map_or(limit, |m| m.min(limit)));
        let Some(used) = number("memory.current").or_else(|| number("memory.usage_in_bytes")) else { continue };
        // Pages of files that nobody used lately are given back as soon as memory is asked for.
        let stat = read(&dir.join("memory.stat")).unwrap_or_default();
        let cached = field(&stat, "total_inactive_file").or_else(|| field(&stat, "inactive_file")).unwrap_or(0);
        let left = limit.saturating_sub(used.saturating_sub(cached));
        limits.memory_left = Some(limits.memory_left.map_or(left, |m| m.min(left)));
    }
    limits
}

/// How the CPU quota has held this process back so far; absent without a group that counts it.
pub(crate) fn throttling(root: &Path) -> Option<Throttling> {
    let counts = groups(root, "cpu").into_iter().filter_map(|dir| parse_throttling(&read(&dir.join("cpu.stat"))?));
    counts.max_by_key(|t| t.nanoseconds)
}

/// `150000 100000` → 1.5 CPUs; `max 100000` → no quota.
fn parse_cpu_max(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace();
    let quota: f64 = words.next()?.parse().ok()?;
    let period: f64 = words.next().unwrap_or("100000").parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// A number of bytes; `max`, and v1's way of saying it (the largest multiple of a page), are no limit.
fn parse_bytes(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&bytes| bytes < 1 << 60)
}

fn parse_throttling(stat: &str) -> Option<Throttling> {
    let usec = field(stat, "throttled_usec").map(|us| us.saturating_mul(1000));
    Some(Throttling {
        times: field(stat, "nr_throttled")?,
        nanoseconds: usec.or_else(|| field(stat, "throttled_time"))?,
    })
}

/// The number behind `name` in a file of `name number` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.split_once(' ').filter(|(key, _)| *key == name)?.1.trim().parse().ok())
}

fn least(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Folders of the group with `controller` that this process is in, then its ancestors, in v2 and in v1.
fn groups(root: &Path, controller: &str) -> Vec<PathBuf> {
    let membership = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = read(&root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|c| c == controller) {
            continue;
        }
        let Some((mount_root, mount_point)) = mounts.lines().find_map(|m| parse_mount(m, unified, controller)) else {
            continue;
        };
        let Ok(mount_point) = mount_point.strip_prefix("/") else { continue };
        let top = root.join(mount_point);
        // A group outside what is mounted (`/../..` seen from a namespace) leaves the mount itself.
        let inner = Path::new(path).strip_prefix(&mount_root).unwrap_or(Path::new(""));
        let inner = if inner.components().all(|c| matches!(c, Component::Normal(_))) { inner } else { Path::new("") };
        found.extend(inner.ancestors().map(|ancestor| top.join(ancestor)));
    }
    found
}

/// Root and mount point of a cgroup mount in a line of mountinfo, if it is the one looked for.
fn parse_mount(line: &str, unified: bool, controller: &str) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (mount_root, mount_point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let matches = match kind {
        "cgroup2" => unified,
        "cgroup" => !unified && options.split(',').any(|o| o == controller),
        _ => false,
    };
    matches.then(|| (mount_root.into(), mount_point.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::tree;

    const V2_MOUNT: &str = "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn v2_takes_the_tightest_level() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/system.slice/bench.scope\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/system.slice/bench.scope/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/system.slice/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/system.slice/bench.scope/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/system.slice/bench.scope/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/system.slice/bench.scope/memory.stat", "anon 1\ninactive_file 1073741824\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/cpu.stat", "usage_usec 9\nnr_throttled 4\nthrottled_usec 2500\n"),
        ]);
        let gib = 1 << 30;
        assert_eq!(limits(dir.path()), Limits { cpus: Some(1.5), memory: Some(4 * gib), memory_left: Some(2 * gib) });
        assert_eq!(throttling(dir.path()), Some(Throttling { times: 4, nanoseconds: 2_500_000 }));
    }

    #[test]
    fn v1_in_a_container_without_namespace() {
        let dir = tree(&[
            ("proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"),
            (
                "proc/self/mountinfo",
                "40 31 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n\
                 41 31 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.stat", "nr_periods 7\nnr_throttled 3\nthrottled_time 12345\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n"),
        ]);
        assert_eq!(limits(dir.path()), Limits { cpus: Some(0.5), memory: None, memory_left: None });
        assert_eq!(throttling(dir.path()), Some(Throttling { times: 3, nanoseconds: 12345 }));
    }

    #[test]
    fn v1_without_quota() {
        let dir = tree(&[
            ("proc/self/cgroup", "1:cpu:/\n"),
            ("proc/self/mountinfo", "32 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(limits(dir.path()), Limits::default());
    }

    #[test]
    fn a_group_outside_the_mount_leaves_the_mount() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/../../other\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            ("sys/fs/cgroup/cpu.max", "200000 100000\n"),
        ]);
        assert_eq!(limits(dir.path()).cpus, Some(2.0));
    }

    #[test]
    fn garbage_is_no_limit() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/\nnonsense\n\u{0}\n9:\n"),
            ("proc/self/mountinfo", "x\n31 23 - cgroup2\n31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/cpu.max", "0 0\n"),
            ("sys/fs/cgroup/memory.max", "-5\n"),
            ("sys/fs/cgroup/cpu.stat", "nr_throttled many\n"),
        ]);
        assert_eq!(limits(dir.path()), Limits::default());
        assert_eq!(throttling(dir.path()), None);
        assert_eq!(limits(&dir.path().join("missing")), Limits::default());
    }
}
