//! The harness on a clock and a session that the test sets: known durations come out exactly.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::*;
use crate::cost::{Cost, PhaseCost};
use crate::meters::{Quantity, Scope};
use crate::record::StopRule;
use crate::session::{Observer, Phase, Tensors};

const MS: u64 = 1_000_000;

/// Time that passes only where the test says so.
#[derive(Clone, Default)]
struct FakeClock(Rc<Cell<u64>>);

impl FakeClock {
    fn advance(&self, ns: u64) {
        self.0.set(self.0.get() + ns);
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.0.get()
    }
}

/// Call number i takes `plan(i)`: the time of each phase, or `None` for an error.
struct FakeSession<F> {
    clock: FakeClock,
    calls: usize,
    plan: F,
}

impl<F: FnMut(usize) -> Option<Vec<(Phase, u64)>>> Session for FakeSession<F> {
    fn call(&mut self, _call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let phases = (self.plan)(self.calls).ok_or(SessionError::Input {
            name: "input_ids".into(),
            reason: "token 9 is not in the vocabulary".into(),
        })?;
        self.calls += 1;
        for (phase, ns) in phases {
            self.clock.advance(ns);
            observer.end(phase);
        }
        Ok(Tensors::new())
    }

    fn cost(&self, _call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        Ok(vec![PhaseCost { phase: Phase::Forward, repeats: 1, cost: Cost { flops: 7, ..Cost::default() } }])
    }
}

/// Reads the clock, as energy.
struct FakeMeter {
    clock: FakeClock,
    start: u64,
}

impl Meter for FakeMeter {
    fn start(&mut self) {
        self.start = self.clock.now_ns();
    }

    fn stop(&mut self) -> Vec<Reading> {
        vec![Reading {
            metric: "energy".into(),
            unit: "J".into(),
            scope: Scope::Device,
            sensor: "fake".into(),
            quantity: Quantity::Measured { value: (self.clock.now_ns() - self.start) as f64 },
        }]
    }
}

/// Measures with what differs between tests.
struct Bench {
    clock: FakeClock,
    plan: Plan,
    /// Interrupted from this call (counted over all stages) on.
    interrupt_at: usize,
    /// Time that each wait for the device takes.
    sync_ns: u64,
    seen: Vec<Progress>,
}

impl Bench {
    fn new(plan: Plan) -> Self {
        Self { clock: FakeClock::default(), plan, interrupt_at: usize::MAX, sync_ns: 0, seen: vec![] }
    }

    fn run(&mut self, times: impl FnMut(usize) -> Option<Vec<(Phase, u64)>>) -> Result<Measurement, HarnessError> {
        let clock = self.clock.clone();
        let mut session = FakeSession { clock: clock.clone(), calls: 0, plan: times };
        let mut meters: Vec<Box<dyn Meter>> = vec![Box::new(FakeMeter { clock: clock.clone(), start: 0 })];
        let seen = RefCell::new(&mut self.seen);
        let (interrupt_at, sync_ns) = (self.interrupt_at, self.sync_ns);
        let mut env = Env {
            clock: &clock,
            meters: &mut meters,
            sync: &|| {
                clock.advance(sync_ns);
                Ok(())
            },
            interrupted: &|| seen.borrow().len() >= interrupt_at,
            progress: &mut |progress| seen.borrow_mut().push(progress),
        };
        let load = Interval { ns: 5 * MS, readings: vec![] };
        measure(&mut session, &Call::default(), load, &self.plan, &mut env)
    }
}

fn forward(ns: u64) -> Option<Vec<(Phase, u64)>> {
    Some(vec![(Phase::Forward, ns)])
}

fn plan() -> Plan {
    Plan { min_time: Duration::ZERO, ..Plan::default() }
}

#[test]
fn known_durations_come_out_exactly() {
    let mut bench = Bench::new(plan());
    // first call, warm-up of 2 (20 -> 12 -> 12), then steady
    let times = [90, 20, 12, 12];
    let measurement = bench.run(|i| forward(times.get(i).copied().unwrap_or(10) * MS)).unwrap();
    assert_eq!(measurement.load_ns, 5 * MS);
    assert_eq!(measurement.first_call_ns, 90 * MS);
    assert_eq!(measurement.warmup_ns, [20 * MS, 12 * MS, 12 * MS]);
    assert_eq!(measurement.samples, vec![Sample { total_ns: 10 * MS, phases: forward(10 * MS).unwrap() }; 10]);
    assert_eq!(measurement.stop, StopRule::SpreadSettled);
    assert_eq!(measurement.cost[0].cost.flops, 7);
    let stages: Vec<Stage> = bench.seen.iter().map(|p| p.stage).collect();
    assert_eq!(stages[..5], [Stage::FirstCall, Stage::WarmUp, Stage::WarmUp, Stage::WarmUp, Stage::Steady]);
    assert_eq!(stages.len(), 14);
    assert!(warnings(&measurement, &bench.plan).is_empty());
}

