//! What a run has written of its steps.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use crate::Error;
use crate::train::Line;

/// The steps of a run, as far as it is.
#[derive(Default)]
pub(super) struct Results {
    pub(super) steps: Vec<Line>,
    /// Samples of the whole run.
    samples: u64,
}

impl Results {
    /// Reads those of the run in `folder`; no steps where it has not begun.
    pub(super) fn of(folder: &Path, samples: u64) -> Result<Results, Error> {
        let path = folder.join("metrics.jsonl");
        let fail = |error: std::io::Error| Error::file(&path, error);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Results { steps: Vec::new(), samples }),
            file => file.map_err(fail)?,
        };
        let mut steps: Vec<Line> = Vec::new();
        for line in BufReader::new(file).lines() {
            // The last may be under way.
            let Ok(line) = serde_json::from_str::<Line>(&line.map_err(fail)?) else { break };
            steps.push(line);
        }
        Ok(Results { steps, samples })
    }

    pub(super) fn samples_seen(&self) -> u64 {
        self.steps.last().map_or(0, |line| line.samples_seen)
    }

    /// Whether all samples have been seen, and the end was validated.
    pub(super) fn is_finished(&self) -> bool {
        self.samples_seen() >= self.samples && self.validation_loss().is_some()
    }

    /// After the last step.
    pub(super) fn validation_loss(&self) -> Option<f64> {
        self.steps.last()?.validation_loss
    }

    pub(super) fn mean_batch(&self) -> f64 {
        self.samples_seen() as f64 / self.steps.len() as f64
    }

    /// Seconds that the steps took, without validation and starts.
    pub(super) fn seconds(&self) -> f64 {
        self.steps.iter().map(|line| line.step_ms).sum::<f64>() / 1e3
    }

    /// Mean of the samples' losses over the last tenth of the samples.
    pub(super) fn training_loss(&self) -> f64 {
        let from = self.samples - self.samples / 10;
        let last = self.steps.iter().filter(|line| line.samples_seen > from);
        let (sum, samples) = last.fold((0.0, 0.0), |(sum, samples), line| {
            let batch = line.batch_samples as f64;
            (sum + line.loss * batch, samples + batch)
        });
        sum / samples
    }

    /// The run in `count` parts of as many samples each: those in which a step ends.
    pub(super) fn parts(&self, count: usize) -> Vec<Option<Part>> {
        let mut parts = vec![None; count];
        let (mut sums, mut milliseconds) = (vec![(0.0, 0.0); count], 0.0);
        for line in &self.steps {
            milliseconds += line.step_ms;
            let part = (((line.samples_seen - 1) as f64 / self.samples as f64 * count as f64) as usize).min(count - 1);
            let batch = line.batch_samples as f64;
            sums[part].0 += line.loss * batch;
            sums[part].1 += batch;
            parts[part] = Some(Part {
                samples: line.samples_seen as f64,
                steps: line.step as f64,
                seconds: milliseconds / 1e3,
                // The last step of all may be cut short.
                batch: parts[part].map_or(batch, |part: Part| part.batch.max(batch)),
                loss: sums[part].0 / sums[part].1,
            });
        }
        parts
    }
}

/// A part of a run: its mean loss, its largest batch, and what there was at its end.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) samples: f64,
    pub(super) steps: f64,
    pub(super) seconds: f64,
    pub(super) batch: f64,
    pub(super) loss: f64,
}
