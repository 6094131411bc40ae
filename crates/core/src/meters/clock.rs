//! Wall clock: monotonic for intervals, UTC for the date in records.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{Meter, Quantity, Reading, Scope};
use crate::metrics;

/// Something that tells the time.
pub trait Clock {
    /// Nanoseconds since an arbitrary moment; never goes back.
    fn now_ns(&self) -> u64;
}

/// The system's monotonic clock, counted from its first use in this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Monotonic;

impl Clock for Monotonic {
    fn now_ns(&self) -> u64 {
        static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
        // 2⁶⁴ ns are 584 years.
        u64::try_from(BEGIN.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Now in UTC as RFC 3339 to the second: `2026-01-31T23:59:59Z`.
pub fn utc_now() -> String {
    utc_at(SystemTime::now())
}

/// `time` in UTC as RFC 3339 to the second; times before 1970 are given as its first.
pub fn utc_at(time: SystemTime) -> String {
    utc(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Seconds since 1970 in the Gregorian calendar, by Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>): years begin in March, so that the leap day comes last.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + 400 * era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Wall-clock time of an interval.
#[derive(Debug)]
pub struct Stopwatch<C> {
    clock: C,
    start_ns: Option<u64>,
}

impl<C: Clock> Stopwatch<C> {
    /// A stopwatch that reads `clock`.
    pub fn new(clock: C) -> Self {
        Self { clock, start_ns: None }
    }
}

impl<C: Clock> Meter for Stopwatch<C> {
    fn start(&mut self) {
        self.start_ns = Some(self.clock.now_ns());
    }

    fn stop(&mut self) -> Vec<Reading> {
        let now = self.clock.now_ns();
        let quantity = match self.start_ns.take() {
            Some(start) => Quantity::Measured { value: now.saturating_sub(start) as f64 / 1e9 },
            None => Quantity::not_started(),
        };
        vec![Reading::new(&metrics::WALL_TIME, Scope::Process, "monotonic clock", quantity)]
    }
}

/// Time that passes only where a test says so; clones share it.
#[cfg(test)]
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeClock(std::rc::Rc<std::cell::Cell<u64>>);

#[cfg(test)]
impl FakeClock {
    pub(crate) fn advance(&self, ns: u64) {
        self.0.set(self.0.get() + ns);
    }
}

#[cfg(test)]
impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn intervals() {
        let clock = FakeClock::default();
        let mut watch = Stopwatch::new(clock.clone());
        assert_eq!(watch.stop()[0].quantity.value(), None);
        clock.advance(7);
        watch.start();
        clock.advance(1_500_000_000);
        assert_eq!(watch.stop()[0].quantity, Quantity::Measured { value: 1.5 });
        let (a, b) = (Monotonic.now_ns(), Monotonic.now_ns());
        assert!(b >= a);
    }
}
