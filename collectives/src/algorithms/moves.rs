//! Operations that copy chunks: each rank takes what it wants from its peers, where they published it.

use pillion_kernels::cpu::stream;

use super::sides::{End, Piece, Sides};
use crate::Error;
use crate::shm::flight::Peers;

/// One chunk that a rank copies from a rank of its host to its own output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pull {
    /// The rank that has it, among those of this host.
    pub(super) from: usize,
    /// Which chunk of its input.
    pub(super) chunk: usize,
    /// Which chunk of the output it becomes.
    pub(super) to: usize,
}

/// What this rank copies.
#[derive(Default)]
pub(super) struct Moves {
    pub(super) pulls: Vec<Pull>,
}

impl Moves {
    pub(super) fn run(&self, sides: &Sides, peers: &Peers<'_>, piece: &Piece, streams: bool) -> Result<(), Error> {
        // Each rank starts with its own chunk, so that no memory is read by everybody at once.
        let (rank, world) = (peers.rank(), peers.world());
        let turn = |pull: &Pull| (pull.from + world - rank) % world;
        let mut pulls = self.pulls.clone();
        pulls.sort_by_key(turn);
        for Pull { from, chunk, to } in pulls {
            let range = sides.range(to, piece);
            if range.is_empty() {
                continue;
            }
            let count = range.len();
            let target = sides.own(End::Output, to, range.start, count);
            let source = sides.of_rank(peers, from, End::Input, chunk, range, piece)?;
            if !std::ptr::eq(source, target) {
                // SAFETY: `from` leaves the chunk as it is until its next step, which it takes after this rank has taken its own; the
                // output is this operation's. They do not overlap: they belong to different ranks, different buffers, or,
                // in place, are different chunks of one.
                unsafe { stream::copy(source, target, count * sides.output.width, streams) };
            }
        }
        Ok(())
    }
}
