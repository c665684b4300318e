//! A token folder: its `index.json`, then tokens, ends of documents and mask of each of three
//! shards.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::{assert_is_line, folder, join, split, write};
use crate::folder::index::{INDEX, Index, Kind, Shard};
use crate::folder::make::{Append, Settings, tokenize};
use crate::folder::{TokenFolder, is_token_folder};
use crate::subword::examples::byte_level;
use crate::tokens::Split;

/// The shards of an input.
const SHARDS: [&str; 3] = ["train-00000", "train-00001", "validation-00000"];
const FILES: usize = 3 * SHARDS.len();

/// Folders with and without masks, with tokens of 16 and of 32 bits, and with one shard.
pub fn seeds() -> Vec<Vec<u8>> {
    let pair = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion});
    let texts = ["one", "two the", "three", "four", "five on a", "six"].map(|text| json!({"text": text}));
    let pairs = [pair("a", " b"), pair("one", " on the"), pair("c", " d"), pair("", "all")];
    vec![made(&texts, false, 20), made(&pairs, false, 12), made(&texts, true, 1 << 20), made(&pairs, true, 12)]
}

/// The folder of these documents, with tokens of 32 bits if it is `wide`.
fn made(documents: &[Value], wide: bool, shard_tokens: u64) -> Vec<u8> {
    let root = folder();
    let tokenizer = byte_level(root.path());
    if wide {
        let text = fs::read(&tokenizer).expect("it has been written");
        let mut config: Value = serde_json::from_slice(&text).expect("JSON");
        let vocab = config["model"]["vocab"].as_object_mut().expect("tokens");
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
        let all = special.into_iter().chain((266..70_000).map(|id| format!("token {id}")));
        vocab.extend(all.zip(263..).map(|(token, id)| (token, json!(id))));
        write(root.path(), "tokenizer.json", config.to_string().as_bytes());
    }
    let lines: Vec<String> = documents.iter().map(Value::to_string).collect();
    let settings = Settings {
        tokenizer,
        data: vec![write(root.path(), "a.jsonl", lines.join("\n").as_bytes())],
        out: root.path().join("out"),
        field: None,
        lines: false,
        validation: 0.3,
        append: Append::Token("<|endoftext|>".to_owned()),
        shard_tokens,
        threads: 1,
        skip_bad: false,
        restart: false,
    };
    tokenize(&settings, &mut |_| true).expect("documents");
    let read = |name: &str| fs::read(settings.out.join(name)).unwrap_or_default();
    let files = names().map(|name| read(&name));
    join(&[vec![read(INDEX)], files.collect()].concat())
}

/// The names of the files of shards, in their order in an input.
fn names() -> impl Iterator<Item = String> {
    SHARDS.into_iter().flat_map(|shard| Kind::ALL.map(|kind| kind.file(shard)))
}

/// A folder that opens can be read, as far as its tokens are in the vocabulary, and one that is
/// verified has the tokens, documents and masks that its files and index say.
pub fn check(data: &[u8]) {
    let [index, files @ ..] = split::<{ FILES + 1 }>(data);
    check_folder(index, &files.map(<[u8]>::to_vec));
    // Few inputs have the right sizes and checksums, so each is tried with them as well.
    if let Ok(mut index) = serde_json::from_slice::<Index>(index) {
        let mut files = files.map(<[u8]>::to_vec);
        seal(&mut index, &mut files);
        check_folder(&serde_json::to_vec(&index).expect("plain values"), &files);
    }
}

