//! How far a run has come.

use std::ops::Range;
use std::path::PathBuf;

use super::checkpoints::{Best, Progress, count};
use super::start::Start;
use crate::run_folder;

/// Steps and samples of a run, and what it can go back to.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    /// Steps made.
    pub(super) step: u64,
    /// Samples dealt, those left out included.
    pub(super) samples: u64,
    /// Samples that were left out, in order; ranges do not touch.
    pub(super) left_out: Vec<Range<u64>>,
    /// The checkpoint with the lowest validation loss, with --keep-best.
    pub(super) best: Option<Best>,
    /// The newest checkpoint.
    pub(super) newest: Option<Saved>,
}

/// A checkpoint of this run.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub(super) step: u64,
    pub(super) path: PathBuf,
}

impl Counters {
    /// Those that a checkpoint keeps. Its best checkpoint counts where it is of the run that goes on,
    /// and its loss is on the same samples.
    pub(super) fn of(saved: Progress, path: PathBuf, start: &Start) -> Counters {
        let Progress { step, samples, left_out, best, .. } = saved;
        let best = best.filter(|best| best.on == start.validated_on && run_folder::is_of(&start.out, &path));
        Counters { step, samples, left_out, best, newest: Some(Saved { step, path }) }
    }

    /// Goes on at sample `next` without the samples before it.
    pub(super) fn leave_out_until(&mut self, next: u64) {
        match self.left_out.last_mut() {
            Some(last) if last.end == self.samples => last.end = next,
            _ => self.left_out.push(self.samples..next),
        }
        self.samples = next;
    }

    /// Number of samples that were left out.
    pub(super) fn left_out(&self) -> u64 {
        count(&self.left_out)
    }
}
