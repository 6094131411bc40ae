//! Inputs of the standard cells: drawn from a seed, the same on every machine.

use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::catalog::Cell;
use crate::session::Tensors;
use crate::weights::{WeightsError, synthetic};

/// No input of a benchmark comes near this many elements (4 GiB of f32); a mistyped batch does.
const MOST_ELEMENTS: usize = 1 << 30;

/// Lower ids are padding, start and end in every vocabulary of the catalog.
const FIRST_ORDINARY_TOKEN: u64 = 3;

/// Higher ids are left out, where special tokens lie in some vocabularies.
const TOKENS_BELOW: u64 = 30_000;

/// How an input tensor is made; the shape is the list. See `about` in `catalog/workloads.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, deny_unknown_fields)]
pub enum InputSpec {
    /// Integers in [3, vocab), i64; `image_tokens` places at the front of each row hold the image placeholder.
    Tokens {
        /// Shape.
        tokens: Vec<usize>,
        /// Placeholders at the front of each row.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image_tokens: Option<usize>,
    },
    /// Numbers in [-1, 1), f32.
    Floats {
        /// Shape.
        floats: Vec<usize>,
    },
    /// i64 ones.
    Ones {
        /// Shape.
        ones: Vec<usize>,
    },
    /// i64 zeros.
    Zeros {
        /// Shape.
        zeros: Vec<usize>,
    },
    /// f32 ones.
    FloatOnes {
        /// Shape.
        float_ones: Vec<usize>,
    },
    /// f32 coordinates in [0, image size).
    Points {
        /// Shape.
        points: Vec<usize>,
    },
    /// Sorted integers in [0, 1000), i64.
    Boxes {
        /// Shape, last dimension 4.
        boxes: Vec<usize>,
    },
}

impl InputSpec {
    /// Shape of the tensor.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Tokens { tokens: shape, .. }
            | Self::Floats { floats: shape }
            | Self::Ones { ones: shape }
            | Self::Zeros { zeros: shape }
            | Self::FloatOnes { float_ones: shape }
            | Self::Points { points: shape }
            | Self::Boxes { boxes: shape } => shape,
        }
    }

    fn shape_mut(&mut self) -> &mut Vec<usize> {
        match self {
            Self::Tokens { tokens: shape, .. }
            | Self::Floats { floats: shape }
            | Self::Ones { ones: shape }
            | Self::Zeros { zeros: shape }
            | Self::FloatOnes { float_ones: shape }
            | Self::Points { points: shape }
            | Self::Boxes { boxes: shape } => shape,
        }
    }

    /// Number of elements, unless it is more than a benchmark can mean.
    fn elements(&self, input: &str) -> Result<usize, WorkloadError> {
        let count = self.shape().iter().try_fold(1usize, |count, &dimension| count.checked_mul(dimension));
        let too_large = || WorkloadError::TooLarge { input: input.to_owned(), shape: self.shape().to_vec() };
        count.filter(|&count| count <= MOST_ELEMENTS).ok_or_else(too_large)
    }
}

impl Cell {
    /// The same cell with `batch` items: the leading dimension of every input grows in proportion, and the name says so
    /// (`forward/b1/s128` becomes `forward/b8/s128`, `forward/10s` becomes `forward/b8/10s`).
    ///
    /// # Errors
    /// [`WorkloadError::Batch`] for 0, [`WorkloadError::TooLarge`] when an input would not fit any memory.
    pub fn with_batch(&self, batch: u64) -> Result<Self, WorkloadError> {
        let refused = |reason| WorkloadError::Batch { batch, reason };
        if batch == 0 {
            return Err(refused("there is nothing to run; give 1 or more".to_owned()));
        }
        if batch == self.batch {
            return Ok(self.clone());
        }
        let mut cell = Self { batch, ..self.clone() };
        for (input, spec) in &mut cell.inputs {
            let shape = spec.shape_mut();
            let per_item = shape.first().and_then(|&leading| u64::try_from(leading).ok()?.checked_div(self.batch));
            let whole = per_item.filter(|per_item| shape.first().is_some_and(|&n| n as u64 == per_item * self.batch));
            let per_item = whole.ok_or_else(|| refused(format!("input `{input}` of {} has no batch", self.name)))?;
            let leading = per_item.checked_mul(batch).and_then(|n| usize::try_from(n).ok());
            shape[0] = leading.unwrap_or(usize::MAX);
            spec.elements(input)?;
        }
        let marks_batch = |part: &str| part.strip_prefix('b').is_some_and(|n| n.parse::<u64>().is_ok());
        let mut parts: Vec<&str> = self.name.split('/').collect();
        let mark = format!("b{batch}");
        match parts.iter().position(|part| marks_batch(part)) {
            Some(place) => parts[place] = &mark,
            None => parts.insert(1, &mark),
        }
        cell.name = parts.join("/");
        Ok(cell)
    }

