//! The harness: drives a session through first call, warm-up and steady state, and keeps every raw time.
//!
//! Meters are read and the device is waited for here and nowhere else. What is timed is the call alone: inputs are ready
//! before, and statistics, progress and the freeing of outputs come after.

pub mod alternation;

mod sampler;
mod sustain;
mod sync;
mod warmup;

use std::time::Duration;

pub use self::sustain::sustain;
use crate::meters::clock::Clock;
use crate::meters::{Meter, Reading};
use crate::record::{Measurement, Sample, Warning};
use crate::session::{Call, Session, SessionError};
use crate::stats::{INTERVAL_MIN_SAMPLES, MAD_TO_SIGMA, Summary, median};

/// Difference between the halves of the samples from which on drift is reported.
const DRIFT: f64 = 0.05;

/// How long to measure and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Warm-up ends when two consecutive calls differ by less than this fraction.
    pub warmup_tolerance: f64,
    /// The most warm-up calls.
    pub max_warmup: usize,
    /// No new warm-up call begins after this time.
    pub max_warmup_time: Duration,
    /// Sampling ends when half the 95 % interval of the median is below this fraction of it.
    pub target: f64,
    /// The fewest samples, unless time runs out first.
    pub min_samples: usize,
    /// The most samples.
    pub max_samples: usize,
    /// The least time to sample for, unless `max_samples` are there first.
    pub min_time: Duration,
    /// No new sample begins after this time; one is always taken.
    pub max_time: Duration,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            warmup_tolerance: 0.05,
            max_warmup: 10,
            max_warmup_time: Duration::from_secs(10),
            target: 0.02,
            min_samples: 10,
            max_samples: 500,
            min_time: Duration::from_secs(1),
            max_time: Duration::from_secs(30),
        }
    }
}

impl Plan {
    /// For a first look: seconds per cell.
    pub fn quick() -> Self {
        Self {
            max_warmup: 3,
            max_warmup_time: Duration::from_secs(2),
            target: 0.05,
            min_samples: INTERVAL_MIN_SAMPLES,
            max_samples: 50,
            min_time: Duration::from_millis(200),
            max_time: Duration::from_secs(5),
            ..Self::default()
        }
    }

    /// Checks that the rules can be met.
    ///
    /// # Errors
    /// [`HarnessError::Plan`] naming the field.
    pub fn validate(&self) -> Result<(), HarnessError> {
        let fault = |field, reason: &str| Err(HarnessError::Plan { field, reason: reason.to_owned() });
        let fraction = |x: f64| x > 0.0 && x < 1.0;
        if !fraction(self.warmup_tolerance) {
            return fault("warmup_tolerance", "must lie between 0 and 1");
        }
        if !fraction(self.target) {
            return fault("target", "must lie between 0 and 1");
        }
        if self.min_samples == 0 {
            return fault("min_samples", "must be at least 1");
        }
        if self.max_samples < self.min_samples {
            return fault("max_samples", "must not be below min_samples");
        }
        if self.max_time < self.min_time {
            return fault("max_time", "must not be below min_time");
        }
        Ok(())
    }
}

/// A part of the measurement, for progress and errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Cost by formula, before any call.
    Cost,
    /// The first call.
    FirstCall,
    /// Warm-up.
    WarmUp,
    /// Steady state.
    Steady,
    /// A long run behind it.
    Sustained,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cost => "cost",
            Self::FirstCall => "first call",
            Self::WarmUp => "warm-up",
            Self::Steady => "steady state",
            Self::Sustained => "long run",
        })
    }
}

/// Told after every call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Where it is.
    pub stage: Stage,
    /// Calls of this stage so far.
    pub calls: usize,
    /// Time of the last call.
    pub last_ns: u64,
    /// Half the 95 % interval of the median over the median, when last computed.
    pub spread: Option<f64>,
}

