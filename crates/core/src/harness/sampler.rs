//! The steady state: samples until the median is known well enough, within the plan's limits.

use super::{Caller, HarnessError, Plan, Stage};
use crate::record::{Sample, StopRule};
use crate::stats::{INTERVAL_MIN_SAMPLES, median, median_interval};

/// Takes samples and says which rule ended it. An interruption keeps what is there.
pub(super) fn run(caller: &mut Caller<'_>, plan: &Plan) -> Result<(Vec<Sample>, StopRule), HarnessError> {
    let start = caller.clock.now_ns();
    let (mut samples, mut totals) = (Vec::new(), Vec::new());
    let mut spread = None;
    let mut next_look = plan.min_samples.max(INTERVAL_MIN_SAMPLES);
    loop {
        match caller.next(Stage::Steady, samples.len(), spread) {
            Ok(sample) => {
                totals.push(sample.total_ns);
                samples.push(sample);
            }
            Err(HarnessError::Interrupted { .. }) if !samples.is_empty() => {
                return Ok((samples, StopRule::Interrupted));
            }
            Err(error) => return Err(error),
        }
        let elapsed = caller.since(start);
        if totals.len() >= next_look {
            // looking after every tenth more keeps the bootstrap a small part of the time
            next_look = totals.len() + totals.len().div_ceil(10);
            spread = relative_spread(&totals);
            if spread.is_some_and(|spread| spread <= plan.target) && elapsed >= plan.min_time {
                return Ok((samples, StopRule::SpreadSettled));
            }
        }
        if samples.len() >= plan.max_samples {
            return Ok((samples, StopRule::MaxSamples));
        }
        if elapsed >= plan.max_time {
            return Ok((samples, StopRule::MaxTime));
        }
    }
}

/// Half the interval of the median over the median.
fn relative_spread(totals: &[u64]) -> Option<f64> {
    Some(median_interval(totals)?.relative_half_width(median(totals)?))
}
