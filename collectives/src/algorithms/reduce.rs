//! Reduce in one pass: after one step rank r reads chunk r of all P inputs in place and stores
//! their combination as chunk r of the root's output. A rank reads S and writes S/P: no root works
//! alone, and P·S reads and S writes in all are the lower bound.
//!
//! Between hosts the ranks of all hosts combine one chunk each ([`super::wire_fold`]), and the
//! other hosts' chunks then go to the ranks of the root's host, which put them into the root's
//! output: 2·(H−1)/H·S into the root's host, instead of the (H−1)·S of all hosts' partial results.

use super::folds::{Combination, Fold, Target};
use super::moves::Moves;
use super::operation::{Operation, Work};
use super::sides::End;
use crate::call::Kind;
use crate::hosts::Hosts;
use crate::request::Operands;

/// The root's output = combination over p of the input of rank p, `len` elements.
pub(crate) fn reduce(
    hosts: &Hosts,
    rank: usize,
    operands: Operands,
    len: usize,
    combination: Combination,
    root: usize,
) -> Operation {
    let (world, single) = (hosts.world(), hosts.ranks.len() == 1);
    let sent = len * operands.dtype.bytes() * (world - 1) / world;
    let target = if single { Target::Root(root) } else { Target::Collected(root) };
    let fold = Fold { target, ..combination.fold(&operands) };
    let mut operation = Operation::new(Kind::Reduce, combination.detail(Some(root), 0), operands, Work::Fold(fold))
        .cut_into(len.div_ceil(world), len, world, world)
        .sending(sent);
    if !single {
        let is_here = hosts.host(root) == hosts.own;
        let moves = Moves { source: End::Output, ..Moves::default() };
        operation.then = Some(Box::new(match is_here {
            true => Moves {
                receives: hosts.partnered(rank).map(|peer| (peer, peer)).collect(),
                into: Some(hosts.place(root)),
                ..moves
            },
            false => Moves { sends: vec![(hosts.partner(rank, hosts.host(root)), rank)], ..moves },
        }));
    }
    operation
}
