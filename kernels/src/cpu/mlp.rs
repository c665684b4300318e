//! SwiGLU, forward and backward. With s = 1/(1+e⁻ᵍ): silu(g) = g·s and silu′(g) = s·(1 + g·(1 − s)).

use super::maths::sigmoid;
use super::value::Value;

#[inline(always)]
pub(super) fn forward<T: Value>(out: &mut [T], gate: &[T], up: &[T]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        let (gate, up) = (gate.widen(), up.widen());
        *out = T::narrow(gate * sigmoid(gate) * up);
    }
}

/// `out` is that of the forward pass, made again.
#[inline(always)]
pub(super) fn backward<T: Value>([out, grad_gate, grad_up]: [&mut [T]; 3], grad_out: &[T], gate: &[T], up: &[T]) {
    let outputs = out.iter_mut().zip(grad_gate).zip(grad_up);
    for (((out, grad_gate), grad_up), ((&grad, &gate), &up)) in outputs.zip(grad_out.iter().zip(gate).zip(up)) {
        let (grad, gate, up) = (grad.widen(), gate.widen(), up.widen());
        let s = sigmoid(gate);
        *out = T::narrow(gate * s * up);
        *grad_gate = T::narrow(grad * up * s * (1.0 + gate * (1.0 - s)));
        *grad_up = T::narrow(grad * gate * s);
    }
}
