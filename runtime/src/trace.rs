//! Timelines of a step, in the trace-event format that Perfetto (ui.perfetto.dev) and chrome://tracing read: the "JSON Object Format" of Google's
//! "Trace Event Format", with complete events (`ph: "X"`, times in microseconds) and metadata (`ph: "M"`) that names a process for each rank, with a
//! thread for each queue.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Value, json};

/// The queue that an event belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Track {
    /// Kernels, and what the host waits for.
    Compute,
    /// Gathers of weights.
    Gather,
    /// Reductions of gradients to shards.
    Reduce,
    /// Sums of gradients over groups.
    Replicate,
}

impl Track {
    /// What a viewer shows.
    pub fn name(self) -> &'static str {
        match self {
            Track::Compute => "compute",
            Track::Gather => "gather",
            Track::Reduce => "reduce",
            Track::Replicate => "replicate",
        }
    }
}

/// Something that a rank did for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEvent {
    /// The rank.
    pub rank: usize,
    /// Its queue.
    pub track: Track,
    /// What it did.
    pub name: &'static str,
    /// The unit that it did it with, if with one.
    pub unit: Option<String>,
    /// Bytes that the rank sent.
    pub bytes: u64,
    /// When it began, from any moment that is the same for all events.
    pub start: Duration,
    /// How long it took.
    pub duration: Duration,
}

/// Writes a timeline.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_trace(mut out: impl Write, events: &[TraceEvent]) -> io::Result<()> {
    let tracks: BTreeSet<(usize, Track)> = events.iter().map(|event| (event.rank, event.track)).collect();
    let ranks: BTreeSet<usize> = tracks.iter().map(|&(rank, _)| rank).collect();
    let metadata = |name: &str, rank: usize, track: usize, args: Value| json!({ "ph": "M", "name": name, "pid": rank, "tid": track, "args": args });
    let ranks = ranks.iter().map(|&rank| metadata("process_name", rank, 0, json!({ "name": format!("rank {rank}") })));
    let named = tracks
        .iter()
        .map(|&(rank, track)| metadata("thread_name", rank, track as usize, json!({ "name": track.name() })));
    let sorted = tracks.iter().map(|&(rank, track)| {
        metadata("thread_sort_index", rank, track as usize, json!({ "sort_index": track as usize }))
    });
    let mut separator = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
    for event in ranks.chain(named).chain(sorted).chain(events.iter().map(complete)) {
        out.write_all(separator.as_bytes())?;
        serde_json::to_writer(&mut out, &event)?;
        separator = ",\n";
    }
    if events.is_empty() {
        out.write_all(separator.as_bytes())?;
    }
    out.write_all(b"\n]}\n")?;
    out.flush()
}

fn complete(event: &TraceEvent) -> Value {
    let microseconds = |time: Duration| time.as_nanos() as f64 / 1e3;
    let name = match &event.unit {
        Some(unit) => format!("{} {unit}", event.name),
        None => event.name.to_owned(),
    };
    json!({
        "ph": "X",
        "name": name,
        "cat": event.track.name(),
        "pid": event.rank,
        "tid": event.track as usize,
        "ts": microseconds(event.start),
        "dur": microseconds(event.duration),
        "args": { "unit": event.unit, "bytes": event.bytes },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(events: &[TraceEvent]) -> Value {
        let mut out = Vec::new();
        write_trace(&mut out, events).unwrap();
        serde_json::from_slice(&out).expect("it is JSON")
    }

    #[test]
    fn events_are_complete_ones_in_microseconds_on_named_tracks() {
        let event = |rank, track, start| TraceEvent {
            rank,
            track,
            name: "gather",
            unit: Some("block \"0\"".to_owned()),
            bytes: 12,
            start: Duration::from_nanos(start),
            duration: Duration::from_nanos(1500),
        };
        let trace = written(&[event(0, Track::Compute, 250), event(3, Track::Gather, 0)]);
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).collect::<Vec<_>>();
        assert_eq!(of("X").len() + of("M").len(), events.len());
        assert_eq!(
            *of("X")[0],
            json!({ "ph": "X", "name": "gather block \"0\"", "cat": "compute", "pid": 0, "tid": 0, "ts": 0.25, "dur": 1.5,
                "args": { "unit": "block \"0\"", "bytes": 12 } })
        );
        // Every event's process and thread have names.
        for event in of("X") {
            for (kind, name) in [
                ("process_name", format!("rank {}", event["pid"])),
                ("thread_name", event["cat"].as_str().unwrap().to_owned()),
            ] {
                let is_named = |meta: &&&Value| {
                    let thread = kind == "process_name" || meta["tid"] == event["tid"];
                    meta["name"] == kind && meta["pid"] == event["pid"] && thread
                };
                assert_eq!(of("M").iter().find(is_named).expect("named")["args"]["name"], name);
            }
        }
    }

    #[test]
    fn a_timeline_of_nothing_is_one_too() {
        assert_eq!(written(&[])["traceEvents"], json!([]));
    }
}
