//! The CPU: from `/proc` and `/sys` on Linux, from `sysinfo` elsewhere; instruction sets by asking the CPU.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{Cache, CoreKind, Cpu, cgroup, system};

/// The CPU as seen below `root`, which is `/` outside tests.
pub(super) fn probe(root: &Path) -> Cpu {
    let info = parse_cpuinfo(&read(root, "proc/cpuinfo").unwrap_or_default());
    let cpus = cpu_dirs(root);
    let (sockets, cores) = topology(&cpus).or(info.topology).unzip();
    let fallback = if info.model.is_some() { None } else { from_sysinfo() };
    let machine_threads = match (cpus.len(), info.processors) {
        (0, 0) => parallelism(),
        (0, listed) => listed,
        (online, _) => online as u32,
    };
    let quota = cgroup::limits(root).cpus;
    let allowed = affinity(root).map_or_else(parallelism, |cpus| cpus.len() as u32);
    let clock = clock_mhz(root).or_else(|| fallback.as_ref().and_then(|f| f.clock_mhz));
    let governors: BTreeSet<String> =
        cpus.iter().filter_map(|dir| read(dir, "cpufreq/scaling_governor")).map(|g| g.trim().to_owned()).collect();
    Cpu {
        model: info
            .model
            .or_else(|| fallback.as_ref().and_then(|f| f.model.clone()))
            .unwrap_or_else(|| format!("{} of unknown model", std::env::consts::ARCH)),
        vendor: info.vendor.or_else(|| fallback.as_ref().and_then(|f| f.vendor.clone())),
        arch: std::env::consts::ARCH.into(),
        sockets,
        cores: cores.or_else(|| fallback.as_ref().and_then(|f| f.cores)),
        threads: machine_threads,
        usable_threads: usable(allowed, quota),
        core_kinds: core_kinds(root, &cpus),
        quota,
        numa_nodes: numa_nodes(root),
        caches: caches(&cpus),
        isa: isa(),
        clock_mhz: clock,
        max_clock_mhz: khz(&cpus, "cpufreq/cpuinfo_max_freq"),
        governor: (!governors.is_empty()).then(|| governors.into_iter().collect::<Vec<_>>().join(", ")),
        virtualization: system::virtualization(root),
        emulator: system::emulator(root),
    }
}

/// Clock of the fastest-running CPU now, in MHz: the one that works, where others idle.
pub(super) fn clock_mhz(root: &Path) -> Option<f64> {
    let listed = || parse_cpuinfo(&read(root, "proc/cpuinfo")?).mhz;
    khz(&cpu_dirs(root), "cpufreq/scaling_cur_freq").or_else(listed)
}

/// Whole CPUs that this process can keep busy without being stopped: affinity, cut by the quota rounded down.
fn usable(allowed: u32, quota: Option<f64>) -> u32 {
    let quota = quota.map_or(u32::MAX, |q| q.floor().clamp(1.0, f64::from(u32::MAX)) as u32);
    allowed.min(quota).max(1)
}

fn parallelism() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// What `sysinfo` knows where `/proc/cpuinfo` is missing.
struct Fallback {
    model: Option<String>,
    vendor: Option<String>,
    cores: Option<u32>,
    clock_mhz: Option<f64>,
}

fn from_sysinfo() -> Option<Fallback> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_cpu_all();
    let text = |s: &str| Some(s.trim()).filter(|s| !s.is_empty()).map(str::to_owned);
    let clocks = system.cpus().iter().map(|cpu| cpu.frequency());
    Some(Fallback {
        model: system.cpus().first().and_then(|cpu| text(cpu.brand())),
        vendor: system.cpus().first().and_then(|cpu| text(cpu.vendor_id())),
        cores: sysinfo::System::physical_core_count().ok().map(|n| n as u32),
        clock_mhz: clocks.max().filter(|&mhz| mhz > 0).map(|mhz| mhz as f64),
    })
}

/// What `/proc/cpuinfo` says.
#[derive(Debug, Clone, PartialEq, Default)]
struct CpuInfo {
    model: Option<String>,
    vendor: Option<String>,
    processors: u32,
    /// Sockets and cores.
    topology: Option<(u32, u32)>,
    /// Highest clock in the list.
    mhz: Option<f64>,
}

