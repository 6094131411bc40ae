//! Pictures and prompts for SAM: pictures filled up to one size, points and boxes scaled with them, and masks brought
//! back to the pictures' sizes. Mirrors `transformers.SamProcessor` with the Pillow backend of `SamImageProcessor`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_nn::resize::bilinear;
use serde::Deserialize;
use serde_json::Value;

use super::{ImageProcessor, MAX_PIXELS, Size, SizeField, load_rgb, refuse};

/// `preprocessor_config.json` where it goes beyond [`ImageProcessor`]'s.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    do_pad: Option<bool>,
    pad_size: Option<SizeField>,
    size: Option<SizeField>,
}

/// Prepares pictures and prompts for SAM, and its masks for pictures.
#[derive(Debug, Clone)]
pub struct SamProcessor {
    images: ImageProcessor,
    /// The longer side of pictures, which coordinates are scaled to.
    edge: u32,
    /// Height and width that pictures are filled up to, below and to the right.
    pad_size: [usize; 2],
    pads: bool,
}

impl SamProcessor {
    /// Reads `config`, the `preprocessor_config.json` of a checkpoint.
    ///
    /// # Errors
    /// [`SessionError::Preprocessor`] names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let images = ImageProcessor::from_config(config, "sam")?;
        let config: Config = serde_path_to_error::deserialize(config).map_err(|error| SessionError::Preprocessor {
            field: error.path().to_string(),
            reason: error.into_inner().to_string(),
        })?;
        let square = |side| Size::Exact([side, side]);
        let edge = match config.size.map(|size| size.read("size", square)).transpose()? {
            None => 1024,
            Some(Size::LongestEdge(edge)) => edge,
            Some(_) => return refuse("size", "needs longest_edge alone for Sam"),
        };
        let pad_size = match config.pad_size.map(|size| size.read("pad_size", square)).transpose()? {
            None => [1024, 1024],
            Some(Size::Exact(size)) => size.map(|side| side as usize),
            Some(_) => return refuse("pad_size", "needs height and width"),
        };
        Ok(Self { images, edge, pad_size, pads: config.do_pad.unwrap_or(true) })
    }

    /// Height and width that coordinates in a picture of `size` are scaled to.
    fn scaled(&self, size: [usize; 2]) -> [f64; 2] {
        let [height, width] = size.map(|side| side as u32);
        Size::LongestEdge(self.edge).for_picture(height, width).map(|side| side as f64)
    }

    fn preprocess(
        &self,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        const PROMPTS: [&str; 3] = ["input_points", "input_labels", "input_boxes"];
        let unknown = arguments.keys().find(|name| !PROMPTS.contains(&name.as_str()));
        let unknown = unknown.or(inputs.keys().next()).or(files.keys().find(|name| *name != "images"));
        if let Some(name) = unknown {
            let reason = format!("is not supported; supported: images, as files, and {}", PROMPTS.join(", "));
            return Err(SessionError::input(name, reason));
        }
        let images = files.get("images").map(Vec::as_slice).unwrap_or_default();
        if images.is_empty() {
            return Err(SessionError::input("images", "is missing; give at least one file"));
        }
        let (mut pixels, mut original, mut reshaped) = (Vec::new(), Vec::new(), Vec::new());
        for path in images {
            let file_error = |reason| SessionError::File { path: path.clone(), reason };
            let picture = load_rgb(path, self.images.transparency)?;
            let prepared = self.images.prepare(&picture).map_err(|error| match error {
                SessionError::Input { reason, .. } => file_error(reason),
                other => other,
            })?;
            let (_, height, width) = prepared.dims3()?;
            let [pad_height, pad_width] = if self.pads { self.pad_size } else { [height, width] };
            if height > pad_height || width > pad_width {
                let reason = format!("is {height} x {width} when resized, pad_size is {pad_height} x {pad_width}");
                return Err(file_error(reason));
            }
            let filled = prepared.pad_with_zeros(1, 0, pad_height - height)?.pad_with_zeros(2, 0, pad_width - width)?;
            if let Some(first) = pixels.first().filter(|first: &&Tensor| first.dims() != filled.dims()) {
                let reason = format!(
                    "is {:?} when prepared, the first picture {:?}; without do_pad pictures of a batch must have one size",
                    filled.dims(),
                    first.dims()
                );
                return Err(file_error(reason));
            }
            pixels.push(filled);
            original.push([picture.height() as usize, picture.width() as usize]);
            reshaped.push([height, width]);
        }
        let sizes = |sizes: &[[usize; 2]]| {
            let sizes: Vec<i64> = sizes.iter().flatten().map(|side| *side as i64).collect();
            Tensor::from_vec(sizes, (images.len(), 2), &Device::Cpu)
        };
        let mut outputs = Tensors::from([
            ("pixel_values".to_owned(), Tensor::stack(&pixels, 0)?),
            ("original_sizes".to_owned(), sizes(&original)?),
            ("reshaped_input_sizes".to_owned(), sizes(&reshaped)?),
        ]);
        for name in PROMPTS {
            if let Some(value) = arguments.get(name).filter(|value| !value.is_null()) {
                outputs.insert(name.to_owned(), self.prompt(name, value, &original)?);
            }
        }
        Ok(outputs)
    }

    /// The prompt `name` as a tensor, in coordinates of the prepared pictures whose sizes were `original`. A level for
    /// prompts, where it is left out, is one of one prompt.
    fn prompt(&self, name: &str, value: &Value, original: &[[usize; 2]]) -> Result<Tensor, SessionError> {
        let nested = Nested::read(name, value)?;
        let images = nested.shape[0];
        // coordinates of each picture are scaled as it is; those for another number of pictures as the first
        let factors = |image: usize| {
            let size = original[if images == original.len() { image } else { 0 }];
            let [height, width] = self.scaled(size);
            [width / size[1] as f64, height / size[0] as f64]
        };
        let of_image = nested.values.len() / images.max(1);
        let scaled = |values: &[f64]| -> Vec<f64> {
            let factor = |i: usize| factors(i / of_image.max(1))[i % 2];
            values.iter().enumerate().map(|(i, value)| value * factor(i)).collect()
        };
        let (rank, form) = match name {
            "input_points" => (4, "[picture][prompt][point][x, y]"),
            "input_boxes" => (3, "[picture][prompt][x1, y1, x2, y2]"),
            _ => (3, "[picture][prompt][label]"),
        };
        let mut shape = nested.shape.clone();
        let last = shape.last().copied().unwrap_or_default();
        let width = match name {
            "input_points" => 2,
            "input_boxes" => 4,
            _ => last,
        };
        let may_lack_prompts = name != "input_boxes" && shape.len() + 1 == rank;
        if (shape.len() != rank && !may_lack_prompts) || last != width || nested.values.is_empty() {
            return Err(SessionError::input(name, format!("has shape {shape:?}, expected {form}")));
        }
        if may_lack_prompts {
            shape.insert(1, 1);
        }
        Ok(match name {
            "input_labels" => {
                let whole = |value: &f64| (value.fract() == 0.0).then_some(*value as i64);
                let Some(labels) = nested.values.iter().map(whole).collect::<Option<Vec<_>>>() else {
                    return Err(SessionError::input(name, "holds a fraction; labels are 1, 0, -1 and -10"));
                };
                Tensor::from_vec(labels, shape, &Device::Cpu)?
            }
            // boxes are cut to f32 first
            "input_boxes" => {
                let values: Vec<f64> = nested.values.iter().map(|value| f64::from(*value as f32)).collect();
                Tensor::from_vec(scaled(&values), shape, &Device::Cpu)?
            }
            _ => Tensor::from_vec(scaled(&nested.values), shape, &Device::Cpu)?,
        })
    }

    /// Masks of the model at the sizes of the pictures, as logits or, with `binarize`, as 0 and 1.
    fn post_process_masks(&self, inputs: &Tensors, arguments: &Arguments) -> Result<Tensors, SessionError> {
        const TENSORS: [&str; 3] = ["pred_masks", "original_sizes", "reshaped_input_sizes"];
        const ARGUMENTS: [&str; 5] =
            ["original_sizes", "reshaped_input_sizes", "mask_threshold", "binarize", "pad_size"];
        let unknown = inputs.keys().find(|name| !TENSORS.contains(&name.as_str()));
        let unknown = unknown.or(arguments.keys().find(|name| !ARGUMENTS.contains(&name.as_str())));
        if let Some(name) = unknown {
            let reason = format!("is not supported; supported: pred_masks, {}", ARGUMENTS.join(", "));
            return Err(SessionError::input(name, reason));
        }
        let Some(masks) = inputs.get("pred_masks") else {
            return Err(SessionError::input("pred_masks", "is missing"));
        };
        if masks.rank() != 5 || masks.elem_count() == 0 {
            let expected = "(batch, prompts, masks, height, width), none of them 0";
            let reason = format!("has shape {:?}, expected {expected}", masks.dims());
            return Err(SessionError::input("pred_masks", reason));
        }
        let sizes = |name: &str| sizes(name, inputs, arguments, masks.dims()[0]);
        let (original, reshaped) = (sizes("original_sizes")?, sizes("reshaped_input_sizes")?);
        let pad_size = match arguments.get("pad_size").filter(|size| !size.is_null()) {
            None => self.pad_size,
            Some(size) => match (side(&size["height"]), side(&size["width"])) {
                (Some(height), Some(width)) => [height, width],
                _ => return Err(SessionError::input("pad_size", "needs height and width, in pixels")),
            },
        };
        let binarize = match arguments.get("binarize") {
            None => true,
            Some(Value::Bool(value)) => *value,
            Some(other) => return Err(SessionError::input("binarize", format!("is {other}, expected true or false"))),
        };
        let threshold = match arguments.get("mask_threshold") {
            None => 0.0,
            Some(value) => value.as_f64().ok_or_else(|| SessionError::input("mask_threshold", "is no number"))?,
        };
        let masks = masks.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let mut outputs = Tensors::new();
        for (i, (original, reshaped)) in original.into_iter().zip(reshaped).enumerate() {
            if reshaped[0] > pad_size[0] || reshaped[1] > pad_size[1] {
                let reason = format!("holds {reshaped:?}, which pictures are not filled up from to {pad_size:?}");
                return Err(SessionError::input("reshaped_input_sizes", reason));
            }
            let filled = bilinear(&masks.get(i)?, pad_size.into(), false)?;
            let cut = filled.narrow(2, 0, reshaped[0])?.narrow(3, 0, reshaped[1])?;
            let mask = bilinear(&cut, original.into(), false)?; // (prompts, masks, height, width)
            outputs.insert(format!("masks.{i}"), if binarize { mask.gt(threshold)? } else { mask });
        }
        Ok(outputs)
    }
}

