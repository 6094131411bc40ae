//! Each metric once (name, unit, better direction, text), and how its value follows from a record.
//!
//! Times are nanoseconds in records and seconds here. A value that can't be had carries its reason; none is ever 0 for it.

use serde::Serialize;

use crate::catalog::Cell;
use crate::cost::Cost;
use crate::meters::{Quantity, Reading, Scope};
use crate::record::{Measurement, Outcome, Record, Sample};
use crate::roofline::{Ceiling, Position};
use crate::session::Phase;
use crate::stats::{Interval, Summary};
use crate::workload::InputSpec;

/// Which direction is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
    /// Neither: it describes.
    Neither,
}

/// A metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// Name in readings, CSV and JSON.
    pub name: &'static str,
    /// Name in tables and prose.
    pub label: &'static str,
    /// Unit; empty for a pure number.
    pub unit: &'static str,
    /// Which direction is good.
    pub better: Better,
    /// What it is.
    pub text: &'static str,
}

macro_rules! metrics {
    ($($constant:ident = $name:literal, $label:literal, $unit:literal, $better:ident, $text:literal;)+) => {
        $(
            #[doc = $text]
            pub const $constant: Metric =
                Metric { name: $name, label: $label, unit: $unit, better: Better::$better, text: $text };
        )+

        /// Every metric.
        pub const ALL: &[Metric] = &[$($constant),+];
    };
}

metrics! {
    LATENCY = "latency", "latency", "s", Lower, "One whole call, from prepared inputs to finished outputs.";
    THROUGHPUT = "throughput", "throughput", "units/s", Higher,
        "The cell's units (sequences, images, tokens, audio seconds) per second of the whole call, at the median latency.";
    LOAD_TIME = "load_time", "load", "s", Lower, "Weights read or made, and the model built.";
    FIRST_CALL = "first_call", "first call", "s", Lower, "The first call, which touches everything for the first time.";
    TTFT = "ttft", "TTFT", "s", Lower, "Prepared request handed over to first output token on the host.";
    ITL = "itl", "ITL", "s", Lower, "Every gap between consecutive tokens.";
    TPOT = "tpot", "TPOT", "s", Lower, "(Whole call − TTFT) / (output tokens − 1).";
    PREFILL_RATE = "prefill_rate", "prefill tok/s", "tok/s", Higher, "Prompt tokens over prefill time.";
    DECODE_RATE = "decode_rate", "decode tok/s", "tok/s", Higher, "Generated tokens after the first over decode time.";
    RTF = "rtf", "RTF", "", Lower, "Processing time over audio duration.";
    RTFX = "rtfx", "RTFx", "", Higher, "Audio duration over processing time.";
    PHASE_TIME = "phase_time", "time", "s", Lower, "Time of a phase within one call, all its repeats together.";
    FLOPS = "flops", "FLOP/s", "FLOP/s", Higher, "Analytic FLOPs of a phase over its measured time; a multiply-add is 2.";
    BANDWIDTH = "bandwidth", "GB/s", "B/s", Higher, "Analytic least bytes of a phase over its measured time.";
    INTENSITY = "arithmetic_intensity", "FLOP/B", "FLOP/B", Neither, "FLOP per byte moved.";
    MFU = "mfu", "MFU", "", Higher, "Achieved FLOP/s over the measured peak at the same type and threads.";
    MBU = "mbu", "MBU", "", Higher, "Achieved bytes/s over the measured read bandwidth at the same threads.";
    ATTAINED = "attained", "% of roofline", "", Higher,
        "Achieved FLOP/s over what the measured roofline allows at the phase's arithmetic intensity.";
    WALL_TIME = "wall_time", "wall time", "s", Lower, "Wall-clock time of an interval.";
    RSS = "rss", "RSS", "B", Lower, "Resident memory of the process at the end of an interval.";
    PEAK_RSS = "peak_rss", "peak RSS", "B", Lower, "Largest resident memory of the process.";
    DEVICE_MEMORY = "device_memory", "device memory", "B", Lower, "Device memory in use at the end of an interval.";
    DEVICE_PEAK = "device_peak", "device peak", "B", Lower, "Largest device memory seen in use.";
    ENERGY = "energy", "energy", "J", Lower, "Energy of an interval.";
    POWER = "power", "power", "W", Lower, "Mean power over an interval.";
    CLOCK = "clock", "clock", "MHz", Neither, "Clock of the CPU, the mean over its cores.";
    TEMPERATURE = "temperature", "temperature", "°C", Neither, "The hottest sensor of the CPU.";
    PHASE_BYTES = "phase_bytes", "bytes", "B", Lower, "Analytic least bytes that a phase moves within one call.";
    PHASE_ENERGY = "phase_energy", "energy", "J", Lower,
        "Energy of a call that falls to a phase by its share of the time; an estimate.";
    ENERGY_PER_UNIT = "energy_per_unit", "J/unit", "J/unit", Lower,
        "Energy of the steady interval over the units worked off in it, idle power included.";
    P50 = "p50", "p50", "", Neither, "Median of the raw samples.";
    P90 = "p90", "p90", "", Neither, "90th percentile, from 10 samples on.";
    P95 = "p95", "p95", "", Neither, "95th percentile, from 20 samples on.";
    P99 = "p99", "p99", "", Neither, "99th percentile, from 100 samples on.";
    MAD = "mad", "MAD", "", Neither, "Median absolute deviation from the median, unscaled.";
}

