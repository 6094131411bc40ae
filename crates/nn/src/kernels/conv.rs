//! Convolution over channels-last images (batch, height, width, channels), sequences being images of height 1.
//!
//! An output pixel is the product of its window, the taps' channels side by side, with weights packed as
//! (out, kernel height, kernel width, in). The rows of a tile of that product, up to 12 windows, are gathered one block
//! of [`K_BLOCK`](super::matmul) steps at a time into 36 KiB beside the micro-kernel, so that no array of windows ever
//! exists; one gathered row serves every column of C that the task has. Windows of 1 × 1 pixel at stride 1 are read
//! where they are. Groups are products of their own. A transposed convolution is one such product per phase of its
//! stride, with the taps that meet that phase, so nothing is multiplied by the zeros between the pixels.
//!
//! Kernels of 3 × 3 at stride 1 may take [`winograd`](super::winograd)'s forms instead.
//!
//! A depthwise convolution copies a band of one vector of channels, padding included, and slides over it with the sums
//! in registers: inside the band every window is whole and every load a full vector, whatever the border and the
//! number of channels.
//!
//! Measured on a virtual machine with two cores of an AMD EPYC of the Zen 5 generation (48 KiB, 1 MiB, 32 MiB caches) with
//! `cargo bench -p roofbench-nn --bench conv`, AVX-512, one thread, one image, best of 12 rounds beside heavy other work,
//! ReLU fused; 100 % is what fused multiply-adds on registers reach, 290 GFLOP/s: ResNet-50's 3 × 3 at stride 1 88–94 %,
//! at stride 2 90–92 %, its 1 × 1 88–96 %, its stem 62 %; ConvNeXt's 2 × 2 at stride 2 90–93 %, its stem 57 %, its
//! depthwise 7 × 7 54–57 %.
//!
//! Tried and dropped, same machine: strips of 14 pixels in the depthwise kernel instead of 7, 415 against 189 µs at
//! 56 × 56 × 96 and 97 against 46 µs at 14 × 14 × 384 (24–26 % against 54–57 %).

#![expect(unsafe_code, reason = "vectors over raw pixels; lengths are checked once, at the entries")]

use std::mem::MaybeUninit;
use std::ops::Range;

use half::{bf16, f16};

use super::KernelError;
use super::isa::Isa;
use super::matmul::{Block, Epilogue, Out, PackedMatrix, Rows, Source, Weights, finish, share};
use super::simd::{Kernel, MAX_LANES, Simd, simd_entry};
use super::winograd::Winograd;
use crate::activation::Activation;
use crate::memory::Buffer;
use crate::op::Shared;
use crate::pool;

/// How windows lie over an image; pairs are height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) dilation: [usize; 2],
    /// Zeros before and after.
    pub(crate) padding: [[usize; 2]; 2],
    pub(crate) groups: usize,
}

impl Geometry {
    /// Windows that fit; `None` where the padded image is smaller than one.
    pub(crate) fn out_size(&self, size: [usize; 2]) -> Option<[usize; 2]> {
        let along = |i: usize| {
            let padded = size[i] + self.padding[i][0] + self.padding[i][1];
            let room = padded.checked_sub((self.kernel[i] - 1) * self.dilation[i] + 1)?;
            Some(room / self.stride[i] + 1)
        };
        Some([along(0)?, along(1)?])
    }
}

/// What follows the sums: activation(sum + bias + residual).
#[derive(Clone, Copy)]
pub(crate) struct After<'a> {
    /// One value per channel.
    pub(crate) bias: Option<&'a [f32]>,
    /// Of the output's shape, without gaps.
    pub(crate) residual: Option<&'a [f32]>,
    pub(crate) activation: Activation,
}

impl After<'_> {
    fn check(&self, channels: usize, len: usize) -> Result<(), KernelError> {
        if let Some(bias) = self.bias {
            KernelError::check("bias", Some(channels), bias.len())?;
        }
        if let Some(residual) = self.residual {
            KernelError::check("residual", Some(len), residual.len())?;
        }
        Ok(())
    }

    /// The part of a group with `n` channels out of `channels`.
    fn group(&self, group: usize, n: usize, channels: usize) -> Epilogue<'_> {
        let residual = self.residual.map(|r| Rows { data: &r[group * n..], stride: channels });
        Epilogue { bias: self.bias.map(|bias| &bias[group * n..][..n]), activation: self.activation, residual }
    }
}

/// The windows of an image as rows of a matrix: (batch · out height · out width, kernel height · kernel width · channels).
pub(super) struct Windows<'a> {
    input: &'a [f32],
    size: [usize; 2],
    /// Channels of a pixel, and of those the ones that count.
    pixel: usize,
    channels: Range<usize>,
    out: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Where the first tap of the first window lies.
    offset: [isize; 2],
}

