//! Tables and figures of the runs that are finished: `report/` in the experiment's folder.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::compare::{self, Table};
use super::figure::{Panel, figure};
use super::grid::{Family, Run};
use super::results::{Part, Results};
use crate::Error;
use crate::plot::{Line, MOST_LINES};

/// Points of a curve at most.
const POINTS: u64 = 64;

/// All finished runs of one schedule: the seeds.
pub(super) struct Group<'r> {
    pub(super) schedule: &'r str,
    pub(super) family: Family,
    /// Each seed's number and its run.
    pub(super) seeds: Vec<(u64, &'r Results)>,
}

impl<'r> Group<'r> {
    /// The run of one seed.
    pub(super) fn seed(&self, seed: u64) -> Option<&'r Results> {
        self.seeds.iter().find(|(number, _)| *number == seed).map(|(_, run)| *run)
    }
}

/// Writes everything, of `wanted` runs those that are finished; returns the path of the page, and the tables.
pub(super) fn write(out: &Path, finished: &[(Run, Results)], wanted: usize) -> Result<(PathBuf, String), Error> {
    let folder = out.join("report");
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, text));
        written.map_err(|error| Error::file(&path, error)).map(|()| path)
    };
    // Those of another report would seem to be of this one.
    match std::fs::remove_dir_all(folder.join("steps")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::file(folder.join("steps"), error));
        }
        _ => {}
    }
    let mut models: Vec<&str> = finished.iter().map(|(run, _)| run.model).collect();
    models.dedup();
    let (mut tables, mut page) = (String::new(), String::from(HEAD));
    if finished.len() < wanted {
        let lacking = format!("{} of {wanted} runs are finished, and these are in it.\n\n", finished.len());
        tables.push_str(&lacking);
        write!(page, "<p>{lacking}</p>").expect("text grows");
    }
    for model in models {
        let groups = groups(finished, model);
        let samples = finished.iter().find(|(run, _)| run.model == model).map_or(0, |(run, _)| run.samples);
        for table in model_tables(model, samples, &groups) {
            tables.push_str(&markdown(&table));
            page.push_str(&html(&table));
        }
        for (name, svg) in figures(model, samples, &groups).map_err(|reason| Error::file(&folder, reason))? {
            put(&name, &svg)?;
            writeln!(page, "<figure>{svg}</figure>").expect("text grows");
        }
    }
    for (run, results) in finished {
        put(&format!("steps/{}.csv", run.name), &csv(results))?;
    }
    page.push_str("</body></html>\n");
    put("tables.md", &tables)?;
    Ok((put("report.html", &page)?, tables))
}

const HEAD: &str = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Batch schedules</title><style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; text-align: right; } th:first-child, td:first-child { text-align: left; }
th { border-bottom: 1px solid; } figure { margin: 1.5em 0; }
</style></head><body><h1>Batch schedules</h1>
<p>Mean over seeds, and ± the standard deviation between them. Steps: optimizer steps; warm-up steps: until the learning rate was highest. Time: of all steps, without starts and validation, but with whatever
else the machine did meanwhile; ms a sample: the median over steps, which is less so. Training loss: mean over the last tenth of the samples; validation loss: after the last step; both in nats a token.
Differences: the mean over seeds, paired by seed, and ± its 95 % interval by Student's t; bold where the interval is on one side of zero, which one in twenty is by chance. Constants at as many steps: on the line through
the two nearest in the logarithm of steps.</p>
<p>Curves: the mean over seeds, in parts of as many samples each, of the loss before a step, or of its batch, at the samples, steps and seconds that came before it. Bands: from the smallest to the
largest value of the seeds.</p>
";

type Point = fn(&Part) -> (f64, f64);

/// File, title, axes, and what they show of a part of a run.
const FIGURES: [(&str, &str, &str, &str, Point); 4] = [
    ("loss-samples", "Training loss by samples", "samples", "loss", |part| (part.samples, part.loss)),
    ("loss-steps", "Training loss by steps", "steps", "loss", |part| (part.steps, part.loss)),
    ("loss-time", "Training loss by time", "seconds of steps", "loss", |part| (part.seconds, part.loss)),
    ("batch-samples", "Batch by samples", "samples", "batch, in samples", |part| (part.samples, part.batch)),
];

/// Schedules of a model in the order of their first runs.
pub(super) fn groups<'r>(finished: &'r [(Run, Results)], model: &str) -> Vec<Group<'r>> {
    let mut groups: Vec<Group> = Vec::new();
    for (run, results) in finished.iter().filter(|(run, _)| run.model == model) {
        match groups.iter_mut().find(|group| group.schedule == run.schedule) {
            Some(group) => group.seeds.push((run.seed, results)),
            None => {
                groups.push(Group { schedule: &run.schedule, family: run.family, seeds: vec![(run.seed, results)] })
            }
        }
    }
    groups
}

/// The figures of a model's runs, by the names of their files.
///
/// # Errors
/// Which of them has nothing to show.
pub(super) fn figures(model: &str, samples: u64, groups: &[Group]) -> Result<Vec<(String, String)>, String> {
    let largest = groups.iter().flat_map(|group| &group.seeds).map(|(_, run)| run.largest_batch()).max();
    // Two of the largest steps begin in each part, so that none is empty.
    let count = (samples / (2 * largest.unwrap_or(1))).clamp(1, POINTS) as usize;
    let one = |(name, title, x, y, point)| {
        let svg = figure(&format!("{title}, {model}"), x, y, &panels(groups, count, point))?;
        Ok((format!("{model}-{name}.svg"), svg))
    };
    FIGURES.into_iter().map(one).collect()
}

