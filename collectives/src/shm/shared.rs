//! What a rank's threads share.
//!
//! Each channel has a lane: the operations that are under way or wait for their turn, the first of each being driven by whoever holds the lane.
//! That is the progress thread ([`super::progress`]), or, on an idle channel, a thread that blocks on its operation anyway
//! ([`super::caller`]). New operations arrive in an inbox, so that nobody waits for a lane to hand one over.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pillion_kernels::Failure;

use super::arena::{Allocator, Mapping};
use super::control::{CHANNELS, Channel, RankControl, ring, state, subject};
use super::flight::Flight;
use super::mail::{MailFlight, Mailroom};
use super::protocol::Word;
use super::record::Record;
use crate::hosts::Hosts;
use crate::pending::Outcomes;
use crate::{Error, Options};

/// What the threads of one rank share. Ranks are counted as those of this host here; `Hosts` knows the others.
pub(crate) struct Shared {
    pub(crate) map: Arc<Mapping>,
    pub(crate) rank: usize,
    pub(crate) hosts: Hosts,
    pub(crate) options: Options,
    pub(crate) allocator: Allocator,
    pub(crate) mail: Mailroom,
    pub(super) lanes: [Mutex<Lane>; CHANNELS],
    pub(super) inboxes: [Inbox<Flight>; CHANNELS],
    stages: [OnceLock<u64>; CHANNELS],
    /// What reductions between hosts work in, kept from one to the next.
    pub(crate) work: [Mutex<Vec<u64>>; CHANNELS],
    /// What operations used that have ended, for the next ones.
    pub(crate) outcomes: Outcomes,
    pub(crate) words: Words,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    pub(super) stopping: AtomicBool,
    /// Whether there are more ranks than processors, so that who waits must let others run.
    pub(super) crowded: AtomicBool,
    /// One for each channel, and one for messages.
    traffic: [Traffic; CHANNELS + 1],
    pub(crate) record: Record,
}

/// What has been completed.
#[derive(Default)]
struct Traffic {
    operations: AtomicU64,
    bytes: AtomicU64,
}

/// One channel as this rank drives it.
pub(crate) struct Lane {
    pub(super) flights: VecDeque<Flight>,
    pub(super) count: Count,
}

/// Operations in flight on a channel at a time for which there is memory from the start.
pub(crate) const AT_A_TIME: usize = 8;

impl Default for Lane {
    fn default() -> Lane {
        Lane { flights: VecDeque::with_capacity(AT_A_TIME), count: Count::default() }
    }
}

/// How far this rank is on a channel.
#[derive(Default)]
pub(crate) struct Count {
    /// Operations started.
    pub(crate) sequence: u64,
    /// Steps taken.
    pub(crate) steps: u64,
}

/// Memory for scalars, kept from one operation to the next.
#[derive(Default)]
pub(crate) struct Words(Mutex<Vec<u64>>);

impl Words {
    pub(crate) fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.0.lock())
    }

    pub(crate) fn put_back(&self, words: Vec<u64>) {
        *self.0.lock() = words;
    }
}

/// Why what nobody drives any more has failed.
pub(super) fn left() -> Error {
    Error::System { what: "an operation", reason: "this communicator's progress thread has ended".to_owned() }
}

/// What has been handed over and not yet been taken.
pub(super) struct Inbox<F> {
    /// None once nobody looks any more.
    flights: Mutex<Option<Vec<F>>>,
    /// Whether there may be any; written with the lock held.
    some: AtomicBool,
}

impl<F> Default for Inbox<F> {
    fn default() -> Inbox<F> {
        Inbox { flights: Mutex::new(Some(Vec::with_capacity(AT_A_TIME))), some: AtomicBool::default() }
    }
}

impl<F> Inbox<F> {
    /// Whether nothing has arrived, as far as this thread can know.
    pub(super) fn is_empty(&self) -> bool {
        !self.some.load(Ordering::Acquire)
    }

    /// Takes out what has arrived, in order.
    pub(super) fn drain(&self, take: impl FnMut(F)) {
        if self.is_empty() {
            return;
        }
        let mut flights = self.flights.lock();
        self.some.store(false, Ordering::Relaxed);
        // Emptied in place: what comes next needs no memory.
        flights.iter_mut().flat_map(|flights| flights.drain(..)).for_each(take);
    }

