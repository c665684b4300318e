//! A model that writes: forward passes over the tokens that are new, with the keys and values of
//! those before.

use std::ops::Range;

use pillion_kernels::{AttentionShape, Buffer, DType, Device, Kernels, Part};
use pillion_runtime::{Error, Forward, Step, Weights};

use crate::config::Config;
use crate::model::{kernels, tensor};
use crate::rotary;

/// Tokens that pass through the model at a time, at most.
pub const CHUNK: usize = 128;

/// One text under way on one rank: the keys and values of its tokens so far, and what a pass over
/// the next ones needs.
pub struct Decoder {
    config: Config,
    /// Tokens that a text can have.
    capacity: usize,
    /// Tokens that it has.
    len: usize,
    buffers: Buffers<Buffer>,
}

/// N = [`CHUNK`] tokens or fewer, T the capacity; A is the type of the weights. The other letters
/// are those of the model's activations.
struct Buffers<T> {
    /// `[N]` u32.
    inputs: T,
    /// cos and sin of the rotary angles, `[T, D/2]` f32.
    cos: T,
    sin: T,
    /// Keys and values of each block, `[T, K·D]` A.
    cache: Vec<[T; 2]>,
    /// The residual stream before and after a part of a block, `[N, C]` f32.
    residual: [T; 2],
    /// `[N]` f32.
    inverse_rms: T,
    /// `[N, C]` A.
    normed: T,
    /// `[N, H·D]` A.
    q: T,
    attended: T,
    /// `[N, F]` A.
    gate: T,
    up: T,
    activated: T,
    /// Of the last token, `[V]` f32.
    logits: T,
}

/// Asks `make` for every buffer, by the type and number of its elements, always in this order.
fn describe<T>(config: &Config, a: DType, capacity: usize, mut make: impl FnMut(DType, usize) -> T) -> Buffers<T> {
    let (f32, tokens) = (DType::F32, CHUNK.min(capacity));
    let (width, query_width, ffn) = (config.hidden_size, config.query_width(), config.intermediate_size);
    let angles = capacity * config.head_dim() / 2;
    let kept = capacity * config.kv_width();
    Buffers {
        inputs: make(DType::U32, tokens),
        cos: make(f32, angles),
        sin: make(f32, angles),
        cache: (0..config.num_hidden_layers).map(|_| [make(a, kept), make(a, kept)]).collect(),
        residual: [make(f32, tokens * width), make(f32, tokens * width)],
        inverse_rms: make(f32, tokens),
        normed: make(a, tokens * width),
        q: make(a, tokens * query_width),
        attended: make(a, tokens * query_width),
        gate: make(a, tokens * ffn),
        up: make(a, tokens * ffn),
        activated: make(a, tokens * ffn),
        logits: make(f32, config.vocab_size),
    }
}

impl Decoder {
    /// Allocates what texts of at most `capacity` tokens need, for weights that are gathered as
    /// `dtype`.
    ///
    /// # Errors
    /// When the device has no memory.
    ///
    /// # Panics
    /// When the shape has not been validated, or the capacity is 0.
    pub fn new(device: &dyn Device, config: &Config, dtype: DType, capacity: usize) -> Result<Decoder, Error> {
        config.validate().expect("a validated shape");
        assert!(capacity > 0, "a text has tokens");
        let mut parts = Vec::new();
        describe(config, dtype, capacity, |dtype, len| parts.push(Part { dtype, len }));
        let mut allocated = device.allocate_parts(&parts)?.into_iter();
        let mut buffers =
            describe(config, dtype, capacity, |_, _| allocated.next().expect("the description is the same"));
        let (cos, sin) = rotary::tables(config, capacity);
        let stream = device.stream();
        stream.upload(buffers.cos.view_mut(), &cos);
        stream.upload(buffers.sin.view_mut(), &sin);
        stream.synchronize()?;
        Ok(Decoder { config: config.clone(), capacity, len: 0, buffers })
    }

    /// Bytes that [`Decoder::new`] allocates.
    pub fn bytes(config: &Config, dtype: DType, capacity: usize) -> u64 {
        let mut sum = 0u64;
        describe(config, dtype, capacity, |dtype, len| {
            let bytes = Part { dtype, len }.bytes().map_or(u64::MAX, |bytes| bytes as u64);
            sum = sum.saturating_add(bytes);
        });
        sum
    }

    /// The attention of a text that is as long as it can be.
    pub fn attention_shape(config: &Config, capacity: usize) -> AttentionShape {
        AttentionShape {
            batch: 1,
            seq: capacity,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
        }
    }

    /// Tokens of the model's vocabulary.
    pub fn vocab(&self) -> usize {
        self.config.vocab_size
    }

    /// Tokens that a text can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that the text has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the text has no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Begins another text.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// The rounds of an evaluation that so many tokens take.
    pub fn rounds(tokens: usize) -> usize {
        tokens.div_ceil(CHUNK)
    }

    /// Adds tokens to the text, [`Decoder::rounds`] rounds of an evaluation; returns the logits of
    /// what follows the last one, `[V]`.
    ///
    /// # Errors
    /// When another rank has failed.
    ///
    /// # Panics
    /// When there are none, or more than there is room for.
    pub fn feed(&mut self, step: &mut Step<'_>, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        assert!(!tokens.is_empty() && tokens.len() <= self.capacity - self.len, "{} tokens", tokens.len());
        let chunks = tokens.len().div_ceil(CHUNK);
        for (index, chunk) in tokens.chunks(CHUNK).enumerate() {
            let head = self.forward(step, chunk)?;
            if index + 1 == chunks {
                let (stream, row) = (head.stream, (chunk.len() - 1) * self.config.hidden_size);
                let Buffers { normed, logits, .. } = &mut self.buffers;
                let matrix = head.weights.tensor(self.config.lm_head());
                let last = normed.slice(row..row + self.config.hidden_size);
                kernels(stream)?.linear(logits.view_mut(), last, matrix, None, 1);
                return Ok(stream.download::<f32>(logits.view())?);
            }
        }
        unreachable!("there is a last chunk")
    }

