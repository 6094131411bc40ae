//! Resizing of feature maps, as of learned positions to another grid. Mirrors `torch.nn.functional.interpolate` with a
//! size.

use std::mem::MaybeUninit;

use candle_core::{DType, Result, Tensor, bail};

use crate::cost;
use crate::op;

/// One output position as a weighted sum of input positions, repeated at the edge.
type Taps<const N: usize> = Vec<[(usize, f32); N]>;

/// Where output position `i` lies in the input, for corners that are aligned or, else, edges.
fn source(i: usize, input: usize, output: usize, align_corners: bool) -> f32 {
    if !align_corners {
        return (i as f32 + 0.5) * (input as f32 / output as f32) - 0.5;
    }
    if output > 1 { i as f32 * ((input - 1) as f32 / (output - 1) as f32) } else { 0.0 }
}

fn cubic_taps(input: usize, output: usize, align_corners: bool) -> Taps<4> {
    const A: f32 = -0.75;
    // Keys' kernel (doi:10.1109/TASSP.1981.1163711) within one sample and between one and two
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let taps = |i| {
        let x = source(i, input, output, align_corners);
        let t = x - x.floor();
        let at = |offset: i64| (x.floor() as i64 + offset).clamp(0, input as i64 - 1) as usize;
        [(at(-1), far(t + 1.0)), (at(0), near(t)), (at(1), near(1.0 - t)), (at(2), far(2.0 - t))]
    };
    (0..output).map(taps).collect()
}

fn linear_taps(input: usize, output: usize, align_corners: bool) -> Taps<2> {
    let taps = |i| {
        let x = source(i, input, output, align_corners).max(0.0);
        let low = (x as usize).min(input - 1);
        let t = x - low as f32;
        [(low, 1.0 - t), ((low + 1).min(input - 1), t)]
    };
    (0..output).map(taps).collect()
}

/// Bicubic interpolation (a = -0.75).
///
/// # Shapes
/// (batch, channels, height, width) → (batch, channels, size.0, size.1), f32.
///
/// # Errors
/// When `x` has another number of dimensions, or a size is 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::resize::bicubic;
///
/// let x = Tensor::new(&[[[[0f32, 1., 2., 3.]]]], &Device::Cpu)?;
/// let y = bicubic(&x, (1, 2), false)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(y, [0.40625, 2.59375]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn bicubic(x: &Tensor, size: (usize, usize), align_corners: bool) -> Result<Tensor> {
    resize(x, size, |input, output| cubic_taps(input, output, align_corners))
}

/// Bilinear interpolation.
///
/// # Shapes
/// (batch, channels, height, width) → (batch, channels, size.0, size.1), f32.
///
/// # Errors
/// When `x` has another number of dimensions, or a size is 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::resize::bilinear;
///
/// let x = Tensor::new(&[[[[0f32, 4.]]]], &Device::Cpu)?;
/// assert_eq!(bilinear(&x, (1, 4), false)?.flatten_all()?.to_vec1::<f32>()?, [0., 1., 3., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn bilinear(x: &Tensor, size: (usize, usize), align_corners: bool) -> Result<Tensor> {
    resize(x, size, |input, output| linear_taps(input, output, align_corners))
}

/// The position that nearest-neighbour interpolation from `input` to `output` positions takes for `i`.
///
/// ```
/// use roofbench_nn::resize::nearest;
///
/// assert_eq!([0, 1, 2, 3, 4].map(|i| nearest(i, 3, 5)), [0, 0, 1, 1, 2]);
/// ```
pub fn nearest(i: usize, input: usize, output: usize) -> usize {
    ((i as f32 * (input as f32 / output as f32)) as usize).min(input.saturating_sub(1))
}

