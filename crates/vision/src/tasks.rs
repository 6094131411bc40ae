//! What people do with a vision model: labels of pictures, boxes of the objects in them, segments, masks for points and
//! boxes, and how alike pictures are. Boxes, segments and masks are also drawn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, IndexOp, Tensor, WithDType};
use image::RgbImage;
use roofbench_core::classify;
use roofbench_core::config;
use roofbench_core::embeddings;
use roofbench_core::session::{Arguments, Call, ModelSpec, Processor, Session, SessionError, Tensors};
use roofbench_core::task::{Answer, RawInputs, Task, grouped, percent};
use serde_json::Value;

use crate::draw::{self, Corners};
use crate::image_io::{Transparency, load_rgb};
use crate::models::HeightWidth;
use crate::preprocess::CHANNELS;

/// What a class gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gives {
    Labels,
    Boxes,
    Segments,
    Masks,
    /// What hidden patches look like.
    HiddenPatches,
    Features,
}

impl Gives {
    fn of(class: &str) -> Self {
        match class {
            class if class.ends_with("ForImageClassification") => Self::Labels,
            "DetrForObjectDetection" => Self::Boxes,
            "DetrForSegmentation" => Self::Segments,
            "SamModel" => Self::Masks,
            "SwinForMaskedImageModeling" => Self::HiddenPatches,
            _ => Self::Features,
        }
    }

    fn is_drawn(self) -> bool {
        matches!(self, Self::Boxes | Self::Segments | Self::Masks)
    }

    /// Arguments that are for what comes before the model.
    fn preparation(self) -> &'static [&'static str] {
        if self == Self::Masks { &["input_points", "input_labels", "input_boxes"] } else { &[] }
    }

    /// Arguments that are for what comes behind it.
    fn reading(self) -> &'static [&'static str] {
        match self {
            Self::Labels => &["top_k"],
            Self::Boxes => &["threshold"],
            Self::Segments => &["threshold", "mask_threshold", "overlap_mask_area_threshold", "label_ids_to_fuse"],
            Self::Masks => &["mask_threshold"],
            Self::HiddenPatches | Self::Features => &[],
        }
    }
}

/// A vision model's task: what its class gives decides the answer.
struct VisionTask {
    raw: RawInputs,
    gives: Gives,
    processor: Box<dyn Processor>,
    spec: ModelSpec,
}

/// The task of `spec` for pictures: labels (a classifier), boxes (`DetrForObjectDetection`), segments
/// (`DetrForSegmentation`), masks (`SamModel`), what hidden patches look like (`SwinForMaskedImageModeling`), or
/// embeddings (a base class).
///
/// # Errors
/// Other inputs than pictures, a file to save to that can't be written or that nothing would be drawn to, or what
/// [`processor`](crate::processor) refuses.
pub fn task(spec: &ModelSpec, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    raw.expect(&spec.family, &["image"])?;
    let gives = Gives::of(&spec.class);
    if let Some(path) = &raw.save {
        if !gives.is_drawn() {
            let reason = format!(
                "{} gives nothing to draw; DetrForObjectDetection, DetrForSegmentation and SamModel do",
                spec.class
            );
            return Err(SessionError::input("--save", reason));
        }
        (0..raw.images.len()).try_for_each(|item| draw::check(&numbered(path, item, raw.images.len())))?;
    }
    let processor = crate::processor(&spec.family, &spec.extra_configs)?;
    Ok(Box::new(VisionTask { raw, gives, processor, spec: spec.clone() }))
}

/// The file for picture `item` of `count`: `out.png`, or `out-1.png`, `out-2.png` of several.
fn numbered(path: &Path, item: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    path.with_file_name(format!("{}-{}.{}", part(path.file_stem()), item + 1, part(path.extension())))
}

