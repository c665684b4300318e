//! Llama's forward and backward pass, unit by unit, on any device.
//!
//! | file | subject |
//! |---|---|
//! | `activations` | the buffers, their shapes and types |
//! | `model/block` | the passes through a block |
//! | `model/head` | the passes through the head |
//!
//! Activations are kept for the backward pass. Exceptions are those that one pass over memory makes
//! again (norms, SwiGLU) and those that [`Recompute`] names. Logits and their gradient exist for
//! some tokens at a time. All buffers are allocated once, together.
//!
//! Types: what enters a matrix product has the type of the weights. The residual stream, what is
//! added to its gradient, and the logits are f32.

mod block;
mod head;

use pillion_kernels::{AttentionShape, Buffer, DType, Device, Documents, IGNORED, Kernels, Stream};
use pillion_runtime::{Backward, Error, Forward, Step};

pub use crate::activations::Recompute;
use crate::activations::{Activations, Shape};
use crate::config::Config;
use crate::rotary;

/// Indices of a block's tensors, in the order of [`Config::units`].
pub(crate) mod tensor {
    pub(crate) const INPUT_NORM: usize = 0;
    pub(crate) const Q: usize = 1;
    pub(crate) const K: usize = 2;
    pub(crate) const V: usize = 3;
    pub(crate) const O: usize = 4;
    pub(crate) const MLP_NORM: usize = 5;
    pub(crate) const GATE: usize = 6;
    pub(crate) const UP: usize = 7;
    pub(crate) const DOWN: usize = 8;
    /// Of the head's unit.
    pub(crate) const FINAL_NORM: usize = 0;
}

/// A model's activations on one rank, and the passes through them.
pub struct Model {
    config: Config,
    attention: AttentionShape,
    activations: Activations<Buffer>,
    /// Tokens of the evaluations whose losses the activations have the sum of.
    evaluated: usize,
    recompute: Recompute,
    z_loss: f32,
}

impl Model {
    /// Allocates the activations of micro-batches of `batch` sequences of `seq` tokens, for weights that are gathered as `dtype`.
    ///
    /// # Errors
    /// When the device has no memory.
    ///
    /// # Panics
    /// When the shape has not been validated.
    pub fn new(
        device: &dyn Device,
        config: &Config,
        dtype: DType,
        batch: usize,
        seq: usize,
        recompute: Recompute,
    ) -> Result<Model, Error> {
        config.validate().expect("a validated shape");
        let mut activations = Shape { config, dtype, batch, seq, recompute }.allocate(device)?;
        let (cos, sin) = rotary::tables(config, seq);
        let stream = device.stream();
        stream.upload(activations.cos.view_mut(), &cos);
        stream.upload(activations.sin.view_mut(), &sin);
        stream.synchronize()?;
        let attention = Model::attention_shape(config, batch, seq);
        Ok(Model { config: config.clone(), attention, activations, evaluated: 0, recompute, z_loss: 0.0 })
    }

    /// The same with an auxiliary loss of this weight, which keeps logits near 0
    /// ([`Kernels::cross_entropy`]). The losses that steps report do not have it.
    pub fn with_z_loss(self, z_loss: f32) -> Model {
        Model { z_loss, ..self }
    }

    /// The attention of a micro-batch of `batch` sequences of `seq` tokens.
    pub fn attention_shape(config: &Config, batch: usize, seq: usize) -> AttentionShape {
        AttentionShape {
            batch,
            seq,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
        }
    }

    /// Tokens of its micro-batches, B·T.
    pub fn tokens(&self) -> usize {
        self.attention.batch * self.attention.seq
    }

    /// Bytes that [`Model::new`] allocates.
    pub fn activation_bytes(config: &Config, dtype: DType, batch: usize, seq: usize, recompute: Recompute) -> u64 {
        Shape { config, dtype, batch, seq, recompute }.bytes()
    }

    /// One round of a training step: forward and backward of a micro-batch. `inputs, targets: [B, T]`.
    /// Targets that are [`IGNORED`] are not learned. With `documents`, a token sees its own document
    /// alone; positions are counted from the beginning of the sequence all the same, because only
    /// their differences matter.
    ///
    /// # Errors
    /// When another rank has failed, or the step has no round left.
    ///
    /// # Panics
    /// When the documents are of another shape.
    pub fn train(
        &mut self,
        step: &mut Step<'_>,
        inputs: &[u32],
        targets: &[u32],
        documents: Option<&Documents>,
    ) -> Result<(), Error> {
        step.round(learned(targets));
        step.stream().upload(self.activations.targets.view_mut(), targets);
        self.forward(step, inputs, documents)?;
        let layers = self.config.num_hidden_layers;
        if self.config.tie_word_embeddings {
            self.loss_backward(&mut step.backward(0)?)?;
            self.final_norm_backward(&mut step.backward(layers + 1)?)?;
        } else {
            let mut head = step.backward(layers + 1)?;
            self.loss_backward(&mut head)?;
            self.final_norm_backward(&mut head)?;
        }
        for layer in (0..layers).rev() {
            self.block_backward(layer, step.backward(layer + 1)?, documents)?;
        }
        let Backward { stream, mut gradients, .. } = step.backward(0)?;
        kernels(stream)?.embedding_backward(
            gradients.tensor(0),
            self.activations.gradients.residual.view(),
            self.activations.inputs.view(),
        );
        Ok(())
    }

