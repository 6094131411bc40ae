//! Maximum and average over windows of channels-last images (batch, height, width, channels): one read of each window,
//! a vector of channels at a time.

#![expect(unsafe_code, reason = "vectors over raw pixels; lengths are checked once, at the entry")]

use std::mem::MaybeUninit;
use std::ops::Range;

use super::isa::Isa;
use super::simd::{Simd, simd_entry};
use crate::op;

/// What becomes of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduction {
    /// NaN where any element is.
    Max,
    /// Over the pixels inside the image, or the padded image where `count_padding`.
    Average { count_padding: bool },
}

/// How windows lie over an image; pairs are height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Windows {
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) padding: [usize; 2],
    /// Whether a window may reach past the padded image, as long as it begins within the image or its first padding.
    pub(crate) ceil: bool,
}

impl Windows {
    /// As torch counts; `None` where the padded image is smaller than a window.
    pub(crate) fn out_size(&self, size: [usize; 2]) -> Option<[usize; 2]> {
        let along = |i: usize| {
            let (kernel, stride, padding) = (self.kernel[i], self.stride[i], self.padding[i]);
            let room = (size[i] + 2 * padding).checked_sub(kernel)?;
            let out = if self.ceil { room.div_ceil(stride) } else { room / stride } + 1;
            Some(if self.ceil && (out - 1) * stride >= size[i] + padding { out - 1 } else { out })
        };
        Some([along(0)?, along(1)?])
    }

    /// Of window `at` along an axis of `size` pixels: those inside the image, and how many there are with the padding.
    pub(crate) fn span(&self, axis: usize, at: usize, size: usize) -> (Range<usize>, usize) {
        let start = at * self.stride[axis];
        let padding = self.padding[axis];
        let end = (start + self.kernel[axis]).min(size + 2 * padding);
        let inside = |position: usize| position.saturating_sub(padding).min(size);
        (inside(start)..inside(end), end - start)
    }
}

/// Pools `x` (batch, size, channels) into (batch, out size, channels).
///
/// # Panics
/// When `x` has another length, or the padded image is smaller than a window.
pub(crate) fn pool(
    isa: Isa,
    x: &[f32],
    batch: usize,
    size: [usize; 2],
    channels: usize,
    windows: &Windows,
    reduction: Reduction,
) -> Vec<f32> {
    assert!(isa.is_available() && x.len() == batch * size[0] * size[1] * channels);
    let Some([height, width]) = windows.out_size(size) else { panic!("{size:?} is smaller than {windows:?}") };
    let line = width * channels;
    // SAFETY: a part is a line of the output, which the kernel writes; the image has the checked length.
    unsafe {
        op::collect_chunks(batch * height * line, line, |begin, out| {
            let (item, y) = (begin / line / height, begin / line % height);
            let (rows, with_padding) = windows.span(0, y, size[0]);
            let item = &x[item * size[0] * size[1] * channels..][..size[0] * size[1] * channels];
            let rows = Rows { item, width: size[1], rows, with_padding };
            pool_line(isa, &rows, channels, windows, reduction, out);
        })
    }
}

/// The lines of an image that one line of windows covers.
struct Rows<'a> {
    item: &'a [f32],
    width: usize,
    rows: Range<usize>,
    with_padding: usize,
}

simd_entry! {
    /// # Safety
    /// The image has the rows; `out` is a line of the output.
    fn pool_line(
        rows: &Rows<'_>,
        channels: usize,
        windows: &Windows,
        reduction: Reduction,
        out: &mut [MaybeUninit<f32>],
    ) = pool_kernel
}

