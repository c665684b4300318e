//! The page: its parts in order, with style and script inside.

use std::collections::BTreeSet;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use pillion_llama::config::PRESETS;
use pillion_runtime::Layout;

use super::groups::Group;
use super::panels::{self, Drawn, SMOOTH};
use super::runs::Run;
use super::units;
use crate::plot::{MOST_LINES, STYLE, number, swatch};
use crate::train::about::About;
use crate::train::grouped;

/// Nothing is loaded from anywhere.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:";

/// The page of some runs, drawn in groups.
pub(super) fn page(runs: &[Run], groups: &[Group]) -> Markup {
    let (drawn, empty) = panels::draw(groups);
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    let title = match names[..] {
        [only] => only.to_owned(),
        _ => format!("{} runs", runs.len()),
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                link rel="icon" href="data:,";
                title { (title) " – pillion report" }
                style { (PreEscaped(STYLE)) (PreEscaped(include_str!("page.css"))) }
            }
            body {
                header { h1 { (title) } }
                main {
                    (legend(&names))
                    section.plots aria-label="Plots" { @for plot in &drawn { (figure(plot)) } }
                    (units::draw(runs))
                    (timelines(runs))
                    (table(runs))
                    (notes(runs, groups, &empty))
                }
                script { (PreEscaped(include_str!("page.js"))) }
            }
        }
    }
}

/// The lines by name. A script lets the reader choose among them.
fn legend(names: &[&str]) -> Markup {
    let count = names.len();
    html! {
        section #legend aria-label="Lines" data-most=(MOST_LINES) {
            ul {
                @for (number, name) in names.iter().enumerate() {
                    @let slot = (number < MOST_LINES).then_some(number);
                    li {
                        label data-line=(number) {
                            input type="checkbox" checked[slot.is_some()] hidden;
                            svg class="plot" width="32" height="10" aria-hidden="true" { (swatch(slot, number, 2.0, 5.0)) }
                            span class="name" { (name) }
                            @if slot.is_none() { span class="absent" { " (not shown)" } }
                        }
                    }
                }
            }
            @if count > MOST_LINES {
                p {
                    "A plot shows " (MOST_LINES) " lines at most, here of " (count) ". "
                    span class="scripted" hidden { "Take one away to show another." }
                    noscript { "The first " (MOST_LINES) " are shown: choosing others needs JavaScript." }
                }
            }
        }
    }
}

fn figure(plot: &Drawn) -> Markup {
    html! {
        figure {
            figcaption { (plot.title) }
            (plot.svg)
            @if let Some(note) = &plot.note { p.note { (note) } }
        }
    }
}

/// The timelines of the runs that have one.
fn timelines(runs: &[Run]) -> Markup {
    let found = runs.iter().filter_map(|run| Some((run, run.timeline.as_ref()?)));
    html! {
        @for (number, (run, timeline)) in found.enumerate() {
            @let title = format!("A step of {}", run.name);
            figure.wide {
                figcaption { (title) }
                div.scroll tabindex="0" role="group" aria-label=(title) {
                    (timeline.draw(&format!("timeline-{number}"), &title))
                }
                ul.kinds { @for kind in timeline.kinds() { li { i class=(kind) {} (kind) } } }
                p.note { (timeline.caption()) }
            }
        }
    }
}

/// A column of the table: its heading, and a run's cell.
type Column = (&'static str, fn(&Run) -> Option<String>);

const COLUMNS: [Column; 9] = [
    ("model", |run| run.about.as_ref().map(model)),
    ("ranks", |run| run.about.as_ref()?.ranks.map(|ranks| ranks.to_string())),
    ("seed", |run| run.seed().map(|seed| seed.to_string())),
    ("steps", |run| Some(grouped(run.steps.len() as u64))),
    ("samples", |run| Some(grouped(run.last().samples as u64))),
    ("tokens", |run| Some(grouped(run.last().tokens as u64))),
    ("last validation loss", |run| validation(run).last().map(|loss| format!("{loss:.4}"))),
    ("best validation loss", |run| validation(run).min_by(f64::total_cmp).map(|loss| format!("{loss:.4}"))),
    ("time of steps", |run| Some(clock(run.last().seconds))),
];

fn table(runs: &[Run]) -> Markup {
    let settings: Vec<_> = runs.iter().map(Run::settings).collect();
    let names: BTreeSet<&String> = settings.iter().flat_map(|settings| settings.keys()).collect();
    let is_column = |name: &&&String| COLUMNS.iter().any(|(column, _)| column == **name);
    let differ = |name: &&String| {
        let known = || runs.iter().zip(&settings).filter(|(run, _)| run.about.is_some());
        let mut values = known().map(|(_, settings)| settings.get(*name));
        let first = values.next();
        values.any(|value| Some(value) != first)
    };
    let differing: Vec<&String> = names.into_iter().filter(|name| !is_column(&name) && differ(name)).collect();
    let cell = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
    html! {
        section aria-labelledby="runs" {
            h2 #runs { "Runs" }
            div.scroll tabindex="0" role="group" aria-label="Table of the runs" {
                table {
                    thead {
                        tr {
                            th scope="col" { "run" }
                            @for (name, _) in COLUMNS { th scope="col" { (name) } }
                            @for name in &differing { th.setting scope="col" { (name) } }
                        }
                    }
                    tbody {
                        @for (run, settings) in runs.iter().zip(&settings) {
                            tr {
                                th scope="row" { (run.name) }
                                @for (_, value) in COLUMNS { td { (cell(value(run))) } }
                                @for name in &differing { td { (cell(settings.get(*name).cloned())) } }
                            }
                        }
                    }
                }
            }
            @if !differing.is_empty() {
                p.note { "Columns after the time are the settings in which the runs differ, by the names of flags." }
            }
        }
    }
}

/// What a reader should know of what is drawn.
fn notes(runs: &[Run], groups: &[Group], empty: &[&str]) -> Markup {
    let has_seeds = groups.iter().any(|group| group.runs.len() > 1);
    let percent = 100.0 * SMOOTH;
    html! {
        section aria-labelledby="notes" {
            h2 #notes { "Notes" }
            ul {
                li {
                    "Training loss, throughput, mfu and exposed communication are moving averages over "
                    (number(percent, 3)) " % of a run's samples."
                    @if panels::has_steps(groups) { " The band shows the values of the steps." }
                }
                @if has_seeds {
                    li {
                        "Runs that differ only in their seed are one line: their mean, where all of them have values. \
                         The band is from the smallest to the largest. --each draws each run."
                    }
                }
                li { "Time is that of steps, without starts, validations and waiting for checkpoints." }
                @for title in empty { li { (title) ": no run has a value, so there is no plot." } }
                @for note in runs.iter().flat_map(|run| &run.notes) { li { (note) } }
            }
        }
    }
}

fn validation(run: &Run) -> impl DoubleEndedIterator<Item = f64> + '_ {
    run.steps.iter().filter_map(|step| step.validation)
}

/// The preset of a model, or its shape, and its parameters.
fn model(about: &About) -> String {
    let model = &about.recipe.model;
    let preset = PRESETS.iter().find(|preset| preset.config() == *model);
    let name = match preset {
        Some(preset) => preset.name.to_owned(),
        None => format!("{} blocks of {}", model.num_hidden_layers, model.hidden_size),
    };
    let parameters = Layout::new(&model.units(), 1).parameters();
    format!("{name}, {} parameters", grouped(parameters as u64))
}

/// Hours, minutes and seconds; seconds alone of less than a minute.
fn clock(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{} s", number(seconds, 3));
    }
    let seconds = seconds.round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}
