//! What can keep a benchmark from its end.

use std::io;
use std::path::PathBuf;

use pillion_collectives::launch::LaunchError;
use pillion_collectives::limits::human;
use pillion_collectives::{Backend, launcher};

/// Failures of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Arguments that cannot be, and how they could.
    #[error("{0}")]
    Usage(String),
    /// Ranks were not recognised or not started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A communicator's failure.
    #[error(transparent)]
    Communication(#[from] pillion_collectives::Error),
    /// A device's failure.
    #[error(transparent)]
    Device(#[from] pillion_kernels::Error),
    /// Work on a device failed.
    #[error(transparent)]
    Work(#[from] pillion_kernels::Failure),
    /// The buffers of a line exceed the host's memory.
    #[error(
        "{operation} of {} needs {} on this host for its ranks' buffers, {limit} allows {}: choose smaller sizes, \
         or fewer ranks",
        human(*size as u64),
        human(*needed),
        human(*available)
    )]
    Memory {
        /// The operation.
        operation: &'static str,
        /// Size in bytes, as in the table.
        size: usize,
        /// Bytes that all ranks of the host need.
        needed: u64,
        /// Bytes still to be had.
        available: u64,
        /// Whose limit it is.
        limit: &'static str,
    },
    /// Another backend than was asked for.
    #[error(
        "--backend {asked} was asked for, but this build joins these ranks by {got}: leave --backend out, or build with the \
         features that it needs"
    )]
    Backend {
        /// What the arguments say.
        asked: Backend,
        /// What the communicator says.
        got: Backend,
    },
    /// Another number of hosts than was asked for.
    #[error("--hosts {asked} was asked for, but this build puts the ranks on {got}: leave --hosts out")]
    Hosts {
        /// What the arguments say.
        asked: usize,
        /// What the communicator says.
        got: usize,
    },
    /// A rank that cannot be bound to its processors.
    #[error("this rank cannot be bound to its share of the processors: {0}: use --bind none")]
    Binding(io::Error),
    /// A failure of the library that ours is compared with.
    #[error("--compare mpi: {call}: {reason}")]
    Library {
        /// Its function.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// The results cannot be written.
    #[error("cannot write {what}: {source}")]
    Output {
        /// The file or stream.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn file(path: &std::path::Path) -> impl Fn(io::Error) -> Error {
        let path = PathBuf::from(path);
        move |source| Error::Output { what: path.display().to_string(), source }
    }

    /// Exit code: 2 for arguments that cannot be, [`launcher::EXIT_CONSEQUENCE`] where another rank failed, else 1.
    pub fn code(&self) -> i32 {
        use pillion_collectives::Error as Peers;
        match self {
            Error::Usage(_)
            | Error::Launch(LaunchError::NoRanks | LaunchError::TooManyRanks { .. } | LaunchError::BeyondMost { .. })
            | Error::Communication(Peers::Options { .. }) => 2,
            Error::Communication(Peers::PeerLost { .. } | Peers::Aborted { .. }) => launcher::EXIT_CONSEQUENCE,
            _ => 1,
        }
    }

    /// Whether every rank has the same error, so that one of them prints it.
    pub fn is_everywhere(&self) -> bool {
        use pillion_collectives::Error as Peers;
        matches!(
            self,
            Error::Usage(_)
                | Error::Memory { .. }
                | Error::Backend { .. }
                | Error::Hosts { .. }
                | Error::Communication(Peers::OutOfMemory { .. })
        )
    }
}