#[inline(always)]
unsafe fn pool_kernel<S: Simd>(
    image: &Rows<'_>,
    channels: usize,
    windows: &Windows,
    reduction: Reduction,
    out: &mut [MaybeUninit<f32>],
) {
    for (at, out) in out.chunks_exact_mut(channels).enumerate() {
        let (columns, with_padding) = windows.span(1, at, image.width);
        let pixels = match reduction {
            Reduction::Average { count_padding: true } => image.with_padding * with_padding,
            _ => image.rows.len() * columns.len(),
        };
        let pixels = pixels as f32;
        for channel in (0..channels).step_by(S::LANES) {
            let lanes = S::LANES.min(channels - channel);
            // SAFETY: rows and columns are inside the image, `channel + lanes` within the channels.
            unsafe {
                let load = |y: usize, x: usize| {
                    let p = image.item.as_ptr().add((y * image.width + x) * channels + channel);
                    if lanes == S::LANES { S::load(p) } else { S::load_partial(p, lanes) }
                };
                let result = match reduction {
                    Reduction::Max => {
                        let mut largest = S::splat(f32::NEG_INFINITY);
                        for y in image.rows.clone() {
                            for x in columns.clone() {
                                largest = max_or_nan::<S>(largest, load(y, x));
                            }
                        }
                        largest
                    }
                    Reduction::Average { .. } => {
                        // Lines are summed by themselves, so that roundings grow with a side, not with the area.
                        let mut sum = S::splat(0.0);
                        for y in image.rows.clone() {
                            let line = columns.clone().fold(S::splat(0.0), |line, x| S::add(line, load(y, x)));
                            sum = S::add(sum, line);
                        }
                        S::div(sum, S::splat(pixels))
                    }
                };
                S::store_partial(out.as_mut_ptr().cast::<f32>().add(channel), lanes, result);
            }
        }
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn max_or_nan<S: Simd>(a: S::F, b: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let infinity = S::splat(f32::INFINITY);
        // `max` lets a NaN in `b` through; an `a` that is infinite or NaN stays, unless `b` is infinite or NaN too.
        S::select_lt(a, infinity, S::max(a, b), S::select_lt(b, infinity, a, S::add(a, b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in torch's words.
    fn reference(
        x: &[f32],
        batch: usize,
        size: [usize; 2],
        channels: usize,
        windows: &Windows,
        reduction: Reduction,
    ) -> Vec<f64> {
        let [height, width] = windows.out_size(size).unwrap();
        let mut out = Vec::new();
        for i in 0..batch * height * width * channels {
            let (c, ox, oy, item) =
                (i % channels, i / channels % width, i / channels / width % height, i / channels / width / height);
            let (mut sum, mut largest, mut inside, mut padded) = (0.0, f64::NEG_INFINITY, 0, 0);
            for (ky, kx) in (0..windows.kernel[0]).flat_map(|ky| (0..windows.kernel[1]).map(move |kx| (ky, kx))) {
                let (y, x_at) = (oy * windows.stride[0] + ky, ox * windows.stride[1] + kx);
                padded += usize::from(y < size[0] + 2 * windows.padding[0] && x_at < size[1] + 2 * windows.padding[1]);
                let y = y.checked_sub(windows.padding[0]).filter(|&y| y < size[0]);
                let x_at = x_at.checked_sub(windows.padding[1]).filter(|&x| x < size[1]);
                if let (Some(y), Some(x_at)) = (y, x_at) {
                    let value = f64::from(x[((item * size[0] + y) * size[1] + x_at) * channels + c]);
                    (sum, inside) = (sum + value, inside + 1);
                    largest = if value.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(value) };
                }
            }
            out.push(match reduction {
                Reduction::Max => largest,
                Reduction::Average { count_padding } => sum / if count_padding { padded } else { inside } as f64,
            });
        }
        out
    }

    #[test]
    fn every_path_against_the_definition() {
        let reductions =
            [Reduction::Max, Reduction::Average { count_padding: true }, Reduction::Average { count_padding: false }];
        for (kernel, stride, padding, ceil) in [
            ([3, 3], [2, 2], [1, 1], false),
            ([2, 2], [2, 2], [0, 0], true),
            ([3, 2], [2, 3], [1, 0], true),
            ([1, 5], [1, 1], [0, 2], false),
            ([4, 4], [3, 3], [2, 2], true),
        ] {
            let windows = Windows { kernel, stride, padding, ceil };
            for (size, channels) in [([5, 7], 1), ([8, 6], 3), ([7, 9], 33), ([6, 5], 16)] {
                let mut x: Vec<f32> =
                    (0..2 * size[0] * size[1] * channels).map(|i| (i as f32 * 0.7391).sin()).collect();
                for reduction in reductions {
                    for isa in Isa::available() {
                        let found = pool(isa, &x, 2, size, channels, &windows, reduction);
                        let expected = reference(&x, 2, size, channels, &windows, reduction);
                        assert_eq!(found.len(), expected.len());
                        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                            // 16 numbers up to 1, and a division
                            let close = (f64::from(*found) - expected).abs() < 1e-6
                                || f64::from(*found).is_nan() && expected.is_nan();
                            assert!(
                                close || f64::from(*found) == expected,
                                "{isa} {windows:?} {reduction:?} {size:?} {channels} at {i}: {found}, expected {expected}"
                            );
                        }
                    }
                    // for the average they spread, too
                    x[channels] = f32::NAN;
                    x[2 * channels] = f32::INFINITY;
                    x[3 * channels] = f32::NEG_INFINITY;
                }
            }
        }
    }

    #[test]
    fn sizes_as_torch_counts_them() {
        let windows = |kernel, stride, padding, ceil| Windows {
            kernel: [kernel; 2],
            stride: [stride; 2],
            padding: [padding; 2],
            ceil,
        };
        assert_eq!(windows(3, 2, 1, false).out_size([112, 7]), Some([56, 4]));
        assert_eq!(windows(2, 2, 0, true).out_size([5, 4]), Some([3, 2]));
        // the last window would lie in the padding alone
        assert_eq!(windows(2, 3, 1, true).out_size([5, 6]), Some([2, 3]));
        assert_eq!(windows(3, 1, 0, false).out_size([2, 9]), None);
    }
}
