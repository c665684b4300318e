//! The words through which messages between two ranks of a host pass.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where one rank's messages for another wait; zeroed memory is an empty one.
#[repr(C, align(128))]
pub(crate) struct Mailbox {
    /// Pieces that the sender has put out.
    pub(crate) sent: AtomicU64,
    /// What the last two are, by the parity of their number: length of the message, type, and the
    /// place of the piece.
    pub(crate) pieces: [[AtomicU64; 3]; 2],
    /// What the receiver writes, on a line of its own.
    pub(crate) receiver: Receiver,
}

#[repr(C, align(128))]
pub(crate) struct Receiver {
    /// Pieces that it has taken.
    pub(crate) taken: AtomicU64,
    /// What it expected instead of the message whose piece is next: length, number and type; type 0
    /// while it has no objection.
    pub(crate) refused: [AtomicU64; 3],
}

impl Mailbox {
    /// Whether the receiver has something to take.
    pub(crate) fn is_full(&self) -> bool {
        self.sent.load(Ordering::Acquire) != self.receiver.taken.load(Ordering::Acquire)
    }
}