fn parse_cpuinfo(text: &str) -> CpuInfo {
    let mut info = CpuInfo::default();
    let (mut implementer, mut part) = (None, None);
    let (mut socket, mut cores) = (String::new(), BTreeSet::new());
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if value.is_empty() {
            continue;
        }
        match key.trim() {
            "processor" if value.parse::<u32>().is_ok() => info.processors += 1,
            "model name" => info.model = info.model.or_else(|| Some(value.to_owned())),
            "vendor_id" => info.vendor = info.vendor.or_else(|| Some(value.to_owned())),
            "cpu MHz" => {
                let mhz = value.parse::<f64>().ok().filter(|mhz| mhz.is_finite() && *mhz > 0.0);
                info.mhz = mhz.into_iter().chain(info.mhz).reduce(f64::max);
            }
            "physical id" => socket = value.to_owned(),
            "core id" => {
                cores.insert((socket.clone(), value.to_owned()));
            }
            "CPU implementer" => implementer = Some(value.to_owned()),
            // The last core listed is the fastest one of big.LITTLE systems.
            "CPU part" => part = Some(value.to_owned()),
            _ => {}
        }
    }
    if !cores.is_empty() {
        let sockets: BTreeSet<&String> = cores.iter().map(|(socket, _)| socket).collect();
        info.topology = Some((sockets.len() as u32, cores.len() as u32));
    }
    if let (Some(implementer), Some(part)) = (implementer, part) {
        let (vendor, model) = arm_names(&implementer, &part);
        info.vendor = info.vendor.or(Some(vendor));
        info.model = info.model.or(Some(model));
    }
    info
}

/// Names behind the numbers of the MIDR register that Linux prints on Arm (Arm's and the makers' reference manuals).
fn arm_names(implementer: &str, part: &str) -> (String, String) {
    let vendor = match implementer {
        "0x41" => "Arm",
        "0x46" => "Fujitsu",
        "0x48" => "HiSilicon",
        "0x4e" => "NVIDIA",
        "0x51" => "Qualcomm",
        "0x61" => "Apple",
        "0x6d" => "Microsoft",
        "0xc0" => "Ampere",
        other => other,
    };
    let model = match (implementer, part) {
        ("0x41", "0xd03") => "Cortex-A53",
        ("0x41", "0xd08") => "Cortex-A72",
        ("0x41", "0xd0b") => "Cortex-A76",
        ("0x41", "0xd0c") => "Neoverse N1",
        ("0x41", "0xd40") => "Neoverse V1",
        ("0x41", "0xd49") => "Neoverse N2",
        ("0x41", "0xd4f") => "Neoverse V2",
        ("0x41", "0xd81") => "Cortex-A720",
        ("0x41", "0xd83") => "Neoverse V3AE",
        ("0x41", "0xd84") => "Neoverse V3",
        ("0x41", "0xd8e") => "Neoverse N3",
        ("0x46", "0x001") => "A64FX",
        ("0x48", "0xd01") => "Kunpeng 920",
        ("0xc0", "0xac3") => "Ampere-1",
        ("0xc0", "0xac4") => "Ampere-1A",
        (_, part) => return (vendor.to_owned(), format!("{vendor} CPU, part {part}")),
    };
    (vendor.to_owned(), format!("{vendor} {model}"))
}

/// CPUs that this thread may run on, where the system says so.
pub(super) fn affinity(root: &Path) -> Option<BTreeSet<u32>> {
    parse_affinity(&read(root, "proc/thread-self/status")?)
}

/// `Cpus_allowed_list: 0-3,8` of `/proc/thread-self/status`.
fn parse_affinity(status: &str) -> Option<BTreeSet<u32>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cpu_list(list).filter(|cpus| !cpus.is_empty())
}

