//! What an unfinished token folder knows of itself: what was asked for, and how far it has come.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::index::{INDEX, Origin};
use super::shard::Written;
use crate::documents::{Input, Position, Reading};
use crate::durable;
use crate::error::{Error, Result};

/// Held by the program that writes in the folder.
const LOCK: &str = ".tokenize.lock";
/// What was asked for; written once.
pub(super) const PLAN: &str = "plan.json";
/// How far it has come; written again and again.
const PROGRESS: &str = "progress.json";

/// All that decides which tokens are written where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) version: u32,
    /// xxh3 of the tokenizer's file and of its chat template.
    pub(super) tokenizer: String,
    pub(super) chat_template: Option<String>,
    pub(super) reading: Reading,
    /// Documents whose hash is below this are for validation.
    pub(super) validation_below: u64,
    pub(super) separator: Option<u32>,
    pub(super) shard_tokens: u64,
    pub(super) inputs: Vec<Input>,
}

impl Plan {
    fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain values")
    }

    /// In hexadecimal.
    pub(super) fn hash(&self) -> String {
        format!("{:016x}", xxh3_64(self.text().as_bytes()))
    }

    /// What of this plan is another than in an earlier one.
    fn difference(&self, earlier: &Plan) -> String {
        let settings: [(&str, bool); 7] = [
            ("the version of this program", self.version == earlier.version),
            ("--tokenizer", self.tokenizer == earlier.tokenizer),
            ("the chat template", self.chat_template == earlier.chat_template),
            ("--field or --lines", self.reading == earlier.reading),
            ("--validation", self.validation_below == earlier.validation_below),
            ("--append", self.separator == earlier.separator),
            ("--shard-tokens", self.shard_tokens == earlier.shard_tokens),
        ];
        if let Some((name, _)) = settings.iter().find(|(_, same)| !same) {
            return format!("{name} is another");
        }
        let pairs = self.inputs.iter().zip(&earlier.inputs);
        match pairs.into_iter().find(|(now, then)| now != then) {
            Some((now, then)) if now.path == then.path => format!("{} has changed", now.path.display()),
            Some((now, then)) => format!("{} is read where {} was", now.path.display(), then.path.display()),
            None => format!("{} files are read where {} were", self.inputs.len(), earlier.inputs.len()),
        }
    }
}

/// How far a folder has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) position: Position,
    pub(super) origin: Origin,
    /// Train, validation.
    pub(super) written: [Written; 2],
}

/// A folder to write in, which no other program writes in.
pub(super) struct Place {
    pub(super) folder: PathBuf,
    _lock: File,
}

/// What a folder is when it is opened to write.
pub(super) enum Found {
    /// Complete, by the same plan.
    Complete,
    /// To be written from here on.
    Unfinished(Progress),
}

impl Place {
    /// Makes the folder if need be, and locks it.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::writing(folder))?;
        let path = folder.join(LOCK);
        let lock = File::create(&path).map_err(Error::writing(&path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                let problem = "another pillion tokenize writes here; wait for its end, or give another --out";
                Err(Error::bad(folder, problem))
            }
            Err(TryLockError::Error(source)) => Err(Error::Write { path, source }),
        }
    }

    /// Compares what is there with a plan.
    ///
    /// # Errors
    /// [`Error::Bad`] if the folder holds something else.
    pub(super) fn find(&self, plan: &Plan, restart: bool) -> Result<Found> {
        if restart {
            self.check_ours()?;
            self.clear()?;
        }
        if self.folder.join(INDEX).exists() {
            let index = super::Index::read(&self.folder)?;
            if index.made_by == plan.hash() {
                // An interruption may have left them.
                self.remove_progress()?;
                return Ok(Found::Complete);
            }
            let problem = "holds tokens of other files or settings; give another --out, or --restart to replace them";
            return Err(Error::bad(&self.folder, problem));
        }
        let Some(earlier) = self.read::<Plan>(PLAN)? else {
            if !restart {
                self.check_empty()?;
            }
            self.write(PROGRESS, &Progress::default())?;
            durable::write(&self.folder.join(PLAN), plan.text().as_bytes())?;
            return Ok(Found::Unfinished(Progress::default()));
        };
        if earlier != *plan {
            let problem = format!(
                "holds the beginning of something else: {}; give the command that began it, or --restart to begin anew",
                plan.difference(&earlier)
            );
            return Err(Error::bad(&self.folder, problem));
        }
        Ok(Found::Unfinished(self.read(PROGRESS)?.unwrap_or_default()))
    }

    pub(super) fn save(&self, progress: &Progress) -> Result<()> {
        self.write(PROGRESS, progress)
    }

    pub(super) fn remove_progress(&self) -> Result<()> {
        [PROGRESS, PLAN].iter().try_for_each(|name| remove(&self.folder.join(name)))
    }

    fn check_empty(&self) -> Result<()> {
        for name in self.names()? {
            if !is_ours(&name) {
                let problem =
                    format!("holds {name}, which is not of pillion tokenize; give an empty folder with --out");
                return Err(Error::bad(&self.folder, problem));
            }
        }
        Ok(())
    }

    /// Checks that earlier calls wrote in the folder, or nobody did.
    ///
    /// # Errors
    /// [`Error::Bad`] for the folder of a model, say, whose files would be replaced.
    fn check_ours(&self) -> Result<()> {
        // An index of another program is refused when it is to be removed.
        let has_plan = matches!(self.read::<Plan>(PLAN), Ok(Some(_)));
        let is_ours = has_plan || self.names()?.iter().any(|name| name == INDEX || is_shard(name));
        if is_ours { Ok(()) } else { self.check_empty() }
    }

    /// Removes what earlier runs wrote, the index first, but no copies of a tokenizer's files, which
    /// may be a model's own.
    fn clear(&self) -> Result<()> {
        let names = self.names()?;
        super::index::remove(&self.folder)?;
        for name in names.iter().filter(|name| is_shard(name)) {
            remove(&self.folder.join(name))?;
        }
        self.remove_progress()
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(Error::reading(&self.folder))? {
            names.push(entry.map_err(Error::reading(&self.folder))?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<Option<T>> {
        let path = self.folder.join(name);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(Error::reading(&path))?;
        let value = serde_json::from_slice(&text);
        value.map(Some).map_err(|error| Error::bad(&path, format!("damaged: {error}; begin anew with --restart")))
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value).expect("plain values");
        durable::write(&self.folder.join(name), text.as_bytes())
    }
}

/// Whether a name is one that an interruption may leave before there is a plan.
fn is_ours(name: &str) -> bool {
    name.starts_with('.')
        || name.strip_suffix(".incomplete").unwrap_or(name) == PROGRESS
        || name == format!("{PLAN}.incomplete")
}

fn is_shard(name: &str) -> bool {
    let Some((stem, kind)) = name.rsplit_once('.') else { return false };
    let number = stem.strip_prefix("train-").or_else(|| stem.strip_prefix("validation-"));
    let is_number = number.is_some_and(|number| number.len() >= 5 && number.bytes().all(|byte| byte.is_ascii_digit()));
    is_number && ["tokens", "documents", "mask"].contains(&kind)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}
