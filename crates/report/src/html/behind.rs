//! Sections on what was measured behind the samples.

use roofbench_core::meters::Quantity;
use roofbench_core::profile::Operator;
use roofbench_core::sustain::{Sustained, Window};

use super::plot::{self, Curve};
use super::{Column, Page, escape, figure, name, note, table};
use crate::behind::{COLUMNS, drift, measurement, profile_line, sustained_line};
use crate::format;
use crate::row::Row;

/// Time, FLOPs and bytes of each operator, and of each in its layers.
pub(super) fn profiles(page: &mut Page, measured: &[&Row<'_>]) {
    let mut content = String::new();
    for row in measured {
        let Some((measurement, derived)) = measurement(row.record) else { continue };
        let Some(profile) = &measurement.profile else { continue };
        let kind = |place: usize| if (2..8).contains(&place) { Column::Number } else { Column::Word };
        let columns: Vec<(&str, Column)> = COLUMNS.iter().enumerate().map(|(i, name)| (*name, kind(i))).collect();
        let cells = |one: &Operator| profile_line(profile, one, &derived).map(|text| escape(&text)).to_vec();
        let sums = profile.by_operator();
        content.push_str(&format!("<h3>{}</h3>\n", name(&row.label)));
        content.push_str(&table(&columns, sums.iter().map(cells)));
        let layered = [&[("layer", Column::Key)][..], &columns].concat();
        let layers = profile.operators.iter().map(|one| {
            let layer = one.layer.as_deref().unwrap_or(format::NONE);
            std::iter::once(escape(layer)).chain(cells(one)).collect()
        });
        content.push_str(&format!("<details><summary>by layer</summary>{}</details>\n", table(&layered, layers)));
    }
    if !content.is_empty() {
        let text = note(
            "Calls of their own behind the samples, with the blocks' operations timed one by one; <i>other</i> is what lies \
             between them. An operation without weights counts to the layer of the one before it.",
        );
        page.section("profile", "Operators", &(text + &content));
    }
}

/// Speed, clock, temperature and power over a long run, each against what it was at first.
pub(super) fn long_runs(page: &mut Page, measured: &[&Row<'_>]) {
    let mut content = String::new();
    for row in measured {
        let Some((measurement, derived)) = measurement(row.record) else { continue };
        let Some(sustained) = &measurement.sustained else { continue };
        content.push_str(&format!("<h3>{}</h3>\n", name(&row.label)));
        content.push_str(&note(&escape(&sustained_line(sustained, &derived))));
        if drift(sustained, &derived).is_some() {
            content.push_str(&figure(plot::curves(
                "Speed and sensors over the long run, against the samples before it",
                &curves(sustained, derived.latency.median * 1e9),
            )));
        }
        for reading in &sustained.sensors {
            if let Quantity::Unavailable { reason } = &reading.quantity {
                content.push_str(&note(&escape(&format!("{}: {reason}", reading.metric))));
            }
        }
    }
    if !content.is_empty() {
        let text = note("100 % is the speed of the samples, and the first reading of each sensor.");
        page.section("sustained", "Long runs", &(text + &content));
    }
}

fn curves(sustained: &Sustained, burst_ns: f64) -> Vec<Curve> {
    let curve = |label: &str, of: &dyn Fn(&Window) -> Option<f64>| {
        let values = sustained.windows.iter().filter_map(|window| Some((window.end_ns as f64 * 1e-9, of(window)?)));
        Curve { label: label.to_owned(), points: values.collect() }
    };
    let first = |of: fn(&Window) -> Option<f64>| {
        let first = sustained.windows.iter().find_map(of).filter(|value| *value > 0.0);
        move |window: &Window| Some(of(window)? / first?)
    };
    let all = [
        curve("speed", &|window| Some(burst_ns / window.median_ns.max(1) as f64)),
        curve("clock", &first(|window| window.clock_mhz)),
        curve("temperature", &first(|window| window.temperature_c)),
        curve("power", &first(|window| window.power_w)),
    ];
    all.into_iter().filter(|curve| !curve.points.is_empty()).collect()
}
