//! SVG plots. Colours are the page's own, so that a plot follows its light and its dark scheme.

use std::error::Error;

use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use roofbench_core::roofline::Ceiling;

use crate::format;

pub(super) type PlotResult<T> = Result<T, Box<dyn Error + Send + Sync>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 1060;
const FONT: u32 = 16;

/// Colours that the plotting library writes, and what stands for each of them in the page.
const COLOURS: [(RGBColor, &str); 7] = [
    (INK, "currentColor"),
    (MUTED, "var(--muted)"),
    (GRID, "var(--grid)"),
    (BLUE_, "var(--blue)"),
    (ORANGE, "var(--orange)"),
    (GREEN_, "var(--green)"),
    (CARD, "var(--card)"),
];
const INK: RGBColor = RGBColor(1, 1, 1);
const MUTED: RGBColor = RGBColor(2, 2, 2);
const GRID: RGBColor = RGBColor(3, 3, 3);
const BLUE_: RGBColor = RGBColor(4, 4, 4);
const ORANGE: RGBColor = RGBColor(5, 5, 5);
const GREEN_: RGBColor = RGBColor(6, 6, 6);
const CARD: RGBColor = RGBColor(7, 7, 7);

/// Draws into a string and hands it over as an inline SVG of the page. `name` is read to those who can't see it.
fn svg(name: &str, height: u32, draw: impl FnOnce(&Area<'_>) -> PlotResult<()>) -> PlotResult<String> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    draw(&root)?;
    root.present()?;
    drop(root);
    // text is escaped by the backend, so a quote is the start of an attribute's value
    for (RGBColor(r, g, b), css) in COLOURS {
        svg = svg.replace(&format!("=\"#{r:02X}{g:02X}{b:02X}\""), &format!("=\"{css}\""));
    }
    let size = format!("<svg width=\"{WIDTH}\" height=\"{height}\"");
    Ok(svg.replacen(&size, &format!("<svg role=\"img\" aria-label=\"{}\"", super::escape(name)), 1))
}

fn style(size: u32, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour).pos(Pos::new(h, v))
}

/// Cuts what would not fit, by the width of an average letter.
fn fit(text: &str, pixels: i32) -> String {
    let most = (pixels / 7).max(4) as usize;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// About as wide as `text` is drawn.
fn text_width(text: &str) -> i32 {
    text.chars().count() as i32 * 13 / 2 + 6
}

const LABEL: i32 = 290;
const VALUE: i32 = 170;
const ROW: i32 = 28;

/// A bar of a bar chart.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) value: f64,
    pub(super) text: String,
}

/// Horizontal bars from 0, each with its name before and its value behind it.
pub(super) fn bars(name: &str, bars: &[Bar]) -> PlotResult<String> {
    let longest = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
    let room = f64::from(WIDTH as i32 - LABEL - VALUE);
    svg(name, (bars.len() as i32 * ROW + 8) as u32, |root| {
        for (place, bar) in bars.iter().enumerate() {
            let middle = place as i32 * ROW + ROW / 2 + 4;
            let length = if longest > 0.0 { (bar.value / longest * room).round() as i32 } else { 0 };
            label(root, &bar.label, middle)?;
            let corners = [(LABEL, middle - 8), (LABEL + length.max(1), middle + 8)];
            root.draw(&Rectangle::new(corners, BLUE_.filled()))?;
            text_at(root, &bar.text, (LABEL + length + 8, middle), style(FONT, INK, HPos::Left, VPos::Center))?;
        }
        line(root, (LABEL, 2), (LABEL, bars.len() as i32 * ROW + 6), MUTED)
    })
}

fn label(root: &Area<'_>, text: &str, middle: i32) -> PlotResult<()> {
    text_at(root, &fit(text, LABEL - 12), (LABEL - 12, middle), style(FONT, INK, HPos::Right, VPos::Center))
}

fn text_at(root: &Area<'_>, text: &str, at: (i32, i32), style: TextStyle<'_>) -> PlotResult<()> {
    Ok(root.draw(&Text::new(text.to_owned(), at, style))?)
}

fn line(root: &Area<'_>, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> PlotResult<()> {
    Ok(root.draw(&PathElement::new([from, to], colour))?)
}

