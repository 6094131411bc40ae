//! The report as Markdown, for a repository or a pull request.

use roofbench_core::hardware::Machine;
use roofbench_core::record::Record;

use crate::coverage::{State, coverage};
use crate::format;
use crate::row::{Row, Rows};

/// Machine, results, phases under the roofline, what is missing and why, warnings, and coverage of `families`.
pub fn markdown(records: &[Record], families: &[&str]) -> String {
    let rows = Rows::of(records);
    let mut text = String::from("# roofbench report\n");
    for machine in machines(&rows.rows) {
        let facts: Vec<String> =
            machine_facts(machine).into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        text.push_str(&format!("\n{}\n", escape(&facts.join("; "))));
    }
    let measured = rows.measured();
    if !measured.is_empty() {
        text.push_str(&format!("\nSettings: {}\n", escape(&rows.common)));
        section(
            &mut text,
            "Results",
            &["cell", "latency p50", "throughput", "TTFT", "TPOT", "peak memory", "energy/unit"],
            measured.iter().map(|row| {
                vec![
                    row.label.clone(),
                    row.latency(),
                    row.throughput(),
                    row.ttft(),
                    row.tpot(),
                    row.memory(),
                    row.energy(),
                ]
            }),
        );
        section(
            &mut text,
            "Phases under the roofline",
            &[
                "cell",
                "phase",
                "time",
                "share",
                "bytes",
                "energy",
                "FLOP/s",
                "B/s",
                "FLOP/B",
                "MFU",
                "MBU",
                "% of roofline",
                "bound",
            ],
            measured.iter().flat_map(|row| {
                row.phases().into_iter().map(|p| {
                    vec![
                        row.label.clone(),
                        p.phase.to_owned(),
                        p.time,
                        p.share,
                        p.bytes,
                        p.energy,
                        p.flops,
                        p.bandwidth,
                        p.intensity,
                        p.mfu,
                        p.mbu,
                        p.attained,
                        p.bound,
                    ]
                })
            }),
        );
    }
    let decisions = rows.decisions();
    if !decisions.is_empty() {
        section(
            &mut text,
            "Optimizations",
            &["optimization", "state", "decided by", "why", "cells"],
            decisions.into_iter().map(Vec::from),
        );
    }
    let notes = rows.notes();
    if !notes.is_empty() {
        text.push_str("\n## Notes\n\n");
        notes.iter().for_each(|note| text.push_str(&format!("- {}\n", escape(note))));
    }
    let coverage = coverage(records, families);
    let count = coverage.iter().filter(|row| row.state == State::Measured).count();
    section(
        &mut text,
        &format!("Coverage: {count} of {} families measured", coverage.len()),
        &["family", "state", "cells"],
        coverage.iter().map(|row| vec![row.family.clone(), row.state.to_string(), row.detail()]),
    );
    text
}

pub(crate) fn section(text: &mut String, title: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    text.push_str(&format!("\n## {title}\n\n| {} |\n|{}\n", header.join(" | "), "---|".repeat(header.len())));
    for row in rows {
        let fields: Vec<String> = row.iter().map(|field| escape(field)).collect();
        text.push_str(&format!("| {} |\n", fields.join(" | ")));
    }
}

/// Each machine once.
pub(crate) fn machines<'a>(rows: &[Row<'a>]) -> Vec<&'a Machine> {
    let mut machines: Vec<&Machine> = Vec::new();
    for row in rows {
        let machine = &row.record.machine;
        match machines.iter_mut().find(|known| known.name() == machine.name()) {
            // the one with peaks says more
            Some(known) if known.peaks.is_none() => *known = machine,
            Some(_) => {}
            None => machines.push(machine),
        }
    }
    machines
}

/// What a reader wants to know of a machine, as name and text.
pub(crate) fn machine_facts(machine: &Machine) -> Vec<(&'static str, String)> {
    let cpu = &machine.cpu;
    let cores = cpu.cores.map(|cores| format!("{cores} cores, ")).unwrap_or_default();
    let mut facts = vec![
        ("CPU", cpu.model.clone()),
        ("CPUs", format!("{cores}{} threads, {} usable", cpu.threads, cpu.usable_threads)),
    ];
    if !cpu.isa.is_empty() {
        facts.push(("extensions", cpu.isa.join(", ")));
    }
    let limit = machine.memory.limit_bytes.map(|limit| format!(", limit {}", format::bytes(limit as f64)));
    let total = machine.memory.total_bytes.map_or_else(|| "unknown".to_owned(), |bytes| format::bytes(bytes as f64));
    facts.push(("memory", format!("{total}{}", limit.unwrap_or_default())));
    if let Some(virtualization) = &cpu.virtualization {
        facts.push(("virtualization", virtualization.clone()));
    }
    if let Some(governor) = &cpu.governor {
        facts.push(("governor", governor.clone()));
    }
    for gpu in &machine.gpus {
        let memory = gpu.memory_bytes.map(|bytes| format!(", {}", format::bytes(bytes as f64)));
        facts.push(("GPU", format!("{}{}", gpu.name, memory.unwrap_or_default())));
    }
    let kernel = machine.os.kernel.as_ref().map(|kernel| format!(", kernel {kernel}")).unwrap_or_default();
    facts.push(("system", format!("{}{kernel}", machine.os.name)));
    match &machine.peaks {
        None => facts.push(("measured peaks", "none".to_owned())),
        Some(peaks) => {
            let threads = |n: u32| format!("{n} thread{}", if n == 1 { "" } else { "s" });
            let compute = peaks.compute.iter().map(|peak| {
                let unit = if peak.dtype == "int8" { "OP/s" } else { "FLOP/s" };
                format!("{} {} ({}, {})", peak.dtype, format::si(peak.flops, unit), threads(peak.threads), peak.path)
            });
            let bandwidth = peaks.bandwidth.iter().map(|peak| {
                format!("{} {} ({})", peak.kind, format::si(peak.bytes_per_second, "B/s"), threads(peak.threads))
            });
            let list: Vec<String> = compute.chain(bandwidth).collect();
            facts.push(("measured peaks", list.join("; ")));
        }
    }
    facts
}

/// Text that can't leave its cell or become markup.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '|' | '`' | '*' | '[' | ']' | '\\' => escaped.extend(['\\', c]),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn tables_are_there_and_rectangular() {
        let text = markdown(&[samples::bert(10), samples::llama()], &["bert", "llama", "vit"]);
        for expected in ["40.0 ms ±0.00 %", "## Coverage: 2 of 3 families measured", "| vit | not run |", "Testing CPU"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        let mut columns = None;
        for line in text.lines() {
            let bars = line.matches('|').count();
            if bars == 0 {
                columns = None;
            } else {
                assert_eq!(*columns.get_or_insert(bars), bars, "{line}");
            }
        }
    }

    #[test]
    fn hostile_text_stays_in_its_cell() {
        let text = markdown(&[samples::hostile()], &[]);
        assert!(!text.contains("<script>") && text.contains("&lt;script&gt;"), "{text}");
        assert!(text.contains("\\|"), "{text}");
    }

    #[test]
    fn no_records() {
        let text = markdown(&[], &[]);
        assert!(text.contains("0 of 0 families measured") && !text.contains("Results"), "{text}");
    }
}
