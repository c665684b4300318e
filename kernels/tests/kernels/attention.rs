//! Causal grouped-query attention.

use pillion_kernels::{AttentionShape, Buffer, DType, Documents};
use proptest::prelude::*;

use crate::bounded::{Bounded, dot, exact, max, sum, sum_of_products, to};
use crate::common::{
    Softmax, Stage, TYPES, Values, assert_certain, assert_gradient, assert_within, normals_as, rounded_as, run,
};
use crate::devices;

pub(crate) const fn shape(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, seq, heads, kv_heads, head_dim }
}

/// Lengths around one and two tiles of 64 rows and beyond a block of 512 keys; heads of their own, in groups, and all on one key head.
/// Threads share sequences and key heads.
/// Head sizes 64 and 128 have kernels of their own on GPUs.
const SHAPES: [AttentionShape; 19] = [
    shape(1, 1, 1, 1, 2),
    shape(3, 3, 2, 1, 4),
    shape(7, 15, 3, 3, 2),
    shape(1, 33, 4, 1, 2),
    shape(2, 63, 2, 2, 6),
    shape(2, 64, 4, 2, 4),
    shape(1, 65, 6, 2, 10),
    shape(1, 130, 3, 1, 8),
    shape(2, 130, 2, 2, 4),
    shape(1, 257, 2, 1, 4),
    shape(1, 513, 2, 1, 2),
    shape(1, 600, 1, 1, 4),
    shape(1, 600, 2, 2, 2),
    shape(1, 9, 2, 1, 64),
    shape(1, 6, 2, 2, 128),
    shape(2, 33, 2, 1, 64),
    shape(1, 130, 2, 2, 64),
    shape(1, 65, 3, 1, 128),
    shape(2, 129, 1, 1, 128),
];

