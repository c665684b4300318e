//! A token file.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::tokens::TokenWriter;
use crate::{Origin, Split, TokenFile, tokenizer};

/// Bytes of the header.
const HEADER: usize = 72;

/// A file as it is written, and one without tokens.
pub fn seeds() -> Vec<Vec<u8>> {
    let folder = std::env::temp_dir().join(format!("pillion-seeds-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = |train: &[u16], validation: &[u16]| {
        let path = folder.join("seed.tokens");
        let mut writer = TokenWriter::create(&path, tokenizer::VOCAB).expect("a file");
        writer.push(Split::Train, &mut train.to_vec()).expect("a file");
        writer.push(Split::Validation, &mut validation.to_vec()).expect("a file");
        writer.finish(Origin { files: 3, bytes: 12, not_text: 1 }).expect("a file");
        std::fs::read(&path).expect("it has been written")
    };
    let seeds = vec![file(&[1, 2, 3, 256], &[5, 6]), file(&[], &[])];
    std::fs::remove_dir_all(&folder).expect("it was made here");
    seeds
}

/// A file that is opened has the tokens that it says.
pub fn check(data: &[u8]) {
    check_file(data);
    // Few inputs have the right checksums, so each is tried with them as well.
    let mut sealed = data.to_vec();
    if sealed.len() >= HEADER {
        let mut hash = Xxh3::new();
        hash.update(&sealed[HEADER..]);
        hash.update(&sealed[16..32]);
        sealed[56..64].copy_from_slice(&hash.digest().to_le_bytes());
        let header = xxh3_64(&sealed[..64]);
        sealed[64..72].copy_from_slice(&header.to_le_bytes());
        check_file(&sealed);
    }
}

fn check_file(data: &[u8]) {
    let memory = rustix::fs::memfd_create("fuzzing", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
    let mut rest = data;
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&memory, rest).expect("memory")..];
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
    let Ok(file) = TokenFile::open(&path) else { return };
    assert!((1..=1 << 16).contains(&file.vocab()));
    let mut found = Vec::new();
    let mut is_whole = true;
    for split in [Split::Train, Split::Validation] {
        let mut tokens = vec![0; file.len(split) as usize];
        is_whole &= file.read(split, 0, &mut tokens).is_ok();
        found.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        assert!(!is_whole || tokens.iter().all(|&token| usize::from(token) < file.vocab()));
    }
    assert_eq!(found.len(), data.len() - HEADER);
    if file.verify().is_ok() {
        assert!(is_whole && found == data[HEADER..]);
    }
}
