//! Megatron-LM's indexed datasets (`megatron/core/datasets/indexed_dataset.py` of
//! NVIDIA/Megatron-LM; `MMapIndexedDataset` in earlier versions has the same layout).
//!
//! ```text
//! .idx  0..9    "MMIDIDX\0\0"
//!       9..17   version, 1                        u64
//!      17       type of the tokens                u8
//!      18..26   sequences                         u64
//!      26..34   document indices: documents + 1   u64
//!      34..     tokens of each sequence           i32
//!               where it begins in the .bin       i64, in bytes
//!               first sequence of each document, and the number of sequences   i64
//!               a mode of each sequence, in newer multimodal files             i8
//! .bin          the tokens
//! ```

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::{Documents, Element, ForeignFile, Format, vocab_of};
use crate::error::{Error, Result};
use crate::files::Stamp;
use crate::subword::Tokenizer;

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const HEADER: u64 = 34;

/// An index.
#[derive(Debug)]
pub(super) struct Megatron {
    path: PathBuf,
    file: File,
    sequences: u64,
    documents: u64,
    /// Bytes of a token.
    size: u64,
    tokens: u64,
}

pub(super) fn open(bin: &Path, index: &Path, tokenizer: Option<&Tokenizer>) -> Result<ForeignFile> {
    let stamps = vec![Stamp::of(index)?, Stamp::of(bin)?];
    let (file, tokens_file) =
        (File::open(index).map_err(Error::reading(index))?, File::open(bin).map_err(Error::reading(bin))?);
    let wrong = |problem: String| Error::bad(index, problem);
    let found = stamps[0].bytes();
    let mut header = [0; HEADER as usize];
    if found < HEADER {
        return Err(wrong(format!("cut short: an index of Megatron has {HEADER} bytes or more, this one {found}")));
    }
    file.read_exact_at(&mut header, 0).map_err(Error::reading(index))?;
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    if header[..9] != MAGIC[..] {
        return Err(wrong("no index of Megatron: it does not begin with MMIDIDX".to_owned()));
    }
    if number(9) != 1 {
        return Err(wrong(format!("expected version 1 of Megatron's index, found {}", number(9))));
    }
    let element = match header[17] {
        1 => Element { bytes: 1, signed: false },
        2 => Element { bytes: 1, signed: true },
        3 => Element { bytes: 2, signed: true },
        4 => Element { bytes: 4, signed: true },
        5 => Element { bytes: 8, signed: true },
        8 => Element { bytes: 2, signed: false },
        other => return Err(wrong(format!("its tokens have the type {other}, which is none of whole numbers"))),
    };
    let (sequences, bounds) = (number(18), number(26));
    let expected = u128::from(HEADER) + u128::from(sequences) * 12 + u128::from(bounds) * 8;
    let has_modes = u128::from(found) == expected + u128::from(sequences) && sequences > 0;
    if u128::from(found) != expected && !has_modes {
        let problem = format!("damaged or cut short: {sequences} sequences take {expected} bytes, found {found}");
        return Err(wrong(problem));
    }
    if bounds == 0 {
        return Err(wrong("damaged: it has no bounds of documents".to_owned()));
    }
    let size = element.bytes as u64;
    if !stamps[1].bytes().is_multiple_of(size) {
        let problem = format!("damaged or cut short: {} bytes are no tokens of {size} bytes", stamps[1].bytes());
        return Err(Error::bad(bin, problem));
    }
    let tokens = stamps[1].bytes() / size;
    let megatron = Megatron { path: index.to_owned(), file, sequences, documents: bounds - 1, size, tokens };
    let end = match sequences {
        0 => 0,
        _ => megatron.pointer(sequences - 1)?.saturating_add(megatron.length(sequences - 1)?.saturating_mul(size)),
    };
    if end != stamps[1].bytes() {
        let problem = format!("damaged or cut short: its index ends at byte {end}, the file at {}", stamps[1].bytes());
        return Err(Error::bad(bin, problem));
    }
    if megatron.bound(bounds - 1)? != sequences {
        return Err(wrong(format!("damaged: its last document does not end with the last of {sequences} sequences")));
    }
    Ok(ForeignFile {
        path: bin.to_owned(),
        file: tokens_file,
        format: Format::Megatron,
        element,
        first: 0,
        tokens,
        vocab: vocab_of(tokenizer),
        documents: Documents::Indexed(megatron),
        stamps,
    })
}

