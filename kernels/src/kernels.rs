//! The mathematics of a model: what a device needs to run one.
//!
//! Shapes are row-major. N = B·T is the number of tokens of a micro-batch (B sequences of T
//! tokens), C the width of the model, F that of the feed-forward layer, V the vocabulary, H the
//! query heads, K the key/value heads, D = C/H the width of a head.
//!
//! Types: where nothing else is said, activations and their gradients (A) are f32 or bf16, all of a
//! call alike; weights (W) are f32 or bf16; gradients of weights, sums and everything of the
//! residual stream are f32. What is bf16 is widened when it is read, computed with in f32, and
//! rounded to the nearest when it is written. A gradient written with `+=` accumulates; with `=` it
//! overwrites.
//!
//! Every function returns once the work is enqueued, and panics when shapes disagree: that is a
//! programmer's error.

use crate::{Documents, Stream, View, ViewMut};

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// B: sequences.
    pub batch: usize,
    /// T: tokens in a sequence.
    pub seq: usize,
    /// H: query heads.
    pub heads: usize,
    /// K: key and value heads; divides H.
    pub kv_heads: usize,
    /// D: width of a head, even.
    pub head_dim: usize,
}

/// A target of [`Kernels::cross_entropy`] that is none: the token before it is not to be learned.
pub const IGNORED: u32 = u32::MAX;

/// The mathematics of a model, on a stream.
pub trait Kernels: Stream {
    /// out\[n\] = table\[tokens\[n\]\]. `out: [N, C]` f32, `table: [V, C]` W, `tokens: [N]` u32
    /// below V.
    fn embedding(&self, out: ViewMut<'_>, table: View<'_>, tokens: View<'_>);

    /// grad_table\[tokens\[n\]\] += grad_out\[n\]. `grad_table: [V, C]`, `grad_out: [N, C]`,
    /// `tokens: [N]` u32.
    fn embedding_backward(&self, grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>);

    /// inverse_rms = 1/√(mean(x²) + ε), out = x · inverse_rms · weight (Zhang and Sennrich 2019).
    /// `out: [N, C]` A, `x: [N, C]` f32, `inverse_rms: [N]`, `weight: [C]` W.
    fn rms_norm(&self, out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32);

    /// grad_x += and grad_weight += the gradients of [`Kernels::rms_norm`] at grad_out. `grad_x,
    /// grad_out, x: [N, C]` f32, `grad_weight: [C]`, `weight: [C]` W, `inverse_rms: [N]`.
    fn rms_norm_backward(
        &self,
        grad_x: ViewMut<'_>,
        grad_weight: ViewMut<'_>,
        grad_out: View<'_>,
        x: View<'_>,
        inverse_rms: View<'_>,
        weight: View<'_>,
    );

    /// y = x · wᵀ, or addend + x · wᵀ. `y: [N, out]` f32 or bf16, with an addend f32; `x: [N, in]`
    /// A, `w: [out, in]` W; `addend: [N, out]` f32. Where both operands are bf16 the processor may
    /// multiply them as such.
    fn linear(&self, y: ViewMut<'_>, x: View<'_>, w: View<'_>, addend: Option<View<'_>>, rows: usize);

    /// grad_x = grad_y · w, or += if `accumulate`. `grad_x: [N, in]` f32 or bf16, to accumulate
    /// f32; `grad_y: [N, out]` A, `w: [out, in]` W.
    fn linear_backward_input(&self, grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool);

    /// grad_w += grad_yᵀ · x. `grad_w: [out, in]` f32; `grad_y: [N, out]`, `x: [N, in]` A.
    fn linear_backward_weight(&self, grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize);

    /// Rotates each head of each token by its position (Su et al. 2021), in Hugging Face's
    /// half-split convention: (xᵢ, xᵢ₊D/2) turns by the angle t·θᵢ; `inverse` turns back, which is
    /// also the gradient. `x: [B, T, heads, D]`, `cos, sin: [T, D/2]`.
    fn rope(&self, x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool);

    /// Causal grouped-query attention, softmax(q·kᵀ/√D)·v. `out, q: [B, T, H, D]`, `k, v: [B, T, K,
    /// D]`, `log_sum: [B, H, T]` keeps the logarithm of each row's sum of exponentials for the
    /// backward pass.
    ///
    /// With `documents`, a token sees its own document alone: the numbers are those of an attention
    /// over each document by itself. `log_sum` then has `[H, tokens]` for each document, one after
    /// the other. Rotary angles need no change, because scores depend on differences of positions
    /// alone.
    fn attention(
        &self,
        out: ViewMut<'_>,
        log_sum: ViewMut<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        shape: AttentionShape,
        documents: Option<&Documents>,
    );

    /// As [`Kernels::attention`], of the tokens from `first` on alone, for models that keep keys and
    /// values while they write. `out, q: [B, T − first, H, D]`, `k, v: [B, T, K, D]`.
    fn attention_from(
        &self,
        first: usize,
        out: ViewMut<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        shape: AttentionShape,
    );

    /// grad_q =, grad_k =, grad_v = the gradients of [`Kernels::attention`] at grad_out; shapes and
    /// documents as there.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        grad_q: ViewMut<'_>,
        grad_k: ViewMut<'_>,
        grad_v: ViewMut<'_>,
        grad_out: View<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        out: View<'_>,
        log_sum: View<'_>,
        shape: AttentionShape,
        documents: Option<&Documents>,
    );

    /// out = silu(gate) · up, silu(x) = x/(1+e⁻ˣ) (Shazeer 2020). All `[N, F]`.
    fn swiglu(&self, out: ViewMut<'_>, gate: View<'_>, up: View<'_>);

    /// grad_gate =, grad_up = the gradients of [`Kernels::swiglu`] at grad_out, and out = what it
    /// made: a caller need not have kept it. All `[N, F]`.
    fn swiglu_backward(
        &self,
        out: ViewMut<'_>,
        grad_gate: ViewMut<'_>,
        grad_up: ViewMut<'_>,
        grad_out: View<'_>,
        gate: View<'_>,
        up: View<'_>,
    );

    /// loss += Σₙ −log softmax(logits)\[n, targets\[n\]\]; then logits become the gradient of that
    /// sum, softmax(logits) − onehot(targets), or `rounded` does, and logits are undefined.
    /// `logits: [N, V]` f32, `rounded: [N, V]` A, `targets: [N]` u32 below V, `loss: [1]` f64, in
    /// nats. A row whose target is [`IGNORED`] has neither a loss nor a gradient.
    ///
    /// The gradient is that of loss + `z_loss` · Σₙ (log Σ exp(logits\[n\]))² (Chowdhery et al.
    /// 2023), of which `loss` has the first part alone.
    fn cross_entropy(
        &self,
        logits: ViewMut<'_>,
        rounded: Option<ViewMut<'_>>,
        targets: View<'_>,
        loss: ViewMut<'_>,
        z_loss: f32,
    );
}
