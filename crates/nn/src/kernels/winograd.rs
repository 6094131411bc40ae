//! 3 × 3 convolution at stride 1 by Winograd's minimal filtering: a tile of m × m output pixels, m = 2 or 4, costs
//! (m + 2)² products per pair of channels instead of 9 m², which is 2.25 and 4 times fewer.
//! Source: arXiv:1509.09308; the points of m = 4 after arXiv:1803.10986.
//!
//! A tile is Aᵀ (G g Gᵀ ⊙ Bᵀ d B) A. The transformed weights G g Gᵀ are computed once, in f64, and packed as (panel,
//! place, in, columns), (m + 2)² places, the panels being those of [`matmul`](super::matmul). A task has some tiles and some
//! panels. It transforms its tiles' inputs into [`INPUT_BYTES`] that stay in the second-level cache, goes panel by panel
//! through the places with the product's micro-kernel, whose sums are transformed back, finished with bias, residual and
//! activation and written once. Tiles beyond the image read zeros and write nothing.
//!
//! Transforms round too. Where inputs and weights are random in [-1, 1) and 256 channels are summed, the error is
//! 0.6 times that of one long sum in f32 for m = 2 (fewer terms to a sum) and 1.8 times for m = 4 with the points
//! 0, ±5/8, ±3/2, ∞; with the usual 0, ±1, ±2, ∞ it would be 3.7 times. The worst case is 7 and 63 times as large. An
//! infinity or a NaN reaches all of its tiles, not its windows alone.
//!
//! What a form gains depends on the shape and the machine, so [`Winograd`] times the direct product and both forms the
//! first time that a shape is met. Where two are close the choice, and with it the rounding, may differ from run to run;
//! an option holds it.
//!
//! Measured on a virtual machine with two cores of an AMD EPYC of the Zen 5 generation, AVX-512, one thread beside other
//! work, with `cargo bench -p roofbench-nn --bench conv`, in µs directly, for m = 2 and for m = 4:
//!
//! | side, channels | 56, 64 | 28, 128 | 14, 256 | 7, 512 |
//! |---|---|---|---|---|
//! | 1 image | 918, 463, 279 | 885, 417, 243 | 891, 415, 312 | 883, 513, 637 |
//! | 8 images | 7510, 3823, 2314 | 7151, 3386, 2085 | 7134, 3268, 2508 | 7165, 4157, 3628 |
//!
//! Tried and dropped there, beside more work: inputs of 1 MiB instead of 512 KiB, 8 images of 56 × 56 × 64 3187 against
//! 2314, while 7 × 7 × 512 took 2895 against 3628, whence [`FEWEST`].

#![expect(unsafe_code, reason = "vectors over raw pixels; lengths are checked once, at the entries")]

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::conv::{After, Geometry, Image};
use super::isa::Isa;
use super::matmul::{MAX_WIDTH, Out, PackedMatrix, VECTORS, finish, pack_panels, panel_width, share, tile, tile_rows};
use super::simd::{Simd, simd_entry};
use crate::memory::Buffer;
use crate::op::Shared;
use crate::{options, pool};

/// Bytes of a task's transformed inputs, unless [`FEWEST`] tiles take more.
const INPUT_BYTES: usize = 512 << 10;
/// Tiles of a task, where there are as many: fewer would read the weights more often than the micro-kernel asks for.
const FEWEST: usize = 12;
/// A form has to take at most this part of the time of a more exact one to be chosen.
const WORTH: f64 = 0.95;
/// Multiplications of a direct product too short to be timed: some ten microseconds.
const WORTH_TIMING: usize = 4_000_000;
/// Runs of each form when they are timed, of which the quickest counts.
const ROUNDS: usize = 3;

/// Output pixels of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tile {
    /// 2 × 2.
    Two,
    /// 4 × 4.
    Four,
}

/// The largest of the points, and the smaller one of m = 4.
const LARGE: f32 = 1.5;
const SMALL: f32 = 0.625;

impl Tile {
    /// Places along a side.
    const fn places(self) -> usize {
        match self {
            Self::Two => 4,
            Self::Four => 6,
        }
    }

