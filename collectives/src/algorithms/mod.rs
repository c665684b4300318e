//! One algorithm a file, each with its steps and the bytes it moves. S is the size of the full buffer, P the number of ranks, H of
//! hosts, L = P/H of ranks on each.
//!
//! Most are tables: which chunks of whose operands a rank copies ([`moves`]), or combines ([`folds`]). What they have in common,
//! where operands lie and how they pass through a stage piece by piece, is in [`operation`].

mod all_gather;
mod all_reduce;
mod all_to_all;
mod between_hosts;
mod brief;
mod broadcast;
mod folds;
mod gather;
mod gather_window;
mod lists;
mod moves;
mod operation;
mod parts;
mod reduce;
mod reduce_scatter;
mod scalars;
mod scatter;
mod sides;
mod transit;
mod wire_fold;

use crate::engine::flight::Algorithm;
use crate::hosts::Hosts;
use crate::memory::control::{Call, Channel};
use crate::request::{Collective, Operands, PartedForm, Scattered};

pub(crate) use brief::BriefAllReduce;
pub(crate) use folds::Combination;
use gather_window::GatherWindow;
use operation::Operation;
pub(crate) use scalars::Scalars;

/// Any algorithm, for a flight to carry: one size, so that a new flight needs no memory.
// A box would be an allocation for each operation.
#[allow(clippy::large_enum_variant)]
pub(crate) enum AnyAlgorithm {
    Operation(Operation),
    Brief(BriefAllReduce),
    Window(GatherWindow),
    Scalars(Scalars<'static>),
}

impl AnyAlgorithm {
    /// How ranks of these hosts, of which this is number `rank`, do what is asked for, and on which
    /// channel. Reductions are computed in `groups` groups of ranks.
    pub(crate) fn of(collective: Collective, hosts: &Hosts, rank: usize, groups: usize) -> (AnyAlgorithm, Channel) {
        let combination = |operands: &Operands, reduction| Combination::new(operands, reduction, hosts.world(), groups);
        let gathers = |operation| (AnyAlgorithm::Operation(operation), Channel::Gather);
        let reduces = |operation| (AnyAlgorithm::Operation(operation), Channel::Reduce);
        match collective {
            Collective::AllGather { operands, chunk, sections, in_place } => {
                gathers(all_gather::all_gather(hosts, rank, operands, chunk, sections, in_place))
            }
            Collective::GatherWindow { window, number, sections } => {
                let algorithm = GatherWindow::new(window, number, rank, hosts.world(), sections);
                (AnyAlgorithm::Window(algorithm), Channel::Gather)
            }
            Collective::Broadcast { operands, len, root } => {
                gathers(broadcast::broadcast(hosts, rank, operands, len, root))
            }
            Collective::Gather { operands, chunk, root } => gathers(gather::gather(hosts, rank, operands, chunk, root)),
            Collective::Scatter { operands, chunk, root } => {
                gathers(scatter::scatter(hosts, rank, operands, chunk, root))
            }
            Collective::AllToAll { operands, chunk } => gathers(all_to_all::all_to_all(hosts, rank, operands, chunk)),
            Collective::ReduceScatter(scattered) => {
                let Scattered { operands, reduction, .. } = &scattered;
                let combination = combination(operands, *reduction);
                reduces(reduce_scatter::reduce_scatter(hosts, scattered, combination))
            }
            Collective::AllReduce { operands, len, reduction } => {
                let combination = combination(&operands, reduction);
                if BriefAllReduce::fits(hosts, len * operands.dtype.bytes()) {
                    let algorithm = BriefAllReduce::new(operands, len, combination);
                    return (AnyAlgorithm::Brief(algorithm), Channel::Reduce);
                }
                reduces(all_reduce::all_reduce(hosts, rank, operands, len, combination))
            }
            Collective::Parts(parted) => {
                let is_sum = matches!(parted.form, PartedForm::ReduceScatter { .. });
                let operation = parts::parts(hosts, rank, parted, groups);
                if is_sum { reduces(operation) } else { gathers(operation) }
            }
            Collective::Reduce { operands, len, reduction, root } => {
                let combination = combination(&operands, reduction);
                reduces(reduce::reduce(hosts, rank, operands, len, combination, root))
            }
        }
    }

    pub(crate) fn as_dyn(&mut self) -> &mut dyn Algorithm {
        match self {
            AnyAlgorithm::Operation(algorithm) => algorithm,
            AnyAlgorithm::Brief(algorithm) => algorithm,
            AnyAlgorithm::Window(algorithm) => algorithm,
            AnyAlgorithm::Scalars(algorithm) => algorithm,
        }
    }

    /// What every rank must have called.
    pub(crate) fn call(&self) -> Call {
        match self {
            AnyAlgorithm::Operation(algorithm) => algorithm.call(),
            AnyAlgorithm::Brief(algorithm) => algorithm.call(),
            AnyAlgorithm::Window(algorithm) => algorithm.call(),
            AnyAlgorithm::Scalars(algorithm) => algorithm.call(),
        }
    }
}
