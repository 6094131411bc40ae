//! One file per family, and the stock models of `candle-transformers` beside ours.

pub mod bert;
pub mod llama;
pub mod mistral;
pub mod opt;
pub mod phi;
pub mod phi3;
pub(crate) mod upstream;
