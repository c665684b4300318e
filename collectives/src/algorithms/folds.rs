//! Operations that combine chunks: each rank reads one chunk of all inputs once, and stores the result wherever it is wanted.

use std::ops::Range;

use pillion_kernels::DType;
use pillion_kernels::cpu::observe::Terms;
use pillion_kernels::cpu::reduce;
use smallvec::{SmallVec, smallvec};

use super::operation::Mode;
use super::sides::{End, Piece, Sides, Source};
use crate::call::Detail;
use crate::engine::flight::Peers;
use crate::request::{Observing, Operands};
use crate::{Error, Reduction};

/// One for each rank of a host: no allocation as long as there are few, which is much of a short reduction's time.
pub(super) type Addresses<A> = SmallVec<[A; 8]>;

/// Who wants a combined chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The rank that combines it, as the only chunk of its output.
    Own,
    /// Every rank, as the chunk that it was.
    All,
    /// One rank, as the chunk that it was; on one host.
    Root(usize),
    /// The same on several hosts: those of other hosts keep the chunk as their only one, and it
    /// then goes to their partners on the root's host.
    Collected(usize),
}

/// How elements are combined: equal on all ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Combination {
    pub(crate) reduction: Reduction,
    /// Type of the results.
    pub(crate) output: DType,
    /// Number of ranks.
    pub(crate) world: usize,
    /// Groups of consecutive ranks whose partial results are combined (see [`reduce::Fold`]).
    pub(crate) groups: usize,
}

impl Combination {
    pub(crate) fn new(operands: &Operands, reduction: Reduction, world: usize, groups: usize) -> Combination {
        Combination { reduction, output: operands.to, world, groups }
    }

    /// Its mark in the header.
    pub(super) fn detail(self, root: Option<usize>, sideband: usize) -> Detail {
        Detail::Reduction { reduction: self.reduction, output: self.output, groups: self.groups, root, sideband }
    }

    /// A fold that stores where `Target::Own` says, without accumulating.
    pub(super) fn fold(self, operands: &Operands) -> Fold {
        Fold { dtype: operands.dtype, combination: self, target: Target::Own, accumulate: false, observing: None }
    }
}

/// What this rank combines.
pub(super) struct Fold {
    pub(super) dtype: DType,
    pub(super) combination: Combination,
    pub(super) target: Target,
    pub(super) accumulate: bool,
    pub(super) observing: Option<Observing>,
}

/// Elements that are combined and observed at a time: they stay in the caches in between.
const OBSERVED: usize = 4096;
/// Bytes of all blocks of inputs that are copied from private memory before they are combined, and
/// of the longest: they stay in a core's second-level cache.
const BLOCKS: usize = 512 << 10;
const LONGEST: usize = 128 << 10;

impl Observing {
    pub(super) fn clear(&self) {
        // SAFETY: the buffer travels with the operation and is nobody else's until that is over; whoever drives the operation, one thread at a time, comes here alone. It is f64, by the
        // check of `reduce_scatter_observed`.
        unsafe { self.totals.as_mut_slice::<f64>() }.fill(0.0);
    }

    /// Runs a reduction of elements of one section that stores one sum in f32, and adds what the
    /// observer finds to the section's totals.
    ///
    /// # Safety
    /// As for [`reduce::fold`]; the output is none of the inputs.
    unsafe fn run(&self, fold: &reduce::Fold<'_>, section: usize) {
        // SAFETY: as in `clear`.
        let totals = unsafe { self.totals.as_mut_slice::<f64>() };
        let numbers = totals.len() / self.sections;
        let totals = &mut totals[section * numbers..][..numbers];
        for start in (0..fold.count).step_by(OBSERVED) {
            let count = OBSERVED.min(fold.count - start);
            let terms: Addresses<*const u8> =
                fold.inputs.iter().map(|input| input.wrapping_add(start * fold.dtype.bytes())).collect();
            let sum = fold.outputs[0].wrapping_add(start * fold.output.bytes());
            let part = reduce::Fold { inputs: &terms, outputs: &[sum], count, stream: false, ..fold.clone() };
            // SAFETY: a part of what the caller promises, of each operand the same elements. They
            // stay as they are until all ranks have finished, and the sum, which is f32, was just
            // stored by this thread; nobody else writes it.
            unsafe {
                reduce::fold(&part);
                let sum = std::slice::from_raw_parts(sum.cast_const().cast::<f32>(), count);
                self.observer.observe(&Terms::new(fold.dtype, &terms, count), sum, totals);
            }
        }
    }
}

