//! Text to tokens and back, for models that write.

use std::path::Path;

use pillion_data::{Stream, Tokenizer, tokenizer};
use pillion_kernels::IGNORED;

use crate::models::Origin;
use crate::{Error, run_folder};

/// What a model's tokens stand for.
pub(crate) enum Vocabulary {
    /// Each for a byte.
    Bytes,
    /// What a tokenizer says.
    Subwords(Box<Tokenizer>),
}

impl Vocabulary {
    /// That of the model in a checkpoint.
    ///
    /// # Errors
    /// When there is no tokenizer in its run's folder, or one that cannot be used.
    pub(crate) fn of(checkpoint: &Path, origin: &Origin) -> Result<Vocabulary, Error> {
        let run = run_folder::of_checkpoint(checkpoint);
        match run.map(|run| Vocabulary::in_run(&run, origin.has_bytes())).transpose()?.flatten() {
            Some(vocabulary) => Ok(vocabulary),
            None => {
                let reason =
                    "there is no tokenizer.json in the folder huggingface of its run, so no text can be written";
                Err(Error::file(checkpoint, reason))
            }
        }
    }

    /// That of the model of the run in `out`, which may have learned bytes.
    ///
    /// # Errors
    /// When its tokenizer cannot be used.
    pub(crate) fn in_run(out: &Path, has_bytes: bool) -> Result<Option<Vocabulary>, Error> {
        let path = run_folder::huggingface(out).join("tokenizer.json");
        match (has_bytes, path.exists()) {
            (true, _) => Ok(Some(Vocabulary::Bytes)),
            (false, true) => Ok(Some(Vocabulary::Subwords(Box::new(Tokenizer::load(&path)?)))),
            (false, false) => Ok(None),
        }
    }

    /// Tokens that there are: a model may know more.
    pub(crate) fn len(&self) -> usize {
        match self {
            Vocabulary::Bytes => tokenizer::VOCAB,
            Vocabulary::Subwords(tokenizer) => tokenizer.vocab_size(),
        }
    }

    /// The tokens of a prompt, with those that the tokenizer puts around it.
    ///
    /// # Errors
    /// When there are none.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let tokens: Vec<u32> = match self {
            Vocabulary::Bytes => text.bytes().map(u32::from).collect(),
            Vocabulary::Subwords(tokenizer) => tokenizer.encode_with_special(text)?,
        };
        if tokens.is_empty() {
            return Err(Error::Setting("the prompt has no tokens: give at least one character".to_owned()));
        }
        Ok(tokens)
    }

    /// Bytes of the text that targets stand for. Those that do not count have none.
    ///
    /// # Errors
    /// When one is another tokenizer's.
    pub(crate) fn bytes(&self, targets: &[u32]) -> Result<u64, Error> {
        let counted = targets.iter().copied().filter(|&target| target != IGNORED);
        match self {
            Vocabulary::Bytes => Ok(counted.filter(|&token| token < 256).count() as u64),
            Vocabulary::Subwords(tokenizer) => {
                counted.map(|token| Ok(u64::from(tokenizer.bytes_of(token)?))).sum::<Result<_, Error>>()
            }
        }
    }

    /// Whether a text ends with this token.
    pub(crate) fn is_end(&self, token: u32) -> bool {
        match self {
            Vocabulary::Bytes => token == u32::from(tokenizer::END),
            Vocabulary::Subwords(tokenizer) => tokenizer.stops().contains(&token),
        }
    }

    /// Begins to decode what follows a prompt.
    ///
    /// # Errors
    /// When the prompt has a token of another tokenizer.
    pub(crate) fn decoder(&self, prompt: &[u32]) -> Result<TextDecoder<'_>, Error> {
        match self {
            Vocabulary::Bytes => Ok(TextDecoder::Bytes),
            Vocabulary::Subwords(tokenizer) => {
                // Spaces depend on the token before.
                let mut stream = tokenizer.stream(false);
                prompt.iter().try_for_each(|&token| stream.push(token).map(drop))?;
                Ok(TextDecoder::Subwords(stream))
            }
        }
    }
}

/// Text piece by piece, as tokens come.
pub(crate) enum TextDecoder<'a> {
    Bytes,
    Subwords(Stream<'a>),
}

impl TextDecoder<'_> {
    /// The bytes that a token completes. The end of a text has none.
    ///
    /// # Errors
    /// When the token is another tokenizer's.
    pub(crate) fn push(&mut self, token: u32) -> Result<Vec<u8>, Error> {
        match self {
            TextDecoder::Bytes => Ok(u8::try_from(token).map(|byte| vec![byte]).unwrap_or_default()),
            TextDecoder::Subwords(stream) => Ok(stream.push(token)?.into_bytes()),
        }
    }

    /// What stands for a character that is not complete.
    ///
    /// # Errors
    /// As for [`TextDecoder::push`].
    pub(crate) fn finish(self) -> Result<Vec<u8>, Error> {
        match self {
            TextDecoder::Bytes => Ok(Vec::new()),
            TextDecoder::Subwords(stream) => Ok(stream.finish()?.into_bytes()),
        }
    }
}

/// Looks for words at which a text stops. What may be the beginning of one is kept back.
pub(crate) struct Stops<'a> {
    words: &'a [String],
    kept: Vec<u8>,
}

impl<'a> Stops<'a> {
    /// # Panics
    /// When a word is empty.
    pub(crate) fn new(words: &'a [String]) -> Stops<'a> {
        assert!(words.iter().all(|word| !word.is_empty()), "a text would stop at once");
        Stops { words, kept: Vec::new() }
    }

    /// Takes more of a text; returns what belongs to it by now, and whether it stops there.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        self.kept.extend_from_slice(bytes);
        let find = |word: &String| {
            let start = self.kept.windows(word.len()).position(|window| window == word.as_bytes())?;
            Some((start + word.len(), start))
        };
        // The word that is complete first.
        if let Some((_, start)) = self.words.iter().filter_map(find).min() {
            self.kept.truncate(start);
            return (std::mem::take(&mut self.kept), true);
        }
        // The longest ending that is the beginning of a word.
        let begins = |start: &usize| self.words.iter().any(|word| word.as_bytes().starts_with(&self.kept[*start..]));
        let start = (0..self.kept.len()).find(begins).unwrap_or(self.kept.len());
        let rest = self.kept.split_off(start);
        (std::mem::replace(&mut self.kept, rest), false)
    }

    /// What was kept back, where the text ends otherwise.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_text_ends_before_the_first_word_however_it_comes(
            text in "[ab]{0,24}",
            words in prop::collection::vec("[ab]{1,4}", 0..3),
            piece in 1usize..5,
        ) {
            let mut stops = Stops::new(&words);
            let (mut given, mut stopped) = (Vec::new(), false);
            for bytes in text.as_bytes().chunks(piece) {
                let (more, end) = stops.push(bytes);
                given.extend(more);
                if end {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                given.extend(stops.finish());
            }
            let find = |word: &String| text.find(word.as_str()).map(|start| (start + word.len(), start));
            let first = words.iter().filter_map(find).min().map(|(_, start)| start);
            prop_assert_eq!(stopped, first.is_some());
            prop_assert_eq!(given, &text.as_bytes()[..first.unwrap_or(text.len())]);
        }
    }
}
