//! `cargo bench -p roofbench-nn --bench activation`: each activation over 128 x 3072 elements (BERT-base's
//! feed-forward), in GB/s (read and written once) and elements per nanosecond. `candle` is its own operation.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use candle_core::{Device, Result, Tensor};
use roofbench_nn::activation::Activation;
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::pool::{self, PoolConfig};

mod common;

type Candle = fn(&Tensor) -> Result<Tensor>;

const CASES: &[(&str, Candle)] = &[
    ("gelu", Tensor::gelu_erf),
    ("gelu_new", Tensor::gelu),
    ("silu", Tensor::silu),
    ("tanh", Tensor::tanh),
    ("relu", Tensor::relu),
];

fn main() -> Result<()> {
    println!("{}", Isa::current());
    println!("{:9} {:>7} {:>9} {:>9} {:>7} {:>12}", "", "threads", "µs", "candle", "GB/s", "elements/ns");
    let x = Tensor::from_vec(common::numbers(128 * 3072), (128, 3072), &Device::Cpu)?.affine(6.0, 0.0)?;
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for &(name, candle) in CASES {
            let activation: Activation = name.parse().map_err(candle_core::Error::wrap)?;
            let mut ours = || drop(activation.forward(&x).map(std::hint::black_box));
            let mut candle = || drop(candle(&x).map(std::hint::black_box));
            let times = common::best_of(7, &mut [&mut ours, &mut candle]);
            let n = x.elem_count() as f64;
            let (ours, rate) = (times[0] * 1e6, n / times[0] / 1e9);
            println!("{name:9} {threads:>7} {ours:>9.1} {:>9.1} {:>7.1} {rate:>12.2}", times[1] * 1e6, 8.0 * rate);
        }
    }
    Ok(())
}
