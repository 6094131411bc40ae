//! Images cut into patches, each projected: the entry of a vision transformer.

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

use crate::cost;
use crate::gather::RowIndex;
use crate::linear::Linear;
use crate::op;

/// A convolution whose stride is its kernel, as a product over patches. Mirrors the `projection` of
/// `transformers.ViTPatchEmbeddings`, flattened and transposed.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use roofbench_nn::patch_embed::PatchEmbed;
///
/// // one channel, patches of 1 x 2, the sum of each
/// let embed = PatchEmbed::new(&Tensor::new(&[[[[1f32, 1.]]]], &Device::Cpu)?, None)?;
/// let pixels = Tensor::new(&[[[[1f32, 2., 3., 4.], [5., 6., 7., 8.]]]], &Device::Cpu)?;
/// let patches = embed.forward(&pixels)?; // (batch, patches, hidden)
/// assert_eq!(patches.to_vec3::<f32>()?, [[[3.], [7.], [11.], [15.]]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct PatchEmbed {
    channels: usize,
    patch: (usize, usize),
    projection: Linear,
}

impl PatchEmbed {
    /// Reads `weight` (hidden, channels, patch height, patch width) and, if wanted, `bias` (hidden).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(channels: usize, hidden: usize, patch: (usize, usize), bias: bool, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((hidden, channels, patch.0, patch.1), "weight")?;
        let bias = if bias { Some(vb.get(hidden, "bias")?) } else { None };
        Self::new(&weight, bias.as_ref())
    }

    /// From `weight` (hidden, channels, patch height, patch width) and `bias` (hidden).
    ///
    /// # Errors
    /// When the shapes do not fit together or a patch is empty.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (hidden, channels, height, width) = weight.dims4()?;
        if channels * height * width == 0 {
            bail!("PatchEmbed: a weight of shape {:?} has no pixels", weight.dims())
        }
        let projection = Linear::new(&weight.reshape((hidden, channels * height * width))?, bias)?;
        Ok(Self { channels, patch: (height, width), projection })
    }

    /// Patches row by row; pixels at the right and lower edge that fill no patch are left out, as a convolution does.
    ///
    /// # Shapes
    /// (batch, channels, height, width) → (batch, patches, hidden).
    ///
    /// # Errors
    /// When the number of channels is another or the image is smaller than a patch.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        self.projection.forward(&self.patches(pixels)?)
    }

    /// The same plus `residual`, as of positions.
    ///
    /// # Shapes
    /// pixels (batch, channels, height, width), residual (batch, patches, hidden) → (batch, patches, hidden).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when the residual has not the result's shape.
    pub fn forward_add(&self, pixels: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.projection.forward_add(&self.patches(pixels)?, residual)
    }

    /// The pixels of each patch side by side: (batch, patches, channels · patch height · patch width).
    fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        let _span = cost::span("patches", None);
        let (batch, channels, height, width) = pixels.dims4()?;
        let (ph, pw) = self.patch;
        let (rows, columns) = (height / ph, width / pw);
        if channels != self.channels || rows * columns == 0 {
            let expected = format!("{} channels and at least {ph} x {pw} pixels", self.channels);
            bail!("PatchEmbed: pixels of shape {:?}, expected {expected}", pixels.dims())
        }
        let size = channels * ph * pw;
        if !op::is_cpu_f32(pixels) {
            let whole = pixels.narrow(2, 0, rows * ph)?.narrow(3, 0, columns * pw)?;
            let cut = whole.reshape(&[batch, channels, rows, ph, columns, pw])?.permute([0, 2, 4, 1, 3, 5])?;
            return cut.contiguous()?.reshape((batch, rows * columns, size));
        }
        op::apply1("patches", &pixels.contiguous()?, |storage, layout| {
            let pixels = op::elements::<f32>(storage, layout)?;
            // a part is the patches of one row of an image
            let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
                let row = begin / (columns * size);
                let (item, row) = (row / rows, row % rows);
                for (column, out) in part.chunks_exact_mut(size).enumerate() {
                    for (i, out) in out.chunks_exact_mut(pw).enumerate() {
                        let (channel, y) = (i / ph, row * ph + i % ph);
                        let begin = ((item * channels + channel) * height + y) * width + column * pw;
                        out.write_copy_of_slice(&pixels[begin..begin + pw]);
                    }
                }
            };
            #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
            // SAFETY: a part is whole patches, and each line of each patch is written.
            let patches = unsafe { op::collect_chunks(batch * rows * columns * size, columns * size, fill) };
            Ok((patches, (batch, rows * columns, size).into()))
        })
    }
}

