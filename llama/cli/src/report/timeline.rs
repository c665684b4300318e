//! What ranks did in one step, from a run's `trace.json`, as bars.

use std::fmt;
use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::Path;

use maud::{Markup, html};
use pillion_runtime::trace::Track;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::plot::number;
use crate::run_folder;

/// Ranks that are drawn.
const MOST_RANKS: usize = 4;
/// Events that take a smaller share of the step are not drawn.
const LEAST_SHARE: f64 = 1e-3;
const TRACKS: [Track; 4] = [Track::Compute, Track::Gather, Track::Reduce, Track::Replicate];
/// What events are called by, the classes of their bars.
const KINDS: [&str; 8] = ["forward", "backward", "update", "wait", "gather", "all-reduce", "reduce", "agree"];

/// One step of a run.
pub(super) struct Timeline {
    /// Ranks of the run.
    ranks: usize,
    /// The step's length in microseconds, on rank 0.
    length: f64,
    bars: Vec<Bar>,
}

struct Bar {
    rank: usize,
    track: usize,
    name: String,
    /// Microseconds from the step's beginning.
    start: f64,
    duration: f64,
}

/// An event of the trace-event format; those that name things have no times.
#[derive(Deserialize)]
struct Event {
    name: String,
    ph: String,
    pid: usize,
    tid: usize,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
}

/// Reads the timeline of the run in `folder`, if it has one. Of its steps it takes the one whose
/// length is the median of rank 0's.
///
/// # Errors
/// Why there is none, in words.
pub(super) fn read(folder: &Path) -> Result<Option<Timeline>, String> {
    let path = run_folder::trace(folder);
    let mut steps = Steps::default();
    match each(&path, |event| steps.add(&event)) {
        Err(Failure::Io(error)) if error.kind() == ErrorKind::NotFound => return Ok(None),
        result => result.map_err(|failure| failure.to_string())?,
    }
    let Some((start, end)) = steps.median() else { return Err("trace.json has no whole step".to_owned()) };
    let (length, mut bars) = (end - start, Vec::new());
    let result = each(&path, |event| {
        let (from, to) = (event.ts.max(start), (event.ts + event.dur).min(end));
        let is_drawn = event.ph == "X" && event.pid < MOST_RANKS && event.tid < TRACKS.len();
        if is_drawn && to - from >= LEAST_SHARE * length {
            let (start, duration) = (from - start, to - from);
            bars.push(Bar { rank: event.pid, track: event.tid, name: event.name, start, duration });
        }
    });
    result.map_err(|failure| failure.to_string())?;
    Ok(Some(Timeline { ranks: steps.ranks, length, bars }))
}

/// The steps of rank 0: each ends with its last update.
#[derive(Default)]
struct Steps {
    ranks: usize,
    /// Beginning and end of those that are whole.
    whole: Vec<(f64, f64)>,
    begun: Option<f64>,
    /// Of the last update, if nothing else has begun since.
    updated: Option<f64>,
}

impl Steps {
    fn add(&mut self, event: &Event) {
        self.ranks = self.ranks.max(event.pid + 1);
        if event.ph != "X" || event.pid != 0 || event.tid != Track::Compute as usize {
            return;
        }
        let is_update = event.name.starts_with("update");
        if !is_update {
            self.close();
        }
        self.begun.get_or_insert(event.ts);
        if is_update {
            self.updated = Some(event.ts + event.dur);
        }
    }

    fn close(&mut self) {
        if let (Some(end), Some(start)) = (self.updated.take(), self.begun) {
            self.whole.push((start, end));
            self.begun = None;
        }
    }

    fn median(&mut self) -> Option<(f64, f64)> {
        self.close();
        self.whole.retain(|(start, end)| end > start);
        self.whole.sort_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)));
        self.whole.get(self.whole.len() / 2).copied()
    }
}

const LEFT: f64 = 120.0;
const WIDTH: f64 = 780.0;
const ROW: f64 = 18.0;

impl Timeline {
    /// What it shows, in words.
    pub(super) fn caption(&self) -> String {
        let (step, least) = (milliseconds(self.length), milliseconds(self.length * LEAST_SHARE));
        let ranks = match self.ranks {
            1 => "1 rank".to_owned(),
            ranks if ranks > MOST_RANKS => format!("ranks 0 to {} of {ranks}", MOST_RANKS - 1),
            ranks => format!("{ranks} ranks"),
        };
        format!(
            "The step of median length, {step}, of {ranks}, without what took less than {least}. All steps are in \
             trace.json, for ui.perfetto.dev."
        )
    }

