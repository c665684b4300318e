//! RMSNorm, forward and backward. With r = inverse_rms, y = x·r·w:
//! ∂L/∂w = Σₙ g·x·r and ∂L/∂x = r·(g·w) − x·r³·⟨g·w, x⟩/C.

use super::maths::sum_of;

#[inline(always)]
pub(super) fn forward(out: &mut [f32], inverse_rms: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
    let width = weight.len();
    for ((out, x), inverse) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(inverse_rms) {
        let mean_square = sum_of(x, x, |a, b| a * b) / width as f32;
        *inverse = 1.0 / (mean_square + epsilon).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * *inverse * weight;
        }
    }
}

#[inline(always)]
pub(super) fn backward(
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
    grad_out: &[f32],
    x: &[f32],
    inverse_rms: &[f32],
    weight: &[f32],
    scratch: &mut Vec<f32>,
) {
    let width = weight.len();
    scratch.resize(width, 0.0);
    let rows =
        grad_x.chunks_exact_mut(width).zip(grad_out.chunks_exact(width)).zip(x.chunks_exact(width)).zip(inverse_rms);
    for (((grad_x, grad_out), x), &inverse) in rows {
        for ((weighted, &grad), &weight) in scratch.iter_mut().zip(grad_out).zip(weight) {
            *weighted = grad * weight;
        }
        let projection = sum_of(scratch, x, |a, b| a * b) * inverse * inverse * inverse / width as f32;
        for (((grad_x, &weighted), &x), (grad_weight, &grad)) in
            grad_x.iter_mut().zip(scratch.iter()).zip(x).zip(grad_weight.iter_mut().zip(grad_out))
        {
            *grad_x += weighted * inverse - x * projection;
            *grad_weight += grad * x * inverse;
        }
    }
}
