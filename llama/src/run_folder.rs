//! The folder of a run: whose it is, what runs write there, and what happens to an earlier run in it.
//!
//! ```text
//! OUT/.pillion.lock        held by the run that writes here; its presence says that this is the folder of runs
//!     metrics.jsonl        one line a step
//!     checkpoints/step-…   see `pillion_runtime::checkpoint`
//!     tokens/*.tokens      see `data::TokenFile`; shared by all runs in this folder
//!     trace.json           with --trace
//!     earlier-1/           metrics, checkpoints and trace of the run before
//! ```
//!
//! The folder itself is never renamed or removed: it may be a mount point, a link, the user's working folder, or lie
//! where this user may not write. Of what lies in it, only files that runs wrote are ever moved.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pillion_runtime::checkpoint;

use crate::{Error, complain};

const LOCK: &str = ".pillion.lock";
const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const TOKENS: &str = "tokens";
const TRACE: &str = "trace.json";
const EARLIER: &str = "earlier-";

/// How long a run waits for another one that may be ending: the system takes a while to end a process of many gigabytes.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// A folder that this process has claimed, until it is dropped.
pub(crate) struct RunFolder {
    path: PathBuf,
    /// None where the file system has no locks.
    _lock: Option<File>,
}

/// Whether runs write in a folder.
pub(crate) fn is_one(folder: &Path) -> bool {
    // Runs of versions before the lock lay in the folder have the other two.
    folder.join(LOCK).exists() || (folder.join(TOKENS).is_dir() && folder.join(CHECKPOINTS).is_dir())
}

/// Whether an entry of a folder of runs has a name that they write under.
pub(crate) fn is_of_run(name: &OsStr) -> bool {
    let is_earlier = |name: &str| name.strip_prefix(EARLIER).is_some_and(|number| number.parse::<u32>().is_ok());
    name.to_str().is_some_and(|name| [METRICS, CHECKPOINTS, TOKENS, TRACE].contains(&name) || is_earlier(name))
}

/// Where a run's metrics are.
pub(crate) fn metrics(out: &Path) -> PathBuf {
    out.join(METRICS)
}

/// Where a run's checkpoints are.
pub(crate) fn checkpoints(out: &Path) -> PathBuf {
    out.join(CHECKPOINTS)
}

/// Where a run's token files are.
pub(crate) fn tokens(out: &Path) -> PathBuf {
    out.join(TOKENS)
}

/// Where a run's timeline is.
pub(crate) fn trace(out: &Path) -> PathBuf {
    out.join(TRACE)
}

impl RunFolder {
    /// Makes a folder if need be, and claims it for this process: two runs at once would mix what they write.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be made or written, or another process keeps it for longer than a run takes to end.
    pub(crate) fn claim(out: &Path) -> Result<RunFolder, Error> {
        if out.exists() && !out.is_dir() {
            return Err(Error::file(out, "is not a folder: choose one that can be written, with --out DIR"));
        }
        fs::create_dir_all(out).map_err(|error| cannot_write(out, error))?;
        Ok(RunFolder { path: out.to_owned(), _lock: lock(out)? })
    }

    /// Its path, as the user wrote it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes what somebody has removed since it was claimed, and claims it again. Returns whether anything was missing.
    ///
    /// # Errors
    /// As for [`RunFolder::claim`].
    pub(crate) fn restore(&mut self) -> Result<bool, Error> {
        if self.path.join(LOCK).exists() {
            return Ok(false);
        }
        *self = RunFolder::claim(&self.path.clone())?;
        Ok(true)
    }

