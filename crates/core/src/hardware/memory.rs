//! Memory of the machine, and what a container leaves of it.

use std::path::Path;

use super::{Memory, cgroup};

/// Memory from `/proc/meminfo` and the control groups on Linux, from `sysinfo` elsewhere; `root` is `/` outside tests.
pub(super) fn probe(root: &Path) -> Memory {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let mut memory = parse_meminfo(&text).or_else(from_sysinfo).unwrap_or_default();
    let limits = cgroup::limits(root);
    memory.limit_bytes = limits.memory.filter(|&limit| memory.total_bytes.is_none_or(|total| limit < total));
    if let (Some(_), Some(left)) = (memory.limit_bytes, limits.memory_left) {
        memory.available_bytes = Some(memory.available_bytes.map_or(left, |available| available.min(left)));
    }
    memory
}

fn from_sysinfo() -> Option<Memory> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let known = |bytes: u64| (bytes > 0).then_some(bytes);
    Some(Memory {
        total_bytes: Some(known(system.total_memory())?),
        available_bytes: known(system.available_memory()),
        limit_bytes: None,
        swap_used_bytes: known(system.total_swap()).map(|_| system.used_swap()),
    })
}

/// Needs `MemTotal`; kernels before 3.14 lack `MemAvailable`, for which free memory and page cache stand in.
fn parse_meminfo(text: &str) -> Option<Memory> {
    let bytes = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let free = || Some(bytes("MemFree")?.saturating_add(bytes("Cached").unwrap_or(0)));
    Some(Memory {
        total_bytes: Some(bytes("MemTotal")?),
        available_bytes: bytes("MemAvailable").or_else(free),
        limit_bytes: None,
        swap_used_bytes: bytes("SwapTotal").zip(bytes("SwapFree")).map(|(total, free)| total.saturating_sub(free)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::tree;

    const MEMINFO: &str = "MemTotal:       16384000 kB\nMemFree:  1024 kB\nMemAvailable:    8192000 kB\n\
                           SwapCached: 5 kB\nSwapTotal:       2048 kB\nSwapFree:        1024 kB\n";

    #[test]
    fn reads_meminfo() {
        let memory = probe(tree(&[("proc/meminfo", MEMINFO)]).path());
        let expected = Memory {
            total_bytes: Some(16_384_000 * 1024),
            available_bytes: Some(8_192_000 * 1024),
            limit_bytes: None,
            swap_used_bytes: Some(1024 * 1024),
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn a_container_leaves_less() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/memory.current", "73741824\n"),
        ]);
        let memory = probe(dir.path());
        assert_eq!((memory.limit_bytes, memory.available_bytes), (Some(1 << 30), Some(1_000_000_000)));
    }

    #[test]
    fn a_limit_above_the_machine_is_none() {
        let dir = tree(&[
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/memory.max", "107374182400\n"),
            ("sys/fs/cgroup/memory.current", "107374182399\n"),
        ]);
        let memory = probe(dir.path());
        assert_eq!((memory.limit_bytes, memory.available_bytes), (None, Some(8_192_000 * 1024)));
    }

    #[test]
    fn old_kernels_and_garbage() {
        let old = parse_meminfo("MemTotal: 100 kB\nMemFree: 10 kB\nCached: 20 kB\n");
        assert_eq!(old.and_then(|m| m.available_bytes), Some(30 * 1024));
        assert_eq!(parse_meminfo("MemTotal: lots\n"), None);
        assert_eq!(parse_meminfo("MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB"), None);
        assert_eq!(parse_meminfo(""), None);
    }
}
