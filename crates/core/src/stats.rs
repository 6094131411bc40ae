//! Statistics over raw samples: order statistics, spread and the certainty of the median.
//!
//! Nothing is dropped: outliers are flagged and stay in every number. What a sample is too small to support is absent.

use serde::Serialize;

/// Samples from which a 95 % interval of the median exists: with fewer, even the whole range covers less.
pub const INTERVAL_MIN_SAMPLES: usize = 6;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 1_000;

/// Resamples for a standard error, which takes fewer than the ends of an interval.
const ERROR_RESAMPLES: usize = 400;

/// Seed of the bootstrap: the same samples always give the same interval.
const SEED: u64 = 0x726f_6f66;

/// The standard deviation of a normal distribution in units of its MAD.
pub const MAD_TO_SIGMA: f64 = 1.4826;

/// A sample further from the median than this many (MAD-estimated) standard deviations is flagged.
pub const OUTLIER_SIGMAS: f64 = 5.0;

/// A 95 % bootstrap interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// 2.5th percentile.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
}

impl Interval {
    /// Half the width over `centre`.
    pub fn relative_half_width(&self, centre: f64) -> f64 {
        (self.high - self.low) / 2.0 / centre
    }
}

/// A sample in numbers, in the unit of the sample.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Samples.
    pub count: usize,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// p50.
    pub median: f64,
    /// Median absolute deviation from the median, unscaled.
    pub mad: f64,
    /// 90th percentile, from 10 samples on.
    pub p90: Option<f64>,
    /// 95th percentile, from 20 samples on.
    pub p95: Option<f64>,
    /// 99th percentile, from 100 samples on.
    pub p99: Option<f64>,
    /// 95 % interval of the median, from [`INTERVAL_MIN_SAMPLES`] on.
    pub interval: Option<Interval>,
    /// Places in the sample of those beyond median ± 5·1.4826·MAD.
    pub outliers: Vec<usize>,
}

