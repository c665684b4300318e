//! `pillion data show` and `verify`: what tokens there are, and whether they are whole.

use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use pillion_data::{Split, Tokenizer, Tokens};
use serde::Serialize;

use crate::settings::{DataArgs, DataCommand};
use crate::train::grouped;
use crate::{Error, run_folder};

/// What is said of tokens.
#[derive(Serialize)]
struct Found {
    path: PathBuf,
    /// What is wrong with it.
    error: Option<String>,
    /// `token file`, `token folder`, or the program that the file is of.
    kind: Option<String>,
    /// Null where the header cannot be read, or the file does not have it.
    vocabulary: Option<usize>,
    train_tokens: Option<u64>,
    validation_tokens: Option<u64>,
    /// Null where no index has their number.
    train_documents: Option<u64>,
    validation_documents: Option<u64>,
    /// Tokens that are left out of the loss.
    train_masked: Option<u64>,
    validation_masked: Option<u64>,
    /// The tokenizer of a token folder: its file and its hash.
    tokenizer: Option<String>,
    /// The token after each document of a token folder.
    separator: Option<u32>,
    /// Checksum of the tokens, in hexadecimal, which a run prints and its checkpoints keep.
    fingerprint: Option<String>,
}

/// Prints what there is; returns the exit code, 1 where something is damaged.
///
/// # Errors
/// When there are no tokens.
pub(crate) fn look_at(command: &DataCommand) -> Result<i32, Error> {
    let (DataArgs { path, tokenizer, json }, verify) = match command {
        DataCommand::Show(settings) => (settings, false),
        DataCommand::Verify(settings) => (settings, true),
    };
    let tokenizer = tokenizer.as_deref().map(Tokenizer::load).transpose()?;
    let look = |path| look(path, tokenizer.as_ref(), verify);
    let found: Vec<Found> = stored(path)?.into_iter().map(look).collect();
    if *json {
        crate::print_result(serde_json::to_string_pretty(&found).expect("plain values"))?;
    } else {
        crate::print_result(if verify { states(&found) } else { contents(&found) })?;
        found.iter().filter_map(|found| found.error.as_ref()).for_each(crate::complain);
    }
    Ok(i32::from(found.iter().any(|found| found.error.is_some())))
}

/// What a path stands for, sorted: a file or a token folder itself, or the token files in it, or
/// those of the run in it.
fn stored(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if path.is_file() || pillion_data::is_token_folder(path) {
        return Ok(vec![path.to_owned()]);
    }
    for folder in [run_folder::tokens(path), path.to_owned()].iter().filter(|folder| folder.is_dir()) {
        if pillion_data::is_token_folder(folder) {
            return Ok(vec![folder.clone()]);
        }
        let failed = |error: std::io::Error| Error::file(folder, format!("cannot be listed: {error}"));
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            let is_file = file.extension().is_some_and(|extension| extension == "tokens");
            if is_file || pillion_data::is_token_folder(&file) {
                files.push(file);
            }
        }
        if !files.is_empty() {
            files.sort();
            return Ok(files);
        }
    }
    Err(Error::file(path, "there is no token file here: give the folder of a run, a token folder, or a token file"))
}

fn look(path: PathBuf, tokenizer: Option<&Tokenizer>, verify: bool) -> Found {
    let opened = Tokens::open(&path, tokenizer);
    let tokens = opened.as_ref().ok();
    let index = match tokens {
        Some(Tokens::Folder(folder)) => Some(folder.index()),
        _ => None,
    };
    let masked = |split| tokens.map(|_| index.map_or(0, |index| index.split(split).masked));
    Found {
        kind: tokens.map(|tokens| match tokens {
            Tokens::File(..) => "token file".to_owned(),
            Tokens::Folder(_) => "token folder".to_owned(),
            Tokens::Foreign(file) => file.format().to_string(),
            _ => "tokens".to_owned(),
        }),
        vocabulary: tokens.and_then(Tokens::vocab),
        train_tokens: tokens.map(|tokens| tokens.len(Split::Train)),
        validation_tokens: tokens.map(|tokens| tokens.len(Split::Validation)),
        train_documents: tokens.and_then(|tokens| tokens.documents(Split::Train)),
        validation_documents: tokens.and_then(|tokens| tokens.documents(Split::Validation)),
        train_masked: masked(Split::Train),
        validation_masked: masked(Split::Validation),
        tokenizer: index.map(|index| format!("{} {}", index.tokenizer.file, index.tokenizer.xxh3)),
        separator: index.and_then(|index| index.separator),
        fingerprint: tokens.and_then(|tokens| tokens.fingerprint().ok()).map(|hash| format!("{hash:016x}")),
        error: match opened {
            Err(error) => Some(error.to_string()),
            Ok(tokens) if verify => tokens.verify().err().map(|error| error.to_string()),
            Ok(_) => None,
        },
        path,
    }
}

fn number(number: &Option<u64>) -> String {
    number.map_or("-".to_owned(), grouped)
}

/// Whether each is whole.
fn states(found: &[Found]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["token file", "vocabulary", "train", "validation", "fingerprint", "state"]);
    for Found { path, error, vocabulary, train_tokens, validation_tokens, fingerprint, .. } in found {
        table.add_row([
            path.display().to_string(),
            vocabulary.map_or("-".to_owned(), |vocabulary| vocabulary.to_string()),
            number(train_tokens),
            number(validation_tokens),
            fingerprint.clone().unwrap_or("-".to_owned()),
            if error.is_none() { "whole" } else { "damaged" }.to_owned(),
        ]);
    }
    table
}

/// What is in each: a line a split.
fn contents(found: &[Found]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["tokens", "kind", "vocabulary", "tokenizer", "split", "tokens", "documents", "masked"]);
    for found in found {
        let shown = |text: &Option<String>| text.clone().unwrap_or("-".to_owned());
        let train = ("train", &found.train_tokens, &found.train_documents, &found.train_masked);
        let validation =
            ("validation", &found.validation_tokens, &found.validation_documents, &found.validation_masked);
        for (split, tokens, documents, masked) in [train, validation] {
            table.add_row([
                found.path.display().to_string(),
                shown(&found.kind),
                found.vocabulary.map_or("-".to_owned(), |vocabulary| vocabulary.to_string()),
                shown(&found.tokenizer),
                split.to_owned(),
                number(tokens),
                number(documents),
                number(masked),
            ]);
        }
    }
    table
}
