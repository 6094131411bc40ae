//! Attention without a score matrix: keys come in blocks, the softmax is rescaled as its maximum grows
//! (arXiv:2112.05682, arXiv:2205.14135).
//!
//! The lanes of a vector are *queries*: a block of them is transposed once into the thread's buffer (scaled on the
//! way), then scores come as Sᵀ (keys × queries) from broadcasts of the keys, the softmax runs down the keys without a
//! horizontal operation, and Sᵀ is what the product with the values wants to broadcast from. So keys and values are
//! never transposed; a chunk of them is copied together, once for all the blocks of a task, because rows a power of two
//! apart fall on a few sets of the cache. A few queries (a step of decoding) take lanes along the head instead: each
//! key and value is read once, where it lies, at full width.
//!
//! Keys that do not exist are not visited, nor are chunks outside the pattern. FLOPs: 4 · queries · keys · head_dim per
//! head over the visible keys; bytes: queries, keys, values and the result once, while a chunk fits the cache.
//!
//! Tried on an AMD Zen 5 virtual machine, AVX-512, one thread, 12 heads of 64: at 512 × 512 chunks of 48, 64, 96 and
//! 128 keys took 3.76, 3.53, 3.48 and 3.55 ms, and keys and values read where they lie, 48 at a time, 4.44 ms. Without
//! the prefetch of the next chunk 8 × 128 × 128 took 2.66 ms instead of 2.04–2.3 ms, and a step over 4096 keys of 8
//! heads shared by 32 took 1.74 ms instead of 0.67–0.9 ms.

#![expect(unsafe_code, reason = "intrinsics behind one checked entry")]

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::KernelError;
use super::isa::Isa;
use super::math;
use super::simd::{MAX_LANES, Simd, simd_entry};
use crate::attention::Pattern;
use crate::memory::Buffer;
use crate::op::Shared;
use crate::pool;

/// Rows (batch, rows, width), the width contiguous; strides in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) batch: usize,
    pub(crate) row: usize,
}

impl<'a> Strided<'a> {
    #[cfg(test)]
    fn head(&self, item: usize, row: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.data[item * self.batch + row * self.row + head * head_dim..][..head_dim]
    }

    pub(super) fn check(&self, what: &'static str, batch: usize, rows: usize, width: usize) -> Result<(), KernelError> {
        if batch * rows * width == 0 {
            return Ok(());
        }
        let last = |n: usize, stride: usize| (n - 1).checked_mul(stride);
        let least =
            last(batch, self.batch).zip(last(rows, self.row)).and_then(|(b, r)| b.checked_add(r)?.checked_add(width));
        KernelError::check_least(what, least, self.data.len())
    }
}

/// What is added to the scaled scores; strides (batch, head, query, key) in elements. It is read in vectors where the
/// stride of the queries is 1, and turned on the way where that of the keys is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bias<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) strides: [usize; 4],
    /// Which of the biases each item of the batch takes; its own where absent.
    pub(crate) which: Option<&'a [u32]>,
}

impl Bias<'_> {
    /// Where that of the first key lies.
    fn start(&self, item: usize, head: usize, query: usize) -> usize {
        let item = self.which.map_or(item, |which| which[item] as usize);
        item * self.strides[0] + head * self.strides[1] + query * self.strides[2]
    }
}

/// One call. `queries` are the last of `keys` positions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) pattern: Pattern,
    pub(crate) q: Strided<'a>,
    pub(crate) k: Strided<'a>,
    pub(crate) v: Strided<'a>,
    /// Per item of the batch the keys that exist, ascending; all where absent.
    pub(crate) valid: Option<&'a [Vec<u32>]>,
    pub(crate) bias: Option<Bias<'a>>,
}

impl Attention<'_> {
    fn check(&self) -> Result<(), KernelError> {
        let &Self { batch, heads, kv_heads, queries, keys, head_dim, .. } = self;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads cannot share {kv_heads}");
        self.q.check("queries", batch, queries, heads * head_dim)?;
        self.k.check("keys", batch, keys, kv_heads * head_dim)?;
        self.v.check("values", batch, keys, kv_heads * head_dim)?;
        if let Some(valid) = self.valid {
            KernelError::check("list of valid keys", Some(batch), valid.len())?;
            assert!(
                valid.iter().all(|valid| valid.last().is_none_or(|last| (*last as usize) < keys) && valid.is_sorted())
            );
        }
        if let Some(bias) = self.bias.filter(|_| batch * queries * keys > 0) {
            if let Some(which) = bias.which {
                KernelError::check("list of biases", Some(batch), which.len())?;
            }
            let last = (0..batch).map(|item| bias.start(item, heads - 1, queries - 1)).max().unwrap_or(0);
            KernelError::check_least("bias", Some(last + (keys - 1) * bias.strides[3] + 1), bias.data.len())?;
        }
        Ok(())
    }

    /// The position of a query among the keys.
    fn position(&self, query: usize) -> i64 {
        query as i64 + self.keys as i64 - self.queries as i64
    }
}

/// Rows that share a head of keys and values and are worked on together: neighbouring queries of a head, or, when there
/// is one query, the heads of a group. The `_stride`s are from row to row, in elements.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) rows: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f32,
    pub(super) q: *const f32,
    pub(super) q_stride: usize,
    /// Of key 0.
    pub(super) k: *const f32,
    pub(super) k_stride: usize,
    pub(super) v: *const f32,
    pub(super) v_stride: usize,
    /// Of key 0, and the distance from key to key.
    pub(super) bias: Option<(*const f32, usize)>,
    pub(super) bias_stride: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Where rows and keys are positions of a window; all blocks that are run together have the same.
    pub(super) window: Option<Window>,
    /// Where the highest score and the total of the weights of each row go, if the result is to be joined with those
    /// over other keys: it is then left undivided.
    pub(super) parts: Option<*mut f32>,
    pub(super) pattern: Pattern,
    /// Of the first row among the keys.
    pub(super) position: i64,
    /// From row to row: 1 or 0.
    pub(super) step: i64,
}

/// Positions of a window, line by line, which may lie anywhere in an array of rows or outside of it.
#[derive(Clone, Copy)]
pub(super) struct Window {
    /// Of each position the row of queries, keys, values and results, or [`OUTSIDE`].
    pub(super) rows: *const u32,
    /// The positions of the block's rows, none of them outside.
    pub(super) queries: *const u32,
    /// The key and the value of every position outside.
    pub(super) outside: [*const f32; 2],
    /// Lines and columns.
    pub(super) size: [usize; 2],
    /// A vector for each distance in lines and in columns, whose product with the unscaled query is added to the score:
    /// (2 · size - 1, head_dim), the largest negative distance first, and room for [`TABLE_ROOM`] rows more.
    pub(super) tables: Option<[*const f32; 2]>,
}

/// No row.
pub(super) const OUTSIDE: u32 = u32::MAX;
/// Rows that are read, but not used, behind a table.
pub(super) const TABLE_ROOM: usize = TILE - 1;

impl Window {
    /// Lines and columns that have a product with each query.
    fn places(&self) -> usize {
        if self.tables.is_some() { self.size[0] + self.size[1] } else { 0 }
    }
}

