//! The P-ary reduction inside reduce-scatter, all-reduce and reduce: every input read once, every result written once.
//!
//! Inputs are combined from first to last. 16-bit elements accumulate in f32, f32 in f32, f64 in f64, i64 wraps; the result is rounded
//! once, when it is stored. With more than one group, consecutive inputs form a group's partial result, and the partial results are combined from first
//! to last: the tree that a hierarchy of hosts computes.

use half::bf16;

use super::{maths, non_temporal, vectorized};
use crate::DType;

/// How elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The sum.
    Sum,
    /// The largest; NaN where there is one.
    Max,
}

/// One reduction: outputs\[·\]\[i\] = combination over k of inputs\[k\]\[i\], for i below `count`.
#[derive(Clone, Debug)]
pub struct Fold<'a> {
    /// Type of the inputs' elements: f32, bf16, f64 or i64.
    pub dtype: DType,
    /// How they are combined.
    pub reduction: Reduction,
    /// Number of groups; divides the number of inputs.
    pub groups: usize,
    /// Where each input starts; at least one.
    pub inputs: &'a [*const u8],
    /// Where each copy of the result goes.
    pub outputs: &'a [*mut u8],
    /// Type of the result: that of the inputs; or f32 for bf16, which keeps what was accumulated; or bf16 for f32, rounded.
    pub output: DType,
    /// Whether the result is combined with what the outputs hold, last, instead of replacing it.
    pub accumulate: bool,
    /// Number of elements.
    pub count: usize,
    /// Whether to store past the caches.
    pub stream: bool,
}

impl Fold<'_> {
    /// A reduction of nothing to nothing, in one type and one group.
    pub fn new(dtype: DType, reduction: Reduction) -> Fold<'static> {
        let nothing = (&[], &[]);
        Fold {
            dtype,
            reduction,
            groups: 1,
            inputs: nothing.0,
            outputs: nothing.1,
            output: dtype,
            accumulate: false,
            count: 0,
            stream: false,
        }
    }

    /// Whether this device can reduce these types.
    pub fn supports(dtype: DType, output: DType) -> bool {
        let narrow = [DType::F32, DType::Bf16];
        (narrow.contains(&dtype) && narrow.contains(&output))
            || (dtype == output && [DType::F64, DType::I64].contains(&dtype))
    }
}

/// Runs a reduction. Streamed results are complete for other cores once this returns and a release store follows.
///
/// # Safety
/// Every input is readable and every output writable for `count` elements of its type, aligned to it, and nobody else writes the
/// inputs or touches the outputs meanwhile. An output may be exactly an input of the same type, and overlaps no other input.
///
/// # Panics
/// For types that [`Fold::supports`] denies, without inputs, and when groups do not divide them.
pub unsafe fn fold(job: &Fold<'_>) {
    assert!(
        !job.inputs.is_empty() && job.groups > 0 && job.inputs.len().is_multiple_of(job.groups),
        "{} inputs in {} groups",
        job.inputs.len(),
        job.groups
    );
    // SAFETY: the types are those that the job names; the rest is the caller's promise.
    unsafe {
        match (job.dtype, job.output) {
            (DType::F32, DType::F32) => run::<f32, f32, f32>(job),
            (DType::F32, DType::Bf16) => run::<f32, bf16, f32>(job),
            (DType::Bf16, DType::F32) => run::<bf16, f32, f32>(job),
            (DType::Bf16, DType::Bf16) => run::<bf16, bf16, f32>(job),
            (DType::F64, DType::F64) => run::<f64, f64, f64>(job),
            (DType::I64, DType::I64) => run::<i64, i64, i64>(job),
            (input, output) => panic!("no reduction of {input} into {output}"),
        }
    }
    if job.stream {
        non_temporal::fence();
    }
}

/// Elements combined at a time: they stay in the first-level cache between inputs.
const BLOCK: usize = 1024;
/// As many, for reductions so short that clearing a longer block would take most of the time.
const SHORT: usize = 32;

/// A type in which values accumulate.
trait Wide: Copy + Default {
    fn sum(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
}

macro_rules! wide_float {
    ($($float:ty),*) => {$(
        impl Wide for $float {
            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                if self >= other || self.is_nan() { self } else { other }
            }
        }
    )*};
}
wide_float!(f32, f64);

impl Wide for i64 {
    #[inline(always)]
    fn sum(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Ord::max(self, other)
    }
}

/// A type in which values of `A` are kept.
trait Stored<A>: Copy + Default {
    fn widen(self) -> A;
    fn narrow(wide: A) -> Self;
}

macro_rules! stored_as_is {
    ($($element:ty),*) => {$(
        impl Stored<$element> for $element {
            #[inline(always)]
            fn widen(self) -> $element {
                self
            }
            #[inline(always)]
            fn narrow(wide: $element) -> $element {
                wide
            }
        }
    )*};
}
stored_as_is!(f32, f64, i64);

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(wide: f32) -> bf16 {
        maths::narrow_one(wide)
    }
}

