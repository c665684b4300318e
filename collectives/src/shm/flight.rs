//! An operation in flight: what was called, which step it is in, and how long it has waited for whom.
//!
//! ```text
//! start     after its event:  write the header, take a step
//! step 0    all ranks there:  compare headers, exchange(0), take a step
//! …
//! last      all ranks there:  done
//! ```
//!
//! An operation whose peers read this rank's memory takes one step more than it has exchanges: the last one says that
//! everybody has read, so the buffers may change hands.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pillion_kernels::{DType, Event};

use super::control::{Call, Channel, ChannelControl, PAYLOAD, monotonic_millis, state};
use super::progress::{Lane, Shared};
use crate::Error;
use crate::pending::Outcome;

/// The operations there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Kind {
    AllGather = 1,
    ReduceScatter,
    AllReduce,
    Broadcast,
    GatherWindow,
    Scalars,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Kind::AllGather => "all-gather",
            Kind::ReduceScatter => "reduce-scatter",
            Kind::AllReduce => "all-reduce",
            Kind::Broadcast => "broadcast",
            Kind::GatherWindow => "window gather",
            Kind::Scalars => "scalar exchange",
        }
    }
}

/// An algorithm: what its header says, and what it does once every rank is there.
pub(crate) trait Collective: Send {
    fn kind(&self) -> Kind;

    /// Type of the elements; none for an operation that moves no buffer.
    fn dtype(&self) -> Option<DType> {
        None
    }

    /// Whether the buffers belong to a device that runs work later; equal on every rank, since such memory has a lock of its own.
    fn is_deferred(&self) -> bool {
        false
    }

    /// Number of elements; equal on every rank.
    fn count(&self) -> usize;

    /// Where peers find this rank's memory, in its arena.
    fn offset(&self) -> u64 {
        0
    }

    /// Writes the values that travel in the header, and returns how many.
    fn payload(&mut self, _words: &mut [u64; PAYLOAD]) -> usize {
        0
    }

    /// Number of exchanges.
    fn exchanges(&self) -> u32;

    /// Whether peers read this rank's arena.
    fn is_read_by_peers(&self) -> bool;

    /// Moves data; all ranks have taken `step + 1` steps of this operation.
    fn exchange(&mut self, step: u32, peers: &Peers<'_>) -> Result<(), Error>;

    /// Bytes that this rank's peers read from it.
    fn bytes_sent(&self, world: usize) -> u64;
}

/// Access to what the other ranks of an operation have published.
pub(crate) struct Peers<'a> {
    pub(crate) shared: &'a Shared,
    channel: Channel,
    sequence: u64,
}

impl Peers<'_> {
    pub(crate) fn rank(&self) -> usize {
        self.shared.rank
    }

    pub(crate) fn world(&self) -> usize {
        self.shared.world()
    }

    /// A value from a rank's header.
    pub(crate) fn payload(&self, rank: usize, index: usize) -> u64 {
        let channel = &self.shared.map.control(rank).channels[self.channel as usize];
        header(channel, self.sequence).payload[index].load(Ordering::Relaxed)
    }

    /// The address of elements of a rank's buffer.
    pub(crate) fn address(
        &self,
        rank: usize,
        dtype: DType,
        first: usize,
        count: usize,
    ) -> Result<std::ptr::NonNull<u8>, Error> {
        let channel = &self.shared.map.control(rank).channels[self.channel as usize];
        let offset = header(channel, self.sequence).read().offset + (first * dtype.bytes()) as u64;
        let bytes = (count * dtype.bytes()) as u64;
        if !self.shared.map.contains(rank, offset, bytes) || !offset.is_multiple_of(dtype.bytes() as u64) {
            let reason = format!("rank {rank} published a buffer outside its arena");
            return Err(Error::System { what: "reading a peer's arena", reason });
        }
        Ok(self.shared.map.address(rank, offset, bytes))
    }
}

fn header(channel: &ChannelControl, sequence: u64) -> &super::control::Header {
    &channel.headers[(sequence % 2) as usize]
}

/// An operation on its way.
pub(crate) struct Flight {
    collective: Box<dyn Collective>,
    channel: Channel,
    after: Event,
    outcome: Arc<Outcome>,
    /// Number on its channel, and the channel's steps once this rank has taken the operation's newest; 0 before the start.
    sequence: u64,
    target: u64,
    /// Steps taken.
    taken: u32,
    /// Ranks whose headers have been compared.
    compared: usize,
    watch: Watch,
    patient: bool,
    delay: Option<Instant>,
}

impl Drop for Flight {
    /// Nobody waits for ever for an operation that a panic has ended; any other end has been set before.
    fn drop(&mut self) {
        let reason = "the progress thread panicked".to_owned();
        self.outcome.set(Err(Error::System { what: "an operation", reason }));
    }
}

