//! What can go wrong between ranks. An error is remembered by its communicator, which returns it again from every later call.

use pillion_kernels::Failure;

use crate::limits::human;

/// Failures of a communicator.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A rank died, or left while others still needed it.
    #[error(
        "lost rank {rank} ({how}) during {op}: look at that rank's own message, then start again, from the last checkpoint where there is one"
    )]
    PeerLost {
        /// The lost rank.
        rank: usize,
        /// The operation in which it was missed.
        op: String,
        /// What is known of its end.
        how: &'static str,
    },
    /// A rank did not arrive in time.
    #[error(
        "waited {seconds} s for {} in {op} ({how}): is it stopped, swapping, or in another operation?",
        ranks(waiting_on)
    )]
    Timeout {
        /// The operation.
        op: String,
        /// The ranks that did not come, as far as this rank sees; at least one.
        waiting_on: Vec<usize>,
        /// How long this rank waited, not counting time in which it was stopped itself.
        seconds: u64,
        /// What the heartbeat of the first of them says.
        how: String,
    },
    /// The start event of an operation did not happen in time on this rank.
    #[error(
        "{op} has not started for {seconds} s, because the event that it starts after has not happened on this rank: \
         look at the work that the event follows"
    )]
    NotStarted {
        /// The operation.
        op: String,
        /// How long this rank waited, not counting time in which it was stopped itself.
        seconds: u64,
    },
    /// The start event of an operation failed, for a reason that is no communicator's.
    #[error("an operation did not start, because the work before it failed: {0}")]
    Before(Failure),
    /// Two ranks called different operations.
    #[error(
        "rank {peer} called {theirs} where this rank called {ours}: every rank must make the same calls in the same order"
    )]
    Mismatch {
        /// What this rank called.
        ours: String,
        /// What the other called.
        theirs: String,
        /// The other rank.
        peer: usize,
    },
    /// A rank gave up and said so.
    #[error("rank {rank} aborted: {reason}")]
    Aborted {
        /// The rank that gave up.
        rank: usize,
        /// Its words.
        reason: String,
    },
    /// Options that contradict each other or the launch. Every rank that was given the same has the
    /// same error.
    #[error("{reason}")]
    Options {
        /// What is wrong, and the remedy.
        reason: String,
        /// Whether rank 0 has the same error, so that this rank need not print it.
        said_by_rank_zero: bool,
    },
    /// The arguments of a call on this rank cannot be. Nothing was sent; the communicator is as it
    /// was, and the other ranks wait for this one where they made a right call.
    #[error("{reason}")]
    Misuse {
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Ranks did not find each other.
    #[error("rank {rank} of {world} could not join job `{job}`: {reason}")]
    Rendezvous {
        /// This rank.
        rank: usize,
        /// Number of ranks expected.
        world: usize,
        /// Name of the job.
        job: String,
        /// What went wrong, and the remedy.
        reason: String,
    },
    /// The host has no memory for an arena.
    #[error(
        "{} of shared memory do not fit: {limit} allows {} more; use a smaller model or fewer ranks on this host",
        human(*bytes),
        human(*available)
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes still to be had.
        available: u64,
        /// Whose limit it is.
        limit: &'static str,
    },
    /// [`Options::stop`](crate::Options::stop) was raised before all ranks had come.
    #[error("this rank was told to end while it waited for the other ranks at the start: start the job again")]
    Interrupted,
    /// A [`Store`](crate::Store) failed, or had no value in time.
    #[error("the store through which ranks meet: {reason}")]
    Store {
        /// What went wrong, and the remedy.
        reason: String,
    },
    /// The operating system refused something.
    #[error("{what}: {reason}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        reason: String,
    },
}

impl From<Failure> for Error {
    /// The error of the communicator that failed first, if one did.
    fn from(failure: Failure) -> Error {
        match failure.cause::<Error>() {
            Some(error) => error.clone(),
            None => Error::Before(failure),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Before(failure) => failure,
            error => Failure::new(error),
        }
    }
}

/// `rank 1`, or `ranks 1, 2 and 5`; of many, the first.
pub(crate) fn ranks(ranks: &[usize]) -> String {
    const NAMED: usize = 16;
    let names: Vec<String> = ranks.iter().take(NAMED).map(usize::to_string).collect();
    match &names[..] {
        [] => "nobody".to_owned(),
        [one] => format!("rank {one}"),
        all if ranks.len() > NAMED => format!("ranks {} and {} more", all.join(", "), ranks.len() - NAMED),
        [first @ .., last] => format!("ranks {} and {last}", first.join(", ")),
    }
}

impl Error {
    /// A number for each kind of error, which stays what it is.
    pub const fn code(&self) -> i32 {
        match self {
            Error::PeerLost { .. } => 1,
            Error::Timeout { .. } => 2,
            Error::NotStarted { .. } => 3,
            Error::Before(_) => 4,
            Error::Mismatch { .. } => 5,
            Error::Aborted { .. } => 6,
            Error::Options { .. } => 7,
            Error::Misuse { .. } => 8,
            Error::Rendezvous { .. } => 9,
            Error::OutOfMemory { .. } => 10,
            Error::System { .. } => 11,
            Error::Interrupted => 12,
            Error::Store { .. } => 13,
        }
    }

    pub(crate) fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
        move |errno| Error::System { what, reason: crate::limits::explain(&errno.into()) }
    }
}