/// Rows of keys or of values.
#[derive(Clone, Copy)]
struct Source {
    first: *const f32,
    stride: usize,
    /// The rows of positions, and what those outside have.
    window: Option<(*const u32, *const f32)>,
}

impl Source {
    /// # Safety
    /// `key` is a position of the window, if there is one.
    #[inline(always)]
    unsafe fn row(&self, key: u32) -> *const f32 {
        let row = match self.window {
            None => key,
            // SAFETY: as for this function.
            Some((rows, outside)) => match unsafe { *rows.add(key as usize) } {
                OUTSIDE => return outside,
                row => row,
            },
        };
        self.first.wrapping_add(row as usize * self.stride)
    }
}

impl Block {
    fn row_range(&self, row: usize) -> (i64, i64) {
        self.pattern.range(self.position + row as i64 * self.step)
    }

    fn keys(&self) -> Source {
        let window = self.window.map(|window| (window.rows, window.outside[0]));
        Source { first: self.k, stride: self.k_stride, window }
    }

    fn values(&self) -> Source {
        let window = self.window.map(|window| (window.rows, window.outside[1]));
        Source { first: self.v, stride: self.v_stride, window }
    }

    /// Whether lanes lie along the head.
    fn is_few(&self) -> bool {
        self.rows <= FEW && self.window.is_none()
    }

    /// Which row of the queries and of the results `row` is.
    ///
    /// # Safety
    /// It is one of the block's.
    #[inline(always)]
    unsafe fn place(&self, row: usize) -> usize {
        match self.window {
            None => row,
            // SAFETY: as for this function.
            Some(window) => unsafe { *window.rows.add(*window.queries.add(row) as usize) as usize },
        }
    }

    /// The part of `index` that at least one row sees.
    fn visible(&self, index: &[u32]) -> Range<usize> {
        let (from, to) = (self.row_range(0).0, self.row_range(self.rows - 1).1);
        let start = index.partition_point(|&key| i64::from(key) < from);
        start..index.partition_point(|&key| i64::from(key) < to).max(start)
    }
}

/// Keys worked on between two rescalings; a multiple of 8.
const KEYS: usize = 96;
/// The same where lanes lie along the head.
const FEW_KEYS: usize = 256;
/// Of those, how many are read before the next head's.
const FEW_STEP: usize = 8;
/// Up to so many rows lanes lie along the head.
const FEW: usize = 8;
/// Blocks of a task share one copy of their keys and values; more of them would not fit a cache.
pub(super) const MOST_BLOCKS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Buffer<f32>> = RefCell::new(Buffer::zeroed(0));
}

/// A part of the thread's buffer, on a cache line.
fn carve(rest: &mut *mut f32, len: usize) -> *mut f32 {
    let part = *rest;
    *rest = part.wrapping_add(len.next_multiple_of(MAX_LANES));
    part
}

/// Elements of scratch for `blocks` blocks of `rows` rows with products for `places`, whichever kernel takes them.
fn scratch_len(blocks: usize, rows: usize, head_dim: usize, places: usize) -> usize {
    let d = head_dim.next_multiple_of(MAX_LANES);
    let by_rows = blocks * rows.next_multiple_of(MAX_LANES) * (2 * d + 2 + places)
        + (rows + 2 * d) * (KEYS + 8)
        + 3 * rows.next_multiple_of(MAX_LANES);
    let by_head = blocks * FEW * (2 * d + FEW_KEYS);
    by_rows + by_head
}

/// Blocks over the keys of `index` that their patterns let them see; rows that see none are left undefined.
///
/// # Safety
/// The CPU has `S`; the pointers of each block are valid for its rows, at most `2 * LANES`, and for every row of
/// `index`, its output not shared; `scratch` is as long as [`scratch_len`] says. Blocks of more than [`FEW`] rows that
/// follow each other and have the same keys have the same values.
#[inline(always)]
unsafe fn blocks_kernel<S: Simd>(blocks: &[Block], index: &[u32], scratch: *mut f32) {
    let mut rest = blocks;
    while let Some(first) = rest.first() {
        // neighbours that can go together
        let is_few = first.is_few();
        let alike = |block: &&Block| {
            if is_few { block.is_few() && block.rows == first.rows } else { !block.is_few() && block.k == first.k }
        };
        let (now, later) = rest.split_at(rest.iter().take_while(alike).count());
        rest = later;
        // SAFETY: as for this function.
        unsafe {
            match if is_few { first.rows } else { 0 } {
                1 => by_head::<S, 1>(now, index, scratch),
                2 => by_head::<S, 2>(now, index, scratch),
                3 => by_head::<S, 3>(now, index, scratch),
                4 => by_head::<S, 4>(now, index, scratch),
                5 => by_head::<S, 5>(now, index, scratch),
                6 => by_head::<S, 6>(now, index, scratch),
                7 => by_head::<S, 7>(now, index, scratch),
                8 => by_head::<S, 8>(now, index, scratch),
                _ => by_rows::<S>(now, index, scratch),
            }
        }
    }
}

simd_entry! { fn blocks_on(blocks: &[Block], index: &[u32], scratch: *mut f32) = blocks_kernel }

/// What a block keeps from one chunk of keys to the next.
#[derive(Clone, Copy)]
struct State {
    /// (head_dim, width), scaled.
    queries: *mut f32,
    /// (width, padded head_dim), undivided.
    result: *mut f32,
    highest: *mut f32,
    total: *mut f32,
    /// (lines + columns, width), of a window with tables.
    places: *mut f32,
}

/// Room that all blocks use in turn.
#[derive(Clone, Copy)]
struct Chunk {
    /// (keys, head_dim).
    keys: *mut f32,
    /// (keys, padded head_dim).
    values: *mut f32,
    /// (keys, width).
    scores: *mut f32,
    rescale: *mut f32,
    /// Bounds of what a row sees.
    from: *mut f32,
    to: *mut f32,
}