/// `base` plus `x` stretched to its size by nearest-neighbour interpolation, channels last: a step of a feature pyramid
/// (arXiv:1612.03144).
///
/// # Shapes
/// x (batch, height, width, channels), base (batch, base height, base width, channels), as the result.
///
/// # Errors
/// When the batches or channels differ, or `x` has no pixels.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::resize::nearest_add;
///
/// let x = Tensor::new(&[[[[1f32], [2.]]]], &Device::Cpu)?;
/// let base = Tensor::new(&[[[[0f32], [0.], [0.], [10.]]]], &Device::Cpu)?;
/// assert_eq!(nearest_add(&x, &base)?.flatten_all()?.to_vec1::<f32>()?, [1., 1., 2., 12.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn nearest_add(x: &Tensor, base: &Tensor) -> Result<Tensor> {
    let ((batch, from_height, from_width, channels), (_, height, width, _)) = (x.dims4()?, base.dims4()?);
    if base.dims() != [batch, height, width, channels] || from_height * from_width == 0 {
        bail!("nearest_add: {:?} can't be stretched to and added to {:?}", x.dims(), base.dims())
    }
    let _span = cost::span("resize", None);
    cost::elementwise(base.elem_count(), 1);
    let rows: Vec<u32> = (0..height).map(|i| nearest(i, from_height, height) as u32).collect();
    let columns: Vec<u32> = (0..width).map(|i| nearest(i, from_width, width) as u32).collect();
    if !op::is_cpu_f32(x) || !op::is_cpu_f32(base) {
        let picked = |indices: &[u32]| Tensor::from_slice(indices, indices.len(), x.device());
        return x.index_select(&picked(&rows)?, 1)?.index_select(&picked(&columns)?, 2)? + base;
    }
    op::apply2("nearest-add", &x.contiguous()?, &base.contiguous()?, |[x, base]| {
        let (x, base) = (op::elements::<f32>(x.0, x.1)?, op::elements::<f32>(base.0, base.1)?);
        // a part is a line of pixels
        let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
            let line = begin / (width * channels);
            let source = (line / height * from_height + rows[line % height] as usize) * from_width;
            let pixels = part.chunks_exact_mut(channels).zip(base[begin..].chunks_exact(channels));
            for ((out, base), &column) in pixels.zip(&columns) {
                let x = &x[(source + column as usize) * channels..][..channels];
                for ((out, base), x) in out.iter_mut().zip(base).zip(x) {
                    out.write(base + x);
                }
            }
        };
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: a part is whole pixels, one for each column, and each channel of each is written.
        let y = unsafe { op::collect_chunks(base.len(), width * channels, fill) };
        Ok((y, (batch, height, width, channels).into()))
    })
}

/// Bicubic interpolation of a grid of vectors, such as learned positions. With `antialias` the filter (then a = -0.5)
/// widens where the grid shrinks, and what lies beyond the edge does not count. Mirrors `interpolate` with
/// `mode="bicubic"` and, or not, `antialias=True`.
///
/// # Shapes
/// (rows, columns, width) → (size.0, size.1, width), f32.
///
/// # Errors
/// When `x` has another number of dimensions, or a size is 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::resize::bicubic_grid;
///
/// let x = Tensor::new(&[[[0f32], [1.], [2.], [3.]]], &Device::Cpu)?;
/// let halved = |antialias| bicubic_grid(&x, (1, 2), antialias)?.flatten_all()?.to_vec1::<f32>();
/// assert_eq!(halved(false)?, [0.40625, 2.59375]);
/// let smooth = halved(true)?;
/// assert!((smooth[0] - 0.5868).abs() < 1e-4 && (smooth[1] - 2.4132).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn bicubic_grid(x: &Tensor, size: (usize, usize), antialias: bool) -> Result<Tensor> {
    grid(x, size, |input, output| grid_taps(input, output, antialias))
}

/// Bilinear interpolation of a grid of vectors, such as a picture's pixels, whose filter widens where the grid shrinks.
/// Mirrors `interpolate` with `mode="bilinear"` and `antialias=True`.
///
/// # Shapes
/// (rows, columns, width) → (size.0, size.1, width), f32.
///
/// # Errors
/// When `x` has another number of dimensions, or a size is 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::resize::bilinear_grid;
///
/// let x = Tensor::new(&[[[0f32], [4.], [4.], [8.]]], &Device::Cpu)?;
/// let halved = bilinear_grid(&x, (1, 2))?.flatten_all()?.to_vec1::<f32>()?;
/// assert!((halved[0] - 16.0 / 7.0).abs() < 1e-6); // weights of 3, 3 and 1
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn bilinear_grid(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    grid(x, size, |input, output| smooth_taps(input, output, 1.0, |x| (1.0 - x).max(0.0)))
}

