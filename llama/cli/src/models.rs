//! Models in checkpoints: those that runs trained, and those that were imported.

use std::fs;
use std::path::{Path, PathBuf};

use pillion_collectives::Communicator;
use pillion_data::{synthetic, tokenizer};
use pillion_llama::config::Config;
use pillion_llama::huggingface::{COMPANIONS, CONFIG, Imported};
use pillion_runtime::checkpoint::{self, Checkpoint, Whole};

use crate::train::checkpoints::{self, Candidates, Progress};
use crate::{Error, run_folder};

/// Where a checkpoint's weights are from.
pub(crate) enum Origin {
    /// A run.
    Run(Box<Progress>),
    /// Elsewhere.
    Imported(Imported),
}

impl Origin {
    /// # Errors
    /// When the checkpoint's manifest says neither.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Origin, Error> {
        match Imported::of(checkpoint)? {
            Some(imported) => Ok(Origin::Imported(imported)),
            None => Ok(Origin::Run(Box::new(checkpoints::progress(checkpoint)?))),
        }
    }

    /// The model's shape.
    pub(crate) fn model(&self) -> &Config {
        match self {
            Origin::Run(progress) => &progress.recipe.model,
            Origin::Imported(imported) => &imported.model,
        }
    }

    /// Whether it has learned bytes of text.
    pub(crate) fn has_bytes(&self) -> bool {
        let Origin::Run(progress) = self else { return false };
        let is_random = progress.data_path.as_deref() == Some(Path::new(synthetic::NAME));
        progress.tokens.is_empty() && !is_random && progress.recipe.model.vocab_size >= tokenizer::VOCAB
    }

    /// Tokens of the samples that it was trained on; of an imported model nothing is known.
    pub(crate) fn seq(&self) -> Option<usize> {
        match self {
            Origin::Run(progress) => Some(progress.recipe.seq),
            Origin::Imported(_) => None,
        }
    }

    /// Whether it was trained with attention within documents; of an imported model nothing is
    /// known.
    pub(crate) fn document_attention(&self) -> bool {
        matches!(self, Origin::Run(progress) if progress.recipe.document_attention)
    }
}

/// Tokens of a sample, or of a text, unless the user says how many: as many as samples of the run's
/// training had. An imported model takes as many as its configuration says, and 2048 at most.
///
/// # Errors
/// [`Error::File`] when the configuration cannot be read.
pub(crate) fn context(checkpoint: &Path, origin: &Origin) -> Result<usize, Error> {
    const MOST: usize = 2048;
    if let Some(seq) = origin.seq() {
        return Ok(seq);
    }
    let files = companions(checkpoint)?;
    let config = files.iter().find(|(name, _)| name == CONFIG);
    let config = config.and_then(|(_, text)| serde_json::from_slice::<serde_json::Value>(text).ok());
    let most = config.and_then(|config| config["max_position_embeddings"].as_u64()).filter(|&most| most > 0);
    Ok(most.map_or(MOST, |most| MOST.min(most as usize)))
}

/// The newest checkpoint that a path stands for, verified by all ranks. Collective.
///
/// # Errors
/// When there is none that is whole.
pub(crate) fn newest(path: &Path, communicator: &Communicator) -> Result<(Whole, Origin), Error> {
    let mut candidates = Candidates::at(path)?;
    for path in candidates.paths.clone() {
        let checkpoint = checkpoint::open(&path)?;
        match checkpoint.verify_together(communicator) {
            Ok(whole) => {
                candidates.passed_over.iter().for_each(crate::complain);
                return Ok((whole, Origin::of(&checkpoint)?));
            }
            Err(error @ pillion_runtime::Error::File { .. }) if !candidates.is_named => candidates.pass_over(&error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(candidates.exhausted())
}

/// The newest checkpoint that a path stands for, whose files nobody has read yet.
///
/// # Errors
/// When there is none with a sound manifest.
pub(crate) fn first(path: &Path) -> Result<Checkpoint, Error> {
    let found = Candidates::at(path)?;
    let path = found.paths.first().expect("there is one, or an error");
    Ok(checkpoint::open(path)?)
}

/// The name of a tokenizer's file.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// A name and a content.
pub(crate) type Companion = (String, Vec<u8>);

/// The files that go with the model of a checkpoint, which the run's folder has.
///
/// # Errors
/// [`Error::File`] when one cannot be read.
pub(crate) fn companions(checkpoint: &Path) -> Result<Vec<Companion>, Error> {
    match run_folder::of_checkpoint(checkpoint) {
        Some(run) => files_in(&run_folder::huggingface(&run)),
        None => Ok(Vec::new()),
    }
}

/// The files of a folder that go with a model.
///
/// # Errors
/// [`Error::File`] when one cannot be read.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<Companion>, Error> {
    let names = [CONFIG].into_iter().chain(COMPANIONS);
    let found = names.map(|name| (name, folder.join(name))).filter(|(_, path)| path.is_file());
    let read = |(name, path): (&str, PathBuf)| match fs::read(&path) {
        Ok(content) => Ok((name.to_owned(), content)),
        Err(error) => Err(Error::file(path, format!("cannot be read: {error}"))),
    };
    found.map(read).collect()
}

/// Writes files that go with a model into the folder of the run in `out`. What is there under their
/// names is replaced.
///
/// # Errors
/// [`Error::File`] when one cannot be written.
pub(crate) fn keep(files: &[Companion], out: &Path) -> Result<(), Error> {
    if files.is_empty() {
        return Ok(());
    }
    let folder = run_folder::huggingface(out);
    let cannot = |path: &Path, error: &std::io::Error| {
        Error::file(path, format!("cannot be written: {}", pillion_collectives::limits::explain(error)))
    };
    fs::create_dir_all(&folder).map_err(|error| cannot(&folder, &error))?;
    for (name, content) in files {
        let (to, unfinished) = (folder.join(name), run_folder::unfinished(out, name));
        let written = fs::write(&unfinished, content).and_then(|()| fs::rename(&unfinished, &to));
        written.map_err(|error| cannot(&to, &error))?;
    }
    Ok(())
}