pub(crate) fn queries(shape: AttentionShape) -> usize {
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

/// Σ aᵢ·bᵢ by a matrix product.
fn product(a: &[Bounded], b: &[Bounded]) -> Bounded {
    sum_of_products(a.iter().zip(b).map(|(&a, &b)| a * b))
}

/// All (sequence, query position, head).
fn rows(shape: AttentionShape) -> impl Iterator<Item = (usize, usize, usize)> {
    let all = move |b| (0..shape.seq).flat_map(move |t| (0..shape.heads).map(move |head| (b, t, head)));
    (0..shape.batch).flat_map(all)
}

/// The scores of one query against the keys up to its own position. For a softmax with base 2 they
/// lack the factor 1/√D.
fn scores(
    softmax: Softmax,
    q: &[Bounded],
    k: &[Bounded],
    shape: AttentionShape,
    b: usize,
    t: usize,
    head: usize,
) -> Vec<Bounded> {
    let q = &q[query(shape, b, t, head)];
    let score = |s| {
        let terms = q.iter().zip(&k[key(shape, b, s, head)]).map(|(&q, &k)| q * k);
        // The factor may be applied to any partial sum, so each term has its rounding.
        if softmax.base_2 { sum_of_products(terms) } else { sum_of_products(terms.map(|term| term * scale(shape))) }
    };
    (0..=t).map(score).collect()
}

/// e^(score − shift), where the shift is a score.
fn weight_of_score(softmax: Softmax, score: Bounded, shift: Bounded, shape: AttentionShape) -> Bounded {
    if !softmax.base_2 {
        return (score - shift).exp();
    }
    let factor = scale(shape) * Bounded::rounded(std::f64::consts::LOG2_E);
    (score * factor - shift * factor).exp2()
}

/// e^(score − log_sum).
fn weight(softmax: Softmax, score: Bounded, log_sum: Bounded, shape: AttentionShape) -> Bounded {
    if !softmax.base_2 {
        return (score - log_sum).exp();
    }
    let log2_e = Bounded::rounded(std::f64::consts::LOG2_E);
    (score * (scale(shape) * log2_e) - log_sum * log2_e).exp2()
}

/// (out, log_sum) of activations of this type. Exponentials are rounded before they are summed and multiplied with values.
pub(crate) fn forward(
    dtype: DType,
    q: &[Bounded],
    k: &[Bounded],
    v: &[Bounded],
    shape: AttentionShape,
) -> (Vec<Bounded>, Vec<Bounded>) {
    forward_as(devices::attention(dtype, shape.head_dim), dtype, [q, k, v], shape)
}

/// The same with this softmax.
fn forward_as(
    softmax: Softmax,
    dtype: DType,
    [q, k, v]: [&[Bounded]; 3],
    shape: AttentionShape,
) -> (Vec<Bounded>, Vec<Bounded>) {
    let mut out = vec![Bounded::exact(0.0); queries(shape)];
    let mut log_sum = vec![Bounded::exact(0.0); shape.batch * shape.heads * shape.seq];
    for (b, t, head) in rows(shape) {
        let scores = scores(softmax, q, k, shape, b, t, head);
        let mut largest = max(&scores[..scores.len().min(softmax.keys)]);
        let mut exponentials: Vec<Bounded> = Vec::new();
        for block in scores.chunks(softmax.keys) {
            let larger = max(&[largest, max(block)]);
            let rescale = weight_of_score(softmax, largest, larger, shape);
            exponentials.iter_mut().for_each(|x| *x = *x * rescale);
            let weights = block.iter().map(|&score| weight_of_score(softmax, score, larger, shape).to(dtype));
            exponentials.extend(weights);
            largest = larger;
        }
        let total = sum(exponentials.iter().copied());
        let inverse = Bounded::exact(1.0) / total;
        for (column, at) in query(shape, b, t, head).enumerate() {
            let term = |(s, &p): (usize, &Bounded)| p * v[key(shape, b, s, head)][column];
            out[at] = (sum_of_products(exponentials.iter().enumerate().map(term)) * inverse).to(dtype);
        }
        let largest = if softmax.base_2 { largest * scale(shape) } else { largest };
        log_sum[(b * shape.heads + head) * shape.seq + t] = largest + total.ln();
    }
    (out, log_sum)
}

/// [grad_q, grad_k, grad_v]: with P the softmax, ∂V = Pᵀ·∂O, ∂P = ∂O·Vᵀ, ∂S = P∘(∂P − rowsum(∂O∘O)), ∂Q = ∂S·K/√D, ∂K = ∂Sᵀ·Q/√D.
/// P and ∂S are rounded before they are multiplied.
pub(crate) fn backward(
    dtype: DType,
    grad_out: &[Bounded],
    [q, k, v]: [&[Bounded]; 3],
    shape: AttentionShape,
) -> [Vec<Bounded>; 3] {
    let softmax = devices::attention(dtype, shape.head_dim);
    let (out, log_sum) = forward(dtype, q, k, v, shape);
    let scale = scale(shape);
    let mut grad_q = vec![Bounded::exact(0.0); queries(shape)];
    let (mut terms_k, mut terms_v) = (vec![Vec::new(); keys(shape)], vec![Vec::new(); keys(shape)]);
    for (b, t, head) in rows(shape) {
        let row = query(shape, b, t, head);
        let grad_out = &grad_out[row.clone()];
        let log_sum = log_sum[(b * shape.heads + head) * shape.seq + t];
        let projection = dot(grad_out, &out[row.clone()]);
        let mut grad_scores = Vec::new();
        for (s, &score) in scores(softmax, q, k, shape, b, t, head).iter().enumerate() {
            let p = weight(softmax, score, log_sum, shape);
            let grad_score = (p * (product(grad_out, &v[key(shape, b, s, head)]) - projection)).to(dtype);
            for (column, at) in key(shape, b, s, head).enumerate() {
                terms_v[at].push(p.to(dtype) * grad_out[column]);
                terms_k[at].push(grad_score * q[row.clone()][column] * scale);
            }
            grad_scores.push(grad_score);
        }
        for (column, at) in row.enumerate() {
            let term = |(s, &grad): (usize, &Bounded)| grad * k[key(shape, b, s, head)][column] * scale;
            grad_q[at] = sum_of_products(grad_scores.iter().enumerate().map(term));
        }
    }
    let sums = |terms: Vec<Vec<Bounded>>| terms.into_iter().map(sum_of_products).collect::<Vec<_>>();
    [grad_q, sums(terms_k), sums(terms_v)].map(|grad| to(dtype, &grad))
}

/// [out, log_sum]
fn forward_by_kernel(dtype: DType, qkv: [&[f32]; 3], shape: AttentionShape) -> [Values; 2] {
    run(|stage| {
        let (mut out, mut log_sum) =
            (stage.output_as(dtype, qkv[0].len()), stage.output(shape.batch * shape.heads * shape.seq));
        let [q, k, v] = qkv.map(|x| stage.buffer_as(dtype, x));
        stage.kernels().attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, None);
        [out, log_sum]
    })
}

/// The elements of the tokens from `first` on, of a tensor of queries.
fn from<T: Copy>(first: usize, queries: &[T], shape: AttentionShape) -> Vec<T> {
    let row = shape.heads * shape.head_dim;
    let sequences = queries.chunks(shape.seq * row);
    sequences.flat_map(|sequence| &sequence[first * row..]).copied().collect()
}

