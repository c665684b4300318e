//! Which ranges of one long piece of memory are in use.

use std::collections::BTreeMap;

/// A range of such memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it starts: a multiple of the page.
    pub offset: u64,
    /// Whole pages.
    pub bytes: u64,
}

/// Hands out ranges, the first that is free and long enough.
pub struct Ranges {
    page: u64,
    huge_page: u64,
    /// Lengths of the free ranges by where they start: none touches another, nor the end.
    free: BTreeMap<u64, u64>,
    /// All is free from here on.
    end: u64,
}

impl Ranges {
    /// Memory of which nothing is in use. Ranges are whole pages of `page` bytes. A range that has
    /// room for a page of `huge_page` bytes starts at a multiple of it.
    pub fn new(page: u64, huge_page: u64) -> Ranges {
        Ranges { page, huge_page, free: BTreeMap::new(), end: 0 }
    }

    /// A range for `bytes` bytes.
    pub fn take(&mut self, bytes: u64) -> Range {
        let alignment = if bytes >= self.huge_page { self.huge_page } else { self.page };
        let bytes = bytes.max(1).next_multiple_of(self.page);
        let fitting = self.free.iter().find_map(|(&start, &len)| {
            let offset = start.next_multiple_of(alignment);
            (offset + bytes <= start + len).then_some((start, len, offset))
        });
        let (start, end, offset) = match fitting {
            Some((start, len, offset)) => {
                self.free.remove(&start);
                (start, start + len, offset)
            }
            None => {
                let (start, offset) = (self.end, self.end.next_multiple_of(alignment));
                self.end = offset + bytes;
                (start, self.end, offset)
            }
        };
        let after = offset + bytes;
        for (start, end) in [(start, offset), (after, end)] {
            if start < end {
                self.free.insert(start, end - start);
            }
        }
        Range { offset, bytes }
    }

    /// Takes back a range that [`Ranges::take`] handed out.
    pub fn give_back(&mut self, Range { offset, bytes }: Range) {
        let (mut start, mut end) = (offset, offset + bytes);
        if let Some((&before, &len)) = self.free.range(..start).next_back()
            && before + len == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        if end == self.end {
            self.end = start;
        } else {
            self.free.insert(start, end - start);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_in_use_never_overlap_and_all_that_is_given_back_is_free(
            steps in proptest::collection::vec((any::<bool>(), 0u64..6 << 20, any::<usize>()), 1..200)
        ) {
            const PAGE: u64 = 4096;
            const HUGE_PAGE: u64 = 2 << 20;
            let (mut ranges, mut used) = (Ranges::new(PAGE, HUGE_PAGE), Vec::<Range>::new());
            for (take, bytes, which) in steps {
                if take || used.is_empty() {
                    let range = ranges.take(bytes);
                    let alignment = if bytes >= HUGE_PAGE { HUGE_PAGE } else { PAGE };
                    prop_assert!(range.bytes >= bytes && range.offset.is_multiple_of(alignment));
                    for other in &used {
                        let apart = range.offset + range.bytes <= other.offset
                            || other.offset + other.bytes <= range.offset;
                        prop_assert!(apart, "{range:?} and {other:?}");
                    }
                    used.push(range);
                } else {
                    ranges.give_back(used.swap_remove(which % used.len()));
                }
                // Every byte up to the end is free or in use.
                let free: u64 = ranges.free.values().sum();
                let in_use: u64 = used.iter().map(|range| range.bytes).sum();
                prop_assert_eq!(free + in_use, ranges.end);
            }
            used.into_iter().for_each(|range| ranges.give_back(range));
            prop_assert!(ranges.free.is_empty() && ranges.end == 0);
        }
    }
}
