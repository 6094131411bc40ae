//! Embeds sentences with BERT, and prints how alike they are and how long it took.
//!
//! ```text
//! cargo run --release -p roofbench-text --example text_embeddings [FOLDER [SENTENCE...]]
//! ```
//!
//! FOLDER holds config.json, tokenizer.json and the weights of a BERT checkpoint (`cargo xtask checkpoint` fetches
//! one). Without it, the model is BERT-base with synthetic weights, which shows its speed and none of its sense.

#![expect(clippy::print_stdout, reason = "an example prints its result")]

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use roofbench_text::candle_core::{Device, Tensor};
use roofbench_text::serde_json::{Value, json};
use roofbench_text::tasks::{cosine_similarities, embed};
use roofbench_text::tokenize::Tokenizer;
use roofbench_text::{HubOptions, ModelSpec, Source, Tensors, Weights, aliases, load};

const SENTENCES: [&str; 4] = [
    "A small harbour town wakes to the sound of gulls.",
    "Seagulls cry over the port of a little village at dawn.",
    "The central bank left its interest rate unchanged on Thursday.",
    "Borrowing costs stay where they are, policymakers decided.",
];

const RUNS: usize = 11;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map(PathBuf::from);
    let mut sentences: Vec<String> = arguments.collect();
    if sentences.is_empty() {
        sentences = SENTENCES.map(String::from).to_vec();
    }

    let source = match &folder {
        Some(path) => Source::Local { path: path.clone() },
        None => Source::Synthetic { seed: 0 },
    };
    let mut spec = ModelSpec::new("bert", "BertModel", Value::Null);
    let start = Instant::now();
    let weights = Weights::open(&source, aliases(&spec), &spec.class, &HubOptions::default())?;
    let inputs = match &folder {
        Some(folder) => {
            spec.config = weights.config()?;
            Tokenizer::from_file(folder.join("tokenizer.json"))?.encode(&sentences, &spec.device)?
        }
        None => {
            println!("synthetic: the weights are BERT-base's in shape only, and each byte of a sentence is a token;");
            println!("           the times are real, the similarities mean nothing");
            spec.config = json!({
                "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
            });
            bytes_as_tokens(&sentences, &spec.device)?
        }
    };
    let mut session = load(&spec, &weights)?;
    println!("loaded in {:.0} ms", milliseconds(start.elapsed()));

    let mut embeddings = embed(session.as_mut(), inputs.clone())?; // not timed: it warms up
    let mut times = [Duration::ZERO; RUNS];
    for time in &mut times {
        let start = Instant::now();
        embeddings = embed(session.as_mut(), inputs.clone())?;
        *time = start.elapsed();
    }
    times.sort();

    println!("\ncosine similarities");
    for (i, row) in cosine_similarities(&embeddings)?.to_vec2::<f32>()?.iter().enumerate() {
        let row: String = row.iter().map(|similarity| format!("{similarity:7.3}")).collect();
        println!("{row}   {}. {}", i + 1, sentences[i]);
    }
    let (batch, seq) = inputs["input_ids"].dims2()?;
    println!(
        "\n{batch} sentences of up to {seq} tokens in {:.1} ms (median of {RUNS}; {:.1} to {:.1})",
        milliseconds(times[RUNS / 2]),
        milliseconds(times[0]),
        milliseconds(times[RUNS - 1]),
    );
    Ok(())
}

/// Stands in for a tokenizer where there is none: ids by byte, padded with 0.
fn bytes_as_tokens(sentences: &[String], device: &Device) -> Result<Tensors, Box<dyn Error>> {
    let seq = sentences.iter().map(|sentence| sentence.len()).max().unwrap_or(0).min(512);
    let padded = |value: fn(u8) -> i64| {
        let row = |text: &String| text.bytes().map(value).chain(std::iter::repeat(0)).take(seq).collect::<Vec<_>>();
        Tensor::from_vec(sentences.iter().flat_map(row).collect(), (sentences.len(), seq), device)
    };
    let ids = padded(|byte| i64::from(byte) + 1000)?;
    Ok([("input_ids".to_string(), ids), ("attention_mask".to_string(), padded(|_| 1)?)].into())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