#[test]
fn meters_cover_their_interval_alone() {
    let measurement = Bench::new(plan()).run(|_| forward(10 * MS)).unwrap();
    let energy = |interval: &str| measurement.readings[interval][0].quantity.value().unwrap();
    assert_eq!((energy("first_call"), energy("steady")), (1e7, 1e8));
    assert!(measurement.readings["load"].is_empty(), "as the caller gave it");
}

#[test]
fn the_device_is_waited_for_inside_the_time_that_it_belongs_to() {
    let mut bench = Bench::new(plan());
    bench.sync_ns = MS;
    let step = |phase, ms| (phase, ms * MS);
    let call = vec![step(Phase::Prefill, 10), step(Phase::Decode, 3), step(Phase::Decode, 4)];
    let measurement = bench.run(|_| Some(call.clone())).unwrap();
    let expected = vec![step(Phase::Prefill, 11), step(Phase::Decode, 4), step(Phase::Decode, 5)];
    // three boundaries and the end; the wait before the start is outside
    assert_eq!(measurement.samples[0], Sample { total_ns: 21 * MS, phases: expected });
}

/// Alternates widely, so that the interval of the median stays wide.
fn noisy(i: usize) -> Option<Vec<(Phase, u64)>> {
    forward(if i.is_multiple_of(2) { 10 * MS } else { 20 * MS })
}

#[test]
fn stops_when_the_spread_has_settled_and_not_before_the_minimum() {
    let mut bench = Bench::new(Plan { min_samples: 25, ..plan() });
    let measurement = bench.run(|_| forward(10 * MS)).unwrap();
    assert_eq!((measurement.samples.len(), measurement.stop), (25, StopRule::SpreadSettled));
    // 1 s at 10 ms: looked at 10, 11, 13, 15, ... and first past the minimum time at 104
    let mut bench = Bench::new(Plan { min_time: Duration::from_secs(1), ..plan() });
    let measurement = bench.run(|_| forward(10 * MS)).unwrap();
    assert_eq!(measurement.stop, StopRule::SpreadSettled);
    assert!((100..=110).contains(&measurement.samples.len()), "{}", measurement.samples.len());
}

#[test]
fn stops_at_the_most_samples() {
    let mut bench = Bench::new(Plan { max_samples: 12, ..plan() });
    let measurement = bench.run(noisy).unwrap();
    assert_eq!((measurement.samples.len(), measurement.stop), (12, StopRule::MaxSamples));
    let kinds: Vec<String> = warnings(&measurement, &bench.plan).into_iter().map(|w| w.kind).collect();
    assert_eq!(kinds, ["spread", "warmup"]);
}

#[test]
fn stops_at_the_most_time_even_below_the_fewest_samples() {
    let mut bench = Bench::new(Plan { max_time: Duration::from_millis(25), ..plan() });
    let measurement = bench.run(|_| forward(10 * MS)).unwrap();
    assert_eq!((measurement.samples.len(), measurement.stop), (3, StopRule::MaxTime));
    assert_eq!(warnings(&measurement, &bench.plan)[0].kind, "few_samples");
    let mut bench = Bench::new(Plan { max_time: Duration::ZERO, ..plan() });
    assert_eq!(bench.run(|_| forward(10 * MS)).unwrap().samples.len(), 1, "one is always taken");
}

#[test]
fn warmup_ends_at_its_maxima() {
    let mut bench = Bench::new(Plan { max_warmup: 4, ..plan() });
    assert_eq!(bench.run(noisy).unwrap().warmup_ns.len(), 4);
    let mut bench = Bench::new(Plan { max_warmup_time: Duration::from_millis(35), ..plan() });
    // 20 + 10 + 20 ms
    assert_eq!(bench.run(noisy).unwrap().warmup_ns.len(), 3);
    let mut bench = Bench::new(Plan { max_warmup: 0, ..plan() });
    assert!(bench.run(noisy).unwrap().warmup_ns.is_empty());
}

#[test]
fn interruption_keeps_the_samples_taken() {
    let mut bench = Bench::new(plan());
    // first call, one warm-up, three samples
    bench.interrupt_at = 5;
    let measurement = bench.run(|_| forward(10 * MS)).unwrap();
    assert_eq!((measurement.samples.len(), measurement.stop), (3, StopRule::Interrupted));
    for (at, expected) in [(0, Stage::FirstCall), (1, Stage::WarmUp), (2, Stage::Steady)] {
        bench = Bench::new(plan());
        bench.interrupt_at = at;
        let error = bench.run(|_| forward(10 * MS)).unwrap_err();
        assert!(matches!(error, HarnessError::Interrupted { stage } if stage == expected), "{error}");
    }
}

