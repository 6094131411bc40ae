//! `roofbench probe`: the machine, and the ceilings measured on it.

use std::process::ExitCode;

use anyhow::Context;
use roofbench_core::hardware::peaks::{self, PeaksError};
use roofbench_core::hardware::{self, Machine};
use serde_json::json;

use crate::{models, ui};

/// Show this machine: CPU, memory, GPUs, and its measured ceilings
///
/// The ceilings (FLOP/s by type, memory bandwidth, at one thread and at all) are measured once, which takes a few
/// seconds, and kept in the user's cache folder; every record carries them, and results are held against them.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench probe             what is here, measuring the ceilings the first time
  roofbench probe --refresh   measures them again: after a change of clock, governor or container, or under load
  roofbench probe --json      the same for programs, with the facts of this build

ROOFBENCH_CACHE_DIR moves the folder that the ceilings are kept in.")]
pub(crate) struct Arguments {
    /// Measures the ceilings again
    #[arg(long)]
    refresh: bool,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Probes and prints.
///
/// # Errors
/// The ceilings can't be measured.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut machine = hardware::probe();
    measure_peaks(&mut machine, arguments.refresh)?;
    if arguments.json {
        let object = json!({ "machine": machine, "build": models::build() });
        ui::print(&format!("{object:#}"))?;
    } else {
        ui::print(&facts(&machine))?;
        ui::print(&ceilings(&machine))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fills in the measured ceilings, from the cache where they are in it; an emulated CPU has none.
///
/// # Errors
/// The system refuses the memory or the threads that measuring takes.
pub(crate) fn measure_peaks(machine: &mut Machine, refresh: bool) -> anyhow::Result<()> {
    let cache = peaks::default_cache_dir();
    match peaks::load_or_measure(cache.as_deref(), refresh, machine) {
        Ok(peaks) => machine.peaks = Some(peaks),
        Err(PeaksError::Emulated { .. }) => {}
        Err(error) => return Err(error).context("measuring this machine's ceilings"),
    }
    Ok(())
}

fn facts(machine: &Machine) -> String {
    let cpu = &machine.cpu;
    let mut rows: Vec<(&str, String)> = vec![("CPU", cpu.model.clone())];
    let known = |n: Option<u32>, what: &str| n.map(|n| ui::count(n as usize, what));
    let mut counts: Vec<String> =
        [known(cpu.sockets, "socket"), known(cpu.cores, "core")].into_iter().flatten().collect();
    counts.push(ui::count(cpu.threads as usize, "thread"));
    if cpu.usable_threads != cpu.threads {
        counts.push(format!("{} usable here", cpu.usable_threads));
    }
    counts.extend(cpu.core_kinds.iter().map(|kind| format!("{} of kind {}", kind.threads, kind.name)));
    counts.extend(known(cpu.numa_nodes.filter(|&nodes| nodes > 1), "NUMA node"));
    counts.extend(cpu.quota.map(|quota| format!("container quota {} CPUs", ui::digits(quota))));
    rows.push(("", counts.join(", ")));
    let caches = cpu.caches.iter().map(|cache| {
        let shared = if cache.shared_by > 1 { format!(" per {} threads", cache.shared_by) } else { String::new() };
        format!("L{} {} {}{shared}", cache.level, cache.kind, binary(cache.bytes))
    });
    rows.push(("caches", caches.collect::<Vec<_>>().join(", ")));
    rows.push(("extensions", cpu.isa.join(" ")));
    let clocks = [
        cpu.clock_mhz.map(|mhz| format!("{mhz:.0} MHz now")),
        cpu.max_clock_mhz.map(|mhz| format!("{mhz:.0} MHz at most")),
        cpu.governor.as_ref().map(|governor| format!("governor {governor}")),
    ];
    rows.push(("clock", clocks.into_iter().flatten().collect::<Vec<_>>().join(", ")));
    let memory = &machine.memory;
    let amounts = [
        memory.total_bytes.map(|bytes| format!("{} in all", binary(bytes))),
        memory.available_bytes.map(|bytes| format!("{} available", binary(bytes))),
        memory.limit_bytes.map(|bytes| format!("container limit {}", binary(bytes))),
        memory.swap_used_bytes.filter(|&bytes| bytes > 0).map(|bytes| format!("{} of swap in use", binary(bytes))),
    ];
    rows.push(("memory", amounts.into_iter().flatten().collect::<Vec<_>>().join(", ")));
    for gpu in &machine.gpus {
        let facts = [
            gpu.memory_bytes.map(binary),
            gpu.compute_capability.as_ref().map(|capability| format!("compute capability {capability}")),
            gpu.driver.as_ref().map(|driver| format!("driver {driver}")),
            gpu.power_limit_watts.map(|watts| format!("{watts:.0} W")),
        ];
        let facts: Vec<_> = facts.into_iter().flatten().collect();
        rows.push(("GPU", format!("cuda:{} {} ({})", gpu.index, gpu.name, facts.join(", "))));
    }
    if let Some(note) = &machine.gpu_note {
        rows.push(("GPU", note.clone()));
    }
    let kernel = machine.os.kernel.as_ref().map_or_else(String::new, |kernel| format!(", kernel {kernel}"));
    rows.push(("system", format!("{}{kernel}", machine.os.name)));
    rows.extend(cpu.virtualization.as_ref().map(|kind| ("runs in", kind.clone())));
    rows.extend(machine.load_1m.map(|load| ("load", format!("{load:.2} over the last minute"))));
    let shown = rows.iter().filter(|(_, text)| !text.is_empty());
    shown.map(|(name, text)| format!("{name:<11} {text}")).collect::<Vec<_>>().join("\n")
}

fn ceilings(machine: &Machine) -> String {
    let Some(peaks) = &machine.peaks else {
        return "\nceilings are not measured, nor is speed recorded: this CPU is emulated".to_owned();
    };
    let mut table = roofbench_report::empty_table(&["ceiling", "threads", "measured", "by"]);
    for peak in &peaks.compute {
        let unit = if peak.dtype == "int8" { "GOP/s" } else { "GFLOP/s" };
        let rate = format!("{} {unit}", ui::digits(peak.flops / 1e9));
        table.add_row([peak.dtype.clone(), peak.threads.to_string(), rate, peak.path.clone()]);
    }
    for peak in &peaks.bandwidth {
        let rate = format!("{} GB/s", ui::digits(peak.bytes_per_second / 1e9));
        let by = format!("an array of {}", binary(peak.array_bytes));
        table.add_row([format!("memory {}", peak.kind), peak.threads.to_string(), rate, by]);
    }
    let mut text = format!("\n{table}\nmeasured {}", peaks.measured_at);
    for warning in &peaks.warnings {
        text.push_str(&format!("\nwarning: {}", warning.message));
    }
    text
}

/// Memory and caches in binary units, as they are sold.
fn binary(bytes: u64) -> String {
    let (mut n, mut units) = (bytes as f64, ["B", "KiB", "MiB", "GiB", "TiB"].iter());
    let mut unit = units.next().copied().unwrap_or_default();
    while n >= 1024.0
        && let Some(next) = units.next()
    {
        (n, unit) = (n / 1024.0, next);
    }
    format!("{} {unit}", ui::digits(n))
}
