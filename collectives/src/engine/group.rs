//! What a rank's threads share of one group.
//!
//! Each channel has a lane: the operations that are under way or wait for their turn, the first of each being driven by whoever holds the lane.
//! That is the progress thread ([`super::progress`]), or, on an idle channel, a thread that blocks on its operation anyway
//! ([`super::caller`]). New operations arrive in an inbox, so that nobody waits for a lane to hand one over.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pillion_kernels::{Failure, Range};

use super::flight::Flight;
use super::inbox::{AT_A_TIME, Ended, Inbox, left};
use super::mail::{MailFlight, Mailroom};
use crate::engine::{Engine, GONE};
use crate::hosts::Hosts;
use crate::memory::control::{CHANNELS, Channel, GroupControl, RankControl, state, subject};
use crate::memory::mailbox::Mailbox;
use crate::memory::mapping::{Mapping, Members, Words};
use crate::memory::protocol::Word;
use crate::outcome::Outcomes;
use crate::record::Record;
use crate::{Error, Options};

/// What the threads of one rank share of a group. Ranks are counted as its members on this host
/// here; `Hosts` knows the others.
pub(crate) struct Group {
    pub(crate) engine: Arc<Engine>,
    members: Members,
    pub(crate) rank: usize,
    pub(crate) hosts: Hosts,
    pub(crate) options: Options,
    pub(crate) mail: Mailroom,
    pub(crate) lanes: [Mutex<Lane>; CHANNELS],
    pub(crate) inboxes: [Inbox<Flight>; CHANNELS],
    stages: [OnceLock<Range>; CHANNELS],
    /// Where this rank shows where parts lie.
    tables: [OnceLock<Range>; CHANNELS],
    /// What reductions between hosts work in, kept from one to the next.
    pub(crate) work: [Mutex<Vec<u64>>; CHANNELS],
    /// What operations used that have ended, for the next ones.
    pub(crate) outcomes: Outcomes,
    pub(crate) scalars: ScalarMemory,
    /// Operations that the progress thread has been given and has not finished.
    given: AtomicUsize,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    pub(crate) stopping: AtomicBool,
    pub(crate) ended: Ended,
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
    pub(crate) flights: VecDeque<Flight>,
    pub(crate) count: Count,
}

impl Default for Lane {
    fn default() -> Lane {
        Lane { flights: VecDeque::with_capacity(AT_A_TIME), count: Count::default() }
    }
}

/// Memory for scalars, kept from one operation to the next.
#[derive(Default)]
pub(crate) struct ScalarMemory(Mutex<Vec<u64>>);

impl ScalarMemory {
    /// Memory for `count` scalars of each rank. Barriers, which have none, take no lock.
    pub(crate) fn take(&self, count: usize) -> Vec<u64> {
        if count == 0 { Vec::new() } else { std::mem::take(&mut self.0.lock()) }
    }

