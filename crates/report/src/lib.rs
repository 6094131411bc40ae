//! Tables, Markdown, CSV and HTML reports, computed from records alone.
//!
//! This crate deliberately knows no model, no device and no clock: whatever it shows can be shown again from the file of
//! records, on another machine, years later.
//!
//! ```
//! // what a run that hasn't begun looks like: every family is there, with its state
//! let text = roofbench_report::markdown(&[], &["bert", "vit"]);
//! assert!(text.contains("| bert | not run |"));
//! ```

mod behind;
mod comparison;
mod coverage;
mod csv;
mod format;
mod html;
mod markdown;
mod row;
mod table;

pub use behind::details;
pub use comparison::{comparison_junit, comparison_markdown, comparison_table};
pub use coverage::{CoverageRow, State, coverage, coverage_table};
pub use csv::csv;
pub use html::html;
pub use markdown::markdown;
pub use row::latest;
pub use table::{empty_table, table};

#[cfg(test)]
mod samples;
