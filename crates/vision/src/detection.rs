//! What a detector's outputs say: boxes with labels and scores, and maps of segments.
//!
//! Mirrors `post_process_object_detection`, `post_process_semantic_segmentation`, `post_process_instance_segmentation`
//! and `post_process_panoptic_segmentation` of `transformers.DetrImageProcessor`. The outputs of picture `i` have the
//! names of the fields there with `.i` behind them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, IndexOp, Tensor};
use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_nn::resize;
use serde_json::Value;

use crate::preprocess::ImageProcessor;

/// Prepares pictures for a detector and reads its outputs.
///
/// ```
/// use roofbench_vision::candle_core::{Device, Tensor};
/// use roofbench_vision::detection::DetectionProcessor;
/// use roofbench_vision::serde_json::json;
/// use roofbench_vision::{Arguments, Processor, Tensors};
///
/// let processor = DetectionProcessor::from_config(&json!({}), "detr")?;
/// // one query of two labels and "no object"; its box is centre and size
/// let outputs = Tensors::from([
///     ("logits".to_owned(), Tensor::new(&[[[0f32, 9., 0.]]], &Device::Cpu)?),
///     ("pred_boxes".to_owned(), Tensor::new(&[[[0.5f32, 0.5, 0.5, 1.]]], &Device::Cpu)?),
/// ]);
/// let arguments: Arguments = [("target_sizes".to_owned(), json!([[100, 200]]))].into_iter().collect();
/// let found = processor.call("post_process_object_detection", &Default::default(), &outputs, &arguments)?;
/// assert_eq!(found["labels.0"].to_vec1::<i64>()?, [1]);
/// assert_eq!(found["boxes.0"].to_vec2::<f32>()?, [[50., 0., 150., 100.]]); // left, top, right, bottom
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DetectionProcessor {
    images: ImageProcessor,
}

impl DetectionProcessor {
    /// Reads `preprocessor_config.json`: see [`ImageProcessor::from_config`].
    ///
    /// # Errors
    /// As there.
    pub fn from_config(config: &Value, model: &str) -> Result<Self, SessionError> {
        Ok(Self { images: ImageProcessor::from_config(config, model)? })
    }
}

const METHODS: &str = "preprocess, post_process_object_detection, post_process_semantic_segmentation, \
                       post_process_instance_segmentation, post_process_panoptic_segmentation";

impl Processor for DetectionProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        if method == "preprocess" {
            return self.images.call(method, files, inputs, arguments);
        }
        let call = Outputs { inputs, arguments };
        let segments = ["threshold", "mask_threshold", "overlap_mask_area_threshold", "target_sizes"];
        match method {
            "post_process_object_detection" => {
                call.check(&["logits", "pred_boxes"], &["threshold", "target_sizes"])?;
                objects(&call)
            }
            "post_process_semantic_segmentation" => {
                call.check(&["logits", "pred_masks"], &["target_sizes", "return_segmentation_scores"])?;
                semantic(&call)
            }
            "post_process_instance_segmentation" => {
                call.check(&["logits", "pred_masks"], &segments)?;
                segmented(&call, &[])
            }
            "post_process_panoptic_segmentation" => {
                call.check(&["logits", "pred_masks"], &[&segments[..], &["label_ids_to_fuse"]].concat())?;
                segmented(&call, &call.integers("label_ids_to_fuse")?)
            }
            _ => Err(SessionError::input("method", format!("`{method}` is not supported; supported: {METHODS}"))),
        }
    }
}

/// A model's outputs and how they are to be read.
struct Outputs<'a> {
    inputs: &'a Tensors,
    arguments: &'a Arguments,
}

