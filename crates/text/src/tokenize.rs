//! Text to tensors, by the checkpoint's own `tokenizer.json`.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use roofbench_core::session::{SessionError, Tensors};
use serde_json::Value;
use tokenizers::{PaddingParams, PaddingStrategy, PostProcessor, TruncationParams};

/// Files beside `tokenizer.json` that limit the length of a sequence, with the field that does.
const LENGTH_LIMITS: [(&str, &str); 3] = [
    ("config.json", "max_position_embeddings"),
    ("tokenizer_config.json", "model_max_length"),
    ("sentence_bert_config.json", "max_seq_length"),
];

/// The tokenizer of a checkpoint.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    max_length: Option<usize>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// Padding and truncation stored in the file are replaced: batches are padded to their longest text, and texts
    /// are cut at the smallest of `max_position_embeddings` of config.json, `model_max_length` of
    /// tokenizer_config.json and `max_seq_length` of sentence_bert_config.json in the same folder.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, SessionError> {
        let path = path.as_ref().to_path_buf();
        let mut inner = tokenizers::Tokenizer::from_file(&path).map_err(|error| file_error(&path, &error))?;

        let special = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        let mut max_length = None;
        for (file, field) in LENGTH_LIMITS {
            let file = path.with_file_name(file);
            let limit = read_json(&file)?.and_then(|json| json.get(field)?.as_u64());
            // "no limit" is written as 10^30, which is no u64
            let limit = limit.and_then(|limit| usize::try_from(limit).ok());
            if let Some(limit) = limit.filter(|&limit| limit <= special) {
                let reason = format!("`{field}` = {limit} leaves no room beside {special} special tokens");
                return Err(SessionError::File { path: file, reason });
            }
            max_length = [max_length, limit].into_iter().flatten().min();
        }
        let truncation = max_length.map(|max_length| TruncationParams { max_length, ..Default::default() });
        inner.with_truncation(truncation).map_err(|error| file_error(&path, &error))?;

        let stored = inner.get_padding().cloned();
        let padding = stored.or_else(|| {
            let pad_token = ["[PAD]", "<pad>"].into_iter().find(|token| inner.token_to_id(token).is_some())?;
            let pad_id = inner.token_to_id(pad_token)?;
            Some(PaddingParams { pad_id, pad_token: pad_token.to_string(), ..Default::default() })
        });
        inner.with_padding(padding.map(|padding| PaddingParams { strategy: PaddingStrategy::BatchLongest, ..padding }));
        Ok(Self { inner, path, max_length })
    }

    /// Most tokens that [`Self::encode`] makes of a text; longer ones are cut. `None` without a limit.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// Tokenises a batch: `input_ids`, `attention_mask` and `token_type_ids`.
    ///
    /// # Shapes
    /// Each (batch, seq) in i64, `seq` being the longest text's.
    ///
    /// # Errors
    /// Without texts, with an empty result, and with texts of different lengths where the file has no padding token.
    pub fn encode(&self, texts: &[impl AsRef<str>], device: &Device) -> Result<Tensors, SessionError> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let encodings = self.inner.encode_batch(texts, true).map_err(|error| file_error(&self.path, &error))?;
        let seq = encodings.first().map_or(0, |encoding| encoding.len());
        if seq == 0 {
            return Err(SessionError::input("text", "there is nothing to encode"));
        }
        if let Some(other) = encodings.iter().map(|encoding| encoding.len()).find(|&len| len != seq) {
            let reason = format!("has no padding token, which texts of {seq} and {other} tokens in one batch need");
            return Err(SessionError::File { path: self.path.clone(), reason });
        }
        let tensor = |field: fn(&tokenizers::Encoding) -> &[u32]| {
            let values: Vec<i64> = encodings.iter().flat_map(field).map(|&value| i64::from(value)).collect();
            Tensor::from_vec(values, (encodings.len(), seq), device)
        };
        Ok(Tensors::from([
            ("input_ids".into(), tensor(|encoding| encoding.get_ids())?),
            ("attention_mask".into(), tensor(|encoding| encoding.get_attention_mask())?),
            ("token_type_ids".into(), tensor(|encoding| encoding.get_type_ids())?),
        ]))
    }
}

impl Tokenizer {
    /// The text of tokens, without the special ones.
    ///
    /// # Errors
    /// A token that is none of the file's.
    pub fn decode(&self, ids: &[i64]) -> Result<String, SessionError> {
        self.decoded(ids, true)
    }

