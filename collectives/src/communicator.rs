//! The ranks that talk, and what they can say.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, Device, Event, Region};

use crate::algorithms::{AllGather, AllReduce, Broadcast, GatherWindow, ReduceScatter, SIDEBAND, Scalars};
use crate::pending::{Outcome, Pending};
use crate::shm::arena::available_memory;
use crate::shm::control::{Channel, PAYLOAD, state};
use crate::shm::flight::{Collective, Flight};
use crate::shm::progress::Shared;
use crate::shm::rendezvous;
use crate::{Error, Launch, Options, Window};

/// How scalars are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The sum, in order of rank.
    Sum,
    /// The largest, or NaN where there is one.
    Max,
}

/// What a communicator has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations completed.
    pub operations: u64,
    /// Bytes that other ranks read from this one.
    pub bytes: u64,
}

/// A reduce-scatter's buffers.
#[derive(Debug)]
pub struct Reduce {
    /// This rank's summand, `[≥ world · n]` f32, bf16 or f64, from [`Communicator::allocate`]; unchanged, and not read beyond.
    pub input: Buffer,
    /// `[n]`, f64 for f64 and f32 otherwise: the sum of the ranks' parts of this rank, in order of rank, accumulated in this type.
    pub output: Buffer,
    /// `[4]` f64: numbers of this rank; unchanged.
    pub sideband: Buffer,
    /// `[4]` f64: the sums of the ranks' sidebands, in order of rank.
    pub totals: Buffer,
    /// Whether the sums are added to `output` and `totals` instead of replacing them.
    pub accumulate: bool,
}

/// Ranks that talk.
///
/// Every rank makes the same calls in the same order; a rank that does not is named by an error. After an error every call
/// returns that first error. Dropping a communicator waits for the operations in flight.
pub struct Communicator {
    shared: Arc<Shared>,
    progress: Option<JoinHandle<()>>,
    allocated: Mutex<Allocated>,
}

/// Bytes handed out so far; memory returns when the last buffer and the communicator are gone.
#[derive(Default)]
struct Allocated {
    arena: u64,
    windows: u64,
}

/// What is allocated.
#[derive(Clone, Copy)]
enum Memory {
    Arena,
    Window,
}

/// Allocations start at multiples of this many bytes.
const ALIGNMENT: u64 = 4096;

impl Communicator {
    /// Joins the ranks of `launch`'s job.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] or [`Error::Timeout`] when they do not all come in time, [`Error::System`] when the host refuses
    /// memory or a thread.
    pub fn connect(launch: &Launch, options: Options) -> Result<Communicator, Error> {
        let startup = options.startup_timeout;
        let &Launch { rank, world, local_world, .. } = launch;
        if local_world != world {
            let reason = format!(
                "only {local_world} of its {world} ranks are on this host, and this build joins ranks of one host: start all ranks \
                 on one host, or build with `--features mpi` and start with mpirun"
            );
            return Err(Error::Rendezvous { rank, world, job: launch.job.clone(), reason });
        }
        let place = rendezvous::Place { name: &launch.job, rank, world, global_rank: rank, global_world: world };
        let map = rendezvous::join(&place, startup)?;
        let shared = Arc::new(Shared::new(map, launch.rank, options));
        let for_thread = shared.clone();
        let progress = std::thread::Builder::new()
            .name(format!("pillion-progress-{}", launch.rank))
            .spawn(move || for_thread.run())
            .map_err(|error| Error::System { what: "starting the progress thread", reason: error.to_string() })?;
        let communicator = Communicator { shared, progress: Some(progress), allocated: Mutex::default() };
        let shared = &communicator.shared;
        let absent = |rank: usize| shared.map.control(rank).state.load(Ordering::Acquire) == state::ABSENT;
        shared.wait_for_ranks("the start", startup, absent)?;
        Ok(communicator)
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.shared.world()
    }

    /// What has been moved so far.
    pub fn traffic(&self) -> Traffic {
        let (operations, bytes) = self.shared.traffic();
        Traffic { operations, bytes }
    }

