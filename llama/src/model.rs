//! Llama's forward and backward pass, unit by unit, on any device.
//!
//! Shapes: N = B·T tokens of a micro-batch, C width, F feed-forward width, H·D = C query width, K·D key and value width, V vocabulary. Activations are
//! kept for the backward pass, but for those that one pass over memory makes again (norms, SwiGLU); logits and their gradient exist for
//! some tokens at a time. Every buffer is allocated once.
//!
//! Types: what enters a matrix product has the type of the weights (A below); the residual stream, what is added to its gradient, and the logits
//! are f32.

use std::ops::Range;

use pillion_kernels::{AttentionShape, Buffer, DType, Device, Kernels, Stream, View, ViewMut};
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
    /// The residual stream before each block and after the last, `[N, C]` f32 each.
    residual: Vec<Buffer>,
    blocks: Vec<Block>,
    head: Head,
    recomputed: Recomputed,
    gradients: Gradients,
    inputs: Buffer,
    targets: Buffer,
    cos: Buffer,
    sin: Buffer,
    /// Sum of the losses of evaluations, `[1]` f64.
    loss: Buffer,
    /// Their tokens.
    evaluated: usize,
}

/// What a block keeps for its backward pass, A but where it says f32.
struct Block {
    /// f32.
    input_inverse_rms: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    attended: Buffer,
    /// f32.
    log_sum: Buffer,
    /// The residual stream between attention and feed-forward, f32.
    middle: Buffer,
    /// f32.
    middle_inverse_rms: Buffer,
    gate: Buffer,
    up: Buffer,
}

/// What a block makes in its forward pass, and again in its backward pass; A.
struct Recomputed {
    /// A norm's output, `[N, C]`.
    normed: Buffer,
    /// Of SwiGLU, `[N, F]`.
    activated: Buffer,
}

struct Head {
    /// A.
    normed: Buffer,
    inverse_rms: Buffer,
    /// Of at most [`HEAD_ROWS`] tokens, `[·, V]` f32.
    logits: Buffer,
    /// Their gradient, where A is not f32, for which the logits make way.
    narrow: Option<Buffer>,
}