/// Columns, then rows, from `taps(input, output)`.
fn grid(
    x: &Tensor,
    (rows, columns): (usize, usize),
    taps: impl Fn(usize, usize) -> Vec<Vec<(usize, f32)>>,
) -> Result<Tensor> {
    let (from_rows, from_columns, width) = x.dims3()?;
    if from_rows * from_columns * rows * columns == 0 {
        bail!("resize: from {from_rows} x {from_columns} to {rows} x {columns}: a size of 0")
    }
    let (down, across) = (taps(from_rows, rows), taps(from_columns, columns));
    // a multiply-add for each neighbour
    let neighbours = |taps: &[Vec<_>]| taps.iter().map(Vec::len).sum::<usize>();
    let _span = cost::span("resize", None);
    cost::elementwise(neighbours(&down) * neighbours(&across) * width, 2);
    let on_cpu = x.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?.contiguous()?;
    let y = op::apply1("resize-grid", &on_cpu, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        // a line is made of lines, a vector of vectors
        let weighted = |taps: &[(usize, f32)], x: &[f32], size: usize, out: &mut [f32]| {
            out.fill(0.0);
            for &(from, weight) in taps {
                let from = &x[from * size..(from + 1) * size];
                out.iter_mut().zip(from).for_each(|(out, x)| *out += weight * x);
            }
        };
        let mut lines = vec![0.0; rows * from_columns * width];
        for (taps, line) in down.iter().zip(lines.chunks_exact_mut(from_columns * width)) {
            weighted(taps, x, from_columns * width, line);
        }
        let mut y = vec![0.0; rows * columns * width];
        for (line, out) in lines.chunks_exact(from_columns * width).zip(y.chunks_exact_mut(columns * width)) {
            for (taps, out) in across.iter().zip(out.chunks_exact_mut(width)) {
                weighted(taps, line, width, out);
            }
        }
        Ok((y, (rows, columns, width).into()))
    })?;
    y.to_device(x.device())
}

/// How many neighbours [`bicubic_grid`] weighs for all places of the result together.
pub fn bicubic_neighbours(from: (usize, usize), to: (usize, usize), antialias: bool) -> usize {
    let along = |from, to| grid_taps(from, to, antialias).iter().map(Vec::len).sum::<usize>();
    along(from.0, to.0) * along(from.1, to.1)
}

fn grid_taps(input: usize, output: usize, antialias: bool) -> Vec<Vec<(usize, f32)>> {
    if !antialias {
        return cubic_taps(input, output, false).iter().map(|taps| taps.to_vec()).collect();
    }
    const A: f32 = -0.5;
    smooth_taps(input, output, 2.0, |x| match x {
        x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
        _ => 0.0,
    })
}

/// Weights of a filter that reaches `support` each way and is `kernel` of the distance, widened where the grid shrinks.
fn smooth_taps(input: usize, output: usize, support: f32, kernel: impl Fn(f32) -> f32) -> Vec<Vec<(usize, f32)>> {
    let scale = input as f32 / output as f32;
    let stretch = scale.max(1.0);
    let taps = |i: usize| {
        let centre = scale * (i as f32 + 0.5);
        let first = (centre - support * stretch + 0.5).max(0.0) as usize;
        let end = ((centre + support * stretch + 0.5) as usize).min(input);
        let weights = (first..end).map(|j| kernel(((j as f32 - centre + 0.5) / stretch).abs()));
        let sum: f32 = weights.clone().sum();
        (first..end).zip(weights.map(|weight| weight / sum)).collect()
    };
    (0..output).map(taps).collect()
}

