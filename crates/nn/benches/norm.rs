//! `cargo bench -p roofbench-nn --bench norm`: LayerNorm and RMSNorm in GB/s (input read and output written once)
//! beside the read bandwidth measured in the same rounds; what fits a cache goes past it. `candle` is its own
//! operation.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use candle_core::{Device, Result, Tensor};
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::norm::{LayerNorm, RmsNorm};
use roofbench_nn::pool::{self, PoolConfig};

mod common;

/// (rows, size): BERT-base, ViT-base, Llama-3.2-1B, BERT-base b8, one row.
const SHAPES: &[(usize, usize)] = &[(128, 768), (197, 768), (128, 2048), (1024, 768), (1, 2048)];

fn main() -> Result<()> {
    println!("{}", Isa::current());
    println!(
        "{:11} {:>6} {:>5} {:>7} {:>9} {:>9} {:>7} {:>7}",
        "", "rows", "size", "threads", "µs", "candle", "GB/s", "read"
    );
    let stream = common::Stream::new();
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for &(rows, size) in SHAPES {
            let x = Tensor::from_vec(common::numbers(rows * size), (rows, size), &Device::Cpu)?;
            let weight = Tensor::from_vec(common::numbers(size), size, &Device::Cpu)?;
            let layer = LayerNorm::new(&weight, Some(&weight), 1e-5)?;
            let rms = RmsNorm::new(&weight, 1e-5)?;
            let mut subjects: [&mut dyn FnMut(); 5] = [
                &mut || drop(layer.forward(&x).map(std::hint::black_box)),
                &mut || drop(candle_nn::ops::layer_norm(&x, &weight, &weight, 1e-5).map(std::hint::black_box)),
                &mut || drop(rms.forward(&x).map(std::hint::black_box)),
                &mut || drop(candle_nn::ops::rms_norm(&x, &weight, 1e-5).map(std::hint::black_box)),
                &mut || stream.read(),
            ];
            let times = common::best_of(7, &mut subjects);
            let read = stream.bytes() / times[4] / 1e9;
            for (name, ours, candle) in [("layer norm", times[0], times[1]), ("RMS norm", times[2], times[3])] {
                let rate = (2 * 4 * rows * size) as f64 / ours / 1e9;
                let (ours, candle) = (ours * 1e6, candle * 1e6);
                println!(
                    "{name:11} {rows:>6} {size:>5} {threads:>7} {ours:>9.1} {candle:>9.1} {rate:>7.1} {read:>7.1}"
                );
            }
        }
    }
    Ok(())
}
