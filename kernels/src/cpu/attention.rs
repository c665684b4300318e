//! Causal attention, forward and backward, a tile of query rows at a time: the scores of a whole sequence never exist, so
//! memory is linear in its length. Keys after a tile's last row are never touched.
//!
//! Backward (Dao et al. 2022, section 3.1): with P rebuilt from the kept logarithms of the row sums,
//! ∂V += Pᵀ·∂O, ∂P = ∂O·Vᵀ, ∂S = P∘(∂P − rowsum(∂O∘O)), ∂Q = ∂S·K/√D, ∂K += ∂Sᵀ·Q/√D.

use super::maths::{exp, sum_of};
use super::matmul::{Matrix, product};
use crate::AttentionShape;

/// Query rows in a tile: its scores against a thousand keys fit the second-level cache.
const ROWS: usize = 64;

/// One head of one sequence: where its rows start and how far apart they are.
struct Head {
    queries: usize,
    query_stride: usize,
    keys: usize,
    key_stride: usize,
    log_sums: usize,
}

fn heads(shape: AttentionShape) -> impl Iterator<Item = Head> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    (0..batch * heads).map(move |index| {
        let (sequence, head) = (index / heads, index % heads);
        Head {
            queries: (sequence * seq * heads + head) * head_dim,
            query_stride: heads * head_dim,
            keys: (sequence * seq * kv_heads + head / (heads / kv_heads)) * head_dim,
            key_stride: kv_heads * head_dim,
            log_sums: index * seq,
        }
    })
}

fn tiles(seq: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..seq).step_by(ROWS).map(move |first| (first, ROWS.min(seq - first)))
}

fn scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

#[inline(always)]
pub(super) fn forward(
    out: &mut [f32],
    log_sum: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    shape: AttentionShape,
    scratch: &mut Vec<f32>,
) {
    let (seq, dim) = (shape.seq, shape.head_dim);
    scratch.resize(ROWS * seq, 0.0);
    for head in heads(shape) {
        for (first, rows) in tiles(seq) {
            let keys = first + rows;
            let start = head.queries + first * head.query_stride;
            let scores = &mut scratch[..rows * keys];
            product(
                Matrix::dense(scores, rows, keys),
                Matrix::strided(&q[start..], rows, dim, head.query_stride),
                Matrix::strided(&k[head.keys..], keys, dim, head.key_stride).transposed(),
                scale(shape),
                false,
            );
            for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, future) = scores.split_at_mut(first + row + 1);
                let largest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                for x in seen.iter_mut() {
                    *x = exp(*x - largest);
                }
                let total = sum_of(seen, seen, |x, _| x);
                let inverse = 1.0 / total;
                for x in seen {
                    *x *= inverse;
                }
                future.fill(0.0);
                log_sum[head.log_sums + first + row] = largest + total.ln();
            }
            product(
                Matrix::strided(&mut out[start..], rows, dim, head.query_stride),
                Matrix::dense(scores, rows, keys),
                Matrix::strided(&v[head.keys..], keys, dim, head.key_stride),
                1.0,
                false,
            );
        }
    }
}

#[inline(always)]
pub(super) fn backward(
    grads: [&mut [f32]; 3],
    grad_out: &[f32],
    qkv: [&[f32]; 3],
    out: &[f32],
    log_sum: &[f32],
    shape: AttentionShape,
    scratch: &mut Vec<f32>,
) {
    let [grad_q, grad_k, grad_v] = grads;
    let [q, k, v] = qkv;
    let (seq, dim, scale) = (shape.seq, shape.head_dim, scale(shape));
    grad_k.fill(0.0);
    grad_v.fill(0.0);
    scratch.resize(2 * ROWS * seq, 0.0);
    for head in heads(shape) {
        for (first, rows) in tiles(seq) {
            let keys = first + rows;
            let start = head.queries + first * head.query_stride;
            let (p, grad_p) = scratch.split_at_mut(ROWS * seq);
            let (p, grad_p) = (&mut p[..rows * keys], &mut grad_p[..rows * keys]);
            let queries = Matrix::strided(&q[start..], rows, dim, head.query_stride);
            let grad_rows = Matrix::strided(&grad_out[start..], rows, dim, head.query_stride);
            let key_rows = Matrix::strided(&k[head.keys..], keys, dim, head.key_stride);
            let value_rows = Matrix::strided(&v[head.keys..], keys, dim, head.key_stride);
            product(Matrix::dense(&mut *p, rows, keys), queries, key_rows.transposed(), scale, false);
            for (row, p) in p.chunks_exact_mut(keys).enumerate() {
                let (seen, future) = p.split_at_mut(first + row + 1);
                let log_sum = log_sum[head.log_sums + first + row];
                for x in seen {
                    *x = exp(*x - log_sum);
                }
                future.fill(0.0);
            }
            let grad_values = Matrix::strided(&mut grad_v[head.keys..], keys, dim, head.key_stride);
            product(grad_values, Matrix::dense(&*p, rows, keys).transposed(), grad_rows, 1.0, true);
            product(Matrix::dense(&mut *grad_p, rows, keys), grad_rows, value_rows.transposed(), 1.0, false);
            for (row, (p, grad_p)) in p.chunks_exact(keys).zip(grad_p.chunks_exact_mut(keys)).enumerate() {
                let at = start + row * head.query_stride;
                let projection = sum_of(&grad_out[at..at + dim], &out[at..at + dim], |a, b| a * b);
                for (grad_s, &p) in grad_p.iter_mut().zip(p) {
                    *grad_s = p * (*grad_s - projection);
                }
            }
            let grad_s = Matrix::dense(&*grad_p, rows, keys);
            let grad_queries = Matrix::strided(&mut grad_q[start..], rows, dim, head.query_stride);
            product(grad_queries, grad_s, key_rows, scale, false);
            let grad_keys = Matrix::strided(&mut grad_k[head.keys..], keys, dim, head.key_stride);
            product(grad_keys, grad_s.transposed(), queries, scale, true);
        }
    }
}
