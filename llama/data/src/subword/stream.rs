//! Text piece by piece, as tokens come.

use super::Tokenizer;
use crate::error::Result;

/// Tokens after which text that ends in U+FFFD is given out all the same: its bytes make no
/// character, since a character has at most four.
const PATIENCE: usize = 8;

/// Decodes tokens one by one; the pieces together are the text of all tokens.
///
/// A window of tokens is kept: those of the last piece, and those whose text is still incomplete.
/// The next piece is what the newest tokens add to the window's text. So spaces between words are
/// right, which depend on the token before, and characters come out whole.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    special: bool,
    window: Vec<u32>,
    /// Tokens of the window that have been given out, and their text.
    given: usize,
    text: String,
}

impl<'a> Stream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, special: bool) -> Self {
        Self { tokenizer, special, window: Vec::new(), given: 0, text: String::new() }
    }

    /// Takes a token; returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// [`Error::Bad`](crate::Error::Bad) if the token is outside the vocabulary.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.window.push(token);
        let whole = match self.tokenizer.decode(&self.window, self.special) {
            Ok(whole) => whole,
            Err(error) => {
                self.window.pop();
                return Err(error);
            }
        };
        let waits = whole.ends_with(char::REPLACEMENT_CHARACTER) && self.window.len() - self.given < PATIENCE;
        if waits || whole.len() <= self.text.len() {
            return Ok(String::new());
        }
        let piece = self.added(&whole);
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.text = self.tokenizer.decode(&self.window, self.special)?;
        Ok(piece)
    }

    /// The rest: an incomplete character, as U+FFFD.
    ///
    /// # Errors
    /// None that [`Self::push`] has not returned.
    pub fn finish(self) -> Result<String> {
        let whole = self.tokenizer.decode(&self.window, self.special)?;
        Ok(self.added(&whole))
    }

    fn added(&self, whole: &str) -> String {
        let same = whole.bytes().zip(self.text.bytes()).take_while(|(one, other)| one == other).count();
        let start = (0..=same).rev().find(|&at| whole.is_char_boundary(at)).unwrap_or(0);
        whole[start..].to_owned()
    }
}
