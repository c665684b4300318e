//! Curves as an SVG file that stands alone.

use maud::{PreEscaped, html};

use crate::plot::{Axes, Frame, Line, STYLE, Scale, frame, line, swatch};

/// Some curves that are drawn together.
pub(super) struct Panel {
    /// What they have in common; empty where there is one panel.
    pub(super) name: &'static str,
    pub(super) lines: Vec<Line>,
}

const WIDTH: f64 = 960.0;
/// Of this, for the names of the curves.
const KEY_WIDTH: f64 = 220.0;
const TITLE_HEIGHT: f64 = 30.0;
const PANEL_HEIGHT: f64 = 340.0;
/// Between the names of two curves.
const KEY_LINE: f64 = 22.0;

/// Draws panels of curves with the same axes; the error says that there is nothing to draw.
pub(super) fn figure(title: &str, x: &str, y: &str, panels: &[Panel]) -> Result<String, String> {
    let lines = panels.iter().flat_map(|panel| &panel.lines);
    let Some(axes) = Axes::of(lines, Scale::Linear, false) else {
        return Err(format!("{title}: there is nothing finite to draw"));
    };
    let height = TITLE_HEIGHT + PANEL_HEIGHT * panels.len() as f64;
    let svg = html! {
        svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (WIDTH) " " (height) } role="img" {
            title { (title) }
            style { (PreEscaped(STYLE)) }
            rect width="100%" height="100%" style="fill: var(--back)" {}
            text class="head" x="50" y="20" font-size="16" { (title) }
            @for (index, panel) in panels.iter().enumerate() {
                @let top = TITLE_HEIGHT + PANEL_HEIGHT * index as f64 + 26.0;
                @let of = Frame { left: 50.0, top, width: WIDTH - KEY_WIDTH - 70.0, height: PANEL_HEIGHT - 76.0 };
                (frame(&axes, of, x, y))
                @let key = WIDTH - KEY_WIDTH;
                text class="head" x=(key) y=(top) { (panel.name) }
                @for (slot, curve) in panel.lines.iter().enumerate() {
                    (line(&axes, of, curve, Some(slot), slot, false))
                    @let y = top + KEY_LINE * (slot as f64 + 1.0);
                    (swatch(Some(slot), slot, key, y))
                    text x=(key + 36.0) y=(y + 4.0) { (curve.name) }
                }
            }
        }
    };
    Ok(svg.into_string() + "\n")
}
