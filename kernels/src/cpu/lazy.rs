//! [`LazyCpu`]: a device for tests that runs work as late as its events allow.
//!
//! Enqueued work waits until somebody needs an event; then just the work before that event runs,
//! and between its steps, at random, steps of other streams. A collective that starts before the
//! kernels it depends on, or a kernel that starts before its weights arrived, computes on stale
//! memory, and the test that compares bits fails. On [`super::Cpu`] the same mistake would go
//! unseen, since each kernel is done when its call returns.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Wake, Waker};

use parking_lot::Mutex;

use super::HostStream;
use super::team::Team;
use crate::buffer::byte_count;
use crate::{Buffer, Completion, DType, Device, Error, Event, Failure, Region, Status, Stream, exclusive, random};

/// A processor that runs work as late as its events allow and otherwise in random order.
#[derive(Clone)]
pub struct LazyCpu {
    state: Arc<Mutex<State>>,
    sleepers: Arc<Sleepers>,
}

struct State {
    streams: Vec<Line>,
    /// Events that a stream waits for, and that are still to be asked to call back: without this
    /// state's lock, because they may call back at once.
    unasked: Vec<Event>,
    seed: u64,
    steps: u64,
}

/// The work of one stream.
#[derive(Default)]
struct Line {
    items: VecDeque<Item>,
    /// The failure of an event that this stream has waited for.
    failure: Option<Failure>,
}

enum Item {
    Kernel(Box<dyn FnOnce() + Send>),
    Wait { event: Event, calls_back: bool },
    Record(Arc<Moment>),
}

/// How a record ended, once it has.
type Moment = OnceLock<Result<(), Failure>>;

/// Threads that wait for moments of this device. Whenever its work may get further, they are woken.
#[derive(Default)]
struct Sleepers(Mutex<Vec<(Arc<Moment>, Waker)>>);

impl Wake for Sleepers {
    fn wake(self: Arc<Self>) {
        thread_local! {
            /// Devices that this thread is waking: two of them can wait for each other.
            static WAKING: RefCell<Vec<*const Sleepers>> = const { RefCell::new(Vec::new()) };
        }
        let own = Arc::as_ptr(&self);
        if WAKING.with_borrow(|waking| waking.contains(&own)) {
            return;
        }
        let mut sleepers = self.0.lock();
        let wakers: Vec<Waker> = sleepers.iter().map(|(_, waker)| waker.clone()).collect();
        sleepers.retain(|(moment, _)| moment.get().is_none());
        // A waker is foreign code, which may come back here.
        drop(sleepers);
        WAKING.with_borrow_mut(|waking| waking.push(own));
        wakers.into_iter().for_each(Waker::wake);
        WAKING.with_borrow_mut(|waking| waking.pop());
    }
}

impl LazyCpu {
    /// A device whose random order is drawn from `seed`.
    pub fn new(seed: u64) -> LazyCpu {
        let state = State { streams: Vec::new(), unasked: Vec::new(), seed, steps: 0 };
        LazyCpu { state: Arc::new(Mutex::new(state)), sleepers: Arc::default() }
    }
}

// SAFETY: all its memory is marked as deferred; the region comes back with that mark.
unsafe impl Device for LazyCpu {
    fn name(&self) -> &'static str {
        "lazy-cpu"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        let region = Region::heap(self.name(), byte_count(self.name(), dtype, len)?)?;
        Buffer::whole(self.take_in(region)?, dtype)
    }

    fn stream(&self) -> Box<dyn Stream> {
        let mut state = self.state.lock();
        state.streams.push(Line::default());
        let lazy = LazyStream { device: self.clone(), index: state.streams.len() - 1 };
        Box::new(HostStream::new(Some(lazy), Team::default(), None))
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        Ok(region.deferred())
    }
}

/// One stream of a [`LazyCpu`].
pub(super) struct LazyStream {
    device: LazyCpu,
    index: usize,
}

impl LazyStream {
    pub(super) fn push(&self, kernel: Box<dyn FnOnce() + Send>) {
        self.push_item(Item::Kernel(kernel));
    }

    pub(super) fn wait_for(&self, event: &Event) {
        // The order of this device's own work is known here, so such an event calls nobody back.
        let own = event.origin::<Reached>().is_some_and(|reached| reached.is_of(&self.device));
        self.push_item(Item::Wait { event: event.clone(), calls_back: own });
    }

    pub(super) fn record(&self) -> Event {
        let moment = Arc::new(Moment::new());
        self.push_item(Item::Record(moment.clone()));
        Event::new(Arc::new(Reached { device: self.device.clone(), index: self.index, moment }))
    }

    fn push_item(&self, item: Item) {
        self.device.state.lock().streams[self.index].items.push_back(item);
    }
}

