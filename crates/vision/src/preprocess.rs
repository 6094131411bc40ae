//! Pictures to `pixel_values`, as a checkpoint's `preprocessor_config.json` says.
//!
//! One pipeline serves every processor of `transformers`: convert to RGB, resize, crop, rescale, normalise. What tells
//! them apart are the defaults of fields that a config leaves out (`KINDS`). Both forms of the file are read: the
//! old one (`"size": 224`, `feature_extractor_type`) and the new one (`"size": {"height": …}`, `image_processor_type`).
//! Mirrors the Pillow backend of `transformers` 5.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use image::imageops::replace;
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use serde::Deserialize;
use serde_json::Value;

use crate::image_io::{MAX_PIXELS, Transparency, load_rgb};
use crate::resize::{Filter, resize};

mod donut;
pub mod pix2struct;
pub mod sam;

use donut::Page;

/// Colours of every picture that is prepared: red, green and blue.
pub const CHANNELS: usize = 3;

/// Defaults of a processor class.
struct Kind {
    /// Its name without `ImageProcessor` or `FeatureExtractor`.
    name: &'static str,
    /// Models that use it where the config doesn't say: `model_type` or class, lower case, letters and digits only.
    models: &'static [&'static str],
    size: Size,
    /// A plain number as `size` is both sides, not the shorter one.
    number_is_square: bool,
    resample: Filter,
    /// Crop size where `crop_size` is left out; `None` where cropping is off unless asked for.
    crop: Option<[u32; 2]>,
    mean: [f64; 3],
    std: [f64; 3],
    /// Transparent pictures are laid over white.
    convert_rgb: bool,
    /// Part of the resized picture that is kept below 384 pixels, for processors that have `crop_pct`.
    crop_pct: Option<f64>,
    /// Pictures of a batch are padded to one size, and a mask says where there is a picture.
    pad: bool,
    /// The size names the longer side, and a class of its own fills pictures up.
    longest_edge: bool,
    /// Both sides are cut down to multiples of `size_divisor`, which is this where it is left out.
    divisor: Option<u32>,
    /// The class reads the words of a page unless `apply_ocr` is false.
    ocr: bool,
    /// The size is that of a page, into which the picture is laid.
    page: bool,
}

const HALF: [f64; 3] = [0.5; 3];
const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

const VIT: Kind = Kind {
    name: "ViT",
    models: &["vit", "swin", "swinv2"],
    size: Size::Exact([224, 224]),
    number_is_square: true,
    resample: Filter::Bilinear,
    crop: None,
    mean: HALF,
    std: HALF,
    convert_rgb: false,
    crop_pct: None,
    pad: false,
    longest_edge: false,
    divisor: None,
    ocr: false,
    page: false,
};
const CLIP: Kind = Kind {
    name: "CLIP",
    models: &["clip", "llava", "git"],
    size: Size::ShortestEdge(224),
    number_is_square: false,
    resample: Filter::Bicubic,
    crop: Some([224, 224]),
    mean: CLIP_MEAN,
    std: CLIP_STD,
    convert_rgb: true,
    crop_pct: None,
    pad: false,
    longest_edge: false,
    divisor: None,
    ocr: false,
    page: false,
};

/// Every processor that is known. A new one is its difference from one of these.
const KINDS: &[Kind] = &[
    VIT,
    CLIP,
    Kind { name: "Bit", models: &["dinov2", "dinov2withregisters"], ..CLIP },
    Kind {
        name: "ConvNext",
        models: &["convnext", "convnextv2", "resnet"],
        size: Size::ShortestEdge(384),
        number_is_square: false,
        resample: Filter::Bicubic,
        crop_pct: Some(224.0 / 256.0),
        ..VIT
    },
    Kind {
        name: "Detr",
        models: &["detr"],
        size: Size::Within { shortest: 800, longest: 1333 },
        number_is_square: false,
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
        pad: true,
        ..VIT
    },
    Kind {
        name: "Sam",
        models: &["sam"],
        size: Size::LongestEdge(1024),
        number_is_square: true,
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
        convert_rgb: true,
        longest_edge: true,
        ..VIT
    },
    Kind { name: "Donut", models: &["donut"], size: Size::Exact([2560, 1920]), page: true, ..VIT },
    Kind {
        name: "Vilt",
        models: &["vilt"],
        size: Size::ShortestEdge(384),
        number_is_square: false,
        resample: Filter::Bicubic,
        pad: true,
        divisor: Some(32),
        ..VIT
    },
    Kind {
        name: "Flava",
        models: &["flava"],
        size: Size::Exact([224, 224]),
        number_is_square: true,
        convert_rgb: false,
        ..CLIP
    },
    Kind { name: "LayoutLMv3", models: &["layoutlm", "layoutlmv3"], ocr: true, ..VIT },
    Kind {
        name: "Blip",
        models: &["blip", "blip2", "instructblip"],
        size: Size::Exact([384, 384]),
        number_is_square: true,
        crop: None,
        ..CLIP
    },
    Kind {
        name: "VideoMAE",
        models: &["videomae"],
        resample: Filter::Bilinear,
        mean: HALF,
        std: HALF,
        convert_rgb: false,
        ..CLIP
    },
];

