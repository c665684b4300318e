//! Causal grouped-query attention by matrix products, over blocks of queries of one sequence: no
//! more than one block's scores exist at a time, so memory grows with the sequence and not with its
//! square. A block of queries meets all its keys in one product, so no partial result is rescaled.
//!
//! The formulas are those of `cpu/attention.rs`. Heads that share keys and values are one product
//! each, one after the other, so sums over them have a fixed order.

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::super::CudaError;
use super::super::blas::{Gemm, Matrix, Places};
use super::super::launch::{Argument, Shape, launch};
use super::super::scratch::Pieces;
use super::super::stream::{BYTES_OF_BLOCK, CudaStream, ELEMENTS_OF_BLOCK, typed};
use super::{Backward, Forward, ForwardFrom, Piece, pieces, project, scale};
use crate::{AttentionShape, DType, Documents};

/// Most queries in a block.
const QUERIES: usize = 256;
/// Most scores in a block, over all heads.
const SCORES: usize = 1 << 24;

/// Queries in a block.
fn queries(shape: AttentionShape) -> usize {
    (SCORES / (shape.heads * shape.seq).max(1)).clamp(1, QUERIES).min(shape.seq)
}

/// Where the working memory of a forward pass over at most `most` queries at a time has its parts,
/// and how long it is.
fn forward_pieces(dtype: DType, shape: AttentionShape, most: usize) -> ([u64; 4], u64) {
    let AttentionShape { seq, heads, head_dim, .. } = shape;
    let mut pieces = Pieces::default();
    let scores = pieces.next(heads * most * seq, 4);
    let p = pieces.next(heads * most * seq, dtype.bytes());
    let tile = pieces.next(heads * most * head_dim, 4);
    let sums = pieces.next(heads * most, 4);
    ([scores, p, tile, sums], pieces.bytes())
}

/// The same of a backward pass.
fn backward_pieces(dtype: DType, shape: AttentionShape) -> ([u64; 7], u64) {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let (most, of_all_keys, mut pieces) = (queries(shape), seq * kv_heads * head_dim, Pieces::default());
    let scores = pieces.next(heads * most * seq, 4);
    let grad_p = pieces.next(heads * most * seq, 4);
    let p = pieces.next(heads * most * seq, dtype.bytes());
    let grad_scores = pieces.next(heads * most * seq, dtype.bytes());
    let grad_k = pieces.next(of_all_keys, 4);
    let grad_v = pieces.next(of_all_keys, 4);
    let projection = pieces.next(batch * heads * seq, 4);
    ([scores, grad_p, p, grad_scores, grad_k, grad_v, projection], pieces.bytes())
}

/// Bytes of working memory that a stream takes for attention of this shape.
pub(super) fn working_bytes(dtype: DType, shape: AttentionShape) -> u64 {
    forward_pieces(dtype, shape, queries(shape)).1 + backward_pieces(dtype, shape).1
}

/// What all steps of one call share.
struct Steps<'a> {
    on: &'a CudaStream,
    stream: CUstream,
    dtype: DType,
    shape: AttentionShape,
    scale: f32,
}

/// Some queries: those of the tokens from `first` on, which see `keys` keys.
#[derive(Clone, Copy)]
struct Block {
    /// Where the first of them lies in the queries' tensor.
    place: usize,
    first: usize,
    rows: usize,
    keys: usize,
}

/// The blocks of at most `most` queries of the tokens from `from` on.
fn blocks(shape: AttentionShape, from: usize, most: usize) -> impl Iterator<Item = Block> {
    (from..shape.seq).step_by(most).map(move |first| {
        let rows = most.min(shape.seq - first);
        Block { place: first - from, first, rows, keys: first + rows }
    })
}

/// A matrix for each key head, which belongs to the key head or to one query head of its group.
struct Operand {
    /// Where the matrix of the first query head starts.
    at: CUdeviceptr,
    /// Bytes from it to the matrix of the next query head of the group.
    of_head: u64,
    matrix: Matrix,
}

