//! Reductions between hosts: an all-to-all of chunks and one combination, segment by segment.
//!
//! A rank combines, for every rank of another host whose partner it is, the chunk that this one
//! will own, over the inputs of its own host: a partial result, kept as wide as it was accumulated.
//! It sends each to its owner, receives the other hosts' partial results of its own chunk from its
//! partners, and combines those in the order of hosts, rounding once. Where every rank is alone on
//! its host, inputs travel as they are.
//!
//! Bytes: (H−1)/H·S/L sent and as many received by each rank, the lower bound, (in f32 for bf16
//! with several ranks on a host); as a ring would, but in one hop, so that nothing is rounded on
//! the way. A few segments are under way at a time: one is combined while others travel.

use std::ops::Range;

use pillion_kernels::DType;
use pillion_kernels::cpu::reduce;

use super::between_hosts::Held;
use super::folds::{Addresses, Combination, Fold, Target};
use super::sides::{End, Piece, Sides};
use super::transit::Transit;
use crate::Error;
use crate::engine::flight::Peers;
use crate::hosts::Hosts;

/// Segments under way at a time.
const DEPTH: usize = 3;
/// Bytes of all segments under way, at most; and of one.
const WORK: usize = 16 << 20;
const LONGEST: usize = 1 << 20;
const SHORTEST: usize = 16 << 10;

/// A reduction of one piece on its way.
pub(super) struct WireFold {
    started: usize,
    finished: usize,
    /// Elements of a segment.
    segment: usize,
    /// Type of partial results.
    partial: DType,
    /// Whether every rank is alone on its host.
    single: bool,
    /// This rank, whose chunk has its number.
    own: usize,
    /// The ranks of other hosts whose chunks this one combines over the inputs of its host.
    partnered: Vec<usize>,
    /// By host: whose partial results of this rank's chunk come, this rank itself for its own.
    partners: Vec<usize>,
}

impl WireFold {
    pub(super) fn new(fold: &Fold, peers: &Peers<'_>) -> WireFold {
        let (hosts, own) = (&peers.group.hosts, peers.group.name(peers.rank()));
        let single = hosts.are_single();
        let partial = if single { fold.dtype } else { fold.wide() };
        let bytes = (WORK / (DEPTH * slots(hosts))).clamp(SHORTEST, LONGEST);
        WireFold {
            started: 0,
            finished: 0,
            segment: bytes / partial.bytes() / 64 * 64,
            partial,
            single,
            own,
            partnered: hosts.partnered(own).collect(),
            partners: (0..hosts.ranks.len()).map(|host| hosts.partner(own, host)).collect(),
        }
    }

    /// Bytes of memory that it works in.
    pub(super) fn work_bytes(&self) -> usize {
        DEPTH * self.slots() * self.segment * self.partial.bytes()
    }

    /// Segments that it works in at a time: those made for others, this rank's own, and those that
    /// arrive.
    fn slots(&self) -> usize {
        self.partnered.len() + 1 + self.partners.len()
    }

    /// Goes as far as messages allow; a rank that is waited for, or none once complete.
    pub(super) fn poll(
        &mut self,
        fold: &Fold,
        sides: &Sides,
        peers: &mut Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
        streams: bool,
    ) -> Result<Option<usize>, Error> {
        let segments = piece.elements.len().div_ceil(self.segment);
        loop {
            while self.started < segments && self.started - self.finished < DEPTH {
                self.start(fold, sides, peers, piece, transit)?;
                self.started += 1;
            }
            if self.finished == segments {
                return Ok(None);
            }
            if let Some(rank) = transit.poll(peers, self.finished % DEPTH)? {
                return Ok(Some(rank));
            }
            self.finish(fold, sides, peers, piece, transit, streams)?;
            self.finished += 1;
        }
    }

    /// The elements of a chunk that belong to a segment.
    fn range(&self, sides: &Sides, chunk: usize, piece: &Piece, segment: usize) -> Range<usize> {
        let first = piece.elements.start + segment * self.segment;
        let elements = first..(first + self.segment).min(piece.elements.end);
        sides.range(End::Input, chunk, &Piece { index: piece.index, elements })
    }

    /// Where one of the slots of a segment starts.
    fn slot(&self, transit: &mut Transit<Held>, segment: usize, slot: usize) -> *mut u8 {
        let bytes = self.segment * self.partial.bytes();
        let first = ((segment % DEPTH) * self.slots() + slot) * bytes;
        assert!(slot < self.slots() && first + bytes <= 8 * transit.memory.work.len());
        let start: *mut u8 = transit.memory.work.as_mut_ptr().cast();
        // SAFETY: inside the work memory, by the assertion.
        unsafe { start.add(first) }
    }

    /// Where the partial result for one of `partnered` is made, or, behind them, this rank's own.
    fn made(&self, transit: &mut Transit<Held>, segment: usize, index: usize) -> *mut u8 {
        self.slot(transit, segment, index)
    }