/// What the harness works with.
pub struct Env<'a> {
    /// Gives the time.
    pub clock: &'a dyn Clock,
    /// Read at the start and the end of each interval.
    pub meters: &'a mut [Box<dyn Meter>],
    /// Waits until the device has done everything it was given: `&|| device.synchronize()`.
    pub sync: &'a dyn Fn() -> candle_core::Result<()>,
    /// Asked between calls; what is measured so far is kept.
    pub interrupted: &'a dyn Fn() -> bool,
    /// Told after every call.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessError {
    /// A rule of the plan can't be met.
    #[error("plan: `{field}` {reason}")]
    Plan {
        /// Field of [`Plan`].
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The model failed.
    #[error("{stage}, after {calls} good calls: {source}")]
    Call {
        /// In which stage.
        stage: Stage,
        /// Calls of this stage that went well.
        calls: usize,
        /// What happened.
        source: SessionError,
    },
    /// The user stopped the run before there was a sample.
    #[error("interrupted during {stage}, before there was a sample")]
    Interrupted {
        /// In which stage.
        stage: Stage,
    },
}

/// A piece of work with its time and readings.
#[derive(Debug, Clone, PartialEq)]
pub struct Interval {
    /// Its time.
    pub ns: u64,
    /// What the meters read.
    pub readings: Vec<Reading>,
}

/// Runs `work` (the loading of a model), waits for the device, and gives its result with time and readings.
///
/// # Errors
/// Those of `work`, and of the device.
pub fn timed<T, E: From<candle_core::Error>>(
    env: &mut Env<'_>,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<(T, Interval), E> {
    let (clock, sync) = (env.clock, env.sync);
    sync()?;
    let (result, readings) = metered(env.meters, || {
        let start = clock.now_ns();
        let result = work()?;
        sync()?;
        Ok((result, clock.now_ns() - start))
    });
    result.map(|(result, ns)| (result, Interval { ns, readings }))
}

/// Runs `work` between the start and the stop of all meters, which are stopped in reverse, each inside of the one before.
fn metered<T>(meters: &mut [Box<dyn Meter>], work: impl FnOnce() -> T) -> (T, Vec<Reading>) {
    meters.iter_mut().for_each(|meter| meter.start());
    let result = work();
    let mut readings: Vec<Vec<Reading>> = meters.iter_mut().rev().map(|meter| meter.stop()).collect();
    readings.reverse();
    (result, readings.concat())
}

/// Measures `call` on a session that was loaded in `load`: first call, warm-up, then samples until a rule of `plan` ends it.
///
/// # Errors
/// [`HarnessError`]; a failing call names its stage and how many went well before it.
pub fn measure(
    session: &mut dyn Session,
    call: &Call,
    load: Interval,
    plan: &Plan,
    env: &mut Env<'_>,
) -> Result<Measurement, HarnessError> {
    plan.validate()?;
    let cost = session.cost(call).map_err(|source| HarnessError::Call { stage: Stage::Cost, calls: 0, source })?;
    let Env { clock, meters, sync, interrupted, progress } = env;
    let mut caller =
        Caller { session, call, clock: *clock, sync: *sync, interrupted: *interrupted, progress: *progress };

    let (first, first_readings) = metered(meters, || caller.next(Stage::FirstCall, 0, None));
    let first = first?.total_ns;
    let warmup_ns = warmup::run(&mut caller, first, plan)?;
    let (steady, steady_readings) = metered(meters, || sampler::run(&mut caller, plan));
    let (samples, stop) = steady?;
    Ok(Measurement {
        load_ns: load.ns,
        first_call_ns: first,
        warmup_ns,
        samples,
        stop,
        cost,
        readings: [("load", load.readings), ("first_call", first_readings), ("steady", steady_readings)]
            .map(|(interval, readings)| (interval.to_owned(), readings))
            .into(),
        profile: None,
        sustained: None,
    })
}

