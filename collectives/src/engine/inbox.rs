//! What one thread hands over to another.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::Error;

/// Operations in flight on a channel at a time for which there is memory from the start.
pub(crate) const AT_A_TIME: usize = 8;

/// What has been handed over and not yet been taken.
pub(crate) struct Inbox<F> {
    /// None once nobody looks any more.
    pub(crate) flights: Mutex<Option<Vec<F>>>,
    /// Whether there may be any; written with the lock held.
    pub(crate) some: AtomicBool,
}

impl<F> Default for Inbox<F> {
    fn default() -> Inbox<F> {
        Inbox { flights: Mutex::new(Some(Vec::with_capacity(AT_A_TIME))), some: AtomicBool::default() }
    }
}

impl<F> Inbox<F> {
    /// Whether nothing has arrived, as far as this thread can know.
    pub(crate) fn is_empty(&self) -> bool {
        !self.some.load(Ordering::Acquire)
    }

    /// Takes out what has arrived, in order.
    pub(crate) fn drain(&self, take: impl FnMut(F)) {
        if self.is_empty() {
            return;
        }
        let mut flights = self.flights.lock();
        self.some.store(false, Ordering::Relaxed);
        // Emptied in place: what comes next needs no memory.
        flights.iter_mut().flat_map(|flights| flights.drain(..)).for_each(take);
    }

    /// Puts one in; gives it back where nothing is accepted any more.
    pub(crate) fn put(&self, flight: F) -> Result<(), F> {
        let mut flights = self.flights.lock();
        let Some(flights) = flights.as_mut() else { return Err(flight) };
        flights.push(flight);
        self.some.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes out what has arrived; from now on nothing is accepted.
    pub(crate) fn close(&self) -> Vec<F> {
        self.flights.lock().take().unwrap_or_default()
    }
}

/// Why what nobody drives any more has failed.
pub(crate) fn left() -> Error {
    Error::System { what: "an operation", reason: "this communicator's progress thread has ended".to_owned() }
}

/// Whether the progress thread has let go of a group.
#[derive(Default)]
pub(crate) struct Ended(Mutex<bool>, Condvar);

/// Says so when it is dropped.
pub(super) struct WhenDropped<'a>(&'a Ended);

impl Drop for WhenDropped<'_> {
    fn drop(&mut self) {
        *self.0.0.lock() = true;
        self.0.1.notify_all();
    }
}

impl Ended {
    pub(super) fn when_dropped(&self) -> WhenDropped<'_> {
        WhenDropped(self)
    }

    pub(crate) fn wait(&self) {
        let mut ended = self.0.lock();
        self.1.wait_while(&mut ended, |ended| !*ended);
    }
}
