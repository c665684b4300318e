//! Checkpoints of a run under way, written in the background.

use std::path::PathBuf;

use pillion_runtime::checkpoint::Saved;

use super::checkpoints::{Best, Progress};
use super::log::Event;
use super::outputs::Output;
use super::progress;
use super::run::Run;
use super::source::fingerprint;
use crate::{Error, run_folder};

impl Run<'_> {
    /// Where the checkpoint of the last step is, or will be.
    pub(super) fn checkpoint(&self) -> PathBuf {
        self.checkpoint_of(self.progress.step)
    }

    /// The checkpoint of a step of this run.
    fn checkpoint_of(&self, step: u64) -> PathBuf {
        run_folder::checkpoints(&self.start.out).join(format!("step-{step:08}"))
    }

    /// With --keep-best, the checkpoint with the lowest validation loss, and this loss.
    pub(super) fn best(&self) -> Option<(PathBuf, f64)> {
        self.progress.best.as_ref().map(|best| (self.checkpoint_of(best.step), best.loss))
    }

    /// Whether the model is to be saved because its validation loss is lower than all before.
    pub(super) fn is_best(&self, loss: f64) -> bool {
        let best = self.best_to_be.as_ref().or(self.progress.best.as_ref());
        self.start.habits.keep_best && loss.is_finite() && best.is_none_or(|best| loss < best.loss)
    }

    /// Begins to save in the background. `best` is the validation loss, where it is the lowest so
    /// far.
    pub(super) fn begin_saving(&mut self, best: Option<f64>) -> Result<(), Error> {
        if let Some(Output { folder, screen, .. }) = &mut self.output
            && let Err(error) = folder.restore()
        {
            if folder.is_lost() {
                return Err(error);
            }
            // The saver, which every rank asks, will say so.
            screen.say(&error);
        }
        let (step, on) = (self.progress.step, &self.start.validated_on);
        self.best_to_be = best.map(|loss| Best { step, loss, on: on.clone() });
        let progress = Progress {
            recipe: self.start.recipe.clone(),
            data: fingerprint(&self.dataset)?,
            data_path: self.start.text.clone(),
            tokens: self.start.given_tokens.clone(),
            step: self.progress.step,
            samples: self.progress.samples,
            left_out: self.progress.left_out.clone(),
            habits: Some(self.start.habits.clone()),
            best: self.best_to_be.clone().or(self.progress.best.clone()),
            controller: self.controller.state().clone(),
        };
        // Nothing older is removed before this one is whole.
        self.saver.keep_besides(progress.best.as_ref().map(|best| best.step));
        let extra = serde_json::to_value(&progress).expect("plain values");
        Ok(self.saver.begin(&self.engine, self.progress.step, &extra)?)
    }

    /// Waits for the save under way, if any.
    pub(super) fn finish_saving(&mut self) -> Result<(), Error> {
        let saved = self.saver.wait(&self.engine)?;
        self.note(saved);
        Ok(())
    }

    pub(super) fn note(&mut self, saved: Option<Saved>) {
        let Some(Saved { path, step, held, took, not_removed }) = saved else { return };
        self.progress.newest = Some(progress::Saved { step, path: path.clone() });
        self.non_finite.has_saved();
        if let Some(best) = self.best_to_be.take_if(|best| best.step == step) {
            self.progress.best = Some(best);
        }
        if let Some(output) = &self.output {
            let (seconds, held_seconds) = (took.as_secs_f64(), held.as_secs_f64());
            let held = held_seconds * 1e3;
            let text = format!("saved {} in {seconds:.1} s, of which steps waited {held:.0} ms", path.display());
            output.screen.tell(&Event::Checkpoint { step, path: &path, seconds, held_seconds }, text);
        }
        for error in not_removed {
            self.say(|| format!("an older checkpoint is still there: {error}"));
        }
    }

    /// Says that a save has failed, and goes on; any other failure ends the run.
    pub(super) fn survive(&mut self, error: Error) -> Result<(), Error> {
        match error {
            Error::Runtime(error @ pillion_runtime::Error::File { .. }) => {
                self.best_to_be = None;
                self.say(|| format!("no checkpoint of this step: {error}"));
                Ok(())
            }
            error => Err(error),
        }
    }
}
