//! Gather: after one step the root copies every rank's shard, or receives it from another host. The root reads S and writes S, the lower
//! bound; the others wait until it has.

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// The root's output\[p\] = the input of rank p, for `chunk` elements of each rank.
pub(crate) fn gather(hosts: &Hosts, rank: usize, operands: Operands, chunk: usize, root: usize) -> Operation {
    let world = hosts.world();
    let mut moves = Moves::default();
    if rank == root {
        let own = hosts.local().iter().enumerate();
        moves.pulls = own.map(|(from, &rank)| Pull { from, chunk: 0, to: rank }).collect();
        moves.receives = hosts.remote().map(|peer| (peer, peer)).collect();
    } else if hosts.host(root) != hosts.own {
        moves.sends = vec![(root, 0)];
    }
    let sent = if rank == root { 0 } else { chunk * operands.dtype.bytes() };
    Operation::new(Kind::Gather, Detail::Root(root), operands, Work::Moves(moves))
        .cut_into(chunk, world * chunk, 1, world)
        .sending(sent)
}