impl Operand {
    fn transposed(self) -> Operand {
        Operand { matrix: self.matrix.transposed(), ..self }
    }
}

impl Steps<'_> {
    fn launch(&self, kernels: [&str; 2], shape: Shape, arguments: &[Argument]) -> Result<(), CudaError> {
        let (context, latch) = (&self.on.inner.context, self.on.inner.latch.address());
        // SAFETY: each caller names the arguments; memory is lent by the views of the call, or is
        // this stream's working memory.
        unsafe { launch(context, self.stream, kernels[typed(self.dtype)], shape, latch, arguments) }
    }

    /// out = scale · left · right, or += if `accumulate`. The query heads that are number 0 in
    /// their groups are one product, then those that are number 1, and so on: what they add to the
    /// same keys, they add in this order.
    fn product(
        &self,
        out: Operand,
        left: Operand,
        right: Operand,
        accumulate: bool,
        scale: f32,
    ) -> Result<(), CudaError> {
        (0..self.group() as u64).try_for_each(|member| {
            let [out_at, left_at, right_at] =
                [&out, &left, &right].map(|operand| operand.at + member * operand.of_head);
            let start = accumulate.then_some(out_at);
            let places = Places { out: out_at, left: left_at, right: right_at, start };
            let (batch, alignment) = (self.shape.kv_heads, places.alignment());
            let gemm = Gemm { out: out.matrix, left: left.matrix, right: right.matrix, batch, alignment };
            // SAFETY: the operands below describe tensors that the call's views lend, with shapes
            // that it has checked, and pieces of this stream's working memory.
            unsafe { self.on.products.borrow_mut().run(&self.on.inner, self.stream, gemm, places, scale) }
        })
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// The rows of a block in a tensor `[T, H, D]`.
    fn queries(&self, tensor: CUdeviceptr, block: Block) -> Operand {
        let AttentionShape { heads, head_dim, .. } = self.shape;
        let (stride, batch_stride) = (heads * head_dim, self.group() * head_dim);
        let matrix = Matrix { stride, batch_stride, ..Matrix::dense(self.dtype, block.rows, head_dim) };
        let bytes = self.dtype.bytes();
        Operand { at: tensor + (bytes * block.place * stride) as u64, of_head: (bytes * head_dim) as u64, matrix }
    }

    /// The keys of a block in a tensor `[T, K, D]`.
    fn keys(&self, dtype: DType, tensor: CUdeviceptr, block: Block) -> Operand {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let (stride, batch_stride) = (kv_heads * head_dim, head_dim);
        let matrix = Matrix { stride, batch_stride, ..Matrix::dense(dtype, block.keys, head_dim) };
        Operand { at: tensor, of_head: 0, matrix }
    }

    /// `[H, rows, columns]`.
    fn heads(&self, dtype: DType, at: CUdeviceptr, rows: usize, columns: usize) -> Operand {
        let batch_stride = self.group() * rows * columns;
        let matrix = Matrix { batch_stride, ..Matrix::dense(dtype, rows, columns) };
        Operand { at, of_head: (dtype.bytes() * rows * columns) as u64, matrix }
    }

    /// out = scale · left · rightᵀ, `[H, rows, keys]`: scores, or gradients of them.
    fn scores(
        &self,
        out: CUdeviceptr,
        left: CUdeviceptr,
        right: CUdeviceptr,
        block: Block,
        scale: f32,
    ) -> Result<(), CudaError> {
        let out = self.heads(DType::F32, out, block.rows, block.keys);
        let right = self.keys(self.dtype, right, block).transposed();
        self.product(out, self.queries(left, block), right, false, scale)
    }

    /// sum += scale · leftᵀ · x, `[keys, K, D]` f32: gradients of keys or values. `left: [H, rows,
    /// keys]`.
    fn add_to_keys(
        &self,
        sum: CUdeviceptr,
        left: CUdeviceptr,
        x: CUdeviceptr,
        block: Block,
        scale: f32,
    ) -> Result<(), CudaError> {
        let left = self.heads(self.dtype, left, block.rows, block.keys).transposed();
        self.product(self.keys(DType::F32, sum, block), left, self.queries(x, block), true, scale)
    }
}