/// Videos cut into blocks of frames and pixels, each projected: a 3-D convolution whose stride is its kernel. Mirrors
/// the `projection` of `transformers.VideoMAEPatchEmbeddings`, flattened and transposed.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use roofbench_nn::patch_embed::PatchEmbed3d;
///
/// // one channel, blocks of 2 frames of 1 x 1, the sum of each
/// let weight = Tensor::ones((1, 1, 2, 1, 1), DType::F32, &Device::Cpu)?;
/// let embed = PatchEmbed3d::new(&weight, None)?;
/// let video = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?.reshape((1, 1, 2, 1, 2))?;
/// assert_eq!(embed.forward(&video)?.to_vec3::<f32>()?, [[[4.], [6.]]]); // (batch, patches, hidden)
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct PatchEmbed3d {
    channels: usize,
    /// Frames, height, width.
    patch: [usize; 3],
    projection: Linear,
}

impl PatchEmbed3d {
    /// Reads `weight` (hidden, channels, patch frames, patch height, patch width) and, if wanted, `bias` (hidden).
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load(channels: usize, hidden: usize, patch: [usize; 3], bias: bool, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((hidden, channels, patch[0], patch[1], patch[2]), "weight")?;
        let bias = if bias { Some(vb.get(hidden, "bias")?) } else { None };
        Self::new(&weight, bias.as_ref())
    }

