//! Text in, batches out.
//!
//! [`prepare`] finds text, tokenizes it once into a token file in a cache folder, and opens that
//! file; [`Dataset`] cuts it into sequences and says which comes next; [`trigram::loss`] is what a
//! model of counts achieves on the same validation text, the mark to beat.
//!
//! | file | subject |
//! |---|---|
//! | `sources` | files under a path that the user gives |
//! | `corpus` | the default text: sources of the crates we are built from |
//! | `synthetic` | random tokens instead, to measure speed with |
//! | `tokenizer` | bytes to tokens and back |
//! | `tokenize` | files of text to a token file, and where train and validation divide |
//! | `tokens` | the token file |
//! | `order` | which sample comes next |
//! | `dataset` | samples and validation windows |
//! | `trigram` | the mark to beat |

mod corpus;
mod dataset;
mod error;
mod order;
mod sources;
pub mod synthetic;
mod tokenize;
pub mod tokenizer;
mod tokens;
pub mod trigram;

use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

pub use dataset::Dataset;
pub use error::{Error, Result};
pub use order::SampleOrder;
pub use sources::Skipped;
pub use tokens::{Origin, Split, TokenFile};

use sources::{Division, Sources};

/// Text that is ready to train on.
#[derive(Debug)]
#[non_exhaustive]
pub struct Prepared {
    /// The verified token file.
    pub tokens: TokenFile,
    /// What it holds and where that came from, to print.
    pub summary: Summary,
}

/// Finds text and tokenizes it, or opens the token file of an earlier run on the same text.
///
/// With `data` that is a file, which must be UTF-8, or a folder, of which all UTF-8 files are used,
/// sorted by path; the last twentieth of the bytes is for validation, cut between two files where
/// one such place is near. Without `data` it is the sources of the crates that this program is built
/// from, found where cargo keeps them, divided by crate.
///
/// The token file lies in `cache`, which is made if need be. Its name is a hash of the path, size and
/// time of change of every file found and of all that decides how they become tokens, so changed
/// text is tokenized afresh. (A change that keeps both size and time goes unnoticed.) Any number of
/// processes may prepare the same text at once.
///
/// # Errors
/// See [`Error`]: no text at the path, an unreadable file, a cache that cannot be written, a damaged
/// token file in it.
pub fn prepare(data: Option<&Path>, cache: &Path) -> Result<Prepared> {
    let (sources, description, missing) = match data {
        Some(path) => (sources::under(path)?, path.display().to_string(), Vec::new()),
        None => {
            let corpus = corpus::installed()?;
            let listed = corpus::CRATES.len();
            let found = listed - corpus.missing.len();
            let description = format!("sources of {found} of the {listed} crates listed for it");
            (corpus.sources, description, corpus.missing)
        }
    };
    fs::create_dir_all(cache).map_err(|source| Error::Write { path: cache.to_owned(), source })?;
    let path = cache.join(format!("text-{:016x}.tokens", key(&sources)));
    if !path.exists() {
        tokenize::tokenize(&sources, &path)?;
    }
    let tokens = TokenFile::open(&path, tokenizer::VOCAB)?;
    let origin = tokens.origin();
    let skipped = Skipped { not_text: origin.not_text, ..sources.skipped };
    if let (Some(data), 0) = (data, origin.files) {
        return Err(sources::no_text(data, &skipped));
    }
    let summary = Summary { missing, skipped, ..Summary::of(&tokens, description) };
    Ok(Prepared { tokens, summary })
}

/// Random tokens of a vocabulary of `vocab`, made once and kept in `cache`.
///
/// # Errors
/// As for [`prepare`].
///
/// # Panics
/// For a vocabulary beyond [`synthetic::LARGEST_VOCAB`].
pub fn prepare_synthetic(vocab: usize, cache: &Path) -> Result<Prepared> {
    fs::create_dir_all(cache).map_err(|source| Error::Write { path: cache.to_owned(), source })?;
    let path = cache.join(format!("synthetic-{vocab}.tokens"));
    if !path.exists() {
        synthetic::write(vocab, &path)?;
    }
    let tokens = TokenFile::open(&path, vocab)?;
    let summary = Summary::of(&tokens, format!("random tokens, each of {vocab} as likely as the others"));
    Ok(Prepared { tokens, summary })
}

