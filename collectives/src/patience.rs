//! How long a rank waits for the others at the start, and what it says meanwhile.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::terms::Terms;

/// Longer limits are no limits; the clock cannot count all that a `Duration` can hold.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How often a rank that may be told to end looks whether it is.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The patience of one rank.
pub(crate) struct Patience {
    rank: usize,
    started: Instant,
    pub(crate) deadline: Instant,
    /// When to say for whom this rank waits; `None` once it has.
    warn_at: Option<Instant>,
    /// Whether this rank has said who came with other settings.
    has_complained: bool,
    /// Ends the wait once it is raised.
    stop: Option<Arc<AtomicBool>>,
}

impl Patience {
    pub(crate) fn new(rank: usize, limit: Duration, warn_after: Duration) -> Patience {
        let started = Instant::now();
        let after = |duration: Duration| started + duration.min(FOREVER);
        Patience {
            rank,
            started,
            deadline: after(limit),
            warn_at: Some(after(warn_after)),
            has_complained: false,
            stop: None,
        }
    }

    /// Lets this flag end the wait, too.
    pub(crate) fn stopped_by(self, stop: Option<Arc<AtomicBool>>) -> Patience {
        Patience { stop, ..self }
    }

    /// Whether this rank waits no longer.
    pub(crate) fn is_over(&self) -> bool {
        self.is_stopped() || Instant::now() >= self.deadline
    }

    /// Whether this rank was told to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    /// Moves the deadline, so that this rank waits at least this long from now on.
    pub(crate) fn last_at_least(&mut self, limit: Duration) {
        self.deadline = self.deadline.max(Instant::now() + limit.min(FOREVER));
    }

    /// How long this rank waits at most, not less than a millisecond.
    pub(crate) fn left(&self) -> Duration {
        if self.is_over() {
            return Duration::from_millis(1);
        }
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    /// Until when this rank may sleep.
    pub(crate) fn next(&self) -> Instant {
        let next = self.warn_at.map_or(self.deadline, |warn_at| warn_at.min(self.deadline));
        if self.stop.is_some() { next.min(Instant::now() + LOOK_EVERY) } else { next }
    }

    /// Says on rank 0, of the first rank that came with other settings, which they are: it will not
    /// come again, and nobody may have read what it said.
    pub(crate) fn complain(&mut self, rank: u64, theirs: &Terms, own: &Terms) {
        if let (false, Some(differences)) = (self.has_complained, theirs.differences(&format!("rank {rank}"), own)) {
            self.has_complained = true;
            crate::launcher::say(&format!("turned a rank away: {differences}"));
        }
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
