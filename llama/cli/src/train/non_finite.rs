//! What a run does about a step whose gradient or loss is not finite: `--on-non-finite`.
//!
//! Such a step has changed no parameter, on any rank. `skip` goes on without the step's samples.
//! `rewind` goes back to the newest checkpoint, and on without all samples since: whatever led to
//! the step was learnt from these. Samples that are left out count for every schedule, and are in
//! the checkpoint.

use pillion_collectives::Reduction;
use pillion_runtime::{State, checkpoint};

use super::checkpoints::progress;
use super::evaluation::Losses;
use super::events::Events;
use super::metrics::Metrics;
use super::progress::{Counters, Saved};
use super::run::{Run, controller};
use crate::Error;
use crate::settings::OnNonFinite;

/// What to do, and how often it was done in a row.
pub(super) struct NonFinite {
    pub(super) policy: OnNonFinite,
    limit: u64,
    in_a_row: u64,
}

impl NonFinite {
    pub(super) fn new(policy: OnNonFinite, limit: u64) -> NonFinite {
        NonFinite { policy, limit, in_a_row: 0 }
    }

    /// A step ends what `skip` has counted.
    pub(super) fn has_made_a_step(&mut self) {
        if self.policy == OnNonFinite::Skip {
            self.in_a_row = 0;
        }
    }

    /// A new checkpoint ends what `rewind` has counted.
    pub(super) fn has_saved(&mut self) {
        if self.policy == OnNonFinite::Rewind {
            self.in_a_row = 0;
        }
    }
}

impl Run<'_> {
    /// Goes on without the `batch` samples of the step that has failed with `error`, or ends the
    /// run. Collective.
    pub(super) fn leave_out(&mut self, error: Error, batch: u64) -> Result<(), Error> {
        // Every rank has the error, and all can still save what is under way.
        self.finish_saving().or_else(|error| self.survive(error))?;
        let NonFinite { policy, limit, in_a_row } = &mut self.non_finite;
        let (policy, limit) = (*policy, *limit);
        *in_a_row += 1;
        let number = *in_a_row;
        if policy == OnNonFinite::Stop {
            self.save_what_was_learnt()?;
            return Err(self.ended(format!("{}: {}", what(&error), self.remedies())));
        }
        if number > limit {
            let since = if policy == OnNonFinite::Skip { "in a row" } else { "since the newest checkpoint" };
            return Err(self.ended(format!(
                "{}; this has happened {number} times {since}, and --non-finite-limit is {limit}: the weights are probably \
                 broken, so go on from an older checkpoint with --resume PATH, or with a lower rate (--change lr --lr X)",
                what(&error)
            )));
        }
        self.say(|| what(&error));
        let next = self.progress.samples + batch;
        if policy == OnNonFinite::Rewind {
            self.rewind()?;
        }
        let left_out = next - self.progress.samples;
        self.controller.skip(left_out);
        self.progress.leave_out_until(next);
        self.say(|| {
            let (first, step) = (next - left_out, self.progress.step);
            format!("going on after step {step} without samples {first} to {}", next - 1)
        });
        Ok(())
    }

    /// Goes on without the next `batch` samples, of which no token is to be learned.
    pub(super) fn pass_over(&mut self, batch: u64) {
        let first = self.progress.samples;
        self.controller.skip(batch);
        self.progress.leave_out_until(first + batch);
        self.say(|| format!("going on without samples {first} to {}, whose tokens are all masked", first + batch - 1));
    }

    /// Saves the state before the failing step, which has changed nothing, unless a checkpoint
    /// exists already: the user can go on from it. Collective.
    fn save_what_was_learnt(&mut self) -> Result<(), Error> {
        if self.progress.newest.is_some() || self.progress.step == 0 || !self.is_finite()? {
            return Ok(());
        }
        let saved = self.begin_saving(None).and_then(|()| self.finish_saving());
        saved.or_else(|error| self.survive(error))
    }

    /// Ends a run whose weights were not finite when it was validated: no step can mend them.
    pub(super) fn check_validation(&self, losses: &Losses, weights: &str) -> Result<(), Error> {
        let sets = losses.sets.values().map(|loss| loss.unwrap_or(f64::NAN));
        let mut all = std::iter::once(losses.main).chain(sets);
        let Some(loss) = all.find(|loss| !loss.is_finite()) else { return Ok(()) };
        Err(self.ended(format!(
            "the validation loss of {weights} is {loss}, so these weights are broken: go on from an older checkpoint with \
             --resume PATH, or start again with a lower --lr"
        )))
    }

    /// Loads the newest checkpoint of this run.
    fn rewind(&mut self) -> Result<(), Error> {
        let Some(Saved { path, .. }) = self.progress.newest.clone() else {
            self.save_what_was_learnt()?;
            let reason = "--on-non-finite rewind found no checkpoint to go back to (--save-every N makes some)";
            return Err(self.ended(format!("{reason}: {}", self.remedies())));
        };
        let saved = checkpoint::open(&path)?;
        saved.load(&mut self.engine)?;
        if !self.is_finite()? {
            let path = path.display();
            return Err(self.ended(format!(
                "{path}: what it has saved is not finite, so there is no going on from it: resume from an older checkpoint with --resume PATH, or start afresh"
            )));
        }
        let found = progress(&saved)?;
        self.controller = controller(&self.start.recipe, Some(&found))?;
        self.progress = Counters::of(found, path.clone(), &self.start);
        let step = self.progress.step;
        if let Some(output) = &mut self.output {
            output.metrics = Metrics::open(output.folder.path(), step)?;
            if let Some(Err(error)) = output.events.as_mut().map(Events::rewind) {
                output.screen.say(format!("no events of the steps before: {error}"));
            }
        }
        self.say(|| format!("gone back to {}", path.display()));
        Ok(())
    }

    /// Whether all parameters and moments of all ranks are finite.
    fn is_finite(&self) -> Result<bool, Error> {
        let mut state = State::default();
        let mut bad = [0.0];
        for unit in 0..self.engine.layout().units.len() {
            self.engine.read_state(unit, &mut state)?;
            let State { master, states } = &state;
            if ![master].into_iter().chain(states).flatten().all(|value| value.is_finite()) {
                bad[0] = 1.0;
            }
        }
        self.communicator.all_reduce_scalars(&mut bad, Reduction::Max)?;
        Ok(bad[0] == 0.0)
    }

    /// What a user can do about it.
    fn remedies(&self) -> String {
        match &self.progress.newest {
            Some(Saved { path, .. }) => format!(
                "go on from {} without this step's samples (--resume auto --on-non-finite skip), without all samples since a \
                 checkpoint (rewind), or with another learning rate (--resume auto --change lr --lr X); if that fails, its \
                 weights are broken already: go on from an older checkpoint with --resume PATH",
                path.display()
            ),
            None => "nothing was saved, so start again with a lower --lr or with --on-non-finite skip".to_owned(),
        }
    }

    /// An end that every rank has come to, and rank 0 says.
    fn ended(&self, reason: String) -> Error {
        if self.communicator.rank() == 0 { Error::NonFinite(reason) } else { Error::ByRankZero { code: 1 } }
    }
}

/// What is wrong with a step, without what a caller of the runtime could do about it.
fn what(error: &Error) -> String {
    match error {
        Error::Runtime(pillion_runtime::Error::NonFinite { step, count, loss }) => format!(
            "{count} gradient values of update {step} are not finite and its loss is {loss}, so no parameter was changed"
        ),
        error => error.to_string(),
    }
}
