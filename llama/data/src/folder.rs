//! A folder of tokens: made by [`make::tokenize`], read by [`TokenFolder`].
//!
//! | file | what |
//! |---|---|
//! | `index.json` | what there is ([`index`]); written last |
//! | `train-00000.tokens`, ... | tokens, of 16 or 32 bits ([`shard`]) |
//! | `train-00000.documents` | where documents end |
//! | `train-00000.mask` | which tokens are left out of the loss, if any are |
//! | `validation-00000...` | the same of the other split |
//! | `tokenizer.json`, ... | the tokenizer's files |
//! | `plan.json`, `progress.json` | of an unfinished folder ([`progress`]) |

mod encode;
pub(crate) mod index;
pub(crate) mod make;
mod progress;
mod shard;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::files::{Files, Stamp};
use crate::tokens::Split;
use index::{INDEX, Index, Kind};

/// Whether a folder is a token folder, or an unfinished one.
pub fn is_token_folder(folder: &Path) -> bool {
    folder.join(INDEX).is_file() || folder.join(progress::PLAN).is_file()
}

/// A token folder whose index and sizes have been checked.
#[derive(Debug)]
pub struct TokenFolder {
    folder: PathBuf,
    index: Index,
    /// Where each shard begins in its split, and one more for the end: train, validation.
    tokens: [Vec<u64>; 2],
    files: Files,
    stamps: Vec<Stamp>,
}

impl TokenFolder {
    /// Opens a token folder; checks its index and the sizes of its files, but reads no tokens.
    ///
    /// # Errors
    /// [`Error::Bad`] if the folder is unfinished or damaged, naming the file; [`Error::Read`].
    pub fn open(folder: &Path) -> Result<Self> {
        if !folder.join(INDEX).exists() {
            let problem = "holds no index.json, so it is no token folder, or an unfinished one: run the pillion tokenize \
                           that began it again, which goes on from there";
            return Err(Error::bad(folder, problem));
        }
        let index = Index::read(folder)?;
        let mut stamps = vec![Stamp::of(&folder.join(INDEX))?];
        for (shard, kind, bytes) in all_files(&index) {
            let path = folder.join(kind.file(&shard.name));
            let stamp = Stamp::of(&path)?;
            if stamp.bytes() != bytes {
                let problem = format!("expected {bytes} bytes, found {}; make the folder again", stamp.bytes());
                return Err(Error::bad(path, problem));
            }
            stamps.push(stamp);
        }
        let tokens = [Split::Train, Split::Validation].map(|split| {
            let mut sum = 0;
            let ends = index.split(split).shards.iter().map(|shard| {
                sum += shard.tokens;
                sum
            });
            std::iter::once(0).chain(ends).collect()
        });
        Ok(Self { folder: folder.to_owned(), index, tokens, files: Files::default(), stamps })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// What the folder holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Every token is below this.
    pub fn vocab(&self) -> usize {
        self.index.vocabulary as usize
    }

    /// Hash of the tokenizer, the tokens, the documents and the masks, by the checksums of the
    /// index: the identity of the data.
    pub fn fingerprint(&self) -> u64 {
        self.index.fingerprint()
    }

    /// Tokens in a split.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self, split: Split) -> u64 {
        self.index.split(split).tokens
    }

    /// Documents in a split.
    pub fn documents(&self, split: Split) -> u64 {
        self.index.split(split).documents
    }