impl Processor for SamProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        match method {
            "preprocess" => self.preprocess(files, inputs, arguments),
            "post_process_masks" => match files.keys().next() {
                None => self.post_process_masks(inputs, arguments),
                Some(name) => Err(SessionError::input(name, "is a file, which post_process_masks does not take")),
            },
            _ => {
                let reason = format!("`{method}` is not supported; supported: preprocess, post_process_masks");
                Err(SessionError::input("method", reason))
            }
        }
    }
}

/// A side of a picture, in pixels.
fn side(value: &Value) -> Option<usize> {
    value.as_u64().filter(|side| (1..=MAX_PIXELS).contains(side)).map(|side| side as usize)
}

/// Heights and widths of `pictures` pictures, from a tensor or a list.
fn sizes(
    name: &str,
    inputs: &Tensors,
    arguments: &Arguments,
    pictures: usize,
) -> Result<Vec<[usize; 2]>, SessionError> {
    let value = match (inputs.get(name), arguments.get(name)) {
        (Some(tensor), _) if tensor.rank() == 2 && tensor.dtype().is_int() => {
            Value::from(tensor.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec2::<i64>()?)
        }
        (Some(tensor), _) => {
            let found = format!("{:?} of type {:?}", tensor.dims(), tensor.dtype());
            return Err(SessionError::input(name, format!("has shape {found}, expected integers (pictures, 2)")));
        }
        (None, Some(value)) => value.clone(),
        (None, None) => return Err(SessionError::input(name, "is missing")),
    };
    let read = |size: &Value| match size.as_array()?.as_slice() {
        [height, width] => {
            let (height, width) = (side(height)?, side(width)?);
            ((height as u64).saturating_mul(width as u64) <= MAX_PIXELS).then_some([height, width])
        }
        _ => None,
    };
    let rows = value.as_array().and_then(|rows| rows.iter().map(read).collect::<Option<Vec<_>>>());
    rows.filter(|rows| rows.len() == pictures).ok_or_else(|| {
        let reason = format!("is {value}, expected [height, width] of {pictures} pictures of 1 to {MAX_PIXELS} pixels");
        SessionError::input(name, reason)
    })
}

