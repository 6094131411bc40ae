//! One file per family, and the stock models of `candle-transformers` beside ours.

pub mod bart;
pub mod bert;
pub mod bert_layer;
pub mod falcon;
pub mod gpt2;
pub mod layer_norm_decoder;
pub mod llama;
pub mod mistral;
pub mod mpt;
pub mod opt;
pub mod phi;
pub mod phi3;
pub mod t5;
pub(crate) mod upstream;
