//! Units that move together, and the slots that they take turns in.
//!
//! A *bucket* is a run of units that is gathered, and whose gradients are reduced, by one
//! operation. The layout knows nothing of buckets: a unit's shards, its square norm and the numbers
//! that ride with its gradient are its own, and sums over units are taken in the order of units. So
//! no bucket size changes a bit or a checkpoint.

use std::collections::HashMap;
use std::ops::Range;

use pillion_collectives::{Sections, Sideband};

use crate::gradients::sideband;
use crate::{Layout, Unit};

/// Most units of a bucket: the numbers of each ride with its reduction.
const MOST_UNITS: usize = Sideband::MAX / sideband::LEN;

/// Runs of a layout's units, in order, none of which has more than `limit` elements unless it is a
/// single unit. A unit that a forward pass does not visit right after the one before it, or visits
/// more than once, begins another bucket.
pub(crate) fn runs(layout: &Layout, limit: usize) -> Vec<Range<usize>> {
    let (mut visits, mut place) = (vec![0; layout.units.len()], vec![0; layout.units.len()]);
    for (index, &unit) in layout.order.iter().enumerate() {
        visits[unit] += 1;
        place[unit] = index;
    }
    let follows = |unit: usize| visits[unit - 1] == 1 && visits[unit] == 1 && place[unit] == place[unit - 1] + 1;
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut elements = 0;
    for (unit, Unit { padded, .. }) in layout.units.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if follows(unit) && elements + padded <= limit && run.len() < MOST_UNITS => {
                run.end = unit + 1;
                elements += padded;
            }
            _ => {
                runs.push(unit..unit + 1);
                elements = *padded;
            }
        }
    }
    runs
}

/// Where buckets and their units lie.
#[derive(Debug, Default)]
pub(crate) struct Buckets {
    pub(crate) buckets: Vec<Bucket>,
    /// Of each unit.
    pub(crate) places: Vec<InBucket>,
}

/// A run of units.
#[derive(Debug)]
pub(crate) struct Bucket {
    pub(crate) units: Range<usize>,
    /// How a full buffer of several units is cut: each is a section.
    pub(crate) sections: Option<Sections>,
    /// Elements of one shard of all of them.
    pub(crate) shard: usize,
    /// Elements of all of them, with padding.
    pub(crate) padded: usize,
}

/// A unit's place in its bucket.
#[derive(Debug)]
pub(crate) struct InBucket {
    pub(crate) bucket: usize,
    /// Its number in the bucket.
    pub(crate) section: usize,
    /// Its elements in a full buffer.
    pub(crate) full: Range<usize>,
    /// Its elements in a shard.
    pub(crate) shard: Range<usize>,
}

impl Buckets {
    pub(crate) fn new(layout: &Layout, runs: &[Range<usize>]) -> Buckets {
        let (mut buckets, mut places) = (Vec::new(), Vec::new());
        for (bucket, units) in runs.iter().enumerate() {
            let (mut padded, mut shard) = (0, 0);
            for (section, unit) in layout.units[units.clone()].iter().enumerate() {
                let [full, of_shard] = [padded..padded + unit.padded, shard..shard + unit.shard];
                (padded, shard) = (full.end, of_shard.end);
                places.push(InBucket { bucket, section, full, shard: of_shard });
            }
            let chunks: Vec<usize> = layout.units[units.clone()].iter().map(|unit| unit.shard).collect();
            let sections =
                (chunks.len() > 1).then(|| Sections::new(&chunks).expect("few, of lengths that a buffer has"));
            buckets.push(Bucket { units: units.clone(), sections, shard, padded });
        }
        Buckets { buckets, places }
    }

    /// Most units that a bucket has.
    pub(crate) fn most_units(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.units.len()).max().unwrap_or(0)
    }
}

/// Slots of at most two lengths. Buckets of one class take turns in its slots.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Slots {
    /// Each bucket's class.
    pub(crate) class: Vec<usize>,
    /// Each class's slots, one class after the other.
    pub(crate) of_class: Vec<Range<usize>>,
}

impl Slots {
    /// One for each bucket, which has its number.
    pub(crate) fn own(buckets: usize) -> Slots {
        Slots { class: (0..buckets).collect(), of_class: (0..buckets).map(|slot| slot..slot + 1).collect() }
    }

