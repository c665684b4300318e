//! The command: finds or starts the ranks, has each measure, and turns what happened into an exit code.

use std::ffi::OsString;

use clap::Parser;
use pillion_collectives::launch::Source;
use pillion_collectives::launcher::Node;
use pillion_collectives::{Communicator, Launch, launcher, limits};
use pillion_kernels::cpu::Isa;

use crate::arguments::{Arguments, Settings};
use crate::{Error, gpu, sweep};

/// Ranks where neither a launcher nor the arguments say how many.
const DEFAULT_RANKS: usize = 2;

/// Runs the command with these arguments, the program's name first; returns its exit code: 0, 1 for a failure or wrong results, 2 for
/// arguments that cannot be, or what [`launcher::run_processes`] says of ranks that were lost.
pub fn main(arguments: impl Iterator<Item = OsString>) -> i32 {
    // Without a handler the first write beyond `ulimit -f` ends the program, which then still does.
    let _ = limits::ignore_file_size_signal();
    let arguments: Vec<OsString> = arguments.collect();
    let command: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let settings = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments.settings(),
        Err(error) => {
            // A closed stream has no reader to tell.
            let print = || drop(error.print());
            if error.exit_code() == 0 {
                print()
            } else {
                Communicator::decline_once(&error.to_string(), print)
            }
            return error.exit_code();
        }
    };
    let settings = match settings {
        Ok(settings) => settings,
        Err(error) => {
            Communicator::decline_once(&error.to_string(), || complain(&error.to_string()));
            return error.code();
        }
    };
    start(&settings, &command).unwrap_or_else(|error| {
        complain(&error.to_string());
        error.code()
    })
}

fn start(settings: &Settings, command: &[String]) -> Result<i32, Error> {
    // Kernels cannot say that they are asked for instructions that there are not.
    Isa::of_process().map_err(|error| Error::Usage(error.to_string()))?;
    settings.gpu.map(gpu::check).transpose()?;
    let launch = Launch::detect()?;
    if settings.compare.is_some() && matches!(launch.source, Source::Single | Source::Local | Source::Torchrun) {
        let text =
            "--compare mpi needs ranks that MPI knows, this is none of them: start them with `mpirun -n 2 collbench …`";
        return Err(Error::Usage(text.into()));
    }
    match launch.source {
        Source::Single => {
            let ranks = settings.ranks.unwrap_or(DEFAULT_RANKS);
            launcher::check_ranks(ranks, settings.oversubscribe)?;
            check_groups(settings, ranks)?;
            let mut node = Node::default();
            if settings.options.needs_meeting(&launch) {
                node = node.meeting_here()?;
            }
            if settings.threads || ranks == 1 {
                return threads(settings, command, node.threads(ranks)?);
            }
            let options =
                launcher::Options { oversubscribe: settings.oversubscribe, node, ..launcher::Options::default() };
            return Ok(launcher::run_processes_with(ranks, &options)?);
        }
        Source::Local => launcher::bind_to_launcher()?,
        source => {
            let world = launch.world;
            let refuse = |text: String| -> Result<(), Error> {
                // One voice for all of them.
                if launch.rank == 0 { Err(Error::Usage(text)) } else { Ok(()) }
            };
            if settings.threads {
                refuse(format!(
                    "--threads starts ranks of its own, but this is one of {world} ranks started by {source}: leave it out"
                ))?;
                return Ok(2);
            }
            if let Some(ranks) = settings.ranks.filter(|&ranks| ranks != world) {
                refuse(format!("-r {ranks} contradicts the {world} ranks started by {source}: leave it out"))?;
                return Ok(2);
            }
            if let Err(Error::Usage(text)) = check_groups(settings, world) {
                refuse(text)?;
                return Ok(2);
            }
        }
    }
    Ok(measure(settings, &launch, command))
}

fn check_groups(settings: &Settings, ranks: usize) -> Result<(), Error> {
    let options = &settings.options;
    for (flag, number) in [("--reduce-groups", options.reduce_groups), ("--hosts", options.simulated_hosts)] {
        if !ranks.is_multiple_of(number) {
            return Err(Error::Usage(format!("{flag} {number} does not divide {ranks} ranks: choose a divisor")));
        }
    }
    Ok(())
}

/// Runs every rank as a thread of this process.
fn threads(settings: &Settings, command: &[String], launches: Vec<Launch>) -> Result<i32, Error> {
    let codes = launcher::run_threads(launches, |launch| measure(settings, &launch, command))?;
    // A panic has been printed.
    let codes = codes.into_iter().map(|code| code.unwrap_or(1));
    // What caused the end counts more than what followed from it.
    let weight = |code: &i32| match *code {
        0 => 0,
        launcher::EXIT_CONSEQUENCE => 1,
        _ => 2,
    };
    Ok(codes.max_by_key(weight).unwrap_or(0))
}

/// Measures on one rank; prints its error, unless another rank prints the same.
fn measure(settings: &Settings, launch: &Launch, command: &[String]) -> i32 {
    use pillion_collectives::Error as Peers;
    match sweep::run(settings, launch, command) {
        Ok(0) => 0,
        Ok(_) => 1,
        Err(error) => {
            match &error {
                // The rank that gave up says why.
                Error::Communication(Peers::Aborted { .. } | Peers::Options { said_by_rank_zero: true, .. }) => {}
                _ if error.is_everywhere() && launch.rank > 0 => {}
                _ if error.is_everywhere() => complain(&error.to_string()),
                _ => complain(&format!("rank {}: {error}", launch.rank)),
            }
            error.code()
        }
    }
}

/// A line on stderr, in one piece, since ranks write there too.
fn complain(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(format!("collbench: {text}\n").as_bytes());
}
