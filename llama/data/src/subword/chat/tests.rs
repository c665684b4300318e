use std::fs;

use serde_json::json;

use super::*;
use crate::subword::examples::{byte_level, sentence_piece};

const CHATML: &str = "{% for message in messages %}\n\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}\
    {% endfor %}\n\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// In the manner of Llama 2: no prompt for a generation, and a check of the roles.
const LLAMA: &str = "{% for message in messages %}\
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
    {% if message['role'] == 'user' %}{{ bos_token + '[' + message['content'] + ']' }}\
    {% else %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}\
    {% endfor %}";

fn with_template(make: fn(&Path) -> PathBuf, template: &str, config: Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path());
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    Tokenizer::load(&path).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Value> {
    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

/// The text of the tokens that are learned, a | between stretches.
fn learned(tokenizer: &Tokenizer, messages: &[Value]) -> OrBad<String> {
    let (text, replies) = tokenizer.chat_template().unwrap().replies(messages)?;
    let (tokens, masked) = mask(tokenizer, &text, &replies).unwrap()?;
    assert_eq!(tokens, tokenizer.encode(&text).unwrap());
    let stretches = masked.chunk_by(|one, other| one == other).scan(0, |at, stretch| {
        let tokens = &tokens[*at..*at + stretch.len()];
        *at += stretch.len();
        Some((stretch[0], tokenizer.decode(tokens, true).unwrap()))
    });
    let stretches: Vec<String> = stretches.filter(|(masked, _)| !masked).map(|(_, text)| text).collect();
    Ok(stretches.join("|"))
}

#[test]
fn replies_and_the_ends_of_their_turns_are_learned() {
    let tokenizer = with_template(byte_level, CHATML, json!({}));
    let messages =
        chat(&[("system", "on"), ("user", "all?"), ("assistant", " the one "), ("user", "x"), ("assistant", "y")]);
    let (text, _) = tokenizer.chat_template().unwrap().replies(&messages).unwrap();
    assert!(text.starts_with("<|im_start|>system\non<|im_end|>\n<|im_start|>user\nall?<|im_end|>\n"), "{text}");
    assert_eq!(learned(&tokenizer, &messages).unwrap(), "the one<|im_end|>\n|y<|im_end|>\n");
    let asked = tokenizer.chat_template().unwrap().render(&chat(&[("user", "a")]), true).unwrap();
    assert_eq!(asked, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn a_template_with_spaces_of_sentencepiece_has_exact_masks() {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let tokenizer = with_template(sentence_piece, LLAMA, config);
    let messages = chat(&[("user", "the all"), ("assistant", "a ll"), ("user", "a"), ("assistant", "the")]);
    assert_eq!(learned(&tokenizer, &messages).unwrap(), "a ll </s>|the </s>");
    let problem = learned(&tokenizer, &chat(&[("assistant", "a")])).unwrap_err();
    assert!(problem.contains("roles must alternate"), "{problem}");
}

#[test]
fn chats_without_a_mask_are_refused() {
    let tokenizer = with_template(byte_level, CHATML, json!({}));
    let problem = learned(&tokenizer, &chat(&[("user", "a")])).unwrap_err();
    assert!(problem.contains("nothing to learn"), "{problem}");
    // Only the last reply keeps its beginning.
    let changes =
        "{% for message in messages %}{{ message.role + (message.content if loop.last else 'x') }}{% endfor %}";
    let tokenizer = with_template(byte_level, changes, json!({}));
    let messages = chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let problem = learned(&tokenizer, &messages).unwrap_err();
    assert!(problem.contains("changes the text before message"), "{problem}");
    // "t" of the prompt and "he" of the reply become one token.
    let joins = "{% for message in messages %}{{ message.content }}{% endfor %}";
    let tokenizer = with_template(byte_level, joins, json!({}));
    let problem = learned(&tokenizer, &chat(&[("user", "t"), ("assistant", "he")])).unwrap_err();
    assert!(problem.contains("\"t|he\""), "{problem}");
    let today = "{{ strftime_now('%Y') }}";
    let tokenizer = with_template(byte_level, today, json!({}));
    let problem = learned(&tokenizer, &chat(&[("user", "t"), ("assistant", "he")])).unwrap_err();
    assert!(problem.contains("strftime_now"), "{problem}");
}

#[test]
fn templates_find_what_hugging_face_gives_them() {
    let template = "{%- set ns = namespace(n=0) -%}{%- for message in messages[1:] if message.role.startswith('u') -%}\
        {%- set ns.n = ns.n + 1 -%}{%- if loop.first %}{% continue %}{% endif -%}{{ message | tojson }}{%- endfor -%}\
        {{ ns.n }} {{ bos_token }} {{ [1, {'a': none}] | tojson }}";
    let tokenizer = with_template(byte_level, template, json!({"bos_token": {"content": "<|endoftext|>"}}));
    let messages = chat(&[("user", "a"), ("user", "b"), ("user", "<c>")]);
    let text = tokenizer.chat_template().unwrap().render(&messages, false).unwrap();
    assert_eq!(text, "{\"content\": \"<c>\", \"role\": \"user\"}2 <|endoftext|> [1, {\"a\": null}]");
}

#[test]
fn a_template_comes_from_the_configuration_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let path = byte_level(folder.path());
    let of = |template: Value| {
        let config = json!({"chat_template": template}).to_string();
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        Tokenizer::load(&path).map(|tokenizer| tokenizer.chat_template().map(|template| template.source().to_owned()))
    };
    assert_eq!(of(json!("a")).unwrap().as_deref(), Some("a"));
    let named = json!([{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}]);
    assert_eq!(of(named).unwrap().as_deref(), Some("c"));
    assert!(of(json!([{"name": "rag", "template": "b"}])).is_err());
    assert!(of(json!(3)).is_err());
}
