//! What the arguments of calls must be, before other ranks hear of a call.

use pillion_kernels::Buffer;

use crate::{Communicator, Error};

/// What a check returns, or the end of the call with its error. The buffers are dropped with it.
macro_rules! checked {
    ($check:expr, $buffers:expr) => {
        match $check {
            Ok(value) => value,
            Err(error) => return $crate::Pending::ended(Err(error), $buffers),
        }
    };
}
pub(crate) use checked;

/// [`Error::Misuse`] unless `fits`.
pub(crate) fn expect(fits: bool, reason: impl FnOnce() -> String) -> Result<(), Error> {
    if fits { Ok(()) } else { Err(Error::Misuse { reason: reason() }) }
}

impl Communicator {
    /// Memory that the transport moves: the host's, or that of this rank's GPU.
    pub(crate) fn check_space(&self, buffer: &Buffer) -> Result<(), Error> {
        self.transport.refuses(buffer).map_or(Ok(()), |reason| Err(Error::Misuse { reason }))
    }

    /// Memory of a deferring device has a lock, which an operation takes for all of its buffers or
    /// for none.
    pub(crate) fn same_device(&self, one: &Buffer, other: &Buffer) -> Result<(), Error> {
        self.check_space(one)?;
        self.check_space(other)?;
        expect(one.is_deferred() == other.is_deferred(), || {
            format!("an operation's buffers are of one device, and {one:?} and {other:?} are not")
        })
    }

    /// Both buffers of an operation.
    pub(crate) fn check(&self, name: &str, input: &Buffer, output: &Buffer, fits: bool) -> Result<(), Error> {
        let world = self.world();
        expect(fits && input.dtype() == output.dtype(), || {
            format!("an {name} of {input:?} into {output:?} over {world} ranks: give lengths that fit, and one type")
        })?;
        self.same_device(input, output)
    }

    /// A rank of this communicator.
    pub(crate) fn check_rank(&self, what: &str, rank: usize) -> Result<(), Error> {
        let world = self.world();
        expect(rank < world, || format!("{what} rank {rank} of {world}: ranks are counted from 0"))
    }

    /// What only the root has: a buffer of `len` elements, of the type of what every rank has.
    pub(crate) fn check_root(
        &self,
        name: &str,
        root: usize,
        every: &Buffer,
        only: Option<&Buffer>,
        len: usize,
    ) -> Result<(), Error> {
        self.check_rank(&format!("a {name} with root"), root)?;
        expect(only.is_some() == (self.rank() == root), || {
            format!("a {name}'s root, rank {root}, gives the other buffer, and nobody else")
        })?;
        self.check_space(every)?;
        let Some(only) = only else { return Ok(()) };
        expect(only.len() == len && only.dtype() == every.dtype(), || {
            format!("a {name} between {every:?} and {only:?}: the root's has {len} elements, of the same type")
        })?;
        self.same_device(every, only)
    }

    /// Elements of a part of a buffer that is cut into one for each rank.
    pub(crate) fn chunk_of(&self, buffer: &Buffer) -> Result<usize, Error> {
        let world = self.world();
        self.check_space(buffer)?;
        expect(buffer.len().is_multiple_of(world), || {
            format!("{buffer:?} cannot be cut into {world} equal parts: give a multiple")
        })?;
        Ok(buffer.len() / world)
    }
}
