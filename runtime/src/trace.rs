//! Timelines of a step, in the trace-event format that Perfetto (ui.perfetto.dev) and chrome://tracing read: the "JSON Object Format" of Google's
//! "Trace Event Format", with complete events (`ph: "X"`, times in microseconds) and metadata (`ph: "M"`) that names a process for each rank, with a
//! thread for each queue.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Write};
use std::ops::Range;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Action, Layout, Outline, Pass};

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

/// How a timeline shows an operation: on which track, by which name, and with which units.
pub(crate) fn label(action: Action, outline: &Outline) -> (Track, &'static str, Range<usize>) {
    let units = |bucket: usize| outline.buckets[bucket].clone();
    match action {
        Action::Gather { bucket, .. } => (Track::Gather, "gather", units(bucket)),
        Action::Compute { unit, pass: Pass::Forward, .. } => (Track::Compute, "forward", unit..unit + 1),
        Action::Compute { unit, pass: Pass::Backward, .. } => (Track::Compute, "backward", unit..unit + 1),
        Action::Reduce { bucket, .. } => (Track::Reduce, "reduce", units(bucket)),
        Action::AllReduce { bucket } => (Track::Replicate, "all-reduce", units(bucket)),
        Action::Agree => (Track::Compute, "agree", 0..0),
        Action::Update { unit } => (Track::Compute, "update", unit..unit + 1),
    }
}

/// How a timeline names units that follow each other, if there are any.
pub(crate) fn name(layout: &Layout, units: Range<usize>) -> Option<String> {
    match &layout.units[units] {
        [] => None,
        [unit] => Some(unit.name.clone()),
        [first, .., last] => Some(format!("{} to {}", first.name, last.name)),
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
    /// The unit that it did it with, or the first and the last, if with any.
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
pub fn write_trace(out: impl Write, events: &[TraceEvent]) -> io::Result<()> {
    let mut writer = TraceWriter::new(out)?;
    writer.write(events)?;
    writer.finish()
}

/// Writes a timeline piece by piece, one line for each event; a viewer reads one without an end too.
pub struct TraceWriter<W: Write> {
    out: W,
    separator: &'static str,
    /// What has a name by now.
    named: BTreeSet<(usize, Option<Track>)>,
}

/// The first line of a timeline that this module writes.
pub const HEADER: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
const FOOTER: &str = "]}";

impl<W: Write> TraceWriter<W> {
    /// Begins one.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn new(mut out: W) -> io::Result<TraceWriter<W>> {
        out.write_all(HEADER.as_bytes())?;
        Ok(TraceWriter { out, separator: "\n", named: BTreeSet::new() })
    }

    /// Adds events, and flushes `out`.
    ///
    /// # Errors
    /// As for [`TraceWriter::new`].
    pub fn write(&mut self, events: &[TraceEvent]) -> io::Result<()> {
        let metadata = |name: &str, rank: usize, track: usize, args: Value| json!({ "ph": "M", "name": name, "pid": rank, "tid": track, "args": args });
        for event in events {
            let &TraceEvent { rank, track, .. } = event;
            let number = track as usize;
            if self.named.insert((rank, None)) {
                self.line(&metadata("process_name", rank, 0, json!({ "name": format!("rank {rank}") })))?;
            }
            if self.named.insert((rank, Some(track))) {
                self.line(&metadata("thread_name", rank, number, json!({ "name": track.name() })))?;
                self.line(&metadata("thread_sort_index", rank, number, json!({ "sort_index": number })))?;
            }
            self.line(&complete(event))?;
        }
        self.out.flush()
    }

    /// Adds the events of a timeline that is complete.
    ///
    /// # Errors
    /// When it cannot be read, or is none that this module wrote.
    pub fn append(&mut self, timeline: impl BufRead) -> io::Result<()> {
        let mut lines = timeline.lines();
        let foreign = || io::Error::new(io::ErrorKind::InvalidData, "this is no whole timeline of ours");
        if lines.next().transpose()?.as_deref() != Some(HEADER) {
            return Err(foreign());
        }
        for line in lines {
            let line = line?;
            if line == FOOTER {
                return Ok(());
            }
            self.text(line.trim_end_matches(','))?;
        }
        Err(foreign())
    }

    /// Ends it.
    ///
    /// # Errors
    /// As for [`TraceWriter::new`].
    pub fn finish(mut self) -> io::Result<()> {
        writeln!(self.out, "\n{FOOTER}")?;
        self.out.flush()
    }

    fn line(&mut self, event: &Value) -> io::Result<()> {
        self.text(&event.to_string())
    }

    fn text(&mut self, event: &str) -> io::Result<()> {
        self.out.write_all(self.separator.as_bytes())?;
        self.separator = ",\n";
        self.out.write_all(event.as_bytes())
    }
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

    #[test]
    fn timelines_of_several_ranks_become_one_and_half_of_one_is_refused() {
        let event = |rank| TraceEvent {
            rank,
            track: Track::Gather,
            name: "gather",
            unit: None,
            bytes: 0,
            start: Duration::from_micros(1),
            duration: Duration::from_micros(2),
        };
        let piece = |rank| {
            let mut piece = Vec::new();
            write_trace(&mut piece, &[event(rank), event(rank)]).unwrap();
            piece
        };
        let (mut one, mut joined) = (Vec::new(), Vec::new());
        write_trace(&mut one, &[event(0), event(0), event(1), event(1)]).unwrap();
        let mut writer = TraceWriter::new(&mut joined).unwrap();
        (0..2).for_each(|rank| writer.append(&*piece(rank)).unwrap());
        writer.finish().unwrap();
        assert_eq!(joined, one);
        let whole = piece(0);
        for end in [0, HEADER.len(), whole.len() - FOOTER.len() - 1] {
            assert!(TraceWriter::new(Vec::new()).unwrap().append(&whole[..end]).is_err(), "{end}");
        }
    }
}
