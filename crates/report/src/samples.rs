//! Hand-made records for tests.

use serde_json::json;

use roofbench_core::cost::{Cost, PhaseCost};
use roofbench_core::record::{Outcome, Record};
use roofbench_core::session::Phase;

/// BERT in f32 on 2 threads, `count` calls of 40 ms: 2 GFLOP in 50 MB, half of the 100 GFLOP/s that the machine reaches.
pub(crate) fn bert(count: usize) -> Record {
    let value = json!({
        "schema_version": 1,
        "started_at": "2026-01-01T00:00:00Z",
        "subject": {
            "family": "bert", "modality": "text", "checkpoint": "google-bert/bert-base-uncased",
            "class": "BertForMaskedLM", "parameters": 109514298, "engine": "roofbench",
            "cell": {"name": "forward/b1/s128", "unit": "sequences", "batch": 1, "inputs": {"input_ids": {"tokens": [1, 128]}}},
        },
        "settings": {
            "requested": {"threads": "2"},
            "effective": {"device": "cpu", "dtype": "f32", "threads": "2", "weights": "synthetic:0"},
        },
        "outcome": {
            "status": "measured", "load_ns": 1000000000, "first_call_ns": 80000000, "warmup_ns": [41000000],
            "samples": vec![json!({"total_ns": 40000000, "phases": [["forward", 40000000]]}); count],
            "stop": "spread_settled",
            "cost": [{"phase": "forward", "repeats": 1, "cost":
                {"flops": 2000000000, "weight_bytes": 50000000, "activation_bytes": 0, "kv_bytes": 0}}],
            "readings": {"steady": [
                {"metric": "peak_rss", "unit": "B", "scope": "process", "sensor": "VmHWM",
                 "provenance": "measured", "value": 536870912.0},
            ]},
        },
        "warnings": [{"kind": "load", "message": "load average 3.1 on 2 CPUs"}],
        "machine": {
            "cpu": {"model": "Testing CPU", "arch": "x86_64", "threads": 2, "usable_threads": 2, "caches": [], "isa": ["avx2"]},
            "memory": {"total_bytes": 17179869184u64},
            "gpus": [], "os": {"name": "Testing"},
            "peaks": {
                "measured_at": "2026-01-01T00:00:00Z",
                "compute": [{"dtype": "f32", "path": "fma", "threads": 2, "flops": 100e9}],
                "bandwidth": [{"kind": "read", "threads": 2, "bytes_per_second": 10e9, "array_bytes": 1073741824}],
            },
        },
        "build": {"version": "0.1.0", "profile": "release", "target": "x86_64-unknown-linux-gnu", "rustc": "rustc 1.95.0",
                  "features": [], "target_features": []},
    });
    serde_json::from_value(value).unwrap()
}

/// ViT, otherwise as [`bert`].
pub(crate) fn vit(count: usize) -> Record {
    let mut record = bert(count);
    let subject = &mut record.subject;
    (subject.family, subject.cell.name, subject.cell.unit) = ("vit".into(), "forward/b1".into(), "images".into());
    (subject.checkpoint, subject.class) = ("google/vit-base-patch16-224".into(), "ViTForImageClassification".into());
    record
}

/// Llama: prefill of 100 ms, two steps of 25 ms, with an energy meter.
pub(crate) fn llama() -> Record {
    let mut record = bert(10);
    let subject = &mut record.subject;
    (subject.family, subject.cell.name, subject.cell.unit) =
        ("llama".into(), "generate/b1/p128/n3".into(), "tokens".into());
    subject.cell.new_tokens = Some(3);
    let measured = json!({
        "status": "measured", "load_ns": 1000000000, "first_call_ns": 200000000, "warmup_ns": [150000000],
        "samples": vec![json!({"total_ns": 150000000,
            "phases": [["prefill", 100000000], ["decode", 25000000], ["decode", 25000000]]}); 10],
        "stop": "max_time",
        "cost": [
            {"phase": "prefill", "repeats": 1, "cost":
                {"flops": 5000000000u64, "weight_bytes": 200000000, "activation_bytes": 1000000, "kv_bytes": 0}},
            {"phase": "decode", "repeats": 2, "cost":
                {"flops": 200000000, "weight_bytes": 400000000, "activation_bytes": 0, "kv_bytes": 1000000}},
        ],
        "readings": {"steady": [
            {"metric": "peak_rss", "unit": "B", "scope": "process", "sensor": "VmHWM",
             "provenance": "measured", "value": 1073741824.0},
            {"metric": "energy", "unit": "J", "scope": "device", "sensor": "RAPL package-0",
             "provenance": "measured", "value": 60.0},
        ]},
    });
    record.outcome = serde_json::from_value(measured).unwrap();
    record
}

