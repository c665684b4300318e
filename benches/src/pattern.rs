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
mod tests;
