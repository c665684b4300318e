//! Saving in the background. The training loop pays for a copy of the state, or passes it through a
//! ring ([`Staging`]); a thread of each rank writes it.
//!
//! ```text
//! begin      rank 0 makes the folder; every rank copies its state, and its thread writes a file of it, or sends
//!            it to its thread through a ring                                                          (collective)
//! request    goes into a later step's requests: 1 once this rank's thread has done its part
//! observe    with the sum of that: when all files are written, rank 0's thread adds the manifest and gives the folder its name;
//!            when that is done too, the checkpoint is complete                                            (collective)
//! ```
//!
//! The sum is the same on every rank, so all take the same way. A part that fails on any rank fails the save on all, and leaves training as it was.

use std::path::{Path, PathBuf};
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::agree;
use super::manifest::{self, FileEntry, Manifest};
use super::save::{Folders, Keep, check_shared, prepare, remove};
use super::shard::{self, Digest};
use super::staging::{Cursor, Inlet, Staged, Staging, elements, ring};
use super::writer::{Done, Job, Writer};
use crate::{Engine, Error, Layout, Policy, State};

/// Saves an engine's checkpoints, one at a time.
pub struct Saver {
    dir: PathBuf,
    keep: Option<usize>,
    /// A step whose checkpoint is kept besides.
    besides: Option<u64>,
    staging: Staging,
    save: Option<Save>,
    /// What the thread is given for the next save. None before the first save, while the thread has
    /// it, and when a thread that panicked has not given it back.
    staged: Option<Staged>,
    /// The other end of the ring. Dropped before the writer, whose thread may be waiting for it.
    inlet: Option<Inlet>,
    writer: Writer,
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

impl Saver {
    /// Saves into `dir`, which every rank sees, and which is made where it is missing. With `keep`,
    /// older checkpoints than the newest that many are removed whenever one is complete. `staging`
    /// is the same on every rank.
    ///
    /// # Errors
    /// When no thread can be started.
    ///
    /// # Panics
    /// When none is to be kept, or a ring is smaller than [`Staging::LEAST_RING`].
    pub fn new(dir: &Path, keep: Option<usize>, staging: Staging) -> Result<Saver, Error> {
        assert!(keep != Some(0), "at least the newest checkpoint is kept");
        if let Staging::Ring { bytes } = staging {
            assert!(bytes >= Staging::LEAST_RING, "a ring of {bytes} bytes has no room for two elements");
        }
        let writer = Writer::start(dir, staging)?;
        Ok(Saver { dir: dir.to_owned(), keep, besides: None, staging, save: None, staged: None, inlet: None, writer })
    }

    /// From the next save on, keeps the checkpoint of this step besides the newest ones. What was
    /// kept for this before counts as others do. On rank 0; elsewhere without effect.
    pub fn keep_besides(&mut self, step: Option<u64>) {
        self.besides = step;
    }

    /// Bytes that a rank that writes needs for its saver, kept from [`Saver::reserve`] or its first
    /// save on. Only the ranks of the first group write.
    pub fn bytes(layout: &Layout, policy: &Policy, staging: Staging) -> u64 {
        staging.bytes(elements(layout, policy))
    }

    /// Makes the memory for this engine's state now. Otherwise the first save does, which then
    /// holds the caller up for longer than later ones.
    ///
    /// # Errors
    /// When the engine's parameters are invalid.
    pub fn reserve(&mut self, engine: &Engine) -> Result<(), Error> {
        self.stage(engine)
    }

    /// Copies what this rank writes, or makes the ring that it will pass through.
    fn stage(&mut self, engine: &Engine) -> Result<(), Error> {
        if !writes(engine) {
            return Ok(());
        }
        engine.check_state()?;
        let layout = engine.layout();
        let staged = self.staged.get_or_insert_with(|| match self.staging {
            Staging::Copies => Staged::Copies(Vec::new()),
            Staging::Ring { bytes } => {
                let (inlet, outlet) = ring(bytes, elements(layout, engine.policy()));
                self.inlet = Some(inlet);
                Staged::Ring(outlet)
            }
        });
        let Staged::Copies(copies) = staged else { return Ok(()) };
        copies.resize_with(layout.units.len(), State::default);
        copies.iter_mut().enumerate().try_for_each(|(unit, copy)| engine.read_state(unit, copy))
    }

    /// Whether a save is under way.
    pub fn is_busy(&self) -> bool {
        self.save.is_some()
    }

