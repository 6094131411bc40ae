//! C = A · Wᵀ with the weights W packed once, f32 sums, and bias, activation and residual added while the result is in
//! cache.
//!
//! W (n, k) lies in panels of two vectors of columns, each panel contiguous over k. The micro-kernel keeps a tile of up
//! to 12 rows (6 with 16 registers) by one panel in registers, reads A where it is (a broadcast per row and step) and
//! asks for W [`AHEAD`] bytes before it is used. A task goes over a block of k of a group of panels that stays in the
//! second-level cache, tile by tile, so that W is read once from beyond it and a tile's rows come from the first-level
//! cache. The rows of a task are cut into tiles of nearly equal height, so no remainder is slow. Few rows, down to one
//! (decoding), are the same kernel: a tile then reads W in the order in which it lies, at memory speed.
//!
//! Measured on a virtual machine with two cores of an AMD EPYC of the Zen 5 generation (48 KiB, 1 MiB, 32 MiB caches;
//! best of 12 to 36 rounds, beside other work) with `cargo bench -p roofbench-nn --bench matmul` and `--bench gemv`;
//! 100 % is what fused multiply-adds on registers reach, 290 GFLOP/s (AVX-512) and 145 (AVX2) on one thread, and twice
//! 290 for the column of two threads, which had to share the cores with others:
//!
//! | m × k × n | AVX-512 | two threads | AVX2 |
//! |---|---|---|---|
//! | 128 × 768 × 768 | 98 % | 94 % | 97 % |
//! | 128 × 3072 × 768 | 96 % | 91 % | 95 % |
//! | 128 × 2048 × 2048 (bf16) | 94 (96) % | 91 (92) % | |
//! | 197 × 768 × 768 | 98 % | 94 % | |
//! | 512, 1024 × 768 × 768 | 98, 97 % | 94, 94 % | 98, 95 % |
//! | 1024 × 3072 × 768 | 95 % | 90 % | |
//! | 196 × 1024 × 256; 3136 × 64 × 256; 3136 × 256 × 64 | 97, 91, 95 % | | |
//!
//! Erf GELU in the epilogue costs 7 % at k = 768, 2 % at k = 3072. Few rows, one thread, in GB/s of W (reading a large
//! array: 37): 2048 × 8192 in f32 (67 MB) with 1, 2, 4, 8 rows 44, 43, 43, 42; in bf16 45, 45, 43, 33; 2048 × 65536 in
//! f32 (537 MB) and bf16 with one row 41.
//!
//! Tried and dropped, same machine, m = 1008, k = 768, n = 3072, one thread, the present design reaching 97.8 %:
//! rows of A packed per tile 81–91 %; panels of W kept in the first-level cache with a packed block of A in the second
//! (k in blocks of 256 to 512) 93–95 %; blocks of k of 384 and 256 instead of 768 94.8 % and 94.1 %; tiles of 8 × 3
//! vectors 97.3 %; 14 rows 97.7 %, but 93 % against 98 % for the bare kernel where rows of A lie 4 KiB · n apart; all
//! heights of a tile inlined into one function 88 %, for the compiler then spills sums. Without asking ahead bf16
//! 2048 × 8192 runs at 25 and 18 GB/s with 4 and 8 rows, 2 KiB ahead at 34 and 26.
//!
//! Weights in bf16 are multiplied as bf16, the rows of A rounded to it as well, where the CPU does that faster than f32
//! ([`PairProduct`]): such panels hold two neighbours over k in a lane, and the tile is the same with `vdpbf16ps` (on
//! Arm `bfdot`) for the multiply-add.
#![expect(unsafe_code, reason = "micro-kernels on raw rows; lengths are checked once, in `matmul`")]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::conv::{Windows, copy, zero};
use super::isa::Isa;
use super::simd::{Kernel, Simd, simd_entry};
use super::{KernelError, math};
use crate::activation::Activation;
use crate::gather::ZEROS;
use crate::memory::Buffer;
use crate::{options, pool};

/// Vectors in a row of a panel.
pub(super) const VECTORS: usize = 2;
/// Steps over k between two additions to C. The sum of a block is a chain in registers, so this is also part of the
/// definition of the result: the same for every m, thread and path, and an item in a batch equals the item alone.
pub(super) const K_BLOCK: usize = 768;
/// Bytes of one block of panels, kept in the second-level cache while the rows go by.
const GROUP_BYTES: usize = 512 << 10;

/// A weight matrix (n, k), row-major, in the precision in which it stays packed.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// The upper half of an f32.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl Weights<'_> {
    /// Some of the rows' elements.
    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::Bf16(w) => Self::Bf16(&w[range]),
            Self::F16(w) => Self::F16(&w[range]),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
            Self::F16(w) => w.len(),
        }
    }
}

enum Panels {
    F32(Buffer<f32>),
    Bf16(Buffer<bf16>),
    F16(Buffer<f16>),
    /// Two neighbours over k at a time, for products of bf16 with bf16.
    Pairs(Buffer<Pair>, PairProduct),
}

/// Two neighbours over k, the first in the lower half.
#[derive(Debug, Clone, Copy, Default)]
struct Pair(u32);

/// How [`Pair`]s are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PairProduct {
    /// As two f32 each.
    #[cfg(test)]
    Halves,
    /// `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// `bfdot`.
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
}

impl PairProduct {
    /// The one that products of bf16 take: that which this CPU has, if it is faster than f32 or [`options`] ask for it.
    ///
    /// With `vdpbf16ps` an AMD Zen 4 or 5 does twice the multiplications of f32, an Intel of the fourth generation half
    /// of them, so the two are timed once, on registers, for some microseconds. `ROOFBENCH_BF16=f32` turns it off and
    /// `ROOFBENCH_BF16=dot` on.
    pub(super) fn chosen() -> Option<Self> {
        static FASTER: OnceLock<bool> = OnceLock::new();
        let product = Self::available(Isa::current())?;
        let faster = || match std::env::var("ROOFBENCH_BF16").as_deref() {
            Ok("dot") => true,
            Ok("f32") => false,
            _ => pairs_over_single() > 1.2,
        };
        let chosen = options::current().bf16_products.unwrap_or_else(|| *FASTER.get_or_init(faster));
        chosen.then_some(product)
    }

    /// The instruction for it that goes with `isa`, where this CPU has one.
    fn available(isa: Isa) -> Option<Self> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512bf16").then_some(Self::Avx512Bf16),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("bf16").then_some(Self::NeonBf16),
            _ => None,
        }
    }
}

