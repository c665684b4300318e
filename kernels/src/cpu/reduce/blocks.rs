//! The loops, over any types and any way to combine two elements.

use std::mem::MaybeUninit;

use super::types::{Stored, Wide};
use super::{Fold, non_temporal};
use crate::cpu::vectorized;

/// Elements combined at a time: they stay in the first-level cache between inputs.
pub(super) const BLOCK: usize = 1024;

/// As many, for reductions so short that a longer block on the stack would take much of the time.
pub(super) const SHORT: usize = 32;

/// A block that nobody has written yet: clearing it would take most of the time of a short
/// reduction.
type Block<A, const N: usize> = [MaybeUninit<A>; N];

/// Runs a reduction whose elements `load` widens. `load` and `combine` are inlined.
///
/// # Safety
/// As for [`super::fold`], with elements of these types.
pub(super) unsafe fn run<I: Copy, O: Stored<A>, A: Wide>(
    job: &Fold<'_>,
    load: impl Fn(I) -> A + Copy,
    combine: impl Fn(A, A) -> A + Copy,
) {
    // SAFETY: the caller's promise.
    unsafe { in_blocks::<I, O, A, BLOCK>(job, load, combine) }
}

/// As [`run`], in blocks of `N` elements.
///
/// # Safety
/// As for [`run`].
pub(super) unsafe fn in_blocks<I: Copy, O: Stored<A>, A: Wide, const N: usize>(
    job: &Fold<'_>,
    load: impl Fn(I) -> A + Copy,
    combine: impl Fn(A, A) -> A + Copy,
) {
    let in_group = job.inputs.len() / job.groups;
    vectorized(
        #[inline(always)]
        || {
            let mut total: Block<A, N> = [const { MaybeUninit::uninit() }; N];
            let mut partial: Block<A, N> = [const { MaybeUninit::uninit() }; N];
            for first in (0..job.count).step_by(N) {
                let len = N.min(job.count - first);
                let mut groups = job.inputs.chunks_exact(in_group);
                let group = groups.next().expect("there is an input");
                // SAFETY: elements first..first + len of inputs, by the caller's promise.
                let total = unsafe { combine_inputs(&mut total[..len], group, first, load, combine) };
                for group in groups {
                    // SAFETY: as above.
                    let partial = unsafe { combine_inputs(&mut partial[..len], group, first, load, combine) };
                    for (total, &partial) in total.iter_mut().zip(partial.iter()) {
                        *total = combine(*total, partial);
                    }
                }
                if let Some(divisor) = job.divisor {
                    total.iter_mut().for_each(|total| *total = total.divide(divisor));
                }
                for &output in job.outputs {
                    // SAFETY: elements first..first + len of an output, by the caller's promise. No
                    // reference to an input that this might be is alive.
                    unsafe { emit::<O, A, N>(total, output.cast::<O>().add(first), job, combine) };
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
unsafe fn combine_inputs<'a, I: Copy, A: Wide>(
    out: &'a mut [MaybeUninit<A>],
    inputs: &[*const u8],
    first: usize,
    load: impl Fn(I) -> A + Copy,
    combine: impl Fn(A, A) -> A + Copy,
) -> &'a mut [A] {
    let len = out.len();
    // SAFETY: the caller's promise; `out` is memory of `run`, so it overlaps no input.
    let slice = |input: *const u8| unsafe { std::slice::from_raw_parts(input.cast::<I>().add(first), len) };
    // Two at a time, so that `out` is read and written half as often.
    let mut rest = match inputs {
        [a, b, rest @ ..] => {
            for ((out, &a), &b) in out.iter_mut().zip(slice(*a)).zip(slice(*b)) {
                out.write(combine(load(a), load(b)));
            }
            rest
        }
        [a, rest @ ..] => {
            for (out, &a) in out.iter_mut().zip(slice(*a)) {
                out.write(load(a));
            }
            rest
        }
        [] => unreachable!("a group has at least one input"),
    };
    // SAFETY: every element has just been written, and `MaybeUninit<A>` is laid out as `A`.
    let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<A>(), len) };
    loop {
        match rest {
            [a, b, others @ ..] => {
                for ((out, &a), &b) in out.iter_mut().zip(slice(*a)).zip(slice(*b)) {
                    *out = combine(combine(*out, load(a)), load(b));
                }
                rest = others;
            }
            [a] => {
                for (out, &a) in out.iter_mut().zip(slice(*a)) {
                    *out = combine(*out, load(a));
                }
                return out;
            }
            [] => return out,
        }
    }
}

/// Stores a block of results, rounded.
///
/// # Safety
/// `out` is writable, and readable where the job accumulates, for `total.len()` elements that
/// nobody else touches meanwhile.
#[inline(always)]
unsafe fn emit<O: Stored<A>, A: Wide, const N: usize>(
    total: &[A],
    out: *mut O,
    job: &Fold<'_>,
    combine: impl Fn(A, A) -> A + Copy,
) {
    if job.stream {
        let mut block = [O::default(); N];
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
