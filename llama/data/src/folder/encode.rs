//! From a document to its tokens.

use xxhash_rust::xxh3::xxh3_64;

use crate::documents::{Content, OrBad};
use crate::error::Result;
use crate::subword::{Tokenizer, chat};

/// What a record has become.
pub(super) enum Encoded {
    /// A blank line between JSON objects: no document.
    Blank,
    /// A document without a token.
    Empty,
    Document {
        /// Of the text.
        hash: u64,
        /// Of the text.
        bytes: u64,
        tokens: Vec<u32>,
        /// Which tokens are left out of the loss; empty where none is.
        masked: Vec<bool>,
    },
}

/// The tokens of a document, or what is wrong with it.
pub(super) fn encode(tokenizer: &Tokenizer, content: Content) -> Result<OrBad<Encoded>> {
    let (text, learned) = match content {
        Content::Blank => return Ok(Ok(Encoded::Blank)),
        Content::Text(text) => (text, None),
        Content::Pair { prompt, completion } => {
            if completion.is_empty() {
                return Ok(Err("its completion is empty, so there is nothing to learn".to_owned()));
            }
            let learned = prompt.len()..prompt.len() + completion.len();
            (prompt + &completion, Some(vec![learned]))
        }
        Content::Chat(messages) => {
            let Some(template) = tokenizer.chat_template() else {
                let remedy = "bring the model's tokenizer_config.json or chat_template.jinja there";
                return Ok(Err(format!("a chat, but there is no chat template beside the tokenizer; {remedy}")));
            };
            match template.replies(&messages) {
                Ok((text, replies)) => (text, Some(replies)),
                Err(problem) => return Ok(Err(problem)),
            }
        }
    };
    let (tokens, masked) = match learned {
        None => (tokenizer.encode(&text)?, Vec::new()),
        Some(learned) => match chat::mask(tokenizer, &text, &learned)? {
            Ok((tokens, masked)) => (tokens, if masked.contains(&true) { masked } else { Vec::new() }),
            Err(problem) => return Ok(Err(problem)),
        },
    };
    if tokens.is_empty() {
        return Ok(Ok(Encoded::Empty));
    }
    Ok(Ok(Encoded::Document { hash: xxh3_64(text.as_bytes()), bytes: text.len() as u64, tokens, masked }))
}
