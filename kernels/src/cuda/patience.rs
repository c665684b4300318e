//! How long the host waits for a GPU that makes no progress.
//!
//! A GPU that hangs reports no error. But it comes to none of the moments that were recorded of a
//! rank's streams any more, and a step records many. So a wait ends when for so long none of them
//! has happened.

use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// In nanoseconds.
    limit: AtomicU64,
    /// For how many nanoseconds nothing had happened when the patience was lost; 0 before. Nobody
    /// waits for this GPU after that.
    lost: AtomicU64,
    /// How many moments are known to have happened.
    happened: AtomicU64,
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
            limit: AtomicU64::new(u64::MAX),
            lost: AtomicU64::new(0),
            happened: AtomicU64::new(0),
            pending: Mutex::new(Pending { moments: Vec::new(), most: MOMENTS }),
        }
    }
}

impl Patience {
    /// Waits at least so long from now on. Before the first call a rank waits for ever.
    pub(super) fn raise(&self, least: Duration) {
        // The largest number means that there was no call.
        let least = u64::try_from(least.as_nanos()).map_or(u64::MAX - 1, |least| least.min(u64::MAX - 1));
        let raised = |limit| if limit == u64::MAX { Some(least) } else { Some(least.max(limit)) };
        let _ = self.limit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raised);
    }

    /// Something has happened that this rank's work has come to.
    pub(super) fn progress(&self) {
        self.happened.fetch_add(1, Ordering::Relaxed);
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

    /// Asks the driver which moments have happened.
    fn look(&self) {
        self.pending.lock().moments.retain(|moment| {
            let record = moment.upgrade();
            record.is_some_and(|record| !Recorded::from(record).has_ended())
        });
    }

    /// Begins a wait.
    pub(super) fn stall(&self) -> Stall<'_> {
        let happened = self.happened.load(Ordering::Relaxed);
        Stall { patience: self, looked: Instant::now(), happened, stalled: Duration::ZERO }
    }
}

/// For how long a wait has seen no progress.
pub(super) struct Stall<'a> {
    patience: &'a Patience,
    looked: Instant,
    /// As [`Patience::happened`] was at the last look.
    happened: u64,
    stalled: Duration,
}

impl Stall<'_> {
    /// For how long the GPU has stood still, if that is longer than the rank is patient.
    pub(super) fn is_over(&mut self) -> Option<Duration> {
        let Patience { limit, lost, happened, .. } = self.patience;
        match lost.load(Ordering::Relaxed) {
            0 => {}
            nanoseconds => return Some(Duration::from_nanos(nanoseconds)),
        }
        if self.looked.elapsed() < LOOK {
            return None;
        }
        self.looked = Instant::now();
        self.patience.look();
        let happened = happened.load(Ordering::Relaxed);
        self.stalled = if happened == self.happened { self.stalled + LOOK } else { Duration::ZERO };
        self.happened = happened;
        let nanoseconds = self.stalled.as_nanos() as u64;
        if nanoseconds < limit.load(Ordering::Relaxed) {
            return None;
        }
        lost.store(nanoseconds, Ordering::Relaxed);
        Some(self.stalled)
    }
}
