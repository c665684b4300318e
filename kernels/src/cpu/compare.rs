//! How the terms of a sum relate to it: what tests of gradients need that look at directions, or at single coordinates.

use half::bf16;

use super::value::Value;
use super::vectorized;
use crate::DType;

/// Terms beside their sum.
#[derive(Clone, Debug)]
pub struct Compare<'a> {
    /// Type of the terms' elements: f32 or bf16.
    pub dtype: DType,
    /// Where each term starts; K of them.
    pub terms: &'a [*const u8],
    /// Where their sum starts.
    pub sum: *const f32,
    /// An element passes where K · Σ_k x_k² ≤ `limit` · sum², and that is not zero.
    pub limit: f64,
    /// Number of elements.
    pub count: usize,
}

/// Numbers that [`compare`] adds to, for `terms` terms.
pub const fn numbers(terms: usize) -> usize {
    2 + terms
}

/// Elements at a time: squares and sum stay in the first-level cache between terms.
const BLOCK: usize = 512;

/// out\[0\] += elements that pass, out\[1\] += Σ sum² over those, out\[2 + k\] += Σ x_k · sum. Products and sums are f64.
///
/// # Safety
/// Every term and the sum are readable for `count` elements of their types, aligned to them, and nobody writes them meanwhile.
///
/// # Panics
/// For other types, and unless `out` has [`numbers`] of the terms.
pub unsafe fn compare(job: &Compare<'_>, out: &mut [f64]) {
    assert_eq!(out.len(), numbers(job.terms.len()), "two numbers and one for each term");
    // SAFETY: the type is the one that the job names; the rest is the caller's promise.
    unsafe {
        match job.dtype {
            DType::F32 => run::<f32>(job, out),
            DType::Bf16 => run::<bf16>(job, out),
            other => panic!("no comparison of {other}"),
        }
    }
}

/// # Safety
/// As for [`compare`], whose type is `T`.
unsafe fn run<T: Value>(job: &Compare<'_>, out: &mut [f64]) {
    for start in (0..job.count).step_by(BLOCK) {
        let len = BLOCK.min(job.count - start);
        // SAFETY: inside the sum, by the caller's promise.
        let sum = unsafe { std::slice::from_raw_parts(job.sum.add(start), len) };
        let mut squares = [0.0f64; BLOCK];
        let (totals, products) = out.split_at_mut(2);
        for (term, product) in job.terms.iter().zip(products) {
            // SAFETY: inside the term, by the caller's promise.
            let term = unsafe { std::slice::from_raw_parts(term.cast::<T>().add(start), len) };
            vectorized(
                #[inline(always)]
                || *product += dot(term, sum, &mut squares[..len]),
            );
        }
        let scale = job.terms.len() as f64;
        for (square, sum) in squares.iter().zip(sum) {
            let sum = f64::from(*sum);
            // Padding has neither noise nor gradient, and is no element that passes.
            if sum != 0.0 && scale * square <= job.limit * sum * sum {
                totals[0] += 1.0;
                totals[1] += sum * sum;
            }
        }
    }
}

/// Σ term · sum; adds the term's squares to `squares`.
#[inline(always)]
fn dot<T: Value>(term: &[T], sum: &[f32], squares: &mut [f64]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let (blocks, tail) = term.as_chunks::<LANES>();
    let (sums, sum_tail) = sum.as_chunks::<LANES>();
    let (square_blocks, square_tail) = squares.as_chunks_mut::<LANES>();
    for ((term, sum), squares) in blocks.iter().zip(sums).zip(square_blocks) {
        for lane in 0..LANES {
            let x = f64::from(term[lane].widen());
            squares[lane] += x * x;
            lanes[lane] += x * f64::from(sum[lane]);
        }
    }
    let mut product: f64 = lanes.iter().sum();
    for ((term, sum), square) in tail.iter().zip(sum_tail).zip(square_tail) {
        let x = f64::from(term.widen());
        *square += x * x;
        product += x * f64::from(*sum);
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Terms (1, 2, …) and (3, −2, …), of which the sums are 4 and 0 in turn.
    #[test]
    fn whole_numbers_are_compared_exactly() {
        for count in [0, 1, 7, 8, 511, 512, 1025] {
            let terms: [Vec<f32>; 2] =
                [[1.0, 2.0], [3.0, -2.0]].map(|pair| (0..count).map(|index| pair[index % 2]).collect());
            let narrow = terms.each_ref().map(|term| term.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
            let sum: Vec<f32> = (0..count).map(|index| [4.0, 0.0][index % 2]).collect();
            let even = count.div_ceil(2) as f64;
            for (dtype, terms) in [
                (DType::F32, terms.each_ref().map(|term| term.as_ptr().cast::<u8>())),
                (DType::Bf16, narrow.each_ref().map(|term| term.as_ptr().cast::<u8>())),
            ] {
                // 2 · (1 + 9) ≤ limit · 16 from 1.25 on; where the sum is zero, nothing passes.
                for (limit, passing) in [(1.24, 0.0), (1.25, even)] {
                    let mut out = [100.0; 4];
                    let job = Compare { dtype, terms: &terms, sum: sum.as_ptr(), limit, count };
                    // SAFETY: all have `count` elements, and nobody writes them.
                    unsafe { compare(&job, &mut out) };
                    let expected = [passing, 16.0 * passing, 4.0 * even, 12.0 * even];
                    assert_eq!(out, expected.map(|x| 100.0 + x), "{count} of {dtype}");
                }
            }
        }
    }

    #[test]
    fn elements_that_are_not_numbers_pass_nowhere() {
        let (term, sum) = ([f32::NAN, 1.0], [f32::NAN, 1.0]);
        let mut out = [0.0; 3];
        let terms = [term.as_ptr().cast()];
        let job = Compare { dtype: DType::F32, terms: &terms, sum: sum.as_ptr(), limit: 1.0, count: 2 };
        // SAFETY: both have two elements.
        unsafe { compare(&job, &mut out) };
        assert_eq!(out[..2], [1.0, 1.0]);
        assert!(out[2].is_nan());
    }
}
