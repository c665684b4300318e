//! Rotary position embedding.

use pillion_kernels::DType;

use crate::bounded::{Bounded, dot, exact, to};
use crate::common::{TYPES, assert_certain, assert_gradient, assert_within, normals, normals_as, run};

/// B, T, heads, D: one sequence, and several, which threads share.
const SHAPES: [(usize, usize, usize, usize); 8] = [
    (1, 1, 1, 2),
    (3, 7, 1, 6),
    (2, 15, 3, 8),
    (7, 15, 1, 2),
    (1, 33, 2, 4),
    (2, 3, 5, 34),
    (1, 257, 2, 4),
    (257, 3, 33, 2),
];

/// cos and sin of t·θᵢ, θᵢ = 10000^(−2i/D), as `[T, D/2]`.
fn tables(seq: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |index: usize| (index / (dim / 2)) as f64 * 1e4f64.powf(-2.0 * (index % (dim / 2)) as f64 / dim as f64);
    let table = |f: fn(f64) -> f64| (0..seq * dim / 2).map(|index| f(angle(index)) as f32).collect();
    (table(f64::cos), table(f64::sin))
}

/// Turns by the angles in the tables, or back.
fn rotate(x: &[Bounded], cos: &[f32], sin: &[f32], heads: usize, dim: usize, inverse: bool) -> Vec<Bounded> {
    let (half, seq) = (dim / 2, cos.len() / (dim / 2));
    let turned = |index: usize| {
        let (start, column, t) = (index / dim * dim, index % dim, index / (heads * dim) % seq);
        let angle = t * half + column % half;
        let (cos, sin) = (Bounded::exact(cos[angle]), Bounded::exact(if inverse { -sin[angle] } else { sin[angle] }));
        let (a, b) = (x[start + column % half], x[start + column % half + half]);
        if column < half { a * cos - b * sin } else { b * cos + a * sin }
    };
    (0..x.len()).map(turned).collect()
}

fn rotated_by_kernel(
    dtype: DType,
    x: &[f32],
    (cos, sin): (&[f32], &[f32]),
    heads: usize,
    dim: usize,
    inverse: bool,
) -> Vec<f32> {
    let [out] = run(|stage| {
        let (mut x, cos, sin) = (stage.buffer_as(dtype, x), stage.buffer(cos), stage.buffer(sin));
        stage.kernels().rope(x.view_mut(), cos.view(), sin.view(), heads, dim, inverse);
        [x]
    });
    out.wide()
}

#[test]
fn both_directions_are_within_their_bounds() {
    for (batch, seq, heads, dim) in SHAPES {
        for dtype in TYPES {
            let (x, (cos, sin)) = (normals_as(dtype, batch * seq * heads * dim, 1), tables(seq, dim));
            for inverse in [false, true] {
                let expected = to(dtype, &rotate(&exact(&x), &cos, &sin, heads, dim, inverse));
                assert_within("x", &rotated_by_kernel(dtype, &x, (&cos, &sin), heads, dim, inverse), &expected);
                if dtype == DType::Bf16 && x.len() > 100 {
                    assert_certain("x", &expected);
                }
            }
        }
    }
}

#[test]
fn the_inverse_is_the_gradient() {
    for (batch, seq, heads, dim) in SHAPES {
        let len = batch * seq * heads * dim;
        let (x, grad_out, (cos, sin)) = (normals(len, 1), normals(len, 2), tables(seq, dim));
        let direction = exact(&grad_out);
        let gradient = rotate(&direction, &cos, &sin, heads, dim, true);
        assert_gradient(&[&x], &[&gradient], |inputs| {
            dot(&rotate(&inputs[0], &cos, &sin, heads, dim, false), &direction)
        });
        assert_within("grad_x", &rotated_by_kernel(DType::F32, &grad_out, (&cos, &sin), heads, dim, true), &gradient);
    }
}

#[test]
fn the_first_position_does_not_turn_and_a_quarter_turn_swaps_the_halves() {
    // One head of width 4; position 0 has angle 0, position 1 a quarter turn.
    let (cos, sin) = ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]);
    let x = [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0];
    for dtype in TYPES {
        let turned = rotated_by_kernel(dtype, &x, (&cos, &sin), 1, 4, false);
        assert_eq!(turned, [1.0, 2.0, 3.0, 4.0, -3.0, -4.0, 1.0, 2.0]);
    }
}
