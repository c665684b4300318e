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
//! | `runs` | what runs write, by name |
//! | `mixture` | which source a sample is from |
//! | `order` | which sample comes next |
//! | `dataset` | samples and validation windows |
//! | `validation` | tokens to validate on besides those of a run |
//! | `read_ahead` | the thread that reads samples while a step computes |
//! | `trigram` | the mark to beat |
//! | `subword` | tokenizers of Hugging Face, and chats as text |
//! | `documents` | documents from files of text, JSON lines and parquet |
//! | `folder` | the token folder: making it, and reading it |
//! | `foreign` | token files of other programs |
//! | `any` | tokens, whatever they are stored in |
//! | `guard` | calls into crates that panic on damaged files |
//! | `files`, `durable` | files that are read for long; files that are written whole |
#![forbid(unsafe_code)]

mod any;
mod batch;
mod corpus;
mod dataset;
mod documents;
mod durable;
mod error;
mod files;
mod folder;
mod foreign;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod guard;
pub mod mixture;
mod order;
mod read_ahead;
pub mod runs;
mod sources;
mod subword;
pub mod synthetic;
mod tokenize;
pub mod tokenizer;
mod tokens;
pub mod trigram;
mod validation;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

pub use any::{Tokens, Watch};
pub use batch::{Batch, Row};
pub use dataset::Dataset;
pub use error::{Error, Result};
pub use folder::index::{Index, Made, Shard, Shards, Sums};
pub use folder::make::{Append, Outcome, Settings, Watched, tokenize as tokenize_folder};
pub use folder::{TokenFolder, is_token_folder};
pub use foreign::{ForeignFile, Format};
pub use guard::is_guarded;
pub use order::SampleOrder;
pub use read_ahead::ReadAhead;
pub use sources::Skipped;
pub use subword::chat::ChatTemplate;
pub use subword::{Stream, Tokenizer};
pub use tokens::{Origin, Split, TokenFile};
pub use validation::ValidationSet;

use sources::{Division, Sources};

/// Text that is ready to train on.
#[derive(Debug)]
#[non_exhaustive]
pub struct Prepared {
    /// The token file.
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
/// The token file lies in `cache`, which is made if need be. Its name is a hash of the content of
/// every file found and of all that decides how they become tokens, so changed text is tokenized
/// afresh, and moved text is not. Any number of processes may prepare the same text at once.
///
/// # Errors
/// See [`Error`]: no text at the path, an unreadable file, a cache that cannot be written, a token
/// file in it whose header is damaged.
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
    let path = cache.join(format!("text-{:016x}.tokens", key(&sources)?));
    if !path.exists() {
        tokenize::tokenize(&sources, &path)?;
    }
    let tokens = TokenFile::open(&path)?;
    let origin = tokens.origin();
    let skipped = Skipped { not_text: origin.not_text, ..sources.skipped };
    if let (Some(data), 0) = (data, origin.files) {
        return Err(sources::no_text(data, &skipped));
    }
    let summary = Summary { missing, skipped: Some(skipped), ..Summary::of(&tokens, description) };
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
    let tokens = TokenFile::open(&path)?;
    let summary = Summary::of(&tokens, format!("random tokens, each of {vocab} as likely as the others"));
    Ok(Prepared { tokens, summary })
}

