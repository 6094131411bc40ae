//! Has a cell become slower? Two sides of a comparison, the noise of each, and a verdict that allows for many cells.
//!
//! What is compared is the median call of a process. Calls of one process are alike, and processes of the same program
//! differ (memory lies elsewhere, neighbours come and go), so the unit of evidence is the process: its own noise comes from
//! a block bootstrap of its calls, and the rest from the spread between processes. Ratios are taken on the logarithm, where
//! a slow-down and its inverse are equally far.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, Normal, StudentsT};

use crate::record::{Outcome, Record};
use crate::stats;

/// Degrees of freedom from which the spread between processes is taken from themselves. With fewer, an interval would be
/// dozens of standard errors wide, and the assumed spread says more.
const LEAST_FREEDOM: f64 = 2.0;

/// Beyond that many degrees of freedom Student's distribution is the normal one, and takes long to invert.
const MOST_FREEDOM: f64 = 1e6;

/// The chance with which the "smallest change that would have been seen" would have been seen.
const POWER: f64 = 0.95;

/// Certainty with which a cell that is called the same lies below the upper end of the margin, and above the lower.
const SAMENESS: f64 = 0.95;

/// Share of the pairs that is left out at either end, and the fewest of them of which any are.
const TRIM: f64 = 0.2;
const TRIMMED_FROM: usize = 10;

/// A standard error below this is of clocks that are too coarse, not of certainty.
const LEAST_ERROR: f64 = 1e-7;

/// How differences are judged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// Chance that a comparison of equals, with all its cells, calls any of them faster or slower.
    pub false_alarms: f64,
    /// A change within this fraction of 1 does not matter.
    pub margin: f64,
    /// Standard deviation of the median between processes, as a fraction of it, where too few are there to tell.
    pub process_noise: f64,
    /// Standard deviation, as a fraction, of what all processes of a recording share and those of one at another time
    /// don't: the state of the machine.
    pub run_noise: f64,
    /// How often the evidence is looked at while it grows: each look may raise its share of the false alarms.
    pub looks: u32,
}

impl Default for Rules {
    /// For sides that run in alternation, looked at once.
    fn default() -> Self {
        Self { false_alarms: 0.01, margin: 0.02, process_noise: 0.02, run_noise: 0.0, looks: 1 }
    }
}

impl Rules {
    /// For sides that were recorded one after the other. The study of docs/methodology.md found such recordings more than
    /// 1 % apart by themselves, so that less than the margin can't be told.
    pub fn of_recordings() -> Self {
        Self { margin: 0.05, run_noise: 0.0125, ..Self::default() }
    }
}

/// What one process says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Process {
    /// Logarithm of the median of its calls, in nanoseconds (or of a ratio of two).
    pub log_median: f64,
    /// Standard error of that; `None` for too few calls.
    pub error: Option<f64>,
}

impl Process {
    /// From the calls of a process in the order in which they ran; `None` without any.
    pub fn of_calls(calls_ns: &[u64]) -> Option<Self> {
        let logs: Vec<f64> = calls_ns.iter().map(|&ns| (ns.max(1) as f64).ln()).collect();
        Some(Self { log_median: stats::median(calls_ns)?.max(1.0).ln(), error: stats::median_error(&logs) })
    }

    /// From medians of rounds in alternation, nanoseconds each: `new` over `base`.
    pub fn of_rounds(base: &[f64], new: &[f64]) -> Option<Self> {
        let logs: Vec<f64> = base.iter().zip(new).map(|(base, new)| (new / base).ln()).collect();
        Some(Self { log_median: stats::percentile_of(&logs, 50.0)?, error: stats::median_error(&logs) })
    }
}

/// A ratio of times with its uncertainty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Logarithm of the time of the new side over that of the base.
    log_ratio: f64,
    /// Its standard error.
    error: f64,
    /// Degrees of freedom of the error; `None` where the spread between processes was assumed.
    freedom: Option<f64>,
}

