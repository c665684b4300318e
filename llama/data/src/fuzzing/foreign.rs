//! A file of llm.c, nanoGPT or Megatron: Megatron's index, which is empty for the others, then the
//! tokens.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;

use super::{assert_is_line, folder, join, split, write};
use crate::foreign::{ForeignFile, Format};
use crate::subword::Tokenizer;
use crate::subword::examples::byte_level;

/// A file of each format, as their programs write them, and with several types of tokens.
pub fn seeds() -> Vec<Vec<u8>> {
    let documents = [vec![vec![5, 6], vec![7]], vec![], vec![vec![8, 9, 10]], vec![vec![11]]];
    let nano_gpt: Vec<u8> = [1u16, 2, 263, 3, 263, 4].iter().flat_map(|token| token.to_le_bytes()).collect();
    let mut seeds = vec![
        (Vec::new(), llmc(20_240_520, 1, &[50_256, 1, 2, 50_256, 3], false)),
        (Vec::new(), llmc(20_240_801, 7, &[128_000, 1, 2, 128_000, 3], true)),
        (Vec::new(), nano_gpt),
    ];
    let of_megatron = [(8, false), (4, true), (1, false), (5, false)];
    seeds.extend(of_megatron.map(|(code, modes)| megatron(code, &documents, modes)));
    seeds.into_iter().map(|(index, tokens)| join(&[index, tokens])).collect()
}

/// A file as `write_datafile` of llm.c writes it.
pub(crate) fn llmc(magic: i32, version: i32, tokens: &[u32], wide: bool) -> Vec<u8> {
    let mut header = [0i32; 256];
    header[..3].copy_from_slice(&[magic, version, tokens.len() as i32]);
    let mut bytes: Vec<u8> = header.iter().flat_map(|number| number.to_le_bytes()).collect();
    for &token in tokens {
        if wide { bytes.extend(token.to_le_bytes()) } else { bytes.extend((token as u16).to_le_bytes()) }
    }
    bytes
}

/// Files as `_IndexWriter` of Megatron-LM writes them: documents are lists of sequences.
pub(crate) fn megatron(code: u8, documents: &[Vec<Vec<i64>>], modes: bool) -> (Vec<u8>, Vec<u8>) {
    let size = match code {
        1 | 2 => 1,
        3 | 8 => 2,
        4 => 4,
        _ => 8,
    };
    let sequences: Vec<&Vec<i64>> = documents.iter().flatten().collect();
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(code);
    index.extend((sequences.len() as u64).to_le_bytes());
    index.extend((documents.len() as u64 + 1).to_le_bytes());
    sequences.iter().for_each(|sequence| index.extend((sequence.len() as i32).to_le_bytes()));
    let (mut bin, mut bounds) = (Vec::new(), vec![0]);
    for sequence in &sequences {
        index.extend((bin.len() as i64).to_le_bytes());
        sequence.iter().for_each(|token| bin.extend(&token.to_le_bytes()[..size]));
    }
    documents.iter().for_each(|document| bounds.push(bounds[bounds.len() - 1] + document.len() as i64));
    bounds.iter().for_each(|bound| index.extend(bound.to_le_bytes()));
    if modes {
        index.extend(vec![0; sequences.len()]);
    }
    (index, bin)
}

/// A tokenizer with 266 tokens.
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let root = folder();
    Tokenizer::load(&byte_level(root.path())).expect("an example")
});

/// A file that opens can be read, as far as its tokens are in the vocabulary, and one that is
/// verified has all tokens and documents, whatever part of it is read.
pub fn check(data: &[u8]) {
    let [index, tokens] = split(data);
    let root = folder();
    let path = write(root.path(), "a.bin", tokens);
    if !index.is_empty() {
        write(root.path(), "a.idx", index);
    }
    for tokenizer in [None, Some(&*TOKENIZER)] {
        check_file(&path, tokenizer);
    }
}

fn check_file(path: &Path, tokenizer: Option<&Tokenizer>) {
    let file = match ForeignFile::open(path, tokenizer) {
        Ok(file) => file,
        Err(error) => return assert_is_line(&error),
    };
    file.fingerprint().expect("its sizes have been checked");
    let is_whole = file.verify().inspect_err(assert_is_line).is_ok();
    let length = file.len();
    let mut tokens = vec![0; length as usize];
    let is_read = file.read(0, &mut tokens).is_ok();
    assert!(is_read || !is_whole);
    assert!(!is_read || tokens.iter().all(|&token| file.vocab().is_none_or(|vocab| (token as usize) < vocab)));
    let window = length / 3..length - length / 3;
    let [all, some] = [0..length, window.clone()].map(|range| starts(&file, range));
    if is_whole {
        let (all, some) = (all.expect("it is whole"), some.expect("it is whole"));
        assert_eq!(all.is_some(), file.format() != Format::NanoGpt || tokenizer.is_some());
        let all = all.unwrap_or_default();
        assert!(file.documents().is_none_or(|documents| all.len() as u64 <= documents));
        assert_eq!(some.unwrap_or_default(), all.into_iter().filter(|at| window.contains(at)).collect::<Vec<_>>());
        let bytes = fs::metadata(path).expect("it is there").len();
        assert!(length <= bytes && (length > 0 || bytes == 0 || bytes == 1024));
    }
}

/// Where documents begin, if the file says; in order and in the range in any case.
fn starts(file: &ForeignFile, range: Range<u64>) -> Option<Option<Vec<u64>>> {
    let found = file.document_starts(range.clone()).ok()?;
    if let Some(starts) = &found {
        assert!(starts.is_sorted_by(|one, next| one < next) && starts.iter().all(|start| range.contains(start)));
    }
    Some(found)
}
