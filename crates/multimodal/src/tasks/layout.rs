//! Words with boxes (LayoutLM): labels of words and pages, and answers out of them.
//!
//! Words and their boxes are the arguments `words` and `boxes`, boxes as the classes want them: left, top, right and bottom
//! in thousandths of the page. Without `words` they are those of the text.

use candle_core::{D, DType, Device, Tensor};
use roofbench_core::classify;
use roofbench_core::session::{Call, Session, SessionError, Tensors};
use roofbench_core::task::{self, Answer, Task};
use roofbench_text::tasks;
use serde::de::DeserializeOwned;

use super::{Given, Side, padded};

/// Arguments of the task's own.
const OWN: [&str; 2] = ["words", "boxes"];

/// Labels or words shown for each item.
const TOP: usize = 5;

/// Most tokens of an answer.
const ANSWER: usize = 15;

struct Layout {
    given: Given,
    words: Vec<String>,
    boxes: Vec<[i64; 4]>,
    /// The text is a question, and words are apart.
    asks: bool,
}

/// A page as the class reads it.
struct Page {
    ids: Vec<i64>,
    boxes: Vec<[i64; 4]>,
    /// Which word each token is of; none of special tokens and of the question.
    words: Vec<Option<usize>>,
    /// 1 behind the question.
    segments: Vec<i64>,
}

/// The task of a class of LayoutLM.
pub(super) fn task(given: Given) -> Result<Box<dyn Task>, SessionError> {
    let class = &given.spec.class;
    given.expect(&["text"], if class.starts_with("LayoutLMv3") { &["image"] } else { &[] })?;
    let asks = class.ends_with("QuestionAnswering");
    let words: Vec<String> = match (argument(&given, OWN[0])?, asks) {
        (Some(words), _) => words,
        (None, false) => given.raw.texts.iter().flat_map(|text| text.split_whitespace()).map(str::to_owned).collect(),
        (None, true) => {
            let reason = "is missing: the words of the page, as in --arg 'words=[\"Total\", \"12.50\"]'";
            return Err(SessionError::input("--arg words", reason));
        }
    };
    let boxes: Vec<[i64; 4]> = argument(&given, OWN[1])?.ok_or_else(|| {
        let reason = "is missing: left, top, right and bottom of each word in thousandths of the page, as in --arg \
                      'boxes=[[70, 40, 180, 60], [800, 40, 900, 60]]'";
        SessionError::input("--arg boxes", reason)
    })?;
    if words.len() != boxes.len() {
        let reason = format!("holds {} boxes for {} words", boxes.len(), words.len());
        return Err(SessionError::input("--arg boxes", reason));
    }
    if given.raw.images.len() > 1 || (asks && given.raw.images.len() > given.raw.texts.len()) {
        return Err(SessionError::input("--image", "is given more than once; words and boxes are of one page"));
    }
    Ok(Box::new(Layout { given, words, boxes, asks }))
}

fn argument<T: DeserializeOwned>(given: &Given, name: &str) -> Result<Option<T>, SessionError> {
    let Some(value) = given.raw.arguments.get(name) else { return Ok(None) };
    let read = T::deserialize(value);
    read.map(Some).map_err(|error| SessionError::input(&format!("--arg {name}"), error.to_string()))
}

impl Layout {
    fn is_v3(&self) -> bool {
        self.given.spec.class.starts_with("LayoutLMv3")
    }

    /// The page behind `question`, or alone.
    fn page(&self, question: Option<&str>) -> Result<Page, SessionError> {
        let tokenizer = self.given.tokenizer()?;
        let special = tokenizer.ids("", true)?;
        let [begin, end] = special[..] else {
            let reason = format!("puts {} special tokens around a text; LayoutLM has two", special.len());
            return Err(SessionError::input("tokenizer.json", reason));
        };
        // v1 has a box of its own for the end of the words
        let corner = if self.is_v3() { [0; 4] } else { [1000; 4] };
        let mut page = Page { ids: vec![begin], boxes: vec![[0; 4]], words: vec![None], segments: vec![0] };
        let push = |page: &mut Page, id: i64, place: [i64; 4], word: Option<usize>, segment: i64| {
            page.ids.push(id);
            page.boxes.push(place);
            page.words.push(word);
            page.segments.push(segment);
        };
        let segment = i64::from(question.is_some() && !self.is_v3());
        if let Some(question) = question {
            tokenizer.ids(question, false)?.into_iter().for_each(|id| push(&mut page, id, [0; 4], None, 0));
            let ends = if self.is_v3() { 2 } else { 1 };
            (0..ends).for_each(|_| push(&mut page, end, if self.is_v3() { [0; 4] } else { corner }, None, 0));
        }
        for (number, (word, place)) in self.words.iter().zip(&self.boxes).enumerate() {
            // v3's tokens know whether a space comes before
            let word = if self.is_v3() { format!(" {}", word.trim()) } else { word.clone() };
            for id in tokenizer.ids(&word, false)? {
                push(&mut page, id, *place, Some(number), segment);
            }
        }
        push(&mut page, end, corner, None, segment);
        Ok(page)
    }

    fn pages(&self) -> Result<Vec<Page>, SessionError> {
        match self.asks {
            true => self.given.raw.texts.iter().map(|question| self.page(Some(question))).collect(),
            false => Ok(vec![self.page(None)?]),
        }
    }