/// The token file of this fingerprint in one of `folders`, if there is one: for a run that goes on.
/// Files that are no token files are passed over.
///
/// # Errors
/// [`Error::Read`] if a folder that exists cannot be listed.
pub fn find(fingerprint: u64, folders: &[PathBuf]) -> Result<Option<TokenFile>> {
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        let unreadable = |source| Error::Read { path: folder.clone(), source };
        let entries = fs::read_dir(folder).map_err(unreadable)?.collect::<std::result::Result<Vec<_>, _>>();
        let files = entries.map_err(unreadable)?.into_iter().map(|entry| entry.path());
        let named = files.filter(|path| path.extension().is_some_and(|extension| extension == "tokens"));
        let found = named.filter_map(|path| TokenFile::open(&path).ok()).find(|file| file.fingerprint() == fingerprint);
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Checks that a path that the user gives can be text at all, before anything is begun.
///
/// # Errors
/// [`Error`] that names the path, and what it is instead of a file or a folder.
pub fn check(path: &Path) -> Result<()> {
    sources::check(path).map(drop)
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
    /// What was left out when the text was looked through; none where a run goes on with its
    /// tokens.
    pub skipped: Option<Skipped>,
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
    /// Of a token file, whose text is described in words.
    pub fn of(tokens: &TokenFile, description: String) -> Summary {
        let Origin { files, bytes, .. } = tokens.origin();
        Summary {
            description,
            missing: Vec::new(),
            files,
            bytes,
            skipped: None,
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
                write!(f, "data: {}: {files} files, {megabytes:.1} MB", self.description)?;
                match &self.skipped {
                    Some(skipped) => writeln!(f, "; skipped: {skipped}")?,
                    None => writeln!(f)?,
                }
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
fn key(sources: &Sources) -> Result<u64> {
    let mut hash = Xxh3::new();
    hash.update(&tokens::VERSION.to_le_bytes());
    hash.update(&(tokenizer::VOCAB as u64).to_le_bytes());
    for (i, file) in sources.files.iter().enumerate() {
        hash.update(&file.bytes.to_le_bytes());
        tokenize::for_each_chunk(file, 0..file.bytes, |bytes| {
            hash.update(bytes);
            Ok(())
        })?;
        hash.update(&[match &sources.division {
            Division::Tail => 0,
            Division::Given(splits) => 1 + u8::from(splits[i] == Split::Validation),
        }]);
    }
    Ok(hash.digest())
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
        assert_eq!(first.skipped.unwrap().not_text, 1);
        assert_eq!(first.train_tokens + first.validation_tokens, first.bytes + 40);
        let made = fs::metadata(&first.path).unwrap().modified().unwrap();
        assert_eq!(prepare(Some(text.path()), &cache).unwrap().summary, first);
        assert_eq!(fs::metadata(&first.path).unwrap().modified().unwrap(), made);

        // As long, and as old as it was.
        let file = text.path().join("0.txt");
        let (content, changed) = (fs::read_to_string(&file).unwrap(), fs::metadata(&file).unwrap().modified().unwrap());
        fs::write(&file, content.replace("document", "DOCUMENT")).unwrap();
        fs::File::open(&file).unwrap().set_modified(changed).unwrap();
        let second = prepare(Some(text.path()), &cache).unwrap().summary;
        assert_ne!(second.path, first.path);
        assert_ne!(second.fingerprint, first.fingerprint);
    }

    #[test]
    fn a_token_file_is_found_by_its_fingerprint_among_others() {
        let (text, cache) = (text_folder(), tempfile::tempdir().unwrap());
        let first = prepare(Some(text.path()), cache.path()).unwrap().summary;
        fs::write(text.path().join("0.txt"), "another").unwrap();
        let second = prepare(Some(text.path()), cache.path()).unwrap().summary;
        fs::write(cache.path().join("foreign.tokens"), "not one").unwrap();
        let folders = [cache.path().join("none"), cache.path().to_owned()];
        for summary in [&first, &second] {
            assert_eq!(find(summary.fingerprint, &folders).unwrap().unwrap().path(), summary.path);
        }
        assert!(find(first.fingerprint ^ 1, &folders).unwrap().is_none());
    }

    #[test]
    fn what_runs_have_written_is_not_text() {
        let (text, cache) = (text_folder(), tempfile::tempdir().unwrap());
        let before = prepare(Some(text.path()), cache.path()).unwrap().summary;
        // A run in the text's folder itself, and one below, whose files are all text.
        for folder in [text.path().to_owned(), text.path().join("runs/one")] {
            fs::create_dir_all(folder.join("checkpoints/step-00000001")).unwrap();
            for name in [".pillion.lock", "metrics.jsonl", "trace.json", "checkpoints/step-00000001/manifest.json"] {
                fs::write(folder.join(name), "text").unwrap();
            }
        }
        fs::write(text.path().join("runs/one/notes"), "text").unwrap();
        let after = prepare(Some(text.path()), cache.path()).unwrap().summary;
        assert_eq!((after.fingerprint, after.files), (before.fingerprint, before.files));
        assert_eq!(after.skipped.unwrap().runs, 4, "three names beside the text, and a folder: {after}");
    }

    #[test]
    fn all_that_decides_the_tokens_is_in_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let key_of = |contents: &[&str], division| {
            let file = |(i, content): (usize, &&str)| {
                let path = folder.path().join(i.to_string());
                fs::write(&path, content).unwrap();
                sources::SourceFile { path, bytes: content.len() as u64 }
            };
            let files = contents.iter().enumerate().map(file).collect();
            key(&Sources { files, division, skipped: Skipped::default() }).unwrap()
        };
        let mut keys = vec![
            key_of(&["ab", "c"], Division::Tail),
            key_of(&["a", "bc"], Division::Tail),
            key_of(&["c", "ab"], Division::Tail),
            key_of(&["abc"], Division::Tail),
            key_of(&["abc"], Division::Given(vec![Split::Train])),
            key_of(&["abc"], Division::Given(vec![Split::Validation])),
        ];
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 6);
    }

    #[test]
    fn the_fingerprint_is_that_of_the_text_wherever_it_lies() {
        let cache = tempfile::tempdir().unwrap();
        let [one, two] =
            [text_folder(), text_folder()].map(|text| prepare(Some(text.path()), cache.path()).unwrap().summary);
        assert_eq!((one.path, one.fingerprint), (two.path, two.fingerprint));
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
        let whole = fs::read(&path).unwrap();
        let damaged = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
            prepare(Some(text.path()), cache.path())
        };
        for error in [damaged(20).unwrap_err(), damaged(1000).unwrap().tokens.verify().unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
            assert!(error.contains("delete the file"), "{error}");
        }
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
        let data = Dataset::open(Tokens::of_file(prepared.tokens).unwrap(), 256, tokenizer::VOCAB, 1).unwrap();
        let nats = trigram::loss(&data, data.validation_len()).unwrap();
        println!("trigram: {nats:.4} nats a token");
        // Shannon (1951) measured 2.3 nats a letter for trigrams of English, spaces left out; code
        // with its indentation is more regular, yet not so that three bytes say nearly all.
        assert!(nats > 1.0 && nats < 2.3, "{nats}");
    }
}
