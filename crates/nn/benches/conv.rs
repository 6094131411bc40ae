//! `cargo bench -p roofbench-nn --bench conv [-- FILTER]`: convolutions of ResNet-50 and ConvNeXt-tiny, in GFLOP/s and as
//! a share of what fused multiply-adds on registers reach in the same rounds. FILTER is a part of a row's name. Winograd's
//! forms count the multiplications of the direct product, of which they do fewer.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use candle_core::{DType, Device, Result, Tensor};
use roofbench_nn::activation::Activation;
use roofbench_nn::conv::{Conv2d, Conv2dConfig};
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::options::{self, Options, Winograd};
use roofbench_nn::pool::{self, PoolConfig};

mod common;

/// (model, side of the image, channels in, channels out, kernel, stride, padding, groups).
type Row = (&'static str, usize, usize, usize, usize, usize, usize, usize);

const ROWS: &[Row] = &[
    ("resnet stem", 224, 3, 64, 7, 2, 3, 1),
    ("resnet 1x1", 56, 64, 64, 1, 1, 0, 1),
    ("resnet 3x3", 56, 64, 64, 3, 1, 1, 1),
    ("resnet 1x1", 56, 64, 256, 1, 1, 0, 1),
    ("resnet 1x1", 56, 256, 64, 1, 1, 0, 1),
    ("resnet 3x3 s2", 56, 128, 128, 3, 2, 1, 1),
    ("resnet shortcut", 56, 256, 512, 1, 2, 0, 1),
    ("resnet 3x3", 28, 128, 128, 3, 1, 1, 1),
    ("resnet 1x1", 28, 128, 512, 1, 1, 0, 1),
    ("resnet 3x3 s2", 28, 256, 256, 3, 2, 1, 1),
    ("resnet 3x3", 14, 256, 256, 3, 1, 1, 1),
    ("resnet 1x1", 14, 1024, 256, 1, 1, 0, 1),
    ("resnet 3x3 s2", 14, 512, 512, 3, 2, 1, 1),
    ("resnet 3x3", 7, 512, 512, 3, 1, 1, 1),
    ("resnet 1x1", 7, 2048, 512, 1, 1, 0, 1),
    ("convnext stem", 224, 3, 96, 4, 4, 0, 1),
    ("convnext depthwise", 56, 96, 96, 7, 1, 3, 96),
    ("convnext depthwise", 28, 192, 192, 7, 1, 3, 192),
    ("convnext depthwise", 14, 384, 384, 7, 1, 3, 384),
    ("convnext depthwise", 7, 768, 768, 7, 1, 3, 768),
    ("convnext down", 56, 96, 192, 2, 2, 0, 1),
    ("convnext down", 14, 384, 768, 2, 2, 0, 1),
    ("depthwise 3x3", 112, 32, 32, 3, 1, 1, 32),
    ("depthwise 3x3 s2", 112, 96, 96, 3, 2, 1, 96),
];

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("{}", Isa::current());
    println!(
        "{:20} {:>5} {:>5} {:>5} {:>5} {:>7} {:>9} {:>9} {:>6}",
        "", "batch", "side", "in", "out", "threads", "µs", "GFLOP/s", "peak"
    );
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for &(name, side, inputs, outputs, kernel, stride, padding, groups) in ROWS {
            for batch in [1, 8].into_iter().filter(|_| name.contains(&filter)) {
                let config = Conv2dConfig::new(kernel).stride(stride).padding(padding).groups(groups);
                let random = |shape: &[usize]| Tensor::rand(-1f32, 1., shape, &Device::Cpu);
                let weight = random(&[outputs, inputs / groups, kernel, kernel])?;
                let bias = Tensor::zeros(outputs, DType::F32, &Device::Cpu)?;
                let conv = Conv2d::new(&weight, Some(&bias), config)?;
                let x = random(&[batch, side, side, inputs])?;
                let flop = 2.0 * conv.forward(&x)?.elem_count() as f64 * (inputs / groups * kernel * kernel) as f64;
                let forms: &[_] = match (kernel, stride) {
                    (3, 1) if groups == 1 => {
                        &[("", Winograd::Never), (" by 2", Winograd::Two), (" by 4", Winograd::Four)]
                    }
                    _ => &[("", Winograd::Never)],
                };
                for &(form, winograd) in forms {
                    let options = Options { winograd, ..Options::default() };
                    let mut run = || options::with(options, || assert!(conv.forward_act(&x, Activation::Relu).is_ok()));
                    let seconds = common::best_of(12, &mut [&mut run, &mut common::fma_registers]);
                    let share = 100.0 * flop / seconds[0] * seconds[1] / common::fma_flop();
                    let (micros, rate) = (1e6 * seconds[0], flop / seconds[0] / 1e9);
                    let name = format!("{name}{form}");
                    println!(
                        "{name:20} {batch:5} {side:5} {inputs:5} {outputs:5} {threads:7} {micros:9.0} {rate:9.0} {share:5.0}%"
                    );
                }
            }
        }
    }
    Ok(())
}
