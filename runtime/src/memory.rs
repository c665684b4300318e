//! How many bytes a rank needs for parameters, by kind: what the plan table prints.

use pillion_kernels::DType;

use crate::{Gather, Layout, Policy};

/// Bytes of one rank, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// This rank's shards of the weights, in the type they are computed with. A window counts once over all ranks.
    pub weights: u64,
    /// Slots for gathered weights; none with windows.
    pub gathered: u64,
    /// Slots for gradients on their way.
    pub gradients: u64,
    /// This rank's shard of the summed gradient.
    pub gradient_shard: u64,
    /// Master weights in f32; none where the weights themselves are f32.
    pub master: u64,
    /// Adam's two moments in f32.
    pub moments: u64,
}

impl Memory {
    /// Predicts them.
    pub fn of(layout: &Layout, policy: &Policy) -> Memory {
        let (shards, longest) = (layout.shards() as u64, layout.longest_unit() as u64);
        let (weights, f32) = (policy.weights.bytes() as u64, DType::F32.bytes() as u64);
        let slots = policy.slots as u64;
        Memory {
            weights: shards * weights,
            gathered: if policy.gather == Gather::Copy { slots * longest * weights } else { 0 },
            gradients: slots * longest * f32,
            gradient_shard: shards * f32,
            master: if policy.weights == DType::F32 { 0 } else { shards * f32 },
            moments: 2 * shards * f32,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights + self.gathered + self.gradients + self.gradient_shard + self.master + self.moments
    }
}
