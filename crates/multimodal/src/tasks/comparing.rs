//! How near pictures, texts and sounds are to each other: CLIP, FLAVA, the retrieval classes of BLIP and BLIP-2, ImageBind.

use candle_core::{DType, Tensor};
use roofbench_core::embeddings;
use roofbench_core::session::{Call, Session, SessionError, Tensors};
use roofbench_core::task::{self, Answer, Task};
use serde_json::Value;

use super::{Given, Side, pairs, rows, token, with_mask};

/// Tokens of a text for ImageBind, which ends in zeros.
const IMAGEBIND_CONTEXT: usize = 77;

/// What is compared, and what the class gives for it.
enum Kind {
    /// `CLIPModel`: all pictures with all texts.
    Clip,
    /// A tower of CLIP alone: things of one kind with each other, by this output.
    Alone(&'static str),
    /// `FlavaForPreTraining`: as CLIP, in a batch of as many pictures as texts.
    Flava,
    /// `…ForImageTextRetrieval`.
    Retrieval {
        /// The argument that asks whether a text is of a picture, rather than how near it is.
        head: &'static str,
        /// The output that holds either.
        scores: &'static str,
        /// Places for the picture before the words of a text.
        places: Vec<i64>,
    },
    /// All that is given with all else that is.
    ImageBind,
}

struct Comparing {
    given: Given,
    kind: Kind,
}

/// The task of a class that compares.
pub(super) fn task(mut given: Given) -> Result<Box<dyn Task>, SessionError> {
    let class = given.spec.class.clone();
    let kind = match (given.spec.family.as_str(), class.as_str()) {
        (_, "CLIPModel") => Kind::Clip,
        (_, "CLIPTextModel") => Kind::Alone("pooler_output"),
        (_, "CLIPTextModelWithProjection") => Kind::Alone("text_embeds"),
        (_, "CLIPVisionModel") => Kind::Alone("pooler_output"),
        (_, "CLIPVisionModelWithProjection") => Kind::Alone("image_embeds"),
        ("imagebind", _) => Kind::ImageBind,
        (_, "FlavaForPreTraining") => Kind::Flava,
        ("flava", _) => {
            let reason = format!("{class} gives states or codes, not likenesses; FlavaForPreTraining compares");
            return Err(SessionError::input("--image", reason));
        }
        ("blip", _) => Kind::Retrieval { head: "use_itm_head", scores: "itm_score", places: Vec::new() },
        _ => {
            let image_token = ["image_token_index", "image_token_id"].iter().find_map(|n| token(&given.spec.config, n));
            let queries = token(&given.spec.config, "num_query_tokens").unwrap_or(32).max(0) as usize;
            let places = image_token.map_or(Vec::new(), |token| vec![token; queries]);
            Kind::Retrieval { head: "use_image_text_matching_head", scores: "logits_per_image", places }
        }
    };
    match &kind {
        Kind::Alone(_) if class.starts_with("CLIPText") => given.expect(&["text"], &[])?,
        Kind::Alone(_) => given.expect(&["image"], &[])?,
        Kind::ImageBind => given.expect(&[], &["text", "image", "audio"])?,
        _ => given.expect(&["text", "image"], &[])?,
    }
    if let Kind::Retrieval { head, .. } = &kind {
        // every text with every picture, unless the call asks for pairs
        given.raw.arguments.entry(*head).or_insert(false.into());
    }
    Ok(Box::new(Comparing { given, kind }))
}

impl Comparing {
    /// Whether the call asks if texts are of pictures, in pairs.
    fn matches(&self) -> bool {
        let asked = |head: &str| self.given.raw.arguments.get(head) == Some(&Value::Bool(true));
        matches!(&self.kind, Kind::Retrieval { head, .. } if asked(head))
    }

    /// `pixel_values` of each picture, or what the class calls them.
    fn pictures(&self) -> Result<Tensors, SessionError> {
        let mut tensors = self.given.pictures()?;
        // FLAVA's processor may prepare pictures for its codebook as well
        tensors.retain(|name, _| name != "codebook_pixel_values");
        Ok(tensors)
    }

