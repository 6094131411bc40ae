//! Hardware-aware optimisations: what each does, when it applies to a model on a machine, and the plan that follows.
//!
//! An [`Optimization`] is a choice that can be made either way. Its rule looks at the machine (instruction sets, caches,
//! memory, measured ceilings) and at the model (family, type and bytes of its weights, threads), and gives a [`Verdict`]
//! with its reason. A [`Plan`] is the decisions of all rules, some of which a user may have taken otherwise. How a choice
//! reaches the model is its crate's affair.

use std::str::FromStr;

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::hardware::Machine;
use crate::session::{Engine, ModelSpec};

/// How much faster than f32 the machine has to multiply bf16 for the rounding of activations to be worth it.
const BF16_WORTH: f64 = 1.2;
/// Weights packed for the kernels are padded to whole panels, and the tensor at hand exists twice while it is packed.
const PACKING: f64 = 1.1;
/// Bits per weight, scales included, of the forms that are rounded further.
const Q8_BITS: f64 = 8.5;
const Q4_BITS: f64 = 4.5;

/// What the rules look at beside the machine.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// What will be loaded: family, class, type of weights, device, engine.
    pub spec: &'a ModelSpec,
    /// Bytes of its weights in that type, where known.
    pub weight_bytes: Option<u64>,
    /// Threads that it will run on.
    pub threads: u32,
    /// It will make tokens one after another.
    pub generates: bool,
}

/// What a rule says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// It can be on for this model on this machine.
    pub applies: bool,
    /// It should be.
    pub on: bool,
    /// Why, in terms of the machine and the model.
    pub reason: String,
    /// Its number where it has one, such as threads.
    pub value: Option<u32>,
}

impl Verdict {
    /// To be on.
    pub fn on(reason: impl Into<String>) -> Self {
        Self::when(true, reason)
    }

    /// Possible, and better left off.
    pub fn off(reason: impl Into<String>) -> Self {
        Self::when(false, reason)
    }

    /// Possible.
    pub fn when(on: bool, reason: impl Into<String>) -> Self {
        Self { applies: true, on, reason: reason.into(), value: None }
    }

    /// Not possible here.
    pub fn impossible(reason: impl Into<String>) -> Self {
        Self { applies: false, on: false, reason: reason.into(), value: None }
    }
}

/// A choice that can be made either way.
#[derive(Debug, Clone, Copy)]
pub struct Optimization {
    /// Its name on the command line and in records.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Whether it is for this model on this machine.
    pub rule: fn(&Machine, &Model) -> Verdict,
}

/// A user's wish: `+name` or `-name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Name of the optimisation.
    pub name: String,
    /// On or off.
    pub on: bool,
}

impl FromStr for Switch {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (on, name) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(name), _) => (true, name),
            (_, Some(name)) => (false, name),
            _ => return Err(format!("expected +{text} or -{text}: on or off")),
        };
        Ok(Self { name: name.to_owned(), on })
    }
}

impl std::fmt::Display for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", if self.on { '+' } else { '-' }, self.name)
    }
}

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// The rule.
    Rule,
    /// The user.
    User,
}

/// One optimisation in a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    /// Name of the optimisation.
    pub name: String,
    /// It is on.
    pub on: bool,
    /// It can be on for this model on this machine.
    pub applies: bool,
    /// Who decided.
    pub by: DecidedBy,
    /// Why the rule would have it on or off.
    pub reason: String,
    /// Its number where it has one, such as threads.
    #[serde(default)]
    pub value: Option<u32>,
}

impl std::fmt::Display for Decision {
    /// As [`Switch`], with the reason: `+packed-weights: …`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}: {}", if self.on { '+' } else { '-' }, self.name, self.reason)
    }
}

/// What is on and what is off, each with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Plan {
    /// One for each optimisation of the model's family.
    pub decisions: Vec<Decision>,
}

/// Why a user's wish can't be met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimizeError {
    /// There is no such optimisation.
    #[error("there is no optimization `{name}`; there are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// All that there are.
        known: String,
    },
    /// It can't be on for this model on this machine.
    #[error("optimization `{name}` does not apply to {family} here: {reason}")]
    Impossible {
        /// What was asked for.
        name: String,
        /// Family of the model.
        family: String,
        /// Why not.
        reason: String,
    },
    /// Two that exclude each other were both asked for.
    #[error("optimizations `{first}` and `{second}` exclude each other; ask for one of them")]
    Exclusive {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
}

