//! C = A · Wᵀ with W in blocks of 32 numbers along k, each with a scale: 8 or 4 bits per weight and half a bit for the
//! scale.
//!
//! The definition of the result is the dequantised weights times A. There are two ways to it:
//!
//! - **Bytes**: A is quantised too, per row and block of 32 to -127..=127 with an f32 scale, and bytes are multiplied
//!   and summed exactly in 32 bits ([`ByteDot`]). That moves an element of A by at most 1/254 of the largest magnitude
//!   in its block, and so an element of C by at most Σ |w| · max |a of the block| / 254; with random signs the error is
//!   about 0.3 % / √(k / 32) of |C|'s typical size, below what 8 bits did to W. A row of A in which something is not
//!   finite gives a row of NaN.
//! - **Floats**: panels of W are dequantised into the cache and the f32 kernel of [`matmul`](super::matmul) runs. A is
//!   taken as it is.
//!
//! Packed, a block of the columns of a panel is one run of memory: the scales (bf16, one per column), then for four
//! steps of k at a time all columns, four bytes each. With 4 bits the upper halves of the bytes hold steps 16 to 31.
//! One row then reads W once, line after line.
//!
//! A scale is a bf16 rounded away from 0, which has the range of f32: weights are divided by the scale as it is stored,
//! so its rounding makes steps up to 0.8 % wider and is no error of its own. With 8 bits the largest magnitude of a
//! block is 127 steps; with 4 bits it is -8 steps, whatever its sign, so that all 16 values are used, and a weight is
//! off by half a step, or by a whole one where it is nearly the opposite of the largest.
//! Measured on a virtual machine with two cores of an AMD EPYC of the Zen 5 generation, one thread, beside much other
//! work (best of 6 or 12 rounds), 768 × 3072, in µs; f32 weights take 77, 142, 274, 620 and 2208:
//!
//! | rows | 1 | 8 | 16 | 36 | 132 |
//! |---|---|---|---|---|---|
//! | AVX-512 VNNI, bytes, 8 (4) bits | 23 (13) | 57 (54) | 105 (103) | 227 (230) | 832 (2835) |
//! | … floats | 151 (137) | 224 (203) | 348 (331) | 680 (658) | 2312 (2279) |
//! | AVX-512 without it, bytes | 22 (15) | 118 (91) | 219 (172) | 476 (383) | 1758 (1417) |
//! | AVX-VNNI, bytes | 22 (19) | 106 (107) | 202 (205) | 450 (454) | 1657 (1679) |
//! | AVX2, bytes | 33 (26) | 247 (188) | 473 (361) | 1068 (805) | 8227 (5907) |
//! | … floats | 739 (801) | 922 (986) | 1152 (1211) | 1790 (1846) | 4991 (9068) |
//!
//! The column of 132 rows of AVX2 is noise of other work as much as the kernel (36 rows scale to 3.9 ms by bytes). As
//! measured, floats were ahead three times: 8 bits there, 4 bits at 1020 rows on AVX-512 without VNNI (18.8 ms against
//! 19.5), and 4 bits at 132 rows with VNNI (2279 µs against 2835; 36 rows scale to 843). With VNNI bytes were ahead in
//! every other cell.
//!
//! One row of 2048 × 8192 with AVX-512 VNNI runs at 53 (66) GB/s of W, of 8192 × 2048 at 49 (60), one thread.
//!
//! Tried and dropped, same machine: a block's vectors of columns one after the other in tiles of 8 rows, whose
//! broadcasts the compiler then keeps for the second and spills: 8 rows of 2048 × 2048 127 (131) µs, against 123 (104)
//! in two tiles of 4.
#![expect(unsafe_code, reason = "micro-kernels on raw rows; lengths are checked once, in `matmul_quantized`")]

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use super::KernelError;
use super::dot::{ByteDot, DotKernel};
use super::isa::Dot;
use super::matmul::{
    Block, Epilogue, Grid, K_BLOCK, MAX_WIDTH, Out, Place, Rows, SendPtr, Source, VECTORS, Weights, check_lengths,
    finish, multiply_tile, panel_width, share, tile_rows,
};
use super::simd::Simd;
use crate::memory::Buffer;
use crate::pool;

/// Weights along k that share a scale.
pub const BLOCK: usize = 32;

/// Bits of a quantised weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8: -127 to 127 steps.
    Q8,
    /// 4: -8 to 7 steps.
    Q4,
}

impl Quantization {
    /// Bytes that weights (n, k) take with their scales, the padding of the last panel apart.
    pub fn bytes(self, n: usize, k: usize) -> usize {
        let block = match self {
            Self::Q8 => BLOCK,
            Self::Q4 => BLOCK / 2,
        };
        n * k.div_ceil(BLOCK) * (block + size_of::<bf16>())
    }
}

/// Weights (n, k), quantised and packed.
pub struct QuantizedMatrix {
    dot: Dot,
    quantization: Quantization,
    n: usize,
    k: usize,
    panels: Buffer<u8>,
}

