//! Saving: every rank writes its file into a folder that gets its name once all of it is on disk.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use pillion_collectives::limits::explain;
use serde_json::Value;

use super::manifest::{self, Manifest};
use super::{Candidate, Saver, Staging, candidates};
use crate::{Engine, Error};

/// Saves the engine's state as `dir/step-…` and returns that folder; blocks until it is on disk.
/// See [`Saver`], which does not. The state passes through [`Staging::SMALL_RING`].
///
/// # Errors
/// As for [`Saver::begin`].
pub fn save(engine: &Engine, dir: &Path, step: u64, extra: &Value) -> Result<PathBuf, Error> {
    let mut saver = Saver::new(dir, None, Staging::SMALL_RING)?;
    saver.begin(engine, step, extra)?;
    let saved = saver.wait(engine)?;
    Ok(saved.expect("a save that was begun ends").path)
}

/// Step of a folder that is named as a complete checkpoint, and whether another was to replace it.
pub(super) fn parse_name(name: &str) -> Option<(u64, bool)> {
    let rest = name.strip_prefix("step-")?;
    let (digits, replaced) = rest.strip_suffix(".old").map_or((rest, false), |digits| (digits, true));
    let step = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    Some((step, replaced))
}

/// The names that a checkpoint can have.
#[derive(Clone)]
pub(super) struct Folders {
    pub(super) dir: PathBuf,
    pub(super) complete: PathBuf,
    pub(super) incomplete: PathBuf,
    old: PathBuf,
}

impl Folders {
    pub(super) fn new(dir: &Path, step: u64) -> Folders {
        let name = format!("step-{step:08}");
        let with = |ending: &str| dir.join(format!("{name}{ending}"));
        Folders { dir: dir.to_owned(), complete: with(""), incomplete: with(INCOMPLETE), old: with(".old") }
    }

    fn token(&self) -> PathBuf {
        self.incomplete.join(TOKEN)
    }
}

/// Makes an empty folder with a random token in it, and the folders that lead to it, which somebody
/// may have removed since the last save.
pub(super) fn prepare(folders: &Folders) -> Result<u64, Error> {
    if !folders.dir.is_dir() {
        fs::create_dir_all(&folders.dir)
            .map_err(|error| Error::file(&folders.dir, format!("cannot be made: {error}; choose another place")))?;
        let parent = folders.dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_folder(parent.unwrap_or(Path::new(".")))?;
    }
    for folder in [&folders.complete, &folders.incomplete, &folders.old] {
        if folder.exists() && !is_ours(folder) {
            let reason =
                "was not written by pillion, and this checkpoint would replace it: move it, or choose another place";
            return Err(Error::file(folder, reason));
        }
    }
    // What a save that was interrupted has left.
    remove(&folders.incomplete)?;
    fs::create_dir(&folders.incomplete)
        .map_err(|error| Error::file(&folders.incomplete, format!("cannot be made: {error}")))?;
    // `RandomState` is seeded by the system.
    let token = RandomState::new().hash_one((std::process::id(), SystemTime::now()));
    // It is gone when the folder gets its name, so it need not outlive a crash.
    fs::write(folders.token(), token.to_string())
        .map_err(|error| Error::file(folders.token(), format!("cannot be written: {}", explain(&error))))?;
    Ok(token)
}

/// Whether this rank sees what rank 0 has made.
pub(super) fn check_shared(folders: &Folders, token: u64) -> Result<(), Error> {
    match fs::read_to_string(folders.token()) {
        Ok(found) if found == token.to_string() => Ok(()),
        found => {
            let found = found.map_or_else(|error| error.to_string(), |_| "it has another's token".to_owned());
            let reason = format!(
                "is not what rank 0 has made ({found}): save to a folder that all ranks share, and name it alike on each"
            );
            Err(Error::file(&folders.incomplete, reason))
        }
    }
}

