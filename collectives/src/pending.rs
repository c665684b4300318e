//! Operations in flight.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use pillion_kernels::{Completion, Event, Queue};

use crate::Error;
use crate::shm::shared::AT_A_TIME;

/// An operation in flight, and the buffers that it needs until it is complete.
///
/// Dropping one waits for the operation, at most until the communicator's deadline, and never panics.
#[must_use = "an operation's buffers come back through `then` or `wait`"]
pub struct Pending<T> {
    state: State,
    value: Option<Value<T>>,
}

/// The buffers, or how to make what they become: only once the operation is complete does anybody get hold of them.
enum Value<T> {
    Ready(T),
    Later(Box<dyn FnOnce() -> T + Send>),
}

#[derive(Clone)]
enum State {
    /// It was over when its call returned. (Errors are large, and rare.)
    Ended(Result<(), Box<Error>>),
    Flying(Arc<Outcome>),
}

impl State {
    /// Blocks until the operation has ended.
    fn outcome(&self) -> Result<(), Error> {
        match self {
            State::Ended(result) => result.clone().map_err(|error| *error),
            State::Flying(outcome) => outcome.outcome(),
        }
    }
}

impl<T> Pending<T> {
    pub(crate) fn new(outcome: Arc<Outcome>, value: T) -> Pending<T> {
        Pending { state: State::Flying(outcome), value: Some(Value::Ready(value)) }
    }

    /// An operation that is over already.
    pub(crate) fn ended(result: Result<(), Error>, value: T) -> Pending<T> {
        Pending { state: State::Ended(result.map_err(Box::new)), value: Some(Value::Ready(value)) }
    }

    /// Orders what `queue` runs from now on after the operation, and gives the buffers back. The host waits only where the
    /// queue runs its work at once.
    ///
    /// # Errors
    /// The operation's failure where it is known by now; otherwise the communicator's next call returns it.
    pub fn then(mut self, queue: &dyn Queue) -> Result<T, Error> {
        queue.wait_for(&self.event());
        match &self.state {
            State::Ended(result) => result.clone().map_err(|error| *error)?,
            State::Flying(outcome) => outcome.result.lock().clone().unwrap_or(Ok(()))?,
        }
        Ok(self.take())
    }

    /// Blocks the host until the operation is complete, and gives the buffers back.
    ///
    /// # Errors
    /// The operation's failure.
    pub fn wait(mut self) -> Result<T, Error> {
        self.state.outcome()?;
        Ok(self.take())
    }

    /// The moment at which the operation is complete, for other operations to start after.
    pub fn event(&self) -> Event {
        match &self.state {
            State::Ended(_) => Event::PAST,
            State::Flying(outcome) => Event::new(outcome.clone()),
        }
    }

    /// The same operation, with its buffers in another form, which `form` makes once it is complete: at once if it is.
    pub fn map<U>(mut self, form: impl FnOnce(T) -> U + Send + 'static) -> Pending<U>
    where
        T: Send + 'static,
    {
        let value = self.value.take().expect(HELD);
        let value = match &self.state {
            State::Ended(Ok(())) => Value::Ready(form(value.get())),
            State::Ended(Err(_)) | State::Flying(_) => Value::Later(Box::new(move || form(value.get()))),
        };
        Pending { state: self.state.clone(), value: Some(value) }
    }

    fn take(&mut self) -> T {
        self.value.take().expect(HELD).get()
    }
}

const HELD: &str = "a pending operation holds its buffers until it is consumed";

impl<T> Value<T> {
    fn get(self) -> T {
        match self {
            Value::Ready(value) => value,
            Value::Later(make) => make(),
        }
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        if self.value.is_some() {
            // The error, if any, comes back from the communicator's next call.
            let _ = self.state.outcome();
        }
    }
}

/// How an operation ended, once it has.
#[derive(Default)]
pub(crate) struct Outcome {
    result: Mutex<Option<Result<(), Error>>>,
    changed: Condvar,
}

impl Outcome {
    /// Ends the operation; the first end counts.
    pub(crate) fn set(&self, result: Result<(), Error>) {
        self.result.lock().get_or_insert(result);
        self.changed.notify_all();
    }

    /// Blocks until the operation has ended.
    pub(crate) fn outcome(&self) -> Result<(), Error> {
        let mut result = self.result.lock();
        loop {
            match &*result {
                Some(result) => return result.clone(),
                None => self.changed.wait(&mut result),
            }
        }
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
            Arc::get_mut(outcome)?.result.get_mut().take();
            Some(outcome.clone())
        });
        unused.unwrap_or_else(|| {
            all.push(Arc::default());
            all[all.len() - 1].clone()
        })
    }
}

impl Completion for Outcome {
    fn is_complete(&self) -> bool {
        self.result.lock().is_some()
    }

    fn wait(&self) {
        let _ = self.outcome();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_operation_had_is_never_formed() {
        let failure = || Error::System { what: "a test", reason: "made up".to_owned() };
        let never = |()| unreachable!("peers may still write to this memory");
        assert!(Pending::ended(Err(failure()), ()).map(never).wait().is_err());
        let flying = Arc::new(Outcome::default());
        let pending = Pending::new(flying.clone(), ()).map(never);
        flying.set(Err(failure()));
        assert!(pending.wait().is_err());
        assert_eq!(Pending::ended(Ok(()), 1).map(|one| one + 1).wait().unwrap(), 2);
    }
}