impl Summary {
    /// The numbers of `samples`; `None` when there are none.
    ///
    /// ```
    /// let summary = roofbench_core::stats::Summary::of(&[3, 1, 2]).unwrap();
    /// assert_eq!((summary.median, summary.mad, summary.p90), (2.0, 1.0, None));
    /// ```
    pub fn of(samples: &[u64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let median = percentile(&sorted, 50.0);
        let mut deviations: Vec<f64> = sorted.iter().map(|x| (x - median).abs()).collect();
        deviations.sort_by(f64::total_cmp);
        let mad = percentile(&deviations, 50.0);
        let limit = OUTLIER_SIGMAS * MAD_TO_SIGMA * mad;
        let outliers = samples.iter().enumerate().filter(|&(_, &x)| (x as f64 - median).abs() > limit);
        let supported = |p: f64, least: usize| (sorted.len() >= least).then(|| percentile(&sorted, p));
        Some(Self {
            count: sorted.len(),
            min,
            max,
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            median,
            mad,
            p90: supported(90.0, 10),
            p95: supported(95.0, 20),
            p99: supported(99.0, 100),
            interval: interval_of_sorted(&sorted),
            outliers: outliers.map(|(place, _)| place).collect(),
        })
    }

    /// The same sample in another unit: every number times `factor`.
    pub fn scaled(&self, factor: f64) -> Self {
        let scale = |x: Option<f64>| x.map(|x| x * factor);
        Self {
            count: self.count,
            min: self.min * factor,
            max: self.max * factor,
            mean: self.mean * factor,
            median: self.median * factor,
            mad: self.mad * factor,
            p90: scale(self.p90),
            p95: scale(self.p95),
            p99: scale(self.p99),
            interval: self.interval.map(|i| Interval { low: i.low * factor, high: i.high * factor }),
            outliers: self.outliers.clone(),
        }
    }
}

/// Median; `None` for an empty sample.
pub fn median(samples: &[u64]) -> Option<f64> {
    let sorted = sorted(samples);
    (!sorted.is_empty()).then(|| percentile(&sorted, 50.0))
}

/// 95 % percentile-bootstrap interval of the median; `None` below [`INTERVAL_MIN_SAMPLES`].
pub fn median_interval(samples: &[u64]) -> Option<Interval> {
    interval_of_sorted(&sorted(samples))
}

/// Standard error of the median of a series in which neighbours may be alike, as the calls of one process are: circular
/// block bootstrap (Politis and Romano 1992) with blocks of ⌈√n⌉; `None` below [`INTERVAL_MIN_SAMPLES`].
///
/// ```
/// // the same eight values: neighbours that are alike say less about the median
/// let mixed = roofbench_core::stats::median_error(&[1.0, 9.0, 2.0, 8.0, 1.0, 9.0, 2.0, 8.0]).unwrap();
/// let sorted = roofbench_core::stats::median_error(&[1.0, 1.0, 2.0, 2.0, 8.0, 8.0, 9.0, 9.0]).unwrap();
/// assert!(sorted > mixed);
/// ```
pub fn median_error(series: &[f64]) -> Option<f64> {
    let n = series.len();
    if n < INTERVAL_MIN_SAMPLES {
        return None;
    }
    let block = (n as f64).sqrt().ceil() as usize;
    let mut random = SplitMix64(SEED);
    let mut drawn = Vec::with_capacity(n + block);
    let medians: Vec<f64> = (0..ERROR_RESAMPLES)
        .map(|_| {
            drawn.clear();
            while drawn.len() < n {
                let start = random.below(n);
                drawn.extend((start..start + block).map(|place| series[place % n]));
            }
            drawn.truncate(n);
            let (lower, &mut upper, _) = drawn.select_nth_unstable_by(n / 2, f64::total_cmp);
            match lower.iter().copied().max_by(f64::total_cmp) {
                Some(lower) if n.is_multiple_of(2) => (lower + upper) / 2.0,
                _ => upper,
            }
        })
        .collect();
    Some(variance(&medians).sqrt())
}

/// Sample variance; 0 for fewer than two values.
pub fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len().saturating_sub(1).max(1) as f64
}

/// Arithmetic mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn sorted(samples: &[u64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().map(|&x| x as f64).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Linear interpolation between order statistics (Hyndman and Fan's type 7) of a sorted sample that isn't empty.
/// The `p`-th percentile of `values` in any order, between two of them where it falls there; `None` of no values.
///
/// ```
/// # use roofbench_core::stats::percentile_of;
/// assert_eq!((percentile_of(&[4.0, 1.0, 2.0], 50.0), percentile_of(&[4.0, 1.0], 75.0)), (Some(2.0), Some(3.25)));
/// ```
pub fn percentile_of(values: &[f64], p: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (!sorted.is_empty()).then(|| percentile(&sorted, p))
}

/// A mean that a few values far off don't move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trimmed {
    /// Mean of what is left.
    pub mean: f64,
    /// Its standard error.
    pub error: f64,
    /// Degrees of freedom of Student's distribution that it follows.
    pub freedom: f64,
}

