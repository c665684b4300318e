//! The token file: text tokenized once, read in place ever after.
//!
//! ```text
//! bytes  0..8    magic, "PILLTOKS"
//!        8..12   version          u32
//!       12..16   vocabulary       u32
//!       16..24   train tokens     u64
//!       24..32   validation tokens u64
//!       32..56   files, bytes of text, files that were not text   3 × u64
//!       56..64   xxh3 of the tokens, then of the two token counts
//!       64..72   xxh3 of bytes 0..64
//!       72..     tokens, u16: train, then validation
//! ```
//!
//! All numbers are little-endian. A file is written under a temporary name, flushed to the disk and
//! renamed: other processes see all of it or none, and of two that race either may win, since both
//! write the same bytes. A memory map would be faster by a little, but unsafe, and a file cut short
//! under it kills the process; reads at an offset return an error instead.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};

/// Version of the token file's layout.
pub(crate) const VERSION: u32 = 1;

/// The two parts of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What the model learns from.
    Train,
    /// What its loss is measured on.
    Validation,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Validation => "validation",
        })
    }
}

/// What a token file was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Files of text.
    pub files: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Files that were left out because they are not UTF-8.
    pub not_text: u64,
}

/// An open token file whose header has been checked.
#[derive(Debug)]
pub struct TokenFile {
    file: File,
    path: PathBuf,
    header: Header,
}

impl TokenFile {
    /// How a token file begins.
    pub(crate) const MAGIC: [u8; 8] = Header::MAGIC;

    /// Opens a token file, and checks its header and its size: enough to read it safely, and quick
    /// at any size. [`TokenFile::verify`] reads all of it.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be read; [`Error::Tokens`], naming the file, if it is not a
    /// token file of this version, or is cut short.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let wrong = |problem| Error::Tokens { path: path.to_owned(), problem };
        let file = File::open(path).map_err(read)?;
        let found = file.metadata().map_err(read)?.len();
        if found < Header::BYTES as u64 {
            return Err(wrong(format!("expected a header of {} bytes, found {found}", Header::BYTES)));
        }
        let mut bytes = [0; Header::BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(read)?;
        let header = Header::parse(&bytes).map_err(wrong)?;
        let expected = u128::from(header.train) + u128::from(header.validation);
        let expected = expected * 2 + Header::BYTES as u128;
        if u128::from(found) != expected {
            return Err(wrong(format!("expected {expected} bytes, found {found}")));
        }
        Ok(Self { file, path: path.to_owned(), header })
    }

    /// Reads all tokens, and compares them with the header's checksum.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read; [`Error::Tokens`] if a token is outside the
    /// vocabulary, or the checksum is another.
    pub fn verify(&self) -> Result<()> {
        let mut hash = Xxh3::new();
        for split in [Split::Train, Split::Validation] {
            self.for_each_chunk(split, |chunk| {
                hash.update(little_endian(chunk));
            })?;
        }
        self.header.hash_counts(&mut hash);
        let (expected, found) = (self.header.fingerprint, hash.digest());
        if found == expected {
            return Ok(());
        }
        Err(self.wrong(format!("damaged: expected checksum {expected:016x}, found {found:016x}")))
    }

    fn wrong(&self, problem: String) -> Error {
        Error::Tokens { path: self.path.clone(), problem }
    }

    /// Copies the file into a folder, under its name, and opens the copy.
    ///
    /// # Errors
    /// [`Error::Write`] if it cannot be written, and as for [`TokenFile::open`].
    pub fn copy_into(&self, folder: &Path) -> Result<Self> {
        let name = self.path.file_name().expect("a file has a name");
        let (copy, incomplete) = (folder.join(name), folder.join(name).with_extension("incomplete"));
        let copied = fs::create_dir_all(folder)
            .and_then(|()| fs::copy(&self.path, &incomplete))
            .and_then(|_| File::open(&incomplete)?.sync_all())
            .and_then(|()| fs::rename(&incomplete, &copy));
        copied.map_err(|source| Error::Write { path: copy.clone(), source })?;
        Self::open(&copy)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every token is below this.
    pub fn vocab(&self) -> usize {
        self.header.vocab as usize
    }

    /// Checksum of the tokens and of where the splits divide: the identity of the data.
    pub fn fingerprint(&self) -> u64 {
        self.header.fingerprint
    }

    /// What the file was made from.
    pub fn origin(&self) -> Origin {
        self.header.origin
    }

    /// Whether the tokens are random ones, of no text.
    pub fn is_synthetic(&self) -> bool {
        self.header.origin.files == 0
    }

    /// Tokens in a split.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self, split: Split) -> u64 {
        match split {
            Split::Train => self.header.train,
            Split::Validation => self.header.validation,
        }
    }

    /// Reads `into.len()` tokens of a split, from token `offset` on.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read or was cut short since it was opened;
    /// [`Error::Tokens`] if it is damaged, so that a token is outside the vocabulary.
    ///
    /// # Panics
    /// If the range does not lie within the split.
    pub fn read(&self, split: Split, offset: u64, into: &mut [u16]) -> Result<()> {
        let count = into.len() as u64;
        assert!(
            offset <= self.len(split) && count <= self.len(split) - offset,
            "{count} tokens from {offset} lie outside the {split} split of {}",
            self.len(split)
        );
        let first = match split {
            Split::Train => offset,
            Split::Validation => self.header.train + offset,
        };
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(into), Header::BYTES as u64 + 2 * first)
            .map_err(|source| Error::Read { path: self.path.clone(), source })?;
        for token in &mut *into {
            *token = u16::from_le(*token);
        }
        let vocab = self.vocab();
        match into.iter().find(|&&token| usize::from(token) >= vocab) {
            None => Ok(()),
            Some(token) => Err(self.wrong(format!("damaged: token {token} is outside the vocabulary of {vocab}"))),
        }
    }

    /// Calls `visit` with all tokens of a split, in order, in pieces.
    pub(crate) fn for_each_chunk(&self, split: Split, visit: impl FnMut(&mut [u16])) -> Result<()> {
        self.for_each_chunk_up_to(split, u64::MAX, visit)
    }

    /// As [`for_each_chunk`](Self::for_each_chunk), for the first `most` tokens.
    pub(crate) fn for_each_chunk_up_to(
        &self,
        split: Split,
        most: u64,
        mut visit: impl FnMut(&mut [u16]),
    ) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut offset = 0;
        let end = self.len(split).min(most);
        while offset < end {
            let count = (end - offset).min(buffer.len() as u64);
            let chunk = &mut buffer[..count as usize];
            self.read(split, offset, chunk)?;
            visit(chunk);
            offset += count;
        }
        Ok(())
    }
}

