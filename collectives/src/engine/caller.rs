//! Threads that wait for their own operation drive it themselves: handing it over to the progress thread would cost two switches.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::flight::{Algorithm, Course};
use super::group::{Group, Lane};
use super::mail::MailFlight;
use super::progress::{AbortOnPanic, NAP};
use super::watch::Watch;
use crate::Error;
use crate::memory::control::{Channel, MAIL_BELL, WINDOW_BELL, subject};
use crate::memory::protocol::{Bell, wait_at};
use crate::transport::Limit;

/// How long a caller, which has nothing else to do, looks for news before it sleeps.
const CALLER_SPIN: Duration = Duration::from_micros(200);
/// Looks without a pause between them: a pause takes up to 140 cycles, a barrier about 1,000.
const BRISK: u32 = 64;
/// After this long it lets others run between looks.
const CALLER_POLITE: Duration = Duration::from_micros(10);

impl Group {
    /// Runs an operation on the calling thread until it is complete, when its channel is idle; none when it is not, and when messages to
    /// other hosts belong to it, which only the progress thread can send.
    pub(crate) fn run_here(
        &self,
        channel: Channel,
        algorithm: &mut dyn Algorithm,
        limit: Limit,
    ) -> Option<Result<(), Error>> {
        if self.has_wire() || !self.options.delay_of(channel).is_zero() {
            return None;
        }
        let inbox = &self.inboxes[channel as usize];
        let idle = |lane: &Lane| lane.flights.is_empty() && inbox.is_empty();
        // Who has the lane is looking at it, or has an operation of its own, which this one follows in any case.
        let mut lane = Some(self.lanes[channel as usize].lock()).filter(|lane| idle(lane))?;
        let mut course = Course::new(algorithm.call(), channel, limit);
        let _guard = AbortOnPanic::new(self);
        let bell = &self.control(self.rank).callers[channel as usize];
        let poll = || course.poll(algorithm, self, &mut lane.count, None).map(|done| done.then_some(()));
        let result = self.wait(bell, channel.subject(), poll).map_err(|error| self.fail(error));
        drop(lane);
        if !inbox.is_empty() {
            // The progress thread could not have this lane when they came. (Where this look may overtake the unlocking, it finds out after a nap.)
            self.engine.ring_progress();
        }
        Some(result)
    }

    /// Starts a message, which then goes on by itself. A short one is put out or taken at once, if it can be.
    pub(crate) fn start_mail(&self, mut flight: MailFlight) {
        if flight.is_short() && !self.has_wire() {
            let _guard = AbortOnPanic::new(self);
            match self.healthy().and_then(|()| flight.poll(self, None, None)) {
                Ok(false) => {}
                Ok(true) => return flight.finish(Ok(())),
                Err(error) => return flight.finish(Err(self.fail(error))),
            }
        }
        self.submit_mail(flight);
    }

    /// As [`Group::run_here`], for a message.
    pub(crate) fn run_mail_here(&self, mut flight: MailFlight) {
        if self.has_wire() {
            return self.submit_mail(flight);
        }
        let _guard = AbortOnPanic::new(self);
        let bell = &self.control(self.rank).callers[MAIL_BELL];
        let result = self.wait(bell, subject::MAIL, || flight.poll(self, None, None).map(|done| done.then_some(())));
        flight.finish(result.map_err(|error| self.fail(error)));
    }

    /// Polls until `poll` has a value: spins for a moment, then sleeps between polls until there is news about `subjects`.
    fn wait<T>(
        &self,
        bell: &Bell<AtomicU32>,
        subjects: u64,
        mut poll: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let (mut spins, mut spinning) = (0u32, None);
        let spin = || {
            spins += 1;
            if spins > BRISK || self.engine.crowded.load(Ordering::Relaxed) {
                self.engine.relax();
            }
            // Asking for the time takes as long as some looks.
            if !spins.is_multiple_of(32) {
                return true;
            }
            let spun = spinning.get_or_insert_with(Instant::now).elapsed();
            if spun > CALLER_SPIN {
                spinning = None;
                return false;
            }
            if spun > CALLER_POLITE {
                // Whom this rank waits for may have been put on the same processor.
                std::thread::yield_now();
            }
            true
        };
        wait_at(bell, subjects, NAP, spin, || self.healthy().and_then(|()| poll()))
    }

    /// Blocks until no rank of this host is `late` any more.
    ///
    /// # Errors
    /// When the rank waited for is lost, or does not come before the deadline.
    pub(crate) fn wait_for_ranks(&self, op: &str, limit: Duration, late: impl Fn(usize) -> bool) -> Result<(), Error> {
        self.healthy()?;
        let mut watch = Watch::new(Limit::within(limit));
        let poll = || match (0..self.world()).find(|&rank| late(rank)) {
            None => Ok(Some(())),
            Some(rank) => watch.check(self, rank, &late, &|| op.to_owned()).map(|()| None),
        };
        let bell = &self.control(self.rank).callers[WINDOW_BELL];
        self.wait(bell, subject::WINDOW, poll).map_err(|error| self.fail(error))
    }
}
