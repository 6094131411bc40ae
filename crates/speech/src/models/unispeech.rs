//! UniSpeech and UniSpeech-SAT: wav2vec 2.0's encoder, trained with phonemes, and with clusters and speakers.
//! Source: UniSpeech (arXiv:2101.07597), UniSpeech-SAT (arXiv:2110.05752). Mirrors `transformers.UniSpeechModel`,
//! `UniSpeechForCTC`, `UniSpeechForSequenceClassification`, and the same of `UniSpeechSat` with its
//! `ForAudioFrameClassification` and `ForXVector`.

use candle_nn::VarBuilder;
use roofbench_core::session::{ModelSpec, Result, SessionError};
use roofbench_core::weights::{AliasRule, AliasScope};

use super::wav2vec2::{SpeechModel, Variant, alias_rules};

/// The classes that run.
pub const CLASSES: &[&str] = &[
    "UniSpeechModel",
    "UniSpeechForCTC",
    "UniSpeechForSequenceClassification",
    "UniSpeechSatModel",
    "UniSpeechSatForCTC",
    "UniSpeechSatForSequenceClassification",
    "UniSpeechSatForAudioFrameClassification",
    "UniSpeechSatForXVector",
];

const UNISPEECH: Variant = Variant {
    prefix: "unispeech",
    stem: "UniSpeech",
    adapter: false,
    gated_positions: false,
    extract_features: true,
    feature_norms: false,
    always_masked: false,
};

const UNISPEECH_SAT: Variant =
    Variant { prefix: "unispeech_sat", stem: "UniSpeechSat", always_masked: true, ..UNISPEECH };

const RULES: &[AliasRule] = alias_rules!("unispeech");
const SAT_RULES: &[AliasRule] = alias_rules!("unispeech_sat");

/// How published checkpoints of `spec` name the tensors that [`load`] asks for.
pub fn aliases(spec: &ModelSpec) -> &'static [AliasRule] {
    match spec.class.starts_with(UNISPEECH_SAT.stem) {
        true => UNISPEECH_SAT.aliases(SAT_RULES, spec),
        false => UNISPEECH.aliases(RULES, spec),
    }
}

/// Loads the class of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<SpeechModel, SessionError> {
    let variant = if spec.class.starts_with(UNISPEECH_SAT.stem) { &UNISPEECH_SAT } else { &UNISPEECH };
    SpeechModel::load(variant, spec, vb)
}
