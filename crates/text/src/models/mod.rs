//! One file per family, and the stock models of `candle-transformers` beside ours.

pub mod bert;
pub mod llama;
pub(crate) mod upstream;
