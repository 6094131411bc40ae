//! HuBERT: wav2vec 2.0's encoder, trained to predict clusters of frames; a batch norm may precede its positional
//! convolution, and no norm its projection.
//! Source: HuBERT (arXiv:2106.07447). Mirrors `transformers.HubertModel`, `HubertForCTC` and
//! `HubertForSequenceClassification`.

use candle_nn::VarBuilder;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};

use super::wav2vec2::{SpeechModel, Variant, alias_rules};

/// The classes that run.
pub const CLASSES: &[&str] = &["HubertModel", "HubertForCTC", "HubertForSequenceClassification"];

const VARIANT: Variant = Variant {
    prefix: "hubert",
    stem: "Hubert",
    adapter: false,
    gated_positions: false,
    extract_features: false,
    feature_norms: true,
    always_masked: false,
};

const RULES: &[AliasRule] = alias_rules!("hubert");

/// How published checkpoints of `spec` name the tensors that [`load`] asks for.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    VARIANT.aliases(RULES, spec)
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<SpeechModel, SessionError> {
    SpeechModel::load(&VARIANT, spec, vb)
}
