use proptest::prelude::*;

use super::*;
use crate::tokenizer::{END, VOCAB};
use crate::tokens::tests::token_file;

fn open(file: TokenFile, seq: usize, seed: u64) -> Result<Dataset> {
    Dataset::open(Tokens::of_file(file)?, seq, VOCAB, seed)
}

/// A split whose token `i` is a function of `i` that repeats late.
fn tokens(len: usize) -> Vec<u16> {
    (0..len).map(|i| (i * i % 251) as u16).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn an_epoch_is_every_window_once(seq in 1usize..60, len in 2usize..6000, seed: u64) {
        // Long sequences also cross the read buffer's end.
        let seq = if seq > 50 { seq * 100 } else { seq };
        let len = len.max(seq + 1);
        let folder = tempfile::tempdir().unwrap();
        let text = tokens(len);
        let data =
            open(token_file(folder.path(), &text, &text), seq, seed).unwrap();
        let n = (len - 1) / seq;
        prop_assert_eq!(data.samples_per_epoch(0), n as u64);
        prop_assert_eq!(data.validation_len(), n as u64);

        let wide: Vec<u32> = text.iter().map(|&t| t.into()).collect();
        let mut expected: Vec<_> = (0..n)
            .map(|i| (wide[i * seq..][..seq].to_vec(), wide[i * seq + 1..][..seq].to_vec()))
            .collect();
        expected.sort();
        for validation in [false, true] {
            let mut seen = Vec::new();
            for g in 0..n as u64 {
                let (mut inputs, mut targets) = (vec![0; seq], vec![0; seq]);
                if validation {
                    data.validation(g, Row::new(&mut inputs, &mut targets)).unwrap();
                } else {
                    data.fill(g + 3 * n as u64, Row::new(&mut inputs, &mut targets)).unwrap();
                }
                seen.push((inputs, targets));
            }
            seen.sort();
            prop_assert_eq!(&seen, &expected);
        }
    }
}

#[test]
fn validation_windows_ignore_the_seed_and_samples_follow_it() {
    let folder = tempfile::tempdir().unwrap();
    let text = tokens(4001);
    let read = |seed| {
        let data = open(token_file(folder.path(), &text, &text), 8, seed).unwrap();
        let (mut inputs, mut targets) = ([0; 8], [0; 8]);
        data.fill(0, Row::new(&mut inputs, &mut targets)).unwrap();
        let sample = inputs;
        data.validation(0, Row::new(&mut inputs, &mut targets)).unwrap();
        (sample, inputs)
    };
    assert_eq!(read(1), read(1));
    assert_ne!(read(1).0, read(2).0);
    assert_eq!(read(1).1, read(2).1);
}

#[test]
fn a_split_shorter_than_a_window_is_an_error_that_names_both_lengths() {
    let folder = tempfile::tempdir().unwrap();
    for (train, validation, split) in [(16, 17, "train"), (17, 16, "validation")] {
        let file = token_file(folder.path(), &tokens(train), &tokens(validation));
        let error = open(file, 16, 0).unwrap_err().to_string();
        let expected = format!("the {split} split of ");
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.contains("has 16 tokens"), "{error}");
        assert!(error.contains("sequence of 16 needs 17"), "{error}");
        assert!(error.contains("--data PATH"), "{error}");
    }
    let file = token_file(folder.path(), &tokens(17), &tokens(17));
    assert_eq!(open(file, 16, 0).unwrap().samples_per_epoch(0), 1);
    let file = token_file(folder.path(), &[], &[]);
    assert!(matches!(open(file, 0, 0), Err(Error::EmptySequence)));
}

#[test]
fn a_token_file_cut_short_under_a_run_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let data = open(token_file(folder.path(), &tokens(33), &tokens(33)), 16, 0).unwrap();
    std::fs::OpenOptions::new().write(true).open(data.bytes().unwrap().path()).unwrap().set_len(80).unwrap();
    let (mut inputs, mut targets) = ([0; 16], [0; 16]);
    let error = data.fill(0, Row::new(&mut inputs, &mut targets)).unwrap_err();
    assert!(matches!(error, Error::Read { .. }), "{error}");
}

