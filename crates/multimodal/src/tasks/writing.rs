//! Texts about pictures: captions and answers (BLIP, GIT, BLIP-2, InstructBLIP, Pix2Struct), chat about one or several
//! (LLaVA), pages as JSON (Donut).

use candle_core::Tensor;
use roofbench_core::session::{Call, Session, SessionError, Tensors};
use roofbench_core::task::{Answer, Task};
use roofbench_core::weights::Weights;
use roofbench_text::tokenize::Tokenizer;
use roofbench_vision::preprocess::ImageProcessor;
use serde_json::Value;

use super::chat::{ChatTemplate, IMAGE};
use super::{Given, Side, document, frames, padded, pairs, rows, token, with_mask};
use crate::models::llava::{LlavaConfig, Strategy};

/// Tokens written when `max_new_tokens` is not given, and by Donut, whose pages take more.
const NEW_TOKENS: u64 = 32;
const PAGE_TOKENS: u64 = 512;

/// Donut's tokens around a question.
const QUESTION: [&str; 2] = ["<s_docvqa><s_question>", "</s_question><s_answer>"];

/// How the class takes texts, and where what it writes begins.
enum Kind {
    /// Begins with its text, if any.
    BlipCaption,
    /// The text is a question, which its encoder reads.
    BlipAnswer,
    /// Goes on behind its text; with so many frames of a video before it, where the checkpoint has seen videos.
    Git { frames: usize },
    /// Goes on behind places for the picture and the text, or answers them.
    Blip2 {
        image_token: i64,
        queries: usize,
        /// The language model has an encoder for the text.
        encodes: bool,
        /// Reads the instruction for the Q-Former, in InstructBLIP.
        instructions: Option<Box<Tokenizer>>,
    },
    /// Goes on behind a chat with places for pictures.
    Llava { image_token: i64, patches: usize, template: ChatTemplate },
    /// The text is how the caption begins.
    Pix2Struct,
    /// The text is a question, or a prompt that begins with a token of the task.
    Donut { positions: u64 },
}

struct Writing {
    given: Given,
    kind: Kind,
}

/// The task of a class that writes.
pub(super) fn task(mut given: Given, weights: &Weights) -> Result<Box<dyn Task>, SessionError> {
    let config = given.spec.config.clone();
    let number = |name: &str| token(&config, name);
    let (needed, optional): (&[&'static str], &[&'static str]) = match given.spec.class.as_str() {
        "LlavaForConditionalGeneration" => (&["text"], &["image"]),
        "BlipForQuestionAnswering" | "InstructBlipForConditionalGeneration" => (&["text", "image"], &[]),
        _ => (&["image"], &["text"]),
    };
    given.expect(needed, optional)?;
    let kind = match (given.spec.family.as_str(), given.spec.class.as_str()) {
        ("blip", "BlipForQuestionAnswering") => Kind::BlipAnswer,
        ("blip", _) => Kind::BlipCaption,
        ("git", _) => Kind::Git { frames: number("num_image_with_embedding").unwrap_or(0).max(0) as usize },
        ("llava", _) => {
            let cfg = LlavaConfig::from_spec(&given.spec)?;
            let side = cfg.vision_config.image_size / cfg.vision_config.patch_size;
            let class_token = usize::from(cfg.vision_feature_select_strategy == Strategy::Full);
            Kind::Llava {
                image_token: cfg.image_token_index,
                patches: side * side + class_token,
                template: ChatTemplate::of(weights)?,
            }
        }
        ("pix2struct", _) => Kind::Pix2Struct,
        ("donut", _) => {
            let positions = config.pointer("/decoder/max_position_embeddings").and_then(Value::as_u64);
            Kind::Donut { positions: positions.unwrap_or(1024) }
        }
        (family, _) => {
            let encodes = config.pointer("/text_config/model_type").and_then(Value::as_str) == Some("t5");
            let instructions = (family == "instructblip").then(|| {
                let path = weights.file("qformer_tokenizer/tokenizer.json").ok_or_else(|| {
                    let reason =
                        "needs qformer_tokenizer/tokenizer.json beside the weights, for the Q-Former's own tokens";
                    SessionError::input("--text", reason)
                })?;
                Tokenizer::from_file(path)
            });
            Kind::Blip2 {
                // the session has refused a checkpoint without
                image_token: number("image_token_index").or(number("image_token_id")).unwrap_or(-1),
                queries: number("num_query_tokens").unwrap_or(32).max(0) as usize,
                encodes,
                instructions: instructions.transpose()?.map(Box::new),
            }
        }
    };
    if !matches!(kind, Kind::Donut { .. }) {
        given.raw.arguments.entry("max_new_tokens").or_insert(NEW_TOKENS.into());
    }
    Ok(Box::new(Writing { given, kind }))
}

