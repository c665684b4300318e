//! Who am I: this process's rank, the world size and the job it belongs to.
//!
//! Launchers tell a process its place through environment variables. Variables are inherited, so
//! those of an outer launcher are often still there beneath an inner one (`srun torchrun …`,
//! `sbatch` around `mpirun`). The innermost must win:
//!
//! 1. our own launcher (`PILLION_*`);
//! 2. a torchrun agent (`TORCHELASTIC_RUN_ID`);
//! 3. Open MPI (`OMPI_COMM_WORLD_*`), then MPICH and Intel MPI (`MPI_LOCALRANKID`, `PMI_*`);
//! 4. `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE` set by hand;
//! 5. a Slurm step; an allocation without `srun` is not one;
//! 6. JSM (`JSM_NAMESPACE_*`), Flux (`FLUX_*`), PALS (`PALS_*` and `PMI_*`), MVAPICH2 (`MV2_*`);
//! 7. nobody: a single process.
//!
//! Wrapper scripts export some of the variables in 4 for other programs. Next to a launcher that
//! says everything they are compared, not used. What is half said or contradictory is an error:
//! N processes that each believe they are alone would train N times. For the same reason a variable
//! that gives a rank and nothing else (`PMIX_RANK`, `ALPS_APP_PE`) is refused by name.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use std::{env, io, process};

pub(crate) use meeting::ADDRESS;
pub use meeting::Meeting;
use variables::Variables;
pub(crate) use variables::{MOST_RANKS, ancestor_without};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod meeting;
mod names;
mod variables;

/// The place of one rank in its job.
///
/// `rank < world`, `local_rank < local_world <= world` always hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// This rank, counted over all hosts from 0.
    pub rank: usize,
    /// Number of ranks of the job.
    pub world: usize,
    /// This rank, counted over the ranks of this host from 0. The launcher's count, which need
    /// not follow the order of `rank` (Open MPI 5 gave ranks 0, 1, 2 of a host 0, 2, 1).
    pub local_rank: usize,
    /// Number of ranks of the job on this host.
    pub local_world: usize,
    /// Names the rendezvous of the job's ranks on this host: equal on all of them, and different
    /// for another job, user or restart. Letters, digits, `.`, `_` and `-`, at most
    /// [`JOB_LENGTH`] bytes. Ranks on different hosts may hold different names.
    pub job: String,
    /// Who said so.
    pub source: Source,
    /// The host that this rank counts itself to, from `PILLION_HOST`, where that is set: ranks with different values share no memory.
    /// Otherwise the host is what the system says.
    pub host: Option<String>,
    /// The network interface, by its name or an address of it, whose address this rank offers to
    /// ranks of other hosts over TCP, from `PILLION_INTERFACE`, where that is set. Otherwise it
    /// offers the address from which it reaches rank 0.
    pub interface: Option<String>,
    /// Where ranks of several hosts meet without MPI, if that is known.
    pub meeting: Option<Meeting>,
}

/// Longest job name, in bytes: fits the 107 bytes of a unix socket's name with room to spare.
pub const JOB_LENGTH: usize = 64;

/// Where a [`Launch`] comes from. Displays as what the plan table prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// No launcher: one process, one rank.
    Single,
    /// Ranks that this program started itself, as processes or as threads.
    Local,
    /// torchrun, or its variables set by hand.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `mpiexec` of MPICH or Intel MPI.
    Pmi,
    /// Slurm's `srun`.
    Slurm,
    /// `flux run`.
    Flux,
    /// The `mpiexec` of HPE's PALS.
    Pals,
    /// MVAPICH2's `mpirun_rsh`.
    Mvapich,
    /// JSM's `jsrun`.
    Jsm,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Single => "single process",
            Source::Local => "started here",
            Source::Torchrun => "torchrun",
            Source::OpenMpi => "Open MPI",
            Source::Pmi => "MPICH or Intel MPI",
            Source::Slurm => "Slurm",
            Source::Flux => "Flux",
            Source::Pals => "PALS",
            Source::Mvapich => "MVAPICH2",
            Source::Jsm => "jsrun",
        })
    }
}