/// The kernel's list format: `0-3,8`. Hostile ranges are refused.
fn cpu_list(text: &str) -> Option<BTreeSet<u32>> {
    const MOST_CPUS: u32 = 1 << 16;
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first || last >= MOST_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Folders `cpu0`, `cpu1`, … of CPUs that are online.
pub(super) fn cpu_dirs(root: &Path) -> Vec<PathBuf> {
    let dir = root.join("sys/devices/system/cpu");
    let online = read(&dir, "online").as_deref().and_then(cpu_list);
    let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("cpu")?.parse::<u32>().ok();
    let mut found: Vec<(u32, PathBuf)> = entries.filter_map(|e| Some((number(&e.path())?, e.path()))).collect();
    found.retain(|(cpu, _)| online.as_ref().is_none_or(|online| online.contains(cpu)));
    found.sort_unstable();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Sockets and physical cores.
fn topology(cpus: &[PathBuf]) -> Option<(u32, u32)> {
    let mut sockets = BTreeSet::new();
    let mut cores = BTreeSet::new();
    for dir in cpus {
        let socket = read(dir, "topology/physical_package_id")?;
        // Core numbers may repeat from die to die.
        let die = read(dir, "topology/die_id").unwrap_or_default();
        cores.insert((socket.clone(), die, read(dir, "topology/core_id")?));
        sockets.insert(socket);
    }
    (!cores.is_empty()).then_some((sockets.len() as u32, cores.len() as u32))
}

/// Kinds of core: Intel's by their PMU, Arm's by their capacity relative to the fastest (1024).
fn core_kinds(root: &Path, cpus: &[PathBuf]) -> Vec<CoreKind> {
    let intel = ["cpu_core", "cpu_atom", "cpu_lowpower"].into_iter().filter_map(|name| {
        let list = cpu_list(&read(root, &format!("sys/devices/{name}/cpus"))?)?;
        Some(CoreKind { name: name.into(), threads: list.len() as u32 })
    });
    let mut kinds: Vec<CoreKind> = intel.filter(|kind| kind.threads > 0).collect();
    if kinds.is_empty() {
        let mut capacities: BTreeMap<u32, u32> = BTreeMap::new();
        for capacity in cpus.iter().filter_map(|dir| read(dir, "cpu_capacity")?.trim().parse().ok()) {
            *capacities.entry(capacity).or_default() += 1;
        }
        let kind = |(capacity, threads)| CoreKind { name: format!("capacity-{capacity}"), threads };
        kinds = capacities.into_iter().rev().map(kind).collect();
    }
    if kinds.len() < 2 { Vec::new() } else { kinds }
}

fn numa_nodes(root: &Path) -> Option<u32> {
    let online = read(root, "sys/devices/system/node/online")?;
    cpu_list(&online).map(|nodes| nodes.len() as u32).filter(|&n| n > 0)
}

/// Distinct caches with the number of their instances, by level.
fn caches(cpus: &[PathBuf]) -> Vec<Cache> {
    let mut instances = BTreeSet::new();
    for (cpu, dir) in cpus.iter().enumerate() {
        for entry in fs::read_dir(dir.join("cache")).into_iter().flatten().flatten() {
            let dir = entry.path();
            let kind = read(&dir, "type").map(|kind| kind.trim().to_lowercase());
            let level = read(&dir, "level").and_then(|level| level.trim().parse::<u8>().ok());
            let bytes = read(&dir, "size").as_deref().and_then(parse_size);
            let (Some(kind), Some(level), Some(bytes)) = (kind, level, bytes) else { continue };
            let sharers = read(&dir, "shared_cpu_list").as_deref().and_then(cpu_list);
            let sharers = sharers.filter(|s| !s.is_empty()).unwrap_or_else(|| BTreeSet::from([cpu as u32]));
            instances.insert((level, kind, bytes, sharers));
        }
    }
    let mut caches: BTreeMap<(u8, String, u64, usize), u32> = BTreeMap::new();
    for (level, kind, bytes, sharers) in instances {
        *caches.entry((level, kind, bytes, sharers.len())).or_default() += 1;
    }
    let cache = |((level, kind, bytes, shared_by), instances)| Cache {
        level,
        kind,
        bytes,
        shared_by: shared_by as u32,
        instances,
    };
    caches.into_iter().map(cache).collect()
}

/// `32K`, `2M`.
fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let shift = match text.chars().last()? {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        _ => 0,
    };
    let number = if shift == 0 { text } else { &text[..text.len() - 1] };
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|&bytes| bytes > 0)
}

/// Highest of a per-CPU number in kHz, in MHz.
fn khz(cpus: &[PathBuf], name: &str) -> Option<f64> {
    let clocks = cpus.iter().filter_map(|dir| read(dir, name)?.trim().parse::<u64>().ok());
    clocks.max().filter(|&khz| khz > 0).map(|khz| khz as f64 / 1e3)
}

fn read(dir: &Path, name: &str) -> Option<String> {
    fs::read_to_string(dir.join(name)).ok()
}

/// Names of those features that this CPU, and the system under it, has.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! detected {
    ($detect:ident: $($name:tt),*) => {
        [$(($name, std::arch::$detect!($name))),*].into_iter().filter_map(|(name, has)| has.then(|| name.to_owned()))
    };
}

#[cfg(target_arch = "x86_64")]
fn isa() -> Vec<String> {
    let known = detected!(
        is_x86_feature_detected: "sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl",
        "avx512dq", "avx512vnni", "avx512bf16", "avx512fp16"
    );
    known.chain(amx()).collect()
}

