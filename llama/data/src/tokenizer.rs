//! The built-in tokenizer: a token is a byte.
//!
//! It needs no file and takes any bytes. Tokens 0 to 255 are the bytes; one more, [`END`], follows
//! every document, so that a model can see where one ends and the next begins.

use serde_json::{Value, json};

/// Number of different tokens: the 256 bytes and [`END`].
pub const VOCAB: usize = 257;

/// The token after the last byte of a document.
pub const END: u16 = 256;

/// Appends the tokens of `text` to `tokens`, one a byte, without [`END`].
pub fn encode(text: &[u8], tokens: &mut Vec<u16>) {
    tokens.extend(text.iter().map(|&byte| u16::from(byte)));
}

/// The bytes of `tokens`; [`END`] stands for no byte and leaves none.
///
/// # Panics
/// If a token is not below [`VOCAB`]: such a token comes from another tokenizer.
pub fn decode(tokens: &[u16]) -> Vec<u8> {
    tokens
        .iter()
        .filter(|&&token| token != END)
        .map(|&token| match u8::try_from(token) {
            Ok(byte) => byte,
            Err(_) => panic!("token {token} is outside the vocabulary of {VOCAB}"),
        })
        .collect()
}

/// The tokenizer as files that Hugging Face's transformers load: names and texts. Each byte is a
/// token, by the characters that byte-level BPE has for bytes, and nothing is merged.
pub fn huggingface_files() -> [(&'static str, String); 3] {
    let vocabulary: serde_json::Map<_, _> =
        (0..=255u8).map(|byte| (character(byte).to_string(), byte.into())).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": END, "content": END_NAME, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": [],
        },
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_NAME,
        "eos_token": END_NAME,
        "clean_up_tokenization_spaces": false,
    });
    let generation = json!({ "bos_token_id": END, "eos_token_id": END });
    let text = |value: Value| serde_json::to_string_pretty(&value).expect("plain values");
    [
        ("tokenizer.json", text(tokenizer)),
        ("tokenizer_config.json", text(config)),
        ("generation_config.json", text(generation)),
    ]
}

/// What tokenizers call [`END`].
const END_NAME: &str = "<|endoftext|>";

/// The character that stands for a byte in byte-level BPE (Radford et al. 2019): itself where it can
/// be seen, else one of those from U+0100 on, in order.
fn character(byte: u8) -> char {
    let is_seen = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match is_seen(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&byte| !is_seen(byte)).count() as u32;
            char::from_u32(0x100 + before).expect("there are 68 of them")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn decoding_gives_back_any_bytes(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut tokens = Vec::new();
            encode(&text, &mut tokens);
            prop_assert_eq!(tokens.len(), text.len());
            tokens.push(END);
            prop_assert_eq!(decode(&tokens), text);
        }
    }

    #[test]
    #[should_panic(expected = "outside the vocabulary")]
    fn a_foreign_token_is_refused() {
        decode(&[257]);
    }
}