    /// The finite points; infinity is the last.
    fn points(self) -> &'static [f64] {
        match self {
            Self::Two => &[0.0, 1.0, -1.0],
            Self::Four => &[0.0, SMALL as f64, -SMALL as f64, LARGE as f64, -LARGE as f64],
        }
    }

    /// G: what a line of three weights is multiplied with.
    fn of_weights(self) -> Vec<[f64; 3]> {
        let points = self.points();
        let row = |&p: &f64| {
            let scale: f64 = points.iter().filter(|&&q| q != p).map(|q| p - q).product();
            [1.0, p, p * p].map(|x| x / scale)
        };
        points.iter().map(row).chain([[0.0, 0.0, 1.0]]).collect()
    }
}

/// The weights of one convolution, transformed.
struct Transformed {
    isa: Isa,
    tile: Tile,
    outputs: usize,
    inputs: usize,
    /// (panels, places, in, columns of a panel).
    packed: Buffer<f32>,
}

impl Transformed {
    /// Of `weights` (out, 3, 3, in); `None` where they are not in f32.
    fn new(tile: Tile, weights: &PackedMatrix) -> Option<Self> {
        let element = weights.elements()?;
        let (isa, outputs, inputs) = (weights.isa(), weights.n(), weights.k() / 9);
        let line = tile.of_weights();
        let places: Vec<[f64; 9]> =
            line.iter().flat_map(|y| line.iter().map(|x| std::array::from_fn(|tap| y[tap / 3] * x[tap % 3]))).collect();
        let transformed = |row: usize, i: usize| {
            let (place, channel) = (&places[i / inputs], i % inputs);
            let tap = |tap: usize| place[tap] * f64::from(element(row, tap * inputs + channel));
            (0..9).map(tap).sum::<f64>() as f32
        };
        let packed = pack_panels(transformed, outputs, places.len() * inputs, panel_width(isa));
        Some(Self { isa, tile, outputs, inputs, packed })
    }

    /// Convolves all of the image into `out`; lengths are checked.
    fn forward(&self, padding: [[usize; 2]; 2], image: &Image<'_>, after: &After<'_>, out: &mut [MaybeUninit<f32>]) {
        let side = self.tile.places() - 2;
        let grid = image.out_size.map(|size| size.div_ceil(side));
        let (tiles, panels) = (image.batch * grid[0] * grid[1], self.outputs.div_ceil(panel_width(self.isa)));
        let most = INPUT_BYTES / (self.tile.places().pow(2) * self.inputs * size_of::<f32>());
        let [tile_parts, panel_parts] = cut(tiles, panels, most.max(FEWEST), pool::threads());
        let base = Shared(out.as_mut_ptr().cast());
        pool::run(tile_parts * panel_parts, |task| {
            let task = Task {
                weights: self,
                image,
                after,
                corner: padding.map(|[before, _]| before),
                grid,
                // neighbours in time share panels, which are what is costly to read
                tiles: share(tiles, tile_parts, task % tile_parts),
                panels: share(panels, panel_parts, task / tile_parts),
                out: base.get(),
            };
            // SAFETY: the set was available when the weights were packed; the caller's lengths; tasks write different
            // tiles or panels.
            unsafe {
                match self.tile {
                    Tile::Two => tiles_of_two(self.isa, &task),
                    Tile::Four => tiles_of_four(self.isa, &task),
                }
            }
        });
    }
}

/// Parts of the tiles, at most `most` each, and of the panels with the least estimated time.
fn cut(tiles: usize, panels: usize, most: usize, threads: usize) -> [usize; 2] {
    // As multiples of a tile's product with a panel: to fetch a panel, and to transform a tile's input.
    const PANEL: f64 = 6.0;
    const TRANSFORM: f64 = 0.3;
    let fewest = tiles.div_ceil(most);
    let mut best = (f64::INFINITY, [fewest, 1]);
    for panel_parts in 1..=panels.min(threads) {
        for tile_parts in fewest..(fewest + threads).min(tiles + 1) {
            let (tiles, panels) = (tiles.div_ceil(tile_parts) as f64, panels.div_ceil(panel_parts) as f64);
            let rounds = (tile_parts * panel_parts).div_ceil(threads) as f64;
            let cost = rounds * (tiles * panels + PANEL * panels + TRANSFORM * tiles);
            if cost < best.0 {
                best = (cost, [tile_parts, panel_parts]);
            }
        }
    }
    best.1
}

