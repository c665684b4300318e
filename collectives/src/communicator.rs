//! The ranks that talk: how they meet, the memory that they share, and how they part.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pillion_kernels::{Buffer, DType, Device};

#[cfg(feature = "cuda")]
use crate::GpuTransport;
use crate::call::Purpose;
use crate::checks::expect;
use crate::join::{self, Job, Joined};
use crate::launch::{self, Source};
use crate::limits::explain_thread;
use crate::memory::control::state;
use crate::transport::{Capabilities, Limit, Transport};
use crate::wire::tcp::{Attempt, GIVE_UP_WITHIN};
use crate::{Backend, Error, Launch, Options, Recorded, Sections, Store, Window, WireKind};

/// How often a rank that waits for others at the start looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a communicator has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations completed.
    pub operations: u64,
    /// Bytes that other ranks took from this one.
    pub bytes: u64,
}

/// How long the other ranks wait after their deadline for rank 0 to say who did not come.
const FIRST_SPEAKS: Duration = Duration::from_secs(2);

/// Ranks that talk.
///
/// Every rank makes the same calls in the same order; a rank that does not is named by an error. After an error every call
/// returns that first error. Dropping a communicator waits for the operations in flight.
pub struct Communicator {
    pub(crate) transport: Arc<dyn Transport>,
    job: Job,
    splits: AtomicU64,
    /// Windows made so far.
    windows: AtomicU64,
    /// How many groups of the same members this rank has made.
    groups: Mutex<HashMap<Vec<usize>, u64>>,
}

impl Communicator {
    /// Joins the ranks of `launch`'s job.
    ///
    /// # Errors
    /// [`Error::Options`] for what cannot be, [`Error::Rendezvous`] or [`Error::Timeout`] when the
    /// ranks do not all come in time, [`Error::PeerLost`] for a rank that ends meanwhile,
    /// [`Error::Interrupted`] once [`Options::stop`] is raised, [`Error::System`] when the host
    /// refuses memory or a thread. The other ranks are told of the first and the last, and return
    /// [`Error::Aborted`].
    pub fn connect(launch: &Launch, options: Options) -> Result<Communicator, Error> {
        let job = Job::of(launch);
        options.check(launch).map_err(|error| join::decline(&job, error))?;
        Communicator::start(job, options)
    }