/// [grad_q, grad_k, grad_v]
fn backward_by_kernel(dtype: DType, grad_out: &[f32], qkv: [&[f32]; 3], shape: AttentionShape) -> [Values; 3] {
    run(|stage| {
        let [_, _, gradients @ ..] = forward_and_backward(stage, dtype, grad_out, qkv, shape, None);
        gradients
    })
}

/// What attention writes: out, logarithms of sums, and the gradients of queries, keys and values.
pub(crate) fn forward_and_backward(
    stage: &Stage,
    dtype: DType,
    grad_out: &[f32],
    qkv: [&[f32]; 3],
    shape: AttentionShape,
    documents: Option<&Documents>,
) -> [Buffer; 5] {
    let mut out = stage.output_as(dtype, qkv[0].len());
    let mut log_sum = stage.output(shape.batch * shape.heads * shape.seq);
    let [mut grad_q, mut grad_k, mut grad_v] = qkv.map(|x| stage.output_as(dtype, x.len()));
    let [q, k, v] = qkv.map(|x| stage.buffer_as(dtype, x));
    let grad_out = stage.buffer_as(dtype, grad_out);
    let kernels = stage.kernels();
    kernels.attention(out.view_mut(), log_sum.view_mut(), q.view(), k.view(), v.view(), shape, documents);
    kernels.attention_backward(
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
        documents,
    );
    [out, log_sum, grad_q, grad_k, grad_v]
}

pub(crate) fn inputs(dtype: DType, shape: AttentionShape) -> [Vec<f32>; 3] {
    [(queries(shape), 1), (keys(shape), 2), (keys(shape), 3)].map(|(len, stream)| normals_as(dtype, len, stream))
}

/// Returns the output that is expected.
fn check_forward(dtype: DType, qkv: [&[f32]; 3], shape: AttentionShape) -> Vec<Bounded> {
    let [out, log_sum] = forward_by_kernel(dtype, qkv, shape);
    let [q, k, v] = qkv.map(exact);
    let (expected, expected_log_sum) = forward(dtype, &q, &k, &v, shape);
    assert_within("out", &out.wide(), &expected);
    assert_within("log_sum", &log_sum.of(), &expected_log_sum);
    expected
}

/// Returns the gradients that are expected.
fn check_backward(dtype: DType, grad_out: &[f32], qkv: [&[f32]; 3], shape: AttentionShape) -> [Vec<Bounded>; 3] {
    let wide = qkv.map(exact);
    let expected = backward(dtype, &exact(grad_out), wide.each_ref().map(|x| &x[..]), shape);
    let got = backward_by_kernel(dtype, grad_out, qkv, shape);
    for ((name, got), expected) in ["grad_q", "grad_k", "grad_v"].iter().zip(&got).zip(&expected) {
        assert_within(name, &got.wide(), expected);
    }
    expected
}

#[test]
fn that_of_the_last_tokens_alone_is_within_its_bound() {
    for shape in SHAPES {
        for dtype in TYPES {
            let inputs = inputs(dtype, shape);
            let wide = inputs.each_ref().map(|x| exact(x));
            let wide = wide.each_ref().map(|x| &x[..]);
            // On GPUs no head has kernels of its own for it.
            let (all, _) = forward_as(devices::attention(dtype, 2), dtype, wide, shape);
            let [q, k, v] = &inputs;
            for first in [0, 1, shape.seq / 2, shape.seq - 1] {
                let q = from(first, q, shape);
                let out = run(|stage| {
                    let mut out = stage.output_as(dtype, q.len());
                    let [q, k, v] = [&q, k, v].map(|x| stage.buffer_as(dtype, x));
                    stage.kernels().attention_from(first, out.view_mut(), q.view(), k.view(), v.view(), shape);
                    [out]
                });
                let name = format!("out from {first} of {shape:?}");
                assert_within(&name, &out[0].wide(), &from(first, &all, shape));
            }
        }
    }
}

#[test]
fn forward_is_within_its_bound() {
    for shape in SHAPES {
        for dtype in TYPES {
            let [q, k, v] = inputs(dtype, shape);
            let expected = check_forward(dtype, [&q, &k, &v], shape);
            if dtype == DType::Bf16 && expected.len() > 100 {
                assert_certain("out", &expected);
            }
        }
    }
}

