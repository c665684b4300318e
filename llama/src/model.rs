//! Llama's forward and backward pass, unit by unit, on any device.
//!
//! Shapes: N = B·T tokens of a micro-batch, C width, F feed-forward width, H·D = C query width, K·D key and value width, V vocabulary. Activations are
//! kept for the backward pass, but for those that one pass over memory makes again (norms, SwiGLU); logits and their gradient exist for
//! some tokens at a time. Every buffer is allocated once.

use std::ops::Range;

use pillion_kernels::{AttentionShape, Buffer, DType, Device, Queue, View};
use pillion_runtime::{Backward, Error, Forward, Step};

use crate::config::Config;

/// Indices of a block's tensors, in the order of [`Config::units`].
mod tensor {
    pub(super) const INPUT_NORM: usize = 0;
    pub(super) const Q: usize = 1;
    pub(super) const K: usize = 2;
    pub(super) const V: usize = 3;
    pub(super) const O: usize = 4;
    pub(super) const MLP_NORM: usize = 5;
    pub(super) const GATE: usize = 6;
    pub(super) const UP: usize = 7;
    pub(super) const DOWN: usize = 8;
    /// Of the head.
    pub(super) const FINAL_NORM: usize = 0;
    pub(super) const LM_HEAD: usize = 1;
}

/// A model's activations on one rank, and the passes through them.
pub struct Model {
    config: Config,
    attention: AttentionShape,
    /// The residual stream before each block and after the last, `[N, C]` each.
    residual: Vec<Buffer>,
    blocks: Vec<Block>,
    head: Head,
    recomputed: Recomputed,
    gradients: Gradients,
    inputs: Buffer,
    targets: Buffer,
    cos: Buffer,
    sin: Buffer,
    /// Sum of losses and number of tokens of evaluations.
    sums: Buffer,
}

/// What a block keeps for its backward pass.
struct Block {
    input_inverse_rms: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    attended: Buffer,
    log_sum: Buffer,
    /// The residual stream between attention and feed-forward.
    middle: Buffer,
    middle_inverse_rms: Buffer,
    gate: Buffer,
    up: Buffer,
}

/// What a block makes in its forward pass, and again in its backward pass.
struct Recomputed {
    /// A norm's output, `[N, C]`.
    normed: Buffer,
    /// Of SwiGLU, `[N, F]`.
    activated: Buffer,
}

struct Head {
    normed: Buffer,
    inverse_rms: Buffer,
    /// Of at most [`HEAD_ROWS`] tokens, `[·, V]`; after the loss, its gradient.
    logits: Buffer,
}

/// Gradients of activations, shared by all blocks.
struct Gradients {
    /// Of the residual stream, `[N, C]`.
    residual: Buffer,
    /// Of a norm's output, `[N, C]`.
    normed: Buffer,
    attended: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    gate: Buffer,
    up: Buffer,
    activated: Buffer,
}

impl Model {
    /// Allocates the activations of micro-batches of `batch` sequences of `seq` tokens.
    ///
    /// # Errors
    /// When the device has no memory.
    ///
    /// # Panics
    /// When the shape has not been validated.
    pub fn new(device: &dyn Device, config: &Config, batch: usize, seq: usize) -> Result<Model, Error> {
        config.validate().expect("a validated shape");
        let tokens = batch * seq;
        let (width, ffn, heads) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let kv_width = config.num_key_value_heads * config.head_dim();
        let allocate = |len: usize| device.allocate(DType::F32, len);
        let block = |_| {
            Ok::<_, Error>(Block {
                input_inverse_rms: allocate(tokens)?,
                q: allocate(tokens * width)?,
                k: allocate(tokens * kv_width)?,
                v: allocate(tokens * kv_width)?,
                attended: allocate(tokens * width)?,
                log_sum: allocate(tokens * heads)?,
                middle: allocate(tokens * width)?,
                middle_inverse_rms: allocate(tokens)?,
                gate: allocate(tokens * ffn)?,
                up: allocate(tokens * ffn)?,
            })
        };
        let (mut cos, mut sin) = (allocate(seq * config.head_dim() / 2)?, allocate(seq * config.head_dim() / 2)?);
        let (cos_table, sin_table) = rotary_tables(config, seq);
        let queue = device.queue();
        queue.upload(cos.view_mut(), &cos_table);
        queue.upload(sin.view_mut(), &sin_table);
        queue.synchronize();
        Ok(Model {
            attention: AttentionShape {
                batch,
                seq,
                heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim(),
            },
            residual: (0..=config.num_hidden_layers).map(|_| allocate(tokens * width)).collect::<Result<_, _>>()?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_, _>>()?,
            head: Head {
                normed: allocate(tokens * width)?,
                inverse_rms: allocate(tokens)?,
                logits: allocate(tokens.min(HEAD_ROWS) * config.vocab_size)?,
            },
            recomputed: Recomputed { normed: allocate(tokens * width)?, activated: allocate(tokens * ffn)? },
            gradients: Gradients {
                residual: allocate(tokens * width)?,
                normed: allocate(tokens * width)?,
                attended: allocate(tokens * width)?,
                q: allocate(tokens * width)?,
                k: allocate(tokens * kv_width)?,
                v: allocate(tokens * kv_width)?,
                gate: allocate(tokens * ffn)?,
                up: allocate(tokens * ffn)?,
                activated: allocate(tokens * ffn)?,
            },
            inputs: device.allocate(DType::U32, tokens)?,
            targets: device.allocate(DType::U32, tokens)?,
            sums: device.allocate(DType::F64, 2)?,
            cos,
            sin,
            config: config.clone(),
        })
    }

