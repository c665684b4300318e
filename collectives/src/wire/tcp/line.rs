//! One connection: messages of one tag between two ranks, in order, both ways.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use crate::Error;
use crate::memory::fork::Guarded;
use crate::wire::poller::Poller;

/// Bytes of the length in front of each message.
const HEAD: usize = 8;
/// Most bytes for which the poller waits before it rings, so that long messages wake the progress
/// thread seldom. The kernel takes less where its buffer holds less.
const LOW_WATER: usize = HEAD + (1 << 20);

/// A connection that never blocks.
pub(super) struct Line {
    socket: Guarded<TcpStream>,
    /// The rank at the other end, as the communicator counts.
    peer: usize,
    out: Queue,
    incoming: Queue,
    /// The length of the message that is just arriving.
    head: [u8; HEAD],
    /// Whether a look since the last [`Line::arm`] found nothing to read, or no room to write, or
    /// has yet to come.
    wants_read: bool,
    wants_write: bool,
    /// Bytes that must have come before the kernel says that some have.
    low_water: usize,
    armed: Armed,
}

/// For what a poller has last been asked to ring, and how far the messages were then.
#[derive(Clone, Copy, Default, PartialEq)]
struct Armed {
    reads: bool,
    writes: bool,
    low_water: usize,
    received: (u64, usize),
    sent: (u64, usize),
}

/// Messages of one direction that are not complete, the first of them partly under way.
#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    /// How many there have been, and how many are complete.
    count: u64,
    complete: u64,
    /// Bytes of the first one that have passed, its length's included.
    passed: usize,
}

struct Message {
    data: *mut u8,
    len: usize,
}

// SAFETY: the pointers are to memory that is lent to the line (see `Wire::send`), whichever thread
// drives it.
unsafe impl Send for Message {}

impl Queue {
    fn push(&mut self, data: *mut u8, len: usize) -> u64 {
        self.messages.push_back(Message { data, len });
        self.count += 1;
        self.count - 1
    }

    /// Counts bytes that have passed.
    fn pass(&mut self, bytes: usize) {
        self.passed += bytes;
        if self.messages.front().is_some_and(|message| self.passed == HEAD + message.len) {
            self.messages.pop_front();
            self.complete += 1;
            self.passed = 0;
        }
    }

    /// How many messages are complete, and the bytes of the next.
    fn position(&self) -> (u64, usize) {
        (self.complete, self.passed)
    }

    /// Whether a message is complete, or else whether it is the first that is not: only then does
    /// a look at the connection help.
    fn state(&self, number: u64) -> Option<bool> {
        if number < self.complete {
            return Some(true);
        }
        (number > self.complete).then_some(false)
    }
}

impl Line {
    /// For a socket that does not block.
    pub(super) fn new(socket: Guarded<TcpStream>, peer: usize) -> Line {
        let (out, incoming, armed) = (Queue::default(), Queue::default(), Armed::default());
        let (wants_read, wants_write) = (false, false);
        Line { socket, peer, out, incoming, head: [0; HEAD], wants_read, wants_write, low_water: 1, armed }
    }

    /// Will send these bytes; returns the message's number.
    pub(super) fn send(&mut self, data: *mut u8, len: usize) -> u64 {
        self.wants_write |= self.out.messages.is_empty();
        self.out.push(data, len)
    }

    /// Will receive as many bytes; returns the message's number.
    pub(super) fn receive(&mut self, data: *mut u8, len: usize) -> u64 {
        self.wants_read |= self.incoming.messages.is_empty();
        self.incoming.push(data, len)
    }

    /// Whether the first byte of a message has come that nobody has asked for.
    pub(super) fn has_come(&mut self) -> Result<bool, Error> {
        debug_assert!(self.incoming.messages.is_empty(), "a message is being received");
        loop {
            match rustix::net::recv(&self.socket, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(self.lost(None)),
                Ok(_) => return Ok(true),
                Err(Errno::AGAIN) => {
                    self.wants_read = true;
                    return Ok(false);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.lost(Some(errno))),
            }
        }
    }

