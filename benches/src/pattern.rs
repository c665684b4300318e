//! What buffers hold before and after each operation, so that every element of every result is known exactly, in every type.
//!
//! Values are small integers that depend on rank, index and round. Where elements are moved or the largest is taken, they lie in 0..=256;
//! where they are summed over n ranks, in 0..=⌊256/n⌋. bfloat16 has 8 bits of significand, so all integers up to 2⁸ = 256 are exact in it; no
//! partial sum exceeds n · ⌊256/n⌋ ≤ 256, so whatever the order, and even if each step were rounded, the sum is exact. That serves
//! up to 256 ranks. [`POISON`] lies in what an operation must overwrite; no value equals it.
//!
//! All ranks read their values from one sequence of random numbers that repeats after [`PERIOD`],
//! each from a place of its own. So what a large buffer must hold is compared with a table, as fast
//! as memory is read. Elements that are off by a multiple of the period look right. The period is
//! a prime, so the smallest such offset of whole pages is 65,521 pages.

use half::bf16;
use pillion_collectives::Reduction;
use pillion_kernels::Element;

use crate::operation::{Form, Operation};

/// Largest integer up to which bfloat16 has all.
pub const LARGEST: usize = 256;

/// In outputs before an operation.
pub const POISON: i64 = -1;

/// Values repeat after so many.
pub const PERIOD: usize = 65_521;

/// From one rank's place in the sequence to the next one's.
const STRIDE: usize = 25_033;

/// Which buffer, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The input, which no operation changes.
    Input,
    /// The output before the operation.
    Before,
    /// The output after it.
    After,
}

/// What an element is, and the elements that follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Poison,
    /// A rank's value of this index, and the next ones.
    Value(usize, usize),
    /// All ranks' values of this index, combined, and the next ones.
    Combined(usize),
}

/// An element type that holds small integers.
pub trait Integral: Element + PartialEq {
    /// This integer, exact for −256..=256.
    fn of(integer: i64) -> Self;
}

impl Integral for f32 {
    fn of(integer: i64) -> f32 {
        integer as f32
    }
}
impl Integral for f64 {
    fn of(integer: i64) -> f64 {
        integer as f64
    }
}
impl Integral for bf16 {
    fn of(integer: i64) -> bf16 {
        bf16::from_f32(integer as f32)
    }
}
impl Integral for i64 {
    fn of(integer: i64) -> i64 {
        integer
    }
}

/// A call, as one rank sees it.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// The operation.
    pub operation: Operation,
    /// Its form.
    pub form: Form,
    /// How elements are combined, where they are.
    pub reduction: Reduction,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Elements of a part, or of the buffer where there are no parts.
    pub count: usize,
    /// Values differ from round to round, so that what an earlier one left is wrong.
    pub round: u64,
}

impl Pattern {
    /// Elements of this rank's input, if it has one.
    pub fn input_len(&self) -> Option<usize> {
        use Operation::*;
        let whole = self.count * self.world;
        match (self.operation, self.form) {
            (Barrier | Scalars, _) | (_, Form::InPlace) => None,
            (Scatter, _) => self.is_root().then_some(whole),
            (ReduceScatter | AllToAll, _) => Some(whole),
            _ => Some(self.count),
        }
    }

    /// Elements of this rank's output, or of its only buffer, if it has one. A window's whole is an output.
    pub fn output_len(&self) -> Option<usize> {
        use Operation::*;
        let whole = self.count * self.world;
        match (self.operation, self.form) {
            (Barrier | Scalars, _) => None,
            (ReduceScatter, Form::InPlace) => Some(whole),
            (Reduce, _) => self.is_root().then_some(self.count),
            (Gather, _) => self.is_root().then_some(whole),
            (AllGather | AllToAll | Window, _) => Some(whole),
            _ => Some(self.count),
        }
    }