/// The metric called `name`.
pub fn by_name(name: &str) -> Option<&'static Metric> {
    ALL.iter().find(|metric| metric.name == name)
}

/// Prompt tokens of one call, all rows together; `None` where the input is not text.
fn prompt_tokens(cell: &Cell) -> Option<u64> {
    match cell.inputs.get("input_ids")? {
        InputSpec::Tokens { tokens, .. } => Some(tokens.iter().map(|&n| n as u64).product()),
        _ => None,
    }
}

/// A centre and its 95 % interval, where the sample supports one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// At the median time.
    pub value: f64,
    /// From the interval of the median time.
    pub interval: Option<Interval>,
}

impl Rate {
    /// `amount` per second of `seconds`.
    fn of(amount: f64, seconds: &Summary) -> Self {
        Self {
            value: amount / seconds.median,
            interval: seconds.interval.map(|i| Interval { low: amount / i.high, high: amount / i.low }),
        }
    }
}

/// What a phase reached.
#[derive(Debug, Clone, PartialEq)]
pub struct PhaseResult {
    /// Which phase.
    pub phase: Phase,
    /// Times that it runs in one call.
    pub repeats: u64,
    /// Its time in one call, all repeats together, in seconds.
    pub seconds: Summary,
    /// Its cost in one call, all repeats together.
    pub cost: Cost,
    /// Joules of one call by sensor, estimated; none where no sensor gave a number.
    pub energy: Vec<(String, Quantity)>,
    /// Its place under the roofline, or why there is none.
    pub position: Result<Position, String>,
    /// Achieved over peak FLOP/s; `None` with the reason in `position`.
    pub mfu: Option<f64>,
    /// Achieved bytes/s over peak bandwidth; `None` with the reason in `position`.
    pub mbu: Option<f64>,
}

impl PhaseResult {
    /// FLOP/s at the median time.
    pub fn flops(&self) -> f64 {
        self.cost.flops as f64 / self.seconds.median
    }

    /// Bytes per second at the median time.
    pub fn bandwidth(&self) -> f64 {
        self.cost.bytes() as f64 / self.seconds.median
    }
}

/// Energy per unit as one sensor saw it. Sensors may overlap, so they are never added up.
#[derive(Debug, Clone, PartialEq)]
pub struct Energy {
    /// What was read.
    pub sensor: String,
    /// What it covers.
    pub scope: Scope,
    /// Joules per unit of the cell.
    pub per_unit: Quantity,
}