/// A chat with LLaVA: its tokens, and the pictures that stand in it.
type Prompt = (Vec<i64>, Vec<usize>);

impl Writing {
    /// Which picture and which text stand in each place of the batch; of texts there may be none.
    fn places(&self) -> Result<Vec<[usize; 2]>, SessionError> {
        let [pictures, texts] = [self.items(), self.given.raw.texts.len()];
        if texts == 0 { Ok((0..pictures).map(|i| [i, 0]).collect()) } else { pairs(pictures, texts) }
    }

    /// Pictures, or videos.
    fn items(&self) -> usize {
        self.given.raw.images.len()
    }

    /// The picture of each place, by the names that the class has for it.
    fn pictures(&self, places: &[usize]) -> Result<Tensors, SessionError> {
        let given = &self.given;
        let prepared = match self.kind {
            Kind::Git { frames: wanted } if given.raw.images.iter().any(|path| frames::is_video(path)) => {
                if wanted == 0 {
                    let reason = "is a video, and this checkpoint has seen none: num_image_with_embedding is absent";
                    return Err(SessionError::input("--image", reason));
                }
                self.videos(wanted)?
            }
            _ => given.pictures()?,
        };
        let each = |(name, tensor): (String, Tensor)| Ok((name, rows(&tensor, places)?));
        prepared.into_iter().map(each).collect()
    }

    /// (videos, frames, 3, height, width).
    fn videos(&self, wanted: usize) -> Result<Tensors, SessionError> {
        let spec = &self.given.spec;
        let config = roofbench_vision::preprocessor_config(&spec.extra_configs)?;
        let processor = ImageProcessor::from_config(config, &spec.family)?;
        let video = |path: &std::path::PathBuf| {
            let frames = frames::sampled(path, wanted)?;
            let frames = frames.iter().map(|frame| processor.prepare(frame)).collect::<Result<Vec<_>, _>>()?;
            Ok(Tensor::stack(&frames, 0)?)
        };
        let videos = self.given.raw.images.iter().map(video).collect::<Result<Vec<_>, SessionError>>()?;
        Ok([("pixel_values".to_owned(), Tensor::stack(&videos, 0)?)].into())
    }

    /// The tokens of the text in each place.
    fn texts(&self, places: &[[usize; 2]], tokens: &[Vec<i64>]) -> Vec<Vec<i64>> {
        places.iter().map(|[_, text]| tokens[*text].clone()).collect()
    }

    /// What masked places hold; they only have to exist.
    fn pad(&self) -> i64 {
        let config = &self.given.spec.config;
        let places = [config.get("text_config"), Some(config)];
        places.into_iter().flatten().find_map(|config| token(config, "pad_token_id")).filter(|id| *id >= 0).unwrap_or(0)
    }

    /// Prompts of one length, for a decoder whose class takes no mask for them.
    fn decoder_prompt(&self, prompts: &[Vec<i64>]) -> Result<Tensors, SessionError> {
        if let Some(other) = prompts.iter().map(Vec::len).find(|length| *length != prompts[0].len()) {
            let reason = format!(
                "is {} tokens once and {other} another time, and {} takes prompts of one length in a batch; ask in runs of \
                 their own",
                prompts[0].len(),
                self.given.spec.class
            );
            return Err(SessionError::input("--text", reason));
        }
        let [ids, _] = padded(prompts, 0, Side::Right)?;
        Ok([("decoder_input_ids".to_owned(), ids)].into())
    }

