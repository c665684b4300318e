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
                assert!(wraps || (value_of(found) - exact).abs() <= error, "{reduction:?} {world} {found:?} {exact}");
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
    // Sums of four values in 0..=64 have 257 possible results; two independent ones agree with
    // probability below 2 %.
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
    for (operation, form) in Operation::ALL.into_iter().flat_map(|one| one.forms().iter().map(move |&form| (one, form)))
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
    fn in_place_and_out_of_place_agree_where_both_say_the_same(
        world in 1usize..5,
        count in 1usize..20,
        round in 0u64..4,
    ) {
        let after = |pattern: Pattern, index| pattern.element::<i64>(What::After, index);
        for rank in 0..world {
            let forms = |operation| {
                [Form::OutOfPlace, Form::InPlace].map(|form| pattern(operation, form, rank, world, count, round))
            };
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
