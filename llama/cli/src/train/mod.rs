//! `pillion train`: finds or starts the ranks, and has each run the loop.

pub(crate) mod about;
mod breakdown;
pub(crate) mod check;
pub(crate) mod checkpoints;
mod closing;
pub(crate) mod cores;
mod dry_run;
pub(crate) mod evaluation;
pub(crate) mod events;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gpu;
mod groups;
pub(crate) mod lines;
pub(crate) mod log;
mod measure;
mod metrics;
mod non_finite;
mod outputs;
mod parts;
mod plan_table;
mod progress;
pub(crate) mod recipe;
mod resume;
mod run;
mod same_settings;
mod saving;
mod schedule;
mod screen;
pub(crate) mod source;
mod start;
mod statistics;
mod step;
mod timeline;
pub(crate) mod tokenizers;
mod unit_noise;
mod unread;

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::settings::TrainArgs;
use crate::{Error, jobs, output};

pub use evaluation::ValidationData;
pub use groups::Group;
use log::LogKind;
pub(crate) use metrics::Line;
#[cfg(test)]
pub(crate) use plan_table::step_bytes;
pub(crate) use plan_table::{bytes, grouped, plan_table};
pub(crate) use resume::CHANGEABLE;
pub use schedule::Shape;
pub(crate) use start::on_rank_zero;

/// Ranks of a run that nobody else has started.
const DEFAULT_RANKS: usize = 2;

/// Trains; returns the exit code.
///
/// # Errors
/// What keeps the ranks from being started; what goes wrong on a rank has been printed.
pub fn train(settings: &TrainArgs) -> Result<i32, Error> {
    gpu::check_settings(settings)?;
    gpu::check_device(settings)?;
    if settings.log == LogKind::Json {
        output::print_json();
    }
    jobs::start(&settings.job, DEFAULT_RANKS, |launch, stop| run::run(settings, launch, stop))
}

pub(crate) fn stopping(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed)
}

pub(crate) fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}