/// Numbers in lists in lists, all of one length at each level.
struct Nested {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Nested {
    fn read(name: &str, value: &Value) -> Result<Self, SessionError> {
        let mut shape = Vec::new();
        let mut first = value;
        while let Value::Array(items) = first {
            shape.push(items.len());
            let Some(item) = items.first() else { break };
            first = item;
        }
        let mut values = Vec::new();
        let regular = !shape.is_empty() && collect(value, &shape, &mut values);
        if !regular {
            let reason = "is not nested lists of numbers of one length at each level; \
                          fill up with points of label -10 where prompts have fewer";
            return Err(SessionError::input(name, reason));
        }
        Ok(Self { shape, values })
    }
}

/// Whether `value` has `shape`; its numbers.
fn collect(value: &Value, shape: &[usize], values: &mut Vec<f64>) -> bool {
    match (value, shape) {
        (Value::Array(items), [length, rest @ ..]) => {
            items.len() == *length && items.iter().all(|item| collect(item, rest, values))
        }
        (Value::Number(number), []) => {
            values.extend(number.as_f64());
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn processor() -> SamProcessor {
        let config = json!({"size": {"longest_edge": 48}, "pad_size": {"height": 48, "width": 48}});
        SamProcessor::from_config(&config).expect("a config")
    }

    #[test]
    fn coordinates_follow_the_picture() {
        let prompt = |name: &str, value: Value| processor().prompt(name, &value, &[[24, 12], [10, 20]]);
        let flat = |tensor: Tensor| tensor.flatten_all().and_then(|x| x.to_vec1::<f64>()).expect("f64");
        // twice as large, and 2.4 times
        let points = prompt("input_points", json!([[[1, 2]], [[5, 10]]])).expect("points");
        assert_eq!(points.dims(), [2, 1, 1, 2]);
        assert_eq!(flat(points), [2.0, 4.0, 12.0, 24.0]);
        let boxes = prompt("input_boxes", json!([[[0, 0, 1, 2]], [[5, 10, 10, 5]]])).expect("boxes");
        assert_eq!((boxes.dims(), flat(boxes.clone())), (&[2, 1, 4][..], vec![0., 0., 2., 4., 12., 24., 24., 12.]));
        let labels = prompt("input_labels", json!([[1], [0]])).expect("labels");
        assert_eq!((labels.dims(), labels.dtype()), (&[2, 1, 1][..], DType::I64));
        for (name, value) in [
            ("input_points", json!([[[1, 2], [3]]])),
            ("input_points", json!([[1, 2]])),
            ("input_points", json!([[[1, 2, 3]]])),
            ("input_boxes", json!([[1, 2, 3, 4]])),
            ("input_labels", json!([[0.5]])),
            ("input_labels", json!("first")),
        ] {
            let error = prompt(name, value.clone()).expect_err("refused").to_string();
            assert!(error.starts_with(&format!("input `{name}`: ")), "{value}: {error}");
        }
    }

    #[test]
    fn masks_are_cut_where_the_picture_ends() {
        // the left half of the filled-up picture is on; of a picture that fills the left three quarters, two thirds are
        let row = [1f32, 1., -1., -1.].repeat(4);
        let masks = Tensor::from_vec(row, (1, 1, 1, 4, 4), &Device::Cpu).expect("masks");
        let inputs = Tensors::from([("pred_masks".to_owned(), masks)]);
        let run = |arguments: Value| {
            let arguments = arguments.as_object().cloned().expect("an object");
            processor().call("post_process_masks", &BTreeMap::new(), &inputs, &arguments)
        };
        let sizes = json!({"original_sizes": [[24, 12]], "reshaped_input_sizes": [[48, 36]]});
        let mask = run(sizes.clone()).expect("masks").remove("masks.0").expect("a mask");
        assert_eq!((mask.dims(), mask.dtype()), (&[1, 1, 24, 12][..], DType::U8));
        let line = mask.flatten_all().and_then(|x| x.to_vec1::<u8>()).expect("u8");
        assert_eq!(line[..12], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]);
        let refused = |field: &str, value: Value| {
            let mut arguments = sizes.clone();
            arguments[field] = value;
            run(arguments).expect_err("refused").to_string()
        };
        assert!(refused("original_sizes", json!([[24, 0]])).contains("`original_sizes`"));
        assert!(refused("original_sizes", json!([])).contains("of 1 pictures"));
        assert!(refused("reshaped_input_sizes", json!([[48, 49]])).contains("[48, 49]"));
        assert!(refused("pad_size", json!(48)).contains("`pad_size`"));
        assert!(refused("stability", json!(1)).contains("`stability`"));
        assert!(refused("binarize", json!("no")).contains("`binarize`"));
    }

    #[test]
    fn what_the_config_lacks_is_the_published_size() {
        let processor = SamProcessor::from_config(&json!({})).expect("a config");
        assert_eq!((processor.edge, processor.pad_size, processor.pads), (1024, [1024, 1024], true));
        let error = |config: Value| SamProcessor::from_config(&config).expect_err("refused").to_string();
        assert!(error(json!({"size": {"height": 4, "width": 4}})).contains("`size`"));
        assert!(error(json!({"pad_size": {"longest_edge": 4}})).contains("`pad_size`"));
    }
}
