//! Saving in the background. The training loop pays for a copy of the state; a thread of each rank writes it.
//!
//! ```text
//! begin      rank 0 makes the folder; every rank copies its state, and its thread writes a file of it     (collective)
//! request    goes into a later step's requests: 1 once this rank's thread has done its part
//! observe    with the sum of that: when all files are written, rank 0's thread adds the manifest and gives the folder its name;
//!            when that is done too, the checkpoint is complete                                            (collective)
//! ```
//!
//! The sum is the same on every rank, so all take the same way. A part that fails on any rank fails the save on all, and leaves training as it was.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pillion_collectives::limits::explain_thread;
use serde_json::Value;

use super::agree;
use super::manifest::{self, FileEntry, Manifest};
use super::save::{Folders, check_shared, prepare, prune, publish, remove};
use super::shard::{self, Digest};
use crate::{Engine, Error, Layout, Policy, State};

/// The nice value of threads that write.
const LEAST_PRIORITY: i32 = 19;

/// Saves an engine's checkpoints, one at a time.
pub struct Saver {
    dir: PathBuf,
    keep: Option<usize>,
    save: Option<Save>,
    /// Copies of the state of each unit, kept for the next save.
    copies: Vec<State>,
    writer: Writer,
}

/// The thread that writes, and the ways to and from it.
struct Writer {
    jobs: Option<Sender<Job>>,
    results: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// Whether it has panicked, and another must be started.
    dead: bool,
}

/// A checkpoint that is complete.
#[derive(Debug)]
pub struct Saved {
    /// Its folder.
    pub path: PathBuf,
    /// The step that it was begun with.
    pub step: u64,
    /// Time for which this rank's caller was held up at its beginning.
    pub held: Duration,
    /// From the beginning until it was complete.
    pub took: Duration,
    /// Older checkpoints that could not be removed; on rank 0.
    pub not_removed: Vec<Error>,
}

/// A save under way.
struct Save {
    /// Whether the files are written, and the manifest is next; the same on every rank.
    publishing: bool,
    /// How this rank's part of that ended, once it has.
    done: Option<Done>,
    folders: Folders,
    step: u64,
    began: Instant,
    held: Duration,
    manifest: Manifest,
}

enum Job {
    Write { path: PathBuf, layout: Layout, states: &'static [&'static str], copies: Vec<State> },
    Publish { folders: Folders, manifest: Box<Manifest>, keep: Option<usize> },
}

/// What a thread has done, with the copies that it was given.
enum Done {
    Written(Result<Digest, Error>, Vec<State>),
    Published(Result<Vec<Error>, Error>),
    /// This rank had no part in it.
    Nothing,
}

impl Saver {
    /// Saves into `dir`, which every rank sees, and which is made where it is missing. With `keep`,
    /// older checkpoints than the newest that many are removed whenever one is complete.
    ///
    /// # Errors
    /// When no thread can be started.
    ///
    /// # Panics
    /// When none is to be kept.
    pub fn new(dir: &Path, keep: Option<usize>) -> Result<Saver, Error> {
        assert!(keep != Some(0), "at least the newest checkpoint is kept");
        Ok(Saver { dir: dir.to_owned(), keep, save: None, copies: Vec::new(), writer: Writer::start(dir)? })
    }

    /// Bytes of the copies of a rank that writes, kept from [`Saver::reserve`] or its first save on.
    pub fn bytes(layout: &Layout, policy: &Policy) -> u64 {
        ((1 + policy.states.len()) * size_of::<f32>() * layout.shard_len()) as u64
    }

    /// Makes the memory for the copies of this engine's state now. Otherwise the first save does, which then holds the caller up for longer than later ones.
    ///
    /// # Errors
    /// When the engine's parameters are invalid.
    pub fn reserve(&mut self, engine: &Engine) -> Result<(), Error> {
        self.copy(engine)
    }

    /// Copies what this rank writes.
    fn copy(&mut self, engine: &Engine) -> Result<(), Error> {
        let units = if writes(engine) { engine.layout().units.len() } else { 0 };
        self.copies.resize_with(units, State::default);
        self.copies.iter_mut().enumerate().try_for_each(|(unit, copy)| engine.read_state(unit, copy))
    }

    /// Whether a save is under way.
    pub fn is_busy(&self) -> bool {
        self.save.is_some()
    }