    /// An element of a buffer.
    pub fn element(&self, what: What, index: usize) -> i64 {
        match self.source(what, index).0 {
            Source::Poison => POISON,
            Source::Value(rank, index) => self.value(rank, index),
            Source::Combined(index) => self.combined(index),
        }
    }

    /// What an element is, and for how many elements that goes on.
    fn source(&self, what: What, index: usize) -> (Source, usize) {
        use Operation::*;
        let (rank, count) = (self.rank, self.count);
        let on = |source| (source, usize::MAX);
        // One of as many parts as ranks, and how much of it is left.
        let part =
            |source: &dyn Fn(usize, usize) -> Source| (source(index / count, index % count), count - index % count);
        let own = Source::Value(rank, index);
        match (what, self.operation, self.form) {
            (_, Barrier | Scalars, _) => unreachable!("they have no buffers"),
            (What::Input, _, _) => on(own),
            (What::Before, AllReduce | ReduceScatter, Form::InPlace) => on(own),
            (What::Before, AllGather, Form::InPlace) => {
                part(&|at, index| if at == rank { Source::Value(rank, index) } else { Source::Poison })
            }
            (What::Before, Broadcast, _) if self.is_root() => on(own),
            (What::Before, _, _) => on(Source::Poison),
            (What::After, AllReduce | Reduce, _) => on(Source::Combined(index)),
            (What::After, ReduceScatter, Form::InPlace) => {
                part(&|at, _| if at == rank { Source::Combined(index) } else { own })
            }
            (What::After, ReduceScatter, _) => on(Source::Combined(rank * count + index)),
            (What::After, AllGather | Gather | Window, _) => part(&Source::Value),
            (What::After, Broadcast, _) => on(Source::Value(0, index)),
            (What::After, Scatter, _) => on(Source::Value(0, rank * count + index)),
            (What::After, AllToAll, _) => part(&|at, index| Source::Value(at, rank * count + index)),
            (What::After, SendRecv, _) => on(Source::Value((rank + self.world - 1) % self.world, index)),
        }
    }

    /// The ranks' values of an index, combined.
    pub fn combined(&self, index: usize) -> i64 {
        let values = (0..self.world).map(|rank| self.value(rank, index));
        match self.reduction {
            Reduction::Sum => values.sum(),
            Reduction::Max => values.max().expect("at least one rank"),
        }
    }

    /// Element of what a rank gives.
    pub fn value(&self, rank: usize, index: usize) -> i64 {
        self.at(self.place(rank, index))
    }

    /// Where an element of what a rank gives stands in the sequence.
    fn place(&self, rank: usize, index: usize) -> usize {
        let round = (mix(self.round) % PERIOD as u64) as usize;
        (index % PERIOD + rank % PERIOD * STRIDE + round) % PERIOD
    }

    /// The sequence.
    fn at(&self, place: usize) -> i64 {
        let sums = self.operation.reduces() && self.reduction == Reduction::Sum;
        let largest = if sums { LARGEST / self.world } else { LARGEST };
        (mix(place as u64) % (largest as u64 + 1)) as i64
    }

    fn is_root(&self) -> bool {
        self.operation.root() == Some(self.rank)
    }
}

/// Steele, Lea and Flood's finalizer of SplitMix64 (2014): near numbers give unlike ones.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

/// Elements of a buffer in blocks: from tables where there are many, else one by one.
pub struct Blocks<'a, T> {
    pattern: &'a Pattern,
    what: What,
    longest: usize,
    /// The sequence, its combination over ranks, and poison, each so long that every block of it is
    /// one piece.
    tables: Option<[Vec<T>; 3]>,
    scratch: Vec<T>,
}

