use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::examples::{added, byte_level, sentence_piece};
use super::*;

fn both() -> [Tokenizer; 2] {
    let folder = tempfile::tempdir().unwrap();
    [byte_level, sentence_piece].map(|make| Tokenizer::load(&make(folder.path())).unwrap())
}

proptest! {
    #[test]
    fn the_bytes_of_tokens_are_those_of_the_text(text in "[a-z ,.öüß\\n😀]{1,40}") {
        let [bytes, pieces] = both();
        // SentencePiece puts a space before a text.
        for (tokenizer, end, more) in [(bytes, "<|endoftext|>", 0), (pieces, "</s>", 1)] {
            let tokens = tokenizer.encode_with_special(&(text.clone() + end)).unwrap();
            let found: u32 = tokens.iter().map(|&token| tokenizer.bytes_of(token).unwrap()).sum();
            prop_assert_eq!(found as usize, text.len() + more);
            prop_assert!(tokenizer.bytes_of(tokenizer.vocab_size() as u32).is_err());
        }
    }
}

#[test]
fn tokens_are_those_worked_out_by_hand() {
    let [bytes, pieces] = both();
    // The merges "the" and " the", and a special token within the text.
    assert_eq!(bytes.encode("the<|endoftext|>x the ").unwrap(), [257, 263, 120, 258, 32]);
    assert_eq!(bytes.encode_with_special("the").unwrap(), [257]);
    let id = |token: &str| pieces.id(token).unwrap();
    // ü is not in the vocabulary: its two bytes are.
    let expected = [id("▁the"), id("▁"), id("<0xC3>"), id("<0xBC>"), id("▁a"), id("ll")];
    assert_eq!(pieces.encode("the ü all").unwrap(), expected);
    assert_eq!(pieces.encode_with_special("the").unwrap(), [1, id("▁the")]);
    assert_eq!((bytes.vocab_size(), pieces.vocab_size()), (266, 3 + 256 + 30 + 5));
    assert!(bytes.encode("").unwrap().is_empty());
}

#[test]
fn decoding_takes_known_tokens_only_and_hides_special_ones() {
    let [bytes, pieces] = both();
    assert_eq!(bytes.decode(&[257, 263], false).unwrap(), "the");
    assert_eq!(bytes.decode(&[257, 263], true).unwrap(), "the<|endoftext|>");
    assert_eq!(pieces.decode(&[1, pieces.id("▁the").unwrap(), 2], false).unwrap(), "the");
    let error = bytes.decode(&[266], false).unwrap_err().to_string();
    assert!(error.contains("token 266 is outside the vocabulary of 266"), "{error}");
    assert!(bytes.stream(false).push(266).is_err());
}