/// What [`prepare`] found. Prints as a few lines for the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Where the text came from, in words.
    pub description: String,
    /// Crates of the default data that are not on this machine. The text is then not that of
    /// other machines, nor is its fingerprint.
    pub missing: Vec<String>,
    /// Files of text.
    pub files: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// What was left out.
    pub skipped: Skipped,
    /// Tokens to learn from.
    pub train_tokens: u64,
    /// Tokens to measure on.
    pub validation_tokens: u64,
    /// Checksum of the tokens and their division, the same wherever the same text is used.
    pub fingerprint: u64,
    /// The token file.
    pub path: PathBuf,
}

impl Summary {
    fn of(tokens: &TokenFile, description: String) -> Summary {
        let Origin { files, bytes, not_text } = tokens.origin();
        Summary {
            description,
            missing: Vec::new(),
            files,
            bytes,
            skipped: Skipped { not_text, ..Skipped::default() },
            train_tokens: tokens.len(Split::Train),
            validation_tokens: tokens.len(Split::Validation),
            fingerprint: tokens.fingerprint(),
            path: tokens.path().to_owned(),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.files {
            0 => writeln!(f, "data: {}", self.description)?,
            files => {
                let megabytes = self.bytes as f64 / 1e6;
                writeln!(f, "data: {}: {files} files, {megabytes:.1} MB; skipped: {}", self.description, self.skipped)?;
            }
        }
        let all = self.train_tokens + self.validation_tokens;
        write!(
            f,
            "tokens: {} train, {} validation ({:.1} %), fingerprint {:016x}, in {}",
            self.train_tokens,
            self.validation_tokens,
            100.0 * self.validation_tokens as f64 / all.max(1) as f64,
            self.fingerprint,
            self.path.display()
        )?;
        if !self.missing.is_empty() {
            write!(
                f,
                "\nwarning: the default data lacks {}, so losses compare with no other machine's; \
                 `cargo fetch` brings them",
                self.missing.join(", ")
            )?;
        }
        Ok(())
    }
}

/// Hash of everything that decides the content of a token file.
fn key(sources: &Sources) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&tokens::VERSION.to_le_bytes());
    hash.update(&(tokenizer::VOCAB as u64).to_le_bytes());
    for (i, file) in sources.files.iter().enumerate() {
        let path = file.path.as_os_str().as_bytes();
        hash.update(&(path.len() as u64).to_le_bytes());
        hash.update(path);
        hash.update(&file.bytes.to_le_bytes());
        hash.update(&file.modified.0.to_le_bytes());
        hash.update(&file.modified.1.to_le_bytes());
        hash.update(&[match &sources.division {
            Division::Tail => 0,
            Division::Given(splits) => 1 + u8::from(splits[i] == Split::Validation),
        }]);
    }
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn text_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..40 {
            let text = format!("document {i}\n").repeat(50);
            fs::write(folder.path().join(format!("{i}.txt")), text).unwrap();
        }
        fs::write(folder.path().join("image"), [0xff, 0xd8]).unwrap();
        folder
    }

    #[test]
    fn the_same_text_is_tokenized_once_and_changed_text_again() {
        let (text, cache) = (text_folder(), tempfile::tempdir().unwrap());
        let cache = cache.path().join("not/yet/there");
        let first = prepare(Some(text.path()), &cache).unwrap().summary;
        assert_eq!(first.files, 40);
        assert_eq!(first.skipped.not_text, 1);
        assert_eq!(first.train_tokens + first.validation_tokens, first.bytes + 40);
        let made = fs::metadata(&first.path).unwrap().modified().unwrap();
        assert_eq!(prepare(Some(text.path()), &cache).unwrap().summary, first);
        assert_eq!(fs::metadata(&first.path).unwrap().modified().unwrap(), made);

        fs::write(text.path().join("0.txt"), "another").unwrap();
        let second = prepare(Some(text.path()), &cache).unwrap().summary;
        assert_ne!(second.path, first.path);
        assert_ne!(second.fingerprint, first.fingerprint);
    }

    #[test]
    fn all_that_decides_the_tokens_is_in_the_key() {
        let file = |path: &str, bytes, modified| sources::SourceFile { path: path.into(), bytes, modified };
        let key_of = |file, division| key(&Sources { files: vec![file], division, skipped: Skipped::default() });
        let mut keys = vec![
            key_of(file("a", 1, (2, 3)), Division::Tail),
            key_of(file("b", 1, (2, 3)), Division::Tail),
            key_of(file("a", 9, (2, 3)), Division::Tail),
            key_of(file("a", 1, (9, 3)), Division::Tail),
            key_of(file("a", 1, (2, 9)), Division::Tail),
            key_of(file("a", 1, (2, 3)), Division::Given(vec![Split::Train])),
            key_of(file("a", 1, (2, 3)), Division::Given(vec![Split::Validation])),
        ];
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 7);
    }

    #[test]
    fn the_fingerprint_is_that_of_the_text_wherever_it_lies() {
        let cache = tempfile::tempdir().unwrap();
        let [one, two] =
            [text_folder(), text_folder()].map(|text| prepare(Some(text.path()), cache.path()).unwrap().summary);
        assert_ne!(one.path, two.path);
        assert_eq!(one.fingerprint, two.fingerprint);
        assert_eq!(fs::read(one.path).unwrap(), fs::read(two.path).unwrap());
    }

    #[test]
    fn synthetic_tokens_are_all_of_the_vocabulary_equally_often() {
        let cache = tempfile::tempdir().unwrap();
        let prepared = prepare_synthetic(300, cache.path()).unwrap();
        let mut counts = vec![0u64; 300];
        prepared
            .tokens
            .for_each_chunk(Split::Train, |tokens| tokens.iter().for_each(|&token| counts[token as usize] += 1))
            .unwrap();
        let mean = prepared.summary.train_tokens as f64 / 300.0;
        // Pearson's statistic has mean 299 and variance 598: ten standard deviations.
        let statistic: f64 = counts.iter().map(|&count| (count as f64 - mean).powi(2) / mean).sum();
        assert!((299.0 - 250.0..299.0 + 250.0).contains(&statistic), "{statistic}");
        let again = prepare_synthetic(300, cache.path()).unwrap();
        assert_eq!(again.summary, prepared.summary);
        assert!(prepared.summary.to_string().starts_with("data: random tokens, each of 300"));
    }

    #[test]
    fn preparing_at_once_gives_everyone_the_same_whole_file() {
        let (text, cache) = (text_folder(), tempfile::tempdir().unwrap());
        let summaries = thread::scope(|scope| {
            let prepare = || prepare(Some(text.path()), cache.path()).unwrap().summary;
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(prepare)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(summaries.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_token_file_in_the_cache_is_named_with_the_way_out() {
        let (text, cache) = (text_folder(), tempfile::tempdir().unwrap());
        let path = prepare(Some(text.path()), cache.path()).unwrap().summary.path;
        let mut bytes = fs::read(&path).unwrap();
        bytes[1000] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = prepare(Some(text.path()), cache.path()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("delete it"), "{error}");
    }

    #[test]
    fn a_folder_of_binary_files_and_an_unusable_cache_are_errors() {
        let (text, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["one", "two"] {
            fs::write(text.path().join(name), [0xff]).unwrap();
        }
        for _ in 0..2 {
            let error = prepare(Some(text.path()), cache.path()).unwrap_err().to_string();
            assert!(error.contains("only these: 2 not UTF-8 text"), "{error}");
        }
        let file = text.path().join("one");
        let error = prepare(Some(text_folder().path()), &file).unwrap_err();
        assert!(matches!(&error, Error::Write { path, .. } if *path == file), "{error}");
    }

    #[test]
    fn the_default_text_prepares_where_cargo_keeps_its_sources() {
        let cache = tempfile::tempdir().unwrap();
        let prepared = match prepare(None, cache.path()) {
            Err(error @ Error::NoCrates { .. }) => {
                // Sources may be vendored elsewhere; the tests of `corpus` bring their own.
                eprintln!("SKIPPED: {error}");
                return;
            }
            prepared => prepared.unwrap(),
        };
        println!("{}", prepared.summary);
        let share = prepared.summary.validation_tokens as f64
            / (prepared.summary.train_tokens + prepared.summary.validation_tokens) as f64;
        assert!((0.02..0.15).contains(&share), "{}", prepared.summary);
        let data = Dataset::open(prepared.tokens, 256, 1).unwrap();
        let nats = trigram::loss(&data, data.validation_len()).unwrap();
        println!("trigram: {nats:.4} nats a token");
        // Shannon (1951) measured 2.3 nats a letter for trigrams of English, spaces left out; code
        // with its indentation is more regular, yet not so that three bytes say nearly all.
        assert!(nats > 1.0 && nats < 2.3, "{nats}");
    }
}