/// Why a job could not be recognised or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// Some variables of a launcher are set, a necessary one is not.
    #[error("{present} is set, {missing} is not: {remedy}")]
    Missing {
        /// The variable found.
        present: String,
        /// The variable, or variables, expected beside it.
        missing: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A launcher gave this process a rank, but nothing says how many ranks there are.
    #[error(
        "{variable} is set, so {launcher} seems to have started this process, but no variable says how many ranks \
         there are: start with mpirun, srun or torchrun, set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR \
         and MASTER_PORT, or unset {variable} for a job of its own"
    )]
    Unknown {
        /// The variable.
        variable: &'static str,
        /// Who sets it.
        launcher: &'static str,
    },
    /// A variable holds something unreadable.
    #[error("{variable} is {value:?}, expected {expected}: correct or unset it")]
    Malformed {
        /// The variable.
        variable: String,
        /// Its value.
        value: String,
        /// What can stand there.
        expected: &'static str,
    },
    /// A number does not fit the one that bounds it.
    #[error(
        "{variable} is {value}, but must be {relation} {bound_variable}, which is {bound}: \
         start the ranks with one launcher, or correct the variables"
    )]
    OutOfRange {
        /// The variable that is too large.
        variable: String,
        /// Its value.
        value: usize,
        /// The comparison that must hold.
        relation: &'static str,
        /// The variable that bounds it.
        bound_variable: String,
        /// The bound's value.
        bound: usize,
    },
    /// Two launchers say different things.
    #[error(
        "{first} is {first_value}, but {second} is {second_value}: two launchers disagree; \
         unset the variable that does not belong to this job"
    )]
    Contradiction {
        /// A variable.
        first: String,
        /// Its value.
        first_value: usize,
        /// The variable that should say the same.
        second: String,
        /// Its value.
        second_value: usize,
    },
    /// The process that started this rank could not be identified.
    #[error(
        "cannot identify the {launcher} process that started this rank ({path}: {source}): start \
         the ranks outside a PID namespace of their own, with /proc mounted"
    )]
    Ancestor {
        /// The launcher looked for.
        launcher: &'static str,
        /// What could not be read.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Zero ranks were asked for.
    #[error("0 ranks asked for: ask for at least 1")]
    NoRanks,
    /// More ranks than this machine can reasonably run.
    #[error(
        "{ranks} ranks asked for on {cores} cores, at most {limit} can start here: ask for fewer, \
         spread them over several hosts with mpirun or srun, or insist with --oversubscribe"
    )]
    TooManyRanks {
        /// Ranks asked for.
        ranks: usize,
        /// Cores this process may use.
        cores: usize,
        /// Most ranks accepted.
        limit: usize,
    },
    /// More ranks than can share memory.
    #[error("{ranks} ranks asked for, at most {limit} can share the memory of a host: ask for fewer")]
    BeyondMost {
        /// Ranks asked for.
        ranks: usize,
        /// Most ranks.
        limit: usize,
    },
    /// The system refused a thread for a rank.
    #[error("cannot start a thread for each of {ranks} ranks: {reason}")]
    Threads {
        /// Ranks asked for.
        ranks: usize,
        /// Why not, and the remedy.
        reason: String,
    },
    /// A rank tried to start ranks.
    #[error("this process is already rank {rank} of a job ({variable} is set): unset {variable} to start another")]
    Nested {
        /// The rank it has.
        rank: String,
        /// The variable that says so.
        variable: &'static str,
    },
    /// A rank's process did not start.
    #[error("cannot start rank {rank} as {program}: {reason}; the ranks already started were ended")]
    Start {
        /// The rank.
        rank: usize,
        /// The program.
        program: PathBuf,
        /// Why.
        reason: String,
    },
    /// The operating system refused something the launcher needs.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The launcher ended before this rank was bound to it.
    #[error("the launcher, process {expected}, is gone (the parent is now {found}): this rank ends too")]
    LauncherGone {
        /// Process id of the launcher.
        expected: String,
        /// Process id of the present parent; 0 for one outside this PID namespace.
        found: i32,
    },
}

