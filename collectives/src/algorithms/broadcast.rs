//! Broadcast: after one step every rank but the root copies the root's buffer. A rank reads S and writes S, the lower bound.

use super::moves::{Moves, Pull};
use super::operation::{Operands, Operation, Work};
use crate::call::{Detail, Kind};
use crate::shm::progress::Hosts;

/// output = the input of `root`, `len` elements.
pub(crate) fn broadcast(hosts: &Hosts, rank: usize, operands: Operands, len: usize, root: usize) -> Operation {
    let pulls = if rank == root { Vec::new() } else { vec![Pull { from: root, chunk: 0, to: 0 }] };
    let world = hosts.world();
    // Counted evenly, since the root alone does not send more than others: (P−1)·S in all.
    let sent = (world - 1) * len * operands.dtype.bytes() / world;
    Operation::new(Kind::Broadcast, Detail::Root(root), operands, Work::Moves(Moves { pulls }))
        .cut_into(len, len, 1, 1)
        .sending(sent)
}
