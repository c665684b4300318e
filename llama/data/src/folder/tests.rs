use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::make::{Append, Pace, Settings, tokenize, tokenize_at};
use super::*;
use crate::subword::Tokenizer;
use crate::subword::examples::{byte_level, sentence_piece};

const SPLITS: [Split; 2] = [Split::Train, Split::Validation];

fn settings(root: &Path, data: &[&str]) -> Settings {
    Settings {
        tokenizer: root.join("tokenizer.json"),
        data: data.iter().map(|name| root.join(name)).collect(),
        out: root.join("out"),
        field: None,
        lines: false,
        validation: 0.3,
        append: Append::Token("<|endoftext|>".to_owned()),
        shard_tokens: 1 << 20,
        threads: 2,
        skip_bad: false,
        restart: false,
    }
}

/// A record or two at a time.
fn pace(flush_bytes: u64) -> Pace {
    Pace { batch_bytes: 1, flush_bytes, flush_every: Duration::ZERO }
}

fn made(settings: &Settings) -> TokenFolder {
    tokenize(settings, &mut |_| true).unwrap();
    let folder = TokenFolder::open(&settings.out).unwrap();
    folder.verify().unwrap();
    folder
}

/// All files of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// The documents of a split, by what reads windows: tokens and masks.
fn documents(folder: &TokenFolder, split: Split, window: u64) -> Vec<(Vec<u32>, Vec<bool>)> {
    let mut documents: Vec<(Vec<u32>, Vec<bool>)> = Vec::new();
    let mut at = 0;
    while at < folder.len(split) {
        let end = (at + window).min(folder.len(split));
        let mut tokens = vec![0; (end - at) as usize];
        let mut masked = vec![true; tokens.len()];
        folder.read(split, at, &mut tokens).unwrap();
        folder.read_mask(split, at, &mut masked).unwrap();
        let starts = folder.document_starts(split, at..end).unwrap();
        for ((token, masked), place) in tokens.into_iter().zip(masked).zip(at..) {
            if starts.contains(&place) {
                documents.push(Default::default());
            }
            let last = documents.last_mut().expect("the first token begins a document");
            last.0.push(token);
            last.1.push(masked);
        }
        at = end;
    }
    documents
}

#[derive(Clone, Debug)]
enum Made {
    Text(String),
    Pair(String, String),
}

fn any_document() -> impl Strategy<Value = Made> {
    prop_oneof![
        3 => "[a-z ö]{0,12}".prop_map(Made::Text),
        1 => "[a-z]{60}".prop_map(Made::Text),
        1 => ("[a-z]{0,5}", " [a-zö]{1,9}").prop_map(|(prompt, completion)| Made::Pair(prompt, completion)),
    ]
}