/// Variables our own launcher sets: rank, world size, the same of this host, job name, the
/// launcher's process id.
pub(crate) const OWN_RANK: &str = "PILLION_RANK";
pub(crate) const OWN_WORLD: &str = "PILLION_WORLD";
pub(crate) const OWN_LOCAL_RANK: &str = "PILLION_LOCAL_RANK";
pub(crate) const OWN_LOCAL_WORLD: &str = "PILLION_LOCAL_WORLD";
pub(crate) const OWN_JOB: &str = "PILLION_JOB";
pub(crate) const OWN_LAUNCHER: &str = "PILLION_LAUNCHER_PID";

/// Overrides which host a rank counts itself to.
pub(crate) const HOST: &str = "PILLION_HOST";

/// Says whose address a rank offers to other hosts.
pub(crate) const INTERFACE: &str = "PILLION_INTERFACE";

impl Launch {
    /// One process that is the whole job.
    pub fn single() -> Launch {
        Launch {
            rank: 0,
            world: 1,
            local_rank: 0,
            local_world: 1,
            job: fresh_job(),
            source: Source::Single,
            host: None,
            interface: None,
            meeting: None,
        }
    }

    /// Reads this process's environment, as [`Launch::from_variables`] does.
    pub fn detect() -> Result<Launch, LaunchError> {
        // A value that is not UTF-8 is kept, so that it is reported and not taken for unset.
        Launch::from_variables(|name| env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// The launch that the variables returned by `lookup` describe; [`Launch::single`] where no
    /// launcher left any. Beside `lookup`, only the ancestors of this process are looked at, to
    /// name a job of a launcher that gives none.
    ///
    /// # Errors
    /// Half-set, unreadable or contradictory variables, each by name.
    pub fn from_variables(lookup: impl Fn(&str) -> Option<String>) -> Result<Launch, LaunchError> {
        let launch = Variables { lookup: &lookup }.read()?;
        let meeting = meeting(launch.source, &lookup)?;
        Ok(Launch { host: lookup(HOST), interface: lookup(INTERFACE), meeting, ..launch })
    }

    /// The address that [`Launch::interface`] stands for, as this rank offers it to ranks of other
    /// hosts; none where it offers the address from which it reaches rank 0.
    ///
    /// # Errors
    /// [`Error::Rendezvous`](crate::Error), with the interfaces that there are.
    pub fn offered_address(&self) -> Result<Option<IpAddr>, crate::Error> {
        crate::wire::tcp::offered_address(self)
    }

    /// One launch per rank for `world` ranks that are threads of this process; all carry the same
    /// fresh job name.
    pub fn threads(world: usize) -> Vec<Launch> {
        let job = fresh_job();
        let launch = |rank| Launch {
            rank,
            world,
            local_rank: rank,
            local_world: world,
            job: job.clone(),
            source: Source::Local,
            ..Launch::single()
        };
        (0..world).map(launch).collect()
    }
}

/// Where the ranks of several hosts meet, for a job of this launcher.
pub(crate) fn meeting(source: Source, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Option<Meeting>, LaunchError> {
    meeting::read(source, lookup)
}

/// A job name nobody else has.
pub(crate) fn fresh_job() -> String {
    // RandomState is seeded by the system, and differs at each call.
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let digest = RandomState::new().hash_one((process::id(), since_epoch.unwrap_or(Duration::ZERO)));
    format!("{}-local-{digest:016x}-0", rustix::process::getuid().as_raw())
}
