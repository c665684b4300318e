//! The parser of what visitors of a store ask, for fuzzers.

/// A visitor's requests.
pub mod store_requests {
    use super::super::message::{ADD, GET, HEAD, SET, bytes};
    use super::super::server::Values;

    /// Requests of each kind.
    pub fn seeds() -> Vec<Vec<u8>> {
        let requests =
            [bytes(SET, b"key", b"value"), bytes(GET, b"key", b""), bytes(ADD, b"key", &3_i64.to_le_bytes())];
        vec![requests.concat(), requests[1].clone(), bytes(ADD, b"key", &i64::MAX.to_le_bytes()).repeat(2)]
    }

    /// Each request is answered, or the visitor is turned away. An answer never needs more than the
    /// bytes that were set.
    pub fn check(mut data: &[u8]) {
        let (mut values, most) = (Values::default(), data.len().max(512) + HEAD);
        while let Some(head) = data.first_chunk::<HEAD>() {
            let Some(request) = super::super::message::lengths(head) else { return };
            let Some((request, rest)) = data.split_at_checked(HEAD + request.0 + request.1) else { return };
            let Ok(answer) = values.answer_to(request) else { return };
            assert!(answer.len() >= HEAD && answer.len() <= most);
            data = rest;
        }
    }
}
