//! Causal grouped-query attention.

use pillion_kernels::AttentionShape;
use proptest::prelude::*;

use crate::bounded::{Bounded, dot, exact, max, sum};
use crate::common::{Values, assert_gradient, assert_within, normals, run};

const fn shape(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, seq, heads, kv_heads, head_dim }
}

/// Lengths around one and two tiles of 64 rows; heads of their own, in groups, and all on one key head.
const SHAPES: [AttentionShape; 7] = [
    shape(1, 1, 1, 1, 2),
    shape(3, 3, 2, 1, 4),
    shape(2, 63, 2, 2, 6),
    shape(2, 64, 4, 2, 4),
    shape(1, 65, 6, 2, 10),
    shape(1, 130, 3, 1, 8),
    shape(2, 130, 2, 2, 4),
];

fn queries(shape: AttentionShape) -> usize {
    shape.batch * shape.seq * shape.heads * shape.head_dim
}

fn keys(shape: AttentionShape) -> usize {
    shape.batch * shape.seq * shape.kv_heads * shape.head_dim
}

fn scale(shape: AttentionShape) -> Bounded {
    Bounded::exact(1.0) / Bounded::exact(shape.head_dim as f64).sqrt()
}

/// Elements of query `t` of `head` in sequence `b`.
fn query(shape: AttentionShape, b: usize, t: usize, head: usize) -> std::ops::Range<usize> {
    let start = ((b * shape.seq + t) * shape.heads + head) * shape.head_dim;
    start..start + shape.head_dim
}

/// Elements of key or value `t` that query head `head` sees in sequence `b`: H/K neighbouring heads share one.
fn key(shape: AttentionShape, b: usize, t: usize, head: usize) -> std::ops::Range<usize> {
    let kv_head = head / (shape.heads / shape.kv_heads);
    let start = ((b * shape.seq + t) * shape.kv_heads + kv_head) * shape.head_dim;
    start..start + shape.head_dim
}

/// All (sequence, query position, head).
fn rows(shape: AttentionShape) -> impl Iterator<Item = (usize, usize, usize)> {
    let all = move |b| (0..shape.seq).flat_map(move |t| (0..shape.heads).map(move |head| (b, t, head)));
    (0..shape.batch).flat_map(all)
}

/// The scores of one query against the keys up to its own position.
fn scores(q: &[Bounded], k: &[Bounded], shape: AttentionShape, b: usize, t: usize, head: usize) -> Vec<Bounded> {
    let q = &q[query(shape, b, t, head)];
    let score = |s| {
        let k = &k[key(shape, b, s, head)];
        // The factor may be applied to any partial sum, so each term has its rounding.
        sum(q.iter().zip(k).map(|(&q, &k)| q * k * scale(shape)))
    };
    (0..=t).map(score).collect()
}

/// (out, log_sum)
fn forward(q: &[Bounded], k: &[Bounded], v: &[Bounded], shape: AttentionShape) -> (Vec<Bounded>, Vec<Bounded>) {
    let mut out = vec![Bounded::exact(0.0); queries(shape)];
    let mut log_sum = vec![Bounded::exact(0.0); shape.batch * shape.heads * shape.seq];
    for (b, t, head) in rows(shape) {
        let scores = scores(q, k, shape, b, t, head);
        let largest = max(&scores);
        let exponentials: Vec<Bounded> = scores.iter().map(|&score| (score - largest).exp()).collect();
        let total = sum(exponentials.iter().copied());
        let inverse = Bounded::exact(1.0) / total;
        for (column, at) in query(shape, b, t, head).enumerate() {
            let term = |(s, &p): (usize, &Bounded)| p * inverse * v[key(shape, b, s, head)][column];
            out[at] = sum(exponentials.iter().enumerate().map(term));
        }
        log_sum[(b * shape.heads + head) * shape.seq + t] = largest + total.ln();
    }
    (out, log_sum)
}

/// [grad_q, grad_k, grad_v]: with P the softmax, ∂V = Pᵀ·∂O, ∂P = ∂O·Vᵀ, ∂S = P∘(∂P − rowsum(∂O∘O)), ∂Q = ∂S·K/√D, ∂K = ∂Sᵀ·Q/√D.
fn backward(grad_out: &[Bounded], [q, k, v]: [&[Bounded]; 3], shape: AttentionShape) -> [Vec<Bounded>; 3] {
    let (out, log_sum) = forward(q, k, v, shape);
    let mut grad_q = Vec::new();
    let (mut terms_k, mut terms_v) = (vec![Vec::new(); keys(shape)], vec![Vec::new(); keys(shape)]);
    for (b, t, head) in rows(shape) {
        let row = query(shape, b, t, head);
        let grad_out = &grad_out[row.clone()];
        let log_sum = log_sum[(b * shape.heads + head) * shape.seq + t];
        let projection = dot(grad_out, &out[row.clone()]);
        let mut grad_scores = Vec::new();
        for (s, &score) in scores(q, k, shape, b, t, head).iter().enumerate() {
            let p = (score - log_sum).exp();
            let grad_score = p * (dot(grad_out, &v[key(shape, b, s, head)]) - projection);
            for (column, at) in key(shape, b, s, head).enumerate() {
                terms_v[at].push(p * grad_out[column]);
                terms_k[at].push(grad_score * q[row.clone()][column] * scale(shape));
            }
            grad_scores.push(grad_score);
        }
        let grad = |column: usize| {
            let term = |(s, &grad): (usize, &Bounded)| grad * k[key(shape, b, s, head)][column] * scale(shape);
            sum(grad_scores.iter().enumerate().map(term))
        };
        grad_q.extend((0..shape.head_dim).map(grad));
    }
    let sums = |terms: Vec<Vec<Bounded>>| terms.into_iter().map(sum).collect();
    [grad_q, sums(terms_k), sums(terms_v)]
}

