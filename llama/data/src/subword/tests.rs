use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// How ByteLevel spells bytes: printable characters stand for themselves, the others follow U+0100.
fn spelled(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
            char::from_u32(256 + before).expect("a character")
        }
    }
}

fn added(id: u64, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// A tokenizer in the manner of GPT-2: tokens 0 to 255 are bytes, then come merges and special
/// tokens.
pub(crate) fn byte_level(folder: &Path) -> std::path::PathBuf {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (spelled(byte).to_string(), json!(byte))).collect();
    let merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("Ġ", "a"), ("l", "l"), ("Ã", "¶")];
    for (i, (one, other)) in merges.iter().enumerate() {
        vocab.insert(format!("{one}{other}"), json!(256 + i));
    }
    let merges: Vec<String> = merges.iter().map(|(one, other)| format!("{one} {other}")).collect();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = special.iter().zip(263..).map(|(content, id)| added(id, content)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": merges},
    });
    write(folder, &tokenizer)
}

/// A tokenizer in the manner of Llama 2: SentencePiece's spaces, bytes for what it does not know.
pub(crate) fn sentence_piece(folder: &Path) -> std::path::PathBuf {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let letters = "▁abcdefghijklmnopqrstuvwxyzö.,".chars().map(String::from);
    let merged = ["th", "the", "▁the", "▁a", "ll"].map(str::to_owned);
    let all = special.into_iter().chain(bytes).chain(letters).chain(merged);
    let vocab: serde_json::Map<String, Value> = all.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let part = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [part("<s>"), sequence("A")],
            "pair": [part("<s>"), sequence("A"), part("<s>"), sequence("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": ["t h", "th e", "▁ the", "▁ a", "l l"]},
    });
    write(folder, &tokenizer)
}

fn write(folder: &Path, tokenizer: &Value) -> std::path::PathBuf {
    let path = folder.join("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    path
}

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
