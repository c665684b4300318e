//! `pillion train`: finds or starts the ranks, and has each run the loop.

pub(crate) mod checkpoints;
mod evaluation;
mod metrics;
mod plan_table;
pub(crate) mod recipe;
mod run;
mod schedule;
mod screen;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pillion_collectives::launch::Source;
use pillion_collectives::{Launch, launcher};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::Error;
use crate::settings::{LaunchKind, TrainArgs};

pub(crate) use plan_table::{plan_table, slots};
use recipe::Recipe;

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
/// What went wrong on this rank; where ranks are threads, on the first that failed.
pub fn train(settings: &TrainArgs) -> Result<i32, Error> {
    let launch = Launch::detect()?;
    let nobody = launch.source == Source::Single;
    if launch.source == Source::Local {
        launcher::bind_to_launcher()?;
    } else if nobody || settings.ranks.is_some() {
        let ranks = settings.ranks.unwrap_or(DEFAULT_RANKS);
        launcher::check_ranks(ranks)?;
        // Said once here, instead of by every rank.
        Recipe::new(settings, ranks)?;
        return match settings.launch {
            LaunchKind::Processes if ranks > 1 => Ok(launcher::run_processes(ranks)?),
            _ => threads(settings, Launch::threads(ranks)),
        };
    }
    let stop = stop_flag();
    exit_code(run::run(settings, &launch, &stop))
}

/// Runs every rank as a thread of this process.
fn threads(settings: &TrainArgs, launches: Vec<Launch>) -> Result<i32, Error> {
    let stop = stop_flag();
    let results = std::thread::scope(|scope| {
        let run = |launch: Launch| {
            let stop = &stop;
            scope.spawn(move || {
                let result = run::run(settings, &launch, stop);
                if let Err(error) = &result
                    && !matches!(error, Error::ByRankZero)
                {
                    report(&launch, error);
                }
                result
            })
        };
        let ranks: Vec<_> = launches.into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join()).collect::<Vec<_>>()
    });
    let mut code = 0;
    for result in results {
        match result {
            Ok(Ok(Ended::Done)) => {}
            Ok(Ok(Ended::Interrupted)) => code = code.max(launcher::EXIT_INTERRUPTED),
            Ok(Err(error)) => return Ok(error.code()),
            // The panic has been printed.
            Err(_) => return Ok(1),
        }
    }
    Ok(code)
}

fn exit_code(result: Result<Ended, Error>) -> Result<i32, Error> {
    result.map(|ended| match ended {
        Ended::Done => 0,
        Ended::Interrupted => launcher::EXIT_INTERRUPTED,
    })
}

/// Prints an error as this rank's.
fn report(launch: &Launch, error: &Error) {
    eprintln!("pillion: rank {}: {error}", launch.rank);
}

/// Raised by the first SIGINT or SIGTERM; the second ends the process at once.
fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let code = launcher::EXIT_INTERRUPTED;
        let registered = signal_hook::flag::register_conditional_shutdown(signal, code, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()));
        registered.expect("SIGINT and SIGTERM can be handled");
    }
    stop
}

pub(crate) fn stopping(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed)
}

pub(crate) fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}