#[test]
fn ends_come_from_the_files_beside_it_then_from_the_tokenizer_then_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = sentence_piece(folder.path());
    let at = |name: &str| folder.path().join(name);
    let found = || {
        let tokenizer = Tokenizer::load(&path).unwrap();
        (tokenizer.begin_of_sequence(), tokenizer.stops().to_vec())
    };
    assert_eq!(found(), (Some(1), vec![2]), "the template begins with <s>, and </s> is well known");
    fs::write(at("config.json"), r#"{"bos_token_id": 5, "eos_token_id": 6}"#).unwrap();
    assert_eq!(found(), (Some(5), vec![6]));
    fs::write(at("generation_config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
    assert_eq!(found(), (Some(5), vec![7, 8]));
    let config = r#"{"bos_token": {"content": "<unk>"}, "eos_token": "</s>", "chat_template": null}"#;
    fs::write(at("tokenizer_config.json"), config).unwrap();
    assert_eq!(found(), (Some(0), vec![2, 7, 8]));
    // The folder stands for its file.
    assert_eq!(Tokenizer::load(folder.path()).unwrap().stops(), [2, 7, 8]);
    let copy = tempfile::tempdir().unwrap();
    fs::write(copy.path().join("chat_template.jinja"), "of another tokenizer").unwrap();
    Tokenizer::load(&path).unwrap().copy_into(copy.path()).unwrap();
    let copied = Tokenizer::load(copy.path()).unwrap();
    assert_eq!((copied.stops(), copied.chat_template().is_none()), (&[2, 7, 8][..], true));
}

#[test]
fn what_is_no_tokenizer_or_contradicts_it_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let fails = |name: &str, text: &str, says: &str| {
        let path = byte_level(folder.path());
        fs::write(at(name), text).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.starts_with(at(name).to_str().unwrap()) && error.contains(says), "{error}");
        assert!(!error.contains('\n'), "{error}");
        fs::remove_file(at(name)).unwrap();
    };
    for (text, says) in [
        ("", "not a tokenizer"),
        ("{}", "no model.vocab"),
        ("[1]", "no model.vocab"),
        (r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}"#, "vocabulary is empty"),
        (
            r#"{"version": "1.0", "model": {"type": "None", "vocab": {"a": 0}, "merges": []}}"#,
            "cannot read the `unknown` model",
        ),
        (r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}"#, "the id -1"),
        (r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}"#, "not a tokenizer"),
    ] {
        fails("tokenizer.json", text, says);
    }
    let model = json!({"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"});
    let with = |key: &str, value: serde_json::Value| json!({"version": "1.0", "model": model, key: value}).to_string();
    let around = json!({"type": "BertProcessing", "sep": ["x", 7], "cls": ["a", 0]});
    for (text, says) in [
        (with("added_tokens", json!([added(1, "c")])), "the added token \"c\" is not free"),
        // Else it would take 4 GiB.
        (with("added_tokens", json!([added(1 << 30, "c")])), "no number below 1048576"),
        (with("post_processor", around), "its post_processor has the id 7"),
    ] {
        fails("tokenizer.json", &text, says);
    }
    fails("tokenizer_config.json", "{", "no JSON");
    fails("tokenizer_config.json", r#"{"eos_token": "</s>"}"#, "eos_token \"</s>\" is not in tokenizer.json");
    fails("config.json", r#"{"eos_token_id": 266}"#, "eos_token_id 266 is no token");
    fails("config.json", r#"{"eos_token_id": "x"}"#, "is no token");
    fails("chat_template.jinja", "{% if %}", "no valid one");
    let error = Tokenizer::load(&at("none")).unwrap_err().to_string();
    assert!(error.contains("cannot read"), "{error}");
}

#[test]
fn a_damaged_tokenizer_is_an_error_or_another_tokenizer_but_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    for make in [byte_level, sentence_piece] {
        let path = make(folder.path());
        let text = fs::read(&path).unwrap();
        for at in (0..text.len()).step_by(29) {
            let mut damaged = text.clone();
            damaged[at] = damaged[at].wrapping_add(1);
            fs::write(&path, &damaged[..]).unwrap();
            if let Ok(tokenizer) = Tokenizer::load(&path) {
                let _ = tokenizer.encode("the all on ö").map(|tokens| tokenizer.decode(&tokens, true));
            }
            fs::write(&path, &text[..at]).unwrap();
            assert!(Tokenizer::load(&path).is_err());
        }
    }
}

#[test]
fn a_panic_of_the_crate_over_a_tokenizer_that_it_has_loaded_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = sentence_piece(folder.path());
    let text = fs::read_to_string(&path).unwrap().replace(r#""stop":0"#, r#""stop":5"#);
    fs::write(&path, text).unwrap();
    let error = Tokenizer::load(&path).unwrap().decode(&[], true).unwrap_err().to_string();
    assert!(error.starts_with(path.to_str().unwrap()) && error.contains("cannot decode tokens"), "{error}");
}

fn streamed(tokenizer: &Tokenizer, tokens: &[u32], special: bool) -> (Vec<String>, String) {
    let mut stream = tokenizer.stream(special);
    let pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
    let all = pieces.concat() + &stream.finish().unwrap();
    (pieces, all)
}

#[test]
fn characters_and_spaces_come_out_of_a_stream_whole() {
    let [bytes, pieces] = both();
    let id = |token: &str| pieces.id(token).unwrap();
    let (found, _) = streamed(&pieces, &[id("▁the"), id("▁a"), id("<0xC3>"), id("<0xBC>"), id("ll")], false);
    assert_eq!(found, ["the", " a", "", "ü", "ll"]);
    // Special tokens that are not shown do not make the next word the first.
    let (found, _) = streamed(&pieces, &[1, id("▁the"), 2, id("▁a")], false);
    assert_eq!(found, ["", "the", "", " a"]);
    let (found, all) = streamed(&bytes, &[0xe2, 0x82, 0xac, 258, 0xe2, 0x82], false);
    assert_eq!(found.concat(), "€ the");
    assert_eq!(all, "€ the\u{fffd}", "the last character is incomplete");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_text_comes_back_and_a_stream_gives_the_same(text in "[a-z öü€𝄞.\n]{0,40}", special in any::<bool>()) {
        for (i, tokenizer) in both().iter().enumerate() {
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocab_size()));
            let decoded = tokenizer.decode(&tokens, special).unwrap();
            prop_assert_eq!(&decoded, &text, "tokenizer {}", i);
            prop_assert_eq!(streamed(tokenizer, &tokens, special).1, decoded);
        }
    }

    #[test]
    fn any_tokens_are_streamed(tokens in prop::collection::vec(0u32..266, 0..40)) {
        for tokenizer in both() {
            let (pieces, _) = streamed(&tokenizer, &tokens, true);
            prop_assert_eq!(pieces.len(), tokens.len());
        }
    }
}
