//! Where the time of a call goes, operation by operation: what a profile is, and how it follows from timed operations.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cost::Cost;
use crate::session::Phase;

/// Operator of the time in which no operation of a block ran: candle's own operations, and what a model does around them.
pub const OTHER: &str = "other";

/// Where the time of a call goes. It comes from calls of its own after the samples, whose times it leaves alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Profile {
    /// Calls that were profiled; times are the mean of them.
    pub calls: u64,
    /// One call, with what timing its operations takes.
    pub total_ns: u64,
    /// What ran in a call, by phase, operator and layer, in order of appearance.
    pub operators: Vec<Operator>,
}

/// All operations of a kind in a phase of a call, in one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Operator {
    /// The phase, all its repeats together.
    pub phase: Phase,
    /// What it is: `linear`, `attention`; [`OTHER`] for what lies between.
    pub operator: String,
    /// The layer by the names of its weights (`encoder.layer.3`), where they have one. An operation without weights is
    /// counted to the layer of the one before.
    pub layer: Option<String>,
    /// How often in a call.
    pub count: u64,
    /// Their time in a call.
    pub ns: u64,
    /// Their FLOPs and bytes in a call, as they ran; keys and values of earlier tokens are not among the bytes.
    pub cost: Cost,
}

/// A timed operation of a call. Times are from the start of the call.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// What it is.
    pub operator: String,
    /// Name of its weights.
    pub name: Option<String>,
    /// When it began.
    pub start_ns: u64,
    /// How long it took.
    pub ns: u64,
    /// What it did.
    pub cost: Cost,
}

/// A call with its operations in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProfiledCall {
    /// Its time.
    pub total_ns: u64,
    /// Where each phase ended.
    pub ends: Vec<(Phase, u64)>,
    /// What ran.
    pub operations: Vec<Operation>,
}

/// The layer in a weight's name: up to its first number, or all of it.
fn layer(name: &str) -> &str {
    let mut end = 0;
    for part in name.split('.') {
        end += part.len();
        if part.bytes().all(|byte| byte.is_ascii_digit()) {
            return &name[..end];
        }
        end += 1;
    }
    name
}

impl ProfiledCall {
    /// Operations with their phase and layer, those of each phase followed by what lay between them.
    fn placed(&self) -> Vec<(Phase, Option<String>, &str, u64, Cost)> {
        let mut placed = Vec::new();
        let mut operations = self.operations.iter().peekable();
        let (mut from, mut last) = (0, None::<String>);
        for &(phase, end) in &self.ends {
            let mut within = 0;
            while let Some(operation) = operations.next_if(|operation| operation.start_ns < end) {
                if let Some(name) = &operation.name {
                    last = Some(layer(name).to_owned());
                }
                within += operation.ns;
                placed.push((phase, last.clone(), operation.operator.as_str(), operation.ns, operation.cost));
            }
            placed.push((phase, None, OTHER, (end - from).saturating_sub(within), Cost::default()));
            from = end;
        }
        placed
    }

    /// The call as Chrome, Perfetto and others show it: JSON in the Trace Event Format, phases above operations.
    pub fn chrome_trace(&self) -> Value {
        let micros = |ns: u64| ns as f64 / 1e3;
        let event = |thread: u64, name: &str, category: &str, start: u64, ns: u64, arguments: Value| {
            json!({
                "ph": "X", "pid": 1, "tid": thread, "name": name, "cat": category,
                "ts": micros(start), "dur": micros(ns), "args": arguments,
            })
        };
        let thread = |id: u64, name: &str| json!({"ph": "M", "pid": 1, "tid": id, "name": "thread_name", "args": {"name": name}});
        let mut events = vec![thread(1, "phases"), thread(2, "operations")];
        let mut from = 0;
        for (phase, end) in &self.ends {
            events.push(event(1, json!(phase).as_str().unwrap_or_default(), "phase", from, end - from, json!({})));
            from = *end;
        }
        for operation in &self.operations {
            let Operation { operator, name, start_ns, ns, cost } = operation;
            let arguments = json!({"operator": operator, "flops": cost.flops, "bytes": cost.bytes()});
            events.push(event(2, name.as_deref().unwrap_or(operator), operator, *start_ns, *ns, arguments));
        }
        json!({ "traceEvents": events, "displayTimeUnit": "ms" })
    }
}