/// What tables and reports show of a measured cell, computed from its record alone. Times are in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Derived {
    /// What throughput counts.
    pub unit: String,
    /// Units in one call.
    pub units_per_call: f64,
    /// Load time.
    pub load: f64,
    /// First call.
    pub first_call: f64,
    /// Whole calls.
    pub latency: Summary,
    /// Units per second of the whole call.
    pub throughput: Rate,
    /// Time to first token; generation only.
    pub ttft: Option<Summary>,
    /// Gaps between tokens, those of all calls together; generation only.
    pub itl: Option<Summary>,
    /// Time per output token, one per call; generation only.
    pub tpot: Option<Summary>,
    /// Prompt tokens per second; generation from text only.
    pub prefill_rate: Option<Rate>,
    /// Tokens after the first per second; generation only.
    pub decode_rate: Option<Rate>,
    /// Processing time over audio duration; sound only.
    pub rtf: Option<f64>,
    /// The measured ceilings that hold for it, or why there are none.
    pub ceiling: Result<Ceiling, String>,
    /// Phases in order of their cost entries; those whose cost or time is not known are in `gaps`.
    pub phases: Vec<PhaseResult>,
    /// Phases without a result, and why.
    pub gaps: Vec<(Phase, String)>,
    /// Largest resident memory over all intervals, bytes.
    pub peak_rss: Quantity,
    /// Largest device memory over all intervals, bytes.
    pub device_peak: Quantity,
    /// Energy per unit by sensor; never empty.
    pub energy: Vec<Energy>,
}

/// Computes what `record` holds. `None` when it was not measured.
pub fn derive(record: &Record) -> Option<Derived> {
    let Outcome::Measured(measurement) = &record.outcome else { return None };
    let cell = &record.subject.cell;
    let samples = &measurement.samples;
    let latency = seconds(samples.iter().map(|s| Some(s.total_ns)))?;
    let units_per_call = cell.units_per_call();
    let ceiling = ceiling(record);

    let decode_steps = samples.first().map_or(0, |s| count(s, Phase::Decode));
    let ttft = seconds(samples.iter().map(first_token_ns));
    let prefill = seconds(samples.iter().map(|s| phase_ns(s, Phase::Prefill)));
    let decode = seconds(samples.iter().map(|s| phase_ns(s, Phase::Decode)));
    let gaps_ns: Vec<u64> = samples
        .iter()
        .flat_map(|s| &s.phases)
        .filter(|(phase, _)| *phase == Phase::Decode)
        .map(|(_, ns)| *ns)
        .collect();

    let (mut phases, mut gaps) = (Vec::new(), Vec::new());
    for entry in &measurement.cost {
        match phase_result(entry.phase, entry.repeats, entry.cost, samples, &ceiling) {
            Ok(result) => phases.push(PhaseResult { energy: phase_energy(measurement, &result, &latency), ..result }),
            Err(reason) => gaps.push((entry.phase, reason)),
        }
    }

    Some(Derived {
        unit: cell.unit.clone(),
        units_per_call,
        load: measurement.load_ns as f64 * 1e-9,
        first_call: measurement.first_call_ns as f64 * 1e-9,
        throughput: Rate::of(units_per_call, &latency),
        tpot: seconds(samples.iter().map(tpot_ns)),
        itl: Summary::of(&gaps_ns).map(|s| s.scaled(1e-9)),
        prefill_rate: prefill.as_ref().zip(prompt_tokens(cell)).map(|(s, tokens)| Rate::of(tokens as f64, s)),
        decode_rate: decode.as_ref().map(|s| Rate::of((cell.batch * decode_steps) as f64, s)),
        ttft,
        rtf: (cell.unit == "audio seconds").then(|| latency.median / units_per_call),
        latency,
        ceiling,
        phases,
        gaps,
        peak_rss: largest(measurement, &PEAK_RSS),
        device_peak: largest(measurement, &DEVICE_PEAK),
        energy: energy(measurement, units_per_call, &cell.unit),
    })
}

