//! The command `pillion`.
#![forbid(unsafe_code)]

fn main() {}
