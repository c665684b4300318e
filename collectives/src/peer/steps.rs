//! What each operation enqueues, and when it meets the other ranks.

use std::ops::Range;

use pillion_kernels::cpu::reduce::Fold;
use pillion_kernels::{CudaStream, DType, Event, Raw, Span, Stream};

use super::meeting::{Lends, Lent, Step};
use super::{GATHERS, Peer, REDUCTIONS};
use crate::call::{Detail, Kind, call, in_sections};
use crate::memory::control::Call;
use crate::request::{Collective, Operands, Request, Scattered, Sidebands};
use crate::transport::Limit;
use crate::{Error, Reduction, Sections};

/// An operation that GPUs do not have.
pub(super) fn unsupported(what: &str) -> Error {
    let reason = format!(
        "GPUs have no {what}: they gather, reduce-scatter, all-reduce and broadcast; a communicator of \
         the host has the rest"
    );
    Error::Misuse { reason }
}

/// An operation being enqueued.
struct Enqueuing<'a> {
    peer: &'a Peer,
    stream: &'a CudaStream,
    /// The stream's number among those of the rank.
    lane: usize,
    call: Call,
    next: &'a mut u64,
    limit: Limit,
}

/// Enqueues an operation; an event behind it, and how many bytes other ranks take from this one.
pub(super) fn enqueue(
    peer: &Peer,
    next: &mut u64,
    request: Request,
    after: &Event,
    limit: Limit,
) -> Result<(Event, u64), Error> {
    let Request::Collective(collective) = request else { return Err(unsupported("messages")) };
    // What is refused has no effect.
    let call = call_of(&collective, peer.reduce_groups)?;
    let is_gather = matches!(collective, Collective::AllGather { .. } | Collective::Broadcast { .. });
    let lane = if is_gather { GATHERS } else { REDUCTIONS };
    let stream = peer.streams.lanes[lane].lock();
    stream.wait_for(after);
    let mut operation = Enqueuing { peer, stream: &stream, lane, call, next, limit };
    let bytes = match collective {
        Collective::AllGather { operands, chunk, sections, in_place } => {
            operation.all_gather(&operands, chunk, &cut(&sections, chunk), in_place)?
        }
        Collective::Broadcast { operands, root, .. } => operation.broadcast(&operands, root)?,
        Collective::ReduceScatter(scattered) => operation.reduce_scatter(&scattered)?,
        Collective::AllReduce { operands, len, reduction } => operation.all_reduce(&operands, len, reduction)?,
        _ => unreachable!("call_of refuses the others"),
    };
    Ok((stream.record(), bytes))
}

/// What the ranks compare.
fn call_of(collective: &Collective, groups: usize) -> Result<Call, Error> {
    let of_reduction = |operands: &Operands, reduction: Reduction, sideband: usize| {
        let fold = Fold { groups, ..fold(operands, reduction, 1) };
        if !CudaStream::folds(&fold) {
            let (from, to) = (operands.dtype, operands.to);
            return Err(unsupported(&format!("{} of {from} into {to}", reduction.name())));
        }
        Ok(Detail::Reduction { reduction, output: operands.to, groups, root: None, sideband })
    };
    Ok(match collective {
        Collective::AllGather { operands, chunk, sections, in_place } => {
            let detail = if *in_place { Detail::InPlace } else { Detail::None };
            in_sections(call(Kind::AllGather, Some(operands.dtype), true, *chunk, detail), sections.as_ref())
        }
        Collective::Broadcast { operands, len, root } => {
            call(Kind::Broadcast, Some(operands.dtype), true, *len, Detail::Root(*root))
        }
        Collective::ReduceScatter(scattered) => {
            if scattered.observing.is_some() {
                return Err(unsupported("observed reductions"));
            }
            let sideband = scattered.sidebands.as_ref().map_or(0, |sidebands| sidebands.totals.len());
            let detail = of_reduction(&scattered.operands, scattered.reduction, sideband)?;
            let call = call(Kind::ReduceScatter, Some(scattered.operands.dtype), true, scattered.chunk, detail);
            in_sections(call, scattered.sections.as_ref())
        }
        Collective::AllReduce { operands, len, reduction } => {
            let detail = of_reduction(operands, *reduction, 0)?;
            call(Kind::AllReduce, Some(operands.dtype), true, *len, detail)
        }
        Collective::GatherWindow { .. } => return Err(unsupported("windows")),
        Collective::Gather { .. } => return Err(unsupported("gather to a root")),
        Collective::Scatter { .. } => return Err(unsupported("scatter")),
        Collective::AllToAll { .. } => return Err(unsupported("all-to-all")),
        Collective::Parts(_) => return Err(unsupported("operations with parts of different lengths")),
        Collective::Reduce { .. } => return Err(unsupported("reduce to a root")),
    })
}

