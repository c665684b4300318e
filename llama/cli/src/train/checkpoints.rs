//! What a run keeps besides its parameters, and which checkpoint it goes on from.

use std::num::NonZero;
use std::ops::Range;
use std::path::{Path, PathBuf};

use pillion_abs::State as ControllerState;
use pillion_runtime::checkpoint::{self, Checkpoint, Staging};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::evaluation::ValidationData;
use super::parts::Part;
use super::recipe::Recipe;
use crate::settings::{OnNonFinite, TrainArgs};
use crate::{Error, run_folder};

/// The trainer's part of a checkpoint. A field that a later version adds has a default, so that
/// checkpoints of earlier versions stay readable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What decides the run's numbers.
    pub(crate) recipe: Recipe,
    /// Checksum of the tokens.
    pub(crate) data: String,
    /// What `--data` said, absolute; none for the default text, and in checkpoints of versions that
    /// did not keep it.
    #[serde(default)]
    pub(crate) data_path: Option<PathBuf>,
    /// The token files and folders that it learns from; none where that is text.
    #[serde(default)]
    pub(crate) tokens: Vec<Part>,
    /// Steps made.
    pub(crate) step: u64,
    /// Samples dealt, those left out included: the next step begins with this one.
    pub(crate) samples: u64,
    /// Of these, the samples that were left out because their gradients were not finite, in order.
    #[serde(default)]
    pub(crate) left_out: Vec<Range<u64>>,
    /// None in checkpoints of versions that did not keep them.
    #[serde(default)]
    pub(crate) habits: Option<Habits>,
    /// The checkpoint with the lowest validation loss, with --keep-best.
    #[serde(default)]
    pub(crate) best: Option<Best>,
    /// The controller's.
    pub(crate) controller: ControllerState,
}

impl Progress {
    /// Reads what a checkpoint says.
    ///
    /// # Errors
    /// Says what no run can have written.
    pub(super) fn parse(extra: &Value) -> Result<Progress, String> {
        let progress: Progress = serde_json::from_value(extra.clone()).map_err(|error| error.to_string())?;
        let Progress { recipe, step, samples, left_out, .. } = &progress;
        recipe.check_shape().map_err(|error| error.to_string())?;
        if step > samples || *samples > MOST_SAMPLES {
            return Err(format!("{step} steps with {samples} samples are impossible"));
        }
        let mut end = 0;
        for range in left_out {
            if range.start < end || range.is_empty() || range.end > *samples {
                return Err(format!(
                    "samples {range:?} of {samples} cannot have been left out after those before {end}"
                ));
            }
            end = range.end;
        }
        Ok(progress)
    }
}

/// Samples of a run at most, far more than any has.
const MOST_SAMPLES: u64 = 1 << 53;

/// Number of samples in some ranges.
pub(crate) fn count(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// A checkpoint, and its validation loss in nats a token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Best {
    pub(crate) step: u64,
    pub(crate) loss: f64,
    /// What the loss is on: losses on other samples do not compare.
    pub(crate) on: String,
}

/// How a run saves, validates, and ends, which decides no number of the training. A resume keeps
/// them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Habits {
    pub(crate) save_every: u64,
    /// What the user chose; none in checkpoints of versions that had no choice, too.
    #[serde(default)]
    pub(crate) save_memory: Option<Staging>,
    pub(crate) keep: Option<NonZero<usize>>,
    pub(crate) validate_every: u64,
    #[serde(default)]
    pub(crate) validate_every_samples: Option<NonZero<u64>>,
    pub(crate) validation_samples: u64,
    /// As they were found: of text, the token file.
    #[serde(default)]
    pub(crate) validation_data: Vec<ValidationData>,
    #[serde(default)]
    pub(crate) keep_best: bool,
    #[serde(default)]
    pub(crate) tensorboard: bool,
    /// Tokens of text at the end.
    pub(crate) sample: usize,
    pub(crate) on_non_finite: OnNonFinite,
    pub(crate) non_finite_limit: u64,
}

impl Habits {
    pub(crate) fn of(settings: &TrainArgs) -> Habits {
        let &TrainArgs { save_every, save_memory, keep, validate_every, validation_samples, sample, .. } = settings;
        let &TrainArgs { validate_every_samples, keep_best, tensorboard, .. } = settings;
        let non_finite_limit = settings.non_finite_limit;
        let on_non_finite = settings.on_non_finite.unwrap_or_default();
        Habits {
            save_every,
            save_memory,
            keep,
            validate_every,
            validate_every_samples,
            validation_samples,
            validation_data: settings.validation_data.clone(),
            keep_best,
            tensorboard,
            sample,
            on_non_finite,
            non_finite_limit,
        }
    }

    /// What memory the run's saver has. No step waits for a save at the end of the run, so a run
    /// that saves only there needs no copies.
    pub(crate) fn staging(&self) -> Staging {
        let default = if self.save_every > 0 { Staging::Copies } else { Staging::SMALL_RING };
        self.save_memory.unwrap_or(default)
    }
}

/// What a run may go on from.
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    /// Checkpoints with a sound manifest, newest first, not verified yet.
    pub(crate) paths: Vec<PathBuf>,
    /// Whether the user named one checkpoint, so that no other will do.
    pub(crate) is_named: bool,
    /// Why newer ones were passed over, in the words to print.
    pub(crate) passed_over: Vec<String>,
    /// The folder that was looked through.
    folder: PathBuf,
}

