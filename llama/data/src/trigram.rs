//! The mark to beat: a trigram model of the same text.
//!
//! It predicts a token `c` from the two before it, `a b`, by counting. Counts of long contexts are
//! specific but few, so each order is interpolated with the next shorter one by the method of
//! Witten and Bell (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
//! Modeling", 1999, section 2.5), which has no parameter to tune:
//!
//! ```text
//! p(c | h) = (n(h c) + d(h) · p(c | h')) / (n(h) + d(h))
//! ```
//!
//! `n(h c)` is how often `c` followed the context `h` in the train split, `n(h)` its sum over `c`,
//! `d(h)` the number of different tokens that followed `h`, and `h'` is `h` without its first
//! token: `a b`, then `b`, then nothing, and below that the uniform `1 / VOCAB`. An unseen context
//! leaves the choice to the shorter one. Each level is a weighted mean of two distributions, so the
//! probabilities of all `c` sum to one.

use crate::batch::Row;
use crate::dataset::Dataset;
use crate::error::Result;
use crate::tokenizer::VOCAB;
use crate::tokens::{Split, TokenFile};

/// Tokens that a model counts at most: the counts of a longer text are those of its beginning, so
/// that the start of a run takes seconds at any size.
pub const MOST_TOKENS: u64 = 1 << 26;

/// Mean loss, in nats a token, of a trigram model trained on the train split, or the first
/// [`MOST_TOKENS`] of it, and evaluated on the first `windows` validation windows of `dataset`,
/// with the inputs and targets that [`Dataset::validation`] gives a model. It too sees nothing from
/// before a window: the first target is predicted from one token.
///
/// # Errors
/// [`Error::Read`](super::Error::Read) if the token file can no longer be read.
///
/// # Panics
/// If `windows` is 0 or above [`Dataset::validation_len`], or the dataset is not one file of bytes.
pub fn loss(dataset: &Dataset, windows: u64) -> Result<f64> {
    assert!(windows > 0, "a mean needs at least one window");
    let model = Trigram::train(dataset.bytes().expect("a file of bytes"))?;
    let (mut inputs, mut targets) = (vec![0; dataset.seq()], vec![0; dataset.seq()]);
    let mut nats = 0.0;
    for i in 0..windows {
        dataset.validation(i, Row::new(&mut inputs, &mut targets))?;
        let mut before = None;
        for (&last, &next) in inputs.iter().zip(&targets) {
            nats -= model.probability(before, last as usize, next as usize).ln();
            before = Some(last as usize);
        }
    }
    Ok(nats / (windows as f64 * dataset.seq() as f64))
}

/// Counts of a train split.
struct Trigram {
    /// `[VOCAB, VOCAB, VOCAB]`. The allocator hands out zero pages that take memory only where
    /// text touches them: of a text's bytes few triples occur.
    triples: Vec<u64>,
    /// What followed each pair, `[VOCAB, VOCAB]`.
    after_pair: Vec<Followers>,
    /// `p(c | b)`, `[VOCAB, VOCAB]`.
    bigram: Vec<f64>,
}

/// What followed a context: `n(h)` and `d(h)`.
#[derive(Clone, Copy, Default)]
struct Followers {
    count: u64,
    distinct: u64,
}

impl Followers {
    fn of(counts: &[u64]) -> Self {
        Self { count: counts.iter().sum(), distinct: counts.iter().filter(|&&n| n > 0).count() as u64 }
    }

    /// The formula at the head of the file.
    fn interpolate(self, count: u64, shorter: f64) -> f64 {
        if self.count == 0 {
            return shorter;
        }
        (count as f64 + self.distinct as f64 * shorter) / (self.count + self.distinct) as f64
    }
}

impl Trigram {
    fn train(tokens: &TokenFile) -> Result<Self> {
        let mut triples = vec![0u64; VOCAB * VOCAB * VOCAB];
        let mut pairs = vec![0u64; VOCAB * VOCAB];
        let mut singles = vec![0u64; VOCAB];
        let (mut before, mut last) = (None, None);
        tokens.for_each_chunk_up_to(Split::Train, MOST_TOKENS, |chunk| {
            for &token in chunk.iter() {
                let next = usize::from(token);
                singles[next] += 1;
                if let Some(b) = last {
                    pairs[b * VOCAB + next] += 1;
                    if let Some(a) = before {
                        triples[(a * VOCAB + b) * VOCAB + next] += 1;
                    }
                }
                (before, last) = (last, Some(next));
            }
        })?;

        let after_nothing = Followers::of(&singles);
        let unigram: Vec<f64> = singles.iter().map(|&n| after_nothing.interpolate(n, 1.0 / VOCAB as f64)).collect();
        let mut bigram = Vec::with_capacity(VOCAB * VOCAB);
        for counts in pairs.chunks_exact(VOCAB) {
            let followers = Followers::of(counts);
            bigram.extend(counts.iter().zip(&unigram).map(|(&n, &shorter)| followers.interpolate(n, shorter)));
        }
        let after_pair = triples
            .chunks_exact(VOCAB)
            .zip(&pairs)
            .map(|(counts, &seen)| match seen {
                // Leaves the zero pages of pairs that never occur untouched.
                0 => Followers::default(),
                _ => Followers::of(counts),
            })
            .collect();
        Ok(Self { triples, after_pair, bigram })
    }

