//! Causal grouped-query attention: by kernels of our own where they exist, else by matrix products.

mod flash;
mod products;

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::CudaError;
use super::launch::{Shape, launch};
use super::stream::{CudaStream, typed};
use crate::{AttentionShape, DType, Documents};
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

impl Forward {
    /// The tensors from a token on.
    fn at(&self, token: usize, dtype: DType, shape: AttentionShape) -> Forward {
        let [queries, keys, of_heads] = offsets(token, dtype, shape);
        Forward {
            out: self.out + queries,
            log_sum: self.log_sum + of_heads,
            q: self.q + queries,
            k: self.k + keys,
            v: self.v + keys,
        }
    }
}

impl Backward {
    /// The tensors from a token on.
    fn at(&self, token: usize, dtype: DType, shape: AttentionShape) -> Backward {
        let [queries, keys, of_heads] = offsets(token, dtype, shape);
        Backward {
            grad_q: self.grad_q + queries,
            grad_k: self.grad_k + keys,
            grad_v: self.grad_v + keys,
            grad_out: self.grad_out + queries,
            q: self.q + queries,
            k: self.k + keys,
            v: self.v + keys,
            out: self.out + queries,
            log_sum: self.log_sum + of_heads,
        }
    }
}

/// Bytes before a token in tensors of queries, of keys, and of one f32 for each query head.
fn offsets(token: usize, dtype: DType, shape: AttentionShape) -> [u64; 3] {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let width = dtype.bytes() * head_dim;
    [width * heads, width * kv_heads, 4 * heads].map(|bytes| (token * bytes) as u64)
}

/// Tokens that see each other, from a token on: all sequences, or one document.
struct Piece {
    token: usize,
    shape: AttentionShape,
}

/// What is launched one after the other: the documents, or everything at once.
fn pieces(shape: AttentionShape, documents: Option<&Documents>) -> impl Iterator<Item = Piece> {
    (0..documents.map_or(1, Documents::len)).map(move |index| match documents {
        None => Piece { token: 0, shape },
        Some(documents) => {
            let tokens = documents.tokens(index);
            Piece { token: tokens.start, shape: AttentionShape { batch: 1, seq: tokens.len(), ..shape } }
        }
    })
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
    documents: Option<&Documents>,
) -> Result<(), CudaError> {
    match on.inner.context.attention.serving(dtype, shape) {
        Attention::Flash => pieces(shape, documents)
            .try_for_each(|Piece { token, shape }| flash::forward(on, stream, &tensors.at(token, dtype, shape), shape)),
        Attention::Products => products::forward(on, stream, tensors, dtype, shape, documents),
    }
}

pub(super) fn backward(
    on: &CudaStream,
    stream: CUstream,
    tensors: Backward,
    dtype: DType,
    shape: AttentionShape,
    documents: Option<&Documents>,
) -> Result<(), CudaError> {
    match on.inner.context.attention.serving(dtype, shape) {
        Attention::Flash => {
            let projection = flash::projection(on, shape)?;
            pieces(shape, documents).try_for_each(|Piece { token, shape }| {
                flash::backward(on, stream, &tensors.at(token, dtype, shape), projection, shape)
            })
        }
        Attention::Products => products::backward(on, stream, tensors, dtype, shape, documents),
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