/// What a picture is resized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// Height and width, whatever the picture's proportions.
    Exact([u32; 2]),
    /// The shorter side; the other follows.
    ShortestEdge(u32),
    /// The shorter side, unless the longer one would exceed `longest`.
    Within { shortest: u32, longest: u32 },
    /// The longer side; the other follows.
    LongestEdge(u32),
    /// The shorter side, unless the longer one would exceed 1333 / 800 of it; both cut down to multiples of `divisor`.
    Multiple { shortest: u32, divisor: u32 },
}

impl Size {
    /// Height and width for a picture of `height` × `width`, rounded as the reference rounds them.
    fn for_picture(self, height: u32, width: u32) -> [u64; 2] {
        // quotients in f64, cut off, as Python's `int(a * b / c)`
        let scaled = |edge: f64, long: u32, short: u32| (edge * f64::from(long) / f64::from(short)) as u64;
        let by_short = |short: u64, edge: f64| {
            if width <= height { [scaled(edge, height, width), short] } else { [short, scaled(edge, width, height)] }
        };
        match self {
            Self::LongestEdge(edge) => {
                let scale = f64::from(edge) / f64::from(height.max(width));
                [height, width].map(|side| (f64::from(side) * scale + 0.5) as u64)
            }
            Self::Multiple { shortest, divisor } => {
                let longest = (1333.0 / 800.0 * f64::from(shortest)) as u64 as f64;
                let scale = f64::from(shortest) / f64::from(height.min(width));
                let scaled = |side: u32, is_short: bool| {
                    if is_short { f64::from(shortest) } else { scale * f64::from(side) }
                };
                let sides = [scaled(height, height < width), scaled(width, width <= height)];
                let over = sides[0].max(sides[1]);
                let shrink = if over > longest { longest / over } else { 1.0 };
                let divisor = u64::from(divisor);
                sides.map(|side| (side * shrink + 0.5) as u64 / divisor * divisor)
            }
            Self::Exact([height, width]) => [height.into(), width.into()],
            Self::ShortestEdge(edge) => by_short(edge.into(), edge.into()),
            Self::Within { shortest, longest } => {
                let (short, long) = (f64::from(height.min(width)), f64::from(height.max(width)));
                if long / short * f64::from(shortest) > f64::from(longest) {
                    let edge = f64::from(longest) * short / long;
                    let rounded = edge.round_ties_even() as u64;
                    // a picture that fits already keeps its size
                    if short as u64 == rounded { [height.into(), width.into()] } else { by_short(rounded, edge) }
                } else {
                    by_short(shortest.into(), shortest.into())
                }
            }
        }
    }
}