/// BERT with a profile of 12 products a layer, and a long run that ends a quarter slower.
pub(crate) fn behind() -> Record {
    let mut record = bert(10);
    let Outcome::Measured(measurement) = &mut record.outcome else { unreachable!("it is measured") };
    let operator = |operator: &str, layer: Option<&str>, count: u64, ns: u64, flops: u64| {
        json!({"phase": "forward", "operator": operator, "layer": layer, "count": count, "ns": ns,
               "cost": {"flops": flops, "weight_bytes": flops / 40, "activation_bytes": 0, "kv_bytes": 0}})
    };
    let profile = json!({"calls": 2, "total_ns": 40000000, "operators": [
        operator("linear", Some("encoder.layer.0"), 12, 10000000, 800000000),
        operator("linear", Some("encoder.layer.1"), 12, 10000000, 800000000),
        operator("other", None, 1, 20000000, 0),
    ]});
    measurement.profile = serde_json::from_value(profile).unwrap();
    let window = |i: u64| {
        json!({"start_ns": i * 1000000000, "end_ns": (i + 1) * 1000000000, "calls": 20,
               "median_ns": if i < 9 { 40000000 } else { 50000000 }, "clock_mhz": 3000.0 - 10.0 * i as f64,
               "temperature_c": null, "power_w": null})
    };
    let sustained = json!({"asked_ns": 12000000000u64, "windows": (0..12).map(window).collect::<Vec<_>>(), "sensors": [
        {"metric": "clock", "unit": "MHz", "scope": "machine", "sensor": "cpufreq", "provenance": "measured", "value": 2945.0},
        {"metric": "temperature", "unit": "°C", "scope": "machine", "sensor": "none", "provenance": "unavailable",
         "reason": "no temperature sensor"},
    ]});
    measurement.sustained = serde_json::from_value(sustained).unwrap();
    record
}

/// LLaVA: a vision tower of 25 ms and a projector of 5 ms before the prefill of [`llama`].
pub(crate) fn llava() -> Record {
    let mut record = llama();
    record.subject.family = "llava".into();
    let Outcome::Measured(measurement) = &mut record.outcome else { unreachable!("it is measured") };
    let before = [(Phase::Vision, 25_000_000), (Phase::Projector, 5_000_000)];
    for sample in &mut measurement.samples {
        sample.phases.splice(0..0, before);
        sample.total_ns += 30_000_000;
    }
    let cost = Cost { flops: 1_000_000_000, weight_bytes: 10_000_000, ..Cost::default() };
    measurement.cost.splice(0..0, before.map(|(phase, _)| PhaseCost { phase, repeats: 1, cost }));
    record
}

/// Every text of a measured record turned against the page that shows it.
pub(crate) fn hostile() -> Record {
    let text = || "<script>alert(\"1\")</script>,\n|`'&".to_owned();
    let mut record = bert(10);
    let subject = &mut record.subject;
    (subject.family, subject.checkpoint, subject.class) = (text(), text(), text());
    (subject.cell.name, subject.cell.unit) = (text(), text());
    record.started_at = text();
    record.settings.effective.insert("weights".into(), text());
    record.warnings[0].kind = text();
    record.warnings[0].message = text();
    record.machine.cpu.model = text();
    record.machine.cpu.isa = vec![text()];
    record.machine.cpu.governor = Some(text());
    record.machine.cpu.virtualization = Some(text());
    record.machine.os.name = text();
    record.build.version = text();
    record.build.rustc = text();
    record.build.commit = Some(text());
    record.build.features = vec![text()];
    let peaks = record.machine.peaks.as_mut().unwrap();
    (peaks.compute[0].path, peaks.bandwidth[0].array_bytes) = (text(), 1);
    let Outcome::Measured(measurement) = &mut record.outcome else { unreachable!("it is measured") };
    measurement.readings.get_mut("steady").unwrap()[0].sensor = text();
    record
}