    fn inputs(&self) -> Result<Tensors, SessionError> {
        let given = &self.given;
        if let Kind::Llava { image_token, patches, template } = &self.kind {
            return self.chat(*image_token, *patches, template);
        }
        let places = self.places()?;
        let mut inputs = self.pictures(&places.iter().map(|[picture, _]| *picture).collect::<Vec<_>>())?;
        if given.raw.texts.is_empty() {
            return Ok(inputs);
        }
        let tokens = given.tokens()?;
        let texts = match &self.kind {
            Kind::BlipCaption | Kind::BlipAnswer => with_mask(&self.texts(&places, &tokens), self.pad(), Side::Right)?,
            Kind::Git { .. } => {
                // a text goes on where it ends, so that its start token alone is put around it
                let tokenizer = given.tokenizer()?;
                let start: Vec<i64> = tokenizer.ids("", true)?.into_iter().take(1).collect();
                let open = |text: &String| Ok([&start[..], &tokenizer.ids(text, false)?].concat());
                let open = given.raw.texts.iter().map(open).collect::<Result<Vec<_>, SessionError>>()?;
                with_mask(&self.texts(&places, &open), self.pad(), Side::Right)?
            }
            Kind::Blip2 { image_token, queries, encodes, instructions } => {
                let prompts: Vec<Vec<i64>> =
                    tokens.iter().map(|text| [&vec![*image_token; *queries][..], &text[..]].concat()).collect();
                let side = if *encodes { Side::Right } else { Side::Left };
                let mut inputs = with_mask(&self.texts(&places, &prompts), self.pad(), side)?;
                if let Some(tokenizer) = instructions {
                    let words: Vec<Vec<i64>> =
                        given.raw.texts.iter().map(|text| tokenizer.ids(text, true)).collect::<Result<_, _>>()?;
                    let [ids, mask] = padded(&self.texts(&places, &words), 0, Side::Right)?;
                    inputs.insert("qformer_input_ids".to_owned(), ids);
                    inputs.insert("qformer_attention_mask".to_owned(), mask);
                }
                inputs
            }
            Kind::Pix2Struct | Kind::Donut { .. } => {
                let prompt = |text: &String| given.tokenizer()?.ids(&self.asked(text), false);
                let prompts = given.raw.texts.iter().map(prompt).collect::<Result<Vec<_>, _>>()?;
                self.decoder_prompt(&self.texts(&places, &prompts))?
            }
            Kind::Llava { .. } => Tensors::new(),
        };
        inputs.extend(texts);
        Ok(inputs)
    }

    /// A question in the form that Donut was trained on; other texts as they are.
    fn asked(&self, text: &str) -> String {
        match self.kind {
            Kind::Donut { .. } if !text.starts_with('<') => format!("{}{text}{}", QUESTION[0], QUESTION[1]),
            _ => text.to_owned(),
        }
    }

    /// The inputs of LLaVA: each picture has as many places in its chat as it has patches.
    fn chat(&self, image_token: i64, patches: usize, template: &ChatTemplate) -> Result<Tensors, SessionError> {
        let (mut sequences, mut pictures) = (Vec::new(), Vec::new());
        for (tokens, of_prompt) in self.prompts(image_token, patches, template)? {
            sequences.push(tokens);
            pictures.extend(of_prompt);
        }
        let mut inputs = with_mask(&sequences, self.pad(), Side::Left)?;
        if !pictures.is_empty() {
            inputs.extend(self.pictures(&pictures)?);
        }
        Ok(inputs)
    }

