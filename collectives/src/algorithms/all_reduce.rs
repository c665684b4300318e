//! All-reduce in one pass: after one step rank r reads chunk r of all P inputs in place and stores their combination as chunk r of all P
//! outputs. A rank reads S and writes S; a reduce-scatter followed by an all-gather would read (P−1)/P·S more and take a step more.
//!
//! Between hosts it is a reduce-scatter and an all-gather, as each says: 2·(H−1)/H·S/L a rank on the wire, the lower bound.
//!
//! It works in place, since chunk r of every buffer is read and written by rank r alone, element by element.

use super::all_gather::spread;
use super::folds::{Combination, Fold, Target};
use super::moves::Moves;
use super::operation::{Operation, Work};
use super::sides::End;
use crate::call::Kind;
use crate::hosts::Hosts;
use crate::request::Operands;

/// output = combination over p of the input of rank p, `len` elements.
pub(crate) fn all_reduce(
    hosts: &Hosts,
    rank: usize,
    operands: Operands,
    len: usize,
    combination: Combination,
) -> Operation {
    let world = hosts.world();
    let chunk = len.div_ceil(world);
    // To every other rank this rank's chunk of the result, and from its input what they combine.
    let own = chunk.min(len.saturating_sub(rank * chunk));
    let sent = ((world - 1) * own + len - own) * operands.dtype.bytes();
    let fold = Fold { target: Target::All, ..combination.fold(&operands) };
    let mut operation = Operation::new(Kind::AllReduce, combination.detail(None, 0), operands, Work::Fold(fold))
        .cut_into(chunk, len, world, world)
        .sending(sent);
    operation.then = (hosts.ranks.len() > 1).then(|| {
        Box::new(Moves {
            sends: hosts.partners(rank).map(|peer| (peer, rank)).collect(),
            source: End::Output,
            receives: hosts.partnered(rank).map(|peer| (peer, peer)).collect(),
            spread: spread(hosts),
            ..Moves::default()
        })
    });
    operation
}
