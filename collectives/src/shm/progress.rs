//! What a rank's threads share, and the thread that drives its operations.
//!
//! Each channel has a queue of flights; the first of each is under way. The progress thread polls the channels in turn, and
//! when nothing moves spins for a moment, then sleeps at its bell, which peers ring when they take a step that it waits for.
//! A blocking call on an idle channel is driven by its own thread instead, since handing it over would cost two switches.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::arena::{Allocator, Mapping};
use super::control::{
    CHANNELS, Channel, MAIL_BELL, RankControl, WINDOW_BELL, monotonic_millis, ring, sleep, state, subject,
};
use super::flight::{Collective, Course, Flight};
use super::mail::{MailFlight, Mailroom};
use super::protocol::{Bell, Word};
use super::watch::Watch;
use crate::hosts::Hosts;
use crate::wire::Wire;
use crate::{Error, Options};

/// How long a caller, which has nothing else to do, looks for news before it sleeps.
const CALLER_SPIN: Duration = Duration::from_micros(200);
/// After this long it lets others run between looks.
const CALLER_POLITE: Duration = Duration::from_micros(10);
/// How long the progress thread does, which may take a core from computation. Waking costs about as much.
const PROGRESS_SPIN: Duration = Duration::from_micros(10);
/// Longest sleep with operations in flight: the time to notice that a peer has died.
const NAP: Duration = Duration::from_millis(5);
/// Longest sleep with messages to other hosts in flight, of which nobody tells this thread.
const WIRE_NAP: Duration = Duration::from_micros(30);
/// Longest sleep without: the heartbeat's period.
const REST: Duration = Duration::from_millis(200);

/// What the threads of one rank share. Ranks are counted as those of this host here; `Hosts` knows the others.
pub(crate) struct Shared {
    pub(crate) map: Arc<Mapping>,
    pub(crate) rank: usize,
    pub(crate) hosts: Hosts,
    pub(crate) options: Options,
    pub(crate) allocator: Allocator,
    pub(crate) mail: Mailroom,
    lanes: [Mutex<Lane>; CHANNELS],
    stages: [OnceLock<u64>; CHANNELS],
    /// What reductions between hosts work in, kept from one to the next.
    pub(crate) work: [Mutex<Vec<u64>>; CHANNELS],
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    stopping: AtomicBool,
    /// Whether there are more ranks than processors, so that who waits must let others run.
    crowded: AtomicBool,
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

/// Tells the other ranks when the thread that drives an operation panics: they would wait for its steps.
struct AbortOnPanic<'a>(&'a Shared);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("it panicked");
        }
    }
}

