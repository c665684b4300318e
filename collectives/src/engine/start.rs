//! The event that an operation starts after.

use std::task::{Poll, Waker};

use pillion_kernels::Event;

use super::group::Group;
use super::watch::Watch;
use crate::Error;
use crate::outcome::Outcome;
use crate::transport::Limit;
use crate::wire::Wire;

/// What an operation of this rank waits for before it starts.
pub(crate) struct StartEvent {
    event: Event,
    /// Whether the event wakes the progress thread.
    calls_back: bool,
    watch: Watch,
}

impl StartEvent {
    /// An operation that is called now may wait for its event for `limit`. The event of another
    /// operation ends by that operation's own deadline, which starts anew with each of its steps.
    pub(crate) fn new(event: Event, limit: Limit) -> StartEvent {
        let limit = if event.origin::<Outcome>().is_some() { Limit::NONE } else { limit };
        StartEvent { event, calls_back: false, watch: Watch::new(limit) }
    }

    /// Whether the operation may start. `waker` is the progress thread's, if that is the thread
    /// that asks. `is_late` tells whether a rank of this host has yet to come to the operation.
    ///
    /// # Errors
    /// When the event has failed or does not happen in time, and when a rank is lost meanwhile.
    pub(crate) fn has_happened(
        &mut self,
        group: &Group,
        waker: Option<&Waker>,
        wire: Option<&mut (dyn Wire + 'static)>,
        is_late: &dyn Fn(usize) -> bool,
        op: &dyn Fn() -> String,
    ) -> Result<bool, Error> {
        if let (Some(waker), false) = (waker, self.calls_back)
            && self.event.status().is_pending()
        {
            self.event.call_back(waker);
            self.calls_back = true;
        }
        match self.event.advance() {
            Poll::Ready(result) => result.map(|()| true).map_err(|failure| group.fail_after(failure)),
            Poll::Pending => self.watch.check_start(group, wire, is_late, op).map(|()| false),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::join::{Job, Joined, join};
    use crate::transport::Transport;
    use crate::{Launch, Options};

    /// A progress thread that slept until its next look would start an operation milliseconds late.
    #[test]
    fn an_event_that_ends_rings_the_progress_thread() {
        let Joined { group, .. } = join(&Job::of(&Launch::single()), Options::default()).unwrap();
        let engine = group.engine.clone();
        engine.open(group.clone(), None);
        std::thread::scope(|scope| {
            scope.spawn(|| engine.run(|begun| begun.is_ok()));
            let rings = || engine.control().progress.rings.load(Ordering::Acquire);
            let (before, waker) = (rings(), Waker::from(engine.clone()));
            // An awake thread is not rung. Nothing else rings this one, and it sleeps soon.
            let started = Instant::now();
            while rings() == before {
                assert!(started.elapsed() < Duration::from_secs(60), "the progress thread was never rung");
                waker.wake_by_ref();
                std::thread::yield_now();
            }
            group.close();
        });
    }
}
