//! What looks after the operations of NCCL: a stream that waits for a rank that died would wait for
//! ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pillion_kernels::{Cuda, Event, Failure};

use super::communicator::{Communicator, wait_for};
use crate::Error;
use crate::gpus::LANES;
use crate::gpus::watch::{Late, Lateness, Waiting};
use crate::memory::control::Call;
use crate::transport::{Limit, Transport};

/// An operation of a stream that may not have run.
pub(super) struct UnderWay {
    /// This rank's stream has come to it.
    pub(super) reached: Event,
    pub(super) done: Event,
    pub(super) call: Call,
    pub(super) limit: Limit,
}

/// The operations of each stream.
#[derive(Default)]
pub(super) struct Operations([Mutex<VecDeque<UnderWay>>; LANES]);

impl Operations {
    /// One more is enqueued on the stream of this number.
    pub(super) fn expect(&self, lane: usize, operation: UnderWay) {
        self.0[lane].lock().push_back(operation);
    }

    /// The first that this rank's stream has come to, and that has not run. Which of `others` it
    /// waits for, NCCL does not say.
    fn late(&self, lane: usize, others: &[usize]) -> Option<Late> {
        let mut operations = self.0[lane].lock();
        while operations.front().is_some_and(|first| first.done.status().is_ready()) {
            operations.pop_front();
        }
        let first = operations.front().filter(|first| first.reached.status().is_ready())?;
        let (at, how) = (first.call.sequence, "their GPUs, or the network, have not come so far");
        Some(Late { at, call: first.call, limit: first.limit, ranks: others.to_vec(), how })
    }
}

/// Streams that wait for NCCL.
pub(super) struct WaitingForNccl {
    pub(super) communicators: Arc<[Communicator; LANES]>,
    pub(super) operations: Arc<Operations>,
    pub(super) control: Arc<dyn Transport>,
    pub(super) gpu: Cuda,
    pub(super) rank: usize,
    pub(super) lateness: [Lateness; LANES],
}

impl Waiting for WaitingForNccl {
    fn look(&mut self, gap: Duration) -> Result<(), Error> {
        let others: Vec<usize> = (0..self.control.hosts().world()).filter(|&rank| rank != self.rank).collect();
        for lane in 0..LANES {
            let settled = self.communicators[lane].is_settled("moving elements");
            settled.map_err(|error| self.control.fail(error))?;
            let late = self.operations.late(lane, &others);
            self.lateness[lane].count(late, self.rank, gap, &*self.control)?;
        }
        Ok(())
    }

    fn give_up(&mut self, error: Error) {
        // An error of the driver has ended the GPU's work already.
        let _ = self.gpu.stop(Failure::new(error));
    }

    fn let_go(&mut self) {
        // All are broken off before any is waited for: one may wait for kernels of another.
        let ending: Vec<_> = self.communicators.iter().filter_map(Communicator::break_off).collect();
        wait_for(ending);
    }
}