/// `preprocessor_config.json` as it is written; a field that is `null` counts as left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    do_convert_rgb: Option<bool>,
    do_resize: Option<bool>,
    size: Option<SizeField>,
    max_size: Option<u32>,
    resample: Option<u64>,
    crop_pct: Option<f64>,
    do_center_crop: Option<bool>,
    crop_size: Option<SizeField>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<PerChannel>,
    image_std: Option<PerChannel>,
    do_pad: Option<bool>,
    /// `do_pad` in older files.
    pad_and_return_pixel_mask: Option<bool>,
    pad_size: Option<SizeField>,
    size_divisor: Option<u32>,
    apply_ocr: Option<bool>,
    data_format: Option<String>,
    do_thumbnail: Option<bool>,
    do_align_long_axis: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, [height, width] or an object such as {\"height\": 224, \"width\": 224}"
)]
enum SizeField {
    Number(u32),
    Pair([u32; 2]),
    Named(BTreeMap<String, Option<u32>>),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected a number or three of them, for red, green and blue")]
enum PerChannel {
    All(f64),
    Each([f64; 3]),
}

impl PerChannel {
    fn values(self) -> [f64; 3] {
        match self {
            Self::All(value) => [value; 3],
            Self::Each(values) => values,
        }
    }
}

fn refuse<T>(field: &str, reason: impl Into<String>) -> Result<T, SessionError> {
    Err(SessionError::Preprocessor { field: field.into(), reason: reason.into() })
}

impl SizeField {
    /// `number` reads the form that is a plain number.
    fn read(&self, field: &str, number: impl Fn(u32) -> Size) -> Result<Size, SessionError> {
        let size = match self {
            Self::Number(edge) => number(*edge),
            Self::Pair(size) => Size::Exact(*size),
            Self::Named(named) => {
                let named: Vec<(&str, u32)> =
                    named.iter().filter_map(|(key, value)| Some((key.as_str(), (*value)?))).collect();
                match named[..] {
                    [("height", height), ("width", width)] => Size::Exact([height, width]),
                    [("shortest_edge", edge)] => Size::ShortestEdge(edge),
                    [("longest_edge", edge)] => Size::LongestEdge(edge),
                    [("longest_edge", longest), ("shortest_edge", shortest)] => Size::Within { shortest, longest },
                    _ => {
                        let keys: Vec<&str> = named.iter().map(|(key, _)| *key).collect();
                        let reason = format!(
                            "has the keys {keys:?}; supported: height and width, shortest_edge, longest_edge, \
                             shortest_edge and longest_edge"
                        );
                        return refuse(field, reason);
                    }
                }
            }
        };
        let sides = match size {
            Size::Exact(sides) => sides,
            Size::ShortestEdge(edge) | Size::LongestEdge(edge) | Size::Multiple { shortest: edge, .. } => [edge, edge],
            Size::Within { shortest, longest } => [shortest, longest],
        };
        if sides.contains(&0) || sides.iter().map(|side| u64::from(*side)).product::<u64>() > MAX_PIXELS {
            return refuse(field, format!("is {} x {}; it must be 1 to {MAX_PIXELS} pixels", sides[0], sides[1]));
        }
        Ok(size)
    }
}

/// Prepares pictures for a model.
///
/// ```
/// use roofbench_vision::preprocess::ImageProcessor;
/// let config = serde_json::json!({"size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]});
/// let processor = ImageProcessor::from_config(&config, "vit")?;
/// let white = image::RgbImage::from_pixel(7, 5, image::Rgb([255; 3]));
/// let pixel_values = processor.prepare(&white)?;
/// assert_eq!(pixel_values.to_vec3::<f32>()?, vec![vec![vec![1.0; 2]; 2]; 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    transparency: Transparency,
    resize: Option<(Size, Filter)>,
    /// Central parts to cut out in turn; height and width.
    crops: Vec<[u32; 2]>,
    /// The value of every channel's levels 0 to 255.
    values: [Vec<f32>; 3],
    pad: Option<Pad>,
    /// The page that pictures are laid into, instead of what `resize`, `crops` and `pad` say.
    page: Option<Page>,
}

/// To what the pictures of a batch are padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pad {
    /// The largest height and the largest width among them.
    Largest,
    /// Height and width.
    To([u32; 2]),
}

