//! Softmax cross-entropy and the sums of squares behind norms and statistics.

use super::maths::{exp, max_of, sum_of};
use super::value::Value;

/// Each row's loss; `logits: [N, V]` become their gradient.
#[inline(always)]
pub(super) fn cross_entropy(losses: &mut [f64], logits: &mut [f32], targets: &[u32]) {
    let vocab = logits.len() / targets.len().max(1);
    for ((loss, row), &target) in losses.iter_mut().zip(logits.chunks_exact_mut(vocab.max(1))).zip(targets) {
        let target = target as usize;
        assert!(target < vocab, "target {target} in a vocabulary of {vocab}");
        let largest = max_of(row);
        let shifted = row[target] - largest;
        for x in row.iter_mut() {
            *x = exp(*x - largest);
        }
        let total = sum_of(row, row, |x, _| x);
        let inverse = 1.0 / total;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        row[target] -= 1.0;
        *loss = f64::from(total.ln() - shifted);
    }
}

/// The same with the gradient rounded into `grad`; `logits` are left as they may be.
#[inline(always)]
pub(super) fn cross_entropy_rounded<T: Value>(losses: &mut [f64], grad: &mut [T], logits: &mut [f32], targets: &[u32]) {
    let vocab = logits.len() / targets.len().max(1);
    let rows = grad.chunks_exact_mut(vocab.max(1)).zip(logits.chunks_exact_mut(vocab.max(1)));
    for ((loss, (grad, logits)), target) in losses.chunks_exact_mut(1).zip(rows).zip(targets.chunks_exact(1)) {
        cross_entropy(loss, logits, target);
        T::round(grad, logits);
    }
}

/// Elements whose squares are summed before they meet the others': the sum does not depend on who computes which.
pub(super) const PART: usize = 1 << 16;

/// (Σ xᵢ² over the finite xᵢ, number of the others) of each [`PART`] elements. Squares of f32 are exact in f64, and eight lanes of f64 keep
/// the sum's error below n/8·2⁻⁵³ of it: the gradient statistic subtracts nearly equal sums, where f32 would not do.
#[inline(always)]
pub(super) fn square_norms<T: Value>(sums: &mut [(f64, u64)], x: &[T]) {
    for (sum, x) in sums.iter_mut().zip(x.chunks(PART)) {
        *sum = square_norm(x);
    }
}

#[inline(always)]
fn square_norm<T: Value>(x: &[T]) -> (f64, u64) {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    // 32 bits wide for the vectors' sake; a part is shorter.
    let mut bad = [0u32; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            let value = block[lane].widen();
            let finite = value.is_finite();
            let value = if finite { f64::from(value) } else { 0.0 };
            lanes[lane] += value * value;
            bad[lane] += u32::from(!finite);
        }
    }
    let (mut sum, mut count) = (lanes.iter().sum::<f64>(), bad.iter().map(|&n| u64::from(n)).sum());
    for x in tail.iter().map(|x| x.widen()) {
        if x.is_finite() {
            sum += f64::from(x) * f64::from(x);
        } else {
            count += 1;
        }
    }
    (sum, count)
}
