//! `roofbench list`: the catalog, and what of it this build runs.

use std::process::ExitCode;

use roofbench_core::catalog::{self, Family, Modality};
use serde_json::json;

use crate::{models, ui};

/// List the 36 model families, or the checkpoints and cells of one
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  roofbench list          one line per family
  roofbench list bert     its checkpoints and standard cells
  roofbench list --json   one JSON object per family and line")]
pub(crate) struct Arguments {
    /// A family, for its checkpoints and cells
    #[arg(value_name = "FAMILY")]
    family: Option<String>,
    /// JSON lines on standard output
    #[arg(long)]
    json: bool,
}

/// Prints the catalog, or a family of it.
///
/// # Errors
/// There is no such family.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let families = match &arguments.family {
        Some(name) => std::slice::from_ref(catalog::family(name)?),
        None => catalog::families(),
    };
    if arguments.json {
        for family in families {
            ui::print(&object(family).to_string())?;
        }
    } else if arguments.family.is_some() {
        families.iter().try_for_each(|family| ui::print(&details(family)))?;
    } else {
        ui::print(&overview(families))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn object(family: &Family) -> serde_json::Value {
    let checkpoints = family.checkpoints.iter().map(|checkpoint| {
        json!({
            "repository": checkpoint.repository,
            "class": checkpoint.class,
            "parameters": checkpoint.parameters,
            "license": checkpoint.license,
            "gated": checkpoint.gated,
            "task": checkpoint.task,
        })
    });
    json!({
        "family": family.name,
        "modality": family.modality,
        "model_types": family.model_types,
        "runs": models::runs(&family.name),
        "classes": models::classes(&family.name),
        "default_checkpoint": family.default_checkpoint,
        "class": family.class,
        "dtype": family.dtype,
        "checkpoints": checkpoints.collect::<Vec<_>>(),
        "cells": family.cells,
    })
}

fn overview(families: &[Family]) -> String {
    let mut table = roofbench_report::empty_table(&[
        "family",
        "runs",
        "default checkpoint",
        "parameters",
        "weights",
        "licence",
        "cells",
    ]);
    let mut modality = None;
    for family in families {
        if modality != Some(family.modality) {
            modality = Some(family.modality);
            table.add_row([title(family.modality)]);
        }
        let default = family.checkpoints.first();
        let gated = if default.is_some_and(|checkpoint| checkpoint.gated) { ", gated" } else { "" };
        table.add_row([
            format!("  {}", family.name),
            if models::runs(&family.name) { "yes" } else { "" }.to_owned(),
            family.default_checkpoint.clone(),
            default.map_or_else(String::new, |checkpoint| ui::large(checkpoint.parameters as f64)),
            family.dtype.clone(),
            default.map_or_else(String::new, |checkpoint| format!("{}{gated}", checkpoint.license)),
            family.cells.iter().map(|cell| cell.name.as_str()).collect::<Vec<_>>().join("\n"),
        ]);
    }
    let runs = families.iter().filter(|family| models::runs(&family.name)).count();
    format!("{table}\n{} in the catalog, {runs} of which this build runs", families_count(families.len()))
}

fn families_count(n: usize) -> String {
    if n == 1 { "1 family".to_owned() } else { format!("{n} families") }
}

fn title(modality: Modality) -> &'static str {
    match modality {
        Modality::Text => "TEXT",
        Modality::Vision => "VISION",
        Modality::Speech => "SPEECH",
        Modality::Multimodal => "MULTIMODAL",
    }
}

fn details(family: &Family) -> String {
    let mut checkpoints = roofbench_report::empty_table(&["checkpoint", "class", "parameters", "licence", "task"]);
    for checkpoint in &family.checkpoints {
        let is_default = checkpoint.repository == family.default_checkpoint;
        checkpoints.add_row([
            format!("{}{}", checkpoint.repository, if is_default { " (default)" } else { "" }),
            checkpoint.class.clone(),
            ui::large(checkpoint.parameters as f64),
            format!("{}{}", checkpoint.license, if checkpoint.gated { ", gated" } else { "" }),
            checkpoint.task.clone(),
        ]);
    }
    let mut cells = roofbench_report::empty_table(&["cell", "counts", "inputs"]);
    for cell in &family.cells {
        let inputs = cell.inputs.iter().map(|(name, spec)| format!("{name} {:?}", spec.shape()));
        cells.add_row([cell.name.clone(), cell.unit.clone(), inputs.collect::<Vec<_>>().join("\n")]);
    }
    let runs = match models::classes(&family.name) {
        [] => "this build has no model of it".to_owned(),
        classes => format!("this build runs {}", classes.join(", ")),
    };
    format!(
        "{}: {}; model_type {}; standard weights {}\n\n{checkpoints}\n\n{cells}",
        family.name,
        runs,
        family.model_types.join(", "),
        family.dtype,
    )
}