impl ImageProcessor {
    /// Reads `config`, the `preprocessor_config.json` of a checkpoint. `model` (`model_type`, or a class of model or
    /// processor) decides the defaults where the config names no processor.
    ///
    /// # Errors
    /// [`SessionError::Preprocessor`] names the field that is malformed, contradicts another, or is not supported.
    pub fn from_config(config: &Value, model: &str) -> Result<Self, SessionError> {
        let config: Config = serde_path_to_error::deserialize(config).map_err(|error| SessionError::Preprocessor {
            field: error.path().to_string(),
            reason: error.into_inner().to_string(),
        })?;
        let kind = kind(&config, model)?;
        if let Some(format) = config.data_format.as_deref().filter(|format| *format != "channels_first") {
            return refuse("data_format", format!("`{format}` is not supported; supported: channels_first"));
        }
        let convert = config.do_convert_rgb.unwrap_or(kind.convert_rgb);
        let transparency = if convert { Transparency::OverWhite } else { Transparency::Dropped };
        if kind.page {
            let (values, page) = (values(&config, kind)?, Some(Page::read(&config, kind)?));
            return Ok(Self { transparency, resize: None, crops: Vec::new(), values, pad: None, page });
        }
        let pad = match (config.do_pad.or(config.pad_and_return_pixel_mask).unwrap_or(kind.pad), &config.pad_size) {
            (false, _) => None,
            (true, _) if kind.longest_edge => None,
            (true, _) if !kind.pad => return refuse("do_pad", format!("true is not supported for {}", kind.name)),
            (true, None) => Some(Pad::Largest),
            (true, Some(size)) => match size.read("pad_size", |side| Size::Exact([side, side]))? {
                Size::Exact(size) => Some(Pad::To(size)),
                _ => return refuse("pad_size", "needs height and width"),
            },
        };
        if kind.ocr && config.apply_ocr != Some(false) {
            let reason = "true, the default, is not supported: set it to false, and give the words and their boxes";
            return refuse("apply_ocr", reason);
        }
        let mut crops = Vec::new();
        let resize = match config.do_resize {
            Some(false) => None,
            _ => Some((resize_target(&config, kind, &mut crops)?, filter(&config, kind)?)),
        };
        if config.do_center_crop.unwrap_or(kind.crop.is_some()) {
            crops.push(match (&config.crop_size, kind.crop) {
                (Some(size), _) => match size.read("crop_size", |side| Size::Exact([side, side]))? {
                    Size::Exact(size) => size,
                    _ => return refuse("crop_size", "needs height and width"),
                },
                (None, Some(size)) => size,
                (None, None) => return refuse("crop_size", "is missing, but do_center_crop is true"),
            });
        }
        Ok(Self { transparency, resize, crops, values: values(&config, kind)?, pad, page: None })
    }

    /// Prepares one picture.
    ///
    /// # Shapes
    /// (3, height, width) f32 on the CPU.
    ///
    /// # Errors
    /// The picture is empty, or so narrow that resizing it would exceed [`MAX_PIXELS`].
    pub fn prepare(&self, picture: &RgbImage) -> Result<Tensor, SessionError> {
        let refuse = |reason| SessionError::Input { name: "images".into(), reason };
        let (width, height) = picture.dimensions();
        if picture.is_empty() {
            return Err(refuse(format!("the picture is {height} x {width} pixels, which is empty")));
        }
        let resized = match self.resize {
            None => self.page.as_ref().map(|page| page.lay_out(picture)).transpose()?,
            Some((size, filter)) => {
                let [new_height, new_width] = size.for_picture(height, width);
                if new_height == 0 || new_width == 0 || new_height.saturating_mul(new_width) > MAX_PIXELS {
                    let reason = format!(
                        "{height} x {width} pixels would be resized to {new_height} x {new_width}; \
                         it must be 1 to {MAX_PIXELS} pixels"
                    );
                    return Err(refuse(reason));
                }
                // both are at most MAX_PIXELS
                Some(resize(picture, new_height as u32, new_width as u32, filter))
            }
        };
        let cropped = self.crops.iter().fold(resized, |picture_so_far, [height, width]| {
            Some(centre_crop(picture_so_far.as_ref().unwrap_or(picture), *height, *width))
        });
        let picture = cropped.as_ref().unwrap_or(picture);
        let pixels = picture.as_raw();
        let values: Vec<f32> = (0..3)
            .flat_map(|c| pixels[c..].iter().step_by(3).map(move |level| self.values[c][usize::from(*level)]))
            .collect();
        let (width, height) = picture.dimensions();
        Ok(Tensor::from_vec(values, (3, height as usize, width as usize), &Device::Cpu)?)
    }

    /// Reads and prepares picture files.
    ///
    /// # Shapes
    /// (batch, 3, height, width) f32 on the CPU.
    ///
    /// # Errors
    /// Names the file that can't be read, or whose prepared size differs from the first one's.
    pub fn prepare_files(&self, files: &[PathBuf]) -> Result<Tensor, SessionError> {
        let batch = self.prepare_each(files)?;
        for (path, pixels) in files.iter().zip(&batch) {
            if pixels.dims() != batch[0].dims() {
                let reason = format!(
                    "is {:?} when prepared, the first picture {:?}; pictures of a batch must have one size",
                    pixels.dims(),
                    batch[0].dims()
                );
                return Err(SessionError::File { path: path.clone(), reason });
            }
        }
        Ok(Tensor::stack(&batch, 0)?)
    }

