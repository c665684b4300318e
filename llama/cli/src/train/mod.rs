//! `pillion train`: finds or starts the ranks, and has each run the loop.

pub(crate) mod about;
mod breakdown;
pub(crate) mod checkpoints;
mod closing;
mod cores;
mod evaluation;
pub(crate) mod events;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gpu;
pub(crate) mod lines;
pub(crate) mod log;
mod measure;
mod metrics;
mod non_finite;
mod plan_table;
mod progress;
pub(crate) mod recipe;
mod resume;
mod run;
mod same_settings;
mod saving;
mod schedule;
mod screen;
mod source;
mod start;
mod statistics;
mod timeline;

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use pillion_collectives::launch::Source;
use pillion_collectives::launcher::Node;
use pillion_collectives::limits::explain_thread;
use pillion_collectives::{Communicator, Launch, launcher, stop};

use crate::settings::{LaunchKind, TrainArgs};
use crate::{Error, complain, output};

use log::LogKind;
pub(crate) use metrics::Line;
#[cfg(test)]
pub(crate) use plan_table::step_bytes;
pub(crate) use plan_table::{bytes, grouped, plan_table};
pub(crate) use resume::CHANGEABLE;

/// Ranks of a job, at most.
const MOST_RANKS: usize = 1 << 20;
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
    gpu::check(settings)?;
    if settings.log == LogKind::Json {
        output::print_json();
    }
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
    } else if let (Some(flag), false) = (of_hosts(settings), nobody) {
        return Err(Error::Setting(format!(
            "--{flag} is for ranks that nobody else starts, but this is one of {} ranks started by {}: leave it out",
            launch.world, launch.source
        )));
    } else if nobody || settings.ranks.is_some() {
        let ranks = settings.ranks.unwrap_or(DEFAULT_RANKS);
        launcher::check_ranks(ranks, settings.oversubscribe)?;
        cores::check(settings.threads, ranks)?;
        let node = node(settings, ranks)?;
        // Kernels of ranks that share a GPU run side by side in one process alone.
        let together = settings.device.is_gpu() && !settings.given.contains("launch") && node.of == 1;
        return match settings.launch {
            LaunchKind::Processes if (ranks > 1 || node.of > 1) && !together => {
                let options =
                    launcher::Options { oversubscribe: settings.oversubscribe, node, ..launcher::Options::default() };
                Ok(launcher::run_processes_with(ranks, &options)?)
            }
            _ => threads(settings, node.threads(ranks)?),
        };
    }
    cores::threads(settings.threads, &launch)?;
    let result = match stop::flag(&launch) {
        Ok(stop) => run::run(settings, &launch, &stop),
        Err(error) => {
            let error = no_signals(&error);
            let is_said = Communicator::decline(&launch, &error.to_string());
            Err(if is_said { Error::ByRankZero { code: error.code() } } else { error })
        }
    };
    Ok(exit_code(&launch, result))
}

/// The first flag given that says where the run's hosts are.
fn of_hosts(settings: &TrainArgs) -> Option<&'static str> {
    ["nodes", "node-rank", "address"].into_iter().find(|&flag| settings.given.contains(flag))
}

/// Which of the run's hosts this is, where nobody else has started `ranks` ranks on it.
fn node(settings: &TrainArgs, ranks: usize) -> Result<Node, Error> {
    let (number, of) = (settings.node_rank.unwrap_or(0) as usize, settings.nodes as usize);
    let refuse = |reason: String| Err(Error::Setting(reason));
    if number >= of {
        return refuse(format!("--node-rank {number} is none of --nodes {of}: they are counted from 0"));
    }
    if of > 1 && settings.launch == LaunchKind::Threads {
        return refuse("--launch threads keeps all ranks in one process: leave it out, or --nodes".to_owned());
    }
    let world = ranks * of;
    if world > MOST_RANKS {
        return refuse(format!("--nodes {of} with {ranks} ranks each are {world}: at most {MOST_RANKS} make a job"));
    }
    let (options, rank) = (run::options(settings), number * ranks);
    let first = Launch { rank, world, local_rank: 0, local_world: ranks, source: Source::Local, ..Launch::single() };
    let mut node = Node { number, of, address: settings.address.clone() };
    if of == 1 && options.needs_meeting(&first) {
        node = node.meeting_here()?;
    } else if of == 1 && node.address.is_some() {
        return refuse("--address is where several hosts meet: give --nodes and --node-rank as well".to_owned());
    }
    let meeting = node.meeting()?;
    if of > 1 && meeting.is_none() {
        let remedy = "give --address HOST:PORT, of the first host, or PILLION_ADDRESS";
        return refuse(format!("--nodes needs to know where ranks meet: {remedy}"));
    }
    options.check(&Launch { meeting, ..first })?;
    Ok(node)
}

/// Runs every rank as a thread of this process.
fn threads(settings: &TrainArgs, launches: Vec<Launch>) -> Result<i32, Error> {
    let stop = stop::flag(&launches[0]).map_err(|error| no_signals(&error))?;
    let codes = launcher::run_threads(launches, |launch| exit_code(&launch, run::run(settings, &launch, &stop)))?;
    // A panic has been printed.
    let codes = codes.into_iter().map(|code| code.unwrap_or(1));
    // What caused the end counts more than what followed from it.
    let weight = |code: &i32| match *code {
        0 => 0,
        launcher::EXIT_INTERRUPTED => 1,
        launcher::EXIT_CONSEQUENCE => 2,
        _ => 3,
    };
    Ok(codes.rev().max_by_key(weight).unwrap_or(0))
}

/// How a rank ended, as an exit code; prints its error, unless another rank prints the same.
fn exit_code(launch: &Launch, result: Result<Ended, Error>) -> i32 {
    match result {
        Ok(Ended::Done) => 0,
        Ok(Ended::Interrupted) => launcher::EXIT_INTERRUPTED,
        Err(error) if error.is_said_elsewhere() => error.code(),
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

fn no_signals(error: &std::io::Error) -> Error {
    pillion_collectives::Error::System { what: "starting a thread", reason: explain_thread(error) }.into()
}

pub(crate) fn stopping(stop: &AtomicBool) -> bool {
    stop.load(Ordering::Relaxed)
}

pub(crate) fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}
