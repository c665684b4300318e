//! The folder of a run: the lock that keeps other runs out, the files that runs write, and how an
//! earlier run in the folder is set aside.
//!
//! ```text
//! OUT/.pillion.lock        held by the run that writes here; marks the folder as one of runs
//!     .pillion-*           files that a run has not finished yet
//!     metrics.jsonl        one line a step
//!     metrics.aside.jsonl  lines of steps that a resume or a rewind undid, and lines of others
//!     run.json             what the run is: see `train/about.rs`
//!     checkpoints/step-…   see `pillion_runtime::checkpoint`
//!     tokens/*.tokens      see `data::TokenFile`; shared by all runs in this folder
//!     huggingface/         the tokenizer of the run's model, and other files that go with it
//!     tensorboard/         with --tensorboard: see `train/events.rs`
//!     trace.json           with --trace
//!     earlier-1/           all of these of the run before, but tokens
//! ```
//!
//! The folder itself is never renamed or removed, because it may be a mount point, a link, or the
//! user's working folder, and because its parent may not be writable. Only files that runs wrote
//! are moved.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pillion_data::runs::{
    ABOUT, ABOUT_BEGIN, CHECKPOINTS, EARLIER, HUGGINGFACE, LOCK, METRICS, METRICS_ASIDE, METRICS_BEGIN, TENSORBOARD,
    TOKENS, TRACE,
};
use pillion_llama::huggingface::{COMPANIONS, CONFIG};
use pillion_runtime::checkpoint;
use rustix::fs::{Access, OFlags};

use crate::train::events;
use crate::{Error, complain};

/// How long a run waits for another run that may be ending. The system needs seconds to end a
/// process with many gigabytes of memory.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY_EVERY: Duration = Duration::from_millis(20);
/// How long it waits before it says so.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Why a file that no run wrote, and that has the name of a run's, is refused.
const FOREIGN: &str =
    "was not written by pillion, which would write its own here: move it, or choose another folder with --out DIR";
/// What a run writes into its lock begins with this.
const HOLDER: &str = "process ";

/// A folder that this process has claimed, until it is dropped.
pub(crate) struct RunFolder {
    path: PathBuf,
    /// Open, and locked where the file system has locks.
    lock: File,
}

/// Whether a line begins as those of the metrics do.
pub(crate) fn begins_as_metrics(line: &str) -> bool {
    line.starts_with(METRICS_BEGIN)
}

/// Where a run's metrics are.
pub(crate) fn metrics(out: &Path) -> PathBuf {
    out.join(METRICS)
}

/// Where a run keeps the metrics of steps that a resume or a rewind undid.
pub(crate) fn metrics_aside(out: &Path) -> PathBuf {
    out.join(METRICS_ASIDE)
}

/// Where a run says what it is.
pub(crate) fn about(out: &Path) -> PathBuf {
    out.join(ABOUT)
}

/// A name for something in a run's folder that is not finished yet.
pub(crate) fn unfinished(out: &Path, name: &str) -> PathBuf {
    out.join(format!(".pillion-{name}"))
}

/// Where a run's checkpoints are.
pub(crate) fn checkpoints(out: &Path) -> PathBuf {
    out.join(CHECKPOINTS)
}

/// Where a run's token files are.
pub(crate) fn tokens(out: &Path) -> PathBuf {
    out.join(TOKENS)
}

/// Where a run's event files are.
pub(crate) fn tensorboard(out: &Path) -> PathBuf {
    out.join(TENSORBOARD)
}

/// Where a run keeps the files that go with its model.
pub(crate) fn huggingface(out: &Path) -> PathBuf {
    out.join(HUGGINGFACE)
}

/// The folder of the run whose checkpoint this is.
pub(crate) fn of_checkpoint(checkpoint: &Path) -> Option<PathBuf> {
    let canonical = checkpoint.canonicalize().ok()?;
    Some(canonical.parent()?.parent()?.to_owned())
}

/// Where a run's timeline is.
pub(crate) fn trace(out: &Path) -> PathBuf {
    out.join(TRACE)
}