impl Estimate {
    /// Of two sides whose processes have nothing to do with each other. Both are taken to vary alike, as they do when
    /// nothing has changed.
    ///
    /// # Errors
    /// A side has no process, or one whose calls are too few to tell its noise where that is needed.
    pub fn of_sides(base: &[Process], new: &[Process], rules: &Rules) -> Result<Self, String> {
        let logs = |side: &[Process]| side.iter().map(|process| process.log_median).collect::<Vec<_>>();
        let (of_base, of_new) = (logs(base), logs(new));
        if of_base.is_empty() || of_new.is_empty() {
            return Err("there are no samples".to_owned());
        }
        let squares = |logs: &[f64]| stats::variance(logs) * (logs.len() - 1) as f64;
        let freedom = (base.len() + new.len() - 2) as f64;
        let between = (squares(&of_base) + squares(&of_new)) / freedom.max(1.0);
        let (error, freedom) = spread(&[base, new].concat(), between, freedom, rules.process_noise)?;
        let processes = error * error * (1.0 / base.len() as f64 + 1.0 / new.len() as f64);
        let both = processes + 2.0 * rules.run_noise * rules.run_noise;
        Ok(Self {
            log_ratio: stats::mean(&of_new) - stats::mean(&of_base),
            error: both.sqrt(),
            // Satterthwaite's (1946), with a run noise that is given
            freedom: freedom.map(|freedom| (freedom * (both / processes).powi(2)).min(MOST_FREEDOM)),
        })
    }

    /// Of pairs of processes that ran in alternation, each with the ratio of its two. Of ten and more the fifth at
    /// either end has no say in the ratio: what disturbs a machine for a moment spoils a pair now and then.
    ///
    /// # Errors
    /// There is no pair, or one with too few rounds to tell its noise where that is needed.
    pub fn of_pairs(pairs: &[Process], rules: &Rules) -> Result<Self, String> {
        let logs: Vec<f64> = pairs.iter().map(|pair| pair.log_median).collect();
        if logs.is_empty() {
            return Err("there are no samples".to_owned());
        }
        if logs.len() >= TRIMMED_FROM {
            let stats::Trimmed { mean, error, freedom } = stats::trimmed_mean(&logs, TRIM);
            let own: Vec<f64> = pairs.iter().filter_map(|pair| pair.error).collect();
            let own = stats::percentile_of(&own, 50.0).unwrap_or(0.0).max(LEAST_ERROR) / (logs.len() as f64).sqrt();
            return Ok(Self { log_ratio: mean, error: error.max(own), freedom: Some(freedom) });
        }
        let noise = rules.process_noise * 2f64.sqrt();
        let (error, freedom) = spread(pairs, stats::variance(&logs), (logs.len() - 1) as f64, noise)?;
        Ok(Self { log_ratio: stats::mean(&logs), error: error / (logs.len() as f64).sqrt(), freedom })
    }

    /// Whether the spread between processes was assumed, not measured.
    pub fn is_assumed(&self) -> bool {
        self.freedom.is_none()
    }

    /// How many standard errors reach up to the quantile `p`.
    fn quantile(&self, p: f64) -> f64 {
        match self.freedom.and_then(|freedom| StudentsT::new(0.0, 1.0, freedom).ok()) {
            Some(student) => student.inverse_cdf(p),
            None => Normal::standard().inverse_cdf(p),
        }
    }

    /// Chance of a ratio so far from 1, in either direction, were there no difference.
    fn chance(&self) -> f64 {
        let distance = -self.log_ratio.abs() / self.error;
        let below = match self.freedom.and_then(|freedom| StudentsT::new(0.0, 1.0, freedom).ok()) {
            Some(student) => student.cdf(distance),
            None => Normal::standard().cdf(distance),
        };
        (2.0 * below).min(1.0)
    }
}

