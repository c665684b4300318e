//! Rows of a table by token, and the gradient of that. Both move little: one thread does.

use super::value::Value;

/// `out: [N, C]`, `table: [V, C]`.
#[inline(always)]
pub(super) fn forward<W: Value>(out: &mut [f32], table: &[W], tokens: &[u32]) {
    let width = out.len() / tokens.len().max(1);
    let vocab = table.len() / width.max(1);
    for (out, &token) in out.chunks_exact_mut(width.max(1)).zip(tokens) {
        assert!((token as usize) < vocab, "token {token} in a vocabulary of {vocab}");
        for (out, &value) in out.iter_mut().zip(&table[token as usize * width..][..width]) {
            *out = value.widen();
        }
    }
}

#[inline(always)]
pub(super) fn backward(grad_table: &mut [f32], grad_out: &[f32], tokens: &[u32]) {
    let width = grad_out.len() / tokens.len().max(1);
    for (grad, &token) in grad_out.chunks_exact(width.max(1)).zip(tokens) {
        let row = &mut grad_table[token as usize * width..][..width];
        for (row, &grad) in row.iter_mut().zip(grad) {
            *row += grad;
        }
    }
}