    /// Slots in which any `count` buckets can be at a time that come one after another in `visits`.
    /// `lens` are the buckets' lengths. Long buckets get slots of their own where that takes less
    /// memory than slots that hold any bucket.
    pub(crate) fn of(lens: &[usize], visits: &[usize], count: usize) -> Slots {
        let buckets = lens.len();
        if count >= buckets {
            return Slots::own(buckets);
        }
        let mut bounds = lens.to_vec();
        bounds.sort_unstable();
        bounds.dedup();
        // A plan of many lengths is not worth all of them.
        let every = bounds.len().div_ceil(MOST_BOUNDS);
        // Buckets shorter than a bound are of one class, the others of another.
        let classes = |bound: usize| -> Vec<usize> { lens.iter().map(|&len| usize::from(len >= bound)).collect() };
        let longest = |class: &[usize], of: usize| {
            lens.iter().zip(class).filter(|(_, class)| **class == of).map(|(&len, _)| len).max().unwrap_or(0)
        };
        let candidates = bounds.into_iter().step_by(every).map(|bound| {
            let class = classes(bound);
            // The first bound has all buckets in class 1.
            let counts = most_at_a_time(&class, 2, visits, count);
            let elements: usize = (0..2).map(|of| counts[of] * longest(&class, of)).sum();
            (elements, class, counts)
        });
        let (_, class, counts) = candidates.min_by_key(|(elements, ..)| *elements).expect("there are buckets");
        let (short, long) = (counts[0], counts[1]);
        if short == 0 {
            return Slots { class: vec![0; buckets], of_class: std::iter::once(0..long).collect() };
        }
        Slots { class, of_class: vec![0..short, short..short + long] }
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.of_class.last().map_or(0, |slots| slots.end)
    }

    /// The slots that a bucket may be in.
    pub(crate) fn of_bucket(&self, bucket: usize) -> Range<usize> {
        self.of_class[self.class[bucket]].clone()
    }

    /// Whether each bucket has a slot of its own.
    pub fn are_own(&self) -> bool {
        self.count() == self.class.len()
    }

    /// Of each class, the most buckets among `count` different ones that are visited one after
    /// another.
    pub(crate) fn at_a_time(&self, visits: &[usize], count: usize) -> Vec<usize> {
        most_at_a_time(&self.class, self.of_class.len(), visits, count)
    }

    /// At least so many slots of each class.
    pub(crate) fn at_least(mut self, counts: &[usize]) -> Slots {
        let mut end = 0;
        for (slots, &least) in self.of_class.iter_mut().zip(counts) {
            let count = slots.len().max(least);
            *slots = end..end + count;
            end += count;
        }
        self
    }

    /// Length of each slot, where buckets have these lengths.
    pub(crate) fn lens(&self, lens: &[usize]) -> Vec<usize> {
        let mut of_class = vec![0; self.of_class.len()];
        for (&class, &len) in self.class.iter().zip(lens) {
            of_class[class] = len.max(of_class[class]);
        }
        self.of_class.iter().zip(of_class).flat_map(|(slots, len)| slots.clone().map(move |_| len)).collect()
    }
}

/// Lengths that are tried as the least of the longer class.
const MOST_BOUNDS: usize = 16;

