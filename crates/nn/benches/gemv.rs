//! `cargo bench -p roofbench-nn --bench gemv [-- FILTER]`: products of few rows, whose cost is reading the weights, in
//! GB/s and as a share of what reading a large array reaches in the same rounds. FILTER is a part of a row's name.
//! Weights that fit the last-level cache go past 100 %.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::mem::MaybeUninit;

use half::{bf16, f16};
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::kernels::matmul::{Epilogue, PackedMatrix, Rows, Weights, matmul};
use roofbench_nn::kernels::quant::{Quantization, QuantizedMatrix, matmul_quantized};
use roofbench_nn::pool::{self, PoolConfig};

mod common;

/// (model, k, n).
const SHAPES: &[(&str, usize, usize)] = &[
    ("bert-base out", 768, 768),
    ("bert-base up", 768, 3072),
    ("llama-1b out", 2048, 2048),
    ("llama-1b up", 2048, 8192),
    ("llama-1b down", 8192, 2048),
    ("llama-1b head", 2048, 128_256),
];

enum Packed {
    Native(PackedMatrix),
    Quantized(QuantizedMatrix),
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("{}", Isa::current());
    println!("{:20} {:>2} {:>5} {:>6} {:>7} {:>9} {:>6} {:>6}", "", "m", "k", "n", "threads", "µs", "GB/s", "read");
    let stream = common::Stream::new();
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for &(model, k, n) in SHAPES {
            let weights = common::numbers(n * k);
            for kind in ["f32", "bf16", "f16", "q8", "q4"] {
                let name = format!("{model} {kind}");
                if !name.contains(&filter) {
                    continue;
                }
                let packed = match kind {
                    "bf16" => {
                        let weights: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
                        PackedMatrix::pack(Weights::Bf16(&weights), n, k).map(Packed::Native)
                    }
                    "f16" => {
                        let weights: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
                        PackedMatrix::pack(Weights::F16(&weights), n, k).map(Packed::Native)
                    }
                    "q8" | "q4" => {
                        let quantization = if kind == "q8" { Quantization::Q8 } else { Quantization::Q4 };
                        QuantizedMatrix::quantize(Weights::F32(&weights), n, k, quantization).map(Packed::Quantized)
                    }
                    _ => PackedMatrix::pack(Weights::F32(&weights), n, k).map(Packed::Native),
                }
                .expect("lengths fit");
                let bytes = match &packed {
                    Packed::Native(packed) => packed.bytes(),
                    Packed::Quantized(packed) => packed.bytes(),
                };
                for m in [1, 2, 4, 8] {
                    let a = common::numbers(m * k);
                    let mut out = vec![MaybeUninit::new(0.0f32); m * n];
                    let mut product = || {
                        let (a, none) = (Rows { data: &a, stride: k }, Epilogue::default());
                        match &packed {
                            Packed::Native(packed) => matmul(a, m, packed, &none, &mut out),
                            Packed::Quantized(packed) => matmul_quantized(a, m, packed, &none, &mut out),
                        }
                        .expect("lengths fit");
                    };
                    let seconds = common::best_of(8, &mut [&mut product, &mut || stream.read()]);
                    let rate = bytes as f64 / seconds[0];
                    let share = 100.0 * rate * seconds[1] / stream.bytes();
                    let micros = 1e6 * seconds[0];
                    println!("{name:20} {m:2} {k:5} {n:6} {threads:7} {micros:9.0} {:6.1} {share:5.0}%", rate / 1e9);
                }
            }
        }
    }
}
