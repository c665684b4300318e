//! Files of tokens with a plain header, or none.
//!
//! llm.c (`write_datafile` in `dev/data/data_common.py` of karpathy/llm.c): 256 numbers of 32 bits,
//! of which the first three are a magic number, a version and the number of tokens; then the
//! tokens. GPT-2: magic 20240520, version 1, 16 bits. Llama 3: magic 20240801, version 7, 32 bits.
//! Its data scripts write the token of an end of text before each document.
//!
//! nanoGPT (`data/openwebtext/prepare.py` of karpathy/nanoGPT): tokens of 16 bits, with the token of
//! an end of text after each document.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Documents, Element, ForeignFile, Format, vocab_of};
use crate::error::{Error, Result};
use crate::files::Stamp;
use crate::subword::Tokenizer;

const HEADER: usize = 1024;

/// A format of llm.c.
struct Kind {
    magic: u32,
    version: u32,
    format: Format,
    bytes: usize,
    vocab: usize,
    /// The token of an end of text, which begins each document.
    begin: u32,
}

const KINDS: [Kind; 2] = [
    Kind { magic: 20240520, version: 1, format: Format::LlmcGpt2, bytes: 2, vocab: 50257, begin: 50256 },
    Kind { magic: 20240801, version: 7, format: Format::LlmcLlama3, bytes: 4, vocab: 128256, begin: 128000 },
];

pub(super) fn open(path: &Path, tokenizer: Option<&Tokenizer>) -> Result<ForeignFile> {
    let stamp = Stamp::of(path)?;
    let file = File::open(path).map_err(Error::reading(path))?;
    let wrong = |problem: String| Error::bad(path, problem);
    let mut header = [0; HEADER];
    let there = stamp.bytes().min(HEADER as u64) as usize;
    file.read_exact_at(&mut header[..there], 0).map_err(Error::reading(path))?;
    let number = |at: usize| u32::from_le_bytes(header[4 * at..4 * at + 4].try_into().expect("4 bytes"));
    let Some(kind) = KINDS.iter().find(|kind| there >= 4 && kind.magic == number(0)) else {
        return nano_gpt(path, file, stamp, tokenizer);
    };
    let name = kind.format;
    if there < HEADER {
        return Err(wrong(format!(
            "cut short: a file of {name} has a header of {HEADER} bytes, this one {there} bytes"
        )));
    }
    if number(1) != kind.version {
        return Err(wrong(format!("expected version {} of {name}, found {}", kind.version, number(1))));
    }
    let tokens = u64::from(number(2));
    let expected = HEADER as u64 + tokens * kind.bytes as u64;
    if stamp.bytes() != expected {
        let found = stamp.bytes();
        return Err(wrong(format!("damaged or cut short: {tokens} tokens take {expected} bytes, found {found}")));
    }
    if let Some(vocab) = vocab_of(tokenizer).filter(|&vocab| vocab != kind.vocab) {
        let problem = format!("the tokenizer has {vocab} tokens, and a file of {name} {}; give its own", kind.vocab);
        return Err(wrong(problem));
    }
    Ok(ForeignFile {
        path: path.to_owned(),
        file,
        format: name,
        element: Element { bytes: kind.bytes, signed: false },
        first: HEADER as u64,
        tokens,
        vocab: Some(kind.vocab),
        documents: Documents::BeginWith(kind.begin),
        stamps: vec![stamp],
    })
}

fn nano_gpt(path: &Path, file: File, stamp: Stamp, tokenizer: Option<&Tokenizer>) -> Result<ForeignFile> {
    let bytes = stamp.bytes();
    if path.extension().is_none_or(|extension| extension != "bin") {
        let problem = "not a token file that is known: it has no magic number of one, and its name does not end in .bin, \
                       as nanoGPT's do";
        return Err(Error::bad(path, problem));
    }
    if bytes == 0 || !bytes.is_multiple_of(2) {
        let problem = format!("damaged or cut short: tokens of 16 bits (nanoGPT) cannot take {bytes} bytes");
        return Err(Error::bad(path, problem));
    }
    let end = tokenizer.and_then(Tokenizer::end_of_sequence);
    Ok(ForeignFile {
        path: path.to_owned(),
        file,
        format: Format::NanoGpt,
        element: Element { bytes: 2, signed: false },
        first: 0,
        tokens: bytes / 2,
        vocab: vocab_of(tokenizer),
        documents: end.map_or(Documents::Unknown, Documents::EndWith),
        stamps: vec![stamp],
    })
}
