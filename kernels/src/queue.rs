//! What a queue can run: the contract that every device fulfils.
//!
//! Shapes are row-major. N = B·T is the number of tokens of a micro-batch (B sequences of T tokens), C the width of the model, F that of
//! the feed-forward layer, V the vocabulary, H the query heads, K the key/value heads, D = C/H the width of a head.
//!
//! Types: where nothing else is said, activations and their gradients (A) are f32 or bf16, all of a call alike; weights (W) are f32 or
//! bf16; gradients of weights, sums and everything of the residual stream are f32. What is bf16 is widened when it is read, computed with
//! in f32, and rounded to the nearest when it is written. A gradient written with `+=` accumulates; with `=` it overwrites.
//!
//! Every function returns once the work is enqueued, and panics when shapes disagree: that is a programmer's error.

use crate::{DType, Element, Event, Failure, View, ViewMut};

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

/// Settings of one AdamW update (Loshchilov and Hutter 2019, algorithm 2, with the schedule inside `lr`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay; 0 for tensors that do not decay.
    pub weight_decay: f32,
    /// Number of this update, from 1, for bias correction.
    pub step: u64,
    /// Factor on the gradient: clipping and averaging in one.
    pub gradient_scale: f32,
}

/// An ordered stream of work on one device.
///
/// # Safety
/// Whoever lends memory to an operation in flight trusts a queue with it: work that is enqueued
/// after [`Queue::wait_for`] must not touch any memory before the event has happened, nor ever if
/// the event fails. An event of [`Queue::record`] must not end before all work enqueued earlier has
/// finished with its memory, and must fail if any of that work could not run.
pub unsafe trait Queue: Send {
    /// An event that happens once everything enqueued so far has run. It fails if this queue waits
    /// for an event that fails.
    fn record(&self) -> Event;

    /// Work enqueued from now on runs after `event`. On a device that runs work at once this blocks until then.
    ///
    /// If the event fails, this queue runs no more work: everything that is enqueued from now on
    /// comes after the failure.
    fn wait_for(&self, event: &Event);

    /// Blocks the host until everything enqueued so far has run.
    ///
    /// # Errors
    /// The failure of the first event that this queue waited for and that failed.
    fn synchronize(&self) -> Result<(), Failure> {
        self.record().wait()
    }

