//! Collectives between GPUs. Everything that only the host sees (scalars, failures, who is there)
//! goes the way of the communicator that this one is made over; elements are moved by the GPUs of
//! one host themselves (`peer`), or by NCCL (`nccl`).
//!
//! An operation is enqueued by the call that starts it: streams are ordered after each other, and
//! the host runs ahead of them.

mod nccl;
mod operations;
mod peer;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cuda, CudaStream, DType, Device, Event, Failure, Witness};

use crate::call::Purpose;
use crate::hosts::Hosts;
use crate::join::Job;
use crate::memory::fork::Maker;
use crate::options::GpuTransport;
use crate::record::Record;
use crate::request::{Envelope, Request};
use crate::transport::{Capabilities, Limit, Submitted, Transport, Turns};
use crate::{Error, Options, Sections, Traffic};
use nccl::Nccl;
pub use nccl::nccl_version;
use peer::{Memories, Peer};

/// Ranks whose buffers are memory of GPUs, seen from one of them.
pub(crate) struct Gpus {
    /// What the ranks say to each other beside the GPUs.
    control: Arc<dyn Transport>,
    gpu: Cuda,
    rank: usize,
    /// As [`Options::reduce_groups`].
    reduce_groups: usize,
    mover: Mover,
    /// How many steps there were; held while an operation is enqueued, so operations are enqueued
    /// in the order of their calls.
    steps: Mutex<u64>,
    lanes: Arc<Lanes>,
    operations: AtomicU64,
    bytes: AtomicU64,
    record: Record,
    maker: Maker,
    /// Kept for the GPU, which asks it why other ranks failed.
    _witness: Arc<Witness>,
}

/// What moves the elements.
enum Mover {
    Peer(Peer),
    Nccl(Nccl),
}

impl Mover {
    /// Connects the ranks of `place`, which all call this; and the memory that their streams read.
    fn connect(place: &Place<'_>, reduce_groups: usize, by: GpuTransport) -> Result<(Mover, Memories), Error> {
        let &Place { control, rank, limit, .. } = place;
        let is_nccl = by == GpuTransport::Nccl || by == GpuTransport::Auto && control.hosts().ranks.len() > 1;
        let all = control.exchange(&[u64::from(is_nccl)], Purpose::Gather, limit)?;
        if let Some(other) = all.iter().position(|&other| other != u64::from(is_nccl)) {
            let name = |is_nccl| if is_nccl { "NCCL" } else { "peer" };
            let (ours, theirs) = (name(is_nccl), name(!is_nccl));
            let reason = format!("rank {other} wants the transport {theirs} between GPUs, and rank {rank} {ours}");
            return Err(Error::Misuse { reason });
        }
        control.put_back(all);
        match is_nccl {
            true => Ok((Mover::Nccl(Nccl::connect(place, reduce_groups)?), Memories::new())),
            false => Peer::connect(place).map(|(peer, memories)| (Mover::Peer(peer), memories)),
        }
    }
}

/// The streams of a rank's operations, which its groups share, by number.
struct Lanes {
    streams: [Mutex<CudaStream>; LANES],
    /// Held by whoever calls NCCL, for any group.
    calls: Mutex<()>,
    /// What they read of ranks that are other processes; it goes after them.
    _memories: Memories,
}

/// How many streams a rank has.
const LANES: usize = 2;
/// The stream that gathers, and the one that reduces.
const GATHERS: usize = 0;
const REDUCTIONS: usize = 1;

/// Where a rank connects.
struct Place<'a> {
    control: &'a Arc<dyn Transport>,
    gpu: &'a Cuda,
    rank: usize,
    limit: Limit,
}

impl Gpus {
    /// Over the ranks of `control`, which all call this; `rank` is this one's number.
    pub(crate) fn connect(
        control: Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        reduce_groups: usize,
        by: GpuTransport,
        limit: Limit,
    ) -> Result<Arc<Gpus>, Error> {
        let place = Place { control: &control, gpu, rank, limit };
        let (mover, memories) = Mover::connect(&place, reduce_groups, by).map_err(|error| gave_up(&*control, error))?;
        let streams = std::array::from_fn(|_| Mutex::new(gpu.reducing_stream()));
        let lanes = Arc::new(Lanes { streams, calls: Mutex::new(()), _memories: memories });
        Ok(Gpus::over(control, gpu, rank, reduce_groups, mover, lanes))
    }

    fn over(
        control: Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        reduce_groups: usize,
        mover: Mover,
        lanes: Arc<Lanes>,
    ) -> Arc<Gpus> {
        let asked = control.clone();
        let witness: Arc<Witness> = Arc::new(move || {
            let op = || "what its GPU waits for".to_owned();
            asked.look(&op).err().map(Failure::new)
        });
        gpu.ask(&witness);
        let gpus = Gpus {
            control,
            gpu: gpu.clone(),
            rank,
            reduce_groups,
            mover,
            steps: Mutex::new(0),
            lanes,
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            record: Record::default(),
            maker: Maker::this(),
            _witness: witness,
        };
        gpus.be_patient(Limit::within(gpus.options().timeout));
        Arc::new(gpus)
    }

    /// The host waits longer for its GPU than an operation may take, because its own error says
    /// more.
    fn be_patient(&self, limit: Limit) {
        self.gpu.be_patient(limit.within.saturating_add(Duration::from_secs(10)));
    }