impl Profile {
    /// The mean of `calls`; `None` when there are none.
    pub fn of(calls: &[ProfiledCall]) -> Option<Self> {
        let count = u64::try_from(calls.len()).ok().filter(|&count| count > 0)?;
        let mut operators: Vec<Operator> = Vec::new();
        for call in calls {
            for (phase, layer, operator, ns, cost) in call.placed() {
                let same = |one: &&mut Operator| one.phase == phase && one.operator == operator && one.layer == layer;
                match operators.iter_mut().find(same) {
                    Some(one) => {
                        one.count += 1;
                        one.ns += ns;
                        one.cost += cost;
                    }
                    None => {
                        operators.push(Operator { phase, operator: operator.to_owned(), layer, count: 1, ns, cost })
                    }
                }
            }
        }
        for one in &mut operators {
            one.count /= count;
            one.ns /= count;
            let Cost { flops, weight_bytes, activation_bytes, kv_bytes } = one.cost;
            let [flops, weight_bytes, activation_bytes, kv_bytes] =
                [flops, weight_bytes, activation_bytes, kv_bytes].map(|sum| sum / count);
            one.cost = Cost { flops, weight_bytes, activation_bytes, kv_bytes };
        }
        Some(Self { calls: count, total_ns: calls.iter().map(|call| call.total_ns).sum::<u64>() / count, operators })
    }

    /// The same with the layers of each phase and operator together, what takes longest first.
    pub fn by_operator(&self) -> Vec<Operator> {
        let mut sums: Vec<Operator> = Vec::new();
        for one in &self.operators {
            match sums.iter_mut().find(|sum| (sum.phase, &sum.operator) == (one.phase, &one.operator)) {
                Some(sum) => {
                    sum.count += one.count;
                    sum.ns += one.ns;
                    sum.cost += one.cost;
                }
                None => sums.push(Operator { layer: None, ..one.clone() }),
            }
        }
        sums.sort_by_key(|sum| std::cmp::Reverse(sum.ns));
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(operator: &str, name: Option<&str>, start_ns: u64, ns: u64, flops: u64) -> Operation {
        let cost = Cost { flops, weight_bytes: 2 * flops, ..Cost::default() };
        Operation { operator: operator.into(), name: name.map(str::to_owned), start_ns, ns, cost }
    }

    /// A prefill of 100 ns and a decode of 50.
    fn call() -> ProfiledCall {
        ProfiledCall {
            total_ns: 155,
            ends: vec![(Phase::Prefill, 100), (Phase::Decode, 150)],
            operations: vec![
                operation("embedding", None, 0, 5, 0),
                operation("linear", Some("layers.0.mlp.up"), 10, 30, 60),
                operation("attention", None, 40, 20, 10),
                operation("linear", Some("layers.1.mlp.up"), 60, 30, 60),
                operation("linear", Some("layers.0.mlp.up"), 105, 20, 6),
            ],
        }
    }

    #[test]
    fn layers_are_up_to_the_first_number() {
        assert_eq!(layer("encoder.layer.3.output.dense"), "encoder.layer.3");
        assert_eq!((layer("pooler.dense"), layer("h.11"), layer("")), ("pooler.dense", "h.11", ""));
        assert_eq!(layer("stages.0.layers.2.conv"), "stages.0");
    }

    #[test]
    fn operations_add_up_to_the_phases() {
        let profile = Profile::of(&[call()]).unwrap();
        let sum = |phase| profile.operators.iter().filter(|one| one.phase == phase).map(|one| one.ns).sum::<u64>();
        assert_eq!((sum(Phase::Prefill), sum(Phase::Decode)), (100, 50));
        let of = |operator: &str, layer: Option<&str>| {
            let found = profile.operators.iter().find(|one| one.operator == operator && one.layer.as_deref() == layer);
            found.map(|one| (one.count, one.ns, one.cost.flops))
        };
        assert_eq!(of("embedding", None), Some((1, 5, 0)));
        // without weights: of the layer before
        assert_eq!(of("attention", Some("layers.0")), Some((1, 20, 10)));
        assert_eq!(of("linear", Some("layers.1")), Some((1, 30, 60)));
        assert_eq!(of(OTHER, None), Some((1, 15, 0)));
    }

    #[test]
    fn calls_are_averaged_and_layers_added() {
        let slower = ProfiledCall { total_ns: 195, ..call() };
        let profile = Profile::of(&[call(), slower]).unwrap();
        assert_eq!((profile.calls, profile.total_ns), (2, 175));
        let operators = profile.by_operator();
        assert_eq!((operators[0].operator.as_str(), operators[0].count, operators[0].ns), ("linear", 2, 60));
        assert_eq!((operators[0].cost.flops, operators[0].cost.weight_bytes), (120, 240));
        assert!(operators.windows(2).all(|pair| pair[0].ns >= pair[1].ns));
        assert_eq!(Profile::of(&[]), None);
    }

    #[test]
    fn a_trace_has_the_phases_above_the_operations() {
        let trace = call().chrome_trace();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 2 + 2 + 5);
        assert_eq!(
            (&events[3]["name"], &events[3]["ts"], &events[3]["dur"]),
            (&json!("decode"), &json!(0.1), &json!(0.05))
        );
        assert_eq!((&events[5]["name"], &events[5]["args"]["flops"]), (&json!("layers.0.mlp.up"), &json!(60)));
    }
}
