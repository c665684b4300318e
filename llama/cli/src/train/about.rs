//! `run.json`: what a run is, for readers of its metrics. Rank 0 writes it before the first step, and
//! again at every resume.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use pillion_data::runs::ABOUT_BEGIN;
use pillion_runtime::checkpoint;
use serde::{Deserialize, Serialize};

use super::checkpoints;
use super::recipe::Recipe;
use crate::plan::Setup;
use crate::{Error, run_folder};

/// What a run is. A field that a later version adds has a default.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct About {
    /// The version of the program. The file begins with it.
    pub(crate) pillion: String,
    /// What decides the run's numbers.
    pub(crate) recipe: Recipe,
    /// Checksum of the tokens.
    pub(crate) data: String,
    /// None of a run of an earlier version, which did not write it.
    pub(crate) ranks: Option<usize>,
    /// Steps that the run makes at most.
    pub(crate) steps: Option<u64>,
    /// How parameters are kept and moved, by the names of flags.
    pub(crate) placement: BTreeMap<String, String>,
}

/// The flags of how parameters are kept and moved, with their values in a run.
pub(super) fn placement(setup: &Setup<'_>, on_gpus: bool) -> BTreeMap<String, String> {
    let policy = &setup.policy;
    let pairs = [
        ("shard", policy.sharded.to_string()),
        ("mesh", format!("replicate={},shard={}", setup.mesh.replicate, setup.mesh.shard)),
        ("gather", policy.gather.to_string()),
        ("bucket", policy.bucket.to_string()),
        ("prefetch", policy.prefetch.to_string()),
        ("slots", policy.slots.to_string()),
        ("no-overlap", (!policy.overlap).to_string()),
        ("recompute", setup.recompute.to_string()),
        ("device", if on_gpus { "cuda" } else { "cpu" }.to_owned()),
    ];
    pairs.into_iter().map(|(flag, value)| (flag.to_owned(), value)).collect()
}

impl About {
    /// Writes it into the run's folder, in place of an earlier one.
    pub(super) fn write(&self, out: &Path) -> Result<(), Error> {
        let (path, unfinished) = (run_folder::about(out), run_folder::unfinished(out, "run"));
        let mut text = serde_json::to_string(self).expect("plain values");
        debug_assert!(text.starts_with(ABOUT_BEGIN));
        text.push('\n');
        let write = || {
            let mut file = File::create(&unfinished)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)
        };
        write().map_err(|error| Error::file(&path, error))
    }

    /// Reads that of the run in `folder`; of a run of an earlier version, what its newest checkpoint
    /// knows. None where neither is there.
    ///
    /// # Errors
    /// [`Error::File`] when the file is damaged.
    pub(crate) fn read(folder: &Path) -> Result<Option<About>, Error> {
        let path = run_folder::about(folder);
        match fs::read(&path) {
            Ok(text) => {
                let about: About = serde_json::from_slice(&text).map_err(|error| Error::file(&path, damaged(error)))?;
                about.recipe.check_shape().map_err(|error| Error::file(&path, damaged(error)))?;
                Ok(Some(about))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(About::of_checkpoint(folder)),
            Err(error) => Err(Error::file(&path, error)),
        }
    }

    fn of_checkpoint(folder: &Path) -> Option<About> {
        let newest = checkpoint::folders(&run_folder::checkpoints(folder)).ok()?.into_iter().next()?;
        let saved = checkpoints::progress(&checkpoint::open(&newest).ok()?).ok()?;
        let (recipe, data) = (saved.recipe, saved.data);
        Some(About { pillion: String::new(), recipe, data, ranks: None, steps: None, placement: BTreeMap::new() })
    }
}

fn damaged(error: impl std::fmt::Display) -> String {
    format!("this is not what a run writes ({error}): remove the file to go on without what it says of the run")
}
