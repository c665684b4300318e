//! How the terms of a sum relate to it: what tests of gradients need that look at directions, or at single coordinates.

use half::bf16;

use super::observe::{Observer, Terms};
use super::value::Value;
use super::vectorized;
use crate::{DType, Element};

/// Compares the terms of a sum with it. Of K terms, an element passes where K · Σ_k x_k² ≤ `limit`
/// · (Σ_k x_k)², and that is not zero. Numbers: how many elements pass, Σ sum² over those, and for
/// each term k over all elements Σ x_k · sum. Products and sums are f64.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// As above.
    pub limit: f64,
}

/// Elements at a time: squares and sum stay in the first-level cache between terms.
const BLOCK: usize = 512;

impl Observer for Comparison {
    fn numbers(&self, terms: usize) -> usize {
        2 + terms
    }

    /// f32 and bf16.
    fn supports(&self, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::Bf16)
    }

    fn observe(&self, terms: &Terms<'_>, sum: &[f32], totals: &mut [f64]) {
        assert!(sum.len() == terms.count() && totals.len() == self.numbers(terms.operands()));
        match terms.dtype() {
            DType::F32 => self.run::<f32>(terms, sum, totals),
            DType::Bf16 => self.run::<bf16>(terms, sum, totals),
            other => panic!("no comparison of {other}"),
        }
    }
}

impl Comparison {
    fn run<T: Value + Element>(&self, terms: &Terms<'_>, sum: &[f32], totals: &mut [f64]) {
        let (totals, products) = totals.split_at_mut(2);
        for (block, sum) in sum.chunks(BLOCK).enumerate() {
            let mut squares = [0.0f64; BLOCK];
            let squares = &mut squares[..sum.len()];
            for (operand, product) in products.iter_mut().enumerate() {
                let term = &terms.of::<T>(operand)[block * BLOCK..][..sum.len()];
                vectorized(
                    #[inline(always)]
                    || *product += dot(term, sum, squares),
                );
            }
            let scale = terms.operands() as f64;
            for (square, sum) in squares.iter().zip(sum) {
                let sum = f64::from(*sum);
                // Padding has neither noise nor gradient, and is no element that passes.
                if sum != 0.0 && scale * *square <= self.limit * sum * sum {
                    totals[0] += 1.0;
                    totals[1] += sum * sum;
                }
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
                    // SAFETY: all have `count` elements, and nobody writes them.
                    let terms = unsafe { Terms::new(dtype, &terms, count) };
                    Comparison { limit }.observe(&terms, &sum, &mut out);
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
        // SAFETY: it has two elements.
        let terms = unsafe { Terms::new(DType::F32, &terms, 2) };
        Comparison { limit: 1.0 }.observe(&terms, &sum, &mut out);
        assert_eq!(out[..2], [1.0, 1.0]);
        assert!(out[2].is_nan());
    }
}
