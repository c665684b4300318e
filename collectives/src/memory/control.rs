//! The words through which ranks see each other. All of them are atomic, so a reference to them is sound whatever another process does.
//!
//! # Memory ordering
//!
//! A rank writes an operation's header, and its digest beside the counter, with relaxed stores, then its step counter with a release store; a peer that loads the
//! counter with acquire sees the header and everything the rank wrote to its arena before. Headers alternate between two places: a
//! rank writes the header of operation n+2 after it saw every rank's first step of n+1, which each takes after it has finished
//! reading the headers of n.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::life::Life;
use super::place::Place;
use super::private::ProcessControl;
use super::protocol::Bell;

/// Words of an operand that travels beside the steps.
pub(crate) const BRIEF: usize = 2;
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
/// Bells of callers that wait for no channel.
pub(crate) const WINDOW_BELL: usize = CHANNELS;
pub(crate) const MAIL_BELL: usize = CHANNELS + 1;

/// What a thread can wait for, as bits of a bell's interest: news on a channel (its bit), and these.
pub(crate) mod subject {
    /// Messages between two ranks.
    pub(crate) const MAIL: u64 = 1 << 3;
    /// A window's release.
    pub(crate) const WINDOW: u64 = 1 << 4;
    /// Another thread of the same rank has something to do.
    pub(crate) const WORK: u64 = 1 << 5;
    /// Somebody has joined, left or failed: everybody wants to know.
    pub(crate) const ALL: u64 = u64::MAX;
}

impl Channel {
    /// Its bit in a bell's interest.
    pub(crate) fn subject(self) -> u64 {
        1 << self as u32
    }
}

/// What one rank of the job shows the others of its host, whatever groups it is in.
#[repr(C, align(4096))]
pub(crate) struct RankControl {
    /// [`state::ABSENT`], then [`state::JOINED`] while the progress thread runs, then
    /// [`state::LEFT`] or [`state::DEAD`].
    pub(crate) state: AtomicU32,
    /// When this rank's progress thread last ran, in milliseconds of the monotonic clock.
    pub(crate) heartbeat: AtomicU64,
    /// Held by the progress thread while it lives.
    pub(crate) life: Life,
    /// The rank that its first error in any group names, plus one, as the mapping counts;
    /// [`ELSEWHERE`] for one of another host.
    culprit: AtomicU64,
    /// The processors on which this rank may run, as bits.
    pub(crate) processors: [AtomicU64; 16],
    /// The process that it is, or is a thread of.
    pub(crate) process: ProcessControl,
    /// Where the progress thread sleeps.
    pub(crate) progress: Bell<AtomicU32>,
    /// Groups that this rank has made room for, and whose members have not all come.
    pub(crate) notices: [Notice; NOTICES],
}

/// In the place of a rank of another host.
const ELSEWHERE: u64 = u64::MAX;

impl RankControl {
    /// Remembers whom this rank's first error names: a rank of this host as the mapping counts, or
    /// none for one of another host.
    pub(crate) fn blame(&self, rank: Option<usize>) {
        let word = rank.map_or(ELSEWHERE, |rank| rank as u64 + 1);
        let _ = self.culprit.compare_exchange(0, word, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether this rank has had an error that names another rank.
    pub(crate) fn blames(&self) -> bool {
        self.culprit.load(Ordering::Acquire) != 0
    }

    /// The rank of this host that this rank's first error names, as the mapping counts.
    pub(crate) fn culprit(&self) -> Option<usize> {
        match self.culprit.load(Ordering::Acquire) {
            0 | ELSEWHERE => None,
            rank => Some(rank as usize - 1),
        }
    }
}

/// Groups that one rank may make room for at a time.
pub(crate) const NOTICES: usize = 64;

/// Says where the words of a new group lie. Only the rank that shows it writes it.
#[repr(C)]
pub(crate) struct Notice {
    /// What tells the group from others; 0 where there is none. Written last.
    pub(crate) key: AtomicU64,
    /// A place in the file.
    pub(crate) place: AtomicU64,
}

/// What one rank shows the other members of one group that are on its host.
#[repr(C, align(128))]
pub(crate) struct GroupControl {
    /// A [`state`].
    pub(crate) state: AtomicU32,
    /// Whether this rank never touches the words of this group again, nor what it took from the
    /// memory of others.
    pub(crate) gone: AtomicU32,
    /// The rank that this one's error names, plus one.
    culprit: AtomicU64,
    /// Why this rank aborted: a length in bytes, then UTF-8.
    reason: [AtomicU64; 64],
    /// Where calling threads sleep, one bell for each channel, one for windows and one for messages; whoever drives a channel holds its lane's lock.
    pub(crate) callers: [Bell<AtomicU32>; CHANNELS + 2],
    /// One per [`Channel`].
    pub(crate) channels: [ChannelControl; CHANNELS],
}

/// The stages of a rank's life in a group; the memory starts zeroed.
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
    /// [`Call::digest`] of the operation under way and of the one before, by the parity of the operation's number. On the cache line of
    /// the steps, so that who waits for a step learns with it that both mean the same operation.
    pub(crate) digests: [AtomicU64; 2],
    /// The operands of the same operations, where they are so brief that they fit here.
    pub(crate) brief: [[AtomicU64; BRIEF]; 2],
    /// Headers of the operation under way and of the one before, by the parity of the operation's number.
    pub(crate) headers: [Header; 2],
    /// See [`ChannelControl::show_wait`].
    waits_for: AtomicU64,
}

/// What a rank called.
#[repr(C, align(128))]
pub(crate) struct Header {
    /// [`Call::words`].
    call: [AtomicU64; 6],
    /// Where peers find this rank's operands, each a [`super::place::Place`].
    input: AtomicU64,
    output: AtomicU64,
    pub(crate) payload: [AtomicU64; PAYLOAD],
}

/// What a rank called, as far as every rank must call the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Number of the operation on its channel, from 1.
    pub(crate) sequence: u64,
    /// A [`crate::call::Kind`].
    pub(crate) kind: u64,
    /// Type of the elements, as a number; 0 for none.
    pub(crate) dtype: u64,
    /// Whether the buffers belong to a device that runs work later, and how they are cut into
    /// sections.
    pub(crate) memory: u64,
    /// Number of elements of the full buffer, or of values.
    pub(crate) count: u64,
    /// What else tells operations of a kind apart: a root, a reduction, a window.
    pub(crate) detail: u64,
    /// What elements are multiplied by first, as the bits of an f64.
    pub(crate) factor: u64,
}

