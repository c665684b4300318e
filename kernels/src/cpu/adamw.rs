//! AdamW in one pass: 16 bytes a parameter read, 12 written, plus the copy for the next gather.
//!
//! The operations and their order are fixed, so another device can reproduce every bit: no reciprocal, no fused multiply-add.

use half::bf16;

use super::maths::narrow_one;
use crate::AdamW;

/// A type that weights can be gathered in.
pub(super) trait Weight: Copy {
    fn round(x: f32) -> Self;
}

impl Weight for f32 {
    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn round(x: f32) -> bf16 {
        narrow_one(x)
    }
}

#[inline(always)]
pub(super) fn update<W: Weight>(
    weights: &mut [W],
    master: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grad: &[f32],
    settings: AdamW,
) {
    let AdamW { lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale } = settings;
    let keep = 1.0 - lr * weight_decay;
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
    let rate = (f64::from(lr) / correction(beta1)) as f32;
    let root = correction(beta2).sqrt() as f32;
    let (one_minus_beta1, one_minus_beta2) = (1.0 - beta1, 1.0 - beta2);
    let elements = weights.iter_mut().zip(master).zip(m).zip(v).zip(grad);
    for ((((weight, master), m), v), &grad) in elements {
        let g = grad * gradient_scale;
        *m = beta1 * *m + one_minus_beta1 * g;
        *v = beta2 * *v + one_minus_beta2 * g * g;
        *master = *master * keep - rate * (*m / (v.sqrt() / root + epsilon));
        *weight = W::round(*master);
    }
}
