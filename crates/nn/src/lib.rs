//! Shared neural-network blocks on candle, with fused CPU kernels chosen at run time.
//!
//! This crate deliberately knows no benchmark, no catalog and no model: a block is configured by numbers and loads its
//! weights from a `VarBuilder`.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod cost;
pub mod cross_attention;
pub mod decoding;
pub mod embedding;
pub mod gather;
pub mod kernels;
pub mod kv_cache;
pub mod layer;
pub mod linear;
pub mod lstm;
pub(crate) mod memory;
pub mod mlp;
pub mod norm;
pub(crate) mod op;
pub mod options;
pub mod patch_embed;
pub mod pool;
pub mod pooling;
pub mod relative_bias;
pub mod resize;
pub mod rope;
pub mod window_attention;
