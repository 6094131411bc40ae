//! Which checkpoint, precision and cells of each family fit in a given memory and a given time.

use roofbench_core::catalog;
use roofbench_core::hardware::Machine;
use roofbench_core::predict::Calibration;
use serde_json::{Value, json};

use crate::job::Job;
use crate::{memory, models, plan, predict, ui};

/// A choice that is not worth it: one that saves less of the time than this.
const WORTH: f64 = 0.8;

/// What has to be kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of each cell; what is available now where none is given.
    pub(crate) memory: Option<f64>,
    /// Seconds of all cells together.
    pub(crate) budget: Option<f64>,
    /// A first look is enough.
    pub(crate) quick: bool,
}

/// What became of a family.
pub(crate) struct Choice {
    /// Its name.
    pub(crate) family: String,
    /// What is measured of it, or why nothing is.
    pub(crate) outcome: Result<Taken, String>,
    /// What had to be left for it.
    pub(crate) why: String,
}

/// Cells of one checkpoint in one precision.
#[derive(Clone)]
pub(crate) struct Taken {
    /// At least one.
    pub(crate) jobs: Vec<Job>,
    /// Bytes of the largest.
    pub(crate) memory: f64,
    /// Seconds to measure them all.
    pub(crate) seconds: f64,
}

impl Taken {
    /// In what form weights are kept.
    pub(crate) fn weights(&self) -> &str {
        self.jobs[0].requested.get("opt").map_or("as they are", |opt| opt.trim_start_matches('+'))
    }
}

impl Choice {
    /// As programs read it: each cell like a line of `run --dry-run --json`, or the reason for there being none.
    pub(crate) fn lines(&self) -> Vec<Value> {
        match &self.outcome {
            Ok(taken) => taken.jobs.iter().map(plan::planned).collect(),
            Err(reason) => vec![json!({ "family": self.family, "skipped": reason })],
        }
    }
}

/// Ways to measure a family, the most faithful first.
struct Ways {
    family: String,
    /// Those that fit in memory, each cheaper than the one before, and what it leaves of the one before.
    ways: Vec<(Taken, String)>,
    /// Why there is none.
    reason: String,
}

/// Chooses for each of `families` (for all that this build runs where none is named): the default checkpoint in its own
/// precision where that fits, else narrower weights, else the next smaller checkpoint; and where all together take too
/// long, less of those that take longest.
///
/// # Errors
/// There is no such family.
pub(crate) fn choose(
    families: &[String],
    limits: &Limits,
    calibration: &Calibration,
    machine: &Machine,
) -> anyhow::Result<Vec<Choice>> {
    let named: Vec<String> =
        if families.is_empty() { models::families().map(str::to_owned).collect() } else { families.to_vec() };
    let ways = named.iter().map(|family| ways(family, limits, calibration, machine)).collect::<Result<Vec<_>, _>>()?;
    let seconds: Vec<Vec<f64>> =
        ways.iter().map(|family| family.ways.iter().map(|(taken, _)| taken.seconds).collect()).collect();
    let taken = within(&seconds, limits.budget.unwrap_or(f64::INFINITY));
    Ok(ways.into_iter().zip(taken).map(|(family, place)| family.taken(place)).collect())
}

impl Ways {
    fn taken(mut self, place: usize) -> Choice {
        let left: Vec<&str> =
            self.ways.iter().take(place + 1).map(|(_, why)| why.as_str()).filter(|w| !w.is_empty()).collect();
        let why = left.join("; ");
        let outcome = if place < self.ways.len() {
            Ok(self.ways.swap_remove(place).0)
        } else if self.ways.is_empty() {
            Err(self.reason)
        } else {
            let (least, _) = self.ways.swap_remove(self.ways.len() - 1);
            Err(format!("no time left in --budget: at least {} to measure", ui::time(least.seconds)))
        };
        Choice { family: self.family, outcome, why }
    }
}

/// The place in each list of times that keeps their sum within `budget`: the list that takes longest gives way first; the
/// place behind its end stands for none of it.
fn within(times: &[Vec<f64>], budget: f64) -> Vec<usize> {
    let mut places = vec![0; times.len()];
    let at = |list: &Vec<f64>, place: usize| list.get(place).copied().unwrap_or(0.0);
    loop {
        let now: Vec<f64> = times.iter().zip(&places).map(|(list, &place)| at(list, place)).collect();
        let longest = (0..now.len()).filter(|&i| places[i] < times[i].len()).max_by(|&a, &b| now[a].total_cmp(&now[b]));
        match longest {
            Some(longest) if now.iter().sum::<f64>() > budget => places[longest] += 1,
            _ => return places,
        }
    }
}

