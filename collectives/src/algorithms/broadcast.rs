//! Broadcast: after one step every rank but the root copies the root's buffer. A rank reads S and writes S, the lower bound.
//!
//! To other hosts the root sends a part to each rank, and after one more step they copy each other's parts: (H−1)·S on the wire in all, the
//! lower bound without forwarding.

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// output = the input of `root`, `len` elements.
pub(crate) fn broadcast(hosts: &Hosts, rank: usize, operands: Operands, len: usize, root: usize) -> Operation {
    let (world, parts) = (hosts.world(), hosts.local().len());
    let mut moves = Moves::default();
    if rank == root {
        let others = hosts.remote().map(|peer| (peer, hosts.column(peer)));
        moves.sends = others.collect();
    } else if hosts.host(root) == hosts.own {
        let from = hosts.column(root);
        moves.pulls = (0..parts).map(|part| Pull { from, chunk: part, to: part }).collect();
    } else {
        moves.receives = vec![(root, hosts.column(rank))];
        moves.spread = (0..parts).map(|part| Pull { from: part, chunk: part, to: part }).collect();
    }
    // Counted evenly, since the root alone does not send more than others: (P−1)·S in all.
    let sent = (world - 1) * len * operands.dtype.bytes() / world;
    Operation::new(Kind::Broadcast, Detail::Root(root), operands, Work::Moves(moves))
        .cut_into(len.div_ceil(parts), len, parts, parts)
        .sending(sent)
}
