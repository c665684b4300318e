//! Collectives between GPUs of one host, without NCCL: each rank pulls what it gathers with the
//! copy engines of its GPU, and reads what it reduces in the memory of all ranks, in order of rank,
//! so a sum has the bits of shared memory's.
//!
//! The ranks are threads of one process, whose streams wait for each other by the driver's events
//! (`board.rs`), or a process each, whose streams wait at words (`processes.rs`). Everything that
//! only the host sees (scalars, failures, who is there) goes the way of the communicator that this
//! one is made over.
//!
//! An operation is enqueued by the call that starts it. The call waits until the other ranks have
//! made theirs, and not for what GPUs do: streams are ordered after each other, and the host runs
//! ahead of them.

mod board;
mod meeting;
mod processes;
mod steps;
mod watch;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cuda, CudaStream, DType, Device, Event, Failure, Stream, Witness};

use crate::call::Purpose;
use crate::hosts::Hosts;
use crate::join::Job;
use crate::record::Record;
use crate::request::{Envelope, Request};
use crate::transport::{Capabilities, Limit, Submitted, Transport, Turns};
use crate::{Error, Options, Sections, Traffic};
use board::Board;
use meeting::Meeting;
use processes::{Memories, Processes};

/// Ranks whose buffers are memory of GPUs, seen from one of them.
pub(crate) struct Peer {
    /// What the ranks say to each other beside the GPUs.
    control: Arc<dyn Transport>,
    gpu: Cuda,
    rank: usize,
    /// As [`Options::reduce_groups`].
    reduce_groups: usize,
    meeting: Meeting,
    /// How many steps there were; held while an operation is enqueued, so operations are enqueued
    /// in the order of their calls.
    next: Mutex<u64>,
    streams: Arc<Streams>,
    operations: AtomicU64,
    bytes: AtomicU64,
    record: Record,
    /// Kept for the GPU, which asks it why other ranks failed.
    _witness: Arc<Witness>,
}

/// The streams of a rank's operations, which its groups share, by number.
struct Streams {
    lanes: [Mutex<CudaStream>; LANES],
    /// What they read of ranks that are other processes; it goes after them.
    _memories: Memories,
}

/// How many streams a rank has.
const LANES: usize = 2;
/// The stream that gathers, and the one that reduces.
const GATHERS: usize = 0;
const REDUCTIONS: usize = 1;

/// How the ranks of a group are spread.
enum Spread {
    /// Threads of one process; the number that rank 0 has given the group.
    Threads(u64),
    /// A process each.
    Processes,
}

impl Peer {
    /// Over the ranks of `control`, which all call this; `rank` is this one's number.
    pub(crate) fn connect(
        control: Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        reduce_groups: usize,
        limit: Limit,
    ) -> Result<Arc<Peer>, Error> {
        let spread = spread(&*control, limit)?;
        let result = (|| {
            let memories = match spread {
                Spread::Threads(_) => Memories::new(),
                Spread::Processes => processes::map_all(&*control, gpu, rank, limit)?,
            };
            let lanes = std::array::from_fn(|_| Mutex::new(gpu.reducing_stream()));
            let streams = Arc::new(Streams { lanes, _memories: memories.clone() });
            let meeting = meet(&control, gpu, rank, spread, memories, limit)?;
            Ok((meeting, streams))
        })();
        let (meeting, streams) = result.map_err(|error| gave_up(&*control, error))?;
        Ok(Peer::over(control, gpu, rank, reduce_groups, meeting, streams))
    }

    fn over(
        control: Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        reduce_groups: usize,
        meeting: Meeting,
        streams: Arc<Streams>,
    ) -> Arc<Peer> {
        let asked = control.clone();
        let witness: Arc<Witness> = Arc::new(move || asked.look().err().map(Failure::new));
        gpu.ask(&witness);
        Arc::new(Peer {
            control,
            gpu: gpu.clone(),
            rank,
            reduce_groups,
            meeting,
            next: Mutex::new(0),
            streams,
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            record: Record::default(),
            _witness: witness,
        })
    }