impl Plan {
    /// What the rules of `optimizations` say.
    pub fn decide(optimizations: &[&Optimization], machine: &Machine, model: &Model) -> Self {
        let decide = |optimization: &&Optimization| {
            let Verdict { applies, on, reason, value } = (optimization.rule)(machine, model);
            Decision { name: optimization.name.to_owned(), on, applies, by: DecidedBy::Rule, reason, value }
        };
        Self { decisions: optimizations.iter().map(decide).collect() }
    }

    /// The plan with a user's wishes in it. To switch off what is off, or what the family does not have, is no error.
    ///
    /// # Errors
    /// [`OptimizeError::Impossible`] for what can't be on, [`OptimizeError::Exclusive`] for two forms of weights.
    pub fn switched(mut self, switches: &[Switch], family: &str) -> Result<Self, OptimizeError> {
        exclusive(switches)?;
        for switch in switches {
            let reason = match self.get(&switch.name) {
                Some(decision) if !decision.applies => Some(decision.reason.clone()),
                Some(_) => None,
                None => Some("its models have no such choice".to_owned()),
            };
            if let Some(reason) = reason.filter(|_| switch.on) {
                let (name, family) = (switch.name.clone(), family.to_owned());
                return Err(OptimizeError::Impossible { name, family, reason });
            }
            for decision in &mut self.decisions {
                if decision.name == switch.name {
                    (decision.on, decision.by) = (switch.on, DecidedBy::User);
                } else if switch.on && exclude(&decision.name, &switch.name) {
                    decision.on = false;
                }
            }
        }
        Ok(self)
    }

    /// What to switch on or off, by name, in the model's blocks (`roofbench_nn::options::Options` collects it). What does not
    /// apply is left out: it keeps its default, which those that apply are compared with.
    pub fn choices(&self) -> impl Iterator<Item = (&str, bool)> {
        self.decisions.iter().filter(|decision| decision.applies).map(|decision| (decision.name.as_str(), decision.on))
    }

    /// The decision on `name`.
    pub fn get(&self, name: &str) -> Option<&Decision> {
        self.decisions.iter().find(|decision| decision.name == name)
    }

    /// Whether `name` is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some_and(|decision| decision.on)
    }

    /// The number of `name`, where it is on and has one.
    pub fn value(&self, name: &str) -> Option<u32> {
        self.get(name).filter(|decision| decision.on)?.value
    }

    /// Bits that a weight takes, where a form is chosen that rounds it further.
    pub fn weight_bits(&self) -> Option<f64> {
        let bits = |optimization: &Optimization, bits| self.is_on(optimization.name).then_some(bits);
        bits(&WEIGHTS_Q8, Q8_BITS).or_else(|| bits(&WEIGHTS_Q4, Q4_BITS))
    }

    /// What sets results apart from those of other plans of the same cell: forms of weights, and all that a user decided.
    pub fn remarkable(&self) -> Vec<Switch> {
        let remarkable =
            |d: &&Decision| (d.on && d.name.starts_with(WEIGHTS)) || (d.by == DecidedBy::User && (d.on || d.applies));
        let switch = |d: &Decision| Switch { name: d.name.clone(), on: d.on };
        self.decisions.iter().filter(remarkable).map(switch).collect()
    }
}

/// Checks that every switch names one of `known`, and that they don't contradict each other.
///
/// # Errors
/// [`OptimizeError::Unknown`], [`OptimizeError::Exclusive`].
pub fn check(switches: &[Switch], known: &[&Optimization]) -> Result<(), OptimizeError> {
    match switches.iter().find(|switch| known.iter().all(|optimization| optimization.name != switch.name)) {
        Some(switch) => {
            let known: Vec<&str> = known.iter().map(|optimization| optimization.name).collect();
            Err(OptimizeError::Unknown { name: switch.name.clone(), known: known.join(", ") })
        }
        None => exclusive(switches),
    }
}

fn exclusive(switches: &[Switch]) -> Result<(), OptimizeError> {
    let mut on = switches.iter().filter(|switch| switch.on).map(|switch| &switch.name);
    while let Some(first) = on.next() {
        if let Some(second) = on.clone().find(|second| exclude(first, second)) {
            return Err(OptimizeError::Exclusive { first: first.clone(), second: second.clone() });
        }
    }
    Ok(())
}

