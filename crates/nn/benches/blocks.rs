//! `cargo bench -p roofbench-nn --bench blocks`: rotary positions, the gated pass beside its product, a step into the
//! key-value cache and the LSTM, at the sizes of Llama-3.2-1B and EnCodec.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use roofbench_nn::activation::Activation;
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::kv_cache::{KvCache, Shape};
use roofbench_nn::linear::Linear;
use roofbench_nn::lstm::{Lstm, Order};
use roofbench_nn::mlp::gated;
use roofbench_nn::pool::{self, PoolConfig};
use roofbench_nn::rope::{Positions, Rope, RopeConfig, Style};

mod common;

fn tensor(shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(common::numbers(shape.iter().product()), shape, &Device::Cpu)
}

fn time(mut f: impl FnMut()) -> f64 {
    common::best_of(7, &mut [&mut f])[0]
}

fn main() -> Result<()> {
    println!("{}", Isa::current());
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        println!("{threads} threads");
        rope()?;
        gated_mlp()?;
        cache()?;
        lstm()?;
    }
    Ok(())
}

/// 32 and 8 heads of 64, in a fused product of 3072.
fn rope() -> Result<()> {
    for (style, seq) in [(Style::Half, 1), (Style::Half, 128), (Style::Interleaved, 128)] {
        let rope = Rope::new(&RopeConfig::default(), 64, 4096, style).map_err(candle_core::Error::wrap)?;
        let made = time(|| drop(rope.table(Positions::From(100, seq), &Device::Cpu).map(std::hint::black_box)));
        let table = rope.table(Positions::From(100, seq), &Device::Cpu)?;
        let qkv = tensor(&[1, seq, 3072])?;
        let seconds = time(|| drop(qkv.narrow(2, 0, 2560).and_then(|x| table.rotate(x))));
        let rate = (8 * seq * 2560) as f64 / seconds / 1e9;
        let (seconds, made) = (seconds * 1e6, made * 1e6);
        println!("  rope {style:?} {seq:4} rows: {seconds:8.2} µs, {rate:6.1} GB/s; its table {made:8.2} µs");
    }
    Ok(())
}

/// 2048 to 8192, twice.
fn gated_mlp() -> Result<()> {
    let linear = Linear::new(&tensor(&[16384, 2048])?, None)?;
    for rows in [1, 8, 128] {
        let x = tensor(&[rows, 2048])?;
        let y = linear.forward(&x)?;
        let mut product = || drop(linear.forward(&x).map(std::hint::black_box));
        let mut pass = || drop(gated(&y, Activation::Silu).map(std::hint::black_box));
        let times = common::best_of(7, &mut [&mut product, &mut pass]);
        let share = 100.0 * times[1] / times[0];
        let rate = (12 * rows * 8192) as f64 / times[1] / 1e9;
        let (product, pass) = (times[0] * 1e6, times[1] * 1e6);
        println!(
            "  gated {rows:4} rows: {pass:8.2} µs ({rate:5.1} GB/s), {share:4.1} % of its product's {product:9.1}"
        );
    }
    Ok(())
}

/// A step of 8 heads of 64 into a cache of 4096, beside joining tensors.
fn cache() -> Result<()> {
    let shape = Shape { batch: 1, positions: 4096, width: 512 };
    let row = tensor(&[1, 1, 512])?;
    let mut cache = KvCache::new(shape, None, DType::F32, &Device::Cpu)?;
    let past = tensor(&[1, 4000, 512])?;
    cache.append(&past, &past)?;
    let mut ours = || {
        drop(cache.truncate(4000).and_then(|()| cache.append(&row, &row)).map(std::hint::black_box));
    };
    let mut joined = || {
        for _ in 0..2 {
            drop(Tensor::cat(&[&past, &row], 1).map(std::hint::black_box));
        }
    };
    let times = common::best_of(7, &mut [&mut ours, &mut joined]);
    println!("  cache, a step after 4000: {:8.2} µs; joined {:8.1} µs", times[0] * 1e6, times[1] * 1e6);
    Ok(())
}

/// EnCodec's: 512 wide, 2 layers, 150 steps (2 s at 24 kHz).
fn lstm() -> Result<()> {
    let mut weights = HashMap::new();
    for i in 0..2 {
        for name in ["ih", "hh"] {
            weights.insert(format!("weight_{name}_l{i}"), (tensor(&[2048, 512])? * 0.05)?);
            weights.insert(format!("bias_{name}_l{i}"), tensor(&[2048])?);
        }
    }
    let lstm = Lstm::load(512, 512, 2, VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))?;
    let x = tensor(&[150, 1, 512])?;
    let seconds = time(|| drop(lstm.forward(&x, Order::SeqFirst, None).map(std::hint::black_box)));
    // the recurrent matrix is read once a step and layer
    let rate = (2 * 150 * 2048 * 512 * 4) as f64 / seconds / 1e9;
    println!("  lstm, 150 steps: {:8.2} ms, {rate:5.1} GB/s of recurrent weights", seconds * 1e3);
    Ok(())
}
