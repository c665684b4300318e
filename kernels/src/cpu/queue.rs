//! Binds the functions of this folder to the trait [`Queue`]: checks shapes, and enqueues.

use std::cell::RefCell;

use half::bf16;

use super::matmul::{Matrix, product};
use super::{HostQueue, adamw, attention, embedding, loss, maths, mlp, norm, rope, vectorized};
use crate::{AdamW, AttentionShape, DType, Event, Queue, View, ViewMut};

thread_local! {
    /// Working memory of the kernels on this thread: the first for weights widened to f32, the second for everything else.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

fn with_scratch<R>(kernel: impl FnOnce(&mut Vec<f32>, &mut Vec<f32>) -> R) -> R {
    SCRATCH.with_borrow_mut(|(weights, work)| kernel(weights, work))
}

/// `len = rows · columns` with known rows gives the columns.
fn columns(what: &str, len: usize, rows: usize) -> usize {
    assert!(rows > 0 && len.is_multiple_of(rows), "{what}: {len} elements in {rows} rows");
    len / rows
}

/// `len = rows · columns` with known columns gives the rows.
fn rows(what: &str, len: usize, columns: usize) -> usize {
    assert!(columns > 0 && len.is_multiple_of(columns), "{what}: {len} elements in rows of {columns}");
    len / columns
}

/// All lengths equal the first.
fn same(what: &str, lens: &[usize]) {
    assert!(lens.iter().all(|&len| len == lens[0]), "{what}: lengths {lens:?} should be equal");
}

// SAFETY: a host queue runs its work in order: at once, after blocking for the event, or in its thread, where an event is work like any other
// and waiting for one holds up what follows.
unsafe impl Queue for HostQueue {
    fn record(&self) -> Event {
        self.lazy.as_ref().map_or(Event::PAST, |lazy| lazy.record())
    }

    fn wait_for(&self, event: &Event) {
        match &self.lazy {
            None => event.wait(),
            Some(lazy) => lazy.wait_for(event),
        }
    }

    fn upload_bytes(&self, out: ViewMut<'_>, bytes: &[u8]) {
        assert_eq!(out.len() * out.dtype().bytes(), bytes.len(), "an upload fills its buffer");
        let bytes = bytes.to_vec();
        self.run([out], [], move |[out], []| out.bytes().copy_from_slice(&bytes));
    }

    fn download_bytes(&self, x: View<'_>) -> Vec<u8> {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.run([], [x], move |[], [x]| {
            // The receiver lives until the value has arrived, below.
            let _ = sender.send(x.bytes().to_vec());
        });
        self.synchronize();
        receiver.recv().expect("the queue ran everything before its event")
    }

    fn zero(&self, out: ViewMut<'_>) {
        self.run([out], [], |[out], []| out.bytes().fill(0));
    }

    fn cast(&self, out: ViewMut<'_>, x: View<'_>) {
        same("cast", &[out.len(), x.len()]);
        let types = (out.dtype(), x.dtype());
        self.run([out], [x], move |[out], [x]| match types {
            (DType::F32, DType::Bf16) => maths::widen(out.of(), x.of()),
            (DType::Bf16, DType::F32) => maths::narrow(out.of(), x.of()),
            (to, from) if to == from => out.bytes().copy_from_slice(x.bytes()),
            (to, from) => panic!("no cast from {from} to {to}"),
        });
    }

    fn add(&self, x: ViewMut<'_>, y: View<'_>) {
        same("add", &[x.len(), y.len()]);
        self.run([x], [y], |[x], [y]| {
            let (x, y) = (x.of::<f32>(), y.of::<f32>());
            vectorized(|| x.iter_mut().zip(y).for_each(|(x, &y)| *x += y));
        });
    }

    fn square_norm(&self, out: ViewMut<'_>, x: View<'_>, weight: f64) {
        assert_eq!(out.len(), 2, "square_norm writes a sum and a count");
        self.run([out], [x], move |[out], [x]| {
            let x = x.of::<f32>();
            let (sum, non_finite) = vectorized(|| loss::square_norm(x));
            out.of().copy_from_slice(&[weight * sum, non_finite as f64]);
        });
    }

    fn embedding(&self, out: ViewMut<'_>, table: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", out.len(), tokens.len());
        let vocab = rows("embedding table", table.len(), width);
        let dtype = table.dtype();
        self.run([out], [table, tokens], move |[out], [table, tokens]| {
            let (out, tokens) = (out.of(), tokens.of());
            match dtype {
                DType::F32 => {
                    let table = table.of::<f32>();
                    embedding::forward(out, tokens, vocab, |out, row| {
                        out.copy_from_slice(&table[row * width..][..width])
                    });
                }
                _ => {
                    let table = table.of::<bf16>();
                    embedding::forward(out, tokens, vocab, |out, row| {
                        maths::widen(out, &table[row * width..][..width])
                    });
                }
            }
        });
    }

    fn embedding_backward(&self, grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>) {
        let width = columns("embedding", grad_out.len(), tokens.len());
        rows("embedding table", grad_table.len(), width);
        self.run([grad_table], [grad_out, tokens], |[grad_table], [grad_out, tokens]| {
            let (grad_table, grad_out, tokens) = (grad_table.of(), grad_out.of(), tokens.of());
            vectorized(|| embedding::backward(grad_table, grad_out, tokens));
        });
    }

    fn rms_norm(&self, out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32) {
        same("rms_norm", &[out.len(), x.len(), inverse_rms.len() * weight.len()]);
        self.run([out, inverse_rms], [x, weight], move |[out, inverse_rms], [x, weight]| {
            with_scratch(|widened, _| {
                let (out, inverse_rms, x, weight) = (out.of(), inverse_rms.of(), x.of(), weight.widened(widened));
                vectorized(|| norm::forward(out, inverse_rms, x, weight, epsilon));
            });
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
        let reads = [grad_out, x, inverse_rms, weight];
        self.run([grad_x, grad_weight], reads, |[grad_x, grad_weight], [grad_out, x, inverse_rms, weight]| {
            with_scratch(|widened, scratch| {
                let (grad_x, grad_weight, weight) = (grad_x.of(), grad_weight.of(), weight.widened(widened));
                let (grad_out, x, inverse_rms) = (grad_out.of(), x.of(), inverse_rms.of());
                vectorized(|| norm::backward(grad_x, grad_weight, grad_out, x, inverse_rms, weight, scratch));
            });
        });
    }

    fn linear(&self, y: ViewMut<'_>, x: View<'_>, w: View<'_>, rows: usize) {
        let (outputs, inputs) = (columns("linear y", y.len(), rows), columns("linear x", x.len(), rows));
        same("linear w", &[w.len(), outputs * inputs]);
        let dtype = w.dtype();
        self.run([y], [x, w], move |[y], [x, w]| {
            let (y, x) = (Matrix::dense(y.of(), rows, outputs), Matrix::dense(x.of::<f32>(), rows, inputs));
            match dtype {
                DType::Bf16 => product(y, x, Matrix::dense(w.of::<bf16>(), outputs, inputs).transposed(), 1.0, false),
                _ => product(y, x, Matrix::dense(w.of::<f32>(), outputs, inputs).transposed(), 1.0, false),
            }
        });
    }

    fn linear_backward_input(&self, grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool) {
        let (outputs, inputs) = (columns("linear y", grad_y.len(), rows), columns("linear x", grad_x.len(), rows));
        same("linear w", &[w.len(), outputs * inputs]);
        let dtype = w.dtype();
        self.run([grad_x], [grad_y, w], move |[grad_x], [grad_y, w]| {
            let (grad_x, grad_y) =
                (Matrix::dense(grad_x.of(), rows, inputs), Matrix::dense(grad_y.of::<f32>(), rows, outputs));
            match dtype {
                DType::Bf16 => product(grad_x, grad_y, Matrix::dense(w.of::<bf16>(), outputs, inputs), 1.0, accumulate),
                _ => product(grad_x, grad_y, Matrix::dense(w.of::<f32>(), outputs, inputs), 1.0, accumulate),
            }
        });
    }

    fn linear_backward_weight(&self, grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize) {
        let (outputs, inputs) = (columns("linear y", grad_y.len(), rows), columns("linear x", x.len(), rows));
        same("linear w", &[grad_w.len(), outputs * inputs]);
        self.run([grad_w], [grad_y, x], move |[grad_w], [grad_y, x]| {
            let grad_y = Matrix::dense(grad_y.of::<f32>(), rows, outputs).transposed();
            let x = Matrix::dense(x.of::<f32>(), rows, inputs);
            product(Matrix::dense(grad_w.of(), outputs, inputs), grad_y, x, 1.0, true);
        });
    }

    fn rope(&self, x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool) {
        same("rope tables", &[cos.len(), sin.len()]);
        let half = head_dim / 2;
        let seq = columns("rope tables", cos.len(), half);
        assert!(
            head_dim.is_multiple_of(2) && x.len().is_multiple_of(seq * heads * head_dim),
            "rope: {} elements",
            x.len()
        );
        let sign = if inverse { -1.0 } else { 1.0 };
        self.run([x], [cos, sin], move |[x], [cos, sin]| {
            let (x, cos, sin) = (x.of(), cos.of(), sin.of());
            vectorized(|| rope::rotate(x, cos, sin, heads, half, sign));
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
    ) {
        check_attention(shape, &[out.len(), q.len()], &[k.len(), v.len()], log_sum.len());
        self.run([out, log_sum], [q, k, v], move |[out, log_sum], [q, k, v]| {
            with_scratch(|_, scratch| {
                let (out, log_sum, q, k, v) = (out.of(), log_sum.of(), q.of(), k.of(), v.of());
                vectorized(|| attention::forward(out, log_sum, q, k, v, shape, scratch));
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
    ) {
        let queries = [grad_q.len(), grad_out.len(), q.len(), out.len()];
        check_attention(shape, &queries, &[grad_k.len(), grad_v.len(), k.len(), v.len()], log_sum.len());
        let reads = [grad_out, q, k, v, out, log_sum];
        self.run([grad_q, grad_k, grad_v], reads, move |grads, [grad_out, q, k, v, out, log_sum]| {
            with_scratch(|_, scratch| {
                let (grads, qkv) = (grads.map(|grad| grad.of()), [q.of(), k.of(), v.of()]);
                let (grad_out, out, log_sum) = (grad_out.of(), out.of(), log_sum.of());
                vectorized(|| attention::backward(grads, grad_out, qkv, out, log_sum, shape, scratch));
            });
        });
    }

    fn swiglu(&self, out: ViewMut<'_>, gate: View<'_>, up: View<'_>) {
        same("swiglu", &[out.len(), gate.len(), up.len()]);
        self.run([out], [gate, up], |[out], [gate, up]| {
            let (out, gate, up) = (out.of(), gate.of(), up.of());
            vectorized(|| mlp::forward(out, gate, up));
        });
    }

    fn swiglu_backward(
        &self,
        grad_gate: ViewMut<'_>,
        grad_up: ViewMut<'_>,
        grad_out: View<'_>,
        gate: View<'_>,
        up: View<'_>,
    ) {
        same("swiglu", &[grad_gate.len(), grad_up.len(), grad_out.len(), gate.len(), up.len()]);
        self.run([grad_gate, grad_up], [grad_out, gate, up], |[grad_gate, grad_up], [grad_out, gate, up]| {
            let (grad_gate, grad_up) = (grad_gate.of(), grad_up.of());
            let (grad_out, gate, up) = (grad_out.of(), gate.of(), up.of());
            vectorized(|| mlp::backward(grad_gate, grad_up, grad_out, gate, up));
        });
    }

    fn cross_entropy(&self, logits: ViewMut<'_>, targets: View<'_>, sums: ViewMut<'_>) {
        columns("cross_entropy", logits.len(), targets.len());
        assert_eq!(sums.len(), 2, "cross_entropy adds to a loss and a count");
        self.run([logits, sums], [targets], |[logits, sums], [targets]| {
            let (logits, sums, targets) = (logits.of(), sums.of(), targets.of());
            vectorized(|| loss::cross_entropy(logits, targets, sums));
        });
    }

    fn adamw(
        &self,
        weights: Option<ViewMut<'_>>,
        master: ViewMut<'_>,
        m: ViewMut<'_>,
        v: ViewMut<'_>,
        grad: View<'_>,
        settings: AdamW,
    ) {
        same("adamw", &[master.len(), m.len(), v.len(), grad.len()]);
        let Some(weights) = weights else {
            return self.run([master, m, v], [grad], move |[master, m, v], [grad]| {
                let (master, m, v, grad) = (master.of(), m.of(), v.of(), grad.of());
                vectorized(|| adamw::update(master, m, v, grad, settings));
            });
        };
        same("adamw weights", &[weights.len(), master.len()]);
        let dtype = weights.dtype();
        self.run([weights, master, m, v], [grad], move |[weights, master, m, v], [grad]| {
            let (master, m, v, grad) = (master.of(), m.of(), v.of(), grad.of());
            match dtype {
                DType::Bf16 => {
                    let weights = weights.of::<bf16>();
                    vectorized(|| adamw::update_copied(weights, master, m, v, grad, settings));
                }
                _ => {
                    let weights = weights.of::<f32>();
                    vectorized(|| adamw::update_copied(weights, master, m, v, grad, settings));
                }
            }
        });
    }
}

fn check_attention(shape: AttentionShape, queries: &[usize], keys: &[usize], log_sums: usize) {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{kv_heads} key/value heads do not divide {heads} heads");
    assert!(
        queries.iter().all(|&len| len == batch * seq * heads * head_dim),
        "attention queries {queries:?}: {shape:?}"
    );
    assert!(keys.iter().all(|&len| len == batch * seq * kv_heads * head_dim), "attention keys {keys:?}: {shape:?}");
    assert_eq!(log_sums, batch * heads * seq, "attention log_sum: {shape:?}");
}
