//! Token files of other programs. Each holds one split.

mod megatron;
mod raw;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::files::Stamp;
use crate::subword::Tokenizer;
use megatron::Megatron;

/// The program that a file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// llm.c with GPT-2's tokenizer: a header of 1024 bytes, tokens of 16 bits.
    LlmcGpt2,
    /// llm.c with Llama 3's tokenizer: a header of 1024 bytes, tokens of 32 bits.
    LlmcLlama3,
    /// nanoGPT: tokens of 16 bits, nothing else.
    NanoGpt,
    /// Megatron-LM: a `.bin` of tokens, an `.idx` of documents.
    Megatron,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LlmcGpt2 => "llm.c, GPT-2",
            Self::LlmcLlama3 => "llm.c, Llama 3",
            Self::NanoGpt => "nanoGPT",
            Self::Megatron => "Megatron",
        })
    }
}

/// How a token lies in a file, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    bytes: usize,
    signed: bool,
}

/// Where documents begin.
#[derive(Debug)]
enum Documents {
    /// The file does not say.
    Unknown,
    /// A document begins with this token.
    BeginWith(u32),
    /// A document ends with this token.
    EndWith(u32),
    /// In the index.
    Indexed(Megatron),
}

/// A token file of another program, whose header and size have been checked.
#[derive(Debug)]
pub struct ForeignFile {
    path: PathBuf,
    file: File,
    format: Format,
    element: Element,
    /// Where tokens begin, in bytes.
    first: u64,
    tokens: u64,
    vocab: Option<usize>,
    documents: Documents,
    stamps: Vec<Stamp>,
}

impl ForeignFile {
    /// Opens a `.bin` of llm.c, nanoGPT or Megatron, or Megatron's `.idx`. Checks headers and sizes,
    /// but reads no tokens.
    ///
    /// llm.c's magic numbers name the tokenizer, hence the vocabulary. The other formats do not have
    /// it: it is that of `tokenizer`, or unknown. A file with an `.idx` beside it is Megatron's; one
    /// without a magic number is nanoGPT's.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read; [`Error::Bad`] if it is damaged or cut short, or
    /// its vocabulary is larger than the tokenizer's.
    pub fn open(path: &Path, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let is_index = path.extension().is_some_and(|extension| extension == "idx");
        let index = path.with_extension("idx");
        if is_index || index.exists() {
            return megatron::open(&path.with_extension("bin"), &index, tokenizer);
        }
        raw::open(path, tokenizer)
    }

    /// The file with the tokens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The program that the file is of.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Every token is below this, where it is known.
    pub fn vocab(&self) -> Option<usize> {
        self.vocab
    }

