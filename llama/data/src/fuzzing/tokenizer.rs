//! A tokenizer: `tokenizer.json`, then `tokenizer_config.json` and `generation_config.json`, each
//! of which is left out if it is empty.

use std::fs;

use serde_json::{Value, json};

use super::{assert_is_line, folder, join, split, write};
use crate::subword::Tokenizer;
use crate::subword::examples::{added, byte_level, sentence_piece};

const NAMES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];

/// Texts with what tokenizers treat apart: words, spaces, digits, accents, special tokens, bytes.
const TEXTS: [&str; 3] = ["the one on a 12 all</s>", "  Öl, <|endoftext|>日本 e\u{301}\n\u{0}x", ""];

/// Tokenizers of each model, with what they have around it.
pub fn seeds() -> Vec<Vec<u8>> {
    let root = folder();
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}"});
    let ids = json!({"eos_token_id": [2, 1]});
    let large = [byte_level, sentence_piece].map(|make| fs::read(make(root.path())).expect("it has been written"));
    let [bytes, pieces] = large.map(|file| String::from_utf8(file).expect("JSON"));
    let mut seeds = vec![[bytes, String::new(), String::new()], [pieces, config.to_string(), ids.to_string()]];
    seeds.extend(small().map(|tokenizer| [tokenizer.to_string(), String::new(), ids.to_string()]));
    seeds.iter().map(|seed| join(seed)).collect()
}

/// A few tokens each.
fn small() -> [Value; 4] {
    let tokens = ["<unk>", "<s>", "</s>", "t", "h", "e", "th", "##e", "▁", "a", "one"];
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(it, id)| (it.to_string(), json!(id))).collect();
    let scored: Vec<Value> = tokens.iter().zip(1..).map(|(token, rank)| json!([token, -f64::from(rank)])).collect();
    let tokenizer = |model: Value, normalizer: Value, before: Value, after: Value, decoder: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null,
               "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")], "normalizer": normalizer,
               "pre_tokenizer": before, "post_processor": after, "decoder": decoder, "model": model})
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let digits = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": false}, metaspace]});
    let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                      "strip_accents": null, "lowercase": true});
    let around = json!({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]});
    [
        tokenizer(
            json!({"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}),
            json!({"type": "NFC"}),
            json!({"type": "Whitespace"}),
            Value::Null,
            Value::Null,
        ),
        tokenizer(
            json!({"type": "WordPiece", "vocab": vocab, "unk_token": "<unk>", "continuing_subword_prefix": "##",
                         "max_input_chars_per_word": 100}),
            bert,
            json!({"type": "BertPreTokenizer"}),
            around,
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        tokenizer(
            json!({"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": false}),
            json!({"type": "Lowercase"}),
            metaspace.clone(),
            Value::Null,
            metaspace.clone(),
        ),
        tokenizer(
            json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                         "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                         "merges": [["t", "h"]]}),
            Value::Null,
            digits,
            Value::Null,
            metaspace,
        ),
    ]
}

/// A tokenizer that loads makes tokens of its vocabulary, and decodes them, at once and one by one.
pub fn check(data: &[u8]) {
    let files: [&[u8]; 3] = split(data);
    let root = folder();
    for (name, bytes) in NAMES.into_iter().zip(files).filter(|(_, bytes)| !bytes.is_empty()) {
        write(root.path(), name, bytes);
    }
    let tokenizer = match Tokenizer::load(root.path()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return assert_is_line(&error),
    };
    let vocab = tokenizer.vocab_size();
    let is_token = |token: &u32| (*token as usize) < vocab;
    assert!(vocab > 0 && tokenizer.bytes_of(vocab as u32).is_err() && tokenizer.bytes_of(vocab as u32 - 1).is_ok());
    assert!(tokenizer.begin_of_sequence().iter().chain(tokenizer.stops()).all(is_token));
    for text in TEXTS {
        for tokens in [tokenizer.encode(text), tokenizer.encode_with_special(text)].into_iter().flatten() {
            assert!(tokens.iter().all(is_token), "{tokens:?} of {vocab}");
            let _ = tokenizer.decode(&tokens, true);
            let mut stream = tokenizer.stream(false);
            let _ = tokens.iter().try_for_each(|&token| stream.push(token).map(drop));
            let _ = stream.finish();
        }
    }
}