/// Lanes are rows.
///
/// # Safety
/// As for [`blocks_kernel`]; the blocks have the same keys and values.
#[inline(always)]
unsafe fn by_rows<S: Simd>(blocks: &[Block], index: &[u32], mut scratch: *mut f32) {
    let (width, d) = (2 * S::LANES, blocks[0].head_dim);
    let padded = d.next_multiple_of(S::LANES);
    let room = KEYS + 8;
    let chunk = Chunk {
        keys: carve(&mut scratch, room * d),
        values: carve(&mut scratch, room * padded),
        scores: carve(&mut scratch, room * width),
        rescale: carve(&mut scratch, width),
        from: carve(&mut scratch, width),
        to: carve(&mut scratch, width),
    };
    let states = scratch;
    let padded_width = width.next_multiple_of(MAX_LANES);
    let places = blocks[0].window.map_or(0, |window| window.places());
    let state_len = (width * d).next_multiple_of(MAX_LANES)
        + (width * padded).next_multiple_of(MAX_LANES)
        + 2 * padded_width
        + (width * places).next_multiple_of(MAX_LANES);
    let state = |i: usize| {
        let mut scratch = states.wrapping_add(i * state_len);
        State {
            queries: carve(&mut scratch, width * d),
            result: carve(&mut scratch, width * padded),
            highest: carve(&mut scratch, width),
            total: carve(&mut scratch, width),
            places: carve(&mut scratch, width * places),
        }
    };
    let start = blocks.iter().map(|block| block.visible(index).start).min().unwrap_or(0);
    let end = blocks.iter().map(|block| block.visible(index).end).max().unwrap_or(0);
    let visible = &index[start.min(end)..end];
    // equal chunks, so that none is left with a few keys
    let size = visible.len().div_ceil(visible.len().div_ceil(KEYS).max(1)).next_multiple_of(8).max(8);
    // SAFETY: as for this function; each part of the scratch has the length just carved.
    unsafe {
        let mut rest = visible;
        let (k, v) = (blocks[0].keys(), blocks[0].values());
        prefetch_rows::<S>(k, &rest[..size.min(rest.len())], d);
        prefetch_rows::<S>(v, &rest[..size.min(rest.len())], d);
        for (i, block) in blocks.iter().enumerate() {
            if block.rows <= S::LANES {
                begin::<S, 1>(block, chunk, state(i));
            } else {
                begin::<S, 2>(block, chunk, state(i));
            }
        }
        while !rest.is_empty() {
            let keys;
            (keys, rest) = rest.split_at(size.min(rest.len()));
            let next = &rest[..size.min(rest.len())];
            copy_rows::<S>(k, keys, d, d, chunk.keys);
            copy_rows::<S>(v, keys, d, padded, chunk.values);
            for (i, block) in blocks.iter().enumerate() {
                let share = next.len() * i / blocks.len()..next.len() * (i + 1) / blocks.len();
                prefetch_rows::<S>(k, &next[share.clone()], d);
                prefetch_rows::<S>(v, &next[share], d);
                let seen = block.visible(keys);
                if seen.is_empty() {
                    continue;
                }
                let part = Chunk {
                    keys: chunk.keys.add(seen.start * d),
                    values: chunk.values.add(seen.start * padded),
                    ..chunk
                };
                if block.rows <= S::LANES {
                    advance::<S, 1>(block, &keys[seen], part, state(i));
                } else {
                    advance::<S, 2>(block, &keys[seen], part, state(i));
                }
            }
        }
        for (i, block) in blocks.iter().enumerate() {
            let state = state(i);
            for row in 0..block.rows {
                let (highest, total) = (*state.highest.add(row), *state.total.add(row));
                finish_row::<S>(block, row, state.result.add(row * padded), highest, total);
            }
        }
    }
}

/// Has rows come into the cache while something else is computed.
///
/// # Safety
/// The CPU has `S`; the rows exist.
#[inline(always)]
unsafe fn prefetch_rows<S: Simd>(rows: Source, keys: &[u32], d: usize) {
    const LINE: usize = 16;
    for key in keys {
        // SAFETY: as for this function.
        let row = unsafe { rows.row(*key) };
        for i in (0..d).step_by(LINE) {
            // SAFETY: a hint, whatever the address.
            unsafe { S::prefetch(row.wrapping_add(i)) };
        }
    }
}

/// Rows `keys` of width `d` one after the other, each of `padded` elements, 0 past `d`.
///
/// # Safety
/// The CPU has `S`; the rows exist, and `to` has room for them and, where `padded` is not a multiple of `LANES`, for a
/// vector more.
#[inline(always)]
unsafe fn copy_rows<S: Simd>(rows: Source, keys: &[u32], d: usize, padded: usize, to: *mut f32) {
    // SAFETY: as for this function.
    unsafe {
        for (j, key) in keys.iter().enumerate() {
            let (from, to) = (rows.row(*key), to.add(j * padded));
            let mut i = 0;
            while i + S::LANES <= d {
                S::store(to.add(i), S::load(from.add(i)));
                i += S::LANES;
            }
            if i < d {
                // what this writes past `d` is padding, or the next row, which is yet to come
                S::store(to.add(i), S::load_partial(from.add(i), d - i));
            }
        }
    }
}

/// # Safety
/// As for [`by_rows`]; `block` has at most `NV` vectors of rows, here and below.
#[inline(always)]
unsafe fn begin<S: Simd, const NV: usize>(block: &Block, chunk: Chunk, state: State) {
    let (d, width) = (block.head_dim, NV * S::LANES);
    // SAFETY: rows below `rows`, columns below `d`; the room for keys, not in use yet, holds more rows than a block has.
    unsafe {
        let (q, q_stride) = if block.window.is_some() {
            for row in 0..block.rows {
                let from = block.q.add(block.place(row) * block.q_stride);
                std::ptr::copy_nonoverlapping(from, chunk.keys.add(row * d), d);
            }
            (chunk.keys.cast_const(), d)
        } else {
            (block.q, block.q_stride)
        };
        std::slice::from_raw_parts_mut(state.result, width * d.next_multiple_of(S::LANES)).fill(0.0);
        std::slice::from_raw_parts_mut(state.total, width).fill(0.0);
        // -∞ would make exp(-∞ - -∞) of a chunk that a row does not see
        std::slice::from_raw_parts_mut(state.highest, width).fill(f32::MIN);
        let scale = S::splat(block.scale);
        for first in (0..width).step_by(S::LANES) {
            let end = (first + S::LANES).min(block.rows);
            let mut i = 0;
            if end == first + S::LANES {
                while i + 4 <= d {
                    let columns = S::load_columns(q.add(first * q_stride + i), q_stride);
                    for (j, column) in columns.into_iter().enumerate() {
                        S::store(state.queries.add((i + j) * width + first), S::mul(column, scale));
                    }
                    i += 4;
                }
            }
            while i < d {
                for row in first..first + S::LANES {
                    let q = if row < end { *q.add(row * q_stride + i) * block.scale } else { 0.0 };
                    *state.queries.add(i * width + row) = q;
                }
                i += 1;
            }
        }
        if let Some(window) = &block.window
            && let Some(tables) = window.tables
        {
            begin_places::<S, NV>(block, window, tables, chunk, state);
        }
    }
}

/// What the keys of each line, then of each column, add to the scores of the block's rows.
///
/// # Safety
/// As for [`by_rows`]; `tables` are those of `window`, which is the block's.
#[inline(always)]
unsafe fn begin_places<S: Simd, const NV: usize>(
    block: &Block,
    window: &Window,
    tables: [*const f32; 2],
    chunk: Chunk,
    state: State,
) {
    let (d, width) = (block.head_dim, NV * S::LANES);
    let mut sums = state.places;
    for (axis, table) in tables.into_iter().enumerate() {
        let size = window.size[axis];
        // SAFETY: the block's rows are positions of the window. A row at `place` along the axis is `place - key` from a
        // key, which is distance `place - key + size - 1` of the table, below `2 · size - 1`.
        unsafe {
            let mut places = [0; 2 * MAX_LANES];
            for (row, place) in places.iter_mut().enumerate().take(block.rows) {
                let position = *window.queries.add(row) as usize;
                *place = if axis == 0 { position / window.size[1] } else { position % window.size[1] };
            }
            let places = &places[..block.rows];
            let first = places.iter().copied().min().unwrap_or(0);
            let end = places.iter().copied().max().unwrap_or(0) + size;
            for begin in (first..end).step_by(KEYS) {
                let count = KEYS.min(end - begin);
                let part = Chunk { keys: table.add(begin * d).cast_mut(), ..chunk };
                score_tiles::<S, TILE, NV>(count, d, part, state.queries);
                for distance in begin..begin + count {
                    for (row, place) in places.iter().enumerate() {
                        let key = (place + size - 1).wrapping_sub(distance);
                        if key < size {
                            let product = *chunk.scores.add((distance - begin) * width + row);
                            *sums.add(key * width + row) = product / block.scale;
                        }
                    }
                }
            }
            sums = sums.add(size * width);
        }
    }
}

