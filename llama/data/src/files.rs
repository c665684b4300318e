//! Files that stay as they were: kept open, and watched for changes.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// Files that are open at most: a program may have 1024 by default.
const MOST: usize = 64;

/// The files that were read last, open.
#[derive(Debug, Default)]
pub(crate) struct Files(Mutex<VecDeque<(PathBuf, Arc<File>)>>);

impl Files {
    /// A file, which may be open already.
    pub(crate) fn open(&self, path: &Path) -> Result<Arc<File>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = open.iter().position(|(other, _)| other == path) {
            let entry = open.remove(at).expect("found there");
            open.push_back(entry.clone());
            return Ok(entry.1);
        }
        let file = Arc::new(File::open(path).map_err(Error::reading(path))?);
        if open.len() >= MOST {
            open.pop_front();
        }
        open.push_back((path.to_owned(), file.clone()));
        Ok(file)
    }
}

/// The length and the time of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::reading(path))?;
        if !metadata.is_file() {
            return Err(Error::bad(path, "no file"));
        }
        Ok(Self { path: path.to_owned(), bytes: metadata.len(), modified: metadata.modified().ok() })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// # Errors
    /// [`Error::Bad`] if the file is another than it was; [`Error::Read`] if it is gone.
    pub(crate) fn check(&self) -> Result<()> {
        if Self::of(&self.path)? == *self {
            return Ok(());
        }
        Err(Error::bad(&self.path, "changed since it was opened; bring it back as it was, or start the run afresh"))
    }
}
