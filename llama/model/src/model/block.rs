//! A block: attention and feed-forward, each with its norm, added to the residual stream.

use pillion_kernels::{AttentionShape, Buffer, Documents, Kernels, View};
use pillion_runtime::{Backward, Error, Forward, Weights};

use super::{Model, kernels, tensor};
use crate::activations::{Activations, Attention, FeedForward, Recompute, of_block};

impl Model {
    pub(super) fn block_forward(
        &mut self,
        layer: usize,
        unit: Forward<'_>,
        documents: Option<&Documents>,
    ) -> Result<(), Error> {
        let Forward { stream, weights } = unit;
        let kernels = kernels(stream)?;
        let rows = self.tokens();
        self.attention_forward(layer, kernels, &weights, documents);
        self.feed_forward(layer, kernels, &weights);
        let Activations { residual, feed_forward, recomputed, .. } = &mut self.activations;
        let (out, feed_forward) = (&mut residual[layer + 1], of_block(feed_forward, layer));
        kernels.swiglu(recomputed.activated.view_mut(), feed_forward.gate.view(), feed_forward.up.view());
        let (down, middle) = (weights.tensor(tensor::DOWN), feed_forward.middle.view());
        kernels.linear(out.view_mut(), recomputed.activated.view(), down, Some(middle), rows);
        Ok(())
    }

    /// From the residual stream before the block to what attention returns.
    fn attention_forward(
        &mut self,
        layer: usize,
        kernels: &dyn Kernels,
        weights: &Weights<'_>,
        documents: Option<&Documents>,
    ) {
        let rows = self.tokens();
        let Activations { residual, attention, recomputed, cos, sin, .. } = &mut self.activations;
        let (x, attention) = (&residual[layer], of_block(attention, layer));
        let (normed, inverse) = (recomputed.normed.view_mut(), attention.inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, x.view(), weights.tensor(tensor::INPUT_NORM), self.config.rms_norm_eps);
        let Attention { q, k, v, attended, log_sum, .. } = attention;
        kernels.linear(q.view_mut(), recomputed.normed.view(), weights.tensor(tensor::Q), None, rows);
        kernels.linear(k.view_mut(), recomputed.normed.view(), weights.tensor(tensor::K), None, rows);
        kernels.linear(v.view_mut(), recomputed.normed.view(), weights.tensor(tensor::V), None, rows);
        rotate(kernels, q, k, cos, sin, self.attention, false);
        let (out, log_sum) = (attended.view_mut(), log_sum.view_mut());
        kernels.attention(out, log_sum, q.view(), k.view(), v.view(), self.attention, documents);
    }

    /// From there to gate and up.
    fn feed_forward(&mut self, layer: usize, kernels: &dyn Kernels, weights: &Weights<'_>) {
        let rows = self.tokens();
        let Activations { residual, attention, feed_forward, recomputed, .. } = &mut self.activations;
        let (x, attended) = (&residual[layer], &of_block(attention, layer).attended);
        let FeedForward { middle, inverse_rms, gate, up } = of_block(feed_forward, layer);
        kernels.linear(middle.view_mut(), attended.view(), weights.tensor(tensor::O), Some(x.view()), rows);
        let (normed, inverse) = (recomputed.normed.view_mut(), inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, middle.view(), weights.tensor(tensor::MLP_NORM), self.config.rms_norm_eps);
        kernels.linear(gate.view_mut(), recomputed.normed.view(), weights.tensor(tensor::GATE), None, rows);
        kernels.linear(up.view_mut(), recomputed.normed.view(), weights.tensor(tensor::UP), None, rows);
    }

    /// Turns the gradient of the residual stream after the block into that before it. What the
    /// block has not kept is computed again first, by the same kernels from the same numbers.
    pub(super) fn block_backward(
        &mut self,
        layer: usize,
        unit: Backward<'_>,
        documents: Option<&Documents>,
    ) -> Result<(), Error> {
        let Backward { stream, weights, mut gradients, .. } = unit;
        let kernels = kernels(stream)?;
        match self.recompute.of(layer, self.config.num_hidden_layers) {
            Recompute::None => {}
            Recompute::Attention => self.attention_forward(layer, kernels, &weights, documents),
            Recompute::Block => {
                self.attention_forward(layer, kernels, &weights, documents);
                self.feed_forward(layer, kernels, &weights);
            }
        }
        let (rows, epsilon) = (self.tokens(), self.config.rms_norm_eps);
        let Activations { residual, attention, feed_forward, recomputed, gradients: d, cos, sin, .. } =
            &mut self.activations;
        let x = &residual[layer];
        let (attention, feed_forward) = (of_block(attention, layer), of_block(feed_forward, layer));

        let stream = narrowed(kernels, &d.residual, &mut d.narrow);
        kernels.linear_backward_input(
            d.activated.view_mut(),
            stream.clone(),
            weights.tensor(tensor::DOWN),
            rows,
            false,
        );
        let (activated, grad_gate, grad_up) = (recomputed.activated.view_mut(), d.gate.view_mut(), d.up.view_mut());
        kernels.swiglu_backward(
            activated,
            grad_gate,
            grad_up,
            d.activated.view(),
            feed_forward.gate.view(),
            feed_forward.up.view(),
        );
        kernels.linear_backward_weight(gradients.tensor(tensor::DOWN), stream, recomputed.activated.view(), rows);
        let (normed, inverse) = (recomputed.normed.view_mut(), feed_forward.inverse_rms.view_mut());
        kernels.rms_norm(normed, inverse, feed_forward.middle.view(), weights.tensor(tensor::MLP_NORM), epsilon);
        for (index, grad, first) in [(tensor::GATE, &d.gate, true), (tensor::UP, &d.up, false)] {
            kernels.linear_backward_input(d.normed.view_mut(), grad.view(), weights.tensor(index), rows, !first);
            kernels.linear_backward_weight(gradients.tensor(index), grad.view(), recomputed.normed.view(), rows);
        }
        kernels.rms_norm_backward(
            d.residual.view_mut(),
            gradients.tensor(tensor::MLP_NORM),
            d.normed.view(),
            feed_forward.middle.view(),
            feed_forward.inverse_rms.view(),
            weights.tensor(tensor::MLP_NORM),
        );

        let stream = narrowed(kernels, &d.residual, &mut d.narrow);
        kernels.linear_backward_input(d.attended.view_mut(), stream.clone(), weights.tensor(tensor::O), rows, false);
        kernels.linear_backward_weight(gradients.tensor(tensor::O), stream, attention.attended.view(), rows);
        kernels.attention_backward(
            d.q.view_mut(),
            d.k.view_mut(),
            d.v.view_mut(),
            d.attended.view(),
            attention.q.view(),
            attention.k.view(),
            attention.v.view(),
            attention.attended.view(),
            attention.log_sum.view(),
            self.attention,
            documents,
        );
        rotate(kernels, &mut d.q, &mut d.k, cos, sin, self.attention, true);
        let (normed, inverse) = (recomputed.normed.view_mut(), attention.inverse_rms.view_mut());
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
            attention.inverse_rms.view(),
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