/// Adds what the places of `keys`, positions that follow each other, add to the scores.
///
/// # Safety
/// As for [`by_rows`]; [`begin_places`] has been called.
#[inline(always)]
unsafe fn add_places<S: Simd, const NV: usize>(window: &Window, keys: &[u32], scores: *mut f32, state: State) {
    let [lines, columns] = window.size;
    let (mut line, mut column) = (keys[0] as usize / columns, keys[0] as usize % columns);
    // SAFETY: as for this function.
    unsafe {
        for j in 0..keys.len() {
            for n in 0..NV {
                let at = |row: usize| (row * NV + n) * S::LANES;
                let of_line = S::load(state.places.add(at(line)));
                let of_column = S::load(state.places.add(at(lines + column)));
                let score = scores.add(at(j));
                S::store(score, S::add(S::load(score), S::add(of_line, of_column)));
            }
            column += 1;
            if column == columns {
                (line, column) = (line + 1, 0);
            }
        }
    }
}

/// Keys whose scores are made together where there are few registers.
const TILE: usize = 6;

/// Takes in the keys and values of a chunk; `keys` are their positions.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn advance<S: Simd, const NV: usize>(block: &Block, keys: &[u32], chunk: Chunk, state: State) {
    let (d, width) = (block.head_dim, NV * S::LANES);
    let padded = d.next_multiple_of(S::LANES);
    // SAFETY: as for this function.
    unsafe {
        if S::REGISTERS >= 32 {
            score_tiles::<S, 8, NV>(keys.len(), d, chunk, state.queries);
        } else {
            score_tiles::<S, TILE, NV>(keys.len(), d, chunk, state.queries);
        }
        if let Some(window) = block.window.as_ref().filter(|window| window.tables.is_some()) {
            add_places::<S, NV>(window, keys, chunk.scores, state);
        }
        if let Some((bias, key_stride)) = block.bias {
            add_bias::<S, NV>(block, bias, key_stride, keys, chunk.scores);
        }
        let (all_from, all_to) = (block.row_range(block.rows - 1).0, block.row_range(0).1);
        if i64::from(keys[0]) < all_from || i64::from(keys[keys.len() - 1]) >= all_to {
            hide::<S, NV>(block, keys, chunk);
        }
        soften::<S, NV>(keys.len(), chunk, state);
        for row in (0..block.rows).step_by(4) {
            let (weights, rescale) = (chunk.scores.add(row), chunk.rescale.add(row));
            let result = state.result.add(row * padded);
            let vectors = padded / S::LANES;
            let mut vector = 0;
            for left in (1..=vectors.div_ceil(if S::REGISTERS >= 32 { 4 } else { 3 })).rev() {
                let column = vector * S::LANES;
                let (values, result) = (chunk.values.add(column), result.add(column));
                let tile = (vectors - vector).div_ceil(left);
                match tile {
                    1 => value_tile::<S, 1>(keys.len(), values, padded, weights, width, rescale, result),
                    2 => value_tile::<S, 2>(keys.len(), values, padded, weights, width, rescale, result),
                    3 => value_tile::<S, 3>(keys.len(), values, padded, weights, width, rescale, result),
                    _ => value_tile::<S, 4>(keys.len(), values, padded, weights, width, rescale, result),
                }
                vector += tile;
            }
        }
    }
}

/// scores (keys, width) = keys (keys, head_dim) · queries (head_dim, width).
///
/// # Safety
/// As for [`by_rows`]; keys and scores have room for `MR - 1` rows more.
#[inline(always)]
unsafe fn score_tiles<S: Simd, const MR: usize, const NV: usize>(
    keys: usize,
    d: usize,
    chunk: Chunk,
    queries: *const f32,
) {
    let width = NV * S::LANES;
    for first in (0..keys).step_by(MR) {
        // SAFETY: rows past the end hold whatever was left there, and their scores are not used.
        unsafe {
            let rows = chunk.keys.add(first * d);
            let mut sums = [[S::splat(0.0); NV]; MR];
            for i in 0..d {
                let mut q = [S::splat(0.0); NV];
                for (n, q) in q.iter_mut().enumerate() {
                    *q = S::load(queries.add(i * width + n * S::LANES));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let k = S::splat(*rows.add(row * d + i));
                    for (sum, q) in sums.iter_mut().zip(q) {
                        *sum = S::fma(k, q, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    S::store(chunk.scores.add((first + i) * width + n * S::LANES), *sum);
                }
            }
        }
    }
}

/// # Safety
/// As for [`by_rows`]; `bias` is valid for the block's rows and every key.
#[inline(always)]
unsafe fn add_bias<S: Simd, const NV: usize>(
    block: &Block,
    bias: *const f32,
    key_stride: usize,
    keys: &[u32],
    scores: *mut f32,
) {
    let width = NV * S::LANES;
    let neighbours = key_stride == 1 && (keys[keys.len() - 1] - keys[0]) as usize + 1 == keys.len();
    // SAFETY: as for this function.
    unsafe {
        for n in 0..NV {
            let (first, end) = (n * S::LANES, ((n + 1) * S::LANES).min(block.rows));
            let bias = bias.add(first * block.bias_stride);
            let scores = scores.add(first);
            if block.bias_stride == 1 {
                for (j, key) in keys.iter().enumerate() {
                    let (bias, score) = (bias.add(*key as usize * key_stride), scores.add(j * width));
                    let bias = if end - first == S::LANES { S::load(bias) } else { S::load_partial(bias, end - first) };
                    S::store(score, S::add(S::load(score), bias));
                }
                continue;
            }
            let mut j = 0;
            if neighbours && end - first == S::LANES {
                while j + 4 <= keys.len() {
                    let columns = S::load_columns(bias.add(keys[j] as usize), block.bias_stride);
                    for (c, column) in columns.into_iter().enumerate() {
                        let score = scores.add((j + c) * width);
                        S::store(score, S::add(S::load(score), column));
                    }
                    j += 4;
                }
            }
            for (j, key) in keys.iter().enumerate().skip(j) {
                for row in 0..end - first {
                    *scores.add(j * width + row) += *bias.add(row * block.bias_stride + *key as usize * key_stride);
                }
            }
        }
    }
}

/// -∞ for the keys that a row does not see.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn hide<S: Simd, const NV: usize>(block: &Block, keys: &[u32], chunk: Chunk) {
    // SAFETY: as for this function.
    unsafe {
        for lane in 0..NV * S::LANES {
            let (from, to) = block.row_range(lane.min(block.rows - 1));
            // exact: positions are below 2^24, and what is cut off lies outside the keys
            *chunk.from.add(lane) = from.max(-(1 << 24)) as f32;
            *chunk.to.add(lane) = to.min(1 << 24) as f32;
        }
        let never = S::splat(f32::NEG_INFINITY);
        for n in 0..NV {
            let (from, to) = (S::load(chunk.from.add(n * S::LANES)), S::load(chunk.to.add(n * S::LANES)));
            for (j, key) in keys.iter().enumerate() {
                let (score, key) = (chunk.scores.add((j * NV + n) * S::LANES), S::splat(*key as f32));
                let seen = S::select_lt(key, to, S::load(score), never);
                S::store(score, S::select_lt(key, from, never, seen));
            }
        }
    }
}

/// Scores become weights exp(score - highest so far); `total` is kept up, and `rescale` is what earlier results are to
/// be multiplied with.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn soften<S: Simd, const NV: usize>(keys: usize, chunk: Chunk, state: State) {
    // SAFETY: as for this function.
    unsafe {
        for n in 0..NV {
            let at = |j: usize| chunk.scores.wrapping_add((j * NV + n) * S::LANES);
            let [highest, total, rescale] =
                [state.highest, state.total, chunk.rescale].map(|p| p.wrapping_add(n * S::LANES));
            let before = S::load(highest);
            let (mut top, mut other) = (before, before);
            for j in (0..keys).step_by(2) {
                top = S::max(S::load(at(j)), top);
                other = S::max(S::load(at((j + 1).min(keys - 1))), other);
            }
            let top = S::max(top, other);
            let factor = math::exp::<S>(S::sub(before, top));
            let mut sum = S::mul(S::load(total), factor);
            for j in 0..keys {
                let weight = math::exp::<S>(S::sub(S::load(at(j)), top));
                S::store(at(j), weight);
                sum = S::add(sum, weight);
            }
            S::store(highest, top);
            S::store(total, sum);
            S::store(rescale, factor);
        }
    }
}

