//! RMSNorm, forward and backward. With r = inverse_rms, y = x·r·w:
//! ∂L/∂w = Σₙ g·x·r and ∂L/∂x = r·(g·w) − x·r³·⟨g·w, x⟩/C.

use super::maths::{sum_of, sum_of_three};
use super::value::Value;

#[inline(always)]
pub(super) fn forward<T: Value, W: Value>(
    out: &mut [T],
    inverse_rms: &mut [f32],
    x: &[f32],
    weight: &[W],
    epsilon: f32,
) {
    let width = weight.len();
    for ((out, x), inverse) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(inverse_rms) {
        let mean_square = sum_of(x, x, |a, b| a * b) / width as f32;
        *inverse = 1.0 / (mean_square + epsilon).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = T::narrow(x * *inverse * weight.widen());
        }
    }
}

/// Rows whose share of ∂L/∂w is summed before it meets the others': the sum does not depend on who computes which rows.
pub(super) const ROWS: usize = 64;

/// `grad_weight`: a row of the weight's length for each [`ROWS`] rows of the others, overwritten.
#[inline(always)]
pub(super) fn backward<W: Value>(
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
    grad_out: &[f32],
    x: &[f32],
    inverse_rms: &[f32],
    weight: &[W],
) {
    let width = weight.len();
    let parts = grad_x
        .chunks_mut(ROWS * width)
        .zip(grad_out.chunks(ROWS * width))
        .zip(x.chunks(ROWS * width))
        .zip(inverse_rms.chunks(ROWS))
        .zip(grad_weight.chunks_exact_mut(width));
    for ((((grad_x, grad_out), x), inverse_rms), grad_weight) in parts {
        grad_weight.fill(0.0);
        let rows = grad_x.chunks_exact_mut(width).zip(grad_out.chunks_exact(width)).zip(x.chunks_exact(width));
        for (((grad_x, grad_out), x), &inverse) in rows.zip(inverse_rms) {
            let product = sum_of_three(grad_out, weight, x, |grad, weight, x| grad * weight.widen() * x);
            let projection = product * inverse * inverse * inverse / width as f32;
            let inputs = grad_out.iter().zip(weight).zip(x);
            for ((grad_x, grad_weight), ((&grad, &weight), &x)) in grad_x.iter_mut().zip(&mut *grad_weight).zip(inputs)
            {
                *grad_x += grad * weight.widen() * inverse - x * projection;
                *grad_weight += grad * x * inverse;
            }
        }
    }
}
