//! The report as one HTML file: no scripts, nothing fetched, light and dark, fit for a phone and for paper.

mod behind;
mod plot;

use roofbench_core::meters::Quantity;
use roofbench_core::metrics::{self, Metric};
use roofbench_core::record::Record;
use roofbench_core::roofline::{Bound, Ceiling};

use self::plot::{Bar, Point, Strip};
use crate::coverage::{State, coverage};
use crate::format;
use crate::markdown::{machine_facts, machines};
use crate::row::{Row, Rows};

/// What the glossary of the page explains.
const GLOSSARY: [Metric; 12] = [
    metrics::LATENCY,
    metrics::THROUGHPUT,
    metrics::TTFT,
    metrics::TPOT,
    metrics::P50,
    metrics::MAD,
    metrics::FLOPS,
    metrics::INTENSITY,
    metrics::MFU,
    metrics::MBU,
    metrics::ATTAINED,
    metrics::ENERGY_PER_UNIT,
];

/// The whole page: results, roofline of each machine, latencies, throughput, memory, energy, coverage of `families`,
/// warnings, machines and builds.
pub fn html(records: &[Record], families: &[&str]) -> String {
    let rows = Rows::of(records);
    let measured = rows.measured();
    let mut page = Page::default();
    if !measured.is_empty() {
        results(&mut page, &measured);
        rooflines(&mut page, &rows.rows);
        latencies(&mut page, &measured);
        throughput(&mut page, &measured);
        memory(&mut page, &measured);
        energy(&mut page, &measured);
        behind::profiles(&mut page, &measured);
        behind::long_runs(&mut page, &measured);
    }
    coverage_section(&mut page, records, families);
    notes(&mut page, &rows.notes());
    machine_section(&mut page, &rows.rows);
    if !measured.is_empty() {
        glossary(&mut page);
    }
    page.finish(&lead(&rows, measured.len()))
}

/// Text in HTML, in an element or in a quoted attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The name of a cell, which may break after each slash.
fn name(label: &str) -> String {
    escape(label).replace('/', "/<wbr>")
}

/// Sections in order; the navigation follows from them.
#[derive(Default)]
struct Page {
    body: String,
    navigation: String,
}

impl Page {
    /// A section; `content` is HTML already.
    fn section(&mut self, id: &str, title: &str, content: &str) {
        self.navigation.push_str(&format!("<a href=\"#{id}\">{title}</a>\n"));
        self.body.push_str(&format!("<section id=\"{id}\">\n<h2>{title}</h2>\n{content}\n</section>\n"));
    }

    fn finish(self, lead: &str) -> String {
        let (style, navigation, body) = (include_str!("style.css"), self.navigation, self.body);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>roofbench report</title>\n\
             <style>\n{style}</style>\n</head>\n<body>\n<header>\n<h1>roofbench report</h1>\n\
             <p class=\"lead\">{lead}</p>\n<nav>\n{navigation}</nav>\n</header>\n<main>\n{body}</main>\n</body>\n</html>\n"
        )
    }
}

fn lead(rows: &Rows<'_>, measured: usize) -> String {
    let mut dates: Vec<&str> = rows.rows.iter().map(|row| row.record.started_at.get(..10).unwrap_or("?")).collect();
    dates.sort_unstable();
    let when = match (dates.first(), dates.last()) {
        (Some(first), Some(last)) if first == last => format!(", {first}"),
        (Some(first), Some(last)) => format!(", {first} to {last}"),
        _ => String::new(),
    };
    let mut cpus: Vec<&str> = machines(&rows.rows).iter().map(|machine| machine.cpu.model.as_str()).collect();
    cpus.dedup();
    let on = if cpus.is_empty() { String::new() } else { format!(" on {}", cpus.join(" and ")) };
    let common = if rows.common.is_empty() { String::new() } else { format!(" ({})", rows.common) };
    escape(&format!("{measured} of {} cells measured{on}{when}{common}", rows.rows.len()))
}

/// How a column is set.
#[derive(Clone, Copy, PartialEq)]
enum Column {
    /// The name of the row.
    Key,
    /// A word.
    Word,
    /// Text of some length.
    Text,
    /// A number.
    Number,
}

