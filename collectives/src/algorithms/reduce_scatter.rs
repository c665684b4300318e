//! Reduce-scatter in one pass: after one step rank r reads chunk r of all P inputs in place and stores their combination once. A rank
//! reads S and writes S/P, the lower bound; nothing is staged between arenas, and each result is rounded once.
//!
//! The sideband travels in the header: no operation more, no buffer more.
//!
//! Between hosts see [`super::wire_fold`].

use super::folds::{Combination, Comparing, Fold, Target};
use super::operation::{Operands, Operation, Sidebands, Work};
use crate::Sections;
use crate::call::Kind;
use crate::hosts::Hosts;

/// output at rank r = combination over p of chunk r of the input of rank p, of `chunk` elements; or output combined with that.
pub(crate) fn reduce_scatter(
    hosts: &Hosts,
    operands: Operands,
    chunk: usize,
    combination: Combination,
    accumulate: bool,
    sections: Option<Sections>,
    sidebands: Option<Sidebands>,
    comparison: Option<Comparing>,
) -> Operation {
    let world = hosts.world();
    let sent = (world - 1) * chunk * operands.dtype.bytes();
    let fold = Fold { target: Target::Own, accumulate, comparison, ..combination.fold(&operands) };
    let mut operation =
        Operation::new(Kind::ReduceScatter, combination.detail(None, sidebands.is_some()), operands, Work::Fold(fold))
            .cut_into(chunk, world * chunk, world, 1)
            .in_sections(sections)
            .sending(sent);
    operation.sidebands = sidebands;
    operation
}
