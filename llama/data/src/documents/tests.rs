use ::parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::fuzzing::documents::{check_walk, gzip, zstd};
use crate::fuzzing::parquet::write_texts;

/// A file under its name in a folder.
fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A parquet file with a column `text` in groups of two rows, and one of numbers.
fn parquet(path: &Path, texts: &[&str]) {
    let compression = ::parquet::basic::Compression::SNAPPY;
    write_texts(path, WriterProperties::builder().set_compression(compression).build(), texts, 2);
}

/// All documents from a position on, or what is wrong with each, with its place and what follows.
fn walked(paths: &[PathBuf], reading: &Reading, from: Position) -> Vec<(String, OrBad<Content>, Position)> {
    let (inputs, _) = list(paths, Path::new("elsewhere")).unwrap();
    let mut walk = Walk::new(inputs.into(), reading.clone(), from);
    let mut found = Vec::new();
    while let Some(record) = walk.next().unwrap() {
        let content = record.raw.and_then(|raw| raw.interpret(Fields { text: reading.field.as_deref() }));
        found.push((record.place, content, record.after));
    }
    found
}

fn texts(paths: &[PathBuf], reading: &Reading) -> Vec<String> {
    let all = walked(paths, reading, Position::default());
    let text = |(place, content, _)| match content {
        Ok(Content::Text(text)) => Some(text),
        Ok(Content::Blank) => None,
        other => panic!("{place}{other:?}"),
    };
    all.into_iter().filter_map(text).collect()
}

/// The one problem of a file.
fn problem(name: &str, bytes: &[u8], field: Option<&str>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), name, bytes);
    problem_at(path, field)
}

fn problem_at(path: PathBuf, field: Option<&str>) -> String {
    let reading = Reading { lines: false, field: field.map(str::to_owned) };
    let all = walked(&[path], &reading, Position::default());
    let problems: Vec<String> =
        all.into_iter().filter_map(|(place, content, _)| Some(place + &content.err()?)).collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].clone()
}

#[test]
fn each_kind_of_file_gives_its_documents() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let json = "\u{feff}{\"text\": \"öne\\n\", \"x\": 1}\n\n  {\"text\":\"two\"}\r\n{\"text\":\"\"}";
    let expected = ["öne\n", "two", ""];
    let (lines, plain) = (Reading { lines: true, field: None }, Reading::default());
    for (name, bytes) in [
        ("a.jsonl", json.as_bytes().to_vec()),
        ("a.NDJSON", json.as_bytes().to_vec()),
        ("a.json.gz", gzip(json.as_bytes())),
        // Several members, as parallel compressors write them.
        ("b.jsonl.gz", [gzip(&json.as_bytes()[..20]), gzip(&json.as_bytes()[20..])].concat()),
        ("a.jsonl.zst", zstd(json.as_bytes())),
    ] {
        assert_eq!(texts(&[file(at, name, &bytes)], &plain), expected, "{name}");
    }
    let text = "one\r\n\ntwo";
    assert_eq!(texts(&[file(at, "t.txt", text.as_bytes())], &plain), [text]);
    assert_eq!(texts(&[file(at, "t.txt.gz", &gzip(text.as_bytes()))], &plain), [text]);
    assert_eq!(texts(&[file(at, "t", text.as_bytes())], &lines), ["one", "", "two"]);
    let path = at.join("t.parquet");
    parquet(&path, &["one", "two", "three"]);
    assert_eq!(texts(&[path], &plain), ["one", "two", "three"]);
}

#[test]
fn objects_are_texts_prompts_or_chats() {
    let one = |json: Value, field: Option<&str>| {
        Raw::Json(json.to_string().into_bytes()).interpret(Fields { text: field }).unwrap()
    };
    let pair = json!({"prompt": "a", "completion": "b", "text": "c"});
    assert_eq!(one(pair.clone(), None), Content::Pair { prompt: "a".into(), completion: "b".into() });
    assert_eq!(one(pair, Some("text")), Content::Text("c".into()));
    let messages = json!([{"role": "user", "content": "a", "more": 1}]);
    let chat = one(json!({"messages": messages, "prompt": "a", "text": "b"}), None);
    assert_eq!(chat, Content::Chat(messages.as_array().unwrap().clone()));
    assert_eq!(one(json!({"messages": null, "text": "b"}), None), Content::Text("b".into()));
}

