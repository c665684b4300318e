//! What a rank's threads share, and the thread that drives its operations.
//!
//! Each channel has a queue of flights; the first of each is under way. The progress thread polls the channels in turn, and
//! when nothing moves spins for a moment, then sleeps on this rank's doorbell, which peers ring with every step they
//! take. A blocking call on an idle channel is driven by its own thread instead, since handing it over would cost two switches.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::arena::Mapping;
use super::control::{CHANNELS, Channel, monotonic_millis, state};
use super::flight::{Flight, Watch};
use crate::{Error, Options};

/// How long to look for news before sleeping. Waking costs about as much, so this at most doubles the price of a wait.
const SPIN: Duration = Duration::from_micros(10);
/// Longest sleep with operations in flight: the time to notice that a peer has died.
const NAP: Duration = Duration::from_millis(5);
/// Longest sleep without: the heartbeat's period.
const REST: Duration = Duration::from_millis(200);

/// What the threads of one rank share.
pub(crate) struct Shared {
    pub(crate) map: Arc<Mapping>,
    pub(crate) rank: usize,
    pub(crate) options: Options,
    lanes: [Mutex<Lane>; CHANNELS],
    failure: Mutex<Option<Error>>,
    stopping: AtomicBool,
    operations: AtomicU64,
    bytes: AtomicU64,
}

/// One channel as this rank drives it.
#[derive(Default)]
pub(crate) struct Lane {
    flights: VecDeque<Flight>,
    /// Operations started.
    pub(crate) sequence: u64,
    /// Steps taken.
    pub(crate) steps: u64,
}

