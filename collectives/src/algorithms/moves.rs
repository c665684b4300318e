//! Operations that copy chunks: each rank takes what it wants from the ranks of its host, where they published it, and exchanges
//! messages with ranks of other hosts. What several ranks of a host want from another host comes to one of them, from which
//! the others then copy it.

use std::ops::Range;

use smallvec::SmallVec;

use super::between_hosts::Held;
use super::sides::{End, Piece, Sides, Source};
use super::transit::Transit;
use crate::Error;
use crate::engine::flight::Peers;
use crate::memory::place::Place;

/// The groups of these messages in a transit: those that start at once, and those that follow.
pub(super) const GROUP: usize = 100;
pub(super) const FORWARDS: usize = 101;

/// One chunk that a rank copies from a rank of its host to its own output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pull {
    /// The rank that has it, among those of this host.
    pub(super) from: usize,
    /// Which chunk it is there.
    pub(super) chunk: usize,
    /// Which chunk of the output it becomes.
    pub(super) to: usize,
}

/// With up to eight ranks on a host, no memory is asked for.
pub(super) type Pulls = SmallVec<[Pull; 8]>;

/// What this rank copies, sends and receives.
#[derive(Default)]
pub(super) struct Moves {
    /// From inputs of ranks of this host.
    pub(super) pulls: Pulls,
    /// (rank of another host, chunk of the operand `source`).
    pub(super) sends: Vec<(usize, usize)>,
    pub(super) source: End,
    /// (rank of another host, chunk of the output).
    pub(super) receives: Vec<(usize, usize)>,
    /// Whose output receives, by the place of a rank of this host, if it is not this rank's.
    pub(super) into: Option<usize>,
    /// What is received and goes on: (rank of another host, chunk of the output).
    pub(super) forwards: Vec<(usize, usize)>,
    /// From outputs of ranks of this host, once they have received.
    pub(super) spread: Vec<Pull>,
}

impl Moves {
    /// Has each rank start with its own chunk, so that no memory is read by everybody at once.
    pub(super) fn take_turns(&mut self, peers: &Peers<'_>) {
        let (rank, world) = (peers.rank(), peers.world());
        self.pulls.sort_unstable_by_key(|pull| ((pull.from + world - rank) % world, pull.to));
    }

    /// Copies from inputs.
    pub(super) fn pull(&self, sides: &Sides, peers: &Peers<'_>, piece: &Piece, streams: bool) -> Result<(), Error> {
        self.pulls.iter().try_for_each(|pull| {
            sides.parts(sides.range(End::Output, pull.to, piece)).try_for_each(|part| {
                let source = sides.source(peers, pull.from, End::Input, pull.chunk, part.clone(), piece)?;
                copy(sides, peers, pull.to, part, source, streams)
            })
        })
    }

    /// Starts messages to and from other hosts.
    pub(super) fn start(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
    ) -> Result<(), Error> {
        let own = |chunk, part: Range<usize>| Ok(sides.own(self.source, chunk, part.start, part.len()).cast_const());
        // SAFETY: the operand is this operation's, `Held` keeps it, and nobody writes these chunks
        // before the operation is complete.
        unsafe { send(&self.sends, sides, self.source, piece, own, transit, GROUP)? };
        for &(rank, chunk) in &self.receives {
            for part in sides.parts(sides.range(End::Output, chunk, piece)) {
                let bytes = part.len() * sides.output.width;
                let into = self.landing(sides, peers, chunk, part, piece)?;
                // SAFETY: the output is this operation's, or that of the same operation of a rank
                // of this host; `Held` keeps the one, and the mapping with the other and all
                // stages. No rank of this host reads this chunk before this rank's next step; those
                // that read an earlier piece from the same half of the stage have taken a step
                // since.
                unsafe { transit.receive(rank, into, bytes, GROUP) };
            }
        }
        Ok(())
    }

    /// Passes on what has been received.
    pub(super) fn forward(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
    ) -> Result<(), Error> {
        let landed = |chunk, part| self.landing(sides, peers, chunk, part, piece).map(<*mut u8>::cast_const);
        // SAFETY: as in `start`; it has been received, and only reads follow.
        unsafe { send(&self.forwards, sides, End::Output, piece, landed, transit, FORWARDS) }
    }

    /// Where elements that are received lie: where the ranks of this host copy them from, if they
    /// do.
    fn landing(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        chunk: usize,
        part: Range<usize>,
        piece: &Piece,
    ) -> Result<*mut u8, Error> {
        let rank = self.into.unwrap_or(peers.rank());
        let is_staged = matches!(peers.header(rank).output(), Place::Stage(_));
        match is_staged && !self.spread.is_empty() {
            true => sides.published(peers, rank, End::Output, chunk, part, piece),
            false => sides.of_rank(peers, rank, End::Output, chunk, part, piece),
        }
    }

    /// Copies what ranks of this host have received, or combined.
    pub(super) fn spread(&self, sides: &Sides, peers: &Peers<'_>, piece: &Piece, streams: bool) -> Result<(), Error> {
        self.spread.iter().try_for_each(|pull| {
            sides.parts(sides.range(End::Output, pull.to, piece)).try_for_each(|part| {
                let source = sides.source(peers, pull.from, End::Output, pull.chunk, part.clone(), piece)?;
                copy(sides, peers, pull.to, part, source, streams)
            })
        })
    }
}

/// Sends chunks of an operand, (rank of another host, chunk), from where `find` finds their parts.
///
/// # Safety
/// What `find` finds stays readable and unchanged until the transit says that the group is
/// complete, or for ever, and `Held` keeps it.
unsafe fn send(
    chunks: &[(usize, usize)],
    sides: &Sides,
    end: End,
    piece: &Piece,
    find: impl Fn(usize, Range<usize>) -> Result<*const u8, Error>,
    transit: &mut Transit<Held>,
    group: usize,
) -> Result<(), Error> {
    for &(rank, chunk) in chunks {
        for part in sides.parts(sides.range(end, chunk, piece)) {
            let bytes = part.len() * sides.side(end).width;
            let from = find(chunk, part)?;
            // SAFETY: the caller's promise.
            unsafe { transit.send(rank, from, bytes, group) };
        }
    }
    Ok(())
}

/// Copies a chunk's elements to this rank's output, unless they are there.
fn copy(
    sides: &Sides,
    peers: &Peers<'_>,
    to: usize,
    range: Range<usize>,
    source: Source,
    streams: bool,
) -> Result<(), Error> {
    let target = sides.own(End::Output, to, range.start, range.len());
    if matches!(source, Source::Here(source) if std::ptr::eq(source, target)) {
        return Ok(());
    }
    // SAFETY: whose memory this is leaves the elements as they are until its next step, which it
    // takes after this rank has taken its own; the output is this operation's. They do not overlap:
    // they belong to different ranks, to different buffers, or, in place, are different chunks of
    // one.
    unsafe { source.copy(peers, target, range.len() * sides.output.width, streams) }
}
