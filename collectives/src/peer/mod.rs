//! Collectives between GPUs of one host, without NCCL: each rank pulls what it gathers with the
//! copy engines of its GPU, and reads what it reduces in the memory of all ranks, in order of rank,
//! so a sum has the bits of shared memory's.
//!
//! The ranks are threads of one process, and streams wait for streams of other ranks by the
//! driver's events. Everything that only the host sees (scalars, failures, who is there) goes the
//! way of the communicator that this one is made over.
//!
//! An operation is enqueued by the call that starts it. The call waits until the other ranks have
//! made theirs (`board.rs`), and not for what GPUs do: streams are ordered after each other, and
//! the host runs ahead of them.

mod board;
mod steps;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cuda, CudaStream, DType, Device, Event, Failure, Stream};

use crate::call::Purpose;
use crate::hosts::Hosts;
use crate::join::Job;
use crate::record::Record;
use crate::request::{Envelope, Request};
use crate::transport::{Capabilities, Limit, Submitted, Transport, Turns};
use crate::{Error, Options, Sections, Traffic};
use board::Board;

/// Ranks whose buffers are memory of GPUs, seen from one of them.
pub(crate) struct Peer {
    /// What the ranks say to each other beside the GPUs.
    control: Arc<dyn Transport>,
    gpu: Cuda,
    rank: usize,
    /// As [`Options::reduce_groups`].
    reduce_groups: usize,
    board: Arc<Board>,
    /// The number of the next step; held while an operation is enqueued, so operations are enqueued
    /// in the order of their calls.
    next: Mutex<u64>,
    streams: Arc<Streams>,
    operations: AtomicU64,
    bytes: AtomicU64,
    record: Record,
}

/// The streams of a rank's operations, which its groups share.
struct Streams {
    gathers: Mutex<CudaStream>,
    reductions: Mutex<CudaStream>,
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
        let stream = || Mutex::new(gpu.reducing_stream());
        let streams = Arc::new(Streams { gathers: stream(), reductions: stream() });
        Peer::over(control, gpu, rank, reduce_groups, streams, limit)
    }

    fn over(
        control: Arc<dyn Transport>,
        gpu: &Cuda,
        rank: usize,
        reduce_groups: usize,
        streams: Arc<Streams>,
        limit: Limit,
    ) -> Result<Arc<Peer>, Error> {
        /// Tells groups of this process apart.
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let own = [u64::from(std::process::id()), NUMBER.fetch_add(1, Ordering::Relaxed), u64::from(gpu.ordinal())];
        let all = control.exchange(&own, Purpose::Gather, limit)?;
        let ranks: Vec<&[u64]> = all.chunks_exact(own.len()).collect();
        let world = ranks.len();
        if let Some(other) = ranks.iter().position(|other| other[0] != own[0]) {
            let reason = format!(
                "rank {other} is another process, and GPUs of several processes need a transport that \
                 does not exist yet: run the ranks as threads"
            );
            return Err(Error::Misuse { reason });
        }
        if world > CudaStream::INPUTS {
            let most = CudaStream::INPUTS;
            return Err(Error::Misuse { reason: format!("{world} ranks on one host: GPUs reduce at most {most}") });
        }
        let board = Board::of((ranks[0][1], ranks[0][0]), world);
        board.introduce(gpu);
        // Nobody goes on, and drops the board, before all have it.
        let nothing = control.exchange(&[], Purpose::Barrier, limit)?;
        control.put_back(nothing);
        if let Some(other) = board.out_of_reach(gpu) {
            let (own, other) = (gpu.ordinal(), other.ordinal());
            let reason = format!(
                "GPU {own} does not reach the memory of GPU {other}: `nvidia-smi topo -p2p r` shows which GPUs do; \
                 give the ranks others (CUDA_VISIBLE_DEVICES)"
            );
            return Err(control.fail(Error::Misuse { reason }));
        }
        Ok(Arc::new(Peer {
            control,
            gpu: gpu.clone(),
            rank,
            reduce_groups,
            board,
            next: Mutex::new(0),
            streams,
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            record: Record::default(),
        }))
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
                Err(self.control.fail(error))
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
        Ok(Peer::over(control, &self.gpu, job.launch.rank, groups, self.streams.clone(), limit)?)
    }

    fn healthy(&self) -> Result<(), Error> {
        self.control.healthy()?;
        self.gpu.healthy().map_err(|failure| self.control.fail_after(failure))
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
        for stream in [&self.streams.gathers, &self.streams.reductions] {
            let _ = stream.lock().synchronize();
        }
        self.control.close();
    }
}