impl Candidates {
    /// Those in the folder of checkpoints `folder`.
    fn of_folder(folder: PathBuf) -> Result<Candidates, Error> {
        let mut found = Candidates { folder, ..Candidates::default() };
        for path in checkpoint::folders(&found.folder)? {
            match checkpoint::open(&path) {
                Ok(_) => found.paths.push(path),
                Err(error) => found.pass_over(&error),
            }
        }
        Ok(found)
    }

    /// Those that `--resume auto` means in the run's folder `out`.
    ///
    /// # Errors
    /// [`Error::File`] when there are checkpoints, but none has a sound manifest.
    pub(crate) fn of_run(out: &Path) -> Result<Candidates, Error> {
        let found = Candidates::of_folder(run_folder::checkpoints(out))?;
        // Starting afresh would put a run aside that can perhaps be saved.
        if found.paths.is_empty() && !found.passed_over.is_empty() { Err(found.exhausted()) } else { Ok(found) }
    }

    /// Those that a path stands for: itself, the checkpoints in it, or those of the run in it.
    ///
    /// # Errors
    /// [`Error::File`] when there is none with a sound manifest.
    pub(crate) fn at(path: &Path) -> Result<Candidates, Error> {
        if path.join("manifest.json").exists() {
            checkpoint::open(path)?;
            return Ok(Candidates { paths: vec![path.to_owned()], is_named: true, ..Candidates::default() });
        }
        for folder in [path.to_owned(), run_folder::checkpoints(path)] {
            let found = Candidates::of_folder(folder)?;
            if !found.paths.is_empty() {
                return Ok(found);
            }
            if !found.passed_over.is_empty() {
                return Err(found.exhausted());
            }
        }
        Err(Error::file(path, "there is no whole checkpoint here: give the folder of a run, or of a checkpoint"))
    }

    /// Notes why a checkpoint is of no use.
    pub(crate) fn pass_over(&mut self, why: &pillion_runtime::Error) {
        self.passed_over.push(format!("passed over a checkpoint: {why}"));
    }

    /// That none of them was of any use.
    pub(crate) fn exhausted(&self) -> Error {
        let reason =
            format!("no checkpoint in it is whole ({}); name another one by its path", self.passed_over.join("; "));
        Error::file(&self.folder, reason)
    }
}

/// Checks that a run in whose folder a checkpoint lies can go on from it: checkpoints of later
/// steps get other names then.
///
/// # Errors
/// [`Error::File`] when its name has no step, as of one that was set aside.
pub(crate) fn check_name(path: &Path) -> Result<(), Error> {
    match checkpoint::is_named_as_one(path) {
        true => Ok(()),
        false => {
            Err(Error::file(path, "its name has no step: give it the name step-, with eight digits of its step, first"))
        }
    }
}

/// A checkpoint's trainer's part.
///
/// # Errors
/// [`Error::File`] when no run wrote it.
pub(crate) fn progress(checkpoint: &Checkpoint) -> Result<Progress, Error> {
    if checkpoint.extra().get("imported").is_some() {
        let path = checkpoint.path.display();
        let reason =
            format!("it was imported, so there is no run to go on with: begin one with --from {path}, and --out");
        return Err(Error::file(&checkpoint.path, reason));
    }
    let fail = |why| {
        format!("its manifest was not written by `pillion train`, or by a later version: {why}; name another one")
    };
    Progress::parse(checkpoint.extra()).map_err(|why| Error::file(&checkpoint.path, fail(why)))
}

/// Makes order among the checkpoints of the run in `out`, once it has begun or every rank has
/// loaded what it goes on from: removes what interrupted saves have left, and gives other names to
/// checkpoints of later steps, which were passed over or are not wanted any more.
pub(crate) fn tidy(out: &Path, resume: Option<&Path>) -> Result<(), Error> {
    for gone in checkpoint::remove_left(&run_folder::checkpoints(out))? {
        crate::print(format_args!("removed {}, which an interrupted run has left", gone.display()));
    }
    let Some(resume) = resume.filter(|resume| run_folder::is_of(out, resume)) else { return Ok(()) };
    for aside in checkpoint::set_later_aside(resume)? {
        crate::print(format_args!(
            "a checkpoint of a later step, which this run will make again, is now {}",
            aside.display()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fuzzing::progress::seeds;
    use super::*;

    #[test]
    fn what_no_run_can_have_written_is_refused() {
        let whole: Value = serde_json::from_slice(&seeds()[0]).unwrap();
        Progress::parse(&whole).unwrap();
        for (place, value, words) in [
            ("/left_out", json!([{ "start": 16, "end": 8 }]), "cannot have been left out"),
            ("/left_out", json!([{ "start": 8, "end": 16 }, { "start": 12, "end": 20 }]), "cannot have been left out"),
            ("/left_out", json!([{ "start": 8, "end": 99 }]), "cannot have been left out"),
            ("/step", json!(41), "41 steps with 40 samples"),
            ("/samples", json!(u64::MAX), "are impossible"),
            ("/recipe/seq", json!(0), "--seq is 0"),
            ("/recipe/micro_batch", json!(0), "--micro-batch is 0"),
            ("/recipe/seq", json!(1u64 << 40), "out of range"),
            ("/recipe/model/num_attention_heads", json!(0), "num_attention_heads is 0"),
            ("/recipe/model/rms_norm_eps", json!(1e99), "rms_norm_eps is inf"),
            ("/recipe/model/num_hidden_layers", json!(1u64 << 60), "num_hidden_layers is"),
        ] {
            let mut changed = whole.clone();
            *changed.pointer_mut(place).unwrap() = value;
            let error = Progress::parse(&changed).unwrap_err();
            assert!(error.contains(words), "{place}: {error}");
        }
    }
}