    /// The answers to the questions: the span of words whose beginning and end are likeliest together.
    fn answers(&self, outputs: &Tensors) -> Result<Answer, SessionError> {
        let logits = |name: &str| Ok::<_, SessionError>(self.given.output(outputs, name)?.to_dtype(DType::F32)?);
        let log = |x: Tensor| candle_nn::ops::log_softmax(&x, D::Minus1)?.to_vec2::<f32>();
        let (starts, ends) = (log(logits("start_logits")?)?, log(logits("end_logits")?)?);
        let mut table = Vec::new();
        for (item, (page, question)) in self.pages()?.iter().zip(self.given.texts()).enumerate() {
            let best = best_span(&page.words, &starts[item], &ends[item]);
            let row = match best {
                Some(([first, last], score)) => {
                    vec![question, self.words[first..=last].join(" "), task::percent(score.exp())]
                }
                None => vec![question, String::new(), "no words".to_owned()],
            };
            table.push(row);
        }
        Ok(Answer::table(&["question", "answer", "probability"], table))
    }

    /// The label of each word, by the first of its tokens.
    fn labels(&self, logits: &Tensor) -> Result<Answer, SessionError> {
        let (page, labels) = (self.page(None)?, classify::labels(&self.given.spec.config)?);
        let best = classify::classify(&logits.get(0)?, &labels, 1)?;
        let mut table = Vec::new();
        let mut last = None;
        for (word, best) in page.words.iter().zip(best) {
            if let (Some(number), Some(best), true) = (*word, best.first(), *word != last) {
                table.push(vec![self.words[number].clone(), best.label.clone(), task::percent(best.probability)]);
            }
            last = *word;
        }
        Ok(Answer::table(&["word", "label", "probability"], table))
    }
}

/// First and last word of the likeliest span, and the logarithm of its probability.
fn best_span(words: &[Option<usize>], starts: &[f32], ends: &[f32]) -> Option<([usize; 2], f32)> {
    let mut best: Option<([usize; 2], f32)> = None;
    for (from, start) in starts.iter().enumerate().take(words.len()) {
        for to in from..words.len().min(from + ANSWER).min(ends.len()) {
            let (Some(first), Some(last)) = (words[from], words[to]) else { continue };
            let score = start + ends[to];
            if best.is_none_or(|(_, known)| score > known) {
                best = Some(([first, last], score));
            }
        }
    }
    best
}

impl Task for Layout {
    fn preparation(&self) -> &'static str {
        self.given.preparation()
    }

    fn call(&self) -> Result<Call, SessionError> {
        let (given, pages) = (&self.given, self.pages()?);
        let pad = given.field("pad_token_id").and_then(serde_json::Value::as_i64).unwrap_or(0);
        let column =
            |of: fn(&Page) -> Vec<i64>, pad| padded(&pages.iter().map(of).collect::<Vec<_>>(), pad, Side::Right);
        let [ids, mask] = column(|page| page.ids.clone(), pad)?;
        let (batch, length) = ids.dims2()?;
        let mut boxes = Vec::with_capacity(batch * length * 4);
        for page in &pages {
            let fill = std::iter::repeat_n([0; 4], length - page.boxes.len());
            boxes.extend(page.boxes.iter().copied().chain(fill).flatten());
        }
        let mut inputs = Tensors::from([
            ("input_ids".to_owned(), ids),
            ("attention_mask".to_owned(), mask),
            ("bbox".to_owned(), Tensor::from_vec(boxes, (batch, length, 4), &Device::Cpu)?),
        ]);
        if !self.is_v3() {
            let [segments, _] = column(|page| page.segments.clone(), 0)?;
            inputs.insert("token_type_ids".to_owned(), segments);
        }
        if !given.raw.images.is_empty() {
            let pixels = given.pictures()?;
            inputs.extend(
                pixels
                    .into_iter()
                    .map(|(name, page)| Ok((name, page.repeat((batch, 1, 1, 1))?)))
                    .collect::<candle_core::Result<Vec<_>>>()?,
            );
        }
        given.call("forward", inputs, &OWN)
    }

    fn answer(&self, call: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        if self.asks {
            return Ok(vec![self.answers(outputs)?]);
        }
        let Some(logits) = outputs.get("logits") else { return Ok(Vec::new()) };
        let (class, name) = (&self.given.spec.class, [task::shortened(&self.words.join(" "))]);
        let answer = match logits.rank() {
            2 => Some(classify::table(&name, logits, &self.given.spec.config, TOP)?),
            3 if class.ends_with("MaskedLM") => {
                let ids = self.given.output(&call.inputs, "input_ids")?;
                tasks::fillings_table(&name, &tasks::fill_mask(self.given.tokenizer()?, ids, logits, TOP)?)
            }
            _ => Some(self.labels(logits)?),
        };
        Ok(answer.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_of_words_alone_and_short() {
        let words = [None, Some(0), Some(0), Some(1), None];
        let best = |starts: [f32; 5], ends: [f32; 5]| best_span(&words, &starts, &ends).map(|(span, _)| span);
        assert_eq!(best([9., 1., 0., 3., 0.], [9., 0., 2., 1., 0.]), Some([1, 1]));
        assert_eq!(best([0., 3., 0., 1., 0.], [0., 0., 0., 2., 9.]), Some([0, 1]));
        assert_eq!(best_span(&[None; 3], &[1.; 3], &[1.; 3]), None);
        let many: Vec<Option<usize>> = (0..40).map(Some).collect();
        let (mut starts, mut ends) = (vec![0f32; 40], vec![0f32; 40]);
        (starts[0], ends[39], ends[5]) = (9.0, 9.0, 1.0);
        assert_eq!(best_span(&many, &starts, &ends).map(|(span, _)| span), Some([0, 5]));
    }
}
