//! Documents that code can produce: the table of models, the schema of records, the page of peers, the table of a study.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};
use roofbench_core::catalog::{self, Modality};
use roofbench_core::record;

use crate::{peers, process, study};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Writes nothing; fails when a file is not what it would be
    #[arg(long)]
    check: bool,
}

/// Writes the documents, or checks that they are up to date.
///
/// # Errors
/// A file can't be read or written; with `--check`, one is out of date.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let docs = process::root().join("docs");
    for (name, text) in [
        ("models.md", models()?),
        ("record.schema.json", record::schema_text()),
        ("methodology.md", study::methodology()?),
        ("performance.md", peers::page()?),
    ] {
        update(&docs.join(name), &text, arguments.check)?;
    }
    Ok(())
}

fn update(path: &Path, text: &str, check: bool) -> anyhow::Result<()> {
    // A checkout on Windows may have other line ends.
    let now = std::fs::read_to_string(path).ok().map(|now| now.replace("\r\n", "\n"));
    if now.as_deref() == Some(text) {
        return Ok(());
    }
    if check {
        bail!("{} is out of date; run `cargo xtask docs`", path.display());
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

/// The catalog as Markdown.
fn models() -> anyhow::Result<String> {
    let families = catalog::families();
    let mut page = format!(
        "<!-- Written by `cargo xtask docs`; edit the catalog in crates/core/catalog instead. -->\n\
         # Models\n\n\
         {} families, each with the checkpoint and the cells that `roofbench run` measures by default. `roofbench list` \
         says which of them your build runs, `roofbench list FAMILY` shows all its checkpoints.\n",
        families.len()
    );
    for (modality, title) in [
        (Modality::Text, "Text"),
        (Modality::Vision, "Vision"),
        (Modality::Speech, "Speech"),
        (Modality::Multimodal, "Multimodal"),
    ] {
        write!(
            page,
            "\n## {title}\n\n\
             | Family | Default checkpoint | Class | Parameters | Weights | Licence | Cells | Other checkpoints |\n\
             |---|---|---|--:|---|---|---|---|\n"
        )?;
        for family in families.iter().filter(|family| family.modality == modality) {
            let default = catalog::checkpoint(&family.default_checkpoint)?.1;
            let link = |repository: &str| format!("[{repository}](https://huggingface.co/{repository})");
            let gated = if default.gated { ", gated" } else { "" };
            let cells: Vec<_> = family.cells.iter().map(|cell| format!("`{}`", cell.name)).collect();
            let others = family.checkpoints.iter().filter(|c| c.repository != default.repository);
            let others: Vec<_> = others.map(|checkpoint| link(&checkpoint.repository)).collect();
            writeln!(
                page,
                "| {} | {} | {} | {:.1} M | {} | {}{gated} | {} | {} |",
                family.name,
                link(&default.repository),
                family.class,
                default.parameters as f64 / 1e6,
                family.dtype,
                default.license,
                cells.join(", "),
                others.join(", "),
            )?;
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_its_row() {
        let page = models().unwrap();
        for family in catalog::families() {
            assert!(page.contains(&format!("\n| {} | ", family.name)), "{}", family.name);
        }
    }

    #[test]
    fn a_check_changes_nothing_and_fails_when_out_of_date() {
        let path = std::env::temp_dir().join(format!("roofbench-docs-{}", std::process::id()));
        assert!(update(&path, "new\n", true).is_err());
        assert!(!path.exists());
        update(&path, "new\n", false).unwrap();
        update(&path, "new\n", true).unwrap();
        std::fs::write(&path, "new\r\n").unwrap();
        update(&path, "new\n", true).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