impl Megatron {
    pub(super) fn documents(&self) -> u64 {
        self.documents
    }

    fn length(&self, sequence: u64) -> Result<u64> {
        let mut raw = [0; 4];
        self.read(HEADER + 4 * sequence, &mut raw)?;
        u64::try_from(i32::from_le_bytes(raw)).map_err(|_| self.wrong(format!("sequence {sequence} has no length")))
    }

    /// Where a sequence begins, in bytes.
    fn pointer(&self, sequence: u64) -> Result<u64> {
        self.number(HEADER + 4 * self.sequences + 8 * sequence)
    }

    /// The first sequence of a document, or the number of sequences after the last.
    fn bound(&self, document: u64) -> Result<u64> {
        let bound = self.number(HEADER + 12 * self.sequences + 8 * document)?;
        if bound > self.sequences {
            return Err(self.wrong(format!("document {document} begins at sequence {bound} of {}", self.sequences)));
        }
        Ok(bound)
    }

    fn number(&self, at: u64) -> Result<u64> {
        let mut raw = [0; 8];
        self.read(at, &mut raw)?;
        u64::try_from(i64::from_le_bytes(raw)).map_err(|_| self.wrong(format!("a negative number at byte {at}")))
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(into, at).map_err(Error::reading(&self.path))
    }

    fn wrong(&self, problem: String) -> Error {
        Error::bad(&self.path, format!("damaged: {problem}"))
    }

    /// The token at which a document begins; the number of tokens after the last.
    fn start(&self, document: u64) -> Result<u64> {
        match self.bound(document)? {
            bound if bound == self.sequences => Ok(self.tokens),
            bound => Ok(self.pointer(bound)? / self.size),
        }
    }

    /// Where documents begin within a range.
    pub(super) fn starts(&self, range: Range<u64>) -> Result<Vec<u64>> {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.start(middle)? < range.start { low = middle + 1 } else { high = middle }
        }
        let mut starts = Vec::new();
        for document in low..self.documents {
            let start = self.start(document)?;
            if start >= range.end {
                break;
            }
            if start < range.start || starts.last().is_some_and(|&last| start < last) {
                return Err(self.wrong(format!("document {document} begins at token {start}, out of order")));
            }
            // Documents without a token begin where the next one does.
            if starts.last() != Some(&start) {
                starts.push(start);
            }
        }
        Ok(starts)
    }

    /// Sequences lie one after the other, and documents are in order.
    pub(super) fn verify(&self) -> Result<()> {
        let mut at = 0;
        for sequence in 0..self.sequences {
            let (begins, length) = (self.pointer(sequence)?, self.length(sequence)?);
            if begins != at {
                return Err(self.wrong(format!("sequence {sequence} begins at byte {begins}, not at {at}")));
            }
            at = begins + length * self.size;
        }
        let mut last = 0;
        for document in 0..=self.documents {
            let bound = self.bound(document)?;
            if bound < last || (document == 0 && bound != 0) {
                return Err(self.wrong(format!("document {document} begins at sequence {bound}, after {last}")));
            }
            last = bound;
        }
        Ok(())
    }

    pub(super) fn hash(&self, hash: &mut Xxh3) -> Result<()> {
        let mut header = [0; HEADER as usize];
        self.read(0, &mut header)?;
        hash.update(&header);
        Ok(())
    }
}
