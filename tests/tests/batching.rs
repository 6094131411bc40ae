//! An item in a batch gives what it gives alone, in every case that has a batch.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use roofbench_core::reference::{Case, Kind};
use roofbench_core::session::{Call, Session, Tensors, Unobserved};
use roofbench_tests::{cases, relative_error, session};

/// Sums over other shapes may take another order: some roundings of f32, in the largest value's unit.
const TOLERANCE: f32 = 5e-6;

fn run(session: &mut dyn Session, case: &Case, call: &Call, inputs: Tensors) -> Tensors {
    let call = Call { inputs, ..call.clone() };
    session.call(&call, &mut Unobserved).unwrap_or_else(|error| panic!("{}/{}: {error}", case.family, case.name))
}

/// The first dimension that all of `tensors` have, when it is a batch.
fn batch(tensors: &Tensors) -> Option<usize> {
    let first = |tensor: &Tensor| tensor.dims().first().copied();
    let batch = tensors.values().next().and_then(first)?;
    (batch > 1 && tensors.values().all(|tensor| first(tensor) == Some(batch))).then_some(batch)
}

fn item(tensors: &Tensors, item: usize) -> Tensors {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.narrow(0, item, 1).unwrap())).collect()
}

#[test]
fn an_item_in_a_batch_equals_it_alone() {
    let mut seen = BTreeMap::new();
    for case in cases(Kind::Model) {
        let call = case.call(&Device::Cpu).unwrap();
        let inputs = call.inputs.clone();
        if call.method == "generate_speech" {
            continue; // spectra of one text have no batch, and those of several are as long as the longest
        }
        let Some(items) = batch(&inputs) else { continue };
        let mut session = session(&case);
        let together = run(&mut *session, &case, &call, inputs.clone());
        if batch(&together) != Some(items) {
            continue;
        }
        *seen.entry(case.family.clone()).or_insert(0) += 1;
        for at in 0..items {
            let alone = run(&mut *session, &case, &call, item(&inputs, at));
            for (name, together) in &together {
                if name.contains("_per_") {
                    continue; // of every item to every other
                }
                let (about, alone) = (format!("{}/{}: {name} of item {at}", case.family, case.name), &alone[name]);
                let mut together = match (together.dims(), alone.dims()) {
                    // of scores of each item with each, those of an item alone are its own
                    ([_, all], [1, 1]) if *all == items => together.narrow(0, at, 1).unwrap().narrow(1, at, 1).unwrap(),
                    // items are columns
                    ([rows, all], [same, 1]) if rows == same && *all == items => together.narrow(1, at, 1).unwrap(),
                    _ => together.narrow(0, at, 1).unwrap(),
                };
                // an item that the model itself fills up in a batch is shorter alone
                if let ([_, filled, _], [_, rows, _]) = (together.dims(), alone.dims())
                    && rows < filled
                {
                    together = together.narrow(1, 0, *rows).unwrap();
                }
                let error = relative_error(&together, alone).unwrap_or_else(|error| panic!("{about}: {error}"));
                assert!(error <= TOLERANCE, "{about}: {error}");
            }
        }
    }
    assert!(seen.len() > 1, "{seen:?}");
}

#[test]
fn a_padded_sentence_equals_it_without_padding() {
    let mut seen = 0;
    for case in cases(Kind::Model) {
        let call = case.call(&Device::Cpu).unwrap();
        let inputs = call.inputs.clone();
        let plain = |name: &String| ["input_ids", "attention_mask", "token_type_ids"].contains(&name.as_str());
        if call.method != "forward" || !inputs.keys().all(plain) || !inputs.contains_key("attention_mask") {
            continue;
        }
        let mut session = session(&case);
        let together = run(&mut *session, &case, &call, inputs.clone());
        let lengths = inputs["attention_mask"].sum(1).unwrap().to_vec1::<i64>().unwrap();
        let full = inputs["attention_mask"].dim(1).unwrap();
        for (at, length) in lengths.into_iter().map(|length| length as usize).enumerate() {
            let mut alone: Tensors =
                item(&inputs, at).into_iter().map(|(name, x)| (name, x.narrow(1, 0, length).unwrap())).collect();
            alone.remove("attention_mask");
            let alone = run(&mut *session, &case, &call, alone);
            for (name, together) in item(&together, at) {
                let kept = match together.rank() {
                    3 if together.dim(1).unwrap() == full => together.narrow(1, 0, length).unwrap(),
                    _ => together,
                };
                let error = relative_error(&kept, &alone[&name]).unwrap();
                assert!(error <= TOLERANCE, "{}/{}: {name} of item {at}: {error}", case.family, case.name);
            }
            seen += usize::from(length < full);
        }
    }
    assert!(seen > 1, "no case has padding");
}
