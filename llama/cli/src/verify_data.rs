//! `pillion data verify`: whether token files are whole.

use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use pillion_data::{Split, TokenFile};
use serde::Serialize;

use crate::settings::{DataArgs, DataCommand};
use crate::train::grouped;
use crate::{Error, run_folder};

/// What is said of a token file.
#[derive(Serialize)]
struct Found {
    path: PathBuf,
    /// What is wrong with it.
    error: Option<String>,
    /// Null where the header cannot be read.
    vocabulary: Option<usize>,
    train_tokens: Option<u64>,
    validation_tokens: Option<u64>,
    /// Checksum of the tokens, in hexadecimal, which a run prints and its checkpoints keep.
    fingerprint: Option<String>,
}

/// Prints what there is; returns the exit code, 1 where something is damaged.
///
/// # Errors
/// When there is no token file.
pub(crate) fn verify(command: &DataCommand) -> Result<i32, Error> {
    let DataCommand::Verify(DataArgs { path, json }) = command;
    let found: Vec<Found> = files(path)?.into_iter().map(look).collect();
    if *json {
        crate::print_result(serde_json::to_string_pretty(&found).expect("plain values"))?;
    } else {
        crate::print_result(table(&found))?;
        found.iter().filter_map(|found| found.error.as_ref()).for_each(crate::complain);
    }
    Ok(i32::from(found.iter().any(|found| found.error.is_some())))
}

/// The token files that a path stands for, sorted: itself, those in it, or those of the run in it.
fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    for folder in [run_folder::tokens(path), path.to_owned()].iter().filter(|folder| folder.is_dir()) {
        let failed = |error: std::io::Error| Error::file(folder, format!("cannot be listed: {error}"));
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let file = entry.map_err(failed)?.path();
            if file.extension().is_some_and(|extension| extension == "tokens") {
                files.push(file);
            }
        }
        if !files.is_empty() {
            files.sort();
            return Ok(files);
        }
    }
    Err(Error::file(path, "there is no token file here: give the folder of a run, or a token file"))
}

fn look(path: PathBuf) -> Found {
    let opened = TokenFile::open(&path);
    let header = opened.as_ref().ok();
    Found {
        vocabulary: header.map(TokenFile::vocab),
        train_tokens: header.map(|file| file.len(Split::Train)),
        validation_tokens: header.map(|file| file.len(Split::Validation)),
        fingerprint: header.map(|file| format!("{:016x}", file.fingerprint())),
        error: opened.and_then(|file| file.verify()).err().map(|error| error.to_string()),
        path,
    }
}

fn table(found: &[Found]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["token file", "vocabulary", "train", "validation", "fingerprint", "state"]);
    for Found { path, error, vocabulary, train_tokens, validation_tokens, fingerprint } in found {
        let number = |number: &Option<u64>| number.map_or("-".to_owned(), grouped);
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
