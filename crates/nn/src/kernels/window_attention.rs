//! Attention of a grid of tokens within windows, each token read and its result written where it lies, with relative
//! positions decomposed into lines and columns (arXiv:2112.01526).
//!
//! The blocks are those of [`attention`](super::attention). What relative positions add to a score is the query's
//! product with a vector for the distance in lines and one for that in columns: a block makes these products once, for
//! as many lines and columns as a window has, and adds two of them to each score in the cache, so that no bias of
//! (queries, keys) is ever written. Cutting a grid into windows and putting it together again is a list of rows.
//!
//! FLOPs: 4 · queries · keys · head_dim per window and head, and 2 · queries · (lines + columns) · head_dim; bytes:
//! queries, keys, values and the result once.

#![expect(unsafe_code, reason = "blocks are raw pointers, made behind one checked entry")]

use super::KernelError;
use super::attention::{Block, MOST_BLOCKS, OUTSIDE, Strided, TABLE_ROOM, Window, most_rows, run_blocks};
use super::isa::Isa;
use crate::attention::Pattern;

use crate::op::Shared;
use crate::pool;

/// One call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WindowAttention<'a> {
    pub(crate) batch: usize,
    /// Rows of an item.
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) q: Strided<'a>,
    pub(crate) k: Strided<'a>,
    pub(crate) v: Strided<'a>,
    /// Lines and columns of a window.
    pub(crate) size: [usize; 2],
    /// Of each position of each window its token, or none: each token once.
    pub(crate) rows: &'a [Option<u32>],
    /// Key and value, (heads · head_dim), of positions without a token.
    pub(crate) outside: Option<[&'a [f32]; 2]>,
    /// As [`padded_table`] makes them, for distances in lines and in columns.
    pub(crate) tables: Option<[&'a [f32]; 2]>,
}

/// A table (2 · size - 1, head_dim) of vectors by distance with the room that the kernel wants behind it.
pub(crate) fn padded_table(mut table: Vec<f32>, head_dim: usize) -> Vec<f32> {
    table.resize(table.len() + TABLE_ROOM * head_dim, 0.0);
    table
}

impl WindowAttention<'_> {
    fn check(&self) -> Result<(), KernelError> {
        let &Self { batch, tokens, heads, head_dim, size: [lines, columns], .. } = self;
        let width = heads * head_dim;
        for (what, rows) in [("queries", self.q), ("keys", self.k), ("values", self.v)] {
            rows.check(what, batch, tokens, width)?;
        }
        let positions = lines * columns;
        assert!(positions > 0 && self.rows.len().is_multiple_of(positions), "windows of {lines} x {columns}");
        let mut times = vec![0u8; tokens];
        self.rows.iter().flatten().for_each(|&row| times[row as usize] += 1);
        assert!(times.iter().all(|times| *times == 1), "each token is in one window");
        if self.rows.iter().any(Option::is_none) {
            let [key, value] = self.outside.unwrap_or_default();
            KernelError::check_least("key of positions outside", Some(width), key.len())?;
            KernelError::check_least("value of positions outside", Some(width), value.len())?;
        }
        for (table, size) in self.tables.iter().flatten().zip(self.size) {
            KernelError::check_least("table of distances", Some((2 * size - 1 + TABLE_ROOM) * head_dim), table.len())?;
        }
        Ok(())
    }
}

/// softmax(q kᵀ · scale + positions) v within each window as (batch, tokens, heads · head_dim), on the pool.
///
/// # Errors
/// When a slice is too short for its shape.
///
/// # Panics
/// When the windows do not hold each token once.
pub(crate) fn window_attention(call: &WindowAttention) -> Result<Vec<f32>, KernelError> {
    window_attention_on(Isa::current(), call)
}