/// Makes and times calls.
struct Caller<'a> {
    session: &'a mut dyn Session,
    call: &'a Call,
    clock: &'a dyn Clock,
    sync: &'a dyn Fn() -> candle_core::Result<()>,
    interrupted: &'a dyn Fn() -> bool,
    progress: &'a mut dyn FnMut(Progress),
}

impl Caller<'_> {
    /// The next call of `stage`, after `calls` of it.
    fn next(&mut self, stage: Stage, calls: usize, spread: Option<f64>) -> Result<Sample, HarnessError> {
        if (self.interrupted)() {
            return Err(HarnessError::Interrupted { stage });
        }
        let sample = sync::time_call(self.session, self.call, self.clock, self.sync)
            .map_err(|source| HarnessError::Call { stage, calls, source })?;
        (self.progress)(Progress { stage, calls: calls + 1, last_ns: sample.total_ns, spread });
        Ok(sample)
    }

    fn since(&self, start_ns: u64) -> Duration {
        Duration::from_nanos(self.clock.now_ns() - start_ns)
    }
}

/// What the samples themselves say against the measurement.
pub fn warnings(measurement: &Measurement, plan: &Plan) -> Vec<Warning> {
    let totals: Vec<u64> = measurement.samples.iter().map(|sample| sample.total_ns).collect();
    let Some(summary) = Summary::of(&totals) else { return Vec::new() };
    let mut warnings = Vec::new();
    let mut warn = |kind: &str, message: String| warnings.push(Warning { kind: kind.to_owned(), message });
    if summary.interval.is_none() {
        warn(
            "few_samples",
            format!(
                "{} samples are too few for a 95 % interval of the median, which takes {INTERVAL_MIN_SAMPLES}; allow more time",
                summary.count
            ),
        );
    }
    let spread = summary.interval.map(|interval| interval.relative_half_width(summary.median));
    if let Some(spread) = spread.filter(|&spread| spread > plan.target) {
        warn(
            "spread",
            format!(
                "the median is known to ±{:.1} % only, and ±{:.1} % was asked for; quieten the machine or allow more time",
                spread * 100.0,
                plan.target * 100.0
            ),
        );
    }
    if let Some(change) = drift(&totals).filter(|change| change.abs() > DRIFT) {
        warn(
            "drift",
            format!(
                "the second half of the samples is {:+.1} % against the first; clocks, temperature or load changed meanwhile",
                change * 100.0
            ),
        );
    }
    if !summary.outliers.is_empty() {
        warn(
            "outliers",
            format!(
                "{} of {} samples lie beyond 5 standard deviations (by MAD) of the median; they are kept",
                summary.outliers.len(),
                summary.count
            ),
        );
    }
    if !warmup::settled(measurement.first_call_ns, &measurement.warmup_ns, plan.warmup_tolerance) {
        warn(
            "warmup",
            format!(
                "after {} warm-up calls two in a row still differed by more than {:.0} %",
                measurement.warmup_ns.len(),
                plan.warmup_tolerance * 100.0
            ),
        );
    }
    warnings
}

/// Change of the median from the first half of the samples to the second, where it is more than three standard errors.
fn drift(totals: &[u64]) -> Option<f64> {
    if totals.len() < 2 * INTERVAL_MIN_SAMPLES {
        return None;
    }
    let (first, second) = totals.split_at(totals.len() / 2);
    let (first_median, second_median) = (median(first)?, median(second)?);
    let variance_of_median = |half: &[u64]| {
        // π/2 · σ² / n, for samples that are nearly normal
        let sigma = Summary::of(half)?.mad * MAD_TO_SIGMA;
        Some(std::f64::consts::FRAC_PI_2 * sigma * sigma / half.len() as f64)
    };
    let standard_error = (variance_of_median(first)? + variance_of_median(second)?).sqrt();
    let change = second_median - first_median;
    (change.abs() > 3.0 * standard_error).then(|| change / first_median)
}

#[cfg(test)]
mod tests;
