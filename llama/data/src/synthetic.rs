//! Random tokens, for measuring speed: all are equally likely whatever came before, so the best loss is ln V.

use std::path::Path;

use pillion_kernels::random;

use crate::error::Result;
use crate::tokens::{Origin, Split, TokenWriter};

/// What `--data` calls it.
pub const NAME: &str = "synthetic";

/// Tokens to train on, and to validate on. Runs that need more see them again.
const TOKENS: [(Split, u64); 2] = [(Split::Train, 1 << 20), (Split::Validation, 1 << 17)];

/// The largest vocabulary: token files hold 16 bits a token.
pub const LARGEST_VOCAB: usize = 1 << 16;

/// Writes a token file over a vocabulary of `vocab` tokens.
///
/// # Panics
/// For a vocabulary beyond [`LARGEST_VOCAB`].
pub(crate) fn write(vocab: usize, destination: &Path) -> Result<()> {
    assert!(vocab <= LARGEST_VOCAB, "tokens of a vocabulary of {vocab} do not fit 16 bits");
    let mut writer = TokenWriter::create(destination, vocab)?;
    for (stream, (split, count)) in TOKENS.into_iter().enumerate() {
        let token = |index| (random::uniform(0, stream as u64, index) * vocab as f64) as u16;
        writer.push(split, &mut (0..count).map(token).collect::<Vec<u16>>())?;
    }
    writer.finish(Origin { files: 0, bytes: 0, not_text: 0 })
}
