//! Measured ceilings of the CPU, kept per machine.
//!
//! Arithmetic and bandwidth are measured at one thread and at all usable threads. Each number is the best of many
//! short trials: what disturbs a trial can only slow it down, and a ceiling is what the machine can reach. A trial is
//! shorter than the time for which a scheduler leaves a thread alone. AMX tiles are not measured, as nothing in this
//! project uses them.

mod bandwidth;
mod compute;

use std::collections::TryReserveError;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use serde::{Deserialize, Serialize};

use super::{BandwidthPeak, Cache, ComputePeak, Conditions, Machine, Peaks, conditions, cpu};
use crate::meters::clock;
use crate::record::Warning;

/// Why the ceilings could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum PeaksError {
    /// The array for the bandwidth measurement was refused.
    #[error(
        "measuring bandwidth needs an array of {bytes} bytes, which the system refused: {source}; free memory, or \
         raise the limit of this process (`ulimit -v`)"
    )]
    Memory {
        /// Size asked for.
        bytes: u64,
        /// The allocator's answer.
        source: TryReserveError,
    },
    /// A thread could not be started.
    #[error(
        "measuring peaks needs {threads} threads, one of which could not be started: {source}; raise the limit of \
         processes (`ulimit -u`, or the container's pids limit)"
    )]
    Threads {
        /// Threads wanted.
        threads: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// What an emulator reaches says nothing of the CPU.
    #[error("this CPU is emulated ({emulator}): how fast that is says nothing of the hardware, and is not measured")]
    Emulated {
        /// [`Cpu::emulator`](super::Cpu::emulator).
        emulator: String,
    },
}

/// How long to measure.
#[derive(Debug, Clone, Copy)]
struct Effort {
    trial: Duration,
    compute_trials: usize,
    bandwidth_trials: usize,
    /// Least size of the array that bandwidth is measured on.
    array_bytes: u64,
}

impl Effort {
    /// One to two seconds on a CPU with all kernels.
    const FULL: Self =
        Self { trial: Duration::from_millis(2), compute_trials: 12, bandwidth_trials: 24, array_bytes: 256 << 20 };
}

/// Times the last-level cache that the array must hold, so that no more than a quarter can stay in the cache.
const CACHES_WANTED: u64 = 4;
/// Times the last-level cache below which a result would be the cache's, and is not given.
const CACHES_NEEDED: u64 = 2;
/// Part of the available memory that the array may take.
const MEMORY_SHARE: u64 = 4;
/// Time of one look at the clock's worth of arithmetic, far above what reading the clock takes.
const CHUNK: Duration = Duration::from_micros(50);

/// The ceilings of this machine: from the cache in `cache_dir` if they were measured there by this version, else
/// measured now (one to three seconds) and kept. `refresh` measures in any case.
///
/// A damaged cache is measured again; one that can't be written costs a warning in the log, not the result.
///
/// # Errors
/// [`PeaksError`] where the system refuses memory or threads, or the CPU is emulated.
pub fn load_or_measure(cache_dir: Option<&Path>, refresh: bool, machine: &Machine) -> Result<Peaks, PeaksError> {
    if let Some(emulator) = machine.cpu.emulator.clone() {
        return Err(PeaksError::Emulated { emulator });
    }
    cached(cache_dir, refresh, machine, || measure(machine, Effort::FULL))
}

/// The user's cache folder for roofbench: `ROOFBENCH_CACHE_DIR`, else below `XDG_CACHE_HOME`, `LOCALAPPDATA` or
/// `~/.cache`. Absent where none of these is set.
pub fn default_cache_dir() -> Option<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification says that relative paths are to be ignored.
    let xdg = || set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let base = || xdg().or_else(|| set("LOCALAPPDATA")).or_else(|| Some(set("HOME")?.join(".cache")));
    set("ROOFBENCH_CACHE_DIR").or_else(|| Some(base()?.join("roofbench")))
}

