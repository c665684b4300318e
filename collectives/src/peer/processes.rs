//! Ranks that are processes of one host: each maps the memory of the others, and streams wait for
//! streams of other ranks at words of the job's shared memory.
//!
//! At each step a rank enqueues its mark, says so to the others, and enqueues its wait for theirs
//! once they have said so. So whatever a stream waits for has been enqueued by its rank, and comes
//! unless that rank dies, its GPU does, or its stream waits for another that did. A thread looks for
//! that (`watch.rs`).

use std::os::fd::AsFd;
use std::sync::Arc;

use pillion_kernels::{Cpu, Cuda, DType, PeerMemory, Raw, Words};

use super::LANES;
use super::meeting::{Lends, Lent, Step};
use super::watch::{Marks, Watch};
use crate::Error;
use crate::call::{Purpose, describe};
use crate::memory::control::Call;
use crate::rendezvous::descriptors;
use crate::transport::{Limit, Transport};

/// The first mark: every run's marks wrap soon, so that it shows when they may not.
const FIRST: u32 = u32::MAX - 7;
/// Words by which a rank shows what it lends.
const SHOWN: usize = 6 + 2 * 2;

/// Memory of the ranks of a group, by rank; None is this one's.
pub(super) type Memories = Vec<Option<Arc<PeerMemory>>>;

/// What a rank has of a group whose other ranks are processes.
pub(super) struct Processes {
    /// Ends before the rest goes.
    watch: Watch,
    gpu: Cuda,
    memories: Memories,
}

/// Maps the memory of every other rank of `control`. All of them call it.
pub(super) fn map_all(control: &dyn Transport, gpu: &Cuda, rank: usize, limit: Limit) -> Result<Memories, Error> {
    let system = |what| move |error: pillion_kernels::Error| Error::System { what, reason: error.to_string() };
    let (own, bytes) = gpu.export().map_err(system("sharing memory of a GPU"))?;
    let exchange = |word| control.exchange(&[word], Purpose::Gather, limit);
    let sizes = exchange(bytes)?;
    let files = descriptors::swap(own.as_fd(), rank, &exchange, &|| control.look(), control.options().startup_timeout)?;
    let maps = files.into_iter().zip(sizes).enumerate().map(|(other, (file, bytes))| {
        let Some(file) = file else { return Ok(None) };
        let mapped = gpu.map(file.as_fd(), bytes).map_err(|error| {
            let reason = format!(
                "GPU {} does not reach the memory of rank {other}'s GPU ({error}): `nvidia-smi topo -p2p r` \
                 shows which GPUs do; give the ranks others (CUDA_VISIBLE_DEVICES)",
                gpu.ordinal()
            );
            Error::Misuse { reason }
        })?;
        Ok(Some(Arc::new(mapped)))
    });
    maps.collect()
}

impl Processes {
    /// Over the ranks of `control`, which all call this, with the memory of each.
    pub(super) fn new(
        control: &Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        memories: Memories,
        limit: Limit,
    ) -> Result<Processes, Error> {
        let world = memories.len();
        let (pages, _) = control.clone().window(&Cpu, DType::U8, world * Words::PAGE, None)?;
        let start = pages.view().raw().pointer;
        // SAFETY: whole pages that every rank maps, for as long as this buffer is kept, which is
        // longer than the words are. A window's elements are accessed through its views alone, and
        // this makes none.
        let words = unsafe { gpu.register(start, world) };
        let words =
            words.map_err(|error| Error::System { what: "registering words with a GPU", reason: error.to_string() })?;
        (0..LANES).for_each(|lane| words.set(rank, lane, FIRST));
        // Nobody waits at a word before it is set.
        control.put_back(control.exchange(&[], Purpose::Barrier, limit)?);
        let marks = Marks::new(words, pages, rank, world, FIRST);
        Ok(Processes { watch: Watch::start(marks, control, gpu)?, gpu: gpu.clone(), memories })
    }

    /// The memory of some of the ranks.
    pub(super) fn memories_of(&self, ranks: &[usize]) -> Memories {
        ranks.iter().map(|&rank| self.memories[rank].clone()).collect()
    }

    /// As [`Meeting::meet`](super::meeting::Meeting::meet).
    pub(super) fn meet(&self, step: &Step<'_>, lends: Lends) -> Result<Vec<Lends>, Error> {
        let &Step { control, rank, stream, lane, call, limit } = step;
        let marks = self.watch.marks();
        let (mark, words) = (marks.next(lane), marks.words());
        // SAFETY: the words stay registered until `close`, which waits for the streams.
        unsafe { stream.write_mark(words, rank, lane, mark) };
        let mut shown = [0; SHOWN];
        shown[..6].copy_from_slice(&call.words());
        let places = shown[6..].as_chunks_mut::<2>().0;
        places.iter_mut().zip(lends).for_each(|(place, lent)| *place = self.to_words(lent));
        let all = control.exchange(&shown, Purpose::Gather, limit).map_err(|error| named(error, call))?;
        let ranks = all.as_chunks::<SHOWN>().0;
        step.compare(ranks.iter().map(|shown| Call::from_words(*shown.first_chunk().expect("as many words"))))?;
        let of = |(other, shown): (usize, &[u64; SHOWN])| {
            if other == rank {
                return Ok(lends);
            }
            let [first, second] = [6, 8].map(|at| self.lent(other, [shown[at], shown[at + 1]]));
            Ok([first?, second?])
        };
        let lent = ranks.iter().enumerate().map(of).collect::<Result<Vec<Lends>, Error>>()?;
        marks.expect(lane, mark, call);
        // SAFETY: as above; `Streams` keeps the memories until the streams have ended.
        unsafe { stream.wait_for_marks(words, &self.memories, lane, mark) };
        control.put_back(all);
        Ok(lent)
    }

    /// How another process finds what this one lends: where it starts, and how long it is with its
    /// type; two zeros for nothing.
    fn to_words(&self, lent: Option<Lent>) -> [u64; 2] {
        let Some(lent) = lent else { return [0; 2] };
        let Raw { len, dtype, .. } = lent.all();
        // An empty range may lie anywhere.
        let offset = if len == 0 { 0 } else { self.gpu.offset(lent.all()) };
        [offset, (len as u64) << 8 | (1 + dtype as u64)]
    }

    /// What rank `other` lends.
    ///
    /// # Errors
    /// [`Error::System`] for what is not in its memory.
    fn lent(&self, other: usize, [offset, what]: [u64; 2]) -> Result<Option<Lent>, Error> {
        if what == 0 {
            return Ok(None);
        }
        let dtype = DType::ALL.into_iter().find(|&dtype| 1 + dtype as u64 == what & 0xff);
        let memory = self.memories[other].as_ref().expect("the memory of every other rank");
        let elements = dtype.and_then(|dtype| memory.elements(offset, (what >> 8) as usize, dtype));
        let elements = elements.ok_or_else(|| Error::System {
            what: "reading what another rank lends",
            reason: format!("rank {other} names memory that it does not have: is it the same program?"),
        })?;
        Ok(Some(elements.into()))
    }

    /// Ends the watch. The streams have run what they were given.
    pub(super) fn close(&self) {
        self.watch.end();
    }
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