impl Windows<'_> {
    /// Writes the `steps` of each of `rows`, without gaps.
    ///
    /// # Safety
    /// The CPU has `S`, rows and steps lie within the matrix, `out` has room for them.
    #[inline(always)]
    pub(super) unsafe fn gather<S: Simd>(&self, rows: Range<usize>, steps: Range<usize>, mut out: *mut f32) {
        if steps.is_empty() {
            return;
        }
        let channels = self.channels.len();
        let [height, width] = self.size;
        // Taps of one line that lie side by side are one run.
        let is_line = channels == self.pixel && self.dilation[1] == 1;
        let taps = if is_line { self.kernel[1] } else { 1 };
        let run = taps * channels;
        let (first, per_line) = (steps.start / run, if is_line { 1 } else { self.kernel[1] });
        let (first_ky, first_kx) = (first / per_line, first % per_line);
        let (line, mut x) = (rows.start / self.out[1], rows.start % self.out[1]);
        let (mut item, mut y) = (line / self.out[0], line % self.out[0]);
        for _ in rows {
            let top = (y * self.stride[0]) as isize + self.offset[0];
            let left = (x * self.stride[1]) as isize + self.offset[1];
            let (mut ky, mut kx, mut from) = (first_ky, first_kx, steps.start % run);
            let mut remaining = steps.len();
            while remaining > 0 {
                let to = run.min(from + remaining);
                let iy = top + (ky * self.dilation[0]) as isize;
                let ix = left + (kx * self.dilation[1]) as isize;
                // Of the run, what lies within the image.
                let inside = |end: isize| if iy < 0 || iy >= height as isize { 0 } else { end.clamp(0, taps as isize) };
                let begin = (inside(-ix) as usize * channels).clamp(from, to);
                let end = (inside(width as isize - ix) as usize * channels).clamp(begin, to);
                // SAFETY: pixels ix + begin / channels .. are inside the image, and `to - from` elements fit `out`.
                unsafe {
                    zero::<S>(out, begin - from);
                    if begin < end {
                        let line = (item * height + iy as usize) * width;
                        let pixel = (line as isize + ix) * self.pixel as isize;
                        let source =
                            self.input.as_ptr().wrapping_offset(pixel + (self.channels.start + begin) as isize);
                        copy::<S>(source, out.add(begin - from), end - begin);
                    }
                    zero::<S>(out.add(end - from), to - end);
                    out = out.add(to - from);
                }
                remaining -= to - from;
                from = 0;
                kx += 1;
                if kx == per_line {
                    (kx, ky) = (0, ky + 1);
                }
            }
            x += 1;
            if x == self.out[1] {
                (x, y) = (0, y + 1);
                if y == self.out[0] {
                    (y, item) = (0, item + 1);
                }
            }
        }
    }
}

/// # Safety
/// The CPU has `S`; `n` elements at each, which do not overlap.
#[inline(always)]
pub(super) unsafe fn copy<S: Simd>(from: *const f32, to: *mut f32, n: usize) {
    // SAFETY: below n.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(to.add(i), S::load(from.add(i)));
            i += S::LANES;
        }
        if i < n {
            S::store_partial(to.add(i), n - i, S::load_partial(from.add(i), n - i));
        }
    }
}

/// # Safety
/// The CPU has `S`; `n` elements at `to`.
#[inline(always)]
pub(super) unsafe fn zero<S: Simd>(to: *mut f32, n: usize) {
    // SAFETY: below n.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= n {
            S::store(to.add(i), S::splat(0.0));
            i += S::LANES;
        }
        if i < n {
            S::store_partial(to.add(i), n - i, S::splat(0.0));
        }
    }
}

/// A convolution with its weights packed.
pub(crate) struct PackedConv {
    geometry: Geometry,
    channels_in: usize,
    channels_out: usize,
    kind: Kind,
}

enum Kind {
    /// One matrix per group: (out, kernel height · kernel width · in).
    Product(Vec<PackedMatrix>, Option<Winograd>),
    Depthwise(DepthwiseWeights),
}

impl PackedConv {
    /// Packs `weights` (out, kernel height, kernel width, in / groups) for the widest instruction set.
    ///
    /// # Errors
    /// When the length is another.
    ///
    /// # Panics
    /// When a number of the geometry or of channels is 0 or the groups do not divide the channels.
    pub(crate) fn pack(
        weights: Weights<'_>,
        channels_in: usize,
        channels_out: usize,
        geometry: Geometry,
    ) -> Result<Self, KernelError> {
        Self::pack_for(Isa::current(), weights, channels_in, channels_out, geometry)
    }

    pub(super) fn pack_for(
        isa: Isa,
        weights: Weights<'_>,
        channels_in: usize,
        channels_out: usize,
        geometry: Geometry,
    ) -> Result<Self, KernelError> {
        let Geometry { kernel, stride, dilation, groups, .. } = geometry;
        assert!(kernel.into_iter().chain(stride).chain(dilation).all(|x| x > 0) && groups > 0);
        assert!(channels_in > 0 && channels_in.is_multiple_of(groups) && channels_out.is_multiple_of(groups));
        let (n, k) = (channels_out / groups, kernel[0] * kernel[1] * channels_in / groups);
        KernelError::check("weights", Some(channels_out * k), weights.len())?;
        let kind = if groups == channels_in && n == 1 && groups > 1 {
            Kind::Depthwise(DepthwiseWeights::pack(isa, weights, groups, kernel))
        } else {
            let part = |group: usize| {
                let range = group * n * k..(group + 1) * n * k;
                PackedMatrix::pack_for(isa, weights.slice(range), n, k)
            };
            let matrices = (0..groups).map(part).collect::<Result<Vec<_>, _>>()?;
            let winograd = Winograd::new(&geometry, &matrices);
            Kind::Product(matrices, winograd)
        };
        Ok(Self { geometry, channels_in, channels_out, kind })
    }

    /// Bytes of the weights, padding included; what Winograd's forms keep comes on top.
    pub(crate) fn bytes(&self) -> usize {
        match &self.kind {
            Kind::Product(matrices, _) => matrices.iter().map(PackedMatrix::bytes).sum(),
            Kind::Depthwise(weights) => size_of_val::<[f32]>(&weights.packed),
        }
    }