    /// Begins to save the engine's state as `step-…` in the folder; a checkpoint of the same step is replaced. Collective: every rank calls it
    /// between steps, with the same step. `extra` is kept as rank 0 gives it.
    ///
    /// # Errors
    /// [`Error::File`] when any rank could not do its part: on that rank what went wrong, on the others which rank it was. Then nothing is saved,
    /// and training can go on. Also when another rank is lost, or the engine's parameters are invalid.
    ///
    /// # Panics
    /// When a save is under way: [`Saver::wait`] first.
    pub fn begin(&mut self, engine: &Engine, step: u64, extra: &Value) -> Result<(), Error> {
        assert!(!self.is_busy(), "one checkpoint is written at a time");
        let began = Instant::now();
        let communicator = engine.communicator();
        let folders = Folders::new(&self.dir, step);
        let restarted =
            if self.writer.dead { Writer::start(&self.dir).map(|writer| self.writer = writer) } else { Ok(()) };
        let token = if communicator.rank() == 0 { prepare(&folders) } else { Ok(0) };
        let token = agree(communicator, &self.dir, token)?;
        let token = communicator.all_gather_scalars(&[token])?[0][0];
        let layout = engine.layout();
        let copied = restarted
            .and_then(|()| check_shared(&folders, token))
            .and_then(|()| shard::check_names(layout, &self.dir))
            .and_then(|()| self.copy(engine));
        if let Err(error) = agree(communicator, &self.dir, copied) {
            self.tidy(engine, &folders);
            return Err(error);
        }
        let mut done = Some(Done::Nothing);
        if writes(engine) {
            let path = folders.incomplete.join(shard::name(engine.shard_number(), layout.shards));
            let copies = std::mem::take(&mut self.copies);
            let states = engine.policy().states;
            self.writer.give(Job::Write { path, layout: layout.clone(), states, copies });
            done = None;
        }
        let manifest = Manifest {
            checksum: String::new(),
            format: String::new(),
            version: 0,
            step,
            updates: engine.updates(),
            world: layout.shards,
            weights: engine.policy().weights.name().to_owned(),
            clip: engine.policy().clip,
            states: engine.policy().states.iter().map(|&name| name.to_owned()).collect(),
            units: manifest::specs(layout),
            files: Vec::new(),
            extra: extra.clone(),
        };
        self.save = Some(Save { publishing: false, done, folders, step, began, held: began.elapsed(), manifest });
        Ok(())
    }

    /// For the requests of the next step: 1 when this rank's part of the present phase is over, however it ended.
    pub fn request(&mut self) -> f64 {
        let Some(Save { done, .. }) = &mut self.save else { return 0.0 };
        if done.is_none() {
            *done = match self.writer.results.try_recv() {
                Ok(done) => Some(done),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => Some(self.writer.died(&self.dir)),
            };
        }
        f64::from(u8::from(done.is_some()))
    }

    /// What the ranks' requests add up to: when that is all of them, goes on. Collective. Returns the checkpoint if that has completed it.
    ///
    /// # Errors
    /// As for [`Saver::begin`]; the save is over, and another can begin.
    pub fn observe(&mut self, engine: &Engine, sum: f64) -> Result<Option<Saved>, Error> {
        if !self.is_busy() || sum < engine.communicator().world() as f64 {
            return Ok(None);
        }
        self.advance(engine)
    }

    /// Blocks until the save under way, if any, is over. Collective.
    ///
    /// # Errors
    /// As for [`Saver::observe`].
    pub fn wait(&mut self, engine: &Engine) -> Result<Option<Saved>, Error> {
        while let Some(Save { done, .. }) = &mut self.save {
            if done.is_none() {
                let result = self.writer.results.recv();
                *done = Some(match result {
                    Ok(done) => done,
                    Err(_) => self.writer.died(&self.dir),
                });
                continue;
            }
            if let Some(saved) = self.advance(engine)? {
                return Ok(Some(saved));
            }
        }
        Ok(None)
    }

    /// Ends the present phase, which is over on every rank.
    fn advance(&mut self, engine: &Engine) -> Result<Option<Saved>, Error> {
        let Some(mut save) = self.save.take() else { return Ok(None) };
        let communicator = engine.communicator();
        let (mut mine, mut not_removed) = (Ok(Digest::default()), Vec::new());
        match save.done.take() {
            Some(Done::Written(result, copies)) => (mine, self.copies) = (result, copies),
            Some(Done::Published(Ok(left))) => not_removed = left,
            Some(Done::Published(Err(error))) => mine = Err(error),
            Some(Done::Nothing) | None => {}
        }
        let digest = agree(communicator, &self.dir, mine).inspect_err(|_| self.tidy(engine, &save.folders))?;
        if save.publishing {
            let Save { folders, step, began, held, .. } = save;
            return Ok(Some(Saved { path: folders.complete, step, held, took: began.elapsed(), not_removed }));
        }
        let words = [digest.bytes, (digest.checksum >> 64) as u64, digest.checksum as u64];
        let digests = communicator.all_gather_scalars(&words)?;
        (save.publishing, save.done) = (true, Some(Done::Nothing));
        if communicator.rank() == 0 {
            let shards = engine.layout().shards;
            let file = |(shard, words): (usize, &Vec<u64>)| {
                let digest = Digest { bytes: words[0], checksum: u128::from(words[1]) << 64 | u128::from(words[2]) };
                FileEntry { name: shard::name(shard, shards), bytes: digest.bytes, xxh3: digest.hex() }
            };
            let files = digests[..shards].iter().enumerate().map(file).collect();
            let manifest = Box::new(Manifest { files, ..save.manifest.clone() }.sealed());
            self.writer.give(Job::Publish { folders: save.folders.clone(), manifest, keep: self.keep });
            save.done = None;
        }
        self.save = Some(save);
        Ok(None)
    }

