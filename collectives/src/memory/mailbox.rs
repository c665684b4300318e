//! The words through which messages between two ranks of a host pass.

use std::sync::atomic::{AtomicU64, Ordering};

use super::place::Place;

/// Words of a message's head: length, type and tag.
pub(crate) const HEAD: usize = 3;

/// Where one rank's messages for another wait; zeroed memory is an empty one.
#[repr(C, align(128))]
pub(crate) struct Mailbox {
    /// Pieces that the sender has put out.
    pub(crate) sent: AtomicU64,
    /// What the last two are, by the parity of their number: the head of the message, and the place
    /// of the piece.
    pieces: [[AtomicU64; HEAD + 1]; 2],
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

    /// Says what piece number `piece` is, before it is put out.
    pub(crate) fn describe(&self, piece: u64, head: [u64; HEAD], place: Place) {
        let words = head.into_iter().chain([place.to_word()]);
        for (word, value) in self.pieces[(piece % 2) as usize].iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The head of the message to which a piece belongs.
    pub(crate) fn head(&self, piece: u64) -> [u64; HEAD] {
        std::array::from_fn(|word| self.pieces[(piece % 2) as usize][word].load(Ordering::Relaxed))
    }

    /// Where a piece lies.
    pub(crate) fn place(&self, piece: u64) -> Place {
        Place::from_word(self.pieces[(piece % 2) as usize][HEAD].load(Ordering::Relaxed))
    }
}
