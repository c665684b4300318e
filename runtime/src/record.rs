//! What a rank did and when, while somebody wants to know: computing and waiting as the device
//! comes to them, collectives as the communicators do.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pillion_collectives::Recorded;
use pillion_kernels::Stamp;

use crate::axes::Axes;
use crate::trace::{self, TraceEvent, Track, label};
use crate::{Action, Layout, Plan};

/// The events of one rank.
pub(crate) struct Recording {
    rank: usize,
    /// A moment that is the same on every rank, as nearly as a barrier can make it.
    origin: Instant,
    layout: Arc<Layout>,
    spans: Vec<Span>,
}

/// An event whose times the device may not know yet.
struct Span {
    track: Track,
    name: &'static str,
    units: Range<usize>,
    start: Stamp,
    end: Stamp,
    bytes: u64,
}

impl Recording {
    pub(crate) fn new(rank: usize, layout: Arc<Layout>) -> Recording {
        Recording { rank, origin: Instant::now(), layout, spans: Vec::new() }
    }

    /// The events that have ended since this was last asked, in the order in which they were
    /// enqueued.
    pub(crate) fn take(&mut self) -> Vec<TraceEvent> {
        let mut events = Vec::with_capacity(self.spans.len());
        let Recording { rank, origin, layout, spans } = self;
        spans.retain(|span| {
            let (Some(start), Some(end)) = (span.start.time(), span.end.time()) else { return true };
            events.push(TraceEvent {
                rank: *rank,
                track: span.track,
                name: span.name,
                unit: trace::name(layout, span.units.clone()),
                bytes: span.bytes,
                start: start.saturating_duration_since(*origin),
                duration: end.saturating_duration_since(start),
            });
            false
        });
        events
    }

    /// The device does this from `start` to `end`, or the host waits.
    pub(crate) fn push(&mut self, name: &'static str, units: Range<usize>, start: Stamp, end: Stamp) {
        self.spans.push(Span { track: Track::Compute, name, units, start, end, bytes: 0 });
    }

    /// The collectives of a step whose last operation is enqueued. The first of a kind is the
    /// plan's first of that kind; where other operations were called in between, nobody knows which
    /// is whose, and units are left out.
    pub(crate) fn collectives(&mut self, plan: &Plan, axes: &Axes) {
        let [shard, replicate] = axes.recorded();
        for (track, recorded, operations) in [
            (Track::Gather, &shard, ["all-gather", "window gather"]),
            (Track::Reduce, &shard, ["reduce-scatter"; 2]),
            (Track::Replicate, &replicate, ["all-reduce"; 2]),
        ] {
            let recorded: Vec<&Recorded> =
                recorded.iter().filter(|recorded| operations.contains(&recorded.operation)).collect();
            let planned: Vec<Action> = plan
                .operations
                .iter()
                .map(|operation| operation.action)
                .filter(|&action| label(action, &plan.outline).0 == track)
                .collect();
            let is_planned = planned.len() == recorded.len();
            for (index, recorded) in recorded.into_iter().enumerate() {
                let planned = is_planned.then(|| label(planned[index], &plan.outline));
                let (_, name, units) = planned.unwrap_or((track, recorded.operation, 0..0));
                let Recorded { start, end, bytes, .. } = recorded.clone();
                self.spans.push(Span { track, name, units, start, end, bytes });
            }
        }
    }
}
