//! Binds the functions of this folder to the trait [`Kernels`]: checks shapes, and enqueues.

use std::cell::Cell;

use super::matmul::{Matrix, Right, Start, product};
use super::team::{Read, Write};
use super::{HostStream, SHARE, Work, attention, embedding, loss, mlp, norm, rope, scratch, vectorized};
use crate::shapes::{
    self, check_attention, check_attention_from, check_documents, columns, rows, same, same_type, with_type,
};
use crate::{AttentionShape, DType, Documents, Kernels, View, ViewMut};

thread_local! {
    static GRAD_WEIGHT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static LOSSES: Cell<Vec<f64>> = const { Cell::new(Vec::new()) };
}

impl Kernels for HostStream {
    fn embedding(&self, out: ViewMut<'_>, table: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", out.len(), tokens.len());
        rows("embedding table", table.len(), width);
        let dtype = table.dtype();
        self.run(Work::moves("embedding"), [out], [table, tokens], move |_, [out], [table, tokens]| {
            with_type!(dtype, W => {
                let (out, table, tokens) = (out.of(), table.of::<W>(), tokens.of());
                vectorized(#[inline(always)] || embedding::forward(out, table, tokens));
            });
        });
    }

    fn embedding_backward(&self, grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", grad_out.len(), tokens.len());
        rows("embedding table", grad_table.len(), width);
        let work = Work::moves("embedding_backward");
        self.run(work, [grad_table], [grad_out, tokens], |_, [grad_table], [grad_out, tokens]| {
            let (grad_table, grad_out, tokens) = (grad_table.of(), grad_out.of(), tokens.of());
            vectorized(
                #[inline(always)]
                || embedding::backward(grad_table, grad_out, tokens),
            );
        });
    }

    fn rms_norm(&self, out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32) {
        same("rms_norm", &[out.len(), x.len(), inverse_rms.len() * weight.len()]);
        let types = (out.dtype(), weight.dtype());
        let work = Work::moves("rms_norm");
        self.run(work, [out, inverse_rms], [x, weight], move |team, [out, inverse_rms], [x, weight]| {
            with_type!(types.0, T => with_type!(types.1, W => {
                let weight = weight.of::<W>();
                let width = weight.len();
                let rows = (Write(out.of::<T>(), width), Write(inverse_rms.of(), 1), Read(x.of(), width));
                team.split(rows, SHARE / width.max(1), |(out, inverse_rms, x)| {
                    vectorized(#[inline(always)] || norm::forward(out.0, inverse_rms.0, x.0, weight, epsilon));
                });
            }));
        });
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
        let (work, dtype) = (Work::moves("rms_norm_backward"), weight.dtype());
        let reads = [grad_out, x, inverse_rms, weight];
        self.run(work, [grad_x, grad_weight], reads, move |team, [grad_x, grad_weight], reads| {
            let [grad_out, x, inverse_rms, weight] = reads;
            with_type!(dtype, W => {
                let (grad_x, grad_weight, weight) = (grad_x.of::<f32>(), grad_weight.of::<f32>(), weight.of::<W>());
                let (grad_out, x, inverse_rms) = (grad_out.of::<f32>(), x.of::<f32>(), inverse_rms.of::<f32>());
                let width = weight.len();
                scratch::with(&GRAD_WEIGHT, inverse_rms.len().div_ceil(norm::ROWS) * width, |shares| {
                    let of_part = norm::ROWS * width;
                    let parts = (
                        Write(&mut *shares, width),
                        Write(grad_x, of_part),
                        Read(grad_out, of_part),
                        Read(x, of_part),
                        Read(inverse_rms, norm::ROWS),
                    );
                    team.split(parts, 1, |(shares, grad_x, grad_out, x, inverse_rms)| {
                        vectorized(#[inline(always)] || norm::backward(grad_x.0, shares.0, grad_out.0, x.0, inverse_rms.0, weight));
                    });
                    vectorized(#[inline(always)] || {
                        for share in shares.chunks_exact(width) {
                            grad_weight.iter_mut().zip(share).for_each(|(sum, &share)| *sum += share);
                        }
                    });
                });
            });
        });
    }

    fn linear(&self, y: ViewMut<'_>, x: View<'_>, w: View<'_>, addend: Option<View<'_>>, rows: usize) {
        let (outputs, inputs) = shapes::linear(y.len(), x.len(), w.len(), rows);
        let types = (y.dtype(), x.dtype(), w.dtype());
        let work = Work::products("linear", rows * inputs * outputs);
        let Some(addend) = addend else {
            return self.run(work, [y], [x, w], move |team, [y], [x, w]| {
                with_type!(types.0, O => with_type!(types.1, A => with_type!(types.2, W => {
                    let (x, w) = (Matrix::dense(x.of::<A>(), rows, inputs), Matrix::dense(w.of::<W>(), outputs, inputs));
                    let y = Matrix::dense(y.of::<O>(), rows, outputs);
                    product(team, y, Start::Zero, x, Right::Matrix(w.transposed()), 1.0);
                })));
            });
        };
        same("linear addend", &[addend.len(), y.len()]);
        same_type("linear with an addend", &[DType::F32, y.dtype(), addend.dtype()]);
        self.run(work, [y], [x, w, addend], move |team, [y], [x, w, addend]| {
            with_type!(types.1, A => with_type!(types.2, W => {
                let (x, w) = (Matrix::dense(x.of::<A>(), rows, inputs), Matrix::dense(w.of::<W>(), outputs, inputs));
                let y = Matrix::dense(y.of::<f32>(), rows, outputs);
                product(team, y, Start::From(addend.of()), x, Right::Matrix(w.transposed()), 1.0);
            }));
        });
    }

    fn linear_backward_input(&self, grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool) {
        let (outputs, inputs) = shapes::linear(grad_y.len(), grad_x.len(), w.len(), rows);
        let types = (grad_x.dtype(), grad_y.dtype(), w.dtype());
        assert!(!accumulate || types.0 == DType::F32, "gradients accumulate in f32, not in {}", types.0);
        let work = Work::products("linear_backward_input", rows * inputs * outputs);
        self.run(work, [grad_x], [grad_y, w], move |team, [grad_x], [grad_y, w]| {
            with_type!(types.0, O => with_type!(types.1, A => with_type!(types.2, W => {
                let grad_y = Matrix::dense(grad_y.of::<A>(), rows, outputs);
                let w = Matrix::dense(w.of::<W>(), outputs, inputs);
                let start = if accumulate { Start::Output } else { Start::Zero };
                let grad_x = Matrix::dense(grad_x.of::<O>(), rows, inputs);
                product(team, grad_x, start, grad_y, Right::Matrix(w), 1.0);
            })));
        });
    }

    fn linear_backward_weight(&self, grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize) {
        let (outputs, inputs) = shapes::linear(grad_y.len(), x.len(), grad_w.len(), rows);
        let dtype = same_type("linear", &[grad_y.dtype(), x.dtype()]);
        let work = Work::products("linear_backward_weight", rows * inputs * outputs);
        self.run(work, [grad_w], [grad_y, x], move |team, [grad_w], [grad_y, x]| {
            with_type!(dtype, T => {
                let grad_y = Matrix::dense(grad_y.of::<T>(), rows, outputs).transposed();
                let x = Matrix::dense(x.of::<T>(), rows, inputs);
                let grad_w = Matrix::dense(grad_w.of::<f32>(), outputs, inputs);
                product(team, grad_w, Start::Output, grad_y, Right::Matrix(x), 1.0);
            });
        });
    }

    fn rope(&self, x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool) {
        let seq = shapes::rope(x.len(), cos.len(), sin.len(), heads, head_dim);
        let half = head_dim / 2;
        let sign = if inverse { -1.0 } else { 1.0 };
        let dtype = x.dtype();
        self.run(Work::moves("rope"), [x], [cos, sin], move |team, [x], [cos, sin]| {
            with_type!(dtype, T => {
                let (cos, sin, of_sequence) = (cos.of::<f32>(), sin.of::<f32>(), seq * heads * head_dim);
                team.split(Write(x.of::<T>(), of_sequence), 1, |x| {
                    vectorized(#[inline(always)] || rope::rotate(x.0, cos, sin, (heads, half), sign));
                });
            });
        });
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
        // q·kᵀ and p·v, for the pairs that see each other.
        let work = Work::products("attention", 2 * pairs(shape, documents) * shape.head_dim);
        let documents = documents.cloned();
        self.run(work, [out, log_sum], [q, k, v], move |team, [out, log_sum], qkv| {
            with_type!(dtype, T => {
                let (qkv, documents) = (qkv.map(|x| x.of::<T>()), documents.as_ref());
                attention::forward(team, out.of::<T>(), log_sum.of(), qkv, shape, documents);
            });
        });
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
        let before = AttentionShape { seq: first, ..shape };
        let work = Work::products("attention", 2 * (pairs(shape, None) - pairs(before, None)) * shape.head_dim);
        self.run(work, [out], [q, k, v], move |team, [out], qkv| {
            with_type!(dtype, T => {
                attention::forward_from(team, first, out.of::<T>(), qkv.map(|x| x.of::<T>()), shape);
            });
        });
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
        let reads = [grad_out, q, k, v, out, log_sum];
        // The scores once more, and two products for each of those of the forward pass.
        let work = Work::products("attention_backward", 5 * pairs(shape, documents) * shape.head_dim);
        let documents = documents.cloned();
        self.run(work, [grad_q, grad_k, grad_v], reads, move |team, grads, [grad_out, q, k, v, out, log_sum]| {
            with_type!(dtype, T => {
                let (q, k, v, out) = (q.of::<T>(), k.of::<T>(), v.of::<T>(), out.of::<T>());
                let saved = attention::Saved { grad_out: grad_out.of::<T>(), q, k, v, out, log_sum: log_sum.of() };
                attention::backward(team, grads.map(|grad| grad.of::<T>()), saved, shape, documents.as_ref());
            });
        });
    }

    fn swiglu(&self, out: ViewMut<'_>, gate: View<'_>, up: View<'_>) {
        same("swiglu", &[out.len(), gate.len(), up.len()]);
        let dtype = same_type("swiglu", &[out.dtype(), gate.dtype(), up.dtype()]);
        self.run(Work::moves("swiglu"), [out], [gate, up], move |team, [out], [gate, up]| {
            with_type!(dtype, T => {
                let rows = (Write(out.of::<T>(), 1), Read(gate.of::<T>(), 1), Read(up.of::<T>(), 1));
                team.split(rows, SHARE / 8, |(out, gate, up)| vectorized(#[inline(always)] || mlp::forward(out.0, gate.0, up.0)));
            });
        });
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
        let writes = [out, grad_gate, grad_up];
        self.run(Work::moves("swiglu_backward"), writes, [grad_out, gate, up], move |team, writes, reads| {
            with_type!(dtype, T => {
                let [out, grad_gate, grad_up] = writes.map(|x| Write(x.of::<T>(), 1));
                let [grad_out, gate, up] = reads.map(|x| Read(x.of::<T>(), 1));
                team.split((out, grad_gate, grad_up, grad_out, gate, up), SHARE / 8, |(out, dg, du, grad, gate, up)| {
                    vectorized(#[inline(always)] || mlp::backward([out.0, dg.0, du.0], grad.0, gate.0, up.0));
                });
            });
        });
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
        let work = Work::moves("cross_entropy");
        let add = |sum: &mut [f64], losses: &[f64]| losses.iter().for_each(|loss| sum[0] += loss);
        let Some(rounded) = rounded else {
            return self.run(work, [logits, loss], [targets], move |team, [logits, sum], [targets]| {
                let targets = targets.of::<u32>();
                scratch::with(&LOSSES, targets.len(), |losses| {
                    let rows = (Write(&mut *losses, 1), Write(logits.of(), vocab), Read(targets, 1));
                    team.split(rows, 1, |(losses, logits, targets)| {
                        vectorized(
                            #[inline(always)]
                            || loss::cross_entropy(losses.0, logits.0, targets.0, z_loss),
                        );
                    });
                    add(sum.of(), losses);
                });
            });
        };
        same("cross_entropy gradient", &[rounded.len(), logits.len()]);
        let dtype = rounded.dtype();
        self.run(work, [logits, rounded, loss], [targets], move |team, [logits, rounded, sum], [targets]| {
            let targets = targets.of::<u32>();
            with_type!(dtype, T => scratch::with(&LOSSES, targets.len(), |losses| {
                let logits = Write(logits.of(), vocab);
                let rows = (Write(&mut *losses, 1), Write(rounded.of::<T>(), vocab), logits, Read(targets, 1));
                team.split(rows, 1, |(losses, grad, logits, targets)| {
                    vectorized(#[inline(always)] || loss::cross_entropy_rounded(losses.0, grad.0, logits.0, targets.0, z_loss));
                });
                add(sum.of(), losses);
            }));
        });
    }
}

/// Pairs of a query and a key that it sees.
fn pairs(shape: AttentionShape, documents: Option<&Documents>) -> usize {
    let of = |tokens: usize| tokens * (tokens + 1) / 2;
    let in_all = documents.map(|documents| documents.iter().map(|tokens| of(tokens.len())).sum());
    shape.heads * in_all.unwrap_or(shape.batch * of(shape.seq))
}
