//! Event files, which TensorBoard reads: the numbers of `metrics.jsonl`, by step, and again by
//! samples with `by_samples/` before their names.
//!
//! A run's event file is always made of the whole of its metrics: a resume or a rewind, after which
//! steps are made again, begins a new one, and empties the earlier one. It begins with the start of a
//! session at step 0, at which TensorBoard forgets what it has read before. So no step is shown
//! twice.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pillion_collectives::limits::explain;
use prost::Message;

use super::lines::Lines;
use super::metrics::Line;
use crate::Error;

/// A record of an event file: `tensorflow.Event`, as far as it is written here.
#[derive(Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

/// What an event says.
#[derive(prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    Session(SessionLog),
}

/// `tensorflow.Summary`: some numbers by name.
#[derive(Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`.
#[derive(Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// `tensorflow.SessionLog`.
#[derive(Message)]
struct SessionLog {
    /// 1 is START.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The version of event files in which only the start of a session makes readers forget.
const VERSION: &str = "brain.Event:2";
const START: i32 = 1;
const BEGIN: &str = "events.out.tfevents.";
/// Tells our files from those of other programs.
const END: &str = ".pillion";

/// The names and numbers of a step.
fn scalars(line: &Line) -> Vec<(String, f64)> {
    let always = [
        ("train/loss", line.loss),
        ("train/lr", line.lr),
        ("train/grad_norm", line.grad_norm),
        ("train/batch", line.batch_samples as f64),
        ("speed/tokens_per_s", line.tokens_per_s),
        ("speed/step_ms", line.step_ms),
        ("speed/exposed_ms", line.exposed_ms),
        ("speed/data_wait_ms", line.data_wait_ms),
    ];
    let sometimes = [
        ("train/noise_scale", line.noise_scale),
        ("train/wanted_batch", line.wanted_batch),
        ("validation/loss", line.validation_loss),
        ("speed/mfu", line.mfu),
        ("memory/rank_0", line.memory.map(|bytes| bytes as f64)),
    ];
    let named = always.into_iter().chain(sometimes.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let sets =
        line.validation_losses.iter().filter_map(|(set, loss)| Some((format!("validation_sets/{set}"), (*loss)?)));
    named.map(|(name, value)| (name.to_owned(), value)).chain(sets).collect()
}

/// A record: its length, and the event, each with a checksum.
fn record(event: &Event) -> Vec<u8> {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), &data, &masked(&data)].concat()
}

