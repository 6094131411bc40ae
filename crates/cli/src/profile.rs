//! Takes a profile of a call: the blocks time their operations, the model announces its phases.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use roofbench_core::cost::Cost;
use roofbench_core::profile::{Operation, Profile, ProfiledCall};
use roofbench_core::session::{Call, Observer, Phase, Session};
use roofbench_nn::cost::{self, Span};

/// Calls that a profile is the mean of, unless they take too long.
const MOST_CALLS: usize = 5;
/// No new call begins after this time.
const MOST_TIME: Duration = Duration::from_secs(5);

/// Profiles calls of `session`, the last of which is written to `trace` where that is wanted.
///
/// # Errors
/// The call fails, or the trace can't be written.
pub(crate) fn take(
    session: &mut dyn Session,
    call: &Call,
    trace: Option<&Path>,
    is_stopped: impl Fn() -> bool,
) -> anyhow::Result<Option<Profile>> {
    let (began, mut calls) = (Instant::now(), Vec::new());
    while calls.len() < MOST_CALLS && (calls.is_empty() || began.elapsed() < MOST_TIME) && !is_stopped() {
        let mut phases = Phases { began: Instant::now(), ends: Vec::new() };
        let (outputs, spans) = cost::profile(|| session.call(call, &mut phases));
        let total_ns = nanos(phases.began.elapsed());
        outputs.context("--profile")?;
        calls.push(ProfiledCall {
            total_ns,
            ends: phases.ends,
            operations: spans.into_iter().map(operation).collect(),
        });
    }
    if let (Some(path), Some(last)) = (trace, calls.last()) {
        let text = last.chrome_trace().to_string();
        std::fs::write(path, text).with_context(|| format!("--trace {}", path.display()))?;
    }
    Ok(Profile::of(&calls))
}

fn operation(span: Span) -> Operation {
    let cost::Recorded { flops, weight_bytes, activation_bytes } = span.cost;
    Operation {
        operator: span.operator.to_owned(),
        name: span.name.map(|name| name.to_string()),
        start_ns: nanos(span.start),
        ns: nanos(span.time),
        cost: Cost { flops, weight_bytes, activation_bytes, kv_bytes: 0 },
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// When each phase ended.
struct Phases {
    began: Instant,
    ends: Vec<(Phase, u64)>,
}

impl Observer for Phases {
    fn end(&mut self, phase: Phase) {
        self.ends.push((phase, nanos(self.began.elapsed())));
    }
}