/// Some tiles and some panels.
struct Task<'a> {
    weights: &'a Transformed,
    image: &'a Image<'a>,
    after: &'a After<'a>,
    /// Zeros above and left of the image.
    corner: [usize; 2],
    /// Tiles of an image, down and across.
    grid: [usize; 2],
    tiles: Range<usize>,
    panels: Range<usize>,
    out: *mut f32,
}

impl Task<'_> {
    /// Item of the batch, and the first output pixel, of a tile.
    fn place(&self, tile: usize, side: usize) -> (usize, [usize; 2]) {
        let [down, across] = self.grid;
        (tile / (down * across), [tile / across % down * side, tile % across * side])
    }
}

simd_entry! {
    /// # Safety
    /// Image, output and epilogue have the lengths of their shapes; nobody else touches these channels of these tiles.
    fn tiles_of_two(task: &Task<'_>) = convolve_two
}
simd_entry! {
    /// # Safety
    /// As for [`tiles_of_two`].
    fn tiles_of_four(task: &Task<'_>) = convolve_four
}

#[inline(always)]
unsafe fn convolve_two<S: Simd>(task: &Task<'_>) {
    // SAFETY: the caller's.
    unsafe { convolve::<S, 4>(task) }
}

#[inline(always)]
unsafe fn convolve_four<S: Simd>(task: &Task<'_>) {
    // SAFETY: the caller's.
    unsafe { convolve::<S, 6>(task) }
}

/// Output pixels of a tile after the product, laid out as the product's tiles: line by line, a panel's columns each.
#[repr(align(64))]
struct Pixels([MaybeUninit<f32>; 16 * MAX_WIDTH]);

/// `T` places along a side.
#[inline(always)]
unsafe fn convolve<S: Simd, const T: usize>(task: &Task<'_>) {
    let Task { weights, image, after, .. } = task;
    let (count, inputs, outputs) = (task.tiles.len(), weights.inputs, weights.outputs);
    let (width, row) = (VECTORS * S::LANES, inputs.next_multiple_of(S::LANES));
    // From one place to the next; a line more, lest all of a tile's places meet in one set of the cache.
    let (apart, sums_apart) = (count * row + 16, count * width + 16);
    let mut scratch = Buffer::<MaybeUninit<f32>>::uninit(T * T * (apart + sums_apart) + row);
    let transformed: *mut f32 = scratch.as_mut_ptr().cast();
    let parts = count.div_ceil(tile_rows(S::REGISTERS));
    let mut pixels = Pixels([const { MaybeUninit::uninit() }; 16 * MAX_WIDTH]);
    let pixels: *mut f32 = pixels.0.as_mut_ptr().cast();
    // SAFETY: the scratch has room for `apart` and `sums_apart` per place and a row of zeros; pixels are read where they
    // are inside the image and written where inside the output.
    unsafe {
        let sums = transformed.add(T * T * apart);
        let zeros = transformed.add(T * T * (apart + sums_apart));
        super::conv::zero::<S>(zeros, row);
        for (i, tile) in task.tiles.clone().enumerate() {
            transform_inputs::<S, T>(task, tile, zeros, transformed.add(i * row), apart);
        }
        for panel in task.panels.clone() {
            for place in 0..T * T {
                let b = weights.packed.as_ptr().add((panel * T * T + place) * inputs * width);
                for part in 0..parts {
                    let rows = share(count, parts, part);
                    let a = transformed.add(place * apart + rows.start * row);
                    let out = Out::bare(sums.add(place * sums_apart + rows.start * width));
                    tile::<S, f32>(rows.len(), a, row, b, inputs, &out);
                }
            }
            let column = panel * width;
            let columns = width.min(outputs - column);
            for (i, tile) in task.tiles.clone().enumerate() {
                transform_sums::<S, T>(sums.add(i * width), sums_apart, pixels);
                let (item, [y, x]) = task.place(tile, T - 2);
                let [height, across] = image.out_size;
                for line in 0..(T - 2).min(height - y) {
                    let first = (item * height + y + line) * across + x;
                    let out = Out {
                        c: task.out.add(first * outputs + column),
                        stride: outputs,
                        bias: after.bias.map(|bias| bias.as_ptr().add(column)),
                        residual: after.residual.map(|r| (r.as_ptr().add(first * outputs + column), outputs)),
                        activation_last: true,
                        ..Out::bare(pixels)
                    };
                    let staged = pixels.add(line * (T - 2) * width);
                    finish::<S>(after.activation, staged, (T - 2).min(across - x), columns, &out);
                }
            }
        }
    }
}

/// Bᵀ d B of one tile, `apart` from place to place.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "lines become columns")]
unsafe fn transform_inputs<S: Simd, const T: usize>(
    task: &Task<'_>,
    tile: usize,
    zeros: *const f32,
    out: *mut f32,
    apart: usize,
) {
    let Image { x: pixels, size: [height, width], channels, .. } = *task.image;
    let (item, [y, x]) = task.place(tile, T - 2);
    // Where the tile's pixels lie, those outside being zeros.
    let mut from = [[zeros; T]; T];
    for (dy, line) in from.iter_mut().enumerate() {
        for (dx, from) in line.iter_mut().enumerate() {
            let inside = |at: usize, before: usize, size: usize| at.checked_sub(before).filter(|&at| at < size);
            if let (Some(y), Some(x)) = (inside(y + dy, task.corner[0], height), inside(x + dx, task.corner[1], width))
            {
                *from = &raw const pixels[((item * height + y) * width + x) * channels];
            }
        }
    }
    // SAFETY: the caller's; each pointer has `channels` elements behind it, zeros whole vectors.
    unsafe {
        for channel in (0..channels).step_by(S::LANES) {
            let lanes = S::LANES.min(channels - channel);
            let mut columns = [[S::splat(0.0); T]; T];
            for dx in 0..T {
                let mut column = [S::splat(0.0); T];
                for dy in 0..T {
                    let from = from[dy][dx].add(channel);
                    column[dy] = if lanes == S::LANES { S::load(from) } else { S::load_partial(from, lanes) };
                }
                columns[dx] = of_inputs::<S, T>(column);
            }
            for py in 0..T {
                let mut line = [S::splat(0.0); T];
                for dx in 0..T {
                    line[dx] = columns[dx][py];
                }
                let line = of_inputs::<S, T>(line);
                for px in 0..T {
                    S::store(out.add((py * T + px) * apart + channel), line[px]);
                }
            }
        }
    }
}

/// Aᵀ M A of one tile, whose places are `apart`, into (T - 2)² rows of a panel's columns.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "lines become columns")]
unsafe fn transform_sums<S: Simd, const T: usize>(sums: *const f32, apart: usize, pixels: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for vector in 0..VECTORS {
            let mut columns = [[S::splat(0.0); T]; T];
            for px in 0..T {
                let mut column = [S::splat(0.0); T];
                for py in 0..T {
                    column[py] = S::load(sums.add((py * T + px) * apart + vector * S::LANES));
                }
                columns[px] = of_sums::<S, T>(column);
            }
            for y in 0..T - 2 {
                let mut line = [S::splat(0.0); T];
                for px in 0..T {
                    line[px] = columns[px][y];
                }
                let line = of_sums::<S, T>(line);
                for x in 0..T - 2 {
                    S::store(pixels.add(((y * (T - 2) + x) * VECTORS + vector) * S::LANES), line[x]);
                }
            }
        }
    }
}

/// Bᵀ d: row p is Π (x - q) over the other finite points q, that of infinity over all, as coefficients of the powers of x.
#[inline(always)]
unsafe fn of_inputs<S: Simd, const T: usize>(d: [S::F; T]) -> [S::F; T] {
    let mut v = d;
    // SAFETY: the contract of `Simd`.
    unsafe {
        if T == 4 {
            v[0] = S::sub(d[2], d[0]);
            v[1] = S::add(d[2], d[1]);
            v[2] = S::sub(d[2], d[1]);
            v[3] = S::sub(d[3], d[1]);
        } else {
            let (a2, b2) = (SMALL * SMALL, LARGE * LARGE);
            let (minus_a2, minus_b2) = (S::splat(-a2), S::splat(-b2));
            let (product, minus_sum) = (S::splat(a2 * b2), S::splat(-a2 - b2));
            v[0] = S::fma(product, d[0], S::fma(minus_sum, d[2], d[4]));
            v[5] = S::fma(product, d[1], S::fma(minus_sum, d[3], d[5]));
            let (even, odd) = (S::fma(minus_b2, d[2], d[4]), S::fma(minus_b2, d[1], d[3]));
            v[1] = S::fma(S::splat(SMALL), odd, even);
            v[2] = S::fma(S::splat(-SMALL), odd, even);
            let (even, odd) = (S::fma(minus_a2, d[2], d[4]), S::fma(minus_a2, d[1], d[3]));
            v[3] = S::fma(S::splat(LARGE), odd, even);
            v[4] = S::fma(S::splat(-LARGE), odd, even);
        }
    }
    v
}

/// Aᵀ m, of which the first T - 2 count: row r has the powers r of the points, and infinity in the last.
#[inline(always)]
unsafe fn of_sums<S: Simd, const T: usize>(m: [S::F; T]) -> [S::F; T] {
    let mut y = m;
    // SAFETY: the contract of `Simd`.
    unsafe {
        let (even, odd) = (S::add(m[1], m[2]), S::sub(m[1], m[2]));
        if T == 4 {
            y[0] = S::add(m[0], even);
            y[1] = S::add(odd, m[3]);
        } else {
            let (a2, b2) = (SMALL * SMALL, LARGE * LARGE);
            let (even_b, odd_b) = (S::add(m[3], m[4]), S::sub(m[3], m[4]));
            y[0] = S::add(m[0], S::add(even, even_b));
            y[1] = S::fma(S::splat(SMALL), odd, S::mul(S::splat(LARGE), odd_b));
            y[2] = S::fma(S::splat(a2), even, S::mul(S::splat(b2), even_b));
            y[3] = S::fma(S::splat(a2 * SMALL), odd, S::fma(S::splat(b2 * LARGE), odd_b, m[5]));
        }
    }
    y
}

/// The forms that a convolution can take beside the direct product.
#[derive(Default)]
pub(super) struct Winograd {
    two: OnceLock<Option<Transformed>>,
    four: OnceLock<Option<Transformed>>,
}

/// What the choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    channels: [usize; 2],
    batch: usize,
    size: [usize; 2],
    padding: [[usize; 2]; 2],
    threads: usize,
}

