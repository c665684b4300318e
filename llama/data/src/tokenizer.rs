//! The built-in tokenizer: a token is a byte.
//!
//! It needs no file and takes any bytes. Tokens 0 to 255 are the bytes; one more, [`END`], follows
//! every document, so that a model can see where one ends and the next begins.

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