impl Outputs<'_> {
    /// Refuses arguments that aren't heeded. Other outputs of the model may come along.
    fn check(&self, needed: &[&str], arguments: &[&str]) -> Result<(), SessionError> {
        if let Some(name) = needed.iter().find(|name| !self.inputs.contains_key(**name)) {
            return Err(SessionError::input(name, "is missing"));
        }
        match self.arguments.keys().find(|name| !arguments.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let reason = format!("is not supported by this method; supported: {}", arguments.join(", "));
                Err(SessionError::input(name, reason))
            }
        }
    }

    /// An output in f32 on the CPU with the `rank` and the first dimensions `like`.
    fn tensor(&self, name: &str, rank: usize, like: &[usize]) -> Result<Tensor, SessionError> {
        let tensor = self.inputs.get(name).ok_or_else(|| SessionError::input(name, "is missing"))?;
        if tensor.rank() != rank || !tensor.dims().starts_with(like) || tensor.elem_count() == 0 {
            let reason = format!("has shape {:?}, expected {rank} dimensions that begin {like:?}", tensor.dims());
            return Err(SessionError::input(name, reason));
        }
        Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
    }

    fn number(&self, name: &str, default: f64) -> Result<f64, SessionError> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| SessionError::input(name, format!("is {value}, expected a number")))
            }
        }
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>, SessionError> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| SessionError::input(name, format!("is {value}, expected a list of integers"))),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, SessionError> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(SessionError::input(name, format!("is {other}, expected true or false"))),
        }
    }

    /// Height and width of each picture of a batch, where they are wanted.
    fn target_sizes(&self, batch: usize) -> Result<Option<Vec<[usize; 2]>>, SessionError> {
        let sizes: Vec<[usize; 2]> = match self.arguments.get("target_sizes") {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => serde_json::from_value(value.clone()).map_err(|_| {
                SessionError::input("target_sizes", format!("is {value}, expected [height, width] of each picture"))
            })?,
        };
        if sizes.len() != batch || sizes.iter().flatten().any(|&side| side == 0 || side > 1 << 16) {
            let reason = format!("is {sizes:?}, expected [height, width] of each of {batch} pictures");
            return Err(SessionError::input("target_sizes", reason));
        }
        Ok(Some(sizes))
    }
}

/// Probabilities of a query's logits.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The first of the largest.
fn largest(values: impl IntoIterator<Item = f32>) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    values.into_iter().enumerate().fold(first, |best, (i, value)| if value > best.1 { (i, value) } else { best })
}

/// `scores`, `labels` and `boxes` (left, top, right, bottom) of each picture's objects above the threshold.
fn objects(call: &Outputs) -> Result<Tensors, SessionError> {
    let logits = call.tensor("logits", 3, &[])?.to_vec3::<f32>()?;
    let (batch, queries) = (logits.len(), logits[0].len());
    let boxes = call.tensor("pred_boxes", 3, &[batch, queries])?;
    if boxes.dim(2)? != 4 {
        let reason = format!("has shape {:?}, expected four numbers a box", boxes.dims());
        return Err(SessionError::input("pred_boxes", reason));
    }
    let boxes = boxes.to_vec3::<f32>()?;
    let threshold = call.number("threshold", 0.5)? as f32;
    let sizes = call.target_sizes(batch)?;
    let mut found = Tensors::new();
    for (i, (logits, boxes)) in logits.iter().zip(&boxes).enumerate() {
        let [height, width] = sizes.as_ref().map_or([1.0; 2], |sizes| sizes[i].map(|side| side as f32));
        let (mut scores, mut labels, mut corners) = (Vec::new(), Vec::new(), Vec::new());
        for (logits, centre_and_size) in logits.iter().zip(boxes) {
            // the last label is that there is no object
            let (label, score) = largest(softmax(logits).into_iter().take(logits.len() - 1));
            if score > threshold {
                scores.push(score);
                labels.push(label as i64);
                let &[x, y, w, h] = centre_and_size.as_slice() else { continue };
                let (dx, dy) = (0.5 * w, 0.5 * h);
                corners.extend([(x - dx) * width, (y - dy) * height, (x + dx) * width, (y + dy) * height]);
            }
        }
        let count = scores.len();
        found.extend([
            (format!("scores.{i}"), Tensor::from_vec(scores, count, &Device::Cpu)?),
            (format!("labels.{i}"), Tensor::from_vec(labels, count, &Device::Cpu)?),
            (format!("boxes.{i}"), Tensor::from_vec(corners, (count, 4), &Device::Cpu)?),
        ]);
    }
    Ok(found)
}

