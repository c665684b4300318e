//! The ranks of a command: found in the environment, or started here, as processes or as threads.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pillion_collectives::launch::Source;
use pillion_collectives::launcher::Node;
use pillion_collectives::limits::explain_thread;
use pillion_collectives::{Communicator, Launch, Options, launcher, stop};

use crate::settings::{JobArgs, LaunchKind};
use crate::train::cores;
use crate::{Error, complain};

/// Ranks of a job, at most.
pub(crate) const MOST_RANKS: usize = 1 << 20;

/// How a rank's work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It has done what was asked.
    Done,
    /// A signal has ended it early.
    Interrupted,
}

/// What the settings say to a communicator, which `stop` ends.
pub(crate) fn options(settings: &JobArgs, stop: Option<Arc<AtomicBool>>) -> Options {
    let timeout = Duration::from_secs(settings.timeout.max(1));
    Options {
        timeout,
        startup_timeout: timeout,
        backend: settings.backend,
        wire: settings.wire,
        reduce_groups: settings.reduce_groups,
        stop,
        ..Options::default()
    }
}

/// Joins the other ranks.
///
/// # Errors
/// When they do not come.
pub(crate) fn join(settings: &JobArgs, launch: &Launch, stop: &Arc<AtomicBool>) -> Result<Arc<Communicator>, Error> {
    Ok(Arc::new(Communicator::connect(launch, options(settings, Some(stop.clone())))?))
}

/// Tells the other ranks that this one ends with an error, which is returned. To be called while
/// the rank's operations are still in flight: their owner would wait for them in vain.
pub(crate) fn give_up(communicator: &Communicator, error: Error) -> Error {
    if !error.is_everywhere() {
        communicator.abort(&error.to_string());
    }
    error
}

/// Runs `work` on each rank; returns the exit code. Of ranks that nobody else starts there are
/// `default_ranks`, unless the settings say how many.
///
/// # Errors
/// What keeps the ranks from being started; what goes wrong on a rank has been printed.
pub(crate) fn start(
    settings: &JobArgs,
    default_ranks: usize,
    work: impl Fn(&Launch, &Arc<AtomicBool>) -> Result<Ended, Error> + Sync,
) -> Result<i32, Error> {
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
        let ranks = settings.ranks.unwrap_or(default_ranks);
        launcher::check_ranks(ranks, settings.oversubscribe)?;
        cores::check(settings.threads, ranks)?;
        let node = node(settings, ranks)?;
        // Kernels of ranks that share a GPU run side by side in one process alone.
        let together = settings.device.is_gpu() && node.of == 1;
        let default = if together { LaunchKind::Threads } else { LaunchKind::Processes };
        return match settings.launch.unwrap_or(default) {
            LaunchKind::Processes if ranks > 1 || node.of > 1 => {
                let options =
                    launcher::Options { oversubscribe: settings.oversubscribe, node, ..launcher::Options::default() };
                Ok(launcher::run_processes_with(ranks, &options)?)
            }
            _ => threads(node.threads(ranks)?, work),
        };
    }
    cores::threads(settings.threads, &launch)?;
    let result = match stop::flag(&launch) {
        Ok(stop) => work(&launch, &stop),
        Err(error) => {
            let error = no_signals(&error);
            let is_said = Communicator::decline(&launch, &error.to_string());
            Err(if is_said { Error::ByRankZero { code: error.code() } } else { error })
        }
    };
    Ok(exit_code(&launch, result))
}

/// The first flag given that says where the run's hosts are.
fn of_hosts(settings: &JobArgs) -> Option<&'static str> {
    let JobArgs { nodes, node_rank, address, .. } = settings;
    let flags = [(nodes.is_some(), "nodes"), (node_rank.is_some(), "node-rank"), (address.is_some(), "address")];
    flags.into_iter().find(|(is_given, _)| *is_given).map(|(_, flag)| flag)
}

/// Which of the run's hosts this is, where nobody else has started `ranks` ranks on it.
fn node(settings: &JobArgs, ranks: usize) -> Result<Node, Error> {
    let (number, of) = (settings.node_rank.unwrap_or(0) as usize, settings.nodes.unwrap_or(1) as usize);
    let refuse = |reason: String| Err(Error::Setting(reason));
    if number >= of {
        return refuse(format!("--node-rank {number} is none of --nodes {of}: they are counted from 0"));
    }
    if of > 1 && settings.launch == Some(LaunchKind::Threads) {
        return refuse("--launch threads keeps all ranks in one process: leave it out, or --nodes".to_owned());
    }
    let world = ranks * of;
    if world > MOST_RANKS {
        return refuse(format!("--nodes {of} with {ranks} ranks each are {world}: at most {MOST_RANKS} make a job"));
    }
    let (options, rank) = (options(settings, None), number * ranks);
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
fn threads(
    launches: Vec<Launch>,
    work: impl Fn(&Launch, &Arc<AtomicBool>) -> Result<Ended, Error> + Sync,
) -> Result<i32, Error> {
    let stop = stop::flag(&launches[0]).map_err(|error| no_signals(&error))?;
    let codes = launcher::run_threads(launches, |launch| exit_code(&launch, work(&launch, &stop)))?;
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