/// What the names of forms of weights begin with; of these one at most is on.
const WEIGHTS: &str = "weights-";

/// Whether one of two optimisations at most can be on, as of two forms of the same weights.
pub fn exclude(one: &str, other: &str) -> bool {
    one != other && one.starts_with(WEIGHTS) && other.starts_with(WEIGHTS)
}

/// Weights in the layout that the kernels read.
pub const PACKED_WEIGHTS: Optimization = Optimization {
    name: "packed-weights",
    about: "weights are laid out once, at load, as our kernels read them; else candle multiplies with them as they are",
    rule: |machine, model| {
        ours_on_the_cpu(model).unwrap_or_else(|| {
            Verdict::on(format!("kernels for {} read panels of weights one line after the other", widest(machine)))
        })
    },
};

/// Attention in one kernel.
pub const FUSED_ATTENTION: Optimization = Optimization {
    name: "fused-attention",
    about: "scores, softmax and their sum over the values in one kernel, block by block; else the whole matrix of scores",
    rule: |machine, model| {
        ours_on_the_cpu(model).unwrap_or_else(|| {
            let cache = machine.cpu.caches.iter().find(|cache| cache.level == 2);
            let cache = cache.map_or_else(String::new, |cache| format!(" ({})", bytes(cache.bytes as f64)));
            Verdict::on(format!(
                "blocks of scores stay in the second-level cache{cache} and are never written to memory"
            ))
        })
    },
};

/// Convolutions of 3 × 3 with fewer multiplications; for models that have such.
pub const WINOGRAD: Optimization = Optimization {
    name: "winograd",
    about: "3 x 3 convolutions at stride 1 by tiles that multiply 2.25 or 4 times less, and round otherwise; else directly",
    rule: |_, model| {
        ours_on_the_cpu(model).unwrap_or_else(|| match model.spec.dtype {
            DType::F32 => Verdict::on(
                "each shape is timed once, directly and by tiles of 2 x 2 and 4 x 4, and takes what is quickest",
            ),
            dtype => Verdict::impossible(format!("the weights are {}; tiles are made of f32", dtype.as_str())),
        })
    },
};

/// Products of bf16 with bf16.
pub const BF16_PRODUCTS: Optimization = Optimization {
    name: "bf16-products",
    about: "bf16 weights are multiplied with activations rounded to bf16, sums in f32; else the weights are widened",
    rule: |machine, model| {
        if let Some(verdict) = ours_on_the_cpu(model) {
            return verdict;
        }
        if model.spec.dtype != DType::BF16 {
            return Verdict::impossible(format!("the weights are {}, not bf16", model.spec.dtype.as_str()));
        }
        // `bf16` is Arm's word
        if !machine.cpu.isa.iter().any(|isa| isa == "avx512bf16" || isa == "bf16") {
            return Verdict::impossible("the CPU has no instructions for products of bf16 that the kernels use");
        }
        match ceilings(machine, model, "bf16") {
            Some(ratio) => Verdict::when(
                ratio >= BF16_WORTH,
                format!(
                    "as measured, this CPU multiplies bf16 {ratio:.2} times as fast as f32; from {BF16_WORTH} on it pays"
                ),
            ),
            None => Verdict::off("this machine's ceilings for bf16 and f32 are not measured at so many threads"),
        }
    },
};

/// Weights in 8 bits.
pub const WEIGHTS_Q8: Optimization = Optimization {
    name: "weights-q8",
    about: "dense layers keep their weights in blocks of 32 with a scale, 8.5 bits each; results change",
    rule: |machine, model| {
        smaller_weights(machine, model, Q8_BITS, |native_fits, q8_fits| match (native_fits, q8_fits) {
            (true, _) => Err("fit as they are"),
            (_, false) => Err("do not fit in 8 bits either"),
            _ => Ok(()),
        })
    },
};

/// Weights in 4 bits.
pub const WEIGHTS_Q4: Optimization = Optimization {
    name: "weights-q4",
    about: "dense layers keep their weights in blocks of 32 with a scale, 4.5 bits each; results change visibly",
    rule: |machine, model| {
        smaller_weights(machine, model, Q4_BITS, |native_fits, q8_fits| match (native_fits, q8_fits) {
            (true, _) => Err("fit as they are"),
            (_, true) => Err("fit in 8 bits"),
            _ => Ok(()),
        })
    },
};