fn window_attention_on(isa: Isa, call: &WindowAttention) -> Result<Vec<f32>, KernelError> {
    call.check()?;
    let &WindowAttention { batch, tokens, heads, head_dim, scale, size, .. } = call;
    let positions = size[0] * size[1];
    let windows = call.rows.len() / positions;
    let rows: Vec<u32> = call.rows.iter().map(|row| row.unwrap_or(OUTSIDE)).collect();
    let index: Vec<u32> = (0..positions as u32).collect();
    let queries: Vec<Vec<u32>> = call
        .rows
        .chunks_exact(positions)
        .map(|rows| (0..).zip(rows).filter_map(|(position, row)| row.map(|_| position)).collect())
        .collect();
    let most = most_rows(isa);
    let most_blocks = positions.div_ceil(most);
    // enough tasks that threads end together, and no more blocks in one than share their keys well
    let lines = batch * windows * heads;
    let parts = (4 * pool::threads()).div_ceil(lines.max(1)).max(most_blocks.div_ceil(MOST_BLOCKS)).min(most_blocks);
    let mut out: Vec<f32> = Vec::with_capacity(batch * tokens * heads * head_dim);
    let shared = Shared(out.as_mut_ptr());
    pool::run(lines * parts, |task| {
        let (line, part) = (task / parts, task % parts);
        let (item, head) = (line / (windows * heads), line % heads);
        let window = line / heads % windows;
        let queries = &queries[window];
        let rows = rows[window * positions..].as_ptr();
        let at = |rows: &Strided| rows.data.as_ptr().wrapping_add(item * rows.batch + head * head_dim);
        let outside = call
            .outside
            .map_or([std::ptr::null(); 2], |outside| outside.map(|row| row.as_ptr().wrapping_add(head * head_dim)));
        let block = |queries: &[u32]| Block {
            rows: queries.len(),
            head_dim,
            scale,
            q: at(&call.q),
            q_stride: call.q.row,
            k: at(&call.k),
            k_stride: call.k.row,
            v: at(&call.v),
            v_stride: call.v.row,
            bias: None,
            bias_stride: 0,
            out: shared.get().wrapping_add((item * tokens * heads + head) * head_dim),
            out_stride: heads * head_dim,
            window: Some(Window {
                rows,
                queries: queries.as_ptr(),
                outside,
                size,
                tables: call.tables.map(|tables| tables.map(<[f32]>::as_ptr)),
            }),
            parts: None,
            pattern: Pattern::Full,
            position: 0,
            step: 0,
        };
        let count = queries.len().div_ceil(most);
        let blocks: Vec<Block> =
            queries.chunks(most).map(block).skip(count * part / parts).take(share(count, part, parts)).collect();
        // SAFETY: the set is one that the CPU has; `check` has seen that all rows lie within their slices, that no two
        // blocks have a row in common, and that the tables are as long as their kernel wants them.
        unsafe { run_blocks(isa, &blocks, &index) };
    });
    // SAFETY: every token is a query of one window, and every head of it is in a block.
    unsafe { out.set_len(batch * tokens * heads * head_dim) };
    Ok(out)
}

/// How many of `count` are the `part`th of `parts`.
fn share(count: usize, part: usize, parts: usize) -> usize {
    count * (part + 1) / parts - count * part / parts
}

