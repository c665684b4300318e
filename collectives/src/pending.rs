//! Operations in flight.

use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pillion_kernels::{Completion, Event, Failure, Status, Stream};

use crate::Error;
use crate::outcome::Outcome;
use crate::transport::Submitted;

/// An operation in flight, and the buffers that it needs until it is complete.
///
/// Dropping one waits for the operation, at most until the communicator's deadline, and never panics.
#[must_use = "an operation's buffers come back through `then` or `wait`"]
pub struct Pending<T> {
    state: State,
    /// Whether work on the buffers may run later than the call that enqueues it.
    deferred: bool,
    /// None once it is taken, and where it was lost with a failed operation.
    value: Option<Value<T>>,
}

/// The buffers, or how to make what they become once the operation is complete.
enum Value<T> {
    Ready(T),
    Later(Box<dyn FnOnce() -> T + Send>),
}

#[derive(Clone)]
enum State {
    /// It was over when its call returned.
    Ended(Result<(), Failure>),
    Flying(Arc<Outcome>),
    /// A device runs it when its streams come to it.
    Enqueued(Event),
}

/// How often the host looks at an operation of a device that it waits for with a limit.
const LOOK_EVERY: Duration = Duration::from_micros(100);

impl State {
    fn status(&self) -> Status {
        match self {
            State::Ended(result) => Poll::Ready(result.clone()),
            State::Flying(outcome) => outcome.status(),
            State::Enqueued(event) => event.status(),
        }
    }

    fn call_back(&self, waker: &Waker) {
        match self {
            State::Ended(_) => waker.wake_by_ref(),
            State::Flying(outcome) => outcome.call_back(waker),
            State::Enqueued(event) => event.call_back(waker),
        }
    }

    /// Blocks until the operation has ended.
    fn wait(&self) -> Result<(), Failure> {
        match self {
            State::Ended(result) => result.clone(),
            State::Flying(outcome) => outcome.wait(),
            State::Enqueued(event) => event.wait(),
        }
    }

    /// Blocks until the operation has ended, or for `limit`; whether it has ended.
    fn wait_timeout(&self, limit: Duration) -> bool {
        match self {
            State::Ended(_) => true,
            State::Flying(outcome) => outcome.wait_timeout(limit),
            State::Enqueued(event) => {
                let began = Instant::now();
                while event.advance().is_pending() {
                    if began.elapsed() >= limit {
                        return false;
                    }
                    std::thread::sleep(LOOK_EVERY);
                }
                true
            }
        }
    }
}

/// What [`Pending::on_complete`] calls, once.
struct OnComplete {
    state: State,
    callback: Mutex<Option<Callback>>,
}

/// Operations that end as one.
struct Together {
    states: Vec<State>,
    outcome: Arc<Outcome>,
}

impl Wake for Together {
    fn wake(self: Arc<Self>) {
        let mut first = Ok(());
        for state in &self.states {
            match state.status() {
                Poll::Pending => return,
                Poll::Ready(result) => first = first.and(result),
            }
        }
        self.outcome.set(first.map_err(Error::from));
    }
}

type Callback = Box<dyn FnOnce(Result<(), Error>) + Send>;

impl Wake for OnComplete {
    fn wake(self: Arc<Self>) {
        // It may be woken before the operation has ended.
        let Poll::Ready(result) = self.state.status() else { return };
        if let Some(callback) = self.callback.lock().take() {
            let call = || callback(result.map_err(Error::from));
            // It has been printed. The thread that ends operations has others to end.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        }
    }
}

impl<T> Pending<T> {
    /// An operation on buffers whose memory is `deferred` or not.
    pub(crate) fn new(submitted: Submitted, value: T, deferred: bool) -> Pending<T> {
        let state = match submitted {
            Submitted::Ended(result) => return Pending::ended(result, value),
            Submitted::Flying(outcome) => State::Flying(outcome),
            Submitted::Enqueued(event) => State::Enqueued(event),
        };
        Pending { state, deferred, value: Some(Value::Ready(value)) }
    }

    /// An operation that is over already.
    pub(crate) fn ended(result: Result<(), Error>, value: T) -> Pending<T> {
        Pending {
            state: State::Ended(result.map_err(Failure::from)),
            deferred: false,
            value: Some(Value::Ready(value)),
        }
    }