    pub(crate) fn put_back(&self, words: Vec<u64>) {
        if words.capacity() > 0 {
            *self.0.lock() = words;
        }
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

impl Group {
    /// Of the members of `hosts` that are on this host, whose ranks `members` gives as the engine
    /// counts them, this rank being the `rank`-th; their words are at `words`.
    pub(crate) fn new(
        engine: Arc<Engine>,
        words: Words,
        members: Box<[usize]>,
        rank: usize,
        hosts: Hosts,
        options: Options,
    ) -> Group {
        Group {
            mail: Mailroom::new(hosts.world()),
            members: Members::new(engine.map.clone(), words, members),
            engine,
            rank,
            hosts,
            options,
            lanes: Default::default(),
            inboxes: Default::default(),
            stages: Default::default(),
            tables: Default::default(),
            work: Default::default(),
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            ended: Ended::default(),
            outcomes: Outcomes::default(),
            scalars: ScalarMemory::default(),
            given: AtomicUsize::new(0),
            traffic: Default::default(),
            record: Record::default(),
        }
    }

    /// Number of ranks on this host.
    pub(crate) fn world(&self) -> usize {
        self.members.count()
    }

    /// A member's words.
    pub(crate) fn control(&self, member: usize) -> &GroupControl {
        self.members.group(member)
    }

    /// Where messages from one member to another wait.
    pub(crate) fn mailbox(&self, from: usize, to: usize) -> &Mailbox {
        self.members.mailbox(from, to)
    }

    /// A member's rank, as the engine counts.
    pub(crate) fn local(&self, member: usize) -> usize {
        self.members.local(member)
    }

    /// A member's words as a rank of this host.
    pub(crate) fn rank_control(&self, member: usize) -> &RankControl {
        self.members.rank(member)
    }

    /// The address of a byte of a member's arena.
    pub(crate) fn address(&self, member: usize, offset: u64, bytes: u64) -> NonNull<u8> {
        self.engine.map.address(self.local(member), offset, bytes)
    }

    /// Where an address lies in this rank's arena, if it does.
    pub(crate) fn offset_of(&self, address: NonNull<u8>) -> Option<u64> {
        self.engine.map.offset_of(self.engine.rank, address)
    }

    /// Whether the progress thread has nothing of this group to drive.
    pub(crate) fn is_idle(&self) -> bool {
        self.given.load(Ordering::Acquire) == 0
    }

    /// The progress thread has finished an operation.
    pub(crate) fn took_one(&self) {
        self.given.fetch_sub(1, Ordering::Relaxed);
    }

    /// Says that this rank takes part, and everybody may see it.
    pub(crate) fn declare_joined(&self) {
        // Unless it has failed, or ended, already.
        let state = &self.control(self.rank).state;
        let _ = state.compare_exchange(state::ABSENT, state::JOINED, Ordering::AcqRel, Ordering::Acquire);
        self.ring_everybody();
    }

    /// A rank of this host, as the communicator counts ranks.
    pub(crate) fn name(&self, rank: usize) -> usize {
        self.hosts.local()[rank]
    }

    /// Whether operations also go to other hosts, through the wire that the progress thread owns.
    pub(crate) fn has_wire(&self) -> bool {
        self.hosts.ranks.len() > 1
    }

    /// Whether members read each other's private memory. What also goes to other hosts passes
    /// through the stages.
    pub(crate) fn reads_private(&self) -> bool {
        !self.has_wire() && self.engine.reads_private.load(Ordering::Relaxed)
    }

    /// The communicator's first error, if it had one.
    pub(crate) fn healthy(&self) -> Result<(), Error> {
        if self.failed.load(Ordering::Acquire) {
            return self.failure.lock().clone().map_or(Ok(()), Err);
        }
        self.engine.maker.check()
    }

    /// Remembers the first error, and for other ranks, whom it names. What went wrong here alone they are told as an abort: nothing else
    /// would tell them before their deadlines.
    pub(crate) fn fail(&self, error: Error) -> Error {
        if let Err(error) = self.engine.maker.check() {
            return error;
        }
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
            self.control(self.rank).set_culprit(culprit);
            if let Some(culprit) = culprit.filter(|&rank| rank != self.name(self.rank)) {
                let member = self.hosts.local().iter().position(|&rank| rank == culprit);
                self.rank_control(self.rank).blame(member.map(|member| self.local(member)));
            }
        }
        let error = failure.get_or_insert(error).clone();
        self.set_failed();
        error
    }

    /// As [`Group::fail`], because of the work that an operation of this rank follows. The ranks
    /// that an error of another communicator names are not ranks of this one, so peers are told
    /// only that this rank gave up.
    pub(crate) fn fail_after(&self, failure: Failure) -> Error {
        if let Err(error) = self.engine.maker.check() {
            return error;
        }
        let error = Error::from(failure);
        let mut remembered = self.failure.lock();
        let is_first = remembered.is_none();
        let error = remembered.get_or_insert(error).clone();
        self.set_failed();
        drop(remembered);
        if is_first {
            // Whoever is woken by this finds the failure.
            self.say_aborted(&format!("work that its next operation follows failed (ranks as counted there): {error}"));
        }
        error
    }

    fn set_failed(&self) {
        self.failed.store(true, Ordering::Release);
        self.engine.set_failed();
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
    pub(crate) fn completed(&self) -> (u64, u64) {
        let sum =
            |count: fn(&Traffic) -> &AtomicU64| self.traffic.iter().map(|t| count(t).load(Ordering::Relaxed)).sum();
        (sum(|traffic| &traffic.operations), sum(|traffic| &traffic.bytes))
    }

    /// Where this rank's stage of a channel starts; made when it is first needed.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn stage(&self, channel: Channel, bytes: u64) -> Result<u64, Error> {
        self.made_once(&self.stages[channel as usize], bytes)
    }

    /// The same for the table that this rank shows on a channel.
    pub(crate) fn table(&self, channel: Channel, bytes: u64) -> Result<u64, Error> {
        self.made_once(&self.tables[channel as usize], bytes)
    }

    /// Where a range starts that is made when it is first asked for. Only the thread that drives a
    /// channel asks for the channel's.
    fn made_once(&self, place: &OnceLock<Range>, bytes: u64) -> Result<u64, Error> {
        if let Some(range) = place.get() {
            return Ok(range.offset);
        }
        let range = self.engine.reserve(bytes)?;
        Ok(place.get_or_init(|| range).offset)
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
        self.control(rank).callers[bell].tell(subjects);
        self.rank_control(rank).progress.tell(subjects);
    }

    /// Tells everybody of something that concerns all waits.
    pub(crate) fn ring_everybody(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        for rank in 0..self.world() {
            let progress = &self.rank_control(rank).progress;
            self.control(rank).callers.iter().chain([progress]).for_each(|bell| bell.tell(subject::ALL));
        }
    }

    /// A rank's state, after making sure that it still lives.
    pub(crate) fn look_at(&self, rank: usize) -> u32 {
        let state = &self.control(rank).state;
        match state.load(Ordering::Acquire) {
            // A rank leaves its groups before its life ends in order.
            state::ABSENT | state::JOINED => match self.engine.look_at(self.local(rank)) {
                state::DEAD => state::DEAD,
                has_left => match state.load(Ordering::Acquire) {
                    state::ABSENT | state::JOINED if has_left == state::LEFT => state::LEFT,
                    seen => seen,
                },
            },
            seen => seen,
        }
    }

    /// Puts a flight behind those of its channel.
    pub(crate) fn submit_flight(&self, flight: Flight) {
        let inbox = &self.inboxes[flight.channel() as usize];
        self.hand_over(inbox, flight, |flight, error| flight.finish(Err(error)));
    }

    /// Starts a message to or from another rank.
    pub(crate) fn submit_mail(&self, flight: MailFlight) {
        self.hand_over(&self.mail.inbox, flight, |flight, error| flight.finish(Err(error)));
    }

    fn hand_over<F>(&self, inbox: &Inbox<F>, flight: F, refuse: impl FnOnce(F, Error)) {
        let mut flights = inbox.flights.lock();
        let error = match (self.healthy(), flights.as_mut()) {
            (Ok(()), Some(flights)) => {
                self.given.fetch_add(1, Ordering::Release);
                flights.push(flight);
                inbox.some.store(true, Ordering::Release);
                None
            }
            (Err(error), _) => Some((flight, error)),
            (Ok(()), None) => Some((flight, left())),
        };
        drop(flights);
        match error {
            None => self.engine.ring_progress(),
            Some((flight, error)) => refuse(flight, error),
        }
    }

    /// Tells the progress thread to leave once nothing is in flight.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.engine.ring_progress();
    }