/// Each row along the width, then the height, from `taps(input, output)`. Other devices send it to the CPU and back: it
/// is done once per size, not per image.
fn resize<const N: usize>(
    x: &Tensor,
    (height, width): (usize, usize),
    taps: impl Fn(usize, usize) -> Taps<N>,
) -> Result<Tensor> {
    let (batch, channels, from_height, from_width) = x.dims4()?;
    if from_height * from_width * height * width == 0 {
        bail!("resize: from {from_height} x {from_width} to {height} x {width}: a size of 0")
    }
    // a multiply-add for each neighbour
    let _span = cost::span("resize", None);
    cost::elementwise(batch * channels * height * width, 2 * N * N);
    let (rows, columns) = (taps(from_height, height), taps(from_width, width));
    let on_cpu = x.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?.contiguous()?;
    let y = op::apply1("resize", &on_cpu, |storage, layout| {
        let x = op::elements::<f32>(storage, layout)?;
        let planes = x.len() / (from_height * from_width);
        // a part is a plane
        let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
            let plane = &x[begin / (height * width) * from_height * from_width..][..from_height * from_width];
            let along_width = |line: &[f32]| columns.iter().map(|taps| sum(taps, |i| line[i])).collect::<Vec<_>>();
            let lines: Vec<Vec<f32>> = plane.chunks_exact(from_width).map(along_width).collect();
            for (taps, out) in rows.iter().zip(part.chunks_exact_mut(width)) {
                for (column, out) in out.iter_mut().enumerate() {
                    out.write(sum(taps, |i| lines[i][column]));
                }
            }
        };
        #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
        // SAFETY: a part is a whole plane, and each element of each of its rows is written.
        let y = unsafe { op::collect_chunks(planes * height * width, height * width, fill) };
        Ok((y, (batch, channels, height, width).into()))
    })?;
    y.to_device(x.device())
}

