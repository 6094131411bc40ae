//! Attention without a score matrix: keys come in blocks, the softmax is rescaled as its maximum grows
//! (arXiv:2112.05682, arXiv:2205.14135).
//!
//! The lanes of a vector are *queries*: a block of them is transposed once into a thread's buffer (scaled on the way),
//! then scores come as Sᵀ (keys × queries) from broadcasts of the keys as they lie, the softmax runs down the keys without
//! a horizontal operation, and Sᵀ is what the product with the values wants to broadcast from, whose lanes are elements
//! of the values as they lie. So neither keys nor values are copied or transposed, whatever their strides. A few queries
//! (a step of decoding) take lanes along the head instead, so that each key and value is read once, at full width.
//!
//! Keys that do not exist are not visited, nor are blocks outside the pattern. FLOPs: 4 · queries · keys · head_dim per
//! head over the visible keys; bytes: queries, keys, values and the result once, while keys and values of a head fit the
//! cache.

#![expect(unsafe_code, reason = "intrinsics behind one checked entry")]

use std::cell::RefCell;
use std::mem::MaybeUninit;

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

    fn check(&self, what: &'static str, batch: usize, rows: usize, width: usize) -> Result<(), KernelError> {
        if batch * rows * width == 0 {
            return Ok(());
        }
        let last = |n: usize, stride: usize| (n - 1).checked_mul(stride);
        let least =
            last(batch, self.batch).zip(last(rows, self.row)).and_then(|(b, r)| b.checked_add(r)?.checked_add(width));
        KernelError::check_least(what, least, self.data.len())
    }
}

/// What is added to the scaled scores; the keys contiguous, the other strides (batch, head, query) in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bias<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) strides: [usize; 3],
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
            let [b, h, q] = bias.strides;
            let least = (batch - 1) * b + (heads - 1) * h + (queries - 1) * q + keys;
            KernelError::check_least("bias", Some(least), bias.data.len())?;
        }
        Ok(())
    }

    /// The position of a query among the keys.
    fn position(&self, query: usize) -> i64 {
        query as i64 + self.keys as i64 - self.queries as i64
    }
}

/// Rows that share a head of keys and values and are worked on together: neighbouring queries of a head, or, when there
/// is one query, the heads of a group. `stride`s are from row to row.
#[derive(Clone, Copy)]
struct Block {
    rows: usize,
    head_dim: usize,
    scale: f32,
    q: *const f32,
    q_stride: usize,
    /// Row 0 of the head.
    k: *const f32,
    k_stride: usize,
    v: *const f32,
    v_stride: usize,
    /// Column 0.
    bias: Option<*const f32>,
    bias_stride: usize,
    out: *mut f32,
    out_stride: usize,
    pattern: Pattern,
    /// Of the first row among the keys.
    position: i64,
    /// From row to row: 1 or 0.
    step: i64,
}

impl Block {
    fn row_range(&self, row: usize) -> (i64, i64) {
        self.pattern.range(self.position + row as i64 * self.step)
    }
}

/// Keys worked on between two rescalings; a multiple of every tile's height.
const KEYS: usize = 48;
/// The same where lanes lie along the head.
const FEW_KEYS: usize = 256;
/// Up to so many rows lanes lie along the head.
const FEW: usize = 4;

thread_local! {
    static SCRATCH: RefCell<Buffer<MaybeUninit<f32>>> = RefCell::new(Buffer::uninit(0));
}

/// A part of the thread's buffer, on a cache line.
fn carve(rest: &mut *mut f32, len: usize) -> *mut f32 {
    let part = *rest;
    *rest = part.wrapping_add(len.next_multiple_of(MAX_LANES));
    part
}

/// Elements of scratch that a block needs: queries, result, scores and five numbers per row, or, for few rows, less.
fn scratch_len(rows: usize, head_dim: usize) -> usize {
    let d = head_dim.next_multiple_of(MAX_LANES);
    rows * (2 * d + KEYS + 5 * MAX_LANES) + FEW * (2 * d + FEW_KEYS)
}

