//! `index.json`: what a token folder holds.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::durable;
use crate::error::{Error, Result};
use crate::tokens::Split;

/// The index's name.
pub(crate) const INDEX: &str = "index.json";
/// What `format` says.
const FORMAT: &str = "pillion-tokens";
/// Version of the layout.
const VERSION: u32 = 1;

/// What is in a token folder. Written last: a folder without one is unfinished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// `pillion-tokens`.
    pub format: String,
    /// Version of the layout.
    pub version: u32,
    /// What made the tokens.
    pub tokenizer: Made,
    /// Every token is below this.
    pub vocabulary: u32,
    /// Bytes of a token: 2 where the vocabulary has at most 2¹⁶ tokens, else 4.
    pub token_bytes: u32,
    /// The token after each document, if there is one.
    pub separator: Option<u32>,
    /// xxh3 of the settings and of the files' names, sizes and times, in hexadecimal.
    pub made_by: String,
    /// What the documents were read from.
    pub origin: Origin,
    /// What a model learns from.
    pub train: Shards,
    /// What its loss is measured on.
    pub validation: Shards,
}

/// A tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// The name of the file that was given.
    pub file: String,
    /// xxh3 of its bytes, in hexadecimal.
    pub xxh3: String,
}

/// What the documents of a token folder were read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Files.
    pub files: u64,
    /// Bytes of their texts, as UTF-8.
    pub bytes: u64,
    /// Documents without a character, which were left out.
    pub empty: u64,
    /// Documents, or rests of files, that could not be read, and were left out by `--skip-bad`.
    pub bad: u64,
}

/// The shards of a split.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shards {
    /// Tokens in all.
    pub tokens: u64,
    /// Documents in all.
    pub documents: u64,
    /// Tokens in all that are left out of the loss.
    pub masked: u64,
    /// In their order.
    pub shards: Vec<Shard>,
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// The beginning of its files' names.
    pub name: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Documents that end in it.
    pub documents: u64,
    /// Tokens of it that are left out of the loss.
    pub masked: u64,
    /// Checksums of its files.
    pub xxh3: Sums,
}

/// xxh3 of a shard's files, in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// Of the tokens.
    pub tokens: String,
    /// Of the ends of documents.
    pub documents: String,
    /// Of the mask, where there is one.
    pub mask: Option<String>,
}

/// The files of a shard, by what follows its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tokens,
    Documents,
    Mask,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Tokens, Self::Documents, Self::Mask];

    pub(crate) fn file(self, shard: &str) -> String {
        let extension = match self {
            Self::Tokens => "tokens",
            Self::Documents => "documents",
            Self::Mask => "mask",
        };
        format!("{shard}.{extension}")
    }
}

impl Shard {
    /// The size of one of its files in bytes; `None` where it has none of that kind.
    pub(crate) fn bytes(&self, kind: Kind, token_bytes: u32) -> Option<u64> {
        match kind {
            Kind::Tokens => self.tokens.checked_mul(u64::from(token_bytes)),
            Kind::Documents => self.documents.checked_mul(8),
            Kind::Mask => self.xxh3.mask.is_some().then(|| self.tokens.div_ceil(8)),
        }
    }

    pub(crate) fn sum(&self, kind: Kind) -> Option<&str> {
        match kind {
            Kind::Tokens => Some(&self.xxh3.tokens),
            Kind::Documents => Some(&self.xxh3.documents),
            Kind::Mask => self.xxh3.mask.as_deref(),
        }
    }
}

impl Shards {
    pub(crate) fn of(shards: Vec<Shard>) -> Self {
        let sum = |number: fn(&Shard) -> u64| shards.iter().map(number).sum();
        Self {
            tokens: sum(|shard| shard.tokens),
            documents: sum(|shard| shard.documents),
            masked: sum(|shard| shard.masked),
            shards,
        }
    }
}