    /// Sets the earlier run in this folder aside, but for its tokens, unless the checkpoint to go on from is that run's.
    /// Returns where it is now. `traces` says whether this run will write a timeline.
    ///
    /// # Errors
    /// [`Error::File`] when this run would overwrite a file that no run wrote, or something cannot be moved.
    pub(crate) fn set_aside(&self, resume: Option<&Path>, traces: bool) -> Result<Option<PathBuf>, Error> {
        let metrics = self.written(METRICS, r#"{"step":"#)?;
        let trace = match self.written(TRACE, pillion_runtime::trace::HEADER) {
            Err(_) if !traces => None,
            trace => trace?,
        };
        if resume.is_some_and(|resume| is_of(&self.path, resume)) {
            return Ok(None);
        }
        let written: Vec<PathBuf> = self.saved()?.into_iter().chain(metrics).chain(trace).collect();
        if written.is_empty() {
            return Ok(None);
        }
        let aside = self.free_name();
        fs::create_dir(&aside).map_err(|error| cannot_write(&aside, error))?;
        for name in &written {
            let (from, to) = (self.path.join(name), aside.join(name));
            let made = to.parent().map_or(Ok(()), fs::create_dir_all);
            made.and_then(|()| fs::rename(&from, to)).map_err(|error| cannot_write(&from, error))?;
        }
        Ok(Some(aside))
    }

    /// The checkpoints in this folder, whole or not, by their paths in it.
    fn saved(&self) -> Result<Vec<PathBuf>, Error> {
        let folder = checkpoints(&self.path);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>),
        };
        let entries = entries.map_err(|error| cannot_write(&folder, error))?;
        // A checkpoint that was set aside has its name with an ending.
        let is_checkpoint = |name: &Path| checkpoint::is_named_as_one(name) || name.to_str().is_some_and(is_aside);
        let names = entries.into_iter().map(|entry| PathBuf::from(entry.file_name()));
        Ok(names.filter(|name| is_checkpoint(name)).map(|name| Path::new(CHECKPOINTS).join(name)).collect())
    }

    /// A file of that name if a run wrote it, which its beginning tells; none if there is no such file, or nothing in it.
    fn written(&self, name: &str, beginning: &str) -> Result<Option<PathBuf>, Error> {
        let path = self.path.join(name);
        let mut found = vec![0; beginning.len()];
        let read = File::open(&path).and_then(|mut file| {
            let len = file.metadata()?.len();
            if len < found.len() as u64 {
                found.truncate(len as usize);
            }
            file.read_exact(&mut found)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(cannot_write(&path, error)),
            Ok(()) if found.is_empty() => Ok(None),
            // It may have been cut off in the middle.
            Ok(()) if beginning.as_bytes().starts_with(&found) => Ok(Some(name.into())),
            Ok(()) => Err(Error::file(
                path,
                "was not written by pillion, which would write its own here: move it, or choose another folder with --out DIR",
            )),
        }
    }

    fn free_name(&self) -> PathBuf {
        let named = |number: u32| self.path.join(format!("{EARLIER}{number}"));
        (1..).map(named).find(|path| !path.exists()).expect("numbers do not end")
    }
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

/// Takes the lock in a folder.
fn lock(folder: &Path) -> Result<Option<File>, Error> {
    let path = folder.join(LOCK);
    let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open.map_err(|error| cannot_write(folder, error))?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if started.elapsed() < PATIENCE => std::thread::sleep(RETRY_EVERY),
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // What cannot be read is not said.
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.is_empty() { holder } else { format!(" ({})", holder.trim_end()) };
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
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(cannot_write(folder, error)),
        }
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let holder = format!("process {} on {host}\n", std::process::id());
    // Only said to others: a full disk ends no run here.
    let _ =
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).and_then(|_| file.write_all(holder.as_bytes()));
    Ok(Some(file))
}

/// Whether an error of a lock says that there are none: Lustre without `-o flock`, some FUSE and NFS mounts.
fn has_no_locks(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let codes = [Errno::NOSYS, Errno::NOLCK, Errno::OPNOTSUPP];
    error.raw_os_error().is_some_and(|code| codes.contains(&Errno::from_raw_os_error(code)))
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::file(path, format!("{error}: choose a folder that can be written, with --out DIR"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn only_what_runs_wrote_is_set_aside() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::claim(place.path()).unwrap();
        assert_eq!(folder.set_aside(None, false).unwrap(), None, "there was no run");
        for name in ["notes", "checkpoints/notes", "checkpoints/step-00000005/manifest.json", "trace/notes"] {
            write(place.path(), name, "mine");
        }
        write(place.path(), "checkpoints/step-00000009.aside.2/manifest.json", "mine");
        write(place.path(), "metrics.jsonl", "{\"step\":1}\n");
        write(place.path(), "tokens/text.tokens", "tokens");
        let aside = folder.set_aside(None, false).unwrap().unwrap();
        assert_eq!(aside, folder.path().join("earlier-1"));
        assert_eq!(entries(&aside), ["checkpoints", "metrics.jsonl"]);
        assert_eq!(entries(&aside.join("checkpoints")), ["step-00000005", "step-00000009.aside.2"]);
        assert_eq!(entries(place.path()), [".pillion.lock", "checkpoints", "earlier-1", "notes", "tokens", "trace"]);
        assert_eq!(entries(&place.path().join("checkpoints")), ["notes"]);
        assert_eq!(folder.set_aside(None, false).unwrap(), None, "there is no run any more");
    }

    #[test]
    fn a_foreign_file_with_the_name_of_ours_is_refused_and_kept() {
        for (name, text) in [("metrics.jsonl", "{\"loss\": 1}"), ("trace.json", "[]")] {
            let place = tempfile::tempdir().unwrap();
            write(place.path(), "checkpoints/step-00000005/manifest.json", "mine");
            write(place.path(), name, text);
            let error = RunFolder::claim(place.path()).unwrap().set_aside(None, true).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("was not written by pillion"), "{error}");
            assert_eq!(fs::read_to_string(place.path().join(name)).unwrap(), text);
            assert!(place.path().join("checkpoints/step-00000005").exists(), "nothing was moved");
        }
    }

    #[test]
    fn a_run_that_is_resumed_stays() {
        let place = tempfile::tempdir().unwrap();
        let saved = place.path().join("checkpoints/step-00000005");
        fs::create_dir_all(&saved).unwrap();
        write(place.path(), "metrics.jsonl", "{\"step\":1}\n");
        let folder = RunFolder::claim(place.path()).unwrap();
        assert_eq!(folder.set_aside(Some(&saved), false).unwrap(), None);
        assert!(folder.set_aside(Some(&place.path().join("checkpoints")), false).unwrap().is_some());
    }

    #[test]
    fn errors_of_file_systems_without_locks_are_known() {
        for (code, none) in [(38, true), (37, true), (95, true), (11, false), (5, false)] {
            assert_eq!(has_no_locks(&io::Error::from_raw_os_error(code)), none, "{code}");
        }
    }
}