/// Standard deviation of one process's median, and its degrees of freedom. It is never less than the processes' own noise,
/// which a few of them may hide by chance.
fn spread(processes: &[Process], between: f64, freedom: f64, assumed: f64) -> Result<(f64, Option<f64>), String> {
    let own: Vec<f64> = processes.iter().filter_map(|process| process.error).map(|error| error * error).collect();
    if freedom >= LEAST_FREEDOM {
        return Ok((between.max(stats::mean(&own)).sqrt().max(LEAST_ERROR), Some(freedom)));
    }
    if own.len() < processes.len() {
        let least = stats::INTERVAL_MIN_SAMPLES;
        return Err(format!("its samples are too few: a process needs {least}, or a side needs several processes"));
    }
    Ok(((assumed * assumed + stats::mean(&own)).sqrt(), None))
}

/// What became of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Certainly faster than before.
    Faster,
    /// Certainly slower than before.
    Slower,
    /// Changed by no more than the margin, with a certainty of 95 % in either direction.
    Same,
    /// None of these is certain.
    Undecided,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Same => "same",
            Self::Undecided => "undecided",
        })
    }
}

/// A ratio of times, its interval and what follows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// Time of the new side over that of the base: above 1 it is slower.
    pub ratio: f64,
    /// Lower end of its interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Certainty of the interval, which grows with the number of cells: 0.999.
    pub confidence: f64,
    /// What became of it.
    pub verdict: Verdict,
    /// The smallest slow-down, as a fraction, that would have been called with a chance of 95 %.
    pub smallest: f64,
    /// The spread between processes was assumed, because too few are there.
    pub assumed: bool,
}

/// Judges all cells of a comparison together.
///
/// Holm's procedure (1979) keeps the chance of any false alarm among all cells below [`Rules::false_alarms`], whatever
/// depends on what: a gate is closed by a single one. (Benjamini and Hochberg's bounds their share among those called,
/// which says little about a gate.) Each interval has the certainty at which Holm's procedure looked at the cell, so that
/// it agrees with a verdict of slower or faster.
pub fn judge(estimates: &[Estimate], rules: &Rules) -> Vec<Judgement> {
    let mut order: Vec<usize> = (0..estimates.len()).collect();
    order.sort_by(|&a, &b| estimates[a].chance().total_cmp(&estimates[b].chance()));
    let mut levels = vec![0.0; estimates.len()];
    let mut stopped = None;
    for (place, &cell) in order.iter().enumerate() {
        let level = stopped.unwrap_or(rules.false_alarms / f64::from(rules.looks) / (estimates.len() - place) as f64);
        levels[cell] = level;
        if estimates[cell].chance() > level {
            stopped = Some(level);
        }
    }
    estimates.iter().zip(levels).map(|(estimate, level)| judgement(estimate, level, rules.margin)).collect()
}

fn judgement(estimate: &Estimate, level: f64, margin: f64) -> Judgement {
    let to_edge = estimate.quantile(1.0 - level / 2.0);
    let reach = to_edge * estimate.error;
    let (low, high) = ((estimate.log_ratio - reach).exp(), (estimate.log_ratio + reach).exp());
    // two one-sided tests (Schuirmann 1987); many cells called the same close no gate
    let verdict = if estimate.log_ratio.abs() + estimate.quantile(SAMENESS) * estimate.error <= margin.ln_1p() {
        Verdict::Same
    } else if low > 1.0 {
        Verdict::Slower
    } else if high < 1.0 {
        Verdict::Faster
    } else {
        Verdict::Undecided
    };
    // a change within the margin is not called, however certain
    let seen = (estimate.error * (to_edge + estimate.quantile(POWER))).exp_m1().max(margin);
    Judgement {
        ratio: estimate.log_ratio.exp(),
        low,
        high,
        confidence: 1.0 - level,
        verdict,
        smallest: seen,
        assumed: estimate.is_assumed(),
    }
}

/// What was measured of a cell on one side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// Geometric mean of the processes' medians.
    pub median_ns: f64,
    /// Processes.
    pub processes: usize,
}

impl Side {
    /// Of processes; NaN without any.
    pub fn of(processes: &[Process]) -> Self {
        let logs: Vec<f64> = processes.iter().map(|process| process.log_median).collect();
        Self { median_ns: stats::mean(&logs).exp(), processes: processes.len() }
    }
}