    /// Takes out what has arrived; from now on nothing is accepted.
    pub(super) fn close(&self) -> Vec<F> {
        self.flights.lock().take().unwrap_or_default()
    }
}

impl Shared {
    pub(crate) fn new(map: Arc<Mapping>, rank: usize, hosts: Hosts, options: Options) -> Shared {
        Shared {
            allocator: Allocator::default(),
            mail: Mailroom::new(hosts.world()),
            map,
            rank,
            hosts,
            options,
            lanes: Default::default(),
            inboxes: Default::default(),
            stages: Default::default(),
            work: Default::default(),
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
            outcomes: Outcomes::default(),
            words: Words::default(),
            traffic: Default::default(),
            record: Record::default(),
        }
    }

    /// Number of ranks on this host.
    pub(crate) fn world(&self) -> usize {
        self.map.shape().world
    }

    pub(crate) fn control(&self) -> &RankControl {
        self.map.control(self.rank)
    }

    /// A rank of this host, as the communicator counts ranks.
    pub(crate) fn name(&self, rank: usize) -> usize {
        self.hosts.local()[rank]
    }

    /// Whether operations also go to other hosts, through the wire that the progress thread owns.
    pub(crate) fn has_wire(&self) -> bool {
        self.hosts.ranks.len() > 1
    }

    /// The communicator's first error, if it had one.
    pub(crate) fn healthy(&self) -> Result<(), Error> {
        if self.failed.load(Ordering::Acquire) { self.failure.lock().clone().map_or(Ok(()), Err) } else { Ok(()) }
    }

