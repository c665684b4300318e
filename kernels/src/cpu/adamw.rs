//! AdamW in one pass: 16 bytes a parameter read, 12 written; and the copy for the next gather, where that is narrower.
//!
//! The operations and their order are fixed, so another device can reproduce every bit: no reciprocal, no fused multiply-add.

use super::value::Value;
use crate::AdamW;

/// Constants of one update.
#[derive(Clone, Copy)]
pub(crate) struct Update {
    settings: AdamW,
    scale: f32,
    /// What decay leaves of a weight.
    pub(crate) keep: f32,
    /// lr/(1−β₁ᵗ).
    pub(crate) rate: f32,
    /// √(1−β₂ᵗ).
    pub(crate) root: f32,
}

impl Update {
    /// Number `step`, from 1.
    pub(crate) fn new(settings: AdamW, step: u64) -> Update {
        let AdamW { lr, beta1, beta2, weight_decay, .. } = settings;
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
        let rate = (f64::from(lr) / correction(beta1)) as f32;
        Update { settings, scale: 1.0, keep: 1.0 - lr * weight_decay, rate, root: correction(beta2).sqrt() as f32 }
    }

    pub(super) fn of_gradients_times(self, scale: f32) -> Update {
        Update { scale, ..self }
    }

    /// Updates one element; returns the new master weight.
    #[inline(always)]
    fn element(&self, master: &mut f32, m: &mut f32, v: &mut f32, grad: f32) -> f32 {
        let AdamW { beta1, beta2, epsilon, .. } = self.settings;
        let g = grad * self.scale;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *master = *master * self.keep - self.rate * (*m / (v.sqrt() / self.root + epsilon));
        *master
    }
}

#[inline(always)]
pub(super) fn update<G: Value>(master: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[G], update: Update) {
    for (((master, m), v), &grad) in master.iter_mut().zip(m).zip(v).zip(grad) {
        update.element(master, m, v, grad.widen());
    }
}

/// The same, with a rounded copy of the result.
#[inline(always)]
pub(super) fn update_copied<W: Value, G: Value>(
    weights: &mut [W],
    master: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grad: &[G],
    update: Update,
) {
    for ((((weight, master), m), v), &grad) in weights.iter_mut().zip(master).zip(m).zip(v).zip(grad) {
        *weight = W::narrow(update.element(master, m, v, grad.widen()));
    }
}