    /// Enqueues an operation; what follows its event follows the operation on this rank, and what
    /// the others do with this rank's memory.
    fn enqueue(&self, request: Request, after: Event, limit: Limit) -> Result<Event, Error> {
        self.healthy()?;
        let mut next = self.next.lock();
        let result = steps::enqueue(self, &mut next, request, &after, limit);
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

impl Transport for Peer {
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
            rank_order: true,
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
        Err(steps::unsupported("messages"))
    }

    fn exchange(&self, words: &[u64], purpose: Purpose, limit: Limit) -> Result<Vec<u64>, Error> {
        self.healthy()?;
        // Operations of processes exchange words, too, each in its turn.
        let _turn = matches!(self.meeting, Meeting::Processes(_)).then(|| self.next.lock());
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

    fn window(
        self: Arc<Self>,
        _: &dyn Device,
        _: DType,
        _: usize,
        _: Option<&Sections>,
    ) -> Result<(Buffer, Box<dyn Turns>), Error> {
        Err(steps::unsupported("windows"))
    }

    fn group(&self, ranks: &[usize], job: &Job) -> Result<Arc<dyn Transport>, Error> {
        let control = self.control.group(ranks, job)?;
        let (limit, groups) = (Limit::within(self.options().timeout), control.options().reduce_groups);
        let (rank, gpu) = (job.launch.rank, &self.gpu);
        let memories = match &self.meeting {
            Meeting::Threads(_) => Memories::new(),
            Meeting::Processes(processes) => processes.memories_of(ranks),
        };
        let meeting = spread(&*control, limit)
            .and_then(|spread| meet(&control, gpu, rank, spread, memories, limit))
            .map_err(|error| gave_up(&*control, error))?;
        Ok(Peer::over(control, gpu, rank, groups, meeting, self.streams.clone()))
    }

    fn healthy(&self) -> Result<(), Error> {
        self.control.healthy()?;
        self.gpu.healthy().map_err(|failure| self.control.fail_after(failure))
    }

    fn look(&self) -> Result<(), Error> {
        self.control.look()
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

    fn traffic(&self) -> Traffic {
        let [operations, bytes] = [&self.operations, &self.bytes].map(|count| count.load(Ordering::Relaxed));
        Traffic { operations, bytes }
    }

    fn record(&self) -> &Record {
        &self.record
    }

    fn close(&self) {
        for stream in &self.streams.lanes {
            let _ = stream.lock().synchronize();
        }
        if let Meeting::Processes(processes) = &self.meeting {
            processes.close();
        }
        self.control.close();
    }
}

/// How the ranks of `control`, which all call this, are spread.
///
/// # Errors
/// [`Error::Misuse`] for some that share a process while others do not.
fn spread(control: &dyn Transport, limit: Limit) -> Result<Spread, Error> {
    /// Tells this process from others, also in other PID namespaces.
    static PROCESS: OnceLock<u64> = OnceLock::new();
    /// Tells groups of this process apart.
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let process = *PROCESS.get_or_init(|| RandomState::new().hash_one(std::process::id()));
    let all = control.exchange(&[process, NUMBER.fetch_add(1, Ordering::Relaxed)], Purpose::Gather, limit)?;
    let ranks = all.as_chunks::<2>().0;
    let world = ranks.len();
    if world > CudaStream::INPUTS {
        let most = CudaStream::INPUTS;
        return Err(Error::Misuse { reason: format!("{world} ranks on one host: GPUs reduce at most {most}") });
    }
    let of = |rank: usize| ranks.iter().filter(|other| other[0] == ranks[rank][0]).count();
    if of(0) == world {
        return Ok(Spread::Threads(ranks[0][1]));
    }
    if let Some(rank) = (0..world).find(|&rank| of(rank) > 1) {
        let reason = format!(
            "{} of {world} ranks are threads of rank {rank}'s process: run all ranks as threads of one process, or \
             each as a process of its own",
            of(rank)
        );
        return Err(Error::Misuse { reason });
    }
    Ok(Spread::Processes)
}

/// Has the ranks of `control`, which all call this, meet.
///
/// # Errors
/// [`Error::Misuse`] for GPUs that do not reach each other's memory.
fn meet(
    control: &Arc<dyn Transport>,
    gpu: &Cuda,
    rank: usize,
    spread: Spread,
    memories: Memories,
    limit: Limit,
) -> Result<Meeting, Error> {
    let Spread::Threads(number) = spread else {
        return Ok(Meeting::Processes(Processes::new(control, gpu, rank, memories, limit)?));
    };
    let board = Board::of(number, control.hosts().world());
    board.introduce(gpu);
    // Nobody goes on, and drops the board, before all have it.
    control.put_back(control.exchange(&[], Purpose::Barrier, limit)?);
    if let Some(other) = board.out_of_reach(gpu) {
        let (own, other) = (gpu.ordinal(), other.ordinal());
        let reason = format!(
            "GPU {own} does not reach the memory of GPU {other}: `nvidia-smi topo -p2p r` shows which GPUs do; \
             give the ranks others (CUDA_VISIBLE_DEVICES)"
        );
        return Err(Error::Misuse { reason });
    }
    Ok(Meeting::Threads(board))
}

/// Tells the others that this rank does not come, and why.
fn gave_up(control: &dyn Transport, error: Error) -> Error {
    control.abort(&error.to_string());
    error
}
