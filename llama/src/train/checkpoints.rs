//! What a run keeps besides its parameters, and how it goes on from there.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use pillion_abs::State as ControllerState;
use pillion_runtime::checkpoint::{self, Checkpoint};
use serde::{Deserialize, Serialize};

use super::recipe::Recipe;
use crate::Error;
use crate::controller::flag;
use crate::settings::TrainArgs;

/// The trainer's part of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What decides the run's numbers; must be repeated.
    pub(crate) recipe: Recipe,
    /// Checksum of the tokens.
    pub(crate) data: String,
    /// Steps made.
    pub(crate) step: u64,
    /// Samples seen.
    pub(crate) samples: u64,
    /// The controller's.
    pub(crate) controller: ControllerState,
}

/// Where a run's checkpoints are.
pub(crate) fn folder(out: &Path) -> PathBuf {
    out.join("checkpoints")
}

/// Finds what `--resume` asks for; also what to print of the search. Only rank 0 looks.
pub(crate) fn find(settings: &TrainArgs) -> Result<(Option<PathBuf>, Vec<String>), Error> {
    let Some(wanted) = &settings.resume else { return Ok((None, Vec::new())) };
    if wanted.as_os_str() != "auto" {
        let found = if wanted.join("manifest.json").exists() { wanted.clone() } else { newest(wanted)?.0 };
        checkpoint::open(&found)?.verify()?;
        return Ok((Some(found), Vec::new()));
    }
    let newest = checkpoint::newest(&folder(&settings.out))?;
    let mut said: Vec<String> = newest.skipped.iter().map(|why| format!("passed over a checkpoint: {why}")).collect();
    match newest.checkpoint {
        Some(found) => Ok((Some(found.path), said)),
        None if newest.skipped.is_empty() => {
            said.push(format!("no checkpoint in {}: starting from the beginning", settings.out.display()));
            Ok((None, said))
        }
        // Starting afresh would put a run aside that can perhaps be saved.
        None => Err(Error::file(
            folder(&settings.out),
            format!(
                "no checkpoint in it is whole ({}); name another with --resume PATH, or leave --resume out to start afresh",
                said.join("; ")
            ),
        )),
    }
}

/// The newest whole checkpoint of a run, or in a folder of checkpoints, and its trainer's part.
pub(crate) fn newest(path: &Path) -> Result<(PathBuf, Progress), Error> {
    let candidates = [path.to_owned(), folder(path)];
    if candidates[0].join("manifest.json").exists() {
        let checkpoint = checkpoint::open(path)?;
        checkpoint.verify()?;
        return Ok((path.to_owned(), progress(&checkpoint)?));
    }
    for folder in &candidates {
        let newest = checkpoint::newest(folder)?;
        newest.skipped.iter().for_each(|why| crate::complain(format_args!("passed over a checkpoint: {why}")));
        if let Some(checkpoint) = newest.checkpoint {
            return Ok((checkpoint.path.clone(), progress(&checkpoint)?));
        }
    }
    Err(Error::file(path, "there is no whole checkpoint here: give the folder of a run, or of a checkpoint"))
}

/// A checkpoint's trainer's part.
pub(crate) fn progress(checkpoint: &Checkpoint) -> Result<Progress, Error> {
    serde_json::from_value(checkpoint.extra().clone()).map_err(|error| {
        Error::file(
            &checkpoint.path,
            format!("its manifest was not written by `pillion train` of this version: {error}"),
        )
    })
}

/// Checks that a run goes on with the settings it began with.
pub(crate) fn same_recipe(path: &Path, theirs: &Progress, ours: &Recipe) -> Result<(), Error> {
    match ours.difference(&theirs.recipe) {
        None => Ok(()),
        Some((key, ours, theirs)) => Err(Error::Setting(format!(
            "the checkpoint {} was made with {key} = {theirs}, but this run has {ours}: give the same --{}, or start \
             afresh without --resume",
            path.display(),
            flag(&key)
        ))),
    }
}

