//! The noise scale of each unit of a run, one plot for each run that measured it.

use maud::{Markup, html};

use super::runs::Run;
use crate::plot::{Axes, Frame, Line, MOST_LINES, Scale, frame, line, swatch};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 300.0;
const FRAME: Frame = Frame { left: 60.0, top: 24.0, width: 780.0, height: 230.0 };

/// The plots.
pub(super) fn draw(runs: &[Run]) -> Markup {
    html! {
        @for (number, run) in runs.iter().enumerate() {
            @let lines = lines(run);
            @if let Some(axes) = Axes::of(lines.iter(), Scale::Log, false) {
                @let (id, title) = (format!("units-{number}"), format!("Gradient noise scale by unit of {}", run.name));
                figure.wide {
                    figcaption { (title) }
                    svg class="plot" role="img" aria-labelledby=(id) viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } {
                        title id=(id) { (title) }
                        (frame(&axes, FRAME, "samples", "samples"))
                        @for (slot, of) in lines.iter().enumerate() { (line(&axes, FRAME, of, Some(slot), slot, false)) }
                    }
                    ul.kinds {
                        @for (slot, of) in lines.iter().enumerate() {
                            li {
                                svg class="plot swatch" width="32" height="10" viewBox="0 0 32 10" aria-hidden="true" {
                                    (swatch(Some(slot), slot, 2.0, 5.0))
                                }
                                (of.name)
                            }
                        }
                    }
                    @if run.units() > lines.len() {
                        p.note { "These are " (lines.len()) " of " (run.units()) " units, at equal distances." }
                    }
                }
            }
        }
    }
}

/// As many units as a plot has lines, the first and the last among them.
fn lines(run: &Run) -> Vec<Line> {
    let units = run.units();
    let shown = units.min(MOST_LINES);
    let names = run.about.as_ref().map(|about| about.recipe.model.units());
    let of = |slot: usize| {
        let unit = if shown > 1 { slot * (units - 1) / (shown - 1) } else { 0 };
        let name = names.as_ref().and_then(|names| names.get(unit)).map(|unit| unit.name.clone());
        let value = |step: &super::runs::Step| *step.unit_noise.get(unit)?;
        let points = run.steps.iter().filter_map(|step| Some((step.samples, value(step)?))).collect();
        Line { name: name.unwrap_or_else(|| format!("unit {unit}")), points, band: Vec::new() }
    };
    (0..shown).map(of).collect()
}
