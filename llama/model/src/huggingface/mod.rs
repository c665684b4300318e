//! Models in Hugging Face's format: `config.json` and safetensors.
//!
//! [`import`] makes a checkpoint of weights of such a folder, and [`export`] makes such a folder of a
//! checkpoint. Both move half a megabyte at a time. What is not converted is copied bit by bit.
//!
//! | file | subject |
//! |---|---|
//! | `config` | `config.json` |
//! | `source` | the tensors of a folder, checked against the model's |
//! | `import`, `export` | the ways in and out |
//! | `early_sync` | what brings long files to the disk |

mod config;
mod early_sync;
mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod import;
mod source;

use std::path::{Path, PathBuf};

use pillion_kernels::DType;
use safetensors::Dtype;

pub use config::{parse_config, write_config};
pub use export::{Export, export};
pub use import::{Imported, import};
pub use source::Source;

/// Files beside the weights that go with a model: the tokenizer's, and how to generate text.
pub const COMPANIONS: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// The name of the configuration.
pub const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes that are moved at a time: they stay in the second-level cache.
const PIECE: usize = 512 << 10;

/// What is wrong with a folder or a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and the remedy.
        reason: String,
    },
    /// The caller has stopped it.
    #[error("stopped")]
    Stopped,
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] pillion_runtime::Error),
}

impl Error {
    fn file(path: impl AsRef<Path>, reason: impl std::fmt::Display) -> Error {
        Error::File { path: path.as_ref().to_owned(), reason: plain(&reason.to_string()) }
    }

    /// What a caller's answer to progress means.
    fn unless(goes_on: bool) -> Result<(), Error> {
        if goes_on { Ok(()) } else { Err(Error::Stopped) }
    }

    fn unreadable(path: impl AsRef<Path>, error: &std::io::Error) -> Error {
        Error::file(path, format!("cannot be read: {error}"))
    }
}

/// Text that may quote a file as a line: without control characters.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The type that safetensors calls so, where weights can have it.
fn dtype(name: Dtype) -> Option<DType> {
    match name {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::Bf16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

/// What safetensors calls a type of weights.
fn named(dtype: DType) -> Dtype {
    match dtype {
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}