/// A table in a box that scrolls; cells are HTML already.
fn table(columns: &[(&str, Column)], rows: impl Iterator<Item = Vec<String>>) -> String {
    let class = |column: Column| match column {
        Column::Key => " class=\"k\"",
        Column::Word => " class=\"p\"",
        Column::Text => " class=\"w\"",
        Column::Number => " class=\"n\"",
    };
    let header: String = columns.iter().map(|(name, column)| format!("<th{}>{name}</th>", class(*column))).collect();
    let body: String = rows
        .map(|row| {
            let fields =
                row.iter().zip(columns).map(|(field, (_, column))| format!("<td{}>{field}</td>", class(*column)));
            format!("<tr>{}</tr>\n", fields.collect::<String>())
        })
        .collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
    )
}

/// A plot in a box that scrolls, or why it could not be drawn.
fn figure(plot: plot::PlotResult<String>) -> String {
    match plot {
        Ok(svg) => format!("<figure><div class=\"scroll\" tabindex=\"0\">{svg}</div></figure>"),
        Err(error) => format!("<p class=\"note\">The plot could not be drawn: {}</p>", escape(&error.to_string())),
    }
}

fn note(text: &str) -> String {
    format!("<p class=\"note\">{text}</p>")
}

fn results(page: &mut Page, measured: &[&Row<'_>]) {
    let generates = measured.iter().any(|row| row.derived.as_ref().is_some_and(|d| d.ttft.is_some()));
    let mut columns = vec![
        ("cell", Column::Key),
        ("latency p50", Column::Number),
        ("p90", Column::Number),
        ("samples", Column::Number),
        ("throughput", Column::Number),
    ];
    if generates {
        columns.extend([("TTFT", Column::Number), ("TPOT", Column::Number)]);
    }
    columns.extend([
        ("first call", Column::Number),
        ("load", Column::Number),
        ("peak memory", Column::Number),
        ("weights", Column::Word),
    ]);
    let lines = measured.iter().map(|row| {
        let derived = row.derived.as_ref();
        let number = |value: Option<f64>| value.map_or_else(|| format::NONE.to_owned(), format::seconds);
        let mut line = vec![
            row.latency(),
            number(derived.and_then(|d| d.latency.p90)),
            derived.map_or(0, |d| d.latency.count).to_string(),
            row.throughput(),
        ];
        if generates {
            line.extend([row.ttft(), row.tpot()]);
        }
        line.extend([
            number(derived.map(|d| d.first_call)),
            number(derived.map(|d| d.load)),
            row.memory(),
            row.record.settings.weights().unwrap_or(format::NONE).to_owned(),
        ]);
        std::iter::once(name(&row.label)).chain(line.iter().map(|field| escape(field))).collect()
    });
    let text = note("Latency is the median of all raw samples with its 95 % bootstrap interval; nothing is dropped.");
    page.section("results", "Results", &(text + &table(&columns, lines)));
}

fn rooflines(page: &mut Page, rows: &[Row<'_>]) {
    let machines = machines(rows);
    let mut content = String::new();
    let mut number = 0;
    for machine in &machines {
        let of_machine = rows.iter().filter(|row| row.record.machine.name() == machine.name());
        let (mut ceilings, mut points, mut lines): (Vec<Ceiling>, Vec<Point>, Vec<Vec<String>>) = Default::default();
        for row in of_machine {
            let Some(derived) = &row.derived else { continue };
            for (result, shown) in derived.phases.iter().zip(row.phases()) {
                let mut id = format::NONE.to_owned();
                if let (Ok(position), Ok(ceiling)) = (&result.position, &derived.ceiling) {
                    number += 1;
                    id = format!("<span class=\"id\">{number}</span>");
                    if !ceilings.contains(ceiling) {
                        ceilings.push(ceiling.clone());
                    }
                    points.push(Point {
                        number,
                        label: if derived.phases.len() > 1 {
                            format!("{} {}", row.label, shown.phase)
                        } else {
                            row.label.clone()
                        },
                        intensity: position.intensity,
                        flops: position.achieved,
                        memory_bound: position.bound == Bound::Memory,
                    });
                }
                let attained = result.position.as_ref().map_or_else(
                    |_| format::NONE.to_owned(),
                    |p| {
                        let width = (p.fraction * 100.0).clamp(0.0, 100.0);
                        format!("{}<span class=\"bar\"><i style=\"width:{width:.0}%\"></i></span>", shown.attained)
                    },
                );
                let bound = result.position.as_ref().map_or_else(
                    |_| format::NONE.to_owned(),
                    |p| format!("<span class=\"tag {0}\">{0}</span>", p.bound),
                );
                lines.push(vec![
                    id,
                    name(&row.label),
                    shown.phase.to_owned(),
                    shown.time,
                    shown.share,
                    shown.bytes,
                    escape(&shown.energy),
                    shown.flops,
                    shown.bandwidth,
                    shown.intensity,
                    shown.mfu,
                    shown.mbu,
                    attained,
                    bound,
                ]);
            }
        }
        if machines.len() > 1 {
            content.push_str(&format!("<h3>{}</h3>\n", escape(&machine.cpu.model)));
        }
        if points.is_empty() {
            content.push_str(&note("No phase can be placed under a roofline; the reasons are under Notes."));
        } else {
            content.push_str(&figure(plot::roofline("Roofline: FLOP/s over arithmetic intensity", &ceilings, &points)));
        }
        let columns = [
            ("#", Column::Word),
            ("cell", Column::Key),
            ("phase", Column::Word),
            ("time", Column::Number),
            ("share", Column::Number),
            ("bytes", Column::Number),
            ("energy", Column::Number),
            ("FLOP/s", Column::Number),
            ("B/s", Column::Number),
            ("FLOP/B", Column::Number),
            ("MFU", Column::Number),
            ("MBU", Column::Number),
            ("% of roofline", Column::Number),
            ("bound", Column::Word),
        ];
        content.push_str(&table(&columns, lines.into_iter()));
    }
    let text = note(
        "Lines are ceilings measured on the machine; each mark is a phase of a cell, listed below the plot. \
         <span class=\"compute-bound\">Green</span> is compute-bound, <span class=\"memory-bound\">orange</span> memory-bound.",
    );
    page.section("roofline", "Roofline", &(text + &content));
}

fn latencies(page: &mut Page, measured: &[&Row<'_>]) {
    let strips: Vec<Strip> = measured
        .iter()
        .filter_map(|row| {
            let latency = &row.derived.as_ref()?.latency;
            let roofbench_core::record::Outcome::Measured(measurement) = &row.record.outcome else { return None };
            let ratio = |ns: u64| ns as f64 * 1e-9 / latency.median;
            Some(Strip {
                label: row.label.clone(),
                text: format!("{}, n = {}", format::seconds(latency.median), latency.count),
                ratios: measurement.samples.iter().map(|sample| ratio(sample.total_ns)).collect(),
                outliers: latency.outliers.clone(),
                mad: latency.mad / latency.median,
            })
        })
        .collect();
    let text = note(
        "Every sample of a cell against the cell's own median. Boxes span median ± MAD; orange rings are flagged outliers, \
         which stay in all numbers. What lies beyond the scale is drawn at its edge.",
    );
    let plot = plot::strips("Spread of the latency samples of each cell", &strips);
    page.section("latency", "Latency distribution", &(text + &figure(plot)));
}

fn throughput(page: &mut Page, measured: &[&Row<'_>]) {
    let mut units: Vec<&str> = Vec::new();
    for derived in measured.iter().filter_map(|row| row.derived.as_ref()) {
        if !units.contains(&derived.unit.as_str()) {
            units.push(&derived.unit);
        }
    }
    let mut content = note(metrics::THROUGHPUT.text);
    for unit in units {
        let of_unit =
            measured.iter().filter_map(|row| Some((row, row.derived.as_ref()?))).filter(|(_, d)| d.unit == unit);
        let bars: Vec<Bar> = of_unit
            .map(|(row, derived)| Bar {
                label: row.label.clone(),
                value: derived.throughput.value,
                text: format!("{} /s", format::significant(derived.throughput.value)),
            })
            .collect();
        content.push_str(&format!("<h3>{} per second</h3>\n", escape(unit)));
        content.push_str(&figure(plot::bars(&format!("Throughput in {unit} per second"), &bars)));
    }
    page.section("throughput", "Throughput", &content);
}

/// Bars of what `quantity` gives, and the reasons for what is missing, each once.
fn quantity_bars<'a>(
    name: &str,
    quantities: impl Iterator<Item = (String, &'a Quantity)>,
    show: impl Fn(f64) -> String,
) -> String {
    let (mut bars, mut reasons): (Vec<Bar>, Vec<&str>) = Default::default();
    for (label, quantity) in quantities {
        match (quantity, quantity.value()) {
            (_, Some(value)) => bars.push(Bar { label, value, text: format::quantity(quantity, &show) }),
            (Quantity::Unavailable { reason }, None) if !reasons.contains(&reason.as_str()) => reasons.push(reason),
            _ => {}
        }
    }
    let plot = if bars.is_empty() { String::new() } else { figure(plot::bars(name, &bars)) };
    let reasons: String =
        reasons.into_iter().map(|reason| note(&format!("Not measured: {}", escape(reason)))).collect();
    plot + &reasons
}

fn memory(page: &mut Page, measured: &[&Row<'_>]) {
    let derived = || measured.iter().filter_map(|row| Some((row.label.clone(), row.derived.as_ref()?)));
    let host = derived().map(|(label, d)| (label, &d.peak_rss));
    let mut content = note("Largest resident memory of the process over load, first call and steady state.");
    content.push_str(&quantity_bars("Peak resident memory", host, format::bytes));
    if derived().any(|(_, d)| d.device_peak.value().is_some()) {
        content.push_str("<h3>on the device</h3>\n");
        let device = derived().map(|(label, d)| (label, &d.device_peak));
        content.push_str(&quantity_bars("Peak device memory", device, format::bytes));
    }
    page.section("memory", "Memory", &content);
}

fn energy(page: &mut Page, measured: &[&Row<'_>]) {
    let all = || {
        let rows = measured.iter().filter_map(|row| Some((row, row.derived.as_ref()?)));
        rows.flat_map(|(row, derived)| derived.energy.iter().map(move |energy| (row, derived.unit.as_str(), energy)))
    };
    // bars compare only what the same sensor saw for the same unit
    let mut groups: Vec<(&str, &str)> = Vec::new();
    for (_, unit, energy) in all() {
        let group = (energy.sensor.as_str(), unit);
        if energy.per_unit.value().is_some() && !groups.contains(&group) {
            groups.push(group);
        }
    }
    let mut content =
        note("Energy of the steady state over the units worked off in it, idle power included; ≈ marks an estimate.");
    for (sensor, unit) in groups {
        let one = unit.strip_suffix('s').unwrap_or(unit);
        content.push_str(&format!("<h3>joules per {}, {}</h3>\n", escape(one), escape(sensor)));
        let of_group = all().filter(|(_, u, e)| (e.sensor.as_str(), *u) == (sensor, unit));
        let bars = of_group.map(|(row, _, energy)| (row.label.clone(), &energy.per_unit));
        content.push_str(&quantity_bars(&format!("Joules per {one}"), bars, |value| format::si(value, "J")));
    }
    let missing = all().filter(|(_, _, energy)| energy.per_unit.value().is_none());
    content.push_str(&quantity_bars("", missing.map(|(row, _, energy)| (row.label.clone(), &energy.per_unit)), |_| {
        String::new()
    }));
    page.section("energy", "Energy", &content);
}

fn coverage_section(page: &mut Page, records: &[Record], families: &[&str]) {
    let coverage = coverage(records, families);
    let count = coverage.iter().filter(|row| row.state == State::Measured).count();
    let lines = coverage.iter().map(|row| {
        let class = row.state.to_string().replace(' ', "-");
        vec![escape(&row.family), format!("<span class=\"tag {class}\">{}</span>", row.state), escape(&row.detail())]
    });
    let columns = [("family", Column::Key), ("state", Column::Word), ("cells", Column::Text)];
    let text = note(&format!("{count} of {} families measured.", coverage.len()));
    page.section("coverage", "Coverage", &(text + &table(&columns, lines)));
}

fn notes(page: &mut Page, notes: &[String]) {
    let list: String = notes.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect();
    let content =
        if notes.is_empty() { note("No warnings, and no number is missing.") } else { format!("<ul>\n{list}</ul>") };
    page.section("notes", "Notes", &content);
}

fn definitions<'a>(pairs: impl Iterator<Item = (&'a str, String)>) -> String {
    let pairs: String = pairs.map(|(name, text)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(&text))).collect();
    format!("<dl>\n{pairs}</dl>")
}

fn machine_section(page: &mut Page, rows: &[Row<'_>]) {
    let mut content = String::new();
    for machine in machines(rows) {
        content.push_str(&definitions(machine_facts(machine).into_iter()));
    }
    let mut builds = Vec::new();
    for row in rows {
        let build = &row.record.build;
        if !builds.contains(&build) {
            builds.push(build);
        }
    }
    for build in builds {
        let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        content.push_str("<h3>build</h3>\n");
        let facts = [
            ("roofbench", build.version.clone()),
            ("commit", build.commit.clone().unwrap_or_else(|| "unknown".to_owned())),
            ("profile", build.profile.clone()),
            ("target", build.target.clone()),
            ("compiler", build.rustc.clone()),
            ("features", list(&build.features)),
            ("assumed CPU features", list(&build.target_features)),
        ];
        content.push_str(&definitions(facts.into_iter()));
    }
    if !content.is_empty() {
        page.section("machine", "Machine and build", &content);
    }
}

fn glossary(page: &mut Page) {
    let words = GLOSSARY.iter().map(|metric| (metric.label, metric.text.to_owned()));
    page.section("words", "Words", &definitions(words));
}

#[cfg(test)]
mod tests {
    use roofbench_core::record::Outcome;

    use super::*;
    use crate::samples;

    /// Every element is closed in order; attributes and text hold no bare `<`.
    fn assert_well_formed(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = page;
        while let Some(start) = rest.find('<') {
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            assert!(!tag.contains('<'), "{tag}");
            let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap_or_default();
            match tag {
                _ if tag.starts_with('!') || tag.ends_with('/') || ["meta", "wbr"].contains(&name) => {}
                _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "</{name}>"),
                _ => open.push(name),
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "{open:?}");
    }

    fn section<'a>(page: &'a str, id: &str) -> &'a str {
        let start = page.find(&format!("<section id=\"{id}\">")).unwrap_or_else(|| panic!("no section {id}"));
        page[start..].split("</section>").next().unwrap_or_default()
    }

    #[test]
    fn the_page_stands_alone() {
        let page = html(&[samples::bert(10), samples::vit(30), samples::llama()], &["bert", "vit", "llama", "t5"]);
        assert_well_formed(&page);
        let outside = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        for fetched in ["http", "src=", "<link", "<script", "@import", "url("] {
            assert!(!outside.contains(fetched), "{fetched}");
        }
        assert!(section(&page, "results").contains("40.0 ms ±0.00 %"));
        assert!(section(&page, "coverage").contains("3 of 4 families measured"));
        // one per phase: two forward passes, prefill and decode
        assert_eq!(section(&page, "roofline").matches("class=\"id\"").count(), 4);
        assert!(section(&page, "roofline").contains("100 GFLOP/s, 10.0 GB/s"));
        assert!(
            section(&page, "energy").contains("RAPL package-0") && section(&page, "energy").contains("Not measured")
        );
    }

    #[test]
    fn what_was_measured_behind_the_samples_has_its_sections() {
        let page = html(&[samples::behind()], &["bert"]);
        assert_well_formed(&page);
        let profile = section(&page, "profile");
        assert!(profile.contains("80.0 GFLOP/s") && profile.contains("encoder.layer.1"), "{profile}");
        let sustained = section(&page, "sustained");
        assert!(sustained.contains("<svg ") && sustained.contains("no temperature sensor"), "{sustained}");
        let plain = html(&[samples::bert(10)], &["bert"]);
        assert!(!plain.contains("id=\"profile\"") && !plain.contains("id=\"sustained\""));
    }

    #[test]
    fn plots_follow_the_colours_of_the_page() {
        let page = html(&[samples::bert(10), samples::llama()], &[]);
        let plots: Vec<&str> = page.split("<svg ").skip(1).filter_map(|rest| rest.split("</svg>").next()).collect();
        assert!(plots.len() >= 5, "{}", plots.len());
        for plot in plots {
            assert!(!plot.contains("=\"#"), "a fixed colour in {plot}");
            assert!(plot.contains("currentColor") && plot.contains("viewBox"), "{plot}");
        }
    }

    #[test]
    fn hostile_text_is_only_text() {
        let page = html(&[samples::hostile()], &["<img src=x onerror=alert(1)>"]);
        assert_well_formed(&page);
        assert!(!page.contains("<script") && !page.contains("<img"), "markup got through");
        assert!(page.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;"));
    }

    #[test]
    fn little_is_shown_as_little() {
        let empty = html(&[], &["bert"]);
        assert_well_formed(&empty);
        assert!(section(&empty, "coverage").contains("not run") && !empty.contains("id=\"results\""));

        let one = html(&[samples::bert(1)], &[]);
        assert_well_formed(&one);
        assert!(section(&one, "results").contains("40.0 ms (n = 1)"));

        let mut skipped = samples::bert(1);
        skipped.outcome = Outcome::Skipped { reason: "would need 40 GB".into() };
        assert!(section(&html(&[skipped], &[]), "coverage").contains("would need 40 GB"));
    }

    #[test]
    fn without_peaks_the_reason_stands_in_place_of_the_roofline() {
        let mut record = samples::bert(10);
        record.machine.peaks = None;
        let page = html(&[record], &[]);
        assert!(section(&page, "roofline").contains("No phase can be placed"));
        assert!(section(&page, "roofline").contains("50.0 GFLOP/s"), "what was reached is still shown");
        assert!(section(&page, "notes").contains("no measured peaks"));
    }
}