    /// Bytes of all activations, f32.
    pub fn activation_bytes(config: &Config, batch: usize, seq: usize) -> u64 {
        let (width, ffn) = (config.hidden_size, config.intermediate_size);
        let kv_width = config.num_key_value_heads * config.head_dim();
        let block = 4 * width + 2 * kv_width + 2 * ffn + config.num_attention_heads + 2;
        let others = (config.num_hidden_layers + 1) * width + width + 1;
        let scratch = 5 * width + 2 * kv_width + 4 * ffn;
        let (tokens, token) = (batch * seq, config.num_hidden_layers * block + others + scratch + 2);
        4 * (tokens * token + tokens.min(HEAD_ROWS) * config.vocab_size + seq * config.head_dim()) as u64
    }

    /// One round of a training step: forward and backward of a micro-batch. `inputs, targets: [B, T]`.
    ///
    /// # Errors
    /// When another rank has failed, or the step has no round left.
    pub fn train(&mut self, step: &mut Step<'_>, inputs: &[u32], targets: &[u32]) -> Result<(), Error> {
        step.round(inputs.len());
        let queue = step.queue();
        queue.upload(self.targets.view_mut(), targets);
        self.forward(step, inputs)?;
        let layers = self.blocks.len();
        self.head_backward(step.backward(layers + 1)?);
        for layer in (0..layers).rev() {
            self.block_backward(layer, step.backward(layer + 1)?);
        }
        let Backward { queue, mut gradients, .. } = step.backward(0)?;
        queue.embedding_backward(gradients.tensor(0), self.gradients.residual.view(), self.inputs.view());
        Ok(())
    }

    /// One round of an evaluation: adds to the sums of [`Model::take_loss`].
    ///
    /// # Errors
    /// As for [`Model::train`].
    pub fn evaluate(&mut self, step: &mut Step<'_>, inputs: &[u32], targets: &[u32]) -> Result<(), Error> {
        step.queue().upload(self.targets.view_mut(), targets);
        let Forward { queue, weights } = self.forward(step, inputs)?;
        let vocab = self.config.vocab_size;
        for rows in self.head_parts() {
            let (logits, targets) = (0..rows.len() * vocab, self.targets.slice(rows.clone()));
            self.head.multiply(queue, weights.tensor(tensor::LM_HEAD), rows, vocab);
            queue.cross_entropy(self.head.logits.slice_mut(logits), targets, self.sums.view_mut());
        }
        Ok(())
    }

    /// (sum of losses, number of tokens) of the evaluations since the last call.
    pub fn take_loss(&mut self, queue: &dyn Queue) -> (f64, f64) {
        let sums = queue.download::<f64>(self.sums.view());
        queue.zero(self.sums.view_mut());
        (sums[0], sums[1])
    }

    /// One round of an evaluation: the logits, `[B, T, V]`.
    ///
    /// # Errors
    /// As for [`Model::train`].
    pub fn logits(&mut self, step: &mut Step<'_>, inputs: &[u32]) -> Result<Vec<f32>, Error> {
        let Forward { queue, weights } = self.forward(step, inputs)?;
        let (vocab, mut all) = (self.config.vocab_size, Vec::new());
        for rows in self.head_parts() {
            self.head.multiply(queue, weights.tensor(tensor::LM_HEAD), rows.clone(), vocab);
            all.extend(queue.download::<f32>(self.head.logits.slice(0..rows.len() * vocab)));
        }
        Ok(all)
    }

