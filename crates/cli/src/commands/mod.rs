//! One file per command.

pub(crate) mod ablate;
pub(crate) mod against;
pub(crate) mod compare;
pub(crate) mod list;
pub(crate) mod merge;
pub(crate) mod predict;
pub(crate) mod probe;
pub(crate) mod recommend;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod sample;
pub(crate) mod verify;

/// The hidden command that `run` starts for each cell.
pub(crate) const WORKER: &str = "measure-cell";
