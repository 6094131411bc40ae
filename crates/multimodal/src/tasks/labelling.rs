//! Labels: of questions about pictures (ViLT), pictures (CLIP) and videos (VideoMAE).

use candle_core::{DType, Tensor};
use roofbench_core::classify;
use roofbench_core::session::{Call, Session, SessionError, Tensors};
use roofbench_core::task::{self, Answer, Task};
use roofbench_text::tasks;
use roofbench_vision::image::RgbImage;
use roofbench_vision::preprocess::ImageProcessor;

use super::{Given, Side, frames, pairs, rows, token, with_mask};

/// Labels or words shown for each item.
const TOP: usize = 5;

struct Labelling {
    given: Given,
    /// Pictures beside each text, where that is more than one.
    images: usize,
}

/// The task of a class that labels.
pub(super) fn task(given: Given) -> Result<Box<dyn Task>, SessionError> {
    let class = given.spec.class.as_str();
    match class {
        "VideoMAEForPreTraining" => {
            let reason = "VideoMAEForPreTraining draws hidden patches again; VideoMAEForVideoClassification labels";
            return Err(SessionError::input("--image", reason));
        }
        class if class.starts_with("Vilt") => given.expect(&["text", "image"], &[])?,
        _ => given.expect(&["image"], &[])?,
    }
    let several = class == "ViltForImagesAndTextClassification";
    let images = if several { token(&given.spec.config, "num_images").unwrap_or(1).max(1) as usize } else { 1 };
    Ok(Box::new(Labelling { given, images }))
}

impl Labelling {
    /// Which of the pictures and which text stand in each place.
    fn places(&self) -> Result<Vec<[usize; 2]>, SessionError> {
        let [pictures, texts] = [self.given.raw.images.len(), self.given.raw.texts.len()];
        if !pictures.is_multiple_of(self.images) {
            let reason = format!("is given {pictures} times; num_images is {}, beside each text", self.images);
            return Err(SessionError::input("--image", reason));
        }
        pairs(pictures / self.images, texts)
    }

    /// `pixel_values` (videos, frames, 3, height, width): each folder or GIF is a video, pictures are the frames of one.
    fn videos(&self) -> Result<Tensors, SessionError> {
        let (given, files) = (&self.given, &self.given.raw.images);
        let processor = ImageProcessor::from_config(
            roofbench_vision::preprocessor_config(&given.spec.extra_configs)?,
            &given.spec.family,
        )?;
        let wanted = token(&given.spec.config, "num_frames").unwrap_or(16).max(1) as usize;
        let videos = match self.is_of_videos() {
            true => files.iter().map(|path| frames::sampled(path, wanted)).collect::<Result<_, _>>()?,
            false => vec![frames::of_files(files, wanted)?],
        };
        let prepared = |frames: Vec<RgbImage>| {
            let frames = frames.iter().map(|frame| processor.prepare(frame)).collect::<Result<Vec<_>, _>>()?;
            Ok(Tensor::stack(&frames, 0)?)
        };
        let videos = videos.into_iter().map(prepared).collect::<Result<Vec<_>, SessionError>>()?;
        Ok([("pixel_values".to_owned(), Tensor::stack(&videos, 0)?)].into())
    }

    fn is_of_videos(&self) -> bool {
        self.given.raw.images.iter().any(|path| frames::is_video(path))
    }

    /// What the rows of the answer are about.
    fn names(&self) -> Result<Vec<String>, SessionError> {
        let (given, images) = (&self.given, self.given.images());
        if given.spec.family == "videomae" && !self.is_of_videos() {
            return Ok(vec![format!("{} frames", images.len())]);
        }
        if given.raw.texts.is_empty() {
            return Ok(images);
        }
        let texts = given.texts();
        let name = |[picture, text]: [usize; 2]| {
            let pictures = images[picture * self.images..(picture + 1) * self.images].join(", ");
            format!("{pictures}: {}", texts[text])
        };
        Ok(self.places()?.into_iter().map(name).collect())
    }
}