    /// Joins `world` ranks, of which this is rank `rank`, through a store. No launcher need have
    /// started them. The ranks that count themselves to one host ([`Options::host`]) share memory,
    /// and hosts are connected over TCP.
    ///
    /// All ranks call this as often as each other. Communicators that are made one after the other
    /// may use the same store. Different sets of ranks that use one store at the same time need
    /// keys of their own there. Whoever can read the store can join, so the store keeps strangers
    /// out.
    ///
    /// No rank looks at the store once this has returned on every rank, and rank 0 may drop a
    /// [`TcpStore`](crate::TcpStore) once it has returned there.
    ///
    /// This call gives up three times [`Options::startup_timeout`] and 15 s after its start if the
    /// ranks have not met by then. It may take 10 s more to tell the other ranks why this one
    /// cannot join.
    ///
    /// A store may be silent for longer, such as a [`TcpStore`](crate::TcpStore) with a longer
    /// limit of its own, whose rank 0 is absent. Then a thread stays behind until the store
    /// answers. It begins no further call that sets a value. A call that hangs may still set its
    /// value later: a meeting at that moment may fail, and the next one does not.
    ///
    /// # Errors
    /// As for [`Communicator::connect`], and those of the store. [`Error::Rendezvous`] names the
    /// ranks that did not come within [`Options::startup_timeout`]. Where ranks have different
    /// settings, all ranks return an error that names the setting and both values. Where rank 0 is
    /// told to end, the ranks that have come return [`Error::Aborted`], and a thread of rank 0
    /// keeps the store for up to 2 s, so that they can read it.
    pub fn connect_through(
        store: Arc<dyn Store>,
        rank: usize,
        world: usize,
        options: Options,
    ) -> Result<Communicator, Error> {
        expect(world > 0, || "a job of 0 ranks: give the number of all ranks, with this one".to_owned())?;
        expect(world <= launch::MOST_RANKS, || {
            format!("a job of {world} ranks, and at most {} can meet: give the number of all ranks", launch::MOST_RANKS)
        })?;
        expect(rank < world, || {
            format!("rank {rank} of {world} ranks: ranks are counted from 0, so give a lower one")
        })?;
        let variable = |name: &str| std::env::var(name).ok();
        let job = "through the store".to_owned();
        let host = options.host.clone().or_else(|| variable(launch::HOST));
        let interface = options.interface.clone().or_else(|| variable(launch::INTERFACE));
        let (local_rank, local_world, source) = (rank, world, Source::Local);
        let launch = Launch { rank, world, local_rank, local_world, job, source, host, interface, meeting: None };
        let attempt = Attempt::new(store, options.stop.clone());
        let job = Job { attempt: Some(Arc::new(attempt)), ..Job::of(&launch) };
        options.check_through(world).map_err(|error| join::decline(&job, error))?;
        if world == 1 {
            let launch = Launch { host: launch.host, interface: launch.interface, ..Launch::single() };
            return Communicator::start(Job::of(&launch), Options { backend: Backend::Auto, ..options });
        }
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
        let (for_thread, startup, stop) = (job.clone(), options.startup_timeout, options.stop.clone());
        let is_stopped = || stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        let progress = std::thread::Builder::new()
            .name(format!("pillion-progress-{}", job.launch.rank))
            .spawn(move || {
                let joined = join::join(&for_thread, options);
                // Nobody looks at a store any more, which its owner may want to end.
                drop(for_thread);
                match joined {
                    Ok(Joined { group, wire, network }) => {
                        let engine = group.engine.clone();
                        engine.open(group.clone(), wire);
                        // Where nobody listens any more, this thread has been given up, and the
                        // rank has failed.
                        engine.run(|begun| sender.send(begun.map(|()| (group, network))).is_ok());
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            })
            .map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })
            .map_err(|error| join::decline(&job, error))?;
        // Every phase of joining has the limit of its own, but for what MPI does, which has none; then the thread is left behind.
        let give_up = if job.attempt.is_some() { GIVE_UP_WITHIN } else { Duration::ZERO };
        let (started, limit) = (Instant::now(), startup.saturating_mul(3).saturating_add(give_up));
        let give_up = || job.attempt.iter().for_each(|attempt| attempt.give_up());
        let joined = loop {
            match receiver.recv_timeout(LOOK_EVERY) {
                // Whatever the progress thread says of it.
                Ok(Err(_)) if is_stopped() => return Err(Error::Interrupted),
                Ok(joined) => break joined,
                Err(RecvTimeoutError::Timeout) if is_stopped() => {
                    give_up();
                    return Err(Error::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) if started.elapsed() < limit => {}
                Err(RecvTimeoutError::Timeout) => {
                    give_up();
                    let reason = match &job.attempt {
                        Some(attempt) if !attempt.has_met() => {
                            "the store does not answer: is it there, and is rank 0, where rank 0 serves it?"
                        }
                        _ => "the other ranks did not answer: were they all started by the same launcher?",
                    };
                    return Err(job.fail(reason.to_owned()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(job.fail("the progress thread panicked".to_owned()));
                }
            }
        };
        let (group, network) = joined.map_err(|error| join::decline(&job, error))?;
        let engine = group.engine.clone();
        engine.set_thread(progress);
        let communicator = Communicator::of(group.clone(), Job { network, attempt: None, ..job });
        group.declare_joined();
        let absent = |rank: usize| group.control(rank).state.load(Ordering::Acquire) == state::ABSENT;
        let wait_until_none_is = |late: &dyn Fn(usize) -> bool| {
            // Rank 0 serves the others. At its deadline it says who did not come.
            let limit = if group.rank == 0 { startup } else { startup.saturating_add(FIRST_SPEAKS) };
            group.wait_for_ranks("the start", limit, |rank| late(rank) && !is_stopped())?;
            if (0..group.world()).any(late) { Err(Error::Interrupted) } else { Ok(()) }
        };
        // Rank 0 joins last, so it is late only because of others.
        wait_until_none_is(&|rank| rank > 0 && absent(rank))?;
        wait_until_none_is(&absent)?;
        engine.look_at_processors();
        engine.try_private_memory(group.options.reads_private);
        group.ring_everybody();
        let unsaid = |rank: usize| group.rank_control(rank).process.verdict().is_none();
        wait_until_none_is(&unsaid)?;
        engine.agree_on_private_memory();
        Ok(communicator)
    }

    fn of(transport: Arc<dyn Transport>, job: Job) -> Communicator {
        let (splits, windows) = (AtomicU64::new(0), AtomicU64::new(0));
        Communicator { transport, job, splits, windows, groups: Mutex::default() }
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.job.launch.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.job.launch.world
    }

    /// What moves the bytes: never [`Backend::Auto`].
    pub fn backend(&self) -> Backend {
        let hosts = self.transport.hosts();
        match (hosts.ranks.len(), hosts.are_single(), self.wire()) {
            (1, ..) => Backend::Shm,
            (_, true, WireKind::Tcp) => Backend::Tcp,
            (_, true, _) => Backend::Mpi,
            _ => Backend::Hierarchical,
        }
    }

    /// What connects hosts, where there are several: never [`WireKind::Auto`].
    pub fn wire(&self) -> WireKind {
        let &Options { wire, backend, simulated_hosts, .. } = self.transport.options();
        // What stands for a network between threads counts as MPI.
        if simulated_hosts > 1 { WireKind::Mpi } else { wire.of(&self.job.launch, backend) }
    }

    /// Number of hosts over which the ranks are spread; every rank counts as one
    /// under [`Backend::Mpi`] and [`Backend::Tcp`].
    pub fn hosts(&self) -> usize {
        self.transport.hosts().ranks.len()
    }

    /// What it can do beyond moving and combining elements.
    pub fn capabilities(&self) -> Capabilities {
        self.transport.capabilities()
    }

    /// What moves elements, in words for people.
    pub fn mover(&self) -> String {
        self.transport.mover()
    }

    /// Whether nothing has failed here so far.
    ///
    /// # Errors
    /// The first error, which every later call returns too.
    pub fn healthy(&self) -> Result<(), Error> {
        self.transport.healthy()
    }

    /// What has been moved so far.
    pub fn traffic(&self) -> Traffic {
        self.transport.traffic()
    }

    /// Whether operations that start from now on are recorded, but for messages; [`Communicator::recorded`] has them.
    pub fn record(&self, wanted: bool) {
        self.transport.record().set_wanted(wanted);
    }

    /// The operations that were recorded and have ended since this was last asked: those of one kind in the order of their calls.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.transport.record().take()
    }

    /// A communicator of these ranks of this one, numbered in this order. They alone call this, all
    /// with the same list, and ranks that share several groups make them in the same order. A group
    /// costs some pages of memory and no thread. Its operations and failures are its own. Operations
    /// of any communicator of the job use memory in place that any other has allocated.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a list without this rank, with a rank twice, or with one that there is
    /// not. This communicator's first error: [`Error::Timeout`] where members do not come within
    /// [`Options::startup_timeout`]. Between hosts also [`Error::Rendezvous`].
    pub fn group(&self, ranks: &[usize]) -> Result<Communicator, Error> {
        let (transport, job) = self.make_group(ranks)?;
        Ok(Communicator::of(transport, job))
    }

    /// The transport of a group, and the ranks as they are numbered there.
    fn make_group(&self, ranks: &[usize]) -> Result<(Arc<dyn Transport>, Job), Error> {
        for (index, &rank) in ranks.iter().enumerate() {
            self.check_rank("a group with", rank)?;
            expect(!ranks[..index].contains(&rank), || format!("a group of ranks {ranks:?} has rank {rank} twice"))?;
        }
        let own = ranks.iter().position(|&rank| rank == self.rank());
        let Some(own) = own else {
            let reason = format!("rank {} makes a group of ranks {ranks:?}: only members make it", self.rank());
            return Err(Error::Misuse { reason });
        };
        self.healthy()?;
        let key = self.key_of(ranks);
        let job = Job {
            launch: Launch { rank: own, world: ranks.len(), ..self.job.launch.clone() },
            name: format!("{}+{key:x}", self.job.name),
            ranks: ranks.iter().map(|&rank| self.job.ranks[rank]).collect(),
            key,
            ..self.job.clone()
        };
        Ok((self.transport.group(ranks, &job)?, job))
    }

    /// A communicator of the same ranks whose buffers are memory of GPUs: this rank's are `gpu`'s.
    /// Every rank calls it, with the same `by`. It gathers, reduce-scatters, all-reduces and
    /// broadcasts sums of f32 and bf16, and exchanges scalars; other operations are
    /// [`Error::Misuse`].
    ///
    /// By [`GpuTransport::Peer`], the ranks are on one host, as threads of one process or as a
    /// process each; they may share a GPU. Sums have the bits of shared memory's. By
    /// [`GpuTransport::Nccl`], ranks may be on several hosts, and each has a GPU of its own. Sums are
    /// in NCCL's order, but for those of a [`Sideband`](crate::Sideband), which are in order of
    /// rank.
    ///
    /// A rank's calls, those that exchange scalars included, have one order, whatever threads make
    /// them, and it is the same on every rank.
    ///
    /// A call returns once every rank has made it and its work is enqueued. An operation's event is
    /// one of the GPU's, so a stream of `gpu` follows it without the host.
    ///
    /// # Errors
    /// [`Error::Misuse`] where some ranks share a process and others do not, or GPUs do not reach
    /// each other's memory, or share one by NCCL; [`Error::System`] where the driver refuses to
    /// share memory, and for what NCCL says; this communicator's first error.
    #[cfg(feature = "cuda")]
    pub fn between_gpus(&self, gpu: &pillion_kernels::Cuda, by: GpuTransport) -> Result<Communicator, Error> {
        expect(self.hosts() == 1 || by != GpuTransport::Peer, || {
            format!(
                "ranks on {} hosts: GPUs read each other's memory on one host alone; NCCL serves several",
                self.hosts()
            )
        })?;
        let all: Vec<usize> = (0..self.world()).collect();
        // A group has operations and failures of its own.
        let (control, job) = self.make_group(&all)?;
        let groups = self.transport.options().reduce_groups;
        let transport = crate::gpus::Gpus::connect(control, gpu, self.rank(), groups, by, self.limit())?;
        Ok(Communicator::of(transport, job))
    }

    /// What tells the next group of these ranks from others of the job, the same on every member.
    fn key_of(&self, ranks: &[usize]) -> u64 {
        let mut groups = self.groups.lock();
        let number = groups.entry(ranks.to_vec()).or_default();
        *number += 1;
        let mut hasher = DefaultHasher::new();
        (self.job.key, ranks, *number).hash(&mut hasher);
        hasher.finish().max(1)
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
            return Err(self.transport.fail(Error::Mismatch { ours: call(number), theirs: call(all[peer][3]), peer }));
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
        self.transport.allocate(device, dtype, len)
    }

    /// As [`Communicator::allocate`], by this rank alone, of any size. Two ranks that ask at the
    /// same moment may both find memory that is enough for one.
    ///
    /// # Errors
    /// This communicator's first error; [`Error::OutOfMemory`], which leaves it as it was;
    /// [`Error::Misuse`] between GPUs.
    pub fn allocate_alone(&self, device: &dyn Device, dtype: DType, len: usize) -> Result<Buffer, Error> {
        self.transport.allocate_alone(device, dtype, len)
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
        let memory = self.transport.clone().window(device, dtype, len, sections.as_ref())?;
        let number = self.windows.fetch_add(1, Ordering::Relaxed);
        Ok(Window::new(self.transport.clone(), self.rank(), number, memory, sections))
    }

    /// Gives up: every call here and, once it next waits, on every other rank returns [`Error::Aborted`] with this reason.
    pub fn abort(&self, reason: &str) {
        self.transport.abort(reason);
    }

    /// How long operations wait that say nothing of it.
    pub(crate) fn limit(&self) -> Limit {
        Limit::within(self.transport.options().timeout)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.transport.abort("it panicked");
        }
        self.transport.close();
    }
}
