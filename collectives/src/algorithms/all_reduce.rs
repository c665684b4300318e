//! All-reduce in place, as reduce-scatter and all-gather: after the first step rank r replaces chunk r of its own buffer by
//! the sum over all ranks; after the second it copies the other chunks from the ranks that own them. Every rank reads 2·S − S/P and
//! writes S.
//!
//! In the first exchange rank r writes chunk r of its own buffer, which only rank r reads then; in the second it writes the chunks
//! p ≠ r of its own buffer, while the others read its chunk r. So nobody reads what another writes.

use pillion_kernels::cpu::reduce;
use pillion_kernels::{DType, Span, exclusive};

use super::{copy_from_peer, peer_slice};
use crate::Error;
use crate::shm::flight::{Collective, Kind, Peers};

pub(crate) struct AllReduce {
    pub(crate) buffer: Span,
    pub(crate) offset: u64,
}

impl AllReduce {
    /// First element and length of a rank's chunk; the last chunks may be short.
    fn chunk(&self, rank: usize, world: usize) -> (usize, usize) {
        let size = self.buffer.len().div_ceil(world);
        let first = (rank * size).min(self.buffer.len());
        (first, size.min(self.buffer.len() - first))
    }
}

impl Collective for AllReduce {
    fn kind(&self) -> Kind {
        Kind::AllReduce
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

    fn exchanges(&self) -> u32 {
        2
    }

    fn is_read_by_peers(&self) -> bool {
        true
    }

    fn exchange(&mut self, step: u32, peers: &Peers<'_>) -> Result<(), Error> {
        if step == 1 {
            for turn in 1..peers.world() {
                let rank = (peers.rank() + turn) % peers.world();
                let (first, count) = self.chunk(rank, peers.world());
                // SAFETY: chunk `rank` of that rank's buffer was written before its second step and is not written again; see above.
                unsafe { copy_from_peer(peers, rank, first, &self.buffer, first, count)? };
            }
            return Ok(());
        }
        let (first, count) = self.chunk(peers.rank(), peers.world());
        let _access = exclusive(self.buffer.deferred());
        /// Sums this rank's chunk of every buffer into a vector, then writes it over its own: the sum reads what it replaces.
        macro_rules! sum {
            ($sum:path, $element:ty) => {{
                let mut total = vec![<$element>::default(); count];
                {
                    // SAFETY: chunk r is written by rank r alone, below, after this borrow.
                    let inputs = (0..peers.world()).map(|rank| unsafe { peer_slice::<$element>(peers, rank, first, count) });
                    $sum(&mut total, &inputs.collect::<Result<Vec<_>, Error>>()?, false);
                }
                // SAFETY: this operation owns its buffer, and peers read only other chunks of it in this exchange. The slice is made
                // from the chunk alone, so it aliases nothing that they read.
                let out = unsafe {
                    let start = self.buffer.address().cast::<$element>().add(first);
                    std::slice::from_raw_parts_mut(start.as_ptr(), count)
                };
                out.copy_from_slice(&total);
            }};
        }
        match self.buffer.dtype() {
            DType::F32 => sum!(reduce::sum_f32, f32),
            DType::F64 => sum!(reduce::sum_f64, f64),
            other => panic!("an all-reduce of {other}"),
        }
        Ok(())
    }

    fn bytes_sent(&self, world: usize) -> u64 {
        let others = self.buffer.len() - self.buffer.len() / world.max(1);
        let gathered = (world - 1) * (self.buffer.len() / world);
        ((others + gathered) * self.buffer.dtype().bytes()) as u64
    }
}