impl QuantizedMatrix {
    /// Quantises and packs `weights` (n, k), row-major.
    ///
    /// A weight that is not finite makes its block, and so its column of C, NaN. Blocks without a magnitude above
    /// 2e-36 become 0.
    ///
    /// # Errors
    /// When the length is not n · k.
    pub fn quantize(weights: Weights<'_>, n: usize, k: usize, quantization: Quantization) -> Result<Self, KernelError> {
        Self::quantize_for(Dot::current(), weights, n, k, quantization)
    }

    pub(crate) fn quantize_for(
        dot: Dot,
        weights: Weights<'_>,
        n: usize,
        k: usize,
        quantization: Quantization,
    ) -> Result<Self, KernelError> {
        KernelError::check("weights", n.checked_mul(k), weights.len())?;
        let panels = match weights {
            Weights::F32(w) => pack_panels(w, n, k, dot, quantization),
            Weights::Bf16(w) => pack_panels(w, n, k, dot, quantization),
            Weights::F16(w) => pack_panels(w, n, k, dot, quantization),
        };
        Ok(Self { dot, quantization, n, k, panels })
    }

    /// Columns of C: rows of the weights.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The dimension summed over.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bits per weight.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// Bytes that one product reads of the weights, scales and padding included.
    pub fn bytes(&self) -> usize {
        self.panels.len()
    }

    /// Up to this many rows bytes are multiplied, with more rows floats. On x86 bytes were the quicker up to 36 rows,
    /// with more in all but three measurements (see the module); what is here of Arm and of plain Rust was not measured.
    fn most_byte_rows(&self) -> usize {
        match self.dot {
            Dot::Avx512Vnni | Dot::AvxVnni | Dot::Avx512 | Dot::Avx2 | Dot::NeonDot => usize::MAX,
            Dot::Neon | Dot::Scalar => 16,
        }
    }
}

/// What a dot's storage of an 8-bit weight adds to it.
fn offset(dot: Dot) -> i32 {
    match dot {
        #[cfg(target_arch = "x86_64")]
        Dot::Avx512Vnni => super::dot::Avx512Vnni::OFFSET,
        #[cfg(target_arch = "x86_64")]
        Dot::AvxVnni => super::dot::AvxVnni::OFFSET,
        _ => 0,
    }
}

/// What is added to a 4-bit weight, on every path.
const NIBBLE_OFFSET: i32 = 8;

/// Bytes of a block of one column.
const fn block_bytes(bits: usize) -> usize {
    BLOCK * bits / 8 + size_of::<bf16>()
}

impl Quantization {
    fn bits(self) -> usize {
        match self {
            Self::Q8 => 8,
            Self::Q4 => 4,
        }
    }

    /// The scale and the steps of a block.
    fn quantize(self, block: &[f32; BLOCK]) -> (bf16, [i8; BLOCK]) {
        if !block.iter().all(|w| w.is_finite()) {
            return (bf16::NAN, [0; BLOCK]);
        }
        let largest = block.iter().fold(0f32, |largest, &w| if w.abs() > largest.abs() { w } else { largest });
        let (scale, low, high) = match self {
            Self::Q8 => (largest.abs() / 127.0, -127, 127),
            Self::Q4 => (largest / -8.0, -8, 7),
        };
        if scale.abs() < f32::MIN_POSITIVE {
            return (bf16::ZERO, [0; BLOCK]);
        }
        let scale = bf16::from_bits(((scale.to_bits() + 0xffff) >> 16) as u16);
        let inverse = 1.0 / scale.to_f32();
        (scale, block.map(|w| nearest(w * inverse).clamp(low, high) as i8))
    }
}

/// The nearest integer, for magnitudes below 2^22.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    /// Here an f32's last bit is worth 1.
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

fn pack_panels<T>(w: &[T], n: usize, k: usize, dot: Dot, quantization: Quantization) -> Buffer<u8>
where
    T: Copy + Into<f32> + Sync,
{
    let width = panel_width(dot.isa());
    let blocks = k.div_ceil(BLOCK);
    let bytes = width * block_bytes(quantization.bits());
    let offset = offset(dot);
    let mut packed = Buffer::<MaybeUninit<u8>>::uninit(n.div_ceil(width) * blocks * bytes);
    let base = SendPtr(packed.as_mut_ptr());
    pool::run(n.div_ceil(width), |panel| {
        // SAFETY: the panel's own part of the buffer, which no other task touches.
        let out = unsafe { std::slice::from_raw_parts_mut(base.get().add(panel * blocks * bytes), blocks * bytes) };
        for (block, out) in out.chunks_mut(bytes).enumerate() {
            for column in 0..width {
                let mut values = [0.0; BLOCK];
                if panel * width + column < n {
                    let row = &w[(panel * width + column) * k..][..k];
                    for (value, &w) in values.iter_mut().zip(&row[block * BLOCK..]) {
                        *value = w.into();
                    }
                }
                let (scale, steps) = quantization.quantize(&values);
                let [low, high] = scale.to_bits().to_ne_bytes();
                out[2 * column].write(low);
                out[2 * column + 1].write(high);
                let at = |step: usize| 2 * width + (step / 4 * width + column) * 4 + step % 4;
                match quantization {
                    Quantization::Q8 => {
                        for (step, &w) in steps.iter().enumerate() {
                            out[at(step)].write((i32::from(w) + offset) as u8);
                        }
                    }
                    Quantization::Q4 => {
                        let nibble = |w: i8| (i32::from(w) + NIBBLE_OFFSET) as u8;
                        for step in 0..BLOCK / 2 {
                            out[at(step)].write(nibble(steps[step]) | nibble(steps[BLOCK / 2 + step]) << 4);
                        }
                    }
                }
            }
        }
    });
    // SAFETY: every byte of every block was written.
    unsafe { packed.assume_init() }
}