/// What a folder must hold: each document with its token of the end, in its split, in order.
fn expected(tokenizer: &Tokenizer, all: &[Made], below: u64) -> [Vec<(Vec<u32>, Vec<bool>)>; 2] {
    let mut splits = [Vec::new(), Vec::new()];
    for document in all {
        let (text, masked) = match document {
            Made::Text(text) if text.is_empty() => continue,
            Made::Text(text) => (text.clone(), 0),
            Made::Pair(prompt, completion) => {
                (format!("{prompt}{completion}"), tokenizer.encode(prompt).unwrap().len())
            }
        };
        let mut tokens = tokenizer.encode(&text).unwrap();
        tokens.push(263);
        let mask = (0..tokens.len()).map(|i| i < masked).collect();
        splits[usize::from(xxh3_64(text.as_bytes()) < below)].push((tokens, mask));
    }
    splits
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn no_document_is_lost_or_doubled_whatever_interrupts(
        all in prop::collection::vec(any_document(), 1..40),
        validation in prop_oneof![Just(0.0), Just(0.3), Just(0.9)],
        shard_tokens in prop_oneof![1u64..40, Just(1 << 20)],
        threads in prop::collection::vec(1usize..4, 4),
        kills in prop::collection::vec(0usize..30, 0..3),
        flush_bytes in 0u64..200,
        window in 1u64..50,
    ) {
        let root = tempfile::tempdir().unwrap();
        let path = byte_level(root.path());
        let tokenizer = Tokenizer::load(&path).unwrap();
        let lines: String = all.iter().map(|document| match document {
            Made::Text(text) => json!({"text": text}),
            Made::Pair(prompt, completion) => json!({"prompt": prompt, "completion": completion}),
        }.to_string() + "\n").collect();
        let half = lines.char_indices().filter(|(_, c)| *c == '\n').nth(all.len() / 2).unwrap().0 + 1;
        fs::create_dir(root.path().join("data")).unwrap();
        fs::write(root.path().join("data/0.jsonl"), &lines[..half]).unwrap();
        fs::write(root.path().join("data/1.jsonl"), &lines[half..]).unwrap();

        let mut settings = settings(root.path(), &["data"]);
        settings = Settings { validation, shard_tokens, ..settings };
        let below = (validation * 2f64.powi(64)) as u64;
        let expected = expected(&tokenizer, &all, below);
        if expected.iter().all(Vec::is_empty) {
            prop_assert!(tokenize(&settings, &mut |_| true).unwrap_err().to_string().contains("no document"));
            return Ok(());
        }
        for (kill, threads) in kills.iter().zip(&threads) {
            settings.threads = *threads;
            let mut batches = 0;
            let stopped = tokenize_at(&settings, pace(flush_bytes), &mut |_| {
                batches += 1;
                batches <= *kill
            });
            if stopped.is_ok() {
                break;
            }
            prop_assert!(matches!(stopped, Err(Error::Stopped)), "{:?}", stopped);
            prop_assert!(TokenFolder::open(&settings.out).is_err(), "an unfinished folder is no folder");
        }
        settings.threads = threads[3];
        let folder = made(&settings);
        for split in SPLITS {
            prop_assert_eq!(&documents(&folder, split, window), &expected[split as usize], "{}", split);
            prop_assert_eq!(folder.documents(split), expected[split as usize].len() as u64);
            let shards = &folder.index().split(split).shards;
            prop_assert!(shards.iter().all(|shard| shard.tokens <= shard_tokens));
        }
        let empty = all.iter().filter(|document| matches!(document, Made::Text(text) if text.is_empty())).count();
        prop_assert_eq!(folder.index().origin.empty, empty as u64);
        // Whatever interrupted it, the bytes are those of one call.
        let interrupted = files(&settings.out);
        let once = Settings { out: root.path().join("once"), threads: 1, ..settings.clone() };
        let fingerprint = made(&once).fingerprint();
        prop_assert_eq!(fingerprint, folder.fingerprint());
        prop_assert_eq!(interrupted, files(&once.out));
    }
}

#[test]
fn a_document_lies_in_one_shard_unless_it_is_longer_than_one() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    fs::write(root.path().join("a.txt"), "abc\nde\nfghijklmnop\nq\n").unwrap();
    let settings = Settings { shard_tokens: 5, validation: 0.0, lines: true, ..settings(root.path(), &["a.txt"]) };
    let folder = made(&settings);
    let shards: Vec<_> = folder.index().train.shards.iter().map(|shard| (shard.tokens, shard.documents)).collect();
    // abc| de| fghij klmno p|q|
    assert_eq!(shards, [(4, 1), (3, 1), (5, 0), (5, 0), (4, 2)]);
    assert_eq!(folder.document_starts(Split::Train, 0..21).unwrap(), [0, 4, 7, 19]);
    assert_eq!(folder.document_starts(Split::Train, 8..19).unwrap(), [0; 0]);
    assert_eq!(folder.document_starts(Split::Train, 7..20).unwrap(), [7, 19]);
    assert_eq!(folder.document_starts(Split::Train, 3..3).unwrap(), [0; 0]);
}

