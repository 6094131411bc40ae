//! Time and memory of a cell before it runs, from its cost by formula and the machine's measured ceilings.
//!
//! A phase takes `max(FLOPs / (peak × c), bytes / (bandwidth × b)) + operations × o`. The shares `c` and `b` that are
//! reached and the time `o` around an operation are a [`Calibration`]: fitted, for each [`Kind`] of work, to cells that
//! were measured. A family that was measured itself corrects the result by what its own cells took.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cost::Outline;
use crate::metrics::{Derived, PhaseResult};
use crate::record::Record;
use crate::roofline::Ceiling;
use crate::session::Phase;
use crate::stats;

/// What a phase mostly is, which decides how close to its ceilings it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Products of matrices over many rows.
    Dense,
    /// Most weights are kernels of convolutions.
    Convolution,
    /// A token at a time, for which every weight is read.
    Decode,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Convolution => "convolution",
            Self::Decode => "decode",
        })
    }
}

/// A phase as far as its time depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// What it mostly is.
    pub kind: Kind,
    /// Which phase.
    pub phase: Phase,
    /// FLOPs of all its repeats.
    pub flops: f64,
    /// Bytes of all its repeats.
    pub bytes: f64,
    /// Operations with weights of all its repeats.
    pub operations: f64,
}

/// What of a cell has to be in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Footprint {
    /// All weights as they are kept.
    pub weights: f64,
    /// The largest of them as it is read, which is there twice while it is packed.
    pub largest: f64,
    /// The largest activation of an operation.
    pub widest: f64,
    /// The mean activation of an operation.
    pub activations: f64,
    /// Keys and values of all tokens.
    pub cache: f64,
}

/// A cell as far as its time and memory depend on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Its family, whose own cells correct the prediction.
    pub family: String,
    /// Its phases.
    pub work: Vec<Work>,
    /// Its memory.
    pub footprint: Footprint,
}

impl Task {
    /// The task that `outline` tells of, with weights of `element_bytes` each, dense ones kept in `weight_bits` where
    /// that is another number.
    pub fn new(family: &str, outline: &Outline, element_bytes: usize, weight_bits: Option<f64>) -> Self {
        let size = |shape: &[usize]| shape.iter().product::<usize>() as f64;
        let sum = |least: usize, most: usize| -> f64 {
            outline.tensors.values().filter(|s| (least..=most).contains(&s.len())).map(|s| size(s)).sum()
        };
        let (all, dense, kernels) = (sum(0, usize::MAX), sum(2, 2), sum(3, usize::MAX));
        let operations = outline.tensors.values().filter(|shape| shape.len() > 1).count() as f64;
        let work = outline.phases.iter().map(|phase| Work {
            kind: match phase.phase {
                Phase::Decode => Kind::Decode,
                _ if kernels > dense => Kind::Convolution,
                _ => Kind::Dense,
            },
            phase: phase.phase,
            flops: phase.cost.flops as f64,
            bytes: phase.cost.bytes() as f64,
            operations: operations * phase.repeats as f64,
        });
        let activations =
            outline.phases.iter().map(|phase| phase.cost.activation_bytes as f64 / phase.repeats.max(1) as f64);
        let cache = outline.phases.iter().map(|phase| phase.cost.kv_bytes as f64 / phase.repeats.max(1) as f64);
        let element = element_bytes as f64;
        let dense_bytes = weight_bits.map_or(element, |bits| bits / 8.0);
        Self {
            family: family.to_owned(),
            work: work.collect(),
            footprint: Footprint {
                weights: (all - dense) * element + dense * dense_bytes,
                largest: outline.tensors.values().map(|shape| size(shape)).fold(0.0, f64::max) * element,
                widest: outline.largest_activation as f64,
                activations: activations.fold(0.0, f64::max) / operations.max(1.0),
                cache: cache.fold(0.0, f64::max),
            },
        }
    }
}

/// How close to its ceilings a kind of work comes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Efficiency {
    /// Share of the arithmetic peak.
    pub compute: f64,
    /// Share of the read bandwidth.
    pub bandwidth: f64,
    /// Seconds around each operation.
    pub per_operation: f64,
}

impl Efficiency {
    /// Seconds of `work` under `ceiling`.
    pub fn seconds(&self, work: &Work, ceiling: &Ceiling) -> f64 {
        let compute = work.flops / (ceiling.flops * self.compute);
        let memory = work.bytes / (ceiling.bytes_per_second * self.bandwidth);
        compute.max(memory) + work.operations * self.per_operation
    }
}

