//! Numbers for people: three significant digits, the prefix that fits.

use roofbench_core::meters::Quantity;
use roofbench_core::stats::Summary;

/// What stands where there is no number.
pub(crate) const NONE: &str = "–";

/// Three significant digits without an exponent: `1234`, `123`, `12.3`, `0.0123`.
pub(crate) fn significant(value: f64) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = |value: f64| (2 - value.abs().log10().floor() as i32).clamp(0, 12) as usize;
    // 9.999 rounds to 10.00, which needs a digit less
    let rounded: f64 = format!("{value:.*}", digits(value)).parse().unwrap_or(value);
    let places = if rounded == 0.0 { digits(value) } else { digits(rounded) };
    format!("{value:.places$}")
}

/// With a decimal prefix: `212 GFLOP/s`.
pub(crate) fn si(value: f64, unit: &str) -> String {
    let scales = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")];
    scaled(value, unit, &scales, (1e-9, "n"))
}

/// Seconds: `1.23 s`, `116 ms`.
pub(crate) fn seconds(value: f64) -> String {
    scaled(value, "s", &[(1.0, ""), (1e-3, "m"), (1e-6, "µ")], (1e-9, "n"))
}

/// Bytes with a binary prefix: `1.23 GiB`.
pub(crate) fn bytes(value: f64) -> String {
    let scales = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")].map(|(power, prefix)| (2f64.powi(power), prefix));
    scaled(value, "B", &scales, (1.0, ""))
}

/// With the first scale that leaves at least 1 (as rounded), else with `last`.
fn scaled(value: f64, unit: &str, scales: &[(f64, &str)], last: (f64, &str)) -> String {
    let fits = |(scale, _): &&(f64, &str)| value.abs() / scale >= 0.9995;
    let (scale, prefix) = match scales.iter().find(fits) {
        Some(&found) => found,
        None if value == 0.0 => (1.0, ""),
        None => last,
    };
    format!("{} {prefix}{unit}", significant(value / scale))
}

/// A fraction as `64 %`, `6.4 %`.
pub(crate) fn percent(fraction: f64) -> String {
    let percent = fraction * 100.0;
    match percent.abs() {
        x if !x.is_finite() => NONE.to_owned(),
        x if x >= 9.95 => format!("{percent:.0} %"),
        x if x >= 0.095 => format!("{percent:.1} %"),
        _ => format!("{percent:.2} %"),
    }
}

/// `116 ms ±1.3 %`, the 95 % interval of the median; the number of samples where they are too few for one.
pub(crate) fn median(summary: &Summary) -> String {
    let certainty = match summary.interval {
        Some(interval) => format!("±{}", percent(interval.relative_half_width(summary.median))),
        None => format!("(n = {})", summary.count),
    };
    format!("{} {certainty}", seconds(summary.median))
}

/// A quantity by `show`, an estimate marked with `≈`; a dash where there is none.
pub(crate) fn quantity(quantity: &Quantity, show: impl Fn(f64) -> String) -> String {
    match quantity {
        Quantity::Measured { value } | Quantity::Derived { value, .. } => show(*value),
        Quantity::Estimated { value, .. } => format!("≈{}", show(*value)),
        Quantity::Unavailable { .. } => NONE.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_significant_digits() {
        let cases = [
            (1234.4, "1234"),
            (123.45, "123"),
            (12.345, "12.3"),
            (1.2345, "1.23"),
            (0.012345, "0.0123"),
            (9.999, "10.0"),
            (99.96, "100"),
            (0.0, "0"),
            (-2.5, "-2.50"),
            (f64::NAN, "–"),
            (1e-30, "0.000000000000"),
        ];
        for (value, expected) in cases {
            assert_eq!(significant(value), expected);
        }
    }

    #[test]
    fn prefixes() {
        assert_eq!(seconds(1.234), "1.23 s");
        assert_eq!(seconds(0.1164), "116 ms");
        assert_eq!(seconds(0.9999e-3), "1.00 ms");
        assert_eq!(seconds(3.2e-7), "320 ns");
        assert_eq!(seconds(754.0), "754 s");
        assert_eq!(si(2.12e11, "FLOP/s"), "212 GFLOP/s");
        assert_eq!(si(0.0, "J"), "0 J");
        assert_eq!(bytes(536_870_912.0), "512 MiB");
        assert_eq!(bytes(1.5 * 1_073_741_824.0), "1.50 GiB");
        assert_eq!(bytes(100.0), "100 B");
    }

    #[test]
    fn percents() {
        assert_eq!(
            [percent(0.642), percent(0.0642), percent(0.0004), percent(1.2)],
            ["64 %", "6.4 %", "0.04 %", "120 %"]
        );
    }

    #[test]
    fn medians_and_quantities() {
        let summary = |n: usize| Summary::of(&vec![100_000_000; n]).unwrap().scaled(1e-9);
        assert_eq!(median(&summary(10)), "100 ms ±0.00 %");
        assert_eq!(median(&summary(1)), "100 ms (n = 1)");
        let estimated = Quantity::Estimated { value: 2.0, method: "data sheet".into() };
        assert_eq!(quantity(&estimated, |v| si(v, "J")), "≈2.00 J");
        assert_eq!(quantity(&Quantity::Unavailable { reason: "no meter".into() }, bytes), "–");
    }
}