/// Which of the two ways a product takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Bytes,
    Floats,
}

/// C (m, n) = epilogue(A (m, k) · Wᵀ), every element of `out` (m, n) written. See the module for the error.
///
/// # Errors
/// When a slice is too short for its shape.
pub fn matmul_quantized(
    a: Rows<'_>,
    m: usize,
    w: &QuantizedMatrix,
    epilogue: &Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) -> Result<(), KernelError> {
    let path = if m <= w.most_byte_rows() { Path::Bytes } else { Path::Floats };
    matmul_by(path, a, m, w, epilogue, out)
}

pub(crate) fn matmul_by(
    path: Path,
    a: Rows<'_>,
    m: usize,
    w: &QuantizedMatrix,
    epilogue: &Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) -> Result<(), KernelError> {
    check_lengths(a, m, w.n, w.k, epilogue, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let c = SendPtr(out.as_mut_ptr().cast::<f32>());
    match w.quantization {
        Quantization::Q8 => multiply::<8>(path, a, m, w, epilogue, c),
        Quantization::Q4 => multiply::<4>(path, a, m, w, epilogue, c),
    }
    Ok(())
}

/// The lengths have been checked.
fn multiply<const BITS: usize>(
    path: Path,
    a: Rows<'_>,
    m: usize,
    w: &QuantizedMatrix,
    epilogue: &Epilogue<'_>,
    c: SendPtr<f32>,
) {
    let width = panel_width(w.dot.isa());
    let panels = w.n.div_ceil(width);
    let grid = Grid::choose(m, panels, width, w.k, pool::threads());
    match path {
        Path::Bytes => {
            let offset = if BITS == 8 { offset(w.dot) } else { NIBBLE_OFFSET };
            let tiles = Tiles { m, count: m.div_ceil(most_rows(w.dot)), blocks: w.k.div_ceil(BLOCK) };
            let quantized = quantize_rows(a, w.k, tiles, offset, w.dot);
            let grid = Grid { m: tiles.count, row_parts: grid.row_parts.min(tiles.count), ..grid };
            pool::run(grid.tasks(), |task| {
                let (rows, panels) = grid.task(task);
                let kernel = ByBytes::<BITS> {
                    w: w.panels.as_ptr(),
                    a: &quantized,
                    tiles,
                    rows,
                    panels,
                    c: c.get(),
                    n: w.n,
                    epilogue,
                };
                // SAFETY: the lengths were checked, tasks write disjoint parts of C, and packing took an available set.
                unsafe { call(w.dot, &kernel) }
            });
        }
        Path::Floats => pool::run(grid.tasks(), |task| {
            let (rows, panels) = grid.task(task);
            let c_stride = w.n;
            let block =
                Block { a: Source::Rows(a), c: c.get(), c_stride, rows, panels, epilogue, activation_last: false };
            let kernel = ByFloats::<BITS> { w: w.panels.as_ptr(), a, n: w.n, k: w.k, block };
            // SAFETY: as above.
            unsafe { call(w.dot, &kernel) }
        }),
    }
}

/// # Safety
/// The CPU has `dot`; what else it needs, the kernel says.
unsafe fn call<K: DotKernel>(dot: Dot, kernel: &K) {
    debug_assert!(dot.is_available());
    // SAFETY: the caller's.
    unsafe {
        match dot {
            #[cfg(target_arch = "x86_64")]
            Dot::Avx2 => super::dot::Avx2Dot::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Dot::AvxVnni => super::dot::AvxVnni::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Dot::Avx512 => super::dot::Avx512Dot::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Dot::Avx512Vnni => super::dot::Avx512Vnni::call(kernel),
            #[cfg(target_arch = "aarch64")]
            Dot::Neon => super::dot::NeonDot::call(kernel),
            #[cfg(target_arch = "aarch64")]
            Dot::NeonDot => super::dot::NeonDotprod::call(kernel),
            _ => super::dot::ScalarDot::call(kernel),
        }
    }
}

/// 32 elements of a row of A, quantised.
#[repr(C)]
#[derive(Clone, Copy)]
struct Activations {
    steps: [i8; BLOCK],
    /// NaN where something was not finite.
    scale: f32,
    /// What undoes the offset of the weights: minus the offset times the sum of the steps.
    correction: i32,
}

/// Rows of A in tiles of nearly equal height; a tile lies block by block, its rows side by side.
#[derive(Clone, Copy)]
struct Tiles {
    m: usize,
    count: usize,
    blocks: usize,
}

impl Tiles {
    fn rows(self, tile: usize) -> Range<usize> {
        share(self.m, self.count, tile)
    }
}

/// Most rows of a tile of bytes: twice as many sums of bytes, as many f32 sums, and the weights fill the registers.
fn most_rows(dot: Dot) -> usize {
    fn rows<S: Simd>() -> usize {
        if S::REGISTERS >= 32 { MOST_ROWS } else { MOST_ROWS / 2 }
    }
    match dot {
        #[cfg(target_arch = "x86_64")]
        Dot::Avx2 | Dot::AvxVnni => rows::<super::simd::Avx2>(),
        Dot::Scalar => rows::<super::simd::Scalar>(),
        _ => MOST_ROWS,
    }
}

const MOST_ROWS: usize = 6;

fn quantize_rows(a: Rows<'_>, k: usize, tiles: Tiles, offset: i32, dot: Dot) -> Buffer<Activations> {
    /// Elements whose quantisation is worth calling another thread.
    const TASK: usize = 1 << 15;
    let mut out = Buffer::<MaybeUninit<Activations>>::uninit(tiles.m * tiles.blocks);
    let base = SendPtr(out.as_mut_ptr().cast::<Activations>());
    let tasks = (tiles.m * k / TASK).clamp(1, tiles.count);
    pool::run(tasks, |task| {
        let tiles_here = share(tiles.count, tasks, task);
        let kernel = QuantizeRows { a, k, tiles, tiles_here, offset, out: base.get() };
        // SAFETY: the lengths were checked; tasks write the disjoint parts of their tiles.
        unsafe { call(dot, &kernel) }
    });
    // SAFETY: every block of every row was written.
    unsafe { out.assume_init() }
}

struct QuantizeRows<'a> {
    a: Rows<'a>,
    k: usize,
    tiles: Tiles,
    tiles_here: Range<usize>,
    offset: i32,
    out: *mut Activations,
}

