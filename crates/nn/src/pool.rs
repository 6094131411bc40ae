//! The one pool of threads that every CPU kernel of this process shares.
//!
//! A forward pass is hundreds of operations of some ten microseconds, so a fork has to cost less than one. Workers
//! therefore spin for a while after each job before they park, the caller works too, and a worker that is not awake in
//! time is not waited for: it finds the job closed. Tasks are taken from one counter, which also balances cores of
//! unequal speed. Candle's own operations use rayon's pool; a worker that found no job for [`SPIN`] is parked and
//! leaves the core to it.
//!
//! Which thread runs a task is not determined, so a task's result must not depend on it; then results are bit-equal
//! from run to run.
//!
//! Measured on a 2-core AMD Zen 5 virtual machine: two tasks that wait for each other, forked and joined, take 0.8 µs
//! with the worker awake, 135–200 µs with it parked.

#![expect(unsafe_code, reason = "a job borrows the caller's stack; CPU affinity is a system call")]

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::memory;

/// How long a worker looks for the next job before it parks. Waking a parked one costs 50–250 µs.
const SPIN: Duration = Duration::from_micros(200);

/// How the pool is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolConfig {
    /// Threads that work on a job, the caller's included; 0 means every CPU that this process may use (affinity and
    /// container quota respected).
    pub threads: usize,
    /// Whether workers are tied to CPUs.
    pub pin: Pinning,
}

/// Whether workers are tied to CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pinning {
    /// The operating system places them.
    #[default]
    None,
    /// Worker `i` runs on the `i`-th CPU of the process's affinity mask. The calling thread is left free, because
    /// threads that it starts later, rayon's among them, would inherit its mask. Linux only.
    Compact,
}

/// Why [`configure`] could not build the pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// It would wait for itself.
    #[error("the thread pool cannot be reconfigured from inside one of its own tasks")]
    Busy,
    /// The operating system refused a thread.
    #[error("starting worker {index} of {threads} threads failed; ask for fewer threads")]
    Spawn {
        /// Which worker.
        index: usize,
        /// How many threads were asked for.
        threads: usize,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The operating system refused the affinity, or has none.
    #[error("pinning worker {index} to a CPU failed; run without pinning")]
    Pin {
        /// Which worker.
        index: usize,
        /// The operating system's word.
        source: std::io::Error,
    },
}

/// CPUs that this process may use: affinity mask and container quota respected, at least 1.
pub fn usable_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);
/// Size of the pool that is there or would be made; 0 until asked.
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is running a task, so that a nested call runs inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The most threads of a job of this thread.
    static LIMIT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Replaces the pool; waits for the job that is running, if any, and ends the old threads.
///
/// # Errors
/// From inside a task; when a thread cannot be started or pinned. The previous pool then stays.
pub fn configure(config: PoolConfig) -> Result<(), PoolError> {
    if INSIDE.get() {
        return Err(PoolError::Busy);
    }
    let threads = if config.threads == 0 { usable_cpus() } else { config.threads };
    let pool = Pool::start(threads, config.pin)?;
    let old = lock().replace(pool);
    THREADS.store(threads, Ordering::Relaxed);
    drop(old);
    Ok(())
}

/// From now on the jobs of the calling thread take `threads` threads at most, its own included; `None` takes the limit
/// off. For phases that more threads do not speed up: the other workers stay as they are, and cost nothing but sleep.
pub fn limit(threads: Option<usize>) {
    LIMIT.set(threads.map_or(usize::MAX, |threads| threads.max(1)));
}

/// Threads that work on a job of the calling thread, its own included.
pub fn threads() -> usize {
    pool_threads().min(LIMIT.get())
}

/// Threads of the pool.
fn pool_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => {
            let threads = usable_cpus();
            match THREADS.compare_exchange(0, threads, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => threads,
                Err(configured) => configured,
            }
        }
        threads => threads,
    }
}

/// Runs `f(0)`, `f(1)`, … `f(tasks - 1)`, each once, on the threads of the pool and the caller's, and returns when all
/// have ended.
///
/// It runs inline, on the caller's thread alone, from inside a task and while another thread has the pool.
///
/// # Panics
/// With the payload of the first task that panicked, after all have ended; tasks not yet begun are dropped.
pub fn run(tasks: usize, f: impl Fn(usize) + Sync) {
    if tasks > 1 && threads() > 1 && !INSIDE.get() {
        let mut guard = match POOL.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(pool) = guard.as_deref_mut() {
            let pool = pool.get_or_insert_with(|| Pool::start_most(pool_threads()));
            let outcome = pool.run(threads(), tasks, &f);
            drop(guard);
            if let Err(payload) = outcome {
                resume_unwind(payload);
            }
            return;
        }
    }
    (0..tasks).for_each(f);
}

fn lock() -> MutexGuard<'static, Option<Pool>> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A job as the workers see it; lives on the caller's stack until the gate is closed and empty.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Takes tasks until none is left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.task)(index))) {
                self.next.store(self.tasks, Ordering::Relaxed);
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
        }
    }
}

