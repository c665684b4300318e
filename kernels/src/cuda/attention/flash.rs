//! Attention by `kernels/cuda/flash_attention.cu`.

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::super::CudaError;
use super::super::launch::{Argument, Shape, launch};
use super::super::scratch::Pieces;
use super::super::stream::CudaStream;
use super::{Backward, Forward, project, scale};
use crate::{AttentionShape, DType};

/// Threads of a block.
const BLOCK: u32 = 128;
/// Queries that a block of the forward pass owns.
const QUERIES: usize = 128;
/// Keys or queries that a block of the backward pass owns.
const TILE: usize = 64;

/// Bytes of dynamic shared memory that each kernel asks for: six tiles of 64 rows, and for the
/// gradients of keys two numbers for each of 128 queries.
pub(in super::super) const SHARED: [(&str, usize); 6] = [
    ("flash_attention_64", 768 * 64),
    ("flash_attention_128", 768 * 128),
    ("flash_attention_keys_64", 768 * 64 + 1024),
    ("flash_attention_keys_128", 768 * 128 + 1024),
    ("flash_attention_queries_64", 768 * 64),
    ("flash_attention_queries_128", 768 * 128),
];

/// The numbers in [`SHARED`] of the kernels for this head size: forward, keys, queries.
fn kernels(shape: AttentionShape) -> [(&'static str, usize); 3] {
    let wide = usize::from(shape.head_dim == 128);
    [SHARED[wide], SHARED[2 + wide], SHARED[4 + wide]]
}

/// Whether kernels of this file compute it.
pub(super) fn serves(dtype: DType, shape: AttentionShape) -> bool {
    dtype == DType::Bf16 && [64, 128].contains(&shape.head_dim)
}

/// Where the working memory of a backward pass has the projections, and how long it is.
fn pieces(shape: AttentionShape) -> (u64, u64) {
    let mut pieces = Pieces::default();
    (pieces.next(shape.batch * shape.heads * shape.seq, 4), pieces.bytes())
}

/// Bytes of working memory that a stream takes for attention of this shape.
pub(super) fn working_bytes(shape: AttentionShape) -> u64 {
    pieces(shape).1
}

/// Enqueues a kernel, a block for each `rows` rows of each of `heads` heads.
///
/// # Safety
/// The arguments are those of the kernel.
unsafe fn enqueue<const N: usize>(
    on: &CudaStream,
    stream: CUstream,
    (kernel, shared): (&str, usize),
    [rows, heads]: [usize; 2],
    shape: AttentionShape,
    arguments: [Argument; N],
) -> Result<(), CudaError> {
    let (context, latch) = (&on.inner.context, on.inner.latch.address());
    let blocks = Shape::blocks(shape.seq.div_ceil(rows) * heads * shape.batch).with_threads(BLOCK).with_shared(shared);
    // SAFETY: the caller's promise.
    unsafe { launch(context, stream, kernel, blocks, latch, &arguments) }
}

/// The arguments with which each kernel ends: seq, heads, kv_heads, scale.
fn sizes(shape: AttentionShape) -> [Argument; 4] {
    let AttentionShape { seq, heads, kv_heads, .. } = shape;
    [(seq as u32).into(), (heads as u32).into(), (kv_heads as u32).into(), scale(shape).into()]
}

pub(super) fn forward(
    on: &CudaStream,
    stream: CUstream,
    tensors: &Forward,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    let [out, log_sum, q, k, v] = [tensors.out, tensors.log_sum, tensors.q, tensors.k, tensors.v].map(Argument::from);
    let [seq, heads, kv_heads, scale] = sizes(shape);
    let arguments = [out, log_sum, q, k, v, seq, heads, kv_heads, scale];
    // SAFETY: flash_attention(out, log_sum, q, k, v, seq, heads, kv_heads, scale); the views of the
    // call lend these tensors, whose shapes it has checked.
    unsafe { enqueue(on, stream, kernels(shape)[0], [QUERIES, shape.heads], shape, arguments) }
}

/// Where the stream's working memory has the projections of a backward pass of this shape, and of
/// any part of it.
pub(super) fn projection(on: &CudaStream, shape: AttentionShape) -> Result<CUdeviceptr, CudaError> {
    let (projection, working) = pieces(shape);
    Ok(on.scratch.take(&on.inner, working)? + projection)
}

pub(super) fn backward(
    on: &CudaStream,
    stream: CUstream,
    tensors: &Backward,
    projection: CUdeviceptr,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    project(on, stream, projection, tensors, DType::Bf16, shape)?;
    let [grad_q, grad_k, grad_v] = [tensors.grad_q, tensors.grad_k, tensors.grad_v].map(Argument::from);
    let [grad_out, q, k, v] = [tensors.grad_out, tensors.q, tensors.k, tensors.v].map(Argument::from);
    let [log_sum, projection] = [tensors.log_sum, projection].map(Argument::from);
    let [seq, heads, kv_heads, scale] = sizes(shape);
    let [_, of_keys, of_queries] = kernels(shape);
    let arguments = [grad_k, grad_v, grad_out, q, k, v, log_sum, projection, seq, heads, kv_heads, scale];
    // SAFETY: flash_attention_keys(grad_k, grad_v, grad_out, q, k, v, log_sum, projection, seq,
    // heads, kv_heads, scale); the views of the call lend these tensors, and the projection is the
    // stream's working memory.
    unsafe { enqueue(on, stream, of_keys, [TILE, shape.kv_heads], shape, arguments)? };
    let arguments = [grad_q, grad_out, q, k, v, log_sum, projection, seq, heads, kv_heads, scale];
    // SAFETY: flash_attention_queries(grad_q, grad_out, q, k, v, log_sum, projection, seq, heads,
    // kv_heads, scale); as above.
    unsafe { enqueue(on, stream, of_queries, [TILE, shape.heads], shape, arguments) }
}
