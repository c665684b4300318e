//! How long a rank waits for the others at the start, and what it says meanwhile.

use std::io::Write;
use std::time::{Duration, Instant};

/// Longer limits are no limits; the clock cannot count all that a `Duration` can hold.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The patience of one rank.
pub(crate) struct Patience {
    rank: usize,
    started: Instant,
    pub(crate) deadline: Instant,
    /// When to say for whom this rank waits; `None` once it has.
    warn_at: Option<Instant>,
}

impl Patience {
    pub(crate) fn new(rank: usize, limit: Duration, warn_after: Duration) -> Patience {
        let started = Instant::now();
        let after = |duration: Duration| started + duration.min(FOREVER);
        Patience { rank, started, deadline: after(limit), warn_at: Some(after(warn_after)) }
    }

    /// How long this rank waits at most, not less than a millisecond.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    /// Until when this rank may sleep.
    pub(crate) fn next(&self) -> Instant {
        self.warn_at.map_or(self.deadline, |warn_at| warn_at.min(self.deadline))
    }

    /// Says once for whom this rank waits, when it has waited for long.
    pub(crate) fn warn(&mut self, whom: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.warn_at.is_none_or(|warn_at| now < warn_at) {
            return;
        }
        self.warn_at = None;
        let (waited, left) = (now - self.started, self.deadline.saturating_duration_since(now));
        // A closed stderr must not end the thread that says this.
        let line = format!(
            "pillion: rank {} has waited {:.0} s at the start for {}; it gives up in {:.0} s\n",
            self.rank,
            waited.as_secs_f64(),
            whom(),
            left.as_secs_f64()
        );
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
