//! From files of text to a token file.
//!
//! Two passes, so that nothing larger than a chunk is held in memory: the first finds out which
//! files are text, which decides where the splits divide; the second writes the tokens.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::sources::{Division, SourceFile, Sources};
use crate::tokenizer::{END, VOCAB, encode};
use crate::tokens::{Origin, Split, TokenWriter};

/// Tokenizes `sources` into a token file at `destination`; each document is followed by [`END`].
/// Files that are not text are left out and counted.
///
/// # Errors
/// [`Error::NotText`] if that leaves out the only file, [`Error::Changed`] if a file changes
/// meanwhile, [`Error::Read`], [`Error::Write`].
pub(crate) fn tokenize(sources: &Sources, destination: &Path) -> Result<()> {
    let mut origin = Origin { files: 0, bytes: 0, not_text: 0 };
    let mut texts = Vec::new();
    for (i, file) in sources.files.iter().enumerate() {
        match first_invalid_byte(file)? {
            None => {
                origin.files += 1;
                origin.bytes += file.bytes;
                texts.push(i);
            }
            Some(offset) if sources.files.len() == 1 => {
                return Err(Error::NotText { path: file.path.clone(), offset });
            }
            Some(_) => origin.not_text += 1,
        }
    }

    let files = |i: usize| &sources.files[i];
    let mut pieces: Vec<Piece<'_>> = match &sources.division {
        Division::Given(splits) => texts.iter().map(|&i| Piece::whole(files(i), splits[i])).collect(),
        Division::Tail => divide_tail(texts.iter().map(|&i| files(i)).collect())?,
    };
    // Stable, so files keep their order within a split.
    pieces.sort_by_key(|piece| piece.split == Split::Validation);

    let mut writer = TokenWriter::create(destination, VOCAB)?;
    let mut tokens = Vec::new();
    for piece in &pieces {
        for_each_chunk(piece.file, piece.range.clone(), |text| {
            tokens.clear();
            encode(text, &mut tokens);
            writer.push(piece.split, &mut tokens)
        })?;
        writer.push(piece.split, &mut [END])?;
    }
    writer.finish(origin)
}

/// A part of a file that goes into one split.
#[derive(Debug, PartialEq, Eq)]
struct Piece<'a> {
    file: &'a SourceFile,
    /// In bytes.
    range: Range<u64>,
    split: Split,
}

impl<'a> Piece<'a> {
    fn whole(file: &'a SourceFile, split: Split) -> Self {
        Self { file, range: 0..file.bytes, split }
    }
}

/// Gives the last twentieth of the bytes to validation: from the nearest boundary between two
/// files if that leaves it a fortieth to a tenth, else from the character boundary at or just
/// before that byte.
fn divide_tail(files: Vec<&SourceFile>) -> Result<Vec<Piece<'_>>> {
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let cut = total - total / 20;
    let mut end = 0;
    let boundary = files
        .iter()
        .map(|file| {
            end += file.bytes;
            end
        })
        .min_by_key(|end| end.abs_diff(cut))
        .filter(|end| (total.div_ceil(40)..=total / 10).contains(&(total - end)));

    let mut pieces = Vec::with_capacity(files.len() + 1);
    let mut start = 0;
    for file in files {
        let end = start + file.bytes;
        let cut = boundary.unwrap_or(cut);
        if end <= cut {
            pieces.push(Piece::whole(file, Split::Train));
        } else if start >= cut {
            pieces.push(Piece::whole(file, Split::Validation));
        } else {
            let cut = character_boundary(file, cut - start)?;
            for (range, split) in [(0..cut, Split::Train), (cut..file.bytes, Split::Validation)] {
                if !range.is_empty() {
                    pieces.push(Piece { file, range, split });
                }
            }
        }
        start = end;
    }
    Ok(pieces)
}

/// The last offset up to `at` where a character of the UTF-8 text begins.
fn character_boundary(file: &SourceFile, at: u64) -> Result<u64> {
    // A character has at most three bytes after its first.
    let start = at.saturating_sub(3);
    let mut boundary = start;
    for_each_chunk(file, start..at + 1, |bytes| {
        let continues = |byte: u8| byte & 0b1100_0000 == 0b1000_0000;
        let last = bytes.iter().rposition(|&byte| !continues(byte));
        boundary = start + last.unwrap_or(0) as u64;
        Ok(())
    })?;
    Ok(boundary)
}

/// Reads the whole file; the offset of the first byte that is part of no character, if any.
fn first_invalid_byte(file: &SourceFile) -> Result<Option<u64>> {
    let mut reader = open(file)?;
    let mut buffer = vec![0; CHUNK];
    // Bytes at the head of the buffer: a character that the last read cut in two.
    let mut held = 0;
    let mut checked = 0;
    loop {
        let read =
            reader.read(&mut buffer[held..]).map_err(|source| Error::Read { path: file.path.clone(), source })?;
        let filled = held + read;
        match std::str::from_utf8(&buffer[..filled]) {
            Ok(_) => {
                checked += filled as u64;
                held = 0;
            }
            Err(error) if error.error_len().is_none() && read > 0 => {
                checked += error.valid_up_to() as u64;
                buffer.copy_within(error.valid_up_to()..filled, 0);
                held = filled - error.valid_up_to();
            }
            Err(error) => return Ok(Some(checked + error.valid_up_to() as u64)),
        }
        if read == 0 {
            break;
        }
    }
    if checked != file.bytes {
        return Err(changed(file));
    }
    Ok(None)
}