/// The block's rows over the keys of `index` that its pattern lets it see; rows that see none are left undefined.
///
/// # Safety
/// The CPU has `S`; the pointers of `block` are valid for its rows, at most `2 * LANES`, and for every row of `index`, its
/// output not shared; `scratch` for [`scratch_len`].
#[inline(always)]
unsafe fn block_kernel<S: Simd>(block: &Block, index: &[u32], scratch: *mut f32) {
    let (from, to) = (block.row_range(0).0, block.row_range(block.rows - 1).1);
    let first = index.partition_point(|&key| i64::from(key) < from);
    let end = index.partition_point(|&key| i64::from(key) < to).max(first);
    let index = &index[first..end];
    // SAFETY: as for this function.
    unsafe {
        match block.rows {
            1 => by_head::<S, 1>(block, index, scratch),
            2 => by_head::<S, 2>(block, index, scratch),
            3 => by_head::<S, 3>(block, index, scratch),
            4 => by_head::<S, 4>(block, index, scratch),
            rows if rows <= S::LANES => by_rows::<S, 1>(block, index, scratch),
            _ => by_rows::<S, 2>(block, index, scratch),
        }
    }
}

simd_entry! { fn block_on(block: &Block, index: &[u32], scratch: *mut f32) = block_kernel }

/// Lanes are rows, `NV` vectors of them.
///
/// # Safety
/// As for [`block_kernel`]; `scratch` is as long as computed there.
#[inline(always)]
unsafe fn by_rows<S: Simd, const NV: usize>(block: &Block, index: &[u32], mut scratch: *mut f32) {
    let (rows, d, width) = (block.rows, block.head_dim, NV * S::LANES);
    let padded = d.next_multiple_of(S::LANES);
    let queries = carve(&mut scratch, width * d);
    let scores = carve(&mut scratch, width * KEYS);
    let result = carve(&mut scratch, width * padded);
    let [highest, total, rescale, from, to] = [0; 5].map(|_| carve(&mut scratch, width));
    // SAFETY: as for this function; each part of the scratch has the length just carved.
    unsafe {
        transpose_queries::<S, NV>(block, queries);
        std::slice::from_raw_parts_mut(result, width * padded).fill(0.0);
        for lane in 0..width {
            let (first, end) = block.row_range(lane.min(rows - 1));
            // -∞ would make exp(-∞ - -∞) of a block that a row does not see
            *highest.add(lane) = f32::MIN;
            *total.add(lane) = 0.0;
            // exact: positions are below 2^24, and what is cut off lies outside the keys
            *from.add(lane) = first.max(-(1 << 24)) as f32;
            *to.add(lane) = end.min(1 << 24) as f32;
        }
        let (all_from, all_to) = (block.row_range(rows - 1).0, block.row_range(0).1);
        for keys in index.chunks(KEYS) {
            if S::REGISTERS >= 32 {
                score_tiles::<S, 8, NV>(block, keys, queries, scores);
            } else {
                score_tiles::<S, 6, NV>(block, keys, queries, scores);
            }
            if let Some(bias) = block.bias {
                add_bias::<S, NV>(block, bias, keys, scores);
            }
            let (first, last) = (i64::from(keys[0]), i64::from(keys[keys.len() - 1]));
            if first < all_from || last >= all_to {
                hide::<S, NV>(keys, from, to, scores);
            }
            soften::<S, NV>(keys.len(), scores, highest, total, rescale);
            for row in (0..rows).step_by(4) {
                add_values::<S>(block, keys, scores.add(row), width, rescale.add(row), result.add(row * padded));
            }
        }
        for row in 0..rows {
            let scale = S::splat(1.0 / *total.add(row));
            let (result, out) = (result.add(row * padded), block.out.add(row * block.out_stride));
            let mut i = 0;
            while i < d {
                let lanes = (d - i).min(S::LANES);
                S::store_partial(out.add(i), lanes, S::mul(S::load(result.add(i)), scale));
                i += lanes;
            }
        }
    }
}

