//! A training step as data: operations, and what each must wait for.
//!
//! Operations run on four queues, each first-in, first-out: compute, gather, reduce and replicate. Whatever else must be ordered is an
//! edge. The engine executes just these edges, so a plan that passes [`Plan::verify`] is a step without races, and a plan that
//! lacks an edge is a race that a test can show.
//!
//! The order of the list is the order in which operations are started. It is the same on every rank.

use crate::builder::Builder;
use crate::verify::verify;
use crate::{Gather, Layout, Mesh, Policy};

/// Which way through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Activations.
    Forward,
    /// Gradients.
    Backward,
}

/// A gradient slot that a backward pass adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fill {
    /// The slot.
    pub slot: usize,
    /// Whether the slot is zeroed before.
    pub first: bool,
    /// Whether it is reduced next.
    pub last: bool,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Brings a unit's weights into a slot, from the shards of this rank's group. Gather queue.
    Gather {
        /// The unit.
        unit: usize,
        /// The weight slot.
        slot: usize,
    },
    /// Lets the caller compute with a unit's weights. Compute queue.
    Compute {
        /// The unit.
        unit: usize,
        /// Which way.
        pass: Pass,
        /// The weight slot that holds the unit.
        weights: usize,
        /// What a backward pass adds to.
        gradients: Option<Fill>,
    },
    /// Sums a gradient slot over the ranks of a group into their shards. Reduce queue.
    Reduce {
        /// The unit.
        unit: usize,
        /// The gradient slot.
        slot: usize,
        /// How many reductions of this unit came before: these are added to.
        round: usize,
    },
    /// Sums a unit's gradient over the groups: its shard, or the slot where there are no shards. Replicate queue.
    AllReduce {
        /// The unit.
        unit: usize,
    },
    /// The scalar all-reduce after which every rank knows the norm, and no rank reads weights any more. Compute queue.
    Agree,
    /// Updates this rank's shard of a unit. Compute queue.
    Update {
        /// The unit.
        unit: usize,
    },
}

/// One operation of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Operation {
    /// What it does.
    pub action: Action,
    /// Earlier operations that must be complete before it starts.
    pub after: Vec<usize>,
}

/// What a plan is made for: the memory, and which axes of the mesh there are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Outline {
    /// The units in the order of a forward pass.
    pub order: Vec<usize>,
    /// Units gathered ahead.
    pub prefetch: usize,
    /// Gathered units that exist at a time, more than `prefetch`; with as many as units each has the slot of its number. None: weights are whole, and never
    /// gathered.
    pub weights: Option<usize>,
    /// Gradients that exist at a time, each reduced in every round. None: every unit has the slot of its number, and is reduced in the last round.
    pub gradients: Option<usize>,
    /// Whether gradients are reduced to shards.
    pub sharded: bool,
    /// Whether there are several groups to sum over.
    pub replicated: bool,
}

impl Outline {
    /// That of an engine with this layout and policy.
    pub fn new(layout: &Layout, policy: &Policy, mesh: Mesh) -> Outline {
        let sharded = policy.sharded;
        let weights = match (sharded.parameters, policy.gather) {
            (true, Gather::Copy) => policy.slots,
            // A window holds its unit and no other.
            (true, Gather::Window) | (false, _) => layout.units.len().max(policy.prefetch + 1),
        };
        let mut outline = Outline {
            order: layout.order.clone(),
            prefetch: policy.prefetch,
            weights: sharded.optimizer.then_some(weights),
            gradients: None,
            sharded: sharded.optimizer,
            replicated: mesh.replicate > 1,
        };
        // A unit that is used twice keeps its gradient slot in between.
        outline.gradients = sharded.gradients.then_some(policy.slots.max(outline.used_twice() + 1));
        outline
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.order.iter().max().map_or(0, |last| last + 1)
    }

    /// Number of units that a forward pass uses more than once.
    pub(crate) fn used_twice(&self) -> usize {
        let mut uses = vec![0; self.units()];
        self.order.iter().for_each(|&unit| uses[unit] += 1);
        uses.into_iter().filter(|&uses| uses > 1).count()
    }
}

/// A step, or a forward pass, as a list of operations.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// What it is made for.
    pub outline: Outline,
    /// The operations, in the order in which they start.
    pub operations: Vec<Operation>,
}

/// Why a plan is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// An edge points forward, or to itself.
    #[error("operation {index} waits for operation {after}, which starts no earlier")]
    Order {
        /// The operation.
        index: usize,
        /// What it waits for.
        after: usize,
    },
    /// An operation may start before another that it needs.
    #[error("operation {index} ({action:?}) is not ordered after {what}")]
    Race {
        /// The operation.
        index: usize,
        /// What it does.
        action: Action,
        /// What it needs.
        what: &'static str,
    },
    /// It uses a slot that the outline does not have.
    #[error("operation {index} ({action:?}) uses a slot beyond the last of {slots}")]
    Slot {
        /// The operation.
        index: usize,
        /// What it does.
        action: Action,
        /// How many there are.
        slots: usize,
    },
    /// Something is not done as often as it must be: every gradient is summed and every unit updated once, and each forward pass has its backward pass.
    #[error("unit {unit} is {what} {times} times instead of {expected}")]
    Count {
        /// The unit.
        unit: usize,
        /// What is done with it.
        what: &'static str,
        /// How often.
        times: usize,
        /// How often it should be.
        expected: usize,
    },
}

/// A plan that has been verified.
#[derive(Clone, Debug)]
pub struct Verified(Plan);

impl std::ops::Deref for Verified {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.0
    }
}

impl Verified {
    /// Takes a plan at its word, for tests that show what a missing edge does.
    pub fn unchecked(plan: Plan) -> Verified {
        Verified(plan)
    }
}

impl Plan {
    /// A training step of `rounds` micro-batches: forward and backward through all units in each, the reductions that the outline wants, then
    /// the agreement and the updates.
    ///
    /// # Panics
    /// When there are no rounds, no units, no gradient slot, or no more weight slots than prefetched units.
    pub fn step(outline: &Outline, rounds: usize) -> Plan {
        assert!(rounds > 0, "a training step has at least one round");
        Builder::new(outline.clone(), rounds, true).build()
    }

    /// Forward passes alone, for evaluation.
    ///
    /// # Panics
    /// As for [`Plan::step`].
    pub fn forward(outline: &Outline, rounds: usize) -> Plan {
        Builder::new(outline.clone(), rounds, false).build()
    }

    /// Checks that every order that the memory needs follows from the queues and the edges: no use before its gather, no gather or
    /// backward pass into a slot that is still in use, no slot beyond the last, no reduction before its gradient, every gradient reduced exactly once,
    /// the agreement after everything, updates after the agreement.
    ///
    /// # Errors
    /// The first order that does not follow.
    pub fn verify(self) -> Result<Verified, PlanError> {
        verify(&self)?;
        Ok(Verified(self))
    }

    /// Number of collective operations in it.
    pub fn collectives(&self) -> usize {
        let is_collective = |operation: &&Operation| {
            use Action::{Agree, AllReduce, Gather, Reduce};
            matches!(operation.action, Gather { .. } | Reduce { .. } | AllReduce { .. } | Agree)
        };
        self.operations.iter().filter(is_collective).count()
    }
}
