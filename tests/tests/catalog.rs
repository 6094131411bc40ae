//! The catalog beside what is implemented and documented.

use std::path::Path;

use candle_core::{DType, Device};
use roofbench_core::catalog;
use roofbench_core::workload::draw;
use roofbench_tests::{classes, families};

#[test]
fn every_family_has_a_checkpoint_cells_and_a_row_in_the_docs() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
    let docs = std::fs::read_to_string(docs).expect("`cargo xtask docs` writes docs/models.md");
    assert_eq!(catalog::families().len(), 36);
    for family in catalog::families() {
        let (of, checkpoint) = catalog::checkpoint(&family.default_checkpoint).unwrap();
        assert_eq!(of.name, family.name);
        assert!(checkpoint.parameters > 0, "{}", family.name);
        assert!(!family.cells.is_empty(), "{}", family.name);
        let row = docs.lines().find(|line| line.starts_with(&format!("| {} |", family.name)));
        let row = row.unwrap_or_else(|| panic!("{} has no row; run `cargo xtask docs`", family.name));
        for cell in &family.cells {
            assert!(row.contains(&format!("`{}`", cell.name)), "{row} lacks {}; run `cargo xtask docs`", cell.name);
        }
    }
}

#[test]
fn what_is_implemented_is_in_the_catalog_and_runs_its_checkpoints() {
    for name in families() {
        let family = catalog::family(name).unwrap();
        assert!(classes(name).contains(&family.class.as_str()), "{name} does not run {}", family.class);
        for checkpoint in &family.checkpoints {
            assert!(
                classes(name).contains(&checkpoint.class.as_str()),
                "{} is a {}",
                checkpoint.repository,
                checkpoint.class
            );
        }
    }
}

#[test]
fn every_cell_of_an_implemented_family_has_inputs() {
    for name in families() {
        let family = catalog::family(name).unwrap();
        for cell in &family.cells {
            let config = &family.checkpoints[0].config;
            let inputs = draw(cell, config, DType::F32, &Device::Cpu, 0).unwrap();
            for (input, spec) in &cell.inputs {
                assert_eq!(inputs[input].dims(), spec.shape(), "{name}/{}: {input}", cell.name);
            }
        }
    }
}
