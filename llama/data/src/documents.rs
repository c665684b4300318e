//! Documents to tokenize: from files of text, JSON lines and parquet, one after the other.
//!
//! A [`Walk`] goes over the files and gives out [`Raw`] documents in order, each with the
//! [`Position`] after it, where a later walk can go on. It reads what it needs and no more. What
//! costs time beyond reading, checking UTF-8 and parsing JSON, is done by [`Raw::interpret`], so
//! that several threads can do it.

mod interpret;
mod lines;
mod pages;
mod rows;

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sources::{self, Skipped, SourceFile};
pub(crate) use interpret::{Content, Fields, Raw};
use lines::Lines;
use rows::Rows;

/// The longest document, in bytes: it is held in memory, several times over while it becomes tokens.
/// Fuzzers come to a smaller limit sooner.
pub(crate) const LONGEST: u64 = if cfg!(fuzzing) { 1 << 18 } else { 1 << 30 };

/// A file to read, as it was when it was listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Input {
    pub(crate) path: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    /// Nanoseconds since 1970.
    pub(crate) modified: u64,
}

impl Input {
    pub(crate) fn new(path: PathBuf, kind: Kind) -> Result<Self> {
        let metadata = fs::metadata(&path).map_err(Error::reading(&path))?;
        let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = since.map_or(0, |since| since.as_nanos() as u64);
        Ok(Self { bytes: metadata.len(), modified, path, kind })
    }

    /// # Errors
    /// [`Error::Bad`] if the file is another than when it was listed.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        if Self::new(self.path.clone(), self.kind)? == *self {
            return Ok(());
        }
        Err(Error::bad(&self.path, "changed while it was being tokenized; run again with --restart"))
    }
}

/// The files under the paths that the user gives, in their order, those of a folder sorted.
///
/// # Errors
/// [`Error::Bad`] that names a path without a file to read, a file that comes twice, or a folder in
/// which the tokens would be written; [`Error::Read`].
pub(crate) fn list(paths: &[PathBuf], out: &Path) -> Result<(Vec<Input>, Skipped)> {
    let mut inputs: Vec<Input> = Vec::new();
    let mut seen = HashSet::new();
    let mut skipped = Skipped::default();
    for path in paths {
        let found = sources::under(path).map_err(|error| match error {
            Error::Missing { path } => Error::bad(path, "no such file or folder; check the path"),
            Error::Stdin => Error::bad(path, "stdin is not read, because an interrupted run reads again; give a file"),
            Error::NotAFile { path } => {
                Error::bad(path, "neither a file nor a folder; write the text to a file first and give that")
            }
            Error::NoText { path, found } => {
                Error::bad(path, format!("nothing to tokenize in it ({found}); give a file with a byte in it"))
            }
            other => other,
        })?;
        if path.is_dir() && lies_within(out, path) {
            let problem = "is read for documents, but --out lies in it; write the tokens elsewhere";
            return Err(Error::bad(path, problem));
        }
        let kinds = kinds(path, &found.files)?;
        let mut here = HashSet::new();
        for (file, kind) in found.files.into_iter().zip(kinds) {
            if file.path.to_str().is_none() {
                return Err(Error::bad(
                    file.path,
                    "its name is not UTF-8, so no folder of tokens can note it; rename it",
                ));
            }
            // What links lead to is one file, whatever its names.
            let canonical = file.path.canonicalize().map_err(Error::reading(&file.path))?;
            if seen.contains(&canonical) {
                return Err(Error::bad(file.path, "is read twice, because several paths lead to it; give it once"));
            }
            match here.insert(canonical) {
                true => inputs.push(Input::new(file.path, kind)?),
                false => skipped.twice += 1,
            }
        }
        seen.extend(here);
        skipped.hidden += found.skipped.hidden;
        skipped.empty += found.skipped.empty;
        skipped.special += found.skipped.special;
        skipped.runs += found.skipped.runs;
    }
    Ok((inputs, skipped))
}

/// Whether a folder that may not exist yet is another one, or lies in it.
fn lies_within(inner: &Path, outer: &Path) -> bool {
    let Ok(outer) = outer.canonicalize() else { return false };
    let absolute = std::path::absolute(inner).unwrap_or(inner.to_owned());
    // The nearest folder above that exists says where the others will be.
    absolute.ancestors().find_map(|above| above.canonicalize().ok()).is_some_and(|above| above.starts_with(&outer))
}