/// What one turn of the progress thread found.
#[derive(Default)]
struct Turn {
    moved: bool,
    /// Subjects of which news may move something.
    waiting_for: u64,
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
            stages: Default::default(),
            work: Default::default(),
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
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
            if matches!(error, Error::System { .. } | Error::OutOfMemory { .. }) {
                self.say_aborted(&error.to_string());
            }
            let culprit = match error {
                Error::PeerLost { rank, .. }
                | Error::Timeout { waiting_on: rank, .. }
                | Error::Mismatch { peer: rank, .. } => Some(rank),
                _ => None,
            };
            self.control().set_culprit(culprit);
        }
        let error = failure.get_or_insert(error).clone();
        self.failed.store(true, Ordering::Release);
        error
    }

    pub(crate) fn count(&self, bytes: u64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// (operations completed, bytes that other ranks took from this one).
    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.operations.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
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

    fn ring_progress(&self) {
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
        if let Err(error) = self.healthy() {
            return flight.finish(Err(error));
        }
        let mut lane = self.lanes[flight.channel() as usize].lock();
        // Again, now that the lane cannot be given up in between.
        if let Err(error) = self.healthy() {
            drop(lane);
            return flight.finish(Err(error));
        }
        lane.flights.push_back(flight);
        drop(lane);
        self.ring_progress();
    }

    /// Starts a message to or from another rank.
    pub(crate) fn submit_mail(&self, flight: MailFlight) {
        if let Err(error) = self.healthy() {
            return flight.finish(Err(error));
        }
        let mut flights = self.mail.flights.lock();
        if let Err(error) = self.healthy() {
            drop(flights);
            return flight.finish(Err(error));
        }
        flights.push(flight);
        drop(flights);
        self.ring_progress();
    }

    /// Runs an operation on the calling thread until it is complete, when its channel is idle; none when it is not, and when messages to
    /// other hosts belong to it, which only the progress thread can send.
    pub(crate) fn run_here(
        &self,
        channel: Channel,
        collective: &mut dyn Collective,
        patient: bool,
    ) -> Option<Result<(), Error>> {
        let lane = self.lanes[channel as usize].try_lock().filter(|lane| lane.flights.is_empty() && !self.has_wire());
        let mut lane = lane.filter(|_| self.options.delay_of(channel).is_zero())?;
        let mut course = Course::new(collective, channel, patient);
        let _guard = AbortOnPanic(self);
        let bell = &self.control().callers[channel as usize];
        let poll = || course.poll(collective, self, &mut lane, None).map(|done| done.then_some(()));
        Some(self.wait(bell, channel.subject(), poll).map_err(|error| self.fail(error)))
    }

    /// As [`Shared::run_here`], for a message.
    pub(crate) fn run_mail_here(&self, mut flight: MailFlight) {
        if self.has_wire() {
            return self.submit_mail(flight);
        }
        let _guard = AbortOnPanic(self);
        let bell = &self.control().callers[MAIL_BELL];
        let result = self.wait(bell, subject::MAIL, || flight.poll(self, None).map(|done| done.then_some(())));
        flight.finish(result.map_err(|error| self.fail(error)));
    }

    /// Polls until `poll` has a value: spins for a moment, then sleeps between polls until there is news about `subjects`.
    ///
    /// Two threads that sleep at one bell can hide each other's interest; each then looks again after a nap.
    fn wait<T>(
        &self,
        bell: &Bell<AtomicU32>,
        subjects: u64,
        mut poll: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let mut poll = || self.healthy().and_then(|()| poll());
        loop {
            let mut spinning = None;
            loop {
                for _ in 0..32 {
                    if let Some(value) = poll()? {
                        return Ok(value);
                    }
                    self.relax();
                }
                let spun = spinning.get_or_insert_with(Instant::now).elapsed();
                if spun > CALLER_SPIN {
                    break;
                } else if spun > CALLER_POLITE {
                    // Whom this rank waits for may have been put on the same processor.
                    std::thread::yield_now();
                }
            }
            let seen = bell.prepare(subjects);
            match poll() {
                Ok(None) => sleep(bell, seen, NAP),
                Ok(Some(value)) => {
                    bell.awake();
                    return Ok(value);
                }
                Err(error) => {
                    bell.awake();
                    return Err(error);
                }
            }
        }
    }

    /// A moment of spinning: with more ranks than processors, whom this one waits for may need this one.
    fn relax(&self) {
        if self.crowded.load(Ordering::Relaxed) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }

    /// Blocks until no rank of this host is `late` any more.
    ///
    /// # Errors
    /// When the rank waited for is lost, or does not come before the deadline.
    pub(crate) fn wait_for_ranks(&self, op: &str, limit: Duration, late: impl Fn(usize) -> bool) -> Result<(), Error> {
        self.healthy()?;
        let mut watch = Watch::new(limit, false);
        let poll = || match (0..self.world()).find(|&rank| late(rank)) {
            None => Ok(Some(())),
            Some(rank) => watch.check(self, rank, &late, &|| op.to_owned()).map(|()| None),
        };
        let bell = &self.control().callers[WINDOW_BELL];
        self.wait(bell, subject::WINDOW, poll).map_err(|error| self.fail(error))
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

    fn publish_processors(&self) {
        let Ok(set) = rustix::thread::sched_getaffinity(None) else { return };
        for (index, word) in self.control().processors.iter().enumerate() {
            let bits = (0..64).filter(|bit| index * 64 + bit < rustix::thread::CpuSet::MAX_CPU);
            let mask = bits.filter(|bit| set.is_set(index * 64 + bit)).fold(0, |mask, bit| mask | 1 << bit);
            word.store(mask, Ordering::Relaxed);
        }
    }

    /// Polls every channel that nobody else drives, and the mail.
    fn drive(&self, wire: &mut Option<Box<dyn Wire>>) -> Turn {
        let mut turn = Turn::default();
        for (channel, lane) in [Channel::Gather, Channel::Reduce, Channel::Control].into_iter().zip(&self.lanes) {
            let Some(mut lane) = lane.try_lock() else { continue };
            while let Some(mut flight) = lane.flights.pop_front() {
                match self.healthy().and_then(|()| flight.poll(self, &mut lane, wire.as_deref_mut())) {
                    Ok(false) => {
                        lane.flights.push_front(flight);
                        turn.waiting_for |= channel.subject();
                        break;
                    }
                    Ok(true) => flight.finish(Ok(())),
                    Err(error) => flight.finish(Err(self.fail(error))),
                }
                turn.moved = true;
            }
        }
        let mut mail = self.mail.flights.lock();
        let mut index = 0;
        while index < mail.len() {
            match self.healthy().and_then(|()| mail[index].poll(self, wire.as_deref_mut())) {
                Ok(false) => {
                    index += 1;
                    turn.waiting_for |= subject::MAIL;
                    continue;
                }
                Ok(true) => mail.remove(index).finish(Ok(())),
                Err(error) => mail.remove(index).finish(Err(self.fail(error))),
            }
            turn.moved = true;
        }
        turn
    }

    /// The progress thread: declares the rank joined, drives its operations, and leaves in order once told to stop.
    pub(crate) fn run(&self, mut wire: Option<Box<dyn Wire>>) {
        let control = self.control();
        // SAFETY: once per rank, on fresh memory, before the state says so; the mapping outlives this thread's use of it, being
        // held by `self`.
        if let Err(error) = unsafe { control.life.begin() } {
            control.write_reason(&error.to_string());
            self.fail(error);
            control.state.store(state::ABORTED, Ordering::Release);
            return self.ring_everybody();
        }
        self.publish_processors();
        control.state.store(state::JOINED, Ordering::Release);
        self.ring_everybody();
        let driven = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.drive_until_stopped(&mut wire)));
        if driven.is_err() {
            // The panic has been printed. Nothing may wait for this thread any more, here or elsewhere.
            self.abort("its progress thread panicked");
            for lane in &self.lanes {
                lane.lock().flights.drain(..).for_each(|flight| flight.finish(self.healthy()));
            }
            self.mail.flights.lock().drain(..).for_each(|flight| flight.finish(self.healthy()));
        }
        if let (Some(wire), Err(error)) = (&mut wire, self.healthy()) {
            wire.abort(&error.to_string());
        }
        let _ = control.state.compare_exchange(state::JOINED, state::LEFT, Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: this thread began it.
        unsafe { control.life.end() };
        self.ring_everybody();
    }

    fn drive_until_stopped(&self, wire: &mut Option<Box<dyn Wire>>) {
        let control = self.control();
        let mut spinning: Option<Instant> = None;
        let mut told = false;
        loop {
            control.heartbeat.store(monotonic_millis(), Ordering::Relaxed);
            let turn = self.drive(wire);
            if let (Some(wire), Err(error), false) = (wire.as_mut(), self.healthy(), told) {
                wire.abort(&error.to_string());
                told = true;
            }
            if turn.moved {
                spinning = None;
                continue;
            }
            if turn.waiting_for == 0 && self.stopping.load(Ordering::Acquire) {
                break;
            }
            let in_flight = turn.waiting_for != 0;
            if in_flight && spinning.get_or_insert_with(Instant::now).elapsed() < PROGRESS_SPIN {
                self.relax();
                continue;
            }
            spinning = None;
            let declared = turn.waiting_for | subject::WORK;
            let seen = control.progress.prepare(declared);
            // A last look, now that who has news would ring. What it starts to wait for has not been declared.
            let turn = self.drive(wire);
            if turn.moved
                || turn.waiting_for & !declared != 0
                || (turn.waiting_for == 0 && self.stopping.load(Ordering::Acquire))
            {
                control.progress.awake();
                continue;
            }
            // An operation whose event needs this thread's help (a deferring queue) rings no bell, so such waits are polled.
            let nap = if !in_flight {
                REST
            } else if wire.is_some() {
                WIRE_NAP
            } else {
                NAP
            };
            sleep(&control.progress, seen, nap);
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
