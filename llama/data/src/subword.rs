//! Tokenizers of Hugging Face: a file `tokenizer.json`, read by the crate `tokenizers`.
//!
//! The crate is pinned to 1.0.0-rc.3. On documents of 10 KB it tokenizes 2.7 times as many bytes a
//! second as 0.23.2, with the same ids (`ci/data` compares them with those of Python's package). It
//! has no offsets, so masks of prompts are found by comparing prefixes ([`chat`]).

pub(crate) mod chat;
#[cfg(any(test, fuzzing))]
pub(crate) mod examples;
mod lengths;
mod neighbours;
mod stream;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::guard::guarded;
use chat::ChatTemplate;
use neighbours::Neighbours;
pub use stream::Stream;

/// A tokenizer, and what the files beside it say of its special tokens.
pub struct Tokenizer {
    pipeline: PipelineTokenizer,
    path: PathBuf,
    hash: u64,
    ids: HashMap<String, u32>,
    vocab: usize,
    /// Bytes of each token.
    lengths: Vec<u32>,
    begin: Option<u32>,
    ends: Vec<u32>,
    template: Option<ChatTemplate>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("vocab", &self.vocab).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, or that of a folder, and the files beside it that say which tokens
    /// begin and end a text: `tokenizer_config.json`, `generation_config.json`, `config.json`. A
    /// chat template comes from `chat_template.jinja`, else from `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Read`] if a file cannot be read; [`Error::Bad`] if one is damaged, or if the files
    /// contradict each other.
    pub fn load(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(neighbours::TOKENIZER) } else { path.to_owned() };
        let bytes = fs::read(&path).map_err(Error::reading(&path))?;
        let wrong = |problem: String| {
            let remedy = "give the tokenizer.json of a model on Hugging Face";
            Error::bad(&path, format!("not a tokenizer that can be used: {problem}; {remedy}"))
        };
        let text = std::str::from_utf8(&bytes).map_err(|error| wrong(error.to_string()))?;
        let mut config: Value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let ids = all_ids(&config).map_err(wrong)?;
        let vocab = ids.values().max().map_or(0, |&largest| largest as usize + 1);
        if vocab == 0 {
            return Err(wrong("its vocabulary is empty".to_owned()));
        }
        let lengths = lengths::of(&config, &ids, vocab);
        in_crate(|| tokenizers::canonicalize_value(&mut config)).map_err(wrong)?;
        let pipeline = in_crate(|| tokenizers::from_json(&config.to_string())).map_err(wrong)?;
        check_ids(&config, &pipeline, &ids, vocab).map_err(wrong)?;
        let neighbours = Neighbours::beside(&path)?;
        let template = &pipeline.get_post_processor().single;
        let outermost = |token: Option<&(PipelineToken, u8)>| token.map(|&(token, _)| token.id());
        let begin = neighbours.begin(outermost(template.prefix.first()), &ids)?;
        let ends = neighbours.ends(outermost(template.suffix.last()), &ids)?;
        let template = neighbours.template()?;
        Ok(Self { pipeline, hash: xxh3_64(&bytes), path, vocab, lengths, ids, begin, ends, template })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// xxh3 of the file's bytes.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Every token is below this: the largest id and one, added tokens included. A model's
    /// embedding may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The id of a token, spelled as in `tokenizer.json`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// Bytes of text that a token stands for: none for a special token. The space that some
    /// tokenizers put before a text is counted.
    ///
    /// # Errors
    /// [`Error::Bad`] if the token is outside the vocabulary.
    pub fn bytes_of(&self, token: u32) -> Result<u32> {
        self.lengths.get(token as usize).copied().ok_or_else(|| self.outside(token))
    }

    fn outside(&self, token: u32) -> Error {
        let vocab = self.vocab;
        let problem = format!("token {token} is outside the vocabulary of {vocab}; it is another tokenizer's");
        Error::bad(&self.path, problem)
    }

    /// The token before the beginning of a text.
    pub fn begin_of_sequence(&self) -> Option<u32> {
        self.begin
    }

    /// The token after the end of a text.
    pub fn end_of_sequence(&self) -> Option<u32> {
        self.ends.first().copied()
    }

    /// The tokens at which generation stops: [`Self::end_of_sequence`], and others that
    /// `generation_config.json` or `config.json` lists, such as the end of a turn.
    pub fn stops(&self) -> &[u32] {
        &self.ends
    }

