//! `--dry-run`: all that comes before the first step, and what it took.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::log::Event;
use super::plan_table::bytes;
use super::run::Run;
use super::screen::proportional_memory;
use crate::jobs::Ended;
use crate::output;
use crate::{Error, print};

/// How long the parts of a start have taken, one after the other.
pub(super) struct Laps {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Laps {
    pub(super) fn begin() -> Laps {
        Laps { last: Instant::now(), laps: Vec::new() }
    }

    /// Notes that what is called `name` has ended.
    pub(super) fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, now - self.last));
        self.last = now;
    }
}

impl Run<'_> {
    /// Does what is left before the first step, and prints what all of it took. Collective.
    ///
    /// # Errors
    /// As the run itself would fail.
    pub(super) fn rehearse(mut self, stop: &AtomicBool) -> Result<Ended, Error> {
        let losses = self.validate()?;
        self.laps.lap("first validation");
        self.check_validation(&losses, "what the run begins with")?;
        if self.is_asked_to_stop(stop)? {
            return Ok(Ended::Interrupted);
        }
        let (rank, recipe) = (self.communicator.rank() as u64, &self.start.recipe);
        let first = self.progress.samples + rank * recipe.micro_batch;
        self.samples.take(first, None)?;
        self.laps.lap("first samples");
        let own = proportional_memory().unwrap_or(0);
        let largest = self.communicator.all_gather_scalars(&[own])?.iter().map(|rank| rank[0]).max().unwrap_or(0);
        if self.communicator.rank() > 0 {
            return Ok(Ended::Done);
        }
        let Laps { laps, .. } = &self.laps;
        let seconds: BTreeMap<_, _> = laps.iter().map(|(name, took)| (*name, took.as_secs_f64())).collect();
        let lines = laps.iter().map(|(name, took)| format!("\n {name:<24} {:>8.2} s", took.as_secs_f64()));
        let all: Duration = laps.iter().map(|(_, took)| *took).sum();
        let text = format!(
            "\ndry run: no step was made, and nothing was saved{}\n {:<24} {:>8.2} s\n validation loss {:.4}\n memory {} \
             of the rank that uses most, before its first step",
            lines.collect::<String>(),
            "in all",
            all.as_secs_f64(),
            losses.main,
            bytes(largest),
        );
        let event = Event::DryRun { seconds: &seconds, memory: largest, validation_loss: losses.main };
        if output::is_json() {
            output::tell(&event, text)
        } else {
            print(text)
        }
        Ok(Ended::Done)
    }
}
