//! InstructBLIP: BLIP-2 whose Q-Former reads the instruction beside its queries, so that it asks what is wanted.
//! Source: InstructBLIP (arXiv:2305.06500). Mirrors `transformers.InstructBlipForConditionalGeneration`.

use candle_nn::VarBuilder;
use roofbench_core::session::{ModelSpec, Session, SessionError};

use super::blip_2::Writer;

/// The classes that run.
pub const CLASSES: &[&str] = &["InstructBlipForConditionalGeneration"];

/// Loads the model of `spec` from a checkpoint's root.
///
/// # Errors
/// Names the config field or the tensor at fault.
pub fn load(spec: &ModelSpec, vb: VarBuilder) -> Result<Box<dyn Session>, SessionError> {
    Ok(Box::new(Writer::load(spec, true, vb)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::blip_2::tests::{call, run, session, spec};
    use super::*;

    #[test]
    fn the_instruction_is_required_and_heeded() {
        let spec = spec(CLASSES[0], json!({}));
        let mut session = session(&spec, load).unwrap();
        let prompt: (&str, &[i64]) = ("input_ids", &[29, 29, 29, 4, 5]);
        let mut logits = |words: &[i64], mask: &[i64]| {
            let inputs = [prompt, ("qformer_input_ids", words), ("qformer_attention_mask", mask)];
            let outputs = run(&mut *session, &call("forward", &inputs, json!({}))).unwrap();
            assert_eq!(outputs["qformer_outputs.last_hidden_state"].dims(), [1, 3 + words.len(), 4]);
            outputs["logits"].flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let first = logits(&[4, 5], &[1, 1]);
        assert_ne!(first, logits(&[4, 6], &[1, 1]));
        assert_eq!(logits(&[4, 5], &[1, 0]), logits(&[4, 6], &[1, 0]));
        let error = run(&mut *session, &call("forward", &[prompt], json!({}))).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("input `qformer_input_ids`: is missing"));
    }
}