/// Raw times of one cell, as multiples of their median.
pub(super) struct Strip {
    pub(super) label: String,
    pub(super) text: String,
    pub(super) ratios: Vec<f64>,
    /// Places of flagged outliers.
    pub(super) outliers: Vec<usize>,
    /// MAD over median.
    pub(super) mad: f64,
}

/// The scale reaches to half and double the median at most.
const STRIP_LIMITS: (f64, f64) = (0.5, 2.0);
/// Percent of all samples at each end that the scale need not reach.
const STRIP_SPARE: usize = 2;
/// More dots than these are not told apart.
const MOST_DOTS: usize = 240;

/// Every cell's samples around its own median: dots are samples, the box is median ± MAD, rings are flagged outliers.
pub(super) fn strips(name: &str, strips: &[Strip]) -> PlotResult<String> {
    let mut all: Vec<f64> = strips.iter().flat_map(|strip| strip.ratios.iter().copied()).collect();
    all.sort_by(f64::total_cmp);
    // a few far samples must not squeeze all others together
    let spare = all.len() * STRIP_SPARE / 100;
    let low = all.get(spare).copied().unwrap_or(1.0).clamp(STRIP_LIMITS.0, 0.95);
    let high = all.get(all.len().saturating_sub(1 + spare)).copied().unwrap_or(1.0).clamp(1.05, STRIP_LIMITS.1);
    let step = [0.01, 0.02, 0.05, 0.1, 0.2].into_iter().find(|step| (high - low) / step <= 8.0).unwrap_or(0.25);
    let (low, high) = ((low / step + 1e-9).floor() * step, (high / step - 1e-9).ceil() * step);
    let room = f64::from(WIDTH as i32 - LABEL - VALUE);
    let x = |ratio: f64| LABEL + 10 + ((ratio.clamp(low, high) - low) / (high - low) * (room - 20.0)).round() as i32;
    let bottom = strips.len() as i32 * ROW + 6;
    svg(name, (bottom + 34) as u32, |root| {
        for tick in 0..=((high - low) / step).round() as i32 {
            let ratio = low + f64::from(tick) * step;
            let change = ((ratio - 1.0) * 100.0).round();
            let text = if change == 0.0 { "median".to_owned() } else { format!("{change:+.0} %").replace('-', "−") };
            line(root, (x(ratio), 2), (x(ratio), bottom), if change == 0.0 { MUTED } else { GRID })?;
            text_at(root, &text, (x(ratio), bottom + 8), style(FONT - 2, MUTED, HPos::Center, VPos::Top))?;
        }
        for (place, strip) in strips.iter().enumerate() {
            let middle = place as i32 * ROW + ROW / 2 + 2;
            label(root, &strip.label, middle)?;
            let corners = [(x(1.0 - strip.mad), middle - 9), (x(1.0 + strip.mad), middle + 9)];
            root.draw(&Rectangle::new(corners, BLUE_.mix(0.18).filled()))?;
            let every = strip.ratios.len().div_ceil(MOST_DOTS).max(1);
            for (number, &ratio) in strip.ratios.iter().enumerate() {
                let outlier = strip.outliers.contains(&number);
                if number % every != 0 && !outlier {
                    continue;
                }
                // spread over the height in a fixed pattern, so that equal times stay visible
                let at = (x(ratio), middle + (number * 5 % 11) as i32 - 5);
                if outlier {
                    root.draw(&Circle::new(at, 4, ORANGE.stroke_width(2)))?;
                } else {
                    root.draw(&Circle::new(at, 2, BLUE_.mix(0.7).filled()))?;
                }
            }
            line(root, (x(1.0), middle - 10), (x(1.0), middle + 10), INK)?;
            let at = (WIDTH as i32 - VALUE + 8, middle);
            text_at(root, &strip.text, at, style(FONT, INK, HPos::Left, VPos::Center))?;
        }
        Ok(())
    })
}

/// A phase under the roofline; `number` refers to the table below the plot.
pub(super) struct Point {
    pub(super) number: usize,
    pub(super) label: String,
    pub(super) intensity: f64,
    pub(super) flops: f64,
    pub(super) memory_bound: bool,
}

/// More phases than these get a number instead of their name.
const MOST_NAMES: usize = 12;
/// Places along a ceiling that labels keep clear of.
const STEPS: i32 = 200;