    /// Convolves `x` (batch, size, in) into all of `out` (batch, out size, out).
    ///
    /// # Errors
    /// When the image is smaller than a window or a length does not fit.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        batch: usize,
        size: [usize; 2],
        after: &After<'_>,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<(), KernelError> {
        let &Self { geometry, channels_in, channels_out, .. } = self;
        let count =
            |size: [usize; 2], channels: usize| batch.checked_mul(size[0])?.checked_mul(size[1])?.checked_mul(channels);
        KernelError::check("the image", count(size, channels_in), x.len())?;
        let out_size = geometry.out_size(size);
        KernelError::check("the output", out_size.and_then(|size| count(size, channels_out)), out.len())?;
        after.check(channels_out, out.len())?;
        let (Some(out_size), false) = (out_size, out.is_empty()) else { return Ok(()) };
        let image = Image { x, batch, size, out_size, channels: channels_in };
        match &self.kind {
            Kind::Product(matrices, winograd) => {
                let direct = |out: &mut _| self.products(matrices, &image, after, out);
                match winograd {
                    Some(winograd) => winograd.forward(&matrices[0], geometry.padding, &image, after, out, direct),
                    None => direct(out),
                }
            }
            Kind::Depthwise(weights) => depthwise(weights, &geometry, &image, after, out),
        }
        Ok(())
    }

    fn products(&self, matrices: &[PackedMatrix], image: &Image<'_>, after: &After<'_>, out: &mut [MaybeUninit<f32>]) {
        let &Image { x, batch, size, out_size, .. } = image;
        let &Self { geometry: Geometry { kernel, stride, dilation, padding, groups }, .. } = self;
        let (pixel, c_stride) = (self.channels_in, self.channels_out);
        let (channels, n) = (pixel / groups, c_stride / groups);
        let is_pointwise = kernel == [1, 1] && stride == [1, 1] && padding == [[0; 2]; 2];
        let grid = matrices[0].grid(batch * out_size[0] * out_size[1], pool::threads().div_ceil(groups));
        let c = Shared(out.as_mut_ptr().cast());
        pool::run(groups * grid.tasks(), |task| {
            let group = task / grid.tasks();
            let (rows, panels) = grid.task(task % grid.tasks());
            let windows = Windows {
                input: x,
                size,
                pixel,
                channels: group * channels..(group + 1) * channels,
                out: out_size,
                kernel,
                stride,
                dilation,
                offset: padding.map(|[before, _]| -(before as isize)),
            };
            let a = match is_pointwise {
                true => Source::Rows(Rows { data: &x[group * channels..], stride: pixel }),
                false => Source::Windows(&windows),
            };
            let epilogue = after.group(group, n, c_stride);
            let c = c.get().wrapping_add(group * n);
            let block = Block { a, c, c_stride, rows, panels, epilogue: &epilogue, activation_last: true };
            // SAFETY: image, output and epilogue have the checked lengths; blocks do not overlap.
            unsafe { matrices[group].multiply(&block) }
        });
    }
}

/// A pass over an image.
pub(super) struct Image<'a> {
    pub(super) x: &'a [f32],
    pub(super) batch: usize,
    pub(super) size: [usize; 2],
    pub(super) out_size: [usize; 2],
    pub(super) channels: usize,
}

/// (vectors of channels, kernel height, kernel width, lanes), channels past the last zero.
struct DepthwiseWeights {
    isa: Isa,
    lanes: usize,
    packed: Buffer<f32>,
}

impl DepthwiseWeights {
    /// From (channels, kernel height, kernel width).
    fn pack(isa: Isa, weights: Weights<'_>, channels: usize, kernel: [usize; 2]) -> Self {
        let lanes = lanes(isa);
        let taps = kernel[0] * kernel[1];
        let mut packed = Buffer::zeroed(channels.div_ceil(lanes) * taps * lanes);
        for channel in 0..channels {
            for tap in 0..taps {
                let index = channel * taps + tap;
                packed[(channel / lanes * taps + tap) * lanes + channel % lanes] = match weights {
                    Weights::F32(w) => w[index],
                    Weights::Bf16(w) => bf16::to_f32(w[index]),
                    Weights::F16(w) => f16::to_f32(w[index]),
                };
            }
        }
        Self { isa, lanes, packed }
    }
}

fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 16,
        Isa::Avx2 => 8,
        Isa::Neon | Isa::Scalar => 4,
    }
}

/// Elements of a band: of one vector of channels, what a task's windows cover. It stays in the first-level cache.
const BAND: usize = 8192;
/// Most output pixels along a line, and lines, of a task.
const BAND_WIDTH: usize = 28;
const BAND_LINES: usize = 8;

/// One task of a depthwise convolution.
struct Band<'a> {
    image: &'a Image<'a>,
    geometry: &'a Geometry,
    weights: &'a [f32],
    after: &'a After<'a>,
    item: usize,
    lines: Range<usize>,
    pixels: Range<usize>,
    vectors: Range<usize>,
    out: *mut f32,
}

fn depthwise(
    weights: &DepthwiseWeights,
    geometry: &Geometry,
    image: &Image<'_>,
    after: &After<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let [height, width] = image.out_size;
    let extent =
        |i: usize, n: usize| (n - 1) * geometry.stride[i] + (geometry.kernel[i] - 1) * geometry.dilation[i] + 1;
    let columns = width.div_ceil(BAND_WIDTH);
    let row = extent(1, width.div_ceil(columns)) * weights.lanes;
    let lines = (1..=BAND_LINES.min(height)).rev().find(|&n| extent(0, n) * row <= BAND).unwrap_or(1);
    let rows = height.div_ceil(lines);
    let bands = image.batch * rows * columns;
    let vectors = image.channels.div_ceil(weights.lanes);
    // Enough tasks to share out evenly.
    let parts = (4 * pool::threads()).div_ceil(bands).clamp(1, vectors);
    let base = Shared(out.as_mut_ptr().cast());
    pool::run(bands * parts, |task| {
        let (band, part) = (task / parts, task % parts);
        let (line, column) = (band / columns, band % columns);
        let band = Band {
            image,
            geometry,
            weights: &weights.packed,
            after,
            item: line / rows,
            lines: share(height, rows, line % rows),
            pixels: share(width, columns, column),
            vectors: share(vectors, parts, part),
            out: base.get(),
        };
        // SAFETY: the set was available when the weights were packed; lengths were checked by `forward`; bands do not
        // overlap.
        unsafe { depthwise_band(weights.isa, &band) }
    });
}

