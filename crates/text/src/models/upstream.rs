//! The stock models of the crate `candle-transformers`, on the same weights and inputs as ours: what anyone on candle
//! gets today.

mod bert;
mod decoder;
mod falcon;
mod t5;

pub(crate) use bert::Bert;
pub(crate) use decoder::Decoder;
pub(crate) use falcon::Falcon;
pub(crate) use t5::T5;
