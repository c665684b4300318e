//! Copies, and stores that pass by the caches.
//!
//! A normal store first reads its cache line. A non-temporal one does not, so a large result moves
//! a third less through the memory bus; a small one would be thrown out of the cache in which its
//! reader looks. Where the one overtakes the other is measured, since the cache sizes that virtual
//! machines report mislead.

use std::sync::OnceLock;
use std::time::Instant;

use super::reduce::{Fold, Operator, fold};
use crate::DType;

/// to\[..\] = from\[..\], `bytes` of them, with non-temporal stores where `stream` says so; those
/// are complete for other cores once this returns and a release store follows.
///
/// # Safety
/// `from` is readable and `to` is writable for `bytes`; they do not overlap, and nobody else writes
/// the one or touches the other meanwhile.
pub unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize, stream: bool) {
    if stream {
        // SAFETY: the caller's promise.
        unsafe { store(from, to, bytes) };
        fence();
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) }
    }
}

/// Copies with non-temporal stores, without the fence that must follow before others are told.
///
/// # Safety
/// As for [`copy`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn store(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    const LINE: usize = 64;
    let head = to.align_offset(LINE).min(bytes);
    let lines = (bytes - head) / LINE;
    // SAFETY: head + 64 · lines ≤ bytes, so every access lies in the caller's ranges; the streamed
    // addresses are multiples of 16, being multiples of 64 plus 0, 16, 32 or 48. SSE2 is part of
    // x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        for line in 0..lines {
            let (from, to) = (from.add(head + line * LINE), to.add(head + line * LINE));
            let quarters = [0, 16, 32, 48].map(|at| _mm_loadu_si128(from.add(at).cast::<__m128i>()));
            for (index, quarter) in quarters.into_iter().enumerate() {
                _mm_stream_si128(to.add(16 * index).cast(), quarter);
            }
        }
        let done = head + lines * LINE;
        std::ptr::copy_nonoverlapping(from.add(done), to.add(done), bytes - done);
    }
}

/// Where there are no non-temporal stores, a copy.
///
/// # Safety
/// As for [`copy`].
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(super) unsafe fn store(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) }
}

/// Orders non-temporal stores before the release store that tells others of them, which alone would
/// not: they are weakly ordered.
#[inline(always)]
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and the instruction touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    };
}

/// Below this many bytes, all operands together, nobody's caches are too small.
const ALWAYS_CACHED: usize = 1 << 20;
/// Above this many, all are.
const NEVER_CACHED: usize = 48 << 20;

/// Whether a pass over `bytes`, everything that all cores read and write in it, should use
/// non-temporal stores.
///
/// The first question about a size that could go either way measures the crossover, which takes
/// some tens of milliseconds.
pub fn pays(bytes: usize) -> bool {
    static CROSSOVER: OnceLock<usize> = OnceLock::new();
    match bytes {
        0..=ALWAYS_CACHED => false,
        NEVER_CACHED.. => cfg!(target_arch = "x86_64"),
        _ => cfg!(target_arch = "x86_64") && bytes >= *CROSSOVER.get_or_init(crossover),
    }
}

/// Bytes of a sum's operands from which on streaming its result is faster than caching it.
fn crossover() -> usize {
    let longest = NEVER_CACHED / 3 / 4;
    let [a, b, mut out] = [1.0f32, 2.0, 0.0].map(|x| vec![x; longest]);
    let mut size = NEVER_CACHED;
    while size > ALWAYS_CACHED {
        let count = size / 3 / 4;
        let inputs = [a.as_ptr().cast(), b.as_ptr().cast()];
        let mut time = |stream| {
            let outputs = [out.as_mut_ptr().cast()];
            let job =
                Fold { inputs: &inputs, outputs: &outputs, count, stream, ..Fold::new(DType::F32, Operator::Sum) };
            let runs = (0..3).map(|_| {
                let started = Instant::now();
                // SAFETY: the vectors hold at least `count` elements and are this function's own.
                unsafe { fold(&job) };
                started.elapsed()
            });
            runs.min().expect("three runs")
        };
        if time(true) >= time(false) {
            break;
        }
        size /= 2;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_copy_copies_what_it_was_told_and_nothing_else(len in 0usize..400, from in 0usize..70, to in 0usize..70, stream: bool) {
            let source: Vec<u8> = (0..500).map(|index| (index * 7 % 251) as u8).collect();
            let mut target = vec![255u8; 500];
            // SAFETY: 70 + 400 ≤ 500.
            unsafe { copy(source.as_ptr().add(from), target.as_mut_ptr().add(to), len, stream) };
            for (index, &byte) in target.iter().enumerate() {
                let expected = if (to..to + len).contains(&index) { source[index - to + from] } else { 255 };
                prop_assert_eq!(byte, expected);
            }
        }
    }

    #[test]
    fn small_passes_are_cached_and_the_crossover_lies_where_it_was_looked_for() {
        assert!(!pays(ALWAYS_CACHED));
        let crossover = crossover();
        assert!((ALWAYS_CACHED / 2..=NEVER_CACHED).contains(&crossover), "{crossover}");
    }
}
