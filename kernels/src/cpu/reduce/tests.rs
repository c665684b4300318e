//! Reductions against their definitions, element by element.

use half::{bf16, f16};
use proptest::prelude::*;

use super::blocks::BLOCK;
use super::*;
use crate::Element;

/// Runs a reduction of vectors into copies of `before`, one for each of `copies`.
fn reduced<I: Element, O: Element>(inputs: &[Vec<I>], before: &[O], copies: usize, job: &Fold<'_>) -> Vec<Vec<O>> {
    let mut outputs = vec![before.to_vec(); copies];
    let starts: Vec<*const u8> = inputs.iter().map(|input| input.as_ptr().cast()).collect();
    let ends: Vec<*mut u8> = outputs.iter_mut().map(|output| output.as_mut_ptr().cast()).collect();
    let (dtype, output, count) = (I::DTYPE, O::DTYPE, before.len());
    // SAFETY: the vectors are this function's own and have `count` elements each.
    unsafe { fold(&Fold { dtype, output, inputs: &starts, outputs: &ends, count, ..job.clone() }) };
    outputs
}

/// Combines values in the order of groups and inputs, with the old value last.
fn in_order<T: Copy>(values: &[T], before: T, job: &Fold<'_>, combine: impl Fn(T, T) -> T, end: impl Fn(T) -> T) -> T {
    let groups = values.chunks(values.len() / job.groups);
    let partials = groups.map(|group| group.iter().copied().reduce(&combine).unwrap());
    let total = end(partials.reduce(&combine).unwrap());
    if job.accumulate { combine(before, total) } else { total }
}

/// What floats come to, with arithmetic in the type in which they accumulate.
macro_rules! expected_float {
    ($name:ident, $float:ty) => {
        fn $name(values: &[$float], before: $float, job: &Fold<'_>) -> $float {
            let combine = |a: $float, b: $float| match job.operator {
                Operator::Sum => a + b,
                Operator::Prod => a * b,
                _ if a.is_nan() || b.is_nan() => <$float>::NAN,
                Operator::Min => a.min(b),
                Operator::Max => a.max(b),
                other => panic!("{other:?} of floats"),
            };
            let factor = job.factor.map(|factor| factor as $float);
            let values: Vec<$float> = values.iter().map(|&x| factor.map_or(x, |factor| x * factor)).collect();
            let end = |total: $float| job.divisor.map_or(total, |divisor| total / divisor as $float);
            in_order(&values, before, job, combine, end)
        }
    };
}
expected_float!(expected, f32);
expected_float!(expected_f64, f64);

/// What integers come to before they wrap; of products and of sums the lowest 64 digits are right.
fn expected_integer(values: &[i128], before: i128, job: &Fold<'_>) -> i128 {
    let combine = |a: i128, b: i128| match job.operator {
        Operator::Sum => a + b,
        Operator::Prod => a.wrapping_mul(b),
        Operator::Min => a.min(b),
        Operator::Max => a.max(b),
        Operator::And => a & b,
        Operator::Or => a | b,
        Operator::Xor => a ^ b,
    };
    in_order(values, before, job, combine, |total| job.divisor.map_or(total, |divisor| total / divisor as i128))
}