fn ways(name: &str, limits: &Limits, calibration: &Calibration, machine: &Machine) -> anyhow::Result<Ways> {
    let family = catalog::family(name)?;
    let mut checkpoints: Vec<_> = family.checkpoints.iter().collect();
    // the default one, then smaller ones from the largest on
    let default = catalog::checkpoint(&family.default_checkpoint)?.1;
    checkpoints.retain(|one| one.parameters <= default.parameters);
    checkpoints.sort_by_key(|one| (one.repository != default.repository, std::cmp::Reverse(one.parameters)));
    let precisions = [&[][..], &["--dtype=bf16"], &["--opt=+weights-q8"], &["--dtype=bf16", "--opt=+weights-q4"]];
    let extents: &[&[&str]] = if limits.quick { &[&["--quick"]] } else { &[&[], &["--quick"]] };

    let mut found = Ways { family: name.to_owned(), ways: Vec::new(), reason: String::new() };
    for checkpoint in checkpoints {
        for precision in precisions {
            for extent in extents {
                let mut words = vec![name.to_owned(), format!("--checkpoint={}", checkpoint.repository)];
                words.extend(precision.iter().chain(*extent).map(|&word| word.to_owned()));
                let mut jobs = plan::plan(&plan::grid(&words)?, machine)?;
                if extent.contains(&"--quick") {
                    jobs.truncate(1);
                }
                let taken = match predicted(jobs, limits, calibration, machine) {
                    Ok(taken) => taken,
                    Err(reason) => {
                        found.reason = reason;
                        continue;
                    }
                };
                let cheaper = found.ways.last().is_none_or(|(last, _)| taken.seconds < WORTH * last.seconds);
                if cheaper {
                    let what = [checkpoint.repository.clone(), precision.join(" "), extent.join(" ")].join(" ");
                    let is_first = found.ways.is_empty() && found.reason.is_empty();
                    let why = match (is_first, found.ways.is_empty()) {
                        (true, _) => String::new(),
                        (_, true) => found.reason.clone(),
                        _ => format!("to save time: {}", what.trim_end()),
                    };
                    found.ways.push((taken, why));
                }
            }
        }
    }
    Ok(found)
}

/// The cells with what they take, or why one of them would not fit.
fn predicted(jobs: Vec<Job>, limits: &Limits, calibration: &Calibration, machine: &Machine) -> Result<Taken, String> {
    let mut taken = Taken { jobs: Vec::new(), memory: 0.0, seconds: 0.0 };
    for job in jobs {
        let forecast = predict::forecast(&job, calibration).map_err(|error| ui::chain(&error))?;
        let bytes = forecast.prediction.memory;
        if let Some(most) = limits.memory.filter(|&most| bytes > most) {
            return Err(format!(
                "{} in {} would take about {}, and --memory is {}",
                job.checkpoint,
                job.dtype.name(),
                ui::bytes(bytes),
                ui::bytes(most)
            ));
        }
        if let Some(refusal) = memory::beyond(bytes, &job, machine) {
            return Err(refusal);
        }
        taken.memory = taken.memory.max(bytes);
        taken.seconds += predict::wall_seconds(&forecast.prediction, &job.sampling);
        taken.jobs.push(job);
    }
    if taken.jobs.is_empty() { Err("it has no such cell".to_owned()) } else { Ok(taken) }
}

/// Bytes with a unit, decimal or binary: `8e9`, `8GB`, `4 GiB`.
pub(crate) fn bytes(text: &str) -> Result<f64, String> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    with_unit(text, &UNITS, 1.0).ok_or_else(|| "expected a size, such as 8e9, 8GB or 4GiB".to_owned())
}

/// Seconds with a unit: `90`, `90s`, `20m`, `2h`, `80ms`.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    const UNITS: [(&str, f64); 6] = [("ms", 1e-3), ("us", 1e-6), ("min", 60.0), ("m", 60.0), ("h", 3600.0), ("s", 1.0)];
    with_unit(text, &UNITS, 1.0).ok_or_else(|| "expected a time, such as 90s, 20m or 2h".to_owned())
}

/// A positive number, times the unit behind it.
fn with_unit(text: &str, units: &[(&str, f64)], without: f64) -> Option<f64> {
    let text = text.trim();
    let (number, unit) =
        units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).unwrap_or((text, without));
    let value = number.trim().parse::<f64>().ok()? * unit;
    (value.is_finite() && value > 0.0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(
            [bytes("8e9"), bytes("8GB"), bytes(" 2 GiB"), bytes("5B")],
            [8e9, 8e9, 2_147_483_648.0, 5.0].map(Ok)
        );
        assert_eq!(
            [seconds("90"), seconds("20m"), seconds("2h"), seconds("80ms")],
            [90.0, 1200.0, 7200.0, 0.08].map(Ok)
        );
        for wrong in ["", "GB", "-1", "0", "1e999", "4 parsecs"] {
            assert!(bytes(wrong).is_err() && seconds(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_longest_gives_way_first() {
        let times = [vec![10.0, 4.0], vec![8.0, 7.0, 1.0], vec![2.0]];
        assert_eq!(within(&times, 100.0), [0, 0, 0]);
        assert_eq!(within(&times, 14.0), [1, 0, 0]);
        // 4 + 7 + 2, then the second again
        assert_eq!(within(&times, 13.0), [1, 1, 0]);
        assert_eq!(within(&times, 7.0), [1, 2, 0]);
        assert_eq!(within(&times, 0.0), [2, 3, 1]);
    }
}
