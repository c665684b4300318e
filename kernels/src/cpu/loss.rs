//! Softmax cross-entropy.

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