simd_entry! {
    /// # Safety
    /// Image, output and epilogue have the lengths of their shapes; nobody else touches this band of the output.
    fn depthwise_band(band: &Band<'_>) = depthwise_kernel
}

/// Most pixels of a strip: with the taps of a line and one of the image they fit the registers, and the loop over them is
/// unrolled.
const fn strip_pixels(registers: usize) -> usize {
    if registers >= 32 { 7 } else { 6 }
}

const MAX_STRIP: usize = 7;

#[inline(always)]
unsafe fn depthwise_kernel<S: Simd>(band: &Band<'_>) {
    let Band { image, geometry, after, .. } = band;
    let Geometry { kernel, stride, dilation, padding, .. } = **geometry;
    let channels = image.channels;
    let extent = |i: usize, n: usize| (n - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1;
    let size = [extent(0, band.lines.len()), extent(1, band.pixels.len())];
    let corner = [
        (band.lines.start * stride[0]) as isize - padding[0][0] as isize,
        (band.pixels.start * stride[1]) as isize - padding[1][0] as isize,
    ];
    let row = size[1] * S::LANES;
    let mut copied = Buffer::<MaybeUninit<f32>>::uninit(size[0] * row);
    let copied: *mut f32 = copied.as_mut_ptr().cast();
    let strips = band.pixels.len().div_ceil(strip_pixels(S::REGISTERS));
    for vector in band.vectors.clone() {
        let channel = vector * S::LANES;
        let count = S::LANES.min(channels - channel);
        // SAFETY: pixels are inside the image where read; `copied`, the output and the epilogue are as long as asked.
        unsafe {
            for y in 0..size[0] {
                let line = copied.add(y * row);
                let iy = corner[0] + y as isize;
                let is_inside = iy >= 0 && iy < image.size[0] as isize;
                let inside = |end: isize| if is_inside { end.clamp(0, size[1] as isize) as usize } else { 0 };
                let (begin, end) = (inside(-corner[1]), inside(image.size[1] as isize - corner[1]));
                zero::<S>(line, begin * S::LANES);
                if begin < end {
                    let first = (band.item * image.size[0] + iy as usize) * image.size[1];
                    let first = (first as isize + corner[1] + begin as isize) as usize;
                    let mut from = image.x.as_ptr().add(first * channels + channel);
                    for x in begin..end {
                        let pixel = if count == S::LANES { S::load(from) } else { S::load_partial(from, count) };
                        S::store(line.add(x * S::LANES), pixel);
                        from = from.wrapping_add(channels);
                    }
                }
                zero::<S>(line.add(end * S::LANES), (size[1] - end) * S::LANES);
            }
            for y in 0..band.lines.len() {
                for strip in 0..strips {
                    let pixels = share(band.pixels.len(), strips, strip);
                    let mut sums = Sums([const { MaybeUninit::uninit() }; 2 * MAX_STRIP * MAX_LANES]);
                    let sums: *mut f32 = sums.0.as_mut_ptr().cast();
                    let strip = Strip {
                        x: copied.add(y * stride[0] * row + pixels.start * stride[1] * S::LANES),
                        line: dilation[0] * row,
                        step: stride[1] * S::LANES,
                        tap: dilation[1] * S::LANES,
                        w: band.weights.as_ptr().add(vector * kernel[0] * kernel[1] * S::LANES),
                        kernel,
                        sums,
                    };
                    slide::<S>(pixels.len(), stride[1] == 1 && dilation[1] == 1, &strip);
                    let line = (band.item * image.out_size[0] + band.lines.start + y) * image.out_size[1];
                    let first = (line + band.pixels.start + pixels.start) * channels + channel;
                    let out = Out {
                        c: band.out.add(first),
                        stride: channels,
                        add: false,
                        bias: after.bias.map(|bias| bias.as_ptr().add(channel)),
                        residual: after.residual.map(|residual| (residual.as_ptr().add(first), channels)),
                        relu: false,
                        activation_last: true,
                        staged: None,
                    };
                    finish::<S>(after.activation, sums, pixels.len(), count, &out);
                }
            }
        }
    }
}

/// Sums of a strip, laid out as a tile's.
#[repr(align(64))]
struct Sums([MaybeUninit<f32>; 2 * MAX_STRIP * MAX_LANES]);

/// Some pixels of one output line, one vector of channels: where their first window lies in the band, and the distances
/// from one line, pixel and tap to the next.
#[derive(Clone, Copy)]
struct Strip {
    x: *const f32,
    line: usize,
    step: usize,
    tap: usize,
    w: *const f32,
    kernel: [usize; 2],
    sums: *mut f32,
}

/// Sums the windows of `pixels`, which are `adjacent` where each line of a window holds all but one of the pixels of the
/// next.
#[inline(always)]
unsafe fn slide<S: Simd>(pixels: usize, adjacent: bool, strip: &Strip) {
    macro_rules! pixels {
        ($($n:literal)*) => {
            // SAFETY: the caller's.
            unsafe {
                match (pixels, strip.kernel[1]) {
                    $(
                        ($n, 3) if adjacent && $n <= strip_pixels(S::REGISTERS) => S::call(&Adjacent::<$n, 3>(*strip)),
                        ($n, 7) if adjacent && $n <= strip_pixels(S::REGISTERS) => S::call(&Adjacent::<$n, 7>(*strip)),
                        ($n, _) if $n <= strip_pixels(S::REGISTERS) => S::call(&Apart::<$n>(*strip)),
                    )*
                    _ => unreachable!("a strip has at most {} pixels", strip_pixels(S::REGISTERS)),
                }
            }
        };
    }
    pixels!(1 2 3 4 5 6 7)
}

/// Windows whose lines overlap: each pixel is loaded once for all taps of a line, which stay in registers.
struct Adjacent<const N: usize, const TAPS: usize>(Strip);

impl<const N: usize, const TAPS: usize> Kernel for Adjacent<N, TAPS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self) {
        let &Strip { mut x, line, mut w, kernel, sums: out, .. } = &self.0;
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [S::splat(0.0); N];
            for _ in 0..kernel[0] {
                let taps: [S::F; TAPS] = std::array::from_fn(|tap| S::load(w.add(tap * S::LANES)));
                for i in 0..N + TAPS - 1 {
                    let pixel = S::load(x.add(i * S::LANES));
                    for (tap, &weight) in taps.iter().enumerate() {
                        if i >= tap && i - tap < N {
                            sums[i - tap] = S::fma(pixel, weight, sums[i - tap]);
                        }
                    }
                }
                x = x.wrapping_add(line);
                w = w.add(TAPS * S::LANES);
            }
            for (i, &sum) in sums.iter().enumerate() {
                S::store(out.add(2 * i * S::LANES), sum);
            }
        }
    }
}

/// Windows at any distance.
struct Apart<const N: usize>(Strip);

