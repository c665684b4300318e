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
mod moves;
mod operation;
mod reduce;
mod reduce_scatter;
mod scalars;
mod scatter;
mod sides;
mod transit;
mod wire_fold;

use crate::shm::flight::Collective;

pub(crate) use all_gather::all_gather;
pub(crate) use all_reduce::all_reduce;
pub(crate) use all_to_all::all_to_all;
pub(crate) use brief::BriefAllReduce;
pub(crate) use broadcast::broadcast;
pub(crate) use folds::Combination;
pub(crate) use gather::gather;
pub(crate) use gather_window::GatherWindow;
pub(crate) use operation::{Operands, Operation, SIDEBAND, Sidebands};
pub(crate) use reduce::reduce;
pub(crate) use reduce_scatter::reduce_scatter;
pub(crate) use scalars::Scalars;
pub(crate) use scatter::scatter;

/// Any algorithm, for a flight to carry: one size, so that a new flight needs no memory.
pub(crate) enum Any {
    Operation(Operation),
    Brief(BriefAllReduce),
    Window(GatherWindow),
    Scalars(Scalars),
}

impl Any {
    pub(crate) fn as_dyn(&mut self) -> &mut dyn Collective {
        match self {
            Any::Operation(collective) => collective,
            Any::Brief(collective) => collective,
            Any::Window(collective) => collective,
            Any::Scalars(collective) => collective,
        }
    }
}

impl From<Operation> for Any {
    fn from(collective: Operation) -> Any {
        Any::Operation(collective)
    }
}

impl From<BriefAllReduce> for Any {
    fn from(collective: BriefAllReduce) -> Any {
        Any::Brief(collective)
    }
}

impl From<GatherWindow> for Any {
    fn from(collective: GatherWindow) -> Any {
        Any::Window(collective)
    }
}

impl From<Scalars> for Any {
    fn from(collective: Scalars) -> Any {
        Any::Scalars(collective)
    }
}
