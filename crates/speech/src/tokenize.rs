//! Tokens to text and back, by a checkpoint's `tokenizer.json` or by SentencePiece's `spm_char.model` of single
//! characters, which SpeechT5 has.

use std::path::Path;

use prost::Message;
use roofbench_core::session::SessionError;
use roofbench_core::weights::Weights;
use serde_json::{Value, json};
use tokenizers::normalizers::{NormalizerWrapper, Precompiled, Sequence};

/// The tokenizer of a checkpoint.
#[derive(Debug, Clone)]
pub struct Tokenizer(tokenizers::Tokenizer);

/// The file of single characters.
const CHARACTERS: &str = "spm_char.model";
/// What stands for a space.
const SPACE: &str = "\u{2581}";

/// `ModelProto` of SentencePiece, as far as it is needed.
#[derive(Clone, PartialEq, Message)]
struct Pieces {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    piece: String,
    /// 1 is text, 2 stands for what is unknown, 3 is for control.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    /// 4 is for single characters.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", tag = "2")]
    precompiled_charsmap: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

impl Tokenizer {
    /// The tokenizer beside `weights`; `None` where there is none.
    ///
    /// # Errors
    /// Names the file that can't be read.
    pub fn beside(weights: &Weights) -> Result<Option<Self>, SessionError> {
        if let Some(path) = weights.file("tokenizer.json") {
            let read = tokenizers::Tokenizer::from_file(&path).map_err(|error| file_error(&path, &error))?;
            return Ok(Some(Self(read)));
        }
        let Some(path) = weights.file(CHARACTERS) else { return Ok(None) };
        let bytes = std::fs::read(&path).map_err(|error| file_error(&path, &error))?;
        Self::of_characters(&bytes).map(Some).map_err(|reason| file_error(&path, &reason))
    }

    /// From the content of `spm_char.model`: every character is a token, and `</s>` follows the last.
    fn of_characters(bytes: &[u8]) -> Result<Self, String> {
        let model = Pieces::decode(bytes).map_err(|error| error.to_string())?;
        if model.trainer.as_ref().and_then(|trainer| trainer.model_type) != Some(4) {
            return Err("is no vocabulary of single characters; convert it to tokenizer.json".to_owned());
        }
        let kind = |kind: i32| model.pieces.iter().find(|piece| piece.kind == Some(kind)).map(|piece| &piece.piece);
        let unknown = kind(2).ok_or("has no token for what is unknown")?;
        let vocab = || model.pieces.iter().enumerate();
        let end = vocab().find(|(_, piece)| piece.piece == "</s>").ok_or("has no token `</s>`")?.0;
        let special = vocab().filter(|(_, piece)| matches!(piece.kind, Some(2 | 3)));
        let special: Vec<Value> = special
            .map(|(id, piece)| {
                json!({"id": id, "content": piece.piece, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
            .collect();
        let rules = model.normalizer.clone().unwrap_or_default();
        let mut normalizers = Vec::new();
        if rules.remove_extra_whitespaces != Some(false) {
            normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
            normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
        }
        if rules.add_dummy_prefix != Some(false) {
            normalizers.push(json!({"type": "Prepend", "prepend": " "}));
        }
        normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
        let words: serde_json::Map<String, Value> = vocab().map(|(id, p)| (p.piece.clone(), id.into())).collect();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": special,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?s)."}, "behavior": "Isolated", "invert": false},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": unknown},
        });
        let text = |error: tokenizers::Error| error.to_string();
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json.to_string()).map_err(text)?;
        if !rules.precompiled_charsmap.is_empty() {
            let characters = Precompiled::from(&rules.precompiled_charsmap).map_err(|error| error.to_string())?;
            let first = NormalizerWrapper::from(characters);
            let others = tokenizer.get_normalizer().cloned();
            let all = Sequence::new([first].into_iter().chain(others).collect());
            tokenizer.with_normalizer(Some(all)).map_err(text)?;
        }
        Ok(Self(tokenizer))
    }

    /// The tokens of `text`, with those that the checkpoint has around it.
    ///
    /// # Errors
    /// A text that the tokenizer can't take.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>, SessionError> {
        let encoding = self.0.encode(text, true).map_err(|error| SessionError::input("--text", error.to_string()))?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text of tokens, without the special ones.
    ///
    /// # Errors
    /// A negative token.
    pub fn decode(&self, ids: &[i64]) -> Result<String, SessionError> {
        let refuse = |reason: String| SessionError::input("sequences", reason);
        let ids = ids.iter().map(|id| u32::try_from(*id)).collect::<Result<Vec<_>, _>>();
        let ids = ids.map_err(|_| refuse("hold a negative number, which no token has".to_owned()))?;
        self.0.decode(&ids, true).map_err(|error| refuse(error.to_string()))
    }
}

fn file_error(path: &Path, reason: &dyn std::fmt::Display) -> SessionError {
    SessionError::File { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_and_spaces_as_sentencepiece_has_them() {
        let piece = |piece: &str, kind: i32| Piece { piece: piece.to_owned(), kind: Some(kind) };
        let mut model = Pieces {
            pieces: vec![
                piece("<s>", 3),
                piece("<pad>", 3),
                piece("</s>", 3),
                piece("<unk>", 2),
                piece(SPACE, 1),
                piece("e", 1),
                piece("t", 1),
                piece("é", 1),
            ],
            trainer: Some(Trainer { model_type: Some(4) }),
            normalizer: None,
        };
        let tokenizer = Tokenizer::of_characters(&model.encode_to_vec()).expect("a tokenizer");
        let ids = tokenizer.encode("  te  té q ").expect("tokens");
        assert_eq!(ids, [4, 6, 5, 4, 6, 7, 4, 3, 2]);
        assert_eq!(tokenizer.decode(&ids).expect("a text"), "te té ");
        model.trainer = Some(Trainer { model_type: Some(1) });
        let refused = Tokenizer::of_characters(&model.encode_to_vec());
        assert!(refused.is_err_and(|reason| reason.contains("single characters")));
        assert!(Tokenizer::of_characters(b"no such file").is_err());
    }
}
