//! Softmax cross-entropy and the sums of squares behind norms and statistics.

use super::maths::{exp, sum_of};

/// Adds the loss and the count to `sums`; `logits: [N, V]` become their gradient.
#[inline(always)]
pub(super) fn cross_entropy(logits: &mut [f32], targets: &[u32], sums: &mut [f64]) {
    let vocab = logits.len() / targets.len().max(1);
    for (row, &target) in logits.chunks_exact_mut(vocab.max(1)).zip(targets) {
        let target = target as usize;
        assert!(target < vocab, "target {target} in a vocabulary of {vocab}");
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
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
        sums[0] += f64::from(total.ln() - shifted);
        sums[1] += 1.0;
    }
}

/// (Σ xᵢ² over the finite xᵢ, number of the others). Squares of f32 are exact in f64, and eight lanes of f64 keep the sum's error
/// below n/8·2⁻⁵³ of it: the gradient statistic subtracts nearly equal sums, where f32 would not do.
#[inline(always)]
pub(super) fn square_norm(x: &[f32]) -> (f64, u64) {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let mut bad = [0u32; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut count = 0u64;
    // The counters are 32 bits wide for the vectors' sake, so they are emptied in time.
    for blocks in blocks.chunks(1 << 20) {
        for block in blocks {
            for lane in 0..LANES {
                let finite = block[lane].is_finite();
                let value = if finite { f64::from(block[lane]) } else { 0.0 };
                lanes[lane] += value * value;
                bad[lane] += u32::from(!finite);
            }
        }
        count += std::mem::take(&mut bad).iter().map(|&n| u64::from(n)).sum::<u64>();
    }
    let mut sum = lanes.iter().sum::<f64>();
    for &x in tail {
        if x.is_finite() {
            sum += f64::from(x) * f64::from(x);
        } else {
            count += 1;
        }
    }
    (sum, count)
}