    /// Enqueues an operation; what follows its event follows the operation on this rank, and what
    /// the others do with this rank's memory.
    fn enqueue(&self, request: Request, after: Event, limit: Limit) -> Result<Event, Error> {
        self.healthy()?;
        self.be_patient(limit);
        let mut steps = self.steps.lock();
        let result = operations::enqueue(self, &mut steps, request, &after, limit);
        match result {
            Ok((event, bytes)) => {
                self.operations.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(event)
            }
            // The other ranks are not waiting for a call that cannot be.
            Err(error @ Error::Misuse { .. }) => Err(error),
            Err(error) => {
                // Other ranks may have enqueued copies of this rank's memory, which therefore must
                // not be handed out again.
                self.gpu.fail(Failure::new(error.clone()));
                self.control.fail(error.clone());
                Err(error)
            }
        }
    }
}

impl Transport for Gpus {
    fn hosts(&self) -> &Hosts {
        self.control.hosts()
    }

    fn options(&self) -> &Options {
        self.control.options()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            windows: false,
            reads_peers_in_place: false,
            reads_private_memory: true,
            rank_order: matches!(self.mover, Mover::Peer(_)),
            device_memory: true,
            registered_memory: false,
        }
    }

    fn refuses(&self, buffer: &Buffer) -> Option<String> {
        let (ordinal, space) = (self.gpu.ordinal(), buffer.space());
        let reason = || {
            format!(
                "collectives between GPUs move memory of this rank's GPU {ordinal}, and {buffer:?} is other {space}"
            )
        };
        (!self.gpu.owns(buffer)).then(reason)
    }

    fn submit(&self, request: Request, after: Event, limit: Limit) -> Submitted {
        match self.enqueue(request, after, limit) {
            Ok(event) => Submitted::Enqueued(event),
            Err(error) => Submitted::Ended(Err(error)),
        }
    }

    fn run(&self, request: Request, limit: Limit) -> Result<(), Error> {
        Ok(self.enqueue(request, Event::PAST, limit)?.wait()?)
    }

    fn probe(&self, _: Option<usize>, _: u32) -> Result<Option<Envelope>, Error> {
        Err(operations::unsupported("messages"))
    }

    fn exchange(&self, words: &[u64], purpose: Purpose, limit: Limit) -> Result<Vec<u64>, Error> {
        self.healthy()?;
        // Operations exchange words, too, each in its turn.
        let exchanges = match &self.mover {
            Mover::Peer(peer) => peer.exchanges(),
            Mover::Nccl(_) => true,
        };
        let _turn = exchanges.then(|| self.steps.lock());
        self.control.exchange(words, purpose, limit)
    }

    fn put_back(&self, words: Vec<u64>) {
        self.control.put_back(words);
    }

    fn allocate(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        device.allocate(dtype, len).map_err(|error| {
            let error = Error::System { what: "allocating memory of a GPU", reason: error.to_string() };
            self.control.abort(&error.to_string());
            error
        })
    }

    fn allocate_alone(&self, _: &dyn Device, _: DType, _: usize) -> Result<Buffer, Error> {
        Err(operations::unsupported("memory of one rank alone"))
    }

    fn window(
        self: Arc<Self>,
        _: &dyn Device,
        _: DType,
        _: usize,
        _: Option<&Sections>,
    ) -> Result<(Buffer, Box<dyn Turns>), Error> {
        Err(operations::unsupported("windows"))
    }

    fn group(&self, ranks: &[usize], job: &Job) -> Result<Arc<dyn Transport>, Error> {
        let control = self.control.group(ranks, job)?;
        let (limit, groups) = (Limit::within(self.options().timeout), control.options().reduce_groups);
        let place = Place { control: &control, gpu: &self.gpu, rank: job.launch.rank, limit };
        let mover = match &self.mover {
            Mover::Peer(peer) => peer.group(ranks, &place).map(Mover::Peer),
            Mover::Nccl(_) => Nccl::connect(&place, groups).map(Mover::Nccl),
        };
        let mover = mover.map_err(|error| gave_up(&*control, error))?;
        Ok(Gpus::over(control, &self.gpu, job.launch.rank, groups, mover, self.lanes.clone()))
    }

    fn healthy(&self) -> Result<(), Error> {
        self.control.healthy()?;
        self.gpu.healthy().map_err(|failure| self.control.fail_after(failure))
    }

    fn look(&self, op: &dyn Fn() -> String) -> Result<(), Error> {
        self.control.look(op)
    }

    fn fail(&self, error: Error) -> Error {
        self.control.fail(error)
    }

    fn fail_after(&self, failure: Failure) -> Error {
        self.control.fail_after(failure)
    }

    fn abort(&self, reason: &str) {
        self.control.abort(reason);
    }

    fn mover(&self) -> String {
        match &self.mover {
            Mover::Peer(_) => "each GPU".to_owned(),
            Mover::Nccl(nccl) => nccl.describe(),
        }
    }

    fn traffic(&self) -> Traffic {
        let [operations, bytes] = [&self.operations, &self.bytes].map(|count| count.load(Ordering::Relaxed));
        Traffic { operations, bytes }
    }

    fn record(&self) -> &Record {
        &self.record
    }

    fn close(&self) {
        if self.maker.is_another() {
            // A forked child has no GPU, and none of the threads.
            return self.control.close();
        }
        // Whatever failed: what is enqueued may use what goes now.
        self.lanes.streams.iter().for_each(|stream| stream.lock().drain());
        match &self.mover {
            Mover::Peer(peer) => peer.close(),
            Mover::Nccl(nccl) => nccl.close(),
        }
        self.control.close();
    }
}

/// Tells the others that this rank does not come, where it is the cause, and leaves.
fn gave_up(control: &dyn Transport, error: Error) -> Error {
    if matches!(error, Error::System { .. } | Error::Misuse { .. } | Error::OutOfMemory { .. }) {
        control.abort(&error.to_string());
    }
    control.close();
    error
}