/// What must be the same for kept ceilings to hold.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    version: String,
    optimized: bool,
    model: String,
    usable_threads: u32,
    isa: Vec<String>,
    caches: Vec<Cache>,
}

impl Key {
    fn of(machine: &Machine) -> Self {
        let cpu = &machine.cpu;
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            optimized: !cfg!(debug_assertions),
            model: cpu.model.clone(),
            usable_threads: cpu.usable_threads,
            isa: cpu.isa.clone(),
            caches: cpu.caches.clone(),
        }
    }

    /// `peaks-amd-epyc-2t.json`.
    fn file_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let model: String = self.model.chars().take(64).map(plain).collect();
        format!("peaks-{model}-{}t.json", self.usable_threads)
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    key: Key,
    peaks: Peaks,
}

fn cached(
    cache_dir: Option<&Path>,
    refresh: bool,
    machine: &Machine,
    measure: impl FnOnce() -> Result<Peaks, PeaksError>,
) -> Result<Peaks, PeaksError> {
    let key = Key::of(machine);
    let Some(dir) = cache_dir else {
        tracing::warn!("no cache folder is known, so peaks are measured each time; set ROOFBENCH_CACHE_DIR");
        return measure();
    };
    let path = dir.join(key.file_name());
    if !refresh && let Some(peaks) = load(&path, &key) {
        return Ok(peaks);
    }
    let kept = Kept { key, peaks: measure()? };
    if let Err(error) = store(dir, &path, &kept) {
        tracing::warn!(
            "measured peaks could not be kept in {}: {error}; set ROOFBENCH_CACHE_DIR to a folder that can be written",
            path.display()
        );
    }
    Ok(kept.peaks)
}

fn load(path: &Path, key: &Key) -> Option<Peaks> {
    let text = fs::read_to_string(path).ok()?;
    match serde_json::from_str::<Kept>(&text) {
        Ok(kept) if kept.key != *key => None,
        Ok(kept) if is_sane(&kept.peaks) => Some(kept.peaks),
        Ok(_) => {
            tracing::warn!("{} holds impossible peaks; measuring again", path.display());
            None
        }
        Err(error) => {
            tracing::warn!("{} is damaged ({error}); measuring again", path.display());
            None
        }
    }
}

fn is_sane(peaks: &Peaks) -> bool {
    let rates = peaks.compute.iter().map(|p| p.flops).chain(peaks.bandwidth.iter().map(|p| p.bytes_per_second));
    !peaks.compute.is_empty() && rates.into_iter().all(|rate| rate.is_finite() && rate > 0.0)
}

/// Written beside and renamed, so that a reader never sees half a file.
fn store(dir: &Path, path: &Path, kept: &Kept) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::write(&beside, serde_json::to_string_pretty(kept)?).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&beside);
    }
    written
}

fn measure(machine: &Machine, effort: Effort) -> Result<Peaks, PeaksError> {
    let before = Conditions::now();
    let all = machine.cpu.usable_threads.max(1);
    let counts = if all == 1 { vec![1] } else { vec![1, all] };
    let mut peaks =
        Peaks { measured_at: clock::utc_now(), compute: Vec::new(), bandwidth: Vec::new(), warnings: Vec::new() };
    for kernel in compute::kernels() {
        let iterations = kernel.calibrate(CHUNK);
        let operations = kernel.operations() * iterations as f64;
        for &threads in &counts {
            let worker = || {
                std::hint::black_box((kernel.run)(iterations));
                operations
            };
            let flops = best_rate(vec![worker; threads as usize], effort.compute_trials, effort.trial)?;
            peaks.compute.push(ComputePeak { dtype: kernel.dtype.into(), path: kernel.path.into(), threads, flops });
        }
    }
    for &threads in &counts {
        match array_bytes(machine, threads, effort.array_bytes) {
            Ok(bytes) => peaks.bandwidth.extend(measure_bandwidth(bytes, threads, effort)?),
            Err(warning) => peaks.warnings.push(warning),
        }
    }
    peaks.warnings.extend(conditions::between(&before, &Conditions::now(), all));
    Ok(peaks)
}