impl<const N: usize> Kernel for Apart<N> {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self) {
        let &Strip { mut x, line, step, tap, mut w, kernel, sums: out } = &self.0;
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [S::splat(0.0); N];
            for _ in 0..kernel[0] {
                for kx in 0..kernel[1] {
                    let (weight, x) = (S::load(w), x.add(kx * tap));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(S::load(x.add(i * step)), weight, *sum);
                    }
                    w = w.add(S::LANES);
                }
                x = x.wrapping_add(line);
            }
            for (i, &sum) in sums.iter().enumerate() {
                S::store(out.add(2 * i * S::LANES), sum);
            }
        }
    }
}

/// How a transposed convolution spreads an image; pairs are height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TransposedGeometry {
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) dilation: [usize; 2],
    /// Pixels cut off at both ends.
    pub(crate) padding: [usize; 2],
    /// Pixels added at the lower and right end.
    pub(crate) output_padding: [usize; 2],
    pub(crate) groups: usize,
}

impl TransposedGeometry {
    /// `None` where everything is cut off.
    pub(crate) fn out_size(&self, size: [usize; 2]) -> Option<[usize; 2]> {
        let along = |i: usize| {
            let full = size[i].checked_sub(1)? * self.stride[i] + (self.kernel[i] - 1) * self.dilation[i] + 1;
            (full + self.output_padding[i]).checked_sub(2 * self.padding[i]).filter(|&size| size > 0)
        };
        Some([along(0)?, along(1)?])
    }

    /// The taps that reach outputs o with (o + padding) mod stride = `phase`, from the one that reads furthest to the
    /// left; they are evenly spaced.
    fn taps(&self, axis: usize, phase: usize) -> Vec<usize> {
        let (stride, dilation) = (self.stride[axis], self.dilation[axis]);
        (0..self.kernel[axis]).rev().filter(|tap| (tap * dilation) % stride == phase).collect()
    }
}

/// A transposed convolution with its weights packed.
pub(crate) struct PackedConvTranspose {
    geometry: TransposedGeometry,
    channels_in: usize,
    channels_out: usize,
    /// By phase along the height, along the width, and group: (out, taps · in).
    matrices: Vec<PackedMatrix>,
}

impl PackedConvTranspose {
    /// Packs `weights` (in, out / groups, kernel height, kernel width) for the widest instruction set.
    ///
    /// # Errors
    /// When the length is another.
    ///
    /// # Panics
    /// When a number of the geometry or of channels is 0 or the groups do not divide the channels.
    pub(crate) fn pack(
        weights: &[f32],
        channels_in: usize,
        channels_out: usize,
        geometry: TransposedGeometry,
    ) -> Result<Self, KernelError> {
        Self::pack_for(Isa::current(), weights, channels_in, channels_out, geometry)
    }

    fn pack_for(
        isa: Isa,
        weights: &[f32],
        channels_in: usize,
        channels_out: usize,
        geometry: TransposedGeometry,
    ) -> Result<Self, KernelError> {
        let TransposedGeometry { kernel, stride, dilation, groups, .. } = geometry;
        assert!(kernel.into_iter().chain(stride).chain(dilation).all(|x| x > 0) && groups > 0);
        assert!(channels_in > 0 && channels_in.is_multiple_of(groups) && channels_out.is_multiple_of(groups));
        let (n, inputs) = (channels_out / groups, channels_in / groups);
        KernelError::check("weights", Some(channels_in * n * kernel[0] * kernel[1]), weights.len())?;
        let mut matrices = Vec::with_capacity(stride[0] * stride[1] * groups);
        for y in 0..stride[0] {
            for x in 0..stride[1] {
                let (rows, columns) = (geometry.taps(0, y), geometry.taps(1, x));
                let k = rows.len() * columns.len() * inputs;
                for group in 0..groups {
                    let mut matrix = Vec::with_capacity(n * k);
                    for o in 0..n {
                        for ky in &rows {
                            for kx in &columns {
                                let at = |i| (((group * inputs + i) * n + o) * kernel[0] + ky) * kernel[1] + kx;
                                matrix.extend((0..inputs).map(|i| weights[at(i)]));
                            }
                        }
                    }
                    matrices.push(PackedMatrix::pack_for(isa, Weights::F32(&matrix), n, k)?);
                }
            }
        }
        Ok(Self { geometry, channels_in, channels_out, matrices })
    }

    /// Bytes of the weights, padding included.
    pub(crate) fn bytes(&self) -> usize {
        self.matrices.iter().map(PackedMatrix::bytes).sum()
    }

