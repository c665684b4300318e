//! Everything, from outside: parity, many processes, faults.
//!
//! The library part is what the tests compare with, the golden files and a Llama in f64 that shares no code with ours, and what runs
//! the program.
#![forbid(unsafe_code)]

pub mod documents;
pub mod golden;
pub mod hosts;
pub mod program;
pub mod reference;
pub mod rounding;
pub mod tokenizer;