impl Flight {
    pub(crate) fn new(
        collective: Box<dyn Collective>,
        channel: Channel,
        after: Event,
        outcome: Arc<Outcome>,
    ) -> Flight {
        let watch = Watch::new(Duration::MAX, false);
        Flight {
            collective,
            channel,
            after,
            outcome,
            sequence: 0,
            target: 0,
            taken: 0,
            compared: 0,
            watch,
            patient: false,
            delay: None,
        }
    }

    /// The same operation, waiting as long as the ranks that it waits for are running: the limit counts only time in which they
    /// are not.
    pub(crate) fn patiently(mut self) -> Flight {
        self.patient = true;
        self
    }

    pub(crate) fn finish(self, result: Result<(), Error>) {
        self.outcome.set(result);
    }

    /// Goes as far as the other ranks allow; true once complete.
    pub(crate) fn poll(&mut self, shared: &Shared, lane: &mut Lane) -> Result<bool, Error> {
        if self.taken == 0 && !self.start(shared, lane)? {
            return Ok(false);
        }
        loop {
            if self.taken == 1 {
                self.compare(shared)?;
            }
            let channel = self.channel as usize;
            let steps = |rank: usize| shared.map.control(rank).channels[channel].steps.load(Ordering::Acquire);
            if let Some(late) = (0..shared.world()).find(|&rank| steps(rank) < self.target) {
                let (target, call) = (self.target, self.call());
                self.watch.check(shared, late, &|rank| steps(rank) < target, &|| describe(call))?;
                return Ok(false);
            }
            let step = self.taken - 1;
            if step < self.collective.exchanges() {
                let peers = Peers { shared, channel: self.channel, sequence: self.sequence };
                self.collective.exchange(step, &peers)?;
            }
            let steps_of_all = self.collective.exchanges().max(1) + u32::from(self.collective.is_read_by_peers());
            if self.taken == steps_of_all {
                shared.count(self.collective.bytes_sent(shared.world()));
                return Ok(true);
            }
            self.step(shared, lane);
        }
    }

    fn start(&mut self, shared: &Shared, lane: &mut Lane) -> Result<bool, Error> {
        if !self.after.advance() {
            return Ok(false);
        }
        // An injected delay, for tests: the operation starts late, everything else goes on.
        let delay = shared.options.delay_of(self.channel);
        if !delay.is_zero() && self.delay.get_or_insert_with(Instant::now).elapsed() < delay {
            return Ok(false);
        }
        lane.sequence += 1;
        self.sequence = lane.sequence;
        let mut payload = [0; PAYLOAD];
        let used = self.collective.payload(&mut payload);
        let own = &shared.map.control(shared.rank).channels[self.channel as usize];
        header(own, self.sequence).write(self.call(), &payload[..used]);
        self.step(shared, lane);
        Ok(true)
    }

    fn step(&mut self, shared: &Shared, lane: &mut Lane) {
        lane.steps += 1;
        self.target = lane.steps;
        self.taken += 1;
        self.watch = Watch::new(shared.options.timeout, self.patient);
        shared.map.control(shared.rank).channels[self.channel as usize].steps.store(lane.steps, Ordering::Release);
        shared.ring_peers();
    }

    fn call(&self) -> Call {
        Call {
            sequence: self.sequence,
            kind: self.collective.kind() as u64,
            dtype: self.collective.dtype().map_or(0, |dtype| 1 + dtype as u64),
            deferred: u64::from(self.collective.is_deferred()),
            count: self.collective.count() as u64,
            offset: self.collective.offset(),
        }
    }

    /// Compares the headers of ranks that have arrived, in order of rank.
    fn compare(&mut self, shared: &Shared) -> Result<(), Error> {
        let ours = self.call();
        while self.compared < shared.world() {
            let rank = self.compared;
            let channel = &shared.map.control(rank).channels[self.channel as usize];
            if channel.steps.load(Ordering::Acquire) < self.target {
                break;
            }
            let theirs = header(channel, self.sequence).read();
            if !theirs.agrees_with(&ours) {
                return Err(Error::Mismatch { ours: describe(ours), theirs: describe(theirs), peer: rank });
            }
            self.compared += 1;
        }
        // A rank further on may already show a mismatch while an earlier one is still on its way: name it now.
        for rank in self.compared..shared.world() {
            let channel = &shared.map.control(rank).channels[self.channel as usize];
            if channel.steps.load(Ordering::Acquire) >= self.target {
                let theirs = header(channel, self.sequence).read();
                if !theirs.agrees_with(&ours) {
                    return Err(Error::Mismatch { ours: describe(ours), theirs: describe(theirs), peer: rank });
                }
            }
        }
        Ok(())
    }
}

