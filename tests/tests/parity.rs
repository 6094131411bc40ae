//! Every reference case of the families that run: outputs within the case's own tolerance, and exactly its tensors read.

use roofbench_core::reference::{Case, Kind, Setting, find};
use roofbench_nn::options::{self, Options, Winograd};
use roofbench_tests::{Models, cases, families, fixtures};

/// Runs the cases of `kind`; how many there were.
fn check(kind: Kind) -> usize {
    check_all(cases(kind), kind)
}

fn check_all(cases: impl IntoIterator<Item = Case>, kind: Kind) -> usize {
    let mut count = 0;
    let mut wrong = Vec::new();
    for case in cases {
        let folder = &case.folder;
        count += 1;
        match case.run(&Models, &Setting::default()) {
            Ok(verdict) => {
                assert!(!verdict.outputs.is_empty(), "{}: a case without answers checks nothing", folder.display());
                assert_eq!(verdict.weights.is_some(), kind == Kind::Model, "{}", folder.display());
                if !verdict.passed() {
                    wrong.push(format!("{}/{}: {:?} {:?}", case.family, case.name, verdict.weights, verdict.outputs));
                }
            }
            Err(error) => wrong.push(format!("{}/{}: {error}", case.family, case.name)),
        }
    }
    assert!(wrong.is_empty(), "{} of {count} cases are wrong:\n{}", wrong.len(), wrong.join("\n"));
    count
}

#[test]
fn models_agree_with_transformers() {
    assert!(check(Kind::Model) >= families().count());
}

/// The families that have such convolutions; the cases are too small for a timing, which would leave them direct.
#[test]
fn models_agree_by_either_form_of_winograd() {
    for winograd in [Winograd::Two, Winograd::Four] {
        let families = ["resnet", "detr", "sam", "flava"];
        let cases = cases(Kind::Model).filter(|case| families.contains(&case.family.as_str()));
        let options = Options { winograd, ..Options::default() };
        assert!(options::with(options, || check_all(cases, Kind::Model)) >= families.len());
    }
}

#[test]
fn preprocessing_agrees_with_transformers() {
    assert!(check(Kind::Preprocess) > 0);
}

#[test]
fn postprocessing_agrees_with_transformers() {
    assert!(check(Kind::Postprocess) > 0);
}

#[test]
fn every_family_has_cases() {
    for family in families() {
        assert!(!find(&fixtures().join(family)).unwrap().is_empty(), "{family}");
    }
}
