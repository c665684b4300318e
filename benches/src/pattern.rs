//! What buffers hold before and after each operation, so that every element of every result is known exactly, in every type.
//!
//! Values are small integers that depend on rank, index and round. Where elements are moved or
//! compared, they lie in 0..=256; where they are summed over n ranks, in 0..=⌊256/n⌋. bfloat16 has
//! 8 bits of significand, so all integers up to 2⁸ = 256 are exact in it. A partial sum is at most
//! n · ⌊256/n⌋, and so at most 256: the sum is exact, whatever the order, and even if each step
//! were rounded. That serves up to 256 ranks. For 8-bit integers 127 stands in the
//! place of 256, for truth values 1. Values that are multiplied are 1 and 2: each product is a
//! power of 2. [`POISON`] lies in what an operation must overwrite; no value equals it.
//!
//! All ranks read their values from one sequence of random numbers that repeats after [`PERIOD`],
//! each from a place of its own. So what a large buffer must hold is compared with a table, as fast
//! as memory is read. Elements that are off by a multiple of the period look right. The period is
//! a prime, so the smallest such offset of whole pages is 65,521 pages.

use pillion_collectives::Reduction;
use pillion_kernels::DType;

use crate::integral::{Integral, POISON, largest};
use crate::operation::{Form, Operation};

/// What elements are multiplied by where they are, before they are added.
pub const FACTOR: f64 = 0.5;

/// Every reduction.
pub const REDUCTIONS: [Reduction; 9] = [
    Reduction::Sum,
    Reduction::Avg,
    Reduction::Prod,
    Reduction::Min,
    Reduction::Max,
    Reduction::BitAnd,
    Reduction::BitOr,
    Reduction::BitXor,
    Reduction::PremulSum(FACTOR),
];

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