/// Makes sizes and checksums right.
fn seal(index: &mut Index, files: &mut [Vec<u8>; FILES]) {
    let sum = |bytes: &[u8]| format!("{:016x}", xxh3_64(bytes));
    let token_bytes = index.token_bytes.clamp(1, 4) as usize;
    for shards in [&mut index.train, &mut index.validation] {
        for shard in &mut shards.shards {
            let Some(at) = SHARDS.iter().position(|name| *name == shard.name) else { continue };
            let [tokens, documents, mask] = &mut files[3 * at..3 * at + 3] else { unreachable!("three files") };
            tokens.truncate(tokens.len() / token_bytes * token_bytes);
            documents.truncate(documents.len() / 8 * 8);
            shard.tokens = (tokens.len() / token_bytes) as u64;
            shard.documents = documents.len() as u64 / 8;
            mask.resize((shard.tokens as usize).div_ceil(8), 0);
            shard.xxh3.tokens = sum(tokens);
            shard.xxh3.documents = sum(documents);
            shard.xxh3.mask = shard.xxh3.mask.as_ref().map(|_| sum(mask));
        }
        let sum = |number: fn(&Shard) -> u64| shards.shards.iter().map(number).fold(0, u64::wrapping_add);
        (shards.tokens, shards.documents) = (sum(|shard| shard.tokens), sum(|shard| shard.documents));
        shards.masked = sum(|shard| shard.masked);
    }
}

fn check_folder(index: &[u8], files: &[Vec<u8>; FILES]) -> bool {
    let root = folder();
    write(root.path(), INDEX, index);
    for (name, bytes) in names().zip(files) {
        write(root.path(), &name, bytes);
    }
    assert!(is_token_folder(root.path()));
    let opened = match TokenFolder::open(root.path()) {
        Ok(opened) => opened,
        Err(error) => {
            assert_is_line(&error);
            return false;
        }
    };
    let is_whole = opened.verify().inspect_err(assert_is_line).is_ok();
    for split in [Split::Train, Split::Validation] {
        check_split(&opened, split, is_whole);
    }
    is_whole
}

fn check_split(opened: &TokenFolder, split: Split, is_whole: bool) {
    let length = opened.len(split);
    let (mut tokens, mut masked) = (vec![0; length as usize], vec![true; length as usize]);
    let is_read = opened.read(split, 0, &mut tokens).is_ok();
    opened.read_mask(split, 0, &mut masked).expect("its size has been checked");
    assert!(!is_read || tokens.iter().all(|&token| (token as usize) < opened.vocab()));
    let window = length / 3..length - length / 3;
    let [all, some] = [0..length, window.clone()].map(|range| starts(opened, split, range));
    if is_whole {
        let (all, some) = (all.expect("it is whole"), some.expect("it is whole"));
        assert!(is_read);
        assert_eq!(all, expected_starts(opened, split));
        assert_eq!(some, all.into_iter().filter(|start| window.contains(start)).collect::<Vec<_>>());
        let count = masked.iter().filter(|&&masked| masked).count() as u64;
        assert_eq!(count, opened.index().split(split).masked);
        assert_eq!(opened.has_mask(split), count > 0);
    }
}

/// Where documents begin, if the folder says; in order and in the range in any case.
fn starts(opened: &TokenFolder, split: Split, range: Range<u64>) -> Option<Vec<u64>> {
    let starts = opened.document_starts(split, range.clone()).ok()?;
    assert!(starts.is_sorted_by(|one, next| one < next) && starts.iter().all(|start| range.contains(start)));
    Some(starts)
}

/// Where documents begin, by the files themselves.
fn expected_starts(opened: &TokenFolder, split: Split) -> Vec<u64> {
    let (mut starts, mut first) = (vec![0], 0);
    for shard in &opened.index().split(split).shards {
        starts.extend(ends(opened.path(), shard).map(|end| first + end));
        first += shard.tokens;
    }
    starts.retain(|&start| start < first);
    starts
}

fn ends(folder: &Path, shard: &Shard) -> impl Iterator<Item = u64> {
    let bytes = fs::read(folder.join(Kind::Documents.file(&shard.name))).expect("it is there");
    let (ends, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty());
    ends.iter().map(|&end| u64::from_le_bytes(end)).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_whole_folders() {
        for seed in seeds() {
            let [index, files @ ..] = split::<{ FILES + 1 }>(&seed);
            assert!(check_folder(index, &files.map(<[u8]>::to_vec)));
        }
    }
}