    /// Spreads `x` (batch, size, in) over all of `out` (batch, out size, out).
    ///
    /// # Errors
    /// When the output has no pixels or a length does not fit.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        batch: usize,
        size: [usize; 2],
        after: &After<'_>,
        out: &mut [MaybeUninit<f32>],
    ) -> Result<(), KernelError> {
        let count =
            |size: [usize; 2], channels: usize| batch.checked_mul(size[0])?.checked_mul(size[1])?.checked_mul(channels);
        KernelError::check("the image", count(size, self.channels_in), x.len())?;
        let out_size = self.geometry.out_size(size);
        KernelError::check("the output", out_size.and_then(|size| count(size, self.channels_out)), out.len())?;
        after.check(self.channels_out, out.len())?;
        let (Some(out_size), false) = (out_size, out.is_empty()) else { return Ok(()) };
        let phases = self.phases(x, size, out_size);
        let threads = pool::threads().div_ceil(phases.len());
        let mut tasks = Vec::new();
        for phase in &phases {
            let rows = batch * phase.windows.out[0] * phase.windows.out[1];
            let grid = phase.matrix.grid(rows, threads);
            tasks.extend((0..grid.tasks()).map(|task| (phase, grid.task(task))));
        }
        let base = Shared(out.as_mut_ptr().cast());
        let [step_y, step_x] = self.geometry.stride;
        let n = self.channels_out / self.geometry.groups;
        pool::run(tasks.len(), |task| {
            let (phase, (rows, panels)) = &tasks[task];
            let epilogue = after.group(phase.group, n, self.channels_out);
            let [lines, width] = phase.windows.out;
            let c_stride = step_x * self.channels_out;
            // The pixels of a phase are evenly spaced along a line only.
            let mut start = rows.start;
            while start < rows.end {
                let line = start / width;
                let end = rows.end.min((line + 1) * width);
                let y = line / lines * out_size[0] + phase.first[0] + line % lines * step_y;
                let first = (y * out_size[1] + phase.first[1]) * self.channels_out + phase.group * n;
                let block = Block {
                    a: Source::Windows(&phase.windows),
                    c: base.get().wrapping_add(first).wrapping_sub(line * width * c_stride),
                    c_stride,
                    rows: start..end,
                    panels: panels.clone(),
                    epilogue: &Epilogue { residual: None, ..epilogue },
                    activation_last: true,
                };
                // SAFETY: image, output and bias have the checked lengths; blocks do not overlap.
                unsafe { phase.matrix.multiply(&block) };
                start = end;
            }
        });
        Ok(())
    }

    /// Every phase that has outputs, by group.
    fn phases<'a>(&'a self, x: &'a [f32], size: [usize; 2], out_size: [usize; 2]) -> Vec<Phase<'a>> {
        let TransposedGeometry { stride, dilation, padding, groups, .. } = self.geometry;
        let channels = self.channels_in / groups;
        let mut phases = Vec::new();
        for y in 0..stride[0].min(out_size[0]) {
            for x_first in 0..stride[1].min(out_size[1]) {
                let first = [y, x_first];
                let phase = [0, 1].map(|i| (first[i] + padding[i]) % stride[i]);
                let taps = [0, 1].map(|i| self.geometry.taps(i, phase[i]));
                // From a tap to the next the window moves by dilation / gcd(stride, dilation) pixels.
                let offset = [0, 1].map(|i| {
                    let reach = taps[i].first().map_or(0, |tap| tap * dilation[i]);
                    ((first[i] + padding[i]) as isize - reach as isize) / stride[i] as isize
                });
                for group in 0..groups {
                    let windows = Windows {
                        input: x,
                        size,
                        pixel: self.channels_in,
                        channels: group * channels..(group + 1) * channels,
                        out: [0, 1].map(|i| (out_size[i] - first[i]).div_ceil(stride[i])),
                        kernel: [taps[0].len(), taps[1].len()],
                        stride: [1, 1],
                        dilation: [0, 1].map(|i| dilation[i] / gcd(stride[i], dilation[i])),
                        offset,
                    };
                    let matrix = &self.matrices[(phase[0] * stride[1] + phase[1]) * groups + group];
                    phases.push(Phase { matrix, windows, group, first });
                }
            }
        }
        phases
    }
}