/// A call, as one rank sees it.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// The operation.
    pub operation: Operation,
    /// Its form.
    pub form: Form,
    /// How elements are combined, where they are.
    pub reduction: Reduction,
    /// Type of the elements.
    pub dtype: DType,
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
            (Scatter | ScatterV, _) => self.is_root().then_some(whole),
            (ReduceScatter | ReduceScatterV | AllToAll | AllToAllV, _) => Some(whole),
            (AllGatherV | GatherV, _) => Some(self.part(self.rank)),
            _ => Some(self.count),
        }
    }

    /// Elements of this rank's output, or of its only buffer, if it has one. A window's whole is an output.
    pub fn output_len(&self) -> Option<usize> {
        use Operation::*;
        let whole = self.count * self.world;
        match (self.operation, self.form) {
            (Barrier | Scalars, _) => None,
            (ReduceScatter | ReduceScatterV, Form::InPlace) => Some(whole),
            (Reduce, _) => self.is_root().then_some(self.count),
            (Gather | GatherV, _) => self.is_root().then_some(whole),
            (AllGather | AllGatherV | AllToAll | AllToAllV | Window, _) => Some(whole),
            (ReduceScatterV | ScatterV, _) => Some(self.part(self.rank)),
            _ => Some(self.count),
        }
    }

    /// Where the part of a rank begins, of as many elements as all parts have; those of uneven
    /// operations grow by the length of the first one.
    fn begin(&self, part: usize) -> usize {
        let (whole, world) = ((self.count * self.world) as u128, self.world as u128);
        match self.operation.is_uneven() {
            true => (whole * (part as u128 * (part as u128 + 1)) / (world * (world + 1))) as usize,
            false => part * self.count,
        }
    }

    /// Elements of the part of a rank.
    fn part(&self, part: usize) -> usize {
        self.begin(part + 1) - self.begin(part)
    }

    /// Elements of the parts of what a rank sends or receives, in order of rank.
    pub fn parts(&self, rank: usize) -> Vec<usize> {
        let turned = if self.operation == Operation::AllToAllV { rank } else { 0 };
        (0..self.world).map(|part| self.part((part + turned) % self.world)).collect()
    }

    /// The part of what a rank sends or receives that an element is in: its number, where in it the
    /// element is, and its length.
    fn part_of(&self, rank: usize, index: usize) -> (usize, usize, usize) {
        if !self.operation.is_uneven() {
            return (index / self.count, index % self.count, self.count);
        }
        let mut start = 0;
        for (part, len) in self.parts(rank).into_iter().enumerate() {
            if index < start + len {
                return (part, index - start, len);
            }
            start += len;
        }
        unreachable!("element {index} of {start}")
    }

    /// An element of a buffer.
    pub fn element<T: Integral>(&self, what: What, index: usize) -> T {
        match self.source(what, index).0 {
            Source::Poison => T::of(POISON),
            Source::Value(rank, index) => T::of(self.value(rank, index)),
            Source::Combined(index) => self.combined(index),
        }
    }

    /// What an element is, and for how many elements that goes on.
    fn source(&self, what: What, index: usize) -> (Source, usize) {
        use Operation::*;
        let rank = self.rank;
        let on = |source| (source, usize::MAX);
        // One of as many parts as ranks, and how much of it is left.
        let part = |source: &dyn Fn(usize, usize) -> Source| {
            let (part, at, len) = self.part_of(rank, index);
            (source(part, at), len - at)
        };
        let own = Source::Value(rank, index);
        match (what, self.operation, self.form) {
            (_, Barrier | Scalars, _) => unreachable!("they have no buffers"),
            (What::Input, _, _) => on(own),
            (What::Before, AllReduce | ReduceScatter | ReduceScatterV, Form::InPlace) => on(own),
            (What::Before, AllGather | AllGatherV, Form::InPlace) => {
                part(&|at, index| if at == rank { Source::Value(rank, index) } else { Source::Poison })
            }
            (What::Before, Broadcast, _) if self.is_root() => on(own),
            (What::Before, _, _) => on(Source::Poison),
            (What::After, AllReduce | Reduce, _) => on(Source::Combined(index)),
            (What::After, ReduceScatter | ReduceScatterV, Form::InPlace) => {
                part(&|at, _| if at == rank { Source::Combined(index) } else { own })
            }
            (What::After, ReduceScatter | ReduceScatterV, _) => on(Source::Combined(self.begin(rank) + index)),
            (What::After, AllGather | AllGatherV | Gather | GatherV | Window, _) => part(&Source::Value),
            (What::After, Broadcast, _) => on(Source::Value(0, index)),
            (What::After, Scatter | ScatterV, _) => on(Source::Value(0, self.begin(rank) + index)),
            (What::After, AllToAll, _) => part(&|at, index| Source::Value(at, self.begin(rank) + index)),
            (What::After, AllToAllV, _) => part(&|at, index| {
                let before: usize = self.parts(at)[..rank].iter().sum();
                Source::Value(at, before + index)
            }),
            (What::After, SendRecv, _) => on(Source::Value((rank + self.world - 1) % self.world, index)),
        }
    }

    /// The ranks' values of an index, combined.
    pub fn combined<T: Integral>(&self, index: usize) -> T {
        let values = (0..self.world).map(|rank| self.value(rank, index));
        let some = "at least one rank";
        match self.reduction {
            Reduction::Sum => T::of(values.sum()),
            Reduction::Avg => T::quotient(values.sum(), self.world),
            Reduction::PremulSum(factor) => T::quotient(values.sum(), (1.0 / factor) as usize),
            Reduction::Prod if self.dtype == DType::Bool => T::of(values.product()),
            Reduction::Prod => T::power(values.filter(|&value| value == 2).count() as u32),
            Reduction::Min => T::of(values.min().expect(some)),
            Reduction::Max => T::of(values.max().expect(some)),
            Reduction::BitAnd => T::of(values.reduce(|a, b| a & b).expect(some)),
            Reduction::BitOr => T::of(values.reduce(|a, b| a | b).expect(some)),
            Reduction::BitXor => T::of(values.reduce(|a, b| a ^ b).expect(some)),
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
        let largest = largest(self.dtype);
        let among = |values: usize| (mix(place as u64) % values as u64) as i64;
        match self.reduction {
            _ if !self.operation.reduces() || self.dtype == DType::Bool => among(largest + 1),
            Reduction::Sum | Reduction::Avg | Reduction::PremulSum(_) => among(largest / self.world + 1),
            Reduction::Prod => 1 + among(2),
            _ => among(largest + 1),
        }
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
        let table = |element: &dyn Fn(usize) -> T| -> Vec<T> {
            let mut table: Vec<T> = (0..PERIOD).map(element).collect();
            for place in 0..longest {
                table.push(table[place]);
            }
            table
        };
        let is_long = len > 4 * PERIOD;
        let tables = is_long.then(|| {
            let combines = pattern.operation.reduces();
            [
                table(&|place| T::of(pattern.at(place))),
                if combines { table(&|index| pattern.combined::<T>(index)) } else { Vec::new() },
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
            let elements = (index..index + len).map(|index| self.pattern.element::<T>(self.what, index));
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
    elements.iter().zip(expected).map(|(element, expected)| u64::from(element.differs(expected))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use pillion_kernels::Bool;
    use proptest::prelude::*;

    fn pattern(operation: Operation, form: Form, rank: usize, world: usize, count: usize, round: u64) -> Pattern {
        let (reduction, dtype) = (Reduction::Sum, DType::F32);
        Pattern { operation, form, reduction, dtype, rank, world, count, round }
    }

    fn integral<T: Integral>(integers: impl Iterator<Item = i64>) -> Vec<T> {
        integers.map(T::of).collect()
    }

    /// Each wrong element counts once, wherever it stands and whatever it is.
    fn finds_each_fault<T: Integral + std::fmt::Debug>(nan: Option<T>, faults: &[usize]) {
        let dtype = T::DTYPE;
        let pattern = Pattern { dtype, ..pattern(Operation::AllGather, Form::OutOfPlace, 1, 3, 50, 0) };
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
            elements[at] = T::of(pattern.element::<i64>(What::After, at) + 1);
            assert_eq!(wrong(&elements, &right), 1, "an element that is one too large");
        }
    }

    #[test]
    fn a_wrong_element_is_found_in_every_type() {
        let faults = [0, 1, 49, 50, 77, 149];
        finds_each_fault(Some(f32::NAN), &faults);
        finds_each_fault(Some(f64::NAN), &faults);
        finds_each_fault(Some(bf16::NAN), &faults);
        finds_each_fault(Some(f16::NAN), &faults);
        finds_each_fault::<i8>(None, &faults);
        finds_each_fault::<u8>(None, &faults);
        finds_each_fault::<i32>(None, &faults);
        finds_each_fault::<u32>(None, &faults);
        finds_each_fault::<i64>(None, &faults);
        finds_each_fault::<u64>(None, &faults);
        let right: Vec<Bool> = integral((0..150).map(|index| index % 2));
        for bad in [0u8, 1, 2, 255] {
            let elements = vec![bytemuck::cast::<u8, Bool>(bad); 150];
            assert_eq!(wrong(&elements, &right), if bad < 2 { 75 } else { 150 }, "{bad}");
        }
    }

    /// What each type and reduction gives when the ranks' values are combined by its definition.
    fn is_what_values_come_to<T: Integral + std::fmt::Debug>(value_of: fn(T) -> f64) {
        for reduction in REDUCTIONS.into_iter().filter(|one| one.supports(T::DTYPE, T::DTYPE)) {
            for world in [1, 3, 5] {
                let pattern = pattern(Operation::AllReduce, Form::OutOfPlace, 0, world, 200, 1);
                let pattern = Pattern { reduction, dtype: T::DTYPE, ..pattern };
                let mut seen = Vec::new();
                for index in 0..200 {
                    let values: Vec<i64> = (0..world).map(|rank| pattern.value(rank, index)).collect();
                    let both = |combine: fn(i64, i64) -> i64| values.iter().copied().reduce(combine).unwrap() as f64;
                    let (sum, most) = (both(|a, b| a + b), largest(T::DTYPE) as f64);
                    let exact = match reduction {
                        Reduction::Sum => sum.min(most),
                        Reduction::Avg => sum / world as f64,
                        Reduction::PremulSum(factor) => sum * factor,
                        Reduction::Prod => both(|a, b| a * b),
                        Reduction::Min => both(i64::min),
                        Reduction::Max => both(i64::max),
                        Reduction::BitAnd => both(|a, b| a & b),
                        Reduction::BitOr => both(|a, b| a | b),
                        Reduction::BitXor => both(|a, b| a ^ b),
                    };
                    let found = pattern.combined::<T>(index);
                    // A mean of integers loses less than 1, and one of floats half of the last
                    // digit that bf16 has.
                    let error = if T::DTYPE.is_float() { exact / 256.0 } else { 1.0 - 1e-9 };
                    let wraps = T::DTYPE.bytes() == 1 && exact > most;
                    assert!(
                        wraps || (value_of(found) - exact).abs() <= error,
                        "{reduction:?} {world} {found:?} {exact}"
                    );
                    assert!(found.differs(&T::of(POISON)), "{reduction:?} of {:?}", T::DTYPE);
                    seen.push(value_of(found));
                }
                seen.sort_by(f64::total_cmp);
                assert!(seen[0] < seen[199], "{reduction:?} of {:?} tells nothing", T::DTYPE);
            }
        }
    }

    #[test]
    fn combined_values_are_those_of_the_definition_in_every_type() {
        is_what_values_come_to::<f32>(f64::from);
        is_what_values_come_to::<f64>(f64::from);
        is_what_values_come_to::<bf16>(f64::from);
        is_what_values_come_to::<f16>(f64::from);
        is_what_values_come_to::<i8>(f64::from);
        is_what_values_come_to::<u8>(f64::from);
        is_what_values_come_to::<i32>(f64::from);
        is_what_values_come_to::<u32>(f64::from);
        is_what_values_come_to::<i64>(|x| x as f64);
        is_what_values_come_to::<u64>(|x| x as f64);
        is_what_values_come_to::<Bool>(|x| f64::from(u8::from(bool::from(x))));
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
        let without = |index| right.element::<i64>(What::After, index) - right.value(3, index);
        assert!(seen(&without) > mostly, "one rank left out");
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
                                pattern.element::<f32>(what, index),
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
            prop_assert_eq!(total.to_f64(), pattern.combined::<f64>(index));
        }

        #[test]
        fn in_place_and_out_of_place_agree_where_both_say_the_same(world in 1usize..5, count in 1usize..20, round in 0u64..4) {
            let after = |pattern: Pattern, index| pattern.element::<i64>(What::After, index);
            for rank in 0..world {
                let forms = |operation| [Form::OutOfPlace, Form::InPlace].map(|form| pattern(operation, form, rank, world, count, round));
                let [out, within] = forms(Operation::ReduceScatter);
                for index in 0..count {
                    prop_assert_eq!(after(out, index), after(within, rank * count + index));
                }
                let [out, within] = forms(Operation::AllGather);
                for index in 0..count * world {
                    prop_assert_eq!(after(out, index), after(within, index));
                }
                for index in 0..count {
                    let before = within.element::<i64>(What::Before, rank * count + index);
                    prop_assert_eq!(out.element::<i64>(What::Input, index), before);
                }
            }
        }
    }
}
