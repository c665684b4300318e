//! `pillion abs replay`: what a controller would have said of the steps of a log.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use pillion_abs::{Controller, Observation, Reason};
use pillion_collectives::limits::explain;
use serde::{Deserialize, Serialize};

use crate::controller::{ControllerArgs, by_flag};
use crate::{Error, print_result};

/// Settings of `abs replay`.
#[derive(Clone, Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct ReplayArgs {
    /// A line of JSON for each step: a run's metrics.jsonl, or what pillion.torch.NormTest logs.
    #[arg(value_name = "FILE")]
    pub log: PathBuf,
    /// Smallest batch, in samples; default: that of the first step.
    #[arg(long, value_name = "N")]
    pub batch: Option<u64>,
    /// Largest batch, in samples; default: 64 times the smallest.
    #[arg(long, value_name = "N")]
    pub max_batch: Option<u64>,
    /// Every batch is a multiple of this; default: the largest number of which the log's batches are
    /// multiples, but for the last one, which may have been cut short.
    #[arg(long, value_name = "N")]
    pub round_to: Option<u64>,
    /// What the batch follows.
    #[command(flatten)]
    pub controller: ControllerArgs,
    /// Print all steps, as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What a log says of a step, among other things.
#[derive(Deserialize)]
struct Line {
    step: u64,
    batch_samples: u64,
    batch_tokens: u64,
    groups: Option<u64>,
    group_square_norms: Option<f64>,
    sum_square_norm: Option<f64>,
}

/// What the controller said after a step.
#[derive(Serialize)]
struct Row {
    step: u64,
    /// Of the step, as it was made.
    batch: u64,
    /// Gradient noise scale in samples, smoothed.
    noise_scale: Option<f64>,
    wanted_batch: Option<f64>,
    next_batch: u64,
    decision: Reason,
}

/// Prints the steps after which the batch would have changed.
///
/// # Errors
/// When a setting is out of its range, or the log cannot be read.
pub(crate) fn run(settings: &ReplayArgs) -> Result<i32, Error> {
    let lines = read(settings)?;
    let first = lines.first().map_or(1, |line| line.batch_samples.max(1));
    let whole = &lines[..lines.len().max(2) - 1];
    let common = whole.iter().fold(0, |divisor, line| common_divisor(divisor, line.batch_samples)).max(1);
    let round_to = settings.round_to.unwrap_or(common);
    let base = settings.batch.unwrap_or_else(|| first.next_multiple_of(round_to.max(1)));
    let cap = settings.max_batch.unwrap_or(base.saturating_mul(64));
    let samples = lines.iter().map(|line| line.batch_samples).sum();
    let rules = settings.controller.settings(base, cap, round_to, samples)?;
    let mut controller = Controller::new(rules).map_err(by_flag)?;
    let rows: Vec<Row> = lines.iter().map(|line| step(&mut controller, line)).collect();
    match settings.json {
        true => print_result(serde_json::to_string_pretty(&rows).expect("plain values"))?,
        false => print_result(table(base, &rows))?,
    }
    Ok(0)
}

/// The largest number that divides both; 0 is divided by all.
fn common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

fn step(controller: &mut Controller, line: &Line) -> Row {
    let sums = [line.group_square_norms, line.sum_square_norm];
    let [group_square_norms, square_norm] = sums.map(|sum| sum.unwrap_or(f64::NAN));
    let decision = controller.observe(&Observation {
        groups: line.groups.unwrap_or(0),
        samples: line.batch_samples,
        tokens: line.batch_tokens,
        group_square_norms,
        square_norm,
        // A log has null for what is not finite.
        non_finite: u64::from(sums.contains(&None)),
    });
    Row {
        step: line.step,
        batch: line.batch_samples,
        noise_scale: decision.noise_scale,
        wanted_batch: decision.wanted,
        next_batch: decision.batch,
        decision: decision.reason,
    }
}