fn ceiling(record: &Record) -> Result<Ceiling, String> {
    let settings = &record.settings;
    let missing = |name: &str| format!("the record does not say which {name} was in effect");
    let device = settings.device().ok_or_else(|| missing("device"))?;
    let dtype = settings.dtype().ok_or_else(|| missing("dtype"))?;
    let threads = settings.threads().ok_or_else(|| missing("number of threads"))?;
    Ceiling::of(&record.machine, device, dtype, threads)
}

/// The summary in seconds of nanoseconds; `None` when there are none or one is missing.
fn seconds(ns: impl Iterator<Item = Option<u64>>) -> Option<Summary> {
    Some(Summary::of(&ns.collect::<Option<Vec<_>>>()?)?.scaled(1e-9))
}

fn count(sample: &Sample, phase: Phase) -> u64 {
    sample.phases.iter().filter(|(p, _)| *p == phase).count() as u64
}

/// Time of a phase within one call, all its repeats together.
fn phase_ns(sample: &Sample, phase: Phase) -> Option<u64> {
    let mut intervals = sample.phases.iter().filter(|(p, _)| *p == phase).map(|(_, ns)| *ns).peekable();
    intervals.peek()?;
    Some(intervals.sum())
}

/// Time up to the first token: components, and prefill.
fn first_token_ns(sample: &Sample) -> Option<u64> {
    let end = sample.phases.iter().position(|(phase, _)| *phase == Phase::Prefill)?;
    Some(sample.phases[..=end].iter().map(|(_, ns)| *ns).sum())
}

fn tpot_ns(sample: &Sample) -> Option<u64> {
    // a vocoder behind the last step makes none
    let behind = phase_ns(sample, Phase::Forward).unwrap_or(0);
    let after_first = sample.total_ns.checked_sub(first_token_ns(sample)?)?.checked_sub(behind)?;
    after_first.checked_div(count(sample, Phase::Decode))
}

fn phase_result(
    phase: Phase,
    repeats: u64,
    cost: Cost,
    samples: &[Sample],
    ceiling: &Result<Ceiling, String>,
) -> Result<PhaseResult, String> {
    if let Some(sample) = samples.iter().find(|s| count(s, phase) != repeats) {
        return Err(format!("the cost is of {repeats} repeats, and a call had {}", count(sample, phase)));
    }
    let seconds = seconds(samples.iter().map(|s| phase_ns(s, phase))).ok_or("it was not timed")?;
    let position = ceiling.clone().and_then(|ceiling| ceiling.place(cost, seconds.median));
    let peaks = position.as_ref().ok().and(ceiling.as_ref().ok());
    let energy = Vec::new();
    let mut result = PhaseResult { phase, repeats, seconds, cost, energy, mfu: None, mbu: None, position };
    result.mfu = peaks.map(|peaks| result.flops() / peaks.flops);
    result.mbu = peaks.map(|peaks| result.bandwidth() / peaks.bytes_per_second);
    Ok(result)
}

/// What of the energy of a call falls to a phase by its share of the time, for each sensor that gave a number.
fn phase_energy(measurement: &Measurement, phase: &PhaseResult, latency: &Summary) -> Vec<(String, Quantity)> {
    let share = phase.seconds.median / latency.median / measurement.samples.len() as f64;
    let steady = measurement.readings.get("steady").into_iter().flatten().filter(|r| r.metric == ENERGY.name);
    let of_phase = |reading: &Reading| {
        let method = format!("{} of a call, in proportion to the phase's share of its time", reading.sensor);
        let quantity = Quantity::Estimated { value: reading.quantity.value()? * share, method };
        Some((reading.sensor.clone(), quantity))
    };
    steady.filter_map(of_phase).collect()
}

/// The largest reading of `metric` over all intervals, or the reason for there being none.
fn largest(measurement: &Measurement, metric: &Metric) -> Quantity {
    let readings = || measurement.readings.values().flatten().filter(|r| r.metric == metric.name);
    let with_value = readings().filter_map(|r| Some((r, r.quantity.value()?)));
    let best = with_value.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(reading, _)| reading);
    best.or_else(|| readings().next()).map_or_else(|| no_reading(metric), |reading| reading.quantity.clone())
}

