//! Warm-up: calls until two in a row take the same time, which caches, allocators, pools and clocks need.

use super::{Caller, HarnessError, Plan, Stage};

/// Calls until they have settled, or a maximum of `plan`; gives their times. `first` is the time of the call before.
pub(super) fn run(caller: &mut Caller<'_>, first: u64, plan: &Plan) -> Result<Vec<u64>, HarnessError> {
    let start = caller.clock.now_ns();
    let mut times = Vec::new();
    while times.len() < plan.max_warmup
        && caller.since(start) < plan.max_warmup_time
        && !settled(first, &times, plan.warmup_tolerance)
    {
        times.push(caller.next(Stage::WarmUp, times.len(), None)?.total_ns);
    }
    Ok(times)
}

/// Whether the last two calls, the first one included, differ by less than `tolerance`.
pub(super) fn settled(first: u64, times: &[u64], tolerance: f64) -> bool {
    let (last, before) = match times {
        [] => return false,
        [last] => (*last, first),
        [.., before, last] => (*last, *before),
    };
    last.abs_diff(before) as f64 <= tolerance * before as f64
}