#[test]
fn settings_and_inputs_that_changed_are_refused_by_name_until_a_restart() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    let data = root.path().join("a.txt");
    fs::write(&data, "one\n".repeat(100)).unwrap();
    let base = Settings { lines: true, ..settings(root.path(), &["a.txt"]) };
    let begin = || {
        let _ = fs::remove_dir_all(&base.out);
        let stopped = tokenize_at(&base, pace(0), &mut |watched| watched.documents < 50);
        assert!(matches!(stopped, Err(Error::Stopped)));
    };
    let refused = |settings: &Settings, says: &str| {
        let error = tokenize(settings, &mut |_| true).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("--restart"), "{error}");
    };
    begin();
    refused(&Settings { validation: 0.5, ..base.clone() }, "--validation is another");
    refused(&Settings { append: Append::Nothing, ..base.clone() }, "--append is another");
    refused(&Settings { shard_tokens: 9, ..base.clone() }, "--shard-tokens is another");
    refused(&Settings { lines: false, ..base.clone() }, "--field or --lines is another");
    fs::write(&data, "two\n".repeat(101)).unwrap();
    refused(&base, "a.txt has changed");
    let changed = made(&Settings { restart: true, ..base.clone() });
    assert_eq!(changed.documents(Split::Train) + changed.documents(Split::Validation), 101);
    // A complete folder is left alone.
    let before = files(&base.out);
    assert!(tokenize(&base, &mut |_| true).unwrap().was_complete);
    assert_eq!(files(&base.out), before);
    refused(&Settings { validation: 0.5, ..base.clone() }, "other files or settings");
    sentence_piece(root.path());
    let other = Settings { append: Append::End, restart: true, ..base.clone() };
    assert_eq!(made(&other).index().separator, Some(2));
    // What is not ours is kept.
    byte_level(root.path());
    fs::create_dir(root.path().join("mine")).unwrap();
    fs::write(root.path().join("mine/notes"), "").unwrap();
    let error = tokenize(&Settings { out: root.path().join("mine"), ..base.clone() }, &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("holds notes"), "{error}");
}

#[test]
fn bad_documents_end_the_work_or_are_counted() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    fs::write(root.path().join("a.jsonl"), "{\"text\":\"a\"}\n{\"text\":3}\n{\"text\":\"\"}\nno\n{\"text\":\"b\"}\n")
        .unwrap();
    fs::write(root.path().join("b.txt"), b"\xff").unwrap();
    let mut settings = settings(root.path(), &["a.jsonl", "b.txt"]);
    let error = tokenize(&settings, &mut |_| true).unwrap_err().to_string();
    let path = root.path().join("a.jsonl").canonicalize().unwrap();
    assert!(error.starts_with(&format!("{}: line 2: its field text is a number", path.display())), "{error}");
    assert!(error.contains("--skip-bad"), "{error}");
    settings.skip_bad = true;
    let outcome = tokenize(&settings, &mut |_| true).unwrap();
    assert_eq!((outcome.index.origin.bad, outcome.index.origin.empty, outcome.bad.len()), (3, 1, 3));
    assert_eq!(outcome.index.train.documents + outcome.index.validation.documents, 2);
}

#[test]
fn two_programs_do_not_write_in_one_folder() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    fs::write(root.path().join("a.txt"), "one").unwrap();
    let settings = settings(root.path(), &["a.txt"]);
    let mut inner = None;
    tokenize(&settings, &mut |_| {
        inner = Some(tokenize(&settings, &mut |_| true).unwrap_err().to_string());
        true
    })
    .unwrap();
    assert!(inner.unwrap().contains("another pillion tokenize writes here"));
}

#[test]
fn the_same_text_is_in_one_split_and_the_share_is_about_the_one_asked_for() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    let text: String = (0..4000).map(|i| format!("{}\n", i % 2000)).collect();
    fs::write(root.path().join("a"), text).unwrap();
    let folder = made(&Settings { lines: true, ..settings(root.path(), &["a"]) });
    let mut seen = HashMap::new();
    for split in SPLITS {
        for (tokens, _) in documents(&folder, split, 1000) {
            assert_eq!(*seen.entry(tokens).or_insert(split), split);
        }
    }
    assert_eq!(seen.len(), 2000);
    let share = folder.documents(Split::Validation) as f64 / 4000.0;
    // The deviation of 2000 draws is 0.01.
    assert!((share - 0.3).abs() < 0.05, "{share}");
}

