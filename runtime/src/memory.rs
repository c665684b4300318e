//! How many bytes a rank needs for parameters, by kind: what the plan table prints.

use pillion_kernels::DType;

use serde::{Deserialize, Serialize};

use crate::{Gather, Layout, Mesh, Outline, Policy, Slots};

/// Bytes of one rank, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// This rank's weights in the type they are computed with: its shards, or all of them. A window counts once over all ranks.
    pub weights: u64,
    /// Slots for gathered weights; none with windows, and none where weights are whole.
    pub gathered: u64,
    /// Slots for gradients on their way, or the whole gradient.
    pub gradients: u64,
    /// This rank's shard of the summed gradient; none where nothing is sharded.
    pub gradient_shard: u64,
    /// Master weights in f32; none where the weights themselves are f32.
    pub master: u64,
    /// What the optimizer keeps for each weight: of AdamW, the two moments in f32.
    pub moments: u64,
}

impl Memory {
    /// Predicts them for a rank of `mesh`. The layout has as many shards as the mesh.
    pub fn of(layout: &Layout, policy: &Policy, mesh: Mesh) -> Memory {
        let outline = Outline::new(layout, policy, mesh);
        let shards = layout.shard_len() as u64;
        let padded: u64 = layout.units.iter().map(|unit| unit.padded as u64).sum();
        let (weights, f32) = (policy.weights.bytes() as u64, DType::F32.bytes() as u64);
        let lens = outline.bucket_lens(layout);
        let in_slots = |slots: &Option<Slots>| {
            let of_slots = |slots: &Slots| slots.lens(&lens).into_iter().map(|len| len as u64).sum();
            slots.as_ref().map_or(padded, of_slots)
        };
        let narrow = if policy.reduce != DType::F32 && mesh.world() > 1 { policy.reduce.bytes() as u64 } else { 0 };
        let parameters = policy.sharded.parameters;
        Memory {
            weights: weights * if parameters { shards } else { padded },
            gathered: match (parameters, policy.gather) {
                (true, Gather::Copy) => weights * in_slots(&outline.weights),
                _ => 0,
            },
            gradients: in_slots(&outline.gradients) * (f32 + narrow),
            gradient_shard: if outline.sharded { shards * f32 } else { 0 },
            master: if policy.weights == DType::F32 { 0 } else { shards * f32 },
            moments: policy.states.len() as u64 * shards * f32,
        }
    }

    /// The same where each host has `ranks` of the ranks: there are windows on every host, which the ranks of a group share there.
    pub fn on_hosts_of(self, ranks: usize, layout: &Layout, policy: &Policy, mesh: Mesh) -> Memory {
        if !policy.sharded.parameters || policy.gather == Gather::Copy {
            return self;
        }
        let padded: u64 = layout.units.iter().map(|unit| unit.padded as u64).sum();
        Memory { weights: policy.weights.bytes() as u64 * padded / ranks.clamp(1, mesh.shard) as u64, ..self }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights + self.gathered + self.gradients + self.gradient_shard + self.master + self.moments
    }
}
