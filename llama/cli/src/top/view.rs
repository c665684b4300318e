//! A frame: how far the run is, the numbers of its last step, and its losses.

use std::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::Line as Text;
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Widget, Wrap};

use super::watch::Watch;
use crate::plot::{self, Scale, number, thin};
use crate::train::{bytes, grouped};

/// Draws what is known of a run, whose metrics were written `since` ago.
pub(super) fn draw(watch: &Watch, since: Option<Duration>, area: Rect, frame: &mut Buffer) {
    let facts = flow(&facts(watch, since), usize::from(area.width));
    let fault = watch.fault().unwrap_or_default();
    // Wrapping leaves a part of each row empty.
    let fault_rows = fault.chars().count().div_ceil(usize::from(area.width / 2).max(1)) as u16;
    let [head, progress, numbers, wrong, chart, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(facts.len() as u16),
        Constraint::Length(fault_rows),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    Text::from(title(watch)).bold().render(head, frame);
    gauge(watch).render(progress, frame);
    Paragraph::new(facts).render(numbers, frame);
    Paragraph::new(fault).wrap(Wrap { trim: true }).red().render(wrong, frame);
    losses(watch, chart, frame);
    Text::from("q leaves").dim().render(foot, frame);
}

fn title(watch: &Watch) -> String {
    let folder = watch.folder().display();
    let Some(about) = &watch.about else { return folder.to_string() };
    let model = about.recipe.model.units();
    let parameters = grouped(pillion_runtime::Layout::new(&model, 1).parameters() as u64);
    let ranks = match about.ranks {
        Some(1) => ", 1 rank".to_owned(),
        Some(ranks) => format!(", {ranks} ranks"),
        None => String::new(),
    };
    format!("{folder}: {parameters} parameters{ranks}")
}

fn gauge(watch: &Watch) -> Gauge<'static> {
    let seen = watch.last.as_ref().map_or(0, |line| line.samples_seen);
    let share = watch.samples().map_or(0.0, |samples| seen as f64 / samples.max(1) as f64);
    let label = match (watch.samples(), watch.to_go()) {
        (Some(samples), Some(rest)) => format!("{seen}/{samples} samples, {} to go", clock(rest)),
        (Some(samples), None) => format!("{seen}/{samples} samples"),
        (None, _) => format!("{seen} samples"),
    };
    Gauge::default().ratio(share.clamp(0.0, 1.0)).label(label).gauge_style(Style::new().fg(Color::Blue))
}

/// Texts in rows of at most `width` characters, where they are not longer themselves.
fn flow(texts: &[String], width: usize) -> Vec<Text<'static>> {
    let mut rows: Vec<String> = Vec::new();
    for text in texts {
        match rows.last_mut() {
            Some(row) if row.chars().count() + text.chars().count() + 3 <= width => {
                row.push_str("   ");
                row.push_str(text);
            }
            _ => rows.push(text.clone()),
        }
    }
    rows.into_iter().map(Text::from).collect()
}

/// The numbers of the last step, and of the validations, with their names.
fn facts(watch: &Watch, since: Option<Duration>) -> Vec<String> {
    let Some(line) = &watch.last else { return vec!["no step yet".to_owned()] };
    let optional = |value: Option<f64>, text: fn(f64) -> String| value.map_or("-".to_owned(), text);
    let loss = |value: f64| format!("{value:.4}");
    let lowest = watch.validation.iter().map(|point| point.1).min_by(f64::total_cmp);
    let pairs = [
        ("step", line.step.to_string()),
        ("loss", loss(line.loss)),
        ("validation", optional(watch.validation.last().map(|point| point.1), loss)),
        ("best", optional(lowest, loss)),
        ("written", since.map_or("-".to_owned(), |since| format!("{} ago", clock(since)))),
        ("batch", line.batch_samples.to_string()),
        ("noise", optional(line.noise_scale, |scale| format!("{scale:.0}"))),
        ("lr", format!("{:.2e}", line.lr)),
        ("norm", format!("{:.3}", line.grad_norm)),
        ("tok/s", format!("{:.0}", line.tokens_per_s)),
        ("mfu", optional(line.mfu, |mfu| format!("{:.0}%", 100.0 * mfu))),
        ("exposed", format!("{:.1}ms", line.exposed_ms)),
        ("data", format!("{:.1}ms", line.data_wait_ms)),
        ("memory", line.memory.map_or("-".to_owned(), bytes)),
    ];
    pairs.into_iter().map(|(name, value)| format!("{name} {value}")).collect()
}

