//! `pillion tokenize`: documents to a token folder.
//!
//! ```text
//! files ─Walk→ records ─threads→ tokens ─in order→ shards        every so often: flush, progress.json
//!                                                                 at the end:     index.json
//! ```
//!
//! While the threads make tokens of a batch of records, the next batch is read. What was written
//! since the last flush is made again after an interruption, from the position in the files that
//! belongs to that flush. So the folder's bytes depend on neither interruptions nor threads.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

use super::encode::{Encoded, encode};
use super::index::{Index, Made, Origin, Shards, token_bytes};
use super::progress::{Found, Place, Plan, Progress};
use super::shard::Writer;
use crate::documents::{self, Fields, OrBad, Position, Reading, Record, Walk};
use crate::error::{Error, Result};
use crate::sources::Skipped;
use crate::subword::Tokenizer;
use crate::tokens::Split;

/// The token after each document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Append {
    /// The tokenizer's end of a sequence.
    End,
    /// None.
    Nothing,
    /// The token of this spelling.
    Token(String),
}

/// What to tokenize, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A `tokenizer.json`, or a folder with one.
    pub tokenizer: PathBuf,
    /// Files and folders of documents.
    pub data: Vec<PathBuf>,
    /// Where the tokens go.
    pub out: PathBuf,
    /// The field or column with the text. Without it, an object is a chat if it has `messages`, a
    /// prompt and its completion if it has these, else its `text`.
    pub field: Option<String>,
    /// A line of a text file is a document; else the file is.
    pub lines: bool,
    /// The share of documents that go to validation; from 0 to below 1.
    pub validation: f64,
    /// The token after each document.
    pub append: Append,
    /// The most tokens in a shard; at least 1.
    pub shard_tokens: u64,
    /// Threads that make tokens; 0 for one a processor.
    pub threads: usize,
    /// Leave out what cannot be read, and count it.
    pub skip_bad: bool,
    /// Begin anew, whatever is in `out`.
    pub restart: bool,
}

/// How much is done at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Bytes of text that a thread has before it at a time.
    pub(super) batch_bytes: usize,
    /// Bytes of text and time between two flushes, at least.
    pub(super) flush_bytes: u64,
    pub(super) flush_every: Duration,
}

/// A flush takes some milliseconds. What an interruption loses is made again.
const PACE: Pace = Pace { batch_bytes: 1 << 20, flush_bytes: 1, flush_every: Duration::from_millis(500) };

/// How far it has come, for a progress bar.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// Bytes of the files read, as they lie on the disk.
    pub bytes: u64,
    /// All bytes of the files.
    pub total: u64,
    /// Documents written.
    pub documents: u64,
    /// Tokens written.
    pub tokens: u64,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The index of the folder.
    pub index: Index,
    /// Whether it was complete before, so that nothing was done.
    pub was_complete: bool,
    /// Whether it went on where an earlier call was interrupted.
    pub went_on: bool,
    /// What was left out while looking for files.
    pub skipped: Skipped,
    /// The first documents that could not be read, and why.
    pub bad: Vec<String>,
}

/// Problems that are kept to be printed.
const MOST_PROBLEMS: usize = 20;

/// Tokenizes documents into a folder, or goes on where an earlier call was interrupted.
///
/// Each document is followed by the token of `append` and goes whole to train or to validation, by
/// the hash of its text: documents with the same text go to the same split. `watch` is called
/// between batches, and stops the work by returning false, as an interruption would.
///
/// # Errors
/// [`Error::Setting`] for settings that cannot be; [`Error::Bad`] for a tokenizer, a document or a
/// folder that cannot be used; [`Error::Read`] and [`Error::Write`] for the system's reasons;
/// [`Error::Stopped`] if `watch` returned false.
pub fn tokenize(settings: &Settings, watch: &mut dyn FnMut(Watched) -> bool) -> Result<Outcome> {
    tokenize_at(settings, PACE, watch)
}

