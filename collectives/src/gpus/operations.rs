//! Operations between GPUs: which there are, what the ranks compare of them, and on which stream
//! they run.

use pillion_kernels::cpu::reduce::Fold;
use pillion_kernels::{CudaStream, Event, Raw, Stream};
use smallvec::SmallVec;

use super::{GATHERS, Gpus, Mover, REDUCTIONS};
use crate::call::{Detail, Kind, Purpose, call, describe, in_sections, kind, name};
use crate::memory::control::Call;
use crate::record::Recorded;
use crate::request::{Collective, Operands, Request, Scattered};
use crate::transport::{Limit, Transport};
use crate::{Error, Reduction, Sections};

/// An operation that GPUs do not have.
pub(super) fn unsupported(what: &str) -> Error {
    let reason = format!(
        "GPUs have no {what}: they gather, reduce-scatter, all-reduce and broadcast; a communicator of \
         the host has the rest"
    );
    Error::Misuse { reason }
}

/// An operation that is being enqueued on a rank.
pub(super) struct Enqueuing<'a> {
    pub(super) gpus: &'a Gpus,
    pub(super) stream: &'a CudaStream,
    /// The stream's number among those of the rank.
    pub(super) lane: usize,
    /// The operation; its sequence number is its step's.
    pub(super) call: Call,
    /// How many steps there were.
    pub(super) steps: &'a mut u64,
    pub(super) limit: Limit,
}

impl Enqueuing<'_> {
    /// The operation, with the number of its next step.
    pub(super) fn next_step(&mut self) -> Call {
        *self.steps += 1;
        Call { sequence: *self.steps, ..self.call }
    }

    /// out = the inputs combined, element by element, in order.
    ///
    /// # Safety
    /// The inputs have as many elements as `out`, of the types of `job`, and stay as they are until
    /// the stream has run this; nobody else touches `out` meanwhile.
    pub(super) unsafe fn combine(&self, inputs: &[Raw], out: Raw, job: Fold<'_>) {
        let sources: Vec<*const u8> = inputs.iter().map(|input| input.pointer.as_ptr().cast_const()).collect();
        let outputs = [out.pointer.as_ptr()];
        // SAFETY: the caller's promise.
        unsafe { self.stream.fold(&Fold { inputs: &sources, outputs: &outputs, count: out.len, ..job }) };
    }
}

/// Enqueues what each operation takes. All return how many bytes other ranks take from this one.
pub(super) trait Moves {
    fn all_gather(
        &mut self,
        operands: &Operands,
        chunk: usize,
        sections: &Sections,
        in_place: bool,
    ) -> Result<u64, Error>;

    fn broadcast(&mut self, operands: &Operands, root: usize) -> Result<u64, Error>;

    fn reduce_scatter(&mut self, scattered: &Scattered) -> Result<u64, Error>;

    fn all_reduce(&mut self, operands: &Operands, len: usize, reduction: Reduction) -> Result<u64, Error>;

    /// Any of them.
    fn enqueue(&mut self, collective: &Collective) -> Result<u64, Error> {
        match collective {
            Collective::AllGather { operands, chunk, sections, in_place } => {
                self.all_gather(operands, *chunk, &cut(sections, *chunk), *in_place)
            }
            Collective::Broadcast { operands, root, .. } => self.broadcast(operands, *root),
            Collective::ReduceScatter(scattered) => self.reduce_scatter(scattered),
            Collective::AllReduce { operands, len, reduction } => self.all_reduce(operands, *len, *reduction),
            _ => unreachable!("`call_of` refuses the others"),
        }
    }
}

/// Enqueues an operation; an event behind it, and how many bytes other ranks take from this one.
pub(super) fn enqueue(
    gpus: &Gpus,
    steps: &mut u64,
    request: Request,
    after: &Event,
    limit: Limit,
) -> Result<(Event, u64), Error> {
    let Request::Collective(collective) = request else { return Err(unsupported("messages")) };
    // What is refused has no effect.
    let call = call_of(&collective, gpus.reduce_groups)?;
    let is_gather = matches!(collective, Collective::AllGather { .. } | Collective::Broadcast { .. });
    let lane = if is_gather { GATHERS } else { REDUCTIONS };
    let stream = gpus.lanes.streams[lane].lock();
    stream.wait_for(after);
    let start = gpus.record.is_wanted().then(|| stream.stamp());
    let enqueuing = Enqueuing { gpus, stream: &stream, lane, call, steps, limit };
    let bytes = match &gpus.mover {
        Mover::Peer(peer) => peer.enqueue(enqueuing, &collective)?,
        Mover::Nccl(nccl) => nccl.enqueue(enqueuing, &collective)?,
    };
    if let Some(start) = start {
        gpus.record.end(Recorded { operation: name(call), start, end: stream.stamp(), bytes });
    }
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
pub(super) fn fold(operands: &Operands, reduction: Reduction, world: usize) -> Fold<'static> {
    Fold { output: operands.to, ..reduction.whole(operands.dtype, world) }
}

/// How a shard of `chunk` elements is cut: without sections it is one.
pub(super) fn cut(sections: &Option<Sections>, chunk: usize) -> Sections {
    sections.clone().unwrap_or_else(|| Sections::new(&[chunk]).expect("a buffer has this length"))
}

/// Shows every rank this call and some words, and returns those of each rank.
///
/// # Errors
/// [`Error::Mismatch`] where a rank has called something else; what `control` says of the others.
pub(super) fn exchange<const WORDS: usize>(
    control: &dyn Transport,
    call: Call,
    words: [u64; WORDS],
    limit: Limit,
) -> Result<Vec<[u64; WORDS]>, Error> {
    let own: SmallVec<[u64; 16]> = call.words().into_iter().chain(words).collect();
    let purpose = Purpose::Step(kind(call).expect("an operation of GPUs has a kind"));
    let all = control.exchange(&own, purpose, limit).map_err(|error| named(error, call))?;
    let mut ranks = Vec::with_capacity(all.len() / own.len());
    for (peer, rank) in all.chunks_exact(own.len()).enumerate() {
        let (theirs, words) = rank.split_first_chunk().expect("a call and the words");
        let theirs = Call::from_words(*theirs);
        if !theirs.agrees_with(&call) {
            return Err(Error::Mismatch { ours: describe(call), theirs: describe(theirs), peer });
        }
        ranks.push(words.try_into().expect("as many words"));
    }
    control.put_back(all);
    Ok(ranks)
}

/// The error of an exchange, with the operation of which it is a step.
fn named(error: Error, call: Call) -> Error {
    match error {
        Error::Timeout { waiting_on, seconds, how, .. } => {
            Error::Timeout { op: describe(call), waiting_on, seconds, how }
        }
        Error::PeerLost { rank, how, .. } => Error::PeerLost { rank, op: describe(call), how },
        Error::Mismatch { theirs, peer, .. } => Error::Mismatch { ours: describe(call), theirs, peer },
        other => other,
    }
}
