//! Ranks that are processes of one host: each maps the memory of the others, and streams wait for
//! streams of other ranks at words of the job's shared memory.
//!
//! At each step a rank enqueues its mark, says so to the others, and enqueues its wait for theirs
//! once they have said so. So whatever a stream waits for has been enqueued by its rank, and comes
//! unless that rank dies, its GPU does, or its stream waits for another that did. A thread looks
//! for that (`gpus/watch.rs`).

use std::os::fd::AsFd;
use std::sync::Arc;

use pillion_kernels::{Cpu, Cuda, DType, PeerMemory, Raw, Words};

use super::marks::{Marks, WaitingForMarks};
use super::meeting::{Lends, Lent, Step};
use crate::Error;
use crate::call::Purpose;
use crate::gpus::operations::exchange;
use crate::gpus::watch::Watch;
use crate::gpus::{LANES, Place};
use crate::rendezvous::descriptors;

/// The first mark: every run's marks wrap soon, so that it shows when they may not.
const FIRST: u32 = u32::MAX - 7;
/// Memory of the ranks of a group, by rank; None is this one's.
pub(in crate::gpus) type Memories = Vec<Option<Arc<PeerMemory>>>;

/// What a rank has of a group whose other ranks are processes.
pub(super) struct Processes {
    /// Ends before the rest goes.
    watch: Watch,
    marks: Arc<Marks>,
    gpu: Cuda,
    memories: Memories,
}

/// Maps the memory of every other rank of `place`. All of them call it.
pub(super) fn map_all(place: &Place<'_>) -> Result<Memories, Error> {
    let &Place { control, gpu, rank, limit, .. } = place;
    let system = |what| move |error: pillion_kernels::Error| Error::System { what, reason: error.to_string() };
    let (own, bytes) = gpu.export().map_err(system("sharing memory of a GPU"))?;
    let exchange = |word| control.exchange(&[word], Purpose::Gather, limit);
    let sizes = exchange(bytes)?;
    let (look, limit) = (|| control.look(&|| "the start".to_owned()), control.options().startup_timeout);
    let files = descriptors::swap(own.as_fd(), rank, &exchange, &look, limit)?;
    let maps = files.into_iter().zip(sizes).enumerate().map(|(other, (file, bytes))| {
        let Some(file) = file else { return Ok(None) };
        let mapped = gpu.map(file.as_fd(), bytes).map_err(|error| {
            let is_access = error.to_string().contains("cuMemSetAccess");
            let remedy = match is_access {
                true => {
                    "these GPUs may not reach each other (`nvidia-smi topo -p2p r` shows which do); NCCL can \
                         do without"
                }
                false => "is there room, and is it the same driver?",
            };
            let reason = format!("rank {other}'s, for GPU {}: {error}: {remedy}", gpu.ordinal());
            Error::System { what: "mapping memory of a GPU of another process", reason }
        })?;
        Ok(Some(Arc::new(mapped)))
    });
    maps.collect()
}

impl Processes {
    /// Among the ranks of `place`, which all call this, with the memory of each.
    pub(super) fn new(place: &Place<'_>, memories: Memories) -> Result<Processes, Error> {
        let &Place { control, gpu, rank, limit, .. } = place;
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
        let marks = Arc::new(Marks::new(words, pages, rank, world, FIRST));
        let watch = Watch::start(control, gpu, rank, WaitingForMarks::new(&marks, control, gpu))?;
        Ok(Processes { watch, marks, gpu: gpu.clone(), memories })
    }

    /// The memory of some of the ranks.
    pub(super) fn memories_of(&self, ranks: &[usize]) -> Memories {
        ranks.iter().map(|&rank| self.memories[rank].clone()).collect()
    }

    /// As [`Meeting::meet`](super::meeting::Meeting::meet).
    pub(super) fn meet(&self, step: &Step<'_>, lends: Lends) -> Result<Vec<Lends>, Error> {
        let &Step { control, rank, stream, lane, call, limit } = step;
        let marks = &*self.marks;
        let (mark, words) = (marks.next(lane), marks.words());
        // SAFETY: the words stay registered until this is dropped, and `Gpus::close` waits before
        // that until the streams have run everything.
        unsafe { stream.write_mark(words, rank, lane, mark) };
        // Nobody is told of a mark that will not come.
        stream.healthy().map_err(|failure| control.fail_after(failure))?;
        let [first, second] = lends.map(|lent| self.to_words(lent));
        let all = exchange(control, call, [first[0], first[1], second[0], second[1]], limit)?;
        let of = |(other, shown): (usize, [u64; 4])| {
            if other == rank {
                return Ok(lends);
            }
            let [first, second] = [0, 2].map(|at| self.lent(other, [shown[at], shown[at + 1]]));
            Ok([first?, second?])
        };
        let lent = all.into_iter().enumerate().map(of).collect::<Result<Vec<Lends>, Error>>()?;
        marks.expect(lane, mark, call, limit);
        // SAFETY: as above; `Lanes` keeps the memories until the streams have ended.
        unsafe { stream.wait_for_marks(words, &self.memories, lane, mark) };
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
