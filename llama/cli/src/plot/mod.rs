//! Plots as SVG: lines with bands in a frame with round ticks. Colours are classes (`style.css`), so
//! that one drawing suits light and dark screens.

mod axis;
mod thin;

use std::fmt::Write as _;

use maud::{Markup, html};

pub(crate) use axis::{Axis, Scale};
pub(crate) use thin::thin;

/// The colours and dashes of plots.
pub(crate) const STYLE: &str = include_str!("style.css");
/// Lines that one plot shows: as many as there are colours and dashes.
pub(crate) const MOST_LINES: usize = 6;

/// A line of a plot, by ascending x.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
    /// For some x, the smallest and the largest of the values that the line is the mean of.
    pub(crate) band: Vec<(f64, f64, f64)>,
}

/// The axes that the lines of a plot share.
pub(crate) struct Axes {
    pub(crate) x: Axis,
    pub(crate) y: Axis,
}

/// Where the frame of a plot lies in its drawing, in pixels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

/// Pixels of a column in which two points of a line stay.
const COLUMN: f64 = 2.0;
/// Pixels between two ticks, at least.
const BETWEEN_TICKS: (f64, f64) = (56.0, 30.0);
/// A line of at most so many points has marks at them.
const MOST_MARKS: usize = 12;
/// Room above and below the lines, as a share of the axis.
const MARGIN: f64 = 0.05;

impl Axes {
    /// Axes that have every point and band of `lines`; x begins at 0, and y where `from_zero`. None
    /// where no point has a place.
    pub(crate) fn of<'l>(lines: impl Iterator<Item = &'l Line> + Clone, scale: Scale, from_zero: bool) -> Option<Axes> {
        let zero = from_zero.then_some(0.0).into_iter();
        let points = || lines.clone().flat_map(|line| &line.points);
        let bands = lines.clone().flat_map(|line| line.band.iter().flat_map(|&(_, low, high)| [low, high]));
        let y = Axis::of(points().map(|point| point.1).chain(bands).chain(zero), scale)?.with_margin(MARGIN);
        let y = if from_zero { Axis { low: 0.0, ..y } } else { y };
        let x = Axis::of(points().map(|point| point.0).chain([0.0]), Scale::Linear)?;
        points().any(|&(x, y)| x.is_finite() && y.is_finite()).then_some(Axes { x, y })
    }

    /// Number of points of `lines` that have no place: on a logarithmic axis those of zero or less,
    /// on any axis those that are not finite.
    pub(crate) fn without_place<'l>(&self, lines: impl Iterator<Item = &'l Line>) -> usize {
        lines.flat_map(|line| &line.points).filter(|point| !self.has_place(point)).count()
    }

    fn has_place(&self, &(x, y): &(f64, f64)) -> bool {
        x.is_finite() && self.y.scale.has(y)
    }

    fn pixels(&self, frame: Frame, x: f64, y: f64) -> (f64, f64) {
        let Frame { left, top, width, height } = frame;
        (left + self.x.place(x) * width, top + (1.0 - self.y.place(y)) * height)
    }
}

/// Draws a frame with ticks, and the names of the axes.
pub(crate) fn frame(axes: &Axes, frame: Frame, x: &str, y: &str) -> Markup {
    let Frame { left, top, width, height } = frame;
    let (right, bottom) = (left + width, top + height);
    let at = |pixels: f64| round(pixels);
    html! {
        @for tick in axes.y.ticks((height / BETWEEN_TICKS.1) as usize) {
            @let y = axes.pixels(frame, 0.0, tick.value).1;
            path class="grid" d=(format!("M{} {}H{}", at(left), at(y), at(right))) {}
            text class="y tick" x=(at(left - 6.0)) y=(at(y + 4.0)) { (tick.label) }
        }
        @for tick in axes.x.ticks((width / BETWEEN_TICKS.0) as usize) {
            @let x = axes.pixels(frame, tick.value, axes.y.low).0;
            path class="axis" d=(format!("M{} {}v5", at(x), at(bottom))) {}
            text class="x tick" x=(at(x)) y=(at(bottom + 17.0)) { (tick.label) }
        }
        path class="axis" d=(format!("M{} {}V{}H{}", at(left), at(top), at(bottom), at(right))) {}
        text class="x name" x=(at(left + width / 2.0)) y=(at(bottom + 33.0)) { (x) }
        text class="y name" x="2" y=(at(top - 9.0)) { (y) }
    }
}

/// Draws a line with its band, in the colour and with the dashes of `slot`, one of [`MOST_LINES`];
/// without a slot it is there, but not shown. `number` tells the lines of a page apart. `points`
/// says whether the drawing has the values of the points too, for a script.
pub(crate) fn line(axes: &Axes, frame: Frame, line: &Line, slot: Option<usize>, number: usize, points: bool) -> Markup {
    let column = |x: f64| (axes.x.place(x) * frame.width / COLUMN) as usize;
    let placed: Vec<(f64, f64)> = line.points.iter().copied().filter(|point| axes.has_place(point)).collect();
    let kept = thin(&placed, column);
    let class = class(slot);
    let pixels = |&(x, y): &(f64, f64)| axes.pixels(frame, x, y);
    html! {
        g class=(class) data-line=(number) data-points=[points.then(|| values(&kept))] {
            @if let Some(band) = band(axes, frame, &line.band, column) {
                path class="band" d=(band) {}
            }
            path class="line" d=(path(kept.iter().map(pixels))) {}
            @if kept.len() <= MOST_MARKS {
                @for (x, y) in kept.iter().map(pixels) {
                    circle class="mark" cx=(round(x)) cy=(round(y)) r="2.5" {}
                }
            }
        }
    }
}

