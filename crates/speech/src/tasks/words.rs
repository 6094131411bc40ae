//! The text of Whisper's tokens, with times where it gives them, and where the next window of a long sound begins.
//! Mirrors the sequential form of `transformers.WhisperForConditionalGeneration.generate` without its fallbacks.

use std::collections::BTreeMap;

use roofbench_core::session::{Arguments, ModelSpec, SessionError};
use roofbench_core::task::{self, Answer};
use serde_json::Value;

use super::{WINDOW, numbers};
use crate::tokenize::Tokenizer;

/// Seconds by which each window goes on, whatever the tokens say: an end comes.
const LEAST: f64 = 1.0;

/// What a checkpoint says of its tokens.
pub(super) struct Words {
    tokenizer: Option<Tokenizer>,
    /// The token of 0 seconds; those behind it are later.
    first_time: Option<i64>,
    /// Seconds from a token of time to the next.
    step: f64,
    /// Tokens with which an answer begins, and with which it ends.
    prompt: Vec<i64>,
    ends: Vec<i64>,
    languages: BTreeMap<String, i64>,
    max_new_tokens: Option<usize>,
}

/// Some words.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Segment {
    /// Seconds.
    begin: f64,
    /// Seconds.
    end: f64,
    text: String,
}

impl Segment {
    pub(super) fn later(self, seconds: f64) -> Self {
        Self { begin: self.begin + seconds, end: self.end + seconds, ..self }
    }
}

/// The words of a window.
#[derive(Debug, PartialEq)]
pub(super) struct Heard {
    pub(super) segments: Vec<Segment>,
    /// Seconds after which the next window begins, where words of this one go on beyond it.
    pub(super) end: Option<f64>,
}

fn ids(value: Option<&Value>) -> Vec<i64> {
    match value {
        Some(Value::Array(values)) => values.iter().filter_map(Value::as_i64).collect(),
        Some(Value::Object(values)) => values.values().filter_map(Value::as_i64).collect(),
        Some(value) => value.as_i64().into_iter().collect(),
        None => Vec::new(),
    }
}

impl Words {
    pub(super) fn new(spec: &ModelSpec, tokenizer: Option<Tokenizer>) -> Self {
        let file = spec.extra_configs.get("generation_config.json");
        let field = |name: &str| {
            let filled = |value: &&Value| !value.is_null();
            file.and_then(|file| file.get(name)).or_else(|| spec.config.get(name)).filter(filled)
        };
        let no_times = field("no_timestamps_token_id").and_then(Value::as_i64);
        let languages = field("lang_to_id").and_then(Value::as_object);
        let languages = languages.into_iter().flatten().filter_map(|(name, id)| Some((name.clone(), id.as_i64()?)));
        let positions = |name: &str, usual: u64| spec.config.get(name).and_then(Value::as_u64).unwrap_or(usual);
        let is_given = |name: &str| file.and_then(|file: &Value| file.get(name)).is_some_and(|value| !value.is_null());
        let says_how_many = is_given("max_length") || is_given("max_new_tokens");
        let room = usize::try_from(positions("max_target_positions", 448) / 2).unwrap_or(0);
        Self {
            tokenizer,
            first_time: no_times.map(|id| id + 1),
            step: WINDOW / positions("max_source_positions", 1500).max(1) as f64,
            prompt: ["decoder_start_token_id", "lang_to_id", "task_to_id", "no_timestamps_token_id"]
                .into_iter()
                .flat_map(|name| ids(field(name)))
                .collect(),
            ends: ids(field("eos_token_id")),
            languages: languages.collect(),
            // as the authors have it: half of the positions, beside the prompt
            max_new_tokens: (!says_how_many).then(|| room.saturating_sub(4).max(1)),
        }
    }

    /// Adds what a call needs that people leave out.
    pub(super) fn complete(&self, arguments: &mut Arguments) {
        if arguments.get("return_timestamps") == Some(&true.into()) {
            arguments.entry("force_unique_generate_call").or_insert(true.into());
        }
        if let Some(most) = self.max_new_tokens {
            arguments.entry("max_new_tokens").or_insert(most.into());
        }
    }

    /// The same for a window of a long sound: times, by which the next one begins, and the language of the first.
    pub(super) fn hold(&self, arguments: &mut Arguments, language: Option<&str>) {
        if self.first_time.is_some() {
            arguments.entry("return_timestamps").or_insert(true.into());
        }
        if let Some(language) = language {
            arguments.entry("language").or_insert(language.into());
        }
        self.complete(arguments);
    }

    /// The language that an answer of a multilingual model begins with.
    pub(super) fn language(&self, tokens: &[i64]) -> Option<String> {
        let second = tokens.get(1)?;
        self.languages.iter().find(|(_, id)| *id == second).map(|(name, _)| name.clone())
    }

    fn text(&self, tokens: &[i64]) -> Result<String, SessionError> {
        let is_text = |token: &&i64| self.first_time.is_none_or(|first| **token < first);
        let tokens: Vec<i64> = tokens.iter().filter(is_text).copied().collect();
        match &self.tokenizer {
            Some(tokenizer) => Ok(tokenizer.decode(&tokens)?.trim().to_owned()),
            None => Ok(numbers(tokens)),
        }
    }