    /// Zeroed memory of `device` that other ranks can read while an operation owns it. Every rank allocates the same. The memory
    /// returns when the communicator and its buffers are gone.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Mismatch`] when ranks ask for different sizes.
    pub fn allocate(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let bytes = size(dtype, len)?;
        let offset = {
            let mut allocated = self.allocated.lock();
            let offset = allocated.arena;
            allocated.arena += bytes.next_multiple_of(ALIGNMENT);
            offset
        };
        self.agree(Memory::Arena, bytes, bytes * self.world() as u64)?;
        let rank = self.rank();
        self.shared.map.reserve(rank, offset, bytes).map_err(|error| self.give_up(error))?;
        Ok(self.buffer(device, dtype, rank, offset, bytes))
    }

    /// A window of `len` elements, zeroed and writable; every rank makes the same.
    ///
    /// # Errors
    /// As for [`Communicator::allocate`].
    ///
    /// # Panics
    /// When `len` is no multiple of the world.
    pub fn window(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Window, Error> {
        assert!(len.is_multiple_of(self.world()), "a window of {len} elements over {} ranks", self.world());
        let bytes = size(dtype, len)?;
        let words_bytes = (8 * self.world() as u64).next_multiple_of(ALIGNMENT);
        let words = {
            let mut allocated = self.allocated.lock();
            let offset = allocated.windows;
            allocated.windows += words_bytes + bytes.next_multiple_of(ALIGNMENT);
            offset
        };
        self.agree(Memory::Window, bytes, bytes)?;
        let (heap, share) = (self.world(), bytes / self.world() as u64);
        let start = words + words_bytes;
        let map = &self.shared.map;
        map.reserve(heap, words, words_bytes)
            .and_then(|()| map.reserve(heap, start + self.rank() as u64 * share, share))
            .map_err(|error| self.give_up(error))?;
        Ok(Window::new(self.buffer(device, dtype, heap, start, bytes), words, self.shared.clone()))
    }

    /// output\[p·n..\] = the shard of rank p. `shard: [n]` from [`Communicator::allocate`], unchanged; `output: [≥ world · n]`, same
    /// type, unchanged beyond. Starts after `after`.
    ///
    /// # Panics
    /// When the shapes or types disagree.
    pub fn all_gather(&self, shard: Buffer, output: Buffer, after: Event) -> Pending<(Buffer, Buffer)> {
        let world = self.world();
        assert!(
            output.len() >= world * shard.len() && output.dtype() == shard.dtype(),
            "an all-gather of {world} × {shard:?} into {output:?}"
        );
        let offset = self.offset(&shard);
        same_device(&[&shard, &output]);
        let collective = AllGather { world, offset, shard: shard.span(), output: output.span() };
        self.submit(Box::new(collective), Channel::Gather, after, (shard, output))
    }

    /// Makes all of a window readable, with what each rank wrote to its shard before `after`. Moves nothing.
    ///
    /// # Panics
    /// When the window is gathered already.
    pub fn gather(&self, mut window: Window, after: Event) -> Pending<Window> {
        window.begin_gather(&self.shared);
        let collective = GatherWindow { count: window.len(), place: window.place() };
        self.submit(Box::new(collective), Channel::Gather, after, window)
    }

    /// Sums the inputs of all ranks, and gives each rank its part. Starts after `after`.
    ///
    /// # Panics
    /// When the shapes or types disagree.
    pub fn reduce_scatter(&self, reduce: Reduce, after: Event) -> Pending<Reduce> {
        let Reduce { input, output, sideband, totals, accumulate } = &reduce;
        let wide = if input.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        assert!(
            input.len() >= self.world() * output.len() && output.dtype() == wide && input.dtype() != DType::U32,
            "a reduce-scatter of {input:?} over {} ranks into {output:?}",
            self.world()
        );
        for numbers in [sideband, totals] {
            assert!(numbers.len() == SIDEBAND && numbers.dtype() == DType::F64, "a sideband is {SIDEBAND} × f64");
        }
        same_device(&[input, output, sideband, totals]);
        let collective = ReduceScatter {
            world: self.world(),
            input: input.span(),
            offset: self.offset(input),
            output: output.span(),
            sideband: sideband.span(),
            totals: totals.span(),
            accumulate: *accumulate,
        };
        self.submit(Box::new(collective), Channel::Reduce, after, reduce)
    }

    /// buffer = Σ over ranks, in order of rank, in place. `buffer: [n]` f32 or f64 from [`Communicator::allocate`].
    ///
    /// # Panics
    /// For other types.
    pub fn all_reduce(&self, buffer: Buffer, after: Event) -> Pending<Buffer> {
        assert!(matches!(buffer.dtype(), DType::F32 | DType::F64), "an all-reduce of {}", buffer.dtype());
        let collective = AllReduce { buffer: buffer.span(), offset: self.offset(&buffer) };
        self.submit(Box::new(collective), Channel::Reduce, after, buffer)
    }

    /// buffer = that of rank `root`. From [`Communicator::allocate`].
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn broadcast(&self, buffer: Buffer, root: usize, after: Event) -> Pending<Buffer> {
        assert!(root < self.world(), "a broadcast from rank {root} of {}", self.world());
        let collective = Broadcast { buffer: buffer.span(), offset: self.offset(&buffer), root };
        self.submit(Box::new(collective), Channel::Gather, after, buffer)
    }

    /// Combines each of `values` over all ranks, in order of rank; blocks until it is done. No rank returns before every
    /// rank has called.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn all_reduce_scalars(&self, values: &mut [f64], reduction: Reduction) -> Result<(), Error> {
        for chunk in values.chunks_mut(PAYLOAD) {
            let words = self.all_gather_scalars(&chunk.iter().map(|value| value.to_bits()).collect::<Vec<u64>>())?;
            for (index, value) in chunk.iter_mut().enumerate() {
                let all = words.iter().map(|rank| f64::from_bits(rank[index]));
                *value = match reduction {
                    Reduction::Sum => all.sum(),
                    Reduction::Max => all.fold(f64::NEG_INFINITY, |a, b| if a >= b || a.is_nan() { a } else { b }),
                };
            }
        }
        Ok(())
    }