    /// Copies bytes of the host into `out`: exactly its size.
    fn upload_bytes(&self, out: ViewMut<'_>, bytes: &[u8]);

    /// Copies `x` to the host, after everything enqueued before; blocks until then. `out` has exactly its size.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`]; `out` is then unchanged.
    fn read_bytes(&self, x: View<'_>, out: &mut [u8]) -> Result<(), Failure>;

    /// out = 0.
    fn zero(&self, out: ViewMut<'_>);

    /// out = x, rounded to the nearest even where `out` is narrower. f32 ↔ bf16, or equal types.
    fn cast(&self, out: ViewMut<'_>, x: View<'_>);

    /// out\[0\] = weight · Σ xᵢ² over the finite xᵢ, out\[1\] = number of non-finite xᵢ. `out: [2]` f64, `x: [n]` f32 or bf16. Products and sums are f64.
    fn square_norm(&self, out: ViewMut<'_>, x: View<'_>, weight: f64);

    /// out\[n\] = table\[tokens\[n\]\]. `out: [N, C]` f32, `table: [V, C]` W, `tokens: [N]` u32 below V.
    fn embedding(&self, out: ViewMut<'_>, table: View<'_>, tokens: View<'_>);

    /// grad_table\[tokens\[n\]\] += grad_out\[n\]. `grad_table: [V, C]`, `grad_out: [N, C]`, `tokens: [N]` u32.
    fn embedding_backward(&self, grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>);

    /// inverse_rms = 1/√(mean(x²) + ε), out = x · inverse_rms · weight (Zhang and Sennrich 2019).
    /// `out: [N, C]` A, `x: [N, C]` f32, `inverse_rms: [N]`, `weight: [C]` W.
    fn rms_norm(&self, out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32);

    /// grad_x += and grad_weight += the gradients of [`Queue::rms_norm`] at grad_out. `grad_x, grad_out, x: [N, C]` f32,
    /// `grad_weight: [C]`, `weight: [C]` W, `inverse_rms: [N]`.
    fn rms_norm_backward(
        &self,
        grad_x: ViewMut<'_>,
        grad_weight: ViewMut<'_>,
        grad_out: View<'_>,
        x: View<'_>,
        inverse_rms: View<'_>,
        weight: View<'_>,
    );

    /// y = x · wᵀ, or addend + x · wᵀ. `y: [N, out]` f32 or bf16, with an addend f32; `x: [N, in]` A, `w: [out, in]` W;
    /// `addend: [N, out]` f32. Where both operands are bf16 the processor may multiply them as such.
    fn linear(&self, y: ViewMut<'_>, x: View<'_>, w: View<'_>, addend: Option<View<'_>>, rows: usize);

    /// grad_x = grad_y · w, or += if `accumulate`. `grad_x: [N, in]` f32 or bf16, to accumulate f32; `grad_y: [N, out]` A,
    /// `w: [out, in]` W.
    fn linear_backward_input(&self, grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool);

    /// grad_w += grad_yᵀ · x. `grad_w: [out, in]` f32; `grad_y: [N, out]`, `x: [N, in]` A.
    fn linear_backward_weight(&self, grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize);

    /// Rotates each head of each token by its position (Su et al. 2021), in Hugging Face's half-split convention:
    /// (xᵢ, xᵢ₊D/2) turns by the angle t·θᵢ; `inverse` turns back, which is also the gradient. `x: [B, T, heads, D]`, `cos, sin: [T, D/2]`.
    fn rope(&self, x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool);

    /// Causal grouped-query attention, softmax(q·kᵀ/√D)·v. `out, q: [B, T, H, D]`, `k, v: [B, T, K, D]`, `log_sum: [B, H, T]` keeps the
    /// logarithm of each row's sum of exponentials for the backward pass.
    fn attention(
        &self,
        out: ViewMut<'_>,
        log_sum: ViewMut<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        shape: AttentionShape,
    );

    /// grad_q =, grad_k =, grad_v = the gradients of [`Queue::attention`] at grad_out; shapes as there.
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
    );

    /// out = silu(gate) · up, silu(x) = x/(1+e⁻ˣ) (Shazeer 2020). All `[N, F]`.
    fn swiglu(&self, out: ViewMut<'_>, gate: View<'_>, up: View<'_>);

    /// grad_gate =, grad_up = the gradients of [`Queue::swiglu`] at grad_out, and out = what it made: a caller need not have kept it.
    /// All `[N, F]`.
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
    /// nats.
    fn cross_entropy(&self, logits: ViewMut<'_>, rounded: Option<ViewMut<'_>>, targets: View<'_>, loss: ViewMut<'_>);

    /// One AdamW update in one pass: with g = gradient_scale · grad,
    /// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², master ← master·(1 − lr·decay) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε),
    /// and `weights`, if given, ← master, rounded to its type. All `[n]`; `weights` and `grad` f32 or bf16, the others f32.
    fn adamw(
        &self,
        weights: Option<ViewMut<'_>>,
        master: ViewMut<'_>,
        m: ViewMut<'_>,
        v: ViewMut<'_>,
        grad: View<'_>,
        settings: AdamW,
    );
}

impl dyn Queue + '_ {
    /// Copies `data` into `out`: same type, same length.
    pub fn upload<T: Element>(&self, out: ViewMut<'_>, data: &[T]) {
        check(out.dtype(), out.len(), T::DTYPE, data.len());
        self.upload_bytes(out, bytemuck::cast_slice(data));
    }

    /// out += data, added up on the host: for gradients that something else than kernels has computed. Same type, same length; blocks until
    /// everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`].
    pub fn accumulate<T: Element + std::ops::AddAssign>(
        &self,
        mut out: ViewMut<'_>,
        data: &[T],
    ) -> Result<(), Failure> {
        check(out.dtype(), out.len(), T::DTYPE, data.len());
        let mut sums: Vec<T> = self.download(out.as_view())?;
        sums.iter_mut().zip(data).for_each(|(sum, &value)| *sum += value);
        self.upload(out.reborrow(), &sums);
        Ok(())
    }

    /// Copies `x` to the host; blocks until everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`].
    pub fn download<T: Element>(&self, x: View<'_>) -> Result<Vec<T>, Failure> {
        let mut data = vec![T::zeroed(); x.len()];
        self.read(x, &mut data)?;
        Ok(data)
    }

    /// The bytes of `x`, copied to the host; blocks until everything enqueued before has run.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`].
    pub fn download_bytes(&self, x: View<'_>) -> Result<Vec<u8>, Failure> {
        let mut data = vec![0; x.len() * x.dtype().bytes()];
        self.read_bytes(x, &mut data)?;
        Ok(data)
    }

    /// As [`Queue::download`], into memory of the caller's: same type, same length.
    ///
    /// # Errors
    /// As for [`Queue::synchronize`].
    ///
    /// [`Queue::download`]: #method.download
    pub fn read<T: Element>(&self, x: View<'_>, out: &mut [T]) -> Result<(), Failure> {
        check(x.dtype(), x.len(), T::DTYPE, out.len());
        self.read_bytes(x, bytemuck::cast_slice_mut(out))
    }
}

fn check(dtype: DType, len: usize, host_dtype: DType, host_len: usize) {
    assert!(dtype == host_dtype && len == host_len, "a transfer between {len} × {dtype} and {host_len} × {host_dtype}");
}