/// Gradients of activations, shared by all blocks; A but where it says f32.
struct Gradients {
    /// Of the residual stream, `[N, C]` f32.
    residual: Buffer,
    /// The same in A, where that is not f32.
    narrow: Option<Buffer>,
    /// Of a norm's output, `[N, C]` f32.
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
    /// Allocates the activations of micro-batches of `batch` sequences of `seq` tokens, for weights that are gathered as `dtype`.
    ///
    /// # Errors
    /// When the device has no memory.
    ///
    /// # Panics
    /// When the shape has not been validated.
    pub fn new(device: &dyn Device, config: &Config, dtype: DType, batch: usize, seq: usize) -> Result<Model, Error> {
        config.validate().expect("a validated shape");
        let tokens = batch * seq;
        let (width, ffn, heads) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let kv_width = config.num_key_value_heads * config.head_dim();
        let wide = |len: usize| device.allocate(DType::F32, len);
        let allocate = |len: usize| device.allocate(dtype, len);
        let narrow = |len: usize| if dtype == DType::F32 { Ok(None) } else { allocate(len).map(Some) };
        let block = |_| {
            Ok::<_, Error>(Block {
                input_inverse_rms: wide(tokens)?,
                q: allocate(tokens * width)?,
                k: allocate(tokens * kv_width)?,
                v: allocate(tokens * kv_width)?,
                attended: allocate(tokens * width)?,
                log_sum: wide(tokens * heads)?,
                middle: wide(tokens * width)?,
                middle_inverse_rms: wide(tokens)?,
                gate: allocate(tokens * ffn)?,
                up: allocate(tokens * ffn)?,
            })
        };
        let (mut cos, mut sin) = (wide(seq * config.head_dim() / 2)?, wide(seq * config.head_dim() / 2)?);
        let (cos_table, sin_table) = rotary_tables(config, seq);
        let stream = device.stream();
        stream.upload(cos.view_mut(), &cos_table);
        stream.upload(sin.view_mut(), &sin_table);
        stream.synchronize()?;
        Ok(Model {
            attention: AttentionShape {
                batch,
                seq,
                heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim(),
            },
            residual: (0..=config.num_hidden_layers).map(|_| wide(tokens * width)).collect::<Result<_, _>>()?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_, _>>()?,
            head: Head {
                normed: allocate(tokens * width)?,
                inverse_rms: wide(tokens)?,
                logits: wide(tokens.min(HEAD_ROWS) * config.vocab_size)?,
                narrow: narrow(tokens.min(HEAD_ROWS) * config.vocab_size)?,
            },
            recomputed: Recomputed { normed: allocate(tokens * width)?, activated: allocate(tokens * ffn)? },
            gradients: Gradients {
                residual: wide(tokens * width)?,
                narrow: narrow(tokens * width)?,
                normed: wide(tokens * width)?,
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
            loss: device.allocate(DType::F64, 1)?,
            evaluated: 0,
            cos,
            sin,
            config: config.clone(),
        })
    }

    /// Tokens of its micro-batches, B·T.
    pub fn tokens(&self) -> usize {
        self.attention.batch * self.attention.seq
    }

    /// Bytes of all activations, for weights that are gathered as `dtype`.
    pub fn activation_bytes(config: &Config, dtype: DType, batch: usize, seq: usize) -> u64 {
        let (layers, width, ffn) = (config.num_hidden_layers, config.hidden_size, config.intermediate_size);
        let kv_width = config.num_key_value_heads * config.head_dim();
        let is_narrow = usize::from(dtype != DType::F32);
        // Elements a token: of blocks, of the head, shared.
        let wide = layers * (width + config.num_attention_heads + 2) + (layers + 1) * width + 1 + 2 * width + 2;
        let typed = layers * (2 * width + 2 * kv_width + 2 * ffn)
            + width
            + (1 + 2 + is_narrow) * width
            + 2 * kv_width
            + 4 * ffn;
        let (tokens, logits) = (batch * seq, (batch * seq).min(HEAD_ROWS) * config.vocab_size);
        let wide = tokens * wide + logits + seq * config.head_dim();
        let typed = tokens * typed + is_narrow * logits;
        (DType::F32.bytes() * wide + dtype.bytes() * typed) as u64
    }

    /// One round of a training step: forward and backward of a micro-batch. `inputs, targets: [B, T]`.
    ///
    /// # Errors
    /// When another rank has failed, or the step has no round left.
    pub fn train(&mut self, step: &mut Step<'_>, inputs: &[u32], targets: &[u32]) -> Result<(), Error> {
        step.round(inputs.len());
        step.stream().upload(self.targets.view_mut(), targets);
        self.forward(step, inputs)?;
        let layers = self.blocks.len();
        self.head_backward(step.backward(layers + 1)?)?;
        for layer in (0..layers).rev() {
            self.block_backward(layer, step.backward(layer + 1)?)?;
        }
        let Backward { stream, mut gradients, .. } = step.backward(0)?;
        kernels(stream)?.embedding_backward(gradients.tensor(0), self.gradients.residual.view(), self.inputs.view());
        Ok(())
    }

    /// One round of an evaluation: adds to the sums of [`Model::take_loss`].
    ///
    /// # Errors
    /// As for [`Model::train`].
    pub fn evaluate(&mut self, step: &mut Step<'_>, inputs: &[u32], targets: &[u32]) -> Result<(), Error> {
        self.evaluated += targets.len();
        step.stream().upload(self.targets.view_mut(), targets);
        let Forward { stream, weights } = self.forward(step, inputs)?;
        let vocab = self.config.vocab_size;
        for rows in self.head_parts() {
            let (logits, targets) = (0..rows.len() * vocab, self.targets.slice(rows.clone()));
            self.head.multiply(kernels(stream)?, weights.tensor(tensor::LM_HEAD), rows, vocab);
            kernels(stream)?.cross_entropy(self.head.logits.slice_mut(logits), None, targets, self.loss.view_mut());
        }
        Ok(())
    }

    /// (sum of losses, number of tokens) of the evaluations since the last call.
    ///
    /// # Errors
    /// When a gather that an evaluation needed failed.
    pub fn take_loss(&mut self, stream: &dyn Stream) -> Result<(f64, f64), Error> {
        let loss = stream.download::<f64>(self.loss.view())?[0];
        stream.zero(self.loss.view_mut());
        Ok((loss, std::mem::take(&mut self.evaluated) as f64))
    }

    /// One round of an evaluation: the logits, `[B, T, V]`.
    ///
    /// # Errors
    /// As for [`Model::train`].
    pub fn logits(&mut self, step: &mut Step<'_>, inputs: &[u32]) -> Result<Vec<f32>, Error> {
        let Forward { stream, weights } = self.forward(step, inputs)?;
        let (vocab, mut all) = (self.config.vocab_size, Vec::new());
        for rows in self.head_parts() {
            self.head.multiply(kernels(stream)?, weights.tensor(tensor::LM_HEAD), rows.clone(), vocab);
            all.extend(stream.download::<f32>(self.head.logits.slice(0..rows.len() * vocab))?);
        }
        Ok(all)
    }

    /// Through all units, to the norm before the logits; returns what the head needs.
    fn forward<'s>(&mut self, step: &'s mut Step<'_>, inputs: &[u32]) -> Result<Forward<'s>, Error> {
        let Forward { stream, weights } = step.forward(0)?;
        stream.upload(self.inputs.view_mut(), inputs);
        kernels(stream)?.embedding(self.residual[0].view_mut(), weights.tensor(0), self.inputs.view());
        for layer in 0..self.blocks.len() {
            self.block_forward(layer, step.forward(layer + 1)?)?;
        }
        let head = step.forward(self.blocks.len() + 1)?;
        let x = self.residual.last().expect("the stream has a last part");
        let (normed, inverse) = (self.head.normed.view_mut(), self.head.inverse_rms.view_mut());
        let weight = head.weights.tensor(tensor::FINAL_NORM);
        kernels(head.stream)?.rms_norm(normed, inverse, x.view(), weight, self.config.rms_norm_eps);
        Ok(head)
    }

    fn block_forward(&mut self, layer: usize, unit: Forward<'_>) -> Result<(), Error> {
        let Forward { stream, weights } = unit;
        let kernels = kernels(stream)?;
        let rows = self.attention.batch * self.attention.seq;
        let (before, after) = self.residual.split_at_mut(layer + 1);
        let (x, out) = (&before[layer], &mut after[0]);
        let (block, recomputed) = (&mut self.blocks[layer], &mut self.recomputed);
        let epsilon = self.config.rms_norm_eps;

        let (normed, inverse) = (recomputed.normed.view_mut(), block.input_inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), epsilon);
        kernels.linear(block.q.view_mut(), recomputed.normed.view(), weights.tensor(tensor::Q), None, rows);
        kernels.linear(block.k.view_mut(), recomputed.normed.view(), weights.tensor(tensor::K), None, rows);
        kernels.linear(block.v.view_mut(), recomputed.normed.view(), weights.tensor(tensor::V), None, rows);
        rotate(kernels, &mut block.q, &mut block.k, &self.cos, &self.sin, self.attention, false);
        let (attended, log_sum) = (block.attended.view_mut(), block.log_sum.view_mut());
        kernels.attention(attended, log_sum, block.q.view(), block.k.view(), block.v.view(), self.attention);
        let (middle, o) = (block.middle.view_mut(), weights.tensor(tensor::O));
        kernels.linear(middle, block.attended.view(), o, Some(x.view()), rows);

        let (normed, inverse) = (recomputed.normed.view_mut(), block.middle_inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, block.middle.view(), weights.tensor(tensor::MLP_NORM), epsilon);
        kernels.linear(block.gate.view_mut(), recomputed.normed.view(), weights.tensor(tensor::GATE), None, rows);
        kernels.linear(block.up.view_mut(), recomputed.normed.view(), weights.tensor(tensor::UP), None, rows);
        kernels.swiglu(recomputed.activated.view_mut(), block.gate.view(), block.up.view());
        let (down, middle) = (weights.tensor(tensor::DOWN), block.middle.view());
        kernels.linear(out.view_mut(), recomputed.activated.view(), down, Some(middle), rows);
        Ok(())
    }

