//! A file of documents: a byte that says what it is called, then the file.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{assert_is_line, folder, write};
use crate::documents::{Content, Fields, OrBad, Position, Raw, Reading, Walk, list};

/// What a file is called, and whether each of its lines is a document.
const NAMES: [(&str, bool); 7] = [
    ("a.jsonl", false),
    ("a.jsonl.gz", false),
    ("a.jsonl.zst", false),
    ("a.txt", false),
    ("a.txt", true),
    ("a.txt.gz", true),
    ("a.txt.zst", false),
];

/// Records of a file that are looked at: a few bytes may be a file of many blank lines, compressed.
const MOST: usize = 2000;

/// Texts, prompts, chats and what is none of these, plain and compressed.
pub fn seeds() -> Vec<Vec<u8>> {
    let lines = [
        json!({"text": "öne\n", "x": 1}),
        json!({"prompt": "a", "completion": " b", "text": "c"}),
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json!({"messages": null, "text": "b"}),
        json!({"a": 1, "body": "b"}),
        json!(["a"]),
    ];
    let lines = lines.map(|line| line.to_string()).join("\n");
    let text = "one\r\n\ntwo".to_owned();
    let seed = |kind: usize| {
        let (name, _) = NAMES[kind];
        let text = if name.starts_with("a.jsonl") { lines.as_bytes() } else { text.as_bytes() };
        let file = match name.rsplit_once('.') {
            Some((_, "gz")) => gzip(text),
            Some((_, "zst")) => zstd(text),
            _ => text.to_vec(),
        };
        [vec![kind as u8], file].concat()
    };
    (0..NAMES.len()).map(seed).collect()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).and_then(|()| out.finish()).expect("memory")
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("memory")
}

/// Documents are those of the file, a problem is a line of text, a walk goes on from any record,
/// and a file has the same documents when it is compressed.
pub fn check(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else { return };
    let (name, lines) = NAMES[usize::from(kind) % NAMES.len()];
    let root = folder();
    let walked = check_walk(write(root.path(), name, bytes), lines);
    if !name.ends_with(".gz") && !name.ends_with(".zst") && !bytes.is_empty() {
        for (ending, packed) in [("gz", gzip(bytes)), ("zst", zstd(bytes))] {
            assert_eq!(check_walk(write(root.path(), &format!("{name}.{ending}"), &packed), lines), walked);
        }
    }
}

/// A record: its place, its content or its problem, and where the next one is.
type Seen = (String, OrBad<Content>, Position);

/// The records of a file, none of which breaks a promise.
pub(crate) fn check_walk(path: PathBuf, lines: bool) -> Vec<Seen> {
    let all = walk(&path, lines, Position::default());
    let mut before = Position::default();
    for (_, content, after) in &all {
        assert!((after.file, after.record) > (before.file, before.record) && after.file <= 1, "{before:?}, {after:?}");
        before = *after;
        if let Err(problem) = content {
            assert_is_line(problem);
        }
    }
    if let Some((_, _, after)) = all.get(all.len() / 2) {
        let rest = walk(&path, lines, *after);
        let expected = &all[all.len() / 2 + 1..];
        assert_eq!(&rest[..expected.len().min(rest.len())], expected);
        assert!(rest.len() == expected.len() || all.len() == MOST);
    }
    all
}

fn walk(path: &Path, lines: bool, from: Position) -> Vec<Seen> {
    let Ok((inputs, _)) = list(&[path.to_owned()], Path::new("elsewhere")) else { return Vec::new() };
    let mut walk = Walk::new(inputs.into(), Reading { lines, field: None }, from);
    let mut seen = Vec::new();
    while seen.len() < MOST
        && let Some(record) = walk.next().expect("a file of our own")
    {
        let content = record.raw.and_then(interpret);
        seen.push((record.place, content, record.after));
    }
    seen
}

/// The document of a record, which is one that is in it.
fn interpret(raw: Raw) -> OrBad<Content> {
    let (line, is_json) = match &raw {
        Raw::Text(line) => (line.clone(), false),
        Raw::Json(line) => (line.clone(), true),
        Raw::Row(_) => return raw.interpret(Fields { text: None }),
    };
    let content = raw.interpret(Fields { text: None });
    if !is_json {
        assert_eq!(content.as_ref().ok(), String::from_utf8(line).ok().map(Content::Text).as_ref());
        return content;
    }
    let Ok(value) = serde_json::from_slice::<Value>(&line) else {
        assert!(matches!(content, Err(_) | Ok(Content::Blank)));
        return content;
    };
    match &content {
        Err(_) => {}
        Ok(Content::Blank) => panic!("a value is blank"),
        Ok(Content::Text(text)) => assert_eq!(&value["text"], text),
        Ok(Content::Pair { prompt, completion }) => {
            assert_eq!((&value["prompt"], &value["completion"]), (&json!(prompt), &json!(completion)));
        }
        Ok(Content::Chat(messages)) => {
            assert_eq!(value["messages"].as_array(), Some(messages));
            assert!(messages.iter().all(|message| message["role"].is_string() && message["content"].is_string()));
        }
    }
    let of_field = Raw::Json(line).interpret(Fields { text: Some("body") });
    let expected = value.get("body").and_then(Value::as_str).map(|body| Content::Text(body.to_owned()));
    assert_eq!(of_field.ok(), expected);
    content
}
