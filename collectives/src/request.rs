//! What a transport is asked to do.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use pillion_kernels::cpu::observe::Observer;
use pillion_kernels::{Buffer, DType, Span};

use crate::{Reduction, Sections};

/// The buffers of an operation, as this rank has them.
pub(crate) struct Operands {
    pub(crate) input: Option<Span>,
    pub(crate) output: Option<Span>,
    pub(crate) dtype: DType,
    /// Type of the output's elements.
    pub(crate) to: DType,
}

impl Operands {
    /// Of buffers that have been checked, of which there is at least one.
    pub(crate) fn of(input: Option<&Buffer>, output: Option<&Buffer>) -> Operands {
        let dtype = input.or(output).expect("an operation has a buffer").dtype();
        let to = output.map_or(dtype, Buffer::dtype);
        Operands { input: input.map(Buffer::span), output: output.map(Buffer::span), dtype, to }
    }
}

/// Numbers that ride along, f64, as many on every rank.
pub(crate) struct Sidebands {
    pub(crate) own: Span,
    /// Their sums over the ranks.
    pub(crate) totals: Span,
    /// Whether the sums are added to what is there.
    pub(crate) accumulate: bool,
}

/// Who looks at the terms of a sum beside the sum.
pub(crate) struct Observing {
    /// As many f64 for each section.
    pub(crate) totals: Span,
    pub(crate) sections: usize,
    pub(crate) observer: Arc<dyn Observer>,
}

/// Which way a message goes, seen from this rank.
pub(crate) enum Direction {
    Send {
        to: usize,
    },
    /// From a rank, or from any; `sender` is told which it was.
    Receive {
        from: Option<usize>,
        sender: Option<Arc<AtomicUsize>>,
    },
}

/// What is known of a message before it is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The rank that sent it.
    pub from: usize,
    /// What tells it from other messages of that rank.
    pub tag: u32,
    /// Type of its elements.
    pub dtype: DType,
    /// Number of its elements.
    pub len: usize,
}

/// A call whose arguments have been checked.
// A box would be an allocation for each operation.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Request {
    Collective(Collective),
    Message(Message),
}

/// What one rank sends to another, or receives from it.
pub(crate) struct Message {
    pub(crate) direction: Direction,
    pub(crate) buffer: Span,
    pub(crate) tag: u32,
}

/// What all ranks do together. The operands stay the caller's, who leaves them alone
/// until the operation has ended. A `chunk` is the elements of one rank, `len` those of a whole
/// buffer; what each operation does is said where callers ask for it.
// A box would be an allocation for each operation.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Collective {
    /// `in_place`: input and output are one buffer, and a rank's input is its chunk of that.
    AllGather {
        operands: Operands,
        chunk: usize,
        sections: Option<Sections>,
        in_place: bool,
    },
    /// `number`: the window's, among those of its communicator.
    GatherWindow {
        window: Span,
        number: u64,
        sections: Option<Sections>,
    },
    Broadcast {
        operands: Operands,
        len: usize,
        root: usize,
    },
    Gather {
        operands: Operands,
        chunk: usize,
        root: usize,
    },
    Scatter {
        operands: Operands,
        chunk: usize,
        root: usize,
    },
    AllToAll {
        operands: Operands,
        chunk: usize,
    },
    ReduceScatter(Scattered),
    Parts(Parted),
    AllReduce {
        operands: Operands,
        len: usize,
        reduction: Reduction,
    },
    Reduce {
        operands: Operands,
        len: usize,
        reduction: Reduction,
        root: usize,
    },
}

/// A reduce-scatter.
pub(crate) struct Scattered {
    pub(crate) operands: Operands,
    pub(crate) chunk: usize,
    pub(crate) sections: Option<Sections>,
    pub(crate) reduction: Reduction,
    /// Whether the result is combined with the output.
    pub(crate) accumulate: bool,
    pub(crate) sidebands: Option<Sidebands>,
    pub(crate) observing: Option<Observing>,
}

/// An operation whose parts, one for each rank, have lengths of their own.
pub(crate) struct Parted {
    pub(crate) form: PartedForm,
    /// The parts, or the one that this rank has.
    pub(crate) input: Box<[Span]>,
    pub(crate) output: Box<[Span]>,
    pub(crate) dtype: DType,
    /// Type of the output's elements.
    pub(crate) to: DType,
}

/// Which one, and so who has which parts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PartedForm {
    /// Every rank has one part of what all get.
    AllGather,
    /// Every rank has one part of what the root gets.
    Gather { root: usize },
    /// The root has a part for every rank.
    Scatter { root: usize },
    /// Every rank has a part for every rank.
    AllToAll,
    /// Every rank has a part for every rank, as long as those of the others for that rank.
    ReduceScatter { reduction: Reduction },
}

impl Request {
    /// Whether work on the buffers may run later than the call that enqueues it.
    pub(crate) fn is_deferred(&self) -> bool {
        match self {
            Request::Collective(collective) => collective.is_deferred(),
            Request::Message(Message { buffer, .. }) => buffer.deferred(),
        }
    }
}

impl Collective {
    fn is_deferred(&self) -> bool {
        let operands = match self {
            Collective::GatherWindow { window, .. } => return window.deferred(),
            Collective::Parts(Parted { input, output, .. }) => {
                return input.iter().chain(output).next().is_some_and(Span::deferred);
            }
            Collective::AllGather { operands, .. }
            | Collective::Broadcast { operands, .. }
            | Collective::Gather { operands, .. }
            | Collective::Scatter { operands, .. }
            | Collective::AllToAll { operands, .. }
            | Collective::ReduceScatter(Scattered { operands, .. })
            | Collective::AllReduce { operands, .. }
            | Collective::Reduce { operands, .. } => operands,
        };
        operands.input.as_ref().or(operands.output.as_ref()).is_some_and(Span::deferred)
    }
}