fn describe(call: Call) -> String {
    let kinds =
        [Kind::AllGather, Kind::ReduceScatter, Kind::AllReduce, Kind::Broadcast, Kind::GatherWindow, Kind::Scalars];
    let name = kinds.into_iter().find(|&kind| kind as u64 == call.kind).map_or("an unknown operation", Kind::name);
    let dtypes = [DType::F32, DType::Bf16, DType::F64, DType::U32];
    let dtype = dtypes.into_iter().find(|&dtype| 1 + dtype as u64 == call.dtype);
    let elements = dtype.map_or_else(|| call.count.to_string(), |dtype| format!("{} × {dtype}", call.count));
    format!("{name} #{} of {elements}", call.sequence)
}

/// The patience of one wait.
pub(crate) struct Watch {
    limit: Duration,
    patient: bool,
    checked: Instant,
    waited: Duration,
    warned: bool,
}

/// Time between two looks at the other ranks' health.
const CHECK_EVERY: Duration = Duration::from_millis(1);
/// A longer gap between two looks means that this rank itself did not run; only this much of it counts as waiting.
const LONGEST_GAP: Duration = Duration::from_secs(1);

impl Watch {
    /// A wait of at most `limit`; a patient one does not count time in which the rank waited for is running.
    pub(crate) fn new(limit: Duration, patient: bool) -> Watch {
        Watch { limit, patient, checked: Instant::now(), waited: Duration::ZERO, warned: false }
    }

    /// Looks, now and then, whether the wait is in vain. `late` is a rank that is waited for, `is_late` tells it for each.
    pub(crate) fn check(
        &mut self,
        shared: &Shared,
        late: usize,
        is_late: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<(), Error> {
        let gap = self.checked.elapsed();
        if gap < CHECK_EVERY {
            return Ok(());
        }
        self.checked = Instant::now();
        if !(self.patient && is_running(shared, late)) {
            self.waited += gap.min(LONGEST_GAP);
        }
        let states =
            || (0..shared.world()).filter(|&rank| rank != shared.rank).map(|rank| (rank, shared.look_at(rank)));
        if let Some((rank, _)) = states().find(|&(_, state)| state == state::DEAD) {
            return Err(Error::PeerLost { rank, op: op(), how: "it died" });
        }
        if let Some((rank, _)) = states().find(|&(_, state)| state == state::ABORTED) {
            return Err(Error::Aborted { rank, reason: shared.map.control(rank).read_reason() });
        }
        if let Some((rank, _)) = states().find(|&(rank, state)| state == state::LEFT && is_late(rank)) {
            return Err(match shared.map.control(rank).culprit() {
                Some(culprit) if culprit != shared.rank => {
                    Error::PeerLost { rank: culprit, op: op(), how: "another rank gave up on it" }
                }
                _ => Error::PeerLost { rank, op: op(), how: "it left early" },
            });
        }
        if !self.warned && self.waited >= shared.options.warn_after {
            self.warned = true;
            let seconds = self.waited.as_secs_f32();
            let (rank, op, how) = (shared.rank, op(), pulse(shared, late));
            // A closed stderr must not end the thread that says this.
            let _ = writeln!(
                std::io::stderr(),
                "pillion: rank {rank} has waited {seconds:.0} s for rank {late} in {op} ({how})"
            );
        }
        if self.waited >= self.limit {
            let how = pulse(shared, late);
            return Err(Error::Timeout { op: op(), waiting_on: late, seconds: self.waited.as_secs(), how });
        }
        Ok(())
    }
}

/// A heart that has not beaten for longer than this many milliseconds has stopped; it beats every 200.
const STOPPED_AFTER: u64 = 2000;

/// Milliseconds since a rank's heart last beat.
fn pulse_age(shared: &Shared, rank: usize) -> u64 {
    monotonic_millis().saturating_sub(shared.map.control(rank).heartbeat.load(Ordering::Relaxed))
}

fn is_running(shared: &Shared, rank: usize) -> bool {
    shared.map.control(rank).state.load(Ordering::Acquire) == state::JOINED && pulse_age(shared, rank) <= STOPPED_AFTER
}

/// What a rank's heartbeat says about it.
fn pulse(shared: &Shared, rank: usize) -> String {
    if shared.map.control(rank).state.load(Ordering::Acquire) == state::ABSENT {
        return "it has not joined".to_owned();
    }
    match pulse_age(shared, rank) {
        age if age > STOPPED_AFTER => format!("it has not run for {} s: stopped?", age / 1000),
        _ => "it is running".to_owned(),
    }
}
