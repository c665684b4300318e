//! Softmax cross-entropy.

use super::maths::{exp, max_of, sum_of};
use super::value::Value;
use crate::IGNORED;

/// Each row's loss; `logits: [N, V]` become their gradient: softmax(logits)·(1 + 2·z·log Z) −
/// onehot(targets).
#[inline(always)]
pub(super) fn cross_entropy(losses: &mut [f64], logits: &mut [f32], targets: &[u32], z_loss: f32) {
    let vocab = logits.len() / targets.len().max(1);
    for ((loss, row), &target) in losses.iter_mut().zip(logits.chunks_exact_mut(vocab.max(1))).zip(targets) {
        if target == IGNORED {
            row.fill(0.0);
            *loss = 0.0;
            continue;
        }
        let target = target as usize;
        assert!(target < vocab, "target {target} in a vocabulary of {vocab}");
        let largest = max_of(row);
        let shifted = row[target] - largest;
        for x in row.iter_mut() {
            *x = exp(*x - largest);
        }
        let total = sum_of(row, row, |x, _| x);
        let factor = (1.0 + 2.0 * z_loss * (largest + total.ln())) / total;
        for x in row.iter_mut() {
            *x *= factor;
        }
        row[target] -= 1.0;
        *loss = f64::from(total.ln() - shifted);
    }
}

/// The same with the gradient rounded into `grad`; `logits` are left as they may be.
#[inline(always)]
pub(super) fn cross_entropy_rounded<T: Value>(
    losses: &mut [f64],
    grad: &mut [T],
    logits: &mut [f32],
    targets: &[u32],
    z_loss: f32,
) {
    let vocab = logits.len() / targets.len().max(1);
    let rows = grad.chunks_exact_mut(vocab.max(1)).zip(logits.chunks_exact_mut(vocab.max(1)));
    for ((loss, (grad, logits)), target) in losses.chunks_exact_mut(1).zip(rows).zip(targets.chunks_exact(1)) {
        cross_entropy(loss, logits, target, z_loss);
        T::round(grad, logits);
    }
}
