//! What ranks say to each other before they share memory: a greeting and its answer, of fixed size, as little-endian words after a
//! magic.

use std::fmt;

use crate::terms::Terms;

/// First bytes of a greeting and of its answer; the digit is the version of the protocol and of the shared words' layout.
pub(super) const MAGIC: [u8; 8] = *b"pillion4";
/// Magic, rank, world, [`Terms`]; or magic, rank with [`GIVES_UP`], a digest of the reason.
pub(super) const GREETING: usize = TERMS + Terms::BYTES;
/// Magic, 0 or a [`Refusal`], and a number: the bytes of an arena, or the world that was expected,
/// or the digest of the reason for which rank 0 gives up. Then rank 0's [`Terms`].
pub(super) const ANSWER: usize = TERMS + Terms::BYTES;
/// Where the terms begin in both.
const TERMS: usize = 24;
pub(super) const WELCOME: u64 = 0;
/// In a greeting's rank: this rank cannot join, and says so instead.
pub(super) const GIVES_UP: u64 = 1 << 63;

/// Why rank 0 turned a connection away; the numbers are sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    Stranger = 1,
    Silent,
    Unfinished,
    HungUp,
    PushedOut,
    Garbage,
    Version,
    World,
    Terms,
    NoSuchRank,
    Taken,
    GaveUp,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Stranger => "by another user",
            Refusal::Silent => "that said nothing",
            Refusal::Unfinished => "that stopped in the middle of its greeting",
            Refusal::HungUp => "that hung up early",
            Refusal::PushedOut => "pushed out by newer ones",
            Refusal::Garbage => "that did not greet as a rank does",
            Refusal::Version => "by another version of this program",
            Refusal::World => "that expected another number of ranks",
            Refusal::Terms => "with other settings, of which it was told",
            Refusal::NoSuchRank => "with a rank that cannot be",
            Refusal::Taken => "as a rank that had come already",
            Refusal::GaveUp => "because rank 0 gave up",
        })
    }
}

/// Whether a message, of which this much has come, can be one of ours.
pub(super) fn check_magic(received: &[u8]) -> Result<(), Refusal> {
    let (name, version) = MAGIC.split_at(MAGIC.len() - 1);
    let common = received.len().min(name.len());
    if received[..common] != name[..common] {
        return Err(Refusal::Garbage);
    }
    match received.get(common) {
        Some(theirs) if *theirs != version[0] => Err(Refusal::Version),
        _ => Ok(()),
    }
}

/// A message: the magic, two numbers, and terms.
pub(super) fn bytes([first, second]: [u64; 2], terms: &Terms) -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    let words = [MAGIC, first.to_le_bytes(), second.to_le_bytes()];
    bytes.chunks_exact_mut(8).zip(words).for_each(|(place, word)| place.copy_from_slice(&word));
    bytes[TERMS..].copy_from_slice(&terms.bytes());
    bytes
}

/// The terms in a message.
pub(super) fn terms(message: &[u8; GREETING]) -> Terms {
    Terms::read(message[TERMS..].first_chunk().expect("as many bytes"))
}

/// A word of a message; the magic is word 0.
pub(super) fn number(message: &[u8], word: usize) -> u64 {
    u64::from_le_bytes(message[8 * word..][..8].try_into().expect("8 bytes"))
}