impl Fold {
    /// The type in which elements accumulate.
    pub(super) fn wide(&self) -> DType {
        self.combination.reduction.wide(self.dtype)
    }

    /// Chunks of this rank's output that its peers store.
    pub(super) fn pushed_by_others(&self, peers: &Peers<'_>) -> Vec<usize> {
        let (hosts, own) = (&peers.group.hosts, peers.group.name(peers.rank()));
        let others = || hosts.local().iter().copied().filter(|&rank| rank != own);
        match self.target {
            Target::All => others().collect(),
            Target::Root(root) | Target::Collected(root) if root == own => {
                others().flat_map(|rank| hosts.partnered(rank).chain([rank])).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Combines what this rank must, on one host.
    pub(super) fn run(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        mode: Mode,
        streams: bool,
    ) -> Result<(), Error> {
        let rank = peers.rank();
        if mode != Mode::Header {
            // What passes through a stage is read again at once.
            let streams = streams && (mode != Mode::Staged || self.target == Target::Own);
            return sides.parts(sides.range(End::Input, rank, piece)).try_for_each(|part| {
                let outputs = match mode {
                    Mode::Pulled => smallvec![sides.own(End::Output, rank, part.start, part.len())],
                    _ => self.outputs(sides, peers, piece, part.clone())?,
                };
                self.combine(sides, peers, piece, rank, part, &outputs, streams)
            });
        }
        // Everybody has everybody's input: each computes what it wants itself, and nothing needs to come back. There, chunks follow each
        // other, so that all of them are one long chunk.
        let (chunk, range) = match self.target {
            Target::Own => (rank, sides.range(End::Input, rank, piece)),
            Target::Root(root) if root != rank => return Ok(()),
            Target::All | Target::Root(_) | Target::Collected(_) => (0, 0..sides.len),
        };
        let output = sides.own(End::Output, 0, range.start, range.len());
        self.combine(sides, peers, piece, chunk, range, &[output], false)
    }

    /// Combines elements of a chunk of all inputs of this host, on one host, and stores them.
    fn combine(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        chunk: usize,
        range: Range<usize>,
        outputs: &[*mut u8],
        streams: bool,
    ) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let sources = self.sources(sides, peers, piece, chunk, range.clone())?;
        let inputs: Addresses<*const u8> = sources.iter().map_while(|source| source.here()).collect();
        let fold = reduce::Fold {
            groups: self.combination.groups,
            inputs: &inputs,
            outputs,
            output: self.combination.output,
            accumulate: self.accumulate,
            count: range.len(),
            stream: streams,
            ..self.combination.reduction.whole(self.dtype, self.combination.world)
        };
        let section = sides.section(range.start);
        if inputs.len() < sources.len() {
            return self.combine_far(&fold, &sources, peers, section);
        }
        // SAFETY: `Sides` checked that all ranges lie in this operation's buffers or in a peer's
        // arena, aligned to the types that all ranks agree on. In this exchange chunk c of every
        // input is read by rank c alone, and chunk c of every output is written by rank c alone; so
        // where input and output are one buffer, what a rank writes is what it alone has just read,
        // element by element. (Operands in headers are copies, which nobody writes; this rank's own
        // are read and written by itself alone.) With an observer the output is a buffer of its
        // own, and neither an input nor in place: `reduce_scatter_observed` takes both by value.
        unsafe { self.run_fold(&fold, section) };
        Ok(())
    }

    /// As [`Fold::combine`], block by block: inputs in private memory are copied to where this rank
    /// sees them, which stays in its caches.
    fn combine_far(
        &self,
        fold: &reduce::Fold<'_>,
        sources: &[Source],
        peers: &Peers<'_>,
        section: usize,
    ) -> Result<(), Error> {
        let width = self.dtype.bytes();
        let far = sources.iter().filter(|source| source.here().is_none()).count();
        let block = (BLOCKS / far / width).clamp(OBSERVED, LONGEST / width) / OBSERVED * OBSERVED;
        let mut work = std::mem::take(&mut *peers.group.work[peers.channel as usize].lock());
        let words = (far * block * width).div_ceil(8);
        if work.len() < words {
            work.resize(words, 0);
        }
        for start in (0..fold.count).step_by(block) {
            let count = block.min(fold.count - start);
            let mut copies = work.chunks_exact_mut((block * width).div_ceil(8));
            let mut inputs = Addresses::with_capacity(sources.len());
            for source in sources {
                let source = source.after(start * width);
                inputs.push(match source.here() {
                    Some(here) => here,
                    None => {
                        let copy = copies.next().expect("one for each that is far").as_mut_ptr().cast::<u8>();
                        // SAFETY: the copy is this rank's, and holds a block. Nobody writes to this
                        // chunk of an input before this rank's next step, but this rank, where
                        // input and output are one buffer, which it then does not read from afar.
                        unsafe { source.copy(peers, copy, count * width, false)? };
                        copy.cast_const()
                    }
                });
            }
            let outputs: Addresses<*mut u8> =
                fold.outputs.iter().map(|output| output.wrapping_add(start * fold.output.bytes())).collect();
            let part = reduce::Fold { inputs: &inputs, outputs: &outputs, count, ..fold.clone() };
            // SAFETY: a part of what `combine` says, of each operand the same elements, from which
            // it has copied some inputs.
            unsafe { self.run_fold(&part, section) };
        }
        *peers.group.work[peers.channel as usize].lock() = work;
        Ok(())
    }

    /// Runs a reduction of elements of one section.
    ///
    /// # Safety
    /// As for [`reduce::fold`]; with an observer the output is none of the inputs.
    unsafe fn run_fold(&self, fold: &reduce::Fold<'_>, section: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.observing {
                None => reduce::fold(fold),
                Some(observing) => observing.run(fold, section),
            }
        }
    }