/// Ceilings and phases of one machine, both axes logarithmic.
pub(super) fn roofline(name: &str, ceilings: &[Ceiling], points: &[Point]) -> PlotResult<String> {
    let all = |of_point: fn(&Point) -> f64, of_ceiling: fn(&Ceiling) -> f64| {
        let ends = ceilings.iter().map(of_ceiling).flat_map(|ridge| [ridge / 10.0, ridge]);
        points.iter().map(of_point).chain(ends).collect::<Vec<f64>>()
    };
    let (left, right) = decades(&all(|p| p.intensity, Ceiling::ridge_point));
    let (bottom, top) = decades(&all(|p| p.flops, |c| c.flops));
    svg(name, 560, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(52)
            .y_label_area_size(110)
            .build_cartesian_2d((left..right).log_scale(), (bottom..top).log_scale())?;
        drawn(&mut chart.configure_mesh())
            .x_desc("arithmetic intensity, FLOP per byte")
            .x_label_formatter(&|x| power_of_ten(*x, |x| format!("{x}")))
            .y_label_formatter(&|y| power_of_ten(*y, tick))
            .draw()?;
        for ceiling in ceilings {
            let start = left.max(bottom / ceiling.bytes_per_second);
            let corners = [start, ceiling.ridge_point().clamp(start, right), right].map(|x| (x, ceiling.attainable(x)));
            chart.draw_series(LineSeries::new(corners, INK.stroke_width(2)))?;
        }
        let place = |x: f64, y: f64| chart.backend_coord(&(x, y));
        // labels keep clear of marks, of lines (in small steps along them) and of each other
        let mut taken: Vec<Frame> = points.iter().map(|p| Frame::around(place(p.intensity, p.flops), 7, 7)).collect();
        for ceiling in ceilings {
            let along = (0..=STEPS).map(|n| left * (right / left).powf(f64::from(n) / f64::from(STEPS)));
            taken.extend(along.map(|x| Frame::around(place(x, ceiling.attainable(x)), 3, 2)));
        }
        for ceiling in ceilings {
            let text = format!(
                "{}, {} thread{}: {}, {}",
                ceiling.dtype,
                ceiling.threads,
                if ceiling.threads == 1 { "" } else { "s" },
                format::si(ceiling.flops, "FLOP/s"),
                format::si(ceiling.bytes_per_second, "B/s"),
            );
            let (end, height) = place(right, ceiling.flops);
            let half = text_width(&text) / 2;
            // the nearest free place above or below the right end of its line
            let lifts = (0..8).flat_map(|n| [14 + n * 20, -14 - n * 20]);
            let mut frames = lifts.map(|lift| Frame::around((end - half - 4, height - lift), half, 9));
            let nearest = Frame::around((end - half - 4, height - 14), half, 9);
            let frame = frames.find(|frame| frame.is_free(&taken)).unwrap_or(nearest);
            taken.push(frame);
            text_at(root, &text, frame.centre, style(FONT, INK, HPos::Center, VPos::Center))?;
        }
        let named = points.len() <= MOST_NAMES;
        for point in points {
            let at = place(point.intensity, point.flops);
            let colour = if point.memory_bound { ORANGE } else { GREEN_ };
            let text = if named { point.label.clone() } else { point.number.to_string() };
            let half = text_width(&text) / 2 + 2;
            let frames = Frame::beside(at, half, 9);
            let frame = frames.iter().find(|frame| frame.is_free(&taken));
            let frame = *frame.unwrap_or(&frames[0]);
            taken.push(frame);
            root.draw(&PathElement::new([at, frame.centre], MUTED.mix(0.5)))?;
            root.draw(&Circle::new(at, 6, colour.filled()))?;
            let corners = [(frame.centre.0 - half, frame.centre.1 - 9), (frame.centre.0 + half, frame.centre.1 + 9)];
            // the page's colour behind the number, so that no line runs through it
            root.draw(&Rectangle::new(corners, CARD.filled()))?;
            text_at(root, &text, frame.centre, style(FONT, INK, HPos::Center, VPos::Center))?;
        }
        Ok(())
    })
}