    /// Begins to save the engine's state as `step-…` in the folder; a checkpoint of the same step is replaced. Collective: every rank calls it
    /// between steps, with the same step. `extra` is kept as rank 0 gives it.
    ///
    /// # Errors
    /// [`Error::File`] when any rank could not do its part: on that rank what went wrong, on the
    /// others which rank it was. Then nothing is saved, and training can go on. Also when another
    /// rank is lost, or the engine's parameters are invalid. What a thread cannot write is an error
    /// of [`Saver::observe`] and [`Saver::wait`], also with a ring.
    ///
    /// # Panics
    /// When a save is under way: [`Saver::wait`] first.
    pub fn begin(&mut self, engine: &Engine, step: u64, extra: &Value) -> Result<(), Error> {
        assert!(!self.is_busy(), "one checkpoint is written at a time");
        let began = Instant::now();
        let communicator = engine.communicator();
        let folders = Folders::new(&self.dir, step);
        let restarted = if self.writer.dead {
            Writer::start(&self.dir, self.staging).map(|writer| self.writer = writer)
        } else {
            Ok(())
        };
        let token = if communicator.rank() == 0 { prepare(&folders) } else { Ok(0) };
        let token = agree(communicator, &self.dir, token)?;
        let token = communicator.all_gather_scalars(&[token])?[0][0];
        let layout = engine.layout();
        let staged = restarted
            .and_then(|()| check_shared(&folders, token))
            .and_then(|()| shard::check_names(layout, &self.dir))
            .and_then(|()| self.stage(engine));
        if let Err(error) = agree(communicator, &self.dir, staged) {
            self.tidy(engine, &folders);
            return Err(error);
        }
        let mut done = Some(Done::Nothing);
        if writes(engine) {
            let path = folders.incomplete.join(shard::name(engine.shard_number(), layout.shards));
            let staged = self.staged.take().expect("it has just been staged");
            let states = engine.policy().states;
            self.writer.give(Job::Write { path, layout: layout.clone(), states, staged });
            if let Some(inlet) = &self.inlet {
                let mut state = Cursor::new(engine);
                inlet.send(|piece| state.fill(piece));
            }
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
            stored: None,
            clip: engine.policy().clip,
            states: engine.policy().states.iter().map(|&name| name.to_owned()).collect(),
            units: manifest::specs(layout),
            files: Vec::new(),
            extra: extra.clone(),
        };
        let save =
            self.save.insert(Save { publishing: false, done, folders, step, began, held: Duration::ZERO, manifest });
        if self.staging != Staging::Copies {
            // Another rank's disk may take longer than the operations of a step should wait.
            communicator.patient_barrier()?;
        }
        save.held = began.elapsed();
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
            Some(Done::Written(result, staged)) => (mine, self.staged) = (result, Some(staged)),
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
            let (folders, keep) =
                (save.folders.clone(), self.keep.map(|newest| Keep { newest, besides: self.besides }));
            self.writer.give(Job::Publish { folders, manifest, keep });
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pillion_collectives::{Communicator, Launch, Options};
    use pillion_kernels::Cpu;

    use super::super::staging::for_each_buffer;
    use super::*;
    use crate::{Policy, TensorSpec, UnitSpec};

    /// 4000 elements of three parts: a ring of so many bytes has two buffers, which pass 24 pieces.
    const STAGINGS: [Staging; 2] = [Staging::Copies, Staging::Ring { bytes: 4096 }];

    fn engine(launch: &Launch, timeout: Duration) -> Engine {
        let unit = |name: &str, len| {
            let tensor = TensorSpec { name: format!("{name}.x"), shape: vec![len], decay: false, frozen: false };
            UnitSpec { name: name.to_owned(), tensors: vec![tensor] }
        };
        let options = Options { timeout, ..Options::default() };
        let communicator = Arc::new(Communicator::connect(launch, options).unwrap());
        let layout = Layout::new(&[unit("a", 1000), unit("b", 3000)], launch.world);
        let mut engine = Engine::new(communicator, Arc::new(Cpu), layout, Policy::default()).unwrap();
        engine.initialize(|_, _| |index: usize| index as f32).unwrap();
        engine
    }

    /// Shows all memory that is staged.
    fn for_each_part(saver: &mut Saver, mut see: impl FnMut(&mut Vec<f32>)) {
        match (saver.staged.as_mut().expect("no save is under way"), &saver.inlet) {
            (Staged::Copies(copies), _) => {
                copies
                    .iter_mut()
                    .for_each(|copy| [&mut copy.master].into_iter().chain(&mut copy.states).for_each(&mut see));
            }
            (Staged::Ring(outlet), Some(inlet)) => for_each_buffer(inlet, outlet, see),
            (Staged::Ring(_), None) => panic!("a ring has two ends"),
        }
    }

    /// A save makes no memory while the caller waits: the memory that was reserved serves every
    /// save, also one after a failure.
    #[test]
    fn what_was_reserved_serves_every_save() {
        for (staging, parts) in STAGINGS.into_iter().zip([2 * (1 + Policy::default().states.len()), 2]) {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&Launch::single(), Duration::from_secs(60));
            let mut saver = Saver::new(&dir.path().join("saves"), None, staging).unwrap();
            saver.reserve(&engine).unwrap();
            let mut bytes = 0;
            for_each_part(&mut saver, |part| {
                bytes += (size_of::<f32>() * part.capacity()) as u64;
                // New memory could lie where the old one was freed, but it would not have this much
                // room.
                part.reserve_exact(777);
            });
            assert_eq!(bytes, Saver::bytes(engine.layout(), engine.policy(), staging));
            let places = |saver: &mut Saver| {
                let mut places = Vec::new();
                for_each_part(saver, |part| places.push((part.as_ptr() as usize, part.capacity())));
                places
            };
            let reserved = places(&mut saver);
            assert_eq!(reserved.len(), parts);
            for step in 1..=3 {
                // A file where the second save's folder should be.
                let blocked = dir.path().join("saves/step-00000002.incomplete");
                if step == 2 {
                    std::fs::write(&blocked, "x").unwrap();
                }
                let begun = saver.begin(&engine, step, &Value::Null);
                assert_eq!(begun.is_err(), step == 2, "{begun:?}");
                assert_eq!(saver.wait(&engine).unwrap().map(|saved| saved.step), (step != 2).then_some(step));
                assert_eq!(places(&mut saver), reserved, "after step {step}");
            }
        }
    }

