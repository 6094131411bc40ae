//! Rotary positions in place: pairs of elements of each head turned by an angle of the row's position (arXiv:2104.09864).
//!
//! It reads and writes the turned elements once; the cosines and sines of a row are read once from memory and then, for
//! every head, from the first-level cache. FLOPs: 3 per turned element.

#![expect(unsafe_code, reason = "enters code compiled for an instruction set that the CPU has")]

use super::isa::Isa;
use super::simd::{Simd, simd_entry};
use crate::rope::Style;

/// Heads of one row, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) count: usize,
    /// Elements from one head to the next.
    pub(crate) dim: usize,
    /// Elements at the start of each head that are turned; even.
    pub(crate) rotary: usize,
}

/// The definition. `cos` and `sin` have one value for each pair.
#[cfg(test)]
fn rotate_scalar(style: Style, heads: Heads, cos: &[f32], sin: &[f32], row: &mut [f32]) {
    let half = heads.rotary / 2;
    for head in row.chunks_mut(heads.dim) {
        for i in 0..half {
            let (a, b) = match style {
                Style::Half => (i, i + half),
                Style::Interleaved => (2 * i, 2 * i + 1),
            };
            let (x, y) = (f64::from(head[a]), f64::from(head[b]));
            let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
            head[a] = (x * cos - y * sin) as f32;
            head[b] = (y * cos + x * sin) as f32;
        }
    }
}

/// Elements of a row's cosines, and of its sines, as [`rotate`] reads them: one a pair, or one an element.
pub(crate) fn table_width(style: Style, rotary: usize) -> usize {
    match style {
        Style::Half => rotary / 2,
        Style::Interleaved => rotary,
    }
}

/// The cosines and sines of the pairs of a row as [`rotate`] reads them.
pub(crate) fn table_row(style: Style, pairs: impl Iterator<Item = (f32, f32)>, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
    for (c, s) in pairs {
        match style {
            Style::Half => {
                cos.push(c);
                sin.push(s);
            }
            // each element has its own factor on its neighbour
            Style::Interleaved => {
                cos.extend([c, c]);
                sin.extend([-s, s]);
            }
        }
    }
}

/// # Safety
/// The CPU has `S`; `row` is valid for `heads`, `cos` and `sin` have [`table_width`] elements.
#[inline(always)]
unsafe fn rotate_kernel<S: Simd>(style: Style, heads: Heads, cos: &[f32], sin: &[f32], row: *mut f32) {
    let (n, cos, sin) = (cos.len(), cos.as_ptr(), sin.as_ptr());
    for head in 0..heads.count {
        // SAFETY: the head lies within the row; i + LANES <= n in the loops, then n - i lanes are left.
        unsafe {
            let x = row.add(head * heads.dim);
            let mut i = 0;
            match style {
                Style::Half => {
                    let y = x.add(n);
                    while i + S::LANES <= n {
                        let (c, s) = (S::load(cos.add(i)), S::load(sin.add(i)));
                        let (a, b) = turn::<S>(S::load(x.add(i)), S::load(y.add(i)), c, s);
                        S::store(x.add(i), a);
                        S::store(y.add(i), b);
                        i += S::LANES;
                    }
                    if i < n {
                        let rest = n - i;
                        let (c, s) = (S::load_partial(cos.add(i), rest), S::load_partial(sin.add(i), rest));
                        let (a, b) = turn::<S>(S::load_partial(x.add(i), rest), S::load_partial(y.add(i), rest), c, s);
                        S::store_partial(x.add(i), rest, a);
                        S::store_partial(y.add(i), rest, b);
                    }
                }
                Style::Interleaved => {
                    while i + S::LANES <= n {
                        let a = S::load(x.add(i));
                        let turned = S::mul(S::swap_pairs(a), S::load(sin.add(i)));
                        S::store(x.add(i), S::fma(a, S::load(cos.add(i)), turned));
                        i += S::LANES;
                    }
                    if i < n {
                        let rest = n - i;
                        let a = S::load_partial(x.add(i), rest);
                        let turned = S::mul(S::swap_pairs(a), S::load_partial(sin.add(i), rest));
                        S::store_partial(x.add(i), rest, S::fma(a, S::load_partial(cos.add(i), rest), turned));
                    }
                }
            }
        }
    }
}

/// The pairs (x, y) turned.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn turn<S: Simd>(x: S::F, y: S::F, cos: S::F, sin: S::F) -> (S::F, S::F) {
    // SAFETY: as for this function.
    unsafe {
        let minus_sin = S::sub(S::splat(0.0), sin);
        (S::fma(x, cos, S::mul(y, minus_sin)), S::fma(y, cos, S::mul(x, sin)))
    }
}

simd_entry! {
    /// # Safety
    /// As for [`rotate`], and the CPU has `isa`.
    fn rotate_on(style: Style, heads: Heads, cos: &[f32], sin: &[f32], row: *mut f32) = rotate_kernel
}

/// Turns the heads of the row that begins at `row`.
///
/// # Safety
/// The row is valid for `(heads.count - 1) * heads.dim + heads.rotary` elements that nobody else touches.
///
/// # Panics
/// When `cos` and `sin` have not [`table_width`] elements, or heads overlap.
pub(crate) unsafe fn rotate(style: Style, heads: Heads, cos: &[f32], sin: &[f32], row: *mut f32) {
    let width = table_width(style, heads.rotary);
    assert!(cos.len() == width && sin.len() == width && heads.rotary <= heads.dim && heads.rotary.is_multiple_of(2));
    // SAFETY: the current set is one that the CPU has; the rest is the caller's.
    unsafe { rotate_on(Isa::current(), style, heads, cos, sin, row) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_against_the_definition() {
        let special = [0.0, -0.0, 1e30, -1e30, 1e-40, f32::INFINITY, f32::NAN];
        for isa in Isa::available() {
            for style in [Style::Half, Style::Interleaved] {
                for half in 0..=67 {
                    for (count, rest, offset) in [(1, 0, 0), (3, 5, 1)] {
                        let heads = Heads { count, dim: 2 * half + rest, rotary: 2 * half };
                        if heads.dim == 0 {
                            continue;
                        }
                        let angle = |i: usize| (i as f32 * 0.37).sin_cos();
                        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..half).map(|i| (angle(i).1, angle(i).0)).unzip();
                        let x: Vec<f32> = (0..offset + count * heads.dim + 1)
                            .map(|i| if i % 11 == 10 { special[i / 11 % 7] } else { (i as f32 * 0.7391).sin() * 9.0 })
                            .collect();
                        let mut want = x.clone();
                        rotate_scalar(style, heads, &cos, &sin, &mut want[offset..offset + count * heads.dim]);
                        let (mut table_cos, mut table_sin) = (Vec::new(), Vec::new());
                        let pairs = cos.iter().copied().zip(sin.iter().copied());
                        table_row(style, pairs, &mut table_cos, &mut table_sin);
                        let mut got = x.clone();
                        let row = got[offset..].as_mut_ptr();
                        // SAFETY: an available set, a row of `count` heads.
                        unsafe { rotate_on(isa, style, heads, &table_cos, &table_sin, row) };
                        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                            // two products that may cancel: half an ULP of the larger each, and of the sum
                            let size = if want.abs() > 1e20 { 1e31 } else { 20.0 };
                            let close = (got - want).abs() <= 1e-7 * size || got == want;
                            assert!(
                                close || (got.is_nan() && want.is_nan()),
                                "{style:?} {heads:?} on {isa}: {i} is {got:e}, not {want:e}"
                            );
                        }
                    }
                }
            }
        }
    }
}