fn no_reading(metric: &Metric) -> Quantity {
    Quantity::Unavailable { reason: format!("no meter read the {} of this cell", metric.label) }
}

fn energy(measurement: &Measurement, units_per_call: f64, unit: &str) -> Vec<Energy> {
    let calls = measurement.samples.len();
    let units = units_per_call * calls as f64;
    let per_unit = |reading: &Reading| Energy {
        sensor: reading.sensor.clone(),
        scope: reading.scope,
        per_unit: match &reading.quantity {
            Quantity::Measured { value } => Quantity::Derived {
                value: value / units,
                from: format!("{} of the steady interval / ({calls} calls × {units_per_call} {unit})", reading.sensor),
            },
            Quantity::Derived { value, from } => Quantity::Derived {
                value: value / units,
                from: format!("{from}; / ({calls} calls × {units_per_call} {unit})"),
            },
            Quantity::Estimated { value, method } => {
                Quantity::Estimated { value: value / units, method: method.clone() }
            }
            Quantity::Unavailable { reason } => Quantity::Unavailable { reason: reason.clone() },
        },
    };
    let steady = measurement.readings.get("steady").into_iter().flatten();
    let by_sensor: Vec<Energy> = steady.filter(|r| r.metric == ENERGY.name).map(per_unit).collect();
    if by_sensor.is_empty() {
        return vec![Energy { sensor: "none".to_owned(), scope: Scope::Machine, per_unit: no_reading(&ENERGY) }];
    }
    by_sensor
}

/// One number of a cell for programs: a row of CSV, an entry of JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Value {
    /// Name of the metric.
    pub metric: &'static str,
    /// Unit of the number.
    pub unit: String,
    /// The phase that it is of; absent for the whole cell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Name of the statistic (`p50`, `mad`), or the sensor; absent for a single number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistic: Option<String>,
    /// The number or the reason for its absence.
    #[serde(flatten)]
    pub quantity: Quantity,
}

impl Derived {
    /// Every number as a flat list in a fixed order.
    pub fn values(&self) -> Vec<Value> {
        let mut list = List(Vec::new());
        let per = |metric: &Metric| metric.unit.replace("units", &self.unit).replace("unit", &self.unit);
        list.number(&LOAD_TIME, None, self.load, "load_ns");
        list.number(&FIRST_CALL, None, self.first_call, "first_call_ns");
        list.summary(&LATENCY, None, &self.latency);
        list.rate(&THROUGHPUT, self.throughput, &per(&THROUGHPUT));
        for (metric, summary) in [(&TTFT, &self.ttft), (&ITL, &self.itl), (&TPOT, &self.tpot)] {
            if let Some(summary) = summary {
                list.summary(metric, None, summary);
            }
        }
        for (metric, rate) in [(&PREFILL_RATE, self.prefill_rate), (&DECODE_RATE, self.decode_rate)] {
            if let Some(rate) = rate {
                list.rate(metric, rate, metric.unit);
            }
        }
        if let Some(rtf) = self.rtf {
            list.number(&RTF, None, rtf, "median latency / audio duration");
            list.number(&RTFX, None, 1.0 / rtf, "audio duration / median latency");
        }
        for result in &self.phases {
            let phase = Some(result.phase);
            list.summary(&PHASE_TIME, phase, &result.seconds);
            list.number(&FLOPS, phase, result.flops(), "analytic FLOPs / median time");
            list.number(&BANDWIDTH, phase, result.bandwidth(), "analytic bytes / median time");
            list.number(&PHASE_BYTES, phase, result.cost.bytes() as f64, "formula");
            if let Some(intensity) = result.cost.arithmetic_intensity() {
                list.number(&INTENSITY, phase, intensity, "analytic FLOPs / analytic bytes");
            }
            let attained = result.position.as_ref().ok().map(|p| p.fraction);
            for (metric, value) in [(&MFU, result.mfu), (&MBU, result.mbu), (&ATTAINED, attained)] {
                match (&result.position, value) {
                    (Err(reason), _) => {
                        list.push(metric, phase, None, metric.unit, Quantity::Unavailable { reason: reason.clone() });
                    }
                    (Ok(_), Some(value)) => list.number(metric, phase, value, "rate reached / measured ceiling"),
                    (Ok(_), None) => {}
                }
            }
        }
        for result in &self.phases {
            for (sensor, joules) in &result.energy {
                list.push(&PHASE_ENERGY, Some(result.phase), Some(sensor.clone()), PHASE_ENERGY.unit, joules.clone());
            }
        }
        for (phase, reason) in &self.gaps {
            let quantity = Quantity::Unavailable { reason: reason.clone() };
            list.push(&FLOPS, Some(*phase), None, FLOPS.unit, quantity);
        }
        list.push(&PEAK_RSS, None, None, PEAK_RSS.unit, self.peak_rss.clone());
        list.push(&DEVICE_PEAK, None, None, DEVICE_PEAK.unit, self.device_peak.clone());
        for energy in &self.energy {
            let unit = per(&ENERGY_PER_UNIT);
            list.push(&ENERGY_PER_UNIT, None, Some(energy.sensor.clone()), &unit, energy.per_unit.clone());
        }
        list.0
    }
}