    /// The words of an answer for a window of `seconds`.
    pub(super) fn read(&self, tokens: &[i64], seconds: f64) -> Result<Heard, SessionError> {
        let begin = tokens.iter().position(|token| !self.prompt.contains(token)).unwrap_or(tokens.len());
        let tokens = &tokens[begin..];
        let end = tokens.iter().position(|token| self.ends.contains(token)).unwrap_or(tokens.len());
        let tokens = &tokens[..end];
        let time = |token: i64| self.first_time.filter(|first| token >= *first).map(|first| token - first);
        let seconds_at = |token: i64| time(token).map(|steps| (steps as f64 * self.step).min(seconds));
        let is_time = |at: usize| tokens.get(at).copied().and_then(time).is_some();
        let segment = |tokens: &[i64], ends: f64| {
            let begin = tokens.first().copied().and_then(seconds_at).unwrap_or(0.0);
            Ok::<_, SessionError>(Segment { begin, end: ends, text: self.text(tokens)? })
        };
        // where one segment's end is followed by another's beginning
        let pairs: Vec<usize> = (1..tokens.len()).filter(|at| is_time(at - 1) && is_time(*at)).collect();
        let ends_alone = tokens.len() > 1 && is_time(tokens.len() - 1) && !is_time(tokens.len() - 2);
        let Some(last_pair) = pairs.last().copied() else {
            let last = tokens.iter().rev().find_map(|token| seconds_at(*token)).filter(|last| *last > 0.0);
            let segments = match tokens.iter().any(|token| time(*token).is_none()) {
                true => vec![segment(tokens, last.unwrap_or(seconds))?],
                false => Vec::new(),
            };
            return Ok(Heard { segments, end: None });
        };
        let bounds = pairs.iter().copied().chain(ends_alone.then_some(tokens.len()));
        let (mut from, mut segments) = (0, Vec::new());
        for to in bounds {
            let part = &tokens[from..to];
            if part.iter().any(|token| time(*token).is_none()) {
                segments.push(segment(part, part.last().copied().and_then(seconds_at).unwrap_or(seconds))?);
            }
            from = to;
        }
        // words behind the last pair are cut off by the window's end, and heard again
        let end = if ends_alone { None } else { seconds_at(tokens[last_pair - 1]).filter(|end| *end >= LEAST) };
        Ok(Heard { segments, end })
    }

    /// Texts by name; with times where they are known.
    pub(super) fn table(&self, heard: impl Iterator<Item = (String, Vec<Segment>)>) -> Answer {
        let what = if self.tokenizer.is_some() { "text" } else { "tokens (no tokenizer.json beside the weights)" };
        let rows = heard.flat_map(|(name, segments)| {
            let none = segments.is_empty().then(|| vec![String::new(), "(nothing)".to_owned()]);
            let of = |segment: Segment| vec![format!("{:.2} to {:.2}", segment.begin, segment.end), segment.text];
            task::grouped(&name, segments.into_iter().map(of).chain(none))
        });
        Answer::table(&["input", "seconds", what], rows.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times from token 100 on, 0.02 s each; 1 to 3 begin an answer, 9 ends it.
    fn words() -> Words {
        Words {
            tokenizer: None,
            first_time: Some(100),
            step: 0.02,
            prompt: vec![1, 2, 3],
            ends: vec![9],
            languages: BTreeMap::from([("<|en|>".to_owned(), 2)]),
            max_new_tokens: None,
        }
    }

    #[test]
    fn segments_and_the_next_window() -> Result<(), SessionError> {
        let words = words();
        let segment = |begin: f64, end: f64, text: &str| Segment { begin, end, text: text.to_owned() };
        let check = |tokens: &[i64], segments: Vec<Segment>, end: Option<f64>| {
            assert_eq!(words.read(tokens, 10.0).ok(), Some(Heard { segments, end }), "{tokens:?}");
        };
        // without times the window is one segment
        check(&[1, 2, 3, 20, 21, 9, 0], vec![segment(0.0, 10.0, "20 21")], None);
        check(&[1, 2, 3, 9], Vec::new(), None);
        // one segment, then the window is done with
        check(&[1, 2, 100, 20, 21, 200, 9], vec![segment(0.0, 2.0, "20 21")], None);
        // a second one that ends in the window
        let two = vec![segment(0.0, 2.0, "20"), segment(2.0, 4.0, "21")];
        check(&[1, 100, 20, 200, 200, 21, 300, 9], two, None);
        // one that does not is heard again from where it begins
        check(&[1, 100, 20, 200, 200, 21, 22, 9], vec![segment(0.0, 2.0, "20")], Some(2.0));
        check(&[1, 100, 20, 200, 200, 9], vec![segment(0.0, 2.0, "20")], Some(2.0));
        // no time is beyond the window
        check(&[1, 100, 20, 1500, 9], vec![segment(0.0, 10.0, "20")], None);
        assert_eq!(words.language(&[1, 2, 3]).as_deref(), Some("<|en|>"));
        Ok(())
    }

    #[test]
    fn windows_of_long_sounds_have_times_and_one_language() {
        let mut arguments = Arguments::new();
        words().hold(&mut arguments, Some("<|en|>"));
        for (name, value) in [
            ("return_timestamps", true.into()),
            ("force_unique_generate_call", true.into()),
            ("language", "<|en|>".into()),
        ] {
            assert_eq!(arguments.get(name), Some::<&Value>(&value));
        }
        let mut given = Arguments::from_iter([("return_timestamps".to_owned(), Value::Bool(false))]);
        words().hold(&mut given, None);
        assert_eq!(given.len(), 1);
    }
}