impl DotKernel for QuantizeRows<'_> {
    #[inline(always)]
    unsafe fn run<D: ByteDot>(&self) {
        for tile in self.tiles_here.clone() {
            let rows = self.tiles.rows(tile);
            for (i, row) in rows.clone().enumerate() {
                let row = &self.a.data[row * self.a.stride..][..self.k];
                let (whole, rest) = row.as_chunks::<BLOCK>();
                // SAFETY: within the part of the tile, which begins with its first row.
                let write = |block: usize, values: &[f32; BLOCK]| unsafe {
                    let at = rows.start * self.tiles.blocks + block * rows.len() + i;
                    self.out.add(at).write(quantize_activations(values, self.offset));
                };
                for (block, values) in whole.iter().enumerate() {
                    write(block, values);
                }
                if !rest.is_empty() {
                    let mut values = [0.0; BLOCK];
                    values[..rest.len()].copy_from_slice(rest);
                    write(whole.len(), &values);
                }
            }
        }
    }
}

/// Plain loops over 32 elements, which the compiler turns into the caller's vectors.
#[inline(always)]
fn quantize_activations(values: &[f32; BLOCK], offset: i32) -> Activations {
    // Magnitudes of floats, infinities and NaN are ordered as their bits are.
    let largest = values.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
    let largest = f32::from_bits(largest);
    let scale = largest / 127.0;
    if !largest.is_finite() || scale < f32::MIN_POSITIVE {
        let scale = if largest.is_finite() { 0.0 } else { f32::NAN };
        return Activations { steps: [0; BLOCK], scale, correction: 0 };
    }
    let inverse = 127.0 / largest;
    let steps = values.map(|x| nearest(x * inverse));
    let sum: i32 = steps.iter().sum();
    Activations { steps: steps.map(|x| x as i8), scale, correction: -offset * sum }
}

/// One task by bytes.
struct ByBytes<'a, const BITS: usize> {
    w: *const u8,
    a: &'a [Activations],
    tiles: Tiles,
    /// Of the tiles.
    rows: Range<usize>,
    panels: Range<usize>,
    c: *mut f32,
    n: usize,
    epilogue: &'a Epilogue<'a>,
}

/// Tiles whose rows stay in the second-level cache while the panels go by.
const TILE_GROUP: usize = 8;

/// A tile's sums.
#[repr(align(64))]
struct Staging([MaybeUninit<f32>; MOST_ROWS * MAX_WIDTH]);

impl<const BITS: usize> DotKernel for ByBytes<'_, BITS> {
    #[inline(always)]
    unsafe fn run<D: ByteDot>(&self) {
        let &Self { w, a, tiles, c, n, epilogue, .. } = self;
        let width = VECTORS * D::S::LANES;
        let bytes = tiles.blocks * width * block_bytes(BITS);
        let mut staging = Staging([const { MaybeUninit::uninit() }; MOST_ROWS * MAX_WIDTH]);
        let staged: *mut f32 = staging.0.as_mut_ptr().cast();
        for first in self.rows.clone().step_by(TILE_GROUP) {
            for panel in self.panels.clone() {
                for tile in first..self.rows.end.min(first + TILE_GROUP) {
                    let rows = tiles.rows(tile);
                    let column = panel * width;
                    // SAFETY: the caller's; panel and tile lie within W, A and C.
                    unsafe {
                        let a = a.as_ptr().add(rows.start * tiles.blocks);
                        byte_tile::<D, BITS>(rows.len(), w.add(panel * bytes), a, tiles.blocks, staged);
                        let out = Out {
                            c: c.add(rows.start * n + column),
                            stride: n,
                            add: false,
                            bias: epilogue.bias.map(|bias| bias.as_ptr().add(column)),
                            residual: epilogue
                                .residual
                                .map(|r| (r.data.as_ptr().add(rows.start * r.stride + column), r.stride)),
                            relu: false,
                            activation_last: false,
                            staged: None,
                        };
                        finish::<D::S>(epilogue.activation, staged, rows.len(), width.min(n - column), &out);
                    }
                }
            }
        }
    }
}

