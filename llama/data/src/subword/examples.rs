//! Small tokenizers, laid out as Hugging Face's library writes them; for tests and fuzzers.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

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

/// A special token.
pub(crate) fn added(id: u64, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// A tokenizer in the manner of GPT-2: tokens 0 to 255 are bytes, then come merges and special
/// tokens.
pub(crate) fn byte_level(folder: &Path) -> PathBuf {
    let mut vocab: Map<String, Value> = (0..=255u8).map(|byte| (spelled(byte).to_string(), json!(byte))).collect();
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
pub(crate) fn sentence_piece(folder: &Path) -> PathBuf {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let letters = "▁abcdefghijklmnopqrstuvwxyzö.,".chars().map(String::from);
    let merged = ["th", "the", "▁the", "▁a", "ll"].map(str::to_owned);
    let all = special.into_iter().chain(bytes).chain(letters).chain(merged);
    let vocab: Map<String, Value> = all.zip(0..).map(|(token, id)| (token, json!(id))).collect();
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

fn write(folder: &Path, tokenizer: &Value) -> PathBuf {
    let path = folder.join("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).expect("a file in a folder of our own");
    path
}
