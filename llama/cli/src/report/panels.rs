//! The plots of a report.

use maud::{Markup, html};

use super::groups::{Group, points, smoothed};
use super::runs::{Run, Step};
use crate::plot::{Axes, Frame, Line, MOST_LINES, Scale, frame, line, number};

/// Share of a run's samples over which noisy values are averaged.
pub(super) const SMOOTH: f64 = 0.01;

/// What a plot has along its x axis.
#[derive(Clone, Copy, PartialEq)]
enum X {
    Samples,
    Tokens,
    Time,
}

/// A plot of the report.
struct Panel {
    title: &'static str,
    unit: &'static str,
    x: X,
    y: fn(&Step) -> Option<f64>,
    scale: Scale,
    from_zero: bool,
    /// Whether the values are averaged over steps.
    smooth: bool,
}

const fn panel(title: &'static str, unit: &'static str, y: fn(&Step) -> Option<f64>) -> Panel {
    Panel { title, unit, x: X::Samples, y, scale: Scale::Linear, from_zero: false, smooth: false }
}

const TRAINING: Panel =
    Panel { smooth: true, ..panel("Training loss by samples", "nats a token", |step| Some(step.loss)) };
const VALIDATION: Panel = panel("Validation loss by samples", "nats a token", |step| step.validation);
const SPEED: Panel = Panel { smooth: true, from_zero: true, ..panel("", "", |_| None) };

/// Every plot, in the order of the page.
const PANELS: [Panel; 13] = [
    TRAINING,
    Panel { title: "Training loss by tokens", x: X::Tokens, ..TRAINING },
    Panel { title: "Training loss by time", x: X::Time, ..TRAINING },
    VALIDATION,
    Panel { title: "Validation loss by tokens", x: X::Tokens, ..VALIDATION },
    Panel { title: "Validation loss by time", x: X::Time, ..VALIDATION },
    Panel { scale: Scale::Log, ..panel("Batch", "samples", |step| Some(step.batch)) },
    Panel { scale: Scale::Log, ..panel("Gradient noise scale", "samples", |step| step.noise) },
    Panel { from_zero: true, ..panel("Learning rate", "", |step| Some(step.lr)) },
    Panel { title: "Throughput", unit: "tokens/s", y: |step| Some(step.tokens_per_s), ..SPEED },
    Panel { title: "Model FLOP utilisation (mfu)", unit: "% of the peak", y: |step| step.mfu, ..SPEED },
    Panel { title: "Exposed communication", unit: "% of a step", y: |step| step.exposed, ..SPEED },
    Panel { from_zero: true, ..panel("Memory of rank 0", "bytes", |step| step.memory) },
];

/// A plot on the page: what it shows, and a drawing of it.
pub(super) struct Drawn {
    pub(super) title: &'static str,
    pub(super) svg: Markup,
    /// What the drawing does not show.
    pub(super) note: Option<String>,
}

/// Draws every plot that has a value; the others' titles come second.
pub(super) fn draw(groups: &[Group]) -> (Vec<Drawn>, Vec<&'static str>) {
    let (mut drawn, mut empty) = (Vec::new(), Vec::new());
    for (number, panel) in PANELS.iter().enumerate() {
        match panel.draw(&format!("plot-{number}"), groups) {
            Some(plot) => drawn.push(plot),
            None => empty.push(panel.title),
        }
    }
    (drawn, empty)
}

/// Whether the page is of one run, whose steps are drawn as a band around their average.
pub(super) fn has_steps(groups: &[Group]) -> bool {
    matches!(groups, [only] if only.runs.len() == 1)
}

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 250.0;
const FRAME: Frame = Frame { left: 50.0, top: 24.0, width: 346.0, height: 184.0 };

