//! Operations in progress: who drives them, how long they wait, and what they leave behind.
//!
//! An operation is a sequence of synchronised steps ([`flight`]): a rank publishes what it called,
//! waits until every rank has published the same, then reads its peers' memory in place, and keeps
//! its own memory still until all have read it. A progress thread drives the operations in flight
//! ([`progress`]), unless their callers wait for them and do ([`caller`]); whoever waits watches
//! the other ranks ([`watch`]). [`transport`] is what all of this is for a communicator.
//!
//! An [`Engine`] is what all groups of one rank have in common; a [`group::Group`] is what the
//! threads of one rank share of one group, made in a [`room`].

mod allocate;
mod caller;
pub(crate) mod flight;
pub(crate) mod group;
pub(crate) mod inbox;
pub(crate) mod mail;
mod private;
pub(crate) mod progress;
mod room;
mod start;
mod transport;
pub(crate) mod watch;

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Wake;
use std::thread::{JoinHandle, ThreadId};

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, Device, Range, Ranges, Region, Space};

use self::group::Group;
use self::inbox::Inbox;
use crate::Error;
use crate::memory::control::{RankControl, state, subject};
use crate::memory::fork::Maker;
use crate::memory::mapping::{HUGE_PAGE, Mapping, PAGE, Words};
use crate::wire::Wire;

/// One rank of a job, on its host.
pub(crate) struct Engine {
    pub(crate) map: Arc<Mapping>,
    /// The process that has joined the job.
    pub(crate) maker: Maker,
    /// This rank, among those that share the mapping.
    pub(crate) rank: usize,
    ranges: Mutex<Ranges>,
    /// What is given back once others have gone.
    retired: Mutex<Vec<Retired>>,
    /// Groups that the progress thread has yet to see.
    pub(crate) arrivals: Inbox<Arrival>,
    /// Communicators of this rank that have not been dropped.
    pub(crate) open: AtomicUsize,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The thread that drives operations, once it runs.
    pub(crate) driver: OnceLock<ThreadId>,
    /// Whether some operation failed. Others may use this rank's memory at any time from then on,
    /// so nothing of it is handed out again.
    failed: AtomicBool,
    /// Whether there are more ranks than processors, so that who waits must let others run.
    pub(crate) crowded: AtomicBool,
    /// Whether the ranks of this host read each other's private memory.
    pub(crate) reads_private: AtomicBool,
    /// Held while a rank makes room for a group.
    pub(crate) making_room: Mutex<()>,
}

/// A group that has been made, and its wire to other hosts.
pub(crate) struct Arrival {
    pub(crate) group: Arc<Group>,
    pub(crate) wire: Option<Box<dyn Wire>>,
}

/// Memory of a rank that others may still use.
struct Retired {
    ranges: Vec<Range>,
    /// Whether nobody does any more.
    is_free: Box<dyn Fn(&Mapping) -> bool + Send>,
    /// Called with the mapping once nobody does.
    then: Box<dyn FnOnce(&Mapping) + Send>,
}

impl Wake for Engine {
    /// Wakes the progress thread.
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring_progress();
    }
}

impl Engine {
    pub(crate) fn new(map: Arc<Mapping>, rank: usize) -> Engine {
        Engine {
            map,
            maker: Maker::this(),
            rank,
            ranges: Mutex::new(Ranges::new(PAGE, HUGE_PAGE)),
            retired: Mutex::default(),
            arrivals: Inbox::default(),
            open: AtomicUsize::new(0),
            thread: Mutex::default(),
            driver: OnceLock::new(),
            failed: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
            reads_private: AtomicBool::new(false),
            making_room: Mutex::default(),
        }
    }

    pub(crate) fn control(&self) -> &RankControl {
        self.map.rank(self.rank)
    }

    /// Tells this rank's progress thread that there is something to do.
    pub(crate) fn ring_progress(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        self.control().progress.tell(subject::WORK);
    }

    /// The thread that drives this rank's operations; whoever drops the last communicator waits for
    /// its end.
    pub(crate) fn set_thread(&self, thread: JoinHandle<()>) {
        *self.thread.lock() = Some(thread);
    }

    /// Another communicator, which the progress thread drives from now on.
    pub(crate) fn open(&self, group: Arc<Group>, wire: Option<Box<dyn Wire>>) {
        self.open.fetch_add(1, Ordering::Relaxed);
        match self.arrivals.put(Arrival { group, wire }) {
            Ok(()) => self.ring_progress(),
            Err(Arrival { group, wire }) => group.end(wire, Vec::new()),
        }
    }

