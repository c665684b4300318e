//! An event that ends when a test says so.

use std::any::Any;
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::Mutex;
use pillion_kernels::{Completion, Failure, Status};

/// The event.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ended: Option<Result<(), Failure>>,
    wakers: Vec<Waker>,
}

impl Gate {
    pub(crate) fn new() -> Arc<Gate> {
        Arc::default()
    }

    pub(crate) fn end(&self, result: Result<(), Failure>) {
        let mut state = self.state.lock();
        state.ended = Some(result);
        state.wakers.drain(..).for_each(Waker::wake);
    }
}

impl Completion for Gate {
    fn status(&self) -> Status {
        self.state.lock().ended.clone().map_or(Poll::Pending, Poll::Ready)
    }

    fn call_back(&self, waker: &Waker) {
        let mut state = self.state.lock();
        if state.ended.is_some() { waker.wake_by_ref() } else { state.wakers.push(waker.clone()) }
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}