/// Size of the array for `threads`: past the caches that they can use, within the memory that is there.
fn array_bytes(machine: &Machine, threads: u32, least: u64) -> Result<u64, Warning> {
    let caches = &machine.cpu.caches;
    let last = caches.iter().map(|cache| cache.level).max().unwrap_or(0);
    let reachable = caches.iter().filter(|cache| cache.level == last && cache.kind != "instruction");
    let cached: u64 = reachable.map(|cache| cache.bytes.saturating_mul(cache.instances.min(threads).into())).sum();
    let wanted = least.max(cached.saturating_mul(CACHES_WANTED));
    let bytes = machine.memory.available_bytes.map_or(wanted, |available| wanted.min(available / MEMORY_SHARE));
    if bytes < cached.saturating_mul(CACHES_NEEDED).max(1 << 20) {
        let message = format!(
            "bandwidth at {threads} threads was not measured: past {cached} bytes of cache it takes an array of \
             {wanted} bytes, and a quarter of the available memory is {bytes}; free memory and measure again"
        );
        return Err(Warning { kind: "memory".into(), message });
    }
    Ok(bytes)
}

fn measure_bandwidth(bytes: u64, threads: u32, effort: Effort) -> Result<[BandwidthPeak; 2], PeaksError> {
    let mut array = bandwidth::touched(bytes, threads)?;
    let part = array.len() / threads as usize;
    let (mut read, mut copy) = (0.0, 0.0);
    for reader in bandwidth::READERS {
        let workers = array.chunks_exact_mut(part).map(reader).collect();
        read = best_rate(workers, effort.bandwidth_trials, effort.trial)?.max(read);
    }
    for copier in bandwidth::copiers() {
        let workers = array.chunks_exact_mut(part).map(|part| bandwidth::copy_worker(part, copier)).collect();
        copy = best_rate(workers, effort.bandwidth_trials, effort.trial)?.max(copy);
    }
    let array_bytes = array.len() as u64 * bandwidth::LINE_BYTES;
    Ok([("read", read), ("copy", copy)].map(|(kind, bytes_per_second)| BandwidthPeak {
        kind: kind.into(),
        threads,
        bytes_per_second,
        array_bytes,
    }))
}

/// Best rate of the trials, in which each worker repeats its chunk of work for `length`, all starting together.
///
/// A trial lasts from the first start to the last end, so that workers which had to wait for a CPU don't add up to more
/// than there is; workers on slow cores do fewer chunks, so that fast ones don't wait for them.
fn best_rate<W>(workers: Vec<W>, trials: usize, length: Duration) -> Result<f64, PeaksError>
where
    W: FnMut() -> f64 + Send,
{
    let barrier = Barrier::new(workers.len());
    // One CPU each, where there is one for each: the scheduler may keep two threads on one for a whole trial.
    let cpus = cpu::affinity(super::root()).filter(|cpus| cpus.len() == workers.len()).unwrap_or_default();
    let mut cpus = cpus.into_iter();
    let timed = workers.into_iter().map(|mut work| {
        let barrier = &barrier;
        let cpu = cpus.next();
        move || {
            if let Some(cpu) = cpu {
                pin(cpu);
            }
            let trial = |_| {
                barrier.wait();
                let start = Instant::now();
                let mut done = 0.0;
                loop {
                    done += work();
                    let now = Instant::now();
                    if now - start >= length {
                        return (start, now, done);
                    }
                }
            };
            (0..trials).map(trial).collect::<Vec<_>>()
        }
    });
    let spans = together(timed.collect())?;
    let rates = (0..trials).filter_map(|trial| {
        let start = spans.iter().map(|spans| spans[trial].0).min()?;
        let end = spans.iter().map(|spans| spans[trial].1).max()?;
        let done: f64 = spans.iter().map(|spans| spans[trial].2).sum();
        Some(done / (end - start).as_secs_f64())
    });
    Ok(rates.fold(0.0, f64::max))
}

