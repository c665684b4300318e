use std::fs;

use proptest::prelude::*;

use super::*;
use crate::fuzzing::foreign::{llmc, megatron};
use crate::subword::examples::{byte_level, sentence_piece};

fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn all(file: &ForeignFile) -> Vec<u32> {
    let mut tokens = vec![0; file.len() as usize];
    file.read(0, &mut tokens).unwrap();
    tokens
}

#[test]
fn files_of_llmc_have_their_tokens_and_documents() {
    let folder = tempfile::tempdir().unwrap();
    for (magic, version, begin, wide, format, vocab) in
        [(20240520, 1, 50256, false, Format::LlmcGpt2, 50257), (20240801, 7, 128000, true, Format::LlmcLlama3, 128256)]
    {
        let tokens = [begin, 1, 2, begin, 3, begin];
        let path = file(folder.path(), "a.bin", &llmc(magic, version, &tokens, wide));
        let found = ForeignFile::open(&path, None).unwrap();
        assert_eq!((found.format(), found.vocab(), found.len()), (format, Some(vocab), 6));
        assert_eq!(all(&found), tokens);
        assert_eq!(found.document_starts(0..6).unwrap().unwrap(), [0, 3, 5]);
        assert_eq!(found.document_starts(1..5).unwrap().unwrap(), [3]);
        found.verify().unwrap();
    }
}

#[test]
fn files_of_nanogpt_need_a_tokenizer_for_their_vocabulary_and_documents() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::load(&byte_level(folder.path())).unwrap();
    let tokens = [1u16, 2, 263, 3, 263, 4];
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let path = file(folder.path(), "train.bin", &bytes);
    let plain = ForeignFile::open(&path, None).unwrap();
    assert_eq!((plain.format(), plain.vocab(), plain.document_starts(0..6).unwrap()), (Format::NanoGpt, None, None));
    let known = ForeignFile::open(&path, Some(&tokenizer)).unwrap();
    assert_eq!(known.vocab(), Some(266));
    assert_eq!(known.document_starts(0..6).unwrap().unwrap(), [0, 3, 5]);
    assert_eq!(known.document_starts(3..6).unwrap().unwrap(), [3, 5]);
    assert_eq!(known.fingerprint().unwrap(), plain.fingerprint().unwrap());
    let path = file(folder.path(), "train.bin", &266u16.to_le_bytes());
    plain.verify().unwrap_err();
    let error = ForeignFile::open(&path, Some(&tokenizer)).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains("token 266 at 0 is outside the vocabulary of 266"), "{error}");
}

#[test]
fn files_of_megatron_have_the_documents_of_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let documents = [vec![vec![5, 6], vec![7]], vec![], vec![vec![8, 9, 10]], vec![vec![11]]];
    for code in [1, 2, 3, 4, 5, 8] {
        for modes in [false, true] {
            let (index, bin) = megatron(code, &documents, modes);
            let path = file(folder.path(), "a.bin", &bin);
            let index = file(folder.path(), "a.idx", &index);
            for path in [path, index] {
                let found = ForeignFile::open(&path, None).unwrap();
                assert_eq!((found.format(), found.documents(), found.len()), (Format::Megatron, Some(4), 7));
                assert_eq!(all(&found), [5, 6, 7, 8, 9, 10, 11]);
                assert_eq!(found.document_starts(0..7).unwrap().unwrap(), [0, 3, 6]);
                assert_eq!(found.document_starts(1..6).unwrap().unwrap(), [3]);
                found.verify().unwrap();
            }
        }
    }
    let (index, bin) = megatron(4, &[], false);
    let path = file(folder.path(), "a.bin", &bin);
    file(folder.path(), "a.idx", &index);
    assert_eq!(ForeignFile::open(&path, None).unwrap().len(), 0);
}

