//! Prefill and decode on a cache give what one forward pass over the finished sequence gives.

use candle_core::{DType, Device, Tensor};
use roofbench_core::reference::Kind;
use roofbench_core::session::{Engine, Unobserved};
use roofbench_tests::{cases, relative_error, session};

/// Sums over other shapes may take another order: some roundings of f32, in the largest value's unit.
const TOLERANCE: f32 = 1e-5;

#[test]
fn steps_on_a_cache_equal_one_forward_pass() {
    let mut seen = 0;
    for case in cases(Kind::Model) {
        let mut call = case.call(&Device::Cpu).unwrap();
        if call.method != "generate" || case.family == "speecht5" {
            continue; // speech is generated as spectra
        }
        let about = format!("{}/{}", case.family, case.name);
        let mut session = session(&case);
        let made = session.call(&call, &mut Unobserved).unwrap_or_else(|error| panic!("{about}: {error}"));
        let (Some(sequences), Some(logits)) = (made.get("sequences"), made.get("logits")) else { continue };
        let (batch, steps, _) = logits.dims3().unwrap();
        let (_, length) = sequences.dims2().unwrap();
        let config = case.spec(&Device::Cpu, Engine::Roofbench).unwrap().config;
        if config.get("is_encoder_decoder") == Some(&true.into()) {
            call.inputs.insert("decoder_input_ids".into(), sequences.clone());
        } else {
            call.inputs.insert("input_ids".into(), sequences.clone());
            // padding of the prompt is none of what was made
            let ones = |length| Tensor::ones((batch, length), DType::I64, &Device::Cpu).unwrap();
            let mask = match call.inputs.get("attention_mask") {
                Some(mask) => Tensor::cat(&[mask, &ones(length - mask.dim(1).unwrap())], 1).unwrap(),
                None => ones(length),
            };
            call.inputs.insert("attention_mask".into(), mask);
        }
        (call.method, call.arguments) = ("forward".into(), Default::default());
        // a class that only generates has no forward pass over sequences to compare with
        let Ok(whole) = session.call(&call, &mut Unobserved) else { continue };
        // the logits of each new token are those of the position before it; an image may stand before the tokens
        let all = whole["logits"].dim(1).unwrap();
        let expected = whole["logits"].narrow(1, all - steps - 1, steps).unwrap();
        let error = relative_error(logits, &expected).unwrap();
        assert!(error <= TOLERANCE, "{about}: {error}");
        seen += 1;
    }
    assert!(seen > 1, "no case generates");
}