    /// A communicator has been dropped, and nothing of it is in flight.
    pub(crate) fn close(&self) {
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.ring_progress();
            if self.is_driver() {
                return;
            }
            if let Some(thread) = self.thread.lock().take() {
                // A panic of the progress thread has been printed, and other ranks see it as a
                // death.
                let _ = thread.join();
            }
        }
    }

    /// Whether this thread is the one that drives operations, which must not wait for itself.
    pub(crate) fn is_driver(&self) -> bool {
        self.driver.get() == Some(&std::thread::current().id())
    }

    pub(crate) fn set_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Zeroed memory of this rank's arena. The caller has compared the size with
    /// [`available_memory`](crate::memory::available::available_memory).
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Range, Error> {
        self.clear_out();
        let range = self.ranges.lock().take(bytes);
        let reserved = self.map.reserve(self.rank, range.offset, range.bytes);
        reserved.map(|()| range).inspect_err(|_| self.give_back(range))
    }

    /// A range of this rank's arena of which each rank of the host will reserve a part.
    pub(crate) fn take(&self, bytes: u64) -> Range {
        self.clear_out();
        self.ranges.lock().take(bytes)
    }

    /// Takes back memory that no other rank uses any more.
    pub(crate) fn give_back(&self, range: Range) {
        let unused = !self.failed.load(Ordering::Relaxed) && !self.maker.is_another();
        if unused && self.map.discard(self.rank, range.offset, range.bytes) {
            self.ranges.lock().give_back(range);
        }
    }

    /// Takes memory back as soon as `is_free`, and then calls `then`.
    pub(crate) fn retire(
        &self,
        ranges: Vec<Range>,
        is_free: impl Fn(&Mapping) -> bool + Send + 'static,
        then: impl FnOnce(&Mapping) + Send + 'static,
    ) {
        self.retired.lock().push(Retired { ranges, is_free: Box::new(is_free), then: Box::new(then) });
        self.clear_out();
    }

    fn clear_out(&self) {
        let mut retired = self.retired.lock();
        for Retired { ranges, then, .. } in retired.extract_if(.., |retired| (retired.is_free)(&self.map)) {
            ranges.into_iter().for_each(|range| self.give_back(range));
            then(&self.map);
        }
    }

    /// A buffer over a part of an arena, which `owner` keeps.
    pub(crate) fn buffer(
        &self,
        device: &dyn Device,
        dtype: DType,
        (rank, offset, bytes): (usize, u64, u64),
        owner: impl Any + Send + Sync,
    ) -> Result<Buffer, Error> {
        let start = self.map.address(rank, offset, bytes);
        // SAFETY: the range is mapped, and handed out to nobody else, while `owner` lives; it
        // starts at a page. Other ranks map it too; they access it only inside operations that own
        // the buffer, or through a window's protocol.
        let region = unsafe { Region::from_raw(start, bytes as usize, Space::Host, Box::new(owner)) };
        let taken = device.take_in(region).and_then(|region| Buffer::whole(region, dtype));
        taken.map_err(|error| {
            let reason = format!("{}: {error}", device.name());
            Error::System { what: "taking shared memory into a device's use", reason }
        })
    }

    /// Takes the words of a group back once every member has gone, if this rank made room for them.
    pub(crate) fn retire_words(&self, words: Words, members: usize) {
        // Those of all ranks lie in no arena.
        let place = self.map.arena_of(words.start()).filter(|&(rank, _)| rank == self.rank);
        let Some((_, offset)) = place else { return };
        let range = Range { offset, bytes: Words::bytes(members).next_multiple_of(PAGE) };
        let all_gone = move |map: &Mapping| {
            (0..members).all(|member| map.group(words, member).gone.load(Ordering::Acquire) == GONE)
        };
        self.retire(vec![range], all_gone, |_| {});
    }

    /// A moment of spinning: with more ranks than processors, whom this one waits for may need this
    /// one.
    pub(crate) fn relax(&self) {
        if self.crowded.load(Ordering::Relaxed) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }

    /// Whether another rank of the mapping has died, or has ended in order: its state.
    pub(crate) fn look_at(&self, rank: usize) -> u32 {
        let control = self.map.rank(rank);
        let joined = control.state.load(Ordering::Acquire) == state::JOINED;
        // SAFETY: a joined rank has begun its life (acquire above, release in `run`).
        if joined && unsafe { control.life.has_ended() } {
            let _ = control.state.compare_exchange(state::JOINED, state::DEAD, Ordering::AcqRel, Ordering::Acquire);
        }
        control.state.load(Ordering::Acquire)
    }

    /// Once all have joined: whether they must share processors.
    pub(crate) fn look_at_processors(&self) {
        let ranks = self.map.shape().world;
        let union = |word: usize| {
            let masks = (0..ranks).map(|rank| &self.map.rank(rank).processors[word]);
            masks.fold(0, |union, mask| union | mask.load(Ordering::Relaxed))
        };
        let processors: u32 = (0..self.control().processors.len()).map(|word| union(word).count_ones()).sum();
        self.crowded.store(processors > 0 && ranks > processors as usize, Ordering::Relaxed);
    }

    /// Once all have joined: says whether this rank reads the private memory of the others, if it
    /// is `wanted`.
    pub(crate) fn try_private_memory(&self, wanted: bool) {
        let mut others = (0..self.map.shape().world).filter(|&rank| rank != self.rank);
        let reads = wanted && others.all(|rank| self.map.rank(rank).process.can_be_read());
        self.control().process.judge(reads);
    }

    /// Once all have said so: whether all do.
    pub(crate) fn agree_on_private_memory(&self) {
        let all = (0..self.map.shape().world).all(|rank| self.map.rank(rank).process.verdict() == Some(true));
        self.reads_private.store(all, Ordering::Relaxed);
    }

    /// Says where this rank may run.
    pub(crate) fn publish_processors(&self) {
        let Ok(set) = rustix::thread::sched_getaffinity(None) else { return };
        for (index, word) in self.control().processors.iter().enumerate() {
            let bits = (0..64).filter(|bit| index * 64 + bit < rustix::thread::CpuSet::MAX_CPU);
            let mask = bits.filter(|bit| set.is_set(index * 64 + bit)).fold(0, |mask, bit| mask | 1 << bit);
            word.store(mask, Ordering::Relaxed);
        }
    }
}

/// What a member writes as its last word of a group.
pub(crate) const GONE: u32 = 1;

/// Memory of this rank's arena, for as long as this lives.
pub(crate) struct Owned {
    engine: Arc<Engine>,
    range: Range,
}

impl Owned {
    pub(crate) fn new(engine: Arc<Engine>, range: Range) -> Owned {
        Owned { engine, range }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.engine.give_back(self.range);
    }
}