/// Keeps the calling thread on one CPU. Where that is refused, the measurement goes on without.
#[cfg(target_os = "linux")]
fn pin(cpu: u32) {
    let (cpu, mask_bits) = (cpu as usize, libc::CPU_SETSIZE as usize);
    if cpu >= mask_bits {
        return;
    }
    #[expect(unsafe_code, reason = "system call")]
    // SAFETY: an all-zero mask is an empty one, `cpu` is within it, and the call reads it with its true size.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut mask);
        libc::sched_setaffinity(0, size_of_val(&mask), &mask);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_: u32) {}

/// Runs every worker on a thread of its own, once all threads are there; if one can't be started, none runs.
fn together<T: Send, W: FnOnce() -> T + Send>(workers: Vec<W>) -> Result<Vec<T>, PeaksError> {
    let threads = workers.len();
    thread::scope(|scope| {
        let mut started = Vec::with_capacity(threads);
        for worker in workers {
            let (go, wait) = mpsc::channel::<()>();
            // An error from `recv` means that `go` was dropped because another thread could not be started.
            let body = move || wait.recv().ok().map(|()| worker());
            let handle = thread::Builder::new().spawn_scoped(scope, body);
            started.push((go, handle.map_err(|source| PeaksError::Threads { threads, source })?));
        }
        for (go, _) in &started {
            // Only a thread that is gone can't be told, and its panic is passed on below.
            let _ = go.send(());
        }
        let results = started.into_iter().filter_map(|(_, handle)| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        Ok(results.collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::Memory;
    use crate::roofline::tests::machine;

    const SHORT: Effort =
        Effort { trial: Duration::from_micros(200), compute_trials: 2, bandwidth_trials: 2, array_bytes: 4 << 20 };

    fn some_peaks(flops: f64) -> Peaks {
        let compute = vec![ComputePeak { dtype: "f32".into(), path: "fma".into(), threads: 1, flops }];
        Peaks { measured_at: "2026-01-01T00:00:00Z".into(), compute, bandwidth: vec![], warnings: vec![] }
    }

    #[test]
    fn every_ceiling_is_measured_at_one_and_all_threads() {
        let machine = machine();
        let peaks = measure(&machine, SHORT).expect("a short measurement");
        assert!(is_sane(&peaks), "{peaks:?}");
        for threads in [1, machine.cpu.usable_threads] {
            assert!(peaks.flops("f32", threads).is_some());
            for kind in ["read", "copy"] {
                assert_eq!(peaks.bandwidth.iter().filter(|p| p.kind == kind && p.threads == threads).count(), 1);
            }
        }
        assert!(peaks.bandwidth.iter().all(|p| p.array_bytes == SHORT.array_bytes));
    }

    #[test]
    fn an_emulated_cpu_has_no_ceilings() {
        let mut machine = machine();
        machine.cpu.emulator = Some("user-mode emulation of aarch64 on an x86 host".into());
        let error = load_or_measure(None, true, &machine).expect_err("not measured");
        assert!(error.to_string().contains("on an x86 host"), "{error}");
    }

    #[test]
    fn the_array_passes_the_caches_within_memory() {
        let mut machine = machine();
        let gib = 1 << 30;
        let l3 = Cache { level: 3, kind: "unified".into(), bytes: gib / 8, shared_by: 16, instances: 8 };
        machine.cpu.caches = vec![Cache { level: 2, bytes: gib, ..l3.clone() }, l3];
        assert_eq!(array_bytes(&machine, 1, 256 << 20).ok(), Some(gib / 2));
        assert_eq!(array_bytes(&machine, 64, 256 << 20).ok(), Some(4 * gib));
        machine.memory = Memory { available_bytes: Some(8 * gib), ..Memory::default() };
        assert_eq!(array_bytes(&machine, 64, 256 << 20).ok(), Some(2 * gib));
        machine.memory.available_bytes = Some(gib / 2);
        let warning = array_bytes(&machine, 1, 256 << 20).expect_err("an eighth fits in the cache");
        assert!(warning.message.contains("free memory"));
        machine.cpu.caches.clear();
        assert_eq!(array_bytes(&machine, 1, 256 << 20).ok(), Some(gib / 8));
    }

    #[test]
    fn kept_peaks_are_found_until_something_changes() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut machine = machine();
        let run = |refresh, machine: &Machine, flops| {
            cached(Some(dir.path()), refresh, machine, || Ok(some_peaks(flops))).expect("peaks").compute[0].flops
        };
        assert_eq!(run(false, &machine, 1.0), 1.0);
        assert_eq!(run(false, &machine, 2.0), 1.0);
        assert_eq!(run(true, &machine, 3.0), 3.0);
        assert_eq!(run(false, &machine, 4.0), 3.0);
        machine.cpu.isa.push("avx512f".into());
        assert_eq!(run(false, &machine, 5.0), 5.0);
        machine.cpu.usable_threads = 1;
        assert_eq!(run(false, &machine, 6.0), 6.0);
        let path = dir.path().join(Key::of(&machine).file_name());
        for garbage in ["", "{", "[1]", "\u{0}", "{\"key\":{}}"] {
            fs::write(&path, garbage).expect("written");
            assert_eq!(run(false, &machine, 7.0), 7.0);
            assert_eq!(run(false, &machine, 8.0), 7.0);
        }
        store(dir.path(), &path, &Kept { key: Key::of(&machine), peaks: some_peaks(-1.0) }).expect("written");
        assert_eq!(run(false, &machine, 9.0), 9.0);
        assert!(
            fs::read_dir(dir.path())
                .expect("folder")
                .flatten()
                .all(|e| e.path().extension().is_some_and(|x| x == "json"))
        );
    }

    #[test]
    fn a_cache_that_cannot_be_written_costs_nothing_but_time() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let file = dir.path().join("file");
        fs::write(&file, "in the way").expect("written");
        for place in [None, Some(file.as_path())] {
            assert_eq!(cached(place, false, &machine(), || Ok(some_peaks(1.0))).ok(), Some(some_peaks(1.0)));
        }
        let refused = || Err(PeaksError::Threads { threads: 9, source: io::Error::other("no") });
        let error = cached(Some(dir.path()), false, &machine(), refused).expect_err("passed on");
        assert!(error.to_string().contains("9 threads"));
    }

    #[test]
    fn cache_folder_by_environment() {
        let from = |vars: &[(&str, &str)]| {
            let vars: Vec<(String, OsString)> = vars.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            cache_dir_from(|name| vars.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        };
        let root = std::env::temp_dir();
        let root = root.to_str().expect("a plain path");
        let xdg = ("XDG_CACHE_HOME", root);
        assert_eq!(from(&[("ROOFBENCH_CACHE_DIR", "here"), xdg]), Some("here".into()));
        assert_eq!(from(&[xdg, ("HOME", "/home/x")]), Some(Path::new(root).join("roofbench")));
        assert_eq!(from(&[("XDG_CACHE_HOME", "rel"), ("HOME", "/home/x")]), Some("/home/x/.cache/roofbench".into()));
        assert_eq!(from(&[("LOCALAPPDATA", "C:/L"), ("HOME", "")]), Some("C:/L/roofbench".into()));
        assert_eq!(from(&[]), None);
    }

    #[test]
    fn workers_share_a_start_and_a_panic_is_passed_on() {
        let squares = together((0..4).map(|i| move || i * i).collect()).expect("four threads");
        assert_eq!(squares, [0, 1, 4, 9]);
        let panicking: Vec<fn()> = vec![|| (), || panic!("worker")];
        assert!(std::panic::catch_unwind(|| together(panicking)).is_err());
    }
}