pub(super) fn forward(
    on: &CudaStream,
    stream: CUstream,
    tensors: Forward,
    dtype: DType,
    shape: AttentionShape,
    documents: Option<&Documents>,
) -> Result<(), CudaError> {
    let most = queries(shape);
    let (working, bytes) = forward_pieces(dtype, shape, most);
    let start = on.scratch.take(&on.inner, bytes)?;
    let working = working.map(|piece| start + piece);
    // A document has no more keys than its sequence, so its blocks fit into the same memory.
    pieces(shape, documents).try_for_each(|Piece { token, shape }| {
        let Forward { out, log_sum, q, k, v } = tensors.at(token, dtype, shape);
        forward_into(on, stream, ForwardFrom { first: 0, out, q, k, v }, log_sum, working, most, dtype, shape)
    })
}

/// Queries in a block of [`forward_from`], of which there are so many.
fn queries_from(shape: AttentionShape, count: usize) -> usize {
    queries(shape).min(count)
}

/// Bytes of working memory that [`forward_from`] takes for at most `count` tokens: twice what a call
/// takes, because a text grows with each call and the stream keeps what it took before.
pub(in crate::cuda) fn working_bytes_from(dtype: DType, shape: AttentionShape, count: usize) -> u64 {
    2 * taken_from(dtype, shape, count)
}

/// A power of two, so that a text that grows takes more memory only now and then.
fn taken_from(dtype: DType, shape: AttentionShape, count: usize) -> u64 {
    let log_sums = 4 * (shape.batch * shape.heads * shape.seq) as u64;
    (forward_pieces(dtype, shape, queries_from(shape, count)).1 + log_sums).next_power_of_two()
}

/// Attention of the tokens from `first` on, whatever the type and the shape.
pub(in crate::cuda) fn forward_from(
    on: &CudaStream,
    stream: CUstream,
    tensors: ForwardFrom,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    let count = shape.seq - tensors.first;
    let most = queries_from(shape, count);
    let (pieces, working) = forward_pieces(dtype, shape, most);
    let start = on.scratch.take(&on.inner, taken_from(dtype, shape, count))?;
    // Nobody reads the logarithms.
    let log_sum = start + working;
    forward_into(on, stream, tensors, log_sum, pieces.map(|piece| start + piece), most, dtype, shape)
}

/// Over blocks of at most `most` queries.
fn forward_into(
    on: &CudaStream,
    stream: CUstream,
    tensors: ForwardFrom,
    log_sums: CUdeviceptr,
    [scores, p, tile, sums]: [CUdeviceptr; 4],
    most: usize,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let steps = Steps { on, stream, dtype, shape, scale: scale(shape) };
    let (bytes, from) = (dtype.bytes(), tensors.first);
    for sequence in 0..batch {
        let of_queries = (bytes * sequence * (seq - from) * heads * head_dim) as u64;
        let of_keys = (bytes * sequence * seq * kv_heads * head_dim) as u64;
        let log_sum = log_sums + (4 * sequence * heads * seq) as u64;
        for block in blocks(shape, from, most) {
            let Block { place, first, rows, keys } = block;
            let [rows_, keys_, first_, seq_] = [rows, keys, first, seq].map(|size| Argument::from(size as u32));
            steps.scores(scores, tensors.q + of_queries, tensors.k + of_keys, block, steps.scale)?;
            let softmax = ["attention_softmax_f32", "attention_softmax_bf16"];
            let arguments = [p.into(), sums.into(), log_sum.into(), scores.into(), rows_, keys_, first_, seq_];
            steps.launch(softmax, Shape::grid(rows, heads), &arguments)?;
            let out = steps.heads(DType::F32, tile, rows, head_dim);
            let (left, right) = (steps.heads(dtype, p, rows, keys), steps.keys(dtype, tensors.v + of_keys, block));
            steps.product(out, left, right, false, 1.0)?;
            let output = ["attention_output_f32", "attention_output_bf16"];
            let [rows_, heads_, dim_, place_] = [rows, heads, head_dim, place].map(|size| Argument::from(size as u32));
            let out = tensors.out + of_queries;
            let arguments = [out.into(), tile.into(), sums.into(), rows_, heads_, dim_, place_];
            steps.launch(output, Shape::blocks(rows), &arguments)?;
        }
    }
    Ok(())
}