/// What was chosen so far, `None` being the direct product.
static CHOSEN: Mutex<BTreeMap<Shape, Option<Tile>>> = Mutex::new(BTreeMap::new());

/// Which way convolutions of 3 × 3 at stride 1 go: as chosen for all, or in how many shapes each was the quickest; `None`
/// where none was timed yet.
pub(super) fn path() -> Option<String> {
    let isa = Isa::current();
    Some(match options::Winograd::current() {
        options::Winograd::Never => isa.to_string(),
        options::Winograd::Two => format!("{isa}, 3 x 3 by winograd 2 x 2"),
        options::Winograd::Four => format!("{isa}, 3 x 3 by winograd 4 x 4"),
        options::Winograd::Measured => {
            let chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
            let shapes = |form| chosen.values().filter(|&&chosen| chosen == form).count();
            let [two, four] = [Tile::Two, Tile::Four].map(|tile| shapes(Some(tile)));
            if chosen.is_empty() {
                return None;
            }
            format!(
                "{isa}, 3 x 3 as timed: winograd 4 x 4 for {four}, 2 x 2 for {two}, direct for {} shapes",
                shapes(None)
            )
        }
    })
}

impl Winograd {
    /// For convolutions that it can do.
    pub(super) fn new(geometry: &Geometry, weights: &[PackedMatrix]) -> Option<Self> {
        let Geometry { kernel, stride, dilation, .. } = *geometry;
        let can = kernel == [3, 3] && stride == [1, 1] && dilation == [1, 1];
        matches!(weights, [weights] if can && weights.elements().is_some()).then(Self::default)
    }