/// A reduction of `world` inputs, whose places are still open.
fn fold(operands: &Operands, reduction: Reduction, world: usize) -> Fold<'static> {
    Fold { output: operands.to, ..reduction.whole(operands.dtype, world) }
}

fn lent(span: Option<&Span>) -> Option<Lent> {
    span.map(|span| span.raw().into())
}

/// The same elements of the first or second thing that each rank lends.
fn of_all(lends: &[Lends], number: usize, range: Range<usize>) -> Vec<Raw> {
    let of = |lends: &Lends| lends[number].expect("every rank lends the same").range(range.clone());
    lends.iter().map(of).collect()
}

/// How a shard of `chunk` elements is cut: without sections it is one.
fn cut(sections: &Option<Sections>, chunk: usize) -> Sections {
    sections.clone().unwrap_or_else(|| Sections::new(&[chunk]).expect("a buffer has this length"))
}

impl Enqueuing<'_> {
    /// The next step: see [`Meeting::meet`](super::meeting::Meeting::meet).
    fn meet(&mut self, lends: Lends) -> Result<Vec<Lends>, Error> {
        let Peer { meeting, control, rank, .. } = self.peer;
        *self.next += 1;
        let call = Call { sequence: *self.next, ..self.call };
        let (stream, lane, limit) = (self.stream, self.lane, self.limit);
        meeting.meet(&Step { control: &**control, rank: *rank, stream, lane, call, limit }, lends)
    }

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
                    unsafe { self.stream.pull(to, from) };
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
            unsafe { self.stream.pull(output.raw(), input.range(0..output.len())) };
        }
        self.meet([None; 2])?;
        let bytes = operands.input.as_ref().map_or(0, |input| (all.len() - 1) * input.len() * operands.dtype.bytes());
        Ok(bytes as u64)
    }

    /// out = the inputs combined, element by element.
    fn combine(&self, inputs: &[Raw], out: Raw, job: Fold<'_>) {
        let sources: Vec<*const u8> = inputs.iter().map(|input| input.pointer.as_ptr().cast_const()).collect();
        let outputs = [out.pointer.as_ptr()];
        // SAFETY: every rank keeps its input until this stream's next moment, and writes nothing to
        // the part that this rank reads; the output is this operation's.
        unsafe { self.stream.fold(&Fold { inputs: &sources, outputs: &outputs, count: out.len, ..job }) };
    }

    fn reduce_scatter(&mut self, scattered: &Scattered) -> Result<u64, Error> {
        let Scattered { operands, chunk, reduction, accumulate, sidebands, .. } = scattered;
        let own = sidebands.as_ref().map(|sidebands| &sidebands.own);
        let all = self.meet([lent(operands.input.as_ref()), lent(own)])?;
        let (world, rank) = (all.len(), self.peer.rank);
        let output = operands.output.as_ref().expect("a reduction has an output");
        let job =
            Fold { groups: self.peer.reduce_groups, accumulate: *accumulate, ..fold(operands, *reduction, world) };
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
        let (world, rank) = (all.len(), self.peer.rank);
        let each = len.div_ceil(world);
        let part = |rank: usize| (rank * each).min(len)..((rank + 1) * each).min(len);
        let job = Fold { groups: self.peer.reduce_groups, ..fold(operands, reduction, world) };
        let inputs = of_all(&all, 0, part(rank));
        // In place, too: of every rank's buffer, this part is read by this rank alone.
        self.combine(&inputs, output.range(part(rank)).raw(), job);
        self.meet([None; 2])?;
        for (other, lends) in all.iter().enumerate().filter(|(other, _)| *other != rank) {
            let from = lends[1].expect("every rank lends its output").range(part(other));
            // SAFETY: as in `all_gather`; the other rank has combined this part and keeps it.
            unsafe { self.stream.pull(output.range(part(other)).raw(), from) };
        }
        self.meet([None; 2])?;
        Ok(((world - 1) * each * (operands.dtype.bytes() + operands.to.bytes())) as u64)
    }
}
