//! How operations end, and who is told.

use std::any::Any;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pillion_kernels::{Completion, Failure, Status};

use crate::Error;
use crate::engine::inbox::AT_A_TIME;
use crate::memory::fork::Maker;

/// How an operation ended, once it has, and which threads wait for it.
#[derive(Default)]
pub(crate) struct Outcome {
    state: Mutex<OutcomeState>,
    changed: Condvar,
    /// The process in which the operation ends.
    maker: Maker,
}

struct OutcomeState {
    result: Option<Result<(), Failure>>,
    /// What to wake once there is a result.
    wakers: Vec<Waker>,
}

impl Default for OutcomeState {
    /// Two streams or operations may follow an operation without an allocation.
    fn default() -> OutcomeState {
        OutcomeState { result: None, wakers: Vec::with_capacity(2) }
    }
}

/// Says how an operation ended, when it is dropped. An operation in flight has it as its last
/// field: when the end is said, the operation has let go of the buffers, so whoever gets them back
/// is the only one who has them.
pub(crate) struct Ending {
    outcome: Arc<Outcome>,
    what: &'static str,
    /// None where a panic has ended the operation.
    result: Option<Result<(), Error>>,
}

impl Ending {
    /// Of `what`: nobody waits for ever for an operation that a panic has ended.
    pub(crate) fn new(outcome: Arc<Outcome>, what: &'static str) -> Ending {
        Ending { outcome, what, result: None }
    }

    /// The operation ends with `result`.
    pub(crate) fn set(&mut self, result: Result<(), Error>) {
        self.result = Some(result);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let panicked = || {
            let reason = "the thread that drove it panicked".to_owned();
            Err(Error::System { what: self.what, reason })
        };
        self.outcome.set(self.result.take().unwrap_or_else(panicked));
    }
}

impl Outcome {
    /// How the operation ended, or that it never ends here, in a forked child.
    fn in_child(&self) -> Option<Result<(), Failure>> {
        let error = self.maker.check().err()?;
        // Another thread of the parent may have held the lock.
        let known = self.state.try_lock().and_then(|state| state.result.clone());
        Some(known.unwrap_or_else(|| Err(Failure::from(error))))
    }

    /// Ends the operation; the first end counts.
    pub(crate) fn set(&self, result: Result<(), Error>) {
        let mut state = self.state.lock();
        if state.result.is_some() {
            return;
        }
        state.result = Some(result.map_err(Failure::from));
        let mut wakers = std::mem::take(&mut state.wakers);
        // A waker is foreign code, which may ask for the status.
        drop(state);
        self.changed.notify_all();
        wakers.drain(..).for_each(Waker::wake);
        // The next operation that uses this outcome needs no memory for its own wakers.
        self.state.lock().wakers = wakers;
    }

    /// Blocks until the operation has ended, or for `limit`; whether it has ended.
    pub(crate) fn wait_timeout(&self, limit: Duration) -> bool {
        if self.in_child().is_some() {
            return true;
        }
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.state.lock();
        while state.result.is_none() {
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if self.changed.wait_until(&mut state, deadline).timed_out() => break,
                Some(_) => {}
            }
        }
        state.result.is_some()
    }
}

/// Outcomes that nobody holds any more, to be used again: a new operation needs no memory.
pub(crate) struct Outcomes(Mutex<Vec<Arc<Outcome>>>);

impl Default for Outcomes {
    fn default() -> Outcomes {
        Outcomes(Mutex::new((0..2 * AT_A_TIME).map(|_| Arc::default()).collect()))
    }
}

impl Outcomes {
    /// One of an operation that has not ended.
    pub(crate) fn get(&self) -> Arc<Outcome> {
        let mut all = self.0.lock();
        let unused = all.iter_mut().find_map(|outcome| {
            Arc::get_mut(outcome)?.state.get_mut().result.take();
            Some(outcome.clone())
        });
        unused.unwrap_or_else(|| {
            all.push(Arc::default());
            all[all.len() - 1].clone()
        })
    }
}

impl Completion for Outcome {
    fn status(&self) -> Status {
        if let Some(result) = self.in_child() {
            return Poll::Ready(result);
        }
        self.state.lock().result.clone().map_or(Poll::Pending, Poll::Ready)
    }

    fn call_back(&self, waker: &Waker) {
        let mut state = self.state.lock();
        match state.result {
            None => state.wakers.push(waker.clone()),
            Some(_) => {
                drop(state);
                waker.wake_by_ref();
            }
        }
    }

    fn wait(&self) -> Result<(), Failure> {
        if let Some(result) = self.in_child() {
            return result;
        }
        let mut state = self.state.lock();
        loop {
            match &state.result {
                Some(result) => return result.clone(),
                None => self.changed.wait(&mut state),
            }
        }
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}
