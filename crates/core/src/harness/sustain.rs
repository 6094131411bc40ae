//! Calls one after another over minutes, in windows, with what the machine tells of its clock, temperature and power.

use std::time::Duration;

use super::{Caller, Env, HarnessError, Stage, metered};
use crate::hardware::sensors::{self, Sensors};
use crate::meters::{Quantity, Reading, Scope};
use crate::metrics::{self, Metric};
use crate::session::{Call, Session};
use crate::stats;
use crate::sustain::{Sustained, Window};

/// Windows that a run is cut into.
const WINDOWS: u32 = 60;
/// The shortest one: sensors change more slowly than that.
const LEAST_WINDOW: Duration = Duration::from_secs(1);

/// Calls `call` for `duration`, and at least once. An interruption keeps the windows so far.
///
/// # Errors
/// [`HarnessError::Call`].
pub fn sustain(
    session: &mut dyn Session,
    call: &Call,
    duration: Duration,
    env: &mut Env<'_>,
) -> Result<Sustained, HarnessError> {
    let Env { clock, meters, sync, interrupted, progress } = env;
    let mut caller =
        Caller { session, call, clock: *clock, sync: *sync, interrupted: *interrupted, progress: *progress };
    let length = (duration / WINDOWS).max(LEAST_WINDOW.min(duration));
    let mut sensors = Sensors::open();
    let (mut windows, mut last_energy, mut last_look) = (Vec::new(), None, None);
    let (begin, mut calls, mut stopped) = (caller.clock.now_ns(), 0, false);
    while !stopped && (windows.is_empty() || caller.since(begin) < duration) {
        let start = caller.clock.now_ns();
        let (times, readings) = metered(meters, || {
            let mut times = Vec::new();
            while times.is_empty() || (caller.since(start) < length && caller.since(begin) < duration) {
                match caller.next(Stage::Sustained, calls, None) {
                    Ok(sample) => times.push(sample.total_ns),
                    Err(HarnessError::Interrupted { .. }) => {
                        stopped = true;
                        break;
                    }
                    Err(error) => return Err(error),
                }
                calls += 1;
            }
            Ok(times)
        });
        let times = times?;
        let Some(median) = stats::median(&times) else { break };
        let end = caller.clock.now_ns();
        let look = sensors.look();
        let energy = readings.into_iter().find(|reading| reading.metric == metrics::ENERGY.name);
        let watts = energy.as_ref().and_then(|reading| Some(reading.quantity.value()? / ((end - start) as f64 * 1e-9)));
        windows.push(Window {
            start_ns: start - begin,
            end_ns: end - begin,
            calls: times.len() as u64,
            median_ns: median as u64,
            clock_mhz: look.clock_mhz.as_ref().ok().copied(),
            temperature_c: look.temperature_c.as_ref().ok().copied(),
            power_w: watts,
        });
        (last_energy, last_look) = (energy, Some(look));
    }
    let asked_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let sensors = summary(&windows, last_look.as_ref(), last_energy.as_ref());
    Ok(Sustained { asked_ns, windows, sensors })
}

/// The mean of each sensor over the windows, or why it gave nothing.
fn summary(windows: &[Window], look: Option<&sensors::Look>, energy: Option<&Reading>) -> Vec<Reading> {
    let mean = |metric: &Metric, scope, sensor: &str, values: Vec<Option<f64>>, reason: Option<String>| {
        let values: Vec<f64> = values.into_iter().flatten().collect();
        let quantity = match (values.is_empty(), reason) {
            (false, _) => Quantity::Derived {
                value: values.iter().sum::<f64>() / values.len() as f64,
                from: format!("the mean over {} windows", values.len()),
            },
            (true, reason) => {
                Quantity::Unavailable { reason: reason.unwrap_or_else(|| "it was never read".to_owned()) }
            }
        };
        Reading::new(metric, scope, sensor, quantity)
    };
    let clock = windows.iter().map(|window| window.clock_mhz).collect();
    let temperature = windows.iter().map(|window| window.temperature_c).collect();
    let power = windows.iter().map(|window| window.power_w).collect();
    let why_no_energy = energy.and_then(|reading| match &reading.quantity {
        Quantity::Unavailable { reason } => Some(reason.clone()),
        _ => None,
    });
    let energy_sensor = energy.map_or("none", |reading| reading.sensor.as_str());
    vec![
        mean(&metrics::CLOCK, Scope::Machine, sensors::CLOCK, clock, look.and_then(|l| l.clock_mhz.clone().err())),
        mean(
            &metrics::TEMPERATURE,
            Scope::Machine,
            sensors::TEMPERATURE,
            temperature,
            look.and_then(|l| l.temperature_c.clone().err()),
        ),
        mean(&metrics::POWER, Scope::Device, energy_sensor, power, why_no_energy),
    ]
}