/// The mean without the `share` of the values at either end, its error from the values with those ends drawn in to the last
/// that are left (Tukey and McLaughlin 1963). NaN where fewer than two are left.
///
/// ```
/// # use roofbench_core::stats::trimmed_mean;
/// let trimmed = trimmed_mean(&[900.0, 1.0, 2.0, 3.0, -50.0], 0.2);
/// assert_eq!((trimmed.mean, trimmed.freedom), (2.0, 2.0));
/// ```
pub fn trimmed_mean(values: &[f64], share: f64) -> Trimmed {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (n, cut) = (sorted.len(), (share * sorted.len() as f64) as usize);
    let Some(left) = sorted.get(cut..n - cut).filter(|left| left.len() > 1) else {
        return Trimmed { mean: f64::NAN, error: f64::NAN, freedom: f64::NAN };
    };
    let (mean, freedom) = (self::mean(left), (left.len() - 1) as f64);
    let (low, high) = (left[0], left[left.len() - 1]);
    let drawn_in: Vec<f64> = sorted.iter().map(|value| value.clamp(low, high)).collect();
    let kept = left.len() as f64 / n as f64;
    Trimmed { mean, error: variance(&drawn_in).sqrt() / (kept * (n as f64).sqrt()), freedom }
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    let place = p / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

fn interval_of_sorted(sorted: &[f64]) -> Option<Interval> {
    let n = sorted.len();
    if n < INTERVAL_MIN_SAMPLES {
        return None;
    }
    let mut random = SplitMix64(SEED);
    let mut drawn = vec![0usize; n];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            // places in the sorted sample: their median is the place of the resample's median
            drawn.fill_with(|| random.below(n));
            let (lower, &mut upper, _) = drawn.select_nth_unstable(n / 2);
            match lower.iter().max() {
                Some(&lower) if n.is_multiple_of(2) => (sorted[lower] + sorted[upper]) / 2.0,
                _ => sorted[upper],
            }
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Some(Interval { low: percentile(&medians, 2.5), high: percentile(&medians, 97.5) })
}

/// Random numbers that are the same everywhere: Steele, Lea and Flood's SplitMix64 (OOPSLA 2014), from a seed.
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next 64 bits.
    #[expect(clippy::should_implement_trait, reason = "it never ends, and callers want no Option")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n` to within 2⁻⁶⁴·n (Lemire's multiply-and-shift without its rejection).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_sample_has_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(median(&[]), None);
        assert_eq!(median_interval(&[]), None);
    }

    #[test]
    fn one_sample_is_its_own_centre_and_has_no_interval() {
        let one = Summary::of(&[7]).unwrap();
        assert_eq!((one.count, one.min, one.max, one.mean, one.median, one.mad), (1, 7.0, 7.0, 7.0, 7.0, 0.0));
        assert_eq!((one.p90, one.p95, one.p99, one.interval), (None, None, None, None));
        assert!(one.outliers.is_empty());
    }

    #[test]
    fn worked_by_hand() {
        // sorted 1 2 4 4 100: median 4, deviations 0 0 2 3 96: MAD 2; limit 5·1.4826·2 = 14.8, so 100 is flagged
        let summary = Summary::of(&[4, 100, 2, 4, 1]).unwrap();
        assert_eq!((summary.median, summary.mad, summary.mean), (4.0, 2.0, 22.2));
        assert_eq!(summary.outliers, [1]);
        assert_eq!(summary.max, 100.0, "flagged, not dropped");
        // even count: mean of the middle two
        assert_eq!(median(&[1, 2, 3, 10]), Some(2.5));
        assert_eq!(median(&[5, 3, 9]), Some(5.0));
    }

    #[test]
    fn percentiles_by_hand_and_only_where_supported() {
        let upto = |n: u64| Summary::of(&(1..=n).collect::<Vec<_>>()).unwrap();
        assert_eq!((upto(9).p90, upto(19).p95, upto(99).p99), (None, None, None));
        // place 0.9·9 = 8.1, between 9 and 10
        assert!((upto(10).p90.unwrap() - 9.1).abs() < 1e-12);
        assert!((upto(20).p95.unwrap() - 19.05).abs() < 1e-12);
        assert!((upto(101).p99.unwrap() - 100.0).abs() < 1e-12);
    }

    #[test]
    fn a_trimmed_mean_worked_by_hand() {
        // 2 to 7 of 10 are left; 0 and 1 become 2, 8 and 100 become 7: variance 42.5 / 9, over (0.6·√10)²
        let Trimmed { mean, error, freedom } = trimmed_mean(&[8., 3., 0., 5., 100., 4., 6., 1., 7., 2.], 0.2);
        assert_eq!((mean, freedom), (4.5, 5.0));
        assert!((error * error - 42.5 / 9.0 / 3.6).abs() < 1e-12, "{error}");
        assert!(trimmed_mean(&[1.0], 0.2).mean.is_nan() && trimmed_mean(&[], 0.2).mean.is_nan());
    }

    #[test]
    fn interval_appears_where_the_range_covers_95_percent() {
        assert_eq!(median_interval(&[1, 2, 3, 4, 5]), None);
        assert!(median_interval(&[1, 2, 3, 4, 5, 6]).is_some());
        let constant = median_interval(&[9; 12]).unwrap();
        assert_eq!((constant.low, constant.high, constant.relative_half_width(9.0)), (9.0, 9.0, 0.0));
    }

    fn drawn(seed: u64, n: usize) -> Vec<u64> {
        let mut random = SplitMix64(seed);
        (0..n).map(|_| 1_000 + random.below(500) as u64).collect()
    }

    #[test]
    fn interval_holds_the_median_within_the_range() {
        for seed in 0..40 {
            let summary = Summary::of(&drawn(seed, 6 + seed as usize * 3)).unwrap();
            let interval = summary.interval.unwrap();
            assert!(summary.min <= interval.low && interval.high <= summary.max, "{summary:?}");
            assert!(interval.low <= summary.median && summary.median <= interval.high, "{summary:?}");
        }
    }

    #[test]
    fn interval_covers_the_true_median_as_often_as_it_says() {
        // uniform on 1000..1500: the true median is 1249.5
        let covered = (100..500)
            .filter(|&seed| {
                let interval = median_interval(&drawn(seed, 31)).unwrap();
                interval.low <= 1249.5 && 1249.5 <= interval.high
            })
            .count();
        // 95 % of 400, give or take the bootstrap's known bias and three standard errors
        assert!((366..=398).contains(&covered), "{covered} of 400");
    }

    #[test]
    fn interval_narrows_with_the_sample() {
        let width = |n| {
            let interval = median_interval(&drawn(1, n)).unwrap();
            interval.high - interval.low
        };
        assert!(width(400) < width(100) && width(100) < width(25));
    }

    #[test]
    fn everything_scales_with_the_unit_and_ignores_order() {
        let samples = drawn(3, 120);
        let summary = Summary::of(&samples).unwrap();
        let thousandfold: Vec<u64> = samples.iter().map(|x| x * 1024).collect();
        // a power of two scales floats exactly
        assert_eq!(Summary::of(&thousandfold).unwrap(), summary.scaled(1024.0));
        let mut reversed = samples.clone();
        reversed.reverse();
        let reversed = Summary::of(&reversed).unwrap();
        assert_eq!((reversed.interval, reversed.p99, reversed.mad), (summary.interval, summary.p99, summary.mad));
    }

    #[test]
    fn the_error_of_a_median_is_that_of_theory_and_grows_with_likeness() {
        // independent and uniform on 1000..1500: 1 / (2 f √n) = 250 / √400 = 12.5
        let independent = |seed| drawn(seed, 400).iter().map(|&x| x as f64).collect::<Vec<_>>();
        // each value ten times in a row: a tenth of the information, 39.5
        let repeated = |seed| drawn(seed, 40).iter().flat_map(|&x| [x as f64; 10]).collect::<Vec<_>>();
        let errors = |made: &dyn Fn(u64) -> Vec<f64>| (5..25).map(|seed| median_error(&made(seed)).unwrap()).collect();
        let (independent, repeated): (Vec<f64>, Vec<f64>) = (errors(&independent), errors(&repeated));
        assert!((11.0..14.0).contains(&mean(&independent)), "{independent:?}");
        assert!((30.0..45.0).contains(&mean(&repeated)), "{repeated:?}");
        assert_eq!(median_error(&[7.0; 6]), Some(0.0));
        assert_eq!(median_error(&[7.0; 5]), None);
        assert_eq!((variance(&[1.0, 3.0]), variance(&[1.0]), mean(&[])), (2.0, 0.0, 0.0));
    }

    #[test]
    fn splitmix_matches_its_reference_stream() {
        // first outputs for seed 1234567, from the authors' reference code
        let mut random = SplitMix64(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
