use candle_core::{DType, Device};
use roofbench_core::reference::Models as _;
use roofbench_core::weights::{HubOptions, Source, Weights};
use roofbench_core::{
    catalog,
    session::{Call, Engine, Unobserved},
    workload::draw,
};
use roofbench_tests::Models;
use std::time::Instant;
#[test]
fn time() {
    for name in ["clip", "blip"] {
        let family = catalog::family(name).unwrap();
        for engine in [Engine::Roofbench, Engine::CandleTransformers] {
            for cell in &family.cells {
                let checkpoint = &family.checkpoints.iter().find(|c| c.class == family.class).unwrap();
                let inputs = draw(cell, &checkpoint.config, DType::F32, &Device::Cpu, 0).unwrap();
                let spec = roofbench_core::session::ModelSpec {
                    family: name.into(),
                    class: checkpoint.class.clone(),
                    config: checkpoint.config.clone(),
                    extra_configs: Default::default(),
                    dtype: DType::F32,
                    device: Device::Cpu,
                    engine,
                };
                let weights = Weights::open(
                    &Source::Synthetic { seed: 0 },
                    Models.aliases(&spec),
                    &spec.class,
                    &HubOptions::from_env(),
                )
                .unwrap();
                let mut session = Models.load(&spec, &weights).unwrap();
                let mut arguments = serde_json::Map::new();
                let method = if cell.name.starts_with("generate") {
                    arguments.insert("max_new_tokens".into(), 16.into());
                    arguments.insert("min_new_tokens".into(), 16.into());
                    "generate"
                } else {
                    "forward"
                };
                let call = Call { method: method.into(), inputs: inputs.clone(), arguments };
                let cost = session.cost(&call).unwrap();
                let mut best = f64::MAX;
                for _ in 0..(if name == "clip" { 15 } else { 5 }) {
                    let t = Instant::now();
                    match session.call(&call, &mut Unobserved) {
                        Ok(_) => {}
                        Err(e) => {
                            println!("{e}");
                            break;
                        }
                    }
                    best = best.min(t.elapsed().as_secs_f64());
                }
                let flops: u64 = cost.iter().map(|c| c.cost.flops).sum();
                println!(
                    "TIME {name} {} {engine:?}: {:.1} ms, {:.1} GFLOP/s",
                    cell.name,
                    best * 1e3,
                    flops as f64 / best / 1e9
                );
            }
        }
    }
}