    /// Reads and prepares picture files, and pads them where the config says so: `pixel_values` and, where it does,
    /// `pixel_mask`, which is 0 in the padding.
    ///
    /// # Shapes
    /// (batch, 3, height, width) f32 and (batch, height, width) i64 on the CPU.
    ///
    /// # Errors
    /// As for [`prepare_files`](Self::prepare_files), and when a picture is larger than `pad_size`.
    pub fn prepare_batch(&self, files: &[PathBuf]) -> Result<Tensors, SessionError> {
        let Some(pad) = self.pad else {
            return Ok([("pixel_values".to_owned(), self.prepare_files(files)?)].into());
        };
        let batch = self.prepare_each(files)?;
        let size = |pixels: &Tensor| [pixels.dims()[1], pixels.dims()[2]];
        let largest = |axis: usize| batch.iter().map(|pixels| size(pixels)[axis]).max().unwrap_or_default();
        let [height, width] = match pad {
            Pad::Largest => [largest(0), largest(1)],
            Pad::To(size) => size.map(|side| side as usize),
        };
        let (mut values, mut masks) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for (path, pixels) in files.iter().zip(&batch) {
            let [rows, columns] = size(pixels);
            let (Some(below), Some(right)) = (height.checked_sub(rows), width.checked_sub(columns)) else {
                let reason = format!("is {rows} x {columns} when prepared, pad_size is {height} x {width}");
                return Err(SessionError::File { path: path.clone(), reason });
            };
            let mask = Tensor::ones((rows, columns), DType::I64, &Device::Cpu)?;
            let padded = |x: &Tensor| {
                let axis = x.rank() - 2;
                x.pad_with_zeros(axis, 0, below)?.pad_with_zeros(axis + 1, 0, right)
            };
            values.push(padded(pixels)?);
            masks.push(padded(&mask)?);
        }
        let (values, masks) = (Tensor::stack(&values, 0)?, Tensor::stack(&masks, 0)?);
        Ok([("pixel_values".to_owned(), values), ("pixel_mask".to_owned(), masks)].into())
    }

    /// Each picture by itself, at least one.
    fn prepare_each(&self, files: &[PathBuf]) -> Result<Vec<Tensor>, SessionError> {
        if files.is_empty() {
            let reason = "is empty; give at least one file".into();
            return Err(SessionError::Input { name: "images".into(), reason });
        }
        let prepared = |path: &PathBuf| {
            self.prepare(&load_rgb(path, self.transparency)?).map_err(|error| match error {
                SessionError::Input { reason, .. } => SessionError::File { path: path.clone(), reason },
                other => other,
            })
        };
        files.iter().map(prepared).collect()
    }
}

impl Processor for ImageProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let refuse = |name: &str, reason: &str| Err(SessionError::Input { name: name.into(), reason: reason.into() });
        if method != "preprocess" {
            return refuse("method", &format!("`{method}` is not supported; supported: preprocess"));
        }
        if let Some(name) = inputs.keys().chain(arguments.keys()).chain(files.keys()).find(|name| *name != "images") {
            return refuse(name, "is not supported; supported: images, as files");
        }
        let Some(images) = files.get("images") else { return refuse("images", "is missing; give at least one file") };
        self.prepare_batch(images)
    }
}

/// The processor that the config names, else the model's.
fn kind(config: &Config, model: &str) -> Result<&'static Kind, SessionError> {
    let stem = |name: &str| {
        let end = ["ImageProcessor", "FeatureExtractor"].iter().filter_map(|suffix| name.find(suffix)).min();
        name[..end.unwrap_or(name.len())].to_owned()
    };
    let named = [
        ("image_processor_type", &config.image_processor_type),
        ("feature_extractor_type", &config.feature_extractor_type),
    ];
    let known = || KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ");
    if let Some((field, name)) = named.iter().find_map(|(field, name)| Some((field, name.as_ref()?))) {
        return match KINDS.iter().find(|kind| kind.name == stem(name)) {
            Some(kind) => Ok(kind),
            None => refuse(field, format!("`{name}` is not supported; supported: {}", known())),
        };
    }
    let mut name = stem(model);
    for suffix in ["For", "Model"] {
        name.truncate(name.find(suffix).unwrap_or(name.len()));
    }
    let name: String = name.to_lowercase().chars().filter(char::is_ascii_alphanumeric).collect();
    let is_named = |kind: &&Kind| kind.models.contains(&name.as_str()) || kind.name.to_lowercase() == name;
    match KINDS.iter().find(is_named) {
        Some(kind) => Ok(kind),
        None => refuse("image_processor_type", format!("is missing, and `{model}` implies none of {}", known())),
    }
}

