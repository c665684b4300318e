//! The three products of a linear layer.

use pillion_kernels::DType;
use proptest::prelude::*;

use crate::bounded::{Bounded, dot, exact, sum_of_products};
use crate::common::{TYPES, assert_gradient, assert_within, normals, normals_as, rounded_as, run};

/// N, in, out.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (3, 1, 7), (1, 15, 3), (7, 15, 33), (33, 64, 65), (2, 600, 3), (130, 5, 17), (3, 257, 7 * 15)];

/// Products of which three threads get parts, by rows and by columns; their sums take several blocks of steps along each dimension.
const SHARED: [(usize, usize, usize); 3] = [(1030, 300, 4), (4, 300, 1030), (33, 750, 50)];

/// y = addend + x·wᵀ.
fn forward(addend: Option<&[f32]>, x: &[Bounded], w: &[Bounded], inputs: usize) -> Vec<Bounded> {
    let outputs = w.len() / inputs;
    let element = |index: usize| {
        let (x, w) = (&x[index / outputs * inputs..], &w[index % outputs * inputs..]);
        accumulated(addend.map(|addend| addend[index]), inputs, |i| x[i] * w[i])
    };
    (0..x.len() / inputs * outputs).map(element).collect()
}

/// Σ over `len` products, and what was there before.
fn accumulated(before: Option<f32>, len: usize, product: impl Fn(usize) -> Bounded) -> Bounded {
    sum_of_products(before.map(Bounded::exact).into_iter().chain((0..len).map(product)))
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

fn check_forward((rows, inputs, outputs): (usize, usize, usize), x_type: DType, w_type: DType) {
    let (x, w) = (normals_as(x_type, rows * inputs, 1), normals_as(w_type, outputs * inputs, 2));
    let addend = normals(rows * outputs, 6);
    let [wide, narrow, added] = run(|stage| {
        let (x, w, addend) = (stage.buffer_as(x_type, &x), stage.buffer_as(w_type, &w), stage.buffer(&addend));
        let [mut wide, mut narrow, mut added] =
            [DType::F32, DType::Bf16, DType::F32].map(|dtype| stage.output_as(dtype, rows * outputs));
        stage.kernels().linear(wide.view_mut(), x.view(), w.view(), None, rows);
        stage.kernels().linear(narrow.view_mut(), x.view(), w.view(), None, rows);
        stage.kernels().linear(added.view_mut(), x.view(), w.view(), Some(addend.view()), rows);
        [wide, narrow, added]
    });
    let [x, w] = [exact(&x), exact(&w)];
    check_both("y", &wide.of(), &narrow.wide(), &forward(None, &x, &w, inputs));
    assert_within("y with addend", &added.of(), &forward(Some(&addend), &x, &w, inputs));
}

/// A product as f32, and the same sums rounded.
fn check_both(what: &str, wide: &[f32], narrow: &[f32], expected: &[Bounded]) {
    assert_within(what, wide, expected);
    assert_eq!(narrow, rounded_as(DType::Bf16, wide), "{what} in bf16 is not what it is in f32, rounded");
}

fn check_backward((rows, inputs, outputs): (usize, usize, usize), dtype: DType, w_type: DType) {
    let (x, w) = (normals_as(dtype, rows * inputs, 1), normals_as(w_type, outputs * inputs, 2));
    let (grad_y, before_x, before_w) =
        (normals_as(dtype, rows * outputs, 3), normals(rows * inputs, 4), normals(outputs * inputs, 5));
    let [grad_x, narrow_x, accumulated_x, grad_w] = run(|stage| {
        let (mut grad_x, mut narrow_x) = (stage.output(rows * inputs), stage.output_as(DType::Bf16, rows * inputs));
        let (mut accumulated_x, mut grad_w) = (stage.buffer(&before_x), stage.buffer(&before_w));
        let (x, grad_y) = (stage.buffer_as(dtype, &x), stage.buffer_as(dtype, &grad_y));
        let w = stage.buffer_as(w_type, &w);
        stage.kernels().linear_backward_input(grad_x.view_mut(), grad_y.view(), w.view(), rows, false);
        stage.kernels().linear_backward_input(narrow_x.view_mut(), grad_y.view(), w.view(), rows, false);
        stage.kernels().linear_backward_input(accumulated_x.view_mut(), grad_y.view(), w.view(), rows, true);
        stage.kernels().linear_backward_weight(grad_w.view_mut(), grad_y.view(), x.view(), rows);
        [grad_x, narrow_x, accumulated_x, grad_w]
    });
    let (wide_x, wide_w, direction) = (exact(&x), exact(&w), exact(&grad_y));
    check_both("grad_x", &grad_x.of(), &narrow_x.wide(), &backward_input(None, &direction, &wide_w, inputs));
    assert_within(
        "accumulated grad_x",
        &accumulated_x.of(),
        &backward_input(Some(&before_x), &direction, &wide_w, inputs),
    );
    assert_within("grad_w", &grad_w.of(), &backward_weight(Some(&before_w), &direction, &wide_x, rows));
}

/// All types of two operands.
fn type_pairs() -> impl Iterator<Item = (DType, DType)> {
    TYPES.into_iter().flat_map(|x| TYPES.map(|w| (x, w)))
}

#[test]
fn forward_is_within_its_bound() {
    for shape in SHAPES.into_iter().chain(SHARED) {
        type_pairs().for_each(|(x, w)| check_forward(shape, x, w));
    }
}

#[test]
fn backward_is_within_its_bound() {
    for shape in SHAPES.into_iter().chain(SHARED) {
        type_pairs().for_each(|(grad_y, w)| check_backward(shape, grad_y, w));
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
            dot(&forward(None, &moved[0], &moved[1], inputs), &direction)
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape_is_within_its_bound(rows in 1usize..70, inputs in 1usize..70, outputs in 1usize..70, types in 0usize..4) {
        let (activations, weights) = (TYPES[types / 2], TYPES[types % 2]);
        check_forward((rows, inputs, outputs), activations, weights);
        check_backward((rows, inputs, outputs), activations, weights);
    }
}
