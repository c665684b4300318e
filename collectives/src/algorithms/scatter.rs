//! Scatter: after one step each rank copies its chunk of the root's buffer. A rank reads S/P and writes S/P, the lower bound.

use super::moves::{Moves, Pull};
use super::operation::{Operands, Operation, Work};
use crate::call::{Detail, Kind};
use crate::shm::progress::Hosts;

/// output = chunk r of the root's input, at rank r, of `chunk` elements.
pub(crate) fn scatter(hosts: &Hosts, rank: usize, operands: Operands, chunk: usize, root: usize) -> Operation {
    let world = hosts.world();
    let pulls = vec![Pull { from: root, chunk: rank, to: 0 }];
    let sent = if rank == root { (world - 1) * chunk * operands.dtype.bytes() } else { 0 };
    Operation::new(Kind::Scatter, Detail::Root(root), operands, Work::Moves(Moves { pulls }))
        .cut_into(chunk, world * chunk, world, 1)
        .sending(sent)
}
