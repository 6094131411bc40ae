//! What this machine makes of wav2vec 2.0 on a spoken sentence: the optimisations that its rules choose, the speed with
//! each of them and without, and how far from the measured ceilings that is.
//!
//! ```text
//! cargo run --release -p roofbench-speech --example speech_hardware_aware_benchmark [-- FILE]
//! ```
//!
//! Weights are made from a seed, at the published size of wav2vec2-base: nothing is downloaded, the speed is real, the
//! text is not. `roofbench run wav2vec2 --ablate` does the same with processes of their own, in alternation, and with
//! intervals.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use roofbench_core::hardware::{self, Machine};
use roofbench_core::roofline::Ceiling;
use roofbench_speech::audio::Sound;
use roofbench_speech::optimize::{Model, Plan};
use roofbench_speech::options::{self};
use roofbench_speech::preprocess::{self, Padding, WaveformProcessor};
use roofbench_speech::serde_json::json;
use roofbench_speech::{
    Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, apply_hardware_optimizations, load,
};

const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let machine = hardware::probe_with_peaks()?;
    let threads = machine.cpu.usable_threads;
    println!("{}, {threads} threads", machine.cpu.model);

    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/speech.flac");
    let file = std::env::args().nth(1).map_or(sample, Into::into);
    let processor = WaveformProcessor::default();
    let began = Instant::now();
    let sound = Sound::read(&file)?.resampled(processor.sampling_rate)?;
    let seconds = sound.seconds();
    let padding = Padding::Longest;
    let options = preprocess::Options { padding, cut: None, multiple_of: None, attention_mask: false };
    let inputs = processor.prepare(vec![sound.mono()], &options)?;
    println!("{seconds:.2} s of sound, read and prepared in {:.1} ms", began.elapsed().as_secs_f64() * 1e3);

    let spec = ModelSpec::new("wav2vec2", "Wav2Vec2ForCTC", json!({})); // the base model's sizes are the defaults
    let model = Model { spec: &spec, weight_bytes: Some(378_000_000), threads, generates: false };
    let plan = apply_hardware_optimizations(&machine, &model);
    for decision in &plan.decisions {
        println!("  {decision}");
    }

    println!("\n{:24} {:>10} {:>8} {:>10}", "", "call, ms", "RTFx", "roofline");
    let call = Call { method: "forward".into(), inputs, arguments: Default::default() };
    let chosen = show("as decided", &machine, &spec, &plan, &call, seconds)?;
    // decoding is no part of a call
    for decision in plan.decisions.iter().filter(|d| d.applies && d.name != "overlapped-decoding") {
        let switch = format!("{}{}", if decision.on { '-' } else { '+' }, decision.name);
        let other = plan.clone().switched(&[switch.parse()?], &spec.family)?;
        let time = show(&switch, &machine, &spec, &other, &call, seconds)?;
        println!("{:24} {:.2} times the decided one's time", "", time / chosen);
    }
    Ok(())
}

/// Loads the model under `plan` and calls it; prints a row, and gives the median seconds of a call.
fn show(
    name: &str,
    machine: &Machine,
    spec: &ModelSpec,
    plan: &Plan,
    call: &Call,
    seconds: f64,
) -> Result<f64, Box<dyn Error>> {
    options::set(plan.choices().collect()); // for what this thread loads and calls
    let weights = Weights::open(&Source::Synthetic { seed: 0 }, aliases(spec), &spec.class, &HubOptions::from_env())?;
    let mut session = load(spec, &weights)?;
    let mut times = Vec::new();
    for _ in 0..=RUNS {
        let began = Instant::now();
        session.call(call, &mut Unobserved)?;
        times.push(began.elapsed().as_secs_f64());
    }
    let steady = &mut times[1..];
    steady.sort_by(f64::total_cmp);
    let time = steady[RUNS / 2];
    let cost = session.cost(call)?[0].cost;
    let place = Ceiling::of(machine, "cpu", "f32", machine.cpu.usable_threads)?.place(cost, time)?;
    println!("{name:24} {:10.1} {:8.1} {:8.0} %", time * 1e3, seconds / time, 100.0 * place.fraction);
    Ok(time)
}
