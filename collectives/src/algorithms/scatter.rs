//! Scatter: after one step each rank copies its chunk of the root's buffer, or receives it from another host. A rank reads S/P and writes
//! S/P, the lower bound.

use smallvec::smallvec;

use super::moves::{Moves, Pull};
use super::operation::{Operation, Work};
use crate::call::{Detail, Kind};
use crate::hosts::Hosts;
use crate::request::Operands;

/// output = chunk r of the root's input, at rank r, of `chunk` elements.
pub(crate) fn scatter(hosts: &Hosts, rank: usize, operands: Operands, chunk: usize, root: usize) -> Operation {
    let world = hosts.world();
    let mut moves = Moves::default();
    if hosts.host(root) == hosts.own {
        moves.pulls = smallvec![Pull { from: hosts.place(root), chunk: rank, to: 0 }];
    } else {
        moves.receives = vec![(root, 0)];
    }
    if rank == root {
        moves.sends = hosts.remote().map(|peer| (peer, peer)).collect();
    }
    let sent = if rank == root { (world - 1) * chunk * operands.dtype.bytes() } else { 0 };
    Operation::new(Kind::Scatter, Detail::Root(root), operands, Work::Moves(moves))
        .cut_into(chunk, world * chunk, world, 1)
        .sending(sent)
}