impl RunFolder {
    /// Makes a folder if need be, and claims it for this process: two runs at once would mix what
    /// they write.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be made or written, or another process keeps it for longer
    /// than a run takes to end.
    pub(crate) fn claim(out: &Path) -> Result<RunFolder, Error> {
        if out.is_symlink() && !out.exists() {
            return Err(Error::file(out, "is a link that leads nowhere: choose another folder with --out DIR"));
        }
        if out.exists() && !out.is_dir() {
            return Err(Error::file(out, "is not a folder: choose one that can be written, with --out DIR"));
        }
        fs::create_dir_all(out).map_err(|error| cannot_write(out, error))?;
        Ok(RunFolder { path: out.to_owned(), lock: lock(out, PATIENCE)? })
    }

    /// Its path, as the user wrote it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder again where somebody has removed it since it was claimed, and claims it
    /// again.
    ///
    /// # Errors
    /// As for [`RunFolder::claim`]; [`RunFolder::is_lost`] tells whether another run has it now.
    pub(crate) fn restore(&mut self) -> Result<(), Error> {
        if self.is_claimed() {
            return Ok(());
        }
        fs::create_dir_all(&self.path).map_err(|error| cannot_write(&self.path, error))?;
        self.lock = lock(&self.path, Duration::ZERO)?;
        Ok(())
    }

    /// Whether another process has claimed the folder, after somebody removed it or the lock in it.
    pub(crate) fn is_lost(&self) -> bool {
        !self.is_claimed() && self.path.join(LOCK).exists()
    }

    /// Whether the lock in the folder is the one that this process holds.
    fn is_claimed(&self) -> bool {
        let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let held = self.lock.metadata().map(of);
        held.is_ok_and(|held| fs::metadata(self.path.join(LOCK)).is_ok_and(|there| of(there) == held))
    }

    /// Whether this run would overwrite a file that no run wrote. `traces` says whether it will
    /// write a timeline.
    ///
    /// # Errors
    /// [`Error::File`] that names the file.
    pub(crate) fn check(&self, traces: bool) -> Result<(), Error> {
        written(&self.path, METRICS, METRICS_BEGIN)?;
        written(&self.path, ABOUT, ABOUT_BEGIN)?;
        if traces {
            written(&self.path, TRACE, pillion_runtime::trace::HEADER)?;
        }
        let folder = checkpoints(&self.path);
        if folder.is_dir()
            && let Err(error) = rustix::fs::access(&folder, Access::WRITE_OK)
        {
            return Err(cannot_write(&folder, error.into()));
        }
        let is_savers = |name: &str| checkpoint::is_named_as_one(Path::new(name.trim_end_matches(".incomplete")));
        match self.in_checkpoints()?.into_iter().find(|(name, is_ours)| is_savers(name) && !is_ours) {
            None => Ok(()),
            Some((name, _)) => Err(Error::file(checkpoints(&self.path).join(name), FOREIGN)),
        }
    }

