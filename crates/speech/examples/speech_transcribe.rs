//! Writes down what is said in a file and says how long that took.
//!
//! ```text
//! cargo run --release -p roofbench-speech --example speech_transcribe [-- FOLDER-OR-REPOSITORY FILE]
//! ```
//!
//! Without arguments the model is a wav2vec 2.0 base of made-up weights on 10 s of a tone: there is no text, and the time
//! is real. A folder holds config.json, preprocessor_config.json, vocab.json and model.safetensors;
//! `facebook/wav2vec2-base-960h` comes from the Hub.

#![expect(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use roofbench_speech::candle_core::{DType, Device};
use roofbench_speech::ctc::CtcDecoder;
use roofbench_speech::preprocess::{Options, Padding, WaveformProcessor};
use roofbench_speech::serde_json::json;
use roofbench_speech::{Call, Engine, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};

const RUNS: usize = 5;
const RATE: usize = 16_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let source = match arguments.next() {
        None => Source::Synthetic { seed: 0 },
        Some(path) if Path::new(&path).exists() => Source::Local { path: path.into() },
        Some(repository) => Source::Hub { repository, revision: None },
    };
    let file = arguments.next().map(PathBuf::from);

    let mut spec = ModelSpec {
        family: "wav2vec2".into(),
        class: "Wav2Vec2ForCTC".into(),
        config: json!({}), // the base model's sizes are the defaults
        extra_configs: Default::default(),
        dtype: DType::F32,
        device: Device::Cpu,
        engine: Engine::Roofbench,
    };
    let mut processor = WaveformProcessor::default();
    let mut weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
    let mut decoder = None;
    if !matches!(source, Source::Synthetic { .. }) {
        spec.config = weights.config()?;
        // their names depend on the config
        weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::from_env())?;
        let found = weights.extra_configs()?.remove("preprocessor_config.json");
        processor = WaveformProcessor::from_config(&found.ok_or("no preprocessor_config.json beside the weights")?)?;
        let vocab = weights.file("vocab.json").ok_or("no vocab.json beside the weights")?;
        decoder = Some(CtcDecoder::from_folder(vocab.parent().ok_or("vocab.json is in no folder")?)?);
    }
    let mut session = load(&spec, &weights)?;

    let tone = || (0..10 * RATE).map(|i| (i as f32 * 0.17).sin()).collect();
    let sounds = match file {
        Some(file) => processor.read(&[file])?,
        None => vec![tone()],
    };
    let seconds = sounds[0].len() as f64 / f64::from(processor.sampling_rate);
    let options = Options {
        padding: Padding::Longest,
        cut: None,
        multiple_of: None,
        attention_mask: processor.return_attention_mask,
    };
    let inputs = processor.prepare(sounds, &options)?;
    let call = Call { method: "forward".into(), inputs, arguments: Default::default() };
    let mut logits = session.call(&call, &mut Unobserved)?["logits"].clone();
    let mut times = [Duration::ZERO; RUNS];
    for time in &mut times {
        let start = Instant::now();
        logits = session.call(&call, &mut Unobserved)?["logits"].clone();
        *time = start.elapsed();
    }
    times.sort();

    if let Some(decoder) = decoder {
        println!("{}", decoder.decode(&logits)?.join("\n"));
    }
    let median = times[RUNS / 2].as_secs_f64();
    println!("{seconds:.1} s of sound in {:.1} ms, RTFx {:.1} (median of {RUNS})", median * 1e3, seconds / median);
    Ok(())
}