    /// How many of [`Cell::unit`] one call works through: the throughput's numerator.
    pub fn units_per_call(&self) -> f64 {
        let per_item = match (self.amount, self.new_tokens) {
            (Some(amount), _) => amount,
            (None, Some(new_tokens)) if self.unit == "tokens" => new_tokens as f64,
            _ => 1.0,
        };
        per_item * self.batch as f64
    }
}

/// The input tensors of `cell` for a model of `config`, the floating-point ones as `dtype`.
///
/// Every input is a function of its name, shape, kind and `seed`; values come from the stream `input:<name>` of
/// [`synthetic::uniform`].
///
/// # Errors
/// Names the input and the field of config.json that it needs, or the shape that is too large.
pub fn draw(cell: &Cell, config: &Value, dtype: DType, device: &Device, seed: u64) -> Result<Tensors, WorkloadError> {
    cell.inputs
        .iter()
        .map(|(name, spec)| Ok((name.clone(), draw_input(name, spec, config, dtype, device, seed)?)))
        .collect()
}

fn draw_input(
    name: &str,
    spec: &InputSpec,
    config: &Value,
    dtype: DType,
    device: &Device,
    seed: u64,
) -> Result<Tensor, WorkloadError> {
    let count = spec.elements(name)?;
    let shape = spec.shape();
    let uniform = || {
        let drawn = synthetic::uniform(&format!("input:{name}"), count, seed, 0);
        drawn.map_err(|source| WorkloadError::Memory { input: name.to_owned(), source: Box::new(source) })
    };
    let integers = |low: u64, high: u64| {
        let span = (high - low) as f64;
        let scaled = |u: f32| low as i64 + ((f64::from(u) + 1.0) / 2.0 * span).floor() as i64;
        uniform().map(|values| values.into_iter().map(scaled).collect::<Vec<i64>>())
    };
    let made = match spec {
        InputSpec::Tokens { image_tokens, .. } => {
            let high = vocabulary(name, config)?.min(TOKENS_BELOW);
            let mut ids = integers(FIRST_ORDINARY_TOKEN, high)?;
            if let Some(placeholders) = *image_tokens {
                let row = shape.last().copied().unwrap_or(0);
                if placeholders > row {
                    let reason = format!("{placeholders} image tokens do not fit in {row} places");
                    return Err(WorkloadError::Input { input: name.to_owned(), reason });
                }
                let image = image_token(name, config)?;
                ids.chunks_exact_mut(row.max(1)).for_each(|row| row[..placeholders].fill(image));
            }
            Tensor::from_vec(ids, shape, device)
        }
        InputSpec::Boxes { .. } => {
            let mut corners = integers(0, 1000)?;
            corners.chunks_mut(4).for_each(<[i64]>::sort_unstable);
            Tensor::from_vec(corners, shape, device)
        }
        InputSpec::Floats { .. } => {
            Tensor::from_vec(uniform()?, shape, device).and_then(|values| values.to_dtype(dtype))
        }
        InputSpec::Points { .. } => {
            let half = image_size(name, config)? as f32 / 2.0;
            let points: Vec<f32> = uniform()?.into_iter().map(|u| (u + 1.0) * half).collect();
            Tensor::from_vec(points, shape, device).and_then(|values| values.to_dtype(dtype))
        }
        InputSpec::Ones { .. } => Tensor::ones(shape, DType::I64, device),
        InputSpec::Zeros { .. } => Tensor::zeros(shape, DType::I64, device),
        InputSpec::FloatOnes { .. } => Tensor::ones(shape, dtype, device),
    };
    made.map_err(|source| WorkloadError::Tensor { input: name.to_owned(), source: Box::new(source) })
}

/// Size of the vocabulary that `input` is of.
fn vocabulary(input: &str, config: &Value) -> Result<u64, WorkloadError> {
    /// ImageBind's config does not say; its text encoder has the tokenizer of CLIP.
    const IMAGEBIND: u64 = 49_408;
    let own = if input.starts_with("qformer_") { "/qformer_config/vocab_size" } else { "/vocab_size" };
    let places = [own, "/vocab_size", "/text_config/vocab_size", "/decoder/vocab_size"];
    let found = places.iter().find_map(|place| config.pointer(place).and_then(Value::as_u64));
    let found = found.or_else(|| (config.get("model_type")? == "imagebind").then_some(IMAGEBIND));
    found.filter(|&size| size > FIRST_ORDINARY_TOKEN).ok_or_else(|| {
        let wanted = "`vocab_size` (or `text_config.vocab_size`, `decoder.vocab_size`) above 3";
        WorkloadError::Config { input: input.to_owned(), wanted }
    })
}