    /// Through all units, to the norm before the logits; returns what the head needs.
    fn forward<'s>(&mut self, step: &'s mut Step<'_>, inputs: &[u32]) -> Result<Forward<'s>, Error> {
        let Forward { queue, weights } = step.forward(0)?;
        queue.upload(self.inputs.view_mut(), inputs);
        queue.embedding(self.residual[0].view_mut(), weights.tensor(0), self.inputs.view());
        for layer in 0..self.blocks.len() {
            self.block_forward(layer, step.forward(layer + 1)?);
        }
        let head = step.forward(self.blocks.len() + 1)?;
        let x = self.residual.last().expect("the stream has a last part");
        let (normed, inverse) = (self.head.normed.view_mut(), self.head.inverse_rms.view_mut());
        let weight = head.weights.tensor(tensor::FINAL_NORM);
        head.queue.rms_norm(normed, inverse, x.view(), weight, self.config.rms_norm_eps);
        Ok(head)
    }

    fn block_forward(&mut self, layer: usize, unit: Forward<'_>) {
        let Forward { queue, weights } = unit;
        let rows = self.attention.batch * self.attention.seq;
        let (before, after) = self.residual.split_at_mut(layer + 1);
        let (x, out) = (&before[layer], &mut after[0]);
        let (block, recomputed) = (&mut self.blocks[layer], &mut self.recomputed);
        let epsilon = self.config.rms_norm_eps;

        let (normed, inverse) = (recomputed.normed.view_mut(), block.input_inverse_rms.view_mut());
        queue.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), epsilon);
        queue.linear(block.q.view_mut(), recomputed.normed.view(), weights.tensor(tensor::Q), rows);
        queue.linear(block.k.view_mut(), recomputed.normed.view(), weights.tensor(tensor::K), rows);
        queue.linear(block.v.view_mut(), recomputed.normed.view(), weights.tensor(tensor::V), rows);
        rotate(queue, &mut block.q, &mut block.k, &self.cos, &self.sin, self.attention, false);
        let (attended, log_sum) = (block.attended.view_mut(), block.log_sum.view_mut());
        queue.attention(attended, log_sum, block.q.view(), block.k.view(), block.v.view(), self.attention);
        queue.linear(block.middle.view_mut(), block.attended.view(), weights.tensor(tensor::O), rows);
        queue.add(block.middle.view_mut(), x.view());

        let (normed, inverse) = (recomputed.normed.view_mut(), block.middle_inverse_rms.view_mut());
        queue.rms_norm(normed, inverse, block.middle.view(), weights.tensor(tensor::MLP_NORM), epsilon);
        queue.linear(block.gate.view_mut(), recomputed.normed.view(), weights.tensor(tensor::GATE), rows);
        queue.linear(block.up.view_mut(), recomputed.normed.view(), weights.tensor(tensor::UP), rows);
        queue.swiglu(recomputed.activated.view_mut(), block.gate.view(), block.up.view());
        queue.linear(out.view_mut(), recomputed.activated.view(), weights.tensor(tensor::DOWN), rows);
        queue.add(out.view_mut(), block.middle.view());
    }

    /// Turns the gradient of the residual stream after the block into that before it.
    fn block_backward(&mut self, layer: usize, unit: Backward<'_>) {
        let Backward { queue, weights, mut gradients, .. } = unit;
        let rows = self.attention.batch * self.attention.seq;
        let (x, block, d) = (&self.residual[layer], &mut self.blocks[layer], &mut self.gradients);
        let (recomputed, epsilon) = (&mut self.recomputed, self.config.rms_norm_eps);

        let down = weights.tensor(tensor::DOWN);
        queue.linear_backward_input(d.activated.view_mut(), d.residual.view(), down, rows, false);
        let (gate, up) = (block.gate.view(), block.up.view());
        queue.swiglu(recomputed.activated.view_mut(), gate.clone(), up.clone());
        let activated = recomputed.activated.view();
        queue.linear_backward_weight(gradients.tensor(tensor::DOWN), d.residual.view(), activated, rows);
        queue.swiglu_backward(d.gate.view_mut(), d.up.view_mut(), d.activated.view(), gate, up);
        let (normed, inverse) = (recomputed.normed.view_mut(), block.middle_inverse_rms.view_mut());
        queue.rms_norm(normed, inverse, block.middle.view(), weights.tensor(tensor::MLP_NORM), epsilon);
        for (index, grad, first) in [(tensor::GATE, &d.gate, true), (tensor::UP, &d.up, false)] {
            queue.linear_backward_input(d.normed.view_mut(), grad.view(), weights.tensor(index), rows, !first);
            queue.linear_backward_weight(gradients.tensor(index), grad.view(), recomputed.normed.view(), rows);
        }
        queue.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::MLP_NORM),
            d.normed.view(),
            block.middle.view(),
            block.middle_inverse_rms.view(),
            weights.tensor(tensor::MLP_NORM),
        );

        let o = weights.tensor(tensor::O);
        queue.linear_backward_input(d.attended.view_mut(), d.residual.view(), o, rows, false);
        queue.linear_backward_weight(gradients.tensor(tensor::O), d.residual.view(), block.attended.view(), rows);
        queue.attention_backward(
            d.q.view_mut(),
            d.k.view_mut(),
            d.v.view_mut(),
            d.attended.view(),
            block.q.view(),
            block.k.view(),
            block.v.view(),
            block.attended.view(),
            block.log_sum.view(),
            self.attention,
        );
        rotate(queue, &mut d.q, &mut d.k, &self.cos, &self.sin, self.attention, true);
        let (normed, inverse) = (recomputed.normed.view_mut(), block.input_inverse_rms.view_mut());
        queue.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), epsilon);
        let projections = [(tensor::Q, &d.q, true), (tensor::K, &d.k, false), (tensor::V, &d.v, false)];
        for (index, grad, first) in projections {
            queue.linear_backward_input(d.normed.view_mut(), grad.view(), weights.tensor(index), rows, !first);
            queue.linear_backward_weight(gradients.tensor(index), grad.view(), recomputed.normed.view(), rows);
        }
        queue.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::INPUT_NORM),
            d.normed.view(),
            x.view(),
            block.input_inverse_rms.view(),
            weights.tensor(tensor::INPUT_NORM),
        );
    }

    /// The tokens in parts whose logits exist at a time.
    fn head_parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.attention.batch * self.attention.seq;
        (0..rows).step_by(HEAD_ROWS).map(move |first| first..(first + HEAD_ROWS).min(rows))
    }

    /// The loss, and the gradient of the residual stream after the last block.
    fn head_backward(&mut self, unit: Backward<'_>) {
        let Backward { queue, weights, mut gradients, mut loss } = unit;
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        for rows in self.head_parts() {
            let (count, lm_head) = (rows.len(), weights.tensor(tensor::LM_HEAD));
            self.head.multiply(queue, lm_head.clone(), rows.clone(), vocab);
            let (head, d) = (&mut self.head, &mut self.gradients);
            let logits = 0..count * vocab;
            queue.cross_entropy(
                head.logits.slice_mut(logits.clone()),
                self.targets.slice(rows.clone()),
                loss.reborrow(),
            );
            let of_rows = rows.start * width..rows.end * width;
            let (normed, gradient) = (head.normed.slice(of_rows.clone()), d.normed.slice_mut(of_rows));
            queue.linear_backward_input(gradient, head.logits.slice(logits.clone()), lm_head, count, false);
            let of_weight = gradients.tensor(tensor::LM_HEAD);
            queue.linear_backward_weight(of_weight, head.logits.slice(logits), normed, count);
        }
        let x = self.residual.last().expect("the stream has a last part");
        let (head, d) = (&mut self.head, &mut self.gradients);
        queue.zero(d.residual.view_mut());
        queue.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::FINAL_NORM),
            d.normed.view(),
            x.view(),
            head.inverse_rms.view(),
            weights.tensor(tensor::FINAL_NORM),
        );
    }
}