/// Checks that a run goes on with the text it began with.
pub(crate) fn same_data(path: &Path, theirs: &Progress, data: &str) -> Result<(), Error> {
    if theirs.data == data {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "the checkpoint {} was made on other text (checksum {}, here {data}): give the same --data, or start afresh without --resume",
        path.display(),
        theirs.data
    )))
}

/// Where a run's token files are.
fn tokens(out: &Path) -> PathBuf {
    out.join("tokens")
}

/// Claims a run's folder for this run until the file is dropped: two at once would mix what they write. The file lies beside the
/// folder, which may be moved aside.
pub(crate) fn lock(out: &Path) -> Result<File, Error> {
    let out = out.canonicalize().map_err(|error| cannot_write(out, error))?;
    let Some(name) = out.file_name() else {
        return Err(Error::file(&out, "is no folder for a run: choose one with --out DIR"));
    };
    let path = out.with_file_name(format!(".{}.lock", name.to_string_lossy()));
    let file = File::create(&path).map_err(|error| cannot_write(&out, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::file(
            &out,
            "another run is writing here: wait for its end, or choose another folder with --out DIR",
        )),
        Err(TryLockError::Error(error)) => Err(cannot_write(&out, error)),
    }
}

/// Makes the folder of a run's token files, and returns it.
pub(crate) fn make_tokens_folder(out: &Path) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(tokens(out)).map_err(|error| cannot_write(out, error))?;
    Ok(tokens(out))
}

fn cannot_write(out: &Path, error: std::io::Error) -> Error {
    Error::file(out, format!("{error}: choose a folder that can be written, with --out DIR"))
}

/// Makes the run's folder; an earlier run in it is moved aside, but for its tokens, unless the checkpoint to go on from is that
/// run's. Returns where it went.
pub(crate) fn prepare_folder(out: &Path, resume: Option<&Path>) -> Result<Option<PathBuf>, Error> {
    let fail = |error| cannot_write(out, error);
    let goes_on = resume.is_some_and(|resume| is_of(out, resume));
    let mut moved = None;
    let has_run = out.join("metrics.jsonl").exists() || !checkpoint::list(&folder(out))?.is_empty();
    if !goes_on && has_run {
        // Without the link or the dots that `out` may be.
        let has_name = out.file_name().is_some() && !out.is_symlink();
        let out = if has_name { out.to_owned() } else { out.canonicalize().map_err(fail)? };
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let free = (1..).map(|number| out.with_file_name(format!("{name}.{number}"))).find(|path| !path.exists());
        let aside = free.expect("numbers do not end");
        std::fs::rename(&out, &aside).map_err(fail)?;
        std::fs::create_dir_all(&out).map_err(fail)?;
        std::fs::rename(tokens(&aside), tokens(&out)).map_err(fail)?;
        moved = Some(aside);
    }
    std::fs::create_dir_all(folder(out)).map_err(fail)?;
    Ok(moved)
}

/// Whether a checkpoint is of the run in `out`.
fn is_of(out: &Path, checkpoint: &Path) -> bool {
    let canonical = |path: &Path| path.canonicalize().ok();
    let parent = canonical(checkpoint).and_then(|path| path.parent().map(Path::to_owned));
    parent.is_some() && parent == canonical(&folder(out))
}

/// Makes order in the folder of a run that holds its lock, once it has begun or every rank has loaded what it goes on from: what interrupted saves have left is removed; checkpoints of
/// later steps, which were passed over or are not wanted any more, get other names.
pub(crate) fn tidy(out: &Path, resume: Option<&Path>) -> Result<(), Error> {
    for gone in checkpoint::remove_left(&folder(out))? {
        crate::print(format_args!("removed {}, which an interrupted run has left", gone.display()));
    }
    let Some(resume) = resume.filter(|resume| is_of(out, resume)) else { return Ok(()) };
    for aside in checkpoint::set_later_aside(resume)? {
        crate::print(format_args!(
            "a checkpoint of a later step, which this run will make again, is now {}",
            aside.display()
        ));
    }
    Ok(())
}