fn image_token(input: &str, config: &Value) -> Result<i64, WorkloadError> {
    let found = ["image_token_id", "image_token_index"].iter().find_map(|field| config.get(field)?.as_i64());
    let wanted = "`image_token_id` or `image_token_index`";
    found.ok_or_else(|| WorkloadError::Config { input: input.to_owned(), wanted })
}

fn image_size(input: &str, config: &Value) -> Result<u64, WorkloadError> {
    let places = ["/vision_config/image_size", "/prompt_encoder_config/image_size", "/image_size"];
    let found = places.iter().find_map(|place| config.pointer(place).and_then(Value::as_u64));
    let wanted = "`vision_config.image_size` or `image_size`";
    found.ok_or_else(|| WorkloadError::Config { input: input.to_owned(), wanted })
}

/// Why inputs could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// A batch that can't be run.
    #[error("--batch {batch}: {reason}")]
    Batch {
        /// As given.
        batch: u64,
        /// Why not.
        reason: String,
    },
    /// A shape that no machine holds.
    #[error("input `{input}` of shape {shape:?} is too large; choose a smaller --batch")]
    TooLarge {
        /// Argument name.
        input: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The memory for an input is not to be had.
    #[error("input `{input}`: {source}")]
    Memory {
        /// Argument name.
        input: String,
        /// Why.
        source: Box<WeightsError>,
    },
    /// The config lacks what an input depends on.
    #[error("config.json: {wanted} is needed to draw input `{input}`")]
    Config {
        /// Argument name.
        input: String,
        /// The field.
        wanted: &'static str,
    },
    /// An input contradicts itself.
    #[error("input `{input}`: {reason}")]
    Input {
        /// Argument name.
        input: String,
        /// Why.
        reason: String,
    },
    /// The device refused.
    #[error("input `{input}`: {source}")]
    Tensor {
        /// Argument name.
        input: String,
        /// Why.
        source: Box<candle_core::Error>,
    },
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::catalog::{checkpoint, families, family};

    fn cell(inputs: Value) -> Cell {
        let whole = json!({"name": "forward/b1", "unit": "sequences", "batch": 1, "inputs": inputs});
        serde_json::from_value(whole).unwrap()
    }

    fn drawn(inputs: Value, config: Value) -> Result<Tensors, WorkloadError> {
        draw(&cell(inputs), &config, DType::F32, &Device::Cpu, 0)
    }

    #[test]
    fn every_standard_cell_can_be_drawn() {
        for family in families() {
            let config = &checkpoint(&family.default_checkpoint).unwrap().1.config;
            for cell in &family.cells {
                let made = draw(cell, config, DType::BF16, &Device::Cpu, 0)
                    .unwrap_or_else(|error| panic!("{}/{}: {error}", family.name, cell.name));
                for (name, spec) in &cell.inputs {
                    assert_eq!(made[name].dims(), spec.shape(), "{}/{} {name}", family.name, cell.name);
                }
                assert!(cell.units_per_call() > 0.0);
            }
        }
    }

    #[test]
    fn values_have_the_bits_of_the_reference() {
        // integers("input_ids", (2, 4), 3, 30000), integers("bbox", (1, 2, 4), 0, 1000) sorted, floats("pixel_values",
        // (1, 2, 2)) and (uniform("input:input_points", 2) + 1) * 512 of the reference program
        let made = drawn(
            json!({
                "input_ids": {"tokens": [2, 4]},
                "bbox": {"boxes": [1, 2, 4]},
                "pixel_values": {"floats": [1, 2, 2]},
                "input_points": {"points": [1, 2]},
                "attention_mask": {"ones": [1, 2]},
                "token_type_ids": {"zeros": [1, 2]},
                "patch_mask": {"float_ones": [1, 2]},
            }),
            json!({"vocab_size": 30522, "vision_config": {"image_size": 1024}}),
        )
        .unwrap();
        assert_eq!(
            made["input_ids"].to_vec2::<i64>().unwrap(),
            [[9501, 23348, 28776, 7845], [3351, 8955, 23565, 23022]]
        );
        assert_eq!(made["bbox"].to_vec3::<i64>().unwrap(), [[[314, 351, 509, 941], [290, 458, 509, 714]]]);
        let bits = |name: &str| -> Vec<u32> {
            made[name].flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
        };
        assert_eq!(bits("pixel_values"), [0xBF68_CB06, 0xBE18_F628, 0xBE8A_A01C, 0xBD96_1780]);
        assert_eq!(bits("input_points"), [0x4439_9360, 0x4476_300C]);
        assert_eq!(made["attention_mask"].to_vec2::<i64>().unwrap(), [[1, 1]]);
        assert_eq!(made["token_type_ids"].to_vec2::<i64>().unwrap(), [[0, 0]]);
        assert_eq!(made["patch_mask"].to_vec2::<f32>().unwrap(), [[1.0, 1.0]]);
    }

    #[test]
    fn seed_and_vocabulary_count() {
        let config = json!({"text_config": {"vocab_size": 5}});
        let with_seed = |seed| {
            let made = draw(&cell(json!({"input_ids": {"tokens": [1, 64]}})), &config, DType::F32, &Device::Cpu, seed);
            made.unwrap()["input_ids"].flatten_all().unwrap().to_vec1::<i64>().unwrap()
        };
        assert_ne!(with_seed(0), with_seed(1));
        assert_eq!(with_seed(2), with_seed(2));
        assert!(with_seed(0).iter().all(|id| [3, 4].contains(id)) && with_seed(0).contains(&4));
    }

    #[test]
    fn image_placeholders_come_first_in_each_row() {
        let spec = json!({"input_ids": {"tokens": [2, 4], "image_tokens": 3}});
        let made = drawn(spec.clone(), json!({"vocab_size": 40, "image_token_index": 39})).unwrap();
        for row in made["input_ids"].to_vec2::<i64>().unwrap() {
            assert_eq!(row[..3], [39, 39, 39]);
        }
        let message = drawn(spec, json!({"vocab_size": 40})).unwrap_err().to_string();
        assert!(message.contains("image_token_id") && message.contains("input_ids"), "{message}");
        let crowded = json!({"input_ids": {"tokens": [1, 2], "image_tokens": 3}});
        let message = drawn(crowded, json!({"vocab_size": 40, "image_token_id": 39})).unwrap_err().to_string();
        assert!(message.contains("3 image tokens do not fit in 2"), "{message}");
    }

    #[test]
    fn what_cannot_be_drawn_names_the_field_or_shape() {
        let tokens = json!({"input_ids": {"tokens": [1, 2]}});
        for config in [json!({}), json!({"vocab_size": 3}), json!({"vocab_size": -1}), json!({"vocab_size": "many"})] {
            assert!(drawn(tokens.clone(), config).unwrap_err().to_string().contains("`vocab_size`"));
        }
        let points = json!({"input_points": {"points": [1, 2]}});
        assert!(drawn(points, json!({})).unwrap_err().to_string().contains("image_size"));
        for shape in [json!([1u64 << 40]), json!([1u64 << 33, 1u64 << 33])] {
            let message = drawn(json!({"pixel_values": {"floats": shape}}), json!({})).unwrap_err().to_string();
            assert!(message.contains("pixel_values") && message.contains("too large"), "{message}");
        }
    }

    #[test]
    fn a_batch_grows_every_input_and_renames_the_cell() {
        let bert = &family("bert").unwrap().cells[0];
        let eight = bert.with_batch(8).unwrap();
        assert_eq!((eight.name.as_str(), eight.batch, eight.units_per_call()), ("forward/b8/s128", 8, 8.0));
        assert!(eight.inputs.values().all(|spec| spec.shape() == [8, 128]));
        assert_eq!(&eight.with_batch(1).unwrap(), bert);
        assert_eq!(&bert.with_batch(1).unwrap(), bert);
        let clip = family("clip").unwrap().cells[0].with_batch(3).unwrap();
        assert_eq!(clip.name, "forward/b3/i1/t2");
        assert_eq!((clip.inputs["pixel_values"].shape()[0], clip.inputs["input_ids"].shape()[0]), (3, 6));
    }

    #[test]
    fn batches_that_make_no_sense_are_refused_before_anything_is_allocated() {
        let bert = &family("bert").unwrap().cells[0];
        assert!(bert.with_batch(0).unwrap_err().to_string().contains("--batch 0"));
        for batch in [1 << 40, u64::MAX] {
            let message = bert.with_batch(batch).unwrap_err().to_string();
            assert!(message.contains("attention_mask") && message.contains("smaller --batch"), "{message}");
        }
        let odd = Cell { batch: 2, ..cell(json!({"x": {"floats": [3, 2]}})) };
        assert!(odd.with_batch(4).unwrap_err().to_string().contains("`x`"));
        let scalar = cell(json!({"x": {"floats": []}}));
        assert!(scalar.with_batch(4).unwrap_err().to_string().contains("`x`"));
    }

    #[test]
    fn units_follow_from_amount_tokens_or_batch() {
        let units = |name: &str, batch| family(name).unwrap().cells[0].with_batch(batch).unwrap().units_per_call();
        assert_eq!(units("whisper", 1), 30.0); // audio seconds, though tokens are generated
        assert_eq!(units("whisper", 2), 60.0);
        assert_eq!(units("gpt2", 4), 128.0); // 32 tokens each
        assert_eq!(units("blip", 2), 2.0); // images, though tokens are generated
        assert_eq!(units("speecht5", 1), 5.12);
    }
}
