//! The cost by formula against what the blocks counted as they ran, in every case.

use candle_core::Device;
use roofbench_core::reference::Kind;
use roofbench_core::session::Unobserved;
use roofbench_nn::cost;
use roofbench_tests::{cases, session};

#[test]
fn flops_by_formula_are_those_that_ran() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for case in cases(Kind::Model) {
        let mut call = case.call(&Device::Cpu).unwrap();
        if call.method == "generate_speech" {
            // the cost is that of the greatest length: no probability ends it before
            call.arguments.insert("threshold".into(), 1e9.into());
        }
        let mut session = session(&case);
        let (outputs, recorded) = cost::record(|| session.call(&call, &mut Unobserved));
        let formula = outputs.and_then(|_| session.cost(&call));
        match formula.map(|phases| phases.iter().map(|phase| phase.cost.flops).sum::<u64>()) {
            Ok(flops) if flops == recorded.flops => seen += 1,
            Ok(flops) => {
                wrong.push(format!("{}/{}: {flops} by formula, {} ran", case.family, case.name, recorded.flops));
            }
            Err(error) => wrong.push(format!("{}/{}: {error}", case.family, case.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 1);
}
