//! Causal grouped-query attention, forward and backward, over tiles of queries and blocks of keys. Blocks in the future are skipped, and no
//! more than one tile's scores exist at a time, so memory grows with the sequence and not with its square.
//!
//! Forward (Dao 2023, algorithm 1): block by block of keys, each row keeps its largest score and the sum of its exponentials, and what it
//! has added up is rescaled when a larger score comes.
//!
//! Backward (Dao et al. 2022, section 3.1): with P rebuilt from the kept logarithms of the row sums,
//! ∂V += Pᵀ·∂O, ∂P = ∂O·Vᵀ, ∂S = P∘(∂P − rowsum(∂O∘O)), ∂Q = ∂S·K/√D, ∂K += ∂Sᵀ·Q/√D.
//!
//! Query heads that share keys and values are one task, so keys and values are packed once, and a thread alone adds to their gradients.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::maths::{LANES, exp, max_of, sum_of};
use super::matmul::{Matrix, Panels, Right, Start, product};
use super::scratch::{take, take_as};
use super::team::Team;
use super::value::Value;
use super::vectorized;
use crate::AttentionShape;

/// Query rows in a tile: a multiple of what panels are grouped by. Of 32 to 96 this is as good as any.
const ROWS: usize = 64;
/// Keys in a block: a tile's scores fit the second-level cache.
const KEYS: usize = 512;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// This thread's working memory.
struct Scratch {
    /// Kᵀ, [D, T].
    keys_across: Panels,
    /// K, [T, D].
    keys: Panels,
    /// V forward, [T, D]; Vᵀ backward, [D, T].
    values: Panels,
    /// Of a tile and a block, in f32 and in the type of the operands.
    scores: Vec<f32>,
    grad_scores: Vec<f32>,
    narrow: [Vec<f32>; 2],
    /// A tile of the output or of the gradient of the queries, [rows, D].
    tile: Vec<f32>,
    /// Largest score and sum of exponentials of a tile's rows.
    softmax: Vec<(f32, f32)>,
    /// Gradients of keys and values, [T, D].
    grad_keys: Vec<f32>,
    grad_values: Vec<f32>,
}

impl Scratch {
    const fn new() -> Scratch {
        Scratch {
            keys_across: Panels::new(),
            keys: Panels::new(),
            values: Panels::new(),
            scores: Vec::new(),
            grad_scores: Vec::new(),
            narrow: [Vec::new(), Vec::new()],
            tile: Vec::new(),
            softmax: Vec::new(),
            grad_keys: Vec::new(),
            grad_values: Vec::new(),
        }
    }
}

/// The rows of a tensor `[B, T, heads, D]` in parts, one for each head of each sequence.
struct Heads<'a, T> {
    data: *mut T,
    shape: AttentionShape,
    heads: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: `row` is the only access, and its caller sees to it that a row has one user.
unsafe impl<T: Send> Sync for Heads<'_, T> {}

impl<'a, T> Heads<'a, T> {
    fn new(data: &'a mut [T], shape: AttentionShape, heads: usize) -> Heads<'a, T> {
        assert_eq!(data.len(), shape.batch * shape.seq * heads * shape.head_dim);
        Heads { data: data.as_mut_ptr(), shape, heads, _borrow: PhantomData }
    }

    /// One token of one head.
    ///
    /// # Safety
    /// Nobody else uses this row meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, sequence: usize, head: usize, token: usize) -> &mut [T] {
        let AttentionShape { batch, seq, head_dim, .. } = self.shape;
        assert!(sequence < batch && head < self.heads && token < seq);
        let row = (sequence * seq + token) * self.heads + head;
        // SAFETY: inside the tensor, as checked; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * head_dim), head_dim) }
    }
}

/// One head of one sequence in a tensor `[B, T, heads, D]`, `[T, D]`.
fn head<T>(data: &[T], shape: AttentionShape, heads: usize, sequence: usize, head: usize) -> Matrix<&[T]> {
    let AttentionShape { seq, head_dim, .. } = shape;
    Matrix::strided(&data[(sequence * seq * heads + head) * head_dim..], seq, head_dim, heads * head_dim)
}