#[test]
fn a_failing_call_names_its_stage_and_what_went_well() {
    for (at, message) in [
        (0, "first call, after 0 good calls: input `input_ids`"),
        (1, "warm-up, after 0 good calls"),
        (6, "steady state, after 4 good calls"),
    ] {
        let error = Bench::new(plan()).run(|i| (i != at).then(|| forward(10 * MS)).flatten()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_failing_device_is_an_error_of_the_call() {
    let clock = FakeClock::default();
    let mut session = FakeSession { clock: clock.clone(), calls: 0, plan: |_| forward(MS) };
    let syncs = Cell::new(0);
    let mut env = Env {
        clock: &clock,
        meters: &mut [],
        // the second wait is the one at the boundary
        sync: &|| {
            syncs.set(syncs.get() + 1);
            if syncs.get() == 2 { Err(candle_core::Error::Msg("device lost".into())) } else { Ok(()) }
        },
        interrupted: &|| false,
        progress: &mut |_| {},
    };
    let load = Interval { ns: 0, readings: vec![] };
    let error = measure(&mut session, &Call::default(), load, &plan(), &mut env).unwrap_err().to_string();
    assert!(error.contains("device lost") && error.contains("first call"), "{error}");
}

#[test]
fn loading_is_timed_with_its_readings_and_its_error() {
    let clock = FakeClock::default();
    let mut meters: Vec<Box<dyn Meter>> = vec![Box::new(FakeMeter { clock: clock.clone(), start: 0 })];
    let mut env =
        Env { clock: &clock, meters: &mut meters, sync: &|| Ok(()), interrupted: &|| false, progress: &mut |_| {} };
    let work = || {
        clock.advance(3 * MS);
        Ok::<_, SessionError>("model")
    };
    let (model, interval) = timed(&mut env, work).unwrap();
    assert_eq!((model, interval.ns, interval.readings.len()), ("model", 3 * MS, 1));
    let refuse = || Err::<(), _>(SessionError::UnsupportedEngine { family: "x".into(), reason: "no".into() });
    assert!(timed(&mut env, refuse).is_err());
}

#[test]
fn drift_is_flagged_and_noise_is_not() {
    // 10 % slower in the second half, each with ±0.5 % of noise
    let half = |base: u64| (0..10u64).map(move |i| base + i * base / 1000);
    let drifting: Vec<u64> = half(10 * MS).chain(half(11 * MS)).collect();
    assert!((drift(&drifting).unwrap() - 0.1).abs() < 0.001);
    let steady: Vec<u64> = half(10 * MS).chain(half(10 * MS)).collect();
    assert_eq!(drift(&steady), None);
    assert_eq!(drift(&drifting[5..15]), None, "too few to tell");

    let mut bench = Bench::new(Plan { min_samples: 20, max_samples: 20, ..plan() });
    let measurement = bench.run(|i| forward(if i < 12 { 10 * MS } else { 11 * MS })).unwrap();
    let kinds: Vec<String> = warnings(&measurement, &bench.plan).into_iter().map(|w| w.kind).collect();
    assert!(kinds.contains(&"drift".to_owned()), "{kinds:?}");
}

#[test]
fn outliers_are_flagged_and_kept() {
    let mut bench = Bench::new(plan());
    let measurement = bench.run(|i| forward(if i == 7 { 50 * MS } else { 10 * MS + i as u64 })).unwrap();
    assert!(measurement.samples.iter().any(|s| s.total_ns == 50 * MS));
    assert_eq!(warnings(&measurement, &bench.plan)[0].kind, "outliers");
}

#[test]
fn a_plan_that_cannot_be_met_is_refused_by_field() {
    let base = Plan::default();
    let bad = [
        ("warmup_tolerance", Plan { warmup_tolerance: f64::NAN, ..base.clone() }),
        ("target", Plan { target: 0.0, ..base.clone() }),
        ("min_samples", Plan { min_samples: 0, ..base.clone() }),
        ("max_samples", Plan { max_samples: 5, ..base.clone() }),
        ("max_time", Plan { max_time: Duration::ZERO, ..base.clone() }),
    ];
    for (name, plan) in bad {
        let error = plan.validate().unwrap_err();
        assert!(matches!(error, HarnessError::Plan { field, .. } if field == name), "{error}");
    }
    assert!(base.validate().is_ok() && Plan::quick().validate().is_ok());
}