/// The classes of what belongs to a line.
pub(crate) fn class(slot: Option<usize>) -> String {
    slot.map_or("of off".to_owned(), |slot| format!("of s{slot}"))
}

/// A piece of a line in the look of `slot`, for a legend.
pub(crate) fn swatch(slot: Option<usize>, number: usize, x: f64, y: f64) -> Markup {
    html! {
        g class=(class(slot)) data-line=(number) { path class="line" d=(format!("M{} {}h28", round(x), round(y))) {} }
    }
}

/// A path through pixels.
fn path(pixels: impl Iterator<Item = (f64, f64)>) -> String {
    let mut text = String::new();
    for (index, (x, y)) in pixels.enumerate() {
        let (command, x, y) = (if index == 0 { "M" } else { "L" }, round(x), round(y));
        write!(text, "{command}{x} {y}").expect("text grows");
    }
    text
}

/// The outline of a band, widest in each column; none where no part of it has a place.
fn band(axes: &Axes, frame: Frame, band: &[(f64, f64, f64)], column: impl Fn(f64) -> usize) -> Option<String> {
    let has_place = |&&(x, low, high): &&(f64, f64, f64)| axes.has_place(&(x, low)) && axes.has_place(&(x, high));
    let mut wide: Vec<(f64, f64, f64)> = Vec::new();
    for &(x, low, high) in band.iter().filter(has_place) {
        match wide.last_mut() {
            Some(last) if column(last.0) == column(x) => *last = (last.0, last.1.min(low), last.2.max(high)),
            _ => wide.push((x, low, high)),
        }
    }
    let lower = wide.iter().map(|&(x, low, _)| axes.pixels(frame, x, low));
    let upper = wide.iter().rev().map(|&(x, _, high)| axes.pixels(frame, x, high));
    (!wide.is_empty()).then(|| format!("{}Z", path(lower.chain(upper))))
}

/// The values of points, as a script reads them: x y x y …
fn values(points: &[(f64, f64)]) -> String {
    let mut text = String::new();
    for &(x, y) in points {
        let space = if text.is_empty() { "" } else { " " };
        write!(text, "{space}{} {}", number(x, 9), number(y, 6)).expect("text grows");
    }
    text
}

/// A number with at most `digits` digits that count.
pub(crate) fn number(value: f64, digits: usize) -> String {
    let rounded: f64 = format!("{value:.*e}", digits - 1).parse().expect("it is a number");
    let is_short = rounded == 0.0 || (1e-4..1e15).contains(&rounded.abs());
    if is_short { format!("{}", rounded + 0.0) } else { format!("{rounded:e}") }
}

/// Tenths of a pixel are enough.
fn round(pixels: f64) -> f64 {
    (pixels * 10.0).round() / 10.0 + 0.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: Frame = Frame { left: 40.0, top: 20.0, width: 300.0, height: 200.0 };

    /// The numbers of a drawn path.
    fn coordinates(svg: &str) -> Vec<f64> {
        let paths = svg.split(" d=\"").skip(1).map(|rest| rest.split('"').next().unwrap());
        let words = paths.flat_map(|path| path.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-')));
        words.filter(|word| !word.is_empty()).map(|word| word.parse().unwrap()).collect()
    }

    proptest! {
        /// Whatever the values are, what is drawn lies in the frame.
        #[test]
        fn lines_lie_in_their_frame(
            values in prop::collection::vec(proptest::num::f64::ANY, 1..200),
            is_log: bool,
            from_zero: bool,
        ) {
            let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            let band = points.iter().map(|&(x, y)| (x, y, y)).collect();
            let drawn = Line { name: "run".to_owned(), points, band };
            let (scale, from_zero) = if is_log { (Scale::Log, false) } else { (Scale::Linear, from_zero) };
            let from_zero = from_zero && values.iter().all(|value| *value >= 0.0);
            let lines = [&drawn];
            let Some(axes) = Axes::of(lines.iter().copied(), scale, from_zero) else {
                prop_assert!(!values.iter().any(|value| scale.has(*value)));
                return Ok(());
            };
            let svg = line(&axes, FRAME, &drawn, Some(0), 0, true).into_string();
            for value in coordinates(&svg) {
                prop_assert!((0.0..=340.5).contains(&value), "{value} in {svg}");
            }
            let without = values.iter().filter(|value| !scale.has(**value)).count();
            prop_assert_eq!(axes.without_place(lines.into_iter()), without);
        }

        #[test]
        fn numbers_keep_their_digits(value in proptest::num::f64::NORMAL) {
            let read: f64 = number(value, 6).parse().unwrap();
            prop_assert!((read / value - 1.0).abs() < 1e-5, "{}", number(value, 6));
            prop_assert!(number(value, 6).len() <= 24);
        }
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (-0.0, "0"), (100.0, "100"), (1.720_71, "1.72071"), (1e-7, "1e-7"), (3e-4, "0.0003")];
        for (value, text) in cases {
            assert_eq!(number(value, 6), text);
        }
    }

    #[test]
    fn a_long_line_has_two_points_a_column() {
        let points: Vec<(f64, f64)> = (0..100_000).map(|x| (f64::from(x), f64::from(x % 977))).collect();
        let drawn = Line { name: "run".to_owned(), points, band: Vec::new() };
        let axes = Axes::of([&drawn].into_iter(), Scale::Linear, true).unwrap();
        let svg = line(&axes, FRAME, &drawn, Some(0), 0, false).into_string();
        assert!(coordinates(&svg).len() < 2 * (2 * 151 + 2), "{}", svg.len());
    }
}
