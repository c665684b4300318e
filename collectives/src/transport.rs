//! What a communicator's operations run on. A communicator knows names, shapes, who may call what,
//! and what a caller gets back; a transport knows memory, other ranks, and how elements move.

use std::sync::Arc;
use std::time::Duration;

use pillion_kernels::{Buffer, DType, Device, Event, Failure};

use crate::call::Purpose;
use crate::hosts::Hosts;
use crate::join::Job;
use crate::outcome::Outcome;
use crate::record::Record;
use crate::request::{Envelope, Request};
use crate::{Error, Options, Sections, Traffic};

/// What a communicator can do beyond moving and combining elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether it has windows: see [`Communicator::window`](crate::Communicator::window).
    pub windows: bool,
    /// Whether ranks read each other's buffers where they lie, so that a sum's terms can be
    /// observed: see
    /// [`Communicator::reduce_scatter_observed`](crate::Communicator::reduce_scatter_observed).
    pub reads_peers_in_place: bool,
    /// Whether reductions run in order of rank, or of ranks and then hosts, so that a result has
    /// the same bits in every run.
    pub rank_order: bool,
    /// Whether buffers may be memory of a device that the host cannot read.
    pub device_memory: bool,
    /// Whether ranks read each other's buffers where they lie also in memory that does not come
    /// from [`Communicator::allocate`](crate::Communicator::allocate).
    pub reads_private_memory: bool,
    /// Whether memory from [`Communicator::allocate`](crate::Communicator::allocate) moves with
    /// fewer copies than other memory.
    pub registered_memory: bool,
}

/// How long somebody waits, at each step of an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) within: Duration,
    /// Whether time does not count in which the rank waited for is running.
    pub(crate) patient: bool,
}

impl Limit {
    pub(crate) const NONE: Limit = Limit::within(Duration::MAX);

    pub(crate) const fn within(within: Duration) -> Limit {
        Limit { within, patient: false }
    }

    /// As long as the ranks waited for are running, and so long besides.
    pub(crate) const fn patiently(within: Duration) -> Limit {
        Limit { within, patient: true }
    }
}

/// An operation that a transport was given.
pub(crate) enum Submitted {
    /// It is over.
    Ended(Result<(), Error>),
    /// A thread drives it, and says how it ended.
    Flying(Arc<Outcome>),
    /// A device runs it when its streams come to it, and the event says when it has.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "no other device enqueues"))]
    Enqueued(Event),
}

/// Ranks that are connected, seen from one of them. Every rank makes the same calls in the same
/// order. After an error every call returns that first error.
pub(crate) trait Transport: Send + Sync {
    /// Which ranks are where.
    fn hosts(&self) -> &Hosts;

    /// What it was made with.
    fn options(&self) -> &Options;

    fn capabilities(&self) -> Capabilities;

    /// Why operations cannot move this buffer's memory, if they cannot.
    fn refuses(&self, buffer: &Buffer) -> Option<String> {
        let space = buffer.space();
        let reason = || format!("collectives of the host move memory of the host, and {buffer:?} is {space}");
        (!space.is_host()).then(reason)
    }

    /// Starts an operation once `after` has happened. It waits no longer than `limit` for the
    /// event, unless that is another operation's, and then at each step for other ranks.
    fn submit(&self, request: Request, after: Event, limit: Limit) -> Submitted;

    /// Runs an operation now; it has ended when this returns.
    fn run(&self, request: Request, limit: Limit) -> Result<(), Error>;

    /// The first message that a receive would take which is called now: from a rank, or from any.
    fn probe(&self, from: Option<usize>, tag: u32) -> Result<Option<Envelope>, Error>;

    /// Gives every rank the words of all, one rank's after the other's; each has as many, at most
    /// 64. The memory goes back with [`Transport::put_back`].
    fn exchange(&self, words: &[u64], purpose: Purpose, limit: Limit) -> Result<Vec<u64>, Error>;

    /// Takes memory back for the next exchange.
    fn put_back(&self, words: Vec<u64>);

    /// Zeroed memory of `device`, the same on every rank. Not of a device that cannot use it.
    fn allocate(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error>;

    /// The same, of this rank alone.
    fn allocate_alone(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error>;

    /// A window's memory, and how the ranks take turns with it.
    fn window(
        self: Arc<Self>,
        device: &dyn Device,
        dtype: DType,
        len: usize,
        sections: Option<&Sections>,
    ) -> Result<(Buffer, Box<dyn Turns>), Error>;

    /// The ranks `ranks` of these, which alone call this; `job` describes them.
    fn group(&self, ranks: &[usize], job: &Job) -> Result<Arc<dyn Transport>, Error>;

    /// The first error here, if there was one.
    fn healthy(&self) -> Result<(), Error>;

    /// Looks at the other ranks of this host now, whatever they are doing. `op` names what this
    /// rank is doing.
    ///
    /// # Errors
    /// The first error here; of a rank that died or gave up, which this one remembers then.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "GPUs alone wait where nobody looks"))]
    fn look(&self, op: &dyn Fn() -> String) -> Result<(), Error>;

    /// Remembers an error, and tells other ranks what they would not learn otherwise. Returns the
    /// first error.
    fn fail(&self, error: Error) -> Error;

    /// The same, because of the work that an operation of this rank follows.
    fn fail_after(&self, failure: Failure) -> Error;

    /// Gives up, and tells every rank why.
    fn abort(&self, reason: &str);

    /// What moves elements, in words.
    fn mover(&self) -> String {
        "the host".to_owned()
    }

    /// What has been moved so far.
    fn traffic(&self) -> Traffic;

    fn record(&self) -> &Record;

    /// Waits for what is in flight, and lets go of the other ranks.
    fn close(&self);
}

/// How the ranks of a host take turns with a window.
pub(crate) trait Turns: Send + Sync {
    /// Blocks until every rank has released `gathers` gathers.
    fn wait(&self, gathers: u64) -> Result<(), Error>;

    /// Says that this rank has.
    fn release(&self, gathers: u64);
}
