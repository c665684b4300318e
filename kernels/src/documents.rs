//! Which tokens of a micro-batch belong together.

use std::ops::Range;
use std::sync::Arc;

/// The documents of a micro-batch, for an attention in which a token sees its own document alone.
///
/// A document is a range of tokens, counted over the micro-batch: token t of sequence b is b·T + t.
/// The documents follow each other, cover all tokens, and none crosses the end of a sequence. A
/// clone shares them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// Where documents begin, ascending, and behind them the number of tokens.
    borders: Arc<[usize]>,
    seq: usize,
}

impl Documents {
    /// The documents of sequences of `seq` tokens. `starts: [B, T]` has, for each token, the
    /// position in its sequence at which its document begins: 0 for the document that the sequence
    /// begins within.
    ///
    /// # Panics
    /// When the sequences are not whole, or a start is neither that of the token before nor the
    /// position of its own token: that is a programmer's error.
    pub fn new(starts: &[u32], seq: usize) -> Documents {
        assert!(seq > 0 && starts.len().is_multiple_of(seq), "{} starts in sequences of {seq}", starts.len());
        let mut borders = Vec::new();
        for (sequence, starts) in starts.chunks_exact(seq).enumerate() {
            for (position, &start) in starts.iter().enumerate() {
                let begins = start as usize == position;
                let goes_on = position > 0 && start == starts[position - 1];
                assert!(begins || goes_on, "token {position} of a sequence in a document that begins at {start}");
                if begins {
                    borders.push(sequence * seq + position);
                }
            }
        }
        borders.push(starts.len());
        Documents { borders: borders.into(), seq }
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.borders.len() - 1
    }

    /// The tokens of document `index`.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn tokens(&self, index: usize) -> Range<usize> {
        self.borders[index]..self.borders[index + 1]
    }

    /// The tokens of each document, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<usize>> {
        self.borders.windows(2).map(|borders| borders[0]..borders[1])
    }

    /// B and T of the micro-batch.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.borders[self.len()] / self.seq, self.seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_follow_each_other_and_end_with_their_sequence() {
        // A document of one token, one that ends with its sequence, and a sequence that is one.
        let documents = Documents::new(&[0, 0, 2, 3, 0, 0, 0, 0], 4);
        let expected = [0..2, 2..3, 3..4, 4..8];
        assert_eq!((documents.iter().collect::<Vec<_>>(), documents.len()), (expected.to_vec(), 4));
        assert!((0..4).all(|index| documents.tokens(index) == expected[index]));
        assert_eq!(documents.shape(), (2, 4));
        assert_eq!((Documents::new(&[], 4).len(), Documents::new(&[], 4).shape()), (0, (0, 4)));
    }

    #[test]
    fn starts_that_cannot_be_are_refused() {
        for starts in [[1, 1, 1, 1], [0, 0, 1, 1], [0, 2, 2, 2], [0, 1, 0, 0], [0, 0, 0, 4]] {
            assert!(std::panic::catch_unwind(|| Documents::new(&starts, 4)).is_err(), "{starts:?}");
        }
        assert!(std::panic::catch_unwind(|| Documents::new(&[0, 0, 0], 2)).is_err());
    }
}