/// Scaled queries as (head_dim, width), 0 in lanes without a row.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn transpose_queries<S: Simd, const NV: usize>(block: &Block, queries: *mut f32) {
    let (d, width) = (block.head_dim, NV * S::LANES);
    // SAFETY: rows below `rows`, columns below `d`.
    unsafe {
        let scale = S::splat(block.scale);
        for n in 0..NV {
            let (first, end) = (n * S::LANES, ((n + 1) * S::LANES).min(block.rows));
            let mut i = 0;
            if end - first == S::LANES {
                while i + 4 <= d {
                    let columns = S::load_columns(block.q.add(first * block.q_stride + i), block.q_stride);
                    for (j, column) in columns.into_iter().enumerate() {
                        S::store(queries.add((i + j) * width + first), S::mul(column, scale));
                    }
                    i += 4;
                }
            }
            while i < d {
                for row in first..first + S::LANES {
                    let q = if row < end { *block.q.add(row * block.q_stride + i) * block.scale } else { 0.0 };
                    *queries.add(i * width + row) = q;
                }
                i += 1;
            }
        }
    }
}

/// scores (keys, width) = keys (keys, head_dim) · queries (head_dim, width).
///
/// # Safety
/// As for [`by_rows`]; `KEYS` is a multiple of `MR`.
#[inline(always)]
unsafe fn score_tiles<S: Simd, const MR: usize, const NV: usize>(
    block: &Block,
    keys: &[u32],
    queries: *const f32,
    scores: *mut f32,
) {
    let width = NV * S::LANES;
    for first in (0..keys.len()).step_by(MR) {
        // SAFETY: rows of `keys`; past their end the last one again, whose scores land in the block and are not used.
        unsafe {
            let mut rows = [block.k; MR];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = row.add(keys[(first + i).min(keys.len() - 1)] as usize * block.k_stride);
            }
            let mut sums = [[S::splat(0.0); NV]; MR];
            for i in 0..block.head_dim {
                let mut q = [S::splat(0.0); NV];
                for (n, q) in q.iter_mut().enumerate() {
                    *q = S::load(queries.add(i * width + n * S::LANES));
                }
                for (row, sums) in rows.iter().zip(&mut sums) {
                    let k = S::splat(*row.add(i));
                    for (sum, q) in sums.iter_mut().zip(q) {
                        *sum = S::fma(k, q, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    S::store(scores.add((first + i) * width + n * S::LANES), *sum);
                }
            }
        }
    }
}

/// # Safety
/// As for [`by_rows`]; `bias` is valid for the block's rows and every key.
#[inline(always)]
unsafe fn add_bias<S: Simd, const NV: usize>(block: &Block, bias: *const f32, keys: &[u32], scores: *mut f32) {
    let width = NV * S::LANES;
    let neighbours = (keys[keys.len() - 1] - keys[0]) as usize + 1 == keys.len();
    // SAFETY: as for this function.
    unsafe {
        for n in 0..NV {
            let (first, end) = (n * S::LANES, ((n + 1) * S::LANES).min(block.rows));
            let bias = bias.add(first * block.bias_stride);
            let scores = scores.add(first);
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
                    *scores.add(j * width + row) += *bias.add(row * block.bias_stride + *key as usize);
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
unsafe fn hide<S: Simd, const NV: usize>(keys: &[u32], from: *const f32, to: *const f32, scores: *mut f32) {
    // SAFETY: as for this function.
    unsafe {
        let never = S::splat(f32::NEG_INFINITY);
        for n in 0..NV {
            let (from, to) = (S::load(from.add(n * S::LANES)), S::load(to.add(n * S::LANES)));
            for (j, key) in keys.iter().enumerate() {
                let (score, key) = (scores.add((j * NV + n) * S::LANES), S::splat(*key as f32));
                let seen = S::select_lt(key, to, S::load(score), never);
                S::store(score, S::select_lt(key, from, never, seen));
            }
        }
    }
}

/// Scores become weights exp(score - highest so far); `total` is kept up, and `rescale` is what earlier results are to be
/// multiplied with.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn soften<S: Simd, const NV: usize>(
    keys: usize,
    scores: *mut f32,
    highest: *mut f32,
    total: *mut f32,
    rescale: *mut f32,
) {
    // SAFETY: as for this function.
    unsafe {
        for n in 0..NV {
            let at = |j: usize| scores.wrapping_add((j * NV + n) * S::LANES);
            let [highest, total, rescale] = [highest, total, rescale].map(|p| p.wrapping_add(n * S::LANES));
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

/// result (4, head_dim) = result · rescale + weightsᵀ (4, keys) · values (keys, head_dim).
///
/// # Safety
/// As for [`by_rows`]; `weights` are (keys, width) and start at the first of the four rows, as do `rescale` and `result`.
#[inline(always)]
unsafe fn add_values<S: Simd>(
    block: &Block,
    keys: &[u32],
    weights: *const f32,
    width: usize,
    rescale: *const f32,
    result: *mut f32,
) {
    let full = block.head_dim / S::LANES;
    let tail = block.head_dim % S::LANES;
    let most = if S::REGISTERS >= 32 { 4 } else { 3 };
    // SAFETY: as for this function; columns below `head_dim`.
    unsafe {
        let mut vector = 0;
        for left in (1..=full.div_ceil(most)).rev() {
            let vectors = (full - vector).div_ceil(left);
            let column = vector * S::LANES;
            match vectors {
                1 => value_tile::<S, 1>(block, keys, column, S::LANES, weights, width, rescale, result),
                2 => value_tile::<S, 2>(block, keys, column, S::LANES, weights, width, rescale, result),
                3 => value_tile::<S, 3>(block, keys, column, S::LANES, weights, width, rescale, result),
                _ => value_tile::<S, 4>(block, keys, column, S::LANES, weights, width, rescale, result),
            }
            vector += vectors;
        }
        if tail > 0 {
            value_tile::<S, 1>(block, keys, full * S::LANES, tail, weights, width, rescale, result);
        }
    }
}

/// `ND` vectors of [`add_values`] from `column` on, the last one with `lanes` elements.
///
/// # Safety
/// As there.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one tile of a loop nest")]
unsafe fn value_tile<S: Simd, const ND: usize>(
    block: &Block,
    keys: &[u32],
    column: usize,
    lanes: usize,
    weights: *const f32,
    width: usize,
    rescale: *const f32,
    result: *mut f32,
) {
    let padded = block.head_dim.next_multiple_of(S::LANES);
    // SAFETY: as for this function.
    unsafe {
        let mut sums = [[S::splat(0.0); ND]; 4];
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = S::splat(*rescale.add(row));
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(result.add(row * padded + column + n * S::LANES)), factor);
            }
        }
        for (j, key) in keys.iter().enumerate() {
            let v = block.v.add(*key as usize * block.v_stride + column);
            let mut values = [S::splat(0.0); ND];
            if lanes == S::LANES {
                for (n, value) in values.iter_mut().enumerate() {
                    *value = S::load(v.add(n * S::LANES));
                }
            } else {
                values[0] = S::load_partial(v, lanes);
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(j * width + row));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = S::fma(weight, value, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                S::store(result.add(row * padded + column + n * S::LANES), *sum);
            }
        }
    }
}

/// Lanes lie along the head: `R` rows, each key and value read once for all of them.
///
/// # Safety
/// As for [`by_rows`].
#[inline(always)]
unsafe fn by_head<S: Simd, const R: usize>(block: &Block, index: &[u32], mut scratch: *mut f32) {
    let d = block.head_dim;
    let padded = d.next_multiple_of(S::LANES);
    let queries = carve(&mut scratch, R * padded);
    let result = carve(&mut scratch, R * padded);
    let scores = carve(&mut scratch, R * FEW_KEYS);
    // SAFETY: as for this function; each part of the scratch has the length just carved.
    unsafe {
        std::slice::from_raw_parts_mut(queries, R * padded).fill(0.0);
        std::slice::from_raw_parts_mut(result, R * padded).fill(0.0);
        for (row, i) in (0..R).flat_map(|row| (0..d).map(move |i| (row, i))) {
            *queries.add(row * padded + i) = *block.q.add(row * block.q_stride + i) * block.scale;
        }
        let (mut highest, mut total) = ([f32::MIN; R], [0.0; R]);
        for keys in index.chunks(FEW_KEYS) {
            for (j, key) in keys.iter().enumerate() {
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
            let mut rescale = [0.0; R];
            for row in 0..R {
                let scores = std::slice::from_raw_parts_mut(scores.add(row * FEW_KEYS), keys.len());
                let (from, to) = block.row_range(row);
                for (score, &key) in scores.iter_mut().zip(keys) {
                    if let Some(bias) = block.bias {
                        *score += *bias.add(row * block.bias_stride + key as usize);
                    }
                    if i64::from(key) < from || i64::from(key) >= to {
                        *score = f32::NEG_INFINITY;
                    }
                }
                (rescale[row], highest[row], total[row]) = soften_row::<S>(scores, highest[row], total[row]);
            }
            let mut i = 0;
            while i < d {
                // four vectors at a time for a single row, so that their sums overlap
                let vectors = ((d - i) / S::LANES).min(if R * 4 < S::REGISTERS { 4 } else { 2 });
                let (column, weights, result) = (i, scores, result.add(i));
                i += match vectors {
                    0 => few_values::<S, R, 1>(block, keys, column, d - i, weights, rescale, result),
                    1 => few_values::<S, R, 1>(block, keys, column, S::LANES, weights, rescale, result),
                    2 | 3 => few_values::<S, R, 2>(block, keys, column, S::LANES, weights, rescale, result),
                    _ => few_values::<S, R, 4>(block, keys, column, S::LANES, weights, rescale, result),
                };
            }
        }
        for (row, total) in total.into_iter().enumerate() {
            for i in 0..d {
                *block.out.add(row * block.out_stride + i) = *result.add(row * padded + i) / total;
            }
        }
    }
}

/// Scores of one row become weights; gives the factor for earlier results, the new highest score and the new total.
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
        (factor, top, total * factor + S::reduce_add(sums))
    }
}

/// `ND` vectors of result · rescale + weights · values for `R` rows; gives how many columns that was.
///
/// # Safety
/// As for [`by_head`]; `weights` are (R, FEW_KEYS), `result` begins at `column`; `lanes` of the last vector are in use.
#[inline(always)]
unsafe fn few_values<S: Simd, const R: usize, const ND: usize>(
    block: &Block,
    keys: &[u32],
    column: usize,
    lanes: usize,
    weights: *const f32,
    rescale: [f32; R],
    result: *mut f32,
) -> usize {
    let padded = block.head_dim.next_multiple_of(S::LANES);
    // SAFETY: as for this function.
    unsafe {
        let mut sums = [[S::splat(0.0); ND]; R];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load(result.add(row * padded + n * S::LANES)), S::splat(rescale[row]));
            }
        }
        for (j, key) in keys.iter().enumerate() {
            let v = block.v.add(*key as usize * block.v_stride + column);
            let mut values = [S::splat(0.0); ND];
            if lanes == S::LANES {
                for (n, value) in values.iter_mut().enumerate() {
                    *value = S::load(v.add(n * S::LANES));
                }
            } else {
                values[0] = S::load_partial(v, lanes);
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
    let &Attention { batch, heads, kv_heads, queries, keys, head_dim, .. } = call;
    let (group, width) = (heads / kv_heads, heads * head_dim);
    let mut out = Vec::with_capacity(batch * queries * width);
    if keys == 0 {
        out.resize(batch * queries * width, 0.0);
        return Ok(out);
    }
    let result = Shared(out.as_mut_ptr());
    let every: Vec<u32> = if call.valid.is_none() { (0..keys as u32).collect() } else { Vec::new() };
    // rows that share a head of keys: the heads of a group at a single query, else the queries of one head
    let grouped = queries == 1;
    let (lines, rows) = if grouped { (kv_heads, group) } else { (heads, queries) };
    let most = if isa == Isa::Avx512 {
        32
    } else if isa == Isa::Avx2 {
        16
    } else {
        8
    };
    let blocks = rows.div_ceil(most);
    let tasks = batch * lines * blocks;
    pool::run(tasks, |task| {
        // the longest of a causal pattern first
        let task = tasks - 1 - task;
        let (item, line, first) = (task / blocks / lines, task / blocks % lines, task % blocks * most);
        let (head, query) = if grouped { (line * group + first, 0) } else { (line, first) };
        let kv = item * call.k.batch + head / group * head_dim;
        let kv_v = item * call.v.batch + head / group * head_dim;
        let stride = |row: usize| if grouped { head_dim } else { row };
        // SAFETY: the set is one that the CPU has; `check` has seen that all rows lie within their slices; no two blocks
        // have a row in common.
        unsafe {
            let block = Block {
                rows: most.min(rows - first),
                head_dim,
                scale: call.scale,
                q: call.q.data.as_ptr().add(item * call.q.batch + query * call.q.row + head * head_dim),
                q_stride: stride(call.q.row),
                k: call.k.data.as_ptr().add(kv),
                k_stride: call.k.row,
                v: call.v.data.as_ptr().add(kv_v),
                v_stride: call.v.row,
                bias: call.bias.map(|bias| {
                    let [b, h, q] = bias.strides;
                    bias.data.as_ptr().add(item * b + head * h + query * q)
                }),
                bias_stride: call.bias.map_or(0, |bias| bias.strides[if grouped { 1 } else { 2 }]),
                out: result.get().add((item * queries + query) * width + head * head_dim),
                out_stride: stride(width),
                pattern: call.pattern,
                position: call.position(query),
                step: i64::from(!grouped),
            };
            let index = call.valid.map_or(&every, |valid| &valid[item]);
            SCRATCH.with_borrow_mut(|scratch| {
                let len = scratch_len(most, head_dim);
                if scratch.len() < len {
                    *scratch = Buffer::uninit(len);
                }
                block_on(isa, &block, index, scratch.as_mut_ptr().cast());
            });
            average_unseeing(&block, index, keys);
        }
    });
    // SAFETY: every row of every head is in a block.
    unsafe { out.set_len(batch * queries * width) };
    Ok(out)
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
            let bias =
                call.bias.map_or(0.0, |Bias { data, strides: [b, h, q] }| data[item * b + head * h + query * q + key]);
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
        for (queries, keys) in [(1, 60), (3, 60), (60, 60), (130, 130)] {
            let n = keys as u32;
            // a prefix, a suffix (padded on the left), every third, and none
            let valid = [(0..n / 2).collect(), (n - 7..n).collect(), (0..n).step_by(3).collect(), vec![]];
            for pattern in [Pattern::Full, Pattern::Causal, Pattern::Sliding(4)] {
                let bias = noise(2 * queries * keys, 3);
                let bias = Bias { data: &bias, strides: [0, queries * keys, keys] };
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
            for strides in [[0, 0, 0], [0, keys, 0], [0, 0, keys], [3 * queries * keys, queries * keys, keys]] {
                check([2, 3, 1, queries, keys, 8], Pattern::Full, None, Some(Bias { data: &bias, strides }), 0.5);
                check([2, 3, 3, queries, keys, 17], Pattern::Causal, None, Some(Bias { data: &bias, strides }), 0.5);
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
                    Some(Bias { data: &bias, strides: [0; 3] }),
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