#[test]
fn damaged_files_are_errors_that_name_file_and_fault() {
    let folder = tempfile::tempdir().unwrap();
    let gpt = llmc(20240520, 1, &[50256, 1], false);
    let mut version = gpt.clone();
    version[4] = 2;
    for (name, bytes, says) in [
        ("a.bin", &gpt[..gpt.len() - 1], "2 tokens take 1028 bytes, found 1027"),
        ("a.bin", &gpt[..100], "cut short"),
        ("a.bin", &version[..], "expected version 1"),
        ("a.bin", b"", "cannot take 0 bytes"),
        ("a.bin", b"abc", "cannot take 3 bytes"),
        ("a.txt", b"some text", "not a token file that is known"),
    ] {
        let path = file(folder.path(), name, bytes);
        let error = ForeignFile::open(&path, None).unwrap_err().to_string();
        assert!(error.starts_with(path.to_str().unwrap()) && error.contains(says), "{error}");
    }
    let path = file(folder.path(), "a.bin", &llmc(20240520, 1, &[50257], false));
    let error = ForeignFile::open(&path, None).unwrap().verify().unwrap_err().to_string();
    assert!(error.contains("token 50257 at 0 is outside the vocabulary of 50257"), "{error}");
    let tokenizer = Tokenizer::load(&sentence_piece(folder.path())).unwrap();
    let error = ForeignFile::open(&path, Some(&tokenizer)).unwrap_err().to_string();
    assert!(error.contains("the tokenizer has 294 tokens"), "{error}");

    let (index, bin) = megatron(4, &[vec![vec![1, 2]], vec![vec![-3]]], false);
    let mut other_type = index.clone();
    other_type[17] = 6;
    let mut unordered = index.clone();
    unordered[34 + 8 + 8] = 4;
    let mut beyond = index.clone();
    let last = beyond.len() - 8;
    beyond[last] = 9;
    for (index, bin, says) in [
        (&index[..20], &bin[..], "cut short"),
        (&b"x".repeat(60)[..], &bin[..], "does not begin with MMIDIDX"),
        (&index[..index.len() - 1], &bin[..], "2 sequences take 82 bytes, found 81"),
        (&index[..], &bin[..8], "its index ends at byte 12, the file at 8"),
        (&index[..], &bin[..9], "9 bytes are no tokens of 4 bytes"),
        (&other_type[..], &bin[..], "type 6"),
        (&beyond[..], &bin[..], "begins at sequence 9 of 2"),
        (&unordered[..], &bin[..], "ends at byte 8"),
        (&index[..], &bin[..], "a negative token at 2"),
    ] {
        let path = file(folder.path(), "m.bin", bin);
        file(folder.path(), "m.idx", index);
        let opened = ForeignFile::open(&path, None);
        let error = opened.and_then(|file| file.verify()).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("/m."), "{says}: {error}");
    }
    // Documents that are out of order are noticed where they are read, too.
    let (mut index, bin) = megatron(8, &[vec![vec![1, 2]], vec![vec![3]], vec![vec![4]]], false);
    let bounds = index.len() - 32;
    index[bounds + 8] = 2;
    index[bounds + 16] = 1;
    let path = file(folder.path(), "m.bin", &bin);
    file(folder.path(), "m.idx", &index);
    let error = ForeignFile::open(&path, None).unwrap().document_starts(0..4).unwrap_err().to_string();
    assert!(error.contains("document 2 begins at token 2, out of order"), "{error}");
    fs::remove_file(folder.path().join("m.bin")).unwrap();
    let error = ForeignFile::open(&folder.path().join("m.idx"), None).unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("m.bin"), "{error}");
}

#[test]
fn a_file_that_changes_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "a.bin", &[1, 0, 2, 0]);
    let found = ForeignFile::open(&path, None).unwrap();
    found.check_unchanged().unwrap();
    fs::write(&path, [1, 0, 2, 0, 3, 0]).unwrap();
    let error = found.check_unchanged().unwrap_err().to_string();
    assert!(error.starts_with(path.to_str().unwrap()) && error.contains("changed"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn documents_of_a_window_are_those_of_the_whole(
        lengths in prop::collection::vec(0usize..5, 0..12),
        window in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let documents: Vec<_> = lengths.iter().map(|&length| vec![vec![3; length]]).collect();
        let (index, bin) = megatron(8, &documents, false);
        let path = file(folder.path(), "a.bin", &bin);
        file(folder.path(), "a.idx", &index);
        let found = ForeignFile::open(&path, None).unwrap();
        found.verify().unwrap();
        let total = lengths.iter().sum::<usize>() as u64;
        let mut starts: Vec<u64> = lengths.iter().scan(0, |at, &length| {
            *at += length as u64;
            Some(*at - length as u64)
        }).filter(|&start| start < total).collect();
        starts.dedup();
        let at = |index: prop::sample::Index| index.index(total as usize + 1) as u64;
        let range = at(window.0).min(at(window.1))..at(window.0).max(at(window.1));
        let expected: Vec<u64> = starts.into_iter().filter(|start| range.contains(start)).collect();
        prop_assert_eq!(found.document_starts(range).unwrap().unwrap(), expected);
    }

    #[test]
    fn any_index_of_megatron_is_refused_or_read(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let folder = tempfile::tempdir().unwrap();
        let (mut index, bin) = megatron(8, &[vec![vec![1, 2]], vec![vec![3]], vec![vec![4, 5]]], false);
        let at = at.index(index.len());
        index[at] = byte;
        let path = file(folder.path(), "a.bin", &bin);
        file(folder.path(), "a.idx", &index);
        if let Ok(found) = ForeignFile::open(&path, None) {
            let _ = found.verify();
            let _ = found.document_starts(0..found.len());
            let _ = found.fingerprint();
        }
    }
}