/// result (4, ND vectors) = result · rescale + weightsᵀ (4, keys) · values (keys, ND vectors).
///
/// # Safety
/// As for [`by_rows`]; `values` and `result` start at the first column, `weights`, (keys, width), `rescale` and
/// `result` at the first of four rows.
#[inline(always)]
unsafe fn value_tile<S: Simd, const ND: usize>(
    keys: usize,
    values: *const f32,
    padded: usize,
    weights: *const f32,
    width: usize,
    rescale: *const f32,
    result: *mut f32,
) {
    // SAFETY: as for this function.
    unsafe {
        let mut sums = [[S::splat(0.0); ND]; 4];
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = S::splat(*rescale.add(row));
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(result.add(row * padded + n * S::LANES)), factor);
            }
        }
        for j in 0..keys {
            let mut v = [S::splat(0.0); ND];
            for (n, v) in v.iter_mut().enumerate() {
                *v = S::load(values.add(j * padded + n * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(j * width + row));
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = S::fma(weight, v, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                S::store(result.add(row * padded + n * S::LANES), *sum);
            }
        }
    }
}

/// A row's result into the output, divided by its total unless parts are to be joined.
///
/// # Safety
/// The CPU has `S`; `row` is one of the block's, and `result` has the padded width of a head.
#[inline(always)]
unsafe fn finish_row<S: Simd>(block: &Block, row: usize, result: *const f32, highest: f32, total: f32) {
    // SAFETY: as for this function.
    unsafe {
        if let Some(parts) = block.parts {
            *parts.add(2 * row) = highest;
            *parts.add(2 * row + 1) = total;
        }
        let scale = S::splat(if block.parts.is_some() { 1.0 } else { 1.0 / total });
        let out = block.out.add(block.place(row) * block.out_stride);
        let mut i = 0;
        while i < block.head_dim {
            let lanes = (block.head_dim - i).min(S::LANES);
            S::store_partial(out.add(i), lanes, S::mul(S::load(result.add(i)), scale));
            i += lanes;
        }
    }
}

/// Lanes lie along the head: `R` rows per block, each key and value read once for all of them, and memory in the order
/// of the keys whatever the number of blocks, which are the heads of one cache.
///
/// # Safety
/// As for [`blocks_kernel`]; each block has `R` rows.
#[inline(always)]
unsafe fn by_head<S: Simd, const R: usize>(blocks: &[Block], index: &[u32], scratch: *mut f32) {
    let d = blocks[0].head_dim;
    let padded = d.next_multiple_of(S::LANES);
    let room = R * padded.next_multiple_of(MAX_LANES);
    // of each block: queries, result, scores
    let part = |i: usize| scratch.wrapping_add(i * (2 * room + R * FEW_KEYS));
    let mut sums = [[(f32::MIN, 0.0, 0.0); R]; MOST_BLOCKS];
    // SAFETY: as for this function; each part of the scratch has that length.
    unsafe {
        for (i, block) in blocks.iter().enumerate() {
            std::slice::from_raw_parts_mut(part(i), 2 * room).fill(0.0);
            for (row, column) in (0..R).flat_map(|row| (0..d).map(move |column| (row, column))) {
                *part(i).add(row * padded + column) = *block.q.add(row * block.q_stride + column) * block.scale;
            }
        }
        let start = blocks.iter().map(|block| block.visible(index).start).min().unwrap_or(0);
        let end = blocks.iter().map(|block| block.visible(index).end).max().unwrap_or(0);
        for keys in index[start.min(end)..end].chunks(FEW_KEYS) {
            for (step, some) in keys.chunks(FEW_STEP).enumerate() {
                let next = keys.chunks(FEW_STEP).nth(step + 1).unwrap_or_default();
                for (i, block) in blocks.iter().enumerate() {
                    prefetch_rows::<S>(block.keys(), next, d);
                    few_scores::<S, R>(block, some, part(i), part(i).add(2 * room + step * FEW_STEP));
                }
            }
            for (i, block) in blocks.iter().enumerate() {
                for (row, sums) in sums[i].iter_mut().enumerate() {
                    let scores = std::slice::from_raw_parts_mut(part(i).add(2 * room + row * FEW_KEYS), keys.len());
                    let (from, to) = block.row_range(row);
                    if let Some((bias, key_stride)) = block.bias {
                        for (score, &key) in scores.iter_mut().zip(keys) {
                            *score += *bias.add(row * block.bias_stride + key as usize * key_stride);
                        }
                    }
                    if i64::from(keys[0]) < from || i64::from(keys[keys.len() - 1]) >= to {
                        for (score, &key) in scores.iter_mut().zip(keys) {
                            if i64::from(key) < from || i64::from(key) >= to {
                                *score = f32::NEG_INFINITY;
                            }
                        }
                    }
                    *sums = soften_row::<S>(scores, sums.0, sums.1);
                    let result = part(i).add(room + row * padded);
                    for column in (0..padded).step_by(S::LANES) {
                        S::store(result.add(column), S::mul(S::load(result.add(column)), S::splat(sums.2)));
                    }
                }
            }
            for (step, some) in keys.chunks(FEW_STEP).enumerate() {
                let next = keys.chunks(FEW_STEP).nth(step + 1).unwrap_or_default();
                for (i, block) in blocks.iter().enumerate() {
                    prefetch_rows::<S>(block.values(), next, d);
                    let (weights, result) = (part(i).add(2 * room + step * FEW_STEP), part(i).add(room));
                    let most = (if S::REGISTERS >= 32 { 16 } else { 8 } / R).min(4);
                    let mut column = 0;
                    while column < d {
                        column += match ((d - column) / S::LANES).min(most) {
                            0 | 1 => few_values::<S, R, 1>(block, some, column, weights, result),
                            2 | 3 => few_values::<S, R, 2>(block, some, column, weights, result),
                            _ => few_values::<S, R, 4>(block, some, column, weights, result),
                        };
                    }
                }
            }
        }
        for (i, block) in blocks.iter().enumerate() {
            for (row, &(highest, total, _)) in sums[i].iter().enumerate() {
                finish_row::<S>(block, row, part(i).add(room + row * padded), highest, total);
            }
        }
    }
}

