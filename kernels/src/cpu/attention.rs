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
//! A task computes a sequence or, with documents, a document. So a document's numbers do not depend
//! on the others.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::maths::{LANES, exp, max_of, sum_of};
use super::matmul::{Matrix, Panels, Right, Start, product};
use super::scratch::{take, take_as};
use super::team::Team;
use super::value::Value;
use super::vectorized;
use crate::{AttentionShape, Documents};

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

/// A tensor that tasks write in parts.
struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: `part` is the only access, and its caller sees to it that an element has one user.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    fn new(data: &'a mut [T]) -> Shared<'a, T> {
        Shared { data: data.as_mut_ptr(), len: data.len(), _borrow: PhantomData }
    }

    /// Part `index` of parts of `len` elements, the first of which begins at `start`.
    ///
    /// # Safety
    /// Nobody else uses this part meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, index: usize, len: usize) -> &mut [T] {
        let start = start + index * len;
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside the tensor, as checked; the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// What a task computes: tokens that see each other, counted over the batch.
struct Piece {
    /// The last of the keys are those of the queries.
    queries: Range<usize>,
    keys: Range<usize>,
}

/// How many pieces there are.
fn count(shape: AttentionShape, documents: Option<&Documents>) -> usize {
    documents.map_or(shape.batch, Documents::len)
}

/// A document, or the tokens of a sequence from `first` on.
fn piece(shape: AttentionShape, first: usize, documents: Option<&Documents>, index: usize) -> Piece {
    match documents {
        Some(documents) => Piece { queries: documents.tokens(index), keys: documents.tokens(index) },
        None => {
            let of = |tokens: usize| index * tokens..(index + 1) * tokens;
            Piece { queries: of(shape.seq - first), keys: of(shape.seq) }
        }
    }
}

/// Some tokens of a head in a tensor `[N, heads, D]`, `[tokens, D]`.
fn head<'a, T>(data: &'a [T], tokens: &Range<usize>, heads: usize, head: usize, head_dim: usize) -> Matrix<&'a [T]> {
    Matrix::strided(&data[(tokens.start * heads + head) * head_dim..], tokens.len(), head_dim, heads * head_dim)
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
    documents: Option<&Documents>,
) {
    forward_pieces(team, 0, out, Some(log_sum), qkv, shape, documents);
}

/// Of the tokens from `first` on: `out` and queries have no others.
pub(super) fn forward_from<T: Value>(team: &Team, first: usize, out: &mut [T], qkv: [&[T]; 3], shape: AttentionShape) {
    forward_pieces(team, first, out, None, qkv, shape, None);
}