impl Task for VisionTask {
    fn preparation(&self) -> &'static str {
        "preprocessing"
    }

    fn call(&self) -> Result<Call, SessionError> {
        let mut inputs = self.prepared(&self.given(self.gives.preparation()))?;
        self.check_prepared(&inputs)?;
        match self.gives {
            Gives::Masks => {
                inputs.remove("original_sizes");
                let reshaped = inputs.remove("reshaped_input_sizes");
                if let (Some(sizes), false) = (reshaped, self.has_prompts(&inputs)) {
                    let sizes = sizes.to_dtype(DType::F64)?; // (batch, height and width)
                    let centres = (sizes.index_select(&Tensor::new(&[1u32, 0], sizes.device())?, 1)? / 2.0)?;
                    inputs.insert("input_points".to_owned(), centres.reshape(((), 1, 1, 2))?);
                }
            }
            Gives::HiddenPatches => {
                let hidden = self.hidden_patches(&inputs)?;
                inputs.insert("bool_masked_pos".to_owned(), hidden);
            }
            _ => {}
        }
        let to_device = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(&self.spec.device)?));
        let inputs = inputs.into_iter().map(to_device).collect::<candle_core::Result<_>>()?;
        let elsewhere = [self.gives.preparation(), self.gives.reading()].concat();
        let arguments = self.raw.arguments.iter().filter(|(name, _)| !elsewhere.contains(&name.as_str()));
        let arguments = arguments.map(|(name, value)| (name.clone(), value.clone())).collect();
        Ok(Call { method: "forward".to_owned(), inputs, arguments })
    }

    fn answer(&self, call: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        match self.gives {
            Gives::Labels => self.labels(outputs),
            Gives::Boxes => self.boxes(outputs),
            Gives::Segments => self.segments(outputs),
            Gives::Masks => self.masks(call, outputs),
            Gives::HiddenPatches => hidden_patches_loss(outputs),
            Gives::Features => self.features(outputs),
        }
    }
}

impl VisionTask {
    /// The processor's tensors for the pictures.
    fn prepared(&self, arguments: &Arguments) -> Result<Tensors, SessionError> {
        let files = BTreeMap::from([("images".to_owned(), self.raw.images.clone())]);
        self.processor.call("preprocess", &files, &Tensors::new(), arguments)
    }

    /// The processor's reading of outputs.
    fn read(&self, method: &str, outputs: &Tensors, arguments: &Arguments) -> Result<Tensors, SessionError> {
        self.processor.call(method, &BTreeMap::new(), outputs, arguments)
    }

