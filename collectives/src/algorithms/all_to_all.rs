//! All-to-all: after one step rank r copies chunk r of every rank's buffer. A rank reads S and writes S, the lower bound.

use super::moves::{Moves, Pull};
use super::operation::{Operands, Operation, Work};
use crate::call::{Detail, Kind};
use crate::shm::progress::Hosts;

/// output\[p\] at rank r = chunk r of the input of rank p, of `chunk` elements.
pub(crate) fn all_to_all(hosts: &Hosts, rank: usize, operands: Operands, chunk: usize) -> Operation {
    let world = hosts.world();
    let pulls = (0..world).map(|from| Pull { from, chunk: rank, to: from }).collect();
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    Operation::new(Kind::AllToAll, Detail::None, operands, Work::Moves(Moves { pulls }))
        .cut_into(chunk, world * chunk, world, world)
        .sending(sent)
}
