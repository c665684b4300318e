//! A small tokenizer in the manner of GPT-2, as Hugging Face's libraries write it.

use std::fs;

use serde_json::{Map, Value, json};

use crate::program::Workplace;

/// The number of its tokens: 256 bytes, three merges, one special token.
pub const VOCABULARY: u64 = 260;

impl Workplace {
    /// Writes the tokenizer, whose tokens below 256 are bytes; token 259 is `<|endoftext|>`.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write_tokenizer(&self, name: &str) {
        fs::write(self.path(name), tokenizer().to_string()).expect("a new file");
    }
}

fn tokenizer() -> Value {
    let mut vocab: Map<String, Value> = (0..=255).map(|byte| (spelled(byte).to_string(), json!(byte))).collect();
    let merges = [("t", "h"), ("th", "e"), ("Ġ", "the")];
    for ((one, other), id) in merges.iter().zip(256..) {
        vocab.insert(format!("{one}{other}"), json!(id));
    }
    let merges: Vec<String> = merges.iter().map(|(one, other)| format!("{one} {other}")).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 259, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": merges},
    })
}

/// How a byte is spelled: printable characters stand for themselves, the others follow U+0100.
fn spelled(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    char::from_u32(256 + before).expect("a character")
}
