//! The mathematics of a model on a GPU: checks shapes, and enqueues.

use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::blas::{Gemm, Matrix, Places};
use super::launch::{Argument, Shape, address, address_mut, launch};
use super::scratch::Pieces;
use super::stream::{CudaStream, ELEMENTS_OF_BLOCK, typed};
use super::{CudaError, attention};
use crate::shapes::{self, check_attention, check_attention_from, check_documents, columns, rows, same, same_type};
use crate::{AttentionShape, DType, Documents, Kernels, View, ViewMut};

/// Elements of which a block computes SwiGLU.
const SWIGLU_OF_BLOCK: usize = 4096;
/// Threads for a row of logits.
const ENTROPY_THREADS: u32 = 1024;
/// Tokens whose heads a block rotates.
const ROPE_TOKENS: usize = 4;
/// Columns that a block of `sum_rows` sums.
const COLUMNS_OF_BLOCK: usize = 32;
/// The widest row whose sums the backward pass of RMSNorm keeps in shared memory: 48 KiB less 512
/// bytes for the kernel's own arrays.
const WIDTH_IN_SHARED: usize = 12160;
/// Rows whose share of ∂L/∂w one block sums, in order: few enough that the blocks fill a GPU.
pub(super) const NORM_ROWS: usize = 16;

