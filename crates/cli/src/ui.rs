//! What people see: tables, numbers with units, and progress as a bar on a terminal and as lines elsewhere.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};
use roofbench_core::metrics;
use roofbench_core::record::{Outcome, Record, StopRule};
use roofbench_core::task::Answer;

/// Writes `text` and a line end to standard output. A reader that went away (`| head`) is no error.
///
/// # Errors
/// Anything else that keeps the text from being written.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// An error with its causes in one message, and the way out where it comes from a GPU's driver. A cause that the message
/// before it tells already is left out.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    match crate::gpu::advice(&told) {
        Some(advice) => format!("{told}; {advice}"),
        None => told,
    }
}

/// `1 cell`, `2 cells`.
pub(crate) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Bytes in decimal units: `1.3 GB`.
pub(crate) fn bytes(n: f64) -> String {
    scaled(n, &["B", "kB", "MB", "GB", "TB"])
}

/// A large count: `7.2 G`, `110 M`.
pub(crate) fn large(n: f64) -> String {
    scaled(n, &["", "k", "M", "G", "T"])
}

/// A time: `1.25 s`, `117 ms`, `3.4 µs`.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{} s", digits(s)),
        s if s >= 1e-3 => format!("{} ms", digits(s * 1e3)),
        s => format!("{} µs", digits(s * 1e6)),
    }
}

fn scaled(n: f64, units: &[&str]) -> String {
    let (mut n, mut units) = (n, units.iter());
    let mut unit = units.next().copied().unwrap_or_default();
    while n >= 999.5
        && let Some(next) = units.next()
    {
        (n, unit) = (n / 1e3, next);
    }
    format!("{} {unit}", digits(n)).trim_end().to_owned()
}

/// Three significant digits, and all digits of whole numbers.
pub(crate) fn digits(x: f64) -> String {
    match x.abs() {
        a if a >= 99.95 || x == x.trunc() => format!("{x:.0}"),
        a if a >= 9.995 => format!("{x:.1}"),
        a if a >= 0.01 => format!("{x:.2}"),
        _ => format!("{x:.1e}"),
    }
}

/// An answer as people read it.
pub(crate) fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Table { header, rows } => {
            let mut table = roofbench_report::empty_table(&[]);
            table.set_header(header);
            table.add_rows(rows);
            table.to_string()
        }
        Answer::Text(text) => text.clone(),
        Answer::Saved(path) => format!("wrote {}", path.display()),
    }
}

/// How a cell ended, in a line.
pub(crate) fn result_line(title: &str, record: &Record) -> String {
    let result = match &record.outcome {
        Outcome::Measured(measurement) => {
            let Some(derived) = metrics::derive(record) else { return format!("{title}: no samples") };
            let latency = &derived.latency;
            let spread = latency.interval.map(|i| 100.0 * i.relative_half_width(latency.median));
            let spread = spread.map_or_else(String::new, |percent| format!(" ±{percent:.1} %"));
            let share = derived
                .phases
                .iter()
                .find_map(|phase| phase.position.as_ref().ok())
                .map_or_else(String::new, |position| {
                    format!(", {:.0} % of the roofline ({})", 100.0 * position.fraction, position.bound)
                });
            let interrupted = if measurement.stop == StopRule::Interrupted { ", interrupted" } else { "" };
            format!(
                "{}{spread}, {} {}/s{share}, {}{interrupted}",
                time(latency.median),
                digits(derived.throughput.value),
                derived.unit,
                count(latency.count, "sample")
            )
        }
        Outcome::Skipped { reason } => format!("skipped: {reason}"),
        Outcome::Failed { error } => format!("FAILED: {error}"),
    };
    let warnings = match record.warnings.len() {
        0 => String::new(),
        n => format!(", {}", count(n, "warning")),
    };
    format!("{title}: {result}{warnings}")
}

/// Where a run is: a bar on a terminal, a line per cell elsewhere; always on standard error.
pub(crate) struct Progress {
    bar: ProgressBar,
    title: String,
    done: usize,
    all: usize,
}

impl Progress {
    /// Nothing done yet of `all` cells.
    pub(crate) fn new(all: usize) -> Self {
        let bar = ProgressBar::new(all as u64);
        if !std::io::stderr().is_terminal() {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{spinner} {pos}/{len} {wide_msg} {elapsed}") {
            bar.set_style(style);
        }
        Self { bar, title: String::new(), done: 0, all }
    }

    /// A cell begins.
    pub(crate) fn begin(&mut self, title: &str) {
        self.title = title.to_owned();
        self.status("starting");
    }

    /// What the cell is doing. The bar is drawn now and then only: nothing of this process runs while a call is timed.
    pub(crate) fn status(&self, text: &str) {
        self.bar.set_message(format!("{} · {text}", self.title));
    }

    /// The cell ended.
    pub(crate) fn end(&mut self, line: &str) {
        self.done += 1;
        self.bar.inc(1);
        let place = if self.all > 1 { format!("[{}/{}] ", self.done, self.all) } else { String::new() };
        self.line(&format!("{place}{line}"));
    }

    /// A line that stays.
    pub(crate) fn line(&self, text: &str) {
        self.suspended(|| {
            // Standard error that is closed hides the line, and nothing else.
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// Runs `write` with the bar out of the way.
    pub(crate) fn suspended<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::anyhow!("disk full").context("a.jsonl: disk full; free some").context("--output");
        assert_eq!(chain(&error), "--output: a.jsonl: disk full; free some");
        let error = anyhow::anyhow!("inner").context("outer");
        assert_eq!(chain(&error), "outer: inner");
    }

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        assert_eq!(
            [1.23456, 12.3456, 123.456, 1234.56, 8.0, 0.0].map(digits),
            ["1.23", "12.3", "123", "1235", "8", "0"]
        );
        assert_eq!(digits(0.000_123), "1.2e-4");
        assert_eq!([1.5, 0.117, 3.4e-6].map(time), ["1.50 s", "117 ms", "3.40 µs"]);
        assert_eq!([999.0, 1e3, 1.3e9].map(bytes), ["999 B", "1 kB", "1.30 GB"]);
        assert_eq!(large(7.24e9), "7.24 G");
        assert_eq!([count(1, "cell"), count(0, "cell")], ["1 cell", "0 cells"]);
    }
}
