//! The machine: what it has and what it can reach.

pub mod conditions;
pub mod peaks;
pub mod sensors;

mod cgroup;
mod cpu;
mod gpu;
mod memory;
mod system;

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use conditions::Conditions;
pub(crate) use gpu::why_not as nvml_why_not;

/// The machine with its measured ceilings, from the cache of this user where they are in it.
///
/// # Errors
/// As for [`peaks::load_or_measure`].
pub fn probe_with_peaks() -> Result<Machine, peaks::PeaksError> {
    let mut machine = probe();
    machine.peaks = Some(peaks::load_or_measure(peaks::default_cache_dir().as_deref(), false, &machine)?);
    Ok(machine)
}

/// The machine as far as it can be seen from here. Never fails: what can't be found is absent.
///
/// [`Machine::peaks`] stays empty; [`probe_with_peaks`] fills it.
pub fn probe() -> Machine {
    let root = root();
    let (gpus, gpu_note) = gpu::probe();
    let mut cpu = cpu::probe(root);
    if cpu.emulator.is_some() {
        // what was found is the host's name
        cpu.model = format!("{} emulated on {}", cpu.arch, cpu.model);
    }
    Machine {
        cpu,
        memory: memory::probe(root),
        gpus,
        gpu_note,
        os: system::probe(root),
        load_1m: system::load_1m(root),
        peaks: None,
    }
}

/// Where Linux shows its files; on other systems a folder that can't be, for Wine shows those of the Linux below it to a
/// Windows program.
pub(crate) fn root() -> &'static Path {
    Path::new(if cfg!(target_os = "linux") { "/" } else { "\0" })
}

/// The machine as found, and its measured ceilings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// CPU.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// GPUs seen through NVML.
    pub gpus: Vec<Gpu>,
    /// Why the list of GPUs may be incomplete (`libnvidia-ml.so not found`).
    pub gpu_note: Option<String>,
    /// Operating system.
    pub os: Os,
    /// Load average over the last minute at the time of the probe, where the system keeps one.
    #[serde(default)]
    pub load_1m: Option<f64>,
    /// Ceilings measured on this machine; absent when not (yet) measured.
    pub peaks: Option<Peaks>,
}

impl Machine {
    /// What tells machines apart, in words: `AMD EPYC, 2 usable CPUs, 24 GiB, Debian GNU/Linux 12 (bookworm)`.
    ///
    /// Memory is rounded, because what a system keeps for itself changes with its kernel.
    pub fn name(&self) -> String {
        let memory = self.memory.total_bytes.map(|bytes| format!("{:.0} GiB", bytes as f64 / f64::from(1 << 30)));
        let cpu = [self.cpu.model.clone(), format!("{} usable CPUs", self.cpu.usable_threads)];
        let gpus = self.gpus.iter().map(|gpu| gpu.name.clone());
        cpu.into_iter().chain(memory).chain(gpus).chain([self.os.name.clone()]).collect::<Vec<_>>().join(", ")
    }
}

/// CPU facts. What could not be found is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Cpu {
    /// Model name.
    pub model: String,
    /// Vendor.
    pub vendor: Option<String>,
    /// Architecture: `x86_64`, `aarch64`.
    pub arch: String,
    /// Sockets.
    pub sockets: Option<u32>,
    /// Physical cores.
    pub cores: Option<u32>,
    /// Logical CPUs.
    pub threads: u32,
    /// CPUs this process may use: the least of affinity and container quota.
    pub usable_threads: u32,
    /// Kinds of core on hybrid CPUs (`cpu_core`, `cpu_atom`); empty where all cores are alike.
    #[serde(default)]
    pub core_kinds: Vec<CoreKind>,
    /// CPU quota of the container (cgroup), in CPUs.
    pub quota: Option<f64>,
    /// NUMA nodes.
    pub numa_nodes: Option<u32>,
    /// Caches, per instance.
    pub caches: Vec<Cache>,
    /// Extensions that kernels care about, found at run time: `avx2`, `avx512f`, `neon`.
    pub isa: Vec<String>,
    /// Clock now, in MHz, where it can be read.
    pub clock_mhz: Option<f64>,
    /// Highest clock, in MHz.
    pub max_clock_mhz: Option<f64>,
    /// Frequency governor.
    pub governor: Option<String>,
    /// Hypervisor, container or emulator that this runs under.
    pub virtualization: Option<String>,
    /// What emulates this CPU in software, if it is emulated. Then no speed is recorded as measured.
    #[serde(default)]
    pub emulator: Option<String>,
}