    /// Turns the gradient of the residual stream after the block into that before it.
    fn block_backward(&mut self, layer: usize, unit: Backward<'_>) -> Result<(), Error> {
        let Backward { stream, weights, mut gradients, .. } = unit;
        let kernels = kernels(stream)?;
        let rows = self.attention.batch * self.attention.seq;
        let (x, block, d) = (&self.residual[layer], &mut self.blocks[layer], &mut self.gradients);
        let (recomputed, epsilon) = (&mut self.recomputed, self.config.rms_norm_eps);

        let stream = narrowed(kernels, &d.residual, &mut d.narrow);
        kernels.linear_backward_input(
            d.activated.view_mut(),
            stream.clone(),
            weights.tensor(tensor::DOWN),
            rows,
            false,
        );
        let (activated, grad_gate, grad_up) = (recomputed.activated.view_mut(), d.gate.view_mut(), d.up.view_mut());
        kernels.swiglu_backward(activated, grad_gate, grad_up, d.activated.view(), block.gate.view(), block.up.view());
        kernels.linear_backward_weight(gradients.tensor(tensor::DOWN), stream, recomputed.activated.view(), rows);
        let (normed, inverse) = (recomputed.normed.view_mut(), block.middle_inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, block.middle.view(), weights.tensor(tensor::MLP_NORM), epsilon);
        for (index, grad, first) in [(tensor::GATE, &d.gate, true), (tensor::UP, &d.up, false)] {
            kernels.linear_backward_input(d.normed.view_mut(), grad.view(), weights.tensor(index), rows, !first);
            kernels.linear_backward_weight(gradients.tensor(index), grad.view(), recomputed.normed.view(), rows);
        }
        kernels.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::MLP_NORM),
            d.normed.view(),
            block.middle.view(),
            block.middle_inverse_rms.view(),
            weights.tensor(tensor::MLP_NORM),
        );

        let stream = narrowed(kernels, &d.residual, &mut d.narrow);
        kernels.linear_backward_input(d.attended.view_mut(), stream.clone(), weights.tensor(tensor::O), rows, false);
        kernels.linear_backward_weight(gradients.tensor(tensor::O), stream, block.attended.view(), rows);
        kernels.attention_backward(
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
        rotate(kernels, &mut d.q, &mut d.k, &self.cos, &self.sin, self.attention, true);
        let (normed, inverse) = (recomputed.normed.view_mut(), block.input_inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), epsilon);
        let projections = [(tensor::Q, &d.q, true), (tensor::K, &d.k, false), (tensor::V, &d.v, false)];
        for (index, grad, first) in projections {
            kernels.linear_backward_input(d.normed.view_mut(), grad.view(), weights.tensor(index), rows, !first);
            kernels.linear_backward_weight(gradients.tensor(index), grad.view(), recomputed.normed.view(), rows);
        }
        kernels.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::INPUT_NORM),
            d.normed.view(),
            x.view(),
            block.input_inverse_rms.view(),
            weights.tensor(tensor::INPUT_NORM),
        );
        Ok(())
    }

    /// The tokens in parts whose logits exist at a time.
    fn head_parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.attention.batch * self.attention.seq;
        (0..rows).step_by(HEAD_ROWS).map(move |first| first..(first + HEAD_ROWS).min(rows))
    }

    /// The loss, and the gradient of the residual stream after the last block.
    fn head_backward(&mut self, unit: Backward<'_>) -> Result<(), Error> {
        let Backward { stream, weights, mut gradients, mut loss } = unit;
        let kernels = kernels(stream)?;
        let (width, vocab) = (self.config.hidden_size, self.config.vocab_size);
        for rows in self.head_parts() {
            let (count, lm_head) = (rows.len(), weights.tensor(tensor::LM_HEAD));
            self.head.multiply(kernels, lm_head.clone(), rows.clone(), vocab);
            let (head, d) = (&mut self.head, &mut self.gradients);
            let logits = 0..count * vocab;
            head.loss(kernels, logits.clone(), self.targets.slice(rows.clone()), loss.reborrow());
            let grad = head.grad_logits(logits);
            let of_rows = rows.start * width..rows.end * width;
            kernels.linear_backward_input(d.normed.slice_mut(of_rows.clone()), grad.clone(), lm_head, count, false);
            kernels.linear_backward_weight(gradients.tensor(tensor::LM_HEAD), grad, head.normed.slice(of_rows), count);
        }
        let x = self.residual.last().expect("the stream has a last part");
        let (head, d) = (&mut self.head, &mut self.gradients);
        kernels.zero(d.residual.view_mut());
        kernels.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::FINAL_NORM),
            d.normed.view(),
            x.view(),
            head.inverse_rms.view(),
            weights.tensor(tensor::FINAL_NORM),
        );
        Ok(())
    }
}