    /// Takes the first pieces out of the ring that comes with a job, or nothing where it is copies.
    fn take_three(job: &Job) {
        if let Job::Write { staged: Staged::Ring(outlet), .. } = job {
            outlet.take(3);
        }
    }

    #[test]
    fn a_thread_that_panics_fails_its_save_and_no_other() {
        for staging in STAGINGS {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&Launch::single(), Duration::from_secs(60));
            let mut saver = Saver::new(dir.path(), None, staging).unwrap();
            saver.writer = Writer::with(dir.path(), |inbox, _outbox| {
                take_three(&inbox.recv().expect("a job"));
                panic!("as a test asks it to");
            })
            .unwrap();
            saver.begin(&engine, 1, &Value::Null).unwrap();
            let error = saver.wait(&engine).unwrap_err();
            assert!(error.to_string().contains("the thread that writes it panicked"), "{error}");
            saver.begin(&engine, 2, &Value::Null).unwrap();
            saver.wait(&engine).unwrap().expect("it was under way");
            let names: Vec<_> =
                std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["step-00000002"]);
        }
    }

    /// Rank 1's disk holds its ring up for longer than an operation waits for another rank.
    #[test]
    fn ranks_wait_for_a_slow_disk_of_another_without_a_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let timeout = Duration::from_secs(2);
        let program = |launch: Launch| {
            let engine = engine(&launch, timeout);
            let mut saver = Saver::new(dir.path(), None, STAGINGS[1]).unwrap();
            if launch.rank == 1 {
                saver.writer = Writer::with(dir.path(), move |inbox, outbox| {
                    for job in inbox {
                        take_three(&job);
                        std::thread::sleep(2 * timeout);
                        let _ = outbox.send(job.run());
                    }
                })
                .unwrap();
            }
            saver.begin(&engine, 1, &Value::Null).unwrap();
            engine.communicator().barrier().expect("no rank is late");
            // Three pieces are lost, so the file is not what it should be; what matters is that it
            // ends.
            saver.wait(&engine).unwrap().expect("it was under way").held
        };
        let held: Vec<Duration> = std::thread::scope(|scope| {
            let ranks: Vec<_> = Launch::threads(2).into_iter().map(|launch| scope.spawn(|| program(launch))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        // The second buffer comes back only after the sleep.
        assert!(held.iter().all(|&held| held >= 2 * timeout), "{held:?}");
    }
}
