//! How many bytes of text each token stands for.

use std::collections::HashMap;

use serde_json::Value;

/// Bytes of each token, by its id. A special token stands for none.
pub(super) fn of(config: &Value, ids: &HashMap<String, u32>, vocab: usize) -> Vec<u32> {
    let decoder = config["decoder"].to_string();
    let has = |kind: &str| decoder.contains(&format!("\"{kind}\""));
    let of_bytes = has("ByteLevel");
    let falls_back = config["model"]["byte_fallback"].as_bool().unwrap_or(false) || has("ByteFallback");
    let mut lengths = vec![0; vocab];
    for (token, &id) in ids {
        lengths[id as usize] = match token {
            // Each character stands for a byte.
            _ if of_bytes => token.chars().count(),
            _ if falls_back && is_byte(token) => 1,
            // Of WordPiece; the space before other words is not in the token.
            _ if has("WordPiece") => token.strip_prefix("##").map_or(token.len() + 1, str::len),
            // SentencePiece writes spaces so.
            _ => token.replace('▁', " ").len(),
        } as u32;
    }
    for token in config["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(content)) = (token["id"].as_u64(), token["content"].as_str()) else { continue };
        let is_special = token["special"].as_bool().unwrap_or(false);
        if let Some(length) = lengths.get_mut(id as usize) {
            *length = if is_special { 0 } else { content.len() as u32 };
        }
    }
    lengths
}

/// Whether a token is such as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}
