//! What is read of a run: its steps, what it is, and a step of its timeline.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::timeline::{self, Timeline};
use crate::Error;
use crate::controller::flag;
use crate::train::Line;
use crate::train::about::About;
use crate::train::lines::Lines;

/// A run, as far as it is.
pub(super) struct Run {
    /// Tells it from the other runs of the report.
    pub(super) name: String,
    pub(super) about: Option<About>,
    /// At least one.
    pub(super) steps: Vec<Step>,
    pub(super) timeline: Option<Timeline>,
    /// What a reader of the page should know of it.
    pub(super) notes: Vec<String>,
}

/// What plots show of a step, as plain numbers.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// Samples, tokens and seconds of steps up to the end of this step.
    pub(super) samples: f64,
    pub(super) tokens: f64,
    pub(super) seconds: f64,
    pub(super) loss: f64,
    pub(super) validation: Option<f64>,
    /// In samples, as the noise scale.
    pub(super) batch: f64,
    pub(super) noise: Option<f64>,
    pub(super) lr: f64,
    pub(super) tokens_per_s: f64,
    /// Share of the peak, in percent.
    pub(super) mfu: Option<f64>,
    /// Share of the step's time, in percent.
    pub(super) exposed: Option<f64>,
    /// Bytes.
    pub(super) memory: Option<f64>,
    /// The noise scale of each unit, where it was measured.
    pub(super) unit_noise: Vec<Option<f64>>,
}

impl Step {
    /// The step of a line of metrics, after `before`.
    fn after(before: Option<&Step>, line: &Line) -> Step {
        let (tokens, seconds) = before.map_or((0.0, 0.0), |before| (before.tokens, before.seconds));
        Step {
            samples: line.samples_seen as f64,
            tokens: tokens + line.batch_tokens as f64,
            seconds: seconds + line.step_ms / 1e3,
            loss: line.loss,
            validation: line.validation_loss,
            batch: line.batch_samples as f64,
            noise: line.noise_scale,
            lr: line.lr,
            tokens_per_s: line.tokens_per_s,
            mfu: line.mfu.map(|share| 100.0 * share),
            exposed: (line.step_ms > 0.0).then(|| 100.0 * line.exposed_ms / line.step_ms),
            memory: line.memory.map(|bytes| bytes as f64),
            unit_noise: line.unit_noise_scales.clone(),
        }
    }
}

impl Run {
    /// The settings that decide what it does, but for its seed, by the names of flags.
    pub(super) fn settings(&self) -> BTreeMap<String, String> {
        let Some(about) = &self.about else { return BTreeMap::new() };
        let mut settings = about.placement.clone();
        settings.insert("data".to_owned(), about.data.clone());
        if let Some(ranks) = about.ranks {
            settings.insert("ranks".to_owned(), ranks.to_string());
        }
        let mut leaves = Vec::new();
        collect("", &serde_json::to_value(&about.recipe).expect("plain values"), &mut leaves);
        for (key, value) in leaves.into_iter().filter(|(key, _)| key != "seed") {
            let name = key.strip_prefix("model.").map_or_else(|| flag(&key), str::to_owned);
            let name = if settings.contains_key(&name) { key } else { name };
            settings.insert(name, value);
        }
        settings
    }

    pub(super) fn seed(&self) -> Option<u64> {
        self.about.as_ref().map(|about| about.recipe.seed)
    }

    /// Units whose noise was measured.
    pub(super) fn units(&self) -> usize {
        self.steps.iter().map(|step| step.unit_noise.len()).max().unwrap_or(0)
    }

    pub(super) fn last(&self) -> &Step {
        self.steps.last().expect("a run has a step")
    }
}

/// The plain values in a value, each with where it is.
fn collect(at: &str, value: &Value, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            let dot = if at.is_empty() { "" } else { "." };
            fields.iter().for_each(|(key, value)| collect(&format!("{at}{dot}{key}"), value, leaves));
        }
        Value::String(text) => leaves.push((at.to_owned(), text.clone())),
        other => leaves.push((at.to_owned(), other.to_string())),
    }
}

/// Reads runs.
///
/// # Errors
/// [`Error::File`] when one cannot be read, or is given twice.
pub(super) fn read(folders: &[PathBuf]) -> Result<Vec<Run>, Error> {
    let mut seen = Vec::new();
    for folder in folders {
        let place = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        if seen.contains(&place) {
            return Err(Error::file(folder, "this run is given twice: leave one out"));
        }
        seen.push(place);
    }
    let names = names(&seen);
    folders.iter().zip(names).map(|(folder, name)| read_one(folder, name)).collect()
}

fn read_one(folder: &Path, name: String) -> Result<Run, Error> {
    let mut lines = Lines::open(folder)?;
    let mut steps: Vec<Step> = Vec::new();
    while let Some(line) = lines.next()? {
        steps.push(Step::after(steps.last(), &line));
    }
    if steps.is_empty() {
        return Err(Error::file(folder, "the run has not made a step yet: wait for the first, or leave the run out"));
    }
    let mut notes = Vec::new();
    if lines.is_cut() {
        notes.push(format!("{name}: the last line of its metrics is cut off, and its step is not in the plots."));
    }
    let about = About::read(folder)?;
    if about.is_none() {
        notes.push(format!("{name}: there is no run.json, so its settings are not known."));
    }
    let timeline = match timeline::read(folder) {
        Ok(timeline) => timeline,
        Err(why) => {
            notes.push(format!("{name}: its timeline is not drawn: {why}."));
            None
        }
    };
    Ok(Run { name, about, steps, timeline, notes })
}

/// The shortest ends of paths that tell them apart.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let name = |folder: &PathBuf, parts: usize| {
        let all: Vec<_> = folder.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        all[all.len() - parts.min(all.len())..].join("/")
    };
    let longest = folders.iter().map(|folder| folder.iter().count()).max().unwrap_or(1);
    folders
        .iter()
        .map(|folder| {
            let is_alone = |parts: &usize| {
                let mine = name(folder, *parts);
                folders.iter().filter(|other| name(other, *parts) == mine).count() == 1
            };
            name(folder, (1..longest).find(is_alone).unwrap_or(longest))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_long_as_it_takes_to_differ() {
        let of = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["/a/run"]), ["run"]);
        assert_eq!(of(&["/a/run", "/a/other"]), ["run", "other"]);
        assert_eq!(of(&["/a/x/run", "/a/y/run", "/b/z"]), ["x/run", "y/run", "z"]);
        assert_eq!(of(&["/run", "/a/run"]), ["//run", "a/run"]);
    }
}