impl Shared {
    pub(crate) fn new(map: Arc<Mapping>, rank: usize, options: Options) -> Shared {
        Shared {
            map,
            rank,
            options,
            lanes: Default::default(),
            failure: Mutex::new(None),
            stopping: AtomicBool::new(false),
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    pub(crate) fn world(&self) -> usize {
        self.map.shape().world
    }

    /// The communicator's first error, if it had one.
    pub(crate) fn healthy(&self) -> Result<(), Error> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    /// Remembers the first error, and for other ranks, whom it names.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            let culprit = match error {
                Error::PeerLost { rank, .. }
                | Error::Timeout { waiting_on: rank, .. }
                | Error::Mismatch { peer: rank, .. } => Some(rank),
                _ => None,
            };
            self.map.control(self.rank).set_culprit(culprit);
        }
        failure.get_or_insert(error).clone()
    }

    pub(crate) fn count(&self, bytes: u64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// (operations completed, bytes that peers read from this rank).
    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.operations.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    pub(crate) fn ring_peers(&self) {
        for rank in (0..self.world()).filter(|&rank| rank != self.rank) {
            self.map.control(rank).ring();
        }
    }

    /// A rank's state, after making sure that it still lives.
    pub(crate) fn look_at(&self, rank: usize) -> u32 {
        let control = self.map.control(rank);
        let seen = control.state.load(Ordering::Acquire);
        if seen != state::JOINED {
            return seen;
        }
        // SAFETY: a joined rank has begun its life (acquire above, release in `run`).
        if unsafe { control.life.has_ended() } {
            let _ = control.state.compare_exchange(state::JOINED, state::DEAD, Ordering::AcqRel, Ordering::Acquire);
        }
        control.state.load(Ordering::Acquire)
    }

    /// Puts a flight behind those of its channel.
    pub(crate) fn submit(&self, channel: Channel, flight: Flight) {
        if let Err(error) = self.healthy() {
            return flight.finish(Err(error));
        }
        self.lanes[channel as usize].lock().flights.push_back(flight);
        self.map.control(self.rank).ring();
    }

    /// Runs a flight on the calling thread when its channel is idle; false, and hands it to the progress thread, when not.
    pub(crate) fn run_here(&self, channel: Channel, mut flight: Flight) -> bool {
        if let Err(error) = self.healthy() {
            flight.finish(Err(error));
            return true;
        }
        let mut lane = self.lanes[channel as usize].lock();
        if !lane.flights.is_empty() {
            lane.flights.push_back(flight);
            drop(lane);
            self.map.control(self.rank).ring();
            return false;
        }
        let result = self.wait_for_news(|| flight.poll(self, &mut lane).map(|done| done.then_some(())));
        flight.finish(result.map_err(|error| self.fail(error)));
        true
    }

    /// Polls until `poll` has a value: spins for a moment, then sleeps between polls.
    fn wait_for_news<T>(&self, mut poll: impl FnMut() -> Result<Option<T>, Error>) -> Result<T, Error> {
        let control = self.map.control(self.rank);
        loop {
            let seen = control.doorbell.load(Ordering::Acquire);
            self.healthy()?;
            if let Some(value) = poll()? {
                return Ok(value);
            }
            let spinning = Instant::now();
            while control.doorbell.load(Ordering::Acquire) == seen && spinning.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            control.sleep(seen, NAP);
        }
    }

    /// Blocks until no rank is `late` any more.
    ///
    /// # Errors
    /// When the rank waited for is lost, or does not come before the deadline.
    pub(crate) fn wait_for_ranks(&self, op: &str, limit: Duration, late: impl Fn(usize) -> bool) -> Result<(), Error> {
        self.healthy()?;
        let mut watch = Watch::new(limit);
        let poll = || match (0..self.world()).find(|&rank| late(rank)) {
            None => Ok(Some(())),
            Some(rank) => watch.check(self, rank, &late, &|| op.to_owned()).map(|()| None),
        };
        self.wait_for_news(poll).map_err(|error| self.fail(error))
    }

    /// Polls every channel that nobody else drives; (something moved, something is in flight).
    fn drive(&self) -> (bool, bool) {
        let (mut moved, mut in_flight) = (false, false);
        for lane in &self.lanes {
            let Some(mut lane) = lane.try_lock() else { continue };
            while let Some(mut flight) = lane.flights.pop_front() {
                let result = self.healthy().and_then(|()| flight.poll(self, &mut lane));
                match result {
                    Ok(false) => {
                        lane.flights.push_front(flight);
                        in_flight = true;
                        break;
                    }
                    Ok(true) => flight.finish(Ok(())),
                    Err(error) => flight.finish(Err(self.fail(error))),
                }
                moved = true;
            }
        }
        (moved, in_flight)
    }

    /// The progress thread: declares the rank joined, drives its operations, and leaves in order once told to stop.
    pub(crate) fn run(&self) {
        let control = self.map.control(self.rank);
        // SAFETY: once per rank, on fresh memory, before the state says so; the mapping outlives this thread's use of it, being
        // held by `self`.
        if let Err(error) = unsafe { control.life.begin() } {
            self.fail(error);
            control.write_reason("it could not make a robust mutex");
            control.state.store(state::ABORTED, Ordering::Release);
            return;
        }
        control.state.store(state::JOINED, Ordering::Release);
        self.ring_peers();
        // An operation whose event needs this thread's help (a deferring queue) rings no bell, so such waits are polled.
        loop {
            control.heartbeat.store(monotonic_millis(), Ordering::Relaxed);
            let seen = control.doorbell.load(Ordering::Acquire);
            let (moved, in_flight) = self.drive();
            if moved {
                continue;
            }
            if !in_flight && self.stopping.load(Ordering::Acquire) {
                break;
            }
            let spinning = Instant::now();
            while in_flight && control.doorbell.load(Ordering::Acquire) == seen && spinning.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            control.sleep(seen, if in_flight { NAP } else { REST });
        }
        let _ = control.state.compare_exchange(state::JOINED, state::LEFT, Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: this thread began it.
        unsafe { control.life.end() };
        self.ring_peers();
    }

    /// Tells the progress thread to leave once nothing is in flight.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.map.control(self.rank).ring();
    }

    /// Tells every rank that this one gives up.
    pub(crate) fn abort(&self, reason: &str) {
        let control = self.map.control(self.rank);
        control.write_reason(reason);
        control.state.store(state::ABORTED, Ordering::Release);
        self.fail(Error::Aborted { rank: self.rank, reason: reason.to_owned() });
        self.ring_peers();
        control.ring();
    }
}