    fn decoded(&self, ids: &[i64], skip_special: bool) -> Result<String, SessionError> {
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| u32::try_from(id))
            .collect::<Result<_, _>>()
            .map_err(|_| SessionError::input("token ids", "hold a negative number, which no token has"))?;
        self.inner.decode(&ids, skip_special).map_err(|error| file_error(&self.path, &error))
    }

    /// The tokens of one text, cut as [`encode`](Self::encode) cuts it, with the file's special tokens around it
    /// (`special`) or without.
    ///
    /// # Errors
    /// A text that can't be tokenised.
    pub fn ids(&self, text: &str, special: bool) -> Result<Vec<i64>, SessionError> {
        let encoding = self.inner.encode(text, special).map_err(|error| file_error(&self.path, &error))?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The number of a token as it is written in the file: `<image>`; `None` where it has no such token.
    pub fn token_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// The text of tokens, special ones as they are written in the file.
    ///
    /// # Errors
    /// A token that is none of the file's.
    pub fn decode_all(&self, ids: &[i64]) -> Result<String, SessionError> {
        self.decoded(ids, false)
    }

    /// The token that stands for what a masked language model is to fill in.
    ///
    /// # Errors
    /// The file has no such token.
    pub fn mask_token(&self) -> Result<u32, SessionError> {
        let found = ["[MASK]", "<mask>"].into_iter().find_map(|token| self.inner.token_to_id(token));
        found.ok_or_else(|| file_error(&self.path, &"has neither `[MASK]` nor `<mask>`"))
    }
}

/// The JSON in `path`, or `None` when there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, SessionError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| file_error(path, &error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(path, &error)),
    }
}

fn file_error(path: &Path, reason: &dyn std::fmt::Display) -> SessionError {
    SessionError::File { path: path.to_path_buf(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of whole words, with the limits given as (file, content).
    fn tokenizer(padding: &str, limits: &[(&str, &str)]) -> (tempfile::TempDir, Result<Tokenizer, SessionError>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let json = serde_json::json!({
            "version": "1.0",
            // what the file asks for is replaced
            "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {
                "type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1],
            },
            "model": {
                "type": "WordLevel", "unk_token": "[UNK]",
                "vocab": {padding: 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6},
            },
        });
        std::fs::write(&path, json.to_string()).unwrap();
        for (file, content) in limits {
            std::fs::write(folder.path().join(file), content).unwrap();
        }
        let tokenizer = Tokenizer::from_file(&path);
        (folder, tokenizer)
    }

    fn rows(tensors: &Tensors, name: &str) -> Vec<Vec<i64>> {
        tensors[name].to_vec2().unwrap()
    }

    #[test]
    fn batches_are_padded_to_the_longest() {
        let (_folder, tokenizer) = tokenizer("[PAD]", &[]);
        let tensors = tokenizer.unwrap().encode(&["a b c", "b"], &Device::Cpu).unwrap();
        assert_eq!(rows(&tensors, "input_ids"), [[1, 4, 5, 6, 2], [1, 5, 2, 0, 0]]);
        assert_eq!(rows(&tensors, "attention_mask"), [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]);
        assert_eq!(rows(&tensors, "token_type_ids"), [[0; 5], [0; 5]]);
    }

    #[test]
    fn the_smallest_limit_cuts() {
        let unlimited = r#"{"model_max_length": 1000000000000000019884624838656}"#;
        let limits = [
            ("config.json", r#"{"max_position_embeddings": 9}"#),
            ("tokenizer_config.json", unlimited),
            ("sentence_bert_config.json", r#"{"max_seq_length": 4}"#),
        ];
        let (_folder, tokenizer) = tokenizer("[PAD]", &limits);
        let tokenizer = tokenizer.unwrap();
        assert_eq!(tokenizer.max_length(), Some(4));
        let tensors = tokenizer.encode(&["a b c"], &Device::Cpu).unwrap();
        assert_eq!(rows(&tensors, "input_ids"), [[1, 4, 5, 2]]);
    }

    #[test]
    fn errors_name_the_file() {
        let (folder, tokenizer) = tokenizer("none", &[]);
        let error = tokenizer.unwrap().encode(&["a b", "a"], &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: has no padding token"), "{error}");

        let missing = folder.path().join("absent.json");
        let error = Tokenizer::from_file(&missing).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: ", missing.display())), "{error}");

        let (_folder, broken) = self::tokenizer("[PAD]", &[("tokenizer_config.json", "{")]);
        let error = broken.unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: EOF"), "{error}");

        let (_folder, narrow) = self::tokenizer("[PAD]", &[("config.json", r#"{"max_position_embeddings": 2}"#)]);
        let error = narrow.unwrap_err().to_string();
        assert!(
            error.contains("config.json: `max_position_embeddings` = 2 leaves no room beside 2 special"),
            "{error}"
        );
    }

    #[test]
    fn nothing_to_encode_is_refused() {
        let (_folder, tokenizer) = tokenizer("[PAD]", &[]);
        let error = tokenizer.unwrap().encode(&[] as &[&str], &Device::Cpu).unwrap_err();
        assert!(matches!(error, SessionError::Input { .. }), "{error}");
    }
}
