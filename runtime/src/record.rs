//! What a rank did and when, while somebody wants to know: computing and waiting as the host sees them, collectives as the communicators do.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use pillion_collectives::Recorded;

use crate::axes::Axes;
use crate::trace::{self, TraceEvent, Track, label};
use crate::{Action, Layout, Plan};

/// The events of one rank.
pub(crate) struct Recording {
    rank: usize,
    /// A moment that is the same on every rank, as nearly as a barrier can make it.
    origin: Instant,
    layout: Arc<Layout>,
    events: Vec<TraceEvent>,
}

impl Recording {
    pub(crate) fn new(rank: usize, layout: Arc<Layout>) -> Recording {
        Recording { rank, origin: Instant::now(), layout, events: Vec::new() }
    }

    pub(crate) fn take(&mut self) -> Vec<TraceEvent> {
        std::mem::take(&mut self.events)
    }

    /// The host did this from `start` until now.
    pub(crate) fn host(&mut self, name: &'static str, units: Range<usize>, start: Instant) {
        let span = Recorded { operation: name, start, end: Instant::now(), bytes: 0 };
        self.push(Track::Compute, name, units, span);
    }

    /// The collectives of a step that has ended. The first of a kind is the plan's first of that kind; where other operations were called in between, nobody
    /// knows which is whose, and units are left out.
    pub(crate) fn collectives(&mut self, plan: &Plan, axes: &Axes) {
        let [shard, replicate] = axes.recorded();
        for (track, spans, operations) in [
            (Track::Gather, &shard, ["all-gather", "window gather"]),
            (Track::Reduce, &shard, ["reduce-scatter"; 2]),
            (Track::Replicate, &replicate, ["all-reduce"; 2]),
        ] {
            let spans: Vec<Recorded> =
                spans.iter().filter(|span| operations.contains(&span.operation)).copied().collect();
            let planned: Vec<Action> = plan
                .operations
                .iter()
                .map(|operation| operation.action)
                .filter(|&action| label(action, &plan.outline).0 == track)
                .collect();
            for (index, &span) in spans.iter().enumerate() {
                let planned =
                    if planned.len() == spans.len() { Some(label(planned[index], &plan.outline)) } else { None };
                let (_, name, units) = planned.unwrap_or((track, span.operation, 0..0));
                self.push(track, name, units, span);
            }
        }
    }

    fn push(&mut self, track: Track, name: &'static str, units: Range<usize>, span: Recorded) {
        self.events.push(TraceEvent {
            rank: self.rank,
            track,
            name,
            unit: trace::name(&self.layout, units),
            bytes: span.bytes,
            start: span.start.saturating_duration_since(self.origin),
            duration: span.end.saturating_duration_since(span.start),
        });
    }
}
