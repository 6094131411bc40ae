//! WavLM: wav2vec 2.0's encoder with a bias of relative positions, one table for all layers, of which each head takes as
//! much at each frame as a gate says.
//! Source: WavLM (arXiv:2110.13900). Mirrors `transformers.WavLMModel`, `WavLMForCTC`,
//! `WavLMForSequenceClassification`, `WavLMForAudioFrameClassification` and `WavLMForXVector`.

use candle_nn::VarBuilder;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};

use super::wav2vec2::{SpeechModel, Variant, alias_rules};

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "WavLMModel",
    "WavLMForCTC",
    "WavLMForSequenceClassification",
    "WavLMForAudioFrameClassification",
    "WavLMForXVector",
];

const VARIANT: Variant = Variant {
    prefix: "wavlm",
    stem: "WavLM",
    adapter: true,
    gated_positions: true,
    extract_features: true,
    feature_norms: false,
    always_masked: false,
};

const RULES: &[AliasRule] = alias_rules!("wavlm");

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
