//! Messages between two ranks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pillion_kernels::Buffer;

use crate::checks::checked;
use crate::request::{Direction, Envelope, Message, Request};
use crate::{Communicator, Error, Pending, Start};

impl Communicator {
    /// As [`Communicator::send_tagged`], with tag 0.
    pub fn send(&self, buffer: Buffer, to: usize, start: impl Into<Start>) -> Pending<Buffer> {
        self.send_tagged(buffer, to, 0, start)
    }

    /// Sends `buffer` to rank `to`, which receives as many elements of the same type. Messages
    /// between two ranks arrive in order, as far as they have the same tag. Complete once `buffer`
    /// is no longer needed, which may be before it has been received: that it is refused, or never
    /// received, a later call says. How much is held for a receiver that does not come is not for
    /// programs to rely on. Only these two ranks call.
    pub fn send_tagged(&self, buffer: Buffer, to: usize, tag: u32, start: impl Into<Start>) -> Pending<Buffer> {
        checked!(self.check_rank("a message to", to).and_then(|()| self.check_space(&buffer)), buffer);
        let direction = Direction::Send { to };
        self.run(Request::Message(Message { direction, buffer: buffer.span(), tag }), start.into(), buffer)
    }

    /// As [`Communicator::receive_tagged`], with tag 0.
    pub fn receive(&self, buffer: Buffer, from: usize, start: impl Into<Start>) -> Pending<Buffer> {
        self.receive_tagged(buffer, from, 0, start)
    }

    /// buffer = what rank `from` sends with this tag. Of several receives that want a message the
    /// one that was called first takes it. A message that comes in front of one that is wanted is
    /// kept in memory of its own until its receive. A receive that has a message, and still waits
    /// for its start, holds up what that rank sends later. Only these two ranks call.
    pub fn receive_tagged(&self, buffer: Buffer, from: usize, tag: u32, start: impl Into<Start>) -> Pending<Buffer> {
        checked!(self.check_rank("a message from", from).and_then(|()| self.check_space(&buffer)), buffer);
        let direction = Direction::Receive { from: Some(from), sender: None };
        self.run(Request::Message(Message { direction, buffer: buffer.span(), tag }), start.into(), buffer)
    }

    /// buffer = the first message with this tag from any rank, whose number comes back, too.
    pub fn receive_any(&self, buffer: Buffer, tag: u32, start: impl Into<Start>) -> Pending<(Buffer, usize)> {
        checked!(self.check_space(&buffer), (buffer, 0));
        let sender = Arc::new(AtomicUsize::new(0));
        let direction = Direction::Receive { from: None, sender: Some(sender.clone()) };
        let message = Message { direction, buffer: buffer.span(), tag };
        let received = self.run(Request::Message(message), start.into(), buffer);
        received.map(move |buffer| (buffer, sender.load(Ordering::Acquire)))
    }

    /// What a receive that is called now would take, if it has come: from rank `from`, or from any.
    /// Does not wait for other ranks.
    ///
    /// # Errors
    /// The communicator's first error; [`Error::Misuse`] for a rank that there is not.
    pub fn probe(&self, from: Option<usize>, tag: u32) -> Result<Option<Envelope>, Error> {
        from.map_or(Ok(()), |from| self.check_rank("a message from", from))?;
        self.transport.probe(from, tag)
    }
}