impl Panel {
    fn draw(&self, id: &str, groups: &[Group]) -> Option<Drawn> {
        let (x_unit, x_name) = self.x_unit(groups);
        let (y_unit, y_name) = self.y_unit(groups);
        let x = |step: &Step| self.x(step) / x_unit;
        let line_of = |run: &Run| match self.smooth {
            true => {
                let values = smoothed(run, SMOOTH, self.y);
                run.steps.iter().zip(values).filter_map(|(step, y)| Some((x(step), y? / y_unit))).collect()
            }
            false => points(run, x, |step| Some((self.y)(step)? / y_unit)),
        };
        let mut lines: Vec<Line> = groups.iter().map(|group| group.line(line_of)).collect();
        if self.smooth && has_steps(groups) {
            let values = points(groups[0].runs[0], x, |step| Some((self.y)(step)? / y_unit));
            lines[0].band = values.into_iter().map(|(x, y)| (x, y, y)).collect();
        }
        let axes = Axes::of(lines.iter(), self.scale, self.from_zero)?;
        let note = match axes.without_place(lines.iter()) {
            0 => None,
            1 => Some("1 value of zero or less has no place on this axis.".to_owned()),
            count => Some(format!("{count} values of zero or less have no place on this axis.")),
        };
        let svg = html! {
            svg class="plot" role="img" aria-labelledby={ (id) "-title " (id) "-text" }
                viewBox={ "0 0 " (WIDTH) " " (HEIGHT) }
                data-left=(FRAME.left) data-width=(FRAME.width) data-top=(FRAME.top) data-height=(FRAME.height)
                data-low=(axes.x.low) data-high=(axes.x.high) data-x=(x_name) data-y=(y_name) {
                title id={ (id) "-title" } { (self.title) }
                desc id={ (id) "-text" } { (describe(&lines, &x_name, &y_name)) }
                (frame(&axes, FRAME, &x_name, &y_name))
                @for (index, of) in lines.iter().enumerate() {
                    (line(&axes, FRAME, of, (index < MOST_LINES).then_some(index), index, true))
                }
            }
        };
        Some(Drawn { title: self.title, svg, note })
    }

    fn x(&self, step: &Step) -> f64 {
        match self.x {
            X::Samples => step.samples,
            X::Tokens => step.tokens,
            X::Time => step.seconds,
        }
    }

    /// The unit of the x axis, and its name.
    fn x_unit(&self, groups: &[Group]) -> (f64, String) {
        let most = runs(groups).map(|run| self.x(run.last())).fold(0.0, f64::max);
        let (unit, name) = match self.x {
            X::Samples => (1.0, "samples"),
            X::Tokens => (1.0, "tokens"),
            X::Time if most < 180.0 => (1.0, "seconds of steps"),
            X::Time if most < 3.0 * 3600.0 => (60.0, "minutes of steps"),
            X::Time => (3600.0, "hours of steps"),
        };
        (unit, name.to_owned())
    }

    /// The unit of the y axis, and its name.
    fn y_unit(&self, groups: &[Group]) -> (f64, String) {
        if self.unit != "bytes" {
            return (1.0, self.unit.to_owned());
        }
        let most = runs(groups).flat_map(|run| &run.steps).filter_map(self.y).fold(0.0, f64::max);
        let (unit, name) = if most < 4.0 * GIB { (MIB, "MiB") } else { (GIB, "GiB") };
        (unit, name.to_owned())
    }
}

const MIB: f64 = 1024.0 * 1024.0;
const GIB: f64 = 1024.0 * MIB;

fn runs<'g>(groups: &'g [Group]) -> impl Iterator<Item = &'g Run> {
    groups.iter().flat_map(|group| group.runs.iter().copied())
}

/// What a plot shows, in words.
fn describe(lines: &[Line], x: &str, y: &str) -> String {
    let each = lines.iter().map(|Line { name, points, .. }| match (points.first(), points.last()) {
        (Some(first), Some(last)) => {
            let lowest = points.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
            let highest = points.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
            let [y0, x0, y1, x1] = [first.1, first.0, last.1, last.0].map(|value| number(value, 4));
            let [lowest, highest] = [lowest, highest].map(|value| number(value, 4));
            format!("{name}: from {y0} at {x0} to {y1} at {x1} {x}, lowest {lowest}, highest {highest}.")
        }
        _ => format!("{name}: no values."),
    });
    let unit = if y.is_empty() { String::new() } else { format!("In {y}. ") };
    unit + &each.collect::<Vec<_>>().join(" ")
}