    /// Draws it. `id` names it on the page.
    pub(super) fn draw(&self, id: &str, title: &str) -> Markup {
        let rows = self.rows();
        let place = |microseconds: f64| LEFT + WIDTH * microseconds / self.length;
        let round = |pixels: f64| (pixels * 10.0).round() / 10.0;
        let height = ROW * rows.len() as f64 + 34.0;
        let axis = crate::plot::Axis { low: 0.0, high: self.length / 1e3, scale: crate::plot::Scale::Linear };
        html! {
            svg class="plot" role="img" aria-labelledby={ (id) "-title " (id) "-text" }
                viewBox={ "0 0 " (LEFT + WIDTH + 10.0) " " (height) } {
                title id={ (id) "-title" } { (title) }
                desc id={ (id) "-text" } { (self.caption()) " " (self.shares()) }
                @for (index, &(rank, track)) in rows.iter().enumerate() {
                    @let top = ROW * index as f64 + 4.0;
                    text class="y tick" x=(LEFT - 6.0) y=(top + 12.0) { "rank " (rank) ", " (TRACKS[track].name()) }
                    @for bar in self.bars.iter().filter(|bar| (bar.rank, bar.track) == (rank, track)) {
                        rect class=(kind(&bar.name)) x=(round(place(bar.start))) y=(top)
                            width=(round(WIDTH * bar.duration / self.length).max(0.3)) height=(ROW - 4.0) {
                            title { (bar.name) ": " (milliseconds(bar.duration)) " from " (milliseconds(bar.start)) }
                        }
                    }
                }
                @let bottom = ROW * rows.len() as f64 + 4.0;
                path class="axis" d={ "M" (LEFT) " " (bottom) "h" (WIDTH) } {}
                @for tick in axis.ticks(10) {
                    text class="x tick" x=(round(place(tick.value * 1e3))) y=(bottom + 15.0) { (tick.label) }
                }
                text class="y tick" x=(LEFT - 16.0) y=(bottom + 15.0) { "ms" }
            }
        }
    }

    /// The kinds of events that it has, for a legend.
    pub(super) fn kinds(&self) -> Vec<&'static str> {
        KINDS.into_iter().filter(|&of| self.bars.iter().any(|bar| kind(&bar.name) == of)).collect()
    }

    fn rows(&self) -> Vec<(usize, usize)> {
        let mut rows: Vec<(usize, usize)> = self.bars.iter().map(|bar| (bar.rank, bar.track)).collect();
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// How much of the step rank 0 spent on what, in words.
    fn shares(&self) -> String {
        let share = |of: &'static str| {
            let bars = self.bars.iter().filter(|bar| bar.rank == 0 && kind(&bar.name) == of);
            let percent = 100.0 * bars.map(|bar| bar.duration).sum::<f64>() / self.length;
            format!("{of} {percent:.0} %")
        };
        let shares: Vec<String> = self.kinds().into_iter().map(share).collect();
        format!("Shares of the step on rank 0: {}.", shares.join(", "))
    }
}

/// The kind of an event, by the beginning or the end of its name; of an unknown one, a wait.
fn kind(name: &str) -> &'static str {
    let of = |kind: &&&str| name.starts_with(**kind) || name.ends_with(**kind);
    KINDS.iter().find(of).copied().unwrap_or("wait")
}

fn milliseconds(microseconds: f64) -> String {
    format!("{} ms", number(microseconds / 1e3, 3))
}

/// Why a file cannot be read.
enum Failure {
    Io(std::io::Error),
    Json(serde_json::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Io(error) => write!(f, "trace.json: {error}"),
            Failure::Json(error) => write!(f, "trace.json is damaged ({error})"),
        }
    }
}

/// Hands each event of a file to `take`, without keeping any.
fn each(path: &Path, take: impl FnMut(Event)) -> Result<(), Failure> {
    let file = File::open(path).map_err(Failure::Io)?;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(file));
    json.deserialize_map(Trace(take)).and_then(|()| json.end()).map_err(Failure::Json)
}

/// The whole file: an object with a list of events.
struct Trace<F>(F);

impl<'de, F: FnMut(Event)> Visitor<'de> for Trace<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a timeline")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "traceEvents" => map.next_value_seed(Events(&mut self.0))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// The list of events.
struct Events<'f, F>(&'f mut F);

impl<'de, F: FnMut(Event)> DeserializeSeed<'de> for Events<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Event)> Visitor<'de> for Events<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut events: A) -> Result<(), A::Error> {
        while let Some(event) = events.next_element()? {
            (self.0)(event);
        }
        Ok(())
    }
}
