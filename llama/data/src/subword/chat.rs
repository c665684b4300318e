//! Chats as text, by the template of a model, and which of the text the model shall learn.
//!
//! A reply is learned, everything else is not. Where a reply is in the text is found by comparing:
//! it is what message `i` of the role `assistant` adds to the text of the messages before it, that
//! text ending where the model would be asked to go on (`add_generation_prompt`). So the tokens that
//! end a turn, which the template writes after the reply, belong to it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

use super::Tokenizer;
use crate::documents::OrBad;
use crate::error::{Error, Result};

/// A chat template of Hugging Face, in Jinja.
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    source: String,
    begin: String,
    end: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// A template from a file, with the spelling of the tokens that begin and end a text.
    pub(super) fn new(path: &Path, source: String, begin: String, end: String) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the usual delimiters"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // There is no `strftime_now`: a date would make the same text differ from day to day, and templates
        // that ask whether it is defined have a fixed one.
        environment
            .add_template_owned(NAME, without_generation(&source))
            .map_err(|error| Error::bad(path, format!("its chat template is no valid one: {error}")))?;
        Ok(Self { environment, path: path.to_owned(), source, begin, end })
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of messages, each an object with `role` and `content`; with `ask`, up to where the
    /// model would go on.
    ///
    /// # Errors
    /// [`Error::Bad`] if the template refuses the messages.
    pub fn render(&self, messages: &[Value], ask: bool) -> Result<String> {
        self.try_render(messages, ask).map_err(|problem| Error::bad(&self.path, problem))
    }

    fn try_render(&self, messages: &[Value], ask: bool) -> OrBad<String> {
        let template = self.environment.get_template(NAME).expect("added in new");
        let values = context! {
            messages => minijinja::Value::from(Serde(messages)),
            add_generation_prompt => ask,
            bos_token => &self.begin,
            eos_token => &self.end,
        };
        template.render(values).map_err(|error| {
            let detail = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            format!("the chat template refuses the messages: {detail}")
        })
    }

    /// The text of a chat, and where its replies are, in bytes.
    pub(crate) fn replies(&self, messages: &[Value]) -> OrBad<(String, Vec<Range<usize>>)> {
        let whole = self.try_render(messages, false)?;
        let mut replies = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            let role = message["role"].as_str().ok_or_else(|| format!("message {i} has no role"))?;
            if role != "assistant" {
                continue;
            }
            let before = self.try_render(&messages[..i], true)?;
            let after = self.try_render(&messages[..=i], false)?;
            if !whole.starts_with(&before) || !whole.starts_with(&after) || after.len() < before.len() {
                return Err(format!(
                    "the chat template changes the text before message {i} once that message is there, so the reply \
                     cannot be told from the prompt; give a template that only adds text"
                ));
            }
            replies.push(before.len()..after.len());
        }
        if replies.is_empty() {
            return Err("no message has the role assistant, so there is nothing to learn".to_owned());
        }
        Ok((whole, replies))
    }
}

/// The tokens of a text, and which of them are left out of the loss: all but those of `learned`.
///
/// The text is tokenized as a whole. The tokens of the text before a boundary must be the first
/// tokens of the whole; else a token lies on both sides, and the text is refused.
pub(crate) fn mask(
    tokenizer: &Tokenizer,
    text: &str,
    learned: &[Range<usize>],
) -> Result<OrBad<(Vec<u32>, Vec<bool>)>> {
    let tokens = tokenizer.encode(text)?;
    let mut masked = vec![true; tokens.len()];
    for range in learned {
        let mut ends = [0; 2];
        for (end, at) in ends.iter_mut().zip([range.start, range.end]) {
            let before = if at == text.len() { tokens.clone() } else { tokenizer.encode(&text[..at])? };
            if !tokens.starts_with(&before) {
                let around = around(text, at);
                return Ok(Err(format!(
                    "a token reaches across the border between a prompt and a reply, at {around:?}, where | is the \
                     border; end the prompt without a space and begin the reply with it; the special tokens of a \
                     chat template must be tokens of the tokenizer"
                )));
            }
            *end = before.len();
        }
        masked[ends[0]..ends[1]].fill(false);
    }
    Ok(Ok((tokens, masked)))
}

/// Some characters on both sides of a place.
fn around(text: &str, at: usize) -> String {
    let before: String = text[..at].chars().rev().take(8).collect();
    let before: String = before.chars().rev().collect();
    let after: String = text[at..].chars().take(8).collect();
    format!("{before}|{after}")
}

/// As Python's `json.dumps`, which writes spaces after commas and colons.
fn to_json(value: minijinja::Value, options: Kwargs) -> std::result::Result<minijinja::Value, minijinja::Error> {
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<minijinja::Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let mut written = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let format = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut written, format))
                .map_err(failed)?;
        }
        None => {
            serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut written, Spaced))
                .map_err(failed)?;
        }
    }
    Ok(minijinja::Value::from_safe_string(String::from_utf8(written).expect("JSON is UTF-8")))
}

/// `{"a": 1, "b": [2, 3]}`
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The template without the tags `generation`, which mark replies for another rule and which Jinja
/// does not have.
fn without_generation(source: &str) -> String {
    let mut rest = source;
    let mut result = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (tag, end) = (&rest[start + 2..start + length], start + length + 2);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replaced = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        result.push_str(&rest[..start]);
        match replaced {
            Some(replaced) => result.push_str(&format!("{{%{}%}}", tag.replace(word, &format!(" {replaced} ")))),
            None => result.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    result + rest
}

#[cfg(test)]
mod tests;