/// One of four kernels by two types.
fn typed_twice(names: [[&'static str; 2]; 2], first: DType, second: DType) -> &'static str {
    names[typed(first)][typed(second)]
}

fn is_f32(what: &str, types: &[DType]) {
    assert!(types.iter().all(|&dtype| dtype == DType::F32), "{what} is f32, not {types:?}");
}

fn is_ids(what: &str, dtype: DType) {
    assert!(dtype == DType::U32, "{what} are u32, not {dtype}");
}

impl CudaStream {
    /// Enqueues out = left · right + start. Operands of two types meet in f32, and what two f32
    /// operands give is rounded afterwards: cuBLASLt does neither.
    fn product(&self, out: (Matrix, CUdeviceptr), operands: [(Matrix, CUdeviceptr); 2], start: Option<CUdeviceptr>) {
        if out.0.len() == 0 {
            return;
        }
        // cuBLASLt has no empty matrices; models have none either.
        assert!(operands[0].0.len() > 0, "a product over an empty dimension");
        self.enqueue(|stream| {
            let (mut out, mut operands) = (out, operands);
            let is_mixed = operands[0].0.dtype != operands[1].0.dtype;
            let rounds = out.0.dtype == DType::Bf16 && operands.iter().any(|(matrix, _)| matrix.dtype == DType::F32);
            let mut pieces = Pieces::default();
            let narrow = operands.iter_mut().find(|(matrix, _)| is_mixed && matrix.dtype == DType::Bf16);
            let widened = pieces.next(narrow.as_ref().map_or(0, |(matrix, _)| matrix.len()), 4);
            let unrounded = pieces.next(if rounds { out.0.len() } else { 0 }, 4);
            let scratch = if pieces.bytes() == 0 { 0 } else { self.scratch.take(&self.inner, pieces.bytes())? };
            if let Some((matrix, place)) = narrow {
                // SAFETY: the scratch has room for the matrix in f32.
                unsafe { self.cast_flat(stream, "cast_bf16_f32", scratch + widened, *place, matrix.len())? };
                (matrix.dtype, *place) = (DType::F32, scratch + widened);
            }
            let rounded = out.1;
            if rounds {
                out = (Matrix { dtype: DType::F32, ..out.0 }, scratch + unrounded);
            }
            let [left, right] = operands;
            let places = Places { out: out.1, left: left.1, right: right.1, start };
            let gemm = Gemm { out: out.0, left: left.0, right: right.0, batch: 1, alignment: places.alignment() };
            // SAFETY: the callers have checked that each place has room for its matrix, or it is
            // scratch. Views lend memory of a slab, as for `CudaStream::kernel`.
            unsafe {
                self.products.borrow_mut().run(&self.inner, stream, gemm, places, 1.0)?;
                if rounds {
                    self.cast_flat(stream, "cast_f32_bf16", rounded, out.1, out.0.len())?;
                }
            }
            Ok(())
        });
    }

    /// Enqueues a cast of `len` elements.
    ///
    /// # Safety
    /// Both places have so many elements of their types.
    unsafe fn cast_flat(
        &self,
        stream: CUstream,
        kernel: &str,
        to: CUdeviceptr,
        from: CUdeviceptr,
        len: usize,
    ) -> Result<(), CudaError> {
        let (context, latch) = (&self.inner.context, self.inner.latch.address());
        let arguments = [to.into(), from.into(), (len as u64).into()];
        // SAFETY: cast(out, x, n); the caller's promise.
        unsafe { launch(context, stream, kernel, Shape::for_elements(len, ELEMENTS_OF_BLOCK), latch, &arguments) }
    }
}

impl Kernels for CudaStream {
    fn embedding(&self, out: ViewMut<'_>, table: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", out.len(), tokens.len());
        let vocab = rows("embedding table", table.len(), width);
        is_f32("embedding", &[out.dtype()]);
        is_ids("tokens", tokens.dtype());
        self.own_all(&[&out], &[&table, &tokens]);
        let kernel = ["embedding_f32", "embedding_bf16"][typed(table.dtype())];
        let arguments =
            [(&out).into(), (&table).into(), (&tokens).into(), (width as u32).into(), (vocab as u32).into()];
        // SAFETY: embedding(out, table, tokens, width, vocab), a block for each token.
        unsafe { self.kernel(kernel, Shape::blocks(tokens.len()), &arguments) };
    }

    fn embedding_backward(&self, grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", grad_out.len(), tokens.len());
        let vocab = rows("embedding table", grad_table.len(), width);
        is_f32("embedding_backward", &[grad_table.dtype(), grad_out.dtype()]);
        is_ids("tokens", tokens.dtype());
        self.own_all(&[&grad_table], &[&grad_out, &tokens]);
        let sizes = [tokens.len() as u32, width as u32, vocab as u32].map(Argument::from);
        let arguments = [(&grad_table).into(), (&grad_out).into(), (&tokens).into(), sizes[0], sizes[1], sizes[2]];
        // SAFETY: embedding_backward(grad_table, grad_out, tokens, count, width, vocab), a block
        // for each token.
        unsafe { self.kernel("embedding_backward", Shape::blocks(tokens.len()), &arguments) };
    }

    fn rms_norm(&self, out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32) {
        same("rms_norm", &[out.len(), x.len(), inverse_rms.len() * weight.len()]);
        is_f32("rms_norm", &[inverse_rms.dtype(), x.dtype()]);
        self.own_all(&[&out, &inverse_rms], &[&x, &weight]);
        let kernels = [["rms_norm_f32_f32", "rms_norm_f32_bf16"], ["rms_norm_bf16_f32", "rms_norm_bf16_bf16"]];
        let kernel = typed_twice(kernels, out.dtype(), weight.dtype());
        let (rows, width) = (inverse_rms.len(), weight.len());
        if x.is_empty() {
            return;
        }
        let arguments = [
            (&out).into(),
            (&inverse_rms).into(),
            (&x).into(),
            (&weight).into(),
            (width as u32).into(),
            epsilon.into(),
        ];
        // SAFETY: rms_norm(out, inverse_rms, x, weight, width, ε), a block for each row.
        unsafe { self.kernel(kernel, Shape::blocks(rows), &arguments) };
    }

    fn rms_norm_backward(
        &self,
        grad_x: ViewMut<'_>,
        grad_weight: ViewMut<'_>,
        grad_out: View<'_>,
        x: View<'_>,
        inverse_rms: View<'_>,
        weight: View<'_>,
    ) {
        same("rms_norm", &[grad_x.len(), grad_out.len(), x.len(), inverse_rms.len() * weight.len()]);
        same("rms_norm weight", &[grad_weight.len(), weight.len()]);
        let types = [grad_x.dtype(), grad_weight.dtype(), grad_out.dtype(), x.dtype(), inverse_rms.dtype()];
        is_f32("rms_norm_backward", &types);
        self.own_all(&[&grad_x, &grad_weight], &[&grad_out, &x, &inverse_rms, &weight]);
        let kernel = ["rms_norm_backward_f32", "rms_norm_backward_bf16"][typed(weight.dtype())];
        let (rows, width) = (inverse_rms.len(), weight.len());
        if x.is_empty() {
            return;
        }
        let parts = rows.div_ceil(NORM_ROWS);
        self.enqueue(|stream| {
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            let shares = self.scratch.take(&self.inner, 4 * (parts * width) as u64)?;
            let arguments = [
                (&grad_x).into(),
                shares.into(),
                (&grad_out).into(),
                (&x).into(),
                (&inverse_rms).into(),
                (&weight).into(),
                (rows as u32).into(),
                (width as u32).into(),
                (NORM_ROWS as u32).into(),
            ];
            let sums = if width <= WIDTH_IN_SHARED { 4 * width } else { 0 };
            // SAFETY: rms_norm_backward(grad_x, shares, grad_out, x, inverse_rms, weight, rows,
            // width, rows of a part), a block for each part, and a row of shares for each;
            // sum_rows(out, shares, parts, width), a thread for each column.
            unsafe {
                launch(context, stream, kernel, Shape::blocks(parts).with_shared(sums), latch, &arguments)?;
                let arguments = [(&grad_weight).into(), shares.into(), (parts as u32).into(), (width as u32).into()];
                launch(context, stream, "sum_rows", Shape::for_elements(width, COLUMNS_OF_BLOCK), latch, &arguments)
            }
        });
    }

    fn linear(&self, y: ViewMut<'_>, x: View<'_>, w: View<'_>, addend: Option<View<'_>>, rows: usize) {
        let (outputs, inputs) = shapes::linear(y.len(), x.len(), w.len(), rows);
        if let Some(addend) = &addend {
            same("linear addend", &[addend.len(), y.len()]);
            same_type("linear with an addend", &[DType::F32, y.dtype(), addend.dtype()]);
            self.own_all(&[], &[addend]);
        }
        self.own_all(&[&y], &[&x, &w]);
        let out = (Matrix::dense(y.dtype(), rows, outputs), address_mut(&y));
        let left = (Matrix::dense(x.dtype(), rows, inputs), address(&x));
        let right = (Matrix::dense(w.dtype(), outputs, inputs).transposed(), address(&w));
        self.product(out, [left, right], addend.as_ref().map(address));
    }

    fn linear_backward_input(&self, grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool) {
        let (outputs, inputs) = shapes::linear(grad_y.len(), grad_x.len(), w.len(), rows);
        let dtype = grad_x.dtype();
        assert!(!accumulate || dtype == DType::F32, "gradients accumulate in f32, not in {dtype}");
        self.own_all(&[&grad_x], &[&grad_y, &w]);
        let out = (Matrix::dense(dtype, rows, inputs), address_mut(&grad_x));
        let left = (Matrix::dense(grad_y.dtype(), rows, outputs), address(&grad_y));
        let right = (Matrix::dense(w.dtype(), outputs, inputs), address(&w));
        self.product(out, [left, right], accumulate.then_some(out.1));
    }

    fn linear_backward_weight(&self, grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize) {
        let (outputs, inputs) = shapes::linear(grad_y.len(), x.len(), grad_w.len(), rows);
        same_type("linear", &[grad_y.dtype(), x.dtype()]);
        is_f32("the gradient of a weight", &[grad_w.dtype()]);
        self.own_all(&[&grad_w], &[&grad_y, &x]);
        let out = (Matrix::dense(DType::F32, outputs, inputs), address_mut(&grad_w));
        let left = (Matrix::dense(grad_y.dtype(), rows, outputs).transposed(), address(&grad_y));
        let right = (Matrix::dense(x.dtype(), rows, inputs), address(&x));
        self.product(out, [left, right], Some(out.1));
    }

    fn rope(&self, x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool) {
        let seq = shapes::rope(x.len(), cos.len(), sin.len(), heads, head_dim);
        let (half, width) = (head_dim / 2, heads * head_dim);
        is_f32("rope tables", &[cos.dtype(), sin.dtype()]);
        self.own_all(&[&x], &[&cos, &sin]);
        if x.is_empty() {
            return;
        }
        let (tokens, sign) = (x.len() / width, if inverse { -1.0f32 } else { 1.0 });
        let kernel = ["rope_f32", "rope_bf16"][typed(x.dtype())];
        let sizes = [seq as u32, heads as u32, half as u32].map(Argument::from);
        let arguments = [
            (&x).into(),
            (&cos).into(),
            (&sin).into(),
            (tokens as u64).into(),
            sizes[0],
            sizes[1],
            sizes[2],
            sign.into(),
        ];
        // SAFETY: rope(x, cos, sin, tokens, seq, heads, half, sign).
        unsafe { self.kernel(kernel, Shape::for_elements(tokens, ROPE_TOKENS), &arguments) };
    }

    fn attention(
        &self,
        out: ViewMut<'_>,
        log_sum: ViewMut<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        shape: AttentionShape,
        documents: Option<&Documents>,
    ) {
        check_attention(shape, &[out.len(), q.len()], &[k.len(), v.len()], log_sum.len());
        check_documents(shape, documents);
        let dtype = same_type("attention", &[out.dtype(), q.dtype(), k.dtype(), v.dtype()]);
        is_f32("attention log_sum", &[log_sum.dtype()]);
        self.own_all(&[&out, &log_sum], &[&q, &k, &v]);
        if !q.is_empty() {
            let [q, k, v] = [&q, &k, &v].map(address);
            let forward = attention::Forward { out: address_mut(&out), log_sum: address_mut(&log_sum), q, k, v };
            self.enqueue(|stream| attention::forward(self, stream, forward, dtype, shape, documents));
        }
    }

    fn attention_from(
        &self,
        first: usize,
        out: ViewMut<'_>,
        q: View<'_>,
        k: View<'_>,
        v: View<'_>,
        shape: AttentionShape,
    ) {
        check_attention_from(first, shape, &[out.len(), q.len()], &[k.len(), v.len()]);
        let dtype = same_type("attention", &[out.dtype(), q.dtype(), k.dtype(), v.dtype()]);
        self.own_all(&[&out], &[&q, &k, &v]);
        if !q.is_empty() {
            let [q, k, v] = [&q, &k, &v].map(address);
            let forward = attention::ForwardFrom { first, out: address_mut(&out), q, k, v };
            self.enqueue(|stream| attention::forward_from(self, stream, forward, dtype, shape));
        }
    }

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
    ) {
        let queries = [grad_q.len(), grad_out.len(), q.len(), out.len()];
        check_attention(shape, &queries, &[grad_k.len(), grad_v.len(), k.len(), v.len()], log_sum.len());
        check_documents(shape, documents);
        let types = [&grad_out, &q, &k, &v, &out].map(View::dtype);
        let dtype = same_type("attention", &types);
        same_type("attention", &[dtype, grad_q.dtype(), grad_k.dtype(), grad_v.dtype()]);
        is_f32("attention log_sum", &[log_sum.dtype()]);
        self.own_all(&[&grad_q, &grad_k, &grad_v], &[&grad_out, &q, &k, &v, &out, &log_sum]);
        if !q.is_empty() {
            let [grad_q, grad_k, grad_v] = [&grad_q, &grad_k, &grad_v].map(address_mut);
            let [grad_out, q, k, v, out, log_sum] = [&grad_out, &q, &k, &v, &out, &log_sum].map(address);
            let backward = attention::Backward { grad_q, grad_k, grad_v, grad_out, q, k, v, out, log_sum };
            self.enqueue(|stream| attention::backward(self, stream, backward, dtype, shape, documents));
        }
    }

    fn swiglu(&self, out: ViewMut<'_>, gate: View<'_>, up: View<'_>) {
        same("swiglu", &[out.len(), gate.len(), up.len()]);
        let dtype = same_type("swiglu", &[out.dtype(), gate.dtype(), up.dtype()]);
        self.own_all(&[&out], &[&gate, &up]);
        if out.is_empty() {
            return;
        }
        let arguments = [(&out).into(), (&gate).into(), (&up).into(), (gate.len() as u64).into()];
        // SAFETY: swiglu(out, gate, up, n).
        unsafe {
            let kernel = ["swiglu_f32", "swiglu_bf16"][typed(dtype)];
            self.kernel(kernel, Shape::for_elements(gate.len(), SWIGLU_OF_BLOCK), &arguments);
        }
    }

    fn swiglu_backward(
        &self,
        out: ViewMut<'_>,
        grad_gate: ViewMut<'_>,
        grad_up: ViewMut<'_>,
        grad_out: View<'_>,
        gate: View<'_>,
        up: View<'_>,
    ) {
        same("swiglu", &[out.len(), grad_gate.len(), grad_up.len(), grad_out.len(), gate.len(), up.len()]);
        let dtype = same_type("swiglu", &[grad_out.dtype(), gate.dtype(), up.dtype()]);
        same_type("swiglu", &[dtype, out.dtype(), grad_gate.dtype(), grad_up.dtype()]);
        self.own_all(&[&out, &grad_gate, &grad_up], &[&grad_out, &gate, &up]);
        if gate.is_empty() {
            return;
        }
        let arguments = [
            (&out).into(),
            (&grad_gate).into(),
            (&grad_up).into(),
            (&grad_out).into(),
            (&gate).into(),
            (&up).into(),
            (gate.len() as u64).into(),
        ];
        // SAFETY: swiglu_backward(out, grad_gate, grad_up, grad_out, gate, up, n).
        unsafe {
            let kernel = ["swiglu_backward_f32", "swiglu_backward_bf16"][typed(dtype)];
            self.kernel(kernel, Shape::for_elements(gate.len(), SWIGLU_OF_BLOCK), &arguments);
        }
    }

    fn cross_entropy(
        &self,
        logits: ViewMut<'_>,
        rounded: Option<ViewMut<'_>>,
        targets: View<'_>,
        loss: ViewMut<'_>,
        z_loss: f32,
    ) {
        let vocab = columns("cross_entropy", logits.len(), targets.len());
        assert_eq!(loss.len(), 1, "cross_entropy adds to one sum");
        assert!(loss.dtype() == DType::F64, "cross_entropy adds to f64, not {}", loss.dtype());
        is_f32("cross_entropy", &[logits.dtype()]);
        is_ids("targets", targets.dtype());
        self.own_all(&[&logits, &loss], &[&targets]);
        let (grad, dtype) = match &rounded {
            None => (address_mut(&logits), DType::F32),
            Some(rounded) => {
                same("cross_entropy gradient", &[rounded.len(), logits.len()]);
                self.own_all(&[rounded], &[]);
                (address_mut(rounded), rounded.dtype())
            }
        };
        let (kernel, count) = (["cross_entropy_f32", "cross_entropy_bf16"][typed(dtype)], targets.len());
        let run = |stream| -> Result<(), CudaError> {
            let (context, latch) = (&self.inner.context, self.inner.latch.address());
            let losses = self.scratch.take(&self.inner, 8 * count as u64)?;
            let targets = Argument::from(&targets);
            let arguments =
                [grad.into(), (&logits).into(), losses.into(), targets, (vocab as u32).into(), z_loss.into()];
            // SAFETY: cross_entropy(grad, logits, losses, targets, vocab, z_loss), a block for each row,
            // and room for each row's loss; sum_losses(loss, losses, count).
            unsafe {
                launch(context, stream, kernel, Shape::blocks(count).with_threads(ENTROPY_THREADS), latch, &arguments)?;
                let arguments = [(&loss).into(), losses.into(), (count as u32).into()];
                launch(context, stream, "sum_losses", Shape::blocks(1), latch, &arguments)
            }
        };
        self.enqueue(run);
    }
}