/// How many multiplications of bf16 this CPU, which has an instruction for them, does in the time of one of f32.
fn pairs_over_single() -> f64 {
    #[cfg(target_arch = "x86_64")]
    use super::simd::{Avx512 as Single, Avx512Bf16 as Pairs};
    #[cfg(target_arch = "aarch64")]
    use super::simd::{Neon as Single, NeonBf16 as Pairs};
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    use super::simd::{Scalar as Single, Scalar as Pairs};
    const STEPS: usize = 2000;

    struct Sums<E>(std::marker::PhantomData<E>);
    impl<E: Element> Kernel for Sums<E> {
        #[inline(always)]
        unsafe fn run<S: Simd>(&self) {
            // SAFETY: the contract of the trait.
            unsafe {
                let one = S::splat(std::hint::black_box(f32::from_bits(0x3f80_3f80))); // both halves 1
                let mut sums = [S::splat(0.0); MAX_ROWS];
                for _ in 0..STEPS {
                    for sum in &mut sums {
                        *sum = E::add_product::<S>(one, one, *sum);
                    }
                }
                std::hint::black_box(sums);
            }
        }
    }
    fn best(run: impl Fn()) -> f64 {
        let time = |_| {
            let start = std::time::Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        (0..5).map(time).fold(f64::INFINITY, f64::min)
    }
    let kind = std::marker::PhantomData;
    // SAFETY: the caller has seen that the CPU has both.
    let single = best(|| unsafe { Single::call(&Sums::<f32>(kind)) });
    // SAFETY: as above.
    let pairs = best(|| unsafe { Pairs::call(&Sums::<Pair>(std::marker::PhantomData)) });
    2.0 * single / pairs
}

/// Weights (n, k) as the micro-kernel reads them: panels of some columns of C, each panel contiguous over k, columns
/// past n zero.
pub struct PackedMatrix {
    isa: Isa,
    n: usize,
    k: usize,
    panels: Panels,
}

impl PackedMatrix {
    /// Packs `weights` (n, k), row-major, for the widest instruction set.
    ///
    /// # Errors
    /// When the length is not n · k.
    pub fn pack(weights: Weights<'_>, n: usize, k: usize) -> Result<Self, KernelError> {
        match (weights, PairProduct::chosen()) {
            (Weights::Bf16(w), Some(product)) => Self::pack_pairs(Isa::current(), product, w, n, k),
            _ => Self::pack_for(Isa::current(), weights, n, k),
        }
    }

    /// For products in which A is rounded to bf16 as well.
    fn pack_pairs(isa: Isa, product: PairProduct, w: &[bf16], n: usize, k: usize) -> Result<Self, KernelError> {
        KernelError::check("weights", n.checked_mul(k), w.len())?;
        let half = |row: usize, i: usize| if i < k { u32::from(w[row * k + i].to_bits()) } else { 0 };
        let pair = |row: usize, i: usize| Pair(half(row, 2 * i) | half(row, 2 * i + 1) << 16);
        let panels = pack_panels(pair, n, k.div_ceil(2), panel_width(isa));
        Ok(Self { isa, n, k, panels: Panels::Pairs(panels, product) })
    }

    pub(crate) fn pack_for(isa: Isa, weights: Weights<'_>, n: usize, k: usize) -> Result<Self, KernelError> {
        KernelError::check("weights", n.checked_mul(k), weights.len())?;
        let width = panel_width(isa);
        let panels = match weights {
            Weights::F32(w) => Panels::F32(pack_panels(|row, i| w[row * k + i], n, k, width)),
            Weights::Bf16(w) => Panels::Bf16(pack_panels(|row, i| w[row * k + i], n, k, width)),
            Weights::F16(w) => Panels::F16(pack_panels(|row, i| w[row * k + i], n, k, width)),
        };
        Ok(Self { isa, n, k, panels })
    }

    /// The instruction set that it is packed for.
    pub(super) fn isa(&self) -> Isa {
        self.isa
    }

    /// Weight (row, i), where they are in f32.
    pub(super) fn elements(&self) -> Option<impl Fn(usize, usize) -> f32 + Sync> {
        let Panels::F32(panels) = &self.panels else { return None };
        let (width, k) = (panel_width(self.isa), self.k);
        Some(move |row: usize, i: usize| panels[(row / width * k + i) * width + row % width])
    }

    /// Columns of C: rows of the weights.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The dimension summed over.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes that one product reads of the weights, padding included.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(w) => size_of_val::<[f32]>(w),
            Panels::Bf16(w) => size_of_val::<[bf16]>(w),
            Panels::F16(w) => size_of_val::<[f16]>(w),
            Panels::Pairs(w, _) => size_of_val::<[Pair]>(w),
        }
    }

    /// Steps over k: elements, or pairs of them.
    fn steps(&self) -> usize {
        match self.panels {
            Panels::Pairs(..) => self.k.div_ceil(2),
            _ => self.k,
        }
    }

    /// Row `row` of the weights, widened to f32: `k` elements.
    pub fn row(&self, row: usize, out: &mut [MaybeUninit<f32>]) {
        fn copy<T: Copy>(panels: &[T], first: usize, step: usize, out: &mut [MaybeUninit<f32>], widen: fn(T) -> f32) {
            for (out, x) in out.iter_mut().zip(panels[first..].iter().step_by(step)) {
                out.write(widen(*x));
            }
        }
        let width = panel_width(self.isa);
        let first = row / width * width * self.k + row % width;
        match &self.panels {
            Panels::F32(w) => copy(w, first, width, out, |x| x),
            Panels::Bf16(w) => copy(w, first, width, out, bf16::to_f32),
            Panels::F16(w) => copy(w, first, width, out, f16::to_f32),
            Panels::Pairs(w, _) => {
                let first = row / width * width * self.k.div_ceil(2) + row % width;
                for (i, out) in out.iter_mut().enumerate() {
                    let Pair(bits) = w[first + i / 2 * width];
                    out.write(f32::from_bits(if i % 2 == 0 { bits << 16 } else { bits & 0xffff_0000 }));
                }
            }
        }
    }

    /// How a product of `m` rows is cut into tasks for `threads`.
    pub(super) fn grid(&self, m: usize, threads: usize) -> Grid {
        let width = panel_width(self.isa);
        Grid::choose(m, self.n.div_ceil(width), width, self.steps(), threads)
    }

    /// One task, on the calling thread.
    ///
    /// # Safety
    /// Source, C and epilogue of the block reach over its rows and over the columns of its panels; nobody else touches
    /// this part of C.
    pub(super) unsafe fn multiply(&self, block: &Block<'_>) {
        let (isa, n, k) = (self.isa, self.n, self.steps());
        // SAFETY: the caller's, and packing took an available set.
        unsafe {
            match &self.panels {
                Panels::F32(panels) => block_f32(isa, block, n, k, panels.as_ptr()),
                Panels::Bf16(panels) => block_bf16(isa, block, n, k, panels.as_ptr()),
                Panels::F16(panels) => block_f16(isa, block, n, k, panels.as_ptr()),
                #[allow(unused_variables, reason = "CPUs without any such product")]
                Panels::Pairs(panels, product) => match *product {
                    #[cfg(test)]
                    PairProduct::Halves => block_pairs(isa, block, n, k, panels.as_ptr()),
                    #[cfg(target_arch = "x86_64")]
                    PairProduct::Avx512Bf16 => block_dot(block, n, k, panels.as_ptr()),
                    #[cfg(target_arch = "aarch64")]
                    PairProduct::NeonBf16 => block_dot(block, n, k, panels.as_ptr()),
                },
            }
        }
    }
}

