//! What this machine makes of GPT-2: the optimisations that its rules choose, the speed with each of them and without, and
//! how far from the measured ceilings that is.
//!
//! ```text
//! cargo run --release -p roofbench-text --example text_hardware_aware_benchmark
//! ```
//!
//! Weights are made from a seed, at GPT-2's published size: nothing is downloaded, the speed is real, the text is not.
//! `roofbench run gpt2 --ablate` does the same with processes of their own, in alternation, and with intervals.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::error::Error;
use std::time::Instant;

use roofbench_core::hardware::{self, Machine};
use roofbench_core::roofline::Ceiling;
use roofbench_text::candle_core::Tensor;
use roofbench_text::optimize::{Model, Plan};
use roofbench_text::options::{self};
use roofbench_text::serde_json::json;
use roofbench_text::{
    Call, HubOptions, ModelSpec, Observer, Phase, Session, Source, Weights, aliases, apply_hardware_optimizations, load,
};

const PROMPT: usize = 128;
const NEW_TOKENS: usize = 32;
const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let machine = hardware::probe_with_peaks()?;
    let threads = machine.cpu.usable_threads;
    println!("{}, {threads} threads", machine.cpu.model);

    let spec = ModelSpec::new(
        "gpt2",
        "GPT2LMHeadModel",
        json!({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}),
    );
    let model = Model { spec: &spec, weight_bytes: Some(498_000_000), threads, generates: true };
    let plan = apply_hardware_optimizations(&machine, &model);
    for decision in &plan.decisions {
        println!("  {decision}");
    }

    println!("\n{:32} {:>12} {:>12} {:>14} {:>10}", "", "prefill, ms", "a token, ms", "tokens/s", "roofline");
    let chosen = show("as decided", &machine, &spec, &plan)?;
    for decision in plan.decisions.iter().filter(|decision| decision.applies) {
        let sign = if decision.on { '-' } else { '+' };
        let other = plan.clone().switched(&[format!("{sign}{}", decision.name).parse()?], &spec.family)?;
        let time = show(&format!("{sign}{}", decision.name), &machine, &spec, &other)?;
        println!("{:32} {:.2} times the decided one's time", "", time / chosen);
    }
    Ok(())
}

/// Loads and measures the model under `plan`; prints a row, and gives the seconds of a call.
fn show(name: &str, machine: &Machine, spec: &ModelSpec, plan: &Plan) -> Result<f64, Box<dyn Error>> {
    options::set(plan.choices().collect()); // for what this thread loads and calls
    let weights = Weights::open(&Source::Synthetic { seed: 0 }, aliases(spec), &spec.class, &HubOptions::from_env())?;
    let mut session = load(spec, &weights)?;

    let prompt: Vec<i64> = (0..PROMPT as i64).map(|i| 3 + i * 389 % 50_000).collect();
    let tokens = json!({"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS});
    let call = Call {
        method: "generate".into(),
        inputs: [("input_ids".into(), Tensor::from_vec(prompt, (1, PROMPT), &spec.device)?)].into(),
        arguments: tokens.as_object().cloned().unwrap_or_default(),
    };
    let [prefill, decode] = median_phases(session.as_mut(), &call)?;
    let step = decode / (NEW_TOKENS - 1) as f64;

    let costs = session.cost(&call)?;
    let cost = costs.iter().find(|cost| cost.phase == Phase::Decode).ok_or("a generation has a decode phase")?;
    let place = Ceiling::of(machine, "cpu", "f32", machine.cpu.usable_threads)?.place(cost.cost, decode)?;
    println!(
        "{name:32} {:12.1} {:12.2} {:14.1} {:8.0} %",
        prefill * 1e3,
        step * 1e3,
        1.0 / step,
        100.0 * place.fraction
    );
    Ok(prefill + decode)
}

/// Seconds of the prefill and of all decode steps of `call`: medians of [`RUNS`] runs after one that warms up.
fn median_phases(session: &mut dyn Session, call: &Call) -> Result<[f64; 2], Box<dyn Error>> {
    let mut runs = Vec::new();
    for _ in 0..=RUNS {
        let mut clock = Clock { began: Instant::now(), prefill: 0.0, all: 0.0 };
        session.call(call, &mut clock)?;
        runs.push([clock.prefill, clock.all - clock.prefill]);
    }
    let median = |phase: usize| {
        let mut times: Vec<f64> = runs[1..].iter().map(|run| run[phase]).collect();
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    };
    Ok([median(0), median(1)])
}

/// Reads the time where the model says that a phase ends.
struct Clock {
    began: Instant,
    prefill: f64,
    all: f64,
}

impl Observer for Clock {
    fn end(&mut self, phase: Phase) {
        self.all = self.began.elapsed().as_secs_f64();
        if phase == Phase::Prefill {
            self.prefill = self.all;
        }
    }
}
