//! The ranks that talk: how they meet, the memory that they share, and how they part.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, Device};

use crate::call::Purpose;
use crate::checks::expect;
use crate::engine::Owned;
use crate::engine::group::Group;
use crate::join::{self, Job, Joined};
use crate::limits::explain_thread;
use crate::memory::available::available_memory;
use crate::memory::control::state;
use crate::memory::ranges::Range;
use crate::window::{self, chunk};
use crate::{Backend, Error, Launch, Options, Sections, Span, Window, WireKind};

/// What a communicator has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations completed.
    pub operations: u64,
    /// Bytes that other ranks took from this one.
    pub bytes: u64,
}

/// Ranks that talk.
///
/// Every rank makes the same calls in the same order; a rank that does not is named by an error. After an error every call
/// returns that first error. Dropping a communicator waits for the operations in flight.
pub struct Communicator {
    pub(crate) group: Arc<Group>,
    pub(crate) job: Job,
    splits: AtomicU64,
    /// Windows made so far.
    windows: AtomicU64,
    /// How many groups of the same members this rank has made.
    pub(crate) groups: Mutex<HashMap<Vec<usize>, u64>>,
}

/// What is allocated.
#[derive(Clone, Copy)]
enum Memory {
    Arena,
    Window,
}

impl Communicator {
    /// Joins the ranks of `launch`'s job.
    ///
    /// # Errors
    /// [`Error::Options`] for what cannot be, [`Error::Rendezvous`] or [`Error::Timeout`] when the
    /// ranks do not all come in time, [`Error::System`] when the host refuses memory or a thread.
    /// The other ranks are told of the first and the last, and return [`Error::Aborted`].
    pub fn connect(launch: &Launch, options: Options) -> Result<Communicator, Error> {
        let job = Job::of(launch);
        options.check(launch).map_err(|error| join::decline(&job, error))?;
        Communicator::start(job, options)
    }

    /// Tells the other ranks of `launch`'s job that this one cannot join, so that they need not
    /// wait for it. Call it instead of [`Communicator::connect`]. It takes some seconds where
    /// nobody listens. Returns whether rank 0 gives up for the same `reason`, so that this rank
    /// need not print it.
    pub fn decline(launch: &Launch, reason: &str) -> bool {
        let job = Job::of(launch);
        join::decline_for(&job, reason)
    }

    /// Prints why this process ends before it joins a job, unless it is a rank of a job whose rank
    /// 0 ends for the same reason and prints it. Rank 0 prints first, because the other ranks may
    /// never come to be told.
    pub fn decline_once(reason: &str, print: impl Fn()) {
        match Launch::detect() {
            Ok(launch) if launch.world > 1 => {
                if launch.rank == 0 {
                    print();
                }
                let is_said = Communicator::decline(&launch, reason);
                if launch.rank > 0 && !is_said {
                    print();
                }
            }
            _ => print(),
        }
    }

