//! What each operation between peers enqueues, and when it meets the other ranks.

use std::ops::Range;

use pillion_kernels::cpu::reduce::Fold;
use pillion_kernels::{DType, Raw, Span};

use super::Peer;
use super::meeting::{Lends, Lent, Step};
use crate::gpus::operations::{Enqueuing, Moves, cut, fold};
use crate::request::{Collective, Operands, Scattered, Sidebands};
use crate::{Error, Reduction, Sections};

impl Peer {
    /// Enqueues an operation; how many bytes other ranks take from this one.
    pub(in crate::gpus) fn enqueue(&self, enqueuing: Enqueuing<'_>, collective: &Collective) -> Result<u64, Error> {
        Operation { peer: self, enqueuing }.enqueue(collective)
    }
}

fn lent(span: Option<&Span>) -> Option<Lent> {
    span.map(|span| span.raw().into())
}

/// The same elements of the first or second thing that each rank lends.
fn of_all(lends: &[Lends], number: usize, range: Range<usize>) -> Vec<Raw> {
    let of = |lends: &Lends| lends[number].expect("every rank lends the same").range(range.clone());
    lends.iter().map(of).collect()
}

/// An operation of a rank among peers.
struct Operation<'a> {
    peer: &'a Peer,
    enqueuing: Enqueuing<'a>,
}

impl Operation<'_> {
    /// The next step: see [`Meeting::meet`](super::meeting::Meeting::meet).
    fn meet(&mut self, lends: Lends) -> Result<Vec<Lends>, Error> {
        let call = self.enqueuing.next_step();
        let &mut Enqueuing { gpus, stream, lane, limit, .. } = &mut self.enqueuing;
        self.peer.meeting.meet(&Step { control: &*gpus.control, rank: gpus.rank, stream, lane, call, limit }, lends)
    }

    /// out = the inputs combined, element by element.
    fn combine(&self, inputs: &[Raw], out: Raw, job: Fold<'_>) {
        // SAFETY: every rank keeps its input until this stream's next moment, and writes nothing to
        // the part that this rank reads; the output is this operation's.
        unsafe { self.enqueuing.combine(inputs, out, job) };
    }
}

impl Moves for Operation<'_> {
    fn all_gather(
        &mut self,
        operands: &Operands,
        chunk: usize,
        sections: &Sections,
        in_place: bool,
    ) -> Result<u64, Error> {
        let all = self.meet([lent(operands.input.as_ref()), None])?;
        let world = all.len();
        let output = operands.output.as_ref().expect("a gather has an output");
        for (rank, lends) in all.iter().enumerate() {
            let input = lends[0].expect("every rank lends its shard");
            for section in 0..sections.count() {
                let full = sections.in_full(section, world, rank);
                // In place, a rank's shard lies where it goes.
                let from = if in_place { full.clone() } else { sections.in_shard(section) };
                let (to, from) = (output.range(full).raw(), input.range(from));
                if to.pointer != from.pointer {
                    // SAFETY: the other rank keeps its buffer until this stream's moment below; the
                    // output is this operation's. GPUs reach each other, or ranks do not connect.
                    unsafe { self.enqueuing.stream.pull(to, from) };
                }
            }
        }
        self.meet([None; 2])?;
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    fn broadcast(&mut self, operands: &Operands, root: usize) -> Result<u64, Error> {
        let all = self.meet([lent(operands.input.as_ref()), None])?;
        if let Some(output) = &operands.output {
            let input = all[root][0].expect("the root lends its buffer");
            // SAFETY: as in `all_gather`.
            unsafe { self.enqueuing.stream.pull(output.raw(), input.range(0..output.len())) };
        }
        self.meet([None; 2])?;
        let bytes = operands.input.as_ref().map_or(0, |input| (all.len() - 1) * input.len() * operands.dtype.bytes());
        Ok(bytes as u64)
    }

    fn reduce_scatter(&mut self, scattered: &Scattered) -> Result<u64, Error> {
        let Scattered { operands, chunk, reduction, accumulate, sidebands, .. } = scattered;
        let own = sidebands.as_ref().map(|sidebands| &sidebands.own);
        let all = self.meet([lent(operands.input.as_ref()), lent(own)])?;
        let (world, rank) = (all.len(), self.enqueuing.gpus.rank);
        let output = operands.output.as_ref().expect("a reduction has an output");
        let job = Fold {
            groups: self.enqueuing.gpus.reduce_groups,
            accumulate: *accumulate,
            ..fold(operands, *reduction, world)
        };
        let sections = cut(&scattered.sections, *chunk);
        for section in 0..sections.count() {
            let inputs = of_all(&all, 0, sections.in_full(section, world, rank));
            self.combine(&inputs, output.range(sections.in_shard(section)).raw(), job.clone());
        }
        let numbers = sidebands.as_ref().filter(|sidebands| !sidebands.totals.is_empty());
        if let Some(Sidebands { totals, accumulate, .. }) = numbers {
            let inputs = of_all(&all, 1, 0..totals.len());
            let job = Fold { accumulate: *accumulate, ..Reduction::Sum.first(DType::F64) };
            self.combine(&inputs, totals.raw(), job);
        }
        self.meet([None; 2])?;
        Ok(((world - 1) * chunk * operands.dtype.bytes()) as u64)
    }

    /// Each rank combines one part of all inputs, and pulls the other parts.
    fn all_reduce(&mut self, operands: &Operands, len: usize, reduction: Reduction) -> Result<u64, Error> {
        let output = operands.output.as_ref().expect("a reduction has an output");
        let all = self.meet([lent(operands.input.as_ref()), lent(Some(output))])?;
        let (world, rank) = (all.len(), self.enqueuing.gpus.rank);
        let each = len.div_ceil(world);
        let part = |rank: usize| (rank * each).min(len)..((rank + 1) * each).min(len);
        let job = Fold { groups: self.enqueuing.gpus.reduce_groups, ..fold(operands, reduction, world) };
        let inputs = of_all(&all, 0, part(rank));
        // In place, too: of every rank's buffer, this part is read by this rank alone.
        self.combine(&inputs, output.range(part(rank)).raw(), job);
        self.meet([None; 2])?;
        for (other, lends) in all.iter().enumerate().filter(|(other, _)| *other != rank) {
            let from = lends[1].expect("every rank lends its output").range(part(other));
            // SAFETY: as in `all_gather`; the other rank has combined this part and keeps it.
            unsafe { self.enqueuing.stream.pull(output.range(part(other)).raw(), from) };
        }
        self.meet([None; 2])?;
        Ok(((world - 1) * each * (operands.dtype.bytes() + operands.to.bytes())) as u64)
    }
}
