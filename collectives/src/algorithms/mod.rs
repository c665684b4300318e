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

use crate::engine::flight::Collective;

pub(crate) use all_gather::all_gather;
pub(crate) use all_reduce::all_reduce;
pub(crate) use all_to_all::all_to_all;
pub(crate) use brief::BriefAllReduce;
pub(crate) use broadcast::broadcast;
pub(crate) use folds::{Combination, Comparing};
pub(crate) use gather::gather;
pub(crate) use gather_window::GatherWindow;
pub(crate) use operation::{Operands, Operation, Sidebands};
pub(crate) use reduce::reduce;
pub(crate) use reduce_scatter::reduce_scatter;
pub(crate) use scalars::Scalars;
pub(crate) use scatter::scatter;

/// Any algorithm, for a flight to carry: one size, so that a new flight needs no memory.
pub(crate) enum AnyCollective {
    Operation(Operation),
    Brief(BriefAllReduce),
    Window(GatherWindow),
    Scalars(Scalars),
}

impl AnyCollective {
    pub(crate) fn as_dyn(&mut self) -> &mut dyn Collective {
        match self {
            AnyCollective::Operation(collective) => collective,
            AnyCollective::Brief(collective) => collective,
            AnyCollective::Window(collective) => collective,
            AnyCollective::Scalars(collective) => collective,
        }
    }
}

impl From<Operation> for AnyCollective {
    fn from(collective: Operation) -> AnyCollective {
        AnyCollective::Operation(collective)
    }
}

impl From<BriefAllReduce> for AnyCollective {
    fn from(collective: BriefAllReduce) -> AnyCollective {
        AnyCollective::Brief(collective)
    }
}

impl From<GatherWindow> for AnyCollective {
    fn from(collective: GatherWindow) -> AnyCollective {
        AnyCollective::Window(collective)
    }
}

impl From<Scalars> for AnyCollective {
    fn from(collective: Scalars) -> AnyCollective {
        AnyCollective::Scalars(collective)
    }
}
