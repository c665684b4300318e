//! [`LazyCpu`]: a device for tests that runs work as late as its events allow.
//!
//! Enqueued work waits until somebody needs an event; then just the work before that event runs, and between its steps, at
//! random, steps of other queues. A collective that starts before the kernels it depends on, or a kernel that starts before its
//! weights arrived, computes on stale memory, and the test that compares bits fails. On [`super::Cpu`] the same mistake would go
//! unseen, since each kernel is done when its call returns.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::HostQueue;
use super::team::Team;
use crate::{Buffer, Completion, DType, Device, Error, Event, Queue, exclusive, random};

/// A processor that runs work as late as its events allow and otherwise in random order.
#[derive(Clone)]
pub struct LazyCpu {
    state: Arc<Mutex<State>>,
}

struct State {
    queues: Vec<VecDeque<Item>>,
    seed: u64,
    steps: u64,
}

enum Item {
    Kernel(Box<dyn FnOnce() + Send>),
    Wait(Event),
    Record(Arc<AtomicBool>),
}

impl LazyCpu {
    /// A device whose random order is drawn from `seed`.
    pub fn new(seed: u64) -> LazyCpu {
        LazyCpu { state: Arc::new(Mutex::new(State { queues: Vec::new(), seed, steps: 0 })) }
    }
}

impl Device for LazyCpu {
    fn name(&self) -> &'static str {
        "lazy-cpu"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        Buffer::heap(self.name(), dtype, len, self.deferred())
    }

    fn queue(&self) -> Box<dyn Queue> {
        let mut state = self.state.lock();
        state.queues.push(VecDeque::new());
        let index = state.queues.len() - 1;
        let lazy = Some(LazyQueue { state: self.state.clone(), index });
        Box::new(HostQueue { lazy, team: Team::default(), profile: None })
    }

    fn deferred(&self) -> bool {
        true
    }
}

/// One queue of a [`LazyCpu`].
pub(super) struct LazyQueue {
    state: Arc<Mutex<State>>,
    index: usize,
}

impl LazyQueue {
    pub(super) fn push(&self, kernel: Box<dyn FnOnce() + Send>) {
        self.push_item(Item::Kernel(kernel));
    }

    pub(super) fn wait_for(&self, event: &Event) {
        self.push_item(Item::Wait(event.clone()));
    }

    pub(super) fn record(&self) -> Event {
        let reached = Arc::new(AtomicBool::new(false));
        self.push_item(Item::Record(reached.clone()));
        Event::new(Arc::new(Reached { state: self.state.clone(), index: self.index, reached }))
    }

    fn push_item(&self, item: Item) {
        self.state.lock().queues[self.index].push_back(item);
    }
}

struct Reached {
    state: Arc<Mutex<State>>,
    index: usize,
    reached: Arc<AtomicBool>,
}

impl Completion for Reached {
    fn is_complete(&self) -> bool {
        self.reached.load(Ordering::Acquire)
    }

    fn advance(&self) -> bool {
        if self.is_complete() {
            return true;
        }
        let mut state = self.state.lock();
        while !self.is_complete() {
            if state.coin() {
                let other = state.random_queue();
                state.step(other);
            }
            if !state.step(self.index) && !state.step_any() {
                return self.is_complete();
            }
        }
        true
    }
}

impl State {
    /// Runs the first item of a queue; false when there is none or it waits for something that has not happened.
    fn step(&mut self, index: usize) -> bool {
        if let Some(Item::Wait(event)) = self.queues[index].front()
            && !event.is_complete()
        {
            return false;
        }
        match self.queues[index].pop_front() {
            None => return false,
            Some(Item::Kernel(kernel)) => {
                let _access = exclusive(true);
                kernel();
            }
            Some(Item::Wait(_)) => {}
            Some(Item::Record(reached)) => reached.store(true, Ordering::Release),
        }
        true
    }

    /// Runs one item of some queue; false when every queue is empty or blocked.
    fn step_any(&mut self) -> bool {
        let first = self.random_queue();
        (0..self.queues.len()).any(|offset| self.step((first + offset) % self.queues.len()))
    }

    fn coin(&mut self) -> bool {
        self.draw().is_multiple_of(2)
    }

    fn random_queue(&mut self) -> usize {
        (self.draw() % self.queues.len() as u64) as usize
    }

    fn draw(&mut self) -> u64 {
        self.steps += 1;
        random::bits(self.seed, 0, self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(queue: &dyn Queue, buffer: &Buffer) -> Vec<f32> {
        queue.download(buffer.view())
    }

    #[test]
    fn work_runs_only_when_somebody_waits() {
        let device = LazyCpu::new(1);
        let (queue, reader) = (device.queue(), device.queue());
        let mut x = device.allocate(DType::F32, 2).unwrap();
        queue.upload(x.view_mut(), &[1.0f32, 2.0]);
        let event = queue.record();
        assert!(!event.is_complete(), "nobody has waited yet");
        reader.wait_for(&event);
        assert_eq!(values(&*reader, &x), [1.0, 2.0]);
        assert!(event.is_complete());
    }

    #[test]
    fn a_missing_event_shows_as_stale_values() {
        let stale = (0..20)
            .filter(|&seed| {
                let device = LazyCpu::new(seed);
                let (writer, reader) = (device.queue(), device.queue());
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
        LazyCpu::new(0).queue().zero(x.view_mut());
    }
}
