//! Sums of squares, behind norms and statistics.

use super::value::Value;

/// Elements of a part. Threads share parts, so the sum does not depend on which thread computes
/// which elements.
pub(crate) const PART: usize = 1 << 16;

/// A part is 32 chunks. Element i of a chunk belongs to lane i mod 32.
const CHUNK: usize = 2048;
const LANES: usize = 32;

/// Lanes of the total: part p belongs to lane p mod 256.
const TOTAL_LANES: usize = 256;

/// (Σ xᵢ² over the finite xᵢ, number of the others) of each [`PART`] elements.
///
/// The order of the sum is fixed, so every processor and every GPU gives the same bits: a lane adds
/// its elements in order; lanes are summed pairwise, neighbours first, and so are chunks. Squares
/// of f32 are exact in f64. The f64 sum's error stays below n·2⁻⁵³ of it: the gradient statistic
/// subtracts nearly equal sums, for which f32 is too coarse.
#[inline(always)]
pub(super) fn square_norms<T: Value>(sums: &mut [(f64, u64)], x: &[T]) {
    for (sum, x) in sums.iter_mut().zip(x.chunks(PART)) {
        *sum = square_norm(x);
    }
}

/// The total of all parts: lane by lane in order, then pairwise.
pub(super) fn total_square_norm(parts: &[(f64, u64)]) -> (f64, u64) {
    let mut lanes = [0.0; TOTAL_LANES];
    for parts in parts.chunks(TOTAL_LANES) {
        lanes.iter_mut().zip(parts).for_each(|(lane, part)| *lane += part.0);
    }
    let used = parts.len().clamp(1, TOTAL_LANES).next_power_of_two();
    (pairwise(&mut lanes[..used]), parts.iter().map(|part| part.1).sum())
}

#[inline(always)]
fn square_norm<T: Value>(x: &[T]) -> (f64, u64) {
    let (mut sums, mut non_finite) = ([0.0; PART / CHUNK], 0);
    let chunks = x.len().div_ceil(CHUNK);
    for (sum, chunk) in sums.iter_mut().zip(x.chunks(CHUNK)) {
        *sum = sum_squares(chunk, |x| x);
        // Squares of finite numbers are below 2²⁵⁶, so their sum is finite.
        if !sum.is_finite() {
            *sum = sum_squares(chunk, |x| if x.is_finite() { x } else { 0.0 });
            non_finite += chunk.iter().filter(|x| !x.widen().is_finite()).count() as u64;
        }
    }
    // Chunks that are not there would add zeros.
    (pairwise(&mut sums[..chunks.next_power_of_two()]), non_finite)
}

/// The sum of the squares of a chunk's elements, each of which `of` takes the place of.
#[inline(always)]
fn sum_squares<T: Value>(chunk: &[T], of: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (rows, tail) = chunk.as_chunks::<LANES>();
    // Sixteen lanes stay in registers while the rows pass; the second sixteen read the cache again.
    for (half, lanes) in lanes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let mut sums = [0.0f64; 16];
        for row in rows {
            let row = &row.as_chunks::<16>().0[half];
            for lane in 0..16 {
                let x = f64::from(of(row[lane].widen()));
                sums[lane] += x * x;
            }
        }
        *lanes = sums;
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        let x = f64::from(of(x.widen()));
        *lane += x * x;
    }
    pairwise(&mut lanes)
}

/// The sum of a power of two of lanes: neighbours first, then pairs, and so on.
#[inline(always)]
fn pairwise(lanes: &mut [f64]) -> f64 {
    let mut len = lanes.len();
    while len > 1 {
        len /= 2;
        for i in 0..len {
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    /// The documented order, element by element.
    fn in_order(x: &[f32]) -> f64 {
        fn halves(sums: &[f64]) -> f64 {
            match sums {
                [one] => *one,
                _ => halves(&sums[..sums.len() / 2]) + halves(&sums[sums.len() / 2..]),
            }
        }
        let mut totals = vec![0.0; TOTAL_LANES];
        for (number, part) in x.chunks(PART).enumerate() {
            let mut lanes = vec![0.0; PART / CHUNK * LANES];
            for (i, &x) in part.iter().enumerate().filter(|(_, x)| x.is_finite()) {
                lanes[i / CHUNK * LANES + i % LANES] += f64::from(x) * f64::from(x);
            }
            totals[number % TOTAL_LANES] += halves(&lanes);
        }
        halves(&totals)
    }

    #[test]
    fn squares_are_summed_in_the_order_that_is_documented() {
        // Some lanes of the total have two parts.
        for len in [0, 1, 31, 33, 2047, 2049, PART - 1, 3 * PART + 77, (TOTAL_LANES + 2) * PART + 5] {
            let mut x: Vec<f32> = (0..len as u64).map(|index| random::normal(1, 2, index) as f32).collect();
            x.iter_mut().step_by(4099).skip(1).for_each(|x| *x = f32::INFINITY);
            let mut parts = vec![(0.0, 0); len.div_ceil(PART)];
            square_norms(&mut parts, &x);
            assert_eq!(total_square_norm(&parts).0.to_bits(), in_order(&x).to_bits(), "{len} elements");
        }
    }
}