    /// Where that of a host arrives.
    fn arriving(&self, transit: &mut Transit<Held>, segment: usize, host: usize) -> *mut u8 {
        self.slot(transit, segment, self.partnered.len() + 1 + host)
    }

    fn start(
        &self,
        fold: &Fold,
        sides: &Sides,
        peers: &mut Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
    ) -> Result<(), Error> {
        let (segment, group) = (self.started, self.started % DEPTH);
        for (index, &rank) in self.partnered.iter().chain([&self.own]).enumerate() {
            let made = self.made(transit, segment, index);
            let range = self.range(sides, rank, piece, segment);
            for part in sides.parts(range.clone()) {
                let source = if self.single {
                    sides.own(End::Input, rank, part.start, part.len())
                } else {
                    let out = self.within(made, &range, &part);
                    self.combine_inputs(fold, sides, peers, piece, rank, part.clone(), out)?;
                    out
                };
                if rank != self.own {
                    // SAFETY: the work memory is `Held`'s and this segment's alone until `finish`;
                    // the input is this operation's.
                    unsafe { transit.send(rank, source, part.len() * self.partial.bytes(), group) };
                }
            }
        }
        let range = self.range(sides, self.own, piece, segment);
        for (host, &partner) in self.partners.iter().enumerate().filter(|&(_, &partner)| partner != self.own) {
            let arriving = self.arriving(transit, segment, host);
            for part in sides.parts(range.clone()) {
                let into = self.within(arriving, &range, &part);
                // SAFETY: as above.
                unsafe { transit.receive(partner, into, part.len() * self.partial.bytes(), group) };
            }
        }
        Ok(())
    }

    /// Where a part of a segment's elements lies in work memory that has all of them. (The
    /// elements of a segment fit, and a part is within it.)
    fn within(&self, work: *mut u8, segment: &Range<usize>, part: &Range<usize>) -> *mut u8 {
        work.wrapping_add((part.start - segment.start) * self.partial.bytes())
    }

    /// out = combination of elements of a chunk of this host's inputs, in one section, wide.
    fn combine_inputs(
        &self,
        fold: &Fold,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        chunk: usize,
        range: Range<usize>,
        out: *mut u8,
    ) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let job = reduce::Fold {
            inputs: &fold.inputs(sides, peers, piece, chunk, range.clone())?,
            outputs: &[out],
            count: range.len(),
            ..fold.combination.reduction.first(fold.dtype)
        };
        // SAFETY: `inputs` checked its ranges, which nobody writes in this exchange; `out` is a part of the work memory, where no message
        // is under way for this segment.
        unsafe { reduce::fold(&job) };
        Ok(())
    }

    /// Combines the hosts' partial results of this rank's chunk.
    fn finish(
        &self,
        fold: &Fold,
        sides: &Sides,
        peers: &mut Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
        streams: bool,
    ) -> Result<(), Error> {
        let range = self.range(sides, self.own, piece, self.finished);
        for part in sides.parts(range.clone()) {
            self.finish_part(fold, sides, peers, piece, transit, &range, part, streams)?;
        }
        Ok(())
    }

    /// As [`WireFold::finish`], for elements of the segment in one section.
    fn finish_part(
        &self,
        fold: &Fold,
        sides: &Sides,
        peers: &Peers<'_>,
        piece: &Piece,
        transit: &mut Transit<Held>,
        segment: &Range<usize>,
        range: Range<usize>,
        streams: bool,
    ) -> Result<(), Error> {
        let mut inputs = Addresses::with_capacity(self.partners.len());
        for (host, &partner) in self.partners.iter().enumerate() {
            let input = match partner == self.own {
                true if self.single => sides.own(End::Input, self.own, range.start, range.len()),
                true => self.within(self.made(transit, self.finished, self.partnered.len()), segment, &range),
                false => self.within(self.arriving(transit, self.finished, host), segment, &range),
            };
            inputs.push(input.cast_const());
        }
        let Combination { reduction, world, .. } = fold.combination;
        let job = reduce::Fold {
            output: fold.combination.output,
            groups: if self.single { fold.combination.groups } else { 1 },
            inputs: &inputs,
            outputs: &fold.outputs(sides, peers, piece, range.clone())?,
            accumulate: fold.accumulate,
            count: range.len(),
            stream: streams && fold.target == Target::Own,
            ..if self.single { reduction.whole(fold.dtype, world) } else { reduction.last(fold.dtype, world) }
        };
        // SAFETY: the partial results have arrived, and the work memory is this segment's until the
        // next `start`; the outputs are as in `Fold::combine`.
        unsafe { reduce::fold(&job) };
        Ok(())
    }
}

/// The most slots that a rank of these hosts has, so that all cut segments of the same length.
fn slots(hosts: &Hosts) -> usize {
    let of_host = |host: usize| {
        let others = (0..hosts.ranks.len()).filter(|&other| other != host);
        let partnered: usize = others.map(|other| hosts.ranks[other].len().div_ceil(hosts.ranks[host].len())).sum();
        partnered + 1 + hosts.ranks.len()
    };
    (0..hosts.ranks.len()).map(of_host).max().expect("there is a host")
}
