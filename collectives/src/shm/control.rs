//! The words through which ranks see each other. All of them are atomic, so a reference to them is sound whatever another process does.
//!
//! # Memory ordering
//!
//! A rank writes an operation's header with relaxed stores, then its step counter with a release store; a peer that loads the
//! counter with acquire sees the header and everything the rank wrote to its arena before. Headers alternate between two places: a
//! rank writes the header of operation n+2 after it saw every rank's first step of n+1, which each takes after it has finished
//! reading the headers of n.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::life::Life;

/// Values that travel inside a header.
pub(crate) const PAYLOAD: usize = 64;

/// Independent sequences of operations; each is in the same order on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Weights on their way to those who compute.
    Gather,
    /// Gradients on their way to those who own them.
    Reduce,
    /// Small agreements between the hosts' programs.
    Control,
}

pub(crate) const CHANNELS: usize = 3;

/// What one rank shows the others.
#[repr(C, align(4096))]
pub(crate) struct RankControl {
    /// A [`state`].
    pub(crate) state: AtomicU32,
    /// Incremented by whoever has news for this rank; this rank sleeps on it.
    pub(crate) doorbell: AtomicU32,
    /// Number of this rank's threads asleep on the doorbell.
    pub(crate) sleepers: AtomicU32,
    /// When this rank's progress thread last ran, in milliseconds of the monotonic clock.
    pub(crate) heartbeat: AtomicU64,
    /// Held by the progress thread while it lives.
    pub(crate) life: Life,
    /// The rank that this one's error names, plus one.
    culprit: AtomicU64,
    /// Why this rank aborted: a length in bytes, then UTF-8.
    pub(crate) reason: [AtomicU64; 64],
    /// One per [`Channel`].
    pub(crate) channels: [ChannelControl; CHANNELS],
}

/// The stages of a rank's life; the memory starts zeroed.
pub(crate) mod state {
    pub(crate) const ABSENT: u32 = 0;
    pub(crate) const JOINED: u32 = 1;
    /// Has dropped its communicator.
    pub(crate) const LEFT: u32 = 2;
    /// Has aborted; `reason` says why.
    pub(crate) const ABORTED: u32 = 3;
    /// Found dead by a peer.
    pub(crate) const DEAD: u32 = 4;
}

/// One rank's place in one channel.
#[repr(C, align(128))]
pub(crate) struct ChannelControl {
    /// Steps taken since the start.
    pub(crate) steps: AtomicU64,
    /// Headers of the operation under way and of the one before, by the parity of the operation's number.
    pub(crate) headers: [Header; 2],
}

/// What a rank called.
#[repr(C, align(128))]
pub(crate) struct Header {
    sequence: AtomicU64,
    kind: AtomicU64,
    dtype: AtomicU64,
    deferred: AtomicU64,
    count: AtomicU64,
    offset: AtomicU64,
    pub(crate) payload: [AtomicU64; PAYLOAD],
}

/// A header's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Number of the operation on its channel, from 1.
    pub(crate) sequence: u64,
    /// A [`super::flight::Kind`].
    pub(crate) kind: u64,
    /// Type of the elements, as a number.
    pub(crate) dtype: u64,
    /// Whether the buffers belong to a device that runs work later.
    pub(crate) deferred: u64,
    /// Number of elements of the full buffer, or of values.
    pub(crate) count: u64,
    /// Where the buffer lies in the rank's arena, in bytes.
    pub(crate) offset: u64,
}

impl Call {
    /// Whether two ranks have made the same call.
    pub(crate) fn agrees_with(&self, other: &Call) -> bool {
        (self.kind, self.dtype, self.deferred, self.count) == (other.kind, other.dtype, other.deferred, other.count)
    }
}

impl Header {
    pub(crate) fn write(&self, call: Call, payload: &[u64]) {
        let words = [&self.sequence, &self.kind, &self.dtype, &self.deferred, &self.count, &self.offset];
        let values = [call.sequence, call.kind, call.dtype, call.deferred, call.count, call.offset];
        for (word, value) in words.into_iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
        for (word, &value) in self.payload.iter().zip(payload) {
            word.store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> Call {
        Call {
            sequence: self.sequence.load(Ordering::Relaxed),
            kind: self.kind.load(Ordering::Relaxed),
            dtype: self.dtype.load(Ordering::Relaxed),
            deferred: self.deferred.load(Ordering::Relaxed),
            count: self.count.load(Ordering::Relaxed),
            offset: self.offset.load(Ordering::Relaxed),
        }
    }
}

impl RankControl {
    /// Wakes this rank.
    pub(crate) fn ring(&self) {
        self.doorbell.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // Fails only for a bad address, and this one is mapped.
            let _ = rustix::thread::futex::wake(&self.doorbell, rustix::thread::futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// Sleeps until the doorbell differs from `seen`, or for `limit`. The caller looked at the doorbell, then found nothing to do.
    pub(crate) fn sleep(&self, seen: u32, limit: std::time::Duration) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let limit = rustix::fs::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // Every outcome (woken, changed, timed out, interrupted) means: look again.
        let _ = rustix::thread::futex::wait(&self.doorbell, rustix::thread::futex::Flags::empty(), seen, Some(&limit));
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn set_culprit(&self, rank: Option<usize>) {
        self.culprit.store(rank.map_or(0, |rank| rank as u64 + 1), Ordering::Release);
    }

    pub(crate) fn culprit(&self) -> Option<usize> {
        self.culprit.load(Ordering::Acquire).checked_sub(1).map(|rank| rank as usize)
    }

    pub(crate) fn write_reason(&self, reason: &str) {
        let room = (self.reason.len() - 1) * 8;
        let mut end = reason.len().min(room);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        for (word, chunk) in self.reason[1..].iter().zip(reason.as_bytes()[..end].chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        self.reason[0].store(end as u64, Ordering::Release);
    }

    pub(crate) fn read_reason(&self) -> String {
        let end = self.reason[0].load(Ordering::Acquire) as usize;
        let bytes: Vec<u8> =
            self.reason[1..].iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).take(end).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Milliseconds of the clock that all processes of a host share.
pub(crate) fn monotonic_millis() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}