fn same(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// A job, its number of inputs, and its number of elements.
type Job = (Fold<'static>, usize, usize);

fn jobs(operators: &'static [Operator]) -> impl Strategy<Value = Job> {
    let lengths = prop_oneof![Just(0), Just(1), Just(7), Just(BLOCK), 0..3 * BLOCK];
    let scale = (any::<bool>(), any::<bool>());
    (prop::sample::select(operators), 1usize..4, 1usize..4, any::<bool>(), any::<bool>(), lengths, scale).prop_map(
        |(operator, groups, in_group, accumulate, stream, count, (multiplied, divided))| {
            let sums = operator == Operator::Sum;
            let factor = (sums && multiplied).then_some(0.3);
            let divisor = (sums && divided).then_some(groups * in_group);
            let job = Fold { groups, accumulate, stream, factor, divisor, ..Fold::new(DType::F32, operator) };
            (job, groups * in_group, count)
        },
    )
}

const FLOATS: &[Operator] = &[Operator::Sum, Operator::Prod, Operator::Min, Operator::Max];
const ALL: &[Operator] =
    &[Operator::Sum, Operator::Prod, Operator::Min, Operator::Max, Operator::And, Operator::Or, Operator::Xor];

fn value(stream: usize, index: usize) -> f32 {
    match (stream + index) % 97 {
        0 => f32::NAN,
        1 => f32::INFINITY,
        _ => crate::random::normal(3, stream as u64, index as u64) as f32,
    }
}

/// Any bits.
fn bits(stream: usize, index: usize) -> u64 {
    crate::random::normal(5, stream as u64, index as u64).to_bits().wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Inputs of narrow floats give what their values give in f32, rounded once.
fn narrow_floats<T: Element>(
    (job, inputs, count): &Job,
    of: impl Fn(f32) -> T,
    to: impl Fn(T) -> f32,
) -> Result<(), TestCaseError> {
    let inputs: Vec<Vec<T>> = (0..*inputs).map(|k| (0..*count).map(|i| of(value(k, i))).collect()).collect();
    let wide = reduced(&inputs, &vec![0.5f32; *count], 1, job).remove(0);
    let narrow = reduced(&inputs, &vec![of(0.5); *count], 1, job).remove(0);
    let values: Vec<Vec<f32>> = inputs.iter().map(|input| input.iter().map(|&x| to(x)).collect()).collect();
    let rounded = reduced(&values, &vec![of(0.5); *count], 1, job).remove(0);
    for index in 0..*count {
        let values: Vec<f32> = values.iter().map(|input| input[index]).collect();
        let exact = expected(&values, 0.5, job);
        prop_assert!(same(wide[index].into(), exact.into()));
        prop_assert!(same(to(narrow[index]).into(), to(of(exact)).into()));
        prop_assert!(same(to(rounded[index]).into(), to(of(exact)).into()));
    }
    Ok(())
}

/// Integers give the lowest digits of what they come to; a sum that is divided does not wrap
/// before.
macro_rules! integers {
    ($integer:ty, $job:expr) => {{
        let (job, inputs, count) = $job;
        let job = &Fold { factor: None, ..job.clone() };
        let draw = |k: usize, i: usize| bits(k, i) as $integer;
        let inputs: Vec<Vec<$integer>> = (0..*inputs).map(|k| (0..*count).map(|i| draw(k, i)).collect()).collect();
        let before: Vec<$integer> = (0..*count).map(|i| draw(99, i)).collect();
        let outputs = reduced(&inputs, &before, 2, job);
        for index in 0..*count {
            let mut values: Vec<i128> = inputs.iter().map(|input| input[index].into()).collect();
            if size_of::<$integer>() == 8 && job.divisor.is_some() {
                // There is no wider type.
                let sum = inputs.iter().fold(0, |sum: $integer, input| sum.wrapping_add(input[index]));
                values = vec![0; values.len()];
                values[0] = sum.into();
            }
            let exact = expected_integer(&values, before[index].into(), job) as $integer;
            prop_assert_eq!(outputs[0][index], exact, "{:?}", job.operator);
            prop_assert_eq!(outputs[1][index], exact);
        }
    }};
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn f32_is_combined_in_the_order_of_groups_and_inputs_and_with_the_old_value_last((job, inputs, count) in jobs(FLOATS)) {
        let inputs: Vec<Vec<f32>> = (0..inputs).map(|k| (0..count).map(|i| value(k, i)).collect()).collect();
        let before: Vec<f32> = (0..count).map(|i| value(99, i)).collect();
        for output in reduced(&inputs, &before, 2, &job) {
            for index in 0..count {
                let values: Vec<f32> = inputs.iter().map(|input| input[index]).collect();
                prop_assert!(same(output[index].into(), expected(&values, before[index], &job).into()));
            }
        }
    }

    #[test]
    fn narrow_floats_accumulate_in_f32_and_are_rounded_once(job in jobs(FLOATS)) {
        narrow_floats(&job, bf16::from_f32, bf16::to_f32)?;
        narrow_floats(&job, f16::from_f32, f16::to_f32)?;
    }

    #[test]
    fn doubles_stay_doubles((job, inputs, count) in jobs(FLOATS)) {
        let draw = |k: usize, i: usize| crate::random::normal(7, k as u64, i as u64);
        let inputs: Vec<Vec<f64>> = (0..inputs).map(|k| (0..count).map(|i| draw(k, i)).collect()).collect();
        let before: Vec<f64> = (0..count).map(|i| draw(99, i)).collect();
        let output = reduced(&inputs, &before, 1, &job).remove(0);
        for index in 0..count {
            let values: Vec<f64> = inputs.iter().map(|input| input[index]).collect();
            prop_assert!(same(output[index], expected_f64(&values, before[index], &job)));
        }
    }

    #[test]
    fn integers_wrap_and_divided_sums_do_not(job in jobs(ALL)) {
        integers!(i8, &job);
        integers!(u8, &job);
        integers!(i32, &job);
        integers!(u32, &job);
        integers!(i64, &job);
        integers!(u64, &job);
    }

    #[test]
    fn truth_values_are_any_bytes_and_results_are_0_and_1((job, inputs, count) in jobs(ALL)) {
        let job = Fold { factor: None, divisor: None, ..job };
        let draw = |k: usize, i: usize| (bits(k, i) as u8).saturating_sub(100);
        let bytes: Vec<Vec<u8>> = (0..inputs).map(|k| (0..count).map(|i| draw(k, i)).collect()).collect();
        let truths = |bytes: &[u8]| bytemuck::cast_slice::<u8, Bool>(bytes).to_vec();
        let inputs: Vec<Vec<Bool>> = bytes.iter().map(|bytes| truths(bytes)).collect();
        let before = truths(&(0..count).map(|i| draw(99, i)).collect::<Vec<u8>>());
        let output = reduced(&inputs, &before, 1, &job).remove(0);
        let combine = |a: bool, b: bool| match job.operator {
            Operator::Sum | Operator::Max | Operator::Or => a || b,
            Operator::Prod | Operator::Min | Operator::And => a && b,
            Operator::Xor => a != b,
        };
        for index in 0..count {
            let values: Vec<bool> = bytes.iter().map(|bytes| bytes[index] != 0).collect();
            let exact = in_order(&values, before[index].into(), &job, combine, |total| total);
            prop_assert_eq!(bytemuck::cast::<Bool, u8>(output[index]), u8::from(exact));
        }
    }
}

#[test]
fn means_of_two_levels_are_those_of_one() {
    let inputs: Vec<Vec<u8>> = (0..6).map(|k| (0..3000).map(|i| bits(k, i) as u8).collect()).collect();
    let sum = Fold::new(DType::U8, Operator::Sum);
    let partials: Vec<Vec<i64>> =
        inputs.chunks(3).map(|group| reduced(group, &[0i64; 3000], 1, &sum).remove(0)).collect();
    let mean = Fold { divisor: Some(6), ..sum };
    let two = reduced(&partials, &[0u8; 3000], 1, &mean);
    assert_eq!(two, reduced(&inputs, &[0u8; 3000], 1, &mean));
    let exact = |i: usize| (inputs.iter().map(|input| u32::from(input[i])).sum::<u32>() / 6) as u8;
    assert!((0..3000).all(|i| two[0][i] == exact(i)));
}

#[test]
fn what_means_nothing_is_not_supported() {
    let fold = |dtype, operator| Fold::new(dtype, operator);
    for dtype in DType::ALL {
        let is_float = dtype.is_float();
        for &operator in ALL {
            let is_of_bits = matches!(operator, Operator::And | Operator::Or | Operator::Xor);
            assert_eq!(fold(dtype, operator).supports(), !(is_float && is_of_bits), "{dtype} {operator:?}");
            let multiplied = Fold { factor: Some(2.0), ..fold(dtype, operator) };
            assert_eq!(multiplied.supports(), is_float && operator == Operator::Sum, "{dtype} {operator:?}");
            let divided = Fold { divisor: Some(2), ..fold(dtype, operator) };
            assert_eq!(divided.supports(), dtype != DType::Bool && operator == Operator::Sum);
        }
        assert!(!Fold { divisor: Some(0), ..fold(dtype, Operator::Sum) }.supports());
        assert!(Fold { output: wide(dtype, true), ..fold(dtype, Operator::Sum) }.supports());
        assert!(Fold { output: wide(dtype, false), ..fold(dtype, Operator::Sum) }.supports());
    }
    assert!(!Fold { output: DType::F16, ..fold(DType::Bf16, Operator::Sum) }.supports());
    assert!(!Fold { output: DType::I64, ..fold(DType::U64, Operator::Sum) }.supports());
    assert!(!Fold { output: DType::I64, ..fold(DType::U8, Operator::Max) }.supports());
}

#[test]
fn an_output_may_be_one_of_the_inputs() {
    let mut a: Vec<f32> = (0..3000).map(|index| index as f32).collect();
    let b = a.clone();
    let start = a.as_mut_ptr();
    let (inputs, outputs) = ([start.cast_const().cast(), b.as_ptr().cast()], [start.cast()]);
    // SAFETY: both vectors have 3,000 elements; the output is exactly the first input.
    unsafe { fold(&Fold { inputs: &inputs, outputs: &outputs, count: 3000, ..Fold::new(DType::F32, Operator::Sum) }) };
    assert!(a.iter().enumerate().all(|(index, &x)| x == 2.0 * index as f32));
}