    /// Hands over to the kernel what it takes; whether it has all of a message.
    ///
    /// # Safety
    /// The memory of every message that is not complete is readable, and nobody changes it.
    pub(super) unsafe fn has_sent(&mut self, number: u64) -> Result<bool, Error> {
        if let Some(known) = self.out.state(number) {
            return Ok(known);
        }
        while let Some(message) = self.out.messages.front() {
            let (head, passed) = ((message.len as u64).to_le_bytes(), self.out.passed);
            // SAFETY: the caller's promise.
            let body = unsafe { std::slice::from_raw_parts(message.data.cast_const(), message.len) };
            let parts = [IoSlice::new(&head[passed.min(HEAD)..]), IoSlice::new(&body[passed.saturating_sub(HEAD)..])];
            let mut nothing = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.socket, &parts, &mut nothing, SendFlags::NOSIGNAL) {
                Ok(bytes) => self.out.pass(bytes),
                Err(Errno::AGAIN) => {
                    self.wants_write = true;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.lost(Some(errno))),
            }
        }
        Ok(number < self.out.complete)
    }

    /// Takes what has arrived; whether that is all of a message.
    ///
    /// # Safety
    /// The memory of every message that is not complete is writable, and nobody else touches it.
    pub(super) unsafe fn has_received(&mut self, number: u64) -> Result<bool, Error> {
        if let Some(known) = self.incoming.state(number) {
            return Ok(known);
        }
        while let Some(message) = self.incoming.messages.front() {
            let (passed, len) = (self.incoming.passed, message.len);
            // SAFETY: the caller's promise.
            let body = unsafe { std::slice::from_raw_parts_mut(message.data, len) };
            let (head, body) = (&mut self.head[passed.min(HEAD)..], &mut body[passed.saturating_sub(HEAD)..]);
            match rustix::io::readv(&self.socket, &mut [IoSliceMut::new(head), IoSliceMut::new(body)]) {
                Ok(0) => return Err(self.lost(None)),
                Ok(bytes) => {
                    // Before what follows is taken for a part of it.
                    if passed + bytes >= HEAD && u64::from_le_bytes(self.head) != len as u64 {
                        return Err(self.unexpected(len));
                    }
                    self.incoming.pass(bytes);
                }
                Err(Errno::AGAIN) => {
                    self.wants_read = true;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.lost(Some(errno))),
            }
        }
        Ok(number < self.incoming.complete)
    }

    /// Lets the poller ring once when a message can move, or one comes that was looked for.
    ///
    /// A direction at which nobody has looked since the last call is left out. Bytes may wait there
    /// that no operation takes yet: they would ring at once, again and again, and hide room to
    /// write, because one ring ends the watch over both directions.
    pub(super) fn arm(&mut self, poller: &Poller) -> rustix::io::Result<()> {
        let missing = self.incoming.messages.front().map(|message| HEAD + message.len - self.incoming.passed);
        let armed = Armed {
            reads: std::mem::take(&mut self.wants_read),
            writes: std::mem::take(&mut self.wants_write) && !self.out.messages.is_empty(),
            low_water: missing.map_or(1, |missing| missing.min(LOW_WATER)),
            received: self.incoming.position(),
            sent: self.out.position(),
        };
        // Where all is as it was, the poller has yet to ring.
        if armed == self.armed || !(armed.reads || armed.writes) {
            return Ok(());
        }
        if armed.reads && armed.low_water != self.low_water {
            set_low_water(&self.socket, armed.low_water)?;
            self.low_water = armed.low_water;
        }
        poller.watch(&*self.socket, armed.reads, armed.writes)?;
        self.armed = armed;
        Ok(())
    }

    fn unexpected(&self, len: usize) -> Error {
        let (peer, theirs) = (self.peer, u64::from_le_bytes(self.head));
        let reason = format!(
            "rank {peer} sent {theirs} bytes where {len} were expected: do all ranks run the same version of this \
             program, with the same settings?"
        );
        Error::System { what: "receiving over TCP", reason }
    }

    fn lost(&self, errno: Option<Errno>) -> Error {
        lost(self.peer, errno)
    }
}

/// Sets how many bytes must have come before the kernel says that some have. It says so before
/// where its buffer is full or the connection has ended.
fn set_low_water(socket: &TcpStream, bytes: usize) -> rustix::io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: the descriptor is open while it is borrowed, and the option reads one `c_int`, which
    // lives until the call returns.
    let failed = unsafe {
        let len = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const bytes).cast(), len)
    };
    if failed == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}

/// A rank whose connection has ended.
pub(super) fn lost(peer: usize, errno: Option<Errno>) -> Error {
    let how = match errno {
        None => "its connection was closed",
        Some(Errno::CONNRESET | Errno::PIPE) => "its connection was reset",
        Some(Errno::TIMEDOUT) => "it did not confirm in time what was sent to it",
        Some(_) => "its connection failed",
    };
    Error::PeerLost { rank: peer, op: "messages between hosts".to_owned(), how }
}
