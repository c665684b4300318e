//! How ranks meet at each step of an operation: each shows what it lends, and its stream comes
//! behind those of the others.

use std::sync::Arc;

use pillion_kernels::{CudaStream, DType, Raw, Space, Stream};

use super::board::{Board, Post};
use super::processes::Processes;
use crate::Error;
use crate::call::describe;
use crate::memory::control::Call;
use crate::transport::{Limit, Transport};

/// Where the ranks of a group meet.
pub(super) enum Meeting {
    /// All are threads of one process, and the driver orders their streams.
    Threads(Arc<Board>),
    /// Each is a process of its own.
    Processes(Processes),
}

/// A step of an operation, on one rank.
pub(super) struct Step<'a> {
    pub(super) control: &'a dyn Transport,
    pub(super) rank: usize,
    pub(super) stream: &'a CudaStream,
    /// The stream's number among those of the rank.
    pub(super) lane: usize,
    /// The operation, and the number of the step, from 1.
    pub(super) call: Call,
    pub(super) limit: Limit,
}

/// What a rank lends for a step.
pub(super) type Lends = [Option<Lent>; 2];

/// Elements of a rank's memory, for as long as its operation goes on.
#[derive(Clone, Copy)]
pub(super) struct Lent {
    address: usize,
    len: usize,
    dtype: DType,
    space: Space,
}

impl From<Raw> for Lent {
    fn from(raw: Raw) -> Lent {
        let Raw { pointer, len, dtype, space } = raw;
        Lent { address: pointer.as_ptr().expose_provenance(), len, dtype, space }
    }
}

impl Lent {
    /// Some of the elements.
    pub(super) fn range(self, range: std::ops::Range<usize>) -> Raw {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        let start = self.address + range.start * self.dtype.bytes();
        let pointer = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(start));
        Raw { pointer: pointer.expect("memory is not at 0"), len: range.len(), dtype: self.dtype, space: self.space }
    }

    /// All elements.
    pub(super) fn all(self) -> Raw {
        self.range(0..self.len)
    }
}

impl Meeting {
    /// Shows the other ranks what this one lends, behind what its stream has been given, and
    /// returns what they lend, by rank; the stream is behind theirs then.
    ///
    /// # Errors
    /// What `control` says of the others; [`Error::Timeout`]; [`Error::Mismatch`].
    pub(super) fn meet(&self, step: &Step<'_>, lends: Lends) -> Result<Vec<Lends>, Error> {
        match self {
            Meeting::Threads(board) => {
                let post = Post { call: step.call, lends, event: step.stream.record() };
                let posts = board.meet(step, post)?;
                step.compare(posts.iter().map(|post| post.call))?;
                for post in posts.iter().enumerate().filter(|(rank, _)| *rank != step.rank).map(|(_, post)| post) {
                    step.stream.wait_for(&post.event);
                }
                Ok(posts.into_iter().map(|post| post.lends).collect())
            }
            Meeting::Processes(processes) => processes.meet(step, lends),
        }
    }
}

impl Step<'_> {
    /// Whether all ranks have made the same call.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with the first that has not.
    pub(super) fn compare(&self, calls: impl Iterator<Item = Call>) -> Result<(), Error> {
        let other = calls.enumerate().find(|(_, call)| !call.agrees_with(&self.call));
        other.map_or(Ok(()), |(peer, theirs)| {
            Err(Error::Mismatch { ours: describe(self.call), theirs: describe(theirs), peer })
        })
    }
}