/// As [`tokenize`], at another pace.
pub(super) fn tokenize_at(settings: &Settings, pace: Pace, watch: &mut dyn FnMut(Watched) -> bool) -> Result<Outcome> {
    let tokenizer = Tokenizer::load(&settings.tokenizer)?;
    let (plan, skipped) = plan(settings, &tokenizer)?;
    let threads = rayon::ThreadPoolBuilder::new().num_threads(settings.threads).build();
    let threads = threads.map_err(|error| Error::Setting(format!("--threads {}: {error}", settings.threads)))?;
    let place = Place::open(&settings.out)?;
    let progress = match place.find(&plan, settings.restart)? {
        Found::Complete => {
            let index = Index::read(&settings.out)?;
            return Ok(Outcome { index, was_complete: true, went_on: false, skipped, bad: Vec::new() });
        }
        Found::Unfinished(progress) => progress,
    };
    if progress.origin.bad > 0 && !settings.skip_bad {
        let problem = "holds the beginning of a run that skipped bad documents; give --skip-bad again, or --restart";
        return Err(Error::bad(&settings.out, problem));
    }
    let went_on = progress != Progress::default();
    let mut work = Work::new(settings, &tokenizer, &plan, progress, place)?;
    let total = plan.inputs.iter().map(|input| input.bytes).sum();
    let mut walk = Walk::new(plan.inputs.clone().into(), plan.reading.clone(), work.progress.position);
    let batch_bytes = pace.batch_bytes * threads.current_num_threads();
    let mut batch = read(&mut walk, batch_bytes)?;
    while !batch.is_empty() {
        let made = || encode_all(batch, &tokenizer, Fields { text: settings.field.as_deref() });
        let (made, next) = threads.install(|| rayon::join(made, || read(&mut walk, batch_bytes)));
        for (record, encoded) in made {
            work.take(record, encoded)?;
        }
        let (documents, tokens) = (work.documents, work.tokens);
        if !watch(Watched { bytes: walk.bytes_read(), total, documents, tokens }) {
            return Err(Error::Stopped);
        }
        work.flush_if_due(pace)?;
        batch = next?;
    }
    let (index, bad) = work.finish()?;
    Ok(Outcome { index, was_complete: false, went_on, skipped, bad })
}

fn plan(settings: &Settings, tokenizer: &Tokenizer) -> Result<(Plan, Skipped)> {
    let Settings { validation, shard_tokens, .. } = *settings;
    if !(0.0..1.0).contains(&validation) {
        return Err(Error::Setting(format!("--validation {validation} must be a share from 0 to below 1")));
    }
    if !(1..=MOST_SHARD_TOKENS).contains(&shard_tokens) {
        return Err(Error::Setting(format!("--shard-tokens {shard_tokens} must be from 1 to {MOST_SHARD_TOKENS}")));
    }
    let separator = match &settings.append {
        Append::Nothing => None,
        Append::End => Some(tokenizer.end_of_sequence().ok_or_else(|| {
            let problem = "names no token that ends a text, which --append eos needs; give --append TOKEN or none";
            Error::bad(tokenizer.path(), problem)
        })?),
        Append::Token(token) => Some(tokenizer.id(token).ok_or_else(|| {
            Error::Setting(format!("--append {token:?} is no token of {}", tokenizer.path().display()))
        })?),
    };
    let (inputs, skipped) = documents::list(&settings.data, &settings.out)?;
    let plan = Plan {
        version: 1,
        tokenizer: format!("{:016x}", tokenizer.hash()),
        chat_template: tokenizer
            .chat_template()
            .map(|template| format!("{:016x}", xxh3_64(template.source().as_bytes()))),
        reading: Reading { lines: settings.lines, field: settings.field.clone() },
        // Exact for shares that are not tiny, and 0 for 0.
        validation_below: (validation * 2f64.powi(64)) as u64,
        separator,
        shard_tokens,
        inputs,
    };
    Ok((plan, skipped))
}

/// The most tokens of a shard. Positions within it are kept in files as numbers of 64 bits.
const MOST_SHARD_TOKENS: u64 = 1 << 40;

/// Records of a batch at most.
const BATCH_RECORDS: usize = 1 << 14;

fn read(walk: &mut Walk, bytes: usize) -> Result<Vec<Record>> {
    let mut batch = Vec::new();
    let mut sum = 0;
    while sum < bytes && batch.len() < BATCH_RECORDS {
        let Some(record) = walk.next()? else { break };
        sum += record.raw.as_ref().map_or(0, documents::Raw::bytes);
        batch.push(record);
    }
    Ok(batch)
}

/// A record without its text.
struct Taken {
    file: usize,
    place: String,
    after: Position,
}

fn encode_all(batch: Vec<Record>, tokenizer: &Tokenizer, fields: Fields<'_>) -> Vec<(Taken, Result<OrBad<Encoded>>)> {
    use rayon::prelude::*;
    let one = |Record { file, place, raw, after }: Record| {
        let encoded = match raw.and_then(|raw| raw.interpret(fields)) {
            Ok(content) => encode(tokenizer, content),
            Err(problem) => Ok(Err(problem)),
        };
        (Taken { file, place, after }, encoded)
    };
    batch.into_par_iter().with_max_len(1).map(one).collect()
}