/// `M` rows of one panel.
struct ByteTile<const BITS: usize, const M: usize> {
    w: *const u8,
    a: *const Activations,
    blocks: usize,
    sums: *mut f32,
}

/// Runs the tile of `height` rows.
#[inline(always)]
unsafe fn byte_tile<D: ByteDot, const BITS: usize>(
    height: usize,
    w: *const u8,
    a: *const Activations,
    blocks: usize,
    sums: *mut f32,
) {
    macro_rules! heights {
        ($($m:literal)*) => {
            match height {
                // SAFETY: the caller's.
                $($m if D::S::REGISTERS >= 32 || $m <= MOST_ROWS / 2 => unsafe {
                    D::call(&ByteTile::<BITS, $m> { w, a, blocks, sums })
                },)*
                _ => unreachable!("a tile has at most {MOST_ROWS} rows"),
            }
        };
    }
    heights!(1 2 3 4 5 6)
}

/// How far ahead of its use W is asked for, in bytes.
const AHEAD: usize = 8192;

impl<const BITS: usize, const M: usize> DotKernel for ByteTile<BITS, M> {
    #[inline(always)]
    unsafe fn run<D: ByteDot>(&self) {
        let &Self { blocks, sums: out, .. } = self;
        let lanes = D::S::LANES;
        let width = VECTORS * lanes;
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[D::S::splat(0.0); VECTORS]; M];
            for block in 0..blocks {
                let w = self.w.add(block * width * block_bytes(BITS));
                let a = self.a.add(block * M);
                let four = |i: usize, step: usize| D::splat((*a.add(i)).steps.as_ptr().cast::<i32>().add(step).read());
                D::S::prefetch(w.wrapping_add(AHEAD).cast());
                let mut dots: [[D::I; VECTORS]; M] =
                    std::array::from_fn(|i| [D::splat((*a.add(i)).correction); VECTORS]);
                for step in 0..BITS {
                    let p = w.add((2 + 4 * step) * width);
                    D::S::prefetch(p.wrapping_add(AHEAD).cast());
                    if width * 4 > 64 {
                        D::S::prefetch(p.wrapping_add(AHEAD + 64).cast());
                    }
                    let x: [D::I; VECTORS] = std::array::from_fn(|j| D::load(p.add(j * lanes * 4)));
                    if BITS == 8 {
                        each(&mut dots, |i, j, dot| D::dot(dot, x[j], four(i, step)));
                    } else {
                        let low: [D::I; VECTORS] = std::array::from_fn(|j| D::nibbles(x[j]).0);
                        each(&mut dots, |i, j, dot| D::dot_nibbles(dot, low[j], four(i, step)));
                        let high: [D::I; VECTORS] = std::array::from_fn(|j| D::nibbles(x[j]).1);
                        each(&mut dots, |i, j, dot| D::dot_nibbles(dot, high[j], four(i, BITS + step)));
                    }
                }
                let scales: [_; VECTORS] = std::array::from_fn(|j| D::S::load_bf16(w.add(2 * j * lanes).cast()));
                each(&mut sums, |i, j, sum| {
                    let product = D::S::mul(D::to_f32(dots[i][j]), scales[j]);
                    D::S::fma(product, D::S::splat((*a.add(i)).scale), sum)
                });
            }
            each(&mut sums, |i, j, sum| {
                D::S::store(out.add(i * width + j * lanes), sum);
                sum
            });
        }
    }
}

/// Replaces every vector of a tile by what `f` makes of it.
#[inline(always)]
fn each<T: Copy, const M: usize>(tile: &mut [[T; VECTORS]; M], mut f: impl FnMut(usize, usize, T) -> T) {
    for (i, row) in tile.iter_mut().enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = f(i, j, *x);
        }
    }
}

/// One task by floats.
struct ByFloats<'a, const BITS: usize> {
    w: *const u8,
    /// The block's.
    a: Rows<'a>,
    n: usize,
    k: usize,
    block: Block<'a>,
}

/// Panels that are dequantised together, so that a tile's rows are read once for all of them.
const PANEL_GROUP: usize = 4;