pub(super) fn backward(
    on: &CudaStream,
    stream: CUstream,
    tensors: Backward,
    dtype: DType,
    shape: AttentionShape,
    documents: Option<&Documents>,
) -> Result<(), CudaError> {
    let most = queries(shape);
    let (working, bytes) = backward_pieces(dtype, shape);
    let start = on.scratch.take(&on.inner, bytes)?;
    let working = working.map(|piece| start + piece);
    pieces(shape, documents).try_for_each(|Piece { token, shape }| {
        backward_with(on, stream, tensors.at(token, dtype, shape), working, most, dtype, shape)
    })
}

/// Over blocks of at most `most` queries.
fn backward_with(
    on: &CudaStream,
    stream: CUstream,
    tensors: Backward,
    [scores, grad_p, p, grad_scores, grad_k, grad_v, projection]: [CUdeviceptr; 7],
    most: usize,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    let steps = Steps { on, stream, dtype, shape, scale: scale(shape) };
    let (bytes, of_all_keys) = (dtype.bytes(), seq * kv_heads * head_dim);
    let seq_ = Argument::from(seq as u32);
    project(on, stream, projection, &tensors, dtype, shape)?;
    for sequence in 0..batch {
        let of_queries = (bytes * sequence * seq * heads * head_dim) as u64;
        let of_keys = (bytes * sequence * of_all_keys) as u64;
        let of_rows = (4 * sequence * heads * seq) as u64;
        for sum in [grad_k, grad_v] {
            let bytes = 4 * of_all_keys;
            let shape = Shape::for_elements(bytes, BYTES_OF_BLOCK);
            steps.launch(["zero"; 2], shape, &[sum.into(), (bytes as u64).into()])?;
        }
        for block in blocks(shape, 0, most) {
            let Block { first, rows, keys, .. } = block;
            let (q, grad_out) = (tensors.q + of_queries, tensors.grad_out + of_queries);
            steps.scores(scores, q, tensors.k + of_keys, block, steps.scale)?;
            steps.scores(grad_p, grad_out, tensors.v + of_keys, block, 1.0)?;
            let [rows_, keys_, first_] = [rows, keys, first].map(|size| Argument::from(size as u32));
            let arguments = [
                p.into(),
                grad_scores.into(),
                scores.into(),
                grad_p.into(),
                (tensors.log_sum + of_rows).into(),
                (projection + of_rows).into(),
                rows_,
                keys_,
                first_,
                seq_,
            ];
            let gradient = ["attention_gradient_f32", "attention_gradient_bf16"];
            steps.launch(gradient, Shape::grid(rows, heads), &arguments)?;
            let (out, left) =
                (steps.queries(tensors.grad_q + of_queries, block), steps.heads(dtype, grad_scores, rows, keys));
            let right = steps.keys(dtype, tensors.k + of_keys, block);
            steps.product(out, left, right, false, steps.scale)?;
            steps.add_to_keys(grad_v, p, grad_out, block, 1.0)?;
            steps.add_to_keys(grad_k, grad_scores, q, block, steps.scale)?;
        }
        for (to, sum) in [(tensors.grad_k, grad_k), (tensors.grad_v, grad_v)] {
            let (to, len) = (to + of_keys, of_all_keys);
            let (each, count) = if dtype == DType::F32 { (BYTES_OF_BLOCK, 4 * len) } else { (ELEMENTS_OF_BLOCK, len) };
            let arguments = [to.into(), sum.into(), (count as u64).into()];
            steps.launch(["copy", "cast_f32_bf16"], Shape::for_elements(count, each), &arguments)?;
        }
    }
    Ok(())
}