    /// From `weight` (hidden, channels, patch frames, patch height, patch width) and `bias` (hidden).
    ///
    /// # Errors
    /// When the shapes do not fit together or a patch is empty.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (hidden, channels, frames, height, width) = weight.dims5()?;
        let size = channels * frames * height * width;
        if size == 0 {
            bail!("PatchEmbed3d: a weight of shape {:?} has no pixels", weight.dims())
        }
        let projection = Linear::new(&weight.reshape((hidden, size))?, bias)?;
        Ok(Self { channels, patch: [frames, height, width], projection })
    }

    /// Patches by time, row and column; frames and pixels at the end that fill no patch are left out. The video may be a
    /// view, as of frames whose channels come second.
    ///
    /// # Shapes
    /// (batch, channels, frames, height, width) → (batch, patches, hidden).
    ///
    /// # Errors
    /// When the number of channels is another or the video is smaller than a patch.
    pub fn forward(&self, video: &Tensor) -> Result<Tensor> {
        self.projection.forward(&self.patches(video)?)
    }

    /// The same plus `residual`, as of positions.
    ///
    /// # Shapes
    /// video (batch, channels, frames, height, width), residual (batch, patches, hidden) → (batch, patches, hidden).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and when the residual has not the result's shape.
    pub fn forward_add(&self, video: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.projection.forward_add(&self.patches(video)?, residual)
    }

    /// The same for those of the batch · patches patches that `index` picks; the others are not projected.
    ///
    /// # Shapes
    /// video (batch, channels, frames, height, width), residual (outer, inner, hidden) as the result, the first two those
    /// of the index.
    ///
    /// # Errors
    /// As for [`forward_add`](Self::forward_add), and when the video has another number of patches than the index was made
    /// for.
    pub fn forward_rows_add(&self, video: &Tensor, index: &RowIndex, residual: &Tensor) -> Result<Tensor> {
        self.projection.forward_rows_add(&self.patches(video)?, index, residual)
    }

    /// The pixels of each patch side by side: (batch, patches, channels · patch frames · patch height · patch width).
    fn patches(&self, video: &Tensor) -> Result<Tensor> {
        let _span = cost::span("patches", None);
        let (batch, channels, frames, height, width) = video.dims5()?;
        let [pf, ph, pw] = self.patch;
        let (times, rows, columns) = (frames / pf, height / ph, width / pw);
        if channels != self.channels || times * rows * columns == 0 {
            let expected = format!("{} channels and at least {pf} frames of {ph} x {pw} pixels", self.channels);
            bail!("PatchEmbed3d: a video of shape {:?}, expected {expected}", video.dims())
        }
        let (count, size) = (times * rows * columns, channels * pf * ph * pw);
        if !op::is_cpu_f32(video) || video.stride()[4] != 1 {
            let whole = video.narrow(2, 0, times * pf)?.narrow(3, 0, rows * ph)?.narrow(4, 0, columns * pw)?;
            let cut = whole.reshape(&[batch, channels, times, pf, rows, ph, columns, pw])?;
            return cut.permute([0, 2, 4, 6, 1, 3, 5, 7])?.contiguous()?.reshape((batch, count, size));
        }
        op::apply1("video-patches", video, |storage, layout| {
            let pixels = storage.as_slice::<f32>()?.get(layout.start_offset()..).unwrap_or_default();
            let strides = layout.stride();
            // a part is a line of patches
            let fill = |begin: usize, part: &mut [MaybeUninit<f32>]| {
                let line = begin / (columns * size);
                let (item, time, row) = (line / rows / times, line / rows % times, line % rows);
                for (column, out) in part.chunks_exact_mut(size).enumerate() {
                    for (i, out) in out.chunks_exact_mut(pw).enumerate() {
                        let (channel, frame, y) = (i / ph / pf, time * pf + i / ph % pf, row * ph + i % ph);
                        let line = [item, channel, frame, y].into_iter().zip(strides).map(|(at, stride)| at * stride);
                        let begin = line.sum::<usize>() + column * pw;
                        out.write_copy_of_slice(&pixels[begin..begin + pw]);
                    }
                }
            };
            #[expect(unsafe_code, reason = "the closure fills what is handed to it")]
            // SAFETY: a part is whole patches, and each line of each patch is written.
            let patches = unsafe { op::collect_chunks(batch * count * size, columns * size, fill) };
            Ok((patches, (batch, count, size).into()))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn equals_the_convolution() -> Result<()> {
        let cpu = &Device::Cpu;
        for (channels, hidden, patch, (height, width)) in
            [(3, 40, (16, 16), (64, 48)), (1, 5, (3, 2), (10, 7)), (3, 7, (4, 4), (7, 18)), (2, 3, (1, 1), (5, 5))]
        {
            // whole numbers of little size, whose sums f32 holds exactly in any order
            let whole = |shape: &[usize], step: usize| {
                let count: usize = shape.iter().product();
                Tensor::from_iter((0..count).map(|i| (i * step % 17) as f32 - 8.0), cpu)?.reshape(shape)
            };
            let weight = whole(&[hidden, channels, patch.0, patch.1], 5)?;
            let bias = whole(&[hidden], 3)?;
            let pixels = whole(&[2, channels, height, width], 7)?;
            let got = PatchEmbed::new(&weight, Some(&bias))?.forward(&pixels)?;
            // candle's convolution knows one stride for both directions
            let unit = pixels.conv2d(&weight, 0, 1, 1, 1)?;
            let pick = |n: usize, step: usize| Tensor::arange_step(0u32, (n * step) as u32, step as u32, cpu);
            let (rows, columns) = (height / patch.0, width / patch.1);
            let conv = unit.index_select(&pick(rows, patch.0)?, 2)?.index_select(&pick(columns, patch.1)?, 3)?;
            let want = conv.flatten(2, 3)?.transpose(1, 2)?.broadcast_add(&bias)?;
            assert_eq!(got.to_vec3::<f32>()?, want.to_vec3::<f32>()?);
        }
        Ok(())
    }

    #[test]
    fn a_video_is_the_sum_of_its_frames_patches() -> Result<()> {
        let cpu = &Device::Cpu;
        let weight = Tensor::randn(0f32, 0.1, (7, 3, 2, 4, 5), cpu)?;
        let bias = Tensor::randn(0f32, 1.0, 7, cpu)?;
        let video = Tensor::randn(0f32, 1.0, (2, 3, 5, 9, 10), cpu)?;
        let got = PatchEmbed3d::new(&weight, Some(&bias))?.forward(&video)?;
        assert_eq!(got.dims(), [2, 2 * 2 * 2, 7]);
        // each frame of a block by an image's embedding
        let embed = |tap: usize| PatchEmbed::new(&weight.narrow(2, tap, 1)?.squeeze(2)?, None);
        for time in 0..2 {
            let frame = |tap: usize| embed(tap)?.forward(&video.narrow(2, 2 * time + tap, 1)?.squeeze(2)?);
            let want = (frame(0)? + frame(1)?)?.broadcast_add(&bias)?;
            let difference = (got.narrow(1, 4 * time, 4)? - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // sums of 120 products of size 0.1 in another order
            assert!(difference < 1e-5, "{difference}");
        }
        let error = PatchEmbed3d::new(&weight, None)?.forward(&video.narrow(2, 0, 1)?).unwrap_err().to_string();
        assert!(error.contains("[2, 3, 1, 9, 10]") && error.contains("2 frames"), "{error}");
        Ok(())
    }

    #[test]
    fn both_ways_of_cutting_agree() -> Result<()> {
        let embed = PatchEmbed::new(&Tensor::ones((1, 3, 2, 5), DType::F32, &Device::Cpu)?, None)?;
        let pixels = Tensor::arange(0f32, 2. * 3. * 7. * 11., &Device::Cpu)?.reshape((2, 3, 7, 11))?;
        let plain = embed.patches(&pixels.to_dtype(DType::F64)?)?.to_dtype(DType::F32)?;
        assert_eq!(embed.patches(&pixels)?.to_vec3::<f32>()?, plain.to_vec3::<f32>()?);
        let (once, twice) = (embed.forward(&pixels)?, embed.forward_add(&pixels, &embed.forward(&pixels)?)?);
        assert_eq!(twice.to_vec3::<f32>()?, (once * 2.0)?.to_vec3::<f32>()?);
        let error = embed.forward(&pixels.narrow(1, 0, 2)?).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("[2, 2, 7, 11]") && error.contains("3 channels"), "{error}");
        Ok(())
    }

    #[test]
    fn both_ways_of_cutting_a_video_agree() -> Result<()> {
        let cpu = &Device::Cpu;
        let embed = PatchEmbed3d::new(&Tensor::randn(0f32, 0.1, (6, 3, 2, 2, 3), cpu)?, None)?;
        // frames whose channels come second, one frame repeated, and a whole tensor
        let frames = Tensor::randn(0f32, 1.0, (2, 5, 3, 7, 8), cpu)?;
        let repeated = frames.narrow(1, 1, 1)?.broadcast_as((2, 4, 3, 7, 8))?;
        for video in [frames.transpose(1, 2)?, repeated.transpose(1, 2)?, frames.narrow(1, 0, 3)?.contiguous()?] {
            let plain = embed.patches(&video.to_dtype(DType::F64)?)?.to_dtype(DType::F32)?;
            assert_eq!(embed.patches(&video)?.to_vec3::<f32>()?, plain.to_vec3::<f32>()?);
            let all = embed.forward(&video)?;
            let twice = embed.forward_add(&video, &all)?;
            assert_eq!(twice.to_vec3::<f32>()?, (&all * 2.0)?.to_vec3::<f32>()?);
            let count = all.dim(1)?;
            let index = RowIndex::new(2 * count, (2, 1), [Some(1), Some(2 * count - 1)])?;
            let row = |item: usize, patch: usize| all.narrow(0, item, 1)?.narrow(1, patch, 1);
            let picked = Tensor::cat(&[row(0, 1)?, row(1, count - 1)?], 0)?;
            let twice = embed.forward_rows_add(&video, &index, &picked)?;
            let error = (twice - (picked * 2.0)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            // sums of 36 products of size 0.1 in another order
            assert!(error < 1e-5, "{error}");
        }
        Ok(())
    }
}
