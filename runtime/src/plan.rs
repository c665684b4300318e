//! A training step as data: operations, and what each must wait for.
//!
//! Operations run on four queues, each first-in, first-out: compute, gather, reduce and replicate.
//! Whatever else must be ordered is an edge. The engine executes just these edges and adds no
//! other, so a plan that passes [`Plan::verify`] is a step without races, and a plan that lacks an
//! edge is a race that a test can show.
//!
//! The order of the list is the order in which operations are started. It is the same on every rank.

use std::ops::Range;

use crate::Outline;
use crate::builder::Builder;
use crate::verify::verify;

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
    /// Whether the unit's part of the slot is zeroed before.
    pub first: bool,
    /// Whether the unit's gradient is complete then: it is reduced with its bucket.
    pub last: bool,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Brings the weights of a bucket's units into a slot, from the shards of this rank's group.
    /// Gather queue.
    Gather {
        /// The bucket.
        bucket: usize,
        /// The weight slot.
        slot: usize,
    },
    /// Lets the caller compute with a unit's weights. Compute queue.
    Compute {
        /// The unit.
        unit: usize,
        /// Which way.
        pass: Pass,
        /// The weight slot that holds the unit's bucket.
        weights: usize,
        /// What a backward pass adds to.
        gradients: Option<Fill>,
    },
    /// Sums a gradient slot over the ranks of a group into their shards. Reduce queue.
    Reduce {
        /// The bucket whose gradients the slot has.
        bucket: usize,
        /// The gradient slot.
        slot: usize,
        /// How many reductions of this bucket came before: these are added to.
        round: usize,
    },
    /// Sums a bucket's gradients over the groups: their shards, or the slot where there are no
    /// shards. Replicate queue.
    AllReduce {
        /// The bucket.
        bucket: usize,
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
    /// Of a gather: whether it also starts after the last writes to the weights that it moves,
    /// which an earlier step or a load has made. Operations of the compute queue always do.
    pub after_writes: bool,
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
    /// It uses a slot that its bucket does not fit, or that the outline does not have.
    #[error("operation {index} ({action:?}) uses a slot other than {slots:?}, those that its bucket fits")]
    Slot {
        /// The operation.
        index: usize,
        /// What it does.
        action: Action,
        /// Those that it may use.
        slots: Range<usize>,
    },
    /// Something is not done as often as it must be: every gradient is summed and every unit updated once, and each forward pass has its backward pass.
    #[error("{what} {times} times instead of {expected}")]
    Count {
        /// What is done, and with which unit or bucket.
        what: String,
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
    /// When there are no rounds, no units, no gradient slot, or no room for more buckets than the
    /// prefetched ones.
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

    /// Checks that every order that the memory needs follows from the queues and the edges: no use
    /// before its gather, no gather or backward pass into a slot that is still in use, no slot that
    /// the bucket does not fit, no reduction before its gradients, every gradient reduced exactly
    /// once, the agreement after everything, updates after the agreement. The plan is the second of
    /// two steps that follow each other: what it reads and overwrites is ordered after the updates
    /// of the step before.
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