fn forward_pieces<T: Value>(
    team: &Team,
    first: usize,
    out: &mut [T],
    log_sum: Option<&mut [f32]>,
    [q, k, v]: [&[T]; 3],
    shape: AttentionShape,
    documents: Option<&Documents>,
) {
    if out.is_empty() {
        return;
    }
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (group, scale) = (heads / kv_heads, scale(shape));
    let (out, log_sum) = (Shared::new(out), log_sum.map(Shared::new));
    team.run(count(shape, documents) * kv_heads, |task| {
        let Piece { queries, keys } = piece(shape, first, documents, task / kv_heads);
        let (kv_head, before) = (task % kv_heads, keys.len() - queries.len());
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.keys_across.pack(head(k, &keys, kv_heads, kv_head, head_dim).transposed());
            scratch.values.pack(head(v, &keys, kv_heads, kv_head, head_dim));
            for index in kv_head * group..(kv_head + 1) * group {
                let q = head(q, &queries, heads, index, head_dim);
                // A head's logarithms lie side by side.
                // SAFETY: a query head of a piece belongs to one task.
                let mut log_sum = log_sum
                    .as_ref()
                    .map(|log_sum| unsafe { log_sum.part(heads * queries.start, index, queries.len()) });
                for (query, count) in tiles(queries.len()) {
                    vectorized(
                        #[inline(always)]
                        || forward_tile(scratch, rows(&q, query, count), before + query, keys.len(), scale),
                    );
                    for row in 0..count {
                        let (largest, total) = scratch.softmax[row];
                        let token = queries.start + query + row;
                        // SAFETY: as above.
                        let out = unsafe { out.part(token * heads * head_dim, index, head_dim) };
                        let inverse = 1.0 / total;
                        for (out, &x) in out.iter_mut().zip(&scratch.tile[row * head_dim..]) {
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

/// Fills `tile` with Σ exp(score − largest)·value, and `softmax`, for queries that are the keys from
/// `first` on, of so many.
#[inline(always)]
fn forward_tile<T: Value>(scratch: &mut Scratch, q: Matrix<&[T]>, first: usize, keys: usize, scale: f32) {
    let Scratch { keys_across, values, scores, narrow, tile, softmax, .. } = scratch;
    let (alone, count, dim) = (Team::default(), q.rows, q.columns);
    let tile = take(tile, count * dim);
    softmax.clear();
    softmax.resize(count, (f32::NEG_INFINITY, 0.0));
    // Panels are cut between groups of rows alone. What a query does not see counts nothing.
    let end = (first + count).next_multiple_of(ROWS).min(keys);
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

pub(super) fn backward<T: Value>(
    team: &Team,
    [grad_q, grad_k, grad_v]: [&mut [T]; 3],
    saved: Saved<'_, T>,
    shape: AttentionShape,
    documents: Option<&Documents>,
) {
    if saved.out.is_empty() {
        return;
    }
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (group, scale) = (heads / kv_heads, scale(shape));
    let [grad_q, grad_k, grad_v] = [grad_q, grad_k, grad_v].map(Shared::new);
    team.run(count(shape, documents) * kv_heads, |task| {
        let tokens = piece(shape, 0, documents, task / kv_heads).queries;
        let kv_head = task % kv_heads;
        SCRATCH.with_borrow_mut(|scratch| {
            let [k, v] = [saved.k, saved.v].map(|data| head(data, &tokens, kv_heads, kv_head, head_dim));
            scratch.keys_across.pack(k.transposed());
            scratch.keys.pack(k);
            scratch.values.pack(v.transposed());
            take(&mut scratch.grad_keys, tokens.len() * head_dim).fill(0.0);
            take(&mut scratch.grad_values, tokens.len() * head_dim).fill(0.0);
            for index in kv_head * group..(kv_head + 1) * group {
                let of_head = |data| head(data, &tokens, heads, index, head_dim);
                let (q, out, grad_out) = (of_head(saved.q), of_head(saved.out), of_head(saved.grad_out));
                let log_sum = &saved.log_sum[heads * tokens.start + index * tokens.len()..][..tokens.len()];
                for (first, count) in tiles(tokens.len()) {
                    let queries = Queries {
                        first,
                        q: rows(&q, first, count),
                        out: rows(&out, first, count),
                        grad_out: rows(&grad_out, first, count),
                        log_sum: &log_sum[first..],
                        scale,
                    };
                    vectorized(
                        #[inline(always)]
                        || backward_tile(scratch, queries),
                    );
                    for row in 0..count {
                        let token = tokens.start + first + row;
                        // SAFETY: a query head of a piece belongs to one task.
                        let to = unsafe { grad_q.part(token * heads * head_dim, index, head_dim) };
                        T::round(to, &scratch.tile[row * head_dim..][..head_dim]);
                    }
                }
            }
            for (row, token) in tokens.enumerate() {
                let (start, of_row) = (token * kv_heads * head_dim, row * head_dim..(row + 1) * head_dim);
                // SAFETY: a key head of a piece is one task.
                let [to_k, to_v] = [&grad_k, &grad_v].map(|grad| unsafe { grad.part(start, kv_head, head_dim) });
                T::round(to_k, &scratch.grad_keys[of_row.clone()]);
                T::round(to_v, &scratch.grad_values[of_row]);
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