    fn kept(&self, tile: Tile) -> &OnceLock<Option<Transformed>> {
        match tile {
            Tile::Two => &self.two,
            Tile::Four => &self.four,
        }
    }

    /// Convolves as [`options`] say, with `direct` where that is the way; lengths are checked.
    pub(super) fn forward(
        &self,
        weights: &PackedMatrix,
        padding: [[usize; 2]; 2],
        image: &Image<'_>,
        after: &After<'_>,
        out: &mut [MaybeUninit<f32>],
        direct: impl Fn(&mut [MaybeUninit<f32>]),
    ) {
        let by = |transformed: &Transformed, out: &mut _| transformed.forward(padding, image, after, out);
        let form = match options::Winograd::current() {
            options::Winograd::Never => None,
            options::Winograd::Two => Some(Tile::Two),
            options::Winograd::Four => Some(Tile::Four),
            options::Winograd::Measured if out.len() * 9 * image.channels < WORTH_TIMING => None,
            options::Winograd::Measured => {
                let (channels, threads) = ([image.channels, weights.n()], pool::threads());
                let shape = Shape { channels, batch: image.batch, size: image.size, padding, threads };
                let mut chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
                *chosen.entry(shape).or_insert_with(|| self.quickest(weights, out, &direct, by))
            }
        };
        let transformed =
            form.and_then(|tile| self.kept(tile).get_or_init(|| Transformed::new(tile, weights)).as_ref());
        match transformed {
            Some(transformed) => by(transformed, out),
            None => direct(out),
        }
    }

