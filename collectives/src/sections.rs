//! How several things move as one operation.

use std::ops::Range;
use std::sync::Arc;

use crate::Error;
use crate::checks::expect;

/// How a full buffer is cut when several things move as one operation: it is a row of sections,
/// and each section is a row of equal chunks, one for each rank. A rank's *shard* is the row of
/// its chunks. The same on every rank.
///
/// ```text
/// full buffer   | a of rank 0 | a of rank 1 | b of rank 0 | b of rank 1 |
/// shard         rank 0: | a | b |     rank 1: | a | b |
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sections {
    /// Where each section's chunk begins in a shard, and where the last ends.
    bounds: Arc<[usize]>,
}

impl Sections {
    /// Most sections of an operation.
    pub const MAX: usize = 1 << 15;

    /// Sections whose chunks have these lengths.
    ///
    /// # Errors
    /// [`Error::Misuse`] when there are none, or more than [`Sections::MAX`], and when the sum of
    /// the lengths is no length.
    pub fn new(chunks: &[usize]) -> Result<Sections, Error> {
        let count = chunks.len();
        expect((1..=Sections::MAX).contains(&count), || {
            format!("{count} sections of an operation: give 1 to {}", Sections::MAX)
        })?;
        let len = chunks.iter().try_fold(0usize, |sum, &chunk| sum.checked_add(chunk));
        expect(len.is_some_and(|len| len <= isize::MAX as usize), || {
            format!("{count} sections that are longer than any memory: give lengths in elements")
        })?;
        let ends = chunks.iter().scan(0, |end, chunk| {
            *end += chunk;
            Some(*end)
        });
        Ok(Sections { bounds: std::iter::once(0).chain(ends).collect() })
    }

    /// Number of sections.
    pub fn count(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Elements of a shard.
    pub fn shard_len(&self) -> usize {
        self.bounds[self.count()]
    }

    /// A section's elements of a shard.
    pub fn in_shard(&self, section: usize) -> Range<usize> {
        self.bounds[section]..self.bounds[section + 1]
    }

    /// Rank `rank`'s chunk of a section in a full buffer of `world` ranks.
    pub fn in_full(&self, section: usize, world: usize, rank: usize) -> Range<usize> {
        let Range { start, end } = self.in_shard(section);
        let first = world * start + rank * (end - start);
        first..first + end - start
    }

    /// The section that an element of a shard belongs to.
    pub(crate) fn of(&self, element: usize) -> usize {
        self.bounds.partition_point(|&bound| bound <= element) - 1
    }

    /// Elements of a shard, cut where sections end.
    pub(crate) fn cut(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let cuts = self.bounds.iter().copied();
        let parts = cuts.clone().zip(cuts.skip(1));
        parts
            .map(move |(start, end)| start.max(elements.start)..end.min(elements.end))
            .filter(|part| part.start < part.end)
    }

    /// A short digest for headers: the number of sections, and 16 bits that depend on their
    /// lengths. Ranks that cut a buffer in different ways see different digests.
    pub(crate) fn digest(&self) -> u64 {
        let mixed = self
            .bounds
            .iter()
            .fold(0u64, |mixed, &bound| (mixed ^ bound as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
        (self.count() as u64) << 16 | mixed >> 48
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MANY: usize = 16;

    proptest! {
        #[test]
        fn every_element_of_a_full_buffer_is_in_one_chunk_of_one_rank(
            chunks in prop::collection::vec(0usize..9, 1..=MANY),
            world in 1usize..5,
        ) {
            let sections = Sections::new(&chunks).unwrap();
            prop_assert_eq!(sections.shard_len(), chunks.iter().sum::<usize>());
            let mut places = Vec::new();
            for section in 0..sections.count() {
                for rank in 0..world {
                    places.extend(sections.in_full(section, world, rank));
                }
            }
            prop_assert!(places.iter().copied().eq(0..world * sections.shard_len()));
        }

        #[test]
        fn a_cut_keeps_all_elements_in_order_and_none_of_two_sections(
            chunks in prop::collection::vec(0usize..9, 1..=MANY),
            from in 0usize..150,
            len in 0usize..150,
        ) {
            let sections = Sections::new(&chunks).unwrap();
            let all = from.min(sections.shard_len())..(from + len).min(sections.shard_len());
            let parts: Vec<Range<usize>> = sections.cut(all.clone()).collect();
            prop_assert!(parts.iter().cloned().flatten().eq(all));
            for part in parts {
                let section = sections.in_shard(sections.of(part.start));
                prop_assert!(section.start <= part.start && part.end <= section.end);
            }
        }
    }
}