/// Fewer threads for decoding.
pub const DECODE_THREADS: Optimization = Optimization {
    name: "decode-threads",
    about: "tokens after the first are made on no more threads than it takes to read memory at full speed",
    rule: |machine, model| {
        if let Some(verdict) = ours_on_the_cpu(model) {
            return verdict;
        }
        if !model.generates {
            return Verdict::impossible("the cell makes no tokens one after another");
        }
        if model.threads < 2 {
            return Verdict::impossible("it runs on one thread");
        }
        let peaks = machine.peaks.as_ref();
        let read = |threads| peaks.and_then(|peaks| peaks.read_bandwidth(threads));
        let needed = read(1).zip(read(model.threads)).map(|(one, all)| (all / one).ceil().max(1.0) as u32);
        let value = Some(needed.unwrap_or(model.threads).min(model.threads - 1));
        let cache = last_level_cache(machine);
        let verdict = match (needed, model.weight_bytes) {
            (None, _) => Verdict::off(format!("read bandwidth is not measured at 1 and {} threads", model.threads)),
            (Some(needed), _) if needed >= model.threads => Verdict::off(format!(
                "as measured, it takes all {} threads to read memory at full speed",
                model.threads
            )),
            (Some(_), Some(weights)) if weights <= cache => Verdict::off(format!(
                "the weights ({}) may stay in the last-level cache ({}), which more threads read faster",
                bytes(weights as f64),
                bytes(cache as f64)
            )),
            (Some(needed), _) => {
                Verdict::on(format!("as measured, {needed} of {} threads read memory at full speed", model.threads))
            }
        };
        Verdict { value, ..verdict }
    },
};

/// Threads tied to CPUs.
pub const PINNED_THREADS: Optimization = Optimization {
    name: "pinned-threads",
    about: "each thread of the pool stays on one CPU (as --pin)",
    rule: |machine, model| {
        if let Some(verdict) = ours_on_the_cpu(model) {
            return verdict;
        }
        if !cfg!(target_os = "linux") {
            return Verdict::impossible("this system does not let threads be tied to CPUs");
        }
        if model.threads < 2 {
            return Verdict::impossible("it runs on one thread");
        }
        match machine.cpu.numa_nodes.unwrap_or(1) {
            nodes @ 2.. if model.threads == machine.cpu.usable_threads => Verdict::on(format!(
                "all CPUs of {nodes} NUMA nodes are used; threads stay beside the memory they touched"
            )),
            2.. => Verdict::off("only a part of the CPUs is used; the system finds free ones"),
            _ => Verdict::off("memory is equally far from all CPUs; the system moves threads away from other work"),
        }
    },
};

/// Those of every model whose weights are mostly of dense layers.
pub const COMMON: &[&Optimization] =
    &[&PACKED_WEIGHTS, &FUSED_ATTENTION, &BF16_PRODUCTS, &WEIGHTS_Q8, &WEIGHTS_Q4, &DECODE_THREADS, &PINNED_THREADS];

/// Pictures of a batch that are the same, encoded once.
pub const SHARED_PICTURES: Optimization = Optimization {
    name: "shared-pictures",
    about: "a picture that several questions of a batch are about goes through the vision tower once; else once for each",
    rule: |_, model| {
        ours_on_the_cpu(model).unwrap_or_else(|| {
            Verdict::on("to find that two pictures differ takes nanoseconds, to encode one milliseconds")
        })
    },
};

/// Why nothing of ours is to be chosen, unless our kernels run.
pub fn ours_on_the_cpu(model: &Model) -> Option<Verdict> {
    match (model.spec.engine, model.spec.device.is_cpu()) {
        (Engine::CandleTransformers, _) => Some(Verdict::impossible("the stock model is run as it is")),
        (_, false) => Some(Verdict::impossible("our kernels run on the CPU; on other devices candle's do")),
        _ => None,
    }
}

/// How many times as fast as f32 the machine computes in `dtype`.
fn ceilings(machine: &Machine, model: &Model, dtype: &str) -> Option<f64> {
    let peaks = machine.peaks.as_ref()?;
    Some(peaks.flops(dtype, model.threads)? / peaks.flops("f32", model.threads)?)
}

