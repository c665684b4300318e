//! Writing the shards of a split.
//!
//! A shard has up to three files: its tokens; the ends of the documents that end in it, each a u64
//! counted in tokens from the beginning of the shard; and a mask, a bit a token, the lowest bit
//! first, set where the token is left out of the loss. A shard in which nothing is left out has no
//! mask. All numbers are little-endian.
//!
//! A document lies in one shard, unless it is longer than a shard may be. Then it is cut into
//! pieces of that length, the first of which begins a shard.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::index::{Kind, Shard, Sums};
use crate::error::{Error, Result};
use crate::tokens::Split;

/// How much of a split has been written and flushed to the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Written {
    /// Shards that are complete.
    pub(super) shards: Vec<Shard>,
    /// The last one, if it is begun.
    pub(super) begun: Option<Begun>,
}

/// A shard that is begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    tokens: u64,
    documents: u64,
    masked: u64,
}

/// Writes a split's shards.
pub(super) struct Writer {
    folder: PathBuf,
    split: Split,
    token_bytes: u32,
    most: u64,
    shards: Vec<Shard>,
    begun: Option<Open>,
}

impl Writer {
    /// Goes on after what was `written`; anything beyond is cut off.
    pub(super) fn new(folder: &Path, split: Split, token_bytes: u32, most: u64, written: Written) -> Result<Self> {
        let mut writer =
            Self { folder: folder.to_owned(), split, token_bytes, most, shards: written.shards, begun: None };
        if let Some(begun) = written.begun {
            writer.begun = Some(Open::again(&writer.path(), token_bytes, begun)?);
        }
        Ok(writer)
    }

    fn name(&self) -> String {
        format!("{}-{:05}", self.split, self.shards.len())
    }

    fn path(&self) -> PathBuf {
        self.folder.join(self.name())
    }

    /// Appends a document; `masked` is empty where nothing is left out.
    pub(super) fn push(&mut self, tokens: &[u32], masked: &[bool]) -> Result<()> {
        let begun = self.begun.as_ref().map_or(0, |open| open.begun.tokens);
        if begun > 0 && tokens.len() as u64 > self.most - begun {
            self.complete()?;
        }
        let piece = usize::try_from(self.most).unwrap_or(usize::MAX).min(tokens.len().max(1));
        let pieces = tokens.chunks(piece).enumerate();
        for (i, piece_tokens) in pieces {
            if i > 0 {
                self.complete()?;
            }
            let open = match &mut self.begun {
                Some(open) => open,
                none => none.insert(Open::new(&self.folder.join(format!("{}-{:05}", self.split, self.shards.len())))?),
            };
            let from = i * piece;
            let masked = if masked.is_empty() { masked } else { &masked[from..from + piece_tokens.len()] };
            open.push(piece_tokens, masked, self.token_bytes)?;
        }
        match &mut self.begun {
            Some(open) => open.end_document(),
            None => Ok(()),
        }
    }

    /// Flushes what has been pushed to the disk, and says how much it is.
    pub(super) fn flush(&mut self) -> Result<Written> {
        let begun = match &mut self.begun {
            Some(open) => {
                open.flush()?;
                Some(open.begun)
            }
            None => None,
        };
        Ok(Written { shards: self.shards.clone(), begun })
    }

    /// Completes the last shard.
    pub(super) fn complete(&mut self) -> Result<()> {
        let name = self.name();
        if let Some(open) = self.begun.take() {
            self.shards.push(open.complete(name)?);
        }
        Ok(())
    }

    pub(super) fn into_shards(self) -> Vec<Shard> {
        self.shards
    }
}

struct Open {
    path: PathBuf,
    begun: Begun,
    tokens: Stream,
    documents: Stream,
    mask: Option<Mask>,
}

impl Open {
    fn new(path: &Path) -> Result<Self> {
        let stream = |kind: Kind| Stream::at(&file(path, kind), 0);
        // Of an interrupted run.
        remove(&file(path, Kind::Mask))?;
        Ok(Self {
            path: path.to_owned(),
            begun: Begun::default(),
            tokens: stream(Kind::Tokens)?,
            documents: stream(Kind::Documents)?,
            mask: None,
        })
    }

    fn again(path: &Path, token_bytes: u32, begun: Begun) -> Result<Self> {
        let tokens = Stream::at(&file(path, Kind::Tokens), begun.tokens * u64::from(token_bytes))?;
        let documents = Stream::at(&file(path, Kind::Documents), begun.documents * 8)?;
        let mask = match begun.masked {
            0 => {
                remove(&file(path, Kind::Mask))?;
                None
            }
            _ => Some(Mask::again(&file(path, Kind::Mask), begun.tokens)?),
        };
        Ok(Self { path: path.to_owned(), begun, tokens, documents, mask })
    }

    fn push(&mut self, tokens: &[u32], masked: &[bool], token_bytes: u32) -> Result<()> {
        let count = masked.iter().filter(|&&masked| masked).count() as u64;
        if count > 0 && self.mask.is_none() {
            self.mask = Some(Mask::after_zeros(&file(&self.path, Kind::Mask), self.begun.tokens)?);
        }
        if let Some(mask) = &mut self.mask {
            mask.push(masked, tokens.len())?;
        }
        let mut bytes = Vec::with_capacity(tokens.len() * token_bytes as usize);
        for token in tokens {
            match token_bytes {
                2 => bytes.extend(u16::try_from(*token).expect("below a vocabulary of 16 bits").to_le_bytes()),
                _ => bytes.extend(token.to_le_bytes()),
            }
        }
        self.tokens.write(&bytes)?;
        self.begun.tokens += tokens.len() as u64;
        self.begun.masked += count;
        Ok(())
    }