struct List(Vec<Value>);

impl List {
    fn push(
        &mut self,
        metric: &Metric,
        phase: Option<Phase>,
        statistic: Option<String>,
        unit: &str,
        quantity: Quantity,
    ) {
        self.0.push(Value { metric: metric.name, unit: unit.to_owned(), phase, statistic, quantity });
    }

    fn number(&mut self, metric: &Metric, phase: Option<Phase>, value: f64, from: &str) {
        self.push(metric, phase, None, metric.unit, Quantity::Derived { value, from: from.to_owned() });
    }

    fn summary(&mut self, metric: &Metric, phase: Option<Phase>, summary: &Summary) {
        let interval = summary.interval;
        let statistics = [
            ("p50", Some(summary.median)),
            ("p50 low", interval.map(|i| i.low)),
            ("p50 high", interval.map(|i| i.high)),
            ("mad", Some(summary.mad)),
            ("min", Some(summary.min)),
            ("max", Some(summary.max)),
            ("p90", summary.p90),
            ("p95", summary.p95),
            ("p99", summary.p99),
        ];
        for (name, value) in statistics {
            if let Some(value) = value {
                let from = format!("{} raw samples", summary.count);
                self.push(metric, phase, Some(name.to_owned()), metric.unit, Quantity::Derived { value, from });
            }
        }
    }