/// Adds the manifest, and gives the folder its name.
pub(super) fn publish(folders: &Folders, manifest: &Manifest) -> Result<(), Error> {
    let token = folders.token();
    fs::remove_file(&token).map_err(|error| Error::file(&token, format!("cannot be removed: {error}")))?;
    write_synced(&folders.incomplete.join(manifest::NAME), manifest.text().as_bytes())?;
    sync_folder(&folders.incomplete)?;
    put_in_place(folders)
}

fn put_in_place(folders: &Folders) -> Result<(), Error> {
    if folders.complete.exists() {
        // A folder cannot be renamed over another that has files. Under the name `.old` it still counts, until the new
        // one does.
        discard(&folders.old)?;
        rename(&folders.complete, &folders.old)?;
    }
    rename(&folders.incomplete, &folders.complete)?;
    sync_folder(&folders.dir)?;
    // The new one is in place: what cannot be removed now only takes room, and counts less than the new one.
    let _ = discard(&folders.old);
    Ok(())
}

/// Which checkpoints stay.
#[derive(Clone, Copy)]
pub(super) struct Keep {
    /// So many of the newest.
    pub(super) newest: usize,
    /// And that of this step.
    pub(super) besides: Option<u64>,
}

/// Of the checkpoints up to that of `step`, which has just been written, removes those that are not
/// kept; returns what could not be done. Later ones were passed over, or left behind: they count for
/// nothing, and are left alone.
pub(super) fn prune(dir: &Path, step: u64, keep: Keep) -> Vec<Error> {
    let folders = match candidates(dir) {
        Ok(folders) => folders.into_iter().filter(|folder| folder.step <= step).collect::<Vec<_>>(),
        Err(error) => return vec![error],
    };
    let sound = |folder: &Candidate| super::open(&folder.path).is_ok();
    let Some(last) = folders.iter().enumerate().filter(|(_, folder)| sound(folder)).nth(keep.newest - 1) else {
        return Vec::new();
    };
    let older = folders[last.0 + 1..].iter().filter(|folder| keep.besides != Some(folder.step));
    let older = older.filter(|folder| is_ours(&folder.path)).filter_map(|folder| discard(&folder.path).err());
    older.chain(remove_discarded(dir).err()).collect()
}

/// A file that shows that all ranks see the same folder.
const TOKEN: &str = "token";
/// What a folder is called while it is written.
const INCOMPLETE: &str = ".incomplete";
/// What a folder is called while it is removed, so that what an interruption leaves is not taken for whole.
const DISCARDED: &str = ".removed";

fn discard(folder: &Path) -> Result<(), Error> {
    if !folder.exists() {
        return Ok(());
    }
    let name = folder.file_name().expect("a checkpoint has a name").to_string_lossy();
    let discarded = folder.with_file_name(format!("{name}{DISCARDED}"));
    remove(&discarded)?;
    rename(folder, &discarded)?;
    remove(&discarded)
}

/// Removes what an interrupted removal has left.
fn remove_discarded(dir: &Path) -> Result<(), Error> {
    endings(dir, &[DISCARDED])?.iter().try_for_each(|folder| remove(folder))
}

