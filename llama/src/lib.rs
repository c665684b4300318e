//! A minimal Llama-2 on the Pillion runtime, and the command line.
#![forbid(unsafe_code)]

pub mod data;