/// Calls `visit` with the bytes of a range of a file, in order, in pieces.
pub(crate) fn for_each_chunk(
    file: &SourceFile,
    range: Range<u64>,
    mut visit: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let reader = open(file)?;
    let mut buffer = vec![0; CHUNK.min((range.end - range.start) as usize)];
    let mut offset = range.start;
    while offset < range.end {
        let count = (range.end - offset).min(CHUNK as u64);
        let chunk = &mut buffer[..count as usize];
        reader.read_exact_at(chunk, offset).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(file),
            _ => Error::Read { path: file.path.clone(), source },
        })?;
        visit(chunk)?;
        offset += count;
    }
    Ok(())
}

const CHUNK: usize = 1 << 20;

fn open(file: &SourceFile) -> Result<File> {
    File::open(&file.path).map_err(|source| Error::Read { path: file.path.clone(), source })
}

fn changed(file: &SourceFile) -> Error {
    Error::Changed { path: file.path.clone(), expected: file.bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources;
    use crate::tokenizer::decode;
    use crate::tokens::TokenFile;
    use proptest::prelude::*;
    use std::fs;

    /// Both splits of the text under `path`, decoded, a newline for each end of a document.
    fn splits(path: &Path) -> Result<[String; 2]> {
        let folder = tempfile::tempdir().unwrap();
        let destination = folder.path().join("tokens");
        tokenize(&sources::under(path)?, &destination)?;
        let file = TokenFile::open(&destination)?;
        Ok([Split::Train, Split::Validation].map(|split| {
            let mut tokens = vec![0; file.len(split) as usize];
            file.read(split, 0, &mut tokens).unwrap();
            let documents = tokens.split_inclusive(|&token| token == END);
            documents
                .map(|document| {
                    assert_eq!(document.last(), Some(&END));
                    String::from_utf8(decode(document)).expect("no character is cut") + "\n"
                })
                .collect()
        }))
    }

    #[test]
    fn a_boundary_near_the_end_divides_files_whole() {
        let folder = tempfile::tempdir().unwrap();
        // 93 + 7 bytes: the boundary leaves 7 %, within a fortieth to a tenth.
        fs::write(folder.path().join("a"), "a".repeat(93)).unwrap();
        fs::write(folder.path().join("b"), "b".repeat(7)).unwrap();
        fs::write(folder.path().join("binary"), [b'a', 0xff]).unwrap();
        let [train, validation] = splits(folder.path()).unwrap();
        assert_eq!(train, "a".repeat(93) + "\n");
        assert_eq!(validation, "bbbbbbb\n");
    }

    #[test]
    fn without_such_a_boundary_the_last_twentieth_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "a".repeat(50)).unwrap();
        fs::write(folder.path().join("b"), "b".repeat(50)).unwrap();
        let [train, validation] = splits(folder.path()).unwrap();
        assert_eq!(train, format!("{}\n{}\n", "a".repeat(50), "b".repeat(45)));
        assert_eq!(validation, "bbbbb\n");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_character_goes_into_one_split_in_order(
            texts in prop::collection::vec("[a-zß€𝄞]{1,60}", 1..6),
        ) {
            let folder = tempfile::tempdir().unwrap();
            for (i, text) in texts.iter().enumerate() {
                fs::write(folder.path().join(i.to_string()), text).unwrap();
            }
            let [train, validation] = splits(folder.path()).unwrap();
            let both = format!("{train}{validation}").replace('\n', "");
            prop_assert_eq!(both, texts.concat());
            let total = texts.concat().len();
            // A tenth by boundary, or a twentieth and the rest of one character.
            let validation = validation.replace('\n', "").len();
            prop_assert!(validation <= (total / 10).max(total / 20 + 3));
            prop_assert!(validation >= total / 40);
        }
    }

    #[test]
    fn characters_across_read_buffers_are_text_and_a_wrong_byte_is_located() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        // A buffer holds 2^20 bytes, which three does not divide.
        let text = "€".repeat(400_000);
        fs::write(&path, &text).unwrap();
        let [train, validation] = splits(&path).unwrap();
        assert_eq!((train + &validation).replace('\n', ""), text);

        for (tail, offset) in [(&b"\xff..."[..], 1_200_000), (b"ok\xe2\x82", 1_200_002)] {
            fs::write(&path, [text.as_bytes(), tail].concat()).unwrap();
            let error = splits(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("byte {offset} ")), "{error}");
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_an_error_and_leaves_no_token_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        let destination = folder.path().join("tokens");
        for now in ["shorter", "longer than it was"] {
            fs::write(&path, "as it was").unwrap();
            let sources = sources::under(&path).unwrap();
            fs::write(&path, now).unwrap();
            let error = tokenize(&sources, &destination).unwrap_err();
            assert!(matches!(error, Error::Changed { expected: 9, .. }), "{error}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