/// Of each of `classes` classes, the most buckets among `count` different ones that are visited one
/// after another.
fn most_at_a_time(class: &[usize], classes: usize, visits: &[usize], count: usize) -> Vec<usize> {
    let (mut inside, mut of_class, mut most) = (HashMap::new(), vec![0; classes], vec![0; classes]);
    let mut first = 0;
    for &bucket in visits {
        let times = inside.entry(bucket).or_insert(0usize);
        *times += 1;
        if *times == 1 {
            of_class[class[bucket]] += 1;
        }
        while inside.len() > count {
            let left = visits[first];
            first += 1;
            let times = inside.get_mut(&left).expect("it was counted");
            *times -= 1;
            if *times == 0 {
                inside.remove(&left);
                of_class[class[left]] -= 1;
            }
        }
        // Classes of one bucket each are many; the visited one alone can have grown.
        let grown = class[bucket];
        most[grown] = most[grown].max(of_class[grown]);
    }
    most
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{TensorSpec, UnitSpec};

    pub(crate) fn layout(lens: &[usize], shards: usize) -> Layout {
        let unit = |(index, &len): (usize, &usize)| UnitSpec {
            name: format!("unit {index}"),
            tensors: vec![TensorSpec { name: index.to_string(), shape: vec![len], decay: true, frozen: false }],
        };
        Layout::new(&lens.iter().enumerate().map(unit).collect::<Vec<_>>(), shards)
    }

    proptest! {
        #[test]
        fn every_unit_is_in_one_bucket_which_is_not_too_long(
            lens in prop::collection::vec(1usize..500, 1..40),
            again in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            limit in 0usize..3000,
            shards in 1usize..4,
        ) {
            let layout = layout(&lens, shards);
            let again: Vec<usize> = again.into_iter().map(|index| index.index(lens.len())).collect();
            let layout = layout.visiting((0..lens.len()).chain(again.clone()).collect());
            let runs = runs(&layout, limit);
            prop_assert!(runs.iter().cloned().flatten().eq(0..lens.len()));
            let buckets = Buckets::new(&layout, &runs);
            for bucket in &buckets.buckets {
                prop_assert!(bucket.units.len() == 1 || bucket.padded <= limit);
                prop_assert_eq!(bucket.padded, shards * bucket.shard);
                prop_assert!(bucket.units.len() == 1 || !again.iter().any(|unit| bucket.units.contains(unit)));
                prop_assert_eq!(bucket.units.len() > 1, bucket.sections.is_some());
            }
            for (unit, place) in layout.units.iter().zip(&buckets.places) {
                prop_assert_eq!((unit.padded, unit.shard), (place.full.len(), place.shard.len()));
                if let Some(sections) = &buckets.buckets[place.bucket].sections {
                    prop_assert_eq!(sections.in_shard(place.section), place.shard.clone());
                    prop_assert_eq!(sections.in_full(place.section, shards, 0).start, place.full.start);
                }
            }
        }

        #[test]
        fn buckets_that_follow_each_other_find_slots_that_they_fit(
            lens in prop::collection::vec(1usize..6, 1..12),
            count in 1usize..6,
        ) {
            let forward = 0..lens.len();
            let visits: Vec<usize> = forward.clone().chain(forward.clone().rev()).chain(forward).collect();
            let slots = Slots::of(&lens, &visits, count);
            let of_slot = slots.lens(&lens);
            prop_assert!(slots.of_class.len() <= 2 || count >= lens.len());
            prop_assert!(of_slot.iter().sum::<usize>() <= count.min(lens.len()) * lens.iter().max().unwrap());
            for (bucket, &len) in lens.iter().enumerate() {
                prop_assert!(slots.of_bucket(bucket).all(|slot| len <= of_slot[slot]));
            }
            for from in 0..visits.len() {
                let mut together: Vec<usize> = Vec::new();
                for &bucket in &visits[from..] {
                    if !together.contains(&bucket) {
                        together.push(bucket);
                    }
                    if together.len() > count {
                        break;
                    }
                    for (class, of_class) in slots.of_class.iter().enumerate() {
                        let wanted = together.iter().filter(|&&bucket| slots.class[bucket] == class);
                        prop_assert!(wanted.count() <= of_class.len());
                    }
                }
            }
        }
    }

    #[test]
    fn a_long_embedding_and_head_share_a_slot_that_blocks_do_not_have() {
        let lens = [1000, 100, 100, 100, 100, 100, 1000];
        let visits: Vec<usize> = (0..7).chain((0..7).rev()).chain(0..7).collect();
        let slots = Slots::of(&lens, &visits, 2);
        assert_eq!(slots.lens(&lens), [100, 100, 1000]);
        assert_eq!(slots.class, [1, 0, 0, 0, 0, 0, 1]);
        // Where the difference is small, two slots for any bucket are less than three.
        let lens = [150, 100, 100, 100, 150];
        assert_eq!(Slots::of(&lens, &[0, 1, 2, 3, 4, 3, 2, 1, 0], 2).lens(&lens), [150, 150]);
    }
}