/// Folders of `dir` that have a checkpoint's name with one of these endings. None when there is no such folder.
fn endings(dir: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |error: std::io::Error| Error::file(dir, format!("cannot be listed: {error}"));
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let is_ours =
            |name: &str| endings.iter().any(|ending| name.strip_suffix(ending).and_then(parse_name).is_some());
        if path.file_name().and_then(|name| name.to_str()).is_some_and(is_ours) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Whether a folder has only files of the names that a saver gives them. Another program's
/// checkpoint may have the name of one of ours, and is never moved or removed. An empty folder has
/// nothing to lose.
pub fn is_ours(folder: &Path) -> bool {
    let is_ours = |name: &str| {
        let is_shard = name.starts_with("rank-") && name.ends_with(".safetensors");
        is_shard || [manifest::NAME, TOKEN].contains(&name)
    };
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    entries.is_ok_and(|entries| entries.iter().all(|entry| entry.file_name().to_str().is_some_and(is_ours)))
}

/// Removes from `dir` what saves and removals have left that an end of the program interrupted, of
/// any step; returns the folders that are gone. Folders that are not ours ([`is_ours`]) stay. Not
/// while a run saves there.
///
/// # Errors
/// [`Error::File`] when the folder cannot be read, or something in it not be removed.
pub fn remove_left(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut left = endings(dir, &[INCOMPLETE, DISCARDED])?;
    left.retain(|folder| is_ours(folder));
    left.iter().try_for_each(|folder| remove(folder))?;
    Ok(left)
}

/// Gives the checkpoints beside `from` that are newer names that do not count, `step-….aside`: a run that goes on from there will make their steps again, and whoever asks
/// for the newest checkpoint wants this run's. Beside `step-….old` that is also what was to replace it, and is damaged. Returns the new names.
///
/// # Errors
/// [`Error::File`] when `from` has not the name of a complete checkpoint, the folder cannot be read, or one cannot be renamed.
pub fn set_later_aside(from: &Path) -> Result<Vec<PathBuf>, Error> {
    let name = from.file_name().and_then(|name| name.to_str()).and_then(parse_name);
    let (Some(dir), Some((step, replaced))) = (from.parent(), name) else {
        return Err(Error::file(from, "has not the name of a complete checkpoint, such as step-00000100"));
    };
    let is_newer = |folder: &Candidate| folder.step > step || (replaced && folder.step == step && !folder.replaced);
    let mut moved = Vec::new();
    for folder in candidates(dir)?.into_iter().filter(|folder| is_newer(folder) && is_ours(&folder.path)) {
        let name = folder.path.file_name().expect("a candidate has a name").to_string_lossy().into_owned();
        let named = |number: u32| {
            dir.join(if number == 1 { format!("{name}.aside") } else { format!("{name}.aside.{number}") })
        };
        let free = (1..).map(named).find(|path| !path.exists()).expect("numbers do not end");
        rename(&folder.path, &free)?;
        moved.push(free);
    }
    if !moved.is_empty() {
        sync_folder(dir)?;
    }
    Ok(moved)
}

/// Removes a folder if it exists.
pub(super) fn remove(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::file(folder, format!("cannot be removed: {error}")))
        }
        _ => Ok(()),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|error| Error::file(from, format!("cannot be renamed to {}: {error}", to.display())))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| Error::file(path, format!("cannot be written: {}", explain(&error))))
}

/// Brings a folder's entries to the disk.
fn sync_folder(folder: &Path) -> Result<(), Error> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Error::file(folder, format!("cannot be brought to the disk: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_their_step_and_nothing_else_does() {
        for step in [0, 10, 99_999_999, 100_000_000, u64::MAX] {
            let folders = Folders::new(Path::new("dir"), step);
            let parse = |folder: &Path| parse_name(folder.file_name().unwrap().to_str().unwrap());
            assert_eq!(parse(&folders.complete), Some((step, false)));
            assert_eq!(parse(&folders.old), Some((step, true)));
            assert_eq!(parse(&folders.incomplete), None);
        }
        for name in [
            "step-1.removed",
            "step-1.aside",
            "step-",
            "step-.old",
            "step-+1",
            "step-1x",
            "step-18446744073709551616",
            "1",
            "Step-1",
        ] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_to_be_replaced_is_kept_until_the_new_one_is_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::new(dir.path(), 3);
        fs::create_dir(&folders.complete).unwrap();
        fs::write(folders.complete.join(manifest::NAME), "old").unwrap();
        let read = |folder: &Path| fs::read_to_string(folder.join(manifest::NAME)).unwrap();
        put_in_place(&folders).expect_err("there is nothing to put there");
        assert_eq!(read(&folders.old), "old");
        // As after a crash between the renames.
        fs::create_dir(&folders.incomplete).unwrap();
        fs::write(folders.incomplete.join(manifest::NAME), "new").unwrap();
        put_in_place(&folders).unwrap();
        assert_eq!(read(&folders.complete), "new");
        assert!(!folders.old.exists() && !folders.incomplete.exists());
    }
}
