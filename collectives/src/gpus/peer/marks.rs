//! The marks by which streams of ranks that are processes are ordered, and what lets them go on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pillion_kernels::{Buffer, Cuda, Failure, Words};

use crate::Error;
use crate::gpus::LANES;
use crate::gpus::watch::{Late, Lateness, Waiting};
use crate::memory::control::Call;
use crate::transport::{Limit, Transport};

/// The marks of the ranks' streams.
pub(super) struct Marks {
    words: Words,
    /// Memory of the words, which goes after them.
    _pages: Buffer,
    rank: usize,
    world: usize,
    lanes: [Mutex<Lane>; LANES],
}

/// What one of this rank's streams was given.
struct Lane {
    /// The last mark.
    last: u32,
    /// Marks that all ranks have enqueued and not all are known to have written, and their steps.
    open: VecDeque<(u32, Call, Limit)>,
}

/// Whether a stream that wrote `mark` has written `other`, or is beyond it.
fn has_come(mark: u32, other: u32) -> bool {
    mark.wrapping_sub(other) as i32 >= 0
}

impl Marks {
    /// All streams have written `first`.
    pub(super) fn new(words: Words, pages: Buffer, rank: usize, world: usize, first: u32) -> Marks {
        let lane = || Mutex::new(Lane { last: first, open: VecDeque::new() });
        Marks { words, _pages: pages, rank, world, lanes: std::array::from_fn(|_| lane()) }
    }

    pub(super) fn words(&self) -> &Words {
        &self.words
    }

    /// The next mark of a stream of this rank.
    pub(super) fn next(&self, lane: usize) -> u32 {
        let mut lane = self.lanes[lane].lock();
        lane.last = lane.last.wrapping_add(1);
        lane.last
    }

    /// All ranks have enqueued the mark, at this step of an operation.
    pub(super) fn expect(&self, lane: usize, mark: u32, call: Call, limit: Limit) {
        self.lanes[lane].lock().open.push_back((mark, call, limit));
    }

    /// The first mark that this rank's stream has written and others have not, and whom it waits
    /// for. `gpu` hears of marks that all have written since the last look.
    fn late(&self, lane: usize, gpu: &Cuda) -> Option<Late> {
        let mut state = self.lanes[lane].lock();
        let written = |rank: usize, mark: u32| has_come(self.words.get(rank, lane), mark);
        while let Some((mark, call, limit)) = state.open.front().copied() {
            let ranks: Vec<usize> = (0..self.world).filter(|&rank| !written(rank, mark)).collect();
            if !ranks.is_empty() {
                let how = "its GPU has not come so far";
                return written(self.rank, mark).then_some(Late { at: u64::from(mark), call, limit, ranks, how });
            }
            state.open.pop_front();
            gpu.has_progressed();
        }
        None
    }

    /// Lets go on what waits for the streams of any rank.
    fn poison(&self) {
        self.lanes.iter().enumerate().for_each(|(number, lane)| self.words.poison(number, lane.lock().last));
    }
}

/// Streams that wait for marks.
pub(super) struct WaitingForMarks {
    marks: Arc<Marks>,
    control: Arc<dyn Transport>,
    gpu: Cuda,
    lateness: [Lateness; LANES],
}

impl WaitingForMarks {
    pub(super) fn new(marks: &Arc<Marks>, control: &Arc<dyn Transport>, gpu: &Cuda) -> WaitingForMarks {
        let (marks, control) = (marks.clone(), control.clone());
        WaitingForMarks { marks, control, gpu: gpu.clone(), lateness: Default::default() }
    }
}

impl Waiting for WaitingForMarks {
    fn look(&mut self, gap: Duration) -> Result<(), Error> {
        let (marks, control, gpu) = (&self.marks, &*self.control, &self.gpu);
        let mut lanes = self.lateness.iter_mut().enumerate();
        lanes.try_for_each(|(lane, lateness)| lateness.count(marks.late(lane, gpu), marks.rank, gap, control))
    }

    fn give_up(&mut self, error: Error) {
        self.gpu.fail(Failure::new(error));
    }

    /// Streams that are late may overwrite it, so it is done again and again.
    fn let_go(&mut self) {
        self.marks.poison();
    }
}

#[cfg(test)]
mod tests {
    use super::has_come;

    #[test]
    fn marks_wrap() {
        assert!(has_come(5, 5) && has_come(6, 5) && !has_come(4, 5));
        assert!(has_come(0, u32::MAX) && !has_come(u32::MAX, 0) && has_come(3, u32::MAX - 3));
    }
}