/// Tokens whose logits exist at a time.
const HEAD_ROWS: usize = 512;

impl Head {
    /// The logits of some tokens.
    fn multiply(&mut self, queue: &dyn Queue, lm_head: View<'_>, rows: Range<usize>, vocab: usize) {
        let (count, width) = (rows.len(), lm_head.len() / vocab);
        let normed = self.normed.slice(rows.start * width..rows.end * width);
        queue.linear(self.logits.slice_mut(0..count * vocab), normed, lm_head, count);
    }
}

/// Rotates queries and keys by position, or back.
fn rotate(
    queue: &dyn Queue,
    q: &mut Buffer,
    k: &mut Buffer,
    cos: &Buffer,
    sin: &Buffer,
    shape: AttentionShape,
    inverse: bool,
) {
    for (x, heads) in [(q, shape.heads), (k, shape.kv_heads)] {
        queue.rope(x.view_mut(), cos.view(), sin.view(), heads, shape.head_dim, inverse);
    }
}

/// cos and sin of t·θ^(−2i/D), `[T, D/2]` each, rounded once from f64.
fn rotary_tables(config: &Config, seq: usize) -> (Vec<f32>, Vec<f32>) {
    let dim = config.head_dim();
    let angles = (0..seq).flat_map(|position| {
        let frequency = move |i: usize| config.rope_theta.powf(-2.0 * i as f64 / dim as f64);
        (0..dim / 2).map(move |i| position as f64 * frequency(i))
    });
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}