    /// Every rank's `values` (at most 64, as many on each rank), in order of rank.
    ///
    /// # Errors
    /// The communicator's first error.
    ///
    /// # Panics
    /// With more than 64 values.
    pub fn all_gather_scalars(&self, values: &[u64]) -> Result<Vec<Vec<u64>>, Error> {
        self.exchange_scalars(values, |flight| flight)
    }

    fn exchange_scalars(&self, values: &[u64], form: impl FnOnce(Flight) -> Flight) -> Result<Vec<Vec<u64>>, Error> {
        assert!(values.len() <= PAYLOAD, "at most {PAYLOAD} scalars at a time");
        let gathered = Arc::new(Mutex::new(Vec::new()));
        let collective = Scalars { values: values.to_vec(), gathered: gathered.clone() };
        let outcome = Arc::new(Outcome::default());
        let flight = Flight::new(Box::new(collective), Channel::Control, Event::PAST, outcome.clone());
        self.shared.run_here(Channel::Control, form(flight));
        outcome.outcome()?;
        let gathered = gathered.lock();
        let ranks = 0..self.world();
        Ok(ranks.map(|rank| gathered[rank * values.len()..][..values.len()].to_vec()).collect())
    }

    /// `bytes` of rank `root`, on every rank. For settings and names; large data goes through [`Communicator::broadcast`].
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn broadcast_bytes(&self, root: usize, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        const PIECE: usize = PAYLOAD * 8;
        let len = self.all_gather_scalars(&[bytes.len() as u64])?[root][0] as usize;
        let mut received = Vec::with_capacity(len);
        while received.len() < len {
            let mut piece = [0; PIECE];
            if self.rank() == root {
                let rest = &bytes[received.len()..];
                let count = rest.len().min(PIECE);
                piece[..count].copy_from_slice(&rest[..count]);
            }
            let words: Vec<u64> =
                piece.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
            let words = &self.all_gather_scalars(&words)?[root];
            let count = (len - received.len()).min(PIECE);
            received.extend(words.iter().flat_map(|word| word.to_le_bytes()).take(count));
        }
        Ok(received)
    }

