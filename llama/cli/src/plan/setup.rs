//! What is trained, and how: the plan of its steps, and the memory that they need.

use pillion_collectives::Launch;
use pillion_llama::config::{BACKWARD_FLOPS, Config};
use pillion_llama::model::{Model, Recompute};
use pillion_runtime::checkpoint::{Saver, Staging};
use pillion_runtime::simulate::Work;
use pillion_runtime::{Layout, Memory, Mesh, Outline, Plan, Policy, Verified};

use crate::Error;
use crate::train::recipe::Recipe;

/// What is trained, and how.
#[derive(Clone, Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) model: &'a Config,
    pub(crate) policy: Policy,
    pub(crate) recompute: Recompute,
    /// What a checkpoint passes through.
    pub(crate) staging: Staging,
    pub(crate) mesh: Mesh,
    /// Ranks on each host.
    pub(crate) local: usize,
    pub(crate) seq: usize,
    pub(crate) micro_batch: u64,
    pub(crate) rounds: usize,
}

/// A step's plan and what it needs.
pub(crate) struct Planned {
    pub(crate) layout: Layout,
    pub(crate) plan: Verified,
    pub(super) work: Work,
    pub(crate) needs: Needs,
}

/// Bytes of a rank.
pub(crate) struct Needs {
    pub(crate) memory: Memory,
    /// What a checkpoint passes through.
    pub(crate) checkpoints: u64,
    pub(crate) activations: u64,
}

impl Needs {
    /// Bytes of a rank in all.
    pub(crate) fn total(&self) -> u64 {
        self.memory.total() + self.checkpoints + self.activations
    }
}

/// What to say where memory is short and checkpoints have copies.
pub(crate) fn ring_remedy(staging: Staging) -> &'static str {
    if staging == Staging::Copies { ", or --save-memory 1MiB instead of copies" } else { "" }
}

impl<'a> Setup<'a> {
    /// A run's, for steps of `batch` samples.
    ///
    /// # Errors
    /// When the policy does not fit the ranks.
    pub(crate) fn of(
        recipe: &'a Recipe,
        policy: Policy,
        recompute: Recompute,
        staging: Staging,
        launch: &Launch,
        batch: u64,
    ) -> Result<Setup<'a>, Error> {
        let &Recipe { ref model, seq, micro_batch, .. } = recipe;
        let (mesh, local) = (policy.mesh(launch.world)?, launch.local_world);
        let rounds = batch.div_ceil(micro_batch).div_ceil(launch.world as u64) as usize;
        Ok(Setup { model, policy, recompute, staging, mesh, local, seq, micro_batch, rounds })
    }
}

impl Setup<'_> {
    /// Tokens of a rank in a step.
    pub(super) fn tokens(&self) -> f64 {
        self.rounds as f64 * self.micro_batch as f64 * self.seq as f64
    }

    /// Bytes of a block's weights, as they are gathered.
    pub(super) fn block_bytes(&self) -> u64 {
        let layout = Layout::new(&self.model.units()[1..2], self.mesh.shard);
        (layout.units[0].padded * self.policy.weights.bytes()) as u64
    }

    /// Bytes that the ranks of a host need.
    pub(crate) fn host_bytes(&self, needs: &Needs) -> u64 {
        let of_rank = needs.memory.total().saturating_add(needs.activations);
        of_rank.saturating_mul(self.local as u64).saturating_add(self.checkpoint_bytes(needs))
    }

    /// Bytes of these that checkpoints pass through, on the host with most ranks of the first
    /// group: only these save.
    pub(crate) fn checkpoint_bytes(&self, needs: &Needs) -> u64 {
        needs.checkpoints.saturating_mul(self.local.min(self.mesh.shard) as u64)
    }

    /// The memory of a rank.
    pub(crate) fn needs(&self) -> Needs {
        self.needs_of(&self.model.layout(self.mesh.shard))
    }

    fn needs_of(&self, layout: &Layout) -> Needs {
        let Setup { model, policy, recompute, staging, mesh, local, seq, micro_batch, .. } = self;
        Needs {
            memory: Memory::of(layout, policy, *mesh).on_hosts_of(*local, layout, policy, *mesh),
            checkpoints: Saver::bytes(layout, policy, *staging),
            activations: Model::activation_bytes(model, policy.weights, *micro_batch as usize, *seq, *recompute),
        }
    }

    /// The plan of a step.
    pub(crate) fn plan(&self) -> Planned {
        let Setup { model, policy, recompute, mesh, seq, micro_batch, rounds, .. } = self;
        let layout = model.layout(mesh.shard);
        let tokens = *micro_batch as f64 * *seq as f64;
        let of_units = |flops: Vec<f64>| flops.into_iter().map(|flops| flops * tokens).collect::<Vec<_>>();
        let forward = of_units(model.forward_flops(*seq));
        let again = of_units(model.recomputed_flops(*seq, *recompute));
        let backward = forward.iter().zip(again).map(|(flops, again)| BACKWARD_FLOPS * flops + again).collect();
        let plan = Plan::step(&Outline::new(&layout, policy, *mesh), *rounds);
        Planned {
            plan: plan.verify().expect("the planner makes no races"),
            work: Work { forward, backward },
            needs: self.needs_of(&layout),
            layout,
        }
    }
}