    /// Those of the arguments that have one of `names`.
    fn given(&self, names: &[&str]) -> Arguments {
        let given = self.raw.arguments.iter().filter(|(name, _)| names.contains(&name.as_str()));
        given.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    fn has_prompts(&self, inputs: &Tensors) -> bool {
        self.gives.preparation().iter().any(|name| inputs.contains_key(*name))
    }

    /// Refuses pictures that were prepared in another size or with other channels than the model's.
    fn check_prepared(&self, inputs: &Tensors) -> Result<(), SessionError> {
        let Some(pixels) = inputs.get("pixel_values") else { return Ok(()) };
        let (_, _, height, width) = pixels.dims4()?;
        let (family, flag) = (self.spec.family.as_str(), "interpolate_pos_encoding");
        let model = if family == "sam" { &self.spec.config["vision_config"] } else { &self.spec.config };
        if let Some(channels) = model["num_channels"].as_u64().filter(|channels| *channels != CHANNELS as u64) {
            let reason = format!("is {channels}; pictures are prepared with {CHANNELS}: red, green and blue");
            return Err(config::invalid("num_channels", reason));
        }
        let has_learned_positions = match family {
            "vit" => true,
            "swin" => model["use_absolute_embeddings"] == Value::Bool(true),
            _ => false,
        };
        let interpolates = self.raw.arguments.get(flag) == Some(&Value::Bool(true));
        if family != "sam" && (!has_learned_positions || interpolates) {
            return Ok(());
        }
        let size = HeightWidth { height, width };
        // a model without its size in the config, or with a malformed one, judges for itself
        let wanted = serde_json::from_value::<HeightWidth>(model["image_size"].clone()).ok();
        let Some(wanted) = wanted.filter(|wanted| *wanted != size) else { return Ok(()) };
        let processor = crate::preprocessor_config(&self.spec.extra_configs)?;
        let field = match () {
            () if family == "sam" => "pad_size",
            () if processor["do_resize"] == Value::Bool(false) => "do_resize",
            () if processor["do_center_crop"] == Value::Bool(true) => "crop_size",
            () => "size",
        };
        let way_out = if family == "sam" { String::new() } else { format!(", or give --arg {flag}=true") };
        let reason = format!(
            "makes pictures of {height} x {width} pixels, image_size in config.json is {} x {}; make them agree{way_out}",
            wanted.height, wanted.width
        );
        Err(SessionError::Preprocessor { field: field.to_owned(), reason })
    }

    fn names(&self) -> Vec<String> {
        self.raw.images.iter().map(|path| path.display().to_string()).collect()
    }

    /// The pictures as they are, to be drawn on.
    fn pictures(&self) -> Result<Vec<RgbImage>, SessionError> {
        self.raw.images.iter().map(|path| Ok(load_rgb(path, Transparency::OverWhite)?)).collect()
    }

    /// Writes what was drawn, where that is wanted.
    fn save(&self, pictures: &[RgbImage]) -> Result<Vec<Answer>, SessionError> {
        let Some(path) = &self.raw.save else { return Ok(Vec::new()) };
        let saved = pictures.iter().enumerate().map(|(item, picture)| {
            let path = numbered(path, item, pictures.len());
            draw::save(picture, &path)?;
            Ok(Answer::Saved(path))
        });
        saved.collect()
    }

    fn labels(&self, outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        /// Labels shown for each picture, where `top_k` does not say.
        const TOP: u64 = 5;
        let top = match self.raw.arguments.get("top_k") {
            None => TOP,
            Some(value) => value
                .as_u64()
                .filter(|top| *top > 0)
                .ok_or_else(|| SessionError::input("top_k", format!("is {value}, expected a number of labels")))?,
        };
        let logits = output(outputs, "logits")?;
        Ok(vec![classify::table(&self.names(), logits, &self.spec.config, top as usize)?])
    }

    /// `arguments` of a method that reads outputs, with the sizes of `pictures`.
    fn reading(&self, pictures: &[RgbImage]) -> Arguments {
        let mut arguments = self.given(self.gives.reading());
        let sizes: Vec<[u32; 2]> = pictures.iter().map(|picture| [picture.height(), picture.width()]).collect();
        arguments.insert("target_sizes".to_owned(), serde_json::json!(sizes));
        arguments
    }

    fn boxes(&self, outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        let (mut pictures, label) = (self.pictures()?, self.label_names()?);
        let found = self.read("post_process_object_detection", outputs, &self.reading(&pictures))?;
        let mut rows = Vec::new();
        for (item, (name, picture)) in self.names().iter().zip(&mut pictures).enumerate() {
            let (scores, labels) = (vector::<f32>(&found, "scores", item)?, vector::<i64>(&found, "labels", item)?);
            let corners = vector::<f32>(&found, "boxes", item)?;
            let corners: Vec<Corners> = corners.chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]).collect();
            let mut objects: Vec<(f32, i64, Corners)> = scores
                .into_iter()
                .zip(labels)
                .zip(corners)
                .map(|((score, label), box_)| (score, label, box_))
                .collect();
            objects.sort_by(|a, b| b.0.total_cmp(&a.0));
            // the likeliest on top
            for (score, id, corners) in objects.iter().rev() {
                let colour = draw::colour(*id as usize);
                draw::outline(picture, *corners, colour);
                draw::words(picture, [corners[0], corners[1]], &format!("{} {}", label(*id), percent(*score)), colour);
            }
            let of_object = |(score, id, corners): (f32, i64, Corners)| vec![label(id), percent(score), shown(corners)];
            rows.extend(grouped(name, objects.into_iter().map(of_object)));
        }
        let table = self.above_threshold(&["input", "label", "score", "box (left, top, right, bottom)"], rows);
        Ok([vec![table], self.save(&pictures)?].concat())
    }

    fn segments(&self, outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        let (mut pictures, label) = (self.pictures()?, self.label_names()?);
        let found = self.read("post_process_panoptic_segmentation", outputs, &self.reading(&pictures))?;
        let mut rows = Vec::new();
        for (item, (name, picture)) in self.names().iter().zip(&mut pictures).enumerate() {
            let map = vector::<f32>(&found, "segmentation", item)?; // the segment of each pixel
            let (ids, scores) = (vector::<i64>(&found, "id", item)?, vector::<f32>(&found, "score", item)?);
            let labels = vector::<i64>(&found, "label_id", item)?;
            let mut of_segments: Vec<(i64, i64, f32, Area)> = Vec::new();
            for ((id, label_id), score) in ids.into_iter().zip(labels).zip(scores) {
                // queries that were fused are one segment
                if of_segments.iter().any(|(known, ..)| *known == id) {
                    continue;
                }
                let is_inside = |pixel: usize| map.get(pixel) == Some(&(id as f32));
                let Some(area) = Area::of(picture, is_inside) else { continue };
                draw::tint(picture, is_inside, draw::colour(id as usize));
                of_segments.push((id, label_id, score, area));
            }
            for (id, label_id, _, area) in &of_segments {
                draw::words(picture, area.centre, &label(*label_id), draw::colour(*id as usize));
            }
            let of_segment = |(id, label_id, score, area): (i64, i64, f32, Area)| {
                vec![id.to_string(), label(label_id), percent(score), percent(area.share)]
            };
            rows.extend(grouped(name, of_segments.into_iter().map(of_segment)));
        }
        let table = self.above_threshold(&["input", "segment", "label", "score", "area"], rows);
        Ok([vec![table], self.save(&pictures)?].concat())
    }

    fn masks(&self, call: &Call, outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        let mut pictures = self.pictures()?;
        let prepared = self.prepared(&Arguments::new())?;
        let mut logits = Tensors::from([("pred_masks".to_owned(), output(outputs, "pred_masks")?.clone())]);
        for name in ["original_sizes", "reshaped_input_sizes"] {
            logits.insert(name.to_owned(), output(&prepared, name)?.clone());
        }
        let found = self.read("post_process_masks", &logits, &self.given(self.gives.reading()))?;
        let quality = output(outputs, "iou_scores")?.to_dtype(DType::F32)?;
        let prepared_sizes = output(&prepared, "reshaped_input_sizes")?.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let mut rows = Vec::new();
        for (item, (name, picture)) in self.names().iter().zip(&mut pictures).enumerate() {
            let masks = output(&found, &format!("masks.{item}"))?; // (prompts, masks, height, width)
            let quality = quality.i(item)?.to_vec2::<f32>()?; // (prompts, masks)
            let mut of_masks = Vec::new();
            for (prompt, quality) in quality.iter().enumerate() {
                let colour = draw::colour(prompt);
                let best = quality.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(mask, _)| mask);
                for (mask, iou) in quality.iter().enumerate() {
                    let inside = masks.i((prompt, mask))?.flatten_all()?.to_vec1::<u8>()?;
                    let is_inside = |pixel: usize| inside.get(pixel) == Some(&1);
                    let area = Area::of(picture, is_inside);
                    if best == Some(mask) {
                        draw::tint(picture, is_inside, colour);
                    }
                    of_masks.push(vec![
                        (prompt + 1).to_string(),
                        (mask + 1).to_string(),
                        format!("{iou:.3}"),
                        area.as_ref().map_or_else(|| "none".to_owned(), |area| percent(area.share)),
                        area.map_or_else(String::new, |area| shown(area.corners)),
                    ]);
                }
            }
            let size = prepared_sizes.get(item).map_or([1.0; 2], |size| [size[0] as f32, size[1] as f32]);
            draw_prompts(picture, call, item, size)?;
            rows.extend(grouped(name, of_masks));
        }
        let header = ["input", "prompt", "mask", "expected IoU", "area", "box (left, top, right, bottom)"];
        let mut answers = vec![Answer::table(&header, rows)];
        if self.given(self.gives.preparation()).is_empty() {
            let hint = "the prompt is the centre of each picture; --arg input_points=[[[x, y]]] names a point, \
                        --arg input_boxes=[[[left, top, right, bottom]]] a box";
            answers.push(Answer::Text(hint.to_owned()));
        }
        answers.extend(self.save(&pictures)?);
        Ok(answers)
    }

    /// Pictures as vectors: how alike they are, or of one its length and first numbers.
    fn features(&self, outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
        /// Numbers shown of a vector.
        const FIRST: usize = 4;
        let names = self.names();
        let Some(pooled) = outputs.get("pooler_output") else {
            let row = |(name, x): (&String, &Tensor)| vec![name.clone(), format!("{:?}", x.dims())];
            return Ok(vec![Answer::table(&["output", "shape"], outputs.iter().map(row).collect())]);
        };
        let pooled = pooled.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_from(1)?; // (batch, width)
        if names.len() > 1 {
            return Ok(vec![embeddings::table(&names, &pooled)?]);
        }
        let row = |(name, vector): (String, Vec<f32>)| {
            let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let first: Vec<String> = vector.iter().take(FIRST).map(|x| format!("{x:.4}")).collect();
            vec![name, vector.len().to_string(), format!("{length:.4}"), format!("{}, …", first.join(", "))]
        };
        let rows = names.into_iter().zip(pooled.to_vec2::<f32>()?).map(row).collect();
        Ok(vec![Answer::table(&["input", "width of the embedding", "length", "first numbers"], rows)])
    }

    /// The name of a label by its number.
    fn label_names(&self) -> Result<impl Fn(i64) -> String + use<>, SessionError> {
        let names = classify::labels(&self.spec.config)?;
        Ok(move |id: i64| {
            usize::try_from(id).ok().and_then(|id| names.get(id)).cloned().unwrap_or_else(|| format!("LABEL_{id}"))
        })
    }

    /// A table, or that there is nothing to show.
    fn above_threshold(&self, header: &[&str], rows: Vec<Vec<String>>) -> Answer {
        if !rows.is_empty() {
            return Answer::table(header, rows);
        }
        let threshold = self.raw.arguments.get("threshold").and_then(Value::as_f64).unwrap_or(0.5);
        Answer::Text(format!("nothing scores above {threshold}; --arg threshold=0.1 shows what is less certain"))
    }

    /// Hides every other square, of 32 pixels as SimMIM does where the picture is large enough: (batch, patches).
    fn hidden_patches(&self, inputs: &Tensors) -> Result<Tensor, SessionError> {
        let (batch, _, height, width) = output(inputs, "pixel_values")?.dims4()?;
        let square = (height.min(width) / 2).clamp(1, 32);
        let patch = serde_json::from_value::<HeightWidth>(self.spec.config["patch_size"].clone()).ok();
        let patch = patch.filter(|patch| patch.height > 0 && patch.width > 0);
        let patch = patch.unwrap_or(HeightWidth { height: 4, width: 4 });
        let (rows, columns) = (height.div_ceil(patch.height), width.div_ceil(patch.width));
        let of_picture = (0..rows * columns).map(|at| {
            let [y, x] = [at / columns * patch.height, at % columns * patch.width].map(|pixel| pixel / square);
            i64::from((x + y) % 2 == 1)
        });
        let hidden = Tensor::from_iter(of_picture, &Device::Cpu)?;
        Ok(hidden.unsqueeze(0)?.repeat((batch, 1))?)
    }
}

