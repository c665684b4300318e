//! A minimal Llama-2 on the Pillion runtime, and the command line.
//!
//! | file | subject |
//! |---|---|
//! | `config` | shapes of models, their tensors and presets |
//! | `model` | forward and backward, unit by unit |
//! | `data` | text in, batches out |
//! | `settings` | the command line and the configuration file |
//! | `train` | the loop: data, steps, controller, checkpoints |
//! | `screen` | what a run prints |
//! | `generate` | text out |
#![forbid(unsafe_code)]

pub mod config;
pub mod data;
pub mod model;
