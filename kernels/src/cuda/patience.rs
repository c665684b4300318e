//! How long the host waits for a GPU that makes no progress.
//!
//! A GPU that hangs reports no error. But it comes to none of the moments that were recorded of a
//! rank's streams any more, and a step records many. So a wait ends when for so long none of them
//! has happened.

use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::event::{Record, Recorded};

/// How often a waiting thread looks for progress. Longer pauses of the thread count as one: the
/// process may have been stopped meanwhile, and not the GPU.
const LOOK: Duration = Duration::from_millis(50);
/// So many moments are kept without a look at which of them have happened.
const MOMENTS: usize = 256;

/// How patient a rank is, and what it waits for.
pub(super) struct Patience {
    nanoseconds: AtomicU64,
    /// Whether it has been lost: nobody waits for this GPU any more.
    lost: AtomicBool,
    pending: Mutex<Pending>,
}

struct Pending {
    /// Moments that may not have happened yet.
    moments: Vec<Weak<Record>>,
    /// How many there may be before those that have happened are dropped.
    most: usize,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            nanoseconds: AtomicU64::new(u64::MAX),
            lost: AtomicBool::new(false),
            pending: Mutex::new(Pending { moments: Vec::new(), most: MOMENTS }),
        }
    }
}

impl Patience {
    pub(super) fn set(&self, patience: Duration) {
        self.nanoseconds.store(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// A moment that was recorded now.
    pub(super) fn expect(&self, moment: Weak<Record>) {
        let mut pending = self.pending.lock();
        if pending.moments.len() >= pending.most {
            pending.moments.retain(|moment| moment.upgrade().is_some_and(|record| !record.is_known()));
            pending.most = MOMENTS + 2 * pending.moments.len();
        }
        pending.moments.push(moment);
    }

    /// Whether a moment has happened since the last look.
    fn has_progressed(&self) -> bool {
        let mut progressed = false;
        self.pending.lock().moments.retain(|moment| {
            let Some(record) = moment.upgrade() else { return false };
            let ended = Recorded::from(record).has_ended();
            progressed |= ended;
            !ended
        });
        progressed
    }

    /// Begins a wait.
    pub(super) fn stall(&self) -> Stall<'_> {
        Stall { patience: self, looked: Instant::now(), stalled: Duration::ZERO }
    }
}

/// For how long a wait has seen no progress.
pub(super) struct Stall<'a> {
    patience: &'a Patience,
    looked: Instant,
    stalled: Duration,
}

impl Stall<'_> {
    /// For how long the GPU has stood still, if that is longer than the rank is patient.
    pub(super) fn is_over(&mut self) -> Option<Duration> {
        if self.patience.is_lost() {
            return Some(self.stalled);
        }
        if self.looked.elapsed() < LOOK {
            return None;
        }
        self.looked = Instant::now();
        self.stalled = if self.patience.has_progressed() { Duration::ZERO } else { self.stalled + LOOK };
        let limit = Duration::from_nanos(self.patience.nanoseconds.load(Ordering::Relaxed));
        if self.stalled < limit {
            return None;
        }
        self.patience.lost.store(true, Ordering::Relaxed);
        Some(self.stalled)
    }
}
