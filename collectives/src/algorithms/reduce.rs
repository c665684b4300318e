//! Reduce in one pass: after one step rank r reads chunk r of all P inputs in place and stores their combination as chunk r of the
//! root's output. A rank reads S and writes S/P: no root works alone, and P·S reads and S writes in all are the lower bound.
//!
//! Between hosts see [`super::wire_fold`].

use super::folds::{Combination, Fold, Target};
use super::operation::{Operation, Work};
use crate::call::Kind;
use crate::hosts::Hosts;
use crate::request::Operands;

/// The root's output = combination over p of the input of rank p, `len` elements.
pub(crate) fn reduce(
    hosts: &Hosts,
    operands: Operands,
    len: usize,
    combination: Combination,
    root: usize,
) -> Operation {
    let ranks = hosts.local().len();
    let sent = len * operands.dtype.bytes() * (hosts.world() - 1) / hosts.world();
    let fold = Fold { target: Target::Root(root), ..combination.fold(&operands) };
    Operation::new(Kind::Reduce, combination.detail(Some(root), 0), operands, Work::Fold(fold))
        .cut_into(len.div_ceil(ranks), len, ranks, ranks)
        .sending(sent)
}