    /// Orders what `stream` runs from now on after the operation, and gives the buffers back. The
    /// host waits where a processor may access the buffers at once, where the stream runs its work
    /// at once, and where [`Pending::map`] has yet to form the buffers.
    ///
    /// # Errors
    /// The operation's failure where it is known by now. A later failure stops the stream: it runs
    /// nothing that it was given after this call, and its next event, synchronisation or download
    /// has the failure.
    pub fn then(mut self, stream: &dyn Stream) -> Result<T, Error> {
        stream.wait_for(&self.event());
        let status = match self.value {
            Some(Value::Ready(_)) if self.deferred => self.state.status(),
            _ => Poll::Ready(self.state.wait()),
        };
        if let Poll::Ready(result) = status {
            result?;
        }
        Ok(self.take())
    }

    /// Blocks the host until the operation is complete, and gives the buffers back.
    ///
    /// # Errors
    /// The operation's failure.
    pub fn wait(mut self) -> Result<T, Error> {
        self.state.wait()?;
        Ok(self.take())
    }

    /// What [`Pending::wait`] returns, if the operation has ended.
    ///
    /// # Errors
    /// The operation, while it is in flight.
    pub fn try_wait(self) -> Result<Result<T, Error>, Pending<T>> {
        match self.state.status() {
            Poll::Ready(_) => Ok(self.wait()),
            Poll::Pending => Err(self),
        }
    }

    /// What [`Pending::wait`] returns, if the operation ends within `limit`.
    ///
    /// # Errors
    /// The operation, which is still in flight. The communicator's own timeout goes on counting.
    pub fn wait_timeout(self, limit: Duration) -> Result<Result<T, Error>, Pending<T>> {
        match self.state.wait_timeout(limit) {
            true => Ok(self.wait()),
            false => Err(self),
        }
    }

    /// Calls `callback` with the operation's result once it has ended: on the thread that ends it,
    /// or, where that has happened, at once on this one. It must return soon, because others wait
    /// for that thread, and it must not wait for operations of any communicator of the job, nor
    /// make one: that thread drives them all. A panic in it is printed, and ends nothing. The
    /// buffers come back as before.
    pub fn on_complete(&self, callback: impl FnOnce(Result<(), Error>) + Send + 'static) {
        if let State::Ended(result) = &self.state {
            return callback(result.clone().map_err(Error::from));
        }
        let call = OnComplete { state: self.state.clone(), callback: Mutex::new(Some(Box::new(callback))) };
        self.state.call_back(&Waker::from(Arc::new(call)));
    }

    /// The moment at which the operation is complete, for other operations to start after. It fails
    /// if the operation fails.
    pub fn event(&self) -> Event {
        match &self.state {
            State::Ended(Ok(())) => Event::PAST,
            State::Ended(Err(failure)) => Event::failed(failure.clone()),
            State::Flying(outcome) => Event::new(outcome.clone()),
            State::Enqueued(event) => event.clone(),
        }
    }

