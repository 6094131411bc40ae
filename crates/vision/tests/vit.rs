//! ViT against what `transformers` computes, in both engines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use roofbench_core::reference::{self, Case, Kind, Models, Setting};
use roofbench_core::session::{Engine, ModelSpec, Processor, Session, SessionError};
use roofbench_core::weights::{AliasRule, Weights};
use serde_json::Value;

struct Vision;

impl Models for Vision {
    fn aliases(&self, spec: &ModelSpec) -> &'static [AliasRule] {
        roofbench_vision::aliases(&spec.family)
    }
    fn load(&self, spec: &ModelSpec, weights: &Weights) -> Result<Box<dyn Session>, SessionError> {
        roofbench_vision::load(spec, weights)
    }
    fn processor(&self, family: &str, configs: &BTreeMap<String, Value>) -> Result<Box<dyn Processor>, SessionError> {
        roofbench_vision::processor(family, configs)
    }
}

fn folders() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/reference/vit");
    let folders = reference::find(&fixtures).expect("cases");
    assert_eq!(folders.len(), 5, "{folders:?}");
    folders
}

#[test]
fn every_case_passes_at_its_own_tolerance() {
    for folder in folders() {
        let case = Case::read(&folder).expect("a case");
        let verdict = case.run(&Vision, &Setting::default()).expect("runs");
        assert!(case.has_answers() && verdict.passed(), "{}: {:?} {:?}", case.name, verdict.weights, verdict.outputs);
    }
}

#[test]
fn the_stock_model_agrees_where_it_can_run() {
    let setting = Setting { engine: Engine::CandleTransformers, ..Setting::default() };
    let mut ran = Vec::new();
    for folder in folders() {
        let case = Case::read(&folder).expect("a case");
        if case.kind != Kind::Model {
            continue;
        }
        match case.run(&Vision, &setting) {
            Ok(verdict) => {
                assert!(verdict.passed(), "{}: {:?} {:?}", case.name, verdict.weights, verdict.outputs);
                ran.push(case.name);
            }
            Err(error) => assert_eq!(
                error.to_string(),
                "vit: candle-transformers has ViTForImageClassification alone, not ViTModel",
                "{}",
                case.name
            ),
        }
    }
    assert_eq!(ran, ["image-classification"]);
}
