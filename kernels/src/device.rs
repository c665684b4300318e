//! Devices and the events that order their work.

use std::sync::Arc;
use std::time::Duration;

use crate::{Buffer, DType, Error, Queue};

/// Something that owns memory and runs kernels.
pub trait Device: Send + Sync {
    /// Its name, for tables and messages.
    fn name(&self) -> &'static str;

    /// Memory for `len` elements, zeroed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error>;

    /// A new queue, ordered with nothing else.
    fn queue(&self) -> Box<dyn Queue>;

    /// Whether a kernel may run later than the call that enqueues it. Memory that a communicator lends to a device carries
    /// this mark, and a queue refuses buffers whose mark differs from its own.
    fn deferred(&self) -> bool;
}

/// A moment in the life of a queue or of a collective.
pub trait Completion: Send + Sync {
    /// Whether the moment has passed.
    fn is_complete(&self) -> bool;

    /// Lets work proceed towards the moment where that needs somebody's thread; then as [`Completion::is_complete`].
    fn advance(&self) -> bool {
        self.is_complete()
    }

    /// Blocks the host until the moment has passed.
    fn wait(&self) {
        while !self.advance() {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

/// A shared handle on a [`Completion`].
#[derive(Clone, Default)]
pub struct Event(Option<Arc<dyn Completion>>);

impl Event {
    /// An event that has already happened.
    pub const PAST: Event = Event(None);

    /// An event that happens when `completion` says so.
    pub fn new(completion: Arc<dyn Completion>) -> Event {
        Event(Some(completion))
    }

    /// An event that happens once all of `events` have.
    pub fn all(events: impl IntoIterator<Item = Event>) -> Event {
        let mut waiting = events.into_iter().filter(|event| !event.is_complete());
        match (waiting.next(), waiting.next()) {
            (None, _) => Event::PAST,
            (Some(only), None) => only,
            (Some(first), Some(second)) => {
                Event::new(Arc::new(All([first, second].into_iter().chain(waiting).collect())))
            }
        }
    }

    /// Whether it has happened.
    pub fn is_complete(&self) -> bool {
        self.0.as_ref().is_none_or(|completion| completion.is_complete())
    }

    /// Lets work proceed towards it; then whether it has happened. Never blocks on another rank.
    pub fn advance(&self) -> bool {
        self.0.as_ref().is_none_or(|completion| completion.advance())
    }

    /// Blocks the host until it has happened.
    pub fn wait(&self) {
        if let Some(completion) = &self.0 {
            completion.wait();
        }
    }
}

struct All(Vec<Event>);

impl Completion for All {
    fn is_complete(&self) -> bool {
        self.0.iter().all(Event::is_complete)
    }

    fn advance(&self) -> bool {
        // Each of them, also after one that has to wait.
        self.0.iter().filter(|event| !event.advance()).count() == 0
    }

    fn wait(&self) {
        self.0.iter().for_each(Event::wait);
    }
}