/// One kind of core of a hybrid CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CoreKind {
    /// The kernel's name: `cpu_core` (performance), `cpu_atom` (efficiency), `capacity-446` of 1024.
    pub name: String,
    /// Logical CPUs of this kind.
    pub threads: u32,
}

/// A level of cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cache {
    /// 1, 2 or 3.
    pub level: u8,
    /// `data`, `instruction` or `unified`.
    pub kind: String,
    /// Size of one instance in bytes.
    pub bytes: u64,
    /// Logical CPUs that share one instance.
    pub shared_by: u32,
    /// Instances in the machine.
    pub instances: u32,
}

/// Memory facts in bytes. What could not be found is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// Installed (or given to the virtual machine).
    pub total_bytes: Option<u64>,
    /// Free for new allocations at the time of the probe, the container's limit included.
    pub available_bytes: Option<u64>,
    /// Container limit.
    pub limit_bytes: Option<u64>,
    /// Swap in use.
    pub swap_used_bytes: Option<u64>,
}

/// A GPU through NVML.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gpu {
    /// Index in NVML's order.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// Memory in bytes; absent where the driver won't say.
    pub memory_bytes: Option<u64>,
    /// Compute capability, `9.0`.
    pub compute_capability: Option<String>,
    /// Driver version.
    pub driver: Option<String>,
    /// Power limit in watts.
    pub power_limit_watts: Option<f64>,
}

/// Operating system facts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Os {
    /// `Debian GNU/Linux 12`.
    pub name: String,
    /// Kernel release.
    pub kernel: Option<String>,
}

/// Measured ceilings of the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Peaks {
    /// When, RFC 3339 in UTC.
    pub measured_at: String,
    /// Arithmetic ceilings.
    pub compute: Vec<ComputePeak>,
    /// Bandwidth ceilings past the last-level cache.
    pub bandwidth: Vec<BandwidthPeak>,
    /// Conditions that may have kept the machine below its ceilings while they were measured.
    #[serde(default)]
    pub warnings: Vec<crate::record::Warning>,
}

/// Arithmetic ceiling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ComputePeak {
    /// `f32`, `bf16` or `int8`.
    pub dtype: String,
    /// Instructions used: `avx512f fma 512-bit`.
    pub path: String,
    /// Threads used.
    pub threads: u32,
    /// FLOP/s (for `int8`, operations per second), a multiply-add counted as 2.
    pub flops: f64,
}

/// Bandwidth ceiling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BandwidthPeak {
    /// `read` or `copy` (bytes read plus bytes written).
    pub kind: String,
    /// Threads used.
    pub threads: u32,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Size of the array walked over.
    pub array_bytes: u64,
}

impl Peaks {
    /// Highest FLOP/s for `dtype` at `threads`.
    pub fn flops(&self, dtype: &str, threads: u32) -> Option<f64> {
        let at = self.compute.iter().filter(|p| p.dtype == dtype && p.threads == threads);
        at.map(|p| p.flops).reduce(f64::max)
    }

    /// Read bandwidth at `threads`.
    pub fn read_bandwidth(&self, threads: u32) -> Option<f64> {
        let at = self.bandwidth.iter().filter(|p| p.kind == "read" && p.threads == threads);
        at.map(|p| p.bytes_per_second).reduce(f64::max)
    }
}

/// Fake file trees for the parsers' tests.
#[cfg(test)]
pub(crate) mod test_tree {
    use std::fs;
    use std::path::Path;

    pub(crate) struct Tree(tempfile::TempDir);

    impl Tree {
        pub(crate) fn path(&self) -> &Path {
            self.0.path()
        }

        pub(crate) fn write(&self, name: &str, text: &str) {
            let path = self.path().join(name);
            fs::create_dir_all(path.parent().expect("a file has a folder")).expect("temporary folder is writable");
            fs::write(path, text).expect("temporary file is writable");
        }
    }

    pub(crate) fn tree(files: &[(&str, &str)]) -> Tree {
        let tree = Tree(tempfile::tempdir().expect("temporary folder"));
        for (name, text) in files {
            tree.write(name, text);
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_survives_a_round_trip() {
        let machine = probe();
        assert!(
            !machine.cpu.model.is_empty() && machine.cpu.usable_threads >= 1 && machine.memory.total_bytes > Some(0)
        );
        let text = serde_json::to_string(&machine).expect("a machine serialises");
        assert_eq!(serde_json::from_str::<Machine>(&text).expect("and is read back"), machine);
    }
}
