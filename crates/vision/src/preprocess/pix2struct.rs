//! Pictures to patches of which as many as possible are whole, each with its row and column. Mirrors
//! `transformers.Pix2StructImageProcessor`, which normalises a picture by its own mean and deviation and resizes numbers,
//! not levels of 8 bits.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_nn::resize::bilinear_grid;
use serde::Deserialize;
use serde_json::Value;

use super::{MAX_PIXELS, Size, SizeField, load_rgb, refuse};
use crate::image_io::Transparency;

const CHANNELS: usize = 3;

/// `preprocessor_config.json` as it is written; a field that is `null` counts as left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    do_convert_rgb: Option<bool>,
    do_normalize: Option<bool>,
    max_patches: Option<u32>,
    patch_size: Option<SizeField>,
    is_vqa: Option<bool>,
}

/// Prepares pictures for Pix2Struct.
///
/// ```
/// use roofbench_vision::preprocess::pix2struct::Pix2StructProcessor;
/// let config = serde_json::json!({"max_patches": 3, "patch_size": {"height": 2, "width": 2}});
/// let processor = Pix2StructProcessor::from_config(&config)?;
/// let grey = image::RgbImage::from_pixel(5, 5, image::Rgb([90; 3]));
/// let (patches, count) = processor.prepare(&grey)?;
/// assert_eq!((patches.dims(), count), (&[3, 2 + 12][..], 1)); // four would be too many
/// assert_eq!(patches.to_vec2::<f32>()?[0][..3], [1.0, 1.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Pix2StructProcessor {
    transparency: Transparency,
    normalizes: bool,
    max_patches: u32,
    /// Height and width of a patch.
    patch: [u32; 2],
}

impl Pix2StructProcessor {
    /// Reads `config`, the `preprocessor_config.json` of a checkpoint.
    ///
    /// # Errors
    /// [`SessionError::Preprocessor`] names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let config: Config = serde_path_to_error::deserialize(config).map_err(|error| SessionError::Preprocessor {
            field: error.path().to_string(),
            reason: error.into_inner().to_string(),
        })?;
        if config.is_vqa == Some(true) {
            let reason =
                "true is not supported: it draws the question over the picture, in letters of a font of its own";
            return refuse("is_vqa", reason);
        }
        let patch = match config.patch_size.map(|size| size.read("patch_size", |side| Size::Exact([side, side]))) {
            None => [16, 16],
            Some(Ok(Size::Exact(patch))) => patch,
            Some(Ok(_)) => return refuse("patch_size", "needs height and width"),
            Some(Err(error)) => return Err(error),
        };
        let max_patches = config.max_patches.unwrap_or(2048);
        let pixels = u64::from(max_patches).saturating_mul(u64::from(patch[0]) * u64::from(patch[1]));
        if !(1..=MAX_PIXELS).contains(&pixels) {
            return refuse("max_patches", format!("is {pixels} pixels in all; it must be 1 to {MAX_PIXELS}"));
        }
        let transparency = match config.do_convert_rgb {
            Some(false) => Transparency::Dropped,
            _ => Transparency::OverWhite,
        };
        Ok(Self { transparency, normalizes: config.do_normalize.unwrap_or(true), max_patches, patch })
    }

    /// The patches of one picture, row by row, and how many there are: the rest is 0.
    ///
    /// # Shapes
    /// (max_patches, 2 + height · width · 3) f32 on the CPU: row and column from 1 on, then pixels.
    ///
    /// # Errors
    /// When the picture is empty.
    pub fn prepare(&self, picture: &RgbImage) -> Result<(Tensor, usize), SessionError> {
        let (width, height) = picture.dimensions();
        if picture.is_empty() {
            let reason = format!("the picture is {height} x {width} pixels, which is empty");
            return Err(SessionError::input("images", reason));
        }
        let levels = self.levels(picture.as_raw());
        let values: Vec<f32> = picture.as_raw().iter().map(|level| levels[usize::from(*level)]).collect();
        let pixels = Tensor::from_vec(values, (height as usize, width as usize, CHANNELS), &Device::Cpu)?;
        let [rows, columns] = self.grid(height, width);
        let [down, across] = self.patch.map(|side| side as usize);
        let pixels = bilinear_grid(&pixels, (rows * down, columns * across))?;
        let count = rows * columns;
        let patches = pixels.reshape((rows, down, columns, across * CHANNELS))?.transpose(1, 2)?;
        let patches = patches.reshape((count, down * across * CHANNELS))?;
        let places = (0..count).flat_map(|patch| [patch / columns, patch % columns]).map(|place| (place + 1) as f32);
        let places = Tensor::from_vec(places.collect::<Vec<_>>(), (count, 2), &Device::Cpu)?;
        let patches = Tensor::cat(&[&places, &patches], 1)?.pad_with_zeros(0, 0, self.max_patches as usize - count)?;
        Ok((patches, count))
    }

    /// The value of each level, by the mean and the deviation of all.
    fn levels(&self, pixels: &[u8]) -> [f32; 256] {
        let levels: [f32; 256] = std::array::from_fn(|level| level as f32);
        if !self.normalizes {
            return levels;
        }
        let mut counts = [0u64; 256];
        pixels.iter().for_each(|level| counts[usize::from(*level)] += 1);
        let average = |f: &dyn Fn(f64) -> f64| {
            let sum: f64 = counts.iter().enumerate().map(|(level, count)| *count as f64 * f(level as f64)).sum();
            sum / pixels.len() as f64
        };
        let mean = average(&|level| level);
        let deviation = average(&|level| (level - mean) * (level - mean)).sqrt();
        let deviation = deviation.max((pixels.len() as f64).sqrt().recip());
        levels.map(|level| (level - mean as f32) / deviation as f32)
    }

    /// Rows and columns of patches, in the proportions of the picture, of which there are no more than `max_patches`.
    fn grid(&self, height: u32, width: u32) -> [usize; 2] {
        let [most, height, width] = [self.max_patches, height, width].map(f64::from);
        let [down, across] = self.patch.map(f64::from);
        let scale = (most * (down / height) * (across / width)).sqrt();
        [scale * height / down, scale * width / across]
            .map(|count| (count as usize).clamp(1, self.max_patches as usize))
    }

    /// Reads and prepares picture files: `flattened_patches`, and `attention_mask`, which is 0 beyond a picture's own.
    ///
    /// # Shapes
    /// (batch, max_patches, 2 + height · width · 3) and (batch, max_patches), f32 on the CPU.
    ///
    /// # Errors
    /// Names the file that can't be read, or the argument when there is none.
    pub fn prepare_batch(&self, files: &[PathBuf]) -> Result<Tensors, SessionError> {
        if files.is_empty() {
            return Err(SessionError::input("images", "is empty; give at least one file"));
        }
        let (mut patches, mut masks) = (Vec::with_capacity(files.len()), Vec::with_capacity(files.len()));
        for path in files {
            let (of_picture, count) = self.prepare(&load_rgb(path, self.transparency)?)?;
            let exist = Tensor::ones(count, DType::F32, &Device::Cpu)?;
            masks.push(exist.pad_with_zeros(0, 0, self.max_patches as usize - count)?);
            patches.push(of_picture);
        }
        let (patches, masks) = (Tensor::stack(&patches, 0)?, Tensor::stack(&masks, 0)?);
        Ok([("flattened_patches".to_owned(), patches), ("attention_mask".to_owned(), masks)].into())
    }
}