#[test]
fn damage_is_noticed_by_opening_reading_or_verifying() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    let line = |i: i32| json!({"prompt": format!("a{i}"), "completion": format!(" b{i}")}).to_string() + "\n";
    fs::write(root.path().join("a.jsonl"), (0..50).map(line).collect::<String>()).unwrap();
    let settings = settings(root.path(), &["a.jsonl"]);
    let folder = made(&settings);
    assert!(folder.has_mask(Split::Train));
    folder.check_unchanged().unwrap();
    let whole = files(&settings.out);
    for (name, bytes) in whole.iter().filter(|(name, _)| name.contains("-0000") || *name == "index.json") {
        let path = settings.out.join(name);
        let names_it = |error: Error| {
            let error = error.to_string();
            assert!(error.starts_with(path.to_str().unwrap()), "{name}: {error}");
        };
        let folder = TokenFolder::open(&settings.out).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
        names_it(TokenFolder::open(&settings.out).unwrap_err());
        names_it(folder.check_unchanged().unwrap_err());
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 1;
        fs::write(&path, &damaged).unwrap();
        // The index has no checksum of its own.
        if name != "index.json" {
            names_it(TokenFolder::open(&settings.out).unwrap().verify().unwrap_err());
        }
        fs::write(&path, bytes).unwrap();
    }
    // 266 is the vocabulary.
    let path = settings.out.join("train-00000.tokens");
    let mut damaged = whole["train-00000.tokens"].clone();
    damaged[..2].copy_from_slice(&266u16.to_le_bytes());
    fs::write(&path, damaged).unwrap();
    let error = TokenFolder::open(&settings.out).unwrap().read(Split::Train, 0, &mut [0; 4]).unwrap_err();
    assert!(error.to_string().contains("token 266 is outside the vocabulary"), "{error}");
    // Ends that are out of order, or outside the shard, are noticed where they are read, too.
    let path = settings.out.join("train-00000.documents");
    let whole_ends = &whole["train-00000.documents"];
    for wrong in [whole_ends[16] as u64 + 1, u64::MAX] {
        let damaged = [&whole_ends[..8], &wrong.to_le_bytes(), &whole_ends[16..]].concat();
        fs::write(&path, damaged).unwrap();
        let folder = TokenFolder::open(&settings.out).unwrap();
        let error = folder.document_starts(Split::Train, 0..folder.len(Split::Train)).unwrap_err().to_string();
        assert!(error.starts_with(path.to_str().unwrap()) && error.contains("out of order"), "{error}");
    }
    fs::write(&path, whole_ends).unwrap();
    let index = settings.out.join("index.json");
    let mut counts: serde_json::Value = serde_json::from_slice(&whole["index.json"]).unwrap();
    let masked = counts["train"]["masked"].as_u64().unwrap() - 1;
    counts["train"]["masked"] = json!(masked);
    counts["train"]["shards"][0]["masked"] = json!(masked);
    fs::write(&index, counts.to_string()).unwrap();
    fs::write(settings.out.join("train-00000.tokens"), &whole["train-00000.tokens"]).unwrap();
    let error = TokenFolder::open(&settings.out).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains(&format!("{} masked tokens, but the index says {masked}", masked + 1)), "{error}");
    fs::remove_file(index).unwrap();
    let error = TokenFolder::open(&settings.out).unwrap_err().to_string();
    assert!(error.contains("unfinished"), "{error}");
}

#[test]
fn any_index_is_refused_or_read() {
    let root = tempfile::tempdir().unwrap();
    byte_level(root.path());
    fs::write(root.path().join("a.txt"), "one two").unwrap();
    let settings = settings(root.path(), &["a.txt"]);
    made(&settings);
    let path = settings.out.join("index.json");
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        for flip in [1, 0x10] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            fs::write(&path, &damaged).unwrap();
            if let Ok(folder) = TokenFolder::open(&settings.out) {
                let _ = folder.verify();
            }
        }
    }
}