/// The rule of a form of weights of `bits` each; `needed` is told whether the weights fit in memory as they are and in 8
/// bits, and says why the form is not needed, if so.
fn smaller_weights(
    machine: &Machine,
    model: &Model,
    bits: f64,
    needed: impl FnOnce(bool, bool) -> Result<(), &'static str>,
) -> Verdict {
    if let Some(verdict) = ours_on_the_cpu(model) {
        return verdict;
    }
    if !matches!(model.spec.dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Verdict::impossible(format!("the weights are {}, no floats of our kernels", model.spec.dtype.as_str()));
    }
    let native_bits = 8.0 * model.spec.dtype.size_in_bytes() as f64;
    let gain = format!("{bits} bits read {:.1} times fewer bytes and round further", native_bits / bits);
    let (Some(weights), Some(available)) = (model.weight_bytes, machine.memory.available_bytes) else {
        return Verdict::off(format!("whether the weights fit in memory is not known; {gain}"));
    };
    let size = |bits: f64| weights as f64 * bits / native_bits;
    let fits = |bits: f64| size(bits) * PACKING <= available as f64;
    let sizes = format!("the weights ({})", bytes(weights as f64));
    let needed = needed(fits(native_bits), fits(Q8_BITS));
    let available = bytes(available as f64);
    match needed {
        Err(why) => Verdict::off(format!("{sizes} {why} in the {available} available; {gain}")),
        Ok(()) => Verdict::on(format!("{sizes} do not fit in the {available} available; {} would", bytes(size(bits)))),
    }
}

/// Bytes of the outermost cache, all instances together; 0 where no cache is known.
pub fn last_level_cache(machine: &Machine) -> u64 {
    let last = machine.cpu.caches.iter().max_by_key(|cache| cache.level);
    last.map_or(0, |cache| cache.bytes * u64::from(cache.instances))
}

/// The instruction set of the kernels, as a reader calls it.
fn widest(machine: &Machine) -> &'static str {
    let has = |name: &str| machine.cpu.isa.iter().any(|isa| isa == name);
    match () {
        () if has("avx512f") => "AVX-512",
        () if has("avx2") => "AVX2",
        () if has("neon") || machine.cpu.arch == "aarch64" => "NEON",
        () => "plain code",
    }
}