    /// Sets the earlier run in this folder aside, unless the checkpoint to go on from is that
    /// run's, and says so. Its tokens stay. Returns where it is now.
    ///
    /// # Errors
    /// As for [`RunFolder::check`], and [`Error::File`] when something cannot be moved.
    pub(crate) fn set_aside(&self, resume: Option<&Path>, traces: bool) -> Result<Option<PathBuf>, Error> {
        self.check(traces)?;
        if resume.is_some_and(|resume| is_of(&self.path, resume)) {
            return Ok(None);
        }
        let ours = |name, beginning| written(&self.path, name, beginning).ok().flatten();
        let files = [
            ours(METRICS, METRICS_BEGIN),
            ours(METRICS_ASIDE, METRICS_BEGIN),
            ours(ABOUT, ABOUT_BEGIN),
            ours(TRACE, pillion_runtime::trace::HEADER),
        ];
        let companions = self.companions()?;
        let files: Vec<&str> = files.into_iter().flatten().collect();
        let saved = self.saved()?;
        let tensorboard = tensorboard(&self.path);
        let events = events::files(&tensorboard).map_err(|error| cannot_write(&tensorboard, error))?;
        if files.is_empty() && saved.is_empty() && events.is_empty() && companions.is_empty() {
            return Ok(None);
        }
        let aside = self.free_name();
        fs::create_dir(&aside).map_err(|error| cannot_write(&aside, error))?;
        if !saved.is_empty() {
            let (from, to) = (checkpoints(&self.path), self.checkpoints_aside(&aside)?);
            saved.iter().try_for_each(|name| rename(&from.join(name), &to.join(name)))?;
        }
        if !events.is_empty() {
            let to = self::tensorboard(&aside);
            fs::create_dir(&to).map_err(|error| cannot_write(&to, error))?;
            events.iter().try_for_each(|name| rename(&tensorboard.join(name), &to.join(name)))?;
        }
        if !companions.is_empty() {
            let (from, to) = (huggingface(&self.path), huggingface(&aside));
            fs::create_dir(&to).map_err(|error| cannot_write(&to, error))?;
            companions.iter().try_for_each(|name| rename(&from.join(name), &to.join(name)))?;
        }
        files.iter().try_for_each(|name| rename(&self.path.join(name), &aside.join(name)))?;
        crate::print(format_args!("the earlier run in {} is now {}", self.path.display(), aside.display()));
        Ok(Some(aside))
    }

    /// Makes the folder for the checkpoints of a run that is set aside. Where checkpoints lie on
    /// another file system, behind a link or a mount, they stay there, and a link leads to them.
    fn checkpoints_aside(&self, aside: &Path) -> Result<PathBuf, Error> {
        let (here, there) = (checkpoints(&self.path), checkpoints(aside));
        let fail = |error| cannot_write(&here, error);
        if fs::metadata(&here).map_err(fail)?.dev() == fs::metadata(aside).map_err(fail)?.dev() {
            fs::create_dir(&there).map_err(|error| cannot_write(&there, error))?;
            return Ok(there);
        }
        let beside = here.canonicalize().map_err(fail)?.join(aside.file_name().expect("it has a name"));
        fs::create_dir(&beside).and_then(|()| symlink(&beside, &there)).map_err(fail)?;
        Ok(beside)
    }

    /// The names of the checkpoints in this folder, whole or not.
    fn saved(&self) -> Result<Vec<String>, Error> {
        // A checkpoint that was set aside has its name with an ending.
        let is_checkpoint = |name: &str| checkpoint::is_named_as_one(Path::new(name)) || is_aside(name);
        let found = self.in_checkpoints()?.into_iter();
        Ok(found.filter(|(name, is_ours)| *is_ours && is_checkpoint(name)).map(|(name, _)| name).collect())
    }

    /// Names of what lies among the checkpoints, each with whether it can be a saver's.
    fn in_checkpoints(&self) -> Result<Vec<(String, bool)>, Error> {
        let folder = checkpoints(&self.path);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_symlink() => {
                let reason = "is a link that leads nowhere: remove it, or choose another folder with --out DIR";
                return Err(Error::file(folder, reason));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        let entries = entries.map_err(|error| cannot_write(&folder, error))?;
        let names = entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.map(|name| (name.clone(), checkpoint::is_ours(&folder.join(name)))).collect())
    }

    /// The names of the files that go with a model.
    ///
    /// # Errors
    /// [`Error::File`] when others lie beside them: they may all be the user's, who keeps a model there.
    fn companions(&self) -> Result<Vec<&'static str>, Error> {
        let entries = fs::read_dir(huggingface(&self.path)).into_iter().flatten().flatten();
        let is_known = |name: &std::ffi::OsStr| name == CONFIG || COMPANIONS.iter().any(|known| name == *known);
        if let Some(foreign) = entries.map(|entry| entry.path()).find(|path| !path.file_name().is_some_and(is_known)) {
            return Err(Error::file(foreign, FOREIGN));
        }
        let folder = huggingface(&self.path);
        let is_there = |name: &&str| match folder.join(name).symlink_metadata() {
            Ok(_) => Ok(true),
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => Ok(false),
            Err(error) => Err(cannot_write(&folder, error)),
        };
        let names = [CONFIG].into_iter().chain(COMPANIONS);
        names.filter_map(|name| is_there(&name).map(|there| there.then_some(name)).transpose()).collect()
    }

    fn free_name(&self) -> PathBuf {
        let named = |number: u32| self.path.join(format!("{EARLIER}{number}"));
        (1..).map(named).find(|path| !path.exists()).expect("numbers do not end")
    }
}