impl Index {
    pub(crate) fn new(
        tokenizer: Made,
        vocabulary: u32,
        separator: Option<u32>,
        made_by: String,
        origin: Origin,
        [train, validation]: [Shards; 2],
    ) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            tokenizer,
            vocabulary,
            token_bytes: token_bytes(vocabulary),
            separator,
            made_by,
            origin,
            train,
            validation,
        }
    }

    /// The shards of a split.
    pub fn split(&self, split: Split) -> &Shards {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// The identity of the data: what the tokens are and where documents end, not what they were
    /// read from.
    pub(crate) fn fingerprint(&self) -> u64 {
        let identity = (&self.tokenizer.xxh3, self.vocabulary, self.separator, &self.train, &self.validation);
        xxh3_64(&serde_json::to_vec(&identity).expect("plain values"))
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).expect("plain values");
        text.push('\n');
        durable::write(&folder.join(INDEX), text.as_bytes())
    }

    /// Reads the index of a folder, and checks that its numbers agree.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX);
        let text = fs::read(&path).map_err(Error::reading(&path))?;
        let wrong =
            |problem: String| Error::bad(&path, format!("{problem}; make the folder again with pillion tokenize"));
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| wrong(format!("damaged, or no index of tokens: {error}")))?;
        if value["format"] != FORMAT {
            return Err(wrong(format!("no index of tokens: expected the format {FORMAT:?}")));
        }
        if value["version"] != VERSION {
            return Err(wrong(format!("expected version {VERSION}, found {}", value["version"])));
        }
        let index: Self = serde_json::from_value(value).map_err(|error| wrong(format!("damaged: {error}")))?;
        index.check().map_err(wrong)?;
        Ok(index)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.vocabulary == 0 || self.token_bytes != token_bytes(self.vocabulary) {
            return Err(format!("damaged: {} bytes a token for a vocabulary of {}", self.token_bytes, self.vocabulary));
        }
        for split in [Split::Train, Split::Validation] {
            let shards = self.split(split);
            let sum =
                |number: fn(&Shard) -> u64| shards.shards.iter().try_fold(0u64, |sum, it| sum.checked_add(number(it)));
            let sums = [sum(|shard| shard.tokens), sum(|shard| shard.documents), sum(|shard| shard.masked)];
            if sums != [shards.tokens, shards.documents, shards.masked].map(Some) {
                return Err(format!("damaged: the shards of {split} do not add up to its numbers"));
            }
            for shard in &shards.shards {
                let is_plain = !shard.name.is_empty() && !shard.name.contains(['/', '\0']) && shard.name != "..";
                if !is_plain || shard.tokens == 0 || shard.tokens > u64::MAX / 8 || shard.documents > u64::MAX / 8 {
                    return Err(format!("damaged: no shard can be {:?} with {} tokens", shard.name, shard.tokens));
                }
                if shard.masked > shard.tokens || (shard.masked > 0) != shard.xxh3.mask.is_some() {
                    return Err(format!("damaged: {} masked tokens in shard {}", shard.masked, shard.name));
                }
            }
        }
        Ok(())
    }
}

/// Removes the index of a folder, if there is one.
///
/// # Errors
/// [`Error::Bad`] for a file of this name that is no index of tokens; [`Error::Read`],
/// [`Error::Write`].
pub(super) fn remove(folder: &Path) -> Result<()> {
    let path = folder.join(INDEX);
    if !path.exists() {
        return Ok(());
    }
    let text = fs::read(&path).map_err(Error::reading(&path))?;
    if !text.windows(FORMAT.len()).any(|part| part == FORMAT.as_bytes()) {
        return Err(Error::bad(&path, "not of pillion tokenize, so --restart does not remove it; give another --out"));
    }
    fs::remove_file(&path).map_err(Error::writing(&path))
}

/// Bytes of a token of a vocabulary.
pub(crate) fn token_bytes(vocabulary: u32) -> u32 {
    if vocabulary <= 1 << 16 { 2 } else { 4 }
}