/// A number of bytes as people read it: `1.5 GB`.
pub fn bytes(n: f64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let (size, unit) = units.into_iter().find(|(size, _)| n >= *size).unwrap_or((1.0, "B"));
    format!("{:.1} {unit}", n / size)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;
    use serde_json::Value;

    use super::*;
    use crate::hardware::{BandwidthPeak, Cache, ComputePeak};

    fn spec(dtype: DType, engine: Engine) -> ModelSpec {
        ModelSpec {
            family: "llama".into(),
            class: "LlamaForCausalLM".into(),
            config: Value::Null,
            extra_configs: BTreeMap::new(),
            dtype,
            device: Device::Cpu,
            engine,
        }
    }

    /// 8 threads, of which one reads 10 GB/s and all `all`; bf16 `bf16` times as fast as f32.
    fn machine(all: f64, bf16: f64) -> Machine {
        let mut machine = crate::roofline::tests::machine();
        machine.cpu.isa = vec!["avx512f".into(), "avx512bf16".into()];
        machine.cpu.usable_threads = 8;
        machine.cpu.caches =
            vec![Cache { level: 3, kind: "unified".into(), bytes: 32 << 20, shared_by: 8, instances: 1 }];
        machine.memory.available_bytes = Some(10_000_000_000);
        let peaks = machine.peaks.as_mut().expect("the testing machine has peaks");
        let compute = |dtype: &str, flops| ComputePeak { dtype: dtype.into(), path: String::new(), threads: 8, flops };
        peaks.compute = vec![compute("f32", 1e11), compute("bf16", 1e11 * bf16)];
        let read = |threads, bytes_per_second| BandwidthPeak {
            kind: "read".into(),
            threads,
            bytes_per_second,
            array_bytes: 1 << 30,
        };
        peaks.bandwidth = vec![read(1, 10e9), read(8, all)];
        machine
    }

    fn plan(machine: &Machine, spec: &ModelSpec, weight_bytes: u64) -> Plan {
        let model = Model { spec, weight_bytes: Some(weight_bytes), threads: 8, generates: true };
        Plan::decide(COMMON, machine, &model)
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.decisions.iter().filter(|decision| decision.on).map(|decision| decision.name.as_str()).collect()
    }

    fn switches(text: &str) -> Vec<Switch> {
        text.split(',').map(|switch| switch.parse().expect("a switch")).collect()
    }

    #[test]
    fn rules_follow_the_machine_and_the_model() {
        let (f32, bf16) = (spec(DType::F32, Engine::Roofbench), spec(DType::BF16, Engine::Roofbench));
        let usual = plan(&machine(80e9, 2.0), &f32, 4_000_000_000);
        assert_eq!(names(&usual), ["packed-weights", "fused-attention"]);
        assert!(usual.get("bf16-products").is_some_and(|d| !d.applies && d.reason.contains("f32")));
        // a CPU that multiplies bf16 faster, and a memory that three threads read at full speed
        let plan = |machine, spec, bytes| plan(&machine, spec, bytes);
        let other = plan(machine(25e9, 2.0), &bf16, 4_000_000_000);
        assert_eq!(names(&other), ["packed-weights", "fused-attention", "bf16-products", "decode-threads"]);
        assert_eq!((other.value("decode-threads"), usual.value("decode-threads")), (Some(3), None));
        let slow = plan(machine(25e9, 0.5), &bf16, 1000);
        assert_eq!(names(&slow), ["packed-weights", "fused-attention"]);
        assert!(slow.get("decode-threads").is_some_and(|d| d.reason.contains("last-level cache")), "{slow:?}");
        // 10 GB are available
        for (weights, form) in [(9_000_000_000, None), (14_000_000_000, Some(8.5)), (40_000_000_000, Some(4.5))] {
            assert_eq!(plan(machine(80e9, 0.5), &f32, weights).weight_bits(), form, "{weights} bytes");
        }
    }

    #[test]
    fn nothing_is_chosen_for_the_stock_model() {
        let plan = plan(&machine(25e9, 2.0), &spec(DType::BF16, Engine::CandleTransformers), 1_000_000);
        assert!(plan.decisions.iter().all(|d| !d.applies && !d.on && !d.reason.is_empty()), "{plan:?}");
    }

    #[test]
    fn what_is_not_measured_is_left_off_with_a_reason() {
        let mut machine = machine(25e9, 2.0);
        (machine.peaks, machine.memory.available_bytes) = (None, None);
        let plan = plan(&machine, &spec(DType::BF16, Engine::Roofbench), 1_000_000);
        assert_eq!(names(&plan), ["packed-weights", "fused-attention"]);
        for name in ["bf16-products", "decode-threads", "weights-q8"] {
            let reason = &plan.get(name).expect("a decision").reason;
            assert!(reason.contains("not measured") || reason.contains("not known"), "{reason}");
        }
    }

    #[test]
    fn a_user_has_the_last_word() {
        let spec = spec(DType::F32, Engine::Roofbench);
        let usual = plan(&machine(80e9, 2.0), &spec, 14_000_000_000);
        assert_eq!(usual.weight_bits(), Some(Q8_BITS));
        let other =
            usual.clone().switched(&switches("+weights-q4,-fused-attention,-no-such"), "llama").expect("possible");
        assert_eq!(names(&other), ["packed-weights", "weights-q4"]);
        assert_eq!(other.get("fused-attention").map(|d| (d.on, d.by)), Some((false, DecidedBy::User)));
        let shown: Vec<String> = other.remarkable().iter().map(Switch::to_string).collect();
        assert_eq!(shown, ["-fused-attention", "+weights-q4"]);
        let refused = |text: &str| {
            let error = usual.clone().switched(&switches(text), "llama").expect_err("refused");
            error.to_string()
        };
        assert!(refused("+bf16-products").contains("does not apply to llama here: the weights are f32"));
        assert!(refused("+weights-q8,+weights-q4").contains("exclude each other"));
        assert!(refused("+class-token-only").contains("no such choice"));
        let error = check(&switches("+fused,-packed-weights"), COMMON).expect_err("refused").to_string();
        assert!(
            error.contains("no optimization `fused`") && error.contains("packed-weights, fused-attention"),
            "{error}"
        );
    }

    #[test]
    fn switches_are_written_as_they_are_read() {
        for text in ["+weights-q8", "-fused-attention"] {
            assert_eq!(text.parse::<Switch>().expect("a switch").to_string(), text);
        }
        assert_eq!("weights-q8".parse::<Switch>(), Err("expected +weights-q8 or -weights-q8: on or off".to_owned()));
    }
}
