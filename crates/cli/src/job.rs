//! What the planning process hands to the process that measures a cell, and what that one tells back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use roofbench_core::catalog::{Cell, Modality};
use roofbench_core::hardware::Machine;
use roofbench_core::harness::Plan;
use roofbench_core::optimize::Switch;
use roofbench_core::record::Record;
use roofbench_core::session::Engine;
use roofbench_core::task::RawInputs;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::arguments::{DTypeArg, DeviceArg};

/// One cell of the grid, complete: the worker needs nothing else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// Family of the catalog.
    pub(crate) family: String,
    /// Its modality.
    pub(crate) modality: Modality,
    /// Repository or folder.
    pub(crate) checkpoint: String,
    /// `transformers` class.
    pub(crate) class: String,
    /// Distinct parameters, where known.
    pub(crate) parameters: Option<u64>,
    /// `config.json`.
    pub(crate) config: Value,
    /// Other `*config.json` files by name.
    pub(crate) extra_configs: BTreeMap<String, Value>,
    /// What to call.
    pub(crate) cell: Cell,
    /// Raw inputs in place of the cell's drawn ones.
    pub(crate) raw: Option<RawInputs>,
    /// What runs it.
    pub(crate) engine: Engine,
    /// Type of weights.
    pub(crate) dtype: DTypeArg,
    /// Where it runs.
    pub(crate) device: DeviceArg,
    /// Threads of the CPU.
    pub(crate) threads: usize,
    /// Threads are pinned to CPUs.
    pub(crate) pin: bool,
    /// Optimisations that the user wants on or off.
    pub(crate) switches: Vec<Switch>,
    /// Weights.
    pub(crate) weights: WeightsJob,
    /// Seed of drawn inputs.
    pub(crate) seed: u64,
    /// Per cent by which each call is made slower, to be found by a comparison.
    pub(crate) slow_down: Option<f64>,
    /// When to stop.
    pub(crate) sampling: Sampling,
    /// What follows the samples.
    #[serde(default)]
    pub(crate) after: After,
    /// Settings as asked for, by flag.
    pub(crate) requested: BTreeMap<String, String>,
    /// The machine with its peaks.
    pub(crate) machine: Machine,
}

impl Job {
    /// `bert/forward/b1/s128`.
    pub(crate) fn label(&self) -> String {
        format!("{}/{}", self.family, self.cell.name)
    }
}

/// What is done behind the samples, which it leaves alone.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct After {
    /// A profile is taken.
    pub(crate) profile: bool,
    /// Its last call goes to this file, in Chrome's trace format.
    pub(crate) trace: Option<PathBuf>,
    /// Seconds of a long run.
    pub(crate) sustain: Option<f64>,
}

/// Where the weights come from, settled.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WeightsJob {
    /// Made from a seed.
    Synthetic {
        /// Seed.
        seed: u64,
    },
    /// A folder or file.
    Local {
        /// Path.
        path: PathBuf,
        /// Tensors that the model never asks for are no error.
        ignore_extra: bool,
    },
    /// A repository on the Hub.
    Hub {
        /// `owner/name`.
        repository: String,
        /// Branch, tag or commit.
        revision: Option<String>,
        /// Tensors that the model never asks for are no error.
        ignore_extra: bool,
    },
}

/// When warm-up and sampling end; see [`Plan`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sampling {
    /// A first look.
    pub(crate) quick: bool,
    /// Least seconds of sampling.
    pub(crate) min_time: f64,
    /// Most seconds of sampling.
    pub(crate) max_time: f64,
    /// Fewest samples.
    pub(crate) min_samples: usize,
    /// Most samples.
    pub(crate) max_samples: usize,
    /// Percentage of the median that its interval is to be within.
    pub(crate) target: f64,
}

impl Sampling {
    /// The rules of a first look, or the standard ones.
    pub(crate) fn standard(quick: bool) -> Self {
        let plan = if quick { Plan::quick() } else { Plan::default() };
        Self {
            quick,
            min_time: plan.min_time.as_secs_f64(),
            max_time: plan.max_time.as_secs_f64(),
            min_samples: plan.min_samples,
            max_samples: plan.max_samples,
            target: plan.target * 100.0,
        }
    }

    /// The harness's own form.
    pub(crate) fn plan(&self) -> Plan {
        Plan {
            target: self.target / 100.0,
            min_samples: self.min_samples,
            max_samples: self.max_samples,
            min_time: Duration::from_secs_f64(self.min_time),
            max_time: Duration::from_secs_f64(self.max_time),
            ..if self.quick { Plan::quick() } else { Plan::default() }
        }
    }
}

/// A line from the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// What it is doing now.
    Status(String),
    /// A line for the reader: what came out of raw inputs.
    Answer(String),
    /// The result; the last line.
    Record(Box<Record>),
}

/// The line on the worker's standard input that asks it to finish with the sample it is at.
pub(crate) const STOP: &str = "stop";