    /// Tokens.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.tokens
    }

    /// Documents, where an index has their number.
    pub fn documents(&self) -> Option<u64> {
        match &self.documents {
            Documents::Indexed(index) => Some(index.documents()),
            _ => None,
        }
    }

    /// Hash of the file's size, of its header, and of 64 pieces of 4 KiB at equal distances: to hash
    /// all of a large file would take minutes.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read.
    pub fn fingerprint(&self) -> Result<u64> {
        const PIECES: u64 = 64;
        const PIECE: u64 = 4096;
        let bytes = self.first + self.tokens * self.element.bytes as u64;
        let mut hash = Xxh3::new();
        hash.update(&bytes.to_le_bytes());
        let mut buffer = vec![0; PIECE as usize];
        for piece in 0..=PIECES {
            let last = bytes.saturating_sub(PIECE);
            let at = (u128::from(last) * u128::from(piece) / u128::from(PIECES)) as u64;
            let part = &mut buffer[..PIECE.min(bytes - at) as usize];
            self.file.read_exact_at(part, at).map_err(Error::reading(&self.path))?;
            hash.update(part);
        }
        if let Documents::Indexed(index) = &self.documents {
            index.hash(&mut hash)?;
        }
        Ok(hash.digest())
    }

    /// Reads `into.len()` tokens from token `offset` on.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read or was cut short; [`Error::Bad`] if a token is
    /// outside the vocabulary.
    ///
    /// # Panics
    /// If the range does not lie within the file.
    pub fn read(&self, offset: u64, into: &mut [u32]) -> Result<()> {
        let length = self.tokens;
        let fits = offset <= length && into.len() as u64 <= length - offset;
        assert!(fits, "{} tokens from {offset} lie outside a file of {length}", into.len());
        let Element { bytes: size, signed } = self.element;
        let mut bytes = vec![0; into.len() * size];
        let at = self.first + offset * size as u64;
        self.file.read_exact_at(&mut bytes, at).map_err(Error::reading(&self.path))?;
        for ((token, raw), i) in into.iter_mut().zip(bytes.chunks_exact(size)).zip(offset..) {
            let number = raw.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
            let negative = signed && raw[size - 1] >= 0x80;
            let found = u32::try_from(number).ok().filter(|&token| !negative && token < u32::MAX);
            let found = found.filter(|&token| self.vocab.is_none_or(|vocab| (token as usize) < vocab));
            *token = found.ok_or_else(|| {
                let vocab =
                    self.vocab.map_or("any vocabulary".to_owned(), |vocab| format!("the vocabulary of {vocab}"));
                let shown = if negative { "a negative token".to_owned() } else { format!("token {number}") };
                let problem = format!("{shown} at {i} is outside {vocab}: damaged, or another tokenizer's");
                Error::bad(&self.path, problem)
            })?;
        }
        Ok(())
    }

    /// Where documents begin within a range, ascending; `None` where the file does not say, because
    /// its separator is unknown.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Bad`], as for [`Self::read`].
    ///
    /// # Panics
    /// If the range does not lie within the file.
    pub fn document_starts(&self, range: Range<u64>) -> Result<Option<Vec<u64>>> {
        let length = self.tokens;
        assert!(range.start <= range.end && range.end <= length, "{range:?} is not in a file of {length} tokens");
        match &self.documents {
            Documents::Unknown => Ok(None),
            Documents::BeginWith(token) => self.starts_by(*token, false, range).map(Some),
            Documents::EndWith(token) => self.starts_by(*token, true, range).map(Some),
            Documents::Indexed(index) => index.starts(range).map(Some),
        }
    }

    fn starts_by(&self, separator: u32, ends: bool, range: Range<u64>) -> Result<Vec<u64>> {
        let separated = |range: Range<u64>| separators(range, |offset, into| self.read(offset, into), separator);
        starts_by(range, ends, separated)
    }

    /// Reads everything: tokens are within the vocabulary, and an index agrees with itself.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that is damaged; [`Error::Read`].
    pub fn verify(&self) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut offset = 0;
        while offset < self.tokens {
            let count = (self.tokens - offset).min(buffer.len() as u64);
            self.read(offset, &mut buffer[..count as usize])?;
            offset += count;
        }
        if let Documents::Indexed(index) = &self.documents {
            index.verify()?;
        }
        self.check_unchanged()
    }

    /// Compares lengths and times of the files with those when they were opened.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that has changed; [`Error::Read`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        self.stamps.iter().try_for_each(Stamp::check)
    }
}

/// Where a token is within a range.
pub(crate) fn separators(
    range: Range<u64>,
    read: impl Fn(u64, &mut [u32]) -> Result<()>,
    separator: u32,
) -> Result<Vec<u64>> {
    let mut buffer = vec![0; (range.end - range.start).min(1 << 16) as usize];
    let mut found = Vec::new();
    let mut offset = range.start;
    while offset < range.end {
        let part = &mut buffer[..(range.end - offset).min(1 << 16) as usize];
        read(offset, part)?;
        let places = part.iter().zip(offset..).filter(|&(&token, _)| token == separator);
        found.extend(places.map(|(_, at)| at));
        offset += part.len() as u64;
    }
    Ok(found)
}

/// Where documents begin that are separated by a token, which each begins or `ends` with. The first
/// token always begins one.
pub(crate) fn starts_by(
    range: Range<u64>,
    ends: bool,
    separators: impl Fn(Range<u64>) -> Result<Vec<u64>>,
) -> Result<Vec<u64>> {
    if range.is_empty() {
        return Ok(Vec::new());
    }
    let shift = u64::from(ends);
    let mut starts = separators(range.start.saturating_sub(shift)..range.end - shift)?;
    starts.iter_mut().for_each(|start| *start += shift);
    if range.start == 0 && starts.first() != Some(&0) {
        starts.insert(0, 0);
    }
    starts.retain(|start| range.contains(start));
    Ok(starts)
}

/// The vocabulary of a tokenizer.
fn vocab_of(tokenizer: Option<&Tokenizer>) -> Option<usize> {
    tokenizer.map(Tokenizer::vocab_size)
}

#[cfg(test)]
mod tests;