/// TFRecord's checksum: a CRC-32C that is rotated, with a constant added.
fn masked(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A step's records: by step, and by samples.
fn records(line: &Line, wall_time: f64) -> Vec<u8> {
    let scalars = scalars(line);
    let event = |step: u64, prefix: &str| {
        let value =
            scalars.iter().map(|(name, value)| Value { tag: format!("{prefix}{name}"), simple_value: *value as f32 });
        let summary = Summary { value: value.collect() };
        record(&Event { wall_time, step: step as i64, what: Some(What::Summary(summary)) })
    };
    [event(line.step, ""), event(line.samples_seen, "by_samples/")].concat()
}

/// The event file of a run, open for appending.
pub(crate) struct Events {
    run: PathBuf,
    folder: PathBuf,
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    len: u64,
}

impl Events {
    /// Writes all steps that the metrics of the run in `run` have into a new event file in `folder`,
    /// and empties earlier ones.
    ///
    /// # Errors
    /// [`Error::File`] when the metrics cannot be read, or the events cannot be written.
    pub(crate) fn of_metrics(run: &Path, folder: &Path) -> Result<Events, Error> {
        let fail = |error: std::io::Error| Error::file(folder, format!("no events: {}", explain(&error)));
        fs::create_dir_all(folder).map_err(fail)?;
        let earlier = files(folder).map_err(fail)?;
        let unfinished = folder.join(".pillion-events");
        let mut file = File::create(&unfinished).map_err(fail)?;
        let len = write_all(run, &mut file, fail)?;
        file.sync_all().map_err(fail)?;
        // Readers take files in the order of their names, and the name begins with a time.
        let newest = earlier.iter().filter_map(|name| seconds(name)).max().unwrap_or(0);
        let now = since_1970().as_secs().max(newest.saturating_add(1));
        let host = rustix::system::uname().nodename().to_string_lossy().replace('/', "-");
        let path = folder.join(format!("{BEGIN}{now:010}.{host}{END}"));
        fs::rename(&unfinished, &path).map_err(fail)?;
        // A reader that has one of them open goes on to the next file when this one is empty, but not
        // when it is gone.
        let empty = |name: &String| File::options().write(true).open(folder.join(name))?.set_len(0);
        earlier.iter().try_for_each(empty).map_err(fail)?;
        Ok(Events { run: run.to_owned(), folder: folder.to_owned(), path, file, len })
    }

    /// Adds a step, which the metrics have by now. Where somebody has removed the file, it is made
    /// anew of them.
    ///
    /// # Errors
    /// As for [`Events::of_metrics`].
    pub(crate) fn write(&mut self, line: &Line) -> Result<(), Error> {
        if !self.path.exists() {
            *self = Events::of_metrics(&self.run, &self.folder)?;
            return Ok(());
        }
        let records = records(line, since_1970().as_secs_f64());
        self.file.write_all(&records).map_err(|error| {
            // A reader does not get past half a record. If this fails, too, there is no remedy.
            let _ = self.file.set_len(self.len).and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
            Error::file(&self.path, explain(&error))
        })?;
        self.len += records.len() as u64;
        Ok(())
    }

    /// Makes the file anew, of the metrics as they are now.
    ///
    /// # Errors
    /// As for [`Events::of_metrics`].
    pub(crate) fn rewind(&mut self) -> Result<(), Error> {
        *self = Events::of_metrics(&self.run, &self.folder)?;
        Ok(())
    }
}

/// Writes the beginning of an event file and all steps; returns the number of bytes.
fn write_all(run: &Path, file: &mut File, fail: impl Fn(std::io::Error) -> Error) -> Result<u64, Error> {
    let mut left = 0.0;
    let mut lines = Lines::open(run)?;
    while let Some(line) = lines.next()? {
        left += line.step_ms / 1e3;
    }
    // Metrics do not say when steps were made, only how long they took.
    let now = since_1970().as_secs_f64();
    let (mut out, mut len) = (BufWriter::new(file), 0);
    let mut put = |bytes: &[u8]| {
        len += bytes.len() as u64;
        out.write_all(bytes).map_err(&fail)
    };
    for what in [What::FileVersion(VERSION.to_owned()), What::Session(SessionLog { status: START })] {
        put(&record(&Event { wall_time: now - left, step: 0, what: Some(what) }))?;
    }
    let mut lines = Lines::open(run)?;
    while let Some(line) = lines.next()? {
        left -= line.step_ms / 1e3;
        put(&records(&line, now - left))?;
    }
    out.flush().map_err(&fail)?;
    Ok(len)
}

/// The names of the event files in a folder that runs wrote.
///
/// # Errors
/// When the folder cannot be read; one that is not there has none.
pub(crate) fn files(folder: &Path) -> std::io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?.collect::<std::io::Result<Vec<_>>>()?,
    };
    let names = entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| seconds(name).is_some()).collect())
}

