//! What the benches share: the machine's ceilings, measured beside the kernel in the same rounds.

#![allow(clippy::print_stdout, reason = "a bench prints")]
#![allow(dead_code, unreachable_pub, reason = "each bench uses a part, and is a crate of its own")]

use std::hint::black_box;
use std::time::Instant;

use roofbench_nn::kernels::isa::Isa;
use roofbench_nn::pool;

/// Seconds of the quickest run of each of `subjects`, which take turns for `rounds` rounds, so that all see the same
/// machine. A run repeats the subject until it takes a millisecond.
pub fn best_of(rounds: usize, subjects: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let repeats: Vec<u32> = subjects
        .iter_mut()
        .map(|subject| {
            subject();
            let start = Instant::now();
            subject();
            (1e-3 / start.elapsed().as_secs_f64()).ceil().clamp(1.0, 10_000.0) as u32
        })
        .collect();
    let mut best = vec![f64::INFINITY; subjects.len()];
    for _ in 0..rounds {
        for ((subject, &repeats), best) in subjects.iter_mut().zip(&repeats).zip(&mut best) {
            let start = Instant::now();
            (0..repeats).for_each(|_| subject());
            *best = best.min(start.elapsed().as_secs_f64() / f64::from(repeats));
        }
    }
    best
}

/// Numbers in [-1, 1).
pub fn numbers(len: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// FLOP of one [`fma_registers`] on all threads.
pub fn fma_flop() -> f64 {
    (pool::threads() * FMA_STEPS * 2 * 24 * fma_lanes()) as f64
}

/// Fused multiply-adds on registers alone, on every thread: the ceiling of [`Isa::current`].
#[allow(unsafe_code, reason = "enters what the CPU was found to have")]
pub fn fma_registers() {
    pool::run(pool::threads(), |_| {
        black_box(match Isa::current() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has the current instruction set.
            Isa::Avx512 => unsafe { x86::fma_avx512() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::fma_avx2() },
            _ => fma_portable(),
        });
    });
}

const FMA_STEPS: usize = 200_000;

fn fma_lanes() -> usize {
    match Isa::current() {
        Isa::Avx512 => 16,
        Isa::Avx2 => 8,
        _ => 4,
    }
}

/// What the compiler makes of 24 independent vectors of four lanes.
fn fma_portable() -> f32 {
    let (x, y) = (black_box(0.999f32), black_box(1e-3f32));
    let mut sums: [[f32; 4]; 24] = std::array::from_fn(|i| [black_box(i as f32); 4]);
    for _ in 0..FMA_STEPS {
        for sum in sums.as_flattened_mut() {
            *sum = if cfg!(target_arch = "aarch64") { sum.mul_add(x, y) } else { *sum * x + y };
        }
    }
    sums.as_flattened().iter().sum()
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "entered only where the CPU has the instructions")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Twelve sums, twice: enough to hide the latency of two units, and few enough for 16 registers.
    macro_rules! fma {
        ($name:ident, $features:literal, $vector:ty, $splat:ident, $fma:ident, $zero:ident, $add:ident, $first:ident) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name() -> f32 {
                let (x, y) = ($splat(black_box(0.999)), $splat(black_box(1e-3)));
                let mut total = $zero();
                for _ in 0..2 {
                    let mut sums: [$vector; 12] = std::array::from_fn(|i| $splat(black_box(i as f32)));
                    for _ in 0..super::FMA_STEPS {
                        sums = std::array::from_fn(|i| $fma(sums[i], x, y));
                    }
                    total = sums.iter().fold(total, |total, &sum| $add(total, sum));
                }
                $first(total)
            }
        };
    }
    fma!(
        fma_avx512,
        "avx512f",
        __m512,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_setzero_ps,
        _mm512_add_ps,
        _mm512_cvtss_f32
    );
    fma!(
        fma_avx2,
        "avx2,fma",
        __m256,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_setzero_ps,
        _mm256_add_ps,
        _mm256_cvtss_f32
    );
}

/// An array well past the last-level cache.
pub struct Stream(Vec<u64>);

impl Stream {
    pub fn new() -> Self {
        Self((0..32u64 << 20).collect())
    }

    pub fn bytes(&self) -> f64 {
        size_of_val(&*self.0) as f64
    }

    /// Reads all of it; every thread a part at a time, as four streams.
    pub fn read(&self) {
        let parts = 16 * pool::threads();
        pool::run(parts, |part| {
            let range = self.0.len() * part / parts..self.0.len() * (part + 1) / parts;
            let quarter = range.len() / 4;
            let mut streams = self.0[range].chunks_exact(quarter);
            let streams: [&[u64]; 4] = std::array::from_fn(|_| streams.next().unwrap_or_default());
            let mut sums = [[0u64; 8]; 4];
            for line in 0..quarter / 8 {
                for (sums, stream) in sums.iter_mut().zip(streams) {
                    for (sum, &x) in sums.iter_mut().zip(&stream[8 * line..8 * line + 8]) {
                        *sum ^= x;
                    }
                }
            }
            black_box(sums);
        });
    }
}

/// 1 and all.
pub fn thread_counts() -> Vec<usize> {
    let all = pool::usable_cpus();
    if all == 1 { vec![1] } else { vec![1, all] }
}