fn read(settings: &ReplayArgs) -> Result<Vec<Line>, Error> {
    let path = &settings.log;
    let file = File::open(path).map_err(|error| Error::file(path, explain(&error)))?;
    let mut lines = Vec::new();
    for (number, text) in BufReader::new(file).lines().enumerate() {
        let text = text.map_err(|error| Error::file(path, explain(&error)))?;
        let line = serde_json::from_str::<Line>(&text).map_err(|error| {
            let number = number + 1;
            let reason = format!("line {number}: {error}: give a run's metrics.jsonl, or a log of NormTest");
            Error::file(path, reason)
        })?;
        if line.groups.is_none() {
            let reason = format!("line {} has no sums of groups: versions before them wrote it", number + 1);
            return Err(Error::file(path, reason));
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(Error::file(path, "there is no step in it: give the log of a run"));
    }
    Ok(lines)
}

fn table(base: u64, rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["step", "batch of the step", "noise scale", "wanted", "next batch"]);
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    let mut batch = base;
    for row in rows {
        if row.next_batch != batch {
            batch = row.next_batch;
            let (scale, wanted) = (number(row.noise_scale), number(row.wanted_batch));
            table.add_row([row.step.to_string(), row.batch.to_string(), scale, wanted, batch.to_string()]);
        }
    }
    table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let steps = if rows.len() == 1 { "1 step".to_owned() } else { format!("{} steps", rows.len()) };
    if batch == base && table.row_count() == 0 {
        let last = &rows[rows.len() - 1];
        return format!(
            "{steps}, after none of which the batch would have changed from {base}: the noise scale is {} at the end, \
             and the last one asked for {}",
            number(last.noise_scale),
            number(last.wanted_batch)
        );
    }
    format!("{steps}, from a batch of {base}; it would have changed after these:\n{table}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        settings: ReplayArgs,
    }

    fn settings(text: &str, flags: &str) -> (tempfile::TempDir, ReplayArgs) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        std::fs::write(&path, text).unwrap();
        let words = ["replay", path.to_str().unwrap()].into_iter().chain(flags.split_whitespace());
        (folder, Program::parse_from(words).settings)
    }

    /// Two groups of one sample with gradients 1 and 3: variance 2, square norm of the mean 4.
    const STEP: &str = r#"{"step": 1, "batch_samples": 2, "batch_tokens": 2, "groups": 2, "group_square_norms": 10.0,
        "sum_square_norm": 16.0, "loss": 1.0}"#;

    #[test]
    fn a_log_leads_to_the_decisions_of_its_sums() {
        let lines = [STEP.replace('\n', ""), STEP.replace('\n', "").replace("16.0", "null")].join("\n");
        let (_folder, settings) = settings(&lines, "--eta 0.25 --growth-limit 100");
        let steps = read(&settings).unwrap();
        let rules = settings.controller.settings(2, 128, 1, 4).unwrap();
        let mut controller = Controller::new(rules).unwrap();
        // 2 / (0.25² · 4)
        let first = step(&mut controller, &steps[0]);
        assert_eq!((first.wanted_batch, first.next_batch, first.decision), (Some(8.0), 8, Reason::Grown));
        let second = step(&mut controller, &steps[1]);
        assert_eq!((second.next_batch, second.decision), (8, Reason::Unusable));
        assert!(table(2, &[first, second]).contains("it would have changed"));
        run(&settings).unwrap();
    }

    #[test]
    fn batches_have_the_step_of_the_log() {
        assert_eq!([(0, 8), (8, 24), (16, 24), (0, 0)].map(|(a, b)| common_divisor(a, b)), [8, 8, 8, 0]);
    }

    #[test]
    fn a_file_that_is_no_log_is_refused_by_line() {
        let refused = |text: &str, words: &str| {
            let (_folder, settings) = settings(text, "");
            let error = run(&settings).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused("", "no step");
        refused("{}", "line 1: missing field");
        refused(&format!("{}\nnonsense", STEP.replace('\n', "")), "line 2");
        refused(&STEP.replace('\n', "").replace("\"groups\": 2", "\"groups\": null"), "no sums of groups");
    }
}
