//! What buffers hold before and after each operation, so that every element of every result is known exactly, in every type.
//!
//! Values are small integers that depend on rank, index and round. Where elements are moved or the largest is taken, they lie in 0..=256;
//! where they are summed over n ranks, in 0..=⌊256/n⌋. bfloat16 has 8 bits of significand, so all integers up to 2⁸ = 256 are exact in it; no
//! partial sum exceeds n · ⌊256/n⌋ ≤ 256, so whatever the order, and even if each step were rounded, the sum is exact. That serves
//! up to 256 ranks. [`POISON`] lies in what an operation must overwrite; no value equals it.

use half::bf16;
use pillion_collectives::Reduction;
use pillion_kernels::Element;

use crate::operation::{Form, Operation};

/// Largest integer up to which bfloat16 has all.
pub const LARGEST: usize = 256;

/// In outputs before an operation.
pub const POISON: i64 = -1;

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

    /// Element of the input, which no operation changes.
    pub fn input(&self, index: usize) -> i64 {
        self.value(self.rank, index)
    }

    /// Element of the output before the operation.
    pub fn output_before(&self, index: usize) -> i64 {
        use Operation::*;
        match (self.operation, self.form) {
            (AllReduce | ReduceScatter, Form::InPlace) => self.value(self.rank, index),
            (AllGather, Form::InPlace) if index / self.count == self.rank => self.value(self.rank, index % self.count),
            (Broadcast, _) if self.is_root() => self.value(self.rank, index),
            _ => POISON,
        }
    }

    /// Element of the output after the operation.
    pub fn output_after(&self, index: usize) -> i64 {
        use Operation::*;
        match self.operation {
            AllReduce | Reduce => self.combined(index),
            ReduceScatter if self.form == Form::OutOfPlace => self.combined(self.rank * self.count + index),
            ReduceScatter if index / self.count == self.rank => self.combined(index),
            ReduceScatter => self.value(self.rank, index),
            AllGather | Gather | Window => self.value(index / self.count, index % self.count),
            Broadcast => self.value(0, index),
            Scatter => self.value(0, self.rank * self.count + index),
            AllToAll => self.value(index / self.count, self.rank * self.count + index % self.count),
            SendRecv => self.value((self.rank + self.world - 1) % self.world, index),
            Barrier | Scalars => unreachable!("they have no buffers"),
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
        let sums = self.operation.reduces() && self.reduction == Reduction::Sum;
        let largest = if sums { LARGEST / self.world } else { LARGEST };
        (mix((self.round << 56) ^ ((rank as u64) << 44) ^ index as u64) % (largest as u64 + 1)) as i64
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

/// Number of `elements`, which start at `first` in their buffer, that differ from what `expected` says.
pub fn wrong<T: Integral>(elements: &[T], first: usize, expected: impl Fn(usize) -> i64) -> u64 {
    let differs = |&(at, &element): &(usize, &T)| element != T::of(expected(first + at));
    elements.iter().enumerate().filter(differs).count() as u64
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
        let right: Vec<T> = integral((0..150).map(|index| pattern.output_after(index)));
        assert_eq!(wrong(&right, 0, |index| pattern.output_after(index)), 0);
        assert_eq!(wrong(&right[40..], 40, |index| pattern.output_after(index)), 0);
        for (what, bad) in [("poison", Some(T::of(POISON))), ("NaN", nan)] {
            let Some(bad) = bad else { continue };
            let mut elements = right.clone();
            faults.iter().for_each(|&at| elements[at] = bad);
            assert_eq!(wrong(&elements, 0, |index| pattern.output_after(index)), faults.len() as u64, "{what}");
        }
        for &at in faults {
            let mut elements = right.clone();
            elements[at] = T::of(pattern.output_after(at) + 1);
            assert_eq!(wrong(&elements, 0, |index| pattern.output_after(index)), 1, "an element that is one too large");
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
        let elements: Vec<f32> = integral((0..COUNT).map(|index| right.output_after(index)));
        let seen = |expected: &dyn Fn(usize) -> i64| wrong(&elements, 0, expected);
        assert_eq!(seen(&|index| right.output_after(index)), 0);
        // Sums of four values in 0..=64 have 257 possible results; two independent ones agree with probability below 2 %.
        let mostly = COUNT as u64 * 9 / 10;
        assert!(seen(&|index| Pattern { round: 1, ..right }.output_after(index)) > mostly, "an earlier round");
        assert!(seen(&|index| right.output_after(index + 1)) > mostly, "a shift by one");
        assert!(seen(&|index| right.input(index)) > mostly, "one rank's input");
        assert!(seen(&|index| right.output_after(index) - right.value(3, index)) > mostly, "one rank left out");
        assert!(
            seen(&|index| Pattern { reduction: Reduction::Max, ..right }.output_after(index)) > mostly,
            "the largest"
        );
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
                    prop_assert_eq!(out.output_after(index), within.output_after(rank * count + index));
                }
                let [out, within] = forms(Operation::AllGather);
                for index in 0..count * world {
                    prop_assert_eq!(out.output_after(index), within.output_after(index));
                }
                for index in 0..count {
                    prop_assert_eq!(out.input(index), within.output_before(rank * count + index));
                }
            }
        }
    }
}