    /// Reads `into.len()` tokens of a split, from token `offset` on.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read or was cut short; [`Error::Bad`] if a token is
    /// outside the vocabulary.
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn read(&self, split: Split, offset: u64, into: &mut [u32]) -> Result<()> {
        let size = self.index.token_bytes as usize;
        let mut bytes = vec![0; into.len() * size];
        for (shard, within, part) in self.parts(split, offset, into.len()) {
            let path = self.file(split, shard, Kind::Tokens);
            let file = self.files.open(&path)?;
            let bytes = &mut bytes[part.start * size..part.end * size];
            file.read_exact_at(bytes, within * size as u64).map_err(Error::reading(&path))?;
            let vocab = self.index.vocabulary;
            let raw = bytes.chunks_exact(size);
            for (token, raw) in into[part].iter_mut().zip(raw) {
                *token = raw.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte));
                if *token >= vocab {
                    return Err(Error::bad(
                        &path,
                        format!("damaged: token {token} is outside the vocabulary of {vocab}"),
                    ));
                }
            }
        }
        Ok(())
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
        for (shard, within, part) in self.parts(split, offset, into.len()) {
            let into = &mut into[part];
            if self.index.split(split).shards[shard].xxh3.mask.is_none() {
                into.fill(false);
                continue;
            }
            let path = self.file(split, shard, Kind::Mask);
            let (first, end) = (within / 8, (within + into.len() as u64).div_ceil(8));
            let mut bits = vec![0; (end - first) as usize];
            self.files.open(&path)?.read_exact_at(&mut bits, first).map_err(Error::reading(&path))?;
            for (i, masked) in into.iter_mut().enumerate() {
                let bit = within % 8 + i as u64;
                *masked = bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
            }
        }
        Ok(())
    }

    /// Whether anything in a split is left out of the loss.
    pub fn has_mask(&self, split: Split) -> bool {
        self.index.split(split).masked > 0
    }

    /// Where documents begin within a range of a split, ascending, counted from the beginning of
    /// the split.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read; [`Error::Bad`] if it is damaged.
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn document_starts(&self, split: Split, range: Range<u64>) -> Result<Vec<u64>> {
        assert!(range.start <= range.end && range.end <= self.len(split), "{range:?} is not in the {split} split");
        let mut starts = Vec::new();
        if range.is_empty() {
            return Ok(starts);
        }
        if range.start == 0 {
            starts.push(0);
        }
        // A document begins where another ends.
        let mut shard = self.shard_of(split, range.start.saturating_sub(1));
        let first = self.tokens[split as usize][shard];
        let mut document = self.ends_before(split, shard, range.start.max(1) - first)?;
        loop {
            let tokens = &self.tokens[split as usize];
            let index::Shard { tokens: length, documents: count, .. } = self.index.split(split).shards[shard];
            let path = self.file(split, shard, Kind::Documents);
            while document < count {
                let some = (count - document).min(SOME_ENDS as u64);
                let ends = self.ends(&path, document, some as usize)?;
                for end in ends {
                    let start = tokens[shard].saturating_add(end);
                    if end > length || starts.last().is_some_and(|&last| start <= last) {
                        return Err(Error::bad(&path, format!("damaged: a document ends at {end}, out of order")));
                    }
                    if start >= range.end {
                        return Ok(starts);
                    }
                    if start > 0 && start >= range.start {
                        starts.push(start);
                    }
                }
                document += some;
            }
            (shard, document) = (shard + 1, 0);
            if shard + 1 >= tokens.len() || tokens[shard] >= range.end {
                return Ok(starts);
            }
        }
    }

    /// Reads all files and compares them with their checksums; checks that documents are in order.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that is damaged; [`Error::Read`].
    pub fn verify(&self) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for (shard, kind, bytes) in all_files(&self.index) {
            let path = self.folder.join(kind.file(&shard.name));
            let expected = shard.sum(kind).unwrap_or_default();
            let file = self.files.open(&path)?;
            let mut hash = Xxh3::new();
            let mut at = 0;
            let mut seen = 0;
            while at < bytes {
                let part = &mut buffer[..(bytes - at).min(1 << 20) as usize];
                file.read_exact_at(part, at).map_err(Error::reading(&path))?;
                hash.update(part);
                at += part.len() as u64;
                self.check(&path, kind, part, &mut seen)?;
            }
            let found = format!("{:016x}", hash.digest());
            if found != expected {
                let problem = format!("damaged: expected checksum {expected}, found {found}; make the folder again");
                return Err(Error::bad(path, problem));
            }
            if kind == Kind::Documents && seen > shard.tokens {
                return Err(Error::bad(path, format!("damaged: a document ends at {seen} of {} tokens", shard.tokens)));
            }
            if kind == Kind::Mask && seen != shard.masked {
                let problem = format!("damaged: {seen} masked tokens, but the index says {}", shard.masked);
                return Err(Error::bad(path, problem));
            }
        }
        self.check_unchanged()
    }

    /// Checks a part of a file. `seen` is the last end of a document, or the number of masked tokens.
    fn check(&self, path: &Path, kind: Kind, part: &[u8], seen: &mut u64) -> Result<()> {
        let number = |raw: &[u8]| raw.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
        match kind {
            Kind::Tokens => {
                let token = part.chunks_exact(self.index.token_bytes as usize).map(number);
                match token.into_iter().find(|&token| token >= u64::from(self.index.vocabulary)) {
                    None => Ok(()),
                    Some(token) => Err(Error::bad(path, format!("damaged: token {token} is outside the vocabulary"))),
                }
            }
            Kind::Documents => {
                for end in part.chunks_exact(8).map(number) {
                    if end <= *seen {
                        return Err(Error::bad(path, format!("damaged: a document ends at {end}, after {seen}")));
                    }
                    *seen = end;
                }
                Ok(())
            }
            Kind::Mask => {
                *seen += part.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
                Ok(())
            }
        }
    }

    /// Compares the lengths and times of all files with those when the folder was opened.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that has changed; [`Error::Read`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        self.stamps.iter().try_for_each(Stamp::check)
    }

    /// The shards that a range lies in: each with the first token in it, and the part of the range.
    fn parts(&self, split: Split, offset: u64, count: usize) -> Vec<(usize, u64, Range<usize>)> {
        let length = self.len(split);
        assert!(
            offset <= length && count as u64 <= length - offset,
            "{count} tokens from {offset} lie outside the {split} split of {length}"
        );
        let starts = &self.tokens[split as usize];
        let mut parts = Vec::new();
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let shard = self.shard_of(split, at);
            let some = (starts[shard + 1] - at).min((count - done) as u64) as usize;
            parts.push((shard, at - starts[shard], done..done + some));
            done += some;
        }
        parts
    }

    /// The shard of a token.
    fn shard_of(&self, split: Split, at: u64) -> usize {
        self.tokens[split as usize].partition_point(|&start| start <= at).saturating_sub(1)
    }

    fn file(&self, split: Split, shard: usize, kind: Kind) -> PathBuf {
        self.folder.join(kind.file(&self.index.split(split).shards[shard].name))
    }

    /// How many documents of a shard end before token `at` of it.
    fn ends_before(&self, split: Split, shard: usize, at: u64) -> Result<u64> {
        let path = self.file(split, shard, Kind::Documents);
        let (mut low, mut high) = (0, self.index.split(split).shards[shard].documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.ends(&path, middle, 1)?[0] < at { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }

    fn ends(&self, path: &Path, first: u64, count: usize) -> Result<Vec<u64>> {
        let file: Arc<File> = self.files.open(path)?;
        let mut bytes = vec![0; count * 8];
        file.read_exact_at(&mut bytes, first * 8).map_err(Error::reading(path))?;
        Ok(bytes.chunks_exact(8).map(|raw| u64::from_le_bytes(raw.try_into().expect("8 bytes"))).collect())
    }
}

/// Ends of documents that are read at a time.
const SOME_ENDS: usize = 256;

/// All files of shards, with their sizes.
fn all_files(index: &Index) -> impl Iterator<Item = (&index::Shard, Kind, u64)> {
    let shards = [Split::Train, Split::Validation].into_iter().flat_map(|split| &index.split(split).shards);
    shards.flat_map(move |shard| {
        let kinds = Kind::ALL.into_iter();
        kinds.filter_map(move |kind| Some((shard, kind, shard.bytes(kind, index.token_bytes)?)))
    })
}

#[cfg(test)]
mod tests;
