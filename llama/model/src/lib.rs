//! Llama-2 on the Pillion runtime.
//!
//! | file | subject |
//! |---|---|
//! | `config` | shapes of models, their tensors and presets |
//! | `activations` | what a model keeps on a rank besides its weights |
//! | `model` | forward and backward, unit by unit |
//! | `rotary` | the angles by which positions rotate queries and keys |
//! | `decoder` | the passes of a model that writes |
//! | `generate` | how the next token is chosen |
//! | `huggingface` | models from and for elsewhere |
#![forbid(unsafe_code)]

mod activations;
pub mod config;
pub mod decoder;
pub mod generate;
pub mod huggingface;
pub mod model;
mod rotary;

pub use rotary::RopeScaling;