pub(super) fn panel_width(isa: Isa) -> usize {
    fn width<S: Simd>() -> usize {
        VECTORS * S::LANES
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => width::<super::simd::Avx512>(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => width::<super::simd::Avx2>(),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => width::<super::simd::Neon>(),
        _ => width::<super::simd::Scalar>(),
    }
}

/// Panels of the elements (row, i) that `element` gives for rows below n.
pub(super) fn pack_panels<T: Copy + Default + Send + Sync>(
    element: impl Fn(usize, usize) -> T + Sync,
    n: usize,
    k: usize,
    width: usize,
) -> Buffer<T> {
    let mut packed = Buffer::uninit(n.div_ceil(width) * width * k);
    let base = SendPtr(packed.as_mut_ptr());
    pool::run(n.div_ceil(width), |panel| {
        // SAFETY: the panel's own part of the buffer, which no other task touches.
        let out = unsafe { std::slice::from_raw_parts_mut(base.get().add(panel * width * k), width * k) };
        let first = panel * width;
        // A few rows of the panel at a time: they and what is read of W stay in the first-level cache.
        for (block, out) in out.chunks_mut(16 * width).enumerate() {
            for column in 0..width {
                for (i, out) in out.chunks_mut(width).enumerate() {
                    let row = first + column;
                    let value = if row < n { element(row, block * 16 + i) } else { T::default() };
                    out[column].write(value);
                }
            }
        }
    });
    // SAFETY: every panel was written in full.
    unsafe { packed.assume_init() }
}

/// A pointer that tasks share; they write disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct SendPtr<T>(pub(super) *mut T);
// SAFETY: only the holder's promise of disjointness is needed.
unsafe impl<T> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SendPtr<T> {}
impl<T> SendPtr<T> {
    pub(super) fn get(self) -> *mut T {
        self.0
    }
}

/// Rows of f32, each contiguous, at a fixed distance.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// From the first row's first element on.
    pub data: &'a [f32],
    /// Elements from one row's start to the next one's.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows without gaps.
    pub fn contiguous(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width }
    }

    pub(super) fn check(&self, what: &'static str, rows: usize, width: usize) -> Result<(), KernelError> {
        let needed = match rows {
            0 => Some(0),
            _ => (rows - 1).checked_mul(self.stride).and_then(|start| start.checked_add(width)),
        };
        KernelError::check_least(what, needed, self.data.len())
    }
}

/// What is done to a sum before it is written: activation(sum + bias) + residual.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a> {
    /// One value per column.
    pub bias: Option<&'a [f32]>,
    /// Element-wise.
    pub activation: Activation,
    /// Of C's shape.
    pub residual: Option<Rows<'a>>,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Self { bias: None, activation: Activation::Identity, residual: None }
    }
}

/// C (m, n) = epilogue(A (m, k) · Wᵀ), every element of `out` (m, n) written.
///
/// # Errors
/// When a slice is too short for its shape.
pub fn matmul(
    a: Rows<'_>,
    m: usize,
    w: &PackedMatrix,
    epilogue: &Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) -> Result<(), KernelError> {
    check_lengths(a, m, w.n, w.k, epilogue, out.len())?;
    product(Source::Rows(a), m, w, epilogue, out);
    Ok(())
}

/// The same of the rows of A that `index` names, zeros for [`ZEROS`]; a tile of them at a time is copied together beside
/// the micro-kernel.
///
/// # Errors
/// As for [`matmul`].
pub(crate) fn matmul_picked(
    a: Rows<'_>,
    index: &[u32],
    w: &PackedMatrix,
    epilogue: &Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) -> Result<(), KernelError> {
    a.check("A", rows_picked(index), w.k)?;
    check_result(index.len(), w.n, epilogue, out.len())?;
    product(Source::Picked(a, index), index.len(), w, epilogue, out);
    Ok(())
}

/// The rows that there have to be.
fn rows_picked(index: &[u32]) -> usize {
    index.iter().filter(|row| **row != ZEROS).max().map_or(0, |row| *row as usize + 1)
}

/// C of checked lengths, on the pool.
fn product(a: Source<'_>, m: usize, w: &PackedMatrix, epilogue: &Epilogue<'_>, out: &mut [MaybeUninit<f32>]) {
    if out.is_empty() {
        return;
    }
    let rounded = match (&w.panels, &a) {
        (Panels::Pairs(..), Source::Rows(a)) => Some(round_to_pairs(w.isa, *a, m, w.k)),
        (Panels::Pairs(..), Source::Picked(a, index)) => Some(round_to_pairs(w.isa, *a, rows_picked(index), w.k)),
        _ => None,
    };
    let a = match (&rounded, a) {
        (Some(rounded), Source::Rows(_)) => Source::Rows(Rows::contiguous(rounded, w.steps())),
        (Some(rounded), Source::Picked(_, index)) => Source::Picked(Rows::contiguous(rounded, w.steps()), index),
        (_, a) => a,
    };
    let grid = w.grid(m, pool::threads());
    let c = SendPtr(out.as_mut_ptr().cast::<f32>());
    pool::run(grid.tasks(), |task| {
        let (rows, panels) = grid.task(task);
        let c = c.get();
        let block = Block { a, c, c_stride: w.n, rows, panels, epilogue, activation_last: false };
        // SAFETY: the lengths were checked by the caller, and tasks write disjoint parts of C.
        unsafe { w.multiply(&block) }
    });
}

/// Rows of A rounded to bf16, as pairs in the bits of an f32 each.
fn round_to_pairs(isa: Isa, a: Rows<'_>, m: usize, k: usize) -> Buffer<f32> {
    const ELEMENTS: usize = 1 << 14; // of a task
    let pairs = k.div_ceil(2);
    let mut rounded = Buffer::uninit(m * pairs);
    let base = SendPtr(rounded.as_mut_ptr());
    let rows = (ELEMENTS / k.max(1)).max(1);
    pool::run(m.div_ceil(rows), |task| {
        for row in task * rows..m.min((task + 1) * rows) {
            // SAFETY: each row of the buffer is one task's own; the set is one that the CPU has.
            unsafe {
                let out = std::slice::from_raw_parts_mut(base.get().add(row * pairs), pairs);
                round_row(isa, &a.data[row * a.stride..][..k], out);
            }
        }
    });
    // SAFETY: every row was written.
    unsafe { rounded.assume_init() }
}

simd_entry! {
    /// # Safety
    /// `isa` is available.
    fn round_row(row: &[f32], out: &mut [MaybeUninit<f32>]) = round_row_with
}