    /// Through all units, to the norm before the logits; returns the unit with the head's matrix.
    fn forward<'s>(&mut self, step: &'s mut Step<'_>, tokens: &[u32]) -> Result<Forward<'s>, Error> {
        let (rows, width) = (tokens.len(), self.config.hidden_size);
        let Forward { stream, weights } = step.forward(0)?;
        let Buffers { inputs, residual, .. } = &mut self.buffers;
        stream.upload(inputs.slice_mut(0..rows), tokens);
        kernels(stream)?.embedding(residual[0].slice_mut(0..rows * width), weights.tensor(0), inputs.slice(0..rows));
        for layer in 0..self.config.num_hidden_layers {
            let Forward { stream, weights } = step.forward(layer + 1)?;
            self.attend(layer, kernels(stream)?, &weights, rows);
            self.feed_forward(kernels(stream)?, &weights, rows);
        }
        self.len += rows;
        let last = self.config.num_hidden_layers + 1;
        if self.config.tie_word_embeddings {
            self.final_norm(&step.forward(last)?, rows)?;
            return step.forward(0);
        }
        let head = step.forward(last)?;
        self.final_norm(&head, rows)?;
        Ok(head)
    }

    fn attend(&mut self, layer: usize, kernels: &dyn Kernels, weights: &Weights<'_>, rows: usize) {
        let config = &self.config;
        let (width, query_width, kv_width) = (config.hidden_size, config.query_width(), config.kv_width());
        let of = |columns: usize| 0..rows * columns;
        // The tokens that there are, and all with the new ones.
        let (first, seen) = (self.len, self.len + rows);
        let angles = first * config.head_dim() / 2..seen * config.head_dim() / 2;
        let Buffers { cache, cos, sin, residual: [x, middle], inverse_rms, normed, q, attended, .. } =
            &mut self.buffers;
        let [keys, values] = &mut cache[layer];
        let new: Range<usize> = first * kv_width..seen * kv_width;
        let (normed_, inverse) = (normed.slice_mut(of(width)), inverse_rms.slice_mut(0..rows));
        let norm = weights.tensor(tensor::INPUT_NORM);
        kernels.rms_norm(normed_, inverse, x.slice(of(width)), norm, config.rms_norm_eps);
        let normed = || normed.slice(of(width));
        kernels.linear(q.slice_mut(of(query_width)), normed(), weights.tensor(tensor::Q), None, rows);
        kernels.linear(keys.slice_mut(new.clone()), normed(), weights.tensor(tensor::K), None, rows);
        kernels.linear(values.slice_mut(new.clone()), normed(), weights.tensor(tensor::V), None, rows);
        for (x, heads) in [
            (q.slice_mut(of(query_width)), config.num_attention_heads),
            (keys.slice_mut(new), config.num_key_value_heads),
        ] {
            let (cos, sin) = (cos.slice(angles.clone()), sin.slice(angles.clone()));
            kernels.rope(x, cos, sin, heads, config.head_dim(), false);
        }
        let shape = Decoder::attention_shape(config, seen);
        let (keys, values) = (keys.slice(0..seen * kv_width), values.slice(0..seen * kv_width));
        let out = attended.slice_mut(of(query_width));
        kernels.attention_from(first, out, q.slice(of(query_width)), keys, values, shape);
        let attended = attended.slice(of(query_width));
        let (middle, x) = (middle.slice_mut(of(width)), Some(x.slice(of(width))));
        kernels.linear(middle, attended, weights.tensor(tensor::O), x, rows);
    }

    fn feed_forward(&mut self, kernels: &dyn Kernels, weights: &Weights<'_>, rows: usize) {
        let (width, ffn) = (self.config.hidden_size, self.config.intermediate_size);
        let of = |columns: usize| 0..rows * columns;
        let Buffers { residual: [out, middle], inverse_rms, normed, gate, up, activated, .. } = &mut self.buffers;
        let (normed_, inverse) = (normed.slice_mut(of(width)), inverse_rms.slice_mut(0..rows));
        let norm = weights.tensor(tensor::MLP_NORM);
        kernels.rms_norm(normed_, inverse, middle.slice(of(width)), norm, self.config.rms_norm_eps);
        let normed = || normed.slice(of(width));
        kernels.linear(gate.slice_mut(of(ffn)), normed(), weights.tensor(tensor::GATE), None, rows);
        kernels.linear(up.slice_mut(of(ffn)), normed(), weights.tensor(tensor::UP), None, rows);
        kernels.swiglu(activated.slice_mut(of(ffn)), gate.slice(of(ffn)), up.slice(of(ffn)));
        let middle = Some(middle.slice(of(width)));
        let (out, activated) = (out.slice_mut(of(width)), activated.slice(of(ffn)));
        kernels.linear(out, activated, weights.tensor(tensor::DOWN), middle, rows);
    }

    fn final_norm(&mut self, unit: &Forward<'_>, rows: usize) -> Result<(), Error> {
        let all = 0..rows * self.config.hidden_size;
        let Buffers { residual: [x, _], inverse_rms, normed, .. } = &mut self.buffers;
        let (normed, inverse) = (normed.slice_mut(all.clone()), inverse_rms.slice_mut(0..rows));
        let weight = unit.weights.tensor(tensor::FINAL_NORM);
        kernels(unit.stream)?.rms_norm(normed, inverse, x.slice(all), weight, self.config.rms_norm_eps);
        Ok(())
    }
}
