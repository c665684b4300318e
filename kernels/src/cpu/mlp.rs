//! SwiGLU, forward and backward. With s = 1/(1+e⁻ᵍ): silu(g) = g·s and silu′(g) = s·(1 + g·(1 − s)).

use super::maths::sigmoid;

#[inline(always)]
pub(super) fn forward(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(gate) * up;
    }
}

#[inline(always)]
pub(super) fn backward(grad_gate: &mut [f32], grad_up: &mut [f32], grad_out: &[f32], gate: &[f32], up: &[f32]) {
    for ((((grad_gate, grad_up), &grad), &gate), &up) in
        grad_gate.iter_mut().zip(grad_up).zip(grad_out).zip(gate).zip(up)
    {
        let s = sigmoid(gate);
        *grad_gate = grad * up * s * (1.0 + gate * (1.0 - s));
        *grad_up = grad * gate * s;
    }
}
