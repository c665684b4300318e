//! Failures of the runtime.

use std::path::PathBuf;

use pillion_kernels::Failure;

/// What can go wrong above the collectives.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another rank, or the way to it.
    #[error(transparent)]
    Collective(#[from] pillion_collectives::Error),
    /// The device.
    #[error(transparent)]
    Device(#[from] pillion_kernels::Error),
    /// A policy contradicts itself, or does not fit the ranks.
    #[error("{0}")]
    Policy(String),
    /// A rank has another model or another policy.
    #[error(
        "rank {rank} has another layout or policy than rank 0: make the engine with the same arguments on every rank"
    )]
    Different {
        /// The first such rank.
        rank: usize,
    },
    /// A caller left the plan.
    #[error("the plan's next operation is {expected}, but the caller asked for {found}")]
    OffPlan {
        /// What the plan says.
        expected: String,
        /// What was asked.
        found: String,
    },
    /// A step was begun and dropped, so other ranks may wait for the rest of its collectives.
    #[error(
        "the step that was begun last has not ended: end each step with `Step::finish`, `Step::end`, or, to give it up, \
         `Step::abandon` on every rank"
    )]
    Unfinished,
    /// A gradient or a loss is infinite or not a number; no parameter was changed.
    #[error(
        "{count} gradient values of step {step} are not finite and its loss is {loss}, so no parameter was changed: go on \
         without this batch, or load an earlier checkpoint"
    )]
    NonFinite {
        /// The update that would have been made, from 1.
        step: u64,
        /// Number of values.
        count: u64,
        /// Mean loss of the step's batch.
        loss: f64,
    },
    /// A step without tokens; no parameter was changed.
    #[error(
        "step {step} has 0 tokens over all ranks and rounds, and its gradient would be divided by that number, so no \
         parameter was changed: call `Step::round` in each round with the tokens of this rank's loss"
    )]
    NoTokens {
        /// The update that would have been made, from 1.
        step: u64,
    },
    /// An update was interrupted: the parameters of some ranks may be new and those of others old.
    #[error("the parameters are invalid since an update failed: resume from the last checkpoint")]
    Poisoned,
    /// A file of a checkpoint cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and the remedy.
        reason: String,
    },
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure.cause::<pillion_collectives::Error>() {
            Some(error) => Error::Collective(error.clone()),
            None => Error::Device(failure.into()),
        }
    }
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Error {
        Error::File { path: path.into(), reason: reason.to_string() }
    }
}
