//! One attempt to meet through a store. Calls of a store may block for as long as they like, so a
//! rank that gives up leaves the thread behind that calls. That thread begins no other call that
//! sets a value, because the rank's next attempt uses the same keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::{Error, Store};

/// How often a rank that waits for its store looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A rank's attempt to meet the others through a store.
pub(crate) struct Attempt {
    pub(super) store: Arc<dyn Store>,
    /// As [`Options::stop`](crate::Options::stop).
    stop: Option<Arc<AtomicBool>>,
    has_met: AtomicBool,
    is_given_up: AtomicBool,
}

impl Attempt {
    pub(crate) fn new(store: Arc<dyn Store>, stop: Option<Arc<AtomicBool>>) -> Attempt {
        let (has_met, is_given_up) = (AtomicBool::new(false), AtomicBool::new(false));
        Attempt { store, stop, has_met, is_given_up }
    }

    /// Whether the ranks have met. Then no rank looks at the store any more.
    pub(crate) fn has_met(&self) -> bool {
        self.has_met.load(Ordering::Relaxed)
    }

    pub(crate) fn set_met(&self) {
        self.has_met.store(true, Ordering::Relaxed);
    }

    /// The rank goes on without this attempt.
    pub(crate) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    /// Sets a value.
    ///
    /// # Errors
    /// Those of the store. [`Error::Interrupted`] where the rank no longer waits for this attempt.
    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        if self.is_stopped() || self.is_given_up.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.store.set(key, value)
    }

    /// Does some work with the store on a thread of its own. Returns what comes of it, or `None`
    /// where that takes longer than `limit` or the rank is told to end meanwhile.
    pub(super) fn within<R: Send + 'static>(
        self: &Arc<Self>,
        limit: Duration,
        work: impl Fn(&Arc<Attempt>) -> R + Send + Sync + 'static,
    ) -> Option<R> {
        let started = Instant::now();
        let (sender, receiver) = mpsc::channel();
        let work = Arc::new(work);
        let (for_thread, its_work) = (self.clone(), work.clone());
        let thread = std::thread::Builder::new().name("pillion-store-call".into());
        let thread = thread.spawn(move || sender.send(its_work(&for_thread)));
        if thread.is_err() {
            // Where there is no thread more, few stores block, and the other ranks wait.
            return Some(work(self));
        }
        loop {
            match receiver.recv_timeout(LOOK_EVERY.min(limit.saturating_sub(started.elapsed()))) {
                Ok(result) => return Some(result),
                Err(RecvTimeoutError::Timeout) if !self.is_stopped() && started.elapsed() < limit => {}
                Err(_) => return None,
            }
        }
    }
}