impl<const BITS: usize> DotKernel for ByFloats<'_, BITS> {
    #[inline(always)]
    unsafe fn run<D: ByteDot>(&self) {
        let &Self { w, a, n, k, ref block } = self;
        let width = VECTORS * D::S::LANES;
        let blocks = k.div_ceil(BLOCK);
        let bytes = width * block_bytes(BITS);
        let tiles = block.rows.len().div_ceil(tile_rows(D::S::REGISTERS));
        let k_blocks = k.div_ceil(K_BLOCK).max(1);
        let mut floats = Buffer::<MaybeUninit<f32>>::uninit(PANEL_GROUP * K_BLOCK * width);
        let floats = floats.as_mut_ptr().cast::<f32>();
        for first in block.panels.clone().step_by(PANEL_GROUP) {
            let group = first..block.panels.end.min(first + PANEL_GROUP);
            for index in 0..k_blocks {
                let steps = index * K_BLOCK..k.min((index + 1) * K_BLOCK);
                let here = index * K_BLOCK / BLOCK..blocks.min((index + 1) * K_BLOCK / BLOCK);
                // SAFETY: the caller's; panels, blocks and rows lie within W, A and C, and a group within `floats`.
                unsafe {
                    for panel in group.clone() {
                        let mut out = floats.add((panel - first) * K_BLOCK * width);
                        for i in here.clone() {
                            dequantize::<D, BITS>(w.add((panel * blocks + i) * bytes), out);
                            out = out.add(BLOCK * width);
                        }
                    }
                    for tile in 0..tiles {
                        let rows = share(block.rows.len(), tiles, tile);
                        let rows = block.rows.start + rows.start..block.rows.start + rows.end;
                        let tile_a = a.data.as_ptr().add(rows.start * a.stride + steps.start);
                        for panel in group.clone() {
                            let b = floats.add((panel - first) * K_BLOCK * width);
                            let is_last = index + 1 == k_blocks;
                            let place = Place { rows: rows.clone(), panel, steps: steps.clone(), is_last };
                            multiply_tile::<D::S, f32>(block, n, tile_a, a.stride, b, &place);
                        }
                    }
                }
            }
        }
    }
}

