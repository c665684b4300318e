//! Rows of a table by token, and the gradient of that.

/// `out: [N, C]`; `row` writes one row of the table as f32.
pub(super) fn forward(out: &mut [f32], tokens: &[u32], vocab: usize, row: impl Fn(&mut [f32], usize)) {
    let width = out.len() / tokens.len().max(1);
    for (out, &token) in out.chunks_exact_mut(width.max(1)).zip(tokens) {
        assert!((token as usize) < vocab, "token {token} in a vocabulary of {vocab}");
        row(out, token as usize);
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