#[test]
fn a_mixture_sees_every_window_of_each_source_in_proportion() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    // 30 and 20 windows of 4, whose tokens tell the source.
    let text = |windows: usize, of: u16| (0..=4 * windows).map(|i| 100 * of + (i % 90) as u16).collect::<Vec<_>>();
    let files = [(30, 0), (20, 1)].map(|(windows, of)| {
        let text = text(windows, of);
        token_file(folders[usize::from(of)].path(), &text, &text[..=4 * 5])
    });
    let sources = files.into_iter().zip([3, 1]).map(|(file, weight)| (Tokens::of_file(file).unwrap(), weight));
    let data = Dataset::mixed(sources.collect(), 4, VOCAB, 7).unwrap();
    let mut seen = [Vec::new(), Vec::new()];
    // Two epochs of the first source, one of the second.
    for g in 0..80 {
        let (mut inputs, mut targets) = ([0; 4], [0; 4]);
        data.fill(g, Row::new(&mut inputs, &mut targets)).unwrap();
        assert_eq!(inputs[1..], targets[..3]);
        seen[usize::from(inputs[0] >= 100)].push((inputs, targets[3]));
    }
    assert_eq!(seen.each_ref().map(Vec::len), [60, 20]);
    for (windows, repeats) in seen.iter_mut().zip([2, 1]) {
        windows.sort_unstable();
        assert!(windows.chunk_by(|a, b| a == b).all(|same| same.len() == repeats));
    }
    // Each has 5 windows to validate on; three of four are the first's, so of 8 windows 6 would be.
    assert_eq!(data.validation_len(), 7);
    let mut first = 0;
    for i in 0..7 {
        let (mut inputs, mut targets) = ([0; 4], [0; 4]);
        data.validation(i, Row::new(&mut inputs, &mut targets)).unwrap();
        first += usize::from(inputs[0] < 100);
    }
    assert_eq!(first, 5);
}

#[test]
fn a_model_that_knows_too_few_tokens_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = token_file(folder.path(), &tokens(33), &tokens(33));
    let error = Dataset::open(Tokens::of_file(file).unwrap(), 16, 100, 0).unwrap_err().to_string();
    assert!(error.contains("has 257 different tokens, but the model knows 100"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_start_of_a_token_is_behind_the_last_separator_before_it(
        text in prop::collection::vec(prop_oneof![3 => 0u16..256, 1 => Just(END)], 20..400), seq in 1usize..20, seed: u64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let data = open(token_file(folder.path(), &text, &text), seq, seed).unwrap();
        data.check_documents().unwrap();
        let (mut inputs, mut targets, mut starts) = (vec![0; seq], vec![0; seq], vec![u32::MAX; seq]);
        for split in [Split::Train, Split::Validation] {
            for window in 0..data.windows(split) {
                data.in_order(split, window, Row { inputs: &mut inputs, targets: &mut targets, starts: Some(&mut starts) }).unwrap();
                let before = |position: usize| window as usize * seq + position - 1;
                let mut start = 0;
                for position in 0..seq {
                    // A separator belongs to the document before it.
                    if position > 0 && text[before(position)] == END {
                        start = position;
                    }
                    prop_assert_eq!(starts[position] as usize, start, "{:?} at {}", inputs, position);
                }
            }
        }
    }
}

#[test]
fn samples_and_validation_windows_have_the_starts_of_their_own_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let text: Vec<u16> = (0..401).map(|i| if i % 5 == 1 || i % 7 == 1 { END } else { i % 90 }).collect();
    let data = open(token_file(folder.path(), &text, &text), 16, 3).unwrap();
    let (mut inputs, mut targets, mut starts) = ([0; 16], [0; 16], [0; 16]);
    let expected = |inputs: &[u32]| {
        let start =
            |position: usize| (1..=position).rev().find(|&at| inputs[at - 1] == u32::from(END)).unwrap_or(0) as u32;
        (0..16).map(start).collect::<Vec<_>>()
    };
    for index in 0..25 {
        data.fill(index, Row { inputs: &mut inputs, targets: &mut targets, starts: Some(&mut starts) }).unwrap();
        assert_eq!(starts[..], expected(&inputs));
        assert!(starts.iter().any(|&start| start > 0), "{inputs:?} has documents");
        data.validation(index, Row { inputs: &mut inputs, targets: &mut targets, starts: Some(&mut starts) }).unwrap();
        assert_eq!(starts[..], expected(&inputs));
    }
}

#[test]
fn an_empty_document_hides_no_other() {
    let mut starts = [9; 6];
    fill_starts(&mut starts, [0, 2, 2, 5].into_iter());
    assert_eq!(starts, [0, 0, 2, 2, 2, 5]);
    // The window begins within a document.
    fill_starts(&mut starts, [3].into_iter());
    assert_eq!(starts, [0, 0, 0, 3, 3, 3]);
}

#[test]
fn tokens_that_do_not_say_where_documents_begin_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    // Of nanoGPT, whose separator nobody knows without a tokenizer.
    let path = folder.path().join("gpt.bin");
    std::fs::write(&path, [1; 2 * 40]).unwrap();
    let synthetic = folder.path().join("synthetic.tokens");
    crate::synthetic::write(300, &synthetic).unwrap();
    for path in [path, synthetic] {
        let data = Dataset::open(Tokens::open(&path, None).unwrap(), 8, 300, 0).unwrap();
        let (mut inputs, mut targets, mut starts) = ([0; 8], [0; 8], [0; 8]);
        data.fill(0, Row::new(&mut inputs, &mut targets)).unwrap();
        let asked =
            data.fill(0, Row { inputs: &mut inputs, targets: &mut targets, starts: Some(&mut starts) }).unwrap_err();
        for error in [asked, data.check_documents().unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains(path.to_str().unwrap()) && error.contains("--document-attention"), "{error}");
        }
    }
}
