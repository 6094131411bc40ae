//! What this machine makes of four questions about one picture: the optimisations that its rules choose, the time of each
//! component with them, and of the whole call without each of them.
//!
//! ```text
//! cargo run --release -p roofbench-multimodal --example multimodal_hardware_aware_benchmark
//! ```
//!
//! Weights are made from a seed, at the published size of BLIP's answerer: nothing is downloaded, the speed is real, the
//! answers are not. `roofbench run blip --ablate` does the same with processes of their own, in alternation, and with
//! intervals.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::error::Error;
use std::time::Instant;

use roofbench_core::hardware;
use roofbench_core::roofline::Ceiling;
use roofbench_multimodal::candle_core::{DType, Device, Tensor};
use roofbench_multimodal::optimize::{Model, Plan};
use roofbench_multimodal::options::{self};
use roofbench_multimodal::serde_json::json;
use roofbench_multimodal::{
    Call, HubOptions, ModelSpec, Observer, Phase, PhaseCost, Session, Source, Weights, aliases,
    apply_hardware_optimizations, load,
};

const QUESTIONS: usize = 4;
const WORDS: usize = 12;
const NEW_TOKENS: usize = 4;
const RUNS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let machine = hardware::probe_with_peaks()?;
    let threads = machine.cpu.usable_threads;
    println!("{}, {threads} threads", machine.cpu.model);

    let spec = ModelSpec::new(
        "blip",
        "BlipForQuestionAnswering",
        json!({"text_config": {"num_attention_heads": 12}, "vision_config": {}}),
    );
    let model = Model { spec: &spec, weight_bytes: Some(1_539_000_000), threads, generates: true };
    let plan = apply_hardware_optimizations(&machine, &model);
    for decision in &plan.decisions {
        println!("  {decision}");
    }

    let (chosen, components) = measured(&spec, &plan)?;
    println!("\n{QUESTIONS} questions about one picture: {:.0} ms", chosen * 1e3);
    let ceiling = Ceiling::of(&machine, "cpu", "f32", threads)?;
    for (PhaseCost { phase, cost, .. }, seconds) in components {
        let place = ceiling.place(cost, seconds)?;
        println!(
            "  {:10} {:8.1} ms {:5.0} % of the call {:8.1} GFLOP/s {:5.0} % of the roofline ({})",
            phase.name(),
            seconds * 1e3,
            100.0 * seconds / chosen,
            place.achieved / 1e9,
            100.0 * place.fraction,
            place.bound
        );
    }
    println!();
    for name in ["shared-pictures", "fused-attention", "packed-weights"] {
        let other = plan.clone().switched(&[format!("-{name}").parse()?], &spec.family)?;
        let (time, _) = measured(&spec, &other)?;
        println!("without {name:16} {:8.0} ms, {:.2} times as long", time * 1e3, time / chosen);
    }
    Ok(())
}

/// Seconds of a call, and of each of its phases with its cost.
type Measured = (f64, Vec<(PhaseCost, f64)>);

/// Loads the model under `plan`, and measures it.
fn measured(spec: &ModelSpec, plan: &Plan) -> Result<Measured, Box<dyn Error>> {
    options::set(plan.choices().collect()); // for what this thread loads and calls
    let weights = Weights::open(&Source::Synthetic { seed: 0 }, aliases(spec), &spec.class, &HubOptions::from_env())?;
    let mut session = load(spec, &weights)?;

    let words: Vec<i64> = (0..QUESTIONS * WORDS).map(|i| 1000 + i as i64 * 389 % 20_000).collect();
    let picture = Tensor::rand(-1f32, 1f32, (1, 3, 384, 384), &Device::Cpu)?;
    let tokens = json!({"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS});
    let call = Call {
        method: "generate".into(),
        inputs: [
            ("pixel_values".into(), picture.repeat((QUESTIONS, 1, 1, 1))?),
            ("input_ids".into(), Tensor::from_vec(words, (QUESTIONS, WORDS), &Device::Cpu)?),
            ("attention_mask".into(), Tensor::ones((QUESTIONS, WORDS), DType::I64, &Device::Cpu)?),
        ]
        .into(),
        arguments: tokens.as_object().cloned().unwrap_or_default(),
    };
    let mut runs = Vec::new();
    for _ in 0..=RUNS {
        runs.push(times(session.as_mut(), &call)?);
    }
    let median = |of: &dyn Fn(&Times) -> f64| {
        let mut seconds: Vec<f64> = runs[1..].iter().map(of).collect(); // the first warms up
        seconds.sort_by(f64::total_cmp);
        seconds[RUNS / 2]
    };
    let of = |phase: Phase| median(&|run| run.phases.iter().filter(|(p, _)| *p == phase).map(|(_, s)| s).sum());
    let phases = session.cost(&call)?.into_iter().map(|cost| (cost, of(cost.phase))).collect();
    Ok((median(&|run| run.phases.iter().map(|(_, seconds)| seconds).sum()), phases))
}

fn times(session: &mut dyn Session, call: &Call) -> Result<Times, Box<dyn Error>> {
    let mut times = Times { last: Instant::now(), phases: Vec::new() };
    session.call(call, &mut times)?;
    Ok(times)
}

/// Reads the time where the model says that a phase ends.
struct Times {
    last: Instant,
    phases: Vec<(Phase, f64)>,
}

impl Observer for Times {
    fn end(&mut self, phase: Phase) {
        self.phases.push((phase, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }
}
