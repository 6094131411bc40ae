//! One file per family, and the stock models of `candle-transformers` beside ours.

pub mod bart;
pub mod bert;
pub mod llama;
pub mod t5;
pub(crate) mod upstream;