/// Memory beyond the weights, by what it grows with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemoryFit {
    /// Bytes of the program itself.
    pub base: f64,
    /// Copies of the weights, with what packing pads.
    pub weights: f64,
    /// Copies of the largest weight.
    pub largest: f64,
    /// Activations alive at once, in the largest that an operation writes.
    pub widest: f64,
    /// Those that are kept beside them, in the mean of what an operation writes.
    pub activations: f64,
}

impl MemoryFit {
    fn bytes(&self, footprint: &Footprint) -> f64 {
        self.base
            + self.weights * footprint.weights
            + self.largest * footprint.largest
            + self.widest * footprint.widest
            + self.activations * footprint.activations
            + footprint.cache
    }
}

/// Everything that measured cells taught.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Where it comes from: machine, date, cells.
    pub source: String,
    /// By kind of work.
    pub efficiencies: BTreeMap<Kind, Efficiency>,
    /// Of memory.
    pub memory: MemoryFit,
    /// Seconds that a byte of weights takes to be made or read, and packed.
    pub load_per_byte: f64,
    /// What the cells of a family took over what its kinds of work say.
    pub families: BTreeMap<String, Correction>,
}

/// What the cells of a family took over what was predicted without them; 1 where there were none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Correction {
    /// Of the time, by kind of work.
    pub time: BTreeMap<Kind, f64>,
    /// Of the memory.
    pub memory: Option<f64>,
}

/// What a task is predicted to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Seconds of each phase.
    pub phases: Vec<(Phase, f64)>,
    /// Bytes of resident memory at most.
    pub memory: f64,
    /// Seconds until the model is loaded.
    pub load: f64,
    /// A cell of its own family was measured.
    pub corrected: bool,
}

impl Prediction {
    /// Seconds of a call.
    pub fn seconds(&self) -> f64 {
        self.phases.iter().map(|(_, seconds)| seconds).sum()
    }
}

/// A cell that was measured, to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// `bert/forward/b1/s128`.
    pub label: String,
    /// The processor that it ran on.
    pub machine: String,
    /// What it was.
    pub task: Task,
    /// The ceilings that it ran under.
    pub ceiling: Ceiling,
    /// Seconds of each phase of [`Task::work`], where they are known.
    pub seconds: Vec<Option<f64>>,
    /// Bytes of resident memory at most, where they are known.
    pub memory: Option<f64>,
    /// Seconds until the model was loaded.
    pub load: f64,
}

impl Measured {
    /// `task`, whose `record` says `derived`.
    ///
    /// # Errors
    /// Why there is no ceiling to hold it against.
    pub fn new(task: Task, record: &Record, derived: &Derived) -> Result<Self, String> {
        let ceiling = derived.ceiling.clone()?;
        let (label, machine) = (record.subject.label(), record.machine.cpu.model.clone());
        let of = |work: &Work| -> Option<f64> {
            let phase = |result: &&PhaseResult| result.phase == work.phase;
            Some(derived.phases.iter().find(phase)?.seconds.median)
        };
        let seconds = task.work.iter().map(of).collect();
        Ok(Self { label, machine, ceiling, seconds, memory: derived.peak_rss.value(), load: derived.load, task })
    }
}

impl Default for Calibration {
    /// That of the file `calibration.json` beside `src/`, which `roofbench plan --records … --calibration …` writes.
    fn default() -> Self {
        match serde_json::from_str(include_str!("../calibration.json")) {
            Ok(calibration) => calibration,
            // a test reads the file that is compiled in
            Err(error) => unreachable!("calibration.json: {error}"),
        }
    }
}

impl Calibration {
    /// What `task` takes under `ceiling`.
    pub fn predict(&self, task: &Task, ceiling: &Ceiling) -> Prediction {
        let correction = self.families.get(&task.family);
        let phases = task.work.iter().map(|work| {
            let corrected = correction.and_then(|correction| correction.time.get(&work.kind)).copied();
            (work.phase, self.uncorrected(work, ceiling) * corrected.unwrap_or(1.0))
        });
        let memory = correction.and_then(|correction| correction.memory).unwrap_or(1.0);
        Prediction {
            phases: phases.collect(),
            memory: self.memory.bytes(&task.footprint) * memory,
            load: self.load_per_byte * task.footprint.weights,
            corrected: correction.is_some(),
        }
    }

    fn uncorrected(&self, work: &Work, ceiling: &Ceiling) -> f64 {
        self.efficiencies.get(&work.kind).map_or(f64::NAN, |efficiency| efficiency.seconds(work, ceiling))
    }

