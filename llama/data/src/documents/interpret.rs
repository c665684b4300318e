//! What a record says: a text, a prompt with its completion, or a chat.

use serde_json::{Map, Value};

use super::OrBad;
use crate::guard::plain;

/// A record as it lies in its file.
#[derive(Debug)]
pub(crate) enum Raw {
    /// Bytes of a text.
    Text(Vec<u8>),
    /// A JSON object.
    Json(Vec<u8>),
    /// An object of a table.
    Row(Value),
}

/// A document.
#[derive(Debug, PartialEq)]
pub(crate) enum Content {
    /// Nothing: a blank line between JSON objects.
    Blank,
    /// All of it is learned.
    Text(String),
    /// Only the completion is learned.
    Pair { prompt: String, completion: String },
    /// Only replies are learned.
    Chat(Vec<Value>),
}

/// Where an object has its document.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a> {
    /// The field of the text; without one, `messages`, `prompt` and `completion`, or `text`.
    pub(crate) text: Option<&'a str>,
}

impl Raw {
    /// Bytes that it takes in memory, about.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Text(bytes) | Self::Json(bytes) => bytes.len(),
            Self::Row(value) => texts(value),
        }
    }

    /// The document of a record.
    ///
    /// # Errors
    /// What is wrong with it, and the remedy.
    pub(crate) fn interpret(self, fields: Fields<'_>) -> OrBad<Content> {
        match self {
            Self::Text(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Content::Text(text)),
                Err(error) => {
                    let at = error.utf8_error().valid_up_to();
                    Err(format!("not UTF-8 text (byte {at} fits no character); convert it, for example with iconv"))
                }
            },
            Self::Json(line) => {
                if line.iter().all(u8::is_ascii_whitespace) {
                    return Ok(Content::Blank);
                }
                let value = serde_json::from_slice(&line).map_err(|error| {
                    let more = if line.starts_with(b"[") || line == b"{" {
                        "; each line must be an object of its own, which jq -c '.[]' makes of a list"
                    } else {
                        ""
                    };
                    format!("no JSON: {}{more}", without_line(&error))
                })?;
                of_value(value, fields)
            }
            Self::Row(value) => of_value(value, fields),
        }
    }
}

/// An error of a text of one line, without the line's number in that text.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.split_once(" at line ") {
        Some((problem, _)) => format!("{problem} at column {}", error.column()),
        None => text,
    }
}

fn of_value(value: Value, fields: Fields<'_>) -> OrBad<Content> {
    let Value::Object(mut object) = value else {
        let remedy = "each line must be an object such as {\"text\": \"...\"}, which jq -c '.[]' makes of a list";
        return Err(format!("{} and no JSON object; {remedy}", kind(&value)));
    };
    if let Some(field) = fields.text {
        return text(&mut object, field).map(Content::Text);
    }
    let has = |name: &str| object.get(name).is_some_and(|value| !value.is_null());
    if has("messages") {
        return match object.remove("messages") {
            Some(Value::Array(messages)) => chat(messages),
            other => Err(format!("its messages are {} and no list", kind(&other.unwrap_or_default()))),
        };
    }
    if has("prompt") && has("completion") {
        let (prompt, completion) = (text(&mut object, "prompt")?, text(&mut object, "completion")?);
        return Ok(Content::Pair { prompt, completion });
    }
    if object.contains_key("text") {
        return text(&mut object, "text").map(Content::Text);
    }
    Err(format!(
        "it has no text, no messages, and no prompt with a completion; name one of its fields ({}) with --field",
        names(&object)
    ))
}

/// The fields of an object, to be printed.
fn names(object: &Map<String, Value>) -> String {
    let names: Vec<&str> = object.keys().map(String::as_str).collect();
    plain(&names.join(", "))
}

fn text(object: &mut Map<String, Value>, field: &str) -> OrBad<String> {
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("its field {field} is {} and no text; give another with --field", kind(&other))),
        None => Err(format!("it has no field {field}; name one of {} with --field", names(object))),
    }
}

fn chat(messages: Vec<Value>) -> OrBad<Content> {
    for (i, message) in messages.iter().enumerate() {
        for field in ["role", "content"] {
            if !message[field].is_string() {
                return Err(format!("message {i} has no {field} that is a text"));
            }
        }
    }
    Ok(Content::Chat(messages))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "no text",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn texts(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(texts).sum(),
        Value::Object(fields) => fields.values().map(texts).sum(),
        _ => 8,
    }
}