/// To the nearest, ties to even; plain code, which the compiler makes vectors of.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn round_row_with<S: Simd>(row: &[f32], out: &mut [MaybeUninit<f32>]) {
    let round = |x: f32| {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // a NaN stays one
        if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
    };
    let (whole, rest) = row.as_chunks::<2>();
    for (out, [first, second]) in out.iter_mut().zip(whole) {
        out.write(f32::from_bits(round(*first) | round(*second) << 16));
    }
    if let ([last], Some(out)) = (rest, out.last_mut()) {
        out.write(f32::from_bits(round(*last)));
    }
}

/// A, C (of length `out`) and what the epilogue holds fit (m, n, k).
pub(super) fn check_lengths(
    a: Rows<'_>,
    m: usize,
    n: usize,
    k: usize,
    epilogue: &Epilogue<'_>,
    out: usize,
) -> Result<(), KernelError> {
    a.check("A", m, k)?;
    check_result(m, n, epilogue, out)
}

/// C (of length `out`) and what the epilogue holds fit (m, n).
fn check_result(m: usize, n: usize, epilogue: &Epilogue<'_>, out: usize) -> Result<(), KernelError> {
    KernelError::check("C", m.checked_mul(n), out)?;
    if let Some(bias) = epilogue.bias {
        KernelError::check("bias", Some(n), bias.len())?;
    }
    if let Some(residual) = epilogue.residual {
        residual.check("residual", m, n)?;
    }
    Ok(())
}

/// How C is cut into tasks: `row_parts` × `panel_parts` rectangles of nearly equal sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) m: usize,
    pub(super) panels: usize,
    pub(super) row_parts: usize,
    pub(super) panel_parts: usize,
}

impl Grid {
    /// The cut with the least estimated time: rounds of tasks over the threads, times what a task multiplies and reads.
    pub(super) fn choose(m: usize, panels: usize, width: usize, k: usize, threads: usize) -> Self {
        // In cycles per step of k, one being a row times a panel: to fetch a panel, and a row, from beyond the
        // second-level cache, to take a task, and to call the other threads.
        const PANEL: f64 = 6.0;
        const ROW: f64 = 0.3;
        let task = 300.0 / k.max(1) as f64;
        let fork = 4000.0 / k.max(1) as f64;
        let most = (GROUP_BYTES / (k.clamp(1, K_BLOCK) * width * size_of::<f32>())).clamp(1, panels);
        let fewest = panels.div_ceil(most);
        let mut best = (f64::INFINITY, Self { m, panels, row_parts: 1, panel_parts: fewest });
        for row_parts in 1..=m.div_ceil(8).min(threads) {
            let rounds = (fewest * row_parts).div_ceil(threads);
            let full_rounds = (rounds..rounds + 4).map(|rounds| (rounds * threads / row_parts).clamp(fewest, panels));
            for panel_parts in full_rounds.chain([fewest]) {
                let grid = Self { m, panels, row_parts, panel_parts };
                let (rows, group) = (m.div_ceil(row_parts) as f64, panels.div_ceil(grid.panel_parts) as f64);
                let rounds = grid.tasks().div_ceil(threads) as f64;
                let fork = if grid.tasks() > 1 && threads > 1 { fork } else { 0.0 };
                let cost = rounds * (rows * group + PANEL * group + ROW * rows + task) + fork;
                if cost < best.0 {
                    best = (cost, grid);
                }
            }
        }
        best.1
    }

    pub(super) fn tasks(&self) -> usize {
        self.row_parts * self.panel_parts
    }

    /// Rows and panels of a task. Those that follow one another share panels, which are what is costly to read.
    pub(super) fn task(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let rows = share(self.m, self.row_parts, index % self.row_parts);
        (rows, share(self.panels, self.panel_parts, index / self.row_parts))
    }
}

/// The `index`-th of `parts` nearly equal parts of 0..len.
pub(super) fn share(len: usize, parts: usize, index: usize) -> Range<usize> {
    len * index / parts..len * (index + 1) / parts
}

/// Where rows of A come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Memory, as they are.
    Rows(Rows<'a>),
    /// The windows of a convolution, gathered tile by tile.
    Windows(&'a Windows<'a>),
    /// Those that the numbers name, gathered likewise.
    Picked(Rows<'a>, &'a [u32]),
}

/// One task.
pub(super) struct Block<'a> {
    pub(super) a: Source<'a>,
    /// Row 0, column 0; only the block's own rows and columns have to lie in memory.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) epilogue: &'a Epilogue<'a>,
    /// activation(sum + bias + residual) instead of activation(sum + bias) + residual.
    pub(super) activation_last: bool,
}

simd_entry! {
    /// # Safety
    /// A, C and the epilogue have the lengths that the shape asks for; nobody else touches this block of C.
    fn block_f32(block: &Block<'_>, n: usize, k: usize, panels: *const f32) = multiply<_, f32>
}
simd_entry! {
    /// # Safety
    /// As for [`block_f32`].
    fn block_bf16(block: &Block<'_>, n: usize, k: usize, panels: *const bf16) = multiply<_, bf16>
}
simd_entry! {
    /// # Safety
    /// As for [`block_f32`].
    fn block_f16(block: &Block<'_>, n: usize, k: usize, panels: *const f16) = multiply<_, f16>
}

#[cfg(test)]
simd_entry! {
    /// # Safety
    /// As for [`block_f32`], A and W in pairs.
    fn block_pairs(block: &Block<'_>, n: usize, k: usize, panels: *const Pair) = multiply<_, Pair>
}

/// # Safety
/// As for [`block_f32`], A and W in pairs; the CPU has AVX-512 with BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn block_dot(block: &Block<'_>, n: usize, k: usize, panels: *const Pair) {
    // SAFETY: the caller's.
    unsafe { multiply::<super::simd::Avx512Bf16, Pair>(block, n, k, panels) }
}

/// # Safety
/// As for [`block_f32`], A and W in pairs; the CPU has BF16.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,bf16")]
unsafe fn block_dot(block: &Block<'_>, n: usize, k: usize, panels: *const Pair) {
    // SAFETY: the caller's.
    unsafe { multiply::<super::simd::NeonBf16, Pair>(block, n, k, panels) }
}

/// A stored weight.
pub(super) trait Element: Copy {
    /// `S::LANES` of them, as f32.
    ///
    /// # Safety
    /// As for the methods of [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::F;

    /// `sum` and the product of what A and W hold in each lane.
    ///
    /// # Safety
    /// As for the methods of [`Simd`].
    #[inline(always)]
    unsafe fn add_product<S: Simd>(a: S::F, w: S::F, sum: S::F) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::fma(a, w, sum) }
    }
}

impl Element for Pair {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's; a pair is as large as an f32.
        unsafe { S::load(p.cast()) }
    }

    #[inline(always)]
    unsafe fn add_product<S: Simd>(a: S::F, w: S::F, sum: S::F) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::dot_bf16(a, w, sum) }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's; bf16 is its bits.
        unsafe { S::load_bf16(p.cast()) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's; f16 is its bits.
        unsafe { S::load_f16(p.cast()) }
    }
}