    /// Tells every rank that this one gives up.
    pub(crate) fn abort(&self, reason: &str) {
        if self.engine.maker.is_another() {
            return;
        }
        self.say_aborted(reason);
        self.fail(Error::Aborted { rank: self.name(self.rank), reason: reason.to_owned() });
    }

    /// Tells every rank that this one gives up; the caller returns the error.
    pub(crate) fn say_aborted(&self, reason: &str) {
        self.control(self.rank).abort(reason);
        self.ring_everybody();
    }
}

impl Drop for Group {
    /// Gives back what this group used, as soon as no other member uses it.
    fn drop(&mut self) {
        if *self.failed.get_mut() || self.engine.maker.is_another() {
            // Members may still be about to use it.
            return;
        }
        self.stages
            .iter()
            .chain(&self.tables)
            .filter_map(OnceLock::get)
            .for_each(|&range| self.engine.give_back(range));
        let (words, own, members) = (self.members.words(), self.rank, self.members.count());
        // A member takes a message that is staged when it comes to it, which may be later.
        let is_taken = move |map: &Mapping| {
            (0..members).all(|member| {
                let has_left = || map.group(words, member).state.load(Ordering::Acquire) == state::LEFT;
                !map.mailbox(words, own, member).is_full() || has_left()
            })
        };
        let say_gone = move |map: &Mapping| map.group(words, own).gone.store(GONE, Ordering::Release);
        self.engine.retire(self.mail.take_stages(), is_taken, say_gone);
        if own == 0 {
            self.engine.retire_words(words, members);
        }
    }
}
