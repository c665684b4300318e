//! Gradient statistics in, next batch size out.
#![forbid(unsafe_code)]