/// What the files of a path are. In a folder, a `.json` file may be text like the others.
///
/// # Errors
/// [`Error::Bad`] for a folder of records and of texts: the texts may be notes on the records.
fn kinds(path: &Path, files: &[SourceFile]) -> Result<Vec<Kind>> {
    let named: Vec<Named> = files.iter().map(|file| Named::of(&file.path)).collect();
    let first = |wanted: fn(&Named) -> bool| named.iter().position(wanted).map(|at| files[at].path.display());
    match (first(Named::is_records), first(|named| named.kind == Kind::Text)) {
        (Some(records), Some(text)) => {
            let remedy = "give the files themselves";
            Err(Error::bad(path, format!("holds records ({records}) and text ({text}), maybe notes on them; {remedy}")))
        }
        (None, Some(_)) => Ok(vec![Kind::Text; files.len()]),
        (_, None) => Ok(named.iter().map(|named| named.kind).collect()),
    }
}

/// What there is of a document, or why there is nothing, with the remedy. Such a problem concerns one
/// document, or the rest of one file, and the others may be read all the same.
pub(crate) type OrBad<T> = std::result::Result<T, String>;

/// Where a walk is: before a record of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Index of the file.
    pub(crate) file: usize,
    /// Records of it that have been read: lines, rows, or 1 for a file that is one document.
    pub(crate) record: u64,
    /// Bytes of it that have been read, uncompressed; 0 where records are no lines.
    pub(crate) byte: u64,
}

/// A document as it was read.
#[derive(Debug)]
pub(crate) struct Record {
    /// Where it is, to name it: the index of its file, and `line 3` or `row 3` in it.
    pub(crate) file: usize,
    pub(crate) place: String,
    pub(crate) raw: OrBad<Raw>,
    /// Where the next record is.
    pub(crate) after: Position,
}

/// How files become records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reading {
    /// A line of a text file is a document.
    pub(crate) lines: bool,
    /// The field or column of the text.
    pub(crate) field: Option<String>,
}

/// Goes over the documents of files, in order.
pub(crate) struct Walk {
    inputs: Arc<[Input]>,
    reading: Reading,
    position: Position,
    open: Option<Open>,
    /// Bytes of the files that have been read, as they lie on the disk.
    read: Arc<AtomicU64>,
}

enum Open {
    Whole,
    Lines { lines: Lines, json: bool },
    Rows(Box<Rows>),
}

/// What there is to do after an attempt to read a record.
pub(crate) enum Step {
    Record(Record),
    EndOfFile,
}