/// Some rows of a head.
fn rows<'a, T>(head: &Matrix<&'a [T]>, first: usize, count: usize) -> Matrix<&'a [T]> {
    Matrix::strided(&head.data[first * head.row_stride..], count, head.columns, head.row_stride)
}

/// (first query, number of queries) of each tile.
fn tiles(seq: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..seq).step_by(ROWS).map(move |first| (first, ROWS.min(seq - first)))
}

/// (first key, number of keys) of each block that a tile sees.
fn blocks(first: usize, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let seen = first + rows;
    (0..seen).step_by(KEYS).map(move |key| (key, KEYS.min(seen - key)))
}

fn scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

pub(super) fn forward<T: Value>(
    team: &Team,
    out: &mut [T],
    log_sum: &mut [f32],
    qkv: [&[T]; 3],
    shape: AttentionShape,
) {
    forward_from(team, 0, out, Some(log_sum), qkv, shape);
}

/// Of the tokens from `first` on: `out` and queries have no others.
pub(super) fn forward_from<T: Value>(
    team: &Team,
    first: usize,
    out: &mut [T],
    log_sum: Option<&mut [f32]>,
    [q, k, v]: [&[T]; 3],
    shape: AttentionShape,
) {
    if out.is_empty() {
        return;
    }
    let (group, seq) = (shape.heads / shape.kv_heads, shape.seq - first);
    let of_queries = AttentionShape { seq, ..shape };
    let out = Heads::new(out, of_queries, shape.heads);
    // A head's logarithms lie side by side, like the rows of a tensor with one head.
    let of_heads = AttentionShape { batch: shape.batch * shape.heads, seq: 1, head_dim: seq, ..shape };
    let log_sum = log_sum.map(|log_sum| Heads::new(log_sum, of_heads, 1));
    team.run(shape.batch * shape.kv_heads, |task| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.keys_across.pack(head(k, shape, shape.kv_heads, sequence, kv_head).transposed());
            scratch.values.pack(head(v, shape, shape.kv_heads, sequence, kv_head));
            for index in kv_head * group..(kv_head + 1) * group {
                let q = head(q, of_queries, shape.heads, sequence, index);
                // SAFETY: a query head belongs to one task.
                let mut log_sum =
                    log_sum.as_ref().map(|log_sum| unsafe { log_sum.row(sequence * shape.heads + index, 0, 0) });
                for (query, count) in tiles(seq) {
                    vectorized(
                        #[inline(always)]
                        || forward_tile(scratch, rows(&q, query, count), first + query, shape),
                    );
                    for row in 0..count {
                        let (largest, total) = scratch.softmax[row];
                        // SAFETY: as above.
                        let out = unsafe { out.row(sequence, index, query + row) };
                        let inverse = 1.0 / total;
                        for (out, &x) in out.iter_mut().zip(&scratch.tile[row * shape.head_dim..]) {
                            *out = T::narrow(x * inverse);
                        }
                        if let Some(log_sum) = &mut log_sum {
                            log_sum[query + row] = largest + total.ln();
                        }
                    }
                }
            }
        });
    });
}