#[test]
fn each_bad_record_is_one_problem_with_its_place_and_a_remedy() {
    for (name, bytes, field, says) in [
        ("a.txt", &b"ab\xff"[..], None, "not UTF-8 text (byte 2"),
        ("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n", None, "line 2: no JSON"),
        ("a.jsonl", b"{\"text\":\"a\"}\n{\"text\n", None, "line 2: no JSON: EOF"),
        ("a.jsonl", b"\n[1]", None, "line 2: a list and no JSON object"),
        ("a.jsonl", b"[", None, "jq -c '.[]'"),
        ("a.jsonl", b"{\"a\":1,\"b\":2}", None, "name one of its fields (a, b) with --field"),
        ("a.jsonl", b"{\"a\":1,\"b\":2}", Some("text"), "it has no field text; name one of a, b"),
        ("a.jsonl", b"{\"text\":1}", None, "its field text is a number and no text"),
        ("a.jsonl", b"{\"text\":null}", Some("text"), "its field text is null"),
        ("a.jsonl", b"{\"messages\":\"a\"}", None, "its messages are a text and no list"),
        ("a.jsonl", b"{\"messages\":[{\"role\":\"user\"}]}", None, "message 0 has no content"),
        ("a.jsonl", b"{\"prompt\":[],\"completion\":\"\"}", None, "its field prompt is a list"),
        ("a.jsonl.gz", b"not gzip", None, "damaged or cut short"),
        ("a.jsonl.zst", b"not zstd", None, "damaged or cut short"),
        ("a.parquet", b"not parquet", None, "no parquet file that can be read"),
    ] {
        let found = problem(name, bytes, field);
        assert!(found.contains(says), "{name}: {found}");
        assert!(!found.contains('\n'), "{found}");
    }
}

#[test]
fn a_damaged_file_keeps_the_documents_before_the_damage() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..20_000u64).map(|i| format!("{{\"text\":\"{}\"}}\n", i * i * 7919 % 100_003)).collect();
    for (name, mut bytes) in [("a.jsonl.gz", gzip(lines.as_bytes())), ("a.jsonl.zst", zstd(lines.as_bytes()))] {
        bytes.truncate(bytes.len() - 7);
        let paths = [file(folder.path(), name, &bytes), file(folder.path(), "next.txt", b"next")];
        let all = walked(&paths, &Reading::default(), Position::default());
        let bad = all.iter().position(|(_, content, _)| content.is_err()).unwrap();
        assert!(bad > 100, "{bad}");
        assert_eq!(all.len(), bad + 2, "the rest of the file is one problem, and the next file is read");
        assert!(all[bad].0.starts_with(&format!("line {}", bad + 1)), "{}", all[bad].0);
        // A later walk goes on with the next file.
        assert_eq!(walked(&paths, &Reading::default(), all[bad].2).len(), 1);
    }
}

#[test]
fn columns_of_parquet_files_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    parquet(&path, &["one"]);
    let found = problem_at(path.clone(), Some("body"));
    assert!(found.contains("no column body; name one of text, number with --field"), "{found}");
    let found = problem_at(path.clone(), Some("number"));
    assert!(found.contains("row 1: its field number is a number"), "{found}");
    // Damage anywhere is a problem or another text, but no panic, and a walk goes on from any row. The
    // second flip gives a group three rows instead of two.
    parquet(&path, &["one and another", "two", "three", "four"]);
    let whole = fs::read(&path).unwrap();
    for (at, flip) in (0..whole.len()).flat_map(|at| [(at, 0x15), (at, 2)]) {
        let mut damaged = whole.clone();
        damaged[at] ^= flip;
        fs::write(&path, &damaged).unwrap();
        check_walk(path.clone(), false);
    }
}

#[test]
fn texts_of_parquet_are_read_in_each_encoding() {
    use ::parquet::basic::Encoding;
    use ::parquet::file::properties::WriterVersion;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let lines: Vec<String> = (0..3000u64).map(|i| "line ".repeat(1 + i as usize % 3) + &(i * i).to_string()).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
        for encoding in [None, Some(Encoding::DELTA_LENGTH_BYTE_ARRAY), Some(Encoding::DELTA_BYTE_ARRAY)] {
            let properties = WriterProperties::builder().set_writer_version(version);
            let properties = properties.set_dictionary_enabled(encoding.is_none());
            let properties = match encoding {
                Some(encoding) => properties.set_column_encoding("text".into(), encoding),
                None => properties,
            };
            write_texts(&path, properties.build(), &lines, lines.len());
            assert_eq!(texts(std::slice::from_ref(&path), &Reading::default()), lines, "{version:?}, {encoding:?}");
        }
    }
}

