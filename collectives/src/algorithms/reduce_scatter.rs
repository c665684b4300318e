//! Reduce-scatter in one pass: after one step rank r reads chunk r of all P inputs in place and stores their combination once. A rank
//! reads S and writes S/P, the lower bound; nothing is staged between arenas, and each result is rounded once.
//!
//! The sideband travels in the header: no operation more, no buffer more.
//!
//! Between hosts see [`super::wire_fold`].

use super::folds::{Combination, Fold, Target};
use super::operation::{Operation, Work};
use crate::call::Kind;
use crate::hosts::Hosts;
use crate::request::Scattered;

/// output at rank r = combination over p of chunk r of the input of rank p, of `chunk` elements; or output combined with that.
pub(crate) fn reduce_scatter(hosts: &Hosts, scattered: Scattered, combination: Combination) -> Operation {
    let Scattered { operands, chunk, sections, accumulate, sidebands, observing, .. } = scattered;
    let world = hosts.world();
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    let head = sidebands.as_ref().map_or(0, |sidebands| sidebands.totals.len());
    let fold = Fold { target: Target::Own, accumulate, observing, ..combination.fold(&operands) };
    let mut operation = Operation::new(Kind::ReduceScatter, combination.detail(None, head), operands, Work::Fold(fold))
        .cut_into(chunk, world * chunk, world, 1)
        .in_sections(sections)
        .sending(sent);
    operation.sidebands = sidebands;
    operation.sides.head = head;
    operation
}
