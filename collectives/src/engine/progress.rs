//! The thread that drives the operations of a rank which nobody waits for with a thread of its own.
//!
//! It polls the channels of the rank's groups in turn, and when nothing moves spins for a moment,
//! then sleeps at its bell, which peers ring when they take a step that it waits for.

use std::cell::OnceCell;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::flight::Flight;
use super::group::{Group, Lane};
use super::inbox::left;
use super::mail::MailFlight;
use crate::Error;
use crate::engine::{Arrival, Engine};
use crate::memory::control::{Channel, monotonic_millis, state, subject};
use crate::wire::Wire;
use crate::wire::poller::Poller;

/// Longest sleep with operations in flight: the time to notice that a peer has died.
pub(crate) const NAP: Duration = Duration::from_millis(5);
/// How long this thread looks for news before it sleeps, which may take a core from computation.
/// Waking costs about as much.
const PROGRESS_SPIN: Duration = Duration::from_micros(10);
/// The same with messages to other hosts in flight, if the operations before were [`BRIEF`]: the
/// poller takes longer to wake this thread than a brief message takes to come.
const WIRE_SPIN: Duration = Duration::from_micros(50);
/// Longest wait, from the first look that finds nothing to the end of an operation, that is brief.
const BRIEF: Duration = Duration::from_micros(500);
/// First sleep with messages to other hosts in flight, where nobody tells this thread of them.
const WIRE_NAP: Duration = Duration::from_micros(30);
/// Longest such sleep: each that finds nothing is twice as long as the one before. A message that
/// takes long needs few looks, which take a core from computation; a link of 10 Gbit/s moves 1.2 MB
/// meanwhile, which the kernel's buffers hold.
const LONGEST_WIRE_NAP: Duration = Duration::from_micros(960);
/// Longest sleep without: the heartbeat's period.
const REST: Duration = Duration::from_millis(200);

/// Tells the other ranks when the thread that drives an operation panics: they would wait for its
/// steps.
pub(crate) struct AbortOnPanic<'a> {
    group: &'a Group,
    /// Whether the thread was panicking before.
    panicking: bool,
}

impl AbortOnPanic<'_> {
    pub(crate) fn new(group: &Group) -> AbortOnPanic<'_> {
        AbortOnPanic { group, panicking: std::thread::panicking() }
    }
}

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.panicking {
            self.group.abort("it panicked");
        }
    }
}

/// What one turn found.
#[derive(Clone, Copy, Default)]
struct Turn {
    moved: bool,
    /// Subjects of which news may move something.
    waiting_for: u64,
}

impl Engine {
    /// The progress thread: declares the rank joined, drives the operations of its groups, and
    /// leaves in order once the last has been dropped. `begun` is called first, and says whether to
    /// go on.
    pub(crate) fn run(self: &Arc<Self>, begun: impl FnOnce(Result<(), Error>) -> bool) {
        let control = self.control();
        let _ = self.driver.set(std::thread::current().id());
        // SAFETY: once per rank, on fresh memory, before the state says so; the mapping outlives
        // this thread's use of it, being held by `self`.
        let life = unsafe { control.life.begin() };
        let is_alive = life.is_ok();
        if let Err(error) = &life {
            self.map.group(self.map.shape().all(), self.rank).abort(&error.to_string());
        }
        self.publish_processors();
        control.process.show();
        if is_alive {
            control.state.store(state::JOINED, Ordering::Release);
        }
        if begun(life) && is_alive {
            let mut driver =
                Driver { engine: self, waker: Waker::from(self.clone()), groups: Vec::new(), poller: OnceCell::new() };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.drive())).is_err() {
                // The panic has been printed.
                driver.groups.iter().for_each(|group| group.group.abort("its progress thread panicked"));
            }
            // Nothing may wait for what nobody drives any more.
            driver.groups.drain(..).for_each(Driven::end);
        }
        let _ = control.state.compare_exchange(state::JOINED, state::LEFT, Ordering::AcqRel, Ordering::Acquire);
        self.arrivals.close().into_iter().for_each(|arrival| Driven::new(arrival).end());
        if is_alive {
            // SAFETY: this thread began it.
            unsafe { control.life.end() };
        }
    }
}