    /// Where a chunk of every input of this host is found.
    fn sources(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        chunk: usize,
        range: Range<usize>,
    ) -> Result<Addresses<Source>, Error> {
        (0..peers.world()).map(|rank| sides.source(peers, rank, End::Input, chunk, range.clone(), piece)).collect()
    }

    /// Where a chunk of every input of this host lies, none of them in private memory of others.
    pub(super) fn inputs(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        chunk: usize,
        range: Range<usize>,
    ) -> Result<Addresses<*const u8>, Error> {
        let here = |source: &Source| source.here().expect("between hosts nobody shows private memory");
        Ok(self.sources(sides, peers, piece, chunk, range)?.iter().map(here).collect())
    }

    /// Where elements of the chunk that this rank combines to the end are wanted on this host.
    pub(super) fn outputs(
        &self,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        range: Range<usize>,
    ) -> Result<Addresses<*mut u8>, Error> {
        let (rank, hosts) = (peers.rank(), &peers.group.hosts);
        let output = |of: usize, chunk| sides.of_rank(peers, of, End::Output, chunk, range.clone(), piece);
        if range.is_empty() {
            return Ok(Addresses::new());
        }
        match self.target {
            Target::Own => Ok(smallvec![output(rank, 0)?]),
            Target::All => (0..peers.world()).map(|of| output(of, hosts.local()[rank])).collect(),
            Target::Root(root) => Ok(smallvec![output(root, rank)?]),
            Target::Collected(root) if hosts.host(root) == hosts.own => {
                Ok(smallvec![output(hosts.place(root), hosts.local()[rank])?])
            }
            Target::Collected(_) => Ok(smallvec![output(rank, hosts.local()[rank])?]),
        }
    }
}