/// A cell that both sides have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `bert/forward/b1/s128`, with the settings that set it apart.
    pub cell: String,
    /// What it is compared with.
    pub base: Side,
    /// What is judged.
    pub new: Side,
    /// The result.
    #[serde(flatten)]
    pub judgement: Judgement,
}

/// A cell that can't be compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apart {
    /// `bert/forward/b1/s128`, with the settings that set it apart.
    pub cell: String,
    /// Why.
    pub reason: String,
    /// The base has it measured, so that the new side owes an answer.
    pub owed: bool,
}

/// Two sides, cell by cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// How it was judged.
    pub rules: Rules,
    /// Cells that both sides have.
    pub rows: Vec<Row>,
    /// Those that can't be compared.
    pub apart: Vec<Apart>,
}

/// What a comparison comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conclusion {
    /// No cell is slower, and of each that matters this is certain.
    Passed,
    /// A cell is slower.
    Slower,
    /// No cell is certainly slower, but of some it isn't known.
    Undecided,
}

impl Comparison {
    /// What it comes to. A cell that the base has and the new side owes leaves it undecided, as does an empty comparison.
    pub fn conclusion(&self) -> Conclusion {
        let any = |verdict| self.rows.iter().any(|row| row.judgement.verdict == verdict);
        if any(Verdict::Slower) {
            Conclusion::Slower
        } else if any(Verdict::Undecided) || self.rows.is_empty() || self.apart.iter().any(|apart| apart.owed) {
            Conclusion::Undecided
        } else {
            Conclusion::Passed
        }
    }

    /// From cells that were estimated in another way than from records.
    pub fn of(cells: Vec<(String, Side, Side, Estimate)>, apart: Vec<Apart>, rules: Rules) -> Self {
        let estimates: Vec<Estimate> = cells.iter().map(|(.., estimate)| *estimate).collect();
        let judged = cells.into_iter().zip(judge(&estimates, &rules));
        let rows = judged.map(|((cell, base, new, _), judgement)| Row { cell, base, new, judgement });
        Self { rules, rows: rows.collect(), apart }
    }
}

/// What tells cells apart, by name: [`Record::identity`] and the kind of build.
type Identity<'a> = BTreeMap<&'a str, String>;

/// The records of one cell on one side: its processes.
struct Group<'a> {
    identity: Identity<'a>,
    records: Vec<&'a Record>,
}

impl Group<'_> {
    fn processes(&self) -> Vec<Process> {
        self.records.iter().filter_map(|record| Process::of_calls(&record.calls_ns())).collect()
    }

    /// Why nothing of it was measured.
    fn why_not(&self) -> String {
        match self.records.last().map(|record| &record.outcome) {
            Some(Outcome::Failed { error }) => format!("failed: {error}"),
            Some(Outcome::Skipped { reason }) => format!("skipped: {reason}"),
            Some(Outcome::Measured(_)) | None => "has no samples".to_owned(),
        }
    }

    /// How many of its processes failed, and how the last one did.
    fn failures(&self) -> Option<String> {
        let errors = self.records.iter().filter_map(|record| match &record.outcome {
            Outcome::Failed { error } => Some(error),
            _ => None,
        });
        let last = errors.clone().next_back()?;
        Some(format!("{} of {} processes, the last with: {last}", errors.count(), self.records.len()))
    }

    /// The settings that differ: `threads 2 and 4`.
    fn differences(&self, other: &Group<'_>) -> Vec<String> {
        let names = self.identity.keys().chain(other.identity.keys().filter(|name| !self.identity.contains_key(*name)));
        let of = |group: &Group<'_>, name: &str| group.identity.get(name).cloned().unwrap_or_else(|| "none".to_owned());
        names
            .map(|&name| (name, of(self, name), of(other, name)))
            .filter(|(_, one, other)| one != other)
            .map(|(name, one, other)| format!("{name} {one} and {other}"))
            .collect()
    }
}