/// AMX tiles, for which std has no stable name: bits of CPUID leaf 7, and tile state enabled in XCR0 by the system.
#[cfg(target_arch = "x86_64")]
fn amx() -> Vec<String> {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const TILE_STATE: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        #[expect(unsafe_code, reason = "xgetbv has no safe form")]
        // SAFETY: register 0 always exists where the system uses XSAVE, which the caller checked.
        unsafe {
            _xgetbv(0)
        }
    }
    if __cpuid(0).eax < 7 || !std::arch::is_x86_feature_detected!("xsave") {
        return Vec::new();
    }
    #[expect(unsafe_code, reason = "calls a function compiled for `xsave`")]
    // SAFETY: `xsave` was detected, which std reports only where the system has enabled it (OSXSAVE).
    let enabled = unsafe { xcr0() } & TILE_STATE == TILE_STATE;
    let edx = __cpuid_count(7, 0).edx;
    let bits = [("amx-tile", 24), ("amx-bf16", 22), ("amx-int8", 25)];
    bits.into_iter().filter(|(_, bit)| enabled && edx >> bit & 1 == 1).map(|(name, _)| name.to_owned()).collect()
}

#[cfg(target_arch = "aarch64")]
fn isa() -> Vec<String> {
    detected!(is_aarch64_feature_detected: "neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2").collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn isa() -> Vec<String> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::test_tree::{Tree, tree};

    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: 12th Gen Intel(R) Core(TM) i5-1240P\n\
                         cpu MHz\t\t: 2100.000\nphysical id\t: 0\ncore id\t\t: 0\nflags\t\t: fpu avx2\n\n\
                         processor\t: 1\nmodel name\t: 12th Gen Intel(R) Core(TM) i5-1240P\ncpu MHz\t\t: 4388.125\n\
                         physical id\t: 0\ncore id\t\t: 0\n";

    /// Two threads of one performance core, and two efficiency cores that share an L2.
    fn hybrid_laptop() -> Tree {
        let dir = tree(&[
            ("proc/cpuinfo", INTEL),
            ("proc/thread-self/status", "Name:\tx\nCpus_allowed:\tf\nCpus_allowed_list:\t0-2\n"),
            ("sys/devices/system/cpu/online", "0-3\n"),
            ("sys/devices/system/node/online", "0\n"),
            ("sys/devices/cpu_core/cpus", "0-1\n"),
            ("sys/devices/cpu_atom/cpus", "2-3\n"),
            ("sys/devices/system/cpu/cpu9/topology/core_id", "9\n"),
            ("sys/devices/system/cpu/cpufreq/x", ""),
        ]);
        let l2 = [("0-1", "1280K"), ("0-1", "1280K"), ("2-3", "2M"), ("2-3", "2M")];
        for (cpu, (core, max)) in
            [(0, 4_400_000), (0, 4_400_000), (8, 3_300_000), (9, 3_300_000)].into_iter().enumerate()
        {
            let at = format!("sys/devices/system/cpu/cpu{cpu}");
            dir.write(&format!("{at}/topology/physical_package_id"), "0\n");
            dir.write(&format!("{at}/topology/core_id"), &format!("{core}\n"));
            dir.write(&format!("{at}/cpufreq/scaling_governor"), "powersave\n");
            dir.write(&format!("{at}/cpufreq/cpuinfo_max_freq"), &format!("{max}\n"));
            dir.write(&format!("{at}/cpufreq/scaling_cur_freq"), &format!("{}\n", 400_000 + cpu * 100_000));
            for (index, level, kind, size, shared) in [
                (0, 1, "Data", "48K", l2[cpu].0),
                (2, 2, "Unified", l2[cpu].1, l2[cpu].0),
                (3, 3, "Unified", "12288K", "0-3"),
            ] {
                for (name, text) in [
                    ("level", level.to_string()),
                    ("type", kind.into()),
                    ("size", size.into()),
                    ("shared_cpu_list", shared.into()),
                ] {
                    dir.write(&format!("{at}/cache/index{index}/{name}"), &format!("{text}\n"));
                }
            }
        }
        dir
    }

    #[test]
    fn intel_hybrid_laptop() {
        let cpu = probe(hybrid_laptop().path());
        assert_eq!(cpu.model, "12th Gen Intel(R) Core(TM) i5-1240P");
        assert_eq!(cpu.vendor.as_deref(), Some("GenuineIntel"));
        assert_eq!((cpu.sockets, cpu.cores, cpu.threads, cpu.usable_threads), (Some(1), Some(3), 4, 3));
        assert_eq!(cpu.numa_nodes, Some(1));
        assert_eq!((cpu.clock_mhz, cpu.max_clock_mhz), (Some(700.0), Some(4400.0)));
        assert_eq!(cpu.governor.as_deref(), Some("powersave"));
        let kind = |name: &str| CoreKind { name: name.into(), threads: 2 };
        assert_eq!(cpu.core_kinds, [kind("cpu_core"), kind("cpu_atom")]);
        let cache = |level, kind: &str, bytes, shared_by, instances| Cache {
            level,
            kind: kind.into(),
            bytes,
            shared_by,
            instances,
        };
        let expected = [
            cache(1, "data", 48 << 10, 2, 2),
            cache(2, "unified", 1280 << 10, 2, 1),
            cache(2, "unified", 2 << 20, 2, 1),
            cache(3, "unified", 12 << 20, 4, 1),
        ];
        assert_eq!(cpu.caches, expected);
    }

    #[test]
    fn amd_virtual_machine_with_quota() {
        let dir = tree(&[
            (
                "proc/cpuinfo",
                "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2596.096\n\
                 physical id\t: 0\ncore id\t: 0\nflags : fpu hypervisor\n\
                 processor\t: 1\nphysical id\t: 0\ncore id\t: 1\ncpu MHz : nan\n",
            ),
            ("proc/thread-self/status", "Cpus_allowed_list:\t0-1\n"),
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/cpu.max", "150000 100000\n"),
        ]);
        let cpu = probe(dir.path());
        assert_eq!((cpu.model.as_str(), cpu.vendor.as_deref()), ("AMD EPYC", Some("AuthenticAMD")));
        assert_eq!((cpu.sockets, cpu.cores, cpu.threads), (Some(1), Some(2), 2));
        assert_eq!((cpu.quota, cpu.usable_threads), (Some(1.5), 1));
        assert_eq!((cpu.clock_mhz, cpu.max_clock_mhz, cpu.governor), (Some(2596.096), None, None));
        assert!(cpu.core_kinds.is_empty() && cpu.caches.is_empty() && cpu.numa_nodes.is_none());
    }

    #[test]
    fn arm_server_by_numbers() {
        let info = parse_cpuinfo("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n");
        assert_eq!(info.model.as_deref(), Some("Arm Neoverse N1"));
        let info = parse_cpuinfo("CPU implementer\t: 0x99\nCPU part\t: 0x123\n");
        assert_eq!(info.model.as_deref(), Some("0x99 CPU, part 0x123"));
    }

    #[test]
    fn a_missing_or_garbled_tree_still_gives_a_cpu() {
        let dir = tree(&[
            ("proc/cpuinfo", "\u{0}\u{1}:::\nprocessor: x\nmodel name:\n"),
            ("proc/thread-self/status", "Cpus_allowed_list:\t5-1\n"),
            ("sys/devices/system/cpu/online", "zero\n"),
            ("sys/devices/system/node/online", "0-4000000000\n"),
            ("sys/devices/system/cpu/cpu0/cache/index0/size", "manyK\n"),
            ("sys/devices/system/cpu/cpu0/cache/index0/level", "1\n"),
            ("sys/devices/system/cpu/cpu0/cache/index0/type", "Data\n"),
        ]);
        for root in [dir.path(), &dir.path().join("missing")] {
            let cpu = probe(root);
            assert!(!cpu.model.is_empty() && cpu.threads >= 1 && cpu.usable_threads >= 1);
            assert!(cpu.caches.is_empty() && cpu.numa_nodes.is_none() && cpu.sockets.is_none());
        }
    }

    #[test]
    fn lists_sizes_and_quotas() {
        assert_eq!(cpu_list("0-2,8\n").map(|l| l.into_iter().collect::<Vec<_>>()), Some(vec![0, 1, 2, 8]));
        assert_eq!((cpu_list("a"), cpu_list("3-1"), cpu_list("0-99999999")), (None, None, None));
        assert_eq!((parse_size("32K\n"), parse_size("2M"), parse_size("7")), (Some(32 << 10), Some(2 << 20), Some(7)));
        assert_eq!((parse_size("K"), parse_size(""), parse_size("99999999999999999999G")), (None, None, None));
        assert_eq!((usable(8, Some(2.9)), usable(8, Some(0.2)), usable(4, None), usable(0, None)), (2, 1, 4, 1));
    }

    #[test]
    fn isa_is_what_the_target_guarantees_at_least() {
        if cfg!(target_arch = "aarch64") {
            assert!(isa().contains(&"neon".to_owned()));
        }
        if cfg!(target_arch = "x86_64") && isa().contains(&"avx512bf16".to_owned()) {
            assert!(isa().contains(&"avx512f".to_owned()));
        }
    }
}
