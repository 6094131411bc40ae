//! Whether a cell fits in memory, asked before its weights are touched.

use roofbench_core::hardware::Machine;
use roofbench_core::optimize::Plan;
use roofbench_core::session::Engine;
use roofbench_core::workload::InputSpec;

use crate::arguments::DeviceArg;
use crate::job::{Job, WeightsJob};
use crate::ui;

/// Weights packed for the kernels are padded to whole panels, and the tensor at hand exists twice while it is packed.
const PACKING: f64 = 1.1;
/// Activations alive at once, in multiples of one layer's widest: input, result, residual, attention, scratch.
const LIVE: f64 = 8.0;
/// The program, its thread stacks, and the allocator's slack.
const BASE_BYTES: f64 = 64e6;

/// What a cell is estimated to need, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Estimate {
    /// Weights as the kernels keep them.
    pub(crate) weights: f64,
    /// Activations, key-value cache and inputs.
    pub(crate) activations: f64,
}

impl Estimate {
    /// Everything.
    pub(crate) fn total(self) -> f64 {
        self.weights + self.activations + BASE_BYTES
    }
}

/// Bytes of the weights of `job` in its type, from its parameters or the size of its files, where known.
pub(crate) fn stored_bytes(job: &Job) -> Option<u64> {
    let element = job.dtype.dtype().size_in_bytes() as u64;
    match (&job.weights, job.parameters) {
        (_, Some(parameters)) => Some(parameters * element),
        (WeightsJob::Local { path, .. }, None) => Some(folder_bytes(path) as u64),
        (_, None) => None,
    }
}

/// The estimate for `job`: from its parameters (or the size of its files), the form of its weights and the sizes in its
/// config.
pub(crate) fn estimate(job: &Job, plan: &Plan) -> Estimate {
    let stored = stored_bytes(job).unwrap_or_default() as f64;
    let native_bits = 8.0 * job.dtype.dtype().size_in_bytes() as f64;
    let weights = stored * PACKING * plan.weight_bits().map_or(1.0, |bits| bits / native_bits);
    Estimate { weights, activations: activations(job) }
}

/// A refusal when `bytes` are more than `machine` has for `job`.
pub(crate) fn beyond(bytes: f64, job: &Job, machine: &Machine) -> Option<String> {
    let (available, place) = available(job, machine)?;
    (bytes > available as f64)
        .then(|| format!("about {} needed, {place} is {}", ui::bytes(bytes), ui::bytes(available as f64)))
}

fn available(job: &Job, machine: &Machine) -> Option<(u64, &'static str)> {
    Some(match job.device {
        // Metal's memory is the CPU's.
        DeviceArg::Cpu | DeviceArg::Metal => (machine.memory.available_bytes?, "available memory"),
        DeviceArg::Cuda(index) => (machine.gpus.get(index)?.memory_bytes?, "the GPU's memory"),
    })
}

/// A refusal with its numbers when `job` can't fit in what `machine` has.
pub(crate) fn refusal(job: &Job, plan: &Plan, machine: &Machine) -> Option<String> {
    let estimate = estimate(job, plan);
    let (available, place) = available(job, machine)?;
    (estimate.total() > available as f64).then(|| {
        let parameters = job.parameters.map_or_else(String::new, |n| format!("{} parameters in ", ui::large(n as f64)));
        format!(
            "would not fit: about {} needed ({parameters}{} with packing {}, activations {}), {place} is {}; \
             a narrower --dtype, a smaller --batch or another --checkpoint may fit",
            ui::bytes(estimate.total()),
            job.dtype.name(),
            ui::bytes(estimate.weights),
            ui::bytes(estimate.activations),
            ui::bytes(available as f64),
        )
    })
}

/// A rough count from what configs have in common; pictures and sound are taken as growing 32-fold in the first layers.
fn activations(job: &Job) -> f64 {
    const F32: f64 = 4.0;
    const GROWTH: f64 = 32.0;
    let number = |fields: &[&str]| -> f64 {
        let parts = [&job.config, &job.config["text_config"], &job.config["decoder"]];
        let found = parts.iter().find_map(|part| fields.iter().find_map(|field| part[*field].as_f64()));
        // A size beyond reason is for the model to refuse by name.
        found.filter(|size| (0.0..1e9).contains(size)).unwrap_or(0.0)
    };
    let hidden = number(&["hidden_size", "d_model", "n_embd"]);
    let inner = number(&["intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"]).max(4.0 * hidden);
    let layers = number(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"]);
    let (heads, vocab) = (number(&["num_attention_heads", "n_head", "num_heads"]), number(&["vocab_size"]));
    let (mut total, mut tokens) = (0.0, 0.0f64);
    for spec in job.cell.inputs.values() {
        let elements: f64 = spec.shape().iter().map(|&n| n as f64).product();
        match spec {
            InputSpec::Tokens { .. } => tokens = tokens.max(elements),
            InputSpec::Floats { .. } => total += elements * F32 * GROWTH,
            _ => total += elements * F32,
        }
    }
    let new = (job.cell.new_tokens.unwrap_or(0) * job.cell.batch) as f64;
    let logits = if job.cell.new_tokens.is_some() { job.cell.batch as f64 } else { tokens } * vocab;
    // Our attention goes over blocks; the stock one keeps all scores.
    let scores = match job.engine {
        Engine::Roofbench => 0.0,
        Engine::CandleTransformers => tokens / job.cell.batch as f64 * tokens * heads,
    };
    let cache = if job.cell.new_tokens.is_some() { 2.0 * layers * (tokens + new) * hidden } else { 0.0 };
    total + F32 * (tokens * inner * LIVE + scores + logits + cache)
}

/// Bytes of the weight files in a folder, or of one file; 0 where nothing can be read, which opening it will report.
fn folder_bytes(path: &std::path::Path) -> f64 {
    let is_weights = |path: &std::path::Path| {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "bin")
    };
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |data| data.len()) as f64;
    if path.is_file() {
        return size(path);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    entries.filter(|path| is_weights(path)).map(|path| size(&path)).sum()
}
