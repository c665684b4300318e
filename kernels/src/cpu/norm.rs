//! RMSNorm, forward and backward. With r = inverse_rms, y = x·r·w:
//! ∂L/∂w = Σₙ g·x·r and ∂L/∂x = r·(g·w) − x·r³·⟨g·w, x⟩/C.

use super::maths::sum_of;
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
            // ⟨g·w, x⟩: the weight meets x first, since a sum takes two factors.
            let projection = weighted_product(grad_out, weight, x) * inverse * inverse * inverse / width as f32;
            let inputs = grad_out.iter().zip(weight).zip(x);
            for ((grad_x, grad_weight), ((&grad, &weight), &x)) in grad_x.iter_mut().zip(&mut *grad_weight).zip(inputs)
            {
                *grad_x += grad * weight.widen() * inverse - x * projection;
                *grad_weight += grad * x * inverse;
            }
        }
    }
}

/// Σ gᵢ·wᵢ·xᵢ, in sixteen lanes.
#[inline(always)]
fn weighted_product<W: Value>(grad: &[f32], weight: &[W], x: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let ((grads, grad_tail), (weights, weight_tail), (xs, x_tail)) =
        (grad.as_chunks::<LANES>(), weight.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    for ((grad, weight), x) in grads.iter().zip(weights).zip(xs) {
        for lane in 0..LANES {
            lanes[lane] += grad[lane] * weight[lane].widen() * x[lane];
        }
    }
    let tail = grad_tail.iter().zip(weight_tail).zip(x_tail).map(|((&grad, &weight), &x)| grad * weight.widen() * x);
    lanes.iter().sum::<f32>() + tail.sum::<f32>()
}