    /// Times the direct product and both forms in turn; a form that is chosen is kept.
    fn quickest(
        &self,
        weights: &PackedMatrix,
        out: &mut [MaybeUninit<f32>],
        direct: impl Fn(&mut [MaybeUninit<f32>]),
        by: impl Fn(&Transformed, &mut [MaybeUninit<f32>]),
    ) -> Option<Tile> {
        let forms = [Tile::Two, Tile::Four].into_iter().filter_map(|tile| Transformed::new(tile, weights));
        let forms: Vec<Transformed> = forms.collect();
        let mut times = vec![Duration::MAX; 1 + forms.len()];
        for _ in 0..ROUNDS {
            for (i, time) in times.iter_mut().enumerate() {
                let start = Instant::now();
                match i.checked_sub(1) {
                    None => direct(out),
                    Some(form) => by(&forms[form], out),
                }
                *time = start.elapsed().min(*time);
            }
        }
        let mut best = (times[0], None);
        for (form, &time) in forms.into_iter().zip(&times[1..]) {
            if time.as_secs_f64() < WORTH * best.0.as_secs_f64() {
                best = (time, Some(form));
            }
        }
        let form = best.1?;
        let tile = form.tile;
        self.kept(tile).get_or_init(|| Some(form));
        Some(tile)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::PackedConv;
    use super::super::conv::tests::{conv_reference, geometry, numbers, output};
    use super::super::matmul::Weights;
    use super::*;
    use crate::activation::Activation;
    use crate::options::{Options, with};

    const FORMS: [(options::Winograd, Tile); 2] =
        [(options::Winograd::Two, Tile::Two), (options::Winograd::Four, Tile::Four)];

    fn forced(winograd: options::Winograd) -> Options {
        Options { winograd, ..Options::default() }
    }

    /// How much larger than a direct sum's the error of `tile` can be: for an output the sum over all places of what its
    /// product takes of inputs and weights, over the nine products of a direct sum.
    fn growth(tile: Tile) -> f64 {
        let points = tile.points();
        let side = tile.places() - 2;
        let magnitude = |row: &[f64]| row.iter().map(|x| x.abs()).sum::<f64>();
        // the coefficients of Π (x - q)
        let product = |roots: Vec<f64>| {
            roots.iter().fold(vec![1.0], |p, root| {
                let shifted = [&[0.0], &p[..]].concat();
                (0..=p.len()).map(|i| shifted[i] - root * p.get(i).unwrap_or(&0.0)).collect()
            })
        };
        let others = |p: Option<&f64>| magnitude(&product(points.iter().filter(|q| Some(*q) != p).copied().collect()));
        let inputs = points.iter().map(Some).chain([None]).map(others);
        let weights = tile.of_weights();
        let products: Vec<f64> = inputs.zip(&weights).map(|(b, g)| b * magnitude(g)).collect();
        let line = |r: usize| {
            let of_points: f64 = points.iter().zip(&products).map(|(p, x)| p.abs().powi(r as i32) * x).sum();
            of_points + if r + 1 == side { products[points.len()] } else { 0.0 }
        };
        (0..side).map(line).fold(0.0, f64::max).powi(2) / 9.0
    }

    #[test]
    fn errors_grow_as_the_head_of_the_file_says() {
        assert_eq!([Tile::Two, Tile::Four].map(|tile| growth(tile).round()), [7.0, 63.0]);
    }

    /// As for a direct sum of 9 times the channels, times the [`growth`].
    fn assert_close(found: &[f32], expected: &[f64], channels: usize, tile: Tile, what: &str) {
        let k = 9.0 * channels as f64;
        let tolerance = (k + 8.0) * 4.0 * k.sqrt() / f64::from(1 << 24) * growth(tile);
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            assert!(error <= tolerance, "{what}, element {i}: {found}, expected {expected}");
        }
    }