    fn prompts(&self, image_token: i64, patches: usize, template: &ChatTemplate) -> Result<Vec<Prompt>, SessionError> {
        let (raw, tokenizer) = (&self.given.raw, self.given.tokenizer()?);
        let prompt = |(text, pictures): (&String, Vec<usize>)| {
            // a text that says where pictures stand is a prompt as it is
            let text = if text.contains(IMAGE) { text.clone() } else { template.prompt(text, pictures.len())? };
            let ids = tokenizer.ids(&text, true)?;
            let places = ids.iter().filter(|id| **id == image_token).count();
            if places != pictures.len() {
                let reason = format!(
                    "reads `{IMAGE}` as token {image_token} {places} times in a prompt with {} pictures; image_token_index \
                     of config.json says which token it is",
                    pictures.len()
                );
                return Err(SessionError::input("tokenizer.json", reason));
            }
            let expanded =
                ids.iter().flat_map(|id| std::iter::repeat_n(*id, if *id == image_token { patches } else { 1 }));
            Ok((expanded.collect(), pictures))
        };
        raw.texts.iter().zip(shared_out(&raw.texts, raw.images.len())?).map(prompt).collect()
    }

    /// Where in the sequences of the output what was written begins.
    fn written_from(&self, call: &Call) -> Result<usize, SessionError> {
        let length = |name: &str| call.inputs.get(name).map(|ids| ids.dim(1)).transpose();
        Ok(match &self.kind {
            // the class leaves out the end of the text
            Kind::BlipCaption => length("input_ids")?.map_or(1, |length| length - 1),
            Kind::BlipAnswer | Kind::Blip2 { encodes: true, .. } => 1,
            Kind::Git { .. } => length("input_ids")?.unwrap_or(1),
            Kind::Blip2 { queries, .. } => length("input_ids")?.unwrap_or(queries + 1),
            Kind::Llava { .. } => length("input_ids")?.unwrap_or(0),
            // behind the start token
            Kind::Pix2Struct => length("decoder_input_ids")?.map_or(1, |length| length + 1),
            Kind::Donut { .. } => length("decoder_input_ids")?.unwrap_or(1),
        })
    }

    /// What was written in each place; the numbers of tokens where there is no tokenizer.
    fn written(&self, call: &Call, outputs: &Tensors) -> Result<Vec<String>, SessionError> {
        let sequences = self.given.output(outputs, "sequences")?.to_vec2::<i64>()?;
        // a caption begins with what it was given
        let from = match self.kind {
            Kind::BlipCaption | Kind::Pix2Struct | Kind::Donut { .. } => 0,
            _ => self.written_from(call)?,
        };
        let text = |row: Vec<i64>| {
            let ids = row.get(from..).unwrap_or_default();
            match (&self.given.tokenizer, &self.kind) {
                (Some(tokenizer), Kind::Donut { .. }) => Ok(json(tokenizer, &tokenizer.decode_all(ids)?)),
                (Some(tokenizer), _) => Ok(tokenizer.decode(ids)?.trim().to_owned()),
                (None, _) => {
                    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
                    Ok(format!("tokens {}", ids.join(" ")))
                }
            }
        };
        sequences.into_iter().map(text).collect()
    }
}

/// Which of `pictures` stand in each text: those that it names by `<image>`, else all of them in a text that stands alone,
/// else one in each.
fn shared_out(texts: &[String], pictures: usize) -> Result<Vec<Vec<usize>>, SessionError> {
    let named: Vec<usize> = texts.iter().map(|text| text.matches(IMAGE).count()).collect();
    let all: usize = named.iter().sum();
    if all == 0 {
        return match (texts.len(), pictures) {
            (_, 0) => Ok(vec![Vec::new(); texts.len()]),
            (1, _) => Ok(vec![(0..pictures).collect()]),
            _ => Ok(pairs(pictures, texts.len())?.into_iter().map(|[picture, _]| vec![picture]).collect()),
        };
    }
    if pictures == 1 && named.iter().all(|count| *count == 1) {
        return Ok(vec![vec![0]; texts.len()]);
    }
    if all != pictures {
        let reason = format!("names {all} pictures by {IMAGE}, --image gives {pictures}");
        return Err(SessionError::input("--text", reason));
    }
    let mut next = 0;
    let taken = named.into_iter().map(|count| {
        next += count;
        (next - count..next).collect()
    });
    Ok(taken.collect())
}

