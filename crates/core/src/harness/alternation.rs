//! Two or more contenders in alternation, so that a drift of the machine meets all of them.
//!
//! A round runs a burst of each, in turn, starting with another each time; what is compared is the ratio of the medians
//! within a round.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::stats;

/// The most calls of a burst.
const MOST_CALLS: u64 = 200;

/// Something that runs calls whenever it is asked.
pub trait Bursts {
    /// Runs `calls` calls; the nanoseconds of each.
    ///
    /// # Errors
    /// It can't run any more.
    fn burst(&mut self, calls: u64) -> io::Result<Vec<u64>>;
}

/// A contender with what was measured of it.
#[derive(Debug)]
pub struct Contender<B> {
    bursts: B,
    calls: u64,
    medians: Vec<f64>,
}

impl<B: Bursts> Contender<B> {
    /// Runs one call, and decides by its time how many make a burst of about `burst_ns`.
    ///
    /// # Errors
    /// Those of the call.
    pub fn new(mut bursts: B, burst_ns: u64) -> io::Result<Self> {
        let first = bursts.burst(1)?.first().copied().unwrap_or(1);
        Ok(Self { bursts, calls: (burst_ns / first.max(1)).clamp(2, MOST_CALLS), medians: Vec::new() })
    }

    /// Median nanoseconds of each round so far.
    pub fn medians(&self) -> &[f64] {
        &self.medians
    }

    /// What runs the calls.
    pub fn bursts(&self) -> &B {
        &self.bursts
    }

    /// Forgets the rounds so far.
    pub fn clear(&mut self) {
        self.medians.clear();
    }

    /// One burst; its first call wakes threads and caches and is not counted.
    fn round(&mut self) -> io::Result<()> {
        let samples = self.bursts.burst(self.calls + 1)?;
        let median =
            samples.get(1..).and_then(stats::median).ok_or_else(|| io::Error::other("a burst without calls"))?;
        self.medians.push(median);
        Ok(())
    }
}

/// Runs `rounds` rounds.
///
/// # Errors
/// A contender's.
pub fn alternate<B: Bursts>(contenders: &mut [&mut Contender<B>], rounds: usize) -> io::Result<()> {
    let count = contenders.len();
    for round in 0..rounds {
        for place in 0..count {
            contenders[(round + place) % count].round()?;
        }
    }
    Ok(())
}

/// One time over another, round by round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Median.
    pub median: f64,
    /// Lower end of its 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Ratio {
    /// Of `medians` over those of `base`; `None` for too few rounds to tell an interval.
    pub fn of(medians: &[f64], base: &[f64]) -> Option<Self> {
        // In parts per million, because the statistics are on integers.
        let ratios: Vec<u64> = medians.iter().zip(base).map(|(one, other)| (one / other * 1e6) as u64).collect();
        let interval = stats::median_interval(&ratios)?;
        Some(Self { median: stats::median(&ratios)? / 1e6, low: interval.low / 1e6, high: interval.high / 1e6 })
    }
}

/// A process that says a line of JSON when it is ready, and then answers each line `N` on its standard input with
/// `{"samples_ns": [...]}` of N calls, as `roofbench sample` does. Dropping it ends it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts `command` and waits until it is ready; what it says then. Its standard error goes where `command` says.
    ///
    /// # Errors
    /// It can't be started, ends before it is ready, or says something else.
    pub fn start<T: for<'a> Deserialize<'a>>(command: &mut Command) -> io::Result<(Self, T)> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| io::Error::other("the process has no pipes"))?;
        let mut process = Self { child, input, output: BufReader::new(output) };
        let ready = process.line()?;
        Ok((process, ready))
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn line<T: for<'a> Deserialize<'a>>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        // Libraries print to standard output as well; ours are the lines that are JSON objects.
        while !line.starts_with('{') {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended"));
            }
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Bursts for Process {
    fn burst(&mut self, calls: u64) -> io::Result<Vec<u64>> {
        #[derive(Deserialize)]
        struct Samples {
            samples_ns: Vec<u64>,
        }
        writeln!(self.input, "{calls}").and_then(|()| self.input.flush())?;
        let Samples { samples_ns } = self.line()?;
        if samples_ns.len() as u64 != calls {
            return Err(io::Error::other(format!("it ran {} of {calls} calls", samples_ns.len())));
        }
        Ok(samples_ns)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has nothing to lose, and may ignore the end of its input while it is busy.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of `ns` each, slower by a tenth with every burst of either contender.
    struct Fake<'a> {
        ns: u64,
        drift: &'a std::cell::Cell<u64>,
        asked: Vec<u64>,
    }

    impl Bursts for Fake<'_> {
        fn burst(&mut self, calls: u64) -> io::Result<Vec<u64>> {
            self.asked.push(calls);
            let tenths = self.drift.replace(self.drift.get() + 1);
            // the first of a burst is slow
            Ok((0..calls).map(|call| self.ns * (10 + tenths) / 10 + if call == 0 { 1 << 40 } else { 0 }).collect())
        }
    }

    #[test]
    fn a_drift_meets_both() {
        let drift = std::cell::Cell::new(0);
        let fake = |ns| Fake { ns, drift: &drift, asked: Vec::new() };
        let mut base = Contender::new(fake(1_000_000), 1 << 42).unwrap();
        let mut other = Contender::new(fake(2_000_000), 1 << 42).unwrap();
        alternate(&mut [&mut base, &mut other], 12).unwrap();
        assert_eq!(base.bursts.asked, [vec![1], vec![4; 12]].concat(), "3 calls of about 2^40 ns and one to wake up");
        let ratio = Ratio::of(other.medians(), base.medians()).unwrap();
        // the machine got three times slower, the ratio stayed
        assert!(base.medians()[11] > 2.0 * base.medians()[0]);
        assert!(
            (1.8..2.2).contains(&ratio.median) && ratio.low <= ratio.median && ratio.median <= ratio.high,
            "{ratio:?}"
        );
        base.clear();
        assert_eq!(Ratio::of(other.medians(), base.medians()), None);
    }

    #[test]
    fn a_process_that_ends_is_an_error() {
        let error = Process::start::<serde_json::Value>(Command::new("rustc").arg("--version")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
