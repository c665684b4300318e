//! Operations whose chunks have lengths of their own: the same tables as those of equal chunks, of
//! which each says its bytes, with [`Lists`] for operands. Each rank shows where its chunks lie: 4
//! words for each rank of the group, written and read once.

use super::folds::Combination;
use super::lists::Lists;
use super::operation::Operation;
use super::{all_gather, all_to_all, gather, reduce_scatter, scatter};
use crate::call::Kind;
use crate::hosts::Hosts;
use crate::request::{Operands, Parted, PartedForm, Scattered};

/// What `parted` asks of rank `rank`.
pub(crate) fn parts(hosts: &Hosts, rank: usize, parted: Parted, groups: usize) -> Operation {
    let Parted { form, input, output, dtype, to } = parted;
    let operands = Operands { input: None, output: None, dtype, to };
    let len = |chunk: usize| input.get(chunk).map_or(0, |span| span.len());
    let all: usize = input.iter().map(|span| span.len()).sum();
    let (world, own) = (hosts.world(), len(rank));
    let (kind, sent, mut operation) = match form {
        PartedForm::AllGather => {
            let operation = all_gather::all_gather(hosts, rank, operands, 0, None, false);
            (Kind::AllGatherV, (world - 1) * all, operation)
        }
        PartedForm::Gather { root } => {
            let sent = if rank == root { 0 } else { all };
            (Kind::GatherV, sent, gather::gather(hosts, rank, operands, 0, root))
        }
        PartedForm::Scatter { root } => {
            let operation = scatter::scatter(hosts, rank, operands, 0, root);
            (Kind::ScatterV, all - own, operation)
        }
        PartedForm::AllToAll => (Kind::AllToAllV, all - own, all_to_all::all_to_all(hosts, rank, operands, 0)),
        PartedForm::ReduceScatter { reduction } => {
            let combination = Combination::new(&operands, reduction, world, groups);
            let (sections, sidebands, observing) = (None, None, None);
            let scattered =
                Scattered { operands, chunk: 0, sections, reduction, accumulate: false, sidebands, observing };
            let operation = reduce_scatter::reduce_scatter(hosts, scattered, combination);
            (Kind::ReduceScatterV, all - own, operation)
        }
    };
    let longest = input.iter().chain(&output).map(|span| span.len()).max().unwrap_or(0);
    (operation.kind, operation.sent) = (kind, (sent * dtype.bytes()) as u64);
    // How many elements there are in all is the same on every rank only of a sum.
    operation.sides.len = if kind == Kind::ReduceScatterV { all } else { 0 };
    operation.sides.chunk = longest;
    operation.sides.lists = Some(Box::new(Lists { input, output, form }));
    operation
}
