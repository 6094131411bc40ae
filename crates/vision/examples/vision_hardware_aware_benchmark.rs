//! What this machine makes of a vision model: the optimisations that its rules choose, the speed with each of them and
//! without, and how far from the measured ceilings that is.
//!
//! ```text
//! cargo run --release -p roofbench-vision --example vision_hardware_aware_benchmark [-- FAMILY [PICTURES]]
//! ```
//!
//! `FAMILY` is `vit` where it is left out. Weights are made from a seed, at the size of the family's default checkpoint:
//! nothing is downloaded, the speed is real, the answers are not. `roofbench run vit --ablate` does the same with
//! processes of their own and with intervals.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::error::Error;
use std::time::Instant;

use roofbench_core::catalog;
use roofbench_core::hardware::{self, Machine};
use roofbench_core::roofline::Ceiling;
use roofbench_core::workload;
use roofbench_vision::optimize::{Model, Plan};
use roofbench_vision::options::{self, Options};
use roofbench_vision::{
    Call, HubOptions, ModelSpec, Session, Source, Unobserved, Weights, aliases, apply_hardware_optimizations, load,
};

/// Calls of each model, after one that warms up.
const CALLS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let family = catalog::family(&arguments.next().unwrap_or("vit".into()))?;
    let pictures: u64 = arguments.next().map_or(Ok(1), |count| count.parse())?;

    let machine = hardware::probe_with_peaks()?;
    let threads = machine.cpu.usable_threads;
    println!("{}, {threads} threads", machine.cpu.model);

    let (_, checkpoint) = catalog::checkpoint(&family.default_checkpoint)?;
    let spec = ModelSpec::new(&family.name, &family.class, checkpoint.config.clone());
    let model = Model { spec: &spec, weight_bytes: Some(4 * checkpoint.parameters), threads, generates: false };
    let plan = apply_hardware_optimizations(&machine, &model);
    for decision in &plan.decisions {
        println!("  {decision}");
    }

    let cell = family.cells.first().ok_or("the family has a standard cell")?.with_batch(pictures)?;
    let call = Call {
        method: "forward".into(),
        inputs: workload::draw(&cell, &spec.config, spec.dtype, &spec.device, 0)?,
        arguments: cell.arguments.clone(),
    };
    println!(
        "\n{:24} {:>12} {:>12} {:>12} {:>10} {:>8}",
        cell.name, "latency, ms", "pictures/s", "GFLOP/s", "roofline", "speedup"
    );
    let mut decided = Measured::load(&spec, &plan)?;
    for _ in 0..=CALLS {
        decided.run(&call)?;
    }
    decided.seconds.remove(0);
    decided.show("as decided", &machine, &call, pictures, None)?;
    for decision in plan.decisions.iter().filter(|decision| decision.applies) {
        let switch = format!("{}{}", if decision.on { '-' } else { '+' }, decision.name);
        let other = plan.clone().switched(&[switch.parse()?], &spec.family)?;
        if other.choices().collect::<Options>() == plan.choices().collect() {
            continue; // of threads, which are the program's affair
        }
        let mut other = Measured::load(&spec, &other)?;
        other.run(&call)?;
        // in turn, so that both see the same machine
        (decided.seconds, other.seconds) = (Vec::new(), Vec::new());
        for _ in 0..CALLS {
            decided.run(&call)?;
            other.run(&call)?;
        }
        other.show(&switch, &machine, &call, pictures, Some(decided.median()))?;
    }
    Ok(())
}

/// A model under a plan, and the seconds of its calls.
struct Measured {
    session: Box<dyn Session>,
    choices: Options,
    seconds: Vec<f64>,
}

impl Measured {
    fn load(spec: &ModelSpec, plan: &Plan) -> Result<Self, Box<dyn Error>> {
        let choices = plan.choices().collect();
        let source = Source::Synthetic { seed: 0 };
        let weights = Weights::open(&source, aliases(&spec.family), &spec.class, &HubOptions::from_env())?;
        let session = options::with(choices, || load(spec, &weights))?;
        Ok(Self { session, choices, seconds: Vec::new() })
    }

    fn run(&mut self, call: &Call) -> Result<(), Box<dyn Error>> {
        let began = Instant::now();
        options::with(self.choices, || self.session.call(call, &mut Unobserved))?;
        self.seconds.push(began.elapsed().as_secs_f64());
        Ok(())
    }

    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    /// Prints a row; the speedup is this plan's over the one as decided, whose seconds are `decided`.
    fn show(
        &self,
        name: &str,
        machine: &Machine,
        call: &Call,
        pictures: u64,
        decided: Option<f64>,
    ) -> Result<(), Box<dyn Error>> {
        let seconds = self.median();
        let cost = self.session.cost(call)?.first().ok_or("a call has a phase")?.cost;
        let place = Ceiling::of(machine, "cpu", "f32", machine.cpu.usable_threads)?.place(cost, seconds)?;
        let speedup = decided.map_or_else(String::new, |decided| format!("{:.2}", decided / seconds));
        println!(
            "{name:24} {:12.1} {:12.2} {:12.0} {:8.0} % {speedup:>8}",
            seconds * 1e3,
            pictures as f64 / seconds,
            place.achieved * 1e-9,
            100.0 * place.fraction,
        );
        Ok(())
    }
}