/// A moment in a stream: everything before it has run, or cannot.
struct Reached {
    device: LazyCpu,
    index: usize,
    moment: Arc<Moment>,
}

impl Reached {
    fn is_of(&self, device: &LazyCpu) -> bool {
        Arc::ptr_eq(&self.device.state, &device.state)
    }
}

impl Completion for Reached {
    fn status(&self) -> Status {
        self.moment.get().map_or(Poll::Pending, |result| Poll::Ready(result.clone()))
    }

    fn advance(&self) -> Status {
        if self.status().is_ready() {
            return self.status();
        }
        let LazyCpu { state, sleepers } = &self.device;
        let mut state = state.lock();
        let mut moved = false;
        while self.status().is_pending() {
            if state.coin() {
                let other = state.random_stream();
                moved |= state.step(other);
            }
            if !state.step(self.index) && !state.step_any() {
                break;
            }
            moved = true;
        }
        let unasked = std::mem::take(&mut state.unasked);
        drop(state);
        let waker = Waker::from(sleepers.clone());
        unasked.iter().for_each(|event| event.call_back(&waker));
        if moved {
            // Records may have been reached for which other threads wait.
            waker.wake();
        }
        self.status()
    }

    fn call_back(&self, waker: &Waker) {
        // This device's own waker would wake itself.
        if !waker.will_wake(&Waker::from(self.device.sleepers.clone())) {
            self.device.sleepers.0.lock().push((self.moment.clone(), waker.clone()));
        }
        if self.status().is_ready() {
            waker.wake_by_ref();
        }
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}

impl State {
    /// Runs the first item of a stream; false when there is none or it waits for something that has
    /// not ended.
    fn step(&mut self, index: usize) -> bool {
        let Line { items, failure } = &mut self.streams[index];
        if let Some(Item::Wait { event, calls_back }) = items.front_mut()
            && event.status().is_pending()
        {
            if !std::mem::replace(calls_back, true) {
                self.unasked.push(event.clone());
            }
            return false;
        }
        match items.pop_front() {
            None => return false,
            Some(Item::Kernel(kernel)) if failure.is_none() => {
                let _access = exclusive(true);
                kernel();
            }
            Some(Item::Kernel(_)) => {}
            Some(Item::Wait { event, .. }) => {
                if let (None, Poll::Ready(Err(error))) = (&failure, event.status()) {
                    *failure = Some(error);
                }
            }
            Some(Item::Record(moment)) => {
                let result = failure.clone().map_or(Ok(()), Err);
                moment.set(result).expect("a moment is reached once");
            }
        }
        true
    }

    /// Runs one item of some stream; false when every stream is empty or blocked.
    fn step_any(&mut self) -> bool {
        let first = self.random_stream();
        (0..self.streams.len()).any(|offset| self.step((first + offset) % self.streams.len()))
    }

    fn coin(&mut self) -> bool {
        self.draw().is_multiple_of(2)
    }

    fn random_stream(&mut self) -> usize {
        (self.draw() % self.streams.len() as u64) as usize
    }

    fn draw(&mut self) -> u64 {
        self.steps += 1;
        random::bits(self.seed, 0, self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(stream: &dyn Stream, buffer: &Buffer) -> Vec<f32> {
        stream.download(buffer.view()).unwrap()
    }

    #[test]
    fn work_runs_only_when_somebody_waits() {
        let device = LazyCpu::new(1);
        let (stream, reader) = (device.stream(), device.stream());
        let mut x = device.allocate(DType::F32, 2).unwrap();
        stream.upload(x.view_mut(), &[1.0f32, 2.0]);
        let event = stream.record();
        assert!(event.status().is_pending(), "nobody has waited yet");
        reader.wait_for(&event);
        assert_eq!(values(&*reader, &x), [1.0, 2.0]);
        assert!(event.status().is_ready());
    }

    #[test]
    fn a_missing_event_shows_as_stale_values() {
        let stale = (0..20)
            .filter(|&seed| {
                let device = LazyCpu::new(seed);
                let (writer, reader) = (device.stream(), device.stream());
                let mut x = device.allocate(DType::F32, 1).unwrap();
                writer.upload(x.view_mut(), &[1.0f32]);
                values(&*reader, &x) == [0.0]
            })
            .count();
        // Each of the reader's two steps runs the writer's with probability 1/4, so it is late with 9/16; none of 20 seeds
        // late has probability (7/16)^20 < 1e-7, and the seeds are fixed.
        assert!(stale > 0);
    }

    #[test]
    #[should_panic(expected = "another device")]
    fn a_queue_refuses_buffers_of_another_device() {
        let mut x = super::super::Cpu.allocate(DType::F32, 1).unwrap();
        LazyCpu::new(0).stream().zero(x.view_mut());
    }
}
