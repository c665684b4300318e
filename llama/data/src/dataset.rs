//! Samples and validation windows: the numbers that the model is fed.

use crate::error::{Error, Result};
use crate::order::SampleOrder;
use crate::tokens::{Split, TokenFile};

/// A token file cut into sequences.
///
/// Window `i` of a split is its tokens `i·seq ..= (i+1)·seq`: `seq` inputs and, one token further,
/// `seq` targets. Neighbours share one token, so every token but the first is a target once. What
/// is left at the end of a split and does not fill a window is not used.
#[derive(Debug)]
pub struct Dataset {
    tokens: TokenFile,
    seq: usize,
    train: SampleOrder,
    validation: SampleOrder,
}

impl Dataset {
    /// Cuts `tokens` into sequences of `seq` tokens; `seed` decides the order of the train split.
    ///
    /// # Errors
    /// [`Error::TooShort`] if either split does not fill one window of `seq + 1` tokens;
    /// [`Error::EmptySequence`] if `seq` is 0.
    pub fn open(tokens: TokenFile, seq: usize, seed: u64) -> Result<Self> {
        if seq == 0 {
            return Err(Error::EmptySequence);
        }
        let windows = |split| match tokens.len(split).saturating_sub(1) / seq as u64 {
            0 => Err(Error::TooShort {
                path: tokens.path().to_owned(),
                split,
                tokens: tokens.len(split),
                seq: seq as u64,
            }),
            windows => Ok(windows),
        };
        Ok(Self {
            train: SampleOrder::new(windows(Split::Train)?, seed),
            validation: SampleOrder::new(windows(Split::Validation)?, VALIDATION_SEED),
            tokens,
            seq,
        })
    }

    /// The file that the windows are cut from.
    pub fn tokens(&self) -> &TokenFile {
        &self.tokens
    }

    /// Tokens in a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Samples in one pass over the train split.
    pub fn samples_per_epoch(&self) -> u64 {
        self.train.samples_per_epoch()
    }

    /// Fills in sample `g` of the run; `inputs: [seq]`, `targets: [seq]`. Any `g` is valid: epochs
    /// follow each other, each in an order of its own.
    ///
    /// # Errors
    /// [`Error::Read`] if the token file can no longer be read.
    ///
    /// # Panics
    /// If a slice does not hold `seq` tokens.
    pub fn fill(&self, g: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        self.window(Split::Train, self.train.index(g), inputs, targets)
    }

    /// Number of validation windows.
    pub fn validation_len(&self) -> u64 {
        self.validation.samples_per_epoch()
    }

    /// Fills in validation window `i`; `inputs: [seq]`, `targets: [seq]`.
    ///
    /// The windows come in a fixed shuffled order, the same for every seed, so the first `m` are a
    /// sample from the whole split: to validate on less, take fewer.
    ///
    /// # Errors
    /// [`Error::Read`] if the token file can no longer be read.
    ///
    /// # Panics
    /// If `i` is not below [`validation_len`](Self::validation_len), or a slice does not hold `seq`
    /// tokens.
    pub fn validation(&self, i: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        assert!(i < self.validation_len(), "validation window {i} of {}", self.validation_len());
        self.window(Split::Validation, self.validation.index(i), inputs, targets)
    }

    fn window(&self, split: Split, window: u64, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        assert_eq!(inputs.len(), self.seq, "inputs hold one sequence");
        assert_eq!(targets.len(), self.seq, "targets hold one sequence");
        // Read through a buffer on the stack, so that a step allocates nothing.
        let mut buffer = [0; 2048];
        let mut position = 0;
        while position <= self.seq {
            let count = (self.seq + 1 - position).min(buffer.len());
            let chunk = &mut buffer[..count];
            let offset = window * self.seq as u64 + position as u64;
            self.tokens.read(split, offset, chunk)?;
            for (position, &token) in (position..).zip(chunk.iter()) {
                if position < self.seq {
                    inputs[position] = token.into();
                }
                if position > 0 {
                    targets[position - 1] = token.into();
                }
            }
            position += count;
        }
        Ok(())
    }
}