    /// The same operation, with its buffers in another form, which `form` makes once the operation
    /// is complete: at once if it is.
    pub fn map<U>(mut self, form: impl FnOnce(T) -> U + Send + 'static) -> Pending<U>
    where
        T: Send + 'static,
    {
        let value = self.value.take().map(|value| match &self.state {
            State::Ended(Ok(())) => Value::Ready(form(value.get())),
            State::Ended(Err(_)) | State::Flying(_) | State::Enqueued(_) => {
                Value::Later(Box::new(move || form(value.get())))
            }
        });
        Pending { state: self.state.clone(), deferred: self.deferred, value }
    }

    /// Operations in flight as one, which is complete when all are. It fails once all have ended,
    /// if one has failed: with the error of the first such in the list.
    pub fn all(operations: Vec<Pending<T>>) -> Pending<Vec<T>>
    where
        T: Send + 'static,
    {
        let deferred = operations.iter().any(|operation| operation.deferred);
        let (mut states, mut values) = (Vec::new(), Some(Vec::new()));
        for mut operation in operations {
            states.push(operation.state.clone());
            values = values.zip(operation.value.take()).map(|(mut values, value)| {
                values.push(value);
                values
            });
        }
        let value = values.map(|values| match values.iter().all(|value| matches!(value, Value::Ready(_))) {
            true => Value::Ready(values.into_iter().map(Value::get).collect()),
            false => Value::Later(Box::new(move || values.into_iter().map(Value::get).collect())),
        });
        let together = Arc::new(Together { states, outcome: Arc::default() });
        let waker = Waker::from(together.clone());
        for state in &together.states {
            if !matches!(state, State::Ended(_)) {
                state.call_back(&waker);
            }
        }
        waker.wake();
        Pending { state: State::Flying(together.outcome.clone()), deferred, value }
    }

    fn take(&mut self) -> T {
        self.value.take().expect(HELD).get()
    }

    /// The buffers while the operation may still be in flight, for another operation that starts
    /// after [`Pending::event`]. None where it has failed already. Where [`Pending::map`] has yet
    /// to form the buffers, the host waits.
    pub(crate) fn take_in_flight(&mut self) -> Option<T> {
        match self.value.take()? {
            Value::Ready(value) => Some(value),
            Value::Later(make) => self.state.wait().is_ok().then(make),
        }
    }

    /// The same operation, with its buffers in another form at once: `form` moves them and does not
    /// touch their elements.
    pub(crate) fn form_in_flight<U>(mut self, form: impl FnOnce(T) -> U) -> Pending<U> {
        let value = self.take_in_flight().map(|value| Value::Ready(form(value)));
        Pending { state: self.state.clone(), deferred: self.deferred, value }
    }

    /// A pending operation that ends as this one does and gives `value` back.
    pub(crate) fn like<U>(&self, value: U) -> Pending<U> {
        Pending { state: self.state.clone(), deferred: self.deferred, value: Some(Value::Ready(value)) }
    }

    /// The failure, where it is known by now.
    pub(crate) fn failure(&self) -> Option<Failure> {
        match self.state.status() {
            Poll::Ready(result) => result.err(),
            Poll::Pending => None,
        }
    }
}

impl<A, B> Pending<(A, B)> {
    /// The same operation, whose buffers come back in two parts. Where [`Pending::map`] has yet to
    /// form them, the host waits.
    pub fn split(mut self) -> (Pending<A>, Pending<B>) {
        let (a, b) = self.take_in_flight().unzip();
        let (state, deferred) = (self.state.clone(), self.deferred);
        (
            Pending { state: state.clone(), deferred, value: a.map(Value::Ready) },
            Pending { state, deferred, value: b.map(Value::Ready) },
        )
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
            let _ = self.state.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_once_whenever_it_is_asked_for() {
        let ends = Arc::new(Mutex::new(Vec::new()));
        let note = |what: &'static str| {
            let ends = ends.clone();
            move |result: Result<(), Error>| ends.lock().push((what, result.is_ok()))
        };
        let flying = Arc::new(Outcome::default());
        let pending = Pending::new(Submitted::Flying(flying.clone()), 7, false);
        pending.on_complete(note("before"));
        let pending = pending.try_wait().unwrap_err().wait_timeout(Duration::ZERO).unwrap_err();
        assert!(ends.lock().is_empty());
        flying.set(Ok(()));
        flying.set(Err(Error::System { what: "a test", reason: "only the first end counts".to_owned() }));
        pending.on_complete(note("after"));
        assert_eq!(pending.wait_timeout(Duration::MAX).map_err(drop).unwrap().unwrap(), 7);
        Pending::ended(Err(Error::System { what: "a test", reason: "made up".to_owned() }), ())
            .on_complete(note("ended"));
        assert_eq!(*ends.lock(), [("before", true), ("after", true), ("ended", false)]);
    }

    #[test]
    fn several_end_as_one_once_all_have_ended() {
        let failure = |reason: &str| Error::System { what: "a test", reason: reason.to_owned() };
        for fails in [false, true] {
            let flying: Vec<Arc<Outcome>> = (0..3).map(|_| Arc::default()).collect();
            let ended = Pending::ended(Ok(()), 0);
            let operations = flying.iter().enumerate().map(|(index, outcome)| {
                Pending::new(Submitted::Flying(outcome.clone()), index as i32 + 1, false).map(|value| 10 * value)
            });
            let mut all = Pending::all(std::iter::once(ended).chain(operations).collect());
            for index in [2, 0, 1] {
                all = all.try_wait().unwrap_err();
                let reason = format!("number {index}");
                flying[index].set(if fails && index > 0 { Err(failure(&reason)) } else { Ok(()) });
            }
            match all.try_wait().map_err(drop).unwrap() {
                Ok(values) => assert_eq!((fails, values), (false, vec![0, 10, 20, 30])),
                Err(error) => assert!(fails && error.to_string().contains("number 1"), "{error}"),
            }
        }
        assert_eq!(Pending::<()>::all(Vec::new()).wait().unwrap(), []);
    }

    #[test]
    fn what_a_failed_operation_had_is_never_formed() {
        let failure = || Error::System { what: "a test", reason: "made up".to_owned() };
        let never = |()| unreachable!("peers may still write to this memory");
        assert!(Pending::ended(Err(failure()), ()).map(never).wait().is_err());
        let flying = Arc::new(Outcome::default());
        let pending = Pending::new(Submitted::Flying(flying.clone()), (), true).map(never);
        flying.set(Err(failure()));
        assert!(pending.wait().is_err());
        assert_eq!(Pending::ended(Ok(()), 1).map(|one| one + 1).wait().unwrap(), 2);
    }
}