/// Donut's text as JSON, without the token of its task and special tokens around.
fn json(tokenizer: &Tokenizer, text: &str) -> String {
    let mut text = text.to_owned();
    for special in ["</s>", "<pad>"] {
        text = text.replace(special, "");
    }
    let text = text.trim();
    // the first token names the task, and is never closed
    let body = text.strip_prefix('<').and_then(|rest| rest.split_once('>')).map_or(text, |(_, body)| body);
    let fields = document::fields(body.trim(), &|word| tokenizer.token_id(word).is_some());
    format!("{fields:#}")
}

impl Task for Writing {
    fn preparation(&self) -> &'static str {
        self.given.preparation()
    }

    fn call(&self) -> Result<Call, SessionError> {
        let mut call = self.given.call("generate", self.inputs()?, &[])?;
        if let Kind::Donut { positions } = self.kind {
            let prompt = self.written_from(&call)? as u64;
            let room = positions.saturating_sub(prompt).clamp(1, PAGE_TOKENS);
            call.arguments.entry("max_new_tokens").or_insert(room.into());
        }
        Ok(call)
    }

    fn amount(&self, call: &Call, outputs: &Tensors) -> Result<Option<f64>, SessionError> {
        let (batch, length) = self.given.output(outputs, "sequences")?.dims2()?;
        Ok(Some((batch * length.saturating_sub(self.written_from(call)?)) as f64))
    }

    fn answer(&self, call: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let (given, written) = (&self.given, self.written(call, outputs)?);
        let (images, texts) = (given.images(), given.texts());
        if let Kind::Llava { .. } = self.kind {
            let of_texts = shared_out(&given.raw.texts, images.len())?.into_iter().zip(texts).zip(written);
            let row = |((pictures, text), written): ((Vec<usize>, String), String)| {
                let pictures: Vec<&str> = pictures.iter().map(|picture| images[*picture].as_str()).collect();
                vec![pictures.join("\n"), text, written]
            };
            return Ok(vec![Answer::table(&["pictures", "text", "answer"], of_texts.map(row).collect())]);
        }
        let places = self.places()?.into_iter().zip(written);
        if let Kind::Donut { .. } = self.kind {
            let page =
                |([picture, _], fields): ([usize; 2], String)| Answer::Text(format!("{}\n{fields}", images[picture]));
            return Ok(places.map(page).collect());
        }
        let row = |([picture, text], written): ([usize; 2], String)| {
            let mut row = vec![images[picture].clone()];
            row.extend(texts.get(text).cloned());
            row.push(written);
            row
        };
        let asks = matches!(self.kind, Kind::BlipAnswer);
        let header: &[&str] = match (texts.is_empty(), asks) {
            (true, _) => &["picture", "caption"],
            (false, true) => &["picture", "question", "answer"],
            (false, false) => &["picture", "text", "written"],
        };
        Ok(vec![Answer::table(header, places.map(row).collect())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_shared_out_among_texts() -> Result<(), SessionError> {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        assert_eq!(shared_out(&texts(&["a"]), 3)?, [[0, 1, 2]]);
        assert_eq!(shared_out(&texts(&["a", "b"]), 1)?, [[0], [0]]);
        assert_eq!(shared_out(&texts(&["a", "b"]), 2)?, [[0], [1]]);
        assert_eq!(shared_out(&texts(&["a"]), 0)?, [[0usize; 0]]);
        assert_eq!(shared_out(&texts(&["<image> a", "<image><image> b"]), 3)?, [vec![0], vec![1, 2]]);
        assert_eq!(shared_out(&texts(&["<image> a", "<image> b"]), 1)?, [[0], [0]]);
        let error = shared_out(&texts(&["<image><image>"]), 3).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("input `--text`: names 2 pictures by <image>, --image gives 3"));
        assert!(shared_out(&texts(&["a", "b"]), 3).is_err());
        Ok(())
    }
}
