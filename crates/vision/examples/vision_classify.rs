//! Classifies a picture with a ViT and says how long that took.
//!
//! ```text
//! cargo run --release -p roofbench-vision --example vision_classify [-- FOLDER-OR-REPOSITORY [PICTURE]]
//! ```
//!
//! Without an argument the model is a ViT-base of made-up weights, so its answers mean nothing and its time is real.
//! A folder holds config.json, preprocessor_config.json and model.safetensors; `google/vit-base-patch16-224` comes from
//! the Hub.

#![expect(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use roofbench_vision::classify::{classify, labels};
use roofbench_vision::preprocess::ImageProcessor;
use roofbench_vision::serde_json::{Value, json};
use roofbench_vision::{Call, HubOptions, ModelSpec, Source, Unobserved, Weights, aliases, load};

const RUNS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let source = match arguments.next() {
        None => Source::Synthetic { seed: 0 },
        Some(path) if Path::new(&path).exists() => Source::Local { path: path.into() },
        Some(repository) => Source::Hub { repository, revision: None },
    };
    let photo = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/photo.jpg");
    let picture = arguments.next().map_or(photo, PathBuf::from);

    let mut spec = ModelSpec::new("vit", "ViTForImageClassification", vit_base());
    let weights = Weights::open(&source, aliases("vit"), &spec.class, &HubOptions::from_env())?;
    let mut processor_config = json!({"size": 224});
    if !matches!(source, Source::Synthetic { .. }) {
        spec.config = weights.config()?;
        let found = weights.extra_configs()?.remove("preprocessor_config.json");
        processor_config = found.ok_or("no preprocessor_config.json beside the weights")?;
    }
    let labels = labels(&spec.config)?;
    let processor = ImageProcessor::from_config(&processor_config, "vit")?;
    let mut session = load(&spec, &weights)?;

    let (pixel_values, preparing) = median_of(|| processor.prepare_files(std::slice::from_ref(&picture)))?;
    let call = Call {
        method: "forward".into(),
        inputs: [("pixel_values".into(), pixel_values)].into(),
        arguments: Default::default(),
    };
    let (outputs, forward) = median_of(|| session.call(&call, &mut Unobserved))?;

    println!("{}, weights {}", picture.display(), weights.describe().source);
    for prediction in &classify(&outputs["logits"], &labels, 5)?[0] {
        println!("{:6.2} %  {}", 100.0 * prediction.probability, prediction.label);
    }
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "preparing {:.1} ms, forward {:.1} ms (medians of {RUNS})",
        milliseconds(preparing),
        milliseconds(forward)
    );
    Ok(())
}

/// The last result and the median time of [`RUNS`] runs after a first one that warms up.
fn median_of<T, E>(mut run: impl FnMut() -> Result<T, E>) -> Result<(T, Duration), E> {
    let mut result = run()?;
    let mut times = [Duration::ZERO; RUNS];
    for time in &mut times {
        let start = Instant::now();
        result = run()?;
        *time = start.elapsed();
    }
    times.sort();
    Ok((result, times[RUNS / 2]))
}

fn vit_base() -> Value {
    json!({
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 16, "num_labels": 1000,
    })
}