    /// Learns from `cells`, beginning with what this one knows; `source` says what they are.
    ///
    /// A kind of work that fewer than [`LEAST_CELLS`] cells have keeps its efficiencies, and a family that has none its
    /// correction.
    #[must_use]
    pub fn fitted(&self, cells: &[Measured], source: impl Into<String>) -> Self {
        let mut fitted = Self { source: source.into(), ..self.clone() };
        for (kind, efficiency) in &mut fitted.efficiencies {
            let points: Vec<(&Work, &Ceiling, f64)> = cells
                .iter()
                .flat_map(|cell| {
                    cell.task.work.iter().zip(&cell.seconds).map(move |(work, s)| (work, &cell.ceiling, *s))
                })
                .filter_map(|(work, ceiling, seconds)| Some((work, ceiling, seconds?)))
                .filter(|(work, _, _)| work.kind == *kind)
                .collect();
            if points.len() < LEAST_CELLS {
                continue;
            }
            let of = |x: &[f64]| Efficiency { compute: x[0], bandwidth: x[1], per_operation: x[2] };
            let start = [efficiency.compute, efficiency.bandwidth, efficiency.per_operation];
            *efficiency = of(&descend(&start, |x| {
                points.iter().map(|(work, ceiling, seconds)| (of(x).seconds(work, ceiling) / seconds).ln().abs()).sum()
            }));
        }
        let known: Vec<(&Footprint, f64)> =
            cells.iter().filter_map(|cell| Some((&cell.task.footprint, cell.memory?))).collect();
        if known.len() >= LEAST_CELLS {
            let of =
                |x: &[f64]| MemoryFit { base: x[0], weights: x[1], largest: x[2], widest: x[3], activations: x[4] };
            let MemoryFit { base, weights, largest, widest, activations } = fitted.memory;
            fitted.memory = of(&descend(&[base, weights, largest, widest, activations], |x| {
                known.iter().map(|(footprint, bytes)| (of(x).bytes(footprint) / bytes).ln().abs()).sum()
            }));
        }
        let load = cells.iter().map(|cell| cell.load / cell.task.footprint.weights).collect();
        fitted.load_per_byte = middle(load).unwrap_or(fitted.load_per_byte);
        let names: std::collections::BTreeSet<&str> = cells.iter().map(|cell| cell.task.family.as_str()).collect();
        for name in names {
            let own = || cells.iter().filter(|cell| cell.task.family == name);
            let mut time: BTreeMap<Kind, Vec<f64>> = BTreeMap::new();
            for cell in own() {
                for (work, seconds) in cell.task.work.iter().zip(&cell.seconds) {
                    let ratio = seconds.map(|seconds| seconds / fitted.uncorrected(work, &cell.ceiling));
                    time.entry(work.kind).or_default().extend(ratio);
                }
            }
            let memory = own().filter_map(|cell| Some(cell.memory? / fitted.memory.bytes(&cell.task.footprint)));
            let correction = Correction {
                time: time.into_iter().filter_map(|(kind, ratios)| Some((kind, middle(ratios)?))).collect(),
                memory: middle(memory.collect()),
            };
            fitted.families.insert(name.to_owned(), correction);
        }
        fitted
    }
}

/// Cells below which a fit says more of them than of others.
pub const LEAST_CELLS: usize = 4;

/// The median of what is a positive number.
fn middle(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite() && *value > 0.0);
    stats::percentile_of(&values, 50.0)
}

