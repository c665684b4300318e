//! A block: attention and feed-forward, each with its norm, added to the residual stream.

use pillion_kernels::{AttentionShape, Buffer, Kernels, View};
use pillion_runtime::{Backward, Error, Forward};

use super::{Model, kernels, tensor};
use crate::activations::Activations;

impl Model {
    pub(super) fn block_forward(&mut self, layer: usize, unit: Forward<'_>) -> Result<(), Error> {
        let Forward { stream, weights } = unit;
        let kernels = kernels(stream)?;
        let rows = self.attention.batch * self.attention.seq;
        let Activations { residual, blocks, recomputed, cos, sin, .. } = &mut self.activations;
        let (before, after) = residual.split_at_mut(layer + 1);
        let (x, out, block) = (&before[layer], &mut after[0], &mut blocks[layer]);
        let epsilon = self.config.rms_norm_eps;

        let (normed, inverse) = (recomputed.normed.view_mut(), block.input_inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), epsilon);
        kernels.linear(block.q.view_mut(), recomputed.normed.view(), weights.tensor(tensor::Q), None, rows);
        kernels.linear(block.k.view_mut(), recomputed.normed.view(), weights.tensor(tensor::K), None, rows);
        kernels.linear(block.v.view_mut(), recomputed.normed.view(), weights.tensor(tensor::V), None, rows);
        rotate(kernels, &mut block.q, &mut block.k, cos, sin, self.attention, false);
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
    pub(super) fn block_backward(&mut self, layer: usize, unit: Backward<'_>) -> Result<(), Error> {
        let Backward { stream, weights, mut gradients, .. } = unit;
        let kernels = kernels(stream)?;
        let rows = self.attention.batch * self.attention.seq;
        let Activations { residual, blocks, recomputed, gradients: d, cos, sin, .. } = &mut self.activations;
        let (x, block, epsilon) = (&residual[layer], &mut blocks[layer], self.config.rms_norm_eps);

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
        rotate(kernels, &mut d.q, &mut d.k, cos, sin, self.attention, true);
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
