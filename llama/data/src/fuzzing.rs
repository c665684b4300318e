//! The parsers of what others wrote, for the fuzz targets in `tests/fuzz`.
//!
//! Each module is a target: `seeds` are inputs to begin with, and `check` panics where the parser
//! breaks its promise.

pub mod documents;
pub mod foreign;
pub mod parquet;
pub mod token_file;
pub mod token_folder;
pub mod tokenizer;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// What stands between the files of an input that is several.
const MARK: &[u8] = b"\n--\n";

/// The files of an input. Missing ones are empty, and what follows the last is left out.
fn split<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = data;
    std::array::from_fn(|_| {
        let end = rest.windows(MARK.len()).position(|part| part == MARK);
        let (part, after) = end.map_or((rest, &[][..]), |end| (&rest[..end], &rest[end + MARK.len()..]));
        rest = after;
        part
    })
}

/// An input of several files.
fn join(files: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let files: Vec<&[u8]> = files.iter().map(AsRef::as_ref).collect();
    let joined = files.join(MARK);
    let parts = joined.windows(MARK.len()).filter(|part| *part == MARK).count() + 1;
    assert_eq!(parts, files.len(), "a file of a seed has the mark in it");
    joined
}

/// A folder that is gone after the check.
fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("a file in a folder of our own");
    path
}

/// An error can be printed as a line.
fn assert_is_line(error: &impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_keeps_the_promises() {
        type Target = (fn() -> Vec<Vec<u8>>, fn(&[u8]));
        let targets: [Target; 6] = [
            (documents::seeds, documents::check),
            (foreign::seeds, foreign::check),
            (parquet::seeds, parquet::check),
            (token_file::seeds, token_file::check),
            (token_folder::seeds, token_folder::check),
            (tokenizer::seeds, tokenizer::check),
        ];
        for (seeds, check) in targets {
            seeds().iter().for_each(|seed| check(seed));
        }
    }
}
