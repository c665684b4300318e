//! What can go wrong between a path and a batch, each with the way out.

use std::path::{Path, PathBuf};

use crate::guard::plain;

/// A `Result` with the errors of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why text could not be found, tokenized or read back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path given with `--data` does not exist.
    #[error("--data {}: no such file or folder; check the path", path.display())]
    Missing {
        /// The path that was given.
        path: PathBuf,
    },
    /// The path exists but is a pipe, a device or a socket.
    #[error(
        "--data {}: neither a file nor a folder, but a pipe, a terminal or a device, which cannot be read twice; \
         write the text to a file first and give that",
        path.display()
    )]
    NotAFile {
        /// The path that was given.
        path: PathBuf,
    },
    /// The path is `-`, which stands for stdin elsewhere.
    #[error(
        "--data -: stdin is not read, because it cannot be read twice; write the text to a file first and give that"
    )]
    Stdin,
    /// The one file given with `--data` is not UTF-8.
    #[error(
        "--data {}: not UTF-8 text (byte {offset} fits no character); convert it, for example \
         with iconv, or give another file",
        path.display()
    )]
    NotText {
        /// The file.
        path: PathBuf,
        /// Offset in bytes of the first byte that is part of no character.
        offset: u64,
    },
    /// Nothing to train on is left after looking through the path.
    #[error(
        "--data {}: no text in it ({found}); give a file or folder with UTF-8 text",
        path.display()
    )]
    NoText {
        /// The path that was given.
        path: PathBuf,
        /// What was found in place of text.
        found: String,
    },
    /// The default data needs sources that are not on this machine.
    #[error(
        "no crate sources in {looked_in}, where the default data comes from; \
         set CARGO_HOME, run `cargo fetch`, or give your own text with --data PATH"
    )]
    NoCrates {
        /// Where the sources were expected.
        looked_in: String,
    },
    /// A file changed between being listed and being read.
    #[error(
        "{} changed while it was being tokenized (expected {expected} bytes); run again",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its size in bytes when it was listed.
        expected: u64,
    },
    /// The operating system refused to read.
    #[error("cannot read {}: {source}; check that the path is there and its permissions", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system refused to write.
    #[error("cannot write {}: {}; check its permissions and the free space", path.display(), pillion_collectives::limits::explain(source))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The token file is damaged, cut short or not ours.
    #[error("token file {}: {problem}; if a run made this file and the text is as it was, delete the file, and the next run makes it again", path.display())]
    Tokens {
        /// The token file.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
    },
    /// A file or folder that is not what it should be: a tokenizer, text, tokens.
    #[error("{}: {problem}", path.display())]
    Bad {
        /// The file or folder.
        path: PathBuf,
        /// Where in the file, what is wrong, and the remedy.
        problem: String,
    },
    /// The system starts no thread that reads.
    #[error("no thread to read data with can be started: {}", pillion_collectives::limits::explain_thread(.0))]
    Thread(std::io::Error),
    /// A setting of `pillion tokenize`.
    #[error("{0}")]
    Setting(String),
    /// The caller of `tokenize` has stopped it.
    #[error("stopped; the same command goes on from here")]
    Stopped,
    /// A split does not fill one sequence.
    #[error(
        "the {split} split of {} has {tokens} tokens, but a sequence of {seq} needs {}; \
         give more text with --data PATH or a shorter sequence",
        path.display(), seq + 1
    )]
    TooShort {
        /// The token file.
        path: PathBuf,
        /// `train` or `validation`.
        split: super::Split,
        /// Tokens in the split.
        tokens: u64,
        /// Sequence length in tokens; a sample is one token longer, for the last target.
        seq: u64,
    },
    /// A sequence length of zero.
    #[error("a sequence of 0 tokens trains nothing; give a sequence length of 1 or more")]
    EmptySequence,
}

impl Error {
    /// The problem may quote the file: it is a line without control characters all the same.
    pub(crate) fn bad(path: impl Into<PathBuf>, problem: impl AsRef<str>) -> Self {
        Self::Bad { path: path.into(), problem: plain(problem.as_ref()) }
    }

    pub(crate) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn writing(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Write { path: path.to_owned(), source }
    }
}
