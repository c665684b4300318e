//! The thread that writes a rank's part of a checkpoint.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use pillion_collectives::limits::explain_thread;

use super::manifest::Manifest;
use super::save::{Folders, Keep, prune, publish};
use super::shard::{self, Digest};
use super::staging::{Staged, Staging};
use crate::{Error, Layout};

/// The nice value of threads that write while training goes on.
const LEAST_PRIORITY: i32 = 19;

/// The thread that writes, and the ways to and from it.
pub(super) struct Writer {
    jobs: Option<Sender<Job>>,
    pub(super) results: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// Whether it has panicked, and another must be started.
    pub(super) dead: bool,
}

pub(super) enum Job {
    Write { path: PathBuf, layout: Layout, states: &'static [&'static str], staged: Staged },
    Publish { folders: Folders, manifest: Box<Manifest>, keep: Option<Keep> },
}

/// What a thread has done, with what it was given.
pub(super) enum Done {
    Written(Result<Digest, Error>, Staged),
    Published(Result<Vec<Error>, Error>),
    /// This rank had no part in it.
    Nothing,
}

impl Writer {
    pub(super) fn start(dir: &Path, staging: Staging) -> Result<Writer, Error> {
        Writer::with(dir, move |inbox, outbox| {
            // Steps wait for the thread that empties a ring, so it keeps its share of the
            // processors.
            if staging == Staging::Copies {
                // Of a processor that computes, it takes what is left over. Where that is
                // forbidden, it takes its share.
                let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), LEAST_PRIORITY);
            }
            // Ends when either end of a channel is dropped.
            for job in inbox {
                if outbox.send(job.run()).is_err() {
                    break;
                }
            }
        })
    }

    /// A thread that does `work`, with its ends of the channels.
    pub(super) fn with(
        dir: &Path,
        work: impl FnOnce(Receiver<Job>, Sender<Done>) + Send + 'static,
    ) -> Result<Writer, Error> {
        let (jobs, inbox) = channel::<Job>();
        let (outbox, results) = channel();
        let work = move || work(inbox, outbox);
        let thread = std::thread::Builder::new().name("pillion-checkpoint".to_owned()).spawn(work);
        let thread = thread.map_err(|error| {
            Error::file(dir, format!("no thread to write it can be started: {}", explain_thread(&error)))
        })?;
        Ok(Writer { jobs: Some(jobs), results, thread: Some(thread), dead: false })
    }

    /// Stands for the answer of the thread that has panicked, which has been printed.
    pub(super) fn died(&mut self, dir: &Path) -> Done {
        self.dead = true;
        Done::Published(Err(Error::file(dir, "the thread that writes it panicked")))
    }

    pub(super) fn give(&self, job: Job) {
        // If the thread has died, its answer does not come, and the caller notices that.
        let _ = self.jobs.as_ref().expect("there until it is dropped").send(job);
    }
}

impl Job {
    pub(super) fn run(self) -> Done {
        match self {
            Job::Write { path, layout, states, staged } => {
                Done::Written(shard::write(&path, &layout, states, &staged), staged)
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