/// Workers inside the job, in the low bits of the gate.
const ACTIVE: u64 = 0xffff;
/// Set while workers may enter.
const OPEN: u64 = 1 << 16;
/// One job further; the rest of the gate counts jobs, so that a worker enters each once.
const EPOCH: u64 = 1 << 17;

/// Keeps what one thread writes off the cache line of what another reads.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    gate: Line<AtomicU64>,
    job: Line<AtomicPtr<Job<'static>>>,
    asleep: Vec<Line<AtomicBool>>,
    /// So many workers, the first, may enter.
    admitted: AtomicUsize,
    stop: AtomicBool,
    spin: Duration,
}

impl Shared {
    /// Waits until the gate is open for a job after `seen` and enters; the job's epoch, or `None` to end.
    fn enter(&self, index: usize, seen: u64) -> Option<u64> {
        // Stored before the gate is opened, and as it was while the gate stays the same.
        let admitted = || index < self.admitted.load(Ordering::Relaxed);
        let is_open = |gate: u64| gate & OPEN != 0 && gate / EPOCH != seen && admitted();
        let mut since = None;
        let mut turns = 0u32;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let gate = self.gate.0.load(Ordering::SeqCst);
            if is_open(gate) {
                // Acquire: the job's pointer was stored before the gate was opened.
                if self.gate.0.compare_exchange_weak(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    return Some(gate / EPOCH);
                }
                continue;
            }
            turns = turns.wrapping_add(1);
            std::hint::spin_loop();
            // Reading the clock each turn would delay the answer to the gate.
            if turns.is_multiple_of(64) && since.get_or_insert_with(Instant::now).elapsed() >= self.spin {
                // Either the caller sees `asleep` and unparks, or this thread sees the gate it opened before looking.
                self.asleep[index].0.store(true, Ordering::SeqCst);
                if !is_open(self.gate.0.load(Ordering::SeqCst)) && !self.stop.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                self.asleep[index].0.store(false, Ordering::SeqCst);
                since = None;
            }
        }
    }

    fn worker(&self, index: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        while let Some(epoch) = self.enter(index, seen) {
            let job = self.job.0.load(Ordering::Relaxed);
            // SAFETY: this worker entered an open gate, and the caller keeps the job until the gate is closed and the
            // last worker has left.
            unsafe { (*job).work() };
            self.gate.0.fetch_sub(1, Ordering::Release);
            seen = epoch;
        }
    }
}

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    fn empty(threads: usize) -> Self {
        memory::keep_freed_memory();
        // More threads than CPUs: whoever spins keeps the one that has work from running.
        let spin = if threads <= usable_cpus() { SPIN } else { Duration::ZERO };
        let shared = Shared {
            gate: Line(AtomicU64::new(0)),
            job: Line(AtomicPtr::new(std::ptr::null_mut())),
            asleep: (1..threads).map(|_| Line(AtomicBool::new(false))).collect(),
            admitted: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            spin,
        };
        Self { shared: Arc::new(shared), workers: Vec::new() }
    }

    fn add_worker(&mut self, pin: Pinning) -> Result<(), PoolError> {
        let index = self.workers.len();
        let shared = Arc::clone(&self.shared);
        let (report, pinned) = std::sync::mpsc::sync_channel(1);
        let worker = move || {
            let outcome = match pin {
                Pinning::None => Ok(()),
                Pinning::Compact => pin_to_cpu(index + 1),
            };
            let ready = outcome.is_ok();
            if report.send(outcome).is_ok() && ready {
                shared.worker(index);
            }
        };
        let handle = std::thread::Builder::new()
            .name(format!("roofbench-{}", index + 1))
            .spawn(worker)
            .map_err(|source| PoolError::Spawn { index: index + 1, threads: self.shared.asleep.len() + 1, source })?;
        self.workers.push(handle);
        match pinned.recv() {
            Ok(Err(source)) => Err(PoolError::Pin { index: index + 1, source }),
            _ => Ok(()),
        }
    }

    fn start(threads: usize, pin: Pinning) -> Result<Self, PoolError> {
        let mut pool = Self::empty(threads);
        for _ in 1..threads {
            pool.add_worker(pin)?;
        }
        Ok(pool)
    }

    /// As many workers as the system grants: for the pool that nobody asked for.
    fn start_most(threads: usize) -> Self {
        let mut pool = Self::empty(threads);
        for _ in 1..threads {
            if let Err(error) = pool.add_worker(Pinning::None) {
                tracing::warn!("{error}; going on with {}", pool.workers.len() + 1);
                break;
            }
        }
        pool
    }

    /// On `threads` threads at most, the caller's included.
    fn run(&mut self, threads: usize, tasks: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), Box<dyn Any + Send>> {
        let job = Job { task: f, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
        let shared = &*self.shared;
        shared.job.0.store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        if shared.admitted.load(Ordering::Relaxed) != threads - 1 {
            shared.admitted.store(threads - 1, Ordering::Relaxed);
        }
        let epoch = shared.gate.0.load(Ordering::Relaxed) / EPOCH + 1;
        // Also the release of the job's pointer.
        shared.gate.0.store(epoch * EPOCH + OPEN, Ordering::SeqCst);
        for (worker, asleep) in self.workers.iter().zip(&shared.asleep).take(tasks.min(threads) - 1) {
            if asleep.0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        INSIDE.set(true);
        job.work();
        INSIDE.set(false);
        // No task is left: whoever has not come needs not.
        shared.gate.0.fetch_and(!OPEN, Ordering::Relaxed);
        let mut turns = 0u32;
        while shared.gate.0.load(Ordering::Acquire) & ACTIVE != 0 {
            turns = turns.saturating_add(1);
            if turns < 10_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        job.panic.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            if worker.join().is_err() {
                tracing::error!("a pool worker ended by a panic outside its tasks");
            }
        }
    }
}

/// Ties the calling thread to the `index`-th CPU (modulo their number) that it may use.
#[cfg(target_os = "linux")]
fn pin_to_cpu(index: usize) -> std::io::Result<()> {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: all-zero is an empty set.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable and `size` is its size; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size, &mut allowed) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the index stays below the set's size in bits.
    let cpus: Vec<usize> = (0..8 * size).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &allowed) }).collect();
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if let Some(&cpu) = cpus.get(index % cpus.len().max(1)) {
        // SAFETY: the CPU was found in a set of this size.
        unsafe { libc::CPU_SET(cpu, &mut one) };
    }
    // SAFETY: the set is readable and `size` is its size.
    match unsafe { libc::sched_setaffinity(0, size, &one) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(not(target_os = "linux"))]
