//! What a run has written of its steps.

use std::io::ErrorKind;
use std::path::Path;

use crate::Error;
use crate::train::Line;

/// For metrics that a run cannot have written.
const REMEDY: &str = "remove the run's folder, and it is made again";

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
        let text = match std::fs::read_to_string(&path) {
            // A file in the place of a folder is found when it is written to.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Results { steps: Vec::new(), samples });
            }
            text => text.map_err(|error| Error::file(&path, format!("{error}: {REMEDY}")))?,
        };
        Results::parse(&path, &text, samples)
    }

    /// Reads the text of a run's metrics.
    pub(super) fn parse(path: &Path, text: &str, samples: u64) -> Result<Results, Error> {
        let mut steps: Vec<Line> = Vec::new();
        // The last line may be under way.
        for (number, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
            let fail = |why: String| Error::file(path, format!("line {} {why}: {REMEDY}", number + 1));
            let line: Line =
                serde_json::from_str(line).map_err(|error| fail(format!("is no step of a run ({error})")))?;
            let before = steps.last().map_or(0, |last| last.samples_seen);
            if line.step != number as u64 + 1
                || line.batch_samples == 0
                || before.checked_add(line.batch_samples) != Some(line.samples_seen)
            {
                return Err(fail("does not follow from the line before".to_owned()));
            }
            steps.push(line);
        }
        Ok(Results { steps, samples })
    }

    /// From the table of a run's steps that a report has.
    #[cfg(test)]
    pub(super) fn of_csv(text: &str, samples: u64) -> Results {
        let mut rows = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let columns = rows.next().expect("a row of names");
        let step = |row: Vec<&str>| {
            let mut line = serde_json::json!({
                "batch_tokens": 0, "tokens_per_s": 0.0, "exposed_ms": 0.0, "bytes_sent": 0, "collectives": 0, "flops": 0.0
            });
            for (name, cell) in columns.iter().zip(row) {
                line[*name] = if cell.is_empty() { "null" } else { cell }.parse().expect("a number");
            }
            serde_json::from_value(line).expect("a step of a run")
        };
        Results { steps: rows.map(step).collect(), samples }
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

    pub(super) fn largest_batch(&self) -> u64 {
        self.steps.iter().map(|line| line.batch_samples).max().unwrap_or(0)
    }

    /// Milliseconds that a step took for each of its samples: the median over steps.
    pub(super) fn median_per_sample(&self) -> f64 {
        let mut values: Vec<f64> = self.steps.iter().map(|line| line.step_ms / line.batch_samples as f64).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
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

    /// Steps until the learning rate was highest: those of the warm-up.
    pub(super) fn warmup_steps(&self) -> usize {
        let rates = self.steps.iter().map(|line| line.lr).enumerate();
        rates.rev().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(index, _)| index + 1)
    }

    /// The run in `count` parts of as many samples each: what there was before the steps that begin in each, in the mean over their samples.
    pub(super) fn parts(&self, count: usize) -> Vec<Option<Part>> {
        let (mut sums, mut weights) = (vec![Part::default(); count], vec![0.0; count]);
        let mut seconds = 0.0;
        for line in &self.steps {
            let before = line.samples_seen - line.batch_samples;
            let part = ((before as f64 / self.samples as f64 * count as f64) as usize).min(count - 1);
            let batch = line.batch_samples as f64;
            let found = Part { samples: before as f64, steps: (line.step - 1) as f64, seconds, batch, loss: line.loss };
            sums[part] = sums[part].plus(&found, batch);
            weights[part] += batch;
            seconds += line.step_ms / 1e3;
        }
        let mean = |(sum, weight): (Part, f64)| (weight > 0.0).then(|| Part::default().plus(&sum, 1.0 / weight));
        sums.into_iter().zip(weights).map(mean).collect()
    }
}

/// What there was at some time of a run; the loss and the batch are those of the step that follows.
#[derive(Clone, Copy, Default)]
pub(super) struct Part {
    pub(super) samples: f64,
    pub(super) steps: f64,
    pub(super) seconds: f64,
    pub(super) batch: f64,
    pub(super) loss: f64,
}

impl Part {
    /// This, and `weight` of another.
    fn plus(&self, other: &Part, weight: f64) -> Part {
        Part {
            samples: self.samples + weight * other.samples,
            steps: self.steps + weight * other.steps,
            seconds: self.seconds + weight * other.seconds,
            batch: self.batch + weight * other.batch,
            loss: self.loss + weight * other.loss,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_beyond_what_can_be_counted_are_refused() {
        let line = |step: u64, batch: u64, seen: u64| {
            format!(
                "{{\"step\":{step},\"loss\":1,\"lr\":1,\"grad_norm\":1,\"batch_samples\":{batch},\"batch_tokens\":1,\
                 \"samples_seen\":{seen},\"tokens_per_s\":1,\"step_ms\":1,\"exposed_ms\":1,\"bytes_sent\":1,\"collectives\":1,\
                 \"noise_scale\":null,\"wanted_batch\":null,\"validation_loss\":null,\"flops\":1}}\n"
            )
        };
        let read = |lines: [String; 2]| Results::parse(Path::new("metrics.jsonl"), &lines.concat(), 10);
        assert_eq!(read([line(1, 8, 8), line(2, 8, 16)]).unwrap().samples_seen(), 16);
        let error = read([line(1, 8, 8), line(2, u64::MAX, 7)]).err().unwrap().to_string();
        assert!(error.contains("line 2 does not follow"), "{error}");
    }
}