impl Task for Labelling {
    fn preparation(&self) -> &'static str {
        self.given.preparation()
    }

    fn call(&self) -> Result<Call, SessionError> {
        let given = &self.given;
        if given.spec.family == "videomae" {
            return given.call("forward", self.videos()?, &[]);
        }
        let mut inputs = given.pictures()?;
        if !given.raw.texts.is_empty() {
            let places = self.places()?;
            let pictures = places.iter().flat_map(|[picture, _]| picture * self.images..(picture + 1) * self.images);
            let pictures: Vec<usize> = pictures.collect();
            for tensor in inputs.values_mut() {
                *tensor = rows(tensor, &pictures)?;
                if self.images > 1 {
                    let shape = [&[places.len(), self.images], &tensor.dims()[1..]].concat();
                    *tensor = tensor.reshape(shape)?;
                }
            }
            let tokens = given.tokens()?;
            let tokens: Vec<Vec<i64>> = places.iter().map(|[_, text]| tokens[*text].clone()).collect();
            let pad = token(&given.spec.config, "pad_token_id").unwrap_or(0);
            inputs.extend(with_mask(&tokens, pad, Side::Right)?);
        }
        given.call("forward", inputs, &[])
    }

    fn answer(&self, call: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let (given, config) = (&self.given, &self.given.spec.config);
        let Some(logits) = outputs.get("logits") else { return Ok(Vec::new()) };
        let (logits, names) = (logits.to_dtype(DType::F32)?, self.names()?);
        let answer = match given.spec.class.as_str() {
            // labels don't exclude each other
            "ViltForQuestionAnswering" => {
                let labels = classify::labels(config)?;
                let scores = candle_nn::ops::sigmoid(&logits)?.to_vec2::<f32>()?;
                let mut table = Vec::new();
                for (name, scores) in names.iter().zip(scores) {
                    let mut order: Vec<usize> = (0..scores.len().min(labels.len())).collect();
                    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
                    let row = |i: usize| vec![labels[i].clone(), task::percent(scores[i])];
                    table.extend(task::grouped(name, order.into_iter().take(TOP).map(row)));
                }
                Answer::table(&["question", "answer", "score"], table)
            }
            "ViltForImageAndTextRetrieval" => {
                let scores = logits.flatten_all()?.to_vec1::<f32>()?;
                let rows = names.into_iter().zip(scores).map(|(name, score)| vec![name, format!("{score:.4}")]);
                Answer::table(&["picture and text", "score"], rows.collect())
            }
            "ViltForMaskedLM" => {
                let ids = given.output(&call.inputs, "input_ids")?;
                let words = tasks::fill_mask(given.tokenizer()?, ids, &logits, TOP)?;
                match tasks::fillings_table(&names, &words) {
                    Some(table) => table,
                    None => return Ok(Vec::new()),
                }
            }
            "ViltForTokenClassification" => {
                let (labels, ids) = (classify::labels(config)?, given.output(&call.inputs, "input_ids")?);
                let mask = given.output(&call.inputs, "attention_mask")?.to_vec2::<i64>()?;
                let ids = ids.to_vec2::<i64>()?;
                let mut table = Vec::new();
                for (item, name) in names.iter().enumerate() {
                    let best = classify::classify(&logits.get(item)?.narrow(0, 0, ids[item].len())?, &labels, 1)?;
                    let exists = |at: &usize| mask[item][*at] == 1;
                    let mut found = Vec::new();
                    for at in (0..ids[item].len()).filter(exists) {
                        let word = given.tokenizer()?.decode(&ids[item][at..=at])?;
                        let best = best[at]
                            .first()
                            .map(|best| vec![word, best.label.clone(), task::percent(best.probability)]);
                        found.extend(best.filter(|row| !row[0].is_empty()));
                    }
                    table.extend(task::grouped(name, found));
                }
                Answer::table(&["input", "token", "label", "probability"], table)
            }
            _ if logits.rank() == 2 => classify::table(&names, &logits, config, TOP)?,
            _ => return Ok(Vec::new()),
        };
        Ok(vec![answer])
    }
}