/// A local minimum of `loss` from `start` on: each number in turn is multiplied and divided by steps that become smaller.
/// It is the same every time, needs no derivative, and keeps positive numbers positive.
fn descend(start: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEPS: [f64; 6] = [4.0, 2.0, 1.3, 1.1, 1.03, 1.01];
    let (mut best, mut least) = (start.to_vec(), loss(start));
    for step in STEPS {
        loop {
            let before = least;
            for place in 0..best.len() {
                for factor in [step, 1.0 / step] {
                    let mut tried = best.clone();
                    tried[place] *= factor;
                    let found = loss(&tried);
                    if found < least {
                        (best, least) = (tried, found);
                    }
                }
            }
            if before - least <= 1e-9 {
                break;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ceiling() -> Ceiling {
        Ceiling { dtype: "f32".into(), threads: 2, flops: 100e9, bytes_per_second: 10e9 }
    }

    fn work(kind: Kind, flops: f64, bytes: f64, operations: f64) -> Work {
        let phase = if kind == Kind::Decode { Phase::Decode } else { Phase::Forward };
        Work { kind, phase, flops, bytes, operations }
    }

    fn task(family: &str, work: Work) -> Task {
        let footprint =
            Footprint { weights: work.bytes, largest: 0.0, widest: 0.0, activations: work.flops / 1e3, cache: 0.0 };
        Task { family: family.to_owned(), work: vec![work], footprint }
    }

    fn calibration() -> Calibration {
        let efficiency = Efficiency { compute: 0.5, bandwidth: 0.8, per_operation: 1e-6 };
        Calibration {
            source: "a test".into(),
            efficiencies: [Kind::Dense, Kind::Convolution, Kind::Decode].map(|kind| (kind, efficiency)).into(),
            memory: MemoryFit { base: 1e6, weights: 1.0, largest: 1.0, widest: 2.0, activations: 2.0 },
            load_per_byte: 1e-9,
            families: BTreeMap::new(),
        }
    }

    #[test]
    fn the_later_of_both_ceilings_and_the_time_between() {
        let efficiency = calibration().efficiencies[&Kind::Dense];
        let seconds =
            |flops, bytes, operations| efficiency.seconds(&work(Kind::Dense, flops, bytes, operations), &ceiling());
        // 1 GFLOP at half of 100 GFLOP/s; 80 MB at 0.8 of 10 GB/s
        assert_eq!((seconds(1e9, 0.0, 0.0), seconds(0.0, 80e6, 0.0)), (0.02, 0.01));
        assert!((seconds(1e9, 80e6, 100.0) - 0.0201).abs() < 1e-12);
        let predicted = calibration().predict(&task("bert", work(Kind::Dense, 1e9, 80e6, 100.0)), &ceiling());
        assert!((predicted.seconds() - 0.0201).abs() < 1e-12 && !predicted.corrected);
        // 1 MB of program, the weights, and twice the activations
        assert_eq!(predicted.memory, 1e6 + 80e6 + 2e6);
    }

    #[test]
    fn what_was_planted_is_found_again() {
        let truth = Efficiency { compute: 0.83, bandwidth: 0.61, per_operation: 7e-6 };
        let memory = MemoryFit { base: 30e6, weights: 1.07, largest: 1.0, widest: 2.0, activations: 3.0 };
        let cells: Vec<Measured> = (1..20)
            .map(|i| {
                let i = f64::from(i);
                let work = work(Kind::Dense, 1e8 * i * i, 2e7 * (21.0 - i), 20.0 * i);
                let task = task("bert", work);
                let bytes = memory.bytes(&task.footprint);
                let seconds = vec![Some(truth.seconds(&work, &ceiling()))];
                Measured {
                    label: String::new(),
                    machine: String::new(),
                    task,
                    ceiling: ceiling(),
                    seconds,
                    memory: Some(bytes),
                    load: 2e-9 * work.bytes,
                }
            })
            .collect();
        let fitted = calibration().fitted(&cells, "planted");
        assert_eq!(fitted.source, "planted");
        for cell in &cells {
            let (predicted, real) = (fitted.predict(&cell.task, &ceiling()), cell.seconds[0].unwrap());
            assert!((predicted.seconds() / real - 1.0).abs() < 0.05, "{predicted:?} for {real}");
            assert!((predicted.memory / cell.memory.unwrap() - 1.0).abs() < 0.05, "{predicted:?}");
        }
        // kinds without cells are as before
        assert_eq!(fitted.efficiencies[&Kind::Decode], calibration().efficiencies[&Kind::Decode]);
    }

    #[test]
    fn a_family_of_its_own_speed_corrects_itself_alone() {
        let work = work(Kind::Convolution, 1e9, 0.0, 0.0);
        let cells = [Measured {
            label: String::new(),
            machine: String::new(),
            task: task("resnet", work),
            ceiling: ceiling(),
            seconds: vec![Some(0.03)],
            memory: None,
            load: 1.0,
        }];
        let fitted = calibration().fitted(&cells, "one cell");
        let seconds =
            |calibration: &Calibration, family: &str| calibration.predict(&task(family, work), &ceiling()).seconds();
        assert!((seconds(&fitted, "resnet") - 0.03).abs() < 1e-12);
        assert_eq!(
            (seconds(&fitted, "swin"), seconds(&Calibration { families: BTreeMap::new(), ..fitted.clone() }, "resnet")),
            (0.02, 0.02)
        );
    }

    #[test]
    fn the_file_that_is_compiled_in_knows_every_kind() {
        let calibration = Calibration::default();
        assert!(!calibration.source.is_empty());
        for kind in [Kind::Dense, Kind::Convolution, Kind::Decode] {
            let Efficiency { compute, bandwidth, per_operation } = calibration.efficiencies[&kind];
            assert!(compute > 0.0 && bandwidth > 0.0 && per_operation >= 0.0, "{kind}");
        }
    }

    #[test]
    fn the_middle_of_what_is_a_number() {
        assert_eq!(middle(vec![3.0, f64::NAN, 1.0, 2.0, 0.0]), Some(2.0));
        assert_eq!((middle(vec![]), middle(vec![4.0, 5.0])), (None, Some(4.5)));
    }
}
