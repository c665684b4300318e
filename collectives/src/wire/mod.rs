//! What carries bytes between hosts: point-to-point messages that never block.
//!
//! A wire belongs to the progress thread of one rank, which makes every call. Messages between the same two ranks with the same tag
//! arrive in the order in which they were sent.

#[cfg(feature = "mpi")]
pub(crate) mod mpi;
pub(crate) mod poller;
pub(crate) mod tcp;
pub(crate) mod threads;

use self::poller::Poller;
use crate::Error;

/// A message on its way. Its memory stays as it is until [`Wire::test`] has said that it is complete.
#[derive(Debug)]
pub(crate) struct Receipt(pub(crate) u64);

/// Messages to and from the ranks of a communicator, counted as the communicator counts them.
pub(crate) trait Wire: Send {
    /// Starts sending `len` bytes to rank `to`. Any length, 0 too.
    ///
    /// # Safety
    /// `data` is not null. The bytes stay readable and unchanged until [`Wire::test`] returns true
    /// for the request; if it never does, for ever.
    unsafe fn send(&mut self, to: usize, tag: u8, data: *const u8, len: usize) -> Result<Receipt, Error>;

    /// Starts receiving exactly `len` bytes from rank `from`. A message of another length is an error.
    ///
    /// # Safety
    /// `data` is not null. The bytes stay writable, and nobody else touches them, until
    /// [`Wire::test`] returns true for the request; if it never does, for ever.
    unsafe fn receive(&mut self, from: usize, tag: u8, data: *mut u8, len: usize) -> Result<Receipt, Error>;

    /// Whether a message has come from rank `from` that nobody has asked for; asked only where
    /// nothing is being received from there with this tag. [`Error::PeerLost`] where none will
    /// come any more, which does the wire no harm.
    fn has_come(&mut self, from: usize, tag: u8) -> Result<bool, Error>;

    /// Lets messages move, and says whether this one is complete. Not called again for a request once it has returned true.
    fn test(&mut self, request: &Receipt) -> Result<bool, Error>;

    /// Tells every other rank, as far as that is possible without waiting, that this one gives up.
    fn abort(&mut self, reason: &str);

    /// That another rank has given up, or is gone, if this one has learnt of it.
    fn failure(&mut self) -> Option<Error>;

    /// Whether this wire has sockets for which a [`Poller`] can wait.
    fn has_sockets(&self) -> bool {
        false
    }

    /// Lets the poller ring once when a message can move that could not when it was last looked at.
    /// Returns whether the poller will; where not, look again after a nap.
    fn arm(&mut self, _poller: &Poller) -> bool {
        false
    }
}