    /// Blocks until every rank has called.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn barrier(&self) -> Result<(), Error> {
        self.all_gather_scalars(&[]).map(|_| ())
    }

    /// Blocks until every rank has called, however long that takes, as long as the ranks waited for are running: for phases in
    /// which one rank works and the others wait.
    ///
    /// # Errors
    /// The communicator's first error.
    pub fn patient_barrier(&self) -> Result<(), Error> {
        self.exchange_scalars(&[], Flight::patiently).map(|_| ())
    }

    /// Gives up: every call here and, once it next waits, on every other rank returns [`Error::Aborted`] with this reason.
    pub fn abort(&self, reason: &str) {
        self.shared.abort(reason);
    }

    /// Gives up because of this rank's own failure, so that no other rank waits for it.
    fn give_up(&self, error: Error) -> Error {
        self.shared.abort(&error.to_string());
        error
    }

    fn submit<T>(&self, collective: Box<dyn Collective>, channel: Channel, after: Event, value: T) -> Pending<T> {
        let outcome = Arc::new(Outcome::default());
        self.shared.submit(channel, Flight::new(collective, channel, after, outcome.clone()));
        Pending::new(outcome, value)
    }

    /// Checks that every rank asks for the same size, and that the host has memory for all of it: exceeding it would not fail, but
    /// wake the kernel's killer. Asked before any rank takes its part, so that the answers do not race.
    fn agree(&self, memory: Memory, bytes: u64, on_all_ranks: u64) -> Result<(), Error> {
        let (available, limit) = available_memory();
        let values = self.all_gather_scalars(&[memory as u64, bytes, available])?;
        if let Some(peer) = values.iter().position(|other| (other[0], other[1]) != (memory as u64, bytes)) {
            let name = |memory| ["an allocation", "a window"][usize::from(memory == Memory::Window as u64)];
            let call = |memory, bytes| format!("{} of {bytes} bytes", name(memory));
            let theirs = call(values[peer][0], values[peer][1]);
            return Err(self.shared.fail(Error::Mismatch { ours: call(memory as u64, bytes), theirs, peer }));
        }
        let available = values.iter().map(|other| other[2]).min().unwrap_or(available);
        if on_all_ranks > available {
            return Err(Error::OutOfMemory { bytes: on_all_ranks, available, limit });
        }
        Ok(())
    }

    fn buffer(&self, device: &dyn Device, dtype: DType, arena: usize, offset: u64, bytes: u64) -> Buffer {
        let start = self.shared.map.address(arena, offset, bytes);
        let owner = Box::new(self.shared.map.clone());
        // SAFETY: the range is mapped while `owner` lives and starts at a page. `allocated` hands each range out once, so no other region
        // of this rank overlaps it. Other ranks map it too; they read it only inside operations that own the buffer, or through a window's
        // protocol.
        let region = unsafe { Region::from_raw(start, bytes as usize, device.deferred(), owner) };
        Buffer::whole(region, dtype)
    }

    /// Where a buffer lies in this rank's arena.
    fn offset(&self, buffer: &Buffer) -> u64 {
        let offset = self.shared.map.offset_of(self.rank(), buffer.span().address());
        offset.expect("other ranks can only read buffers made by `Communicator::allocate`")
    }
}

/// Memory of a deferring device has a lock, which an operation takes for all of its buffers or for none.
fn same_device(buffers: &[&Buffer]) {
    let deferred = buffers[0].span().deferred();
    assert!(
        buffers.iter().all(|buffer| buffer.span().deferred() == deferred),
        "an operation's buffers are of one device"
    );
}

fn size(dtype: DType, len: usize) -> Result<u64, Error> {
    let bytes = (len as u64).checked_mul(dtype.bytes() as u64).filter(|&bytes| bytes < 1 << 60);
    bytes.ok_or(Error::OutOfMemory { bytes: u64::MAX, available: 1 << 60, limit: "the address space" })
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.abort("it panicked");
        }
        self.shared.stop();
        if let Some(progress) = self.progress.take() {
            // A panic of the progress thread has been printed, and other ranks see it as a death.
            let _ = progress.join();
        }
    }
}
