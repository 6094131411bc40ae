//! Times one call: the device has finished before the clock is read, at the start, at every boundary and at the end.

use crate::meters::clock::Clock;
use crate::record::Sample;
use crate::session::{Call, Observer, Phase, Session, SessionError};

/// Runs `call` and gives its times. Outputs are freed after the last of them.
pub(super) fn time_call(
    session: &mut dyn Session,
    call: &Call,
    clock: &dyn Clock,
    sync: &dyn Fn() -> candle_core::Result<()>,
) -> Result<Sample, SessionError> {
    sync()?;
    let start = clock.now_ns();
    let mut boundaries = Boundaries { clock, sync, last: start, phases: Vec::new(), failure: None };
    let outputs = session.call(call, &mut boundaries)?;
    sync()?;
    let total_ns = clock.now_ns() - start;
    drop(outputs);
    match boundaries.failure {
        Some(error) => Err(error.into()),
        None => Ok(Sample { total_ns, phases: boundaries.phases }),
    }
}

struct Boundaries<'a> {
    clock: &'a dyn Clock,
    sync: &'a dyn Fn() -> candle_core::Result<()>,
    last: u64,
    phases: Vec<(Phase, u64)>,
    /// The device's first error, which a boundary can't return.
    failure: Option<candle_core::Error>,
}

impl Observer for Boundaries<'_> {
    fn end(&mut self, phase: Phase) {
        if let Err(error) = (self.sync)() {
            self.failure.get_or_insert(error);
        }
        let now = self.clock.now_ns();
        self.phases.push((phase, now - self.last));
        self.last = now;
    }
}