/// The size to resize to; `crops` receives what `crop_pct` cuts off afterwards.
fn resize_target(config: &Config, kind: &Kind, crops: &mut Vec<[u32; 2]>) -> Result<Size, SessionError> {
    let number = |side| match config.max_size {
        _ if kind.number_is_square => Size::Exact([side, side]),
        Some(longest) => Size::Within { shortest: side, longest },
        None => match kind.size {
            Size::Within { longest, .. } => Size::Within { shortest: side, longest },
            _ => Size::ShortestEdge(side),
        },
    };
    let size = match &config.size {
        Some(size) => size.read("size", number)?,
        None => kind.size,
    };
    if matches!(size, Size::LongestEdge(_)) != kind.longest_edge {
        let (name, not) = (kind.name, if kind.longest_edge { "needs" } else { "is not supported with" });
        return refuse("size", format!("{not} longest_edge alone for {name}"));
    }
    if let Some(default) = kind.divisor {
        let divisor = config.size_divisor.unwrap_or(default);
        return match size {
            _ if divisor == 0 => refuse("size_divisor", "is 0"),
            Size::ShortestEdge(shortest) | Size::Within { shortest, .. } => Ok(Size::Multiple { shortest, divisor }),
            _ => refuse("size", format!("needs shortest_edge for {}", kind.name)),
        };
    }
    let Some(default_pct) = kind.crop_pct else { return Ok(size) };
    let Size::ShortestEdge(edge) = size else {
        return refuse("size", format!("needs shortest_edge alone for {}", kind.name));
    };
    if edge >= 384 {
        return Ok(Size::Exact([edge, edge]));
    }
    let pct = config.crop_pct.unwrap_or(default_pct);
    if !(pct > 0.0 && pct <= 1.0) {
        return refuse("crop_pct", format!("is {pct}; it must be above 0 and at most 1"));
    }
    crops.push([edge, edge]);
    Ok(Size::ShortestEdge((f64::from(edge) / pct) as u32))
}

fn filter(config: &Config, kind: &Kind) -> Result<Filter, SessionError> {
    let Some(code) = config.resample else { return Ok(kind.resample) };
    match Filter::from_code(code) {
        Some(filter) => Ok(filter),
        None => refuse("resample", format!("{code} is not supported; supported: 0 to 5, Pillow's numbers")),
    }
}

/// Rescaling and normalisation of each of the 256 levels of each channel.
fn values(config: &Config, kind: &Kind) -> Result<[Vec<f32>; 3], SessionError> {
    let factor = match config.do_rescale {
        Some(false) => 1.0,
        _ => config.rescale_factor.unwrap_or(1.0 / 255.0),
    };
    if !factor.is_finite() {
        return refuse("rescale_factor", format!("is {factor}"));
    }
    let (mean, std) = match config.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (
            config.image_mean.map_or(kind.mean, PerChannel::values),
            config.image_std.map_or(kind.std, PerChannel::values),
        ),
    };
    if let Some(zero) = std.iter().find(|std| **std as f32 == 0.0) {
        return refuse("image_std", format!("holds {zero}, which values would be divided by"));
    }
    // in the reference's order: product in f64, cut to f32, difference and quotient in f32
    let value = |level: u8, c: usize| ((f64::from(level) * factor) as f32 - mean[c] as f32) / std[c] as f32;
    Ok([0, 1, 2].map(|c| (0..=255).map(|level| value(level, c)).collect()))
}