    /// Probability that `next` follows `before last`, or `last` alone.
    fn probability(&self, before: Option<usize>, last: usize, next: usize) -> f64 {
        let shorter = self.bigram[last * VOCAB + next];
        match before {
            None => shorter,
            Some(before) => {
                let pair = before * VOCAB + last;
                self.after_pair[pair].interpolate(self.triples[pair * VOCAB + next], shorter)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    fn open(file: TokenFile, seq: usize, seed: u64) -> Result<Dataset> {
        Dataset::open(crate::any::Tokens::of_file(file)?, seq, VOCAB, seed)
    }

    use super::*;
    use crate::tokens::tests::token_file;
    use proptest::prelude::*;

    fn model(train: &[u16]) -> Trigram {
        let folder = tempfile::tempdir().unwrap();
        Trigram::train(&token_file(folder.path(), train, &[])).unwrap()
    }

    #[track_caller]
    fn assert_close(found: f64, expected: f64) {
        // A dozen roundings at most lie between the two.
        assert!((found - expected).abs() < 1e-14, "{found} {expected}");
    }

    #[test]
    fn probabilities_are_those_worked_out_by_hand() {
        // The text 0 1 0 2 has the counts n(0)=2, n(1)=n(2)=1, so n()=4 and d()=3;
        // n(0 1)=n(0 2)=n(1 0)=1; n(0 1 0)=n(1 0 2)=1.
        let model = model(&[0, 1, 0, 2]);
        let unigram = |n: f64| (n + 3.0 / 257.0) / 7.0;
        // After 0 came two different tokens, one each: n=2, d=2. After 1 came 0 alone: n=1, d=1.
        let one_after_zero = (1.0 + 2.0 * unigram(1.0)) / 4.0;
        let two_after_zero = one_after_zero;
        let zero_after_one = (1.0 + unigram(2.0)) / 2.0;
        assert_close(model.probability(None, 0, 1), one_after_zero);
        assert_close(model.probability(None, 1, 0), zero_after_one);
        assert_close(model.probability(None, 0, 9), 2.0 * unigram(0.0) / 4.0);
        // After 1 0 came 2 alone; after 0 1 came 0 alone.
        assert_close(model.probability(Some(1), 0, 2), (1.0 + two_after_zero) / 2.0);
        assert_close(model.probability(Some(1), 0, 1), one_after_zero / 2.0);
        // The pair 2 0 never occurs, nor does anything follow 2.
        assert_close(model.probability(Some(2), 0, 1), one_after_zero);
        assert_close(model.probability(Some(0), 2, 1), unigram(1.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn probabilities_are_positive_and_sum_to_one(
            text in prop::collection::vec(0u16..6, 0..300), a in 0usize..8, b in 0usize..8,
        ) {
            let model = model(&text);
            for before in [None, Some(a)] {
                let each: Vec<f64> = (0..VOCAB).map(|c| model.probability(before, b, c)).collect();
                prop_assert!(each.iter().all(|&p| p > 0.0));
                // 257 additions, each rounded by at most 2^-53 of a sum below one.
                prop_assert!((each.iter().sum::<f64>() - 1.0).abs() < 257.0 * 2f64.powi(-53) * 4.0);
            }
        }
    }

    #[test]
    fn the_loss_is_the_mean_over_the_windows_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let validation: Vec<u16> = (0..41).map(|i| i % 7 * (i % 3)).collect();
        let file = token_file(folder.path(), &[0, 1, 0, 2, 0, 1, 3, 3, 4, 0, 2], &validation);
        let data = open(file, 10, 3).unwrap();
        let model = Trigram::train(data.bytes().unwrap()).unwrap();
        let (mut inputs, mut targets) = ([0; 10], [0; 10]);
        for windows in [1, 3] {
            let mut sum = 0.0;
            for i in 0..windows {
                data.validation(i, Row::new(&mut inputs, &mut targets)).unwrap();
                for t in 0..10 {
                    let before = (t > 0).then(|| inputs[t.max(1) - 1] as usize);
                    let p = model.probability(before, inputs[t] as usize, targets[t] as usize);
                    sum -= p.ln();
                }
            }
            assert_close(loss(&data, windows).unwrap(), sum / (windows * 10) as f64);
        }
    }

    #[test]
    fn an_unpredictable_text_costs_its_entropy_and_a_regular_one_nothing() {
        let folder = tempfile::tempdir().unwrap();
        // Bits of a hash: no context helps, so ln 2 a token, plus little for the 257 - 2 tokens
        // that never occur.
        let bits = |n: u64| -> Vec<u16> {
            (0..n).map(|i| (xxhash_rust::xxh3::xxh3_64(&i.to_le_bytes()) & 1) as u16).collect()
        };
        let file = token_file(folder.path(), &bits(100_000), &bits(20_001));
        let random = loss(&open(file, 100, 0).unwrap(), 200).unwrap();
        assert!((random - 2f64.ln()).abs() < 1e-3, "{random}");

        let period: Vec<u16> = [1, 2, 3, 2].repeat(5_000);
        let file = token_file(folder.path(), &period, &period);
        // Two tokens of context leave nothing to guess. After 2 alone, 1 and 3 are equally likely,
        // so the windows that begin with a 2, every other one, pay ln 2 once in 101 tokens.
        let regular = loss(&open(file, 101, 0).unwrap(), 198).unwrap();
        let expected = 2f64.ln() / 202.0;
        assert!((regular - expected).abs() < 3e-4, "{regular} {expected}");
    }
}
