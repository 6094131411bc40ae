//! The text of a recogniser's logits by connectionist temporal classification (Graves et al., 2006): the best token of
//! each frame, repeats joined, blanks left out. Mirrors `transformers.Wav2Vec2CTCTokenizer.decode`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{D, DType, Tensor};
use roofbench_core::session::SessionError;
use serde_json::Value;

/// Tokens of a checkpoint.
///
/// ```
/// use roofbench_speech::candle_core::{Device, Tensor};
/// use roofbench_speech::ctc::CtcDecoder;
/// use roofbench_speech::serde_json::json;
///
/// let vocab = json!({"<pad>": 0, "|": 1, "A": 2, "B": 3});
/// let decoder = CtcDecoder::new(&vocab, &json!({}))?;
/// // A A blank A | B
/// let best = [2u32, 2, 0, 2, 1, 3];
/// let logits = Tensor::eye(4, roofbench_speech::candle_core::DType::F32, &Device::Cpu)?;
/// let logits = logits.index_select(&Tensor::new(&best, &Device::Cpu)?, 0)?.unsqueeze(0)?; // (batch, frames, vocab)
/// assert_eq!(decoder.decode(&logits)?, ["AA B"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CtcDecoder {
    tokens: BTreeMap<u32, String>,
    blank: String,
    delimiter: String,
    /// In place of the delimiter.
    space: String,
    /// Tokens that are no text.
    special: Vec<String>,
    lower_case: bool,
}

impl CtcDecoder {
    /// From `vocab.json` and `tokenizer_config.json` in a checkpoint's folder; the second may be absent.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn from_folder(folder: &Path) -> Result<Self, SessionError> {
        let read = |name: &str| {
            let path = folder.join(name);
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
            let value = text.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()));
            value.map_err(|reason| SessionError::File { path, reason })
        };
        let vocab = read("vocab.json")?;
        let config =
            if folder.join("tokenizer_config.json").exists() { read("tokenizer_config.json")? } else { Value::Null };
        Self::new(&vocab, &config)
            .map_err(|error| SessionError::File { path: folder.join("vocab.json"), reason: error.to_string() })
    }

    /// From the contents of `vocab.json` and `tokenizer_config.json` (null where there is none). A vocabulary of several
    /// languages is read at the config's `target_lang`.
    ///
    /// # Errors
    /// [`SessionError::Input`] when the vocabulary is malformed, or its language is not given.
    pub fn new(vocab: &Value, config: &Value) -> Result<Self, SessionError> {
        let refuse = |reason: String| SessionError::input("vocab", reason);
        let mut entries = vocab.as_object().ok_or_else(|| refuse("is no object of tokens and ids".to_owned()))?;
        if entries.values().all(Value::is_object) && !entries.is_empty() {
            let language = config.get("target_lang").and_then(Value::as_str);
            let language = language.ok_or_else(|| refuse("has several languages; set target_lang".to_owned()))?;
            let found = entries.get(language).and_then(Value::as_object);
            entries = found.ok_or_else(|| refuse(format!("has no language `{language}`")))?;
        }
        let id = |(token, id): (&String, &Value)| match id.as_u64().map(u32::try_from) {
            Some(Ok(id)) => Ok((id, token.clone())),
            _ => Err(refuse(format!("token `{token}` has the id {id}, expected a number"))),
        };
        // a token is its text, or an object with it
        let token = |name: &str, default: &str| match config.get(name) {
            Some(Value::String(token)) => token.clone(),
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str).unwrap_or(default).to_owned(),
            _ => default.to_owned(),
        };
        Ok(Self {
            tokens: entries.iter().map(id).collect::<Result<_, _>>()?,
            blank: token("pad_token", "<pad>"),
            delimiter: token("word_delimiter_token", "|"),
            space: token("replace_word_delimiter_char", " "),
            special: vec![token("bos_token", "<s>"), token("eos_token", "</s>"), token("unk_token", "<unk>")],
            lower_case: config.get("do_lower_case").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// The text of each item of `logits` (batch, frames, vocab), special tokens left out.
    ///
    /// # Errors
    /// [`SessionError::Input`] when they have another shape.
    pub fn decode(&self, logits: &Tensor) -> Result<Vec<String>, SessionError> {
        if logits.rank() != 3 {
            let reason = format!("has shape {:?}, expected (batch, frames, vocab)", logits.dims());
            return Err(SessionError::input("logits", reason));
        }
        let best = logits.to_dtype(DType::F32)?.argmax(D::Minus1)?.to_vec2::<u32>()?;
        Ok(best.iter().map(|ids| self.text(ids)).collect())
    }

    /// The text of the best token of each frame.
    pub fn text(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        for ids in ids.chunk_by(|a, b| a == b) {
            match self.tokens.get(&ids[0]) {
                Some(token) if *token == self.delimiter => text.push_str(&self.space),
                Some(token) if *token != self.blank && !self.special.contains(token) => text.push_str(token),
                _ => {}
            }
        }
        let text = text.trim();
        if self.lower_case { text.to_lowercase() } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn repeats_blanks_delimiters_and_special_tokens() {
        let vocab = json!({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "H": 5, "I": 6});
        let decoder = CtcDecoder::new(&vocab, &json!({"pad_token": {"content": "<pad>"}})).unwrap();
        assert_eq!(decoder.text(&[4, 1, 5, 5, 0, 5, 6, 3, 4, 4, 0, 6, 4, 2]), "HHI I");
        assert_eq!(decoder.text(&[]), "");
        let lower = CtcDecoder::new(&vocab, &json!({"do_lower_case": true, "word_delimiter_token": "I"})).unwrap();
        assert_eq!(lower.text(&[5, 6, 5]), "h h");
    }

    #[test]
    fn vocabularies_of_several_languages_need_one() {
        let vocab = json!({"eng": {"<pad>": 0, "a": 1}, "fra": {"<pad>": 0, "é": 1}});
        let message = |config| CtcDecoder::new(&vocab, &config).unwrap_err().to_string();
        assert!(message(json!({})).contains("set target_lang"));
        assert!(message(json!({"target_lang": "deu"})).contains("no language `deu`"));
        assert_eq!(CtcDecoder::new(&vocab, &json!({"target_lang": "fra"})).unwrap().text(&[1, 0, 1]), "éé");
        assert!(CtcDecoder::new(&json!({"a": "b"}), &json!({})).unwrap_err().to_string().contains("token `a`"));
    }
}
