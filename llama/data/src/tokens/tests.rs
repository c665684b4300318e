//! Token files: written, read, and damaged.

use super::*;
use crate::tokenizer::VOCAB;
use proptest::prelude::*;

/// A token file with these splits, for the tests of this module's siblings.
pub(crate) fn token_file(folder: &Path, train: &[u16], validation: &[u16]) -> TokenFile {
    let path = folder.join("tokens.bin");
    let mut writer = TokenWriter::create(&path, VOCAB).unwrap();
    writer.push(Split::Train, &mut train.to_vec()).unwrap();
    writer.push(Split::Validation, &mut validation.to_vec()).unwrap();
    writer.finish(ORIGIN).unwrap();
    TokenFile::open(&path).unwrap()
}

const ORIGIN: Origin = Origin { files: 3, bytes: 1234, not_text: 1 };

fn problem(path: &Path) -> String {
    let error = TokenFile::open(path).and_then(|file| file.verify()).unwrap_err();
    assert!(matches!(error, Error::Tokens { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    text
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let train: Vec<u16> = (0..70_000).map(|i| (i % 257) as u16).collect();
    let tokens = token_file(folder.path(), &train, &[1, 256, 3]);
    assert_eq!(tokens.len(Split::Train), 70_000);
    assert_eq!(tokens.len(Split::Validation), 3);
    assert_eq!(tokens.origin(), ORIGIN);
    let mut part = [0; 2];
    tokens.read(Split::Train, 69_998, &mut part).unwrap();
    assert_eq!(part, train[69_998..]);
    tokens.read(Split::Validation, 1, &mut part).unwrap();
    assert_eq!(part, [256, 3]);
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "no temporary file is left: {names:?}");
}

#[test]
fn the_layout_is_the_documented_one() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = token_file(folder.path(), &[0x41, 0x100], &[0x42]);
    let bytes = fs::read(tokens.path()).unwrap();
    assert_eq!(bytes[..16], *b"PILLTOKS\x01\0\0\0\x01\x01\0\0");
    assert_eq!(bytes[16..32], *b"\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
    assert_eq!(bytes[72..], *b"\x41\0\0\x01\x42\0");
    let hashed = [&bytes[72..], &bytes[16..32]].concat();
    assert_eq!(tokens.fingerprint(), xxh3_64(&hashed));
}

#[test]
fn the_fingerprint_knows_where_the_splits_divide() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one = token_file(one.path(), &[1, 2], &[3]);
    let two = token_file(two.path(), &[1], &[2, 3]);
    assert_ne!(one.fingerprint(), two.fingerprint());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_flipped_bit_and_any_cut_is_noticed(at: prop::sample::Index, bit in 0u8..8) {
        let folder = tempfile::tempdir().unwrap();
        let train: Vec<u16> = (0..200).collect();
        let path = token_file(folder.path(), &train, &[5; 20]).path().to_owned();
        let whole = fs::read(&path).unwrap();
        let at = at.index(whole.len());

        let mut damaged = whole.clone();
        damaged[at] ^= 1 << bit;
        fs::write(&path, damaged).unwrap();
        problem(&path);
        fs::write(&path, &whole[..at]).unwrap();
        problem(&path);
    }
}

#[test]
fn a_longer_foreign_or_missing_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = token_file(folder.path(), &[1, 2], &[3]).path().to_owned();
    let mut whole = fs::read(&path).unwrap();
    whole.push(0);
    fs::write(&path, &whole).unwrap();
    assert!(problem(&path).contains("expected 78 bytes, found 79"));
    fs::write(&path, [b'x'; 500]).unwrap();
    assert!(problem(&path).contains("not a token file"));
    whole[8] = 9;
    fs::write(&path, &whole).unwrap();
    assert!(problem(&path).contains("expected version 1, found 9"));
    let error = TokenFile::open(&folder.path().join("none")).unwrap_err();
    assert!(matches!(error, Error::Read { .. }));
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    let mut writer = TokenWriter::create(&path, VOCAB).unwrap();
    writer.push(Split::Train, &mut [257]).unwrap();
    writer.finish(ORIGIN).unwrap();
    assert!(problem(&path).contains("token 257"));
    // Whoever reads the part that is damaged is told, too: kernels would panic.
    let error = TokenFile::open(&path).unwrap().read(Split::Train, 0, &mut [0]).unwrap_err().to_string();
    assert!(error.contains("token 257 is outside the vocabulary of 257"), "{error}");
}

#[test]
fn a_vocabulary_that_no_token_file_has_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    for vocab in [0, (1 << 16) + 1] {
        TokenWriter::create(&path, vocab).unwrap().finish(ORIGIN).unwrap();
        assert!(problem(&path).contains(&format!("a vocabulary of {vocab}, but tokens have 16 bits")));
    }
}

#[test]
fn an_abandoned_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    drop(TokenWriter::create(&folder.path().join("tokens.bin"), VOCAB).unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