    fn inputs(&self) -> Result<Tensors, SessionError> {
        let (given, raw) = (&self.given, &self.given.raw);
        let mut inputs = Tensors::new();
        if let Kind::ImageBind = self.kind {
            if let [folder] = &raw.images[..]
                && folder.is_dir()
            {
                inputs.extend(given.prepared("frames", &super::frames::in_folder(folder)?)?);
            } else if !raw.images.is_empty() {
                inputs.extend(given.prepared("images", &raw.images)?);
            }
            if !raw.audio.is_empty() {
                inputs.extend(given.prepared("audio", &raw.audio)?);
            }
            if !raw.texts.is_empty() {
                inputs.insert("text".to_owned(), self.imagebind_text()?);
            }
            return Ok(inputs);
        }
        if !raw.images.is_empty() {
            inputs.extend(self.pictures()?);
        }
        if !raw.texts.is_empty() {
            let mut texts = given.tokens()?;
            if let Kind::Retrieval { places, .. } = &self.kind {
                texts.iter_mut().for_each(|text| *text = [&places[..], &text[..]].concat());
            }
            inputs.extend(with_mask(&texts, self.pad(), Side::Right)?);
        }
        let together = match &self.kind {
            Kind::Flava => {
                let batch = raw.images.len().max(raw.texts.len());
                Some((0..batch).map(|i| [i % raw.images.len(), i % raw.texts.len()]).collect())
            }
            _ if self.matches() => Some(pairs(raw.images.len(), raw.texts.len())?),
            _ => None,
        };
        if let Some(together) = together {
            let of = |side: usize| together.iter().map(|pair: &[usize; 2]| pair[side]).collect::<Vec<_>>();
            for (name, tensor) in &mut inputs {
                *tensor = rows(tensor, &of(usize::from(name.as_str() != "pixel_values")))?;
            }
        }
        Ok(inputs)
    }

    /// What texts are filled up with: it is masked, and only has to exist.
    fn pad(&self) -> i64 {
        let config = &self.given.spec.config;
        let text = config.get("text_config").unwrap_or(config);
        token(text, "pad_token_id").filter(|id| *id >= 0).unwrap_or(0)
    }

    /// (batch, 77) of CLIP's tokens, as ImageBind wants them.
    fn imagebind_text(&self) -> Result<Tensor, SessionError> {
        let mut texts = self.given.tokens()?;
        for (text, words) in texts.iter_mut().zip(self.given.texts()) {
            if text.len() > IMAGEBIND_CONTEXT {
                let reason = format!("\"{words}\" has {} tokens, ImageBind takes {IMAGEBIND_CONTEXT}", text.len());
                return Err(SessionError::input("--text", reason));
            }
            text.resize(IMAGEBIND_CONTEXT, 0);
        }
        let [ids, _] = super::padded(&texts, 0, Side::Right)?;
        Ok(ids)
    }

    /// Everything that was given with its embedding: (name, row).
    fn embedded(&self, outputs: &Tensors) -> Result<(Vec<String>, Tensor), SessionError> {
        let (given, raw) = (&self.given, &self.given.raw);
        let sounds = raw.audio.iter().map(|path| path.display().to_string()).collect();
        let parts = match &self.kind {
            Kind::ImageBind => vec![("vision", given.images()), ("text", given.texts()), ("audio", sounds)],
            Kind::Alone(output) if raw.texts.is_empty() => vec![(*output, given.images())],
            Kind::Alone(output) => vec![(*output, given.texts())],
            _ => Vec::new(),
        };
        let (mut names, mut embeds) = (Vec::new(), Vec::new());
        for (output, of) in parts.into_iter().filter(|(_, of)| !of.is_empty()) {
            embeds.push(given.output(outputs, output)?.to_dtype(DType::F32)?);
            names.extend(of);
        }
        Ok((names, Tensor::cat(&embeds, 0)?))
    }
}

impl Task for Comparing {
    fn preparation(&self) -> &'static str {
        self.given.preparation()
    }

    fn call(&self) -> Result<Call, SessionError> {
        self.given.call("forward", self.inputs()?, &[])
    }