#[test]
fn a_panic_of_the_reader_of_parquet_is_a_problem_in_a_line() {
    // What the crate says of columns that it does not know is kept, in a line.
    let panics: std::result::Result<(), Fault> = rows::reading(|| panic!("no type\nof column"));
    let Err(Fault::Damaged(problem)) = panics else { panic!("no problem") };
    assert!(problem.contains("its reader failed: no type of column; fetch it again"), "{problem}");
}

#[test]
fn names_of_fields_are_printed_in_a_line() {
    let found = problem("a.jsonl", b"{\"a\\nb\":1}", None);
    assert!(found.contains("(a b)"), "{found}");
}

#[test]
fn paths_without_documents_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("bare")).unwrap();
    file(folder.path(), "empty", b"");
    for (name, says) in [("none", "check the path"), ("bare", "(no file)"), ("empty", "only these: 1 empty")] {
        let path = folder.path().join(name);
        let error = list(std::slice::from_ref(&path), &folder.path().join("out")).unwrap_err().to_string();
        assert!(error.starts_with(path.to_str().unwrap()) && error.contains(says), "{error}");
    }
}

#[test]
fn a_folder_holds_texts_or_records() {
    let folder = tempfile::tempdir().unwrap();
    let kinds_of = |names: &[&str]| {
        let _ = fs::remove_dir_all(folder.path().join("data"));
        fs::create_dir(folder.path().join("data")).unwrap();
        names.iter().for_each(|name| drop(file(&folder.path().join("data"), name, b"x")));
        let listed = list(&[folder.path().join("data")], &folder.path().join("out"));
        listed.map(|(inputs, _)| inputs.into_iter().map(|input| input.kind).collect::<Vec<_>>())
    };
    assert_eq!(kinds_of(&["a.json", "b.py"]).unwrap(), [Kind::Text, Kind::Text]);
    assert_eq!(
        kinds_of(&["a.json", "b.jsonl", "c.parquet"]).unwrap(),
        [Kind::JsonLines, Kind::JsonLines, Kind::Parquet]
    );
    assert_eq!(kinds_of(&["a.json"]).unwrap(), [Kind::JsonLines]);
    for records in ["a.jsonl", "a.parquet", "a.json.gz"] {
        let error = kinds_of(&[records, "README.md"]).unwrap_err().to_string();
        assert!(error.contains(records) && error.contains("README.md") && error.contains("give the files"), "{error}");
    }
}

#[test]
fn a_file_that_changes_ends_the_walk() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"b\"}\n");
    let (inputs, _) = list(std::slice::from_ref(&path), &folder.path().join("out")).unwrap();
    let mut walk = Walk::new(inputs.into(), Reading::default(), Position::default());
    walk.next().unwrap().unwrap();
    fs::write(&path, "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\"c\"}\n").unwrap();
    let error = std::iter::from_fn(|| walk.next().transpose()).find_map(std::result::Result::err);
    let error = error.unwrap().to_string();
    assert!(error.starts_with(path.to_str().unwrap()) && error.contains("changed"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_walk_goes_on_from_any_position(
        documents in prop::collection::vec(prop::collection::vec("[a-zö ]{0,9}", 1..6), 1..4),
        kinds in prop::collection::vec(0usize..4, 4),
        at in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (i, (texts, kind)) in documents.iter().zip(kinds).enumerate() {
            let lines: String = texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect();
            let write = |name: &str, bytes: &[u8]| file(folder.path(), &format!("{i}{name}"), bytes);
            paths.push(match kind {
                0 => write(".jsonl", lines.as_bytes()),
                1 => write(".jsonl.gz", &gzip(lines.as_bytes())),
                2 => write(".jsonl.zst", &zstd(lines.as_bytes())),
                _ => {
                    let path = folder.path().join(format!("{i}.parquet"));
                    parquet(&path, &texts.iter().map(String::as_str).collect::<Vec<_>>());
                    path
                }
            });
        }
        let all = walked(&paths, &Reading::default(), Position::default());
        let expected: Vec<_> = documents.concat();
        prop_assert_eq!(texts(&paths, &Reading::default()), expected);
        let at = at.index(all.len());
        let rest = walked(&paths, &Reading::default(), all[at].2);
        prop_assert_eq!(&rest[..], &all[at + 1..]);
    }
}