/// The curves of all schedules, in as few panels as have room. Where one has no room for all, the
/// constant batches come first.
fn panels(groups: &[Group], count: usize, point: Point) -> Vec<Panel> {
    let lines = |groups: &[&Group]| groups.iter().map(|group| curve(group, count, point)).collect();
    let all: Vec<&Group> = groups.iter().collect();
    if all.len() <= MOST_LINES {
        return vec![Panel { name: "", lines: lines(&all) }];
    }
    let (changing, constant): (Vec<&Group>, Vec<&Group>) =
        all.iter().partition(|group| group.family == Family::Changing);
    let named = [("constant batches", constant), ("batches that change", changing)];
    let panels = named.iter().flat_map(|(name, groups)| groups.chunks(MOST_LINES).map(move |few| (name, few)));
    panels.map(|(name, few)| Panel { name, lines: lines(few) }).collect()
}

/// The seeds' mean at each part of the run in which all of them have a step, and a band from the
/// smallest to the largest of their values.
fn curve(group: &Group, count: usize, point: Point) -> Line {
    let seeds: Vec<Vec<Option<Part>>> = group.seeds.iter().map(|(_, run)| run.parts(count)).collect();
    let (mut points, mut band) = (Vec::new(), Vec::new());
    for part in 0..count {
        let each: Option<Vec<(f64, f64)>> = seeds.iter().map(|parts| parts[part].as_ref().map(point)).collect();
        let Some(each) = each else { continue };
        let (x, y) = each.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        let x = x / each.len() as f64;
        points.push((x, y / each.len() as f64));
        let values = || each.iter().map(|point| point.1);
        band.push((x, values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max)));
    }
    let band = if seeds.len() > 1 { band } else { Vec::new() };
    Line { name: group.schedule.to_owned(), points, band }
}

/// A model's runs, and their differences.
pub(super) fn model_tables(model: &str, samples: u64, groups: &[Group]) -> Vec<Table> {
    let title = format!("{model} parameters, {samples} samples");
    let runs = Table { title, columns: COLUMNS.map(str::to_owned).into(), rows: rows(groups) };
    let mut differences = compare::tables(groups);
    differences.iter_mut().for_each(|table| table.title = format!("{}, {model}", table.title));
    std::iter::once(runs).chain(differences).collect()
}

const COLUMNS: [&str; 10] = [
    "schedule",
    "seeds",
    "steps",
    "mean batch",
    "largest batch",
    "warm-up steps",
    "time, s",
    "ms a sample",
    "training loss",
    "validation loss",
];

fn rows(groups: &[Group]) -> Vec<Vec<String>> {
    let row = |group: &Group| {
        let all = |value: fn(&Results) -> f64| group.seeds.iter().map(|(_, run)| value(run)).collect::<Vec<f64>>();
        let losses = all(|run| run.validation_loss().unwrap_or(f64::NAN));
        vec![
            group.schedule.to_owned(),
            group.seeds.len().to_string(),
            spread(&all(|run| run.steps.len() as f64), 0),
            spread(&all(Results::mean_batch), 1),
            spread(&all(|run| run.largest_batch() as f64), 0),
            spread(&all(|run| run.warmup_steps() as f64), 0),
            spread(&all(Results::seconds), 0),
            spread(&all(Results::median_per_sample), 2),
            spread(&all(Results::training_loss), 4),
            spread(&losses, 4),
        ]
    };
    groups.iter().map(row).collect()
}

/// Mean, and standard deviation where there are several.
fn spread(values: &[f64], digits: usize) -> String {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return format!("{mean:.digits$}");
    }
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    format!("{mean:.digits$} ± {:.digits$}", variance.sqrt())
}

pub(super) fn markdown(Table { title, columns, rows }: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = format!("### {title}\n\n{}|---|{}\n", line(columns), "---:|".repeat(columns.len() - 1));
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text.push('\n');
    text
}

fn html(Table { title, columns, rows }: &Table) -> String {
    let line = |tag: &str, cells: &[String]| {
        let cells = cells.iter().map(|cell| match cell.strip_prefix("**").and_then(|cell| cell.strip_suffix("**")) {
            Some(cell) => format!("<{tag}><b>{cell}</b></{tag}>"),
            None => format!("<{tag}>{cell}</{tag}>"),
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let body: String = rows.iter().map(|row| line("td", row)).collect();
    format!("<h2>{title}</h2>\n<table>{}{body}</table>\n", line("th", columns))
}

/// What figures and tables are made of.
fn csv(results: &Results) -> String {
    let mut text = String::from(
        "step,samples_seen,batch_samples,loss,grad_norm,lr,step_ms,noise_scale,wanted_batch,validation_loss\n",
    );
    let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
    for line in &results.steps {
        let (noise, wanted, validation) =
            (number(line.noise_scale), number(line.wanted_batch), number(line.validation_loss));
        writeln!(
            text,
            "{},{},{},{:.6},{:.6},{:.3e},{:.2},{noise},{wanted},{validation}",
            line.step, line.samples_seen, line.batch_samples, line.loss, line.grad_norm, line.lr, line.step_ms
        )
        .expect("text grows");
    }
    text
}