/// The output `name`.
fn output<'a>(outputs: &'a Tensors, name: &str) -> Result<&'a Tensor, SessionError> {
    outputs.get(name).ok_or_else(|| SessionError::input(name, "is missing in what the model gave"))
}

/// The numbers of `name` of picture `item`.
fn vector<T: WithDType>(found: &Tensors, name: &str, item: usize) -> Result<Vec<T>, SessionError> {
    Ok(output(found, &format!("{name}.{item}"))?.flatten_all()?.to_dtype(T::DTYPE)?.to_vec1()?)
}

/// Corners in whole pixels.
fn shown(corners: Corners) -> String {
    corners.map(|side| format!("{side:.0}")).join(", ")
}

/// How well a model draws what was hidden from it.
fn hidden_patches_loss(outputs: &Tensors) -> Result<Vec<Answer>, SessionError> {
    let loss = output(outputs, "loss")?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    Ok(vec![Answer::Text(format!(
        "every other square of the picture was hidden; what the model draws there is off by {loss:.4} on average, in \
         normalised pixels"
    ))])
}

/// Marks points and boxes, which are in coordinates of a picture of `size` (height, width).
fn draw_prompts(picture: &mut RgbImage, call: &Call, item: usize, size: [f32; 2]) -> Result<(), SessionError> {
    let factors = [picture.width() as f32 / size[1], picture.height() as f32 / size[0]];
    let prompts = |name: &str| -> Result<Vec<Vec<f32>>, SessionError> {
        let Some(prompts) = call.inputs.get(name) else { return Ok(Vec::new()) };
        Ok(prompts.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.i(item)?.flatten_from(1)?.to_vec2()?)
    };
    for (prompt, corners) in prompts("input_boxes")?.iter().enumerate() {
        let corners: Vec<f32> = corners.iter().enumerate().map(|(i, side)| side * factors[i % 2]).collect();
        if let &[left, top, right, bottom] = corners.as_slice() {
            draw::outline(picture, [left, top, right, bottom], draw::colour(prompt));
        }
    }
    for (prompt, points) in prompts("input_points")?.iter().enumerate() {
        for place in points.chunks_exact(2) {
            draw::point(picture, [place[0] * factors[0], place[1] * factors[1]], draw::colour(prompt));
        }
    }
    Ok(())
}