/// Writes a token file; it appears at its destination when [`finish`](Self::finish) returns.
/// Dropping it before leaves nothing behind.
pub(crate) struct TokenWriter {
    destination: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    hash: Xxh3,
    vocab: u32,
    train: u64,
    validation: u64,
}

impl TokenWriter {
    /// For tokens below `vocab`, of which there are at most 2¹⁶.
    pub(crate) fn create(destination: &Path, vocab: usize) -> Result<Self> {
        // A random name, since process numbers repeat between the hosts that share a file system.
        let mut name = OsString::from(destination);
        let random = RandomState::new().build_hasher().finish();
        name.push(format!(".{random:016x}.incomplete"));
        let temporary = PathBuf::from(name);
        let write = |source| Error::Write { path: temporary.clone(), source };
        let file = File::create_new(&temporary).map_err(write)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&[0; Header::BYTES]).map_err(write)?;
        Ok(Self {
            destination: destination.to_owned(),
            temporary,
            out,
            hash: Xxh3::new(),
            vocab: vocab as u32,
            train: 0,
            validation: 0,
        })
    }

    /// Appends tokens to a split. All of the train split comes before the validation split.
    pub(crate) fn push(&mut self, split: Split, tokens: &mut [u16]) -> Result<()> {
        match split {
            Split::Train => {
                assert_eq!(self.validation, 0, "the train split is written first");
                self.train += tokens.len() as u64;
            }
            Split::Validation => self.validation += tokens.len() as u64,
        }
        let bytes = little_endian(tokens);
        self.hash.update(bytes);
        let written = self.out.write_all(bytes);
        self.writing(written)
    }

    pub(crate) fn finish(mut self, origin: Origin) -> Result<()> {
        let mut header =
            Header { vocab: self.vocab, train: self.train, validation: self.validation, origin, fingerprint: 0 };
        header.hash_counts(&mut self.hash);
        header.fingerprint = self.hash.digest();

        let flushed = self.out.flush();
        self.writing(flushed)?;
        let file = self.out.get_ref();
        let written = file
            .write_all_at(&header.bytes(), 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&self.temporary, &self.destination));
        self.writing(written)?;
        // The rename is durable once its folder is.
        let folder = match self.destination.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        self.writing(synced)
    }

    fn writing<T>(&self, result: io::Result<T>) -> Result<T> {
        result.map_err(|source| Error::Write { path: self.temporary.clone(), source })
    }
}

impl Drop for TokenWriter {
    fn drop(&mut self) {
        // After the rename there is nothing under this name, and that is fine.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// The numbers at the head of a token file.
#[derive(Debug)]
struct Header {
    vocab: u32,
    train: u64,
    validation: u64,
    origin: Origin,
    fingerprint: u64,
}

impl Header {
    const BYTES: usize = 72;
    const MAGIC: [u8; 8] = *b"PILLTOKS";

    fn bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(Self::MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.vocab.to_le_bytes());
        for number in
            [self.train, self.validation, self.origin.files, self.origin.bytes, self.origin.not_text, self.fingerprint]
        {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields fill the header")
    }

    /// The header, or what is wrong with it.
    fn parse(bytes: &[u8; Self::BYTES]) -> std::result::Result<Self, String> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if bytes[..8] != Self::MAGIC {
            return Err(format!(
                "not a token file: expected it to begin with {:?}, found {:?}",
                Self::MAGIC.escape_ascii().to_string(),
                bytes[..8].escape_ascii().to_string()
            ));
        }
        if u32_at(8) != VERSION {
            return Err(format!("expected version {VERSION}, found {}", u32_at(8)));
        }
        if xxh3_64(&bytes[..64]) != u64_at(64) {
            return Err(format!(
                "damaged header: expected checksum {:016x}, found {:016x}",
                u64_at(64),
                xxh3_64(&bytes[..64])
            ));
        }
        let vocab = u32_at(12);
        if !(1..=1 << 16).contains(&vocab) {
            return Err(format!("damaged header: a vocabulary of {vocab}, but tokens have 16 bits"));
        }
        Ok(Self {
            vocab,
            train: u64_at(16),
            validation: u64_at(24),
            origin: Origin { files: u64_at(32), bytes: u64_at(40), not_text: u64_at(48) },
            fingerprint: u64_at(56),
        })
    }

    /// Adds the place where the splits divide; the counts are known only after the tokens.
    fn hash_counts(&self, hash: &mut Xxh3) {
        hash.update(&self.train.to_le_bytes());
        hash.update(&self.validation.to_le_bytes());
    }
}

/// The tokens as the bytes they have in the file, converted in place.
fn little_endian(tokens: &mut [u16]) -> &[u8] {
    for token in tokens.iter_mut() {
        *token = token.to_le();
    }
    bytemuck::cast_slice(tokens)
}

#[cfg(test)]
pub(crate) mod tests;