/// The definition, in f64.
#[cfg(test)]
fn window_attention_scalar(call: &WindowAttention) -> Vec<f32> {
    let &WindowAttention { batch, tokens, heads, head_dim, size: [lines, columns], .. } = call;
    let mut out = vec![0.0; batch * tokens * heads * head_dim];
    let row = |rows: &Strided, item: usize, token: u32, head: usize| -> Vec<f64> {
        let begin = item * rows.batch + token as usize * rows.row + head * head_dim;
        rows.data[begin..begin + head_dim].iter().map(|x| f64::from(*x)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for (item, head) in (0..batch).flat_map(|item| (0..heads).map(move |head| (item, head))) {
        for window in call.rows.chunks_exact(lines * columns) {
            let either = |rows: &Strided, outside: usize, position: usize| match (window[position], call.outside) {
                (Some(token), _) => row(rows, item, token, head),
                (None, Some(rows)) => {
                    rows[outside][head * head_dim..][..head_dim].iter().map(|x| f64::from(*x)).collect()
                }
                (None, None) => panic!("nothing outside"),
            };
            for (position, token) in window.iter().enumerate().filter_map(|(p, token)| Some((p, (*token)?))) {
                let query = row(&call.q, item, token, head);
                let score = |key: usize| {
                    let distances = [
                        position / columns + lines - 1 - key / columns,
                        position % columns + columns - 1 - key % columns,
                    ];
                    let places = call.tables.iter().flatten().zip(distances).map(|(table, distance)| {
                        let vector = table[distance * head_dim..][..head_dim].iter().map(|x| f64::from(*x));
                        dot(&query, &vector.collect::<Vec<_>>())
                    });
                    dot(&query, &either(&call.k, 0, key)) * f64::from(call.scale) + places.sum::<f64>()
                };
                let scores: Vec<f64> = (0..lines * columns).map(score).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (key, weight) in weights.iter().enumerate() {
                    let begin = ((item * tokens + token as usize) * heads + head) * head_dim;
                    for (out, value) in out[begin..begin + head_dim].iter_mut().zip(either(&call.v, 1, key)) {
                        *out += (weight / total * value) as f32;
                    }
                }
            }
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

    /// Compares every path with the definition, on a grid cut into windows from its corner on.
    fn check([batch, heads, head_dim]: [usize; 3], grid: [usize; 2], size: [usize; 2], with_tables: bool) {
        let tokens = grid[0] * grid[1];
        let width = heads * head_dim;
        let mut rows = Vec::new();
        for top in (0..grid[0]).step_by(size[0]) {
            for left in (0..grid[1]).step_by(size[1]) {
                for (y, x) in (top..top + size[0]).flat_map(|y| (left..left + size[1]).map(move |x| (y, x))) {
                    rows.push((y < grid[0] && x < grid[1]).then_some((y * grid[1] + x) as u32));
                }
            }
        }
        let row = 3 * width + 1;
        let data = noise(1 + batch * tokens * row, 1);
        let outside = noise(2 * width, 2);
        let tables = [3, 4].map(|seed| noise((2 * size[(seed == 4) as usize] - 1) * head_dim, seed));
        let tables = tables.map(|table| padded_table(table, head_dim));
        let part = |i: usize| Strided { data: &data[1 + i * width..], batch: tokens * row, row };
        let call = WindowAttention {
            batch,
            tokens,
            heads,
            head_dim,
            scale: 0.3,
            q: part(0),
            k: part(1),
            v: part(2),
            size,
            rows: &rows,
            outside: Some([&outside[..width], &outside[width..]]),
            tables: with_tables.then_some([&tables[0], &tables[1]]),
        };
        let want = window_attention_scalar(&call);
        for isa in Isa::available() {
            let got = window_attention_on(isa, &call).unwrap();
            assert_eq!(got.len(), want.len());
            for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
                // a mean of values up to 1 whose weights have the relative error of their scores' absolute one
                let allowed = 5e-6 * (1.0 + head_dim as f32);
                assert!((got - want).abs() <= allowed, "{grid:?} {size:?} {isa}: element {i} is {got:e}, not {want:e}");
            }
        }
    }

    #[test]
    fn every_way_of_cutting() {
        for with_tables in [false, true] {
            check([1, 1, 1], [1, 1], [1, 1], with_tables);
            check([2, 3, 8], [5, 5], [3, 3], with_tables);
            check([1, 2, 16], [6, 4], [3, 2], with_tables);
            check([1, 2, 17], [4, 9], [5, 2], with_tables);
            check([1, 1, 64], [14, 20], [14, 14], with_tables);
            // more rows and distances than are worked on at a time
            check([1, 1, 8], [2, 120], [2, 120], with_tables);
            check([1, 1, 5], [101, 1], [101, 1], with_tables);
            check([1, 2, 20], [24, 25], [24, 25], with_tables);
        }
    }

    #[test]
    fn short_slices_are_refused() {
        let data = [0.0; 64];
        let rows = Strided { data: &data, batch: 16, row: 4 };
        let call = WindowAttention {
            batch: 1,
            tokens: 4,
            heads: 1,
            head_dim: 4,
            scale: 1.0,
            q: rows,
            k: rows,
            v: rows,
            size: [1, 3],
            rows: &[Some(0), Some(1), Some(2), Some(3), None, None],
            outside: None,
            tables: None,
        };
        let error = |call: &WindowAttention| window_attention(call).unwrap_err().to_string();
        assert!(error(&call).contains("key of positions outside"));
        let call = WindowAttention { outside: Some([&data, &data]), ..call };
        assert!(window_attention(&call).is_ok());
        assert!(error(&WindowAttention { tables: Some([&data[..8]; 2]), ..call }).contains("table of distances"));
        assert!(error(&WindowAttention { tokens: 4, batch: 5, ..call }).contains("queries"));
    }
}
