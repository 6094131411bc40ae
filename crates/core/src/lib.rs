//! What a measurement is: catalog, workloads, weights, hardware probe, meters, harness, cost and records.
//!
//! This crate deliberately does not know any model: it sees one through [`session::Session`], whatever runs behind it.

pub mod catalog;
pub mod classify;
pub mod compare;
pub mod config;
pub mod cost;
pub mod embeddings;
pub mod generation;
pub mod hardware;
pub mod harness;
pub mod inputs;
pub mod merge;
pub mod meters;
pub mod metrics;
pub mod optimize;
pub mod predict;
pub mod profile;
pub mod record;
pub mod reference;
pub mod roofline;
pub mod session;
pub mod stats;
pub mod sustain;
pub mod task;
pub mod weights;
pub mod workload;