    /// Starts the progress thread, which finds the other ranks.
    fn start(job: Job, options: Options) -> Result<Communicator, Error> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (for_thread, startup) = (job.clone(), options.startup_timeout);
        let progress = std::thread::Builder::new()
            .name(format!("pillion-progress-{}", job.launch.rank))
            .spawn(move || match join::join(&for_thread, options) {
                Ok(Joined { group, wire, network }) => {
                    let engine = group.engine.clone();
                    engine.open(group.clone(), wire);
                    // Where nobody listens any more, this thread has been given up, and the rank has failed.
                    engine.run(|begun| sender.send(begun.map(|()| (group, network))).is_ok());
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            })
            .map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })
            .map_err(|error| join::decline(&job, error))?;
        // Every phase of joining has the limit of its own, but for what MPI does, which has none; then the thread is left behind.
        let joined = receiver.recv_timeout(startup.saturating_mul(3)).map_err(|error| {
            let reason = match error {
                RecvTimeoutError::Timeout => {
                    "the other ranks did not answer: were they all started by the same launcher?"
                }
                RecvTimeoutError::Disconnected => "the progress thread panicked",
            };
            job.fail(reason.to_owned())
        })?;
        let (group, network) = joined.map_err(|error| join::decline(&job, error))?;
        let engine = group.engine.clone();
        engine.set_thread(progress);
        let communicator = Communicator::of(group, Job { network, ..job });
        let group = &communicator.group;
        group.declare_joined();
        let absent = |rank: usize| group.control(rank).state.load(Ordering::Acquire) == state::ABSENT;
        group.wait_for_ranks("the start", startup, absent)?;
        engine.look_at_processors();
        Ok(communicator)
    }

    /// Of a group that this rank's engine drives.
    pub(crate) fn of(group: Arc<Group>, job: Job) -> Communicator {
        Communicator { group, job, splits: AtomicU64::new(0), windows: AtomicU64::new(0), groups: Mutex::default() }
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.job.launch.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.group.hosts.world()
    }

    /// What moves the bytes: never [`Backend::Auto`].
    pub fn backend(&self) -> Backend {
        match (self.group.hosts.ranks.len(), self.group.world(), self.wire()) {
            (1, ..) => Backend::Shm,
            (_, 1, WireKind::Tcp) => Backend::Tcp,
            (_, 1, _) => Backend::Mpi,
            _ => Backend::Hierarchical,
        }
    }

    /// What connects hosts, where there are several: never [`WireKind::Auto`].
    pub fn wire(&self) -> WireKind {
        let Options { wire, backend, simulated_hosts, .. } = self.group.options;
        // What stands for a network between threads counts as MPI.
        if simulated_hosts > 1 { WireKind::Mpi } else { wire.of(&self.job.launch, backend) }
    }

    /// Number of hosts over which the ranks are spread, as many on each; every rank counts as one
    /// under [`Backend::Mpi`] and [`Backend::Tcp`].
    pub fn hosts(&self) -> usize {
        self.group.hosts.ranks.len()
    }

    /// Whether nothing has failed here so far.
    ///
    /// # Errors
    /// The first error, which every later call returns too.
    pub fn healthy(&self) -> Result<(), Error> {
        self.group.healthy()
    }

    /// What has been moved so far.
    pub fn traffic(&self) -> Traffic {
        let (operations, bytes) = self.group.traffic();
        Traffic { operations, bytes }
    }

    /// Whether operations that start from now on are recorded, but for messages; [`Communicator::recorded`] has them.
    pub fn record(&self, wanted: bool) {
        self.group.record.set_wanted(wanted);
    }

    /// The operations that were recorded and have ended since this was last asked: those of one kind in the order of their calls.
    pub fn recorded(&self) -> Vec<Span> {
        self.group.record.take()
    }

    /// A communicator of the ranks that call this with the same `color`, numbered in the order of
    /// (`key`, rank here). Every rank calls it; one without a color gets none. Otherwise as
    /// [`Communicator::group`].
    ///
    /// # Errors
    /// As for [`Communicator::group`].
    pub fn split(&self, color: Option<u64>, key: u64) -> Result<Option<Communicator>, Error> {
        let number = self.splits.fetch_add(1, Ordering::Relaxed);
        let words = [u64::from(color.is_some()), color.unwrap_or(0), key, number];
        let all = self.exchange_scalars(&words, Purpose::Split, self.limit())?;
        if let Some(peer) = all.iter().position(|other| other[3] != number) {
            let call = |number| format!("split #{number}");
            return Err(self.group.fail(Error::Mismatch { ours: call(number), theirs: call(all[peer][3]), peer }));
        }
        let Some(color) = color else { return Ok(None) };
        let mut members: Vec<usize> = (0..self.world()).filter(|&rank| all[rank][..2] == [1, color]).collect();
        members.sort_by_key(|&rank| (all[rank][2], rank));
        self.group(&members).map(Some)
    }

    /// Zeroed memory of `device` that other ranks can read while an operation owns it: one of this
    /// communicator, or of any other of this job. Every rank allocates the same. The memory returns
    /// to the system when the buffer is gone; after an error, when this rank's communicators are.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Mismatch`] when ranks ask for different sizes.
    pub fn allocate(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let bytes = size(dtype, len)?;
        let group = &self.group;
        self.agree(Memory::Arena, bytes, bytes.saturating_mul(group.world() as u64), [0; 2])?;
        let engine = &group.engine;
        let range = engine.reserve(bytes).map_err(|error| self.give_up(error))?;
        let (place, owner) = ((engine.rank, range.offset, bytes), Owned::new(engine.clone(), range));
        engine.buffer(device, dtype, place, owner).map_err(|error| self.give_up(error))
    }

    /// A window of `len` elements, zeroed and writable; every rank makes the same.
    ///
    /// # Errors
    /// As for [`Communicator::allocate`]; [`Error::Misuse`] when `len` is no multiple of the world.
    pub fn window(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Window, Error> {
        let world = self.world();
        expect(len.is_multiple_of(world), || {
            format!("a window of {len} elements over {world} ranks: give a multiple")
        })?;
        self.make_window(device, dtype, len, None)
    }

    /// As [`Communicator::window`], for a buffer that is cut into `sections`.
    ///
    /// # Errors
    /// As for [`Communicator::allocate`].
    pub fn window_of(&self, device: &dyn Device, dtype: DType, sections: &Sections) -> Result<Window, Error> {
        self.make_window(device, dtype, self.world() * sections.shard_len(), Some(sections.clone()))
    }

    fn make_window(
        &self,
        device: &dyn Device,
        dtype: DType,
        len: usize,
        sections: Option<Sections>,
    ) -> Result<Window, Error> {
        let bytes = size(dtype, len)?;
        let (group, engine, hosts) = (&self.group, &self.group.engine, &self.group.hosts);
        let own = match group.rank {
            0 => Some(window::Memory::make(engine, group.world(), bytes).map_err(|error| self.give_up(error))?),
            _ => None,
        };
        let places = own.map_or([0; 2], |own| [own.words.offset, own.data.offset]);
        let places = self.agree(Memory::Window, bytes, bytes, places).inspect_err(|_| {
            own.into_iter().for_each(|own| own.give_back(engine));
        })?;
        let [words, data] = places[hosts.local()[0]];
        let memory = window::Memory {
            leader: group.local(0),
            words: Range { offset: words, bytes: window::Memory::of_words(group.world()) },
            data: Range { offset: data, bytes },
        };
        let memory = own.unwrap_or(memory);
        // This rank's shard, and those that it receives from other hosts.
        let ranks = || hosts.column_of(self.rank()).chain([self.rank()]);
        let count = sections.as_ref().map_or(1, Sections::count);
        let mut chunks = (0..count).flat_map(|section| ranks().map(move |rank| (section, rank)));
        let reserved = chunks.try_for_each(|(section, rank)| {
            let chunk = chunk(sections.as_ref(), len, section, self.world(), rank);
            let [first, bytes] = [chunk.start, chunk.len()].map(|elements| (elements * dtype.bytes()) as u64);
            engine.map.reserve(memory.leader, data + first, bytes)
        });
        let number = self.windows.fetch_add(1, Ordering::Relaxed);
        reserved
            .and_then(|()| Window::new(group.clone(), device, dtype, (number, memory), sections))
            .map_err(|error| self.give_up(error))
    }

    /// Gives up: every call here and, once it next waits, on every other rank returns [`Error::Aborted`] with this reason.
    pub fn abort(&self, reason: &str) {
        self.group.abort(reason);
    }

    /// Gives up because of this rank's own failure, so that no other rank waits for it.
    pub(crate) fn give_up(&self, error: Error) -> Error {
        self.group.abort(&error.to_string());
        error
    }

    /// Checks that every rank asks for the same size, and that the host has memory for all of it:
    /// exceeding it would not fail, but wake the kernel's killer. Asked before any rank takes its
    /// part, so that the answers do not race. Returns every rank's `places`.
    fn agree(&self, memory: Memory, bytes: u64, on_this_host: u64, places: [u64; 2]) -> Result<Vec<[u64; 2]>, Error> {
        let (available, limit) = available_memory();
        let words = [memory as u64, bytes, available, places[0], places[1]];
        let values = self.exchange_scalars(&words, Purpose::Allocate, self.limit())?;
        if let Some(peer) = values.iter().position(|other| (other[0], other[1]) != (memory as u64, bytes)) {
            let name = |memory| ["an allocation", "a window"][usize::from(memory == Memory::Window as u64)];
            let call = |memory, bytes| format!("{} of {bytes} bytes", name(memory));
            let theirs = call(values[peer][0], values[peer][1]);
            return Err(self.group.fail(Error::Mismatch { ours: call(memory as u64, bytes), theirs, peer }));
        }
        let available = values.iter().map(|other| other[2]).min().unwrap_or(available);
        if on_this_host > available {
            return Err(Error::OutOfMemory { bytes: on_this_host, available, limit });
        }
        Ok(values.iter().map(|other| [other[3], other[4]]).collect())
    }
}

fn size(dtype: DType, len: usize) -> Result<u64, Error> {
    let bytes = (len as u64).checked_mul(dtype.bytes() as u64).filter(|&bytes| bytes < 1 << 60);
    bytes.ok_or(Error::OutOfMemory { bytes: u64::MAX, available: 1 << 60, limit: "the address space" })
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.group.abort("it panicked");
        }
        self.group.stop();
        self.group.ended.wait();
        self.group.engine.close();
    }
}