/// # Safety
/// As for [`fold`], with elements of these types.
unsafe fn run<I: Stored<A>, O: Stored<A>, A: Wide>(job: &Fold<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.reduction {
            Reduction::Sum if job.count <= SHORT => blocks::<I, O, A, SHORT>(job, A::sum),
            Reduction::Sum => blocks::<I, O, A, BLOCK>(job, A::sum),
            Reduction::Max if job.count <= SHORT => blocks::<I, O, A, SHORT>(job, A::max),
            Reduction::Max => blocks::<I, O, A, BLOCK>(job, A::max),
        }
    }
}

/// # Safety
/// As for [`fold`], with elements of these types.
unsafe fn blocks<I: Stored<A>, O: Stored<A>, A: Wide, const BLOCK: usize>(
    job: &Fold<'_>,
    combine: impl Fn(A, A) -> A + Copy,
) {
    let in_group = job.inputs.len() / job.groups;
    vectorized(
        #[inline(always)]
        || {
            let mut total = [A::default(); BLOCK];
            let mut partial = [A::default(); BLOCK];
            for first in (0..job.count).step_by(BLOCK) {
                let len = BLOCK.min(job.count - first);
                let (total, partial) = (&mut total[..len], &mut partial[..len]);
                for (index, group) in job.inputs.chunks_exact(in_group).enumerate() {
                    // SAFETY: elements first..first + len of inputs, by the caller's promise.
                    unsafe {
                        if index == 0 {
                            combine_inputs::<I, A>(total, group, first, combine);
                        } else {
                            combine_inputs::<I, A>(partial, group, first, combine);
                            for (total, &partial) in total.iter_mut().zip(partial.iter()) {
                                *total = combine(*total, partial);
                            }
                        }
                    }
                }
                for &output in job.outputs {
                    // SAFETY: elements first..first + len of an output, by the caller's promise. No reference to an input that this
                    // might be is alive.
                    unsafe { emit::<O, A, BLOCK>(total, output.cast::<O>().add(first), job, combine) };
                }
            }
        },
    );
}

/// out = combination of the inputs' elements from `first` on.
///
/// # Safety
/// The inputs are readable for `first + out.len()` elements, and nobody writes them meanwhile.
#[inline(always)]
unsafe fn combine_inputs<I: Stored<A>, A: Wide>(
    out: &mut [A],
    inputs: &[*const u8],
    first: usize,
    combine: impl Fn(A, A) -> A + Copy,
) {
    let len = out.len();
    // SAFETY: the caller's promise; `out` is memory of `blocks`, so it overlaps no input.
    let slice = |input: *const u8| unsafe { std::slice::from_raw_parts(input.cast::<I>().add(first), len) };
    // Two at a time, so that `out` is read and written half as often.
    let mut rest = match inputs {
        [a, b, rest @ ..] => {
            for ((out, &a), &b) in out.iter_mut().zip(slice(*a)).zip(slice(*b)) {
                *out = combine(a.widen(), b.widen());
            }
            rest
        }
        [a, rest @ ..] => {
            for (out, &a) in out.iter_mut().zip(slice(*a)) {
                *out = a.widen();
            }
            rest
        }
        [] => unreachable!("a group has at least one input"),
    };
    loop {
        match rest {
            [a, b, others @ ..] => {
                for ((out, &a), &b) in out.iter_mut().zip(slice(*a)).zip(slice(*b)) {
                    *out = combine(combine(*out, a.widen()), b.widen());
                }
                rest = others;
            }
            [a] => {
                for (out, &a) in out.iter_mut().zip(slice(*a)) {
                    *out = combine(*out, a.widen());
                }
                return;
            }
            [] => return,
        }
    }
}