fn groups(records: &[Record]) -> Vec<Group<'_>> {
    let mut places = BTreeMap::new();
    let mut groups: Vec<Group<'_>> = Vec::new();
    for record in records {
        let mut identity = record.identity();
        identity.insert("build", record.build.profile.clone());
        let place = *places.entry(identity.clone()).or_insert(groups.len());
        match groups.get_mut(place) {
            Some(group) => group.records.push(record),
            None => groups.push(Group { identity, records: vec![record] }),
        }
    }
    groups
}

/// Compares the cells of `new` with those of `base`. Records of the same cell in one file are processes of it.
pub fn compare(base: &[Record], new: &[Record], rules: Rules) -> Comparison {
    let (base, new) = (groups(base), groups(new));
    let (mut cells, mut apart) = (Vec::new(), Vec::new());
    let mut met = vec![false; new.len()];
    for old in &base {
        let cell = title(old, &base);
        let before = old.processes();
        let owed = !before.is_empty();
        let mut set_apart = |reason: String| apart.push(Apart { cell: cell.clone(), reason, owed });
        let Some(place) = new.iter().position(|group| group.identity == old.identity) else {
            // the one that was measured in its stead, if the base lacks that
            let alike = new.iter().enumerate().filter(|(_, group)| {
                group.identity["cell"] == old.identity["cell"]
                    && base.iter().all(|other| other.identity != group.identity)
            });
            let nearest = alike.map(|(place, group)| (place, old.differences(group)));
            set_apart(match nearest.min_by_key(|(_, differences)| differences.len()) {
                Some((place, differences)) => {
                    met[place] = true;
                    format!("measured otherwise: {}", differences.join("; "))
                }
                None => "not in the new records".to_owned(),
            });
            continue;
        };
        met[place] = true;
        let after = new[place].processes();
        match (before.is_empty(), after.is_empty()) {
            (true, true) => set_apart(format!("not measured on either side: the new one {}", new[place].why_not())),
            (true, false) => set_apart(format!("the base {}", old.why_not())),
            (false, true) => set_apart(format!("the new one {}", new[place].why_not())),
            (false, false) => match Estimate::of_sides(&before, &after, &rules) {
                Ok(estimate) => {
                    for (side, group) in [("base", old), ("new side", &new[place])] {
                        let failed = group.failures().map(|failures| format!("of the {side}, {failures}"));
                        let failed = failed.map(|reason| Apart { cell: cell.clone(), reason, owed: false });
                        apart.extend(failed);
                    }
                    cells.push((cell, Side::of(&before), Side::of(&after), estimate));
                }
                Err(reason) => set_apart(reason),
            },
        }
    }
    for (group, _) in new.iter().zip(met).filter(|(_, met)| !met) {
        apart.push(Apart { cell: title(group, &new), reason: "not in the base".to_owned(), owed: false });
    }
    Comparison::of(cells, apart, rules)
}