/// The time in the name of an event file that a run wrote.
fn seconds(name: &str) -> Option<u64> {
    name.strip_suffix(END)?.strip_prefix(BEGIN)?.split('.').next()?.parse().ok()
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::lines::tests::{folder, line};
    use super::*;

    /// The events of a file, whose checksums are checked.
    fn read(path: &Path) -> Vec<Event> {
        let (bytes, mut at) = (fs::read(path).unwrap(), 0);
        let mut events = Vec::new();
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(bytes[at + 8..at + 12], masked(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + length];
            assert_eq!(bytes[at + 12 + length..at + 16 + length], masked(data));
            events.push(Event::decode(data).unwrap());
            at += 16 + length;
        }
        events
    }

    fn steps(events: &[Event], tag: &str) -> Vec<(i64, f32)> {
        let of = |event: &Event| match &event.what {
            Some(What::Summary(summary)) => {
                let value = summary.value.iter().find(|value| value.tag == tag)?;
                Some((event.step, value.simple_value))
            }
            _ => None,
        };
        events.iter().filter_map(of).collect()
    }

    fn only(folder: &Path) -> PathBuf {
        let paths = files(folder).unwrap().into_iter().map(|name| folder.join(name));
        let full: Vec<PathBuf> = paths.filter(|path| fs::metadata(path).unwrap().len() > 0).collect();
        assert_eq!(full.len(), 1, "{full:?}");
        full[0].clone()
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        // Event files that TensorFlow writes begin so: a length of 24 and its checksum.
        assert_eq!(masked(&24u64.to_le_bytes()), [0xa3, 0x7f, 0x4b, 0x22]);
        let version = Event { wall_time: 1.6e9, step: 0, what: Some(What::FileVersion(VERSION.to_owned())) };
        assert_eq!(record(&version)[..8], 24u64.to_le_bytes());
    }

    #[test]
    fn steps_are_there_once_after_they_were_made_again() {
        let place = folder(&(line(1, 5.0) + &line(2, 4.0)));
        let out = place.path().join("tensorboard");
        let mut events = Events::of_metrics(place.path(), &out).unwrap();
        let metrics = place.path().join("metrics.jsonl");
        fs::write(&metrics, line(1, 5.0) + &line(2, 4.0) + &line(3, 3.0)).unwrap();
        events.write(&serde_json::from_str(&line(3, 3.0)).unwrap()).unwrap();
        let read_all = || read(&only(&out));
        assert_eq!(steps(&read_all(), "train/loss"), [(1, 5.0), (2, 4.0), (3, 3.0)]);
        assert_eq!(steps(&read_all(), "by_samples/train/loss"), [(8, 5.0), (16, 4.0), (24, 3.0)]);
        assert_eq!(steps(&read_all(), "train/wanted_batch"), []);
        let first = only(&out);
        // Back to the first step, and on.
        fs::write(&metrics, line(1, 5.0)).unwrap();
        events.rewind().unwrap();
        events.write(&serde_json::from_str(&line(2, 4.5)).unwrap()).unwrap();
        let found = read_all();
        assert_eq!(steps(&found, "train/loss"), [(1, 5.0), (2, 4.5)]);
        assert!(first < only(&out), "readers take later files later");
        assert!(matches!(&found[0].what, Some(What::FileVersion(version)) if version == VERSION));
        assert!(matches!(&found[1], Event { step: 0, what: Some(What::Session(SessionLog { status: START })), .. }));
        assert!(found.windows(2).all(|pair| pair[0].wall_time <= pair[1].wall_time));
    }

    #[test]
    fn a_file_that_somebody_removed_is_made_anew_and_others_stay() {
        let place = folder(&line(1, 5.0));
        let out = place.path().join("tensorboard");
        fs::create_dir(&out).unwrap();
        for name in ["events.out.tfevents.1.other", "notes.pillion", "events.out.tfevents.x.pillion"] {
            fs::write(out.join(name), "mine").unwrap();
        }
        let mut events = Events::of_metrics(place.path(), &out).unwrap();
        fs::remove_file(only(&out)).unwrap();
        fs::write(place.path().join("metrics.jsonl"), line(1, 5.0) + &line(2, 4.0)).unwrap();
        events.write(&serde_json::from_str(&line(2, 4.0)).unwrap()).unwrap();
        assert_eq!(steps(&read(&only(&out)), "train/loss"), [(1, 5.0), (2, 4.0)]);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 4);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let place = folder(&line(1, 5.0));
        let error = Events::of_metrics(place.path(), &place.path().join("metrics.jsonl/events")).err().unwrap();
        assert!(error.to_string().contains("no events"), "{error}");
    }
}
