//! Which tokenizer made the tokens of a run, and whether others are of the same.

use std::path::Path;

use pillion_data::{Dataset, Tokenizer, Tokens, tokenizer};
use pillion_llama::huggingface::CONFIG;
use xxhash_rust::xxh3::xxh3_64;

use super::source::hex;
use crate::Error;
use crate::models::{self, Companion, TOKENIZER};

/// The checksum of the tokenizer that token folders were made with, and the first of them.
///
/// # Errors
/// When there are several tokenizers.
pub(super) fn one_of(dataset: &Dataset) -> Result<Option<(&Path, &str)>, Error> {
    let folders = dataset.sources().filter_map(|tokens| match tokens {
        Tokens::Folder(folder) => Some((folder.path(), folder.index().tokenizer.xxh3.as_str())),
        _ => None,
    });
    let folders: Vec<_> = folders.collect();
    let Some((first, checksum)) = folders.first() else { return Ok(None) };
    if let Some((other, _)) = folders.iter().find(|(_, other)| other != checksum) {
        return Err(Error::Setting(format!(
            "{} and {} were made with different tokenizers: make one of them again with the other's",
            first.display(),
            other.display()
        )));
    }
    Ok(Some((first, checksum)))
}

/// The files of the tokenizer that token folders were made with.
///
/// # Errors
/// As for [`one_of`], and when a file cannot be read.
pub(super) fn files_of(dataset: &Dataset) -> Result<Option<Vec<Companion>>, Error> {
    let Some((folder, _)) = one_of(dataset)? else { return Ok(None) };
    let mut files = models::files_in(folder)?;
    files.retain(|(name, _)| name != CONFIG);
    Ok(Some(files))
}

/// Checks that token folders were made with this tokenizer.
///
/// # Errors
/// When they were made with another.
pub(crate) fn check_made_by(dataset: &Dataset, tokenizer: &Tokenizer) -> Result<(), Error> {
    match one_of(dataset)? {
        Some((folder, checksum)) if checksum != hex(tokenizer.hash()) => Err(Error::Setting(format!(
            "--data {} was made with another tokenizer than the model's: make it with `pillion tokenize --tokenizer` and \
             the model's",
            folder.display()
        ))),
        _ => Ok(()),
    }
}

/// The checksum of the tokenizer of bytes.
fn of_bytes() -> Option<String> {
    let mut files = tokenizer::huggingface_files().into_iter();
    files.find(|(name, _)| *name == TOKENIZER).map(|(_, text)| hex(xxh3_64(text.as_bytes())))
}

/// Checks that tokens to validate on, of which a folder says what made them, are of the kind that a
/// run learns from.
///
/// # Errors
/// When they are another tokenizer's.
pub(super) fn check_same_tokenizer(dataset: &Dataset, tokens: &Tokens) -> Result<(), Error> {
    let Tokens::Folder(folder) = tokens else { return Ok(()) };
    let of_run = match one_of(dataset)? {
        Some((_, checksum)) => Some(checksum.to_owned()),
        None if dataset.bytes().is_some() => of_bytes(),
        None => None,
    };
    if of_run.is_none_or(|checksum| checksum == folder.index().tokenizer.xxh3) {
        return Ok(());
    }
    let path = folder.path().display();
    Err(Error::Setting(format!(
        "--validation-data {path} was made with another tokenizer than the run's tokens: make it with theirs"
    )))
}

/// Checks that the model that a run begins with, which has these files, was made for the run's
/// tokens.
///
/// # Errors
/// When it has another tokenizer, or learns text by a tokenizer while the run's tokens are bytes.
pub(super) fn check_tokenizer(dataset: &Dataset, model: &[Companion]) -> Result<(), Error> {
    let Some((_, of_model)) = model.iter().find(|(name, _)| name == TOKENIZER) else { return Ok(()) };
    let of_model = hex(xxh3_64(of_model));
    let is_of_bytes = of_bytes().as_ref() == Some(&of_model);
    let remedy = "make tokens with `pillion tokenize --tokenizer` and the model's";
    if dataset.bytes().is_some_and(|tokens| !tokens.is_synthetic()) && !is_of_bytes {
        let reason = "of the text in --data each byte would be a token, but the model in --from has a tokenizer";
        return Err(Error::Setting(format!("{reason}: {remedy}")));
    }
    match one_of(dataset)? {
        Some((_, of_tokens)) if of_tokens != of_model => {
            let reason = "--data was made with another tokenizer than that of the model in --from";
            Err(Error::Setting(format!("{reason}: {remedy}")))
        }
        _ => Ok(()),
    }
}