/// The outputs at `first` + i · stride: a plain convolution.
struct Phase<'a> {
    matrix: &'a PackedMatrix,
    windows: Windows<'a>,
    group: usize,
    first: [usize; 2],
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::activation::activate_scalar;
    use super::*;

    /// Numbers in [-1, 1), the same in every run.
    pub(in super::super) fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Runs `kernel` into an output whose every element has to be overwritten.
    pub(in super::super) fn output(
        len: usize,
        kernel: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<(), KernelError>,
    ) -> Vec<f32> {
        let mut out = vec![MaybeUninit::new(-1e30f32); len];
        kernel(&mut out).unwrap();
        // SAFETY: initialised above.
        out.into_iter().map(|x| unsafe { x.assume_init() }).collect()
    }

    fn finished(sum: f64, channel: usize, index: usize, after: &After<'_>) -> f64 {
        let sum = sum + after.bias.map_or(0.0, |bias| f64::from(bias[channel]));
        let sum = sum + after.residual.map_or(0.0, |residual| f64::from(residual[index]));
        match after.activation {
            Activation::Identity => sum,
            activation => activate_scalar(activation, sum as f32),
        }
    }

    /// The definition. `w` is (out, kernel height, kernel width, in / groups).
    pub(in super::super) fn conv_reference(
        x: &[f32],
        (batch, size): (usize, [usize; 2]),
        w: &[f32],
        [inputs, outputs]: [usize; 2],
        g: &Geometry,
        after: &After<'_>,
    ) -> Vec<f64> {
        let [oh, ow] = g.out_size(size).unwrap();
        let (cin, cout) = (inputs / g.groups, outputs / g.groups);
        let mut out = Vec::new();
        for (item, y, xo, o) in indices([batch, oh, ow, outputs]) {
            let mut sum = 0.0;
            for (ky, kx, c, _) in indices([g.kernel[0], g.kernel[1], cin, 1]) {
                let iy = (y * g.stride[0] + ky * g.dilation[0]).checked_sub(g.padding[0][0]).filter(|&i| i < size[0]);
                let ix = (xo * g.stride[1] + kx * g.dilation[1]).checked_sub(g.padding[1][0]).filter(|&i| i < size[1]);
                if let (Some(iy), Some(ix)) = (iy, ix) {
                    let pixel = x[((item * size[0] + iy) * size[1] + ix) * inputs + o / cout * cin + c];
                    let weight = w[((o * g.kernel[0] + ky) * g.kernel[1] + kx) * cin + c];
                    sum += f64::from(pixel) * f64::from(weight);
                }
            }
            out.push(finished(sum, o, out.len(), after));
        }
        out
    }

    /// The definition. `w` is (in, out / groups, kernel height, kernel width).
    fn transposed_reference(
        x: &[f32],
        (batch, size): (usize, [usize; 2]),
        w: &[f32],
        [inputs, outputs]: [usize; 2],
        g: &TransposedGeometry,
        after: &After<'_>,
    ) -> Vec<f64> {
        let [oh, ow] = g.out_size(size).unwrap();
        let (cin, cout) = (inputs / g.groups, outputs / g.groups);
        let mut sums = vec![0.0; batch * oh * ow * outputs];
        for (item, y, xi, c) in indices([batch, size[0], size[1], inputs]) {
            let pixel = f64::from(x[((item * size[0] + y) * size[1] + xi) * inputs + c]);
            for (ky, kx, o, _) in indices([g.kernel[0], g.kernel[1], cout, 1]) {
                let oy = (y * g.stride[0] + ky * g.dilation[0]).checked_sub(g.padding[0]).filter(|&i| i < oh);
                let ox = (xi * g.stride[1] + kx * g.dilation[1]).checked_sub(g.padding[1]).filter(|&i| i < ow);
                if let (Some(oy), Some(ox)) = (oy, ox) {
                    let weight = f64::from(w[((c * cout + o) * g.kernel[0] + ky) * g.kernel[1] + kx]);
                    sums[((item * oh + oy) * ow + ox) * outputs + c / cin * cout + o] += pixel * weight;
                }
            }
        }
        sums.iter().enumerate().map(|(i, &sum)| finished(sum, i % outputs, i, after)).collect()
    }

    fn indices([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        (0..a * b * c * d).map(move |i| (i / (b * c * d), i / (c * d) % b, i / d % c, i % d))
    }

    /// As in `matmul`: k roundings of partial sums below 4 √k, and 8 for what follows.
    fn assert_close(found: &[f32], expected: &[f64], k: usize, what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let tolerance = (k as f64 + 8.0) * 4.0 * (k as f64).sqrt().max(1.0) / f64::from(1 << 24);
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            assert!(error <= tolerance, "{what}, element {i}: {found}, expected {expected}");
        }
    }

    /// The first argument is kernel, stride, dilation and padding.
    fn check(g: Geometry, batch: usize, size: [usize; 2], channels: [usize; 2]) {
        if g.out_size(size).is_none() {
            return;
        }
        let k = g.kernel[0] * g.kernel[1] * channels[0] / g.groups;
        let x = numbers(batch * size[0] * size[1] * channels[0], 1 + size[1] as u64);
        let w = numbers(channels[1] * k, 2);
        let out_size = g.out_size(size).unwrap();
        let len = batch * out_size[0] * out_size[1] * channels[1];
        let (bias, residual) = (numbers(channels[1], 3), numbers(len, 4));
        let plain = After { bias: None, residual: None, activation: Activation::Identity };
        let afters = [
            plain,
            After { bias: Some(&bias), residual: Some(&residual), activation: Activation::Relu },
            After { bias: Some(&bias), residual: Some(&residual), activation: Activation::Gelu },
            After { bias: Some(&bias), activation: Activation::Relu, ..plain },
        ];
        for (after, isa) in afters.iter().flat_map(|after| Isa::available().map(move |isa| (after, isa))) {
            let conv = PackedConv::pack_for(isa, Weights::F32(&w), channels[0], channels[1], g).unwrap();
            let found = output(len, |out| conv.forward(&x, batch, size, after, out));
            let expected = conv_reference(&x, (batch, size), &w, channels, &g, after);
            let what = format!("{isa} {g:?} {batch} x {size:?} {channels:?} {:?}", after.activation);
            assert_close(&found, &expected, k, &what);
        }
    }

    pub(in super::super) fn geometry(
        kernel: usize,
        stride: usize,
        dilation: usize,
        padding: usize,
        groups: usize,
    ) -> Geometry {
        Geometry {
            kernel: [kernel; 2],
            stride: [stride; 2],
            dilation: [dilation; 2],
            padding: [[padding; 2]; 2],
            groups,
        }
    }

    #[test]
    fn products_against_the_definition() {
        for (kernel, stride, dilation, padding) in [
            (1, 1, 1, 0),
            (1, 2, 1, 0),
            (1, 1, 1, 1),
            (3, 1, 1, 1),
            (3, 2, 1, 1),
            (3, 1, 2, 2),
            (2, 2, 1, 0),
            (7, 2, 1, 3),
        ] {
            for channels in [[1, 5], [3, 33], [33, 3], [16, 32]] {
                for size in [[1, 1], [5, 7], [9, 8], [14, 3]] {
                    check(geometry(kernel, stride, dilation, padding, 1), 2, size, channels);
                }
            }
        }
    }

    #[test]
    fn groups_against_the_definition() {
        for (kernel, stride, dilation, padding) in [(1, 1, 1, 0), (3, 1, 1, 1), (3, 2, 2, 1)] {
            for (groups, channels) in [(2, [6, 4]), (3, [9, 99]), (4, [4, 8]), (2, [66, 2])] {
                check(geometry(kernel, stride, dilation, padding, groups), 2, [6, 9], channels);
            }
        }
    }

    #[test]
    fn depthwise_against_the_definition() {
        for (kernel, stride, dilation, padding) in [
            (3, 1, 1, 1),
            (3, 2, 1, 1),
            (3, 1, 3, 3),
            (5, 1, 1, 2),
            (7, 1, 1, 3),
            (7, 1, 1, 0),
            (7, 2, 1, 3),
            (1, 1, 1, 0),
        ] {
            for channels in [2, 3, 16, 33, 67] {
                for size in [[1, 1], [7, 7], [9, 31], [20, 15]] {
                    check(geometry(kernel, stride, dilation, padding, channels), 2, size, [channels; 2]);
                }
            }
        }
    }

    #[test]
    fn uneven_sides_and_sequences() {
        let uneven =
            Geometry { kernel: [2, 5], stride: [3, 2], dilation: [2, 1], padding: [[0, 3], [4, 1]], groups: 1 };
        check(uneven, 3, [9, 11], [5, 7]);
        check(Geometry { groups: 5, ..uneven }, 3, [9, 11], [5, 5]);
        check(Geometry { dilation: [1, 3], ..uneven }, 1, [9, 17], [5, 7]);
        for (kernel, stride, dilation) in [(10, 5, 1), (3, 2, 1), (31, 1, 1), (3, 1, 27)] {
            let line = Geometry {
                kernel: [1, kernel],
                stride: [1, stride],
                dilation: [1, dilation],
                padding: [[0, 0], [kernel - 1, 2]],
                groups: 1,
            };
            check(line, 2, [1, 65], [1, 40]);
            check(line, 2, [1, 65], [18, 4]);
            check(Geometry { groups: 18, ..line }, 2, [1, 65], [18, 18]);
        }
    }

    #[test]
    fn across_blocks_of_k() {
        check(geometry(3, 1, 1, 1, 1), 1, [5, 5], [200, 40]);
        check(geometry(3, 1, 2, 2, 1), 1, [4, 6], [200, 33]);
        check(geometry(1, 2, 1, 0, 1), 1, [4, 6], [1000, 33]);
    }

    fn check_transposed(g: TransposedGeometry, batch: usize, size: [usize; 2], channels: [usize; 2]) {
        let Some(out_size) = g.out_size(size) else { return };
        let k = g.kernel[0] * g.kernel[1] * channels[0] / g.groups;
        let x = numbers(batch * size[0] * size[1] * channels[0], 1);
        let w = numbers(k * channels[1], 2);
        let len = batch * out_size[0] * out_size[1] * channels[1];
        let bias = numbers(channels[1], 3);
        for activation in [Activation::Identity, Activation::Relu, Activation::Gelu] {
            let after = After { bias: Some(&bias), residual: None, activation };
            for isa in Isa::available() {
                let conv = PackedConvTranspose::pack_for(isa, &w, channels[0], channels[1], g).unwrap();
                let found = output(len, |out| conv.forward(&x, batch, size, &after, out));
                let expected = transposed_reference(&x, (batch, size), &w, channels, &g, &after);
                assert_close(&found, &expected, k, &format!("{isa} {g:?} {batch} x {size:?} {channels:?}"));
            }
        }
    }

    #[test]
    fn transposed_against_the_definition() {
        for (kernel, stride, dilation, padding, output_padding) in [
            (1, 1, 1, 0, 0),
            (2, 2, 1, 0, 0),
            (3, 2, 1, 1, 1),
            (4, 2, 1, 1, 0),
            (3, 1, 1, 1, 0),
            (3, 1, 2, 1, 0),
            (2, 3, 1, 0, 2),
            (3, 4, 2, 1, 1),
            (3, 2, 3, 2, 0),
        ] {
            let g = TransposedGeometry {
                kernel: [kernel; 2],
                stride: [stride; 2],
                dilation: [dilation; 2],
                padding: [padding; 2],
                output_padding: [output_padding; 2],
                groups: 1,
            };
            for channels in [[1, 3], [33, 5], [6, 34]] {
                for size in [[1, 1], [4, 7]] {
                    check_transposed(g, 2, size, channels);
                }
            }
            check_transposed(TransposedGeometry { groups: 3, ..g }, 2, [3, 5], [6, 9]);
            let uneven = TransposedGeometry {
                kernel: [1, 2 * kernel],
                stride: [1, stride + 1],
                dilation: [1, dilation],
                padding: [0, padding],
                output_padding: [0, output_padding],
                groups: 1,
            };
            check_transposed(uneven, 2, [1, 37], [8, 20]);
        }
    }

    #[test]
    fn an_item_in_a_batch_equals_it_alone() {
        let (g, size, channels) = (geometry(3, 1, 1, 1, 1), [9, 11], [20, 40]);
        let (x, w) = (numbers(3 * 99 * 20, 1), numbers(40 * 180, 2));
        let after = After { bias: None, residual: None, activation: Activation::Silu };
        let conv = PackedConv::pack(Weights::F32(&w), channels[0], channels[1], g).unwrap();
        let all = output(3 * 99 * 40, |out| conv.forward(&x, 3, size, &after, out));
        for (x, all) in x.chunks(99 * 20).zip(all.chunks(99 * 40)) {
            assert_eq!(output(99 * 40, |out| conv.forward(x, 1, size, &after, out)), all);
        }
    }

    #[test]
    fn half_precision_weights() {
        let (g, size) = (geometry(3, 1, 1, 1, 1), [4, 5]);
        let after = After { bias: None, residual: None, activation: Activation::Identity };
        let (x, w) = (numbers(20 * 6, 1), numbers(8 * 54, 2));
        let w16: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
        let widened: Vec<f32> = w16.iter().map(|w| w.to_f32()).collect();
        let conv = PackedConv::pack(Weights::Bf16(&w16), 6, 8, g).unwrap();
        let found = output(160, |out| conv.forward(&x, 1, size, &after, out));
        assert_close(&found, &conv_reference(&x, (1, size), &widened, [6, 8], &g, &after), 54, "bf16");
        let g = Geometry { groups: 6, ..g };
        let conv = PackedConv::pack(Weights::Bf16(&w16[..54]), 6, 6, g).unwrap();
        let found = output(120, |out| conv.forward(&x, 1, size, &after, out));
        assert_close(&found, &conv_reference(&x, (1, size), &widened[..54], [6, 6], &g, &after), 9, "depthwise bf16");
    }

    #[test]
    fn lengths_that_do_not_fit_are_named() {
        let conv = PackedConv::pack(Weights::F32(&[0.0; 18]), 1, 2, geometry(3, 1, 1, 0, 1)).unwrap();
        let after = After { bias: None, residual: None, activation: Activation::Identity };
        let call = |x: &[f32], size, after: &After<'_>, len| {
            conv.forward(x, 1, size, after, &mut vec![MaybeUninit::new(0.0); len]).map_err(|error| error.to_string())
        };
        assert_eq!(call(&[0.0; 16], [4, 4], &after, 8), Ok(()));
        assert!(call(&[0.0; 15], [4, 4], &after, 8).unwrap_err().starts_with("the image"));
        assert!(call(&[0.0; 16], [4, 4], &after, 7).unwrap_err().starts_with("the output"));
        assert!(call(&[0.0; 8], [2, 4], &after, 0).unwrap_err().starts_with("the output"));
        assert!(call(&[0.0; 16], [4, 4], &After { bias: Some(&[0.0]), ..after }, 8).unwrap_err().starts_with("bias"));
        let short = After { residual: Some(&[0.0; 7]), ..after };
        assert!(call(&[0.0; 16], [4, 4], &short, 8).unwrap_err().starts_with("residual"));
        assert!(PackedConv::pack(Weights::F32(&[0.0; 17]), 1, 2, geometry(3, 1, 1, 0, 1)).is_err());
    }
}