/// The name of a file in `folder` that a run wrote, which its beginning tells; none if there is no
/// such file, or nothing in it.
fn written<'n>(folder: &Path, name: &'n str, beginning: &str) -> Result<Option<&'n str>, Error> {
    let path = folder.join(name);
    let mut found = vec![0; beginning.len()];
    let read = File::open(&path).and_then(|mut file| {
        // It may have been cut off in the middle.
        let len = file.metadata()?.len().min(found.len() as u64);
        found.truncate(len as usize);
        file.read_exact(&mut found)
    });
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_write(&path, error)),
        Ok(()) if found.is_empty() => Ok(None),
        Ok(()) if beginning.as_bytes().starts_with(&found) => Ok(Some(name)),
        Ok(()) => Err(Error::file(path, FOREIGN)),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|error| cannot_write(from, error))
}

/// Whether a checkpoint is of the run in `out`.
pub(crate) fn is_of(out: &Path, checkpoint: &Path) -> bool {
    let canonical = |path: &Path| path.canonicalize().ok();
    let parent = canonical(checkpoint).and_then(|path| path.parent().map(Path::to_owned));
    parent.is_some() && parent == canonical(&checkpoints(out))
}

fn is_aside(name: &str) -> bool {
    name.split_once(".aside").is_some_and(|(name, _)| checkpoint::is_named_as_one(Path::new(name)))
}

/// Takes the lock in a folder, or opens it where the file system has no locks.
fn lock(folder: &Path, patience: Duration) -> Result<File, Error> {
    let path = folder.join(LOCK);
    // A link of that name could lead to any file.
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let open = File::options().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(&path);
    let mut file = open.map_err(|error| cannot_write(&path, error))?;
    let mut holder = String::new();
    // A run writes one line of text into its lock.
    let is_text = file.read_to_string(&mut holder).is_ok();
    if !is_text || !(holder.is_empty() || holder.starts_with(HOLDER)) {
        return Err(Error::file(path, FOREIGN));
    }
    let (started, mut is_said) = (Instant::now(), false);
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if started.elapsed() < patience => {
                if !is_said && started.elapsed() > SAY_AFTER {
                    is_said = true;
                    complain(format_args!("{}: waiting for another run{}", folder.display(), named(&holder)));
                }
                std::thread::sleep(RETRY_EVERY);
            }
            Err(TryLockError::WouldBlock) => {
                let holder = named(&holder);
                let reason = format!(
                    "another run is writing here{holder}: wait for its end, or choose another folder with --out DIR"
                );
                return Err(Error::file(folder, reason));
            }
            Err(TryLockError::Error(error)) if has_no_locks(&error) => {
                complain(format_args!(
                    "{}: its file system has no locks ({error}), so make sure that no other run writes here",
                    folder.display()
                ));
                return Ok(file);
            }
            Err(TryLockError::Error(error)) => return Err(cannot_write(folder, error)),
        }
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let holder = format!("{HOLDER}{} on {host}\n", std::process::id());
    // Only said to others: a full disk ends no run here.
    let _ =
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).and_then(|_| file.write_all(holder.as_bytes()));
    Ok(file)
}

/// What a lock says of the process that holds it, for a message.
fn named(holder: &str) -> String {
    if holder.is_empty() { String::new() } else { format!(" ({})", holder.trim_end()) }
}

/// Whether an error of a lock says that there are none: Lustre without `-o flock`, some FUSE and
/// NFS mounts.
fn has_no_locks(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOSYS, Errno::NOLCK, Errno::OPNOTSUPP];
    error.raw_os_error().is_some_and(|code| codes.contains(&Errno::from_raw_os_error(code)))
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::file(path, format!("{error}: choose a folder that can be written, with --out DIR"))
}

#[cfg(test)]
mod tests;
