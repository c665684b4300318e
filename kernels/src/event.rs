//! Events: what orders streams and collectives, and how a failure stops the work that follows it.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::thread::Thread;

/// Why an event failed: the first error of the work that the event follows.
#[derive(Clone)]
pub struct Failure(Arc<dyn std::error::Error + Send + Sync>);

impl Failure {
    /// A failure with this error.
    pub fn new(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
        Failure(Arc::new(error))
    }

    /// The error, where it is an `E`, also where it was made a failure more than once.
    pub fn cause<E: std::error::Error + 'static>(&self) -> Option<&E> {
        match self.0.downcast_ref::<Failure>() {
            Some(inner) => inner.cause(),
            None => self.0.downcast_ref(),
        }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// How far an event is: pending, or ended. An event ends by happening or by failing, and never
/// changes after that.
pub type Status = Poll<Result<(), Failure>>;

/// The status of an event that has happened.
const HAPPENED: Status = Poll::Ready(Ok(()));

/// A moment in the life of a stream or of a collective.
pub trait Completion: Send + Sync {
    /// How far it is. Never blocks.
    fn status(&self) -> Status;

    /// Lets work proceed towards the moment where that needs a thread to run it, then returns the
    /// status. Never blocks on another rank.
    fn advance(&self) -> Status {
        self.status()
    }

    /// From now on wakes `waker` whenever [`Completion::advance`] may get further, the last time
    /// when the event ends. An event that has ended wakes it at once. It may be woken too often. A
    /// communicator calls this with a lock held, so it returns soon and asks nothing of streams and
    /// communicators.
    fn call_back(&self, waker: &Waker);

    /// Blocks the host until the event has ended.
    ///
    /// # Errors
    /// The event's failure.
    fn wait(&self) -> Result<(), Failure> {
        if let Poll::Ready(result) = self.advance() {
            return result;
        }
        self.call_back(&Waker::from(Arc::new(Unpark(std::thread::current()))));
        loop {
            if let Poll::Ready(result) = self.advance() {
                return result;
            }
            std::thread::park();
        }
    }

    /// The implementation itself, so that a stream can recognise an event of its own kind and order
    /// its work after that event without the host.
    fn origin(&self) -> &dyn Any;
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A shared handle on a [`Completion`].
#[derive(Clone, Default)]
pub struct Event(Option<Arc<dyn Completion>>);

impl Event {
    /// An event that has already happened.
    pub const PAST: Event = Event(None);

    /// An event that follows `completion`.
    pub fn new(completion: Arc<dyn Completion>) -> Event {
        Event(Some(completion))
    }

    /// An event that has already failed.
    pub fn failed(failure: Failure) -> Event {
        Event::new(Arc::new(Failed(failure)))
    }

    /// An event that ends once all of `events` have ended. It fails if one of them fails, with the
    /// failure of the first of those in the order of `events`.
    pub fn all(events: impl IntoIterator<Item = Event>) -> Event {
        let mut relevant = events.into_iter().filter(|event| !matches!(event.status(), Poll::Ready(Ok(()))));
        match (relevant.next(), relevant.next()) {
            (None, _) => Event::PAST,
            (Some(only), None) => only,
            (Some(first), Some(second)) => {
                Event::new(Arc::new(All([first, second].into_iter().chain(relevant).collect())))
            }
        }
    }

    /// How far it is. Never blocks.
    pub fn status(&self) -> Status {
        self.0.as_ref().map_or(HAPPENED, |completion| completion.status())
    }

    /// Lets work proceed towards it, then returns its status. Never blocks on another rank.
    pub fn advance(&self) -> Status {
        self.0.as_ref().map_or(HAPPENED, |completion| completion.advance())
    }

    /// From now on wakes `waker` whenever [`Event::advance`] may get further, the last time when
    /// the event ends. An event that has ended wakes it at once. It may be woken too often.
    pub fn call_back(&self, waker: &Waker) {
        match &self.0 {
            Some(completion) => completion.call_back(waker),
            None => waker.wake_by_ref(),
        }
    }

    /// Blocks the host until it has ended.
    ///
    /// # Errors
    /// Its failure.
    pub fn wait(&self) -> Result<(), Failure> {
        self.0.as_ref().map_or(Ok(()), |completion| completion.wait())
    }

    /// What the event follows, if it is a `T`: a stream thereby recognises events of its own kind.
    pub fn origin<T: 'static>(&self) -> Option<&T> {
        self.0.as_ref()?.origin().downcast_ref()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?})", self.status())
    }
}

struct Failed(Failure);

impl Completion for Failed {
    fn status(&self) -> Status {
        Poll::Ready(Err(self.0.clone()))
    }

    fn call_back(&self, waker: &Waker) {
        waker.wake_by_ref();
    }

    fn wait(&self) -> Result<(), Failure> {
        Err(self.0.clone())
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}

pub(crate) struct All(pub(crate) Vec<Event>);

impl All {
    /// The status of all, each asked by `ask`.
    fn status_by(&self, ask: impl Fn(&Event) -> Status) -> Status {
        let mut first = Ok(());
        let mut pending = false;
        for event in &self.0 {
            // Every event is asked, also after a pending one, because asking may let its work run.
            match ask(event) {
                Poll::Pending => pending = true,
                Poll::Ready(result) => first = first.and(result),
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(first) }
    }
}

impl Completion for All {
    fn status(&self) -> Status {
        self.status_by(Event::status)
    }

    fn advance(&self) -> Status {
        self.status_by(Event::advance)
    }

    fn call_back(&self, waker: &Waker) {
        let mut ended = true;
        // An event that has ended would wake the caller although others are pending.
        for event in self.0.iter().filter(|event| event.status().is_pending()) {
            event.call_back(waker);
            ended = false;
        }
        if ended {
            waker.wake_by_ref();
        }
    }

    fn wait(&self) -> Result<(), Failure> {
        self.0.iter().map(Event::wait).fold(Ok(()), Result::and)
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}