fn pin_to_cpu(_index: usize) -> std::io::Result<()> {
    Err(std::io::Error::new(std::io::ErrorKind::Unsupported, "this system has no CPU affinity"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each task once, on a pool of its own, so that tests that run side by side do not fall back to running inline.
    fn count(pool: &mut Pool, tasks: usize) -> usize {
        let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(usize::MAX, tasks, &|task| {
            hits[task].fetch_add(1, Ordering::Relaxed);
        })
        .expect("no task panics");
        hits.iter().filter(|hits| hits.load(Ordering::Relaxed) == 1).count()
    }

    #[test]
    fn every_task_runs_once_in_many_tiny_jobs() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::start(threads, Pinning::None).unwrap();
            for round in 0..2000 {
                let tasks = 1 + round % 9;
                assert_eq!(count(&mut pool, tasks), tasks);
            }
        }
    }

    #[test]
    fn parked_workers_come_back() {
        let mut pool = Pool::start(3, Pinning::None).unwrap();
        for _ in 0..20 {
            let started = Instant::now();
            while !pool.shared.asleep.iter().all(|asleep| asleep.0.load(Ordering::SeqCst)) {
                assert!(started.elapsed() < Duration::from_secs(60), "the workers do not park");
                std::thread::yield_now();
            }
            // Two tasks that wait for each other need two threads, so a worker must have woken.
            let barrier = std::sync::Barrier::new(2);
            pool.run(usize::MAX, 2, &|_| {
                barrier.wait();
            })
            .expect("no task panics");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::start(3, Pinning::None).unwrap();
        for bad in 0..50 {
            let payload =
                pool.run(usize::MAX, 50, &|task| assert!(task != bad, "task {task} fails")).expect_err("one panics");
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("task {bad} fails")));
            assert_eq!(count(&mut pool, 7), 7);
        }
    }

    #[test]
    fn nested_runs_and_reconfigurations() {
        let total = AtomicUsize::new(0);
        for threads in [2, 1, 4, 0] {
            configure(PoolConfig { threads, pin: Pinning::None }).unwrap();
            let expected = if threads == 0 { usable_cpus() } else { threads };
            assert_eq!(super::threads(), expected);
            run(4, |_| {
                run(5, |_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
                if expected > 1 {
                    // With one thread the tasks run as plain calls.
                    assert!(!INSIDE.get() || matches!(configure(PoolConfig::default()), Err(PoolError::Busy)));
                }
            });
        }
        assert_eq!(total.into_inner(), 4 * 4 * 5);
    }

    #[test]
    fn workers_beyond_the_limit_stay_out() {
        let mut pool = Pool::start(4, Pinning::None).unwrap();
        for threads in [4, 2, 1, 3] {
            let seen = Mutex::new(std::collections::HashSet::new());
            for _ in 0..200 {
                pool.run(threads, 40, &|_| {
                    seen.lock().unwrap().insert(std::thread::current().name().map(str::to_owned));
                })
                .expect("no task panics");
            }
            let seen = seen.into_inner().unwrap();
            let beyond = (threads..4).filter(|index| seen.contains(&Some(format!("roofbench-{index}"))));
            assert_eq!(beyond.count(), 0, "{threads} threads: {seen:?}");
        }
        limit(Some(1));
        assert_eq!(super::threads(), 1);
        limit(None);
        assert_eq!(LIMIT.get(), usize::MAX);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pinned_workers_work() {
        let mut pool = Pool::start(usable_cpus().min(4), Pinning::Compact).unwrap();
        assert_eq!(count(&mut pool, 100), 100);
    }
}
