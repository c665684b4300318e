use std::fs;

use super::*;
use crate::tokens::tests::token_file;

#[test]
fn a_token_file_reads_as_any_tokens_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = token_file(folder.path(), &[1, 2, END, 3, END, END, 4], &[END, 5]).path().to_owned();
    let tokens = Tokens::open(&path, None).unwrap();
    assert!(matches!(tokens, Tokens::File(..)));
    assert_eq!((tokens.vocab(), tokens.len(Split::Train), tokens.len(Split::Validation)), (Some(257), 7, 2));
    let mut some = [0; 4];
    tokens.read(Split::Train, 1, &mut some).unwrap();
    assert_eq!(some, [2, 256, 3, 256]);
    assert_eq!(tokens.document_starts(Split::Train, 0..7).unwrap().unwrap(), [0, 3, 5, 6]);
    assert_eq!(tokens.document_starts(Split::Train, 3..6).unwrap().unwrap(), [3, 5]);
    assert_eq!(tokens.document_starts(Split::Validation, 0..2).unwrap().unwrap(), [0, 1]);
    let mut masked = [true; 3];
    tokens.read_mask(Split::Train, 0, &mut masked).unwrap();
    assert_eq!((masked, tokens.has_mask(Split::Train)), ([false; 3], false));
    tokens.verify().unwrap();
    tokens.check_unchanged().unwrap();
    fs::OpenOptions::new().append(true).open(&path).unwrap().set_len(0).unwrap();
    assert!(tokens.check_unchanged().unwrap_err().to_string().contains("changed since it was opened"));
}

#[test]
fn what_holds_no_tokens_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("note");
    fs::write(&note, "text").unwrap();
    for (path, says) in [
        (folder.path().to_owned(), "no token folder"),
        (note, "not a token file"),
        (folder.path().join("x"), "cannot read"),
    ] {
        let error = Tokens::open(&path, None).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(path.to_str().unwrap()), "{error}");
    }
}
