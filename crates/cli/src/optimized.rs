//! A plan of optimisations, decided and made true: the one place that knows how a choice reaches a model.

use std::collections::BTreeMap;

use anyhow::Context;
use roofbench_core::cost::{Cost, Outline, PhaseCost};
use roofbench_core::optimize::{self, Model, OptimizeError, Plan, Switch};
use roofbench_core::session::{Call, ModelSpec, Observer, Phase, Session, SessionError, Tensors};
use roofbench_nn::options::{self, Quantized};
use roofbench_nn::pool::{self, Pinning, PoolConfig};

use crate::job::Job;
use crate::{memory, models};

/// What the rules and the user say of `job`.
///
/// # Errors
/// The user wants something on that can't be.
pub(crate) fn plan(job: &Job, spec: &ModelSpec) -> Result<Plan, OptimizeError> {
    let model = Model {
        spec,
        weight_bytes: memory::stored_bytes(job),
        threads: u32::try_from(job.threads).unwrap_or(u32::MAX),
        generates: job.cell.new_tokens.is_some(),
    };
    let plan = models::apply_hardware_optimizations(&job.machine, &model);
    let pinned = optimize::PINNED_THREADS.name;
    let pin = job.pin && plan.get(pinned).is_some_and(|decision| decision.applies);
    let pin = pin.then(|| Switch { name: pinned.to_owned(), on: true });
    let switches: Vec<Switch> = pin.into_iter().chain(job.switches.iter().cloned()).collect();
    plan.switched(&switches, &job.family)
}

/// Makes this thread's models and the pool follow `plan`; true when threads are tied to CPUs.
///
/// # Errors
/// The system refuses threads, or to pin them.
pub(crate) fn apply(job: &Job, plan: &Plan) -> anyhow::Result<bool> {
    // An engine that isn't ours has no such choice, and is pinned where that was asked for.
    let pinned = match plan.get(optimize::PINNED_THREADS.name) {
        Some(decision) if decision.applies => decision.on,
        _ => job.pin,
    };
    let pin = if pinned { Pinning::Compact } else { Pinning::None };
    pool::configure(PoolConfig { threads: job.threads, pin }).context("--threads, --pin")?;
    options::set(plan.choices().collect());
    options::take_quantized();
    Ok(pinned)
}

/// What `call` costs on the model of `spec` under `plan`, without loading it.
///
/// # Errors
/// Names what of the spec, its config or the call is not supported.
pub(crate) fn cost(spec: &ModelSpec, call: &Call, plan: &Plan) -> Result<Outline, SessionError> {
    options::take_quantized();
    let outline = options::with(plan.choices().collect(), || models::cost(spec, call))?;
    Ok(Outline { phases: smaller_all(outline.phases, options::take_quantized()), ..outline })
}

/// A session that this thread has loaded under a plan.
pub(crate) struct Optimized {
    session: Box<dyn Session>,
    decode_threads: Option<usize>,
    quantized: Quantized,
}

impl Optimized {
    /// `session` was loaded last.
    pub(crate) fn new(session: Box<dyn Session>, plan: &Plan) -> Self {
        let decode_threads = plan.value(optimize::DECODE_THREADS.name).map(|threads| threads as usize);
        Self { session, decode_threads, quantized: options::take_quantized() }
    }
}

impl Session for Optimized {
    fn call(&mut self, call: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
        let Some(threads) = self.decode_threads else { return self.session.call(call, observer) };
        let result = self.session.call(call, &mut Phases { observer, threads });
        pool::limit(None);
        result
    }

    /// The formulas know weights in the type that they are stored in.
    fn cost(&self, call: &Call) -> Result<Vec<PhaseCost>, SessionError> {
        Ok(smaller_all(self.session.cost(call)?, self.quantized))
    }

    fn paths(&self) -> BTreeMap<String, String> {
        self.session.paths()
    }
}

fn smaller_all(phases: Vec<PhaseCost>, quantized: Quantized) -> Vec<PhaseCost> {
    phases.into_iter().map(|phase| PhaseCost { cost: smaller(phase, quantized), ..phase }).collect()
}

/// The cost of `phase` when as many of its weights as were quantised are read in their smaller form.
fn smaller(phase: PhaseCost, quantized: Quantized) -> Cost {
    let Quantized { native_bytes, kept_bytes } = quantized;
    let of_dense = phase.cost.weight_bytes.min(native_bytes.saturating_mul(phase.repeats));
    let saved = of_dense as f64 * (1.0 - kept_bytes as f64 / native_bytes.max(1) as f64);
    Cost { weight_bytes: phase.cost.weight_bytes - saved.clamp(0.0, of_dense as f64) as u64, ..phase.cost }
}

/// Passes boundaries on, and gives the phases their threads.
struct Phases<'a> {
    observer: &'a mut dyn Observer,
    threads: usize,
}

impl Observer for Phases<'_> {
    fn end(&mut self, phase: Phase) {
        self.observer.end(phase);
        if phase == Phase::Prefill {
            pool::limit(Some(self.threads));
        }
    }

    fn tokens(&mut self, tokens: &[i64]) {
        self.observer.tokens(tokens);
    }
}

#[cfg(test)]
mod tests {
    use roofbench_core::optimize::{DecidedBy, Decision};

    use super::*;

    /// Tells how many threads each phase has.
    struct Decoder(Vec<usize>);

    impl Session for Decoder {
        fn call(&mut self, _: &Call, observer: &mut dyn Observer) -> Result<Tensors, SessionError> {
            for phase in [Phase::Prefill, Phase::Decode, Phase::Decode] {
                self.0.push(pool::threads());
                observer.end(phase);
            }
            let threads: Vec<u32> = self.0.drain(..).map(|threads| threads as u32).collect();
            Ok(Tensors::from([("threads".to_owned(), candle_core::Tensor::new(threads, &candle_core::Device::Cpu)?)]))
        }
        fn cost(&self, _: &Call) -> Result<Vec<PhaseCost>, SessionError> {
            let cost = Cost { weight_bytes: 1000, ..Cost::default() };
            Ok(vec![PhaseCost { phase: Phase::Decode, repeats: 2, cost }])
        }
    }

    #[test]
    fn decoding_has_its_own_threads() {
        pool::configure(PoolConfig { threads: 3, pin: Pinning::None }).unwrap();
        let decision = Decision {
            name: optimize::DECODE_THREADS.name.to_owned(),
            on: true,
            applies: true,
            by: DecidedBy::Rule,
            reason: String::new(),
            value: Some(2),
        };
        let mut session = Optimized::new(Box::new(Decoder(Vec::new())), &Plan { decisions: vec![decision] });
        for _ in 0..2 {
            let threads = &session.call(&Call::default(), &mut roofbench_core::session::Unobserved).unwrap()["threads"];
            assert_eq!(threads.to_vec1::<u32>().unwrap(), [3, 2, 2]);
        }
    }

    #[test]
    fn smaller_weights_are_counted_as_they_are_read() {
        let mut session = Optimized::new(Box::new(Decoder(Vec::new())), &Plan::default());
        let bytes = |session: &Optimized| session.cost(&Call::default()).unwrap()[0].cost.weight_bytes;
        assert_eq!(bytes(&session), 1000);
        // 400 of 500 bytes of each of two passes are of dense layers, and now 100
        session.quantized = Quantized { native_bytes: 400, kept_bytes: 100 };
        assert_eq!(bytes(&session), 1000 - 2 * 300);
    }
}
