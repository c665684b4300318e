//! All-gather: after one step each rank copies every rank's shard from where it lies. A rank reads S and writes S, of which (P−1)/P·S
//! are read from others: the lower bound for a gather that copies. (A window's gather moves nothing.)

use super::moves::{Moves, Pull};
use super::operation::{Operands, Operation, Work};
use crate::call::{Detail, Kind};
use crate::shm::progress::Hosts;

/// output\[p\] = the input of rank p, for `chunk` elements of each rank.
pub(crate) fn all_gather(hosts: &Hosts, operands: Operands, chunk: usize) -> Operation {
    let world = hosts.world();
    let pulls = (0..world).map(|rank| Pull { from: rank, chunk: 0, to: rank }).collect();
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    Operation::new(Kind::AllGather, Detail::None, operands, Work::Moves(Moves { pulls }))
        .cut_into(chunk, world * chunk, 1, world)
        .sending(sent)
}