    fn end_document(&mut self) -> Result<()> {
        self.begun.documents += 1;
        self.documents.write(&self.begun.tokens.to_le_bytes())
    }

    fn flush(&mut self) -> Result<()> {
        self.tokens.flush()?;
        self.documents.flush()?;
        self.mask.as_mut().map_or(Ok(()), Mask::flush)
    }

    fn complete(mut self, name: String) -> Result<Shard> {
        if let Some(mask) = &mut self.mask {
            mask.close()?;
        }
        self.flush()?;
        let sums = Sums {
            tokens: self.tokens.sum(),
            documents: self.documents.sum(),
            mask: self.mask.as_ref().map(|mask| mask.stream.sum()),
        };
        let Begun { tokens, documents, masked } = self.begun;
        Ok(Shard { name, tokens, documents, masked, xxh3: sums })
    }
}

fn file(shard: &Path, kind: Kind) -> PathBuf {
    let name = shard.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    shard.with_file_name(kind.file(&name))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// A file that grows, and the checksum of what is in it.
struct Stream {
    path: PathBuf,
    out: BufWriter<File>,
    hash: Xxh3,
}

impl Stream {
    /// Goes on after `bytes` bytes of a file, which is made if they are none.
    fn at(path: &Path, bytes: u64) -> Result<Self> {
        Self::before(path, bytes, bytes)
    }

    /// The same, but of what follows, the file keeps what lies before `kept`: it has not been counted
    /// yet, and is written anew.
    fn before(path: &Path, bytes: u64, kept: u64) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(kept == 0).truncate(kept == 0);
        let mut file = options.open(path).map_err(Error::writing(path))?;
        let found = file.metadata().map_err(Error::reading(path))?.len();
        if found < kept {
            let problem = format!("has {found} bytes, but {kept} were written; begin anew with --restart");
            return Err(Error::bad(path, problem));
        }
        file.set_len(kept).map_err(Error::writing(path))?;
        let mut hash = Xxh3::new();
        let mut reader = BufReader::with_capacity(1 << 20, &file).take(bytes);
        let mut buffer = vec![0; 1 << 16];
        loop {
            match reader.read(&mut buffer).map_err(Error::reading(path))? {
                0 => break,
                read => hash.update(&buffer[..read]),
            }
        }
        file.seek(SeekFrom::Start(bytes)).map_err(Error::writing(path))?;
        Ok(Self { path: path.to_owned(), out: BufWriter::with_capacity(1 << 18, file), hash })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes).map_err(Error::writing(&self.path))
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush().and_then(|()| self.out.get_ref().sync_data()).map_err(Error::writing(&self.path))
    }

    fn sum(&self) -> String {
        format!("{:016x}", self.hash.digest())
    }
}

/// A bit a token. The last byte is written anew as long as it is not full.
struct Mask {
    stream: Stream,
    tokens: u64,
    /// The bits of the last byte.
    partial: u8,
}

impl Mask {
    /// Nothing was left out of the first `tokens` tokens.
    fn after_zeros(path: &Path, tokens: u64) -> Result<Self> {
        let mut stream = Stream::at(path, 0)?;
        let zeros = [0; 1 << 12];
        let mut rest = tokens / 8;
        while rest > 0 {
            let count = rest.min(zeros.len() as u64);
            stream.write(&zeros[..count as usize])?;
            rest -= count;
        }
        Ok(Self { stream, tokens, partial: 0 })
    }

    fn again(path: &Path, tokens: u64) -> Result<Self> {
        let mut partial = [0];
        if !tokens.is_multiple_of(8) {
            let file = File::open(path).map_err(Error::reading(path))?;
            file.read_exact_at(&mut partial, tokens / 8).map_err(Error::reading(path))?;
            // An interrupted run may have set bits of tokens that are not there any more.
            partial[0] &= (1 << (tokens % 8)) - 1;
        }
        // The last byte stays until it is written anew: this run may be interrupted before.
        let stream = Stream::before(path, tokens / 8, tokens.div_ceil(8))?;
        Ok(Self { stream, tokens, partial: partial[0] })
    }

    /// Appends the bits of `count` tokens; `masked` is empty where none is left out.
    fn push(&mut self, masked: &[bool], count: usize) -> Result<()> {
        let mut bytes = Vec::with_capacity(count / 8 + 1);
        for i in 0..count {
            let bit = self.tokens % 8;
            self.partial |= u8::from(masked.get(i).copied().unwrap_or(false)) << bit;
            self.tokens += 1;
            if bit == 7 {
                bytes.push(std::mem::take(&mut self.partial));
            }
        }
        self.stream.write(&bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.stream.flush()?;
        if !self.tokens.is_multiple_of(8) {
            let file = self.stream.out.get_ref();
            let written = file.write_all_at(&[self.partial], self.tokens / 8).and_then(|()| file.sync_data());
            written.map_err(Error::writing(&self.stream.path))?;
        }
        Ok(())
    }

    /// Writes the last byte.
    fn close(&mut self) -> Result<()> {
        if !self.tokens.is_multiple_of(8) {
            self.stream.write(&[self.partial])?;
            self.tokens = self.tokens.next_multiple_of(8);
        }
        Ok(())
    }
}
