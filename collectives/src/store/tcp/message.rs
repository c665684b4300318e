//! Requests to the store and their answers. Both have a head of three words and then their bytes.

use super::super::{MOST_KEY, failed};
use crate::Error;

/// Most bytes of a value.
pub(super) const MOST_VALUE: usize = 16 << 20;
/// Bytes of a head.
pub(super) const HEAD: usize = 24;

/// First words of requests. Then come the lengths of the key and of the value.
pub(super) const SET: u64 = 1;
pub(super) const GET: u64 = 2;
/// The value is the amount.
pub(super) const ADD: u64 = 3;

/// First words of answers. Then come the length of the value and a zero.
pub(super) const DONE: u64 = 10;
pub(super) const NOTHING: u64 = 11;
pub(super) const VALUE: u64 = 12;
/// The value says why not.
pub(super) const FAILED: u64 = 13;

pub(super) fn bytes(kind: u64, key: &[u8], value: &[u8]) -> Vec<u8> {
    let words = [kind, key.len() as u64, value.len() as u64];
    [&words.map(u64::to_le_bytes).concat(), key, value].concat()
}

pub(super) fn answer(kind: u64, value: &[u8]) -> Vec<u8> {
    let words = [kind, value.len() as u64, 0];
    [&words.map(u64::to_le_bytes).concat(), value].concat()
}

pub(super) fn words(head: &[u8; HEAD]) -> [u64; 3] {
    let (words, _) = head.as_chunks();
    std::array::from_fn(|index| u64::from_le_bytes(words[index]))
}

/// The lengths of key and value that a head announces, if it is one of a request.
pub(super) fn lengths(head: &[u8; HEAD]) -> Option<(usize, usize)> {
    let [kind, key, value] = words(head);
    let most = match kind {
        SET => MOST_VALUE,
        GET => 0,
        ADD => 8,
        _ => return None,
    };
    (key <= MOST_KEY as u64 && value <= most as u64).then_some((key as usize, value as usize))
}

/// Whether the store takes a value.
pub(super) fn check_value(value: &[u8]) -> Result<(), Error> {
    let value = value.len();
    if value > MOST_VALUE {
        let reason = format!("a value has {value} bytes, and at most {MOST_VALUE} fit: divide it over several keys");
        return Err(failed(reason));
    }
    Ok(())
}