/// The folder while it is written.
struct Work<'a> {
    settings: &'a Settings,
    tokenizer: &'a Tokenizer,
    plan: &'a Plan,
    place: Place,
    writers: [Writer; 2],
    progress: Progress,
    /// Bytes of text since the last flush.
    unflushed: u64,
    flushed: Instant,
    documents: u64,
    tokens: u64,
    bad: Vec<String>,
}

impl<'a> Work<'a> {
    fn new(
        settings: &'a Settings,
        tokenizer: &'a Tokenizer,
        plan: &'a Plan,
        progress: Progress,
        place: Place,
    ) -> Result<Self> {
        let bytes = token_bytes(tokenizer.vocab_size() as u32);
        let [train, validation] = progress.written.clone();
        let writer = |split, written| Writer::new(&place.folder, split, bytes, plan.shard_tokens, written);
        let writers = [writer(Split::Train, train)?, writer(Split::Validation, validation)?];
        let (unflushed, flushed, documents, tokens, bad) = (0, Instant::now(), 0, 0, Vec::new());
        Ok(Self { settings, tokenizer, plan, place, writers, progress, unflushed, flushed, documents, tokens, bad })
    }

    /// Writes a document, or counts what is none.
    fn take(&mut self, record: Taken, encoded: Result<OrBad<Encoded>>) -> Result<()> {
        self.progress.position = record.after;
        let origin = &mut self.progress.origin;
        match encoded? {
            Ok(Encoded::Blank) => {}
            Ok(Encoded::Empty) => origin.empty += 1,
            Ok(Encoded::Document { hash, bytes, mut tokens, mut masked }) => {
                // A chat may end in it already.
                if let Some(separator) = self.plan.separator.filter(|separator| tokens.last() != Some(separator)) {
                    tokens.push(separator);
                    // The end of what is learned is learned.
                    if !masked.is_empty() {
                        masked.push(false);
                    }
                }
                origin.bytes += bytes;
                self.unflushed += bytes;
                self.documents += 1;
                self.tokens += tokens.len() as u64;
                let is_validation = hash < self.plan.validation_below;
                self.writers[usize::from(is_validation)].push(&tokens, &masked)?;
            }
            Err(problem) => {
                let path = &self.plan.inputs[record.file].path;
                let problem = format!("{}{problem}", record.place);
                if !self.settings.skip_bad {
                    let problem = format!("{problem}, or leave such documents out with --skip-bad");
                    return Err(Error::bad(path, problem));
                }
                origin.bad += 1;
                if self.bad.len() < MOST_PROBLEMS {
                    self.bad.push(format!("{}: {problem}", path.display()));
                }
            }
        }
        Ok(())
    }

    fn flush_if_due(&mut self, pace: Pace) -> Result<()> {
        if self.unflushed < pace.flush_bytes || self.flushed.elapsed() < pace.flush_every {
            return Ok(());
        }
        for (written, writer) in self.progress.written.iter_mut().zip(&mut self.writers) {
            *written = writer.flush()?;
        }
        self.unflushed = 0;
        self.flushed = Instant::now();
        self.place.save(&self.progress)
    }

    fn finish(mut self) -> Result<(Index, Vec<String>)> {
        let mut all = Vec::new();
        for mut writer in self.writers {
            writer.complete()?;
            all.push(Shards::of(writer.into_shards()));
        }
        let splits: [Shards; 2] = all.try_into().expect("two splits");
        if splits.iter().all(|shards| shards.tokens == 0) {
            let Origin { empty, bad, .. } = self.progress.origin;
            let problem = format!("no document in the files ({empty} empty, {bad} bad); give others");
            return Err(Error::bad(&self.plan.inputs[0].path, problem));
        }
        self.tokenizer.copy_into(&self.place.folder)?;
        let name = self.tokenizer.path().file_name().map(|name| name.to_string_lossy().into_owned());
        let made = Made { file: name.unwrap_or_default(), xxh3: self.plan.tokenizer.clone() };
        self.progress.origin.files = self.plan.inputs.len() as u64;
        let vocabulary = self.tokenizer.vocab_size() as u32;
        let index = Index::new(made, vocabulary, self.plan.separator, self.plan.hash(), self.progress.origin, splits);
        index.write(&self.place.folder)?;
        self.place.remove_progress()?;
        Ok((index, self.bad))
    }
}