impl<'a, T: Integral> Blocks<'a, T> {
    /// For a buffer of `len` elements, in blocks of at most `longest`.
    pub fn new(pattern: &'a Pattern, what: What, len: usize, longest: usize) -> Blocks<'a, T> {
        let table = |element: &dyn Fn(usize) -> i64| -> Vec<T> {
            let mut table: Vec<T> = (0..PERIOD).map(|place| T::of(element(place))).collect();
            for place in 0..longest {
                table.push(table[place]);
            }
            table
        };
        let is_long = len > 4 * PERIOD;
        let tables = is_long.then(|| {
            let combines = pattern.operation.reduces();
            [
                table(&|place| pattern.at(place)),
                if combines { table(&|index| pattern.combined(index)) } else { Vec::new() },
                vec![T::of(POISON); longest],
            ]
        });
        Blocks { pattern, what, longest, tables, scratch: Vec::new() }
    }

    /// The elements from `index` on: as many as one block has, at most `most`.
    pub fn from(&mut self, index: usize, most: usize) -> &[T] {
        let (source, room) = self.pattern.source(self.what, index);
        let len = most.min(room).min(self.longest);
        let Some([values, combined, poison]) = &self.tables else {
            self.scratch.clear();
            let elements = (index..index + len).map(|index| T::of(self.pattern.element(self.what, index)));
            self.scratch.extend(elements);
            return &self.scratch;
        };
        match source {
            Source::Poison => &poison[..len],
            Source::Value(rank, index) => &values[self.pattern.place(rank, index)..][..len],
            Source::Combined(index) => &combined[index % PERIOD..][..len],
        }
    }
}

/// Number of elements that differ from those expected.
///
/// # Panics
/// When there are not as many of both.
pub fn wrong<T: Integral>(elements: &[T], expected: &[T]) -> u64 {
    assert_eq!(elements.len(), expected.len(), "elements and what they must be");
    elements.iter().zip(expected).map(|(element, expected)| u64::from(element != expected)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(operation: Operation, form: Form, rank: usize, world: usize, count: usize, round: u64) -> Pattern {
        Pattern { operation, form, reduction: Reduction::Sum, rank, world, count, round }
    }

    fn integral<T: Integral>(integers: impl Iterator<Item = i64>) -> Vec<T> {
        integers.map(T::of).collect()
    }

    /// Each wrong element counts once, wherever it stands and whatever it is.
    fn finds_each_fault<T: Integral + std::fmt::Debug>(nan: Option<T>, faults: &[usize]) {
        let pattern = pattern(Operation::AllGather, Form::OutOfPlace, 1, 3, 50, 0);
        let right: Vec<T> = integral((0..150).map(|index| pattern.element(What::After, index)));
        assert_eq!(wrong(&right, &right), 0);
        for (what, bad) in [("poison", Some(T::of(POISON))), ("NaN", nan)] {
            let Some(bad) = bad else { continue };
            let mut elements = right.clone();
            faults.iter().for_each(|&at| elements[at] = bad);
            assert_eq!(wrong(&elements, &right), faults.len() as u64, "{what}");
        }
        for &at in faults {
            let mut elements = right.clone();
            elements[at] = T::of(pattern.element(What::After, at) + 1);
            assert_eq!(wrong(&elements, &right), 1, "an element that is one too large");
        }
    }

    #[test]
    fn a_wrong_element_is_found_in_every_type() {
        let faults = [0, 1, 49, 50, 77, 149];
        finds_each_fault(Some(f32::NAN), &faults);
        finds_each_fault(Some(f64::NAN), &faults);
        finds_each_fault(Some(bf16::NAN), &faults);
        finds_each_fault::<i64>(None, &faults);
    }

    #[test]
    fn what_another_operation_or_rank_or_round_left_is_wrong() {
        const COUNT: usize = 1000;
        let right = pattern(Operation::AllReduce, Form::OutOfPlace, 0, 4, COUNT, 0);
        let elements: Vec<f32> = integral((0..COUNT).map(|index| right.element(What::After, index)));
        let seen = |expected: &dyn Fn(usize) -> i64| wrong(&elements, &integral::<f32>((0..COUNT).map(expected)));
        assert_eq!(seen(&|index| right.element(What::After, index)), 0);
        // Sums of four values in 0..=64 have 257 possible results; two independent ones agree with probability below 2 %.
        let mostly = COUNT as u64 * 9 / 10;
        assert!(seen(&|index| Pattern { round: 1, ..right }.element(What::After, index)) > mostly, "an earlier round");
        assert!(seen(&|index| right.element(What::After, index + 1)) > mostly, "a shift by one");
        assert!(seen(&|index| right.element(What::Input, index)) > mostly, "one rank's input");
        assert!(seen(&|index| right.element(What::After, index) - right.value(3, index)) > mostly, "one rank left out");
        assert!(
            seen(&|index| Pattern { reduction: Reduction::Max, ..right }.element(What::After, index)) > mostly,
            "the largest"
        );
    }

    #[test]
    fn blocks_from_tables_are_the_elements_one_by_one() {
        const COUNT: usize = 2 * PERIOD + 100;
        for (operation, form) in
            Operation::ALL.into_iter().flat_map(|one| one.forms().iter().map(move |&form| (one, form)))
        {
            for rank in [0, 2] {
                let pattern = pattern(operation, form, rank, 3, COUNT, 5);
                let buffers = [
                    (What::Input, pattern.input_len()),
                    (What::Before, pattern.output_len()),
                    (What::After, pattern.output_len()),
                ];
                for (what, len) in buffers.into_iter().filter_map(|(what, len)| Some((what, len?))) {
                    // Where parts and periods begin and end, and in between.
                    let places = [0, 1, PERIOD - 1, PERIOD, COUNT - 1, COUNT, 2 * COUNT + 77, len.saturating_sub(1000)];
                    let mut blocks = Blocks::<f32>::new(&pattern, what, 5 * PERIOD, 1024);
                    for first in places.into_iter().filter(|&place| place < len) {
                        let block = blocks.from(first, len - first);
                        assert!(!block.is_empty() && block.len() <= 1024);
                        for (index, &element) in (first..).zip(block) {
                            assert_eq!(
                                element,
                                pattern.element(what, index) as f32,
                                "{operation:?} {form:?} {what:?} {index}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_two_ranks_give_the_same_and_neither_do_two_rounds() {
        let pattern = pattern(Operation::AllGather, Form::OutOfPlace, 0, 256, 1, 0);
        let mut places: Vec<usize> = (0..256).map(|rank| pattern.place(rank, 0)).collect();
        places.extend((1..5).map(|round| Pattern { round, ..pattern }.place(0, 0)));
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0] != pair[1]), "{places:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_partial_sum_is_exact_in_bf16(world in 1usize..=256, index in 0usize..1 << 40, round in 0u64..4) {
            let pattern = pattern(Operation::Reduce, Form::OutOfPlace, 0, world, 1, round);
            let mut total = bf16::ZERO;
            for rank in 0..world {
                total = bf16::from_f32(total.to_f32() + bf16::of(pattern.value(rank, index)).to_f32());
            }
            prop_assert_eq!(total.to_f64(), pattern.combined(index) as f64);
        }

        #[test]
        fn in_place_and_out_of_place_agree_where_both_say_the_same(world in 1usize..5, count in 1usize..20, round in 0u64..4) {
            for rank in 0..world {
                let forms = |operation| [Form::OutOfPlace, Form::InPlace].map(|form| pattern(operation, form, rank, world, count, round));
                let [out, within] = forms(Operation::ReduceScatter);
                for index in 0..count {
                    prop_assert_eq!(out.element(What::After, index), within.element(What::After, rank * count + index));
                }
                let [out, within] = forms(Operation::AllGather);
                for index in 0..count * world {
                    prop_assert_eq!(out.element(What::After, index), within.element(What::After, index));
                }
                for index in 0..count {
                    prop_assert_eq!(out.element(What::Input, index), within.element(What::Before, rank * count + index));
                }
            }
        }
    }
}