/// Some pixels of a picture.
struct Area {
    /// Of the whole picture.
    share: f32,
    corners: Corners,
    /// Mean place.
    centre: [f32; 2],
}

impl Area {
    /// The pixels that `is_inside` says by their number; nothing where there are none.
    fn of(picture: &RgbImage, is_inside: impl Fn(usize) -> bool) -> Option<Self> {
        let width = picture.width() as usize;
        let pixels = width * picture.height() as usize;
        let (mut count, mut sum, mut corners) = (0_u64, [0_u64; 2], [usize::MAX, usize::MAX, 0, 0]);
        for pixel in (0..pixels).filter(|pixel| is_inside(*pixel)) {
            let (x, y) = (pixel % width, pixel / width);
            count += 1;
            sum = [sum[0] + x as u64, sum[1] + y as u64];
            corners = [corners[0].min(x), corners[1].min(y), corners[2].max(x + 1), corners[3].max(y + 1)];
        }
        (count > 0).then(|| Self {
            share: count as f32 / pixels as f32,
            corners: corners.map(|side| side as f32),
            centre: sum.map(|sum| sum as f32 / count as f32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_pictures_have_a_file_each() {
        let name = |path: &str, item, count| numbered(Path::new(path), item, count);
        assert_eq!(name("a/out.png", 0, 1), Path::new("a/out.png"));
        assert_eq!(name("a/out.v2.png", 1, 2), Path::new("a/out.v2-2.png"));
    }

    #[test]
    fn areas_are_measured_in_the_picture() {
        let picture = RgbImage::new(4, 5);
        let area = Area::of(&picture, |pixel| [5, 6, 9, 10].contains(&pixel)).expect("an area");
        assert_eq!((area.share, area.corners, area.centre), (0.2, [1.0, 1.0, 3.0, 3.0], [1.5, 1.5]));
        assert!(Area::of(&picture, |_| false).is_none());
    }
}