/// Whole decades around `values`, with some room.
fn decades(values: &[f64]) -> (f64, f64) {
    let (low, high) = values.iter().fold((f64::INFINITY, 0.0), |(low, high), &v| (v.min(low), v.max(high)));
    let low = (low.log10() - 0.05).floor();
    (10f64.powf(low), 10f64.powf((high.log10() + 0.15).ceil().max(low + 1.0)))
}

/// A rectangle that a mark or a label takes.
#[derive(Clone, Copy)]
struct Frame {
    centre: (i32, i32),
    half: (i32, i32),
}

impl Frame {
    fn around(centre: (i32, i32), width: i32, height: i32) -> Self {
        Self { centre, half: (width, height) }
    }

    fn is_free(&self, taken: &[Self]) -> bool {
        taken.iter().all(|other| !self.meets(other))
    }

    fn meets(&self, other: &Self) -> bool {
        (self.centre.0 - other.centre.0).abs() < self.half.0 + other.half.0
            && (self.centre.1 - other.centre.1).abs() < self.half.1 + other.half.1
    }

    /// Places around a mark, the nearest first.
    fn beside(mark: (i32, i32), width: i32, height: i32) -> Vec<Self> {
        let directions = [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)];
        let at = |gap: i32| {
            directions
                .map(|(x, y)| Self::around((mark.0 + x * (width + gap), mark.1 + y * (height + gap)), width, height))
        };
        (0..12).flat_map(|ring| at(9 + ring * 9)).collect()
    }
}

fn power_of_ten(value: f64, show: impl Fn(f64) -> String) -> String {
    let power = value.log10().round();
    if (value.log10() - power).abs() < 1e-6 { show(10f64.powf(power)) } else { String::new() }
}

/// A power of ten as `100 GFLOP/s`, without digits that say nothing.
fn tick(flops: f64) -> String {
    let scale =
        [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")].into_iter().find(|(s, _)| flops >= s * 0.999);
    let (scale, prefix) = scale.unwrap_or((1.0, ""));
    format!("{:.0} {prefix}FLOP/s", flops / scale)
}

/// Grid and axes as all charts have them.
fn drawn<'m, 'a, 'b, X, Y, B>(mesh: &'m mut MeshStyle<'a, 'b, X, Y, B>) -> &'m mut MeshStyle<'a, 'b, X, Y, B>
where
    X: Ranged,
    Y: Ranged,
    B: DrawingBackend,
{
    mesh.bold_line_style(GRID)
        .light_line_style(GRID.mix(0.4))
        .axis_style(MUTED)
        .label_style(("sans-serif", FONT).into_font().color(&MUTED))
        .axis_desc_style(("sans-serif", FONT).into_font().color(&INK))
}

/// Shares over time, in seconds.
pub(super) struct Curve {
    pub(super) label: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Lines over time with 1 as their common level, each named at its end.
pub(super) fn curves(name: &str, curves: &[Curve]) -> PlotResult<String> {
    const LINES: [RGBColor; 4] = [BLUE_, MUTED, ORANGE, GREEN_];
    let all = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let end = all().map(|(x, _)| x).fold(f64::MIN_POSITIVE, f64::max);
    let low = all().map(|(_, y)| y).fold(0.95, f64::min);
    let high = all().map(|(_, y)| y).fold(1.05, f64::max);
    svg(name, 320, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(VALUE)
            .x_label_area_size(48)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..end, low..high)?;
        drawn(&mut chart.configure_mesh())
            .x_desc("seconds")
            .y_label_formatter(&|y| format!("{:.0} %", 100.0 * y))
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, 1.0), (end, 1.0)], INK.stroke_width(1)))?;
        // names keep a line of text apart
        let mut lowest = i32::MIN;
        let mut ends: Vec<(i32, usize)> = curves
            .iter()
            .enumerate()
            .filter_map(|(place, curve)| Some((chart.backend_coord(curve.points.last()?).1, place)))
            .collect();
        for (curve, colour) in curves.iter().zip(LINES) {
            chart.draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?;
        }
        ends.sort_unstable();
        for (height, place) in ends {
            lowest = height.max(lowest.saturating_add(FONT as i32 + 2));
            let at = (WIDTH as i32 - VALUE + 8, lowest);
            text_at(root, &curves[place].label, at, style(FONT, LINES[place % 4], HPos::Left, VPos::Center))?;
        }
        Ok(())
    })
}