/// Fills `tile` with Σ exp(score − largest)·value, and `softmax`.
#[inline(always)]
fn forward_tile<T: Value>(scratch: &mut Scratch, q: Matrix<&[T]>, first: usize, shape: AttentionShape) {
    let Scratch { keys_across, values, scores, narrow, tile, softmax, .. } = scratch;
    let (alone, count, dim, scale) = (Team::default(), q.rows, q.columns, scale(shape));
    let tile = take(tile, count * dim);
    softmax.clear();
    softmax.resize(count, (f32::NEG_INFINITY, 0.0));
    // Panels are cut between groups of rows alone. What a query does not see counts nothing.
    let end = (first + count).next_multiple_of(ROWS).min(shape.seq);
    for (key, keys) in blocks(0, end) {
        let scores = take(scores, count * keys);
        let across = keys_across.part::<T>(0, key);
        product(&alone, Matrix::dense(&mut *scores, count, keys), Start::Zero, q, across, scale);
        let p = take_as::<T>(&mut narrow[0], count * keys);
        for (row, (scores, p)) in scores.chunks_exact(keys).zip(p.chunks_exact_mut(keys)).enumerate() {
            let seen = keys.min((first + row + 1).saturating_sub(key));
            let (largest, total) = &mut softmax[row];
            let larger = max_of(&scores[..seen]).max(*largest);
            // As long as all scores are −∞ nothing has been added, and none of them counts more than the others will.
            let shift = if larger == f32::NEG_INFINITY { 0.0 } else { larger };
            let rescale = exp(*largest - shift);
            *total = *total * rescale + exponentials(&mut p[..seen], &scores[..seen], shift);
            p[seen..].fill(T::ZERO);
            *largest = larger;
            if key > 0 {
                tile[row * dim..][..dim].iter_mut().for_each(|x| *x *= rescale);
            }
        }
        let start = if key == 0 { Start::Zero } else { Start::Output };
        let p = Matrix::dense(&*p, count, keys);
        product(&alone, Matrix::dense(&mut *tile, count, dim), start, p, values.part::<T>(key, 0), 1.0);
    }
}

/// p = exp(score − largest), rounded; returns their sum: what is summed is what values are multiplied with.
#[inline(always)]
fn exponentials<T: Value>(p: &mut [T], scores: &[f32], largest: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let one = |p: &mut T, score: f32| {
        *p = T::narrow(exp(score - largest));
        p.widen()
    };
    let ((blocks, tail), (score_blocks, score_tail)) = (p.as_chunks_mut::<LANES>(), scores.as_chunks::<LANES>());
    for (p, scores) in blocks.iter_mut().zip(score_blocks) {
        for lane in 0..LANES {
            lanes[lane] += one(&mut p[lane], scores[lane]);
        }
    }
    let tail: f32 = tail.iter_mut().zip(score_tail).map(|(p, &score)| one(p, score)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub(super) grad_out: &'a [T],
    pub(super) q: &'a [T],
    pub(super) k: &'a [T],
    pub(super) v: &'a [T],
    pub(super) out: &'a [T],
    pub(super) log_sum: &'a [f32],
}

pub(super) fn backward<T: Value>(team: &Team, grads: [&mut [T]; 3], saved: Saved<'_, T>, shape: AttentionShape) {
    if saved.out.is_empty() {
        return;
    }
    let [grad_q, grad_k, grad_v] = grads;
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let group = heads / kv_heads;
    let grad_q = Heads::new(grad_q, shape, heads);
    let (grad_k, grad_v) = (Heads::new(grad_k, shape, kv_heads), Heads::new(grad_v, shape, kv_heads));
    team.run(batch * kv_heads, |task| {
        let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
        SCRATCH.with_borrow_mut(|scratch| {
            let (k, v) =
                (head(saved.k, shape, kv_heads, sequence, kv_head), head(saved.v, shape, kv_heads, sequence, kv_head));
            scratch.keys_across.pack(k.transposed());
            scratch.keys.pack(k);
            scratch.values.pack(v.transposed());
            take(&mut scratch.grad_keys, seq * head_dim).fill(0.0);
            take(&mut scratch.grad_values, seq * head_dim).fill(0.0);
            for index in kv_head * group..(kv_head + 1) * group {
                let of_head = |data| head(data, shape, heads, sequence, index);
                let (q, out, grad_out) = (of_head(saved.q), of_head(saved.out), of_head(saved.grad_out));
                let log_sum = &saved.log_sum[(sequence * heads + index) * seq..][..seq];
                for (first, count) in tiles(seq) {
                    let queries = Queries {
                        first,
                        q: rows(&q, first, count),
                        out: rows(&out, first, count),
                        grad_out: rows(&grad_out, first, count),
                        log_sum: &log_sum[first..],
                        scale: scale(shape),
                    };
                    vectorized(
                        #[inline(always)]
                        || backward_tile(scratch, queries),
                    );
                    for row in 0..count {
                        // SAFETY: a query head belongs to one task.
                        let to = unsafe { grad_q.row(sequence, index, first + row) };
                        T::round(to, &scratch.tile[row * head_dim..][..head_dim]);
                    }
                }
            }
            for token in 0..seq {
                // SAFETY: a key head is one task.
                let (to_k, to_v) =
                    unsafe { (grad_k.row(sequence, kv_head, token), grad_v.row(sequence, kv_head, token)) };
                T::round(to_k, &scratch.grad_keys[token * head_dim..][..head_dim]);
                T::round(to_v, &scratch.grad_values[token * head_dim..][..head_dim]);
            }
        });
    });
}

/// Some queries, `[rows, D]` each.
struct Queries<'a, T> {
    first: usize,
    q: Matrix<&'a [T]>,
    out: Matrix<&'a [T]>,
    grad_out: Matrix<&'a [T]>,
    log_sum: &'a [f32],
    scale: f32,
}