    fn rate(&mut self, metric: &Metric, rate: Rate, unit: &str) {
        let statistics = [
            ("p50", Some(rate.value)),
            ("p50 low", rate.interval.map(|i| i.low)),
            ("p50 high", rate.interval.map(|i| i.high)),
        ];
        for (name, value) in statistics {
            if let Some(value) = value {
                let from = "amount of one call / median time".to_owned();
                self.push(metric, None, Some(name.to_owned()), unit, Quantity::Derived { value, from });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cost::PhaseCost;
    use crate::record::StopRule;
    use crate::record::tests::record;
    use crate::roofline::Bound;

    fn measured(record: &mut Record) -> &mut Measurement {
        match &mut record.outcome {
            Outcome::Measured(measurement) => measurement,
            other => panic!("{other:?}"),
        }
    }

    fn reading(metric: &Metric, sensor: &str, quantity: Quantity) -> Reading {
        Reading {
            metric: metric.name.into(),
            unit: metric.unit.into(),
            scope: Scope::Device,
            sensor: sensor.into(),
            quantity,
        }
    }

    /// 2 rows of 8 prompt tokens, 3 tokens each: prefill 100 ms, steps of 20 and 30 ms, 10 ms of the rest.
    fn generation() -> Record {
        let mut record = record();
        let cell = &mut record.subject.cell;
        (cell.name, cell.unit, cell.batch) = ("generate/b2/p8/n3".into(), "tokens".into(), 2);
        cell.new_tokens = Some(3);
        cell.inputs =
            BTreeMap::from([("input_ids".to_owned(), InputSpec::Tokens { tokens: vec![2, 8], image_tokens: None })]);
        let phases = vec![(Phase::Prefill, 100_000_000), (Phase::Decode, 20_000_000), (Phase::Decode, 30_000_000)];
        let measurement = measured(&mut record);
        measurement.samples = vec![Sample { total_ns: 160_000_000, phases }; 10];
        let cost = |flops, weight_bytes| Cost { flops, weight_bytes, ..Cost::default() };
        measurement.cost = vec![
            // 20 FLOP per byte, 100 ms: 40 GFLOP/s of 100
            PhaseCost { phase: Phase::Prefill, repeats: 1, cost: cost(4_000_000_000, 200_000_000) },
            // 2 FLOP per byte, 50 ms: 8 GFLOP/s of 20, 4 GB/s of 10
            PhaseCost { phase: Phase::Decode, repeats: 2, cost: cost(400_000_000, 200_000_000) },
        ];
        record
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs()
    }

    #[test]
    fn names_are_unique_and_found() {
        for (place, metric) in ALL.iter().enumerate() {
            assert!(ALL[..place].iter().all(|other| other.name != metric.name), "{}", metric.name);
            assert_eq!(by_name(metric.name), Some(metric));
        }
        assert_eq!(by_name("speed"), None);
    }

    #[test]
    fn generation_by_hand() {
        let derived = derive(&generation()).unwrap();
        let median = |summary: &Option<Summary>| summary.as_ref().unwrap().median;
        assert!(close(derived.latency.median, 0.16));
        // 2 rows × 3 tokens
        assert!(close(derived.throughput.value, 6.0 / 0.16));
        assert!(close(median(&derived.ttft), 0.1));
        // every gap of every call
        assert_eq!(derived.itl.as_ref().unwrap().count, 20);
        assert!(close(median(&derived.itl), 0.025));
        // (160 − 100) / (3 − 1)
        assert!(close(median(&derived.tpot), 0.03));
        assert!(close(derived.prefill_rate.unwrap().value, 16.0 / 0.1));
        // 2 rows × 2 steps over 50 ms
        assert!(close(derived.decode_rate.unwrap().value, 4.0 / 0.05));
        assert_eq!(derived.rtf, None);

        let [prefill, decode] = &derived.phases[..] else { panic!("{:?}", derived.phases) };
        let (p, d) = (prefill.position.clone().unwrap(), decode.position.clone().unwrap());
        assert_eq!((p.bound, d.bound), (Bound::Compute, Bound::Memory));
        assert!(close(p.fraction, 0.4) && close(prefill.mfu.unwrap(), 0.4));
        assert!(close(d.fraction, 0.4) && close(decode.mbu.unwrap(), 0.4) && close(decode.mfu.unwrap(), 0.08));
    }

    /// A vision tower of 60 ms, twice, before the same prefill and steps.
    #[test]
    fn components_count_for_the_first_token_and_not_for_prefill() {
        let mut record = generation();
        let measurement = measured(&mut record);
        for sample in &mut measurement.samples {
            sample.phases.splice(0..0, [(Phase::Vision, 40_000_000), (Phase::Vision, 20_000_000)]);
            sample.total_ns += 60_000_000;
        }
        let cost = Cost { flops: 6_000_000, weight_bytes: 1000, ..Cost::default() };
        measurement.cost.insert(0, PhaseCost { phase: Phase::Vision, repeats: 2, cost });
        let joules = reading(&ENERGY, "RAPL package-0", Quantity::Measured { value: 110.0 });
        measurement.readings.insert("steady".into(), vec![joules]);
        let derived = derive(&record).unwrap();
        assert!(close(derived.ttft.as_ref().unwrap().median, 0.16));
        assert!(close(derived.tpot.as_ref().unwrap().median, 0.03));
        assert!(close(derived.prefill_rate.unwrap().value, 16.0 / 0.1));
        let vision = &derived.phases[0];
        assert!(close(vision.seconds.median, 0.06) && close(vision.flops(), 1e8));
        // 11 J a call of 220 ms
        let [(_, Quantity::Estimated { value, .. })] = &vision.energy[..] else { panic!("{:?}", vision.energy) };
        assert!(close(*value, 3.0));
    }

    #[test]
    fn real_time_factor_of_sound() {
        let mut record = record();
        (record.subject.cell.unit, record.subject.cell.amount) = ("audio seconds".into(), Some(10.0));
        let derived = derive(&record).unwrap();
        assert!(close(derived.rtf.unwrap(), derived.latency.median / 10.0));
    }

    #[test]
    fn cost_of_other_repeats_than_timed_gives_a_reason() {
        let mut record = generation();
        measured(&mut record).samples[3].phases.pop();
        let derived = derive(&record).unwrap();
        assert_eq!(derived.phases.len(), 1, "prefill still stands");
        let [(Phase::Decode, reason)] = &derived.gaps[..] else { panic!("{:?}", derived.gaps) };
        assert!(reason.contains("2 repeats") && reason.contains("had 1"), "{reason}");
    }

    #[test]
    fn missing_peaks_leave_achieved_rates_and_a_reason() {
        let mut record = generation();
        record.machine.peaks = None;
        let derived = derive(&record).unwrap();
        assert!(close(derived.phases[0].flops(), 40e9));
        assert!(derived.phases[0].position.as_ref().unwrap_err().contains("no measured peaks"));
        let mfu = derived.values().into_iter().find(|v| v.metric == MFU.name).unwrap();
        assert!(matches!(mfu.quantity, Quantity::Unavailable { .. }));
    }

    #[test]
    fn peak_memory_is_the_largest_interval_and_never_zero_when_absent() {
        let mut record = record();
        let readings = &mut measured(&mut record).readings;
        readings.clear();
        let unread = derive(&record).unwrap();
        assert_eq!(unread.peak_rss.value(), None);
        assert_eq!(unread.energy[0].per_unit.value(), None);
        let readings = &mut measured(&mut record).readings;
        for (interval, value) in [("load", 300.0), ("first_call", 500.0), ("steady", 400.0)] {
            readings.insert(interval.into(), vec![reading(&PEAK_RSS, "VmHWM", Quantity::Measured { value })]);
        }
        assert_eq!(derive(&record).unwrap().peak_rss.value(), Some(500.0));
    }

    #[test]
    fn energy_is_per_unit_and_per_sensor_with_its_provenance() {
        let mut record = generation();
        let steady = vec![
            reading(&ENERGY, "RAPL package-0", Quantity::Measured { value: 120.0 }),
            reading(&ENERGY, "guess", Quantity::Estimated { value: 60.0, method: "TDP".into() }),
            reading(&ENERGY, "NVML GPU 0", Quantity::Unavailable { reason: "no driver".into() }),
        ];
        measured(&mut record).readings.insert("steady".into(), steady);
        let energy = derive(&record).unwrap().energy;
        // 120 J over 10 calls of 6 tokens
        assert!(matches!(&energy[0].per_unit, Quantity::Derived { value, .. } if *value == 2.0), "{:?}", energy[0]);
        assert!(matches!(&energy[1].per_unit, Quantity::Estimated { value, .. } if *value == 1.0));
        assert_eq!(energy[2].per_unit, Quantity::Unavailable { reason: "no driver".into() });
    }

    #[test]
    fn what_was_not_measured_derives_nothing() {
        let mut skipped = record();
        skipped.outcome = Outcome::Skipped { reason: "too large".into() };
        assert_eq!(derive(&skipped), None);
        let mut empty = record();
        measured(&mut empty).samples.clear();
        measured(&mut empty).stop = StopRule::Interrupted;
        assert_eq!(derive(&empty), None);
    }
}