/// Most rows of a micro-kernel: twice as many sums, two vectors of W and one of A fill the registers.
pub(super) const fn tile_rows(registers: usize) -> usize {
    if registers >= 32 { MAX_ROWS } else { 6 }
}

const MAX_ROWS: usize = 12;
pub(super) const MAX_WIDTH: usize = 32;

/// How far ahead of its use W is asked for, in bytes.
const AHEAD: usize = 8192;

/// Rows of a tile over one block of k, gathered.
#[repr(align(64))]
struct Gathered([MaybeUninit<f32>; MAX_ROWS * K_BLOCK]);

/// A tile on its way through memory.
#[repr(align(64))]
struct Staging([MaybeUninit<f32>; MAX_ROWS * MAX_WIDTH]);

#[inline(always)]
unsafe fn multiply<S: Simd, E: Element>(block: &Block<'_>, n: usize, k: usize, panels: *const E) {
    let tiles = block.rows.len().div_ceil(tile_rows(S::REGISTERS));
    let blocks = k.div_ceil(K_BLOCK).max(1);
    let mut gathered = Gathered([const { MaybeUninit::uninit() }; MAX_ROWS * K_BLOCK]);
    // Rows that fit one tile read W once, in the order in which it lies; more share a block of k of all panels.
    let group = if tiles == 1 && matches!(block.a, Source::Rows(_)) { 1 } else { block.panels.len() };
    for first in block.panels.clone().step_by(group) {
        let group = first..block.panels.end.min(first + group);
        for index in 0..blocks {
            for tile in 0..tiles {
                let rows = share(block.rows.len(), tiles, tile);
                let rows = block.rows.start + rows.start..block.rows.start + rows.end;
                let steps = index * K_BLOCK..k.min((index + 1) * K_BLOCK);
                // SAFETY: the caller's; rows, panel and block of k lie within A, W and C.
                unsafe {
                    let (a, stride) = match block.a {
                        Source::Rows(a) => (a.data.as_ptr().add(rows.start * a.stride + steps.start), a.stride),
                        Source::Windows(windows) => {
                            let buffer: *mut f32 = gathered.0.as_mut_ptr().cast();
                            windows.gather::<S>(rows.clone(), steps.clone(), buffer);
                            (buffer.cast_const(), steps.len())
                        }
                        Source::Picked(a, index) => {
                            let buffer: *mut f32 = gathered.0.as_mut_ptr().cast();
                            for (i, row) in index[rows.clone()].iter().enumerate() {
                                let to = buffer.add(i * steps.len());
                                match *row {
                                    ZEROS => zero::<S>(to, steps.len()),
                                    row => {
                                        let from = a.data.as_ptr().add(row as usize * a.stride + steps.start);
                                        copy::<S>(from, to, steps.len());
                                    }
                                }
                            }
                            (buffer.cast_const(), steps.len())
                        }
                    };
                    for panel in group.clone() {
                        let tile =
                            Place { rows: rows.clone(), panel, steps: steps.clone(), is_last: index + 1 == blocks };
                        let b = panels.add((panel * k + steps.start) * VECTORS * S::LANES);
                        multiply_tile::<S, E>(block, n, a, stride, b, &tile)
                    }
                }
            }
        }
    }
}

/// Which part of the product a tile is.
pub(super) struct Place {
    pub(super) rows: Range<usize>,
    pub(super) panel: usize,
    pub(super) steps: Range<usize>,
    pub(super) is_last: bool,
}

/// One panel over one block of k, for the rows of one tile. Rows and weights of just that block lie at `a` and `b`.
#[inline(always)]
pub(super) unsafe fn multiply_tile<S: Simd, E: Element>(
    block: &Block<'_>,
    n: usize,
    a: *const f32,
    a_stride: usize,
    b: *const E,
    place: &Place,
) {
    let &Block { c_stride, epilogue, activation_last, .. } = block;
    let Place { rows, steps, is_last, .. } = place;
    let width = VECTORS * S::LANES;
    let column = place.panel * width;
    let columns = width.min(n - column);
    let activation = if *is_last { epilogue.activation } else { Activation::Identity };
    let residual = epilogue.residual.filter(|_| *is_last);
    // A tile clamps at 0 on its way out; anything else, and columns that fill no panel, go through memory.
    let relu = activation == Activation::Relu && (activation_last || residual.is_none());
    let is_staged = columns < width || !(relu || activation == Activation::Identity);
    let mut staging = Staging([const { MaybeUninit::uninit() }; MAX_ROWS * MAX_WIDTH]);
    let staged: *mut f32 = staging.0.as_mut_ptr().cast();
    // SAFETY: the caller's. Where C begins need not be in memory.
    unsafe {
        let out = Out {
            c: block.c.wrapping_add(rows.start * c_stride + column),
            stride: c_stride,
            add: steps.start > 0,
            bias: epilogue.bias.filter(|_| *is_last).map(|bias| bias.as_ptr().add(column)),
            residual: residual.map(|r| (r.data.as_ptr().add(rows.start * r.stride + column), r.stride)),
            relu,
            activation_last,
            staged: is_staged.then_some(staged),
        };
        tile::<S, E>(rows.len(), a, a_stride, b, steps.len(), &out);
        if is_staged {
            finish::<S>(activation, staged, rows.len(), columns, &out);
        }
    }
}

/// Where a tile goes and what is added to it.
pub(super) struct Out {
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    /// Whether C holds the sum of earlier steps.
    pub(super) add: bool,
    pub(super) bias: Option<*const f32>,
    pub(super) residual: Option<(*const f32, usize)>,
    pub(super) relu: bool,
    pub(super) activation_last: bool,
    /// The sum goes here instead, bare.
    pub(super) staged: Option<*mut f32>,
}

impl Out {
    /// The sums alone, at `staged`.
    pub(super) fn bare(staged: *mut f32) -> Self {
        Self {
            c: staged,
            stride: 0,
            add: false,
            bias: None,
            residual: None,
            relu: false,
            activation_last: false,
            staged: Some(staged),
        }
    }
}

/// `M` rows of one panel over `steps` of k.
struct Tile<'a, E, const M: usize> {
    a: *const f32,
    stride: usize,
    b: *const E,
    steps: usize,
    out: &'a Out,
}

/// Runs the tile of `height` rows.
///
/// # Safety
/// The CPU has `S`; `height` rows of `steps` lie `stride` apart at `a`, as many of a panel at `b`, and `out` has room.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, E: Element>(
    height: usize,
    a: *const f32,
    stride: usize,
    b: *const E,
    steps: usize,
    out: &Out,
) {
    macro_rules! heights {
        ($($m:literal)*) => {
            match height {
                // SAFETY: the caller's.
                $($m if $m <= tile_rows(S::REGISTERS) => unsafe {
                    S::call(&Tile::<E, $m> { a, stride, b, steps, out })
                },)*
                _ => unreachable!("a tile has at most {} rows", tile_rows(S::REGISTERS)),
            }
        };
    }
    heights!(1 2 3 4 5 6 7 8 9 10 11 12)
}