fn forward_by_kernel([q, k, v]: [&[f32]; 3], shape: AttentionShape) -> [Values; 2] {
    run(|stage| {
        let (mut out, mut log_sum) = (stage.output(q.len()), stage.output(shape.batch * shape.heads * shape.seq));
        let (q, k, v) = (stage.buffer(q), stage.buffer(k), stage.buffer(v));
        stage.queue.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape);
        [out, log_sum]
    })
}

fn backward_by_kernel(grad_out: &[f32], [q, k, v]: [&[f32]; 3], shape: AttentionShape) -> [Values; 3] {
    run(|stage| {
        let (mut out, mut log_sum) = (stage.output(q.len()), stage.output(shape.batch * shape.heads * shape.seq));
        let (mut grad_q, mut grad_k, mut grad_v) =
            (stage.output(q.len()), stage.output(k.len()), stage.output(v.len()));
        let (q, k, v, grad_out) = (stage.buffer(q), stage.buffer(k), stage.buffer(v), stage.buffer(grad_out));
        stage.queue.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape);
        stage.queue.attention_backward(
            grad_q.view_mut(),
            grad_k.view_mut(),
            grad_v.view_mut(),
            grad_out.view(),
            q.view(),
            k.view(),
            v.view(),
            out.view(),
            log_sum.view(),
            shape,
        );
        [grad_q, grad_k, grad_v]
    })
}

fn check_forward(qkv: [&[f32]; 3], shape: AttentionShape) {
    let [out, log_sum] = forward_by_kernel(qkv, shape);
    let (expected, expected_log_sum) = forward(&exact(qkv[0]), &exact(qkv[1]), &exact(qkv[2]), shape);
    assert_within("out", &out.of(), &expected);
    assert_within("log_sum", &log_sum.of(), &expected_log_sum);
}

fn check_backward(grad_out: &[f32], qkv: [&[f32]; 3], shape: AttentionShape) -> [Vec<Bounded>; 3] {
    let wide = qkv.map(exact);
    let expected = backward(&exact(grad_out), wide.each_ref().map(|x| &x[..]), shape);
    let got = backward_by_kernel(grad_out, qkv, shape);
    for ((name, got), expected) in ["grad_q", "grad_k", "grad_v"].iter().zip(&got).zip(&expected) {
        assert_within(name, &got.of(), expected);
    }
    expected
}

#[test]
fn forward_is_within_its_bound() {
    for shape in SHAPES {
        check_forward([&normals(queries(shape), 1), &normals(keys(shape), 2), &normals(keys(shape), 3)], shape);
    }
}

#[test]
fn backward_is_within_its_bound() {
    for shape in SHAPES {
        let (q, k, v) = (normals(queries(shape), 1), normals(keys(shape), 2), normals(keys(shape), 3));
        let grad_out = normals(queries(shape), 4);
        let [grad_q, grad_k, grad_v] = check_backward(&grad_out, [&q, &k, &v], shape);
        let direction = exact(&grad_out);
        assert_gradient(&[&q, &k, &v], &[&grad_q, &grad_k, &grad_v], |inputs| {
            dot(&forward(&inputs[0], &inputs[1], &inputs[2], shape).0, &direction)
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_shape_is_within_its_bound(batch in 1usize..4, seq in 1usize..70, kv_heads in 1usize..4, group in 1usize..4, half in 1usize..5) {
        let shape = shape(batch, seq, kv_heads * group, kv_heads, 2 * half);
        let (q, k, v) = (normals(queries(shape), 1), normals(keys(shape), 2), normals(keys(shape), 3));
        check_forward([&q, &k, &v], shape);
        check_backward(&normals(queries(shape), 4), [&q, &k, &v], shape);
    }
}

#[test]
fn scores_of_hundreds_neither_overflow_nor_lose_the_bound() {
    let shape = shape(1, 65, 2, 1, 8);
    let large = |len, stream| normals(len, stream).iter().map(|x| 15.0 * x).collect::<Vec<f32>>();
    let (q, k, v) = (large(queries(shape), 1), large(keys(shape), 2), normals(keys(shape), 3));
    let largest = max(&scores(&exact(&q), &exact(&k), shape, 0, 64, 0)).value;
    assert!(largest > 89.0, "e^{largest} would not overflow f32");
    check_forward([&q, &k, &v], shape);
    check_backward(&normals(queries(shape), 4), [&q, &k, &v], shape);
}

#[test]
fn later_tokens_change_no_bit_of_earlier_outputs() {
    let shape = shape(1, 130, 2, 1, 4);
    let (q, k, v) = (normals(queries(shape), 1), normals(keys(shape), 2), normals(keys(shape), 3));
    let [out, log_sum] = forward_by_kernel([&q, &k, &v], shape);
    for past in [1, 63, 64, 100, 129] {
        let replaced = |x: &[f32], width: usize| {
            let mut x = x.to_vec();
            x[past * width..].copy_from_slice(&normals(shape.seq * width, 9)[past * width..]);
            x
        };
        let (q, k, v) = (replaced(&q, 8), replaced(&k, 4), replaced(&v, 4));
        let [changed, changed_log_sum] = forward_by_kernel([&q, &k, &v], shape);
        assert_eq!(changed.of::<f32>()[..past * 8], out.of::<f32>()[..past * 8]);
        assert_ne!(changed.of::<f32>()[past * 8..], out.of::<f32>()[past * 8..]);
        for (changed, was) in changed_log_sum.of::<f32>().chunks(shape.seq).zip(log_sum.of::<f32>().chunks(shape.seq)) {
            assert_eq!(changed[..past], was[..past]);
        }
    }
}