    fn check(padding: [[usize; 2]; 2], batch: usize, size: [usize; 2], channels: [usize; 2]) {
        let g = Geometry { padding, ..geometry(3, 1, 1, 0, 1) };
        let Some(out_size) = g.out_size(size) else { return };
        let x = numbers(batch * size[0] * size[1] * channels[0], 1);
        let w = numbers(channels[1] * 9 * channels[0], 2);
        let len = batch * out_size[0] * out_size[1] * channels[1];
        let (bias, residual) = (numbers(channels[1], 3), numbers(len, 4));
        let plain = After { bias: None, residual: None, activation: Activation::Identity };
        let afters = [
            plain,
            After { bias: Some(&bias), residual: Some(&residual), activation: Activation::Gelu },
            After { bias: Some(&bias), activation: Activation::Relu, ..plain },
        ];
        for after in &afters {
            let expected = conv_reference(&x, (batch, size), &w, channels, &g, after);
            for isa in Isa::available() {
                let conv = PackedConv::pack_for(isa, Weights::F32(&w), channels[0], channels[1], g).unwrap();
                for (form, tile) in FORMS {
                    let found = with(forced(form), || output(len, |out| conv.forward(&x, batch, size, after, out)));
                    let what = format!("{isa} {tile:?} {padding:?} {batch} x {size:?} {channels:?}");
                    assert_close(&found, &expected, channels[0], tile, &what);
                }
            }
        }
    }