    fn answer(&self, _: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let (given, images, texts) = (&self.given, self.given.images(), self.given.texts());
        let output = |name: &str| Ok::<_, SessionError>(given.output(outputs, name)?.to_dtype(DType::F32)?);
        let answer = match &self.kind {
            Kind::Alone(_) | Kind::ImageBind => {
                let (names, embeds) = self.embedded(outputs)?;
                if names.len() < 2 {
                    return Ok(Vec::new());
                }
                embeddings::table(&names, &embeds)?
            }
            Kind::Clip => ranked(&images, &texts, &output("logits_per_image")?.to_vec2()?, "logit", true),
            Kind::Flava => {
                let scores: Vec<Vec<f32>> = output("contrastive_logits_per_image")?.to_vec2()?;
                ranked(&images, &texts, &scores, "logit", true)
            }
            Kind::Retrieval { scores, .. } if self.matches() => {
                let matches = candle_nn::ops::softmax(&output(scores)?, 1)?.to_vec2::<f32>()?;
                let rows = pairs(images.len(), texts.len())?.into_iter().zip(matches).map(|([picture, text], row)| {
                    let probability = row.last().copied().unwrap_or_default();
                    vec![images[picture].clone(), texts[text].clone(), task::percent(probability)]
                });
                Answer::table(&["picture", "text", "of the picture"], rows.collect())
            }
            Kind::Retrieval { scores, .. } => {
                ranked(&images, &texts, &output(scores)?.to_vec2()?, "cosine similarity", false)
            }
        };
        Ok(vec![answer])
    }
}

/// The texts for each picture, the nearest first, or the pictures for a text that stands alone. `scores` are (pictures,
/// texts), of which more than there are may be given; with `softmax` their probabilities are shown as well.
fn ranked(pictures: &[String], texts: &[String], scores: &[Vec<f32>], score: &str, softmax: bool) -> Answer {
    let by_text = texts.len() == 1 && pictures.len() > 1;
    let (outer, inner) = if by_text { (texts, pictures) } else { (pictures, texts) };
    let at = |o: usize, i: usize| {
        let [picture, text] = if by_text { [i, o] } else { [o, i] };
        scores.get(picture).and_then(|row| row.get(text)).copied().unwrap_or(f32::NAN)
    };
    let mut table = Vec::new();
    for (o, name) in outer.iter().enumerate() {
        let of_outer: Vec<f32> = (0..inner.len()).map(|i| at(o, i)).collect();
        let largest = of_outer.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = of_outer.iter().map(|score| (score - largest).exp()).collect();
        let sum: f32 = weights.iter().sum();
        let mut order: Vec<usize> = (0..inner.len()).collect();
        order.sort_by(|a, b| of_outer[*b].total_cmp(&of_outer[*a]));
        table.extend(task::grouped(
            name,
            order.into_iter().map(|i| {
                let mut row = vec![inner[i].clone(), format!("{:.4}", of_outer[i])];
                row.extend(softmax.then(|| task::percent(weights[i] / sum)));
                row
            }),
        ));
    }
    let [first, second] = if by_text { ["text", "picture"] } else { ["picture", "text"] };
    let header: &[&str] = &[first, second, score, "probability"];
    Answer::table(&header[..if softmax { 4 } else { 3 }], table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_comes_first() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (cat, texts) = (names(&["cat.png"]), names(&["a dog", "a cat"]));
        let Answer::Table { header, rows } = ranked(&cat, &texts, &[vec![0.0, 3f32.ln()]], "logit", true) else {
            panic!("a table")
        };
        assert_eq!(header, ["picture", "text", "logit", "probability"]);
        assert_eq!(rows, [["cat.png", "a cat", "1.0986", "75.0 %"], ["", "a dog", "0.0000", "25.0 %"]]);
        // one text looks for a picture
        let (pictures, text) = (names(&["a.png", "b.png"]), names(&["a cat"]));
        let Answer::Table { header, rows } = ranked(&pictures, &text, &[vec![0.1], vec![0.2]], "cosine", false) else {
            panic!("a table")
        };
        assert_eq!(header, ["text", "picture", "cosine"]);
        assert_eq!(rows, [["a cat", "b.png", "0.2000"], ["", "a.png", "0.1000"]]);
    }
}
