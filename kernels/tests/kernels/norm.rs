//! RMSNorm.

use pillion_kernels::DType;

use crate::bounded::{Bounded, dot, exact, sum, to};
use crate::common::{TYPES, Values, added, assert_certain, assert_gradient, assert_within, normals, normals_as, run};

const EPSILON: f32 = 1e-5;
/// N, C. The last has so many rows that three threads share them.
const SHAPES: [(usize, usize); 10] =
    [(1, 1), (3, 1), (1, 15), (7, 15), (3, 33), (33, 64), (5, 130), (2, 257), (257, 3), (2000, 7 * 15)];

/// (out, inverse_rms)
fn forward(x: &[Bounded], weight: &[Bounded]) -> (Vec<Bounded>, Vec<Bounded>) {
    let width = Bounded::exact(weight.len() as f64);
    let inverse = |x: &[Bounded]| Bounded::exact(1.0) / (dot(x, x) / width + Bounded::exact(EPSILON)).sqrt();
    let inverse_rms: Vec<Bounded> = x.chunks(weight.len()).map(inverse).collect();
    let out = x.iter().enumerate().map(|(i, &x)| x * inverse_rms[i / weight.len()] * weight[i % weight.len()]);
    (out.collect(), inverse_rms)
}

/// (grad_x, terms of grad_weight by column and row)
fn backward(grad_out: &[Bounded], x: &[Bounded], weight: &[Bounded]) -> (Vec<Bounded>, Vec<Vec<Bounded>>) {
    let width = weight.len();
    let (_, inverse_rms) = forward(x, weight);
    let mut grad_x = Vec::new();
    let mut grad_weight = vec![Vec::new(); width];
    for ((grad_out, x), &inverse) in grad_out.chunks(width).zip(x.chunks(width)).zip(&inverse_rms) {
        let weighted: Vec<Bounded> = grad_out.iter().zip(weight).map(|(&grad, &weight)| grad * weight).collect();
        let projection = dot(&weighted, x) * inverse * inverse * inverse / Bounded::exact(width as f64);
        for column in 0..width {
            grad_x.push(weighted[column] * inverse - x[column] * projection);
            grad_weight[column].push(grad_out[column] * x[column] * inverse);
        }
    }
    (grad_x, grad_weight)
}

/// [out, inverse_rms]
fn forward_by_kernel(x: &[f32], weight: &[f32], types: (DType, DType)) -> [Values; 2] {
    run(|stage| {
        let (mut out, mut inverse_rms) = (stage.output_as(types.0, x.len()), stage.output(x.len() / weight.len()));
        let (x, weight) = (stage.buffer(x), stage.buffer_as(types.1, weight));
        stage.kernels().rms_norm(out.view_mut(), inverse_rms.view_mut(), x.view(), weight.view(), EPSILON);
        [out, inverse_rms]
    })
}

#[test]
fn forward_is_within_its_bound() {
    for (rows, width) in SHAPES {
        for types in TYPES.iter().flat_map(|&out| TYPES.map(|weight| (out, weight))) {
            let (x, weight) = (normals(rows * width, 1), normals_as(types.1, width, 2));
            let [out, inverse_rms] = forward_by_kernel(&x, &weight, types);
            let (expected, expected_inverse) = forward(&exact(&x), &exact(&weight));
            let expected = to(types.0, &expected);
            assert_within("out", &out.wide(), &expected);
            assert_within("inverse_rms", &inverse_rms.of(), &expected_inverse);
            if types.0 == DType::Bf16 && rows * width > 100 {
                assert_certain("out", &expected);
            }
        }
    }
}

#[test]
fn backward_is_within_its_bound() {
    for (rows, width) in SHAPES {
        for dtype in TYPES {
            let (x, weight, grad_out) =
                (normals(rows * width, 1), normals_as(dtype, width, 2), normals(rows * width, 3));
            let (before_x, before_weight) = (normals(rows * width, 4), normals(width, 5));
            let [grad_x, grad_weight] = run(|stage| {
                let (mut out, mut inverse_rms) = (stage.output(rows * width), stage.output(rows));
                let (mut grad_x, mut grad_weight) = (stage.buffer(&before_x), stage.buffer(&before_weight));
                let (x, weight, grad_out) =
                    (stage.buffer(&x), stage.buffer_as(dtype, &weight), stage.buffer(&grad_out));
                stage.kernels().rms_norm(out.view_mut(), inverse_rms.view_mut(), x.view(), weight.view(), EPSILON);
                stage.kernels().rms_norm_backward(
                    grad_x.view_mut(),
                    grad_weight.view_mut(),
                    grad_out.view(),
                    x.view(),
                    inverse_rms.view(),
                    weight.view(),
                );
                [grad_x, grad_weight]
            });
            let direction = exact(&grad_out);
            let (expected_x, weight_terms) = backward(&direction, &exact(&x), &exact(&weight));
            let expected_weight: Vec<Bounded> = weight_terms.iter().map(|terms| sum(terms.iter().copied())).collect();
            assert_gradient(&[&x, &weight], &[&expected_x, &expected_weight], |inputs| {
                dot(&forward(&inputs[0], &inputs[1]).0, &direction)
            });
            assert_within("grad_x", &grad_x.of(), &added(&before_x, &expected_x));
            // What was there is one more term of the sum.
            let accumulated = before_weight.iter().zip(&weight_terms);
            let accumulated: Vec<Bounded> = accumulated
                .map(|(&was, terms)| sum([Bounded::exact(was)].into_iter().chain(terms.iter().copied())))
                .collect();
            assert_within("grad_weight", &grad_weight.of(), &accumulated);
        }
    }
}

#[test]
fn a_row_of_zeros_stays_zero() {
    for dtype in TYPES {
        let [out, inverse_rms] = forward_by_kernel(&[0.0; 33], &normals(33, 1), (dtype, DType::F32));
        assert!(out.wide().iter().all(|&x| x == 0.0));
        assert_within("inverse_rms", &inverse_rms.of(), &[Bounded::exact(1.0) / Bounded::exact(EPSILON).sqrt()]);
    }
}