    /// Makes room if it can; the error that led here says more than a failure to tidy up would.
    fn tidy(&self, engine: &Engine, folders: &Folders) {
        if engine.communicator().rank() == 0 {
            let _ = remove(&folders.incomplete);
        }
    }
}

/// Whether this rank writes a file: every group holds the same, and the first one saves it.
fn writes(engine: &Engine) -> bool {
    engine.replica() == 0
}

impl Writer {
    fn start(dir: &Path) -> Result<Writer, Error> {
        let (jobs, inbox) = channel::<Job>();
        let (outbox, results) = channel();
        let work = move || {
            // Of a processor that computes, it takes what is left over. Where that is forbidden, it takes its share.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), LEAST_PRIORITY);
            // Ends when either end of a channel is dropped.
            for job in inbox {
                if outbox.send(job.run()).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("pillion-checkpoint".to_owned()).spawn(work);
        let thread = thread.map_err(|error| {
            Error::file(dir, format!("no thread to write it can be started: {}", explain_thread(&error)))
        })?;
        Ok(Writer { jobs: Some(jobs), results, thread: Some(thread), dead: false })
    }

    /// Stands for the answer of the thread that has panicked, which has been printed.
    fn died(&mut self, dir: &Path) -> Done {
        self.dead = true;
        Done::Published(Err(Error::file(dir, "the thread that writes it panicked")))
    }

    fn give(&self, job: Job) {
        // That the thread has died, its missing answer says.
        let _ = self.jobs.as_ref().expect("there until it is dropped").send(job);
    }
}

impl Job {
    fn run(self) -> Done {
        match self {
            Job::Write { path, layout, states, copies } => {
                Done::Written(shard::write(&path, &layout, states, &copies), copies)
            }
            Job::Publish { folders, manifest, keep } => {
                let pruned = |()| keep.map_or(Vec::new(), |keep| prune(&folders.dir, manifest.step, keep));
                Done::Published(publish(&folders, &manifest).map(pruned))
            }
        }
    }
}

impl Drop for Writer {
    /// Waits for the thread; what was not complete stays incomplete.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pillion_collectives::{Communicator, Launch, Options};
    use pillion_kernels::Cpu;

    use super::*;
    use crate::{Policy, TensorSpec, UnitSpec};

    /// What a save holds the caller up for must not grow by making memory: what was reserved serves
    /// every save, also after one that failed.
    #[test]
    fn the_copies_that_were_reserved_serve_every_save() {
        let dir = tempfile::tempdir().unwrap();
        let unit = |name: &str, len| {
            let tensor = TensorSpec { name: format!("{name}.x"), shape: vec![len], decay: false, frozen: false };
            UnitSpec { name: name.to_owned(), tensors: vec![tensor] }
        };
        let communicator = Arc::new(Communicator::connect(&Launch::single(), Options::default()).unwrap());
        let layout = Layout::new(&[unit("a", 1000), unit("b", 3000)], 1);
        let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, Policy::default()).unwrap();
        engine.initialize(|_, _| |index: usize| index as f32).unwrap();
        let mut saver = Saver::new(&dir.path().join("saves"), None).unwrap();
        saver.reserve(&engine).unwrap();
        // New memory could lie where the old one was freed, but it would not have this much room.
        for copy in &mut saver.copies {
            [&mut copy.master].into_iter().chain(&mut copy.states).for_each(|part| part.reserve_exact(777));
        }
        let places = |saver: &Saver| -> Vec<_> {
            let of_part = |part: &Vec<f32>| (part.as_ptr(), part.capacity());
            let of_unit =
                |copy: &State| -> Vec<_> { [&copy.master].into_iter().chain(&copy.states).map(of_part).collect() };
            saver.copies.iter().flat_map(of_unit).collect()
        };
        let reserved = places(&saver);
        assert_eq!(reserved.len(), 2 * (1 + Policy::default().states.len()));
        for step in 1..=3 {
            // A file where the second save's folder should be.
            let blocked = dir.path().join("saves/step-00000002.incomplete");
            if step == 2 {
                std::fs::write(&blocked, "x").unwrap();
            }
            let begun = saver.begin(&engine, step, &Value::Null);
            assert_eq!(begun.is_err(), step == 2, "{begun:?}");
            assert_eq!(saver.wait(&engine).unwrap().map(|saved| saved.step), (step != 2).then_some(step));
            assert_eq!(places(&saver), reserved, "after step {step}");
        }
    }
}
