//! The head: logits of some tokens at a time, their loss, and the gradients of both.

use std::ops::Range;

use pillion_kernels::{Buffer, Kernels, View, ViewMut};
use pillion_runtime::{Backward, Error};

use super::{Model, kernels, tensor};
use crate::activations::{Activations, HEAD_ROWS, Head};

impl Model {
    /// The tokens in parts whose logits exist at a time.
    pub(super) fn head_parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.attention.batch * self.attention.seq;
        (0..rows).step_by(HEAD_ROWS).map(move |first| first..(first + HEAD_ROWS).min(rows))
    }

    /// The loss, the gradient of the head's matrix, which is in this unit, and that of what it
    /// multiplies.
    pub(super) fn loss_backward(&mut self, unit: &mut Backward<'_>) -> Result<(), Error> {
        let Backward { stream, weights, gradients, loss } = unit;
        let (kernels, matrix) = (kernels(*stream)?, self.config.lm_head());
        let (width, vocab, z_loss) = (self.config.hidden_size, self.config.vocab_size, self.z_loss);
        let parts = self.head_parts();
        let Activations { head, gradients: d, targets, .. } = &mut self.activations;
        for rows in parts {
            let (count, lm_head) = (rows.len(), weights.tensor(matrix));
            head.multiply(kernels, lm_head.clone(), rows.clone(), vocab);
            let logits = 0..count * vocab;
            head.loss(kernels, logits.clone(), targets.slice(rows.clone()), loss.reborrow(), z_loss);
            let grad = head.grad_logits(logits);
            let of_rows = rows.start * width..rows.end * width;
            kernels.linear_backward_input(d.normed.slice_mut(of_rows.clone()), grad.clone(), lm_head, count, false);
            kernels.linear_backward_weight(gradients.tensor(matrix), grad, head.normed.slice(of_rows), count);
        }
        Ok(())
    }

    /// From there to the gradient of the residual stream after the last block.
    pub(super) fn final_norm_backward(&mut self, unit: &mut Backward<'_>) -> Result<(), Error> {
        let Backward { stream, weights, gradients, .. } = unit;
        let kernels = kernels(*stream)?;
        let Activations { head, gradients: d, residual, .. } = &mut self.activations;
        let x = residual.last().expect("the stream has a last part");
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

impl Head<Buffer> {
    /// The logits of some tokens.
    pub(super) fn multiply(&mut self, kernels: &dyn Kernels, lm_head: View<'_>, rows: Range<usize>, vocab: usize) {
        let (count, width) = (rows.len(), lm_head.len() / vocab);
        let normed = self.normed.slice(rows.start * width..rows.end * width);
        kernels.linear(self.logits.slice_mut(0..count * vocab), normed, lm_head, None, count);
    }

    /// Adds the loss of some tokens, and makes the gradient of their logits.
    fn loss(&mut self, kernels: &dyn Kernels, logits: Range<usize>, targets: View<'_>, sum: ViewMut<'_>, z_loss: f32) {
        let narrow = self.narrow.as_mut().map(|narrow| narrow.slice_mut(logits.clone()));
        kernels.cross_entropy(self.logits.slice_mut(logits), narrow, targets, sum, z_loss);
    }

    /// What [`Head::loss`] has made.
    fn grad_logits(&self, logits: Range<usize>) -> View<'_> {
        self.narrow.as_ref().unwrap_or(&self.logits).slice(logits)
    }
}