impl Processor for Pix2StructProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        if method != "preprocess" {
            let reason = format!("`{method}` is not supported; supported: preprocess");
            return Err(SessionError::input("method", reason));
        }
        let patches = arguments.get("max_patches");
        let unknown = arguments.keys().find(|name| *name != "max_patches");
        if let Some(name) = unknown.or(inputs.keys().next()).or(files.keys().find(|name| *name != "images")) {
            return Err(SessionError::input(name, "is not supported; supported: images, as files, and max_patches"));
        }
        let images = files.get("images").map(Vec::as_slice).unwrap_or_default();
        match patches {
            None | Some(Value::Null) => self.prepare_batch(images),
            Some(patches) => {
                let [height, width] = self.patch;
                let other = serde_json::json!({
                    "max_patches": patches, "patch_size": {"height": height, "width": width},
                    "do_normalize": self.normalizes, "do_convert_rgb": self.transparency == Transparency::OverWhite,
                });
                Self::from_config(&other)?.prepare_batch(images)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use serde_json::json;

    use super::*;

    fn processor(config: Value) -> Pix2StructProcessor {
        Pix2StructProcessor::from_config(&config).expect("a config")
    }

    #[test]
    fn patches_are_cut_row_by_row() -> Result<(), SessionError> {
        let raw = processor(json!({"max_patches": 2, "patch_size": {"height": 1, "width": 2}, "do_normalize": false}));
        // as large as its patches, so that resizing changes nothing
        let picture = RgbImage::from_fn(2, 2, |x, y| Rgb([0, 1, 2].map(|c| (6 * y + 3 * x + c) as u8)));
        let (patches, count) = raw.prepare(&picture)?;
        assert_eq!(count, 2);
        assert_eq!(patches.to_vec2::<f32>()?, [[1., 1., 0., 1., 2., 3., 4., 5.], [2., 1., 6., 7., 8., 9., 10., 11.]]);
        Ok(())
    }

    #[test]
    fn as_many_patches_as_fit() {
        let of = |most: u32| processor(json!({"max_patches": most, "patch_size": 4}));
        assert_eq!(of(30).grid(43, 57), [4, 6]);
        assert_eq!(of(12).grid(4, 4000), [1, 12]); // at least one row, no more columns than patches
        assert_eq!(of(1).grid(50, 50), [1, 1]);
    }

    #[test]
    fn bad_fields_are_named() {
        for (config, field) in [
            (json!({"is_vqa": true}), "is_vqa"),
            (json!({"max_patches": 0}), "max_patches"),
            (json!({"max_patches": 4_000_000_000u32}), "max_patches"),
            (json!({"patch_size": {"shortest_edge": 4}}), "patch_size"),
            (json!({"patch_size": "4"}), "patch_size"),
        ] {
            match Pix2StructProcessor::from_config(&config) {
                Err(SessionError::Preprocessor { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{config}: {other:?}"),
            }
        }
        let call = |method: &str, argument: &str| {
            let arguments = [(argument.to_owned(), json!(3))].into_iter().collect();
            let answer = processor(json!({})).call(method, &BTreeMap::new(), &Tensors::new(), &arguments);
            answer.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(call("postprocess", "max_patches").contains("`method`"));
        assert!(call("preprocess", "header_text").contains("`header_text`"));
        assert!(call("preprocess", "max_patches").contains("at least one file"));
    }
}