impl Call {
    /// Whether two ranks have made the same call.
    pub(crate) fn agrees_with(&self, other: &Call) -> bool {
        self.words()[1..] == other.words()[1..]
    }

    /// A number that is the same for the same call, and hardly ever for another.
    pub(crate) fn digest(&self) -> u64 {
        let mix = |digest: u64, word: u64| (digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.words().into_iter().fold(0, mix)
    }

    pub(crate) fn words(&self) -> [u64; 6] {
        [self.sequence, self.kind | self.dtype << 32, self.memory, self.count, self.detail, self.factor]
    }

    pub(crate) fn from_words([sequence, kind, memory, count, detail, factor]: [u64; 6]) -> Call {
        Call { sequence, kind: kind & 0xffff_ffff, dtype: kind >> 32, memory, count, detail, factor }
    }
}

impl Header {
    /// Writes what peers may read once the rank has taken its next step. The payload is written separately.
    pub(crate) fn write(&self, call: Call, input: Place, output: Place) {
        for (word, value) in self.call.iter().zip(call.words()) {
            word.store(value, Ordering::Relaxed);
        }
        self.input.store(input.to_word(), Ordering::Relaxed);
        self.output.store(output.to_word(), Ordering::Relaxed);
    }

    pub(crate) fn call(&self) -> Call {
        Call::from_words(self.call.each_ref().map(|word| word.load(Ordering::Relaxed)))
    }

    pub(crate) fn input(&self) -> Place {
        Place::from_word(self.input.load(Ordering::Relaxed))
    }

    pub(crate) fn output(&self) -> Place {
        Place::from_word(self.output.load(Ordering::Relaxed))
    }
}

/// Low bits of [`ChannelControl::show_wait`]'s word, which hold the time.
const TIME: u32 = 40;
/// Milliseconds for which that word holds.
const FRESH: u64 = 500;

impl ChannelControl {
    /// What the rank has called last, for messages: words of two calls may mix in it.
    pub(crate) fn newest(&self) -> Call {
        let [one, other] = self.headers.each_ref().map(Header::call);
        if one.sequence > other.sequence { one } else { other }
    }

    /// Shows, as long as this is called again, that the rank waits for a rank of another host,
    /// counted as the communicator does.
    pub(crate) fn show_wait(&self, rank: usize) {
        let now = monotonic_millis() & ((1 << TIME) - 1);
        self.waits_for.store((rank as u64 + 1) << TIME | now, Ordering::Relaxed);
    }

    /// The rank of another host for which the rank waits, if it does.
    pub(crate) fn waits_for(&self) -> Option<usize> {
        let (word, mask) = (self.waits_for.load(Ordering::Relaxed), (1 << TIME) - 1);
        let age = monotonic_millis().wrapping_sub(word & mask) & mask;
        (word >> TIME).checked_sub(1).filter(|_| age <= FRESH).map(|rank| rank as usize)
    }
}

impl GroupControl {
    /// Says that this rank gives up, and why.
    pub(crate) fn abort(&self, reason: &str) {
        self.write_reason(reason);
        self.state.store(state::ABORTED, Ordering::Release);
    }

    pub(crate) fn set_culprit(&self, rank: Option<usize>) {
        self.culprit.store(rank.map_or(0, |rank| rank as u64 + 1), Ordering::Release);
    }

    pub(crate) fn culprit(&self) -> Option<usize> {
        self.culprit.load(Ordering::Acquire).checked_sub(1).map(|rank| rank as usize)
    }

    fn write_reason(&self, reason: &str) {
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