fn sum<const N: usize>(taps: &[(usize, f32); N], x: impl Fn(usize) -> f32) -> f32 {
    taps.iter().fold(0.0, |sum, &(i, weight)| sum + x(i) * weight)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.731).sin()).collect()
    }

    /// The two-dimensional formula in f64: every sample of the input, weighed by a kernel of its distance, with the
    /// edge repeated.
    fn by_formula(
        x: &[f32],
        from: (usize, usize),
        to: (usize, usize),
        align: bool,
        kernel: fn(f64) -> f64,
    ) -> Vec<f64> {
        let place = |i: usize, from: usize, to: usize| match (align, to) {
            (true, 1) => 0.0,
            (true, _) => i as f64 * (from as f64 - 1.0) / (to as f64 - 1.0),
            (false, _) => (i as f64 + 0.5) * from as f64 / to as f64 - 0.5,
        };
        let mut out = Vec::new();
        for (oy, ox) in (0..to.0).flat_map(|oy| (0..to.1).map(move |ox| (oy, ox))) {
            let (y, x0) = (place(oy, from.0, to.0), place(ox, from.1, to.1));
            let mut sum = 0.0;
            for sy in -3..from.0 as i64 + 3 {
                for sx in -3..from.1 as i64 + 3 {
                    let clamp = |s: i64, n: usize| s.clamp(0, n as i64 - 1) as usize;
                    let sample = f64::from(x[clamp(sy, from.0) * from.1 + clamp(sx, from.1)]);
                    sum += sample * kernel((y - sy as f64).abs()) * kernel((x0 - sx as f64).abs());
                }
            }
            out.push(sum);
        }
        out
    }

    fn cubic(x: f64) -> f64 {
        match x {
            x if x < 1.0 => 1.25 * x.powi(3) - 2.25 * x.powi(2) + 1.0,
            x if x < 2.0 => -0.75 * x.powi(3) + 3.75 * x.powi(2) - 6.0 * x + 3.0,
            _ => 0.0,
        }
    }

    #[test]
    fn agrees_with_the_formula() -> Result<()> {
        for (from, to) in [((5, 7), (9, 4)), ((4, 4), (4, 4)), ((1, 1), (3, 2)), ((14, 14), (1, 1)), ((3, 8), (16, 17))]
        {
            for align in [false, true] {
                let x = values(2 * from.0 * from.1);
                let tensor = Tensor::from_slice(&x, (1, 2, from.0, from.1), &Device::Cpu)?;
                let linear: fn(f64) -> f64 = |x| (1.0 - x).max(0.0);
                for (got, kernel) in
                    [(bicubic(&tensor, to, align)?, cubic as fn(f64) -> f64), (bilinear(&tensor, to, align)?, linear)]
                {
                    let want = x.chunks(from.0 * from.1).flat_map(|plane| by_formula(plane, from, to, align, kernel));
                    for (got, want) in got.flatten_all()?.to_vec1::<f32>()?.into_iter().zip(want) {
                        // positions up to 17 in f32 have an error of 1e-6, the slope is up to 2
                        assert!((f64::from(got) - want).abs() < 5e-6, "{from:?} -> {to:?}, {align}: {got}, not {want}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn nearest_both_ways() -> Result<()> {
        for (from, to) in [((2, 3), (4, 6)), ((3, 2), (7, 5)), ((5, 4), (2, 3))] {
            let x = Tensor::randn(0f32, 1., (2, from.0, from.1, 5), &Device::Cpu)?;
            let base = Tensor::randn(0f32, 1., (2, to.0, to.1, 5), &Device::Cpu)?;
            let plain = nearest_add(&x.to_dtype(DType::F64)?, &base.to_dtype(DType::F64)?)?.to_dtype(DType::F32)?;
            let difference = (nearest_add(&x, &base)? - plain)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(difference < 1e-6, "{difference}");
        }
        let x = Tensor::zeros((1, 1, 1, 3), DType::F32, &Device::Cpu)?;
        assert!(nearest_add(&x, &x.narrow(3, 0, 2)?).unwrap_err().to_string().contains("[1, 1, 1, 2]"));
        Ok(())
    }

    #[test]
    fn a_grid_of_vectors_is_its_planes() -> Result<()> {
        for (from, to) in [((5, 7), (9, 4)), ((4, 4), (4, 4)), ((1, 1), (3, 2)), ((14, 14), (1, 1))] {
            let planes = Tensor::from_vec(values(3 * from.0 * from.1), (1, 3, from.0, from.1), &Device::Cpu)?;
            let want = bicubic(&planes, to, false)?.squeeze(0)?;
            let found = bicubic_grid(&planes.squeeze(0)?.permute((1, 2, 0))?, to, false)?.permute((2, 0, 1))?;
            let difference = (found - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(difference < 1e-6, "{from:?} -> {to:?}: {difference}");
            assert_eq!(bicubic_neighbours(from, to, false), 16 * to.0 * to.1);
        }
        Ok(())
    }

    #[test]
    fn antialiased_as_torch() -> Result<()> {
        // torch 2.15: interpolate(x, size, mode="bicubic", antialias=True) of lines 0, 1, 4, 9, ...
        let line = |from: usize, to: usize| {
            let x = Tensor::from_iter((0..from).map(|i| (i * i) as f32), &Device::Cpu)?.reshape((from, 1, 1))?;
            bicubic_grid(&x, (to, 1), true)?.flatten_all()?.to_vec1::<f32>()
        };
        for (found, want) in [
            (line(7, 3)?, &[0.677_419_84, 9.363_858, 28.064_514][..]),
            (line(4, 6)?, &[-0.065_789_32, 0.294_117_7, 1.361_110_8, 3.361_111_4, 6.823_53, 9.328_948][..]),
            (line(5, 5)?, &[0.0, 1.0, 4.0, 9.0, 16.0][..]),
        ] {
            assert_eq!(found.len(), want.len());
            assert!(found.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}, not {want:?}");
        }
        assert_eq!(bicubic_neighbours((8, 5), (2, 5), true), (8 + 8) * (3 + 4 + 4 + 3 + 2));
        Ok(())
    }

    #[test]
    fn empty_sizes_are_refused() -> Result<()> {
        let x = Tensor::zeros((1, 1, 3, 3), DType::F32, &Device::Cpu)?;
        assert!(bicubic(&x, (0, 3), false).unwrap_err().to_string().contains("0 x 3"));
        Ok(())
    }
}