/// Tokens whose logits exist at a time.
const HEAD_ROWS: usize = 512;

impl Head {
    /// The logits of some tokens.
    fn multiply(&mut self, kernels: &dyn Kernels, lm_head: View<'_>, rows: Range<usize>, vocab: usize) {
        let (count, width) = (rows.len(), lm_head.len() / vocab);
        let normed = self.normed.slice(rows.start * width..rows.end * width);
        kernels.linear(self.logits.slice_mut(0..count * vocab), normed, lm_head, None, count);
    }

    /// Adds the loss of some tokens, and makes the gradient of their logits.
    fn loss(&mut self, kernels: &dyn Kernels, logits: Range<usize>, targets: View<'_>, sum: ViewMut<'_>) {
        let narrow = self.narrow.as_mut().map(|narrow| narrow.slice_mut(logits.clone()));
        kernels.cross_entropy(self.logits.slice_mut(logits), narrow, targets, sum);
    }

    /// What [`Head::loss`] has made.
    fn grad_logits(&self, logits: Range<usize>) -> View<'_> {
        self.narrow.as_ref().unwrap_or(&self.logits).slice(logits)
    }
}

/// The mathematics of the stream's device.
fn kernels(stream: &dyn Stream) -> Result<&dyn Kernels, Error> {
    Ok(stream.kernels().ok_or(pillion_kernels::Error::NoKernels)?)
}

/// What products take of an f32 tensor: itself, or a copy in their type.
fn narrowed<'a>(kernels: &dyn Kernels, wide: &'a Buffer, narrow: &'a mut Option<Buffer>) -> View<'a> {
    match narrow {
        None => wide.view(),
        Some(narrow) => {
            kernels.cast(narrow.view_mut(), wide.view());
            narrow.view()
        }
    }
}

/// Rotates queries and keys by position, or back.
fn rotate(
    kernels: &dyn Kernels,
    q: &mut Buffer,
    k: &mut Buffer,
    cos: &Buffer,
    sin: &Buffer,
    shape: AttentionShape,
    inverse: bool,
) {
    for (x, heads) in [(q, shape.heads), (k, shape.kv_heads)] {
        kernels.rope(x.view_mut(), cos.view(), sin.view(), heads, shape.head_dim, inverse);
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
