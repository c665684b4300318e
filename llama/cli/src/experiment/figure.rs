//! Curves as SVG.

use plotters::prelude::*;

/// A line of a figure.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (960, 460);
/// Of these, for the names of the curves.
const KEY_WIDTH: u32 = 210;
/// Distinct also to most who see colours differently (Okabe and Ito 2008), then brown and greys.
const COLOURS: [RGBColor; 11] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 60, 95),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(140, 90, 40),
    RGBColor(190, 190, 190),
    RGBColor(130, 130, 130),
    RGBColor(70, 70, 70),
];

/// Draws the curves; errors are those of the drawing library, in words.
pub(super) fn figure(title: &str, x: &str, y: &str, curves: &[Curve]) -> Result<String, String> {
    let points = || curves.iter().flat_map(|curve| &curve.points).copied();
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (right, (low, high)) = (range(&mut points().map(|(x, _)| x)).1, range(&mut points().map(|(_, y)| y)));
    if !(right.is_finite() && low.is_finite() && high.is_finite()) {
        return Err(format!("{title}: there is nothing finite to draw"));
    }
    let margin = 0.05 * (high - low).max(1e-9);
    let mut svg = String::new();
    draw(&mut svg, title, x, y, curves, 0.0..right, low - margin..high + margin).map_err(|error| error.to_string())?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    title: &str,
    x: &str,
    y: &str,
    curves: &[Curve],
    xs: std::ops::Range<f64>,
    ys: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (plot, key) = root.split_horizontally(SIZE.0 - KEY_WIDTH);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(xs, ys)?;
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw()?;
    for (number, (curve, colour)) in curves.iter().zip(COLOURS.into_iter().cycle()).enumerate() {
        let line = colour.stroke_width(2);
        chart.draw_series(LineSeries::new(curve.points.iter().copied(), line))?;
        let y = 60 + 22 * number as i32;
        key.draw(&PathElement::new([(6, y), (26, y)], line))?;
        key.draw(&Text::new(curve.name.clone(), (32, y - 7), ("sans-serif", 14)))?;
    }
    root.present()?;
    Ok(())
}
