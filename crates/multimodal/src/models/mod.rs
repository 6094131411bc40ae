//! The model families, one file each.

pub mod flava;
pub mod layoutlm;
pub mod layoutlmv3;
pub mod vilt;
