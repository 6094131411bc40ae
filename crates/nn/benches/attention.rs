//! `cargo bench -p roofbench-nn --bench attention [-- FILTER]`: the fused kernel on a qkv product as it lies, in
//! GFLOP/s as a share of the arithmetic peak and, for steps of decoding, in GB/s as a share of the read bandwidth, both
//! measured in the same rounds. `plain` is candle's own operations. FILTER is a part of a row's name. Keys and values
//! that fit the last-level cache go past 100 % of the read bandwidth.
#![allow(clippy::print_stdout, reason = "a bench prints")]

use candle_core::{Device, Result, Tensor};
use roofbench_nn::attention::{Attention, Mask, Pattern};
use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::pool::{self, PoolConfig};

mod common;

struct Case {
    name: &'static str,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    queries: usize,
    keys: usize,
    pattern: Pattern,
    bias: bool,
}

const BERT: Case = Case {
    name: "bert s128",
    batch: 1,
    heads: 12,
    kv_heads: 12,
    head_dim: 64,
    queries: 128,
    keys: 128,
    pattern: Pattern::Full,
    bias: false,
};

const LLAMA: Case =
    Case { name: "llama p512", heads: 32, kv_heads: 8, queries: 512, keys: 512, pattern: Pattern::Causal, ..BERT };

const CASES: &[Case] = &[
    BERT,
    Case { name: "bert b8 s128", batch: 8, ..BERT },
    Case { name: "bert s512", queries: 512, keys: 512, ..BERT },
    Case { name: "vit s197", queries: 197, keys: 197, ..BERT },
    Case { name: "t5 s512 bias", queries: 512, keys: 512, bias: true, ..BERT },
    Case {
        name: "swin 64 windows",
        batch: 64,
        heads: 3,
        kv_heads: 3,
        head_dim: 32,
        queries: 49,
        keys: 49,
        bias: true,
        ..BERT
    },
    Case { name: "phi s512 d80", heads: 32, kv_heads: 32, head_dim: 80, ..LLAMA },
    LLAMA,
    Case { name: "mistral window 128", pattern: Pattern::Sliding(128), ..LLAMA },
    Case { name: "llama decode 256", queries: 1, keys: 256, ..LLAMA },
    Case { name: "llama decode 4096", queries: 1, keys: 4096, ..LLAMA },
    Case { name: "gpt2 decode 1024", queries: 1, keys: 1024, pattern: Pattern::Causal, ..BERT },
    Case { name: "falcon decode 2048", heads: 71, kv_heads: 1, queries: 1, keys: 2048, ..LLAMA },
];

impl Case {
    /// Queries and keys that see each other.
    fn pairs(&self) -> usize {
        let seen = |position: usize| match self.pattern {
            Pattern::Full => self.keys,
            Pattern::Causal => position + 1,
            Pattern::Sliding(window) => (position + 1).min(window),
        };
        (self.keys - self.queries..self.keys).map(seen).sum()
    }

    fn run(&self, threads: usize) -> Result<()> {
        let &Self { batch, heads, kv_heads, head_dim, queries, keys, pattern, .. } = self;
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let tensor =
            |rows, width| Tensor::from_vec(common::numbers(batch * rows * width), (batch, rows, width), &Device::Cpu);
        // one product of all three where there are as many of each, else a cache
        let fused = tensor(keys, width + 2 * kv_width)?;
        let (q, k, v) = if queries == keys {
            let at = |start, width| fused.narrow(2, start, width);
            (at(0, width)?, at(width, kv_width)?, at(width + kv_width, kv_width)?)
        } else {
            (tensor(queries, width)?, tensor(keys, kv_width)?, tensor(keys, kv_width)?)
        };
        let bias = Tensor::from_vec(common::numbers(heads * queries * keys), (1, heads, queries, keys), &Device::Cpu)?;
        let mask = if self.bias { Some(Mask::additive(&bias)?) } else { None };
        let attention = Attention { heads, kv_heads, head_dim, scale: None, pattern };
        let is_decode = queries == 1;
        let stream = is_decode.then(common::Stream::new);
        let mut fused = || drop(attention.forward(&q, &k, &v, mask.as_ref()).map(std::hint::black_box));
        let mut plain = || drop(attention.forward_plain(&q, &k, &v, mask.as_ref()).map(std::hint::black_box));
        let mut ceiling = || stream.as_ref().map_or_else(common::fma_registers, common::Stream::read);
        let times = common::best_of(7, &mut [&mut fused, &mut plain, &mut ceiling]);
        let (amount, most) = match &stream {
            Some(stream) => ((batch * keys * kv_width * 2 * 4) as f64, stream.bytes()),
            None => ((batch * heads * self.pairs() * head_dim * 4) as f64, common::fma_flop()),
        };
        let (rate, peak) = (amount / times[0] / 1e9, most / times[2] / 1e9);
        println!(
            "{:20} {threads:>7} {:>9.1} {:>9.1} {rate:>8.1} {:7} {:>5.0}%",
            self.name,
            times[0] * 1e6,
            times[1] * 1e6,
            if is_decode { "GB/s" } else { "GFLOP/s" },
            100.0 * rate / peak,
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    println!("{}", Isa::current());
    println!("{:20} {:>7} {:>9} {:>9} {:>16} {:>6}", "", "threads", "µs", "plain µs", "", "peak");
    for threads in common::thread_counts() {
        if let Err(error) = pool::configure(PoolConfig { threads, ..PoolConfig::default() }) {
            println!("{threads} threads: {error}");
            continue;
        }
        for case in CASES.iter().filter(|case| case.name.contains(&filter)) {
            case.run(threads)?;
        }
    }
    Ok(())
}