#[test]
fn backward_is_within_its_bound() {
    for shape in SHAPES {
        for dtype in TYPES {
            let ([q, k, v], grad_out) = (inputs(dtype, shape), normals_as(dtype, queries(shape), 4));
            let grads = check_backward(dtype, &grad_out, [&q, &k, &v], shape);
            if dtype == DType::F32 {
                let direction = exact(&grad_out);
                assert_gradient(&[&q, &k, &v], &grads.each_ref().map(|x| &x[..]), |inputs| {
                    dot(&forward(dtype, &inputs[0], &inputs[1], &inputs[2], shape).0, &direction)
                });
            } else if queries(shape) > 100 && (shape.seq < 10 || shape.head_dim <= 10) {
                // Bounds of longer sums exceed the spacing of bf16.
                grads.iter().for_each(|grad| assert_certain("a gradient", grad));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_shape_is_within_its_bound(batch in 1usize..4, seq in 1usize..70, kv_heads in 1usize..4, group in 1usize..4, half in 1usize..5, narrow: bool) {
        let (shape, dtype) = (shape(batch, seq, kv_heads * group, kv_heads, 2 * half), TYPES[usize::from(narrow)]);
        let [q, k, v] = inputs(dtype, shape);
        check_forward(dtype, [&q, &k, &v], shape);
        check_backward(dtype, &normals_as(dtype, queries(shape), 4), [&q, &k, &v], shape);
    }
}

#[test]
fn scores_of_hundreds_neither_overflow_nor_lose_the_bound() {
    for (shape, dtype) in [8, 64].into_iter().flat_map(|dim| TYPES.map(|dtype| (shape(1, 65, 2, 1, dim), dtype))) {
        let softmax = devices::attention(dtype, shape.head_dim);
        let [q, k, v] = inputs(dtype, shape);
        let [q, k] = [q, k].map(|x| rounded_as(dtype, &x.iter().map(|x| 15.0 * x).collect::<Vec<_>>()));
        let largest = max(&scores(softmax, &exact(&q), &exact(&k), shape, 0, 64, 0)).value;
        assert!(largest > 89.0, "e^{largest} would not overflow f32");
        check_forward(dtype, [&q, &k, &v], shape);
        check_backward(dtype, &normals_as(dtype, queries(shape), 4), [&q, &k, &v], shape);
    }
}

#[test]
fn later_tokens_change_no_bit_of_earlier_outputs() {
    let pasts = [1, 63, 64, 100, 129];
    for (seq, dim, pasts) in [(130, 4, pasts), (130, 64, pasts), (130, 128, pasts), (600, 4, [1, 511, 512, 513, 599])] {
        let shape = shape(1, seq, 2, 1, dim);
        for dtype in TYPES {
            let [q, k, v] = inputs(dtype, shape);
            let [out, log_sum] = forward_by_kernel(dtype, [&q, &k, &v], shape);
            for past in pasts {
                let replaced = |x: &[f32], width: usize| {
                    let mut x = x.to_vec();
                    x[past * width..].copy_from_slice(&normals_as(dtype, seq * width, 9)[past * width..]);
                    x
                };
                let (q, k, v) = (replaced(&q, 2 * dim), replaced(&k, dim), replaced(&v, dim));
                let [changed, changed_log_sum] = forward_by_kernel(dtype, [&q, &k, &v], shape);
                assert_eq!(changed.wide()[..past * 2 * dim], out.wide()[..past * 2 * dim]);
                assert_ne!(changed.wide()[past * 2 * dim..], out.wide()[past * 2 * dim..]);
                let (changed, was) = (changed_log_sum.of::<f32>(), log_sum.of::<f32>());
                for (changed, was) in changed.chunks(seq).zip(was.chunks(seq)) {
                    assert_eq!(changed[..past], was[..past]);
                }
            }
        }
    }
}

#[test]
fn keys_that_score_minus_infinity_in_a_whole_block_count_nothing() {
    for (dtype, dim) in [(DType::F32, 2), (DType::Bf16, 64), (DType::Bf16, 128)] {
        let shape = shape(1, 600, 1, 1, dim);
        let q = vec![1e20; queries(shape)];
        let of_early_keys = |early: f32, late: f32| -> Vec<f32> {
            (0..keys(shape)).map(|index| if index / dim < 512 { early } else { late }).collect()
        };
        let (k, v) = (of_early_keys(-1e20, 0.0), of_early_keys(5.0, 3.0));
        let [out, _] = forward_by_kernel(dtype, [&q, &k, &v], shape);
        // Of the keys that the last query sees only those that score 0 have weight, and their values are equal.
        let last = &out.wide()[queries(shape) - dim..];
        assert!(last.iter().all(|x| (x - 3.0).abs() < 1e-5), "{last:?}");
    }
}

#[test]
fn no_tokens_have_no_attention() {
    let shape = shape(2, 0, 4, 2, 4);
    let [out, log_sum] = forward_by_kernel(DType::F32, [&[], &[], &[]], shape);
    assert!(out.of::<f32>().is_empty() && log_sum.of::<f32>().is_empty());
}