/// The central `height` × `width`; what lies beyond the picture's edge is black.
fn centre_crop(picture: &RgbImage, height: u32, width: u32) -> RgbImage {
    let offset = |side: u32, wanted: u32| -(i64::from(side) - i64::from(wanted)).div_euclid(2);
    let mut out = RgbImage::new(width, height);
    replace(&mut out, picture, offset(picture.width(), width), offset(picture.height(), height));
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(config: Value, model: &str) -> (String, String) {
        match ImageProcessor::from_config(&config, model) {
            Err(SessionError::Preprocessor { field, reason }) => (field, reason),
            Err(other) => panic!("{config}: {other}"),
            Ok(_) => panic!("{config} was accepted"),
        }
    }

    /// From transformers 5.23.0, the second bounded by its longer side.
    #[test]
    fn sides_that_are_multiples() {
        let size = Size::Multiple { shortest: 24, divisor: 8 };
        assert_eq!([size.for_picture(43, 57), size.for_picture(70, 21)], [[24, 32], [32, 8]]);
        assert_eq!(Size::Multiple { shortest: 384, divisor: 32 }.for_picture(480, 640), [384, 512]);
        let (field, reason) = refused(json!({"size_divisor": 0}), "vilt");
        assert_eq!((&*field, &*reason), ("size_divisor", "is 0"));
        assert_eq!(refused(json!({"size": {"height": 3, "width": 4}}), "vilt").0, "size");
    }

    #[test]
    fn words_of_a_page_are_not_read() {
        assert_eq!(refused(json!({}), "layoutlmv3").0, "apply_ocr");
        assert_eq!(refused(json!({"apply_ocr": true}), "layoutlm").0, "apply_ocr");
        assert!(ImageProcessor::from_config(&json!({"apply_ocr": false}), "layoutlm").is_ok());
    }

    fn shape(config: Value, model: &str, height: u32, width: u32) -> Vec<usize> {
        let processor = ImageProcessor::from_config(&config, model).expect("a config");
        processor.prepare(&RgbImage::new(width, height)).expect("a picture").dims().to_vec()
    }

    #[test]
    fn old_and_new_forms_mean_the_same() {
        assert_eq!(shape(json!({"size": 24}), "vit", 9, 7), [3, 24, 24]);
        assert_eq!(shape(json!({"size": {"height": 24, "width": 20}}), "ViTForImageClassification", 9, 7), [3, 24, 20]);
        assert_eq!(shape(json!({"size": [24, 20]}), "vit", 9, 7), [3, 24, 20]);
        let clip = json!({"size": 8, "crop_size": 6, "feature_extractor_type": "CLIPFeatureExtractor"});
        assert_eq!(shape(clip, "", 30, 20), [3, 6, 6]);
        let uncropped = json!({"size": 8, "do_center_crop": false, "image_processor_type": "BitImageProcessorFast"});
        assert_eq!(shape(uncropped, "vit", 30, 20), [3, 12, 8]);
        assert_eq!(shape(json!({"do_resize": false}), "vit", 9, 7), [3, 9, 7]);
        assert_eq!(shape(json!({"size": null, "resample": null}), "vit", 9, 7), [3, 224, 224]);
    }

    #[test]
    fn crop_pct_holds_below_384_only() {
        assert_eq!(shape(json!({"size": 28, "crop_pct": 0.875}), "resnet", 57, 43), [3, 28, 28]);
        assert_eq!(shape(json!({"size": {"shortest_edge": 384}}), "convnextv2", 57, 43), [3, 384, 384]);
        let processor = ImageProcessor::from_config(&json!({"size": 28}), "convnext").expect("a config");
        assert_eq!(processor.resize, Some((Size::ShortestEdge(32), Filter::Bicubic)));
        assert_eq!(processor.crops, [[28, 28]]);
    }

    #[test]
    fn sizes_are_rounded_as_python_rounds_them() {
        assert_eq!(Size::ShortestEdge(32).for_picture(43, 57), [32, 42]); // 42.4
        assert_eq!(Size::ShortestEdge(32).for_picture(57, 43), [42, 32]);
        assert_eq!(Size::LongestEdge(48).for_picture(43, 57), [36, 48]); // 36.2
        assert_eq!(Size::LongestEdge(48).for_picture(31, 20), [48, 31]); // 30.97
        let within = Size::Within { shortest: 24, longest: 40 };
        assert_eq!(within.for_picture(43, 57), [24, 31]); // 31.8
        assert_eq!(within.for_picture(70, 31), [40, 18]); // 17.7 to the nearest, the long side from the exact quotient
        assert_eq!(within.for_picture(100, 18), [40, 7]); // 7.2
    }

    #[test]
    fn crops_beyond_the_edge_are_black() {
        let grey = RgbImage::from_pixel(2, 3, image::Rgb([9; 3]));
        let column = |picture: &RgbImage| -> Vec<u8> { picture.pixels().map(|p| p.0[0]).collect() };
        // the odd row goes to the top, as the reference pads it
        assert_eq!(column(&centre_crop(&grey, 6, 1)), [0, 0, 9, 9, 9, 0]);
        assert_eq!(column(&centre_crop(&grey, 2, 2)), [9, 9, 9, 9]);
        let ramp = RgbImage::from_fn(5, 1, |x, _| image::Rgb([x as u8; 3]));
        assert_eq!(column(&centre_crop(&ramp, 1, 2)), [1, 2]);
    }

    #[test]
    fn values_are_rescaled_then_normalised() {
        let config =
            json!({"do_resize": false, "rescale_factor": 0.5, "image_mean": [1.0, 2.0, 3.0], "image_std": 2.0});
        let processor = ImageProcessor::from_config(&config, "vit").expect("a config");
        let pixels = processor.prepare(&RgbImage::from_pixel(1, 1, image::Rgb([4, 8, 12]))).expect("a picture");
        assert_eq!(pixels.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values"), [0.5, 1.0, 1.5]);
        let raw = json!({"do_resize": false, "do_rescale": false, "do_normalize": false});
        let processor = ImageProcessor::from_config(&raw, "vit").expect("a config");
        let pixels = processor.prepare(&RgbImage::from_pixel(1, 1, image::Rgb([4, 8, 12]))).expect("a picture");
        assert_eq!(pixels.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values"), [4.0, 8.0, 12.0]);
    }

    #[test]
    fn every_bad_field_is_named() {
        let cases = [
            (json!({"size": "big"}), "vit", "size"),
            (json!({"size": 0}), "vit", "size"),
            (json!({"size": 100_000}), "vit", "size"),
            (json!({"size": {"height": 24}}), "vit", "size"),
            (json!({"size": {"height": 24, "width": 24, "shortest_edge": 24}}), "vit", "size"),
            (json!({"size": {"height": 24, "width": 24}}), "convnext", "size"),
            (json!({"size": {"longest_edge": 24}}), "vit", "size"),
            (json!({"size": 24}), "sam", "size"),
            (json!({"resample": 9}), "vit", "resample"),
            (json!({"do_center_crop": true}), "vit", "crop_size"),
            (json!({"do_center_crop": true, "crop_size": {"shortest_edge": 9}}), "vit", "crop_size"),
            (json!({"size": 24, "crop_pct": 0.0}), "resnet", "crop_pct"),
            (json!({"image_mean": [0.5, 0.5]}), "vit", "image_mean"),
            (json!({"image_std": [0.5, 0.0, 0.5]}), "vit", "image_std"),
            (json!({"do_pad": true}), "vit", "do_pad"),
            (json!({"data_format": "channels_last"}), "vit", "data_format"),
            (json!({"do_resize": "yes"}), "vit", "do_resize"),
            (json!({"image_processor_type": "GLPNImageProcessor"}), "vit", "image_processor_type"),
            (json!({"size": {"shortest_edge": 24}}), "donut", "size"),
            (json!({"do_center_crop": true}), "donut", "do_center_crop"),
            (json!({}), "bert", "image_processor_type"),
        ];
        for (config, model, field) in cases {
            let (named, reason) = refused(config.clone(), model);
            assert_eq!(named, field, "{config}: {reason}");
        }
        assert!(refused(json!({}), "bert").1.contains("ViT"));
    }

    #[test]
    fn pictures_that_cannot_be_prepared_are_refused() {
        let processor = ImageProcessor::from_config(&json!({}), "clip").expect("a config");
        let empty = processor.prepare(&RgbImage::new(0, 3)).expect_err("empty").to_string();
        assert!(empty.contains("3 x 0"), "{empty}");
        let narrow = processor.prepare(&RgbImage::new(1, 2_000_000)).expect_err("narrow").to_string();
        assert!(narrow.contains("2000000 x 1") && narrow.contains("448000000 x 224"), "{narrow}");
    }

    #[test]
    fn only_files_of_images_are_taken() {
        let processor = ImageProcessor::from_config(&json!({}), "vit").expect("a config");
        let call = |method, argument: &str| {
            let files = [(argument.to_owned(), Vec::new())].into();
            processor.call(method, &files, &Tensors::new(), &Arguments::new()).expect_err("refused").to_string()
        };
        assert!(call("post_process", "images").contains("`method`"));
        assert!(call("preprocess", "images").contains("at least one"));
        assert!(call("preprocess", "audio").contains("`audio`"));
        let none = processor.call("preprocess", &BTreeMap::new(), &Tensors::new(), &Arguments::new());
        assert!(none.expect_err("refused").to_string().contains("`images`: is missing"));
    }
}