/// Stores a block of results, rounded.
///
/// # Safety
/// `out` is writable, and readable where the job accumulates, for `total.len()` elements that nobody else touches meanwhile.
#[inline(always)]
unsafe fn emit<O: Stored<A>, A: Wide, const BLOCK: usize>(
    total: &[A],
    out: *mut O,
    job: &Fold<'_>,
    combine: impl Fn(A, A) -> A + Copy,
) {
    if job.stream {
        let mut block = [O::default(); BLOCK];
        let block = &mut block[..total.len()];
        if job.accumulate {
            // SAFETY: the caller's promise; the reference ends before the stores.
            let old = unsafe { std::slice::from_raw_parts(out, total.len()) };
            for ((block, &total), &old) in block.iter_mut().zip(total).zip(old) {
                *block = O::narrow(combine(old.widen(), total));
            }
        } else {
            for (block, &total) in block.iter_mut().zip(total) {
                *block = O::narrow(total);
            }
        }
        // SAFETY: the caller's promise; the block is memory of this function.
        return unsafe { non_temporal::store(block.as_ptr().cast(), out.cast(), size_of_val(block)) };
    }
    // SAFETY: the caller's promise.
    let out = unsafe { std::slice::from_raw_parts_mut(out, total.len()) };
    for (out, &total) in out.iter_mut().zip(total) {
        *out = O::narrow(if job.accumulate { combine(out.widen(), total) } else { total });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Element;
    use proptest::prelude::*;

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

    /// The definition, element by element.
    fn expected(values: &[f32], before: f32, job: &Fold<'_>) -> f32 {
        let combine = |a: f32, b: f32| match job.reduction {
            Reduction::Sum => a + b,
            Reduction::Max if a.is_nan() || b.is_nan() => f32::NAN,
            Reduction::Max => a.max(b),
        };
        let groups = values.chunks(values.len() / job.groups);
        let partials = groups.map(|group| group.iter().copied().reduce(combine).unwrap());
        let total = partials.reduce(combine).unwrap();
        if job.accumulate { combine(before, total) } else { total }
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    fn jobs() -> impl Strategy<Value = (Fold<'static>, usize, usize)> {
        let reductions = prop_oneof![Just(Reduction::Sum), Just(Reduction::Max)];
        let lengths = prop_oneof![Just(0), Just(1), Just(7), Just(BLOCK), 0..3 * BLOCK];
        (reductions, 1usize..4, 1usize..4, any::<bool>(), any::<bool>(), lengths).prop_map(
            |(reduction, groups, in_group, accumulate, stream, count)| {
                (Fold { groups, accumulate, stream, ..Fold::new(DType::F32, reduction) }, groups * in_group, count)
            },
        )
    }

    fn value(stream: usize, index: usize) -> f32 {
        match (stream + index) % 97 {
            0 => f32::NAN,
            1 => f32::INFINITY,
            _ => crate::random::normal(3, stream as u64, index as u64) as f32,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn f32_is_combined_in_the_order_of_groups_and_inputs_and_with_the_old_value_last((job, inputs, count) in jobs()) {
            let inputs: Vec<Vec<f32>> = (0..inputs).map(|k| (0..count).map(|i| value(k, i)).collect()).collect();
            let before: Vec<f32> = (0..count).map(|i| value(99, i)).collect();
            for output in reduced(&inputs, &before, 2, &job) {
                for index in 0..count {
                    let values: Vec<f32> = inputs.iter().map(|input| input[index]).collect();
                    prop_assert!(same(output[index], expected(&values, before[index], &job)));
                }
            }
        }

        #[test]
        fn bf16_accumulates_in_f32_and_is_rounded_once((job, inputs, count) in jobs()) {
            let inputs: Vec<Vec<bf16>> =
                (0..inputs).map(|k| (0..count).map(|i| bf16::from_f32(value(k, i))).collect()).collect();
            let wide = reduced(&inputs, &vec![0.5f32; count], 1, &job).remove(0);
            let narrow = reduced(&inputs, &vec![bf16::from_f32(0.5); count], 1, &job).remove(0);
            for index in 0..count {
                let values: Vec<f32> = inputs.iter().map(|input| input[index].to_f32()).collect();
                let exact = expected(&values, 0.5, &job);
                prop_assert!(same(wide[index], exact));
                prop_assert!(same(narrow[index].to_f32(), bf16::from_f32(exact).to_f32()));
            }
        }

        #[test]
        fn integers_wrap_and_doubles_stay_doubles((job, inputs, count) in jobs()) {
            prop_assume!(!job.accumulate);
            let integer = |k: usize, i: usize| (i64::MAX / 3).wrapping_mul(k as i64 + 1).wrapping_add(i as i64);
            let inputs: Vec<Vec<i64>> = (0..inputs).map(|k| (0..count).map(|i| integer(k, i)).collect()).collect();
            let output = reduced(&inputs, &vec![0i64; count], 1, &job).remove(0);
            for index in 0..count {
                let values = inputs.iter().map(|input| input[index]);
                let exact = match job.reduction {
                    Reduction::Sum => values.fold(0, i64::wrapping_add),
                    Reduction::Max => values.max().unwrap(),
                };
                prop_assert_eq!(output[index], exact);
            }
            let inputs = inputs.iter().map(|input| input.iter().map(|&x| x as f64 * 1e-12).collect::<Vec<f64>>());
            let inputs: Vec<Vec<f64>> = inputs.collect();
            let flat = Fold { groups: 1, ..job };
            let output = reduced(&inputs, &vec![0f64; count], 1, &flat).remove(0);
            for index in 0..count {
                let combine = |a: f64, b: f64| if job.reduction == Reduction::Sum { a + b } else { a.max(b) };
                let exact = inputs.iter().map(|input| input[index]).reduce(combine).unwrap();
                prop_assert_eq!(output[index].to_bits(), exact.to_bits());
            }
        }
    }

    #[test]
    fn an_output_may_be_one_of_the_inputs() {
        let mut a: Vec<f32> = (0..3000).map(|index| index as f32).collect();
        let b = a.clone();
        let start = a.as_mut_ptr();
        let (inputs, outputs) = ([start.cast_const().cast(), b.as_ptr().cast()], [start.cast()]);
        // SAFETY: both vectors have 3,000 elements; the output is exactly the first input.
        unsafe {
            fold(&Fold { inputs: &inputs, outputs: &outputs, count: 3000, ..Fold::new(DType::F32, Reduction::Sum) })
        };
        assert!(a.iter().enumerate().all(|(index, &x)| x == 2.0 * index as f32));
    }
}