/// A block of the columns of a panel, to 32 rows of a panel of floats.
#[inline(always)]
unsafe fn dequantize<D: ByteDot, const BITS: usize>(w: *const u8, out: *mut f32) {
    let width = VECTORS * D::S::LANES;
    let mut scales = [0.0f32; MAX_WIDTH];
    // SAFETY: the caller's: a block is read, and 32 · width floats are written.
    unsafe {
        for j in 0..VECTORS {
            let scale = D::S::load_bf16(w.add(2 * j * D::S::LANES).cast());
            D::S::store(scales.as_mut_ptr().add(j * D::S::LANES), scale);
        }
        for step in 0..BITS {
            let words = w.add(2 * width + step * width * 4).cast::<u32>();
            for byte in 0..4 {
                let row = out.add((4 * step + byte) * width);
                for (column, &scale) in scales.iter().enumerate().take(width) {
                    let word = u32::from_le(words.add(column).read_unaligned());
                    if BITS == 8 {
                        let signs = if D::OFFSET == 0 { 0 } else { 0x8080_8080 };
                        let x = ((word ^ signs) << (24 - 8 * byte)) as i32 >> 24;
                        *row.add(column) = x as f32 * scale;
                    } else {
                        let half = |shift: usize| ((word >> shift & 15) as i32 - NIBBLE_OFFSET) as f32 * scale;
                        *row.add(column) = half(8 * byte);
                        *row.add(BLOCK / 2 * width + column) = half(8 * byte + 4);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::Path::{Bytes, Floats};
    use super::Quantization::{Q4, Q8};
    use super::*;
    use crate::activation::Activation;

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

    /// As they come back from their blocks, (n, k).
    fn dequantized(weights: &[f32], k: usize, quantization: Quantization) -> Vec<f32> {
        let blocks = weights.chunks(k.max(1)).flat_map(|row| row.chunks(BLOCK));
        let back = blocks.flat_map(|block| {
            let mut padded = [0.0; BLOCK];
            padded[..block.len()].copy_from_slice(block);
            let (scale, steps) = quantization.quantize(&padded);
            steps.map(|x| f32::from(x) * scale.to_f32()).into_iter().take(block.len())
        });
        back.collect()
    }

    /// The sum in f64, and how far each path may be from it.
    ///
    /// Bytes: an element of A moves by at most half of 1/127 of the largest in its block (and 1e-3 of that for the
    /// rounding of the quotient), or by all of it below 127 times the least normal number; the sum of a block is exact,
    /// what follows rounds five times per block and adds up. Floats: k products, each rounded and added, once more for
    /// the dequantised weight.
    fn reference(a: &[f32], w: &[f32]) -> (f64, [f64; 2]) {
        let (mut sum, mut bytes, mut floats) = (0.0, 0.0, 0.0);
        let blocks = a.len().div_ceil(BLOCK) as f64;
        for (a, w) in a.chunks(BLOCK).zip(w.chunks(BLOCK)) {
            let largest = a.iter().fold(0.0, |m: f64, &x| m.max(f64::from(x).abs()));
            for (&a, &w) in a.iter().zip(w) {
                let (a, w) = (f64::from(a), f64::from(w));
                sum += a * w;
                floats += (a * w).abs() * (a_len(blocks) + 2.0) / f64::from(1 << 24);
                bytes += w.abs() * (1.001 * largest / 254.0 + largest * (blocks + 5.0) / f64::from(1 << 24) + 2e-36);
            }
        }
        (sum, [bytes, floats])
    }

    /// The most elements in so many blocks.
    fn a_len(blocks: f64) -> f64 {
        blocks * BLOCK as f64
    }

    fn product(path: Path, a: Rows<'_>, m: usize, w: &QuantizedMatrix, epilogue: &Epilogue<'_>) -> Vec<f32> {
        // A value that no sum has, so that an element that is not written is seen.
        let mut out = vec![MaybeUninit::new(-1e30f32); m * w.n()];
        matmul_by(path, a, m, w, epilogue, &mut out).unwrap();
        // SAFETY: all were initialised above.
        out.into_iter().map(|x| unsafe { x.assume_init() }).collect()
    }

    struct Case {
        m: usize,
        n: usize,
        k: usize,
        a: Vec<f32>,
        weights: Vec<f32>,
    }

    impl Case {
        /// Blocks differ in magnitude, and some are zero.
        fn new(m: usize, n: usize, k: usize) -> Self {
            let seed = (m * 1_000_000 + n * 1000 + k) as u64;
            let magnitudes = [1.0, 1e-3, 0.0, 20.0, 0.3];
            let vary = |x: Vec<f32>, by: usize| {
                x.into_iter().enumerate().map(|(i, x)| x * magnitudes[(i % k / BLOCK + i / k + by) % 5]).collect()
            };
            Self { m, n, k, a: vary(numbers(m * k, seed), 0), weights: vary(numbers(n * k, seed + 1), 1) }
        }

        fn scaled(mut self, a: f32, weights: f32) -> Self {
            self.a.iter_mut().for_each(|x| *x *= a);
            self.weights.iter_mut().for_each(|x| *x *= weights);
            self
        }

        fn check(&self) {
            let &Self { m, n, k, .. } = self;
            for quantization in [Q8, Q4] {
                let weights = dequantized(&self.weights, k, quantization);
                let pack =
                    |dot| QuantizedMatrix::quantize_for(dot, Weights::F32(&self.weights), n, k, quantization).unwrap();
                let a = Rows::contiguous(&self.a, k);
                // The same bytes on every path: what may differ is the order of f32 roundings.
                let plain = product(Bytes, a, m, &pack(Dot::Scalar), &Epilogue::default());
                for dot in Dot::available() {
                    let packed = pack(dot);
                    for path in [Bytes, Floats] {
                        let found = product(path, a, m, &packed, &Epilogue::default());
                        for (index, &found) in found.iter().enumerate() {
                            let (i, j) = (index / n, index % n);
                            let (a, w) = (&self.a[i * k..][..k], &weights[j * k..][..k]);
                            let (expected, [bytes, floats]) = reference(a, w);
                            let error = (f64::from(found) - expected).abs();
                            let most = if path == Bytes { bytes } else { floats };
                            assert!(
                                error <= most,
                                "{dot} {quantization:?} {path:?} m={m} n={n} k={k} at ({i}, {j}): {found}, \
                                 expected {expected}"
                            );
                            let apart = (f64::from(found) - f64::from(plain[index])).abs();
                            assert!(
                                path == Floats || apart <= bytes / 1e3,
                                "{dot} {quantization:?} m={m} n={n} k={k} at ({i}, {j}): {found}, not {}",
                                plain[index]
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_path_against_the_definition() {
        for m in 1..=17 {
            for n in [1, 7, 16, 31, 33, 65] {
                for k in [1, 31, 32, 33, 67, 160] {
                    Case::new(m, n, k).check();
                }
            }
        }
    }

    #[test]
    fn across_blocks_of_k_and_groups() {
        for (m, n, k) in [(1, 40, K_BLOCK + 1), (3, 200, 2 * K_BLOCK + 40), (131, 33, 100), (70, 300, 64)] {
            Case::new(m, n, k).check();
        }
    }

    #[test]
    fn huge_and_small_numbers() {
        for (a, weights) in [(1e30, 1e3), (1e3, 1e30), (1e-30, 1e30), (1e-36, 1.0), (1e-42, 1e10), (1e30, 1e-42)] {
            Case::new(5, 33, 100).scaled(a, weights).check();
        }
    }

    #[test]
    fn a_weight_is_off_by_half_a_step() {
        for quantization in [Q8, Q4] {
            for seed in 0..200 {
                let mut block = [0.0; BLOCK];
                block.copy_from_slice(&numbers(BLOCK, seed + 1));
                let magnitude = [1.0, 1e30, 1e-30, 3e38][seed as usize % 4];
                block.iter_mut().for_each(|w| *w *= magnitude);
                let (scale, steps) = quantization.quantize(&block);
                let largest = block.iter().fold(0f32, |largest, w| largest.max(w.abs()));
                let (step, limit) = match quantization {
                    Q8 => (largest / 127.0, 127.5),
                    Q4 => (largest / 8.0, 7.5),
                };
                let scale = scale.to_f32();
                assert!(scale.abs() >= step * 0.999_999 && scale.abs() <= step * 1.008);
                for (&w, &x) in block.iter().zip(&steps) {
                    let half = if w / scale > limit { 1.0 } else { 0.5 };
                    let error = (f64::from(w) - f64::from(x) * f64::from(scale)).abs();
                    assert!(error <= f64::from(half * 1.0001 * scale.abs()), "{quantization:?} {w} {x} {scale}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_reaches_its_row_or_column() {
        let (n, k) = (70, 100);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (dot, quantization) in Dot::available().flat_map(|dot| [(dot, Q8), (dot, Q4)]) {
                for m in [1, 3, 17] {
                    let clean = Case::new(m, n, k);
                    let (mut a, mut weights) = (clean.a.clone(), clean.weights.clone());
                    a[(m - 1) * k + 7] = bad;
                    let pack =
                        |w: &[f32]| QuantizedMatrix::quantize_for(dot, Weights::F32(w), n, k, quantization).unwrap();
                    let none = Epilogue::default();
                    let packed = pack(&weights);
                    let expected = product(Bytes, Rows::contiguous(&clean.a, k), m, &packed, &none);
                    let found = product(Bytes, Rows::contiguous(&a, k), m, &packed, &none);
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        assert!(if i / n == m - 1 { found.is_nan() } else { found == expected });
                    }
                    weights[41 * k + 99] = bad;
                    let packed = pack(&weights);
                    for path in [Bytes, Floats] {
                        let found = product(path, Rows::contiguous(&clean.a, k), m, &packed, &none);
                        assert!(found.iter().enumerate().all(|(i, x)| x.is_nan() == (i % n == 41)));
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_in_a_batch_equals_the_row_alone() {
        let case = Case::new(45, 100, 200);
        for (dot, quantization) in Dot::available().flat_map(|dot| [(dot, Q8), (dot, Q4)]) {
            let weights = Weights::F32(&case.weights);
            let packed = QuantizedMatrix::quantize_for(dot, weights, case.n, case.k, quantization).unwrap();
            for path in [Bytes, Floats] {
                let rows = |a| Rows::contiguous(a, case.k);
                let all = product(path, rows(&case.a), case.m, &packed, &Epilogue::default());
                for (row, alone) in case.a.chunks(case.k).zip(all.chunks(case.n)) {
                    assert_eq!(product(path, rows(row), 1, &packed, &Epilogue::default()), alone);
                }
            }
        }
    }

    #[test]
    fn bias_activation_residual_and_distant_rows() {
        let (m, n, k, gap) = (11, 50, 70, 3);
        let case = Case::new(m, n, k);
        let a: Vec<f32> = case.a.chunks(k).flat_map(|row| row.iter().copied().chain([9.0; 3])).collect();
        let (bias, residual) = (numbers(n, 1), numbers(m * (n + gap), 2));
        for (dot, path) in Dot::available().flat_map(|dot| [(dot, Bytes), (dot, Floats)]) {
            let packed = QuantizedMatrix::quantize_for(dot, Weights::F32(&case.weights), n, k, Q8).unwrap();
            let bare = product(path, Rows::contiguous(&case.a, k), m, &packed, &Epilogue::default());
            let residual = Rows { data: &residual, stride: n + gap };
            let epilogue = Epilogue { bias: Some(&bias), activation: Activation::Relu, residual: Some(residual) };
            let found = product(path, Rows { data: &a, stride: k + gap }, m, &packed, &epilogue);
            for (index, (found, bare)) in found.iter().zip(&bare).enumerate() {
                let (i, j) = (index / n, index % n);
                assert_eq!(*found, (bare + bias[j]).max(0.0) + residual.data[i * residual.stride + j]);
            }
        }
    }

    #[test]
    fn stored_halves_are_read_as_they_are() {
        let weights = numbers(33 * 50, 1);
        let a = numbers(50, 2);
        let of = |weights| {
            let packed = QuantizedMatrix::quantize(weights, 33, 50, Q8).unwrap();
            product(Bytes, Rows::contiguous(&a, 50), 1, &packed, &Epilogue::default())
        };
        let bf16s: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
        let f16s: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
        let back: Vec<f32> = bf16s.iter().map(|w| w.to_f32()).collect();
        assert_eq!(of(Weights::Bf16(&bf16s)), of(Weights::F32(&back)));
        let back: Vec<f32> = f16s.iter().map(|w| w.to_f32()).collect();
        assert_eq!(of(Weights::F16(&f16s)), of(Weights::F32(&back)));
    }

    #[test]
    fn nothing_to_sum_and_lengths_that_do_not_fit() {
        for (dot, path) in Dot::available().flat_map(|dot| [(dot, Bytes), (dot, Floats)]) {
            let no_k = QuantizedMatrix::quantize_for(dot, Weights::F32(&[]), 3, 0, Q4).unwrap();
            let epilogue = Epilogue { bias: Some(&[1.0, 2.0, 3.0]), ..Epilogue::default() };
            let found = product(path, Rows { data: &[], stride: 0 }, 2, &no_k, &epilogue);
            assert_eq!(found, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
            let empty = QuantizedMatrix::quantize_for(dot, Weights::F32(&[]), 0, 5, Q8).unwrap();
            assert!(product(path, Rows::contiguous(&[0.0; 10], 5), 2, &empty, &Epilogue::default()).is_empty());
        }
        assert!(QuantizedMatrix::quantize(Weights::F32(&[0.0; 11]), 3, 4, Q8).is_err());
        let packed = QuantizedMatrix::quantize(Weights::F32(&[0.0; 12]), 3, 4, Q8).unwrap();
        let mut out = [MaybeUninit::new(0.0); 6];
        let error = matmul_quantized(Rows::contiguous(&[0.0; 7], 4), 2, &packed, &Epilogue::default(), &mut out);
        assert!(error.unwrap_err().to_string().starts_with('A'));
    }
}