    #[test]
    fn every_path_against_the_definition() {
        for padding in [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[2, 0], [0, 3]]] {
            for channels in [[1, 5], [3, 33], [33, 3], [16, 32], [20, 67]] {
                for size in [[1, 1], [2, 3], [5, 7], [9, 8], [14, 3]] {
                    check(padding, 2, size, channels);
                }
            }
        }
    }

    #[test]
    fn more_tiles_than_a_task_takes() {
        check([[1, 1]; 2], 1, [31, 29], [40, 33]);
        check([[1, 1]; 2], 3, [9, 10], [259, 20]);
    }

    #[test]
    fn errors_of_random_sums() {
        let (size, channels) = ([8, 8], [256, 32]);
        let g = geometry(3, 1, 1, 1, 1);
        let (x, w) = (numbers(64 * 256, 1), numbers(32 * 9 * 256, 2));
        let after = After { bias: None, residual: None, activation: Activation::Identity };
        let exact = conv_reference(&x, (1, size), &w, channels, &g, &after);
        let conv = PackedConv::pack(Weights::F32(&w), channels[0], channels[1], g).unwrap();
        let error = |form| {
            let found = with(forced(form), || output(64 * 32, |out| conv.forward(&x, 1, size, &after, out)));
            found.iter().zip(&exact).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum::<f64>().sqrt()
        };
        let direct = error(options::Winograd::Never);
        let [two, four] = [options::Winograd::Two, options::Winograd::Four].map(|form| error(form) / direct);
        assert!(two < 1.5 && four > two && four < 4.0, "{two} and {four} times the direct product's error");
    }

    #[test]
    fn an_item_in_a_batch_equals_it_alone() {
        let (size, channels) = ([9, 11], [20, 40]);
        let (x, w) = (numbers(3 * 99 * 20, 1), numbers(40 * 180, 2));
        let after = After { bias: None, residual: None, activation: Activation::Silu };
        let conv = PackedConv::pack(Weights::F32(&w), channels[0], channels[1], geometry(3, 1, 1, 1, 1)).unwrap();
        for (form, tile) in FORMS {
            with(forced(form), || {
                let all = output(3 * 99 * 40, |out| conv.forward(&x, 3, size, &after, out));
                for (x, all) in x.chunks(99 * 20).zip(all.chunks(99 * 40)) {
                    assert_eq!(output(99 * 40, |out| conv.forward(x, 1, size, &after, out)), all, "{tile:?}");
                }
            });
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_tiles() {
        let (size, w) = ([16, 16], numbers(4 * 9 * 2, 2));
        let after = After { bias: None, residual: None, activation: Activation::Identity };
        let conv = PackedConv::pack(Weights::F32(&w), 2, 4, geometry(3, 1, 1, 1, 1)).unwrap();
        let mut x = numbers(256 * 2, 1);
        x[2 * (5 * 16 + 5)] = f32::NAN;
        for (form, _) in FORMS {
            let y = with(forced(form), || output(256 * 4, |out| conv.forward(&x, 1, size, &after, out)));
            for (i, pixel) in y.chunks(4).enumerate() {
                let (dy, dx) = ((i / 16).abs_diff(5), (i % 16).abs_diff(5));
                let nan = pixel.iter().all(|y| y.is_nan());
                assert!(if dy <= 1 && dx <= 1 { nan } else { !nan || (dy <= 4 && dx <= 4) }, "pixel {i}");
            }
        }
    }

    #[test]
    fn the_quickest_is_chosen_once_and_kept() {
        let (size, channels) = ([24, 24], [96, 32]);
        let (x, w) = (numbers(576 * 96, 1), numbers(32 * 9 * 96, 2));
        let after = After { bias: None, residual: None, activation: Activation::Identity };
        let conv = PackedConv::pack(Weights::F32(&w), channels[0], channels[1], geometry(3, 1, 1, 1, 1)).unwrap();
        let run = || output(576 * 32, |out| conv.forward(&x, 1, size, &after, out));
        let first = with(forced(options::Winograd::Measured), run);
        assert!(path().is_some_and(|path| path.contains("as timed")));
        assert_eq!(with(forced(options::Winograd::Measured), run), first);
        let forms = [options::Winograd::Never, options::Winograd::Two, options::Winograd::Four];
        assert!(forms.iter().any(|form| with(forced(*form), run) == first));
    }

    #[test]
    fn a_cut_keeps_to_its_most_and_feeds_the_threads() {
        for (tiles, panels, most, threads) in
            [(196, 2, 48, 2), (16, 8, 14, 2), (4, 16, 7, 2), (1, 1, 1, 64), (49, 4, 28, 16)]
        {
            let [tile_parts, panel_parts] = cut(tiles, panels, most, threads);
            assert!(tiles.div_ceil(tile_parts) <= most && tile_parts <= tiles && panel_parts <= panels);
            assert!(tile_parts * panel_parts >= threads.min(tiles * panels / 4), "{tile_parts} x {panel_parts}");
        }
    }
}