/// scores (R, keys), rows [`FEW_KEYS`] apart.
///
/// # Safety
/// As for [`by_head`].
#[inline(always)]
unsafe fn few_scores<S: Simd, const R: usize>(block: &Block, keys: &[u32], queries: *const f32, scores: *mut f32) {
    let d = block.head_dim;
    let padded = d.next_multiple_of(S::LANES);
    for (j, key) in keys.iter().enumerate() {
        // SAFETY: as for this function.
        unsafe {
            let k = block.k.add(*key as usize * block.k_stride);
            let mut sums = [S::splat(0.0); R];
            let mut i = 0;
            while i < d {
                let k = if i + S::LANES <= d { S::load(k.add(i)) } else { S::load_partial(k.add(i), d - i) };
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(k, S::load(queries.add(row * padded + i)), *sum);
                }
                i += S::LANES;
            }
            for (row, sum) in sums.into_iter().enumerate() {
                *scores.add(row * FEW_KEYS + j) = S::reduce_add(sum);
            }
        }
    }
}

/// Scores of one row become weights; gives the new highest score, the new total and the factor for
/// earlier results.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn soften_row<S: Simd>(scores: &mut [f32], highest: f32, total: f32) -> (f32, f32, f32) {
    let (p, n) = (scores.as_mut_ptr(), scores.len());
    // SAFETY: positions below n.
    unsafe {
        let mut tops = S::splat(highest);
        let mut i = 0;
        while i + S::LANES <= n {
            tops = S::max(S::load(p.add(i)), tops);
            i += S::LANES;
        }
        let mut top = S::reduce_max(tops);
        while i < n {
            top = top.max(*p.add(i));
            i += 1;
        }
        let mut sums = S::splat(0.0);
        let mut i = 0;
        while i < n {
            let lanes = (n - i).min(S::LANES);
            let weights = math::exp::<S>(S::sub(S::load_partial(p.add(i), lanes), S::splat(top)));
            S::store_partial(p.add(i), lanes, weights);
            // lanes that are not in use are 0
            sums = S::add(sums, S::load_partial(p.add(i), lanes));
            i += lanes;
        }
        let factor = S::reduce_max(math::exp::<S>(S::splat(highest - top)));
        (top, total * factor + S::reduce_add(sums), factor)
    }
}

/// result (R, head_dim) += weights (R, keys) · values for `ND` vectors from `column` on; gives how many columns that
/// was.
///
/// # Safety
/// As for [`by_head`]; rows of `weights` are [`FEW_KEYS`] apart.
#[inline(always)]
unsafe fn few_values<S: Simd, const R: usize, const ND: usize>(
    block: &Block,
    keys: &[u32],
    column: usize,
    weights: *const f32,
    result: *mut f32,
) -> usize {
    let padded = block.head_dim.next_multiple_of(S::LANES);
    let is_whole = column + ND * S::LANES <= block.head_dim;
    // SAFETY: as for this function.
    unsafe {
        let result = result.add(column);
        let mut sums = [[S::splat(0.0); ND]; R];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(result.add(row * padded + n * S::LANES));
            }
        }
        for (j, key) in keys.iter().enumerate() {
            let v = block.v.add(*key as usize * block.v_stride + column);
            let mut values = [S::splat(0.0); ND];
            if is_whole {
                for (n, value) in values.iter_mut().enumerate() {
                    *value = S::load(v.add(n * S::LANES));
                }
            } else {
                values[0] = S::load_partial(v, block.head_dim - column);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(row * FEW_KEYS + j));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = S::fma(weight, value, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                S::store(result.add(row * padded + n * S::LANES), *sum);
            }
        }
    }
    ND * S::LANES
}

/// softmax(q kᵀ · scale + bias) v as (batch, queries, heads · head_dim), on the pool.
///
/// # Errors
/// When a slice is too short for its shape.
///
/// # Panics
/// When `kv_heads` does not divide `heads`, or the valid keys are not ascending positions.
pub(crate) fn attention(call: &Attention) -> Result<Vec<f32>, KernelError> {
    attention_on(Isa::current(), call)
}

fn attention_on(isa: Isa, call: &Attention) -> Result<Vec<f32>, KernelError> {
    call.check()?;
    let len = call.batch * call.queries * call.heads * call.head_dim;
    if call.keys == 0 {
        return Ok(vec![0.0; len]);
    }
    let mut out = Vec::with_capacity(len);
    let every: Vec<u32> = if call.valid.is_none() { (0..call.keys as u32).collect() } else { Vec::new() };
    let index = |item: usize| call.valid.map_or(&*every, |valid| &valid[item]);
    if call.queries == 1 {
        one_query(isa, call, index, Shared(out.as_mut_ptr()));
    } else {
        many_queries(isa, call, index, Shared(out.as_mut_ptr()));
    }
    // SAFETY: every row of every head is in a block.
    unsafe { out.set_len(len) };
    Ok(out)
}

/// Rows of a block: two vectors.
pub(super) fn most_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 32,
        Isa::Avx2 => 16,
        Isa::Scalar | Isa::Neon => 8,
    }
}

/// # Safety
/// As for [`blocks_kernel`], which this calls with the thread's scratch.
pub(super) unsafe fn run_blocks(isa: Isa, blocks: &[Block], index: &[u32]) {
    let Some(first) = blocks.first() else { return };
    SCRATCH.with_borrow_mut(|scratch| {
        let places = first.window.map_or(0, |window| window.places());
        let len = scratch_len(blocks.len(), most_rows(isa), first.head_dim, places);
        if scratch.len() < len {
            *scratch = Buffer::zeroed(len);
        }
        // SAFETY: as for this function.
        unsafe { blocks_on(isa, blocks, index, scratch.as_mut_ptr()) };
    });
}

