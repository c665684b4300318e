//! Reductions between hosts: an all-to-all of chunks and one combination, segment by segment.
//!
//! Rank l of a host combines, for every host, the chunk that rank l there will own, over the inputs of its own host: a partial result, kept
//! as wide as it was accumulated. It sends each to its owner, receives the other hosts' partial results of its own chunk, and
//! combines those in the order of hosts, rounding once. Alone on its host a rank sends its input as it is.
//!
//! Bytes: (H−1)/H·S/L sent and as many received by each rank, the lower bound, (in f32 for bf16 with several ranks on a host); as a ring would,
//! but in one hop, so that nothing is rounded on the way. A few segments are under way at a time: one is combined while others travel.

use std::ops::Range;

use pillion_kernels::DType;
use pillion_kernels::cpu::reduce;

use super::between_hosts::Held;
use super::folds::{Addresses, Combination, Fold, Target};
use super::sides::{End, Piece, Sides};
use super::transit::Transit;
use crate::Error;
use crate::engine::flight::Peers;

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
}

impl WireFold {
    pub(super) fn new(fold: &Fold, peers: &Peers<'_>) -> WireFold {
        let partial = if peers.world() == 1 { fold.dtype } else { fold.wide() };
        let bytes = (WORK / (2 * DEPTH * peers.group.hosts.ranks.len())).clamp(SHORTEST, LONGEST);
        WireFold { started: 0, finished: 0, segment: bytes / partial.bytes() / 64 * 64, partial }
    }

    /// Bytes of memory that it works in.
    pub(super) fn work_bytes(&self, hosts: usize) -> usize {
        2 * DEPTH * hosts * self.segment * self.partial.bytes()
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

    /// Where a segment's partial result for a host is made, and where that of the host arrives.
    fn work(&self, transit: &mut Transit<Held>, segment: usize, host: usize, hosts: usize) -> [*mut u8; 2] {
        let bytes = self.segment * self.partial.bytes();
        let first = ((segment % DEPTH) * hosts + host) * 2 * bytes;
        assert!(first + 2 * bytes <= 8 * transit.memory.work.len());
        let start: *mut u8 = transit.memory.work.as_mut_ptr().cast();
        // SAFETY: inside the work memory, by the assertion.
        [0, bytes].map(|offset| unsafe { start.add(first + offset) })
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
        let hosts = peers.group.hosts.clone();
        for (host, ranks) in hosts.ranks.iter().enumerate() {
            let [made, arriving] = self.work(transit, segment, host, hosts.ranks.len());
            let peer = ranks[peers.rank()];
            if let Some(chunk) = fold.chunk_for(&hosts, host, peers.rank()) {
                let range = self.range(sides, chunk, piece, segment);
                for part in sides.parts(range.clone()) {
                    let source = if peers.world() == 1 {
                        sides.own(End::Input, chunk, part.start, part.len())
                    } else {
                        let out = self.within(made, &range, &part);
                        self.combine_inputs(fold, sides, peers, piece, chunk, part.clone(), out)?;
                        out
                    };
                    if host != hosts.own {
                        // SAFETY: the work memory is `Held`'s and this segment's alone until
                        // `finish`; the input is this operation's.
                        unsafe { transit.send(peer, source, part.len() * self.partial.bytes(), group) };
                    }
                }
            }
            if host != hosts.own
                && let Some(chunk) = fold.chunk_for(&hosts, hosts.own, peers.rank())
            {
                let range = self.range(sides, chunk, piece, segment);
                for part in sides.parts(range.clone()) {
                    let into = self.within(arriving, &range, &part);
                    // SAFETY: as above.
                    unsafe { transit.receive(peer, into, part.len() * self.partial.bytes(), group) };
                }
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
        let hosts = peers.group.hosts.clone();
        let Some(chunk) = fold.chunk_for(&hosts, hosts.own, peers.rank()) else { return Ok(()) };
        let range = self.range(sides, chunk, piece, self.finished);
        for part in sides.parts(range.clone()) {
            self.finish_part(fold, sides, peers, piece, transit, chunk, &range, part, streams)?;
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
        chunk: usize,
        segment: &Range<usize>,
        range: Range<usize>,
        streams: bool,
    ) -> Result<(), Error> {
        let hosts = &peers.group.hosts;
        let mut inputs = Addresses::with_capacity(hosts.ranks.len());
        for host in 0..hosts.ranks.len() {
            let [made, arriving] = self.work(transit, self.finished, host, hosts.ranks.len());
            inputs.push(match host == hosts.own {
                false => self.within(arriving, segment, &range).cast_const(),
                true if peers.world() == 1 => sides.own(End::Input, chunk, range.start, range.len()).cast_const(),
                true => self.within(made, segment, &range).cast_const(),
            });
        }
        let alone = peers.world() == 1;
        let Combination { reduction, world, .. } = fold.combination;
        let job = reduce::Fold {
            output: fold.combination.output,
            groups: if alone { fold.combination.groups } else { 1 },
            inputs: &inputs,
            outputs: &fold.outputs(sides, peers, piece, range.clone())?,
            accumulate: fold.accumulate,
            count: range.len(),
            stream: streams && fold.target == Target::Own,
            ..if alone { reduction.whole(fold.dtype, world) } else { reduction.last(fold.dtype, world) }
        };
        // SAFETY: the partial results have arrived, and the work memory is this segment's until the next `start`; the outputs are as in
        // `Fold::combine`.
        unsafe { reduce::fold(&job) };
        Ok(())
    }
}
