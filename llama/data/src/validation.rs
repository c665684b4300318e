//! Tokens that a run is validated on besides those that it learns from.

use crate::any::Tokens;
use crate::batch::Row;
use crate::dataset::{VALIDATION_SEED, check_documents, check_vocabulary, read_window};
use crate::error::{Error, Result};
use crate::order::SampleOrder;
use crate::tokens::Split;

/// Tokens cut into windows of `seq` inputs and as many targets, in a fixed shuffled order: the first
/// `m` windows are a sample of them all.
#[derive(Debug)]
pub struct ValidationSet {
    tokens: Tokens,
    /// The splits that are used, and their windows.
    splits: Vec<(Split, u64)>,
    order: SampleOrder,
    seq: usize,
    vocab: usize,
}

impl ValidationSet {
    /// Cuts the validation split of `tokens`, or all of them where that is empty or `all` is set,
    /// for a model that knows `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::TooShort`] if no window is filled; [`Error::EmptySequence`] if `seq` is 0;
    /// [`Error::Bad`] if the model knows too few tokens.
    pub fn open(tokens: Tokens, all: bool, seq: usize, vocab: usize) -> Result<Self> {
        if seq == 0 {
            return Err(Error::EmptySequence);
        }
        check_vocabulary(&tokens, vocab)?;
        let splits = match all || tokens.len(Split::Validation) == 0 {
            true => vec![Split::Train, Split::Validation],
            false => vec![Split::Validation],
        };
        let windows = |split| tokens.len(split).saturating_sub(1) / seq as u64;
        let splits: Vec<_> = splits.into_iter().map(|split| (split, windows(split))).collect();
        let all = splits.iter().map(|(_, windows)| windows).sum();
        if all == 0 {
            let split = splits[0].0;
            let (path, seq) = (tokens.path().to_owned(), seq as u64);
            return Err(Error::TooShort { path, split, tokens: tokens.len(split), seq });
        }
        let order = SampleOrder::new(all, VALIDATION_SEED);
        Ok(Self { tokens, splits, order, seq, vocab })
    }

    /// Number of windows.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.order.samples_per_epoch()
    }

    /// Checks that the tokens say where documents begin, as [`Row::starts`] need.
    ///
    /// # Errors
    /// [`Error::Bad`], naming the file that does not.
    pub fn check_documents(&self) -> Result<()> {
        check_documents(&self.tokens)
    }

    /// Fills in window `i`. Masked targets are [`IGNORED`](pillion_kernels::IGNORED).
    ///
    /// # Errors
    /// As for [`Dataset::fill`](crate::Dataset::fill).
    ///
    /// # Panics
    /// If `i` is not below [`len`](Self::len), or the row does not hold `seq` tokens.
    pub fn fill(&self, i: u64, row: Row<'_>) -> Result<()> {
        assert!(i < self.len(), "window {i} of {}", self.len());
        let mut window = self.order.index(i);
        for &(split, windows) in &self.splits {
            if window < windows {
                return read_window(&self.tokens, split, window, [self.seq, self.vocab], row);
            }
            window -= windows;
        }
        unreachable!("the order has as many windows as the splits")
    }

    /// Compares lengths and times of the files with those when they were opened.
    ///
    /// # Errors
    /// As for [`Tokens::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.tokens.check_unchanged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::VOCAB;
    use crate::tokens::tests::token_file;

    /// Train has the tokens 0 to 100, validation 200 to 250.
    fn set(all: bool, seq: usize) -> Result<ValidationSet> {
        let folder = tempfile::tempdir().unwrap();
        let (train, validation): (Vec<u16>, Vec<u16>) = ((0..101).collect(), (200..251).collect());
        let file = token_file(folder.path(), &train, &validation);
        ValidationSet::open(Tokens::of_file(file).unwrap(), all, seq, VOCAB)
    }

    #[test]
    fn every_window_of_the_splits_comes_once() {
        for (all, begins) in [
            (false, (200..250).step_by(10).collect()),
            (true, { (0..100).step_by(10).chain((200..250).step_by(10)).collect::<Vec<u32>>() }),
        ] {
            let set = set(all, 10).unwrap();
            let mut seen = Vec::new();
            for i in 0..set.len() {
                let (mut inputs, mut targets) = ([0; 10], [0; 10]);
                set.fill(i, Row::new(&mut inputs, &mut targets)).unwrap();
                assert!(inputs.iter().zip(&targets).all(|(input, target)| input + 1 == *target));
                seen.push(inputs[0]);
            }
            seen.sort_unstable();
            assert_eq!(seen, begins);
        }
    }

    #[test]
    fn a_set_that_is_too_short_or_of_other_tokens_is_an_error() {
        let error = set(false, 51).unwrap_err().to_string();
        assert!(error.contains("the validation split") && error.contains("51 tokens"), "{error}");
        set(true, 51).unwrap();
        assert!(set(true, 0).is_err());
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::of_file(token_file(folder.path(), &[1; 20], &[1; 20])).unwrap();
        let error = ValidationSet::open(tokens, true, 4, 100).unwrap_err().to_string();
        assert!(error.contains("the model knows 100"), "{error}");
    }
}