/// Fixed, so that all runs on the same text validate on the same windows.
const VALIDATION_SEED: u64 = 0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::tests::token_file;
    use proptest::prelude::*;

    /// A split whose token `i` is a function of `i` that repeats late.
    fn tokens(len: usize) -> Vec<u16> {
        (0..len).map(|i| (i * i % 251) as u16).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn an_epoch_is_every_window_once(seq in 1usize..60, len in 2usize..6000, seed: u64) {
            // Long sequences also cross the read buffer's end.
            let seq = if seq > 50 { seq * 100 } else { seq };
            let len = len.max(seq + 1);
            let folder = tempfile::tempdir().unwrap();
            let text = tokens(len);
            let data =
                Dataset::open(token_file(folder.path(), &text, &text), seq, seed).unwrap();
            let n = (len - 1) / seq;
            prop_assert_eq!(data.samples_per_epoch(), n as u64);
            prop_assert_eq!(data.validation_len(), n as u64);

            let wide: Vec<u32> = text.iter().map(|&t| t.into()).collect();
            let mut expected: Vec<_> = (0..n)
                .map(|i| (wide[i * seq..][..seq].to_vec(), wide[i * seq + 1..][..seq].to_vec()))
                .collect();
            expected.sort();
            for validation in [false, true] {
                let mut seen = Vec::new();
                for g in 0..n as u64 {
                    let (mut inputs, mut targets) = (vec![0; seq], vec![0; seq]);
                    if validation {
                        data.validation(g, &mut inputs, &mut targets).unwrap();
                    } else {
                        data.fill(g + 3 * n as u64, &mut inputs, &mut targets).unwrap();
                    }
                    seen.push((inputs, targets));
                }
                seen.sort();
                prop_assert_eq!(&seen, &expected);
            }
        }
    }

    #[test]
    fn validation_windows_ignore_the_seed_and_samples_follow_it() {
        let folder = tempfile::tempdir().unwrap();
        let text = tokens(4001);
        let read = |seed| {
            let data = Dataset::open(token_file(folder.path(), &text, &text), 8, seed).unwrap();
            let (mut inputs, mut targets) = ([0; 8], [0; 8]);
            data.fill(0, &mut inputs, &mut targets).unwrap();
            let sample = inputs;
            data.validation(0, &mut inputs, &mut targets).unwrap();
            (sample, inputs)
        };
        assert_eq!(read(1), read(1));
        assert_ne!(read(1).0, read(2).0);
        assert_eq!(read(1).1, read(2).1);
    }

    #[test]
    fn a_split_shorter_than_a_window_is_an_error_that_names_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        for (train, validation, split) in [(16, 17, "train"), (17, 16, "validation")] {
            let file = token_file(folder.path(), &tokens(train), &tokens(validation));
            let error = Dataset::open(file, 16, 0).unwrap_err().to_string();
            let expected = format!("the {split} split of ");
            assert!(error.starts_with(&expected), "{error}");
            assert!(error.contains("has 16 tokens"), "{error}");
            assert!(error.contains("sequence of 16 needs 17"), "{error}");
            assert!(error.contains("--data PATH"), "{error}");
        }
        let file = token_file(folder.path(), &tokens(17), &tokens(17));
        assert_eq!(Dataset::open(file, 16, 0).unwrap().samples_per_epoch(), 1);
        let file = token_file(folder.path(), &[], &[]);
        assert!(matches!(Dataset::open(file, 0, 0), Err(Error::EmptySequence)));
    }

    #[test]
    fn a_token_file_cut_short_under_a_run_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let data = Dataset::open(token_file(folder.path(), &tokens(33), &tokens(33)), 16, 0).unwrap();
        std::fs::OpenOptions::new().write(true).open(data.tokens().path()).unwrap().set_len(80).unwrap();
        let (mut inputs, mut targets) = ([0; 16], [0; 16]);
        let error = data.fill(0, &mut inputs, &mut targets).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }
}
