//! `cargo bench -p roofbench-nn --bench matmul [-- FILTER]`: products at model sizes, in GFLOP/s and as a share of what
//! fused multiply-adds on registers reach in the same rounds. FILTER is a part of a row's name.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use std::mem::MaybeUninit;

use half::{bf16, f16};
use roofbench_nn::activation::Activation;
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::kernels::matmul::{Epilogue, PackedMatrix, Rows, Weights, matmul};
use roofbench_nn::pool::{self, PoolConfig};

mod common;

/// (model, m, k, n).
const SHAPES: &[(&str, usize, usize, usize)] = &[
    ("bert-base out", 128, 768, 768),
    ("bert-base qkv", 128, 768, 2304),
    ("bert-base up", 128, 768, 3072),
    ("bert-base down", 128, 3072, 768),
    ("bert-base out", 512, 768, 768),
    ("bert-base up", 512, 768, 3072),
    ("bert-base out", 1024, 768, 768),
    ("bert-base qkv", 1024, 768, 2304),
    ("bert-base up", 1024, 768, 3072),
    ("bert-base down", 1024, 3072, 768),
    ("vit-base out", 197, 768, 768),
    ("vit-base qkv", 197, 768, 2304),
    ("vit-base up", 197, 768, 3072),
    ("vit-base down", 197, 3072, 768),
    ("vit-base up", 1576, 768, 3072),
    ("llama-1b out", 128, 2048, 2048),
    ("llama-1b up", 128, 2048, 8192),
    ("llama-1b down", 128, 8192, 2048),
    ("resnet 1x1", 196, 1024, 256),
    ("resnet 1x1", 3136, 64, 256),
    ("resnet 1x1", 3136, 256, 64),
    ("convnext-tiny up", 3136, 96, 384),
    ("convnext-tiny down", 3136, 384, 96),
    ("convnext-tiny up", 196, 384, 1536),
    ("convnext-tiny down", 196, 1536, 384),
    ("convnext-tiny up", 49, 768, 3072),
    ("convnext-tiny down", 49, 3072, 768),
    ("odd", 13, 100, 37),
    ("odd", 33, 301, 1001),
    ("odd", 5, 768, 768),
];

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("{}", Isa::current());
    println!("{:24} {:>4} {:>5} {:>5} {:>7} {:>9} {:>9} {:>6}", "", "m", "k", "n", "threads", "µs", "GFLOP/s", "peak");
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for &(model, m, k, n) in SHAPES {
            let a = common::numbers(m * k);
            let weights = common::numbers(n * k);
            let bias = common::numbers(n);
            for kind in ["f32", "f32 gelu", "bf16", "f16"] {
                let name = format!("{model} {kind}");
                if !name.contains(&filter) || (kind != "f32" && (model.contains("resnet") || model.contains("odd"))) {
                    continue;
                }
                let packed = match kind {
                    "bf16" => {
                        let weights: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
                        PackedMatrix::pack(Weights::Bf16(&weights), n, k)
                    }
                    "f16" => {
                        let weights: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
                        PackedMatrix::pack(Weights::F16(&weights), n, k)
                    }
                    _ => PackedMatrix::pack(Weights::F32(&weights), n, k),
                }
                .expect("lengths fit");
                let activation = if kind == "f32 gelu" { Activation::Gelu } else { Activation::Identity };
                let epilogue = Epilogue { bias: Some(&bias), activation, residual: None };
                let mut out = vec![MaybeUninit::new(0.0f32); m * n];
                let mut product = || {
                    matmul(Rows { data: &a, stride: k }, m, &packed, &epilogue, &mut out).expect("lengths fit");
                };
                let seconds = common::best_of(12, &mut [&mut product, &mut common::fma_registers]);
                let rate = 2.0 * (m * n * k) as f64 / seconds[0];
                let share = 100.0 * rate * seconds[1] / common::fma_flop();
                let micros = 1e6 * seconds[0];
                println!("{name:24} {m:4} {k:5} {n:5} {threads:7} {micros:9.0} {:9.0} {share:5.0}%", rate / 1e9);
            }
        }
    }
}