impl Group {
    /// Ends what is in flight, tells the other members that this rank leaves, and whoever drops the
    /// communicator that it may.
    pub(crate) fn end(&self, mut wire: Option<Box<dyn Wire>>, mail: Vec<MailFlight>) {
        // Whoever drops the communicator waits for this, whatever a foreign waker does.
        let _ended = self.ended.when_dropped();
        let result = || Err(self.healthy().err().unwrap_or_else(left));
        for (lane, inbox) in self.lanes.iter().zip(&self.inboxes) {
            let arrived = inbox.close();
            let flights: Vec<Flight> = lane.lock().flights.drain(..).chain(arrived).collect();
            flights.into_iter().for_each(|flight| flight.finish(result()));
        }
        mail.into_iter().chain(self.mail.inbox.close()).for_each(|flight| flight.finish(result()));
        if let (Some(wire), Err(error)) = (&mut wire, self.healthy()) {
            wire.abort(&error.to_string());
        }
        drop(wire);
        let state = &self.control(self.rank).state;
        let _ = state.compare_exchange(state::JOINED, state::LEFT, Ordering::AcqRel, Ordering::Acquire);
        self.ring_everybody();
    }
}

/// A group, and what the progress thread alone has of it.
struct Driven {
    group: Arc<Group>,
    wire: Option<Box<dyn Wire>>,
    /// Whether the other hosts have been told of a failure.
    told: bool,
    /// Messages in flight.
    mail: Vec<MailFlight>,
    /// Whether something waited for another host when this group was last looked at.
    on_wire: bool,
}

impl Driven {
    fn new(Arrival { group, wire }: Arrival) -> Driven {
        Driven { group, wire, told: false, mail: Vec::new(), on_wire: false }
    }

    fn end(self) {
        let end = std::panic::AssertUnwindSafe(|| self.group.end(self.wire, self.mail));
        // A panic has been printed, and concerns no other group.
        let _ = std::panic::catch_unwind(end);
    }

    /// Polls every channel that nobody else drives, and the mail.
    fn turn(&mut self, waker: &Waker) -> Turn {
        let (group, mut turn) = (&self.group, Turn::default());
        self.on_wire = false;
        if let (Some(wire), Err(error), false) = (self.wire.as_mut(), group.healthy(), self.told) {
            wire.abort(&error.to_string());
            self.told = true;
        }
        if group.is_idle() {
            return turn;
        }
        for (channel, lane) in [Channel::Gather, Channel::Reduce, Channel::Control].into_iter().zip(&group.lanes) {
            let inbox = &group.inboxes[channel as usize];
            let Some(mut lane) = lane.try_lock() else {
                if !inbox.is_empty() {
                    // Whoever drives this channel says when it has finished.
                    turn.waiting_for |= channel.subject();
                }
                continue;
            };
            inbox.drain(|flight| lane.flights.push_back(flight));
            let Lane { flights, count } = &mut *lane;
            while let Some(flight) = flights.front_mut() {
                let result =
                    match group.healthy().and_then(|()| flight.poll(group, count, self.wire.as_deref_mut(), waker)) {
                        Ok(false) => {
                            turn.waiting_for |= channel.subject();
                            break;
                        }
                        Ok(true) => Ok(()),
                        Err(error) => Err(group.fail(error)),
                    };
                if let Some(flight) = flights.pop_front() {
                    group.took_one();
                    flight.finish(result);
                }
                turn.moved = true;
            }
        }
        group.mail.inbox.drain(|flight| self.mail.push(flight));
        let mut index = 0;
        while let Some(flight) = self.mail.get_mut(index) {
            let result = match group.healthy().and_then(|()| flight.poll(group, self.wire.as_deref_mut(), Some(waker)))
            {
                Ok(false) => {
                    index += 1;
                    turn.waiting_for |= subject::MAIL;
                    continue;
                }
                Ok(true) => Ok(()),
                Err(error) => Err(group.fail(error)),
            };
            group.took_one();
            self.mail.remove(index).finish(result);
            turn.moved = true;
        }
        self.on_wire = turn.waiting_for != 0 && self.wire.is_some();
        turn
    }
}

/// The progress thread of a rank, and what it alone has.
struct Driver<'a> {
    engine: &'a Arc<Engine>,
    /// Rings the bell at which this thread sleeps.
    waker: Waker,
    groups: Vec<Driven>,
    /// Rings that bell too. Started by the first wait for a socket; `None` where it cannot be.
    poller: OnceCell<Option<Poller>>,
}