impl<E: Element, const M: usize> Kernel for Tile<'_, E, M> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self) {
        let &Self { a, stride, b, steps, out } = self;
        // Rows four at a time from one pointer, or each would want a register of its own.
        let offsets = [0, stride, 2 * stride, 3 * stride];
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[S::splat(0.0); VECTORS]; M];
            for p in 0..steps {
                let w: [S::F; VECTORS] = std::array::from_fn(|j| E::load::<S>(b.add((p * VECTORS + j) * S::LANES)));
                let ahead = b.wrapping_add(p * VECTORS * S::LANES).wrapping_byte_add(AHEAD).cast::<f32>();
                S::prefetch(ahead);
                if VECTORS * S::LANES * size_of::<E>() > 64 {
                    S::prefetch(ahead.wrapping_add(16));
                }
                let mut four = a.add(p);
                for i in 0..M {
                    let x = S::splat(*four.add(offsets[i % 4]));
                    for j in 0..VECTORS {
                        sums[i][j] = E::add_product::<S>(x, w[j], sums[i][j]);
                    }
                    if i % 4 == 3 {
                        four = four.add(4 * stride);
                    }
                }
            }
            if let Some(staged) = out.staged {
                each::<M>(|i, j| S::store(staged.add((i * VECTORS + j) * S::LANES), sums[i][j]));
                return;
            }
            if out.add {
                each::<M>(|i, j| sums[i][j] = S::add(S::load(out.c.add(i * out.stride + j * S::LANES)), sums[i][j]));
            }
            if let Some(bias) = out.bias {
                let bias: [S::F; VECTORS] = std::array::from_fn(|j| S::load(bias.add(j * S::LANES)));
                each::<M>(|i, j| sums[i][j] = S::add(sums[i][j], bias[j]));
            }
            if let Some((residual, stride)) = out.residual {
                each::<M>(|i, j| sums[i][j] = S::add(sums[i][j], S::load(residual.add(i * stride + j * S::LANES))));
            }
            if out.relu {
                each::<M>(|i, j| sums[i][j] = S::max(S::splat(0.0), sums[i][j]));
            }
            each::<M>(|i, j| S::store(out.c.add(i * out.stride + j * S::LANES), sums[i][j]));
        }
    }
}

/// Calls `f` for every vector of a tile of `M` rows.
#[inline(always)]
fn each<const M: usize>(mut f: impl FnMut(usize, usize)) {
    for i in 0..M {
        for j in 0..VECTORS {
            f(i, j);
        }
    }
}

/// What a [`Tile`] does after the product, for a tile that does not fill its panel or has an activation.
///
/// # Safety
/// The CPU has `S`; `height` rows of [`VECTORS`] vectors lie at `staged`, `height` of `columns` behind what `out` names.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd>(
    activation: Activation,
    staged: *const f32,
    height: usize,
    columns: usize,
    out: &Out,
) {
    macro_rules! each {
        ($($activation:ident)*) => {
            match activation {
                // The literal makes a copy of the loop with one function inlined.
                // SAFETY: the caller's.
                $(Activation::$activation => unsafe {
                    finish_with::<S>(Activation::$activation, staged, height, columns, out)
                },)*
                // SAFETY: the caller's.
                Activation::LeakyRelu(slope) => unsafe {
                    finish_with::<S>(Activation::LeakyRelu(slope), staged, height, columns, out)
                },
            }
        };
    }
    each!(Identity Gelu GeluTanh QuickGelu Relu Silu Tanh Sigmoid Elu)
}