/// Fills `tile` with the gradient of the queries; adds to `grad_keys` and `grad_values`.
#[inline(always)]
fn backward_tile<T: Value>(scratch: &mut Scratch, queries: Queries<'_, T>) {
    let Scratch { keys_across, keys, values, scores, grad_scores, narrow, tile, softmax, grad_keys, grad_values } =
        scratch;
    let Queries { first, q, out, grad_out, log_sum, scale } = queries;
    let (alone, count, dim) = (Team::default(), q.rows, q.columns);
    softmax.clear();
    for (row, &log_sum) in log_sum[..count].iter().enumerate() {
        let (out, grad_out) =
            (&out.data[row * out.row_stride..][..dim], &grad_out.data[row * grad_out.row_stride..][..dim]);
        softmax.push((log_sum, sum_of(grad_out, out, |a: T, b| a.widen() * b.widen())));
    }
    let [narrow_p, narrow_grad] = narrow;
    let tile = take(tile, count * dim);
    for (key, seen) in blocks(first, count) {
        let across = keys_across.part::<T>(0, key);
        let scores = take(scores, count * seen);
        product(&alone, Matrix::dense(&mut *scores, count, seen), Start::Zero, q, across, scale);
        let grad_scores = take(grad_scores, count * seen);
        let across = values.part::<T>(0, key);
        product(&alone, Matrix::dense(&mut *grad_scores, count, seen), Start::Zero, grad_out, across, 1.0);
        let (p, grad) = (take_as::<T>(narrow_p, count * seen), take_as::<T>(narrow_grad, count * seen));
        for (row, &(log_sum, projection)) in softmax.iter().enumerate() {
            let past = seen.min(first + row + 1 - key);
            let of_row = row * seen..(row + 1) * seen;
            let (p, grad) = (&mut p[of_row.clone()], &mut grad[of_row.clone()]);
            let inputs = scores[of_row.clone()][..past].iter().zip(&grad_scores[of_row]);
            for ((p, grad), (&score, &grad_p)) in p.iter_mut().zip(&mut *grad).zip(inputs) {
                let exact = exp(score - log_sum);
                *p = T::narrow(exact);
                *grad = T::narrow(exact * (grad_p - projection));
            }
            p[past..].fill(T::ZERO);
            grad[past..].fill(T::ZERO);
        }
        let (p, grad) = (Matrix::dense(&*p, count, seen), Matrix::dense(&*grad, count, seen));
        let of_block = key * dim..(key + seen) * dim;
        let grad_values = Matrix::dense(&mut grad_values[of_block.clone()], seen, dim);
        product(&alone, grad_values, Start::Output, p.transposed(), Right::Matrix(grad_out), 1.0);
        let grad_keys = Matrix::dense(&mut grad_keys[of_block], seen, dim);
        product(&alone, grad_keys, Start::Output, grad.transposed(), Right::Matrix(q), scale);
        let start = if key == 0 { Start::Zero } else { Start::Output };
        let keys = keys.part::<T>(key, 0);
        product(&alone, Matrix::dense(&mut *tile, count, dim), start, grad, keys, scale);
    }
}