    /// One round of an evaluation: adds to the sums of [`Model::take_loss`].
    ///
    /// # Errors
    /// As for [`Model::train`].
    ///
    /// # Panics
    /// As for [`Model::train`].
    pub fn evaluate(
        &mut self,
        step: &mut Step<'_>,
        inputs: &[u32],
        targets: &[u32],
        documents: Option<&Documents>,
    ) -> Result<(), Error> {
        self.evaluated += learned(targets);
        step.stream().upload(self.activations.targets.view_mut(), targets);
        let Forward { stream, weights } = self.forward(step, inputs, documents)?;
        let vocab = self.config.vocab_size;
        for rows in self.head_parts() {
            let (logits, targets) = (0..rows.len() * vocab, self.activations.targets.slice(rows.clone()));
            self.activations.head.multiply(kernels(stream)?, weights.tensor(self.config.lm_head()), rows, vocab);
            kernels(stream)?.cross_entropy(
                self.activations.head.logits.slice_mut(logits),
                None,
                targets,
                self.activations.loss.view_mut(),
                0.0,
            );
        }
        Ok(())
    }

    /// (sum of losses, number of tokens) of the evaluations since the last call.
    ///
    /// # Errors
    /// When a gather that an evaluation needed failed.
    pub fn take_loss(&mut self, stream: &dyn Stream) -> Result<(f64, f64), Error> {
        let loss = stream.download::<f64>(self.activations.loss.view())?[0];
        stream.zero(self.activations.loss.view_mut());
        Ok((loss, std::mem::take(&mut self.evaluated) as f64))
    }

    /// One round of an evaluation: the logits, `[B, T, V]`.
    ///
    /// # Errors
    /// As for [`Model::train`].
    ///
    /// # Panics
    /// As for [`Model::train`].
    pub fn logits(
        &mut self,
        step: &mut Step<'_>,
        inputs: &[u32],
        documents: Option<&Documents>,
    ) -> Result<Vec<f32>, Error> {
        let Forward { stream, weights } = self.forward(step, inputs, documents)?;
        let (vocab, mut all) = (self.config.vocab_size, Vec::new());
        for rows in self.head_parts() {
            self.activations.head.multiply(
                kernels(stream)?,
                weights.tensor(self.config.lm_head()),
                rows.clone(),
                vocab,
            );
            all.extend(stream.download::<f32>(self.activations.head.logits.slice(0..rows.len() * vocab))?);
        }
        Ok(all)
    }

    /// Through all units, to the norm before the logits; returns the unit with the head's matrix.
    fn forward<'s>(
        &mut self,
        step: &'s mut Step<'_>,
        inputs: &[u32],
        documents: Option<&Documents>,
    ) -> Result<Forward<'s>, Error> {
        let Forward { stream, weights } = step.forward(0)?;
        stream.upload(self.activations.inputs.view_mut(), inputs);
        kernels(stream)?.embedding(
            self.activations.residual[0].view_mut(),
            weights.tensor(0),
            self.activations.inputs.view(),
        );
        for layer in 0..self.config.num_hidden_layers {
            self.block_forward(layer, step.forward(layer + 1)?, documents)?;
        }
        let last = self.config.num_hidden_layers + 1;
        if self.config.tie_word_embeddings {
            self.final_norm(&step.forward(last)?)?;
            return step.forward(0);
        }
        let head = step.forward(last)?;
        self.final_norm(&head)?;
        Ok(head)
    }

    fn final_norm(&mut self, unit: &Forward<'_>) -> Result<(), Error> {
        let x = self.activations.residual.last().expect("the stream has a last part");
        let (normed, inverse) = (self.activations.head.normed.view_mut(), self.activations.head.inverse_rms.view_mut());
        let weight = unit.weights.tensor(tensor::FINAL_NORM);
        kernels(unit.stream)?.rms_norm(normed, inverse, x.view(), weight, self.config.rms_norm_eps);
        Ok(())
    }
}

/// How many of the targets count.
fn learned(targets: &[u32]) -> usize {
    targets.iter().filter(|&&target| target != IGNORED).count()
}

/// The mathematics of the stream's device.
pub(crate) fn kernels(stream: &dyn Stream) -> Result<&dyn Kernels, Error> {
    Ok(stream.kernels().ok_or(pillion_kernels::Error::NoKernels)?)
}