    /// The chat template, if there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The tokens of a text, without those that the tokenizer would put around it. Special tokens
    /// that the text spells out, such as `</s>`, become that token, as in Hugging Face's libraries.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the tokenizer, if it has no tokens for this text, or the text is
    /// longer than 4 GiB.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_by(text, false)
    }

    /// As [`Self::encode`], with the tokens around it, such as the beginning of a sequence.
    ///
    /// # Errors
    /// As for [`Self::encode`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_by(text, true)
    }

    fn encode_by(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let options = EncodeOptions {
            add_special_tokens,
            encode_special_tokens: false,
            padding: Override::Off,
            truncation: Override::Off,
        };
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let encoded = in_crate(|| self.pipeline.encode_into(text, &options, &mut tokens));
        encoded.map_err(|error| Error::bad(&self.path, format!("cannot tokenize a text: {error}")))?;
        Ok(tokens.into_iter().map(PipelineToken::id).collect())
    }

    /// The text of tokens. Special tokens are left out unless `special`. Bytes that make no
    /// character become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Bad`] if a token is outside the vocabulary.
    pub fn decode(&self, tokens: &[u32], special: bool) -> Result<String> {
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= self.vocab) {
            return Err(self.outside(token));
        }
        let decoded = in_crate(|| self.pipeline.decode(tokens, !special));
        decoded.map_err(|error| Error::bad(&self.path, format!("cannot decode tokens: {error}")))
    }

    /// Decodes tokens one by one. Special tokens are left out unless `special`.
    pub fn stream(&self, special: bool) -> Stream<'_> {
        Stream::new(self, special)
    }

    /// Copies the tokenizer and the files beside it that [`Tokenizer::load`] reads into a folder,
    /// where [`Tokenizer::load`] finds all that it found here.
    pub(crate) fn copy_into(&self, folder: &Path) -> Result<()> {
        neighbours::copy(&self.path, folder)
    }
}

/// Calls the crate `tokenizers`, which panics over some tokenizers that it has loaded.
fn in_crate<T, E: std::fmt::Display>(
    call: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, String> {
    guarded(|| call().map_err(|error| error.to_string())).flatten()
}

/// More tokens than the largest vocabularies have, which are of about 900,000. Memory is taken for
/// each up to the largest id.
const MOST_TOKENS: u32 = 1 << 20;

/// Every token of a `tokenizer.json` with its id.
fn all_ids(config: &Value) -> std::result::Result<HashMap<String, u32>, String> {
    let to_id = |id: &Value| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id < MOST_TOKENS);
        number.ok_or_else(|| format!("the id {id} is no number below {MOST_TOKENS}"))
    };
    let mut ids = HashMap::new();
    match &config["model"]["vocab"] {
        Value::Object(vocab) => {
            for (token, id) in vocab {
                ids.insert(token.clone(), to_id(id)?);
            }
        }
        // Unigram: pairs of a token and its score.
        Value::Array(pieces) => {
            for (id, piece) in pieces.iter().enumerate() {
                let token = piece[0].as_str().ok_or_else(|| format!("entry {id} of the vocabulary has no token"))?;
                ids.insert(token.to_owned(), u32::try_from(id).map_err(|error| error.to_string())?);
            }
        }
        _ => return Err("it has no model.vocab".to_owned()),
    }
    for token in config["added_tokens"].as_array().into_iter().flatten() {
        let content = token["content"].as_str().ok_or("an added token has no content")?;
        ids.insert(content.to_owned(), to_id(&token["id"])?);
    }
    Ok(ids)
}

/// Checks that the crate has the ids of the file: it gives an added token another one where the file
/// has two tokens of one id, and puts any around a text.
fn check_ids(
    config: &Value,
    pipeline: &PipelineTokenizer,
    ids: &HashMap<String, u32>,
    vocab: usize,
) -> std::result::Result<(), String> {
    let added = config["added_tokens"].as_array().into_iter().flatten();
    for token in added.filter_map(|token| token["content"].as_str()) {
        let (found, id) = (pipeline.get_added_vocabulary().token_to_id(token), ids.get(token));
        if found.is_some_and(|found| Some(&found) != id) {
            return Err(format!("the id of the added token {token:?} is not free, or another token's, too"));
        }
    }
    let template = &pipeline.get_post_processor().single;
    let around = template.prefix.iter().chain(&template.suffix).map(|(token, _)| token.id());
    match around.into_iter().find(|&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(format!("its post_processor has the id {id}, but the vocabulary {vocab} tokens")),
    }
}

#[cfg(test)]
mod tests;
