//! Causal grouped-query attention: by kernels of our own where they exist, else by matrix products.

mod flash;
mod products;

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::CudaError;
use super::launch::{Shape, launch};
use super::stream::{CudaStream, typed};
use crate::{AttentionShape, DType};
pub(super) use flash::SHARED;
pub(super) use products::{forward_from, working_bytes_from};

/// How a GPU computes attention. PILLION_ATTENTION=products chooses the second way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// By kernels that keep the scores in registers, for bf16 and heads of 64 or 128 elements.
    /// Other types and sizes have no such kernels, and go by products.
    Flash,
    /// By matrix products over blocks of queries: the reference.
    Products,
}

impl Attention {
    /// What PILLION_ATTENTION says: `flash`, which is the default, or `products`.
    ///
    /// # Errors
    /// For other values.
    pub(super) fn wanted() -> Result<Attention, CudaError> {
        match std::env::var_os("PILLION_ATTENTION") {
            None => Ok(Attention::Flash),
            Some(name) if name.is_empty() || name == "flash" => Ok(Attention::Flash),
            Some(name) if name == "products" => Ok(Attention::Products),
            Some(name) => Err(CudaError::Attention { wanted: name.to_string_lossy().into_owned() }),
        }
    }

    /// What serves this type and shape.
    pub(super) fn serving(self, dtype: DType, shape: AttentionShape) -> Attention {
        if flash::serves(dtype, shape) { self } else { Attention::Products }
    }
}

pub(super) struct Forward {
    pub(super) out: CUdeviceptr,
    pub(super) log_sum: CUdeviceptr,
    pub(super) q: CUdeviceptr,
    pub(super) k: CUdeviceptr,
    pub(super) v: CUdeviceptr,
}

/// Of the tokens from `first` on alone.
pub(super) struct ForwardFrom {
    pub(super) first: usize,
    pub(super) out: CUdeviceptr,
    pub(super) q: CUdeviceptr,
    pub(super) k: CUdeviceptr,
    pub(super) v: CUdeviceptr,
}

pub(super) struct Backward {
    pub(super) grad_q: CUdeviceptr,
    pub(super) grad_k: CUdeviceptr,
    pub(super) grad_v: CUdeviceptr,
    pub(super) grad_out: CUdeviceptr,
    pub(super) q: CUdeviceptr,
    pub(super) k: CUdeviceptr,
    pub(super) v: CUdeviceptr,
    pub(super) out: CUdeviceptr,
    pub(super) log_sum: CUdeviceptr,
}

/// Bytes of working memory that a stream takes for attention of this shape.
///
/// Where PILLION_ATTENTION is wrong, that of products, which take more: opening a GPU reports it.
pub(super) fn working_bytes(dtype: DType, shape: AttentionShape) -> u64 {
    match Attention::wanted().unwrap_or(Attention::Products).serving(dtype, shape) {
        Attention::Flash => flash::working_bytes(shape),
        Attention::Products => products::working_bytes(dtype, shape),
    }
}

pub(super) fn forward(
    on: &CudaStream,
    stream: CUstream,
    tensors: Forward,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    match on.inner.context.attention.serving(dtype, shape) {
        Attention::Flash => flash::forward(on, stream, &tensors, shape),
        Attention::Products => products::forward(on, stream, tensors, dtype, shape),
    }
}

pub(super) fn backward(
    on: &CudaStream,
    stream: CUstream,
    tensors: Backward,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    match on.inner.context.attention.serving(dtype, shape) {
        Attention::Flash => flash::backward(on, stream, &tensors, shape),
        Attention::Products => products::backward(on, stream, tensors, dtype, shape),
    }
}

/// What scores are multiplied with.
fn scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

/// Heads of tokens whose projections a block of threads computes.
const ROWS_OF_BLOCK: usize = 32;

/// projection = rowsum(grad_out ∘ out), `[batch, heads, seq]`.
fn project(
    on: &CudaStream,
    stream: CUstream,
    projection: CUdeviceptr,
    tensors: &Backward,
    dtype: DType,
    shape: AttentionShape,
) -> Result<(), CudaError> {
    let AttentionShape { batch, seq, heads, head_dim, .. } = shape;
    let (context, latch) = (&on.inner.context, on.inner.latch.address());
    let kernel = ["attention_projection_f32", "attention_projection_bf16"][typed(dtype)];
    let arguments = [
        projection.into(),
        tensors.grad_out.into(),
        tensors.out.into(),
        ((batch * seq) as u64).into(),
        (seq as u32).into(),
        (heads as u32).into(),
        (head_dim as u32).into(),
    ];
    let blocks = Shape::for_elements(batch * seq * heads, ROWS_OF_BLOCK);
    // SAFETY: attention_projection(projection, grad_out, out, tokens, seq, heads, dim); the views of
    // the call lend the tensors, and the projection is the stream's working memory.
    unsafe { launch(context, stream, kernel, blocks, latch, &arguments) }
}