/// The losses by samples.
fn losses(watch: &Watch, area: Rect, frame: &mut Buffer) {
    let block = Block::bordered().title("loss by samples: ⠒ training, • validation");
    let values = || watch.loss.iter().chain(&watch.validation);
    let Some(axis) = plot::Axis::of(values().map(|point| point.1), Scale::Linear) else {
        return block.render(area, frame);
    };
    let axis = axis.with_margin(0.02);
    let right = watch.last.as_ref().map_or(1.0, |line| line.samples_seen as f64).max(1.0);
    // A character has two dots side by side.
    let column = |x: f64| (x / right * f64::from(area.width) * 2.0) as usize;
    // The chart gets shares of its axes, because it does not end with numbers near the largest.
    let places = |points: &[(f64, f64)]| {
        let finite = points.iter().filter(|point| Scale::Linear.has(point.1));
        finite.map(|&(x, y)| (x / right, axis.place(y))).collect::<Vec<(f64, f64)>>()
    };
    let (training, validation) = (places(&thin(&watch.loss, column)), places(&watch.validation));
    let set = |points| Dataset::default().data(points);
    let sets = vec![
        set(&training).marker(Marker::Braille).graph_type(GraphType::Line).style(Style::new().fg(Color::Blue)),
        set(&validation).marker(Marker::Dot).style(Style::new().fg(Color::Yellow)),
    ];
    let of = |ends: [String; 2]| Axis::default().bounds([0.0, 1.0]).labels(ends);
    let x = of([0.0, right].map(|value| number(value, 9)));
    let y = of([axis.low, axis.high].map(|value| number(value, 3)));
    let chart = Chart::new(sets).block(block).x_axis(x).y_axis(y);
    chart.render(area, frame);
}

/// Hours, minutes and seconds.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::train::lines::tests::{folder, line};

    /// The rows of a frame.
    fn frame(metrics: &str, width: u16, height: u16) -> Vec<String> {
        let place = folder(metrics);
        let watch = Watch::open(place.path()).unwrap();
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let since = Some(Duration::from_secs(75));
        terminal.draw(|frame| draw(&watch, since, frame.area(), frame.buffer_mut())).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(row).collect()
    }

    #[test]
    fn a_frame_has_the_numbers_of_the_last_step() {
        let metrics: String = (1..=20).map(|step| line(step, 5.0 - step as f64 / 10.0)).collect();
        let text = frame(&metrics, 80, 24).join("\n");
        for words in [
            "160 samples",
            "step 20   loss 3.0000   validation 3.1000   best 3.1000   written 1:15 ago",
            "batch 8   noise 20   lr 1.00e-3   norm 1.000   tok/s 1000   mfu 50%",
            "exposed 10.0ms   data 0.0ms   memory 64.00 MiB",
            "loss by samples",
            "q leaves",
        ] {
            assert!(text.contains(words), "{words} in\n{text}");
        }
        let count = |of: &dyn Fn(char) -> bool| text.chars().filter(|c| of(*c)).count();
        // One of each is in the heading.
        assert!(count(&|c| c == '•') > 2 && count(&|c| ('\u{2801}'..='\u{28ff}').contains(&c)) > 20, "{text}");
    }

    #[test]
    fn a_run_without_a_step_says_so_and_damage_is_named() {
        assert!(frame("", 60, 12).join("\n").contains("no step yet"));
        let damaged = frame(&(line(1, 5.0) + "nonsense\n" + &line(2, 4.0)), 60, 16).concat().replace(' ', "");
        assert!(damaged.contains("line2isnostep") && damaged.contains("step1"), "{damaged}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Any terminal, and any losses.
        #[test]
        fn frames_of_all_sizes_are_drawn(
            width in 0u16..50, height in 0u16..20, losses in prop::collection::vec(proptest::num::f64::NORMAL, 0..30),
        ) {
            let metrics: String = (1..).zip(&losses).map(|(step, loss)| line(step, *loss)).collect();
            prop_assert_eq!(frame(&metrics, width, height).len(), usize::from(height));
        }
    }
}
