//! `pillion train`: finds or starts the ranks, and has each run the loop.

mod breakdown;
pub(crate) mod checkpoints;
mod closing;
mod cores;
mod evaluation;
mod metrics;
mod non_finite;
mod plan_table;
mod progress;
pub(crate) mod recipe;
mod resume;
mod run;
mod saving;
mod schedule;
mod screen;
mod source;
mod start;
mod statistics;
mod timeline;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pillion_collectives::launch::Source;
use pillion_collectives::{Launch, launcher};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::settings::{LaunchKind, TrainArgs};
use crate::{Error, complain};

pub(crate) use metrics::Line;
#[cfg(test)]
pub(crate) use plan_table::step_bytes;
pub(crate) use plan_table::{bytes, grouped, plan_table};
pub(crate) use resume::CHANGEABLE;

/// Ranks of a run that nobody else has started.
const DEFAULT_RANKS: usize = 2;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It has done what was asked.
    Done,
    /// A signal has ended it early.
    Interrupted,
}

/// Trains; returns the exit code.
///
/// # Errors
/// What keeps the ranks from being started; what goes wrong on a rank has been printed.
pub fn train(settings: &TrainArgs) -> Result<i32, Error> {
    let launch = Launch::detect()?;
    let nobody = launch.source == Source::Single;
    if launch.source == Source::Local {
        launcher::bind_to_launcher()?;
    } else if let (Some(ranks), false) = (settings.ranks, nobody || launch.world == 1) {
        // Each of them would start a job of its own.
        return Err(Error::Setting(format!(
            "--ranks {ranks} asks for ranks of its own, but this is one of {} ranks started by {}: leave --ranks out",
            launch.world, launch.source
        )));
    } else if nobody || settings.ranks.is_some() {
        let ranks = settings.ranks.unwrap_or(DEFAULT_RANKS);
        launcher::check_ranks(ranks)?;
        cores::check(settings.threads, ranks)?;
        return match settings.launch {
            LaunchKind::Processes if ranks > 1 => Ok(launcher::run_processes(ranks)?),
            _ => threads(settings, Launch::threads(ranks)),
        };
    }
    let stop = stop_flag();
    Ok(exit_code(&launch, run::run(settings, &launch, &stop)))
}

/// Runs every rank as a thread of this process.
fn threads(settings: &TrainArgs, launches: Vec<Launch>) -> Result<i32, Error> {
    let stop = stop_flag();
    let codes = std::thread::scope(|scope| {
        let run = |launch: Launch| {
            let stop = &stop;
            scope.spawn(move || exit_code(&launch, run::run(settings, &launch, stop)))
        };
        let ranks: Vec<_> = launches.into_iter().map(run).collect();
        // A panic has been printed.
        ranks.into_iter().map(|rank| rank.join().unwrap_or(1)).collect::<Vec<i32>>()
    });
    // What caused the end counts more than what followed from it.
    let weight = |code: &i32| match *code {
        0 => 0,
        launcher::EXIT_INTERRUPTED => 1,
        launcher::EXIT_CONSEQUENCE => 2,
        _ => 3,
    };
    Ok(codes.into_iter().rev().max_by_key(weight).unwrap_or(0))
}

/// How a rank ended, as an exit code; prints its error, unless another rank prints the same.
fn exit_code(launch: &Launch, result: Result<Ended, Error>) -> i32 {
    match result {
        Ok(Ended::Done) => 0,
        Ok(Ended::Interrupted) => launcher::EXIT_INTERRUPTED,
        Err(error) => {
            let rank = launch.rank;
            let is_one_of_many = rank > 0 || (error.is_of_one_rank() && launch.world > 1);
            if is_one_of_many && (error.is_of_one_rank() || !error.is_everywhere()) {
                complain(format_args!("rank {rank}: {error}"));
            } else if !is_one_of_many {
                complain(&error);
            }
            error.code()
        }
    }
}

/// Signals of one kind within this time are one: `timeout` and some schedulers send each twice, to a process and to its group.
const ONE_SIGNAL: Duration = Duration::from_secs(1);

/// Raised by the first SIGINT, SIGTERM or SIGUSR1, which schedulers send before a time limit; the second ends the process at once.
fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).expect("these signals can be handled");
    std::thread::spawn(move || {
        let mut first = None;
        for signal in signals.forever() {
            raised.store(true, Ordering::Relaxed);
            let (kind, time) = *first.get_or_insert((signal, Instant::now()));
            if signal != kind || time.elapsed() > ONE_SIGNAL {
                // As a shell says it: nothing has been saved.
                signal_hook::low_level::exit(128 + signal);
            }
        }
    });
    stop
}

pub(crate) fn stopping(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed)
}

pub(crate) fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}
