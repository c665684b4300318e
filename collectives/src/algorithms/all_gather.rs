//! All-gather by copy: after one step each rank reads its peers' shards in place. Every rank reads S and writes S; (P−1)/P·S of the
//! reads are other ranks' memory, which is the lower bound for a gather that copies.

use pillion_kernels::{DType, Span};

use super::copy_from_peer;
use crate::Error;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct AllGather {
    pub(crate) world: usize,
    pub(crate) shard: Span,
    pub(crate) offset: u64,
    pub(crate) output: Span,
}

impl Collective for AllGather {
    fn kind(&self) -> Kind {
        Kind::AllGather
    }

    fn dtype(&self) -> Option<DType> {
        Some(self.shard.dtype())
    }

    fn is_deferred(&self) -> bool {
        self.shard.deferred()
    }

    fn count(&self) -> usize {
        self.world * self.shard.len()
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn exchanges(&self) -> u32 {
        1
    }

    fn is_read_by_peers(&self) -> bool {
        true
    }

    fn exchange(&mut self, _step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        let count = self.shard.len();
        // Each rank starts with its own shard, so that no memory is read by everybody at once.
        for turn in 0..peers.world() {
            let rank = (peers.rank() + turn) % peers.world();
            // SAFETY: every rank's operation owns its shard until its last step, which it takes after this rank's exchange; the
            // output is this operation's.
            unsafe { copy_from_peer(peers, rank, 0, &self.output, rank * count, count)? };
        }
        Ok(())
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        ((world - 1) * self.shard.len() * self.shard.dtype().bytes()) as u64
    }
}
