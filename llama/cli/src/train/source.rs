//! Which tokens a run learns from: text prepared now, or, where a run goes on, the token file that
//! it began with.

use std::path::{Path, PathBuf};

use pillion_data::{Prepared, Summary, TokenFile, synthetic, tokenizer};

use super::checkpoints::Progress;
use super::recipe::Recipe;
use crate::settings::TrainArgs;
use crate::{Error, run_folder};

/// The tokens of a run.
pub(super) struct Source {
    pub(super) tokens: TokenFile,
    /// What `--data` said, absolute; none for the default text.
    pub(super) data: Option<PathBuf>,
    /// What to print of it.
    pub(super) said: Vec<String>,
}

/// A token file's fingerprint, as checkpoints keep it.
pub(super) fn fingerprint(tokens: &TokenFile) -> String {
    format!("{:016x}", tokens.fingerprint())
}

/// Whether random tokens stand for text.
pub(super) fn is_synthetic(tokens: &TokenFile) -> bool {
    tokens.origin().files == 0
}

/// Checks that the model and the trigram model of text know every token.
///
/// # Errors
/// Names the file.
pub(super) fn check_vocabulary(tokens: &TokenFile, recipe: &Recipe) -> Result<(), Error> {
    let most = if is_synthetic(tokens) { recipe.model.vocab_size } else { tokenizer::VOCAB };
    if tokens.vocab() <= most {
        return Ok(());
    }
    let found = tokens.vocab();
    let reason = format!("has a vocabulary of {found} tokens instead of {most}: remove it, and it is made again");
    Err(Error::file(tokens.path(), reason))
}

/// Of a run that begins in the folder `out`.
///
/// # Errors
/// When there is no text, or the model knows too few tokens for it.
pub(super) fn of_new(data: Option<&Path>, recipe: &Recipe, out: &Path) -> Result<Source, Error> {
    let (cache, vocab) = (run_folder::tokens(out), recipe.model.vocab_size);
    let is_synthetic = data == Some(Path::new(synthetic::NAME));
    if is_synthetic && vocab > synthetic::LARGEST_VOCAB {
        let most = synthetic::LARGEST_VOCAB;
        return Err(Error::Setting(format!(
            "synthetic data has at most {most} different tokens, but the model knows {vocab}: choose another --model"
        )));
    }
    if !is_synthetic && vocab < tokenizer::VOCAB {
        let needed = tokenizer::VOCAB;
        return Err(Error::Setting(format!(
            "the model knows {vocab} tokens, but the text needs {needed}: choose another --model"
        )));
    }
    let Prepared { tokens, summary, .. } = match is_synthetic {
        true => pillion_data::prepare_synthetic(vocab, &cache)?,
        false => pillion_data::prepare(data, &cache)?,
    };
    Ok(Source { tokens, data: absolute(data), said: vec![summary.to_string()] })
}

/// Of a run that goes on in the folder `out`, from `checkpoint`. The run's own token file serves
/// it, whatever has become of the text since: a text that grew, moved or is gone stops no resume.
///
/// # Errors
/// [`Error::Setting`] when `--data` names another text, or the token file is gone and the text is
/// not what it was.
pub(super) fn of_resumed(
    settings: &TrainArgs,
    recipe: &Recipe,
    out: &Path,
    checkpoint: &Path,
    saved: &Progress,
) -> Result<Source, Error> {
    let wanted = settings.data.as_deref();
    let own = own(out, checkpoint, saved)?;
    let is_same = absolute(wanted) == saved.data_path;
    let own = match own {
        Some(own) if wanted.is_none() => return Ok(own_source(own, saved, Vec::new())),
        own => own,
    };
    let data = wanted.map(Path::to_owned).or(saved.data_path.clone());
    let found = match of_new(data.as_deref(), recipe, out) {
        Ok(found) if fingerprint(&found.tokens) == saved.data => return Ok(found),
        found => found,
    };
    let text = data.as_ref().map_or("the default text".to_owned(), |data| data.display().to_string());
    match (own, found) {
        (Some(own), found) if is_same => {
            let what = match found {
                Ok(found) => format!("has changed (checksum {}, was {})", fingerprint(&found.tokens), saved.data),
                Err(error) => format!("cannot be read any more ({error})"),
            };
            let said = format!("{text} {what}: going on with the tokens that the run began with");
            Ok(own_source(own, saved, vec![said]))
        }
        (_, Err(error)) => Err(error),
        (own, Ok(found)) => {
            let remedy = match own {
                Some(_) => "leave --data out to go on with the run's own tokens",
                None => "the token file that the run began with is gone, so bring the text back as it was",
            };
            Err(Error::Setting(format!(
                "the checkpoint {} was made on other text (checksum {}, but {text} has {}): {remedy}, or start afresh \
                 without --resume",
                checkpoint.display(),
                saved.data,
                fingerprint(&found.tokens),
            )))
        }
    }
}

fn own_source(own: TokenFile, saved: &Progress, mut said: Vec<String>) -> Source {
    let description = match is_synthetic(&own) {
        true => "the random tokens that the run began with",
        false => "the text that the run began with",
    };
    said.push(Summary::of(&own, description.to_owned()).to_string());
    Source { tokens: own, data: saved.data_path.clone(), said }
}

/// The token file that a run began with, which lies in its folder; copied into `out` where that is
/// another one.
fn own(out: &Path, checkpoint: &Path, saved: &Progress) -> Result<Option<TokenFile>, Error> {
    // A fingerprint is a hexadecimal number; no token file has any other.
    let Ok(fingerprint) = u64::from_str_radix(&saved.data, 16) else { return Ok(None) };
    let here = run_folder::tokens(out);
    let run = checkpoint.canonicalize().ok().and_then(|path| Some(path.parent()?.parent()?.to_owned()));
    // A run that was set aside has left its tokens a folder above.
    let folders = run.iter().flat_map(|run| [Some(run.as_path()), run.parent()]).flatten().map(run_folder::tokens);
    if let Some(found) = pillion_data::find(fingerprint, std::slice::from_ref(&here))? {
        return Ok(Some(found));
    }
    let Some(elsewhere) = pillion_data::find(fingerprint, &folders.collect::<Vec<_>>())? else { return Ok(None) };
    Ok(Some(elsewhere.copy_into(&here)?))
}

/// A path that means the same from everywhere; the name of the random tokens stays.
fn absolute(data: Option<&Path>) -> Option<PathBuf> {
    let data = data?;
    match data == Path::new(synthetic::NAME) {
        true => Some(data.to_owned()),
        false => Some(data.canonicalize().or_else(|_| std::path::absolute(data)).unwrap_or(data.to_owned())),
    }
}