/// `segmentation`, the label of each pixel, and, where asked for, `segmentation_scores` (labels, height, width).
fn semantic(call: &Outputs) -> Result<Tensors, SessionError> {
    let logits = call.tensor("logits", 3, &[])?;
    let (batch, queries, classes) = logits.dims3()?;
    let masks = call.tensor("pred_masks", 4, &[batch, queries])?;
    let (_, _, height, width) = masks.dims4()?;
    let labels = classes - 1; // the last one is that there is no object
    let sizes = call.target_sizes(batch)?;
    let with_scores = call.flag("return_segmentation_scores")?;
    let mut found = Tensors::new();
    for i in 0..batch {
        let classes = candle_nn::ops::softmax(&logits.i(i)?, 1)?.narrow(1, 0, labels)?; // (queries, labels)
        let masks = candle_nn::ops::sigmoid(&masks.i(i)?.flatten_from(1)?)?; // (queries, height * width)
        let mut scores = classes.t()?.contiguous()?.matmul(&masks)?.reshape((1, labels, height, width))?;
        if let Some(sizes) = &sizes {
            scores = resize::bilinear(&scores, sizes[i].into(), false)?;
        }
        let scores = scores.squeeze(0)?;
        let segmentation = scores.argmax(0)?.to_dtype(DType::I64)?;
        found.insert(format!("segmentation.{i}"), segmentation);
        if with_scores {
            found.insert(format!("segmentation_scores.{i}"), scores);
        }
    }
    Ok(found)
}

/// `segmentation`, the segment of each pixel (0 for none; -1 everywhere where no query found anything), and of each
/// segment its `id`, `label_id`, `score` and whether it `was_fused` from several queries of a label of `fused`.
fn segmented(call: &Outputs, fused: &[i64]) -> Result<Tensors, SessionError> {
    let logits = call.tensor("logits", 3, &[])?.to_vec3::<f32>()?;
    let (batch, queries) = (logits.len(), logits[0].len());
    let masks = call.tensor("pred_masks", 4, &[batch, queries])?;
    let (_, _, height, width) = masks.dims4()?;
    let threshold = call.number("threshold", 0.5)? as f32;
    let mask_threshold = call.number("mask_threshold", 0.5)? as f32;
    let overlap_threshold = call.number("overlap_mask_area_threshold", 0.8)?;
    let sizes = call.target_sizes(batch)?;
    let mut found = Tensors::new();
    for (i, logits) in logits.iter().enumerate() {
        let size = sizes.as_ref().map_or([height, width], |sizes| sizes[i]);
        let mut kept = Vec::new();
        for (query, logits) in logits.iter().enumerate() {
            let (label, score) = largest(softmax(logits));
            if label + 1 != logits.len() && score > threshold {
                kept.push(Kept { query: query as u32, label: label as i64, score });
            }
        }
        let segments = if kept.is_empty() {
            let nothing = Tensor::full(-1f32, (size[0], size[1]), &Device::Cpu)?;
            found.insert(format!("segmentation.{i}"), nothing);
            Vec::new()
        } else {
            let queries: Vec<u32> = kept.iter().map(|kept| kept.query).collect();
            let masks = masks.i(i)?.index_select(&Tensor::new(queries, &Device::Cpu)?, 0)?;
            let probabilities: Vec<f32> = masks.flatten_all()?.to_vec1::<f32>()?.into_iter().map(sigmoid).collect();
            let mut probabilities = Tensor::from_vec(probabilities, (1, kept.len(), height, width), &Device::Cpu)?;
            if sizes.is_some() {
                probabilities = resize::bilinear(&probabilities, size.into(), false)?;
            }
            let thresholds = (mask_threshold, overlap_threshold);
            let (map, segments) = segments(probabilities.flatten_all()?.to_vec1()?, &kept, thresholds, fused);
            found.insert(format!("segmentation.{i}"), Tensor::from_vec(map, (size[0], size[1]), &Device::Cpu)?);
            segments
        };
        let count = segments.len();
        let integers =
            |of: fn(&Segment) -> i64| Tensor::from_vec(segments.iter().map(of).collect(), count, &Device::Cpu);
        let scores: Vec<f32> = segments.iter().map(|segment| segment.score).collect();
        found.extend([
            (format!("id.{i}"), integers(|segment| segment.id.into())?),
            (format!("label_id.{i}"), integers(|segment| segment.label_id)?),
            (format!("was_fused.{i}"), integers(|segment| segment.was_fused.into())?),
            (format!("score.{i}"), Tensor::from_vec(scores, count, &Device::Cpu)?),
        ]);
    }
    Ok(found)
}

