//! The three products of a linear layer.

use pillion_kernels::DType;
use proptest::prelude::*;

use crate::bounded::{Bounded, dot, exact, sum};
use crate::common::{WEIGHT_TYPES, assert_gradient, assert_within, normals, run, weights};

/// N, in, out.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 1, 7), (1, 15, 3), (7, 15, 33), (33, 64, 65), (2, 600, 3), (130, 5, 17)];

/// y = x·wᵀ.
fn forward(x: &[Bounded], w: &[Bounded], inputs: usize) -> Vec<Bounded> {
    x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| dot(x, w))).collect()
}

/// Σ over `len` products, and what was there before.
fn accumulated(before: Option<f32>, len: usize, product: impl Fn(usize) -> Bounded) -> Bounded {
    sum(before.map(Bounded::exact).into_iter().chain((0..len).map(product)))
}

/// grad_x (+)= grad_y·w.
fn backward_input(before: Option<&[f32]>, grad_y: &[Bounded], w: &[Bounded], inputs: usize) -> Vec<Bounded> {
    let outputs = w.len() / inputs;
    let element = |index: usize| {
        let (row, column) = (index / inputs, index % inputs);
        accumulated(before.map(|x| x[index]), outputs, |o| grad_y[row * outputs + o] * w[o * inputs + column])
    };
    (0..grad_y.len() / outputs * inputs).map(element).collect()
}

/// grad_w += grad_yᵀ·x.
fn backward_weight(before: Option<&[f32]>, grad_y: &[Bounded], x: &[Bounded], rows: usize) -> Vec<Bounded> {
    let (outputs, inputs) = (grad_y.len() / rows, x.len() / rows);
    let element = |index: usize| {
        let (row, column) = (index / inputs, index % inputs);
        accumulated(before.map(|x| x[index]), rows, |n| grad_y[n * outputs + row] * x[n * inputs + column])
    };
    (0..outputs * inputs).map(element).collect()
}

fn check_forward((rows, inputs, outputs): (usize, usize, usize), dtype: DType) {
    let (x, w) = (normals(rows * inputs, 1), weights(dtype, outputs * inputs, 2));
    let [y] = run(|stage| {
        let (mut y, x, w) = (stage.output(rows * outputs), stage.buffer(&x), stage.weights(dtype, &w));
        stage.queue.linear(y.view_mut(), x.view(), w.view(), None, rows);
        [y]
    });
    assert_within("y", &y.of(), &forward(&exact(&x), &exact(&w), inputs));
}

fn check_backward((rows, inputs, outputs): (usize, usize, usize), dtype: DType) {
    let (x, w) = (normals(rows * inputs, 1), weights(dtype, outputs * inputs, 2));
    let (grad_y, before_x, before_w) =
        (normals(rows * outputs, 3), normals(rows * inputs, 4), normals(outputs * inputs, 5));
    let [grad_x, accumulated_x, grad_w] = run(|stage| {
        let (mut grad_x, mut accumulated_x) = (stage.output(rows * inputs), stage.buffer(&before_x));
        let (mut grad_w, grad_y) = (stage.buffer(&before_w), stage.buffer(&grad_y));
        let (x, w) = (stage.buffer(&x), stage.weights(dtype, &w));
        stage.queue.linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), rows, false);
        stage.queue.linear_backward_input(accumulated_x.view_mut(), grad_y.view(), w.view(), rows, true);
        stage.queue.linear_backward_weight(grad_w.view_mut(), grad_y.view(), x.view(), rows);
        [grad_x, accumulated_x, grad_w]
    });
    let (wide_x, wide_w, direction) = (exact(&x), exact(&w), exact(&grad_y));
    assert_within("grad_x", &grad_x.of(), &backward_input(None, &direction, &wide_w, inputs));
    assert_within(
        "accumulated grad_x",
        &accumulated_x.of(),
        &backward_input(Some(&before_x), &direction, &wide_w, inputs),
    );
    assert_within("grad_w", &grad_w.of(), &backward_weight(Some(&before_w), &direction, &wide_x, rows));
}

#[test]
fn forward_is_within_its_bound() {
    for shape in SHAPES {
        WEIGHT_TYPES.iter().for_each(|&dtype| check_forward(shape, dtype));
    }
}

#[test]
fn backward_is_within_its_bound() {
    for shape in SHAPES {
        WEIGHT_TYPES.iter().for_each(|&dtype| check_backward(shape, dtype));
    }
}

#[test]
fn the_references_gradients_are_those_of_its_forward_pass() {
    for (rows, inputs, outputs) in SHAPES {
        let (x, w, grad_y) = (normals(rows * inputs, 1), normals(outputs * inputs, 2), normals(rows * outputs, 3));
        let direction = exact(&grad_y);
        let grad_x = backward_input(None, &direction, &exact(&w), inputs);
        let grad_w = backward_weight(None, &direction, &exact(&x), rows);
        assert_gradient(&[&x, &w], &[&grad_x, &grad_w], |moved| {
            dot(&forward(&moved[0], &moved[1], inputs), &direction)
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape_is_within_its_bound(rows in 1usize..70, inputs in 1usize..70, outputs in 1usize..70, half: bool) {
        let dtype = WEIGHT_TYPES[usize::from(half)];
        check_forward((rows, inputs, outputs), dtype);
        check_backward((rows, inputs, outputs), dtype);
    }
}
