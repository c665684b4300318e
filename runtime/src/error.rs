//! Failures of the runtime.

use std::path::PathBuf;

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
    /// A gradient is infinite or not a number; no parameter was changed.
    #[error(
        "{count} gradient values of step {step} are not finite and its loss is {loss}, so no parameter was changed: use a \
         lower learning rate, or resume from the last checkpoint"
    )]
    NonFinite {
        /// The update that would have been made, from 1.
        step: u64,
        /// Number of values.
        count: u64,
        /// Mean loss of the step's batch.
        loss: f64,
    },
    /// A step without tokens, or with a number of them that is none; no parameter was changed.
    #[error(
        "step {step} has {tokens} tokens over all ranks and rounds, by which its gradient would be divided, so no parameter was changed: \
         add the loss and the number of tokens to `Backward::loss` in one unit's backward pass"
    )]
    Tokens {
        /// The update that would have been made, from 1.
        step: u64,
        /// The sum of what was added.
        tokens: f64,
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

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Error {
        Error::File { path: path.into(), reason: reason.to_string() }
    }
}
