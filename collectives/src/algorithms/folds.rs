//! Operations that combine chunks: each rank reads one chunk of all inputs once, and stores the result wherever it is wanted.

use pillion_kernels::DType;
use pillion_kernels::cpu::reduce::{self, Reduction};

use super::operation::{Mode, Operands};
use super::sides::{End, Piece, Sides};
use crate::Error;
use crate::call::Detail;
use crate::shm::flight::Peers;

/// Who wants a combined chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The rank that combines it, as the only chunk of its output.
    Own,
    /// Every rank, as the chunk that it was.
    All,
    /// One rank of this host, as the chunk that it was.
    Root(usize),
}

/// How elements are combined: equal on all ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Combination {
    pub(crate) reduction: Reduction,
    /// Type of the results.
    pub(crate) output: DType,
    /// Groups of consecutive ranks whose partial results are combined (see [`reduce::Fold`]).
    pub(crate) groups: usize,
}

impl Combination {
    /// Its mark in the header.
    pub(super) fn detail(self, root: Option<usize>) -> Detail {
        Detail::Reduction { reduction: self.reduction, output: self.output, groups: self.groups, root }
    }

    /// A fold that stores where `Target::Own` says, without accumulating.
    pub(super) fn fold(self, operands: &Operands) -> Fold {
        Fold { dtype: operands.dtype, combination: self, target: Target::Own, accumulate: false }
    }
}

/// What this rank combines.
pub(super) struct Fold {
    pub(super) dtype: DType,
    pub(super) combination: Combination,
    pub(super) target: Target,
    pub(super) accumulate: bool,
}

impl Fold {
    /// Chunks of this rank's output that its peers store.
    pub(super) fn pushed_by_others(&self, peers: &Peers<'_>) -> Vec<usize> {
        let wanted = match self.target {
            Target::Own => false,
            Target::All => true,
            Target::Root(root) => root == peers.rank(),
        };
        (0..peers.world()).filter(|&chunk| wanted && chunk != peers.rank()).collect()
    }

    pub(super) fn run(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        mode: Mode,
        streams: bool,
    ) -> Result<(), Error> {
        let rank = peers.rank();
        if mode == Mode::Header {
            // Everybody has everybody's input: each computes what it wants itself, and nothing needs to come back.
            return match self.target {
                Target::Own => self.combine(sides, peers, piece, rank, &[(rank, 0)], false),
                Target::Root(root) if root != rank => Ok(()),
                Target::All | Target::Root(_) => (0..sides.input.chunks)
                    .try_for_each(|chunk| self.combine(sides, peers, piece, chunk, &[(rank, chunk)], false)),
            };
        }
        let targets: Vec<(usize, usize)> = match self.target {
            Target::Own => vec![(rank, 0)],
            Target::All => (0..peers.world()).map(|target| (target, rank)).collect(),
            Target::Root(root) => vec![(root, rank)],
        };
        // What passes through a stage is read again at once.
        let streams = streams && (mode == Mode::Arena || self.target == Target::Own);
        self.combine(sides, peers, piece, rank, &targets, streams)
    }

    /// Combines a chunk of all inputs and stores it as chunks of outputs: `targets` are (rank, chunk).
    fn combine(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        chunk: usize,
        targets: &[(usize, usize)],
        streams: bool,
    ) -> Result<(), Error> {
        let range = sides.range(chunk, piece);
        if range.is_empty() {
            return Ok(());
        }
        let inputs: Result<Vec<_>, _> = (0..peers.world())
            .map(|from| sides.of_rank(peers, from, End::Input, chunk, range.clone(), piece).map(<*mut u8>::cast_const))
            .collect();
        let outputs: Result<Vec<_>, _> = targets
            .iter()
            .map(|&(rank, to)| sides.of_rank(peers, rank, End::Output, to, range.clone(), piece))
            .collect();
        let fold = reduce::Fold {
            dtype: self.dtype,
            reduction: self.combination.reduction,
            groups: self.combination.groups,
            inputs: &inputs?,
            outputs: &outputs?,
            output: self.combination.output,
            accumulate: self.accumulate,
            count: range.len(),
            stream: streams,
        };
        // SAFETY: `Sides` checked that all ranges lie in this operation's buffers or in a peer's arena, aligned to the types that all
        // ranks agree on. In this exchange chunk c of every input is read by rank c alone, and chunk c of every output is written by rank
        // c alone; so where input and output are one buffer, what a rank writes is what it alone has just read, element by element.
        unsafe { reduce::fold(&fold) };
        Ok(())
    }
}
