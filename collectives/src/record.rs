//! When operations began and ended, for those who ask.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use pillion_kernels::Stamp;

/// An operation that has ended, or, between GPUs, is enqueued.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Which one: "all-gather", "window gather", "reduce-scatter" and so on.
    pub operation: &'static str,
    /// When this rank took part, its operands being there. Other ranks may have come later.
    pub start: Stamp,
    /// When it was complete on this rank.
    pub end: Stamp,
    /// Bytes that other ranks took from this one.
    pub bytes: u64,
}

/// Spans, while somebody wants them.
#[derive(Default)]
pub(crate) struct Record {
    wanted: AtomicBool,
    spans: Mutex<Vec<Recorded>>,
}

impl Record {
    pub(crate) fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    /// Whether somebody wants them.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The start of an operation whose end is to be recorded.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.is_wanted().then(Instant::now)
    }

    pub(crate) fn end(&self, span: Recorded) {
        self.spans.lock().push(span);
    }

    pub(crate) fn take(&self) -> Vec<Recorded> {
        std::mem::take(&mut *self.spans.lock())
    }
}