    /// Remembers the first error, and for other ranks, whom it names. What went wrong here alone they are told as an abort: nothing else
    /// would tell them before their deadlines.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            if matches!(error, Error::System { .. } | Error::OutOfMemory { .. } | Error::NotStarted { .. }) {
                self.say_aborted(&error.to_string());
            }
            let culprit = match &error {
                Error::Timeout { waiting_on, .. } => waiting_on.first().copied(),
                Error::PeerLost { rank, .. } | Error::Mismatch { peer: rank, .. } => Some(*rank),
                _ => None,
            };
            self.control().set_culprit(culprit);
        }
        let error = failure.get_or_insert(error).clone();
        self.failed.store(true, Ordering::Release);
        error
    }

    /// As [`Shared::fail`], because of the work that an operation of this rank follows. The ranks
    /// that an error of another communicator names are not ranks of this one, so peers are told
    /// only that this rank gave up.
    pub(crate) fn fail_after(&self, failure: Failure) -> Error {
        let error = Error::from(failure);
        let mut remembered = self.failure.lock();
        let is_first = remembered.is_none();
        let error = remembered.get_or_insert(error).clone();
        self.failed.store(true, Ordering::Release);
        drop(remembered);
        if is_first {
            // Whoever is woken by this finds the failure.
            self.say_aborted(&format!("work that its next operation follows failed (ranks as counted there): {error}"));
        }
        error
    }

    /// Counts an operation of a channel; the caller holds its lane, and nobody else counts there.
    pub(crate) fn count(&self, channel: Channel, bytes: u64) {
        let Traffic { operations, bytes: sum } = &self.traffic[channel as usize];
        operations.store(operations.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        sum.store(sum.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }

    /// Counts a message, which any thread may have driven.
    pub(crate) fn count_message(&self, bytes: u64) {
        let Traffic { operations, bytes: sum } = &self.traffic[CHANNELS];
        operations.fetch_add(1, Ordering::Relaxed);
        sum.fetch_add(bytes, Ordering::Relaxed);
    }

    /// (operations completed, bytes that other ranks took from this one).
    pub(crate) fn traffic(&self) -> (u64, u64) {
        let sum =
            |count: fn(&Traffic) -> &AtomicU64| self.traffic.iter().map(|t| count(t).load(Ordering::Relaxed)).sum();
        (sum(|traffic| &traffic.operations), sum(|traffic| &traffic.bytes))
    }

    /// Where this rank's stage of a channel starts; made when it is first needed.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn stage(&self, channel: Channel, bytes: u64) -> Result<u64, Error> {
        let stage = &self.stages[channel as usize];
        if let Some(&offset) = stage.get() {
            return Ok(offset);
        }
        let offset = self.allocator.arena(bytes);
        self.map.reserve(self.rank, offset, bytes)?;
        Ok(*stage.get_or_init(|| offset))
    }

    /// Tells the peers of this host that this rank has taken a step on a channel.
    pub(crate) fn ring_channel(&self, channel: Channel) {
        <AtomicU64 as Word>::fence();
        for rank in (0..self.world()).filter(|&rank| rank != self.rank) {
            self.ring_rank(rank, channel as usize, channel.subject());
        }
    }

    /// Tells one rank of news, which have been published, about a subject for which its callers sleep at bell `bell`.
    pub(crate) fn ring_rank(&self, rank: usize, bell: usize, subjects: u64) {
        let control = self.map.control(rank);
        ring(&control.callers[bell], subjects);
        ring(&control.progress, subjects);
    }

    /// Tells everybody of something that concerns all waits.
    pub(crate) fn ring_everybody(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        for rank in 0..self.world() {
            let control = self.map.control(rank);
            control.callers.iter().chain([&control.progress]).for_each(|bell| ring(bell, subject::ALL));
        }
    }

    /// Tells this rank's progress thread that there is something to do.
    pub(super) fn ring_progress(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        ring(&self.control().progress, subject::WORK);
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
    pub(crate) fn submit(&self, flight: Flight) {
        let inbox = &self.inboxes[flight.channel() as usize];
        self.hand_over(inbox, flight, |flight, error| flight.finish(Err(error)));
    }

    /// Starts a message to or from another rank.
    pub(super) fn submit_mail(&self, flight: MailFlight) {
        self.hand_over(&self.mail.inbox, flight, |flight, error| flight.finish(Err(error)));
    }

    fn hand_over<F>(&self, inbox: &Inbox<F>, flight: F, refuse: impl FnOnce(F, Error)) {
        let mut flights = inbox.flights.lock();
        let error = match (self.healthy(), flights.as_mut()) {
            (Ok(()), Some(flights)) => {
                flights.push(flight);
                inbox.some.store(true, Ordering::Release);
                None
            }
            (Err(error), _) => Some((flight, error)),
            (Ok(()), None) => Some((flight, left())),
        };
        drop(flights);
        match error {
            None => self.ring_progress(),
            Some((flight, error)) => refuse(flight, error),
        }
    }

    /// Once all have joined: whether they must share processors.
    pub(crate) fn look_at_processors(&self) {
        let union = |word: usize| {
            let masks = (0..self.world()).map(|rank| &self.map.control(rank).processors[word]);
            masks.fold(0, |union, mask| union | mask.load(Ordering::Relaxed))
        };
        let processors: u32 = (0..self.control().processors.len()).map(|word| union(word).count_ones()).sum();
        self.crowded.store(processors > 0 && self.world() > processors as usize, Ordering::Relaxed);
    }

    /// Says where this rank may run.
    pub(super) fn publish_processors(&self) {
        let Ok(set) = rustix::thread::sched_getaffinity(None) else { return };
        for (index, word) in self.control().processors.iter().enumerate() {
            let bits = (0..64).filter(|bit| index * 64 + bit < rustix::thread::CpuSet::MAX_CPU);
            let mask = bits.filter(|bit| set.is_set(index * 64 + bit)).fold(0, |mask, bit| mask | 1 << bit);
            word.store(mask, Ordering::Relaxed);
        }
    }

    /// Tells the progress thread to leave once nothing is in flight.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.ring_progress();
    }

    /// Tells every rank that this one gives up.
    pub(crate) fn abort(&self, reason: &str) {
        self.say_aborted(reason);
        self.fail(Error::Aborted { rank: self.name(self.rank), reason: reason.to_owned() });
    }

    fn say_aborted(&self, reason: &str) {
        let control = self.control();
        control.write_reason(reason);
        control.state.store(state::ABORTED, Ordering::Release);
        self.ring_everybody();
    }
}
