//! SwiGLU.

use pillion_kernels::DType;

use crate::bounded::{Bounded, dot, exact, to};
use crate::common::{TYPES, assert_certain, assert_gradient, assert_within, normals_as, rounded_as, run};

/// The last is one that three threads share.
const LENGTHS: [usize; 8] = [1, 3, 15, 33, 7 * 15, 257, 1000, 25_001];

fn sigmoid(x: Bounded) -> Bounded {
    Bounded::exact(1.0) / (Bounded::exact(1.0) + (-x).exp())
}

fn forward(gate: &[Bounded], up: &[Bounded]) -> Vec<Bounded> {
    gate.iter().zip(up).map(|(&gate, &up)| gate * sigmoid(gate) * up).collect()
}

/// (grad_gate, grad_up), by silu′(g) = s·(1 + g·(1 − s)) with s the sigmoid of g.
fn backward(grad_out: &[Bounded], gate: &[Bounded], up: &[Bounded]) -> (Vec<Bounded>, Vec<Bounded>) {
    let one = Bounded::exact(1.0);
    let grads = grad_out.iter().zip(gate).zip(up).map(|((&grad, &gate), &up)| {
        let s = sigmoid(gate);
        (grad * up * s * (one + gate * (one - s)), grad * gate * s)
    });
    grads.unzip()
}

fn forward_by_kernel(dtype: DType, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let [out] = run(|stage| {
        let (mut out, gate, up) =
            (stage.output_as(dtype, gate.len()), stage.buffer_as(dtype, gate), stage.buffer_as(dtype, up));
        stage.kernels().swiglu(out.view_mut(), gate.view(), up.view());
        [out]
    });
    out.wide()
}

/// [grad_gate, grad_up]
fn backward_by_kernel(dtype: DType, grad_out: &[f32], gate: &[f32], up: &[f32]) -> [Vec<f32>; 2] {
    let outputs = run(|stage| {
        let [mut out, mut grad_gate, mut grad_up] = [(); 3].map(|()| stage.output_as(dtype, gate.len()));
        let [grad_out, gate, up] = [grad_out, gate, up].map(|x| stage.buffer_as(dtype, x));
        stage.kernels().swiglu_backward(
            out.view_mut(),
            grad_gate.view_mut(),
            grad_up.view_mut(),
            grad_out.view(),
            gate.view(),
            up.view(),
        );
        [out, grad_gate, grad_up]
    });
    let [out, grad_gate, grad_up] = outputs.map(|x| x.wide());
    assert!(out == forward_by_kernel(dtype, gate, up), "the backward pass makes what the forward pass made");
    [grad_gate, grad_up]
}

/// Returns the roundings, for bf16.
fn check_forward(dtype: DType, gate: &[f32], up: &[f32]) -> Vec<Bounded> {
    let expected = to(dtype, &forward(&exact(gate), &exact(up)));
    assert_within("out", &forward_by_kernel(dtype, gate, up), &expected);
    expected
}

/// Returns (grad_gate, grad_up) before they are rounded.
fn check_backward(dtype: DType, grad_out: &[f32], gate: &[f32], up: &[f32]) -> (Vec<Bounded>, Vec<Bounded>) {
    let expected = backward(&exact(grad_out), &exact(gate), &exact(up));
    let [grad_gate, grad_up] = backward_by_kernel(dtype, grad_out, gate, up);
    assert_within("grad_gate", &grad_gate, &to(dtype, &expected.0));
    assert_within("grad_up", &grad_up, &to(dtype, &expected.1));
    expected
}

#[test]
fn forward_is_within_its_bound() {
    for len in LENGTHS {
        for dtype in TYPES {
            let expected = check_forward(dtype, &normals_as(dtype, len, 1), &normals_as(dtype, len, 2));
            if dtype == DType::Bf16 && len > 100 {
                assert_certain("out", &expected);
            }
        }
    }
}

#[test]
fn backward_is_within_its_bound() {
    for len in LENGTHS {
        for dtype in TYPES {
            let [gate, up, grad_out] = [1, 2, 3].map(|stream| normals_as(dtype, len, stream));
            let (grad_gate, grad_up) = check_backward(dtype, &grad_out, &gate, &up);
            let direction = exact(&grad_out);
            assert_gradient(&[&gate, &up], &[&grad_gate, &grad_up], |inputs| {
                dot(&forward(&inputs[0], &inputs[1]), &direction)
            });
            if dtype == DType::Bf16 && len > 100 {
                assert_certain("grad_gate", &to(dtype, &grad_gate));
                assert_certain("grad_up", &to(dtype, &grad_up));
            }
        }
    }
}

#[test]
fn saturated_gates_are_within_the_bound() {
    // As far as e^−gate is a normal f32.
    let gate: Vec<f32> = (-348..=348).map(|quarter| quarter as f32 / 4.0).collect();
    for dtype in TYPES {
        let gate = rounded_as(dtype, &gate);
        let (up, grad_out) = (normals_as(dtype, gate.len(), 2), normals_as(dtype, gate.len(), 3));
        check_forward(dtype, &gate, &up);
        check_backward(dtype, &grad_out, &gate, &up);
    }
}

#[test]
fn gates_beyond_the_exponential_pass_all_or_nothing() {
    for dtype in TYPES {
        let large = rounded_as(dtype, &[1e30])[0];
        let (gate, up) = ([100.0, large, -100.0, -large], [3.0; 4]);
        // silu(−100) = −100·e^−100 = −4e-42 is no normal f32.
        let expected = rounded_as(dtype, &[300.0, 3.0 * large, 0.0, 0.0]);
        assert_eq!(forward_by_kernel(dtype, &gate, &up), expected);
        let [grad_gate, grad_up] = backward_by_kernel(dtype, &[2.0; 4], &gate, &up);
        assert_eq!(grad_gate, [6.0, 6.0, 0.0, 0.0]);
        assert_eq!(grad_up, [200.0, 2.0 * large, 0.0, 0.0]);
    }
}