/// The cell's name, with the settings in which others of that name on its side differ.
fn title(group: &Group<'_>, side: &[Group<'_>]) -> String {
    let cell = &group.identity["cell"];
    let alike: Vec<_> = side.iter().filter(|other| other.identity["cell"] == *cell).collect();
    let apart = group.identity.iter();
    let apart = apart.filter(|(name, value)| alike.iter().any(|other| other.identity.get(*name) != Some(*value)));
    let apart: Vec<String> = apart.map(|(name, value)| format!("{name} {value}")).collect();
    if apart.is_empty() { cell.clone() } else { format!("{cell} ({})", apart.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Sample;
    use crate::record::tests::record;
    use crate::session::{Engine, Phase};

    fn process(log_median: f64) -> Process {
        Process { log_median, error: Some(0.001) }
    }

    /// The cell of the testing record, each call `ns` with a ripple of 1 ‰.
    fn measured(ns: u64) -> Record {
        let mut record = record();
        let Outcome::Measured(measurement) = &mut record.outcome else { unreachable!("it is measured") };
        let sample = |ns| Sample { total_ns: ns, phases: vec![(Phase::Forward, ns)] };
        measurement.samples = (0..40).map(|call| sample(ns + ns * (call % 3) / 1000)).collect();
        record
    }

    fn runs(medians: &[u64]) -> Vec<Record> {
        medians.iter().map(|&ns| measured(ns)).collect()
    }

    #[test]
    fn an_interval_worked_by_hand() {
        // logs 0, .01, .02 and .05, .06, .07: difference .05, s .01, error .01·√(2/3), t(0.995, 4) = 4.6041
        let side = |from: f64| [from, from + 0.01, from + 0.02].map(process);
        let rules = Rules::default();
        let estimate = Estimate::of_sides(&side(0.0), &side(0.05), &rules).unwrap();
        let [judged] = judge(&[estimate], &rules)[..] else { panic!() };
        let reach = 4.604_094_9 * 0.01 * (2.0f64 / 3.0).sqrt();
        assert!((judged.ratio.ln() - 0.05).abs() < 1e-9);
        assert!((judged.low.ln() - (0.05 - reach)).abs() < 1e-6, "{judged:?}");
        assert!((judged.high.ln() - (0.05 + reach)).abs() < 1e-6);
        assert_eq!((judged.verdict, judged.assumed), (Verdict::Slower, false));
        // t(0.95, 4) = 2.1318
        let seen = (0.01 * (2.0f64 / 3.0).sqrt() * (4.604_094_9 + 2.131_846_8)).exp() - 1.0;
        assert!((judged.smallest - seen).abs() < 1e-6, "{judged:?}");
    }

    #[test]
    fn tails_are_those_of_tables() {
        let of = |freedom| Estimate { log_ratio: 0.0, error: 1.0, freedom: Some(freedom) };
        for (freedom, p, table) in
            [(2.0, 0.995, 9.924_84), (8.0, 0.9995, 5.041_31), (8.0, 0.99995, 7.120), (1e6, 0.995, 2.575_83)]
        {
            let t = of(freedom).quantile(p);
            assert!((t / table - 1.0).abs() < 1e-4, "{freedom} {p}: {t}");
            let chance = Estimate { log_ratio: t, ..of(freedom) }.chance();
            assert!((chance / (2.0 * (1.0 - p)) - 1.0).abs() < 1e-6, "{freedom} {p}: {chance}");
        }
    }

    #[test]
    fn one_process_a_side_is_held_against_the_assumed_spread() {
        let rules = Rules::default();
        let one = |ns| Process::of_calls(&measured(ns).calls_ns()).unwrap();
        let judged = |new| {
            let estimate = Estimate::of_sides(&[one(1_000_000)], &[one(new)], &rules).unwrap();
            judge(&[estimate], &rules)[0]
        };
        // 2.576·√2·2 % = 7.3 %
        assert_eq!([judged(1_050_000), judged(1_120_000)].map(|j| j.verdict), [Verdict::Undecided, Verdict::Slower]);
        assert!(judged(1_000_000).assumed && judged(1_000_000).smallest > 0.1);
        let few = Process { error: None, ..one(1) };
        assert!(Estimate::of_sides(&[few], &[one(2)], &rules).unwrap_err().contains("too few"));
    }

    #[test]
    fn spread_by_chance_too_small_does_not_hide_a_process_s_own_noise() {
        let noisy = Process { log_median: 0.0, error: Some(0.03) };
        let estimate = Estimate::of_sides(&[noisy; 3], &[noisy; 3], &Rules::default()).unwrap();
        assert!((estimate.error - 0.03 * (2.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn holm_worked_by_hand() {
        // normal: p = 0.0027, 0.0124, 0.0455 at 3, 2.5 and 2 errors; levels 0.05/3, 0.05/2, 0.05/1
        let of = |errors: f64| Estimate { log_ratio: errors * 0.01, error: 0.01, freedom: None };
        let rules = Rules { false_alarms: 0.05, margin: 1e-6, ..Rules::default() };
        let verdicts = |errors: &[f64]| {
            let judged = judge(&errors.iter().map(|&e| of(e)).collect::<Vec<_>>(), &rules);
            for j in &judged {
                assert_eq!(j.verdict == Verdict::Undecided, j.low <= 1.0 && j.high >= 1.0, "{j:?}");
            }
            judged.iter().map(|j| (j.verdict, (j.confidence * 1e4).round() as i64)).collect::<Vec<_>>()
        };
        use Verdict::{Faster, Slower, Undecided};
        assert_eq!(verdicts(&[2.0, 3.0, -2.5]), [(Slower, 9500), (Slower, 9833), (Faster, 9750)]);
        // the second is not certain enough at 0.05/2, and the third is not looked at any more
        assert_eq!(verdicts(&[2.0, 3.0, 2.1]), [(Undecided, 9750), (Slower, 9833), (Undecided, 9750)]);
        assert_eq!(verdicts(&[]), []);
    }

    #[test]
    fn recordings_differ_by_the_state_of_the_machine() {
        // errors .01·√(2/3) of the processes and .01·√2 of the recordings; 4 degrees of freedom times (8/2)²
        let side = |from: f64| [from, from + 0.01, from + 0.02].map(process);
        let rules = Rules { run_noise: 0.01, ..Rules::default() };
        let estimate = Estimate::of_sides(&side(0.0), &side(0.05), &rules).unwrap();
        assert!((estimate.error - 0.01 * (8.0f64 / 3.0).sqrt()).abs() < 1e-12, "{estimate:?}");
        assert!((estimate.freedom.unwrap() - 64.0).abs() < 1e-9, "{estimate:?}");
    }

    #[test]
    fn a_spoilt_pair_among_many_has_no_say() {
        let rules = Rules::default();
        let mut pairs: Vec<Process> = (0..10).map(|i| process(0.05 + 0.001 * f64::from(i % 3))).collect();
        pairs[4].log_median = 0.9;
        let verdict = |pairs: &[Process]| judge(&[Estimate::of_pairs(pairs, &rules).unwrap()], &rules)[0].verdict;
        assert_eq!([verdict(&pairs[..9]), verdict(&pairs)], [Verdict::Undecided, Verdict::Slower]);
    }

    #[test]
    fn each_look_has_its_share_of_the_false_alarms() {
        let of = |looks| {
            judge(&[Estimate { log_ratio: 0.0, error: 0.01, freedom: None }], &Rules { looks, ..Rules::default() })
        };
        assert_eq!([of(1), of(4)].map(|judged| judged[0].confidence), [0.99, 0.9975]);
    }

    #[test]
    fn certain_and_small_is_the_same() {
        let of = |log_ratio: f64| Estimate { log_ratio, error: 1e-4, freedom: None };
        let verdict = |log_ratio| judge(&[of(log_ratio)], &Rules::default())[0].verdict;
        assert_eq!([0.0, 0.01, -0.015, 0.03, -0.03].map(verdict), {
            use Verdict::{Faster, Same, Slower};
            [Same, Same, Same, Slower, Faster]
        });
    }

    #[test]
    fn false_alarms_are_as_rare_as_asked_for() {
        // 4,000 comparisons of 3 against 3 processes that differ by a standard deviation of 2 %
        let mut state = 1u64;
        let mut normal = || {
            let uniform: f64 = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 11) as f64 / (1u64 << 53) as f64
                })
                .sum();
            0.02 * (uniform - 6.0)
        };
        let rules = Rules { margin: 1e-9, ..Rules::default() };
        let mut side = |shift: f64| [0; 3].map(|_| process(shift + normal()));
        let mut called = |shift: f64| {
            let estimate = Estimate::of_sides(&side(0.0), &side(shift), &rules).unwrap();
            judge(&[estimate], &rules)[0].verdict == Verdict::Slower
        };
        // half of 1 % of 4,000 are 20, give or take three standard errors
        let alarms = (0..4000).filter(|_| called(0.0)).count();
        assert!((7..=34).contains(&alarms), "{alarms}");
        assert!((0..400).filter(|_| called(0.2)).count() > 390);
    }

    #[test]
    fn cells_are_paired_and_judged() {
        let base = runs(&[1_000_000, 1_002_000, 998_000]);
        let verdict = |new: &[u64]| {
            let comparison = compare(&base, &runs(new), Rules::default());
            assert!(comparison.apart.is_empty(), "{comparison:?}");
            let [row] = &comparison.rows[..] else { panic!("{comparison:?}") };
            assert_eq!((row.base.processes, row.new.processes), (3, new.len()));
            (row.judgement.verdict, comparison.conclusion())
        };
        assert_eq!(verdict(&[1_001_000, 999_000, 1_000_500]), (Verdict::Same, Conclusion::Passed));
        assert_eq!(verdict(&[1_101_000, 1_099_000, 1_100_500]), (Verdict::Slower, Conclusion::Slower));
        assert_eq!(verdict(&[900_000, 901_000, 899_000]), (Verdict::Faster, Conclusion::Passed));
        assert_eq!(verdict(&[1_001_000, 1_201_000, 900_000]), (Verdict::Undecided, Conclusion::Undecided));
    }

    #[test]
    fn what_cannot_be_compared_says_why() {
        let base = runs(&[1_000_000; 3]);
        let reason = |change: &dyn Fn(&mut Record)| {
            let mut new = runs(&[1_000_000; 3]);
            new.iter_mut().for_each(change);
            let comparison = compare(&base, &new, Rules::default());
            assert_eq!((comparison.rows.len(), comparison.conclusion()), (0, Conclusion::Undecided));
            assert!(comparison.apart[0].owed, "{comparison:?}");
            comparison.apart[0].reason.clone()
        };
        type Change<'a> = &'a dyn Fn(&mut Record);
        let cases: [(Change<'_>, &str); 7] = [
            (&|r| r.machine.cpu.model = "Other".into(), "machine Testing CPU, "),
            (&|r| r.subject.engine = Engine::CandleTransformers, "engine roofbench and candle-transformers"),
            (&|r| drop(r.settings.requested.insert("threads".into(), "4".into())), "threads none and 4"),
            (&|r| r.build.profile = if r.build.profile == "debug" { "release" } else { "debug" }.into(), "build "),
            (&|r| r.outcome = Outcome::Failed { error: "no kernel".into() }, "the new one failed: no kernel"),
            (&|r| r.outcome = Outcome::Skipped { reason: "too large".into() }, "the new one skipped: too large"),
            (&|r| r.subject.family = "vit".into(), "not in the new records"),
        ];
        for (change, expected) in cases {
            let reason = reason(change);
            assert!(reason.contains(expected), "{reason} lacks {expected}");
        }
        // a process that failed among others is told
        let mut new = runs(&[1_000_000; 4]);
        new[1].outcome = Outcome::Failed { error: "no memory".into() };
        let comparison = compare(&base, &new, Rules::default());
        assert_eq!((comparison.rows[0].new.processes, comparison.conclusion()), (3, Conclusion::Passed));
        assert_eq!(comparison.apart[0].reason, "of the new side, 1 of 4 processes, the last with: no memory");
        // sampling is no such difference, and a new cell owes nothing
        let mut new = runs(&[1_000_000; 4]);
        new.iter_mut().for_each(|r| drop(r.settings.requested.insert("max-time".into(), "5".into())));
        new[3].subject.family = "vit".into();
        let comparison = compare(&base, &new, Rules::default());
        assert_eq!((comparison.rows.len(), comparison.conclusion()), (1, Conclusion::Passed));
        assert_eq!(comparison.apart[0].reason, "not in the base");
    }

    #[test]
    fn cells_of_one_name_are_told_apart() {
        let mut one = measured(1_000_000);
        one.settings.requested.insert("threads".into(), "1".into());
        let mut two = one.clone();
        two.settings.requested.insert("threads".into(), "2".into());
        let both = [one, two];
        let comparison = compare(&both, &both, Rules::default());
        let cells: Vec<&str> = comparison.rows.iter().map(|row| row.cell.as_str()).collect();
        assert_eq!(cells, ["bert/forward/b1/s128 (threads 1)", "bert/forward/b1/s128 (threads 2)"]);
    }
}