impl Driver<'_> {
    /// Lets every group go as far as it can.
    fn turn(&mut self) -> Turn {
        let mut turn = Turn::default();
        self.engine.arrivals.drain(|arrival| self.groups.push(Driven::new(arrival)));
        let mut index = 0;
        while let Some(group) = self.groups.get_mut(index) {
            // Before the inboxes are looked at: what was handed over before the end was asked for
            // is still driven.
            let stopping = group.group.stopping.load(Ordering::Acquire);
            // What panics here is a callback, an observer or a mistake of ours: this group's alone.
            let turn_of_group = std::panic::AssertUnwindSafe(|| group.turn(&self.waker));
            let Ok(of_group) = std::panic::catch_unwind(turn_of_group) else {
                group.group.abort("its progress thread panicked");
                self.groups.swap_remove(index).end();
                turn.moved = true;
                continue;
            };
            turn.moved |= of_group.moved;
            turn.waiting_for |= of_group.waiting_for;
            if stopping && !of_group.moved && of_group.waiting_for == 0 {
                self.groups.swap_remove(index).end();
                turn.moved = true;
            } else {
                index += 1;
            }
        }
        turn
    }

    /// Lets a poller ring for the wires that something waits for. Returns whether it will ring for
    /// each of them.
    fn arm(&mut self) -> bool {
        let mut wires = self.groups.iter_mut().filter(|group| group.on_wire).filter_map(|group| group.wire.as_mut());
        wires.all(|wire| {
            let poller = || self.poller.get_or_init(|| start_poller(&self.waker, self.engine.rank)).as_ref();
            wire.has_sockets() && poller().is_some_and(|poller| wire.arm(poller))
        })
    }

    /// Whether something waits for another host.
    fn is_on_wire(&self) -> bool {
        self.groups.iter().any(|group| group.on_wire)
    }

    /// Whether the last communicator has been dropped.
    fn is_last(&self) -> bool {
        self.groups.is_empty() && self.engine.open.load(Ordering::Acquire) == 0
    }

    fn drive(&mut self) {
        let (engine, control) = (self.engine, self.engine.control());
        let mut spinning: Option<Instant> = None;
        let (mut waiting, mut was_brief): (Option<Instant>, bool) = (None, true);
        let mut wire_nap = WIRE_NAP / 2;
        loop {
            control.heartbeat.store(monotonic_millis(), Ordering::Relaxed);
            let turn = self.turn();
            if turn.moved {
                was_brief = waiting.take().is_none_or(|since| since.elapsed() < BRIEF);
                (spinning, wire_nap) = (None, WIRE_NAP / 2);
                continue;
            }
            if self.is_last() {
                break;
            }
            let in_flight = turn.waiting_for != 0;
            waiting = waiting.or_else(|| in_flight.then(Instant::now));
            let spin = if was_brief && self.is_on_wire() { WIRE_SPIN } else { PROGRESS_SPIN };
            if in_flight && spinning.get_or_insert_with(Instant::now).elapsed() < spin {
                engine.relax();
                continue;
            }
            spinning = None;
            let declared = turn.waiting_for | subject::WORK;
            control.progress.rest(declared, || {
                let turn = self.turn();
                // What it starts to wait for has not been declared.
                if turn.moved || turn.waiting_for & !declared != 0 || self.is_last() {
                    return None;
                }
                Some(if !in_flight {
                    REST
                } else if self.is_on_wire() && !self.arm() {
                    wire_nap = (2 * wire_nap).min(LONGEST_WIRE_NAP);
                    wire_nap
                } else {
                    // A peer that dies rings no bell, so this thread looks at the others now and
                    // then.
                    NAP
                })
            });
        }
    }
}

/// Where no poller can be started, this thread looks at the sockets after naps instead.
fn start_poller(waker: &Waker, rank: usize) -> Option<Poller> {
    let poller = Poller::start(waker.clone());
    if let Err(error) = &poller {
        // A closed stderr must not end the thread that says this.
        let _ = writeln!(std::io::stderr(), "pillion: rank {rank} looks at its sockets after naps: {error}");
    }
    poller.ok()
}