/// Why a record cannot be read.
pub(crate) enum Fault {
    /// The system's reason, or a setting's: ends the walk.
    Fatal(Error),
    /// The file is damaged from here on, and a walk may go on with the next.
    Damaged(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl Walk {
    pub(crate) fn new(inputs: Arc<[Input]>, reading: Reading, position: Position) -> Self {
        let before = inputs[..position.file.min(inputs.len())].iter().map(|input| input.bytes).sum();
        Self { inputs, reading, position, open: None, read: Arc::new(AtomicU64::new(before)) }
    }

    /// Bytes of the files read so far, as they lie on the disk.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The next record; `None` after the last.
    ///
    /// # Errors
    /// [`Error::Read`] if the system refuses to read; [`Error::Bad`] if a file has changed.
    pub(crate) fn next(&mut self) -> Result<Option<Record>> {
        while self.position.file < self.inputs.len() {
            match self.step() {
                Ok(Step::Record(record)) => {
                    self.position = record.after;
                    return Ok(Some(record));
                }
                Ok(Step::EndOfFile) => self.close()?,
                Err(Fault::Fatal(error)) => return Err(error),
                Err(Fault::Damaged(problem)) => {
                    let (file, place) = (self.position.file, self.place());
                    self.close()?;
                    return Ok(Some(Record { file, place, raw: Err(problem), after: self.position }));
                }
            }
        }
        Ok(None)
    }

    fn step(&mut self) -> std::result::Result<Step, Fault> {
        let input = &self.inputs[self.position.file];
        if self.open.is_none() {
            input.check_unchanged()?;
            self.open = Some(open(input, &self.reading, self.position, &self.read)?);
        }
        let place = self.place();
        let after = Position { record: self.position.record + 1, ..self.position };
        let (raw, after) = match self.open.as_mut().expect("opened above") {
            Open::Whole if self.position.record > 0 => return Ok(Step::EndOfFile),
            Open::Whole => (Raw::Text(read_whole(input, &self.read)?), after),
            Open::Lines { lines, json } => match lines.next()? {
                None => return Ok(Step::EndOfFile),
                Some(line) => {
                    let byte = lines.byte();
                    let raw = if *json { Raw::Json(line) } else { Raw::Text(line) };
                    (raw, Position { byte, ..after })
                }
            },
            Open::Rows(rows) => match rows.next()? {
                None => return Ok(Step::EndOfFile),
                Some(row) => {
                    let done = self.inputs[..self.position.file].iter().map(|input| input.bytes).sum::<u64>();
                    self.read.store(done + rows.share_of(input.bytes), Ordering::Relaxed);
                    (Raw::Row(row), after)
                }
            },
        };
        Ok(Step::Record(Record { file: self.position.file, place, raw: Ok(raw), after }))
    }

    fn close(&mut self) -> Result<()> {
        self.inputs[self.position.file].check_unchanged()?;
        self.open = None;
        self.position = Position { file: self.position.file + 1, ..Position::default() };
        let done = self.inputs[..self.position.file].iter().map(|input| input.bytes).sum();
        self.read.store(done, Ordering::Relaxed);
        Ok(())
    }

    fn place(&self) -> String {
        let number = self.position.record + 1;
        match &self.open {
            Some(Open::Lines { .. }) => format!("line {number}: "),
            Some(Open::Rows(_)) => format!("row {number}: "),
            _ => String::new(),
        }
    }
}

/// What a file's name says of it.
struct Named {
    kind: Kind,
    compression: Compression,
    /// The name ends in `.json`, as that of many a text does.
    maybe_text: bool,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    No,
    Gzip,
    Zstd,
}

impl Named {
    fn of(path: &Path) -> Self {
        let extension = |path: &Path| path.extension().map(|it| it.to_ascii_lowercase().display().to_string());
        let compression = match extension(path).as_deref() {
            Some("gz") => Compression::Gzip,
            Some("zst") => Compression::Zstd,
            _ => Compression::No,
        };
        let stem = if compression == Compression::No { path.to_owned() } else { path.with_extension("") };
        let inner = extension(&stem).unwrap_or_default();
        let is_plain = compression == Compression::No;
        let kind = match &*inner {
            "jsonl" | "ndjson" | "json" => Kind::JsonLines,
            "parquet" if is_plain => Kind::Parquet,
            _ => Kind::Text,
        };
        Self { kind, compression, maybe_text: inner == "json" && is_plain }
    }

    fn is_records(&self) -> bool {
        self.kind != Kind::Text && !self.maybe_text
    }
}

fn open(input: &Input, reading: &Reading, from: Position, read: &Arc<AtomicU64>) -> std::result::Result<Open, Fault> {
    let json = input.kind == Kind::JsonLines;
    match input.kind {
        Kind::Parquet => Ok(Open::Rows(Box::new(Rows::open(input, reading.field.as_deref(), from.record)?))),
        Kind::Text if !reading.lines => Ok(Open::Whole),
        Kind::Text | Kind::JsonLines => {
            let lines = Lines::open(input, Named::of(&input.path).compression, from, json, read)?;
            Ok(Open::Lines { lines, json })
        }
    }
}

fn read_whole(input: &Input, read: &Arc<AtomicU64>) -> std::result::Result<Vec<u8>, Fault> {
    let mut reader = lines::decompress(input, Named::of(&input.path).compression, read)?;
    let mut bytes = Vec::new();
    let result = reader.by_ref().take(LONGEST + 1).read_to_end(&mut bytes);
    result.map_err(|error| lines::fault(input, error))?;
    if bytes.len() as u64 > LONGEST {
        return Err(Fault::Damaged(format!(
            "a document of more than {LONGEST} bytes; cut the file, or make each line a document with --lines"
        )));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