impl Attention<'_> {
    /// `rows` rows from `query` on of `head`, or from `head` on of the only query.
    fn block(&self, item: usize, head: usize, query: usize, rows: usize, out: Shared) -> Block {
        let &Self { heads, kv_heads, queries, head_dim, .. } = self;
        let kv_head = head / (heads / kv_heads) * head_dim;
        let stride = |row: usize| if queries == 1 { head_dim } else { row };
        let at = |rows: &Strided, offset: usize| rows.data.as_ptr().wrapping_add(item * rows.batch + offset);
        Block {
            rows,
            head_dim,
            scale: self.scale,
            q: at(&self.q, query * self.q.row + head * head_dim),
            q_stride: stride(self.q.row),
            k: at(&self.k, kv_head),
            k_stride: self.k.row,
            v: at(&self.v, kv_head),
            v_stride: self.v.row,
            bias: self
                .bias
                .map(|bias| (bias.data.as_ptr().wrapping_add(bias.start(item, head, query)), bias.strides[3])),
            bias_stride: self.bias.map_or(0, |bias| bias.strides[if queries == 1 { 1 } else { 2 }]),
            out: out.get().wrapping_add(((item * queries + query) * heads + head) * head_dim),
            out_stride: stride(heads * head_dim),
            window: None,
            parts: None,
            pattern: self.pattern,
            position: self.position(query),
            step: i64::from(queries > 1),
        }
    }
}

/// Tasks are runs of blocks that share a head of keys.
fn many_queries<'a>(isa: Isa, call: &Attention, index: impl Fn(usize) -> &'a [u32] + Sync, out: Shared) {
    let &Attention { batch, heads, kv_heads, queries, keys, .. } = call;
    let (group, most) = (heads / kv_heads, most_rows(isa));
    let blocks = queries.div_ceil(most);
    // enough of them that threads end together
    let lines = batch * kv_heads;
    let parts =
        (4 * pool::threads()).div_ceil(lines.max(1)).max((group * blocks).div_ceil(MOST_BLOCKS)).min(group * blocks);
    let tasks = lines * parts;
    pool::run(tasks, |task| {
        // the longest of a causal pattern first
        let (line, part) = (task / parts, parts - 1 - task % parts);
        let item = line / kv_heads;
        let range = group * blocks * part / parts..group * blocks * (part + 1) / parts;
        let block = |i: usize| {
            let (head, query) = (line % kv_heads * group + i / blocks, i % blocks * most);
            call.block(item, head, query, most.min(queries - query), out)
        };
        let blocks: Vec<Block> = range.map(block).collect();
        // SAFETY: the set is one that the CPU has; `check` has seen that all rows lie within their slices; no two
        // blocks have a row in common.
        unsafe {
            run_blocks(isa, &blocks, index(item));
            for block in &blocks {
                average_unseeing(block, index(item), keys);
            }
        }
    });
}

/// Tasks are ranges of keys, for all heads, so that a cache is read from end to end; their results are then joined.
fn one_query<'a>(isa: Isa, call: &Attention, index: impl Fn(usize) -> &'a [u32] + Sync, out: Shared) {
    let &Attention { batch, heads, kv_heads, keys, head_dim, .. } = call;
    let (group, most) = (heads / kv_heads, most_rows(isa));
    let splits = keys.div_ceil(FEW_KEYS);
    let blocks = group.div_ceil(most);
    let width = heads * head_dim;
    // for each item and range of keys: results and, per head, the highest score and the total
    let mut partial: Buffer<MaybeUninit<f32>> = Buffer::uninit(batch * splits * (width + 2 * heads));
    let partial = Shared(partial.as_mut_ptr().cast());
    let part = |item: usize, split: usize| partial.get().wrapping_add((item * splits + split) * (width + 2 * heads));
    // where there are few keys, the heads are shared out
    let all = kv_heads * blocks;
    let runs = (2 * pool::threads()).div_ceil((batch * splits).max(1)).min(all).max(all.div_ceil(MOST_BLOCKS));
    pool::run(batch * splits * runs, |task| {
        let (item, split, run) = (task / runs / splits, task / runs % splits, task % runs);
        let block = |i: usize| {
            let (kv_head, first) = (i / blocks, i % blocks * most);
            let head = kv_head * group + first;
            let whole = call.block(item, head, 0, most.min(group - first), out);
            let part = part(item, split);
            Block { out: part.wrapping_add(head * head_dim), parts: Some(part.wrapping_add(width + 2 * head)), ..whole }
        };
        let blocks: Vec<Block> = (all * run / runs..all * (run + 1) / runs).map(block).collect();
        let index = index(item);
        let index = &index[(split * FEW_KEYS).min(index.len())..((split + 1) * FEW_KEYS).min(index.len())];
        // SAFETY: as in `many_queries`.
        unsafe { run_blocks(isa, &blocks, index) };
    });
    pool::run(batch, |item| {
        for head in 0..heads {
            let block = call.block(item, head, 0, 1, out);
            // SAFETY: all parts were written, and this head's output is written here alone.
            unsafe {
                let moments = |split: usize| {
                    let at = part(item, split).wrapping_add(width + 2 * head);
                    (*at, *at.add(1))
                };
                let top = (0..splits).map(|split| moments(split).0).fold(f32::MIN, f32::max);
                let factor = |split: usize| (moments(split).0 - top).exp();
                let total: f32 = (0..splits).map(|split| moments(split).1 * factor(split)).sum();
                let out = std::slice::from_raw_parts_mut(block.out, head_dim);
                out.fill(0.0);
                for split in 0..splits {
                    let factor = factor(split) / total;
                    let result = std::slice::from_raw_parts(part(item, split).add(head * head_dim), head_dim);
                    out.iter_mut().zip(result).for_each(|(out, result)| *out += result * factor);
                }
                average_unseeing(&block, index(item), keys);
            }
        }
    });
}

/// Rows that see no key get the mean of all values.
///
/// # Safety
/// The pointers of `block` are valid for its rows and for `keys` rows of values.
unsafe fn average_unseeing(block: &Block, index: &[u32], keys: usize) {
    for row in 0..block.rows {
        let (from, to) = block.row_range(row);
        let next = index.partition_point(|&key| i64::from(key) < from);
        if index.get(next).is_some_and(|&key| i64::from(key) < to) {
            continue;
        }
        for i in 0..block.head_dim {
            // SAFETY: as for this function.
            unsafe {
                let sum = (0..keys).map(|key| *block.v.add(key * block.v_stride + i)).sum::<f32>();
                *block.out.add(row * block.out_stride + i) = sum / keys as f32;
            }
        }
    }
}

