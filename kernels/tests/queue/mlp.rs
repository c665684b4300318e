//! SwiGLU.

use crate::bounded::{Bounded, dot, exact};
use crate::common::{Values, assert_gradient, assert_within, normals, run};

const LENGTHS: [usize; 6] = [1, 3, 15, 33, 7 * 15, 1000];

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

fn forward_by_kernel(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let [out] = run(|stage| {
        let (mut out, gate, up) = (stage.output(gate.len()), stage.buffer(gate), stage.buffer(up));
        stage.queue.swiglu(out.view_mut(), gate.view(), up.view());
        [out]
    });
    out.of()
}

fn backward_by_kernel(grad_out: &[f32], gate: &[f32], up: &[f32]) -> [Vec<f32>; 2] {
    let [out, grad_gate, grad_up]: [Values; 3] = run(|stage| {
        let (mut out, mut grad_gate, mut grad_up) =
            (stage.output(gate.len()), stage.output(gate.len()), stage.output(gate.len()));
        let (grad_out, gate, up) = (stage.buffer(grad_out), stage.buffer(gate), stage.buffer(up));
        stage.queue.swiglu_backward(
            out.view_mut(),
            grad_gate.view_mut(),
            grad_up.view_mut(),
            grad_out.view(),
            gate.view(),
            up.view(),
        );
        [out, grad_gate, grad_up]
    });
    assert!(out.of::<f32>() == forward_by_kernel(gate, up), "the backward pass makes what the forward pass made");
    [grad_gate.of(), grad_up.of()]
}

fn check_backward(grad_out: &[f32], gate: &[f32], up: &[f32]) -> (Vec<Bounded>, Vec<Bounded>) {
    let expected = backward(&exact(grad_out), &exact(gate), &exact(up));
    let [grad_gate, grad_up] = backward_by_kernel(grad_out, gate, up);
    assert_within("grad_gate", &grad_gate, &expected.0);
    assert_within("grad_up", &grad_up, &expected.1);
    expected
}

#[test]
fn forward_is_within_its_bound() {
    for len in LENGTHS {
        let (gate, up) = (normals(len, 1), normals(len, 2));
        assert_within("out", &forward_by_kernel(&gate, &up), &forward(&exact(&gate), &exact(&up)));
    }
}

#[test]
fn backward_is_within_its_bound() {
    for len in LENGTHS {
        let (gate, up, grad_out) = (normals(len, 1), normals(len, 2), normals(len, 3));
        let (grad_gate, grad_up) = check_backward(&grad_out, &gate, &up);
        let direction = exact(&grad_out);
        assert_gradient(&[&gate, &up], &[&grad_gate, &grad_up], |inputs| {
            dot(&forward(&inputs[0], &inputs[1]), &direction)
        });
    }
}

#[test]
fn saturated_gates_are_within_the_bound() {
    // As far as e^−gate is a normal f32.
    let gate: Vec<f32> = (-348..=348).map(|quarter| quarter as f32 / 4.0).collect();
    let (up, grad_out) = (normals(gate.len(), 2), normals(gate.len(), 3));
    assert_within("out", &forward_by_kernel(&gate, &up), &forward(&exact(&gate), &exact(&up)));
    check_backward(&grad_out, &gate, &up);
}

#[test]
fn gates_beyond_the_exponential_pass_all_or_nothing() {
    let (gate, up) = ([100.0, 1e30, -100.0, -1e30], [3.0; 4]);
    // silu(−100) = −100·e^−100 = −4e-42 is no normal f32.
    assert_eq!(forward_by_kernel(&gate, &up), [300.0, 1e30 * 3.0, 0.0, 0.0]);
    let [grad_gate, grad_up] = backward_by_kernel(&[2.0; 4], &gate, &up);
    assert_eq!(grad_gate, [6.0, 6.0, 0.0, 0.0]);
    assert_eq!(grad_up, [200.0, 2e30, 0.0, 0.0]);
}
