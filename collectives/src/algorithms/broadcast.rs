//! Broadcast: after one step every rank but the root copies the root's buffer. (P−1)·S are read and written in all, S by each.

use pillion_kernels::{DType, Span};

use super::copy_from_peer;
use crate::Error;
use crate::shm::control::PAYLOAD;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct Broadcast {
    pub(crate) buffer: Span,
    pub(crate) offset: u64,
    pub(crate) root: usize,
}

impl Collective for Broadcast {
    fn kind(&self) -> Kind {
        Kind::Broadcast
    }

    fn dtype(&self) -> Option<DType> {
        Some(self.buffer.dtype())
    }

    fn is_deferred(&self) -> bool {
        self.buffer.deferred()
    }

    fn count(&self) -> usize {
        self.buffer.len()
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn payload(&mut self, words: &mut [u64; PAYLOAD]) -> usize {
        words[0] = self.root as u64;
        1
    }

    fn exchanges(&self) -> u32 {
        1
    }

    fn is_read_by_peers(&self) -> bool {
        true
    }

    fn exchange(&mut self, _step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        for rank in 0..peers.world() {
            let root = peers.payload(rank, 0);
            if root != self.root as u64 {
                let call = |root| format!("broadcast from rank {root}");
                return Err(Error::Mismatch { ours: call(self.root as u64), theirs: call(root), peer: rank });
            }
        }
        if peers.rank() == self.root {
            return Ok(());
        }
        // SAFETY: the root's operation owns its buffer until its last step, which it takes after this exchange, and does not write it.
        unsafe { copy_from_peer(peers, self.root, 0, &self.buffer, 0, self.buffer.len()) }
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        // Counted evenly, since the count is the same on every rank: (P−1)·S in all.
        ((world - 1) * self.buffer.len() * self.buffer.dtype().bytes() / world) as u64
    }
}
