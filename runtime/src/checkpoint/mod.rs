//! Checkpoints: folders that hold a run's whole state, and resume it bit for bit at any number of ranks.
//!
//! ```text
//! DIR/step-00000010/manifest.json                     what it is, and every file's size and checksum
//!                   rank-00000-of-00002.safetensors   per unit, f32 [shard]: <unit>.master, and
//!                   <unit>.m and <unit>.v of AdamW, or the states of another optimizer
//!                   rank-00001-of-00002.safetensors
//! ```
//!
//! A [`Saver`] writes into `step-00000010.incomplete` and renames it once every file, the manifest last, is on disk, so a
//! folder without that ending is whole however the run ended. One that is replaced is `step-00000010.old` for the
//! moment between two renames; [`list`] and [`newest`] know it.
//!
//! A checkpoint of weights alone ([`WeightsWriter`]) has no states, and its elements may be bf16 or
//! f16. It is where a model from elsewhere begins.
//!
//! Nothing is believed: the manifest carries a checksum of itself and of every file. To resume, rank 0 calls [`newest`]
//! and tells the others the path, every rank calls [`open`], and all together call [`Checkpoint::load`].

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod load;
mod manifest;
mod save;
mod saver;
mod shard;
mod staging;
mod weights;
mod writer;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use pillion_collectives::Communicator;
use serde_json::Value;

pub use load::{Tensors, Whole};
pub use manifest::{FileEntry, Manifest, Stored};
pub use save::{is_ours, remove_left, save, set_later_aside};
pub use saver::{Saved, Saver};
pub use staging::Staging;
pub use weights::WeightsWriter;

use crate::{Error, Policy};

/// A checkpoint whose manifest has been read.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// What [`newest`] found.
#[derive(Debug)]
pub struct Newest {
    /// The newest checkpoint that is whole.
    pub checkpoint: Option<Checkpoint>,
    /// Why newer ones were passed over, newest first; each names its file.
    pub skipped: Vec<Error>,
}

/// The complete checkpoints in `dir`, newest first: those with a sound manifest. None when there is no such folder.
///
/// # Errors
/// [`Error::File`] when the folder cannot be read.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut folders = folders(dir)?;
    folders.retain(|folder| open(folder).is_ok());
    Ok(folders)
}

/// The folders in `dir` that are named as complete checkpoints, newest first, whether they are or not. None when there is no such folder.
///
/// # Errors
/// [`Error::File`] when the folder cannot be read.
pub fn folders(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(candidates(dir)?.into_iter().map(|candidate| candidate.path).collect())
}

/// Whether a path has the name of a complete checkpoint.
pub fn is_named_as_one(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).and_then(save::parse_name).is_some()
}

/// The newest checkpoint in `dir` that [`Checkpoint::verify`] finds whole; reads all of it. Not collective: rank 0
/// chooses.
///
/// # Errors
/// [`Error::File`] when the folder cannot be read.
pub fn newest(dir: &Path) -> Result<Newest, Error> {
    let mut skipped = Vec::new();
    for path in folders(dir)? {
        match open(&path).and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint)) {
            Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
            Err(error) => skipped.push(error),
        }
    }
    Ok(Newest { checkpoint: None, skipped })
}

/// Reads and checks the manifest of the checkpoint at `path`; not collective.
///
/// # Errors
/// [`Error::File`] that names the manifest, what is wrong with it, and the remedy.
pub fn open(path: &Path) -> Result<Checkpoint, Error> {
    Ok(Checkpoint { path: path.to_owned(), manifest: Manifest::read(&path.join(manifest::NAME))? })
}

impl Checkpoint {
    /// What the caller of [`save`] added.
    pub fn extra(&self) -> &Value {
        &self.manifest.extra
    }

    /// Compares every file's size and checksum with the manifest's; reads all of them.
    ///
    /// # Errors
    /// [`Error::File`] that names the first file that differs.
    pub fn verify(&self) -> Result<(), Error> {
        (0..self.manifest.world).try_for_each(|rank| self.verify_file(rank))
    }

    /// In which of what a checkpoint keeps of it, the type of the weights and the limit of the gradient's norm, `policy` differs from the policy of the saved run, in words: such a
    /// run is not the one that goes on. The mesh, when gradients are reduced and in which type decide about roundings, and are the caller's to compare; how weights are gathered, and
    /// how far ahead, never matters.
    pub fn differences(&self, policy: &Policy) -> Vec<String> {
        let mut differences = Vec::new();
        if self.manifest.weights != policy.weights.name() {
            differences.push(format!("weights were {} and are {}", self.manifest.weights, policy.weights));
        }
        if self.manifest.clip != policy.clip {
            let limit = |clip: Option<f64>| clip.map_or("none".to_owned(), |limit| limit.to_string());
            let (was, is) = (limit(self.manifest.clip), limit(policy.clip));
            differences.push(format!("the largest gradient norm was {was} and is {is}"));
        }
        differences
    }

    fn verify_file(&self, rank: usize) -> Result<(), Error> {
        let entry = &self.manifest.files[rank];
        let path = self.path.join(&entry.name);
        let found = shard::digest(&path)?;
        shard::check_size(&path, found.bytes, entry.bytes)?;
        if found.hex() != entry.xxh3 {
            return Err(Error::file(path, format!("is damaged: its checksum is not the manifest's; {USE_ANOTHER}")));
        }
        Ok(())
    }
}

const USE_ANOTHER: &str = "copy it again if this is a copy, or use an older checkpoint";

/// Folders of `dir` that are named as complete checkpoints, newest first; of one step, what replaced before what was
/// replaced.
fn candidates(dir: &Path) -> Result<Vec<Candidate>, Error> {
    let unreadable = |error: std::io::Error| Error::file(dir, format!("cannot be listed: {error}"));
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(unreadable)?;
        if let Some((step, replaced)) = entry.file_name().to_str().and_then(save::parse_name) {
            found.push(Candidate { step, replaced, path: entry.path() });
        }
    }
    found.sort_by_key(|candidate| (std::cmp::Reverse(candidate.step), candidate.replaced));
    Ok(found)
}

/// A folder that is named as a complete checkpoint.
struct Candidate {
    step: u64,
    /// Whether another was to replace it.
    replaced: bool,
    path: PathBuf,
}

/// Ends a part of a collective call that any rank may fail alone: returns `mine` if every rank has succeeded. Otherwise
/// those that failed return their own error, and the others one that says which rank failed first, and why. The
/// communicator stays usable.
fn agree<T>(communicator: &Communicator, path: &Path, mine: Result<T, Error>) -> Result<T, Error> {
    // A rank's disk may take longer than any operation should.
    communicator.patient_barrier()?;
    let failed = communicator.all_gather_scalars(&[u64::from(mine.is_err())])?;
    let Some(rank) = failed.iter().position(|flag| flag[0] != 0) else { return mine };
    let words = mine.as_ref().err().map(Error::to_string).unwrap_or_default();
    let words = communicator.broadcast_bytes(rank, words.as_bytes())?;
    mine.and_then(|_| Err(Error::file(path, format!("rank {rank} failed: {}", String::from_utf8_lossy(&words)))))
}
