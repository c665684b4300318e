//! Tokens, whatever they are stored in.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::Stamp;
use crate::folder::TokenFolder;
use crate::foreign::{self, ForeignFile};
use crate::subword::Tokenizer;
use crate::tokenizer::END;
use crate::tokens::{Split, TokenFile};

/// Tokens to read.
#[derive(Debug)]
#[non_exhaustive]
pub enum Tokens {
    /// A token file of bytes, with both splits.
    File(Box<TokenFile>, Watch),
    /// A folder of `pillion tokenize`.
    Folder(Box<TokenFolder>),
    /// A file of another program. It is all of the train split; there is no validation split.
    Foreign(Box<ForeignFile>),
}

/// The length and the time of a token file when it was opened.
#[derive(Debug)]
pub struct Watch(Stamp);

impl Tokens {
    /// Opens a token folder, a token file, or a file of llm.c, nanoGPT or Megatron. The last two do
    /// not have their vocabulary, which is that of `tokenizer`, or unknown.
    ///
    /// # Errors
    /// [`Error::Read`] if there is nothing to read; [`Error::Bad`] or [`Error::Tokens`], naming the
    /// file, if it is damaged.
    pub fn open(path: &Path, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        if path.is_dir() {
            return TokenFolder::open(path).map(Box::new).map(Self::Folder);
        }
        let mut begin = [0; 8];
        let file = File::open(path).map_err(Error::reading(path))?;
        if file.read_exact_at(&mut begin, 0).is_ok() && begin == TokenFile::MAGIC {
            let watch = Watch(Stamp::of(path)?);
            return Ok(Self::File(Box::new(TokenFile::open(path)?), watch));
        }
        ForeignFile::open(path, tokenizer).map(Box::new).map(Self::Foreign)
    }

    /// A token file that is open.
    ///
    /// # Errors
    /// [`Error::Read`] if it is gone.
    pub fn of_file(file: TokenFile) -> Result<Self> {
        let watch = Watch(Stamp::of(file.path())?);
        Ok(Self::File(Box::new(file), watch))
    }

    /// Where the tokens are.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(file, _) => file.path(),
            Self::Folder(folder) => folder.path(),
            Self::Foreign(file) => file.path(),
        }
    }

    /// Every token is below this, where it is known.
    pub fn vocab(&self) -> Option<usize> {
        match self {
            Self::File(file, _) => Some(file.vocab()),
            Self::Folder(folder) => Some(folder.vocab()),
            Self::Foreign(file) => file.vocab(),
        }
    }

    /// The identity of the data.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read.
    pub fn fingerprint(&self) -> Result<u64> {
        match self {
            Self::File(file, _) => Ok(file.fingerprint()),
            Self::Folder(folder) => Ok(folder.fingerprint()),
            Self::Foreign(file) => file.fingerprint(),
        }
    }

    /// Tokens in a split.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self, split: Split) -> u64 {
        match self {
            Self::File(file, _) => file.len(split),
            Self::Folder(folder) => folder.len(split),
            Self::Foreign(file) if split == Split::Train => file.len(),
            Self::Foreign(_) => 0,
        }
    }

    /// Documents in a split, where an index has their number.
    pub fn documents(&self, split: Split) -> Option<u64> {
        match self {
            Self::File(..) => None,
            Self::Folder(folder) => Some(folder.documents(split)),
            Self::Foreign(file) if split == Split::Train => file.documents(),
            Self::Foreign(_) => Some(0),
        }
    }

    /// Reads `into.len()` tokens of a split, from token `offset` on.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read or was cut short; [`Error::Bad`] or
    /// [`Error::Tokens`] if a token is outside the vocabulary.
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn read(&self, split: Split, offset: u64, into: &mut [u32]) -> Result<()> {
        match self {
            Self::File(file, _) => {
                // Through a buffer on the stack, so that a step allocates nothing.
                let mut narrow = [0; 2048];
                for (piece, into) in (0..).zip(into.chunks_mut(narrow.len())) {
                    let narrow = &mut narrow[..into.len()];
                    file.read(split, offset + 2048 * piece, narrow)?;
                    into.iter_mut().zip(narrow).for_each(|(token, narrow)| *token = u32::from(*narrow));
                }
                Ok(())
            }
            Self::Folder(folder) => folder.read(split, offset, into),
            Self::Foreign(file) => {
                self.check_range(split, offset..offset + into.len() as u64);
                file.read(offset, into)
            }
        }
    }

    /// Reads which of `into.len()` tokens of a split, from token `offset` on, are left out of the
    /// loss.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read or was cut short.
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn read_mask(&self, split: Split, offset: u64, into: &mut [bool]) -> Result<()> {
        match self {
            Self::Folder(folder) => folder.read_mask(split, offset, into),
            _ => {
                self.check_range(split, offset..offset + into.len() as u64);
                into.fill(false);
                Ok(())
            }
        }
    }

    /// Whether anything in a split is left out of the loss.
    pub fn has_mask(&self, split: Split) -> bool {
        matches!(self, Self::Folder(folder) if folder.has_mask(split))
    }

    /// Where documents begin within a range of a split, ascending, counted from the beginning of
    /// the split; `None` for a file that does not say, and for random tokens.
    ///
    /// A separator that ends a document is its last token, and one that begins a document is its
    /// first: bytes and token folders have the former, files of llm.c the latter.
    ///
    /// # Errors
    /// As for [`Self::read`].
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn document_starts(&self, split: Split, range: Range<u64>) -> Result<Option<Vec<u64>>> {
        match self {
            Self::File(file, _) => {
                self.check_range(split, range.clone());
                if file.is_synthetic() {
                    return Ok(None);
                }
                let read = |offset, into: &mut [u32]| self.read(split, offset, into);
                foreign::starts_by(range, true, |range| foreign::separators(range, read, u32::from(END))).map(Some)
            }
            Self::Folder(folder) => folder.document_starts(split, range).map(Some),
            Self::Foreign(file) => {
                self.check_range(split, range.clone());
                file.document_starts(range)
            }
        }
    }

    /// Reads everything, and compares it with the checksums that there are.
    ///
    /// # Errors
    /// [`Error::Bad`] or [`Error::Tokens`], naming the file that is damaged; [`Error::Read`].
    pub fn verify(&self) -> Result<()> {
        match self {
            Self::File(file, _) => file.verify(),
            Self::Folder(folder) => folder.verify(),
            Self::Foreign(file) => file.verify(),
        }
    }

    /// Compares lengths and times of all files with those when they were opened; takes
    /// microseconds a file.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that has changed; [`Error::Read`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        match self {
            Self::File(_, Watch(stamp)) => stamp.check(),
            Self::Folder(folder) => folder.check_unchanged(),
            Self::Foreign(file) => file.check_unchanged(),
        }
    }

    fn check_range(&self, split: Split, range: Range<u64>) {
        let length = self.len(split);
        assert!(range.start <= range.end && range.end <= length, "{range:?} is not in the {split} split of {length}");
    }
}

#[cfg(test)]
mod tests;
