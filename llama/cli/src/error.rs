//! What ends a command early, and with which exit code.

use std::path::PathBuf;

use pillion_collectives::launch::LaunchError;
use pillion_collectives::launcher;

/// Failures of the program. Each is one message, and exit code 1 unless stated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting, or how settings go together; exit code 2.
    #[error("{0}")]
    Setting(String),
    /// Text that cannot be trained on.
    #[error(transparent)]
    Data(#[from] pillion_data::Error),
    /// A model that is not in a format we read, or that we do not compute.
    #[error(transparent)]
    HuggingFace(#[from] pillion_llama::huggingface::Error),
    /// Ranks that cannot be started or found.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The runtime.
    #[error(transparent)]
    Runtime(#[from] pillion_runtime::Error),
    /// The controller.
    #[error(transparent)]
    Controller(#[from] pillion_abs::Error),
    /// A file of the run.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and the remedy.
        reason: String,
    },
    /// A gradient or loss that is not finite has ended the run; on rank 0.
    #[error("{0}")]
    NonFinite(String),
    /// stdout takes nothing more, and it is where the command's result goes.
    #[error("cannot write to stdout: {0}: free some space, or send the output elsewhere")]
    Stdout(std::io::Error),
    /// Rank 0 has failed, and said why.
    #[error("rank 0 gave up")]
    ByRankZero {
        /// Its exit code, which is every rank's: a launcher reports whichever rank ends first.
        code: i32,
    },
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Error {
        Error::File { path: path.into(), reason: reason.to_string() }
    }

    /// Whether another rank prints the cause.
    pub(crate) fn is_said_elsewhere(&self) -> bool {
        use pillion_collectives::Error as Collective;
        use pillion_runtime::Error as Runtime;
        matches!(
            self,
            Error::ByRankZero { .. }
                | Error::Runtime(Runtime::Collective(
                    Collective::Aborted { .. } | Collective::Options { said_by_rank_zero: true, .. }
                ))
        )
    }

    /// Whether every rank has, or will have, an error of its own for the same reason.
    pub(crate) fn is_everywhere(&self) -> bool {
        use pillion_runtime::Error as Runtime;
        self.is_of_one_rank()
            || matches!(self, Error::ByRankZero { .. } | Error::NonFinite(_) | Error::Runtime(Runtime::NoTokens { .. }))
    }

    /// Whether it says how this rank sees the others, so that each rank's words count.
    pub(crate) fn is_of_one_rank(&self) -> bool {
        use pillion_collectives::Error as Collective;
        use pillion_runtime::Error as Runtime;
        matches!(self, Error::Runtime(Runtime::Collective(error)) if !matches!(error, Collective::Options { .. }))
    }

    /// The exit code.
    pub fn code(&self) -> i32 {
        use pillion_collectives::Error as Collective;
        match self {
            Error::Setting(_)
            | Error::Launch(
                LaunchError::NoRanks
                | LaunchError::TooManyRanks { .. }
                | LaunchError::BeyondMost { .. }
                | LaunchError::Unknown { .. }
                | LaunchError::Contradiction { .. }
                | LaunchError::Malformed { .. }
                | LaunchError::OutOfRange { .. },
            )
            | Error::Runtime(pillion_runtime::Error::Collective(Collective::Options { .. })) => 2,
            Error::ByRankZero { code } => *code,
            Error::Runtime(pillion_runtime::Error::Collective(Collective::Interrupted)) => launcher::EXIT_INTERRUPTED,
            Error::Runtime(pillion_runtime::Error::Collective(
                Collective::PeerLost { .. } | Collective::Aborted { .. },
            )) => launcher::EXIT_CONSEQUENCE,
            _ => 1,
        }
    }
}

impl From<pillion_collectives::Error> for Error {
    fn from(error: pillion_collectives::Error) -> Error {
        Error::Runtime(error.into())
    }
}

impl From<pillion_kernels::Error> for Error {
    fn from(error: pillion_kernels::Error) -> Error {
        Error::Runtime(error.into())
    }
}

impl From<pillion_llama::generate::Error> for Error {
    fn from(error: pillion_llama::generate::Error) -> Error {
        use pillion_llama::generate::Error as Generate;
        match error {
            Generate::Runtime(error) => error.into(),
            error => Error::NonFinite(error.to_string()),
        }
    }
}