/// The definition, in f64, with all scores of a query at once.
#[cfg(test)]
fn attention_scalar(call: &Attention) -> Vec<f32> {
    let &Attention { batch, heads, kv_heads, queries, keys, head_dim, .. } = call;
    let mut out = Vec::new();
    for (item, query, head) in
        (0..batch).flat_map(|b| (0..queries).flat_map(move |q| (0..heads).map(move |h| (b, q, h))))
    {
        let kv_head = head / (heads / kv_heads);
        let (from, to) = call.pattern.range(call.position(query));
        let sees = |key: usize| {
            let exists = call.valid.is_none_or(|valid| valid[item].contains(&(key as u32)));
            exists && (from..to).contains(&(key as i64))
        };
        let score = |key: usize| {
            let products =
                call.q.head(item, query, head, head_dim).iter().zip(call.k.head(item, key, kv_head, head_dim));
            let dot: f64 = products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let bias = call.bias.map_or(0.0, |bias| bias.data[bias.start(item, head, query) + key * bias.strides[3]]);
            dot * f64::from(call.scale) + f64::from(bias)
        };
        let scores: Vec<f64> = (0..keys).map(|key| if sees(key) { score(key) } else { f64::NEG_INFINITY }).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let nothing = !(0..keys).any(sees);
        let weights: Vec<f64> = scores.iter().map(|score| if nothing { 1.0 } else { (score - top).exp() }).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..head_dim {
            let values = (0..keys)
                .filter(|&key| nothing || sees(key))
                .map(|key| weights[key] * f64::from(call.v.head(item, key, kv_head, head_dim)[i]));
            out.push((values.sum::<f64>() / total) as f32);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values in [-1, 1), of whose bits none repeats soon.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mix = |i: u32| {
            let x = (i ^ seed.wrapping_mul(0x9E37_79B9)).wrapping_mul(0x85EB_CA6B);
            let x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
            ((x ^ (x >> 16)) >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n as u32).map(mix).collect()
    }

    /// Shape: batch, heads, kv_heads, queries, keys, head_dim.
    type Shape = [usize; 6];

    /// Compares every path with the definition; rows lie apart and begin at odd places.
    fn check(shape: Shape, pattern: Pattern, valid: Option<&[Vec<u32>]>, bias: Option<Bias>, scale: f32) {
        let [batch, heads, kv_heads, queries, keys, head_dim] = shape;
        let (q_row, kv_row) = (heads * head_dim + 3, 2 * kv_heads * head_dim + 1);
        let q = noise(1 + batch * queries * q_row, 1);
        let kv = noise(1 + batch * keys * kv_row, 2);
        let call = Attention {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            head_dim,
            scale,
            pattern,
            q: Strided { data: &q[1..], batch: queries * q_row, row: q_row },
            k: Strided { data: &kv[1..], batch: keys * kv_row, row: kv_row },
            v: Strided { data: &kv[1 + kv_heads * head_dim..], batch: keys * kv_row, row: kv_row },
            valid,
            bias,
        };
        let want = attention_scalar(&call);
        for isa in Isa::available() {
            let got = attention_on(isa, &call).unwrap();
            assert_eq!(got.len(), want.len());
            for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
                // a mean of values up to 1 whose weights have the relative error of their scores' absolute one
                let allowed = 2e-6 * (1.0 + scale * head_dim as f32);
                let close = (got - want).abs() <= allowed || (got.is_nan() && want.is_nan());
                assert!(close, "{shape:?} {pattern:?} {isa}: element {i} is {got:e}, not {want:e}");
            }
        }
    }

    #[test]
    fn every_length_and_width() {
        for seq in 1..=40 {
            for head_dim in (1..=33).chain([64, 80, 128]) {
                if seq % 7 == 1 || head_dim % 11 == 1 || head_dim > 33 {
                    check([1, 2, 2, seq, seq, head_dim], Pattern::Full, None, None, (head_dim as f32).powf(-0.5));
                }
            }
        }
        check([2, 1, 1, 197, 197, 64], Pattern::Full, None, None, 0.125);
        check([1, 2, 1, 3, 700, 64], Pattern::Full, None, None, 0.125);
        check([1, 1, 1, 130, 257, 72], Pattern::Full, None, None, 3.0);
    }

    #[test]
    fn patterns_and_shared_heads() {
        for pattern in [Pattern::Causal, Pattern::Sliding(1), Pattern::Sliding(5), Pattern::Sliding(60)] {
            for (queries, keys) in
                [(1, 1), (1, 9), (1, 300), (2, 2), (3, 70), (4, 5), (5, 5), (33, 40), (100, 100), (70, 151), (9, 4)]
            {
                for (heads, kv_heads) in [(2, 2), (6, 2), (3, 1), (40, 1)] {
                    check([2, heads, kv_heads, queries, keys, 20], pattern, None, None, 0.3);
                }
            }
        }
    }

    #[test]
    fn keys_that_do_not_exist() {
        for (queries, keys) in [(1, 60), (1, 600), (3, 60), (60, 60), (130, 130)] {
            let n = keys as u32;
            // a prefix, a suffix (padded on the left), every third, and none
            let valid = [(0..n / 2).collect(), (n - 7..n).collect(), (0..n).step_by(3).collect(), vec![]];
            for pattern in [Pattern::Full, Pattern::Causal, Pattern::Sliding(4)] {
                let bias = noise(2 * queries * keys, 3);
                let bias = Bias { data: &bias, strides: [0, queries * keys, keys, 1], which: None };
                for bias in [None, Some(bias)] {
                    check([4, 2, 2, queries, keys, 24], pattern, Some(&valid), bias, 0.5);
                }
            }
        }
    }

    #[test]
    fn biases_of_every_broadcast() {
        let bias = noise(2 * 3 * 50 * 131, 4);
        for (queries, keys) in [(1, 131), (4, 9), (50, 131), (16, 48), (33, 50)] {
            let all = [3 * queries * keys, queries * keys];
            for strides in [
                [0, 0, 0, 1],
                [0, keys, 0, 1],
                [0, 0, keys, 1],
                [all[0], all[1], keys, 1],
                // the queries side by side
                [all[0], all[1], 1, queries],
            ] {
                let own = Bias { data: &bias, strides, which: None };
                for bias in [own, Bias { which: Some(&[1, 1]), ..own }, Bias { which: Some(&[1, 0]), ..own }] {
                    check([2, 3, 1, queries, keys, 8], Pattern::Full, None, Some(bias), 0.5);
                    check([2, 3, 3, queries, keys, 17], Pattern::Causal, None, Some(bias), 0.5);
                }
            }
        }
    }

    #[test]
    fn extreme_scores() {
        for queries in [1, 2, 60] {
            let keys = 100;
            let biases: [fn(usize) -> f32; 6] = [
                |key| if key < 60 { f32::NEG_INFINITY } else { 0.0 },
                |_| f32::NEG_INFINITY,
                |_| f32::MIN,
                |key| if key % 2 == 0 { f32::MIN } else { key as f32 },
                |key| key as f32 * 1e30,
                |key| if key == 70 { f32::NAN } else { 0.0 },
            ];
            for bias in biases {
                let bias: Vec<f32> = (0..keys).map(bias).collect();
                check(
                    [1, 2, 1, queries, keys, 16],
                    Pattern::Full,
                    None,
                    Some(Bias { data: &bias, strides: [0, 0, 0, 1], which: None }),
                    0.25,
                );
            }
        }
    }

    #[test]
    fn short_slices_are_refused() {
        let data = [0.0; 15];
        let rows = Strided { data: &data, batch: 16, row: 4 };
        let call = Attention {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            queries: 4,
            keys: 4,
            head_dim: 4,
            scale: 1.0,
            pattern: Pattern::Full,
            q: rows,
            k: rows,
            v: rows,
            valid: None,
            bias: None,
        };
        let error = attention(&call).unwrap_err().to_string();
        assert!(error.contains("queries") && error.contains("16"), "{error}");
    }
}
