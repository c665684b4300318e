//! The thread that drives the operations of a rank which nobody waits for with a thread of its own.
//!
//! It polls the channels in turn, and when nothing moves spins for a moment, then sleeps at its bell, which peers ring when they take a step
//! that it waits for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::caller::NAP;
use super::control::{Channel, monotonic_millis, sleep, state, subject};
use super::flight::Flight;
use super::mail::MailFlight;
use super::shared::{Lane, Shared, left};
use crate::wire::Wire;

/// How long this thread looks for news before it sleeps, which may take a core from computation. Waking costs about as much.
const PROGRESS_SPIN: Duration = Duration::from_micros(10);
/// First sleep with messages to other hosts in flight, of which nobody tells this thread.
const WIRE_NAP: Duration = Duration::from_micros(30);
/// Longest such sleep: each that finds nothing is twice as long as the one before. A message that takes long needs few looks, which take a core from
/// computation; a link of 10 Gbit/s moves 1.2 MB meanwhile, which the kernel's buffers hold.
const LONGEST_WIRE_NAP: Duration = Duration::from_micros(960);
/// Longest sleep without: the heartbeat's period.
const REST: Duration = Duration::from_millis(200);

/// Tells the other ranks when the thread that drives an operation panics: they would wait for its steps.
pub(super) struct AbortOnPanic<'a> {
    shared: &'a Shared,
    /// Whether the thread was panicking before.
    panicking: bool,
}

impl AbortOnPanic<'_> {
    pub(super) fn new(shared: &Shared) -> AbortOnPanic<'_> {
        AbortOnPanic { shared, panicking: std::thread::panicking() }
    }
}

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.panicking {
            self.shared.abort("it panicked");
        }
    }
}

/// What one turn found.
#[derive(Default)]
struct Turn {
    moved: bool,
    /// Subjects of which news may move something.
    waiting_for: u64,
}

impl Shared {
    /// The progress thread: declares the rank joined, drives its operations, and leaves in order once told to stop.
    pub(crate) fn run(self: &Arc<Self>, wire: Option<Box<dyn Wire>>) {
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
        let mut driver = Driver { shared: self, waker: Waker::from(self.clone()), wire, mail: Vec::new() };
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.drive())).is_err() {
            // The panic has been printed.
            self.abort("its progress thread panicked");
        }
        // Nothing may wait for what nobody drives any more.
        let result = || Err(self.healthy().err().unwrap_or_else(left));
        for (lane, inbox) in self.lanes.iter().zip(&self.inboxes) {
            let arrived = inbox.close();
            let flights: Vec<Flight> = lane.lock().flights.drain(..).chain(arrived).collect();
            flights.into_iter().for_each(|flight| flight.finish(result()));
        }
        let mail = std::mem::take(&mut driver.mail).into_iter().chain(self.mail.inbox.close());
        mail.for_each(|flight| flight.finish(result()));
        if let (Some(wire), Err(error)) = (&mut driver.wire, self.healthy()) {
            wire.abort(&error.to_string());
        }
        let _ = control.state.compare_exchange(state::JOINED, state::LEFT, Ordering::AcqRel, Ordering::Acquire);
        // SAFETY: this thread began it.
        unsafe { control.life.end() };
        self.ring_everybody();
    }
}

/// The progress thread of a rank, and what it alone has.
struct Driver<'a> {
    shared: &'a Shared,
    /// Rings the bell at which this thread sleeps.
    waker: Waker,
    wire: Option<Box<dyn Wire>>,
    /// Messages in flight.
    mail: Vec<MailFlight>,
}

impl Driver<'_> {
    /// Polls every channel that nobody else drives, and the mail.
    fn turn(&mut self) -> Turn {
        let (shared, mut turn) = (self.shared, Turn::default());
        for (channel, lane) in [Channel::Gather, Channel::Reduce, Channel::Control].into_iter().zip(&shared.lanes) {
            let inbox = &shared.inboxes[channel as usize];
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
                let result = match shared
                    .healthy()
                    .and_then(|()| flight.poll(shared, count, self.wire.as_deref_mut(), &self.waker))
                {
                    Ok(false) => {
                        turn.waiting_for |= channel.subject();
                        break;
                    }
                    Ok(true) => Ok(()),
                    Err(error) => Err(shared.fail(error)),
                };
                if let Some(flight) = flights.pop_front() {
                    flight.finish(result);
                }
                turn.moved = true;
            }
        }
        shared.mail.inbox.drain(|flight| self.mail.push(flight));
        let mut index = 0;
        while let Some(flight) = self.mail.get_mut(index) {
            match shared.healthy().and_then(|()| flight.poll(shared, self.wire.as_deref_mut(), Some(&self.waker))) {
                Ok(false) => {
                    index += 1;
                    turn.waiting_for |= subject::MAIL;
                    continue;
                }
                Ok(true) => self.mail.remove(index).finish(Ok(())),
                Err(error) => self.mail.remove(index).finish(Err(shared.fail(error))),
            }
            turn.moved = true;
        }
        turn
    }

    fn drive(&mut self) {
        let (shared, control) = (self.shared, self.shared.control());
        let mut spinning: Option<Instant> = None;
        let mut told = false;
        let mut wire_nap = WIRE_NAP / 2;
        loop {
            control.heartbeat.store(monotonic_millis(), Ordering::Relaxed);
            // Before the inboxes are looked at: what was handed over before the end was asked for is still driven.
            let stopping = shared.stopping.load(Ordering::Acquire);
            let turn = self.turn();
            if let (Some(wire), Err(error), false) = (self.wire.as_mut(), shared.healthy(), told) {
                wire.abort(&error.to_string());
                told = true;
            }
            if turn.moved {
                (spinning, wire_nap) = (None, WIRE_NAP / 2);
                continue;
            }
            if turn.waiting_for == 0 && stopping {
                break;
            }
            let in_flight = turn.waiting_for != 0;
            if in_flight && spinning.get_or_insert_with(Instant::now).elapsed() < PROGRESS_SPIN {
                shared.relax();
                continue;
            }
            spinning = None;
            let declared = turn.waiting_for | subject::WORK;
            let seen = control.progress.prepare(declared);
            // A last look, now that who has news would ring. What it starts to wait for has not been declared.
            let turn = self.turn();
            if turn.moved
                || turn.waiting_for & !declared != 0
                || (turn.waiting_for == 0 && shared.stopping.load(Ordering::Acquire))
            {
                control.progress.awake();
                continue;
            }
            // A peer that dies rings no bell, so this thread looks at the others now and then.
            let nap = if !in_flight {
                REST
            } else if self.wire.is_some() {
                wire_nap = (2 * wire_nap).min(LONGEST_WIRE_NAP);
                wire_nap
            } else {
                NAP
            };
            sleep(&control.progress, seen, nap);
        }
    }
}