/// A query that found something.
struct Kept {
    query: u32,
    label: i64,
    score: f32,
}

/// A part of a picture.
#[derive(Debug, PartialEq)]
struct Segment {
    id: i32,
    label_id: i64,
    was_fused: bool,
    score: f32,
}

/// The segment of each pixel, from the `masks` of the queries that are `kept`, one after the other: each pixel goes to
/// the likeliest query, and a query that keeps too little of its mask is left out.
fn segments(
    mut masks: Vec<f32>,
    kept: &[Kept],
    (mask_threshold, overlap_threshold): (f32, f64),
    fused: &[i64],
) -> (Vec<i32>, Vec<Segment>) {
    let pixels = masks.len() / kept.len();
    for (mask, kept) in masks.chunks_exact_mut(pixels).zip(kept) {
        mask.iter_mut().for_each(|probability| *probability *= kept.score);
    }
    let best: Vec<usize> = (0..pixels).map(|pixel| largest(masks[pixel..].iter().step_by(pixels).copied()).0).collect();
    let (mut map, mut found, mut id) = (vec![0; pixels], Vec::new(), 0);
    let mut known: BTreeMap<i64, i32> = BTreeMap::new();
    for (k, (mask, kept)) in masks.chunks_exact(pixels).zip(kept).enumerate() {
        let area = best.iter().filter(|best| **best == k).count();
        let whole = mask.iter().filter(|probability| **probability >= mask_threshold).count();
        let is_large = whole > 0 && f64::from(area as f32 / whole as f32) > overlap_threshold;
        if area == 0 || !is_large {
            continue;
        }
        let was_fused = fused.contains(&kept.label);
        // an id that was taken up again is counted on from, as in the class
        id = known.get(&kept.label).copied().unwrap_or(id + 1);
        for (segment, best) in map.iter_mut().zip(&best) {
            if *best == k {
                *segment = id;
            }
        }
        let score = (f64::from(kept.score) * 1e6).round_ties_even() / 1e6;
        found.push(Segment { id, label_id: kept.label, was_fused, score: score as f32 });
        if was_fused {
            known.insert(kept.label, id);
        }
    }
    (map, found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn call(method: &str, inputs: &Tensors, arguments: Value) -> Result<Tensors, SessionError> {
        let processor = DetectionProcessor::from_config(&json!({}), "detr")?;
        let Value::Object(arguments) = arguments else { return Err(SessionError::input("arguments", "no object")) };
        processor.call(&format!("post_process_{method}"), &BTreeMap::new(), inputs, &arguments)
    }

    /// Three queries of 2 labels on 1 x 4 pixels: label 0 on the left, label 1 in the middle, label 0 on the right.
    fn outputs() -> Result<Tensors, SessionError> {
        let logits = Tensor::new(&[[[5f32, 0., 0.], [0., 6., 0.], [4., 0., 0.]]], &Device::Cpu)?;
        let masks = [[[[9f32, -9., -9., -9.]], [[-9., 9., 8., -9.]], [[-9., -9., 7., 9.]]]];
        let boxes = Tensor::zeros((1, 3, 4), DType::F32, &Device::Cpu)?;
        let masks = Tensor::new(&masks, &Device::Cpu)?;
        Ok([("logits".into(), logits), ("pred_masks".into(), masks), ("pred_boxes".into(), boxes)].into())
    }

    #[test]
    fn segments_of_a_row_of_pixels() -> Result<(), SessionError> {
        let outputs = outputs()?;
        let integers = |found: &Tensors, name: &str| -> Result<Vec<i64>, SessionError> {
            Ok(found[name].flatten_all()?.to_dtype(DType::I64)?.to_vec1()?)
        };
        // the third query keeps one of its two pixels
        let found = call("instance_segmentation", &outputs, json!({}))?;
        assert_eq!(integers(&found, "segmentation.0")?, [1, 2, 2, 0]);
        assert_eq!(integers(&found, "label_id.0")?, [0, 1]);
        let half = json!({"overlap_mask_area_threshold": 0.4});
        let found = call("instance_segmentation", &outputs, half)?;
        assert_eq!(integers(&found, "segmentation.0")?, [1, 2, 2, 3]);
        let fused = json!({"overlap_mask_area_threshold": 0.4, "label_ids_to_fuse": [0]});
        let found = call("panoptic_segmentation", &outputs, fused)?;
        assert_eq!(integers(&found, "segmentation.0")?, [1, 2, 2, 1]);
        assert_eq!(integers(&found, "was_fused.0")?, [1, 0, 1]);
        assert_eq!(found["segmentation.0"].dtype(), DType::I32);
        let nothing = call("panoptic_segmentation", &outputs, json!({"threshold": 1.0, "target_sizes": [[2, 3]]}))?;
        assert_eq!(nothing["segmentation.0"].to_vec2::<f32>()?, [[-1.0; 3]; 2]);
        assert_eq!(nothing["id.0"].dims(), [0]);
        Ok(())
    }

    #[test]
    fn labels_of_a_row_of_pixels() -> Result<(), SessionError> {
        let outputs = outputs()?;
        let found = call("semantic_segmentation", &outputs, json!({"return_segmentation_scores": true}))?;
        assert_eq!(found["segmentation.0"].to_vec2::<i64>()?, [[0, 1, 1, 0]]);
        assert_eq!(found["segmentation_scores.0"].dims(), [2, 1, 4]);
        let found = call("semantic_segmentation", &outputs, json!({"target_sizes": [[2, 8]]}))?;
        assert_eq!(found["segmentation.0"].dims(), [2, 8]);
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_named() -> Result<(), SessionError> {
        let outputs = outputs()?;
        let message = |method: &str, arguments: Value| {
            call(method, &outputs, arguments).err().map(|error| error.to_string()).unwrap_or_default()
        };
        let sizes = message("object_detection", json!({"target_sizes": [[1, 2], [3, 4]]}));
        assert!(sizes.starts_with("input `target_sizes`: is [[1, 2], [3, 4]], expected"), "{sizes}");
        assert!(message("object_detection", json!({"top_k": 3})).starts_with("input `top_k`: is not supported"));
        assert!(
            message("object_detection", json!({"threshold": "high"})).starts_with("input `threshold`: is \"high\"")
        );
        assert!(message("keypoints", json!({})).starts_with("input `method`: `post_process_keypoints`"));
        let without = call("object_detection", &Tensors::new(), json!({})).err().map(|error| error.to_string());
        assert_eq!(without.unwrap_or_default(), "input `logits`: is missing");
        Ok(())
    }
}