#[inline(always)]
unsafe fn finish_with<S: Simd>(activation: Activation, staged: *const f32, height: usize, columns: usize, out: &Out) {
    // what most tiles are: whole, and nothing but a bias before the activation
    if let (Some(bias), false, None) = (out.bias, out.add, out.residual)
        && columns == VECTORS * S::LANES
    {
        // SAFETY: the caller's.
        unsafe {
            let bias: [S::F; VECTORS] = std::array::from_fn(|j| S::load(bias.add(j * S::LANES)));
            for i in 0..height {
                for (j, bias) in bias.iter().enumerate() {
                    let sum = S::add(S::load(staged.add((i * VECTORS + j) * S::LANES)), *bias);
                    S::store(out.c.add(i * out.stride + j * S::LANES), math::activate::<S>(activation, sum));
                }
            }
        }
        return;
    }
    for i in 0..height {
        for j in 0..columns.div_ceil(S::LANES) {
            let column = j * S::LANES;
            let lanes = S::LANES.min(columns - column);
            // SAFETY: the caller's; `column + lanes` stays within the columns.
            unsafe {
                let c = out.c.add(i * out.stride + column);
                let mut sum = S::load(staged.add(i * VECTORS * S::LANES + column));
                if out.add {
                    sum = S::add(S::load_partial(c, lanes), sum);
                }
                if let Some(bias) = out.bias {
                    sum = S::add(sum, S::load_partial(bias.add(column), lanes));
                }
                let residual = out.residual.map(|(r, stride)| S::load_partial(r.add(i * stride + column), lanes));
                if let Some(residual) = residual.filter(|_| out.activation_last) {
                    sum = S::add(sum, residual);
                }
                sum = math::activate::<S>(activation, sum);
                if let Some(residual) = residual.filter(|_| !out.activation_last) {
                    sum = S::add(sum, residual);
                }
                S::store_partial(c, lanes, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::activation::activate_scalar;
    use super::*;

    /// The definition, with sums in f64. `weights` are (n, k).
    fn matmul_reference(
        a: Rows<'_>,
        m: usize,
        weights: &[f32],
        n: usize,
        k: usize,
        epilogue: &Epilogue<'_>,
    ) -> Vec<f64> {
        let mut out = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                let product = |p: usize| f64::from(a.data[i * a.stride + p]) * f64::from(weights[j * k + p]);
                let sum: f64 = (0..k).map(product).sum();
                let sum = sum + epilogue.bias.map_or(0.0, |bias| f64::from(bias[j]));
                let value = activate_scalar(epilogue.activation, sum as f32);
                let value = if epilogue.activation == Activation::Identity { sum } else { value };
                out.push(value + epilogue.residual.map_or(0.0, |r| f64::from(r.data[i * r.stride + j])));
            }
        }
        out
    }

    fn pair_products(isa: Isa) -> Vec<PairProduct> {
        [PairProduct::Halves].into_iter().chain(PairProduct::available(isa)).collect()
    }

    #[test]
    fn rows_come_back_as_they_were_packed() {
        let (n, k) = (70, 33);
        let weights: Vec<bf16> = numbers(n * k, 5).into_iter().map(bf16::from_f32).collect();
        for isa in Isa::available() {
            let plain = PackedMatrix::pack_for(isa, Weights::Bf16(&weights), n, k).unwrap();
            let pairs =
                pair_products(isa).into_iter().map(|p| PackedMatrix::pack_pairs(isa, p, &weights, n, k).unwrap());
            for matrix in pairs.chain([plain]) {
                for row in [0, 1, 31, 32, 69] {
                    let mut out = vec![MaybeUninit::new(f32::NAN); k];
                    matrix.row(row, &mut out);
                    // SAFETY: initialised above.
                    let out: Vec<f32> = out.into_iter().map(|x| unsafe { x.assume_init() }).collect();
                    assert_eq!(out, weights[row * k..][..k].iter().map(|w| w.to_f32()).collect::<Vec<_>>());
                }
            }
        }
    }

    /// Numbers in [-1, 1), the same in every run.
    fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn product(a: Rows<'_>, m: usize, w: &PackedMatrix, epilogue: &Epilogue<'_>) -> Vec<f32> {
        // A value that no sum has, so that an element that is not written is seen.
        let mut out = vec![MaybeUninit::new(-1e30f32); m * w.n()];
        matmul(a, m, w, epilogue, &mut out).unwrap();
        // SAFETY: all were initialised above.
        out.into_iter().map(|x| unsafe { x.assume_init() }).collect()
    }

    /// A sum of k products below 1, in blocks of `K_BLOCK` and then over the blocks: each of the k roundings is at most
    /// half an ULP of a partial sum, and partial sums of random signs stay below 4 √k, so the error is below
    /// 2^-24 · k · 4 √k, with the bias, the residual and the activation (at most 2 ULP of the sum) in the added 8.
    fn tolerance(k: usize) -> f64 {
        let k = k as f64;
        (k + 8.0) * 4.0 * k.sqrt().max(1.0) / f64::from(1 << 24)
    }

    struct Case {
        a: Vec<f32>,
        stride: usize,
        m: usize,
        n: usize,
        k: usize,
        weights: Vec<f32>,
        bias: Vec<f32>,
        residual: Vec<f32>,
    }

    impl Case {
        fn new(m: usize, n: usize, k: usize, gap: usize) -> Self {
            let seed = (m * 1_000_000 + n * 1000 + k) as u64;
            let stride = k + gap;
            Self {
                a: numbers(m * stride, seed),
                stride,
                m,
                n,
                k,
                weights: numbers(n * k, seed + 1),
                bias: numbers(n, seed + 2),
                residual: numbers(m * (n + gap), seed + 3),
            }
        }

        fn check(&self, isa: Isa, activation: Activation, bias: bool, residual: bool) {
            let &Self { m, n, k, stride, .. } = self;
            let a = Rows { data: &self.a, stride };
            let epilogue = Epilogue {
                bias: bias.then_some(&self.bias),
                activation,
                residual: residual.then_some(Rows { data: &self.residual, stride: n + stride - k }),
            };
            let bf16s: Vec<bf16> = self.weights.iter().map(|&w| bf16::from_f32(w)).collect();
            let f16s: Vec<f16> = self.weights.iter().map(|&w| f16::from_f32(w)).collect();
            let from_bf16: Vec<f32> = bf16s.iter().map(|w| w.to_f32()).collect();
            let from_f16: Vec<f32> = f16s.iter().map(|w| w.to_f32()).collect();
            let stored = [
                (Weights::F32(&self.weights), &self.weights),
                (Weights::Bf16(&bf16s), &from_bf16),
                (Weights::F16(&f16s), &from_f16),
            ];
            let rounded: Vec<f32> = self.a.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
            let rounded = Rows { data: &rounded, stride };
            let mut cases: Vec<_> = stored
                .map(|(weights, values)| (PackedMatrix::pack_for(isa, weights, n, k).unwrap(), a, values))
                .into_iter()
                .collect();
            for pairs in pair_products(isa) {
                cases.push((PackedMatrix::pack_pairs(isa, pairs, &bf16s, n, k).unwrap(), rounded, &from_bf16));
            }
            for (packed, rounded, values) in cases {
                let found = product(a, m, &packed, &epilogue);
                let expected = matmul_reference(rounded, m, values, n, k, &epilogue);
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(
                        error <= tolerance(k),
                        "{isa} {activation:?} m={m} n={n} k={k} at ({}, {}): {found}, expected {expected}",
                        index / n,
                        index % n
                    );
                }
            }
        }
    }

    #[test]
    fn every_path_against_the_definition() {
        for isa in Isa::available() {
            for m in (1..=17).chain([29, 64, 131]) {
                for n in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 67] {
                    for k in [1, 2, 3, 15, 16, 33, 67] {
                        let gap = (m + n + k) % 3;
                        Case::new(m, n, k, gap).check(isa, Activation::Identity, n % 2 == 0, k % 2 == 0);
                    }
                }
            }
        }
    }

    #[test]
    fn every_n_and_k() {
        for isa in Isa::available() {
            for n in 1..=67 {
                for k in 1..=67 {
                    Case::new(3, n, k, 1).check(isa, Activation::Identity, true, false);
                }
            }
        }
    }

    #[test]
    fn across_blocks_of_k() {
        for isa in Isa::available() {
            for k in [K_BLOCK - 1, K_BLOCK, K_BLOCK + 1, 2 * K_BLOCK, 3 * K_BLOCK + 5] {
                for (m, n) in [(1, 33), (5, 64), (15, 40), (40, 97)] {
                    Case::new(m, n, k, 3).check(isa, Activation::Gelu, true, true);
                    Case::new(m, n, k, 0).check(isa, Activation::Identity, false, true);
                }
            }
        }
    }

    #[test]
    fn every_activation() {
        use crate::activation::Slope;
        use Activation::*;
        for isa in Isa::available() {
            for activation in
                [Identity, Gelu, GeluTanh, QuickGelu, Relu, Silu, Tanh, Sigmoid, Elu, LeakyRelu(Slope::new(0.1))]
            {
                for (m, n) in [(1, 64), (7, 33), (20, 96)] {
                    Case::new(m, n, 40, 0).check(isa, activation, true, m == 7);
                }
            }
        }
    }

    #[test]
    fn no_dimension_or_nothing_to_sum() {
        for isa in Isa::available() {
            let empty = PackedMatrix::pack_for(isa, Weights::F32(&[]), 0, 5).unwrap();
            assert!(product(Rows { data: &[0.0; 10], stride: 5 }, 2, &empty, &Epilogue::default()).is_empty());
            let no_k = PackedMatrix::pack_for(isa, Weights::F32(&[]), 3, 0).unwrap();
            let epilogue = Epilogue { bias: Some(&[1.0, 2.0, 3.0]), ..Epilogue::default() };
            assert_eq!(product(Rows { data: &[], stride: 0 }, 2, &no_k, &epilogue), [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        }
    }

    #[test]
    fn nan_and_infinity_reach_their_row_and_column_only() {
        for isa in Isa::available() {
            for m in [1, 4, 20] {
                let (n, k) = (70, 50);
                let mut a = numbers(m * k, 1);
                let mut weights = numbers(n * k, 2);
                a[(m - 1) * k + 7] = f32::INFINITY;
                weights[41 * k + 3] = f32::NAN;
                weights[66 * k + 7] = 0.0; // ∞ · 0
                let packed = PackedMatrix::pack_for(isa, Weights::F32(&weights), n, k).unwrap();
                let found = product(Rows { data: &a, stride: k }, m, &packed, &Epilogue::default());
                let expected = matmul_reference(Rows { data: &a, stride: k }, m, &weights, n, k, &Epilogue::default());
                for (found, expected) in found.iter().zip(&expected) {
                    assert_eq!(found.is_nan(), expected.is_nan());
                    assert_eq!(found.is_infinite(), expected.is_infinite());
                    assert!(found.is_finite() || found.is_nan() || f64::from(*found) == *expected);
                }
            }
        }
    }

    #[test]
    fn a_row_in_a_batch_equals_the_row_alone() {
        for isa in Isa::available() {
            let (m, n, k) = (45, 100, K_BLOCK + 100);
            let case = Case::new(m, n, k, 0);
            for weights in [Weights::F32(&case.weights), Weights::Bf16(&vec![bf16::ONE; n * k])] {
                let packed = PackedMatrix::pack_for(isa, weights, n, k).unwrap();
                let all = product(Rows { data: &case.a, stride: k }, m, &packed, &Epilogue::default());
                for (row, alone) in case.a.chunks(k).zip(all.chunks(n)) {
                    assert_eq!(product(Rows { data: row, stride: k }, 1, &packed, &Epilogue::default()), alone);
                }
            }
            for pairs in pair_products(isa) {
                let packed = PackedMatrix::pack_pairs(isa, pairs, &vec![bf16::from_f32(0.3); n * k], n, k).unwrap();
                let all = product(Rows { data: &case.a, stride: k }, m, &packed, &Epilogue::default());
                for (row, alone) in case.a.chunks(k).zip(all.chunks(n)) {
                    assert_eq!(product(Rows { data: row, stride: k }, 1, &packed, &Epilogue::default()), alone);
                }
            }
        }
    }

    #[test]
    fn picked_rows_equal_a_copy_of_them() {
        let (n, k, rows) = (70, K_BLOCK + 33, 9);
        let (a, weights, residual) = (numbers(rows * k, 1), numbers(n * k, 2), numbers(40 * n, 3));
        let epilogue = Epilogue {
            residual: Some(Rows::contiguous(&residual, n)),
            bias: Some(&weights[..n]),
            ..Epilogue::default()
        };
        let index: Vec<u32> = (0..40).map(|i| if i % 5 == 3 { ZEROS } else { i * 7 % rows as u32 }).collect();
        let zeros = vec![0.0; k];
        let row = |row: &u32| if *row == ZEROS { &zeros[..] } else { &a[*row as usize * k..][..k] };
        let copied: Vec<f32> = index.iter().flat_map(row).copied().collect();
        for isa in Isa::available() {
            let halves: Vec<bf16> = weights.iter().map(|w| bf16::from_f32(*w)).collect();
            let pairs =
                pair_products(isa).into_iter().map(|p| PackedMatrix::pack_pairs(isa, p, &halves, n, k).unwrap());
            let plain = PackedMatrix::pack_for(isa, Weights::F32(&weights), n, k).unwrap();
            for packed in pairs.chain([plain]) {
                for m in [40, 1, 0] {
                    let mut out = vec![MaybeUninit::new(-1e30f32); m * n];
                    matmul_picked(Rows::contiguous(&a, k), &index[..m], &packed, &epilogue, &mut out).unwrap();
                    // SAFETY: all were initialised above.
                    let found: Vec<f32> = out.into_iter().map(|x| unsafe { x.assume_init() }).collect();
                    assert_eq!(found, product(Rows::contiguous(&copied, k), m, &packed, &epilogue), "{isa}");
                }
                let mut out = vec![MaybeUninit::new(0.0); n];
                let beyond =
                    matmul_picked(Rows::contiguous(&a, k), &[rows as u32], &packed, &Epilogue::default(), &mut out);
                assert!(beyond.unwrap_err().to_string().starts_with('A'));
            }
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_named() {
        let packed = PackedMatrix::pack(Weights::F32(&[0.0; 12]), 3, 4).unwrap();
        let a = Rows { data: &[0.0; 8], stride: 4 };
        let call = |a, epilogue: &Epilogue<'_>, len| {
            matmul(a, 2, &packed, epilogue, &mut vec![MaybeUninit::new(0.0); len]).map_err(|error| error.to_string())
        };
        let none = Epilogue::default();
        assert_eq!(call(a, &none, 6), Ok(()));
        assert!(call(Rows { data: &[0.0; 7], stride: 4 }, &none, 6).unwrap_err().starts_with('A'));
        assert!(call(Rows { data: &[0.0; 8], stride: usize::MAX }, &none, 6).unwrap_err().starts_with('A'));
        assert!(call(a, &none, 5).unwrap_err().starts_with('C'));
        assert!(call(a, &Epilogue { bias: Some(&[0.0; 2]), ..none }, 6).unwrap_err().starts_with("bias"));
        let short = Epilogue { residual: Some(Rows { data: &[0.0; 5], stride: 3 }), ..none };
        assert!(call(a, &short, 6).unwrap_err().starts_with("residual"));
        assert!(PackedMatrix::pack(Weights::F32(&[0.0; 11]), 3, 4).is_err());
    }

    #[test]
    fn a_grid_covers_everything_once() {
        for (m, panels, k, threads) in
            [(1, 1, 1, 1), (1, 24, 768, 2), (128, 96, 768, 2), (197, 3, 3072, 64), (1024, 72, 768, 7)]
        {
            let grid = Grid::choose(m, panels, 32, k, threads);
            let mut hits = vec![0; m * panels];
            for (rows, columns) in (0..grid.tasks()).map(|task| grid.task(task)) {
                for row in rows {
                    columns.clone().for_each(|column| hits[row * panels + column] += 1);
                }
            }
            assert!(hits.iter().all(|&hits| hits == 1), "{grid:?}");
        }
    }

    #[test]
    fn a_grid_fits_the_work_to_the_threads() {
        let tasks = |m, panels, k, threads| Grid::choose(m, panels, 32, k, threads).tasks();
        assert_eq!(tasks(13, 2, 100, 64), 1, "a microsecond is not worth a fork");
        assert_eq!(tasks(1, 256, 2048, 2) % 2, 0);
        for threads in [2, 4, 8, 16, 64] {
            assert!(tasks(128, 24, 768, threads) >= threads, "{threads}");
            assert_eq!(tasks(1024, 96, 768, threads) % threads, 0, "{threads}");
        }
    }
}
