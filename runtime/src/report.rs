//! What a training step reports.

use std::time::Duration;

/// What a training step has done; every number is the same on every rank, but for those of this
/// rank's traffic and time.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Sum of the losses over all tokens, in nats.
    pub loss_sum: f64,
    /// N, tokens.
    pub tokens: f64,
    /// ‖Σₖ Gₖ‖ / N: the norm of the mean gradient, before clipping.
    pub gradient_norm: f64,
    /// ‖Σₖ Gₖ‖² over groups k, each a micro-batch of a rank.
    pub square_norm: f64,
    /// Σₖ ‖Gₖ‖² / nₖ, nₖ tokens in group k, of the values that travelled. Where gradients are
    /// whole, a group is all micro-batches of a rank. None unless every rank measured its own
    /// ([`measure_groups`](crate::Engine::measure_groups)).
    pub group_square_norms: Option<f64>,
    /// What each group has in common with all of them. None unless asked for
    /// ([`compare_groups`](crate::Engine::compare_groups)), in a step that reduces once, of groups
    /// of as many tokens each on all ranks.
    pub comparison: Option<GroupComparison>,
    /// Time for which this rank waited for others: its stream for collectives, by the device's
    /// clock, and its host for the agreement on the step's sums.
    pub exposed: Duration,
    /// Times that this rank's host waited until its device had run all that it was given, as the
    /// device counts them ([`Stream::host_waits`](pillion_kernels::Stream::host_waits)).
    pub host_waits: u64,
    /// Collective operations of this rank.
    pub operations: u64,
    /// Bytes that other ranks read from this one.
    pub bytes: u64,
}

/// The gradients of groups beside their sum G = Σₖ Gₖ.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupComparison {
    /// ⟨Gₖ, G⟩ for each rank k.
    pub products: Vec<f64>,
    /// Number of coordinates i whose noise is at most η times their gradient: σ̂ᵢ²/N ≤ η² (Gᵢ/N)²,
    /// where σ̂ᵢ² is the unbiased estimate from the groups. Those without a gradient are not
    /// counted.
    pub passing: f64,
    /// Σ Gᵢ² over those.
    pub passing_square_norm: f64,
}

/// What the sums of a comparison say, unless groups have different numbers of tokens: only of equal
/// ones is the mean of the squares the square of the mean.
pub(crate) fn comparison(sums: &[f64], tokens: f64, world: f64) -> Option<GroupComparison> {
    let [squares, passing, passing_square_norm, products @ ..] = sums else { return None };
    let equal = squares * world == tokens * tokens;
    equal.then(|| GroupComparison {
        products: products.to_vec(),
        passing: *passing,
        passing_square_norm: *passing_square_norm,
    })
}
